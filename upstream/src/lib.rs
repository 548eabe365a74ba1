//! Opens answers: a named set of endpoints that speak one protocol, behind one balancer.
//!
//! | module | story |
//! |---|---|
//! | [`settings`] | what an upstream is told |
//! | `open` | balance, connect, send, wait for the head; try again only while nothing has been answered |
//! | `answer` | the answer, read as it is asked for, on the caller's own task |
//! | `alarm` | a timer for what nearly always comes before its time
//! | `request` | what is sent: made anew from the parsed prompt |
//! | `exchange`, `http1` | HTTP/1.1 by hand, strict and small |
//! | `endpoint`, `connect` | one endpoint, its connections kept and new |
//! | `line` | a way back: what a person says to a question |
//! | `hop` | many turns on one WebSocket to an orchestrator |
//! | `forward` | a plain reverse proxy, on the same connections |
//! | `balance` | which endpoint is next: pingora's balancer and health state |
//! | `cancel` | tells the orchestrator that nobody waits any more |
//! | `tell` | tells it what became of a turn |
//! | [`stats`] | what is counted |
//!
//! What is absent on purpose: no task and no channel between an upstream's connection and the caller, so that not reading is
//! backpressure and dropping is cancelling (a socket that many turns share has a task, and credit in its place); no retry once a byte of an answer has come; no redirect is ever followed.

use std::{
    fmt,
    sync::{Arc, OnceLock, Weak},
    time::Duration,
};

use headgate_contracts::{Fault, Prompt};
use http::HeaderValue;
use tokio::{
    runtime::Handle,
    sync::Semaphore,
    task::AbortHandle,
    time::{MissedTickBehavior, interval},
};
use tower::retry::budget::TpsBudget;

mod alarm;
mod answer;
mod balance;
mod cancel;
mod connect;
mod endpoint;
mod exchange;
mod forward;
mod hop;
mod http1;
mod line;
mod open;
mod pace;
mod request;
pub mod settings;
pub mod stats;
mod tell;

pub use alarm::Alarm;
pub use answer::Answer;
pub use forward::{Forwarded, ForwardedBody, Outgoing, Tunnel};
pub use line::Line;
pub use settings::{Hop, Invalid, Protocol, Settings};
pub use stats::{EndpointHealth, Stats};

use crate::{balance::Fleet, endpoint::Endpoint};

/// A named set of endpoints that speak one protocol. Cheap to clone; the last clone that goes ends the health checks.
#[derive(Clone)]
pub struct Upstream(Arc<Shared>);

/// What all turns of an upstream share.
pub(crate) struct Shared {
    name: Arc<str>,
    settings: Settings,
    fleet: Fleet,
    stats: Stats,
    budget: TpsBudget,
    authorization: Option<HeaderValue>,
    cancels: Arc<Semaphore>,
    watch: OnceLock<Watch>,
}

impl Upstream {
    /// An upstream of that name. Nothing is connected yet; inside a runtime the health checks begin, else with the first turn.
    ///
    /// Errors: [`Invalid`], naming the setting and what it should have been.
    pub fn new(name: &str, settings: Settings) -> Result<Upstream, Invalid> {
        if settings.endpoints.is_empty() {
            return Err(Invalid::NoEndpoint);
        }
        if !(0.0..=1.0).contains(&settings.retry.share) {
            return Err(Invalid::Setting { name: "retry.share", expected: "a share from 0 to 1" });
        }
        if settings.path.as_deref().is_some_and(|path| !path.starts_with('/') || path.bytes().any(|b| !b.is_ascii_graphic())) {
            return Err(Invalid::Setting { name: "path", expected: "an absolute path" });
        }
        if settings.hop == Hop::WebSocket && settings.protocol != Protocol::Orchestrator {
            return Err(Invalid::Setting { name: "hop", expected: "server-sent events, unless an orchestrator is asked" });
        }
        let authorization = settings.authorization.as_ref().map(|secret| {
            let secret = secret.expose();
            let text = if secret.contains(' ') { secret.to_owned() } else { format!("Bearer {secret}") };
            let mut value =
                HeaderValue::from_str(&text).map_err(|_| Invalid::Setting { name: "authorization", expected: "a header's value" })?;
            value.set_sensitive(true);
            Ok(value)
        });
        let mut connector = None;
        let mut endpoints = Vec::with_capacity(settings.endpoints.len());
        for uri in &settings.endpoints {
            // One TLS set-up for all: its roots and session tickets are shared.
            let endpoint = Endpoint::new(uri, settings.idle, || match &connector {
                Some(made) => Ok(Clone::clone(made)),
                None => Ok(connector.insert(connect::tls(&settings.tls)?).clone()),
            })?;
            endpoints.push(Arc::new(endpoint));
        }
        let upstream = Upstream(Arc::new(Shared {
            name: name.into(),
            fleet: Fleet::new(endpoints, settings.balance, settings.health, settings.timeouts.connect)?,
            stats: Stats::default(),
            budget: TpsBudget::new(Duration::from_secs(10), settings.retry.floor.min(1000), settings.retry.share),
            authorization: authorization.transpose()?,
            cancels: Arc::new(Semaphore::new(cancel::MAX_UNDER_WAY)),
            watch: OnceLock::new(),
            settings,
        }));
        upstream.watch();
        Ok(upstream)
    }

    /// Asks for the answer to a prompt and waits for its head.
    ///
    /// The request is encoded from the parsed form and sealed (`prompt.seal`) over its exact bytes; with it go the headers
    /// filters put on the prompt and the trace, and nothing else a client wrote. It is tried again on another endpoint only
    /// while no byte of a response has come, or on 502, 503 and 504; a kept connection that turns out dead is replaced by a
    /// fresh one. A turn for an orchestrator is tried elsewhere only where it surely was not taken: no connection was made, or
    /// the orchestrator says so itself. Cancel safe in the sense that matters: dropping the future closes the connection and cancels the turn.
    ///
    /// Errors: `upstream_connect_failed`, `upstream_timeout_first_byte`, `upstream_reset`, `upstream_protocol_error`,
    /// `upstream_refused`, `overloaded`, `verdict_rejected`, or the orchestrator's own code; and what the seal says.
    pub async fn open(&self, prompt: &Prompt) -> Result<Answer, Fault> {
        self.watch();
        open::open(&self.0, prompt).await
    }

    /// Forwards a request as it is, body, trailers and protocol switch included, and waits for the head of the response.
    ///
    /// Hop-by-hop headers and what `Connection` nominates are removed, and so is what clients say about policy; `Host` becomes
    /// the endpoint's. Whatever else the endpoint should know (`forwarded`, `traceparent`) is put there by the caller before.
    /// To switch protocols the caller takes its client's `hyper::upgrade::on` first, and runs [`Forwarded::tunnel`] on it once
    /// the 101 is sent. Another endpoint is tried only while no connection could be made.
    ///
    /// Errors: `upstream_connect_failed`, `upstream_timeout_first_byte` (counted from the request's last progress),
    /// `upstream_reset`, `upstream_protocol_error`, `client_closed` (the request's body broke).
    pub async fn forward<B: Outgoing>(&self, request: http::Request<B>) -> Result<Forwarded, Fault> {
        self.watch();
        forward::forward(&self.0, request).await
    }

    /// How each endpoint is, in the order of the settings.
    pub fn health(&self) -> Vec<EndpointHealth> {
        let fleet = &self.0.fleet;
        let each = fleet.endpoints().iter().zip(fleet.ready());
        each.map(|(endpoint, ready)| EndpointHealth {
            endpoint: endpoint.name.to_string(),
            ready,
            in_flight: endpoint.in_flight.load(std::sync::atomic::Ordering::Relaxed),
            idle: endpoint.kept(),
        })
        .collect()
    }

    /// What was counted since it was built.
    pub fn stats(&self) -> &Stats {
        &self.0.stats
    }

    /// The name given to it.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// The settings it was built with.
    pub fn settings(&self) -> &Settings {
        &self.0.settings
    }

    /// The most memory one open answer takes here, in bytes, whatever the upstream sends: one unfinished event and its joined
    /// copy, one read in both buffers of a batch, or a whole answer; and the buffers of TLS.
    pub fn max_answer_bytes(&self) -> usize {
        let limits = self.0.settings.limits;
        let tls = if self.0.fleet.endpoints().iter().any(|endpoint| endpoint.target.tls.is_some()) { 64 << 10 } else { 0 };
        let events = 2 * limits.event + 3 * exchange::READ_BYTES;
        // What has come and what has been taken over: the credit, and the event that took the last of it.
        let frames = match self.0.settings.hop {
            Hop::Events => 0,
            Hop::WebSocket => 2 * (headgate_contracts::wire::hop::WINDOW as usize + limits.event),
        };
        events.max(3 * limits.whole) + frames + limits.head + tls
    }

    /// Sees to it that health checks run, if a runtime is there.
    fn watch(&self) {
        if let Ok(runtime) = Handle::try_current() {
            self.0
                .watch
                .get_or_init(|| Watch(runtime.spawn(watch(Arc::downgrade(&self.0), self.0.settings.health.interval)).abort_handle()));
        }
    }
}

/// Between two rounds of sweeping kept connections, where health checks are switched off.
const SWEEP: Duration = Duration::from_secs(5);

/// Checks endpoints and closes connections kept too long, until the upstream is gone.
async fn watch(shared: Weak<Shared>, checks: Option<Duration>) {
    let mut ticks = interval(checks.unwrap_or(SWEEP).max(Duration::from_millis(10)));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let Some(shared) = shared.upgrade() else { return };
        if checks.is_some() {
            shared.fleet.check().await;
        }
        for endpoint in shared.fleet.endpoints() {
            endpoint.sweep();
        }
    }
}

struct Watch(AbortHandle);

impl Drop for Watch {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Where a fault happened, and all its causes: for the log, which shows upstream and endpoint.
#[derive(Debug, thiserror::Error)]
#[error("{upstream} at {endpoint}{causes}")]
struct At {
    upstream: Arc<str>,
    endpoint: Arc<str>,
    causes: String,
}

impl Shared {
    /// The same fault, saying where.
    fn placed(&self, endpoint: &Endpoint, fault: Fault) -> Fault {
        let mut causes = String::new();
        let mut next = std::error::Error::source(&fault);
        while let Some(cause) = next {
            causes.push_str(": ");
            causes.push_str(&cause.to_string());
            next = cause.source();
        }
        fault.caused_by(At { upstream: Arc::clone(&self.name), endpoint: Arc::clone(&endpoint.name), causes })
    }
}

impl fmt::Debug for Upstream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Upstream").field("name", &self.0.name).field("endpoints", &self.0.settings.endpoints).finish_non_exhaustive()
    }
}
