//! Requests: read from clients member by member, written anew for models.

use serde::Serialize;
use serde_json::{Map, Value};

use crate::wire::members::{MAX_MODEL_BYTES, Members, Others};
use crate::wire::problem::to_vec_within;
use crate::{Fault, Message, Prompt, Settings};

/// The most answers one request may ask for: OpenAI's own bound.
const MAX_CHOICES: i64 = 128;

/// Whether an answer comes as a stream of chunks or as one object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// A stream of chunks.
    Streamed,
    /// One object.
    Whole,
}

/// A request to `/v1/chat/completions`, as parsed. Members that are not here are dropped, never forwarded.
#[derive(Clone)]
pub struct Request {
    /// The conversation.
    pub messages: Vec<Message>,
    /// How to answer.
    pub settings: Settings,
    /// How the client wants the answer.
    pub form: Form,
    /// Whether a streamed answer ends with a chunk of usage.
    pub include_usage: bool,
    /// The client's own labels.
    pub metadata: Map<String, Value>,
}

// Labels and messages are the client's text.
impl std::fmt::Debug for Request {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Request")
            .field("messages", &self.messages.len())
            .field("settings", &self.settings)
            .field("form", &self.form)
            .finish_non_exhaustive()
    }
}

impl Request {
    /// Reads a request.
    ///
    /// Errors: a client's fault that names the member and what was expected, never what was found.
    pub fn parse(body: &[u8]) -> Result<Request, Fault> {
        let mut members = Members::parse(body, Others::Dropped)?;
        let messages = members.messages()?;
        let max_tokens = members.integer("max_tokens", 1..=i64::from(u32::MAX))?;
        let max_completion_tokens = members.integer("max_completion_tokens", 1..=i64::from(u32::MAX))?;
        let settings = Settings {
            model: members.text("model", MAX_MODEL_BYTES)?,
            max_output_tokens: max_completion_tokens.or(max_tokens).and_then(|n| u32::try_from(n).ok()),
            temperature: members.number("temperature", 0.0..=2.0)?,
            top_p: members.number("top_p", 0.0..=1.0)?,
            seed: members.integer("seed", i64::MIN..=i64::MAX)?,
            n: members.integer("n", 1..=MAX_CHOICES)?.and_then(|n| u16::try_from(n).ok()),
            stop: members.stops()?,
            presence_penalty: members.number("presence_penalty", -2.0..=2.0)?,
            frequency_penalty: members.number("frequency_penalty", -2.0..=2.0)?,
            tools: members.tools()?,
            tool_choice: members.tool_choice()?,
            response_format: members.response_format()?,
        };
        let form = if members.flag("stream")?.unwrap_or(false) { Form::Streamed } else { Form::Whole };
        let include_usage = match members.object("stream_options")? {
            Some(mut options) => options.flag("include_usage")?.unwrap_or(false),
            None => false,
        };
        let metadata = members.metadata()?;
        members.end()?;
        Ok(Request { messages, settings, form, include_usage, metadata })
    }
}

/// The request as JSON schema and as models are sent it: OpenAI's names.
#[derive(Serialize)]
struct Body<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    model: Option<&'a str>,
    messages: &'a [Message],
    stream: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    stream_options: Option<StreamOptions>,
    // The older of the two names: every server of open models knows it, not every one knows `max_completion_tokens`.
    #[serde(skip_serializing_if = "Option::is_none")]
    max_tokens: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    temperature: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    top_p: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    seed: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    n: Option<u16>,
    #[serde(skip_serializing_if = "<[String]>::is_empty")]
    stop: &'a [String],
    #[serde(skip_serializing_if = "Option::is_none")]
    presence_penalty: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    frequency_penalty: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tools: Option<&'a Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tool_choice: Option<&'a Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    response_format: Option<&'a Value>,
}

#[derive(Serialize)]
struct StreamOptions {
    include_usage: bool,
}

/// Writes the request for a model's server, from the parsed form alone. Usage is always asked for.
pub fn encode_request(prompt: &Prompt, form: Form) -> Vec<u8> {
    let settings = &prompt.settings;
    let body = Body {
        model: settings.model.as_deref(),
        messages: &prompt.messages,
        stream: form == Form::Streamed,
        stream_options: (form == Form::Streamed).then_some(StreamOptions { include_usage: true }),
        max_tokens: settings.max_output_tokens,
        temperature: settings.temperature,
        top_p: settings.top_p,
        seed: settings.seed,
        n: settings.n,
        stop: &settings.stop,
        presence_penalty: settings.presence_penalty,
        frequency_penalty: settings.frequency_penalty,
        tools: settings.tools.as_ref(),
        tool_choice: settings.tool_choice.as_ref(),
        response_format: settings.response_format.as_ref(),
    };
    to_vec_within(prompt.json_bytes(), &body)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{SessionId, TurnId};

    fn parse(body: Value) -> Result<Request, Fault> {
        Request::parse(body.to_string().as_bytes())
    }

    fn sent(request: Request, form: Form) -> Value {
        let mut prompt = Prompt::new(TurnId::fresh(), SessionId::fresh(), request.messages);
        prompt.settings = request.settings;
        serde_json::from_slice(&encode_request(&prompt, form)).unwrap()
    }

    #[test]
    fn what_a_model_is_asked_is_what_was_understood_and_nothing_else() {
        let request = parse(json!({
            "model": "demo", "stream": true, "stream_options": {"include_usage": true, "x": 1}, "n": 2, "max_completion_tokens": 9, "max_tokens": 5,
            "temperature": 1, "top_p": 0.5, "seed": -4, "stop": ["a"], "presence_penalty": -2, "frequency_penalty": 2.0,
            "logit_bias": {"1": 2}, "user": "u", "store": true, "extra_body": {"prompt": "smuggled"}, "metadata": {"a": "b"},
            "tools": [{"type": "function", "x": "smuggled", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}, "strict": true, "x": 1}}],
            "tool_choice": {"type": "function", "function": {"name": "f"}},
            "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}, "strict": false, "x": 1}},
            "messages": [
                {"role": "developer", "content": "be kind", "x": "smuggled"},
                {"role": "user", "name": "ann", "content": [{"type": "text", "text": "hi", "x": "smuggled"}]},
                {"role": "assistant", "content": null, "refusal": null, "tool_calls": [{"id": "c1", "type": "function", "index": 0, "function": {"name": "f", "arguments": "{}", "x": 1}}]},
                {"role": "tool", "content": "42", "tool_call_id": "c1"},
            ],
        }))
        .unwrap();
        assert!(request.include_usage && request.form == Form::Streamed && request.metadata["a"] == "b");
        assert_eq!(
            sent(request, Form::Streamed),
            json!({
                "model": "demo",
                "messages": [
                    {"role": "system", "content": "be kind"},
                    {"role": "user", "content": [{"type": "text", "text": "hi"}], "name": "ann"},
                    {"role": "assistant", "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
                    {"role": "tool", "content": "42", "tool_call_id": "c1"},
                ],
                "stream": true, "stream_options": {"include_usage": true},
                "max_tokens": 9, "temperature": 1.0, "top_p": 0.5, "seed": -4, "n": 2, "stop": ["a"], "presence_penalty": -2.0, "frequency_penalty": 2.0,
                "tools": [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}, "strict": true}}],
                "tool_choice": {"type": "function", "function": {"name": "f"}},
                "response_format": {"json_schema": {"name": "s", "schema": {"type": "object"}, "strict": false}, "type": "json_schema"},
            })
        );
    }

    #[test]
    fn usage_is_always_asked_for_and_only_on_streams() {
        let request = || parse(json!({"messages": [{"role": "user", "content": "hi"}]})).unwrap();
        assert!(request().form == Form::Whole && !request().include_usage);
        assert_eq!(sent(request(), Form::Streamed)["stream_options"]["include_usage"], true);
        assert_eq!(sent(request(), Form::Whole), json!({"messages": [{"role": "user", "content": "hi"}], "stream": false}));
    }

    #[test]
    fn a_fault_in_a_request_names_its_member_and_never_quotes_it() {
        let message = json!({"role": "user", "content": "secret"});
        for (member, value, says) in [
            ("stream", json!("secret"), "stream: expected true or false"),
            ("stream_options", json!("secret"), "stream_options: expected an object"),
            ("stream_options", json!({"include_usage": "secret"}), "stream_options.include_usage: expected true or false"),
            ("n", json!(0), "n: expected a whole number from 1 to 128"),
            ("n", json!(129), "n: expected a whole number from 1 to 128"),
            ("top_p", json!(1.5), "top_p: expected a number from 0 to 1"),
            ("seed", json!("secret"), "seed: expected a whole number"),
            ("model", json!("x".repeat(257)), "model: expected a text of at most 256 bytes"),
            ("tools", json!([{"type": "secret"}]), "tools[0].type: expected function"),
            ("tools", json!([{"type": "function", "function": {"name": "a secret"}}]), "tools[0].function.name: expected 1 to 64"),
            (
                "tools",
                json!([{"type": "function", "function": {"name": "f", "parameters": "secret"}}]),
                "tools[0].function.parameters: expected an object",
            ),
            ("tool_choice", json!("secret"), "tool_choice: expected none, auto, required"),
            ("response_format", json!({"type": "secret"}), "response_format.type: expected text, json_object, json_schema"),
            ("response_format", json!({"type": "json_schema"}), "response_format.json_schema: missing"),
        ] {
            let fault = parse(json!({"messages": [message], member: value})).unwrap_err();
            assert!(fault.message.contains(says), "{member}: {}", fault.message);
            assert!(!fault.chain().contains("secret"), "{}", fault.chain());
        }
        for (message, says) in [
            (json!({"role": "assistant", "tool_calls": [{"id": "a", "type": "function"}]}), "messages[0].tool_calls[0].function: missing"),
            (json!({"role": "assistant", "tool_calls": []}), "messages[0].content: expected a text"),
            (json!({"role": "tool", "content": "x", "tool_call_id": "a secret"}), "messages[0].tool_call_id: expected 1 to 64"),
        ] {
            let fault = parse(json!({"messages": [message]})).unwrap_err();
            assert!(fault.message.contains(says), "{}", fault.message);
        }
    }
}
