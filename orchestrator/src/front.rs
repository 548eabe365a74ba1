//! Takes requests: which call it is, whether it may be, whose turn it becomes.

use std::{convert::Infallible, io, panic::AssertUnwindSafe, sync::Arc};

use bytes::Bytes;
use futures_util::FutureExt;
use headgate_contracts::{
    Code, Fault, Principal, Prompt, Stop, Trace, TurnId,
    wire::{
        conversation,
        problem::{self, Problem},
    },
};
use headgate_policy::Claims;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, LengthLimitError, Limited, combinators::UnsyncBoxBody};
use hyper::body::{Body as _, Incoming};
use tokio::time::timeout;

use crate::{
    Orchestrator, ask,
    metrics::{Call, Route},
    reports,
    run::Run,
    socket::{Caller, Request},
    step, stream, training,
    verify::{self, Dispatched},
    ws,
};

/// A response's body; its error is that the caller has left.
pub(crate) type Body = UnsyncBoxBody<Bytes, io::Error>;

/// `POST`: a turn as server-sent events. `GET` with an upgrade: turns on a WebSocket.
pub(crate) const STREAM: &str = "/v1/conversation/stream";
/// `POST`: a turn as one JSON answer.
const STEP: &str = "/v1/conversation/step";
/// `POST`, with `{id}/cancel` behind it: stops a turn; with `{id}/confirm`: answers its question; with `{id}/delivery` and `{id}/verdict`: hears of one.
const TURNS: &str = "/v1/conversation/turns/";

const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
/// A longer one is nobody's key.
const MAX_IDEMPOTENCY_KEY_BYTES: usize = 256;

/// Answers one request. A panic costs this request alone.
pub(crate) async fn answer(
    orchestrator: Arc<Orchestrator>,
    caller: Caller,
    request: http::Request<Incoming>,
    upgraded: ws::Slot,
) -> Result<Response<Body>, Infallible> {
    let panics = orchestrator.metrics.panics.clone();
    let answered = AssertUnwindSafe(route(orchestrator, caller.request(), request, upgraded)).catch_unwind().await;
    Ok(answered.unwrap_or_else(|_| {
        panics.inc();
        refusal(&Fault::us(Code::InternalError).into(), None)
    }))
}

async fn route(orchestrator: Arc<Orchestrator>, caller: Request, request: http::Request<Incoming>, upgraded: ws::Slot) -> Response<Body> {
    let method = request.method().clone();
    match (request.uri().path(), &method) {
        (STREAM, &Method::POST) => turn(orchestrator, Route::Stream, caller, request).await,
        (STEP, &Method::POST) => turn(orchestrator, Route::Step, caller, request).await,
        (STREAM, &Method::GET) => ws::upgrade(caller, request, &upgraded),
        (path, _) if path.starts_with(training::PATH) => {
            let answered = match orchestrator.court.training() {
                Some(training) => training.clone().answer(method, path, request.headers().clone()).await,
                None => None,
            };
            answered.unwrap_or_else(|| refusal(&Fault::client(Code::NotFound).into(), None))
        }
        (path, method) => match (path.strip_prefix(TURNS).and_then(|rest| rest.split_once('/')), method) {
            (Some((turn, "cancel")), &Method::POST) => cancel(&orchestrator, turn),
            (Some((turn, "delivery")), &Method::POST) => {
                let turn = turn.to_owned();
                reports::answer(&orchestrator, Call::Delivery, &turn, request).await
            }
            (Some((turn, "verdict")), &Method::POST) => {
                let turn = turn.to_owned();
                reports::answer(&orchestrator, Call::Denial, &turn, request).await
            }
            (Some((turn, "confirm")), &Method::POST) => {
                let turn = turn.to_owned();
                ask::answer(&orchestrator, &turn, request).await
            }
            (Some((_, "cancel" | "confirm" | "delivery" | "verdict")), _) => method_not_allowed("POST"),
            (_, _) if path == STEP => method_not_allowed("POST"),
            (_, _) if path == STREAM => method_not_allowed("GET, POST"),
            (_, method) => probe(&orchestrator, method, path).unwrap_or_else(|| refusal(&Fault::client(Code::NotFound).into(), None)),
        },
    }
}

async fn turn(orchestrator: Arc<Orchestrator>, route: Route, caller: Request, request: http::Request<Incoming>) -> Response<Body> {
    let undecided = orchestrator.metrics.undecided(route);
    let (head, body) = request.into_parts();
    let begun = async {
        let body = read(&orchestrator, &head.headers, body, orchestrator.settings.limits.body).await?;
        caller.answering();
        let dispatched = Dispatched { method: head.method.as_str(), path: head.uri.path(), body: &body };
        let admitted = admit(&orchestrator, &head.headers, &dispatched).await?;
        let turn = admitted.prompt.turn;
        drop(body);
        Run::begin(&orchestrator, route, admitted).await.map_err(|fault| Refused(fault.into(), Some(turn)))
    };
    let (taken, Refused(stop, turn)) = match begun.await {
        Ok(mut run) => match run.open(Some(&caller)).await {
            Ok(()) => {
                undecided.accepted();
                return match route {
                    Route::Step => step::answer(run, &caller).await,
                    Route::Stream | Route::WebSocket => event_stream(stream::body(run, caller)),
                };
            }
            Err(stop) => (conversation::TAKEN, Refused(stop, Some(run.turn))),
        },
        Err(refused) => (conversation::NOT_TAKEN, refused),
    };
    undecided.refused(stop.code());
    let mut response = refusal(&stop, turn);
    // The gateway may ask another of us, as long as none has taken the turn.
    response.headers_mut().insert(conversation::TURN_TAKEN, HeaderValue::from_static(taken));
    response
}

/// A request that is not answered by a model, and the turn it would have been as far as that is known.
pub(crate) struct Refused(pub(crate) Stop, pub(crate) Option<TurnId>);

impl From<Fault> for Refused {
    fn from(fault: Fault) -> Refused {
        Refused(fault.into(), None)
    }
}

impl From<(Stop, Option<TurnId>)> for Refused {
    fn from((stop, turn): (Stop, Option<TurnId>)) -> Refused {
        Refused(stop, turn)
    }
}

/// A dispatch whose verdict holds.
pub(crate) struct Admitted {
    /// The prompt, with what travels on to the model.
    pub(crate) prompt: Prompt,
    /// What the verdict claims.
    pub(crate) claims: Claims,
    /// The size of the body that it binds.
    pub(crate) body_bytes: usize,
}

/// The dispatch, if its verdict holds.
pub(crate) async fn admit(orchestrator: &Orchestrator, headers: &HeaderMap, dispatched: &Dispatched<'_>) -> Result<Admitted, Refused> {
    let mut prompt = prompt(conversation::Request::parse(dispatched.body)?);
    prompt.trace = Trace::from_headers(headers);
    let key = verify::only(headers, &IDEMPOTENCY_KEY)?.and_then(|key| key.to_str().ok());
    prompt.idempotency_key = key.filter(|key| key.len() <= MAX_IDEMPOTENCY_KEY_BYTES).map(str::to_owned);
    let claims = match orchestrator.court.judge(headers, dispatched, &prompt).await {
        Ok(claims) => claims,
        Err(fault) => {
            tracing::warn!(
                code = %fault.code,
                reason = %fault.message,
                turn_id = %prompt.turn,
                session_id = %prompt.session,
                tenant = %prompt.principal.tenant,
                trace_id = prompt.trace.trace_id_hex(),
                "dispatch rejected"
            );
            return Err(Refused(fault.into(), Some(prompt.turn)));
        }
    };
    for name in [verify::VERDICT, verify::VERSION, verify::CONSTITUTION] {
        if let Some(value) = headers.get(&name) {
            prompt.headers.insert(name, value.clone());
        }
    }
    Ok(Admitted { prompt, claims, body_bytes: dispatched.body.len() })
}

fn prompt(request: conversation::Request) -> Prompt {
    let conversation::Request { turn_id, session_id, tenant, subject, messages, settings, metadata } = request;
    let principal = Principal { tenant, subject, scopes: Vec::new(), expires: None };
    Prompt { principal, settings, metadata, ..Prompt::new(turn_id, session_id, messages) }
}

/// The body of a request, whole; at most `limit` bytes.
pub(crate) async fn read(orchestrator: &Orchestrator, headers: &HeaderMap, body: Incoming, limit: usize) -> Result<Bytes, Fault> {
    let settings = &orchestrator.settings;
    if verify::only(headers, &header::CONTENT_ENCODING)?.is_some_and(|coding| coding != "identity") {
        return Err(Fault::client(Code::EncodingRefused));
    }
    let is_json = |kind: &HeaderValue| {
        let kind = kind.to_str().unwrap_or_default().split(';').next().unwrap_or_default();
        kind.trim().eq_ignore_ascii_case("application/json")
    };
    if !verify::only(headers, &header::CONTENT_TYPE)?.is_some_and(is_json) {
        return Err(Fault::client(Code::UnsupportedMediaType).saying("expected application/json"));
    }
    if body.size_hint().lower() > limit as u64 {
        return Err(Fault::client(Code::PayloadTooLarge));
    }
    let whole = timeout(settings.patience.body, Limited::new(body, limit).collect());
    match whole.await {
        Ok(Ok(whole)) => Ok(whole.to_bytes()),
        Ok(Err(broken)) if broken.is::<LengthLimitError>() => Err(Fault::client(Code::PayloadTooLarge)),
        Ok(Err(broken)) => Err(Fault::client(Code::ProtocolError).caused_by(broken)),
        Err(_) => Err(Fault::client(Code::RequestTimeout)),
    }
}

/// What probes ask, on every listener: is the process alive, does it take turns.
pub(crate) fn probe(orchestrator: &Orchestrator, method: &Method, path: &str) -> Option<Response<Body>> {
    let answer = match path {
        "/healthz" => plain(StatusCode::OK, "ok\n"),
        "/readyz" => match orchestrator.ready() {
            Ok(()) => plain(StatusCode::OK, "ready\n"),
            Err(why) => plain(StatusCode::SERVICE_UNAVAILABLE, why),
        },
        _ => return None,
    };
    Some(if matches!(*method, Method::GET | Method::HEAD) { answer } else { method_not_allowed("GET, HEAD") })
}

/// Answers 202 whatever it is asked: who does not know the id learns nothing.
fn cancel(orchestrator: &Orchestrator, turn: &str) -> Response<Body> {
    if let Ok(turn) = turn.parse() {
        orchestrator.runs.stop(turn);
    }
    respond(StatusCode::ACCEPTED, None, Bytes::new())
}

fn event_stream(body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

/// The response that a stop is, before any event.
pub(crate) fn refusal(stop: &Stop, turn: Option<TurnId>) -> Response<Body> {
    let problem = Problem::of(stop, turn);
    let status = StatusCode::from_u16(problem.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut response = respond(status, Some(problem::MEDIA_TYPE), problem.body().into());
    if let Some(pause_ms) = problem.retry_after_ms {
        response.headers_mut().insert(header::RETRY_AFTER, pause_ms.div_ceil(1000).into());
    }
    // Part of the request may still be on its way: what follows it could not be told from it.
    if matches!(stop.code(), Code::RequestTimeout | Code::PayloadTooLarge | Code::ProtocolError) {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

fn method_not_allowed(allowed: &'static str) -> Response<Body> {
    let mut response = refusal(&Fault::client(Code::MethodNotAllowed).into(), None);
    response.headers_mut().insert(header::ALLOW, HeaderValue::from_static(allowed));
    response
}

fn plain(status: StatusCode, text: &'static str) -> Response<Body> {
    respond(status, Some("text/plain; charset=utf-8"), Bytes::from_static(text.as_bytes()))
}

pub(crate) fn respond(status: StatusCode, kind: Option<&'static str>, body: Bytes) -> Response<Body> {
    let mut response = Response::new(BodyExt::boxed_unsync(Full::new(body).map_err(|never: Infallible| match never {})));
    *response.status_mut() = status;
    if let Some(kind) = kind {
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    }
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}
