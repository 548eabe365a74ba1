//! Gives up on a peer that stops reading: a write that makes no progress for too long is an error.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep};

/// A connection whose writes may stand still for `stall` and no longer.
///
/// Answers are made only as fast as they are read, so a client that stops reading would otherwise keep its place
/// among the turns for as long as it likes.
pub(crate) struct Patience<T> {
    io: T,
    stall: Duration,
    timer: Pin<Box<Sleep>>,
    is_stalled: bool,
}

impl<T> Patience<T> {
    pub(crate) fn new(io: T, stall: Duration) -> Self {
        Self { io, stall, timer: Box::pin(tokio::time::sleep(stall)), is_stalled: false }
    }

    fn watch<R>(&mut self, progress: Poll<io::Result<R>>, cx: &mut Context<'_>) -> Poll<io::Result<R>> {
        if progress.is_ready() {
            self.is_stalled = false;
            return progress;
        }
        if !self.is_stalled {
            self.is_stalled = true;
            self.timer.as_mut().reset(Instant::now() + self.stall);
        }
        self.timer.as_mut().poll(cx).map(|()| Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Patience<T> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Patience<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let progress = Pin::new(&mut self.io).poll_write(cx, buf);
        self.watch(progress, cx)
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let progress = Pin::new(&mut self.io).poll_write_vectored(cx, bufs);
        self.watch(progress, cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let progress = Pin::new(&mut self.io).poll_flush(cx);
        self.watch(progress, cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let progress = Pin::new(&mut self.io).poll_shutdown(cx);
        self.watch(progress, cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_peer_who_reads_slowly_is_served_and_one_who_stops_is_given_up() {
        let stall = Duration::from_secs(30);
        let (near, mut far) = tokio::io::duplex(4);
        let mut near = Patience::new(near, stall);
        let began = Instant::now();
        let writing = tokio::spawn(async move { near.write_all(&[7; 16]).await });
        for _ in 0..2 {
            tokio::time::sleep(stall - Duration::from_secs(1)).await;
            far.read_exact(&mut [0; 4]).await.expect("four bytes are there");
        }
        let end = writing.await.expect("no panic").expect_err("nobody reads on");
        assert_eq!(end.kind(), io::ErrorKind::TimedOut);
        assert_eq!(began.elapsed().as_secs(), 29 + 29 + 30);
    }
}
