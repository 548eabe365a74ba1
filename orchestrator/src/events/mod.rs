//! Keeps what became of each turn in a write-ahead log: a turn is acknowledged only after its beginning is on disk, and every
//! turn that was gets exactly one end, even across a crash, and then one word on what the user got.
//!
//! ```text
//! run ── begin ──▶ queue ──▶ writer: one thread, one group, one fdatasync ──▶ "it is durable" ──▶ the model is asked
//!     └─ end ────▶ (its place in the queue and its room on disk were taken when the turn began: it cannot be refused)
//! gateway ── tell ─▶ (so was its room on disk) ──▶ "it is kept"; after a time without a word: "unknown"
//! ```
//!
//! What is kept are names, numbers and digests; what was said only where somebody asked for it, and sealed. The events are those of
//! `headgate_contracts::wire::log`.

mod brokers;
mod cursor;
#[cfg(feature = "kafka")]
mod deliver;
mod facts;
#[cfg(feature = "kafka")]
mod kafka;
mod read;
mod record;
mod recover;
mod sealed;
mod segment;
mod spool;
mod verify;
mod writer;

use std::{
    fmt,
    fs::File,
    io, mem,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle, Thread},
    time::{Duration, SystemTime},
};

use headgate_contracts::{
    Batch, End, Finish, Gone, InvalidId, Subject, TenantId, TurnId,
    wire::log::{Delivered, Progress},
};
use headgate_policy::vault::{Names, Sealer, Vault};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric},
    metrics::{
        MetricType,
        counter::{ConstCounter, Counter},
        family::Family,
        gauge::ConstGauge,
        histogram::Histogram,
    },
    registry::{Registry, Unit},
};
use tokio::sync::{mpsc, oneshot, watch};

pub use brokers::{Brokers, Sasl, Tls};
#[cfg(feature = "kafka")]
pub(crate) use kafka::read_topic;
#[cfg(feature = "kafka")]
pub use kafka::{Left, Orphan, Orphans, Place, Producer, Unacknowledged, Unread, follow_topic, orphans, reap, verify_topic};
pub use read::{Entry, Follow};
pub use record::Part;
pub use recover::{Unfit, Unopened};
pub use sealed::{Keys, unseal};
pub use spool::{Spool, ToTell};
pub use verify::{Judged, Violation, verify};

use cursor::Cursor;
pub(crate) use facts::{Beginning, Denial, Told};
use facts::{Begun, Whose};
use sealed::Text;

/// The latest turns that have ended and are remembered, so that none of them begins again.
const MOST_ENDED: usize = 1 << 16;
/// In the folder of a log, the key that names of subjects are made with.
const NAMES: &str = "names.key";

/// Where a log is and how large it may be.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The folder of its files; made if it is not there.
    pub folder: PathBuf,
    /// The most that it takes on disk, in bytes: at least [`Settings::LEAST_CAP`]. The oldest events are let go first.
    pub cap: u64,
    /// Turns open at once: the end of each has its place kept in the writer's queue.
    pub turns: usize,
    /// The topic that events go on to. Nothing is let go before the topic has it.
    pub topic: Option<Topic>,
    /// Where the keys are that text is sealed under; `None`: no text is kept.
    pub keys: Option<Keys>,
}

/// A Kafka topic, and what it must be like.
#[derive(Debug, Clone)]
pub struct Topic {
    /// Where it is.
    pub brokers: Brokers,
    /// Its name.
    pub name: String,
    /// Replicas of each partition, at least.
    pub replication: u16,
    /// Its `min.insync.replicas`, at least.
    pub in_sync: u16,
    /// How many partitions it is made with where it is missing; `None`: it is not made.
    pub partitions: Option<u16>,
}

impl Settings {
    /// The smallest cap.
    pub const LEAST_CAP: u64 = 4 << 20;

    /// A sixteenth of the cap: what is let go at once, and what is taken from the disk in advance.
    fn segment_bytes(&self) -> u64 {
        (self.cap.max(Settings::LEAST_CAP) / 16).clamp(segment::MIN_SEGMENT_BYTES, segment::MAX_SEGMENT_BYTES).next_multiple_of(4096)
    }
}

/// How what was written is made durable: `File::sync_data`, or what a test puts in its place.
pub type Sync = Box<dyn FnMut(&File) -> io::Result<()> + Send>;

/// Why a turn is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// There is no room on the disk, or below the cap.
    #[error("the event log is full")]
    Full,
    /// More turns wait for the disk than may.
    #[error("the disk is behind with the event log")]
    Behind,
    /// The disk failed to take a write.
    #[error("the event log is sealed after a failed write")]
    Sealed,
    /// The log knows a turn of that id.
    #[error("the event log has a turn of that id")]
    Known,
    /// An event is longer than any may be.
    #[error("an event is too long for the log")]
    TooLong,
    /// The key of the subject cannot be read, or not be made.
    #[error("the event log cannot seal text")]
    Keyless,
}

/// What a gateway told is durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Heard {
    /// It was written now.
    Now,
    /// It was there already.
    Again,
}

/// Why something that a gateway tells is not written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Untold {
    /// There is no such turn of that tenant and session.
    #[error("the event log has no such turn")]
    Unknown,
    /// The turn has not ended.
    #[error("the turn has no end yet")]
    Open,
    /// Something else was written of the turn before.
    #[error("the event log says something else of the turn")]
    Late,
    /// The log does not take it now.
    #[error(transparent)]
    Refused(Refused),
}

/// What was found when a log was opened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Recovered {
    /// Records that stand.
    pub records: u64,
    /// Turns that had no end and got one.
    pub crashed: usize,
    /// What was torn off the end, in bytes.
    pub torn_bytes: u64,
}

/// The name that stands for a subject in the log in `folder`, which keeps no text.
///
/// Errors: there is no log there that does, or its key cannot be used.
pub fn name(folder: &Path, tenant: &TenantId, subject: &Subject) -> io::Result<String> {
    let key = folder.join(NAMES);
    // It would be made, and the name would be nobody's.
    if !key.is_file() {
        return Err(io::Error::new(io::ErrorKind::NotFound, format!("there is no {}: the log there names nobody by it", key.display())));
    }
    Names::open(&key).map(|names| names.subject(tenant.as_str(), subject.as_str())).map_err(io::Error::other)
}

/// A log that is written to. Dropping the last handle ends it; [`Log::flush`] before that.
pub struct Log {
    writer: mpsc::Sender<writer::Command>,
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
    /// Says nothing, and is closed when the deliverer has ended.
    delivery: Option<Mutex<std::sync::mpsc::Receiver<()>>>,
    cap: u64,
    /// By what names people stand in events.
    people: People,
}

/// What stands for people in events.
enum People {
    /// A keyed hash for the subject.
    Named(Box<Names>),
    /// The names of the keys that their text is sealed under.
    Sealed(Arc<Vault>),
}

/// What the writer tells the others.
struct Shared {
    /// The number of the last record that is durable.
    durable: AtomicU64,
    sealed: AtomicBool,
    /// Nobody writes any more: what is there is the last there is.
    closed: AtomicBool,
    /// The number of the last record that is known for good to be delivered, with all before it; that of none where none has to be.
    delivered: watch::Sender<u64>,
    /// When the oldest event happened that is not delivered, in milliseconds since 1970; 0 where there is none.
    oldest_ms: AtomicI64,
    delivered_events: Counter,
    delivery_failures: Family<Failure, Counter>,
    /// The thread that delivers.
    deliverer: OnceLock<Thread>,
    pinned_bytes: AtomicU64,
    taken_bytes: AtomicU64,
    open_turns: AtomicU64,
    refused: Counter,
    /// Text on its way to the writer, in bytes.
    text_waiting: AtomicU64,
    text_dropped: Counter,
    written_bytes: Counter,
    sync_seconds: Histogram,
    deliveries: [Counter; Delivered::ALL.len()],
}

impl Shared {
    #[cfg(feature = "kafka")]
    fn failed(&self, why: &'static str) {
        self.delivery_failures.get_or_create(&Failure { why }).inc();
    }

    fn deliveries(&self, outcome: Delivered) -> &Counter {
        let [delivered, denied, cut, unknown] = &self.deliveries;
        match outcome {
            Delivered::Delivered => delivered,
            Delivered::Denied => denied,
            Delivered::Cut => cut,
            Delivered::Unknown => unknown,
        }
    }
}

/// Why the log was not delivered for a while: `away`, `barred`, `topic`, `event` or `log`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Failure {
    why: &'static str,
}

/// Seconds that a disk may take: from a good local one to one about to fail.
const SYNC_SECONDS: [f64; 12] = [0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.25, 1.0, 5.0];

impl Log {
    /// Opens the log, or begins one: reads it, cuts off what was torn, gives turns that a crash left open their end. Reads all of
    /// it: about a second per gibibyte.
    ///
    /// Errors: it cannot be used, another process writes to it, or it is damaged where it was whole once.
    pub fn open(settings: &Settings) -> Result<(Log, Recovered), Unopened> {
        Log::open_with(settings, Box::new(File::sync_data))
    }

    /// The same with another way to make writes durable.
    #[doc(hidden)]
    pub fn open_with(settings: &Settings, sync: Sync) -> Result<(Log, Recovered), Unopened> {
        let unusable = |source| Unopened::Unusable { folder: settings.folder.clone(), source };
        let vault = settings.keys.as_ref().map(Keys::open).transpose()?.map(Arc::new);
        let folder = segment::Folder::open(&settings.folder).map_err(unusable)?;
        let people = match vault {
            Some(vault) => People::Sealed(vault),
            None => People::Named(Box::new(Names::open(&settings.folder.join(NAMES)).map_err(Unopened::Nameless)?)),
        };
        let mut found = recover::recover(&settings.folder, &folder)?;
        let crashed: Vec<_> = mem::take(&mut found.open).iter().map(|(turn, first)| facts::Crashed::of(*turn, first, None)).collect();
        let recovered = Recovered { records: found.next_record - found.first_record, crashed: crashed.len(), torn_bytes: found.torn_bytes };
        let cursor = settings.topic.as_ref().map(|topic| Cursor::open(&settings.folder, &topic.name)).transpose().map_err(unusable)?;
        let cursor = cursor.map(|cursor| cursor.within(found.first_record, found.next_record)).transpose().map_err(unusable)?;
        let shared = Arc::new(Shared {
            durable: AtomicU64::new(found.next_record - 1),
            sealed: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            delivered: watch::Sender::new(cursor.as_ref().map_or(u64::MAX, Cursor::number)),
            oldest_ms: AtomicI64::new(0),
            delivered_events: Counter::default(),
            delivery_failures: Family::default(),
            deliverer: OnceLock::new(),
            pinned_bytes: AtomicU64::new(0),
            taken_bytes: AtomicU64::new(0),
            open_turns: AtomicU64::new(0),
            refused: Counter::default(),
            text_waiting: AtomicU64::new(0),
            text_dropped: Counter::default(),
            written_bytes: Counter::default(),
            sync_seconds: Histogram::new(SYNC_SECONDS),
            deliveries: Default::default(),
        });
        let cap = settings.cap.max(Settings::LEAST_CAP);
        let mut writer = writer::Writer::new(folder, sync, shared.clone(), cap, settings.segment_bytes(), found).map_err(unusable)?;
        writer.end_crashed(crashed).map_err(unusable)?;
        // A turn has two places: one to begin and one to end. As many again wait while the disk is busy.
        let (to_writer, asked) = mpsc::channel(4 * settings.turns.max(1));
        let thread = thread::Builder::new().name("event-log".to_owned()).spawn(move || writer.run(asked)).map_err(unusable)?;
        let mut log = Log { writer: to_writer, shared, thread: Mutex::new(Some(thread)), delivery: None, cap, people };
        if let (Some(topic), Some(cursor)) = (&settings.topic, cursor) {
            log.deliver(settings.folder.clone(), topic.clone(), cursor)?;
        }
        Ok((log, recovered))
    }

    /// Begins a turn: gives its account once its first two events are durable. A future that is dropped before that leaves a turn
    /// that was cancelled, or none.
    ///
    /// Errors: the turn must not run.
    pub(crate) async fn begin(&self, mut beginning: Beginning) -> Result<Account, Refused> {
        let turn = beginning.turn();
        // The place for the end is taken first: what begins can end.
        let place = || {
            self.writer.clone().try_reserve_owned().map_err(|full| match full {
                mpsc::error::TrySendError::Full(_) => Refused::Behind,
                mpsc::error::TrySendError::Closed(_) => Refused::Sealed,
            })
        };
        let refused = |refused| {
            self.shared.refused.inc();
            refused
        };
        let sealer = self.sealer(beginning.whose()).await.map_err(refused)?;
        if let Some(name) = self.name(&beginning.whose()).map_err(refused)? {
            beginning.pseudonym(name);
        }
        let sealer = sealer.map(|(sealer, names)| (sealer, beginning.rename(names)));
        let (for_end, for_begin) = (place().map_err(refused)?, place().map_err(refused)?);
        let (tell, told) = oneshot::channel();
        let (events, begun) = beginning.events();
        for_begin.send(writer::Command::Begin { turn, events, begun: Box::new(begun.clone()), tell });
        let text = sealer.map(|(sealer, lines)| {
            let mut text = Text::new(begun.clone(), sealer, self.writer.clone(), self.shared.clone());
            text.prompt(&lines);
            text
        });
        let account = Account { place: Some((for_end, begun)), text };
        match told.await.unwrap_or(Err(Refused::Sealed)) {
            Ok(()) => Ok(account),
            Err(refused) => {
                account.forget();
                Err(refused)
            }
        }
    }

    /// Whether text is kept.
    pub(crate) fn keeps_text(&self) -> bool {
        matches!(self.people, People::Sealed(_))
    }

    /// The name that stands for a subject whose text is not kept.
    fn name(&self, whose: &Whose) -> Result<Option<Subject>, Refused> {
        let People::Named(names) = &self.people else { return Ok(None) };
        // 22 characters of base64url: any name may be that.
        names.subject(whose.tenant.as_str(), whose.subject.as_str()).parse().map(Some).map_err(|_: InvalidId| Refused::Keyless)
    }

    /// What seals the text of a subject, and the names that stand for subject and session; `None` where no text is kept.
    async fn sealer(&self, whose: Whose) -> Result<Option<(Sealer, Whose)>, Refused> {
        let People::Sealed(vault) = &self.people else { return Ok(None) };
        let vault = vault.clone();
        let Whose { tenant, session, subject } = whose;
        let session = vault.session(tenant.as_str(), session.as_str());
        let of = tenant.clone();
        // It reads a file, and the first time it waits for the disk.
        let sealer = tokio::task::spawn_blocking(move || vault.sealer(of.as_str(), subject.as_str())).await;
        let keyless = |error: &dyn std::error::Error| {
            tracing::warn!(%error, source = error.source().map(tracing::field::display), "the event log cannot seal text");
            Refused::Keyless
        };
        let sealer = sealer.map_err(|error| keyless(&error))?.map_err(|error| keyless(&error))?;
        let names = session.parse().and_then(|session| Ok(Whose { tenant, session, subject: sealer.name().parse()? }));
        let names = names.map_err(|error: InvalidId| keyless(&error))?;
        Ok(Some((sealer, names)))
    }

    /// Keeps what the gateway of `key` (`{tenant}/{session}`) tells of a turn that has ended; resolves when it is durable.
    pub(crate) async fn tell(&self, turn: TurnId, key: String, told: Told) -> Result<Heard, Untold> {
        let (tell, heard) = oneshot::channel();
        // The turn may be from before text was kept, or from after.
        let named = match &self.people {
            People::Sealed(vault) => key.split_once('/').map(|(tenant, session)| format!("{tenant}/{}", vault.session(tenant, session))),
            People::Named(_) => None,
        };
        self.ask(writer::Command::Tell { turn, key, named, told: Box::new(told), tell })?;
        heard.await.unwrap_or(Err(Untold::Refused(Refused::Sealed)))
    }

    /// Keeps that a prompt was refused; resolves when it is durable.
    pub(crate) async fn deny(&self, mut denial: Denial) -> Result<Heard, Untold> {
        if let Some((_, names)) = self.sealer(denial.whose()).await.map_err(Untold::Refused)? {
            denial.rename(names);
        } else if let Some(name) = self.name(&denial.whose()).map_err(Untold::Refused)? {
            denial.pseudonym(name);
        }
        let (tell, heard) = oneshot::channel();
        self.ask(writer::Command::Deny { turn: denial.turn(), events: denial.events(), tell })?;
        heard.await.unwrap_or(Err(Untold::Refused(Refused::Sealed)))
    }

    /// Waits no longer for what the user got of turns that ended `patience` ago. Where the writer is busy it is asked next time.
    pub(crate) fn sweep(&self, patience: Duration) {
        let _ = self.ask(writer::Command::Sweep { patience });
    }

    fn ask(&self, command: writer::Command) -> Result<(), Untold> {
        self.writer.try_send(command).map_err(|full| match full {
            mpsc::error::TrySendError::Full(_) => Untold::Refused(Refused::Behind),
            mpsc::error::TrySendError::Closed(_) => Untold::Refused(Refused::Sealed),
        })
    }

    /// Begins to deliver. Waits a moment for the first word on the topic: one that must not be used is a fault of the config, and one
    /// that cannot be asked about is an outage, which the log is there for.
    #[cfg(feature = "kafka")]
    fn deliver(&mut self, folder: PathBuf, topic: Topic, cursor: Cursor) -> Result<(), Unopened> {
        let unusable = |source| Unopened::Unusable { folder: folder.clone(), source };
        let (tell, told) = std::sync::mpsc::sync_channel(1);
        let (alive, ended) = std::sync::mpsc::channel();
        let deliverer = deliver::Deliverer { folder: folder.clone(), topic: topic.clone(), shared: self.shared.clone(), cursor };
        let run = move || {
            deliverer.run(tell);
            drop(alive);
        };
        let thread = thread::Builder::new().name("event-delivery".to_owned()).spawn(run).map_err(unusable)?;
        // It is woken from now on; what became durable before, it finds by itself.
        let _ = self.shared.deliverer.set(thread.thread().clone());
        self.delivery = Some(Mutex::new(ended));
        match told.recv_timeout(FIRST_WORD) {
            Ok(Ok(())) => Ok(()),
            // The deliverer has said why.
            Ok(Err(Unfit::Away(_) | Unfit::Barred(_))) | Err(_) => {
                tracing::warn!(topic = topic.name, "Kafka cannot be used yet; events gather in the event log until it can");
                Ok(())
            }
            Ok(Err(unfit)) => Err(unfit.into()),
        }
    }

    #[cfg(not(feature = "kafka"))]
    fn deliver(&mut self, _folder: PathBuf, _topic: Topic, _cursor: Cursor) -> Result<(), Unopened> {
        Err(Unfit::Unbuilt.into())
    }

    /// Waits until the topic has record `number` and all before it, and that is on disk. Cancel safe.
    pub async fn until_delivered(&self, number: u64) {
        // The sender is ours: it cannot be gone.
        let _ = self.shared.delivered.subscribe().wait_for(|delivered| *delivered >= number).await;
    }

    /// Waits until everything that was asked before is durable. Cancel safe.
    pub async fn flush(&self) -> Result<(), Refused> {
        let (tell, told) = oneshot::channel();
        self.writer.send(writer::Command::Flush { tell }).await.map_err(|_| Refused::Sealed)?;
        told.await.unwrap_or(Err(Refused::Sealed))
    }

    /// The number of the last record that is durable.
    pub fn durable(&self) -> u64 {
        self.shared.durable.load(Ordering::Acquire)
    }

    /// Whether the disk failed to take a write: nothing is written any more.
    pub fn is_sealed(&self) -> bool {
        self.shared.sealed.load(Ordering::Acquire) || self.writer.is_closed()
    }

    /// Adds the log's metrics to what is exported.
    pub(crate) fn register(&self, registry: &mut Registry) {
        let help = "Turns that were not taken because the event log could not take them";
        registry.register("orchestrator_event_log_refused", help, self.shared.refused.clone());
        let help = "Written to the event log and durable";
        registry.register_with_unit("orchestrator_event_log_written", help, Unit::Bytes, self.shared.written_bytes.clone());
        let help = "What the disk took to make one group of events durable";
        registry.register_with_unit("orchestrator_event_log_sync", help, Unit::Seconds, self.shared.sync_seconds.clone());
        if self.delivery.is_some() {
            let help = "Events of the event log that the topic has";
            registry.register("orchestrator_event_log_delivered", help, self.shared.delivered_events.clone());
            let help = "How often delivery was held up or had to begin again after the last event that the topic has";
            registry.register("orchestrator_event_log_delivery_failures", help, self.shared.delivery_failures.clone());
        }
        if self.keeps_text() {
            let help = "Pieces of text that the event log had no room for";
            registry.register("orchestrator_event_log_text_dropped", help, self.shared.text_dropped.clone());
        }
        registry.register_collector(Box::new(Gauges { shared: self.shared.clone(), delivers: self.delivery.is_some(), cap: self.cap }));
    }
}

impl fmt::Debug for Log {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Log").field("durable", &self.durable()).field("sealed", &self.is_sealed()).finish_non_exhaustive()
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        // The writer ends when nobody can ask any more: open turns hold their places until they have ended.
        let (gone, _) = mpsc::channel(1);
        drop(mem::replace(&mut self.writer, gone));
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        // Only where it is about to end by itself: nobody waits for a turn, or a disk, in a destructor.
        if let Some(thread) = thread.filter(|_| self.shared.open_turns.load(Ordering::Relaxed) == 0) {
            drop(thread.join());
        }
        self.shared.closed.store(true, Ordering::Release);
        self.shared.wake();
        if let Some(ended) = &self.delivery {
            // It waits a moment for the last events to be delivered; whatever is not, the next start delivers.
            let _ = ended.lock().unwrap_or_else(PoisonError::into_inner).recv_timeout(LAST_WORD);
        }
    }
}

impl Shared {
    /// The number of the last record that may be let go.
    fn delivered(&self) -> u64 {
        *self.delivered.borrow()
    }

    /// Lets the deliverer look at the log.
    fn wake(&self) {
        if let Some(deliverer) = self.deliverer.get() {
            deliverer.unpark();
        }
    }

    #[cfg(feature = "kafka")]
    fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Events that are durable and not delivered.
    fn undelivered(&self) -> u64 {
        self.durable.load(Ordering::Acquire).saturating_sub(self.delivered())
    }

    /// How long ago the oldest of them happened, in seconds.
    fn oldest_seconds(&self) -> f64 {
        let oldest = self.oldest_ms.load(Ordering::Relaxed);
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        if oldest == 0 { 0.0 } else { (now.as_secs_f64() - oldest as f64 / 1000.0).max(0.0) }
    }
}

/// How long the first word on a topic is waited for.
#[cfg(feature = "kafka")]
const FIRST_WORD: Duration = Duration::from_secs(5);
/// How long the deliverer may take to end.
const LAST_WORD: Duration = Duration::from_secs(4);

/// The gauges of a log, read when they are asked for.
struct Gauges {
    shared: Arc<Shared>,
    delivers: bool,
    cap: u64,
}

impl fmt::Debug for Gauges {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Gauges")
    }
}

impl Collector for Gauges {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let shown = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        for (name, help, value) in [
            ("orchestrator_event_log_bytes", "What the event log takes on disk", shown(self.shared.taken_bytes.load(Ordering::Relaxed))),
            ("orchestrator_event_log_cap_bytes", "The most that the event log may take on disk", shown(self.cap)),
            (
                "orchestrator_event_log_pinned_bytes",
                "What cannot be let go of it: turns without an end, and events that were not delivered",
                shown(self.shared.pinned_bytes.load(Ordering::Relaxed)),
            ),
            (
                "orchestrator_event_log_open_turns",
                "Turns that have begun in the event log and have no end there yet",
                shown(self.shared.open_turns.load(Ordering::Relaxed)),
            ),
            (
                "orchestrator_event_log_sealed",
                "1 once the disk failed to take a write: no new turns until the process is started again",
                i64::from(self.shared.sealed.load(Ordering::Relaxed)),
            ),
        ] {
            ConstGauge::new(value).encode(encoder.encode_descriptor(name, help, None, MetricType::Gauge)?)?;
        }
        if self.delivers {
            let help = "Events that are durable and that the topic does not have yet";
            let undelivered = encoder.encode_descriptor("orchestrator_event_log_undelivered", help, None, MetricType::Gauge)?;
            ConstGauge::new(shown(self.shared.undelivered())).encode(undelivered)?;
            let help = "How long ago the oldest of these happened";
            let oldest = encoder.encode_descriptor("orchestrator_event_log_oldest", help, Some(&Unit::Seconds), MetricType::Gauge)?;
            ConstGauge::new(self.shared.oldest_seconds()).encode(oldest)?;
        }
        let help = "Ended turns, by what the user got of them; unknown: no gateway said it in time";
        let mut family = encoder.encode_descriptor("orchestrator_deliveries", help, None, MetricType::Counter)?;
        for outcome in Delivered::ALL {
            let count = self.shared.deliveries(outcome).get();
            ConstCounter::new(count).encode(family.encode_family(&[("outcome", outcome.as_str())])?)?;
        }
        Ok(())
    }
}

/// An open turn's account: it is closed with the turn's end, exactly once. Dropped open, it is closed as cancelled: whoever held it
/// had left.
pub(crate) struct Account {
    place: Option<(mpsc::OwnedPermit<writer::Command>, Begun)>,
    /// Takes what is said, where text is kept.
    text: Option<Text>,
}

impl Account {
    /// Adds what the model wrote.
    pub(crate) fn add(&mut self, batch: &Batch) {
        if let Some(text) = &mut self.text {
            text.add(batch);
        }
    }

    /// Closes the account.
    pub(crate) fn close(mut self, end: &End, finish: Finish, progress: Progress) {
        if let Some(text) = self.text.take() {
            text.close();
        }
        if let Some((place, begun)) = self.place.take() {
            let (turn, event) = begun.ended(end, finish, progress);
            place.send(writer::Command::End { turn, event });
        }
    }

    /// The turn was never begun.
    fn forget(mut self) {
        (self.place, self.text) = (None, None);
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        if let Some(text) = self.text.take() {
            text.close();
        }
        if let Some((place, begun)) = self.place.take() {
            let (turn, event) = begun.ended(&Err(Gone::Left.into()), Finish::default(), Progress::default());
            place.send(writer::Command::End { turn, event });
        }
    }
}

#[cfg(test)]
mod readers;
#[cfg(test)]
mod tests;
