//! Whatever a model sends: no panic; a payload that is kept raw says, to any reader of JSON, what its event says.
#![no_main]

use headgate_contracts::{
    Batch, Channel, Head, What,
    wire::openai::{Envelope, decode, decode_answer},
};
use libfuzzer_sys::fuzz_target;
use serde_json::Value;

fuzz_target!(|data: &str| {
    let mut head = Head { id: "c1".into(), model: "m".into(), created: 1, ..Head::default() };
    let mut batch = Batch::new();
    let _ = decode_answer(data.as_bytes(), &mut head.clone(), &mut Batch::new());
    if decode(data, &mut head, &mut batch).is_err() {
        assert!(batch.is_empty() && batch.bytes() == 0);
        return;
    }
    for event in batch.events() {
        let mut out = Vec::new();
        Envelope::of(&head, "c", "m", 1).event(&mut out, &batch, event);
        assert!(out.is_empty() || serde_json::from_slice::<Value>(&out).is_ok());
        let (Some(raw), What::Text { lane, text }) = (event.raw, event.what) else { continue };
        let raw: Value = serde_json::from_slice(batch.wire(raw)).expect("what is kept raw is JSON");
        let mut texts = Vec::new();
        for choice in raw["choices"].as_array().expect("a list of choices") {
            let delta = &choice["delta"];
            for name in ["content", "reasoning_content", "reasoning", "refusal"] {
                texts.extend(delta[name].as_str());
            }
            for call in delta["tool_calls"].as_array().into_iter().flatten() {
                texts.extend(call["function"]["arguments"].as_str());
            }
        }
        texts.retain(|text| !text.is_empty());
        assert_eq!(texts, [batch.text(text)]);
        assert!(matches!(lane.channel, Channel::Content | Channel::Reasoning | Channel::Refusal | Channel::ToolArguments(_)));
    }
});
