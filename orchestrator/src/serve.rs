//! Accepts connections and ends them: a place for each, a patience with each, and time for open turns when we shut down.

use std::{sync::Arc, time::Duration};

use headgate_contracts::{Code, Fault};
use http::{Method, Request, Response, StatusCode};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::registry::Registry;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, watch},
    task::JoinSet,
    time::{MissedTickBehavior, interval, sleep, timeout},
};

use crate::{
    Orchestrator,
    front::{self, Body, refusal, respond},
    socket::Socket,
    ws,
};

/// A pause after a failed accept: while the process is out of descriptors it fails again at once.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// How often it is looked for words that did not come in time.
const SWEEP: Duration = Duration::from_millis(250);
/// How long turns may take to say their last word once the drain time is over.
const LAST_WORD: Duration = Duration::from_secs(2);

/// Serves `POST /v1/conversation/stream` (and its WebSocket), `POST /v1/conversation/step`,
/// `POST /v1/conversation/turns/{id}/` `cancel`, `delivery` and `verdict`, `GET /healthz` and `GET /readyz` until `shutdown` is ready.
///
/// Then it takes no more connections and no more turns, and lets open turns end for [`crate::Settings::drain`]; those still open
/// after that end with the code `draining`. Returns when the last connection is closed.
pub async fn serve(listener: TcpListener, orchestrator: Arc<Orchestrator>, shutdown: impl Future<Output = ()>) {
    let places = Arc::new(Semaphore::new(orchestrator.settings.limits.connections.clamp(1, Semaphore::MAX_PERMITS)));
    let (closing, closed) = watch::channel(false);
    let (mut connections, mut beside) = (JoinSet::new(), JoinSet::new());
    beside.spawn(sweep(orchestrator.clone()));
    if let Some(training) = orchestrator.court.training().cloned() {
        beside.spawn(training.tend());
    }
    tokio::pin!(shutdown);
    loop {
        // The place comes first: what is not accepted waits in the system's own bounded queue.
        let accepted = async {
            let place = Arc::clone(&places).acquire_owned().await;
            (place, listener.accept().await)
        };
        tokio::select! {
            biased;
            () = &mut shutdown => break,
            // Taken as they end, so that the set does not grow.
            Some(_) = connections.join_next() => {}
            (place, accepted) = accepted => match accepted {
                Ok((stream, _)) => {
                    let connection = connection(orchestrator.clone(), stream, closed.clone());
                    connections.spawn(async move {
                        connection.await;
                        drop(place);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "accept failed");
                    sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
    drop(listener);
    orchestrator.runs.close();
    closing.send_replace(true);
    if timeout(orchestrator.settings.drain, ended(&mut connections)).await.is_err() {
        tracing::warn!(turns = orchestrator.runs.count(), connections = connections.len(), "drain time is over");
        orchestrator.runs.drain();
        if timeout(LAST_WORD, ended(&mut connections)).await.is_err() {
            connections.shutdown().await;
        }
    }
    orchestrator.partings.close();
    if let Some(training) = orchestrator.court.training() {
        training.close().await;
    }
    if let Some(log) = &orchestrator.events
        && !matches!(timeout(LAST_WORD, log.flush()).await, Ok(Ok(())))
    {
        tracing::warn!("the event log did not take the last ends of turns: the next start calls them crashed");
    }
}

/// Writes down what nobody says in time, for as long as it is polled.
async fn sweep(orchestrator: Arc<Orchestrator>) {
    let Some(log) = &orchestrator.events else { return };
    let mut ticks = interval(SWEEP);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        orchestrator.partings.sweep();
        log.sweep(orchestrator.settings.delivery);
    }
}

async fn ended(connections: &mut JoinSet<()>) {
    while connections.join_next().await.is_some() {}
}

async fn connection(orchestrator: Arc<Orchestrator>, stream: TcpStream, mut closed: watch::Receiver<bool>) {
    // Events are small writes that should leave at once; a socket that cannot be told so works all the same.
    let _ = stream.set_nodelay(true);
    let settings = &orchestrator.settings;
    let (socket, caller) = Socket::of(stream, settings.patience);
    let upgraded = ws::Slot::default();
    let service = service_fn(|request| front::answer(orchestrator.clone(), caller.clone(), request, upgraded.clone()));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(settings.patience.idle)
        .max_headers(settings.limits.fields)
        .max_header_size(settings.limits.head)
        .max_buf_size(settings.limits.head.max(8 << 10))
        .serve_connection(TokioIo::new(socket), service)
        .with_upgrades();
    tokio::pin!(connection);
    let served = tokio::select! {
        served = connection.as_mut() => served,
        () = closing(&mut closed) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    match served {
        // The socket is a WebSocket now and stays in this task: one task per connection, whatever it speaks.
        Ok(()) => {
            if let Some(socket) = upgraded.take() {
                ws::serve(orchestrator.clone(), socket, closed).await;
            }
        }
        Err(error) => tracing::debug!(%error, "connection ended early"),
    }
}

/// Resolves when we shut down. Cancel safe.
pub(crate) async fn closing(closed: &mut watch::Receiver<bool>) {
    // An error means that whoever served is gone without a word: that is a shutdown too.
    let _ = closed.wait_for(|closed| *closed).await;
}

/// Serves `GET /metrics` (OpenMetrics text), `GET /healthz` and `GET /readyz` until `shutdown` is ready: for operators, on a
/// listener that callers do not reach.
pub async fn serve_admin(
    listener: TcpListener,
    orchestrator: Arc<Orchestrator>,
    registry: Arc<Registry>,
    shutdown: impl Future<Output = ()>,
) {
    let mut connections = JoinSet::new();
    tokio::pin!(shutdown);
    loop {
        tokio::select! {
            biased;
            () = &mut shutdown => return,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept(), if connections.len() < ADMIN_CONNECTIONS => match accepted {
                Ok((stream, _)) => {
                    let (orchestrator, registry) = (orchestrator.clone(), registry.clone());
                    connections.spawn(async move {
                        let service = service_fn(|request| {
                            let response = inspect(&orchestrator, &registry, &request);
                            async move { Ok::<_, std::convert::Infallible>(response) }
                        });
                        let (socket, _) = Socket::of(stream, orchestrator.settings.patience);
                        let mut http = http1::Builder::new();
                        http.timer(TokioTimer::new()).header_read_timeout(orchestrator.settings.patience.idle);
                        if let Err(error) = http.serve_connection(TokioIo::new(socket), service).await {
                            tracing::debug!(%error, "connection ended early");
                        }
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "accept failed");
                    sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
}

/// Operators at once: a scraper or two, probes, a person.
const ADMIN_CONNECTIONS: usize = 64;

fn inspect(orchestrator: &Orchestrator, registry: &Registry, request: &Request<Incoming>) -> Response<Body> {
    if request.uri().path() != "/metrics" {
        return front::probe(orchestrator, request.method(), request.uri().path())
            .unwrap_or_else(|| refusal(&Fault::client(Code::NotFound).into(), None));
    }
    if *request.method() != Method::GET {
        return refusal(&Fault::client(Code::MethodNotAllowed).into(), None);
    }
    let mut text = String::new();
    match prometheus_client::encoding::text::encode(&mut text, registry) {
        Ok(()) => respond(StatusCode::OK, Some("application/openmetrics-text; version=1.0.0; charset=utf-8"), text.into()),
        Err(error) => refusal(&Fault::us(Code::InternalError).caused_by(error).into(), None),
    }
}
