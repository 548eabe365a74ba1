//! Keeps what is not told yet across a restart: a log without ends, in the records and segments of the event log.
//!
//! Its owner has everything in memory as well; the disk is read once, at the start. So nothing is ever cut out of it: what has been
//! told gets a record that says so, and is left behind with its segment. A record may be told twice after a crash, and whoever is told
//! must not mind.

use std::{
    collections::HashSet,
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use headgate_contracts::TurnId;

use super::{
    record::{MAX_EVENT_BYTES, Part, Read, Record, record_bytes},
    segment::{self, Folder, MIN_SEGMENT_BYTES, Reader},
};

/// The part of a record that says that all before it of its turn was told.
const TOLD: Part = Part::After;
/// The most that is written at once.
const GROUP_BYTES: usize = 64 << 10;

/// What is to be told, and of which turn each.
pub type ToTell = Vec<(TurnId, Vec<u8>)>;

/// A folder of what is still to be told.
#[derive(Debug)]
pub struct Spool {
    path: PathBuf,
    folder: Folder,
    /// The segment that is written, once there is something to write, and where the next record goes.
    active: Option<(File, u64)>,
    /// Records that are to be written.
    group: Vec<u8>,
    next_segment: u64,
    next_record: u64,
    bytes: u64,
}

impl Spool {
    /// Opens the folder, or makes it; gives what is in it, the oldest first. What was torn is passed over.
    ///
    /// Errors: it cannot be used, or another process writes to it.
    pub fn open(path: &Path) -> io::Result<(Spool, ToTell)> {
        let folder = Folder::open(path)?;
        let numbers = segment::list(path)?;
        let (mut waiting, mut told) = (Vec::new(), HashSet::new());
        for number in &numbers {
            let mut reader = Reader::new(segment::open(path, *number)?);
            while let Read::Record(record) = reader.next()? {
                if record.part == TOLD {
                    told.insert(record.turn);
                } else {
                    waiting.push((record.turn, record.event.to_vec()));
                }
            }
        }
        waiting.retain(|(turn, _)| !told.contains(turn));
        let next_segment = numbers.last().map_or(1, |last| last + 1);
        let mut spool = Spool { path: path.to_owned(), folder, active: None, group: Vec::new(), next_segment, next_record: 1, bytes: 0 };
        spool.leave(waiting.iter().map(|(turn, what)| (*turn, what.as_slice())))?;
        Ok((spool, waiting))
    }

    /// Adds what is to be told of `turn`, of which nothing was told before. It is kept from the next [`Spool::flush`] on.
    ///
    /// Errors: it is longer than any record, or the disk does not take what was added before.
    pub fn add(&mut self, turn: TurnId, what: &[u8]) -> io::Result<()> {
        if what.len() > MAX_EVENT_BYTES {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "longer than any record"));
        }
        self.append(Part::Settles, turn, what)
    }

    /// Adds that what was to be told of `turn` was told.
    ///
    /// Errors: the disk does not take what was added before.
    pub fn told(&mut self, turn: TurnId) -> io::Result<()> {
        self.append(TOLD, turn, b"")
    }

    fn append(&mut self, part: Part, turn: TurnId, event: &[u8]) -> io::Result<()> {
        if self.group.len() + record_bytes(event.len()) > GROUP_BYTES {
            self.flush()?;
        }
        Record { number: self.next_record, durable: self.next_record - 1, part, turn, event }.write(&mut self.group);
        self.next_record += 1;
        Ok(())
    }

    /// Writes what was added, as one group. It outlives the process from then on, and a fall of the machine once the system has
    /// written it.
    ///
    /// Errors: the disk does not take it. It is not tried again.
    pub fn flush(&mut self) -> io::Result<()> {
        let bytes = std::mem::take(&mut self.group);
        if bytes.is_empty() {
            return Ok(());
        }
        let (file, at) = match self.active.take_if(|(_, at)| *at + bytes.len() as u64 <= MIN_SEGMENT_BYTES) {
            Some(active) => active,
            None => {
                let file = self.folder.create(self.next_segment, MIN_SEGMENT_BYTES)?;
                self.next_segment += 1;
                self.bytes += MIN_SEGMENT_BYTES;
                (file, 0)
            }
        };
        file.write_all_at(&bytes, at)?;
        self.active = Some((file, at + bytes.len() as u64));
        self.group = bytes;
        self.group.clear();
        Ok(())
    }

    /// Leaves only `waiting` in the folder.
    pub fn leave<'a>(&mut self, waiting: impl Iterator<Item = (TurnId, &'a [u8])>) -> io::Result<()> {
        let old = segment::list(&self.path)?;
        (self.active, self.bytes) = (None, 0);
        self.group.clear();
        for (turn, what) in waiting {
            self.add(turn, what)?;
        }
        self.flush()?;
        // Written before anything is removed: told twice is better than never.
        old.into_iter().try_for_each(|number| self.folder.remove(number))
    }

    /// What it takes on disk.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn names(waiting: &[(TurnId, Vec<u8>)]) -> Vec<String> {
        waiting.iter().map(|(_, what)| String::from_utf8(what.clone()).unwrap()).collect()
    }

    #[test]
    fn what_was_added_is_there_after_a_start_in_order_until_it_is_left_out() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("spool");
        let (mut spool, waiting) = Spool::open(&path).unwrap();
        assert_eq!((waiting, spool.bytes()), (vec![], 0));
        let turns: Vec<TurnId> = (0..2000).map(|_| TurnId::fresh()).collect();
        for (number, turn) in turns.iter().enumerate() {
            spool.add(*turn, format!("{number:0>500}").as_bytes()).unwrap();
        }
        spool.flush().unwrap();
        assert!(spool.bytes() > 3 * MIN_SEGMENT_BYTES);
        assert_eq!(Spool::open(&path).unwrap_err().kind(), io::ErrorKind::ResourceBusy);
        drop(spool);
        let (mut spool, waiting) = Spool::open(&path).unwrap();
        assert_eq!(names(&waiting), (0..2000).map(|number| format!("{number:0>500}")).collect::<Vec<_>>());
        assert!(waiting.iter().zip(&turns).all(|((turn, _), known)| turn == known));
        spool.leave(waiting.iter().skip(1999).map(|(turn, what)| (*turn, what.as_slice()))).unwrap();
        assert_eq!(spool.bytes(), MIN_SEGMENT_BYTES);
        drop(spool);
        let (mut spool, waiting) = Spool::open(&path).unwrap();
        assert_eq!(waiting.len(), 1);
        spool.leave(std::iter::empty()).unwrap();
        assert!(segment::list(&path).unwrap().is_empty());
        spool.add(turns[0], b"more").unwrap();
        assert!(spool.add(turns[0], &[0; MAX_EVENT_BYTES + 1]).is_err());
    }

    #[test]
    fn what_was_told_is_not_there_after_a_start_however_it_was_written() {
        let folder = tempfile::tempdir().unwrap();
        let turns: Vec<TurnId> = (0..4).map(|_| TurnId::fresh()).collect();
        let (mut spool, _) = Spool::open(folder.path()).unwrap();
        for turn in &turns {
            spool.add(*turn, turn.to_string().as_bytes()).unwrap();
        }
        spool.told(turns[1]).unwrap();
        spool.flush().unwrap();
        spool.told(turns[3]).unwrap();
        spool.flush().unwrap();
        // Nobody is told before it is written, so what is not written was not told.
        spool.told(turns[0]).unwrap();
        drop(spool);
        let (_, waiting) = Spool::open(folder.path()).unwrap();
        assert_eq!(names(&waiting), [turns[0].to_string(), turns[2].to_string()]);
    }

    #[test]
    fn a_record_that_a_kill_tore_costs_itself_alone() {
        let folder = tempfile::tempdir().unwrap();
        let (mut spool, _) = Spool::open(folder.path()).unwrap();
        for what in ["one", "two"] {
            spool.add(TurnId::fresh(), what.as_bytes()).unwrap();
            spool.flush().unwrap();
        }
        let (_, end) = spool.active.take().unwrap();
        drop(spool);
        let file = folder.path().join("0000000001.events");
        let mut bytes = fs::read(&file).unwrap();
        bytes[usize::try_from(end).unwrap() - 8] ^= 1;
        fs::write(&file, bytes).unwrap();
        assert_eq!(names(&Spool::open(folder.path()).unwrap().1), ["one"]);
    }

    /// What it would cost to wait for the disk: `cargo test -p headgate-orchestrator --lib -- --ignored --nocapture spool_waits`.
    #[test]
    #[ignore = "a measurement"]
    #[allow(clippy::print_stdout, reason = "the figures are what it is for")]
    fn what_a_group_costs_where_the_spool_waits_for_the_disk() {
        // Under the repository: where folders are temporary there may be no disk.
        let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let report = [b'x'; 700];
        for reports in [1, 16, 256] {
            for waits in [false, true] {
                let (mut spool, _) = Spool::open(&folder.path().join(format!("{reports}-{waits}"))).unwrap();
                let mut took: Vec<_> = (0..300)
                    .map(|_| {
                        for _ in 0..reports {
                            spool.add(TurnId::fresh(), &report).unwrap();
                        }
                        let begun = std::time::Instant::now();
                        spool.flush().unwrap();
                        if let Some((file, _)) = spool.active.as_ref().filter(|_| waits) {
                            file.sync_data().unwrap();
                        }
                        begun.elapsed().as_micros()
                    })
                    .collect();
                took.sort_unstable();
                println!("{reports:>3} reports, waits: {waits:5}: p50 {} us, p99 {} us, most {} us", took[149], took[296], took[299]);
            }
        }
    }
}
