//! Server-sent events: bytes to frames, however they are cut, and frames to bytes that nothing can be injected into.
//!
//! The format is the WHATWG HTML standard's, section 9.2.6 "Interpreting an event stream". Two fields of it are the business
//! of browsers alone and are dropped: `retry`, and the id that outlives its frame.

use std::ops::Range;

use memchr::{memchr, memchr2};

use crate::{Code, Fault, TurnId};

/// How much one line and one frame may hold, in bytes, without line ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// The longest line.
    pub max_line: usize,
    /// The largest frame: all its lines, comments between them included.
    pub max_event: usize,
}

impl Default for Limits {
    /// 128 KiB each.
    fn default() -> Limits {
        Limits { max_line: 128 << 10, max_event: 128 << 10 }
    }
}

/// One frame, borrowed from the decoder until the next call.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Frame<'a> {
    /// The event's name; `message` where the frame names none.
    pub event: &'a str,
    /// The data lines, joined by `\n`.
    pub data: &'a str,
    /// The id this very frame carries.
    pub id: Option<&'a str>,
}

// The data is message text, which has no Debug form.
impl std::fmt::Debug for Frame<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Frame({:?}, <{} bytes>)", self.event, self.data.len())
    }
}

/// Why a stream of events cannot be read on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SseError {
    /// A line is longer than [`Limits::max_line`].
    #[error("a line is longer than {0} bytes")]
    LineTooLong(usize),
    /// A frame is larger than [`Limits::max_event`].
    #[error("an event is larger than {0} bytes")]
    EventTooLarge(usize),
}

impl From<SseError> for Fault {
    fn from(error: SseError) -> Fault {
        Fault::upstream(Code::UpstreamEventTooLarge).caused_by(error)
    }
}

const BOM: &[u8] = b"\xef\xbb\xbf";

/// Reads frames out of bytes.
///
/// `push` what was read, then call `next` until it gives `None`. A frame with one line of data is lent straight from the
/// buffer. Memory: [`Limits::max_event`], a line end, and the largest push. Work: every byte is looked at a fixed number of
/// times, even when they come one by one.
///
/// ```
/// # use headgate_contracts::wire::sse::{Decoder, Limits};
/// let mut decoder = Decoder::new(Limits::default());
/// decoder.push(b"event: text\ndata: {\"text\":\"Hel");
/// assert!(decoder.next()?.is_none());
/// decoder.push(b"lo\"}\r\n\r\n");
/// let frame = decoder.next()?.expect("a whole frame");
/// assert_eq!((frame.event, frame.data), ("text", r#"{"text":"Hello"}"#));
/// # Ok::<(), headgate_contracts::wire::sse::SseError>(())
/// ```
pub struct Decoder {
    limits: Limits,
    buffer: Vec<u8>,
    /// Where the frame being read begins in the buffer; all before it has been lent out.
    frame: usize,
    /// Where the line being read begins, and how far it has been searched for its end.
    line: usize,
    searched: usize,
    /// What the lines of this frame said so far, relative to `frame`.
    fields: Fields,
    /// The data lines of a frame that has several.
    joined: Vec<u8>,
    /// Text in which invalid bytes were replaced: of data, event and id.
    replaced_text: [String; 3],
    /// A `\r` ended the last line: a `\n` right behind it belongs to it.
    after_cr: bool,
    /// The stream's first bytes have been looked at for a byte order mark.
    begun: bool,
    failed: Option<SseError>,
    comments: u64,
    replaced: u64,
}

#[derive(Default)]
struct Fields {
    data: Data,
    event: Option<Range<usize>>,
    id: Option<Range<usize>>,
}

#[derive(Default)]
enum Data {
    #[default]
    None,
    /// One line, in the buffer.
    Line(Range<usize>),
    /// Several, in `joined`.
    Joined,
}

impl Decoder {
    /// A decoder at the beginning of a stream.
    pub fn new(limits: Limits) -> Decoder {
        Decoder {
            limits,
            buffer: Vec::new(),
            frame: 0,
            line: 0,
            searched: 0,
            fields: Fields::default(),
            joined: Vec::new(),
            replaced_text: Default::default(),
            after_cr: false,
            begun: false,
            failed: None,
            comments: 0,
            replaced: 0,
        }
    }

    /// Takes what was read from the stream.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.failed.is_some() {
            return;
        }
        if self.frame > 0 {
            // What was lent out goes; mostly that is all there is. What stays is moved at most once per frame, since `frame`
            // is then 0 until the next one is lent.
            self.buffer.drain(..self.frame);
            self.line -= self.frame;
            self.searched -= self.frame;
            self.frame = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole frame, if there is one.
    ///
    /// Errors: the stream breaks its limits; every later call says so again. Frames before that are given first.
    #[allow(clippy::should_implement_trait, reason = "an iterator cannot lend")]
    pub fn next(&mut self) -> Result<Option<Frame<'_>>, SseError> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        match self.advance() {
            Ok(Some(fields)) => Ok(Some(self.lend(fields))),
            Ok(None) => Ok(None),
            Err(error) => {
                self.failed = Some(error);
                self.buffer = Vec::new();
                (self.frame, self.line, self.searched) = (0, 0, 0);
                Err(error)
            }
        }
    }

    /// Whether bytes of an unfinished frame remain. At the end of a stream they mean that it was cut.
    pub fn unfinished(&self) -> bool {
        let fields = &self.fields;
        let partial = self.buffer.get(self.line..).unwrap_or_default();
        let partial = partial.strip_prefix(if self.after_cr { b"\n".as_slice() } else { b"" }).unwrap_or(partial);
        !matches!(fields.data, Data::None)
            || fields.event.is_some()
            || fields.id.is_some()
            || partial.first().is_some_and(|first| *first != b':')
    }

    /// Comment lines so far: heartbeats, mostly.
    pub fn comments(&self) -> u64 {
        self.comments
    }

    /// Frames so far in which invalid UTF-8 was replaced by U+FFFD.
    pub fn replaced(&self) -> u64 {
        self.replaced
    }

    /// Reads lines until a frame is whole.
    fn advance(&mut self) -> Result<Option<Fields>, SseError> {
        if !self.begun {
            if self.buffer.len() < BOM.len() && BOM.starts_with(&self.buffer) {
                return Ok(None);
            }
            self.begun = true;
            if self.buffer.starts_with(BOM) {
                self.start_frame(BOM.len());
            }
        }
        loop {
            if self.after_cr && self.line < self.buffer.len() {
                self.after_cr = false;
                if self.buffer.get(self.line) == Some(&b'\n') {
                    self.line += 1;
                    self.searched = self.line;
                    if matches!(self.fields, Fields { data: Data::None, event: None, id: None }) {
                        self.frame = self.line;
                    }
                }
            }
            let found = self.buffer.get(self.searched..).and_then(|rest| memchr2(b'\n', b'\r', rest));
            let end = found.map_or(self.buffer.len(), |at| self.searched + at);
            if end - self.line > self.limits.max_line {
                return Err(SseError::LineTooLong(self.limits.max_line));
            }
            if end - self.frame > self.limits.max_event {
                return Err(SseError::EventTooLarge(self.limits.max_event));
            }
            if found.is_none() {
                self.searched = end;
                return Ok(None);
            }
            self.after_cr = self.buffer.get(end) == Some(&b'\r');
            let line = self.line..end;
            self.line = end + 1;
            self.searched = self.line;
            if !line.is_empty() {
                self.read_line(line);
                continue;
            }
            let fields = std::mem::take(&mut self.fields);
            if !matches!(fields.data, Data::None) {
                return Ok(Some(fields));
            }
            // A frame without data is none (step "If the data buffer is an empty string"): its name and id go with it.
            self.start_frame(self.line);
        }
    }

    fn start_frame(&mut self, at: usize) {
        (self.frame, self.line, self.searched) = (at, at, at);
    }

    fn read_line(&mut self, line: Range<usize>) {
        let Some(bytes) = self.buffer.get(line.clone()) else { return };
        let (name, value) = match bytes {
            // Nearly every line, so it is spared the search for the colon.
            [b'd', b'a', b't', b'a', b':', ..] => (&b"data"[..], line.start + 5..line.end),
            _ => match memchr(b':', bytes) {
                Some(colon) => (bytes.get(..colon).unwrap_or_default(), line.start + colon + 1..line.end),
                None => (bytes, line.end..line.end),
            },
        };
        let value = if self.buffer.get(value.start) == Some(&b' ') && !value.is_empty() { value.start + 1..value.end } else { value };
        let relative = value.start - self.frame..value.end - self.frame;
        match name {
            b"data" => match std::mem::take(&mut self.fields.data) {
                Data::None => self.fields.data = Data::Line(relative),
                before => {
                    if let Data::Line(first) = before {
                        self.joined.clear();
                        let first = self.frame + first.start..self.frame + first.end;
                        self.joined.extend_from_slice(self.buffer.get(first).unwrap_or_default());
                    }
                    self.joined.push(b'\n');
                    self.joined.extend_from_slice(self.buffer.get(value).unwrap_or_default());
                    self.fields.data = Data::Joined;
                }
            },
            b"event" => self.fields.event = Some(relative),
            b"id" => {
                if memchr(0, self.buffer.get(value).unwrap_or_default()).is_none() {
                    self.fields.id = Some(relative);
                }
            }
            b"" => {
                self.comments += 1;
                self.drop_idle_line();
            }
            _ => self.drop_idle_line(),
        }
    }

    /// A line that says nothing, before any that does, takes no room: a stream may be heartbeats alone for hours.
    fn drop_idle_line(&mut self) {
        if matches!(self.fields, Fields { data: Data::None, event: None, id: None }) {
            self.frame = self.line;
        }
    }

    fn lend(&mut self, fields: Fields) -> Frame<'_> {
        let start = self.frame;
        self.frame = self.line;
        let buffer = &self.buffer;
        let at = |range: Range<usize>| buffer.get(start + range.start..start + range.end).unwrap_or_default();
        let data = match fields.data {
            Data::None => &[][..],
            Data::Line(range) => at(range),
            Data::Joined => &self.joined,
        };
        let event = fields.event.map_or(&b""[..], at);
        let id = fields.id.map(at);
        let [data_text, event_text, id_text] = &mut self.replaced_text;
        let before = self.replaced;
        let frame = Frame {
            data: text(data, data_text, &mut self.replaced),
            event: match event {
                b"" => "message",
                name => text(name, event_text, &mut self.replaced),
            },
            id: id.map(|id| text(id, id_text, &mut self.replaced)),
        };
        self.replaced = self.replaced.min(before + 1);
        frame
    }
}

fn text<'a>(bytes: &'a [u8], replaced_text: &'a mut String, replaced: &mut u64) -> &'a str {
    match std::str::from_utf8(bytes) {
        Ok(text) => text,
        Err(_) => {
            *replaced += 1;
            replaced_text.clear();
            for chunk in bytes.utf8_chunks() {
                replaced_text.push_str(chunk.valid());
                if !chunk.invalid().is_empty() {
                    replaced_text.push(char::REPLACEMENT_CHARACTER);
                }
            }
            replaced_text
        }
    }
}

/// Writes one frame.
///
/// `data` is split at LF, CR and CRLF, one line each, so that none of it can begin a field or end the frame; names are
/// cut at the first control character.
pub fn encode(out: &mut Vec<u8>, id: Option<(&TurnId, u64)>, event: Option<&str>, data: &[u8]) {
    if let Some((turn, seq)) = id {
        out.extend_from_slice(b"id: ");
        turn.write(out);
        out.push(b':');
        super::json::number(out, seq);
        out.push(b'\n');
    }
    if let Some(event) = event {
        out.extend_from_slice(b"event: ");
        out.extend(event.bytes().take_while(|byte| !byte.is_ascii_control()));
        out.push(b'\n');
    }
    let mut rest = data;
    loop {
        out.extend_from_slice(b"data: ");
        let Some(end) = memchr2(b'\n', b'\r', rest) else {
            out.extend_from_slice(rest);
            out.extend_from_slice(b"\n\n");
            return;
        };
        let (line, tail) = rest.split_at(end);
        out.extend_from_slice(line);
        out.push(b'\n');
        rest = tail.strip_prefix(b"\r\n").unwrap_or_else(|| tail.get(1..).unwrap_or_default());
    }
}

/// Writes a heartbeat: a comment, with the blank line that keeps careless readers from gluing it to the next frame.
pub fn comment(out: &mut Vec<u8>) {
    out.extend_from_slice(b": \n\n");
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All frames of a stream that comes in these pieces, as `event|data|id`.
    fn frames<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Vec<String> {
        let mut decoder = Decoder::new(Limits::default());
        let mut frames = Vec::new();
        for piece in pieces {
            decoder.push(piece);
            while let Some(frame) = decoder.next().unwrap() {
                frames.push(format!("{}|{}|{}", frame.event, frame.data, frame.id.unwrap_or("-")));
            }
        }
        frames
    }

    #[test]
    fn every_way_of_cutting_gives_the_same_frames() {
        let stream = "\u{feff}: hi\r\nid: 1\r\nevent: text\r\ndata: a\u{20ac}\r\ndata:b\r\r\ndata\n\ndata: last\n\n".as_bytes();
        let expected = ["text|a\u{20ac}\nb|1", "message||-", "message|last|-"];
        for i in 0..=stream.len() {
            for j in i..=stream.len() {
                assert_eq!(frames([&stream[..i], &stream[i..j], &stream[j..]]), expected, "cut at {i} and {j}");
            }
        }
        assert_eq!(frames(stream.chunks(1)), expected);
    }
}
