//! Keeps what became of each turn in a write-ahead log: a turn is acknowledged only after its beginning is on disk, and every
//! turn that was gets exactly one end, even across a crash.
//!
//! ```text
//! run ── begin ──▶ queue ──▶ writer: one thread, one group, one fdatasync ──▶ "it is durable" ──▶ the model is asked
//!     └─ end ────▶ (its place in the queue and its room on disk were taken when the turn began: it cannot be refused)
//! ```
//!
//! What is kept are names, numbers and digests, never what was said; `headgate_contracts::wire::log` has the events.

mod facts;
mod read;
mod record;
mod recover;
mod segment;
mod verify;
mod writer;

use std::{
    fmt,
    fs::File,
    io, mem,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
};

use headgate_contracts::{End, Finish, Gone, wire::log::Progress};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{MetricType, counter::Counter, gauge::ConstGauge, histogram::Histogram},
    registry::{Registry, Unit},
};
use tokio::sync::{mpsc, oneshot};

pub use read::{Entry, Follow};
pub use record::Part;
pub use recover::Unopened;
pub use verify::{Judged, Violation, verify};

pub(crate) use facts::{Beginning, Ending};

/// The latest turns that have ended and are remembered, so that none of them begins again.
const MOST_ENDED: usize = 1 << 16;

/// Where a log is and how large it may be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// The folder of its files; made if it is not there.
    pub folder: PathBuf,
    /// The most that it takes on disk, in bytes: at least [`Settings::LEAST_CAP`]. The oldest events are let go first.
    pub cap: u64,
    /// Turns open at once: the end of each has its place kept in the writer's queue.
    pub turns: usize,
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

/// A log that is written to. Dropping the last handle ends it; [`Log::flush`] before that.
pub struct Log {
    writer: mpsc::Sender<writer::Command>,
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// What the writer tells the others.
struct Shared {
    /// The number of the last record that is durable.
    durable: AtomicU64,
    sealed: AtomicBool,
    taken_bytes: AtomicU64,
    open_turns: AtomicU64,
    refused: Counter,
    written_bytes: Counter,
    sync_seconds: Histogram,
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
        let folder = segment::Folder::open(&settings.folder).map_err(unusable)?;
        let mut found = recover::recover(&settings.folder, &folder)?;
        let crashed = facts::crashed(mem::take(&mut found.open));
        let recovered = Recovered { records: found.next_record - found.first_record, crashed: crashed.len(), torn_bytes: found.torn_bytes };
        let shared = Arc::new(Shared {
            durable: AtomicU64::new(found.next_record - 1),
            sealed: AtomicBool::new(false),
            taken_bytes: AtomicU64::new(0),
            open_turns: AtomicU64::new(0),
            refused: Counter::default(),
            written_bytes: Counter::default(),
            sync_seconds: Histogram::new(SYNC_SECONDS),
        });
        let cap = settings.cap.max(Settings::LEAST_CAP);
        let mut writer = writer::Writer::new(folder, sync, shared.clone(), cap, settings.segment_bytes(), found).map_err(unusable)?;
        writer.end_crashed(crashed).map_err(unusable)?;
        // A turn has two places: one to begin and one to end. As many again wait while the disk is busy.
        let (to_writer, asked) = mpsc::channel(4 * settings.turns.max(1));
        let thread = thread::Builder::new().name("event-log".to_owned()).spawn(move || writer.run(asked)).map_err(unusable)?;
        Ok((Log { writer: to_writer, shared, thread: Mutex::new(Some(thread)) }, recovered))
    }

    /// Begins a turn: gives its account once its first two events are durable. A future that is dropped before that leaves a turn
    /// that was cancelled, or none.
    ///
    /// Errors: the turn must not run.
    pub(crate) async fn begin(&self, beginning: Beginning) -> Result<Account, Refused> {
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
        let (for_end, for_begin) = (place().map_err(refused)?, place().map_err(refused)?);
        let (tell, told) = oneshot::channel();
        let (events, ending) = beginning.events();
        let account = Account { place: Some((for_end, ending)) };
        for_begin.send(writer::Command::Begin { turn, events, tell });
        match told.await.unwrap_or(Err(Refused::Sealed)) {
            Ok(()) => Ok(account),
            Err(refused) => {
                account.forget();
                Err(refused)
            }
        }
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
        registry.register_collector(Box::new(Gauges(self.shared.clone())));
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
    }
}

/// The gauges of a log, read when they are asked for.
struct Gauges(Arc<Shared>);

impl fmt::Debug for Gauges {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Gauges")
    }
}

impl Collector for Gauges {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let shown = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        for (name, help, value) in [
            ("orchestrator_event_log_bytes", "What the event log takes on disk", shown(self.0.taken_bytes.load(Ordering::Relaxed))),
            (
                "orchestrator_event_log_open_turns",
                "Turns that have begun in the event log and have no end there yet",
                shown(self.0.open_turns.load(Ordering::Relaxed)),
            ),
            (
                "orchestrator_event_log_sealed",
                "1 once the disk failed to take a write: no new turns until the process is started again",
                i64::from(self.0.sealed.load(Ordering::Relaxed)),
            ),
        ] {
            ConstGauge::new(value).encode(encoder.encode_descriptor(name, help, None, MetricType::Gauge)?)?;
        }
        Ok(())
    }
}

/// An open turn's account: it is closed with the turn's end, exactly once. Dropped open, it is closed as cancelled: whoever held it
/// had left.
pub(crate) struct Account {
    place: Option<(mpsc::OwnedPermit<writer::Command>, Ending)>,
}

impl Account {
    /// Closes the account.
    pub(crate) fn close(mut self, end: &End, finish: Finish, progress: Progress) {
        if let Some((place, ending)) = self.place.take() {
            let (turn, event) = ending.event(end, finish, progress);
            place.send(writer::Command::End { turn, event });
        }
    }

    /// The turn was never begun.
    fn forget(mut self) {
        self.place = None;
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        if let Some((place, ending)) = self.place.take() {
            let (turn, event) = ending.event(&Err(Gone::Left.into()), Finish::default(), Progress::default());
            place.send(writer::Command::End { turn, event });
        }
    }
}

#[cfg(test)]
mod tests;
