//! Requests that two readers might read differently: each is read in one way or refused, and what reaches an upstream is what
//! was answered, in this order, and nothing that hid in it.

use std::time::Duration;

use headgate_testkit::{
    client::Http1,
    dialect::{Answer, Cut},
    upstream::{Script, Upstream},
    within,
};
use serde_json::json;

use crate::support::{Gateway, start};

const SOON: Duration = Duration::from_secs(5);
const TURN: &str = "{\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}]}";
/// What is smuggled: if anybody takes it for a request, an upstream sees its target.
const HIDDEN: &str = "GET /files/hidden HTTP/1.1\r\nhost: h\r\n\r\n";

/// What has to come of a connection's bytes.
#[derive(Debug, Clone, Copy)]
enum Outcome {
    /// A refusal with this status, nothing sent on, and the end of the connection.
    Refused(u16),
    /// An answer, to the request as it stands there with a body of so many bytes, and the next request is read from where it begins.
    Taken(usize),
    /// Answers of these statuses, as the requests that stand there openly, and the connection goes on.
    Answered(&'static [u16]),
}
use Outcome::{Answered, Refused, Taken};

/// A gateway with a chat route and a plain one in front of one upstream, which answers what it was asked.
async fn both() -> (Gateway, Upstream) {
    let upstream = Upstream::answering(|request| match request.target.as_str() {
        "/v1/chat/completions" => Script::stream(Answer::openai("demo", &["Hello"]).cut(Cut::Events)),
        target => Script::reply(200, "application/json", json!({"target": target, "bytes": request.body.len()}).to_string()),
    })
    .await;
    let folder = tempfile::tempdir().unwrap();
    let url = upstream.url();
    let yaml = format!(
        "listen: 127.0.0.1:1\nadmin: {{ listen: \"127.0.0.1:2\" }}\nworkers: 1\nupstreams:\n  files: {{ protocol: http, endpoints: [\"{url}\"], health: {{ interval: 0s }} }}\n  \
         model: {{ protocol: openai, endpoints: [\"{url}\"], health: {{ interval: 0s }} }}\n\
         routes:\n  - {{ path: /files/*, kind: proxy, upstream: files }}\n  - {{ path: /v1/chat/stream, upstream: model }}\n"
    );
    std::fs::write(folder.path().join("headgate.yaml"), &yaml).unwrap();
    let plan = headgate_config::load(&folder.path().join("headgate.yaml"), None, &|_| None);
    (start(&plan.unwrap_or_else(|faults| panic!("{faults}\n{yaml}")), folder).await, upstream)
}

/// Sends `bytes` over a connection of its own, and holds what comes of them against `outcome`.
async fn check(gateway: &Gateway, upstream: &Upstream, what: &str, bytes: &[u8], outcome: Outcome) {
    let before = upstream.requests().len();
    let mut client = Http1::connect(gateway.addr).await;
    client.send_bytes(bytes).await;
    let mut sent = 0;
    let statuses = match &outcome {
        Refused(status) => std::slice::from_ref(status),
        Taken(_) => &[200],
        Answered(statuses) => statuses,
    };
    for status in statuses {
        let reply = within(SOON, client.reply(), what).await.unwrap_or_else(|broken| panic!("{what}: {broken}"));
        assert_eq!(reply.status, *status, "{what}: {}", reply.text());
        if let Taken(bytes) = outcome
            && reply.header("content-type") == Some("application/json")
        {
            assert_eq!(reply.json()["bytes"], bytes, "{what}");
        }
        sent += usize::from(reply.status == 200);
    }
    match outcome {
        Refused(_) => {
            let silence = async {
                while client
                    .read_bytes(4096)
                    .await
                    .inspect(|bytes| assert_eq!(&bytes[..], b"", "{what}"))
                    .is_ok_and(|bytes| !bytes.is_empty())
                {}
            };
            within(SOON, silence, what).await;
        }
        Taken(_) | Answered(_) => {
            // The next request is read from its first byte, and nothing is answered before it.
            client.send_bytes(b"GET /files/last HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n").await;
            let reply = within(SOON, client.reply(), what).await.unwrap_or_else(|broken| panic!("{what}: {broken}"));
            assert_eq!(reply.json()["target"], "/files/last", "{what}");
            within(SOON, client.closed(), what).await.unwrap();
            sent += 1;
        }
    }
    let seen = &upstream.requests()[before..];
    assert_eq!(seen.len(), sent, "{what}: {seen:?}");
    for request in seen {
        assert_ne!(request.target, "/files/hidden", "{what}");
        let framings = request.head.all("content-length").count() + request.head.all("transfer-encoding").count();
        assert!(framings <= 1, "{what}: {:?}", request.head);
        if request.target == "/v1/chat/completions" {
            assert_eq!(request.json()["messages"][0]["content"], "hi", "{what}");
        }
    }
}

#[tokio::test]
async fn a_body_has_one_framing_or_its_request_is_refused() {
    let (gateway, upstream) = both().await;
    for (path, body) in [("/files/a", "hello"), ("/v1/chat/stream", TURN)] {
        let n = body.len();
        let chunked = format!("{n:x}\r\n{body}\r\n0\r\n\r\n");
        let split = format!("1\r\n{}\r\n{:X}\r\n{}\r\n0\r\n\r\n", &body[..1], n - 1, &body[1..]);
        let cases: Vec<(&str, String, String, Outcome)> = vec![
            ("a length", format!("content-length: {n}"), body.into(), Taken(n)),
            ("a length in capitals with blanks around it", format!("CONTENT-LENGTH: \t {n} \t"), body.into(), Taken(n)),
            ("chunks", "transfer-encoding: chunked".into(), chunked.clone(), Taken(n)),
            ("chunks in capitals", "Transfer-Encoding: CHUNKED".into(), split.clone(), Taken(n)),
            (
                "a length before chunks",
                format!("content-length: {n}\r\ntransfer-encoding: chunked"),
                chunked.clone() + HIDDEN,
                Refused(400),
            ),
            ("a length after chunks", format!("transfer-encoding: chunked\r\ncontent-length: {n}"), chunked.clone() + HIDDEN, Refused(400)),
            ("no length before chunks", "content-length: 0\r\ntransfer-encoding: chunked".into(), chunked.clone() + HIDDEN, Refused(400)),
            (
                "the end of chunks as a length",
                "content-length: 5\r\ntransfer-encoding: chunked".into(),
                format!("0\r\n\r\n{HIDDEN}"),
                Refused(400),
            ),
            ("two lengths", format!("content-length: {n}\r\ncontent-length: 0"), body.to_owned() + HIDDEN, Refused(400)),
            ("two lengths the other way", format!("content-length: 0\r\ncontent-length: {n}"), body.to_owned() + HIDDEN, Refused(400)),
            ("one length twice", format!("content-length: {n}\r\ncontent-length: {n}"), body.to_owned() + HIDDEN, Refused(400)),
            ("one length twice in a line", format!("content-length: {n}, {n}"), body.to_owned() + HIDDEN, Refused(400)),
            ("a length with a plus", format!("content-length: +{n}"), body.to_owned() + HIDDEN, Refused(400)),
            ("a length below nothing", "content-length: -1".into(), HIDDEN.into(), Refused(400)),
            ("a length in hexadecimal", format!("content-length: 0x{n:x}"), body.to_owned() + HIDDEN, Refused(400)),
            ("a length with a fraction", format!("content-length: {n}.0"), body.to_owned() + HIDDEN, Refused(400)),
            ("a length with a blank inside", "content-length: 1 0".into(), body.to_owned() + HIDDEN, Refused(400)),
            ("a length that is too large for anybody", "content-length: 18446744073709551616".into(), HIDDEN.into(), Refused(400)),
            ("a length that wraps around", "content-length: 18446744073709551615".into(), HIDDEN.into(), Refused(431)),
            ("an empty length", "content-length:".into(), HIDDEN.into(), Refused(400)),
            ("a length on a folded line", format!("content-length:\r\n {n}"), body.to_owned() + HIDDEN, Refused(400)),
            ("a length behind many blanks", format!("content-length:{}{n}", " ".repeat(60)), body.to_owned() + HIDDEN, Refused(400)),
            ("a length with other digits", "content-length: ５".into(), HIDDEN.into(), Refused(400)),
            ("an underscore", format!("content_length: 0\r\ncontent-length: {n}"), body.into(), Taken(n)),
            ("gzip before chunks", "transfer-encoding: gzip, chunked".into(), chunked.clone() + HIDDEN, Refused(400)),
            ("gzip after chunks", "transfer-encoding: chunked, gzip".into(), chunked.clone() + HIDDEN, Refused(400)),
            ("identity", "transfer-encoding: identity".into(), HIDDEN.into(), Refused(400)),
            (
                "identity and a length",
                format!("transfer-encoding: identity\r\ncontent-length: {n}"),
                body.to_owned() + HIDDEN,
                Refused(400),
            ),
            ("chunks twice", "transfer-encoding: chunked\r\ntransfer-encoding: chunked".into(), chunked.clone() + HIDDEN, Refused(400)),
            ("chunks twice in a line", "transfer-encoding: chunked, chunked".into(), chunked.clone() + HIDDEN, Refused(400)),
            (
                "identity, then chunks",
                "transfer-encoding: identity\r\ntransfer-encoding: chunked".into(),
                chunked.clone() + HIDDEN,
                Refused(400),
            ),
            (
                "chunks, then identity",
                "transfer-encoding: chunked\r\ntransfer-encoding: identity".into(),
                chunked.clone() + HIDDEN,
                Refused(400),
            ),
            ("an empty encoding", "transfer-encoding:".into(), chunked.clone() + HIDDEN, Refused(400)),
            ("an encoding with a letter before", "transfer-encoding: xchunked".into(), chunked.clone() + HIDDEN, Refused(400)),
            ("an encoding in quotes", "transfer-encoding: \"chunked\"".into(), chunked.clone() + HIDDEN, Refused(400)),
            ("an encoding with a parameter", "transfer-encoding: chunked;a=b".into(), chunked.clone() + HIDDEN, Refused(400)),
            ("an encoding after a vertical tab", "transfer-encoding: \u{b}chunked".into(), chunked.clone() + HIDDEN, Refused(400)),
            ("a blank before the colon of a length", format!("content-length : {n}"), body.to_owned() + HIDDEN, Refused(400)),
            ("a blank before the colon of chunks", "transfer-encoding : chunked".into(), chunked.clone() + HIDDEN, Refused(400)),
            ("a tab before the colon of chunks", "transfer-encoding\t: chunked".into(), chunked.clone() + HIDDEN, Refused(400)),
            ("chunks on a folded line", "transfer-encoding:\r\n chunked".into(), chunked.clone() + HIDDEN, Refused(400)),
            (
                "chunks on a line that begins with a blank",
                format!("content-length: {n}\r\n transfer-encoding: chunked"),
                body.to_owned() + HIDDEN,
                Refused(400),
            ),
            (
                "chunks behind a bare line feed",
                format!("content-length: {n}\r\nx: y\ntransfer-encoding: chunked"),
                chunked.clone() + HIDDEN,
                Refused(400),
            ),
            (
                "chunks behind a bare carriage return",
                format!("content-length: {n}\r\nx: y\rtransfer-encoding: chunked"),
                body.to_owned() + HIDDEN,
                Refused(400),
            ),
            ("a NUL in chunks", "transfer-encoding: chu\0nked".into(), chunked.clone() + HIDDEN, Refused(400)),
            ("a NUL in a name", format!("content-length\0: 0\r\ncontent-length: {n}"), body.to_owned() + HIDDEN, Refused(400)),
        ];
        for (what, fields, body, outcome) in cases {
            let bytes = format!("POST {path} HTTP/1.1\r\nhost: h\r\ncontent-type: application/json\r\n{fields}\r\n\r\n{body}");
            check(&gateway, &upstream, &format!("{what}, {path}"), bytes.as_bytes(), outcome).await;
        }
        let old = format!(
            "POST {path} HTTP/1.0\r\nhost: h\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n{chunked}{HIDDEN}"
        );
        check(&gateway, &upstream, "chunks in HTTP/1.0", old.as_bytes(), Refused(400)).await;
    }
}

#[tokio::test]
async fn chunks_that_are_none_end_their_request_and_the_connection() {
    let (gateway, upstream) = both().await;
    let long = format!("5;{}\r\nhello\r\n0\r\n\r\n", "x".repeat(40 << 10));
    for (what, chunks) in [
        ("a size with a plus", "+5\r\nhello\r\n0\r\n\r\n"),
        ("a size below nothing", "-5\r\nhello\r\n0\r\n\r\n"),
        ("a size with 0x", "0x5\r\nhello\r\n0\r\n\r\n"),
        ("a size that is too large for anybody", "10000000000000000\r\nhello\r\n0\r\n\r\n"),
        ("a size that wraps around", "fffffffffffffffff5\r\nhello\r\n0\r\n\r\n"),
        ("no size", "\r\nhello\r\n0\r\n\r\n"),
        ("an underscore", "5_0\r\nhello\r\n0\r\n\r\n"),
        ("a bare line feed after the size", "5\nhello\r\n0\r\n\r\n"),
        ("a bare line feed in an extension", "5;a\nb\r\nhello\r\n0\r\n\r\n"),
        ("a bare line feed after the chunk", "5\r\nhello\n0\r\n\r\n"),
        ("bytes after the chunk", "5\r\nhelloXX0\r\n\r\n"),
        ("an extension without an end", &long),
    ] {
        for (path, before) in [("/files/a", ""), ("/v1/chat/stream", "1\r\n{\r\n")] {
            let what = format!("{what}, {path}");
            let bytes = format!(
                "POST {path} HTTP/1.1\r\nhost: h\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n{before}{chunks}{HIDDEN}"
            );
            let mut client = Http1::connect(gateway.addr).await;
            client.send_bytes(bytes.as_bytes()).await;
            // A plain route has begun to pass the body on before it breaks; nobody takes it for a whole one.
            if let Ok(reply) = within(SOON, client.reply(), &what).await {
                assert!(reply.status >= 400, "{what}: {}", reply.status);
            }
            let rest = async { while client.read_bytes(4096).await.is_ok_and(|bytes| !bytes.is_empty()) {} };
            within(SOON, rest, &what).await;
        }
    }
    assert!(upstream.requests().is_empty(), "{:?}", upstream.requests());
}

#[tokio::test]
async fn chunks_that_are_odd_and_legal_are_read_as_they_stand() {
    let (gateway, upstream) = both().await;
    let hidden = format!("{:x}\r\n{HIDDEN}\r\n0\r\n\r\n", HIDDEN.len());
    for (what, chunks, bytes) in [
        ("an extension", "5;a=b;c=\"d\"\r\nhello\r\n0;e\r\n\r\n", 5),
        ("zeros before the size", "000005\r\nhello\r\n00\r\n\r\n", 5),
        ("a length as a trailer", "5\r\nhello\r\n0\r\ncontent-length: 99\r\n\r\n", 5),
        ("an encoding as a trailer", "5\r\nhello\r\n0\r\ntransfer-encoding: chunked\r\n\r\n", 5),
        ("a request as a chunk", &hidden, HIDDEN.len()),
    ] {
        let request = format!("POST /files/a HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n{chunks}");
        check(&gateway, &upstream, what, request.as_bytes(), Taken(bytes)).await;
    }
}

#[tokio::test]
async fn whom_a_request_is_for_is_said_once() {
    let (gateway, upstream) = both().await;
    for (what, start, fields, outcome) in [
        ("one host", "GET /files/a", "host: h", Taken(0)),
        ("a host with a port", "GET /files/a", "host: h:8080", Taken(0)),
        ("an address", "GET /files/a", "host: [::1]:8080", Taken(0)),
        ("no host", "GET /files/a", "x: y", Refused(400)),
        ("two hosts", "GET /files/a", "host: h\r\nhost: other", Refused(400)),
        ("one host twice", "GET /files/a", "host: h\r\nHost: h", Refused(400)),
        ("an empty host", "GET /files/a", "host:", Refused(400)),
        ("two hosts in a line", "GET /files/a", "host: h, other", Refused(400)),
        ("a host with a path", "GET /files/a", "host: h/x", Refused(400)),
        ("a host with a user", "GET /files/a", "host: user@h", Refused(400)),
        ("a host with a blank", "GET /files/a", "host: h other", Refused(400)),
        ("a blank before the colon of a host", "GET /files/a", "host : h", Refused(400)),
        ("a host on a folded line", "GET /files/a", "host: h\r\n other", Refused(400)),
        ("a target that names the host", "GET http://h/files/a", "host: h", Taken(0)),
        ("a target that names another host", "GET http://other/files/a", "host: h", Refused(400)),
        ("a target with another port", "GET http://h:81/files/a", "host: h", Refused(400)),
        ("a target with a user", "GET http://h@other/files/a", "host: h", Refused(400)),
        ("a tunnel", "CONNECT h:443", "host: h:443", Answered(&[404])),
        ("an asterisk", "OPTIONS *", "host: h", Answered(&[404])),
        ("a name of no header", "GET /files/a", "host: h\r\nx y: z", Refused(400)),
        ("an empty name", "GET /files/a", "host: h\r\n: z", Refused(400)),
        ("a line without a colon", "GET /files/a", "host: h\r\nxyz", Refused(400)),
        ("a folded line", "GET /files/a", "host: h\r\nx: y\r\n\tz", Refused(400)),
        ("a fragment", "GET /files/a#b", "host: h", Taken(0)),
        ("a blank in the target", "GET /files/a /b", "host: h", Refused(400)),
        ("a tab in the target", "GET /files/a\tb", "host: h", Refused(400)),
        ("two blanks before the target", "GET  /files/a", "host: h", Refused(400)),
        ("a blank before the method", " GET /files/a", "host: h", Refused(400)),
        ("a method with a colon", "G:T /files/a", "host: h", Refused(400)),
        ("a control character in a value", "GET /files/a", "host: h\r\nx: a\u{1}b", Refused(400)),
    ] {
        let bytes = format!("{start} HTTP/1.1\r\n{fields}\r\n\r\n");
        check(&gateway, &upstream, what, bytes.as_bytes(), outcome).await;
    }
    for (what, bytes, outcome) in [
        ("empty lines before a request", "\r\n\r\nGET /files/a HTTP/1.1\r\nhost: h\r\n\r\n", Taken(0)),
        ("a bare line feed before a request", "\nGET /files/a HTTP/1.1\r\nhost: h\r\n\r\n", Refused(400)),
        ("bare line feeds", "GET /files/a HTTP/1.1\nhost: h\n\n", Refused(400)),
        ("a bare line feed at the end", "GET /files/a HTTP/1.1\r\nhost: h\r\n\n", Refused(400)),
        ("no version", "GET /files/a\r\nhost: h\r\n\r\n", Refused(400)),
        ("an older version", "GET /files/a HTTP/0.9\r\nhost: h\r\n\r\n", Refused(400)),
        ("a version with three digits", "GET /files/a HTTP/1.10\r\nhost: h\r\n\r\n", Refused(400)),
        ("a version in small letters", "GET /files/a http/1.1\r\nhost: h\r\n\r\n", Refused(400)),
        ("two requests, openly", "GET /files/a HTTP/1.1\r\nhost: h\r\n\r\nGET /files/b HTTP/1.1\r\nhost: h\r\n\r\n", Answered(&[200, 200])),
        (
            "a body that nobody announced",
            "GET /files/a HTTP/1.1\r\nhost: h\r\n\r\nGET /nowhere HTTP/1.1\r\nhost: h\r\n\r\n",
            Answered(&[200, 404]),
        ),
    ] {
        check(&gateway, &upstream, what, bytes.as_bytes(), outcome).await;
    }
}
