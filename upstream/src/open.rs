//! Opens an answer: balance, connect, send, wait for the head; tries again only while nothing has been answered, and, where an
//! orchestrator is asked, only what it surely did not take.

use std::{sync::Arc, time::Duration};

use headgate_contracts::{
    Code, Fault, Prompt, Who,
    wire::{conversation, problem, sse},
};
use http::{
    HeaderMap, HeaderValue, StatusCode,
    header::{CONTENT_ENCODING, CONTENT_TYPE, RETRY_AFTER},
};
use tokio::time::{timeout, timeout_at};
use tower::retry::budget::Budget;

use crate::{
    Shared,
    answer::{Answer, Clock, Form},
    balance::Lease,
    cancel::Cancel,
    connect::Io,
    endpoint::Endpoint,
    exchange::{Begun, Broken, exchange, poll_read},
    hop::{self, Place},
    request::TurnRequest,
    settings::{Hop, Protocol},
};

/// How long the body of an error is waited for: its head has said the most.
const ERROR_BODY_PATIENCE: Duration = Duration::from_millis(500);

/// The longest pause an upstream may ask for.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(3600);

/// Why one try failed, and whether another endpoint may be tried.
#[derive(Clone)]
pub(crate) struct Failed {
    pub(crate) fault: Fault,
    again: bool,
}

impl Failed {
    pub(crate) fn finally(fault: Fault) -> Failed {
        Failed { fault, again: false }
    }
    /// Another endpoint may be tried: this one has not taken the turn.
    pub(crate) fn elsewhere(fault: Fault) -> Failed {
        Failed { fault, again: true }
    }
}

/// Why a response is no answer.
#[derive(Debug, thiserror::Error)]
enum NoAnswer {
    #[error("status {0} is no answer")]
    Status(StatusCode),
    #[error("the content type is not an answer's")]
    ContentType,
    #[error("the body is compressed, which was not asked for")]
    Compressed,
    #[error("no connection within {0:?}")]
    ConnectTimeout(Duration),
}

pub(crate) async fn open(shared: &Arc<Shared>, prompt: &Prompt) -> Result<Answer, Fault> {
    shared.stats.opened.one();
    shared.budget.deposit();
    let settings = &shared.settings;
    let (clock, first) = Clock::new(&settings.timeouts);
    let request =
        TurnRequest::new(prompt, settings.protocol, settings.model.as_deref(), shared.authorization.as_ref(), settings.path.as_deref());
    // Dropped when the time is up: that closes the connection, as leaving does.
    let mut asked = None;
    match timeout_at(first, tries(shared, prompt, &request, clock, &mut asked)).await {
        Ok(opened) => opened,
        Err(_) => {
            let late = Fault::upstream(Code::UpstreamTimeoutFirstByte);
            Err(asked.map_or_else(|| late.clone(), |endpoint| shared.placed(&endpoint, late.clone())))
        }
    }
}

/// `asked`: the endpoint of the latest try.
async fn tries(
    shared: &Arc<Shared>,
    prompt: &Prompt,
    request: &TurnRequest<'_>,
    clock: Clock,
    asked: &mut Option<Arc<Endpoint>>,
) -> Result<Answer, Fault> {
    let mut tried: Vec<Arc<Endpoint>> = Vec::new();
    let mut failed: Option<Fault> = None;
    loop {
        let lease = shared.fleet.pick(prompt.session.as_str().as_bytes(), &tried);
        let lease = match (lease, failed.take()) {
            (Some(lease), None) => lease,
            (Some(lease), Some(_)) if shared.budget.withdraw() => {
                shared.stats.retried.one();
                lease
            }
            (Some(_), Some(fault)) => {
                shared.stats.retry_denied.one();
                return Err(fault);
            }
            (None, fault) => return Err(fault.unwrap_or_else(|| Fault::upstream(Code::UpstreamConnectFailed))),
        };
        let endpoint = Arc::clone(lease.endpoint());
        *asked = Some(Arc::clone(&endpoint));
        let opened = match shared.settings.hop {
            Hop::Events => one_try(shared, prompt, request, lease).await,
            Hop::WebSocket => hop::one_try(shared, prompt, request, lease).await,
        };
        match opened {
            Ok(opened) => return Ok(Answer::new(Arc::clone(shared), opened, clock)),
            Err(Failed { fault, again }) => {
                let fault = shared.placed(&endpoint, fault);
                tried.push(endpoint);
                if !again || tried.len() > shared.settings.retry.attempts as usize {
                    return Err(fault);
                }
                failed = Some(fault);
            }
        }
    }
}

/// An answer that has begun.
pub(crate) enum Opened {
    /// On a connection of its own.
    Own { io: Io, lease: Lease, begun: Begun, form: Form, cancel: Cancel },
    /// On a socket of many turns.
    Shared { place: Place, lease: Lease },
}

/// One endpoint: on a kept connection if there is one, and on a fresh one if that turns out to be dead.
async fn one_try(shared: &Arc<Shared>, prompt: &Prompt, request: &TurnRequest<'_>, lease: Lease) -> Result<Opened, Failed> {
    let (settings, stats) = (&shared.settings, &shared.stats);
    let endpoint = Arc::clone(lease.endpoint());
    let mut kept = endpoint.reuse();
    // Whether the endpoint was sent the request and closed the connection: another one is not asked then, and a turn is run once.
    let mut was_sent = false;
    loop {
        let reused = kept.is_some();
        let mut io = match kept.take() {
            Some(io) => {
                stats.reused.one();
                io
            }
            // In a box: a model that reads a long prompt is waited for longer.
            None => match Box::pin(connect(shared, &endpoint)).await {
                Ok(io) => io,
                Err(Failed { fault, again }) => return Err(Failed { fault, again: again && !was_sent }),
            },
        };
        let bytes = request.bytes_for(&endpoint).map_err(Failed::finally)?;
        let mut cancel = Cancel::arm(shared, &lease, prompt.turn, || prompt.trace.traceparent());
        match exchange(&mut io, &bytes, &settings.limits).await {
            Ok(begun) => {
                return match form(shared, &begun) {
                    Ok(form) => Ok(Opened::Own { io, lease, begun, form, cancel }),
                    Err(no_answer) => {
                        cancel.disarm();
                        let Failed { fault, again } = Box::pin(refusal(no_answer, begun, io, &endpoint, settings.protocol)).await;
                        Err(Failed { fault, again: again && !was_sent })
                    }
                };
            }
            // The endpoint closed the connection while it was kept, before it can have read the request.
            Err(Broken::Unanswered(_)) if reused => {
                stats.stale.one();
                cancel.disarm();
                // The same endpoint may be asked again: an orchestrator takes a turn once.
                was_sent = settings.protocol == Protocol::Orchestrator;
            }
            Err(broken @ Broken::Unanswered(_)) => {
                // A model that was asked for nothing has written nothing; an orchestrator may have taken the turn and died.
                let again = settings.protocol == Protocol::OpenAi;
                return Err(Failed { fault: Fault::upstream(Code::UpstreamReset).caused_by(broken), again });
            }
            Err(broken @ Broken::Cut(_)) => return Err(Failed::finally(Fault::upstream(Code::UpstreamReset).caused_by(broken))),
            Err(broken @ Broken::Malformed(_)) => {
                return Err(Failed::finally(Fault::upstream(Code::UpstreamProtocolError).caused_by(broken)));
            }
        }
    }
}

pub(crate) async fn connect(shared: &Shared, endpoint: &Endpoint) -> Result<Io, Failed> {
    let patience = shared.settings.timeouts.connect;
    let fault = Fault::upstream(Code::UpstreamConnectFailed);
    let fault = match timeout(patience, endpoint.target.connect()).await {
        Ok(Ok(io)) => {
            shared.stats.connected.one();
            endpoint.worked();
            return Ok(io);
        }
        Ok(Err(error)) => fault.caused_by(error),
        Err(_) => fault.caused_by(NoAnswer::ConnectTimeout(patience)),
    };
    shared.stats.connect_failed.one();
    endpoint.failed();
    Err(Failed { fault, again: true })
}

/// In which form the answer comes, if it is one.
fn form(shared: &Shared, begun: &Begun) -> Result<Form, NoAnswer> {
    let head = &begun.head;
    if head.status != StatusCode::OK {
        return Err(NoAnswer::Status(head.status));
    }
    let plain = |value: &http::HeaderValue| value.as_bytes().eq_ignore_ascii_case(b"identity");
    if !head.headers.get_all(CONTENT_ENCODING).iter().all(plain) {
        return Err(NoAnswer::Compressed);
    }
    let limits = shared.settings.limits;
    match (media_type(&head.headers).as_deref(), shared.settings.protocol) {
        (Some("text/event-stream"), _) => {
            let limits = sse::Limits { max_line: limits.line, max_event: limits.event };
            Ok(Form::Events { limits, unfinished: Some(Box::new(sse::Decoder::new(limits))) })
        }
        (Some("application/json"), Protocol::OpenAi) => Ok(Form::Whole(Vec::new())),
        _ => Err(NoAnswer::ContentType),
    }
}

/// The one media type of a response, in lower case, without parameters.
fn media_type(headers: &HeaderMap) -> Option<String> {
    let mut types = headers.get_all(CONTENT_TYPE).iter();
    match (types.next(), types.next()) {
        (Some(only), None) => Some(only.to_str().ok()?.split(';').next()?.trim().to_ascii_lowercase()),
        _ => None,
    }
}

/// What a response that is no answer means. Its body is read only to learn the code, and never shown.
async fn refusal(no_answer: NoAnswer, mut begun: Begun, mut io: Io, endpoint: &Endpoint, protocol: Protocol) -> Failed {
    let status = match no_answer {
        NoAnswer::Status(status) if status.is_client_error() || status.is_server_error() => status,
        other => return Failed::finally(Fault::upstream(Code::UpstreamProtocolError).caused_by(other)),
    };
    let body = timeout(ERROR_BODY_PATIENCE, error_body(&mut begun, &mut io)).await.unwrap_or_default();
    if begun.head.keep && begun.head.body.ended() {
        endpoint.keep(io, begun.head.body);
    }
    let mut fault = problem::parse(status.as_u16(), &body);
    fault.who = Who::Upstream;
    if let (None, Some(pause)) = (fault.retry_after, retry_after(&begun.head.headers)) {
        fault.retry_after = Some(pause);
    }
    let again = match protocol {
        Protocol::OpenAi => matches!(status, StatusCode::BAD_GATEWAY | StatusCode::SERVICE_UNAVAILABLE | StatusCode::GATEWAY_TIMEOUT),
        // The status alone does not tell: a turn that was taken fails with these too, when its model does.
        Protocol::Orchestrator => {
            let taken = begun.head.headers.get(conversation::TURN_TAKEN).map(HeaderValue::as_bytes);
            status == StatusCode::SERVICE_UNAVAILABLE && taken == Some(conversation::NOT_TAKEN.as_bytes())
        }
    };
    Failed { fault, again }
}

/// The body of an error, as far as it is short and whole; else nothing.
async fn error_body(begun: &mut Begun, io: &mut Io) -> Vec<u8> {
    let mut body = Vec::new();
    let mut take = |framing: &mut crate::http1::Framing, keep: &mut bool, mut rest: &[u8]| {
        while !rest.is_empty() {
            match framing.strip(rest) {
                Ok((used, data)) if used > 0 && body.len() + data.len() <= problem::MAX_BODY_BYTES => {
                    body.extend_from_slice(data);
                    rest = rest.get(used..).unwrap_or_default();
                }
                Ok(_) | Err(_) => {
                    *keep = false;
                    return false;
                }
            }
        }
        !framing.ended()
    };
    let head = &mut begun.head;
    let mut more = take(&mut head.body, &mut head.keep, &std::mem::take(&mut begun.early));
    while more {
        let read = std::future::poll_fn(|cx| poll_read(io, cx, |bytes| take(&mut head.body, &mut head.keep, bytes))).await;
        more = matches!(read, Ok(Some(true)));
    }
    body
}

/// `Retry-After` in seconds; a date is not read, for it depends on two clocks.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let seconds = headers.get(RETRY_AFTER)?.to_str().ok()?.trim().parse().ok()?;
    Some(Duration::from_secs(seconds).min(MAX_RETRY_AFTER))
}
