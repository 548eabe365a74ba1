//! Every way a request, frame or turn can be refused or fail, once: the table that status codes, close codes, events, docs and tests come from.

use serde::{Deserialize, Serialize};

/// Whether trying again can help.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retry {
    /// The same request will fail the same way.
    No,
    /// It may work at once.
    Now,
    /// It may work after a pause, named in `Retry-After` where known.
    Later,
}

/// The `error.type` OpenAI's SDKs read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are the words on the wire")]
pub enum ErrorType {
    InvalidRequest,
    Authentication,
    Permission,
    Policy,
    NotFound,
    Timeout,
    Conflict,
    RateLimit,
    Server,
    Upstream,
    Overloaded,
    Unavailable,
    Limit,
}

impl ErrorType {
    /// The word on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            ErrorType::InvalidRequest => "invalid_request_error",
            ErrorType::Authentication => "authentication_error",
            ErrorType::Permission => "permission_error",
            ErrorType::Policy => "policy_error",
            ErrorType::NotFound => "not_found_error",
            ErrorType::Timeout => "timeout_error",
            ErrorType::Conflict => "conflict_error",
            ErrorType::RateLimit => "rate_limit_error",
            ErrorType::Server => "server_error",
            ErrorType::Upstream => "upstream_error",
            ErrorType::Overloaded => "overloaded_error",
            ErrorType::Unavailable => "unavailable_error",
            ErrorType::Limit => "limit_error",
        }
    }
}

macro_rules! codes {
    ($($variant:ident $name:literal $status:literal $close:expr, $retry:ident $kind:ident $summary:literal;)*) => {
        /// The stable name of a refusal or a fault. Codes never change meaning; new ones may appear, and a client that
        /// does not know one goes by `retryable`.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, schemars::JsonSchema)]
        pub enum Code {
            $(#[doc = $summary] #[serde(rename = $name)] $variant,)*
        }

        impl Code {
            /// Every code, in the order of the documentation.
            pub const ALL: &'static [Code] = &[$(Code::$variant),*];

            /// The word on the wire, in logs and in metrics.
            pub fn as_str(self) -> &'static str {
                match self { $(Code::$variant => $name),* }
            }
            /// The HTTP status while no byte of the answer has been sent.
            pub fn status(self) -> u16 {
                match self { $(Code::$variant => $status),* }
            }
            /// The WebSocket close code, where this closes the socket; `None`: an `error` frame alone.
            pub fn close(self) -> Option<u16> {
                match self { $(Code::$variant => $close),* }
            }
            /// Whether trying again can help.
            pub fn retry(self) -> Retry {
                match self { $(Code::$variant => Retry::$retry),* }
            }
            /// The `error.type` OpenAI's SDKs read.
            pub fn error_type(self) -> ErrorType {
                match self { $(Code::$variant => ErrorType::$kind),* }
            }
            /// One sentence for people.
            pub fn summary(self) -> &'static str {
                match self { $(Code::$variant => $summary),* }
            }
        }
    };
}

codes! {
    InvalidRequest "invalid_request" 400 None, No InvalidRequest "the request does not have the expected shape";
    MalformedJson "malformed_json" 400 None, No InvalidRequest "the body or frame is not JSON";
    ProtocolError "protocol_error" 400 Some(1002), No InvalidRequest "the client broke the rules of HTTP, WebSocket or the session";
    Unauthenticated "unauthenticated" 401 Some(3000), No Authentication "no valid credential came with the request";
    TokenExpired "token_expired" 401 Some(3000), No Authentication "the credential has expired; a new one will do";
    PermissionDenied "permission_denied" 403 Some(3003), No Permission "the credential does not allow this";
    OriginDenied "origin_denied" 403 None, No Permission "this page's origin is not on the route's list";
    PolicyDenied "policy_denied" 403 None, No Policy "the policy in force refuses this text";
    Declined "declined" 403 None, No Permission "the person who was asked did not agree, so the tool is not called";
    Unanswered "unanswered" 403 None, No Timeout "the person who was asked did not answer in time, so the tool is not called";
    SessionNotFound "session_not_found" 404 Some(4404), No NotFound "there is no such session or turn";
    NotFound "not_found" 404 None, No NotFound "there is no such resource";
    MethodNotAllowed "method_not_allowed" 405 None, No InvalidRequest "this path does not take this method";
    NotAcceptable "not_acceptable" 406 None, No InvalidRequest "the client accepts none of the forms on offer";
    RequestTimeout "request_timeout" 408 Some(3008), Now Timeout "the request arrived too slowly";
    TurnConflict "turn_conflict" 409 None, No Conflict "the session already has an open turn";
    AlreadyAnswered "already_answered" 409 None, No Conflict "the question has been answered before";
    IdempotencyMismatch "idempotency_mismatch" 409 None, No Conflict "this idempotency key was used for another request";
    VersionConflict "version_conflict" 409 None, No Conflict "the policy version or constitution hash is not in force";
    StaleFence "stale_fence" 409 Some(4409), No Conflict "a newer holder of the training lock exists";
    PayloadTooLarge "payload_too_large" 413 Some(1009), No InvalidRequest "the body, message or frame is over the limit";
    UnsupportedMediaType "unsupported_media_type" 415 Some(1003), No InvalidRequest "the content type is not taken here";
    EncodingRefused "encoding_refused" 415 None, No InvalidRequest "compressed bodies are not taken here";
    ConfigInvalid "config_invalid" 422 None, No InvalidRequest "the configuration has faults; the running one stays";
    TrainingLocked "training_locked" 423 Some(4423), Later Conflict "another owner holds the training lock";
    RateLimited "rate_limited" 429 Some(4429), Later RateLimit "too many requests for now";
    QuotaExceeded "quota_exceeded" 429 Some(4429), Later RateLimit "the quota is used up until it resets";
    HeaderTooLarge "header_too_large" 431 None, No InvalidRequest "the request's header block is over the limit";
    ClientClosed "client_closed" 499 None, Now Server "the client left before the end; seen in logs only";
    Stopped "stopped" 499 None, No Server "the turn was stopped on purpose";
    InternalError "internal_error" 500 Some(1011), Now Server "something broke on our side; nothing was lost but this turn";
    UpstreamConnectFailed "upstream_connect_failed" 502 Some(1014), Now Upstream "no endpoint of the upstream takes connections";
    UpstreamReset "upstream_reset" 502 Some(1014), Now Upstream "the upstream's stream was cut before its end";
    UpstreamProtocolError "upstream_protocol_error" 502 Some(1014), Now Upstream "the upstream's answer does not follow its protocol";
    UpstreamEventTooLarge "upstream_event_too_large" 502 Some(1014), Now Upstream "one event of the upstream is over the limit";
    UpstreamRefused "upstream_refused" 502 Some(1014), No Upstream "the upstream refused the request";
    VerdictRejected "verdict_rejected" 502 Some(1014), Now Upstream "the orchestrator did not accept the gateway's verdict";
    VerdictInvalid "verdict_invalid" 401 None, No Authentication "the policy verdict is missing, malformed or not for this dispatch";
    VerdictReplayed "verdict_replayed" 401 None, No Authentication "the policy verdict has been used before";
    Overloaded "overloaded" 503 Some(1013), Later Overloaded "there is no room for more work now";
    Draining "draining" 503 Some(1012), Now Overloaded "this instance is shutting down; another one will answer";
    ModerationUnavailable "moderation_unavailable" 503 Some(1013), Later Unavailable "moderation cannot be done now, so nothing passes";
    PolicyRegistryUnavailable "policy_registry_unavailable" 503 Some(1013), Later Unavailable "the policy registry cannot be reached";
    EventLogUnavailable "event_log_unavailable" 503 Some(1013), Later Unavailable "the event log cannot take new turns";
    UpstreamTimeoutFirstByte "upstream_timeout_first_byte" 504 Some(1014), Now Timeout "the upstream did not begin its answer in time";
    UpstreamStalled "upstream_stalled" 504 Some(1014), Now Timeout "the upstream fell silent within its answer";
    StreamLimitExceeded "stream_limit_exceeded" 200 Some(4413), No Limit "the stream reached its limit of time, bytes or tokens";
    SlowConsumer "slow_consumer" 200 Some(4408), Now Limit "the client took nothing for too long";
}

impl std::fmt::Display for Code {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Code {
    /// Whether a client may try again at all: the `retryable` member on the wire.
    pub fn retryable(self) -> bool {
        self.retry() != Retry::No
    }

    /// The code of that name.
    pub fn from_name(name: &str) -> Option<Code> {
        Code::ALL.iter().copied().find(|code| code.as_str() == name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn names_are_distinct_and_found_again() {
        let names: BTreeSet<_> = Code::ALL.iter().map(|code| code.as_str()).collect();
        assert_eq!(names.len(), Code::ALL.len());
        for code in Code::ALL {
            assert_eq!(Code::from_name(code.as_str()), Some(*code));
            assert_eq!(serde_json::to_value(code).unwrap(), code.as_str());
        }
    }

    #[test]
    fn close_codes_may_be_sent_by_an_endpoint() {
        // RFC 6455 section 7.4: 1004, 1005, 1006 and 1015 never travel in a frame; 3000-4999 are free to use.
        for close in Code::ALL.iter().filter_map(|code| code.close()) {
            assert!(matches!(close, 1000..=1003 | 1007..=1014 | 3000..=4999), "{close}");
        }
    }

    #[test]
    fn a_rate_limit_says_when_to_come_back_and_a_refusal_says_never() {
        assert_eq!(Code::RateLimited.retry(), Retry::Later);
        assert!(!Code::PolicyDenied.retryable());
    }
}
