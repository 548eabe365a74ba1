//! Limits how much a tenant or a subject may ask for: requests, output tokens, streams open at a time.

use std::{
    collections::HashMap,
    hash::{BuildHasher, RandomState},
    num::NonZeroU32,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};

use governor::{Quota, RateLimiter, clock::Clock, middleware::NoOpMiddleware, state::keyed::DashMapStateStore};
use headgate_contracts::{Category, Code, Fault, Finding, Prompt, Record, Refusal, Source, Stage, Stop, Turn};
use schemars::JsonSchema;
use serde::Deserialize;
use tokio::time::Instant;

use crate::{
    Account, BoxFuture, Filter, Lease, Ledger, Problem, Rule, Taken, Text, Tools, Verdict,
    budget::BYTES_PER_TOKEN,
    table::{self, Facts, Fits, Parts},
    units::Rate,
};

/// Settings of `rate_limit`. A rate such as `60/min` allows 60 at once and then one a second.
#[derive(Debug, Clone, PartialEq, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(rename = "RateLimitSettings")]
pub struct Settings {
    /// Who shares a limit: all subjects of a `tenant` (default), or each `subject` has its own.
    pub per: Per,
    /// Turns that may begin, e.g. `60/min`.
    pub requests: Option<Rate>,
    /// Output tokens, e.g. `100k/min`: counted as they pass, 4 bytes of UTF-8 each, and corrected by the model's own count
    /// where it gives one. A turn begins while there are any left; what it then uses beyond them the next turn waits for.
    pub output_tokens: Option<Rate>,
    /// Turns that may be open at a time.
    pub streams: Option<u32>,
}

/// Who shares a limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Per {
    /// All subjects of a tenant.
    #[default]
    Tenant,
    /// Nobody.
    Subject,
}

impl table::Settings for Settings {
    const TERMS: Fits = Fits { shadow: true, hold: false, pass: true };

    fn build(&self, tools: &Tools<'_>) -> Result<Parts, Vec<Problem>> {
        if self.streams == Some(0) {
            return Err(vec![Problem::new("streams", "0: no turn could begin").expected("a number above 0").remedy("remove `streams`")]);
        }
        if self.requests.is_none() && self.output_tokens.is_none() && self.streams.is_none() {
            return Err(vec![
                Problem::new("", "no limit is set, so nothing would be limited")
                    .expected("`requests`, `output_tokens`, `streams` or several of them")
                    .remedy("write e.g. `rate_limit: { per: tenant, requests: 60/min }`"),
            ]);
        }
        let limits = Limits { settings: self.clone(), ledger: tools.ledger.clone() };
        let judges_text = self.output_tokens.is_some();
        Ok(Parts { rule: Arc::new(LimitsAll(Arc::new(limits))), facts: Facts { judges_text, ..Facts::default() }, admit: None })
    }
}

struct Limits {
    settings: Settings,
    ledger: Arc<dyn Ledger>,
}

struct LimitsAll(Arc<Limits>);

impl Rule for LimitsAll {
    fn start(&self, turn: &mut Turn) -> Box<dyn Filter> {
        Box::new(RateLimit {
            limits: self.0.clone(),
            route: turn.route.clone(),
            tokens: None,
            uncharged_bytes: 0,
            charged_tokens: 0,
            lease: None,
            refused: false,
        })
    }
}

/// The limits of one turn.
struct RateLimit {
    limits: Arc<Limits>,
    route: Arc<str>,
    /// Who pays for output tokens; known once the turn was let in.
    tokens: Option<Account>,
    uncharged_bytes: u64,
    charged_tokens: u64,
    /// Held until the turn is dropped, however it ended.
    lease: Option<Lease>,
    refused: bool,
}

/// How much text passes before it is charged: often enough that turns beginning meanwhile see it, seldom enough to cost nothing.
const CHARGE_BYTES: u64 = 1024;

/// When to come back where all places are taken: nobody knows when one gets free.
const RETRY_PLACE: Duration = Duration::from_secs(1);

impl RateLimit {
    fn account(&self, what: &str, prompt: &Prompt) -> Account {
        let (tenant, subject) = (prompt.principal.tenant.as_str(), prompt.principal.subject.as_str());
        Account::new(match self.limits.settings.per {
            Per::Tenant => [what, &self.route, tenant].join(" "),
            Per::Subject => [what, &self.route, tenant, subject].join(" "),
        })
    }

    fn refuse(&mut self, rule: &'static str, what: &str, pause: Duration) -> Stop {
        self.refused = true;
        // Whole seconds are what Retry-After can say; rounding down would invite a refusal.
        let pause = Duration::from_secs(pause.as_secs() + u64::from(pause.subsec_nanos() > 0)).max(Duration::from_secs(1));
        Refusal::new(Code::RateLimited, rule).saying(format!("too many {what} for now")).after(pause).into()
    }

    async fn admit(&mut self, prompt: &mut Prompt) -> Result<(), Stop> {
        let Limits { settings, ledger } = &*self.limits.clone();
        // The place comes first: it is given back when a later limit says no.
        if let Some(most) = settings.streams {
            let account = self.account("streams", prompt);
            match ledger.lease(&account, most).await? {
                Some(lease) => self.lease = Some(lease),
                None => return Err(self.refuse("rate_limit.streams", "open streams", RETRY_PLACE)),
            }
        }
        if let Some(rate) = settings.output_tokens {
            let account = self.account("output_tokens", prompt);
            if let Taken::Wait(pause) = ledger.take(&account, rate, 1).await? {
                self.lease = None;
                return Err(self.refuse("rate_limit.output_tokens", "output tokens", pause));
            }
            self.charged_tokens = 1;
            self.tokens = Some(account);
        }
        if let Some(rate) = settings.requests {
            let account = self.account("requests", prompt);
            if let Taken::Wait(pause) = ledger.take(&account, rate, 1).await? {
                self.lease = None;
                return Err(self.refuse("rate_limit.requests", "requests", pause));
            }
        }
        Ok(())
    }

    /// Charges up to `tokens` in all.
    fn charge(&mut self, tokens: u64) {
        if let (Some(account), Some(rate)) = (&self.tokens, self.limits.settings.output_tokens)
            && let Some(more @ 1..) = tokens.checked_sub(self.charged_tokens)
        {
            self.limits.ledger.owe(account, rate, u32::try_from(more).unwrap_or(u32::MAX));
            self.charged_tokens = tokens;
        }
    }

    fn charge_text(&mut self, least: u64) {
        if self.uncharged_bytes >= least {
            let tokens = self.charged_tokens + self.uncharged_bytes / BYTES_PER_TOKEN;
            self.uncharged_bytes %= BYTES_PER_TOKEN;
            self.charge(tokens);
        }
    }
}

impl Filter for RateLimit {
    fn prompt<'a>(&'a mut self, prompt: &'a mut Prompt) -> BoxFuture<'a, Result<(), Stop>> {
        Box::pin(self.admit(prompt))
    }

    fn text(&mut self, text: Text<'_>) -> Verdict {
        self.uncharged_bytes += text.text.len() as u64;
        self.charge_text(CHARGE_BYTES);
        Verdict::pass()
    }

    fn end(&mut self, record: &mut Record) {
        self.charge_text(0);
        // The model's own count is better than the estimate, but never gives back: reasoning it hides is still paid for.
        if let Some(usage) = record.usage {
            self.charge(usage.output_tokens);
        }
        if self.refused {
            record.find(Finding {
                category: Category::UnboundedConsumption,
                source: Source::Rule,
                stage: Stage::Input,
                score: 1.0,
                rule: "rate_limit".into(),
            });
        }
    }
}

impl Drop for RateLimit {
    fn drop(&mut self) {
        // A turn that was dropped before its end has used what has passed.
        self.charge_text(0);
    }
}

/// Counters of this process, in memory. The accounts kept are bounded: beyond that, new ones share a few hundred counters.
pub struct LocalLedger {
    started: Instant,
    most: usize,
    meters: RwLock<HashMap<Rate, Arc<Meter>>>,
    /// What was used beyond what was there.
    debts: Mutex<HashMap<(Account, Rate), u64>>,
    places: Arc<Mutex<HashMap<Account, u32>>>,
    hasher: RandomState,
}

type Limiter = RateLimiter<Account, DashMapStateStore<Account>, TokioClock, NoOpMiddleware<Duration>>;

/// The counters of one rate.
struct Meter {
    limiter: Limiter,
    /// Uses since the bound was last looked at: counting the accounts locks all of them.
    uses: AtomicU32,
    crowded: AtomicBool,
}

/// The clock everything else here runs on, so that tests can stop it.
#[derive(Clone)]
struct TokioClock(Instant);

impl Clock for TokioClock {
    type Instant = Duration;
    fn now(&self) -> Duration {
        self.0.elapsed()
    }
}

/// Accounts kept per rate, give or take a sweep.
const MOST_ACCOUNTS: usize = 100_000;
/// Uses of a meter from one look at the bound to the next.
const SWEEP_USES: u32 = 256;
/// Counters shared by the accounts beyond the bound.
const CROWDS: u64 = 256;

impl Meter {
    fn new(rate: Rate, clock: TokioClock) -> Meter {
        let one = (rate.per / rate.count.max(1)).max(Duration::from_nanos(1));
        let burst = NonZeroU32::new(rate.count).unwrap_or(NonZeroU32::MIN);
        let quota = Quota::with_period(one).expect("a period above zero").allow_burst(burst);
        Meter { limiter: RateLimiter::dashmap_with_clock(quota, clock), uses: AtomicU32::new(0), crowded: AtomicBool::new(false) }
    }

    fn look(&self, most: usize) {
        if self.uses.fetch_add(1, Ordering::Relaxed) % SWEEP_USES == SWEEP_USES - 1 {
            if self.limiter.len() >= most {
                // Forgets the accounts whose counters are full again.
                self.limiter.retain_recent();
            }
            self.crowded.store(self.limiter.len() >= most, Ordering::Relaxed);
        }
    }
}

impl Default for LocalLedger {
    fn default() -> LocalLedger {
        LocalLedger::new()
    }
}

impl LocalLedger {
    /// Nothing counted yet.
    pub fn new() -> LocalLedger {
        LocalLedger::keeping(MOST_ACCOUNTS)
    }

    /// Keeps about `most` accounts per rate.
    fn keeping(most: usize) -> LocalLedger {
        LocalLedger {
            started: Instant::now(),
            most,
            meters: RwLock::default(),
            debts: Mutex::default(),
            places: Arc::default(),
            hasher: RandomState::new(),
        }
    }

    fn meter(&self, rate: Rate) -> Arc<Meter> {
        if let Some(meter) = self.meters.read().unwrap_or_else(PoisonError::into_inner).get(&rate) {
            return meter.clone();
        }
        let mut meters = self.meters.write().unwrap_or_else(PoisonError::into_inner);
        meters.entry(rate).or_insert_with(|| Arc::new(Meter::new(rate, TokioClock(self.started)))).clone()
    }

    /// The account to count on: itself, or a crowd's where too many are kept.
    fn counted(&self, meter: &Meter, account: &Account) -> Account {
        meter.look(self.most);
        if meter.crowded.load(Ordering::Relaxed) {
            Account::new(format!("crowd {}", self.hasher.hash_one(account) % CROWDS))
        } else {
            account.clone()
        }
    }

    fn debts(&self) -> MutexGuard<'_, HashMap<(Account, Rate), u64>> {
        self.debts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take_now(&self, account: &Account, rate: Rate, amount: u32) -> Taken {
        let meter = self.meter(rate);
        let account = self.counted(&meter, account);
        let try_take = |amount: u32| -> Taken {
            let Some(amount) = NonZeroU32::new(amount) else { return Taken::Yes };
            match meter.limiter.check_key_n(&account, amount) {
                Ok(Ok(())) => Taken::Yes,
                Ok(Err(not_until)) => Taken::Wait(not_until.wait_time_from(meter.limiter.clock().now())),
                // More than the counter ever holds.
                Err(_) => Taken::Wait(rate.per),
            }
        };
        let key = (account.clone(), rate);
        let mut debts = self.debts();
        if let Some(debt) = debts.get_mut(&key) {
            while *debt > 0 {
                let part = u32::try_from(*debt).unwrap_or(u32::MAX).min(rate.count);
                match try_take(part) {
                    Taken::Yes => *debt -= u64::from(part),
                    wait => return wait,
                }
            }
            debts.remove(&key);
        }
        drop(debts);
        try_take(amount)
    }
}

impl Ledger for LocalLedger {
    fn take<'a>(&'a self, account: &'a Account, rate: Rate, amount: u32) -> BoxFuture<'a, Result<Taken, Fault>> {
        Box::pin(std::future::ready(Ok(self.take_now(account, rate, amount))))
    }

    fn owe(&self, account: &Account, rate: Rate, amount: u32) {
        let meter = self.meter(rate);
        let account = self.counted(&meter, account);
        // What is there is taken first, in halves: only the rest is owed.
        let (mut left, mut part) = (amount, amount.min(rate.count));
        while let Some(some) = NonZeroU32::new(part) {
            if matches!(meter.limiter.check_key_n(&account, some), Ok(Ok(()))) {
                left -= part;
                part = part.min(left);
            } else {
                part /= 2;
            }
        }
        if left == 0 {
            return;
        }
        let mut debts = self.debts();
        // One bound for all: who is beyond it is let off.
        if debts.len() < self.most || debts.contains_key(&(account.clone(), rate)) {
            let debt = debts.entry((account, rate)).or_default();
            *debt = debt.saturating_add(u64::from(left));
        }
    }

    fn lease<'a>(&'a self, account: &'a Account, most: u32) -> BoxFuture<'a, Result<Option<Lease>, Fault>> {
        // As many entries as there are open turns, and those are bounded at the door.
        let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        let held = places.get(account).copied().unwrap_or(0);
        let lease = (held < most).then(|| {
            places.insert(account.clone(), held + 1);
            let (places, account) = (self.places.clone(), account.clone());
            Lease::new(move || {
                let mut places = places.lock().unwrap_or_else(PoisonError::into_inner);
                match places.get_mut(&account) {
                    Some(held) if *held > 1 => *held -= 1,
                    _ => drop(places.remove(&account)),
                }
            })
        });
        Box::pin(std::future::ready(Ok(lease)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{built_with, problems, prompt, turn};

    fn rate(text: &str) -> Rate {
        text.parse().unwrap()
    }

    fn local() -> (Arc<LocalLedger>, Tools<'static>) {
        let ledger = Arc::new(LocalLedger::new());
        (ledger.clone(), Tools { ledger, ..Tools::none() })
    }

    /// One turn of `tenant`/`subject` that has begun, or the refusal's rule and pause in seconds.
    async fn begin(rule: &Arc<dyn Rule>, tenant: &str, subject: &str) -> Result<Box<dyn Filter>, (String, u64)> {
        let mut prompt = prompt("hello");
        prompt.principal.tenant = tenant.parse().unwrap();
        prompt.principal.subject = subject.parse().unwrap();
        let mut filter = rule.start(&mut turn());
        match filter.prompt(&mut prompt).await {
            Ok(()) => Ok(filter),
            Err(Stop::Refused(refusal)) if refusal.code == Code::RateLimited => {
                Err((refusal.rule.to_string(), refusal.retry_after.unwrap().as_secs()))
            }
            Err(other) => panic!("{other:?}"),
        }
    }

    fn say(filter: &mut Box<dyn Filter>, bytes: usize) {
        let text = "x".repeat(bytes);
        drop(filter.text(Text { lane: Default::default(), at: Default::default(), text: &text }));
    }

    #[tokio::test(start_paused = true)]
    async fn a_tenant_beyond_its_rate_is_told_when_to_come_back() {
        let rule = built_with("rate_limit: { requests: 2/min }", &local().1).rule;
        assert!(begin(&rule, "acme", "a").await.is_ok());
        assert!(begin(&rule, "acme", "b").await.is_ok());
        assert_eq!(begin(&rule, "acme", "c").await.err(), Some(("rate_limit.requests".into(), 30)));
        assert!(begin(&rule, "other", "a").await.is_ok());
        tokio::time::advance(Duration::from_secs(30)).await;
        assert!(begin(&rule, "acme", "c").await.is_ok());
        assert!(begin(&rule, "acme", "c").await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn per_subject_each_subject_has_a_limit_of_its_own() {
        let rule = built_with("rate_limit: { per: subject, requests: 1/min }", &local().1).rule;
        assert!(begin(&rule, "acme", "a").await.is_ok());
        assert!(begin(&rule, "acme", "b").await.is_ok());
        assert!(begin(&rule, "acme", "a").await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn a_place_is_free_again_when_its_turn_is_dropped_at_any_point() {
        let (ledger, tools) = local();
        let rule = built_with("rate_limit: { streams: 2, requests: 3/min }", &tools).rule;
        let first = begin(&rule, "acme", "a").await;
        let second = begin(&rule, "acme", "a").await;
        assert!(first.is_ok() && second.is_ok());
        assert_eq!(begin(&rule, "acme", "a").await.err(), Some(("rate_limit.streams".into(), 1)));
        drop(first);
        assert!(begin(&rule, "acme", "a").await.is_ok());
        // The place of a turn that another limit refuses is given back too.
        assert_eq!(begin(&rule, "acme", "a").await.err().unwrap().0, "rate_limit.requests");
        drop(second);
        assert!(ledger.places.lock().unwrap().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn tokens_used_beyond_the_rate_are_waited_for_by_the_next_turn() {
        let rule = built_with("rate_limit: { output_tokens: 1000/min }", &local().1).rule;
        let mut filter = begin(&rule, "acme", "a").await.ok().unwrap();
        say(&mut filter, 4 * 1500);
        // The turn went on to its end; 500 tokens are owed, and every one comes back in 60 ms.
        drop(filter);
        let (why, pause) = begin(&rule, "acme", "a").await.err().unwrap();
        assert_eq!(why, "rate_limit.output_tokens");
        assert!((1..=60).contains(&pause), "{pause}");
        tokio::time::advance(Duration::from_secs(120)).await;
        assert!(begin(&rule, "acme", "a").await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn tokens_are_charged_while_they_pass_and_when_a_turn_is_dropped() {
        let (ledger, tools) = local();
        let rule = built_with("rate_limit: { output_tokens: 1000/h }", &tools).rule;
        let left = |ledger: &LocalLedger| {
            let account = Account::new("output_tokens /v1/chat/stream acme");
            (0..1000).take_while(|_| ledger.take_now(&account, rate("1000/h"), 1) == Taken::Yes).count()
        };
        let mut filter = begin(&rule, "acme", "a").await.ok().unwrap();
        say(&mut filter, 4 * 300);
        say(&mut filter, 4 * 100);
        drop(filter);
        // One token was taken at the door, 400 were used.
        assert_eq!(left(&ledger), 599);
    }

    #[tokio::test(start_paused = true)]
    async fn the_models_own_count_is_charged_where_it_is_higher() {
        let (ledger, tools) = local();
        let rule = built_with("rate_limit: { output_tokens: 1000/h }", &tools).rule;
        let mut filter = begin(&rule, "acme", "a").await.ok().unwrap();
        say(&mut filter, 40);
        let usage = headgate_contracts::Usage { input_tokens: 0, output_tokens: 1000 };
        filter.end(&mut Record { usage: Some(usage), ..Record::default() });
        drop(filter);
        assert_eq!(begin(&rule, "acme", "a").await.err().unwrap().0, "rate_limit.output_tokens");
        assert!(ledger.debts().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_flood_of_accounts_is_bounded_and_still_limited() {
        let ledger = LocalLedger::keeping(1_000);
        let refused = (0..50_000).filter(|n| ledger.take_now(&Account::new(format!("{n}")), rate("5/h"), 1) != Taken::Yes).count();
        assert!(ledger.meter(rate("5/h")).limiter.len() <= 1_000 + SWEEP_USES as usize + CROWDS as usize);
        // 256 crowds of 5 an hour are far fewer than 49,000.
        assert!(refused > 40_000, "{refused}");
        tokio::time::advance(Duration::from_secs(7200)).await;
        for n in 0..SWEEP_USES {
            ledger.take_now(&Account::new(format!("later {}", n % 7)), rate("5/h"), 1);
        }
        assert!(ledger.meter(rate("5/h")).limiter.len() < 1_000, "full counters are forgotten");
    }

    #[test]
    fn a_limit_that_limits_nothing_is_refused() {
        assert!(problems("rate_limit: { per: subject }")[0].to_string().contains("requests: 60/min"));
        assert_eq!(problems("rate_limit: { streams: 0 }")[0].at, "rate_limit.streams");
    }
}
