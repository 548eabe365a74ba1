//! Clients that read slowly or not at all: the model waits, memory stays bounded, nobody else notices; and silence.

use std::{sync::Arc, time::Duration};

use headgate_testkit::{
    AT_ONCE,
    answer::{Judge, Kind},
    at_once,
    client::{Http1, Http2, Request, stream},
    dialect::Answer,
    upstream::{Script, Upstream},
    within,
    ws::Ws,
};
use tokio::{sync::Notify, time::Instant};

use crate::support::{Gateway, Setup, end};

const SECOND: Duration = Duration::from_secs(1);

/// A model that never stops.
fn flood() -> Script {
    let events = Answer::openai("demo", &[&"x".repeat(1000)]).events();
    Script::new().read().sse().send(events[0].clone()).flood(events[1].clone())
}

/// An upstream that floods whoever asks for it, and answers everybody else.
async fn both() -> Upstream {
    Upstream::answering(|request| match request.body.windows(5).any(|bytes| bytes == b"flood") {
        true => flood(),
        false => Script::stream(Answer::openai("demo", &["Hello"]).events()),
    })
    .await
}

/// How many bytes of an answer that a reader takes nothing of may be under way in all: the turn's own bound, one batch and
/// what hyper takes of it, and the system's buffers of two connections.
fn most(max_buffered: u64) -> u64 {
    let limit = |name: &str| -> u64 {
        let limits = std::fs::read_to_string(format!("/proc/sys/net/ipv4/{name}")).expect("limits of the system");
        limits.split_whitespace().last().and_then(|most| most.parse().ok()).expect("a number")
    };
    4 * max_buffered + 2 * (limit("tcp_wmem") + limit("tcp_rmem"))
}

async fn neighbours_are_served(gateway: &Gateway) {
    for _ in 0..20 {
        let begun = Instant::now();
        let answer = stream(gateway.addr, &Request::turn("hi"), Kind::Client).await.unwrap().rest().await.unwrap();
        assert_eq!(answer.text(), "Hello");
        assert!(begun.elapsed() < AT_ONCE);
    }
}

#[tokio::test]
async fn a_client_that_reads_nothing_stops_the_reading_of_the_model_and_then_loses_its_turn() {
    let upstream = both().await;
    let gateway = Setup::new().chat("backpressure: { max_buffered: 64KiB, stall: 3s }").start(&upstream.url()).await;
    let mut client = Http1::connect_narrow(gateway.addr).await;
    client.send(&Request::turn("flood")).await;
    let read = upstream.blocked().await;
    assert!(read < most(64 << 10), "{read} bytes were read of a model whose client reads nothing");
    neighbours_are_served(&gateway).await;
    within(3 * SECOND + AT_ONCE, upstream.closed(1), "the model to be stopped").await;
    let ends = gateway.ended().await;
    assert!(ends.contains(&end("cancelled", "slow_consumer", 1)), "{ends:?}");
    assert_eq!(upstream.departures().len(), 1, "the others were answered");
    // A client that reads after all finds out, and finds no proper end.
    let events = client.events(Judge::new(Kind::Client)).await.unwrap();
    let rest = events.rest().await.unwrap();
    assert_eq!(rest.error(), Some("slow_consumer"));
}

#[tokio::test]
async fn a_stop_reaches_a_slow_client_before_the_megabytes_that_its_socket_could_hold() {
    let upstream = both().await;
    let gateway = Setup::new().chat("backpressure: { max_buffered: 64KiB }").start(&upstream.url()).await;
    let mut client = Http1::connect_narrow(gateway.addr).await;
    client.send(&Request::turn("flood")).await;
    let mut events = client.events(Judge::new(Kind::Client)).await.unwrap();
    let turn = events.expect().await.text("turn_id").unwrap().to_owned();
    upstream.blocked().await;
    let stop = Request::new("POST", &format!("/v1/chat/stream/{turn}/stop"));
    assert_eq!(headgate_testkit::client::ask(gateway.addr, &stop).await.unwrap().status, 202);
    let rest = events.rest().await.unwrap();
    assert_eq!(rest.error(), Some("stopped"));
    // The turn's own bound, what was being written, and what is on its way.
    let waited = rest.text().len();
    assert!((64 << 10..512 << 10).contains(&waited), "{waited} bytes came before the stop did");
}

#[tokio::test]
async fn a_connection_that_takes_nothing_at_all_is_closed() {
    let upstream = both().await;
    let gateway = Setup::new().top("limits: { stall: 2s }").start(&upstream.url()).await;
    let mut client = Http1::connect_narrow(gateway.addr).await;
    client.send(&Request::turn("flood")).await;
    upstream.blocked().await;
    within(2 * SECOND + AT_ONCE, upstream.closed(1), "the model to be stopped").await;
    assert_eq!(gateway.ended().await, [end("cancelled", "slow_consumer", 1)]);
    let closed = async {
        while gateway.process.app.drain().connections() > 0 {
            tokio::task::yield_now().await
        }
    };
    at_once(closed, "the connection to be closed").await;
    client.abort();
}

#[tokio::test]
async fn a_websocket_that_takes_nothing_loses_its_turn_too() {
    let upstream = both().await;
    let gateway = Setup::new().chat("backpressure: { max_buffered: 64KiB, stall: 2s }").start(&upstream.url()).await;
    let mut ws = Ws::over(Http1::connect_narrow(gateway.addr).await, &Request::get("/v1/chat/stream")).await.expect("a WebSocket");
    ws.turn("a", "flood").await;
    let read = upstream.blocked().await;
    assert!(read < most(64 << 10), "{read} bytes were read of a model whose client reads nothing");
    neighbours_are_served(&gateway).await;
    within(3 * SECOND + AT_ONCE, upstream.closed(1), "the model to be stopped").await;
    let turn = ws.opened("a").await.unwrap();
    assert_eq!(ws.finish(&turn).await.unwrap().error(), Some("slow_consumer"));
    assert_eq!(ws.ask("b", "hi").await.unwrap().text(), "Hello", "the socket goes on");
}

#[tokio::test]
async fn a_stop_and_the_deadline_reach_a_turn_whose_client_takes_nothing() {
    let upstream = both().await;
    let setup = Setup::new().chat("cancellation: { deadline: 3s }").chat("backpressure: { stall: 1min }");
    let setup = setup.upstream("timeouts: { first_byte: 2s }").top("limits: { heartbeat: 1s }");
    let gateway = setup.start(&upstream.url()).await;
    let mut client = Http1::connect_narrow(gateway.addr).await;
    client.send(&Request::turn("flood")).await;
    upstream.blocked().await;
    within(3 * SECOND + AT_ONCE, upstream.closed(1), "the model to be stopped").await;
    let rest = client.events(Judge::new(Kind::Client)).await.unwrap().rest().await.unwrap();
    assert_eq!(rest.finish(), "length");

    let mut client = Http1::connect_narrow(gateway.addr).await;
    client.send(&Request::turn("flood")).await;
    upstream.blocked().await;
    let mut events = client.events(Judge::new(Kind::Client)).await.unwrap();
    let turn = events.expect().await.text("turn_id").unwrap().to_owned();
    let stop = Request::new("POST", &format!("/v1/chat/stream/{turn}/stop"));
    assert_eq!(headgate_testkit::client::ask(gateway.addr, &stop).await.unwrap().status, 202);
    at_once(upstream.closed(2), "the model to be stopped").await;
    assert_eq!(events.rest().await.unwrap().error(), Some("stopped"));
}

#[tokio::test]
async fn an_http2_stream_whose_window_is_shut_loses_its_turn_and_the_others_of_its_connection_go_on() {
    let upstream = both().await;
    let gateway = Setup::new().chat("backpressure: { max_buffered: 64KiB, stall: 2s }").start(&upstream.url()).await;
    let mut client = Http2::connect(gateway.addr).await;
    let shut = client.events(&Request::turn("flood"), Judge::new(Kind::Client)).await.unwrap();
    let read = upstream.blocked().await;
    assert!(read < most(64 << 10), "{read} bytes were read of a model whose client reads nothing");
    for _ in 0..10 {
        let events = client.events(&Request::turn("hi"), Judge::new(Kind::Client)).await.unwrap();
        assert_eq!(events.rest().await.unwrap().text(), "Hello");
    }
    within(3 * SECOND + AT_ONCE, upstream.closed(1), "the model to be stopped").await;
    assert_eq!(shut.rest().await.unwrap().error(), Some("slow_consumer"));
    assert_eq!(gateway.ended().await, [end("cancelled", "slow_consumer", 1), end("complete", "ok", 10)]);
}

#[tokio::test]
async fn heartbeats_come_after_silence_only_and_before_the_first_byte_too() {
    let go = Arc::new(Notify::new());
    let events = Answer::openai("demo", &["one", "two"]).events();
    let script = Script::new().read().wait(&go).sse().send(events[..2].concat()).wait(&go).send(events[2..].concat()).end();
    let upstream = Upstream::always(script).await;
    let gateway = Setup::new().top("limits: { heartbeat: 1s }").start(&upstream.url()).await;
    let mut client = Http1::connect(gateway.addr).await;
    client.send(&Request::turn("hi")).await;
    // The response begins without the answer, when it has been waited for long enough.
    let mut events = client.events(Judge::new(Kind::Client)).await.unwrap();
    assert!(events.so_far().events.is_empty());
    let begun = Instant::now();
    while events.so_far().heartbeats < 2 {
        assert!(tokio::time::timeout(SECOND / 10, events.next()).await.is_err(), "nothing but heartbeats comes");
    }
    assert!(begun.elapsed() > SECOND * 3 / 2);
    let since = Instant::now();
    go.notify_one();
    while events.expect().await.name != "text" {}
    let before = events.so_far().heartbeats;
    while events.so_far().heartbeats == before {
        assert!(tokio::time::timeout(SECOND / 10, events.next()).await.is_err(), "nothing but heartbeats comes");
    }
    assert!(since.elapsed() > SECOND * 4 / 5, "silence counts from the last event");
    go.notify_one();
    let rest = events.rest().await.unwrap();
    assert_eq!(rest.text(), "onetwo");
    // One for each second of silence, and no more.
    let silent = since.elapsed().as_secs() as usize;
    assert!((1..=silent).contains(&(rest.heartbeats - before)), "{} heartbeats in {silent} s", rest.heartbeats - before);
}

#[tokio::test]
async fn a_model_that_fails_after_the_response_was_begun_is_an_error_and_never_a_clean_end() {
    for kind in [Kind::Client, Kind::OpenAi] {
        let go = Arc::new(Notify::new());
        let upstream = Upstream::each([Script::new().read().wait(&go).reset()]).await;
        let setup = Setup::new().upstream("retry: { attempts: 0 }").top("limits: { heartbeat: 1s }");
        let gateway = setup.start(&upstream.url()).await;
        let mut client = Http1::connect(gateway.addr).await;
        client.send(&if kind == Kind::Client { Request::turn("hi") } else { Request::completion("demo", "hi") }).await;
        let events = client.events(Judge::new(kind)).await.unwrap();
        go.notify_one();
        let rest = events.rest().await.unwrap();
        assert_eq!((rest.error(), rest.events.len()), (Some("upstream_reset"), 1));
        assert_eq!(gateway.ended().await, [end("failed", "upstream_reset", 1)]);
    }
}
