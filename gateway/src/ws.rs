//! Many turns on one WebSocket: one task reads frames, polls the turns and writes their events, so that a `stop` is seen
//! while a write is blocked, and no turn waits for another.

use std::{
    collections::VecDeque,
    future::poll_fn,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures_util::{Sink, Stream};
use headgate_contracts::{
    Code, Credential, Fault, Gone, Principal, Prompt, Refusal, Secret, SessionId, Stop, Trace, TurnId,
    wire::{
        chat::ErrorEvent,
        frames::{self, ClientFrame, Which},
    },
};
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use hyper::{Request, Response, body::Incoming, ext::Protocol};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, Sleep, sleep},
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        Error, Message,
        handshake::derive_accept_key,
        protocol::{CloseFrame, Role, WebSocketConfig, frame::coding::CloseCode},
    },
};

use crate::{
    body::Reply,
    drive::Drive,
    front::{Facts, credential},
    live::{App, Route},
    outbox::Reader,
    serve::{Patient, Peer},
    session::{Begun, identify},
    voice::Voice,
};

/// The most turns open at once on one socket.
const MAX_TURNS: usize = 32;
/// The largest message a client may send: a turn with a long conversation, within the route's own bound on bodies.
const MAX_MESSAGE_BYTES: usize = 64 << 10;
/// The largest frame.
const MAX_FRAME_BYTES: usize = 16 << 10;
/// The most messages a client may send in a minute.
const MAX_MESSAGES_PER_MINUTE: u32 = 120;
/// The most events of one turn in one round, so that a fast model does not keep the others waiting.
const EVENTS_PER_ROUND: usize = 64;
/// The most bytes of all turns in one round, so that what waits for a slow socket waits in the turns' own bounds.
const BYTES_PER_ROUND: usize = 64 << 10;
/// How long a peer may take to answer a ping: as long as the silence before it, and no longer than this.
const PONG_PATIENCE: Duration = Duration::from_secs(20);
/// How long the rest of a turn that is over waits for credit, to within a heartbeat.
const STARVE_PATIENCE: Duration = Duration::from_secs(30);
/// How long a peer may take to finish the closing handshake.
const CLOSE_PATIENCE: Duration = Duration::from_secs(5);
/// Refusals within [`REFUSAL_WINDOW`] that close the socket.
const MAX_REFUSALS: usize = 3;
const REFUSAL_WINDOW: Duration = Duration::from_secs(60);

/// Whether a request asks for a WebSocket: HTTP/1.1 Upgrade (RFC 6455), or HTTP/2 extended CONNECT (RFC 8441).
pub(crate) fn asks(request: &Request<Incoming>) -> bool {
    let upgrade = request.headers().get(header::UPGRADE).is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"websocket"));
    let connect = request.method() == Method::CONNECT
        && request.extensions().get::<Protocol>().is_some_and(|protocol| protocol.as_str() == "websocket");
    upgrade || connect
}

/// The answer to the handshake; the session runs in a task of its own once the connection is ours.
pub(crate) fn upgrade(app: &App, route: &Arc<Route>, mut request: Request<Incoming>, peer: Peer) -> Result<Response<Reply>, Stop> {
    let headers = request.headers();
    let wrong = |message: &'static str| Stop::Failed(Fault::client(Code::InvalidRequest).saying(message));
    if headers.get(header::SEC_WEBSOCKET_VERSION).is_none_or(|version| version != "13") {
        return Err(wrong("Sec-WebSocket-Version must be 13"));
    }
    let offered = offered(headers);
    let bearer = offered.iter().find_map(|protocol| protocol.strip_prefix(frames::BEARER_PREFIX));
    if !offered.is_empty() && !offered.contains(&frames::SUBPROTOCOL) {
        return Err(wrong("the subprotocol must be headgate.v1"));
    }
    let credential = match (bearer, credential(headers)) {
        (Some(token), Credential::None) => Credential::Bearer(Secret::new(token)),
        (_, credential) => credential,
    };
    let facts = Facts::of(route, headers)?;
    let chosen = (!offered.is_empty()).then_some(HeaderValue::from_static(frames::SUBPROTOCOL));
    let mut response = Response::new(Reply::empty());
    if request.method() != Method::CONNECT {
        let key = headers.get(header::SEC_WEBSOCKET_KEY).ok_or_else(|| wrong("Sec-WebSocket-Key is missing"))?;
        let accept = HeaderValue::try_from(derive_accept_key(key.as_bytes())).map_err(|_| wrong("Sec-WebSocket-Key is not valid"))?;
        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        response.headers_mut().insert(header::UPGRADE, HeaderValue::from_static("websocket"));
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
        response.headers_mut().insert(header::SEC_WEBSOCKET_ACCEPT, accept);
    }
    if let Some(chosen) = chosen {
        response.headers_mut().insert(header::SEC_WEBSOCKET_PROTOCOL, chosen);
    }
    let place = app.drain().hold().ok_or_else(|| Stop::Failed(Fault::us(Code::Overloaded).after(Duration::from_secs(1))))?;
    let (app, route) = (app.clone(), route.clone());
    let on = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        let _place = place;
        if let Ok(upgraded) = on.await {
            let config = WebSocketConfig::default()
                .read_buffer_size(4 << 10)
                .write_buffer_size(4 << 10)
                // One event of the largest size, whatever it takes in JSON.
                .max_write_buffer_size(1 << 20)
                .max_message_size(Some(MAX_MESSAGE_BYTES))
                .max_frame_size(Some(MAX_FRAME_BYTES));
            let patient = Patient::new(TokioIo::new(upgraded), peer.stall);
            let socket = WebSocketStream::from_raw_socket(patient, Role::Server, Some(config)).await;
            Socket::new(socket, app, route, facts, credential, peer.head).run().await;
        }
    });
    Ok(response)
}

fn offered(headers: &HeaderMap) -> Vec<&str> {
    let values = headers.get_all(header::SEC_WEBSOCKET_PROTOCOL).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).map(str::trim).filter(|protocol| !protocol.is_empty()).collect()
}

struct Socket<S> {
    socket: WebSocketStream<S>,
    app: App,
    route: Arc<Route>,
    facts: Facts,
    credential: Credential,
    turns: Vec<Open>,
    /// Calls that need the client's identity first, or an answer of somebody else: they come back to a turn, stop one of another
    /// connection, or answer a question.
    lookups: Vec<Lookup>,
    /// Written, but not yet taken by the socket. New events are only asked for while this is empty.
    waiting: VecDeque<Message>,
    is_flushed: bool,
    is_draining: bool,
    /// When one side began to close.
    closing: Option<Instant>,
    /// What the client sends makes no sense any more; it is read, so that closing does not reset what was said, and thrown away.
    is_deaf: bool,
    is_shut: bool,
    refusals: VecDeque<Instant>,
    minute: (Instant, u32),
    /// Until when a client that has not said who it is has to say it.
    nameless: Option<Instant>,
    heard: Instant,
    spoke: Instant,
    pinged: Option<Instant>,
    alarm: Pin<Box<Sleep>>,
}

struct Open {
    turn: TurnId,
    reference: Option<String>,
    drive: Drive,
    reader: Reader,
    /// Events that may still be sent; `None`: the client does not count.
    credit: Option<usize>,
    /// Since when the turn is over and its client gives no credit for the rest.
    starved: Option<Instant>,
}

type Identified = Result<Principal, Stop>;

struct Lookup {
    turn: TurnId,
    what: Wish,
    who: Pin<Box<dyn Future<Output = Identified> + Send>>,
}

enum Wish {
    Stop,
    /// Said by the lookup itself.
    Confirm,
    Resume(Option<u64>),
}

impl<S: AsyncRead + AsyncWrite + Unpin> Socket<S> {
    /// `patience`: how long a client may take to send its `auth` frame, where it brought no credential and needs one.
    fn new(socket: WebSocketStream<S>, app: App, route: Arc<Route>, facts: Facts, credential: Credential, patience: Duration) -> Socket<S> {
        let now = Instant::now();
        let is_nameless = matches!(credential, Credential::None) && route.filters.iter().any(|built| built.admit.is_some());
        let alarm = Box::pin(sleep(route.plan.flow.heartbeat));
        Socket {
            socket,
            app,
            route,
            facts,
            credential,
            turns: Vec::new(),
            lookups: Vec::new(),
            waiting: VecDeque::new(),
            is_flushed: true,
            is_draining: false,
            closing: None,
            is_deaf: false,
            is_shut: false,
            refusals: VecDeque::new(),
            minute: (now, 0),
            nameless: is_nameless.then(|| now + patience),
            heard: now,
            spoke: now,
            pinged: None,
            alarm,
        }
    }

    async fn run(mut self) {
        let drain = self.app.drain().clone();
        let mut draining = std::pin::pin!(drain.wait());
        poll_fn(|cx| {
            if !self.is_draining {
                self.is_draining = draining.as_mut().poll(cx).is_ready();
            }
            self.poll(cx)
        })
        .await;
    }

    /// Does all that can be done now; ready when the socket is finished with.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            let mut moved = false;
            if let Err(error) = self.write(cx, &mut moved) {
                self.lost(&error);
                return Poll::Ready(());
            }
            let written = self.waiting.len();
            match self.read(cx) {
                Poll::Ready(true) => moved = true,
                Poll::Ready(false) => return Poll::Ready(()),
                Poll::Pending => {}
            }
            self.look_up(cx);
            self.speak(cx);
            // An idle socket is closed at once; one with open turns when they have ended.
            if self.is_draining && self.turns.is_empty() {
                self.close(Code::Draining);
            }
            if self.watch(cx).is_ready() {
                return Poll::Ready(());
            }
            if !moved && self.waiting.len() <= written {
                return Poll::Pending;
            }
        }
    }

    /// Takes what the client sends; whether it may send more.
    fn read(&mut self, cx: &mut Context<'_>) -> Poll<bool> {
        if self.is_deaf {
            let mut bytes = [0; 1 << 10];
            let mut bytes = ReadBuf::new(&mut bytes);
            let read = std::task::ready!(Pin::new(self.socket.get_mut()).poll_read(cx, &mut bytes));
            return Poll::Ready(read.is_ok() && !bytes.filled().is_empty());
        }
        match std::task::ready!(Pin::new(&mut self.socket).poll_next(cx)) {
            None => return Poll::Ready(false),
            Some(Ok(message)) => {
                self.heard = Instant::now();
                // Whatever it is, it is a sign of life.
                self.pinged = None;
                self.take(message);
            }
            Some(Err(error)) => {
                match error {
                    Error::Capacity(_) => self.close(Code::PayloadTooLarge),
                    Error::Utf8(_) => self.close_with(CloseCode::Invalid, "malformed_json"),
                    Error::Protocol(_) => self.close(Code::ProtocolError),
                    _ => return Poll::Ready(false),
                }
                // The socket gives nothing after an error: where the next frame begins is not known.
                self.is_deaf = true;
            }
        }
        Poll::Ready(true)
    }

    /// The client takes nothing any more, or is gone: its turns learn which.
    fn lost(&mut self, error: &Error) {
        if matches!(error, Error::Io(error) if error.kind() == std::io::ErrorKind::TimedOut) {
            self.turns.iter().for_each(|open| open.reader.stop(Gone::Slow));
        }
    }

    /// Gives the socket what it takes.
    fn write(&mut self, cx: &mut Context<'_>, moved: &mut bool) -> Result<(), Error> {
        while !self.waiting.is_empty() {
            match Pin::new(&mut self.socket).poll_ready(cx) {
                Poll::Ready(ready) => ready?,
                Poll::Pending => return Ok(()),
            }
            if let Some(message) = self.waiting.pop_front() {
                Pin::new(&mut self.socket).start_send(message)?;
                self.is_flushed = false;
                *moved = true;
            }
        }
        if !self.is_flushed {
            match Pin::new(&mut self.socket).poll_flush(cx) {
                Poll::Ready(flushed) => {
                    flushed?;
                    self.is_flushed = true;
                    self.spoke = Instant::now();
                }
                Poll::Pending => {}
            }
        }
        if self.is_deaf && self.is_flushed && self.waiting.is_empty() && !self.is_shut {
            self.is_shut = Pin::new(self.socket.get_mut()).poll_shutdown(cx).is_ready();
        }
        Ok(())
    }

    /// Moves every turn on, and writes what they have to say once all that was said before is taken.
    fn speak(&mut self, cx: &mut Context<'_>) {
        if self.closing.is_some() {
            return;
        }
        let Socket { turns, waiting, .. } = self;
        let mut room = if waiting.is_empty() { BYTES_PER_ROUND } else { 0 };
        let mut ended = Vec::new();
        turns.retain_mut(|open| {
            // Also where nothing can be written now: it may have been stopped, or its time may be up.
            open.drive.poll(cx);
            if room == 0 {
                return true;
            }
            let allowed = open.credit.map_or(EVENTS_PER_ROUND, |credit| credit.min(EVENTS_PER_ROUND));
            let (turn, reference) = (open.turn, open.reference.as_deref());
            let shown = open.reader.poll_next(cx, allowed, |event| {
                let mut text = Vec::with_capacity(event.payload.len() + 96);
                match (event.name, reference) {
                    ("open", Some(_)) => frames::frame_with_ref(&mut text, event.name, reference, Some(event.seq), event.payload),
                    _ => frames::frame(&mut text, event.name, &turn, event.seq, event.payload),
                }
                room = room.saturating_sub(text.len());
                waiting.extend(message(text));
            });
            match shown {
                Poll::Ready(0) => {
                    if let Some(stop) = open.reader.untold() {
                        waiting.extend(error_frame(&stop, Some(turn), reference));
                        ended.push(stop);
                    }
                    false
                }
                Poll::Ready(shown) => {
                    open.credit = open.credit.map(|credit| credit.saturating_sub(shown));
                    true
                }
                Poll::Pending => true,
            }
        });
        if room == 0 && !turns.is_empty() {
            // Who came last in this round comes earlier in the next.
            turns.rotate_left(1);
        }
        for stop in ended {
            self.refused(&stop);
        }
    }

    /// A message of the client's.
    fn take(&mut self, message: Message) {
        if self.closing.is_some() {
            return;
        }
        let now = Instant::now();
        if now - self.minute.0 >= Duration::from_secs(60) {
            self.minute = (now, 0);
        }
        self.minute.1 += 1;
        if self.minute.1 > MAX_MESSAGES_PER_MINUTE {
            return self.close(Code::RateLimited);
        }
        match message {
            Message::Text(text) => match ClientFrame::parse(text.as_str()) {
                Ok(frame) => self.obey(frame),
                Err(fault) => self.tell(&fault.into(), None),
            },
            Message::Binary(_) => self.close(Code::UnsupportedMediaType),
            // tungstenite answers closes and pings itself, with the next flush.
            Message::Close(_) => {
                self.leave();
                self.is_flushed = false;
            }
            Message::Ping(_) | Message::Frame(_) => self.is_flushed = false,
            Message::Pong(_) => {}
        }
    }

    fn obey(&mut self, frame: ClientFrame) {
        match frame {
            ClientFrame::Auth { token } => {
                self.credential = Credential::Bearer(token);
                self.nameless = None;
            }
            ClientFrame::Turn { turn, reference } => {
                if self.is_draining {
                    let fault = Fault::us(Code::Draining).after(Duration::from_secs(1));
                    return self.tell(&fault.into(), reference.as_deref());
                }
                if self.turns.len() >= MAX_TURNS {
                    let fault = Fault::client(Code::Overloaded).saying("32 turns are open on this socket");
                    return self.tell(&fault.into(), reference.as_deref());
                }
                let session = turn.session_id.clone().unwrap_or_else(SessionId::fresh);
                let mut prompt = Prompt::new(TurnId::fresh(), session, Vec::new());
                prompt.settings = turn.settings();
                prompt.messages = turn.messages;
                prompt.metadata = turn.metadata;
                self.facts.stamp(&mut prompt);
                // Turns of one socket are siblings below the span of whoever opened it; the handshake has none of its own.
                prompt.trace = match self.facts.trace.parent_id {
                    Some(_) => Trace { span_id: Trace::fresh().span_id, ..self.facts.trace.clone() },
                    None => Trace::fresh(),
                };
                // A key names one turn, and the handshake's headers are those of many.
                prompt.idempotency_key = None;
                prompt.credential = self.credential.clone();
                let Begun { turn, drive, reader, .. } = match self.app.turns().begin(&self.route, prompt, Voice::chat()) {
                    Ok(begun) => begun,
                    Err(stop) => return self.tell(&stop, reference.as_deref()),
                };
                self.turns.push(Open { turn, reference, drive, reader, credit: None, starved: None });
            }
            ClientFrame::Stop(Which::Turn(turn_id)) => match self.turns.iter().find(|open| open.turn == turn_id) {
                Some(open) => open.reader.stop(Gone::Stopped),
                None => self.wish(turn_id, Wish::Stop),
            },
            ClientFrame::Stop(Which::Ref(name)) => {
                let mut named = self.turns.iter().filter(|open| open.reference.as_ref() == Some(&name)).peekable();
                if named.peek().is_none() {
                    return self.tell(&Fault::client(Code::SessionNotFound).into(), Some(&name));
                }
                named.for_each(|open| open.reader.stop(Gone::Stopped));
            }
            // Its events would come twice, and nobody could tell which are which.
            ClientFrame::Resume { turn_id, .. } if self.turns.iter().any(|open| open.turn == turn_id) => {
                let fault = Fault::client(Code::InvalidRequest).saying("this turn is open on this socket");
                self.waiting.extend(error_frame(&fault.into(), Some(turn_id), None));
            }
            ClientFrame::Resume { turn_id, after } => self.wish(turn_id, Wish::Resume(after)),
            ClientFrame::Credit { turn_id, events } => {
                if let Some(open) = self.turns.iter_mut().find(|open| open.turn == turn_id) {
                    open.credit = Some(open.credit.unwrap_or(0).saturating_add(events as usize));
                }
            }
            ClientFrame::Confirm { turn_id, said } => {
                if let Some(open) = self.turns.iter().find(|open| open.turn == turn_id) {
                    // Whoever reads a turn here has said who it is.
                    let hook = open.reader.hook();
                    self.look(turn_id, Wish::Confirm, async move {
                        hook.confirm(&said).await?;
                        Ok(Principal::anonymous())
                    });
                } else {
                    let (app, route, credential) = (self.app.clone(), self.route.clone(), self.credential.clone());
                    self.look(turn_id, Wish::Confirm, async move {
                        let principal = identify(&route, credential).await?;
                        app.turns().find(turn_id, &principal)?.confirm(&said).await?;
                        Ok(principal)
                    });
                }
            }
        }
    }

    fn wish(&mut self, turn: TurnId, what: Wish) {
        let (route, credential) = (self.route.clone(), self.credential.clone());
        self.look(turn, what, async move { identify(&route, credential).await });
    }

    fn look(&mut self, turn: TurnId, what: Wish, who: impl Future<Output = Identified> + Send + 'static) {
        if self.lookups.len() >= MAX_TURNS {
            return self.close(Code::RateLimited);
        }
        self.lookups.push(Lookup { turn, what, who: Box::pin(who) });
    }

    fn look_up(&mut self, cx: &mut Context<'_>) {
        let mut index = 0;
        while index < self.lookups.len() {
            let Poll::Ready(who) = self.lookups[index].who.as_mut().poll(cx) else {
                index += 1;
                continue;
            };
            let Lookup { turn, what, .. } = self.lookups.swap_remove(index);
            let hook = match (who, &what) {
                (Ok(_), Wish::Confirm) => continue,
                (who, _) => who.and_then(|principal| self.app.turns().find(turn, &principal)),
            };
            let reader = match (hook, what) {
                (Ok(hook), Wish::Stop) => {
                    hook.stop(Gone::Stopped);
                    continue;
                }
                (Ok(hook), Wish::Resume(after)) if self.turns.len() < MAX_TURNS => {
                    hook.read(after).ok_or_else(|| Stop::Failed(Fault::client(Code::SessionNotFound)))
                }
                (Ok(_), Wish::Resume(_) | Wish::Confirm) => Err(Fault::client(Code::Overloaded).into()),
                (Err(stop), _) => Err(stop),
            };
            match reader {
                Ok(reader) => {
                    self.turns.push(Open { turn, reference: None, drive: Drive::elsewhere(), reader, credit: None, starved: None })
                }
                Err(stop) => {
                    self.waiting.extend(error_frame(&stop, Some(turn), None));
                    self.refused(&stop);
                }
            }
        }
    }

    fn tell(&mut self, stop: &Stop, reference: Option<&str>) {
        self.waiting.extend(error_frame(stop, None, reference));
        self.refused(stop);
    }

    /// A credential that does not do closes the socket, and so do refusals that keep coming.
    fn refused(&mut self, stop: &Stop) {
        match stop {
            Stop::Refused(Refusal { code: code @ (Code::Unauthenticated | Code::TokenExpired | Code::PermissionDenied), .. }) => {
                self.close(*code);
            }
            Stop::Refused(Refusal { code: Code::PolicyDenied, .. }) => {
                let now = Instant::now();
                self.refusals.push_back(now);
                self.refusals.retain(|at| now - *at < REFUSAL_WINDOW);
                if self.refusals.len() >= MAX_REFUSALS {
                    self.close_with(CloseCode::Policy, "policy_denied");
                }
            }
            Stop::Refused(_) | Stop::Failed(_) | Stop::Gone(_) => {}
        }
    }

    fn close(&mut self, code: Code) {
        self.close_with(code.close().unwrap_or(1011).into(), code.as_str());
    }

    fn close_with(&mut self, code: CloseCode, reason: &'static str) {
        if self.closing.is_none() {
            self.leave();
            self.waiting.push_back(Message::Close(Some(CloseFrame { code, reason: reason.into() })));
        }
    }

    /// Nothing more is said but what is waiting. Dropping the turns is the client's leaving, as far as they are concerned.
    fn leave(&mut self) {
        self.closing.get_or_insert_with(Instant::now);
        self.turns.clear();
        self.lookups.clear();
    }

    /// Pings after silence; ready to give up on a peer that does not finish the closing handshake.
    fn watch(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let mut due = self.due();
        if due < self.alarm.deadline() {
            self.alarm.as_mut().reset(due);
        }
        // The alarm is set anew only when it rings, not with every message.
        while self.alarm.as_mut().poll(cx).is_ready() {
            let now = Instant::now();
            self.starve(now);
            match (self.closing, self.pinged) {
                _ if now < due => {}
                (Some(_), _) => return Poll::Ready(()),
                (None, _) if self.nameless.is_some_and(|until| until <= now) => self.close(Code::Unauthenticated),
                (None, Some(_)) => self.close_with(CloseCode::Library(Code::RequestTimeout.close().unwrap_or(3008)), "no answer to a ping"),
                (None, None) if self.waiting.is_empty() && self.is_flushed => {
                    self.waiting.push_back(Message::Ping(Default::default()));
                    self.pinged = Some(now);
                }
                // The peer is slow, which is no silence.
                (None, None) => self.spoke = now,
            }
            due = self.due();
            self.alarm.as_mut().reset(due);
        }
        Poll::Pending
    }

    /// When the peer's silence will mean something.
    fn due(&self) -> Instant {
        let heartbeat = self.route.plan.flow.heartbeat;
        let silence = match (self.closing, self.pinged) {
            (Some(closing), _) => return closing + CLOSE_PATIENCE,
            (None, Some(pinged)) => pinged + heartbeat.min(PONG_PATIENCE),
            (None, None) => self.spoke.max(self.heard) + heartbeat,
        };
        self.nameless.map_or(silence, |until| silence.min(until))
    }

    /// Lets go of turns that are over and whose client gives no credit for the rest.
    fn starve(&mut self, now: Instant) {
        let Socket { turns, waiting, .. } = self;
        turns.retain_mut(|open| {
            if open.credit != Some(0) || !open.reader.is_over() {
                open.starved = None;
                return true;
            }
            let keep = now - *open.starved.get_or_insert(now) < STARVE_PATIENCE;
            if !keep {
                waiting.extend(error_frame(&Stop::Gone(Gone::Slow), Some(open.turn), None));
            }
            keep
        });
    }
}

fn message(text: Vec<u8>) -> Option<Message> {
    // Our own encoders write UTF-8; a payload that is not would be their fault, and is not sent.
    String::from_utf8(text).ok().map(Message::text)
}

fn error_frame(stop: &Stop, turn: Option<TurnId>, reference: Option<&str>) -> Option<Message> {
    let (mut payload, mut text) = (Vec::new(), Vec::new());
    ErrorEvent::of(stop, turn, None).write(&mut payload);
    frames::frame_with_ref(&mut text, ErrorEvent::NAME, reference, None, &payload);
    message(text)
}
