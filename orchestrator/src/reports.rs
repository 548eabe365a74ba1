//! Hears what gateways tell of turns: what the user got of an answer, and prompts that were refused and became no turn.
//!
//! A report is signed over its exact bytes, as a dispatch is. Nothing runs on it, so it may be told as often as it takes: what is
//! written is written once, and the answer says that it is on disk.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use headgate_contracts::{
    Category, Code, End, Fault, Finish, Gone, Refusal, Trace, TurnId,
    wire::{
        conversation::{self, DeliveryReport, DenialReport},
        log::Delivered,
    },
};
use headgate_policy::{Claims, Direction};
use http::{HeaderMap, Request, Response, StatusCode};
use hyper::body::Incoming;
use tokio::time::timeout;

use crate::{
    Orchestrator,
    events::{Denial, Heard, Refused, Told, Untold},
    front::{Body, read, refusal, respond},
    metrics::{Call, Reported},
    verify::{Dispatched, Whose},
};

/// A report holds a few names and at most one verdict.
const MAX_BODY_BYTES: usize = 8 << 10;
/// How long a turn that still runs may take to end once its gateway has said that nobody waits for it.
const WIND_UP: Duration = Duration::from_secs(5);

/// Answers a report on `turn`: 202 once it is kept, or where nothing is kept.
pub(crate) async fn answer(orchestrator: &Arc<Orchestrator>, call: Call, turn: &str, request: Request<Incoming>) -> Response<Body> {
    let Ok(turn) = turn.parse::<TurnId>() else { return refusal(&Fault::client(Code::SessionNotFound).into(), None) };
    let (head, body) = request.into_parts();
    let heard = async {
        let body = read(orchestrator, &head.headers, body, MAX_BODY_BYTES).await?;
        let told = Dispatched { method: head.method.as_str(), path: head.uri.path(), body: &body };
        match call {
            Call::Delivery => delivery(orchestrator, turn, &head.headers, &told).await,
            Call::Denial => denial(orchestrator, turn, &head.headers, &told).await,
        }
    };
    match heard.await {
        Ok(reported) => {
            orchestrator.metrics.reported(call, reported);
            respond(StatusCode::ACCEPTED, None, Bytes::new())
        }
        Err(fault) => {
            orchestrator.metrics.reported(call, Reported::of(fault.code));
            tracing::warn!(code = %fault.code, reason = %fault.message, call = call.as_str(), turn_id = %turn, "report not taken");
            refusal(&fault.into(), Some(turn))
        }
    }
}

async fn delivery(orchestrator: &Orchestrator, turn: TurnId, headers: &HeaderMap, told: &Dispatched<'_>) -> Result<Reported, Fault> {
    let report: DeliveryReport = conversation::report(told.body)?;
    if report.outcome == Delivered::Unknown {
        return Err(Fault::client(Code::InvalidRequest).saying("outcome: only the orchestrator says that it is unknown"));
    }
    let whose = Whose { tenant: &report.tenant, session: &report.session_id, turn };
    orchestrator.court.hear(headers, told, Direction::Output, &whose)?;
    let verdict = report.verdict.as_deref().map(|verdict| orchestrator.court.open(verdict, &whose)).transpose()?;
    let Some(log) = &orchestrator.events else { return Ok(Reported::Unkept) };
    let said = orchestrator.partings.say(turn, end(&report, verdict.as_ref()));
    // What still runs has nobody to read it.
    if timeout(WIND_UP, orchestrator.runs.leave(turn)).await.is_err() {
        return Err(Fault::us(Code::Overloaded).after(Duration::from_secs(1)));
    }
    let key = format!("{}/{}", report.tenant, report.session_id);
    let heard = log.tell(turn, key, Told::of(&report, verdict.as_ref())).await;
    drop(said);
    heard.map(kept).map_err(not_kept)
}

async fn denial(orchestrator: &Orchestrator, turn: TurnId, headers: &HeaderMap, told: &Dispatched<'_>) -> Result<Reported, Fault> {
    let report: DenialReport = conversation::report(told.body)?;
    let whose = Whose { tenant: &report.tenant, session: &report.session_id, turn };
    let claims = orchestrator.court.hear(headers, told, Direction::Input, &whose)?;
    if claims.sub != report.subject.as_str() {
        return Err(Fault::client(Code::VerdictInvalid).saying("subject"));
    }
    let Some(log) = &orchestrator.events else { return Ok(Reported::Unkept) };
    let denial = Denial::of(turn, &report, &claims, &Trace::from_headers(headers));
    log.deny(denial).await.map(kept).map_err(not_kept)
}

/// How a turn ended for the gateway.
fn end(report: &DeliveryReport, verdict: Option<&Claims>) -> End {
    let code = report.code.as_deref().and_then(Code::from_name);
    let gone = [Gone::Left, Gone::Stopped, Gone::Slow, Gone::Drained, Gone::Declined, Gone::Unanswered]
        .into_iter()
        .find(|gone| Some(gone.code()) == code);
    match (report.outcome, gone, code) {
        (Delivered::Denied, _, code) => {
            let mut refusal = Refusal::new(code.unwrap_or(Code::PolicyDenied), "gateway");
            let named = verdict.map(|claims| claims.cat.as_slice()).unwrap_or_default();
            refusal.categories = named.iter().filter_map(|name| Category::from_name(name)).collect();
            Err(refusal.into())
        }
        (Delivered::Cut | Delivered::Delivered | Delivered::Unknown, Some(gone), _) => Err(gone.into()),
        (_, None, Some(Code::StreamLimitExceeded)) => {
            Err(Refusal::new(Code::StreamLimitExceeded, "gateway").finishing(Finish::Length).into())
        }
        (_, None, Some(code)) => Err(Fault::upstream(code).into()),
        (_, None, None) => Err(Gone::Left.into()),
    }
}

fn kept(heard: Heard) -> Reported {
    match heard {
        Heard::Now => Reported::Kept,
        Heard::Again => Reported::Again,
    }
}

fn not_kept(untold: Untold) -> Fault {
    match untold {
        Untold::Unknown => Fault::client(Code::SessionNotFound).saying("there is no such turn"),
        Untold::Late => Fault::client(Code::TurnConflict).saying("something else was written of the turn"),
        Untold::Open => Fault::us(Code::Overloaded).after(Duration::from_secs(1)),
        Untold::Refused(Refused::TooLong) => Fault::client(Code::InvalidRequest).caused_by(untold),
        Untold::Refused(Refused::Full | Refused::Behind | Refused::Sealed | Refused::Known | Refused::Keyless) => {
            Fault::us(Code::EventLogUnavailable).after(Duration::from_secs(1)).caused_by(untold)
        }
    }
}
