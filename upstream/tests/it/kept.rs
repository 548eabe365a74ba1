//! Connections are kept after clean ends, checked before they are used again, and replaced when they turn out dead.

use std::{sync::Arc, time::Duration};

use headgate_testkit::{
    dialect::Answer,
    upstream::{Framing, Script, Upstream},
};
use tokio::sync::Notify;

use crate::{code, openai, prompt, read, turn, upstream};

fn stream() -> Vec<u8> {
    Answer::openai("m", &["one", " two"]).bytes()
}

#[tokio::test]
async fn turn_after_turn_uses_one_connection() {
    let model = Upstream::always(Script::stream([stream()])).await;
    let upstream = openai(&model);
    for _ in 0..20 {
        assert_eq!(turn(&upstream).await.0, "one two");
    }
    assert_eq!((model.opened(), upstream.stats().connected.get(), upstream.stats().reused.get()), (1, 1, 19));
    assert_eq!(upstream.health()[0].idle, 1);
}

#[tokio::test]
async fn the_end_of_the_frame_may_come_after_the_turn_has_ended() {
    // The last chunk is sent only when the test says so: nobody waits for it, and the connection is good all the same.
    let go = Arc::new(Notify::new());
    let here = Arc::new(Notify::new());
    let model = Upstream::always(Script::new().read().sse().send(stream()).wait(&go).end().tell(&here).again()).await;
    let upstream = openai(&model);
    for _ in 0..3 {
        assert_eq!(turn(&upstream).await.0, "one two");
        go.notify_one();
        here.notified().await;
        // What was sent is in our socket once a later round trip on the same machine has been made.
        tokio::net::TcpStream::connect(model.addr()).await.unwrap();
    }
    assert_eq!(upstream.stats().connected.get() + upstream.stats().reused.get(), 3);
    assert!(upstream.stats().reused.get() >= 1);
    assert_eq!(upstream.stats().stale.get(), 0);
}

#[tokio::test]
async fn a_connection_whose_last_answer_has_not_ended_is_not_used_again() {
    let model = Upstream::each([
        Script::new().read().sse().send(stream()).stall(),
        Script::new().read().sse().send(stream()).send(": and on and on\n\n").stall(),
        Script::stream([stream()]),
    ])
    .await;
    let upstream = openai(&model);
    for _ in 0..3 {
        assert_eq!(turn(&upstream).await.0, "one two");
    }
    assert_eq!((upstream.stats().connected.get(), upstream.stats().reused.get()), (3, 0));
}

#[tokio::test]
async fn a_connection_is_not_kept_when_the_server_says_so_or_the_turn_did_not_end_well() {
    let close = [("content-type", "text/event-stream"), ("connection", "close")];
    let events = Answer::openai("m", &["one"]).events();
    let scripts = [
        Script::new().read().head(200, Framing::Chunked, &close).send(stream()).end().stall(),
        Script::new().read().sse_framed(Framing::UntilClose).send(stream()).end(),
        Script::new().read().sse().send(events[1].clone()).send("data: {\"error\":{\"message\":\"x\"}}\n\n").end().stall(),
        Script::new().read().sse().send(stream()).end().raw("HTTP/1.1 200 OK\r\n").stall(),
        Script::new().read().sse().send(stream()).end().close(),
        Script::stream([stream()]),
    ];
    let n = scripts.len();
    let model = Upstream::each(scripts).await;
    let upstream = openai(&model);
    for _ in 0..n {
        let _ = turn(&upstream).await;
        // Long enough for what follows the answer to arrive.
        tokio::net::TcpStream::connect(model.addr()).await.unwrap();
    }
    assert_eq!(upstream.stats().connected.get(), n as u64);
}

#[tokio::test]
async fn a_kept_connection_that_died_unseen_is_replaced_and_the_turn_goes_on() {
    // The server closes when the second request arrives, as one does whose own idle timeout ran out at that moment.
    let model = Upstream::each([Script::new().read().sse().send(stream()).end().read().close(), Script::stream([stream()])]).await;
    let upstream = openai(&model);
    assert_eq!(turn(&upstream).await.0, "one two");
    assert_eq!(turn(&upstream).await.0, "one two");
    assert_eq!((upstream.stats().stale.get(), upstream.stats().retried.get(), model.opened()), (1, 0, 2));
}

#[tokio::test]
async fn a_kept_connection_that_breaks_within_the_head_is_a_fault() {
    let model = Upstream::each([
        Script::new().read().sse().send(stream()).end().read().raw("HTTP/1.1 200 OK\r\n").close(),
        Script::stream([stream()]),
    ])
    .await;
    let upstream = openai(&model);
    assert_eq!(turn(&upstream).await.0, "one two");
    assert_eq!(code(turn(&upstream).await.1), headgate_contracts::Code::UpstreamReset);
    assert_eq!(model.opened(), 1);
}

#[tokio::test]
async fn no_more_connections_are_kept_than_allowed_nor_for_longer() {
    let model = Upstream::always(Script::stream([stream()])).await;
    let upstream = upstream(&[model.url()], |settings| {
        settings.idle.max = 2;
        settings.idle.timeout = Duration::from_millis(30);
        settings.health.interval = Some(Duration::from_millis(10));
    });
    let mut answers = Vec::new();
    for _ in 0..5 {
        answers.push(upstream.open(&prompt()).await.unwrap());
    }
    for answer in &mut answers {
        assert_eq!(read(answer).await.0, "one two");
    }
    assert!(upstream.health()[0].idle <= 2);
    // Three were closed for want of room, the others by age.
    model.closed(5).await;
    assert_eq!(upstream.health()[0].idle, 0);
}
