//! Watches the bytes of an HTTP/1.1 connection go by, for what hyper forgives and another reader might read differently.
//!
//! Two readers that disagree on where a request ends are how requests are smuggled. hyper decides by one of two framings that
//! stand side by side and takes the other one away before anybody can see it, and it takes a bare line feed for a line's end.
//! Both are legal (RFC 9112 sections 6.3 and 2.2), and nobody who means well writes them. Nothing is changed or kept back
//! here: what is found is told, and [`crate::front`] refuses the request.

/// The most of a line that is kept: enough for any honest `content-length`, and for the names of the others.
const KEPT: usize = 48;

/// What has gone by so far.
#[derive(Debug)]
pub(crate) struct Tap {
    at: At,
    line: [u8; KEPT],
    /// Bytes of the line so far, kept or not.
    line_bytes: usize,
    last: u8,
    length: Option<u64>,
    is_chunked: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    /// Before a request, or in its first line.
    Start,
    Fields,
    Body(u64),
    ChunkSize,
    /// The bytes of a chunk and its line end.
    Chunk(u64),
    Trailers,
    /// HTTP/2, a tunnel, or nothing that hyper will read on after.
    Beyond,
}

impl Default for Tap {
    fn default() -> Tap {
        Tap { at: At::Start, line: [0; KEPT], line_bytes: 0, last: 0, length: None, is_chunked: false }
    }
}

impl Tap {
    /// Takes note of what was read. What is wrong with it, if something is.
    pub(crate) fn see(&mut self, mut bytes: &[u8]) -> Result<(), &'static str> {
        while !bytes.is_empty() {
            match self.at {
                At::Beyond => return Ok(()),
                At::Body(left) | At::Chunk(left) => {
                    let seen = usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len());
                    bytes = bytes.get(seen..).unwrap_or_default();
                    self.at = match (self.at, left - seen as u64) {
                        (At::Chunk(_), 0) => At::ChunkSize,
                        (At::Chunk(_), left) => At::Chunk(left),
                        (_, 0) => At::Start,
                        (_, left) => At::Body(left),
                    };
                }
                At::Start | At::Fields | At::ChunkSize | At::Trailers => {
                    let end = bytes.iter().position(|byte| *byte == b'\n');
                    let (part, rest) = bytes.split_at(end.unwrap_or(bytes.len()));
                    self.keep(part);
                    if end.is_none() {
                        return Ok(());
                    }
                    let ended = self.line_ends();
                    self.line_bytes = 0;
                    if let Err(wrong) = ended {
                        self.at = At::Beyond;
                        return Err(wrong);
                    }
                    bytes = rest.get(1..).unwrap_or_default();
                }
            }
        }
        Ok(())
    }

    /// Whether a request's head has begun and not ended.
    pub(crate) fn is_within_head(&self) -> bool {
        self.at == At::Fields || (self.at == At::Start && self.line_bytes > 0)
    }

    /// Whether nothing of a request has gone by that is not over.
    pub(crate) fn is_between(&self) -> bool {
        self.at == At::Start && self.line_bytes == 0
    }

    fn keep(&mut self, part: &[u8]) {
        let room = self.line.get_mut(self.line_bytes..).unwrap_or_default();
        let kept = room.len().min(part.len());
        room[..kept].copy_from_slice(&part[..kept]);
        self.line_bytes += part.len();
        self.last = part.last().copied().unwrap_or(self.last);
    }

    fn line_ends(&mut self) -> Result<(), &'static str> {
        if self.line_bytes == 0 || self.last != b'\r' {
            return Err("a line ends in a bare line feed");
        }
        let bytes = self.line_bytes - 1;
        let (line, is_whole) = (self.line, bytes <= KEPT);
        let line = line.get(..bytes.min(KEPT)).unwrap_or_default();
        match self.at {
            At::Start if line.is_empty() => {}
            At::Start => {
                (self.length, self.is_chunked) = (None, false);
                self.at = if line == b"PRI * HTTP/2.0" { At::Beyond } else { At::Fields };
            }
            At::Fields if line.is_empty() => {
                self.at = match (self.is_chunked, self.length) {
                    (true, Some(_)) => return Err("Content-Length and Transfer-Encoding stand together"),
                    (true, None) => At::ChunkSize,
                    (false, None | Some(0)) => At::Start,
                    (false, Some(length)) => At::Body(length),
                };
            }
            At::Fields => {
                let Some(colon) = line.iter().position(|byte| *byte == b':') else { return Ok(()) };
                let value = line.get(colon + 1..).unwrap_or_default().trim_ascii();
                let is = |name: &str| line.get(..colon).is_some_and(|written| written.eq_ignore_ascii_case(name.as_bytes()));
                if is("content-length") {
                    let length = decimal(value).filter(|_| is_whole).ok_or("Content-Length is no number")?;
                    if self.length.replace(length).is_some() {
                        return Err("Content-Length stands twice");
                    }
                } else if is("transfer-encoding") {
                    if !value.eq_ignore_ascii_case(b"chunked") || !is_whole {
                        return Err("Transfer-Encoding must be chunked");
                    }
                    if std::mem::replace(&mut self.is_chunked, true) {
                        return Err("Transfer-Encoding stands twice");
                    }
                }
            }
            At::ChunkSize => {
                let digits = line.iter().position(|byte| !byte.is_ascii_hexdigit()).unwrap_or(line.len());
                self.at = match hexadecimal(line.get(..digits).unwrap_or_default()) {
                    Some(0) => At::Trailers,
                    Some(size) => At::Chunk(size.saturating_add(2)),
                    None => return Err("a chunk's size is no number"),
                };
            }
            At::Trailers if line.is_empty() => self.at = At::Start,
            At::Trailers | At::Body(_) | At::Chunk(_) | At::Beyond => {}
        }
        Ok(())
    }
}

/// RFC 9112 section 6.2: digits, and nothing else that a parser of numbers may take.
fn decimal(digits: &[u8]) -> Option<u64> {
    let is_number = !digits.is_empty() && digits.iter().all(u8::is_ascii_digit);
    is_number.then(|| std::str::from_utf8(digits).ok()?.parse().ok()).flatten()
}

fn hexadecimal(digits: &[u8]) -> Option<u64> {
    (!digits.is_empty()).then(|| u64::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The same for the whole as for every cutting in two and for byte by byte: where it ends, or what is wrong.
    fn check(bytes: &str, expected: Result<At, &'static str>) {
        let see = |parts: &[&[u8]]| {
            let mut tap = Tap::default();
            parts.iter().try_for_each(|part| tap.see(part)).map(|()| tap.at)
        };
        assert_eq!(see(&[bytes.as_bytes()]), expected, "{bytes:?}");
        for cut in 0..bytes.len() {
            let (first, second) = bytes.as_bytes().split_at(cut);
            assert_eq!(see(&[first, second]), expected, "{bytes:?} cut at {cut}");
        }
        assert_eq!(see(&bytes.as_bytes().chunks(1).collect::<Vec<_>>()), expected, "{bytes:?} byte by byte");
    }

    #[test]
    fn requests_end_where_their_one_framing_says() {
        for body in [
            "\r\n",
            "content-length: 0\r\n\r\n",
            "Content-Length:  5 \r\n\r\na\nb\nc",
            "transfer-encoding: Chunked\r\n\r\n5;x=y\r\na\nb\nc\r\nA\r\n0123456789\r\n0\r\n\r\n",
            "transfer-encoding: chunked\r\n\r\n0\r\ncontent-length: 5\r\nx: y\r\n\r\n",
            "x: content-length: 5\r\nx-content-length: 7\r\n\r\n",
        ] {
            let request = format!("\r\nPOST /a HTTP/1.1\r\nhost: h\r\n{body}");
            check(&request, Ok(At::Start));
            check(&request.repeat(2), Ok(At::Start));
        }
    }

    #[test]
    fn what_two_readers_may_read_differently_is_wrong() {
        for (fields, wrong) in [
            ("content-length: 5\r\ntransfer-encoding: chunked", "Content-Length and Transfer-Encoding stand together"),
            ("transfer-encoding: chunked\r\nCONTENT-LENGTH: 5", "Content-Length and Transfer-Encoding stand together"),
            ("content-length: 5\r\ncontent-length: 5", "Content-Length stands twice"),
            ("content-length: +5", "Content-Length is no number"),
            ("content-length: 5, 5", "Content-Length is no number"),
            ("content-length:", "Content-Length is no number"),
            ("content-length:                                                5", "Content-Length is no number"),
            ("transfer-encoding: gzip, chunked", "Transfer-Encoding must be chunked"),
            ("transfer-encoding: identity", "Transfer-Encoding must be chunked"),
            ("transfer-encoding: chunked                                  , x", "Transfer-Encoding must be chunked"),
            ("transfer-encoding: chunked\r\ntransfer-encoding: chunked", "Transfer-Encoding stands twice"),
            ("x: y\ncontent-length: 5", "a line ends in a bare line feed"),
        ] {
            check(&format!("POST /a HTTP/1.1\r\nhost: h\r\n{fields}\r\n\r\n"), Err(wrong));
        }
        check("POST /a HTTP/1.1\nhost: h\r\n\r\n", Err("a line ends in a bare line feed"));
        check("POST /a HTTP/1.1\r\nhost: h\r\n\n", Err("a line ends in a bare line feed"));
    }

    #[test]
    fn what_is_not_http_1_is_not_looked_at() {
        check("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\n\n", Ok(At::Beyond));
    }

    #[test]
    fn a_head_is_under_way_from_its_first_byte_to_its_empty_line() {
        let mut tap = Tap::default();
        let mut within = |bytes: &str| {
            tap.see(bytes.as_bytes()).unwrap();
            tap.is_within_head()
        };
        let seen = ["", "\r\n", "P", "OST / HTTP/1.1\r\n", "content-length: 1\r", "\n", "\r\n", "x", "G"].map(&mut within);
        assert_eq!(seen, [false, false, true, true, true, true, false, false, true]);
    }
}
