//! One prompt and its streamed answer: its ids, how it flows, and the record that outlives it.

use std::{fmt, sync::Arc, time::Duration};

use http::HeaderMap;
use serde::{Deserialize, Serialize};

use crate::{Finding, Finish, SessionId, TurnId, Usage};

/// Where a turn stands in a distributed trace: W3C Trace Context, version 00.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trace {
    /// The trace, 16 bytes, never all zero.
    pub trace_id: [u8; 16],
    /// Our own span in it, 8 bytes, never all zero.
    pub span_id: [u8; 8],
    /// The span that called us, if any.
    pub parent_id: Option<[u8; 8]>,
    /// Whether the trace is recorded.
    pub sampled: bool,
    /// Other systems' positions, passed on as they came; at most 512 bytes.
    pub state: Option<Box<str>>,
}

/// The longest `tracestate` that is passed on, in bytes (W3C Trace Context section 3.3.1.5 asks for at least 512).
pub const MAX_TRACESTATE_BYTES: usize = 512;

impl Trace {
    /// A trace that begins here.
    pub fn fresh() -> Trace {
        let (trace, span) = (uuid::Uuid::new_v4().into_bytes(), uuid::Uuid::new_v4().into_bytes());
        let mut span_id = [0; 8];
        span_id.copy_from_slice(&span[..8]);
        Trace { trace_id: trace, span_id, parent_id: None, sampled: true, state: None }
    }

    /// The next span of the trace that `headers` carry; a fresh trace where they carry none, or not exactly one that is valid.
    pub fn from_headers(headers: &HeaderMap) -> Trace {
        let mut all = headers.get_all("traceparent").iter();
        let (first, second) = (all.next(), all.next());
        let Some((trace_id, parent_id, sampled)) =
            first.filter(|_| second.is_none()).and_then(|value| value.to_str().ok()).and_then(parse_traceparent)
        else {
            return Trace::fresh();
        };
        let mut state = String::new();
        for value in headers.get_all("tracestate") {
            let Ok(part) = value.to_str() else { continue };
            if !state.is_empty() {
                state.push(',');
            }
            state.push_str(part);
        }
        let state = (!state.is_empty() && state.len() <= MAX_TRACESTATE_BYTES).then(|| state.into());
        Trace { trace_id, parent_id: Some(parent_id), sampled, state, ..Trace::fresh() }
    }

    /// The next span below this one.
    pub fn child(&self) -> Trace {
        Trace { trace_id: self.trace_id, parent_id: Some(self.span_id), sampled: self.sampled, state: self.state.clone(), ..Trace::fresh() }
    }

    /// The `traceparent` header that names our span as the parent.
    pub fn traceparent(&self) -> String {
        let (mut trace, mut span) = ([0; 32], [0; 16]);
        let flags = if self.sampled { "-01" } else { "-00" };
        ["00-", hex(&self.trace_id, &mut trace), "-", hex(&self.span_id, &mut span), flags].concat()
    }

    /// The trace's id in hexadecimal, for logs.
    pub fn trace_id_hex(&self) -> String {
        Trace::hex(self.trace_id, &mut [0; 32]).to_owned()
    }

    /// A trace's id in hexadecimal, in `text`: of who keeps no more of the trace than that.
    pub fn hex(trace_id: [u8; 16], text: &mut [u8; 32]) -> &str {
        hex(&trace_id, text)
    }

    /// Our span's id in hexadecimal, for logs.
    pub fn span_id_hex(&self) -> String {
        hex(&self.span_id, &mut [0; 16]).to_owned()
    }

    /// The calling span's id in hexadecimal, for logs.
    pub fn parent_id_hex(&self) -> Option<String> {
        self.parent_id.as_ref().map(|id| hex(id, &mut [0; 16]).to_owned())
    }
}

/// Writes `bytes` in hexadecimal into `text`, which has room for them and for nothing else.
fn hex<'t>(bytes: &[u8], text: &'t mut [u8]) -> &'t str {
    for (two, byte) in text.chunks_exact_mut(2).zip(bytes) {
        two.copy_from_slice(&[byte >> 4, byte & 15].map(|half| b"0123456789abcdef"[usize::from(half)]));
    }
    std::str::from_utf8(text).unwrap_or_default()
}

fn parse_traceparent(text: &str) -> Option<([u8; 16], [u8; 8], bool)> {
    let mut parts = text.split('-');
    let (version, trace, span, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    // Later versions may append fields; version 00 may not, and ff is forbidden (section 3.2.2).
    let [version] = unhex::<1>(version)?;
    if version == 0xff || (version == 0 && parts.next().is_some()) {
        return None;
    }
    let (trace, span, [flags]) = (unhex::<16>(trace)?, unhex::<8>(span)?, unhex::<1>(flags)?);
    (trace != [0; 16] && span != [0; 8]).then_some((trace, span, flags & 1 == 1))
}

fn unhex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digit = |byte: u8| match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    };
    let bytes = text.as_bytes();
    if bytes.len() != 2 * N {
        return None;
    }
    let mut out = [0; N];
    for (byte, pair) in out.iter_mut().zip(bytes.chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(out)
}

/// What a client's leaving means for its turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnDisconnect {
    /// The turn is cancelled at once.
    Cancel,
    /// The turn goes on for this long, waiting for the client to come back.
    Grace(Duration),
    /// The turn goes on to its end, at most this long; its answer can be fetched afterwards.
    Drain(Duration),
}

/// How a turn flows: its bounds. Set by the route, and by the filters `backpressure` and `cancellation`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Flow {
    /// The most bytes of events waiting for the client; beyond it the upstream is not read.
    pub max_buffered: usize,
    /// The longest time a client may take nothing while something waits for it.
    pub stall: Duration,
    /// The longest time a turn may take in all.
    pub deadline: Duration,
    /// The most bytes of text in one answer.
    pub max_text: u64,
    /// What the client's leaving means.
    pub on_disconnect: OnDisconnect,
    /// Silence after which a heartbeat is sent.
    pub heartbeat: Duration,
}

impl Default for Flow {
    /// The defaults of the documentation's table of limits.
    fn default() -> Flow {
        Flow {
            max_buffered: 64 << 10,
            stall: Duration::from_secs(30),
            deadline: Duration::from_secs(600),
            max_text: 4 << 20,
            on_disconnect: OnDisconnect::Cancel,
            heartbeat: Duration::from_secs(15),
        }
    }
}

/// What policy did to an answer that reached its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, PartialOrd, Ord, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Nothing.
    #[default]
    Allowed,
    /// A shadowed or reporting rule found something; the text went as it came.
    Flagged,
    /// Parts were masked.
    Masked,
    /// It was cut.
    Blocked,
}

impl Outcome {
    /// The word on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Outcome::Allowed => "allowed",
            Outcome::Flagged => "flagged",
            Outcome::Masked => "masked",
            Outcome::Blocked => "blocked",
        }
    }
}

/// Signs what was really sent to the client: gets the record and the SHA-256 of the text sent, gives the compact JWS.
pub type OutputSeal = Arc<dyn Fn(&Record, [u8; 32]) -> Option<String> + Send + Sync>;

/// The most findings kept per turn; later ones are counted only.
pub const MAX_FINDINGS: usize = 64;

/// The facts about a turn that outlive it: one log line, metrics, the final verdict.
#[derive(Clone, Default)]
pub struct Record {
    /// What filters found in prompt and answer; the first [`MAX_FINDINGS`].
    pub findings: Vec<Finding>,
    /// Findings in all.
    pub found: u64,
    /// What policy did to the answer.
    pub outcome: Outcome,
    /// Why the model stopped.
    pub finish: Finish,
    /// Tokens, as the upstream counted them.
    pub usage: Option<Usage>,
    /// Bytes of text sent.
    pub text_bytes: u64,
    /// Events sent.
    pub events: u64,
    /// The longest time text was held by a filter.
    pub held_max: Duration,
    /// The filter that held it.
    pub held_by: Option<&'static str>,
    /// Texts of the prompt that were not judged again, since what is found in them was remembered.
    pub known_texts: u64,
    /// Texts of the prompt that were not remembered, and judged.
    pub new_texts: u64,
    /// What signs the output, if the chain has a filter for it.
    pub seal: Option<OutputSeal>,
}

impl Record {
    /// Adds a finding.
    pub fn find(&mut self, finding: Finding) {
        self.found += 1;
        if self.findings.len() < MAX_FINDINGS {
            self.findings.push(finding);
        }
    }

    /// Raises the outcome to at least `outcome`.
    pub fn raise(&mut self, outcome: Outcome) {
        self.outcome = self.outcome.max(outcome);
    }
}

impl fmt::Debug for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Record")
            .field("outcome", &self.outcome)
            .field("finish", &self.finish)
            .field("found", &self.found)
            .field("text_bytes", &self.text_bytes)
            .finish_non_exhaustive()
    }
}

/// A turn as filters meet it when they start: who it is and how it flows.
#[derive(Debug, Clone)]
pub struct Turn {
    /// Its id.
    pub id: TurnId,
    /// Its session.
    pub session: SessionId,
    /// The route it came by, e.g. `/v1/chat/stream`.
    pub route: Arc<str>,
    /// Its bounds.
    pub flow: Flow,
    /// Its facts so far.
    pub record: Record,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trace(headers: &[(&'static str, &'static str)]) -> Trace {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(*name, value.parse().unwrap());
        }
        Trace::from_headers(&map)
    }

    const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn a_valid_parent_is_continued_with_a_span_of_our_own() {
        let trace = trace(&[("traceparent", PARENT), ("tracestate", "a=1"), ("tracestate", "b=2")]);
        assert_eq!(trace.trace_id_hex(), "4bf92f3577b34da6a3ce929d0e0e4736");
        assert_ne!(trace.traceparent(), PARENT);
        assert!(trace.traceparent().starts_with("00-4bf92f3577b34da6a3ce929d0e0e4736-") && trace.traceparent().ends_with("-01"));
        assert_eq!(trace.state.as_deref(), Some("a=1,b=2"));
    }

    #[test]
    fn an_invalid_or_doubled_parent_begins_a_new_trace() {
        for bad in [
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-x",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7",
            "nonsense",
        ] {
            assert_eq!(trace(&[("traceparent", bad)]).parent_id, None, "{bad}");
        }
        assert_eq!(trace(&[("traceparent", PARENT), ("traceparent", PARENT)]).parent_id, None);
        assert!(trace(&[("traceparent", "01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-later")]).parent_id.is_some());
    }

    #[test]
    fn findings_are_bounded_and_still_counted() {
        let mut record = Record::default();
        for _ in 0..1000 {
            record.find(Finding {
                category: crate::Category::Pii,
                source: crate::Source::Rule,
                stage: crate::Stage::Output,
                score: 1.0,
                rule: "moderation.mask.email".into(),
            });
        }
        assert_eq!((record.findings.len(), record.found), (MAX_FINDINGS, 1000));
    }
}
