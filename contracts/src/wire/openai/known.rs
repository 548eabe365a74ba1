//! The one shape nearly every chunk of a stream has, read without a parser.
//!
//! It takes a chunk whose one choice says one piece of content or reasoning and whose other members are plain, in any order;
//! for anything else it gives up, and [`super::decode`] reads the payload again with a real parser. So it need not be
//! complete, but it must agree: a property test holds the two against each other. It is here because it costs a fifth.

use std::ops::Range;

use memchr::memchr2;

use crate::wire::walk::is_one_line;
use crate::{Batch, Channel, Event, Head, Lane, What};

/// Reads a chunk of the usual shape; whether it was one. If not, nothing has changed.
pub(super) fn decode_known(data: &str, head: &Head, batch: &mut Batch) -> bool {
    if decode_alike(data, batch) {
        return true;
    }
    if !is_one_line(data) {
        return false;
    }
    let mark = batch.mark();
    let mut cursor = Cursor { data, at: 0 };
    let said = chunk(&mut cursor, head, batch);
    match said.filter(|said| cursor.at == data.len() && !batch.text(said.text).is_empty()) {
        Some(Said { choice, channel, text, place }) => {
            batch.push(Event { what: What::Text { lane: Lane { choice, channel }, text }, raw: None });
            batch.keep_raw_since(mark, data);
            if place.len() == text.len() {
                batch.note_frame(place.start, data.len() - place.end);
            }
            true
        }
        None => {
            batch.rewind(mark);
            false
        }
    }
}

/// Reads a chunk that differs from the one before it in its words alone, as nearly all of a burst do: what was true of that one's
/// frame is true of this one's.
fn decode_alike(data: &str, batch: &mut Batch) -> bool {
    let Some((lane, before, after)) = batch.frame() else { return false };
    let is_framed = data.as_bytes().strip_prefix(before).is_some_and(|rest| rest.ends_with(after));
    let (before, after) = (before.len(), after.len());
    let words = data.get(before..data.len().saturating_sub(after)).filter(|words| is_framed && !words.is_empty());
    let Some(words) = words.filter(|words| is_one_line(words) && memchr2(b'"', b'\\', words.as_bytes()).is_none()) else { return false };
    let text = batch.keep_text(words);
    let raw = Some(batch.keep_wire(data.as_bytes()));
    batch.push(Event { what: What::Text { lane, text }, raw });
    batch.note_frame(before, after);
    true
}

struct Said {
    choice: u16,
    channel: Channel,
    text: crate::Span,
    /// Where the words stand in the payload, between quotes.
    place: Range<usize>,
}

/// Walks an object: `member` is called after each name, with its place in `names`, and must consume the value. Names are
/// spelled as they stand on the wire, with quotes and colon. A name may come once.
fn object<'a>(cursor: &mut Cursor<'a>, names: &[&str], mut member: impl FnMut(&mut Cursor<'a>, usize) -> Option<()>) -> Option<()> {
    let (mut seen, mut expected) = (0u32, 0);
    cursor.eat_byte(b'{')?;
    loop {
        // Servers write their members in one order, mostly this one: the search begins behind the last one found.
        let (before, after) = names.split_at_checked(expected)?;
        let rest = cursor.rest();
        let matches = |known: &&str| rest.get(1) == known.as_bytes().get(1) && rest.starts_with(known.as_bytes());
        let at = match after.iter().position(matches) {
            Some(at) => expected + at,
            None => before.iter().position(matches)?,
        };
        if seen & (1 << at) != 0 {
            return None;
        }
        seen |= 1 << at;
        expected = at + 1;
        cursor.at += names.get(at)?.len();
        cursor.space();
        member(cursor, at)?;
        if cursor.eat_byte(b'}').is_some() {
            return Some(());
        }
        cursor.eat_byte(b',')?;
        cursor.space();
    }
}

const CHUNK: &[&str] = &[
    r#""id":"#,
    r#""object":"#,
    r#""created":"#,
    r#""model":"#,
    r#""choices":"#,
    r#""system_fingerprint":"#,
    r#""usage":"#,
    r#""service_tier":"#,
];
const CHOICE: &[&str] = &[r#""index":"#, r#""delta":"#, r#""logprobs":"#, r#""finish_reason":"#, r#""stop_reason":"#, r#""token_ids":"#];
const DELTA: &[&str] =
    &[r#""content":"#, r#""reasoning_content":"#, r#""role":"#, r#""refusal":"#, r#""tool_calls":"#, r#""function_call":"#];

fn chunk(cursor: &mut Cursor<'_>, head: &Head, batch: &mut Batch) -> Option<Said> {
    let mut said = None;
    object(cursor, CHUNK, |cursor, name| match name {
        0 => cursor.eat_string(&head.id),
        1 => cursor.eat("\"chat.completion.chunk\""),
        // The parser fills an empty head.
        2 => (head.created != 0).then(|| cursor.digits())?,
        3 => cursor.eat_string(&head.model),
        4 => {
            cursor.eat_byte(b'[')?;
            said = Some(choice(cursor, batch)?);
            cursor.eat_byte(b']')
        }
        5 => cursor.eat("null").or_else(|| super::decode::is_name(cursor.bare_string()?).then_some(())),
        _ => cursor.eat("null"),
    })?;
    said
}

fn choice(cursor: &mut Cursor<'_>, batch: &mut Batch) -> Option<Said> {
    let (mut choice, mut said) = (0, None);
    object(cursor, CHOICE, |cursor, name| match name {
        0 => {
            let start = cursor.at;
            cursor.digits()?;
            choice = cursor.data.get(start..cursor.at)?.parse().ok().filter(|index| *index <= crate::wire::MAX_INDEX)?;
            Some(())
        }
        1 => object(cursor, DELTA, |cursor, name| match name {
            0 | 1 if cursor.eat("null").is_some() => Some(()),
            0 | 1 if said.is_some() => None,
            0 => {
                said = Some((Channel::Content, cursor.text(batch)?));
                Some(())
            }
            1 => {
                said = Some((Channel::Reasoning, cursor.text(batch)?));
                Some(())
            }
            2 => cursor.eat("\"assistant\""),
            _ => cursor.eat("null"),
        }),
        _ => cursor.eat("null"),
    })?;
    let (channel, (text, place)) = said?;
    Some(Said { choice, channel, text, place })
}

struct Cursor<'a> {
    data: &'a str,
    at: usize,
}

impl<'a> Cursor<'a> {
    fn rest(&self) -> &'a [u8] {
        self.data.as_bytes().get(self.at..).unwrap_or_default()
    }

    fn eat(&mut self, token: &str) -> Option<()> {
        self.rest().starts_with(token.as_bytes()).then(|| self.at += token.len())
    }

    fn eat_byte(&mut self, byte: u8) -> Option<()> {
        (self.rest().first() == Some(&byte)).then(|| self.at += 1)
    }

    /// These words in quotes, which are words of a [`Head`]: nothing in them is ever escaped.
    fn eat_string(&mut self, words: &str) -> Option<()> {
        self.eat_byte(b'"')?;
        self.eat(words)?;
        self.eat_byte(b'"')
    }

    /// One space, as Python's `json.dumps` puts after `:` and `,`.
    fn space(&mut self) {
        if self.rest().first() == Some(&b' ') {
            self.at += 1;
        }
    }

    /// A number without sign, fraction or exponent, and small enough for anybody.
    fn digits(&mut self) -> Option<()> {
        let rest = self.rest();
        let many = rest.iter().position(|byte| !byte.is_ascii_digit()).unwrap_or(rest.len());
        let plain = matches!((many, rest.first()), (1, _) | (2..=15, Some(b'1'..=b'9')));
        let ends = matches!(rest.get(many), Some(b',' | b'}'));
        (plain && ends).then(|| self.at += many)
    }

    /// A string without escapes.
    fn bare_string(&mut self) -> Option<&'a str> {
        let inner = self.rest().strip_prefix(b"\"")?;
        let end = memchr2(b'"', b'\\', inner)?;
        if inner.get(end) != Some(&b'"') {
            return None;
        }
        let start = self.at + 1;
        self.at = start + end + 1;
        self.data.get(start..start + end)
    }

    /// A string, into the batch, and where it stands.
    fn text(&mut self, batch: &mut Batch) -> Option<(crate::Span, Range<usize>)> {
        self.eat_byte(b'"')?;
        let (start, mut ok) = (self.at, None);
        let span = batch.keep_text_with(|out| ok = self.unescape(out));
        ok.map(|()| (span, start..self.at - 1))
    }

    fn unescape(&mut self, out: &mut String) -> Option<()> {
        loop {
            let end = self.at + memchr2(b'"', b'\\', self.rest())?;
            out.push_str(self.data.get(self.at..end)?);
            self.at = end + 1;
            if self.data.as_bytes().get(end) == Some(&b'"') {
                return Some(());
            }
            let escape = *self.rest().first()?;
            self.at += 1;
            out.push(match escape {
                b'"' | b'\\' | b'/' => char::from(escape),
                b'n' => '\n',
                b't' => '\t',
                b'r' => '\r',
                b'b' => '\u{8}',
                b'f' => '\u{c}',
                b'u' => self.escaped_char()?,
                _ => return None,
            });
        }
    }

    /// What `\u` stands for; a half of a surrogate pair alone is left to the parser.
    fn escaped_char(&mut self) -> Option<char> {
        let first = self.hex4()?;
        if !(0xd800..0xdc00).contains(&first) {
            return char::from_u32(first);
        }
        self.eat("\\u")?;
        let second = self.hex4()?;
        let low = second.checked_sub(0xdc00).filter(|low| *low < 0x400)?;
        char::from_u32(0x10000 + ((first - 0xd800) << 10) + low)
    }

    fn hex4(&mut self) -> Option<u32> {
        let digits = self.data.get(self.at..self.at + 4)?;
        self.at += 4;
        // `from_str_radix` would take a sign.
        digits.bytes().all(|byte| byte.is_ascii_hexdigit()).then(|| u32::from_str_radix(digits, 16).ok())?
    }
}
