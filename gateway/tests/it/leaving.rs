//! Clients that leave: the model is stopped, whenever and however they do, and the turn leaves one record behind.

use std::sync::Arc;

use headgate_testkit::{
    answer::{Judge, Kind},
    at_once,
    client::{Http1, Request, ask, stream},
    dialect::Answer,
    soon,
    upstream::{Script, Upstream},
};
use serde_json::json;
use tokio::sync::Notify;

use crate::support::{Gateway, Setup, end, key};

/// A model that begins an answer and then says no more.
fn begun() -> Script {
    Script::new().read().sse().send(Answer::openai("demo", &["Hello"]).events()[..2].concat()).stall()
}

async fn reads_text(client: Http1) -> Http1 {
    let mut events = client.events(Judge::new(Kind::Client)).await.unwrap();
    while events.expect().await.name != "text" {}
    events.into_inner()
}

/// The model is closed, one turn has ended as its client's leaving, and nothing of it is left.
async fn is_over(gateway: &Gateway, upstream: &Upstream, turns: u64) {
    at_once(upstream.closed(turns as usize), "the model to be stopped").await;
    assert_eq!(gateway.ended().await, [end("cancelled", "client_closed", turns)]);
    at_once(
        async {
            while !gateway.process.app.turns().is_empty() {
                tokio::task::yield_now().await
            }
        },
        "no turn to be left",
    )
    .await;
}

#[derive(Clone, Copy, Debug)]
enum How {
    Reset,
    Close,
    HalfClose,
    /// A byte of a next request comes later.
    Byte,
    /// The next request is in the same write as the turn's own; then the client goes.
    PipelinedAndClose,
}

#[tokio::test]
async fn a_client_who_leaves_stops_the_model_before_the_first_byte_and_after_however_it_leaves() {
    for is_begun in [false, true] {
        for how in [How::Reset, How::Close, How::HalfClose, How::Byte, How::PipelinedAndClose] {
            let here = Arc::new(Notify::new());
            let silent = Script::new().read().tell(&here).stall();
            let upstream = Upstream::always(if is_begun { begun() } else { silent }).await;
            let gateway = Setup::new().start(&upstream.url()).await;
            let mut client = Http1::connect(gateway.addr).await;
            match how {
                How::PipelinedAndClose => {
                    let both = [Request::turn("hi").bytes("h"), Request::turn("again").bytes("h")].concat();
                    client.send_bytes(&both).await;
                }
                _ => client.send(&Request::turn("hi")).await,
            }
            if is_begun {
                client = reads_text(client).await;
            } else {
                soon(here.notified(), "the model to be asked").await;
            }
            match how {
                How::Reset => client.abort(),
                How::Close | How::PipelinedAndClose => drop(client),
                How::HalfClose => {
                    client.half_close().await;
                    let mut rest = Vec::new();
                    while let Some(more) = client.read_bytes(1 << 16).await.ok().filter(|more| !more.is_empty()) {
                        rest.extend_from_slice(&more);
                    }
                    assert!(!rest.ends_with(b"0\r\n\r\n"), "a cut is never a proper end");
                }
                How::Byte => {
                    client.send_bytes(b"P").await;
                    let _ = client.closed().await;
                }
            }
            is_over(&gateway, &upstream, 1).await;
        }
    }
}

#[tokio::test]
async fn requests_in_one_write_are_answered_in_order_all_the_same() {
    let upstream = Upstream::answering(|request| {
        let text = if request.body.windows(3).any(|bytes| bytes == b"one") { "first" } else { "second" };
        Script::stream(Answer::openai("demo", &[text]).events())
    })
    .await;
    let gateway = Setup::new().start(&upstream.url()).await;
    let mut client = Http1::connect(gateway.addr).await;
    client.send_bytes(&[Request::turn("one").bytes("h"), Request::turn("two").bytes("h")].concat()).await;
    for text in ["first", "second"] {
        let mut events = client.events(Judge::new(Kind::Client)).await.unwrap();
        while events.next().await.unwrap().is_some() {}
        assert_eq!(events.so_far().text(), text);
        client = events.into_inner();
    }
    assert_eq!(gateway.ended().await, [end("complete", "ok", 2)]);
}

#[tokio::test]
async fn a_client_of_a_whole_answer_who_leaves_stops_the_model_too() {
    let upstream = Upstream::always(begun()).await;
    let gateway = Setup::new().start(&upstream.url()).await;
    let mut client = Http1::connect(gateway.addr).await;
    client.send(&Request::post("/v1/chat/completions", &json!({"model": "demo", "messages": [{"role": "user", "content": "hi"}]}))).await;
    upstream.request(0).await;
    drop(client);
    is_over(&gateway, &upstream, 1).await;
}

#[tokio::test]
async fn a_turn_stopped_on_purpose_keeps_what_it_said_and_says_why_it_ended() {
    let upstream = Upstream::always(begun()).await;
    let gateway = Setup::new().start(&upstream.url()).await;
    let mut events = stream(gateway.addr, &Request::turn("hi"), Kind::Client).await.unwrap();
    while events.expect().await.name != "text" {}
    let turn = events.so_far().turn_id().to_owned();
    let reply = ask(gateway.addr, &Request::new("POST", &format!("/v1/chat/stream/{turn}/stop"))).await.unwrap();
    assert_eq!((reply.status, reply.text().as_str()), (202, ""));
    let stopped = events.rest().await.unwrap();
    assert_eq!((stopped.text().as_str(), stopped.error()), ("Hello", Some("stopped")));
    at_once(upstream.closed(1), "the model to be stopped").await;
    assert_eq!(gateway.ended().await, [end("cancelled", "stopped", 1)]);
}

#[tokio::test]
async fn anothers_turn_is_not_found_in_the_same_words_as_one_that_never_was() {
    let upstream = Upstream::always(begun()).await;
    let (mine, _) = key();
    let other = mine.replace("hg_0", "hg_1");
    let hash = |key: &str| headgate_filters::auth::KeyHash::of(key).to_string();
    let auth = |subject: [&str; 2], tenants: [&str; 2]| {
        format!(
            "auth: {{ keys: [{{ key: \"{}\", tenant: {}, subject: {} }}, {{ key: \"{}\", tenant: {}, subject: {} }}] }}",
            hash(mine),
            tenants[0],
            subject[0],
            hash(&other),
            tenants[1],
            subject[1]
        )
    };
    for auth in [auth(["u1", "u2"], ["acme", "acme"]), auth(["u1", "u1"], ["acme", "evil"])] {
        let gateway = Setup::chain(&[&auth]).start(&upstream.url()).await;
        let mut events = stream(gateway.addr, &Request::turn("hi").bearer(mine), Kind::Client).await.unwrap();
        while events.expect().await.name != "text" {}
        let turn = events.so_far().turn_id().to_owned();
        let never = "0193a5f0-7e1c-7000-8000-000000000000";
        for (method, suffix) in [("GET", ""), ("POST", "/stop")] {
            let ask_as = async |turn: &str, key: &str| {
                let reply = ask(gateway.addr, &Request::new(method, &format!("/v1/chat/stream/{turn}{suffix}")).bearer(key)).await.unwrap();
                (reply.status, reply.problem().unwrap(), reply.text())
            };
            let anothers = ask_as(&turn, &other).await;
            assert_eq!((anothers.0, anothers.1.as_str()), (404, "session_not_found"));
            assert_eq!(anothers, ask_as(never, &other).await);
        }
        assert_eq!(gateway.open().await, 1, "it goes on");
    }
}
