//! Serves a model over HTTP/1.1 to OpenAI's clients: streaming and not, bounded, and stopped by whoever leaves.
//!
//! An answer is pulled: the next token is made when the connection has room for it. So a client that reads slowly
//! slows its own turn and no other, one that leaves drops the turn at the token being made, and there is no queue of
//! tokens to bound. Each token takes a core in turn, first come first served, so many turns share the cores evenly.

use std::convert::Infallible;
use std::future::Future;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures_util::stream;
use http::{HeaderMap, HeaderValue, Method, Response, StatusCode, header};
use http_body::Frame;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited, StreamBody};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};

use crate::openai::{Refused, Request, Writer};
use crate::patience::Patience;
use crate::requests::{End, Requests, Trail};
use crate::{Finish, Generation, Limits, Sampling, Slm, Step};

/// A pause after a failed accept: it fails again at once while the process is out of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// What a refused client is told to wait.
const RETRY_AFTER: HeaderValue = HeaderValue::from_static("1");

/// How a server runs. Every bound has a default fit for one machine and the embedded model.
#[derive(Debug, Clone)]
pub struct Options {
    /// Turns answered at once.
    pub turns: usize,
    /// Turns that may wait for one of those to end; more are refused with 503 and `Retry-After`.
    pub queue: usize,
    /// How long a turn may wait there before it is refused the same way.
    pub queue_wait: Duration,
    /// Threads that may compute at once.
    pub cores: usize,
    /// Tokens per second of each turn at most, to make streaming visible; None is as fast as it goes.
    pub pace: Option<f32>,
    /// Used when a request names no temperature. 0, the default, gives the same answer each time.
    pub temperature: f32,
    /// Connections open at once; more wait to be accepted.
    pub connections: usize,
    /// The longest request body.
    pub body_bytes: usize,
    /// How long a request may take to arrive, and a connection may idle.
    pub read_wait: Duration,
    /// How long a client may read nothing of what is ready for it.
    pub stall: Duration,
    /// After shutdown was asked for: how long turns under way may go on.
    pub drain: Duration,
    /// Keeps the last requests, without their text, for `GET /debug/requests`. For tests, not for production.
    pub debug_requests: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            turns: 16,
            queue: 64,
            queue_wait: Duration::from_secs(10),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            pace: None,
            temperature: 0.0,
            connections: 512,
            body_bytes: 256 * 1024,
            read_wait: Duration::from_secs(60),
            stall: Duration::from_secs(30),
            drain: Duration::from_secs(10),
            debug_requests: false,
        }
    }
}

/// Serves until `shutdown` is ready, then lets turns under way end for at most [`Options::drain`].
///
/// `POST /v1/chat/completions`, `GET /v1/models`, `GET /health`, and `GET /debug/requests` when asked for.
pub async fn serve(listener: TcpListener, slm: Arc<Slm>, options: Options, shutdown: impl Future<Output = ()>) {
    let places = Arc::new(Semaphore::new(options.connections.max(1)));
    let drain = options.drain;
    let server = Arc::new(Server::new(slm, options));
    let (closing, closed) = watch::channel(false);
    let mut connections = JoinSet::new();
    tokio::pin!(shutdown);
    loop {
        // The place is taken first: what is not accepted waits in the kernel's own bounded queue.
        let accepted = async {
            let place = Arc::clone(&places).acquire_owned().await;
            (place, listener.accept().await)
        };
        tokio::select! {
            () = &mut shutdown => break,
            // Taken as they end, so that the set does not grow.
            Some(_) = connections.join_next() => {}
            (place, accepted) = accepted => match accepted {
                Ok((stream, _)) => {
                    let connection = Arc::clone(&server).connection(stream, closed.clone());
                    connections.spawn(async move {
                        connection.await;
                        drop(place);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "accept failed");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
    drop(listener);
    closing.send_replace(true);
    let all_ended = async { while connections.join_next().await.is_some() {} };
    if timeout(drain, all_ended).await.is_err() {
        tracing::warn!(connections = connections.len(), "connections cut at shutdown");
        connections.shutdown().await;
    }
}

type Body = UnsyncBoxBody<Bytes, Infallible>;

struct Server {
    slm: Arc<Slm>,
    /// One permit for each turn answered or waiting; then one of these `turns`; then, for each step, one of `cores`.
    seats: Arc<Semaphore>,
    turns: Arc<Semaphore>,
    cores: Arc<Semaphore>,
    requests: Option<Arc<Requests>>,
    options: Options,
}

impl Server {
    fn new(slm: Arc<Slm>, options: Options) -> Self {
        let turns = options.turns.clamp(1, Semaphore::MAX_PERMITS / 2);
        Self {
            slm,
            seats: Arc::new(Semaphore::new(turns + options.queue.min(Semaphore::MAX_PERMITS / 2))),
            turns: Arc::new(Semaphore::new(turns)),
            cores: Arc::new(Semaphore::new(options.cores.clamp(1, Semaphore::MAX_PERMITS))),
            requests: options.debug_requests.then(Arc::default),
            options,
        }
    }

    async fn connection(self: Arc<Self>, stream: TcpStream, mut closed: watch::Receiver<bool>) {
        // Tokens are small writes that should leave at once; a socket that cannot be told so works all the same.
        let _ = stream.set_nodelay(true);
        let io = TokioIo::new(Patience::new(stream, self.options.stall));
        let service = service_fn(|request| {
            let server = Arc::clone(&self);
            async move { Ok::<_, Infallible>(server.answer(request).await.unwrap_or_else(|refused| refusal(&refused))) }
        });
        let connection =
            http1::Builder::new().timer(TokioTimer::new()).header_read_timeout(self.options.read_wait).serve_connection(io, service);
        tokio::pin!(connection);
        let ended = tokio::select! {
            ended = connection.as_mut() => ended,
            () = async { let _ = closed.wait_for(|closed| *closed).await; } => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(error) = ended {
            tracing::debug!(%error, "connection ended early");
        }
    }

    async fn answer(self: Arc<Self>, request: http::Request<Incoming>) -> Result<Response<Body>, Refused> {
        match (request.uri().path(), request.method()) {
            ("/v1/chat/completions", &Method::POST) => self.chat(request).await,
            ("/v1/models", &Method::GET) => {
                let model = serde_json::json!({"id": self.slm.name(), "object": "model", "created": 0, "owned_by": "headgate"});
                Ok(json(StatusCode::OK, serde_json::json!({"object": "list", "data": [model]}).to_string()))
            }
            ("/health", &Method::GET) => Ok(json(StatusCode::OK, r#"{"status":"ok"}"#)),
            ("/debug/requests", &Method::GET) if let Some(requests) = &self.requests => Ok(json(StatusCode::OK, requests.to_json())),
            ("/v1/chat/completions" | "/v1/models" | "/health", _) => {
                Err(Refused::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", "this path has another method"))
            }
            _ => Err(Refused::new(StatusCode::NOT_FOUND, "not_found", "no such path")),
        }
    }

    async fn chat(&self, request: http::Request<Incoming>) -> Result<Response<Body>, Refused> {
        let (head, body) = request.into_parts();
        let body = self.receive(body).await?;
        let request = Request::parse(&body)?;
        drop(body);
        let writer = Writer {
            id: format!("chatcmpl-{}", uuid::Uuid::now_v7().simple()),
            created: SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs()),
            model: self.slm.name().to_owned(),
            include_usage: request.include_usage,
        };
        let (is_stream, turn) = (request.stream, self.begin(writer.id.clone(), request, &head.headers).await?);
        if !is_stream {
            let (text, finish, turn) = turn.whole().await?;
            return Ok(json(StatusCode::OK, writer.whole(&text, finish, turn.trail.usage())));
        }
        let mut response = Response::new(events(turn, writer));
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
        response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        Ok(response)
    }

    async fn receive(&self, body: Incoming) -> Result<Bytes, Refused> {
        let body = Limited::new(body, self.options.body_bytes).collect();
        match timeout(self.options.read_wait, body).await {
            Ok(Ok(body)) => Ok(body.to_bytes()),
            Ok(Err(error)) if error.is::<LengthLimitError>() => {
                let message = format!("the body is longer than {} bytes", self.options.body_bytes);
                Err(Refused::new(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", message))
            }
            Ok(Err(_)) => Err(Refused::new(StatusCode::BAD_REQUEST, "body_incomplete", "the body ended early")),
            Err(_) => Err(Refused::new(StatusCode::REQUEST_TIMEOUT, "body_too_slow", "the body took too long to arrive")),
        }
    }

    /// Waits for a place, then makes the prompt.
    async fn begin(&self, id: String, request: Request, headers: &HeaderMap) -> Result<Turn, Refused> {
        let mut trail = Trail::begin(id, self.slm.name(), &request, headers, self.requests.clone());
        let busy = |trail: &mut Trail| {
            trail.end = Some(End::Refused);
            Refused::new(StatusCode::SERVICE_UNAVAILABLE, "server_busy", "all turns are taken; try again shortly")
        };
        let Ok(seat) = Arc::clone(&self.seats).try_acquire_owned() else { return Err(busy(&mut trail)) };
        let Ok(Ok(turn)) = timeout(self.options.queue_wait, Arc::clone(&self.turns).acquire_owned()).await else {
            return Err(busy(&mut trail));
        };

        let slm = Arc::clone(&self.slm);
        let limits = Limits {
            max_tokens: request.max_tokens.unwrap_or(usize::MAX),
            sampling: Sampling {
                temperature: request.temperature.unwrap_or(self.options.temperature),
                top_p: request.top_p.unwrap_or(1.0),
                seed: request.seed.unwrap_or_else(|| RandomState::new().hash_one(0)),
            },
            stop: request.stop,
        };
        let prompting = compute(&self.cores, move || {
            let prompt = slm.prompt(&request.messages, limits.max_tokens)?;
            Ok((prompt.ids().len(), prompt.dropped_messages(), Box::new(slm.generate(prompt, limits))))
        });
        match prompting.await {
            Ok(Ok((prompt_tokens, dropped_messages, generation))) => {
                trail.prompted(prompt_tokens, dropped_messages);
                let pace = self.options.pace.filter(|p| *p > 0.0).and_then(|p| Duration::try_from_secs_f32(1.0 / p).ok());
                let cores = Arc::clone(&self.cores);
                Ok(Turn { generation: Some(generation), trail, cores, pace, due: Instant::now(), _places: (turn, seat) })
            }
            Ok(Err::<_, crate::TooLong>(too_long)) => {
                trail.end = Some(End::Refused);
                Err(Refused {
                    param: Some("messages"),
                    ..Refused::new(StatusCode::BAD_REQUEST, "context_length_exceeded", too_long.to_string())
                })
            }
            Err(broke) => {
                trail.end = Some(End::Failed);
                Err(broke)
            }
        }
    }
}

/// Runs `work` on a thread that may block, when a core is free for it.
async fn compute<T: Send + 'static>(cores: &Arc<Semaphore>, work: impl FnOnce() -> T + Send + 'static) -> Result<T, Refused> {
    let broke = || Refused::new(StatusCode::INTERNAL_SERVER_ERROR, "generation_failed", "the model failed");
    let core = Arc::clone(cores).acquire_owned().await.map_err(|_| broke())?;
    let work = tokio::task::spawn_blocking(move || {
        let done = work();
        drop(core);
        done
    });
    work.await.map_err(|_| broke())
}

/// One answer under way. Dropping it is stopping it: at most the token being made is still finished.
struct Turn {
    /// None after it broke.
    generation: Option<Box<Generation>>,
    trail: Trail,
    cores: Arc<Semaphore>,
    pace: Option<Duration>,
    /// Before this no token is shown.
    due: Instant,
    _places: (OwnedSemaphorePermit, OwnedSemaphorePermit),
}

impl Turn {
    async fn step(&mut self) -> Result<Step, Refused> {
        let broke = || Refused::new(StatusCode::INTERNAL_SERVER_ERROR, "generation_failed", "the model failed");
        sleep_until(self.due).await;
        let mut generation = self.generation.take().ok_or_else(broke)?;
        let made = compute(&self.cores, move || {
            let step = generation.step();
            (generation, step)
        });
        let (generation, step) = made.await.inspect_err(|_| self.trail.end = Some(End::Failed))?;
        self.trail.answer_tokens = generation.answer_ids().len();
        self.generation = Some(generation);
        match &step {
            Step::Prompted => {}
            Step::Text(_) => {
                if let Some(pace) = self.pace {
                    self.due = (self.due + pace).max(Instant::now());
                }
            }
            Step::End(Finish::Stop, _) => self.trail.end = Some(End::Stop),
            Step::End(Finish::Length, _) => self.trail.end = Some(End::Length),
        }
        Ok(step)
    }

    async fn whole(mut self) -> Result<(String, Finish, Self), Refused> {
        let mut whole = String::new();
        loop {
            match self.step().await? {
                Step::Prompted => {}
                Step::Text(text) => whole.push_str(&text),
                Step::End(finish, text) => {
                    whole.push_str(&text);
                    return Ok((whole, finish, self));
                }
            }
        }
    }
}

/// The answer as server-sent events. Nothing is sent before the first token is there, so the first byte means what
/// those who measure it think it means.
fn events(turn: Turn, writer: Writer) -> Body {
    let first = true;
    let frames = stream::unfold(Some((turn, writer, first)), |rest| async {
        let (mut turn, writer, mut first) = rest?;
        let mut out = Vec::new();
        let mut open = |out: &mut Vec<u8>| {
            if std::mem::take(&mut first) {
                writer.open(out);
            }
        };
        loop {
            match turn.step().await {
                Ok(Step::Prompted) => {}
                // Held back: the next token will tell.
                Ok(Step::Text(text)) if text.is_empty() => {}
                Ok(Step::Text(text)) => {
                    open(&mut out);
                    writer.text(&text, &mut out);
                    return Some((Ok(Frame::data(out.into())), Some((turn, writer, first))));
                }
                Ok(Step::End(finish, text)) => {
                    open(&mut out);
                    if !text.is_empty() {
                        writer.text(&text, &mut out);
                    }
                    writer.end(finish, turn.trail.usage(), &mut out);
                    return Some((Ok(Frame::data(out.into())), None));
                }
                Err(broke) => {
                    writer.broke(&broke, &mut out);
                    return Some((Ok(Frame::data(out.into())), None));
                }
            }
        }
    });
    UnsyncBoxBody::new(StreamBody::new(frames))
}

fn json(status: StatusCode, body: impl Into<Bytes>) -> Response<Body> {
    let mut response = Response::new(UnsyncBoxBody::new(Full::new(body.into())));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

fn refusal(refused: &Refused) -> Response<Body> {
    let mut response = json(refused.status, refused.body());
    if refused.status == StatusCode::SERVICE_UNAVAILABLE {
        response.headers_mut().insert(header::RETRY_AFTER, RETRY_AFTER);
    }
    response
}
