//! Model files made to break the loader: each is an error or a model that runs, never a panic or a flood of memory.

use std::sync::Arc;

use headgate_slm::{Error, Limits, Message, Role, Slm, Step};
use proptest::prelude::*;

const MODEL: &[u8] = include_bytes!("../model/demo-q8.gguf");

/// Where the tensors' bytes begin, more or less: all that has structure is before it.
fn header_bytes() -> usize {
    let last_name = b"output_norm.weight";
    let names = MODEL.windows(last_name.len()).rposition(|w| w == last_name).expect("the tensor list");
    names + 8 * 1024
}

fn patched(at: usize, bytes: &[u8]) -> Vec<u8> {
    let mut model = MODEL.to_vec();
    model[at..at + bytes.len()].copy_from_slice(bytes);
    model
}

/// What comes right after `key` in the dictionary: its type, then its value.
fn after(key: &str) -> usize {
    MODEL.windows(key.len()).position(|w| w == key.as_bytes()).expect("the key") + key.len()
}

#[test]
fn a_file_cut_anywhere_is_an_error() {
    for length in 0..header_bytes() {
        assert!(Slm::from_bytes(&MODEL[..length]).is_err(), "cut to {length} bytes");
    }
    assert!(Slm::from_bytes(&MODEL[..MODEL.len() - 1]).is_err());
    assert!(Slm::from_bytes(MODEL).is_ok());
}

#[test]
fn counts_no_file_can_hold_are_errors() {
    let huge = u64::MAX.to_le_bytes();
    let text = |key| after(key) + 4;
    let list_length = |key| after(key) + 4 + 4;
    for (what, at) in [
        ("tensors", 8),
        ("keys", 16),
        ("the first key's length", 24),
        ("the architecture's length", text("general.architecture")),
        ("tokens", list_length("tokenizer.ggml.tokens")),
        ("scores", list_length("tokenizer.ggml.scores")),
        ("a tensor's size", after("blk.0.attn_q.weight") + 4),
        ("a tensor's offset", after("blk.0.attn_q.weight") + 4 + 16 + 4),
    ] {
        assert!(Slm::from_bytes(&patched(at, &huge)).is_err(), "{what}");
        assert!(Slm::from_bytes(&patched(at, &(1u64 << 40).to_le_bytes())).is_err(), "{what}");
    }
}

#[test]
fn numbers_that_make_no_model_are_errors() {
    for key in [
        "llama.embedding_length",
        "llama.block_count",
        "llama.feed_forward_length",
        "llama.attention.head_count",
        "llama.attention.head_count_kv",
        "llama.context_length",
        "tokenizer.ggml.eos_token_id",
    ] {
        for value in [0, 5, 1024, u32::MAX] {
            let is_fine = matches!((key, value), ("llama.context_length", 5 | 1024) | ("tokenizer.ggml.eos_token_id", 0 | 5));
            let loaded = Slm::from_bytes(&patched(after(key) + 4, &u32::to_le_bytes(value)));
            assert_eq!(loaded.is_ok(), is_fine, "{key} = {value}: {:?}", loaded.err());
        }
    }
}

#[test]
fn errors_say_what_is_wrong() {
    assert!(matches!(Slm::from_bytes(b"GIF89a"), Err(Error::NotGguf)));
    assert!(matches!(Slm::from_bytes(b"GG"), Err(Error::EndsEarly { .. })));
    assert!(matches!(Slm::load("no/such/file.gguf"), Err(Error::Read(_))));
    let unsupported = Slm::from_bytes(&patched(after("general.architecture") + 4 + 8, b"gptxx")).expect_err("not llama");
    assert_eq!(unsupported.to_string(), "not supported: architecture gptxx; llama is");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn a_file_with_wrong_bytes_is_an_error_or_a_model_that_runs(
        changes in prop::collection::vec((0..header_bytes(), any::<u8>()), 1..4),
    ) {
        let mut model = MODEL.to_vec();
        for (at, byte) in changes {
            model[at] = byte;
        }
        if let Ok(slm) = Slm::from_bytes(&model) {
            let slm = Arc::new(slm);
            let hello = Message { role: Role::User, content: "hello".into() };
            if let Ok(prompt) = slm.prompt(&[hello], 3) {
                let mut generation = slm.generate(prompt, Limits { max_tokens: 3, ..Limits::default() });
                while !matches!(generation.step(), Step::End(..)) {}
                prop_assert!(generation.answer_ids().len() <= 3);
            }
        }
    }
}
