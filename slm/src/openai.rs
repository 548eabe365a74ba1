//! The OpenAI chat completions contract: requests checked field by field, answers and errors written.
//!
//! Fields nobody here reads are ignored, as clients of many ages send them. A field that is read and wrong is an
//! error that names it. Source: the OpenAI API reference, "Chat completions".

use bytes::Bytes;
use http::StatusCode;
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::{Finish, Message, Role};

const MESSAGES_MAX: usize = 1024;
/// As many as OpenAI takes.
const STOPS_MAX: usize = 4;
const STOP_BYTES_MAX: usize = 256;

/// An error as OpenAI's clients expect it: `{"error": {"message", "type", "param", "code"}}`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Refused {
    pub(crate) status: StatusCode,
    pub(crate) code: &'static str,
    pub(crate) param: Option<&'static str>,
    pub(crate) message: String,
}

impl Refused {
    pub(crate) fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, code, param: None, message: message.into() }
    }

    fn invalid(param: &'static str, message: impl Into<String>) -> Self {
        Self { status: StatusCode::BAD_REQUEST, code: "invalid_value", param: Some(param), message: message.into() }
    }

    pub(crate) fn body(&self) -> Bytes {
        let kind = if self.status.is_server_error() { "server_error" } else { "invalid_request_error" };
        let error = json!({"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}});
        error.to_string().into()
    }
}

/// A checked request. What the client left open is `None`: the server's options decide.
#[derive(Debug, PartialEq)]
pub(crate) struct Request {
    pub(crate) model: Option<String>,
    pub(crate) messages: Vec<Message>,
    pub(crate) max_tokens: Option<usize>,
    pub(crate) temperature: Option<f32>,
    pub(crate) top_p: Option<f32>,
    pub(crate) seed: Option<u64>,
    pub(crate) stop: Vec<String>,
    pub(crate) stream: bool,
    pub(crate) include_usage: bool,
}

impl Request {
    pub(crate) fn parse(body: &[u8]) -> Result<Self, Refused> {
        let fields: Map<String, Value> = serde_json::from_slice(body).map_err(|e| {
            // The position, and not serde's own words: those can quote the body.
            let message = format!("the body is not a JSON object (line {}, column {})", e.line(), e.column());
            Refused::new(StatusCode::BAD_REQUEST, "invalid_json", message)
        })?;
        let field = |name: &str| fields.get(name).filter(|v| !v.is_null());

        if !matches!(field("n"), None | Some(Value::Number(_))) || field("n").is_some_and(|n| n.as_u64() != Some(1)) {
            return Err(Refused {
                code: "unsupported_value",
                ..Refused::invalid("n", "n must be 1: this server makes one answer per request")
            });
        }
        let model = field("model")
            .map(|v| v.as_str().map(str::to_owned).ok_or_else(|| Refused::invalid("model", "model must be a string")))
            .transpose()?;
        let (most, most_name) = match field("max_completion_tokens") {
            Some(v) => (Some(v), "max_completion_tokens"),
            None => (field("max_tokens"), "max_tokens"),
        };
        let max_tokens = most
            .map(|v| v.as_u64().filter(|n| *n > 0).and_then(|n| usize::try_from(n).ok()))
            .map(|n| n.ok_or_else(|| Refused::invalid(most_name, "must be a whole number above 0")))
            .transpose()?;
        let seed = field("seed")
            .map(|v| {
                v.as_i64()
                    .map(i64::cast_unsigned)
                    .or(v.as_u64())
                    .ok_or_else(|| Refused::invalid("seed", "must be a whole number of 64 bits"))
            })
            .transpose()?;
        let include_usage = match field("stream_options").map(|o| o.get("include_usage")) {
            None | Some(None | Some(Value::Null)) => false,
            Some(Some(Value::Bool(b))) => *b,
            Some(Some(_)) => return Err(Refused::invalid("stream_options", "include_usage must be true or false")),
        };
        Ok(Self {
            model,
            messages: messages(field("messages"))?,
            max_tokens,
            temperature: number(field("temperature"), "temperature", 2.0)?,
            top_p: number(field("top_p"), "top_p", 1.0)?,
            seed,
            stop: stops(field("stop"))?,
            stream: field("stream")
                .map_or(Some(false), Value::as_bool)
                .ok_or_else(|| Refused::invalid("stream", "must be true or false"))?,
            include_usage,
        })
    }
}

fn number(value: Option<&Value>, name: &'static str, most: f64) -> Result<Option<f32>, Refused> {
    let Some(value) = value else { return Ok(None) };
    match value.as_f64() {
        Some(n) if (0.0..=most).contains(&n) => Ok(Some(n as f32)),
        _ => Err(Refused::invalid(name, format!("must be a number from 0 to {most}"))),
    }
}

fn stops(value: Option<&Value>) -> Result<Vec<String>, Refused> {
    let refused = || Refused::invalid("stop", format!("must be a string, or up to {STOPS_MAX}, each of 1 to {STOP_BYTES_MAX} bytes"));
    let texts: Vec<&Value> = match value {
        None => return Ok(Vec::new()),
        Some(Value::Array(list)) if list.len() <= STOPS_MAX => list.iter().collect(),
        Some(one @ Value::String(_)) => vec![one],
        Some(_) => return Err(refused()),
    };
    let text = |v: &Value| v.as_str().filter(|s| (1..=STOP_BYTES_MAX).contains(&s.len())).map(str::to_owned).ok_or_else(refused);
    texts.into_iter().map(text).collect()
}

fn messages(value: Option<&Value>) -> Result<Vec<Message>, Refused> {
    let refused = |message: String| Refused::invalid("messages", message);
    let Some(Value::Array(list)) = value else { return Err(refused("messages must be a list".into())) };
    if list.is_empty() || list.len() > MESSAGES_MAX {
        return Err(refused(format!("messages must have 1 to {MESSAGES_MAX} entries")));
    }
    let message = |(i, message): (usize, &Value)| {
        let role = match message.get("role").and_then(Value::as_str) {
            Some("system" | "developer") => Role::System,
            Some("user") => Role::User,
            Some("assistant") => Role::Assistant,
            Some("tool" | "function") => Role::Tool,
            _ => return Err(refused(format!("messages[{i}].role must be system, developer, user, assistant or tool"))),
        };
        let content = match message.get("content") {
            Some(Value::String(text)) => text.clone(),
            // An assistant message that only called tools has no content.
            None | Some(Value::Null) if role == Role::Assistant => String::new(),
            Some(Value::Array(parts)) => {
                let text = |part: &Value| {
                    part.get("text").and_then(Value::as_str).filter(|_| part.get("type").is_some_and(|t| t == "text")).map(str::to_owned)
                };
                parts
                    .iter()
                    .map(text)
                    .collect::<Option<String>>()
                    .ok_or_else(|| refused(format!("messages[{i}].content may have parts of type text only")))?
            }
            _ => return Err(refused(format!("messages[{i}].content must be a string or a list of text parts"))),
        };
        Ok(Message { role, content })
    };
    list.iter().enumerate().map(message).collect()
}

/// Token counts of one turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(crate) struct Usage {
    pub(crate) prompt_tokens: usize,
    pub(crate) completion_tokens: usize,
    pub(crate) total_tokens: usize,
}

impl Usage {
    pub(crate) fn new(prompt_tokens: usize, completion_tokens: usize) -> Self {
        Self { prompt_tokens, completion_tokens, total_tokens: prompt_tokens + completion_tokens }
    }
}

/// Writes one answer, whole or in chunks.
#[derive(Debug, Clone)]
pub(crate) struct Writer {
    pub(crate) id: String,
    pub(crate) created: u64,
    pub(crate) model: String,
    /// Chunks then carry `"usage": null`, and one more with the counts comes last.
    pub(crate) include_usage: bool,
}

#[derive(Serialize)]
struct Chunk<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: &'a [ChunkChoice<'a>],
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<Usage>>,
}

#[derive(Serialize)]
struct ChunkChoice<'a> {
    index: u32,
    delta: Delta<'a>,
    finish_reason: Option<Finish>,
}

#[derive(Serialize, Default)]
struct Delta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<Role>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
}

impl Writer {
    pub(crate) fn open(&self, out: &mut Vec<u8>) {
        self.choice(Delta { role: Some(Role::Assistant), content: Some("") }, None, out);
    }

    pub(crate) fn text(&self, text: &str, out: &mut Vec<u8>) {
        self.choice(Delta { role: None, content: Some(text) }, None, out);
    }

    pub(crate) fn end(&self, finish: Finish, usage: Usage, out: &mut Vec<u8>) {
        self.choice(Delta::default(), Some(finish), out);
        if self.include_usage {
            self.chunk(&[], Some(usage), out);
        }
        out.extend_from_slice(b"data: [DONE]\n\n");
    }

    /// The stream broke on this side: an error event and no `[DONE]`, so that nobody takes it for a whole answer.
    pub(crate) fn broke(&self, refused: &Refused, out: &mut Vec<u8>) {
        out.extend_from_slice(b"data: ");
        out.extend_from_slice(&refused.body());
        out.extend_from_slice(b"\n\n");
    }

    pub(crate) fn whole(&self, text: &str, finish: Finish, usage: Usage) -> Bytes {
        let message = json!({"role": "assistant", "content": text, "refusal": null});
        let choice = json!({"index": 0, "message": message, "logprobs": null, "finish_reason": finish});
        json!({"id": self.id, "object": "chat.completion", "created": self.created, "model": self.model, "choices": [choice], "usage": usage}).to_string().into()
    }

    fn choice(&self, delta: Delta<'_>, finish_reason: Option<Finish>, out: &mut Vec<u8>) {
        self.chunk(&[ChunkChoice { index: 0, delta, finish_reason }], None, out);
    }

    fn chunk(&self, choices: &[ChunkChoice<'_>], usage: Option<Usage>, out: &mut Vec<u8>) {
        let usage = self.include_usage.then_some(usage);
        let chunk = Chunk { id: &self.id, object: "chat.completion.chunk", created: self.created, model: &self.model, choices, usage };
        out.extend_from_slice(b"data: ");
        serde_json::to_writer(&mut *out, &chunk).expect("strings and numbers into memory");
        out.extend_from_slice(b"\n\n");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(fields: Value) -> Result<Request, Refused> {
        let mut body = json!({"messages": [{"role": "user", "content": "hi"}]});
        let all = body.as_object_mut().expect("an object");
        all.extend(fields.as_object().expect("an object").clone());
        Request::parse(body.to_string().as_bytes())
    }

    #[test]
    fn a_wrong_field_is_named() {
        for (fields, param) in [
            (json!({"n": 2}), "n"),
            (json!({"n": "1"}), "n"),
            (json!({"model": 3}), "model"),
            (json!({"max_tokens": 0}), "max_tokens"),
            (json!({"max_tokens": 1.5}), "max_tokens"),
            (json!({"max_completion_tokens": -1, "max_tokens": 5}), "max_completion_tokens"),
            (json!({"temperature": 2.1}), "temperature"),
            (json!({"temperature": "warm"}), "temperature"),
            (json!({"top_p": -0.1}), "top_p"),
            (json!({"seed": 0.5}), "seed"),
            (json!({"stop": [1]}), "stop"),
            (json!({"stop": ""}), "stop"),
            (json!({"stop": ["a", "b", "c", "d", "e"]}), "stop"),
            (json!({"stream": "yes"}), "stream"),
            (json!({"stream_options": {"include_usage": 1}}), "stream_options"),
            (json!({"messages": []}), "messages"),
            (json!({"messages": "hi"}), "messages"),
            (json!({"messages": [{"role": "king", "content": "hi"}]}), "messages"),
            (json!({"messages": [{"role": "user"}]}), "messages"),
            (json!({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}), "messages"),
        ] {
            let refused = parse(fields.clone()).expect_err(&fields.to_string());
            assert_eq!((refused.param, refused.status), (Some(param), StatusCode::BAD_REQUEST), "{fields}");
        }
    }

    #[test]
    fn null_means_left_open_and_unknown_fields_are_ignored() {
        let request = parse(
            json!({"temperature": null, "n": null, "stop": null, "stream": null, "stream_options": null, "tools": [], "x": {"y": 1}}),
        )
        .expect("valid");
        assert_eq!(request, parse(json!({})).expect("valid"));
    }

    #[test]
    fn text_parts_are_joined_and_developer_is_system() {
        let request = parse(
            json!({"messages": [{"role": "developer", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "kind"}]}]}),
        )
        .expect("valid");
        assert_eq!(request.messages, [Message { role: Role::System, content: "be kind".into() }]);
    }

    #[test]
    fn an_error_about_json_does_not_quote_the_body() {
        let refused = Request::parse(b"\"my secret").expect_err("not an object");
        assert!(!refused.message.contains("secret"), "{}", refused.message);
    }
}
