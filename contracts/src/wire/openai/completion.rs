//! An answer that is not streamed, put together from its events.

use std::collections::BTreeMap;

use super::encode::{Envelope, Tail, open, write_usage};
use crate::wire::json;
use crate::{Batch, Channel, Event, Finish, Usage, What};

/// Collects the events of an answer. How much text that may be is the turn's bound, not this one's; how many choices and
/// calls is bounded by the decoders.
#[derive(Clone, Default)]
pub struct Completion {
    choices: BTreeMap<u16, Choice>,
    /// What the answer used, as last said.
    pub usage: Option<Usage>,
}

/// One choice of an answer. Text has no Debug form.
#[derive(Clone, Default)]
pub struct Choice {
    /// What the user reads.
    pub content: String,
    /// What the model thought aloud.
    pub reasoning: String,
    /// The model's own refusal.
    pub refusal: String,
    /// The calls it makes, by index.
    pub tools: BTreeMap<u16, ToolCall>,
    /// Why it finished, if it did.
    pub finish: Option<Finish>,
}

/// One call of a tool.
#[derive(Clone, Default)]
pub struct ToolCall {
    /// Its id.
    pub id: String,
    /// The function.
    pub name: String,
    /// Its arguments: JSON, as far as the model can write it.
    pub arguments: String,
}

impl Completion {
    /// An answer of which nothing is known yet.
    pub fn new() -> Completion {
        Completion::default()
    }

    /// Adds all events of a batch.
    pub fn add(&mut self, batch: &Batch) {
        for event in batch.events() {
            self.add_event(batch, event);
        }
    }

    /// Adds one event of a batch.
    pub fn add_event(&mut self, batch: &Batch, event: &Event) {
        match event.what {
            What::Text { lane, text } => {
                let choice = self.choices.entry(lane.choice).or_default();
                let lane = match lane.channel {
                    // No text event is one of a question: it would be the answer's.
                    Channel::Content | Channel::Question(_) => &mut choice.content,
                    Channel::Reasoning => &mut choice.reasoning,
                    Channel::Refusal => &mut choice.refusal,
                    Channel::ToolArguments(index) => &mut choice.tools.entry(index).or_default().arguments,
                };
                lane.push_str(batch.text(text));
            }
            What::Tool { choice, index, id, name } => {
                let call = self.choices.entry(choice).or_default().tools.entry(index).or_default();
                call.id = batch.text(id).to_owned();
                call.name = batch.text(name).to_owned();
            }
            What::Finish { choice, finish } => self.finish(choice, finish),
            What::Usage(usage) => self.usage = Some(usage),
            What::Confirm { .. } | What::Note => {}
        }
    }

    /// Finishes a choice: policy may have to where the model did not.
    pub fn finish(&mut self, choice: u16, finish: Finish) {
        self.choices.entry(choice).or_default().finish = Some(finish);
    }

    /// The choices, by index.
    pub fn choices(&self) -> impl Iterator<Item = (u16, &Choice)> {
        self.choices.iter().map(|(index, choice)| (*index, choice))
    }

    /// The first choice, where there is one.
    pub fn first(&self) -> Option<&Choice> {
        self.choices.values().next()
    }

    /// Writes the answer. One without any choice gets an empty one: SDKs read the first without looking.
    pub fn write(&self, out: &mut Vec<u8>, envelope: &Envelope, tail: Option<Tail<'_>>) {
        open(out, "chat.completion", envelope.id(), envelope.model(), envelope.created());
        json::member(out, "choices");
        out.push(b'[');
        if self.choices.is_empty() {
            Choice::default().write(out, 0);
        }
        for (i, (index, choice)) in self.choices.iter().enumerate() {
            if i > 0 {
                out.push(b',');
            }
            choice.write(out, *index);
        }
        out.push(b']');
        if let Some(usage) = self.usage {
            json::member(out, "usage");
            write_usage(out, usage);
        }
        if let Some(tail) = tail {
            tail.write(out);
        }
        out.push(b'}');
    }
}

impl Choice {
    fn write(&self, out: &mut Vec<u8>, index: u16) {
        out.extend_from_slice(b"{\"index\":");
        json::number(out, index.into());
        out.extend_from_slice(b",\"message\":{\"role\":\"assistant\",\"content\":");
        if self.content.is_empty() && !self.tools.is_empty() {
            out.extend_from_slice(b"null");
        } else {
            json::string(out, &self.content);
        }
        if !self.reasoning.is_empty() {
            json::member(out, "reasoning_content");
            json::string(out, &self.reasoning);
        }
        if !self.refusal.is_empty() {
            json::member(out, "refusal");
            json::string(out, &self.refusal);
        }
        if !self.tools.is_empty() {
            json::member(out, "tool_calls");
            write_tools(out, self.tools.values());
        }
        out.extend_from_slice(b"},\"finish_reason\":\"");
        out.extend_from_slice(self.finish.unwrap_or_default().as_str().as_bytes());
        out.extend_from_slice(b"\"}");
    }
}

fn write_tools<'a>(out: &mut Vec<u8>, tools: impl Iterator<Item = &'a ToolCall>) {
    out.push(b'[');
    for (i, call) in tools.enumerate() {
        if i > 0 {
            out.push(b',');
        }
        out.extend_from_slice(b"{\"id\":");
        json::string(out, &call.id);
        out.extend_from_slice(b",\"type\":\"function\",\"function\":{\"name\":");
        json::string(out, &call.name);
        json::member(out, "arguments");
        json::string(out, &call.arguments);
        out.extend_from_slice(b"}}");
    }
    out.push(b']');
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::wire::openai::{decode, decode_answer, models};
    use crate::{Head, Lane, Outcome};

    /// An answer with everything in it.
    fn answer() -> Batch {
        let mut batch = Batch::new();
        let lane = |choice, channel| Lane { choice, channel };
        batch.push_text(lane(0, Channel::Reasoning), "hm \"quoted\"\n");
        batch.push_text(Lane::DEFAULT, "he");
        batch.push_text(lane(1, Channel::Refusal), "no");
        batch.push_text(Lane::DEFAULT, "ll\u{1}o \u{1f600}");
        let (id, name) = (batch.keep_text("call_1"), batch.keep_text("f"));
        batch.push(Event { what: What::Tool { choice: 0, index: 1, id, name }, raw: None });
        batch.push_text(lane(0, Channel::ToolArguments(1)), "{\"a\":");
        batch.push_text(lane(0, Channel::ToolArguments(1)), "1}");
        batch.push(Event { what: What::Finish { choice: 0, finish: Finish::ToolCalls }, raw: None });
        batch.push(Event { what: What::Finish { choice: 1, finish: Finish::Stop }, raw: None });
        batch.push(Event { what: What::Usage(Usage { input_tokens: 3, output_tokens: 4 }), raw: None });
        batch
    }

    fn written(completion: &Completion, tail: Option<Tail<'_>>) -> Vec<u8> {
        let mut out = Vec::new();
        completion.write(&mut out, &Envelope::new("c\"1", "m", 7), tail);
        out
    }

    #[test]
    fn chunks_that_were_written_are_read_as_the_same_answer() {
        let batch = answer();
        let envelope = Envelope::new("c1", "m", 7);
        let (mut head, mut again) = (Head::default(), Batch::new());
        let mut role = Vec::new();
        envelope.role(&mut role, 1);
        decode(std::str::from_utf8(&role).unwrap(), &mut head, &mut again).unwrap();
        assert!(matches!(again.events(), [Event { what: What::Note, raw: Some(_) }]));
        for event in batch.events() {
            let mut out = Vec::new();
            assert!(envelope.event(&mut out, &batch, event));
            let before = again.events().len();
            decode(std::str::from_utf8(&out).unwrap(), &mut head, &mut again).unwrap();
            assert_eq!(again.events().len(), before + 1);
            assert!(again.events()[before].raw.is_some(), "our own chunks are plain: {}", String::from_utf8_lossy(&out));
        }
        let (mut expected, mut read) = (Completion::new(), Completion::new());
        expected.add(&batch);
        read.add(&again);
        assert_eq!(written(&read, None), written(&expected, None));
        assert_eq!((head.id.as_str(), head.model.as_str(), head.created), ("c1", "m", 7));
    }

    #[test]
    fn a_whole_answer_that_was_written_is_read_as_the_same_answer() {
        let mut completion = Completion::new();
        completion.add(&answer());
        let body = written(&completion, None);
        let mut batch = Batch::new();
        decode_answer(&body, &mut Head::default(), &mut batch).unwrap();
        let mut again = Completion::new();
        again.add(&batch);
        // Calls are numbered by their place in a whole answer, and both were the only one.
        assert_eq!(written(&again, None), body);
    }

    #[test]
    fn a_whole_answer_has_the_shape_that_sdks_read() {
        let mut completion = Completion::new();
        completion.add(&answer());
        let tail = Tail { outcome: Outcome::Masked, verdict: Some("a.b.c") };
        assert_eq!(
            serde_json::from_slice::<Value>(&written(&completion, Some(tail))).unwrap(),
            json!({
                "id": "c\"1", "object": "chat.completion", "created": 7, "model": "m",
                "choices": [
                    {"index": 0, "finish_reason": "tool_calls", "message": {
                        "role": "assistant", "content": "hell\u{1}o \u{1f600}", "reasoning_content": "hm \"quoted\"\n",
                        "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{\"a\":1}"}}]}},
                    {"index": 1, "finish_reason": "stop", "message": {"role": "assistant", "content": "", "refusal": "no"}},
                ],
                "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7},
                "headgate": {"outcome": "masked", "verdict": "a.b.c"},
            })
        );
        let empty: Value = serde_json::from_slice(&written(&Completion::new(), None)).unwrap();
        assert_eq!(empty["choices"][0]["message"], json!({"role": "assistant", "content": ""}));
    }

    #[test]
    fn the_last_chunk_says_what_policy_did() {
        let envelope = Envelope::new("c1", "m", 7);
        let tail = Tail { outcome: Outcome::Blocked, verdict: None };
        let mut out = Vec::new();
        envelope.finish(&mut out, 0, Finish::ContentFilter, Some(tail));
        let chunk: Value = serde_json::from_slice(&out).unwrap();
        assert_eq!(chunk["choices"], json!([{"index": 0, "delta": {}, "finish_reason": "content_filter"}]));
        assert_eq!(chunk["headgate"], json!({"outcome": "blocked"}));
        let mut out = Vec::new();
        envelope.usage(&mut out, None, Some(tail));
        let chunk: Value = serde_json::from_slice(&out).unwrap();
        assert_eq!((&chunk["choices"], &chunk["usage"]), (&json!([]), &Value::Null));
    }

    #[test]
    fn an_envelope_says_what_the_upstream_said_and_fills_in_the_rest() {
        let head = Head { id: "c9".into(), created: 9, ..Head::default() };
        let envelope = Envelope::of(&head, "ours", "demo", 1);
        assert_eq!((envelope.id(), envelope.model(), envelope.created()), ("c9", "demo", 9));
    }

    #[test]
    fn the_list_of_models_has_the_shape_that_sdks_read() {
        let mut out = Vec::new();
        models(&mut out, ["a", "b\""], 5);
        let list: Value = serde_json::from_slice(&out).unwrap();
        assert_eq!(list["data"][1], json!({"id": "b\"", "object": "model", "created": 5, "owned_by": "headgate"}));
        assert_eq!((list["object"].as_str(), list["data"].as_array().unwrap().len()), (Some("list"), 2));
    }
}
