//! A model server that does exactly what a script says, and tells what was done to it.
//!
//! ```no_run
//! # use headgate_testkit::{dialect::{Answer, Cut}, upstream::{Script, Upstream}};
//! # async fn example() {
//! let answer = Answer::openai("demo", &["my se", "cret is safe"]);
//! let model = Upstream::each([Script::new().read().sse().send_all(answer.cut(Cut::Bytes(1))).end()]).await;
//! // ... point Headgate at model.addr(), ask, leave ...
//! let left = model.closed(1).await; // the moment the first connection was closed from the other side
//! # }
//! ```

use std::collections::VecDeque;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{Notify, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::Instant;

use crate::http1::{Body, Taken, take_head};
use crate::{Broken, Head, soon};

/// The largest request body kept, in bytes; a request beyond it is a complaint.
const MAX_REQUEST_BYTES: usize = 64 << 20;
/// How many requests and departures are kept; a test with more counts in [`Upstream::opened`].
const MAX_KEPT: usize = 100_000;
/// How many bytes a peer may send while a script does not read.
const MAX_EARLY_BYTES: usize = 1 << 20;
/// A socket that took no byte for this long counts as blocked.
const QUIET: Duration = Duration::from_millis(250);
/// How long a closing connection waits for its peer to close too.
const LINGER: Duration = Duration::from_secs(5);

/// What one connection does, step after step. At the end of its script a connection is closed.
#[derive(Clone, Default)]
pub struct Script {
    steps: Vec<Step>,
}

type Choice = Arc<dyn Fn(&Request) -> Script + Send + Sync>;

#[derive(Clone)]
enum Step {
    Read,
    ReadHead,
    Choose(Choice),
    Head(u16, Framing, Vec<(String, String)>),
    Send(Bytes),
    Raw(Bytes),
    HalfChunk(Bytes),
    End,
    Wait(Arc<Notify>),
    Tell(Arc<Notify>),
    Pause(Duration),
    Flood(Bytes),
    Again,
    Stall,
    Close,
    Reset,
}

/// How an answer tells its length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    /// `transfer-encoding: chunked`; every send is one chunk.
    Chunked,
    /// `content-length`, in bytes. What is then sent may well be more or less.
    Length(usize),
    /// Until the connection is closed.
    UntilClose,
    /// No length and no body: 204, 304, or a head that lies.
    None,
}

impl Script {
    /// Does nothing yet.
    pub fn new() -> Script {
        Script::default()
    }

    /// Answers every request with an event stream made of `pieces`, one chunk each, properly ended, on a kept connection.
    pub fn stream<B: Into<Bytes>>(pieces: impl IntoIterator<Item = B>) -> Script {
        Script::new().read().sse().send_all(pieces).end().again()
    }

    /// Answers every request with this status, type and body, on a kept connection.
    pub fn reply(status: u16, content_type: &str, body: impl Into<Bytes>) -> Script {
        let body = body.into();
        Script::new().read().head(status, Framing::Length(body.len()), &[("content-type", content_type)]).send(body).again()
    }

    /// Answers 302 with a `location`.
    pub fn redirect(location: &str) -> Script {
        Script::new().read().head(302, Framing::Length(0), &[("location", location)]).again()
    }

    /// Answers 204.
    pub fn no_content() -> Script {
        Script::new().read().head(204, Framing::None, &[]).again()
    }

    /// Reads one request, head and body, and keeps it for [`Upstream::requests`].
    #[must_use]
    pub fn read(self) -> Script {
        self.then(Step::Read)
    }

    /// Reads only a request's head, so that the answer comes before the request's body is read; no other request can follow.
    #[must_use]
    pub fn read_head(self) -> Script {
        self.then(Step::ReadHead)
    }

    /// Goes on as `choose` says for the request just read; where that script begins by reading, this step of it is left out.
    #[must_use]
    pub fn choose(self, choose: impl Fn(&Request) -> Script + Send + Sync + 'static) -> Script {
        self.then(Step::Choose(Arc::new(choose)))
    }

    /// Sends a status line and headers. The headers of `framing` are added.
    #[must_use]
    pub fn head(self, status: u16, framing: Framing, headers: &[(&str, &str)]) -> Script {
        let headers = headers.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())).collect();
        self.then(Step::Head(status, framing, headers))
    }

    /// The head of an event stream, chunked.
    #[must_use]
    pub fn sse(self) -> Script {
        self.sse_framed(Framing::Chunked)
    }

    /// The head of an event stream.
    #[must_use]
    pub fn sse_framed(self, framing: Framing) -> Script {
        self.head(200, framing, &[("content-type", "text/event-stream"), ("cache-control", "no-store")])
    }

    /// Sends bytes of the body in one write: one chunk, where the answer is chunked.
    #[must_use]
    pub fn send(self, bytes: impl Into<Bytes>) -> Script {
        self.then(Step::Send(bytes.into()))
    }

    /// Sends each piece in a write of its own.
    #[must_use]
    pub fn send_all<B: Into<Bytes>>(self, pieces: impl IntoIterator<Item = B>) -> Script {
        pieces.into_iter().fold(self, Script::send)
    }

    /// Sends each piece in a write of its own and pauses after each, so that the peer reads them one by one.
    #[must_use]
    pub fn send_paced<B: Into<Bytes>>(self, pieces: impl IntoIterator<Item = B>, gap: Duration) -> Script {
        pieces.into_iter().fold(self, |script, piece| script.send(piece).pause(gap))
    }

    /// Ends the body properly: the last chunk, where the answer is chunked.
    #[must_use]
    pub fn end(self) -> Script {
        self.then(Step::End)
    }

    /// Sends bytes past all framing: the peer sees them as they are.
    #[must_use]
    pub fn raw(self, bytes: impl Into<Bytes>) -> Script {
        self.then(Step::Raw(bytes.into()))
    }

    /// Announces a chunk twice as long as `bytes` and sends only `bytes` of it.
    #[must_use]
    pub fn half_chunk(self, bytes: impl Into<Bytes>) -> Script {
        self.then(Step::HalfChunk(bytes.into()))
    }

    /// Waits until the test calls `notify_one`, once for each connection that waits.
    #[must_use]
    pub fn wait(self, go: &Arc<Notify>) -> Script {
        self.then(Step::Wait(go.clone()))
    }

    /// Tells the test, by `notify_one`, that the script has come this far.
    #[must_use]
    pub fn tell(self, here: &Arc<Notify>) -> Script {
        self.then(Step::Tell(here.clone()))
    }

    /// Sends nothing for this long: the pace of a model, not a way to wait for something.
    #[must_use]
    pub fn pause(self, time: Duration) -> Script {
        self.then(Step::Pause(time))
    }

    /// Sends `bytes` again and again until the peer is gone. See [`Upstream::blocked`].
    #[must_use]
    pub fn flood(self, bytes: impl Into<Bytes>) -> Script {
        self.then(Step::Flood(bytes.into()))
    }

    /// Starts over with the next request on this connection.
    #[must_use]
    pub fn again(self) -> Script {
        self.then(Step::Again)
    }

    /// Sends nothing more and keeps the connection until the peer closes it.
    #[must_use]
    pub fn stall(self) -> Script {
        self.then(Step::Stall)
    }

    /// Closes the connection with a FIN, wherever the answer stands.
    #[must_use]
    pub fn close(self) -> Script {
        self.then(Step::Close)
    }

    /// Closes the connection with a RST.
    #[must_use]
    pub fn reset(self) -> Script {
        self.then(Step::Reset)
    }

    fn then(mut self, step: Step) -> Script {
        self.steps.push(step);
        self
    }

    /// Whether the connection's first byte must have come before the script can begin.
    fn begins_with_a_request(&self) -> bool {
        matches!(self.steps.first(), Some(Step::Read | Step::ReadHead))
    }
}

/// A request as it came over the wire.
#[derive(Debug, Clone)]
pub struct Request {
    /// On which connection, from 0, in the order they were accepted.
    pub connection: usize,
    /// The method.
    pub method: String,
    /// The target, query included.
    pub target: String,
    /// Bytes of the head, and its headers.
    pub head: Head,
    /// The whole body, out of its chunks.
    pub body: Bytes,
    /// What followed the last chunk.
    pub trailers: Vec<(String, String)>,
    /// When its last byte was read.
    pub arrived: Instant,
}

impl Request {
    /// The value of the only header of this name.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.header(name)
    }

    /// The body as JSON; panics where it is none.
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).expect("the request's body is JSON")
    }
}

/// How a peer left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// With a FIN. A peer that closes only its sending side has left too: no client of a model has a reason to.
    Closed,
    /// With a RST.
    Reset,
}

/// A peer that left before the script was through.
#[derive(Debug, Clone, Copy)]
pub struct Departure {
    /// Which connection, from 0.
    pub connection: usize,
    /// When the socket told so.
    pub at: Instant,
    /// How.
    pub how: How,
    /// How many bytes had been written to it.
    pub written: u64,
}

/// A listening model server that plays scripts. Dropped, it closes everything.
///
/// Panics when dropped after a peer has sent it malformed HTTP: see [`Upstream::complaints`].
pub struct Upstream {
    addr: SocketAddr,
    state: watch::Receiver<State>,
    accepting: JoinHandle<()>,
    /// Whether the test looks after the complaints itself.
    complaints_read: AtomicBool,
}

#[derive(Default)]
struct State {
    opened: usize,
    open: usize,
    surplus: usize,
    requests: Vec<Request>,
    departures: Vec<Departure>,
    complaints: Vec<String>,
    /// By connection: bytes written, and whether the socket would take no more at the last try.
    progress: Vec<(u64, bool)>,
}

/// Which script a connection plays.
enum Scripts {
    Always(Script),
    Each(Mutex<VecDeque<Script>>),
}

impl Upstream {
    /// Every connection plays `script`.
    pub async fn always(script: Script) -> Upstream {
        Upstream::start(Scripts::Always(script), None).await
    }

    /// The first connection plays the first script, and so on; a connection too many is reset and counted in
    /// [`Upstream::surplus`]. Where a script begins by reading, a connection takes it with its first byte: one that only
    /// knocks, as TCP health checks do, uses up none.
    pub async fn each(scripts: impl IntoIterator<Item = Script>) -> Upstream {
        Upstream::start(Scripts::Each(Mutex::new(scripts.into_iter().collect())), None).await
    }

    /// Every request, on whatever connection, is read and then answered by the script chosen for it.
    pub async fn answering(choose: impl Fn(&Request) -> Script + Send + Sync + 'static) -> Upstream {
        Upstream::always(Script::new().read().choose(choose).again()).await
    }

    /// Like [`Upstream::always`], with the smallest send buffer the system gives: what is written has nearly all left.
    pub async fn always_unbuffered(script: Script) -> Upstream {
        Upstream::start(Scripts::Always(script), Some(1)).await
    }

    async fn start(scripts: Scripts, send_buffer_bytes: Option<u32>) -> Upstream {
        let socket = TcpSocket::new_v4().expect("a socket");
        if let Some(bytes) = send_buffer_bytes {
            // Before listen: accepted sockets inherit it.
            socket.set_send_buffer_size(bytes).expect("a send buffer size");
        }
        socket.bind(SocketAddr::from(([127, 0, 0, 1], 0))).expect("a free port");
        let listener = socket.listen(4096).expect("to listen");
        let addr = listener.local_addr().expect("an address");
        let (state, watching) = watch::channel(State::default());
        let accepting = tokio::spawn(accept(listener, Arc::new(scripts), Arc::new(state)));
        Upstream { addr, state: watching, accepting, complaints_read: AtomicBool::new(false) }
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// `http://127.0.0.1:port`, without a slash at the end.
    pub fn url(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// Every request read so far.
    pub fn requests(&self) -> Vec<Request> {
        self.state.borrow().requests.clone()
    }

    /// The `n`th request, from 0, as soon as it has been read.
    pub async fn request(&self, n: usize) -> Request {
        self.when(&format!("request {n} at the upstream"), |state| state.requests.get(n).cloned()).await
    }

    /// The `n`th departure of a peer, from 1: resolves the moment its socket tells.
    pub async fn closed(&self, n: usize) -> Departure {
        let what = format!("{n} connections to be closed by the upstream's peer");
        self.when(&what, |state| n.checked_sub(1).and_then(|n| state.departures.get(n).copied())).await
    }

    /// Resolves as soon as no connection is open.
    pub async fn idle(&self) {
        self.when("every connection to the upstream to be closed", |state| (state.open == 0).then_some(())).await;
    }

    /// Resolves as soon as `n` connections have been accepted, in all.
    pub async fn accepted(&self, n: usize) {
        self.when(&format!("{n} connections to the upstream"), |state| (state.opened >= n).then_some(())).await;
    }

    /// Every departure so far.
    pub fn departures(&self) -> Vec<Departure> {
        self.state.borrow().departures.clone()
    }

    /// How many connections were ever accepted.
    pub fn opened(&self) -> usize {
        self.state.borrow().opened
    }

    /// How many connections are open now.
    pub fn open(&self) -> usize {
        self.state.borrow().open
    }

    /// How many connections came for which [`Upstream::each`] had no script.
    pub fn surplus(&self) -> usize {
        self.state.borrow().surplus
    }

    /// Bytes written so far, heads and framing included, over all connections.
    pub fn written(&self) -> u64 {
        self.state.borrow().progress.iter().map(|(written, _)| written).sum()
    }

    /// Bytes written over all connections until back-pressure stopped every one that still writes: resolves when some
    /// connection is blocked and none has written a byte for a quarter of a second.
    pub async fn blocked(&self) -> u64 {
        let mut state = self.state.clone();
        let settled = async {
            loop {
                state.wait_for(|state| state.progress.iter().any(|(_, blocked)| *blocked)).await.expect("the upstream is running");
                let before = self.written();
                tokio::time::sleep(QUIET).await;
                let still = state.borrow_and_update().progress.iter().any(|(_, blocked)| *blocked);
                if still && self.written() == before {
                    return before;
                }
            }
        };
        soon(settled, "back-pressure to reach the upstream").await
    }

    /// What peers sent that is not HTTP, as sentences. Who asks answers for it: the drop then does not panic.
    pub fn complaints(&self) -> Vec<String> {
        self.complaints_read.store(true, Ordering::Relaxed);
        self.state.borrow().complaints.clone()
    }

    async fn when<T>(&self, what: &str, found: impl Fn(&State) -> Option<T>) -> T {
        let mut state = self.state.clone();
        let state = soon(state.wait_for(|state| found(state).is_some()), what).await.expect("the upstream is running");
        found(&state).expect("it was there a moment ago")
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        self.accepting.abort();
        if !self.complaints_read.load(Ordering::Relaxed) && !std::thread::panicking() {
            let complaints = &self.state.borrow().complaints;
            assert!(complaints.is_empty(), "the upstream was sent malformed HTTP: {complaints:?}");
        }
    }
}

/// A port on which nobody listens and nobody else will: connections to it are refused for as long as this lives.
pub struct Refusing {
    addr: SocketAddr,
    _bound: TcpSocket,
}

impl Refusing {
    /// Binds a port without listening on it.
    pub fn start() -> Refusing {
        let socket = TcpSocket::new_v4().expect("a socket");
        socket.bind(SocketAddr::from(([127, 0, 0, 1], 0))).expect("a free port");
        Refusing { addr: socket.local_addr().expect("an address"), _bound: socket }
    }

    /// The address that refuses.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }
}

async fn accept(listener: TcpListener, scripts: Arc<Scripts>, state: Arc<watch::Sender<State>>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => {
                // Out of descriptors, most likely: the test's own limit, and the next connection may find one free.
                let Ok((stream, _)) = accepted else { tokio::task::yield_now().await; continue };
                let _ = stream.set_nodelay(true);
                let mut number = 0;
                state.send_modify(|state| {
                    number = state.opened;
                    state.opened += 1;
                    state.open += 1;
                    state.progress.push((0, false));
                });
                connections.spawn(serve(Connection::new(stream, number, state.clone()), scripts.clone()));
            }
        }
    }
}

/// Plays one connection to its end and says how it ended.
async fn serve(mut connection: Connection, scripts: Arc<Scripts>) {
    let ending = match connection.script(&scripts).await {
        Ok(Some(script)) => connection.play(&script).await.err().unwrap_or(Ending::Closed),
        Ok(None) => {
            connection.state.send_modify(|state| state.surplus += 1);
            Ending::Reset
        }
        Err(ending) => ending,
    };
    connection.finish(ending).await;
}

/// Why a script goes no further.
enum Ending {
    PeerLeft(How),
    Malformed(Broken),
    Closed,
    Reset,
}

struct Connection {
    stream: TcpStream,
    number: usize,
    state: Arc<watch::Sender<State>>,
    /// Read, and not yet taken by a step.
    inbox: BytesMut,
    /// The request read last.
    request: Option<Request>,
    framing: Framing,
    /// Bytes of body still owed, where a length was announced.
    owed_bytes: usize,
    /// Whether a body was left in the way of the next request.
    unread_body: bool,
    /// Whether the answer's end has been sent, so that another request may follow.
    answered: bool,
}

impl Connection {
    fn new(stream: TcpStream, number: usize, state: Arc<watch::Sender<State>>) -> Connection {
        Connection {
            stream,
            number,
            state,
            inbox: BytesMut::new(),
            request: None,
            framing: Framing::None,
            owed_bytes: 0,
            unread_body: false,
            answered: true,
        }
    }

    /// The script of this connection; `None` where there is none left.
    async fn script(&mut self, scripts: &Scripts) -> Result<Option<Script>, Ending> {
        let left = match scripts {
            Scripts::Always(script) => return Ok(Some(script.clone())),
            Scripts::Each(left) => left,
        };
        let next = || left.lock().unwrap_or_else(PoisonError::into_inner);
        let waits = next().front().is_none_or(Script::begins_with_a_request);
        if waits && self.more().await? == 0 {
            return Err(Ending::PeerLeft(How::Closed));
        }
        Ok(next().pop_front())
    }

    async fn play(&mut self, script: &Script) -> Result<(), Ending> {
        loop {
            let mut again = false;
            // A chosen script takes the place of the step that chose it.
            let mut steps: VecDeque<Step> = script.steps.iter().cloned().collect();
            while let Some(step) = steps.pop_front() {
                match step {
                    Step::Choose(choose) => {
                        let chosen = self.request.as_ref().map(|request| choose(request)).unwrap_or_default();
                        // Its request has been read: that is what it was chosen for.
                        let read = usize::from(chosen.begins_with_a_request());
                        for step in chosen.steps.into_iter().skip(read).rev() {
                            steps.push_front(step);
                        }
                    }
                    Step::Again => {
                        again = true;
                        break;
                    }
                    step => self.step(step).await?,
                }
            }
            if !again || !self.answered || self.unread_body {
                return Ok(());
            }
        }
    }

    async fn step(&mut self, step: Step) -> Result<(), Ending> {
        match step {
            Step::Read => self.read(true).await,
            Step::ReadHead => self.read(false).await,
            Step::Head(status, framing, headers) => {
                self.framing = framing;
                self.owed_bytes = if let Framing::Length(length) = framing { length } else { 0 };
                self.answered = matches!(framing, Framing::Length(0) | Framing::None);
                self.write(&head(status, framing, &headers)).await
            }
            Step::Send(bytes) => self.send(&bytes).await,
            Step::Raw(bytes) => {
                // Whatever it was, the connection cannot be trusted with another request.
                self.answered = false;
                self.write(&bytes).await
            }
            Step::HalfChunk(bytes) => {
                self.write(format!("{:x}\r\n", bytes.len() * 2).as_bytes()).await?;
                self.write(&bytes).await
            }
            Step::End => {
                self.answered = matches!(self.framing, Framing::Chunked) || self.answered;
                if self.framing == Framing::Chunked { self.write(b"0\r\n\r\n").await } else { Ok(()) }
            }
            Step::Wait(go) => {
                tokio::select! { () = go.notified() => Ok(()), left = gone(&self.stream, &mut self.inbox) => Err(Ending::PeerLeft(left)) }
            }
            Step::Tell(here) => {
                here.notify_one();
                Ok(())
            }
            Step::Pause(time) => {
                tokio::select! { () = tokio::time::sleep(time) => Ok(()), left = gone(&self.stream, &mut self.inbox) => Err(Ending::PeerLeft(left)) }
            }
            Step::Flood(bytes) => loop {
                self.send(&bytes).await?;
                // Writing never waits while the peer keeps up; the peer may run on this very thread.
                tokio::task::yield_now().await;
            },
            Step::Stall => Err(Ending::PeerLeft(gone(&self.stream, &mut self.inbox).await)),
            Step::Close => Err(Ending::Closed),
            Step::Reset => Err(Ending::Reset),
            // Both are taken out by `play`.
            Step::Choose(_) | Step::Again => Ok(()),
        }
    }

    /// Reads a request: its head, and its body if `whole`.
    async fn read(&mut self, whole: bool) -> Result<(), Ending> {
        let head = loop {
            if let Some(head) = take_head(&mut self.inbox).map_err(Ending::Malformed)? {
                break head;
            }
            if self.more().await? == 0 {
                // Half a head is a client that left, not one that is wrong.
                return Err(Ending::PeerLeft(How::Closed));
            }
        };
        let (method, target) = head.request_line().map_err(Ending::Malformed)?;
        let mut framing = Body::of_request(&head).map_err(Ending::Malformed)?;
        let mut body = BytesMut::new();
        let mut reading = whole;
        while reading {
            match framing.take(&mut self.inbox).map_err(Ending::Malformed)? {
                Taken::Data(data) => body.extend_from_slice(&data),
                Taken::End => reading = false,
                Taken::Starved if self.more().await? == 0 => return Err(Ending::PeerLeft(How::Closed)),
                Taken::Starved => {}
            }
            if body.len() > MAX_REQUEST_BYTES {
                return Err(Ending::Malformed(Broken::Http(format!("a request body of more than {MAX_REQUEST_BYTES} bytes"))));
            }
        }
        self.unread_body = !whole;
        let (connection, trailers) = (self.number, framing.trailers);
        let request = Request { connection, method, target, head, body: body.freeze(), trailers, arrived: Instant::now() };
        self.request = Some(request.clone());
        self.answered = false;
        self.state.send_modify(|state| {
            if state.requests.len() < MAX_KEPT {
                state.requests.push(request);
            }
        });
        Ok(())
    }

    /// Sends bytes of the body, framed as the head said.
    async fn send(&mut self, bytes: &[u8]) -> Result<(), Ending> {
        match self.framing {
            Framing::Chunked if bytes.is_empty() => Ok(()),
            Framing::Chunked => {
                let mut chunk = Vec::with_capacity(bytes.len() + 12);
                chunk.extend_from_slice(format!("{:x}\r\n", bytes.len()).as_bytes());
                chunk.extend_from_slice(bytes);
                chunk.extend_from_slice(b"\r\n");
                self.write(&chunk).await
            }
            Framing::Length(_) => {
                // More than was announced leaves a connection nobody can read another answer from.
                self.answered = self.owed_bytes == bytes.len();
                self.owed_bytes = self.owed_bytes.saturating_sub(bytes.len());
                self.write(bytes).await
            }
            Framing::UntilClose | Framing::None => {
                self.answered = false;
                self.write(bytes).await
            }
        }
    }

    async fn write(&mut self, mut bytes: &[u8]) -> Result<(), Ending> {
        while !bytes.is_empty() {
            let (written, blocked) = match self.stream.try_write(bytes) {
                Ok(written) => (written, false),
                Err(error) if error.kind() == ErrorKind::WouldBlock => (0, true),
                Err(_) => return Err(Ending::PeerLeft(How::Reset)),
            };
            bytes = &bytes[written..];
            self.note(written, blocked);
            if blocked {
                tokio::select! {
                    ready = self.stream.writable() => ready.map_err(|_| Ending::PeerLeft(How::Reset))?,
                    left = gone(&self.stream, &mut self.inbox) => return Err(Ending::PeerLeft(left)),
                }
            }
        }
        // A peer that has left is found out even where the script never waits.
        match take_arrived(&self.stream, &mut self.inbox) {
            Some(left) => Err(Ending::PeerLeft(left)),
            None => Ok(()),
        }
    }

    fn note(&self, written: usize, blocked: bool) {
        self.state.send_if_modified(|state| {
            let Some(progress) = state.progress.get_mut(self.number) else { return false };
            progress.0 += written as u64;
            std::mem::replace(&mut progress.1, blocked) != blocked
        });
    }

    fn written(&self) -> u64 {
        self.written_in(&self.state.borrow())
    }

    fn written_in(&self, state: &State) -> u64 {
        state.progress.get(self.number).map_or(0, |progress| progress.0)
    }

    /// Waits for more bytes: how many came, 0 at the end of the stream.
    async fn more(&mut self) -> Result<usize, Ending> {
        loop {
            self.stream.readable().await.map_err(|_| Ending::PeerLeft(How::Reset))?;
            match self.stream.try_read_buf(&mut self.inbox) {
                Ok(read) => return Ok(read),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(_) => return Err(Ending::PeerLeft(How::Reset)),
            }
        }
    }

    async fn finish(mut self, ending: Ending) {
        let at = Instant::now();
        self.note(0, false);
        let spoke = self.request.is_some() || !self.inbox.is_empty() || self.written() > 0;
        let departed = |state: &mut State, how| {
            let written = self.written_in(state);
            if state.departures.len() < MAX_KEPT {
                state.departures.push(Departure { connection: self.number, at, how, written });
            }
        };
        match ending {
            // A peer that neither said nor heard a word only knocked: a TCP health check.
            Ending::PeerLeft(_) if !spoke => {}
            // Between two requests a peer may leave as it likes; that is told all the same.
            Ending::PeerLeft(how) => self.state.send_modify(|state| departed(state, how)),
            Ending::Malformed(broken) => self.state.send_modify(|state| state.complaints.push(broken.to_string())),
            Ending::Reset => {
                let _ = self.stream.set_zero_linger();
            }
            Ending::Closed => {
                // Unread bytes would turn the FIN into a RST: read until the peer has closed too.
                use tokio::io::AsyncWriteExt;
                let _ = self.stream.shutdown().await;
                self.inbox.clear();
                let _ = tokio::time::timeout(LINGER, gone(&self.stream, &mut self.inbox)).await;
            }
        }
        let state = self.state.clone();
        drop(self.stream);
        state.send_modify(|state| state.open -= 1);
    }
}

/// Resolves when the peer has left. What it sends instead stays in `inbox`, within bounds.
async fn gone(stream: &TcpStream, inbox: &mut BytesMut) -> How {
    loop {
        if inbox.len() >= MAX_EARLY_BYTES {
            // Nothing more can be read without a bound: only a reset is still seen.
            let _ = stream.ready(tokio::io::Interest::ERROR).await;
            return How::Reset;
        }
        if stream.readable().await.is_err() {
            return How::Reset;
        }
        if let Some(left) = take_arrived(stream, inbox) {
            return left;
        }
    }
}

/// Takes what has arrived, without waiting; says so if that is the end.
fn take_arrived(stream: &TcpStream, inbox: &mut BytesMut) -> Option<How> {
    if inbox.len() >= MAX_EARLY_BYTES {
        return None;
    }
    match stream.try_read_buf(inbox) {
        Ok(0) => Some(How::Closed),
        Ok(_) => None,
        Err(error) if error.kind() == ErrorKind::WouldBlock => None,
        Err(_) => Some(How::Reset),
    }
}

fn head(status: u16, framing: Framing, headers: &[(String, String)]) -> Vec<u8> {
    let reason = http::StatusCode::from_u16(status).ok().and_then(|status| status.canonical_reason()).unwrap_or("Odd");
    let mut head = format!("HTTP/1.1 {status} {reason}\r\n");
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    match framing {
        Framing::Chunked => head.push_str("transfer-encoding: chunked\r\n"),
        Framing::Length(bytes) => head.push_str(&format!("content-length: {bytes}\r\n")),
        Framing::UntilClose | Framing::None => {}
    }
    head.push_str("\r\n");
    head.into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::answer::{Judge, Kind};
    use crate::client::{self, Http1, Request as Ask};
    use crate::dialect::{Answer, Cut, Lane};

    /// Asks over a fresh connection and reads the stream to its end.
    async fn read(upstream: &Upstream) -> Result<String, Broken> {
        let events = client::stream(upstream.addr(), &Ask::get("/"), Kind::Conversation).await?;
        events.rest().await.map(|transcript| transcript.text())
    }

    #[tokio::test]
    async fn a_stream_arrives_whole_however_it_is_cut() {
        let answer = Answer::conversation("demo", &["grü", "n 😀\n"]);
        for cut in [Cut::Whole, Cut::Events, Cut::Bytes(1), Cut::Inside, Cut::Random { seed: 3, most: 20 }] {
            let upstream = Upstream::always(Script::stream(answer.cut(cut.clone()))).await;
            assert_eq!(read(&upstream).await.unwrap(), answer.said(0, Lane::Content), "{cut:?}");
        }
    }

    #[tokio::test]
    async fn every_way_to_break_off_is_seen_as_what_it_is() {
        let answer = Answer::conversation("demo", &["one", "two"]);
        let begun = || Script::new().read().sse().send(answer.events()[0].clone());
        for (script, cut) in [
            (begun().close(), true),
            (begun().half_chunk("event: te").close(), true),
            (begun().end(), true),
            (begun().reset(), false),
            (Script::new().read().sse_framed(Framing::UntilClose).send(answer.events()[0].clone()), true),
            (Script::new().read().sse_framed(Framing::Length(9999)).send(answer.bytes()), true),
        ] {
            let broken = read(&Upstream::always(script).await).await.unwrap_err();
            assert_eq!((matches!(broken, Broken::Cut(_)), matches!(broken, Broken::Reset(_))), (cut, !cut), "{broken}");
        }
    }

    #[tokio::test]
    async fn a_script_waits_for_the_test_and_tells_it_where_it_stands() {
        let (go, here) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let answer = Answer::conversation("demo", &["one", "two"]);
        let events = answer.cut(Cut::Events);
        let script = Script::new().read().sse().send_all(events[..2].to_vec()).tell(&here).wait(&go).send_all(events[2..].to_vec()).end();
        let upstream = Upstream::always(script).await;
        let mut stream = client::stream(upstream.addr(), &Ask::get("/"), Kind::Conversation).await.unwrap();
        soon(here.notified(), "the script to have sent two events").await;
        assert_eq!((stream.expect().await.name, stream.expect().await.name), ("open".into(), "text".into()));
        go.notify_one();
        assert_eq!(stream.rest().await.unwrap().text(), "onetwo");
    }

    #[tokio::test]
    async fn the_moment_the_peer_leaves_is_told_whatever_the_script_is_doing() {
        let never = Arc::new(Notify::new());
        let sse = || Script::new().read().sse();
        for script in
            [Script::new().read().stall(), sse().stall(), sse().wait(&never), sse().pause(crate::PATIENCE * 2), sse().flood("data: x\n\n")]
        {
            let upstream = Upstream::always(script).await;
            let mut client = Http1::connect(upstream.addr()).await;
            client.send(&Ask::get("/")).await;
            upstream.request(0).await;
            let left = Instant::now();
            client.abort();
            let seen = upstream.closed(1).await;
            assert!(seen.how == How::Reset && seen.at - left < Duration::from_secs(5), "{seen:?}");
            upstream.idle().await;
        }
    }

    #[tokio::test]
    async fn a_peer_that_closes_with_a_fin_is_told_from_one_that_resets() {
        let upstream = Upstream::always(Script::new().read().stall()).await;
        let mut client = Http1::connect(upstream.addr()).await;
        client.send(&Ask::get("/")).await;
        upstream.request(0).await;
        drop(client);
        assert_eq!(upstream.closed(1).await.how, How::Closed);
    }

    #[tokio::test]
    async fn a_flood_stops_where_the_reader_does() {
        let upstream = Upstream::always_unbuffered(Script::new().read().sse().flood(vec![b'x'; 1000])).await;
        let mut client = Http1::connect_narrow(upstream.addr()).await;
        client.send(&Ask::get("/")).await;
        client.head().await.unwrap();
        let first = upstream.blocked().await;
        assert!(first > 1000 && first < 1 << 20, "{first} bytes are more than two small socket buffers hold");
        // Reading again makes room again.
        for _ in 0..200 {
            client.read_bytes(1 << 16).await.unwrap();
        }
        assert!(upstream.blocked().await > first);
    }

    #[tokio::test]
    async fn connections_take_scripts_in_order_and_those_that_only_knock_take_none() {
        let upstream = Upstream::each([Script::reply(200, "text/plain", "first"), Script::reply(200, "text/plain", "second")]).await;
        drop(TcpStream::connect(upstream.addr()).await.unwrap());
        upstream.accepted(1).await;
        for expected in ["first", "second"] {
            assert_eq!(client::ask(upstream.addr(), &Ask::get("/")).await.unwrap().text(), expected);
        }
        assert!(client::ask(upstream.addr(), &Ask::get("/")).await.is_err());
        assert_eq!((upstream.surplus(), upstream.opened()), (1, 4));
    }

    #[tokio::test]
    async fn requests_are_kept_as_they_came_and_each_is_answered_on_its_own() {
        let upstream = Upstream::answering(|request| Script::reply(200, "text/plain", request.target.clone())).await;
        let mut client = Http1::connect(upstream.addr()).await;
        for target in ["/a", "/b?c=d"] {
            client.send(&Ask::post(target, &serde_json::json!({"n": 1})).header("X-Odd", "1")).await;
            assert_eq!(client.reply().await.unwrap().text(), target);
        }
        let requests = upstream.requests();
        assert_eq!(upstream.opened(), 1, "the connection was kept");
        assert_eq!(
            (requests[1].target.as_str(), requests[1].header("x-odd"), requests[1].json()["n"].as_u64()),
            ("/b?c=d", Some("1"), Some(1))
        );
        assert!(requests[1].head.raw.windows(5).any(|bytes| bytes == b"X-Odd"), "names are kept as written");
    }

    #[tokio::test]
    async fn malformed_requests_are_complained_of() {
        let upstream = Upstream::always(Script::reply(200, "text/plain", "")).await;
        for bytes in ["GET / HTTP/1.1\r\nA : b\r\n\r\n", "GET / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n"] {
            let mut client = Http1::connect(upstream.addr()).await;
            client.send_bytes(bytes.as_bytes()).await;
            assert!(client.head().await.is_err());
        }
        assert_eq!(upstream.complaints().len(), 2);
    }

    #[tokio::test]
    #[should_panic(expected = "malformed HTTP")]
    async fn a_complaint_nobody_asked_for_fails_the_test() {
        let upstream = Upstream::always(Script::reply(200, "text/plain", "")).await;
        let mut client = Http1::connect(upstream.addr()).await;
        client.send_bytes(b"GET /\r\n\r\n").await;
        assert!(client.head().await.is_err());
    }

    #[tokio::test]
    async fn a_refusing_address_refuses() {
        let refusing = Refusing::start();
        let error = TcpStream::connect(refusing.addr()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
    }

    #[tokio::test]
    async fn an_answer_over_http2_is_read_by_the_same_rules() {
        // The scripted upstream speaks HTTP/1.1; hyper serves HTTP/2 here, and nothing of ours stands in between.
        use http_body_util::Full;
        use hyper_util::rt::{TokioExecutor, TokioIo};
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let service = hyper::service::service_fn(|_| async {
                let body = Answer::conversation("demo", &["over ", "two"]).bytes();
                http::Response::builder().header("content-type", "text/event-stream").body(Full::new(Bytes::from(body)))
            });
            let _ = hyper::server::conn::http2::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), service).await;
        });
        let mut client = client::Http2::connect(addr).await;
        let events = client.events(&Ask::get("/"), Judge::new(Kind::Conversation)).await.unwrap();
        assert_eq!(events.rest().await.unwrap().text(), "over two");
        assert_eq!(client.ask(&Ask::get("/")).await.unwrap().status, 200);
    }
}
