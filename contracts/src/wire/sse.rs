//! Server-sent events: bytes to frames, however they are cut, and frames to bytes that nothing can be injected into.
//!
//! The format is the WHATWG HTML standard's, section 9.2.6 "Interpreting an event stream". Two fields of it are the business
//! of browsers alone and are dropped: `retry`, and the id that outlives its frame.

use std::ops::Range;

use memchr::{memchr, memchr2};

use crate::{Code, Fault, TurnId};

/// How much one line and one frame may hold, in bytes; the last line end does not count.
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

/// The room that is kept while nothing is unfinished.
const KEPT_BYTES: usize = 512;

const BOM: &[u8] = b"\xef\xbb\xbf";

/// Reads frames out of bytes.
///
/// `push` what was read, then call `next` until it gives `None`. A frame with one line of data is lent straight from the
/// buffer. Memory: [`Limits::max_event`] twice, and the largest push; half a KiB while nothing is unfinished. Work: every byte is
/// looked at a fixed number of times, even when they come one by one.
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

    /// A decoder for what follows a whole frame: goes on where one that [is there](Decoder::is_between) need not be kept.
    pub fn between(limits: Limits) -> Decoder {
        Decoder { begun: true, ..Decoder::new(limits) }
    }

    /// Whether the last whole frame is all that was read so far, so that any decoder could go on here.
    pub fn is_between(&self) -> bool {
        self.begun && self.buffer.is_empty() && !self.after_cr && self.failed.is_none()
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

    /// The next whole frame of what is unfinished and of `bytes`, which lose what it takes. `None`: they are all taken, and what they
    /// leave unfinished is kept. As [`Decoder::push`] and [`Decoder::next`], but that nearly no frame is copied.
    pub fn read<'a, 'b: 'a>(&'a mut self, bytes: &mut &'b [u8]) -> Result<Option<Frame<'a>>, SseError> {
        if let Some((frame, behind)) = self.whole(bytes) {
            *bytes = behind;
            return Ok(Some(frame));
        }
        if !bytes.is_empty() {
            self.push(std::mem::take(bytes));
        } else if self.buffer.is_empty() && self.failed.is_none() {
            return Ok(None);
        }
        self.next()
    }

    /// A frame at the front of `bytes` and what is behind it, where nothing is unfinished and it is whole and one line of data.
    fn whole<'a>(&mut self, bytes: &'a [u8]) -> Option<(Frame<'a>, &'a [u8])> {
        let is_between = matches!(self.fields, Fields { data: Data::None, event: None, id: None });
        if !is_between || self.line != self.buffer.len() || self.after_cr || self.failed.is_some() {
            return None;
        }
        let line = bytes.get(..memchr2(b'\n', b'\r', bytes)?)?;
        let behind = bytes.get(line.len()..)?.strip_prefix(b"\n\n")?;
        let data = line.strip_prefix(b"data:").filter(|_| line.len() <= self.limits.max_line.min(self.limits.max_event))?;
        let data = std::str::from_utf8(data.strip_prefix(b" ").unwrap_or(data)).ok()?;
        self.begun = true;
        Some((Frame { event: "message", data, id: None }, behind))
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
            Ok(None) => {
                self.give_back();
                Ok(None)
            }
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
            // Whichever limit lies first in the stream: so it is the same one however the stream is cut.
            let (line_limit, event_limit) = (self.line + self.limits.max_line, self.frame + self.limits.max_event);
            if end > self.line && end > line_limit.min(event_limit) {
                return Err(match event_limit < line_limit {
                    true => SseError::EventTooLarge(self.limits.max_event),
                    false => SseError::LineTooLong(self.limits.max_line),
                });
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

    /// Gives back the room that a burst took, once all of it has been lent: streams are idle most of the time.
    fn give_back(&mut self) {
        if self.frame == self.buffer.len() {
            self.buffer.clear();
            if self.buffer.capacity() > KEPT_BYTES {
                self.buffer = Vec::new();
            }
            self.start_frame(0);
        }
        let is_joining = matches!(self.fields.data, Data::Joined);
        if !is_joining && self.joined.capacity() > KEPT_BYTES {
            self.joined = Vec::new();
        }
        for text in &mut self.replaced_text {
            if text.capacity() > KEPT_BYTES {
                *text = String::new();
            }
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

    type Frames = (Vec<String>, Option<SseError>);

    /// The frames, which are the same whether the pieces are pushed or read where they stand, and whoever goes on between two frames.
    #[track_caller]
    fn read(limits: Limits, pieces: &mut dyn Iterator<Item = &[u8]>) -> Frames {
        let pieces: Vec<&[u8]> = pieces.collect();
        let pushed = read_with(limits, &pieces, |decoder, piece| decoder.push(std::mem::take(piece)));
        assert_eq!(read_with(limits, &pieces, |_, _| ()), pushed, "read where they stand");
        let anew = |decoder: &mut Decoder, _: &mut &[u8]| {
            if decoder.is_between() {
                *decoder = Decoder::between(limits);
            }
        };
        assert_eq!(read_with(limits, &pieces, anew), pushed, "by another decoder");
        pushed
    }

    fn read_with(limits: Limits, pieces: &[&[u8]], mut first: impl FnMut(&mut Decoder, &mut &[u8])) -> Frames {
        let mut decoder = Decoder::new(limits);
        let mut frames = Vec::new();
        for mut piece in pieces.iter().copied() {
            first(&mut decoder, &mut piece);
            loop {
                match decoder.read(&mut piece) {
                    Ok(Some(frame)) => frames.push(format!("{}|{}|{}", frame.event, frame.data, frame.id.unwrap_or("-"))),
                    Ok(None) => break,
                    Err(error) => return (frames, Some(error)),
                }
            }
        }
        (frames, None)
    }

    /// All frames of a stream, as `event|data|id`, which are the same however it is cut.
    #[track_caller]
    fn check(stream: &[u8], expected: &[&str]) {
        let whole = read(Limits::default(), &mut [stream].into_iter());
        assert_eq!(whole, (expected.iter().map(|frame| (*frame).to_owned()).collect(), None), "{:?}", String::from_utf8_lossy(stream));
        assert_eq!(read(Limits::default(), &mut stream.chunks(1)), whole, "byte by byte");
        for i in 0..=stream.len() {
            assert_eq!(read(Limits::default(), &mut [&stream[..i], &stream[i..]].into_iter()), whole, "cut at {i}");
        }
    }

    #[test]
    fn every_way_of_cutting_a_stream_in_three_gives_the_same_frames() {
        let stream = "\u{feff}: hi\r\nid: 1\r\nevent: text\r\ndata: a\u{20ac}\r\ndata:b\r\r\ndata\n\ndata: last\n\n".as_bytes();
        let expected = ["text|a\u{20ac}\nb|1", "message||-", "message|last|-"];
        for i in 0..=stream.len() {
            for j in i..=stream.len() {
                let (frames, _) = read(Limits::default(), &mut [&stream[..i], &stream[i..j], &stream[j..]].into_iter());
                assert_eq!(frames, expected, "cut at {i} and {j}");
            }
        }
    }

    #[test]
    fn lines_end_with_any_of_three_ends() {
        check(b"data: a\n\ndata: b\n\n", &["message|a|-", "message|b|-"]);
        check(b"data: a\r\rdata: b\r\r", &["message|a|-", "message|b|-"]);
        check(b"data: a\r\n\r\ndata: b\r\n\r\n", &["message|a|-", "message|b|-"]);
        check(b"data: a\r\n\rdata: b\n\r\n", &["message|a|-", "message|b|-"]);
        check(b"\r\n\r\n\n\r\rdata: a\n\n\n\n", &["message|a|-"]);
    }

    #[test]
    fn fields_are_read_as_the_standard_says() {
        check(b"data:x\n\n", &["message|x|-"]);
        check(b"data:  x\n\n", &["message| x|-"]);
        check(b"data:\n\n", &["message||-"]);
        check(b"data\n\n", &["message||-"]);
        check(b"data\ndata\n\n", &["message|\n|-"]);
        check(b"data: a\ndata: b\ndata: c\n\ndata: d\n\n", &["message|a\nb\nc|-", "message|d|-"]);
        check(b"data: a: b\n\n", &["message|a: b|-"]);
        check(b"Data: x\ndata : x\n data: x\n\n", &[]);
        check(b"retry: 10\nfoo: bar\nfoo\ndata: x\n\n", &["message|x|-"]);
        check(b"event: a\nevent: b\ndata: x\n\ndata: y\n\n", &["b|x|-", "message|y|-"]);
        check(b"event:\ndata: x\n\n", &["message|x|-"]);
        check(b"event: lost\nid: 3\n\ndata: x\n\n", &["message|x|-"]);
        check(b"id: 7\ndata: x\n\ndata: y\n\n", &["message|x|7", "message|y|-"]);
        check(b"id: 7\nid: a\0b\nid\ndata: x\n\n", &["message|x|"]);
        check(b"id: 7\nid: a\0b\ndata: x\n\n", &["message|x|7"]);
    }

    #[test]
    fn a_mark_of_byte_order_is_dropped_once_and_only_at_the_start() {
        check(b"\xef\xbb\xbfdata: x\n\n", &["message|x|-"]);
        check(b"\xef\xbb\xbf\xef\xbb\xbfdata: x\n\n", &[]);
        check(b"data: x\n\n\xef\xbb\xbfdata: y\n\n", &["message|x|-"]);
        check(b"\xef\xbb\n\ndata: x\n\n", &["message|x|-"]);
    }

    #[test]
    fn only_truly_invalid_bytes_are_replaced() {
        check("data: \u{65e5}\u{1f600}\n\n".as_bytes(), &["message|\u{65e5}\u{1f600}|-"]);
        check(b"data: a\xffb\xe6\x97\n\n", &["message|a\u{fffd}b\u{fffd}|-"]);
        check(b"data: \xe6\x97\ndata: \xa5\n\n", &["message|\u{fffd}\n\u{fffd}|-"]);
        check(b"event: \xff\nid: \xfe\ndata: x\n\n", &["\u{fffd}|x|\u{fffd}"]);
        check(b"data: \xed\xa0\x80\n\n", &["message|\u{fffd}\u{fffd}\u{fffd}|-"]);
        let mut decoder = Decoder::new(Limits::default());
        decoder.push(b"event: \xff\ndata: \xff\n\ndata: x\n\n");
        while decoder.next().unwrap().is_some() {}
        assert_eq!(decoder.replaced(), 1);
    }

    #[test]
    fn comments_are_counted_and_never_a_frame() {
        check(b": ping\n\n:\n\n:x\ndata: a\n: in between\ndata: b\n\n", &["message|a\nb|-"]);
        let mut decoder = Decoder::new(Limits::default());
        decoder.push(b": ping\n\ndata: a\n:\n\n");
        assert_eq!(decoder.next().unwrap().map(|frame| frame.data.to_owned()).as_deref(), Some("a"));
        assert_eq!(decoder.comments(), 2);
    }

    #[test]
    fn a_line_over_the_limit_ends_the_stream_however_it_is_cut() {
        let limits = Limits { max_line: 16, max_event: 40 };
        for (stream, error) in [
            (&b"data: ok\n\ndata: 0123456789\n\ndata: never\n\n"[..], None),
            (b"data: ok\n\ndata: 01234567890\n\ndata: never\n\n", Some(SseError::LineTooLong(16))),
            (b"data: ok\n\n: 01234567890123456\n\ndata: never\n\n", Some(SseError::LineTooLong(16))),
            (b"data: ok\n\ndata: 01234567890", Some(SseError::LineTooLong(16))),
            (b"data: ok\n\ndata: 0\ndata: 1\ndata: 2\ndata: 3\ndata: 45\n\n", None),
            (b"data: ok\n\ndata: 0\ndata: 1\ndata: 2\ndata: 3\ndata: 456\n\n", Some(SseError::EventTooLarge(40))),
            (b"data: ok\n\ndata: 0\n:\n:\n:\n:\n:\n:\n:\n:\n:\n:\n:\n:\n:\n:\n:\n:\n:\n\n", Some(SseError::EventTooLarge(40))),
            (b"data: ok\n\ndata: 0123456789\ndata: 0123456789\n: 0123456789012345\n\n", Some(SseError::EventTooLarge(40))),
            (b"data: ok\n\n:\n:\n:\n:\n:\n:\n:\n:\n:\n:\n:\n:\n:\n:\n:\n:\n:\n:\n:\n:\n:\n\n", None),
        ] {
            let whole = read(limits, &mut [stream].into_iter());
            assert_eq!((whole.0[0].as_str(), whole.1), ("message|ok|-", error), "{:?}", String::from_utf8_lossy(stream));
            for i in 0..=stream.len() {
                assert_eq!(read(limits, &mut [&stream[..i], &stream[i..]].into_iter()), whole, "cut at {i}");
            }
            assert_eq!(read(limits, &mut stream.chunks(1)), whole);
        }
    }

    #[test]
    fn after_an_error_nothing_is_read_or_kept() {
        let mut decoder = Decoder::new(Limits { max_line: 8, max_event: 8 });
        decoder.push(b"data: too long");
        assert_eq!(decoder.next(), Err(SseError::LineTooLong(8)));
        decoder.push(b"\n\ndata: x\n\n");
        assert_eq!(decoder.next(), Err(SseError::LineTooLong(8)));
        assert_eq!(decoder.buffer.capacity(), 0);
    }

    #[test]
    fn a_line_that_comes_byte_by_byte_is_searched_once() {
        let mut decoder = Decoder::new(Limits::default());
        decoder.push(b"data: ");
        for _ in 0..100_000 {
            decoder.push(b"x");
            assert_eq!(decoder.next(), Ok(None));
            assert_eq!(decoder.searched, decoder.buffer.len());
        }
        decoder.push(b"\n\n");
        assert_eq!(decoder.next().unwrap().map(|frame| frame.data.len()), Some(100_000));
    }

    #[test]
    fn heartbeats_and_frames_without_end_take_no_more_room() {
        let mut decoder = Decoder::new(Limits::default());
        let mut room = 0;
        for round in 0..1000 {
            for piece in [": ping\n", "data: a\ndata: b\n\nev", "ent: x\ndata: c\n\n", ":\r", "\n"] {
                decoder.push(piece.as_bytes());
                while decoder.next().unwrap().is_some() {}
            }
            let now = decoder.buffer.capacity() + decoder.joined.capacity();
            assert!(round == 0 || now == room, "round {round}: {now} bytes, before it {room}");
            room = now;
        }
    }

    #[test]
    fn what_a_burst_took_is_given_back() {
        let mut decoder = Decoder::new(Limits::default());
        let mut burst = b"data: \xff\ndata: b\n\n".repeat(10_000);
        burst.extend_from_slice(&[&b"data: a\ndata: "[..], &[0xff; 60_000], b"\n\n:\r"].concat());
        decoder.push(&burst);
        while decoder.next().unwrap().is_some() {}
        let kept =
            decoder.buffer.capacity() + decoder.joined.capacity() + decoder.replaced_text.iter().map(String::capacity).sum::<usize>();
        assert!(kept <= 5 * KEPT_BYTES, "{kept} bytes");
        decoder.push(b"\ndata: x\n\n");
        assert_eq!(decoder.next().unwrap().map(|frame| frame.data.to_owned()).as_deref(), Some("x"));
    }

    #[test]
    fn a_cut_stream_has_unfinished_bytes_and_a_whole_one_has_none() {
        for (stream, unfinished) in [
            (&b""[..], false),
            (b"data: x\n\n", false),
            (b"data: x\r\n\r\n", false),
            (b"data: x\r\r", false),
            (b"data: x\n\n: ping", false),
            (b"data: x\n\n\r", false),
            (b"data: x\n", true),
            (b"data: x", true),
            (b"event: x\n", true),
            (b"id", true),
            (b"data: x\n\nd", true),
        ] {
            let mut decoder = Decoder::new(Limits::default());
            decoder.push(stream);
            while decoder.next().unwrap().is_some() {}
            assert_eq!(decoder.unfinished(), unfinished, "{:?}", String::from_utf8_lossy(stream));
        }
    }

    #[test]
    fn what_is_written_cannot_begin_a_field_or_end_its_frame() {
        let turn: TurnId = "0193a5f0-7e1c-7000-8000-000000000000".parse().unwrap();
        let mut out = Vec::new();
        encode(&mut out, Some((&turn, 3)), Some("text\ndata: no"), b"a\nid: no\rb\r\n\r\nevent: no");
        assert_eq!(
            String::from_utf8(out.clone()).unwrap(),
            "id: 0193a5f0-7e1c-7000-8000-000000000000:3\nevent: text\ndata: a\ndata: id: no\ndata: b\ndata: \ndata: event: no\n\n"
        );
        check(&out, &["text|a\nid: no\nb\n\nevent: no|0193a5f0-7e1c-7000-8000-000000000000:3"]);
    }

    #[test]
    fn an_empty_payload_is_a_frame_and_a_heartbeat_is_none() {
        let mut out = Vec::new();
        encode(&mut out, None, None, b"");
        comment(&mut out);
        encode(&mut out, None, None, b"\n");
        check(&out, &["message||-", "message|\n|-"]);
    }
}
