//! Our own chat stream: a turn as clients send it, and the events of its answer as clients and the gateway read them.

use serde::{Serialize, de::MapAccess};
use serde_json::{Map, Value};

use super::frames::MAX_REF_BYTES;
use super::members::{MAX_MODEL_BYTES, Members, Others, is_call_id, is_tool_name};
use super::problem::{self, ErrorObject, PolicyObject, to_vec};
use super::walk::{Kept, Number, Object, Shape, is_label, is_one_line, walk};
use super::{MAX_INDEX, Malformed, Step, json};
use crate::{
    Batch, Category, Channel, Code, Dialect, Event, Fault, Finish, Head, Lane, Message, Outcome, Question, Refusal, SessionId, Settings,
    Span, Stop, TurnId, Usage, What,
};

/// A turn, as sent to `/v1/chat/stream`: 1 to 256 messages, at most 16 stop strings of 1 to 256 bytes, at most 16 KiB of
/// metadata, nested at most 64 deep. A member that is not here is refused by name.
#[derive(Clone, PartialEq, Serialize, schemars::JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct TurnRequest {
    /// The session it belongs to; absent: a new one is begun.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub session_id: Option<SessionId>,
    /// The conversation.
    #[schemars(length(min = 1, max = 256))]
    pub messages: Vec<Message>,
    /// The model; absent: the route's.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 256))]
    pub model: Option<String>,
    /// The most tokens the answer may have.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub max_output_tokens: Option<u32>,
    /// How freely the model chooses its words.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.0, max = 2.0))]
    pub temperature: Option<f64>,
    /// Texts at which the model stops.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(with = "crate::schema::Stops", default)]
    pub stop: Vec<String>,
    /// The client's own labels: passed on, never interpreted.
    #[serde(skip_serializing_if = "Map::is_empty")]
    #[schemars(default)]
    pub metadata: Map<String, Value>,
}

// Labels and messages are the client's text.
impl std::fmt::Debug for TurnRequest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TurnRequest")
            .field("session_id", &self.session_id)
            .field("messages", &self.messages.len())
            .field("model", &self.model)
            .finish_non_exhaustive()
    }
}

impl TurnRequest {
    /// Reads a turn.
    ///
    /// Errors: a client's fault that names the member and what was expected, never what was found.
    pub fn parse(body: &[u8]) -> Result<TurnRequest, Fault> {
        let mut members = Members::parse(body, Others::Refused)?;
        let turn = TurnRequest::take(&mut members)?;
        members.end()?;
        Ok(turn)
    }

    pub(super) fn take(members: &mut Members) -> Result<TurnRequest, Fault> {
        Ok(TurnRequest {
            session_id: members.name("session_id")?,
            messages: members.messages()?,
            model: members.text("model", MAX_MODEL_BYTES)?,
            max_output_tokens: members.integer("max_output_tokens", 1..=i64::from(u32::MAX))?.and_then(|n| u32::try_from(n).ok()),
            temperature: members.number("temperature", 0.0..=2.0)?,
            stop: members.stops()?,
            metadata: members.metadata()?,
        })
    }

    /// How the model is asked to answer.
    pub fn settings(&self) -> Settings {
        Settings {
            model: self.model.clone(),
            max_output_tokens: self.max_output_tokens,
            temperature: self.temperature,
            stop: self.stop.clone(),
            ..Settings::default()
        }
    }
}

/// The first event of an answer, with sequence number 0.
#[derive(Debug, Clone, PartialEq, Serialize, schemars::JsonSchema)]
pub struct Open {
    /// The turn; first, so that a WebSocket frame can tell that it is there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub turn_id: Option<TurnId>,
    /// Its session.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub session_id: Option<SessionId>,
    /// The model that answers.
    pub model: String,
    /// The policy's version.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub policy_version: Option<String>,
    /// The hash of the constitution in force.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub constitution_hash: Option<String>,
}

/// The last event of an answer that ended as it should, or was cut by policy.
#[derive(Debug, Clone, PartialEq, Serialize, schemars::JsonSchema)]
pub struct Done {
    /// Why the model stopped.
    pub finish: Finish,
    /// What policy did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub outcome: Option<Outcome>,
    /// What it used.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
    /// Why it was cut, where policy cut it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub refusal: Option<RefusalObject>,
    /// The signed verdict.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verdict: Option<String>,
}

/// Why policy cut an answer.
#[derive(Debug, Clone, PartialEq, Serialize, schemars::JsonSchema)]
pub struct RefusalObject {
    /// The stable code.
    pub code: Code,
    /// The rule, as configured.
    pub rule: String,
    /// The categories.
    pub categories: Vec<Category>,
}

impl From<&Refusal> for RefusalObject {
    fn from(refusal: &Refusal) -> RefusalObject {
        RefusalObject { code: refusal.code, rule: refusal.rule.to_string(), categories: refusal.categories.clone() }
    }
}

/// The last event of an answer that failed.
#[derive(Debug, Clone, PartialEq, Serialize, schemars::JsonSchema)]
pub struct ErrorEvent {
    /// The turn, where one had begun; first, so that a WebSocket frame can tell that it is there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub turn_id: Option<TurnId>,
    /// The stable code.
    pub code: Code,
    /// What the client is told.
    pub message: String,
    /// Whether the same turn may work later.
    pub retryable: bool,
    /// The last sequence number of text that counts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_seq: Option<u64>,
    /// Milliseconds after which it may.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retry_after_ms: Option<u64>,
    /// The signed verdict on what was sent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verdict: Option<String>,
    /// The same, as OpenAI's SDKs read it.
    pub error: ErrorObject,
    /// What policy had to say, where it refused the prompt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub policy: Option<PolicyObject>,
}

/// What a client says to a question: the body of `POST /v1/chat/stream/{turn_id}/confirm`, and of the call by which the gateway tells the
/// orchestrator. A member that is not here is refused by name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, schemars::JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Confirmation {
    /// Which question: the `id` of its event.
    #[schemars(length(min = 1, max = 128))]
    pub id: String,
    /// The answer.
    pub accept: bool,
}

impl Confirmation {
    /// Reads an answer.
    ///
    /// Errors: a client's fault that names the member and what was expected, never what was found.
    pub fn parse(body: &[u8]) -> Result<Confirmation, Fault> {
        let mut members = Members::parse(body, Others::Refused)?;
        let confirmation = Confirmation::take(&mut members)?;
        members.end()?;
        Ok(confirmation)
    }

    pub(super) fn take(members: &mut Members) -> Result<Confirmation, Fault> {
        let (id, accept) = (members.text("id", MAX_REF_BYTES)?, members.flag("accept")?);
        Ok(Confirmation { id: members.need("id", id)?, accept: members.need("accept", accept)? })
    }

    /// The body, as JSON.
    pub fn body(&self) -> Vec<u8> {
        to_vec(self)
    }
}

/// Events that are no longer kept, when a client comes back for them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, schemars::JsonSchema)]
pub struct Gap {
    /// The first sequence number that is missing.
    pub from: u64,
    /// The last.
    pub to: u64,
}

impl Open {
    /// The event's name.
    pub const NAME: &'static str = "open";
    /// Appends the object.
    pub fn write(&self, out: &mut Vec<u8>) {
        out.append(&mut to_vec(self));
    }
}

impl Done {
    /// The event's name.
    pub const NAME: &'static str = "done";
    /// Appends the object.
    pub fn write(&self, out: &mut Vec<u8>) {
        out.append(&mut to_vec(self));
    }
}

impl ErrorEvent {
    /// The event's name.
    pub const NAME: &'static str = "error";

    /// The event that a stop is: a refusal in it is one of the prompt, since one of the answer ends it with `done`.
    pub fn of(stop: &Stop, turn_id: Option<TurnId>, last_seq: Option<u64>) -> ErrorEvent {
        ErrorEvent {
            turn_id,
            code: stop.code(),
            message: problem::message(stop).to_owned(),
            retryable: stop.code().retryable(),
            last_seq,
            retry_after_ms: problem::retry_after_ms(stop),
            verdict: None,
            error: ErrorObject::of(stop),
            policy: PolicyObject::of_prompt(stop),
        }
    }

    /// Appends the object.
    pub fn write(&self, out: &mut Vec<u8>) {
        out.append(&mut to_vec(self));
    }
}

impl Gap {
    /// The event's name.
    pub const NAME: &'static str = "gap";
    /// Appends the object.
    pub fn write(&self, out: &mut Vec<u8>) {
        out.append(&mut to_vec(self));
    }
}

/// Appends the object of one event and gives the event's name; `None`, and nothing appended, for what has no event of its
/// own: a note, and a finish, which the stream's `done` says.
///
/// The raw payload is written where there is one in this dialect. Nothing is allocated beyond `out`.
pub fn encode(batch: &Batch, event: &Event, out: &mut Vec<u8>) -> Option<&'static str> {
    let name = match event.what {
        What::Text { .. } => "text",
        What::Tool { .. } => "tool",
        What::Confirm { .. } => "confirm",
        What::Usage(_) => "usage",
        What::Finish { .. } | What::Note => return None,
    };
    if let (Some(raw), Dialect::Headgate) = (event.raw, batch.dialect) {
        out.extend_from_slice(batch.wire(raw));
        return Some(name);
    }
    match event.what {
        What::Text { lane, text } => {
            out.extend_from_slice(b"{\"text\":");
            json::string(out, batch.text(text));
            match lane.channel {
                // No text event is one of a question: it would be the answer's.
                Channel::Content | Channel::Question(_) => {}
                Channel::Reasoning => out.extend_from_slice(b",\"lane\":\"reasoning\""),
                Channel::Refusal => out.extend_from_slice(b",\"lane\":\"refusal\""),
                Channel::ToolArguments(index) => {
                    out.extend_from_slice(b",\"lane\":\"tool_arguments\",\"tool\":");
                    json::number(out, index.into());
                }
            }
            write_choice(out, lane.choice);
        }
        What::Tool { choice, index, id, name } => {
            out.extend_from_slice(b"{\"id\":");
            json::string(out, batch.text(id));
            json::member(out, "name");
            json::string(out, batch.text(name));
            json::member(out, "index");
            json::number(out, index.into());
            write_choice(out, choice);
        }
        What::Confirm { .. } => {
            let Question { id, tool, prompt } = batch.question(event)?;
            out.extend_from_slice(b"{\"id\":");
            json::string(out, id);
            json::member(out, "prompt");
            json::string(out, prompt);
            if !tool.is_empty() {
                json::member(out, "tool");
                json::string(out, tool);
            }
        }
        What::Usage(Usage { input_tokens, output_tokens }) => {
            out.extend_from_slice(b"{\"input_tokens\":");
            json::number(out, input_tokens);
            json::member(out, "output_tokens");
            json::number(out, output_tokens);
        }
        What::Finish { .. } | What::Note => return None,
    }
    out.push(b'}');
    Some(name)
}

fn write_choice(out: &mut Vec<u8>, choice: u16) {
    if choice != 0 {
        json::member(out, "choice");
        json::number(out, choice.into());
    }
}

/// Reads one event of an orchestrator's stream into events of a batch.
///
/// `name`: the event's name; one that is not known is passed over. `data`: its object. `head`: `open` fills its model.
/// `batch`: events are appended, in this dialect; nothing is, where the object is malformed.
///
/// An event keeps its object as [`Event::raw`] while every member of it is known.
pub fn decode(name: &str, data: &str, head: &mut Head, batch: &mut Batch) -> Result<Step, Malformed> {
    batch.dialect = Dialect::Headgate;
    let mark = batch.mark();
    let step = match name {
        "open" => read_open(data, head, batch),
        "text" => read_text(data, batch),
        "tool" => read_tool(data, batch),
        "confirm" => read_confirm(data, batch),
        "usage" => read_usage(data, batch),
        "done" => read_done(data, batch),
        "error" => Ok(Step::Failed(problem::parse_in_stream(data))),
        _ => Ok(Step::More),
    };
    if step.is_err() {
        batch.rewind(mark);
    }
    step
}

struct OpenShape<'b> {
    batch: &'b mut Batch,
    plain: bool,
    model: Option<Span>,
}

impl<'de> Shape<'de> for OpenShape<'_> {
    const NAMES: &'static [&'static str] = &["model"];
    fn plain(&mut self) -> &mut bool {
        &mut self.plain
    }
    fn member<A: MapAccess<'de>>(&mut self, _: &'static str, map: &mut A) -> Result<(), A::Error> {
        self.model = map.next_value_seed(Kept(self.batch))?.map(|words| words.span);
        Ok(())
    }
}

fn read_open(data: &str, head: &mut Head, batch: &mut Batch) -> Result<Step, Malformed> {
    let mark = batch.mark();
    let OpenShape { model, .. } = walk(data, OpenShape { batch: &mut *batch, plain: true, model: None })?;
    if let Some(model) = model.map(|span| batch.text(span)).filter(|model| head.model.is_empty() && is_label(model)) {
        head.model = model.to_owned();
    }
    batch.rewind(mark);
    Ok(Step::More)
}

struct TextShape<'b> {
    batch: &'b mut Batch,
    plain: bool,
    text: Option<Span>,
    lane: LaneName,
    choice: Option<u64>,
    tool: Option<u64>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum LaneName {
    Content,
    Reasoning,
    Refusal,
    ToolArguments,
    Unknown,
}

impl<'de> Shape<'de> for TextShape<'_> {
    const NAMES: &'static [&'static str] = &["text", "lane", "choice", "tool"];
    fn plain(&mut self) -> &mut bool {
        &mut self.plain
    }
    fn member<A: MapAccess<'de>>(&mut self, name: &'static str, map: &mut A) -> Result<(), A::Error> {
        match name {
            "text" => {
                let words = map.next_value_seed(Kept(self.batch))?;
                self.plain &= words.as_ref().is_some_and(|words| words.exact);
                self.text = words.map(|words| words.span);
            }
            "lane" => {
                if let Some(words) = map.next_value_seed(Kept(self.batch))? {
                    self.lane = match self.batch.text(words.span) {
                        "content" => LaneName::Content,
                        "reasoning" => LaneName::Reasoning,
                        "refusal" => LaneName::Refusal,
                        "tool_arguments" => LaneName::ToolArguments,
                        _ => LaneName::Unknown,
                    };
                    self.batch.forget_text(words.span);
                }
            }
            "choice" => self.choice = map.next_value_seed(Number)?,
            _ => self.tool = map.next_value_seed(Number)?,
        }
        Ok(())
    }
}

fn read_text(data: &str, batch: &mut Batch) -> Result<Step, Malformed> {
    let mark = batch.mark();
    let shape = TextShape { batch: &mut *batch, plain: is_one_line(data), text: None, lane: LaneName::Content, choice: None, tool: None };
    let TextShape { plain, text, lane, choice, tool, .. } = walk(data, shape)?;
    let channel = match lane {
        LaneName::Content => Channel::Content,
        LaneName::Reasoning => Channel::Reasoning,
        LaneName::Refusal => Channel::Refusal,
        LaneName::ToolArguments => Channel::ToolArguments(small(tool, data)?),
        LaneName::Unknown => return Err(Malformed::new("no such lane", data)),
    };
    let lane = Lane { choice: small(choice, data)?, channel };
    let text = text.ok_or_else(|| Malformed::new("a text event without text", data))?;
    if !text.is_empty() {
        batch.push(Event { what: What::Text { lane, text }, raw: None });
        if plain {
            batch.keep_raw_since(mark, data);
        }
    }
    Ok(Step::More)
}

struct ToolShape<'b> {
    batch: &'b mut Batch,
    plain: bool,
    id: Option<Span>,
    name: Option<Span>,
    index: Option<u64>,
    choice: Option<u64>,
}

impl<'de> Shape<'de> for ToolShape<'_> {
    const NAMES: &'static [&'static str] = &["id", "name", "index", "choice"];
    fn plain(&mut self) -> &mut bool {
        &mut self.plain
    }
    fn member<A: MapAccess<'de>>(&mut self, name: &'static str, map: &mut A) -> Result<(), A::Error> {
        match name {
            "id" => self.id = map.next_value_seed(Kept(self.batch))?.map(|words| words.span),
            "name" => self.name = map.next_value_seed(Kept(self.batch))?.map(|words| words.span),
            "index" => self.index = map.next_value_seed(Number)?,
            _ => self.choice = map.next_value_seed(Number)?,
        }
        Ok(())
    }
}

fn read_tool(data: &str, batch: &mut Batch) -> Result<Step, Malformed> {
    let mark = batch.mark();
    let shape = ToolShape { batch: &mut *batch, plain: is_one_line(data), id: None, name: None, index: None, choice: None };
    let ToolShape { plain, id, name, index, choice, .. } = walk(data, shape)?;
    let (Some(id), Some(name)) = (id, name) else { return Err(Malformed::new("a tool event without id or name", data)) };
    if !is_tool_name(batch.text(name)) || !is_call_id(batch.text(id)) {
        return Err(Malformed::new("a tool call's name or id is none", data));
    }
    batch.push(Event { what: What::Tool { choice: small(choice, data)?, index: small(index, data)?, id, name }, raw: None });
    if plain {
        batch.keep_raw_since(mark, data);
    }
    Ok(Step::More)
}

struct ConfirmShape<'b> {
    batch: &'b mut Batch,
    plain: bool,
    id: Option<Span>,
    prompt: Option<Span>,
    tool: Option<Span>,
}

impl<'de> Shape<'de> for ConfirmShape<'_> {
    const NAMES: &'static [&'static str] = &["id", "prompt", "tool"];
    fn plain(&mut self) -> &mut bool {
        &mut self.plain
    }
    fn member<A: MapAccess<'de>>(&mut self, name: &'static str, map: &mut A) -> Result<(), A::Error> {
        let words = map.next_value_seed(Kept(self.batch))?;
        match name {
            "id" => self.id = words.map(|words| words.span),
            "prompt" => {
                self.plain &= words.as_ref().is_some_and(|words| words.exact);
                self.prompt = words.map(|words| words.span);
            }
            _ => self.tool = words.map(|words| words.span),
        }
        Ok(())
    }
}

fn read_confirm(data: &str, batch: &mut Batch) -> Result<Step, Malformed> {
    let mark = batch.mark();
    let shape = ConfirmShape { batch: &mut *batch, plain: is_one_line(data), id: None, prompt: None, tool: None };
    let ConfirmShape { plain, id, prompt, tool, .. } = walk(data, shape)?;
    let (Some(id), Some(prompt)) = (id, prompt) else { return Err(Malformed::new("a confirm event without id or prompt", data)) };
    let (id, tool) = (batch.text(id).to_owned(), tool.map(|tool| batch.text(tool).to_owned()));
    if !is_call_id(&id) || tool.as_deref().is_some_and(|tool| !is_tool_name(tool)) {
        return Err(Malformed::new("a question's id or tool is none", data));
    }
    let prompt = batch.text(prompt).to_owned();
    batch.rewind(mark);
    batch.push_question(Question { id: &id, tool: tool.as_deref().unwrap_or_default(), prompt: &prompt });
    if plain {
        batch.keep_raw_since(mark, data);
    }
    Ok(Step::Asked)
}

struct UsageShape {
    plain: bool,
    input: Option<u64>,
    output: Option<u64>,
}

impl UsageShape {
    fn new(data: &str) -> UsageShape {
        UsageShape { plain: is_one_line(data), input: None, output: None }
    }
    fn usage(&self) -> Option<Usage> {
        Some(Usage { input_tokens: self.input?, output_tokens: self.output? })
    }
}

impl<'de> Shape<'de> for UsageShape {
    const NAMES: &'static [&'static str] = &["input_tokens", "output_tokens"];
    fn plain(&mut self) -> &mut bool {
        &mut self.plain
    }
    fn member<A: MapAccess<'de>>(&mut self, name: &'static str, map: &mut A) -> Result<(), A::Error> {
        match name {
            "input_tokens" => self.input = map.next_value_seed(Number)?,
            _ => self.output = map.next_value_seed(Number)?,
        }
        Ok(())
    }
}

fn read_usage(data: &str, batch: &mut Batch) -> Result<Step, Malformed> {
    let mark = batch.mark();
    let shape = walk(data, UsageShape::new(data))?;
    let usage = shape.usage().ok_or_else(|| Malformed::new("a usage event without its two counts", data))?;
    batch.push(Event { what: What::Usage(usage), raw: None });
    if shape.plain {
        batch.keep_raw_since(mark, data);
    }
    Ok(Step::More)
}

struct DoneShape<'b> {
    batch: &'b mut Batch,
    plain: bool,
    finish: Finish,
    usage: UsageShape,
}

impl<'de> Shape<'de> for DoneShape<'_> {
    const NAMES: &'static [&'static str] = &["finish", "usage"];
    fn plain(&mut self) -> &mut bool {
        &mut self.plain
    }
    fn member<A: MapAccess<'de>>(&mut self, name: &'static str, map: &mut A) -> Result<(), A::Error> {
        match name {
            "finish" => {
                if let Some(words) = map.next_value_seed(Kept(self.batch))? {
                    self.finish = Finish::from_name(self.batch.text(words.span));
                    self.batch.forget_text(words.span);
                }
            }
            _ => self.usage = map.next_value_seed(Object(UsageShape { plain: true, input: None, output: None }))?,
        }
        Ok(())
    }
}

fn read_done(data: &str, batch: &mut Batch) -> Result<Step, Malformed> {
    let shape = DoneShape { batch: &mut *batch, plain: true, finish: Finish::Stop, usage: UsageShape::new(data) };
    let DoneShape { finish, usage, .. } = walk(data, shape)?;
    batch.push(Event { what: What::Finish { choice: 0, finish }, raw: None });
    if let Some(usage) = usage.usage() {
        batch.push(Event { what: What::Usage(usage), raw: None });
    }
    Ok(Step::Done)
}

fn small(number: Option<u64>, data: &str) -> Result<u16, Malformed> {
    match number.map(u16::try_from) {
        None => Ok(0),
        Some(Ok(number)) if number <= MAX_INDEX => Ok(number),
        Some(_) => Err(Malformed::new("an index is over the limit", data)),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn describe(batch: &Batch) -> Vec<String> {
        let line = |event: &Event| {
            let raw = if event.raw.is_some() { " raw" } else { "" };
            match event.what {
                What::Text { lane, text } => format!("{} {:?} {:?}{raw}", lane.choice, lane.channel, batch.text(text)),
                What::Tool { choice, index, id, name } => format!("{choice} tool {index} {} {}{raw}", batch.text(id), batch.text(name)),
                What::Confirm { .. } => {
                    let Question { id, tool, prompt } = batch.question(event).unwrap();
                    format!("confirm {id} {tool:?} {prompt:?}{raw}")
                }
                What::Finish { choice, finish } => format!("{choice} finish {}{raw}", finish.as_str()),
                What::Usage(usage) => format!("usage {} {}{raw}", usage.input_tokens, usage.output_tokens),
                What::Note => format!("note{raw}"),
            }
        };
        batch.events().iter().map(line).collect()
    }

    #[track_caller]
    fn check(name: &str, data: &str, expected: &[&str]) {
        let mut batch = Batch::new();
        decode(name, data, &mut Head::default(), &mut batch).unwrap();
        assert_eq!(describe(&batch), expected, "{name} {data}");
        for event in batch.events().iter().filter(|event| event.raw.is_some()) {
            let mut out = Vec::new();
            assert_eq!(encode(&batch, event, &mut out), Some(name));
            assert_eq!(out, data.as_bytes());
        }
    }

    #[test]
    fn an_event_of_known_members_keeps_its_object() {
        check("text", r#"{"text":"h\u00e9"}"#, &["0 Content \"hé\" raw"]);
        check("text", r#"{ "choice": 2, "lane": "reasoning", "text": "a" }"#, &["2 Reasoning \"a\" raw"]);
        check("text", r#"{"text":"a","lane":"tool_arguments","tool":3}"#, &["0 ToolArguments(3) \"a\" raw"]);
        check("text", r#"{"text":"a","lane":"refusal"}"#, &["0 Refusal \"a\" raw"]);
        check("tool", r#"{"id":"call_1","name":"f","index":1,"choice":2}"#, &["2 tool 1 call_1 f raw"]);
        check("usage", r#"{"input_tokens":1,"output_tokens":2}"#, &["usage 1 2 raw"]);
        check("confirm", r#"{"prompt":"pay?","id":"q:1","tool":"pay"}"#, &["confirm q:1 \"pay\" \"pay?\" raw"]);
        check("confirm", r#"{"id":"q","prompt":""}"#, &["confirm q \"\" \"\" raw"]);
    }

    #[test]
    fn an_event_with_anything_else_is_written_anew() {
        check("text", r#"{"text":"a","more":"secret"}"#, &["0 Content \"a\""]);
        check("text", r#"{"text":"b","text":"a"}"#, &["0 Content \"a\""]);
        check("text", r#"{"text":"\ud83d"}"#, &["0 Content \"\u{fffd}\""]);
        check("text", "{\"text\":\n\"a\"}", &["0 Content \"a\""]);
        check("tool", r#"{"id":"a","name":"f","arguments":"secret"}"#, &["0 tool 0 a f"]);
        check("usage", r#"{"input_tokens":1,"output_tokens":2,"note":"secret"}"#, &["usage 1 2"]);
        check("text", r#"{"text":""}"#, &[]);
        check("confirm", r#"{"id":"q","prompt":"pay?","why":"secret"}"#, &["confirm q \"\" \"pay?\""]);
        check("confirm", r#"{"id":"q","prompt":"no","prompt":"\ud83d"}"#, &["confirm q \"\" \"\u{fffd}\""]);
    }

    #[test]
    fn open_names_the_model_and_names_nobody_knows_are_passed_over() {
        let (mut head, mut batch) = (Head::default(), Batch::new());
        for (name, data) in [("open", r#"{"turn_id":"x","model":"demo"}"#), ("ping", "no JSON at all"), ("message", "{}")] {
            assert!(matches!(decode(name, data, &mut head, &mut batch), Ok(Step::More)));
        }
        assert_eq!((head.model.as_str(), batch.is_empty(), batch.bytes()), ("demo", true, 0));
    }

    #[test]
    fn done_says_why_and_how_much_and_ends_the_answer() {
        let mut batch = Batch::new();
        let data = r#"{"finish":"length","outcome":"allowed","usage":{"input_tokens":4,"output_tokens":5},"verdict":"x.y.z"}"#;
        assert!(matches!(decode("done", data, &mut Head::default(), &mut batch), Ok(Step::Done)));
        assert_eq!(describe(&batch), ["0 finish length", "usage 4 5"]);
    }

    #[test]
    fn an_error_keeps_its_code_and_loses_its_words() {
        let data = r#"{"code":"session_not_found","message":"secret","retryable":false,"retry_after_ms":250}"#;
        let Ok(Step::Failed(fault)) = decode("error", data, &mut Head::default(), &mut Batch::new()) else { panic!("failed") };
        assert_eq!((fault.code, fault.retry_after), (Code::SessionNotFound, Some(std::time::Duration::from_millis(250))));
        assert!(!fault.chain().contains("secret"));
    }

    #[test]
    fn what_is_no_event_is_malformed_and_leaves_nothing() {
        for (name, data) in [
            ("text", ""),
            ("text", "null"),
            ("text", "{}"),
            ("text", r#"{"text":null}"#),
            ("text", r#"{"text":1}"#),
            ("text", r#"{"text":"secret","lane":"secret"}"#),
            ("text", r#"{"text":"secret","choice":128}"#),
            ("text", r#"{"text":"secret","lane":"tool_arguments","tool":70000}"#),
            ("text", r#"{"text":"secret"}{"text":"secret"}"#),
            ("tool", r#"{"id":"a"}"#),
            ("tool", r#"{"id":"a","name":"my secret"}"#),
            ("usage", r#"{"input_tokens":1}"#),
            ("confirm", r#"{"id":"q"}"#),
            ("confirm", r#"{"prompt":"secret"}"#),
            ("confirm", r#"{"id":"my secret","prompt":"secret"}"#),
            ("confirm", r#"{"id":"q","prompt":"secret","tool":"my secret"}"#),
            ("done", r#"{"finish":1}"#),
            ("open", r#"{"model":1}"#),
        ] {
            let mut batch = Batch::new();
            let malformed = decode(name, data, &mut Head::default(), &mut batch).unwrap_err();
            assert!(batch.is_empty() && batch.bytes() == 0, "{name} {data}");
            assert!(!Fault::from(malformed).chain().contains("secret"));
        }
    }

    fn lanes() -> impl Strategy<Value = Lane> {
        let channel = prop_oneof![
            Just(Channel::Content),
            Just(Channel::Reasoning),
            Just(Channel::Refusal),
            (0..=MAX_INDEX).prop_map(Channel::ToolArguments)
        ];
        (0..=MAX_INDEX, channel).prop_map(|(choice, channel)| Lane { choice, channel })
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_again(lane in lanes(), words in "\\PC{1,40}|[\\x00-\\x1f\"\\\\a]{1,20}", usage: (u64, u64)) {
            let mut batch = Batch::new();
            batch.push_text(lane, &words);
            let (id, name) = (batch.keep_text("call_1"), batch.keep_text("f"));
            batch.push(Event { what: What::Tool { choice: lane.choice, index: 5, id, name }, raw: None });
            batch.push(Event { what: What::Usage(Usage { input_tokens: usage.0, output_tokens: usage.1 }), raw: None });
            batch.push_question(Question { id: "q.1", tool: if usage.0 % 2 == 0 { "f" } else { "" }, prompt: &words });
            let mut again = Batch::new();
            for event in batch.events() {
                let mut out = Vec::new();
                let name = encode(&batch, event, &mut out).unwrap();
                let data = String::from_utf8(out).unwrap();
                prop_assert!(serde_json::from_str::<Value>(&data).is_ok());
                decode(name, &data, &mut Head::default(), &mut again).unwrap();
            }
            let raw: Vec<String> = describe(&batch).into_iter().map(|line| line + " raw").collect();
            prop_assert_eq!(describe(&again), raw);
        }
    }

    #[test]
    fn a_turn_is_read_whole() {
        let body = br#"{"session_id":"s1","messages":[{"role":"developer","content":"be kind"},{"role":"user","content":[{"type":"text","text":"hi"}]}],
            "model":"demo","max_output_tokens":200,"temperature":0.7,"stop":"\n\n","metadata":{"app":"web"}}"#;
        let turn = TurnRequest::parse(body).unwrap();
        assert_eq!(turn.session_id.as_ref().map(SessionId::as_str), Some("s1"));
        assert_eq!(turn.messages[0], Message::new(crate::Role::System, "be kind"));
        assert_eq!(turn.messages[1].content.as_ref().unwrap().texts().collect::<Vec<_>>(), ["hi"]);
        let settings = turn.settings();
        assert_eq!((settings.max_output_tokens, settings.temperature, settings.stop), (Some(200), Some(0.7), vec!["\n\n".to_owned()]));
        assert_eq!(turn.metadata["app"], "web");
        // And what we would write is what we read.
        assert_eq!(TurnRequest::parse(&to_vec(&turn)).unwrap(), turn);
        assert!(!format!("{turn:?}").contains("kind"));
    }

    #[test]
    fn a_fault_in_a_turn_names_its_member_and_never_quotes_it() {
        let user = r#""messages":[{"role":"user","content":"secret"}]"#;
        let many = |n: usize| vec![r#"{"role":"user","content":"secret"}"#; n].join(",");
        for (body, code, says) in [
            ("secret".to_owned(), "malformed_json", "not JSON: line 1, column 1"),
            ("[]".into(), "invalid_request", "must be a JSON object"),
            ("{}".into(), "invalid_request", "messages: missing"),
            (r#"{"messages":[]}"#.into(), "invalid_request", "messages: expected at least one message"),
            (r#"{"messages":"secret"}"#.into(), "invalid_request", "messages: expected a list"),
            (format!(r#"{{"messages":[{}]}}"#, many(257)), "invalid_request", "messages: expected a list of at most 256"),
            (r#"{"messages":["secret"]}"#.into(), "invalid_request", "messages[0]: expected an object"),
            (r#"{"messages":[{"content":"secret"}]}"#.into(), "invalid_request", "messages[0].role: missing"),
            (r#"{"messages":[{"role":"secret","content":"a"}]}"#.into(), "invalid_request", "messages[0].role: expected system, developer"),
            (r#"{"messages":[{"role":"user"}]}"#.into(), "invalid_request", "messages[0].content: expected a text"),
            (r#"{"messages":[{"role":"user","content":5}]}"#.into(), "invalid_request", "messages[0].content: expected a text"),
            (
                r#"{"messages":[{"role":"user","content":[{"type":"image_url","image_url":"secret"}]}]}"#.into(),
                "invalid_request",
                "messages[0].content[0].type: expected text: other parts cannot be moderated",
            ),
            (
                r#"{"messages":[{"role":"user","content":"a","mood":"secret"}]}"#.into(),
                "invalid_request",
                "messages[0].mood: unknown member",
            ),
            (format!(r#"{{{user},"maxTokens":5}}"#), "invalid_request", "maxTokens: unknown member"),
            (format!(r#"{{{user},"my secret":5}}"#), "invalid_request", "the body: unknown member"),
            (format!(r#"{{{user},"temperature":"secret"}}"#), "invalid_request", "temperature: expected a number from 0 to 2"),
            (format!(r#"{{{user},"temperature":2.1}}"#), "invalid_request", "temperature: expected"),
            (format!(r#"{{{user},"max_output_tokens":0}}"#), "invalid_request", "max_output_tokens: expected a whole number from 1"),
            (format!(r#"{{{user},"max_output_tokens":1.5}}"#), "invalid_request", "max_output_tokens: expected"),
            (format!(r#"{{{user},"stop":["a","secret",1]}}"#), "invalid_request", "stop: expected texts of 1 to 256 bytes"),
            (format!(r#"{{{user},"stop":[{}]}}"#, vec!["\"x\""; 17].join(",")), "invalid_request", "stop: expected at most 16"),
            (format!(r#"{{{user},"stop":["{}"]}}"#, "x".repeat(257)), "invalid_request", "stop: expected texts of 1 to 256 bytes"),
            (format!(r#"{{{user},"metadata":{{"a":"{}"}}}}"#, "x".repeat(16 << 10)), "invalid_request", "metadata: expected at most 16384"),
            (format!(r#"{{{user},"metadata":[]}}"#), "invalid_request", "metadata: expected an object"),
            (format!(r#"{{{user},"session_id":"my secret"}}"#), "invalid_request", "session_id: not a session id"),
            (format!(r#"{{{user},"metadata":{{"a":{}1{}}}}}"#, "[".repeat(64), "]".repeat(64)), "invalid_request", "deeper than 64"),
            ("[".repeat(1 << 20), "invalid_request", "deeper than 64"),
        ] {
            let fault = TurnRequest::parse(body.as_bytes()).unwrap_err();
            let short = body.get(..80).unwrap_or(&body);
            assert_eq!(fault.code.as_str(), code, "{short}");
            assert!(fault.message.contains(says), "{short}: {}", fault.message);
            assert!(!fault.chain().contains("secret"), "{}", fault.chain());
        }
        let deep = format!(r#"{{{user},"metadata":{{"a":{}1{}}}}}"#, "[".repeat(62), "]".repeat(62));
        assert!(TurnRequest::parse(deep.as_bytes()).is_ok());
    }

    #[test]
    fn the_ends_of_an_answer_are_written_as_promised() {
        let turn: TurnId = "0193a5f0-7e1c-7000-8000-000000000000".parse().unwrap();
        let refusal = Refusal::new(Code::PolicyDenied, "moderation.deny").about([Category::TenantPolicy]);
        let done = Done {
            finish: Finish::ContentFilter,
            outcome: Some(Outcome::Blocked),
            usage: None,
            refusal: Some((&refusal).into()),
            verdict: Some("a.b.c".into()),
        };
        let mut out = Vec::new();
        done.write(&mut out);
        assert_eq!(
            String::from_utf8(out).unwrap(),
            r#"{"finish":"content_filter","outcome":"blocked","refusal":{"code":"policy_denied","rule":"moderation.deny","categories":["tenant_policy"]},"verdict":"a.b.c"}"#
        );
        let mut out = Vec::new();
        ErrorEvent::of(&refusal.into(), Some(turn), None).write(&mut out);
        assert_eq!(
            String::from_utf8(out).unwrap(),
            r#"{"turn_id":"0193a5f0-7e1c-7000-8000-000000000000","code":"policy_denied","message":"the policy in force refuses this text","retryable":false,"error":{"message":"the policy in force refuses this text","type":"policy_error","param":null,"code":"policy_denied"},"policy":{"stage":"input","rule":"moderation.deny","categories":["tenant_policy"]}}"#
        );
        let stop = Stop::Failed(Fault::upstream(Code::UpstreamStalled).after(std::time::Duration::from_secs(1)));
        let mut out = Vec::new();
        ErrorEvent::of(&stop, Some(turn), Some(7)).write(&mut out);
        assert_eq!(
            String::from_utf8(out).unwrap(),
            r#"{"turn_id":"0193a5f0-7e1c-7000-8000-000000000000","code":"upstream_stalled","message":"the upstream fell silent within its answer","retryable":true,"last_seq":7,"retry_after_ms":1000,"error":{"message":"the upstream fell silent within its answer","type":"timeout_error","param":null,"code":"upstream_stalled"}}"#
        );
    }
}
