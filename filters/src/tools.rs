//! What a filter may ask for: files, shared counters, keys of an identity provider, the policy in force, the time. No sockets:
//! whoever builds a chain brings implementations.

use std::{fmt, io, path::Path, sync::Arc, time::Duration};

use headgate_contracts::{Credential, Fault, Principal, Stop};
use headgate_policy::{Claims, Issuer, Registry, Ring, Unsigned};

use crate::{BoxFuture, Keys, LocalLedger, units::Rate};

/// What the filters of a chain are built with.
#[derive(Clone)]
pub struct Tools<'a> {
    /// Reads a file that the config names, e.g. a list of phrases; relative paths are the caller's to resolve.
    pub read: &'a dyn Fn(&Path) -> io::Result<String>,
    /// Counters of limits and leases, shared by all turns; by all instances too where the implementation is.
    pub ledger: Arc<dyn Ledger>,
    /// Public keys of identity providers.
    pub keys: Arc<dyn KeySource>,
    /// The policy in force, where the config has one.
    pub policy: Option<PolicyInForce>,
    /// Who says whether that policy is in force; `None`: the config, so that it always is.
    pub registry: Option<Arc<dyn Registry>>,
    /// Which tenants are in training mode; `None`: none are.
    pub modes: Option<Arc<dyn Modes>>,
    /// The time, in Unix seconds.
    pub now: fn() -> u64,
}

impl Tools<'static> {
    /// Tools that reach nothing: no file, no key, no policy; limits of this process; the system's clock. For checks and tests.
    pub fn none() -> Tools<'static> {
        Tools {
            read: &|_| Err(io::Error::new(io::ErrorKind::NotFound, "no files here")),
            ledger: Arc::new(LocalLedger::new()),
            keys: Arc::new(NoKeys),
            policy: None,
            registry: None,
            modes: None,
            now: unix_now,
        }
    }
}

impl fmt::Debug for Tools<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tools").field("policy", &self.policy).finish_non_exhaustive()
    }
}

/// Unix seconds by the system's clock; 0 before 1970.
pub fn unix_now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Whose and which counter: a name that is the same in every instance and can stand as a key in a store.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Account(Arc<str>);

impl Account {
    /// An account of that name.
    pub fn new(name: impl Into<Arc<str>>) -> Account {
        Account(name.into())
    }

    /// Its name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a ledger answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Taken {
    /// The amount was there and is taken.
    Yes,
    /// It was not, and nothing is taken: it will be there after this long.
    Wait(Duration),
}

/// Shared counters. A counter fills at its rate up to the rate's count: `60/min` allows 60 at once and then one a second.
///
/// Errors are about the store, not about the limit: what they mean is for the filter's terms to say (`on_fault`).
pub trait Ledger: Send + Sync {
    /// Takes `amount` if it is there and nothing is owed.
    fn take<'a>(&'a self, account: &'a Account, rate: Rate, amount: u32) -> BoxFuture<'a, Result<Taken, Fault>>;

    /// Takes what has been used already: what is not there is owed, and the next `take` waits for it. Must not block.
    fn owe(&self, account: &Account, rate: Rate, amount: u32);

    /// One of at most `most` places that can be held at a time; `None`: all are held.
    fn lease<'a>(&'a self, account: &'a Account, most: u32) -> BoxFuture<'a, Result<Option<Lease>, Fault>>;
}

/// A place held in a ledger; dropping it frees the place.
pub struct Lease(Option<Box<dyn FnOnce() + Send>>);

impl Lease {
    /// A lease that calls `free` when it is dropped.
    pub fn new(free: impl FnOnce() + Send + 'static) -> Lease {
        Lease(Some(Box::new(free)))
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(free) = self.0.take() {
            free();
        }
    }
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Lease")
    }
}

/// Where the public keys of identity providers come from.
pub trait KeySource: Send + Sync {
    /// The keys published at `url`, as last fetched; `None`: not fetched yet. Keys that a provider has withdrawn must leave
    /// here by themselves: refetch at least every ten minutes.
    fn keys(&self, url: &str) -> Option<Arc<Keys>>;

    /// Fetches anew. Callers limit how often. Cancel safe.
    fn refresh<'a>(&'a self, url: &'a str) -> BoxFuture<'a, Result<Arc<Keys>, Fault>>;
}

/// Knows which tenants are in training mode.
pub trait Modes: Send + Sync {
    /// The fence of the lock that a turn of `tenant` runs under; `None`: policy is enforced as always. Must not wait.
    ///
    /// Errors: it cannot be told, so the turn must not run.
    fn fence(&self, tenant: &str) -> Result<Option<u64>, Fault>;
}

/// No identity provider at all.
struct NoKeys;

impl KeySource for NoKeys {
    fn keys(&self, _url: &str) -> Option<Arc<Keys>> {
        None
    }

    fn refresh<'a>(&'a self, _url: &'a str) -> BoxFuture<'a, Result<Arc<Keys>, Fault>> {
        Box::pin(std::future::ready(Err(Fault::us(headgate_contracts::Code::InternalError).caused_by("no source of keys"))))
    }
}

/// Signs verdicts with the key that is current when it is called.
pub trait Signer: Send + Sync {
    /// The claims as a compact JWS. Errors: [`Unsigned`].
    fn sign(&self, claims: &Claims<&str>) -> Result<String, Unsigned>;
}

impl Signer for Ring {
    fn sign(&self, claims: &Claims<&str>) -> Result<String, Unsigned> {
        Ring::sign(self, claims)
    }
}

/// The policy in force: who signs, and what.
#[derive(Clone)]
pub struct PolicyInForce {
    /// Signs; a key rotation happens behind it.
    pub signer: Arc<dyn Signer>,
    /// Who speaks, under which policy version and constitution hash.
    pub issuer: Issuer,
}

impl fmt::Debug for PolicyInForce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PolicyInForce").field("issuer", &self.issuer).finish_non_exhaustive()
    }
}

/// Says who a credential belongs to: for the door, before a body is read or a socket is upgraded. The filter that gives it
/// checks again on every turn, so a credential that expires ends the session's next turn.
pub trait Admit: Send + Sync {
    /// Who it is. May wait for an identity provider, at most [`crate::auth::REFRESH_TIMEOUT`]. Cancel safe.
    ///
    /// Errors: a refusal (`unauthenticated`, `token_expired`, `permission_denied`), or a fault where it cannot be checked.
    fn admit<'a>(&'a self, credential: &'a Credential) -> BoxFuture<'a, Result<Principal, Stop>>;
}
