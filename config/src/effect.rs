//! What a route comes to: the chain in force, how long text can wait, what can leave unjudged, how much memory a stream can take.

use std::{fmt, time::Duration};

use headgate_contracts::Flow;
use headgate_filters::{
    Built, DEFAULTS, Mode, Step,
    units::{Bytes, Span},
};
use serde::Serialize;

use crate::plan::Plan;

/// What a route comes to.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Effect {
    /// The chain in force, the default steps among it.
    pub chain: Vec<Link>,
    /// The longest time that filters can hold text.
    pub delay: Delay,
    /// The most text of one turn that can leave unjudged, in bytes; 0 unless the config says `late: release`.
    pub unverified_bytes: u64,
    /// The most memory one open stream can take, part by part.
    pub ceiling: Ceiling,
}

/// One step of a chain in force.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Link {
    /// The filter.
    pub filter: &'static str,
    /// Whether the config names it, or it stands there by default.
    pub by_default: bool,
    /// Whether its verdicts count.
    pub mode: Mode,
    /// Whether it may replace text.
    pub masks: bool,
    /// Whether it may end an answer.
    pub cuts: bool,
    /// The most text it may hold, in bytes.
    pub held_bytes: u64,
    /// The longest it may hold text, in milliseconds; nothing where it holds until it knows.
    pub max_hold_ms: Option<u64>,
}

/// How long text can wait for filters in all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Delay {
    /// No filter ever holds any.
    None,
    /// At most this long, in milliseconds.
    Milliseconds(u64),
    /// Until it is decided: with the next text, or with the answer's end. At most this many bytes can wait.
    UntilDecided {
        /// Text that may have to wait at once, in bytes.
        bytes: u64,
    },
}

/// The most memory that one open stream can take, in bytes, computed from the bounds of its parts.
///
/// What a request takes has gone before its answer comes: the prompt is dropped once it was sent.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Ceiling {
    /// The parts while the upstream is asked.
    pub asking: Vec<Part>,
    /// The parts while it answers.
    pub answering: Vec<Part>,
    /// The larger sum.
    pub total_bytes: u64,
}

impl Ceiling {
    fn of(asking: Vec<Part>, answering: Vec<Part>) -> Ceiling {
        let sum = |parts: &[Part]| parts.iter().map(|part| part.bytes).sum();
        Ceiling { total_bytes: u64::max(sum(&asking), sum(&answering)), asking, answering }
    }
}

/// One part of a ceiling.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Part {
    /// What it is.
    pub name: &'static str,
    /// How much it can be.
    pub bytes: u64,
}

/// How large one turn's share of everything can be.
pub(crate) struct Bounds {
    pub(crate) head_bytes: u64,
    pub(crate) body_bytes: u64,
    pub(crate) line_bytes: u64,
    pub(crate) event_bytes: u64,
    pub(crate) upstream_head_bytes: u64,
    /// Its turns travel on a socket with others.
    pub(crate) shares_socket: bool,
}

/// What a read of the upstream's socket takes at most.
const READ_BYTES: u64 = 16 << 10;
/// Buffers of a WebSocket, and its largest message.
const WEBSOCKET_BYTES: u64 = (4 + 4 + 64 + 64) << 10;

impl Effect {
    /// Of a chain over a flow.
    pub(crate) fn of(written: &[Step], chain: &[Built], flow: &Flow, bounds: &Bounds) -> Effect {
        let link = |built: &Built| Link {
            filter: built.name,
            by_default: DEFAULTS.contains(&built.name) && written.iter().all(|step| step.name() != built.name),
            mode: built.terms.mode,
            masks: built.facts.masks,
            cuts: built.facts.cuts,
            held_bytes: built.worst_held_bytes(),
            max_hold_ms: built.terms.max_hold.filter(|_| built.facts.holds_text).map(|hold| millis(hold.0)),
        };
        // One batch is always taken whole, however full it is behind it.
        let batch = READ_BYTES + bounds.event_bytes;
        let held: u64 = chain.iter().map(Built::ceiling_bytes).filter(|bytes| *bytes > 0).map(|bytes| bytes + bounds.event_bytes).sum();
        let part = |name, bytes| Part { name, bytes };
        let both = [part("request head", bounds.head_bytes), part("WebSocket buffers", WEBSOCKET_BYTES)];
        // What has come and what has been taken over: the credit, and the event that took the last of it.
        let frames = 2 * (u64::from(headgate_contracts::wire::hop::WINDOW) + bounds.event_bytes);
        let of_frames = bounds.shares_socket.then(|| part("frames of a shared socket", frames));
        let asking = [part("body and prompt", 2 * bounds.body_bytes), part("upstream head", bounds.upstream_head_bytes + READ_BYTES)];
        let answering = [
            part("upstream line and event", bounds.line_bytes + bounds.event_bytes + READ_BYTES),
            part("held by filters", held),
            part("waiting for the client", flow.max_buffered as u64 + batch),
        ];
        let asking = both.iter().cloned().chain(asking).collect();
        let answering = both.into_iter().chain(answering).chain(of_frames).collect();
        Effect {
            chain: chain.iter().map(link).collect(),
            delay: delay(chain),
            unverified_bytes: chain.iter().map(Built::worst_unverified_bytes).sum(),
            ceiling: Ceiling::of(asking, answering),
        }
    }

    /// Of a route that passes everything through: heads only; bodies are never kept.
    pub(crate) fn passing(chain: Vec<Link>, bounds: &Bounds) -> Effect {
        let parts = vec![
            Part { name: "request head", bytes: bounds.head_bytes },
            Part { name: "upstream head", bytes: bounds.upstream_head_bytes },
            Part { name: "pieces of bodies, both ways", bytes: 4 * READ_BYTES },
        ];
        let ceiling = Ceiling::of(parts.clone(), parts);
        Effect { chain, delay: Delay::None, unverified_bytes: 0, ceiling }
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn delay(chain: &[Built]) -> Delay {
    let holding = || chain.iter().filter(|built| built.worst_held_bytes() > 0);
    if holding().next().is_none() {
        return Delay::None;
    }
    match holding().map(Built::worst_delay).sum::<Option<Duration>>() {
        Some(time) => Delay::Milliseconds(millis(time)),
        // What can still become a match is what waits, and that is no longer than the longest match.
        None => Delay::UntilDecided { bytes: holding().map(|built| built.facts.worst_hold_bytes).sum() },
    }
}

impl fmt::Display for Delay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Delay::None => f.write_str("none"),
            Delay::Milliseconds(millis) => write!(f, "at most {}", Span(Duration::from_millis(*millis))),
            Delay::UntilDecided { bytes } => {
                write!(f, "clean text none; what may become a match until it is decided, at most {bytes} bytes of text")
            }
        }
    }
}

impl fmt::Display for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.filter)?;
        let mut says = Vec::new();
        if self.by_default {
            says.push("by default".to_owned());
        }
        if self.mode == Mode::Shadow {
            says.push("shadow".to_owned());
        }
        if self.masks {
            says.push("masks".to_owned());
        }
        if self.cuts {
            says.push("cuts".to_owned());
        }
        if let Some(hold) = self.max_hold_ms {
            says.push(format!("holds at most {}", Span(Duration::from_millis(hold))));
        } else if self.held_bytes > 0 {
            says.push("holds until it knows".to_owned());
        }
        if !says.is_empty() {
            write!(f, " ({})", says.join(", "))?;
        }
        Ok(())
    }
}

impl fmt::Display for Ceiling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", Size(self.total_bytes))?;
        let phases = [("asking", &self.asking), ("answering", &self.answering)];
        for (phase, parts) in phases.iter().take(if self.asking == self.answering { 1 } else { 2 }) {
            let sum = Size(parts.iter().map(|part| part.bytes).sum());
            write!(f, "\n                   {phase}: {sum}")?;
            for (index, part) in parts.iter().filter(|part| part.bytes > 0).enumerate() {
                write!(f, "{}{} {}", if index == 0 { " = " } else { " + " }, part.name, Size(part.bytes))?;
            }
        }
        Ok(())
    }
}

/// Bytes, rounded for people.
struct Size(u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            bytes if bytes < 10 << 10 => write!(f, "{}", Bytes(bytes)),
            bytes if bytes < 10 << 20 => write!(f, "{} KiB", bytes.div_ceil(1 << 10)),
            bytes if bytes < 10 << 30 => write!(f, "{} MiB", bytes.div_ceil(1 << 20)),
            bytes => write!(f, "{} GiB", bytes.div_ceil(1 << 30)),
        }
    }
}

impl fmt::Display for Effect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let chain: Vec<String> = self.chain.iter().map(Link::to_string).collect();
        writeln!(f, "  chain            {}", if chain.is_empty() { "nothing".to_owned() } else { chain.join("\n                   ") })?;
        writeln!(f, "  added delay      {}", self.delay)?;
        match self.unverified_bytes {
            0 => writeln!(f, "  unverified text  none: every byte is judged before it leaves")?,
            bytes => writeln!(f, "  unverified text  up to {bytes} bytes at a time (`late: release`)")?,
        }
        writeln!(f, "  memory/stream    at most {}", self.ceiling)
    }
}

/// What a plan comes to, for people (`Display`) and machines ([`Summary::to_json`]): what `headgate check` prints.
#[derive(Debug)]
pub struct Summary<'a>(&'a Plan);

impl Plan {
    /// What it comes to.
    pub fn summary(&self) -> Summary<'_> {
        Summary(self)
    }

    /// The most memory that all streams together can take, in bytes: every connection with one stream on the greediest route.
    pub fn memory_ceiling_bytes(&self) -> u64 {
        let greediest = self.routes.iter().map(|route| route.effect.ceiling.total_bytes).max().unwrap_or(0);
        greediest.saturating_mul(self.limits.connections as u64)
    }
}

impl Summary<'_> {
    /// `{"ok": true, "routes": [...], "memory_ceiling_bytes": n, "warnings": [...]}`.
    pub fn to_json(&self) -> serde_json::Value {
        let routes =
            self.0.routes.iter().map(
                |route| serde_json::json!({ "path": route.name, "kind": route.kind, "upstream": route.upstream, "effect": route.effect }),
            );
        serde_json::json!({
            "ok": true,
            "environment": self.0.environment.map(|environment| environment.name()),
            "routes": routes.collect::<Vec<_>>(),
            "memory_ceiling_bytes": self.0.memory_ceiling_bytes(),
            "warnings": self.0.warnings,
        })
    }
}

impl fmt::Display for Summary<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for warning in &self.0.warnings {
            writeln!(f, "{warning}\n")?;
        }
        for route in &self.0.routes {
            writeln!(f, "{} ({}) -> {}", route.name, route.kind, route.upstream)?;
            writeln!(f, "{}", route.effect)?;
        }
        if !self.0.routes.is_empty() {
            let (all, connections) = (Size(self.0.memory_ceiling_bytes()), self.0.limits.connections);
            writeln!(f, "memory of {connections} connections with a stream each, all at their worst: at most {all}")?;
        }
        Ok(())
    }
}
