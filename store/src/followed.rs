//! Follows a store of signed entries, and answers for it as long as it can be reached.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use futures_util::{FutureExt, StreamExt};
use headgate_policy::{Digest, Entry, Installed, Memory, Registry, Unavailable, Verifier};
use prometheus_client::metrics::{counter::Counter, gauge::Gauge};
use tokio::time::{Instant, sleep};

use crate::{Store, store::Unreachable};

/// How long what was read last is trusted once the store cannot be reached.
pub const TRUSTED_FOR: Duration = Duration::from_secs(60);
/// The most tenants with an entry of their own.
pub const MOST_TENANTS: usize = 10_000;
/// After a failed read.
const RETRY: Duration = Duration::from_secs(1);

/// A registry that is as its store is: read anew whenever the store says so, and from time to time in any case.
///
/// Nothing is answered before the first read, and nothing once the last good one is [`TRUSTED_FOR`] ago. What the store loses
/// is kept as long as the process lives; what is put there without the policy key's signature installs nothing.
pub struct Followed {
    store: Store,
    memory: Memory,
    // Replaced as a whole when the policy keys rotate.
    keys: RwLock<Arc<Verifier>>,
    reached: RwLock<Option<Instant>>,
    /// What was found at the last read, and whether it was installed. What was is not judged again; what was not may be believed
    /// later, and is complained about once.
    seen: RwLock<HashMap<Digest, bool>>,
    now: fn() -> u64,
    entries: Gauge,
    rejected: Counter,
    failures: Counter,
}

impl Followed {
    /// The registry in `store`, whose entries are signed with one of `keys`. `now`: the time, in Unix seconds.
    ///
    /// It is empty until [`Followed::follow`] runs.
    pub fn new(store: Store, keys: Verifier, now: fn() -> u64) -> Followed {
        Followed {
            store,
            memory: Memory::new(MOST_TENANTS),
            keys: RwLock::new(Arc::new(keys)),
            reached: RwLock::default(),
            seen: RwLock::default(),
            now,
            entries: Gauge::default(),
            rejected: Counter::default(),
            failures: Counter::default(),
        }
    }

    /// Believes entries signed with these keys from the next read on.
    pub fn trust(&self, keys: Verifier) {
        *self.keys.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(keys);
    }

    /// Every entry that is installed, as long as the store can be answered for.
    pub fn entries(&self) -> Result<Vec<Arc<Entry>>, Unavailable> {
        if self.is_reached() { Ok(self.memory.entries()) } else { Err(Unavailable) }
    }

    /// Reads the store, and reads it again, for as long as it is polled.
    pub async fn follow(&self) {
        let (mut changes, mut is_failing) = (None, false);
        loop {
            if changes.is_none() {
                // Before the store is read: what is put in between is told of.
                changes = self.store.changes().await.ok();
            }
            let pause = match self.read().await {
                Ok(()) => {
                    if std::mem::take(&mut is_failing) {
                        tracing::info!("the policy registry can be read again");
                    }
                    self.store.look_again()
                }
                Err(error) => {
                    self.failures.inc();
                    if !std::mem::replace(&mut is_failing, true) {
                        tracing::warn!(%error, "cannot read the policy registry; what was read is trusted for a minute");
                    }
                    changes = None;
                    RETRY
                }
            };
            let Some(messages) = &mut changes else {
                sleep(pause).await;
                continue;
            };
            let told = tokio::select! {
                () = sleep(pause) => Some(()),
                told = messages.next() => told,
            };
            match told {
                // Several messages that wait are one reason to read.
                Some(()) => while let Some(Some(())) = messages.next().now_or_never() {},
                None => {
                    changes = None;
                    sleep(RETRY).await;
                }
            }
        }
    }

    async fn read(&self) -> Result<(), Unreachable> {
        let found = self.store.entries(MOST_TENANTS).await?;
        let keys = self.keys.read().unwrap_or_else(PoisonError::into_inner).clone();
        let before = std::mem::take(&mut *self.seen.write().unwrap_or_else(PoisonError::into_inner));
        let (mut seen, now) = (HashMap::with_capacity(found.len()), (self.now)());
        for token in &found {
            let digest = Digest::of(token.as_bytes());
            let known = before.get(&digest).copied();
            let is_installed = known == Some(true) || {
                // A signature takes a tenth of a millisecond, and there may be thousands: others have their turn in between.
                tokio::task::yield_now().await;
                self.install(token, &keys, now, known.is_none().then_some(digest))
            };
            seen.insert(digest, is_installed);
        }
        *self.seen.write().unwrap_or_else(PoisonError::into_inner) = seen;
        *self.reached.write().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        self.entries.set(i64::try_from(self.memory.entries().len()).unwrap_or(i64::MAX));
        Ok(())
    }

    /// Whether an entry is installed now. `new`: its digest, where it was not there at the last read, and so has to be told of.
    fn install(&self, token: &str, keys: &Verifier, now: u64, new: Option<Digest>) -> bool {
        match self.memory.install(token, keys, now) {
            Ok(Installed::New) => {
                if let Ok(Entry { tid, seq, active, .. }) = keys.open_entry(token, now) {
                    tracing::info!(tenant = tid, seq, version = active.ver, from = active.nbf, "a policy entry was installed");
                }
                true
            }
            Ok(Installed::Unchanged) => true,
            Err(error) => {
                if let Some(digest) = new {
                    self.rejected.inc();
                    tracing::warn!(entry = digest.short(), %error, "a policy entry was not installed; what is in force stays");
                }
                false
            }
        }
    }

    fn is_reached(&self) -> bool {
        let reached = *self.reached.read().unwrap_or_else(PoisonError::into_inner);
        reached.is_some_and(|at| at.elapsed() <= TRUSTED_FOR)
    }

    /// Adds what is counted to what is exported.
    pub fn register(&self, registry: &mut prometheus_client::registry::Registry) {
        registry.register("headgate_policy_registry_entries", "Policy entries installed", self.entries.clone());
        registry.register("headgate_policy_registry_rejected", "Entries in the store that were not installed", self.rejected.clone());
        registry.register("headgate_policy_registry_failures", "Reads of the policy registry that failed", self.failures.clone());
    }
}

impl Registry for Followed {
    fn entry(&self, tenant: &str, now: u64) -> Result<Option<Arc<Entry>>, Unavailable> {
        if self.is_reached() { self.memory.entry(tenant, now) } else { Err(Unavailable) }
    }
}

impl fmt::Debug for Followed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Followed").field("store", &self.store).field("memory", &self.memory).field("reached", &self.is_reached()).finish()
    }
}
