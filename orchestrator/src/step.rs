//! Collects a turn into one JSON answer.

use headgate_contracts::{Head, wire::conversation::StepAnswer};
use http::{Response, StatusCode};

use crate::{
    front::{Body, refusal, respond},
    run::Run,
    socket::Request,
};

/// The answer of a turn whose first batch has been read; a fault on the way is the whole response, because nothing was sent yet.
pub(crate) async fn answer(mut run: Run, caller: &Request) -> Response<Body> {
    // Asked for now, because the end of the turn leaves the model.
    let head = Head { model: run.model().to_owned(), ..Head::default() };
    loop {
        match run.advance(Some(caller)).await {
            Ok(true) => {}
            Ok(false) => {
                let answer = StepAnswer::of(run.turn, &head, &run.said);
                return respond(StatusCode::OK, Some("application/json"), answer.body().into());
            }
            Err(stop) => return refusal(&stop, Some(run.turn)),
        }
    }
}
