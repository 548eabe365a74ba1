//! Turns follow each other, stream or come whole, and end in one way each.

use std::{sync::Arc, time::Duration};

use headgate_orchestrator::{Bounds, Limits, Models, Settings};
use headgate_testkit::{
    client,
    dialect::{Answer, Cut, Dialect, Lane},
    upstream::{Framing, Script, Upstream},
};
use serde_json::json;
use tokio::sync::Notify;

use crate::desk::{Desk, upstream, upstream_with, words};

fn saying(texts: &[&str]) -> Script {
    Script::stream(Answer::openai("demo", texts).cut(Cut::Events))
}

#[tokio::test]
async fn a_session_is_remembered_from_turn_to_turn() {
    let model = Upstream::each([Script::new()
        .read()
        .sse()
        .send_all(Answer::openai("demo", &["o", "ne"]).cut(Cut::Events))
        .end()
        .read()
        .sse()
        .send_all(Answer::openai("demo", &["two"]).cut(Cut::Whole))
        .end()
        .read()
        .sse()
        .send_all(Answer::openai("demo", &["three"]).cut(Cut::Whole))
        .end()])
    .await;
    let desk = Desk::before(&model).await;
    assert_eq!(desk.turn("s1", "1?").text().await, "one");
    assert_eq!(desk.turn("s1", "2?").step().reply().await.json()["text"], "two");
    assert_eq!(desk.turn("s2", "3?").text().await, "three");
    assert_eq!(words(&model.request(0).await), ["user:1?"]);
    assert_eq!(words(&model.request(1).await), ["user:1?", "assistant:one", "user:2?"]);
    assert_eq!(words(&model.request(2).await), ["user:3?"], "another session");
}

#[tokio::test]
async fn a_session_of_another_tenant_or_subject_is_simply_not_there() {
    let model = Upstream::always(saying(&["yes"])).await;
    let desk = Desk::before(&model).await;
    desk.turn("s1", "a secret of acme").text().await;
    desk.turn("s1", "what was said?").with("tenant", "other").text().await;
    desk.turn("s1", "what was said?").with("subject", "u2").text().await;
    for request in &model.requests()[1..] {
        assert_eq!(words(request), ["user:what was said?"]);
    }
}

#[tokio::test]
async fn a_client_that_keeps_the_conversation_is_taken_at_its_word() {
    let model = Upstream::always(saying(&["yes"])).await;
    let desk = Desk::before(&model).await;
    desk.turn("s1", "one").text().await;
    let own = json!([{"role": "user", "content": "eins"}, {"role": "assistant", "content": "ja"}, {"role": "user", "content": "zwei"}]);
    desk.turn_of("s1", own).text().await;
    desk.turn("s1", "drei").text().await;
    assert_eq!(words(&model.request(1).await), ["user:eins", "assistant:ja", "user:zwei"]);
    assert_eq!(words(&model.request(2).await), ["user:eins", "assistant:ja", "user:zwei", "assistant:yes", "user:drei"]);
}

#[tokio::test]
async fn whoever_read_the_end_may_ask_at_once() {
    let model = Upstream::always(saying(&["yes"])).await;
    let models = Models::new(upstream(&model.url()));
    let limits = Limits { session_grace: Duration::ZERO, ..Limits::default() };
    let desk = Desk::with(models, Settings { limits, ..Settings::default() }).await;
    for n in 0..50 {
        let turn = desk.turn("s1", &n.to_string());
        let mut events = turn.events().await;
        while !events.expect().await.is_terminal() {}
        drop(events);
    }
    assert_eq!(desk.decided("stream", "accepted"), 50);
}

#[tokio::test]
async fn a_session_has_one_open_turn() {
    let go = Arc::new(Notify::new());
    let answer = Answer::openai("demo", &["yes"]);
    let waiting = Script::new().read().sse().wait(&go).send_all(answer.cut(Cut::Whole)).end();
    let model = Upstream::each([waiting, saying(&["yes"])]).await;
    let desk = Desk::before(&model).await;
    let first = desk.turn("s1", "one");
    let (text, ()) = tokio::join!(first.text(), async {
        model.request(0).await;
        let reply = desk.turn("s1", "two").reply().await;
        assert_eq!((reply.status, reply.problem().as_deref()), (409, Ok("turn_conflict")));
        assert_eq!(desk.turn("s2", "two").text().await, "yes", "another session does not mind");
        go.notify_one();
    });
    assert_eq!(text, "yes");
    assert_eq!((desk.decided("stream", "conflict"), desk.decided("stream", "accepted")), (1, 2));
}

#[tokio::test]
async fn however_the_model_cuts_its_answer_the_same_text_comes_streamed_and_whole() {
    let texts = ["Grüße, ", "\"quoted\"\n", "und 🎉 ", "Ende"];
    for cut in [Cut::Whole, Cut::Events, Cut::Bytes(1), Cut::Bytes(7), Cut::Inside, Cut::Random { seed: 7, most: 40 }] {
        let model = Upstream::always(Script::stream(Answer::openai("demo", &texts).cut(cut.clone()))).await;
        let desk = Desk::before(&model).await;
        assert_eq!(desk.turn("s1", "hello").text().await, texts.concat(), "{cut:?}");
        let whole = desk.turn("s2", "hello").step().reply().await;
        assert_eq!((whole.status, whole.json()["text"].as_str().unwrap()), (200, &*texts.concat()), "{cut:?}");
    }
}

#[tokio::test]
async fn calls_of_tools_usage_and_reasoning_come_through_both_ways() {
    let answer = Answer::new(Dialect::OpenAi, "demo")
        .open()
        .text_in(0, Lane::Reasoning, "hm")
        .tool(0, 0, "call_1", "weather")
        .text_in(0, Lane::ToolArguments(0), "{\"in\":")
        .text_in(0, Lane::ToolArguments(0), "\"Rome\"}")
        .finish(0, "tool_calls")
        .usage(5, 7)
        .done("tool_calls", None);
    let model = Upstream::always(Script::stream(answer.cut(Cut::Events))).await;
    let desk = Desk::before(&model).await;
    let streamed = desk.turn("s1", "weather?").events().await.rest().await.unwrap();
    assert_eq!(streamed.text_in(0, "reasoning"), "hm");
    assert_eq!(streamed.text_in(0, "tool_arguments"), "{\"in\":\"Rome\"}");
    assert_eq!(streamed.named("tool").next().unwrap().data["name"], "weather");
    assert_eq!(streamed.end().data, json!({"finish": "tool_calls", "usage": {"input_tokens": 5, "output_tokens": 7}}));

    let turn = desk.turn("s2", "weather?").step();
    let whole = turn.reply().await.json();
    let tools = json!([{"id": "call_1", "name": "weather", "arguments": "{\"in\":\"Rome\"}"}]);
    let usage = json!({"input_tokens": 5, "output_tokens": 7});
    let expected = json!({"turn_id": turn.id, "model": "demo", "text": "", "finish": "tool_calls", "usage": usage, "tools": tools});
    assert_eq!(whole, expected);

    // The next turn shows the model the call it made.
    desk.turn("s1", "and now?").reply().await;
    let sent = model.request(2).await.json();
    assert_eq!(sent["messages"][1]["tool_calls"][0]["function"]["name"], "weather");
}

#[tokio::test]
async fn a_model_is_chosen_by_its_name() {
    let (any, own) = (Upstream::always(saying(&["any"])).await, Upstream::always(saying(&["own"])).await);
    let models = Models::new(upstream(&any.url())).with("special", upstream(&own.url()));
    let desk = Desk::with(models, Settings::default()).await;
    assert_eq!(desk.turn("s1", "hello").with("model", "special").text().await, "own");
    assert_eq!(desk.turn("s2", "hello").text().await, "any");
    let turn = desk.turn("s3", "hello");
    assert_eq!(turn.with("model", "unheard-of").text().await, "any");
}

/// How long a model is waited for that falls silent. Where it does something else, that is seen, however busy the machine is.
const SHORT: Duration = Duration::from_millis(100);

#[tokio::test]
async fn a_fault_before_the_first_event_is_a_status() {
    let html = Script::reply(200, "text/html", "<p>canary</p>");
    let busy = Script::new().read().head(503, Framing::Length(0), &[("retry-after", "3")]).again();
    let cases = [
        (html, false, 502, "upstream_protocol_error"),
        (Script::new().read().sse().close(), false, 502, "upstream_reset"),
        (Script::new().read().stall(), true, 504, "upstream_timeout_first_byte"),
        (Script::new().read().sse().stall(), true, 504, "upstream_timeout_first_byte"),
        (busy, false, 503, "overloaded"),
    ];
    for (script, is_silent, status, code) in cases {
        let model = Upstream::always(script).await;
        let first_byte = upstream_with(&model.url(), |settings| {
            if is_silent {
                settings.timeouts.first_byte = SHORT;
            }
        });
        let desk = Desk::with(Models::new(first_byte), Settings::default()).await;
        for turn in [desk.turn("s1", "hello"), desk.turn("s1", "hello").step()] {
            let reply = turn.reply().await;
            assert_eq!((reply.status, reply.json()["code"].as_str()), (status, Some(code)));
            assert!(!reply.text().contains("canary"));
            assert_eq!(reply.header("retry-after"), (code == "overloaded").then_some("3"));
        }
        let decision = if code == "overloaded" { "busy" } else { "failed" };
        assert_eq!((desk.decided("stream", decision), desk.decided("step", decision)), (1, 1), "{code}");
        desk.idle().await;
    }
}

#[tokio::test]
async fn a_fault_within_the_answer_is_its_one_end() {
    let answer = Answer::openai("demo", &["safe", " and sound"]).cut(Cut::Events);
    let begun = || Script::new().read().sse().send(answer[0].clone()).send(answer[1].clone());
    let cases = [
        (begun().close(), false, "upstream_reset"),
        (begun().reset(), false, "upstream_reset"),
        (begun().end(), false, "upstream_reset"),
        (begun().send("data: {\n\n"), false, "upstream_protocol_error"),
        (begun().stall(), true, "upstream_stalled"),
    ];
    for (script, is_silent, code) in cases {
        let model = Upstream::always(script).await;
        let idle = upstream_with(&model.url(), |settings| {
            if is_silent {
                settings.timeouts.idle = SHORT;
            }
        });
        let desk = Desk::with(Models::new(idle), Settings::default()).await;
        let streamed = desk.turn("s1", "hello").events().await.rest().await.unwrap();
        assert_eq!((streamed.text().as_str(), streamed.error()), ("safe", Some(code)));
        assert_eq!(desk.metric(&format!("orchestrator_turns_total{{route=\"stream\",end=\"failed\",code=\"{code}\"}}")), 1);

        let whole = desk.turn("s2", "hello").step().reply().await;
        assert_eq!(whole.problem().as_deref(), Ok(code), "nothing was sent yet, so it is a status");
    }
}

#[tokio::test]
async fn what_was_said_before_a_fault_is_remembered_and_a_question_asked_again_stands_once() {
    let answer = Answer::openai("demo", &["half", " whole"]).cut(Cut::Events);
    let model = Upstream::each([
        Script::new().read().sse().send(answer[0].clone()).send(answer[1].clone()).close(),
        Script::new().read().sse().send(answer[0].clone()).send(answer[1].clone()).close(),
        saying(&["whole"]),
    ])
    .await;
    let desk = Desk::before(&model).await;
    desk.turn("s1", "one").text().await;
    desk.turn("s1", "two").text().await;
    desk.turn("s1", "two").text().await;
    assert_eq!(words(&model.request(1).await), ["user:one", "assistant:half", "user:two"]);
    assert_eq!(words(&model.request(2).await), ["user:one", "assistant:half", "user:two"]);
}

#[tokio::test]
async fn an_answer_without_end_ends_at_the_limit_of_text_and_of_time() {
    let flood = || Script::new().read().sse().flood(Answer::openai("demo", &["words and words "]).cut(Cut::Events)[1].clone());
    let limits = Limits { text: 10_000, ..Limits::default() };
    let model = Upstream::always(flood()).await;
    let desk = Desk::with(Models::new(upstream(&model.url())), Settings { limits, ..Settings::default() }).await;
    let cut = desk.turn("s1", "hello").events().await.rest().await.unwrap();
    assert_eq!(cut.error(), Some("stream_limit_exceeded"));
    assert!(cut.text().len() <= 10_000);
    model.closed(1).await;

    // Long enough for the first event to come.
    let limits = Limits { turn: Duration::from_secs(3), ..Limits::default() };
    let one = Answer::openai("demo", &["one"]).cut(Cut::Events);
    let model = Upstream::always(Script::new().read().sse().send(one[0].clone()).send(one[1].clone()).stall()).await;
    let desk = Desk::with(Models::new(upstream(&model.url())), Settings { limits, ..Settings::default() }).await;
    let cut = desk.turn("s1", "hello").events().await.rest().await.unwrap();
    assert_eq!((cut.text().as_str(), cut.error()), ("one", Some("stream_limit_exceeded")));
    model.closed(1).await;
}

#[tokio::test]
async fn what_is_too_long_to_be_remembered_is_still_answered() {
    let long = "word ".repeat(200);
    let model = Upstream::always(saying(&[&long])).await;
    let history = Bounds { session_bytes: 100, ..Bounds::default() };
    let desk = Desk::with(Models::new(upstream(&model.url())), Settings { history, ..Settings::default() }).await;
    assert_eq!(desk.turn("s1", "one").text().await, long);
    assert_eq!(desk.turn("s1", "two").step().reply().await.json()["text"], long);
    desk.turn("s1", "three").text().await;
    assert_eq!(words(&model.request(2).await), ["user:three"]);
}

#[tokio::test]
async fn no_word_of_a_turn_reaches_a_log_a_metric_or_a_header() {
    let model =
        Upstream::each([saying(&["canary-answer"]), Script::new().read().sse().send("data: {\"canary-fault\": \n\n").close()]).await;
    let models = Models::new(upstream_with(&model.url(), |settings| settings.idle.max = 0));
    let desk = Desk::with(models, Settings::default()).await;
    let turn = desk.turn("canaries", "canary-prompt").with("metadata", json!({"label": "canary-label"}));
    let reply = turn.reply().await;
    assert!(reply.text().contains("canary-answer"));
    let failed = desk.turn("canaries", "canary-prompt").step().reply().await;
    let refused = desk.turn("canaries", "canary-prompt").claiming(|claims| claims.turn = "x".into()).reply().await;
    assert_eq!((failed.status, refused.status), (502, 401));
    let replayed = client::ask(desk.addr, &turn.request().body("{\"canary-member\": \"canary-value\"}")).await.unwrap();
    assert_eq!(replayed.status, 400);

    let logged = crate::desk::logged();
    let heads = format!("{:?}{:?}{:?}{:?}", reply.head, failed.head, refused.head, replayed.head);
    for hay in [&logged, &desk.exported(), &heads, &failed.text(), &refused.text()] {
        assert!(!hay.contains("canary-"), "{hay}");
    }
    assert!(!replayed.text().contains("canary-value"), "{}", replayed.text());

    // One line per turn, with what an operator asks for, in the caller's trace.
    let ended: Vec<serde_json::Value> = logged
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).expect("every line is JSON"))
        .filter(|line| line["fields"]["message"] == "turn ended" && line["fields"]["session_id"] == "canaries")
        .collect();
    assert_eq!(ended.len(), 2, "{ended:?}");
    assert_eq!(ended[0]["fields"]["end"], "complete");
    assert_eq!(ended[0]["fields"]["turn_id"], turn.id);
    assert_eq!(ended[0]["fields"]["trace_id"], "4bf92f3577b34da6a3ce929d0e0e4736");
    assert_eq!((&ended[0]["fields"]["tenant"], &ended[0]["fields"]["session_id"]), (&json!("acme"), &json!("canaries")));
    assert!(ended[0]["fields"]["ttft_ms"].is_u64());
    assert_eq!((&ended[0]["span"]["name"], &ended[0]["span"]["parent_span_id"]), (&json!("conversation"), &json!("00f067aa0ba902b7")));
    assert_eq!((&ended[1]["fields"]["end"], &ended[1]["fields"]["code"]), (&json!("failed"), &json!("upstream_protocol_error")));
}
