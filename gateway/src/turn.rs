//! One turn, from prompt to end: the whole data path. No other function knows all the parts.

use std::future::Future;

use headgate_contracts::{Batch, Code, End, Finish, Head, Prompt, Refusal, Stop, Turn, wire::chat::Confirmation};
use headgate_filters::Chain;
use headgate_upstream::{Answer, Line, Upstream};
use tokio::{select, time::sleep};

use crate::{outbox::Outbox, telemetry::Watch};

/// Runs one turn. Dropping it at any point drops the answer, and that stops the model, before the first byte too.
///
/// What is waited for, all at once: the client is gone; the deadline came; a filter made up its mind or its hold ran out;
/// the next batch came.
#[expect(clippy::manual_async_fn, reason = "an async fn keeps its arguments twice, for as long as the turn lasts")]
pub fn run(
    mut turn: Turn,
    mut prompt: Prompt,
    mut chain: Chain,
    upstream: Upstream,
    outbox: Outbox,
    mut watch: Watch,
) -> impl Future<Output = ()> + Send {
    async move {
        let end = select! { biased;
            gone = outbox.gone() => Err(gone.into()),
            () = sleep(turn.flow.deadline) => Err(over("route.deadline")),
            end = async {
                let end = flow(&turn, &mut prompt, &mut chain, &upstream, &outbox, &mut watch).await;
                rest(end, &mut chain, &outbox, &mut watch).await
            } => end,
        };
        let mut last = Batch::new();
        let end = chain.end(end, &mut last, &mut turn.record); // what is still held is late
        let slip = watch.slip(&turn, &prompt, &end); // for what the orchestrator hears of it, once the client has taken it
        let record = outbox.close(&turn, &last, &end, slip); // the ending in the client's own dialect
        watch.end(&turn, &prompt, &chain, &record, &end); // one log line, metrics, the span's end
    }
}

async fn flow(turn: &Turn, prompt: &mut Prompt, chain: &mut Chain, upstream: &Upstream, outbox: &Outbox, watch: &mut Watch) -> End {
    // What happens once is boxed: a future is as large as the largest it waits for, and an answer lasts.
    Box::pin(chain.prompt(prompt)).await?;
    watch.admitted(prompt);
    let mut answer: Answer = Box::pin(upstream.open(prompt)).await?; // retries live in here: before the first byte only
    watch.answered(answer.endpoint());
    prompt.messages = Vec::new(); // sent, and of no more use
    let mut batch = Batch::new();
    let mut more = answer.next(&mut batch).await?; // the first events say whose answer it is
    chain.head(&mut answer.head)?;
    let headers = std::mem::take(&mut answer.head.headers);
    outbox.open(turn, Head { headers, ..answer.head.clone() });
    while more {
        watch.read();
        let passed = chain.pass(&mut batch); // in: what came; out: what may go
        if answer.asks() && passed.is_ok() {
            let line = answer.line(watch.caller(turn, prompt.seal.clone()));
            Box::pin(ask(&batch, line, outbox)).await?; // before it can be answered
        }
        outbox.send(&batch).await?; // waits while the client is behind: the backpressure
        watch.sent(&batch);
        passed?;
        if outbox.text_bytes() > turn.flow.max_text {
            return Err(over("route.max_text"));
        }
        batch.clear();
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
