//! Many turns on one WebSocket, each with a verdict over the exact bytes of its payload.

use std::{sync::Arc, time::Duration};

use futures_util::{SinkExt, StreamExt};
use headgate_orchestrator::{Limits, Models, Settings};
use headgate_testkit::{
    at_once,
    dialect::{Answer, Cut},
    soon,
    upstream::{Script, Upstream},
    within,
};
use serde_json::{Value, json};
use tokio::{net::TcpStream, sync::Notify};
use tokio_tungstenite::{
    WebSocketStream, client_async,
    tungstenite::{Message, protocol::frame::coding::CloseCode},
};

use crate::{
    confirm::{asking, paying},
    desk::{Desk, STREAM, Turn, upstream, words},
};

/// The gateway's end of a WebSocket.
struct Socket(WebSocketStream<TcpStream>);

impl Socket {
    async fn open(desk: &Desk) -> Socket {
        let stream = TcpStream::connect(desk.addr).await.unwrap();
        Socket(client_async(format!("ws://{}{STREAM}", desk.addr), stream).await.unwrap().0)
    }

    async fn send(&mut self, frame: &Value) {
        self.0.send(Message::text(frame.to_string())).await.unwrap();
    }

    /// The next frame that is no ping.
    async fn message(&mut self) -> Option<Message> {
        loop {
            match soon(self.0.next(), "a frame").await {
                Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                Some(Ok(message)) => return Some(message),
                Some(Err(_)) | None => return None,
            }
        }
    }

    async fn frame(&mut self) -> Value {
        let message = self.message().await.expect("a frame");
        serde_json::from_str(message.to_text().unwrap()).unwrap()
    }

    /// The frames of one turn, to its end; those of other turns are dropped. Checks numbers and ids.
    async fn turn(&mut self, id: &str) -> Vec<Value> {
        let open = loop {
            let frame = self.frame().await;
            if frame["turn_id"] == id {
                break frame;
            }
        };
        assert_eq!((&open["type"], &open["seq"]), (&json!("open"), &json!(0)), "{open}");
        let mut frames = vec![open];
        frames.append(&mut self.rest(id, 1).await);
        frames
    }

    /// The same from the frame of that number on.
    async fn rest(&mut self, id: &str, mut seq: u64) -> Vec<Value> {
        let mut frames: Vec<Value> = Vec::new();
        loop {
            let frame = self.frame().await;
            if frame["turn_id"] != id {
                continue;
            }
            assert_eq!(frame["seq"], seq, "{frame}");
            seq += 1;
            let end = frame["type"] == "done" || frame["type"] == "error";
            assert_ne!(frame["type"], "open", "{frame}");
            frames.push(frame);
            if end {
                return frames;
            }
        }
    }

    async fn farewell(&mut self) -> Option<CloseCode> {
        loop {
            match self.message().await? {
                Message::Close(frame) => return frame.map(|frame| frame.code),
                _ => continue,
            }
        }
    }
}

fn dispatch(turn: &Turn<'_>) -> Value {
    let payload = turn.body.to_string();
    let headers = headers(turn, "GET", &payload);
    json!({"type": "turn", "turn_id": turn.id, "payload": payload, "headers": headers})
}

fn headers(turn: &Turn<'_>, method: &str, payload: &str) -> Value {
    let headers = turn.headers(method, payload.as_bytes());
    Value::Object(headers.into_iter().map(|(name, value)| (name.to_owned(), value.into())).collect())
}

fn text(frames: &[Value]) -> String {
    frames.iter().filter_map(|frame| frame["text"].as_str()).collect()
}

fn saying(texts: &[&str]) -> Script {
    Script::stream(Answer::openai("demo-8", texts).cut(Cut::Events))
}

fn half() -> Script {
    let answer = Answer::openai("demo", &["half", " whole"]).cut(Cut::Events);
    Script::new().read().sse().send(answer[0].clone()).send(answer[1].clone()).stall()
}

#[tokio::test]
async fn a_frame_answers_for_the_turns_of_its_own_socket_alone() {
    let model = Upstream::always(paying("{}")).await;
    let desk = asking(&model).await;
    let (mut socket, mut other) = (Socket::open(&desk).await, Socket::open(&desk).await);
    for (accept, end) in [(false, "error"), (true, "done")] {
        let turn = desk.turn("s1", "pay him");
        socket.send(&dispatch(&turn)).await;
        let asked = loop {
            let frame = socket.frame().await;
            if frame["type"] == "confirm" {
                break frame;
            }
        };
        let answer = |accept: bool| json!({"type": "confirm", "turn_id": turn.id, "id": asked["id"], "accept": accept});
        other.send(&answer(!accept)).await;
        // What comes after it on the same socket has been acted upon: so has it.
        let after = desk.turn("s2", "pay him");
        other.send(&dispatch(&after)).await;
        assert_eq!(other.frame().await["type"], "open");
        other.send(&json!({"type": "stop", "turn_id": after.id})).await;
        while other.frame().await["type"] != "error" {}
        socket.send(&json!({"type": "confirm", "turn_id": turn.id, "id": "another", "accept": !accept})).await;
        socket.send(&answer(accept)).await;
        let frames = socket.rest(&turn.id, asked["seq"].as_u64().unwrap() + 1).await;
        assert_eq!(frames.last().unwrap()["type"], end, "{frames:?}");
        assert_eq!(frames.iter().any(|frame| frame["type"] == "tool"), accept);
    }
}

#[tokio::test]
async fn turns_follow_each_other_on_one_socket() {
    let model = Upstream::always(saying(&["Hel", "lo"])).await;
    let desk = Desk::before(&model).await;
    let mut socket = Socket::open(&desk).await;
    for question in ["one", "two"] {
        let turn = desk.turn("s1", question);
        socket.send(&dispatch(&turn)).await;
        let frames = socket.turn(&turn.id).await;
        assert_eq!(text(&frames), "Hello");
        assert_eq!(frames[0], json!({"type": "open", "turn_id": turn.id, "seq": 0, "model": "demo-8"}));
        assert_eq!(frames.last().unwrap()["finish"], "stop");
    }
    assert_eq!(words(&model.request(1).await), ["user:one", "assistant:Hello", "user:two"]);
    assert_eq!(desk.decided("websocket", "accepted"), 2);
    assert_eq!(desk.metric("orchestrator_turns_total{route=\"websocket\",end=\"complete\",code=\"none\"}"), 2);
}

#[tokio::test]
async fn turns_of_several_sessions_run_side_by_side() {
    let go = Arc::new(Notify::new());
    let answer = Answer::openai("demo", &["half", " whole"]).cut(Cut::Events);
    let waiting = Script::new().read().sse().send(answer[0].clone()).send(answer[1].clone()).wait(&go).send_all(answer[2..].to_vec()).end();
    let model = Upstream::each([waiting, saying(&["other"])]).await;
    let desk = Desk::before(&model).await;
    let mut socket = Socket::open(&desk).await;
    let (slow, quick) = (desk.turn("s1", "slow"), desk.turn("s2", "quick"));
    socket.send(&dispatch(&slow)).await;
    assert_eq!(socket.frame().await["type"], "open");
    assert_eq!(socket.frame().await["text"], "half");
    socket.send(&dispatch(&quick)).await;
    assert_eq!(text(&socket.turn(&quick.id).await), "other");
    go.notify_one();
    assert_eq!(socket.frame().await["text"], " whole");
    let end = loop {
        let frame = socket.frame().await;
        if frame["type"] == "done" {
            break frame;
        }
    };
    assert_eq!(end["turn_id"], slow.id);
}

#[tokio::test]
async fn a_verdict_over_other_bytes_headers_or_calls_is_refused_and_the_socket_stays() {
    let model = Upstream::always(saying(&["yes"])).await;
    let desk = Desk::before(&model).await;
    let mut socket = Socket::open(&desk).await;
    let turn = desk.turn("s1", "hello");
    let good = dispatch(&turn);
    let changed = |member: &str, value: Value| {
        let mut frame = good.clone();
        frame[member] = value;
        frame
    };
    let mut missing = good.clone();
    missing["headers"].as_object_mut().unwrap().remove("policy-verdict");
    let payload = good["payload"].as_str().unwrap();
    let mut posted = good.clone();
    posted["headers"] = headers(&turn, "POST", payload);
    let cases = [
        (changed("payload", json!(payload.replace("hello", "hullo"))), "verdict_invalid", "digest_header"),
        (changed("payload", json!(format!("{payload} "))), "verdict_invalid", "digest_header"),
        (missing, "verdict_invalid", "missing"),
        (posted, "verdict_invalid", "method"),
    ];
    for (frame, code, reason) in cases {
        socket.send(&frame).await;
        let error = socket.frame().await;
        assert_eq!((&error["type"], &error["code"], &error["message"]), (&json!("error"), &json!(code), &json!(reason)), "{error}");
        assert_eq!(error["turn_id"], turn.id);
    }
    socket.send(&good).await;
    assert_eq!(text(&socket.turn(&turn.id).await), "yes");
    socket.send(&good).await;
    assert_eq!(socket.frame().await["code"], "verdict_replayed");
    assert_eq!([desk.decided("websocket", "invalid"), desk.decided("websocket", "replayed")], [4, 1]);
}

#[tokio::test]
async fn a_frame_that_is_none_is_refused_by_name_and_the_socket_stays() {
    let model = Upstream::always(saying(&["yes"])).await;
    let desk = Desk::before(&model).await;
    let mut socket = Socket::open(&desk).await;
    let turn = desk.turn("s1", "hello");
    let good = dispatch(&turn).to_string();
    let cases = [
        ("{".to_owned(), "malformed_json"),
        ("[]".to_owned(), "invalid_request"),
        ("{\"type\":\"sing\"}".to_owned(), "invalid_request"),
        ("{\"type\":\"stop\"}".to_owned(), "invalid_request"),
        (good.replace("\"payload\"", "\"canary\":1,\"payload\""), "invalid_request"),
        (good.replace("\"policy-verdict\"", "\"cookie\""), "invalid_request"),
        (good.replace("{\"policy-verdict\"", "{\"Policy-Verdict\":\"a.b.c\",\"policy-verdict\""), "invalid_request"),
        (good.replace(&turn.id, "0193a5f0-7e1c-7000-8000-000000000000").replacen("0193a5f0", "0193a5f1", 1), "verdict_invalid"),
    ];
    for (frame, code) in cases {
        socket.0.send(Message::text(frame.clone())).await.unwrap();
        let error = socket.frame().await;
        assert_eq!((&error["type"], &error["code"]), (&json!("error"), &json!(code)), "{frame}: {error}");
        assert!(!error.to_string().contains("canary"));
    }
    socket.0.send(Message::text(good)).await.unwrap();
    assert_eq!(text(&socket.turn(&turn.id).await), "yes");
}

#[tokio::test]
async fn a_stop_frame_ends_its_turn_alone() {
    let model = Upstream::always(half()).await;
    let desk = Desk::before(&model).await;
    let mut socket = Socket::open(&desk).await;
    let (one, two) = (desk.turn("s1", "one"), desk.turn("s2", "two"));
    for turn in [&one, &two] {
        socket.send(&dispatch(turn)).await;
        assert_eq!(socket.frame().await["type"], "open");
        assert_eq!(socket.frame().await["text"], "half");
    }
    socket.send(&json!({"type": "stop", "turn_id": one.id})).await;
    let end = socket.frame().await;
    assert_eq!((&end["type"], &end["code"], &end["turn_id"]), (&json!("error"), &json!("stopped"), &json!(one.id)));
    at_once(model.closed(1), "the model to be left").await;
    assert_eq!(desk.orchestrator.open_turns(), 1);
}

#[tokio::test]
async fn a_turn_sends_as_much_as_it_has_credit_for_and_one_event_more_and_stalls_no_neighbour() {
    let flood = Answer::openai("demo", &[&"x".repeat(1000)]).cut(Cut::Events);
    let endless = Script::new().read().sse().send(flood[0].clone()).flood(flood[1].clone());
    let quick = saying(&["quick"]);
    let model = Upstream::answering(move |request| {
        let is_slow = words(request).iter().any(|word| word.ends_with("slow"));
        if is_slow { endless.clone() } else { quick.clone() }
    })
    .await;
    let desk = Desk::before(&model).await;
    let mut socket = Socket::open(&desk).await;
    let slow = desk.turn("s1", "slow");
    let mut frame = dispatch(&slow);
    frame["credit"] = json!(3000);
    socket.send(&frame).await;
    // Each event is said whole, the one too that takes the last of the credit.
    let mut sent = 0;
    let mut seq = 0;
    while sent < 3000 {
        let frame = socket.frame().await;
        assert_eq!((&frame["turn_id"], &frame["seq"]), (&json!(slow.id), &json!(seq)));
        (sent, seq) = (sent + frame.to_string().len(), seq + 1);
    }
    for n in 0..3 {
        let turn = desk.turn(&format!("q{n}"), "hello");
        socket.send(&dispatch(&turn)).await;
        // Every frame until its end is its own: the slow one says nothing.
        assert_eq!(socket.frame().await["turn_id"], turn.id);
        assert_eq!(text(&socket.rest(&turn.id, 1).await), "quick");
    }
    model.blocked().await;
    // What was sent beyond the credit is owed.
    socket.send(&json!({"type": "credit", "turn_id": slow.id, "bytes": sent - 3000 + 1})).await;
    let frame = socket.frame().await;
    assert_eq!((&frame["turn_id"], &frame["seq"]), (&json!(slow.id), &json!(seq)));
    // Without credit it is stopped as well as with it.
    socket.send(&json!({"type": "stop", "turn_id": slow.id})).await;
    let end = socket.frame().await;
    assert_eq!((&end["turn_id"], &end["code"]), (&json!(slow.id), &json!("stopped")));
    desk.idle().await;
}

#[tokio::test]
async fn a_stop_that_comes_with_its_turn_is_not_lost() {
    let model = Upstream::always(Script::new().read().stall()).await;
    let desk = Desk::before(&model).await;
    let mut socket = Socket::open(&desk).await;
    for n in 0..20 {
        let turn = desk.turn(&format!("s{n}"), "hello");
        socket.0.feed(Message::text(dispatch(&turn).to_string())).await.unwrap();
        socket.0.feed(Message::text(json!({"type": "stop", "turn_id": turn.id}).to_string())).await.unwrap();
        socket.0.flush().await.unwrap();
        let end = socket.frame().await;
        assert_eq!((&end["turn_id"], &end["code"]), (&json!(turn.id), &json!("stopped")));
    }
    desk.idle().await;
}

#[tokio::test]
async fn a_turn_that_is_not_taken_says_so_and_one_whose_model_fails_does_not() {
    let model = Upstream::always(Script::new().read().close()).await;
    let desk = Desk::before(&model).await;
    let mut socket = Socket::open(&desk).await;
    let mut unsigned = dispatch(&desk.turn("s1", "one"));
    unsigned["headers"].as_object_mut().unwrap().remove("policy-verdict");
    socket.send(&unsigned).await;
    let refused = socket.frame().await;
    assert_eq!((&refused["code"], &refused["taken"]), (&json!("verdict_invalid"), &json!(false)));
    socket.send(&dispatch(&desk.turn("s1", "one"))).await;
    let failed = socket.frame().await;
    assert_eq!((&failed["code"], failed.get("taken"), failed.get("seq")), (&json!("upstream_reset"), None, None));
}

#[tokio::test]
async fn leaving_the_socket_stops_all_its_turns() {
    for before_the_first_byte in [false, true] {
        let model = Upstream::always(if before_the_first_byte { Script::new().read().stall() } else { half() }).await;
        let desk = Desk::before(&model).await;
        let mut socket = Socket::open(&desk).await;
        for session in ["s1", "s2"] {
            socket.send(&dispatch(&desk.turn(session, "hello"))).await;
        }
        model.request(1).await;
        drop(socket);
        at_once(model.closed(2), "the model to be left").await;
        desk.idle().await;
    }
}

#[tokio::test]
async fn a_socket_has_no_more_turns_than_it_may() {
    let model = Upstream::always(half()).await;
    let limits = Limits { socket_turns: 1, ..Limits::default() };
    let desk = Desk::with(Models::new(upstream(&model.url())), Settings { limits, ..Settings::default() }).await;
    let mut socket = Socket::open(&desk).await;
    socket.send(&dispatch(&desk.turn("s1", "one"))).await;
    assert_eq!(socket.frame().await["type"], "open");
    assert_eq!(socket.frame().await["text"], "half");
    let two = desk.turn("s2", "two");
    socket.send(&dispatch(&two)).await;
    let error = socket.frame().await;
    assert_eq!((&error["code"], &error["turn_id"]), (&json!("overloaded"), &json!(two.id)));
    assert_eq!(desk.decided("websocket", "busy"), 1);
}

#[tokio::test]
async fn whoever_read_the_end_may_ask_at_once_on_the_same_socket() {
    let model = Upstream::always(saying(&["yes"])).await;
    let limits = Limits { socket_turns: 1, session_grace: Duration::ZERO, ..Limits::default() };
    let desk = Desk::with(Models::new(upstream(&model.url())), Settings { limits, ..Settings::default() }).await;
    let mut socket = Socket::open(&desk).await;
    for n in 0..50 {
        let turn = desk.turn("s1", &n.to_string());
        socket.send(&dispatch(&turn)).await;
        assert_eq!(text(&socket.turn(&turn.id).await), "yes");
    }
}

#[tokio::test]
async fn what_is_no_frame_closes_the_socket_with_its_reason() {
    let model = Upstream::always(half()).await;
    let limits = Limits { body: 1000, ..Limits::default() };
    let desk = Desk::with(Models::new(upstream(&model.url())), Settings { limits, ..Settings::default() }).await;
    for (message, code) in [(Message::binary(vec![1]), CloseCode::Unsupported), (Message::text("x".repeat(20_000)), CloseCode::Size)] {
        let mut socket = Socket::open(&desk).await;
        socket.send(&dispatch(&desk.turn("s1", "one"))).await;
        let _ = socket.0.send(message).await;
        assert_eq!(socket.farewell().await, Some(code));
        desk.idle().await;
    }
    let large = desk.turn("s1", &"x".repeat(1500));
    let mut socket = Socket::open(&desk).await;
    socket.send(&dispatch(&large)).await;
    assert_eq!(socket.frame().await["code"], "payload_too_large");
}

#[tokio::test]
async fn a_fault_of_the_model_is_an_error_frame() {
    let answer = Answer::openai("demo", &["half", " whole"]).cut(Cut::Events);
    let begun = Script::new().read().sse().send(answer[0].clone()).send(answer[1].clone()).close();
    let model = Upstream::each([Script::new().read().close(), begun]).await;
    let desk = Desk::before(&model).await;
    let mut socket = Socket::open(&desk).await;
    let turn = desk.turn("s1", "one");
    socket.send(&dispatch(&turn)).await;
    let error = socket.frame().await;
    assert_eq!((&error["type"], &error["turn_id"], error.get("seq")), (&json!("error"), &json!(turn.id), None), "it never began");
    let turn = desk.turn("s1", "one");
    socket.send(&dispatch(&turn)).await;
    let frames = socket.turn(&turn.id).await;
    assert_eq!((text(&frames).as_str(), &frames.last().unwrap()["code"]), ("half", &json!("upstream_reset")));
}

#[tokio::test]
async fn a_shutdown_lets_the_turns_of_a_socket_end_and_then_says_goodbye() {
    let go = Arc::new(Notify::new());
    let answer = Answer::openai("demo", &["half", " whole"]).cut(Cut::Events);
    let script = Script::new().read().sse().send(answer[0].clone()).send(answer[1].clone()).wait(&go);
    let model = Upstream::always(script.send_all(answer[2..].to_vec()).end()).await;
    let mut desk = Desk::before(&model).await;
    let (mut busy, mut idle) = (Socket::open(&desk).await, Socket::open(&desk).await);
    let turn = desk.turn("s1", "one");
    busy.send(&dispatch(&turn)).await;
    assert_eq!(busy.frame().await["type"], "open");
    let late = dispatch(&desk.turn("s2", "two"));
    let id = turn.id.clone();
    drop(turn);
    let shut_down = desk.shut_down();
    assert_eq!(idle.farewell().await, Some(CloseCode::Restart));
    assert_eq!(busy.frame().await["text"], "half");
    busy.send(&late).await;
    assert_eq!(busy.frame().await["code"], "draining");
    go.notify_one();
    let mut last = busy.frame().await;
    while last["type"] != "done" {
        assert_eq!(last["turn_id"], id);
        last = busy.frame().await;
    }
    let farewell = within(Duration::from_secs(5), busy.farewell(), "the farewell, as soon as the last turn has ended");
    assert_eq!(farewell.await, Some(CloseCode::Restart));
    drop((busy, idle));
    soon(shut_down, "the shutdown").await.unwrap();
}
