//! Reads what a peer answers, whatever it speaks: response heads, chunked bodies, event streams, WebSocket frames.
//!
//! Only as much is understood as must be counted: the words in the text, and how the answer ended. It is strict about framing,
//! since a peer that frames wrongly loses events.

use std::{fmt, sync::LazyLock};

use memchr::{memchr, memmem};

use crate::{
    words::{self, Word},
    workload::Front,
};

/// The most bytes of a head, of a line, of a frame and of a whole answer.
const MOST: usize = 256 << 10;

/// What was wrong with an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Wrong {
    Head,
    Status(u16),
    Chunk,
    Frame,
    TooLong,
    /// Letters of a word are missing.
    Word,
    /// It ended as an error, or was cut by policy.
    Ended(String),
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Wrong::Head => f.write_str("a response head that is none"),
            Wrong::Status(status) => write!(f, "status {status}"),
            Wrong::Chunk => f.write_str("a chunk that is framed wrongly"),
            Wrong::Frame => f.write_str("a WebSocket frame that is none, or a close"),
            Wrong::TooLong => f.write_str("a head, line or frame without an end"),
            Wrong::Word => f.write_str("text with a part missing"),
            Wrong::Ended(how) => write!(f, "ended with {how}"),
        }
    }
}

/// An answer that is complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Over {
    /// Whose it was, where a word of it was heard.
    pub(crate) stream: Option<u16>,
    /// Whether it said so itself.
    pub(crate) ended: bool,
    pub(crate) text_bytes: u64,
}

/// Reads from one connection: one answer after another, or several at a time as frames.
pub(crate) struct Reply {
    front: Front,
    body: Body,
    /// What came of a head, a line, a frame or a whole body that is not complete yet.
    part: Vec<u8>,
    /// Answers that have begun: at most one, except as frames.
    turns: Vec<Turn>,
    /// Answers that are complete, until somebody takes them.
    pub(crate) over: Vec<Over>,
    /// Pongs that are owed: payloads of pings.
    pub(crate) pings: Vec<Vec<u8>>,
}

/// An answer that has begun.
#[derive(Default)]
struct Turn {
    /// Its name, where frames have one.
    id: Box<[u8]>,
    stream: Option<u16>,
    listener: words::Listener,
    text_bytes: u64,
    ended: bool,
}

impl Turn {
    fn hear(&mut self, text: &[u8], word: &mut dyn FnMut(Word)) -> Result<(), Wrong> {
        self.text_bytes += text.len() as u64;
        let Turn { listener, stream, .. } = self;
        let heard = listener.hear(text, |it| {
            stream.get_or_insert(it.stream);
            word(it);
        });
        heard.map_err(|words::Broken| Wrong::Word)
    }
}

enum Body {
    Head,
    Chunked(Chunk),
    Length(usize),
    /// A WebSocket.
    Frames,
}

enum Chunk {
    Size(usize, bool),
    SizeEnd(usize),
    Data(usize),
    DataEnd(u8),
    /// After the last chunk: trailers, up to an empty line.
    Trailer {
        blank: bool,
    },
}

impl Reply {
    pub(crate) fn new(front: Front) -> Reply {
        Reply { front, body: Body::Head, part: Vec::new(), turns: Vec::new(), over: Vec::new(), pings: Vec::new() }
    }

    /// More bytes. `word` is called for each word in the text.
    pub(crate) fn push(&mut self, mut bytes: &[u8], word: &mut dyn FnMut(Word)) -> Result<(), Wrong> {
        while !bytes.is_empty() {
            match &mut self.body {
                Body::Head => {
                    let Some(rest) = self.head(bytes)? else { return Ok(()) };
                    bytes = rest;
                    if matches!(self.body, Body::Length(0)) {
                        self.complete(word)?;
                    }
                }
                Body::Length(left) => {
                    let n = bytes.len().min(*left);
                    *left -= n;
                    let done = *left == 0;
                    self.content(&bytes[..n], word)?;
                    bytes = &bytes[n..];
                    if done {
                        self.complete(word)?;
                    }
                }
                Body::Chunked(chunk) => match chunk {
                    Chunk::Data(left) => {
                        let n = bytes.len().min(*left);
                        *left -= n;
                        if *left == 0 {
                            *chunk = Chunk::DataEnd(0);
                        }
                        self.content(&bytes[..n], word)?;
                        bytes = &bytes[n..];
                    }
                    other => {
                        let ended = other.step(bytes[0])?;
                        bytes = &bytes[1..];
                        if ended {
                            self.complete(word)?;
                        }
                    }
                },
                Body::Frames => {
                    self.part.extend_from_slice(bytes);
                    bytes = &[];
                    self.frames(word)?;
                }
            }
        }
        Ok(())
    }

    /// A WebSocket that takes frames.
    pub(crate) fn is_upgraded(&self) -> bool {
        matches!(self.body, Body::Frames)
    }

    /// The connection was closed by the peer: fine between two answers only.
    pub(crate) fn is_between(&self) -> bool {
        matches!(self.body, Body::Head) && self.part.is_empty()
    }

    fn complete(&mut self, word: &mut dyn FnMut(Word)) -> Result<(), Wrong> {
        if self.front == Front::Whole {
            let whole = std::mem::take(&mut self.part);
            self.object(&whole, word)?;
            self.turn(&[]).ended = true;
        }
        self.body = Body::Head;
        self.part.clear();
        self.is_over(&[]);
        Ok(())
    }

    /// The answer of that name, which has begun now if it had not.
    fn turn(&mut self, id: &[u8]) -> &mut Turn {
        let at = self.turns.iter().position(|turn| &*turn.id == id).unwrap_or_else(|| {
            self.turns.push(Turn { id: id.into(), ..Turn::default() });
            self.turns.len() - 1
        });
        &mut self.turns[at]
    }

    fn is_over(&mut self, id: &[u8]) {
        let at = self.turns.iter().position(|turn| &*turn.id == id);
        let Turn { stream, ended, text_bytes, .. } = at.map(|at| self.turns.swap_remove(at)).unwrap_or_default();
        self.over.push(Over { stream, ended, text_bytes });
    }

    /// `None` while the head is not complete, else what comes after it.
    fn head<'a>(&mut self, bytes: &'a [u8]) -> Result<Option<&'a [u8]>, Wrong> {
        let before = self.part.len();
        self.part.extend_from_slice(bytes);
        let Some(end) = memmem::find(&self.part, b"\r\n\r\n") else {
            return if self.part.len() > MOST { Err(Wrong::TooLong) } else { Ok(None) };
        };
        let rest = &bytes[end + 4 - before..];
        let head = std::str::from_utf8(&self.part[..end]).map_err(|_| Wrong::Head)?;
        let mut lines = head.split("\r\n");
        let status: u16 = lines.next().and_then(|line| line.split(' ').nth(1)?.parse().ok()).ok_or(Wrong::Head)?;
        let mut body = None;
        for line in lines {
            let (name, value) = line.split_once(':').ok_or(Wrong::Head)?;
            let value = value.trim();
            if name.eq_ignore_ascii_case("transfer-encoding") && value.eq_ignore_ascii_case("chunked") {
                body = Some(Body::Chunked(Chunk::Size(0, false)));
            } else if name.eq_ignore_ascii_case("content-length") {
                body = Some(Body::Length(value.parse().map_err(|_| Wrong::Head)?));
            }
        }
        self.body = match (self.front, status) {
            (Front::WebSocket, 101) => Body::Frames,
            (Front::OpenAi | Front::Chat | Front::Whole, 200) => body.ok_or(Wrong::Head)?,
            _ => return Err(Wrong::Status(status)),
        };
        self.part.clear();
        Ok(Some(rest))
    }

    fn content(&mut self, mut bytes: &[u8], word: &mut dyn FnMut(Word)) -> Result<(), Wrong> {
        if self.part.len() + bytes.len() > MOST {
            return Err(Wrong::TooLong);
        }
        if self.front == Front::Whole {
            self.part.extend_from_slice(bytes);
            return Ok(());
        }
        while let Some(end) = memchr(b'\n', bytes) {
            if self.part.is_empty() {
                self.line(&bytes[..end], word)?;
            } else {
                let mut line = std::mem::take(&mut self.part);
                line.extend_from_slice(&bytes[..end]);
                self.line(&line, word)?;
                line.clear();
                self.part = line;
            }
            bytes = &bytes[end + 1..];
        }
        self.part.extend_from_slice(bytes);
        Ok(())
    }

    fn line(&mut self, line: &[u8], word: &mut dyn FnMut(Word)) -> Result<(), Wrong> {
        if let Some(data) = line.strip_prefix(b"data: ") {
            if data == b"[DONE]" {
                self.turn(&[]).ended = true;
                return Ok(());
            }
            return self.object(data, word);
        }
        match line {
            b"event: done" => self.turn(&[]).ended = true,
            b"event: error" => return Err(Wrong::Ended("an error event".to_owned())),
            _ => {}
        }
        Ok(())
    }

    /// One JSON object: text in it is heard, and signs of a bad end are errors.
    fn object(&mut self, object: &[u8], word: &mut dyn FnMut(Word)) -> Result<(), Wrong> {
        static CONTENT: LazyLock<memmem::Finder<'static>> = LazyLock::new(|| memmem::Finder::new("\"content\":\""));
        static TEXT: LazyLock<memmem::Finder<'static>> = LazyLock::new(|| memmem::Finder::new("\"text\":\""));
        let id = if self.front == Front::WebSocket { turn_id(object) } else { &[] };
        let finder = match self.front {
            Front::OpenAi | Front::Whole => &*CONTENT,
            Front::Chat | Front::WebSocket => &*TEXT,
        };
        if let Some(at) = finder.find(object) {
            let text = &object[at + finder.needle().len()..];
            // The text is ours and has nothing to escape.
            let text = &text[..memchr(b'"', text).ok_or(Wrong::Frame)?];
            return self.turn(id).hear(text, word);
        }
        for sign in ["{\"error\"", "\"content_filter\"", "\"type\":\"error\"", "\"blocked\""] {
            if memmem::find(object, sign.as_bytes()).is_some() {
                let shown = String::from_utf8_lossy(&object[..object.len().min(300)]).into_owned();
                return Err(Wrong::Ended(shown));
            }
        }
        Ok(())
    }

    /// RFC 6455 section 5.2, as a server sends them: whole and unmasked.
    fn frames(&mut self, word: &mut dyn FnMut(Word)) -> Result<(), Wrong> {
        let part = std::mem::take(&mut self.part);
        let mut bytes = part.as_slice();
        while let [first, second, rest @ ..] = bytes {
            let (len, rest) = match (second, rest) {
                (0..=125, rest) => (usize::from(*second), rest),
                (126, [a, b, rest @ ..]) => (usize::from(u16::from_be_bytes([*a, *b])), rest),
                (126, _) => break,
                _ => return Err(Wrong::Frame),
            };
            let Some(payload) = rest.get(..len) else { break };
            match first {
                0x81 => {
                    self.object(payload, word)?;
                    if payload.starts_with(b"{\"type\":\"done\"") {
                        let id = turn_id(payload);
                        self.turn(id).ended = true;
                        self.is_over(id);
                    }
                }
                0x89 => self.pings.push(payload.to_vec()),
                0x8a => {}
                _ => return Err(Wrong::Frame),
            }
            bytes = &rest[len..];
        }
        let used = part.len() - bytes.len();
        self.part = part;
        self.part.drain(..used);
        Ok(())
    }
}

/// The name of the turn that a frame is about; empty where it has none.
fn turn_id(frame: &[u8]) -> &[u8] {
    static TURN: LazyLock<memmem::Finder<'static>> = LazyLock::new(|| memmem::Finder::new("\"turn_id\":\""));
    let rest = TURN.find(frame).map_or(&[][..], |at| &frame[at + TURN.needle().len()..]);
    &rest[..memchr(b'"', rest).unwrap_or(0)]
}

impl Chunk {
    /// One byte of framing; true after the last.
    fn step(&mut self, byte: u8) -> Result<bool, Wrong> {
        *self = match (&*self, byte) {
            (Chunk::Size(_, true), b'\r') => {
                let Chunk::Size(size, _) = *self else { return Err(Wrong::Chunk) };
                Chunk::SizeEnd(size)
            }
            (Chunk::Size(size, _), byte) => match char::from(byte).to_digit(16) {
                Some(digit) if *size < MOST => Chunk::Size(size << 4 | digit as usize, true),
                _ => return Err(Wrong::Chunk),
            },
            (Chunk::SizeEnd(0), b'\n') => Chunk::Trailer { blank: true },
            (Chunk::SizeEnd(size), b'\n') => Chunk::Data(*size),
            (Chunk::DataEnd(0), b'\r') => Chunk::DataEnd(1),
            (Chunk::DataEnd(1), b'\n') => Chunk::Size(0, false),
            (Chunk::Trailer { blank }, b'\r') => Chunk::Trailer { blank: *blank },
            (Chunk::Trailer { blank: true }, b'\n') => return Ok(true),
            (Chunk::Trailer { .. }, byte) => Chunk::Trailer { blank: byte == b'\n' },
            _ => return Err(Wrong::Chunk),
        };
        Ok(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(front: Front, answer: &[u8], size: usize) -> Result<(Vec<Word>, Vec<Over>), Wrong> {
        let (mut reply, mut words) = (Reply::new(front), Vec::new());
        for piece in answer.chunks(size) {
            reply.push(piece, &mut |word| words.push(word))?;
        }
        Ok((words, reply.over))
    }

    /// The end of an answer of stream 7 with this many words, each with a blank behind it.
    fn over(words: u64) -> Over {
        Over { stream: Some(7), ended: true, text_bytes: words * (words::LEN as u64 + 1) }
    }

    fn words(n: u32) -> Vec<Word> {
        (0..n).map(|index| Word { stream: 7, index }).collect()
    }

    fn text(word: &Word) -> String {
        String::from_utf8(word.letters().to_vec()).unwrap()
    }

    #[test]
    fn an_event_stream_is_heard_however_it_is_cut() {
        let mut answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n".to_vec();
        for word in words(5) {
            let event = format!("data: {{\"choices\":[{{\"delta\":{{\"content\":\"{} \"}}}}]}}\n\n", text(&word));
            answer.extend_from_slice(format!("{:x}\r\n{event}\r\n", event.len()).as_bytes());
        }
        answer.extend_from_slice(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n");
        for size in 1..answer.len() {
            assert_eq!(read(Front::OpenAi, &answer, size), Ok((words(5), vec![over(5)])), "cut by {size}");
        }
    }

    #[test]
    fn a_stream_that_stops_without_saying_so_did_not_end() {
        let answer = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n";
        assert_eq!(read(Front::OpenAi, answer, answer.len()), Ok((vec![], vec![Over { stream: None, ended: false, text_bytes: 0 }])));
    }

    #[test]
    fn refusals_and_errors_are_no_success() {
        let cases = [
            (Front::OpenAi, "HTTP/1.1 503 Busy\r\ncontent-length: 0\r\n\r\n", Wrong::Status(503)),
            (Front::OpenAi, "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz", Wrong::Chunk),
            (Front::Chat, "HTTP/1.1 200 OK\r\ncontent-length: 13\r\n\r\nevent: error\n", Wrong::Ended("an error event".into())),
        ];
        for (front, answer, wrong) in cases {
            assert_eq!(read(front, answer.as_bytes(), answer.len()), Err(wrong), "{answer}");
        }
        let cut = "data: {\"choices\":[{\"finish_reason\":\"content_filter\"}]}\n";
        let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{cut}", cut.len());
        assert!(matches!(read(Front::OpenAi, answer.as_bytes(), 9), Err(Wrong::Ended(_))));
    }

    #[test]
    fn frames_of_a_websocket_are_heard_however_they_are_cut() {
        let mut answer = b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\n\r\n".to_vec();
        let mut frame = |first: u8, payload: &[u8]| {
            answer.push(first);
            if payload.len() < 126 {
                answer.push(payload.len() as u8);
            } else {
                answer.push(126);
                answer.extend_from_slice(&(payload.len() as u16).to_be_bytes());
            }
            answer.extend_from_slice(payload);
        };
        for word in words(3) {
            let blanks = " ".repeat(80 * word.index as usize);
            frame(0x81, format!("{{\"type\":\"text\",\"text\":\"{} \"}}{blanks}", text(&word)).as_bytes());
            frame(0x89, b"hi");
        }
        frame(0x81, b"{\"type\":\"done\",\"finish\":\"stop\"}");
        for size in 1..answer.len() {
            assert_eq!(read(Front::WebSocket, &answer, size), Ok((words(3), vec![over(3)])), "cut by {size}");
        }
    }

    #[test]
    fn turns_that_share_a_websocket_are_told_apart() {
        let mut answer = b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\n\r\n".to_vec();
        let mut frame = |payload: String| {
            answer.extend_from_slice(&[0x81, u8::try_from(payload.len()).unwrap()]);
            answer.extend_from_slice(payload.as_bytes());
        };
        let said = |stream: u16, text: &str| format!(r#"{{"type":"text","turn_id":"t{stream}","seq":1,"text":"{text}"}}"#);
        let [one, two] = [1, 2].map(|stream| Word { stream, index: 0 });
        // A word of each turn is cut, and the other's piece comes between.
        for (word, from, to) in [(one, 0, 4), (two, 0, 7), (one, 4, 10), (two, 7, 10)] {
            frame(said(word.stream, &text(&word)[from..to]));
        }
        frame(r#"{"type":"done","turn_id":"t2","finish":"stop"}"#.to_owned());
        frame(r#"{"type":"done","turn_id":"t1","finish":"stop"}"#.to_owned());
        let over = [2, 1].map(|stream| Over { stream: Some(stream), ended: true, text_bytes: 10 });
        assert_eq!(read(Front::WebSocket, &answer, answer.len()), Ok((vec![one, two], over.to_vec())));
    }

    #[test]
    fn a_whole_answer_is_heard_at_its_end() {
        let body = format!("{{\"choices\":[{{\"message\":{{\"role\":\"assistant\",\"content\":\"{} \"}}}}]}}", text(&words(1)[0]));
        let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len());
        for size in [1, 7, answer.len()] {
            assert_eq!(read(Front::Whole, answer.as_bytes(), size), Ok((words(1), vec![over(1)])));
        }
    }
}
