//! What the gateway asks the orchestrator: one turn of a conversation, streamed or in one step.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::log::Delivered;
use super::members::{MAX_MODEL_BYTES, Members, Others};
use super::openai::Completion;
use super::problem::{to_vec, to_vec_within};
use crate::{Code, Fault, Finish, Head, Message, Prompt, SessionId, Settings, Subject, TenantId, TurnId, Usage};

/// The header by which an orchestrator says of a turn that it refuses whether it was taken: only one that was not may be tried
/// elsewhere. RFC 9651, a boolean.
pub const TURN_TAKEN: &str = "turn-taken";
/// Its value where the turn was not taken: nothing was done for it, and its verdict is unspent.
pub const NOT_TAKEN: &str = "?0";
/// Its value where it was, and failed.
pub const TAKEN: &str = "?1";

/// The body of `POST /v1/conversation/stream` and `/v1/conversation/step`.
#[derive(Clone, PartialEq)]
pub struct Request {
    /// Which turn.
    pub turn_id: TurnId,
    /// Of which session.
    pub session_id: SessionId,
    /// Who pays.
    pub tenant: TenantId,
    /// Who asks.
    pub subject: Subject,
    /// The conversation.
    pub messages: Vec<Message>,
    /// How to answer.
    pub settings: Settings,
    /// The client's own labels.
    pub metadata: Map<String, Value>,
}

/// The body as it is written; borrowed, so that a prompt is not copied to be sent.
#[derive(Serialize, schemars::JsonSchema)]
#[schemars(rename = "ConversationRequest", deny_unknown_fields)]
pub(crate) struct Body<'a> {
    turn_id: TurnId,
    session_id: &'a SessionId,
    tenant: &'a TenantId,
    subject: &'a Subject,
    messages: &'a [Message],
    #[serde(skip_serializing_if = "Option::is_none")]
    model: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_output_tokens: Option<u32>,
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
    #[serde(skip_serializing_if = "Map::is_empty")]
    metadata: &'a Map<String, Value>,
}

/// Writes the request of a prompt, from the parsed form alone.
pub fn encode(prompt: &Prompt) -> Vec<u8> {
    let settings = &prompt.settings;
    let body = Body {
        turn_id: prompt.turn,
        session_id: &prompt.session,
        tenant: &prompt.principal.tenant,
        subject: &prompt.principal.subject,
        messages: &prompt.messages,
        model: settings.model.as_deref(),
        max_output_tokens: settings.max_output_tokens,
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
        metadata: &prompt.metadata,
    };
    to_vec_within(prompt.json_bytes(), &body)
}

// Labels and messages are the client's text.
impl std::fmt::Debug for Request {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Request")
            .field("turn_id", &self.turn_id)
            .field("session_id", &self.session_id)
            .field("messages", &self.messages.len())
            .field("settings", &self.settings)
            .finish_non_exhaustive()
    }
}

impl Request {
    /// Reads a request.
    ///
    /// Errors: a client's fault (the gateway is the client here) that names the member, never what was found.
    pub fn parse(body: &[u8]) -> Result<Request, Fault> {
        let mut members = Members::parse(body, Others::Refused)?;
        let turn_id = members.name("turn_id")?;
        let session_id = members.name("session_id")?;
        let tenant = members.name("tenant")?;
        let subject = members.name("subject")?;
        let request = Request {
            turn_id: members.need("turn_id", turn_id)?,
            session_id: members.need("session_id", session_id)?,
            tenant: members.need("tenant", tenant)?,
            subject: members.need("subject", subject)?,
            messages: members.messages()?,
            settings: Settings {
                model: members.text("model", MAX_MODEL_BYTES)?,
                max_output_tokens: members.integer("max_output_tokens", 1..=i64::from(u32::MAX))?.and_then(|n| u32::try_from(n).ok()),
                temperature: members.number("temperature", 0.0..=2.0)?,
                top_p: members.number("top_p", 0.0..=1.0)?,
                seed: members.integer("seed", i64::MIN..=i64::MAX)?,
                n: members.integer("n", 1..=128)?.and_then(|n| u16::try_from(n).ok()),
                stop: members.stops()?,
                presence_penalty: members.number("presence_penalty", -2.0..=2.0)?,
                frequency_penalty: members.number("frequency_penalty", -2.0..=2.0)?,
                tools: members.tools()?,
                tool_choice: members.tool_choice()?,
                response_format: members.response_format()?,
            },
            metadata: members.metadata()?,
        };
        members.end()?;
        Ok(request)
    }
}

/// The body of `POST /v1/conversation/turns/{id}/delivery`: what the user got of a turn. Unknown members are passed over.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct DeliveryReport {
    /// Whose turn it was.
    pub tenant: TenantId,
    /// Of which session.
    pub session_id: SessionId,
    /// What the user got: `delivered`, `denied` or `cut`.
    pub outcome: Delivered,
    /// The stable code of why it was not the whole answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64))]
    pub code: Option<String>,
    /// The number of the last event that the client's connection took.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_seq: Option<u64>,
    /// Text that was let go to the client, in bytes.
    pub text_bytes: u64,
    /// The signed verdict of the output, as the client got it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verdict: Option<String>,
}

/// The body of `POST /v1/conversation/turns/{id}/verdict`: a prompt that policy refused, so that it became no turn. Unknown
/// members are passed over.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct DenialReport {
    /// Whose prompt it was.
    pub tenant: TenantId,
    /// Of which session.
    pub session_id: SessionId,
    /// Who asked.
    pub subject: Subject,
    /// The stable code of the refusal.
    #[schemars(length(min = 1, max = 64))]
    pub code: String,
}

/// Reads a report.
///
/// Errors: a client's fault (the gateway is the client here) that repeats nothing of what was found.
pub fn report<T: serde::de::DeserializeOwned>(body: &[u8]) -> Result<T, Fault> {
    serde_json::from_slice(body).map_err(|error| match error.classify() {
        serde_json::error::Category::Data => Fault::client(Code::InvalidRequest).saying("not a report of this kind"),
        serde_json::error::Category::Eof | serde_json::error::Category::Syntax | serde_json::error::Category::Io => {
            Fault::client(Code::MalformedJson)
        }
    })
}

impl DeliveryReport {
    /// The body, as JSON.
    pub fn body(&self) -> Vec<u8> {
        to_vec(self)
    }
}

impl DenialReport {
    /// The body, as JSON.
    pub fn body(&self) -> Vec<u8> {
        to_vec(self)
    }
}

/// The answer of `POST /v1/conversation/step`. Its text has no Debug form.
#[derive(Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct StepAnswer {
    /// Which turn.
    pub turn_id: TurnId,
    /// The model that answered.
    pub model: String,
    /// The text.
    pub text: String,
    /// Why the model stopped.
    pub finish: Finish,
    /// What it used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
    /// The calls it makes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tools: Vec<StepTool>,
}

/// One call of a tool.
#[derive(Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct StepTool {
    /// Its id.
    pub id: String,
    /// The function.
    pub name: String,
    /// Its arguments: JSON, as far as the model can write it.
    pub arguments: String,
}

impl StepAnswer {
    /// The answer that the events of a turn add up to; of several choices the first.
    pub fn of(turn_id: TurnId, head: &Head, completion: &Completion) -> StepAnswer {
        let choice = completion.first().cloned().unwrap_or_default();
        StepAnswer {
            turn_id,
            model: head.model.clone(),
            text: choice.content,
            finish: choice.finish.unwrap_or_default(),
            usage: completion.usage,
            tools: choice.tools.into_values().map(|call| StepTool { id: call.id, name: call.name, arguments: call.arguments }).collect(),
        }
    }

    /// The body, as JSON.
    pub fn body(&self) -> Vec<u8> {
        to_vec(self)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{Batch, Event, Principal, Role, What, wire::openai};

    #[test]
    fn a_prompt_arrives_as_it_was_sent() {
        let request = openai::Request::parse(
            json!({
                "messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}],
                "model": "demo", "max_tokens": 5, "temperature": 0.5, "top_p": 0.25, "seed": 7, "n": 2, "stop": ["x"], "presence_penalty": 1, "frequency_penalty": 1,
                "tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "auto", "response_format": {"type": "json_object"}, "metadata": {"app": "web"},
            })
            .to_string()
            .as_bytes(),
        )
        .unwrap();
        let mut prompt = Prompt::new(TurnId::fresh(), SessionId::fresh(), request.messages);
        prompt.settings = request.settings;
        prompt.metadata = request.metadata;
        prompt.principal = Principal { tenant: "acme".parse().unwrap(), subject: "u1".parse().unwrap(), ..Principal::anonymous() };
        let read = Request::parse(&encode(&prompt)).unwrap();
        let expected = Request {
            turn_id: prompt.turn,
            session_id: prompt.session,
            tenant: prompt.principal.tenant,
            subject: prompt.principal.subject,
            messages: prompt.messages,
            settings: prompt.settings,
            metadata: prompt.metadata,
        };
        assert!(read == expected, "{read:?} {expected:?}");
        assert!(!format!("{read:?}").contains("kind"));
    }

    #[test]
    fn a_request_that_is_not_ours_is_refused_by_name() {
        let whole = || {
            serde_json::from_slice::<Value>(&encode(&Prompt::new(
                TurnId::fresh(),
                SessionId::fresh(),
                vec![Message::new(Role::User, "secret")],
            )))
            .unwrap()
        };
        assert!(Request::parse(whole().to_string().as_bytes()).is_ok());
        for missing in ["turn_id", "session_id", "tenant", "subject", "messages"] {
            let mut body = whole();
            body.as_object_mut().unwrap().shift_remove(missing);
            let fault = Request::parse(body.to_string().as_bytes()).unwrap_err();
            assert_eq!(fault.message, format!("{missing}: missing"));
        }
        let mut body = whole();
        body["admin"] = true.into();
        assert_eq!(Request::parse(body.to_string().as_bytes()).unwrap_err().message, "admin: unknown member");
    }

    #[test]
    fn a_step_says_what_the_stream_would_have() {
        let mut batch = Batch::new();
        batch.push_text(Lane::DEFAULT, "he");
        batch.push_text(Lane { choice: 1, channel: Channel::Content }, "other");
        batch.push_text(Lane { choice: 0, channel: Channel::Reasoning }, "hm");
        batch.push_text(Lane::DEFAULT, "llo");
        let (id, name) = (batch.keep_text("c1"), batch.keep_text("f"));
        batch.push(Event { what: What::Tool { choice: 0, index: 0, id, name }, raw: None });
        batch.push_text(Lane { choice: 0, channel: Channel::ToolArguments(0) }, "{}");
        batch.push(Event { what: What::Finish { choice: 0, finish: Finish::ToolCalls }, raw: None });
        batch.push(Event { what: What::Usage(Usage { input_tokens: 1, output_tokens: 2 }), raw: None });
        let mut completion = Completion::new();
        completion.add(&batch);
        let turn = TurnId::fresh();
        let answer = StepAnswer::of(turn, &Head { model: "demo".into(), ..Head::default() }, &completion);
        assert_eq!(
            serde_json::from_slice::<Value>(&answer.body()).unwrap(),
            json!({"turn_id": turn, "model": "demo", "text": "hello", "finish": "tool_calls", "usage": {"input_tokens": 1, "output_tokens": 2},
                "tools": [{"id": "c1", "name": "f", "arguments": "{}"}]})
        );
    }

    use crate::{Channel, Lane};
}
