//! Acts only on a verdict that a gateway signed for these bytes, this tenant, session and turn, under a policy in force, once.

use std::{
    sync::{Arc, PoisonError, RwLock},
    time::{Duration, SystemTime},
};

use crate::training::Training;
use headgate_contracts::{Code, Fault, Prompt, SessionId, TenantId, TurnId};
use headgate_policy::{
    ANY_TENANT, AUDIT, Claims, Digest, Direction, Expect, LEEWAY, Mode, ORCHESTRATOR, Registry, Rejected, Replays, Unspent, Use, Verifier,
};
use headgate_store::Used;
use http::{HeaderMap, HeaderName, HeaderValue};
use prometheus_client::metrics::{counter::Counter, gauge::Gauge};
use tokio::time::Instant;

/// The signed verdict.
pub(crate) const VERDICT: HeaderName = HeaderName::from_static("policy-verdict");
/// The policy's version: a copy of the claim, for people and proxies.
pub(crate) const VERSION: HeaderName = HeaderName::from_static("policy-version");
/// The constitution's hash: a copy of the claim.
pub(crate) const CONSTITUTION: HeaderName = HeaderName::from_static("constitution-hash");
/// RFC 9530: the digest of the body.
const CONTENT_DIGEST: HeaderName = HeaderName::from_static("content-digest");

/// What is needed to judge verdicts.
pub(crate) struct Court {
    issuer: String,
    // Replaced as a whole when keys rotate; a verification keeps the set it began with.
    keys: RwLock<Believed>,
    registry: Arc<dyn Registry>,
    spent: Replays,
    /// What all orchestrators of a deployment have used up.
    shared: Option<Used>,
    /// Who may train; `None`: nobody may.
    training: Option<Arc<Training>>,
    /// Verdicts that only this process could call unused.
    alone: Counter,
    /// When keys that do not last were last brought, in Unix seconds.
    brought: Gauge,
}

/// Keys, and until when they are: whoever brings them must come again, or cannot have told of one that was revoked.
struct Believed {
    keys: Arc<Verifier>,
    until: Option<Instant>,
}

/// The dispatch that a verdict must be about: the method, the path and the exact bytes.
pub(crate) struct Dispatched<'a> {
    pub(crate) method: &'a str,
    pub(crate) path: &'a str,
    pub(crate) body: &'a [u8],
}

impl Court {
    pub(crate) fn new(issuer: String, keys: Verifier, registry: Arc<dyn Registry>, replays: usize) -> Court {
        Court {
            issuer,
            keys: RwLock::new(Believed { keys: Arc::new(keys), until: None }),
            registry,
            spent: Replays::new(replays),
            shared: None,
            training: None,
            alone: Counter::default(),
            brought: Gauge::default(),
        }
    }

    /// Asks these, too, whether a verdict was used.
    pub(crate) fn share(&mut self, used: Used) {
        self.shared = Some(used);
    }

    /// Takes verdicts of training mode, too, as far as it says so.
    pub(crate) fn train(&mut self, training: Arc<Training>) {
        self.training = Some(training);
    }

    pub(crate) fn training(&self) -> Option<&Arc<Training>> {
        self.training.as_ref()
    }

    pub(crate) fn register(&self, registry: &mut prometheus_client::registry::Registry) {
        if let Some(training) = &self.training {
            training.register(registry);
        }
        let help = "Verdicts taken on this process's memory alone, because the shared one did not answer";
        registry.register("orchestrator_verdicts_unshared", help, self.alone.clone());
        let help =
            "When the keys of verdicts were last fetched, in Unix seconds; 0 where they are not fetched, and where they never could be";
        registry.register("orchestrator_keys_fetched_timestamp_seconds", help, self.brought.clone());
    }

    /// Whether it can be told at all which policy is in force.
    pub(crate) fn has_registry(&self) -> bool {
        self.registry.entry(ANY_TENANT, now()).is_ok()
    }

    /// Judges by these keys from now on.
    pub(crate) fn trust(&self, keys: Verifier) {
        self.believe(Believed { keys: Arc::new(keys), until: None });
    }

    /// Judges by these keys from now on, and by none once so much time has passed.
    pub(crate) fn trust_for(&self, keys: Verifier, lifetime: Duration) {
        self.believe(Believed { keys: Arc::new(keys), until: Some(Instant::now() + lifetime) });
        self.brought.set(i64::try_from(now()).unwrap_or(i64::MAX));
    }

    /// Judges by nothing until keys are brought.
    pub(crate) fn wait_for_keys(&self) {
        let mut believed = self.keys.write().unwrap_or_else(PoisonError::into_inner);
        believed.until = Some(Instant::now());
    }

    fn believe(&self, believed: Believed) {
        *self.keys.write().unwrap_or_else(PoisonError::into_inner) = believed;
    }

    /// Whether there are keys to judge by.
    pub(crate) fn has_keys(&self) -> bool {
        self.keys().is_ok()
    }

    /// The claims of the verdict in `headers`, if it holds for this dispatch of `prompt`. A verdict that holds is used up.
    ///
    /// Errors: [`Code::InvalidRequest`] where a header comes twice; [`Code::VersionConflict`] where the policy is not in force;
    /// [`Code::VerdictReplayed`]; [`Code::StaleFence`]; [`Code::VerdictInvalid`] for everything else, each with the reason's word as its message; a
    /// 503 where the question cannot be answered. Cancel safe: the verdict may be used up.
    pub(crate) async fn judge(&self, headers: &HeaderMap, dispatched: &Dispatched<'_>, prompt: &Prompt) -> Result<Claims, Fault> {
        let unspent = self.check(headers, dispatched, prompt)?;
        let claims = unspent.claims();
        if claims.mode == Mode::Training {
            let (Some(training), Some(fence)) = (&self.training, claims.fence) else { return Err(invalid("mode")) };
            training.weigh(&claims.tid, fence).await?;
        }
        self.spend(unspent).await.map_err(refused)
    }

    /// Everything but whether it was used before.
    fn check(&self, headers: &HeaderMap, dispatched: &Dispatched<'_>, prompt: &Prompt) -> Result<Unspent, Fault> {
        let token = only(headers, &VERDICT)?.ok_or_else(|| invalid("missing"))?;
        let token = token.to_str().map_err(|_| invalid("shape"))?;
        let digest = Digest::of(dispatched.body);
        if let Some(sent) = only(headers, &CONTENT_DIGEST)? {
            agrees(Some(sent), &digest.to_string(), "digest_header")?;
        }
        let (version, constitution) = (only(headers, &VERSION)?, only(headers, &CONSTITUTION)?);
        let (turn, now) = (prompt.turn.to_string(), now());
        let expect = Expect {
            iss: &self.issuer,
            aud: ORCHESTRATOR,
            dir: Direction::Input,
            tid: prompt.principal.tenant.as_str(),
            sid: prompt.session.as_str(),
            turn: &turn,
            htm: Some(dispatched.method),
            htu: Some(dispatched.path),
            body: digest,
            now,
            leeway: LEEWAY,
        };
        let keys = self.keys()?;
        // What costs the verdict its one use comes last, so that a dispatch refused for its headers may be sent again.
        let unspent = keys.check(token, &expect, &*self.registry).map_err(refused)?;
        let claims = unspent.claims();
        agrees(version, &claims.pol.ver, "version_header")?;
        agrees(constitution, &claims.con.to_string(), "constitution_header")?;
        if claims.sub != prompt.principal.subject.as_str() {
            return Err(invalid("subject"));
        }
        Ok(unspent)
    }

    /// Uses a verdict up: here, which costs nothing, and then everywhere. While the shared memory does not answer, this
    /// process's own decides; where events are kept, the log refuses a turn it knows, across restarts too.
    async fn spend(&self, unspent: Unspent) -> Result<Claims, Rejected> {
        let (jti, until) = unspent.number();
        let here = self.spent.spend(jti, until, now());
        let used = match (&self.shared, here) {
            (Some(shared), Use::First | Use::Unknown) => match shared.spend(jti).await {
                Use::Unknown => {
                    self.alone.inc();
                    here
                }
                known @ (Use::First | Use::Again) => known,
            },
            (Some(_), Use::Again) | (None, _) => here,
        };
        unspent.settle(used)
    }
}

/// Whose turn something is told of.
pub(crate) struct Whose<'a> {
    pub(crate) tenant: &'a TenantId,
    pub(crate) session: &'a SessionId,
    pub(crate) turn: TurnId,
}

impl Court {
    /// The claims of the verdict in `headers`, if it holds for these bytes as something that is told of a turn. It is not used up:
    /// what is told may be told again.
    ///
    /// Errors: as [`Court::judge`], but never that it was used.
    pub(crate) fn hear(&self, headers: &HeaderMap, told: &Dispatched<'_>, dir: Direction, whose: &Whose<'_>) -> Result<Claims, Fault> {
        let token = only(headers, &VERDICT)?.ok_or_else(|| invalid("missing"))?;
        let token = token.to_str().map_err(|_| invalid("shape"))?;
        let (turn, digest) = (whose.turn.to_string(), Digest::of(told.body));
        let expect = Expect {
            iss: &self.issuer,
            aud: ORCHESTRATOR,
            dir,
            tid: whose.tenant.as_str(),
            sid: whose.session.as_str(),
            turn: &turn,
            htm: Some(told.method),
            htu: Some(told.path),
            body: digest,
            now: now(),
            leeway: LEEWAY,
        };
        let claims = self.keys()?.hear(token, &expect, &*self.registry).map_err(refused)?;
        // The copies may be left out; what is sent must be one.
        for (name, claim, word) in [
            (CONTENT_DIGEST, digest.to_string(), "digest_header"),
            (VERSION, claims.pol.ver.clone(), "version_header"),
            (CONSTITUTION, claims.con.to_string(), "constitution_header"),
        ] {
            if let Some(sent) = only(headers, &name)? {
                agrees(Some(sent), &claim, word)?;
            }
        }
        Ok(claims)
    }

    /// The claims of the verdict that a client got with its answer, if it is about that turn. It may be old: its key is still known
    /// for as long as gateways keep what they could not tell.
    ///
    /// Errors: [`Code::VerdictInvalid`]; a 503 where there are no keys to judge by.
    pub(crate) fn open(&self, verdict: &str, whose: &Whose<'_>) -> Result<Claims, Fault> {
        let claims = self.keys()?.open(verdict, now()).map_err(refused)?;
        let fits = [
            (claims.iss == self.issuer, "output_issuer"),
            (claims.aud == AUDIT && claims.dir == Direction::Output, "output_audience"),
            (claims.tid == whose.tenant.as_str(), "output_tenant"),
            (claims.sid == whose.session.as_str(), "output_session"),
            (claims.turn == whose.turn.to_string(), "output_turn"),
        ];
        match fits.into_iter().find(|(fits, _)| !fits) {
            None => Ok(claims),
            Some((_, word)) => Err(invalid(word)),
        }
    }

    fn keys(&self) -> Result<Arc<Verifier>, Fault> {
        let believed = self.keys.read().unwrap_or_else(PoisonError::into_inner);
        match believed.until {
            Some(until) if Instant::now() >= until => {
                Err(Fault::us(Code::PolicyRegistryUnavailable).saying("the keys that verdicts are judged by cannot be fetched"))
            }
            Some(_) | None => Ok(Arc::clone(&believed.keys)),
        }
    }
}

/// The fault that a rejection is, to whoever sent the dispatch.
fn refused(rejected: Rejected) -> Fault {
    let code = match rejected {
        Rejected::Version | Rejected::Constitution => Code::VersionConflict,
        Rejected::Replayed => Code::VerdictReplayed,
        // Not the verdict's fault: nothing passes until the question can be answered again.
        Rejected::Registry => return Fault::us(Code::PolicyRegistryUnavailable).caused_by(rejected),
        Rejected::Unguarded => return Fault::us(Code::Overloaded).caused_by(rejected),
        Rejected::Size
        | Rejected::Shape
        | Rejected::Typ
        | Rejected::Alg
        | Rejected::Kid
        | Rejected::KeyState
        | Rejected::Signature
        | Rejected::Issuer
        | Rejected::Audience
        | Rejected::Lifetime
        | Rejected::NotYet
        | Rejected::Expired
        | Rejected::Direction
        | Rejected::Tenant
        | Rejected::Session
        | Rejected::Turn
        | Rejected::Method
        | Rejected::Path
        | Rejected::Digest
        | Rejected::Denied => Code::VerdictInvalid,
    };
    Fault::client(code).saying(rejected.as_str())
}

/// The one value of a header; an error where there are several, because then two readers may see two requests.
pub(crate) fn only<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Result<Option<&'a HeaderValue>, Fault> {
    let mut values = headers.get_all(name).iter();
    let first = values.next();
    match values.next() {
        None => Ok(first),
        Some(_) => Err(Fault::client(Code::InvalidRequest).saying(format!("the header {name} must come once"))),
    }
}

fn agrees(header: Option<&HeaderValue>, claim: &str, word: &'static str) -> Result<(), Fault> {
    if header.is_some_and(|header| header.as_bytes() == claim.as_bytes()) { Ok(()) } else { Err(invalid(word)) }
}

fn invalid(word: &'static str) -> Fault {
    Fault::client(Code::VerdictInvalid).saying(word)
}

fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
