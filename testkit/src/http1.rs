//! HTTP/1.1 as RFC 9112 writes it and not a byte looser: heads, lengths and chunks, without I/O.

use bytes::{Buf, Bytes, BytesMut};

use crate::Broken;
use crate::broken::shown;

/// The most a head may have, in bytes; four times Headgate's own limit.
const MAX_HEAD_BYTES: usize = 64 * 1024;
/// The longest chunk-size or trailer line, in bytes.
const MAX_LINE_BYTES: usize = 8 * 1024;

/// The head of a request or an answer, as it came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Head {
    /// All its bytes, the empty line included.
    pub raw: Bytes,
    /// The first line, without its end.
    pub start: String,
    /// Names as written, values without the spaces around them, in order.
    pub headers: Vec<(String, String)>,
}

impl Head {
    /// The value of the only header of this name, whatever the case it is written in. `None` where there are none or several.
    pub fn header(&self, name: &str) -> Option<&str> {
        let mut found = self.all(name);
        let first = found.next();
        if found.next().is_some() { None } else { first }
    }

    /// Every value under this name, in order.
    pub fn all<'a, 'n>(&'a self, name: &'n str) -> impl Iterator<Item = &'a str> + use<'a, 'n> {
        self.headers.iter().filter(move |(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    /// The status of an answer.
    pub(crate) fn status(&self) -> Result<u16, Broken> {
        let wrong = || Broken::Http(format!("status line {}", shown(self.start.as_bytes())));
        let rest = self.start.strip_prefix("HTTP/1.1 ").ok_or_else(wrong)?;
        let (code, reason) = rest.split_once(' ').ok_or_else(wrong)?;
        let digits = code.len() == 3 && code.bytes().all(|b| b.is_ascii_digit());
        if !digits || reason.bytes().any(|b| b < b' ' && b != b'\t') {
            return Err(wrong());
        }
        code.parse().map_err(|_| wrong())
    }

    /// Method and target of a request.
    pub(crate) fn request_line(&self) -> Result<(String, String), Broken> {
        let wrong = || Broken::Http(format!("request line {}", shown(self.start.as_bytes())));
        let mut parts = self.start.split(' ');
        let (Some(method), Some(target), Some("HTTP/1.1"), None) = (parts.next(), parts.next(), parts.next(), parts.next()) else {
            return Err(wrong());
        };
        if !is_token(method.as_bytes()) || target.is_empty() || !target.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(wrong());
        }
        Ok((method.into(), target.into()))
    }
}

/// Takes one head off the front of `buffer`; `None` while its end has not come.
pub(crate) fn take_head(buffer: &mut BytesMut) -> Result<Option<Head>, Broken> {
    let Some(end) = buffer.windows(4).position(|w| w == b"\r\n\r\n") else {
        // A bare LF would otherwise wait for ever.
        if buffer.windows(2).any(|w| w == b"\n\n") {
            return Err(Broken::Http("lines that end in a bare LF".into()));
        }
        if buffer.len() > MAX_HEAD_BYTES {
            return Err(Broken::Http(format!("a head of more than {MAX_HEAD_BYTES} bytes")));
        }
        return Ok(None);
    };
    let raw = buffer.split_to(end + 4).freeze();
    let mut lines = Lines(&raw[..end + 2]);
    let start = lines.next().ok_or_else(|| Broken::Http("an empty head".into()))??;
    let start = utf8(start)?.to_owned();
    let headers = lines.map(|line| field(line?)).collect::<Result<_, _>>()?;
    Ok(Some(Head { raw, start, headers }))
}

/// Lines that end in CRLF; a CR or LF on its own, or a NUL, is refused.
struct Lines<'a>(&'a [u8]);

impl<'a> Iterator for Lines<'a> {
    type Item = Result<&'a [u8], Broken>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let end = self.0.windows(2).position(|w| w == b"\r\n").unwrap_or(self.0.len());
        let line = &self.0[..end];
        self.0 = &self.0[(end + 2).min(self.0.len())..];
        if line.iter().any(|b| matches!(b, b'\r' | b'\n' | 0)) {
            return Some(Err(Broken::Http(format!("a bare CR, LF or NUL in {}", shown(line)))));
        }
        Some(Ok(line))
    }
}

/// RFC 9112 section 5: no space before the colon, no line folded into the next.
fn field(line: &[u8]) -> Result<(String, String), Broken> {
    let wrong = || Broken::Http(format!("header line {}", shown(line)));
    let colon = line.iter().position(|&b| b == b':').ok_or_else(wrong)?;
    let (name, value) = (&line[..colon], &line[colon + 1..]);
    if !is_token(name) || value.iter().any(|&b| (b < b' ' && b != b'\t') || b == 0x7f) {
        return Err(wrong());
    }
    Ok((utf8(name)?.into(), utf8(value)?.trim_matches([' ', '\t']).into()))
}

/// RFC 9110 section 5.6.2.
fn is_token(bytes: &[u8]) -> bool {
    !bytes.is_empty() && bytes.iter().all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(b))
}

fn utf8(bytes: &[u8]) -> Result<&str, Broken> {
    std::str::from_utf8(bytes).map_err(|_| Broken::Http(format!("not UTF-8 in a head: {}", shown(bytes))))
}

/// How much of a body is still to come.
#[derive(Debug)]
pub(crate) struct Body {
    left: Left,
    /// What followed the last chunk.
    pub(crate) trailers: Vec<(String, String)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Left {
    Nothing,
    Bytes(u64),
    UntilClose,
    ChunkSize,
    ChunkBytes(u64),
    ChunkEnd,
    Trailers,
}

/// What [`Body::take`] found.
#[derive(Debug)]
pub(crate) enum Taken {
    /// Bytes of the body.
    Data(Bytes),
    /// More must be read first.
    Starved,
    /// The body is complete.
    End,
}

impl Body {
    /// The body after the head of an answer to `method`.
    pub(crate) fn of_answer(head: &Head, method: &str) -> Result<Body, Broken> {
        let status = head.status()?;
        let length = declared(head)?;
        let empty = method == "HEAD" || status < 200 || matches!(status, 204 | 304) || (method == "CONNECT" && status < 300);
        if empty && status != 304 && method != "HEAD" && length.is_some() {
            return Err(Broken::Http(format!("status {status} announces a body it cannot have")));
        }
        Ok(Body::new(if empty { Left::Nothing } else { length.unwrap_or(Left::UntilClose) }))
    }

    /// The body after the head of a request.
    pub(crate) fn of_request(head: &Head) -> Result<Body, Broken> {
        Ok(Body::new(declared(head)?.unwrap_or(Left::Nothing)))
    }

    fn new(left: Left) -> Body {
        Body { left: if left == Left::Bytes(0) { Left::Nothing } else { left }, trailers: Vec::new() }
    }

    /// Takes what `buffer` has of the body, and nothing behind it.
    pub(crate) fn take(&mut self, buffer: &mut BytesMut) -> Result<Taken, Broken> {
        loop {
            match self.left {
                Left::Nothing => return Ok(Taken::End),
                Left::UntilClose | Left::Bytes(_) | Left::ChunkBytes(_) if buffer.is_empty() => return Ok(Taken::Starved),
                Left::UntilClose => return Ok(Taken::Data(buffer.split().freeze())),
                Left::Bytes(left) => {
                    let data = split(buffer, left);
                    let left = left - data.len() as u64;
                    self.left = if left == 0 { Left::Nothing } else { Left::Bytes(left) };
                    return Ok(Taken::Data(data));
                }
                Left::ChunkBytes(left) => {
                    let data = split(buffer, left);
                    let left = left - data.len() as u64;
                    self.left = if left == 0 { Left::ChunkEnd } else { Left::ChunkBytes(left) };
                    return Ok(Taken::Data(data));
                }
                Left::ChunkSize => {
                    let Some(line) = take_line(buffer)? else { return Ok(Taken::Starved) };
                    let wrong = || Broken::Http(format!("chunk size {}", shown(&line)));
                    // An extension is legal and nobody has a use for one: from a peer we judge it is a surprise.
                    if line.is_empty() || line.len() > 16 || !line.iter().all(u8::is_ascii_hexdigit) {
                        return Err(wrong());
                    }
                    let size = u64::from_str_radix(utf8(&line)?, 16).map_err(|_| wrong())?;
                    self.left = if size == 0 { Left::Trailers } else { Left::ChunkBytes(size) };
                }
                Left::ChunkEnd => {
                    let Some(line) = take_line(buffer)? else { return Ok(Taken::Starved) };
                    if !line.is_empty() {
                        return Err(Broken::Http(format!("a chunk longer than its size: {}", shown(&line))));
                    }
                    self.left = Left::ChunkSize;
                }
                Left::Trailers => {
                    let Some(line) = take_line(buffer)? else { return Ok(Taken::Starved) };
                    if line.is_empty() {
                        self.left = Left::Nothing;
                    } else if self.trailers.len() == 100 {
                        return Err(Broken::Http("more than 100 trailers".into()));
                    } else {
                        self.trailers.push(field(&line)?);
                    }
                }
            }
        }
    }

    /// The peer has closed: was this the end?
    pub(crate) fn closed(&mut self) -> Result<(), Broken> {
        match self.left {
            Left::Nothing => Ok(()),
            Left::UntilClose => {
                self.left = Left::Nothing;
                Ok(())
            }
            Left::Bytes(left) => Err(Broken::Cut(format!("{left} announced bytes of the body never came"))),
            Left::ChunkBytes(left) => Err(Broken::Cut(format!("{left} announced bytes of a chunk never came"))),
            Left::ChunkSize | Left::ChunkEnd | Left::Trailers => Err(Broken::Cut("the last chunk never came".into())),
        }
    }
}

/// RFC 9112 section 6.3, without its leniencies: one length, or chunked, never both.
fn declared(head: &Head) -> Result<Option<Left>, Broken> {
    let lengths: Vec<_> = head.all("content-length").collect();
    let encodings: Vec<_> = head.all("transfer-encoding").collect();
    match (lengths.as_slice(), encodings.as_slice()) {
        ([], []) => Ok(None),
        ([], [one]) if one.eq_ignore_ascii_case("chunked") => Ok(Some(Left::ChunkSize)),
        ([one], []) if !one.is_empty() && one.bytes().all(|b| b.is_ascii_digit()) => {
            one.parse().map(|n| Some(Left::Bytes(n))).map_err(|_| Broken::Http(format!("content-length {}", shown(one.as_bytes()))))
        }
        _ => Err(Broken::Http(format!("contradicting lengths: content-length {lengths:?}, transfer-encoding {encodings:?}"))),
    }
}

fn split(buffer: &mut BytesMut, most: u64) -> Bytes {
    let most = usize::try_from(most).unwrap_or(usize::MAX);
    buffer.split_to(buffer.len().min(most)).freeze()
}

fn take_line(buffer: &mut BytesMut) -> Result<Option<Bytes>, Broken> {
    let Some(end) = buffer.iter().position(|&b| b == b'\n') else {
        if buffer.len() > MAX_LINE_BYTES {
            return Err(Broken::Http(format!("a chunk-size line of more than {MAX_LINE_BYTES} bytes")));
        }
        return Ok(None);
    };
    if end == 0 || buffer[end - 1] != b'\r' {
        return Err(Broken::Http(format!("a line in a chunked body that ends in a bare LF: {}", shown(&buffer[..end]))));
    }
    let line = buffer.split_to(end - 1).freeze();
    buffer.advance(2);
    Ok(Some(line))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(text: &str) -> Result<Head, Broken> {
        take_head(&mut BytesMut::from(text)).map(|head| head.expect("the head is complete"))
    }

    fn body(head_text: &str, bytes: &[u8]) -> Result<Vec<u8>, Broken> {
        let mut body = Body::of_answer(&head(head_text)?, "GET")?;
        let mut buffer = BytesMut::new();
        let mut got = Vec::new();
        // Byte by byte: the decoder may not depend on how it is fed.
        for byte in bytes {
            buffer.extend_from_slice(&[*byte]);
            while let Taken::Data(data) = body.take(&mut buffer)? {
                got.extend_from_slice(&data);
            }
        }
        body.closed()?;
        assert!(buffer.is_empty(), "bytes behind the body are not its own");
        Ok(got)
    }

    const CHUNKED: &str = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";

    #[test]
    fn a_head_is_read_with_its_headers_as_written() {
        let head = head("POST /v1 HTTP/1.1\r\nHost: a\r\nX-Two:  b \t\r\nx-two:c\r\n\r\n").unwrap();
        assert_eq!(head.request_line().unwrap(), ("POST".into(), "/v1".into()));
        assert_eq!(head.header("host"), Some("a"));
        assert_eq!(head.all("X-TWO").collect::<Vec<_>>(), ["b", "c"]);
        assert_eq!(head.header("x-two"), None, "two values are not one");
    }

    #[test]
    fn loose_heads_are_refused() {
        for text in [
            "HTTP/1.1 200 OK\nA: b\n\n",
            "HTTP/1.1 200 OK\r\nA : b\r\n\r\n",
            "HTTP/1.1 200 OK\r\n folded\r\n\r\n",
            "HTTP/1.1 200 OK\r\nA: b\rc\r\n\r\n",
            "HTTP/1.1 200 OK\r\nA: b\0\r\n\r\n",
            "HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        ] {
            assert!(matches!(head(text), Err(Broken::Http(_))), "{text:?}");
        }
        for text in ["HTTP/1.0 200 OK\r\n\r\n", "HTTP/1.1 20 OK\r\n\r\n", "HTTP/1.1 200\r\n\r\n"] {
            assert!(matches!(head(text).and_then(|head| head.status()), Err(Broken::Http(_))), "{text:?}");
        }
    }

    #[test]
    fn two_ways_to_tell_a_length_are_refused() {
        for lines in [
            "Content-Length: 1\r\nContent-Length: 1",
            "Content-Length: 1\r\nTransfer-Encoding: chunked",
            "Transfer-Encoding: gzip, chunked",
            "Content-Length: +1",
            "Content-Length: 99999999999999999999999",
        ] {
            let result = body(&format!("HTTP/1.1 200 OK\r\n{lines}\r\n\r\n"), b"");
            assert!(matches!(result, Err(Broken::Http(_))), "{lines}: {result:?}");
        }
    }

    #[test]
    fn a_chunked_body_is_joined_and_its_end_is_needed() {
        assert_eq!(body(CHUNKED, b"3\r\nabc\r\nA\r\n0123456789\r\n0\r\n\r\n").unwrap(), b"abc0123456789");
        for cut in [&b"3\r\nab"[..], b"3\r\nabc", b"3\r\nabc\r\n", b"3\r\nabc\r\n0\r\n", b""] {
            assert!(matches!(body(CHUNKED, cut), Err(Broken::Cut(_))), "{}", cut.escape_ascii());
        }
        for wrong in [&b"3\r\nabcd\r\n"[..], b"0x3\r\nabc\r\n", b"3;a=b\r\nabc\r\n", b"3\nabc\r\n", b"\r\n", b"-1\r\n"] {
            assert!(matches!(body(CHUNKED, wrong), Err(Broken::Http(_))), "{}", wrong.escape_ascii());
        }
    }

    #[test]
    fn a_body_with_a_length_must_have_that_length() {
        let four = "HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\n";
        assert_eq!(body(four, b"abcd").unwrap(), b"abcd");
        assert!(matches!(body(four, b"abc"), Err(Broken::Cut(_))));
        assert!(matches!(body("HTTP/1.1 204 No Content\r\ncontent-length: 4\r\n\r\n", b""), Err(Broken::Http(_))));
    }
}
