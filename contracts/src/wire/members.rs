//! Reads a JSON object member by member, so that a fault can name the member without quoting its value.

use std::ops::RangeInclusive;

use memchr::memchr2;
use serde_json::{Map, Value};

use crate::{Code, Content, Fault, Message, Part, Role};

/// How deep a request may nest. No message needs more than eight; a parser's stack must not be the client's to spend.
pub(super) const MAX_DEPTH: usize = 64;
/// How many messages a request may carry.
pub(super) const MAX_MESSAGES: usize = 256;
/// How many stop strings, and how long each may be, in bytes.
pub(super) const MAX_STOPS: usize = 16;
pub(super) const MAX_STOP_BYTES: usize = 256;
/// How large the client's own labels may be, in bytes of JSON.
pub(super) const MAX_METADATA_BYTES: usize = 16 << 10;
/// The longest model name, in bytes.
pub(super) const MAX_MODEL_BYTES: usize = 256;
/// How many tools a request may list: OpenAI's own bound.
const MAX_TOOLS: usize = 128;
/// How many parts one message may have.
const MAX_PARTS: usize = 256;
/// The longest name or id of a function, call or speaker, in bytes: OpenAI's own bound.
const MAX_NAME_BYTES: usize = 64;

/// What to do with members nobody asked for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Others {
    /// Refuse the request and name one of them.
    Refused,
    /// Leave them out.
    Dropped,
}

/// The members of one object that have not been taken yet.
pub(super) struct Members {
    path: String,
    map: Map<String, Value>,
    others: Others,
}

impl Members {
    /// The members of a whole document.
    ///
    /// Errors: `malformed_json`, or `invalid_request` where it is not an object or too deep.
    pub(super) fn parse(body: &[u8], others: Others) -> Result<Members, Fault> {
        if is_deeper_than(body, MAX_DEPTH) {
            return Err(invalid(format!("the JSON is nested deeper than {MAX_DEPTH} levels")));
        }
        match serde_json::from_slice(body) {
            Ok(Value::Object(map)) => Ok(Members { path: String::new(), map, others }),
            Ok(_) => Err(invalid("the body must be a JSON object".into())),
            // serde_json's words may quote the text, so only the place is told.
            Err(error) => {
                Err(Fault::client(Code::MalformedJson).saying(format!("not JSON: line {}, column {}", error.line(), error.column())))
            }
        }
    }

    fn of(value: Value, path: String, others: Others) -> Result<Members, Fault> {
        match value {
            Value::Object(map) => Ok(Members { path: path + ".", map, others }),
            _ => Err(invalid(format!("{path}: expected an object"))),
        }
    }

    /// The path of a member, for a fault.
    pub(super) fn at(&self, name: &str) -> String {
        format!("{}{name}", self.path)
    }

    fn expected<T>(&self, name: &str, what: impl std::fmt::Display) -> Result<T, Fault> {
        Err(invalid(format!("{}{name}: expected {what}", self.path)))
    }

    /// Takes a member; `null` counts as absent.
    pub(super) fn take(&mut self, name: &str) -> Option<Value> {
        self.map.remove(name).filter(|value| !value.is_null())
    }

    /// Takes a member that must be there.
    pub(super) fn need<T>(&self, name: &str, value: Option<T>) -> Result<T, Fault> {
        value.ok_or_else(|| invalid(format!("{}{name}: missing", self.path)))
    }

    /// Takes a text of at most `max` bytes.
    pub(super) fn text(&mut self, name: &str, max: usize) -> Result<Option<String>, Fault> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) if text.len() <= max => Ok(Some(text)),
            Some(_) => self.expected(name, format_args!("a text of at most {max} bytes")),
        }
    }

    /// Takes a name: something that parses from text.
    pub(super) fn name<T: std::str::FromStr<Err: std::fmt::Display>>(&mut self, name: &str) -> Result<Option<T>, Fault> {
        let Some(text) = self.text(name, 256)? else { return Ok(None) };
        text.parse().map(Some).map_err(|error| invalid(format!("{}{name}: {error}", self.path)))
    }

    /// Takes a number.
    pub(super) fn number(&mut self, name: &str, range: RangeInclusive<f64>) -> Result<Option<f64>, Fault> {
        let Some(value) = self.take(name) else { return Ok(None) };
        match value.as_f64() {
            Some(number) if range.contains(&number) => Ok(Some(number)),
            _ => self.expected(name, format_args!("a number from {} to {}", range.start(), range.end())),
        }
    }

    /// Takes a whole number.
    pub(super) fn integer(&mut self, name: &str, range: RangeInclusive<i64>) -> Result<Option<i64>, Fault> {
        let Some(value) = self.take(name) else { return Ok(None) };
        match value.as_i64() {
            Some(number) if range.contains(&number) => Ok(Some(number)),
            _ => self.expected(name, format_args!("a whole number from {} to {}", range.start(), range.end())),
        }
    }

    /// Takes a yes or no.
    pub(super) fn flag(&mut self, name: &str) -> Result<Option<bool>, Fault> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(flag)),
            Some(_) => self.expected(name, "true or false"),
        }
    }

    /// Takes a list of at most `max` entries.
    pub(super) fn list(&mut self, name: &str, max: usize) -> Result<Option<Vec<Value>>, Fault> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Array(list)) if list.len() <= max => Ok(Some(list)),
            Some(_) => self.expected(name, format_args!("a list of at most {max} entries")),
        }
    }

    /// Takes an object.
    pub(super) fn object(&mut self, name: &str) -> Result<Option<Members>, Fault> {
        match self.take(name) {
            None => Ok(None),
            Some(value) => Members::of(value, self.at(name), self.others).map(Some),
        }
    }

    /// Takes stop strings: a list, or a single one.
    pub(super) fn stops(&mut self) -> Result<Vec<String>, Fault> {
        let stops = match self.take("stop") {
            None => return Ok(Vec::new()),
            Some(one @ Value::String(_)) => vec![one],
            Some(Value::Array(list)) => list,
            Some(_) => return self.expected("stop", "a text or a list of texts"),
        };
        if stops.len() > MAX_STOPS {
            return self.expected("stop", format_args!("at most {MAX_STOPS} texts"));
        }
        let text = |stop| match stop {
            Value::String(text) if (1..=MAX_STOP_BYTES).contains(&text.len()) => Ok(text),
            _ => self.expected("stop", format_args!("texts of 1 to {MAX_STOP_BYTES} bytes")),
        };
        stops.into_iter().map(text).collect()
    }

    /// Takes the client's own labels.
    pub(super) fn metadata(&mut self) -> Result<Map<String, Value>, Fault> {
        match self.take("metadata") {
            None => Ok(Map::new()),
            Some(value @ Value::Object(_)) if value.to_string().len() > MAX_METADATA_BYTES => {
                self.expected("metadata", format_args!("at most {MAX_METADATA_BYTES} bytes of JSON"))
            }
            Some(Value::Object(map)) => Ok(map),
            Some(_) => self.expected("metadata", "an object"),
        }
    }

    /// Takes the conversation: 1 to 256 messages.
    pub(super) fn messages(&mut self) -> Result<Vec<Message>, Fault> {
        let list = self.list("messages", MAX_MESSAGES)?;
        let list = self.need("messages", list)?;
        if list.is_empty() {
            return self.expected("messages", "at least one message");
        }
        let (at, others) = (self.at("messages"), self.others);
        list.into_iter().enumerate().map(|(i, value)| message(Members::of(value, format!("{at}[{i}]"), others)?)).collect()
    }

    /// Takes the tools on offer, rebuilt from the members that are known.
    pub(super) fn tools(&mut self) -> Result<Option<Value>, Fault> {
        let (at, others) = (self.at("tools"), self.others);
        let Some(list) = self.list("tools", MAX_TOOLS)? else { return Ok(None) };
        if list.is_empty() {
            return Ok(None);
        }
        let tools: Result<Vec<Value>, Fault> =
            list.into_iter().enumerate().map(|(i, value)| tool(Members::of(value, format!("{at}[{i}]"), others)?)).collect();
        Ok(Some(Value::Array(tools?)))
    }

    /// Takes which tool the model must use: a word, or one function by name.
    pub(super) fn tool_choice(&mut self) -> Result<Option<Value>, Fault> {
        match self.take("tool_choice") {
            None => Ok(None),
            Some(Value::String(word)) if matches!(word.as_str(), "none" | "auto" | "required") => Ok(Some(Value::String(word))),
            Some(value @ Value::Object(_)) => {
                let mut choice = Members::of(value, self.at("tool_choice"), self.others)?;
                choice.word("type", &["function"])?;
                let function = choice.object("function")?;
                let mut function = choice.need("function", function)?;
                let name = function.tool_name()?;
                function.end()?;
                choice.end()?;
                Ok(Some(serde_json::json!({"type": "function", "function": {"name": name}})))
            }
            Some(_) => self.expected("tool_choice", "none, auto, required or one function"),
        }
    }

    /// Takes the form the answer must have.
    pub(super) fn response_format(&mut self) -> Result<Option<Value>, Fault> {
        let Some(mut format) = self.object("response_format")? else { return Ok(None) };
        let word = format.word("type", &["text", "json_object", "json_schema"])?;
        let mut rebuilt = Map::new();
        if word == "json_schema" {
            let schema = format.object("json_schema")?;
            let mut schema = format.need("json_schema", schema)?;
            let mut kept = Map::new();
            kept.insert("name".into(), schema.tool_name()?.into());
            schema.keep_texts(&mut kept, &["description"])?;
            schema.keep_objects(&mut kept, &["schema"])?;
            if let Some(strict) = schema.flag("strict")? {
                kept.insert("strict".into(), strict.into());
            }
            schema.end()?;
            rebuilt.insert("json_schema".into(), kept.into());
        }
        rebuilt.insert("type".into(), word.into());
        format.end()?;
        Ok(Some(rebuilt.into()))
    }

    fn word(&mut self, name: &str, words: &'static [&'static str]) -> Result<&'static str, Fault> {
        let text = self.text(name, 64)?;
        let text = self.need(name, text)?;
        match words.iter().find(|word| **word == text) {
            Some(word) => Ok(word),
            None => self.expected(name, words.join(", ")),
        }
    }

    fn tool_name(&mut self) -> Result<String, Fault> {
        let name = self.text("name", MAX_NAME_BYTES)?;
        let name = self.need("name", name)?;
        if is_tool_name(&name) { Ok(name) } else { self.expected("name", "1 to 64 characters of A-Z a-z 0-9 _ -") }
    }

    fn keep_texts(&mut self, kept: &mut Map<String, Value>, names: &[&str]) -> Result<(), Fault> {
        for name in names {
            if let Some(text) = self.text(name, usize::MAX)? {
                kept.insert((*name).into(), text.into());
            }
        }
        Ok(())
    }

    fn keep_objects(&mut self, kept: &mut Map<String, Value>, names: &[&str]) -> Result<(), Fault> {
        for name in names {
            match self.take(name) {
                None => {}
                Some(value @ Value::Object(_)) => {
                    kept.insert((*name).into(), value);
                }
                Some(_) => return self.expected(name, "an object"),
            }
        }
        Ok(())
    }

    /// Ends the reading: every other member is refused or dropped, as was said at the start.
    pub(super) fn end(self) -> Result<(), Fault> {
        match (self.others, self.map.keys().next()) {
            (Others::Refused, Some(name)) => {
                // The name goes into a message and a log line: only what looks like a name is repeated.
                let shown =
                    name.len() <= MAX_NAME_BYTES && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.'));
                Err(invalid(match shown {
                    true => format!("{}{name}: unknown member", self.path),
                    false => format!("{}: unknown member", if self.path.is_empty() { "the body" } else { self.path.trim_end_matches('.') }),
                }))
            }
            _ => Ok(()),
        }
    }
}

pub(super) fn invalid(message: String) -> Fault {
    Fault::client(Code::InvalidRequest).saying(message)
}

/// A function's name: what OpenAI allows, and safe everywhere.
pub(super) fn is_tool_name(name: &str) -> bool {
    (1..=MAX_NAME_BYTES).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-'))
}

/// A call's id: as a name, and the `.` and `:` that some servers put in.
pub(super) fn is_call_id(id: &str) -> bool {
    (1..=MAX_NAME_BYTES).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.' | b':'))
}

fn message(mut members: Members) -> Result<Message, Fault> {
    let role = match members.word("role", &["system", "developer", "user", "assistant", "tool"])? {
        "user" => Role::User,
        "assistant" => Role::Assistant,
        "tool" => Role::Tool,
        _ => Role::System,
    };
    let content = match members.take("content") {
        None => None,
        Some(Value::String(text)) => Some(Content::Text(text)),
        Some(Value::Array(list)) if list.len() <= MAX_PARTS => {
            let (at, others) = (members.at("content"), members.others);
            let parts: Result<Vec<Part>, Fault> =
                list.into_iter().enumerate().map(|(i, value)| part(Members::of(value, format!("{at}[{i}]"), others)?)).collect();
            Some(Content::Parts(parts?))
        }
        Some(_) => return members.expected("content", format_args!("a text or a list of at most {MAX_PARTS} parts")),
    };
    let name = members.text("name", MAX_NAME_BYTES)?;
    let tool_calls = tool_calls(&mut members)?;
    let tool_call_id = members.text("tool_call_id", MAX_NAME_BYTES)?;
    if tool_call_id.as_deref().is_some_and(|id| !is_call_id(id)) {
        return members.expected("tool_call_id", "1 to 64 characters of A-Z a-z 0-9 _ - . :");
    }
    if content.is_none() && (role != Role::Assistant || tool_calls.is_none()) {
        return members.expected("content", "a text");
    }
    members.end()?;
    Ok(Message { role, content, name, tool_calls, tool_call_id })
}

fn part(mut members: Members) -> Result<Part, Fault> {
    let kind = members.text("type", 64)?;
    if members.need("type", kind)? != "text" {
        return members.expected("type", "text: other parts cannot be moderated, so they do not pass");
    }
    let text = members.text("text", usize::MAX)?;
    let text = members.need("text", text)?;
    members.end()?;
    Ok(Part::Text { text })
}

fn tool_calls(members: &mut Members) -> Result<Option<Value>, Fault> {
    let (at, others) = (members.at("tool_calls"), members.others);
    let Some(list) = members.list("tool_calls", MAX_TOOLS)? else { return Ok(None) };
    if list.is_empty() {
        return Ok(None);
    }
    let mut calls = Vec::with_capacity(list.len());
    for (i, value) in list.into_iter().enumerate() {
        let mut call = Members::of(value, format!("{at}[{i}]"), others)?;
        let id = call.text("id", MAX_NAME_BYTES)?;
        let id = call.need("id", id)?;
        if !is_call_id(&id) {
            return call.expected("id", "1 to 64 characters of A-Z a-z 0-9 _ - . :");
        }
        call.word("type", &["function"])?;
        let function = call.object("function")?;
        let mut function = call.need("function", function)?;
        let name = function.tool_name()?;
        let arguments = function.text("arguments", usize::MAX)?.unwrap_or_default();
        function.end()?;
        call.end()?;
        calls.push(serde_json::json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}));
    }
    Ok(Some(Value::Array(calls)))
}

fn tool(mut members: Members) -> Result<Value, Fault> {
    members.word("type", &["function"])?;
    let function = members.object("function")?;
    let mut function = members.need("function", function)?;
    let mut kept = Map::new();
    kept.insert("name".into(), function.tool_name()?.into());
    function.keep_texts(&mut kept, &["description"])?;
    function.keep_objects(&mut kept, &["parameters"])?;
    if let Some(strict) = function.flag("strict")? {
        kept.insert("strict".into(), strict.into());
    }
    function.end()?;
    members.end()?;
    Ok(serde_json::json!({"type": "function", "function": kept}))
}

/// Whether a document nests deeper than `most`; right for every valid document, and never too low for any other.
fn is_deeper_than(body: &[u8], most: usize) -> bool {
    let (mut depth, mut rest) = (0usize, body.iter());
    while let Some(byte) = rest.next() {
        match byte {
            b'"' => {
                // Strings are most of a request.
                while let Some(at) = memchr2(b'"', b'\\', rest.as_slice()) {
                    if rest.nth(at) == Some(&b'"') {
                        break;
                    }
                    rest.next();
                }
            }
            b'{' | b'[' => {
                depth += 1;
                if depth > most {
                    return true;
                }
            }
            b'}' | b']' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    false
}
