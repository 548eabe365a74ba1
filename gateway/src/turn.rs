//! One turn, from prompt to end: the whole data path. No other function knows all the parts.

use std::future::Future;

use headgate_contracts::{Batch, Code, End, Finish, Head, Prompt, Refusal, Stop, Turn, wire::chat::Confirmation};
use headgate_filters::Chain;
use headgate_upstream::{Alarm, Answer, Line, Upstream};
use tokio::select;

use crate::{outbox::Outbox, telemetry::Watch};

/// Runs one turn. Dropping it at any point drops the answer, and that stops the model, before the first byte too.
///
/// What is waited for, all at once: the client is gone; the deadline came; a filter made up its mind or its hold ran out;
/// the next batch came.
// No async fn: that keeps its arguments twice, for as long as the turn lasts.
pub fn run(
    mut turn: Turn,
    prompt: Box<Prompt>,
    mut chain: Chain,
    upstream: Upstream,
    outbox: Outbox,
    mut watch: Watch,
) -> impl Future<Output = ()> + Send {
    let mut prompt = Some(prompt);
    async move {
        let mut deadline = Alarm::after(turn.flow.deadline);
        let end = select! { biased;
            gone = outbox.gone() => Err(gone.into()),
            () = deadline.ring() => Err(over("route.deadline")),
            end = async {
                let end = flow(&turn, &mut prompt, &mut chain, &upstream, &outbox, &mut watch).await;
                rest(end, &mut chain, &outbox, &mut watch).await
            } => end,
        };
        if let Some(prompt) = prompt.take() {
            watch.known(&prompt); // it was not sent, so it may be that nobody said yet whose it is
        }
        let mut last = Batch::new();
        let end = chain.end(end, &mut last, &mut turn.record); // what is still held is late
        let slip = watch.slip(&turn, &end); // for what the orchestrator hears of it, once the client has taken it
        let record = outbox.close(&turn, &last, &end, slip); // the ending in the client's own dialect
        watch.end(&turn, &chain, &record, &end); // one log line, metrics, the span's end
    }
}

/// `prompt`: there until it was sent. An answer lasts, and nothing asks for it any more.
async fn flow(
    turn: &Turn,
    prompt: &mut Option<Box<Prompt>>,
    chain: &mut Chain,
    upstream: &Upstream,
    outbox: &Outbox,
    watch: &mut Watch,
) -> End {
    let Some(asked) = prompt else { return Ok(()) };
    // What happens once is boxed: a future is as large as the largest it waits for.
    Box::pin(chain.prompt(asked)).await?;
    watch.admitted(asked);
    let mut answer: Answer = Box::pin(upstream.open(asked)).await?; // retries live in here: before the first byte only
    watch.answered(answer.endpoint());
    let seal = asked.seal.take(); // of all that it held this alone may still be of use
    *prompt = None;
    let mut batch = Batch::new();
    let mut more = answer.next(&mut batch).await?; // the first events say whose answer it is
    chain.head(&mut answer.head)?;
    let headers = std::mem::take(&mut answer.head.headers);
    outbox.open(turn, Head { headers, ..answer.head.clone() });
    while more {
        watch.read(answer.read_at());
        let passed = chain.pass(&mut batch).map_err(Box::new); // in: what came; out: what may go
        if answer.asks() && passed.is_ok() {
            let line = answer.line(watch.caller(turn, seal.clone()));
            Box::pin(ask(&batch, line, outbox)).await?; // before it can be answered
        }
        outbox.send(&batch).await?; // waits while the client is behind: the backpressure
        watch.sent(&batch);
        passed.map_err(|stop| *stop)?;
        if outbox.text_bytes() > turn.flow.max_text {
            return Err(over("route.max_text"));
        }
        batch.give_back();
        select! { biased;
            () = chain.ripen() => {}                                            // a waited-for verdict came, or a hold ran out
            next = answer.next(&mut batch), if chain.has_room() => more = next?,
        }
    }
    Ok(())
}

/// Opens the way back for what a person says to the question in a batch. Where the client's dialect has none, the answer is no.
async fn ask(batch: &Batch, line: Line, outbox: &Outbox) -> Result<(), Stop> {
    // One at a time: of several the last one is open.
    let Some(question) = batch.events().iter().rev().find_map(|event| batch.question(event)) else { return Ok(()) };
    if let Some(line) = outbox.ask(question.id, line) {
        line.confirm(&Confirmation { id: question.id.to_owned(), accept: false }).await?;
    }
    Ok(())
}

/// The answer has ended, however it did. What a filter still thinks about has the time its terms give.
async fn rest(end: End, chain: &mut Chain, outbox: &Outbox, watch: &mut Watch) -> End {
    let mut batch = Batch::new();
    let mut more = !matches!(end, Err(Stop::Gone(_)));
    while more {
        more = chain.rest(&mut batch).await;
        outbox.send(&batch).await?;
        watch.sent(&batch);
    }
    end
}

fn over(rule: &'static str) -> Stop {
    Refusal::new(Code::StreamLimitExceeded, rule).finishing(Finish::Length).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes<A, B, C, D, E, F, T>(_: impl Fn(A, B, C, D, E, F) -> T) -> usize {
        size_of::<T>()
    }

    /// What it is made of, where this fails: `-Zprint-type-sizes`.
    #[test]
    fn a_turn_that_waits_takes_little_room() {
        assert!(bytes(run) <= 1600, "{}", bytes(run));
    }
}
