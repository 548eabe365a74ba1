//! Many turns on one WebSocket to an orchestrator: each worker has its own sockets, and each socket a small task that reads for all
//! of its turns.
//!
//! A turn that nobody reads must stop its own model and no other turn. So the task always reads on, and what may come of one turn is
//! bounded by the credit that was sent for it: [`hop::WINDOW`] bytes at first, and as much anew as its reader has taken.
//! `docs/decisions/0120-a-task-reads-a-shared-socket.md` has the choice between a task and turns that read for each other.

use std::{
    collections::{HashMap, VecDeque, hash_map::Entry},
    future::poll_fn,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
    time::Duration,
};

use futures_util::{
    FutureExt, Sink, Stream, StreamExt,
    future::{BoxFuture, Shared as SharedFuture, WeakShared},
    task::AtomicWaker,
};
use headgate_contracts::{
    Batch, Code, Fault, Head, Prompt, TurnId, Who,
    wire::{
        Step,
        chat::{self, Confirmation},
        hop::{self, AnswerFrame},
        problem,
    },
};
use http::{
    HeaderValue, Request, StatusCode,
    header::{AUTHORIZATION, CONNECTION, HOST, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_VERSION, UPGRADE},
};
use tokio::{
    runtime::{self, Handle},
    time::{Instant, Interval, MissedTickBehavior, interval_at, timeout},
};
use tokio_tungstenite::{
    WebSocketStream, client_async_with_config,
    tungstenite::{
        self, Message,
        error::ProtocolError,
        handshake::client::generate_key,
        protocol::{CloseFrame, WebSocketConfig, frame::coding::CloseCode},
    },
};

use crate::{
    Shared,
    balance::Lease,
    connect::Io,
    endpoint::Endpoint,
    exchange::READ_BYTES,
    line::Line,
    open::{Failed, Opened, connect},
    pace::Pace,
    request::{TurnRequest, turn_path},
};

/// Silence after which the other side is asked for a sign of life; after twice as much it is taken for gone.
const PING: Duration = Duration::from_secs(15);
/// How long the other side may take none of what is written.
const STALL: Duration = Duration::from_secs(10);
/// How long a turn that was stopped may take to end, before its socket is not given any more.
const STOP_PATIENCE: Duration = Duration::from_secs(10);
/// How long a closing handshake may take.
const FAREWELL: Duration = Duration::from_secs(1);
/// The longest time between two looks at the clock.
const TICK: Duration = Duration::from_secs(5);
/// How many frames are read before other tasks have their turn.
const FRAMES_AT_ONCE: usize = 128;
/// The least that a message may hold, in bytes. More than an event may: one that is too large ends its turn and not the socket.
const MIN_MESSAGE_BYTES: usize = 1 << 20;
/// What is written before it is sent, besides one whole frame, in bytes.
const WRITE_BUFFER_BYTES: usize = 4 << 10;

/// The sockets of one endpoint.
#[derive(Default)]
pub(crate) struct Sockets(Mutex<Table>);

#[derive(Default)]
struct Table {
    // A worker is a runtime, and there are few of both: found faster than hashed.
    open: Vec<(runtime::Id, Held)>,
    dialled: Vec<(runtime::Id, WeakShared<Dial>)>,
}

/// A socket being opened: all turns that need it wait for the same one.
type Dial = BoxFuture<'static, Result<(), Failed>>;

/// A socket as its endpoint holds it. An endpoint that goes takes no turns any more: its sockets close when theirs have ended.
struct Held(Arc<Socket>);

impl Drop for Held {
    fn drop(&mut self) {
        self.0.state().is_retired = true;
        self.0.work.wake();
    }
}

impl Sockets {
    /// A place for the turn on a socket of this runtime, and whether the socket was opened for it.
    async fn place(&self, shared: &Arc<Shared>, endpoint: &Arc<Endpoint>, turn: TurnId) -> Result<(Place, bool), Failed> {
        let runtime = Handle::current().id();
        let mut is_new = false;
        loop {
            let dial = {
                let mut table = self.table();
                if let Some(place) = table.place(runtime, shared, turn) {
                    return Ok((place, is_new));
                }
                table.dial(runtime, shared, endpoint)
            };
            dial.await?;
            is_new = true;
        }
    }

    /// How many are open without a turn.
    pub(crate) fn idle(&self) -> usize {
        let is_idle = |state: &State| state.takes_turns() && state.turns.is_empty();
        self.table().open.iter().filter(|(_, held)| is_idle(&held.0.state())).count()
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn place(&mut self, runtime: runtime::Id, shared: &Arc<Shared>, turn: TurnId) -> Option<Place> {
        self.open.retain(|(_, held)| held.0.state().takes_turns());
        self.open.iter().filter(|(its, _)| *its == runtime).find_map(|(_, held)| Place::on(&held.0, shared, turn))
    }

    fn dial(&mut self, runtime: runtime::Id, shared: &Arc<Shared>, endpoint: &Arc<Endpoint>) -> SharedFuture<Dial> {
        self.dialled.retain(|(_, dial)| dial.upgrade().is_some_and(|dial| dial.peek().is_none()));
        let under_way = self.dialled.iter().filter(|(its, _)| *its == runtime).find_map(|(_, dial)| dial.upgrade());
        under_way.unwrap_or_else(|| {
            let (shared, endpoint) = (Arc::clone(shared), Arc::clone(endpoint));
            let dial = async move {
                let socket = dial(&shared, &endpoint).await?;
                endpoint.sockets.table().open.push((runtime, Held(socket)));
                Ok(())
            };
            let dial = dial.boxed().shared();
            self.dialled.extend(dial.downgrade().map(|weak| (runtime, weak)));
            dial
        })
    }
}

/// Why a socket is none, or no longer.
#[derive(Debug, thiserror::Error)]
enum Broken {
    #[error("the handshake took longer than {0:?}")]
    Late(Duration),
    #[error("the endpoint does not speak WebSocket")]
    Handshake(#[source] tungstenite::Error),
    #[error("the socket broke")]
    Socket(#[source] tungstenite::Error),
    #[error("the socket ended")]
    Ended,
    #[error("the endpoint closed the socket with code {0}")]
    Closed(u16),
    #[error("the socket was silent for {0:?}")]
    Silent(Duration),
    #[error("the endpoint took nothing for {0:?}")]
    Stalled(Duration),
    #[error("a message that is no text")]
    Binary,
    #[error("the endpoint does not understand our frames")]
    Misunderstood,
    #[error("a frame that names no turn")]
    Nameless,
    #[error("frame {found:?} came where {expected} was next")]
    Number { expected: u64, found: Option<u64> },
    #[error("more came than there was credit for")]
    Overdrawn,
    #[error("an event of {0} bytes")]
    TooLarge(usize),
    #[error("the worker ended")]
    Dropped,
}

fn reset(broken: Broken) -> Fault {
    Fault::upstream(Code::UpstreamReset).caused_by(broken)
}

fn protocol_error(broken: Broken) -> Fault {
    Fault::upstream(Code::UpstreamProtocolError).caused_by(broken)
}

/// Opens a socket, and starts the task that reads it.
async fn dial(shared: &Arc<Shared>, endpoint: &Arc<Endpoint>) -> Result<Arc<Socket>, Failed> {
    let settings = &shared.settings;
    let io = connect(shared, endpoint).await?;
    let path = turn_path(settings.protocol, settings.path.as_deref(), endpoint);
    // The scheme says nothing here but that it is a WebSocket: TLS, where there is any, is below.
    let mut request = Request::get(format!("ws://{}{path}", endpoint.host.to_str().unwrap_or_default()));
    if let Some(headers) = request.headers_mut() {
        headers.insert(HOST, endpoint.host.clone());
        headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
        headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
        headers.insert(SEC_WEBSOCKET_VERSION, HeaderValue::from_static("13"));
        headers.extend(HeaderValue::try_from(generate_key()).map(|key| (SEC_WEBSOCKET_KEY, key)));
        headers.extend(shared.authorization.clone().map(|authorization| (AUTHORIZATION, authorization)));
    }
    let request = request.body(()).map_err(|_| Failed::finally(Fault::us(Code::InternalError)))?;
    let message_bytes = MIN_MESSAGE_BYTES.max(2 * settings.limits.event);
    let config = WebSocketConfig::default()
        .read_buffer_size(READ_BYTES)
        .write_buffer_size(WRITE_BUFFER_BYTES)
        .max_message_size(Some(message_bytes))
        .max_frame_size(Some(message_bytes));
    let patience = settings.timeouts.connect;
    let stream = match timeout(patience, client_async_with_config(request, io, Some(config))).await {
        Ok(Ok((stream, _))) => stream,
        Ok(Err(error)) => return Err(unspoken(error)),
        Err(_) => return Err(Failed::elsewhere(Fault::upstream(Code::UpstreamConnectFailed).caused_by(Broken::Late(patience)))),
    };
    let idle = if settings.idle.max == 0 { Duration::ZERO } else { settings.idle.timeout };
    let socket = Arc::new(Socket { state: Mutex::default(), work: AtomicWaker::new(), event_bytes: settings.limits.event });
    tokio::spawn(carry(Carrier::new(Arc::clone(&socket), stream, idle)));
    Ok(socket)
}

/// What an answer to the handshake means that is no agreement to it. No turn has been sent.
fn unspoken(error: tungstenite::Error) -> Failed {
    match error {
        tungstenite::Error::Http(response) if response.status().is_client_error() || response.status().is_server_error() => {
            let status = response.status();
            let mut fault = problem::parse(status.as_u16(), response.body().as_deref().unwrap_or_default());
            fault.who = Who::Upstream;
            let again = matches!(status, StatusCode::BAD_GATEWAY | StatusCode::SERVICE_UNAVAILABLE | StatusCode::GATEWAY_TIMEOUT);
            if again { Failed::elsewhere(fault) } else { Failed::finally(fault) }
        }
        tungstenite::Error::Io(_) | tungstenite::Error::Protocol(ProtocolError::HandshakeIncomplete) => {
            Failed::elsewhere(reset(Broken::Handshake(error)))
        }
        other => Failed::finally(protocol_error(Broken::Handshake(other))),
    }
}

/// One socket, as its turns and its task see it.
pub(crate) struct Socket {
    // Never contended where the runtime is one thread.
    state: Mutex<State>,
    /// Wakes the task: there is something to be sent.
    work: AtomicWaker,
    /// The largest event.
    event_bytes: usize,
}

#[derive(Default)]
struct State {
    turns: HashMap<TurnId, Slot>,
    /// It was given a turn since the clock was last looked at.
    has_served: bool,
    /// What is to be sent, at most three of each turn and the answers to its questions.
    out: VecDeque<Out>,
    /// Takes no turns any more, for it has broken.
    is_over: bool,
    /// Takes none, for its endpoint is gone or the other side no longer does what it is asked; the turns it has go on.
    is_retired: bool,
}

enum Out {
    /// A turn's own frame.
    Turn(TurnId, Vec<u8>),
    Stop(TurnId),
    /// What a person says to a question of it.
    Confirm(TurnId, Vec<u8>),
    /// As much credit as is due when it is sent.
    Credit(TurnId),
}

/// What a socket knows of one turn.
struct Slot {
    is_sent: bool,
    frames: Frames,
    /// The next frame's number.
    seq: u64,
    /// How many bytes may still come.
    credit: i64,
    /// How many have been taken since credit was sent.
    due: u32,
    /// Whether it stands in the queue for credit.
    is_due: bool,
    /// The other side has said its last.
    is_ended: bool,
    /// What ends the turn behind the frames that came.
    broken: Option<End>,
    waker: Option<Waker>,
    /// The other side has been told to stop it.
    is_stopped: bool,
    /// Since when nobody waits for it, though it has not ended.
    left: Option<Instant>,
}

/// Why a turn gets nothing more.
#[derive(Clone)]
struct End {
    fault: Fault,
    /// Whether the endpoint surely did not take the turn.
    is_untaken: bool,
}

/// Frames that have come, in order: one buffer for all of their objects.
#[derive(Default)]
struct Frames {
    text: String,
    each: Vec<Frame>,
    /// As long as they were on the wire: what they took of the credit, in bytes.
    wire: u32,
}

#[derive(Clone, Copy)]
struct Frame {
    name: &'static str,
    /// `None`: it never became a turn.
    seq: Option<u64>,
    /// Whether the other side says that it did not take the turn.
    is_untaken: bool,
    /// Where the object ends in the buffer.
    end: usize,
}

/// The events there are. Others are passed over, as decoders do.
const NAMES: [&str; 7] = ["open", "text", "tool", "confirm", "usage", "done", "error"];

impl State {
    fn takes_turns(&self) -> bool {
        !self.is_over && !self.is_retired
    }

    /// The next frame to send.
    fn next(&mut self) -> Option<Vec<u8>> {
        loop {
            let mut frame = Vec::new();
            match self.out.pop_front()? {
                Out::Turn(turn, bytes) => {
                    let Some(slot) = self.turns.get_mut(&turn) else { continue };
                    slot.is_sent = true;
                    return Some(bytes);
                }
                Out::Stop(turn) => hop::stop(&mut frame, &turn),
                Out::Confirm(turn, bytes) => match self.turns.contains_key(&turn) {
                    true => return Some(bytes),
                    false => continue,
                },
                Out::Credit(turn) => {
                    let Some(slot) = self.turns.get_mut(&turn).filter(|slot| slot.is_due) else { continue };
                    slot.is_due = false;
                    slot.credit += i64::from(slot.due);
                    hop::credit(&mut frame, &turn, std::mem::take(&mut slot.due));
                }
            }
            return Some(frame);
        }
    }

    /// Takes a frame that came, and gives whom it wakes.
    ///
    /// Errors: what ends the socket, since nobody can tell whose frame it was.
    fn take(&mut self, text: &str, event_bytes: usize) -> Result<Option<Waker>, Fault> {
        let frame = AnswerFrame::parse(text)?;
        let Some(turn) = frame.turn else {
            return Err(protocol_error(if frame.name == "error" { Broken::Misunderstood } else { Broken::Nameless }));
        };
        // One that was left and has ended, or was never here: nobody waits for it.
        let Some(slot) = self.turns.get_mut(&turn) else { return Ok(None) };
        let is_last = matches!(frame.name, "done" | "error");
        if let Some(fault) = slot.misfit(&frame, text.len(), event_bytes, is_last) {
            slot.broken.get_or_insert(End { fault, is_untaken: false });
            // Not only once its reader has come so far: what is broken needs no model.
            if !is_last && !std::mem::replace(&mut slot.is_stopped, true) {
                self.out.push_back(Out::Stop(turn));
            }
        } else if slot.broken.is_none() && slot.left.is_none() && !slot.keep(&frame, text.len()) {
            self.give_back(&turn, text.len() as u32);
            return Ok(None);
        }
        let Some(slot) = self.turns.get_mut(&turn) else { return Ok(None) };
        slot.is_ended |= is_last;
        if slot.is_ended && slot.left.is_some() {
            self.turns.remove(&turn);
            return Ok(None);
        }
        Ok(slot.waker.take())
    }

    /// So many bytes of a turn have been taken: it gets credit for them once they are worth a frame. Whether there is one to send.
    fn give_back(&mut self, turn: &TurnId, bytes: u32) -> bool {
        let Some(slot) = self.turns.get_mut(turn) else { return false };
        slot.due = slot.due.saturating_add(bytes);
        if slot.is_due || slot.is_ended || slot.due < hop::WINDOW / 2 {
            return false;
        }
        slot.is_due = true;
        self.out.push_back(Out::Credit(*turn));
        true
    }

    /// Nothing comes any more. `is_untaken`: whether turns of which nothing has been heard were surely not taken.
    fn end(&mut self, fault: &Fault, is_untaken: bool) -> Vec<Waker> {
        self.is_over = true;
        self.out.clear();
        self.turns.retain(|_, slot| slot.left.is_none());
        let mut woken = Vec::new();
        for slot in self.turns.values_mut().filter(|slot| !slot.is_ended) {
            slot.broken.get_or_insert_with(|| End { fault: fault.clone(), is_untaken: !slot.is_sent || (is_untaken && slot.seq == 0) });
            woken.extend(slot.waker.take());
        }
        woken
    }
}

impl Slot {
    fn new() -> Slot {
        Slot {
            is_sent: false,
            frames: Frames::default(),
            seq: 0,
            credit: hop::WINDOW.into(),
            due: 0,
            is_due: false,
            is_ended: false,
            broken: None,
            waker: None,
            is_stopped: false,
            left: None,
        }
    }

    /// What is wrong with the frame that comes next, and counts it.
    fn misfit(&mut self, frame: &AnswerFrame<'_>, bytes: usize, event_bytes: usize, is_last: bool) -> Option<Fault> {
        // A turn that has ended says nothing more; one that never began ends with a frame of no number.
        let is_next = !self.is_ended && (frame.seq == Some(self.seq) || (frame.seq.is_none() && frame.name == "error"));
        if !is_next {
            return Some(protocol_error(Broken::Number { expected: self.seq, found: frame.seq }));
        }
        let has_credit = self.credit > 0 || is_last || self.seq == 0;
        self.seq += 1;
        self.credit -= bytes as i64;
        if !has_credit {
            return Some(protocol_error(Broken::Overdrawn));
        }
        let object = frame.object_bytes();
        (object > event_bytes).then(|| Fault::upstream(Code::UpstreamEventTooLarge).caused_by(Broken::TooLarge(object)))
    }

    /// Whether there is such an event.
    fn keep(&mut self, frame: &AnswerFrame<'_>, bytes: usize) -> bool {
        let Some(name) = NAMES.into_iter().find(|name| *name == frame.name) else { return false };
        frame.object(&mut self.frames.text);
        let is_untaken = frame.seq.is_none() && frame.taken == Some(false);
        self.frames.each.push(Frame { name, seq: frame.seq, is_untaken, end: self.frames.text.len() });
        self.frames.wire = self.frames.wire.saturating_add(bytes as u32);
        true
    }
}

impl Socket {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends what a person says to a question of `turn`; whether that still goes on here.
    pub(crate) fn confirm(&self, turn: &TurnId, said: &Confirmation) -> bool {
        let mut state = self.state();
        let goes_on = state.turns.get(turn).is_some_and(|slot| !slot.is_ended && slot.broken.is_none() && slot.left.is_none());
        if goes_on {
            let mut frame = Vec::new();
            hop::confirm(&mut frame, turn, said);
            state.out.push_back(Out::Confirm(*turn, frame));
            drop(state);
            self.work.wake();
        }
        goes_on
    }

    fn end(&self, fault: &Fault, is_untaken: bool) {
        let woken = self.state().end(fault, is_untaken);
        woken.into_iter().for_each(Waker::wake);
    }
}

/// A turn's place on a socket. Dropping it stops the turn, unless it has ended.
pub(crate) struct Place {
    shared: Arc<Shared>,
    socket: Arc<Socket>,
    turn: TurnId,
    /// Taken from the socket, and how far it has been read.
    taken: Frames,
    read: usize,
    begin: usize,
}

impl Place {
    fn on(socket: &Arc<Socket>, shared: &Arc<Shared>, turn: TurnId) -> Option<Place> {
        let mut state = socket.state();
        if !state.takes_turns() || state.turns.len() >= hop::MAX_TURNS {
            return None;
        }
        match state.turns.entry(turn) {
            Entry::Occupied(_) => return None,
            Entry::Vacant(entry) => entry.insert(Slot::new()),
        };
        state.has_served = true;
        drop(state);
        Some(Place { shared: Arc::clone(shared), socket: Arc::clone(socket), turn, taken: Frames::default(), read: 0, begin: 0 })
    }

    /// The way back for what a person says.
    pub(crate) fn line(&self) -> Line {
        Line::by_frame(self.turn, Arc::downgrade(&self.socket))
    }

    fn send(&self, frame: Vec<u8>) {
        self.socket.state().out.push_back(Out::Turn(self.turn, frame));
        self.socket.work.wake();
    }

    /// Ready when [`Place::next`] has something, or will never have anything again.
    pub(crate) fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Fault>> {
        self.poll_taken(cx).map_err(|end| end.fault)
    }

    /// The next event that has come: its name and its object. Gives the place back what it took, once all of it has been read.
    pub(crate) fn next(&mut self) -> Option<(&'static str, &str)> {
        let Frame { name, end, .. } = *self.taken.each.get(self.read)?;
        let object = self.taken.text.get(self.begin..end)?;
        (self.read, self.begin) = (self.read + 1, end);
        Some((name, object))
    }

    fn poll_taken(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), End>> {
        if self.read < self.taken.each.len() {
            return Poll::Ready(Ok(()));
        }
        let mut state = self.socket.state();
        let Some(slot) = state.turns.get_mut(&self.turn) else {
            return Poll::Ready(Err(End { fault: reset(Broken::Ended), is_untaken: false }));
        };
        if slot.frames.each.is_empty() {
            if let Some(end) = &slot.broken {
                return Poll::Ready(Err(end.clone()));
            }
            if slot.is_ended {
                return Poll::Ready(Err(End { fault: reset(Broken::Ended), is_untaken: false }));
            }
            if !slot.waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
                slot.waker = Some(cx.waker().clone());
            }
            return Poll::Pending;
        }
        self.taken.clear();
        (self.read, self.begin) = (0, 0);
        std::mem::swap(&mut slot.frames, &mut self.taken);
        let has_work = state.give_back(&self.turn, self.taken.wire);
        drop(state);
        if has_work {
            self.socket.work.wake();
        }
        Poll::Ready(Ok(()))
    }

    /// What the endpoint says instead of an answer, if it does.
    fn refusal(&self) -> Option<Failed> {
        let Frame { name: "error", seq: None, is_untaken, end } = *self.taken.each.first()? else { return None };
        let object = self.taken.text.get(..end)?;
        let fault = match chat::decode("error", object, &mut Head::default(), &mut Batch::new()) {
            Ok(Step::Failed(fault)) => fault,
            Ok(Step::More | Step::Asked | Step::Done) => protocol_error(Broken::Nameless),
            Err(malformed) => malformed.into(),
        };
        let is_here_alone =
            matches!(fault.code, Code::Overloaded | Code::Draining | Code::EventLogUnavailable | Code::PolicyRegistryUnavailable);
        Some(if is_untaken && is_here_alone { Failed::elsewhere(fault) } else { Failed::finally(fault) })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut state = self.socket.state();
        let State { turns, out, is_over, .. } = &mut *state;
        let Entry::Occupied(mut entry) = turns.entry(self.turn) else { return };
        let slot = entry.get_mut();
        if slot.is_ended || *is_over {
            entry.remove();
        } else if slot.is_sent {
            slot.left = Some(Instant::now());
            slot.waker = None;
            slot.frames = Frames::default();
            if !std::mem::replace(&mut slot.is_stopped, true) {
                out.push_back(Out::Stop(self.turn));
            }
            self.shared.stats.cancelled.one();
        } else {
            entry.remove();
            out.retain(|out| !matches!(out, Out::Turn(turn, _) if *turn == self.turn));
        }
        drop(state);
        self.socket.work.wake();
    }
}

impl Frames {
    /// Without content, and with room only as large as a turn usually needs.
    fn clear(&mut self) {
        if self.text.capacity() > 2 * hop::WINDOW as usize {
            *self = Frames::default();
        }
        self.text.clear();
        self.each.clear();
        self.wire = 0;
    }
}

/// One endpoint: sends the turn on a socket that is open, or on a fresh one, and waits for the first word of its answer.
pub(crate) async fn one_try(shared: &Arc<Shared>, prompt: &Prompt, request: &TurnRequest<'_>, lease: Lease) -> Result<Opened, Failed> {
    let endpoint = lease.endpoint();
    let mut is_second = false;
    loop {
        let (mut place, is_new) = endpoint.sockets.place(shared, endpoint, prompt.turn).await?;
        if !is_new {
            shared.stats.reused.one();
        }
        place.send(request.frame_for(endpoint, hop::WINDOW).map_err(Failed::finally)?);
        match poll_fn(|cx| place.poll_taken(cx)).await {
            Ok(()) => return place.refusal().map_or_else(|| Ok(Opened::Shared { place, lease }), Err),
            // The socket went in the moment in which the turn was to go on it.
            Err(End { is_untaken: true, .. }) if !is_new && !is_second => {
                shared.stats.stale.one();
                is_second = true;
            }
            Err(End { fault, is_untaken: true }) => return Err(Failed::elsewhere(fault)),
            Err(End { fault, is_untaken: false }) => return Err(Failed::finally(fault)),
        }
    }
}

/// What owns a socket's connection, and reads and writes for all of its turns.
struct Carrier {
    socket: Arc<Socket>,
    stream: WebSocketStream<Io>,
    /// How long it is kept without a turn.
    idle: Duration,
    ticks: Interval,
    is_flushed: bool,
    /// Since when the other side takes nothing.
    blocked: Option<Instant>,
    heard: Instant,
    pace: Pace,
    is_asked: bool,
    /// When it last had a turn.
    served: Instant,
}

/// Why a socket ends.
enum Farewell {
    /// Nobody needs it.
    Idle,
    /// The other side has closed it.
    Closed(CloseCode),
    Broken(Fault),
}

/// Runs one socket to its end.
async fn carry(mut carrier: Carrier) {
    let farewell = poll_fn(|cx| carrier.poll(cx)).await;
    let code = match farewell {
        Farewell::Idle => CloseCode::Normal,
        Farewell::Closed(code) => {
            // Who says that it goes away has answered all that it took.
            let is_untaken = matches!(code, CloseCode::Away | CloseCode::Restart);
            carrier.socket.end(&reset(Broken::Closed(code.into())), is_untaken);
            code
        }
        Farewell::Broken(fault) => {
            carrier.socket.end(&fault, false);
            if fault.code == Code::UpstreamProtocolError { CloseCode::Protocol } else { CloseCode::Away }
        }
    };
    let close = async {
        carrier.stream.close(Some(CloseFrame { code, reason: Default::default() })).await?;
        while let Some(Ok(_)) = carrier.stream.next().await {}
        Ok::<_, tungstenite::Error>(())
    };
    // Whether it arrives or not, this is the end.
    let _ = timeout(FAREWELL, close).await;
}

impl Carrier {
    fn new(socket: Arc<Socket>, stream: WebSocketStream<Io>, idle: Duration) -> Carrier {
        let now = Instant::now();
        let tick = idle.clamp(Duration::from_millis(10), TICK);
        let mut ticks = interval_at(now + tick, tick);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Carrier {
            socket,
            stream,
            idle,
            ticks,
            is_flushed: true,
            blocked: None,
            heard: now,
            pace: Pace::default(),
            is_asked: false,
            served: now,
        }
    }

    /// Does all that can be done now; ready when the socket has ended.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Farewell> {
        self.socket.work.register(cx.waker());
        let read = match self.read(cx) {
            Ok(read) => read,
            Err(farewell) => return Poll::Ready(farewell),
        };
        if let Err(farewell) = self.write(cx).and_then(|()| self.watch(cx)) {
            return Poll::Ready(farewell);
        }
        if read == FRAMES_AT_ONCE {
            cx.waker().wake_by_ref();
        }
        Poll::Pending
    }

    /// Reads what has come, and gives how many messages that were.
    fn read(&mut self, cx: &mut Context<'_>) -> Result<usize, Farewell> {
        let mut read = 0;
        while read < FRAMES_AT_ONCE {
            let message = match Pin::new(&mut self.stream).poll_next(cx) {
                Poll::Pending => break,
                Poll::Ready(Some(Ok(message))) => message,
                Poll::Ready(Some(Err(error))) => return Err(Farewell::Broken(broken(error))),
                Poll::Ready(None) => return Err(Farewell::Broken(reset(Broken::Ended))),
            };
            read += 1;
            match message {
                Message::Text(text) => {
                    let woken = self.socket.state().take(text.as_str(), self.socket.event_bytes).map_err(Farewell::Broken)?;
                    woken.into_iter().for_each(Waker::wake);
                }
                Message::Ping(_) | Message::Pong(_) | Message::Frame(_) => {}
                Message::Binary(_) => return Err(Farewell::Broken(protocol_error(Broken::Binary))),
                Message::Close(frame) => return Err(Farewell::Closed(frame.map_or(CloseCode::Status, |frame| frame.code))),
            }
        }
        if read > 0 {
            let now = Instant::now();
            self.pace.read(self.stream.get_ref(), now - self.heard);
            (self.heard, self.is_asked) = (now, false);
        }
        Ok(read)
    }

    /// Writes as much as the connection takes.
    fn write(&mut self, cx: &mut Context<'_>) -> Result<(), Farewell> {
        let broken = |error| Farewell::Broken(broken(error));
        while Pin::new(&mut self.stream).poll_ready(cx).map_err(broken)?.is_ready() {
            let Some(frame) = self.socket.state().next() else { break };
            // Our encoders write UTF-8.
            let frame = String::from_utf8(frame).map_err(|_| Farewell::Broken(Fault::us(Code::InternalError)))?;
            Pin::new(&mut self.stream).start_send(Message::text(frame)).map_err(broken)?;
            self.is_flushed = false;
        }
        if !self.is_flushed {
            if Pin::new(&mut self.stream).poll_flush(cx).map_err(broken)?.is_ready() {
                (self.is_flushed, self.blocked) = (true, None);
            } else {
                self.blocked.get_or_insert_with(Instant::now);
            }
        }
        Ok(())
    }

    /// Looks after silence, stalls and idleness.
    fn watch(&mut self, cx: &mut Context<'_>) -> Result<(), Farewell> {
        let idle = self.idle;
        self.close_where(|state| state.is_retired || (idle.is_zero() && state.has_served))?;
        while self.ticks.poll_tick(cx).is_ready() {
            let now = Instant::now();
            let silence = now - self.heard;
            if silence >= 2 * PING {
                return Err(Farewell::Broken(reset(Broken::Silent(silence))));
            }
            if let Some(stall) = self.blocked.map(|since| now - since).filter(|stall| *stall >= STALL) {
                return Err(Farewell::Broken(reset(Broken::Stalled(stall))));
            }
            if silence >= PING && !self.is_asked && self.is_flushed {
                let ping = Message::Ping(Default::default());
                Pin::new(&mut self.stream).start_send(ping).map_err(|error| Farewell::Broken(broken(error)))?;
                (self.is_asked, self.is_flushed) = (true, false);
                self.write(cx)?;
            }
            let mut state = self.socket.state();
            if std::mem::take(&mut state.has_served) || !state.turns.is_empty() {
                self.served = now;
            }
            // Who does not stop what it is told to stop is not asked for more.
            let is_deaf = state.turns.values().any(|slot| slot.left.is_some_and(|left| now - left >= STOP_PATIENCE));
            state.is_retired |= is_deaf;
            drop(state);
            let rest = now - self.served;
            self.close_where(|state| state.is_retired || rest >= idle)?;
        }
        Ok(())
    }

    /// Ends the socket, where it has no turn and `so` holds.
    fn close_where(&self, so: impl FnOnce(&State) -> bool) -> Result<(), Farewell> {
        let mut state = self.socket.state();
        if state.turns.is_empty() && so(&state) {
            state.is_over = true;
            return Err(Farewell::Idle);
        }
        Ok(())
    }
}

impl Drop for Carrier {
    fn drop(&mut self) {
        self.socket.end(&reset(Broken::Dropped), false);
    }
}

/// What a fault of the socket means for its turns.
fn broken(error: tungstenite::Error) -> Fault {
    match error {
        tungstenite::Error::Protocol(ProtocolError::ResetWithoutClosingHandshake) => reset(Broken::Socket(error)),
        tungstenite::Error::Capacity(_) | tungstenite::Error::Protocol(_) | tungstenite::Error::Utf8(_) => {
            protocol_error(Broken::Socket(error))
        }
        other => reset(Broken::Socket(other)),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const EVENT_BYTES: usize = 8 << 10;
    /// What stands around an event's object in its frame, at most.
    const ENVELOPE_BYTES: usize = 128;

    proptest! {
        #[test]
        fn a_turn_that_nobody_reads_holds_its_credit_and_two_events_whatever_comes(
            frames in prop::collection::vec((0usize..8, 0u64..3, 0usize..EVENT_BYTES + 100, any::<bool>()), 1..60),
        ) {
            let (turn, mut state) = (TurnId::fresh(), State::default());
            state.turns.insert(turn, Slot::new());
            let mut seq = 0;
            for (name, step, bytes, numbered) in frames {
                let name = ["open", "text", "text", "text", "usage", "sung", "done", "error"][name];
                let numbered = if numbered || name != "error" { format!(",\"seq\":{seq}") } else { String::new() };
                let frame = format!("{{\"type\":\"{name}\",\"turn_id\":\"{turn}\"{numbered},\"text\":\"{}\"}}", "x".repeat(bytes));
                prop_assert!(state.take(&frame, EVENT_BYTES).is_ok(), "it says whose it is");
                // Mostly the next number; now and then the same again, or one left out.
                seq += if step == 2 { 1 } else { u64::from(bytes % 7 != 0) };
                let slot = &state.turns[&turn];
                // The one that took the last of the credit, and the one that ends it all.
                prop_assert!(slot.frames.text.len() <= hop::WINDOW as usize + 2 * (EVENT_BYTES + ENVELOPE_BYTES));
                prop_assert!(state.out.len() <= 2, "a stop and a credit");
            }
        }
    }

    #[test]
    fn what_was_never_sent_is_surely_not_taken() {
        let (waiting, sent, heard) = (TurnId::fresh(), TurnId::fresh(), TurnId::fresh());
        for is_said in [false, true] {
            let mut state = State::default();
            for turn in [waiting, sent, heard] {
                state.turns.insert(turn, Slot::new());
            }
            for turn in [sent, heard] {
                state.out.push_back(Out::Turn(turn, Vec::new()));
                assert!(state.next().is_some());
            }
            let frame = format!("{{\"type\":\"open\",\"turn_id\":\"{heard}\",\"seq\":0}}");
            assert!(state.take(&frame, EVENT_BYTES).is_ok());
            state.end(&reset(Broken::Ended), is_said);
            let untaken = |turn| state.turns[turn].broken.as_ref().map(|end| end.is_untaken);
            assert_eq!([&waiting, &sent, &heard].map(untaken), [Some(true), Some(is_said), Some(false)]);
        }
    }
}
