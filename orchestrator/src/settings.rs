//! What an orchestrator is told: whom to believe, how much to take, how long to wait.

use std::{collections::BTreeSet, time::Duration};

use crate::{history::Bounds, socket::Patience};

/// Everything an orchestrator is told, beside its models, keys and registry.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// Whose verdicts count: the `iss` that gateways sign with.
    pub issuer: String,
    /// How much is taken.
    pub limits: Limits,
    /// How long a caller may take over what.
    pub patience: Patience,
    /// How much is remembered of sessions.
    pub history: Bounds,
    /// How long open turns may go on once we shut down.
    pub drain: Duration,
    /// How long after a turn's end its gateway may take to say what the user got, before that is unknown.
    pub delivery: Duration,
    /// Which calls a person has to agree to; `None`: none.
    pub confirm: Option<Confirm>,
}

/// Which calls a person has to agree to before they are passed on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Confirm {
    /// Calls of these tools, by name.
    pub tools: BTreeSet<String>,
    /// How long the person may take.
    pub within: Duration,
}

impl Default for Settings {
    /// The issuer `headgate`, the defaults of every part, a minute to drain, and a minute for a gateway's word.
    fn default() -> Settings {
        Settings {
            issuer: "headgate".to_owned(),
            limits: Limits::default(),
            patience: Patience::default(),
            history: Bounds::default(),
            drain: Duration::from_secs(60),
            delivery: Duration::from_secs(60),
            confirm: None,
        }
    }
}

/// How much is taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Connections at once; further ones wait in the system's queue.
    pub connections: usize,
    /// Turns open at once, over all connections.
    pub turns: usize,
    /// Turns open at once on one WebSocket.
    pub socket_turns: usize,
    /// How long a busy session is waited for before its next turn is refused: just enough for a turn that was stopped to end.
    pub session_grace: Duration,
    /// The largest body of a request, and payload of a WebSocket turn, in bytes.
    pub body: usize,
    /// The largest header block, in bytes, and at least 8 KiB.
    pub head: usize,
    /// The most header fields.
    pub fields: usize,
    /// The longest a turn may take in all.
    pub turn: Duration,
    /// The most text in one answer, in bytes.
    pub text: usize,
    /// Used verdicts that are remembered: enough for their life at the highest rate of turns.
    pub replays: usize,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            connections: 8192,
            turns: 4096,
            socket_turns: headgate_contracts::wire::hop::MAX_TURNS,
            session_grace: Duration::from_millis(250),
            body: 1 << 20,
            head: 16 << 10,
            fields: 100,
            turn: Duration::from_secs(600),
            text: 4 << 20,
            replays: 1 << 18,
        }
    }
}
