//! Turns text into token ids and ids back into bytes, the SentencePiece way.
//!
//! Text starts as single characters; the neighbouring pair that forms the best-scored piece is joined, until no pair
//! forms one. A character that is no piece is spelled as bytes. Control tokens have no spelling here: only the chat
//! template may use them, so a user who types `<|im_start|>` has typed twelve harmless characters.

use std::cmp::Ordering;
use std::collections::{BinaryHeap, HashMap};

use crate::gguf::{Error, Gguf, Value};

/// The place of a token in the vocabulary.
pub type Id = u32;

/// SentencePiece writes a space as this character.
const SPACE: char = '\u{2581}';
const VOCABULARY_MAX: usize = 1 << 20;

/// The token types of GGUF (`tokenizer.ggml.token_type`).
mod kind {
    pub(super) const NORMAL: u64 = 1;
    pub(super) const UNKNOWN: u64 = 2;
    pub(super) const CONTROL: u64 = 3;
    pub(super) const UNUSED: u64 = 5;
    pub(super) const BYTE: u64 = 6;
}

#[derive(Debug)]
enum Token {
    /// Spelled as these bytes, spaces restored.
    Piece(Box<[u8]>),
    Byte(u8),
    /// Has a meaning and no spelling.
    Silent,
}

/// The vocabulary of a model, and how to split text over it.
#[derive(Debug)]
pub(crate) struct Tokenizer {
    tokens: Vec<Token>,
    scores: Vec<f32>,
    pieces: HashMap<Box<str>, Id>,
    bytes: Box<[Option<Id>; 256]>,
    controls: HashMap<Box<str>, Id>,
    unknown: Option<Id>,
    adds_space: bool,
    pub(crate) begin: Option<Id>,
    pub(crate) end: Id,
}

impl Tokenizer {
    pub(crate) fn from_gguf(file: &Gguf) -> Result<Self, Error> {
        let model = file.text("tokenizer.ggml.model")?;
        if model != "llama" {
            return Err(Error::Unsupported(format!("tokenizer {model}; llama (SentencePiece) is")));
        }
        let spellings = file.list("tokenizer.ggml.tokens")?;
        if spellings.is_empty() || spellings.len() > VOCABULARY_MAX {
            return Err(Error::OutOfBounds { what: "vocabulary size", value: spellings.len() as u64 });
        }
        let scores = same_length(file, "tokenizer.ggml.scores", spellings.len())?;
        let kinds = same_length(file, "tokenizer.ggml.token_type", spellings.len())?;

        let mut it = Self {
            tokens: Vec::with_capacity(spellings.len()),
            scores: Vec::with_capacity(spellings.len()),
            pieces: HashMap::new(),
            bytes: Box::new([None; 256]),
            controls: HashMap::new(),
            unknown: None,
            adds_space: file.bool_or("tokenizer.ggml.add_space_prefix", true)?,
            begin: None,
            end: 0,
        };
        for (id, ((spelling, score), kind)) in (0..).zip(spellings.iter().zip(scores).zip(kinds)) {
            let (Value::Text(spelling), Value::Float(score)) = (spelling, score) else {
                return Err(Error::Missing { key: "tokenizer.ggml.tokens".into() });
            };
            let kind = match kind {
                Value::Unsigned(k) => *k,
                Value::Signed(k) => u64::try_from(*k).unwrap_or(u64::MAX),
                _ => return Err(Error::Missing { key: "tokenizer.ggml.token_type".into() }),
            };
            it.scores.push(*score as f32);
            it.tokens.push(match kind {
                kind::NORMAL => {
                    // Of two tokens with one spelling the first is used.
                    it.pieces.entry(spelling.as_str().into()).or_insert(id);
                    Token::Piece(spelling.replace(SPACE, " ").into_bytes().into())
                }
                kind::BYTE => {
                    let byte = byte_of(spelling).ok_or_else(|| Error::Unsupported(format!("byte token {spelling:?}")))?;
                    it.bytes[usize::from(byte)].get_or_insert(id);
                    Token::Byte(byte)
                }
                kind::CONTROL => {
                    it.controls.insert(spelling.as_str().into(), id);
                    Token::Silent
                }
                kind::UNKNOWN => {
                    it.unknown = Some(id);
                    Token::Silent
                }
                kind::UNUSED => Token::Silent,
                // User-defined tokens (4) match in user text before any merge; nothing here would honour that.
                other => return Err(Error::Unsupported(format!("token {spelling:?} of type {other}"))),
            });
        }
        if it.unknown.is_none() && it.bytes.contains(&None) {
            return Err(Error::Unsupported("a vocabulary with neither all bytes nor an unknown token".into()));
        }
        it.end = it.id_at(file, "tokenizer.ggml.eos_token_id")?;
        if file.bool_or("tokenizer.ggml.add_bos_token", true)? {
            it.begin = Some(it.id_at(file, "tokenizer.ggml.bos_token_id")?);
        }
        Ok(it)
    }

    fn id_at(&self, file: &Gguf, key: &'static str) -> Result<Id, Error> {
        let value = file.u64(key)?;
        Id::try_from(value).ok().filter(|id| (*id as usize) < self.tokens.len()).ok_or(Error::OutOfBounds { what: key, value })
    }

    pub(crate) fn vocabulary_size(&self) -> usize {
        self.tokens.len()
    }

    /// The token that means `name`, such as `<|im_start|>`; for templates, never for text from outside.
    pub(crate) fn control(&self, name: &str) -> Option<Id> {
        self.controls.get(name).copied()
    }

    /// Appends the bytes `id` stands for: none for a control token, part of a character for a byte token.
    pub(crate) fn spell(&self, id: Id, out: &mut Vec<u8>) {
        match self.tokens.get(id as usize) {
            Some(Token::Piece(bytes)) => out.extend_from_slice(bytes),
            Some(Token::Byte(byte)) => out.push(*byte),
            Some(Token::Silent) | None => {}
        }
    }

    /// Appends the ids of `text`. Work: n log n in the length of the text.
    pub(crate) fn encode(&self, text: &str, ids: &mut Vec<Id>) {
        if text.is_empty() {
            return;
        }
        let mut spaced = String::with_capacity(text.len() + 8);
        if self.adds_space {
            spaced.push(SPACE);
        }
        spaced.extend(text.chars().map(|c| if c == ' ' { SPACE } else { c }));
        for piece in Merge::new(self, &spaced).run() {
            match self.pieces.get(piece) {
                Some(id) => ids.push(*id),
                None => ids.extend(piece.bytes().filter_map(|b| self.bytes[usize::from(b)].or(self.unknown))),
            }
        }
    }
}

fn same_length<'a>(file: &'a Gguf, key: &str, length: usize) -> Result<&'a [Value], Error> {
    let list = file.list(key)?;
    if list.len() != length {
        return Err(Error::Shape { name: key.into(), found: list.len(), expected: length });
    }
    Ok(list)
}

/// `<0x0A>` is the byte 10.
fn byte_of(spelling: &str) -> Option<u8> {
    u8::from_str_radix(spelling.strip_prefix("<0x")?.strip_suffix('>')?, 16).ok()
}

/// Joins pieces of one text, best score first, leftmost of equals.
struct Merge<'a> {
    tokenizer: &'a Tokenizer,
    text: &'a str,
    /// Pieces as ranges of `text`, linked to their neighbours; a piece joined to its left one is empty.
    pieces: Vec<Link>,
    queue: BinaryHeap<Pair>,
}

#[derive(Clone, Copy)]
struct Link {
    from: usize,
    to: usize,
    previous: Option<usize>,
    next: Option<usize>,
}

struct Pair {
    score: f32,
    left: usize,
    right: usize,
    /// The length both had when the pair was queued: if it is another now, the pair is stale.
    bytes: usize,
}

impl Ord for Pair {
    fn cmp(&self, other: &Self) -> Ordering {
        self.score.total_cmp(&other.score).then(other.left.cmp(&self.left))
    }
}

impl PartialOrd for Pair {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Pair {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Pair {}

impl<'a> Merge<'a> {
    fn new(tokenizer: &'a Tokenizer, text: &'a str) -> Self {
        let mut pieces: Vec<Link> = text
            .char_indices()
            .enumerate()
            .map(|(i, (from, c))| Link { from, to: from + c.len_utf8(), previous: i.checked_sub(1), next: Some(i + 1) })
            .collect();
        if let Some(last) = pieces.last_mut() {
            last.next = None;
        }
        Self { tokenizer, text, pieces, queue: BinaryHeap::new() }
    }

    fn run(mut self) -> impl Iterator<Item = &'a str> {
        for right in 1..self.pieces.len() {
            self.queue_pair(right - 1, right);
        }
        while let Some(pair) = self.queue.pop() {
            let (left, right) = (self.pieces[pair.left], self.pieces[pair.right]);
            let gone = left.from == left.to || right.from == right.to;
            if gone || left.to != right.from || right.to - left.from != pair.bytes {
                continue;
            }
            self.pieces[pair.left] = Link { to: right.to, next: right.next, ..left };
            self.pieces[pair.right].to = right.from;
            if let Some(next) = right.next {
                self.pieces[next].previous = Some(pair.left);
                self.queue_pair(pair.left, next);
            }
            if let Some(previous) = left.previous {
                self.queue_pair(previous, pair.left);
            }
        }
        let text = self.text;
        self.pieces.into_iter().filter(|p| p.from != p.to).map(move |p| &text[p.from..p.to])
    }

    fn queue_pair(&mut self, left: usize, right: usize) {
        let (from, to) = (self.pieces[left].from, self.pieces[right].to);
        if let Some(id) = self.tokenizer.pieces.get(&self.text[from..to]) {
            self.queue.push(Pair { score: self.tokenizer.scores[*id as usize], left, right, bytes: to - from });
        }
    }
}
