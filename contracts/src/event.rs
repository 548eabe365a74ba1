//! The answer of a turn as it moves through the chain: a head, then events in batches.

use std::cell::RefCell;

use http::HeaderMap;
use serde::{Deserialize, Serialize};

use crate::Finish;

/// What comes before the first event: everything a client may learn before it sees a byte of text.
#[derive(Debug, Clone, Default)]
pub struct Head {
    /// The upstream's id of this answer, e.g. `chatcmpl-…`; empty where it named none.
    pub id: String,
    /// The model that answers, as the upstream calls it.
    pub model: String,
    /// Unix seconds at which the upstream says the answer was begun; 0 where it did not say.
    pub created: u64,
    /// Headers for the client, put here by filters (policy version, constitution hash, ...).
    pub headers: HeaderMap,
}

/// Which channel of text, within one choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub enum Channel {
    /// What the user reads.
    #[default]
    Content,
    /// What the model thinks aloud.
    Reasoning,
    /// The model's own refusal.
    Refusal,
    /// The arguments of the tool call with this index.
    ToolArguments(u16),
    /// What a person is asked: the prompt of the question with this number, as gates count them. It comes whole, as a part of its
    /// own event, so no text event has this channel.
    Question(u16),
}

/// One channel of text inside an answer: choice x channel. Text of different lanes never forms one word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Lane {
    /// Which of the answers asked for (`n`), from 0.
    pub choice: u16,
    /// Which channel of it.
    pub channel: Channel,
}

impl Lane {
    /// The content of the first choice: where nearly all text is.
    pub const DEFAULT: Lane = Lane { choice: 0, channel: Channel::Content };
}

/// Tokens used, as the upstream counted them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, schemars::JsonSchema)]
pub struct Usage {
    /// Tokens read.
    pub input_tokens: u64,
    /// Tokens written.
    pub output_tokens: u64,
}

/// A range of bytes in one of a batch's two buffers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Span {
    start: u32,
    end: u32,
}

impl Span {
    /// How many bytes.
    pub fn len(self) -> usize {
        (self.end - self.start) as usize
    }
    /// Whether there are none.
    pub fn is_empty(self) -> bool {
        self.end == self.start
    }
    fn range(self) -> std::ops::Range<usize> {
        self.start as usize..self.end as usize
    }
}

/// What an event says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    /// A piece of one lane: [`Batch::text`] has the words.
    Text {
        /// Which lane.
        lane: Lane,
        /// The words, in the batch's text.
        text: Span,
    },
    /// A tool call begins; its arguments follow as text of lane [`Channel::ToolArguments`].
    Tool {
        /// Which choice.
        choice: u16,
        /// Which call of it.
        index: u16,
        /// The call's id, in the batch's text.
        id: Span,
        /// The function's name, in the batch's text: letters, digits, `_` and `-` only.
        name: Span,
    },
    /// A person is asked whether a tool may be called: [`Batch::question`] has the words.
    Confirm {
        /// The question's id, and right behind it the name of the tool, in the batch's text. Two spans and not three, so that an
        /// event stays as small as text needs it.
        named: Span,
        /// How long the id is, in bytes.
        id_bytes: u8,
        /// What the person reads, in the batch's text.
        prompt: Span,
    },
    /// A choice is finished.
    Finish {
        /// Which choice.
        choice: u16,
        /// Why.
        finish: Finish,
    },
    /// Tokens used so far.
    Usage(Usage),
    /// A known frame without text of interest (the first chunk with the role): only its raw form says anything.
    Note,
}

/// One event of an answer. Cheap to copy: the bytes are in the batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Event {
    /// What it says.
    pub what: What,
    /// The payload it came in, in the batch's wire bytes, as long as nobody has changed what it says. `None`: it must be
    /// written anew. A payload with members we do not know never keeps its raw form: text could hide there.
    pub raw: Option<Span>,
}

/// What a person is asked. Its words have no Debug form.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Question<'a> {
    /// Its name, for the answer to it: 1 to 64 of letters, digits, `_`, `-`, `.` and `:`.
    pub id: &'a str,
    /// The tool that would be called; empty where it is about none.
    pub tool: &'a str,
    /// What the person reads.
    pub prompt: &'a str,
}

/// Which vocabulary the raw payloads of a batch are written in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Dialect {
    /// Headgate's own chat stream: spoken by the orchestrator and by `/v1/chat/stream`.
    #[default]
    Headgate,
    /// OpenAI chat completion chunks.
    OpenAi,
}

/// All events decoded from one read, with the bytes they stand in. Made to be reused: after the first few turns of the
/// wheel no event costs an allocation.
#[derive(Clone, Default)]
pub struct Batch {
    /// Which vocabulary `raw` is in.
    pub dialect: Dialect,
    events: Vec<Event>,
    text: String,
    wire: Vec<u8>,
    frame: Option<TextFrame>,
}

/// Where the words stand in the payload of an event: one piece of text, spelled there as it is.
#[derive(Debug, Clone, Copy)]
struct TextFrame {
    /// Which event.
    index: u32,
    /// Bytes of its payload before the words, and after them.
    before: u32,
    after: u32,
}

/// The most batches whose room a thread keeps, and the largest: a turn uses three at a time at most.
const MAX_LENT: usize = 4;
const MAX_LENT_BYTES: usize = 64 << 10;
/// The most room that a batch may have which waits, however little there is in it.
const MAX_IDLE_BYTES: usize = 2 << 10;

thread_local! {
    static LENT: RefCell<Vec<Batch>> = const { RefCell::new(Vec::new()) };
}

// What is in it is message text, which has no Debug form.
impl std::fmt::Debug for Batch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Batch")
            .field("dialect", &self.dialect)
            .field("events", &self.events)
            .field("text", &format_args!("<{} bytes>", self.text.len()))
            .field("wire", &format_args!("<{} bytes>", self.wire.len()))
            .finish()
    }
}

/// A place in a batch to come back to.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Mark {
    events: usize,
    text: usize,
    wire: usize,
}

impl Batch {
    /// An empty batch.
    pub fn new() -> Batch {
        Batch::default()
    }

    /// An empty batch, with the room of one that this thread has no more use for, where there is one.
    ///
    /// Batches come and go within one step of a turn; an answer that waits for its next event keeps none of their room.
    pub fn lent() -> Batch {
        LENT.try_with(|lent| lent.borrow_mut().pop()).ok().flatten().unwrap_or_default()
    }

    /// Where it has no room, it takes what [`Batch::lent`] gives.
    pub fn make_room(&mut self) {
        if self.events.capacity() == 0 && self.bytes() == 0 {
            *self = Batch { dialect: self.dialect, ..Batch::lent() };
        }
    }

    /// Forgets everything, and leaves the room to the thread's next batch.
    pub fn give_back(&mut self) {
        if self.events.capacity() == 0 && self.bytes() == 0 {
            return;
        }
        let mut batch = std::mem::take(self);
        if (1..=MAX_LENT_BYTES).contains(&batch.room()) {
            batch.clear();
            let _ = LENT.try_with(|lent| {
                let mut lent = lent.borrow_mut();
                if lent.len() < MAX_LENT {
                    lent.push(batch);
                }
            });
        }
    }

    /// Bytes that there is room for, events counted by their size.
    pub fn room(&self) -> usize {
        self.events.capacity() * size_of::<Event>() + self.text.capacity() + self.wire.capacity()
    }

    /// Takes no more room than it needs, where that is much less than it has: for what will wait.
    pub fn shrink(&mut self) {
        let used = self.events.len() * size_of::<Event>() + self.bytes();
        if self.room() > MAX_IDLE_BYTES.max(4 * used) {
            self.events.shrink_to_fit();
            self.text.shrink_to_fit();
            self.wire.shrink_to_fit();
        }
    }

    /// Forgets everything but the capacity.
    pub fn clear(&mut self) {
        self.events.clear();
        self.text.clear();
        self.wire.clear();
        self.frame = None;
    }

    /// The events, in the order they came.
    pub fn events(&self) -> &[Event] {
        &self.events
    }

    /// Whether there are no events.
    pub fn is_empty(&self) -> bool {
        self.events.is_empty()
    }

    /// Bytes in use, of text and payloads.
    pub fn bytes(&self) -> usize {
        self.text.len() + self.wire.len()
    }

    /// The words of a span.
    pub fn text(&self, span: Span) -> &str {
        self.text.get(span.range()).unwrap_or_default()
    }

    /// The words of the text events from `index` on that are of one lane and stand one behind the other, and how many these are.
    pub fn run(&self, index: usize) -> (&str, usize) {
        let Some(Event { what: What::Text { lane, text }, .. }) = self.events.get(index) else { return ("", 0) };
        let (mut end, mut count) = (text.end, 1);
        while let Some(Event { what: What::Text { lane: next, text }, .. }) = self.events.get(index + count)
            && next == lane
            && text.start == end
        {
            (end, count) = (text.end, count + 1);
        }
        (self.text(Span { end, ..*text }), count)
    }

    /// The raw payload of a span.
    pub fn wire(&self, span: Span) -> &[u8] {
        self.wire.get(span.range()).unwrap_or_default()
    }

    /// Keeps words; the span finds them again.
    pub fn keep_text(&mut self, words: &str) -> Span {
        self.keep_text_with(|text| text.push_str(words))
    }

    /// Keeps the words that `write` appends; the span finds them again. `write` must only append.
    pub fn keep_text_with(&mut self, write: impl FnOnce(&mut String)) -> Span {
        let start = self.text.len() as u32;
        write(&mut self.text);
        Span { start, end: self.text.len() as u32 }
    }

    /// Keeps a payload as it came; the span finds it again.
    pub fn keep_wire(&mut self, payload: &[u8]) -> Span {
        let start = self.wire.len() as u32;
        self.wire.extend_from_slice(payload);
        Span { start, end: self.wire.len() as u32 }
    }

    /// Adds an event.
    pub fn push(&mut self, event: Event) {
        self.events.push(event);
    }

    /// Adds a piece of text, with no raw form.
    pub fn push_text(&mut self, lane: Lane, words: &str) {
        let text = self.keep_text(words);
        self.events.push(Event { what: What::Text { lane, text }, raw: None });
    }

    /// Adds words to a lane: to the last event where that is written anew anyway and is of the same lane, else as a new one.
    pub fn append_text(&mut self, lane: Lane, words: &str) {
        if words.is_empty() {
            return;
        }
        if let Some(Event { what: What::Text { lane: last, text }, raw: None }) = self.events.last_mut()
            && *last == lane
            && text.end as usize == self.text.len()
        {
            self.text.push_str(words);
            text.end = self.text.len() as u32;
        } else {
            self.push_text(lane, words);
        }
    }

    /// Adds a question, with no raw form. Its id has at most 64 bytes.
    pub fn push_question(&mut self, question: Question<'_>) {
        let id_bytes = question.id.len() as u8;
        let named = self.keep_text_with(|text| text.extend([question.id, question.tool]));
        let prompt = self.keep_text(question.prompt);
        self.events.push(Event { what: What::Confirm { named, id_bytes, prompt }, raw: None });
    }

    /// What an event asks, where it asks something.
    pub fn question(&self, event: &Event) -> Option<Question<'_>> {
        let What::Confirm { named, id_bytes, prompt } = event.what else { return None };
        let (id, tool) = self.text(named).split_at_checked(id_bytes.into())?;
        Some(Question { id, tool, prompt: self.text(prompt) })
    }

    /// Changes what the event at `index` says; its raw form is gone.
    pub fn restate(&mut self, index: usize, what: What) {
        if let Some(event) = self.events.get_mut(index) {
            *event = Event { what, raw: None };
        }
    }

    /// Adds an event of another batch, with its words and payload.
    pub fn push_from(&mut self, from: &Batch, event: Event) {
        self.dialect = from.dialect;
        let raw = event.raw.map(|span| self.keep_wire(from.wire(span)));
        let what = match event.what {
            What::Text { lane, text } => What::Text { lane, text: self.keep_text(from.text(text)) },
            What::Tool { choice, index, id, name } => {
                What::Tool { choice, index, id: self.keep_text(from.text(id)), name: self.keep_text(from.text(name)) }
            }
            What::Confirm { named, id_bytes, prompt } => {
                What::Confirm { named: self.keep_text(from.text(named)), id_bytes, prompt: self.keep_text(from.text(prompt)) }
            }
            plain @ (What::Finish { .. } | What::Usage(_) | What::Note) => plain,
        };
        self.events.push(Event { what, raw });
    }

    /// Where the batch ends now.
    pub(crate) fn mark(&self) -> Mark {
        Mark { events: self.events.len(), text: self.text.len(), wire: self.wire.len() }
    }

    /// Forgets all that came after `mark`.
    pub(crate) fn rewind(&mut self, mark: Mark) {
        self.events.truncate(mark.events);
        self.text.truncate(mark.text);
        self.wire.truncate(mark.wire);
        self.frame = None;
    }

    /// Forgets words, if they are the last that were kept.
    pub(crate) fn forget_text(&mut self, words: Span) {
        if words.end as usize == self.text.len() {
            self.text.truncate(words.start as usize);
        }
    }

    /// Says which choice the events since `mark` belong to.
    pub(crate) fn set_choice_since(&mut self, mark: Mark, to: u16) {
        for event in self.events.iter_mut().skip(mark.events) {
            match &mut event.what {
                What::Text { lane, .. } => lane.choice = to,
                What::Tool { choice, .. } | What::Finish { choice, .. } => *choice = to,
                What::Confirm { .. } | What::Usage(_) | What::Note => {}
            }
        }
    }

    /// Gives the one event since `mark` its payload; a payload that says nothing becomes a note.
    pub(crate) fn keep_raw_since(&mut self, mark: Mark, payload: &str) {
        match self.events.len() - mark.events {
            0 => {
                let raw = Some(self.keep_wire(payload.as_bytes()));
                self.events.push(Event { what: What::Note, raw });
            }
            1 => {
                let raw = Some(self.keep_wire(payload.as_bytes()));
                if let Some(event) = self.events.last_mut() {
                    event.raw = raw;
                }
            }
            _ => {}
        }
    }

    /// Keeps the first `n` events.
    pub fn truncate(&mut self, n: usize) {
        self.events.truncate(n);
        self.frame = None;
    }

    /// Notes that the last event's payload has its words between so many bytes, as they are.
    pub(crate) fn note_frame(&mut self, before: usize, after: usize) {
        let last = self.events.len().checked_sub(1);
        self.frame = last.map(|index| TextFrame { index: index as u32, before: before as u32, after: after as u32 });
    }

    /// The last event's lane, and its payload before its words and after them, where that is known.
    pub(crate) fn frame(&self) -> Option<(Lane, &[u8], &[u8])> {
        let TextFrame { index, before, after } = self.frame?;
        let [index, before, after] = [index, before, after].map(|it| it as usize);
        let Event { what: What::Text { lane, .. }, raw: Some(raw) } = self.events.get(index)? else { return None };
        let payload = self.wire(*raw);
        let is_last = index + 1 == self.events.len();
        is_last.then_some((*lane, payload.get(..before)?, payload.get(payload.len().checked_sub(after)?..)?))
    }

    /// The part of a span of text that its bytes `range` make.
    ///
    /// The range must lie on character boundaries; one that does not gives an empty piece.
    pub fn sub(&self, span: Span, range: std::ops::Range<usize>) -> Span {
        let (start, end) = (span.start as usize + range.start, span.start as usize + range.end);
        if end <= span.end as usize && self.text.get(start..end).is_some() {
            Span { start: start as u32, end: end as u32 }
        } else {
            Span { start: span.start, end: span.start }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_in_a_log_line_shows_no_text() {
        let mut batch = Batch::new();
        batch.push_text(Lane::DEFAULT, "hunter2");
        batch.keep_wire(b"hunter2");
        assert!(!format!("{batch:?}").contains("hunter2"));
    }

    #[test]
    fn an_event_moved_to_another_batch_keeps_words_and_payload() {
        let mut from = Batch::new();
        let text = from.keep_text("hé");
        let raw = from.keep_wire(b"{\"text\":\"h\xc3\xa9\"}");
        from.push(Event { what: What::Text { lane: Lane::DEFAULT, text }, raw: Some(raw) });
        let mut to = Batch::new();
        to.push_text(Lane::DEFAULT, "before");
        to.push_from(&from, from.events()[0]);
        let Event { what: What::Text { text, .. }, raw: Some(raw) } = to.events()[1] else { panic!("a text with its raw form") };
        assert_eq!((to.text(text), to.wire(raw)), ("hé", &b"{\"text\":\"h\xc3\xa9\"}"[..]));
    }

    #[test]
    fn a_question_moved_to_another_batch_asks_the_same_and_an_event_stays_small() {
        let asked = Question { id: "q", tool: "pay", prompt: "Pay 5 €?" };
        let (mut from, mut to) = (Batch::new(), Batch::new());
        from.push_text(Lane::DEFAULT, "before");
        from.push_question(asked);
        to.push_from(&from, from.events()[1]);
        assert!(to.question(&to.events()[0]) == Some(asked) && from.question(&from.events()[0]).is_none());
        assert_eq!(size_of::<Event>(), 40);
    }

    #[test]
    fn a_batch_is_lent_with_room_and_without_words_and_one_that_grew_too_large_is_not() {
        let mut batch = Batch::new();
        batch.push_text(Lane::DEFAULT, "words");
        batch.give_back();
        assert_eq!((batch.is_empty(), batch.text.capacity()), (true, 0));
        let mut again = Batch::lent();
        assert!(again.is_empty() && again.bytes() == 0 && again.text.capacity() >= 5);
        again.give_back();
        let mut again = Batch { dialect: Dialect::OpenAi, ..Batch::new() };
        again.make_room();
        assert!(again.dialect == Dialect::OpenAi && again.text.capacity() >= 5);
        again.push_text(Lane::DEFAULT, "stay");
        again.make_room();
        assert_eq!(again.events().len(), 1, "what has room keeps what it has");
        again.keep_wire(&[b' '; MAX_LENT_BYTES + 1]);
        again.give_back();
        assert_eq!(Batch::lent().wire.capacity(), 0);
    }

    #[test]
    fn a_run_is_what_one_lane_says_without_a_word_between() {
        let reasoning = Lane { channel: Channel::Reasoning, ..Lane::DEFAULT };
        let mut batch = Batch::new();
        for (lane, words) in [(Lane::DEFAULT, "a"), (Lane::DEFAULT, ""), (Lane::DEFAULT, "b"), (reasoning, "c"), (reasoning, "d")] {
            batch.push_text(lane, words);
        }
        batch.push(Event { what: What::Note, raw: None });
        batch.push_text(reasoning, "e");
        batch.keep_text("a name");
        batch.push_text(reasoning, "f");
        let runs: Vec<_> = (0..=9).map(|index| batch.run(index)).collect();
        let expected = [("ab", 3), ("b", 2), ("b", 1), ("cd", 2), ("d", 1), ("", 0), ("e", 1), ("f", 1), ("", 0), ("", 0)];
        assert_eq!(runs, expected);
    }

    #[test]
    fn a_part_inside_a_character_is_empty() {
        let mut batch = Batch::new();
        let span = batch.keep_text("é");
        assert_eq!(batch.text(batch.sub(span, 0..1)), "");
        assert_eq!(batch.text(batch.sub(span, 0..2)), "é");
        assert_eq!(batch.text(batch.sub(span, 0..3)), "");
    }
}
