//! The ring between a turn and its readers: bounded, numbered, already filtered.
//!
//! One writer, the turn; any number of readers, each a client connection. It is where a turn meets backpressure
//! ([`Outbox::send`] waits while a reader is behind), learns that nobody listens ([`Outbox::gone`]), and where a client
//! that comes back finds what it missed ([`Reader`] at a sequence number, with an explicit gap if that is no longer kept).
//! A reader that takes nothing while another one could go on is waited for only a moment, and gets a gap too
//! (`docs/decisions/0240-nobody-waits-for-a-reader-that-sleeps.md`).

use std::{
    cell::RefCell,
    collections::VecDeque,
    future::poll_fn,
    ops::Range,
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
    time::Duration,
};

use headgate_contracts::{
    Batch, Code, End, Fault, Flow, Gone, Head, OnDisconnect, Record, Stop, Turn,
    wire::chat::{Confirmation, Gap},
};
use headgate_upstream::Line;
use http::{HeaderName, HeaderValue};
use smallvec::{SmallVec, smallvec};
use tokio::time::{Instant, timeout_at};

use crate::{
    asked::{Asked, nothing_asked},
    buffers,
    delivery::Slip,
    voice::Voice,
};

/// The most rooms for entries that a worker keeps for rings that have none, since they are empty, and how large they are.
const MAX_LENT: usize = 4;
const MAX_LENT_ENTRIES: usize = 256;

thread_local! {
    static LENT: RefCell<Vec<VecDeque<Entry>>> = const { RefCell::new(Vec::new()) };
}

/// How long a reader may take nothing while others wait for it. It is looked at as often, so it may be twice as long.
const NAP: Duration = Duration::from_secs(1);

/// The writer's end.
pub struct Outbox {
    ring: Arc<Ring>,
    stall: Duration,
    on_disconnect: OnDisconnect,
}

/// A reader's end. Dropping it is leaving.
pub struct Reader {
    ring: Arc<Ring>,
    id: u64,
}

/// A handle on a running turn that keeps neither end alive: for stop calls and for those who come back.
#[derive(Clone)]
pub struct Hook(std::sync::Weak<Ring>);

struct Ring {
    state: Mutex<State>,
    max_buffered: usize,
}

struct State {
    voice: Voice,
    /// Events stay after they were read, so that a reader can come back for them.
    keeps: bool,
    bytes: Vec<u8>,
    /// Bytes that were dropped from the front of `bytes` since the turn began.
    base: u64,
    entries: VecDeque<Entry>,
    /// The sequence number of the first entry kept.
    first: u64,
    /// What the answer's head says to clients, once there is one.
    head: Option<Fields>,
    /// Set once: nothing more will come. `Some`: why, where no event could say it.
    closed: Option<Option<Box<Stop>>>,
    /// The turn has ended with an answer: whole, or cut by policy.
    is_answered: bool,
    /// Nearly every turn has one.
    readers: SmallVec<[Place; 1]>,
    next_reader: u64,
    /// When the last reader left, and which event it would have read next.
    alone: Option<(Instant, u64)>,
    stopped: Option<Gone>,
    /// What the client's person is asked, or was asked last.
    asked: Option<Box<Asked>>,
    /// The number after the last event that any reader took, of readers that are gone.
    taken: u64,
    /// Once the turn has ended: to be sent when it is known what the client took.
    slip: Option<Box<Slip>>,
    /// The turn, where it waits for room. Two places for one task: most reads have to wake nobody.
    wants_room: Option<Waker>,
    /// The turn, where it waits for its readers' leaving: always.
    wants_gone: Option<Waker>,
}

struct Entry {
    name: &'static str,
    start: u64,
    len: usize,
}

struct Place {
    id: u64,
    at: u64,
    /// When it last took something while the writer waited, or came.
    moved: Instant,
    /// It took nothing while others waited for it, so they no longer do: until it takes something.
    is_asleep: bool,
    /// It missed events in a dialect that has no word for that, and gets no more.
    is_cut: bool,
    waker: Option<Waker>,
}

/// Header fields, in order.
pub type Fields = Arc<[(HeaderName, HeaderValue)]>;

/// One event as a reader gets it.
pub struct Numbered<'a> {
    /// Its number within the turn, from 0, without holes.
    pub seq: u64,
    /// Its name: `open`, `text`, ...
    pub name: &'static str,
    /// Its object, as JSON.
    pub payload: &'a [u8],
}

/// A ring for `turn`, spoken in `voice`: the writer's end and the first reader's.
pub fn outbox(turn: &Turn, voice: Voice) -> (Outbox, Reader) {
    let Flow { max_buffered, stall, on_disconnect, .. } = turn.flow;
    let state = State {
        voice,
        keeps: on_disconnect != OnDisconnect::Cancel,
        bytes: Vec::new(),
        base: 0,
        entries: VecDeque::new(),
        first: 0,
        head: None,
        closed: None,
        is_answered: false,
        readers: smallvec![Place::new(0, 0)],
        next_reader: 1,
        alone: None,
        stopped: None,
        asked: None,
        taken: 0,
        slip: None,
        wants_room: None,
        wants_gone: None,
    };
    let ring = Arc::new(Ring { state: Mutex::new(state), max_buffered });
    (Outbox { ring: ring.clone(), stall, on_disconnect }, Reader { ring, id: 0 })
}

/// Keeps the waker, which is nearly always the one that is there.
fn remember(place: &mut Option<Waker>, cx: &Context<'_>) {
    match place {
        Some(waker) => waker.clone_from(cx.waker()),
        None => *place = Some(cx.waker().clone()),
    }
}

impl Ring {
    // Nothing under this lock can panic but the voice's encoder; what it left behind is still a valid ring.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    fn new(id: u64, at: u64) -> Place {
        Place { id, at, moved: Instant::now(), is_asleep: false, is_cut: false, waker: None }
    }
}

/// What a client is told whose answer has a hole that its dialect cannot say.
fn missing() -> Stop {
    Fault::client(Code::SessionNotFound).saying("a part of this answer is no longer kept").into()
}

impl State {
    fn next(&self) -> u64 {
        self.first + self.entries.len() as u64
    }

    /// Takes up what `write` appends, as events. `running`: the task that writes. Readers of that very task are not woken, since
    /// whoever polls a turn polls its reader next: it would be polled twice for every batch.
    fn add(&mut self, running: Option<&Waker>, write: impl FnOnce(&mut Voice, &mut Vec<u8>, &mut dyn FnMut(&'static str, Range<usize>))) {
        let State { voice, bytes, base, entries, .. } = self;
        if bytes.capacity() == 0 {
            *bytes = buffers::lend();
        }
        if entries.capacity() == 0 {
            *entries = LENT.try_with(|lent| lent.borrow_mut().pop()).ok().flatten().unwrap_or_default();
        }
        write(voice, bytes, &mut |name, range| {
            entries.push_back(Entry { name, start: *base + range.start as u64, len: range.len() });
        });
        self.wake_readers(running);
    }

    fn wake_readers(&mut self, running: Option<&Waker>) {
        for place in &mut self.readers {
            if let Some(waker) = place.waker.take_if(|waker| running.is_none_or(|running| !waker.will_wake(running))) {
                waker.wake();
            }
        }
    }

    fn wake_writer(&mut self) {
        for waker in [self.wants_room.take(), self.wants_gone.take()].into_iter().flatten() {
            waker.wake();
        }
    }

    /// The event that the reader furthest behind takes next.
    fn last(&self) -> u64 {
        self.readers.iter().map(|place| place.at).min().unwrap_or_else(|| self.left())
    }

    /// The event that the reader furthest ahead takes next.
    fn lead(&self) -> u64 {
        self.readers.iter().map(|place| place.at).max().unwrap_or_else(|| self.left())
    }

    /// The event that the reader who sets the pace takes next: of those awake the one furthest behind.
    fn pace(&self) -> u64 {
        self.readers.iter().filter(|place| !place.is_asleep).map(|place| place.at).min().unwrap_or_else(|| self.lead())
    }

    fn left(&self) -> u64 {
        self.alone.map_or(self.first, |(_, at)| at)
    }

    /// Where an event begins, or where the next one will.
    fn start(&self, seq: u64) -> u64 {
        let entry = self.entries.get(seq.saturating_sub(self.first) as usize);
        entry.map_or(self.base + self.bytes.len() as u64, |entry| entry.start)
    }

    /// Sends the slip, if there still is one: some reader took all events before `next`, or nobody will take more.
    fn tell(&mut self, next: u64) {
        if let Some(slip) = self.slip.take() {
            slip.take(next.checked_sub(1), next == self.next() && next > 0);
        }
    }

    /// Bytes from an event on.
    fn bytes_from(&self, seq: u64) -> usize {
        (self.base + self.bytes.len() as u64 - self.start(seq)) as usize
    }

    fn is_behind(&self, ring: &Ring) -> bool {
        self.bytes_from(self.pace()) > ring.max_buffered
    }

    /// Drops what nobody will ask for again, and what nobody is waited for to take and the ring has no room for.
    fn trim(&mut self, ring: &Ring) {
        let (last, pace) = (self.last(), self.pace());
        while self.first < pace && ((!self.keeps && self.first < last) || self.bytes_from(self.first) > ring.max_buffered) {
            self.drop_first();
        }
        self.compact();
    }

    /// Waits no longer for those who have taken nothing for a while, where another reader could go on.
    fn leave_sleepers(&mut self, ring: &Ring, begun: Instant, now: Instant) {
        if self.bytes_from(self.lead()) > ring.max_buffered {
            return;
        }
        let mut readers = std::mem::take(&mut self.readers);
        for place in &mut readers {
            place.is_asleep |= self.bytes_from(place.at) > ring.max_buffered && now - place.moved.max(begun) >= NAP;
        }
        self.readers = readers;
        self.trim(ring);
    }

    /// When a reader last took something that the writer waited for, or came; not before `begun`.
    fn moved(&self, begun: Instant) -> Instant {
        self.readers.iter().map(|place| place.moved).fold(begun, Instant::max)
    }

    fn drop_first(&mut self) {
        if self.entries.pop_front().is_some() {
            self.first += 1;
        }
    }

    fn give_entries_back(&mut self) {
        let entries = std::mem::take(&mut self.entries);
        if !entries.is_empty() {
            self.entries = entries;
        } else if (1..=MAX_LENT_ENTRIES).contains(&entries.capacity()) {
            let _ = LENT.try_with(|lent| {
                let mut lent = lent.borrow_mut();
                if lent.len() < MAX_LENT {
                    lent.push(entries);
                }
            });
        }
    }

    /// Gives dropped events' bytes back: at once when nothing else is there, else when they are half of all, so that a byte
    /// is moved once at most.
    fn compact(&mut self) {
        let dead = self.bytes.len() - self.bytes_from(self.first);
        if dead == self.bytes.len() {
            buffers::give_back(&mut self.bytes);
            self.give_entries_back();
        } else if dead * 2 >= self.bytes.len() {
            self.bytes.drain(..dead);
        } else {
            return;
        }
        self.base += dead as u64;
    }
}

/// What nobody took to its end, somebody took so far.
impl Drop for State {
    fn drop(&mut self) {
        self.tell(self.taken);
    }
}

impl Outbox {
    /// A handle for stop calls and for those who come back.
    pub fn hook(&self) -> Hook {
        Hook(Arc::downgrade(&self.ring))
    }

    /// The answer begins: the client may now have its head.
    pub fn open(&self, turn: &Turn, head: Head) {
        let mut state = self.ring.state();
        state.add(None, |voice, bytes, add| voice.open(turn, &head, bytes, add));
        // Not as a map: it would be the largest thing that a turn keeps.
        state.head = Some(head.headers.iter().map(|(name, value)| (name.clone(), value.clone())).collect());
    }

    /// Puts a batch in, then waits while a reader is behind: this is the backpressure. Cancel safe: what was put in stays in.
    pub async fn send(&self, batch: &Batch) -> Result<(), Stop> {
        if batch.is_empty() {
            return Ok(());
        }
        let is_done = poll_fn(|cx| {
            let mut state = self.ring.state();
            state.add(Some(cx.waker()), |voice, bytes, add| voice.write(batch, bytes, add));
            if state.keeps || state.readers.len() > 1 {
                // What is kept for others makes room for what is new.
                state.trim(&self.ring);
            }
            Poll::Ready(!state.readers.is_empty() && !state.is_behind(&self.ring))
        });
        if is_done.await {
            return Ok(());
        }
        let mut begun = Instant::now();
        loop {
            let readers = self.ring.state().readers.len();
            let mut room = pin!(poll_fn(|cx| self.poll_room(cx, readers)));
            if readers == 0 {
                // How long nobody may be there is for `gone` to say.
                room.as_mut().await;
                begun = Instant::now();
            } else if futures_util::poll!(room.as_mut()).is_pending() {
                let stalled = self.ring.state().moved(begun) + self.stall;
                let look = if readers > 1 { stalled.min(Instant::now() + NAP) } else { stalled };
                // In a box: most turns never wait here.
                if Box::pin(timeout_at(look, room)).await.is_err() {
                    let (mut state, now) = (self.ring.state(), Instant::now());
                    if state.moved(begun) + self.stall <= now {
                        return Err(Stop::Gone(Gone::Slow));
                    }
                    state.leave_sleepers(&self.ring, begun, now);
                }
            }
            if !self.ring.state().is_behind(&self.ring) {
                return Ok(());
            }
        }
    }

    /// Ready when there is room, or when that has become another question: a reader left, or one came.
    fn poll_room(&self, cx: &mut Context<'_>, readers: usize) -> Poll<()> {
        let mut state = self.ring.state();
        if state.readers.is_empty() {
            // A drained turn goes on without a reader; what nobody came back for in time is a gap.
            while matches!(self.on_disconnect, OnDisconnect::Drain(_)) && state.bytes_from(state.first) > self.ring.max_buffered {
                state.drop_first();
            }
            state.trim(&self.ring);
        }
        if state.readers.len() != readers || !state.is_behind(&self.ring) {
            return Poll::Ready(());
        }
        remember(&mut state.wants_room, cx);
        Poll::Pending
    }

    /// Ready when nobody is listening any more, or somebody said stop. Cancel safe.
    pub async fn gone(&self) -> Gone {
        loop {
            let since = poll_fn(|cx| {
                let mut state = self.ring.state();
                if let Some(gone) = state.stopped {
                    return Poll::Ready(Err(gone));
                }
                if let Some((since, _)) = state.alone {
                    return Poll::Ready(Ok(since));
                }
                remember(&mut state.wants_gone, cx);
                Poll::Pending
            })
            .await;
            let (since, patience) = match (since, self.on_disconnect) {
                (Err(gone), _) => return gone,
                (Ok(_), OnDisconnect::Cancel) => return Gone::Left,
                (Ok(since), OnDisconnect::Grace(patience) | OnDisconnect::Drain(patience)) => (since, patience),
            };
            // Somebody may come back before patience runs out, and may leave again: then it begins anew. Or say stop.
            let changed = poll_fn(|cx| {
                let mut state = self.ring.state();
                if state.stopped.is_some() || state.alone.is_none_or(|(now, _)| now != since) {
                    return Poll::Ready(());
                }
                remember(&mut state.wants_gone, cx);
                Poll::Pending
            });
            if Box::pin(timeout_at(since + patience, changed)).await.is_err() {
                return Gone::Left;
            }
        }
    }

    /// The client is about to be asked `id`, and its answer goes by `line`. Gives the line back where the client's dialect has no
    /// questions.
    pub fn ask(&self, id: &str, line: Line) -> Option<Line> {
        let mut state = self.ring.state();
        if !state.voice.asks() {
            return Some(line);
        }
        state.asked = Some(Box::new(Asked::new(id, line)));
        None
    }

    /// Bytes of text sent so far.
    pub fn text_bytes(&self) -> u64 {
        self.ring.state().voice.text_bytes()
    }

    /// The end, in the client's own dialect, after what `last` still holds. Nothing can be sent afterwards: the outbox is used up.
    /// `slip`: filled in here, and taken by what the client takes.
    pub fn close(self, turn: &Turn, last: &Batch, end: &End, slip: Option<Slip>) -> Record {
        let mut guard = self.ring.state();
        let state = &mut *guard;
        let opened = state.head.is_some();
        if opened {
            state.add(None, |voice, bytes, add| voice.write(last, bytes, add));
        }
        let record = state.voice.settle(turn, end);
        let mut verdict = None;
        if opened {
            let seq = state.next();
            state.add(None, |voice, bytes, add| verdict = voice.close(turn, &record, end, seq, bytes, add));
        }
        state.slip = slip.map(|mut slip| {
            slip.fill(&record, verdict);
            Box::new(slip)
        });
        let told = opened && (!state.voice.is_whole() || matches!(end, Ok(()) | Err(Stop::Refused(_))));
        state.is_answered = opened && matches!(end, Ok(()) | Err(Stop::Refused(_)));
        state.closed = Some(end.clone().err().filter(|_| !told).map(Box::new));
        state.wake_readers(None);
        record
    }
}

/// A turn that panicked, or whose runtime is gone: its readers must not wait for ever, nor take a cut for an end.
impl Drop for Outbox {
    fn drop(&mut self) {
        let mut guard = self.ring.state();
        let state = &mut *guard;
        if state.closed.is_none() {
            let stop = Stop::Failed(Fault::us(Code::InternalError));
            if state.head.is_some() {
                let seq = state.next();
                state.add(None, |voice, bytes, add| voice.break_off(&stop, seq, bytes, add));
            }
            state.closed = Some(Some(Box::new(stop)));
            state.wake_readers(None);
        }
    }
}

impl Reader {
    /// The head of the answer, once there is one; why there will be none otherwise.
    pub fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<Result<Fields, Stop>> {
        let mut state = self.ring.state();
        if let Some(Some(stop)) = &state.closed {
            return Poll::Ready(Err(Stop::clone(stop)));
        }
        if state.readers.iter().any(|place| place.id == self.id && place.is_cut) {
            return Poll::Ready(Err(missing()));
        }
        if let Some(head) = &state.head {
            return Poll::Ready(Ok(head.clone()));
        }
        self.wait(&mut state, cx);
        Poll::Pending
    }

    /// Shows up to `max` events to `take`, in order, and gives how many there were; 0 when the turn is over and all is read,
    /// whatever `max` is. What is no longer kept is a gap, and in a dialect without that word the end.
    pub fn poll_next(&mut self, cx: &mut Context<'_>, max: usize, mut take: impl FnMut(Numbered<'_>)) -> Poll<usize> {
        let mut guard = self.ring.state();
        let state = &mut *guard;
        let next = state.next();
        let Some(place) = state.readers.iter_mut().find(|place| place.id == self.id) else { return Poll::Ready(0) };
        if place.is_cut {
            return Poll::Ready(0);
        }
        let mut shown = 0;
        if place.at < state.first && max > 0 {
            let (from, to) = (place.at, state.first - 1);
            let Some((name, payload)) = state.voice.gap(from, to, &missing()) else {
                place.is_cut = true;
                return Poll::Ready(0);
            };
            take(Numbered { seq: to, name, payload: &payload });
            shown += 1;
            if name != Gap::NAME {
                place.is_cut = true;
                return Poll::Ready(shown);
            }
            place.at = state.first;
        }
        let begin = place.at.saturating_sub(state.first) as usize;
        for entry in state.entries.range(begin.min(state.entries.len())..).take(max.saturating_sub(shown)) {
            let start = (entry.start - state.base) as usize;
            let payload = state.bytes.get(start..start + entry.len).unwrap_or_default();
            take(Numbered { seq: place.at, name: entry.name, payload });
            place.at += 1;
            shown += 1;
        }
        if shown > 0 {
            place.is_asleep = false;
            if state.wants_room.is_some() {
                place.moved = Instant::now();
            }
            if state.slip.is_some() && place.at == next {
                state.tell(next);
            }
            state.trim(&self.ring);
            if state.wants_room.is_some()
                && !state.is_behind(&self.ring)
                && let Some(writer) = state.wants_room.take()
            {
                writer.wake();
            }
            return Poll::Ready(shown);
        }
        if state.closed.is_some() && place.at >= state.first + state.entries.len() as u64 {
            return Poll::Ready(0);
        }
        self.wait(state, cx);
        Poll::Pending
    }

    /// Why the turn is over, where no event could say it: it was refused or failed before its answer began.
    pub fn untold(&self) -> Option<Stop> {
        self.ring.state().closed.clone().flatten().map(|stop| *stop)
    }

    /// Whether the turn is over, read or not.
    pub fn is_over(&self) -> bool {
        self.ring.state().closed.is_some()
    }

    /// Says stop for everybody.
    pub fn stop(&self, why: Gone) {
        stop(&self.ring, why);
    }

    /// A handle on the turn that does not listen.
    pub fn hook(&self) -> Hook {
        Hook(Arc::downgrade(&self.ring))
    }

    fn wait(&self, state: &mut State, cx: &mut Context<'_>) {
        if let Some(place) = state.readers.iter_mut().find(|place| place.id == self.id) {
            remember(&mut place.waker, cx);
        }
    }
}

/// Keeps a turn's events without listening: as long as there is one, a client can come back for them.
pub struct Stay(#[expect(dead_code, reason = "held for its life, not for its use")] Arc<Ring>);

impl Hook {
    /// Keeps the turn's events as long as the result lives.
    pub fn stay(&self) -> Option<Stay> {
        let ring = self.0.upgrade()?;
        ring.state().keeps = true;
        Some(Stay(ring))
    }

    /// Whether the turn goes on, or has ended with an answer that is still here.
    pub fn is_good(&self) -> bool {
        self.0.upgrade().is_some_and(|ring| {
            let state = ring.state();
            state.is_answered || (state.closed.is_none() && state.stopped.is_none())
        })
    }

    /// Whether anything of the turn is still here.
    pub fn is_here(&self) -> bool {
        self.0.strong_count() > 0
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let mut state = self.ring.state();
        let at = state.readers.iter().find(|place| place.id == self.id).map_or(0, |place| place.at);
        state.taken = state.taken.max(at);
        state.readers.retain(|place| place.id != self.id);
        if state.readers.is_empty() {
            state.alone = Some((Instant::now(), at));
        }
        state.wake_writer();
    }
}

impl Hook {
    /// Says stop for everybody; whether there was a turn left to stop.
    pub fn stop(&self, why: Gone) -> bool {
        self.0.upgrade().is_some_and(|ring| stop(&ring, why))
    }

    /// Answers the question that is open, for everybody: the first answer counts. Cancel safe in so far as it may be said again.
    ///
    /// Errors: `session_not_found`, `not_found` where nothing is asked under that id, `already_answered`, or what kept whoever asks from
    /// hearing it: then the question is open again.
    pub async fn confirm(&self, said: &Confirmation) -> Result<(), Fault> {
        let line = {
            let ring = self.0.upgrade().ok_or_else(|| Fault::client(Code::SessionNotFound))?;
            let mut state = ring.state();
            let is_over = state.closed.is_some();
            state.asked.as_deref_mut().filter(|_| !is_over).ok_or_else(nothing_asked)?.answer(said)?
        };
        let mut unheard = Unheard(Some((self, said)));
        line.confirm(said).await?;
        unheard.0 = None;
        Ok(())
    }

    /// A new reader, at the event after `after` (`None`: from the first).
    pub fn read(&self, after: Option<u64>) -> Option<Reader> {
        let ring = self.0.upgrade()?;
        let mut state = ring.state();
        let id = state.next_reader;
        state.next_reader += 1;
        let at = after.map_or(0, |after| after.saturating_add(1)).min(state.next());
        state.readers.push(Place::new(id, at));
        state.alone = None;
        state.wake_writer();
        drop(state);
        Some(Reader { ring, id })
    }
}

/// An answer on its way to whoever asked.
struct Unheard<'a>(Option<(&'a Hook, &'a Confirmation)>);

impl Drop for Unheard<'_> {
    fn drop(&mut self) {
        if let Some((hook, said)) = self.0
            && let Some(ring) = hook.0.upgrade()
            && let Some(asked) = ring.state().asked.as_deref_mut()
        {
            asked.unhear(said);
        }
    }
}

fn stop(ring: &Ring, why: Gone) -> bool {
    let mut state = ring.state();
    if state.closed.is_some() || state.stopped.is_some() {
        return false;
    }
    state.stopped = Some(why);
    state.wake_writer();
    true
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use headgate_contracts::{Lane, SessionId, TurnId};

    use super::*;

    const MAX: usize = 1 << 10;
    const STALL: Duration = Duration::from_secs(30);
    const MINUTE: Duration = Duration::from_secs(60);

    fn ring(on_disconnect: OnDisconnect) -> (Turn, Outbox, Reader) {
        let flow = Flow { max_buffered: MAX, stall: STALL, on_disconnect, ..Flow::default() };
        let turn = Turn { id: TurnId::fresh(), session: SessionId::fresh(), route: "/r".into(), flow, record: Record::default() };
        let (outbox, reader) = outbox(&turn, Voice::chat());
        outbox.open(&turn, Head::default());
        (turn, outbox, reader)
    }

    /// A batch of one event whose object has exactly so many bytes.
    fn batch(bytes: usize) -> Batch {
        let mut batch = Batch::new();
        batch.push_text(Lane::DEFAULT, &"x".repeat(bytes - r#"{"text":""}"#.len()));
        batch
    }

    /// Takes up to `max` events now: their names and numbers.
    fn take(reader: &mut Reader, max: usize) -> Vec<(&'static str, u64)> {
        let mut taken = Vec::new();
        let mut cx = Context::from_waker(Waker::noop());
        let _ = reader.poll_next(&mut cx, max, |event| taken.push((event.name, event.seq)));
        taken
    }

    fn held(outbox: &Outbox) -> usize {
        outbox.ring.state().bytes.len()
    }

    #[tokio::test(start_paused = true)]
    async fn one_batch_over_the_bound_is_let_in_and_then_the_turn_waits() {
        let (_turn, outbox, mut reader) = ring(OnDisconnect::Cancel);
        take(&mut reader, 9);
        for _ in 0..MAX / 128 {
            outbox.send(&batch(128)).await.unwrap();
        }
        assert_eq!(held(&outbox), MAX);
        let last = batch(128);
        let mut send = pin!(outbox.send(&last));
        assert!(futures_util::poll!(send.as_mut()).is_pending());
        assert_eq!(held(&outbox), MAX + 128, "the batch that did not fit, and no more");
        assert_eq!(take(&mut reader, 1), [("text", 1)]);
        assert!(futures_util::poll!(send.as_mut()).is_ready());
    }

    #[tokio::test(start_paused = true)]
    async fn a_reader_that_is_always_a_little_behind_costs_no_more_than_the_bound() {
        let (_turn, outbox, mut reader) = ring(OnDisconnect::Cancel);
        for _ in 0..10_000 {
            let batch = batch(100);
            let mut send = pin!(outbox.send(&batch));
            while futures_util::poll!(send.as_mut()).is_pending() {
                take(&mut reader, 1);
            }
            assert!(held(&outbox) <= 2 * (MAX + 100), "{}", held(&outbox));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_reader_that_takes_nothing_loses_its_turn_after_the_stall_time_and_one_that_takes_a_little_does_not() {
        let (_turn, outbox, mut reader) = ring(OnDisconnect::Cancel);
        let big = batch(8 * MAX);
        let begun = Instant::now();
        assert!(matches!(outbox.send(&big).await, Err(Stop::Gone(Gone::Slow))));
        assert_eq!(begun.elapsed(), STALL);
        take(&mut reader, 9);

        let many: Vec<Batch> = (0..4).map(|_| batch(MAX)).collect();
        let begun = Instant::now();
        let slowly = async {
            for batch in &many {
                outbox.send(batch).await?;
            }
            Ok::<_, Stop>(())
        };
        let (sent, ()) = tokio::join!(slowly, async {
            for _ in 0..3 {
                tokio::time::sleep(STALL * 9 / 10).await;
                take(&mut reader, 1);
            }
        });
        sent.unwrap();
        assert!(begun.elapsed() > STALL * 2);
    }

    #[tokio::test(start_paused = true)]
    async fn patience_begins_anew_each_time_the_last_reader_leaves() {
        let (_turn, outbox, reader) = ring(OnDisconnect::Grace(MINUTE));
        let hook = outbox.hook();
        let begun = Instant::now();
        let (gone, ()) = tokio::join!(outbox.gone(), async {
            drop(reader);
            tokio::time::sleep(MINUTE / 2).await;
            let again = hook.read(None).unwrap();
            tokio::time::sleep(MINUTE / 4).await;
            drop(again);
        });
        assert!(matches!(gone, Gone::Left));
        assert_eq!(begun.elapsed(), MINUTE / 2 + MINUTE / 4 + MINUTE);
    }

    #[tokio::test(start_paused = true)]
    async fn a_reader_that_stays_keeps_its_turn_for_ever() {
        let (_turn, outbox, reader) = ring(OnDisconnect::Cancel);
        let both = (reader, outbox.hook().read(None).unwrap());
        drop(both.0);
        assert!(tokio::time::timeout(MINUTE * 60, outbox.gone()).await.is_err());
        drop(both.1);
        assert!(matches!(outbox.gone().await, Gone::Left));
    }

    #[tokio::test(start_paused = true)]
    async fn in_its_grace_a_turn_goes_on_up_to_the_bound_and_waits_there_without_a_stall() {
        let (_turn, outbox, mut reader) = ring(OnDisconnect::Grace(STALL * 4));
        // A full ring, all of it read: what was read makes room for what comes while nobody is there.
        take(&mut reader, 9);
        for _ in 0..MAX / 128 {
            outbox.send(&batch(128)).await.unwrap();
            take(&mut reader, 9);
        }
        let (hook, next) = (outbox.hook(), 1 + MAX as u64 / 128);
        drop(reader);
        for _ in 0..MAX / 128 {
            outbox.send(&batch(128)).await.unwrap();
        }
        let (sent, mut back) = tokio::join!(
            async {
                let last = batch(128);
                outbox.send(&last).await
            },
            async {
                tokio::time::sleep(STALL * 3).await;
                let mut back = hook.read(Some(next - 1)).unwrap();
                assert_eq!(take(&mut back, 1), [("text", next)]);
                back
            }
        );
        sent.unwrap();
        let rest: Vec<u64> = take(&mut back, 99).into_iter().map(|(_, seq)| seq).collect();
        assert_eq!(rest, (next + 1..=next + MAX as u64 / 128).collect::<Vec<_>>(), "nothing is missing");
    }

    #[tokio::test(start_paused = true)]
    async fn a_drained_turn_drops_its_oldest_events_and_says_which() {
        let (turn, outbox, reader) = ring(OnDisconnect::Drain(MINUTE));
        let (hook, _stay) = (outbox.hook(), outbox.hook().stay());
        drop(reader);
        for _ in 0..100 {
            outbox.send(&batch(128)).await.unwrap();
            assert!(held(&outbox) <= 2 * (MAX + 128));
        }
        outbox.close(&turn, &Batch::new(), &Ok(()), None);
        let mut back = hook.read(None).unwrap();
        let events = take(&mut back, 999);
        let kept = MAX as u64 / 128;
        assert_eq!(events[0], ("gap", 100 - kept));
        assert_eq!(events[1], ("text", 101 - kept));
        assert_eq!(events.last(), Some(&("done", 101)));
        assert_eq!(events.len() as u64, 1 + kept + 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_reader_that_sleeps_is_waited_for_a_moment_and_learns_what_it_missed() {
        for on_disconnect in [OnDisconnect::Cancel, OnDisconnect::Grace(MINUTE)] {
            let (turn, outbox, mut sleeper) = ring(on_disconnect);
            let mut reader = outbox.hook().read(None).unwrap();
            take(&mut sleeper, 1);
            let begun = Instant::now();
            for _ in 0..100 {
                let batch = batch(128);
                let (sent, ()) = tokio::join!(outbox.send(&batch), async {
                    assert_eq!(take(&mut reader, 9).last().map(|(name, _)| *name), Some("text"), "at once, whoever is waited for");
                });
                sent.unwrap();
                assert!(held(&outbox) <= 2 * (MAX + 128), "{}", held(&outbox));
            }
            assert_eq!(begun.elapsed(), NAP, "once, and not for every batch");
            // What the ring holds is there for who sleeps, and no more.
            let kept = MAX as u64 / 128;
            assert_eq!(take(&mut sleeper, 2), [("gap", 100 - kept), ("text", 101 - kept)]);
            drop(reader);
            // Alone it is waited for as anybody is.
            let (begun, last) = (Instant::now(), batch(2 * MAX));
            let (sent, ()) = tokio::join!(outbox.send(&last), async {
                tokio::time::sleep(STALL / 2).await;
                assert_eq!(take(&mut sleeper, 99).len() as u64, kept);
            });
            sent.unwrap();
            assert_eq!(begun.elapsed(), STALL / 2);
            outbox.close(&turn, &Batch::new(), &Ok(()), None);
            assert_eq!(take(&mut sleeper, 9), [("done", 102)]);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_reader_that_is_slow_but_awake_is_told_everything() {
        let (_turn, outbox, mut slow) = ring(OnDisconnect::Cancel);
        let mut quick = outbox.hook().read(None).unwrap();
        let (mut seen, mut rest) = (Vec::new(), 100);
        while rest > 0 {
            let batch = batch(128);
            let mut send = pin!(outbox.send(&batch));
            while futures_util::poll!(send.as_mut()).is_pending() {
                take(&mut quick, 99);
                tokio::time::advance(NAP / 2).await;
                seen.extend(take(&mut slow, 1));
            }
            rest -= 1;
        }
        seen.extend(take(&mut slow, 99));
        assert_eq!(seen.into_iter().map(|(_, seq)| seq).collect::<Vec<_>>(), (0..=100).collect::<Vec<_>>());
    }

    #[tokio::test(start_paused = true)]
    async fn who_comes_back_does_not_wait_for_the_connection_that_died() {
        let (_turn, outbox, _dead) = ring(OnDisconnect::Cancel);
        let (big, begun) = (batch(2 * MAX), Instant::now());
        let (sent, _back) = tokio::join!(outbox.send(&big), async {
            tokio::time::sleep(STALL / 2).await;
            let mut back = outbox.hook().read(None).unwrap();
            assert_eq!(take(&mut back, 9), [("open", 0), ("text", 1)]);
            back
        });
        sent.unwrap();
        assert!(begun.elapsed() <= STALL / 2 + NAP, "{:?}", begun.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn without_credit_nothing_is_shown_and_the_end_is_still_found() {
        let (turn, outbox, mut reader) = ring(OnDisconnect::Drain(MINUTE));
        let mut cx = Context::from_waker(Waker::noop());
        assert!(reader.poll_next(&mut cx, 0, |_| panic!("no credit")).is_pending());
        // Its place has been trimmed away meanwhile.
        {
            let mut state = outbox.ring.state();
            state.drop_first();
        }
        outbox.send(&batch(64)).await.unwrap();
        assert!(reader.poll_next(&mut cx, 0, |_| panic!("no credit")).is_pending());
        outbox.close(&turn, &Batch::new(), &Ok(()), None);
        assert!(reader.poll_next(&mut cx, 0, |_| panic!("no credit")).is_pending());
        assert_eq!(take(&mut reader, 9), [("gap", 0), ("text", 1), ("done", 2)]);
        assert_eq!(reader.poll_next(&mut cx, 0, |_| panic!("no credit")), Poll::Ready(0));
    }

    struct Counts(AtomicUsize);
    impl std::task::Wake for Counts {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_reader_that_keeps_up_wakes_the_turn_for_nothing_and_one_that_makes_room_wakes_it_once() {
        let (_turn, outbox, mut reader) = ring(OnDisconnect::Cancel);
        let woken = Arc::new(Counts(AtomicUsize::new(0)));
        let waker = Waker::from(woken.clone());
        let mut cx = Context::from_waker(&waker);
        let mut gone = pin!(outbox.gone());
        assert!(gone.as_mut().poll(&mut cx).is_pending());
        for _ in 0..10 {
            let batch = batch(128);
            assert!(pin!(outbox.send(&batch)).as_mut().poll(&mut cx).is_ready());
            take(&mut reader, 9);
        }
        assert_eq!(woken.0.load(Ordering::Relaxed), 0);
        let big = batch(2 * MAX);
        let mut send = pin!(outbox.send(&big));
        assert!(send.as_mut().poll(&mut cx).is_pending());
        take(&mut reader, 9);
        assert_eq!(woken.0.load(Ordering::Relaxed), 1);
        assert!(send.as_mut().poll(&mut cx).is_ready());
        drop(reader);
        assert_eq!(woken.0.load(Ordering::Relaxed), 2, "and its leaving wakes it once more");
        assert!(gone.as_mut().poll(&mut cx).is_ready());
    }

    #[tokio::test(start_paused = true)]
    async fn a_reader_of_another_task_is_woken_by_every_batch_and_one_of_the_turns_own_task_by_none() {
        let (_turn, outbox, mut own) = ring(OnDisconnect::Cancel);
        let mut other = outbox.hook().read(None).unwrap();
        let wakers = [(); 2].map(|()| Arc::new(Counts(AtomicUsize::new(0))));
        let [here, there] = wakers.each_ref().map(|counts| Waker::from(counts.clone()));
        let (mut here, mut there) = (Context::from_waker(&here), Context::from_waker(&there));
        for _ in 0..10 {
            while own.poll_next(&mut here, 9, |_| ()).is_ready() {}
            while other.poll_next(&mut there, 9, |_| ()).is_ready() {}
            let batch = batch(64);
            assert!(pin!(outbox.send(&batch)).as_mut().poll(&mut here).is_ready());
        }
        let woken = wakers.map(|counts| counts.0.load(Ordering::Relaxed));
        assert_eq!(woken, [0, 10]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_turn_that_moves_to_another_task_is_woken_there() {
        for wake in [0, 1, 2] {
            let (_turn, outbox, mut reader) = ring(OnDisconnect::Cancel);
            let mut turn = Box::pin(async move {
                let big = batch(2 * MAX);
                tokio::select! { biased;
                    gone = outbox.gone() => Err(gone),
                    sent = outbox.send(&big) => Ok(sent.is_ok()),
                }
            });
            // Here it is polled by the client's connection, which then hands it on.
            assert!(futures_util::poll!(turn.as_mut()).is_pending());
            let task = tokio::spawn(turn);
            tokio::task::yield_now().await;
            match wake {
                0 => drop(reader),
                1 => reader.stop(Gone::Stopped),
                _ => drop(take(&mut reader, 9)),
            }
            let end = tokio::time::timeout(STALL / 2, task).await.expect("it is woken").unwrap();
            assert!(matches!((wake, end), (0, Err(Gone::Left)) | (1, Err(Gone::Stopped)) | (2, Ok(true))));
        }
    }
}
