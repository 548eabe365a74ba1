//! Knows which tenants are in training mode, without asking for every turn.

use std::{
    collections::{HashMap, HashSet},
    fmt,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use futures_util::{FutureExt, StreamExt};
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{family::Family, gauge::Gauge},
};
use tokio::time::{Instant, sleep};

use crate::{Held, Locks, Unanswered};

/// Between two looks at the locks, where nobody says that they changed.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// A look that is older says nothing any more.
const FRESH: Duration = Duration::from_secs(3);
/// The most tenants that have a gauge of their own.
const MOST_SHOWN: usize = 100;

/// How a tenant's turns run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ModeNow {
    /// As always.
    Enforce,
    /// In training mode, under the lock with this fence.
    Training(u64),
    /// It was in training mode a moment ago, and nobody can say whether it still is.
    Unknown,
}

/// Which tenants are in training mode: as it was a moment ago, and as it is.
pub struct Modes {
    locks: Locks,
    seen: RwLock<Seen>,
    states: Family<Tenant, Gauge>,
    unknown: Gauge,
}

#[derive(Default)]
struct Seen {
    at: Option<Instant>,
    /// Fence and end of every lock that was held.
    held: HashMap<String, (u64, Instant)>,
    shown: HashSet<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Tenant {
    tenant: String,
}

impl Modes {
    /// Those that `locks` say, once [`Modes::follow`] runs.
    pub fn new(locks: Locks) -> Arc<Modes> {
        let unknown = Gauge::default();
        unknown.set(1);
        Arc::new(Modes { locks, seen: RwLock::default(), states: Family::default(), unknown })
    }

    /// The locks that they are read from.
    pub fn locks(&self) -> &Locks {
        &self.locks
    }

    /// How a turn of `tenant` that begins now runs, by what was seen last. A lock that cannot be read any more counts as unknown
    /// until its time is over, and then as given up: it could not be renewed either. Where no lock was ever read, turns run as always:
    /// what is not marked is used for nothing that training mode is for.
    pub fn of(&self, tenant: &str) -> ModeNow {
        let seen = self.seen.read().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        match seen.held.get(tenant) {
            Some((fence, until)) if now < *until => match seen.at {
                Some(at) if now.saturating_duration_since(at) <= FRESH => ModeNow::Training(*fence),
                _ => ModeNow::Unknown,
            },
            _ => ModeNow::Enforce,
        }
    }

    /// Whether the lock of `tenant` is held with this `fence` at this moment.
    ///
    /// Errors: nobody can say.
    pub async fn holds(&self, tenant: &str, fence: u64) -> Result<bool, Unanswered> {
        Ok(self.locks.read(tenant).await?.is_some_and(|held| held.fence == Some(fence)))
    }

    /// Looks at the locks, and looks again, for as long as it is polled.
    pub async fn follow(&self) {
        let (mut changes, begun, mut is_said) = (None, Instant::now(), false);
        loop {
            if changes.is_none() {
                changes = self.locks.changes().await.ok();
            }
            if self.look().await.is_err() {
                changes = None;
            }
            let at = self.seen.read().unwrap_or_else(PoisonError::into_inner).at;
            let is_unknown = at.unwrap_or(begun).elapsed() > FRESH;
            self.unknown.set((is_unknown || at.is_none()).into());
            match (is_unknown, std::mem::replace(&mut is_said, is_unknown)) {
                (true, false) => {
                    tracing::warn!(mode = "unknown", "nobody can say which tenants are in training mode: no turn is signed as one of it")
                }
                (false, true) => tracing::info!("it can be said again which tenants are in training mode"),
                _ => {}
            }
            let Some(messages) = &mut changes else {
                sleep(LOOK_AGAIN).await;
                continue;
            };
            let told = tokio::select! {
                () = sleep(LOOK_AGAIN) => Some(()),
                told = messages.next() => told,
            };
            match told {
                Some(()) => while let Some(Some(())) = messages.next().now_or_never() {},
                None => changes = None,
            }
        }
    }

    /// Looks once. The tenants that are listed and have no lock.
    ///
    /// Errors: nobody can say; what was seen before stands for a moment.
    pub async fn look(&self) -> Result<Vec<String>, Unanswered> {
        let asked = Instant::now();
        let (locks, without) = self.locks.all().await?;
        let held = |(tenant, Held { fence, left, .. }): (String, Held)| Some((tenant, (fence?, asked + left)));
        let held: HashMap<String, (u64, Instant)> = locks.into_iter().filter_map(held).collect();
        let mut seen = self.seen.write().unwrap_or_else(PoisonError::into_inner);
        for tenant in held.keys() {
            if seen.shown.len() < MOST_SHOWN {
                seen.shown.insert(tenant.clone());
            }
        }
        for tenant in &seen.shown {
            self.states.get_or_create(&Tenant { tenant: tenant.clone() }).set(held.contains_key(tenant).into());
        }
        (seen.at, seen.held) = (Some(asked), held);
        Ok(without)
    }

    /// Adds the gauge to what is exported.
    pub fn register(&self, registry: &mut prometheus_client::registry::Registry) {
        let help = "1 while the tenant is in training mode; the first 100 tenants that were";
        registry.register("training_mode_state", help, self.states.clone());
        let help = "1 while nobody can say which tenants are in training mode";
        registry.register("training_mode_unknown", help, self.unknown.clone());
    }
}

impl fmt::Debug for Modes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Modes").field("locks", &self.locks).finish_non_exhaustive()
    }
}
