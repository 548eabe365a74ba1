//! JSON Schema, OpenAPI, AsyncAPI and the table of errors, generated from the types, so that they cannot say anything else.

use std::{collections::BTreeMap, fmt::Write as _};

use schemars::{JsonSchema, SchemaGenerator, generate::SchemaSettings};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::drift::VERSION;
use crate::wire::chat::{Confirmation, Done, ErrorEvent, Gap, Open, TurnRequest};
use crate::wire::conversation::{self, DeliveryReport, DenialReport, StepAnswer};
use crate::wire::frames::{ClientFrameShape, SUBPROTOCOL};
use crate::wire::hop::DispatchFrame;
use crate::wire::log;
use crate::wire::problem::{self, Problem};
use crate::wire::training::{TrainingRecord, TrainingState};
use crate::{Code, Message, Retry, Usage};

/// All documents, as file name and content.
///
/// They are kept in `contracts/schema/`; `cargo run -p headgate-contracts --example schema` writes them there.
pub fn documents() -> Vec<(&'static str, String)> {
    vec![
        ("turn.json", schema::<TurnRequest>()),
        ("open.json", schema::<Open>()),
        ("text.json", schema::<TextEvent>()),
        ("tool.json", schema::<ToolEvent>()),
        ("confirm.json", schema::<ConfirmEvent>()),
        ("confirmation.json", schema::<Confirmation>()),
        ("usage.json", schema::<Usage>()),
        ("gap.json", schema::<Gap>()),
        ("done.json", schema::<Done>()),
        ("error.json", schema::<ErrorEvent>()),
        ("client-frame.json", schema::<ClientFrameShape>()),
        ("dispatch-frame.json", schema::<DispatchFrame>()),
        ("problem.json", schema::<Problem>()),
        ("conversation-request.json", schema::<conversation::Body<'static>>()),
        ("step-answer.json", schema::<StepAnswer>()),
        ("delivery-report.json", schema::<DeliveryReport>()),
        ("denial-report.json", schema::<DenialReport>()),
        ("chat-completion-request.json", schema::<ChatCompletionRequest>()),
        ("events/turn.accepted.v1.json", event::<log::Accepted>(log::Kind::Accepted)),
        ("events/verdict.input.v1.json", event::<log::InputVerdict>(log::Kind::InputVerdict)),
        ("events/turn.completed.v1.json", event::<log::Completed>(log::Kind::Completed)),
        ("events/turn.cancelled.v1.json", event::<log::Cancelled>(log::Kind::Cancelled)),
        ("events/turn.denied.v1.json", event::<log::Denied>(log::Kind::Denied)),
        ("events/turn.failed.v1.json", event::<log::Failed>(log::Kind::Failed)),
        ("events/verdict.output.v1.json", event::<log::OutputVerdict>(log::Kind::OutputVerdict)),
        ("events/delivery.v1.json", event::<log::Delivery>(log::Kind::Delivery)),
        ("events/input.segment.v1.json", event::<log::Segment>(log::Kind::InputSegment)),
        ("events/output.segment.v1.json", event::<log::Segment>(log::Kind::OutputSegment)),
        ("events/training.audit.v1.json", schema::<TrainingRecord>()),
        ("training-state.json", schema::<TrainingState>()),
        ("openapi.json", pretty(&openapi())),
        ("asyncapi.json", pretty(&asyncapi())),
        ("errors.md", errors()),
    ]
}

fn schema<T: JsonSchema>() -> String {
    let schema = SchemaSettings::draft2020_12().into_generator().into_root_schema_for::<T>();
    pretty(&schema.to_value())
}

/// The schema of one kind of the events that are kept.
fn event<D: JsonSchema>(kind: log::Kind) -> String {
    let mut schema = SchemaSettings::draft2020_12().into_generator().into_root_schema_for::<log::Event<D>>().to_value();
    schema["title"] = kind.as_str().into();
    schema["properties"]["specversion"] = json!({"const": log::SPEC_VERSION, "description": "The version of CloudEvents."});
    schema["properties"]["type"] = json!({"const": kind.as_str(), "description": "What it says."});
    if !kind.is_segment() {
        schema["properties"]["sequence"]["const"] = format!("{:020}", kind.place()).into();
    }
    pretty(&schema)
}

fn pretty(value: &Value) -> String {
    format!("{value:#}\n")
}

/// A piece of text.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[allow(dead_code, reason = "the schema is all it is for; the codec writes straight into a buffer")]
struct TextEvent {
    /// The words.
    text: String,
    /// The lane, where it is not the content.
    #[serde(skip_serializing_if = "Option::is_none")]
    lane: Option<LaneName>,
    /// Which answer of several; absent: 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    choice: Option<u16>,
    /// Which tool call the arguments belong to.
    #[serde(skip_serializing_if = "Option::is_none")]
    tool: Option<u16>,
}

/// One channel of text within an answer, where it is not the content.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[allow(dead_code, reason = "the schema is all it is for")]
enum LaneName {
    /// What the model thinks aloud.
    Reasoning,
    /// The model's own refusal.
    Refusal,
    /// The arguments of a tool call.
    ToolArguments,
}

/// A tool call begins; its arguments follow as text.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[allow(dead_code, reason = "the schema is all it is for; the codec writes straight into a buffer")]
struct ToolEvent {
    /// The call's id.
    #[schemars(length(min = 1, max = 64), regex(pattern = r"^[A-Za-z0-9_.:-]+$"))]
    id: String,
    /// The function's name.
    #[schemars(length(min = 1, max = 64), regex(pattern = r"^[A-Za-z0-9_-]+$"))]
    name: String,
    /// Which call of the answer.
    index: u16,
    /// Which answer of several; absent: 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    choice: Option<u16>,
}

/// A person is asked whether a tool may be called; nothing of the call comes before the answer.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[allow(dead_code, reason = "the schema is all it is for; the codec writes straight into a buffer")]
struct ConfirmEvent {
    /// Which question.
    #[schemars(length(min = 1, max = 64), regex(pattern = r"^[A-Za-z0-9_.:-]+$"))]
    id: String,
    /// What the person reads: a model had a hand in it, and every filter has read it.
    prompt: String,
    /// The tool that would be called.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64), regex(pattern = r"^[A-Za-z0-9_-]+$"))]
    tool: Option<String>,
}

/// A request for a chat completion: the members that are understood. Others are dropped.
#[derive(JsonSchema)]
#[allow(dead_code, reason = "the schema is all it is for; the codec reads member by member")]
struct ChatCompletionRequest {
    #[schemars(length(min = 1, max = 256))]
    messages: Vec<Message>,
    #[schemars(length(max = 256))]
    model: Option<String>,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    #[schemars(range(min = 1))]
    max_completion_tokens: Option<u32>,
    /// The older name of `max_completion_tokens`, which counts where both are given.
    #[schemars(range(min = 1))]
    max_tokens: Option<u32>,
    #[schemars(range(min = 0.0, max = 2.0))]
    temperature: Option<f64>,
    #[schemars(range(min = 0.0, max = 1.0))]
    top_p: Option<f64>,
    seed: Option<i64>,
    #[schemars(range(min = 1, max = 128))]
    n: Option<u16>,
    stop: Option<Stops>,
    #[schemars(range(min = -2.0, max = 2.0))]
    presence_penalty: Option<f64>,
    #[schemars(range(min = -2.0, max = 2.0))]
    frequency_penalty: Option<f64>,
    #[schemars(length(max = 128))]
    tools: Option<Vec<Value>>,
    tool_choice: Option<Value>,
    response_format: Option<Map<String, Value>>,
    metadata: Option<Map<String, Value>>,
}

/// How a stream is written.
#[derive(JsonSchema)]
#[allow(dead_code, reason = "the schema is all it is for")]
struct StreamOptions {
    /// Whether the last chunk says what was used.
    include_usage: Option<bool>,
}

/// Texts at which the model stops.
#[derive(JsonSchema)]
#[schemars(untagged)]
#[allow(dead_code, reason = "the schema is all it is for")]
pub(crate) enum Stops {
    One(#[schemars(length(min = 1, max = 256))] String),
    Several(#[schemars(length(max = 16), inner(length(min = 1, max = 256)))] Vec<String>),
}

/// A generator whose definitions stand where OpenAPI and AsyncAPI keep them.
fn components() -> SchemaGenerator {
    SchemaSettings::draft2020_12().with(|settings| settings.definitions_path = "/components/schemas".into()).into_generator()
}

/// What may go wrong when an admin asks for training mode.
const TRAINING: &[Code] = &[
    Code::Unauthenticated,
    Code::TokenExpired,
    Code::PermissionDenied,
    Code::RateLimited,
    Code::Overloaded,
    Code::PolicyRegistryUnavailable,
    Code::EventLogUnavailable,
    Code::InternalError,
];

/// What may go wrong before a turn, on any call of a client.
const BEFORE: &[Code] = &[
    Code::InvalidRequest,
    Code::MalformedJson,
    Code::ProtocolError,
    Code::Unauthenticated,
    Code::TokenExpired,
    Code::PermissionDenied,
    Code::OriginDenied,
    Code::NotFound,
    Code::MethodNotAllowed,
    Code::NotAcceptable,
    Code::RequestTimeout,
    Code::HeaderTooLarge,
    Code::RateLimited,
    Code::QuotaExceeded,
    Code::InternalError,
    Code::Overloaded,
    Code::Draining,
];

/// What may go wrong besides with a body that holds a turn.
const TURN: &[Code] = &[
    Code::PolicyDenied,
    Code::TurnConflict,
    Code::IdempotencyMismatch,
    Code::VersionConflict,
    Code::PayloadTooLarge,
    Code::UnsupportedMediaType,
    Code::EncodingRefused,
    Code::ModerationUnavailable,
    Code::PolicyRegistryUnavailable,
    Code::EventLogUnavailable,
    Code::UpstreamConnectFailed,
    Code::UpstreamReset,
    Code::UpstreamProtocolError,
    Code::UpstreamEventTooLarge,
    Code::UpstreamRefused,
    Code::VerdictRejected,
    Code::UpstreamTimeoutFirstByte,
];

/// What the orchestrator may refuse.
const DISPATCH: &[Code] = &[
    Code::InvalidRequest,
    Code::MalformedJson,
    Code::VerdictInvalid,
    Code::VerdictReplayed,
    Code::VersionConflict,
    Code::StaleFence,
    Code::TurnConflict,
    Code::PayloadTooLarge,
    Code::UnsupportedMediaType,
    Code::PolicyRegistryUnavailable,
    Code::EventLogUnavailable,
    Code::UpstreamConnectFailed,
    Code::UpstreamRefused,
    Code::UpstreamReset,
    Code::UpstreamProtocolError,
    Code::UpstreamTimeoutFirstByte,
    Code::InternalError,
    Code::Overloaded,
    Code::Draining,
];

/// What the orchestrator may refuse of a report.
const REPORT: &[Code] = &[
    Code::InvalidRequest,
    Code::MalformedJson,
    Code::VerdictInvalid,
    Code::VersionConflict,
    Code::TurnConflict,
    Code::PayloadTooLarge,
    Code::UnsupportedMediaType,
    Code::PolicyRegistryUnavailable,
    Code::EventLogUnavailable,
    Code::InternalError,
];

/// What may be wrong with what somebody says to a question.
const CONFIRM: &[Code] = &[Code::SessionNotFound, Code::AlreadyAnswered];

/// The responses of a call: the good ones, and a problem per status of `codes`.
fn responses(good: Value, codes: &[&[Code]]) -> Value {
    let mut by_status: BTreeMap<u16, Vec<Code>> = BTreeMap::new();
    for code in codes.iter().copied().flatten() {
        by_status.entry(code.status()).or_default().push(*code);
    }
    let mut responses = good;
    for (status, codes) in by_status {
        let words: Vec<String> = codes.iter().map(|code| format!("`{code}`: {}", code.summary())).collect();
        let names: Vec<&str> = codes.iter().map(|code| code.as_str()).collect();
        let schema = json!({"allOf": [
            {"$ref": "#/components/schemas/Problem"},
            {"properties": {"status": {"const": status}, "code": {"enum": names}}},
        ]});
        let mut response = json!({
            "description": words.join("; "),
            "content": {problem::MEDIA_TYPE: {"schema": schema}},
        });
        if codes.iter().any(|code| code.retry() == Retry::Later) {
            response["headers"] =
                json!({"Retry-After": {"description": "seconds after which trying again may work", "schema": {"type": "integer"}}});
        }
        responses[status.to_string()] = response;
    }
    responses
}

fn reference(name: &str) -> Value {
    json!({"$ref": format!("#/components/schemas/{name}")})
}

fn body(name: &str) -> Value {
    json!({"required": true, "content": {"application/json": {"schema": reference(name)}}})
}

fn header(name: &str, description: &str) -> Value {
    json!({"name": name, "in": "header", "required": false, "description": description, "schema": {"type": "string"}})
}

fn turn_id() -> Value {
    json!({"name": "turn_id", "in": "path", "required": true, "schema": {"type": "string", "format": "uuid"}})
}

fn event_stream(description: &str) -> Value {
    json!({"description": description, "content": {"text/event-stream": {"schema": {"type": "string"}}}, "headers": {
        "x-headgate-turn": {"description": "the turn's id", "schema": {"type": "string", "format": "uuid"}},
        "policy-version": {"description": "the policy in force, where the route has the filter `policy_headers`", "schema": {"type": "string"}},
        "constitution-hash": {"description": "the constitution in force, where the route has the filter `policy_headers`", "schema": {"type": "string"}},
    }})
}

fn openapi() -> Value {
    let mut components = components();
    components.subschema_for::<TurnRequest>();
    components.subschema_for::<ChatCompletionRequest>();
    components.subschema_for::<conversation::Body<'static>>();
    components.subschema_for::<StepAnswer>();
    components.subschema_for::<DeliveryReport>();
    components.subschema_for::<DenialReport>();
    components.subschema_for::<Confirmation>();
    components.subschema_for::<TrainingState>();
    components.subschema_for::<Problem>();

    let traced = [header("traceparent", "W3C Trace Context"), header("tracestate", "W3C Trace Context")];
    let repeatable = header("Idempotency-Key", "the same key and body never begin a second turn");
    let of_turn = json!([repeatable, traced[0], traced[1]]);
    let dispatch = json!([
        header("Policy-Verdict", "the gateway's verdict on the prompt, a compact JWS"),
        header("Policy-Version", "the policy in force"),
        header("Constitution-Hash", "the constitution in force"),
        header("Content-Digest", "RFC 9530, of the body"),
        header("Idempotency-Key", "the turn's id where the client sent none"),
        traced[0],
        traced[1],
    ]);
    let report = json!([
        turn_id(),
        header("Policy-Verdict", "the gateway's word over these bytes, a compact JWS"),
        header("Policy-Version", "the policy in force"),
        header("Constitution-Hash", "the constitution in force"),
        header("Content-Digest", "RFC 9530, of the body"),
        traced[0],
        traced[1],
    ]);
    let state =
        json!({"200": {"description": "the tenant's state", "content": {"application/json": {"schema": reference("TrainingState")}}}});
    let gateway = json!(["gateway"]);
    let orchestrator = json!(["orchestrator"]);
    let probes = json!(["gateway", "orchestrator"]);
    json!({
        "openapi": "3.1.0",
        "info": {"title": "Headgate", "version": VERSION, "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
            "description": "A streaming chat gateway that moderates a stream exactly. The events of a stream are described in asyncapi.json."},
        "security": [{"bearer": []}],
        "tags": [{"name": "gateway", "description": "clients to the gateway"}, {"name": "orchestrator", "description": "the gateway to the orchestrator"}],
        "paths": {
            "/v1/chat/stream": {
                "post": {"operationId": "sendTurn", "summary": "sends a turn and streams its answer", "tags": gateway, "parameters": of_turn, "requestBody": body("TurnRequest"),
                    "responses": responses(json!({"200": event_stream("the events of the answer: `open`, then `text`, `tool`, `confirm` and `usage`, then exactly one of `done` and `error`")}), &[BEFORE, TURN])},
                "get": {"operationId": "openSocket", "summary": "opens a WebSocket for many turns", "tags": gateway, "parameters": [
                        header("Upgrade", "websocket; or HTTP/2 extended CONNECT"),
                        header("Sec-WebSocket-Protocol", &format!("{SUBPROTOCOL}; and, where no header can be set, bearer.<token>")),
                    ],
                    "responses": responses(json!({"101": {"description": "the socket is open"}}), &[BEFORE])},
            },
            "/v1/chat/stream/{turn_id}": {
                "get": {"operationId": "resumeTurn", "summary": "the rest of a turn that goes on without its client", "tags": gateway,
                    "parameters": [turn_id(), header("Last-Event-ID", "the last event the client has, `<turn_id>:<seq>`")],
                    "responses": responses(json!({"200": event_stream("the events after that one; a `gap` first, where some are no longer kept")}), &[BEFORE, &[Code::SessionNotFound]])},
            },
            "/v1/chat/stream/{turn_id}/stop": {
                "post": {"operationId": "stopTurn", "summary": "stops a turn; its safe prefix stays", "tags": gateway, "parameters": [turn_id()],
                    "responses": responses(json!({"202": {"description": "the turn ends with `error`, code `stopped`"}}), &[BEFORE, &[Code::SessionNotFound]])},
            },
            "/v1/chat/stream/{turn_id}/confirm": {
                "post": {"operationId": "confirmTurn", "summary": "answers the open question of a turn; the first answer counts", "tags": gateway, "parameters": [turn_id()], "requestBody": body("Confirmation"),
                    "responses": responses(json!({"202": {"description": "the turn goes on by it"}}), &[BEFORE, CONFIRM, &[
                        Code::PayloadTooLarge, Code::UnsupportedMediaType, Code::EncodingRefused,
                        Code::UpstreamConnectFailed, Code::UpstreamReset, Code::UpstreamProtocolError, Code::UpstreamRefused, Code::UpstreamTimeoutFirstByte,
                    ]])},
            },
            "/v1/chat/completions": {
                "post": {"operationId": "createChatCompletion", "summary": "OpenAI's chat completions, streamed or not", "tags": gateway, "parameters": of_turn, "requestBody": body("ChatCompletionRequest"),
                    "responses": responses(json!({"200": {
                        "description": "the answer, in OpenAI's form; its last chunk, or the answer itself, has a member `headgate` with `outcome` and `verdict`",
                        "content": {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {"schema": {"type": "string"}}},
                    }}), &[BEFORE, TURN, &[Code::UpstreamStalled, Code::Declined]])},
            },
            "/v1/models": {
                "get": {"operationId": "listModels", "summary": "the models of the route, in OpenAI's form", "tags": gateway,
                    "responses": responses(json!({"200": {"description": "the list", "content": {"application/json": {"schema": {"type": "object"}}}}}), &[BEFORE])},
            },
            "/v1/conversation/stream": {
                "post": {"operationId": "streamConversation", "summary": "runs a turn and streams its answer", "tags": orchestrator, "parameters": dispatch, "requestBody": body("ConversationRequest"),
                    "responses": responses(json!({"200": {"description": "the events of the answer, without ids", "content": {"text/event-stream": {"schema": {"type": "string"}}}}}), &[DISPATCH])},
            },
            "/v1/conversation/step": {
                "post": {"operationId": "stepConversation", "summary": "runs a turn and answers in one object", "tags": orchestrator, "parameters": dispatch, "requestBody": body("ConversationRequest"),
                    "responses": responses(json!({"200": {"description": "the answer", "content": {"application/json": {"schema": reference("StepAnswer")}}}}), &[DISPATCH, &[Code::UpstreamStalled, Code::Declined]])},
            },
            "/healthz": {"get": {"operationId": "isAlive", "summary": "whether the process is alive", "security": [], "tags": probes,
                "responses": {"200": {"description": "it is"}}}},
            "/readyz": {"get": {"operationId": "isReady", "summary": "whether new turns are taken", "security": [], "tags": probes,
                "responses": {"200": {"description": "they are"}, "503": {"description": "they are not: it starts, or drains, or lacks what it needs"}}}},
            "/v1/conversation/turns/{turn_id}/cancel": {
                "post": {"operationId": "cancelConversation", "summary": "cancels a turn, whether or not it is known", "tags": orchestrator, "parameters": [turn_id()],
                    "responses": responses(json!({"202": {"description": "it is not running any more, or will not be soon"}}), &[&[Code::InvalidRequest]])},
            },
            "/v1/conversation/turns/{turn_id}/confirm": {
                "post": {"operationId": "confirmConversation", "summary": "what a person says to a question of a turn, signed over these bytes", "tags": orchestrator, "parameters": report, "requestBody": body("Confirmation"),
                    "responses": responses(json!({"202": {"description": "the turn goes on by it"}}), &[CONFIRM, &[
                        Code::InvalidRequest, Code::MalformedJson, Code::NotFound, Code::VerdictInvalid, Code::VersionConflict, Code::PayloadTooLarge,
                        Code::UnsupportedMediaType, Code::PolicyRegistryUnavailable, Code::InternalError,
                    ]])},
            },
            "/v1/conversation/turns/{turn_id}/delivery": {
                "post": {"operationId": "reportDelivery", "summary": "what the user got of a turn, signed over these bytes; told again, it counts once", "tags": orchestrator, "parameters": report, "requestBody": body("DeliveryReport"),
                    "responses": responses(json!({"202": {"description": "it is kept"}}), &[REPORT, &[Code::SessionNotFound]])},
            },
            "/v1/conversation/turns/{turn_id}/verdict": {
                "post": {"operationId": "reportDenial", "summary": "a prompt that policy refused, so that it became no turn; told again, it counts once", "tags": orchestrator, "parameters": report, "requestBody": body("DenialReport"),
                    "responses": responses(json!({"202": {"description": "it is kept"}}), &[REPORT])},
            },
            "/v1/training": {
                "get": {"operationId": "training", "summary": "whether the tenant of an admin's token is in training mode", "tags": orchestrator, "parameters": traced,
                    "responses": responses(state.clone(), &[TRAINING])},
            },
            "/v1/training/enable": {
                "post": {"operationId": "enableTraining", "summary": "turns training mode on, for one admin of the tenant at a time", "tags": orchestrator, "parameters": traced,
                    "responses": responses(state.clone(), &[TRAINING, &[Code::TrainingLocked]])},
            },
            "/v1/training/approve": {
                "post": {"operationId": "approveTraining", "summary": "lets another admin go on who has turned training mode on", "tags": orchestrator, "parameters": traced,
                    "responses": responses(state.clone(), &[TRAINING, &[Code::StaleFence]])},
            },
            "/v1/training/disable": {
                "post": {"operationId": "disableTraining", "summary": "turns training mode off", "tags": orchestrator, "parameters": traced,
                    "responses": responses(state, &[TRAINING])},
            },
        },
        "components": {
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer", "description": "an API key or a JWT"}},
            "schemas": components.take_definitions(true),
        },
    })
}

fn asyncapi() -> Value {
    let mut components = components();
    let mut messages = Map::new();
    let mut message = |name: &str, summary: &str, schema: Value| {
        messages.insert(name.into(), json!({"name": name, "summary": summary, "contentType": "application/json", "payload": schema}));
    };
    message("open", "the answer begins", components.subschema_for::<Open>().to_value());
    message("text", "a piece of one lane", components.subschema_for::<TextEvent>().to_value());
    message("tool", "a tool call begins", components.subschema_for::<ToolEvent>().to_value());
    message("confirm", "a person is asked", components.subschema_for::<ConfirmEvent>().to_value());
    message("usage", "tokens used so far", components.subschema_for::<Usage>().to_value());
    message("gap", "events that are no longer kept", components.subschema_for::<Gap>().to_value());
    message("done", "the answer is complete, or was cut by policy", components.subschema_for::<Done>().to_value());
    message("error", "the answer failed", components.subschema_for::<ErrorEvent>().to_value());
    message("turn", "begins a turn", components.subschema_for::<TurnRequest>().to_value());
    message("frame", "a frame from the client", components.subschema_for::<ClientFrameShape>().to_value());
    message("dispatch", "a frame from the gateway", components.subschema_for::<DispatchFrame>().to_value());
    message("conversation", "a dispatch of the gateway", components.subschema_for::<conversation::Body<'static>>().to_value());
    let records = records(&mut components);
    let kinds: Vec<&str> = log::Kind::ALL.iter().map(|kind| kind.as_str()).collect();
    messages.extend(records.into_iter().map(|(kind, record)| (kind.to_owned(), record)));

    let events = ["open", "text", "tool", "confirm", "usage", "gap", "done", "error"];
    let upstream_events = ["open", "text", "tool", "confirm", "usage", "done", "error"];
    let channel = |address: &str, description: &str, names: &[&str]| {
        let messages: Map<String, Value> =
            names.iter().map(|name| ((*name).to_owned(), json!({"$ref": format!("#/components/messages/{name}")}))).collect();
        json!({"address": address, "description": description, "messages": messages})
    };
    let operation = |action: &str, channel: &str, summary: &str, names: &[&str]| {
        let messages: Vec<Value> = names.iter().map(|name| json!({"$ref": format!("#/channels/{channel}/messages/{name}")})).collect();
        json!({"action": action, "channel": {"$ref": format!("#/channels/{channel}")}, "summary": summary, "messages": messages})
    };
    let with = |first: &'static str, rest: &[&'static str]| [&[first], rest].concat();
    json!({
        "asyncapi": "3.0.0",
        "info": {"title": "Headgate", "version": VERSION, "license": {"name": "Apache-2.0"},
            "description": "The streams of a chat gateway that moderates them exactly. Server-sent events carry a message as `event: <name>` and `data: <object>`, with \
                `id: <turn_id>:<seq>` towards clients; a WebSocket as a text frame with `type`, `turn_id` and `seq` before the object's own members. `open` comes first, \
                then exactly one of `done` and `error` comes last; a stream that ends without either was cut."},
        "defaultContentType": "application/json",
        "channels": {
            "chatStream": channel("/v1/chat/stream", "one turn over HTTP, answered by server-sent events", &with("turn", &events)),
            "chatSocket": channel("/v1/chat/stream", &format!("many turns over one WebSocket, subprotocol {SUBPROTOCOL}"), &with("frame", &events)),
            "conversationSocket": channel("/v1/conversation/stream", "several dispatches over one WebSocket", &with("dispatch", &upstream_events)),
            "conversationStream": channel("/v1/conversation/stream", "one dispatch to the orchestrator, answered by server-sent events", &with("conversation", &upstream_events)),
            "conversationEvents": channel("conversation.events", "a Kafka topic: what became of each turn, in order within a session. A record that is there again has the same \
                `ce_id` and counts once. The topic may have another name: `orchestrator.events.kafka.topic`", &kinds),
            "trainingAudit": channel("training.audit", "a Kafka topic: every attempt at training mode and what became of its lock. The topic may have another name: \
                `orchestrator.training.topic`", &[AUDIT]),
        },
        "operations": {
            "receiveTurn": operation("receive", "chatStream", "a client sends a turn", &["turn"]),
            "sendEvents": operation("send", "chatStream", "the gateway answers it", &events),
            "receiveFrames": operation("receive", "chatSocket", "a client sends frames", &["frame"]),
            "sendFrames": operation("send", "chatSocket", "the gateway answers them", &events),
            "receiveDispatches": operation("receive", "conversationSocket", "the orchestrator takes dispatches, stops them and sends as much as it has credit for", &["dispatch"]),
            "sendDispatchEvents": operation("send", "conversationSocket", "the orchestrator answers them", &upstream_events),
            "receiveConversation": operation("receive", "conversationStream", "the orchestrator takes a dispatch", &["conversation"]),
            "sendRecords": operation("send", "conversationEvents", "the orchestrator tells what became of each turn", &kinds),
            "sendAudit": operation("send", "trainingAudit", "the orchestrator tells of training mode", &[AUDIT]),
            "sendConversationEvents": operation("send", "conversationStream", "the orchestrator answers it", &upstream_events),
        },
        "components": {"messages": messages, "schemas": components.take_definitions(true)},
    })
}

/// The type of the records of the audit of training mode.
const AUDIT: &str = "training.audit.v1";

/// What stands in topics, by type: CloudEvents in Kafka's binary mode, whose attributes are headers.
fn records(components: &mut SchemaGenerator) -> Vec<(&'static str, Value)> {
    let record = |kind: &str, summary: &str, key: &str, payload: Value, more: Value| {
        let text = |description: &str| json!({"type": "string", "description": description});
        let constant = |value: &str| json!({"type": "string", "const": value});
        let mut headers = json!({
            "ce_specversion": constant(log::SPEC_VERSION),
            "ce_id": text("unique, and the same when the record is written again"),
            "ce_type": constant(kind),
            "ce_source": text("who wrote it"),
            "ce_time": {"type": "string", "format": "date-time", "description": "when it happened, in UTC"},
            "ce_partitionkey": text("the record's key again"),
            "ce_dataschema": constant(&format!("urn:headgate:events:{kind}")),
            "content-type": constant("application/json"),
            "tenant_id": text("the tenant"),
            "schema_version": constant(kind.rsplit_once(".v").map_or("1", |(_, version)| version)),
        });
        let always: Vec<String> = headers.as_object().into_iter().flatten().map(|(name, _)| name.clone()).collect();
        if let (Some(headers), Value::Object(more)) = (headers.as_object_mut(), more) {
            headers.extend(more);
            headers.insert("traceparent".into(), text("W3C Trace Context of the call that led to it"));
        }
        json!({"name": kind, "summary": summary, "contentType": "application/json",
            "headers": {"type": "object", "properties": headers, "required": always},
            "payload": payload,
            "bindings": {"kafka": {"key": {"type": "string", "description": key}, "bindingVersion": "0.5.0"}}})
    };
    let of_turn = json!({
        "ce_subject": {"type": "string", "format": "uuid", "description": "the turn"},
        "ce_sequence": {"type": "string", "pattern": "^[0-9]{20}$", "description": "the record's place within its turn: compared as text, it orders"},
        "ce_reapedby": {"type": "string", "description": "who had it written in place of an orchestrator whose own log was lost; absent from all that an orchestrator writes"},
    });
    let mut turns = |kind: log::Kind, summary: &str| {
        let payload = match kind {
            log::Kind::Accepted => components.subschema_for::<log::Accepted>(),
            log::Kind::InputVerdict => components.subschema_for::<log::InputVerdict>(),
            log::Kind::InputSegment | log::Kind::OutputSegment => components.subschema_for::<log::Segment>(),
            log::Kind::Completed => components.subschema_for::<log::Completed>(),
            log::Kind::Cancelled => components.subschema_for::<log::Cancelled>(),
            log::Kind::Denied => components.subschema_for::<log::Denied>(),
            log::Kind::Failed => components.subschema_for::<log::Failed>(),
            log::Kind::OutputVerdict => components.subschema_for::<log::OutputVerdict>(),
            log::Kind::Delivery => components.subschema_for::<log::Delivery>(),
        };
        (kind.as_str(), record(kind.as_str(), summary, "`{tenant}/{session}`", payload.to_value(), of_turn.clone()))
    };
    let mut all: Vec<(&'static str, Value)> = log::Kind::ALL.iter().map(|kind| turns(*kind, summary(*kind))).collect();
    let audit = components.subschema_for::<TrainingRecord>().to_value();
    all.push((AUDIT, record(AUDIT, "an attempt at training mode, or what became of its lock", "the tenant", audit, json!({}))));
    all
}

fn summary(kind: log::Kind) -> &'static str {
    match kind {
        log::Kind::Accepted => "a turn was taken",
        log::Kind::InputVerdict => "what the gateway had decided about its prompt",
        log::Kind::InputSegment => "a piece of its prompt, sealed",
        log::Kind::OutputSegment => "a piece of what the model wrote, sealed",
        log::Kind::Completed => "it came to its proper end",
        log::Kind::Cancelled => "nobody wanted it any more",
        log::Kind::Denied => "policy ended it",
        log::Kind::Failed => "it broke",
        log::Kind::OutputVerdict => "what the gateway had decided about its answer",
        log::Kind::Delivery => "what the user got of it",
    }
}

fn errors() -> String {
    let mut table = String::from(
        "# Errors\n\n\
         Generated from `contracts/src/code.rs`. Before the first byte of an answer an error is an HTTP status with a problem body; after it\n\
         the status stays 200 and an `error` event speaks; on a WebSocket an `error` frame comes first and the close code, where there is one,\n\
         after it. Codes never change meaning; new ones may appear, and a client that does not know one goes by `retryable`.\n\n\
         | code | HTTP | WebSocket close | retry | `error.type` | meaning |\n|---|---|---|---|---|---|\n",
    );
    for code in Code::ALL {
        let close = code.close().map_or_else(|| "frame only".to_owned(), |close| close.to_string());
        let retry = match code.retry() {
            Retry::No => "no",
            Retry::Now => "now",
            Retry::Later => "later",
        };
        let (status, kind, summary) = (code.status(), code.error_type().as_str(), code.summary());
        // Writing to a String cannot fail.
        let _ = writeln!(table, "| `{code}` | {status} | {close} | {retry} | `{kind}` | {summary} |");
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Batch, Channel, Event, Lane, Question, What, wire::chat};

    #[test]
    fn the_documents_in_the_repository_are_fresh() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("schema");
        for (name, fresh) in documents() {
            let kept = std::fs::read_to_string(folder.join(name)).unwrap_or_default();
            assert!(kept == fresh, "contracts/schema/{name} is stale: run `cargo run -p headgate-contracts --example schema`");
        }
        let count =
            |folder: &std::path::Path| std::fs::read_dir(folder).unwrap().filter(|entry| entry.as_ref().unwrap().path().is_file()).count();
        let files = count(&folder) + count(&folder.join("events"));
        assert_eq!(files, documents().len(), "a file in contracts/schema/ is no document any more");
    }

    fn references<'v>(value: &'v Value, found: &mut Vec<&'v str>) {
        match value {
            Value::Object(map) => {
                for (name, value) in map {
                    match value {
                        Value::String(path) if name == "$ref" => found.push(path),
                        value => references(value, found),
                    }
                }
            }
            Value::Array(list) => list.iter().for_each(|value| references(value, found)),
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
        }
    }

    #[test]
    fn every_reference_leads_somewhere() {
        for (name, text) in documents() {
            let Ok(document) = serde_json::from_str::<Value>(&text) else {
                assert_eq!(name, "errors.md");
                continue;
            };
            let mut found = Vec::new();
            references(&document, &mut found);
            for path in found {
                assert!(path.strip_prefix('#').is_some_and(|path| document.pointer(path).is_some()), "{name}: {path}");
            }
        }
    }

    #[test]
    fn every_code_can_be_looked_up() {
        let table = errors();
        for code in Code::ALL {
            assert_eq!(table.matches(&format!("| `{code}` |")).count(), 1, "{code}");
        }
    }

    #[test]
    fn the_schema_of_a_turn_lists_exactly_what_is_read() {
        let schema = serde_json::from_str::<Value>(&schema::<TurnRequest>()).unwrap();
        assert_eq!(schema["additionalProperties"], false);
        let names: Vec<&String> = schema["properties"].as_object().unwrap().keys().collect();
        let parse = |name: &str, value: Value| {
            let mut body = json!({"messages": [{"role": "user", "content": "hi"}]});
            body[name] = value;
            TurnRequest::parse(body.to_string().as_bytes())
        };
        for name in &names {
            // A value no member takes: known members say what they expect, unknown ones that they are none.
            let fault = parse(name, json!(-7)).unwrap_err();
            assert!(!fault.message.contains("unknown member"), "{name}");
        }
        for name in ["top_p", "seed", "n", "tools", "stream", "turn_id"] {
            assert!(!names.contains(&&name.to_owned()));
            assert_eq!(parse(name, json!(1)).unwrap_err().message, format!("{name}: unknown member"));
        }
    }

    #[test]
    fn events_are_written_as_their_schema_says() {
        let mut batch = Batch::new();
        for channel in [Channel::Content, Channel::Reasoning, Channel::Refusal, Channel::ToolArguments(2)] {
            batch.push_text(Lane { choice: 1, channel }, "a");
        }
        let (id, name) = (batch.keep_text("call_1"), batch.keep_text("f"));
        batch.push(Event { what: What::Tool { choice: 1, index: 2, id, name }, raw: None });
        batch.push(Event { what: What::Usage(Usage::default()), raw: None });
        batch.push_question(Question { id: "q", tool: "f", prompt: "f()?" });
        for event in batch.events() {
            let mut out = Vec::new();
            match chat::encode(&batch, event, &mut out).unwrap() {
                "text" => drop(serde_json::from_slice::<TextEvent>(&out).unwrap()),
                "tool" => drop(serde_json::from_slice::<ToolEvent>(&out).unwrap()),
                "confirm" => drop(serde_json::from_slice::<ConfirmEvent>(&out).unwrap()),
                "usage" => drop(serde_json::from_slice::<Usage>(&out).unwrap()),
                other => panic!("{other} has no schema"),
            }
        }
    }
}
