//! Clients that do what they are told and believe nothing: HTTP/1.1 by hand over any stream, HTTP/2 through hyper.
//!
//! No task reads in the background: a client that is not asked for the next event does not read, and its socket fills up.

use std::collections::VecDeque;
use std::future::Future;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http2::{Connection, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::answer::{Event, Judge, Kind, Transcript, problem};
use crate::broken::shown;
use crate::http1::{Body, Taken, take_head};
use crate::sse::{Piece, Reader};
use crate::{Broken, Head, soon};

/// The largest body [`Reply`] holds, in bytes.
const MAX_BODY_BYTES: usize = 64 << 20;

/// A request to be sent.
#[derive(Debug, Clone)]
pub struct Request {
    method: String,
    target: String,
    headers: Vec<(String, String)>,
    body: Bytes,
}

impl Request {
    /// A request without headers or body.
    pub fn new(method: &str, target: &str) -> Request {
        Request { method: method.into(), target: target.into(), headers: Vec::new(), body: Bytes::new() }
    }

    /// A GET.
    pub fn get(target: &str) -> Request {
        Request::new("GET", target)
    }

    /// A POST of JSON.
    pub fn post(target: &str, body: &Value) -> Request {
        Request::new("POST", target).header("content-type", "application/json").body(body.to_string())
    }

    /// A turn of one user message, to `/v1/chat/stream`.
    pub fn turn(content: &str) -> Request {
        Request::post("/v1/chat/stream", &serde_json::json!({"messages": [{"role": "user", "content": content}]}))
    }

    /// A streamed chat completion of one user message, to `/v1/chat/completions`.
    pub fn completion(model: &str, content: &str) -> Request {
        let messages = serde_json::json!([{"role": "user", "content": content}]);
        Request::post("/v1/chat/completions", &serde_json::json!({"model": model, "stream": true, "messages": messages}))
    }

    /// Adds a header, also one that is there already.
    #[must_use]
    pub fn header(mut self, name: &str, value: &str) -> Request {
        self.headers.push((name.into(), value.into()));
        self
    }

    /// Adds `authorization: Bearer`.
    #[must_use]
    pub fn bearer(self, token: &str) -> Request {
        self.header("authorization", &format!("Bearer {token}"))
    }

    /// Replaces the body.
    #[must_use]
    pub fn body(mut self, body: impl Into<Bytes>) -> Request {
        self.body = body.into();
        self
    }

    pub(crate) fn target(&self) -> &str {
        &self.target
    }

    pub(crate) fn headers(&self) -> &[(String, String)] {
        &self.headers
    }

    /// Its bytes in HTTP/1.1. `host` and `content-length` are added where the headers do not speak of them themselves.
    pub fn bytes(&self, host: &str) -> Vec<u8> {
        let says = |name: &str| self.headers.iter().any(|(known, _)| known.eq_ignore_ascii_case(name));
        let mut head = format!("{} {} HTTP/1.1\r\n", self.method, self.target);
        if !says("host") {
            head.push_str(&format!("host: {host}\r\n"));
        }
        for (name, value) in &self.headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        let bodied = !self.body.is_empty() || matches!(self.method.as_str(), "POST" | "PUT" | "PATCH");
        if bodied && !says("content-length") && !says("transfer-encoding") {
            head.push_str(&format!("content-length: {}\r\n", self.body.len()));
        }
        head.push_str("\r\n");
        let mut bytes = head.into_bytes();
        bytes.extend_from_slice(&self.body);
        bytes
    }
}

/// A whole answer that was no stream.
#[derive(Debug, Clone)]
pub struct Reply {
    /// The status.
    pub status: u16,
    /// The head.
    pub head: Head,
    /// The whole body.
    pub body: Bytes,
    /// What followed the last chunk.
    pub trailers: Vec<(String, String)>,
}

impl Reply {
    /// The value of the only header of this name.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.header(name)
    }

    /// The body as text, for messages and canaries.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The body as JSON; panics where it is none.
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error} in the body of a {}: {}", self.status, self.text()))
    }

    /// The code of a problem body, after every rule of problem bodies has been checked.
    pub fn problem(&self) -> Result<String, Broken> {
        let kind = self.header("content-type");
        if kind != Some("application/problem+json") {
            return Err(Broken::Answer(format!("content-type {kind:?} on a {}: {}", self.status, shown(&self.body))));
        }
        problem(self.status, &self.text())
    }
}

/// A body that comes in pieces.
pub trait Chunks {
    /// The next bytes; `None` at the proper end. Cancel safe.
    fn chunk(&mut self) -> impl Future<Output = Result<Option<Bytes>, Broken>> + Send;
}

/// One HTTP/1.1 connection. Dropped, it is closed: with a FIN where everything was read, otherwise as the system likes;
/// [`Http1::abort`] leaves no doubt.
pub struct Http1<S = TcpStream> {
    io: S,
    host: String,
    buffer: BytesMut,
    /// Methods of requests not yet answered: they decide what body an answer has.
    asked: VecDeque<String>,
    body: Option<Body>,
}

impl Http1 {
    /// Connects.
    pub async fn connect(addr: SocketAddr) -> Http1 {
        Http1::reach(addr, None).await.unwrap_or_else(|broken| panic!("{broken}"))
    }

    /// Connects with the smallest receive buffer the system gives: a reader that stops is felt at once.
    pub async fn connect_narrow(addr: SocketAddr) -> Http1 {
        Http1::reach(addr, Some(1)).await.unwrap_or_else(|broken| panic!("{broken}"))
    }

    /// A server that dies while it is called resets the connection before it is one.
    async fn reach(addr: SocketAddr, receive_buffer_bytes: Option<u32>) -> Result<Http1, Broken> {
        let socket = if addr.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }.expect("a socket");
        if let Some(bytes) = receive_buffer_bytes {
            // Before connect: it decides the window that is offered.
            socket.set_recv_buffer_size(bytes).expect("a receive buffer size");
        }
        let stream = soon(socket.connect(addr), "a connection").await;
        let stream = stream.map_err(|error| Broken::Reset(format!("cannot connect to {addr}: {error}")))?;
        let _ = stream.set_nodelay(true);
        Ok(Http1::over(stream, &addr.to_string()))
    }

    /// Leaves with a RST.
    pub fn abort(self) {
        let _ = self.io.set_zero_linger();
    }

    /// The address of this end: what a server calls its peer.
    pub fn local_addr(&self) -> SocketAddr {
        self.io.local_addr().expect("a connected socket has an address")
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> Http1<S> {
    /// Speaks over a stream that is there already, such as one of TLS.
    pub fn over(io: S, host: &str) -> Http1<S> {
        Http1 { io, host: host.into(), buffer: BytesMut::new(), asked: VecDeque::new(), body: None }
    }

    /// Sends a request.
    pub async fn send(&mut self, request: &Request) {
        self.asked.push_back(request.method.clone());
        let bytes = request.bytes(&self.host);
        self.send_bytes(&bytes).await;
    }

    /// Sends bytes as they are: half a request, a byte too many. A peer that has closed is not a fault of the test.
    pub async fn send_bytes(&mut self, bytes: &[u8]) {
        let sent = async {
            self.io.write_all(bytes).await?;
            self.io.flush().await
        };
        let _ = soon(sent, "the server to read what the client sends").await;
    }

    /// Closes the sending side and goes on reading.
    pub async fn half_close(&mut self) {
        let _ = self.io.shutdown().await;
    }

    /// Reads the head of the next answer. 100 and 103 are skipped.
    pub async fn head(&mut self) -> Result<Head, Broken> {
        loop {
            let head = loop {
                if let Some(head) = take_head(&mut self.buffer)? {
                    break head;
                }
                if self.more().await? == 0 {
                    let what = if self.buffer.is_empty() { "before any answer" } else { "in the middle of a head" };
                    return Err(Broken::Cut(what.into()));
                }
            };
            if matches!(head.status()?, 100 | 103) {
                continue;
            }
            let method = self.asked.pop_front().unwrap_or_else(|| "GET".into());
            self.body = Some(Body::of_answer(&head, &method)?);
            return Ok(head);
        }
    }

    /// Reads a whole answer.
    pub async fn reply(&mut self) -> Result<Reply, Broken> {
        let head = self.head().await?;
        let mut body = BytesMut::new();
        while let Some(chunk) = self.chunk().await? {
            body.extend_from_slice(&chunk);
            if body.len() > MAX_BODY_BYTES {
                return Err(Broken::Answer(format!("a body of more than {MAX_BODY_BYTES} bytes")));
            }
        }
        let trailers = self.body.take().map(|body| body.trailers).unwrap_or_default();
        Ok(Reply { status: head.status()?, head, body: body.freeze(), trailers })
    }

    /// Reads the head of an answer that must be a stream, and then its events.
    pub async fn events(mut self, judge: Judge) -> Result<Events<Http1<S>>, Broken> {
        let head = self.head().await?;
        if head.status()? != 200 {
            // The body says why: worth a moment, and no more than one read.
            let why = self.chunk().await.ok().flatten().unwrap_or_default();
            return Err(Broken::Answer(format!("{} {}", head.start, shown(&why))));
        }
        Events::new(head, self, judge)
    }

    /// At most `most` bytes as they came, past all framing; empty at the end of the stream.
    pub async fn read_bytes(&mut self, most: usize) -> Result<Bytes, Broken> {
        if self.buffer.is_empty() && self.more().await? == 0 {
            return Ok(Bytes::new());
        }
        Ok(self.buffer.split_to(self.buffer.len().min(most)).freeze())
    }

    /// Waits until the server closes the connection; whatever it sends instead is broken.
    pub async fn closed(&mut self) -> Result<(), Broken> {
        if self.buffer.is_empty() && self.more().await? == 0 {
            return Ok(());
        }
        Err(Broken::AfterEnd(format!("bytes where the connection should end: {}", shown(&self.buffer))))
    }

    /// The stream itself, with what was read and not taken: after an upgrade.
    pub(crate) fn into_parts(self) -> (S, Bytes) {
        (self.io, self.buffer.freeze())
    }

    async fn more(&mut self) -> Result<usize, Broken> {
        let read = soon(self.io.read_buf(&mut self.buffer), "the server to send something or to close").await;
        read.map_err(|error| Broken::Reset(error.to_string()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> Chunks for Http1<S> {
    async fn chunk(&mut self) -> Result<Option<Bytes>, Broken> {
        loop {
            let Some(body) = &mut self.body else { return Ok(None) };
            match body.take(&mut self.buffer)? {
                Taken::Data(data) => return Ok(Some(data)),
                Taken::End => return Ok(None),
                Taken::Starved => {}
            }
            if self.more().await? == 0 {
                if let Some(body) = &mut self.body {
                    body.closed()?;
                }
                return Ok(None);
            }
        }
    }
}

/// The events of one answer, one by one, each judged as it comes.
pub struct Events<B = Http1> {
    /// The head the stream began with.
    pub head: Head,
    source: B,
    reader: Reader,
    judge: Judge,
    transcript: Transcript,
    ended: bool,
}

impl<B: Chunks> Events<B> {
    fn new(head: Head, source: B, mut judge: Judge) -> Result<Events<B>, Broken> {
        let must = |name: &str, fits: &dyn Fn(&str) -> bool| match head.header(name) {
            Some(value) if fits(value) => Ok(value),
            other => Err(Broken::Answer(format!("header {name} is {other:?}"))),
        };
        must("content-type", &|value| value == "text/event-stream" || value == "text/event-stream; charset=utf-8")?;
        if judge.kind() != Kind::Conversation {
            must("cache-control", &|value| value == "no-store")?;
            must("x-accel-buffering", &|value| value == "no")?;
            must("traceparent", &is_traceparent)?;
            let turn = must("x-headgate-turn", &|value| !value.is_empty())?;
            if judge.kind() == Kind::Client {
                judge.same_turn(turn)?;
            }
        }
        Ok(Events { head, source, reader: Reader::default(), judge, transcript: Transcript::default(), ended: false })
    }

    /// The next event; `None` at the proper end of a whole answer. Cancel safe.
    pub async fn next(&mut self) -> Result<Option<Event>, Broken> {
        loop {
            while let Some(piece) = self.reader.take()? {
                match piece {
                    Piece::Comment(_) => self.transcript.heartbeats += 1,
                    Piece::Frame(frame) => {
                        let event = self.judge.frame(frame, Instant::now())?;
                        self.transcript.events.push(event.clone());
                        return Ok(Some(event));
                    }
                }
            }
            match self.source.chunk().await? {
                Some(bytes) => self.reader.push(&bytes),
                None => {
                    self.reader.closed()?;
                    self.judge.closed()?;
                    self.ended = true;
                    return Ok(None);
                }
            }
        }
    }

    /// The next event, which must come.
    pub async fn expect(&mut self) -> Event {
        match self.next().await {
            Ok(Some(event)) => event,
            Ok(None) => panic!("the stream ended where an event was expected"),
            Err(broken) => panic!("{broken}"),
        }
    }

    /// Reads on to the end: everything since the first event.
    pub async fn rest(mut self) -> Result<Transcript, Broken> {
        while self.next().await?.is_some() {}
        Ok(self.transcript)
    }

    /// Reads on to the end of a stream that is expected to break: what came before, and how it broke.
    pub async fn broken(mut self) -> (Transcript, Broken) {
        loop {
            match self.next().await {
                Ok(Some(_)) => {}
                Ok(None) => panic!("the stream ended well where it should have broken"),
                Err(broken) => return (self.transcript, broken),
            }
        }
    }

    /// What has come so far.
    pub fn so_far(&self) -> &Transcript {
        &self.transcript
    }

    /// The connection below: to leave abruptly, to send a byte too many, to ask again after the end.
    pub fn into_inner(self) -> B {
        self.source
    }

    /// The connection below, while events are still read from it.
    pub fn inner(&mut self) -> &mut B {
        &mut self.source
    }

    /// Whether the stream has been read to its proper end.
    pub fn ended(&self) -> bool {
        self.ended
    }
}

/// W3C Trace Context, version 00.
fn is_traceparent(value: &str) -> bool {
    let hex = |part: &str, length: usize| part.len() == length && part.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    let parts: Vec<_> = value.split('-').collect();
    let &[version, trace, parent, flags] = parts.as_slice() else { return false };
    let given = |part: &str| part.bytes().any(|b| b != b'0');
    version == "00" && hex(trace, 32) && given(trace) && hex(parent, 16) && given(parent) && hex(flags, 2)
}

/// Asks once over a fresh connection and reads the whole answer.
pub async fn ask(addr: SocketAddr, request: &Request) -> Result<Reply, Broken> {
    let mut client = Http1::reach(addr, None).await?;
    client.send(request).await;
    client.reply().await
}

/// Asks once over a fresh connection for a stream.
pub async fn stream(addr: SocketAddr, request: &Request, kind: Kind) -> Result<Events, Broken> {
    let mut client = Http1::reach(addr, None).await?;
    client.send(request).await;
    client.events(Judge::new(kind)).await
}

/// One HTTP/2 connection, with prior knowledge. Many requests may be under way at once; dropping an [`Events`] resets its stream.
pub struct Http2 {
    sender: SendRequest<Full<Bytes>>,
    host: String,
    /// Whether the server's settings allow WebSockets over HTTP/2 (RFC 8441).
    takes_websockets: watch::Receiver<bool>,
    /// Told when somebody waits for that.
    wanted: Arc<Notify>,
    driver: JoinHandle<()>,
}

impl Http2 {
    /// Connects.
    pub async fn connect(addr: SocketAddr) -> Http2 {
        let stream =
            soon(TcpStream::connect(addr), "a connection").await.unwrap_or_else(|error| panic!("cannot connect to {addr}: {error}"));
        let _ = stream.set_nodelay(true);
        Http2::over(stream, &addr.to_string()).await.unwrap_or_else(|broken| panic!("{broken}"))
    }

    /// Speaks over a stream that is there already, such as one of TLS that settled on `h2`.
    pub async fn over<S>(io: S, host: &str) -> Result<Http2, Broken>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let handshake = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(io));
        let (sender, connection) = soon(handshake, "an HTTP/2 handshake").await.map_err(wrong)?;
        let (settings, takes_websockets) = watch::channel(false);
        let wanted = Arc::new(Notify::new());
        let driver = tokio::spawn(drive(connection, settings, wanted.clone()));
        Ok(Http2 { sender, host: host.into(), takes_websockets, wanted, driver })
    }

    /// Sends a request and waits for the answer's head.
    pub async fn send(&mut self, request: &Request) -> Result<http::Response<Incoming>, Broken> {
        let mut built = http::Request::builder().method(request.method.as_str()).uri(format!("http://{}{}", self.host, request.target));
        for (name, value) in &request.headers {
            built = built.header(name, value);
        }
        let built = built.body(Full::new(request.body.clone())).map_err(|error| Broken::Http(error.to_string()))?;
        self.send_built(built).await
    }

    pub(crate) async fn send_built(&mut self, request: http::Request<Full<Bytes>>) -> Result<http::Response<Incoming>, Broken> {
        soon(self.sender.ready(), "the HTTP/2 connection").await.map_err(wrong)?;
        soon(self.sender.send_request(request), "the head of an answer").await.map_err(wrong)
    }

    /// Sends a request and reads the whole answer.
    pub async fn ask(&mut self, request: &Request) -> Result<Reply, Broken> {
        let response = self.send(request).await?;
        let (head, status) = (head_of(&response)?, response.status().as_u16());
        let body = soon(response.into_body().collect(), "the end of an answer").await.map_err(wrong)?;
        let trailers = body.trailers().map(pairs).transpose()?.unwrap_or_default();
        Ok(Reply { status, head, body: body.to_bytes(), trailers })
    }

    /// Sends a request for a stream.
    pub async fn events(&mut self, request: &Request, judge: Judge) -> Result<Events<Incoming>, Broken> {
        let response = self.send(request).await?;
        let head = head_of(&response)?;
        let status = response.status();
        let mut body = response.into_body();
        if status != 200 {
            let why = body.chunk().await.ok().flatten().unwrap_or_default();
            return Err(Broken::Answer(format!("{} {}", head.start, shown(&why))));
        }
        Events::new(head, body, judge)
    }

    /// Waits until the server's settings allow WebSockets over HTTP/2.
    pub(crate) async fn takes_websockets(&mut self) -> Result<(), Broken> {
        self.wanted.notify_one();
        let taken = soon(self.takes_websockets.wait_for(|takes| *takes), "settings that allow extended CONNECT").await;
        taken.map(drop).map_err(|_| Broken::Cut("the HTTP/2 connection ended".into()))
    }

    pub(crate) fn host(&self) -> &str {
        &self.host
    }
}

async fn drive<S>(connection: Connection<TokioIo<S>, Full<Bytes>, TokioExecutor>, settings: watch::Sender<bool>, wanted: Arc<Notify>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut connection = pin!(connection);
    let mut looks = tokio::time::interval(Duration::from_millis(2));
    let mut looking = false;
    loop {
        tokio::select! {
            _ = &mut connection => return,
            () = wanted.notified() => looking = true,
            // Hyper reads the settings in a task of its own and wakes nobody: one can only look.
            _ = looks.tick(), if looking => {
                looking = !connection.is_extended_connect_protocol_enabled();
                settings.send_replace(!looking);
            }
        }
    }
}

impl Drop for Http2 {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

impl Chunks for Incoming {
    async fn chunk(&mut self) -> Result<Option<Bytes>, Broken> {
        loop {
            match soon(self.frame(), "the server to send something or to end").await {
                None => return Ok(None),
                Some(Err(error)) => return Err(wrong(error)),
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) if !data.is_empty() => return Ok(Some(data)),
                    // Trailers, or an empty frame.
                    Ok(_) | Err(_) => {}
                },
            }
        }
    }
}

pub(crate) fn head_of<B>(response: &http::Response<B>) -> Result<Head, Broken> {
    let headers = pairs(response.headers())?;
    Ok(Head { raw: Bytes::new(), start: format!("HTTP/2 {}", response.status().as_u16()), headers })
}

fn pairs(headers: &http::HeaderMap) -> Result<Vec<(String, String)>, Broken> {
    let pair = |(name, value): (&http::HeaderName, &http::HeaderValue)| match std::str::from_utf8(value.as_bytes()) {
        Ok(value) => Ok((name.to_string(), value.to_owned())),
        Err(_) => Err(Broken::Http(format!("not UTF-8 in header {name}"))),
    };
    headers.iter().map(pair).collect()
}

fn wrong(error: hyper::Error) -> Broken {
    let mut sentence = error.to_string();
    let mut source = std::error::Error::source(&error);
    while let Some(cause) = source {
        sentence.push_str(&format!(": {cause}"));
        source = cause.source();
    }
    Broken::Reset(sentence)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::upstream::{Framing, Script, Upstream};

    const TRACE: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    const HEADERS: [(&str, &str); 5] = [
        ("content-type", "text/event-stream"),
        ("cache-control", "no-store"),
        ("x-accel-buffering", "no"),
        ("traceparent", TRACE),
        ("x-headgate-turn", "t"),
    ];
    const TURN: &str = "id: t:0\nevent: open\ndata: {\"turn_id\":\"t\",\"session_id\":\"s\",\"model\":\"m\"}\n\n: \n\n\
        id: t:1\nevent: done\ndata: {\"finish\":\"stop\",\"outcome\":\"allowed\"}\n\n";

    async fn turn(status: u16, headers: &[(&str, &str)], body: &str) -> Result<Transcript, Broken> {
        let script = Script::new().read().head(status, Framing::Chunked, headers).send(body.to_owned()).end();
        let server = Upstream::always(script).await;
        stream(server.addr(), &Request::turn("hello"), Kind::Client).await?.rest().await
    }

    #[tokio::test]
    async fn a_turn_is_read_with_its_heartbeats() {
        let whole = turn(200, &HEADERS, TURN).await.unwrap();
        assert_eq!((whole.heartbeats, whole.events.len(), whole.outcome()), (1, 2, "allowed"));
    }

    #[tokio::test]
    async fn a_stream_without_its_headers_is_none() {
        for missing in 0..HEADERS.len() {
            let mut headers = HEADERS.to_vec();
            let name = headers.remove(missing).0;
            let broken = turn(200, &headers, TURN).await.unwrap_err();
            assert!(matches!(&broken, Broken::Answer(sentence) if sentence.contains(name)), "{broken}");
        }
        for (at, wrong) in [(0, "text/html"), (1, "no-cache"), (2, "yes"), (3, "00-0-0-00"), (3, &TRACE.to_uppercase())] {
            let mut headers = HEADERS;
            headers[at].1 = wrong;
            assert!(matches!(turn(200, &headers, TURN).await, Err(Broken::Answer(_))), "{wrong}");
        }
        let mut other = HEADERS;
        other[4].1 = "u";
        assert!(matches!(turn(200, &other, TURN).await, Err(Broken::Identity(_))), "the head names another turn");
        assert!(matches!(turn(503, &HEADERS, TURN).await, Err(Broken::Answer(_))));
    }

    #[tokio::test]
    async fn what_breaks_late_leaves_what_came_before() {
        let server = Upstream::always(Script::new().read().head(200, Framing::Chunked, &HEADERS).send(&TURN[..100]).reset()).await;
        let events = stream(server.addr(), &Request::turn("hello"), Kind::Client).await.unwrap();
        let (before, broken) = events.broken().await;
        assert_eq!((before.events.len(), matches!(broken, Broken::Reset(_))), (1, true), "{broken}");
    }

    #[tokio::test]
    async fn requests_may_be_sent_in_one_write_and_are_answered_in_order() {
        let server = Upstream::answering(|request| Script::reply(200, "text/plain", request.target.clone())).await;
        let mut client = Http1::connect(server.addr()).await;
        let both = [Request::get("/a").bytes("h"), Request::get("/b").bytes("h"), b"G".to_vec()].concat();
        client.send_bytes(&both).await;
        assert_eq!(client.reply().await.unwrap().text() + &client.reply().await.unwrap().text(), "/a/b");
    }
}
