//! Accepts connections and hands them to hyper: deadlines before the first head, stalls, TLS, drain.

use std::{
    convert::Infallible,
    future::Future,
    io,
    mem::MaybeUninit,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use bytes::Bytes;
use hyper::{
    Request, Response,
    body::Incoming,
    server::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use socket2::SockRef;
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf},
    net::{TcpListener, TcpStream},
    select,
    sync::{OwnedSemaphorePermit, watch},
    time::{Instant, Sleep, sleep, sleep_until, timeout},
};

use crate::{
    body::Reply,
    chunked::{Answer, Handover, Terms},
    drive::Line,
    front,
    streams::Streams,
    tap::Tap,
    tls::Tls,
};

/// The bounds of a connection; the defaults are the documentation's table of limits.
#[derive(Debug, Clone)]
pub struct Limits {
    /// From the TCP handshake to the first byte, or to the end of the TLS handshake.
    pub handshake: Duration,
    /// For a whole request head.
    pub head: Duration,
    /// The longest time a peer may take nothing of what we write.
    pub stall: Duration,
    /// How long an HTTP/2 connection may carry no request.
    pub idle: Duration,
    /// The most bytes of a request head.
    pub head_bytes: usize,
    /// The most header fields.
    pub fields: usize,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            handshake: Duration::from_secs(5),
            head: Duration::from_secs(10),
            stall: Duration::from_secs(30),
            idle: Duration::from_secs(60),
            head_bytes: 64 << 10,
            fields: 100,
        }
    }
}

/// How long an HTTP/2 client without streams may take to confirm that its connection ends.
const CLOSE_PATIENCE: Duration = Duration::from_secs(5);

/// The most that is read of a request before hyper reads it: all of most requests, so that this costs no read of its own.
const SNIFFED_BYTES: usize = 4 << 10;

/// What answers requests.
pub trait Service: Clone + Send + Sync + 'static {
    /// One request, and who sent it over what.
    fn call(&self, request: Request<Incoming>, peer: Peer) -> impl Future<Output = Response<Reply>> + Send;
}

/// The other side of a connection.
#[derive(Clone)]
pub struct Peer {
    /// Its address.
    pub address: SocketAddr,
    /// Whether the connection is encrypted.
    pub tls: bool,
    /// How long it may take nothing of what is written.
    pub stall: Duration,
    /// How long it may take to say what it wants, or who it is.
    pub head: Duration,
    /// How long an HTTP/2 connection may carry nothing.
    pub idle: Duration,
    /// The connection, as the turn on it sees it.
    line: Arc<Line>,
}

impl Peer {
    fn new(address: SocketAddr, tls: bool, limits: &Limits, line: Arc<Line>) -> Peer {
        Peer { address, tls, stall: limits.stall, head: limits.head, idle: limits.idle, line }
    }

    /// The line for a turn over this version of HTTP: a connection of HTTP/2 carries many, each with its own.
    pub fn line(&self, version: http::Version) -> Arc<Line> {
        if version < http::Version::HTTP_2 { self.line.clone() } else { Arc::new(Line::shared()) }
    }

    /// What is wrong with a request that came over the connection, though hyper took it.
    pub fn wrong(&self) -> Option<&'static str> {
        self.line.wrong()
    }
}

/// How the accept loop is told to stop, and what it tells about itself.
#[derive(Clone)]
pub struct Drain {
    begun: watch::Sender<bool>,
    ended: watch::Sender<bool>,
    open: Arc<tokio::sync::Semaphore>,
    all: u32,
}

impl Drain {
    /// For so many connections at most.
    pub fn new(connections: usize) -> Drain {
        let all = connections.min(u32::MAX as usize) as u32;
        Drain {
            begun: watch::channel(false).0,
            ended: watch::channel(false).0,
            open: Arc::new(tokio::sync::Semaphore::new(all as usize)),
            all,
        }
    }

    /// No new connections, no new requests on old ones; streams go on to their end.
    pub fn begin(&self) {
        self.begun.send_replace(true);
    }

    /// Whether that has been said.
    pub fn has_begun(&self) -> bool {
        *self.begun.borrow()
    }

    /// Ready once [`Drain::begin`] was called.
    pub async fn wait(&self) {
        // The sender is in self, so this cannot fail.
        let _ = self.begun.subscribe().wait_for(|begun| *begun).await;
    }

    /// Nothing is waited for any more: workers end, and with them what is still open.
    pub fn end(&self) {
        self.ended.send_replace(true);
    }

    /// Ready once [`Drain::end`] was called.
    pub async fn ended(&self) {
        let _ = self.ended.subscribe().wait_for(|ended| *ended).await;
    }

    /// Ready once the last connection is closed, upgraded ones included.
    pub async fn closed(&self) {
        let _ = self.open.acquire_many(self.all).await;
    }

    /// A place for a connection that has left hyper's hands; `None` while there is no room.
    pub fn hold(&self) -> Option<OwnedSemaphorePermit> {
        self.open.clone().try_acquire_owned().ok()
    }

    /// Connections open now.
    pub fn connections(&self) -> usize {
        self.all as usize - self.open.available_permits()
    }
}

/// What the connections of a listener have in common.
struct Shared<V> {
    speakers: Speakers,
    limits: Limits,
    service: V,
    drain: Drain,
}

/// Accepts on `listener` until the drain begins. One of these runs per worker; all may share a listener.
pub async fn serve(listener: TcpListener, tls: Option<Tls>, limits: Limits, service: impl Service, drain: Drain) {
    let shared = Arc::new(Shared { speakers: Speakers::new(&limits), limits, service, drain });
    let Shared { limits, drain, .. } = &*shared;
    loop {
        let accepted = select! { biased;
            () = drain.wait() => return,
            accepted = listener.accept() => accepted,
        };
        let (socket, address) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of file descriptors: wait for one to be closed instead of spinning on the same error.
                tracing::warn!(%error, "cannot accept a connection");
                sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let Ok(permit) = drain.open.clone().try_acquire_owned() else {
            // Over the limit: closing at once is the cheapest answer there is.
            drop(socket);
            continue;
        };
        tune(&socket, limits.stall);
        let shared = shared.clone();
        match tls.clone() {
            None => drop(tokio::spawn(converse(Patient::of_requests(socket, limits.stall), address, false, permit, shared))),
            Some(tls) => drop(tokio::spawn(async move {
                // In a box, which goes when the handshake is over.
                if let Ok(Ok(socket)) = Box::pin(timeout(shared.limits.handshake, tls.accept(socket))).await {
                    let io = Patient::of_requests(socket, shared.limits.stall);
                    converse(io, address, true, permit, shared).await;
                }
            })),
        }
    }
}

/// The most that the system keeps of what is written and not yet on its way, in bytes. It would keep megabytes for a slow peer,
/// and what a turn ends with, a cut, a stop, goes behind all of it.
const UNSENT_BYTES: u32 = 32 << 10;

/// What is small goes at once, and what cannot go yet waits in its turn, where it can still be cut. A peer that has vanished
/// without a word is given up on when it has confirmed nothing of what was sent, heartbeats included, for twice as long as a
/// present one may take nothing. Not for as long: the system tells a slow peer nothing when it gives up, we do.
fn tune(socket: &TcpStream, stall: Duration) {
    let options = SockRef::from(socket);
    // A socket that cannot be tuned is closed by its peer already, which reading it will tell.
    let _ = socket.set_nodelay(true);
    let _ = options.set_tcp_user_timeout(Some(stall.saturating_mul(2)));
    let _ = options.set_tcp_notsent_lowat(UNSENT_BYTES);
}

/// What reads the requests of either version.
struct Speakers {
    http1: http1::Builder,
    http2: http2::Builder<TokioExecutor>,
}

impl Speakers {
    fn new(limits: &Limits) -> Speakers {
        let (mut http1, mut http2) = (http1::Builder::new(), http2::Builder::new(TokioExecutor::new()));
        http1
            .timer(TokioTimer::new())
            .header_read_timeout(limits.head)
            .max_buf_size(limits.head_bytes.max(8 << 10))
            .max_headers(limits.fields);
        http2
            .timer(TokioTimer::new())
            .enable_connect_protocol()
            .max_concurrent_streams(100)
            .initial_stream_window_size(64 << 10)
            .initial_connection_window_size(1 << 20)
            .max_header_list_size(limits.head_bytes.min(16 << 10) as u32)
            .max_send_buf_size(64 << 10)
            .keep_alive_interval(Duration::from_secs(20));
        Speakers { http1, http2 }
    }
}

/// One connection, to its end. Requests are read by hyper; answers that stream are written by [`crate::chunked`].
///
/// What does not last as long as an answer does is boxed, since a future is as large as the largest it waits for.
#[expect(clippy::manual_async_fn, reason = "an async fn keeps its arguments twice, for as long as the connection lasts")]
fn converse<S, V>(
    mut io: Patient<S>,
    address: SocketAddr,
    tls: bool,
    permit: OwnedSemaphorePermit,
    shared: Arc<Shared<V>>,
) -> impl Future<Output = ()> + Send
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    V: Service,
{
    async move {
        let _permit = &permit;
        let mut first = Some(Instant::now() + shared.limits.handshake + shared.limits.head);
        match Box::pin(greet(&mut io, first, &shared.drain)).await {
            None => return,
            Some(Http::One) => {}
            Some(Http::Two) => return Box::pin(converse_http2(io, address, tls, first, &shared)).await,
        }
        loop {
            let answer;
            Asked { io, answer } = match Box::pin(hear(io, address, tls, first.take(), &shared)).await {
                Some(asked) => asked,
                None => return,
            };
            match answer.write(&mut io, !shared.drain.has_begun()).await {
                // hyper and its buffers come when there is a request to read.
                Ok(true) if Box::pin(is_asked_again(&mut io, &shared)).await => {}
                Ok(_) => {
                    let _ = io.shutdown().await;
                    return;
                }
                Err(_) => return,
            }
        }
    }
}

/// Which version of HTTP a connection speaks.
enum Http {
    One,
    Two,
}

/// Waits for the beginning of the first request; `None` where there is none in time.
async fn greet<S: AsyncRead + AsyncWrite + Unpin>(io: &mut Patient<S>, first: Option<Instant>, drain: &Drain) -> Option<Http> {
    let line = io.line.clone();
    select! { biased;
        sniffed = io.sniff() => sniffed.ok().map(|is_http2| if is_http2 { Http::Two } else { Http::One }),
        () = until(first) => {
            line.be_late();
            None
        }
        () = drain.wait() => None,
    }
}

async fn until(first: Option<Instant>) {
    match first {
        Some(first) => sleep_until(first).await,
        None => std::future::pending().await,
    }
}

/// Waits for the beginning of a next request.
async fn is_asked_again<S: AsyncRead + AsyncWrite + Unpin, V>(io: &mut Patient<S>, shared: &Shared<V>) -> bool {
    io.tap.get_or_insert_default();
    select! { biased;
        sniffed = io.sniff() => sniffed.is_ok() && !io.ahead.is_empty(),
        () = sleep(shared.limits.head) => false,
        () = shared.drain.wait() => false,
    }
}

/// A request that is to be answered by hand, and where.
struct Asked<S: AsyncWrite + Unpin> {
    io: Patient<S>,
    answer: Answer,
}

/// Lets hyper read requests, and answer them, until one is to be answered by hand; `None` at the connection's end.
///
/// `first`: when the first request must have come, where none has.
async fn hear<S, V>(io: Patient<S>, address: SocketAddr, tls: bool, first: Option<Instant>, shared: &Shared<V>) -> Option<Asked<S>>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    V: Service,
{
    let Shared { speakers, limits, service, drain } = shared;
    let (line, handover) = (io.line.clone(), io.handover.clone());
    let heard = Arc::new(AtomicBool::new(first.is_none()));
    let (service, peer, hears, hands) = (service.clone(), Peer::new(address, tls, limits, line.clone()), heard.clone(), handover.clone());
    let serving = service_fn(move |request: Request<Incoming>| {
        hears.store(true, Ordering::Relaxed);
        let (service, peer, hands, terms) = (service.clone(), peer.clone(), hands.clone(), Terms::of(&request));
        // In a box: hyper keeps room for what answers a request as long as it has the connection.
        let call = Box::pin(async move { service.call(request, peer).await });
        async move { Ok::<_, Infallible>(hands.answer(terms, call).await) }
    });
    let mut connection = speakers.http1.serve_connection(TokioIo::new(io), serving).with_upgrades();
    let mut is_draining = false;
    loop {
        select! { biased;
            ended = std::future::poll_fn(|cx| handover.poll(cx, &line, &mut connection)) => match ended {
                None => break,
                Some(Ok(())) => return None,
                Some(Err(error)) => {
                    if error.is_timeout() {
                        line.be_late();
                    }
                    return None;
                }
            },
            () = until(first), if !heard.load(Ordering::Relaxed) => if !heard.load(Ordering::Relaxed) {
                line.be_late();
                return None;
            },
            () = drain.wait(), if !is_draining => {
                is_draining = true;
                Pin::new(&mut connection).graceful_shutdown();
            }
        }
    }
    let (parts, answer) = (connection.into_parts()?, handover.take()?);
    let mut io = parts.io.into_inner();
    // Between two requests there is nothing that it would have to remember.
    io.tap.take_if(|tap| tap.is_between());
    // Copied: else a byte, or none, would keep hyper's buffer.
    io.ahead = Bytes::copy_from_slice(&parts.read_buf);
    Some(Asked { io, answer })
}

async fn converse_http2<S, V>(io: Patient<S>, address: SocketAddr, tls: bool, first: Option<Instant>, shared: &Shared<V>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    V: Service,
{
    let Shared { speakers, limits, service, drain } = shared;
    let peer = Peer::new(address, tls, limits, io.line.clone());
    let streams = Streams::default();
    let (service, idle, begins) = (service.clone(), peer.idle, streams.clone());
    let serving = service_fn(move |request| {
        let (service, peer, stream) = (service.clone(), peer.clone(), begins.begin());
        let is_refused = begins.are_refused();
        async move {
            let response = if is_refused { front::too_many() } else { service.call(request, peer).await };
            Ok::<_, Infallible>(response.map(|reply| stream.carry(reply)))
        }
    });
    let mut connection = std::pin::pin!(speakers.http2.serve_connection(TokioIo::new(io), serving));
    select! { biased;
        _ = connection.as_mut() => return,
        () = until(first) => if !streams.have_begun() { return },
        () = streams.enough(idle) => {}
        () = drain.wait() => {}
    }
    select! { biased;
        _ = connection.as_mut() => return,
        () = streams.enough(idle) => {}
        () = drain.wait() => {}
    }
    connection.as_mut().graceful_shutdown();
    select! { biased;
        _ = connection => {}
        // Who has no streams and does not even confirm the end has nothing to lose.
        () = streams.quiet(CLOSE_PATIENCE) => {}
        () = streams.far_too_much() => {}
    }
}

/// A socket that does not wait for ever for its peer to take what is written, and sees it leave.
///
/// hyper polls a response body only while the socket takes bytes, so a turn whose client reads nothing cannot watch its own
/// clock; and it does not look for the client's leaving while it holds bytes of a next request. It drops a connection whose
/// head is late without a word, and takes requests that others might read differently ([`Tap`]).
pub(crate) struct Patient<S: AsyncWrite + Unpin> {
    socket: S,
    stall: Duration,
    alarm: Option<Pin<Box<Sleep>>>,
    line: Arc<Line>,
    /// There while requests are read.
    tap: Option<Box<Tap>>,
    /// Bytes that were read and given back.
    ahead: Bytes,
    handover: Arc<Handover>,
}

impl<S: AsyncWrite + Unpin> Patient<S> {
    pub(crate) fn new(socket: S, stall: Duration) -> Patient<S> {
        Patient { socket, stall, alarm: None, line: Arc::default(), tap: None, ahead: Bytes::new(), handover: Arc::default() }
    }

    /// One that requests come over.
    fn of_requests(socket: S, stall: Duration) -> Patient<S> {
        let mut patient = Patient::new(socket, stall);
        patient.tap = Some(Box::default());
        patient
    }

    fn watch<T>(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.alarm = None;
            return written;
        }
        let alarm = self.alarm.get_or_insert_with(|| {
            self.line.let_go();
            Box::pin(tokio::time::sleep_until(Instant::now() + self.stall))
        });
        ready!(alarm.as_mut().poll(cx));
        self.line.stall();
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the peer takes nothing")))
    }
}

fn left() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionAborted, "the peer left its answer")
}

impl<S: AsyncWrite + Unpin> Drop for Patient<S> {
    fn drop(&mut self) {
        if self.line.is_late() && self.tap.as_ref().is_some_and(|tap| tap.is_within_head()) {
            let mut cx = Context::from_waker(Waker::noop());
            // Nothing was ever written for this request, so there is room; where there is none, silence has to do.
            if Pin::new(&mut self.socket).poll_write(&mut cx, &front::late_head()).is_ready() {
                let _ = Pin::new(&mut self.socket).poll_flush(&mut cx);
            }
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Patient<S> {
    /// Waits until a request begins, and says whether it does so in HTTP/2. What was read to see that is read again: until then
    /// a connection has no buffer.
    async fn sniff(&mut self) -> io::Result<bool> {
        const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
        while self.ahead.len() < PREFACE.len() && PREFACE.starts_with(&self.ahead) {
            let begun = std::mem::take(&mut self.ahead);
            let more = std::future::poll_fn(|cx| {
                let mut space = [const { MaybeUninit::uninit() }; SNIFFED_BYTES];
                let mut buffer = ReadBuf::uninit(&mut space);
                ready!(Pin::new(&mut *self).poll_read(cx, &mut buffer))?;
                Poll::Ready(io::Result::Ok([&begun, buffer.filled()].concat()))
            })
            .await?;
            let is_over = more.len() == begun.len();
            self.ahead = more.into();
            if is_over {
                break;
            }
        }
        Ok(self.ahead.starts_with(PREFACE))
    }

    /// As `poll_flush`, for who has looked for the peer's leaving already.
    pub(crate) fn poll_push(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.socket).poll_flush(cx);
        if flushed.is_ready() {
            self.handover.flushed();
        }
        self.watch(cx, flushed)
    }

    /// While an answer is under way, whatever comes is the peer's leaving.
    pub(crate) fn listen_if_busy(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        if self.line.is_busy() { self.listen(cx) } else { Ok(()) }
    }

    fn listen(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        let mut byte = [0];
        match Pin::new(&mut self.socket).poll_read(cx, &mut ReadBuf::new(&mut byte)) {
            Poll::Pending => Ok(()),
            Poll::Ready(read) => read.and(Err(left())),
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Patient<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let start = buf.filled().len();
        if !self.ahead.is_empty() {
            let len = self.ahead.len().min(buf.remaining());
            buf.put_slice(&self.ahead.split_to(len));
            // What was given back is but the beginning: with the rest of it hyper's buffer need not grow.
            if buf.remaining() == 0 || self.line.is_busy() {
                return Poll::Ready(Ok(()));
            }
        }
        let before = buf.filled().len();
        match Pin::new(&mut self.socket).poll_read(cx, buf) {
            Poll::Pending if before == start => return Poll::Pending,
            Poll::Pending => {}
            Poll::Ready(read) => read?,
        }
        if self.line.is_busy() && buf.filled().len() > before {
            return Poll::Ready(Err(left()));
        }
        let Patient { tap, line, .. } = &mut *self;
        if let Some(Err(wrong)) = tap.as_mut().map(|tap| tap.see(buf.filled().get(before..).unwrap_or_default())) {
            line.be_wrong(wrong);
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Patient<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.socket).poll_write(cx, buf);
        self.watch(cx, written)
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.socket).poll_write_vectored(cx, bufs);
        self.watch(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.listen_if_busy(cx)?;
        self.poll_push(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let shut = Pin::new(&mut self.socket).poll_shutdown(cx);
        self.watch(cx, shut)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    fn bytes<A, B, C, D, E, T>(_: impl Fn(A, B, C, D, E) -> T) -> usize {
        size_of::<T>()
    }

    #[test]
    fn a_connection_that_waits_takes_little_room() {
        let bytes = bytes(converse::<TcpStream, crate::live::App>);
        assert!(bytes <= 450, "{bytes}");
    }

    #[tokio::test]
    async fn a_peer_that_vanishes_is_given_up_on_after_twice_the_stall_time() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let _client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (socket, _) = listener.accept().await.unwrap();
        tune(&socket, Duration::from_secs(30));
        let options = SockRef::from(&socket);
        assert_eq!(options.tcp_user_timeout().unwrap(), Some(Duration::from_secs(60)));
        assert!(socket.nodelay().unwrap());
        assert_eq!(options.tcp_notsent_lowat().unwrap(), UNSENT_BYTES);
    }

    #[tokio::test(start_paused = true)]
    async fn a_write_that_waits_for_the_whole_stall_time_fails_and_one_that_moves_in_time_does_not() {
        let (ours, mut theirs) = tokio::io::duplex(8);
        let mut patient = Patient::new(ours, Duration::from_secs(30));
        let begun = Instant::now();
        let reading = async {
            for _ in 0..4 {
                sleep(Duration::from_secs(29)).await;
                theirs.read_exact(&mut [0; 8]).await.unwrap();
            }
            theirs
        };
        let (written, _theirs) = tokio::join!(patient.write_all(&[0; 40]), reading);
        written.unwrap();
        assert!(begun.elapsed() > Duration::from_secs(60));
        let begun = Instant::now();
        let error = patient.write_all(&[0; 8]).await.unwrap_err();
        assert_eq!((error.kind(), begun.elapsed()), (io::ErrorKind::TimedOut, Duration::from_secs(30)));
    }

    #[tokio::test]
    async fn while_an_answer_is_under_way_a_byte_and_an_end_are_both_leaving() {
        for bytes in [&b"P"[..], b""] {
            let (ours, mut theirs) = tokio::io::duplex(8);
            let mut patient = Patient::new(ours, Duration::from_secs(30));
            let call = crate::drive::Call::new(patient.line.clone(), crate::drive::Drive::elsewhere());
            patient.flush().await.unwrap();
            theirs.write_all(bytes).await.unwrap();
            if bytes.is_empty() {
                drop(theirs);
            }
            assert_eq!(patient.flush().await.unwrap_err().kind(), io::ErrorKind::ConnectionAborted);
            drop(call);
            patient.flush().await.unwrap();
        }
    }
}
