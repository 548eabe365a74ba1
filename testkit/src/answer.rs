//! The rules every answer keeps: ids, sequence, members, order and the one end.
//!
//! A [`Judge`] is told each event of one answer, from whatever transport, and says which rule it breaks.

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};
use tokio::time::Instant;

use crate::Broken;
use crate::broken::shown;
use crate::sse::Frame;

/// An event that kept every rule.
#[derive(Debug, Clone)]
pub struct Event {
    /// `open`, `text`, ...; in OpenAI's dialect `chunk`, `error` or `[DONE]`.
    pub name: String,
    /// The sequence number, where the wire has one.
    pub seq: Option<u64>,
    /// The object; null for `[DONE]`.
    pub data: Value,
    /// The payload's bytes.
    pub raw: String,
    /// When its last byte was read.
    pub arrived: Instant,
}

impl Event {
    /// Whether nothing may follow it.
    pub fn is_terminal(&self) -> bool {
        matches!(self.name.as_str(), "done" | "error" | "[DONE]")
    }

    /// A member of the object as text, where it is there.
    pub fn text(&self, member: &str) -> Option<&str> {
        self.data.get(member)?.as_str()
    }
}

/// Which stream is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// From the gateway to a client: `/v1/chat/stream`.
    Client,
    /// From the orchestrator to the gateway: `/v1/conversation/stream`.
    Conversation,
    /// OpenAI's chunks: `/v1/chat/completions`.
    OpenAi,
}

/// What one answer has said so far, and so what it may say next.
#[derive(Debug)]
pub struct Judge {
    kind: Kind,
    /// The turn's or, in OpenAI's dialect, the completion's id.
    id: Option<String>,
    /// The number the next event must have.
    next: u64,
    /// The stream goes on after events seen on another connection.
    resumed: bool,
    /// The turn has other readers, which set its pace: events may be missing.
    shared: bool,
    begun: bool,
    ended: bool,
    /// OpenAI: choices, and whether each has its finish reason.
    choices: Vec<(u64, bool)>,
    had_usage: bool,
}

impl Judge {
    /// For an answer from its first event on.
    pub fn new(kind: Kind) -> Judge {
        Judge { kind, id: None, next: 0, resumed: false, shared: false, begun: false, ended: false, choices: Vec::new(), had_usage: false }
    }

    /// For the rest of a turn, after the event numbered `after`.
    pub fn resumed(turn_id: &str, after: u64) -> Judge {
        Judge { id: Some(turn_id.into()), next: after + 1, resumed: true, begun: true, ..Judge::new(Kind::Client) }
    }

    /// For a turn that others read too, so that this reader may be told of a gap.
    pub fn shared(self) -> Judge {
        Judge { shared: true, ..self }
    }

    /// Judges an event that came as server-sent event.
    pub fn frame(&mut self, frame: Frame, arrived: Instant) -> Result<Event, Broken> {
        if self.ended {
            return Err(Broken::AfterEnd(format!("an event after the last: {}", shown(frame.data.as_bytes()))));
        }
        match self.kind {
            Kind::OpenAi => self.chunk(frame, arrived),
            Kind::Client | Kind::Conversation => {
                let name = frame.event.ok_or_else(|| Broken::Framing("an event without its `event:` line".into()))?;
                let seq = match (self.kind, &frame.id) {
                    (Kind::Client, Some(id)) => Some(self.identity(id)?),
                    (Kind::Client, None) => return Err(Broken::Identity(format!("`{name}` without an `id:` line"))),
                    (_, Some(id)) => return Err(Broken::Identity(format!("an `id:` line on this wire: {id}"))),
                    (_, None) => None,
                };
                let data = object(&frame.data)?;
                if data.get("ref").is_some() {
                    return Err(Broken::Members("`ref` outside a WebSocket".into()));
                }
                self.event(name, seq, data, frame.data, arrived)
            }
        }
    }

    /// Judges an event taken out of its transport: `seq` where the wire has numbers, `data` without the members of a frame.
    pub fn event(&mut self, name: String, seq: Option<u64>, data: Value, raw: String, arrived: Instant) -> Result<Event, Broken> {
        if self.ended {
            return Err(Broken::AfterEnd(format!("`{name}` after the last event")));
        }
        match (name.as_str(), self.begun) {
            ("open", true) => return Err(Broken::Order("`open` twice, or after a resume".into())),
            ("open", false) => self.begun = true,
            // A response that was begun before its answer was, and then there was none.
            ("error", false) if self.kind == Kind::Client && seq == Some(0) => {}
            (_, false) => return Err(Broken::Order(format!("`{name}` before `open`"))),
            (_, true) => {}
        }
        let members = members_of(&name, self.kind).ok_or_else(|| Broken::Members(format!("no event is called `{name}`")))?;
        check(&name, &data, members)?;
        self.sense(&name, seq, &data)?;
        if let Some(seq) = seq {
            self.sequence(&name, seq, &data)?;
        }
        let event = Event { name, seq, data, raw, arrived };
        self.ended = event.is_terminal();
        Ok(event)
    }

    /// The stream was closed: it must have had its end.
    pub fn closed(&self) -> Result<(), Broken> {
        if self.ended { Ok(()) } else { Err(Broken::Cut("no terminal event came".into())) }
    }

    /// Which stream is judged.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Whether the terminal event has come.
    pub fn ended(&self) -> bool {
        self.ended
    }

    /// `<turn>:<seq>`, the same turn all the way.
    fn identity(&mut self, id: &str) -> Result<u64, Broken> {
        let wrong = || Broken::Identity(format!("`{id}` is not <turn>:<seq>"));
        let (turn, seq) = id.rsplit_once(':').ok_or_else(wrong)?;
        let canonical = seq == "0" || (!seq.starts_with('0') && !seq.is_empty());
        if turn.is_empty() || turn.contains([':', ' ']) || !canonical || !seq.bytes().all(|b| b.is_ascii_digit()) {
            return Err(wrong());
        }
        self.same_turn(turn)?;
        seq.parse().map_err(|_| wrong())
    }

    /// The turn an event says it belongs to must be the one the answer began with.
    pub(crate) fn same_turn(&mut self, turn: &str) -> Result<(), Broken> {
        match &self.id {
            Some(id) if id != turn => Err(Broken::Identity(format!("turn `{turn}` in an answer of turn `{id}`"))),
            Some(_) => Ok(()),
            None => {
                self.id = Some(turn.into());
                Ok(())
            }
        }
    }

    fn sequence(&mut self, name: &str, seq: u64, data: &Value) -> Result<(), Broken> {
        let next = self.next;
        if name == "gap" {
            let (from, to) = (data["from"].as_u64().unwrap_or(0), data["to"].as_u64().unwrap_or(0));
            if !(self.resumed || self.shared) || from != next || to < from || !(from..=to).contains(&seq) {
                return Err(Broken::Sequence(format!("gap {seq} from {from} to {to} where {next} was due")));
            }
            self.next = to + 1;
            return Ok(());
        }
        if seq != next {
            return Err(Broken::Sequence(format!("`{name}` has number {seq} where {next} was due")));
        }
        self.next = seq + 1;
        Ok(())
    }

    /// What members mean together.
    fn sense(&mut self, name: &str, seq: Option<u64>, data: &Value) -> Result<(), Broken> {
        let wrong = |what: &str| Err(Broken::Members(format!("{what}: {}", shown(data.to_string().as_bytes()))));
        let has = |member: &str| data.get(member).is_some();
        match name {
            "open" => {
                if let Some(turn) = data.get("turn_id").and_then(Value::as_str) {
                    self.same_turn(turn)?;
                }
            }
            "text" if (data["lane"] == "tool_arguments") != has("tool") => {
                return wrong("`tool` goes with lane `tool_arguments` and only with it");
            }
            "text" | "tool" if data["choice"] == 0 => return wrong("choice 0 is not written"),
            "done" if self.kind == Kind::Client => {
                // A limit refuses more text, which is no judgement on the text that was.
                if has("refusal") != (data["outcome"] == "blocked" || (has("refusal") && data["finish"] == "length")) {
                    return wrong("a refusal goes with outcome `blocked` or finish `length`, and with nothing else");
                }
                if data["outcome"] == "blocked" && data["finish"] != "content_filter" && data["finish"] != "length" {
                    return wrong("a blocked answer finishes as if it were whole");
                }
            }
            "error" => {
                if data["error"]["code"] != data["code"] || data["error"]["message"] != data["message"] {
                    return wrong("two codes or messages in one error");
                }
                if let (Some(last), Some(seq)) = (data.get("last_seq").and_then(Value::as_u64), seq)
                    && last >= seq
                {
                    return wrong("last_seq is not before the error");
                }
                if let Some(turn) = data.get("turn_id").and_then(Value::as_str) {
                    self.same_turn(turn)?;
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// A `data:` line of OpenAI's dialect.
    fn chunk(&mut self, frame: Frame, arrived: Instant) -> Result<Event, Broken> {
        if frame.id.is_some() || frame.event.is_some() {
            return Err(Broken::Framing("an `id:` or `event:` line in OpenAI's dialect".into()));
        }
        let raw = frame.data;
        let event = |name: &str, data: Value, raw: String| Event { name: name.into(), seq: None, data, raw, arrived };
        if raw == "[DONE]" {
            if self.choices.is_empty() || self.choices.iter().any(|(_, finished)| !finished) {
                return Err(Broken::Order("[DONE] before every choice has its finish_reason".into()));
            }
            self.ended = true;
            return Ok(event("[DONE]", Value::Null, raw));
        }
        let data = object(&raw)?;
        let wrong = |what: &str| Broken::Members(format!("{what}: {}", shown(raw.as_bytes())));
        if let Some(error) = data.get("error") {
            check("error.error", error, ERROR_OF_OPENAI)?;
            self.ended = true;
            return Ok(event("error", data, raw));
        }
        check("chunk", &data, CHUNK)?;
        let id = data["id"].as_str().unwrap_or_default();
        self.same_turn(id)?;
        let choices = data["choices"].as_array().ok_or_else(|| wrong("`choices` is no list"))?;
        if self.had_usage && !choices.is_empty() {
            return Err(Broken::Order("choices after the usage chunk".into()));
        }
        self.had_usage |= choices.is_empty() && data.get("usage").is_some_and(Value::is_object);
        for choice in choices {
            check("choice", choice, CHOICE)?;
            let index = choice["index"].as_u64().ok_or_else(|| wrong("no index"))?;
            let known = self.choices.iter().position(|(known, _)| *known == index);
            match known {
                None if choice["delta"]["role"] != "assistant" => {
                    return Err(Broken::Order(format!("choice {index} begins without its role")));
                }
                None => self.choices.push((index, false)),
                Some(at) if self.choices[at].1 => return Err(Broken::Order(format!("choice {index} goes on after its finish_reason"))),
                Some(_) if choice["delta"].get("role").is_some() => {
                    return Err(Broken::Order(format!("choice {index} has its role twice")));
                }
                Some(_) => {}
            }
            if !choice["finish_reason"].is_null() {
                for known in self.choices.iter_mut().filter(|(known, _)| *known == index) {
                    known.1 = true;
                }
            }
        }
        Ok(event("chunk", data, raw))
    }
}

/// A whole answer, read to its end.
#[derive(Debug, Clone, Default)]
pub struct Transcript {
    /// Every event, the terminal one last.
    pub events: Vec<Event>,
    /// How many comments or pings came.
    pub heartbeats: usize,
}

impl Transcript {
    /// The content of the first choice.
    pub fn text(&self) -> String {
        self.text_in(0, "content")
    }

    /// The text of one lane: `content`, `reasoning`, `refusal` or `tool_arguments` (all calls of the choice together).
    pub fn text_in(&self, choice: u64, lane: &str) -> String {
        self.events.iter().map(|event| said(event, choice, lane)).collect()
    }

    /// The pieces in which the content of the first choice came, with the moment each arrived.
    pub fn pieces(&self) -> Vec<(String, Instant)> {
        let pieces = self.events.iter().map(|event| (said(event, 0, "content"), event.arrived));
        pieces.filter(|(text, _)| !text.is_empty()).collect()
    }

    /// The events of this name.
    pub fn named<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Event> {
        self.events.iter().filter(move |event| event.name == name)
    }

    /// The terminal event; panics on a transcript without one, which no reader hands out.
    pub fn end(&self) -> &Event {
        self.events.last().filter(|event| event.is_terminal()).expect("a transcript ends with its terminal event")
    }

    /// The turn's id, as `open` told it.
    pub fn turn_id(&self) -> &str {
        self.named("open").next().and_then(|open| open.text("turn_id")).unwrap_or_default()
    }

    /// `allowed`, `flagged`, `masked` or `blocked`; empty where the answer ended otherwise.
    pub fn outcome(&self) -> &str {
        self.closing("outcome")
    }

    /// The signed verdict; empty where there is none.
    pub fn verdict(&self) -> &str {
        self.closing("verdict")
    }

    /// Why the first choice ended: `stop`, `length`, ...; empty where it failed.
    pub fn finish(&self) -> &str {
        let mut reasons = self.events.iter().rev().filter_map(|event| match event.name.as_str() {
            "done" => event.text("finish"),
            "chunk" => choice_of(event, 0)?.get("finish_reason")?.as_str(),
            _ => None,
        });
        reasons.next().unwrap_or_default()
    }

    /// The code of the error it ended with; `None` where it did not.
    pub fn error(&self) -> Option<&str> {
        let end = self.events.last().filter(|event| event.name == "error")?;
        end.text("code").or_else(|| end.data["error"]["code"].as_str())
    }

    /// A member of `done`, or of the `headgate` member of OpenAI's last chunk.
    fn closing(&self, member: &str) -> &str {
        let found = self.events.iter().rev().find_map(|event| match event.name.as_str() {
            "done" | "error" => event.text(member),
            "chunk" => event.data.get("headgate")?.get(member)?.as_str(),
            _ => None,
        });
        found.unwrap_or_default()
    }
}

fn choice_of(event: &Event, choice: u64) -> Option<&Value> {
    event.data.get("choices")?.as_array()?.iter().find(|found| found["index"] == choice)
}

fn said(event: &Event, choice: u64, lane: &str) -> String {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    match event.name.as_str() {
        "text" => {
            let here = event.data.get("choice").and_then(Value::as_u64).unwrap_or(0) == choice;
            let same = event.text("lane").unwrap_or("content") == lane;
            if here && same { text(&event.data["text"]) } else { String::new() }
        }
        "chunk" => {
            let Some(delta) = choice_of(event, choice).map(|found| &found["delta"]) else { return String::new() };
            match lane {
                "reasoning" => text(&delta["reasoning_content"]) + &text(&delta["reasoning"]),
                "tool_arguments" => {
                    let calls = delta["tool_calls"].as_array().map(Vec::as_slice).unwrap_or_default();
                    calls.iter().map(|call| text(&call["function"]["arguments"])).collect()
                }
                lane => text(&delta[lane]),
            }
        }
        _ => String::new(),
    }
}

/// What a member must be.
enum Of {
    Text,
    Count,
    Truth,
    Word(&'static [&'static str]),
    Texts,
    Signed,
    TextOrNull,
    Object(&'static [Member]),
    Anything,
}

struct Member {
    name: &'static str,
    must: bool,
    of: Of,
}

const fn must(name: &'static str, of: Of) -> Member {
    Member { name, must: true, of }
}

const fn may(name: &'static str, of: Of) -> Member {
    Member { name, must: false, of }
}

const FINISHES: Of = Of::Word(&["stop", "length", "content_filter", "tool_calls"]);
const OUTCOMES: Of = Of::Word(&["allowed", "flagged", "masked", "blocked"]);
const LANES: Of = Of::Word(&["reasoning", "refusal", "tool_arguments"]);

const OPEN: &[Member] = &[
    must("turn_id", Of::Text),
    must("session_id", Of::Text),
    must("model", Of::Text),
    may("policy_version", Of::Text),
    may("constitution_hash", Of::Text),
    may("ref", Of::Text),
];
const OPEN_OF_CONVERSATION: &[Member] = &[must("model", Of::Text), may("turn_id", Of::Text), may("session_id", Of::Text)];
const TEXT: &[Member] = &[must("text", Of::Text), may("lane", LANES), may("choice", Of::Count), may("tool", Of::Count)];
const TOOL: &[Member] = &[must("id", Of::Text), must("name", Of::Text), must("index", Of::Count), may("choice", Of::Count)];
const CONFIRM: &[Member] = &[must("id", Of::Text), must("prompt", Of::Text), may("tool", Of::Text)];
const USAGE: &[Member] = &[must("input_tokens", Of::Count), must("output_tokens", Of::Count)];
const GAP: &[Member] = &[must("from", Of::Count), must("to", Of::Count)];
const REFUSAL: &[Member] = &[must("code", Of::Text), must("rule", Of::Text), must("categories", Of::Texts)];
const DONE: &[Member] = &[
    must("finish", FINISHES),
    must("outcome", OUTCOMES),
    may("usage", Of::Object(USAGE)),
    may("refusal", Of::Object(REFUSAL)),
    may("verdict", Of::Signed),
];
const DONE_OF_CONVERSATION: &[Member] = &[must("finish", FINISHES), may("usage", Of::Object(USAGE))];
const ERROR_OF_OPENAI: &[Member] =
    &[must("message", Of::Text), must("type", Of::Text), must("param", Of::TextOrNull), must("code", Of::Text)];
const ERROR: &[Member] = &[
    must("code", Of::Text),
    must("message", Of::Text),
    must("retryable", Of::Truth),
    must("error", Of::Object(ERROR_OF_OPENAI)),
    may("turn_id", Of::Text),
    may("last_seq", Of::Count),
    may("retry_after_ms", Of::Count),
    may("verdict", Of::Signed),
    may("ref", Of::Text),
    may("policy", Of::Object(POLICY)),
];
const HEADGATE: &[Member] = &[must("outcome", OUTCOMES), may("verdict", Of::Signed)];
const CHUNK: &[Member] = &[
    must("id", Of::Text),
    must("object", Of::Word(&["chat.completion.chunk"])),
    must("created", Of::Count),
    must("model", Of::Text),
    must("choices", Of::Anything),
    may("usage", Of::Anything),
    may("system_fingerprint", Of::Anything),
    may("service_tier", Of::Anything),
    // llama.cpp's own, in a chunk forwarded as it came.
    may("timings", Of::Anything),
    may("headgate", Of::Object(HEADGATE)),
];
const CHOICE: &[Member] =
    &[must("index", Of::Count), must("delta", Of::Anything), must("finish_reason", Of::Anything), may("logprobs", Of::Anything)];

fn members_of(name: &str, kind: Kind) -> Option<&'static [Member]> {
    Some(match (name, kind) {
        ("open", Kind::Conversation) => OPEN_OF_CONVERSATION,
        ("open", _) => OPEN,
        ("text", _) => TEXT,
        ("tool", _) => TOOL,
        ("confirm", _) => CONFIRM,
        ("usage", _) => USAGE,
        ("gap", Kind::Client) => GAP,
        ("done", Kind::Conversation) => DONE_OF_CONVERSATION,
        ("done", _) => DONE,
        ("error", _) => ERROR,
        _ => return None,
    })
}

fn check(name: &str, value: &Value, members: &[Member]) -> Result<(), Broken> {
    let wrong = |what: String| Err(Broken::Members(format!("`{name}`: {what}")));
    let Some(object) = value.as_object() else { return wrong("not an object".into()) };
    for (key, value) in object {
        let Some(member) = members.iter().find(|member| member.name == key) else { return wrong(format!("unknown member `{key}`")) };
        let fits = match &member.of {
            Of::Text => value.is_string(),
            Of::Count => value.is_u64(),
            Of::Truth => value.is_boolean(),
            Of::Word(words) => value.as_str().is_some_and(|word| words.contains(&word)),
            Of::Texts => value.as_array().is_some_and(|list| list.iter().all(Value::is_string)),
            Of::Signed => value.as_str().is_some_and(is_compact_jws),
            Of::TextOrNull => value.is_string() || value.is_null(),
            Of::Object(members) => {
                check(&format!("{name}.{key}"), value, members)?;
                true
            }
            Of::Anything => true,
        };
        if !fits {
            return wrong(format!("member `{key}` is {}", shown(value.to_string().as_bytes())));
        }
    }
    match members.iter().find(|member| member.must && !object.contains_key(member.name)) {
        Some(missing) => wrong(format!("no member `{}`", missing.name)),
        None => Ok(()),
    }
}

const POLICY: &[Member] = &[must("stage", Of::Word(&["input", "output", "tool"])), must("rule", Of::Text), must("categories", Of::Texts)];
const PROBLEM: &[Member] = &[
    must("type", Of::Text),
    must("title", Of::Text),
    must("status", Of::Count),
    must("code", Of::Text),
    must("retryable", Of::Truth),
    must("error", Of::Object(ERROR_OF_OPENAI)),
    may("detail", Of::Text),
    may("turn_id", Of::Text),
    may("retry_after_ms", Of::Count),
    may("policy", Of::Object(POLICY)),
];

/// The code of a problem body that came with this status.
pub(crate) fn problem(status: u16, body: &str) -> Result<String, Broken> {
    let problem = object(body)?;
    check("problem", &problem, PROBLEM)?;
    let code = problem["code"].as_str().unwrap_or_default();
    let wrong = |what: &str| Err(Broken::Members(format!("{what}: {}", shown(body.as_bytes()))));
    if problem["status"] != status {
        return wrong("a status that is not the answer's");
    }
    if problem["error"]["code"] != code || problem["type"].as_str().and_then(|kind| kind.rsplit('/').next()) != Some(code) {
        return wrong("two codes in one problem");
    }
    Ok(code.into())
}

/// RFC 7515 section 3.1: three parts of unpadded base64url; whether the signature holds is for others to say.
fn is_compact_jws(text: &str) -> bool {
    let part = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
    text.split('.').count() == 3 && text.split('.').all(part)
}

/// A JSON object no member of which stands twice, at any depth: of two, each reader believes another one.
pub(crate) fn object(text: &str) -> Result<Value, Broken> {
    let wrong = |why: &dyn std::fmt::Display| Broken::Members(format!("{why}: {}", shown(text.as_bytes())));
    let Once(value) = serde_json::from_str(text).map_err(|error| wrong(&error))?;
    if value.is_object() { Ok(value) } else { Err(wrong(&"not an object")) }
}

/// A JSON value whose objects have every member once.
struct Once(Value);

impl<'de> Deserialize<'de> for Once {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Once, D::Error> {
        struct Any;
        impl<'de> Visitor<'de> for Any {
            type Value = Value;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("JSON")
            }
            fn visit_unit<E>(self) -> Result<Value, E> {
                Ok(Value::Null)
            }
            fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
                Ok(value.into())
            }
            fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
                Ok(value.into())
            }
            fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
                Ok(value.into())
            }
            fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
                Ok(value.into())
            }
            fn visit_str<E>(self, value: &str) -> Result<Value, E> {
                Ok(value.into())
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
                let mut list = Vec::new();
                while let Some(Once(item)) = items.next_element()? {
                    list.push(item);
                }
                Ok(list.into())
            }
            fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Value, A::Error> {
                let mut object = Map::new();
                while let Some((name, Once(value))) = members.next_entry::<String, Once>()? {
                    if object.insert(name.clone(), value).is_some() {
                        return Err(A::Error::custom(format_args!("member `{name}` twice")));
                    }
                }
                Ok(object.into())
            }
        }
        deserializer.deserialize_any(Any).map(Once)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPEN: (&str, &str) = ("open", r#"{"turn_id":"t","session_id":"s","model":"demo"}"#);
    const TEXT: (&str, &str) = ("text", r#"{"text":"Hello"}"#);
    const DONE: (&str, &str) =
        ("done", r#"{"finish":"stop","outcome":"allowed","usage":{"input_tokens":1,"output_tokens":2},"verdict":"a.b.c"}"#);
    const ERROR: (&str, &str) = (
        "error",
        r#"{"code":"upstream_reset","message":"m","retryable":true,"turn_id":"t","last_seq":1,"error":{"message":"m","type":"upstream_error","param":null,"code":"upstream_reset"}}"#,
    );

    fn frame(id: &str, name: &str, data: &str) -> Frame {
        Frame { id: Some(id.into()), event: Some(name.into()), data: data.into() }
    }

    /// Judges events numbered from 0.
    fn judge(events: &[(&str, &str)]) -> Result<Transcript, Broken> {
        let numbered = events.iter().enumerate().map(|(seq, (name, data))| frame(&format!("t:{seq}"), name, data));
        with(Judge::new(Kind::Client), numbered)
    }

    fn with(mut judge: Judge, frames: impl IntoIterator<Item = Frame>) -> Result<Transcript, Broken> {
        let now = Instant::now();
        let events = frames.into_iter().map(|frame| judge.frame(frame, now)).collect::<Result<_, _>>()?;
        judge.closed()?;
        Ok(Transcript { events, heartbeats: 0 })
    }

    #[test]
    fn a_proper_answer_is_read() {
        let whole = judge(&[OPEN, TEXT, ("text", r#"{"text":"hm","lane":"reasoning"}"#), TEXT, DONE]).unwrap();
        assert_eq!((whole.text(), whole.text_in(0, "reasoning")), ("HelloHello".into(), "hm".into()));
        assert_eq!((whole.outcome(), whole.finish(), whole.turn_id(), whole.verdict()), ("allowed", "stop", "t", "a.b.c"));
        let failed = judge(&[OPEN, TEXT, ERROR]).unwrap();
        assert_eq!((failed.error(), failed.outcome()), (Some("upstream_reset"), ""));
    }

    #[test]
    fn the_order_of_an_answer_is_kept() {
        assert!(matches!(judge(&[TEXT, DONE]), Err(Broken::Order(_))));
        assert!(matches!(judge(&[OPEN, OPEN, DONE]), Err(Broken::Order(_))));
        assert!(matches!(judge(&[OPEN, TEXT]), Err(Broken::Cut(_))));
        assert!(matches!(judge(&[]), Err(Broken::Cut(_))));
        assert!(matches!(judge(&[OPEN, DONE, TEXT]), Err(Broken::AfterEnd(_))));
        assert!(matches!(judge(&[OPEN, DONE, DONE]), Err(Broken::AfterEnd(_))));
        assert!(matches!(judge(&[OPEN, TEXT, ERROR, DONE]), Err(Broken::AfterEnd(_))));
    }

    #[test]
    fn ids_name_the_turn_and_count_without_holes() {
        let client = |frames: Vec<Frame>| with(Judge::new(Kind::Client), frames);
        for id in ["t", ":0", "t:", "t:00", "t:+0", "t: 0", "t:-1", "t:x"] {
            assert!(matches!(client(vec![frame(id, OPEN.0, OPEN.1)]), Err(Broken::Identity(_))), "{id}");
        }
        let no_id = Frame { id: None, ..frame("", OPEN.0, OPEN.1) };
        assert!(matches!(client(vec![no_id]), Err(Broken::Identity(_))));
        let open = || frame("t:0", OPEN.0, OPEN.1);
        assert!(matches!(client(vec![open(), frame("u:1", TEXT.0, TEXT.1)]), Err(Broken::Identity(_))));
        assert!(matches!(client(vec![frame("u:0", OPEN.0, OPEN.1)]), Err(Broken::Identity(_))), "open names another turn");
        for wrong in ["t:0", "t:2"] {
            assert!(matches!(client(vec![open(), frame(wrong, TEXT.0, TEXT.1)]), Err(Broken::Sequence(_))), "{wrong}");
        }
        assert!(matches!(client(vec![frame("t:1", OPEN.0, OPEN.1)]), Err(Broken::Sequence(_))));
    }

    #[test]
    fn a_resumed_turn_goes_on_where_it_was_or_says_what_is_missing() {
        let resumed = |frames: &[Frame]| with(Judge::resumed("t", 3), frames.to_vec());
        let text = |seq: u64| frame(&format!("t:{seq}"), TEXT.0, TEXT.1);
        let done = |seq: u64| frame(&format!("t:{seq}"), DONE.0, DONE.1);
        let gap = |seq: u64, from: u64, to: u64| frame(&format!("t:{seq}"), "gap", &format!(r#"{{"from":{from},"to":{to}}}"#));
        assert!(resumed(&[text(4), done(5)]).is_ok());
        assert!(resumed(&[gap(9, 4, 9), text(10), done(11)]).is_ok());
        assert!(matches!(resumed(&[text(3)]), Err(Broken::Sequence(_))));
        assert!(matches!(resumed(&[text(5)]), Err(Broken::Sequence(_))));
        assert!(matches!(resumed(&[gap(9, 5, 9)]), Err(Broken::Sequence(_))));
        assert!(matches!(resumed(&[gap(3, 4, 3)]), Err(Broken::Sequence(_))));
        assert!(matches!(resumed(&[gap(9, 4, 9), text(9)]), Err(Broken::Sequence(_))));
        assert!(matches!(resumed(&[frame("t:4", OPEN.0, OPEN.1)]), Err(Broken::Order(_))));
    }

    #[test]
    fn members_are_those_of_the_table() {
        for (name, data) in [
            ("text", r#"{}"#),
            ("text", r#"{"text":1}"#),
            ("text", r#"{"text":"a","extra":1}"#),
            ("text", r#"{"text":"a","text":"b"}"#),
            ("text", r#"{"text":"a","lane":"content"}"#),
            ("text", r#"{"text":"a","choice":0}"#),
            ("text", r#"{"text":"a","tool":0}"#),
            ("text", r#"{"text":"a","lane":"tool_arguments"}"#),
            ("text", r#"[]"#),
            ("text", r#"{"text":"a""#),
            ("tool", r#"{"id":"a","name":"b"}"#),
            ("usage", r#"{"input_tokens":-1,"output_tokens":0}"#),
            ("done", r#"{"finish":"end","outcome":"allowed"}"#),
            ("done", r#"{"finish":"stop"}"#),
            ("done", r#"{"finish":"stop","outcome":"blocked"}"#),
            ("done", r#"{"finish":"stop","outcome":"blocked","refusal":{"code":"c","rule":"r","categories":[]}}"#),
            ("done", r#"{"finish":"content_filter","outcome":"allowed","refusal":{"code":"c","rule":"r","categories":[]}}"#),
            ("done", r#"{"finish":"stop","outcome":"allowed","verdict":"a.b"}"#),
            ("done", r#"{"finish":"stop","outcome":"allowed","usage":null}"#),
            ("error", r#"{"code":"a","message":"m","retryable":true}"#),
            ("error", r#"{"code":"a","message":"m","retryable":true,"error":{"message":"m","type":"t","param":null,"code":"b"}}"#),
            ("chatter", r#"{}"#),
        ] {
            assert!(matches!(judge(&[OPEN, (name, data)]), Err(Broken::Members(_))), "{name} {data}");
        }
        let refused = r#"{"finish":"content_filter","outcome":"blocked","refusal":{"code":"c","rule":"r","categories":["pii"]}}"#;
        assert!(judge(&[OPEN, TEXT, ("done", refused)]).is_ok());
    }

    #[test]
    fn the_orchestrators_stream_has_no_ids() {
        let plain = |name: &str, data: &str| Frame { id: None, ..frame("", name, data) };
        let good = [plain("open", r#"{"model":"demo"}"#), plain(TEXT.0, TEXT.1), plain("done", r#"{"finish":"stop"}"#)];
        assert_eq!(with(Judge::new(Kind::Conversation), good.clone()).unwrap().text(), "Hello");
        assert!(matches!(with(Judge::new(Kind::Conversation), [frame("t:0", "open", r#"{"model":"demo"}"#)]), Err(Broken::Identity(_))));
        assert!(matches!(with(Judge::new(Kind::Conversation), good[..2].to_vec()), Err(Broken::Cut(_))));
    }

    #[test]
    fn a_problem_body_speaks_with_one_voice() {
        let good = r#"{"type":"https://headgate.dev/errors/policy_denied","title":"t","status":403,"code":"policy_denied","retryable":false,"error":{"message":"m","type":"policy_error","param":null,"code":"policy_denied"}}"#;
        assert_eq!(problem(403, good).unwrap(), "policy_denied");
        assert!(problem(400, good).is_err());
        for (from, to) in
            [("errors/policy_denied", "errors/other"), (r#""code":"policy_denied"}"#, r#""code":"other"}"#), ("retryable", "again")]
        {
            assert!(matches!(problem(403, &good.replace(from, to)), Err(Broken::Members(_))), "{from} as {to}");
        }
    }

    fn openai(lines: &[&str]) -> Result<Transcript, Broken> {
        with(Judge::new(Kind::OpenAi), lines.iter().map(|line| Frame { data: (*line).into(), ..Frame::default() }))
    }

    fn chunk(delta: &str, finish: &str) -> String {
        format!(
            r#"{{"id":"c","object":"chat.completion.chunk","created":1,"model":"m","choices":[{{"index":0,"delta":{delta},"finish_reason":{finish}}}]}}"#
        )
    }

    #[test]
    fn openais_stream_ends_with_done_or_with_an_error() {
        let (role, text, stop) = (chunk(r#"{"role":"assistant"}"#, "null"), chunk(r#"{"content":"Hi"}"#, "null"), chunk("{}", r#""stop""#));
        let good = openai(&[&role, &text, &stop, "[DONE]"]).unwrap();
        assert_eq!((good.text().as_str(), good.finish(), good.error()), ("Hi", "stop", None));
        let failed = openai(&[&role, &text, r#"{"error":{"message":"m","type":"t","param":null,"code":"upstream_reset"}}"#]).unwrap();
        assert_eq!(failed.error(), Some("upstream_reset"));
        assert!(matches!(openai(&[&role, &text, "[DONE]"]), Err(Broken::Order(_))), "success without a finish_reason");
        assert!(matches!(openai(&[&role, &stop, &text]), Err(Broken::Order(_))), "text after the finish_reason");
        assert!(matches!(openai(&[&text, &stop, "[DONE]"]), Err(Broken::Order(_))), "no role");
        assert!(matches!(openai(&[&role, &stop]), Err(Broken::Cut(_))), "no [DONE]");
        assert!(matches!(openai(&[&role, &stop, "[DONE]", "[DONE]"]), Err(Broken::AfterEnd(_))));
        let other = text.replace(r#""id":"c""#, r#""id":"d""#);
        assert!(matches!(openai(&[&role, &other]), Err(Broken::Identity(_))), "another id");
    }
}
