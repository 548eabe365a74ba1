//! Holds back what its filter has not cleared: the only place in Headgate where text waits.
//!
//! A filter judges; its gate holds, edits, cuts, keeps order, counts bytes and watches the clock, the same way for every
//! filter. Laws that live here, each a property test in `tests/laws.rs`: nothing leaves beyond what is cleared; what is
//! cleared leaves at once and never goes back; a lane leaves in the order it came; a shadowed gate changes nothing but the
//! record; what waits has a bound, whatever the upstream sends.
//!
//! Across lanes events leave in the order they came too, but for one case: text that is held is overtaken by other lanes.
//! Else the last word of a model's reasoning, which might still become an address, would hold back the whole answer.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use headgate_contracts::{Batch, Channel, Code, Dialect, Event, Fault, Head, Lane, Outcome, Prompt, Question, Record, Stop, What};
use smallvec::SmallVec;
use tokio::time::{Instant, Sleep};

use crate::{
    At, Edit, Filter, Text, Verdict,
    terms::{Late, Mode, OnFault, Terms},
};

/// A filter that judges text, and what it has not cleared.
///
/// Gates of a chain lie side by side, with the one lane that nearly every answer has in them: among a thousand streams each event finds
/// its own in no cache (`docs/decisions/0260-what-an-event-touches.md`).
pub struct Gate {
    post: Post,
    lanes: SmallVec<[Track; 1]>,
    /// Most gates of a chain never hold anything.
    desk: Option<Box<Desk>>,
    stop: Option<Box<Stop>>,
    /// Most gates never hold anything for any time.
    clock: Option<Box<Clock>>,
    max_held: u64,
    max_hold: Option<Duration>,
    on_late: Late,
    /// Text went unjudged because it was late, so the filter's later edits may come too late.
    late: bool,
    /// Questions seen.
    questions: u16,
}

/// A filter's place in a chain: all that there is of one which judges no text.
pub(crate) struct Post {
    pub(crate) name: &'static str,
    filter: Box<dyn Filter>,
    mode: Mode,
    on_fault: OnFault,
    /// Judges no more: its filter broke and the terms say pass, or a shadowed filter has said stop.
    open: bool,
    /// How many filters of the chain stand before it.
    pub(crate) place: u16,
}

/// The clock of a gate that holds text, or has.
#[derive(Default)]
struct Clock {
    alarm: Option<Pin<Box<Sleep>>>,
    holds: Holds,
}

/// The most desks that a thread keeps for gates to come, and the largest buffers on one.
const MAX_DESKS: usize = 4;
const MAX_DESK_BYTES: usize = 16 << 10;
/// The largest room for what may go that a thread keeps.
const MAX_OUT_BYTES: usize = 64 << 10;

thread_local! {
    #[expect(clippy::vec_box, reason = "a gate takes the box, too")]
    static DESKS: RefCell<Vec<Box<Desk>>> = const { RefCell::new(Vec::new()) };
    /// What may go, while a batch is passed: of one gate at a time.
    static OUT: Cell<Option<Box<Batch>>> = const { Cell::new(None) };
}

/// What waits in a gate, and room to work with it.
#[derive(Default)]
struct Desk {
    /// What waits, in order, and what of it has gone meanwhile: that is swept out now and then.
    held: Batch,
    waits: Vec<Wait>,
    /// How many of these have gone.
    gone: usize,
    /// Bytes of text that wait.
    bytes: u64,
}

fn lend_out(dialect: Dialect) -> Box<Batch> {
    let mut out = OUT.try_with(Cell::take).ok().flatten().unwrap_or_default();
    out.dialect = dialect;
    out
}

/// Puts what may go behind what is in the batch.
fn hand_over(mut out: Box<Batch>, batch: &mut Batch) {
    if batch.is_empty() {
        std::mem::swap(batch, &mut *out);
    } else {
        for event in out.events() {
            batch.push_from(&out, *event);
        }
    }
    if out.room() <= MAX_OUT_BYTES {
        out.clear();
        let _ = OUT.try_with(|place| place.set(Some(out)));
    }
}

/// One held event.
#[derive(Clone, Copy)]
struct Wait {
    /// Where in its lane its text begins.
    start: At,
    since: Instant,
    gone: bool,
    /// Which question it is, where it is one.
    question: u16,
}

/// The lane of a question's prompt: each has its own, which begins and ends with it.
fn asked(question: u16) -> Lane {
    Lane { choice: 0, channel: Channel::Question(question) }
}

/// How far one lane has come.
struct Track {
    lane: Lane,
    seen: At,
    cleared: At,
    /// Most lanes are clean.
    said: Option<Box<Said>>,
    /// A stop was given: what lies behind it never goes.
    cut: bool,
    /// The filter has said its last word on this lane.
    over: bool,
}

/// What a filter has said of a lane, besides how far it may go.
#[derive(Default)]
struct Said {
    /// What is replaced, and whether the replacement has been shown.
    edits: VecDeque<(Edit, bool)>,
    stop: Option<Box<Stop>>,
}

impl Track {
    /// Where the first edit begins that is not all shown; beyond any text where there is none.
    fn first_edit(&self) -> At {
        self.said.as_ref().and_then(|said| said.edits.front()).map_or(At::END, |(edit, _)| edit.range.start)
    }

    fn said(&mut self) -> &mut Said {
        self.said.get_or_insert_default()
    }

    fn cut(&mut self, stop: Box<Stop>) {
        self.said().stop = Some(stop);
        self.cut = true;
    }

    fn take_stop(&mut self) -> Option<Box<Stop>> {
        self.said.as_mut().and_then(|said| said.stop.take())
    }
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
    const NONE: Holds = Holds { buckets: [0; 11], total: Duration::ZERO, max: Duration::ZERO, unjudged_bytes: 0 };

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
const SWEEP_EVENTS: usize = 4;

/// The most lanes of one answer that are kept apart. Honest answers have a handful; indices are the upstream's to choose, and
/// each lane costs a filter's state.
///
/// No more than 64, so that a set of them is one number.
const MAX_LANES: usize = 64;

/// What an event costs beside its text and payload, in bytes, roughly.
const EVENT_COST: u64 = 80;

/// Room for what waits beside held text, in bytes: the payloads it came in, and events without text.
const FRAMES_ROOM: u64 = 64 << 10;

/// The most a gate's buffers take, in bytes, beside one event of the largest size the upstream may send: what waits, in buffers
/// that double as they grow. What goes is passed on, and what is needed meanwhile is the thread's, not the turn's.
pub(crate) fn ceiling_bytes(terms: &Terms) -> u64 {
    2 * most_weight(terms.max_held())
}

fn most_weight(max_held: u64) -> u64 {
    max_held.saturating_add(FRAMES_ROOM)
}

impl Desk {
    fn fresh() -> Box<Desk> {
        DESKS.try_with(|desks| desks.borrow_mut().pop()).ok().flatten().unwrap_or_default()
    }

    fn is_empty(&self) -> bool {
        self.gone == self.waits.len()
    }

    /// While nothing waits there is no desk: it is the next gate's. While little waits it takes little room.
    fn kept(mut self: Box<Desk>) -> Option<Box<Desk>> {
        if !self.is_empty() {
            self.held.shrink();
            return Some(self);
        }
        if self.held.room() <= MAX_DESK_BYTES && self.waits.capacity() <= MAX_DESK_BYTES / size_of::<Wait>() {
            let _ = DESKS.try_with(|desks| {
                let mut desks = desks.borrow_mut();
                if desks.len() < MAX_DESKS {
                    desks.push(self);
                }
            });
        }
        None
    }
}

impl Post {
    pub(crate) fn new(name: &'static str, filter: Box<dyn Filter>, terms: &Terms, place: u16) -> Post {
        Post { name, filter, mode: terms.mode, on_fault: terms.on_fault, open: false, place }
    }

    /// Shows the prompt to the filter; a copy of it where it must not change anything.
    pub(crate) async fn prompt(&mut self, prompt: &mut Prompt) -> Result<(), Stop> {
        match self.mode {
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
        let said = match self.mode {
            Mode::Enforce => self.filter.head(head),
            Mode::Shadow => self.filter.head(&mut head.clone()),
        };
        self.accept(said)
    }

    fn accept(&mut self, said: Result<(), Stop>) -> Result<(), Stop> {
        match (said, self.mode, self.on_fault) {
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
    }

    /// Lets the filter say what it has found.
    pub(crate) fn end(&mut self, record: &mut Record) {
        let (found, outcome) = (record.found, record.outcome);
        self.filter.end(record);
        if self.mode == Mode::Shadow && (record.found > found || record.outcome > outcome) {
            // It would have masked or blocked, and did not.
            record.outcome = outcome.max(Outcome::Flagged);
        }
    }
}

impl Gate {
    /// A gate for `filter`, known as `name` in logs and metrics.
    pub fn new(name: &'static str, filter: Box<dyn Filter>, terms: Terms) -> Gate {
        Gate::at(Post::new(name, filter, &terms, 0), &terms)
    }

    pub(crate) fn at(post: Post, terms: &Terms) -> Gate {
        Gate {
            post,
            lanes: SmallVec::new(),
            desk: None,
            stop: None,
            clock: None,
            max_held: terms.max_held(),
            max_hold: terms.max_hold(),
            on_late: terms.late,
            late: false,
            questions: 0,
        }
    }

    pub(crate) fn post(&mut self) -> &mut Post {
        &mut self.post
    }

    /// The filter's name.
    pub fn name(&self) -> &'static str {
        self.post.name
    }

    /// Why the turn ends at this gate, if it does.
    pub fn stop(&self) -> Option<&Stop> {
        self.stop.as_deref()
    }

    /// Bytes of text that wait here.
    pub fn held_bytes(&self) -> u64 {
        self.desk.as_ref().map_or(0, |desk| desk.bytes)
    }

    /// Whether more may come in: no more text waits than the terms allow.
    pub fn has_room(&self) -> bool {
        self.held_bytes() <= self.max_held
    }

    /// How long text has waited here.
    pub fn holds(&self) -> &Holds {
        self.clock.as_ref().map_or(&Holds::NONE, |clock| &clock.holds)
    }

    /// Everything seen may go, but for what a stop has cut.
    fn clear_all(&mut self) {
        for track in self.lanes.iter_mut().filter(|track| !track.cut) {
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
        if self.post.mode == Mode::Shadow {
            self.watch(batch);
            return;
        }
        if self.post.open && self.is_empty() {
            return;
        }
        let nothing_held = self.is_empty();
        let mut clean = 0;
        let mut judged = None;
        while nothing_held && let Some(event) = batch.events().get(clean) {
            match event.what {
                What::Text { lane, .. } => {
                    // All that one lane says without a word between is judged at once.
                    let (words, count) = batch.run(clean);
                    let (start, is_clean) = self.judge(lane, words);
                    if !is_clean {
                        let (untouched, start) = self.untouched(lane, start, batch, clean..clean + count);
                        judged = Some((start, count - untouched));
                        clean += untouched;
                        break;
                    }
                    clean += count;
                }
                What::Finish { .. } if !self.lanes.is_empty() => break,
                What::Confirm { .. } => break,
                What::Finish { .. } | What::Tool { .. } | What::Usage(_) | What::Note => clean += 1,
            }
        }
        if nothing_held && clean == batch.events().len() {
            return;
        }
        let now = Instant::now();
        let mut desk = self.desk.take().unwrap_or_else(Desk::fresh);
        let mut out = lend_out(batch.dialect);
        if !nothing_held {
            // A verdict that was waited for may have come meanwhile.
            self.release(&mut desk, &mut out, now);
        }
        // Each run of text goes its whole way before what comes next is judged: so what comes out first does not depend on the batches.
        // What comes after a cut is neither judged nor kept.
        let mut next = clean;
        while self.stop.is_none()
            && let Some(&event) = batch.events().get(next)
        {
            let (mut start, mut question, mut count) = (At::default(), 0, 1);
            match event.what {
                What::Text { lane, .. } => {
                    (start, count) = judged.take().unwrap_or_else(|| {
                        let (words, count) = batch.run(next);
                        (self.judge(lane, words).0, count)
                    });
                }
                What::Confirm { prompt, .. } => {
                    let words = batch.text(prompt);
                    question = self.next_question();
                    start = self.judge(asked(question), words).0;
                    desk.bytes += words.len() as u64;
                    // A prompt comes whole.
                    if let Some(index) = self.track(asked(question)) {
                        self.last_word(index);
                    }
                }
                What::Finish { choice, .. } => self.finish(choice),
                What::Tool { .. } | What::Usage(_) | What::Note => {}
            }
            for event in batch.events().iter().skip(next).take(count) {
                desk.held.push_from(batch, *event);
                desk.waits.push(Wait { start, since: now, gone: false, question });
                if let What::Text { text, .. } = event.what {
                    desk.bytes += text.len() as u64;
                    start.0 += text.len() as u64;
                }
            }
            next += count;
            self.release(&mut desk, &mut out, now);
            self.keep_bounds(&mut desk, &mut out, now);
        }
        batch.truncate(clean);
        hand_over(out, batch);
        self.desk = desk.kept();
    }

    /// How many of the events of a run, which begins at `start` in its lane, may go as they came though not all of it may; and where the
    /// next one begins.
    fn untouched(&self, lane: Lane, mut start: At, batch: &Batch, run: std::ops::Range<usize>) -> (usize, At) {
        let Some(track) = self.lanes.iter().find(|track| track.lane == lane) else { return (0, start) };
        let edited = track.first_edit();
        let mut count = 0;
        for event in batch.events().get(run).unwrap_or_default() {
            let What::Text { text, .. } = event.what else { break };
            let end = At(start.0 + text.len() as u64);
            if end > track.cleared.min(edited) {
                break;
            }
            (start, count) = (end, count + 1);
        }
        (count, start)
    }

    /// Nothing more will come: every lane gets its last verdict, and what is clean leaves. What the filter still thinks about stays.
    ///
    /// Asked again it gives what has become clean since.
    pub(crate) fn last(&mut self, batch: &mut Batch) {
        if self.stop.is_some() {
            return;
        }
        for index in 0..self.lanes.len() {
            self.last_word(index);
        }
        self.let_go(batch);
    }

    /// And there is no more time: what still waits is late.
    pub(crate) fn close(&mut self, batch: &mut Batch) {
        if self.stop.is_none() && !self.is_empty() {
            self.be_late();
            self.let_go(batch);
        }
    }

    /// Puts what may go behind what is in the batch.
    fn let_go(&mut self, batch: &mut Batch) {
        let mut desk = self.desk.take().unwrap_or_else(Desk::fresh);
        let mut out = lend_out(batch.dialect);
        self.release(&mut desk, &mut out, Instant::now());
        hand_over(out, batch);
        self.desk = desk.kept();
    }

    fn next_question(&mut self) -> u16 {
        self.questions = self.questions.saturating_add(1);
        self.questions
    }

    /// A choice has no more text: what is held of it is settled now.
    fn finish(&mut self, choice: u16) {
        for index in 0..self.lanes.len() {
            if self.lanes[index].lane.choice == choice {
                self.last_word(index);
            }
        }
    }

    /// Asks the filter for its last verdict on a lane.
    fn last_word(&mut self, index: usize) {
        let Some(track) = self.lanes.get_mut(index) else { return };
        if std::mem::replace(&mut track.over, true) || self.post.open || track.cut {
            return;
        }
        let verdict = self.post.filter.last(track.lane);
        match self.post.mode {
            Mode::Enforce => self.apply(index, verdict),
            Mode::Shadow => drop(verdict),
        }
    }

    /// Says how long text has waited.
    pub(crate) fn end(&self, record: &mut Record) {
        if self.holds().max > record.held_max {
            record.held_max = self.holds().max;
            record.held_by = Some(self.name());
        }
    }

    /// Ready when something changed without new text: a verdict that was waited for, or a hold that ran out.
    pub(crate) fn poll_ripe(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.post.open || self.stop.is_some() {
            return Poll::Pending;
        }
        if let Poll::Ready((lane, verdict)) = self.post.filter.poll(cx) {
            match self.post.mode {
                Mode::Enforce => {
                    if let Some(index) = self.track(lane) {
                        self.apply(index, verdict);
                    }
                    if self.is_empty() {
                        // Nothing waits that the stop would be met behind.
                        self.stop = self.lanes.iter_mut().find_map(Track::take_stop);
                    }
                }
                Mode::Shadow => self.post.open = verdict.stop.is_some(),
            }
            return Poll::Ready(());
        }
        let oldest = self.desk.iter().flat_map(|desk| &desk.waits).filter(|wait| !wait.gone).map(|wait| wait.since).min();
        let (Some(max_hold), Some(oldest)) = (self.max_hold, oldest) else {
            return Poll::Pending;
        };
        let deadline = oldest + max_hold;
        let clock = self.clock.get_or_insert_default();
        let alarm = clock.alarm.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(deadline)));
        if alarm.deadline() != deadline {
            alarm.as_mut().reset(deadline);
        }
        ready!(alarm.as_mut().poll(cx));
        self.be_late();
        Poll::Ready(())
    }

    /// Whether nothing waits here.
    pub(crate) fn is_empty(&self) -> bool {
        self.desk.as_ref().is_none_or(|desk| desk.is_empty())
    }

    /// Shows a batch to a shadowed filter, which changes nothing.
    fn watch(&mut self, batch: &Batch) {
        for event in batch.events() {
            let (lane, text) = match event.what {
                What::Text { lane, text } => (lane, text),
                What::Confirm { prompt, .. } => (asked(self.next_question()), prompt),
                What::Finish { .. } | What::Tool { .. } | What::Usage(_) | What::Note => continue,
            };
            if !self.post.open
                && !text.is_empty()
                && let Some(track) = self.track(lane).and_then(|index| self.lanes.get_mut(index))
            {
                let (at, words) = (track.seen, batch.text(text));
                track.seen.0 += words.len() as u64;
                let verdict = self.post.filter.text(Text { lane, at, text: words });
                self.post.open = verdict.stop.is_some();
            }
        }
    }

    /// The place of a lane's track; `None` beyond the most that are kept.
    fn track(&mut self, lane: Lane) -> Option<usize> {
        let place = self.lanes.iter().position(|track| track.lane == lane);
        if place.is_none() && self.lanes.len() < MAX_LANES {
            self.lanes.push(Track { lane, seen: At(0), cleared: At(0), said: None, cut: false, over: false });
            return Some(self.lanes.len() - 1);
        }
        place
    }

    /// Shows a piece to the filter; gives where it begins and whether all of it may go as it is.
    fn judge(&mut self, lane: Lane, words: &str) -> (At, bool) {
        let Some(index) = self.track(lane) else {
            let fault = Fault::upstream(Code::UpstreamProtocolError).saying("the answer has too many channels of text");
            self.stop = Some(Stop::Failed(fault).into());
            return (At(0), false);
        };
        let track = &mut self.lanes[index];
        let at = track.seen;
        track.seen.0 += words.len() as u64;
        if self.post.open {
            track.cleared = track.seen;
            return (at, true);
        }
        if words.is_empty() {
            return (at, track.cleared == track.seen);
        }
        if track.over {
            // The filter has settled this lane for good; what it would say now is worth nothing.
            let fault = Fault::upstream(Code::UpstreamProtocolError).saying("the answer goes on after its finish");
            self.stop = Some(Stop::Failed(fault).into());
            return (at, false);
        }
        let verdict = self.post.filter.text(Text { lane, at, text: words });
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
            let last = track.said.as_ref().and_then(|said| said.edits.back());
            let floor = last.map_or(track.cleared, |(last, _)| last.range.end.max(track.cleared));
            // What has gone because it was late is beyond masking; what is left of the range is not.
            let range = if late { range.start.max(floor)..range.end } else { range };
            if floor <= range.start && range.start < range.end && range.end <= to {
                track.said().edits.push_back((Edit { range, with }, false));
            } else if !late {
                // An edit of text that has gone is a fault of the filter: never let it pass for a mask.
                let fault = Fault::us(Code::InternalError).caused_by(format!("filter {} edits outside what it clears", self.post.name));
                track.cut(Stop::Failed(fault).into());
                return;
            }
        }
        track.cleared = track.cleared.max(to);
        let Some(stop) = verdict.stop else { return };
        match &*stop {
            Stop::Failed(fault) if self.post.on_fault == OnFault::Pass => {
                self.post.leave_out(fault);
                self.clear_all();
            }
            _ => track.cut(stop),
        }
    }

    /// What waited too long, or became too much, goes unjudged or ends the turn, as the terms say.
    fn be_late(&mut self) {
        match self.on_late {
            Late::Release => {
                self.late = true;
                let waiting = self.lanes.iter().filter(|track| !track.cut).map(|track| track.seen.0 - track.cleared.0);
                let unjudged: u64 = waiting.sum();
                self.clock.get_or_insert_default().holds.unjudged_bytes += unjudged;
                self.clear_all();
            }
            Late::Refuse => {
                let fault = Fault::us(Code::ModerationUnavailable).saying("text could not be cleared in time");
                self.stop = Some(Stop::Failed(fault).into());
            }
        }
    }

    /// Sees to it that no more waits than may: first by keeping it smaller, then by being late.
    fn keep_bounds(&mut self, desk: &mut Desk, out: &mut Batch, now: Instant) {
        let weight = |held: &Batch| held.bytes() as u64 + EVENT_COST * held.events().len() as u64;
        let most = most_weight(self.max_held);
        if weight(&desk.held) > most {
            self.compact(desk);
        }
        if desk.bytes > self.max_held || weight(&desk.held) > most {
            self.be_late();
            self.release(desk, out, now);
        }
    }

    /// Keeps what waits in less room: all text of a lane becomes one piece, and its payloads, which a client would be sent as
    /// they came, are written anew. So text in tiny pieces waits no dearer than text in large ones.
    fn compact(&self, desk: &mut Desk) {
        let mut compact = Batch::lent();
        let mut waits = Vec::new();
        let waiting = || desk.held.events().iter().zip(&desk.waits).filter(|(_, wait)| !wait.gone);
        for track in &self.lanes {
            for (event, wait) in waiting() {
                let What::Text { lane, text } = event.what else { continue };
                if lane == track.lane && !text.is_empty() {
                    let before = compact.events().len();
                    compact.append_text(lane, desk.held.text(text));
                    if compact.events().len() > before {
                        waits.push(*wait);
                    }
                }
            }
        }
        for (event, wait) in waiting() {
            if !matches!(event.what, What::Text { .. }) {
                compact.push_from(&desk.held, *event);
                waits.push(*wait);
            }
        }
        std::mem::swap(&mut desk.held, &mut compact);
        compact.give_back();
        desk.waits = waits;
        desk.gone = 0;
    }

    /// Moves what may go to `out`, and settles whether the turn ends here.
    fn release(&mut self, desk: &mut Desk, out: &mut Batch, now: Instant) {
        self.release_cleared(desk, out, now);
        if self.stop.is_none()
            && let Some(stop) = self.lanes.iter_mut().find_map(Track::take_stop)
        {
            self.stop = Some(stop);
            // Nothing more will be seen of the other lanes: what they hold is settled, each up to a cut of its own.
            for index in 0..self.lanes.len() {
                self.last_word(index);
            }
            self.release_cleared(desk, out, now);
        }
        if self.stop.is_some() || desk.is_empty() {
            desk.held.clear();
            desk.waits.clear();
            desk.gone = 0;
            desk.bytes = 0;
        } else if desk.gone >= SWEEP_EVENTS {
            let mut swept = Batch::lent();
            for (event, _) in desk.held.events().iter().zip(&desk.waits).filter(|(_, wait)| !wait.gone) {
                swept.push_from(&desk.held, *event);
            }
            std::mem::swap(&mut desk.held, &mut swept);
            swept.give_back();
            desk.waits.retain(|wait| !wait.gone);
            desk.gone = 0;
        }
    }

    /// Moves to `out` what is cleared, and what has no text and nothing to wait for.
    fn release_cleared(&mut self, desk: &mut Desk, out: &mut Batch, now: Instant) {
        // Lanes, by the place of their tracks, of which something stays.
        let mut blocked = 0_u64;
        let mut frame_stays = false;
        for index in 0..desk.waits.len() {
            let (Some(Event { what, raw }), Some(&Wait { start, since, gone, question })) =
                (desk.held.events().get(index).copied(), desk.waits.get(index))
            else {
                continue;
            };
            if gone {
                continue;
            }
            let goes = match what {
                What::Text { lane, text } => {
                    let Some(place) = self.track(lane) else { continue };
                    if blocked >> place & 1 == 1 {
                        continue;
                    }
                    let track = &mut self.lanes[place];
                    let words = desk.held.text(text);
                    let end = At(start.0 + words.len() as u64);
                    if end <= track.cleared {
                        let touched = track.first_edit() < end;
                        if raw.is_some() && !touched {
                            out.push_from(&desk.held, Event { what, raw });
                        } else {
                            emit(track, start, words, out);
                        }
                        desk.bytes -= words.len() as u64;
                        true
                    } else {
                        let mut fit = track.cleared.0.saturating_sub(start.0) as usize;
                        // A cut inside a character is rounded down.
                        while !words.is_char_boundary(fit) {
                            fit -= 1;
                        }
                        if fit > 0 {
                            emit(track, start, &words[..fit], out);
                            let rest = desk.held.sub(text, fit..words.len());
                            desk.held.restate(index, What::Text { lane, text: rest });
                            desk.waits[index].start = At(start.0 + fit as u64);
                            desk.bytes -= fit as u64;
                        }
                        blocked |= 1 << place;
                        false
                    }
                }
                // Asked whole or not at all: nobody can agree to half a question.
                What::Confirm { prompt, .. } => {
                    let Some(place) = self.track(asked(question)) else { continue };
                    let track = &mut self.lanes[place];
                    let goes = track.seen <= track.cleared;
                    if goes {
                        ask(track, &desk.held, Event { what, raw }, out);
                        desk.bytes -= prompt.len() as u64;
                    } else {
                        blocked |= 1 << place;
                    }
                    goes
                }
                // A choice is not finished while text of it waits; what speaks of the whole answer comes after that.
                What::Finish { choice, .. } => {
                    let waits =
                        self.lanes.iter().enumerate().any(|(place, track)| blocked >> place & 1 == 1 && track.lane.choice == choice);
                    !frame_stays && !waits
                }
                What::Usage(_) | What::Note => !frame_stays,
                What::Tool { .. } => true,
            };
            if goes {
                if !matches!(what, What::Text { .. } | What::Confirm { .. }) {
                    out.push_from(&desk.held, Event { what, raw });
                }
                if let Some(wait) = desk.waits.get_mut(index) {
                    wait.gone = true;
                }
                desk.gone += 1;
                if since != now && matches!(what, What::Text { .. } | What::Confirm { .. }) {
                    self.clock.get_or_insert_default().holds.add(now - since);
                }
            } else if !matches!(what, What::Text { .. }) {
                frame_stays = true;
            }
        }
    }
}

/// Writes a cleared question, with its edits.
fn ask(track: &mut Track, held: &Batch, event: Event, out: &mut Batch) {
    let Some(question) = held.question(&event).filter(|_| track.first_edit() < At::END) else { return out.push_from(held, event) };
    let mut prompt = Batch::new();
    emit(track, At(0), question.prompt, &mut prompt);
    // Pieces that follow each other are put together as they are written.
    let words = match prompt.events() {
        [Event { what: What::Text { text, .. }, .. }] => prompt.text(*text),
        _ => "",
    };
    out.push_question(Question { prompt: words, ..question });
}

/// Writes a cleared piece of a lane with the edits that fall into it.
fn emit(track: &mut Track, start: At, words: &str, out: &mut Batch) {
    let end = At(start.0 + words.len() as u64);
    let mut at = start;
    let piece = |from: At, to: At| words.get((from.0 - start.0) as usize..(to.0 - start.0) as usize).unwrap_or_default();
    while let Some(edits) = track.said.as_mut().map(|said| &mut said.edits)
        && let Some((edit, shown)) = edits.front_mut()
    {
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
        edits.pop_front();
    }
    out.append_text(track.lane, piece(at, end));
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each stream has as many as its chain has filters.
    #[test]
    fn a_gate_takes_little_room() {
        assert!(size_of::<Gate>() <= 144, "{}", size_of::<Gate>());
        assert!(size_of::<Post>() <= 40, "{}", size_of::<Post>());
    }
}
