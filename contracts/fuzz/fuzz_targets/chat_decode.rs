//! Whatever an orchestrator sends: no panic; what is kept raw says what its event says; what is written is read again.
#![no_main]

use headgate_contracts::{
    Batch, Head, What,
    wire::chat::{decode, encode},
};
use libfuzzer_sys::fuzz_target;
use serde_json::Value;

fuzz_target!(|input: (u8, &str)| {
    let (name, data) = input;
    let names = ["open", "text", "tool", "usage", "done", "error", "gap"];
    let name = names[usize::from(name) % names.len()];
    let mut batch = Batch::new();
    if decode(name, data, &mut Head::default(), &mut batch).is_err() {
        assert!(batch.is_empty() && batch.bytes() == 0);
        return;
    }
    for event in batch.events() {
        if let (Some(raw), What::Text { text, .. }) = (event.raw, event.what) {
            let raw: Value = serde_json::from_slice(batch.wire(raw)).expect("what is kept raw is JSON");
            assert_eq!(raw["text"].as_str(), Some(batch.text(text)));
        }
        let mut out = Vec::new();
        let Some(name) = encode(&batch, event, &mut out) else { continue };
        let written = String::from_utf8(out).expect("UTF-8");
        let mut again = Batch::new();
        decode(name, &written, &mut Head::default(), &mut again).expect("what was written");
        assert_eq!(again.events().len(), 1);
    }
});
