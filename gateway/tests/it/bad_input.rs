//! Requests that are wrong in every way a request can be: each gets its code, its status, and a body that says so.

use std::{sync::Arc, time::Duration};

use headgate_testkit::{
    answer::Kind,
    client::{Http1, Http2, Request, ask, stream},
    dialect::{Answer, Cut},
    upstream::{Script, Upstream},
    within,
    ws::Ws,
};
use serde_json::{Value, json};
use tokio::sync::Notify;

use crate::support::{Gateway, Setup, key, start};

const SOON: Duration = Duration::from_secs(5);

async fn upstream() -> Upstream {
    Upstream::always(Script::stream(Answer::openai("demo", &["Hello"]).cut(Cut::Events))).await
}

fn turn_with(member: &str, value: Value) -> Request {
    let mut turn = json!({"messages": [{"role": "user", "content": "hi"}]});
    turn[member] = value;
    Request::post("/v1/chat/stream", &turn)
}

fn raw(body: impl Into<bytes::Bytes>) -> Request {
    Request::new("POST", "/v1/chat/stream").header("content-type", "application/json").body(body)
}

/// A gateway whose bounds of time are short.
async fn impatient(upstream: &Upstream) -> Gateway {
    let (mut plan, folder) = Setup::new().plan(&upstream.url());
    let short = Duration::from_secs(1);
    (plan.limits.handshake, plan.limits.head) = (short, short);
    for route in &mut plan.routes {
        route.body = short;
    }
    start(&plan, folder).await
}

#[tokio::test]
async fn every_malformed_request_has_its_code_and_reaches_nobody() {
    let upstream = upstream().await;
    let gateway = Setup::new().start(&upstream.url()).await;
    let deep = format!(
        "{{\"messages\":[{{\"role\":\"user\",\"content\":\"hi\"}}],\"metadata\":{}{}}}",
        "{\"a\":".repeat(70),
        "1".to_owned() + &"}".repeat(70)
    );
    let long = json!({"messages": [{"role": "user", "content": "x".repeat(2 << 20)}]}).to_string();
    let many: Vec<Value> = (0..257).map(|_| json!({"role": "user", "content": "x"})).collect();
    let cases = [
        ("no such path", Request::get("/v1/nothing"), 404, "not_found"),
        ("a path below that is no turn", Request::get("/v1/chat/stream/x"), 404, "session_not_found"),
        ("GET without an upgrade", Request::get("/v1/chat/stream"), 405, "method_not_allowed"),
        ("PUT", Request::new("PUT", "/v1/chat/stream"), 405, "method_not_allowed"),
        ("a method nobody knows", Request::new("BREW", "/v1/chat/stream"), 405, "method_not_allowed"),
        ("CONNECT-like GET of completions", Request::get("/v1/chat/completions"), 405, "method_not_allowed"),
        ("POST to the models", Request::post("/v1/models", &json!({})), 405, "method_not_allowed"),
        ("no content type", Request::new("POST", "/v1/chat/stream").body("{}"), 415, "unsupported_media_type"),
        ("a form", Request::new("POST", "/v1/chat/stream").header("content-type", "text/plain").body("{}"), 415, "unsupported_media_type"),
        ("two content types", Request::turn("hi").header("content-type", "text/plain"), 415, "unsupported_media_type"),
        ("gzip", Request::turn("hi").header("content-encoding", "gzip"), 415, "encoding_refused"),
        (
            "gzip in a second line",
            Request::turn("hi").header("content-encoding", "identity").header("content-encoding", "gzip"),
            415,
            "encoding_refused",
        ),
        ("a client who wants HTML", Request::turn("hi").header("accept", "text/html"), 406, "not_acceptable"),
        ("a client who says no", Request::turn("hi").header("accept", "text/event-stream;q=0, text/html"), 406, "not_acceptable"),
        ("a body too large", raw(long), 413, "payload_too_large"),
        ("no JSON", raw("hello"), 400, "malformed_json"),
        ("an empty body", raw(""), 400, "malformed_json"),
        ("JSON that ends too soon", raw("{\"messages\":["), 400, "malformed_json"),
        ("JSON twice", raw("{\"messages\":[{\"role\":\"user\",\"content\":\"a\"}]}{}"), 400, "malformed_json"),
        ("half a surrogate", raw("{\"messages\":[{\"role\":\"user\",\"content\":\"\\ud83d\"}]}"), 400, "malformed_json"),
        ("not UTF-8", raw(&b"{\"messages\":[{\"role\":\"user\",\"content\":\"\xff\"}]}"[..]), 400, "malformed_json"),
        ("no messages", raw("{}"), 400, "invalid_request"),
        ("a list", raw("[]"), 400, "invalid_request"),
        ("too deep", raw(deep), 400, "invalid_request"),
        ("a bracket bomb", raw("[".repeat(100_000)), 400, "invalid_request"),
        ("an unknown member", turn_with("temprature", json!(1)), 400, "invalid_request"),
        ("an unknown role", raw("{\"messages\":[{\"role\":\"root\",\"content\":\"a\"}]}"), 400, "invalid_request"),
        ("too many messages", turn_with("messages", many.into()), 400, "invalid_request"),
        (
            "a picture",
            turn_with("messages", json!([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}])),
            400,
            "invalid_request",
        ),
        ("a session that is no name", turn_with("session_id", json!("a\r\nb")), 400, "invalid_request"),
        (
            "a number that is none",
            raw("{\"messages\":[{\"role\":\"user\",\"content\":\"a\"}],\"temperature\":1e999}"),
            400,
            "malformed_json",
        ),
        ("an idempotency key that is too long", Request::turn("hi").header("idempotency-key", &"k".repeat(256)), 400, "invalid_request"),
        ("two idempotency keys", Request::turn("hi").header("idempotency-key", "a").header("idempotency-key", "b"), 400, "invalid_request"),
        ("an idempotency key that is empty", Request::turn("hi").header("idempotency-key", ""), 400, "invalid_request"),
    ];
    for (what, request, status, code) in cases {
        let reply = ask(gateway.addr, &request).await.unwrap_or_else(|broken| panic!("{what}: {broken}"));
        let found = reply.problem().unwrap_or_else(|broken| panic!("{what}: {broken}"));
        assert_eq!((reply.status, found.as_str()), (status, code), "{what}: {}", reply.text());
        assert_eq!(reply.header("cache-control"), Some("no-store"), "{what}");
    }
    assert_eq!(upstream.requests().len(), 0);
    assert_eq!(gateway.process.app.turns().len(), 0);
}

#[tokio::test]
async fn a_refusal_names_the_member_and_never_repeats_its_value() {
    let upstream = upstream().await;
    let gateway = Setup::new().start(&upstream.url()).await;
    let reply = ask(gateway.addr, &turn_with("temperature", json!("my-secret-value"))).await.unwrap();
    assert!(reply.text().contains("temperature") && !reply.text().contains("my-secret-value"), "{}", reply.text());
}

#[tokio::test]
async fn what_clients_may_leave_out_or_write_oddly_is_taken() {
    let upstream = upstream().await;
    let gateway = Setup::new().start(&upstream.url()).await;
    let plain = json!({"messages": [{"role": "user", "content": "hi"}]}).to_string();
    let odd = Request::new("POST", "/v1/chat/stream");
    let requests = [
        Request::turn("hi").header("accept", "text/event-stream"),
        Request::turn("hi").header("accept", "text/*;q=0.5, application/json"),
        Request::turn("hi").header("accept", "application/json").header("accept", "*/*"),
        Request::turn("hi").header("content-encoding", "identity"),
        odd.clone().header("content-type", "Application/JSON; charset=utf-8").body(plain.clone()),
        odd.header("content-type", "application/json")
            .header("transfer-encoding", "chunked")
            .body(format!("{:x}\r\n{plain}\r\n0\r\n\r\n", plain.len())),
        Request::turn("hi").header("expect", "100-continue"),
        Request::turn("hi").header("idempotency-key", "k1"),
    ];
    for request in requests {
        let answer = stream(gateway.addr, &request, Kind::Client)
            .await
            .unwrap_or_else(|broken| panic!("{request:?}: {broken}"))
            .rest()
            .await
            .unwrap();
        assert_eq!(answer.text(), "Hello");
    }
}

#[tokio::test]
async fn a_body_over_the_limit_is_refused_before_it_is_sent() {
    let upstream = upstream().await;
    let gateway = Setup::new().start(&upstream.url()).await;
    let mut client = Http1::connect(gateway.addr).await;
    client.send_bytes(b"POST /v1/chat/stream HTTP/1.1\r\nhost: h\r\ncontent-type: application/json\r\ncontent-length: 99999999\r\nexpect: 100-continue\r\n\r\n").await;
    let reply = client.reply().await.unwrap();
    assert_eq!((reply.status, reply.problem().unwrap().as_str()), (413, "payload_too_large"));
    within(SOON, client.closed(), "the connection to be closed").await.unwrap();
}

#[tokio::test]
async fn a_resume_that_makes_no_sense_is_refused() {
    let upstream =
        Upstream::always(Script::new().read().sse().send(Answer::openai("demo", &["Hello"]).events()[..2].concat()).stall()).await;
    let gateway = Setup::new().start(&upstream.url()).await;
    let mut events = stream(gateway.addr, &Request::turn("hi"), Kind::Client).await.unwrap();
    let turn = events.expect().await.text("turn_id").unwrap().to_owned();
    let path = format!("/v1/chat/stream/{turn}");
    let other = "0193a5f0-7e1c-7000-8000-000000000000";
    for id in [
        "",
        "7",
        "x:1",
        &format!("{turn}:"),
        &format!("{turn}:-1"),
        &format!("{turn}:1:1"),
        &format!("{other}:1"),
        &format!("{turn}:99999999999999999999"),
    ] {
        let reply = ask(gateway.addr, &Request::get(&path).header("last-event-id", id)).await.unwrap();
        assert_eq!((reply.status, reply.problem().unwrap().as_str()), (400, "invalid_request"), "{id}");
    }
    let twice = Request::get(&path).header("last-event-id", &format!("{turn}:0")).header("last-event-id", &format!("{turn}:1"));
    assert_eq!(ask(gateway.addr, &twice).await.unwrap().problem().unwrap(), "invalid_request");
    let unknown = ask(gateway.addr, &Request::get(&format!("/v1/chat/stream/{other}"))).await.unwrap();
    assert_eq!((unknown.status, unknown.problem().unwrap().as_str()), (404, "session_not_found"));
    let unknown = ask(gateway.addr, &Request::post(&format!("/v1/chat/stream/{other}/stop"), &json!({}))).await.unwrap();
    assert_eq!((unknown.status, unknown.problem().unwrap().as_str()), (404, "session_not_found"));
}

#[tokio::test]
async fn heads_that_break_http_are_answered_by_a_status_and_the_end_of_the_connection() {
    let upstream = upstream().await;
    let gateway = Setup::new().start(&upstream.url()).await;
    let many: String = (0..150).map(|n| format!("x-{n}: 1\r\n")).collect();
    let cases = [
        ("a line that is no header", "GET / HTTP/1.1\r\nhost h\r\n\r\n".to_owned(), "400"),
        ("a space before the colon", "GET / HTTP/1.1\r\nhost : h\r\n\r\n".to_owned(), "400"),
        ("a folded line", "GET / HTTP/1.1\r\nhost: h\r\nx: a\r\n b\r\n\r\n".to_owned(), "400"),
        ("a NUL", "GET / HTTP/1.1\r\nhost: h\r\nx: a\0b\r\n\r\n".to_owned(), "400"),
        ("no such version", "GET / HTTP/9.9\r\nhost: h\r\n\r\n".to_owned(), "400"),
        ("two lengths", "POST /v1/chat/stream HTTP/1.1\r\nhost: h\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nxx".to_owned(), "400"),
        ("a length that is none", "POST /v1/chat/stream HTTP/1.1\r\nhost: h\r\ncontent-length: +1\r\n\r\nx".to_owned(), "400"),
        (
            "an encoding after chunked",
            "POST /v1/chat/stream HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked, gzip\r\n\r\n".to_owned(),
            "400",
        ),
        ("an encoding nobody knows", "POST /v1/chat/stream HTTP/1.1\r\nhost: h\r\ntransfer-encoding: xchunked\r\n\r\n".to_owned(), "400"),
        ("chunks in HTTP/1.0", "POST /v1/chat/stream HTTP/1.0\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n".to_owned(), "400"),
        ("no host", "GET /v1/models HTTP/1.1\r\n\r\n".to_owned(), "400"),
        ("two hosts", "GET /v1/models HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n".to_owned(), "400"),
        ("too many fields", format!("GET / HTTP/1.1\r\nhost: h\r\n{many}\r\n"), "431"),
        ("too large a head", format!("GET / HTTP/1.1\r\nhost: h\r\nx: {}\r\n\r\n", "x".repeat(200 << 10)), "431"),
    ];
    for (what, head, status) in cases {
        let mut client = Http1::connect(gateway.addr).await;
        client.send_bytes(head.as_bytes()).await;
        let head = within(SOON, client.head(), what).await.unwrap_or_else(|broken| panic!("{what}: {broken}"));
        assert!(head.start.contains(status), "{what}: {}", head.start);
    }
    assert_eq!(upstream.requests().len(), 0);
}

#[tokio::test]
async fn silence_and_slow_heads_are_cut_off() {
    let upstream = upstream().await;
    let gateway = impatient(&upstream).await;
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    let beginnings: [(&str, &[u8]); 6] = [
        ("silence", b""),
        ("half a method", b"PO"),
        ("half a head", b"POST /v1/chat/stream HTTP/1.1\r\nhost: h\r\n"),
        ("half a preface", &preface[..10]),
        ("a preface and no settings", preface),
        ("a preface, settings and no request", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0"),
    ];
    for (what, bytes) in beginnings {
        let mut client = Http1::connect(gateway.addr).await;
        client.send_bytes(bytes).await;
        let mut said = Vec::new();
        let ended = async {
            while let Ok(bytes) = client.read_bytes(4096).await
                && !bytes.is_empty()
            {
                said.extend_from_slice(&bytes);
            }
        };
        within(SOON, ended, &format!("{what} to be cut off")).await;
        let said = String::from_utf8_lossy(&said);
        // Who has begun to say what is wanted learns that it took too long.
        assert_eq!(said.starts_with("HTTP/1.1 408 ") && said.contains("request_timeout"), what.starts_with("half a"), "{what}: {said}");
    }
    within(
        SOON,
        async {
            while gateway.process.app.drain().connections() > 0 {
                tokio::task::yield_now().await
            }
        },
        "all places to be free",
    )
    .await;
}

#[tokio::test]
async fn a_connection_without_a_next_request_is_closed() {
    let upstream = upstream().await;
    let gateway = impatient(&upstream).await;
    let mut client = Http1::connect(gateway.addr).await;
    client.send(&Request::get("/v1/models")).await;
    assert_eq!(client.reply().await.unwrap().status, 200);
    within(SOON, client.closed(), "the idle connection to be closed").await.unwrap();
}

#[tokio::test]
async fn a_slow_body_is_a_timeout_and_a_cut_one_leaves_nothing() {
    let upstream = upstream().await;
    let gateway = impatient(&upstream).await;
    let half = b"POST /v1/chat/stream HTTP/1.1\r\nhost: h\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{\"messages\"";
    let mut slow = Http1::connect(gateway.addr).await;
    slow.send_bytes(half).await;
    let reply = within(SOON, slow.reply(), "an answer to a slow body").await.unwrap();
    assert_eq!((reply.status, reply.problem().unwrap().as_str(), reply.header("connection")), (408, "request_timeout", Some("close")));
    within(SOON, slow.closed(), "the connection to be closed").await.unwrap();
    let mut cut = Http1::connect(gateway.addr).await;
    cut.send_bytes(half).await;
    cut.abort();
    let free = async {
        while gateway.process.app.drain().connections() > 0 {
            tokio::task::yield_now().await
        }
    };
    within(SOON, free, "all places to be free").await;
    assert_eq!(upstream.requests().len(), 0);
}

#[tokio::test]
async fn http2_requests_are_refused_in_the_same_words() {
    let upstream = upstream().await;
    let gateway = Setup::new().start(&upstream.url()).await;
    let mut client = Http2::connect(gateway.addr).await;
    let cases = [
        (raw("nonsense"), 400, "malformed_json"),
        (Request::get("/nowhere"), 404, "not_found"),
        (raw("x".repeat(2 << 20)), 413, "payload_too_large"),
    ];
    for (request, status, code) in cases {
        let reply = client.ask(&request).await.unwrap();
        assert_eq!((reply.status, reply.problem().unwrap().as_str()), (status, code));
    }
}

#[tokio::test]
async fn two_credentials_are_none() {
    let (key, auth) = key();
    let upstream = upstream().await;
    let gateway = Setup::chain(&[auth]).start(&upstream.url()).await;
    let refused = [
        Request::turn("hi"),
        Request::turn("hi").bearer("hg_wrong"),
        Request::turn("hi").bearer(key).bearer(key),
        Request::turn("hi").bearer(key).bearer("hg_wrong"),
        Request::turn("hi").header("authorization", &format!("Basic {key}")),
        Request::turn("hi").header("authorization", key),
        Request::turn("hi").header("authorization", "Bearer "),
    ];
    for request in refused {
        let reply = ask(gateway.addr, &request).await.unwrap();
        assert_eq!((reply.status, reply.problem().unwrap().as_str()), (401, "unauthenticated"));
        assert_eq!(reply.header("www-authenticate"), Some("Bearer"));
    }
    assert_eq!(stream(gateway.addr, &Request::turn("hi").bearer(key), Kind::Client).await.unwrap().rest().await.unwrap().text(), "Hello");
    assert_eq!(upstream.requests().len(), 1);
}

#[tokio::test]
async fn a_connection_over_the_limit_is_closed_at_once_and_the_others_go_on() {
    let upstream = upstream().await;
    let gateway = Setup::new().top("limits: { connections: 2 }").start(&upstream.url()).await;
    let mut first = Http1::connect(gateway.addr).await;
    let mut second = Http1::connect(gateway.addr).await;
    for client in [&mut first, &mut second] {
        client.send(&Request::get("/v1/models")).await;
        assert_eq!(client.reply().await.unwrap().status, 200);
    }
    let mut third = Http1::connect(gateway.addr).await;
    let ended = async { while third.read_bytes(100).await.is_ok_and(|bytes| !bytes.is_empty()) {} };
    within(SOON, ended, "the third connection to be closed").await;
    first.send(&Request::get("/v1/models")).await;
    assert_eq!(first.reply().await.unwrap().status, 200);
}

#[tokio::test]
async fn a_flood_of_streams_reset_at_once_leaves_nothing_behind() {
    let here = Arc::new(Notify::new());
    let upstream = Upstream::always(Script::new().read().tell(&here).stall()).await;
    let gateway = Setup::new().start(&upstream.url()).await;
    let mut client = Http2::connect(gateway.addr).await;
    for _ in 0..300 {
        // Dropping the future of the answer's head resets the stream.
        let request = Request::turn("hi");
        let asked = client.send(&request);
        drop(tokio::time::timeout(Duration::from_millis(2), asked).await);
    }
    drop(client);
    let quiet = async {
        while gateway.process.app.turns().len() + gateway.process.app.drain().connections() > 0 {
            tokio::task::yield_now().await
        }
    };
    within(Duration::from_secs(10), quiet, "every turn to end").await;
    within(Duration::from_secs(10), upstream.idle(), "every answer to be stopped").await;
}

#[tokio::test]
async fn a_websocket_handshake_that_is_none_is_refused() {
    let upstream = upstream().await;
    let gateway = Setup::new().start(&upstream.url()).await;
    let upgrade = |version: &str, protocol: &str| {
        let request = Request::get("/v1/chat/stream")
            .header("connection", "upgrade")
            .header("upgrade", "websocket")
            .header("sec-websocket-version", version);
        request.header("sec-websocket-protocol", protocol)
    };
    for request in [upgrade("12", "headgate.v1").header("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="), upgrade("13", "headgate.v1")] {
        let reply = ask(gateway.addr, &request).await.unwrap();
        assert!((400..500).contains(&reply.status), "{}", reply.status);
        reply.problem().unwrap();
    }
    assert!(Ws::connect(gateway.addr).await.is_ok());
}
