//! Holds back what its filter has not cleared: the only place in Headgate where text waits.
//!
//! A filter judges; its gate holds, edits, cuts, keeps order, counts bytes and watches the clock, the same way for every
//! filter. Laws that live here, each a property test in `tests/laws.rs`: nothing leaves beyond what is cleared; what is
//! cleared never goes back; events leave in the order they came, across lanes too; a shadowed gate changes nothing but the
//! record; what waits has a bound, whatever the upstream sends.

use std::{
    collections::VecDeque,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use headgate_contracts::{Batch, Code, Event, Fault, Head, Lane, Outcome, Prompt, Record, Stop, What};
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
    /// What is replaced, and whether the replacement has been shown.
    edits: VecDeque<(Edit, bool)>,
    stop: Option<Stop>,
    /// The filter has said its last word on this lane.
    over: bool,
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
    /// Bytes of text that went unjudged because they were late, as the terms allow with `late: release`.
    pub unjudged_bytes: u64,
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

/// The most lanes of one answer that are kept apart. Honest answers have a handful; indices are the upstream's to choose, and
/// each lane costs a filter's state.
const MAX_LANES: usize = 64;

/// What an event costs beside its text and payload, in bytes, roughly.
const EVENT_COST: u64 = 80;

/// Room for payloads and events without text that wait behind held text, in bytes, beside twice the terms' `max_held`.
const FRAMES_ROOM: u64 = 64 << 10;

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

    /// Shows the prompt to the filter; a copy of it where it must not change anything.
    pub(crate) async fn prompt(&mut self, prompt: &mut Prompt) -> Result<(), Stop> {
        match self.terms.mode {
            Mode::Enforce => {
                let said = self.filter.prompt(prompt).await;
                self.accept(said)
            }
            Mode::Shadow => {
                let mut copy = prompt.clone();
                let said = self.filter.prompt(&mut copy).await;
                let found = copy.findings.get(prompt.findings.len()..).unwrap_or_default();
                if !found.is_empty() || said.is_err() {
                    prompt.findings.extend_from_slice(found);
                    prompt.outcome = prompt.outcome.max(Outcome::Flagged);
                }
                self.accept(said)
            }
        }
    }

    /// Shows the answer's head to the filter; a copy of it where it must not change anything.
    pub(crate) fn head(&mut self, head: &mut Head) -> Result<(), Stop> {
        if self.open {
            return Ok(());
        }
        let said = match self.terms.mode {
            Mode::Enforce => self.filter.head(head),
            Mode::Shadow => self.filter.head(&mut head.clone()),
        };
        self.accept(said)
    }

    fn accept(&mut self, said: Result<(), Stop>) -> Result<(), Stop> {
        match (said, self.terms.mode, self.terms.on_fault) {
            (Ok(()), _, _) => Ok(()),
            (Err(Stop::Failed(fault)), Mode::Shadow, _) | (Err(Stop::Failed(fault)), _, OnFault::Pass) => {
                self.leave_out(&fault);
                Ok(())
            }
            // A shadowed filter that refuses a prompt is still shown the answer: both are worth recording.
            (Err(_), Mode::Shadow, _) => Ok(()),
            (Err(stop), Mode::Enforce, _) => Err(stop),
        }
    }

    fn leave_out(&mut self, fault: &Fault) {
        tracing::warn!(filter = self.name, code = %fault.code, cause = fault.chain(), "filter left out of a turn");
        self.open = true;
        self.clear_all();
    }

    /// Everything seen may go, but for what a stop has cut.
    fn clear_all(&mut self) {
        for track in self.lanes.iter_mut().filter(|track| track.stop.is_none()) {
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
        for event in batch.events().get(clean..).unwrap_or_default() {
            let mut start = At::default();
            if let What::Text { lane, text } = event.what {
                let words = batch.text(text);
                start = match judged.take() {
                    Some(start) => start,
                    None => self.judge(lane, words).0,
                };
                self.held_bytes += words.len() as u64;
            }
            self.held.push_from(batch, *event);
            self.since.push((start, now));
            // What comes after a cut is neither judged nor kept.
            if self.stop.is_some() || self.lanes.iter().any(|track| track.stop.is_some()) {
                break;
            }
        }
        batch.truncate(clean);
        self.release(batch, now);
        self.keep_bounds(batch, now);
    }

    /// Nothing more will come: everything held gets its last verdict and leaves, but for what is cut.
    pub(crate) fn last(&mut self, batch: &mut Batch) {
        if self.stop.is_some() || self.textless {
            return;
        }
        for index in 0..self.lanes.len() {
            self.last_word(index);
        }
        let now = Instant::now();
        self.release(batch, now);
        if !self.is_empty() {
            // A filter that still thinks has had all the time there is.
            self.be_late();
            self.release(batch, now);
        }
    }

    /// Asks the filter for its last verdict on a lane.
    fn last_word(&mut self, index: usize) {
        let Some(track) = self.lanes.get_mut(index) else { return };
        if std::mem::replace(&mut track.over, true) || self.open || track.stop.is_some() {
            return;
        }
        let verdict = self.filter.last(track.lane);
        match self.terms.mode {
            Mode::Enforce => self.apply(index, verdict),
            Mode::Shadow => drop(verdict),
        }
    }

    /// Lets the filter say what it has found.
    pub(crate) fn end(&mut self, record: &mut Record) {
        let (found, outcome) = (record.found, record.outcome);
        self.filter.end(record);
        if self.terms.mode == Mode::Shadow && (record.found > found || record.outcome > outcome) {
            // It would have masked or blocked, and did not.
            record.outcome = outcome.max(Outcome::Flagged);
        }
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
            match self.terms.mode {
                Mode::Enforce => {
                    if let Some(index) = self.track(lane) {
                        self.apply(index, verdict);
                    }
                    if self.is_empty() {
                        // Nothing waits that the stop would be met behind.
                        self.stop = self.lanes.iter_mut().find_map(|track| track.stop.take());
                    }
                }
                Mode::Shadow => self.open = verdict.stop.is_some(),
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

    /// Shows a batch to a shadowed filter, which changes nothing.
    fn watch(&mut self, batch: &Batch) {
        for event in batch.events() {
            if let What::Text { lane, text } = event.what
                && !self.open
                && !text.is_empty()
                && let Some(track) = self.track(lane).and_then(|index| self.lanes.get_mut(index))
            {
                let (at, words) = (track.seen, batch.text(text));
                track.seen.0 += words.len() as u64;
                let verdict = self.filter.text(Text { lane, at, text: words });
                self.open = verdict.stop.is_some();
            }
        }
    }

    /// The place of a lane's track; `None` beyond the most that are kept.
    fn track(&mut self, lane: Lane) -> Option<usize> {
        let place = self.lanes.iter().position(|track| track.lane == lane);
        if place.is_none() && self.lanes.len() < MAX_LANES {
            self.lanes.push(Track { lane, seen: At(0), cleared: At(0), edits: VecDeque::new(), stop: None, over: false });
            return Some(self.lanes.len() - 1);
        }
        place
    }

    /// Shows a piece to the filter; gives where it begins and whether all of it may go as it is.
    fn judge(&mut self, lane: Lane, words: &str) -> (At, bool) {
        let Some(index) = self.track(lane) else {
            let fault = Fault::upstream(Code::UpstreamProtocolError).saying("the answer has too many channels of text");
            self.stop = Some(Stop::Failed(fault));
            return (At(0), false);
        };
        let track = &mut self.lanes[index];
        let at = track.seen;
        track.seen.0 += words.len() as u64;
        if self.open {
            track.cleared = track.seen;
            return (at, true);
        }
        if words.is_empty() {
            return (at, track.cleared == track.seen);
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
        for Edit { range, with } in verdict.edits {
            let floor = track.edits.back().map_or(track.cleared, |(last, _)| last.range.end.max(track.cleared));
            // What has gone because it was late is beyond masking; what is left of the range is not.
            let range = if late { range.start.max(floor)..range.end } else { range };
            if floor <= range.start && range.start < range.end && range.end <= to {
                track.edits.push_back((Edit { range, with }, false));
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
                let waiting = self.lanes.iter().filter(|track| track.stop.is_none()).map(|track| track.seen.0 - track.cleared.0);
                self.holds.unjudged_bytes += waiting.sum::<u64>();
                self.clear_all();
            }
            Late::Refuse => {
                let fault = Fault::us(Code::ModerationUnavailable).saying("text could not be cleared in time");
                self.stop = Some(Stop::Failed(fault));
            }
        }
    }

    /// Sees to it that no more waits than may: first by keeping it smaller, then by being late.
    fn keep_bounds(&mut self, out: &mut Batch, now: Instant) {
        let weight = |held: &Batch| held.bytes() as u64 + EVENT_COST * held.events().len() as u64;
        let most = self.terms.max_held().saturating_mul(2).saturating_add(FRAMES_ROOM);
        if weight(&self.held) > most {
            self.compact();
        }
        if !self.has_room() || weight(&self.held) > most {
            self.be_late();
            self.release(out, now);
        }
    }

    /// Keeps what waits in less room: neighbouring pieces of a lane become one, and their payloads, which a client would be
    /// sent as they came, are written anew. So text in tiny pieces waits no dearer than text in large ones.
    fn compact(&mut self) {
        self.spare.clear();
        let mut since = Vec::new();
        for (event, waits) in self.held.events().iter().zip(&self.since).skip(self.gone) {
            let before = self.spare.events().len();
            match event.what {
                What::Text { lane, text } => self.spare.append_text(lane, self.held.text(text)),
                What::Tool { .. } | What::Finish { .. } | What::Usage(_) | What::Note => self.spare.push_from(&self.held, *event),
            }
            if self.spare.events().len() > before {
                since.push(*waits);
            }
        }
        std::mem::swap(&mut self.held, &mut self.spare);
        self.spare = Batch::new();
        self.since = since;
        self.gone = 0;
    }

    /// Moves what may go from the head of the queue to `out`, and settles whether the turn ends here.
    fn release(&mut self, out: &mut Batch, now: Instant) {
        while let Some(blocked) = self.release_cleared(out, now)
            && self.stop.is_none()
            && self.lanes.iter().any(|track| track.stop.is_some())
        {
            // The turn ends in the text that waits here. The lane that blocks the queue stands before that end: it is cut
            // there itself, or nothing more of it will be seen and the filter has to make up its mind.
            let Some(track) = self.lanes.get_mut(blocked) else { break };
            if let Some(stop) = track.stop.take() {
                self.stop = Some(stop);
            } else if !track.over {
                self.last_word(blocked);
            } else {
                self.be_late();
            }
        }
        if self.stop.is_none() {
            self.stop = self.lanes.iter_mut().find_map(|track| track.stop.take());
        }
        if self.stop.is_some() || self.is_empty() {
            self.held.clear();
            self.since.clear();
            self.gone = 0;
            self.held_bytes = 0;
            self.sleep = None;
        } else if self.gone >= SWEEP_EVENTS {
            self.spare.clear();
            for event in self.held.events().get(self.gone..).unwrap_or_default() {
                self.spare.push_from(&self.held, *event);
            }
            std::mem::swap(&mut self.held, &mut self.spare);
            self.since.drain(..self.gone);
            self.gone = 0;
        }
    }

    /// Moves what is cleared from the head of the queue to `out`; gives the lane whose text blocks the rest, if any does.
    fn release_cleared(&mut self, out: &mut Batch, now: Instant) -> Option<usize> {
        while let (Some(Event { what, raw }), Some(&(start, since))) =
            (self.held.events().get(self.gone).copied(), self.since.get(self.gone))
        {
            let What::Text { lane, text } = what else {
                out.push_from(&self.held, Event { what, raw });
                self.gone += 1;
                continue;
            };
            let index = self.track(lane)?;
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
                if let Some((start, _)) = self.since.get_mut(self.gone) {
                    start.0 += fit as u64;
                }
                self.held_bytes -= fit as u64;
            }
            return Some(index);
        }
        None
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
