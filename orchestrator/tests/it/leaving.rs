//! Whoever leaves or says stop stops the model: before its first byte, within its answer, on purpose or not.

use std::{sync::Arc, time::Duration};

use headgate_orchestrator::{Limits, Models, Patience, Settings};
use headgate_testkit::{
    at_once,
    client::{Http1, Request, ask},
    dialect::{Answer, Cut},
    soon,
    upstream::{Script, Upstream},
    within,
};
use tokio::sync::Notify;

use crate::desk::{Desk, upstream, words};

/// Says `half`, then nothing.
fn half() -> Script {
    let answer = Answer::openai("demo", &["half", " whole"]).cut(Cut::Events);
    Script::new().read().sse().send(answer[0].clone()).send(answer[1].clone()).stall()
}

fn cancelled(desk: &Desk, route: &str, code: &str) -> u64 {
    desk.metric(&format!("orchestrator_turns_total{{route=\"{route}\",end=\"cancelled\",code=\"{code}\"}}"))
}

#[tokio::test]
async fn leaving_within_the_answer_stops_the_model() {
    let model = Upstream::always(half()).await;
    let desk = Desk::before(&model).await;
    let mut events = desk.turn("s1", "one").events().await;
    while events.so_far().text() != "half" {
        events.expect().await;
    }
    drop(events);
    at_once(model.closed(1), "the model to be left").await;
    desk.idle().await;
    assert_eq!(cancelled(&desk, "stream", "client_closed"), 1);
    assert_eq!(desk.decided("stream", "accepted"), 1);
}

/// A figure, not a check: `cargo test -p headgate-orchestrator --test it -- --ignored --nocapture goes_on`.
#[tokio::test]
#[ignore = "measures; prints how long the model goes on after its reader has left"]
async fn how_long_the_model_goes_on_after_its_reader_left() {
    let model = Upstream::always(half()).await;
    let desk = Desk::before(&model).await;
    let mut took = Vec::new();
    for n in 1..=500 {
        let mut events = desk.turn("s1", "one").events().await;
        events.expect().await;
        let left = tokio::time::Instant::now();
        drop(events);
        took.push(model.closed(n).await.at - left);
        desk.idle().await;
    }
    took.sort_unstable();
    eprintln!("the model goes on for p50 {:?}, p99 {:?}, max {:?}", took[250], took[495], took[499]);
}

#[tokio::test]
async fn leaving_before_the_first_byte_stops_the_model() {
    for step in [false, true] {
        for script in [Script::new().read().stall(), Script::new().read().sse().stall()] {
            let model = Upstream::always(script).await;
            let desk = Desk::before(&model).await;
            let turn = if step { desk.turn("s1", "one").step() } else { desk.turn("s1", "one") };
            let mut client = Http1::connect(desk.addr).await;
            client.send(&turn.request()).await;
            model.request(0).await;
            drop(client);
            at_once(model.closed(1), "the model to be left").await;
            desk.idle().await;
            assert_eq!(desk.decided(if step { "step" } else { "stream" }, "cancelled"), 1);
        }
    }
}

#[tokio::test]
async fn leaving_behind_a_byte_sent_ahead_stops_the_model_too() {
    let model = Upstream::always(half()).await;
    let desk = Desk::before(&model).await;
    // In one write, so that it is read together with the request.
    let mut bytes = desk.turn("s1", "one").request().bytes("orchestrator");
    bytes.push(b'G');
    let mut client = Http1::connect(desk.addr).await;
    client.send_bytes(&bytes).await;
    model.request(0).await;
    drop(client);
    at_once(model.closed(1), "the model to be left").await;

    // And behind the answer's first bytes: such a caller has broken the rules, and is left at once.
    let mut client = Http1::connect(desk.addr).await;
    client.send(&desk.turn("s2", "one").request()).await;
    client.read_bytes(1).await.unwrap();
    client.send_bytes(b"G").await;
    at_once(model.closed(2), "the model to be left").await;
    desk.idle().await;
}

#[tokio::test]
async fn a_step_that_is_left_within_its_answer_stops_the_model() {
    let model = Upstream::always(half()).await;
    let desk = Desk::before(&model).await;
    let mut client = Http1::connect(desk.addr).await;
    client.send(&desk.turn("s1", "one").step().request()).await;
    model.request(0).await;
    drop(client);
    at_once(model.closed(1), "the model to be left").await;
    desk.idle().await;
}

#[tokio::test]
async fn a_cancel_call_ends_the_turn_with_its_code_and_keeps_what_was_said() {
    let answer = Answer::openai("demo", &["yes"]);
    let model = Upstream::each([half(), Script::stream(answer.cut(Cut::Whole))]).await;
    let desk = Desk::before(&model).await;
    let turn = desk.turn("s1", "one");
    let mut events = turn.events().await;
    while events.so_far().text() != "half" {
        events.expect().await;
    }
    assert_eq!(desk.cancel(&turn.id).await, 202);
    let answer = soon(events.rest(), "the end of the turn").await.unwrap();
    assert_eq!((answer.text().as_str(), answer.error()), ("half", Some("stopped")));
    at_once(model.closed(1), "the model to be left").await;
    assert_eq!(cancelled(&desk, "stream", "stopped"), 1);
    desk.turn("s1", "two").text().await;
    assert_eq!(words(&model.request(1).await), ["user:one", "assistant:half", "user:two"]);
}

#[tokio::test]
async fn a_cancel_call_before_the_first_event_ends_the_turn() {
    let model = Upstream::always(Script::new().read().stall()).await;
    let desk = Desk::before(&model).await;
    let turn = desk.turn("s1", "one");
    let (reply, ()) = tokio::join!(turn.reply(), async {
        model.request(0).await;
        assert_eq!(desk.cancel(&turn.id).await, 202);
    });
    assert_eq!(reply.problem().as_deref(), Ok("stopped"));
    assert_eq!(desk.decided("stream", "cancelled"), 1);
    model.closed(1).await;
}

#[tokio::test]
async fn a_cancel_call_tells_nothing_about_turns() {
    let model = Upstream::always(half()).await;
    let desk = Desk::before(&model).await;
    let turn = desk.turn("s1", "one");
    let mut events = turn.events().await;
    events.expect().await;
    let call = |id: &str| Request::new("POST", &format!("/v1/conversation/turns/{id}/cancel"));
    let unknown = ask(desk.addr, &call("0193a5f0-7e1c-7000-8000-000000000000")).await.unwrap();
    let nonsense = ask(desk.addr, &call("nonsense")).await.unwrap();
    assert_eq!(desk.orchestrator.open_turns(), 1);
    let known = ask(desk.addr, &call(&turn.id)).await.unwrap();
    for reply in [&unknown, &nonsense] {
        assert_eq!((reply.status, &reply.body), (known.status, &known.body));
    }
    assert_eq!(known.status, 202);
    assert_eq!(events.rest().await.unwrap().error(), Some("stopped"));
}

#[tokio::test]
async fn the_next_turn_of_a_session_does_not_meet_the_last_moments_of_the_one_it_left() {
    let answer = Answer::openai("demo", &["yes"]);
    let desk_of = |model: &Upstream| Models::new(upstream(&model.url()));
    for _ in 0..20 {
        let model = Upstream::each([half(), Script::stream(answer.cut(Cut::Whole))]).await;
        let desk = Desk::with(desk_of(&model), Settings::default()).await;
        let mut events = desk.turn("s1", "one").events().await;
        events.expect().await;
        drop(events);
        assert_eq!(desk.turn("s1", "two").text().await, "yes");
    }
}

#[tokio::test]
async fn a_caller_who_takes_nothing_is_left_and_the_model_is_read_no_further_meanwhile() {
    let flood = Answer::openai("demo", &["words ".repeat(100).as_str()]).cut(Cut::Events)[1].clone();
    let model = Upstream::always(Script::new().read().sse().flood(flood)).await;
    let patience = Patience { stall: Duration::from_secs(2), ..Patience::default() };
    let limits = Limits { text: usize::MAX, ..Limits::default() };
    let desk = Desk::with(Models::new(upstream(&model.url())), Settings { patience, limits, ..Settings::default() }).await;
    let mut client = Http1::connect_narrow(desk.addr).await;
    client.send(&desk.turn("s1", "one").request()).await;
    client.head().await.unwrap();
    let written = model.blocked().await;
    // What the system's socket buffers hold on both sides; nothing in between grows.
    assert!(written < 16 << 20, "{written}");
    within(Duration::from_secs(10), model.closed(1), "the caller to be given up").await;
    desk.idle().await;
}

#[tokio::test]
async fn a_shutdown_lets_open_turns_end_and_takes_no_new_ones() {
    let go = Arc::new(Notify::new());
    let answer = Answer::openai("demo", &["half", " whole"]).cut(Cut::Events);
    let script = Script::new().read().sse().send(answer[0].clone()).send(answer[1].clone()).wait(&go);
    let model = Upstream::always(script.send_all(answer[2..].to_vec()).end()).await;
    let mut desk = Desk::before(&model).await;
    let mut events = desk.turn("s1", "one").events().await;
    events.expect().await;
    let mut kept = Http1::connect(desk.addr).await;
    kept.send(&Request::get("/readyz")).await;
    assert_eq!(kept.reply().await.unwrap().status, 200);

    let shut_down = desk.shut_down();
    soon(kept.closed(), "the idle connection to be closed").await.unwrap();
    assert_eq!(desk.orchestrator.ready(), Err("draining\n"));
    go.notify_one();
    assert_eq!(events.rest().await.unwrap().text(), "half whole");
    soon(shut_down, "the shutdown").await.unwrap();
}

#[tokio::test]
async fn a_turn_that_outlasts_the_drain_time_is_told_so() {
    let model = Upstream::always(half()).await;
    let settings = Settings { drain: Duration::from_millis(50), ..Settings::default() };
    let mut desk = Desk::with(Models::new(upstream(&model.url())), settings).await;
    let events = desk.turn("s1", "one").events().await;
    let shut_down = desk.shut_down();
    let answer = events.rest().await.unwrap();
    assert_eq!(answer.error(), Some("draining"));
    assert_eq!(answer.end().data["retryable"], true);
    soon(shut_down, "the shutdown").await.unwrap();
    model.closed(1).await;
}
