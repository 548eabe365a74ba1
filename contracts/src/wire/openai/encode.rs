//! Chunks for clients, written straight into a buffer.

use crate::wire::json;
use crate::{Batch, Channel, Event, Finish, Head, Outcome, Usage, What};

/// The payload after the last chunk of an answer that is complete.
pub const DONE: &[u8] = b"[DONE]";

/// What all chunks of an answer have in common.
#[derive(Clone)]
pub struct Envelope {
    id: String,
    model: String,
    created: u64,
    /// Everything before the first choice, written once.
    prefix: Vec<u8>,
}

/// What Headgate says at the end of an answer, in the member `headgate` of its last chunk.
#[derive(Debug, Clone, Copy, Default)]
pub struct Tail<'a> {
    /// What policy did.
    pub outcome: Outcome,
    /// The signed verdict, if there is one.
    pub verdict: Option<&'a str>,
}

impl Envelope {
    /// An envelope for the answer with this id, by this model, begun at this Unix second.
    pub fn new(id: &str, model: &str, created: u64) -> Envelope {
        let mut prefix = Vec::with_capacity(128);
        open(&mut prefix, "chat.completion.chunk", id, model, created);
        Envelope { id: id.to_owned(), model: model.to_owned(), created, prefix }
    }

    /// The envelope of an answer as its upstream named it; `id`, `model` and `created` stand in for what it did not say.
    pub fn of(head: &Head, id: &str, model: &str, created: u64) -> Envelope {
        let or = |given: &str, otherwise: &str| if given.is_empty() { otherwise.to_owned() } else { given.to_owned() };
        let created = if head.created == 0 { created } else { head.created };
        Envelope::new(&or(&head.id, id), &or(&head.model, model), created)
    }

    /// The answer's id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The model.
    pub fn model(&self) -> &str {
        &self.model
    }

    /// Unix seconds.
    pub fn created(&self) -> u64 {
        self.created
    }

    /// Writes the chunk of one event; whether there is one. A [`What::Note`] has none, since a role is written by
    /// [`Envelope::role`], nor has a question, for which the dialect has no word. Raw payloads are the caller's to prefer: see [`Event::raw`].
    ///
    /// Nothing is allocated beyond `out`.
    pub fn event(&self, out: &mut Vec<u8>, batch: &Batch, event: &Event) -> bool {
        match event.what {
            What::Text { lane, text } => {
                self.delta(out, lane.choice);
                match lane.channel {
                    // No text event is one of a question: it would be the answer's.
                    Channel::Content | Channel::Question(_) => out.extend_from_slice(b"\"content\":"),
                    Channel::Reasoning => out.extend_from_slice(b"\"reasoning_content\":"),
                    Channel::Refusal => out.extend_from_slice(b"\"refusal\":"),
                    Channel::ToolArguments(index) => {
                        out.extend_from_slice(b"\"tool_calls\":[{\"index\":");
                        json::number(out, index.into());
                        out.extend_from_slice(b",\"function\":{\"arguments\":");
                    }
                }
                json::string(out, batch.text(text));
                if let Channel::ToolArguments(_) = lane.channel {
                    out.extend_from_slice(b"}}]");
                }
                out.extend_from_slice(b"},\"finish_reason\":null}]}");
            }
            What::Tool { choice, index, id, name } => {
                self.delta(out, choice);
                out.extend_from_slice(b"\"tool_calls\":[{\"index\":");
                json::number(out, index.into());
                json::member(out, "id");
                json::string(out, batch.text(id));
                out.extend_from_slice(b",\"type\":\"function\",\"function\":{\"name\":");
                json::string(out, batch.text(name));
                out.extend_from_slice(b",\"arguments\":\"\"}}]},\"finish_reason\":null}]}");
            }
            What::Finish { choice, finish } => self.finish(out, choice, finish, None),
            What::Usage(usage) => self.usage(out, Some(usage), None),
            What::Confirm { .. } | What::Note => return false,
        }
        true
    }

    /// Writes the first chunk of a choice: it says that the assistant speaks.
    pub fn role(&self, out: &mut Vec<u8>, choice: u16) {
        self.delta(out, choice);
        out.extend_from_slice(b"\"role\":\"assistant\",\"content\":\"\"},\"finish_reason\":null}]}");
    }

    /// Writes the chunk that finishes a choice, with a tail where it is the turn's last.
    pub fn finish(&self, out: &mut Vec<u8>, choice: u16, finish: Finish, tail: Option<Tail<'_>>) {
        self.delta(out, choice);
        out.extend_from_slice(b"},\"finish_reason\":\"");
        out.extend_from_slice(finish.as_str().as_bytes());
        out.extend_from_slice(b"\"}]");
        if let Some(tail) = tail {
            tail.write(out);
        }
        out.push(b'}');
    }

    /// Writes the chunk of usage, for clients that asked for it, with a tail where it is the turn's last. It has no choices:
    /// clients that did not ask may not expect that.
    pub fn usage(&self, out: &mut Vec<u8>, usage: Option<Usage>, tail: Option<Tail<'_>>) {
        out.extend_from_slice(&self.prefix);
        out.extend_from_slice(b",\"choices\":[],\"usage\":");
        match usage {
            Some(usage) => write_usage(out, usage),
            None => out.extend_from_slice(b"null"),
        }
        if let Some(tail) = tail {
            tail.write(out);
        }
        out.push(b'}');
    }

    fn delta(&self, out: &mut Vec<u8>, choice: u16) {
        out.extend_from_slice(&self.prefix);
        out.extend_from_slice(b",\"choices\":[{\"index\":");
        json::number(out, choice.into());
        out.extend_from_slice(b",\"delta\":{");
    }
}

pub(super) fn open(out: &mut Vec<u8>, object: &'static str, id: &str, model: &str, created: u64) {
    out.extend_from_slice(b"{\"id\":");
    json::string(out, id);
    json::member(out, "object");
    json::string(out, object);
    json::member(out, "created");
    json::number(out, created);
    json::member(out, "model");
    json::string(out, model);
}

pub(super) fn write_usage(out: &mut Vec<u8>, usage: Usage) {
    out.extend_from_slice(b"{\"prompt_tokens\":");
    json::number(out, usage.input_tokens);
    json::member(out, "completion_tokens");
    json::number(out, usage.output_tokens);
    json::member(out, "total_tokens");
    json::number(out, usage.input_tokens.saturating_add(usage.output_tokens));
    out.push(b'}');
}

impl Tail<'_> {
    pub(super) fn write(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(b",\"headgate\":{\"outcome\":\"");
        out.extend_from_slice(self.outcome.as_str().as_bytes());
        out.push(b'"');
        if let Some(verdict) = self.verdict {
            json::member(out, "verdict");
            json::string(out, verdict);
        }
        out.push(b'}');
    }
}

/// Writes the list of models that `GET /v1/models` answers.
pub fn models<'a>(out: &mut Vec<u8>, models: impl IntoIterator<Item = &'a str>, created: u64) {
    out.extend_from_slice(b"{\"object\":\"list\",\"data\":[");
    for (i, model) in models.into_iter().enumerate() {
        if i > 0 {
            out.push(b',');
        }
        out.extend_from_slice(b"{\"id\":");
        json::string(out, model);
        out.extend_from_slice(b",\"object\":\"model\",\"created\":");
        json::number(out, created);
        out.extend_from_slice(b",\"owned_by\":\"headgate\"}");
    }
    out.extend_from_slice(b"]}");
}
