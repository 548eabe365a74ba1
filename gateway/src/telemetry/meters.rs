//! The metrics: names as the ecosystem knows them, handles resolved when the config is loaded.

use std::sync::{Mutex, OnceLock};

use headgate_contracts::{Outcome, Record};
use headgate_filters::{Gate, Holds, unix_now};
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::{Registry, Unit},
};

use super::{Histogram, lines};
use crate::live::Live;

/// Everything that `/metrics` shows.
pub struct Meters {
    registry: Mutex<Registry>,
    families: Families,
}

#[derive(Clone, Default)]
struct Families {
    turns: Family<TurnLabels, Counter>,
    outcomes: Family<OutcomeLabels, Counter>,
    refusals: Family<CategoryLabels, Counter>,
    texts: Family<JudgedLabels, Counter>,
    open: Family<RouteLabels, Gauge>,
    ttft: Family<RouteLabels, Histogram>,
    tpot: Family<RouteLabels, Histogram>,
    gaps: Family<RouteLabels, Histogram>,
    delays: Family<RouteLabels, Histogram>,
    holds: Family<HoldLabels, Histogram>,
    text: Family<RouteLabels, Counter>,
    connections: Gauge,
    key_due: Gauge,
    reloads: Family<ResultLabels, Counter>,
    ready: Family<EndpointLabels, Gauge>,
    in_flight: Family<EndpointLabels, Gauge>,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ResultLabels {
    result: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct EndpointLabels {
    upstream: String,
    endpoint: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct RouteLabels {
    route: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct TurnLabels {
    route: String,
    end: &'static str,
    code: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct OutcomeLabels {
    route: String,
    outcome: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct JudgedLabels {
    route: String,
    judged: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct CategoryLabels {
    category: &'static str,
    stage: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct HoldLabels {
    route: String,
    filter: &'static str,
}

/// The handles of one route. Labels are bounded: routes and filters come from the config, codes and categories from tables.
pub struct RouteMeters {
    route: String,
    families: Families,
    /// Turns open now.
    pub open: Gauge,
    pub(super) ttft: Histogram,
    pub(super) tpot: Histogram,
    pub(super) gaps: Histogram,
    pub(super) delays: Histogram,
    text: Counter,
    known_texts: Counter,
    new_texts: Counter,
    // Of most turns, once there was one.
    complete: OnceLock<Counter>,
    allowed: OnceLock<Counter>,
}

impl Default for Meters {
    fn default() -> Meters {
        let (families, mut registry) = (Families::default(), Registry::default());
        let f = families.clone();
        registry.register("headgate_turns", "Turns ended, by how", f.turns);
        registry.register("headgate_outcomes", "Answers that reached their end, by what policy did", f.outcomes);
        registry.register("headgate_findings", "Findings of filters, by category and stage", f.refusals);
        registry.register("headgate_prompt_texts", "Texts of prompts that could be remembered, by when they were judged", f.texts);
        registry.register("headgate_open_turns", "Turns open now", f.open);
        registry.register("headgate_text", "Bytes of answer text sent", f.text);
        for (name, help, family) in [
            ("gen_ai_server_time_to_first_token", "From the request to the first event sent", f.ttft),
            ("gen_ai_server_time_per_output_token", "Per token after the first, averaged over a turn", f.tpot),
            ("headgate_event_gap", "Between two batches of events sent", f.gaps),
            ("headgate_event_delay", "From reading a batch of events to having filtered and queued it", f.delays),
        ] {
            registry.register_with_unit(name, help, Unit::Seconds, family);
        }
        registry.register("headgate_connections", "Client connections open now", f.connections);
        registry.register("headgate_log_lines_dropped", "Log lines that nobody took in time", lines::DROPPED.clone());
        registry.register("headgate_signing_key_due", "1 while a rotation of the signing keys is due", f.key_due);
        registry.register("headgate_config_reload", "Configurations read anew, by what became of them", f.reloads);
        registry.register("headgate_upstream_ready", "Whether an endpoint answers: 1 or 0", f.ready);
        registry.register("headgate_upstream_in_flight", "Answers that an endpoint is giving now", f.in_flight);
        registry.register_with_unit("headgate_hold", "How long text waited in a filter's gate", Unit::Seconds, f.holds);
        Meters { registry: Mutex::new(registry), families }
    }
}

impl Meters {
    /// The handles of a route.
    pub fn route(&self, name: &str) -> RouteMeters {
        let (families, labels) = (&self.families, RouteLabels { route: name.to_owned() });
        let texts = |judged| families.texts.get_or_create(&JudgedLabels { route: name.to_owned(), judged }).clone();
        RouteMeters {
            route: name.to_owned(),
            open: families.open.get_or_create(&labels).clone(),
            ttft: families.ttft.get_or_create(&labels).clone(),
            tpot: families.tpot.get_or_create(&labels).clone(),
            gaps: families.gaps.get_or_create(&labels).clone(),
            delays: families.delays.get_or_create(&labels).clone(),
            text: families.text.get_or_create(&labels).clone(),
            known_texts: texts("before"),
            new_texts: texts("now"),
            complete: OnceLock::new(),
            allowed: OnceLock::new(),
            families: families.clone(),
        }
    }

    /// A configuration was read anew: `taken` or `refused`.
    pub fn reloaded(&self, result: &'static str) {
        self.families.reloads.get_or_create(&ResultLabels { result }).inc();
    }

    /// Brings the gauges up to date that are read, not kept.
    pub fn observe(&self, connections: usize, live: &Live) {
        let gauge = |value: usize| i64::try_from(value).unwrap_or(i64::MAX);
        self.families.connections.set(gauge(connections));
        let due = live.signing.as_ref().is_some_and(|signing| signing.ring().is_due(unix_now()));
        self.families.key_due.set(due.into());
        for (upstream, endpoints) in live.upstream_health() {
            for health in endpoints {
                let labels = EndpointLabels { upstream: upstream.clone(), endpoint: health.endpoint };
                self.families.ready.get_or_create(&labels).set(health.ready.into());
                self.families.in_flight.get_or_create(&labels).set(gauge(health.in_flight));
            }
        }
    }

    /// Adds others' metrics, e.g. the orchestrator's.
    pub fn register(&self, add: impl FnOnce(&mut Registry)) {
        add(&mut self.registry());
    }

    /// All metrics as Prometheus reads them.
    pub fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a String cannot fail.
        let _ = prometheus_client::encoding::text::encode(&mut text, &self.registry());
        text
    }

    fn registry(&self) -> std::sync::MutexGuard<'_, Registry> {
        self.registry.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl RouteMeters {
    pub(super) fn turn(&self, end: &'static str, code: &'static str, record: &Record) {
        let turns = || self.families.turns.get_or_create(&TurnLabels { route: self.route.clone(), end, code }).clone();
        if code == "ok" {
            self.complete.get_or_init(turns).inc()
        } else {
            turns().inc()
        };
        self.text.inc_by(record.text_bytes);
        self.known_texts.inc_by(record.known_texts);
        self.new_texts.inc_by(record.new_texts);
        if end == "complete" || record.outcome == Outcome::Blocked {
            let outcome = record.outcome.as_str();
            let outcomes = || self.families.outcomes.get_or_create(&OutcomeLabels { route: self.route.clone(), outcome }).clone();
            if record.outcome == Outcome::Allowed {
                self.allowed.get_or_init(outcomes).inc()
            } else {
                outcomes().inc()
            };
        }
        for finding in &record.findings {
            let stage = match finding.stage {
                headgate_contracts::Stage::Input => "input",
                headgate_contracts::Stage::Output => "output",
                headgate_contracts::Stage::Tool => "tool",
            };
            self.families.refusals.get_or_create(&CategoryLabels { category: finding.category.as_str(), stage }).inc();
        }
    }

    pub(super) fn hold(&self, gate: &Gate) {
        let holds: &Holds = gate.holds();
        if holds.max.is_zero() {
            return;
        }
        let labels = HoldLabels { route: self.route.clone(), filter: gate.name() };
        let histogram = self.families.holds.get_or_create(&labels);
        holds.each(|wait, count| histogram.add_many(wait, count));
        histogram.add_sum(holds.total);
    }
}
