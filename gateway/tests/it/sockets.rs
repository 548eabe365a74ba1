//! Many turns on one WebSocket: whose they are, how they are stopped and counted, and every way the socket is closed.

use std::{sync::Arc, time::Duration};

use headgate_testkit::{
    answer::Kind,
    at_once,
    client::{Http1, Http2, Request, ask, stream},
    dialect::{Answer, Cut},
    soon,
    upstream::{Script, Upstream},
    within,
    ws::{Frame, Ws},
};
use serde_json::json;
use tokio::{net::TcpStream, sync::Notify};
use tokio_tungstenite::tungstenite::Message;

use crate::{
    security::{Provider, SigningKey, with},
    support::{Gateway, Setup, end, key, start},
};

const SECOND: Duration = Duration::from_secs(1);

/// A model that says these pieces, and the last of them only when it is told to go on.
fn halting(texts: &[&str], go: &Arc<Notify>) -> Script {
    let mut events = Answer::openai("demo", texts).events();
    // The last text, the finish and the mark of the end.
    let rest = events.split_off(texts.len());
    Script::new().read().sse().send(events.concat()).wait(go).send(rest.concat()).end()
}

fn model(texts: &[&str]) -> Script {
    Script::stream(Answer::openai("demo", texts).cut(Cut::Events))
}

async fn connect(gateway: &Gateway) -> Ws {
    Ws::connect(gateway.addr).await.expect("a WebSocket")
}

async fn frame(ws: &mut Ws) -> Frame {
    ws.next().await.unwrap().expect("a frame")
}

fn code(frame: &Frame) -> &str {
    frame.event.text("code").expect("a code")
}

#[tokio::test]
async fn a_socket_that_does_not_say_whose_it_is_in_time_is_closed() {
    let (key, auth) = key();
    let upstream = Upstream::always(model(&["Hello"])).await;
    let (mut plan, folder) = Setup::chain(&[auth]).plan(&upstream.url());
    plan.limits.head = SECOND;
    let gateway = start(&plan, folder).await;
    let (mut silent, mut named) = (connect(&gateway).await, connect(&gateway).await);
    named.auth(key).await;
    let closed = at_once(silent.closed(), "the socket to be closed").await.unwrap();
    assert_eq!((closed.code, closed.reason.as_str()), (3000, "unauthenticated"));
    assert_eq!(named.ask("r", "hi").await.unwrap().text(), "Hello");
}

#[tokio::test]
async fn two_turns_run_at_once_and_each_is_known_by_the_clients_name_for_it() {
    let (one, two) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let upstream = Upstream::answering({
        let (one, two) = (one.clone(), two.clone());
        move |request| {
            if request.body.windows(5).any(|bytes| bytes == b"first") { halting(&["a", "b"], &one) } else { halting(&["c", "d"], &two) }
        }
    })
    .await;
    let gateway = Setup::new().start(&upstream.url()).await;
    let mut ws = connect(&gateway).await;
    ws.turn("1", "first").await;
    ws.turn("2", "second").await;
    let (first, second) = (ws.opened("1").await.unwrap(), ws.opened("2").await.unwrap());
    two.notify_one();
    assert_eq!(ws.finish(&second).await.unwrap().text(), "cd");
    one.notify_one();
    assert_eq!(ws.finish(&first).await.unwrap().text(), "ab");
    assert_eq!(gateway.ended().await, [end("complete", "ok", 2)]);
}

#[tokio::test]
async fn a_websocket_may_be_one_stream_of_http2() {
    let upstream = Upstream::always(model(&["Hello", " there"])).await;
    let gateway = Setup::new().start(&upstream.url()).await;
    let mut client = Http2::connect(gateway.addr).await;
    let mut ws = Ws::over_http2(&mut client, &Request::get("/v1/chat/stream")).await.expect("a WebSocket");
    assert_eq!(ws.ask("a", "hi").await.unwrap().text(), "Hello there");
    // Beside it, a turn over server-sent events of the same connection.
    let events = client.events(&Request::turn("hi"), headgate_testkit::answer::Judge::new(Kind::Client)).await.unwrap();
    assert_eq!(events.rest().await.unwrap().text(), "Hello there");
    assert_eq!(ws.ask("b", "hi").await.unwrap().text(), "Hello there");
    assert_eq!(ws.close(1000, "").await.unwrap().code, 1000);
}

#[tokio::test]
async fn a_turn_is_stopped_by_its_id_and_keeps_what_it_said() {
    let go = Arc::new(Notify::new());
    let upstream = Upstream::always(halting(&["Hello", " there"], &go)).await;
    let gateway = Setup::new().start(&upstream.url()).await;
    let mut ws = connect(&gateway).await;
    ws.turn("a", "hi").await;
    let turn = ws.opened("a").await.unwrap();
    ws.stop(&turn).await;
    let stopped = ws.finish(&turn).await.unwrap();
    assert_eq!((stopped.text().as_str(), stopped.error()), ("Hello", Some("stopped")));
    at_once(upstream.closed(1), "the model to be stopped").await;
    assert_eq!(gateway.ended().await, [end("cancelled", "stopped", 1)]);
}

#[tokio::test]
async fn a_turn_is_stopped_by_the_clients_name_before_its_first_event() {
    let here = Arc::new(Notify::new());
    let upstream = Upstream::always(Script::new().read().tell(&here).stall()).await;
    let gateway = Setup::new().start(&upstream.url()).await;
    let mut ws = connect(&gateway).await;
    ws.turn("a", "hi").await;
    soon(here.notified(), "the model to be asked").await;
    ws.send(&json!({"type": "stop", "ref": "a"})).await;
    let stopped = frame(&mut ws).await;
    assert_eq!((code(&stopped), stopped.reference()), ("stopped", Some("a")));
    at_once(upstream.closed(1), "the model to be stopped").await;
    assert_eq!(gateway.ended().await, [end("cancelled", "stopped", 1)]);
    ws.send(&json!({"type": "stop", "ref": "a"})).await;
    let unknown = frame(&mut ws).await;
    assert_eq!((code(&unknown), unknown.reference()), ("session_not_found", Some("a")));
}

#[tokio::test]
async fn a_turn_is_stopped_from_another_connection_of_its_owner() {
    let go = Arc::new(Notify::new());
    let upstream = Upstream::always(halting(&["Hello", " there"], &go)).await;
    let gateway = Setup::new().start(&upstream.url()).await;
    let (mut ws, mut other) = (connect(&gateway).await, connect(&gateway).await);
    ws.turn("a", "hi").await;
    let turn = ws.opened("a").await.unwrap();
    other.stop(&turn).await;
    assert_eq!(ws.finish(&turn).await.unwrap().error(), Some("stopped"));
}

#[tokio::test]
async fn credit_is_counted_exactly_and_without_any_the_model_is_not_read() {
    let go = Arc::new(Notify::new());
    let flood = Answer::openai("demo", &[&"x".repeat(1000)]).events();
    let script = Script::new().read().sse().send(flood[..1].concat()).wait(&go).flood(flood[1].clone());
    let upstream = Upstream::always_unbuffered(script).await;
    let gateway = Setup::chain(&["backpressure: { max_buffered: 8KiB }"]).start(&upstream.url()).await;
    let mut ws = connect(&gateway).await;
    ws.turn("a", "hi").await;
    let turn = ws.opened("a").await.unwrap();
    ws.credit(&turn, 3).await;
    // Answered when the credit before it has been taken up.
    ws.send(&json!({"type": "confirm", "turn_id": turn, "id": "q", "accept": true})).await;
    assert_eq!(code(&frame(&mut ws).await), "not_found");
    go.notify_one();
    let read = upstream.blocked().await;
    assert!(read < 4 << 20, "{read} bytes were read of a model without credit");
    for seq in 1..=3 {
        assert_eq!(frame(&mut ws).await.event.seq, Some(seq));
    }
    // What comes next is the answer to this, and not a fourth event.
    ws.send(&json!({"type": "confirm", "turn_id": turn, "id": "q", "accept": true})).await;
    assert_eq!(code(&frame(&mut ws).await), "not_found");
    ws.credit(&turn, 2).await;
    assert_eq!((frame(&mut ws).await.event.seq, frame(&mut ws).await.event.seq), (Some(4), Some(5)));
    ws.abort();
    at_once(upstream.closed(1), "the model to be stopped").await;
}

#[tokio::test]
async fn a_turn_whose_last_event_took_the_last_credit_is_over() {
    let upstream = Upstream::always(model(&["Hello"])).await;
    let gateway = Setup::new().start(&upstream.url()).await;
    let mut ws = connect(&gateway).await;
    for _ in 0..33 {
        ws.turn("a", "hi").await;
        let turn = loop {
            let frame = frame(&mut ws).await;
            if frame.reference() == Some("a") {
                break frame.turn_id.unwrap();
            }
        };
        ws.credit(&turn, 3).await;
        assert!(ws.finish(&turn).await.unwrap().error().is_none());
    }
}

#[tokio::test]
async fn a_token_in_the_first_frame_or_in_the_subprotocol_says_who_asks() {
    let upstream = Upstream::always(model(&["Hello"])).await;
    let (key, auth) = key();
    let gateway = Setup::chain(&[auth]).start(&upstream.url()).await;
    let mut ws = connect(&gateway).await;
    ws.auth(key).await;
    assert_eq!(ws.ask("a", "hi").await.unwrap().text(), "Hello");
    let request = Request::get("/v1/chat/stream").header("sec-websocket-protocol", &format!("headgate.v1, bearer.{key}"));
    let mut ws = Ws::open(gateway.addr, &request).await.expect("a WebSocket");
    assert_eq!(ws.head.header("sec-websocket-protocol"), Some("headgate.v1"), "the token is not echoed");
    assert_eq!(ws.ask("a", "hi").await.unwrap().text(), "Hello");
    let mut ws = Ws::open(gateway.addr, &Request::get("/v1/chat/stream").bearer(key)).await.expect("a WebSocket");
    assert_eq!(ws.ask("a", "hi").await.unwrap().text(), "Hello");
}

#[tokio::test]
async fn a_wrong_token_is_an_error_and_then_the_end_of_the_socket() {
    let upstream = Upstream::always(model(&["Hello"])).await;
    let (_, auth) = key();
    let gateway = Setup::chain(&[auth]).start(&upstream.url()).await;
    let mut ws = connect(&gateway).await;
    ws.auth("hg_wrong").await;
    ws.turn("a", "hi").await;
    let refused = frame(&mut ws).await;
    assert_eq!((code(&refused), refused.reference()), ("unauthenticated", Some("a")));
    let closed = ws.closed().await.unwrap();
    assert_eq!((closed.code, closed.reason.as_str()), (3000, "unauthenticated"));
    assert_eq!(upstream.opened(), 0, "nobody was asked");
}

#[tokio::test]
async fn a_token_that_expires_ends_the_socket_with_its_next_turn_and_cuts_none() {
    let signing = SigningKey::new("a");
    let provider = Provider::start(&[&signing]).await;
    // A model that thinks for a while, so that a minute's messages are enough.
    let events = Answer::openai("demo", &["Hello"]).events();
    let script = Script::new().read().sse().send(events[..2].concat()).pause(SECOND / 2).send(events[2..].concat()).end().again();
    let upstream = Upstream::always(script).await;
    let gateway = Setup::chain(&[&provider.auth()]).start(&upstream.url()).await;
    let mut ws = connect(&gateway).await;
    // Clocks may differ by five seconds.
    let exp = headgate_filters::unix_now();
    ws.auth(&signing.token(&with(provider.claims(), "exp", exp.into()))).await;
    let mut whole = 0;
    let refused = loop {
        ws.turn("a", "hi").await;
        let first = frame(&mut ws).await;
        let Some(turn) = first.turn_id.clone() else { break first };
        assert_eq!(ws.finish(&turn).await.unwrap().text(), "Hello");
        whole += 1;
    };
    assert!(whole > 0);
    assert_eq!((code(&refused), refused.reference()), ("token_expired", Some("a")));
    let closed = ws.closed().await.unwrap();
    assert_eq!((closed.code, closed.reason.as_str()), (3000, "token_expired"));
}

#[tokio::test]
async fn what_is_no_frame_is_told_so_and_the_socket_goes_on() {
    let upstream = Upstream::always(model(&["Hello"])).await;
    let gateway = Setup::new().start(&upstream.url()).await;
    let mut ws = connect(&gateway).await;
    let unknown = "0193a5f0-7e1c-7000-8000-000000000000";
    for (sent, expected) in [
        ("no json", "malformed_json"),
        (r#"{"type":"sing"}"#, "invalid_request"),
        (r#"{"type":"turn","messages":[]}"#, "invalid_request"),
        (r#"{"type":"stop"}"#, "invalid_request"),
        (&json!({"type": "stop", "turn_id": unknown}).to_string(), "session_not_found"),
        (&json!({"type": "resume", "turn_id": unknown}).to_string(), "session_not_found"),
    ] {
        ws.send_message(Message::text(sent)).await;
        assert_eq!(code(&frame(&mut ws).await), expected, "{sent}");
    }
    assert_eq!(ws.ask("a", "hi").await.unwrap().text(), "Hello");
}

#[tokio::test]
async fn messages_that_break_the_rules_close_the_socket_with_their_own_code() {
    let upstream = Upstream::always(model(&["Hello"])).await;
    let gateway = Setup::new().start(&upstream.url()).await;
    let large = Message::text(json!({"type": "turn", "messages": [{"role": "user", "content": "x".repeat(70 << 10)}]}).to_string());
    for (message, expected) in [(Message::binary(vec![1, 2, 3]), 1003), (large, 1009)] {
        let mut ws = connect(&gateway).await;
        ws.send_message(message).await;
        assert_eq!(ws.closed().await.unwrap().code, expected);
    }
    // Text that is not UTF-8; a frame of a reserved kind; one that is not masked.
    for (bytes, expected) in
        [(&[0x81, 0x82, 0, 0, 0, 0, 0xc3, 0x28][..], 1007), (&[0x83, 0x80, 0, 0, 0, 0], 1002), (&[0x81, 0x01, b'x'], 1002)]
    {
        let mut client = upgraded(&gateway).await;
        client.send_bytes(bytes).await;
        assert_eq!(close_code(&mut client).await, expected, "{bytes:?}");
    }
}

/// A connection that has become a WebSocket, to be spoken to in bytes.
async fn upgraded(gateway: &Gateway) -> Http1<TcpStream> {
    let mut client = Http1::connect(gateway.addr).await;
    let request = Request::get("/v1/chat/stream").header("connection", "Upgrade").header("upgrade", "websocket");
    client.send(&request.header("sec-websocket-version", "13").header("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ==")).await;
    assert_eq!(client.reply().await.unwrap().status, 101);
    client
}

/// Reads the server's next frame, which must be a close: its code.
async fn close_code(client: &mut Http1<TcpStream>) -> u16 {
    let mut bytes = Vec::new();
    while bytes.len() < 4 {
        let more = client.read_bytes(64).await.unwrap();
        assert!(!more.is_empty(), "the connection ended without a close frame, after {bytes:?}");
        bytes.extend_from_slice(&more);
    }
    assert_eq!(bytes[0], 0x88, "a close frame: {bytes:?}");
    u16::from_be_bytes([bytes[2], bytes[3]])
}

#[tokio::test]
async fn too_many_messages_in_a_minute_close_the_socket() {
    let upstream = Upstream::always(model(&["Hello"])).await;
    let gateway = Setup::new().start(&upstream.url()).await;
    let mut ws = connect(&gateway).await;
    for _ in 0..121 {
        ws.send(&json!({"type": "stop", "ref": "none"})).await;
    }
    let closed = ws.closed().await.unwrap();
    assert_eq!((closed.code, closed.reason.as_str()), (4429, "rate_limited"));
}

#[tokio::test]
async fn a_turn_beyond_the_thirty_second_is_refused_until_one_has_ended() {
    let go = Arc::new(Notify::new());
    let upstream = Upstream::always(halting(&["Hello", " there"], &go)).await;
    let gateway = Setup::new().start(&upstream.url()).await;
    let mut ws = connect(&gateway).await;
    for n in 0..32 {
        ws.turn(&n.to_string(), "hi").await;
    }
    for n in 0..32 {
        ws.opened(&n.to_string()).await.unwrap();
    }
    // What they have said may still be on its way.
    ws.turn("32", "hi").await;
    let refused = loop {
        let frame = frame(&mut ws).await;
        if frame.event.name == "error" {
            break frame;
        }
    };
    assert_eq!((code(&refused), refused.reference()), ("overloaded", Some("32")));
    ws.send(&json!({"type": "stop", "ref": "7"})).await;
    let seventh = ws.opened("7").await.unwrap();
    assert_eq!(ws.finish(&seventh).await.unwrap().error(), Some("stopped"));
    ws.turn("33", "hi").await;
    ws.opened("33").await.unwrap();
}

#[tokio::test]
async fn three_denied_prompts_in_a_minute_close_the_socket() {
    let upstream = Upstream::always(model(&["Hello"])).await;
    let setup = Setup::chain(&["moderation: { deny: [deny.txt] }"]).file("deny.txt", "bluebird\n");
    let gateway = setup.start(&upstream.url()).await;
    let mut ws = connect(&gateway).await;
    for reference in ["1", "2", "3"] {
        ws.turn(reference, "tell me of bluebird").await;
        let refused = frame(&mut ws).await;
        assert_eq!((code(&refused), refused.reference()), ("policy_denied", Some(reference)));
        let why = json!({"stage": "input", "rule": "moderation.deny", "categories": ["tenant_policy"]});
        assert_eq!(refused.event.data["policy"], why, "as the problem of HTTP says it");
    }
    let closed = ws.closed().await.unwrap();
    assert_eq!((closed.code, closed.reason.as_str()), (1008, "policy_denied"));
    assert_eq!(gateway.ended().await, [end("refused", "policy_denied", 3)]);
}

#[tokio::test]
async fn a_silent_peer_is_pinged_and_one_that_does_not_answer_is_closed() {
    let upstream = Upstream::always(model(&["Hello"])).await;
    let gateway = Setup::new().route("limits: { heartbeat: 1s }").start(&upstream.url()).await;
    // One whose library answers pings lives on for as long as it likes.
    let mut alive = connect(&gateway).await;
    let listening = async {
        while alive.pings() < 3 {
            assert!(tokio::time::timeout(SECOND / 10, alive.next()).await.is_err(), "nothing but pings comes");
        }
    };
    within(8 * SECOND, listening, "three pings").await;
    assert_eq!(alive.ask("a", "hi").await.unwrap().text(), "Hello");
    // One that hears them and says nothing does not.
    let mut dead = upgraded(&gateway).await;
    let ping = dead.read_bytes(2).await.unwrap();
    assert_eq!(&ping[..], [0x89, 0]);
    assert_eq!(close_code(&mut dead).await, 3008);
}

#[tokio::test]
async fn the_clients_close_is_answered_and_its_turns_are_stopped() {
    let go = Arc::new(Notify::new());
    let upstream = Upstream::always(halting(&["Hello", " there"], &go)).await;
    let gateway = Setup::new().start(&upstream.url()).await;
    let mut ws = connect(&gateway).await;
    ws.turn("a", "hi").await;
    ws.opened("a").await.unwrap();
    assert_eq!(ws.close(1000, "bye").await.unwrap().code, 1000);
    at_once(upstream.closed(1), "the model to be stopped").await;
    assert_eq!(gateway.ended().await, [end("cancelled", "client_closed", 1)]);
}

#[tokio::test]
async fn a_peer_that_never_finishes_the_closing_handshake_is_cut_off() {
    let upstream = Upstream::always(model(&["Hello"])).await;
    let gateway = Setup::new().start(&upstream.url()).await;
    let mut client = upgraded(&gateway).await;
    // A binary message of one byte: it closes the socket. The peer goes on talking, and never closes.
    client.send_bytes(&[0x82, 0x81, 0, 0, 0, 0, 1]).await;
    assert_eq!(close_code(&mut client).await, 1003);
    client.send_bytes(&[0x81, 0x81, 0, 0, 0, 0, b'x']).await;
    let ended = async { while !client.read_bytes(64).await.unwrap_or_default().is_empty() {} };
    within(8 * SECOND, ended, "the connection to be closed").await;
}

#[tokio::test]
async fn a_turn_that_goes_on_is_taken_up_on_another_socket_without_a_hole() {
    let go = Arc::new(Notify::new());
    let upstream = Upstream::always(halting(&["Hello", " there"], &go)).await;
    let gateway = Setup::new().chat("cancellation: { on_disconnect: grace 30s }").start(&upstream.url()).await;
    let mut ws = connect(&gateway).await;
    ws.turn("a", "hi").await;
    let turn = ws.opened("a").await.unwrap();
    // On the same socket it would come twice.
    ws.send(&json!({"type": "resume", "turn_id": turn, "after": 0})).await;
    loop {
        let frame = frame(&mut ws).await;
        if frame.event.name == "error" {
            assert_eq!(code(&frame), "invalid_request");
            break;
        }
    }
    ws.abort();
    let mut back = connect(&gateway).await;
    back.resume(&turn, 0).await;
    go.notify_one();
    let rest = back.finish(&turn).await.unwrap();
    assert_eq!((rest.text().as_str(), rest.outcome()), ("Hello there", "allowed"));
    assert_eq!(gateway.ended().await, [end("complete", "ok", 1)]);
}

#[tokio::test]
async fn an_idle_socket_is_closed_at_once_when_the_gateway_drains_and_a_busy_one_after_its_turns() {
    let go = Arc::new(Notify::new());
    let upstream = Upstream::always(halting(&["Hello", " there"], &go)).await;
    let gateway = Setup::new().start(&upstream.url()).await;
    let (mut idle, mut busy) = (connect(&gateway).await, connect(&gateway).await);
    busy.turn("a", "hi").await;
    let turn = busy.opened("a").await.unwrap();
    let Gateway { process, folder, .. } = gateway;
    let stopped = tokio::spawn(process.stop());
    assert_eq!(idle.closed().await.unwrap().code, 1012);
    // No new turn on the busy one.
    busy.turn("b", "hi").await;
    let refused = loop {
        let frame = frame(&mut busy).await;
        if frame.event.name == "error" {
            break frame;
        }
    };
    assert_eq!((code(&refused), refused.reference()), ("draining", Some("b")));
    go.notify_one();
    assert_eq!(busy.finish(&turn).await.unwrap().text(), "Hello there");
    let closed = busy.closed().await.unwrap();
    assert_eq!((closed.code, closed.reason.as_str()), (1012, "draining"));
    drop((idle, busy));
    assert!(at_once(stopped, "the gateway to stop").await.unwrap(), "all ended by themselves");
    drop(folder);
}

#[tokio::test]
async fn a_stop_is_seen_while_the_socket_takes_nothing() {
    let flood = Answer::openai("demo", &[&"x".repeat(1000)]).events();
    let script = Script::new().read().sse().send(flood[..1].concat()).flood(flood[1].clone());
    let upstream = Upstream::always(script).await;
    let gateway = Setup::new().start(&upstream.url()).await;
    let mut ws = Ws::over(Http1::connect_narrow(gateway.addr).await, &Request::get("/v1/chat/stream")).await.expect("a WebSocket");
    ws.turn("a", "hi").await;
    let turn = ws.opened("a").await.unwrap();
    upstream.blocked().await;
    ws.stop(&turn).await;
    at_once(upstream.closed(1), "the model to be stopped").await;
    let stopped = ws.finish(&turn).await.unwrap();
    assert_eq!(stopped.error(), Some("stopped"), "after all that was said before");
    // The socket is as good as before.
    let unknown = ask(gateway.addr, &Request::post(&format!("/v1/chat/stream/{turn}/stop"), &json!({}))).await.unwrap();
    assert_eq!(unknown.status, 404);
    assert_eq!(gateway.ended().await, [end("cancelled", "stopped", 1)]);
}

#[tokio::test]
async fn a_turn_over_http2_whose_window_is_shut_is_stopped_all_the_same() {
    let flood = Answer::openai("demo", &[&"x".repeat(1000)]).events();
    let script = Script::new().read().sse().send(flood[..1].concat()).flood(flood[1].clone());
    let upstream = Upstream::always(script).await;
    let gateway = Setup::new().start(&upstream.url()).await;
    let mut client = Http2::connect(gateway.addr).await;
    let mut ws = Ws::over_http2(&mut client, &Request::get("/v1/chat/stream")).await.expect("a WebSocket");
    ws.turn("a", "hi").await;
    let turn = ws.opened("a").await.unwrap();
    upstream.blocked().await;
    let mut other = connect(&gateway).await;
    other.stop(&turn).await;
    at_once(upstream.closed(1), "the model to be stopped").await;
    let events = stream(gateway.addr, &Request::turn("hi"), Kind::Client).await;
    assert!(events.is_ok(), "others go on");
}
