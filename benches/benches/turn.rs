//! What a turn costs beside its events: chains started, verdicts signed and checked.

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use headgate_benches::{MODERATION, NOW, built, issuer, ring, turn};
use headgate_filters::chain;
use headgate_policy::{Decision, Digest, Facts};

const FACTS: Facts<'static> = Facts {
    tid: "acme",
    sub: "u1",
    sid: "0193a5f0-7e1c-7000-8000-000000000000",
    turn: "0193a5f0-7e1c-7000-8000-000000000001",
    dec: Decision::Allow,
    cat: &[],
    trc: None,
};

fn begin(c: &mut Criterion) {
    let mut group = c.benchmark_group("begin");
    for (name, steps) in [("the filters of every chain", "[]"), ("with moderation", MODERATION)] {
        let built = built(steps);
        group.bench_function(name, |b| b.iter(|| chain(black_box(&built), &mut turn())));
    }
    group.finish();
}

fn verdict(c: &mut Criterion) {
    let mut group = c.benchmark_group("verdict");
    let (ring, issuer) = (ring(), issuer());
    let body = Digest::of(b"{}");
    let claims = issuer.dispatch(&FACTS, "POST", "/v1/conversation/stream", body, NOW).expect("random bytes");
    group.bench_function("digest of 1 KB", |b| {
        let bytes = [b'x'; 1024];
        b.iter(|| Digest::of(black_box(&bytes)));
    });
    group.bench_function("sign", |b| b.iter(|| ring.sign(black_box(&claims)).expect("a key")));
    let (token, verifier) = (ring.sign(&claims).expect("a key"), ring.verifier());
    group.bench_function("verify", |b| b.iter(|| verifier.open(black_box(&token), NOW).expect("our own verdict")));
    group.bench_function("refuse a forged one", |b| {
        let forged = format!("{}AAAA", &token[..token.len() - 4]);
        b.iter(|| verifier.open(black_box(&forged), NOW).expect_err("not ours"));
    });
    group.finish();
}

criterion_group!(turns, begin, verdict);
criterion_main!(turns);
