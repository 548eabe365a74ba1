//! A plain reverse proxy: any request to any endpoint, bodies, trailers and upgrades included.
//!
//! hyper speaks HTTP here. Its connection is driven by whoever polls the response, on the caller's own task: not reading the
//! response is backpressure, and dropping it closes the connection.

use std::{
    error::Error,
    fmt,
    future::{Future, poll_fn},
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll, Waker},
    time::Duration,
};

use bytes::Bytes;
use headgate_contracts::{Code, Fault};
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri, Version,
    header::{CONNECTION, CONTENT_LENGTH, EXPECT, HOST, PROXY_AUTHENTICATE, PROXY_AUTHORIZATION, TE, TRANSFER_ENCODING, UPGRADE},
};
use http_body::{Body, Frame, SizeHint};
use hyper::{
    body::Incoming,
    client::conn::http1::{Builder, Connection, SendRequest},
    upgrade::Upgraded,
};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite, copy_bidirectional},
    time::{Instant, Sleep, sleep_until, timeout},
};

use crate::{
    Shared,
    balance::Lease,
    connect::Io,
    http1::Framing,
    open::{Failed, connect},
    settings::Limits,
};

type BoxError = Box<dyn Error + Send + Sync>;

/// What a forwarded request is answered with.
pub struct Forwarded {
    /// The response; its hop-by-hop headers are gone, but for those of a protocol switch.
    pub response: Response<ForwardedBody>,
    /// With status 101: the other end of the switched connection.
    pub tunnel: Option<Tunnel>,
}

pub(crate) async fn forward<B: Outgoing>(shared: &Arc<Shared>, request: Request<B>) -> Result<Forwarded, Fault> {
    shared.stats.forwarded.one();
    if request.method() == Method::CONNECT {
        // It asks for a tunnel to anywhere, which a reverse proxy is not for.
        return Err(Fault::client(Code::MethodNotAllowed));
    }
    let (mut parts, body) = request.into_parts();
    let upgrade = parts.headers.get(UPGRADE).filter(|_| names_option(&parts.headers, "upgrade")).cloned();
    let trailers = parts.headers.get_all(TE).iter().any(|te| te.to_str().is_ok_and(|te| te.to_ascii_lowercase().contains("trailers")));
    strip_hop_by_hop(&mut parts.headers);
    strip_policy(&mut parts.headers);
    parts.headers.remove(CONTENT_LENGTH);
    parts.headers.remove(EXPECT);
    match (&upgrade, trailers) {
        (Some(protocol), _) => {
            parts.headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
            parts.headers.insert(UPGRADE, protocol.clone());
        }
        (None, true) => {
            parts.headers.insert(CONNECTION, HeaderValue::from_static("te"));
            parts.headers.insert(TE, HeaderValue::from_static("trailers"));
        }
        (None, false) => {}
    }
    let key = parts.uri.path().to_owned();
    let path = parts.uri.path_and_query().map_or("/", |path| path.as_str()).to_owned();
    let born = Instant::now();
    let progress = Arc::new(AtomicU64::new(0));
    let mut request = Request::new(Outbound { body, progress: Arc::clone(&progress), born });
    *request.method_mut() = parts.method;
    *request.headers_mut() = parts.headers;
    *request.version_mut() = Version::HTTP_11;

    // Until something is sent every endpoint may be tried; then none.
    let mut tried = Vec::new();
    let mut fresh = false;
    let mut failed = None;
    loop {
        let Some(lease) = shared.fleet.pick(key.as_bytes(), &tried) else {
            return Err(failed.unwrap_or_else(|| Fault::upstream(Code::UpstreamConnectFailed)));
        };
        let endpoint = Arc::clone(lease.endpoint());
        let placed = |fault| shared.placed(&endpoint, fault);
        let kept = if fresh { None } else { endpoint.reuse() };
        let reused = kept.is_some();
        let io = match kept {
            Some(io) => {
                shared.stats.reused.one();
                io
            }
            None => match connect(shared, &endpoint).await {
                Ok(io) => io,
                Err(Failed { fault, .. }) => {
                    failed = Some(placed(fault));
                    tried.push(endpoint);
                    if tried.len() > shared.settings.retry.attempts as usize {
                        return Err(failed.unwrap_or_else(|| Fault::upstream(Code::UpstreamConnectFailed)));
                    }
                    continue;
                }
            },
        };
        *request.uri_mut() = match format!("{}{path}", endpoint.prefix).parse::<Uri>() {
            Ok(uri) => uri,
            Err(error) => return Err(Fault::client(Code::InvalidRequest).caused_by(error)),
        };
        request.headers_mut().insert(HOST, endpoint.host.clone());
        let settings = &shared.settings;
        let mut driving = Driving::begin(io, &settings.limits, upgrade.is_some()).await.map_err(|error| placed(broken(error)))?;
        match driving.head(request, settings.timeouts.first_byte).await {
            Ok(response) => return answer(shared, lease, driving, response, upgrade.is_some()).await,
            Err(Unanswered::Late) => return Err(placed(Fault::upstream(Code::UpstreamTimeoutFirstByte))),
            Err(Unanswered::Broken(_, Some(unsent))) if reused => {
                shared.stats.stale.one();
                fresh = true;
                request = *unsent;
            }
            Err(Unanswered::Broken(error, _)) => return Err(placed(broken(error))),
        }
    }
}

/// Turns a response head into what the caller gets.
async fn answer<B: Outgoing>(
    shared: &Arc<Shared>,
    lease: Lease,
    mut driving: Driving<B>,
    mut response: Response<Incoming>,
    asked: bool,
) -> Result<Forwarded, Fault> {
    let idle = shared.settings.timeouts.idle;
    if response.status() != StatusCode::SWITCHING_PROTOCOLS {
        strip_hop_by_hop(response.headers_mut());
        let open = Open { driving: Box::new(driving), lease, timer: Box::pin(sleep_until(Instant::now() + idle)), last: Instant::now() };
        let shared = Arc::clone(shared);
        let response = response.map(|incoming| ForwardedBody { incoming: Some(incoming), open: Some(open), shared });
        return Ok(Forwarded { response, tunnel: None });
    }
    let placed = |fault| shared.placed(lease.endpoint(), fault);
    if !asked {
        return Err(placed(Fault::upstream(Code::UpstreamProtocolError).caused_by("the protocol was switched without being asked")));
    }
    let protocol = response.headers().get(UPGRADE).cloned();
    strip_hop_by_hop(response.headers_mut());
    response.headers_mut().insert(CONNECTION, HeaderValue::from_static("upgrade"));
    if let Some(protocol) = protocol {
        response.headers_mut().insert(UPGRADE, protocol);
    }
    // The connection hands itself over once it is driven to its end.
    let mut on = hyper::upgrade::on(&mut response);
    let handed = poll_fn(|cx| {
        let _ = driving.poll(cx);
        Pin::new(&mut on).poll(cx)
    });
    let upstream = match timeout(idle, handed).await {
        Ok(Ok(upstream)) => TokioIo::new(upstream),
        Ok(Err(error)) => return Err(placed(broken(error))),
        Err(_) => return Err(placed(Fault::upstream(Code::UpstreamStalled))),
    };
    let shared = Arc::clone(shared);
    let response = response.map(|_| ForwardedBody { incoming: None, open: None, shared });
    Ok(Forwarded { response, tunnel: Some(Tunnel { upstream, _lease: lease }) })
}

/// The other end of a connection whose protocol was switched. Dropping it closes that connection.
pub struct Tunnel {
    upstream: TokioIo<Upgraded>,
    _lease: Lease,
}

impl Tunnel {
    /// Copies bytes both ways until both sides have ended; gives how many came from the client and from the upstream. The
    /// caller decides how long that may last.
    pub async fn run(mut self, mut client: impl AsyncRead + AsyncWrite + Unpin) -> io::Result<(u64, u64)> {
        copy_bidirectional(&mut client, &mut self.upstream).await
    }
}

/// The body of a forwarded response. Polling it drives the connection; dropping it before its end closes the connection.
pub struct ForwardedBody {
    incoming: Option<Incoming>,
    open: Option<Open>,
    shared: Arc<Shared>,
}

/// What a response body needs while it is not over.
struct Open {
    driving: Box<dyn Drive>,
    lease: Lease,
    timer: Pin<Box<Sleep>>,
    last: Instant,
}

impl Body for ForwardedBody {
    type Data = Bytes;
    type Error = Fault;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Fault>>> {
        let ForwardedBody { incoming, open, shared } = &mut *self;
        let (Some(body), Some(state)) = (incoming.as_mut(), open.as_mut()) else { return Poll::Ready(None) };
        let mut polled = Pin::new(&mut *body).poll_frame(cx);
        if polled.is_pending() {
            let _ = state.driving.poll(cx);
            polled = Pin::new(&mut *body).poll_frame(cx);
        }
        match polled {
            Poll::Ready(Some(Ok(mut frame))) => {
                state.last = Instant::now();
                if let Some(data) = frame.data_ref() {
                    shared.stats.bytes.add(data.len() as u64);
                }
                if let Some(trailers) = frame.trailers_mut() {
                    strip_hop_by_hop(trailers);
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(Some(Err(error))) => {
                let fault = shared.placed(state.lease.endpoint(), broken(error));
                *open = None;
                Poll::Ready(Some(Err(fault)))
            }
            Poll::Ready(None) => {
                if let Some(open) = open.take() {
                    open.settle(cx);
                }
                Poll::Ready(None)
            }
            Poll::Pending => {
                let idle = shared.settings.timeouts.idle;
                while state.timer.as_mut().poll(cx).is_ready() {
                    let due = state.last + idle;
                    if Instant::now() >= due {
                        let fault = shared.placed(state.lease.endpoint(), Fault::upstream(Code::UpstreamStalled));
                        *open = None;
                        return Poll::Ready(Some(Err(fault)));
                    }
                    state.timer.as_mut().reset(due);
                }
                Poll::Pending
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.incoming.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.incoming.as_ref().map_or_else(|| SizeHint::with_exact(0), Body::size_hint)
    }
}

impl Drop for ForwardedBody {
    // A server does not poll a body of known length for its end: it is seen here.
    fn drop(&mut self) {
        if self.is_end_stream()
            && let Some(open) = self.open.take()
        {
            open.settle(&mut Context::from_waker(Waker::noop()));
        }
    }
}

impl Open {
    /// The response is over: the connection may serve the next request, if the request is over too.
    fn settle(mut self, cx: &mut Context<'_>) {
        let _ = self.driving.poll(cx);
        if let Some(io) = self.driving.into_idle() {
            self.lease.endpoint().keep(io, Framing::Ended);
        }
    }
}

/// A request body as hyper wants it, without what is not its client's to say.
pub(crate) struct Outbound<B> {
    body: B,
    /// Milliseconds from `born` to when a piece of it was last taken.
    progress: Arc<AtomicU64>,
    born: Instant,
}

/// A body that can be forwarded.
pub trait Outgoing: Body<Data = Bytes, Error: Into<BoxError>> + Send + Unpin + 'static {}
impl<B: Body<Data = Bytes, Error: Into<BoxError>> + Send + Unpin + 'static> Outgoing for B {}

impl<B: Outgoing> Body for Outbound<B> {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        if polled.is_ready() {
            self.progress.store(self.born.elapsed().as_millis() as u64, Relaxed);
        }
        polled
            .map_ok(|mut frame| {
                if let Some(trailers) = frame.trailers_mut() {
                    strip_hop_by_hop(trailers);
                    strip_policy(trailers);
                }
                frame
            })
            .map_err(Into::into)
    }
    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }
    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A connection of hyper's that is driven by hand.
struct Driving<B: Outgoing> {
    driver: Driver<B>,
    send: SendRequest<Outbound<B>>,
    done: bool,
}

enum Driver<B: Outgoing> {
    Plain(Box<Connection<TokioIo<Io>, Outbound<B>>>),
    /// hyper does not let this type be named.
    Upgradeable(Pin<Box<dyn Future<Output = hyper::Result<()>> + Send>>),
}

/// A [`Driving`] of any request body.
trait Drive: Send {
    /// Ready when the connection has ended.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()>;
    /// The bare connection, if it could carry another request.
    fn into_idle(self: Box<Self>) -> Option<Io>;
}

impl<B: Outgoing> Drive for Driving<B> {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if !self.done {
            // What went wrong is told by the response.
            self.done = match &mut self.driver {
                Driver::Plain(connection) => Pin::new(&mut **connection).poll(cx).is_ready(),
                Driver::Upgradeable(connection) => connection.as_mut().poll(cx).is_ready(),
            };
        }
        if self.done { Poll::Ready(()) } else { Poll::Pending }
    }

    fn into_idle(self: Box<Self>) -> Option<Io> {
        match self.driver {
            Driver::Plain(connection) if !self.done && self.send.is_ready() => {
                let parts = connection.into_parts();
                parts.read_buf.is_empty().then(|| parts.io.into_inner())
            }
            Driver::Plain(_) | Driver::Upgradeable(_) => None,
        }
    }
}

impl<B: Outgoing> Driving<B> {
    async fn begin(io: Io, limits: &Limits, upgradeable: bool) -> Result<Driving<B>, hyper::Error> {
        // The buffer bounds the head too.
        let mut builder = Builder::new();
        builder.max_buf_size(limits.head.max(8 << 10)).max_headers(limits.fields);
        let (send, connection) = builder.handshake(TokioIo::new(io)).await?;
        let driver =
            if upgradeable { Driver::Upgradeable(Box::pin(connection.with_upgrades())) } else { Driver::Plain(Box::new(connection)) };
        Ok(Driving { driver, send, done: false })
    }

    /// Sends and waits for the head, as long as the request makes progress and `patience` longer.
    async fn head(
        &mut self,
        request: Request<Outbound<B>>,
        patience: Duration,
    ) -> Result<Response<Incoming>, Unanswered<Request<Outbound<B>>>> {
        let (progress, born) = (Arc::clone(&request.body().progress), request.body().born);
        let mut timer = Box::pin(sleep_until(Instant::now() + patience));
        let mut answered = Box::pin(self.send.try_send_request(request));
        poll_fn(|cx| {
            let mut polled = answered.as_mut().poll(cx);
            if polled.is_pending() {
                let _ = self.poll(cx);
                polled = answered.as_mut().poll(cx);
            }
            if let Poll::Ready(answered) = polled {
                return Poll::Ready(answered.map_err(|mut error| {
                    let unsent = error.take_message();
                    Unanswered::Broken(error.into_error(), unsent.map(Box::new))
                }));
            }
            while timer.as_mut().poll(cx).is_ready() {
                let due = born + Duration::from_millis(progress.load(Relaxed)) + patience;
                if Instant::now() >= due {
                    return Poll::Ready(Err(Unanswered::Late));
                }
                timer.as_mut().reset(due);
            }
            Poll::Pending
        })
        .await
    }
}

/// Why no response head came.
enum Unanswered<R> {
    Late,
    /// With the request, if not a byte of it was sent.
    Broken(hyper::Error, Option<Box<R>>),
}

fn broken(error: hyper::Error) -> Fault {
    // hyper tells a chunk that lies from a connection that broke by the kind of the I/O error alone.
    let kind = error.source().and_then(|source| source.downcast_ref::<io::Error>()).map(io::Error::kind);
    if error.is_parse() || error.is_parse_too_large() || matches!(kind, Some(io::ErrorKind::InvalidInput | io::ErrorKind::InvalidData)) {
        Fault::upstream(Code::UpstreamProtocolError).caused_by(error)
    } else if error.is_user() {
        // The one thing of the user's here is the request body, which is the client's.
        Fault::client(Code::ClientClosed).caused_by(error)
    } else {
        Fault::upstream(Code::UpstreamReset).caused_by(error)
    }
}

/// Whether `Connection` lists that option.
fn names_option(headers: &HeaderMap, option: &str) -> bool {
    let values = headers.get_all(CONNECTION).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|text| text.split(',')).any(|one| one.trim().eq_ignore_ascii_case(option))
}

/// RFC 9110 section 7.6.1: what concerns one connection stays on it, and what `Connection` nominates too.
fn strip_hop_by_hop(headers: &mut HeaderMap) {
    let nominated: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|text| text.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in nominated {
        headers.remove(name);
    }
    for name in [CONNECTION, TE, TRANSFER_ENCODING, UPGRADE, PROXY_AUTHENTICATE, PROXY_AUTHORIZATION, KEEP_ALIVE, PROXY_CONNECTION] {
        headers.remove(name);
    }
}

const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");

/// Nobody but our own filters says what policy is in force: `policy-*`, `constitution-*` and their spellings are deleted.
fn strip_policy(headers: &mut HeaderMap) {
    let spelt = |name: &HeaderName| {
        // Many servers read `_` and `-` as the same.
        let name = name.as_str().replace('_', "-");
        let name = name.strip_prefix("x-").unwrap_or(&name);
        name.starts_with("policy-") || name.starts_with("constitution-")
    };
    let forged: Vec<HeaderName> = headers.keys().filter(|name| spelt(name)).cloned().collect();
    for name in forged {
        headers.remove(name);
    }
}

impl fmt::Debug for Forwarded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Forwarded").field("status", &self.response.status()).finish_non_exhaustive()
    }
}
