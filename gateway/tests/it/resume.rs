//! Turns that go on without their client, and clients that come back for the rest.

use std::{sync::Arc, time::Duration};

use headgate_testkit::{
    AT_ONCE, Broken,
    answer::{Event, Judge, Kind, Transcript},
    at_once,
    client::{Events, Http1, Http2, Request, ask, stream},
    dialect::Answer,
    upstream::{Script, Upstream},
    within,
    ws::Ws,
};
use serde_json::json;
use tokio::sync::Notify;

use crate::support::{Gateway, Setup, end};

const SECOND: Duration = Duration::from_secs(1);

/// A model that says the first text, and the others each when it is told to go on.
fn halting(texts: &[&str], go: &Arc<Notify>) -> Script {
    let events = Answer::openai("demo", texts).events();
    // The assistant's role, and then the texts.
    let script = Script::new().read().sse().send(events[..2].concat());
    let script = events[2..=texts.len()].iter().fold(script, |script, event| script.wait(go).send(event.clone()));
    script.wait(go).send(events[texts.len() + 1..].concat()).end()
}

fn came_back(turn: &str, after: Option<u64>) -> Request {
    let request = Request::get(&format!("/v1/chat/stream/{turn}"));
    match after {
        Some(after) => request.header("last-event-id", &format!("{turn}:{after}")),
        None => request,
    }
}

async fn back(gateway: &Gateway, turn: &str, after: Option<u64>) -> Result<Events, Broken> {
    let mut client = Http1::connect(gateway.addr).await;
    client.send(&came_back(turn, after)).await;
    client.events(after.map_or_else(|| Judge::new(Kind::Client), |after| Judge::resumed(turn, after))).await
}

/// Begins a turn, reads its first text, and leaves: its id.
async fn leave(gateway: &Gateway) -> String {
    let mut events = stream(gateway.addr, &Request::turn("hi"), Kind::Client).await.unwrap();
    while events.expect().await.name != "text" {}
    let turn = events.so_far().turn_id().to_owned();
    events.into_inner().abort();
    turn
}

fn last(transcript: &Transcript) -> (&str, &str) {
    (transcript.outcome(), transcript.finish())
}

#[tokio::test]
async fn a_client_that_comes_back_in_its_grace_gets_the_rest_without_a_hole() {
    let go = Arc::new(Notify::new());
    let upstream = Upstream::always(halting(&["one ", "two ", "three"], &go)).await;
    let gateway = Setup::new().chat("cancellation: { on_disconnect: grace 1min }").start(&upstream.url()).await;
    let turn = leave(&gateway).await;
    go.notify_one();
    let mut events = back(&gateway, &turn, Some(1)).await.unwrap();
    assert_eq!(events.expect().await.text("text"), Some("two "));
    // And leaves again, and comes back from the start.
    drop(events);
    let mut events = back(&gateway, &turn, None).await.unwrap();
    for _ in 0..3 {
        events.expect().await;
    }
    assert_eq!(events.so_far().text(), "one two ");
    go.notify_one();
    go.notify_one();
    while events.so_far().text() != "one two three" {
        events.expect().await;
    }
    go.notify_one();
    let whole = events.rest().await.unwrap();
    assert_eq!(last(&whole), ("allowed", "stop"));
    assert_eq!(gateway.ended().await, [end("complete", "ok", 1)]);
    assert_eq!(upstream.opened(), 1, "one answer, whoever reads it");
}

#[tokio::test]
async fn two_devices_read_one_turn() {
    let go = Arc::new(Notify::new());
    let upstream = Upstream::always(halting(&["one ", "two"], &go)).await;
    let gateway = Setup::new().chat("cancellation: { on_disconnect: grace 1min }").start(&upstream.url()).await;
    let mut first = stream(gateway.addr, &Request::turn("hi"), Kind::Client).await.unwrap();
    while first.expect().await.name != "text" {}
    let turn = first.so_far().turn_id().to_owned();
    let second = back(&gateway, &turn, None).await.unwrap();
    go.notify_one();
    go.notify_one();
    let (first, second) = tokio::join!(first.rest(), second.rest());
    let (first, second) = (first.unwrap(), second.unwrap());
    assert_eq!((first.text(), second.text()), ("one two".into(), "one two".into()));
    let raw = |transcript: &Transcript| transcript.events.iter().map(|event| event.raw.clone()).collect::<Vec<_>>();
    assert_eq!(raw(&first), raw(&second), "byte for byte, the verdict too");
}

/// A model that says "begin", and, once it is told to go on, far more than what rings and sockets hold.
fn much(go: &Arc<Notify>) -> Script {
    let long = "x".repeat(100_000);
    let texts: Vec<&str> = std::iter::once("begin").chain(std::iter::repeat_n(long.as_str(), MUCH)).collect();
    let events = Answer::openai("demo", &texts).events();
    Script::new().read().sse().send(events[..2].concat()).wait(go).send_all(events[2..].to_vec()).end()
}

/// How many pieces that has.
const MUCH: usize = 150;

/// An answer with holes names what is missing, and is whole but for that.
fn is_whole_but_for_its_gaps(rest: &Transcript) {
    let missing = |gap: &Event| 1 + gap.data["to"].as_u64().unwrap() - gap.data["from"].as_u64().unwrap();
    let missing: u64 = rest.named("gap").map(missing).sum();
    assert!(missing > 1, "{missing} were missing");
    assert_eq!(rest.named("text").count() as u64 + missing, 1 + MUCH as u64);
    assert_eq!(last(rest), ("allowed", "stop"));
}

#[tokio::test]
async fn a_second_device_that_takes_nothing_does_not_stop_the_first_and_is_told_what_it_missed() {
    for version in [1, 2] {
        let go = Arc::new(Notify::new());
        let upstream = Upstream::always(much(&go)).await;
        let setup = Setup::new().chat("cancellation: { on_disconnect: grace 1min }").chat("backpressure: { stall: 5s }");
        let gateway = setup.top("limits: { answer_bytes: 64MiB }").start(&upstream.url()).await;
        let mut first = stream(gateway.addr, &Request::turn("hi"), Kind::Client).await.unwrap();
        while first.expect().await.name != "text" {}
        let turn = first.so_far().turn_id().to_owned();
        let request = came_back(&turn, Some(0));
        let whole = async {
            go.notify_one();
            first.rest().await.unwrap()
        };
        let (whole, second) = if version == 1 {
            let mut second = Http1::connect_narrow(gateway.addr).await;
            second.send(&request).await;
            let mut second = second.events(Judge::resumed(&turn, 0)).await.unwrap();
            assert_eq!(second.expect().await.text("text"), Some("begin"));
            (whole.await, second.rest().await.unwrap())
        } else {
            // Nobody reads it, whatever its connection takes.
            let mut client = Http2::connect(gateway.addr).await;
            let mut second = client.events(&request, Judge::resumed(&turn, 0)).await.unwrap();
            assert_eq!(second.expect().await.text("text"), Some("begin"));
            (whole.await, second.rest().await.unwrap())
        };
        assert_eq!((whole.named("text").count(), last(&whole)), (1 + MUCH, ("allowed", "stop")));
        is_whole_but_for_its_gaps(&second);
        assert_eq!(gateway.ended().await, [end("complete", "ok", 1)]);
    }
}

#[tokio::test]
async fn a_socket_without_credit_does_not_stop_the_device_that_came_after_it() {
    let go = Arc::new(Notify::new());
    let upstream = Upstream::always(much(&go)).await;
    let setup = Setup::new().chat("cancellation: { on_disconnect: grace 1min }").top("limits: { answer_bytes: 64MiB }");
    let gateway = setup.start(&upstream.url()).await;
    let (mut first, mut second) = (Ws::connect(gateway.addr).await.unwrap(), Ws::connect(gateway.addr).await.unwrap());
    first.turn("a", "hi").await;
    let turn = first.opened("a").await.unwrap();
    assert_eq!(first.next().await.unwrap().unwrap().event.text("text"), Some("begin"));
    first.credit(&turn, 1).await;
    // Answered when the credit before it has been taken up.
    first.send(&json!({"type": "stop", "ref": "nobody's"})).await;
    assert_eq!(first.next().await.unwrap().unwrap().event.text("code"), Some("session_not_found"));
    second.resume(&turn, 0).await;
    assert_eq!(second.next().await.unwrap().unwrap().event.text("text"), Some("begin"));
    go.notify_one();
    let whole = second.finish(&turn).await.unwrap();
    assert_eq!((whole.named("text").count(), last(&whole)), (1 + MUCH, ("allowed", "stop")));
    first.share(&turn);
    first.credit(&turn, 999).await;
    is_whole_but_for_its_gaps(&first.finish(&turn).await.unwrap());
}

#[tokio::test]
async fn without_a_grace_a_turn_is_over_when_its_last_reader_leaves() {
    let go = Arc::new(Notify::new());
    let upstream = Upstream::always(halting(&["one ", "two"], &go)).await;
    let gateway = Setup::new().start(&upstream.url()).await;
    let mut first = stream(gateway.addr, &Request::turn("hi"), Kind::Client).await.unwrap();
    while first.expect().await.name != "text" {}
    let turn = first.so_far().turn_id().to_owned();
    // Of what was read nothing is kept, and that is said.
    let mut second = back(&gateway, &turn, Some(0)).await.unwrap();
    let gap = second.expect().await;
    assert_eq!((gap.name.as_str(), gap.data["from"].as_u64(), gap.data["to"].as_u64()), ("gap", Some(1), Some(1)));
    first.into_inner().abort();
    go.notify_one();
    while second.so_far().text() != "two" {
        second.expect().await;
    }
    second.into_inner().abort();
    at_once(upstream.closed(1), "the model to be stopped").await;
    assert_eq!(gateway.ended().await, [end("cancelled", "client_closed", 1)]);
    assert_eq!(ask(gateway.addr, &came_back(&turn, None)).await.unwrap().status, 404);
}

#[tokio::test]
async fn a_grace_that_runs_out_stops_the_model() {
    let go = Arc::new(Notify::new());
    let upstream = Upstream::always(halting(&["one ", "two"], &go)).await;
    let gateway = Setup::new().chat("cancellation: { on_disconnect: grace 3s }").start(&upstream.url()).await;
    let turn = leave(&gateway).await;
    let left = tokio::time::Instant::now();
    within(3 * SECOND + AT_ONCE, upstream.closed(1), "the model to be stopped").await;
    assert!(left.elapsed() > SECOND * 29 / 10);
    assert_eq!(gateway.ended().await, [end("cancelled", "client_closed", 1)]);
    // What it said can still be fetched for the same time, and how it ended; then it is gone.
    let rest = back(&gateway, &turn, None).await.unwrap().rest().await.unwrap();
    assert_eq!((rest.text().as_str(), rest.error()), ("one ", Some("client_closed")));
    let gone = async { while ask(gateway.addr, &came_back(&turn, None)).await.unwrap().status != 404 {} };
    within(3 * SECOND + AT_ONCE, gone, "the turn to be forgotten").await;
    assert_eq!(gateway.process.app.turns().len(), 0);
}

#[tokio::test]
async fn a_drained_turn_finishes_without_its_client_and_is_fetched_afterwards_with_what_is_lost_named() {
    let go = Arc::new(Notify::new());
    let long = "x".repeat(1000);
    let texts: Vec<&str> = std::iter::once("begin").chain(std::iter::repeat_n(long.as_str(), 50)).collect();
    let events = Answer::openai("demo", &texts).events();
    let script = Script::new().read().sse().send(events[..2].concat()).wait(&go).send_all(events[2..].to_vec()).end();
    let upstream = Upstream::always(script).await;
    let setup = Setup::new().chat("cancellation: { on_disconnect: drain 1min }").chat("backpressure: { max_buffered: 8KiB }");
    let gateway = setup.start(&upstream.url()).await;
    let turn = leave(&gateway).await;
    go.notify_one();
    assert_eq!(gateway.ended().await, [end("complete", "ok", 1)], "it ends as if its client were there");
    for _ in 0..2 {
        let rest = back(&gateway, &turn, Some(1)).await.unwrap().rest().await.unwrap();
        let gap = &rest.events[0];
        let kept = rest.named("text").count() as u64;
        assert_eq!((gap.name.as_str(), gap.data["from"].as_u64(), gap.data["to"].as_u64()), ("gap", Some(2), Some(51 - kept)));
        assert!((5..10).contains(&kept), "8 KiB of them: {kept}");
        assert_eq!(last(&rest), ("allowed", "stop"));
    }
}

#[tokio::test]
async fn a_turn_in_its_grace_is_stopped_on_purpose_like_any_other() {
    let go = Arc::new(Notify::new());
    let upstream = Upstream::always(halting(&["one ", "two"], &go)).await;
    let gateway = Setup::new().chat("cancellation: { on_disconnect: grace 1min }").start(&upstream.url()).await;
    let turn = leave(&gateway).await;
    let stop = Request::new("POST", &format!("/v1/chat/stream/{turn}/stop"));
    assert_eq!(ask(gateway.addr, &stop).await.unwrap().status, 202);
    at_once(upstream.closed(1), "the model to be stopped").await;
    assert_eq!(gateway.ended().await, [end("cancelled", "stopped", 1)]);
    let rest = back(&gateway, &turn, Some(1)).await.unwrap().rest().await.unwrap();
    assert_eq!(rest.error(), Some("stopped"));
}
