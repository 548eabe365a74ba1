//! The codecs: bytes in, events out, and back. No I/O; any chunking gives the same events.
//!
//! | module | speaks |
//! |---|---|
//! | [`sse`] | server-sent events: bytes to frames and back |
//! | [`openai`] | OpenAI chat completions: requests, chunks, answers, on both sides |
//! | [`chat`] | our own chat stream: a turn, and the events of its answer |
//! | [`frames`] | the same events as WebSocket frames, and the frames clients send |
//! | [`conversation`] | what the gateway asks the orchestrator |
//! | [`hop`] | the same over one WebSocket for many turns |
//! | [`problem`] | a refusal or fault as an HTTP body |
//! | [`log`] | what became of a turn |
//! | [`training`] | what admins are told of training mode, and what the audit says |
//!
//! Two rules hold in all of them. A decoder never quotes what it read: its faults name members and places, because message
//! text must not reach a log. And a payload keeps its raw form only while every member of it is known: text could hide in
//! the others.

pub mod chat;
pub mod conversation;
pub mod frames;
pub mod hop;
pub mod log;
pub mod openai;
pub mod problem;
pub mod sse;
pub mod training;

mod json;
mod members;
mod walk;

use crate::{Code, Fault};

/// What a decoded payload means for the stream it came in.
#[derive(Debug, Clone)]
pub enum Step {
    /// There is more to come.
    More,
    /// A person is asked: until there is an answer, silence is theirs and not the peer's.
    Asked,
    /// The answer is complete; why it finished and what it used are events of the batch.
    Done,
    /// The peer says that the answer failed.
    Failed(Fault),
}

/// A payload that does not follow its protocol: where and what was expected, never what was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("malformed payload of {bytes} bytes: {what}, at byte {at}")]
pub struct Malformed {
    what: &'static str,
    at: usize,
    bytes: usize,
}

impl Malformed {
    fn new(what: &'static str, data: &str) -> Malformed {
        Malformed { what, at: 0, bytes: data.len() }
    }

    // serde_json's own words quote the offending value, so only its place is kept.
    fn from_json(error: &serde_json::Error, data: &str) -> Malformed {
        let what = match error.classify() {
            serde_json::error::Category::Data => "a member has a type or value it cannot have",
            serde_json::error::Category::Eof => "the JSON breaks off",
            serde_json::error::Category::Syntax | serde_json::error::Category::Io => "not JSON",
        };
        let line_start: usize = data.split_inclusive('\n').take(error.line().saturating_sub(1)).map(str::len).sum();
        Malformed { what, at: line_start + error.column().saturating_sub(1), bytes: data.len() }
    }
}

impl From<Malformed> for Fault {
    fn from(malformed: Malformed) -> Fault {
        Fault::upstream(Code::UpstreamProtocolError).caused_by(malformed)
    }
}

/// The highest choice and tool call index that is believed: what is kept per lane is bounded by it.
/// OpenAI takes `n` up to 128 and lists up to 128 tools.
pub const MAX_INDEX: u16 = 127;
