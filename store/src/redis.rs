//! Asks Redis, and waits no longer than the budget: what does not answer is passed over for a while, and then tried by nobody
//! but a task beside the turns.
//!
//! ```text
//! up ── three late answers in a row, a broken connection, -LOADING ──▶ down: every call fails at once
//!  ▲                                                                    │ every half second, beside the turns:
//!  └────────────────────── it connects and answers a PING ──────────────┘ a new connection
//! ```

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use futures_util::{Stream, StreamExt};
use prometheus_client::{
    metrics::{counter::Counter, gauge::Gauge},
    registry::Registry,
};
use redis::{
    AsyncConnectionConfig, Client, Cmd, FromRedisValue, Pipeline, RedisError, ServerErrorKind, TlsCertificates, aio::MultiplexedConnection,
};
use tokio::{
    sync::{Notify, watch},
    time::{sleep, timeout},
};

/// Late answers in a row after which nobody asks any more.
const STRIKES: u32 = 3;
/// Between two tries to come back: a Redis that answers again is used within a second.
const PAUSE: Duration = Duration::from_millis(500);
/// Between two signs of life that are asked for, so that a connection is not found broken by a turn.
const BEAT: Duration = Duration::from_secs(1);
/// How long one try may take: name lookup, TCP, TLS, the handshake and a PING.
const PATIENCE: Duration = Duration::from_secs(1);
/// What a certificate in PEM begins with (RFC 7468).
const PEM: &[u8] = b"-----BEGIN CERTIFICATE-----";

/// A connection to Redis, shared by all its clones.
#[derive(Clone)]
pub struct Redis {
    shared: Arc<Shared>,
    budget: Duration,
}

struct Shared {
    client: Client,
    /// What a sign of life may take.
    budget: Duration,
    lost: Arc<Notify>,
    link: Mutex<Link>,
    is_up: watch::Sender<bool>,
    up: Gauge,
    timeouts: Counter,
    failures: Counter,
}

/// The connection, if there is one, and which one it is: a call on the one before says nothing about it.
struct Link {
    connection: Option<MultiplexedConnection>,
    number: u64,
    late_in_a_row: u32,
}

/// Why there is no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unanswered {
    /// It did not come within the budget. Whether the command was carried out is not known.
    #[error("redis did not answer in time")]
    Late,
    /// Redis was away a moment ago, and was not asked.
    #[error("redis is away")]
    Away,
    /// The connection broke, or Redis cannot serve now. Whether the command was carried out is not known.
    #[error("redis cannot be asked: {0}")]
    Failed(String),
    /// Redis answered, and the answer is an error, or of another type than expected.
    #[error("redis refuses the command: {0}")]
    Refused(String),
}

/// Why Redis cannot be reached in this way. Does not show the URL: there may be a password in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unusable {
    /// The URL is none.
    #[error("not a URL of Redis: expected redis://host:6379, or rediss:// for TLS")]
    Url,
    /// Nobody can be checked by these certificates.
    #[error("not certificates to trust: expected PEM, for a URL with rediss://")]
    Certificates,
}

impl Redis {
    /// A connection to Redis at `url` (`redis://`, or `rediss://` for TLS with the system's certificates), made in the
    /// background and made again whenever it breaks. `budget`: the longest that one call may take.
    ///
    /// Must be called within a runtime that lives as long as the connection is to.
    pub fn connect(url: &str, budget: Duration) -> Result<Redis, Unusable> {
        Redis::of(Client::open(url).map_err(|_| Unusable::Url)?, budget)
    }

    /// The same over TLS with these certificates, as PEM, in place of the system's.
    pub fn connect_trusting(url: &str, ca: &[u8], budget: Duration) -> Result<Redis, Unusable> {
        // Without a single one it would go on to trust nobody, and say so at every try.
        if !ca.windows(PEM.len()).any(|window| window == PEM) {
            return Err(Unusable::Certificates);
        }
        let trusted = TlsCertificates { client_tls: None, root_cert: Some(ca.to_vec()) };
        Redis::of(Client::build_with_tls(url, trusted).map_err(|_| Unusable::Certificates)?, budget)
    }

    fn of(client: Client, budget: Duration) -> Result<Redis, Unusable> {
        // The client asks for the process' own, and panics where nobody has named one. Whoever did so before us is right.
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let lost = Arc::new(Notify::new());
        let shared = Arc::new(Shared {
            client,
            budget,
            lost: lost.clone(),
            link: Mutex::new(Link { connection: None, number: 0, late_in_a_row: 0 }),
            is_up: watch::Sender::new(false),
            up: Gauge::default(),
            timeouts: Counter::default(),
            failures: Counter::default(),
        });
        tokio::spawn(keep(Arc::downgrade(&shared), lost));
        Ok(Redis { shared, budget })
    }

    /// The same connection with another budget: for work that no turn waits for.
    pub fn within(&self, budget: Duration) -> Redis {
        Redis { shared: self.shared.clone(), budget }
    }

    /// The answer to one command. Takes at most the budget; while Redis is away, no time at all. Cancel safe: the command may
    /// have been carried out.
    pub async fn ask<T: FromRedisValue>(&self, command: &Cmd) -> Result<T, Unanswered> {
        let (mut connection, number) = self.shared.connected().ok_or(Unanswered::Away)?;
        let answer = timeout(self.budget, command.query_async(&mut connection)).await;
        self.shared.judge(number, answer.ok())
    }

    /// The answers to several commands, sent together: as one transaction where the pipeline is `atomic`. As [`Redis::ask`].
    pub async fn ask_all<T: FromRedisValue>(&self, commands: &Pipeline) -> Result<T, Unanswered> {
        let (mut connection, number) = self.shared.connected().ok_or(Unanswered::Away)?;
        let answer = timeout(self.budget, commands.query_async(&mut connection)).await;
        self.shared.judge(number, answer.ok())
    }

    /// Something for each message published on `channel` from now on; ends when its connection, which is one of its own, breaks.
    pub async fn listen(&self, channel: &str) -> Result<impl Stream<Item = ()> + Send + Unpin + use<>, Unanswered> {
        if !self.is_up() {
            return Err(Unanswered::Away);
        }
        let subscribed = async {
            let mut inbox = self.shared.client.get_async_pubsub().await?;
            inbox.subscribe(channel).await?;
            Ok::<_, RedisError>(inbox.into_on_message())
        };
        match timeout(PATIENCE, subscribed).await {
            Ok(messages) => Ok(messages.map_err(|error| Unanswered::Failed(told(&error)))?.map(|_| ())),
            Err(_) => Err(Unanswered::Late),
        }
    }

    /// Whether Redis would be asked now.
    pub fn is_up(&self) -> bool {
        *self.shared.is_up.borrow()
    }

    /// Resolves once Redis is there. Waits for ever where it never is. Cancel safe.
    pub async fn up(&self) {
        // The sender lives as long as we do.
        let _ = self.shared.is_up.subscribe().wait_for(|up| *up).await;
    }

    /// Adds what is counted to what is exported.
    pub fn register(&self, registry: &mut Registry) {
        let Shared { up, timeouts, failures, .. } = &*self.shared;
        registry.register("headgate_redis_up", "1 while Redis is asked", up.clone());
        registry.register("headgate_redis_timeouts", "Answers that did not come within the budget", timeouts.clone());
        registry.register("headgate_redis_failures", "Broken connections, and answers that Redis cannot serve now", failures.clone());
    }
}

impl Shared {
    fn link(&self) -> MutexGuard<'_, Link> {
        self.link.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn connected(&self) -> Option<(MultiplexedConnection, u64)> {
        let link = self.link();
        link.connection.clone().map(|connection| (connection, link.number))
    }

    /// Draws the conclusions from the answer on connection `number`; `None`: there was none in time.
    fn judge<T>(&self, number: u64, answer: Option<Result<T, RedisError>>) -> Result<T, Unanswered> {
        match answer {
            Some(Ok(answer)) => {
                self.link().late_in_a_row = 0;
                Ok(answer)
            }
            Some(Err(error)) if is_away(&error) => {
                self.failures.inc();
                let why = told(&error);
                self.lose(number, &why);
                Err(Unanswered::Failed(why))
            }
            Some(Err(error)) => Err(Unanswered::Refused(told(&error))),
            None => {
                self.timeouts.inc();
                let mut link = self.link();
                link.late_in_a_row += u32::from(link.number == number);
                let is_out = link.late_in_a_row >= STRIKES;
                drop(link);
                if is_out {
                    self.lose(number, "it does not answer in time");
                }
                Err(Unanswered::Late)
            }
        }
    }

    /// Asks nobody any more until there is a new connection.
    fn lose(&self, number: u64, why: &str) {
        let mut link = self.link();
        if link.number != number || link.connection.take().is_none() {
            return;
        }
        drop(link);
        self.up.set(0);
        self.is_up.send_replace(false);
        tracing::warn!(redis = %self.place(), why, "redis is away");
        self.lost.notify_one();
    }

    fn gain(&self, connection: MultiplexedConnection) {
        let mut link = self.link();
        *link = Link { connection: Some(connection), number: link.number + 1, late_in_a_row: 0 };
        drop(link);
        self.up.set(1);
        self.is_up.send_replace(true);
        tracing::info!(redis = %self.place(), "redis is there");
    }

    async fn connect(&self) -> Result<MultiplexedConnection, RedisError> {
        // Both are our own to keep: the budget is the caller's, the patience is for all of it together.
        let config = AsyncConnectionConfig::new().set_connection_timeout(None).set_response_timeout(None);
        let mut connection = self.client.get_multiplexed_async_connection_with_config(&config).await?;
        redis::cmd("PING").query_async::<()>(&mut connection).await?;
        Ok(connection)
    }

    /// Where Redis is, without user and password.
    fn place(&self) -> &redis::ConnectionAddr {
        self.client.get_connection_info().addr()
    }
}

/// Connects whenever there is no connection, and asks now and then where there is one, until nobody is left to use it.
async fn keep(shared: Weak<Shared>, lost: Arc<Notify>) {
    let mut said = false;
    while let Some(here) = shared.upgrade() {
        let pause = match here.connected() {
            Some((mut connection, number)) => {
                let answer = timeout(here.budget, redis::cmd("PING").query_async::<()>(&mut connection)).await;
                // A connection that nobody has used for a while may have broken unseen.
                drop(here.judge(number, answer.ok()));
                BEAT
            }
            None => match timeout(PATIENCE, here.connect()).await {
                Ok(Ok(connection)) => {
                    here.gain(connection);
                    said = false;
                    BEAT
                }
                failed => {
                    if !std::mem::replace(&mut said, true) {
                        let why = failed.map_or_else(
                            |_| "no answer in time".to_owned(),
                            |failed| failed.err().map_or_else(String::new, |error| told(&error)),
                        );
                        tracing::warn!(redis = %here.place(), why, "cannot connect to redis");
                    }
                    PAUSE
                }
            },
        };
        drop(here);
        let is_lost = tokio::select! {
            () = sleep(pause) => false,
            () = lost.notified() => true,
        };
        if is_lost {
            sleep(PAUSE).await;
        }
    }
}

/// Whether an error says that this Redis, or this connection to it, is of no use now.
fn is_away(error: &RedisError) -> bool {
    use redis::ErrorKind;
    match error.kind() {
        ErrorKind::Io | ErrorKind::AuthenticationFailed => true,
        ErrorKind::Server(kind) => matches!(
            kind,
            ServerErrorKind::BusyLoading | ServerErrorKind::MasterDown | ServerErrorKind::ClusterDown | ServerErrorKind::ReadOnly
        ),
        // Errors of ours: a command that Redis has not, an answer of another type. Redis itself is well.
        _ => matches!(error.code(), Some("NOAUTH" | "WRONGPASS")),
    }
}

/// An error in words that hold nothing of what was asked.
fn told(error: &RedisError) -> String {
    match error.code() {
        Some(code) => code.to_owned(),
        None => error.category().to_owned(),
    }
}

impl fmt::Debug for Redis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Redis").field("place", &self.shared.place().to_string()).field("budget", &self.budget).finish_non_exhaustive()
    }
}
