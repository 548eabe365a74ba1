//! A turn as a stream of server-sent events: the body of the client's response polls the turn and writes what came.

use std::{
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use headgate_contracts::{Gone, Stop, TurnId, wire::sse};
use headgate_upstream::Alarm;
use hyper::body::{Body, Frame};
use tokio::time::Instant;

use crate::{
    drive::Call,
    outbox::{Fields, Reader},
};

/// The most events between two looks at how many bytes there are.
const MAX_EVENTS_AT_ONCE: usize = 256;
/// The most bytes of one frame of HTTP/2's, roughly: what is ready goes at once, but one stream does not keep the core to itself.
const MAX_FRAME_BYTES: usize = 64 << 10;

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
    alarm: Alarm,
}

impl Silence {
    /// Whether nothing was sent for a while; else whoever asks is woken when that may be so. The alarm is set anew only when it rings,
    /// not with every event.
    fn is_over(&mut self, cx: &mut Context<'_>, now: Instant) -> bool {
        let mut is_over = false;
        while self.alarm.poll(cx, now).is_ready() {
            if self.last + self.after <= now {
                (self.last, is_over) = (now, true);
            }
            self.alarm.set(self.last + self.after);
        }
        is_over
    }
}

/// Waits for the answer's head, at most one heartbeat long: a model that reads a long prompt must not look like a dead
/// connection. `Ok(None)`: the response begins without the head; what the answer then turns out to be comes as events.
pub async fn begin(call: &Call, reader: &mut Reader, patience: Duration) -> Result<Option<Fields>, Stop> {
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
    /// Moves the turn on, once, and appends what is to be sent now: until that makes `out` at least so long, or nothing is left.
    ///
    /// `Pending`: all that was ready has been appended, if there was any, and what comes next wakes whoever polled. `false`: the
    /// turn is over, and all of it has been appended. `true`: there may be more.
    pub(crate) fn poll_fill(&mut self, cx: &mut Context<'_>, out: &mut Vec<u8>, most: usize) -> Poll<bool> {
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
                return Poll::Ready(false);
            }
        }
        let before = out.len();
        while out.len() < most {
            let shown = self.reader.poll_next(cx, MAX_EVENTS_AT_ONCE, |event| match framing {
                Framing::Chat => sse::encode(out, Some((&turn, event.seq)), Some(event.name), event.payload),
                Framing::OpenAi => sse::encode(out, None, None, event.payload),
            });
            match shown {
                Poll::Ready(0) => {
                    self.over = true;
                    return Poll::Ready(false);
                }
                Poll::Ready(_) => {}
                Poll::Pending => {
                    let now = Instant::now();
                    if out.len() > before {
                        self.silence.last = now;
                    }
                    if self.silence.is_over(cx, now) {
                        sse::comment(out);
                    }
                    return Poll::Pending;
                }
            }
        }
        Poll::Ready(true)
    }

    /// The body of `turn`'s answer. `early`: the response is begun without the answer's head.
    pub fn new(call: Call, reader: Reader, turn: TurnId, framing: Framing, heartbeat: Duration, early: bool) -> Stream {
        let silence = Silence { after: heartbeat, last: Instant::now(), alarm: Alarm::after(heartbeat) };
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
        let filled = self.poll_fill(cx, &mut out, MAX_FRAME_BYTES);
        match filled {
            Poll::Ready(false) if out.is_empty() => Poll::Ready(None),
            Poll::Pending if out.is_empty() => Poll::Pending,
            // Where there was something, it is polled again for the rest of it.
            Poll::Ready(_) | Poll::Pending => Poll::Ready(Some(Ok(Frame::data(out.into())))),
        }
    }
}
