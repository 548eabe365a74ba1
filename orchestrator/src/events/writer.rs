//! The one thread that writes: takes what has gathered while the disk was busy, writes it as one group, waits for the disk, answers.
//!
//! Room is promised before it is needed. A turn is taken only if the room that the disk has already given holds its first records,
//! its end, what its gateway says afterwards, and the same of every other turn: so a full disk refuses turns and never loses an end.

use std::{
    cmp::Ordering::{Equal, Greater, Less},
    collections::{HashMap, VecDeque},
    fs::File,
    io, mem,
    os::unix::fs::FileExt,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use headgate_contracts::{TurnId, wire::log::Delivered};
use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};

use super::{
    Heard, MOST_ENDED, Refused, Shared, Sync, Untold,
    facts::{Begun, Crashed, Told, Word},
    record::{MAX_EVENT_BYTES, MAX_RECORD_BYTES, Part, Record, record_bytes},
    recover::{Found, Kept, Owed},
    sealed,
    segment::Folder,
};

/// The largest event that ends a turn; `the_longest_end_fits_its_room` holds it.
pub(super) const MAX_END_BYTES: usize = 2 << 10;
/// The largest verdict on an output that is kept, and the largest word on what the user got.
pub(super) const MAX_VERDICT_BYTES: usize = 2 << 10;
pub(super) const MAX_DELIVERY_BYTES: usize = 1 << 10;
/// What is kept free for the end of each open turn.
const END_ROOM: u64 = record_bytes(MAX_END_BYTES) as u64;
/// What is kept free for what the gateway says of each turn.
const TOLD_ROOM: u64 = (record_bytes(MAX_VERDICT_BYTES) + record_bytes(MAX_DELIVERY_BYTES)) as u64;
/// The part of the cap that may be kept free for what gateways have not said yet: a fourth.
const OWED_SHARE: u64 = 4;
/// The most commands in one group.
const GROUP: usize = 1024;
/// After the disk has refused room, it is not asked again for so long.
const ASK_AGAIN: Duration = Duration::from_secs(1);
/// How much of the cap may be taken by what cannot be let go before new turns are refused, in percent.
const WATERMARK: u64 = 85;
/// From where on that is told: a warning, then that turns are refused, then that even the room of their ends runs out.
const MARKS: [u64; 3] = [70, WATERMARK, 95];

/// What the writer is asked to do.
pub(super) enum Command {
    /// To write the first events of a turn and say when they are durable.
    Begin { turn: TurnId, events: [Vec<u8>; 2], begun: Box<Begun>, tell: oneshot::Sender<Result<(), Refused>> },
    /// To write text of a turn that is open, where there is room to spare.
    Text { turn: TurnId, events: Vec<Vec<u8>> },
    /// To write the last event of a turn, if it was begun.
    End { turn: TurnId, event: Vec<u8> },
    /// To write what the gateway of `key` says of a turn that has ended, and say when it is durable. `named`: the same key with the
    /// name that stands for the session.
    Tell { turn: TurnId, key: String, named: Option<String>, told: Box<Told>, tell: oneshot::Sender<Result<Heard, Untold>> },
    /// To write that a prompt was refused, and say when that is durable.
    Deny { turn: TurnId, events: [Vec<u8>; 2], tell: oneshot::Sender<Result<Heard, Untold>> },
    /// To write of turns that ended so long ago that nobody said what the user got.
    Sweep { patience: Duration },
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
    open: HashMap<TurnId, Open>,
    /// Turns that have ended and of which nobody has said what the user got.
    owed: HashMap<TurnId, Owed>,
    /// The same by age; some may have been settled since.
    owed_by_age: VecDeque<(Instant, TurnId)>,
    ended: Ended,
    ask_again: Option<Instant>,
    sealed: bool,
    /// How many of [`MARKS`] were passed when that was last told.
    passed: usize,
}

struct Open {
    /// The segment that it begins in.
    segment: u64,
    begun: Begun,
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
    /// The number of its last record.
    last: u64,
}

impl Writer {
    /// A writer that goes on after what was found, in a segment of its own.
    pub(super) fn new(folder: Folder, sync: Sync, shared: Arc<Shared>, cap: u64, segment_bytes: u64, found: Found) -> io::Result<Writer> {
        let Found { segments, next_segment, next_record, ended, owed, .. } = found;
        let full = |Kept { number, bytes, last }| Full { number, bytes, open: 0, last };
        let mut kept: VecDeque<Full> = segments.into_iter().map(full).collect();
        let delivered = shared.delivered();
        // Every turn in there is about to get its end, so all of it that was delivered may go where room is needed. The rest stays, even
        // if the cap must give way by a segment: the ends of crashed turns have to be written somewhere.
        while kept.iter().map(|full| full.bytes).sum::<u64>() + segment_bytes > cap
            && let Some(oldest) = kept.pop_front_if(|full| full.last <= delivered)
        {
            folder.remove(oldest.number)?;
        }
        let file = folder.create(next_segment, segment_bytes)?;
        let mut remembered = Ended::default();
        ended.into_iter().for_each(|(turn, word)| remembered.insert(turn, word));
        let mut writer = Writer {
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
            owed: HashMap::new(),
            owed_by_age: VecDeque::new(),
            ended: remembered,
            ask_again: None,
            sealed: false,
            passed: 0,
        };
        // Their gateways may have waited for us.
        for (turn, owed) in owed {
            if writer.make_room(TOLD_ROOM).is_ok() {
                writer.owe(turn, owed);
            }
        }
        Ok(writer)
    }

    /// Gives turns that a crash left open the end that says so.
    pub(super) fn end_crashed(&mut self, crashed: Vec<Crashed>) -> io::Result<()> {
        for Crashed { turn, end, begun } in crashed {
            self.make_room(END_ROOM + TOLD_ROOM)?;
            match begun {
                Some(begun) => {
                    self.append(Part::Ends, turn, &end);
                    self.ended.insert(turn, Word::Owed);
                    self.owe(turn, Owed { begun, has_verdict: false });
                }
                None => {
                    self.append(Part::Settles, turn, &end);
                    self.ended.insert(turn, Word::Refused);
                }
            }
        }
        self.commit().map_err(|_| io::Error::other("the ends of crashed turns cannot be written"))?;
        self.publish();
        Ok(())
    }

    /// Writes until nobody can ask for more.
    pub(super) fn run(mut self, mut asked: mpsc::Receiver<Command>) {
        let mut commands = Vec::with_capacity(GROUP);
        let mut waiting = Vec::new();
        let mut heard = Vec::new();
        // What gathers while the disk works on one group is the next one: the busier the disk, the larger the groups.
        while asked.blocking_recv_many(&mut commands, GROUP) > 0 {
            for command in commands.drain(..) {
                match command {
                    Command::Begin { turn, events, begun, tell } => match self.begin(turn, &events, *begun) {
                        Ok(()) => waiting.push(tell),
                        Err(refused) => {
                            self.shared.refused.inc();
                            // Nobody listens any more where the caller has left.
                            let _ = tell.send(Err(refused));
                        }
                    },
                    Command::Text { turn, events } => self.text(turn, &events),
                    Command::End { turn, event } => self.end(turn, &event),
                    Command::Tell { turn, key, named, told, tell } => {
                        heard.push((tell, self.tell(turn, &[Some(key.as_str()), named.as_deref()], &told)));
                    }
                    Command::Deny { turn, events, tell } => heard.push((tell, self.deny(turn, &events))),
                    Command::Sweep { patience } => self.sweep(patience),
                    Command::Flush { tell } => waiting.push(tell),
                }
            }
            let durable = self.commit();
            // Before anybody is told: what is published is never older than what is known.
            self.publish();
            for tell in waiting.drain(..) {
                let _ = tell.send(durable);
            }
            for (tell, heard) in heard.drain(..) {
                let _ = tell.send(durable.map_err(Untold::Refused).and(heard));
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

    fn begin(&mut self, turn: TurnId, events: &[Vec<u8>; 2], begun: Begun) -> Result<(), Refused> {
        self.admit(turn, events, END_ROOM + TOLD_ROOM)?;
        let [accepted, verdict] = events;
        self.append(Part::Begins, turn, accepted);
        self.open.insert(turn, Open { segment: self.active.number, begun });
        self.active.open += 1;
        self.append(Part::Within, turn, verdict);
        Ok(())
    }

    /// Writes text, or lets all of it go: it takes no room that was promised, and no turn is refused for it.
    fn text(&mut self, turn: TurnId, events: &[Vec<u8>]) {
        self.shared.text_waiting.fetch_sub(sealed::bytes(events), Ordering::Relaxed);
        let need = events.iter().map(|event| record_bytes(event.len()) as u64).sum::<u64>();
        let is_taken = !self.sealed
            && self.open.contains_key(&turn)
            && events.iter().all(|event| event.len() <= MAX_EVENT_BYTES)
            && (self.pinned() + need) * 100 < self.cap * MARKS[0]
            && self.spare_room(need);
        if is_taken {
            events.iter().for_each(|event| self.append(Part::Within, turn, event));
        } else {
            self.shared.text_dropped.inc_by(events.len() as u64);
        }
    }

    /// Whether there is room for `need` bytes more than what was promised, and nothing has to give way for it.
    fn spare_room(&mut self, need: u64) -> bool {
        while self.room() < self.promised() + need {
            if self.grow().is_err() {
                return false;
            }
        }
        true
    }

    /// What is kept free for what was begun.
    fn promised(&self) -> u64 {
        self.open.len() as u64 * (END_ROOM + TOLD_ROOM) + self.owed.len() as u64 * TOLD_ROOM
    }

    /// Sees to the room for a turn's first events, and for `later` ones.
    fn admit(&mut self, turn: TurnId, events: &[Vec<u8>; 2], later: u64) -> Result<(), Refused> {
        if self.sealed {
            return Err(Refused::Sealed);
        }
        if self.open.contains_key(&turn) || self.ended.get(&turn).is_some() {
            return Err(Refused::Known);
        }
        if events.iter().any(|event| event.len() > MAX_EVENT_BYTES) {
            return Err(Refused::TooLong);
        }
        if self.pinned() >= self.cap / 100 * WATERMARK {
            return Err(Refused::Full);
        }
        let need = events.iter().map(|event| record_bytes(event.len()) as u64).sum::<u64>() + later;
        self.make_room(need).map_err(|error| {
            tracing::warn!(%error, "the event log has no room for new turns");
            Refused::Full
        })
    }

    /// Takes room for `need` bytes more than what was promised.
    fn make_room(&mut self, need: u64) -> io::Result<()> {
        // Silent gateways must not take the room of what is kept.
        while self.owed.len() as u64 * TOLD_ROOM > self.cap / OWED_SHARE && self.give_up_oldest() {}
        loop {
            if self.room() >= self.promised() + need {
                return Ok(());
            }
            if let Err(error) = self.grow() {
                // What a gateway may yet say is the first to go: before a turn is refused, the oldest is not waited for.
                if !self.give_up_oldest() {
                    return Err(error);
                }
            }
        }
    }

    fn end(&mut self, turn: TurnId, event: &[u8]) {
        // A turn that was refused has no end here.
        let Some(Open { segment: begun_in, begun }) = self.open.remove(&turn) else { return };
        if self.active.number == begun_in {
            self.active.open -= 1;
        } else if let Some(full) = self.kept.iter_mut().find(|full| full.number == begun_in) {
            full.open -= 1;
        }
        self.append(Part::Ends, turn, event);
        self.ended.insert(turn, Word::Owed);
        self.owe(turn, Owed { begun, has_verdict: false });
    }

    fn owe(&mut self, turn: TurnId, owed: Owed) {
        self.owed.insert(turn, owed);
        self.owed_by_age.push_back((Instant::now(), turn));
    }

    fn tell(&mut self, turn: TurnId, keys: &[Option<&str>], told: &Told) -> Result<Heard, Untold> {
        if self.sealed {
            return Err(Untold::Refused(Refused::Sealed));
        }
        let Some(owed) = self.owed.get(&turn) else {
            return match self.ended.get(&turn) {
                Some(Word::Said) => Ok(Heard::Again),
                Some(Word::Unknown | Word::Refused) => Err(Untold::Late),
                Some(Word::Owed) | None if self.open.contains_key(&turn) => Err(Untold::Open),
                Some(Word::Owed) | None => Err(Untold::Unknown),
            };
        };
        // Another's turn is not there.
        if !keys.contains(&Some(owed.begun.key())) {
            return Err(Untold::Unknown);
        }
        let (verdict, delivery) = owed.begun.told(told);
        if verdict.as_ref().is_some_and(|verdict| verdict.len() > MAX_VERDICT_BYTES) || delivery.len() > MAX_DELIVERY_BYTES {
            return Err(Untold::Refused(Refused::TooLong));
        }
        if let Some(verdict) = verdict.filter(|_| !owed.has_verdict) {
            self.append(Part::After, turn, &verdict);
        }
        self.settle(turn, Word::Said, &delivery);
        self.shared.deliveries(told.outcome()).inc();
        Ok(Heard::Now)
    }

    fn settle(&mut self, turn: TurnId, word: Word, event: &[u8]) {
        self.append(Part::Settles, turn, event);
        self.owed.remove(&turn);
        self.ended.insert(turn, word);
    }

    fn deny(&mut self, turn: TurnId, events: &[Vec<u8>; 2]) -> Result<Heard, Untold> {
        if self.ended.get(&turn) == Some(Word::Refused) {
            return Ok(Heard::Again);
        }
        self.admit(turn, events, 0).map_err(|refused| if refused == Refused::Known { Untold::Late } else { Untold::Refused(refused) })?;
        let [verdict, denied] = events;
        self.append(Part::Begins, turn, verdict);
        self.settle(turn, Word::Refused, denied);
        Ok(Heard::Now)
    }

    fn sweep(&mut self, patience: Duration) {
        let now = Instant::now();
        while !self.sealed && self.owed_by_age.front().is_some_and(|(since, _)| now.duration_since(*since) >= patience) {
            self.give_up_oldest();
        }
    }

    /// Writes of the turn that ended first that nobody said what the user got; `false` where every gateway has said it.
    fn give_up_oldest(&mut self) -> bool {
        while let Some((_, turn)) = self.owed_by_age.pop_front() {
            if let Some(owed) = self.owed.get(&turn).filter(|_| !self.sealed) {
                let event = owed.begun.untold(None);
                self.settle(turn, Word::Unknown, &event);
                self.shared.deliveries(Delivered::Unknown).inc();
                return true;
            }
        }
        false
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
                self.kept.push_back(Full { number: full.number, bytes: self.at, open: full.open, last: self.durable });
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
                self.shared.wake();
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
        // The oldest segments go, as soon as every turn that begins in them has its end and the topic has all of it.
        let delivered = self.shared.delivered();
        while self.taken() + self.segment_bytes > self.cap {
            let Some(oldest) = self.kept.pop_front_if(|full| full.open == 0 && full.last <= delivered) else {
                return Err(io::Error::new(
                    io::ErrorKind::StorageFull,
                    "the cap is reached, and the oldest segment holds a turn without an end or an event that was not delivered",
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

    /// What cannot be let go: everything from the first turn without an end, or the first event that was not delivered.
    fn pinned(&self) -> u64 {
        let delivered = self.shared.delivered();
        let may_go = |full: &&Full| full.open == 0 && full.last <= delivered;
        self.kept.iter().skip_while(may_go).map(|full| full.bytes).sum::<u64>() + self.at
    }

    fn publish(&mut self) {
        self.shared.taken_bytes.store(self.taken(), Ordering::Relaxed);
        self.shared.open_turns.store(self.open.len() as u64, Ordering::Relaxed);
        let pinned = self.pinned();
        self.shared.pinned_bytes.store(pinned, Ordering::Relaxed);
        let percent = pinned.saturating_mul(100) / self.cap.max(1);
        let passed = MARKS.iter().filter(|mark| percent >= **mark).count();
        match passed.cmp(&self.passed) {
            Less => tracing::info!(percent, "the event log has more room again"),
            Equal => {}
            Greater if passed == 1 => tracing::warn!(percent, "the event log fills up: what is in it cannot be let go"),
            Greater => tracing::error!(percent, "the event log is full: new turns are refused"),
        }
        self.passed = passed;
    }
}

/// The latest turns that have ended.
#[derive(Default)]
struct Ended {
    turns: HashMap<TurnId, Word>,
    by_age: VecDeque<TurnId>,
}

impl Ended {
    fn get(&self, turn: &TurnId) -> Option<Word> {
        self.turns.get(turn).copied()
    }

    fn insert(&mut self, turn: TurnId, word: Word) {
        if self.turns.insert(turn, word).is_none() {
            self.by_age.push_back(turn);
        }
        while self.by_age.len() > MOST_ENDED
            && let Some(oldest) = self.by_age.pop_front()
        {
            self.turns.remove(&oldest);
        }
    }
}
