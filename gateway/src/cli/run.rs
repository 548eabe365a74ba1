//! `headgate run`: what a config names, until it is told to stop.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use headgate_config::{Environment, Plan, plan::Logs as Manner};
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::{EX_CONFIG, EX_UNAVAILABLE, fail};
use crate::{
    reload,
    shell::{Process, Sockets},
    telemetry::logs::{self, Format, Logs},
};

/// Which config, and for which environment.
#[derive(clap::Args)]
#[command(
    after_help = "Signals: SIGTERM and SIGINT drain (open turns end, new ones get 503), a second one stops at once; SIGHUP reads the config anew.\nLogs go to standard error, one JSON line a turn; HEADGATE_LOG=debug shows more.\n\nExamples:\n  headgate run headgate.yaml\n  headgate run --env production /etc/headgate/headgate.yaml"
)]
pub struct Args {
    /// The config file.
    #[arg(default_value = "headgate.yaml", env = "HEADGATE_CONFIG")]
    pub config: PathBuf,
    /// Lay the overlay of this environment over it: local, preview, staging or production (`headgate.production.yaml` beside `headgate.yaml`).
    #[arg(long, env = "HEADGATE_ENV")]
    pub env: Option<Environment>,
}

/// How much of a config is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// Everything that it names.
    All,
    /// The orchestrator alone.
    Orchestrator,
}

impl Part {
    fn of(self, mut plan: Plan) -> Plan {
        if self == Part::Orchestrator {
            plan.routes.clear();
            (plan.listen, plan.slm) = (None, None);
            // The gateway's own: a spool has one process that writes to it.
            plan.spool = None;
        }
        plan
    }
}

/// Runs to the end; 0 when it was told to stop and all turns ended by themselves.
pub async fn run(args: Args, part: Part) -> ExitCode {
    let load = {
        let (path, environment) = (args.config.clone(), args.env);
        move || headgate_config::load(&path, environment, &|name| std::env::var(name).ok()).map(|plan| part.of(plan))
    };
    let plan = match load() {
        Ok(plan) => plan,
        Err(faults) => return fail(&faults, EX_CONFIG),
    };
    let logs = match begin_logs(&plan) {
        Ok(logs) => logs,
        Err(error) => return fail(&error, EX_CONFIG),
    };
    // Before anybody can see us run: a signal that nobody listens for ends the process where it stands.
    let mut signals = Signals::listen();
    let process = match Process::start(&plan, Sockets::default()).await {
        Ok(process) => process,
        Err(error) => return fail(&error, EX_UNAVAILABLE),
    };
    for warning in &plan.warnings {
        tracing::warn!("{warning}");
    }
    tracing::info!(
        clients = process.clients.map(tracing::field::display),
        admin = process.admin.map(tracing::field::display),
        orchestrator = process.orchestrator.map(tracing::field::display),
        slm = process.slm.map(tracing::field::display),
        routes = plan.routes.len(),
        workers = plan.workers,
        memory_ceiling_bytes = plan.memory_ceiling_bytes(),
        "running"
    );
    let reload = tokio::spawn(reload::follow(plan, load, process.app.clone(), process.lasting.clone(), process.tls.clone()));
    signals.stop().await;
    reload.abort();
    let ended = tokio::select! {
        ended = process.stop() => ended,
        () = signals.stop() => false,
    };
    logs.end(Duration::from_secs(5)).await;
    if ended { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

pub(super) fn begin_logs(plan: &Plan) -> Result<Logs, opentelemetry_otlp::ExporterBuildError> {
    let eyes = &plan.observability;
    let format = match eyes.logs {
        Manner::Json => Format::Json,
        Manner::Text => Format::Text,
    };
    let collector = eyes.otlp.as_ref().map(ToString::to_string);
    logs::begin(format, &eyes.level, collector.as_deref().map(|endpoint| (endpoint, eyes.sampling)))
}

/// The signals a process is told to stop by. None is missed from the moment this is made.
pub(super) struct Signals {
    stop: Option<(Signal, Signal)>,
    // Listened for by whoever reloads, which may begin later; until then it must not end the process.
    _hangup: Option<Signal>,
}

impl Signals {
    pub(super) fn listen() -> Signals {
        let stop = signal(SignalKind::terminate()).ok().zip(signal(SignalKind::interrupt()).ok());
        Signals { stop, _hangup: signal(SignalKind::hangup()).ok() }
    }

    /// Ready each time the process is told to stop.
    pub(super) async fn stop(&mut self) {
        // Without signals the process can only be killed.
        let Some((terminate, interrupt)) = &mut self.stop else { return std::future::pending().await };
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    }
}

pub(super) async fn told_to_stop() {
    Signals::listen().stop().await;
}
