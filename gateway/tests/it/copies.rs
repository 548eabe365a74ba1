//! Copies of one request, as clients send them who do not know whether the first one arrived: one turn answers them all.

use std::sync::Arc;

use headgate_filters::auth::KeyHash;
use headgate_testkit::{
    answer::Kind,
    client::{Events, Request, ask, stream},
    dialect::{Answer, Cut},
    soon,
    upstream::{Script, Upstream},
};
use serde_json::json;
use tokio::{sync::Notify, task::JoinSet};

use crate::support::{Setup, end, start};

fn keyed(key: &str, content: &str) -> Request {
    Request::turn(content).header("idempotency-key", key)
}

/// Says "Hello", and "world" once it is told to go on.
fn halting(go: &Arc<Notify>) -> Script {
    let mut events = Answer::openai("demo", &["Hello", " world"]).events();
    let rest = events.split_off(2);
    Script::new().read().sse().send(events.concat()).wait(go).send(rest.concat()).end()
}

fn hello() -> Script {
    Script::stream(Answer::openai("demo", &["Hello"]).cut(Cut::Events))
}

async fn said_something(events: &mut Events) {
    while events.expect().await.name != "text" {}
}

#[tokio::test]
async fn a_hundred_racing_copies_of_a_request_have_one_turn() {
    let go = Arc::new(Notify::new());
    let upstream = Upstream::always(halting(&go)).await;
    let gateway = Setup::new().start(&upstream.url()).await;
    let mut racing = JoinSet::new();
    for _ in 0..100 {
        let addr = gateway.addr;
        racing.spawn(async move {
            let mut events = stream(addr, &keyed("k1", "hi"), Kind::Client).await.unwrap();
            said_something(&mut events).await;
            events
        });
    }
    let all = soon(racing.join_all(), "every copy to hear the beginning").await;
    go.notify_one();
    let mut turns = Vec::new();
    for events in all {
        turns.push(events.head.header("x-headgate-turn").unwrap().to_owned());
        assert_eq!(events.rest().await.unwrap().text(), "Hello world");
    }
    turns.dedup();
    assert_eq!((turns.len(), upstream.requests().len()), (1, 1));
    assert_eq!(gateway.ended().await, [end("complete", "ok", 1)]);
}

#[tokio::test]
async fn a_turn_that_is_over_is_told_again_word_by_word() {
    let upstream = Upstream::always(hello()).await;
    let gateway = Setup::new().start(&upstream.url()).await;
    let whole = || Request::post("/v1/chat/completions", &json!({"model": "demo", "messages": [{"role": "user", "content": "hi"}]}));
    let chunks = || Request::completion("demo", "hi");
    for (key, request) in [("k1", Request::turn("hi")), ("k1", whole()), ("k2", chunks())] {
        let request = request.header("idempotency-key", key);
        let first = ask(gateway.addr, &request).await.unwrap();
        let again = ask(gateway.addr, &request).await.unwrap();
        assert_eq!((first.status, first.text()), (200, again.text()));
        assert_eq!(first.header("x-headgate-turn"), again.header("x-headgate-turn"));
    }
    // One key names another turn on each route.
    assert_eq!(upstream.requests().len(), 3);
}

#[tokio::test]
async fn what_is_too_long_to_be_told_again_never_looks_whole_to_who_speaks_openai() {
    let long = "x".repeat(1000);
    let upstream = Upstream::always(Script::stream(Answer::openai("demo", &[long.as_str(); 100]).cut(Cut::Events))).await;
    let gateway = Setup::chain(&["backpressure: { max_buffered: 8KiB }"]).start(&upstream.url()).await;
    let messages = json!({"model": "demo", "messages": [{"role": "user", "content": "hi"}]});
    let whole = Request::post("/v1/chat/completions", &messages).header("idempotency-key", "k1");
    let chunks = || Request::completion("demo", "hi").header("idempotency-key", "k2");
    assert_eq!(ask(gateway.addr, &whole).await.unwrap().status, 200);
    let again = ask(gateway.addr, &whole).await.unwrap();
    assert_eq!((again.status, again.problem().unwrap().as_str()), (404, "session_not_found"));
    let first = stream(gateway.addr, &chunks(), Kind::OpenAi).await.unwrap().rest().await.unwrap();
    assert_eq!((first.text().len(), first.finish()), (100_000, "stop"));
    let again = stream(gateway.addr, &chunks(), Kind::OpenAi).await.unwrap().rest().await.unwrap();
    assert_eq!((again.error(), again.text().as_str()), (Some("session_not_found"), ""));
    assert_eq!(upstream.requests().len(), 2);
}

#[tokio::test]
async fn a_key_that_was_used_for_something_else_is_a_conflict() {
    let upstream = Upstream::always(hello()).await;
    let gateway = Setup::new().start(&upstream.url()).await;
    assert_eq!(ask(gateway.addr, &keyed("k1", "hi")).await.unwrap().status, 200);
    let other = ask(gateway.addr, &keyed("k1", "ho")).await.unwrap();
    assert_eq!((other.status, other.problem().unwrap().as_str()), (409, "idempotency_mismatch"));
    assert_eq!(ask(gateway.addr, &keyed("k2", "ho")).await.unwrap().status, 200);
    assert_eq!(upstream.requests().len(), 2);
}

#[tokio::test]
async fn a_key_of_another_tenant_or_subject_is_another_key() {
    let people = [("hg_1", "acme", "u1"), ("hg_2", "acme", "u2"), ("hg_3", "other", "u1")];
    let secret = |name: &str| format!("{name}{}", "0".repeat(64));
    let keys = people
        .map(|(name, tenant, subject)| format!("{{ key: \"{}\", tenant: {tenant}, subject: {subject} }}", KeyHash::of(&secret(name))));
    let upstream = Upstream::always(hello()).await;
    let gateway = Setup::chain(&[&format!("auth: {{ keys: [{}] }}", keys.join(", "))]).start(&upstream.url()).await;
    let mut turns = Vec::new();
    for (name, ..) in people {
        for content in ["hi", "hi"] {
            let reply = ask(gateway.addr, &keyed("k1", content).bearer(&secret(name))).await.unwrap();
            assert_eq!(reply.status, 200, "{}", reply.text());
            turns.push(reply.header("x-headgate-turn").unwrap().to_owned());
        }
    }
    turns.dedup();
    assert_eq!((turns.len(), upstream.requests().len()), (3, 3));
    let nobody = ask(gateway.addr, &keyed("k1", "hi")).await.unwrap();
    assert_eq!((nobody.status, nobody.problem().unwrap().as_str()), (401, "unauthenticated"));
}

#[tokio::test]
async fn a_turn_that_came_to_nothing_frees_its_key() {
    let broken = Script::new().read().sse().reset();
    let go = Arc::new(Notify::new());
    let upstream = Upstream::each([broken, halting(&go), hello()]).await;
    let (plan, folder) = Setup::new().upstream("retry: { attempts: 0 }").plan(&upstream.url());
    let gateway = start(&plan, folder).await;
    // It broke.
    assert_ne!(ask(gateway.addr, &keyed("k1", "hi")).await.unwrap().status, 200);
    // Its client left.
    let mut events = stream(gateway.addr, &keyed("k1", "hi"), Kind::Client).await.unwrap();
    said_something(&mut events).await;
    drop(events);
    soon(upstream.closed(1), "the model to be stopped").await;
    gateway.ended().await;
    // It is asked for the third time.
    assert_eq!(stream(gateway.addr, &keyed("k1", "ho"), Kind::Client).await.unwrap().rest().await.unwrap().text(), "Hello");
    assert_eq!(upstream.requests().len(), 3);
}

#[tokio::test]
async fn a_copy_keeps_the_turn_of_a_client_who_leaves() {
    let go = Arc::new(Notify::new());
    let upstream = Upstream::always(halting(&go)).await;
    let gateway = Setup::new().start(&upstream.url()).await;
    let mut first = stream(gateway.addr, &keyed("k1", "hi"), Kind::Client).await.unwrap();
    said_something(&mut first).await;
    let mut second = stream(gateway.addr, &keyed("k1", "hi"), Kind::Client).await.unwrap();
    said_something(&mut second).await;
    first.into_inner().abort();
    go.notify_one();
    assert_eq!(second.rest().await.unwrap().text(), "Hello world");
    assert_eq!(upstream.requests().len(), 1);
}
