//! The answers llama.cpp gave on the embedded model, kept so that the check needs no llama.cpp; `judge.rs` wrote them.

use std::sync::Arc;

use headgate_slm::{Id, Slm};
use serde_json::Value;

#[allow(dead_code, reason = "shared by the test programs, each of which uses a part")]
mod support;

#[test]
fn greedy_answers_are_the_ones_llama_cpp_gave() {
    let slm = Arc::new(Slm::embedded());
    let golden: Vec<Value> = serde_json::from_str(include_str!("golden.json")).expect("the golden file");
    assert!(golden.len() > 10, "the golden file has conversations");
    for entry in golden {
        let ids = |name: &str| serde_json::from_value::<Vec<Id>>(entry[name].clone()).expect("tokens");
        let (prompt, answer) = support::greedy(&slm, &entry["messages"]);
        assert_eq!(prompt, ids("prompt_ids"), "the prompt of {}", entry["messages"]);
        assert_eq!(answer, ids("answer_ids"), "the answer to {}", entry["messages"]);
    }
}
