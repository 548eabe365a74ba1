//! Prints what reading and writing one event costs: `cargo run --release -p headgate-contracts --example codec_cost`.
#![allow(clippy::print_stdout, reason = "the figures are what it is for")]

use std::{hint::black_box, time::Instant};

use headgate_contracts::{
    Batch, Head, Lane, TurnId,
    wire::{chat, frames, openai, sse},
};

/// The best of 50 rounds: what the code costs, without what its neighbours on the machine cost.
fn measure(name: &str, per_round: u32, mut run: impl FnMut()) {
    let best = (0..50)
        .map(|_| {
            let start = Instant::now();
            (0..2000).for_each(|_| run());
            start.elapsed()
        })
        .min()
        .unwrap_or_default();
    println!("{name:<44} {:>7.1} ns", best.as_nanos() as f64 / f64::from(2000 * per_round));
}

fn main() {
    let chunk = r#"{"id":"chatcmpl-0123456789abcdef0123456789abcdef","object":"chat.completion.chunk","created":1760000000,"model":"meta-llama/Llama-3.1-8B-Instruct","choices":[{"index":0,"delta":{"content":" stream"},"logprobs":null,"finish_reason":null,"stop_reason":null}]}"#;
    let unusual = chunk.replace("\"stop_reason\"", "\"matched_stop\"");
    let ours = r#"{"text":" stream"}"#;
    println!("a chunk of {} bytes, an event of ours of {} bytes", chunk.len(), ours.len());

    let mut burst = Vec::new();
    (0..32).for_each(|_| sse::encode(&mut burst, None, None, chunk.as_bytes()));
    let mut decoder = sse::Decoder::new(sse::Limits::default());
    let mut read = |stream: &[u8]| {
        decoder.push(stream);
        while let Ok(Some(frame)) = decoder.next() {
            black_box(frame.data);
        }
    };
    measure("sse::Decoder, a frame of a burst of 32", 32, || read(&burst));
    let single = burst.get(..burst.len() / 32).unwrap_or_default();
    measure("sse::Decoder, a frame alone", 1, || read(single));

    let (mut head, mut batch) = (Head::default(), Batch::new());
    let mut decode = |chunk: &str| {
        batch.clear();
        black_box(openai::decode(black_box(chunk), &mut head, &mut batch).is_ok());
    };
    decode(chunk);
    measure("openai::decode, the usual shape", 1, || decode(chunk));
    measure("openai::decode, by the parser", 1, || decode(&unusual));
    measure("chat::decode", 1, || {
        batch.clear();
        black_box(chat::decode("text", black_box(ours), &mut head, &mut batch).is_ok());
    });

    batch.clear();
    batch.push_text(Lane::DEFAULT, " stream");
    let (event, turn, mut out) = (batch.events().first().copied(), TurnId::fresh(), Vec::new());
    let envelope = openai::Envelope::new("chatcmpl-0123456789abcdef", "demo", 1_760_000_000);
    if let Some(event) = event {
        measure("chat::encode", 1, || {
            out.clear();
            black_box(chat::encode(&batch, &event, &mut out));
        });
        measure("openai::Envelope::event", 1, || {
            out.clear();
            black_box(envelope.event(&mut out, &batch, &event));
        });
    }
    measure("sse::encode", 1, || {
        out.clear();
        sse::encode(&mut out, Some((&turn, 12_345)), Some("text"), black_box(ours.as_bytes()));
    });
    measure("frames::frame", 1, || {
        out.clear();
        frames::frame(&mut out, "text", &turn, 12_345, black_box(ours.as_bytes()));
    });
}
