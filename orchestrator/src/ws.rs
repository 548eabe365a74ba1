//! Many turns on one WebSocket: each is dispatched as a frame, and its verdict binds the exact bytes of the frame's `payload`.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures_util::{
    Sink, SinkExt, Stream, StreamExt,
    stream::{self, BoxStream, SelectAll},
};
use headgate_contracts::{
    Code, Fault, Stop, TurnId,
    wire::{
        chat::{self, Done, ErrorEvent, Open},
        frames,
    },
};
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response};
use hyper::{
    body::Incoming,
    upgrade::{OnUpgrade, Upgraded},
};
use hyper_util::rt::TokioIo;
use serde::{
    Deserialize,
    de::{Deserializer, MapAccess, Visitor},
};
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

/// What a caller may send.
#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
enum Frame {
    /// Dispatches a turn: the bytes of `payload` are what the body of a request would be.
    Turn { turn_id: TurnId, payload: String, headers: Headers },
    /// Stops one.
    Stop { turn_id: TurnId },
}

/// The headers that a request would carry. Kept as they come: the same name twice is for the court to refuse.
struct Headers(HeaderMap);

/// The headers that mean something here.
const KNOWN: [&str; 7] =
    ["policy-verdict", "policy-version", "constitution-hash", "content-digest", "idempotency-key", "traceparent", "tracestate"];

impl<'de> Deserialize<'de> for Headers {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Headers, D::Error> {
        struct Fields;
        impl<'de> Visitor<'de> for Fields {
            type Value = Headers;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of headers by name")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Headers, A::Error> {
                let unfit = |_| serde::de::Error::custom("not a header");
                let mut headers = HeaderMap::new();
                while let Some((name, value)) = map.next_entry::<String, String>()? {
                    let name = name.parse::<HeaderName>().map_err(|_| unfit(()))?;
                    if !KNOWN.contains(&name.as_str()) || headers.len() >= 2 * KNOWN.len() {
                        return Err(unfit(()));
                    }
                    headers.append(name, HeaderValue::from_str(&value).map_err(|_| unfit(()))?);
                }
                Ok(Headers(headers))
            }
        }
        from.deserialize_map(Fields)
    }
}

impl Frame {
    fn parse(text: &str) -> Result<Frame, Fault> {
        // serde_json's own words may quote what it read.
        serde_json::from_str(text).map_err(|error| match error.classify() {
            serde_json::error::Category::Data => Fault::client(Code::InvalidRequest).saying("expected a frame of type turn or stop"),
            serde_json::error::Category::Syntax | serde_json::error::Category::Eof | serde_json::error::Category::Io => {
                Fault::client(Code::MalformedJson)
            }
        })
    }
}

/// What the reading side asks of the writing side.
enum Asked {
    Turn { turn_id: TurnId, payload: String, headers: HeaderMap },
    Complain(Fault),
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
        farewell = read(&orchestrator, inward, ask) => farewell,
        farewell = write(&orchestrator, &mut outward, asked, closed) => farewell,
    };
    if let Some(code) = farewell {
        let close = Message::Close(Some(CloseFrame { code, reason: Utf8Bytes::default() }));
        // Whether it arrives or not, this is the end.
        let _ = timeout(FAREWELL, outward.send(close)).await;
    }
}

/// Reads frames until the caller is gone. Gives what to say in farewell, where there is somebody to say it to.
async fn read(
    orchestrator: &Orchestrator,
    mut inward: impl Stream<Item = tungstenite::Result<Message>> + Unpin,
    ask: mpsc::Sender<Asked>,
) -> Option<CloseCode> {
    loop {
        let message = match timeout(3 * PING, inward.next()).await {
            Ok(Some(Ok(message))) => message,
            Ok(Some(Err(tungstenite::Error::Capacity(_)))) => return Some(CloseCode::Size),
            Ok(Some(Err(tungstenite::Error::Utf8(_)))) => return Some(CloseCode::Invalid),
            Ok(Some(Err(tungstenite::Error::Protocol(_)))) => return Some(CloseCode::Protocol),
            Ok(Some(Err(_)) | None) | Err(_) => return None,
        };
        let asked = match message {
            Message::Text(text) => match Frame::parse(text.as_str()) {
                Ok(Frame::Turn { turn_id, payload, headers: Headers(headers) }) => Asked::Turn { turn_id, payload, headers },
                Ok(Frame::Stop { turn_id }) => {
                    orchestrator.runs.stop(turn_id);
                    continue;
                }
                Err(fault) => Asked::Complain(fault),
            },
            Message::Ping(_) | Message::Pong(_) => continue,
            Message::Binary(_) => return Some(CloseCode::Unsupported),
            // tungstenite has answered it.
            Message::Close(_) | Message::Frame(_) => return None,
        };
        ask.send(asked).await.ok()?;
    }
}

/// Writes the events of all turns of the socket. A turn's next batch is read once the one before it has been taken.
async fn write(
    orchestrator: &Arc<Orchestrator>,
    outward: &mut (impl Sink<Message> + Unpin),
    mut asked: mpsc::Receiver<Asked>,
    mut closed: watch::Receiver<bool>,
) -> Option<CloseCode> {
    let mut turns: SelectAll<BoxStream<'static, Written>> = SelectAll::new();
    // Not their number in the set: a stream that has given its last is taken out only when it is asked again.
    let mut open = 0;
    let mut ping = interval(PING);
    ping.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ping.reset();
    let mut draining = false;
    loop {
        if draining && open == 0 {
            return Some(CloseCode::Restart);
        }
        let messages = tokio::select! {
            biased;
            () = closing(&mut closed), if !draining => {
                draining = true;
                continue;
            }
            frame = asked.recv() => match frame? {
                Asked::Turn { turn_id, .. } if open >= orchestrator.settings.limits.socket_turns => {
                    let full = Fault::client(Code::Overloaded).saying("the socket has as many open turns as it may");
                    orchestrator.metrics.undecided(Route::WebSocket).refused(full.code);
                    vec![complaint(full.into(), Some(turn_id))]
                }
                Asked::Turn { turn_id, payload, headers } => {
                    open += 1;
                    turns.push(turn(orchestrator.clone(), turn_id, payload, headers));
                    continue;
                }
                Asked::Complain(fault) => vec![complaint(fault.into(), None)],
            },
            written = turns.next(), if !turns.is_empty() => match written {
                Some(Written { messages, last }) => {
                    open -= usize::from(last);
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

/// The frames of one batch of a turn.
struct Written {
    messages: Vec<Message>,
    /// Whether the turn has ended with them.
    last: bool,
}

/// The events of one turn, batch by batch.
fn turn(orchestrator: Arc<Orchestrator>, turn_id: TurnId, payload: String, headers: HeaderMap) -> BoxStream<'static, Written> {
    enum State {
        Asked { payload: String, headers: HeaderMap },
        Open(Box<Turn>),
        Over,
    }
    let events = stream::unfold(State::Asked { payload, headers }, move |state| {
        let orchestrator = orchestrator.clone();
        async move {
            match state {
                State::Asked { payload, headers } => match begin(&orchestrator, turn_id, payload, headers).await {
                    Ok(run) => {
                        let mut turn = Box::new(Turn { run, seq: 0, object: Vec::new() });
                        let open = turn.event(Open::NAME, |run, object| sse::open(run).write(object));
                        Some((Written { messages: vec![open], last: false }, State::Open(turn)))
                    }
                    Err(Refused(stop, turn)) => {
                        let messages = vec![complaint(stop, turn.or(Some(turn_id)))];
                        Some((Written { messages, last: true }, State::Over))
                    }
                },
                State::Open(mut turn) => {
                    let written = turn.step().await;
                    let next = if written.last { State::Over } else { State::Open(turn) };
                    Some((written, next))
                }
                State::Over => None,
            }
        }
    });
    events.boxed()
}

async fn begin(orchestrator: &Arc<Orchestrator>, turn_id: TurnId, payload: String, headers: HeaderMap) -> Result<Run, Refused> {
    let undecided = orchestrator.metrics.undecided(Route::WebSocket);
    let begun = async {
        if payload.len() > orchestrator.settings.limits.body {
            return Err(Fault::client(Code::PayloadTooLarge).into());
        }
        let dispatched = Dispatched { method: "GET", path: STREAM, body: payload.as_bytes() };
        let admitted = front::admit(orchestrator, &headers, &dispatched).await?;
        if admitted.prompt.turn != turn_id {
            return Err(Fault::client(Code::InvalidRequest).saying("turn_id: the payload names another turn").into());
        }
        drop(payload);
        let mut run = Run::begin(orchestrator, Route::WebSocket, admitted).await?;
        run.open(None).await.map_err(|stop| Refused(stop, Some(turn_id)))?;
        Ok(run)
    };
    let begun = begun.await;
    match &begun {
        Ok(_) => undecided.accepted(),
        Err(Refused(stop, _)) => undecided.refused(stop.code()),
    }
    begun
}

/// A turn whose events are written as frames.
struct Turn {
    run: Run,
    seq: u64,
    object: Vec<u8>,
}

impl Turn {
    async fn step(&mut self) -> Written {
        match self.run.advance(None).await {
            Ok(true) => {
                let mut messages = Vec::with_capacity(self.run.batch.events().len());
                for at in 0..self.run.batch.events().len() {
                    messages.extend(self.written(at));
                }
                Written { messages, last: false }
            }
            Ok(false) => {
                let done = self.event(Done::NAME, |run, object| sse::done(run).write(object));
                Written { messages: vec![done], last: true }
            }
            Err(stop) => {
                let error = self.event(ErrorEvent::NAME, |run, object| ErrorEvent::of(&stop, Some(run.turn), None).write(object));
                Written { messages: vec![error], last: true }
            }
        }
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
        text(out)
    }
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
