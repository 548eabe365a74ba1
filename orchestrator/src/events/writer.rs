//! The one thread that writes: takes what has gathered while the disk was busy, writes it as one group, waits for the disk, answers.
//!
//! Room is promised before it is needed. A turn is taken only if the room that the disk has already given holds its first records,
//! its last one, and the last one of every other open turn: so a full disk refuses turns and never loses an end.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    fs::File,
    io, mem,
    os::unix::fs::FileExt,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use headgate_contracts::TurnId;
use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};

use super::{
    MOST_ENDED, Refused, Shared, Sync,
    record::{MAX_EVENT_BYTES, MAX_RECORD_BYTES, Part, Record, record_bytes},
    recover::Found,
    segment::Folder,
};

/// The largest event that ends a turn; `the_longest_end_fits_its_room` holds it.
pub(super) const MAX_END_BYTES: usize = 2 << 10;
/// What is kept free for the end of each open turn.
const END_ROOM: u64 = record_bytes(MAX_END_BYTES) as u64;
/// The most commands in one group.
const GROUP: usize = 1024;
/// After the disk has refused room, it is not asked again for so long.
const ASK_AGAIN: Duration = Duration::from_secs(1);
/// How much of the cap may be taken by segments that hold a beginning without an end, in percent.
const WATERMARK: u64 = 85;

/// What the writer is asked to do.
pub(super) enum Command {
    /// To write the first events of a turn and say when they are durable.
    Begin { turn: TurnId, events: [Vec<u8>; 2], tell: oneshot::Sender<Result<(), Refused>> },
    /// To write the last event of a turn, if it was begun.
    End { turn: TurnId, event: Vec<u8> },
    /// To say when everything before this is durable.
    Flush { tell: oneshot::Sender<Result<(), Refused>> },
}

pub(super) struct Writer {
    folder: Folder,
    sync: Sync,
    shared: Arc<Shared>,
    cap: u64,
    segment_bytes: u64,
    /// Segments that are full, the oldest first.
    kept: VecDeque<Full>,
    active: Segment,
    /// Where in the active segment the next group goes.
    at: u64,
    /// Segments that are still empty.
    spare: VecDeque<Segment>,
    next_segment: u64,
    next_record: u64,
    durable: u64,
    /// The group being gathered.
    group: Vec<u8>,
    /// Open turns, and the segment that each begins in.
    open: HashMap<TurnId, u64>,
    ended: Ended,
    ask_again: Option<Instant>,
    sealed: bool,
}

struct Segment {
    number: u64,
    file: File,
    /// Turns that begin in it and are open.
    open: usize,
}

struct Full {
    number: u64,
    bytes: u64,
    open: usize,
}

impl Writer {
    /// A writer that goes on after what was found, in a segment of its own.
    pub(super) fn new(folder: Folder, sync: Sync, shared: Arc<Shared>, cap: u64, segment_bytes: u64, found: Found) -> io::Result<Writer> {
        let Found { segments, next_segment, next_record, ended, .. } = found;
        let mut kept: VecDeque<Full> = segments.into_iter().map(|kept| Full { number: kept.number, bytes: kept.bytes, open: 0 }).collect();
        // Every turn in there is about to get its end, so all of it may go where room is needed.
        while kept.iter().map(|full| full.bytes).sum::<u64>() + segment_bytes > cap
            && let Some(oldest) = kept.pop_front()
        {
            folder.remove(oldest.number)?;
        }
        let file = folder.create(next_segment, segment_bytes)?;
        let mut remembered = Ended::default();
        ended.into_iter().for_each(|turn| remembered.insert(turn));
        Ok(Writer {
            folder,
            sync,
            shared,
            cap,
            segment_bytes,
            kept,
            active: Segment { number: next_segment, file, open: 0 },
            at: 0,
            spare: VecDeque::new(),
            next_segment: next_segment + 1,
            next_record,
            durable: next_record - 1,
            group: Vec::new(),
            open: HashMap::new(),
            ended: remembered,
            ask_again: None,
            sealed: false,
        })
    }

    /// Gives turns that a crash left open the end that says so.
    pub(super) fn end_crashed(&mut self, crashed: Vec<(TurnId, Vec<u8>)>) -> io::Result<()> {
        for (turn, event) in crashed {
            while self.room() < END_ROOM {
                self.grow()?;
            }
            self.append(Part::Ends, turn, &event);
            self.ended.insert(turn);
        }
        self.commit().map_err(|_| io::Error::other("the ends of crashed turns cannot be written"))?;
        self.publish();
        Ok(())
    }

    /// Writes until nobody can ask for more.
    pub(super) fn run(mut self, mut asked: mpsc::Receiver<Command>) {
        let mut commands = Vec::with_capacity(GROUP);
        let mut waiting = Vec::new();
        // What gathers while the disk works on one group is the next one: the busier the disk, the larger the groups.
        while asked.blocking_recv_many(&mut commands, GROUP) > 0 {
            for command in commands.drain(..) {
                match command {
                    Command::Begin { turn, events, tell } => match self.begin(turn, &events) {
                        Ok(()) => waiting.push(tell),
                        Err(refused) => {
                            self.shared.refused.inc();
                            // Nobody listens any more where the caller has left.
                            let _ = tell.send(Err(refused));
                        }
                    },
                    Command::End { turn, event } => self.end(turn, &event),
                    Command::Flush { tell } => waiting.push(tell),
                }
            }
            let durable = self.commit();
            // Before anybody is told: what is published is never older than what is known.
            self.publish();
            for tell in waiting.drain(..) {
                let _ = tell.send(durable);
            }
            // Room for what comes next is taken while nobody waits for it.
            if !self.sealed && self.spare.is_empty() && self.at > self.segment_bytes / 2 {
                let _ = self.grow();
                self.publish();
            }
        }
        if !self.sealed {
            let closed = self.active.file.set_len(self.at).and_then(|()| self.active.file.sync_all());
            if let Err(error) = closed {
                tracing::warn!(%error, "the event log was left with more room than it needs");
            }
        }
    }

    fn begin(&mut self, turn: TurnId, events: &[Vec<u8>; 2]) -> Result<(), Refused> {
        if self.sealed {
            return Err(Refused::Sealed);
        }
        if self.open.contains_key(&turn) || self.ended.contains(&turn) {
            return Err(Refused::Known);
        }
        if events.iter().any(|event| event.len() > MAX_EVENT_BYTES) {
            return Err(Refused::TooLong);
        }
        if self.pinned() >= self.cap / 100 * WATERMARK {
            return Err(Refused::Full);
        }
        let need = events.iter().map(|event| record_bytes(event.len()) as u64).sum::<u64>() + END_ROOM;
        while self.room() < self.open.len() as u64 * END_ROOM + need {
            self.grow().map_err(|error| {
                tracing::warn!(%error, "the event log has no room for new turns");
                Refused::Full
            })?;
        }
        let [accepted, verdict] = events;
        self.append(Part::Begins, turn, accepted);
        self.open.insert(turn, self.active.number);
        self.active.open += 1;
        self.append(Part::Within, turn, verdict);
        Ok(())
    }

    fn end(&mut self, turn: TurnId, event: &[u8]) {
        // A turn that was refused has no end here.
        let Some(begun_in) = self.open.remove(&turn) else { return };
        if self.active.number == begun_in {
            self.active.open -= 1;
        } else if let Some(full) = self.kept.iter_mut().find(|full| full.number == begun_in) {
            full.open -= 1;
        }
        self.append(Part::Ends, turn, event);
        self.ended.insert(turn);
    }

    /// Adds a record to the group. Room for it was promised.
    fn append(&mut self, part: Part, turn: TurnId, event: &[u8]) {
        if self.sealed {
            return;
        }
        let record = Record { number: self.next_record, durable: self.durable, part, turn, event };
        if self.at + (self.group.len() + record.bytes()) as u64 > self.segment_bytes {
            self.roll();
        }
        Record { durable: self.durable, ..record }.write(&mut self.group);
        self.next_record += 1;
    }

    /// Closes the active segment and goes on in a spare one.
    fn roll(&mut self) {
        // A segment is whole on disk before the next one begins: only the last can be torn.
        if self.commit().is_err() {
            return;
        }
        let next = match self.spare.pop_front() {
            Some(spare) => Ok(spare),
            // Never: what is open has its room. Should a count be wrong, it is taken now.
            None => self.made(),
        };
        match next {
            Ok(next) => {
                let full = mem::replace(&mut self.active, next);
                if let Err(error) = full.file.set_len(self.at) {
                    tracing::warn!(%error, "a full segment of the event log keeps more room than it needs");
                }
                self.kept.push_back(Full { number: full.number, bytes: self.at, open: full.open });
                self.at = 0;
            }
            Err(error) => self.seal(&error),
        }
    }

    /// Writes the group and waits for the disk.
    ///
    /// Errors: it did not take it; nothing is written from then on.
    fn commit(&mut self) -> Result<(), Refused> {
        if self.sealed {
            return Err(Refused::Sealed);
        }
        if self.group.is_empty() {
            return Ok(());
        }
        let begun = Instant::now();
        match self.active.file.write_all_at(&self.group, self.at).and_then(|()| (self.sync)(&self.active.file)) {
            Ok(()) => {
                self.shared.sync_seconds.observe(begun.elapsed().as_secs_f64());
                self.shared.written_bytes.inc_by(self.group.len() as u64);
                self.at += self.group.len() as u64;
                self.durable = self.next_record - 1;
                self.shared.durable.store(self.durable, Ordering::Release);
                self.group.clear();
                // A burst may have made it large.
                self.group.shrink_to(1 << 20);
                Ok(())
            }
            Err(error) => {
                self.seal(&error);
                Err(Refused::Sealed)
            }
        }
    }

    /// Stops writing for good. A disk that failed once may drop what it took and call the next attempt a success, so there is none:
    /// the next start reads what is really there.
    fn seal(&mut self, error: &io::Error) {
        self.sealed = true;
        self.group = Vec::new();
        self.shared.sealed.store(true, Ordering::Release);
        tracing::error!(
            %error,
            durable = self.durable,
            open_turns = self.open.len(),
            "the event log is sealed: the disk did not take a write; no new turns until the process is started again"
        );
    }

    /// Room that the disk has given, less what may be lost where a record does not fit the end of a segment.
    fn room(&self) -> u64 {
        let usable = |bytes: u64| bytes.saturating_sub(MAX_RECORD_BYTES as u64);
        let used = self.at + self.group.len() as u64;
        usable(self.segment_bytes.saturating_sub(used)) + self.spare.len() as u64 * usable(self.segment_bytes)
    }

    /// Takes the room of one more segment.
    fn grow(&mut self) -> io::Result<()> {
        let made = self.made()?;
        self.spare.push_back(made);
        Ok(())
    }

    fn made(&mut self) -> io::Result<Segment> {
        if self.ask_again.is_some_and(|then| Instant::now() < then) {
            return Err(io::Error::new(io::ErrorKind::StorageFull, "refused a moment ago"));
        }
        // The oldest segments go, as soon as every turn that begins in them has its end.
        while self.taken() + self.segment_bytes > self.cap {
            let Some(oldest) = self.kept.pop_front_if(|full| full.open == 0) else {
                return Err(io::Error::new(
                    io::ErrorKind::StorageFull,
                    "the cap is reached, and every segment holds a turn without an end",
                ));
            };
            self.folder.remove(oldest.number)?;
        }
        match self.folder.create(self.next_segment, self.segment_bytes) {
            Ok(file) => {
                self.ask_again = None;
                self.next_segment += 1;
                Ok(Segment { number: self.next_segment - 1, file, open: 0 })
            }
            Err(error) => {
                self.ask_again = Some(Instant::now() + ASK_AGAIN);
                Err(error)
            }
        }
    }

    /// What the log takes on disk.
    fn taken(&self) -> u64 {
        self.kept.iter().map(|full| full.bytes).sum::<u64>() + (1 + self.spare.len() as u64) * self.segment_bytes
    }

    /// What cannot be let go: everything from the first turn without an end.
    fn pinned(&self) -> u64 {
        self.kept.iter().skip_while(|full| full.open == 0).map(|full| full.bytes).sum::<u64>() + self.at
    }

    fn publish(&self) {
        self.shared.taken_bytes.store(self.taken(), Ordering::Relaxed);
        self.shared.open_turns.store(self.open.len() as u64, Ordering::Relaxed);
    }
}

/// The latest turns that have ended.
#[derive(Default)]
struct Ended {
    turns: HashSet<TurnId>,
    by_age: VecDeque<TurnId>,
}

impl Ended {
    fn contains(&self, turn: &TurnId) -> bool {
        self.turns.contains(turn)
    }

    fn insert(&mut self, turn: TurnId) {
        if self.turns.insert(turn) {
            self.by_age.push_back(turn);
        }
        while self.by_age.len() > MOST_ENDED
            && let Some(oldest) = self.by_age.pop_front()
        {
            self.turns.remove(&oldest);
        }
    }
}
