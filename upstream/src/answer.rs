//! An answer, read as it is asked for: no task and no channel between the upstream's socket and the caller.

use std::{
    error::Error,
    fmt,
    future::poll_fn,
    io,
    sync::Arc,
    task::{Context, Poll, ready},
};

use headgate_contracts::{
    Batch, Code, Dialect, Fault, Finish, Head, Prompt, What,
    wire::{self, Malformed, Step, sse},
};
use tokio::time::Instant;

use crate::{
    Alarm, Shared,
    balance::Lease,
    cancel::Cancel,
    connect::Io,
    endpoint::Endpoint,
    exchange::{READ_BYTES, poll_read},
    hop::Place,
    http1::Framing,
    line::Line,
    open::Opened,
    pace::Pace,
    settings::{Protocol, Timeouts},
    stats::Count,
};

/// An answer of an upstream: a head, then events in batches.
///
/// Dropping it closes the connection at once, which stops the model; where the upstream has a cancel call, that is made too. On a
/// socket of many turns it is stopped by a frame.
/// Memory: at most one unfinished event (`limits.event`) and what one read brought, 16 KiB; nothing while nothing is unfinished.
pub struct Answer {
    /// What the upstream said of the answer; filled as its events come.
    pub head: Head,
    shared: Arc<Shared>,
    endpoint: Arc<Endpoint>,
    /// Gone once the answer has ended or broken.
    connection: Option<(Connection, Lease)>,
    /// Bytes of the body that came with the head.
    early: Vec<u8>,
    body: Body,
    clock: Clock,
    pace: Pace,
    broken: Option<Box<Fault>>,
    cancel: Cancel,
}

/// Where an answer comes from.
enum Connection {
    /// A connection of its own.
    Own(Io),
    /// A place on a socket of many turns.
    Shared(Box<Place>),
}

impl Answer {
    pub(crate) fn new(shared: Arc<Shared>, opened: Opened, clock: Clock) -> Answer {
        let (connection, lease, begun, form, cancel) = match opened {
            Opened::Own { io, lease, begun, form, cancel } => (Connection::Own(io), lease, Some(begun), form, cancel),
            Opened::Shared { place, lease } => (Connection::Shared(Box::new(place)), lease, None, Form::Frames, Cancel::none()),
        };
        let body = Body {
            protocol: shared.settings.protocol,
            max_whole: shared.settings.limits.whole,
            framing: begun.as_ref().map_or(Framing::UntilClose, |begun| begun.head.body),
            keep: begun.as_ref().is_some_and(|begun| begun.head.keep),
            form,
            finish: Finish::default(),
            asked: Asked::Never,
            ended: false,
        };
        let endpoint = Arc::clone(lease.endpoint());
        let (connection, early) = (Some((connection, lease)), begun.map(|begun| begun.early).unwrap_or_default());
        Answer { head: Head::default(), shared, endpoint, connection, early, body, clock, pace: Pace::default(), broken: None, cancel }
    }

    /// Waits for events.
    ///
    /// `batch`: replaced by every event that one read completed; it has room only where it has events. `true`: there is at least one. `false`: the answer has ended
    /// properly, and had done so with the batch before. Cancel safe: nothing is lost when the future is dropped. Backpressure
    /// is not to call it: then nothing is read.
    ///
    /// Errors: `upstream_timeout_first_byte`, `upstream_stalled`, `stream_limit_exceeded` (total time), `upstream_reset` (ended
    /// without a terminal event), `upstream_protocol_error`, `upstream_event_too_large`, or what the upstream itself says. An
    /// error comes after the events before it, and again whenever it is asked for; the connection is closed by then.
    pub async fn next(&mut self, batch: &mut Batch) -> Result<bool, Fault> {
        poll_fn(|cx| self.poll_next(cx, batch)).await
    }

    /// As [`Answer::next`], for futures written by hand.
    pub fn poll_next(&mut self, cx: &mut Context<'_>, batch: &mut Batch) -> Poll<Result<bool, Fault>> {
        batch.clear();
        batch.dialect = match self.body.protocol {
            Protocol::OpenAi => Dialect::OpenAi,
            Protocol::Orchestrator => Dialect::Headgate,
        };
        loop {
            if let Some(fault) = &self.broken {
                return Poll::Ready(Err(Fault::clone(fault)));
            }
            if self.body.ended {
                return Poll::Ready(Ok(false));
            }
            let Poll::Ready(filled) = self.poll_fill(cx, batch) else {
                batch.give_back();
                return Poll::Pending;
            };
            if self.body.ended {
                self.settle(filled.is_ok());
            }
            if let Err(fault) = filled {
                self.connection = None;
                self.broken = Some(Box::new(self.shared.placed(&self.endpoint, fault)));
            }
            if !batch.is_empty() {
                self.clock.begun = true;
                return Poll::Ready(Ok(true));
            }
        }
    }

    /// Why the model stopped writing; known once `next` has given `false`.
    pub fn finish(&self) -> Finish {
        self.body.finish
    }

    /// Whether a person was asked something so far.
    pub fn asks(&self) -> bool {
        self.body.asked != Asked::Never
    }

    /// The way back for what they say. `prompt`: whose answer this is, without its text; its seal proves the call, where one is made.
    pub fn line(&self, prompt: Prompt) -> Line {
        match &self.connection {
            Some((Connection::Shared(place), _)) => place.line(),
            Some((Connection::Own(_), _)) | None => Line::by_call(&self.shared, &self.endpoint, prompt),
        }
    }

    /// When the last batch was read.
    pub fn read_at(&self) -> Instant {
        self.clock.last
    }

    /// Host and port of the endpoint that answers, for the log.
    pub fn endpoint(&self) -> &str {
        &self.endpoint.name
    }

    /// One read, decoded into `batch`.
    fn poll_fill(&mut self, cx: &mut Context<'_>, batch: &mut Batch) -> Poll<Result<(), Fault>> {
        let Answer { head, shared, connection, early, body, clock, pace, .. } = self;
        if !early.is_empty() || body.framing.ended() {
            let early = std::mem::take(early);
            shared.stats.bytes.add(early.len() as u64);
            clock.last = Instant::now();
            return Poll::Ready(body.take(&early, head, batch));
        }
        let io = match connection {
            None => return Poll::Ready(Err(reset(Cut::NoTerminal))),
            Some((Connection::Own(io), _)) => io,
            Some((Connection::Shared(place), _)) => {
                return match place.poll_ready(cx) {
                    Poll::Pending => clock.poll(cx, &shared.settings.timeouts, body.asked == Asked::Now).map(Err),
                    Poll::Ready(Err(fault)) => Poll::Ready(Err(fault)),
                    Poll::Ready(Ok(())) => {
                        clock.last = Instant::now();
                        Poll::Ready(body.take_frames(place, &shared.stats.bytes, head, batch))
                    }
                };
            }
        };
        match poll_read(io, cx, |bytes| {
            shared.stats.bytes.add(bytes.len() as u64);
            body.take(bytes, head, batch)
        }) {
            Poll::Pending => clock.poll(cx, &shared.settings.timeouts, body.asked == Asked::Now).map(Err),
            Poll::Ready(Ok(Some(taken))) => {
                let now = Instant::now();
                pace.read(io, now - clock.last);
                clock.last = now;
                Poll::Ready(taken)
            }
            Poll::Ready(Ok(None)) => Poll::Ready(body.close(head, batch)),
            Poll::Ready(Err(error)) => Poll::Ready(Err(reset(Cut::Connection(error)))),
        }
    }

    /// The upstream has said its last: there is nothing left to cancel, and the connection may serve the next turn.
    fn settle(&mut self, well: bool) {
        self.cancel.disarm();
        if let Some((Connection::Own(io), lease)) = self.connection.take()
            && well
            && self.body.keep
        {
            lease.endpoint().keep(io, self.body.framing);
        }
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        if !self.body.ended && self.broken.is_none() {
            self.shared.stats.left.one();
        }
    }
}

impl fmt::Debug for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Answer").field("endpoint", &self.endpoint.name).field("ended", &self.body.ended).finish_non_exhaustive()
    }
}

/// Whether a person is asked.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Asked {
    Never,
    Before,
    /// And nothing has come since: so long the upstream's silence is theirs.
    Now,
}

/// In which form the answer comes.
pub(crate) enum Form {
    /// As server-sent events. Between two of them nothing is kept.
    Events { limits: sse::Limits, unfinished: Option<Box<sse::Decoder>> },
    /// As one JSON document, from a server that does not stream: gathered, then decoded.
    Whole(Vec<u8>),
    /// As frames of a WebSocket, which have been taken apart.
    Frames,
}

/// The body as it is taken apart: frame, form, vocabulary.
struct Body {
    protocol: Protocol,
    /// The most bytes of an answer that comes whole.
    max_whole: usize,
    framing: Framing,
    keep: bool,
    form: Form,
    finish: Finish,
    asked: Asked,
    /// The terminal event has come.
    ended: bool,
}

impl Body {
    /// Decodes what was read; events before a fault stay in `batch`.
    fn take(&mut self, bytes: &[u8], head: &mut Head, batch: &mut Batch) -> Result<(), Fault> {
        batch.make_room();
        let mut rest = bytes;
        while !rest.is_empty() && !self.framing.ended() {
            let (used, data) = match self.framing.strip(rest) {
                Ok(stripped) => stripped,
                // After the last event nobody is hurt but the connection.
                Err(_) if self.ended => break,
                Err(malformed) => return Err(protocol_error(malformed)),
            };
            rest = rest.get(used..).unwrap_or_default();
            if !data.is_empty() && !self.ended {
                self.decode(data, head, batch)?;
            }
        }
        self.keep &= rest.is_empty();
        if self.framing.ended() && !self.ended { self.end(head, batch) } else { Ok(()) }
    }

    /// The connection has ended.
    fn close(&mut self, head: &mut Head, batch: &mut Batch) -> Result<(), Fault> {
        self.keep = false;
        if self.framing.may_close() { self.end(head, batch) } else { Err(reset(Cut::Frame)) }
    }

    fn decode(&mut self, data: &[u8], head: &mut Head, batch: &mut Batch) -> Result<(), Fault> {
        match &mut self.form {
            Form::Events { limits, unfinished } => {
                let (mut kept, mut fresh) = (unfinished.take(), None);
                let frames = match &mut kept {
                    Some(kept) => &mut **kept,
                    None => fresh.insert(sse::Decoder::between(*limits)),
                };
                let mut rest = data;
                while !self.ended {
                    let good = batch.events().len();
                    let step = match frames.read(&mut rest) {
                        Ok(Some(frame)) => match self.protocol {
                            Protocol::OpenAi => wire::openai::decode(frame.data, head, batch),
                            Protocol::Orchestrator => wire::chat::decode(frame.event, frame.data, head, batch),
                        },
                        Ok(None) => break,
                        Err(over) => return Err(over.into()),
                    };
                    took(step, good, batch, &mut self.finish, &mut self.asked, &mut self.ended)?;
                }
                if !frames.is_between() {
                    *unfinished = kept.or_else(|| fresh.map(Box::new));
                }
                Ok(())
            }
            Form::Whole(whole) => {
                if whole.len() + data.len() > self.max_whole {
                    return Err(Fault::upstream(Code::UpstreamEventTooLarge).caused_by(Cut::TooLarge(self.max_whole)));
                }
                whole.extend_from_slice(data);
                Ok(())
            }
            Form::Frames => Ok(()),
        }
    }

    /// Decodes frames that have come, as many at once as one read would have brought.
    fn take_frames(&mut self, place: &mut Place, bytes: &Count, head: &mut Head, batch: &mut Batch) -> Result<(), Fault> {
        let mut taken = 0;
        while let Some((name, object)) = place.next() {
            bytes.add(object.len() as u64);
            taken += object.len();
            let good = batch.events().len();
            let step = wire::chat::decode(name, object, head, batch);
            took(step, good, batch, &mut self.finish, &mut self.asked, &mut self.ended)?;
            if self.ended || taken >= READ_BYTES {
                break;
            }
        }
        Ok(())
    }

    /// The body is over: good only for an answer that came whole.
    fn end(&mut self, head: &mut Head, batch: &mut Batch) -> Result<(), Fault> {
        let Form::Whole(whole) = &mut self.form else { return Err(reset(Cut::NoTerminal)) };
        let whole = std::mem::take(whole);

        match wire::openai::decode_answer(&whole, head, batch)? {
            Step::Failed(fault) => {
                self.ended = true;
                Err(fault)
            }
            Step::More | Step::Asked | Step::Done => {
                self.finish = finish_of(batch, 0).unwrap_or(self.finish);
                self.ended = true;
                Ok(())
            }
        }
    }
}

/// What a decoded event means for the answer; events from `good` on came with it, and go with it where it is malformed.
fn took(
    step: Result<Step, Malformed>,
    good: usize,
    batch: &mut Batch,
    finish: &mut Finish,
    asked: &mut Asked,
    ended: &mut bool,
) -> Result<(), Fault> {
    match step {
        Ok(step @ (Step::More | Step::Asked | Step::Done)) => {
            *finish = finish_of(batch, good).unwrap_or(*finish);
            *asked = match (&step, *asked) {
                (Step::Asked, _) => Asked::Now,
                (_, Asked::Never) => Asked::Never,
                (_, Asked::Before | Asked::Now) => Asked::Before,
            };
            *ended = matches!(step, Step::Done);
            Ok(())
        }
        Ok(Step::Failed(fault)) => {
            *ended = true;
            Err(fault)
        }
        Err(malformed) => {
            batch.truncate(good);
            Err(malformed.into())
        }
    }
}

/// How the first choice finished, if one of the events from `from` says so.
fn finish_of(batch: &Batch, from: usize) -> Option<Finish> {
    batch.events().get(from..).unwrap_or_default().iter().rev().find_map(|event| match event.what {
        What::Finish { choice: 0, finish } => Some(finish),
        What::Finish { .. } | What::Text { .. } | What::Tool { .. } | What::Confirm { .. } | What::Usage(_) | What::Note => None,
    })
}

/// Why an answer broke, besides what the codecs say.
#[derive(Debug, thiserror::Error)]
enum Cut {
    #[error("the connection broke within the answer")]
    Connection(#[source] io::Error),
    #[error("the connection ended within the answer's frame")]
    Frame,
    #[error("the answer ended without its terminal event")]
    NoTerminal,
    #[error("the answer is larger than {0} bytes")]
    TooLarge(usize),
}

fn reset(cut: Cut) -> Fault {
    Fault::upstream(Code::UpstreamReset).caused_by(cut)
}

fn protocol_error(cause: impl Error + Send + Sync + 'static) -> Fault {
    Fault::upstream(Code::UpstreamProtocolError).caused_by(cause)
}

/// The deadlines of one turn. The timer is set once and moved only when it fires: an event costs a look at the clock.
pub(crate) struct Clock {
    opened: Instant,
    last: Instant,
    /// An event has come.
    begun: bool,
    timer: Alarm,
}

impl Clock {
    /// A clock, and when the answer must have begun.
    pub(crate) fn new(timeouts: &Timeouts) -> (Clock, Instant) {
        let opened = Instant::now();
        let first = opened + timeouts.first_byte.min(timeouts.total);
        (Clock { opened, last: opened, begun: false, timer: Alarm::new(first) }, first)
    }

    /// `asked`: what is waited for is a person, whom only the total time bounds here.
    fn due(&self, timeouts: &Timeouts, asked: bool) -> (Instant, Code) {
        let total = self.opened + timeouts.total;
        let (at, code) = if asked {
            (total, Code::StreamLimitExceeded)
        } else if self.begun {
            (self.last + timeouts.idle, Code::UpstreamStalled)
        } else {
            (self.opened + timeouts.first_byte, Code::UpstreamTimeoutFirstByte)
        };
        if at <= total { (at, code) } else { (total, Code::StreamLimitExceeded) }
    }

    /// Ready with the fault when a deadline has passed.
    fn poll(&mut self, cx: &mut Context<'_>, timeouts: &Timeouts, asked: bool) -> Poll<Fault> {
        loop {
            let (at, code) = self.due(timeouts, asked);
            if self.timer.at() > at {
                self.timer.set(at);
            }
            let now = Instant::now();
            ready!(self.timer.poll(cx, now));
            if now >= at {
                return Poll::Ready(Fault::upstream(code));
            }
            self.timer.set(at);
        }
    }
}
