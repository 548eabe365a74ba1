//! Runs the turns that a gateway has judged: believes its signed verdict, remembers the session, asks a model, streams the answer.
//!
//! | word | where |
//! |---|---|
//! | **court**: judges the verdict of a dispatch | `verify` |
//! | **history**: what was said in each session | `history` |
//! | **runs**: the open turns, one per session | `runs` |
//! | **run**: one open turn, from the dispatch to its end | `run` |
//! | **calls**: those of tools that a person has to agree to | `ask` |
//! | **partings**: turns that their gateway left, and will say why | `partings` |
//! | **reports**: what gateways tell after the fact | `reports` |
//! | **models**: who answers | [`Models`] |
//! | **events**: what became of each turn, on disk | [`events`] |
//! | **training**: who may train, under which fence | [`training`] |
//!
//! A dispatch comes as `POST /v1/conversation/stream` (server-sent events), `POST /v1/conversation/step` (one JSON answer) or as a
//! frame on a WebSocket at the first of these; `docs/wire.md` has the contract. The response's body reads the model itself, in the
//! connection's own task: whoever stops reading, stops the model, before the first byte too.

mod ask;
pub mod events;
mod front;
mod history;
mod metrics;
mod models;
mod partings;
mod reports;
mod run;
mod runs;
mod serve;
mod settings;
mod socket;
mod step;
mod stream;
pub mod training;
mod verify;
mod ws;

use std::{fmt, sync::Arc, time::Duration};

use headgate_policy::{Registry, Verifier};
use headgate_store::Used;

pub use history::Bounds;
pub use models::Models;
pub use serve::{serve, serve_admin};
pub use settings::{Confirm, Limits, Settings};
pub use socket::Patience;

/// Everything that all connections share.
pub struct Orchestrator {
    settings: Settings,
    court: verify::Court,
    models: Models,
    history: history::History,
    runs: Arc<runs::Runs>,
    partings: partings::Partings,
    metrics: metrics::Metrics,
    events: Option<events::Log>,
}

impl Orchestrator {
    /// An orchestrator that believes verdicts signed with `keys` under policies that `registry` knows, and has `models` answer.
    pub fn new(settings: Settings, models: Models, keys: Verifier, registry: Arc<dyn Registry>) -> Orchestrator {
        Orchestrator {
            court: verify::Court::new(settings.issuer.clone(), keys, registry, settings.limits.replays),
            history: history::History::new(settings.history.clone()),
            runs: Arc::new(runs::Runs::new(settings.limits.turns, settings.limits.session_grace)),
            partings: partings::Partings::default(),
            metrics: metrics::Metrics::new(),
            models,
            settings,
            events: None,
        }
    }

    /// The same, keeping what becomes of each turn in `log`.
    pub fn keeping(mut self, log: events::Log) -> Orchestrator {
        self.events = Some(log);
        self
    }

    /// The same, using verdicts up for all who share `used`, not for this process alone.
    pub fn sharing(mut self, used: Used) -> Orchestrator {
        self.court.share(used);
        self
    }

    /// The same, letting admins turn training mode on.
    pub fn training(mut self, training: training::Training) -> Orchestrator {
        self.court.train(Arc::new(training));
        self
    }

    /// Adds the orchestrator's metrics to what is exported.
    pub fn register(&self, registry: &mut prometheus_client::registry::Registry) {
        self.metrics.register(registry);
        self.court.register(registry);
        registry.register_collector(Box::new(metrics::Upstreams(self.models.all().cloned().collect())));
        if let Some(log) = &self.events {
            log.register(registry);
        }
    }

    /// Believes verdicts signed with these keys from now on: call it when the gateway's keys rotate.
    pub fn trust(&self, keys: Verifier) {
        self.court.trust(keys);
    }

    /// The same, and believes nothing once `lifetime` has passed: for keys that are fetched, since a revocation that cannot be heard of
    /// must not be outlived. Turns are then refused with `policy_registry_unavailable`, until keys are brought again.
    pub fn trust_for(&self, keys: Verifier, lifetime: Duration) {
        self.court.trust_for(keys, lifetime);
    }

    /// Believes nothing until it is given keys.
    pub fn wait_for_keys(&self) {
        self.court.wait_for_keys();
    }

    /// Whether turns are taken and some endpoint could answer them; else the reason, for people.
    pub fn ready(&self) -> Result<(), &'static str> {
        if !self.runs.is_open() {
            Err("draining\n")
        } else if self.events.as_ref().is_some_and(events::Log::is_sealed) {
            Err("the event log is sealed after a failed write\n")
        } else if !self.court.has_keys() {
            Err("the keys that verdicts are judged by cannot be fetched\n")
        } else if !self.court.has_registry() {
            Err("the policy registry cannot be reached\n")
        } else if !self.models.ready() {
            Err("no model is ready\n")
        } else {
            Ok(())
        }
    }

    /// How many turns are open now.
    pub fn open_turns(&self) -> usize {
        self.runs.count()
    }
}

impl fmt::Debug for Orchestrator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Orchestrator").field("open_turns", &self.open_turns()).field("history", &self.history).finish_non_exhaustive()
    }
}
