//! A call that a person has to agree to: on a gateway's signed word alone, and never where nobody can be asked.

use std::{collections::BTreeSet, time::Duration};

use headgate_contracts::TurnId;
use headgate_orchestrator::{Confirm, Models, Settings};
use headgate_policy::{Claims, Decision, Digest, Facts};
use headgate_testkit::{
    client::{Reply, Request, ask},
    upstream::{Script, Upstream},
};
use serde_json::{Value, json};

use crate::desk::{Desk, now, upstream};

/// A model that calls `pay` with these arguments.
pub(crate) fn paying(arguments: &str) -> Script {
    let chunk = |delta: Value, finish: Option<&str>| {
        let choice = json!({"index": 0, "delta": delta, "finish_reason": finish});
        format!("data: {}\n\n", json!({"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "demo", "choices": [choice]}))
    };
    let call = json!({"index": 0, "id": "call_0", "type": "function", "function": {"name": "pay", "arguments": arguments}});
    let pieces =
        [chunk(json!({"role": "assistant", "content": "Let me."}), None), chunk(json!({ "tool_calls": [call] }), Some("tool_calls"))];
    Script::new().read().sse().send_all(pieces).send("data: [DONE]\n\n").end().again()
}

pub(crate) async fn asking(model: &Upstream) -> Desk {
    let confirm = Confirm { tools: BTreeSet::from(["pay".to_owned()]), within: Duration::from_secs(60) };
    Desk::with(Models::new(upstream(&model.url())), Settings { confirm: Some(confirm), ..Settings::default() }).await
}

/// What a gateway says of a question of `turn`, with a verdict that is changed before it is signed.
fn said(desk: &Desk, turn: &str, body: &Value, change: impl FnOnce(&mut Claims)) -> Request {
    let (path, body) = (format!("/v1/conversation/turns/{turn}/confirm"), body.to_string());
    let facts = Facts { tid: "acme", sub: "u1", sid: "s1", turn, dec: Decision::Allow, cat: &[], trc: None };
    let mut claims = desk.issuer.dispatch(&facts, "POST", &path, Digest::of(body.as_bytes()), now()).unwrap();
    change(&mut claims);
    let verdict = desk.ring.sign(&claims).unwrap();
    let request = Request::new("POST", &path).header("content-type", "application/json").header("policy-verdict", &verdict);
    request.header("policy-version", &claims.pol.ver).header("constitution-hash", &claims.con.to_string()).body(body)
}

fn code(reply: &Reply) -> (u16, String) {
    (reply.status, reply.json()["code"].as_str().unwrap_or_default().to_owned())
}

#[tokio::test]
async fn an_answer_counts_on_the_word_of_a_gateway_about_this_turn_and_these_bytes_alone() {
    let model = Upstream::always(paying("{}")).await;
    let desk = asking(&model).await;
    let turn = desk.turn("s1", "pay him");
    let mut events = turn.events().await;
    while events.expect().await.name != "confirm" {}
    let yes = json!({"id": "q1", "accept": true});
    let path = format!("/v1/conversation/turns/{}/confirm", turn.id);
    let unsigned = ask(desk.addr, &Request::post(&path, &yes)).await.unwrap();
    assert_eq!(code(&unsigned), (401, "verdict_invalid".to_owned()));
    let changes: [fn(&mut Claims); 5] = [
        |claims| claims.tid = "other".into(),
        |claims| claims.sid = "s2".into(),
        |claims| claims.sub = "u2".into(),
        |claims| claims.turn = TurnId::fresh().to_string(),
        |claims| claims.bdg = Digest::of(b"{\"id\":\"q1\",\"accept\":false}"),
    ];
    for change in changes {
        let reply = ask(desk.addr, &said(&desk, &turn.id, &yes, change)).await.unwrap();
        assert_eq!(code(&reply), (401, "verdict_invalid".to_owned()));
    }
    let other = ask(desk.addr, &said(&desk, &turn.id, &json!({"id": "q2", "accept": true}), |_| {})).await.unwrap();
    assert_eq!(code(&other), (404, "not_found".to_owned()));
    let nonsense = ask(desk.addr, &said(&desk, &turn.id, &json!({"id": "q1", "accept": "yes"}), |_| {})).await.unwrap();
    assert_eq!(nonsense.status, 400);
    let request = said(&desk, &turn.id, &yes, |_| {});
    assert_eq!(ask(desk.addr, &request).await.unwrap().status, 202);
    let end = events.rest().await.unwrap();
    assert_eq!((end.text_in(0, "tool_arguments").as_str(), end.end().data["finish"].as_str()), ("{}", Some("tool_calls")));
    let late = ask(desk.addr, &said(&desk, &turn.id, &yes, |_| {})).await.unwrap();
    assert_eq!(code(&late), (404, "session_not_found".to_owned()));
}

#[tokio::test]
async fn who_gets_one_answer_at_the_end_is_not_asked_and_gets_no_call() {
    let model = Upstream::always(paying("{}")).await;
    let desk = asking(&model).await;
    let reply = desk.turn("s1", "pay him").step().reply().await;
    assert_eq!(code(&reply), (403, "declined".to_owned()));
    assert!(!reply.text().contains("pay"));
    assert_eq!(desk.metric("orchestrator_turns_total{route=\"step\",end=\"cancelled\",code=\"declined\"}"), 1);
}

#[tokio::test]
async fn a_call_that_is_too_long_to_be_asked_about_ends_its_turn() {
    let model = Upstream::always(paying(&"x".repeat(17 << 10))).await;
    let desk = asking(&model).await;
    let end = desk.turn("s1", "pay him").events().await.rest().await.unwrap();
    assert_eq!((end.end().data["code"].as_str(), end.named("tool").count()), (Some("stream_limit_exceeded"), 0));
}

#[tokio::test]
async fn what_nobody_agreed_to_is_not_remembered_as_said() {
    let model = Upstream::always(paying("{}")).await;
    let desk = asking(&model).await;
    let turn = desk.turn("s1", "pay him");
    let mut events = turn.events().await;
    while events.expect().await.name != "confirm" {}
    let no = said(&desk, &turn.id, &json!({"id": "q1", "accept": false}), |_| {});
    assert_eq!(ask(desk.addr, &no).await.unwrap().status, 202);
    assert_eq!(events.rest().await.unwrap().end().data["code"], "declined");
    let again = desk.turn("s1", "and now?");
    drop(again.events().await);
    let sent = model.request(1).await.json();
    assert!(!sent["messages"].to_string().contains("tool_calls"), "{sent}");
    assert!(sent["messages"].to_string().contains("Let me."), "{sent}");
}
