//! The plain reverse proxy: requests, responses, trailers and switched protocols pass, hop-by-hop headers and forgeries do not.

use std::sync::Arc;

use bytes::Bytes;
use headgate_contracts::Code;
use headgate_testkit::{
    at_once,
    upstream::{Framing, Refusing, Script, Upstream},
};
use http::{HeaderMap, Request, StatusCode};
use http_body_util::{BodyExt, Empty, Full, StreamBody};
use hyper::body::Frame;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::Notify,
};

use crate::{SECOND, openai, upstream};

#[tokio::test]
async fn a_request_and_its_response_pass_as_they_are() {
    let model = Upstream::always(
        Script::new()
            .read()
            .head(201, Framing::Chunked, &[("x-answer", "yes"), ("keep-alive", "timeout=5")])
            .send("made ")
            .send("it")
            .end()
            .again(),
    )
    .await;
    let upstream = openai(&model);
    for n in 0..3 {
        let request = Request::put(format!("/things/{n}?q=a%20b")).header("x-mine", "1").body(Full::new(Bytes::from("body"))).unwrap();
        let response = upstream.forward(request).await.unwrap().response;
        assert_eq!((response.status(), response.headers()["x-answer"].to_str().unwrap()), (StatusCode::CREATED, "yes"));
        assert!(!response.headers().contains_key("keep-alive") && !response.headers().contains_key("transfer-encoding"));
        assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "made it");
        let seen = model.request(n).await;
        assert_eq!((seen.method.as_str(), seen.target.as_str()), ("PUT", format!("/things/{n}?q=a%20b").as_str()));
        assert_eq!((seen.header("x-mine"), &seen.body[..]), (Some("1"), &b"body"[..]));
    }
    assert_eq!(model.opened(), 1, "one connection served them all");
}

#[tokio::test]
async fn hop_by_hop_headers_and_forged_policy_do_not_pass() {
    let model = Upstream::always(Script::no_content()).await;
    let request = Request::get("/")
        .header("connection", "close, x-private")
        .header("x-private", "1")
        .header("keep-alive", "1")
        .header("proxy-authorization", "basic x")
        .header("te", "gzip, trailers")
        .header("upgrade", "h2c")
        .header("host", "client.example")
        .header("policy-verdict", "forged")
        .header("Policy_Version", "forged")
        .header("x-constitution-hash", "forged")
        .header("policyholder", "kept")
        .body(Empty::<Bytes>::new())
        .unwrap();
    openai(&model).forward(request).await.unwrap();
    let seen = model.request(0).await;
    for gone in ["x-private", "keep-alive", "proxy-authorization", "upgrade", "policy-verdict", "policy_version", "x-constitution-hash"] {
        assert_eq!(seen.header(gone), None, "{gone}");
    }
    assert_eq!((seen.header("te"), seen.header("connection")), (Some("trailers"), Some("te")));
    assert_eq!(seen.header("host"), Some(model.addr().to_string().as_str()));
    assert_eq!(seen.header("policyholder"), Some("kept"));
}

#[tokio::test]
async fn bodies_stream_both_ways_with_trailers_and_without_forgeries_in_them() {
    let model = Upstream::always(
        Script::new()
            .read()
            .head(200, Framing::None, &[("transfer-encoding", "chunked"), ("trailer", "x-sum")])
            .raw("2\r\nab\r\n0\r\nx-sum: 2\r\n\r\n"),
    )
    .await;
    let trailers = HeaderMap::from_iter([
        (http::HeaderName::from_static("x-sum"), "4".parse().unwrap()),
        (http::HeaderName::from_static("policy-verdict"), "forged".parse().unwrap()),
    ]);
    let frames = [Frame::data(Bytes::from("ab")), Frame::data(Bytes::from("cd")), Frame::trailers(trailers)];
    let body = StreamBody::new(futures_util::stream::iter(frames.map(Ok::<_, std::io::Error>)));
    let request = Request::post("/").header("trailer", "x-sum, policy-verdict").header("te", "trailers").body(body).unwrap();
    let response = openai(&model).forward(request).await.unwrap().response;
    let answer = response.into_body().collect().await.unwrap();
    assert_eq!(answer.trailers().unwrap()["x-sum"], "2");
    assert_eq!(answer.to_bytes(), "ab");
    let seen = model.request(0).await;
    assert_eq!((&seen.body[..], seen.trailers), (&b"abcd"[..], vec![("x-sum".to_owned(), "4".to_owned())]));
}

#[tokio::test]
async fn dropping_the_response_closes_the_connection_and_reading_slowly_holds_the_upstream_back() {
    let model = Upstream::always_unbuffered(Script::new().read().head(200, Framing::Chunked, &[]).flood("x".repeat(64 << 10))).await;
    let upstream = openai(&model);
    let request = Request::get("/").body(Empty::<Bytes>::new()).unwrap();
    let mut body = upstream.forward(request).await.unwrap().response.into_body();
    body.frame().await.unwrap().unwrap();
    assert!(model.blocked().await < 16 << 20);
    assert_eq!(upstream.health()[0].in_flight, 1);
    drop(body);
    model.closed(1).await;
    assert_eq!((upstream.health()[0].in_flight, upstream.health()[0].idle), (0, 0));
}

#[tokio::test]
async fn a_response_that_breaks_off_or_stalls_is_a_fault() {
    for (script, expected) in [
        (Script::new().read().head(200, Framing::Length(10), &[]).send("half").close(), Code::UpstreamReset),
        (Script::new().read().head(200, Framing::Length(10), &[]).send("half").stall(), Code::UpstreamStalled),
        (Script::new().read().head(200, Framing::Chunked, &[]).raw("zz\r\n").stall(), Code::UpstreamProtocolError),
    ] {
        let model = Upstream::always(script).await;
        let upstream = upstream(&[model.url()], |settings| settings.timeouts.idle = SECOND / 10);
        let request = Request::get("/").body(Empty::<Bytes>::new()).unwrap();
        let body = upstream.forward(request).await.unwrap().response.into_body();
        assert_eq!(body.collect().await.unwrap_err().code, expected);
    }
}

#[tokio::test]
async fn no_head_is_a_fault_too_and_a_dead_connection_is_replaced() {
    let model = Upstream::always(Script::new().read().stall()).await;
    let hasty = upstream(&[model.url()], |settings| settings.timeouts.first_byte = SECOND / 10);
    let get = || Request::get("/").body(Empty::<Bytes>::new()).unwrap();
    assert_eq!(hasty.forward(get()).await.unwrap_err().code, Code::UpstreamTimeoutFirstByte);
    model.closed(1).await;

    let nobody = Refusing::start();
    let upstream = upstream(&[format!("http://{}", nobody.addr())], |_| {});
    assert_eq!(upstream.forward(get()).await.unwrap_err().code, Code::UpstreamConnectFailed);
}

#[tokio::test]
async fn a_switched_connection_carries_bytes_both_ways_after_the_101() {
    let go = Arc::new(Notify::new());
    let switch = "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: echo\r\nsec-websocket-accept: k\r\n\r\nearly";
    let model = Upstream::always(Script::new().read_head().wait(&go).raw(switch).stall()).await;
    let upstream = openai(&model);
    let request =
        Request::get("/ws").header("connection", "keep-alive, Upgrade").header("upgrade", "echo").body(Empty::<Bytes>::new()).unwrap();
    let (client, mut far) = tokio::io::duplex(64);
    far.write_all(b"not before the 101").await.unwrap();
    let forwarded = tokio::spawn({
        let upstream = upstream.clone();
        async move { upstream.forward(request).await }
    });
    let seen = model.request(0).await;
    assert_eq!((seen.header("upgrade"), seen.header("connection")), (Some("echo"), Some("upgrade")));
    go.notify_one();
    let forwarded = forwarded.await.unwrap().unwrap();
    assert_eq!(forwarded.response.status(), StatusCode::SWITCHING_PROTOCOLS);
    assert_eq!(forwarded.response.headers()["upgrade"], "echo");
    assert_eq!(forwarded.response.headers()["sec-websocket-accept"], "k");
    let tunnel = tokio::spawn(forwarded.tunnel.unwrap().run(client));
    let mut early = [0; 5];
    at_once(far.read_exact(&mut early), "the early bytes").await.unwrap();
    assert_eq!(&early, b"early");
    assert_eq!(upstream.health()[0].in_flight, 1);
    tunnel.abort();
    model.closed(1).await;
}

#[tokio::test]
async fn a_switch_nobody_asked_for_is_a_fault_and_a_refused_one_is_a_response() {
    let switch = "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\n";
    let model = Upstream::always(Script::new().read().raw(switch).stall()).await;
    let plain = Request::get("/").body(Empty::<Bytes>::new()).unwrap();
    assert_eq!(at_once(openai(&model).forward(plain), "the fault").await.unwrap_err().code, Code::UpstreamProtocolError);

    let model = Upstream::always(Script::reply(403, "text/plain", "no")).await;
    let ask = Request::get("/").header("connection", "upgrade").header("upgrade", "echo").body(Empty::<Bytes>::new()).unwrap();
    let forwarded = openai(&model).forward(ask).await.unwrap();
    assert!(forwarded.tunnel.is_none());
    assert_eq!(forwarded.response.into_body().collect().await.unwrap().to_bytes(), "no");
}
