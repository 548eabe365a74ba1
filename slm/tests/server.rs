//! The server over real sockets, as OpenAI's clients, impatient clients and hostile clients meet it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use headgate_slm::{Options, Slm, serve};
use http::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

#[allow(dead_code, reason = "shared by the test programs, each of which uses a part")]
mod support;
use support::{PATIENCE, Reply, get, post, send};

const CHAT: &str = "/v1/chat/completions";
/// One token now, the next in an hour: a turn that is under way for as long as a test needs it.
const ONE_TOKEN: Option<f32> = Some(1.0 / 3600.0);

struct Server {
    address: SocketAddr,
    slm: Arc<Slm>,
    stop: oneshot::Sender<()>,
    serving: JoinHandle<()>,
}

async fn start(options: Options) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("an address");
    let slm = Arc::new(Slm::embedded());
    let (stop, stopped) = oneshot::channel::<()>();
    let shutdown = async move {
        // A dropped sender is a test that ended.
        let _ = stopped.await;
    };
    let serving = tokio::spawn(serve(listener, Arc::clone(&slm), options, shutdown));
    Server { address, slm, stop, serving }
}

fn ask(content: &str) -> Value {
    json!({"messages": [{"role": "user", "content": content}]})
}

fn with(mut request: Value, fields: Value) -> Value {
    let (Some(request_fields), Value::Object(fields)) = (request.as_object_mut(), fields) else { panic!("objects") };
    request_fields.extend(fields);
    request
}

/// The events of a stream: JSON values, and that `[DONE]` came last.
fn events(stream: &str) -> (Vec<Value>, bool) {
    let data: Vec<&str> = stream.split_terminator("\n\n").map(|e| e.strip_prefix("data: ").expect("only data lines")).collect();
    let is_done = data.last() == Some(&"[DONE]");
    let events = data.iter().filter(|d| **d != "[DONE]").map(|d| serde_json::from_str(d).expect("JSON")).collect();
    (events, is_done)
}

fn contents(events: &[Value]) -> Vec<&str> {
    events.iter().filter_map(|e| e["choices"][0]["delta"]["content"].as_str()).collect()
}

async fn error(reply: Reply) -> (StatusCode, String, Value) {
    let status = reply.status;
    let error = reply.json().await["error"].take();
    assert!(error["message"].is_string() && error["type"].is_string(), "an OpenAI error object: {error}");
    (status, error["code"].as_str().expect("a code").to_owned(), error["param"].clone())
}

#[tokio::test]
async fn a_streamed_answer_is_the_whole_one_in_pieces() {
    let server = start(Options::default()).await;
    let question = ask("what is your email address?");
    let whole = post(server.address, CHAT, &question).await.json().await;
    let reply = post(server.address, CHAT, &with(question, json!({"stream": true, "stream_options": {"include_usage": true}}))).await;
    assert_eq!(reply.headers["content-type"], "text/event-stream");
    let (events, is_done) = events(&reply.text().await);
    let (last, chunks) = events.split_last().expect("events");

    assert!(is_done);
    assert_eq!(contents(&events).concat(), whole["choices"][0]["message"]["content"].as_str().expect("text"));
    assert!(contents(&events).concat().contains("@example."), "the demo model gives an address");
    assert!(contents(&events).len() > 20, "token by token");
    assert_eq!(events[0]["choices"][0]["delta"]["role"], "assistant");
    assert!(chunks.iter().all(|c| c["usage"].is_null() && c["object"] == "chat.completion.chunk" && c["id"] == events[0]["id"]));
    assert_eq!(chunks.last().expect("a chunk")["choices"][0]["finish_reason"], "stop");
    assert_eq!((&last["usage"], &last["choices"]), (&whole["usage"], &json!([])));
    assert_eq!(whole["usage"]["completion_tokens"].as_u64(), Some(server.slm.tokens_generated() / 2));
}

#[tokio::test]
async fn without_being_asked_a_stream_has_no_usage() {
    let server = start(Options::default()).await;
    let (events, is_done) = events(&post(server.address, CHAT, &with(ask("hello"), json!({"stream": true}))).await.text().await);
    assert!(is_done && events.iter().all(|e| e.get("usage").is_none()));
}

#[tokio::test]
async fn a_stop_string_over_several_tokens_ends_the_answer_and_no_part_of_it_is_shown() {
    let server = start(Options::default()).await;
    let question = ask("what card is on file?");
    let whole = post(server.address, CHAT, &question).await.json().await;
    let whole = whole["choices"][0]["message"]["content"].as_str().expect("text");
    let number = whole.find(|c: char| c.is_ascii_digit()).expect("the demo model gives a card number");
    let stop = &whole[number..number + 9];
    assert!(server.slm.encode(stop).len() >= 9, "digits are tokens of their own");

    let request = with(question, json!({"stop": ["never said", stop]}));
    let cut = post(server.address, CHAT, &request).await.json().await;
    assert_eq!((&cut["choices"][0]["message"]["content"], &cut["choices"][0]["finish_reason"]), (&json!(whole[..number]), &json!("stop")));
    let (events, is_done) = events(&post(server.address, CHAT, &with(request, json!({"stream": true}))).await.text().await);
    assert_eq!((contents(&events).concat().as_str(), is_done), (&whole[..number], true));
}

#[tokio::test]
async fn characters_made_of_several_tokens_arrive_whole() {
    let server = start(Options::default()).await;
    let request = with(ask("do you have a café?"), json!({"stream": true}));
    let (events, _) = events(&post(server.address, CHAT, &request).await.text().await);
    let text = contents(&events).concat();
    assert!(server.slm.encode("€").len() >= 3, "the euro sign is spelled in bytes");
    assert!(text.contains('€') && text.contains('é') && !text.contains('\u{fffd}'), "{text}");
}

#[tokio::test]
async fn the_token_limit_ends_an_answer_with_length() {
    let server = start(Options::default()).await;
    for name in ["max_tokens", "max_completion_tokens"] {
        let answer = post(server.address, CHAT, &with(ask("tell me a long story"), json!({name: 7}))).await.json().await;
        assert_eq!((&answer["choices"][0]["finish_reason"], &answer["usage"]["completion_tokens"]), (&json!("length"), &json!(7)));
    }
}

#[tokio::test]
async fn a_seed_gives_the_same_answer_twice() {
    let server = start(Options::default()).await;
    let request = |seed: u64| with(ask("hello"), json!({"temperature": 1.5, "top_p": 0.95, "seed": seed}));
    let text = async |seed: u64| post(server.address, CHAT, &request(seed)).await.json().await["choices"].take();
    assert_eq!(text(1).await, text(1).await);
    let mut others = Vec::new();
    for seed in 2..6 {
        others.push(text(seed).await);
    }
    assert!(others.iter().any(|o| *o != others[0]), "another seed gives another answer: {others:?}");
}

#[tokio::test]
async fn a_client_who_leaves_a_stream_stops_the_model() {
    let server = start(Options { turns: 1, pace: ONE_TOKEN, debug_requests: true, ..Options::default() }).await;
    let mut leaving = post(server.address, CHAT, &with(ask("tell me a long story"), json!({"stream": true}))).await;
    leaving.next().await.expect("the first token");
    let waiting = tokio::spawn(async move { post(server.address, CHAT, &with(ask("hello"), json!({"max_tokens": 1}))).await.status });
    drop(leaving);
    // The one place is free only when the first turn is gone.
    assert_eq!(waiting.await.expect("no panic"), StatusCode::OK);
    assert_eq!(server.slm.tokens_generated(), 2, "one token for each");
    let seen = get(server.address, "/debug/requests").await.json().await;
    assert_eq!(seen["requests"][0]["end"], "cancelled");
}

#[tokio::test]
async fn a_client_who_leaves_before_the_answer_is_whole_stops_the_model() {
    let server = start(Options { turns: 1, pace: ONE_TOKEN, ..Options::default() }).await;
    let address = server.address;
    let leaving = tokio::spawn(async move { post(address, CHAT, &ask("tell me a long story")).await.status });
    while server.slm.tokens_generated() == 0 {
        assert!(get(address, "/health").await.status.is_success());
    }
    leaving.abort();
    assert!(leaving.await.expect_err("still waiting").is_cancelled());
    assert_eq!(post(address, CHAT, &with(ask("hello"), json!({"max_tokens": 1}))).await.status, StatusCode::OK);
    assert_eq!(server.slm.tokens_generated(), 2, "one token for each");
}

#[tokio::test]
async fn a_turn_too_many_is_told_to_come_back() {
    let server = start(Options { turns: 1, queue: 0, pace: ONE_TOKEN, ..Options::default() }).await;
    let mut first = post(server.address, CHAT, &with(ask("hello"), json!({"stream": true}))).await;
    first.next().await.expect("the first token");
    let refused = post(server.address, CHAT, &ask("hello")).await;
    assert_eq!(refused.headers["retry-after"], "1");
    assert_eq!(error(refused).await, (StatusCode::SERVICE_UNAVAILABLE, "server_busy".into(), Value::Null));
}

#[tokio::test]
async fn a_turn_that_waits_too_long_is_told_to_come_back() {
    let queue_wait = Duration::from_millis(30);
    let server = start(Options { turns: 1, queue: 1, queue_wait, pace: ONE_TOKEN, ..Options::default() }).await;
    let mut first = post(server.address, CHAT, &with(ask("hello"), json!({"stream": true}))).await;
    first.next().await.expect("the first token");
    let refused = post(server.address, CHAT, &ask("hello")).await;
    assert_eq!(refused.headers["retry-after"], "1");
    assert_eq!(error(refused).await.1, "server_busy");
}

#[tokio::test]
async fn turns_side_by_side_get_the_answers_they_get_alone() {
    let server = start(Options { turns: 8, ..Options::default() }).await;
    let address = server.address;
    let questions = ["hello", "what is your iban", "tell me a long story", "tell me a secret", "who are you", "I forgot my password"];
    let mut alone = Vec::new();
    for question in questions {
        alone.push(post(address, CHAT, &ask(question)).await.json().await["choices"].take());
    }
    let questions = questions.into_iter().cycle().take(24);
    let together: Vec<_> =
        questions.map(|q| tokio::spawn(async move { post(address, CHAT, &ask(q)).await.json().await["choices"].take() })).collect();
    for (reply, expected) in together.into_iter().zip(alone.iter().cycle()) {
        assert_eq!(reply.await.expect("no panic"), *expected);
    }
}

#[tokio::test]
async fn bad_requests_are_refused_in_openais_words() {
    let server = start(Options { body_bytes: 4096, ..Options::default() }).await;
    let raw = async |body: &str| error(send(server.address, Method::POST, CHAT, &[], body.to_owned()).await).await;
    let bad = StatusCode::BAD_REQUEST;
    assert_eq!(raw("{\"messages\":").await, (bad, "invalid_json".into(), Value::Null));
    assert_eq!(raw("[]").await, (bad, "invalid_json".into(), Value::Null));
    assert_eq!(raw("").await, (bad, "invalid_json".into(), Value::Null));
    assert_eq!(raw(&"[".repeat(4000)).await, (bad, "invalid_json".into(), Value::Null));
    assert_eq!(raw(&with(ask("hi"), json!({"n": 2})).to_string()).await, (bad, "unsupported_value".into(), json!("n")));
    assert_eq!(raw(&json!({"model": "x"}).to_string()).await, (bad, "invalid_value".into(), json!("messages")));
    assert_eq!(raw(&ask(&"order ".repeat(500)).to_string()).await, (bad, "context_length_exceeded".into(), json!("messages")));
    assert_eq!(raw(&ask(&"x".repeat(5000)).to_string()).await, (StatusCode::PAYLOAD_TOO_LARGE, "body_too_large".into(), Value::Null));
    assert_eq!(error(get(server.address, "/nothing").await).await.0, StatusCode::NOT_FOUND);
    assert_eq!(error(get(server.address, CHAT).await).await.0, StatusCode::METHOD_NOT_ALLOWED);
    assert_eq!(server.slm.tokens_generated(), 0);
}

#[tokio::test]
async fn unknown_fields_are_ignored_and_any_model_name_is_answered_by_the_one_there_is() {
    let server = start(Options::default()).await;
    let request =
        with(ask("hello"), json!({"model": "another", "tools": [{"type": "function"}], "logit_bias": {"1": 2}, "user": "u", "n": 1}));
    let answer = post(server.address, CHAT, &request).await.json().await;
    assert_eq!(answer["model"], "headgate-demo-2m");
    let models = get(server.address, "/v1/models").await.json().await;
    assert_eq!(models["data"][0]["id"], "headgate-demo-2m");
}

#[tokio::test]
async fn what_arrived_can_be_asked_for_without_text_and_without_secrets() {
    let server = start(Options { debug_requests: true, ..Options::default() }).await;
    let (trace, parent) = ("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7");
    let traceparent = format!("00-{trace}-{parent}-01");
    let headers = [("traceparent", traceparent.as_str()), ("policy-verdict", "e30.e30.c2ln"), ("authorization", "Bearer hush-hush")];
    let reply = send(server.address, Method::POST, CHAT, &headers, ask("my secret word is xyzzy").to_string()).await;
    let answer = reply.json().await;
    let seen = get(server.address, "/debug/requests").await.text().await;
    assert!(!seen.contains("xyzzy") && !seen.contains("hush-hush"), "{seen}");
    let seen: Value = serde_json::from_str(&seen).expect("JSON");
    let seen = &seen["requests"][0];
    assert_eq!((&seen["id"], &seen["usage"], &seen["end"]), (&answer["id"], &answer["usage"], &json!("stop")));
    assert_eq!((&seen["trace_id"], &seen["parent_span_id"]), (&json!(trace), &json!(parent)));
    for (name, value) in [("policy-verdict", json!("e30.e30.c2ln")), ("traceparent", json!(traceparent)), ("authorization", Value::Null)] {
        assert!(seen["headers"].as_array().expect("headers").contains(&json!([name, value])), "{name} in {seen}");
    }
}

#[tokio::test]
async fn unless_asked_for_nothing_is_remembered() {
    let server = start(Options::default()).await;
    assert_eq!(get(server.address, "/debug/requests").await.status, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn at_shutdown_a_turn_under_way_ends_in_order() {
    let server = start(Options { pace: Some(200.0), ..Options::default() }).await;
    let mut under_way = post(server.address, CHAT, &with(ask("hello"), json!({"stream": true}))).await;
    let mut stream = under_way.next().await.expect("the first token").to_vec();
    server.stop.send(()).expect("the server runs");
    while let Some(bytes) = under_way.next().await {
        stream.extend_from_slice(&bytes);
    }
    assert!(events(std::str::from_utf8(&stream).expect("UTF-8")).1, "the stream ends with [DONE]");
    tokio::time::timeout(PATIENCE, server.serving).await.expect("the server ends").expect("no panic");
    assert!(TcpStream::connect(server.address).await.is_err(), "nobody listens");
}

#[tokio::test]
async fn at_shutdown_a_turn_that_does_not_end_is_cut() {
    let server = start(Options { pace: ONE_TOKEN, drain: Duration::from_millis(20), ..Options::default() }).await;
    let mut under_way = post(server.address, CHAT, &with(ask("hello"), json!({"stream": true}))).await;
    under_way.next().await.expect("the first token");
    server.stop.send(()).expect("the server runs");
    tokio::time::timeout(PATIENCE, server.serving).await.expect("the server ends").expect("no panic");
}

#[tokio::test]
async fn a_client_who_reads_nothing_loses_its_connection() {
    use tokio::io::AsyncWriteExt;
    let server = start(Options { connections: 1, stall: Duration::from_millis(50), ..Options::default() }).await;
    // Requests in a row on a connection nobody reads: their answers fill every buffer between.
    let mut stuck = TcpStream::connect(server.address).await.expect("the server listens");
    let requests = "GET /v1/models HTTP/1.1\r\nhost: slm\r\n\r\n".repeat(100);
    // Writing fails when the server has given up.
    let writing = async { while stuck.write_all(requests.as_bytes()).await.is_ok() {} };
    tokio::time::timeout(PATIENCE, writing).await.expect("given up in time");
    assert!(get(server.address, "/health").await.status.is_success(), "its place is free for another");
}

#[tokio::test]
async fn garbage_costs_its_own_connection_and_no_other() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let server = start(Options::default()).await;
    for garbage in [&b"\x16\x03\x01\x02\x00\x01"[..], b"GET / HTTP/9.9\r\n\r\n", &[0xff; 100_000]] {
        let mut stream = TcpStream::connect(server.address).await.expect("the server listens");
        // The server may close before all is written.
        let _ = stream.write_all(garbage).await;
        let _ = stream.shutdown().await;
        let _ = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut Vec::new())).await.expect("closed in time");
    }
    assert_eq!(send(server.address, Method::GET, "/health", &[], Bytes::new()).await.text().await, r#"{"status":"ok"}"#);
}
