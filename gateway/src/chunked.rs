//! A turn's answer over HTTP/1.1, written to its connection without hyper: one write for all that is ready, no buffer meanwhile.
//!
//! hyper reads the request and hands the connection over ([`Handover`]) once a turn is under way; when that is answered, the
//! connection goes back for the next request. What this spares, and what it costs, is in
//! `docs/decisions/0140-answers-are-written-by-hand.md`.

use std::{
    cell::RefCell,
    future::{Future, poll_fn},
    io::{self, Write},
    pin::Pin,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
    time::{SystemTime, UNIX_EPOCH},
};

use http::{HeaderMap, HeaderValue, Request, Response, Version, header, response::Parts};
use hyper::body::Body;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};

use crate::{body::Reply, buffers, drive::Line, serve::Patient, sse::Stream};

/// So many bytes are written at once: more that is ready has to wait for its turn.
const MAX_WRITE_BYTES: usize = 64 << 10;

/// Where a chunk's size stands: eight digits and the line's end.
const SIZE: &[u8] = b"00000000\r\n";

/// A request that is being answered.
type Call = Pin<Box<dyn Future<Output = Response<Reply>> + Send>>;

/// Where a connection's call is while hyper has the connection, and when that is to be handed over: once a turn is under way.
#[derive(Default)]
pub(crate) struct Handover {
    call: Mutex<Option<(Call, Terms)>>,
    is_due: AtomicBool,
    /// hyper has nothing left to write: an answer before this one, or a word in between, would be lost with its buffer.
    is_clear: AtomicBool,
}

impl Handover {
    fn call(&self) -> MutexGuard<'_, Option<(Call, Terms)>> {
        self.call.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers a request, as far as it is for hyper to see: never, where the connection is handed over.
    pub(crate) async fn answer(&self, terms: Option<Terms>, call: Call) -> Response<Reply> {
        let Some(terms) = terms else { return call.await };
        *self.call() = Some((call, terms));
        poll_fn(|cx| {
            let mut place = self.call();
            let Some((call, _)) = place.as_mut().filter(|_| !self.is_due.load(Ordering::Relaxed)) else { return Poll::Pending };
            let response = ready!(call.as_mut().poll(cx));
            if matches!(response.body(), Reply::Turn(_)) {
                *call = Box::pin(std::future::ready(response));
                return Poll::Pending;
            }
            *place = None;
            Poll::Ready(response)
        })
        .await
    }

    /// The connection was flushed, which hyper does once its buffer is empty.
    pub(crate) fn flushed(&self) {
        self.is_clear.store(true, Ordering::Relaxed);
    }

    /// Moves hyper's connection on: how it ended, or `None` when it is to be handed over, since its `line` has a turn.
    pub(crate) fn poll<C: Future + Unpin>(&self, cx: &mut Context<'_>, line: &Line, connection: &mut C) -> Poll<Option<C::Output>> {
        // A call asks for its request's body when it is polled first, and hyper gives it when it is polled next. Both now, and not
        // by way of all other connections: of a thousand that come at once each would keep its buffers meanwhile.
        let mut looks = if self.call().is_none() { 2 } else { 0 };
        loop {
            if let Poll::Ready(ended) = Pin::new(&mut *connection).poll(cx) {
                return Poll::Ready(Some(ended));
            }
            if self.call().is_none() {
                return Poll::Pending;
            }
            if !line.is_busy() {
                if looks == 0 {
                    return Poll::Pending;
                }
                looks -= 1;
                continue;
            }
            if !self.is_due.swap(true, Ordering::Relaxed) {
                // hyper has to look at its buffer once more: what it wrote while it read the request may still be there.
                self.is_clear.store(false, Ordering::Relaxed);
                continue;
            }
            return if self.is_clear.load(Ordering::Relaxed) { Poll::Ready(None) } else { Poll::Pending };
        }
    }

    /// What the connection is handed over for.
    pub(crate) fn take(&self) -> Option<Answer> {
        self.is_due.store(false, Ordering::Relaxed);
        self.call().take().map(|(call, terms)| Answer { call, terms })
    }
}

/// What a request says about how a turn's answer is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Terms {
    /// The connection may carry another request afterwards.
    stays: bool,
}

impl Terms {
    /// `None`: hyper writes the answer.
    pub(crate) fn of<B: Body>(request: &Request<B>) -> Option<Terms> {
        // A turn's prompt is read to its end before there is an answer. Who has a body and no prompt would leave it unread.
        let is_read = request.method() == http::Method::POST || request.body().is_end_stream();
        (request.version() == Version::HTTP_11 && is_read).then(|| Terms { stays: !closes(request.headers()) })
    }
}

fn closes(headers: &HeaderMap) -> bool {
    let names_it =
        |value: &HeaderValue| value.to_str().map_or(true, |text| text.split(',').any(|it| it.trim().eq_ignore_ascii_case("close")));
    headers.get_all(header::CONNECTION).iter().any(names_it)
}

/// An answer to write.
pub(crate) struct Answer {
    call: Call,
    terms: Terms,
}

impl Answer {
    /// Waits for it and writes it to its end. `true`: the connection may carry another request, where `stays` has it so.
    ///
    /// Errors: the client left, or took nothing for the stall time. Dropping the future is the client's leaving.
    pub(crate) async fn write<S: AsyncRead + AsyncWrite + Unpin>(self, io: &mut Patient<S>, stays: bool) -> io::Result<bool> {
        // In a box: an answer lasts, what comes before it does not.
        let (stream, stays) = Box::pin(self.begin(io, stays)).await?;
        if let Some((stream, head)) = stream {
            write_stream(io, stream, head).await?;
        }
        Ok(stays)
    }

    /// Waits for it, and writes it where it has come whole; else gives what is to be streamed, after the head.
    async fn begin<S: AsyncRead + AsyncWrite + Unpin>(self, io: &mut Patient<S>, stays: bool) -> io::Result<(Option<Begun>, bool)> {
        let Answer { mut call, terms } = self;
        let response = poll_fn(|cx| {
            let response = call.as_mut().poll(cx);
            io.listen_if_busy(cx)?;
            response.map(io::Result::Ok)
        })
        .await?;
        drop(call);
        let (head, body) = response.into_parts();
        let stays = stays && terms.stays && !closes(&head.headers);
        let mut out = buffers::lend();
        let whole = if let Reply::Whole(body) = &body { Some(body.as_deref().unwrap_or_default()) } else { None };
        write_head(&mut out, &head, stays, whole.map(<[u8]>::len));
        out.extend_from_slice(whole.unwrap_or_default());
        match body {
            Reply::Turn(stream) => Ok((Some((stream, out)), stays)),
            Reply::Whole(_) => {
                io.write_all(&out).await?;
                io.flush().await?;
                buffers::give_back(&mut out);
                Ok((None, stays))
            }
            Reply::Passed(_) => Err(io::Error::other("another server's answer is no turn's")),
        }
    }
}

/// A stream, and the head that is written before it.
type Begun = (Box<Stream>, Vec<u8>);

fn write_head(out: &mut Vec<u8>, head: &Parts, stays: bool, length: Option<usize>) {
    let status = head.status;
    for part in ["HTTP/1.1 ", status.as_str(), " ", status.canonical_reason().unwrap_or_default(), "\r\n"] {
        out.extend_from_slice(part.as_bytes());
    }
    // A value of this type holds no line break, so a field cannot become two.
    for (name, value) in head.headers.iter().filter(|(name, _)| **name != header::CONNECTION) {
        for part in [name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"] {
            out.extend_from_slice(part);
        }
    }
    write_date(out, SystemTime::now());
    if !stays {
        out.extend_from_slice(b"connection: close\r\n");
    }
    // A buffer takes all that is written to it.
    let _ = match length {
        Some(length) => write!(out, "content-length: {length}\r\n\r\n"),
        None => write!(out, "transfer-encoding: chunked\r\n\r\n"),
    };
}

/// Writes the field `date`, which is the same for a whole second.
fn write_date(out: &mut Vec<u8>, now: SystemTime) {
    thread_local! {
        static LAST: RefCell<(u64, String)> = const { RefCell::new((u64::MAX, String::new())) };
    }
    let second = now.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let _ = LAST.try_with(|last| {
        let (of, field) = &mut *last.borrow_mut();
        if *of != second {
            (*of, *field) = (second, format!("date: {}\r\n", httpdate::fmt_http_date(now)));
        }
        out.extend_from_slice(field.as_bytes());
    });
}

/// Writes the stream, after what stands in `out`.
async fn write_stream<S: AsyncRead + AsyncWrite + Unpin>(io: &mut Patient<S>, stream: Box<Stream>, mut out: Vec<u8>) -> io::Result<()> {
    let (mut stream, mut sent) = (Some(stream), 0);
    // Head and first events go together.
    poll_fn(|cx| Poll::Ready(_ = fill(cx, &mut stream, &mut out))).await;
    poll_fn(|cx| {
        // Filled, and what comes next wakes: to look again once all is written would be to look in vain.
        let mut is_all = false;
        loop {
            while let Some(rest) = out.get(sent..).filter(|rest| !rest.is_empty()) {
                match Pin::new(&mut *io).poll_write(cx, rest) {
                    Poll::Ready(Ok(0)) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                    Poll::Ready(written) => sent += written?,
                    Poll::Pending => {
                        io.listen_if_busy(cx)?;
                        return Poll::Pending;
                    }
                }
            }
            // Sees the client leave, too: once.
            ready!(if is_all { io.poll_push(cx) } else { Pin::new(&mut *io).poll_flush(cx) })?;
            out.clear();
            if !is_all && stream.is_some() {
                (sent, is_all) = fill(cx, &mut stream, &mut out);
            }
            if out.is_empty() {
                buffers::give_back(&mut out);
                return if stream.is_none() { Poll::Ready(Ok(())) } else { Poll::Pending };
            }
        }
    })
    .await
}

/// Appends what is ready as one chunk, and the last one when the turn is over, which is then gone: from here on what the client
/// sends is its next request. Gives how many bytes at the front need not be sent, and whether nothing more is ready.
fn fill(cx: &mut Context<'_>, stream: &mut Option<Box<Stream>>, out: &mut Vec<u8>) -> (usize, bool) {
    if out.capacity() == 0 {
        *out = buffers::lend();
    }
    let start = out.len();
    out.extend_from_slice(SIZE);
    let body = out.len();
    let filled = stream.as_mut().map_or(Poll::Ready(false), |stream| stream.poll_fill(cx, out, body + MAX_WRITE_BYTES));
    if filled == Poll::Ready(false) {
        *stream = None;
    }
    let skipped = end_chunk(out, start, body);
    if stream.is_none() {
        out.extend_from_slice(b"0\r\n\r\n");
    }
    (skipped, filled.is_pending())
}

/// Ends the chunk whose size stands at `start` and whose bytes begin at `body`; an empty one would be the last, so it goes.
fn end_chunk(out: &mut Vec<u8>, start: usize, body: usize) -> usize {
    let mut size = out.len() - body;
    if size == 0 {
        out.truncate(start);
        return 0;
    }
    out.extend_from_slice(b"\r\n");
    let digits = out.get_mut(start..body - 2).unwrap_or_default();
    let mut zeros = digits.len();
    while size > 0 && zeros > 0 {
        zeros -= 1;
        digits[zeros] = b"0123456789abcdef"[size % 16];
        size /= 16;
    }
    if start == 0 {
        return zeros;
    }
    out.drain(start..start + zeros);
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chunk_has_its_size_before_it_without_zeros_and_an_empty_one_is_none() {
        for (before, body, expected) in [
            ("", "x".to_owned(), "1\r\nx\r\n".to_owned()),
            ("", "x".repeat(0x1f0), format!("1f0\r\n{}\r\n", "x".repeat(0x1f0))),
            ("head\r\n\r\n", "x".repeat(16), format!("head\r\n\r\n10\r\n{}\r\n", "x".repeat(16))),
            ("head\r\n\r\n", String::new(), "head\r\n\r\n".to_owned()),
            ("", String::new(), String::new()),
        ] {
            let mut out = [before.as_bytes(), SIZE, body.as_bytes()].concat();
            let skipped = end_chunk(&mut out, before.len(), before.len() + SIZE.len());
            assert_eq!(std::str::from_utf8(&out[skipped..]), Ok(expected.as_str()));
        }
    }

    #[test]
    fn the_date_is_written_once_for_a_second_and_anew_for_the_next() {
        for (second, expected) in [(0, "00"), (59, "59"), (59, "59"), (1, "01")] {
            let mut out = Vec::new();
            write_date(&mut out, UNIX_EPOCH + std::time::Duration::from_millis(1000 * second + 999));
            assert_eq!(String::from_utf8(out), Ok(format!("date: Thu, 01 Jan 1970 00:00:{expected} GMT\r\n")));
        }
    }

    #[test]
    fn hyper_writes_what_old_clients_asked_for_and_what_was_asked_with_a_body_that_nobody_reads() {
        let terms = |method: &str, version, connection: &[&str], body: &str| {
            let mut request = Request::builder().method(method).version(version);
            for value in connection {
                request = request.header("connection", *value);
            }
            Terms::of(&request.body(body.to_owned()).unwrap()).map(|terms| terms.stays)
        };
        assert_eq!(terms("POST", Version::HTTP_11, &[], "prompt"), Some(true));
        assert_eq!(terms("GET", Version::HTTP_11, &["keep-alive"], ""), Some(true));
        assert_eq!(terms("POST", Version::HTTP_11, &["keep-alive", "x, Close"], "prompt"), Some(false));
        assert_eq!(terms("GET", Version::HTTP_11, &[], "unread"), None);
        assert_eq!(terms("POST", Version::HTTP_10, &["keep-alive"], "prompt"), None);
        assert_eq!(terms("POST", Version::HTTP_2, &[], "prompt"), None);
    }
}
