//! Reads a log as the last process left it: what stands, what was torn, which turns have no end.

use std::{
    collections::{HashMap, VecDeque},
    fs::{File, OpenOptions},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use headgate_contracts::TurnId;

use super::{
    MOST_ENDED,
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
    /// The latest turns with an end, the very latest last.
    pub(super) ended: VecDeque<TurnId>,
    /// How much was torn off the end, in bytes.
    pub(super) torn_bytes: u64,
}

/// A segment that is read and not written any more.
#[derive(Debug)]
pub(super) struct Kept {
    pub(super) number: u64,
    pub(super) bytes: u64,
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
        ended: VecDeque::new(),
        torn_bytes: 0,
    };
    let mut open: HashMap<TurnId, (u64, Vec<u8>)> = HashMap::new();
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
                            open.remove(&record.turn);
                            found.ended.push_back(record.turn);
                            if found.ended.len() > MOST_ENDED {
                                found.ended.pop_front();
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
            found.segments.push(Kept { number, bytes: end.at });
        }
    }
    for number in empty {
        folder.remove(number).map_err(unusable)?;
    }
    if let Some(end) = end {
        settle(&folder.path(end.number), &end).map_err(unusable)?;
    }
    found.open = in_order(open);
    Ok(found)
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

fn in_order(open: HashMap<TurnId, (u64, Vec<u8>)>) -> Vec<(TurnId, Vec<u8>)> {
    let mut open: Vec<_> = open.into_iter().collect();
    open.sort_unstable_by_key(|(_, (number, _))| *number);
    open.into_iter().map(|(turn, (_, event))| (turn, event)).collect()
}
