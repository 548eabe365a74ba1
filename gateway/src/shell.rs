//! The process: sockets, workers, signals, drain. Everything that runs is started and stopped here.
//!
//! A worker is a thread with a runtime of its own: a connection stays on the core that accepted it. The operators' listener,
//! an orchestrator and a model of the same process run beside, on the runtime that called [`Process::start`].

use std::{
    io,
    net::SocketAddr,
    sync::Arc,
    thread::{self, JoinHandle},
    time::Duration,
};

use headgate_config::plan::{Plan, PolicyKey, VerdictKeys};
use headgate_contracts::Gone;
use headgate_policy::{Ring, Verifier};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::{net::TcpListener, sync::watch, task::JoinSet, time::timeout};

use crate::{
    admin::Admin,
    build::{self, Lasting, Unbuildable},
    keys,
    live::App,
    registry::Watch,
    serve::{Drain, Limits, Service, serve},
    tls::Tls,
};

/// Why a process cannot start.
#[derive(Debug, thiserror::Error)]
pub enum Unstartable {
    /// An address cannot be listened on.
    #[error("cannot listen on {address} ({setting})")]
    Listen {
        /// Which.
        address: SocketAddr,
        /// Where it is written.
        setting: &'static str,
        /// Why.
        source: io::Error,
    },
    /// A thread cannot be started.
    #[error("cannot start a worker")]
    Worker(#[source] io::Error),
    /// A part of the plan cannot run here.
    #[error(transparent)]
    Unbuildable(#[from] Unbuildable),
}

/// Sockets that the caller has opened already: for ports that the system chooses.
#[derive(Default)]
pub struct Sockets {
    /// For clients.
    pub clients: Option<std::net::TcpListener>,
    /// For operators.
    pub admin: Option<std::net::TcpListener>,
    /// For gateways.
    pub orchestrator: Option<std::net::TcpListener>,
    /// For the orchestrator.
    pub slm: Option<std::net::TcpListener>,
}

/// A running process.
pub struct Process {
    /// Where clients connect.
    pub clients: Option<SocketAddr>,
    /// Where operators look.
    pub admin: Option<SocketAddr>,
    /// Where gateways connect.
    pub orchestrator: Option<SocketAddr>,
    /// Where the orchestrator connects.
    pub slm: Option<SocketAddr>,
    /// The gateway.
    pub app: App,
    /// What outlives an exchange of configurations.
    pub lasting: Lasting,
    /// The certificate, for an exchange.
    pub tls: Option<Tls>,
    drain: Duration,
    workers: Vec<JoinHandle<()>>,
    beside: JoinSet<()>,
    model: JoinSet<()>,
    closing: watch::Sender<bool>,
    admin_drain: Drain,
}

/// Operators' connections at once.
const ADMIN_CONNECTIONS: usize = 64;
/// Open files that are no client's and no upstream's: operators' connections, listeners, logs, what the runtime needs.
const OTHER_FILES: u64 = ADMIN_CONNECTIONS as u64 + 64;
/// How long turns may take to say their last word once the drain time is over.
const LAST_WORD: Duration = Duration::from_secs(2);

fn bind(given: Option<std::net::TcpListener>, address: SocketAddr, setting: &'static str) -> Result<std::net::TcpListener, Unstartable> {
    let opened = given.map_or_else(|| std::net::TcpListener::bind(address), Ok);
    let listener = opened.and_then(|listener| listener.set_nonblocking(true).map(|()| listener));
    listener.map_err(|source| Unstartable::Listen { address, setting, source })
}

fn adopt(listener: std::net::TcpListener, setting: &'static str) -> Result<(TcpListener, SocketAddr), Unstartable> {
    let address = listener.local_addr().unwrap_or(SocketAddr::from(([0, 0, 0, 0], 0)));
    let adopted = TcpListener::from_std(listener).map_err(|source| Unstartable::Listen { address, setting, source })?;
    Ok((adopted, address))
}

/// So many connections as the system's limit on open files allows, and no more than `wanted`: most have a second one upstream.
///
/// A process that runs out of files can accept nobody, operators neither; one that knows its limit closes who is too many.
fn affordable(wanted: usize) -> usize {
    let limit = getrlimit(Resource::Nofile);
    // The soft limit is low for the sake of `select`, which nobody calls here.
    let is_raised = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }).is_ok();
    let Some(files) = (if is_raised { limit.maximum } else { limit.current }) else { return wanted };
    let most = usize::try_from(files.saturating_sub(OTHER_FILES) / 2).unwrap_or(usize::MAX).max(1);
    if most < wanted {
        tracing::warn!(
            files,
            wanted,
            connections = most,
            "the system's limit on open files allows fewer connections than limits.connections"
        );
    }
    most.min(wanted)
}

impl Process {
    /// Starts everything that the plan names. All sockets are open when it returns.
    pub async fn start(plan: &Plan, sockets: Sockets) -> Result<Process, Unstartable> {
        let lasting = Lasting::of(plan)?;
        let (closing, closed) = watch::channel(false);
        let closed = move || {
            let mut closed = closed.clone();
            // An error means that the process is gone without a word: that is a shutdown too.
            async move { drop(closed.wait_for(|closed| *closed).await) }
        };
        let (mut beside, mut model, mut workers) = (JoinSet::new(), JoinSet::new(), Vec::new());
        let (mut slm_at, mut orchestrator_at, mut clients_at, mut admin_at) = (None, None, None, None);

        // Who learns of our keys first-hand.
        let mut believer = None;
        // The model first, then who asks it: nobody finds the next one missing.
        if let Some(told) = &plan.slm {
            let (listener, address) = adopt(bind(sockets.slm, told.listen, "slm.listen")?, "slm.listen")?;
            let options = headgate_slm::Options { pace: told.pace, drain: plan.drain, ..Default::default() };
            model.spawn(headgate_slm::serve(listener, build::slm(told)?, options, closed()));
            slm_at = Some(address);
        }
        if let Some(told) = &plan.orchestrator {
            let (listener, address) = adopt(bind(sockets.orchestrator, told.listen, "orchestrator.listen")?, "orchestrator.listen")?;
            let orchestrator = build::orchestrator(plan, told, &lasting)?;
            lasting.meters.register(|registry| orchestrator.register(registry));
            if let VerdictKeys::Url(url) = &told.keys {
                let (url, trusted) = (url.to_string(), Arc::clone(&orchestrator));
                orchestrator.wait_for_keys();
                let follow = keys::follow(url, told.keys_refresh, move |jwks| {
                    let believe = |verifier| trusted.trust_for(verifier, keys::VERDICT_KEYS_LIFETIME);
                    Verifier::from_jwks(jwks).map(believe).map_err(|error| error.to_string())
                });
                beside.spawn(follow);
            }
            if told.keys == VerdictKeys::Own {
                believer = Some(Arc::clone(&orchestrator));
            }
            model.spawn(headgate_orchestrator::serve(listener, orchestrator, closed()));
            orchestrator_at = Some(address);
        }
        let tls = build::tls(plan)?;
        let app = App::new(build::live(plan, &lasting)?, lasting.meters.clone(), affordable(plan.limits.connections));
        lasting.meters.register(|registry| lasting.courier.register(registry));
        beside.spawn(lasting.courier.clone().run());
        let limits = Limits {
            handshake: plan.limits.handshake,
            head: plan.limits.head,
            stall: plan.limits.stall,
            idle: plan.limits.idle,
            head_bytes: plan.limits.head_bytes,
            fields: plan.limits.head_fields,
        };
        if let Some(address) = plan.listen {
            let listener = bind(sockets.clients, address, "listen")?;
            clients_at = listener.local_addr().ok();
            for number in 0..plan.workers.max(1) {
                let listener = listener.try_clone().map_err(|source| Unstartable::Listen { address, setting: "listen", source })?;
                workers.push(worker(number, listener, tls.clone(), limits.clone(), app.clone(), app.drain().clone())?);
            }
        }
        let admin_drain = Drain::new(ADMIN_CONNECTIONS);
        if let Some(address) = plan.admin {
            let (listener, address) = adopt(bind(sockets.admin, address, "admin.listen")?, "admin.listen")?;
            beside.spawn(serve(listener, None, limits, Admin(app.clone()), admin_drain.clone()));
            admin_at = Some(address);
        }
        if let (Some(PolicyKey::File(path)), Some(signing)) = (plan.policy.as_ref().map(|policy| &policy.key), &lasting.signing) {
            // Believed before it signs.
            let taken = move |ring: &Ring| {
                if let Some(orchestrator) = &believer {
                    orchestrator.trust(ring.verifier());
                }
            };
            beside.spawn(Arc::clone(signing).follow(path.clone(), taken));
        }
        beside.spawn(lasting.policies.clone().follow());
        let modes = lasting.modes.clone();
        beside.spawn(async move { modes.follow().await });
        if let Some(training) = plan.orchestrator.as_ref().and_then(|told| told.training.as_ref()) {
            beside.spawn(lasting.issuers.clone().follow(training.admins.issuer.clone()));
        }
        if plan.policy.as_ref().is_some_and(|policy| policy.registry.is_some()) {
            let watch = Watch::default();
            lasting.meters.register(|registry| watch.register(registry));
            beside.spawn(watch.over(app.clone()));
        }
        lasting.meters.register(|registry| {
            lasting.policies.register(registry);
            lasting.modes.register(registry);
            if let Some(redis) = &lasting.redis {
                redis.register(registry);
            }
        });
        for url in build::key_urls(plan) {
            beside.spawn(lasting.keys.clone().follow(url));
        }
        Ok(Process {
            clients: clients_at,
            admin: admin_at,
            orchestrator: orchestrator_at,
            slm: slm_at,
            app,
            lasting,
            tls,
            drain: plan.drain,
            workers,
            beside,
            model,
            closing,
            admin_drain,
        })
    }

    /// Stops: no new connections and no new turns; open turns end by themselves within the drain time, the others are told.
    /// Returns when nothing runs any more; whether all turns ended by themselves.
    pub async fn stop(mut self) -> bool {
        let drain = self.app.drain().clone();
        drain.begin();
        tracing::info!(connections = drain.connections(), turns = self.app.turns().len(), "draining");
        let ended = timeout(self.drain, drain.closed()).await.is_ok();
        if !ended {
            let cut = self.app.turns().stop_all(Gone::Drained);
            tracing::warn!(cut, "drain time is over");
            let _ = timeout(LAST_WORD, drain.closed()).await;
        }
        // Turns have said their last word; what became of them is told before whoever is told it stops.
        self.lasting.courier.close(LAST_WORD).await;
        // What is behind the gateway stops after it: its turns were ours.
        self.closing.send_replace(true);
        let _ = timeout(LAST_WORD, async { while self.model.join_next().await.is_some() {} }).await;
        self.admin_drain.begin();
        self.beside.abort_all();
        self.model.abort_all();
        drain.end();
        let workers = self.workers;
        // A worker's runtime ends with its accept loop; joining must not block this thread's own tasks.
        let _ = tokio::task::spawn_blocking(move || workers.into_iter().for_each(|worker| drop(worker.join()))).await;
        tracing::info!(ended_by_themselves = ended, "stopped");
        ended
    }
}

fn worker(
    number: usize,
    listener: std::net::TcpListener,
    tls: Option<Tls>,
    limits: Limits,
    service: impl Service,
    drain: Drain,
) -> Result<JoinHandle<()>, Unstartable> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Unstartable::Worker)?;
    let run = move || {
        runtime.block_on(async move {
            match TcpListener::from_std(listener) {
                Ok(listener) => serve(listener, tls, limits, service, drain.clone()).await,
                Err(error) => tracing::error!(%error, "a worker cannot accept"),
            }
            // Its connections live on this runtime: it ends when the process does.
            drain.ended().await;
        });
    };
    thread::Builder::new().name(format!("worker-{number}")).spawn(run).map_err(Unstartable::Worker)
}
