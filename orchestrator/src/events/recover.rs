//! Reads a log as the last process left it: what stands, what was torn, which turns have no end.

use std::{
    collections::{HashMap, VecDeque},
    fs::{File, OpenOptions},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use headgate_contracts::TurnId;
use headgate_policy::{KeyFault, vault::VaultFault};

use super::{
    MOST_ENDED,
    facts::{self, Begun, Word},
    record::{self, Part, Read},
    segment::{self, Folder, Reader},
};

/// Why a log cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum Unopened {
    /// Its folder or a file in it cannot be used.
    #[error("the event log in {} cannot be used", folder.display())]
    Unusable {
        /// Where.
        folder: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The topic that its events should go on to cannot be used.
    #[error("the event log cannot be delivered")]
    Undeliverable(#[from] Unfit),
    /// The master key of the text cannot be used.
    #[error("the event log cannot seal text")]
    Unsealable(#[from] KeyFault),
    /// The key that subjects are named by cannot be used.
    #[error("the event log cannot name who asks")]
    Nameless(#[source] KeyFault),
    /// The keys of subjects cannot be used.
    #[error("the event log cannot seal text")]
    Keyless(#[from] VaultFault),
    /// It is damaged where it was whole once: what stood there was promised to be kept, so nobody but a person may give it up.
    #[error(
        "the event log is damaged: record {number} should stand at byte {at} of {}; `headgate events verify` says more, and with the \
         folder moved away a new log begins",
        file.display()
    )]
    Damaged {
        /// In which segment.
        file: PathBuf,
        /// Where in it.
        at: u64,
        /// Which record.
        number: u64,
    },
}

/// Why events cannot be delivered to a topic.
#[derive(Debug, thiserror::Error)]
pub enum Unfit {
    /// No broker says anything about it now.
    #[error("Kafka cannot be asked about its topic: {0}")]
    Away(String),
    /// Brokers do not let us in, or are none that we trust.
    #[error("Kafka does not let us in: {0}")]
    Barred(String),
    /// There is no such topic, and it is not to be made.
    #[error(
        "there is no topic {topic}; make it with replication factor {replication} and min.insync.replicas={in_sync}, or set \
         `create_with_partitions`"
    )]
    Missing {
        /// Which.
        topic: String,
        /// What it should have.
        replication: u16,
        /// What it should be set to.
        in_sync: u16,
    },
    /// Its partitions are kept by too few brokers.
    #[error("topic {topic} has {found} replicas, not {wanted}; give it more, or lower `replication_factor`")]
    Replicas {
        /// Which.
        topic: String,
        /// How many a partition has.
        found: usize,
        /// How many it should have.
        wanted: u16,
    },
    /// An event counts as delivered while too few brokers have it.
    #[error("topic {topic} has min.insync.replicas={found}, not {wanted}; raise it, or lower `min_insync_replicas`")]
    InSync {
        /// Which.
        topic: String,
        /// What it is set to.
        found: u16,
        /// What it should be set to.
        wanted: u16,
    },
    /// It cannot be used.
    #[error("{0}")]
    Refused(String),
    /// This program was built without TLS for Kafka.
    #[error(
        "this headgate speaks to Kafka in plain text alone: build it with `--features kafka-tls`, or remove `tls` and `sasl` from the config"
    )]
    Unprotected,
    /// This program was built without Kafka.
    #[error("this headgate was built without Kafka: build it with `--features kafka`, or remove `kafka` from the config")]
    Unbuilt,
}

/// A log that was read.
#[derive(Debug)]
pub(super) struct Found {
    /// The segments that hold records, the oldest first.
    pub(super) segments: Vec<Kept>,
    /// The number of the next segment.
    pub(super) next_segment: u64,
    /// The number of the first record that is kept.
    pub(super) first_record: u64,
    /// The number of the next record.
    pub(super) next_record: u64,
    /// Turns without an end, and their first events; the oldest first.
    pub(super) open: Vec<(TurnId, Vec<u8>)>,
    /// Turns with an end of which nobody has said what the user got; the oldest first.
    pub(super) owed: Vec<(TurnId, Owed)>,
    /// The latest turns with an end, the very latest last.
    pub(super) ended: VecDeque<(TurnId, Word)>,
    /// How much was torn off the end, in bytes.
    pub(super) torn_bytes: u64,
}

/// A turn of which nobody has said what the user got.
pub(super) struct Owed {
    pub(super) begun: Begun,
    /// The verdict on its output is in the log: what should have come after it was torn off.
    pub(super) has_verdict: bool,
}

impl std::fmt::Debug for Owed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Owed").field("has_verdict", &self.has_verdict).finish_non_exhaustive()
    }
}

/// A segment that is read and not written any more.
#[derive(Debug)]
pub(super) struct Kept {
    pub(super) number: u64,
    pub(super) bytes: u64,
    /// The number of its last record.
    pub(super) last: u64,
}

/// Reads the whole log in `folder`, cuts off what was torn, and makes the rest durable.
pub(super) fn recover(path: &Path, folder: &Folder) -> Result<Found, Unopened> {
    let unusable = |source| Unopened::Unusable { folder: path.to_owned(), source };
    let mut found = Found {
        segments: Vec::new(),
        next_segment: 1,
        first_record: 1,
        next_record: 1,
        open: Vec::new(),
        owed: Vec::new(),
        ended: VecDeque::new(),
        torn_bytes: 0,
    };
    let mut open: HashMap<TurnId, (u64, Vec<u8>)> = HashMap::new();
    let mut owed: HashMap<TurnId, (u64, Owed)> = HashMap::new();
    let mut settled: HashMap<TurnId, Word> = HashMap::new();
    let mut first = true;
    let mut end: Option<End> = None;
    // Removed only once the whole log has been found good: until then it is evidence.
    let mut empty = Vec::new();
    for number in segment::list(path).map_err(unusable)? {
        found.next_segment = number + 1;
        let file = segment::open(path, number).map_err(unusable)?;
        let mut reader = Reader::new(file);
        let damaged = |at, record| Unopened::Damaged { file: folder.path(number), at, number: record };
        loop {
            let at = reader.at();
            match reader.next().map_err(unusable)? {
                Read::Record(record) => {
                    // A log may begin late, where its oldest segments were let go.
                    if first {
                        (found.first_record, found.next_record) = (record.number, record.number);
                        first = false;
                    }
                    // The segment before this one was closed whole, and only the last may be torn.
                    if let Some(before) = end.take_if(|end| end.number != number)
                        && !before.is_clean
                    {
                        return Err(Unopened::Damaged { file: folder.path(before.number), at: before.at, number: before.next_record });
                    }
                    if record.number != found.next_record {
                        return Err(damaged(at, found.next_record));
                    }
                    found.next_record += 1;
                    match record.part {
                        Part::Begins => drop(open.insert(record.turn, (record.number, record.event.to_vec()))),
                        Part::Within => {}
                        Part::Ends => {
                            let (from, begun) = open.remove(&record.turn).map_or_else(
                                || (record.number, Begun::read(record.turn, record.event)),
                                |(from, first)| (from, Begun::read(record.turn, &first)),
                            );
                            owed.insert(record.turn, (from, Owed { begun, has_verdict: false }));
                            ended(&mut found.ended, &mut settled, record.turn);
                        }
                        Part::After => {
                            if let Some((_, owed)) = owed.get_mut(&record.turn) {
                                owed.has_verdict = true;
                            }
                        }
                        Part::Settles => {
                            // A refused prompt ends and is settled at once.
                            if open.remove(&record.turn).is_some() {
                                ended(&mut found.ended, &mut settled, record.turn);
                            }
                            owed.remove(&record.turn);
                            if let Some(word) = settled.get_mut(&record.turn) {
                                *word = facts::settled(record.event);
                            }
                        }
                    }
                    let group_from = match &end {
                        // Records of one group call the same record durable.
                        Some(End { durable, group_from, .. }) if *durable == record.durable => *group_from,
                        Some(_) | None => at,
                    };
                    let (durable, next_record) = (record.durable, found.next_record);
                    end = Some(End { number, at: reader.at(), group_from, durable, next_record, is_clean: true });
                }
                Read::Blank | Read::Broken => {
                    let rest = reader.rest().map_err(unusable)?;
                    if record::was_durable(found.next_record, &rest) {
                        return Err(damaged(at, found.next_record));
                    }
                    let torn = rest.iter().rposition(|byte| *byte != 0).map_or(0, |last| last as u64 + 1);
                    found.torn_bytes += torn;
                    match &mut end {
                        Some(end) if end.number == number => end.is_clean = torn == 0,
                        // Nothing stands here: it was taken in advance, or its first group was torn.
                        Some(_) | None => empty.push(number),
                    }
                    break;
                }
            }
        }
        if let Some(end) = end.as_ref().filter(|end| end.number == number) {
            found.segments.push(Kept { number, bytes: end.at, last: end.next_record - 1 });
        }
    }
    for number in empty {
        folder.remove(number).map_err(unusable)?;
    }
    if let Some(end) = end {
        settle(&folder.path(end.number), &end).map_err(unusable)?;
    }
    found.open = in_order(open);
    found.owed = in_order(owed);
    for (turn, word) in &mut found.ended {
        *word = settled.get(turn).copied().unwrap_or(Word::Owed);
    }
    Ok(found)
}

fn ended(latest: &mut VecDeque<(TurnId, Word)>, settled: &mut HashMap<TurnId, Word>, turn: TurnId) {
    latest.push_back((turn, Word::Owed));
    settled.insert(turn, Word::Owed);
    if latest.len() > MOST_ENDED
        && let Some((oldest, _)) = latest.pop_front()
    {
        settled.remove(&oldest);
    }
}

/// Where the records of a segment end.
struct End {
    number: u64,
    at: u64,
    /// Where the records begin that no other calls durable.
    group_from: u64,
    durable: u64,
    next_record: u64,
    is_clean: bool,
}

/// Cuts the last segment after its last record and makes what is left durable.
///
/// The last group is written again first. A process that was killed may have left it in the system's memory alone, and if the
/// disk failed to take it then, the system may by now believe that it did.
fn settle(path: &Path, end: &End) -> io::Result<()> {
    let file: File = OpenOptions::new().read(true).write(true).open(path)?;
    let mut group = vec![0; usize::try_from(end.at - end.group_from).unwrap_or(usize::MAX)];
    file.read_exact_at(&mut group, end.group_from)?;
    file.write_all_at(&group, end.group_from)?;
    file.set_len(end.at)?;
    file.sync_all()
}

fn in_order<T>(turns: HashMap<TurnId, (u64, T)>) -> Vec<(TurnId, T)> {
    let mut turns: Vec<_> = turns.into_iter().collect();
    turns.sort_unstable_by_key(|(_, (number, _))| *number);
    turns.into_iter().map(|(turn, (_, what))| (turn, what)).collect()
}
