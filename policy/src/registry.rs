//! Knows which constitution is in force for a tenant, by the word of the policy key and of nobody else.
//!
//! A store holds one signed [`Entry`] per tenant, naming the active constitution and the one before. Both stand in one signed
//! document: no writer of the store, and no crash between two writes, can pair an active version with an old one it never
//! followed. A replayed older entry is refused by its sequence number while the process lives; after a restart the store is
//! believed as far as the signature goes.
//!
//! [`Registry`] is synchronous on purpose: the data path reads what this process holds. The crate `headgate-store` follows a
//! store, calls [`Memory::install`] with what it finds there, and answers [`Unavailable`] in front of that [`Memory`] once the
//! store has not been reached for too long.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, PoisonError, RwLock},
};

use serde::{Deserialize, Serialize};

use crate::{
    Digest, LEEWAY, Rejected, Verifier,
    jws::{self, Typ},
};

/// The tenant name of the entry for all tenants that have none of their own. No tenant can have it as a name.
pub const ANY_TENANT: &str = "*";
/// Seconds the previous constitution still counts after the active one took over, unless its entry says more: the turns on
/// their way.
pub const PREVIOUS_FOR: u64 = 60;
/// The most seconds that an entry may let the previous constitution count: a day, for a fleet that changes over slowly.
pub const LONGEST_OVERLAP: u64 = 24 * 60 * 60;

/// What is in force for one tenant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// The tenant, or [`ANY_TENANT`].
    pub tid: String,
    /// Grows with every entry for this tenant; a lower one is never installed over a higher.
    pub seq: u64,
    /// In force from its `nbf` on.
    pub active: Active,
    /// In force before that, and for a while after.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub previous: Option<Previous>,
}

/// A constitution in force.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Active {
    /// Its hash.
    pub con: Digest,
    /// Its version, as in the `Policy-Version` header.
    pub ver: String,
    /// Unix seconds from which it counts; may lie ahead.
    pub nbf: u64,
    /// The last Unix second at which it counts, where it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<u64>,
}

/// The constitution before.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Previous {
    /// Its hash.
    pub con: Digest,
    /// Its version.
    pub ver: String,
    /// Seconds that it counts after the active one took over, at most [`LONGEST_OVERLAP`]; by default [`PREVIOUS_FOR`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overlap: Option<u64>,
}

/// Whether a constitution counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// It is the active one.
    Active,
    /// It is the one before, within its time.
    Previous,
    /// Its hash counts, under another version.
    OtherVersion,
    /// It does not count, or no longer.
    Unknown,
}

impl Entry {
    /// A tenant's first entry, in force from `nbf` (Unix seconds).
    pub fn first(tid: &str, ver: &str, con: Digest, nbf: u64) -> Entry {
        Entry { tid: tid.to_owned(), seq: 1, active: Active { con, ver: ver.to_owned(), nbf, until: None }, previous: None }
    }

    /// The entry after this one: what was active becomes the previous.
    pub fn succeeded_by(&self, ver: &str, con: Digest, nbf: u64) -> Entry {
        Entry {
            tid: self.tid.clone(),
            seq: self.seq.saturating_add(1),
            active: Active { con, ver: ver.to_owned(), nbf, until: None },
            previous: Some(Previous { con: self.active.con, ver: self.active.ver.clone(), overlap: None }),
        }
    }

    /// The last Unix second at which the previous constitution counts, where there is one.
    pub fn previous_until(&self) -> Option<u64> {
        let overlap = self.previous.as_ref()?.overlap.unwrap_or(PREVIOUS_FOR);
        Some(self.active.nbf.saturating_add(overlap.min(LONGEST_OVERLAP)))
    }

    /// How the constitution `con` in version `ver` stands at `now`.
    pub fn standing(&self, ver: &str, con: Digest, now: u64) -> Standing {
        let Active { nbf, until, .. } = self.active;
        // The signer's clock may be ahead of ours by the leeway.
        let begun = now.saturating_add(LEEWAY) >= nbf;
        let active = (begun && until.is_none_or(|until| now <= until)).then_some((self.active.con, self.active.ver.as_str()));
        let previous = self.previous.as_ref().filter(|_| self.previous_until().is_some_and(|until| now <= until));
        let previous = previous.map(|previous| (previous.con, previous.ver.as_str()));
        if active == Some((con, ver)) {
            Standing::Active
        } else if previous == Some((con, ver)) {
            Standing::Previous
        } else if [active, previous].into_iter().flatten().any(|(known, _)| known == con) {
            Standing::OtherVersion
        } else {
            Standing::Unknown
        }
    }
}

impl Verifier {
    /// Reads an entry signed by one of these policy keys. Errors: from [`Rejected::Size`] to [`Rejected::Signature`].
    pub fn open_entry(&self, token: &str, now: u64) -> Result<Entry, Rejected> {
        let parsed = jws::parse(token, Typ::Entry)?;
        let key = self.key(parsed.kid, now)?;
        jws::object(&parsed.signed_by(key)?).ok_or(Rejected::Shape)
    }
}

/// What a verdict's constitution is checked against.
pub trait Registry: Send + Sync {
    /// What is in force for `tenant`; `None` if nothing is. Must not wait: see the module's story.
    fn entry(&self, tenant: &str, now: u64) -> Result<Option<Arc<Entry>>, Unavailable>;

    /// How the constitution `con` in version `ver` stands for `tenant` at `now`.
    fn check(&self, tenant: &str, ver: &str, con: Digest, now: u64) -> Result<Standing, Unavailable> {
        Ok(self.entry(tenant, now)?.map_or(Standing::Unknown, |entry| entry.standing(ver, con, now)))
    }
}

/// The registry has not been reached for too long to answer for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the policy registry is unavailable")]
pub struct Unavailable;

/// The registry of this process: all of it in the embedded default, the part that is read on the data path with Redis.
pub struct Memory {
    capacity: usize,
    entries: RwLock<HashMap<String, Arc<Entry>>>,
}

/// What became of an entry that was accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Installed {
    /// It is in force now, or from its time on.
    New,
    /// It was there already.
    Unchanged,
}

/// Why an entry was not installed; what was in force stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NotInstalled {
    /// It is not an entry signed by a policy key.
    #[error("not a signed registry entry: {}", .0.as_str())]
    Rejected(Rejected),
    /// It is older than what is installed, or another with the same number.
    #[error("registry entry {offered} does not follow entry {installed}")]
    Stale {
        /// The number of the entry offered.
        offered: u64,
        /// The number of the entry in force.
        installed: u64,
    },
    /// There are as many tenants as there may be.
    #[error("the registry holds as many tenants as it may")]
    Full,
}

impl Memory {
    /// An empty registry for at most `capacity` tenants.
    pub fn new(capacity: usize) -> Memory {
        Memory { capacity, entries: RwLock::default() }
    }

    /// Every entry installed, in no order.
    pub fn entries(&self) -> Vec<Arc<Entry>> {
        self.entries.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// Installs a signed entry for the tenant it names, whatever place it was found in.
    ///
    /// `policy_keys`: the public policy keys. An entry outlives its key's rotation only if it is signed again: sign all
    /// entries anew after a promotion.
    pub fn install(&self, token: &str, policy_keys: &Verifier, now: u64) -> Result<Installed, NotInstalled> {
        let entry = policy_keys.open_entry(token, now).map_err(NotInstalled::Rejected)?;
        let mut entries = self.entries.write().unwrap_or_else(PoisonError::into_inner);
        match entries.get(&entry.tid) {
            Some(installed) if **installed == entry => return Ok(Installed::Unchanged),
            Some(installed) if entry.seq <= installed.seq => {
                return Err(NotInstalled::Stale { offered: entry.seq, installed: installed.seq });
            }
            None if entries.len() >= self.capacity => return Err(NotInstalled::Full),
            Some(_) | None => {}
        }
        entries.insert(entry.tid.clone(), Arc::new(entry));
        Ok(Installed::New)
    }
}

impl Registry for Memory {
    fn entry(&self, tenant: &str, _now: u64) -> Result<Option<Arc<Entry>>, Unavailable> {
        let entries = self.entries.read().unwrap_or_else(PoisonError::into_inner);
        Ok(entries.get(tenant).or_else(|| entries.get(ANY_TENANT)).cloned())
    }
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let held = self.entries.read().unwrap_or_else(PoisonError::into_inner).len();
        f.debug_struct("Memory").field("capacity", &self.capacity).field("held", &held).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Ring;

    const NOW: u64 = 1_800_000_000;

    fn con(name: &str) -> Digest {
        Digest::of(name.as_bytes())
    }

    #[test]
    fn the_previous_constitution_counts_for_a_minute_more() {
        let first = Entry::first("acme", "1", con("one"), NOW - 1000);
        let second = first.succeeded_by("2", con("two"), NOW);
        assert_eq!(second.standing("1", con("one"), NOW - 30), Standing::Previous);
        assert_eq!(second.standing("2", con("two"), NOW - LEEWAY - 1), Standing::Unknown);
        assert_eq!(second.standing("2", con("two"), NOW - LEEWAY), Standing::Active);
        assert_eq!(second.standing("2", con("two"), NOW + 10_000), Standing::Active);
        assert_eq!(second.standing("1", con("one"), NOW + PREVIOUS_FOR), Standing::Previous);
        assert_eq!(second.standing("1", con("one"), NOW + PREVIOUS_FOR + 1), Standing::Unknown);
        // Two steps back is too far, however soon.
        assert_eq!(second.succeeded_by("3", con("three"), NOW).standing("1", con("one"), NOW), Standing::Unknown);
    }

    #[test]
    fn an_entry_may_let_the_previous_constitution_count_for_longer_but_not_for_ever() {
        let mut entry = Entry::first("acme", "1", con("one"), NOW - 1000).succeeded_by("2", con("two"), NOW);
        for (overlap, until) in [(None, 60), (Some(0), 0), (Some(600), 600), (Some(u64::MAX), LONGEST_OVERLAP)] {
            entry.previous.as_mut().unwrap().overlap = overlap;
            assert_eq!(entry.standing("1", con("one"), NOW + until), Standing::Previous, "{overlap:?}");
            assert_eq!(entry.standing("1", con("one"), NOW + until + 1), Standing::Unknown, "{overlap:?}");
        }
    }

    #[test]
    fn version_and_hash_must_belong_together() {
        let entry = Entry::first("acme", "1", con("one"), NOW).succeeded_by("2", con("one"), NOW);
        assert_eq!(entry.standing("2", con("one"), NOW), Standing::Active);
        assert_eq!(entry.standing("1", con("one"), NOW), Standing::Previous);
        assert_eq!(entry.standing("1", con("one"), NOW + PREVIOUS_FOR + 1), Standing::OtherVersion);
        assert_eq!(entry.standing("3", con("one"), NOW), Standing::OtherVersion);
        assert_eq!(entry.standing("2", con("two"), NOW), Standing::Unknown);
    }

    #[test]
    fn an_entry_past_its_end_counts_for_nothing() {
        let mut entry = Entry::first("acme", "1", con("one"), NOW);
        entry.active.until = Some(NOW + 10);
        assert_eq!(entry.standing("1", con("one"), NOW + 10), Standing::Active);
        assert_eq!(entry.standing("1", con("one"), NOW + 11), Standing::Unknown);
    }

    #[test]
    fn writing_to_the_store_alone_installs_nothing() {
        let (policy_key, writer) = (Ring::generate(NOW).unwrap(), Ring::generate(NOW).unwrap());
        let (registry, keys) = (Memory::new(8), policy_key.verifier());
        let entry = Entry::first("acme", "1", con("lax"), NOW);
        let offer = |token: &str| registry.install(token, &keys, NOW);

        assert_eq!(offer(&serde_json::to_string(&entry).unwrap()), Err(NotInstalled::Rejected(Rejected::Shape)));
        assert_eq!(offer(&writer.sign_entry(&entry).unwrap()), Err(NotInstalled::Rejected(Rejected::Kid)));
        let signed = policy_key.sign_entry(&entry).unwrap();
        let (head, signature) = signed.rsplit_once('.').unwrap();
        let lax = writer.sign_entry(&Entry { tid: "other".into(), ..entry.clone() }).unwrap();
        let grafted = format!("{}.{}.{signature}", head.split_once('.').unwrap().0, lax.split('.').nth(1).unwrap());
        assert_eq!(offer(&grafted), Err(NotInstalled::Rejected(Rejected::Signature)));
        assert_eq!(registry.check("acme", "1", con("lax"), NOW), Ok(Standing::Unknown));

        assert_eq!(offer(&signed), Ok(Installed::New));
        assert_eq!(registry.check("acme", "1", con("lax"), NOW), Ok(Standing::Active));
        // Found under another tenant's name, it still speaks for its own only.
        assert_eq!(registry.check("other", "1", con("lax"), NOW), Ok(Standing::Unknown));
    }

    #[test]
    fn an_older_entry_is_never_installed_over_a_newer() {
        let policy_key = Ring::generate(NOW).unwrap();
        let (registry, keys) = (Memory::new(8), policy_key.verifier());
        let install = |entry: &Entry| registry.install(&policy_key.sign_entry(entry).unwrap(), &keys, NOW);
        let first = Entry::first("acme", "1", con("one"), NOW);
        let second = first.succeeded_by("2", con("two"), NOW);
        assert_eq!(install(&first), Ok(Installed::New));
        assert_eq!(install(&second), Ok(Installed::New));
        assert_eq!(install(&second), Ok(Installed::Unchanged));
        assert_eq!(install(&first), Err(NotInstalled::Stale { offered: 1, installed: 2 }));
        let rival = first.succeeded_by("2b", con("rival"), NOW);
        assert_eq!(install(&rival), Err(NotInstalled::Stale { offered: 2, installed: 2 }));
        assert_eq!(registry.entry("acme", NOW).unwrap().as_deref(), Some(&second));
    }

    #[test]
    fn tenants_without_an_entry_have_the_common_one() {
        let policy_key = Ring::generate(NOW).unwrap();
        let (registry, keys) = (Memory::new(2), policy_key.verifier());
        let install = |entry: &Entry| registry.install(&policy_key.sign_entry(entry).unwrap(), &keys, NOW);
        install(&Entry::first(ANY_TENANT, "1", con("common"), NOW)).unwrap();
        install(&Entry::first("acme", "1", con("own"), NOW)).unwrap();
        assert_eq!(registry.check("other", "1", con("common"), NOW), Ok(Standing::Active));
        assert_eq!(registry.check("acme", "1", con("own"), NOW), Ok(Standing::Active));
        assert_eq!(registry.check("acme", "1", con("common"), NOW), Ok(Standing::Unknown));
        assert_eq!(install(&Entry::first("third", "1", con("own"), NOW)), Err(NotInstalled::Full));
        assert_eq!(install(&Entry::first("acme", "1", con("own"), NOW).succeeded_by("2", con("new"), NOW)), Ok(Installed::New));
    }

    #[test]
    fn a_verdict_is_no_registry_entry() {
        let ring = Ring::generate(NOW).unwrap();
        let header = format!(r#"{{"alg":"Ed25519","typ":"policy-verdict+jwt","kid":"{}"}}"#, ring.current().unwrap());
        let verdict = crate::jws::tests::forge(&crate::jws::tests::rfc_key(), &header, b"{}");
        assert_eq!(Memory::new(1).install(&verdict, &ring.verifier(), NOW), Err(NotInstalled::Rejected(Rejected::Typ)));
    }
}
