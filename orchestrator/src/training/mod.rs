//! Training mode: an admin turns it on for a tenant, one at a time, on record, and whoever acts on an old permission is refused.
//!
//! ```text
//! token ─▶ admin? ─▶ lock taken for a while ─▶ audit acknowledged at place 12 ─▶ lock held with fence 12 ─▶ 200
//!                    (else 423)                (else 503, lock given back)       (if it is still ours)
//! gateway: sees the lock, signs `mode: training, fence: 12`
//! orchestrator: 12 is not lower than any fence seen, and the lock is held with it now ─▶ the turn runs; else 409
//! ```
//!
//! Redis keeps the lock and is not trusted with more: it may forget. The order of holders is the order of their records in the audit,
//! which outlives it, and the highest fence that was acted upon is on this orchestrator's own disk.

mod audit;
mod fences;
mod judge;
#[cfg(test)]
mod model;

use std::{
    collections::{HashMap, HashSet},
    fmt, io,
    path::PathBuf,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use headgate_contracts::{
    Code, Fault, Principal, SessionId, Subject, TenantId, Trace,
    wire::training::{Mode, Outcome, TrainingState},
};
use headgate_store::{Acquired, Fenced, Held, Locks, Modes, Renewed, Unanswered};
use http::{HeaderMap, HeaderValue, Method, Response, StatusCode, header};
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
};
use tokio::time::{Instant, Interval, MissedTickBehavior, interval};

use crate::front::{Body, refusal, respond};
use audit::{Audit, Entry, Target, UNKNOWN};
pub(crate) use fences::{Fences, Weighed};
#[cfg(feature = "kafka")]
pub use judge::verify_topic;
pub use judge::{Heads, Judged, Lock, verify_export, verify_file};

/// The path of all calls.
pub(crate) const PATH: &str = "/v1/training";
/// Calls that nobody could be named for and that are written down: so many at once, and one more each second.
const UNKNOWN_BURST: f64 = 10.0;
/// The same of people who are known and may not.
const KNOWN_BURST: f64 = 60.0;
/// Tenants that are looked after at once when their locks are over.
const TIDIED: usize = 32;
/// How long open records may take when we shut down.
const LAST_WORD: Duration = Duration::from_secs(2);
/// When to come back while something that training mode stands on is away.
const TRY_AGAIN: Duration = Duration::from_secs(1);

/// What training mode is told.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The folder of the event log: fences are remembered there.
    pub folder: PathBuf,
    /// The audit topic; `None`: a file in the folder, for a process that is alone.
    pub topic: Option<crate::events::Topic>,
    /// The high part of fences: raised when the topic was made anew.
    pub epoch: u16,
    /// How long a lock outlives whoever renews it.
    pub ttl: Duration,
    /// The longest that a lock is held.
    pub max_hold: Duration,
}

/// Says whether the bearer of a token is an admin.
pub trait Identify: Send + Sync {
    /// The admin. May wait for an identity provider, for seconds at most. Cancel safe.
    fn identify<'a>(&'a self, token: &'a str) -> Pin<Box<dyn Future<Output = Result<Principal, NotAdmitted>> + Send + 'a>>;
}

/// Why somebody may not act as admin.
#[derive(Debug)]
pub enum NotAdmitted {
    /// Nobody knows who it is.
    Unknown,
    /// The token is over.
    Expired,
    /// Known, but signed in too long ago.
    Stale(Principal),
    /// Known, without the role.
    Roleless(Principal),
    /// Nobody can say now.
    Unchecked(Fault),
}

/// Training mode of all tenants.
pub struct Training {
    settings: Settings,
    identify: Arc<dyn Identify>,
    modes: Arc<Modes>,
    fences: Arc<Fences>,
    audit: Audit,
    /// What we renew.
    holds: Mutex<HashMap<String, Hold>>,
    unknown: Mutex<Bucket>,
    known: Mutex<Bucket>,
    attempts: Family<Attempt, Counter>,
    rejected: Counter,
}

/// A lock that we renew for its owner.
#[derive(Debug, Clone)]
struct Hold {
    owner: String,
    session: String,
    fence: u64,
    renewed: Instant,
    /// The lock's end, as everybody is told it, in Unix seconds.
    until: u64,
    /// The same by our own clock, as it was when we were told.
    over: Instant,
    /// From here on it may be another's: by our own clock, from before we asked.
    deadline: Instant,
}

/// Why we renew a lock no longer.
enum Ending {
    Lost(&'static str),
    GivenBack(&'static str),
}

/// How many more may come now.
struct Bucket {
    burst: f64,
    left: f64,
    at: Instant,
}

impl Bucket {
    fn of(burst: f64) -> Mutex<Bucket> {
        Mutex::new(Bucket { burst, left: burst, at: Instant::now() })
    }

    fn take(&mut self) -> bool {
        let now = Instant::now();
        self.left = (self.left + now.saturating_duration_since(self.at).as_secs_f64()).min(self.burst);
        self.at = now;
        let is_there = self.left >= 1.0;
        self.left -= f64::from(u8::from(is_there));
        is_there
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Attempt {
    call: &'static str,
    outcome: &'static str,
}

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Call {
    Enable,
    Approve,
    Disable,
    Status,
}

impl Call {
    fn action(self) -> &'static str {
        match self {
            Call::Enable => "training.enable",
            Call::Approve => "training.approve",
            Call::Disable => "training.disable",
            Call::Status => "training.status",
        }
    }
}

/// Who calls, for which tenant.
struct Caller {
    tenant: TenantId,
    subject: Subject,
    trace: Trace,
}

impl Training {
    /// Opens what is remembered. Blocks.
    ///
    /// Errors: the file of fences cannot be used.
    pub fn open(settings: Settings, identify: Arc<dyn Identify>, modes: Arc<Modes>) -> io::Result<Training> {
        std::fs::create_dir_all(&settings.folder)?;
        let fences = Arc::new(Fences::open(&settings.folder)?);
        let target = match &settings.topic {
            #[cfg(feature = "kafka")]
            Some(topic) => Target::Topic { topic: Box::new(topic.clone()), producer: tokio::sync::Mutex::default(), epoch: settings.epoch },
            #[cfg(not(feature = "kafka"))]
            Some(_) => return Err(io::Error::other("this build does not speak to Kafka")),
            None => Target::File { path: settings.folder.join("training.jsonl") },
        };
        Ok(Training {
            audit: Audit::new(target, fences.clone()),
            settings,
            identify,
            modes,
            fences,
            holds: Mutex::default(),
            unknown: Bucket::of(UNKNOWN_BURST),
            known: Bucket::of(KNOWN_BURST),
            attempts: Family::default(),
            rejected: Counter::default(),
        })
    }

    /// Adds what is counted to what is exported.
    pub(crate) fn register(&self, registry: &mut prometheus_client::registry::Registry) {
        registry.register("training_attempts", "Calls to training mode, by what became of them", self.attempts.clone());
        let help = "Turns of training mode that were refused because their fence is old, or because nobody can say";
        registry.register("training_fences_rejected", help, self.rejected.clone());
    }

    fn locks(&self) -> &Locks {
        self.modes.locks()
    }

    fn holds(&self) -> MutexGuard<'_, HashMap<String, Hold>> {
        self.holds.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Between the moment that a lock must count as lost by us and the moment that Redis gives it to another.
    fn margin(&self) -> Duration {
        self.settings.ttl / 12
    }

    /// Whether a turn of `tenant` may run under `fence`.
    ///
    /// Errors: [`Code::StaleFence`] where it is old, or nobody holds the lock with it; a 503 where nobody can say. Cancel safe.
    pub(crate) async fn weigh(&self, tenant: &str, fence: u64) -> Result<(), Fault> {
        let weighed = self.weighed(tenant, fence).await;
        if weighed.is_err() {
            self.rejected.inc();
        }
        weighed
    }

    async fn weighed(&self, tenant: &str, fence: u64) -> Result<(), Fault> {
        if fence < self.fences.highest(tenant) {
            return Err(Fault::client(Code::StaleFence));
        }
        if !self.modes.holds(tenant, fence).await.map_err(unlocked)? {
            return Err(Fault::client(Code::StaleFence).saying("the training lock is not held with this fence"));
        }
        match self.remember(tenant, fence).await {
            Ok(Weighed::Good) => Ok(()),
            Ok(Weighed::Stale) => Err(Fault::client(Code::StaleFence)),
            Err(error) => Err(Fault::us(Code::EventLogUnavailable).after(TRY_AGAIN).caused_by(error)),
        }
    }

    /// As [`Fences::weigh`], beside the runtime where the disk is needed.
    async fn remember(&self, tenant: &str, fence: u64) -> io::Result<Weighed> {
        if fence == self.fences.highest(tenant) {
            return Ok(Weighed::Good);
        }
        let (fences, tenant) = (self.fences.clone(), tenant.to_owned());
        tokio::task::spawn_blocking(move || fences.weigh(&tenant, fence)).await.map_err(io::Error::other)?
    }

    /// Answers a call, if `path` is one. It goes on to its end even if the caller leaves: a lock that was taken is on record.
    pub(crate) async fn answer(self: Arc<Self>, method: Method, path: &str, headers: HeaderMap) -> Option<Response<Body>> {
        let (call, expected) = match path.strip_prefix(PATH)? {
            "" => (Call::Status, Method::GET),
            "/enable" => (Call::Enable, Method::POST),
            "/approve" => (Call::Approve, Method::POST),
            "/disable" => (Call::Disable, Method::POST),
            _ => return None,
        };
        if method != expected {
            let mut response = refusal(&Fault::client(Code::MethodNotAllowed).into(), None);
            response.headers_mut().insert(header::ALLOW, HeaderValue::from_static(if call == Call::Status { "GET" } else { "POST" }));
            return Some(response);
        }
        let answered = tokio::spawn(async move {
            let answered = self.call(call, &headers).await;
            let outcome = match &answered {
                Ok(_) => "allowed",
                Err(fault) if fault.code.status() < 500 => "denied",
                Err(_) => "failed",
            };
            self.attempts.get_or_create(&Attempt { call: call.action(), outcome }).inc();
            answered
        });
        Some(match answered.await {
            Ok(Ok(state)) => {
                let body = serde_json::to_vec(&state).unwrap_or_default();
                respond(StatusCode::OK, Some("application/json"), body.into())
            }
            Ok(Err(fault)) => {
                let mut response = refusal(&fault.clone().into(), None);
                if response.status() == StatusCode::UNAUTHORIZED {
                    // RFC 9470: what a client has to do about it.
                    let challenge = match fault.code {
                        Code::TokenExpired => r#"Bearer error="insufficient_user_authentication", max_age=300"#,
                        _ => "Bearer",
                    };
                    response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static(challenge));
                }
                response
            }
            Err(broken) => refusal(&Fault::us(Code::InternalError).caused_by(broken).into(), None),
        })
    }

    async fn call(&self, call: Call, headers: &HeaderMap) -> Result<TrainingState, Fault> {
        let trace = Trace::from_headers(headers);
        let caller = match self.identify(headers).await {
            Ok(Principal { tenant, subject, .. }) => Caller { tenant, subject, trace },
            Err(refused) => return Err(self.turned_away(call, refused, &trace).await),
        };
        match call {
            Call::Enable => self.enable(&caller).await,
            Call::Approve => self.approve(&caller).await,
            Call::Disable => self.disable(&caller).await,
            Call::Status => self.state(&caller.tenant).await.map_err(unlocked),
        }
    }

    async fn identify(&self, headers: &HeaderMap) -> Result<Principal, NotAdmitted> {
        let mut all = headers.get_all(header::AUTHORIZATION).iter();
        let (Some(only), None) = (all.next(), all.next()) else { return Err(NotAdmitted::Unknown) };
        let token = only.to_str().ok().and_then(|value| value.split_once(' ')).filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
        match token {
            Some((_, token)) => self.identify.identify(token.trim()).await,
            None => Err(NotAdmitted::Unknown),
        }
    }

    /// What somebody is told who is no admin. It is on record before, unless there are too many of them.
    async fn turned_away(&self, call: Call, refused: NotAdmitted, trace: &Trace) -> Fault {
        let (who, fault) = match refused {
            NotAdmitted::Unknown => (None, Fault::client(Code::Unauthenticated)),
            NotAdmitted::Expired => (None, Fault::client(Code::TokenExpired)),
            NotAdmitted::Stale(who) => {
                (Some(who), Fault::client(Code::TokenExpired).saying("sign in again: it was longer ago than five minutes"))
            }
            NotAdmitted::Roleless(who) => (Some(who), Fault::client(Code::PermissionDenied)),
            NotAdmitted::Unchecked(cause) => {
                return Fault::us(Code::Overloaded).saying("credentials cannot be checked now").after(TRY_AGAIN).caused_by(cause);
            }
        };
        let bucket = if who.is_some() { &self.known } else { &self.unknown };
        let (actor, tenant) = who.as_ref().map_or((UNKNOWN, UNKNOWN), |who| (who.subject.as_str(), who.tenant.as_str()));
        if !bucket.lock().unwrap_or_else(PoisonError::into_inner).take() {
            self.audit.leave_out();
            return Fault::client(Code::RateLimited).after(TRY_AGAIN);
        }
        tracing::warn!(call = call.action(), code = %fault.code, tenant, owner = actor, trace_id = trace.trace_id_hex(), "training mode: denied");
        let entry = Entry { code: Some(fault.code), trace: Some(trace), ..Entry::of(call.action(), actor, tenant, Outcome::Denied) };
        match self.audit.write(&entry).await {
            Ok(_) => fault,
            Err(error) => unaudited(error),
        }
    }

    async fn enable(&self, caller: &Caller) -> Result<TrainingState, Fault> {
        let (tenant, owner) = (caller.tenant.as_str(), caller.subject.as_str());
        let of = |action, outcome| Entry { trace: Some(&caller.trace), ..Entry::of(action, owner, tenant, outcome) };
        let Settings { ttl, max_hold, .. } = self.settings;
        let (session, now) = (SessionId::fresh().to_string(), unix_now());
        let taken = match self.locks().acquire(tenant, owner, &session, now, ttl, max_hold).await {
            Ok(taken) => taken,
            Err(error) => {
                let fault = unlocked(error);
                self.failed(of(Call::Enable.action(), Outcome::Failed), &fault).await;
                return Err(fault);
            }
        };
        let before = match taken {
            Acquired::Ours(before) => before,
            Acquired::Taken(held) => return self.taken(caller, held).await,
            Acquired::Spent(wait) => {
                let entry =
                    Entry { code: Some(Code::TrainingLocked), reason: Some("max_hold"), ..of(Call::Enable.action(), Outcome::Denied) };
                self.audit.write(&entry).await.map_err(unaudited)?;
                let fault = Fault::client(Code::TrainingLocked).after(wait);
                return Err(fault.saying("you have had training mode on for as long as one admin may: it is another's turn to turn it on"));
            }
        };
        let fence = match self.hold(caller, &session, before).await {
            Ok(fence) => fence,
            Err(fault) => {
                // It would be over by itself; nobody should have to wait for that.
                let _ = self.locks().release(tenant, &session).await;
                self.failed(Entry { session: Some(&session), ..of(Call::Enable.action(), Outcome::Failed) }, &fault).await;
                return Err(fault);
            }
        };
        tracing::info!(tenant, owner, fence, session, trace_id = caller.trace.trace_id_hex(), "training mode is on");
        let _ = self.modes.look().await;
        self.state(&caller.tenant).await.map_err(unlocked)
    }

    /// From a lock that was taken to one that is held: its fence.
    async fn hold(&self, caller: &Caller, session: &str, before: Option<Held>) -> Result<u64, Fault> {
        let (tenant, owner, ttl) = (caller.tenant.as_str(), caller.subject.as_str(), self.settings.ttl);
        if let Some(before) = before {
            self.expired(tenant, &before).await.map_err(unaudited)?;
        }
        let acquired = Entry {
            session: Some(session),
            trace: Some(&caller.trace),
            ..Entry::of("training.lock.acquired", owner, tenant, Outcome::Allowed)
        };
        let fence = self.audit.write(&acquired).await.map_err(unaudited)?;
        let rewound = || {
            tracing::error!(tenant, fence, "the audit gave a fence that is not higher than all before it: raise `training.epoch`");
            Fault::us(Code::EventLogUnavailable).saying("the audit topic was rewound")
        };
        if fence <= self.fences.highest(tenant) {
            return Err(rewound());
        }
        let renewed = Instant::now();
        match self.locks().fence(tenant, session, fence, unix_now(), ttl).await.map_err(unlocked)? {
            Fenced::Held => {}
            Fenced::Low => return Err(rewound()),
            Fenced::Lost => {
                return Err(Fault::us(Code::Overloaded).saying("the lock was over before it was held").after(TRY_AGAIN));
            }
        }
        let deadline = renewed + ttl - self.margin();
        if Instant::now() >= deadline {
            return Err(Fault::us(Code::Overloaded).saying("the lock was over before it was held").after(TRY_AGAIN));
        }
        match self.remember(tenant, fence).await {
            Ok(Weighed::Good) => {}
            Ok(Weighed::Stale) => return Err(Fault::client(Code::StaleFence)),
            Err(error) => return Err(Fault::us(Code::EventLogUnavailable).after(TRY_AGAIN).caused_by(error)),
        }
        // Not known yet: renewed at once, and told then.
        let (until, over) = (0, renewed);
        let hold = Hold { owner: owner.to_owned(), session: session.to_owned(), fence, renewed, until, over, deadline };
        self.holds().insert(tenant.to_owned(), hold);
        Ok(fence)
    }

    /// Somebody has the lock.
    async fn taken(&self, caller: &Caller, held: Held) -> Result<TrainingState, Fault> {
        let (tenant, owner) = (caller.tenant.as_str(), caller.subject.as_str());
        let ours = held.owner == owner && held.fence.is_some();
        let outcome = if ours { Outcome::Allowed } else { Outcome::Denied };
        let entry = Entry {
            code: (!ours).then_some(Code::TrainingLocked),
            fence: held.fence,
            owner: Some(&held.owner),
            session: Some(&held.session),
            reason: ours.then_some("held"),
            trace: Some(&caller.trace),
            ..Entry::of(Call::Enable.action(), owner, tenant, outcome)
        };
        self.audit.write(&entry).await.map_err(unaudited)?;
        if ours {
            return self.state(&caller.tenant).await.map_err(unlocked);
        }
        tracing::warn!(tenant, owner, holder = held.owner, "training mode: denied, another admin holds the lock");
        Err(Fault::client(Code::TrainingLocked).after(held.left.max(TRY_AGAIN)))
    }

    /// Another admin than the owner lets the owner go on: the lock's end is `max_hold` from now.
    async fn approve(&self, caller: &Caller) -> Result<TrainingState, Fault> {
        let (tenant, who) = (caller.tenant.as_str(), caller.subject.as_str());
        let of = |action, outcome| Entry { trace: Some(&caller.trace), ..Entry::of(action, who, tenant, outcome) };
        let held = match self.locks().read(tenant).await {
            Ok(held) => held.filter(|held| held.fence.is_some()),
            Err(error) => {
                let fault = unlocked(error);
                self.failed(of(Call::Approve.action(), Outcome::Failed), &fault).await;
                return Err(fault);
            }
        };
        let off = || Fault::client(Code::StaleFence).saying("training mode is off, or about to be: there is nothing to approve of");
        let Some(held) = held else {
            let entry = Entry { code: Some(Code::StaleFence), reason: Some("off"), ..of(Call::Approve.action(), Outcome::Denied) };
            self.audit.write(&entry).await.map_err(unaudited)?;
            return Err(off());
        };
        let about = |entry| Entry { fence: held.fence, owner: Some(&held.owner), session: Some(&held.session), ..entry };
        if held.owner == who {
            let entry = Entry { code: Some(Code::PermissionDenied), reason: Some("owner"), ..of(Call::Approve.action(), Outcome::Denied) };
            self.audit.write(&about(entry)).await.map_err(unaudited)?;
            return Err(Fault::client(Code::PermissionDenied).saying("another admin than the one who turned it on must approve"));
        }
        self.audit.write(&about(of("training.lock.approved", Outcome::Allowed))).await.map_err(unaudited)?;
        let fault = match self.locks().approve(tenant, &held.session, who, unix_now(), self.settings.max_hold).await {
            Ok(true) => {
                tracing::info!(tenant, owner = who, holder = held.owner, fence = held.fence, "training mode may go on");
                return self.state(&caller.tenant).await.map_err(unlocked);
            }
            Ok(false) => off(),
            Err(error) => unlocked(error),
        };
        self.failed(about(of(Call::Approve.action(), Outcome::Failed)), &fault).await;
        Err(fault)
    }

    /// Any admin of the tenant may turn training mode off: that is the safe side.
    async fn disable(&self, caller: &Caller) -> Result<TrainingState, Fault> {
        let (tenant, owner) = (caller.tenant.as_str(), caller.subject.as_str());
        let of = |action, outcome| Entry { trace: Some(&caller.trace), ..Entry::of(action, owner, tenant, outcome) };
        let held = match self.locks().read(tenant).await {
            Ok(held) => held,
            Err(error) => {
                let fault = unlocked(error);
                self.failed(of(Call::Disable.action(), Outcome::Failed), &fault).await;
                return Err(fault);
            }
        };
        let Some(held) = held else {
            self.audit.write(&Entry { reason: Some("off"), ..of(Call::Disable.action(), Outcome::Allowed) }).await.map_err(unaudited)?;
            return self.state(&caller.tenant).await.map_err(unlocked);
        };
        // From here on it is no longer renewed: even if all else fails, it is over soon.
        self.holds().remove(tenant);
        let entry = of("training.lock.released", Outcome::Allowed);
        let entry = Entry { fence: held.fence, owner: Some(&held.owner), session: Some(&held.session), reason: Some("disabled"), ..entry };
        self.audit.write(&entry).await.map_err(unaudited)?;
        let released = self.locks().release(tenant, &held.session).await;
        let _ = self.modes.look().await;
        match released {
            Ok(_) => {
                tracing::info!(tenant, owner, holder = held.owner, fence = held.fence, "training mode is off");
                self.state(&caller.tenant).await.map_err(unlocked)
            }
            Err(error) => Err(unlocked(error)),
        }
    }

    async fn state(&self, tenant: &TenantId) -> Result<TrainingState, Unanswered> {
        let held = self.locks().read(tenant.as_str()).await?.filter(|held| held.fence.is_some());
        let mode = if held.is_some() { Mode::Training } else { Mode::Enforce };
        let tenant = tenant.clone();
        let Some(held) = held else {
            return Ok(TrainingState { tenant, mode, fence: None, owner: None, since: None, until: None, approved_by: None });
        };
        let (owner, approved_by) = (held.owner.parse().ok(), held.approved.and_then(|who| who.parse().ok()));
        Ok(TrainingState { tenant, mode, fence: held.fence, owner, since: Some(held.since), until: Some(held.until), approved_by })
    }

    /// Writes, if it can be written, that something could not be done.
    async fn failed(&self, entry: Entry<'_>, fault: &Fault) {
        tracing::warn!(call = entry.action, code = %fault.code, cause = fault.chain(), tenant = entry.tenant, owner = entry.actor, "training mode: failed");
        if let Err(error) = self.audit.write(&Entry { code: Some(fault.code), ..entry }).await {
            tracing::error!(%error, "a failed attempt at training mode has no record");
        }
    }

    async fn expired(&self, tenant: &str, held: &Held) -> Result<u64, audit::Unaudited> {
        tracing::warn!(tenant, owner = held.owner, fence = held.fence, "training mode is off: the lock was not renewed");
        let entry = Entry::of("training.lock.expired", &held.owner, tenant, Outcome::Allowed);
        self.audit.write(&Entry { fence: held.fence, session: Some(&held.session), ..entry }).await
    }

    /// Renews the locks that are ours, and says of those that are over that they are, for as long as it is polled.
    pub(crate) async fn tend(self: Arc<Self>) {
        tokio::join!(self.clone().renew_all(), self.tidy());
    }

    /// Waits for nobody but Redis: a lock must not be lost because the audit is slow.
    async fn renew_all(self: Arc<Self>) {
        let mut ticks = self.ticks();
        loop {
            ticks.tick().await;
            let holds: Vec<(String, Hold)> = self.holds().iter().map(|(tenant, hold)| (tenant.clone(), hold.clone())).collect();
            for (tenant, hold) in holds {
                self.renew(tenant, hold).await;
            }
        }
    }

    fn ticks(&self) -> Interval {
        let mut ticks = interval((self.settings.ttl / 12).min(Duration::from_secs(1)));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        ticks
    }

    async fn tidy(&self) {
        let mut ticks = self.ticks();
        // Over, and not on record yet.
        let mut over: Vec<(String, Held)> = Vec::new();
        let mut seen_before = HashSet::new();
        loop {
            ticks.tick().await;
            if let Ok(without) = self.modes.look().await {
                // A tenant that is just being taken has no lock for a moment.
                let twice: Vec<String> = without.iter().filter(|tenant| seen_before.contains(*tenant)).take(TIDIED).cloned().collect();
                seen_before = without.into_iter().collect();
                for tenant in twice {
                    if over.len() < TIDIED
                        && let Ok(Some(held)) = self.locks().expired(&tenant).await
                    {
                        over.push((tenant, held));
                    }
                }
            }
            while let Some((tenant, held)) = over.last() {
                if self.expired(tenant, held).await.is_err() {
                    break;
                }
                over.pop();
            }
        }
    }

    async fn renew(self: &Arc<Self>, tenant: String, hold: Hold) {
        let Settings { ttl, max_hold, .. } = self.settings;
        let asked = Instant::now();
        if asked >= hold.deadline {
            return self.end(tenant, hold, Ending::Lost("it was not renewed in time"));
        }
        let is_near = |over: Instant| over.saturating_duration_since(asked) <= self.margin();
        // Somebody may have approved, which only the lock knows.
        if asked.saturating_duration_since(hold.renewed) < ttl / 3 && !is_near(hold.over) {
            return;
        }
        // Asked again until the deadline.
        let unanswered = |error: Unanswered| tracing::debug!(tenant, %error, "the training lock cannot be renewed now");
        loop {
            match self.locks().renew(&tenant, &hold.session, hold.fence, unix_now(), ttl, max_hold).await {
                Ok(Renewed::Held(until)) => {
                    // The clock on the wall is looked at once for each end: whoever turns it back gains nothing.
                    let over = if until == hold.until { hold.over } else { asked + from_now(until).min(max_hold) };
                    if is_near(over) {
                        match self.locks().close(&tenant, &hold.session, until).await {
                            Ok(true) => self.end(tenant, hold, Ending::GivenBack("max_hold")),
                            // Somebody approved meanwhile: it goes on.
                            Ok(false) => continue,
                            Err(error) => unanswered(error),
                        }
                    } else if let Some(kept) = self.holds().get_mut(&tenant).filter(|kept| kept.session == hold.session) {
                        let deadline = (asked + ttl - self.margin()).min(over);
                        *kept = Hold { renewed: asked, until, over, deadline, ..hold };
                    }
                }
                // Whoever did that has it on record.
                Ok(Renewed::GivenBack) => drop(self.drop_hold(&tenant, &hold)),
                Ok(Renewed::Lost) => self.end(tenant, hold, Ending::Lost("it is gone, or another's")),
                Err(error) => unanswered(error),
            }
            return;
        }
    }

    /// Renews a lock of ours no longer, and says so on record in its own time.
    fn end(self: &Arc<Self>, tenant: String, hold: Hold, ending: Ending) {
        let this = self.clone();
        tokio::spawn(async move {
            match ending {
                Ending::Lost(reason) => this.lost(&tenant, &hold, reason).await,
                Ending::GivenBack(reason) => this.give_back(&tenant, &hold, reason).await,
            }
        });
    }

    /// A lock of ours is no longer ours.
    async fn lost(&self, tenant: &str, hold: &Hold, reason: &'static str) {
        if !self.drop_hold(tenant, hold) {
            return;
        }
        tracing::warn!(tenant, owner = hold.owner, fence = hold.fence, reason, "training mode: the lock was lost");
        let entry = Entry::of("training.lock.lost", &hold.owner, tenant, Outcome::Failed);
        let entry = Entry { fence: Some(hold.fence), session: Some(&hold.session), reason: Some(reason), ..entry };
        if let Err(error) = self.audit.write(&entry).await {
            tracing::error!(%error, tenant, "a lost lock has no record");
        }
    }

    /// Gives a lock of ours back without being asked to.
    async fn give_back(&self, tenant: &str, hold: &Hold, reason: &'static str) {
        if !self.drop_hold(tenant, hold) {
            return;
        }
        let entry = Entry::of("training.lock.released", &hold.owner, tenant, Outcome::Allowed);
        let entry = Entry { fence: Some(hold.fence), session: Some(&hold.session), reason: Some(reason), ..entry };
        if let Err(error) = self.audit.write(&entry).await {
            // It is no longer renewed: whoever finds it over writes that down.
            tracing::error!(%error, tenant, "the training lock is left to run out: its end has no record yet");
            return;
        }
        match self.locks().release(tenant, &hold.session).await {
            Ok(_) => tracing::info!(tenant, owner = hold.owner, fence = hold.fence, reason, "training mode is off"),
            Err(error) => tracing::warn!(tenant, %error, "the training lock is left to run out"),
        }
    }

    /// Whether it was ours to drop: of several who would, one does.
    fn drop_hold(&self, tenant: &str, hold: &Hold) -> bool {
        let mut holds = self.holds();
        let is_same = holds.get(tenant).is_some_and(|kept| kept.session == hold.session);
        if is_same {
            holds.remove(tenant);
        }
        is_same
    }

    /// Gives back what we hold: nobody would renew it.
    pub(crate) async fn close(&self) {
        let holds: Vec<(String, Hold)> = self.holds().iter().map(|(tenant, hold)| (tenant.clone(), hold.clone())).collect();
        let given_back = async {
            for (tenant, hold) in &holds {
                self.give_back(tenant, hold, "shutdown").await;
            }
        };
        if tokio::time::timeout(LAST_WORD, given_back).await.is_err() {
            tracing::warn!("training locks are left to run out");
        }
    }
}

impl fmt::Debug for Training {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Training").field("settings", &self.settings).finish_non_exhaustive()
    }
}

fn unix_now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// How long until that Unix second; none, where it is over.
fn from_now(until: u64) -> Duration {
    let until = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(until)).unwrap_or(SystemTime::UNIX_EPOCH);
    until.duration_since(SystemTime::now()).unwrap_or_default()
}

fn unlocked(error: Unanswered) -> Fault {
    Fault::us(Code::PolicyRegistryUnavailable).saying("the training lock cannot be asked for now").after(TRY_AGAIN).caused_by(error)
}

fn unaudited(error: audit::Unaudited) -> Fault {
    Fault::us(Code::EventLogUnavailable).saying("the audit of training mode cannot be written now").after(TRY_AGAIN).caused_by(error)
}
