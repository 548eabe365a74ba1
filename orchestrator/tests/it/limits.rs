//! What is malformed, too large, too slow or too much is refused, by name and before it costs much.

use std::time::Duration;

use headgate_orchestrator::{Limits, Models, Patience, Settings, serve_admin};
use headgate_testkit::{
    client::{Http1, Request, ask},
    dialect::{Answer, Cut},
    soon,
    upstream::{Script, Upstream},
};
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;

use crate::desk::{Desk, STEP, STREAM, upstream};

async fn model() -> Upstream {
    Upstream::always(Script::stream(Answer::openai("demo", &["yes"]).cut(Cut::Whole))).await
}

async fn strict(model: &Upstream, limits: Limits, patience: Patience) -> Desk {
    Desk::with(Models::new(upstream(&model.url())), Settings { limits, patience, ..Settings::default() }).await
}

#[tokio::test]
async fn a_request_that_is_none_is_refused_by_name() {
    let model = model().await;
    let desk = Desk::before(&model).await;
    let good = desk.turn("s1", "hello").body.to_string();
    let post = |body: &str| Request::new("POST", STREAM).header("content-type", "application/json").body(body.to_owned());
    let deep = format!("{{\"messages\":{}{}}}", "[".repeat(10_000), "]".repeat(10_000));
    let cases: Vec<(Request, u16, &str)> = vec![
        (post(""), 400, "malformed_json"),
        (post("{"), 400, "malformed_json"),
        (post("[]"), 400, "invalid_request"),
        (post("{}"), 400, "invalid_request"),
        (post(&deep), 400, "invalid_request"),
        (post(&good.replace("\"tenant\"", "\"tenants\"")), 400, "invalid_request"),
        (post(&good.replace("acme", "a\\nb")), 400, "invalid_request"),
        (post(&good.replace("{\"turn_id\"", "{\"extra\":1,\"turn_id\"")), 400, "invalid_request"),
        (post(&good).header("content-encoding", "gzip"), 415, "encoding_refused"),
        (Request::new("POST", STREAM).header("content-type", "text/plain").body(good.clone()), 415, "unsupported_media_type"),
        (Request::new("POST", STREAM).body(good.clone()), 415, "unsupported_media_type"),
        (Request::new("POST", "/v1/conversation"), 404, "not_found"),
        (Request::new("POST", "/metrics"), 404, "not_found"),
        (Request::new("GET", STEP), 405, "method_not_allowed"),
        (Request::new("PUT", STREAM), 405, "method_not_allowed"),
        (Request::new("GET", "/v1/conversation/turns/x/cancel"), 405, "method_not_allowed"),
        (Request::new("GET", STREAM), 400, "protocol_error"),
    ];
    for (request, status, code) in cases {
        let reply = ask(desk.addr, &request).await.unwrap();
        assert_eq!((reply.status, reply.problem().as_deref()), (status, Ok(code)), "{request:?}");
        assert_eq!(reply.header("allow").is_some(), status == 405);
    }
    assert_eq!(desk.decided("stream", "malformed"), 11);
    assert_eq!(model.opened(), 0);
}

#[tokio::test]
async fn a_body_over_the_limit_is_refused_whether_it_says_so_or_not() {
    let model = model().await;
    let desk = strict(&model, Limits { body: 1000, ..Limits::default() }, Patience::default()).await;
    let large = desk.turn("s1", &"x".repeat(2000));
    let reply = large.reply().await;
    assert_eq!((reply.status, reply.problem().as_deref()), (413, Ok("payload_too_large")));
    assert_eq!(reply.header("connection"), Some("close"));

    let mut client = Http1::connect(desk.addr).await;
    let head = format!("POST {STREAM} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n");
    client.send_bytes(head.as_bytes()).await;
    for _ in 0..3 {
        client.send_bytes(format!("1f4\r\n{}\r\n", "x".repeat(500)).as_bytes()).await;
    }
    assert_eq!(client.reply().await.unwrap().status, 413);
    assert_eq!(desk.decided("stream", "malformed"), 2);
}

#[tokio::test]
async fn a_head_over_the_limit_is_refused() {
    let model = model().await;
    let desk = Desk::before(&model).await;
    let wide = Request::get("/healthz").header("x-wide", &"x".repeat(20_000));
    assert_eq!(ask(desk.addr, &wide).await.unwrap().status, 431);
    let many = (0..200).fold(Request::get("/healthz"), |request, n| request.header(&format!("x-{n}"), "1"));
    assert_eq!(ask(desk.addr, &many).await.unwrap().status, 431);
}

#[tokio::test]
async fn a_request_with_two_lengths_is_not_believed() {
    let model = model().await;
    let desk = Desk::before(&model).await;
    let mut client = Http1::connect(desk.addr).await;
    let two = format!("POST {STREAM} HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\ncontent-length: 5\r\n\r\n12345");
    client.send_bytes(two.as_bytes()).await;
    assert_eq!(client.reply().await.unwrap().status, 400);
    for head in ["HTTP/1.0\r\ntransfer-encoding: chunked", "HTTP/1.1\r\ntransfer-encoding: gzip", "HTTP/1.1\r\ncontent-length: 1, 1x"] {
        let mut client = Http1::connect(desk.addr).await;
        client.send_bytes(format!("POST {STREAM} {head}\r\nhost: x\r\ncontent-type: application/json\r\n\r\n").as_bytes()).await;
        assert_eq!(client.reply().await.unwrap().status, 400, "{head}");
    }
}

#[tokio::test]
async fn a_slow_writer_is_not_waited_for() {
    let model = model().await;
    let short = Duration::from_millis(50);
    let patience = Patience { first_byte: short, head: short, body: short, idle: Duration::from_millis(200), ..Patience::default() };
    let desk = strict(&model, Limits::default(), patience).await;

    let mut silent = Http1::connect(desk.addr).await;
    soon(silent.closed(), "the silent connection to be closed").await.unwrap();

    let mut slow = Http1::connect(desk.addr).await;
    slow.send_bytes(b"POST /v1/conver").await;
    soon(slow.closed(), "the slow head to be given up").await.unwrap();

    let mut slow = Http1::connect(desk.addr).await;
    slow.send_bytes(
        format!("POST {STREAM} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{{").as_bytes(),
    )
    .await;
    let reply = slow.reply().await.unwrap();
    assert_eq!((reply.status, reply.problem().as_deref()), (408, Ok("request_timeout")));
    soon(slow.closed(), "the connection to be closed").await.unwrap();
    assert_eq!(desk.decided("stream", "malformed"), 1);

    let mut idle = Http1::connect(desk.addr).await;
    idle.send(&Request::get("/healthz")).await;
    assert_eq!(idle.reply().await.unwrap().status, 200);
    soon(idle.closed(), "the idle connection to be closed").await.unwrap();
}

#[tokio::test]
async fn there_are_no_more_turns_than_there_may_be() {
    let model = Upstream::always(Script::new().read().sse().stall()).await;
    let desk = strict(&model, Limits { turns: 1, ..Limits::default() }, Patience::default()).await;
    let mut first = Http1::connect(desk.addr).await;
    first.send(&desk.turn("s1", "one").request()).await;
    model.request(0).await;
    let reply = desk.turn("s2", "two").reply().await;
    assert_eq!((reply.status, reply.json()["code"].as_str()), (503, Some("overloaded")));
    assert_eq!(reply.header("retry-after"), Some("1"));
    assert_eq!(desk.decided("stream", "busy"), 1);
    assert_eq!(desk.metric("orchestrator_open_turns"), 1);
    drop(first);
    desk.idle().await;
    assert_eq!(desk.metric("orchestrator_open_turns"), 0);
}

#[tokio::test]
async fn a_connection_without_a_place_waits_for_one() {
    let model = model().await;
    let desk = strict(&model, Limits { connections: 1, ..Limits::default() }, Patience::default()).await;
    let mut first = Http1::connect(desk.addr).await;
    first.send(&Request::get("/healthz")).await;
    first.reply().await.unwrap();
    let mut second = Http1::connect(desk.addr).await;
    second.send(&Request::get("/healthz")).await;
    drop(first);
    assert_eq!(second.reply().await.unwrap().status, 200);
}

#[tokio::test]
async fn operators_have_a_listener_of_their_own() {
    let model = model().await;
    let desk = Desk::before(&model).await;
    let mut registry = Registry::default();
    desk.orchestrator.register(&mut registry);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let admin = tokio::spawn(serve_admin(listener, desk.orchestrator.clone(), registry.into(), std::future::pending()));
    desk.turn("s1", "hello").text().await;
    let metrics = ask(addr, &Request::get("/metrics")).await.unwrap();
    assert_eq!(metrics.header("content-type"), Some("application/openmetrics-text; version=1.0.0; charset=utf-8"));
    assert!(metrics.text().contains("orchestrator_requests_total{route=\"stream\",decision=\"accepted\"} 1"), "{}", metrics.text());
    assert!(metrics.text().contains("orchestrator_time_to_first_text_seconds_count 1"), "{}", metrics.text());
    assert!(metrics.text().contains("orchestrator_model_opened_total{upstream=\"model\"} 1"), "{}", metrics.text());
    let endpoint = format!("{{upstream=\"model\",endpoint=\"{}\"}}", model.addr());
    for (series, value) in [("ready", 1), ("in_flight", 0)] {
        assert!(metrics.text().contains(&format!("orchestrator_model_{series}{endpoint} {value}")), "{}", metrics.text());
    }
    assert_eq!(ask(addr, &Request::get("/readyz")).await.unwrap().text(), "ready\n");
    assert_eq!(ask(addr, &Request::new("POST", "/healthz")).await.unwrap().status, 405);
    assert_eq!(ask(addr, &Request::new("POST", STREAM)).await.unwrap().status, 404);
    assert_eq!(ask(desk.addr, &Request::get("/metrics")).await.unwrap().status, 404);
    admin.abort();
}
