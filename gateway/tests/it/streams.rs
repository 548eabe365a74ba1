//! A turn over server-sent events.

use std::sync::Arc;

use headgate_testkit::{
    answer::Kind,
    at_once,
    client::{Http1, Request, ask, stream},
    dialect::{Answer, Cut},
    soon,
    upstream::{Script, Upstream},
};
use serde_json::json;
use tokio::sync::Notify;

use crate::support::Setup;

fn model(texts: &[&str]) -> Script {
    Script::stream(Answer::openai("demo", texts).cut(Cut::Events))
}

#[tokio::test]
async fn an_answer_streams_to_its_end() {
    let upstream = Upstream::always(model(&["Hello", " there", ", é!"])).await;
    let gateway = Setup::new().start(&upstream.url()).await;
    let answer = stream(gateway.addr, &Request::turn("hi"), Kind::Client).await.unwrap().rest().await.unwrap();
    assert_eq!(answer.text(), "Hello there, é!");
    assert_eq!((answer.outcome(), answer.finish()), ("allowed", "stop"));
}

#[tokio::test]
async fn a_phrase_cut_over_three_events_is_masked_and_the_verdict_says_so() {
    let upstream = Upstream::always(model(&["Write to bob", "@exam", "ple.com now"])).await;
    let gateway = Setup::chain(&["moderation: { mask: [email] }", "policy_headers"]).start(&upstream.url()).await;
    let answer = stream(gateway.addr, &Request::turn("hi"), Kind::Client).await.unwrap().rest().await.unwrap();
    assert_eq!(answer.text(), "Write to ••• now");
    assert_eq!(answer.outcome(), "masked");
    assert_eq!(answer.verdict().split('.').count(), 3);
}

#[tokio::test]
async fn a_denied_phrase_cuts_the_answer_before_its_first_byte() {
    let upstream = Upstream::always(model(&["The name is blue", "bird, and", " more"])).await;
    let setup = Setup::chain(&["moderation: { deny: [deny.txt] }"]).file("deny.txt", "bluebird\n");
    let gateway = setup.start(&upstream.url()).await;
    let answer = stream(gateway.addr, &Request::turn("hi"), Kind::Client).await.unwrap().rest().await.unwrap();
    assert_eq!(answer.text(), "The name is ");
    assert_eq!((answer.outcome(), answer.finish()), ("blocked", "content_filter"));
}

#[tokio::test]
async fn a_client_who_leaves_stops_the_model_before_the_first_byte_too() {
    let here = Arc::new(Notify::new());
    let silent = Script::new().read().tell(&here).stall();
    let upstream = Upstream::always(silent).await;
    let gateway = Setup::new().start(&upstream.url()).await;
    let mut client = Http1::connect(gateway.addr).await;
    client.send(&Request::turn("hi")).await;
    soon(here.notified(), "the model to be asked").await;
    client.abort();
    at_once(upstream.closed(1), "the model to be stopped").await;
    at_once(
        async {
            while !gateway.process.app.turns().is_empty() {
                tokio::task::yield_now().await
            }
        },
        "the turn to end",
    )
    .await;
}

#[tokio::test]
async fn a_client_who_leaves_in_the_middle_stops_the_model() {
    let begun = Answer::openai("demo", &["Hello"]).events()[..2].concat();
    let upstream = Upstream::always(Script::new().read().sse().send(begun).stall()).await;
    let gateway = Setup::new().start(&upstream.url()).await;
    let mut events = stream(gateway.addr, &Request::turn("hi"), Kind::Client).await.unwrap();
    while events.expect().await.name != "text" {}
    events.into_inner().abort();
    at_once(upstream.closed(1), "the model to be stopped").await;
}

#[tokio::test]
async fn an_upstream_that_is_cut_is_an_error_and_never_an_end() {
    let whole = Answer::openai("demo", &["Hello", " there"]).events().concat();
    for at in (0..whole.len()).step_by(7) {
        let upstream = Upstream::always(Script::new().read().sse().send(whole[..at].to_vec()).reset()).await;
        let gateway = Setup::new().start(&upstream.url()).await;
        match stream(gateway.addr, &Request::turn("hi"), Kind::Client).await {
            Ok(events) => {
                let answer = events.rest().await.unwrap();
                assert_eq!(answer.error(), Some("upstream_reset"), "cut at {at}");
            }
            Err(refused) => assert!(refused.to_string().contains("502"), "cut at {at}: {refused}"),
        }
    }
}

#[tokio::test]
async fn without_a_model_the_status_says_so() {
    let refusing = headgate_testkit::upstream::Refusing::start();
    let gateway = Setup::new().start(&format!("http://{}", refusing.addr())).await;
    let reply = ask(gateway.addr, &Request::turn("hi")).await.unwrap();
    assert_eq!((reply.status, reply.problem().unwrap().as_str()), (502, "upstream_connect_failed"));
}

#[tokio::test]
async fn openai_clients_get_chunks_or_one_whole_answer() {
    let upstream = Upstream::always(model(&["Hello", " there"])).await;
    let gateway = Setup::new().start(&upstream.url()).await;
    let chunks = stream(gateway.addr, &Request::completion("demo", "hi"), Kind::OpenAi).await.unwrap().rest().await.unwrap();
    assert_eq!(chunks.text(), "Hello there");
    let reply = ask(
        gateway.addr,
        &Request::post("/v1/chat/completions", &json!({"model": "demo", "messages": [{"role": "user", "content": "hi"}]})),
    )
    .await
    .unwrap();
    assert_eq!(reply.status, 200);
    assert_eq!(reply.json()["choices"][0]["message"]["content"], "Hello there");
}

#[tokio::test]
async fn a_connection_carries_answers_of_every_kind_one_after_the_other_until_it_is_told_to_close() {
    let upstream = Upstream::always(model(&["Hello"])).await;
    let gateway = Setup::new().start(&upstream.url()).await;
    let messages = json!([{"role": "user", "content": "hi"}]);
    let whole = Request::post("/v1/chat/completions", &json!({"model": "demo", "messages": messages}));
    let wrong = Request::post("/v1/chat/stream", &json!({"messages": []}));
    let mut client = Http1::connect(gateway.addr).await;
    for _ in 0..2 {
        for (request, status, kind) in [
            (Request::turn("hi"), 200, "text/event-stream"),
            (whole.clone(), 200, "application/json"),
            (wrong.clone(), 400, "application/problem+json"),
            (Request::completion("demo", "hi"), 200, "text/event-stream"),
            (Request::get("/nowhere"), 404, "application/problem+json"),
        ] {
            client.send(&request).await;
            let reply = client.reply().await.unwrap();
            assert_eq!((reply.status, reply.header("content-type"), reply.header("connection")), (status, Some(kind), None));
            assert_eq!(reply.head.all("date").count(), 1);
        }
    }
    client.send(&Request::turn("hi").header("connection", "close")).await;
    let last = client.reply().await.unwrap();
    assert!(last.text().contains("event: done"));
    assert_eq!(last.header("connection"), Some("close"));
    client.closed().await.unwrap();
}

#[tokio::test]
async fn a_client_of_http_1_0_reads_its_answer_until_the_connection_ends() {
    let upstream = Upstream::always(model(&["Hello"])).await;
    let gateway = Setup::new().start(&upstream.url()).await;
    let mut client = Http1::connect(gateway.addr).await;
    let request = String::from_utf8(Request::turn("hi").bytes("h").to_vec()).unwrap().replacen("HTTP/1.1", "HTTP/1.0", 1);
    client.send_bytes(request.as_bytes()).await;
    let mut answer = Vec::new();
    loop {
        match client.read_bytes(1 << 16).await.unwrap() {
            bytes if bytes.is_empty() => break,
            bytes => answer.extend_from_slice(&bytes),
        }
    }
    let answer = String::from_utf8(answer).unwrap();
    assert!(!answer.to_lowercase().contains("chunked"), "{answer}");
    assert!(answer.ends_with("\n\n") && answer.contains("event: done"), "{answer}");
}
