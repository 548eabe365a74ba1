//! Carries turns to a gateway and events back: over server-sent events or a WebSocket.

use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use headgate_contracts::{
    Secret, TurnId,
    wire::{
        chat::{Confirmation, TurnRequest},
        frames, problem, sse,
    },
};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use tokio::time::timeout;
use tokio_tungstenite::{
    WebSocketStream, client_async_with_config,
    tungstenite::{self, Message, client::IntoClientRequest, protocol::WebSocketConfig},
};

use super::tale::{Event, Said};
use crate::cli::place::{CONNECT_PATIENCE, Place, Wire, sign};

/// The chat route where the URL names none.
pub(super) const DEFAULT_PATH: &str = "/v1/chat/stream";
/// The largest event that is read, in bytes; the gateway's are at most 128 KiB.
const MAX_EVENT_BYTES: usize = 256 << 10;

/// Why there is no event.
#[derive(Debug)]
pub(super) enum Trouble {
    /// The gateway said why.
    Problem(Box<Said>),
    /// The connection could not be made, or broke.
    Broken(String),
    /// What came is not what a gateway sends; the words never quote it.
    Nonsense(&'static str),
}

impl Trouble {
    fn broken(error: impl std::error::Error) -> Trouble {
        let mut words = error.to_string();
        let mut next = error.source();
        while let Some(cause) = next {
            words = format!("{words}: {cause}");
            next = cause.source();
        }
        Trouble::Broken(words)
    }
}

/// What came.
pub(super) enum Heard {
    Event(Box<Event>),
    /// A sign of life.
    Heartbeat,
    /// The stream has ended, with or without the turn's end in it.
    Over,
}

/// The way to a gateway, and the stream that is being read.
pub(super) struct Line {
    place: Place,
    token: Option<Secret>,
    carrier: Carrier,
    /// How many turns there were: a WebSocket names them before the gateway does.
    turns: u32,
    /// The turn, as soon as the gateway named it.
    turn: Option<TurnId>,
}

enum Carrier {
    Sse(Option<Box<Stream>>),
    WebSocket(Option<Box<WebSocketStream<Box<dyn Wire>>>>),
}

struct Stream {
    body: Incoming,
    decoder: sse::Decoder,
    heartbeats: u64,
}

impl Line {
    pub(super) fn new(place: Place, token: Option<Secret>, is_websocket: bool) -> Line {
        let carrier = if is_websocket { Carrier::WebSocket(None) } else { Carrier::Sse(None) };
        Line { place, token, carrier, turns: 0, turn: None }
    }

    /// The turn whose stream this is, where the gateway has named it.
    pub(super) fn turn(&self) -> Option<TurnId> {
        self.turn
    }

    /// Begins a turn. Its events are what [`Line::next`] gives.
    pub(super) async fn begin(&mut self, request: &TurnRequest) -> Result<(), Trouble> {
        self.turns += 1;
        self.turn = None;
        if let Carrier::WebSocket(_) = self.carrier {
            let reference = reference(self.turns);
            return self.send(&ClientTurn { kind: "turn", reference: &reference, turn: request }).await;
        }
        let body = serde_json::to_vec(request).map_err(Trouble::broken)?;
        let request =
            Request::post(&self.place.path).header(header::CONTENT_TYPE, "application/json").header(header::ACCEPT, "text/event-stream");
        self.open(request, body).await
    }

    /// Takes up the stream of a turn after event number `after`.
    pub(super) async fn resume(&mut self, turn: TurnId, after: Option<u64>) -> Result<(), Trouble> {
        self.turn = Some(turn);
        if let Carrier::WebSocket(socket) = &mut self.carrier {
            *socket = None;
            return self.send(&ClientResume { kind: "resume", turn_id: turn, after }).await;
        }
        let mut request = Request::get(format!("{}/{turn}", self.place.path)).header(header::ACCEPT, "text/event-stream");
        if let Some(after) = after {
            request = request.header("last-event-id", format!("{turn}:{after}"));
        }
        self.open(request, Vec::new()).await
    }

    /// Asks the gateway to stop the turn; its end still comes. `turn`: its id, where it is known yet. Before its first event a
    /// socket knows it by our name; a response has none for it.
    pub(super) async fn stop(&mut self, turn: Option<TurnId>) -> Result<(), Trouble> {
        if let Carrier::WebSocket(_) = self.carrier {
            let reference = turn.is_none().then(|| reference(self.turns));
            return self.send(&ClientStop { kind: "stop", turn_id: turn, reference: reference.as_deref() }).await;
        }
        let turn = turn.ok_or(Trouble::Nonsense("no turn's id yet"))?;
        let response = self.ask(Request::post(format!("{}/{turn}/stop", self.place.path)), Vec::new()).await?;
        if response.status().is_success() { Ok(()) } else { Err(problem_of(response).await) }
    }

    /// Says yes or no to a question of the turn.
    pub(super) async fn confirm(&mut self, turn: TurnId, said: &Confirmation) -> Result<(), Trouble> {
        if let Carrier::WebSocket(_) = self.carrier {
            return self.send(&ClientConfirm { kind: "confirm", turn_id: turn, said }).await;
        }
        let request = Request::post(format!("{}/{turn}/confirm", self.place.path)).header(header::CONTENT_TYPE, "application/json");
        let response = self.ask(request, said.body()).await?;
        if response.status().is_success() { Ok(()) } else { Err(problem_of(response).await) }
    }

    /// What comes next. Cancel safe.
    pub(super) async fn next(&mut self) -> Result<Heard, Trouble> {
        match &mut self.carrier {
            Carrier::Sse(None) | Carrier::WebSocket(None) => Ok(Heard::Over),
            Carrier::Sse(Some(stream)) => loop {
                if let Some(frame) = stream.decoder.next().map_err(|_| Trouble::Nonsense("an event that is too large"))? {
                    let seq = frame.id.and_then(|id| id.rsplit_once(':')).and_then(|(_, seq)| seq.parse().ok());
                    return Event::of_sse(frame.event, self.turn, seq, frame.data).map(|event| Heard::Event(Box::new(event)));
                }
                if stream.heartbeats < stream.decoder.comments() {
                    stream.heartbeats = stream.decoder.comments();
                    return Ok(Heard::Heartbeat);
                }
                match stream.body.frame().await {
                    None => return Ok(Heard::Over),
                    Some(Err(error)) => return Err(Trouble::broken(error)),
                    Some(Ok(frame)) => {
                        if let Some(bytes) = frame.data_ref() {
                            stream.decoder.push(bytes);
                        }
                    }
                }
            },
            Carrier::WebSocket(Some(socket)) => loop {
                let text = match socket.next().await {
                    None | Some(Ok(Message::Close(_))) => return Ok(Heard::Over),
                    Some(Err(error)) => return Err(Trouble::broken(error)),
                    Some(Ok(Message::Binary(_))) => return Err(Trouble::Nonsense("a binary message")),
                    // tungstenite answers pings itself, with the next read.
                    Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_))) => return Ok(Heard::Heartbeat),
                    Some(Ok(Message::Text(text))) => text,
                };
                let mut event = Event::of_frame(text.as_str())?;
                if !is_ours(&event.said, self.turn, self.turns) {
                    continue;
                }
                self.turn = self.turn.or(event.said.turn_id);
                // An error without a number is not of the stream: the turn was not begun, or cannot be taken up again.
                if event.said.kind == "error" && event.said.seq.is_none() {
                    event.said.raw = Some(event.frame);
                    return Err(Trouble::Problem(Box::new(event.said)));
                }
                return Ok(Heard::Event(Box::new(event)));
            },
        }
    }

    /// Keeps an open WebSocket alive while there is no turn; ready when the gateway has closed it. Cancel safe.
    pub(super) async fn idle(&mut self) {
        if let Carrier::WebSocket(open @ Some(_)) = &mut self.carrier {
            while let Some(socket) = open {
                match socket.next().await {
                    None | Some(Err(_) | Ok(Message::Close(_))) => *open = None,
                    Some(Ok(_)) => {}
                }
            }
        }
        std::future::pending().await
    }

    /// Leaves the turn.
    pub(super) fn drop_stream(&mut self) {
        match &mut self.carrier {
            Carrier::Sse(stream) => *stream = None,
            Carrier::WebSocket(socket) => *socket = None,
        }
    }

    /// Says goodbye.
    pub(super) async fn close(&mut self) {
        if let Carrier::WebSocket(Some(socket)) = &mut self.carrier {
            // A gateway that does not answer is left all the same.
            let _ = timeout(Duration::from_secs(1), socket.as_mut().close(None)).await;
        }
        self.drop_stream();
    }

    async fn open(&mut self, request: http::request::Builder, body: Vec<u8>) -> Result<(), Trouble> {
        self.carrier = Carrier::Sse(None);
        let response = self.ask(request, body).await?;
        if response.status() != StatusCode::OK {
            return Err(problem_of(response).await);
        }
        if !is_kind(response.headers(), "text/event-stream") {
            return Err(Trouble::Nonsense("an answer that is not text/event-stream: is this a chat route?"));
        }
        let named = response.headers().get("x-headgate-turn").and_then(|turn| turn.to_str().ok()).and_then(|turn| turn.parse().ok());
        self.turn = self.turn.or(named);
        let limits = sse::Limits { max_line: MAX_EVENT_BYTES, max_event: MAX_EVENT_BYTES };
        self.carrier =
            Carrier::Sse(Some(Box::new(Stream { body: response.into_body(), decoder: sse::Decoder::new(limits), heartbeats: 0 })));
        Ok(())
    }

    async fn ask(&self, request: http::request::Builder, body: Vec<u8>) -> Result<Response<Incoming>, Trouble> {
        self.place.ask(self.token.as_ref(), request, body).await.map_err(Trouble::broken)
    }

    async fn send(&mut self, frame: &impl serde::Serialize) -> Result<(), Trouble> {
        let text = serde_json::to_string(frame).map_err(Trouble::broken)?;
        if let Carrier::WebSocket(None) = self.carrier {
            let socket = timeout(CONNECT_PATIENCE, self.shake_hands()).await;
            self.carrier =
                Carrier::WebSocket(Some(Box::new(socket.map_err(|_| Trouble::Broken("the handshake took too long".to_owned()))??)));
        }
        let Carrier::WebSocket(Some(socket)) = &mut self.carrier else { return Err(Trouble::Nonsense("no socket")) };
        socket.send(Message::text(text)).await.map_err(Trouble::broken)
    }

    async fn shake_hands(&self) -> Result<WebSocketStream<Box<dyn Wire>>, Trouble> {
        let authority = self.place.authority.to_str().map_err(Trouble::broken)?;
        let mut request = format!("ws://{authority}{}", self.place.path).into_client_request().map_err(Trouble::broken)?;
        sign(self.token.as_ref(), request.headers_mut()).map_err(Trouble::broken)?;
        request.headers_mut().insert(header::SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(frames::SUBPROTOCOL));
        debug_assert_eq!(request.method(), Method::GET);
        let wire = self.place.connect().await.map_err(Trouble::broken)?;
        let config = WebSocketConfig::default().max_message_size(Some(MAX_EVENT_BYTES)).max_frame_size(Some(MAX_EVENT_BYTES));
        match client_async_with_config(request, wire, Some(config)).await {
            Ok((socket, _)) => Ok(socket),
            Err(tungstenite::Error::Http(response)) => Err(said_by(response.status(), response.body().as_deref().unwrap_or_default())),
            Err(error) => Err(Trouble::broken(error)),
        }
    }
}

/// Whether a frame is about this turn: the `turns`-th of its socket, and `turn` once the gateway has named it.
fn is_ours(said: &Said, turn: Option<TurnId>, turns: u32) -> bool {
    match (turn, &said.reference) {
        (Some(ours), _) => said.turn_id == Some(ours),
        (None, Some(theirs)) => *theirs == reference(turns),
        // An error that names no turn is about what was sent last.
        (None, None) => said.kind == "error",
    }
}

fn reference(turns: u32) -> String {
    format!("turn-{turns}")
}

#[derive(serde::Serialize)]
struct ClientTurn<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    #[serde(rename = "ref")]
    reference: &'a str,
    #[serde(flatten)]
    turn: &'a TurnRequest,
}

#[derive(serde::Serialize)]
struct ClientResume {
    #[serde(rename = "type")]
    kind: &'static str,
    turn_id: TurnId,
    #[serde(skip_serializing_if = "Option::is_none")]
    after: Option<u64>,
}

#[derive(serde::Serialize)]
struct ClientStop<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    turn_id: Option<TurnId>,
    #[serde(rename = "ref", skip_serializing_if = "Option::is_none")]
    reference: Option<&'a str>,
}

#[derive(serde::Serialize)]
struct ClientConfirm<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    turn_id: TurnId,
    #[serde(flatten)]
    said: &'a Confirmation,
}

fn is_kind(headers: &HeaderMap, kind: &str) -> bool {
    let named = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).and_then(|value| value.split(';').next());
    named.is_some_and(|named| named.trim().eq_ignore_ascii_case(kind))
}

async fn problem_of(response: Response<Incoming>) -> Trouble {
    let status = response.status();
    let wait = response
        .headers()
        .get(HeaderName::from_static("retry-after"))
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.parse::<u64>().ok());
    let body = timeout(CONNECT_PATIENCE, Limited::new(response.into_body(), problem::MAX_BODY_BYTES).collect()).await;
    let body = body.ok().and_then(Result::ok).map(|body| body.to_bytes()).unwrap_or_default();
    let mut trouble = said_by(status, &body);
    if let (Trouble::Problem(said), Some(wait)) = (&mut trouble, wait) {
        said.retry_after_ms.get_or_insert(wait.saturating_mul(1000));
    }
    trouble
}

/// What a body that should be a problem says; the status alone, where it says nothing.
fn said_by(status: StatusCode, body: &[u8]) -> Trouble {
    let mut said: Said = serde_json::from_slice(body).unwrap_or_default();
    if said.code.is_some() {
        said.raw = std::str::from_utf8(body).ok().map(str::to_owned);
    } else {
        said.code = Some(format!("http_{}", status.as_u16()));
        said.retryable = status.is_server_error();
    }
    said.message = said.detail.take().or(said.message).or(status.canonical_reason().map(str::to_owned));
    Trouble::Problem(Box::new(said))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_that_is_no_problem_counts_by_its_status() {
        for body in [&b""[..], b"<html>502 Bad Gateway</html>", b"{\"code\": 7}", b"[]", b"\xff"] {
            let Trouble::Problem(said) = said_by(StatusCode::BAD_GATEWAY, body) else { panic!("a problem") };
            assert_eq!((said.code.as_deref(), said.retryable), (Some("http_502"), true));
        }
    }
}
