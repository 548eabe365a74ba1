//! Counts what an HTTP/2 connection carries: one that carries nothing for long, or whose answers are given up again and again, ends.
//!
//! A stream costs its client a few bytes to open and to reset, and us a turn (CVE-2023-44487, rapid reset). h2 ends connections
//! that reset faster than streams are accepted; this ends those that take their time.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use tokio::{sync::watch, time::sleep};

use crate::body::{BodyError, Reply};

/// By how many the answers that a client gave up may outnumber those that it took to the end. An honest client that gives up
/// many takes some. Beyond it the connection ends as soon as its streams have, and twice beyond it at once: a client need not
/// confirm an end, and may go on until it does.
const MAX_GIVEN_UP: u64 = 100;

/// The streams of one connection.
#[derive(Clone)]
pub(crate) struct Streams(Arc<Shared>);

struct Shared {
    has_begun: AtomicBool,
    /// Streams that are open.
    open: watch::Sender<usize>,
    taken: AtomicU64,
    given_up: AtomicU64,
    /// How many times [`MAX_GIVEN_UP`] were given up too many.
    excess: watch::Sender<u64>,
}

impl Default for Streams {
    fn default() -> Streams {
        Streams(Arc::new(Shared {
            has_begun: AtomicBool::default(),
            open: watch::channel(0).0,
            taken: AtomicU64::default(),
            given_up: AtomicU64::default(),
            excess: watch::channel(0).0,
        }))
    }
}

impl Streams {
    /// One more.
    pub(crate) fn begin(&self) -> Stream {
        self.0.has_begun.store(true, Ordering::Relaxed);
        self.0.open.send_modify(|open| *open += 1);
        Stream { streams: self.clone(), is_taken: false }
    }

    /// Whether there ever was one.
    pub(crate) fn have_begun(&self) -> bool {
        self.0.has_begun.load(Ordering::Relaxed)
    }

    /// Ready when the connection has carried nothing for so long, or its client gives up too much. Cancel safe.
    pub(crate) async fn enough(&self, idle: Duration) {
        tokio::select! {
            () = self.quiet(idle) => {}
            () = self.excess(1) => {}
        }
    }

    /// Ready when the client gives up far too much, and does not stop. Cancel safe.
    pub(crate) async fn far_too_much(&self) {
        self.excess(2).await;
    }

    /// Whether the client has given up so much that nothing more is begun for it.
    pub(crate) fn are_refused(&self) -> bool {
        *self.0.excess.borrow() > 0
    }

    async fn excess(&self, times: u64) {
        // The sender is in self, so waiting cannot fail.
        let _ = self.0.excess.subscribe().wait_for(|excess| *excess >= times).await;
    }

    /// Ready when there has been no stream for so long. Cancel safe.
    pub(crate) async fn quiet(&self, idle: Duration) {
        let mut open = self.0.open.subscribe();
        loop {
            // The sender is in self, so waiting cannot fail.
            let _ = open.wait_for(|open| *open == 0).await;
            tokio::select! {
                _ = open.wait_for(|open| *open > 0) => {}
                () = sleep(idle) => return,
            }
        }
    }
}

/// One of them, from its request to the end of its answer. Dropping it before that is its client's giving it up.
pub(crate) struct Stream {
    streams: Streams,
    is_taken: bool,
}

impl Stream {
    /// The answer's body, which is the stream from now on.
    pub(crate) fn carry(self, reply: Reply) -> Carried {
        Carried { reply, stream: self }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let shared = &self.streams.0;
        if self.is_taken {
            shared.taken.fetch_add(1, Ordering::Relaxed);
        } else {
            let given_up = shared.given_up.fetch_add(1, Ordering::Relaxed) + 1;
            let excess = given_up.saturating_sub(shared.taken.load(Ordering::Relaxed)).saturating_sub(1) / MAX_GIVEN_UP;
            shared.excess.send_if_modified(|most| {
                let is_more = excess > *most;
                *most = excess.max(*most);
                is_more
            });
        }
        shared.open.send_modify(|open| *open -= 1);
    }
}

/// A body that its connection counts.
pub(crate) struct Carried {
    reply: Reply,
    stream: Stream,
}

impl Body for Carried {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let frame = Pin::new(&mut self.reply).poll_frame(cx);
        self.stream.is_taken |= matches!(frame, Poll::Ready(None)) || self.reply.is_end_stream();
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.reply.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.reply.size_hint()
    }
}

impl Drop for Carried {
    fn drop(&mut self) {
        // A body that is empty is never polled.
        self.stream.is_taken |= self.reply.is_end_stream();
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::{Instant, timeout};

    use super::*;

    const IDLE: Duration = Duration::from_secs(60);

    #[tokio::test(start_paused = true)]
    async fn a_connection_is_quiet_so_long_after_its_last_stream() {
        let streams = Streams::default();
        assert!(!streams.have_begun());
        let (one, two) = (streams.begin(), streams.begin());
        assert!(timeout(10 * IDLE, streams.enough(IDLE)).await.is_err());
        drop(one);
        assert!(timeout(10 * IDLE, streams.enough(IDLE)).await.is_err());
        let last = Instant::now();
        drop(two);
        streams.enough(IDLE).await;
        assert_eq!(last.elapsed(), IDLE);
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_gives_up_far_more_than_it_takes_has_had_enough() {
        let streams = Streams::default();
        let keeping = streams.begin();
        let is_enough = async |streams: &Streams| timeout(Duration::from_millis(1), streams.enough(IDLE)).await.is_ok();
        for _ in 0..50 {
            drop(streams.begin().carry(Reply::empty()));
        }
        for _ in 0..MAX_GIVEN_UP + 50 {
            drop(streams.begin());
        }
        assert!(!is_enough(&streams).await && !streams.are_refused());
        drop(streams.begin().carry(Reply::from("a body that nobody took")));
        assert!(is_enough(&streams).await && streams.are_refused());
        let is_far_too_much = async |streams: &Streams| timeout(Duration::from_millis(1), streams.far_too_much()).await.is_ok();
        for _ in 0..MAX_GIVEN_UP - 1 {
            drop(streams.begin());
        }
        assert!(!is_far_too_much(&streams).await);
        drop(streams.begin());
        assert!(is_far_too_much(&streams).await);
        drop(keeping);
    }
}
