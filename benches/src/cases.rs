//! Everything that is measured, once: criterion takes its time, valgrind counts its instructions.

use std::{
    hint::black_box,
    pin::pin,
    task::{Context, Poll, Waker},
};

use headgate_contracts::{
    Batch, Dispatch, Head, Prompt, Record, SessionId, TurnId, What,
    wire::{chat, openai, sse},
};
use headgate_filters::{Built, Chain, chain};
use headgate_policy::{Claims, Decision, Digest, Facts, Hasher};

use crate::{MODERATION, NOW, batch_of, begun, built, chunk, conversation, issuer, ring, turn, unusual_chunk};

/// What one run of a case goes through.
#[derive(Debug, Clone, Copy)]
pub enum Size {
    /// So many events, or other things that are counted.
    Events(u64),
    /// So many bytes.
    Bytes(u64),
}

/// Measures one case after another.
pub trait Meter {
    /// Measures `run` alone, on what `setup` makes for each of its runs. `name` is unique, and begins with a group and `": "`.
    fn measure<I>(&mut self, name: &str, size: Size, setup: impl FnMut() -> I, run: impl FnMut(&mut I));
}

/// Ends with a blank: nothing in it can be part of a match that is still forming.
const CLEAN: &str = "the lamp was lit ";
const ONE: Size = Size::Events(1);
/// Events in one read, where a model is fast or a way is slow.
const BURST: usize = 32;

/// Shows all cases to a meter, always in the same order.
pub fn measure(meter: &mut impl Meter) {
    read(meter);
    judge(meter);
    judge_again(meter);
    write(meter);
    begin(meter);
    verdict(meter);
    whole(meter);
}

fn read(meter: &mut impl Meter) {
    let single = format!("data: {}\n\n", chunk(CLEAN));
    for (name, count) in [("read: sse, one event", 1), ("read: sse, burst of 32", BURST)] {
        let bytes = single.repeat(count);
        let mut decoder = sse::Decoder::new(sse::Limits::default());
        let run = |(): &mut ()| {
            let mut rest = black_box(bytes.as_bytes());
            while let Ok(Some(frame)) = decoder.read(&mut rest) {
                black_box(frame.data);
            }
        };
        meter.measure(name, Size::Events(count as u64), || (), run);
    }
    let bytes = single.repeat(BURST);
    let (mut decoder, mut head, mut batch) = (sse::Decoder::new(sse::Limits::default()), Head::default(), Batch::new());
    let run = |(): &mut ()| {
        batch.clear();
        let mut rest = black_box(bytes.as_bytes());
        while let Ok(Some(frame)) = decoder.read(&mut rest) {
            openai::decode(frame.data, &mut head, &mut batch).expect("a chunk");
        }
    };
    meter.measure("read: openai chunks, burst of 32", Size::Events(BURST as u64), || (), run);
    for (name, data) in [("read: openai chunk, usual shape", chunk(CLEAN)), ("read: openai chunk, by the parser", unusual_chunk(CLEAN))] {
        let (mut head, mut batch) = (Head::default(), Batch::new());
        let run = |(): &mut ()| {
            batch.clear();
            openai::decode(black_box(&data), &mut head, &mut batch).expect("a chunk");
        };
        meter.measure(name, ONE, || (), run);
    }
}

/// Passes the same events again and again through one turn's chain: cost does not depend on what went before.
fn pass(meter: &mut impl Meter, name: &str, size: Size, mut chain: Chain, texts: &[&str]) {
    let run = |batch: &mut Batch| {
        chain.pass(batch).expect("nothing to refuse");
        black_box(batch.events().len());
    };
    meter.measure(name, size, || batch_of(texts), run);
}

fn judge(meter: &mut impl Meter) {
    // Compiled once: a thousand phrases take seconds where each instruction is counted.
    let built = built(&format!("{MODERATION}{}", "\n- budget: { output_tokens: 1000000000 }".repeat(7)));
    let first = built.iter().position(|step| step.name == "moderation").expect("it is in there") + 1;
    let chain_of = |n: usize| chain(&built[..first + n - 1], &mut turn());
    let cases: [(&str, &[&str]); 4] = [
        ("clean", &[CLEAN]),
        ("clean, held by its last word", &[" lamp"]),
        ("a phrase begins and breaks off", &["forbidden phrase ", "of no number "]),
        ("digits that become no card", &["room 4111 ", "11 and on "]),
    ];
    for (name, texts) in cases {
        pass(meter, &format!("judge: moderation: {name}"), Size::Events(texts.len() as u64), chain_of(1), texts);
    }
    let long = CLEAN.repeat(60);
    pass(meter, "judge: moderation: 1 KB of clean text", Size::Bytes(long.len() as u64), chain_of(1), &[&long]);
    for n in 1..=8 {
        pass(meter, &format!("judge: chain of {n}"), ONE, chain_of(n), &[CLEAN]);
    }
    pass(meter, "judge: chain of 8, burst of 32", Size::Events(BURST as u64), chain_of(8), &[CLEAN; BURST]);
    pass(meter, "judge: gate alone", ONE, begun("- budget: { output_tokens: 1000000000 }"), &[CLEAN]);
    meter.measure("begin: with moderation", ONE, turn, |turn| drop(black_box(chain(black_box(&built[..first]), turn))));
}

/// Judges conversations that are sent whole for each of their turns, with memory and without.
fn judge_again(meter: &mut impl Meter) {
    let without = MODERATION.replace("- moderation: {", "- moderation: { remember: 0B,");
    assert_ne!(without, MODERATION, "the setting found no place");
    let (with, without) = (built(MODERATION), built(&without));
    let long = [200, 1000].repeat(25);
    for (what, bytes) in [("50 messages", long.as_slice()), ("a message of 64 bytes", &[64]), ("a message of 1 KB", &[1000])] {
        let whole = Size::Bytes(bytes.iter().sum());
        let mut number = 0;
        // None of its messages was ever seen, or none but the last.
        let mut prompt = |new: usize| {
            number += 1;
            conversation(bytes, new, number)
        };
        for (chain_is, built) in [("no memory", &without), ("all new", &with)] {
            let mut chain = chain(built, &mut turn());
            meter.measure(&format!("prompt: {what}, {chain_is}"), whole, || prompt(bytes.len()), |prompt| ask(&mut chain, prompt));
        }
        let mut chain = chain(&with, &mut turn());
        ask(&mut chain, &mut prompt(0));
        let name = format!("prompt: {what}, all known");
        meter.measure(&name, whole, || prompt(0), |prompt| ask(&mut chain, prompt));
        if bytes.len() > 1 {
            meter.measure(&format!("prompt: {what}, two of them new"), whole, || prompt(2), |prompt| ask(&mut chain, prompt));
        }
    }
}

/// Shows a prompt to a chain in which nothing waits.
fn ask(chain: &mut Chain, prompt: &mut Prompt) {
    let said = pin!(chain.prompt(black_box(prompt))).poll(&mut Context::from_waker(Waker::noop()));
    assert!(matches!(said, Poll::Ready(Ok(()))), "nothing to refuse, nothing to wait for");
}

fn write(meter: &mut impl Meter) {
    let batch = batch_of(&[CLEAN]);
    let event = batch.events()[0];
    let raw = event.raw.expect("a chunk that may be passed on as it came");
    let (mut payload, mut out) = (Vec::new(), Vec::new());
    let as_it_came = |(): &mut ()| {
        out.clear();
        sse::encode(&mut out, None, None, black_box(batch.wire(raw)));
    };
    meter.measure("write: openai, as it came", ONE, || (), as_it_came);
    let envelope = openai::Envelope::new("chatcmpl-0123456789abcdef", "demo", 1_763_712_000);
    let anew = |(): &mut ()| {
        payload.clear();
        out.clear();
        envelope.event(&mut payload, &batch, black_box(&event));
        sse::encode(&mut out, None, None, &payload);
    };
    meter.measure("write: openai, written anew", ONE, || (), anew);
    let turn = TurnId::fresh();
    let ours = |(): &mut ()| {
        payload.clear();
        out.clear();
        let name = chat::encode(&batch, black_box(&event), &mut payload);
        sse::encode(&mut out, Some((&turn, 12_345)), name, &payload);
    };
    meter.measure("write: ours, with its number", ONE, || (), ours);
}

fn begin(meter: &mut impl Meter) {
    let built = built("[]");
    meter.measure("begin: the filters of every chain", ONE, turn, |turn| drop(black_box(chain(black_box(&built), turn))));
}

fn verdict(meter: &mut impl Meter) {
    const FACTS: Facts<'static> = Facts {
        tid: "acme",
        sub: "u1",
        sid: "0193a5f0-7e1c-7000-8000-000000000000",
        turn: "0193a5f0-7e1c-7000-8000-000000000001",
        dec: Decision::Allow,
        cat: &[],
        trc: None,
    };
    let (ring, issuer) = (ring(), issuer());
    let claims: Claims<&str> = issuer.dispatch(&FACTS, "POST", "/v1/conversation/stream", Digest::of(b"{}"), NOW).expect("random bytes");
    let bytes = [b'x'; 1024];
    meter.measure("verdict: digest of 1 KB", Size::Bytes(1024), || (), |()| _ = black_box(Digest::of(black_box(&bytes))));
    meter.measure("verdict: sign", ONE, || (), |()| drop(ring.sign(black_box(&claims)).expect("a key")));
    let (token, verifier) = (ring.sign(&claims).expect("a key"), ring.verifier());
    meter.measure("verdict: verify", ONE, || (), |()| drop(verifier.open(black_box(&token), NOW).expect("our own verdict")));
    let forged = format!("{}AAAA", &token[..token.len() - 4]);
    meter.measure("verdict: refuse a forged one", ONE, || (), |()| _ = verifier.open(black_box(&forged), NOW).expect_err("not ours"));
}

/// A request of 1 KB and its answer, which is not streamed: all of a turn but sockets, its log line and its metrics.
fn whole(meter: &mut impl Meter) {
    let text = CLEAN.repeat(60);
    let answer = format!(
        r#"{{"id":"chatcmpl-0123456789abcdef","object":"chat.completion","created":1763712000,"model":"demo","choices":[{{"index":0,"message":{{"role":"assistant","content":"{text}"}},"finish_reason":"stop"}}],"usage":{{"prompt_tokens":16,"completion_tokens":16,"total_tokens":32}}}}"#
    );
    for (name, signed) in [("turn: 1 KB asked and answered", "\n- policy_headers"), ("turn: the same, not signed", "")] {
        let built = built(&format!("{MODERATION}{signed}\n- budget: {{ output_tokens: 1000000000 }}"));
        let mut number = 0;
        // Never the same text twice, which would be remembered.
        let request = || {
            number += 1;
            format!(r#"{{"model":"demo","messages":[{{"role":"user","content":"{number}: {text}"}}]}}"#)
        };
        meter.measure(name, ONE, request, |request| drop(black_box(answered(&built, black_box(request), black_box(&answer)))));
    }
}

/// What the client is sent.
fn answered(built: &[Built], request: &str, answer: &str) -> Vec<u8> {
    let mut turn = turn();
    let request = openai::Request::parse(request.as_bytes()).expect("a request");
    let mut chain = chain(built, &mut turn);
    let mut prompt = Prompt::new(turn.id, SessionId::fresh(), request.messages);
    prompt.settings = request.settings;
    ask(&mut chain, &mut prompt);
    let body = openai::encode_request(&prompt, openai::Form::Whole);
    if let Some(seal) = &prompt.seal {
        let dispatch = Dispatch { method: "POST", path: "/v1/chat/completions", body: &body };
        drop(black_box(seal(&prompt, &dispatch).expect("a key")));
    }
    let (mut head, mut batch) = (Head::default(), Batch::new());
    openai::decode_answer(answer.as_bytes(), &mut head, &mut batch).expect("an answer");
    chain.head(&mut head).expect("nothing to refuse");
    let (mut completion, mut digest) = (openai::Completion::new(), Hasher::new());
    let mut record = Record::default();
    chain.pass(&mut batch).expect("nothing to refuse");
    let mut last = Batch::new();
    chain.end(Ok(()), &mut last, &mut record).expect("nothing to refuse");
    for batch in [&batch, &last] {
        for event in batch.events() {
            if let What::Text { text, .. } = event.what {
                digest.update(batch.text(text).as_bytes());
            }
        }
        completion.add(batch);
    }
    let verdict = record.seal.as_ref().and_then(|seal| seal(&record, *digest.finish().as_bytes()));
    let tail = openai::Tail { outcome: record.outcome, verdict: verdict.as_deref() };
    let mut out = Vec::new();
    completion.write(&mut out, &openai::Envelope::of(&head, "", "", 0), Some(tail));
    out
}
