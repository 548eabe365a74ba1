//! Holds back what its filter has not cleared: the only place in Headgate where text waits.
//!
//! A filter judges; its gate holds, edits, cuts, keeps order, counts bytes and watches the clock, the same way for every
//! filter. Laws that live here, each a property test in `tests/laws.rs`: nothing leaves beyond what is cleared; what is
//! cleared never goes back; events leave in the order they came, across lanes too; a shadowed gate changes nothing.

use std::{
    collections::VecDeque,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use headgate_contracts::{Batch, Code, Event, Fault, Head, Lane, Prompt, Record, Stop, What};
use tokio::time::{Instant, Sleep};

use crate::{
    At, Edit, Filter, Text, Verdict,
    terms::{Late, Mode, OnFault, Terms},
};

/// One filter's place in a chain.
pub struct Gate {
    name: &'static str,
    filter: Box<dyn Filter>,
    terms: Terms,
    textless: bool,
    lanes: Vec<Track>,
    /// What waits, in order. The first `gone` events have left already; they are swept out now and then.
    held: Batch,
    /// For each held event: where in its lane its text begins, and since when it waits.
    since: Vec<(At, Instant)>,
    gone: usize,
    spare: Batch,
    held_bytes: u64,
    stop: Option<Stop>,
    /// Judges no more: its filter broke and the terms say pass, or a shadowed filter has said stop.
    open: bool,
    /// Text went unjudged because it was late, so the filter's later edits may come too late.
    late: bool,
    sleep: Option<Pin<Box<Sleep>>>,
    holds: Holds,
}

/// How far one lane has come.
struct Track {
    lane: Lane,
    seen: At,
    cleared: At,
    edits: VecDeque<(Edit, bool)>,
    stop: Option<Stop>,
}

/// How long text waited in one gate.
#[derive(Debug, Clone, Copy, Default)]
pub struct Holds {
    /// How many pieces waited, by [`Holds::BOUNDS`]; the last counts the longer ones.
    pub buckets: [u32; 11],
    /// The sum of the waits.
    pub total: Duration,
    /// The longest.
    pub max: Duration,
}

impl Holds {
    /// Upper bounds of the buckets, in milliseconds.
    pub const BOUNDS: [u64; 10] = [1, 2, 5, 10, 20, 50, 100, 250, 1_000, 5_000];

    /// Shows each bucket that is not empty: its upper bound (twice the last bound for the open one) and its count.
    pub fn each(&self, mut show: impl FnMut(Duration, u32)) {
        let last = Holds::BOUNDS[Holds::BOUNDS.len() - 1];
        for (count, bound) in self.buckets.iter().zip(Holds::BOUNDS.into_iter().chain([2 * last])) {
            if *count > 0 {
                show(Duration::from_millis(bound), *count);
            }
        }
    }

    fn add(&mut self, wait: Duration) {
        let millis = wait.as_millis() as u64;
        let bucket = Holds::BOUNDS.iter().position(|bound| millis <= *bound).unwrap_or(Holds::BOUNDS.len());
        self.buckets[bucket] += 1;
        self.total += wait;
        self.max = self.max.max(wait);
    }
}

/// Events that have left are swept out of a gate's buffers once there are so many, so that a gate that always holds a
/// little stays little.
const SWEEP_EVENTS: usize = 16;

impl Gate {
    /// A gate for `filter`, known as `name` in logs and metrics.
    pub fn new(name: &'static str, filter: Box<dyn Filter>, terms: Terms) -> Gate {
        Gate {
            name,
            filter,
            terms,
            textless: false,
            lanes: Vec::new(),
            held: Batch::new(),
            since: Vec::new(),
            gone: 0,
            spare: Batch::new(),
            held_bytes: 0,
            stop: None,
            open: false,
            late: false,
            sleep: None,
            holds: Holds::default(),
        }
    }

    /// Its filter judges no text, so none is shown to it.
    pub fn textless(mut self) -> Gate {
        self.textless = true;
        self
    }

    /// The filter's name.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Why the turn ends at this gate, if it does.
    pub fn stop(&self) -> Option<&Stop> {
        self.stop.as_ref()
    }

    /// Bytes of text that wait here.
    pub fn held_bytes(&self) -> u64 {
        self.held_bytes
    }

    /// Whether more may come in. False only while a filter that has to think is behind.
    pub fn has_room(&self) -> bool {
        self.held_bytes <= self.terms.max_held()
    }

    /// How long text has waited here.
    pub fn holds(&self) -> &Holds {
        &self.holds
    }

    /// Shows the prompt to the filter.
    pub(crate) async fn prompt(&mut self, prompt: &mut Prompt) -> Result<(), Stop> {
        let said = self.filter.prompt(prompt).await;
        self.accept(said)
    }

    /// Shows the answer's head to the filter.
    pub(crate) fn head(&mut self, head: &mut Head) -> Result<(), Stop> {
        let said = self.filter.head(head);
        self.accept(said)
    }

    fn accept(&mut self, said: Result<(), Stop>) -> Result<(), Stop> {
        match (said, self.terms.mode, self.terms.on_fault) {
            (Ok(()), _, _) => Ok(()),
            (Err(Stop::Failed(fault)), _, OnFault::Pass) => {
                self.leave_out(&fault);
                Ok(())
            }
            (Err(_), Mode::Shadow, _) => {
                self.open = true;
                Ok(())
            }
            (Err(stop), Mode::Enforce, _) => Err(stop),
        }
    }

    fn leave_out(&mut self, fault: &Fault) {
        tracing::warn!(filter = self.name, code = %fault.code, cause = fault.chain(), "filter left out of a turn");
        self.open = true;
        for track in &mut self.lanes {
            track.cleared = track.seen;
        }
    }

    /// In: what came. Out: what may go.
    ///
    /// Work: one call of the filter per piece of text; while nothing is held and all is clean nothing is copied or allocated.
    pub(crate) fn pass(&mut self, batch: &mut Batch) {
        if self.stop.is_some() {
            batch.truncate(0);
            return;
        }
        if self.textless {
            return;
        }
        if self.terms.mode == Mode::Shadow {
            self.watch(batch);
            return;
        }
        if self.open && self.is_empty() {
            return;
        }
        let mut clean = 0;
        let mut judged = None;
        if self.is_empty() {
            for event in batch.events() {
                if let What::Text { lane, text } = event.what {
                    let (start, is_clean) = self.judge(lane, batch.text(text));
                    if !is_clean {
                        judged = Some(start);
                        break;
                    }
                }
                clean += 1;
            }
            if judged.is_none() {
                return;
            }
        }
        let now = Instant::now();
        let mut stopped = false;
        for event in batch.events().get(clean..).unwrap_or_default() {
            if stopped {
                break;
            }
            let mut start = At::default();
            if let What::Text { lane, text } = event.what {
                let words = batch.text(text);
                start = match judged.take() {
                    Some(start) => start,
                    None => self.judge(lane, words).0,
                };
                self.held_bytes += words.len() as u64;
                stopped = self.lanes.iter().any(|track| track.stop.is_some());
            }
            self.held.push_from(batch, *event);
            self.since.push((start, now));
        }
        batch.truncate(clean);
        self.release(batch, now);
        if !self.has_room() {
            self.be_late();
            self.release(batch, now);
        }
    }

    /// Nothing more will come: everything held gets its last verdict and leaves, but for what is cut.
    pub(crate) fn last(&mut self, batch: &mut Batch) {
        if self.stop.is_some() {
            return;
        }
        for index in 0..self.lanes.len() {
            let lane = self.lanes[index].lane;
            if self.terms.mode == Mode::Shadow {
                if !self.open {
                    drop(self.filter.last(lane));
                }
            } else if !self.open && self.lanes[index].stop.is_none() {
                let verdict = self.filter.last(lane);
                self.apply(index, verdict);
            }
        }
        let now = Instant::now();
        self.release(batch, now);
        if !self.is_empty() {
            self.be_late();
            self.release(batch, now);
        }
    }

    /// Lets the filter say what it has found.
    pub(crate) fn end(&mut self, record: &mut Record) {
        self.filter.end(record);
        if self.holds.max > record.held_max {
            record.held_max = self.holds.max;
            record.held_by = Some(self.name);
        }
    }

    /// Ready when something changed without new text: a verdict that was waited for, or a hold that ran out.
    pub(crate) fn poll_ripe(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.open || self.stop.is_some() {
            return Poll::Pending;
        }
        if let Poll::Ready((lane, verdict)) = self.filter.poll(cx) {
            if self.terms.mode == Mode::Enforce {
                let index = self.track(lane);
                self.apply(index, verdict);
            }
            return Poll::Ready(());
        }
        let (Some(max_hold), Some((_, since))) = (self.terms.max_hold(), self.since.get(self.gone)) else {
            return Poll::Pending;
        };
        let deadline = *since + max_hold;
        let sleep = self.sleep.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(deadline)));
        if sleep.deadline() != deadline {
            sleep.as_mut().reset(deadline);
        }
        ready!(sleep.as_mut().poll(cx));
        self.sleep = None;
        self.be_late();
        Poll::Ready(())
    }

    fn is_empty(&self) -> bool {
        self.gone == self.held.events().len()
    }

    fn watch(&mut self, batch: &Batch) {
        for event in batch.events() {
            if let What::Text { lane, text } = event.what
                && !self.open
            {
                let words = batch.text(text);
                let index = self.track(lane);
                let track = &mut self.lanes[index];
                let at = track.seen;
                track.seen.0 += words.len() as u64;
                let verdict = self.filter.text(Text { lane, at, text: words });
                self.open = verdict.stop.is_some();
            }
        }
    }

    fn track(&mut self, lane: Lane) -> usize {
        self.lanes.iter().position(|track| track.lane == lane).unwrap_or_else(|| {
            self.lanes.push(Track { lane, seen: At(0), cleared: At(0), edits: VecDeque::new(), stop: None });
            self.lanes.len() - 1
        })
    }

    /// Shows a piece to the filter; gives where it begins and whether all of it may go as it is.
    fn judge(&mut self, lane: Lane, words: &str) -> (At, bool) {
        let index = self.track(lane);
        let track = &mut self.lanes[index];
        let at = track.seen;
        track.seen.0 += words.len() as u64;
        if self.open {
            track.cleared = track.seen;
            return (at, true);
        }
        let verdict = self.filter.text(Text { lane, at, text: words });
        if verdict.to >= track.seen && verdict.edits.is_empty() && verdict.stop.is_none() {
            track.cleared = track.seen;
            return (at, true);
        }
        self.apply(index, verdict);
        (at, false)
    }

    fn apply(&mut self, index: usize, verdict: Verdict) {
        let (late, track) = (self.late, &mut self.lanes[index]);
        let to = verdict.to.min(track.seen);
        for edit in verdict.edits {
            let floor = track.edits.back().map_or(track.cleared, |(last, _)| last.range.end.max(track.cleared));
            let in_order = floor <= edit.range.start && edit.range.start <= edit.range.end && edit.range.end <= to;
            if in_order {
                track.edits.push_back((edit, false));
            } else if !late {
                // An edit of text that has gone is a fault of the filter: never let it pass for a mask.
                let fault = Fault::us(Code::InternalError).caused_by(format!("filter {} edits outside what it clears", self.name));
                track.stop = Some(Stop::Failed(fault));
                return;
            }
        }
        track.cleared = track.cleared.max(to);
        match verdict.stop.map(|stop| *stop) {
            Some(Stop::Failed(fault)) if self.terms.on_fault == OnFault::Pass => self.leave_out(&fault),
            Some(stop) => track.stop = Some(stop),
            None => {}
        }
    }

    /// What waited too long, or became too much, goes unjudged or ends the turn, as the terms say.
    fn be_late(&mut self) {
        match self.terms.late {
            Late::Release => {
                self.late = true;
                for track in &mut self.lanes {
                    track.cleared = track.seen;
                }
            }
            Late::Refuse => {
                let fault = Fault::us(Code::ModerationUnavailable).saying("text could not be cleared in time");
                self.stop = Some(Stop::Failed(fault));
            }
        }
    }

    /// Moves what may go from the head of the queue to `out`.
    fn release(&mut self, out: &mut Batch, now: Instant) {
        while let Some(Event { what, raw }) = self.held.events().get(self.gone).copied() {
            let (start, since) = self.since[self.gone];
            let What::Text { lane, text } = what else {
                out.push_from(&self.held, Event { what, raw });
                self.gone += 1;
                continue;
            };
            let index = self.track(lane);
            let track = &mut self.lanes[index];
            let words = self.held.text(text);
            let end = At(start.0 + words.len() as u64);
            if end <= track.cleared {
                let touched = track.edits.front().is_some_and(|(edit, _)| edit.range.start < end);
                if raw.is_some() && !touched {
                    out.push_from(&self.held, Event { what, raw });
                } else {
                    emit(track, start, words, out);
                }
                self.held_bytes -= words.len() as u64;
                self.gone += 1;
                if since != now {
                    self.holds.add(now - since);
                }
                continue;
            }
            let mut fit = track.cleared.0.saturating_sub(start.0) as usize;
            // A cut inside a character is rounded down.
            while !words.is_char_boundary(fit) {
                fit -= 1;
            }
            if fit > 0 {
                emit(track, start, &words[..fit], out);
                let rest = self.held.sub(text, fit..words.len());
                self.held.restate(self.gone, What::Text { lane, text: rest });
                self.since[self.gone].0 = At(start.0 + fit as u64);
                self.held_bytes -= fit as u64;
            }
            break;
        }
        if self.stop.is_none() {
            // The lane whose text blocks the queue speaks first: its cut lies earliest.
            let blocked = self.held.events().get(self.gone).and_then(|event| match event.what {
                What::Text { lane, .. } => Some(lane),
                _ => None,
            });
            let first = self.lanes.iter_mut().find(|track| Some(track.lane) == blocked && track.stop.is_some());
            self.stop = match first {
                Some(track) => track.stop.take(),
                None => self.lanes.iter_mut().find_map(|track| track.stop.take()),
            };
        }
        if self.stop.is_some() || self.is_empty() {
            self.held.clear();
            self.since.clear();
            self.gone = 0;
            self.held_bytes = 0;
            self.sleep = None;
        } else if self.gone >= SWEEP_EVENTS {
            self.spare.clear();
            for event in &self.held.events()[self.gone..] {
                self.spare.push_from(&self.held, *event);
            }
            std::mem::swap(&mut self.held, &mut self.spare);
            self.since.drain(..self.gone);
            self.gone = 0;
        }
    }
}

/// Writes a cleared piece of a lane with the edits that fall into it.
fn emit(track: &mut Track, start: At, words: &str, out: &mut Batch) {
    let end = At(start.0 + words.len() as u64);
    let mut at = start;
    let piece = |from: At, to: At| words.get((from.0 - start.0) as usize..(to.0 - start.0) as usize).unwrap_or_default();
    while let Some((edit, shown)) = track.edits.front_mut() {
        if edit.range.start >= end {
            break;
        }
        if edit.range.start > at {
            out.append_text(track.lane, piece(at, edit.range.start));
        }
        if !*shown {
            out.append_text(track.lane, &edit.with);
            *shown = true;
        }
        at = at.max(edit.range.end.min(end));
        if edit.range.end > end {
            break;
        }
        track.edits.pop_front();
    }
    out.append_text(track.lane, piece(at, end));
}
