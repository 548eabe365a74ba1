//! The orchestrator's end of WebSockets that carry many turns: it says exactly what a test has it say, well cut or not, and keeps
//! what it was sent.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::{BufMut, Bytes, BytesMut};
use futures_util::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, JoinSet};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::handshake::server::{ErrorResponse, Request, Response};
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, WebSocketConfig};

use crate::soon;

/// How many sockets may wait for their test.
const MAX_WAITING: usize = 10_000;

/// Listens, and agrees to every WebSocket.
pub struct Orchestrator {
    addr: SocketAddr,
    opened: Arc<AtomicUsize>,
    sockets: mpsc::Receiver<Socket>,
    accepting: JoinHandle<()>,
}

/// One socket: the test's own to speak on.
pub struct Socket {
    /// The head of the handshake: its path, its headers.
    pub handshake: Request,
    stream: WebSocketStream<TcpStream>,
    pings: usize,
}

/// What a peer sent that is no ping.
#[derive(Debug, Clone, PartialEq)]
pub enum Heard {
    /// A text frame, as JSON.
    Frame(Value),
    /// It closed the socket with this code; `None`: without one, or without a word.
    Closed(Option<u16>),
}

impl Orchestrator {
    /// Starts to listen.
    pub async fn start() -> Orchestrator {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let addr = listener.local_addr().expect("an address");
        let opened = Arc::new(AtomicUsize::new(0));
        let (give, sockets) = mpsc::channel(MAX_WAITING);
        let counted = opened.clone();
        let accepting = tokio::spawn(async move {
            let mut shaking = JoinSet::new();
            while let Ok((tcp, _)) = listener.accept().await {
                let (give, counted) = (give.clone(), counted.clone());
                shaking.spawn(async move {
                    tcp.set_nodelay(true).expect("a socket");
                    if let Some(socket) = shake(tcp).await {
                        counted.fetch_add(1, Ordering::Relaxed);
                        let _ = give.send(socket).await;
                    }
                });
                while shaking.try_join_next().is_some() {}
            }
        });
        Orchestrator { addr, opened, sockets, accepting }
    }

    /// `http://127.0.0.1:port`, without a slash at the end.
    pub fn url(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// How many sockets were ever opened.
    pub fn opened(&self) -> usize {
        self.opened.load(Ordering::Relaxed)
    }

    /// The next socket that is opened.
    pub async fn socket(&mut self) -> Socket {
        soon(self.sockets.recv(), "a socket to be opened").await.expect("the orchestrator is listening")
    }

    /// Answers the first turn with the first of `said`, and so on, on whatever socket it comes.
    pub fn saying(mut self, said: impl IntoIterator<Item = Said>) -> Speaking {
        let left: Arc<Mutex<VecDeque<Said>>> = Arc::new(Mutex::new(said.into_iter().collect()));
        let url = self.url();
        let task = tokio::spawn(async move {
            let mut speaking = JoinSet::new();
            while let Some(socket) = self.sockets.recv().await {
                speaking.spawn(speak(socket, left.clone()));
            }
        });
        Speaking { url, task }
    }
}

impl Drop for Orchestrator {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// An orchestrator that answers by itself.
pub struct Speaking {
    url: String,
    task: JoinHandle<()>,
}

impl Speaking {
    /// `http://127.0.0.1:port`, without a slash at the end.
    pub fn url(&self) -> String {
        self.url.clone()
    }
}

impl Drop for Speaking {
    fn drop(&mut self) {
        self.task.abort();
    }
}

type Cutter = Box<dyn Fn(&str) -> Vec<Bytes> + Send>;

/// What a turn is answered with, and what then becomes of the socket.
pub struct Said {
    pieces: Cutter,
    then: Then,
}

/// What becomes of a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Then {
    /// It stays.
    Stay,
    /// It ends with a FIN and no word.
    End,
    /// It ends with a RST.
    Reset,
    /// It is closed with this code.
    Close(u16),
}

impl Said {
    /// Bytes as they go over the wire, made for the turn's id: see [`wire`].
    pub fn pieces(pieces: impl Fn(&str) -> Vec<Bytes> + Send + 'static, then: Then) -> Said {
        Said { pieces: Box::new(pieces), then }
    }
}

async fn speak(mut socket: Socket, left: Arc<Mutex<VecDeque<Said>>>) {
    while let Heard::Frame(frame) = socket.hear().await {
        if frame["type"] != "turn" {
            continue;
        }
        let turn = frame["turn_id"].as_str().expect("a turn's id").to_owned();
        let said = left.lock().unwrap_or_else(PoisonError::into_inner).pop_front().expect("something to say to every turn");
        for piece in (said.pieces)(&turn) {
            socket.write(&piece).await;
        }
        match said.then {
            Then::Stay => {}
            Then::End => return,
            Then::Reset => return socket.abort(),
            Then::Close(code) => return socket.close(code).await,
        }
    }
}

#[allow(clippy::result_large_err, reason = "what the handshake's callback has to return")]
async fn shake(tcp: TcpStream) -> Option<Socket> {
    let mut handshake = None;
    let keep = |request: &Request, response: Response| -> Result<Response, ErrorResponse> {
        handshake = Some(request.clone());
        Ok(response)
    };
    let config = WebSocketConfig::default().max_message_size(Some(64 << 20)).max_frame_size(Some(64 << 20));
    let stream = tokio_tungstenite::accept_hdr_async_with_config(tcp, keep, Some(config)).await.ok()?;
    Some(Socket { handshake: handshake?, stream, pings: 0 })
}

impl Socket {
    /// What comes next. Pings are answered and counted.
    pub async fn hear(&mut self) -> Heard {
        let heard = async {
            loop {
                match self.stream.next().await {
                    Some(Ok(Message::Text(text))) => return Heard::Frame(serde_json::from_str(text.as_str()).expect("a frame of JSON")),
                    Some(Ok(Message::Ping(_))) => self.pings += 1,
                    Some(Ok(Message::Pong(_))) => {}
                    Some(Ok(Message::Close(frame))) => return Heard::Closed(frame.map(|frame| frame.code.into())),
                    Some(Ok(other)) => panic!("a message that is no text: {} bytes", other.len()),
                    Some(Err(_)) | None => return Heard::Closed(None),
                }
            }
        };
        soon(heard, "a frame").await
    }

    /// The next frame; panics where the socket is closed instead.
    pub async fn frame(&mut self) -> Value {
        match self.hear().await {
            Heard::Frame(frame) => frame,
            Heard::Closed(code) => panic!("the socket was closed with {code:?}"),
        }
    }

    /// The next frame of this type, and those before it thrown away.
    pub async fn frame_of(&mut self, kind: &str) -> Value {
        loop {
            let frame = self.frame().await;
            if frame["type"] == kind {
                return frame;
            }
        }
    }

    /// The id of the next turn that is dispatched.
    pub async fn turn(&mut self) -> String {
        self.frame_of("turn").await["turn_id"].as_str().expect("a turn's id").to_owned()
    }

    /// Says one event of a turn.
    pub async fn say(&mut self, turn: &str, seq: u64, name: &str, object: &str) {
        self.text(frame(turn, seq, name, object)).await;
    }

    /// Says a whole short answer.
    pub async fn answer(&mut self, turn: &str, text: &str) {
        self.say(turn, 0, "open", r#"{"model":"demo"}"#).await;
        self.say(turn, 1, "text", &json!({"text": text}).to_string()).await;
        self.say(turn, 2, "done", r#"{"finish":"stop"}"#).await;
    }

    /// Sends any text as a frame.
    pub async fn text(&mut self, text: String) {
        self.message(Message::text(text)).await;
    }

    /// Sends any message. A peer that has gone is not a fault of the test.
    pub async fn message(&mut self, message: Message) {
        let _ = soon(self.stream.send(message), "the peer to read").await;
    }

    /// Sends bytes past all framing.
    pub async fn write(&mut self, bytes: &[u8]) {
        let _ = soon(self.stream.get_mut().write_all(bytes), "the peer to read").await;
    }

    /// Says goodbye, and waits until the peer has too.
    pub async fn close(mut self, code: u16) {
        self.message(Message::Close(Some(CloseFrame { code: code.into(), reason: Default::default() }))).await;
        while let Some(Ok(_)) = soon(self.stream.next(), "the peer's goodbye").await {}
    }

    /// Leaves with a RST.
    pub fn abort(self) {
        let _ = self.stream.get_ref().set_zero_linger();
    }

    /// How many pings have come.
    pub fn pings(&self) -> usize {
        self.pings
    }
}

/// An event's object as the frame of a turn.
pub fn frame(turn: &str, seq: u64, name: &str, object: &str) -> String {
    let members = object.strip_prefix('{').expect("an object");
    let comma = if members == "}" { "" } else { "," };
    format!("{{\"type\":\"{name}\",\"turn_id\":\"{turn}\",\"seq\":{seq}{comma}{members}")
}

/// Text frames as a server puts them on the wire: RFC 6455 section 5.2.
pub fn wire(frames: impl IntoIterator<Item = impl AsRef<str>>) -> Bytes {
    let mut out = BytesMut::new();
    for frame in frames {
        let text = frame.as_ref().as_bytes();
        out.put_u8(0x81);
        match text.len() {
            short @ 0..=125 => out.put_u8(short as u8),
            medium @ 126..=0xffff => {
                out.put_u8(126);
                out.put_u16(medium as u16);
            }
            long => {
                out.put_u8(127);
                out.put_u64(long as u64);
            }
        }
        out.put_slice(text);
    }
    out.freeze()
}
