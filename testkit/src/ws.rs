//! A WebSocket client of the subprotocol `headgate.v1` that judges every frame of every turn.

use std::collections::HashMap;
use std::net::SocketAddr;

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use http_body_util::{BodyExt, Full};
use hyper::ext::Protocol;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::Instant;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::client::generate_key;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Error, Message};

use crate::answer::{Event, Judge, Kind, Transcript, object};
use crate::client::{Http1, Http2, Reply, Request, head_of};
use crate::{Broken, Head, soon};

/// The subprotocol asked for where the request names none.
pub const SUBPROTOCOL: &str = "headgate.v1";
/// The most turns one socket may speak of.
const MAX_TURNS: usize = 100_000;

/// One open WebSocket.
pub struct Ws<S = TcpStream> {
    /// The head of the answer that opened it.
    pub head: Head,
    socket: WebSocketStream<S>,
    turns: HashMap<String, Turn>,
    /// The turn of each `ref` that was echoed.
    named: HashMap<String, String>,
    pings: usize,
    close: Option<Close>,
}

struct Turn {
    judge: Judge,
    transcript: Transcript,
}

/// How the server closed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Close {
    /// RFC 6455 section 7.4; 1005 where the frame had none.
    pub code: u16,
    /// The reason, at most 123 bytes.
    pub reason: String,
}

/// A frame that kept every rule.
#[derive(Debug, Clone)]
pub struct Frame {
    /// Which turn it speaks of; `None` for an error before any turn.
    pub turn_id: Option<String>,
    /// What it says.
    pub event: Event,
}

impl Frame {
    /// The client's own name for the turn, where it is echoed.
    pub fn reference(&self) -> Option<&str> {
        self.event.text("ref")
    }
}

impl Ws {
    /// Opens a WebSocket at `/v1/chat/stream`.
    pub async fn connect(addr: SocketAddr) -> Result<Ws, Box<Reply>> {
        Ws::open(addr, &Request::get("/v1/chat/stream")).await
    }

    /// Opens a WebSocket with the target and headers of `request`. The handshake's own headers are added, and the
    /// subprotocol where `request` does not speak of one. `Err`: the server answered something else than 101.
    pub async fn open(addr: SocketAddr, request: &Request) -> Result<Ws, Box<Reply>> {
        Ws::over(Http1::connect(addr).await, request).await
    }

    /// Leaves with a RST, without a close frame.
    pub fn abort(self) {
        let _ = self.socket.get_ref().set_zero_linger();
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> Ws<S> {
    /// Opens a WebSocket over an HTTP/1.1 connection. Panics on a handshake that RFC 6455 section 4.1 says must fail.
    pub async fn over(mut client: Http1<S>, request: &Request) -> Result<Ws<S>, Box<Reply>> {
        let key = generate_key();
        let (request, offered) = with_subprotocol(request);
        let request = request
            .header("connection", "Upgrade")
            .header("upgrade", "websocket")
            .header("sec-websocket-version", "13")
            .header("sec-websocket-key", &key);
        client.send(&request).await;
        let reply = client.reply().await.unwrap_or_else(|broken| panic!("a WebSocket's handshake: {broken}"));
        if reply.status != 101 {
            return Err(Box::new(reply));
        }
        let says = |name: &str, word: &str| reply.header(name).is_some_and(|value| value.eq_ignore_ascii_case(word));
        assert!(says("upgrade", "websocket") && says("connection", "upgrade"), "a 101 without its headers: {:?}", reply.head.headers);
        assert_eq!(reply.header("sec-websocket-accept"), Some(derive_accept_key(key.as_bytes()).as_str()), "a wrong key in a 101");
        let (io, early) = client.into_parts();
        let socket = WebSocketStream::from_partially_read(io, early.to_vec(), Role::Client, Some(limits())).await;
        Ok(Ws::new(reply.head, socket, &offered))
    }

    fn new(head: Head, socket: WebSocketStream<S>, offered: &[String]) -> Ws<S> {
        let chosen = head.header("sec-websocket-protocol");
        match chosen {
            Some(chosen) => assert!(offered.iter().any(|offer| offer == chosen), "the server chose `{chosen}` out of {offered:?}"),
            None => assert!(offered.is_empty(), "the server chose no subprotocol out of {offered:?}"),
        }
        assert_eq!(head.all("sec-websocket-extensions").count(), 0, "an extension nobody offered");
        Ws { head, socket, turns: HashMap::new(), named: HashMap::new(), pings: 0, close: None }
    }

    /// Sends one frame. A server that has closed is not a fault of the test: the next read tells.
    pub async fn send(&mut self, frame: &Value) {
        self.send_message(Message::text(frame.to_string())).await;
    }

    /// Sends any message: binary, ping, close, text that is no JSON.
    pub async fn send_message(&mut self, message: Message) {
        let _ = soon(self.socket.send(message), "the server to read what the client sends").await;
    }

    /// Begins a turn of one user message under the client's own name.
    pub async fn turn(&mut self, reference: &str, content: &str) {
        self.send(&json!({"type": "turn", "ref": reference, "messages": [{"role": "user", "content": content}]})).await;
    }

    /// Stops a turn.
    pub async fn stop(&mut self, turn_id: &str) {
        self.send(&json!({"type": "stop", "turn_id": turn_id})).await;
    }

    /// Allows `events` more events of a turn.
    pub async fn credit(&mut self, turn_id: &str, events: u64) {
        self.send(&json!({"type": "credit", "turn_id": turn_id, "events": events})).await;
    }

    /// Says who asks.
    pub async fn auth(&mut self, token: &str) {
        self.send(&json!({"type": "auth", "token": token})).await;
    }

    /// Asks for the rest of a turn after the event numbered `after`, which this client has seen, here or elsewhere.
    pub async fn resume(&mut self, turn_id: &str, after: u64) {
        let turn = Turn { judge: Judge::resumed(turn_id, after), transcript: Transcript::default() };
        self.turns.insert(turn_id.into(), turn);
        self.send(&json!({"type": "resume", "turn_id": turn_id, "after": after})).await;
    }

    /// Says that others read this turn too, so that a gap is no fault.
    pub fn share(&mut self, turn_id: &str) {
        if let Some(turn) = self.turns.get_mut(turn_id) {
            turn.judge = std::mem::replace(&mut turn.judge, Judge::new(Kind::Client)).shared();
        }
    }

    /// The next frame of any turn; `None` once the server has closed with a close frame. Cancel safe.
    pub async fn next(&mut self) -> Result<Option<Frame>, Broken> {
        loop {
            if self.close.is_some() {
                return Ok(None);
            }
            match soon(self.socket.next(), "the server to send a frame or to close").await {
                Some(Ok(Message::Text(text))) => return self.judge(text.as_str(), Instant::now()).map(Some),
                Some(Ok(Message::Ping(_))) => self.pings += 1,
                Some(Ok(Message::Pong(_))) => {}
                Some(Ok(Message::Close(frame))) => {
                    let (code, reason) = frame.map_or((1005, String::new()), |frame| (frame.code.into(), frame.reason.to_string()));
                    self.close = Some(Close { code, reason });
                }
                Some(Ok(Message::Binary(_) | Message::Frame(_))) => return Err(Broken::Framing("a message that is no text".into())),
                Some(Err(Error::Io(error))) => return Err(Broken::Reset(error.to_string())),
                Some(Err(Error::Protocol(error))) if error.to_string().contains("without closing handshake") => {
                    return Err(Broken::Cut("the connection ended without a close frame".into()));
                }
                Some(Err(error)) => return Err(Broken::Framing(error.to_string())),
                None => return Err(Broken::Cut("the connection ended without a close frame".into())),
            }
        }
    }

    /// Reads until the turn with this id has ended: all of it, frames read earlier included. Other turns go on beside it.
    pub async fn finish(&mut self, turn_id: &str) -> Result<Transcript, Broken> {
        loop {
            if let Some(turn) = self.turns.get(turn_id)
                && turn.judge.ended()
            {
                return Ok(turn.transcript.clone());
            }
            if self.next().await?.is_none() {
                return Err(Broken::Cut(format!("the server closed before the turn's end: {:?}", self.close)));
            }
        }
    }

    /// Begins a turn and reads it to its end.
    pub async fn ask(&mut self, reference: &str, content: &str) -> Result<Transcript, Broken> {
        self.turn(reference, content).await;
        let turn_id = self.opened(reference).await?;
        self.finish(&turn_id).await
    }

    /// Reads until the turn of this name has been opened: its id.
    pub async fn opened(&mut self, reference: &str) -> Result<String, Broken> {
        loop {
            if let Some(turn_id) = self.named.get(reference) {
                return Ok(turn_id.clone());
            }
            match self.next().await? {
                Some(Frame { turn_id: None, event }) => return Err(Broken::Answer(event.raw)),
                Some(_) => {}
                None => return Err(Broken::Cut(format!("the server closed before the turn was opened: {:?}", self.close))),
            }
        }
    }

    /// Reads until the server closes; frames before that are judged and kept.
    pub async fn closed(&mut self) -> Result<Close, Broken> {
        while self.next().await?.is_some() {}
        Ok(self.close.clone().expect("no more frames come only after a close"))
    }

    /// Closes with a code, and waits for the server's answer.
    pub async fn close(&mut self, code: u16, reason: &str) -> Result<Close, Broken> {
        self.send_message(Message::Close(Some(CloseFrame { code: code.into(), reason: reason.into() }))).await;
        self.closed().await
    }

    /// How many pings have come.
    pub fn pings(&self) -> usize {
        self.pings
    }

    /// What a turn has said so far.
    pub fn so_far(&self, turn_id: &str) -> Option<&Transcript> {
        self.turns.get(turn_id).map(|turn| &turn.transcript)
    }

    fn judge(&mut self, text: &str, now: Instant) -> Result<Frame, Broken> {
        let mut data = object(text)?;
        let members = data.as_object_mut().ok_or_else(|| Broken::Members("a frame that is no object".into()))?;
        let wrong = |what: &str| Broken::Members(format!("{what}: {}", crate::broken::shown(text.as_bytes())));
        let of_turn = members.contains_key("turn_id") && members.contains_key("seq");
        if members.keys().next().is_none_or(|first| first != "type") || (!of_turn && members["type"] != "error") {
            return Err(wrong("a frame that does not begin with its type, or names no turn or number"));
        }
        let Some(Value::String(name)) = members.shift_remove("type") else { return Err(wrong("a type that is no text")) };
        if !of_turn {
            // Wrong before any turn was there: an answer of its own, that begins and ends with this.
            // It may name the turn that it would have been.
            let mut judge = Judge::resumed(data["turn_id"].as_str().unwrap_or_default(), 0);
            let event = judge.event(name, None, data, text.into(), now)?;
            return Ok(Frame { turn_id: None, event });
        }
        let Some(Value::String(turn_id)) = members.shift_remove("turn_id") else { return Err(wrong("a turn_id that is no text")) };
        let seq = members.shift_remove("seq").and_then(|seq| seq.as_u64()).ok_or_else(|| wrong("a seq that is no number"))?;
        if name == "open" {
            members.insert("turn_id".into(), turn_id.clone().into());
        }
        if self.turns.len() == MAX_TURNS {
            return Err(wrong("more turns than the client can follow"));
        }
        let begin = || Turn { judge: Judge::new(Kind::Client), transcript: Transcript::default() };
        let turn = self.turns.entry(turn_id.clone()).or_insert_with(begin);
        let event = turn.judge.event(name, Some(seq), data, text.into(), now)?;
        turn.transcript.events.push(event.clone());
        if let Some(reference) = event.text("ref") {
            self.named.insert(reference.into(), turn_id.clone());
        }
        Ok(Frame { turn_id: Some(turn_id), event })
    }
}

impl Ws<TokioIo<Upgraded>> {
    /// Opens a WebSocket as one stream of an HTTP/2 connection (RFC 8441).
    pub async fn over_http2(client: &mut Http2, request: &Request) -> Result<Self, Box<Reply>> {
        client.takes_websockets().await.unwrap_or_else(|broken| panic!("{broken}"));
        let (request, offered) = with_subprotocol(request);
        let mut connect = http::Request::builder().method("CONNECT").uri(format!("http://{}{}", client.host(), request.target()));
        connect = connect.header("sec-websocket-version", "13").extension(Protocol::from_static("websocket"));
        for (name, value) in request.headers() {
            connect = connect.header(name, value);
        }
        let connect = connect.body(Full::new(Bytes::new())).expect("a request of valid parts");
        let response = client.send_built(connect).await.unwrap_or_else(|broken| panic!("a WebSocket's handshake: {broken}"));
        let head = head_of(&response).unwrap_or_else(|broken| panic!("{broken}"));
        let status = response.status().as_u16();
        if status != 200 {
            let body = soon(response.into_body().collect(), "the end of an answer").await;
            let body = body.map(http_body_util::Collected::to_bytes).unwrap_or_default();
            return Err(Box::new(Reply { status, head, body, trailers: Vec::new() }));
        }
        let upgraded = soon(hyper::upgrade::on(response), "the upgrade of a stream").await.expect("a 200 to CONNECT upgrades");
        let socket = WebSocketStream::from_raw_socket(TokioIo::new(upgraded), Role::Client, Some(limits())).await;
        Ok(Ws::new(head, socket, &offered))
    }
}

/// The request with a subprotocol, and all the subprotocols it offers.
fn with_subprotocol(request: &Request) -> (Request, Vec<String>) {
    const NAME: &str = "sec-websocket-protocol";
    let offers = |request: &Request| {
        let lines = request.headers().iter().filter(|(name, _)| name.eq_ignore_ascii_case(NAME));
        lines.flat_map(|(_, value)| value.split(',')).map(|offer| offer.trim().to_owned()).collect::<Vec<_>>()
    };
    let given = offers(request);
    if given.is_empty() {
        let request = request.clone().header(NAME, SUBPROTOCOL);
        return (request, vec![SUBPROTOCOL.into()]);
    }
    (request.clone(), given)
}

fn limits() -> WebSocketConfig {
    WebSocketConfig::default().max_message_size(Some(16 << 20)).max_frame_size(Some(16 << 20))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::upstream::{Framing, Script, Upstream};

    const OPEN: &str = r#"{"type":"open","turn_id":"t","seq":0,"session_id":"s","model":"demo","ref":"a"}"#;
    const TEXT: &str = r#"{"type":"text","turn_id":"t","seq":1,"text":"Hello"}"#;
    const DONE: &str = r#"{"type":"done","turn_id":"t","seq":2,"finish":"stop","outcome":"allowed"}"#;

    /// A text frame as a server sends it, RFC 6455 section 5.2.
    fn frame(text: &str) -> Vec<u8> {
        let mut bytes = vec![0x81];
        match text.len() {
            short @ 0..126 => bytes.push(short as u8),
            long => bytes.extend_from_slice(&[126, (long >> 8) as u8, long as u8]),
        }
        bytes.extend_from_slice(text.as_bytes());
        bytes
    }

    /// A server that accepts a WebSocket, sends these bytes in one write after the 101, and closes.
    async fn serving(bytes: Vec<u8>) -> Upstream {
        Upstream::answering(move |request| {
            let accept = derive_accept_key(request.header("sec-websocket-key").unwrap_or_default().as_bytes());
            let headers = [("upgrade", "websocket"), ("connection", "Upgrade"), ("sec-websocket-accept", &accept)];
            let headers = [&headers[..], &[("sec-websocket-protocol", SUBPROTOCOL)]].concat();
            Script::new().head(101, Framing::None, &headers).raw(bytes.clone()).close()
        })
        .await
    }

    async fn read(frames: &[&str]) -> Result<Transcript, Broken> {
        let server = serving(frames.iter().flat_map(|text| frame(text)).collect()).await;
        let mut ws = Ws::connect(server.addr()).await.expect("a 101");
        ws.ask("a", "hello").await
    }

    #[tokio::test]
    async fn a_turn_over_a_websocket_is_judged_and_read() {
        let whole = read(&[OPEN, TEXT, DONE]).await.unwrap();
        assert_eq!((whole.text().as_str(), whole.outcome()), ("Hello", "allowed"));
    }

    #[tokio::test]
    async fn every_broken_frame_is_refused() {
        let doubled = OPEN.replace(r#""ref""#, r#""turn_id":"t","ref""#);
        let no_number = r#"{"type":"text","turn_id":"t","text":"a"}"#;
        let late_type = r#"{"turn_id":"t","type":"text","seq":1,"text":"a"}"#;
        assert!(matches!(read(&[TEXT]).await, Err(Broken::Order(_))));
        assert!(matches!(read(&[&doubled]).await, Err(Broken::Members(_))), "a member twice");
        assert!(matches!(read(&[OPEN, late_type]).await, Err(Broken::Members(_))));
        assert!(matches!(read(&[OPEN, no_number]).await, Err(Broken::Members(_))));
        assert!(matches!(read(&[OPEN, "no json"]).await, Err(Broken::Members(_))));
        assert!(matches!(read(&[OPEN, &TEXT.replace("1", "2")]).await, Err(Broken::Sequence(_))));
        assert!(matches!(read(&[OPEN, TEXT]).await, Err(Broken::Cut(_))));
        let refused = r#"{"type":"error","code":"overloaded","message":"m","retryable":true,"ref":"a","error":{"message":"m","type":"overloaded_error","param":null,"code":"overloaded"}}"#;
        assert!(matches!(read(&[refused]).await, Err(Broken::Answer(_))));
    }

    #[tokio::test]
    async fn a_frame_after_the_end_of_its_turn_is_refused() {
        let server =
            serving([OPEN, TEXT, DONE, &TEXT.replace(r#""seq":1"#, r#""seq":3"#)].iter().flat_map(|text| frame(text)).collect()).await;
        let mut ws = Ws::connect(server.addr()).await.expect("a 101");
        ws.ask("a", "hello").await.unwrap();
        assert!(matches!(ws.closed().await, Err(Broken::AfterEnd(_))));
    }

    #[tokio::test]
    async fn a_websocket_may_be_one_stream_of_http2() {
        // Hyper and tungstenite serve here: nothing of ours answers.
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let service = hyper::service::service_fn(|mut request: http::Request<hyper::body::Incoming>| async move {
                assert_eq!(request.extensions().get::<Protocol>().map(Protocol::as_str), Some("websocket"));
                let upgrade = hyper::upgrade::on(&mut request);
                tokio::spawn(async move {
                    let io = TokioIo::new(upgrade.await.unwrap());
                    let mut socket = WebSocketStream::from_raw_socket(io, Role::Server, None).await;
                    let asked = socket.next().await.unwrap().unwrap();
                    assert!(asked.to_text().unwrap().contains("hello"));
                    for frame in [OPEN, TEXT, DONE] {
                        socket.send(Message::text(frame)).await.unwrap();
                    }
                    // Until the client has gone: a dropped stream would overtake what was sent.
                    while socket.next().await.is_some_and(|read| read.is_ok()) {}
                });
                http::Response::builder().header("sec-websocket-protocol", SUBPROTOCOL).body(http_body_util::Empty::<Bytes>::new())
            });
            let mut server = hyper::server::conn::http2::Builder::new(hyper_util::rt::TokioExecutor::new());
            let _ = server.enable_connect_protocol().serve_connection(TokioIo::new(stream), service).await;
        });
        let mut client = Http2::connect(addr).await;
        let mut ws = Ws::over_http2(&mut client, &Request::get("/v1/chat/stream")).await.expect("a 200");
        assert_eq!(ws.ask("a", "hello").await.unwrap().text(), "Hello");
    }

    #[tokio::test]
    async fn a_refused_handshake_is_a_reply() {
        let server = Upstream::always(Script::reply(401, "text/plain", "who are you")).await;
        let Err(reply) = Ws::connect(server.addr()).await else { panic!("401 opens nothing") };
        assert_eq!((reply.status, reply.text().as_str()), (401, "who are you"));
    }
}
