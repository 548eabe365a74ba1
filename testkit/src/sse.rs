//! Server-sent events as `docs/wire.md` spells them: LF, one space, `id`, `event`, `data` in this order, one line each.
//!
//! The WHATWG's format allows much more. Headgate promises to write only this, because some client falls over all the rest.

use crate::Broken;
use crate::broken::shown;

/// The largest event, in bytes; far above Headgate's own limit, so that a test of that limit sees its effect.
const MAX_EVENT_BYTES: usize = 16 << 20;

/// One event, as its lines say.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Frame {
    /// The `id:` line.
    pub id: Option<String>,
    /// The `event:` line.
    pub event: Option<String>,
    /// The `data:` line.
    pub data: String,
}

/// What stands between two blank lines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece {
    /// An event.
    Frame(Frame),
    /// A comment on its own, with its text.
    Comment(String),
}

/// Cuts a byte stream into pieces and refuses everything Headgate does not promise.
#[derive(Debug, Default)]
pub struct Reader {
    buffer: Vec<u8>,
    /// How far the buffer has been searched for a blank line.
    searched: usize,
}

impl Reader {
    /// Takes bytes as they came.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next piece; `None` while its end has not come.
    pub fn take(&mut self) -> Result<Option<Piece>, Broken> {
        if self.buffer.first() == Some(&b'\n') {
            return Err(Broken::Framing("a blank line that ends nothing".into()));
        }
        let Some(at) = self.buffer[self.searched..].windows(2).position(|pair| pair == b"\n\n") else {
            self.searched = self.buffer.len().saturating_sub(1);
            if self.buffer.len() > MAX_EVENT_BYTES {
                return Err(Broken::Framing(format!("an event of more than {MAX_EVENT_BYTES} bytes")));
            }
            return Ok(None);
        };
        let end = self.searched + at;
        let block: Vec<u8> = self.buffer.drain(..end + 2).take(end).collect();
        self.searched = 0;
        piece(&block).map(Some)
    }

    /// The stream has ended: nothing may be left over.
    pub fn closed(&self) -> Result<(), Broken> {
        if self.buffer.is_empty() { Ok(()) } else { Err(Broken::Cut(format!("in the middle of an event: {}", shown(&self.buffer)))) }
    }
}

fn piece(block: &[u8]) -> Result<Piece, Broken> {
    let wrong = |what: &str| Broken::Framing(format!("{what} in {}", shown(block)));
    let text = std::str::from_utf8(block).map_err(|_| wrong("invalid UTF-8"))?;
    if text.contains(['\r', '\0', '\u{feff}']) {
        return Err(wrong("a CR, a NUL or a byte order mark"));
    }
    if let Some(comment) = text.strip_prefix(':') {
        let comment = comment.strip_prefix(' ').ok_or_else(|| wrong("a comment without its space"))?;
        return if comment.contains('\n') { Err(wrong("a comment inside an event")) } else { Ok(Piece::Comment(comment.into())) };
    }
    let mut frame = Frame::default();
    let mut data = None;
    // Where in the order id, event, data the lines have come.
    let mut last = 0;
    for line in text.split('\n') {
        let (name, value) = line.split_once(": ").ok_or_else(|| wrong("a line that is no `field: value`"))?;
        let place = match name {
            "id" => 1,
            "event" => 2,
            "data" => 3,
            _ => return Err(wrong("a line that is not id, event or data")),
        };
        if place <= last {
            return Err(wrong("lines twice or out of order"));
        }
        last = place;
        match place {
            1 => frame.id = Some(value.into()),
            2 => frame.event = Some(value.into()),
            _ => data = Some(value.to_owned()),
        }
    }
    frame.data = data.ok_or_else(|| wrong("an event without data"))?;
    Ok(Piece::Frame(frame))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: &[u8]) -> Result<Vec<Piece>, Broken> {
        let mut reader = Reader::default();
        let mut pieces = Vec::new();
        for byte in bytes {
            reader.push(&[*byte]);
            while let Some(piece) = reader.take()? {
                pieces.push(piece);
            }
        }
        reader.closed()?;
        Ok(pieces)
    }

    #[test]
    fn events_and_heartbeats_are_read_byte_by_byte() {
        let pieces = read("id: t:0\nevent: open\ndata: {\"a\":\"ü: b\"}\n\n: \n\ndata: [DONE]\n\n".as_bytes()).unwrap();
        let open = Frame { id: Some("t:0".into()), event: Some("open".into()), data: "{\"a\":\"ü: b\"}".into() };
        let done = Frame { data: "[DONE]".into(), ..Frame::default() };
        assert_eq!(pieces, [Piece::Frame(open), Piece::Comment(String::new()), Piece::Frame(done)]);
    }

    #[test]
    fn every_looseness_is_refused() {
        for text in [
            "data:{}\n\n",
            "data: {}\r\n\r\n\n\n",
            "\u{feff}data: {}\n\n",
            "data: {}\n: \n\n",
            ": \ndata: {}\n\n",
            ":\n\n",
            "data: a\ndata: b\n\n",
            "event: text\nid: t:1\ndata: {}\n\n",
            "event: text\n\n",
            "retry: 10\ndata: {}\n\n",
            "data\n\n",
            "data: {}\n\n\n",
            "data: a\0\n\n",
        ] {
            assert!(matches!(read(text.as_bytes()), Err(Broken::Framing(_))), "{text:?}");
        }
        assert!(matches!(read(b"data: \xff\n\n"), Err(Broken::Framing(_))));
    }

    #[test]
    fn a_stream_cut_inside_an_event_is_cut() {
        assert!(matches!(read(b"data: {}\n\ndata: {"), Err(Broken::Cut(_))));
        assert!(matches!(read(b"data: {}\n"), Err(Broken::Cut(_))));
        assert_eq!(read(b"").unwrap(), []);
    }
}
