//! What one event costs on its way: read, decoded, judged, written.

use std::hint::black_box;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use headgate_benches::{MODERATION, batch_of, begun, chain_of, chunk, unusual_chunk};
use headgate_contracts::{
    Batch, Head, TurnId,
    wire::{chat, openai, sse},
};
use headgate_filters::Chain;

/// Ends with a blank: nothing in it can be part of a match that is still forming.
const CLEAN: &str = "the lamp was lit ";

fn read(c: &mut Criterion) {
    let mut group = c.benchmark_group("read");
    let single = format!("data: {}\n\n", chunk(CLEAN));
    for (name, count) in [("sse, one event", 1), ("sse, burst of 32", 32)] {
        let bytes = single.repeat(count);
        let mut decoder = sse::Decoder::new(sse::Limits::default());
        group.throughput(Throughput::Elements(count as u64));
        group.bench_function(name, |b| {
            b.iter(|| {
                decoder.push(black_box(bytes.as_bytes()));
                while let Ok(Some(frame)) = decoder.next() {
                    black_box(frame.data);
                }
            });
        });
    }
    group.throughput(Throughput::Elements(1));
    for (name, data) in [("openai chunk, usual shape", chunk(CLEAN)), ("openai chunk, by the parser", unusual_chunk(CLEAN))] {
        let (mut head, mut batch) = (Head::default(), Batch::new());
        group.bench_function(name, |b| {
            b.iter(|| {
                batch.clear();
                openai::decode(black_box(&data), &mut head, &mut batch).expect("a chunk")
            });
        });
    }
    group.finish();
}

/// Passes the same events again and again through one turn's chain: cost does not depend on what went before.
fn pass(b: &mut criterion::Bencher<'_>, chain: &mut Chain, texts: &[&str]) {
    b.iter_batched_ref(
        || batch_of(texts),
        |batch| {
            chain.pass(batch).expect("nothing to refuse");
            black_box(batch.events().len())
        },
        BatchSize::SmallInput,
    );
}

fn judge(c: &mut Criterion) {
    let mut group = c.benchmark_group("judge");
    group.throughput(Throughput::Elements(1));
    let cases: [(&str, &[&str]); 4] = [
        ("clean", &[CLEAN]),
        ("clean, held by its last word", &[" lamp"]),
        ("a phrase begins and breaks off", &["forbidden phrase ", "of no number "]),
        ("digits that become no card", &["room 4111 ", "11 and on "]),
    ];
    for (name, texts) in cases {
        let mut chain = begun(MODERATION);
        group.throughput(Throughput::Elements(texts.len() as u64));
        group.bench_function(format!("moderation: {name}"), |b| pass(b, &mut chain, texts));
    }
    group.throughput(Throughput::Elements(1));
    for n in 1..=8 {
        let mut chain = chain_of(n);
        group.bench_function(format!("chain of {n}"), |b| pass(b, &mut chain, &[CLEAN]));
    }
    let mut chain = begun("- budget: { output_tokens: 1000000000 }");
    group.bench_function("gate alone", |b| pass(b, &mut chain, &[CLEAN]));
    let long = CLEAN.repeat(60);
    let mut chain = begun(MODERATION);
    group.throughput(Throughput::Bytes(long.len() as u64));
    group.bench_function("moderation: 1 KB of clean text", |b| pass(b, &mut chain, &[&long]));
    group.finish();
}

fn write(c: &mut Criterion) {
    let mut group = c.benchmark_group("write");
    group.throughput(Throughput::Elements(1));
    let batch = batch_of(&[CLEAN]);
    let event = batch.events()[0];
    let raw = event.raw.expect("a chunk that may be passed on as it came");
    let (mut payload, mut out) = (Vec::new(), Vec::new());
    group.bench_function("openai, as it came", |b| {
        b.iter(|| {
            out.clear();
            sse::encode(&mut out, None, None, black_box(batch.wire(raw)));
        });
    });
    let envelope = openai::Envelope::new("chatcmpl-0123456789abcdef", "demo", 1_763_712_000);
    group.bench_function("openai, written anew", |b| {
        b.iter(|| {
            payload.clear();
            out.clear();
            envelope.event(&mut payload, &batch, black_box(&event));
            sse::encode(&mut out, None, None, &payload);
        });
    });
    let turn = TurnId::fresh();
    group.bench_function("ours, with its number", |b| {
        b.iter(|| {
            payload.clear();
            out.clear();
            let name = chat::encode(&batch, black_box(&event), &mut payload);
            sse::encode(&mut out, Some((&turn, 12_345)), name, &payload);
        });
    });
    group.finish();
}

criterion_group!(event, read, judge, write);
criterion_main!(event);
