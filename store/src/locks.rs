//! The lock of training mode: at most one owner per tenant, for a time, in Redis or in this process.
//!
//! It keeps two admins from getting in each other's way and protects nothing: Redis may lose it, and an owner may be asleep
//! while it runs out. What protects is the fence that goes with it; a lock counts as held only once it has one.
//!
//! | key in Redis | what |
//! |---|---|
//! | `training:{tenant}:lock` | a hash, gone by itself: owner, session, when it was taken, until when, who approved, the fence once there is one |
//! | `training:{tenant}:last` | the same without an end: who must be said to have lost it, if it is gone without a word |
//! | `training:{tenant}:gone` | the session that gave the lock back last, for ten minutes: for whoever renews it |
//! | `training:{tenant}:stay` | whose time runs, and since when: gone once the owner has left the lock alone for as long as one may have it |
//! | `training:{tenant}:high` | the highest fence that a lock was held with |
//! | `training:tenants` | the tenants with any of these, for those who look at all |
//! | `training:changes` | a channel: something changed |

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures_util::{Stream, StreamExt, stream};
use redis::{FromRedisValue, Value};
use tokio::time::Instant;

use crate::{Redis, Unanswered, cmd, pipe};

/// The most tenants whose locks are looked at.
pub const MOST_LOCKS: usize = 1000;
/// What no turn waits for may take longer than a turn's budget.
const PATIENCE: Duration = Duration::from_secs(1);
const TENANTS: &str = "training:tenants";
const CHANGES: &str = "training:changes";

/// KEYS: lock, last, stay. ARGV: owner, session, now, ttl, the longest. 1: taken; 0: it is somebody's; 2: its owner has had it for as
/// long as one may, less a ttl at most, and has so many milliseconds to wait. With it: who has it, or else who had it and said no word.
const ACQUIRE: &str = "
if redis.call('EXISTS', KEYS[1]) == 1 then
  return {0, redis.call('HMGET', KEYS[1], 'owner', 'session', 'since', 'until', 'approved', 'fence'), redis.call('PTTL', KEYS[1])}
end
local begun = ARGV[3]
local stay = redis.call('HMGET', KEYS[3], 'owner', 'begun')
if stay[1] == ARGV[1] then
  begun = stay[2]
  if ARGV[3] * 1000 + ARGV[4] > (begun + ARGV[5]) * 1000 then return {2, {}, redis.call('PTTL', KEYS[3])} end
end
local over = begun + ARGV[5]
redis.call('HSET', KEYS[3], 'owner', ARGV[1], 'begun', begun)
redis.call('PEXPIRE', KEYS[3], ARGV[5] * 1000 + 2 * ARGV[4])
local last = redis.call('HMGET', KEYS[2], 'owner', 'session', 'since', 'until', 'approved', 'fence')
for i = 1, 2 do
  redis.call('DEL', KEYS[i])
  redis.call('HSET', KEYS[i], 'owner', ARGV[1], 'session', ARGV[2], 'since', ARGV[3], 'until', over)
end
redis.call('PEXPIRE', KEYS[1], ARGV[4])
return {1, last, 0}";

/// KEYS: lock, last, high. ARGV: session, fence, now, ttl. 1: held; 0: it is another's, or nobody's; -1: a higher fence was given before.
const FENCE: &str = "
if redis.call('HGET', KEYS[1], 'session') ~= ARGV[1] then return 0 end
if tonumber(redis.call('GET', KEYS[3]) or '0') >= tonumber(ARGV[2]) then return -1 end
redis.call('SET', KEYS[3], ARGV[2])
redis.call('HSET', KEYS[1], 'fence', ARGV[2])
redis.call('HSET', KEYS[2], 'fence', ARGV[2])
redis.call('PEXPIRE', KEYS[1], math.max(0, math.min(tonumber(ARGV[4]), (redis.call('HGET', KEYS[1], 'until') - ARGV[3]) * 1000)))
return 1";

/// KEYS: lock, gone, stay. ARGV: session, fence, now, ttl, the longest. Until when it is held; 0: lost; -1: given back.
const RENEW: &str = "
if redis.call('HGET', KEYS[1], 'session') ~= ARGV[1] or redis.call('HGET', KEYS[1], 'fence') ~= ARGV[2] then
  return redis.call('GET', KEYS[2]) == ARGV[1] and -1 or 0
end
local over = tonumber(redis.call('HGET', KEYS[1], 'until'))
redis.call('PEXPIRE', KEYS[1], math.max(0, math.min(tonumber(ARGV[4]), (over - ARGV[3]) * 1000)))
redis.call('PEXPIRE', KEYS[3], ARGV[5] * 1000 + ARGV[4])
return over";

/// KEYS: lock. ARGV: session, its end. 1: nobody moves that end any more, or it is another's, or nobody's; 0: it was moved.
const CLOSE: &str = "
if redis.call('HGET', KEYS[1], 'session') ~= ARGV[1] then return 1 end
if tonumber(redis.call('HGET', KEYS[1], 'until')) ~= tonumber(ARGV[2]) then return 0 end
redis.call('HSET', KEYS[1], 'final', 1)
return 1";

/// KEYS: lock, last, stay. ARGV: session, who approves, now, the longest. 1: done; 0: it is another's, or nobody's, or its end is final.
const APPROVE: &str = "
if redis.call('HGET', KEYS[1], 'session') ~= ARGV[1] or redis.call('HEXISTS', KEYS[1], 'final') == 1 then return 0 end
for i = 1, 2 do redis.call('HSET', KEYS[i], 'approved', ARGV[2], 'until', ARGV[3] + ARGV[4]) end
redis.call('HSET', KEYS[3], 'owner', redis.call('HGET', KEYS[1], 'owner'), 'begun', ARGV[3])
redis.call('PEXPIRE', KEYS[3], ARGV[4] * 2000)
return 1";

/// KEYS: lock, last, gone. ARGV: session.
const RELEASE: &str = "
if redis.call('HGET', KEYS[1], 'session') ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[3], ARGV[1], 'PX', 600000)
redis.call('DEL', KEYS[1], KEYS[2])
return 1";

/// KEYS: lock, last. Gives who lost the lock and was not said to have.
const EXPIRED: &str = "
if redis.call('EXISTS', KEYS[1]) == 1 then return {0, {}, 0} end
local last = redis.call('HMGET', KEYS[2], 'owner', 'session', 'since', 'until', 'approved', 'fence')
redis.call('DEL', KEYS[2])
return {1, last, 0}";

/// A lock that somebody has, or had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// Who: an admin's opaque name.
    pub owner: String,
    /// Which taking of the lock this is: random.
    pub session: String,
    /// When it was taken, Unix seconds by the owner's clock.
    pub since: u64,
    /// When it is over however it is renewed, Unix seconds by the same clock.
    pub until: u64,
    /// Who approved of it last, which moved its end.
    pub approved: Option<String>,
    /// The fence; `None` while it is not known, and then the lock is not held yet.
    pub fence: Option<u64>,
    /// How long it lasts unless it is renewed; zero where it is over.
    pub left: Duration,
}

/// What became of taking a lock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Acquired {
    /// It is ours, and held once it has a fence. Whoever had it before and never gave it back, if anybody.
    Ours(Option<Held>),
    /// It is somebody's already.
    Taken(Held),
    /// This owner has had it for as long as one may, pauses shorter than that included: another may take it now, this one after so
    /// long.
    Spent(Duration),
}

/// What became of writing a fence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fenced {
    /// The lock is held.
    Held,
    /// It is no longer ours.
    Lost,
    /// A lock was held with a fence at least as high.
    Low,
}

/// What became of renewing a lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Renewed {
    /// Its time begins anew, and ends at this Unix second at the latest.
    Held(u64),
    /// Somebody gave it back for us.
    GivenBack,
    /// It ran out, or was forgotten.
    Lost,
}

/// The locks of all tenants.
#[derive(Debug, Clone)]
pub enum Locks {
    /// In Redis, for all processes.
    Shared(Redis),
    /// In this process, for those that run alone.
    Here(Arc<Here>),
}

/// The locks of one process.
#[derive(Debug, Default)]
pub struct Here {
    kept: Mutex<HashMap<String, Kept>>,
    /// Whose time runs, since when, and until when that is remembered.
    stays: Mutex<HashMap<String, (String, u64, Instant)>>,
}

#[derive(Debug, Clone)]
struct Kept {
    held: Held,
    until: Instant,
    /// Nobody moves its end any more.
    is_final: bool,
}

impl Kept {
    /// The lock, if it is not over.
    fn live(&self) -> Option<Held> {
        let left = self.until.saturating_duration_since(Instant::now());
        (!left.is_zero()).then(|| Held { left, ..self.held.clone() })
    }

    fn begin_anew(&mut self, now: u64, ttl: Duration) {
        self.until = Instant::now() + ttl.min(Duration::from_secs(self.held.until.saturating_sub(now)));
    }
}

impl Here {
    fn all(&self) -> MutexGuard<'_, HashMap<String, Kept>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is remembered of those whose time runs; what is over is forgotten.
    fn stays(&self) -> MutexGuard<'_, HashMap<String, (String, u64, Instant)>> {
        let mut stays = self.stays.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        stays.retain(|_, (_, _, until)| *until > now);
        stays
    }
}

fn keys(tenant: &str) -> [String; 5] {
    ["lock", "last", "high", "gone", "stay"].map(|kind| format!("training:{{{tenant}}}:{kind}"))
}

impl Locks {
    /// Those that this Redis keeps.
    pub fn shared(redis: &Redis) -> Locks {
        Locks::Shared(redis.within(PATIENCE))
    }

    /// Those of this process alone.
    pub fn here() -> Locks {
        Locks::Here(Arc::default())
    }

    /// Takes the lock of `tenant` for `ttl`, unless somebody has it, or `owner` has had it for `longest`. `now`: Unix seconds.
    ///
    /// Takings of one owner with less than `longest` between them count as one. Errors: Redis does not say. It may have been taken: it
    /// is over after `ttl`.
    pub async fn acquire(
        &self,
        tenant: &str,
        owner: &str,
        session: &str,
        now: u64,
        ttl: Duration,
        longest: Duration,
    ) -> Result<Acquired, Unanswered> {
        match self {
            Locks::Shared(redis) => {
                let [lock, last, _, _, stay] = keys(tenant);
                // First, so that whoever looks at all tenants finds what is taken next.
                redis.ask::<()>(cmd("SADD").arg(TENANTS).arg(tenant)).await?;
                let mut command = cmd("EVAL");
                command.arg(ACQUIRE).arg(3).arg(&lock).arg(&last).arg(&stay).arg(owner).arg(session).arg(now);
                let Answer(taken, held, left) = redis.ask(command.arg(ms(ttl)).arg(longest.as_secs())).await?;
                Ok(match (taken, held) {
                    (1, before) => Acquired::Ours(before),
                    (0, Some(held)) => Acquired::Taken(held),
                    (2, _) => Acquired::Spent(left),
                    _ => return Err(Unanswered::Refused("a lock without an owner".to_owned())),
                })
            }
            Locks::Here(here) => {
                let (mut all, mut stays) = (here.all(), here.stays());
                let before = all.get(tenant).cloned();
                if let Some(held) = before.as_ref().and_then(Kept::live) {
                    return Ok(Acquired::Taken(held));
                }
                let begun = match stays.get(tenant) {
                    Some((who, begun, until)) if who == owner => {
                        if Duration::from_secs(now) + ttl > Duration::from_secs(*begun) + longest {
                            return Ok(Acquired::Spent(until.saturating_duration_since(Instant::now())));
                        }
                        *begun
                    }
                    _ => now,
                };
                stays.insert(tenant.to_owned(), (owner.to_owned(), begun, Instant::now() + longest + 2 * ttl));
                let (owner, session, until) = (owner.to_owned(), session.to_owned(), begun + longest.as_secs());
                let held = Held { owner, session, since: now, until, approved: None, fence: None, left: ttl };
                all.insert(tenant.to_owned(), Kept { held, until: Instant::now() + ttl, is_final: false });
                Ok(Acquired::Ours(before.map(|kept| Held { left: Duration::ZERO, ..kept.held })))
            }
        }
    }

    /// Writes the fence of a lock that was taken, if it is still ours, and begins its time anew, which does not go beyond its end.
    /// `now`: Unix seconds.
    ///
    /// Errors: Redis does not say. It may be held.
    pub async fn fence(&self, tenant: &str, session: &str, fence: u64, now: u64, ttl: Duration) -> Result<Fenced, Unanswered> {
        match self {
            Locks::Shared(redis) => {
                let mut command = cmd("EVAL");
                let [lock, last, high, ..] = keys(tenant);
                command.arg(FENCE).arg(3).arg(&lock).arg(&last).arg(&high).arg(session).arg(fence).arg(now).arg(ms(ttl));
                let fenced = match redis.ask::<i64>(&command).await? {
                    1 => Fenced::Held,
                    -1 => Fenced::Low,
                    _ => Fenced::Lost,
                };
                self.tell(tenant).await;
                Ok(fenced)
            }
            Locks::Here(here) => Ok(match here.all().get_mut(tenant) {
                Some(kept) if kept.held.session == session && kept.live().is_some() => {
                    kept.held.fence = Some(fence);
                    kept.begin_anew(now, ttl);
                    Fenced::Held
                }
                _ => Fenced::Lost,
            }),
        }
    }

    /// Begins the time of a held lock anew, if it is still ours; it does not go beyond the lock's end. `now` and `longest`: as for
    /// [`Locks::acquire`].
    ///
    /// Errors: Redis does not say.
    pub async fn renew(
        &self,
        tenant: &str,
        session: &str,
        fence: u64,
        now: u64,
        ttl: Duration,
        longest: Duration,
    ) -> Result<Renewed, Unanswered> {
        match self {
            Locks::Shared(redis) => {
                let [lock, _, _, gone, stay] = keys(tenant);
                let mut command = cmd("EVAL");
                command.arg(RENEW).arg(3).arg(&lock).arg(&gone).arg(&stay).arg(session).arg(fence).arg(now);
                match redis.ask::<i64>(command.arg(ms(ttl)).arg(longest.as_secs())).await? {
                    -1 => Ok(Renewed::GivenBack),
                    0 => Ok(Renewed::Lost),
                    until => {
                        // Whoever tidied up while the lock was being taken is outlived.
                        redis.ask::<()>(cmd("SADD").arg(TENANTS).arg(tenant)).await?;
                        Ok(Renewed::Held(until.unsigned_abs()))
                    }
                }
            }
            Locks::Here(here) => {
                let (mut all, mut stays) = (here.all(), here.stays());
                Ok(match all.get_mut(tenant) {
                    Some(kept) if kept.held.session == session && kept.held.fence == Some(fence) && kept.live().is_some() => {
                        kept.begin_anew(now, ttl);
                        if let Some((_, _, until)) = stays.get_mut(tenant) {
                            *until = Instant::now() + longest + ttl;
                        }
                        Renewed::Held(kept.held.until)
                    }
                    _ => Renewed::Lost,
                })
            }
        }
    }

    /// Makes the end of a lock final, if it is still `until`; whether it was. From then on nobody approves of it, so that whoever is told
    /// that they did is not told so of a lock that is about to be given back.
    ///
    /// Errors: Redis does not say. It may be final.
    pub async fn close(&self, tenant: &str, session: &str, until: u64) -> Result<bool, Unanswered> {
        match self {
            Locks::Shared(redis) => {
                let [lock, ..] = keys(tenant);
                redis.ask(cmd("EVAL").arg(CLOSE).arg(1).arg(&lock).arg(session).arg(until)).await
            }
            Locks::Here(here) => Ok(match here.all().get_mut(tenant) {
                Some(kept) if kept.held.session == session && kept.live().is_some() => {
                    kept.is_final |= kept.held.until == until;
                    kept.is_final
                }
                _ => true,
            }),
        }
    }

    /// Moves the end of a lock to `longest` from `now`, if it is still that of `session` and was not [closed](Locks::close); whether it
    /// was. `who` approves: another than its owner, whom the caller has seen.
    ///
    /// Errors: Redis does not say. It may have been moved.
    pub async fn approve(&self, tenant: &str, session: &str, who: &str, now: u64, longest: Duration) -> Result<bool, Unanswered> {
        match self {
            Locks::Shared(redis) => {
                let [lock, last, _, _, stay] = keys(tenant);
                let mut command = cmd("EVAL");
                command.arg(APPROVE).arg(3).arg(&lock).arg(&last).arg(&stay);
                redis.ask(command.arg(session).arg(who).arg(now).arg(longest.as_secs())).await
            }
            Locks::Here(here) => {
                let (mut all, mut stays) = (here.all(), here.stays());
                Ok(match all.get_mut(tenant) {
                    Some(kept) if kept.held.session == session && !kept.is_final && kept.live().is_some() => {
                        (kept.held.approved, kept.held.until) = (Some(who.to_owned()), now + longest.as_secs());
                        stays.insert(tenant.to_owned(), (kept.held.owner.clone(), now, Instant::now() + 2 * longest));
                        true
                    }
                    _ => false,
                })
            }
        }
    }

    /// Gives the lock back; whether it was that of `session`.
    ///
    /// Errors: Redis does not say.
    pub async fn release(&self, tenant: &str, session: &str) -> Result<bool, Unanswered> {
        match self {
            Locks::Shared(redis) => {
                let [lock, last, _, gone, _] = keys(tenant);
                let mut command = cmd("EVAL");
                command.arg(RELEASE).arg(3).arg(&lock).arg(&last).arg(&gone).arg(session);
                let ours = redis.ask::<bool>(&command).await?;
                if ours {
                    self.tell(tenant).await;
                }
                Ok(ours)
            }
            Locks::Here(here) => {
                let mut all = here.all();
                let ours = all.get(tenant).is_some_and(|kept| kept.held.session == session && kept.live().is_some());
                if ours {
                    all.remove(tenant);
                }
                Ok(ours)
            }
        }
    }

    /// The lock of `tenant`, if anybody has it.
    ///
    /// Errors: Redis does not say.
    pub async fn read(&self, tenant: &str) -> Result<Option<Held>, Unanswered> {
        match self {
            Locks::Shared(redis) => {
                let [lock, ..] = keys(tenant);
                let mut both = pipe();
                both.cmd("HMGET").arg(&lock).arg(&FIELDS).cmd("PTTL").arg(&lock);
                let (fields, left) = redis.ask_all::<(Fields, i64)>(both.atomic()).await?;
                Ok(held(fields, left).filter(|_| left >= 0))
            }
            Locks::Here(here) => Ok(here.all().get(tenant).and_then(Kept::live)),
        }
    }

    /// The locks of all tenants that have one, at most [`MOST_LOCKS`], and the tenants without one that are still listed.
    ///
    /// Errors: Redis does not say.
    pub async fn all(&self) -> Result<(HashMap<String, Held>, Vec<String>), Unanswered> {
        match self {
            Locks::Shared(redis) => {
                let mut tenants: Vec<String> = redis.ask(cmd("SMEMBERS").arg(TENANTS)).await?;
                tenants.truncate(MOST_LOCKS);
                let (mut found, mut without) = (HashMap::new(), Vec::new());
                if tenants.is_empty() {
                    return Ok((found, without));
                }
                let mut commands = pipe();
                for tenant in &tenants {
                    let [lock, ..] = keys(tenant);
                    commands.cmd("HMGET").arg(&lock).arg(&FIELDS).cmd("PTTL").arg(&lock);
                }
                let answers: Vec<Value> = redis.ask_all(&commands).await?;
                for (tenant, answer) in tenants.into_iter().zip(answers.chunks_exact(2)) {
                    let [fields, left] = answer else { continue };
                    let read = |value: &Value| Fields::from_redis_value(value.clone()).ok();
                    let left = i64::from_redis_value(left.clone()).unwrap_or(0);
                    match read(fields).and_then(|fields| held(fields, left)).filter(|_| left >= 0) {
                        Some(held) => drop(found.insert(tenant, held)),
                        None => without.push(tenant),
                    }
                }
                Ok((found, without))
            }
            Locks::Here(here) => {
                let (mut found, mut without) = (HashMap::new(), Vec::new());
                for (tenant, kept) in here.all().iter().take(MOST_LOCKS) {
                    match kept.live() {
                        Some(held) => drop(found.insert(tenant.clone(), held)),
                        None => without.push(tenant.clone()),
                    }
                }
                Ok((found, without))
            }
        }
    }

    /// Who lost the lock of `tenant` by its time and was not said to have; asked by several, one is told.
    ///
    /// Errors: Redis does not say. It may have been forgotten.
    pub async fn expired(&self, tenant: &str) -> Result<Option<Held>, Unanswered> {
        match self {
            Locks::Shared(redis) => {
                let [lock, last, ..] = keys(tenant);
                let mut command = cmd("EVAL");
                command.arg(EXPIRED).arg(2).arg(&lock).arg(&last);
                let Answer(gone, last, _) = redis.ask(&command).await?;
                if gone == 1 {
                    redis.ask::<()>(cmd("SREM").arg(TENANTS).arg(tenant)).await?;
                }
                Ok(last.filter(|_| gone == 1))
            }
            Locks::Here(here) => {
                let mut all = here.all();
                if all.get(tenant).is_none_or(|kept| kept.live().is_some()) {
                    return Ok(None);
                }
                Ok(all.remove(tenant).map(|kept| Held { left: Duration::ZERO, ..kept.held }))
            }
        }
    }

    /// Something whenever a lock was taken or given back; ends when it cannot be told any more.
    ///
    /// Errors: Redis cannot be listened to now.
    pub async fn changes(&self) -> Result<impl Stream<Item = ()> + Send + Unpin + use<>, Unanswered> {
        match self {
            Locks::Shared(redis) => Ok(redis.listen(CHANGES).await?.left_stream()),
            Locks::Here(_) => Ok(stream::pending().right_stream()),
        }
    }

    /// Says that something changed: those who do not hear it look again by themselves.
    async fn tell(&self, tenant: &str) {
        if let Locks::Shared(redis) = self {
            let _ = redis.ask::<()>(cmd("PUBLISH").arg(CHANGES).arg(tenant)).await;
        }
    }
}

const FIELDS: [&str; 6] = ["owner", "session", "since", "until", "approved", "fence"];
type Fields = (Option<String>, Option<String>, Option<u64>, Option<u64>, Option<String>, Option<u64>);

fn held((owner, session, since, until, approved, fence): Fields, left: i64) -> Option<Held> {
    let left = Duration::from_millis(u64::try_from(left).unwrap_or(0));
    Some(Held { owner: owner?, session: session?, since: since?, until: until?, approved, fence, left })
}

/// What the scripts answer: what became of it, a lock, and a time.
struct Answer(i64, Option<Held>, Duration);

impl FromRedisValue for Answer {
    fn from_redis_value(value: Value) -> Result<Answer, redis::ParsingError> {
        let (became, fields, left) = <(i64, Value, i64)>::from_redis_value(value)?;
        let held = Fields::from_redis_value(fields).ok().and_then(|fields| held(fields, left));
        Ok(Answer(became, held, Duration::from_millis(u64::try_from(left).unwrap_or(0))))
    }
}

fn ms(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
