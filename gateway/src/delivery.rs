//! Tells the orchestrator what the user got of each turn, and which prompts were refused: off the turn's path, until it has heard.
//!
//! ```text
//! turn ── end ──▶ slip, in the outbox ── the client took the last event, or left ──▶ queue ──▶ courier ──▶ the orchestrator
//!                                                             on disk before it is sent, where there is a spool ┘  └ away ──▶ waits
//! ```
//!
//! A turn waits for none of it: where the queue is full, a report is lost and counted, and the orchestrator will call what the
//! user got unknown. Reports are signed when they are sent, and may be sent twice. What is in the queue is written as one group: a
//! process that is killed loses what came since the last.

use std::{
    collections::{HashMap, VecDeque},
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use arc_swap::ArcSwap;
use futures_util::{StreamExt, future::BoxFuture, stream::FuturesUnordered};
use headgate_contracts::{
    Category, Code, Dispatch, End, Fault, Outcome, Principal, Record, SessionId, Stop, Subject, TenantId, Trace, Turn, TurnId,
    wire::{
        conversation::{DeliveryReport, DenialReport},
        log::Delivered,
    },
};
use headgate_filters::{PolicyInForce, policy_headers::POLICY_VERDICT, unix_now};
use headgate_orchestrator::events::Spool;
use headgate_policy::{Decision, Digest, Direction, Facts};
use headgate_upstream::{Protocol, Upstream};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};
use serde::{Deserialize, Serialize};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep_until},
};

/// Reports on their way from turns to the courier.
const QUEUE: usize = 4096;
/// Reports that wait for orchestrators that are away; then the oldest go.
const MOST_WAITING: usize = 16_384;
/// Reports told at once.
const AT_ONCE: usize = 32;
/// What is older is not told any more: by then the keys that signed its output may be forgotten.
const OLDEST: Duration = Duration::from_secs(24 * 3600);
/// From the first failure on, how long an orchestrator is left alone; doubled by each further one.
const PAUSES: [Duration; 2] = [Duration::from_millis(250), Duration::from_secs(8)];
/// A turn that nobody knows may be about to begin, and a new key or policy may be about to be known: so it is told again after
/// a pause, so many times in all.
const AGAIN: Duration = Duration::from_secs(1);
const REFUSALS: u8 = 4;
/// Reports taken from the queue at once, and so written to the spool at once.
const GROUP: usize = 256;
/// Of a spool, what may be taken up by reports that have been told, in bytes,
const LEFT_BEHIND: u64 = 1 << 20;
/// and for how long, where there are no others.
const LINGER: Duration = Duration::from_secs(10);

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// Carries reports. Cheap to clone.
#[derive(Clone)]
pub struct Courier(Arc<Shared>);

struct Shared {
    office: ArcSwap<Office>,
    queue: mpsc::Sender<Report>,
    /// Until [`Courier::run`] takes them.
    asked: Mutex<Option<(mpsc::Receiver<Report>, Store)>>,
    /// Reports that were taken and are neither told nor given up.
    left: watch::Sender<usize>,
    closing: watch::Sender<bool>,
    told: Family<Told, Counter>,
    waiting: Gauge,
}

/// In whose name reports are signed, and who may be told: exchanged with the configuration.
#[derive(Default)]
struct Office {
    policy: Option<PolicyInForce>,
    upstreams: Vec<Upstream>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Told {
    call: &'static str,
    result: &'static str,
}

/// What is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Call {
    Delivery,
    Verdict,
}

impl Call {
    /// The last part of the path.
    fn as_str(self) -> &'static str {
        match self {
            Call::Delivery => "delivery",
            Call::Verdict => "verdict",
        }
    }
}

/// One thing to be told. In the spool it is this, as JSON; there is no text of the turn in it.
#[derive(Clone, Serialize, Deserialize)]
struct Report {
    turn: TurnId,
    call: Call,
    upstream: String,
    /// Which of its endpoints took the turn, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    endpoint: Option<String>,
    tenant: TenantId,
    session: SessionId,
    subject: Subject,
    is_denied: bool,
    categories: Vec<Category>,
    traceparent: String,
    /// Unix seconds.
    since: u64,
    body: String,
}

impl Report {
    fn of(upstream: &str, turn: &Turn, whose: &Principal, trace: &Trace, call: Call, endpoint: Option<String>) -> Report {
        Report {
            turn: turn.id,
            call,
            upstream: upstream.to_owned(),
            endpoint,
            tenant: whose.tenant.clone(),
            session: turn.session.clone(),
            subject: whose.subject.clone(),
            is_denied: false,
            categories: Vec::new(),
            traceparent: trace.traceparent(),
            since: unix_now(),
            body: String::new(),
        }
    }

    /// What proves the report: a verdict over its exact bytes, by the policy in force now.
    fn proof(&self, policy: &PolicyInForce, sent: &Dispatch<'_>) -> Result<HeaderMap, Fault> {
        let (turn, categories) = (self.turn.to_string(), self.categories.iter().map(|category| category.as_str()).collect::<Vec<_>>());
        let facts = Facts {
            tid: self.tenant.as_str(),
            sub: self.subject.as_str(),
            sid: self.session.as_str(),
            turn: &turn,
            dec: if self.is_denied { Decision::Deny } else { Decision::Allow },
            cat: &categories,
            trc: None,
        };
        let dir = match self.call {
            Call::Delivery => Direction::Output,
            Call::Verdict => Direction::Input,
        };
        let claims = policy.issuer.report(&facts, dir, sent.method, sent.path, Digest::of(sent.body), unix_now());
        let unsigned = |error| Fault::us(Code::InternalError).caused_by(error);
        let verdict = claims.and_then(|claims| policy.signer.sign(&claims)).map_err(unsigned)?;
        let mut headers = HeaderMap::with_capacity(2);
        for (name, value) in [(POLICY_VERDICT, verdict.as_str()), (TRACEPARENT, self.traceparent.as_str())] {
            // A token and hex digits; what came from a damaged spool is left out, and refused for it.
            if let Ok(value) = HeaderValue::from_str(value) {
                headers.insert(name, value);
            }
        }
        Ok(headers)
    }
}

/// What is known of a turn when it ends, on its way to becoming a report. It is filled in where the turn's text leaves, and sent
/// when it is dropped: by then the client has taken what it will take.
pub struct Slip {
    courier: Courier,
    report: Option<Report>,
    delivery: DeliveryReport,
}

impl Slip {
    /// What left: the output's verdict and how much text.
    pub(crate) fn fill(&mut self, record: &Record, verdict: Option<String>) {
        self.delivery.text_bytes = record.text_bytes;
        self.delivery.verdict = verdict;
        if record.outcome == Outcome::Blocked && self.delivery.outcome == Delivered::Delivered {
            self.delivery.outcome = Delivered::Denied;
        }
        if let Some(report) = &mut self.report {
            report.is_denied = self.delivery.outcome == Delivered::Denied;
        }
    }

    /// What the client's connection took: all of it, or up to `last_seq`.
    pub(crate) fn take(mut self, last_seq: Option<u64>, whole: bool) {
        self.delivery.last_seq = last_seq;
        if !whole && self.delivery.outcome == Delivered::Delivered {
            self.delivery.outcome = Delivered::Cut;
            self.delivery.code = Some(Code::ClientClosed.as_str().to_owned());
        }
        if let Some(mut report) = self.report.take() {
            report.body = String::from_utf8(self.delivery.body()).unwrap_or_default();
            self.courier.send(report);
        }
    }
}

impl Courier {
    /// A courier that keeps what waits in the folder `spool` too, if there is one. Nothing moves until [`Courier::run`].
    ///
    /// Errors: the folder cannot be used.
    pub fn new(spool: Option<&Path>) -> std::io::Result<Courier> {
        let (queue, asked) = mpsc::channel(QUEUE);
        let store = Store::open(spool)?;
        Ok(Courier(Arc::new(Shared {
            office: ArcSwap::default(),
            queue,
            left: watch::channel(0).0,
            closing: watch::channel(false).0,
            told: Family::default(),
            waiting: Gauge::default(),
            asked: Mutex::new(Some((asked, store))),
        })))
    }

    /// Signs in the name of this policy from now on, and tells these upstreams, as far as they are orchestrators.
    pub fn serve(&self, policy: Option<PolicyInForce>, upstreams: impl IntoIterator<Item = Upstream>) {
        let upstreams = upstreams.into_iter().filter(|upstream| upstream.settings().protocol == Protocol::Orchestrator).collect();
        self.0.office.store(Arc::new(Office { policy, upstreams }));
    }

    /// Adds the courier's metrics to what is exported.
    pub fn register(&self, registry: &mut Registry) {
        let help = "What the orchestrator was to be told of turns, by what became of it";
        registry.register("headgate_reports", help, self.0.told.clone());
        let help = "Reports that wait for an orchestrator that is away";
        registry.register("headgate_reports_waiting", help, self.0.waiting.clone());
    }

    /// The slip of a turn that has ended, if its upstream is an orchestrator that may have taken it. Of a prompt that policy
    /// refused it tells at once: there is nothing that the client could still take. `asked`: whether the prompt was let through,
    /// and who answered.
    pub(crate) fn slip(
        &self,
        upstream: &Upstream,
        asked: Option<Option<&str>>,
        turn: &Turn,
        whose: &Principal,
        trace: &Trace,
        end: &End,
    ) -> Option<Slip> {
        if upstream.settings().protocol != Protocol::Orchestrator || self.0.office.load().policy.is_none() {
            return None;
        }
        let Some(endpoint) = asked else {
            // Limits, faults and who is nobody here are counted; they are no verdict on a prompt.
            if let Err(Stop::Refused(refusal)) = end
                && refusal.code == Code::PolicyDenied
            {
                let tenant = whose.tenant.clone();
                let denial = DenialReport {
                    tenant,
                    session_id: turn.session.clone(),
                    subject: whose.subject.clone(),
                    code: refusal.code.as_str().to_owned(),
                };
                let mut report = Report::of(upstream.name(), turn, whose, trace, Call::Verdict, None);
                (report.is_denied, report.categories) = (true, refusal.categories.clone());
                report.body = String::from_utf8(denial.body()).unwrap_or_default();
                self.send(report);
            }
            return None;
        };
        let (outcome, code) = match end {
            Ok(()) => (Delivered::Delivered, None),
            // Nobody was reached: there is no turn to tell of.
            Err(Stop::Failed(fault)) if fault.code == Code::UpstreamConnectFailed => return None,
            Err(Stop::Refused(refusal)) if refusal.code == Code::PolicyDenied => (Delivered::Denied, Some(refusal.code)),
            Err(stop) => (Delivered::Cut, Some(stop.code())),
        };
        let delivery = DeliveryReport {
            tenant: whose.tenant.clone(),
            session_id: turn.session.clone(),
            outcome,
            code: code.map(|code| code.as_str().to_owned()),
            last_seq: None,
            text_bytes: 0,
            verdict: None,
        };
        let report = Report::of(upstream.name(), turn, whose, trace, Call::Delivery, endpoint.map(str::to_owned));
        Some(Slip { courier: self.clone(), report: Some(report), delivery })
    }

    fn send(&self, report: Report) {
        let call = report.call;
        self.0.left.send_modify(|left| *left += 1);
        if self.0.queue.try_send(report).is_err() {
            self.done(call, "overrun");
        }
    }

    fn done(&self, call: Call, result: &'static str) {
        self.0.told.get_or_create(&Told { call: call.as_str(), result }).inc();
        self.0.left.send_modify(|left| *left = left.saturating_sub(1));
    }

    /// Resolves when everything has been told, or `patience` is over; what is left then is put in the spool. Nothing is told
    /// afterwards.
    pub async fn close(&self, patience: Duration) {
        let mut left = self.0.left.subscribe();
        drop(tokio::time::timeout(patience, left.wait_for(|left| *left == 0)).await);
        self.0.closing.send_replace(true);
        // The queue is closed by whoever empties it.
        drop(tokio::time::timeout(patience, self.0.queue.closed()).await);
    }

    /// Carries, until it is closed. A second call does nothing.
    pub async fn run(self) {
        let Some((mut queue, store)) = self.0.asked.lock().unwrap_or_else(PoisonError::into_inner).take() else { return };
        let mut closing = self.0.closing.subscribe();
        let mut round = Round::new(self.clone(), store);
        let mut calls = FuturesUnordered::new();
        let mut gathered = Vec::with_capacity(GROUP);
        loop {
            round.store.flush();
            let next = round.start(&calls).or_else(|| round.store.linger());
            tokio::select! {
                biased;
                _ = closing.wait_for(|closing| *closing) => break,
                Some((which, heard)) = calls.next(), if !calls.is_empty() => round.settle(which, heard),
                count = queue.recv_many(&mut gathered, GROUP) => match count {
                    0 => break,
                    _ => gathered.drain(..).for_each(|report| round.put(report)),
                },
                () = sleep_until(next.unwrap_or_else(Instant::now)), if next.is_some() => round.tidy(),
            }
        }
        while let Ok(report) = queue.try_recv() {
            round.put(report);
        }
        // What is under way may have been heard; it is told once more.
        round.rewrite();
        queue.close();
    }
}

/// Reports for the same endpoint share their luck.
type Key = (String, Option<String>);
/// A turn has at most one report of each kind.
type Which = (TurnId, Call);
type Calls = FuturesUnordered<BoxFuture<'static, (Which, Heard)>>;

/// What became of telling.
enum Heard {
    Kept,
    /// It is not taken: for now, or for good.
    Refused(&'static str),
    Away,
}

struct Waiting {
    report: Arc<Report>,
    /// Later ones have higher numbers.
    number: u64,
    refusals: u8,
    /// What it takes in the spool, in bytes; 0 where it is not there.
    spooled: u64,
}

impl Waiting {
    fn key(&self) -> Key {
        (self.report.upstream.clone(), self.report.endpoint.clone())
    }
}

/// Reports that wait for one endpoint, the oldest first.
#[derive(Default)]
struct Lane {
    waiting: VecDeque<Waiting>,
    under_way: usize,
    /// It is away: left alone until then, and then told one at a time.
    pause: Option<(Instant, Duration)>,
}

impl Lane {
    fn back(&mut self, waiting: Waiting) {
        let at = self.waiting.partition_point(|other| other.number < waiting.number);
        self.waiting.insert(at, waiting);
    }
}

/// What the courier has to do.
struct Round {
    courier: Courier,
    lanes: HashMap<Key, Lane>,
    /// What is told again, and when.
    later: VecDeque<(Instant, Waiting)>,
    under_way: HashMap<Which, Waiting>,
    next_number: u64,
    store: Store,
}

impl Round {
    fn new(courier: Courier, mut store: Store) -> Round {
        let found = std::mem::take(&mut store.found);
        let mut round = Round { courier, lanes: HashMap::new(), later: VecDeque::new(), under_way: HashMap::new(), next_number: 0, store };
        for (report, spooled) in found {
            round.courier.0.left.send_modify(|left| *left += 1);
            round.enter(report, spooled);
        }
        round
    }

    fn put(&mut self, report: Report) {
        self.enter(report, 0);
    }

    fn enter(&mut self, report: Report, spooled: u64) {
        let mut waiting = Waiting { report: Arc::new(report), number: self.next_number, refusals: 0, spooled };
        self.next_number += 1;
        self.store.add(&mut waiting);
        self.lanes.entry(waiting.key()).or_default().waiting.push_back(waiting);
        if self.count() > MOST_WAITING {
            // Its orchestrator gives up on the oldest first, too.
            let oldest = self.lanes.values_mut().filter(|lane| !lane.waiting.is_empty()).min_by_key(|lane| lane.waiting[0].number);
            if let Some(oldest) = oldest.and_then(|lane| lane.waiting.pop_front()) {
                self.give_up(oldest, "overrun");
            }
        }
    }

    fn count(&self) -> usize {
        self.later.len() + self.lanes.values().map(|lane| lane.waiting.len()).sum::<usize>()
    }

    fn give_up(&mut self, waiting: Waiting, result: &'static str) {
        let report = &waiting.report;
        tracing::warn!(turn_id = %report.turn, call = report.call.as_str(), result, upstream = report.upstream, "a report is given up");
        self.done(&waiting, result);
    }

    fn done(&mut self, waiting: &Waiting, result: &'static str) {
        self.courier.done(waiting.report.call, result);
        if self.store.told(waiting) {
            self.rewrite();
        }
    }

    /// Leaves behind what was told.
    fn rewrite(&mut self) {
        let Round { lanes, later, under_way, store, .. } = self;
        let all = lanes.values().flat_map(|lane| &lane.waiting).chain(later.iter().map(|(_, waiting)| waiting)).chain(under_way.values());
        store.rewrite(all);
    }

    /// The same, once there has been nothing else for a while.
    fn tidy(&mut self) {
        if self.store.linger().is_some_and(|end| end <= Instant::now()) {
            self.rewrite();
        }
    }

    /// Begins to tell what can be told now; gives when there is more to do.
    fn start(&mut self, calls: &Calls) -> Option<Instant> {
        let now = Instant::now();
        while let Some((_, waiting)) = self.later.pop_front_if(|(when, _)| *when <= now) {
            self.lanes.entry(waiting.key()).or_default().back(waiting);
        }
        self.courier.0.waiting.set(i64::try_from(self.count()).unwrap_or(i64::MAX));
        let mut next = self.later.front().map(|(when, _)| *when);
        let office = self.courier.0.office.load_full();
        for lane in self.lanes.values_mut() {
            let most = match lane.pause {
                None => AT_ONCE,
                Some((until, _)) if until <= now => 1,
                Some((until, _)) => {
                    if !lane.waiting.is_empty() {
                        next = Some(next.map_or(until, |next| next.min(until)));
                    }
                    0
                }
            };
            while lane.under_way < most
                && let Some(waiting) = lane.waiting.pop_front()
            {
                lane.under_way += 1;
                let (office, report) = (Arc::clone(&office), Arc::clone(&waiting.report));
                let which = (report.turn, report.call);
                self.under_way.insert(which, waiting);
                calls.push(Box::pin(async move { (which, tell(&office, &report).await) }));
            }
        }
        next
    }

    fn settle(&mut self, which: Which, heard: Heard) {
        let Some(mut waiting) = self.under_way.remove(&which) else { return };
        let now = Instant::now();
        let lane = self.lanes.entry(waiting.key()).or_default();
        lane.under_way = lane.under_way.saturating_sub(1);
        match heard {
            Heard::Kept => {
                lane.pause = None;
                self.done(&waiting, "told");
            }
            Heard::Refused(result) => {
                lane.pause = None;
                waiting.refusals += 1;
                let enough = if result == UNKNOWN { 2 } else { REFUSALS };
                if waiting.refusals >= enough {
                    self.give_up(waiting, result);
                } else {
                    self.later.push_back((now + AGAIN, waiting));
                }
            }
            Heard::Away => {
                lane.pause = Some(match lane.pause {
                    None => (now + PAUSES[0], PAUSES[0]),
                    Some((until, pause)) if now < until => (until, pause),
                    Some((_, pause)) => {
                        let pause = (2 * pause).min(PAUSES[1]);
                        (now + pause, pause)
                    }
                });
                if unix_now().saturating_sub(waiting.report.since) > OLDEST.as_secs() {
                    self.give_up(waiting, "expired");
                    return;
                }
                lane.back(waiting);
            }
        }
    }
}

/// Told to an orchestrator that does not know the turn.
const UNKNOWN: &str = "unknown";

/// Tells whoever took the turn; where that is not known, whoever knows it.
async fn tell(office: &Office, report: &Report) -> Heard {
    let upstream = office.upstreams.iter().find(|upstream| upstream.name() == report.upstream);
    let (Some(policy), Some(upstream)) = (&office.policy, upstream) else { return Heard::Refused("nobody") };
    let all: Vec<String> = upstream.health().into_iter().map(|endpoint| endpoint.endpoint).collect();
    let named = report.endpoint.iter().filter(|endpoint| all.contains(endpoint)).cloned().collect::<Vec<_>>();
    let path = format!("/v1/conversation/turns/{}/{}", report.turn, report.call.as_str());
    let mut heard = Heard::Refused(UNKNOWN);
    for endpoint in if named.is_empty() { all } else { named } {
        heard = match upstream.tell(&endpoint, &path, report.body.as_bytes(), |sent| report.proof(policy, sent)).await {
            Ok(status) if status.is_success() => return Heard::Kept,
            Ok(StatusCode::NOT_FOUND) => heard,
            Ok(StatusCode::CONFLICT) if !matches!(heard, Heard::Away) => Heard::Refused("late"),
            Ok(status) if status.is_client_error() && status != StatusCode::TOO_MANY_REQUESTS && !matches!(heard, Heard::Away) => {
                Heard::Refused("refused")
            }
            Ok(_) | Err(_) => Heard::Away,
        };
    }
    heard
}

/// What waits, on disk; nothing where there is no spool.
struct Store {
    spool: Option<Spool>,
    found: Vec<(Report, u64)>,
    /// Reports in the spool that are not told, and their size.
    count: usize,
    bytes: u64,
    /// Since when there are none.
    since: Option<Instant>,
}

impl Store {
    fn open(folder: Option<&Path>) -> std::io::Result<Store> {
        let Some(folder) = folder else { return Ok(Store { spool: None, found: Vec::new(), count: 0, bytes: 0, since: None }) };
        let (spool, waiting) = Spool::open(folder)?;
        let read = |(turn, what): (TurnId, Vec<u8>)| match serde_json::from_slice(&what) {
            Ok(report) => Some((report, what.len() as u64)),
            Err(_) => {
                tracing::warn!(turn_id = %turn, "a report in the spool cannot be read");
                None
            }
        };
        let found: Vec<(Report, u64)> = waiting.into_iter().filter_map(read).collect();
        tracing::info!(folder = %folder.display(), reports = found.len(), "spool opened");
        let bytes = found.iter().map(|(_, bytes)| bytes).sum();
        Ok(Store { spool: Some(spool), count: found.len(), found, bytes, since: None })
    }

    fn add(&mut self, waiting: &mut Waiting) {
        let Some(spool) = self.spool.as_mut().filter(|_| waiting.spooled == 0) else { return };
        let what = serde_json::to_vec(&*waiting.report).unwrap_or_default();
        match spool.add(waiting.report.turn, &what) {
            Ok(()) => {
                waiting.spooled = what.len() as u64;
                self.since = None;
                self.count += 1;
                self.bytes += waiting.spooled;
            }
            Err(error) => tracing::warn!(turn_id = %waiting.report.turn, %error, "a report waits in memory alone"),
        }
    }

    /// Writes what was added, before anybody is told of it.
    fn flush(&mut self) {
        if let Some(Err(error)) = self.spool.as_mut().map(Spool::flush) {
            tracing::warn!(%error, "reports wait in memory alone");
        }
    }

    /// Until when told reports alone are left as they are.
    fn linger(&self) -> Option<Instant> {
        self.since.map(|since| since + LINGER)
    }

    /// Whether so much is left behind that the rest is to be written anew.
    fn told(&mut self, waiting: &Waiting) -> bool {
        if waiting.spooled == 0 {
            return false;
        }
        if let Some(Err(error)) = self.spool.as_mut().map(|spool| spool.told(waiting.report.turn)) {
            tracing::warn!(%error, "the spool keeps what has been told: it may be told once more");
        }
        self.count = self.count.saturating_sub(1);
        self.bytes = self.bytes.saturating_sub(waiting.spooled);
        self.since = (self.count == 0).then(Instant::now);
        let bytes = self.spool.as_ref().map_or(0, Spool::bytes);
        bytes > 2 * self.bytes + LEFT_BEHIND
    }

    fn rewrite<'a>(&mut self, all: impl Iterator<Item = &'a Waiting>) {
        self.since = None;
        let Some(spool) = &mut self.spool else { return };
        let written: Vec<(TurnId, Vec<u8>)> = all
            .filter(|waiting| waiting.spooled > 0)
            .map(|waiting| (waiting.report.turn, serde_json::to_vec(&*waiting.report).unwrap_or_default()))
            .collect();
        if let Err(error) = spool.leave(written.iter().map(|(turn, what)| (*turn, what.as_slice()))) {
            tracing::warn!(%error, "the spool keeps what has been told: it may be told once more");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let turn = Turn {
            id: TurnId::fresh(),
            session: SessionId::fresh(),
            route: "/v1/chat/stream".into(),
            flow: Default::default(),
            record: Default::default(),
        };
        let whose = Principal { tenant: "acme".parse().unwrap(), subject: "u1".parse().unwrap(), ..Principal::anonymous() };
        let endpoint = Some("10.0.0.1:8090".into());
        Report { body: "{}".into(), ..Report::of("desk", &turn, &whose, &Trace::fresh(), Call::Delivery, endpoint) }
    }

    fn round(spool: Option<&Path>) -> Round {
        Round::new(Courier::new(None).unwrap(), Store::open(spool).unwrap())
    }

    fn counted(courier: &Courier, result: &'static str) -> u64 {
        courier.0.told.get_or_create(&Told { call: "delivery", result }).get()
    }

    fn which(round: &Round) -> Vec<Which> {
        round.under_way.keys().copied().collect()
    }

    #[tokio::test]
    async fn of_too_many_reports_that_wait_the_oldest_go_and_are_counted() {
        let mut round = round(None);
        for _ in 0..MOST_WAITING + 3 {
            round.put(report());
        }
        let lane = round.lanes.values().next().unwrap();
        assert_eq!((round.count(), lane.waiting.front().unwrap().number, counted(&round.courier, "overrun")), (MOST_WAITING, 3, 3));
    }

    #[tokio::test]
    async fn a_queue_that_nobody_empties_costs_turns_nothing_and_reports_are_counted() {
        let courier = Courier::new(None).unwrap();
        for _ in 0..QUEUE + 2 {
            courier.send(report());
        }
        assert_eq!((counted(&courier, "overrun"), *courier.0.left.borrow()), (2, QUEUE));
    }

    #[tokio::test(start_paused = true)]
    async fn an_orchestrator_that_is_away_is_left_alone_for_longer_and_longer_and_then_told_in_order() {
        let mut round = round(None);
        for _ in 0..3 {
            round.put(report());
        }
        let calls = Calls::new();
        assert_eq!(round.start(&calls), None);
        for which in which(&round) {
            round.settle(which, Heard::Away);
        }
        let order: Vec<u64> = round.lanes.values().flat_map(|lane| &lane.waiting).map(|waiting| waiting.number).collect();
        assert_eq!(order, [0, 1, 2]);
        for pause in [250, 500, 1000, 2000, 4000, 8000, 8000_u64] {
            let until = round.start(&calls).unwrap();
            assert_eq!((until - Instant::now(), which(&round).len()), (Duration::from_millis(pause), 0));
            sleep_until(until).await;
            assert_eq!(round.start(&calls), None);
            let [one] = which(&round)[..] else { panic!("one at a time") };
            round.settle(one, Heard::Away);
        }
        sleep_until(round.start(&calls).unwrap()).await;
        round.start(&calls);
        let [first] = which(&round)[..] else { panic!("one at a time") };
        assert_eq!(round.under_way[&first].number, 0);
        round.settle(first, Heard::Kept);
        round.start(&calls);
        assert_eq!((which(&round).len(), counted(&round.courier, "told")), (2, 1), "and the rest at once");
    }

    #[tokio::test(start_paused = true)]
    async fn a_refusal_is_not_believed_at_once_and_not_for_ever() {
        let (mut round, calls) = (round(None), Calls::new());
        round.put(report());
        for told in 1..=REFUSALS {
            let next = round.start(&calls);
            assert_eq!(next, None);
            let [one] = which(&round)[..] else { panic!("told {told} times") };
            round.settle(one, Heard::Refused("late"));
            tokio::time::advance(AGAIN).await;
        }
        assert_eq!((round.count(), counted(&round.courier, "late")), (0, 1));
        round.put(report());
        for _ in 0..2 {
            round.start(&calls);
            let [one] = which(&round)[..] else { panic!("one") };
            round.settle(one, Heard::Refused(UNKNOWN));
            tokio::time::advance(AGAIN).await;
        }
        assert_eq!((round.count(), counted(&round.courier, "unknown")), (0, 1));
    }

    #[tokio::test]
    async fn what_waits_in_the_spool_is_there_for_the_next_process_without_text_and_what_was_told_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let (mut first, calls) = (round(Some(folder.path())), Calls::new());
        for _ in 0..3 {
            first.put(report());
        }
        first.start(&calls);
        let mut all = which(&first);
        all.sort_by_key(|which| first.under_way[which].number);
        first.settle(all[0], Heard::Away);
        first.settle(all[1], Heard::Away);
        first.store.flush();
        drop(first);
        let bytes = std::fs::read(folder.path().join("0000000001.events")).unwrap();
        assert!(!String::from_utf8_lossy(&bytes).contains("canary"));
        let mut second = round(Some(folder.path()));
        assert_eq!((second.count(), *second.courier.0.left.borrow()), (3, 3));
        second.start(&calls);
        for which in which(&second) {
            second.settle(which, Heard::Kept);
        }
        second.store.flush();
        drop(second);
        assert_eq!(round(Some(folder.path())).count(), 0);
    }

    #[tokio::test]
    async fn a_report_that_is_a_day_old_is_given_up() {
        let (mut round, calls) = (round(None), Calls::new());
        round.put(Report { since: unix_now() - OLDEST.as_secs() - 1, ..report() });
        round.start(&calls);
        let one = which(&round)[0];
        round.settle(one, Heard::Away);
        assert_eq!((round.count(), counted(&round.courier, "expired")), (0, 1));
    }
}
