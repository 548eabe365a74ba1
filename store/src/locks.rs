//! The lock of training mode: at most one owner per tenant, for a time, in Redis or in this process.
//!
//! It keeps two admins from getting in each other's way and protects nothing: Redis may lose it, and an owner may be asleep
//! while it runs out. What protects is the fence that goes with it; a lock counts as held only once it has one.
//!
//! | key in Redis | what |
//! |---|---|
//! | `training:{tenant}:lock` | a hash, gone by itself: owner, session, when it was taken, the fence once there is one |
//! | `training:{tenant}:last` | the same without an end: who must be said to have lost it, if it is gone without a word |
//! | `training:{tenant}:gone` | the session that gave the lock back last, for ten minutes: for whoever renews it
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

/// KEYS: lock, last. ARGV: owner, session, now, ttl. Gives what is there where it is taken, else who had it and said no word.
const ACQUIRE: &str = "
if redis.call('EXISTS', KEYS[1]) == 1 then
  return {0, redis.call('HMGET', KEYS[1], 'owner', 'session', 'since', 'fence'), redis.call('PTTL', KEYS[1])}
end
local last = redis.call('HMGET', KEYS[2], 'owner', 'session', 'since', 'fence')
for _, key in ipairs(KEYS) do
  redis.call('DEL', key)
  redis.call('HSET', key, 'owner', ARGV[1], 'session', ARGV[2], 'since', ARGV[3])
end
redis.call('PEXPIRE', KEYS[1], ARGV[4])
return {1, last, 0}";

/// KEYS: lock, last, high. ARGV: session, fence, ttl. 1: held; 0: it is another's, or nobody's; -1: a higher fence was given before.
const FENCE: &str = "
if redis.call('HGET', KEYS[1], 'session') ~= ARGV[1] then return 0 end
if tonumber(redis.call('GET', KEYS[3]) or '0') >= tonumber(ARGV[2]) then return -1 end
redis.call('SET', KEYS[3], ARGV[2])
redis.call('HSET', KEYS[1], 'fence', ARGV[2])
redis.call('HSET', KEYS[2], 'fence', ARGV[2])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return 1";

/// KEYS: lock, gone. ARGV: session, fence, ttl. 1: held; 0: lost; -1: given back.
const RENEW: &str = "
if redis.call('HGET', KEYS[1], 'session') ~= ARGV[1] or redis.call('HGET', KEYS[1], 'fence') ~= ARGV[2] then
  return redis.call('GET', KEYS[2]) == ARGV[1] and -1 or 0
end
redis.call('PEXPIRE', KEYS[1], ARGV[3])
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
local last = redis.call('HMGET', KEYS[2], 'owner', 'session', 'since', 'fence')
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
    /// Its time begins anew.
    Held,
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
pub struct Here(Mutex<HashMap<String, Kept>>);

#[derive(Debug, Clone)]
struct Kept {
    held: Held,
    until: Instant,
}

impl Kept {
    /// The lock, if it is not over.
    fn live(&self) -> Option<Held> {
        let left = self.until.saturating_duration_since(Instant::now());
        (!left.is_zero()).then(|| Held { left, ..self.held.clone() })
    }
}

impl Here {
    fn all(&self) -> MutexGuard<'_, HashMap<String, Kept>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn keys(tenant: &str) -> [String; 4] {
    ["lock", "last", "high", "gone"].map(|kind| format!("training:{{{tenant}}}:{kind}"))
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

    /// Takes the lock of `tenant` for `ttl`, unless somebody has it. `now`: Unix seconds.
    ///
    /// Errors: Redis does not say. It may have been taken: it is over after `ttl`.
    pub async fn acquire(&self, tenant: &str, owner: &str, session: &str, now: u64, ttl: Duration) -> Result<Acquired, Unanswered> {
        match self {
            Locks::Shared(redis) => {
                let [lock, last, ..] = keys(tenant);
                // First, so that whoever looks at all tenants finds what is taken next.
                redis.ask::<()>(cmd("SADD").arg(TENANTS).arg(tenant)).await?;
                let mut command = cmd("EVAL");
                command.arg(ACQUIRE).arg(2).arg(&lock).arg(&last).arg(owner).arg(session).arg(now).arg(ms(ttl));
                let Answer(ours, held) = redis.ask(&command).await?;
                Ok(match (ours, held) {
                    (true, before) => Acquired::Ours(before),
                    (false, Some(held)) => Acquired::Taken(held),
                    (false, None) => return Err(Unanswered::Refused("a lock without an owner".to_owned())),
                })
            }
            Locks::Here(here) => {
                let mut all = here.all();
                let before = all.get(tenant).cloned();
                if let Some(held) = before.as_ref().and_then(Kept::live) {
                    return Ok(Acquired::Taken(held));
                }
                let held = Held { owner: owner.to_owned(), session: session.to_owned(), since: now, fence: None, left: ttl };
                all.insert(tenant.to_owned(), Kept { held, until: Instant::now() + ttl });
                Ok(Acquired::Ours(before.map(|kept| Held { left: Duration::ZERO, ..kept.held })))
            }
        }
    }

    /// Writes the fence of a lock that was taken, if it is still ours, and begins its time anew.
    ///
    /// Errors: Redis does not say. It may be held.
    pub async fn fence(&self, tenant: &str, session: &str, fence: u64, ttl: Duration) -> Result<Fenced, Unanswered> {
        match self {
            Locks::Shared(redis) => {
                let mut command = cmd("EVAL");
                let [lock, last, high, _] = keys(tenant);
                command.arg(FENCE).arg(3).arg(&lock).arg(&last).arg(&high).arg(session).arg(fence).arg(ms(ttl));
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
                    kept.until = Instant::now() + ttl;
                    Fenced::Held
                }
                _ => Fenced::Lost,
            }),
        }
    }

    /// Begins the time of a held lock anew, if it is still ours.
    ///
    /// Errors: Redis does not say.
    pub async fn renew(&self, tenant: &str, session: &str, fence: u64, ttl: Duration) -> Result<Renewed, Unanswered> {
        match self {
            Locks::Shared(redis) => {
                let [lock, _, _, gone] = keys(tenant);
                let mut command = cmd("EVAL");
                command.arg(RENEW).arg(2).arg(&lock).arg(&gone).arg(session).arg(fence).arg(ms(ttl));
                match redis.ask::<i64>(&command).await? {
                    1 => {
                        // Whoever tidied up while the lock was being taken is outlived.
                        redis.ask::<()>(cmd("SADD").arg(TENANTS).arg(tenant)).await?;
                        Ok(Renewed::Held)
                    }
                    -1 => Ok(Renewed::GivenBack),
                    _ => Ok(Renewed::Lost),
                }
            }
            Locks::Here(here) => Ok(match here.all().get_mut(tenant) {
                Some(kept) if kept.held.session == session && kept.held.fence == Some(fence) && kept.live().is_some() => {
                    kept.until = Instant::now() + ttl;
                    Renewed::Held
                }
                _ => Renewed::Lost,
            }),
        }
    }

    /// Gives the lock back; whether it was that of `session`.
    ///
    /// Errors: Redis does not say.
    pub async fn release(&self, tenant: &str, session: &str) -> Result<bool, Unanswered> {
        match self {
            Locks::Shared(redis) => {
                let [lock, last, _, gone] = keys(tenant);
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
                let Answer(gone, last) = redis.ask(&command).await?;
                if gone {
                    redis.ask::<()>(cmd("SREM").arg(TENANTS).arg(tenant)).await?;
                }
                Ok(last.filter(|_| gone))
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

const FIELDS: [&str; 4] = ["owner", "session", "since", "fence"];
type Fields = (Option<String>, Option<String>, Option<u64>, Option<u64>);

fn held((owner, session, since, fence): Fields, left: i64) -> Option<Held> {
    let left = Duration::from_millis(u64::try_from(left).unwrap_or(0));
    Some(Held { owner: owner?, session: session?, since: since?, fence, left })
}

/// What the scripts answer: a yes or no, and a lock.
struct Answer(bool, Option<Held>);

impl FromRedisValue for Answer {
    fn from_redis_value(value: Value) -> Result<Answer, redis::ParsingError> {
        let (yes, fields, left) = <(bool, Value, i64)>::from_redis_value(value)?;
        Ok(Answer(yes, Fields::from_redis_value(fields).ok().and_then(|fields| held(fields, left))))
    }
}

fn ms(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
