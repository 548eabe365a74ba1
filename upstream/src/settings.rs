//! What an upstream is told: who to ask, in which protocol, how long to wait and how much to take.

use std::{path::PathBuf, time::Duration};

use headgate_contracts::Secret;
use http::Uri;

/// Which vocabulary the endpoints of an upstream speak.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Protocol {
    /// OpenAI chat completions: vLLM, llama.cpp, Ollama, OpenAI itself.
    #[default]
    OpenAi,
    /// Headgate's own `POST /v1/conversation/stream`, with a cancel call.
    Orchestrator,
}

/// How turns travel to an orchestrator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Hop {
    /// Each is a request of its own, answered by server-sent events on a connection of its own.
    #[default]
    Events,
    /// As frames, many of them on one WebSocket. For [`Protocol::Orchestrator`] alone.
    WebSocket,
}

/// How long to wait for what. A deadline that passes ends the turn and closes the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    /// Name lookup, TCP and TLS together, for one attempt.
    pub connect: Duration,
    /// From the call of `open` until the first event of the answer. It does not begin again with a retry.
    pub first_byte: Duration,
    /// Between two reads of an answer that has begun.
    pub idle: Duration,
    /// The whole answer, from the call of `open`.
    pub total: Duration,
}

impl Default for Timeouts {
    fn default() -> Timeouts {
        Timeouts {
            connect: Duration::from_secs(1),
            first_byte: Duration::from_secs(30),
            idle: Duration::from_secs(30),
            total: Duration::from_secs(600),
        }
    }
}

/// How often a turn may be tried on another endpoint before its first byte.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Retry {
    /// Tries after the first, for one turn.
    pub attempts: u32,
    /// Tries after the first, as a share of all turns of the last ten seconds, from 0 to 1: what keeps a sick upstream from being
    /// asked twice by everybody.
    pub share: f32,
    /// Retries per second that are allowed whatever the share says, so that an upstream with few turns may retry at all.
    pub floor: u32,
}

impl Default for Retry {
    /// One, within 10 % of the turns or one a second.
    fn default() -> Retry {
        Retry { attempts: 1, share: 0.1, floor: 1 }
    }
}

/// How much is taken from an upstream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// The longest line of an event stream, in bytes.
    pub line: usize,
    /// The largest event, in bytes.
    pub event: usize,
    /// The largest response head, in bytes.
    pub head: usize,
    /// The most fields in a response head.
    pub fields: usize,
    /// The largest answer that comes whole instead of as a stream, in bytes.
    pub whole: usize,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { line: 128 << 10, event: 128 << 10, head: 16 << 10, fields: 100, whole: 1 << 20 }
    }
}

/// Which endpoint gets the next turn, among those in good health.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Balance {
    /// The less busy of two chosen by chance.
    #[default]
    LeastBusy,
    /// Each in turn.
    RoundRobin,
    /// The same one for the same session, so that the model's prefix cache is warm; moves as little as possible when the list
    /// of endpoints changes.
    Session,
}

/// How endpoints are checked while nobody asks them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Health {
    /// Time between two rounds of connection checks; `None` switches them off. Upstreams of one endpoint are checked too: the
    /// result is shown by `/readyz`, and they are asked all the same.
    pub interval: Option<Duration>,
    /// Failed checks in a row after which an endpoint is passed over.
    pub failures: usize,
    /// Good checks in a row after which it is asked again.
    pub successes: usize,
}

impl Default for Health {
    fn default() -> Health {
        Health { interval: Some(Duration::from_secs(5)), failures: 2, successes: 1 }
    }
}

/// Connections kept between turns, per endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Idle {
    /// The most that are kept; 0 opens a new one for every turn.
    pub max: usize,
    /// How long one is kept. It should be shorter than the endpoint's own patience.
    pub timeout: Duration,
}

impl Default for Idle {
    fn default() -> Idle {
        Idle { max: 32, timeout: Duration::from_secs(30) }
    }
}

/// Whom to trust when an endpoint is `https`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tls {
    /// A file of PEM certificates to trust instead of the system's.
    pub ca: Option<PathBuf>,
}

/// Everything an upstream is told.
#[derive(Debug, Clone, Default)]
pub struct Settings {
    /// Which vocabulary its endpoints speak.
    pub protocol: Protocol,
    /// How turns travel there.
    pub hop: Hop,
    /// Where they are: `http` or `https`, a host, a port where it is not the scheme's, and a path that stands before the
    /// protocol's own (`https://api.example.com/v1` and `https://api.example.com` mean the same for OpenAI's).
    pub endpoints: Vec<Uri>,
    /// How long to wait.
    pub timeouts: Timeouts,
    /// How often to try again.
    pub retry: Retry,
    /// How much to take.
    pub limits: Limits,
    /// The `Authorization` header; a secret without a space is a bearer token.
    pub authorization: Option<Secret>,
    /// The model to ask for, whatever the prompt says.
    pub model: Option<String>,
    /// Whom to trust.
    pub tls: Tls,
    /// Which endpoint gets the next turn.
    pub balance: Balance,
    /// How endpoints are checked.
    pub health: Health,
    /// Which connections are kept.
    pub idle: Idle,
    /// The path to ask, instead of the endpoint's path and the protocol's.
    pub path: Option<String>,
}

/// Why settings cannot be an upstream.
#[derive(Debug, thiserror::Error)]
pub enum Invalid {
    /// No endpoint is named.
    #[error("no endpoint is named")]
    NoEndpoint,
    /// An endpoint is not one.
    #[error("endpoint `{uri}`: {expected}")]
    Endpoint {
        /// As written.
        uri: String,
        /// What it should have been.
        expected: &'static str,
    },
    /// A setting is out of range.
    #[error("{name}: {expected}")]
    Setting {
        /// Which.
        name: &'static str,
        /// What it should have been.
        expected: &'static str,
    },
    /// The certificates to trust cannot be read.
    #[error("cannot read certificates {}", path.display())]
    Ca {
        /// The file.
        path: PathBuf,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The system has no certificates to trust.
    #[error("the system has no trusted certificates; name a file of them as `tls.ca`")]
    NoRoots,
}
