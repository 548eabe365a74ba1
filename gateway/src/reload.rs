//! Reads the config anew when its files change or SIGHUP comes: read, check, build, and only then exchange.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use headgate_config::{Faults, Plan};
use notify::{RecursiveMode, Watcher};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    time::sleep,
};

use crate::{
    build::{self, Lasting},
    live::App,
    tls::Tls,
};

/// Editors and volume mounts change files in several steps: what is quiet for so long is whole.
const QUIET: Duration = Duration::from_millis(250);

/// Watches, for as long as it is polled. A config with faults, or one that cannot be built, never replaces the running one.
pub async fn follow(plan: Plan, load: impl Fn() -> Result<Plan, Faults>, app: App, lasting: Lasting, tls: Option<Tls>) {
    let (changed, mut changes) = mpsc::channel(1);
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        // One pending change is enough: whoever reads, reads everything.
        if event.is_ok_and(|event| !event.kind.is_access()) {
            let _ = changed.try_send(());
        }
    });
    let mut watched = BTreeSet::new();
    let mut watch = |plan: &Plan| {
        // Folders, not files: a file that is replaced by renaming is a new file.
        let folders: BTreeSet<PathBuf> = plan
            .watched()
            .filter_map(|file| file.parent())
            .map(|folder| if folder.as_os_str().is_empty() { ".".into() } else { folder.into() })
            .collect();
        for folder in folders.difference(&watched.clone()) {
            if let Ok(watcher) = &mut watcher {
                match watcher.watch(folder, RecursiveMode::NonRecursive) {
                    Ok(()) => drop(watched.insert(folder.clone())),
                    Err(error) => tracing::warn!(folder = %folder.display(), %error, "cannot watch for changes; SIGHUP still works"),
                }
            }
        }
    };
    watch(&plan);
    let mut stamp = stamps(&plan);
    let Ok(mut hangup) = signal(SignalKind::hangup()) else { return };
    let mut running = plan;
    loop {
        let asked = tokio::select! {
            _ = hangup.recv() => true,
            change = changes.recv() => match change {
                Some(()) => false,
                None => std::future::pending().await,
            },
        };
        if !asked {
            sleep(QUIET).await;
            while changes.try_recv().is_ok() {}
            // A folder has other files too, perhaps our own log: what did not change is not read again.
            let now = stamps(&running);
            if now == stamp {
                continue;
            }
            stamp = now;
        }
        if let Some(tls) = &tls
            && let Err(error) = tls.reload()
        {
            tracing::error!(%error, "the certificate stays as it was");
        }
        match load() {
            Err(faults) => {
                app.meters().reloaded("refused");
                tracing::error!(faults = faults.0.len(), "the config has faults, the running one stays: {faults}");
            }
            Ok(plan) => match build::live(&plan, &lasting) {
                Err(error) => {
                    app.meters().reloaded("refused");
                    tracing::error!(%error, "the config cannot run, the running one stays");
                }
                Ok(live) => {
                    let stays = |plan: &Plan| (plan.listen, plan.admin, plan.workers, plan.tls.clone(), plan.limits.clone());
                    if stays(&plan) != stays(&running) {
                        tracing::warn!(
                            "listen, admin, workers, connection limits and the names of certificate files change only with a restart"
                        );
                    }
                    app.exchange(live);
                    app.meters().reloaded("taken");
                    tracing::info!(routes = plan.routes.len(), "the config was exchanged");
                    watch(&plan);
                    stamp = stamps(&plan);
                    running = plan;
                }
            },
        }
    }
}

/// What tells that a file of the config is another one: its length and when it was written. Follows links, as volume mounts swap them.
fn stamps(plan: &Plan) -> Vec<(PathBuf, Option<(u64, SystemTime)>)> {
    let stamp = |file: &Path| {
        let about = std::fs::metadata(file).ok();
        (file.to_owned(), about.and_then(|about| Some((about.len(), about.modified().ok()?))))
    };
    plan.watched().map(stamp).collect()
}
