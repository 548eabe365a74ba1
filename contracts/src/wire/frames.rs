//! WebSocket frames: what clients send, and the events of an answer with three members before them.

use serde::Serialize;

use super::chat::{Confirmation, TurnRequest};
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
    Stop(Which),
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
        /// Which question, and the answer to it.
        said: Confirmation,
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

/// How a client names one of its turns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Which {
    /// By the turn's id.
    Turn(TurnId),
    /// By the client's own name: before its `open` a turn of this socket has no other that the client knows.
    Ref(String),
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
            "stop" => ClientFrame::Stop(which(&mut members)?),
            "resume" => ClientFrame::Resume {
                turn_id: turn_id(&mut members)?,
                after: members.integer("after", 0..=i64::MAX)?.and_then(|after| u64::try_from(after).ok()),
            },
            "confirm" => ClientFrame::Confirm { turn_id: turn_id(&mut members)?, said: Confirmation::take(&mut members)? },
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

fn which(members: &mut Members) -> Result<Which, Fault> {
    match (members.name("turn_id")?, members.text("ref", MAX_REF_BYTES)?) {
        (Some(_), Some(_)) => Err(Fault::client(Code::InvalidRequest).saying("ref: expected either a turn_id or a ref")),
        (None, Some(reference)) => Ok(Which::Ref(reference)),
        (id, None) => members.need("turn_id", id).map(Which::Turn),
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
pub(super) fn splice(out: &mut Vec<u8>, payload: &[u8]) {
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
    /// Stops a turn, named by its id or, on the socket that began it, by the client's own name: one of the two.
    Stop {
        /// Which.
        #[serde(skip_serializing_if = "Option::is_none")]
        turn_id: Option<TurnId>,
        /// Which, by the name its `turn` frame gave it: for a turn that has not been opened yet.
        #[schemars(length(max = 128))]
        #[serde(rename = "ref", skip_serializing_if = "Option::is_none")]
        reference: Option<String>,
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::chat::{ErrorEvent, Open};
    use crate::{Gone, Stop};

    const TURN: &str = "0193a5f0-7e1c-7000-8000-000000000000";

    fn turn() -> TurnId {
        TURN.parse().unwrap()
    }

    #[test]
    fn a_frame_is_the_events_object_with_three_members_before_it() {
        let mut out = Vec::new();
        frame(&mut out, "text", &turn(), 3, br#"{"text":"Hello"}"#);
        assert_eq!(String::from_utf8(out).unwrap(), format!(r#"{{"type":"text","turn_id":"{TURN}","seq":3,"text":"Hello"}}"#));
        let mut out = Vec::new();
        frame(&mut out, "note", &turn(), u64::MAX, b"{}");
        assert_eq!(String::from_utf8(out).unwrap(), format!(r#"{{"type":"note","turn_id":"{TURN}","seq":18446744073709551615}}"#));
        let mut out = Vec::new();
        frame(&mut out, "text", &turn(), 3, b" { \"text\":\"\" }");
        assert!(serde_json::from_slice::<serde_json::Value>(&out).is_ok());
    }

    #[test]
    fn an_object_that_names_the_turn_itself_does_not_name_it_twice() {
        let open = Open { turn_id: Some(turn()), session_id: None, model: "demo".into(), policy_version: None, constitution_hash: None };
        let error = ErrorEvent::of(&Stop::Gone(Gone::Stopped), Some(turn()), Some(4));
        for write in [&|out: &mut Vec<u8>| open.write(out) as (), &|out: &mut Vec<u8>| error.write(out)] as [&dyn Fn(&mut Vec<u8>); 2] {
            let (mut payload, mut out) = (Vec::new(), Vec::new());
            write(&mut payload);
            frame(&mut out, "open", &turn(), 0, &payload);
            let text = String::from_utf8(out).unwrap();
            assert_eq!(text.matches("\"turn_id\"").count(), 1, "{text}");
            assert_eq!(serde_json::from_str::<serde_json::Value>(&text).unwrap()["turn_id"], TURN);
        }
    }

    #[test]
    fn the_clients_own_name_is_echoed_as_text_and_nothing_else() {
        let mut out = Vec::new();
        frame_with_ref(&mut out, "error", Some("\",\"type\":\"done"), None, br#"{"code":"overloaded"}"#);
        let value: serde_json::Value = serde_json::from_slice(&out).unwrap();
        assert_eq!((&value["type"], &value["ref"], &value["code"]), (&"error".into(), &"\",\"type\":\"done".into(), &"overloaded".into()));
    }

    #[test]
    fn frames_of_clients_are_read() {
        let parse = |text: &str| ClientFrame::parse(text).unwrap();
        let turn = parse(r#"{"type":"turn","ref":"r1","session_id":"s","messages":[{"role":"user","content":"hi"}]}"#);
        let ClientFrame::Turn { turn, reference } = turn else { panic!("a turn") };
        assert_eq!((turn.messages.len(), reference.as_deref()), (1, Some("r1")));
        assert!(
            matches!(parse(&format!(r#"{{"turn_id":"{TURN}","type":"stop"}}"#)), ClientFrame::Stop(Which::Turn(id)) if id.to_string() == TURN)
        );
        assert!(matches!(parse(r#"{"type":"stop","ref":"r1"}"#), ClientFrame::Stop(Which::Ref(name)) if name == "r1"));
        assert!(matches!(
            parse(&format!(r#"{{"type":"resume","turn_id":"{TURN}","after":4}}"#)),
            ClientFrame::Resume { after: Some(4), .. }
        ));
        assert!(matches!(parse(&format!(r#"{{"type":"credit","turn_id":"{TURN}","events":10}}"#)), ClientFrame::Credit { events: 10, .. }));
        let confirm = parse(&format!(r#"{{"type":"confirm","turn_id":"{TURN}","id":"q","accept":true}}"#));
        assert!(matches!(confirm, ClientFrame::Confirm { said: Confirmation { accept: true, .. }, .. }));
        let auth = parse(r#"{"type":"auth","token":"hunter2"}"#);
        assert!(!format!("{auth:?}").contains("hunter2"));
        let ClientFrame::Auth { token } = auth else { panic!("auth") };
        assert_eq!(token.expose(), "hunter2");
    }

    #[test]
    fn a_fault_in_a_frame_names_its_member_and_never_quotes_it() {
        for (text, says) in [
            ("{}".to_owned(), "type: missing"),
            (r#"{"type":"secret"}"#.into(), "type: expected turn, stop"),
            (r#"{"type":"stop"}"#.into(), "turn_id: missing"),
            (r#"{"type":"stop","turn_id":"secret"}"#.into(), "turn_id: not a turn id"),
            (format!(r#"{{"type":"stop","turn_id":"{TURN}","ref":"secret"}}"#), "ref: expected either a turn_id or a ref"),
            (format!(r#"{{"type":"stop","turn_id":"{TURN}","secret token":1}}"#), "the body: unknown member"),
            (format!(r#"{{"type":"credit","turn_id":"{TURN}","events":0}}"#), "events: expected a whole number"),
            (format!(r#"{{"type":"resume","turn_id":"{TURN}","after":-1}}"#), "after: expected a whole number"),
            (r#"{"type":"auth"}"#.into(), "token: missing"),
            (r#"{"type":"turn","messages":[]}"#.into(), "messages: expected at least one message"),
        ] {
            let fault = ClientFrame::parse(&text).unwrap_err();
            assert!(fault.message.contains(says), "{text}: {}", fault.message);
            assert!(!fault.chain().contains("secret"), "{}", fault.chain());
        }
        assert_eq!(ClientFrame::parse("secret").unwrap_err().code, Code::MalformedJson);
    }
}
