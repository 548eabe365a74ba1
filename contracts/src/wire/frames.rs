//! WebSocket frames: what clients send, and the events of an answer with three members before them.

use serde::Serialize;

use super::chat::TurnRequest;
use super::json;
use super::members::{Members, Others};
use crate::{Code, Fault, Secret, TurnId};

/// The subprotocol.
pub const SUBPROTOCOL: &str = "headgate.v1";
/// What a subprotocol that carries a token begins with.
pub const BEARER_PREFIX: &str = "bearer.";
/// The longest `ref`, in bytes.
pub const MAX_REF_BYTES: usize = 128;
/// The longest token, in bytes.
pub const MAX_TOKEN_BYTES: usize = 16 << 10;

/// A frame from a client.
#[derive(Debug, Clone)]
pub enum ClientFrame {
    /// Begins a turn.
    Turn {
        /// The turn.
        turn: TurnRequest,
        /// The client's own name for it, echoed on `open` and on an `error` that comes before it.
        reference: Option<String>,
    },
    /// Stops a turn.
    Stop {
        /// Which.
        turn_id: TurnId,
    },
    /// Comes back to a turn.
    Resume {
        /// Which.
        turn_id: TurnId,
        /// The last sequence number the client has; absent: none.
        after: Option<u64>,
    },
    /// Answers a question of the turn.
    Confirm {
        /// Which turn.
        turn_id: TurnId,
        /// Which question.
        id: String,
        /// The answer.
        accept: bool,
    },
    /// Lets more events come.
    Credit {
        /// Of which turn.
        turn_id: TurnId,
        /// How many more.
        events: u32,
    },
    /// Says who the client is.
    Auth {
        /// A bearer token.
        token: Secret,
    },
}

impl ClientFrame {
    /// Reads a text frame.
    ///
    /// Errors: a client's fault that names the member and what was expected, never what was found.
    pub fn parse(text: &str) -> Result<ClientFrame, Fault> {
        let mut members = Members::parse(text.as_bytes(), Others::Refused)?;
        let kind = members.text("type", 16)?;
        let frame = match members.need("type", kind)?.as_str() {
            "turn" => ClientFrame::Turn { reference: members.text("ref", MAX_REF_BYTES)?, turn: TurnRequest::take(&mut members)? },
            "stop" => ClientFrame::Stop { turn_id: turn_id(&mut members)? },
            "resume" => ClientFrame::Resume {
                turn_id: turn_id(&mut members)?,
                after: members.integer("after", 0..=i64::MAX)?.and_then(|after| u64::try_from(after).ok()),
            },
            "confirm" => ClientFrame::Confirm {
                turn_id: turn_id(&mut members)?,
                id: {
                    let id = members.text("id", MAX_REF_BYTES)?;
                    members.need("id", id)?
                },
                accept: {
                    let accept = members.flag("accept")?;
                    members.need("accept", accept)?
                },
            },
            "credit" => ClientFrame::Credit {
                turn_id: turn_id(&mut members)?,
                events: {
                    let events = members.integer("events", 1..=i64::from(u32::MAX))?;
                    members.need("events", events.and_then(|events| u32::try_from(events).ok()))?
                },
            },
            "auth" => {
                let token = members.text("token", MAX_TOKEN_BYTES)?;
                ClientFrame::Auth { token: Secret::new(&members.need("token", token)?) }
            }
            _ => {
                return Err(Fault::client(Code::InvalidRequest).saying("type: expected turn, stop, resume, confirm, credit or auth"));
            }
        };
        members.end()?;
        Ok(frame)
    }
}

fn turn_id(members: &mut Members) -> Result<TurnId, Fault> {
    let id = members.name("turn_id")?;
    members.need("turn_id", id)
}

/// Appends the frame of one event: `payload` is the event's object, as server-sent events carry it, and three members are
/// put before its own. `open` and `error` name the turn themselves, as their first member, and get the other two.
pub fn frame(out: &mut Vec<u8>, name: &str, turn: &TurnId, seq: u64, payload: &[u8]) {
    begin(out, name);
    if !payload.starts_with(b"{\"turn_id\":") {
        json::member(out, "turn_id");
        out.push(b'"');
        turn.write(out);
        out.push(b'"');
    }
    json::member(out, "seq");
    json::number(out, seq);
    splice(out, payload);
}

/// Appends a frame that echoes the client's own name for a turn: `open`, or an `error` that comes before any.
pub fn frame_with_ref(out: &mut Vec<u8>, name: &str, reference: Option<&str>, seq: Option<u64>, payload: &[u8]) {
    begin(out, name);
    if let Some(reference) = reference {
        json::member(out, "ref");
        json::string(out, reference);
    }
    if let Some(seq) = seq {
        json::member(out, "seq");
        json::number(out, seq);
    }
    splice(out, payload);
}

fn begin(out: &mut Vec<u8>, name: &str) {
    out.extend_from_slice(b"{\"type\":");
    json::string(out, name);
}

/// Appends the members of an object, and its end.
fn splice(out: &mut Vec<u8>, payload: &[u8]) {
    let members = payload.trim_ascii_start().strip_prefix(b"{").unwrap_or(b"}").trim_ascii_start();
    if !members.starts_with(b"}") {
        out.push(b',');
    }
    out.extend_from_slice(members);
}

/// The schema of the frames clients send; [`ClientFrame::parse`] is what reads them.
#[derive(Serialize, schemars::JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
#[schemars(rename = "ClientFrame")]
#[allow(dead_code, reason = "the schema is all it is for")]
pub(crate) enum ClientFrameShape {
    /// Begins a turn.
    Turn {
        /// The client's own name for it, echoed on `open` and on an `error` that comes before it.
        #[schemars(length(max = 128))]
        #[serde(rename = "ref", skip_serializing_if = "Option::is_none")]
        reference: Option<String>,
        /// The turn.
        #[serde(flatten)]
        turn: TurnRequest,
    },
    /// Stops a turn.
    Stop {
        /// Which.
        turn_id: TurnId,
    },
    /// Comes back to a turn.
    Resume {
        /// Which.
        turn_id: TurnId,
        /// The last sequence number the client has; absent: none.
        #[serde(skip_serializing_if = "Option::is_none")]
        after: Option<u64>,
    },
    /// Answers a question of the turn.
    Confirm {
        /// Which turn.
        turn_id: TurnId,
        /// Which question.
        id: String,
        /// The answer.
        accept: bool,
    },
    /// Lets more events come.
    Credit {
        /// Of which turn.
        turn_id: TurnId,
        /// How many more.
        events: u32,
    },
    /// Says who the client is.
    Auth {
        /// A bearer token.
        token: String,
    },
}
