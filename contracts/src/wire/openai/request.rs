//! Requests: read from clients member by member, written anew for models.

use serde::Serialize;
use serde_json::{Map, Value};

use crate::wire::members::{MAX_MODEL_BYTES, Members, Others};
use crate::wire::problem::to_vec;
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
    to_vec(&Body {
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
    })
}
