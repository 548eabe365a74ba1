//! Plain routes: bodies, trailers and upgrades pass as they are; what concerns one connection only, or is ours to say, does not.

use std::{sync::Arc, time::Duration};

use headgate_testkit::{
    client::{Chunks, Http1, Http2, Request, ask},
    soon,
    upstream::{Framing, Script, Upstream},
    within,
};
use serde_json::json;
use tokio::sync::Notify;

use crate::support::{Gateway, key, start};

const SOON: Duration = Duration::from_secs(5);

/// A gateway with a route `/files/*` in front of `url`.
async fn gateway(url: &str, route: &str) -> Gateway {
    let folder = tempfile::tempdir().unwrap();
    let yaml = format!(
        "listen: 127.0.0.1:1\nadmin: {{ listen: \"127.0.0.1:2\" }}\nworkers: 1\nupstreams:\n  files: {{ protocol: http, endpoints: [\"{url}\"], health: {{ interval: 0s }}, timeouts: {{ idle: 2s }} }}\n\
         routes:\n  - path: /files/*\n    kind: proxy\n    upstream: files\n{route}"
    );
    std::fs::write(folder.path().join("headgate.yaml"), &yaml).unwrap();
    match headgate_config::load(&folder.path().join("headgate.yaml"), None, &|_| None) {
        Ok(plan) => start(&plan, folder).await,
        Err(faults) => panic!("{faults}\n{yaml}"),
    }
}

/// Answers with what it was asked.
async fn echo() -> Upstream {
    Upstream::answering(|request| {
        let body = json!({"method": request.method, "target": request.target, "bytes": request.body.len()}).to_string();
        Script::reply(200, "application/json", body)
    })
    .await
}

#[tokio::test]
async fn methods_paths_and_bodies_pass_as_they_are() {
    let upstream = echo().await;
    let gateway = gateway(&upstream.url(), "").await;
    for method in ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PURGE"] {
        let reply = ask(gateway.addr, &Request::new(method, "/files/a%2Fb/../c?x=1&y=%20").body("hello")).await.unwrap();
        assert_eq!(reply.json(), json!({"method": method, "target": "/files/a%2Fb/../c?x=1&y=%20", "bytes": 5}));
    }
    let head = ask(gateway.addr, &Request::new("HEAD", "/files/a")).await;
    assert!(head.is_ok_and(|reply| reply.status == 200 && reply.body.is_empty()));
    let large = vec![b'x'; 5 << 20];
    assert_eq!(ask(gateway.addr, &Request::new("PUT", "/files/a").body(large)).await.unwrap().json()["bytes"], 5 << 20);
    assert_eq!(Http2::connect(gateway.addr).await.ask(&Request::new("POST", "/files/a").body("hi")).await.unwrap().json()["bytes"], 2);
    assert_eq!(ask(gateway.addr, &Request::get("/filesystem")).await.unwrap().status, 404);
}

#[tokio::test]
async fn a_route_takes_the_methods_it_names_and_may_strip_its_prefix() {
    let upstream = echo().await;
    let gateway = gateway(&upstream.url(), "    methods: [GET]\n    strip_prefix: true\n").await;
    for (target, sent) in [("/files/a?b", "/a?b"), ("/files/a//b", "/a//b"), ("/files//evil.example/x", "//evil.example/x")] {
        assert_eq!(ask(gateway.addr, &Request::get(target)).await.unwrap().json()["target"], sent, "{target}");
    }
    let reply = ask(gateway.addr, &Request::post("/files/a", &json!({}))).await.unwrap();
    assert_eq!((reply.status, reply.problem().unwrap().as_str()), (405, "method_not_allowed"));
}

#[tokio::test]
async fn answers_come_with_their_status_headers_and_trailers() {
    let answer = Script::new().read().head(
        418,
        Framing::Chunked,
        &[
            ("content-type", "text/plain"),
            ("x-a", "1"),
            ("x-a", "2"),
            ("vary", "accept"),
            ("keep-alive", "timeout=5"),
            ("connection", "x-hop"),
            ("x-hop", "h"),
            ("trailer", "x-sum"),
        ],
    );
    let upstream = Upstream::always(answer.send("one").send("two").raw("0\r\nx-sum: 6\r\n\r\n").close()).await;
    let gateway = gateway(&upstream.url(), "    origins: [\"https://app.example.com\"]\n").await;
    let request = Request::get("/files/a").header("te", "trailers").header("origin", "https://app.example.com");
    let reply = ask(gateway.addr, &request).await.unwrap();
    assert_eq!((reply.status, reply.text().as_str()), (418, "onetwo"));
    assert_eq!(reply.head.all("x-a").collect::<Vec<_>>(), ["1", "2"]);
    assert_eq!(reply.head.all("vary").collect::<Vec<_>>(), ["accept", "origin"]);
    assert_eq!((reply.header("keep-alive"), reply.header("x-hop")), (None, None));
    assert_eq!(reply.trailers, [("x-sum".to_owned(), "6".to_owned())]);
}

#[tokio::test]
async fn what_concerns_one_connection_or_is_ours_to_say_is_taken_off() {
    let upstream = echo().await;
    let (key, auth) = key();
    let gateway = gateway(&upstream.url(), &format!("    filters:\n      - {auth}\n")).await;
    assert_eq!(ask(gateway.addr, &Request::get("/files/a")).await.unwrap().problem().unwrap(), "unauthenticated");
    let request = Request::new("POST", "/files/a")
        .bearer(key)
        .header("connection", "keep-alive, x-hop, policy-verdict")
        .header("x-hop", "h")
        .header("keep-alive", "5");
    let request = request
        .header("proxy-authorization", "Basic eA==")
        .header("Policy-Verdict", "forged")
        .header("x_policy_mode", "forged")
        .header("constitution-hash", "forged")
        .header("x-kept", "yes")
        .header("host", "other.example");
    let chunks = request
        .header("transfer-encoding", "chunked")
        .header("trailer", "policy-verdict, x-sum")
        .body("5\r\nhello\r\n0\r\npolicy-verdict: forged\r\nx-sum: 7\r\n\r\n");
    assert_eq!(ask(gateway.addr, &chunks).await.unwrap().json()["bytes"], 5);
    let sent = upstream.request(0).await;
    let raw = String::from_utf8_lossy(&sent.head.raw).into_owned();
    for gone in ["forged", "x-hop", "keep-alive", "proxy-authorization"] {
        assert!(!raw.contains(gone), "{gone} in {raw}");
    }
    assert!(sent.trailers.iter().all(|(name, _)| name != "policy-verdict"), "{:?}", sent.trailers);
    assert_eq!((sent.header("x-kept"), sent.header("host")), (Some("yes"), Some(upstream.addr().to_string().as_str())));
    assert!(sent.header("traceparent").is_some());
}

#[tokio::test]
async fn upstreams_are_told_what_the_gateway_sees_and_what_a_client_claims_only_where_that_is_configured() {
    let claimed = || {
        let request = Request::get("/files/a").header("host", "app.example.com").header("x-forwarded-for", "203.0.113.7");
        let request = request.header("x-forwarded-proto", "https").header("x_forwarded_host", "claimed").header("forwarded", "for=claimed");
        request.header("x-real-ip", "claimed").header("via", "1.1 edge")
    };
    let upstream = echo().await;
    let seen = gateway(&upstream.url(), "").await;
    assert_eq!(ask(seen.addr, &claimed()).await.unwrap().status, 200);
    let sent = upstream.request(0).await;
    let told = |sent: &headgate_testkit::upstream::Request, name: &str| sent.head.all(name).map(str::to_owned).collect::<Vec<_>>();
    let names = ["x-forwarded-for", "x-forwarded-proto", "x-forwarded-host"];
    assert_eq!(names.map(|name| told(&sent, name)), [["127.0.0.1"], ["http"], ["app.example.com"]]);
    assert_eq!(told(&sent, "via"), ["1.1 edge", "1.1 headgate"]);
    assert!(!String::from_utf8_lossy(&sent.head.raw).contains("claimed"), "{:?}", sent.head);
    let appended = gateway(&upstream.url(), "    forwarded: appended\n").await;
    assert_eq!(ask(appended.addr, &claimed().header("x-forwarded-for", "198.51.100.1")).await.unwrap().status, 200);
    let sent = upstream.request(1).await;
    assert_eq!(names.map(|name| told(&sent, name)), [["203.0.113.7, 198.51.100.1, 127.0.0.1"], ["https"], ["app.example.com"]]);
    assert_eq!(Http2::connect(appended.addr).await.ask(&Request::get("/files/a")).await.unwrap().status, 200);
    let sent = upstream.request(2).await;
    assert_eq!((told(&sent, "via"), told(&sent, names[2])), (vec!["2.0 headgate".to_owned()], vec![appended.addr.to_string()]));
}

#[tokio::test]
async fn a_client_who_leaves_closes_the_upstreams_connection() {
    let here = Arc::new(Notify::new());
    let silent = Script::new().read().tell(&here).stall();
    let streaming = Script::new().read().head(200, Framing::Chunked, &[("content-type", "text/plain")]).send("begun").tell(&here).stall();
    for script in [silent, streaming] {
        let upstream = Upstream::always(script).await;
        let gateway = gateway(&upstream.url(), "").await;
        let mut client = Http1::connect(gateway.addr).await;
        client.send(&Request::get("/files/a")).await;
        soon(here.notified(), "the request to arrive").await;
        client.abort();
        within(SOON, upstream.closed(1), "the upstream's connection to be closed").await;
    }
}

#[tokio::test]
async fn an_answer_that_is_cut_is_cut_for_the_client_too() {
    let begun = || Script::new().read().head(200, Framing::Chunked, &[("content-type", "text/plain")]).send("begun");
    let short = Script::new().read().head(200, Framing::Length(100), &[]).send("begun");
    for script in [begun().reset(), begun().close(), begun().half_chunk("x").close(), short.close(), begun().stall()] {
        let upstream = Upstream::always(script).await;
        let gateway = gateway(&upstream.url(), "").await;
        let mut client = Http1::connect(gateway.addr).await;
        client.send(&Request::get("/files/a")).await;
        if client.head().await.is_err() {
            // Cut before the head was passed on.
            continue;
        }
        let ended = async {
            loop {
                match client.chunk().await {
                    Ok(Some(_)) => {}
                    Ok(None) => panic!("a cut answer looks whole"),
                    Err(_) => return,
                }
            }
        };
        within(SOON, ended, "the answer to be cut").await;
    }
}

#[tokio::test]
async fn an_upgrade_is_a_tunnel_both_ways_until_one_side_ends() {
    let switched = "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\nwelcome;";
    let upstream = Upstream::always(Script::new().read().raw(switched).pause(Duration::from_millis(20)).raw("pong;").stall()).await;
    let gateway = gateway(&upstream.url(), "").await;
    let mut client = Http1::connect(gateway.addr).await;
    client.send(&Request::get("/files/ws").header("connection", "upgrade").header("upgrade", "echo")).await;
    let head = client.head().await.unwrap();
    assert!(head.start.contains("101") && head.header("upgrade") == Some("echo"), "{head:?}");
    let mut seen = String::new();
    while !seen.contains("pong;") {
        seen += &String::from_utf8_lossy(&client.read_bytes(100).await.unwrap());
    }
    assert_eq!(seen, "welcome;pong;");
    assert_eq!(upstream.request(0).await.header("upgrade"), Some("echo"));
    client.abort();
    within(SOON, upstream.closed(1), "the tunnel to be closed").await;
    let free = async {
        while gateway.process.app.drain().connections() > 0 {
            tokio::task::yield_now().await
        }
    };
    within(SOON, free, "the tunnel's place to be free").await;
}

#[tokio::test]
async fn bytes_after_an_upgrade_that_is_refused_are_no_tunnel() {
    let upstream = echo().await;
    let gateway = gateway(&upstream.url(), "").await;
    let mut client = Http1::connect(gateway.addr).await;
    let early =
        "GET /files/ws HTTP/1.1\r\nhost: h\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\nGET /files/hidden HTTP/1.1\r\nhost: h\r\n\r\n";
    client.send_bytes(early.as_bytes()).await;
    assert_eq!(client.reply().await.unwrap().json()["target"], "/files/ws");
    // They are the next request, which is parsed and judged as one, or nothing.
    drop(client.reply().await);
    for request in upstream.requests() {
        assert!(["/files/ws", "/files/hidden"].contains(&request.target.as_str()) && request.body.is_empty());
    }
    let unasked = Upstream::always(
        Script::new().read().raw("HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\n").stall(),
    )
    .await;
    let gateway = self::gateway(&unasked.url(), "").await;
    let reply = ask(gateway.addr, &Request::get("/files/a")).await.unwrap();
    assert_eq!((reply.status, reply.problem().unwrap().as_str()), (502, "upstream_protocol_error"));
}
