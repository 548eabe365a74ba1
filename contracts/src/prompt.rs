//! The request of a turn, parsed: what filters may read, stamp, change or refuse, and what the upstream is sent anew.

use std::{fmt, sync::Arc};

use http::HeaderMap;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::{Fault, Finding, Outcome, SessionId, Subject, TenantId, Trace, TurnId};

/// Who speaks in a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// The operator's instructions; `developer` is read as the same.
    #[serde(alias = "developer")]
    System,
    /// The person.
    User,
    /// The model, earlier.
    Assistant,
    /// A tool's result.
    Tool,
}

impl Role {
    /// The word on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Role::System => "system",
            Role::User => "user",
            Role::Assistant => "assistant",
            Role::Tool => "tool",
        }
    }
}

/// A part of a message. Only text: what filters cannot read does not pass.
#[derive(Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Part {
    /// Words.
    Text {
        /// The words.
        text: String,
    },
}

/// What a message says: one text, or several parts of text.
#[derive(Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(untagged)]
pub enum Content {
    /// One text.
    Text(String),
    /// Several, as OpenAI clients may send.
    Parts(Vec<Part>),
}

impl Content {
    /// The texts, in order.
    pub fn texts(&self) -> impl Iterator<Item = &str> {
        let (one, many) = match self {
            Content::Text(text) => (Some(text.as_str()), &[][..]),
            Content::Parts(parts) => (None, parts.as_slice()),
        };
        one.into_iter().chain(many.iter().map(|Part::Text { text }| text.as_str()))
    }

    /// The texts, in order, to be changed.
    pub fn texts_mut(&mut self) -> Box<dyn Iterator<Item = &mut String> + '_> {
        match self {
            Content::Text(text) => Box::new(std::iter::once(text)),
            Content::Parts(parts) => Box::new(parts.iter_mut().map(|Part::Text { text }| text)),
        }
    }
}

/// One message of the conversation.
#[derive(Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// What is said; absent on an assistant message that only calls tools.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content: Option<Content>,
    /// The speaker's name, where several share a role.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The calls an assistant made, as OpenAI writes them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tool_calls: Option<Value>,
    /// Which call a tool message answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tool_call_id: Option<String>,
}

impl Message {
    /// A message of plain text.
    pub fn new(role: Role, text: impl Into<String>) -> Message {
        Message { role, content: Some(Content::Text(text.into())), name: None, tool_calls: None, tool_call_id: None }
    }
}

// Message text never reaches a log, so it has no useful Debug form.
impl fmt::Debug for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "<{} bytes>", self.texts().map(str::len).sum::<usize>())
    }
}
impl fmt::Debug for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Part::Text { text } = self;
        write!(f, "<{} bytes>", text.len())
    }
}
impl fmt::Debug for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Message").field("role", &self.role).field("content", &self.content).finish_non_exhaustive()
    }
}

/// How the model is asked to answer. Absent means: the upstream's default.
#[derive(Clone, PartialEq, Default)]
#[allow(missing_docs, reason = "OpenAI's parameter names, passed through as parsed")]
pub struct Settings {
    pub model: Option<String>,
    pub max_output_tokens: Option<u32>,
    pub temperature: Option<f64>,
    pub top_p: Option<f64>,
    pub seed: Option<i64>,
    pub n: Option<u16>,
    pub stop: Vec<String>,
    pub presence_penalty: Option<f64>,
    pub frequency_penalty: Option<f64>,
    pub tools: Option<Value>,
    pub tool_choice: Option<Value>,
    pub response_format: Option<Value>,
}

// Stop strings, tools and schemas are the client's text too.
impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Settings").field("model", &self.model).field("max_output_tokens", &self.max_output_tokens).finish_non_exhaustive()
    }
}

/// A secret: no Debug, no Display, no Serialize.
#[derive(Clone)]
pub struct Secret(Arc<str>);

impl Secret {
    /// Wraps a secret.
    pub fn new(secret: &str) -> Secret {
        Secret(secret.into())
    }
    /// The secret itself. Every caller is a place to look at in a review.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("<secret>")
    }
}

/// What the client brought to prove who it is.
#[derive(Debug, Clone, Default)]
pub enum Credential {
    /// Nothing.
    #[default]
    None,
    /// A bearer token: an API key or a JWT, from `Authorization`, the WebSocket subprotocol or an `auth` frame.
    Bearer(Secret),
}

/// Who a turn belongs to, as established by the `auth` filter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Principal {
    /// Who pays and whose policy applies.
    pub tenant: TenantId,
    /// Who asks.
    pub subject: Subject,
    /// What the credential allows, e.g. `chat:send`.
    pub scopes: Vec<String>,
    /// Unix seconds after which the credential is no longer good.
    pub expires: Option<u64>,
}

impl Principal {
    /// Who is meant where a route asks for no credential.
    pub fn anonymous() -> Principal {
        let name = "anonymous";
        Principal {
            tenant: name.parse().expect("a valid name"),
            subject: name.parse().expect("a valid name"),
            scopes: Vec::new(),
            expires: None,
        }
    }
}

/// What is about to be sent upstream: what a seal signs.
#[derive(Clone, Copy)]
pub struct Dispatch<'a> {
    /// The HTTP method.
    pub method: &'a str,
    /// The path, without query.
    pub path: &'a str,
    /// The exact bytes of the body.
    pub body: &'a [u8],
}

/// Signs a dispatch: gives the headers that prove it. Put on a prompt by the `policy_headers` filter and called by the
/// upstream once the exact bytes are known.
pub type Seal = Arc<dyn Fn(&Prompt, &Dispatch<'_>) -> Result<HeaderMap, Fault> + Send + Sync>;

/// The request of a turn.
#[derive(Clone)]
pub struct Prompt {
    /// Which turn.
    pub turn: TurnId,
    /// Of which session.
    pub session: SessionId,
    /// Whose; [`Principal::anonymous`] until a filter knows better.
    pub principal: Principal,
    /// What the client brought to prove it.
    pub credential: Credential,
    /// The conversation.
    pub messages: Vec<Message>,
    /// How to answer.
    pub settings: Settings,
    /// The client's own labels, passed on and never interpreted.
    pub metadata: Map<String, Value>,
    /// The client's key for this request, for safe repeats.
    pub idempotency_key: Option<String>,
    /// Where this turn stands in a distributed trace.
    pub trace: Trace,
    /// Headers for the upstream, put here by filters.
    pub headers: HeaderMap,
    /// What filters found in the prompt; the first [`crate::MAX_FINDINGS`].
    pub findings: Vec<Finding>,
    /// What policy did to the prompt.
    pub outcome: Outcome,
    /// What signs the dispatch.
    pub seal: Option<Seal>,
}

impl Prompt {
    /// A prompt with nothing but its messages.
    pub fn new(turn: TurnId, session: SessionId, messages: Vec<Message>) -> Prompt {
        Prompt {
            turn,
            session,
            principal: Principal::anonymous(),
            credential: Credential::None,
            messages,
            settings: Settings::default(),
            metadata: Map::new(),
            idempotency_key: None,
            trace: Trace::fresh(),
            headers: HeaderMap::new(),
            findings: Vec::new(),
            outcome: Outcome::Allowed,
            seal: None,
        }
    }

    /// About how many bytes it is as JSON: what nobody escapes, and as much again as is usual around it.
    pub(crate) fn json_bytes(&self) -> usize {
        let texts = self.messages.iter().filter_map(|message| message.content.as_ref()).flat_map(Content::texts);
        texts.map(|text| 64 + text.len() + text.len() / 32).sum::<usize>() + 512
    }
}

impl fmt::Debug for Prompt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Prompt")
            .field("turn", &self.turn)
            .field("session", &self.session)
            .field("principal", &self.principal)
            .field("messages", &self.messages.len())
            .finish_non_exhaustive()
    }
}
