//! The ring between a turn and its readers: bounded, numbered, already filtered.
//!
//! One writer, the turn; any number of readers, each a client connection. It is where a turn meets backpressure
//! ([`Outbox::send`] waits while a reader is behind), learns that nobody listens ([`Outbox::gone`]), and where a client
//! that comes back finds what it missed ([`Reader`] at a sequence number, with an explicit gap if that is no longer kept).

use std::{
    collections::VecDeque,
    future::poll_fn,
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
    time::Duration,
};

use headgate_contracts::{Batch, Code, End, Fault, Flow, Gone, Head, OnDisconnect, Record, Stop, Turn};
use tokio::time::{Instant, timeout};

use crate::voice::Voice;

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
    /// Events stay after they were read, so that a reader can come back for them.
    keeps: bool,
}

struct State {
    voice: Voice,
    bytes: Vec<u8>,
    /// Bytes that were dropped from the front of `bytes` since the turn began.
    base: u64,
    entries: VecDeque<Entry>,
    /// The sequence number of the first entry kept.
    first: u64,
    head: Option<Arc<Head>>,
    /// Set once: nothing more will come. `Some`: why, where no event could say it.
    closed: Option<Option<Stop>>,
    readers: Vec<Place>,
    next_reader: u64,
    /// When the last reader left.
    alone_since: Option<Instant>,
    stopped: Option<Gone>,
    writer: Option<Waker>,
}

struct Entry {
    name: &'static str,
    start: u64,
    len: usize,
}

struct Place {
    id: u64,
    at: u64,
    waker: Option<Waker>,
}

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
        bytes: Vec::new(),
        base: 0,
        entries: VecDeque::new(),
        first: 0,
        head: None,
        closed: None,
        readers: vec![Place { id: 0, at: 0, waker: None }],
        next_reader: 1,
        alone_since: None,
        stopped: None,
        writer: None,
    };
    let keeps = on_disconnect != OnDisconnect::Cancel;
    let ring = Arc::new(Ring { state: Mutex::new(state), max_buffered, keeps });
    (Outbox { ring: ring.clone(), stall, on_disconnect }, Reader { ring, id: 0 })
}

impl Ring {
    // Nothing under this lock can panic but the voice's encoder; what it left behind is still a valid ring.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn next(&self) -> u64 {
        self.first + self.entries.len() as u64
    }

    /// Takes up what `write` appends, as events.
    fn add(&mut self, write: impl FnOnce(&mut Voice, &mut Vec<u8>, &mut dyn FnMut(&'static str, Range<usize>))) {
        let State { voice, bytes, base, entries, .. } = self;
        write(voice, bytes, &mut |name, range| {
            entries.push_back(Entry { name, start: *base + range.start as u64, len: range.len() });
        });
        self.wake_readers();
    }

    fn wake_readers(&mut self) {
        for place in &mut self.readers {
            if let Some(waker) = place.waker.take() {
                waker.wake();
            }
        }
    }

    /// Bytes that the reader furthest behind has yet to take.
    fn unread(&self) -> usize {
        let Some(at) = self.readers.iter().map(|place| place.at).min() else { return self.bytes.len() };
        match self.entries.get(at.saturating_sub(self.first) as usize) {
            Some(entry) => (self.base + self.bytes.len() as u64 - entry.start) as usize,
            None => 0,
        }
    }

    /// Drops what nobody will ask for again.
    fn trim(&mut self, ring: &Ring) {
        let read = self.readers.iter().map(|place| place.at).min().unwrap_or(self.first);
        if ring.keeps {
            while self.bytes.len() > ring.max_buffered && self.first < read {
                self.drop_first();
            }
        } else if read >= self.next() {
            self.first = self.next();
            self.entries.clear();
            self.base += self.bytes.len() as u64;
            self.bytes.clear();
            // An idle stream keeps no more than one small buffer.
            self.bytes.shrink_to(1 << 10);
        }
    }

    fn drop_first(&mut self) {
        if let Some(entry) = self.entries.pop_front() {
            self.first += 1;
            let end = (entry.start - self.base) as usize + entry.len;
            self.bytes.drain(..end);
            self.base += end as u64;
        }
    }

    fn is_behind(&self, ring: &Ring) -> bool {
        self.unread() > ring.max_buffered
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
        state.add(|voice, bytes, add| voice.open(turn, &head, bytes, add));
        state.head = Some(Arc::new(head));
    }

    /// Puts a batch in, then waits while a reader is behind: this is the backpressure. Cancel safe: what was put in stays in.
    pub async fn send(&self, batch: &Batch) -> Result<(), Stop> {
        if batch.is_empty() {
            return Ok(());
        }
        self.ring.state().add(|voice, bytes, add| voice.write(batch, bytes, add));
        let room = poll_fn(|cx| {
            let mut state = self.ring.state();
            // A drained turn goes on without a reader; what nobody came back for in time is a gap.
            if state.readers.is_empty() && matches!(self.on_disconnect, OnDisconnect::Drain(_)) {
                while state.bytes.len() > self.ring.max_buffered {
                    state.drop_first();
                }
            }
            if !state.is_behind(&self.ring) {
                return Poll::Ready(());
            }
            state.writer = Some(cx.waker().clone());
            Poll::Pending
        });
        let mut room = std::pin::pin!(room);
        if let Poll::Ready(()) = futures_util::poll!(room.as_mut()) {
            return Ok(());
        }
        timeout(self.stall, room).await.map_err(|_| Stop::Gone(Gone::Slow))
    }

    /// Ready when nobody is listening any more, or somebody said stop. Cancel safe.
    pub async fn gone(&self) -> Gone {
        loop {
            let since = poll_fn(|cx| {
                let mut state = self.ring.state();
                if let Some(gone) = state.stopped {
                    return Poll::Ready(Err(gone));
                }
                if let Some(since) = state.alone_since {
                    return Poll::Ready(Ok(since));
                }
                state.writer = Some(cx.waker().clone());
                Poll::Pending
            })
            .await;
            let patience = match (since, self.on_disconnect) {
                (Err(gone), _) => return gone,
                (Ok(_), OnDisconnect::Cancel) => return Gone::Left,
                (Ok(since), OnDisconnect::Grace(patience) | OnDisconnect::Drain(patience)) => since + patience,
            };
            // Somebody may come back, or say stop, before patience runs out.
            let changed = poll_fn(|cx| {
                let mut state = self.ring.state();
                state.writer = Some(cx.waker().clone());
                if state.stopped.is_some() || state.alone_since.is_none() { Poll::Ready(()) } else { Poll::Pending }
            });
            if tokio::time::timeout_at(patience, changed).await.is_err() {
                return Gone::Left;
            }
        }
    }

    /// Bytes of text sent so far.
    pub fn text_bytes(&self) -> u64 {
        self.ring.state().voice.text_bytes()
    }

    /// The end, in the client's own dialect, after what `last` still holds. Nothing can be sent afterwards: the outbox is used up.
    pub fn close(self, turn: &Turn, last: &Batch, end: &End) -> Record {
        let mut guard = self.ring.state();
        let state = &mut *guard;
        let opened = state.head.is_some();
        if opened {
            state.add(|voice, bytes, add| voice.write(last, bytes, add));
        }
        let record = state.voice.settle(turn, end);
        if opened {
            let seq = state.next();
            state.add(|voice, bytes, add| voice.close(turn, &record, end, seq, bytes, add));
        }
        let told = opened && !(state.voice.is_whole() && !matches!(end, Ok(()) | Err(Stop::Refused(_))));
        state.closed = Some(end.clone().err().filter(|_| !told));
        state.wake_readers();
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
                state.add(|voice, bytes, add| voice.break_off(&stop, seq, bytes, add));
            }
            state.closed = Some(Some(stop));
            state.wake_readers();
        }
    }
}

impl Reader {
    /// The head of the answer, once there is one; why there will be none otherwise.
    pub fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<Result<Arc<Head>, Stop>> {
        let mut state = self.ring.state();
        if let Some(Some(stop)) = &state.closed {
            return Poll::Ready(Err(stop.clone()));
        }
        if let Some(head) = &state.head {
            return Poll::Ready(Ok(head.clone()));
        }
        self.wait(&mut state, cx);
        Poll::Pending
    }

    /// Shows up to `max` events to `take`, in order, and gives how many there were; 0 when the turn is over and all is read.
    pub fn poll_next(&mut self, cx: &mut Context<'_>, max: usize, mut take: impl FnMut(Numbered<'_>)) -> Poll<usize> {
        let mut guard = self.ring.state();
        let state = &mut *guard;
        let Some(place) = state.readers.iter_mut().find(|place| place.id == self.id) else { return Poll::Ready(0) };
        let mut shown = 0;
        if place.at < state.first && max > 0 {
            let payload = format!("{{\"from\":{},\"to\":{}}}", place.at, state.first - 1);
            take(Numbered { seq: state.first - 1, name: "gap", payload: payload.as_bytes() });
            place.at = state.first;
            shown += 1;
        }
        let begin = (place.at - state.first) as usize;
        for entry in state.entries.range(begin.min(state.entries.len())..).take(max.saturating_sub(shown)) {
            let start = (entry.start - state.base) as usize;
            let payload = state.bytes.get(start..start + entry.len).unwrap_or_default();
            take(Numbered { seq: place.at, name: entry.name, payload });
            place.at += 1;
            shown += 1;
        }
        if shown > 0 {
            let was_behind = state.writer.is_some();
            state.trim(&self.ring);
            if was_behind
                && !state.is_behind(&self.ring)
                && let Some(writer) = state.writer.take()
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
        self.ring.state().closed.clone().flatten()
    }

    /// Says stop for everybody.
    pub fn stop(&self, why: Gone) {
        stop(&self.ring, why);
    }

    fn wait(&self, state: &mut State, cx: &mut Context<'_>) {
        if let Some(place) = state.readers.iter_mut().find(|place| place.id == self.id) {
            place.waker = Some(cx.waker().clone());
        }
    }
}

/// Keeps a turn's events without listening: as long as there is one, a client can come back for them.
pub struct Stay(#[expect(dead_code, reason = "held for its life, not for its use")] Arc<Ring>);

impl Hook {
    /// Keeps the turn's events as long as the result lives.
    pub fn stay(&self) -> Option<Stay> {
        self.0.upgrade().map(Stay)
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let mut state = self.ring.state();
        state.readers.retain(|place| place.id != self.id);
        if state.readers.is_empty() {
            state.alone_since = Some(Instant::now());
        }
        if let Some(writer) = state.writer.take() {
            writer.wake();
        }
    }
}

impl Hook {
    /// Says stop for everybody; whether there was a turn left to stop.
    pub fn stop(&self, why: Gone) -> bool {
        self.0.upgrade().is_some_and(|ring| stop(&ring, why))
    }

    /// A new reader, at the event after `after` (`None`: from the first).
    pub fn read(&self, after: Option<u64>) -> Option<Reader> {
        let ring = self.0.upgrade()?;
        let mut state = ring.state();
        let id = state.next_reader;
        state.next_reader += 1;
        let at = after.map_or(0, |after| after.saturating_add(1)).min(state.next());
        state.readers.push(Place { id, at, waker: None });
        state.alone_since = None;
        drop(state);
        Some(Reader { ring, id })
    }
}

fn stop(ring: &Ring, why: Gone) -> bool {
    let mut state = ring.state();
    if state.closed.is_some() || state.stopped.is_some() {
        return false;
    }
    state.stopped = Some(why);
    if let Some(writer) = state.writer.take() {
        writer.wake();
    }
    true
}
