//! A refusal or a fault as an HTTP body that both RFC 9457 readers and OpenAI's SDKs understand, and back.

use serde::{Deserialize, Serialize};

use crate::{Category, Code, Fault, Refusal, Stage, Stop, TurnId, Who};

/// The media type of a problem: RFC 9457 section 3.
pub const MEDIA_TYPE: &str = "application/problem+json";
/// What `type` begins with; the code follows.
pub const TYPE_BASE: &str = "https://headgate.dev/errors/";
/// The largest problem body that is read, in bytes; one of ours is under 2 KiB.
pub const MAX_BODY_BYTES: usize = 64 << 10;

/// The body of an answer that is an error.
#[derive(Debug, Clone, PartialEq, Serialize, schemars::JsonSchema)]
pub struct Problem {
    /// Where the code is explained.
    #[serde(rename = "type")]
    pub kind: String,
    /// The code's sentence.
    pub title: &'static str,
    /// The HTTP status.
    pub status: u16,
    /// What happened this time; never message text.
    pub detail: String,
    /// The stable code.
    pub code: Code,
    /// Whether the same request may work later.
    pub retryable: bool,
    /// The turn, where one had begun.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub turn_id: Option<TurnId>,
    /// Milliseconds after which it may.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retry_after_ms: Option<u64>,
    /// The same, as OpenAI's SDKs read it.
    pub error: ErrorObject,
    /// What policy had to say, where it said no.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub policy: Option<PolicyObject>,
}

/// An error as OpenAI's SDKs read it.
#[derive(Debug, Clone, PartialEq, Serialize, schemars::JsonSchema)]
pub struct ErrorObject {
    /// What happened.
    pub message: String,
    /// The kind of error, one of a dozen.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// Always null: the message names the member.
    pub param: Option<String>,
    /// The stable code.
    pub code: Code,
}

/// Why policy said no.
#[derive(Debug, Clone, PartialEq, Serialize, schemars::JsonSchema)]
pub struct PolicyObject {
    /// Whether prompt or answer was judged.
    pub stage: Stage,
    /// The rule, as configured.
    pub rule: String,
    /// The categories.
    pub categories: Vec<Category>,
}

impl ErrorObject {
    /// The error of a code, with a message for this time.
    pub fn new(code: Code, message: &str) -> ErrorObject {
        ErrorObject { message: message.to_owned(), kind: code.error_type().as_str(), param: None, code }
    }

    /// The error that a stop is.
    pub fn of(stop: &Stop) -> ErrorObject {
        ErrorObject::new(stop.code(), message(stop))
    }

    /// The one payload of a failed stream in OpenAI's dialect: `{"error": {...}}`.
    pub fn body(&self) -> Vec<u8> {
        to_vec(&serde_json::json!({ "error": self }))
    }
}

/// What the client is told about a stop.
pub(super) fn message(stop: &Stop) -> &str {
    match stop {
        Stop::Refused(refusal) => &refusal.message,
        Stop::Failed(fault) => &fault.message,
        Stop::Gone(gone) => gone.code().summary(),
    }
}

/// Milliseconds until trying again may work.
pub(super) fn retry_after_ms(stop: &Stop) -> Option<u64> {
    let pause = match stop {
        Stop::Refused(refusal) => refusal.retry_after,
        Stop::Failed(fault) => fault.retry_after,
        Stop::Gone(_) => None,
    };
    pause.map(|pause| u64::try_from(pause.as_millis()).unwrap_or(u64::MAX))
}

pub(super) fn to_vec(value: &impl Serialize) -> Vec<u8> {
    to_vec_within(128, value)
}

/// The same, where it is known how many bytes it will be: what grows is moved, again and again.
pub(super) fn to_vec_within(bytes: usize, value: &impl Serialize) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes);
    serde_json::to_writer(&mut out, value).expect("our own types have string keys and cannot fail to serialise");
    out
}

impl Problem {
    /// The problem that a stop is, before the first byte of an answer: a refusal in it is one of the prompt.
    pub fn of(stop: &Stop, turn: Option<TurnId>) -> Problem {
        Problem {
            retry_after_ms: retry_after_ms(stop),
            policy: PolicyObject::of_prompt(stop),
            ..Problem::new(stop.code(), message(stop), turn)
        }
    }

    /// The problem that a fault is.
    pub fn of_fault(fault: &Fault, turn: Option<TurnId>) -> Problem {
        Problem::of(&Stop::Failed(fault.clone()), turn)
    }

    /// The problem that a refusal is, at any stage.
    pub fn of_refusal(refusal: &Refusal, stage: Stage, turn: Option<TurnId>) -> Problem {
        Problem { policy: Some(PolicyObject::of(refusal, stage)), ..Problem::of(&Stop::Refused(refusal.clone()), turn) }
    }

    fn new(code: Code, detail: &str, turn_id: Option<TurnId>) -> Problem {
        Problem {
            kind: format!("{TYPE_BASE}{code}"),
            title: code.summary(),
            status: code.status(),
            detail: detail.to_owned(),
            code,
            retryable: code.retryable(),
            turn_id,
            retry_after_ms: None,
            error: ErrorObject::new(code, detail),
            policy: None,
        }
    }

    /// The body, as JSON.
    pub fn body(&self) -> Vec<u8> {
        to_vec(self)
    }
}

impl PolicyObject {
    /// What a stop before the first byte of an answer says of policy.
    pub(super) fn of_prompt(stop: &Stop) -> Option<PolicyObject> {
        match stop {
            Stop::Refused(refusal) => Some(PolicyObject::of(refusal, Stage::Input)),
            Stop::Failed(_) | Stop::Gone(_) => None,
        }
    }

    fn of(refusal: &Refusal, stage: Stage) -> PolicyObject {
        PolicyObject { stage, rule: refusal.rule.to_string(), categories: refusal.categories.clone() }
    }
}

/// What an upstream said went wrong: its words, kept for the log only as far as they are words.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the upstream answered{}{}{}{}", Shown(" status=", .status), Shown(" code=", .code), Shown(" type=", .kind), Shown(" reason=", .reason))]
pub struct Said {
    /// The HTTP status, where there was one.
    pub status: Option<u16>,
    /// Its code.
    pub code: Option<String>,
    /// Its `error.type`.
    pub kind: Option<String>,
    /// Why it rejected the gateway's verdict, where it did: a single word.
    pub reason: Option<String>,
}

struct Shown<'a, T>(&'static str, &'a Option<T>);
impl<T: std::fmt::Display> std::fmt::Display for Shown<'_, T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.1.as_ref().map_or(Ok(()), |value| write!(f, "{}{value}", self.0))
    }
}

// A code may be a number, and anything at all from a server that is not ours: whatever is no word is not read.
#[derive(Deserialize, Default)]
#[serde(default)]
struct Heard {
    code: serde_json::Value,
    detail: serde_json::Value,
    retry_after_ms: serde_json::Value,
    error: serde_json::Value,
    #[serde(rename = "type")]
    kind: serde_json::Value,
}

/// The fault that an upstream's error answer is; bodies that are not problems count by their status alone.
///
/// The upstream's own message is not passed on: it may quote the prompt. Codes that judge the *caller* (a bad credential,
/// a malformed request) mean us, not the client, and become [`Code::UpstreamRefused`]; those about the gateway's verdict
/// become [`Code::VerdictRejected`]. The code as it came is in the fault's source, as [`Said`].
pub fn parse(status: u16, body: &[u8]) -> Fault {
    let body = body.get(..MAX_BODY_BYTES.min(body.len())).unwrap_or_default();
    let heard: Heard = serde_json::from_slice(body).unwrap_or_default();
    fault(Some(status), heard)
}

/// The fault that an `error` object inside a stream is.
pub(super) fn parse_in_stream(data: &str) -> Fault {
    fault(None, serde_json::from_str(data).unwrap_or_default())
}

fn fault(status: Option<u16>, heard: Heard) -> Fault {
    let inner = |name: &str| heard.error.get(name).unwrap_or(&serde_json::Value::Null);
    let code = word(&heard.code).or_else(|| word(inner("code")));
    let kind = word(inner("type")).or_else(|| word(&heard.kind));
    let known = code.as_deref().and_then(Code::from_name);
    // Only where the contract says that the detail is a word of its own: elsewhere it may be a word of the prompt.
    let reason = known.filter(|code| as_upstream(*code) == Code::VerdictRejected).and_then(|_| word(&heard.detail));
    let status_word = code.as_deref().and_then(|code| code.parse().ok()).filter(|code| (100..600).contains(code));
    let code_here = match known {
        Some(code) => as_upstream(code),
        None => by_status(status.or(status_word)),
    };
    let fault = Fault::new(Who::Upstream, code_here).caused_by(Said { status, code, kind, reason });
    match heard.retry_after_ms.as_u64() {
        Some(pause) => fault.after(std::time::Duration::from_millis(pause)),
        None => fault,
    }
}

fn word(value: &serde_json::Value) -> Option<String> {
    match value {
        serde_json::Value::Number(number) => number.as_u64().map(|number| number.to_string()),
        serde_json::Value::String(text) => {
            let is_word =
                (1..=64).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.'));
            is_word.then(|| text.clone())
        }
        _ => None,
    }
}

fn by_status(status: Option<u16>) -> Code {
    match status {
        Some(408 | 504) => Code::UpstreamStalled,
        Some(429 | 503) => Code::Overloaded,
        Some(400..=499) => Code::UpstreamRefused,
        // A redirect or an empty answer is not in the protocol.
        Some(..=399) => Code::UpstreamProtocolError,
        Some(_) | None => Code::UpstreamReset,
    }
}

fn as_upstream(code: Code) -> Code {
    match code {
        Code::VerdictInvalid | Code::VerdictReplayed | Code::VersionConflict | Code::VerdictRejected => Code::VerdictRejected,
        Code::InvalidRequest
        | Code::MalformedJson
        | Code::ProtocolError
        | Code::Unauthenticated
        | Code::TokenExpired
        | Code::PermissionDenied
        | Code::OriginDenied
        | Code::NotFound
        | Code::MethodNotAllowed
        | Code::NotAcceptable
        | Code::IdempotencyMismatch
        | Code::AlreadyAnswered
        | Code::StaleFence
        | Code::PayloadTooLarge
        | Code::UnsupportedMediaType
        | Code::EncodingRefused
        | Code::ConfigInvalid
        | Code::HeaderTooLarge
        | Code::UpstreamRefused => Code::UpstreamRefused,
        Code::InternalError | Code::ClientClosed | Code::RequestTimeout => Code::UpstreamReset,
        Code::RateLimited | Code::QuotaExceeded => Code::Overloaded,
        Code::PolicyDenied
        | Code::Declined
        | Code::Unanswered
        | Code::SessionNotFound
        | Code::TurnConflict
        | Code::TrainingLocked
        | Code::Stopped
        | Code::UpstreamConnectFailed
        | Code::UpstreamReset
        | Code::UpstreamProtocolError
        | Code::UpstreamEventTooLarge
        | Code::Overloaded
        | Code::Draining
        | Code::ModerationUnavailable
        | Code::PolicyRegistryUnavailable
        | Code::EventLogUnavailable
        | Code::UpstreamTimeoutFirstByte
        | Code::UpstreamStalled
        | Code::StreamLimitExceeded
        | Code::SlowConsumer => code,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::{Value, json};

    use super::*;
    use crate::{Category, Gone};

    fn body(problem: &Problem) -> Value {
        serde_json::from_slice(&problem.body()).unwrap()
    }

    #[test]
    fn a_refused_prompt_reads_the_same_in_two_tongues() {
        let refusal = Refusal::new(Code::PolicyDenied, "moderation.deny").about([Category::TenantPolicy]);
        let turn: TurnId = "0193a5f0-7e1c-7000-8000-000000000000".parse().unwrap();
        let said = "the policy in force refuses this text";
        assert_eq!(
            body(&Problem::of(&refusal.into(), Some(turn))),
            json!({
                "type": "https://headgate.dev/errors/policy_denied", "title": said, "status": 403, "detail": said,
                "code": "policy_denied", "retryable": false, "turn_id": turn,
                "error": {"message": said, "type": "policy_error", "param": null, "code": "policy_denied"},
                "policy": {"stage": "input", "rule": "moderation.deny", "categories": ["tenant_policy"]},
            })
        );
    }

    #[test]
    fn every_code_has_its_problem() {
        for code in Code::ALL {
            let fault = Fault::us(*code).saying("so it is").caused_by("an inner secret").after(Duration::from_millis(1500));
            let body = body(&Problem::of_fault(&fault, None));
            assert_eq!(
                (&body["status"], &body["code"], &body["retryable"]),
                (&code.status().into(), &code.as_str().into(), &code.retryable().into())
            );
            assert_eq!(
                (&body["detail"], &body["retry_after_ms"], &body["error"]["message"]),
                (&"so it is".into(), &1500.into(), &"so it is".into())
            );
            assert!(!body.to_string().contains("secret"));
        }
        assert_eq!(body(&Problem::of(&Stop::Gone(Gone::Stopped), None))["code"], "stopped");
    }

    #[test]
    fn a_problem_of_the_orchestrator_is_read_again_as_what_it_means_here() {
        for code in Code::ALL {
            let problem = Problem::of_fault(&Fault::us(*code).saying("a secret sentence"), None);
            let fault = parse(code.status(), &problem.body());
            assert_eq!((fault.code, fault.who), (as_upstream(*code), Who::Upstream));
            // Whatever the upstream says of our credential, the client's is not in question.
            assert!(!matches!(fault.code.status(), 400 | 401 | 405..=408 | 413..=422 | 431), "{code} became {}", fault.code);
            assert!(fault.chain().contains(code.as_str()) && !fault.chain().contains("secret"), "{}", fault.chain());
        }
    }

    #[test]
    fn why_a_verdict_was_rejected_is_kept_for_the_log() {
        let problem = Problem::of_fault(&Fault::client(Code::VerdictInvalid).saying("expired"), None);
        let fault = parse(401, &problem.body());
        assert_eq!(fault.code, Code::VerdictRejected);
        assert!(fault.chain().ends_with("status=401 code=verdict_invalid type=authentication_error reason=expired"), "{}", fault.chain());
    }

    #[test]
    fn an_answer_that_is_no_problem_counts_by_its_status() {
        for (status, body, code) in [
            (500, &b"<html>secret</html>"[..], "upstream_reset"),
            (503, b"", "overloaded"),
            (429, br#"{"error":"secret"}"#, "overloaded"),
            (400, br#"{"error":{"message":"secret","code":null}}"#, "upstream_refused"),
            (404, br#"{"detail":"secret"}"#, "upstream_refused"),
            (504, b"\xff\xfe", "upstream_stalled"),
            (204, b"", "upstream_protocol_error"),
            (302, b"", "upstream_protocol_error"),
            (500, br#"[[[["#, "upstream_reset"),
            (422, br#"{"detail":[{"msg":"secret"}],"code":"my secret"}"#, "upstream_refused"),
        ] {
            let fault = parse(status, body);
            assert_eq!(fault.code.as_str(), code, "{status}");
            assert!(!fault.chain().contains("secret"), "{}", fault.chain());
        }
    }

    #[test]
    fn a_body_without_end_is_read_up_to_its_bound() {
        let mut body = br#"{"code":"draining","x":""#.to_vec();
        body.resize(10 << 20, b'x');
        assert_eq!(parse(503, &body).code, Code::Overloaded);
    }
}
