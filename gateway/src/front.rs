//! The front door: finds the route of a request, checks what can be checked before a turn, and answers.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use headgate_config::plan::Kind;
use headgate_contracts::{
    Code, Credential, Fault, Gone, Principal, Prompt, Refusal, Secret, SessionId, Stop, Trace, TurnId,
    wire::{
        chat::{Confirmation, TurnRequest},
        openai,
        problem::Problem,
    },
};
use headgate_filters::policy_headers::strip_forged;
use headgate_policy::Digest;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header, uri::Authority};
use http_body_util::{BodyExt, Limited};
use hyper::{
    Request, Response,
    body::{Body, Incoming},
};

use crate::{
    body::Reply,
    drive::{Call, Drive, Line},
    live::{App, Live, Route},
    outbox::Fields,
    page, proxy,
    serve::{Peer, Service},
    session::{Begun, Key, identify},
    sse::{self, Framing, Stream},
    voice::Voice,
    ws,
};

impl Service for App {
    async fn call(&self, request: Request<Incoming>, peer: Peer) -> Response<Reply> {
        let live = self.live();
        let origin = request.headers().get(header::ORIGIN).cloned();
        let route = live.route(request.uri().path()).cloned();
        let allowed = match (&origin, &route) {
            // A browser writes one. Of two the wrong one might be on the list.
            (Some(_), _) if request.headers().get_all(header::ORIGIN).iter().count() > 1 => false,
            (Some(origin), Some(route)) if !route.allows(origin, host(&request)) => false,
            _ => true,
        };
        let answer = if allowed {
            answer(self, &live, route, request, peer).await
        } else {
            Err(Refusal::new(Code::OriginDenied, "route.origins").into())
        };
        let mut response = answer.unwrap_or_else(|stop| problem(&stop, None));
        if let (Some(origin), true) = (origin, allowed) {
            response.headers_mut().insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
            // Beside what a proxied answer varies by itself.
            response.headers_mut().append(header::VARY, HeaderValue::from_static("origin"));
            response.headers_mut().insert(
                header::ACCESS_CONTROL_EXPOSE_HEADERS,
                HeaderValue::from_static("x-headgate-turn, policy-version, constitution-hash, traceparent, retry-after"),
            );
        }
        response
    }
}

async fn answer(
    app: &App,
    live: &Arc<Live>,
    route: Option<Arc<Route>>,
    mut request: Request<Incoming>,
    peer: Peer,
) -> Result<Response<Reply>, Stop> {
    strip_forged(request.headers_mut());
    if let Some(wrong) = peer.wrong().or_else(|| host_fault(&request)) {
        return Err(Fault::client(Code::ProtocolError).saying(wrong).into());
    }
    if app.drain().has_begun() {
        return Err(Fault::us(Code::Draining).after(Duration::from_secs(1)).into());
    }
    let Some(route) = route else {
        return match live.page {
            true => {
                page::answer(&request).or_else(|| page::keys(&request, live.jwks()?)).ok_or_else(|| Fault::client(Code::NotFound).into())
            }
            false => Err(Fault::client(Code::NotFound).into()),
        };
    };
    if request.method() == Method::OPTIONS && request.headers().contains_key(header::ACCESS_CONTROL_REQUEST_METHOD) {
        return Ok(preflight());
    }
    // Each in a box: what answers one is not to have room for what would answer another.
    match route.plan.kind {
        Kind::Chat => match (request.method().clone(), turn_of(&route, request.uri().path())?) {
            (Method::POST, None) => Box::pin(chat(app, &route, request, peer)).await,
            (Method::GET | Method::CONNECT, None) if ws::asks(&request) => ws::upgrade(app, &route, request, peer),
            (Method::GET, Some((turn, ""))) => Box::pin(resume(app, &route, turn, &request, peer)).await,
            (Method::POST, Some((turn, "/stop"))) => Box::pin(stop(app, &route, turn, &request)).await,
            (Method::POST, Some((turn, "/confirm"))) => Box::pin(confirm(app, &route, turn, request)).await,
            (_, None) => Err(not_allowed("POST for a turn, or GET with Upgrade for a WebSocket")),
            (_, Some(_)) => Err(not_allowed("GET to resume a turn, POST to its /stop or /confirm")),
        },
        Kind::OpenAi => match (request.method(), request.uri().path().ends_with("/models")) {
            (&Method::GET, true) => Box::pin(models(&route, &request)).await,
            (&Method::POST, false) => Box::pin(completions(app, &route, request, peer)).await,
            _ => Err(not_allowed("POST for a completion, GET for the list of models")),
        },
        Kind::Proxy => Box::pin(proxy::pass(app, &route, request, peer)).await,
    }
}

/// Whom a request is for, as it says itself: HTTP/2 has no other place for it than the target.
pub(crate) fn host(request: &Request<Incoming>) -> Option<&str> {
    let target = request.uri().authority().map(Authority::as_str);
    target.or_else(|| request.headers().get(header::HOST)?.to_str().ok())
}

/// What is wrong with whom a request is for (RFC 9112 section 3.2): whoever stands before us may have gone by the other name.
fn host_fault(request: &Request<Incoming>) -> Option<&'static str> {
    let mut hosts = request.headers().get_all(header::HOST).iter();
    match (hosts.next(), hosts.next()) {
        (Some(_), Some(_)) => Some("exactly one Host is needed"),
        (None, _) if request.version() == http::Version::HTTP_11 => Some("exactly one Host is needed"),
        (None, _) => None,
        (Some(host), None) => {
            let host = host.to_str().ok().and_then(|host| host.parse::<Authority>().ok()).filter(|host| !host.as_str().contains('@'));
            match (host, request.uri().authority()) {
                (None, _) => Some("Host must be a name or an address, and perhaps a port"),
                (Some(host), Some(target)) if host != *target => Some("Host and the request's target name different hosts"),
                (Some(_), _) => None,
            }
        }
    }
}

fn not_allowed(message: &'static str) -> Stop {
    Fault::client(Code::MethodNotAllowed).saying(message).into()
}

/// `/{turn_id}` and what follows it, below the route's path.
fn turn_of<'a>(route: &Route, path: &'a str) -> Result<Option<(TurnId, &'a str)>, Stop> {
    let Some(rest) = path.strip_prefix(route.plan.path.base.as_str()).and_then(|rest| rest.strip_prefix('/')) else { return Ok(None) };
    let (id, rest) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    match id.parse() {
        Ok(turn) => Ok(Some((turn, rest))),
        Err(_) => Err(Fault::client(Code::SessionNotFound).into()),
    }
}

/// `POST /v1/chat/stream`: one turn as server-sent events.
async fn chat(app: &App, route: &Arc<Route>, request: Request<Incoming>, peer: Peer) -> Result<Response<Reply>, Stop> {
    accepts(request.headers(), "text/event-stream")?;
    let line = peer.line(request.version());
    // In a box: an answer may be waited for long, and what came before it is of no more use.
    let (begun, trace) = Box::pin(asked(app, route, request)).await?;
    stream(route, begun, Framing::Chat, line, &trace).await
}

async fn asked(app: &App, route: &Arc<Route>, request: Request<Incoming>) -> Result<(Begun, Trace), Stop> {
    let (facts, body) = read(route, request).await?;
    let turn = TurnRequest::parse(&body)?;
    let mut prompt = Prompt::new(TurnId::fresh(), turn.session_id.clone().unwrap_or_else(SessionId::fresh), Vec::new());
    prompt.settings = turn.settings();
    prompt.messages = turn.messages;
    prompt.metadata = turn.metadata;
    facts.stamp(&mut prompt);
    Ok((begin(app, route, prompt, Voice::chat(), body).await?, facts.trace))
}

/// `POST /v1/chat/completions`: OpenAI's requests, streamed or not.
async fn completions(app: &App, route: &Arc<Route>, request: Request<Incoming>, peer: Peer) -> Result<Response<Reply>, Stop> {
    let line = peer.line(request.version());
    // In a box, as in `chat`.
    let (begun, trace, form) = Box::pin(asked_in_openai(app, route, request)).await?;
    match form {
        openai::Form::Streamed => stream(route, begun, Framing::OpenAi, line, &trace).await,
        openai::Form::Whole => whole(begun, line, &trace).await,
    }
}

async fn asked_in_openai(app: &App, route: &Arc<Route>, request: Request<Incoming>) -> Result<(Begun, Trace, openai::Form), Stop> {
    let (facts, body) = read(route, request).await?;
    let parsed = openai::Request::parse(&body)?;
    let mut prompt = Prompt::new(TurnId::fresh(), SessionId::fresh(), parsed.messages);
    prompt.settings = parsed.settings;
    prompt.metadata = parsed.metadata;
    facts.stamp(&mut prompt);
    let voice = match parsed.form {
        openai::Form::Streamed => Voice::chunks(parsed.include_usage),
        openai::Form::Whole => Voice::whole(),
    };
    Ok((begin(app, route, prompt, voice, body).await?, facts.trace, parsed.form))
}

/// The turn of a request; a copy of one that came before, as its `Idempotency-Key` says, comes to the same turn.
///
/// `body` ends here: it is a part of hyper's buffer, and a model may think for minutes.
async fn begin(app: &App, route: &Arc<Route>, prompt: Prompt, voice: Voice, body: Bytes) -> Result<Begun, Stop> {
    let Some(key) = prompt.idempotency_key.clone() else { return app.turns().begin(route, prompt, voice) };
    // Whose key it is has to be known before there is a turn, whose filters will find out again.
    let Principal { tenant, subject, .. } = identify(route, prompt.credential.clone()).await?;
    let key = Key { route: route.plan.name.clone(), tenant, subject, key };
    app.turns().begin_once(route, prompt, voice, key, Digest::of(&body))
}

/// The response of a streamed turn: begun when the answer begins, or after a heartbeat's time without one.
async fn stream(route: &Route, begun: Begun, framing: Framing, line: Arc<Line>, trace: &Trace) -> Result<Response<Reply>, Stop> {
    let Begun { turn, drive, mut reader, .. } = begun;
    let call = Call::new(line, drive);
    let head = match sse::begin(&call, &mut reader, route.plan.flow.heartbeat).await {
        Ok(head) => head,
        Err(stop) => return Ok(problem(&stop, Some(turn))),
    };
    let early = head.is_none();
    let mut response = Response::new(Reply::Turn(Box::new(Stream::new(call, reader, turn, framing, route.plan.flow.heartbeat, early))));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no"));
    stamp(headers, turn, trace, head);
    Ok(response)
}

/// The response of a turn that is not streamed: its end decides the status.
async fn whole(begun: Begun, line: Arc<Line>, trace: &Trace) -> Result<Response<Reply>, Stop> {
    let Begun { turn, drive, mut reader, .. } = begun;
    let call = Call::new(line, drive);
    let mut answer = Vec::new();
    let ended = std::future::poll_fn(|cx| {
        call.poll(cx);
        loop {
            let shown = std::task::ready!(reader.poll_next(cx, usize::MAX, |event| answer.extend_from_slice(event.payload)));
            if shown == 0 {
                return reader.poll_head(cx);
            }
        }
    });
    match ended.await {
        Ok(head) => {
            let mut response = Response::new(Reply::from(answer));
            response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
            stamp(response.headers_mut(), turn, trace, Some(head));
            Ok(response)
        }
        Err(stop) => Ok(problem(&stop, Some(turn))),
    }
}

fn stamp(headers: &mut HeaderMap, turn: TurnId, trace: &Trace, head: Option<Fields>) {
    for (name, value) in head.iter().flat_map(|head| head.iter()) {
        headers.append(name, value.clone());
    }
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    let (turn, trace) = (HeaderValue::from_str(turn.text(&mut [0; 45])), HeaderValue::try_from(trace.traceparent()));
    for (name, value) in [("x-headgate-turn", turn), ("traceparent", trace)] {
        if let Ok(value) = value {
            headers.insert(HeaderName::from_static(name), value);
        }
    }
}

/// `GET /v1/chat/stream/{turn_id}`: the rest of a turn that went on without its client.
async fn resume(app: &App, route: &Arc<Route>, turn: TurnId, request: &Request<Incoming>, peer: Peer) -> Result<Response<Reply>, Stop> {
    accepts(request.headers(), "text/event-stream")?;
    let principal = identify(route, credential(request.headers())).await?;
    let hook = app.turns().find(turn, &principal)?;
    let after = match only(request.headers(), "last-event-id")? {
        None => None,
        Some(id) => Some(last_event_id(id, turn)?),
    };
    let reader = hook.read(after).ok_or_else(|| Stop::Failed(Fault::client(Code::SessionNotFound)))?;
    let begun = Begun { turn, session: SessionId::fresh(), drive: Drive::elsewhere(), reader };
    stream(route, begun, Framing::Chat, peer.line(request.version()), &route.trace(request.headers())).await
}

fn last_event_id(id: &HeaderValue, turn: TurnId) -> Result<u64, Stop> {
    let wrong = || Stop::Failed(Fault::client(Code::InvalidRequest).saying("Last-Event-ID must be <turn id>:<number> of this turn"));
    let (of, seq) = id.to_str().ok().and_then(|id| id.split_once(':')).ok_or_else(wrong)?;
    match (of.parse() == Ok(turn), seq.parse()) {
        (true, Ok(seq)) => Ok(seq),
        _ => Err(wrong()),
    }
}

/// `POST /v1/chat/stream/{turn_id}/stop`.
async fn stop(app: &App, route: &Arc<Route>, turn: TurnId, request: &Request<Incoming>) -> Result<Response<Reply>, Stop> {
    let principal = identify(route, credential(request.headers())).await?;
    app.turns().find(turn, &principal)?.stop(Gone::Stopped);
    let mut response = Response::new(Reply::empty());
    *response.status_mut() = StatusCode::ACCEPTED;
    Ok(response)
}

/// `POST /v1/chat/stream/{turn_id}/confirm`.
async fn confirm(app: &App, route: &Arc<Route>, turn: TurnId, request: Request<Incoming>) -> Result<Response<Reply>, Stop> {
    let principal = identify(route, credential(request.headers())).await?;
    let hook = app.turns().find(turn, &principal)?;
    let (_, body) = read(route, request).await?;
    hook.confirm(&Confirmation::parse(&body)?).await?;
    let mut response = Response::new(Reply::empty());
    *response.status_mut() = StatusCode::ACCEPTED;
    Ok(response)
}

/// `GET /v1/models`.
async fn models(route: &Arc<Route>, request: &Request<Incoming>) -> Result<Response<Reply>, Stop> {
    identify(route, credential(request.headers())).await?;
    let mut body = Vec::new();
    openai::models(&mut body, route.plan.models.iter().map(String::as_str), 0);
    let mut response = Response::new(Reply::from(body));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    Ok(response)
}

/// What a request says about its turn besides its body.
pub(crate) struct Facts {
    credential: Credential,
    idempotency_key: Option<String>,
    /// Our own span.
    pub(crate) trace: Trace,
}

impl Facts {
    pub(crate) fn of(route: &Route, headers: &HeaderMap) -> Result<Facts, Stop> {
        // A key that is dropped in silence is a turn that runs twice.
        let wrong = || Stop::Failed(Fault::client(Code::InvalidRequest).saying("Idempotency-Key must be 1 to 255 visible characters"));
        let fits = |key: &&str| (1..=255).contains(&key.len());
        let idempotency_key = match only(headers, "idempotency-key")? {
            None => None,
            Some(key) => Some(key.to_str().ok().filter(fits).ok_or_else(wrong)?.to_owned()),
        };
        Ok(Facts { credential: credential(headers), idempotency_key, trace: route.trace(headers) })
    }

    pub(crate) fn stamp(&self, prompt: &mut Prompt) {
        prompt.credential = self.credential.clone();
        prompt.idempotency_key = self.idempotency_key.clone();
        prompt.trace = self.trace.clone();
    }
}

/// The value of a header that may stand once: of two values every reader might take another one.
fn only<'a>(headers: &'a HeaderMap, name: &'static str) -> Result<Option<&'a HeaderValue>, Stop> {
    let mut all = headers.get_all(name).iter();
    match (all.next(), all.next()) {
        (value, None) => Ok(value),
        _ => Err(Fault::client(Code::InvalidRequest).saying(format!("the header {name} stands twice")).into()),
    }
}

/// The bearer token of a request. More than one credential is none: which of them would have been meant?
pub(crate) fn credential(headers: &HeaderMap) -> Credential {
    let mut all = headers.get_all(header::AUTHORIZATION).iter();
    let (Some(value), None) = (all.next(), all.next()) else { return Credential::None };
    match value.to_str().ok().and_then(|value| value.split_once(' ')) {
        Some((scheme, token)) if scheme.eq_ignore_ascii_case("bearer") && !token.is_empty() => {
            Credential::Bearer(Secret::new(token.trim()))
        }
        _ => Credential::None,
    }
}

/// The facts and the body of a JSON request, within the route's bounds of size and time.
async fn read(route: &Route, request: Request<Incoming>) -> Result<(Facts, Bytes), Stop> {
    let headers = request.headers();
    if headers.get_all(header::CONTENT_ENCODING).iter().any(|encoding| encoding != "identity") {
        return Err(Fault::client(Code::EncodingRefused).into());
    }
    let is_json = |kind: &HeaderValue| {
        kind.to_str()
            .is_ok_and(|kind| kind.split(';').next().is_some_and(|essence| essence.trim().eq_ignore_ascii_case("application/json")))
    };
    let mut kinds = headers.get_all(header::CONTENT_TYPE).iter().peekable();
    if kinds.peek().is_none() || !kinds.all(is_json) {
        return Err(Fault::client(Code::UnsupportedMediaType).saying("the body must be application/json").into());
    }
    let facts = Facts::of(route, headers)?;
    if request.body().size_hint().lower() > route.plan.body_bytes as u64 {
        // Known from its length: nobody need send it first.
        return Err(Fault::client(Code::PayloadTooLarge).into());
    }
    let body = Limited::new(request.into_body(), route.plan.body_bytes).collect();
    match tokio::time::timeout(route.plan.body, body).await {
        Ok(Ok(body)) => Ok((facts, body.to_bytes())),
        Ok(Err(error)) if error.is::<http_body_util::LengthLimitError>() => Err(Fault::client(Code::PayloadTooLarge).into()),
        Ok(Err(error)) => Err(Fault::client(Code::ProtocolError).caused_by(error).into()),
        Err(_) => Err(Fault::client(Code::RequestTimeout).into()),
    }
}

fn accepts(headers: &HeaderMap, kind: &str) -> Result<(), Stop> {
    let mut accepted = headers.get_all(header::ACCEPT).iter().peekable();
    let family = kind.split_once('/').map_or(kind, |(family, _)| family);
    let fits = |range: &str| {
        let mut parts = range.split(';').map(str::trim);
        let range = parts.next().unwrap_or_default();
        if parts.any(|part| matches!(part, "q=0" | "q=0." | "q=0.0" | "q=0.00" | "q=0.000")) {
            return false;
        }
        range == "*/*"
            || range.eq_ignore_ascii_case(kind)
            || range.strip_suffix("/*").is_some_and(|range| range.eq_ignore_ascii_case(family))
    };
    if accepted.peek().is_none() || accepted.any(|value| value.to_str().is_ok_and(|value| value.split(',').any(fits))) {
        Ok(())
    } else {
        Err(Fault::client(Code::NotAcceptable).saying("the answer is text/event-stream").into())
    }
}

fn preflight() -> Response<Reply> {
    let mut response = Response::new(Reply::empty());
    *response.status_mut() = StatusCode::NO_CONTENT;
    let headers = response.headers_mut();
    headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("GET, POST"));
    headers.insert(
        header::ACCESS_CONTROL_ALLOW_HEADERS,
        HeaderValue::from_static("authorization, content-type, idempotency-key, last-event-id, traceparent, tracestate"),
    );
    headers.insert(header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("600"));
    response
}

/// A refusal or fault as a response of its own.
pub(crate) fn problem(stop: &Stop, turn: Option<TurnId>) -> Response<Reply> {
    let code = stop.code();
    let mut response = Response::new(Reply::from(Problem::of(stop, turn).body()));
    // Codes of a turn's middle have no status of their own; before the first byte they are our fault's.
    *response.status_mut() = match StatusCode::from_u16(code.status()) {
        Ok(status) if status.is_client_error() || status.is_server_error() => status,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    };
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    let retry_after = match stop {
        Stop::Refused(refusal) => refusal.retry_after,
        Stop::Failed(fault) => fault.retry_after,
        Stop::Gone(_) => None,
    };
    if let Some(pause) = retry_after {
        // Whole seconds, rounded up: RFC 9110 section 10.2.3.
        headers.insert(header::RETRY_AFTER, HeaderValue::from(pause.as_secs() + u64::from(pause.subsec_nanos() > 0)));
    }
    if matches!(code, Code::Unauthenticated | Code::TokenExpired) {
        headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    if matches!(code, Code::Draining | Code::RequestTimeout | Code::PayloadTooLarge | Code::ProtocolError) {
        headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    if let Some(turn) = turn
        && let Ok(value) = HeaderValue::try_from(turn.to_string())
    {
        headers.insert(HeaderName::from_static("x-headgate-turn"), value);
    }
    response
}

/// The answer to a client that gives up what it asks for again and again.
pub(crate) fn too_many() -> Response<Reply> {
    problem(&Fault::client(Code::RateLimited).saying("too many requests were given up on this connection").into(), None)
}

/// The answer to a head that did not come in time, for a connection that hyper has given up: head, body, all of it.
pub(crate) fn late_head() -> Vec<u8> {
    let body = Problem::of(&Fault::client(Code::RequestTimeout).into(), None).body();
    let mut answer = format!(
        "HTTP/1.1 408 Request Timeout\r\ncontent-type: application/problem+json\r\ncache-control: no-store\r\nconnection: close\r\n\
         content-length: {}\r\n\r\n",
        body.len()
    )
    .into_bytes();
    answer.extend_from_slice(&body);
    answer
}
