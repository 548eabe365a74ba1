//! A turn as a stream of server-sent events: the body of the client's response polls the turn and writes what came.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use headgate_contracts::{Gone, Head, Stop, TurnId, wire::sse};
use hyper::body::{Body, Frame};
use tokio::time::{Instant, Sleep};

use crate::{drive::Call, outbox::Reader};

/// The most events in one write: what is ready goes at once, but one stream does not keep the core to itself.
const MAX_EVENTS_PER_WRITE: usize = 256;

/// Whose event stream it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    /// Ours: `id`, `event` and `data`.
    Chat,
    /// OpenAI's: `data` alone.
    OpenAi,
}

/// The body of a streamed answer.
pub struct Stream {
    call: Call,
    reader: Reader,
    turn: TurnId,
    framing: Framing,
    silence: Silence,
    /// The response was begun before the answer was (see [`begin`]), so a stop has to be told here.
    early: bool,
    over: bool,
}

struct Silence {
    after: Duration,
    last: Instant,
    alarm: Pin<Box<Sleep>>,
}

impl Silence {
    /// Ready when nothing was sent for a while. The alarm is set anew only when it rings, not with every event.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            if self.alarm.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            let due = self.last + self.after;
            let now = Instant::now();
            if due <= now {
                self.last = now;
                self.alarm.as_mut().reset(now + self.after);
                return Poll::Ready(());
            }
            self.alarm.as_mut().reset(due);
        }
    }
}

/// Waits for the answer's head, at most one heartbeat long: a model that reads a long prompt must not look like a dead
/// connection. `Ok(None)`: the response begins without the head; what the answer then turns out to be comes as events.
pub async fn begin(call: &Call, reader: &mut Reader, patience: Duration) -> Result<Option<Arc<Head>>, Stop> {
    let head = std::future::poll_fn(|cx| {
        call.poll(cx);
        reader.poll_head(cx)
    });
    match tokio::time::timeout(patience, head).await {
        Ok(head) => head.map(Some),
        Err(_) => Ok(None),
    }
}

impl Stream {
    /// Moves the turn on and appends what is to be sent now. `false`: it is over, and all was sent.
    pub(crate) fn poll_write(&mut self, cx: &mut Context<'_>, out: &mut Vec<u8>) -> Poll<bool> {
        if self.over {
            return Poll::Ready(false);
        }
        self.call.poll(cx);
        let (turn, framing) = (self.turn, self.framing);
        if self.early
            && let Poll::Ready(head) = self.reader.poll_head(cx)
        {
            self.early = false;
            if let Err(stop) = head {
                self.over = true;
                crate::voice::write_stop(out, turn, framing, &stop);
                return Poll::Ready(true);
            }
        }
        let shown = self.reader.poll_next(cx, MAX_EVENTS_PER_WRITE, |event| match framing {
            Framing::Chat => sse::encode(out, Some((&turn, event.seq)), Some(event.name), event.payload),
            Framing::OpenAi => sse::encode(out, None, None, event.payload),
        });
        match shown {
            Poll::Ready(0) => {
                self.over = true;
                return Poll::Ready(false);
            }
            Poll::Ready(_) => self.silence.last = Instant::now(),
            Poll::Pending => {
                ready!(self.silence.poll(cx));
                sse::comment(out);
            }
        }
        Poll::Ready(true)
    }

    /// The body of `turn`'s answer. `early`: the response is begun without the answer's head.
    pub fn new(call: Call, reader: Reader, turn: TurnId, framing: Framing, heartbeat: Duration, early: bool) -> Stream {
        let silence = Silence { after: heartbeat, last: Instant::now(), alarm: Box::pin(tokio::time::sleep(heartbeat)) };
        Stream { call, reader, turn, framing, silence, early, over: false }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.call.is_stalled() {
            self.reader.stop(Gone::Slow);
        }
    }
}

impl Body for Stream {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let mut out = Vec::new();
        self.poll_write(cx, &mut out).map(|more| more.then(|| Ok(Frame::data(out.into()))))
    }
}
