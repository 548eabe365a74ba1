//! What a turn leaves behind for people: one log line, metrics, one span. Never text, never a secret.
//!
//! While a turn runs it is watched ([`Watch`]), and what it counts meanwhile its worker counts; what others share is touched when it ends.

mod histogram;
mod lines;
pub mod logs;
mod meters;
mod spans;

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use headgate_contracts::{Batch, Code, End, Principal, Prompt, Record, Seal, Stop, Trace, Turn, TurnId};
use headgate_filters::Chain;
use tokio::time::Instant;
use tracing::{Span, field::Empty};

pub use histogram::Histogram;
pub use meters::{Meters, RouteMeters};

use crate::{delivery::Slip, live::Route};

/// Watches one turn.
pub struct Watch {
    route: Arc<Route>,
    owner: Arc<OnceLock<Principal>>,
    turn: TurnId,
    trace: Trace,
    begun: Instant,
    admitted: Option<Instant>,
    endpoint: Option<Box<str>>,
    seen: Seen,
    span: Span,
    is_over: bool,
}

/// What each batch changes: side by side, for a stream's events find it in no cache.
struct Seen {
    read: Instant,
    first: Option<Instant>,
    last: Option<Instant>,
    longest_gap: Duration,
}

impl Watch {
    /// A turn begins. `owner` learns whose it is.
    pub fn begin(route: Arc<Route>, prompt: &Prompt, owner: Arc<OnceLock<Principal>>) -> Watch {
        let now = Instant::now();
        route.meters.open.inc();
        let trace = prompt.trace.clone();
        // From the start: a turn that is refused at the door is one that somebody will look for.
        let span = tracing::info_span!(
            target: "headgate",
            "chat",
            otel.kind = "server",
            trace_id = trace.trace_id_hex(),
            span_id = trace.span_id_hex(),
            parent_span_id = trace.parent_id_hex(),
            route = &*route.plan.name,
            turn_id = %prompt.turn,
            session_id = %prompt.session,
            tenant = Empty,
            gen_ai.operation.name = "chat",
            gen_ai.request.model = prompt.settings.model.as_deref(),
            gen_ai.usage.input_tokens = Empty,
            gen_ai.usage.output_tokens = Empty,
            gen_ai.response.finish_reasons = Empty,
            gen_ai.server.time_to_first_token = Empty,
            headgate.outcome = Empty,
            end = Empty,
            code = Empty,
        );
        Watch {
            route,
            owner,
            turn: prompt.turn,
            trace,
            begun: now,
            admitted: None,
            endpoint: None,
            seen: Seen { read: now, first: None, last: None, longest_gap: Duration::ZERO },
            span,
            is_over: false,
        }
    }

    /// The filters let the prompt through.
    pub fn admitted(&mut self, prompt: &Prompt) {
        self.admitted = Some(Instant::now());
        self.span.record("tenant", tracing::field::display(&prompt.principal.tenant));
        self.known(prompt);
    }

    /// Whose prompt it is, and where it stands in a trace, as far as the filters came.
    pub fn known(&mut self, prompt: &Prompt) {
        self.trace = prompt.trace.clone();
        // A turn has one owner: the first to be named.
        let _ = self.owner.set(prompt.principal.clone());
    }

    fn whose(&self) -> &Principal {
        self.owner.get_or_init(Principal::anonymous)
    }

    /// A prompt of nothing but whose it is, for what its orchestrator is told while it answers.
    pub fn caller(&self, turn: &Turn, seal: Option<Seal>) -> Prompt {
        let (principal, trace) = (self.whose().clone(), self.trace.clone());
        Prompt { principal, trace, seal, ..Prompt::new(turn.id, turn.session.clone(), Vec::new()) }
    }

    /// That endpoint of the upstream answers.
    pub fn answered(&mut self, endpoint: &str) {
        self.endpoint = Some(endpoint.into());
    }

    /// The slip of the turn, where there is somebody to tell what became of it.
    pub fn slip(&self, turn: &Turn, end: &End) -> Option<Slip> {
        let Route { courier, upstream, .. } = &*self.route;
        courier.slip(upstream, self.admitted.map(|_| self.endpoint.as_deref()), turn, self.whose(), &self.trace, end)
    }

    /// A batch came from the upstream.
    pub fn read(&mut self, at: Instant) {
        self.seen.read = at;
    }

    /// A batch went to the client's side.
    pub fn sent(&mut self, batch: &Batch) {
        if batch.is_empty() {
            return;
        }
        let (now, seen, meters) = (Instant::now(), &mut self.seen, &self.route.meters);
        meters.delays.add(now - seen.read);
        match seen.last {
            None => seen.first = Some(now),
            Some(last) => {
                meters.gaps.add(now - last);
                seen.longest_gap = seen.longest_gap.max(now - last);
            }
        }
        seen.last = Some(now);
    }

    /// The turn is over: the one log line, the metrics, the span.
    pub fn end(&mut self, turn: &Turn, chain: &Chain, record: &Record, end: &End) {
        self.is_over = true;
        let now = Instant::now();
        let (word, code, cause) = match end {
            Ok(()) => ("complete", "ok", None),
            Err(stop @ Stop::Failed(fault)) => (stop.word(), stop.code().as_str(), Some(fault.chain())),
            Err(stop) => (stop.word(), stop.code().as_str(), None),
        };
        let rule = match end {
            Err(Stop::Refused(refusal)) => Some(&*refusal.rule),
            _ => None,
        };
        let meters = &self.route.meters;
        meters.turn(word, code, record);
        for gate in chain.gates() {
            meters.hold(gate);
        }
        let millis = |from: Instant, to: Instant| (to - from).as_secs_f64() * 1e3;
        let ttft = self.seen.first.map(|first| {
            meters.ttft.add(first - self.begun);
            if let (Some(last), tokens @ 2..) = (self.seen.last, record.usage.map_or(record.events, |usage| usage.output_tokens)) {
                meters.tpot.add((last - first) / (tokens - 1).min(u32::MAX.into()) as u32);
            }
            millis(self.begun, first)
        });
        tracing::info!(
            target: "headgate::turn",
            end = word,
            code,
            rule,
            cause,
            outcome = record.outcome.as_str(),
            finish = record.finish.as_str(),
            route = &*turn.route,
            upstream = self.route.upstream.name(),
            turn_id = %turn.id,
            session_id = turn.session.as_str(),
            tenant = self.whose().tenant.as_str(),
            subject = self.whose().subject.as_str(),
            trace_id = self.trace.trace_id_hex(),
            span_id = self.trace.span_id_hex(),
            parent_id = self.trace.parent_id_hex(),
            duration_ms = millis(self.begun, now),
            admitted_ms = self.admitted.map(|at| millis(self.begun, at)),
            ttft_ms = ttft,
            gap_ms_max = self.seen.longest_gap.as_secs_f64() * 1e3,
            held_ms_max = record.held_max.as_secs_f64() * 1e3,
            held_by = record.held_by,
            events = record.events,
            text_bytes = record.text_bytes,
            findings = record.found,
            input_tokens = record.usage.map(|usage| usage.input_tokens),
            output_tokens = record.usage.map(|usage| usage.output_tokens),
            "turn ended"
        );
        let span = std::mem::replace(&mut self.span, Span::none());
        span.record("end", word).record("code", code).record("headgate.outcome", record.outcome.as_str());
        span.record("gen_ai.response.finish_reasons", record.finish.as_str());
        if let Some(usage) = record.usage {
            span.record("gen_ai.usage.input_tokens", usage.input_tokens).record("gen_ai.usage.output_tokens", usage.output_tokens);
        }
        if let Some(ttft) = ttft {
            span.record("gen_ai.server.time_to_first_token", ttft / 1e3);
        }
    }
}

/// A turn that panicked still leaves its line.
impl Drop for Watch {
    fn drop(&mut self) {
        self.route.meters.open.dec();
        if !self.is_over {
            let code = Code::InternalError.as_str();
            self.route.meters.turn("failed", code, &Record::default());
            self.span.record("end", "failed").record("code", code);
            tracing::error!(
                target: "headgate::turn",
                end = "failed",
                code,
                route = &*self.route.plan.name,
                turn_id = %self.turn,
                trace_id = self.trace.trace_id_hex(),
                "turn broke off"
            );
        }
    }
}
