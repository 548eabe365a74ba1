//! HTTP/1.1 responses, read strictly: what two readers could understand differently is refused (RFC 9112, sections 2 to 7).
//!
//! Without I/O. Written for answers that come in thousands of small pieces: the head is parsed by `httparse`, the body's frame
//! is stripped in place, and nothing is kept between two reads but a few numbers. `docs/decisions/0040-answers-are-read-by-hand.md`
//! has the measurements.

use http::{
    HeaderMap, HeaderName, HeaderValue, StatusCode,
    header::{CONNECTION, CONTENT_LENGTH, TRANSFER_ENCODING},
};
use memchr::memchr;

/// Why a response is not one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Malformed {
    #[error("the response head is larger than {0} bytes")]
    HeadTooLarge(usize),
    #[error("the response head has more than {0} fields")]
    TooManyFields(usize),
    #[error("the response head is not HTTP/1: {0}")]
    Head(httparse::Error),
    #[error("a line of the response head ends without a carriage return")]
    BareLineFeed,
    #[error("the response has both a length and a transfer encoding")]
    LengthAndEncoding,
    #[error("the response's length is not one number")]
    Length,
    #[error("the response's transfer encoding is not `chunked` alone")]
    Encoding,
    #[error("the response has a transfer encoding in HTTP/1.0")]
    EncodingInOld,
    #[error("more than {MAX_INTERIM} interim responses")]
    TooManyInterim,
    #[error("the protocol was switched without being asked")]
    Switched,
    #[error("a chunk's size is not a hexadecimal number of at most 63 bits")]
    ChunkSize,
    #[error("a chunk does not end where it says")]
    ChunkEnd,
    #[error("chunk extensions or trailers are over the limit")]
    ChunkExtras,
}

/// Responses 1xx before the one that counts.
const MAX_INTERIM: u32 = 8;

/// A response head, and how its body is framed.
#[derive(Debug)]
pub(crate) struct ResponseHead {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Framing,
    /// Whether the connection may carry another request after the body.
    pub(crate) keep: bool,
}

/// Gathers a response head from any cutting of it.
pub(crate) struct HeadReader {
    buffer: Vec<u8>,
    /// Where the line being read begins, and how far it has been searched for its end.
    line: usize,
    searched: usize,
    interim: u32,
    max_bytes: usize,
    max_fields: usize,
}

impl HeadReader {
    pub(crate) fn new(max_bytes: usize, max_fields: usize) -> HeadReader {
        HeadReader { buffer: Vec::new(), line: 0, searched: 0, interim: 0, max_bytes, max_fields }
    }

    /// Whether any byte of a response has come.
    pub(crate) fn begun(&self) -> bool {
        !self.buffer.is_empty() || self.interim > 0
    }

    /// Takes what was read. Once the head is whole: the head, and how many of these bytes belong to it; the rest is body.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> Result<Option<(ResponseHead, usize)>, Malformed> {
        let mut taken = 0;
        loop {
            let rest = bytes.get(taken..).unwrap_or_default();
            let Some(end) = self.take_lines(rest)? else { return Ok(None) };
            taken += end;
            let head = parse(&self.buffer, self.max_fields)?;
            if !head.status.is_informational() {
                return Ok(Some((head, taken)));
            }
            if head.status == StatusCode::SWITCHING_PROTOCOLS {
                return Err(Malformed::Switched);
            }
            self.interim += 1;
            if self.interim > MAX_INTERIM {
                return Err(Malformed::TooManyInterim);
            }
            self.buffer.clear();
            (self.line, self.searched) = (0, 0);
        }
    }

    /// Appends up to and including the empty line that ends a head; gives how many bytes that took.
    fn take_lines(&mut self, bytes: &[u8]) -> Result<Option<usize>, Malformed> {
        let before = self.buffer.len();
        // One byte more than allowed is enough to know.
        let room = self.max_bytes.saturating_add(1).saturating_sub(before);
        self.buffer.extend_from_slice(bytes.get(..room).unwrap_or(bytes));
        while let Some(at) = memchr(b'\n', self.buffer.get(self.searched..).unwrap_or_default()) {
            let end = self.searched + at;
            let line = self.buffer.get(self.line..end).unwrap_or_default();
            if line.last() != Some(&b'\r') {
                return Err(Malformed::BareLineFeed);
            }
            let empty = line.len() == 1;
            (self.line, self.searched) = (end + 1, end + 1);
            if empty && end < self.max_bytes {
                self.buffer.truncate(end + 1);
                return Ok(Some(end + 1 - before));
            }
        }
        self.searched = self.buffer.len();
        if self.buffer.len() > self.max_bytes { Err(Malformed::HeadTooLarge(self.max_bytes)) } else { Ok(None) }
    }
}

fn parse(bytes: &[u8], max_fields: usize) -> Result<ResponseHead, Malformed> {
    let mut fields = vec![httparse::EMPTY_HEADER; max_fields];
    let mut response = httparse::Response::new(&mut fields);
    match response.parse(bytes) {
        Ok(httparse::Status::Complete(_)) => {}
        Ok(httparse::Status::Partial) => return Err(Malformed::Head(httparse::Error::NewLine)),
        Err(httparse::Error::TooManyHeaders) => return Err(Malformed::TooManyFields(max_fields)),
        Err(error) => return Err(Malformed::Head(error)),
    }
    let status = response.code.and_then(|code| StatusCode::from_u16(code).ok()).ok_or(Malformed::Head(httparse::Error::Status))?;
    let mut headers = HeaderMap::with_capacity(response.headers.len());
    for field in response.headers.iter() {
        let name = HeaderName::from_bytes(field.name.as_bytes()).map_err(|_| Malformed::Head(httparse::Error::HeaderName))?;
        let value = HeaderValue::from_bytes(field.value).map_err(|_| Malformed::Head(httparse::Error::HeaderValue))?;
        headers.append(name, value);
    }
    let old = response.version == Some(0);
    let body = framing(status, &headers, old)?;
    let close = headers
        .get_all(CONNECTION)
        .iter()
        .any(|value| value.to_str().map_or(true, |text| text.split(',').any(|option| option.trim().eq_ignore_ascii_case("close"))));
    let keep = !old && !close && !matches!(body, Framing::UntilClose);
    Ok(ResponseHead { status, headers, body, keep })
}

/// RFC 9112 section 6.3, without the leniencies.
fn framing(status: StatusCode, headers: &HeaderMap, old: bool) -> Result<Framing, Malformed> {
    let encoding = one(headers, &TRANSFER_ENCODING).map_err(|_| Malformed::Encoding)?;
    let length = one(headers, &CONTENT_LENGTH).map_err(|_| Malformed::Length)?;
    let length = length.map(|text| digits(text).ok_or(Malformed::Length)).transpose()?;
    match (encoding, length) {
        (Some(_), Some(_)) => Err(Malformed::LengthAndEncoding),
        (Some(_), None) if old => Err(Malformed::EncodingInOld),
        (Some(coding), None) if !coding.eq_ignore_ascii_case("chunked") => Err(Malformed::Encoding),
        _ if status == StatusCode::NO_CONTENT || status == StatusCode::NOT_MODIFIED => Ok(Framing::Ended),
        (Some(_), None) => Ok(Framing::Chunked(Chunk::Size { size: 0, digits: 0 })),
        (None, Some(0)) => Ok(Framing::Ended),
        (None, Some(length)) => Ok(Framing::Length(length)),
        (None, None) => Ok(Framing::UntilClose),
    }
}

/// The one value of a field that may stand once; an error where it stands twice or is not text.
fn one<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Result<Option<&'a str>, ()> {
    let mut values = headers.get_all(name).iter();
    match (values.next(), values.next()) {
        (None, _) => Ok(None),
        (Some(value), None) => value.to_str().map(Some).map_err(drop),
        (Some(_), Some(_)) => Err(()),
    }
}

/// A length: digits alone (no sign, no list), below 2^63.
fn digits(text: &str) -> Option<u64> {
    let plain = !text.is_empty() && text.len() <= 18 && text.bytes().all(|byte| byte.is_ascii_digit());
    plain.then(|| text.parse().ok()).flatten()
}

/// Where a body stands within its frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Framing {
    /// So many bytes are left.
    Length(u64),
    /// In a chunked body.
    Chunked(Chunk),
    /// Until the connection ends.
    UntilClose,
    /// Nothing is left: what follows belongs to the next response.
    Ended,
}

/// Where in a chunked body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Chunk {
    Size {
        size: u64,
        digits: u8,
    },
    Extension {
        size: u64,
        bytes: u16,
    },
    SizeEnd {
        size: u64,
    },
    Data {
        left: u64,
    },
    DataReturn,
    DataEnd,
    /// At the start of a trailer line, or of the empty one that ends it all.
    Trailer {
        bytes: u16,
    },
    TrailerLine {
        bytes: u16,
    },
    TrailerLineEnd {
        bytes: u16,
    },
    LastEnd,
}

/// The most bytes of one chunk's extensions, and of all trailers: both are skipped.
const MAX_EXTRAS: u16 = 4096;

impl Framing {
    /// Strips the frame from `input`: how many bytes were used, and the body's bytes among them. Call again with the rest
    /// until nothing is left or the body has ended.
    pub(crate) fn strip<'a>(&mut self, input: &'a [u8]) -> Result<(usize, &'a [u8]), Malformed> {
        match self {
            Framing::Ended => Ok((0, &[])),
            Framing::UntilClose => Ok((input.len(), input)),
            Framing::Length(left) => {
                let data = prefix(input, *left);
                *left -= data.len() as u64;
                if *left == 0 {
                    *self = Framing::Ended;
                }
                Ok((data.len(), data))
            }
            Framing::Chunked(chunk) => {
                let (used, data, ended) = chunk.strip(input)?;
                if ended {
                    *self = Framing::Ended;
                }
                Ok((used, data))
            }
        }
    }

    pub(crate) fn ended(&self) -> bool {
        matches!(self, Framing::Ended)
    }

    /// Whether the connection's end is the body's proper end here.
    pub(crate) fn may_close(&self) -> bool {
        matches!(self, Framing::Ended | Framing::UntilClose)
    }
}

impl Chunk {
    /// As [`Framing::strip`], and whether the body has ended.
    fn strip<'a>(&mut self, input: &'a [u8]) -> Result<(usize, &'a [u8], bool), Malformed> {
        if let Chunk::Size { digits: 0, .. } = self
            && let Some((used, data)) = whole(input)
        {
            return Ok((used, data, false));
        }
        let mut used = 0;
        while let Some(&byte) = input.get(used) {
            if let Chunk::Data { left } = *self {
                let data = prefix(input.get(used..).unwrap_or_default(), left);
                let left = left - data.len() as u64;
                *self = if left == 0 { Chunk::DataReturn } else { Chunk::Data { left } };
                return Ok((used + data.len(), data, false));
            }
            used += 1;
            *self = match (*self, byte) {
                (Chunk::Size { size, digits }, digit) if digit.is_ascii_hexdigit() => {
                    // 15 digits are 60 bits: no sum of ours can overflow, and no chunk is that large.
                    if digits == 15 {
                        return Err(Malformed::ChunkSize);
                    }
                    let digit = (digit as char).to_digit(16).unwrap_or(0);
                    Chunk::Size { size: size << 4 | u64::from(digit), digits: digits + 1 }
                }
                (Chunk::Size { digits: 0, .. }, _) => return Err(Malformed::ChunkSize),
                (Chunk::Size { size, .. }, b'\r') => Chunk::SizeEnd { size },
                (Chunk::Size { size, .. }, b';' | b' ' | b'\t') => Chunk::Extension { size, bytes: 0 },
                (Chunk::Size { .. }, _) => return Err(Malformed::ChunkSize),
                (Chunk::Extension { size, .. }, b'\r') => Chunk::SizeEnd { size },
                (Chunk::Extension { .. }, b'\n') => return Err(Malformed::BareLineFeed),
                (Chunk::Extension { size, bytes }, _) => Chunk::Extension { size, bytes: extra(bytes)? },
                (Chunk::SizeEnd { size: 0 }, b'\n') => Chunk::Trailer { bytes: 0 },
                (Chunk::SizeEnd { size }, b'\n') => Chunk::Data { left: size },
                (Chunk::DataReturn, b'\r') => Chunk::DataEnd,
                (Chunk::DataEnd, b'\n') => Chunk::Size { size: 0, digits: 0 },
                (Chunk::Trailer { .. }, b'\r') => Chunk::LastEnd,
                (Chunk::Trailer { .. } | Chunk::TrailerLine { .. }, b'\n') => return Err(Malformed::BareLineFeed),
                (Chunk::TrailerLine { bytes }, b'\r') => Chunk::TrailerLineEnd { bytes },
                (Chunk::Trailer { bytes } | Chunk::TrailerLine { bytes }, _) => Chunk::TrailerLine { bytes: extra(bytes)? },
                (Chunk::TrailerLineEnd { bytes }, b'\n') => Chunk::Trailer { bytes },
                (Chunk::LastEnd, b'\n') => return Ok((used, &[], true)),
                (Chunk::SizeEnd { .. } | Chunk::DataReturn | Chunk::DataEnd | Chunk::TrailerLineEnd { .. } | Chunk::LastEnd, _) => {
                    return Err(Malformed::ChunkEnd);
                }
                (data @ Chunk::Data { .. }, _) => data,
            };
        }
        Ok((used, &[], false))
    }
}

/// A chunk that is here from its size to the end of its line, as nearly all are, and how many bytes it takes; not the last one.
fn whole(input: &[u8]) -> Option<(usize, &[u8])> {
    let (mut size, mut digits) = (0, 0);
    while let Some(digit) = char::from(*input.get(digits)?).to_digit(16) {
        // 7 digits are 28 bits; nothing as large is here whole.
        if digits == 7 {
            return None;
        }
        (size, digits) = (size << 4 | digit as usize, digits + 1);
    }
    let rest = input.get(digits..)?.strip_prefix(b"\r\n")?;
    let (data, rest) = rest.split_at_checked(size)?;
    rest.strip_prefix(b"\r\n").filter(|_| size > 0).map(|rest| (input.len() - rest.len(), data))
}

fn extra(bytes: u16) -> Result<u16, Malformed> {
    if bytes < MAX_EXTRAS { Ok(bytes + 1) } else { Err(Malformed::ChunkExtras) }
}

fn prefix(input: &[u8], most: u64) -> &[u8] {
    let most = usize::try_from(most).unwrap_or(usize::MAX);
    input.get(..most).unwrap_or(input)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    type Read = Result<Option<(u16, Vec<u8>, Framing)>, Malformed>;

    /// Reads a response cut into `pieces`: status, body, and where the body stands at the end of the input.
    fn read<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Read {
        let mut reader = HeadReader::new(512, 8);
        let mut body = Vec::new();
        let mut begun: Option<ResponseHead> = None;
        for piece in pieces {
            let mut rest = piece;
            if begun.is_none() {
                let Some((head, used)) = reader.push(rest)? else { continue };
                begun = Some(head);
                rest = &rest[used..];
            }
            let head = begun.as_mut().unwrap();
            while !rest.is_empty() && !head.body.ended() {
                let (used, data) = head.body.strip(rest)?;
                assert!(used > 0, "no progress within a body");
                body.extend_from_slice(data);
                rest = &rest[used..];
            }
        }
        Ok(begun.map(|head| (head.status.as_u16(), body, head.body)))
    }

    fn whole(bytes: &[u8]) -> Read {
        read([bytes])
    }

    fn response(head: &str, body: &str) -> Vec<u8> {
        format!("HTTP/1.1 {head}\r\n\r\n{body}").into_bytes()
    }

    #[test]
    fn every_cutting_of_a_response_reads_the_same() {
        for bytes in [
            response("200 OK\r\ntransfer-encoding: Chunked", "3;a=b\r\nabc\r\nA \r\n0123456789\r\n0\r\nx: y\r\nz:\r\n\r\nnext"),
            response("200\r\ncontent-length: 4", "abcdnext"),
            response("200 OK", "until the end"),
            [response("103 Early Hints\r\na: b", ""), response("204 No Content", "next")].concat(),
        ] {
            let expected = whole(&bytes);
            assert!(matches!(expected, Ok(Some(_))), "{expected:?}");
            for a in 0..=bytes.len() {
                for b in a..=bytes.len() {
                    assert_eq!(read([&bytes[..a], &bytes[a..b], &bytes[b..]]), expected, "cut at {a} and {b}");
                }
            }
            assert_eq!(read(bytes.chunks(1)), expected);
        }
    }

    #[test]
    fn a_body_is_what_its_frame_says() {
        let read =
            |head: &str, body: &str| whole(&response(head, body)).unwrap().map(|(_, body, at)| (String::from_utf8(body).unwrap(), at));
        assert_eq!(read("200 OK\r\ncontent-length: 2", "abc"), Some(("ab".into(), Framing::Ended)));
        assert_eq!(read("200 OK\r\ncontent-length: 5", "abc"), Some(("abc".into(), Framing::Length(2))));
        assert_eq!(read("200 OK\r\ncontent-length: 0", "abc"), Some((String::new(), Framing::Ended)));
        assert_eq!(read("204 No Content\r\ncontent-length: 5", "abc"), Some((String::new(), Framing::Ended)));
        assert_eq!(read("200 OK", "abc"), Some(("abc".into(), Framing::UntilClose)));
    }

    #[test]
    fn what_two_readers_could_understand_differently_is_refused() {
        let chunked = |body: &str| whole(&response("200 OK\r\ntransfer-encoding: chunked", body)).unwrap_err();
        let head = |head: &str| whole(&response(head, "")).unwrap_err();
        assert_eq!(head("200 OK\r\ncontent-length: 5\r\ntransfer-encoding: chunked"), Malformed::LengthAndEncoding);
        assert_eq!(head("200 OK\r\ncontent-length: 5, 5"), Malformed::Length);
        assert_eq!(head("200 OK\r\ncontent-length: 0x5"), Malformed::Length);
        assert_eq!(head("200 OK\r\ncontent-length: -5"), Malformed::Length);
        assert_eq!(head("200 OK\r\ncontent-length: 99999999999999999999"), Malformed::Length);
        assert_eq!(head("200 OK\r\ntransfer-encoding: chunked\r\ntransfer-encoding: chunked"), Malformed::Encoding);
        assert_eq!(head("200 OK\r\ntransfer-encoding: chunked;q=1"), Malformed::Encoding);
        assert_eq!(whole(b"HTTP/1.0 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"), Err(Malformed::EncodingInOld));
        assert_eq!(chunked("+3\r\nabc\r\n"), Malformed::ChunkSize);
        assert_eq!(chunked("0x3\r\nabc\r\n"), Malformed::ChunkSize);
        assert_eq!(chunked(";a\r\n"), Malformed::ChunkSize);
        assert_eq!(chunked("0000000000000003\r\n"), Malformed::ChunkSize);
        assert_eq!(chunked("3\nabc"), Malformed::ChunkSize);
        assert_eq!(chunked("3;a\nabc"), Malformed::BareLineFeed);
        assert_eq!(chunked("3\r\nabcd\r\n"), Malformed::ChunkEnd);
        assert_eq!(chunked("3\r\nabc\n"), Malformed::ChunkEnd);
        assert_eq!(chunked("0\r\n\n"), Malformed::BareLineFeed);
        assert_eq!(chunked("0\r\nx: y\n"), Malformed::BareLineFeed);
        assert_eq!(chunked(&format!("3;{}", "a".repeat(5000))), Malformed::ChunkExtras);
        assert_eq!(chunked(&format!("0\r\n{}", "a: b\r\n".repeat(2000))), Malformed::ChunkExtras);
        assert_eq!(head("101 Switching Protocols"), Malformed::Switched);
        assert_eq!(whole(&response("100 Continue", "").repeat(9)), Err(Malformed::TooManyInterim));
        assert_eq!(whole(b"HTTP/1.1 200 OK\na: b\n\n"), Err(Malformed::BareLineFeed));
        assert!(matches!(head("200 OK\r\na: b\r\n c"), Malformed::Head(_)));
        assert!(matches!(head("200 OK\r\na : b"), Malformed::Head(_)));
        assert!(matches!(head("200 OK\r\na: b\0c"), Malformed::Head(_)));
        assert!(matches!(head("200 OK\r\na: b\rc"), Malformed::Head(_)));
    }

    #[test]
    fn a_head_is_bounded_in_bytes_and_in_fields_however_it_is_cut() {
        let long = response(&format!("200 OK\r\na: {}", "b".repeat(600)), "");
        assert_eq!(whole(&long), Err(Malformed::HeadTooLarge(512)));
        assert_eq!(read(long.chunks(1)), Err(Malformed::HeadTooLarge(512)));
        // Exactly as long as allowed is allowed; a body behind it does not count.
        let most = response(&format!("200 OK\r\na: {}", "b".repeat(512 - 24)), "");
        assert_eq!(most.len(), 512);
        assert!(whole(&[most.as_slice(), &[b'x'; 1000]].concat()).unwrap().is_some());
        assert_eq!(whole(&response(&format!("200 OK{}", "\r\na: b".repeat(9)), "")), Err(Malformed::TooManyFields(8)));
    }

    #[test]
    fn a_connection_is_kept_only_when_both_sides_can_tell_where_the_body_ends() {
        let keep = |head: &str| HeadReader::new(512, 8).push(head.as_bytes()).unwrap().unwrap().0.keep;
        assert!(keep("HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\n"));
        assert!(!keep("HTTP/1.1 200 OK\r\n\r\n"));
        assert!(!keep("HTTP/1.0 200 OK\r\ncontent-length: 1\r\nconnection: keep-alive\r\n\r\n"));
        assert!(!keep("HTTP/1.1 200 OK\r\ncontent-length: 1\r\nconnection: x, Close\r\n\r\n"));
    }

    proptest! {
        #[test]
        fn any_chunking_of_any_body_reads_the_same(
            body in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..40), 0..8),
            cuts in prop::collection::vec(0usize..600, 0..12),
        ) {
            let mut bytes = response("200 OK\r\ntransfer-encoding: chunked", "");
            for chunk in &body {
                bytes.extend_from_slice(format!("{:X}\r\n", chunk.len()).as_bytes());
                bytes.extend_from_slice(chunk);
                bytes.extend_from_slice(b"\r\n");
            }
            bytes.extend_from_slice(b"0\r\n\r\n");
            let mut cuts: Vec<_> = cuts.into_iter().map(|cut| cut.min(bytes.len())).chain([0, bytes.len()]).collect();
            cuts.sort_unstable();
            let pieces = cuts.windows(2).map(|pair| &bytes[pair[0]..pair[1]]);
            prop_assert_eq!(read(pieces), Ok(Some((200, body.concat(), Framing::Ended))));
        }

        #[test]
        fn hostile_bytes_never_panic_and_read_the_same_however_cut(
            tail in "([0-9a-fA-F;\r\n: x]|\r\n){0,60}", kind in 0usize..4, step in 1usize..9,
        ) {
            let heads = ["200 OK\r\ntransfer-encoding: chunked", "200 OK\r\ncontent-length: 7", "103 x", "200 OK"];
            let bytes = response(heads[kind], &tail);
            prop_assert_eq!(read(bytes.chunks(step)), whole(&bytes));
        }
    }
}
