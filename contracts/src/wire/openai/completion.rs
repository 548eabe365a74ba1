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
                    Channel::Content => &mut choice.content,
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
            What::Note => {}
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
