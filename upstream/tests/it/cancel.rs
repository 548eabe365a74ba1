//! Leaving stops the model: the connection is closed at once, and an orchestrator is told.

use std::sync::Arc;

use headgate_contracts::Batch;
use headgate_testkit::{
    AT_ONCE, at_once,
    dialect::Answer,
    upstream::{Request, Script, Upstream},
};
use tokio::{sync::Notify, time::Instant};

use crate::{openai, orchestrator, prompt, read};

#[tokio::test]
async fn leaving_before_the_first_byte_closes_the_connection_at_once() {
    let here = Arc::new(Notify::new());
    let model = Upstream::always(Script::new().read().tell(&here).stall()).await;
    let upstream = openai(&model);
    let (prompt, mut batch) = (prompt(), Batch::new());
    tokio::select! {
        opened = upstream.open(&prompt) => panic!("nobody answered: {opened:?}"),
        () = here.notified() => {}
    }
    let left = Instant::now();
    let seen = model.closed(1).await;
    assert!(seen.at - left < AT_ONCE, "{:?}", seen.at - left);
    batch.clear();
    assert_eq!(upstream.health()[0].in_flight, 0);
}

#[tokio::test]
async fn leaving_mid_stream_closes_the_connection_at_once() {
    let events = Answer::openai("m", &["one"]).events();
    let model = Upstream::always(Script::new().read().sse().send_all(events[..2].to_vec()).stall()).await;
    let upstream = openai(&model);
    let mut answer = upstream.open(&prompt()).await.unwrap();
    let mut batch = Batch::new();
    assert!(answer.next(&mut batch).await.unwrap());
    assert_eq!(upstream.health()[0].in_flight, 1);
    let left = Instant::now();
    drop(answer);
    let seen = model.closed(1).await;
    assert!(seen.at - left < AT_ONCE, "{:?}", seen.at - left);
    assert_eq!((upstream.health()[0].in_flight, upstream.health()[0].idle, upstream.stats().left.get()), (0, 0, 1));
}

/// An orchestrator that stalls in its answer and takes cancel calls.
async fn stalling(events: Vec<Vec<u8>>) -> Upstream {
    Upstream::answering(move |request: &Request| {
        if request.target.ends_with("/cancel") {
            Script::new().head(202, headgate_testkit::upstream::Framing::Length(0), &[])
        } else if events.is_empty() {
            Script::new().stall()
        } else {
            Script::new().sse().send_all(events.clone()).stall()
        }
    })
    .await
}

#[tokio::test]
async fn an_orchestrator_is_told_that_a_turn_is_over_mid_stream() {
    let events = Answer::conversation("m", &["one"]).events();
    let model = stalling(events[..2].to_vec()).await;
    let upstream = orchestrator(&model);
    let prompt = prompt();
    let mut answer = upstream.open(&prompt).await.unwrap();
    let mut batch = Batch::new();
    assert!(answer.next(&mut batch).await.unwrap());
    let left = Instant::now();
    drop(answer);
    let told = model.request(1).await;
    assert_eq!((told.method.as_str(), told.target.clone()), ("POST", format!("/v1/conversation/turns/{}/cancel", prompt.turn)));
    assert!(told.arrived - left < AT_ONCE, "{:?}", told.arrived - left);
    let trace = told.header("traceparent").unwrap().to_owned();
    assert!(trace.contains(&prompt.trace.trace_id_hex()), "{trace}");
    at_once(settled(&upstream), "the call to be counted").await;
    assert_eq!((upstream.stats().cancelled.get(), upstream.stats().cancel_failed.get()), (1, 0));
}

async fn settled(upstream: &headgate_upstream::Upstream) {
    while upstream.stats().cancelled.get() + upstream.stats().cancel_failed.get() == 0 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn an_orchestrator_is_told_before_the_first_byte_too() {
    let model = stalling(Vec::new()).await;
    let upstream = orchestrator(&model);
    let prompt = prompt();
    tokio::select! {
        opened = upstream.open(&prompt) => panic!("nobody answered: {opened:?}"),
        _ = model.request(0) => {}
    }
    let told = model.request(1).await;
    assert_eq!(told.target, format!("/v1/conversation/turns/{}/cancel", prompt.turn));
}

#[tokio::test]
async fn a_turn_that_ended_is_not_cancelled() {
    let done = Answer::conversation("m", &["one"]);
    let failed = Answer::new(headgate_testkit::dialect::Dialect::Conversation, "m").open().error("overloaded", "later");
    for stream in [done, failed] {
        let model = Upstream::always(Script::stream([stream.bytes()])).await;
        let upstream = orchestrator(&model);
        let mut answer = upstream.open(&prompt()).await.unwrap();
        let _ = read(&mut answer).await;
        drop(answer);
        // A cancel call would come before the next turn's end.
        let _ = crate::turn(&upstream).await;
        assert!(model.requests().iter().all(|request| !request.target.ends_with("/cancel")));
        assert_eq!((upstream.stats().left.get(), upstream.stats().cancelled.get()), (0, 0));
    }
}

#[tokio::test]
async fn cancel_calls_under_way_are_bounded() {
    let model = Upstream::answering(|request: &Request| {
        // Whoever is to be told does not listen.
        if request.target.ends_with("/cancel") { Script::new().stall() } else { Script::new().sse().stall() }
    })
    .await;
    let upstream = orchestrator(&model);
    let mut answers = Vec::new();
    for _ in 0..100 {
        answers.push(upstream.open(&prompt()).await.unwrap());
    }
    drop(answers);
    assert_eq!(upstream.stats().cancel_failed.get(), 36, "100 left, room for 64");
}
