//! A clean event costs no allocation on its whole way: from the bytes that came to the bytes that go.

use allocation_counter::measure;
use headgate_benches::{MODERATION, begun, chunk, unusual_chunk};
use headgate_contracts::{
    Batch, Head, TurnId, What,
    wire::{chat, openai, sse},
};

/// Reads, judges and writes this stream `times` over; the number of events written, and what it allocated after warming up.
fn way(stream: &str, ours: bool, times: usize) -> (usize, u64) {
    let mut decoder = sse::Decoder::new(sse::Limits::default());
    let (mut head, mut batch, mut chain) = (Head::default(), Batch::new(), begun(MODERATION));
    let envelope = openai::Envelope::new("chatcmpl-0123456789abcdef", "demo", 1_763_712_000);
    let (mut payload, mut out, turn) = (Vec::new(), Vec::new(), TurnId::fresh());
    let mut run = |times: usize| {
        let mut written = 0;
        for _ in 0..times {
            batch.clear();
            out.clear();
            let mut rest = stream.as_bytes();
            while let Some(frame) = decoder.read(&mut rest).unwrap() {
                openai::decode(frame.data, &mut head, &mut batch).unwrap();
            }
            chain.pass(&mut batch).unwrap();
            for event in batch.events().iter().filter(|event| matches!(event.what, What::Text { .. })) {
                payload.clear();
                match (ours, event.raw) {
                    (true, _) => {
                        let name = chat::encode(&batch, event, &mut payload);
                        sse::encode(&mut out, Some((&turn, 1)), name, &payload);
                    }
                    (false, Some(raw)) => sse::encode(&mut out, None, None, batch.wire(raw)),
                    (false, None) => {
                        envelope.event(&mut payload, &batch, event);
                        sse::encode(&mut out, None, None, &payload);
                    }
                }
                written += 1;
            }
        }
        written
    };
    run(50);
    let mut written = 0;
    let allocated = measure(|| written = run(times)).count_total;
    (written, allocated)
}

fn stream(chunks: &[String]) -> String {
    chunks.iter().map(|chunk| format!("data: {chunk}\n\n")).collect()
}

#[test]
fn a_clean_event_is_passed_on_without_an_allocation() {
    let one_by_one = stream(&[chunk("the lamp was lit ")]);
    let burst = stream(&["the ", "lamp ", "was ", "lit. "].map(chunk));
    for ours in [false, true] {
        assert_eq!(way(&one_by_one, ours, 1000), (1000, 0), "one by one, in our dialect: {ours}");
        assert_eq!(way(&burst, ours, 250), (1000, 0), "in bursts, in our dialect: {ours}");
    }
}

#[test]
fn an_event_whose_last_word_waits_costs_no_allocation_either() {
    let tokens = stream(&[" lamp", " was", " lit", " and"].map(chunk));
    for ours in [false, true] {
        // Of each read: the word that was held, three events as they came, and the blank before the word that is held now.
        assert_eq!(way(&tokens, ours, 250), (1250, 0), "in our dialect: {ours}");
    }
}

#[test]
fn the_counter_counts() {
    let (_, allocated) = way(&stream(&[unusual_chunk("write to bob@example.com now ")]), false, 10);
    assert!(allocated > 0);
}
