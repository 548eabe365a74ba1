//! Makes a conversation into a prompt, and the model's tokens into text that may be shown.
//!
//! Shown means: never half of a character, never a part of a stop string, and nothing held for longer than one of
//! these two could still come of it.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::Slm;
use crate::gguf::{Error, Gguf};
use crate::model::State;
use crate::sample::{Sampler, Sampling};
use crate::tokenizer::{Id, Tokenizer};

/// Prompt tokens taken in by one [`Generation::step`]: short enough that a client who leaves is noticed soon.
const PROMPT_TOKENS_PER_STEP: usize = 8;

/// Who says a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[expect(missing_docs, reason = "the names are the documentation")]
pub enum Role {
    System,
    User,
    Assistant,
    Tool,
}

impl Role {
    fn name(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
            Self::Tool => "tool",
        }
    }
}

/// One message of a conversation.
#[derive(Clone, PartialEq, Eq)]
pub struct Message {
    /// Who says it.
    pub role: Role,
    /// What is said. Taken as text to the last character: what looks like a control token is not one.
    pub content: String,
}

impl std::fmt::Debug for Message {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // What people say does not belong in logs, and Debug ends up there.
        write!(f, "Message {{ role: {}, content: {} bytes }}", self.role.name(), self.content.len())
    }
}

/// The control tokens of the ChatML form, `<|im_start|>role\ncontent<|im_end|>\n`, in which our models are trained.
#[derive(Debug)]
pub(crate) struct Template {
    start: Id,
    end: Id,
}

impl Template {
    pub(crate) fn from_gguf(file: &Gguf, tokenizer: &Tokenizer) -> Result<Self, Error> {
        let template = file.text("tokenizer.chat_template")?;
        match (tokenizer.control("<|im_start|>"), tokenizer.control("<|im_end|>")) {
            (Some(start), Some(end)) if template.contains("<|im_start|>") => Ok(Self { start, end }),
            _ => Err(Error::Unsupported("a chat template other than ChatML".into())),
        }
    }

    fn message(&self, tokenizer: &Tokenizer, message: &Message) -> Vec<Id> {
        let mut ids = vec![self.start];
        tokenizer.encode(&format!("{}\n{}", message.role.name(), message.content), &mut ids);
        ids.push(self.end);
        tokenizer.encode("\n", &mut ids);
        ids
    }

    fn answer(&self, tokenizer: &Tokenizer) -> Vec<Id> {
        let mut ids = vec![self.start];
        tokenizer.encode("assistant\n", &mut ids);
        ids
    }
}

/// A conversation as the model reads it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    ids: Vec<Id>,
    dropped_messages: usize,
}

/// The newest turn alone does not fit into the model's context.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "the last turn and the system message need {needed_tokens} tokens; {context_tokens} is this model's context, part of it reserved for the answer"
)]
pub struct TooLong {
    /// Tokens the prompt needs at least.
    pub needed_tokens: usize,
    /// Tokens the model can look back on.
    pub context_tokens: usize,
}

impl Prompt {
    /// The tokens, those that begin the answer included.
    pub fn ids(&self) -> &[Id] {
        &self.ids
    }

    /// Messages left out, oldest first, because the model's context is too short for all.
    pub fn dropped_messages(&self) -> usize {
        self.dropped_messages
    }

    /// Fits `messages` into `room` tokens. The leading system messages and the newest turn always stay; a turn, from
    /// one user message to the next, stays or goes as a whole.
    pub(crate) fn fit(slm: &Slm, messages: &[Message], room: usize) -> Result<Self, TooLong> {
        let (tokenizer, template) = (&slm.tokenizer, &slm.template);
        let lead = messages.iter().take_while(|m| m.role == Role::System).count();
        let (system, rest) = messages.split_at(lead);
        let render = |messages: &[Message]| -> Vec<Id> { messages.iter().flat_map(|m| template.message(tokenizer, m)).collect() };

        let mut head: Vec<Id> = tokenizer.begin.into_iter().collect();
        head.extend(render(system));
        let tail = template.answer(tokenizer);
        let mut tokens = head.len() + tail.len();

        // Newest first, so that a long history costs no more work than what is kept of it.
        let mut turns = Vec::new();
        let mut until = rest.len();
        while until > 0 {
            let from = rest[..until].iter().rposition(|m| m.role == Role::User).unwrap_or(0);
            let turn = render(&rest[from..until]);
            if tokens + turn.len() > room {
                if turns.is_empty() {
                    return Err(TooLong { needed_tokens: tokens + turn.len(), context_tokens: slm.context_tokens() });
                }
                break;
            }
            tokens += turn.len();
            turns.push(turn);
            until = from;
        }
        if tokens > room {
            return Err(TooLong { needed_tokens: tokens, context_tokens: slm.context_tokens() });
        }
        let ids = head.into_iter().chain(turns.into_iter().rev().flatten()).chain(tail).collect();
        Ok(Self { ids, dropped_messages: until })
    }
}

/// How long an answer may get, how its tokens are picked, and what ends it.
#[derive(Clone, PartialEq)]
pub struct Limits {
    /// Tokens of answer at most; the model's context may end it earlier.
    pub max_tokens: usize,
    /// How tokens are picked.
    pub sampling: Sampling,
    /// Texts that end the answer; not part of it. Empty ones are ignored.
    pub stop: Vec<String>,
}

impl Default for Limits {
    fn default() -> Self {
        Self { max_tokens: usize::MAX, sampling: Sampling::GREEDY, stop: Vec::new() }
    }
}

/// Why an answer ended; the words are OpenAI's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Finish {
    /// The model said it is done, or a stop string came.
    Stop,
    /// The token limit or the end of the context.
    Length,
}

/// What one step of a generation brought.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// A part of the prompt was taken in; no token yet.
    Prompted,
    /// A token: the text that may be shown now. Empty while a character or a possible stop string is incomplete.
    Text(String),
    /// The end, with the text that had been held. Every further step says the same with no text.
    End(Finish, String),
}

/// An answer being made. Call [`step`](Self::step) until it returns [`Step::End`]; dropping it is stopping it.
pub struct Generation {
    slm: Arc<Slm>,
    prompt: std::vec::IntoIter<Id>,
    state: State,
    sampler: Sampler,
    left_tokens: usize,
    answer: Vec<Id>,
    letters: Letters,
    stops: Stops,
    finish: Option<Finish>,
}

impl Generation {
    pub(crate) fn new(slm: Arc<Slm>, prompt: Prompt, limits: Limits) -> Self {
        let context = slm.model.context;
        let mut ids = prompt.ids;
        ids.truncate(context);
        // The last token needs no place: it is shown and not given back to the model.
        let left_tokens = limits.max_tokens.min(context - ids.len() + 1);
        Self {
            state: State::new(&slm.model, ids.len().saturating_add(left_tokens)),
            prompt: ids.into_iter(),
            sampler: Sampler::new(limits.sampling),
            left_tokens,
            answer: Vec::new(),
            letters: Letters::default(),
            stops: Stops::new(limits.stop),
            finish: None,
            slm,
        }
    }

    /// The tokens of the answer so far, without the one that ended it.
    pub fn answer_ids(&self) -> &[Id] {
        &self.answer
    }

    /// Does a little work: a part of the prompt, or one token. Takes a core for well under ten milliseconds with the
    /// embedded model; not for a thread that others wait for.
    pub fn step(&mut self) -> Step {
        if let Some(finish) = self.finish {
            return Step::End(finish, String::new());
        }
        if self.prompt.len() > 0 {
            for id in self.prompt.by_ref().take(PROMPT_TOKENS_PER_STEP) {
                self.slm.model.step(&mut self.state, id);
            }
            return Step::Prompted;
        }
        if self.left_tokens == 0 {
            return self.end(Finish::Length, String::new());
        }
        if let Some(last) = self.answer.last() {
            self.slm.model.step(&mut self.state, *last);
        }
        self.slm.model.score(&mut self.state);
        let id = self.sampler.pick(&mut self.state.logits);
        if id == self.slm.tokenizer.end {
            return self.end(Finish::Stop, String::new());
        }
        self.left_tokens -= 1;
        self.answer.push(id);
        self.slm.count_token();
        let mut bytes = Vec::new();
        self.slm.tokenizer.spell(id, &mut bytes);
        match self.stops.pass(&self.letters.join(&bytes)) {
            Passed::On(text) if self.left_tokens == 0 => self.end(Finish::Length, text),
            Passed::On(text) => Step::Text(text),
            Passed::Stopped(text) => {
                self.finish = Some(Finish::Stop);
                Step::End(Finish::Stop, text)
            }
        }
    }

    fn end(&mut self, finish: Finish, mut text: String) -> Step {
        self.finish = Some(finish);
        match self.stops.pass(&self.letters.rest()) {
            Passed::On(more) => {
                text.push_str(&more);
                text.push_str(&self.stops.rest());
                Step::End(finish, text)
            }
            Passed::Stopped(more) => {
                self.finish = Some(Finish::Stop);
                Step::End(Finish::Stop, text + &more)
            }
        }
    }
}

/// Joins bytes to characters; holds at most the three bytes of an incomplete one.
#[derive(Debug, Default)]
struct Letters {
    held: Vec<u8>,
}

impl Letters {
    /// The characters that are whole with `bytes`; what can never become one is U+FFFD.
    fn join(&mut self, bytes: &[u8]) -> String {
        self.held.extend_from_slice(bytes);
        let mut text = String::new();
        loop {
            match std::str::from_utf8(&self.held) {
                Ok(whole) => {
                    text.push_str(whole);
                    self.held.clear();
                    return text;
                }
                Err(broken) => {
                    let (whole, _) = self.held.split_at(broken.valid_up_to());
                    text.push_str(&String::from_utf8_lossy(whole));
                    let Some(bad) = broken.error_len() else {
                        self.held.drain(..broken.valid_up_to());
                        return text;
                    };
                    text.push(char::REPLACEMENT_CHARACTER);
                    self.held.drain(..broken.valid_up_to() + bad);
                }
            }
        }
    }

    fn rest(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.held)).into_owned()
    }
}

/// Finds stop strings in text that comes in pieces; holds the longest end that could begin one.
#[derive(Debug)]
struct Stops {
    stops: Vec<String>,
    held: String,
}

#[derive(Debug, PartialEq)]
enum Passed {
    On(String),
    /// A stop string came; this is what was before it.
    Stopped(String),
}

impl Stops {
    fn new(mut stops: Vec<String>) -> Self {
        stops.retain(|s| !s.is_empty());
        Self { stops, held: String::new() }
    }

    fn pass(&mut self, text: &str) -> Passed {
        let mut seen = std::mem::take(&mut self.held);
        seen.push_str(text);
        // Of several, the one that is complete first: so the cut does not depend on how the text was split.
        let first = self.stops.iter().filter_map(|s| seen.find(s).map(|from| (from + s.len(), from))).min();
        if let Some((_, from)) = first {
            seen.truncate(from);
            return Passed::Stopped(seen);
        }
        let held_bytes = self.stops.iter().map(|s| overlap(&seen, s)).max().unwrap_or(0);
        self.held = seen.split_off(seen.len() - held_bytes);
        Passed::On(seen)
    }

    fn rest(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// The most bytes at the end of `text` that `stop` begins with.
fn overlap(text: &str, stop: &str) -> usize {
    let (text, stop) = (text.as_bytes(), stop.as_bytes());
    (1..stop.len().min(text.len() + 1)).rev().find(|n| text.ends_with(&stop[..*n])).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Passes `pieces` one by one: what was shown after each, and whether a stop string came.
    fn shown(stops: &[&str], pieces: &[&str]) -> (Vec<String>, bool) {
        let mut it = Stops::new(stops.iter().map(|s| (*s).to_owned()).collect());
        let mut shown = Vec::new();
        for piece in pieces {
            match it.pass(piece) {
                Passed::On(text) => shown.push(text),
                Passed::Stopped(text) => {
                    shown.push(text);
                    return (shown, true);
                }
            }
        }
        shown.push(it.rest());
        (shown, false)
    }

    #[test]
    fn a_stop_string_split_over_pieces_is_not_shown() {
        assert_eq!(shown(&["END"], &["the E", "N", "D of it"]), (vec!["the ".into(), "".into(), "".into()], true));
    }

    #[test]
    fn only_what_can_still_become_a_stop_string_is_held() {
        assert_eq!(shown(&["END"], &["the E", "N", "T"]), (vec!["the ".into(), "".into(), "ENT".into(), "".into()], false));
        assert_eq!(shown(&["aab"], &["aaa", "c"]), (vec!["a".into(), "aac".into(), "".into()], false));
    }

    #[test]
    fn however_the_text_is_split_it_is_cut_at_the_same_place() {
        let text = "abcabxé—\u{1F600}zz";
        for stops in [&["abx"][..], &["\u{1F600}z"], &["bca", "c"], &["abca", "bc"], &["é—", "q"], &["zzz"]] {
            let (whole, cut) = shown(stops, &[text]);
            let at: Vec<usize> = text.char_indices().map(|(i, _)| i).skip(1).collect();
            for mask in 0..1u32 << at.len() {
                let mut pieces = Vec::new();
                let mut from = 0;
                for (bit, i) in at.iter().enumerate() {
                    if mask >> bit & 1 == 1 {
                        pieces.push(&text[from..*i]);
                        from = *i;
                    }
                }
                pieces.push(&text[from..]);
                let (parts, cut_here) = shown(stops, &pieces);
                assert_eq!((parts.concat(), cut_here), (whole.concat(), cut), "{stops:?} over {pieces:?}");
            }
        }
    }

    #[test]
    fn a_character_is_shown_whole_or_not_yet() {
        let mut letters = Letters::default();
        let shown: Vec<String> = "é€😀a".bytes().map(|b| letters.join(&[b])).collect();
        assert_eq!(shown, ["", "é", "", "", "€", "", "", "", "😀", "a"]);
    }

    #[test]
    fn bytes_that_are_no_character_are_replaced_and_the_rest_goes_on() {
        let mut letters = Letters::default();
        assert_eq!(letters.join(b"a\xffb\xe2\x82"), "a\u{fffd}b");
        assert_eq!(letters.join(b"c"), "\u{fffd}c");
        assert_eq!(letters.join(b"\xf0\x9f"), "");
        assert_eq!(letters.rest(), "\u{fffd}");
    }
}
