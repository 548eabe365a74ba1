//! One caller's socket, seen from two sides: hyper reads and writes it, and the turn it carries watches whether the caller is still there.

use std::{
    future::poll_fn,
    io,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU8, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{
        TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    time::{Instant, Sleep, sleep_until},
};

/// How long a caller may take over what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patience {
    /// From the connection to its first byte.
    pub first_byte: Duration,
    /// From the first byte of a request to the end of its headers.
    pub head: Duration,
    /// From the headers to the end of the body.
    pub body: Duration,
    /// Between two requests.
    pub idle: Duration,
    /// Within an answer, while something waits for the caller and it takes nothing.
    pub stall: Duration,
}

impl Default for Patience {
    /// 5 s, 10 s, 30 s, 75 s (longer than a gateway keeps idle connections) and 30 s.
    fn default() -> Patience {
        let [first_byte, head, body, idle, stall] = [5, 10, 30, 75, 30].map(Duration::from_secs);
        Patience { first_byte, head, body, idle, stall }
    }
}

/// The side that hyper reads and writes. A read or write that overstays the [`Patience`] fails: neither a caller that says
/// nothing nor one that takes nothing can hold a place, or a model, for ever. Idle time between requests is hyper's to watch.
pub(crate) struct Socket {
    shared: Arc<Shared>,
    write: OwnedWriteHalf,
    patience: Patience,
    unread: Option<Pin<Box<Sleep>>>,
    unwritten: Option<Pin<Box<Sleep>>>,
}

/// The side that a turn watches.
#[derive(Clone)]
pub(crate) struct Caller(Arc<Shared>);

struct Shared {
    // Never contended: both sides are polled by the task of this connection.
    read: Mutex<OwnedReadHalf>,
    phase: AtomicU8,
}

/// Nothing has come yet on this connection.
const FRESH: u8 = 0;
/// A request has begun to come.
const HEAD: u8 = 1;
/// A request is being read and judged.
const BUSY: u8 = 2;
/// It is being answered: the caller has nothing to say until the answer has ended.
const ANSWERING: u8 = 3;
/// It has been answered.
const IDLE: u8 = 4;
/// The connection speaks another protocol now, which watches it itself.
const UPGRADED: u8 = 5;

impl Socket {
    /// Both sides of `stream`.
    pub(crate) fn of(stream: TcpStream, patience: Patience) -> (Socket, Caller) {
        let (read, write) = stream.into_split();
        let shared = Arc::new(Shared { read: Mutex::new(read), phase: AtomicU8::new(FRESH) });
        (Socket { shared: shared.clone(), write, patience, unread: None, unwritten: None }, Caller(shared))
    }

    /// The outcome of one attempt to write: passed on, unless nothing could be written for too long.
    fn progress<T>(&mut self, cx: &mut Context<'_>, attempt: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        match attempt {
            Poll::Ready(done) => {
                self.unwritten = None;
                Poll::Ready(done)
            }
            Poll::Pending => overstayed(&mut self.unwritten, self.patience.stall, cx).map(|late| Err(late("taken"))),
        }
    }
}

/// Ready, with the making of an error, once `patience` has run out since the first call after `timer` was last `None`.
fn overstayed(timer: &mut Option<Pin<Box<Sleep>>>, patience: Duration, cx: &mut Context<'_>) -> Poll<fn(&str) -> io::Error> {
    let timer = timer.get_or_insert_with(|| Box::pin(sleep_until(Instant::now() + patience)));
    timer
        .as_mut()
        .poll(cx)
        .map(|()| (|what| io::Error::new(io::ErrorKind::TimedOut, format!("nothing was {what} for too long"))) as fn(&str) -> _)
}

impl Caller {
    /// The caller has sent the head of a request.
    pub(crate) fn request(&self) -> Request {
        self.0.phase.store(BUSY, Ordering::Relaxed);
        Request { caller: self.clone(), then: IDLE }
    }
}

/// A caller's request until it has been answered; over when dropped.
pub(crate) struct Request {
    caller: Caller,
    then: u8,
}

impl Request {
    /// The whole request has been read: from here on the caller has nothing to say until its answer has ended.
    pub(crate) fn answering(&self) {
        self.caller.0.phase.store(ANSWERING, Ordering::Relaxed);
    }

    /// The request was for another protocol, and it is spoken from here on.
    pub(crate) fn upgraded(mut self) {
        self.then = UPGRADED;
    }

    /// Resolves when the caller has closed its side, or sends what it may not send yet; call [`Request::answering`] first.
    /// Cancel safe.
    ///
    /// hyper looks for the end of the stream only while its read buffer is empty, so one byte sent ahead would hide that the
    /// caller has left (reference: hyper's `mid_message_detect_eof`). This looks at the socket itself.
    pub(crate) async fn gone(&self) {
        poll_fn(|cx| {
            let mut byte = [0];
            let mut byte = ReadBuf::new(&mut byte);
            self.caller.0.read().poll_peek(cx, &mut byte).map(|_| ())
        })
        .await;
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        self.caller.0.phase.store(self.then, Ordering::Relaxed);
    }
}

impl Shared {
    fn read(&self) -> std::sync::MutexGuard<'_, OwnedReadHalf> {
        // Nothing between lock and unlock leaves the half in a state that is not whole.
        self.read.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AsyncRead for Socket {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let before = buf.filled().len();
        let read = Pin::new(&mut *this.shared.read()).poll_read(cx, buf)?;
        let phase = this.shared.phase.load(Ordering::Relaxed);
        match (read, phase) {
            (Poll::Ready(()), ANSWERING) if buf.filled().len() > before => {
                buf.set_filled(before);
                return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, "the caller sent more before its answer had ended")));
            }
            (Poll::Ready(()), FRESH | IDLE) => {
                this.shared.phase.store(HEAD, Ordering::Relaxed);
                this.unread = None;
            }
            (Poll::Pending, FRESH) => {
                return overstayed(&mut this.unread, this.patience.first_byte, cx).map(|late| Err(late("sent")));
            }
            (Poll::Pending, HEAD) => return overstayed(&mut this.unread, this.patience.head, cx).map(|late| Err(late("sent"))),
            (Poll::Ready(()) | Poll::Pending, _) => {}
        }
        read.map(Ok)
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let attempt = Pin::new(&mut self.write).poll_write(cx, bytes);
        self.progress(cx, attempt)
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, parts: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let attempt = Pin::new(&mut self.write).poll_write_vectored(cx, parts);
        self.progress(cx, attempt)
    }

    fn is_write_vectored(&self) -> bool {
        self.write.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.write).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.write).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };

    use super::*;

    async fn pair(patience: Patience) -> (Socket, Caller, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let there = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (socket, caller) = Socket::of(listener.accept().await.unwrap().0, patience);
        (socket, caller, there)
    }

    #[tokio::test]
    async fn a_caller_who_leaves_is_seen_without_reading() {
        let (_socket, caller, there) = pair(Patience::default()).await;
        let request = caller.request();
        request.answering();
        drop(there);
        request.gone().await;
    }

    #[tokio::test]
    async fn a_byte_sent_ahead_ends_the_connection_and_one_sent_after_does_not() {
        let (mut socket, caller, mut there) = pair(Patience::default()).await;
        let request = caller.request();
        request.answering();
        there.write_all(b"G").await.unwrap();
        request.gone().await;
        assert_eq!(socket.read(&mut [0; 8]).await.unwrap_err().kind(), io::ErrorKind::InvalidData);
        drop(request);
        there.write_all(b"G").await.unwrap();
        assert_eq!(socket.read(&mut [0; 8]).await.unwrap(), 1);
    }

    #[tokio::test]
    async fn a_write_that_nobody_takes_fails_after_the_stall() {
        let patience = Patience { stall: Duration::from_millis(20), ..Patience::default() };
        let (mut socket, _caller, _there) = pair(patience).await;
        let full = tokio::time::timeout(Duration::from_secs(20), async {
            loop {
                if let Err(stalled) = socket.write_all(&[0; 65_536]).await {
                    return stalled;
                }
            }
        });
        assert_eq!(full.await.unwrap().kind(), io::ErrorKind::TimedOut);
    }

    #[tokio::test]
    async fn a_caller_who_says_nothing_or_too_little_is_not_waited_for() {
        let patience = Patience { first_byte: Duration::from_millis(20), head: Duration::from_millis(40), ..Patience::default() };
        let (mut silent, _caller, _there) = pair(patience).await;
        assert_eq!(silent.read(&mut [0; 8]).await.unwrap_err().kind(), io::ErrorKind::TimedOut);

        let (mut slow, caller, mut there) = pair(patience).await;
        there.write_all(b"P").await.unwrap();
        assert_eq!(slow.read(&mut [0; 8]).await.unwrap(), 1);
        assert_eq!(slow.read(&mut [0; 8]).await.unwrap_err().kind(), io::ErrorKind::TimedOut);

        // Once the head is there it is the body's own deadline that counts.
        let _request = caller.request();
        assert!(tokio::time::timeout(Duration::from_millis(100), slow.read(&mut [0; 8])).await.is_err());
    }
}
