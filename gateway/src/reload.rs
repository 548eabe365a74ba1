//! Reads the config anew when its files change or SIGHUP comes: read, check, build, and only then exchange.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    time::Duration,
};

use headgate_config::{Faults, Plan};
use headgate_policy::Digest;
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

/// Larger than any config, list or key: of larger files the length has to tell.
const MAX_READ: u64 = 4 << 20;

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
    let mut seen = made_of(&plan, &BTreeMap::new());
    let Ok(mut hangup) = signal(SignalKind::hangup()) else { return };
    let mut running = plan;
    // What changed after it was read and before it was watched: nobody will tell.
    let mut is_due = contents(&running) != seen;
    let mut refused = None;
    loop {
        let asked = !std::mem::take(&mut is_due)
            && tokio::select! {
                _ = hangup.recv() => true,
                change = changes.recv() => match change {
                    Some(()) => false,
                    None => std::future::pending().await,
                },
            };
        if !asked {
            sleep(QUIET).await;
            while changes.try_recv().is_ok() {}
        }
        let now = contents(&running);
        // A folder has other files too, perhaps our own log: what did not change is not read again. But what was refused may have
        // named a file that is only written now.
        if !asked && now == seen && refused.is_none() {
            continue;
        }
        let is_new = asked || now != seen;
        seen = now;
        if let Some(tls) = tls.as_ref().filter(|_| is_new)
            && let Err(error) = tls.reload()
        {
            tracing::error!(%error, "the certificate stays as it was");
        }
        match load() {
            Err(faults) => {
                // Once, however often it is looked at.
                if is_new || refused.as_ref() != Some(&faults) {
                    app.meters().reloaded("refused");
                    tracing::error!(faults = faults.0.len(), "the config has faults, the running one stays: {faults}");
                }
                refused = Some(faults);
            }
            Ok(plan) => match build::live(&plan, &lasting) {
                Err(error) => {
                    refused = None;
                    app.meters().reloaded("refused");
                    tracing::error!(%error, "the config cannot run, the running one stays");
                }
                Ok(live) => {
                    let registry = |plan: &Plan| plan.policy.as_ref().and_then(|policy| Some(policy.registry.as_ref()?.folder.clone()));
                    let redis =
                        |plan: &Plan| plan.redis.as_ref().map(|redis| (redis.url.expose().to_owned(), redis.ca.clone(), redis.budget));
                    let stays = |plan: &Plan| {
                        (
                            plan.listen,
                            plan.admin,
                            plan.workers,
                            plan.tls.clone(),
                            plan.limits.clone(),
                            redis(plan),
                            registry(plan),
                            plan.spool.clone(),
                        )
                    };
                    if stays(&plan) != stays(&running) {
                        tracing::warn!(
                            "listen, admin, workers, connection limits, redis, where the policy registry and the spool are and the names of certificate files change only with a restart"
                        );
                    }
                    app.exchange(live);
                    app.meters().reloaded("taken");
                    tracing::info!(routes = plan.routes.len(), "the config was exchanged");
                    watch(&plan);
                    seen = made_of(&plan, &seen);
                    running = plan;
                    is_due = contents(&running) != seen;
                    refused = None;
                }
            },
        }
    }
}

/// A file's length and digest; nothing where it cannot be read.
type Content = Option<(u64, Option<Digest>)>;

/// What a plan was made of, as it was read. Of files that others read, certificates above all: what was seen before that, or is now.
fn made_of(plan: &Plan, before: &BTreeMap<PathBuf, Content>) -> BTreeMap<PathBuf, Content> {
    let read = plan.made_of().map(|(file, text)| (file.to_owned(), Some((text.len() as u64, Some(Digest::of(text.as_bytes()))))));
    let others = contents(plan).into_iter().map(|(file, now)| {
        let before = before.get(&file).copied().unwrap_or(now);
        (file, before)
    });
    others.chain(read).collect()
}

/// What the files of a config are now. Contents, not times: a clock that moves in steps of milliseconds misses what is written
/// twice in one of them.
fn contents(plan: &Plan) -> BTreeMap<PathBuf, Content> {
    let content = |file: &Path| {
        let length = std::fs::metadata(file).ok()?.len();
        let digest = (length <= MAX_READ).then(|| std::fs::read(file).ok()).flatten().map(|bytes| Digest::of(&bytes));
        Some((length, digest))
    };
    plan.watched().map(|file| (file.to_owned(), content(file))).collect()
}
