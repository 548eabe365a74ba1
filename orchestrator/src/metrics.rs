//! What operators see of the orchestrator: what it decided, how turns ended, how many are open, how fast they begin.

use std::fmt;

use headgate_contracts::{Code, End, ErrorType};
use headgate_upstream::{EndpointHealth, Stats, Upstream};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric},
    metrics::{
        MetricType,
        counter::{ConstCounter, Counter},
        family::Family,
        gauge::{ConstGauge, Gauge},
        histogram::Histogram,
    },
    registry::{Registry, Unit},
};

/// By which call a turn came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Route {
    Stream,
    Step,
    WebSocket,
}

impl Route {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Route::Stream => "stream",
            Route::Step => "step",
            Route::WebSocket => "websocket",
        }
    }
}

/// What was decided about a request; every request is counted under exactly one of these.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Decision {
    /// A model answers.
    Accepted,
    /// It does not have the expected shape, or came too slowly.
    Malformed,
    /// Its verdict does not hold.
    Invalid,
    /// Its verdict was used before.
    Replayed,
    /// The policy version is not in force, or the session has an open turn.
    Conflict,
    /// There is no room, we are shutting down, or the registry is away.
    Busy,
    /// It was good, and no model answered it.
    Failed,
    /// It was good, and the caller left or stopped it before a model answered.
    Cancelled,
}

impl Decision {
    fn as_str(self) -> &'static str {
        match self {
            Decision::Accepted => "accepted",
            Decision::Malformed => "malformed",
            Decision::Invalid => "invalid",
            Decision::Replayed => "replayed",
            Decision::Conflict => "conflict",
            Decision::Busy => "busy",
            Decision::Failed => "failed",
            Decision::Cancelled => "cancelled",
        }
    }

    /// The decision that ending a request with `code`, before any answer, is.
    fn of(code: Code) -> Decision {
        match (code, code.error_type()) {
            (Code::ClientClosed | Code::Stopped, _) => Decision::Cancelled,
            (Code::RequestTimeout, _) => Decision::Malformed,
            (Code::VerdictReplayed, _) => Decision::Replayed,
            (_, ErrorType::InvalidRequest | ErrorType::NotFound) => Decision::Malformed,
            (_, ErrorType::Authentication | ErrorType::Permission | ErrorType::Policy) => Decision::Invalid,
            (_, ErrorType::Conflict) => Decision::Conflict,
            (_, ErrorType::Overloaded | ErrorType::Unavailable | ErrorType::RateLimit) => Decision::Busy,
            (_, ErrorType::Timeout | ErrorType::Server | ErrorType::Upstream | ErrorType::Limit) => Decision::Failed,
        }
    }
}

/// What a gateway tells of a turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Call {
    /// What the user got.
    Delivery,
    /// That its prompt was refused.
    Denial,
}

impl Call {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Call::Delivery => "delivery",
            Call::Denial => "verdict",
        }
    }
}

/// What became of what a gateway told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reported {
    /// It was written.
    Kept,
    /// It had been written before.
    Again,
    /// No events are kept here.
    Unkept,
    /// There is no such turn, or something else was written of it.
    Late,
    /// It is malformed, or not proven.
    Refused,
    /// It could not be taken now.
    Busy,
}

impl Reported {
    fn as_str(self) -> &'static str {
        match self {
            Reported::Kept => "kept",
            Reported::Again => "again",
            Reported::Unkept => "unkept",
            Reported::Late => "late",
            Reported::Refused => "refused",
            Reported::Busy => "busy",
        }
    }

    /// What refusing a report with `code` is.
    pub(crate) fn of(code: Code) -> Reported {
        match code {
            Code::SessionNotFound | Code::TurnConflict => Reported::Late,
            code if code.status() >= 500 => Reported::Busy,
            _ => Reported::Refused,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Told {
    call: &'static str,
    result: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Decided {
    route: &'static str,
    decision: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Ended {
    route: &'static str,
    end: &'static str,
    code: &'static str,
}

/// All of them. Every label value comes from an enumeration, so the number of series has a bound.
#[derive(Debug, Clone)]
pub(crate) struct Metrics {
    requests: Family<Decided, Counter>,
    turns: Family<Ended, Counter>,
    reports: Family<Told, Counter>,
    pub(crate) open: Gauge,
    pub(crate) first_text: Histogram,
    pub(crate) panics: Counter,
}

/// Seconds, in the buckets that the OpenTelemetry conventions for generative models name for the time to the first token.
const FIRST_TEXT_SECONDS: [f64; 16] = [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0];

impl Metrics {
    pub(crate) fn new() -> Metrics {
        Metrics {
            requests: Family::default(),
            turns: Family::default(),
            reports: Family::default(),
            open: Gauge::default(),
            first_text: Histogram::new(FIRST_TEXT_SECONDS),
            panics: Counter::default(),
        }
    }

    pub(crate) fn register(&self, registry: &mut Registry) {
        let help = "Requests, by what was decided about them before an answer began; each is counted once";
        registry.register("orchestrator_requests", help, self.requests.clone());
        registry.register("orchestrator_turns", "Turns that a model answered, by how they ended", self.turns.clone());
        let help = "What gateways told of turns, by what became of it";
        registry.register("orchestrator_reports", help, self.reports.clone());
        registry.register("orchestrator_open_turns", "Turns open now", self.open.clone());
        let help = "From a request's last byte to the first text of its answer";
        registry.register_with_unit("orchestrator_time_to_first_text", help, Unit::Seconds, self.first_text.clone());
        registry.register("orchestrator_panics", "Turns lost to a fault in our own code", self.panics.clone());
    }

    /// A request has come that is to be decided about.
    pub(crate) fn undecided(&self, route: Route) -> Undecided<'_> {
        Undecided { metrics: self, route, decision: Decision::Cancelled }
    }

    fn decided(&self, route: Route, decision: Decision) {
        self.requests.get_or_create(&Decided { route: route.as_str(), decision: decision.as_str() }).inc();
    }

    /// Counts what a gateway told.
    pub(crate) fn reported(&self, call: Call, result: Reported) {
        self.reports.get_or_create(&Told { call: call.as_str(), result: result.as_str() }).inc();
    }

    /// Counts a turn's end.
    pub(crate) fn ended(&self, route: Route, end: &End) {
        let (end, code) = match end {
            Ok(()) => ("complete", "none"),
            Err(stop) => (stop.word(), stop.code().as_str()),
        };
        self.turns.get_or_create(&Ended { route: route.as_str(), end, code }).inc();
    }
}

/// What the upstreams of the models count, read when it is asked for.
#[derive(Debug)]
pub(crate) struct Upstreams(pub(crate) Vec<Upstream>);

type Read = fn(&Stats) -> u64;

/// Name, help, and where it stands.
const UPSTREAM_COUNTERS: [(&str, &str, Read); 6] = [
    ("orchestrator_model_opened", "Turns for which a model was asked", |stats| stats.opened.get()),
    ("orchestrator_model_retried", "Turns for which a second endpoint was asked", |stats| stats.retried.get()),
    ("orchestrator_model_connected", "Connections made to models", |stats| stats.connected.get()),
    ("orchestrator_model_reused", "Turns on a connection kept from an earlier one", |stats| stats.reused.get()),
    ("orchestrator_model_connect_failed", "Connections to models that could not be made", |stats| stats.connect_failed.get()),
    ("orchestrator_model_left", "Answers that were left before their end", |stats| stats.left.get()),
];

impl Collector for Upstreams {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        for (name, help, read) in UPSTREAM_COUNTERS {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for upstream in &self.0 {
                let labels = [("upstream", upstream.name())];
                ConstCounter::new(read(upstream.stats())).encode(family.encode_family(&labels)?)?;
            }
        }
        let health: Vec<_> = self.0.iter().map(|upstream| (upstream.name(), upstream.health())).collect();
        let ready: fn(&EndpointHealth) -> i64 = |endpoint| endpoint.ready.into();
        let in_flight: fn(&EndpointHealth) -> i64 = |endpoint| i64::try_from(endpoint.in_flight).unwrap_or(i64::MAX);
        for (name, help, read) in [
            ("orchestrator_model_ready", "Whether an endpoint gets turns", ready),
            ("orchestrator_model_in_flight", "Answers open on an endpoint", in_flight),
        ] {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            for (upstream, endpoints) in &health {
                for endpoint in endpoints {
                    let labels = [("upstream", *upstream), ("endpoint", &endpoint.endpoint)];
                    ConstGauge::new(read(endpoint)).encode(family.encode_family(&labels)?)?;
                }
            }
        }
        Ok(())
    }
}

/// A request that is counted when this is dropped: as cancelled unless something else was decided before.
pub(crate) struct Undecided<'a> {
    metrics: &'a Metrics,
    route: Route,
    decision: Decision,
}

impl Undecided<'_> {
    /// A model answers it.
    pub(crate) fn accepted(mut self) {
        self.decision = Decision::Accepted;
    }

    /// It is refused, or no model answers it.
    pub(crate) fn refused(mut self, code: Code) {
        self.decision = Decision::of(code);
    }
}

impl Drop for Undecided<'_> {
    fn drop(&mut self) {
        self.metrics.decided(self.route, self.decision);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_is_one_decision_and_the_names_are_the_published_ones() {
        let metrics = Metrics::new();
        let mut registry = Registry::default();
        metrics.register(&mut registry);
        metrics.undecided(Route::Stream).accepted();
        for code in Code::ALL {
            metrics.undecided(Route::Step).refused(*code);
        }
        metrics.ended(Route::WebSocket, &Ok(()));
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        assert!(text.contains("orchestrator_requests_total{route=\"stream\",decision=\"accepted\"} 1"), "{text}");
        assert!(text.contains("orchestrator_turns_total{route=\"websocket\",end=\"complete\",code=\"none\"} 1"), "{text}");
        for decision in ["malformed", "invalid", "replayed", "conflict", "busy", "failed", "cancelled"] {
            assert!(text.contains(&format!("orchestrator_requests_total{{route=\"step\",decision=\"{decision}\"}}")), "{decision}");
        }
        assert_eq!(Decision::of(Code::VerdictInvalid), Decision::Invalid);
        assert_eq!(Decision::of(Code::VersionConflict), Decision::Conflict);
        assert_eq!(Decision::of(Code::UpstreamTimeoutFirstByte), Decision::Failed);
    }
}
