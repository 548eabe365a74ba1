//! Many turns on one WebSocket: each is dispatched as a frame, its verdict binds the exact bytes of the frame's `payload`, and it
//! sends as much as it was given credit for, so that a turn nobody reads stops its own model and no other turn.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures_util::{
    Sink, SinkExt, Stream, StreamExt,
    stream::{self, BoxStream, SelectAll},
};
use headgate_contracts::{
    Code, Fault, Gone, Stop, TurnId,
    wire::{
        chat::{self, Confirmation, Done, ErrorEvent, Open},
        frames,
        hop::{self, DispatchFrame, Headers},
    },
};
use http::{HeaderMap, Request, Response};
use hyper::{
    body::Incoming,
    upgrade::{OnUpgrade, Upgraded},
};
use hyper_util::rt::TokioIo;
use tokio::{
    sync::{mpsc, watch},
    time::{MissedTickBehavior, interval, timeout},
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        self, Message, Utf8Bytes,
        handshake::server::create_response_with_body,
        protocol::{CloseFrame, Role, WebSocketConfig, frame::coding::CloseCode},
    },
};

use crate::{
    Orchestrator,
    front::{self, Body, Refused, STREAM, refusal, respond},
    metrics::Route,
    run::Run,
    serve::closing,
    socket, stream as sse,
    verify::Dispatched,
};

/// Time between two pings, and after three of them without a word from the other side it is taken for gone.
const PING: Duration = Duration::from_secs(15);
/// How long a closing handshake may take.
const FAREWELL: Duration = Duration::from_secs(1);
/// Frames that have been read and not yet been acted upon; then no more are read.
const WAITING_FRAMES: usize = 4;
/// Buffers are small, because most sockets are idle most of the time.
const BUFFER_BYTES: usize = 4 << 10;
/// An event is at most 128 KiB on the model's side; written anew it can be somewhat longer.
const MAX_EVENT_BYTES: usize = 1 << 20;

/// Where a connection that asked for an upgrade finds it, once hyper is done with the socket.
#[derive(Clone, Default)]
pub(crate) struct Slot(Arc<Mutex<Option<OnUpgrade>>>);

impl Slot {
    pub(crate) fn take(&self) -> Option<OnUpgrade> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn put(&self, upgrade: OnUpgrade) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(upgrade);
    }
}

/// Agrees to speak WebSocket.
pub(crate) fn upgrade(caller: socket::Request, mut request: Request<Incoming>, slot: &Slot) -> Response<Body> {
    let empty = || respond(http::StatusCode::OK, None, bytes::Bytes::new()).into_body();
    match create_response_with_body(&request, empty) {
        Ok(response) => {
            slot.put(hyper::upgrade::on(&mut request));
            caller.upgraded();
            response
        }
        Err(_) => refusal(&Fault::client(Code::ProtocolError).saying("expected a WebSocket handshake of version 13").into(), None),
    }
}

/// What the reading side asks of the writing side, in the order in which it came.
enum Asked {
    Frame(DispatchFrame),
    Complain(Fault),
}

/// What the caller said of a turn since it dispatched it.
#[derive(Clone, Copy)]
struct Wish {
    /// How many bytes of frames it may have sent, counted from its beginning.
    granted: u64,
    is_stopped: bool,
}

/// Speaks with one caller until either side is done. Leaving stops all turns of the socket.
pub(crate) async fn serve(orchestrator: Arc<Orchestrator>, upgrade: OnUpgrade, closed: watch::Receiver<bool>) {
    let Ok(Ok(upgraded)) = timeout(orchestrator.settings.patience.head, upgrade).await else { return };
    // A payload is JSON inside a JSON string: escaped, it may be twice as long.
    let longest = 2 * orchestrator.settings.limits.body + BUFFER_BYTES;
    let config = WebSocketConfig::default()
        .read_buffer_size(BUFFER_BYTES)
        .write_buffer_size(BUFFER_BYTES)
        .max_write_buffer_size(MAX_EVENT_BYTES)
        .max_message_size(Some(longest))
        .max_frame_size(Some(longest));
    let socket: WebSocketStream<TokioIo<Upgraded>> =
        WebSocketStream::from_raw_socket(TokioIo::new(upgraded), Role::Server, Some(config)).await;
    let (mut outward, inward) = socket.split();
    let (ask, asked) = mpsc::channel(WAITING_FRAMES);
    // Both sides in one task: neither can outlive the other.
    let farewell = tokio::select! {
        biased;
        farewell = read(inward, ask) => farewell,
        farewell = write(&orchestrator, &mut outward, asked, closed) => farewell,
    };
    if let Some(code) = farewell {
        let close = Message::Close(Some(CloseFrame { code, reason: Utf8Bytes::default() }));
        // Whether it arrives or not, this is the end.
        let _ = timeout(FAREWELL, outward.send(close)).await;
    }
}

/// Reads frames until the caller is gone. Gives what to say in farewell, where there is somebody to say it to.
async fn read(mut inward: impl Stream<Item = tungstenite::Result<Message>> + Unpin, ask: mpsc::Sender<Asked>) -> Option<CloseCode> {
    loop {
        let message = match timeout(3 * PING, inward.next()).await {
            Ok(Some(Ok(message))) => message,
            Ok(Some(Err(tungstenite::Error::Capacity(_)))) => return Some(CloseCode::Size),
            Ok(Some(Err(tungstenite::Error::Utf8(_)))) => return Some(CloseCode::Invalid),
            Ok(Some(Err(tungstenite::Error::Protocol(_)))) => return Some(CloseCode::Protocol),
            Ok(Some(Err(_)) | None) | Err(_) => return None,
        };
        let asked = match message {
            Message::Text(text) => DispatchFrame::parse(text.as_str()).map_or_else(Asked::Complain, Asked::Frame),
            Message::Ping(_) | Message::Pong(_) => continue,
            Message::Binary(_) => return Some(CloseCode::Unsupported),
            // tungstenite has answered it.
            Message::Close(_) | Message::Frame(_) => return None,
        };
        ask.send(asked).await.ok()?;
    }
}

/// Writes the events of all turns of the socket. A turn's next batch is read once the one before it has been taken.
///
/// Stops and credit come this way too, behind the turn they are about: one that overtook it would be lost.
async fn write(
    orchestrator: &Arc<Orchestrator>,
    outward: &mut (impl Sink<Message> + Unpin),
    mut asked: mpsc::Receiver<Asked>,
    mut closed: watch::Receiver<bool>,
) -> Option<CloseCode> {
    let mut turns: SelectAll<BoxStream<'static, Written>> = SelectAll::new();
    // Not those of the set: a stream that has given its last is taken out only when it is asked again.
    let mut open: HashMap<TurnId, watch::Sender<Wish>> = HashMap::new();
    let mut ping = interval(PING);
    ping.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ping.reset();
    let mut draining = false;
    loop {
        if draining && open.is_empty() {
            return Some(CloseCode::Restart);
        }
        let messages = tokio::select! {
            biased;
            () = closing(&mut closed), if !draining => {
                draining = true;
                continue;
            }
            asked = asked.recv() => match asked? {
                Asked::Frame(DispatchFrame::Turn { turn_id, .. }) if open.len() >= orchestrator.settings.limits.socket_turns => {
                    let full = Fault::client(Code::Overloaded).saying("the socket has as many open turns as it may");
                    orchestrator.metrics.undecided(Route::WebSocket).refused(full.code);
                    vec![untaken(full.into(), Some(turn_id))]
                }
                Asked::Frame(DispatchFrame::Turn { turn_id, .. }) if open.contains_key(&turn_id) => {
                    // Said of no turn: as the end of one it would be taken for that of the turn that goes on.
                    let twice = Fault::client(Code::TurnConflict);
                    orchestrator.metrics.undecided(Route::WebSocket).refused(twice.code);
                    vec![complaint(twice.into(), None)]
                }
                Asked::Frame(DispatchFrame::Turn { turn_id, payload, headers: Headers(headers), credit }) => {
                    let (steer, wish) = watch::channel(Wish { granted: credit.map_or(u64::MAX, u64::from), is_stopped: false });
                    open.insert(turn_id, steer);
                    turns.push(turn(orchestrator.clone(), Dispatch { turn_id, payload, headers, wish }));
                    continue;
                }
                Asked::Frame(DispatchFrame::Stop { turn_id }) => {
                    // Before it has its place among the open turns nobody else knows of it.
                    if let Some(steer) = open.get(&turn_id) {
                        steer.send_modify(|wish| wish.is_stopped = true);
                    }
                    orchestrator.runs.stop(turn_id);
                    continue;
                }
                Asked::Frame(DispatchFrame::Credit { turn_id, bytes }) => {
                    if let Some(steer) = open.get(&turn_id) {
                        steer.send_modify(|wish| wish.granted = wish.granted.saturating_add(bytes.into()));
                    }
                    continue;
                }
                Asked::Frame(DispatchFrame::Confirm { turn_id, id, accept }) => {
                    // Who dispatched a turn may answer for it. An answer that comes late, or twice, changes nothing.
                    if open.contains_key(&turn_id) {
                        let _ = orchestrator.runs.confirm(turn_id, &Confirmation { id, accept });
                    }
                    continue;
                }
                Asked::Complain(fault) => vec![complaint(fault.into(), None)],
            },
            written = turns.next(), if !turns.is_empty() => match written {
                Some(Written { messages, last }) => {
                    if let Some(turn) = last {
                        open.remove(&turn);
                    }
                    messages
                }
                None => continue,
            },
            _ = ping.tick() => vec![Message::Ping(bytes::Bytes::new())],
        };
        let sent = async {
            for message in messages {
                outward.feed(message).await?;
            }
            outward.flush().await
        };
        if !matches!(timeout(orchestrator.settings.patience.stall, sent).await, Ok(Ok(()))) {
            return None;
        }
        ping.reset();
    }
}

/// The frames of one batch of a turn, as many as it has credit for.
struct Written {
    messages: Vec<Message>,
    /// The turn, where it has ended with them.
    last: Option<TurnId>,
}

/// What a turn is begun with.
struct Dispatch {
    turn_id: TurnId,
    payload: String,
    headers: HeaderMap,
    wish: watch::Receiver<Wish>,
}

/// The events of one turn, batch by batch.
fn turn(orchestrator: Arc<Orchestrator>, dispatch: Dispatch) -> BoxStream<'static, Written> {
    enum State {
        Asked(Dispatch),
        Open(Box<Turn>),
        Over,
    }
    let events = stream::unfold(State::Asked(dispatch), move |state| {
        let orchestrator = orchestrator.clone();
        async move {
            match state {
                State::Asked(dispatch) => {
                    let Dispatch { turn_id, payload, headers, wish } = dispatch;
                    match begin(&orchestrator, turn_id, payload, headers, &wish).await {
                        Ok(run) => {
                            // The first batch has been read, and is given as the next one.
                            let at = run.batch.events().len();
                            let mut turn = Box::new(Turn { run, wish, sent: 0, at, seq: 0, object: Vec::new() });
                            let open = turn.event(Open::NAME, |run, object| sse::open(run).write(object));
                            Some((Written { messages: vec![open], last: None }, State::Open(turn)))
                        }
                        Err(refusal) => Some((Written { messages: vec![refusal], last: Some(turn_id) }, State::Over)),
                    }
                }
                State::Open(mut turn) => {
                    let written = turn.step().await;
                    let next = if written.last.is_some() { State::Over } else { State::Open(turn) };
                    Some((written, next))
                }
                State::Over => None,
            }
        }
    });
    events.boxed()
}

/// The turn whose model has begun to answer, or the frame that says why there is none.
async fn begin(
    orchestrator: &Arc<Orchestrator>,
    turn_id: TurnId,
    payload: String,
    headers: HeaderMap,
    wish: &watch::Receiver<Wish>,
) -> Result<Run, Message> {
    let undecided = orchestrator.metrics.undecided(Route::WebSocket);
    let taken = async {
        if payload.len() > orchestrator.settings.limits.body {
            return Err(Fault::client(Code::PayloadTooLarge).into());
        }
        let dispatched = Dispatched { method: "GET", path: STREAM, body: payload.as_bytes() };
        let admitted = front::admit(orchestrator, &headers, &dispatched).await?;
        if admitted.prompt.turn != turn_id {
            return Err(Fault::client(Code::InvalidRequest).saying("turn_id: the payload names another turn").into());
        }
        Ok(Run::begin(orchestrator, Route::WebSocket, admitted).await?)
    };
    let mut run = match taken.await {
        Ok(run) => run,
        Err(Refused(stop, turn)) => {
            undecided.refused(stop.code());
            return Err(untaken(stop, turn.or(Some(turn_id))));
        }
    };
    drop(payload);
    // A stop that came before the turn had its place; a later one finds it there.
    let opened = if wish.borrow().is_stopped { Err(run.end(Gone::Stopped.into())) } else { run.open(None).await };
    match opened {
        Ok(()) => {
            undecided.accepted();
            Ok(run)
        }
        Err(stop) => {
            undecided.refused(stop.code());
            Err(complaint(stop, Some(turn_id)))
        }
    }
}

/// A turn whose events are written as frames.
struct Turn {
    run: Run,
    wish: watch::Receiver<Wish>,
    /// Bytes of frames written so far: what takes credit.
    sent: u64,
    /// The next event of the batch.
    at: usize,
    seq: u64,
    object: Vec<u8>,
}

impl Turn {
    async fn step(&mut self) -> Written {
        match self.frames().await {
            Ok(Some(messages)) => Written { messages, last: None },
            Ok(None) => {
                let done = self.event(Done::NAME, |run, object| sse::done(run).write(object));
                Written { messages: vec![done], last: Some(self.run.turn) }
            }
            Err(stop) => {
                let error = self.event(ErrorEvent::NAME, |run, object| ErrorEvent::of(&stop, Some(run.turn), None).write(object));
                Written { messages: vec![error], last: Some(self.run.turn) }
            }
        }
    }

    /// The next events, as many as there is credit for; without any it is waited for, and the model is not read. `None`: that was all.
    async fn frames(&mut self) -> Result<Option<Vec<Message>>, Stop> {
        if self.at >= self.run.batch.events().len() {
            self.at = 0;
            if !self.run.advance(None).await? {
                return Ok(None);
            }
        }
        let (sent, mut granted) = (self.sent, self.wish.borrow().granted);
        if granted <= sent {
            let credit = async {
                // Its other end lives as long as the socket.
                let _ = self.wish.wait_for(|wish| wish.granted > sent).await;
            };
            self.run.meanwhile(credit).await?;
            granted = self.wish.borrow().granted;
        }
        let mut messages = Vec::with_capacity(self.run.batch.events().len().saturating_sub(self.at));
        while self.at < self.run.batch.events().len() && self.sent < granted {
            messages.extend(self.written(self.at));
            self.at += 1;
        }
        Ok(Some(messages))
    }

    /// The frame of one event of the batch, where it has one.
    fn written(&mut self, at: usize) -> Option<Message> {
        self.object.clear();
        let event = self.run.batch.events().get(at)?;
        let name = chat::encode(&self.run.batch, event, &mut self.object)?;
        Some(self.frame(name))
    }

    fn event(&mut self, name: &str, object: impl FnOnce(&Run, &mut Vec<u8>)) -> Message {
        self.object.clear();
        object(&self.run, &mut self.object);
        self.frame(name)
    }

    fn frame(&mut self, name: &str) -> Message {
        let mut out = Vec::with_capacity(self.object.len() + 96);
        frames::frame(&mut out, name, &self.run.turn, self.seq, &self.object);
        self.seq += 1;
        self.sent += out.len() as u64;
        text(out)
    }
}

/// The `error` frame of a turn that was not taken: nothing was done for it, and it may be tried elsewhere.
fn untaken(stop: Stop, turn: Option<TurnId>) -> Message {
    let (mut object, mut out) = (Vec::new(), Vec::new());
    ErrorEvent::of(&stop, turn, None).write(&mut object);
    hop::untaken(&mut out, &object);
    text(out)
}

/// The `error` frame of what never became a turn.
fn complaint(stop: Stop, turn: Option<TurnId>) -> Message {
    let (mut object, mut out) = (Vec::new(), Vec::new());
    ErrorEvent::of(&stop, turn, None).write(&mut object);
    frames::frame_with_ref(&mut out, ErrorEvent::NAME, None, None, &object);
    text(out)
}

fn text(json: Vec<u8>) -> Message {
    // Our encoders write UTF-8; should one ever not, a replaced character is better than a lost socket.
    let json = String::from_utf8(json).unwrap_or_else(|wrong| String::from_utf8_lossy(wrong.as_bytes()).into_owned());
    Message::text(json)
}
