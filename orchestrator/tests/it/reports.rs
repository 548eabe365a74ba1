//! What a gateway tells of turns afterwards: kept once, only on its signed word, and only for the turn that it is about.

use std::{fs::File, path::Path};

use headgate_contracts::TurnId;
use headgate_orchestrator::{
    Models, Settings,
    events::{self, Follow, Log, verify},
};
use headgate_policy::{Claims, Decision, Digest, Direction, Facts, Ring};
use headgate_testkit::{
    client::{Http1, Reply, Request, ask},
    dialect::{Answer, Cut},
    upstream::{Script, Upstream},
};
use serde_json::{Value, json};

use crate::desk::{Desk, TRACE, now, upstream};

async fn keeping(model: &Upstream, folder: &Path) -> Desk {
    let settings = events::Settings { folder: folder.to_owned(), cap: events::Settings::LEAST_CAP, turns: 16, topic: None, keys: None };
    let (log, _) = Log::open_with(&settings, Box::new(File::sync_data)).unwrap();
    Desk::keeping(Models::new(upstream(&model.url())), Settings::default(), log).await
}

async fn answering() -> Upstream {
    Upstream::always(Script::stream(Answer::openai("demo", &["canary", "canary"]).cut(Cut::Whole))).await
}

/// The events of a turn, as `type` and `data`.
fn kept(folder: &Path, turn: &str) -> Vec<(String, Value)> {
    let mut log = Follow::open(folder).unwrap();
    let turn: TurnId = turn.parse().unwrap();
    let all = std::iter::from_fn(|| log.next_entry().unwrap()).filter(|entry| entry.turn == turn);
    let event = |entry: events::Entry| serde_json::from_slice::<Value>(&entry.event).unwrap();
    all.map(event).map(|event| (event["type"].as_str().unwrap().to_owned(), event["data"].clone())).collect()
}

fn kinds(folder: &Path, turn: &str) -> Vec<String> {
    kept(folder, turn).into_iter().map(|(kind, _)| kind).collect()
}

/// Something that a gateway tells.
struct Report<'a> {
    desk: &'a Desk,
    turn: String,
    what: &'static str,
    body: Value,
    claims: Claims,
}

fn facts<'a>(turn: &'a str, dec: Decision) -> Facts<'a> {
    Facts { tid: "acme", sub: "u1", sid: "s1", turn, dec, cat: &["hate"], trc: None }
}

impl<'a> Report<'a> {
    fn of(desk: &'a Desk, turn: &str, what: &'static str, dir: Direction, dec: Decision, body: Value) -> Report<'a> {
        let path = format!("/v1/conversation/turns/{turn}/{what}");
        let digest = Digest::of(body.to_string().as_bytes());
        let claims = desk.issuer.report(&facts(turn, dec), dir, "POST", &path, digest, now()).unwrap();
        Report { desk, turn: turn.to_owned(), what, body, claims }
    }

    /// With the verdict on its output, as its client got it.
    fn delivery(desk: &'a Desk, turn: &str, outcome: &str, code: Option<&str>) -> Report<'a> {
        let dec = if outcome == "denied" { Decision::Deny } else { Decision::Allow };
        let output: Claims = desk.issuer.output(&facts(turn, dec), Digest::of(b"canarycanary"), now()).unwrap();
        let verdict = desk.ring.sign(&output).unwrap();
        let body = json!({"tenant": "acme", "session_id": "s1", "outcome": outcome, "code": code, "last_seq": 7, "text_bytes": 12, "verdict": verdict});
        Report::of(desk, turn, "delivery", Direction::Output, dec, body)
    }

    fn denial(desk: &'a Desk, turn: &str) -> Report<'a> {
        let body = json!({"tenant": "acme", "session_id": "s1", "subject": "u1", "code": "policy_denied"});
        Report::of(desk, turn, "verdict", Direction::Input, Decision::Deny, body)
    }

    fn claiming(mut self, change: impl FnOnce(&mut Claims)) -> Report<'a> {
        change(&mut self.claims);
        self
    }

    fn request(&self, ring: &Ring) -> Request {
        Request::new("POST", &format!("/v1/conversation/turns/{}/{}", self.turn, self.what))
            .header("content-type", "application/json")
            .header("policy-verdict", &ring.sign(&self.claims).unwrap())
            .header("traceparent", TRACE)
            .body(self.body.to_string())
    }

    async fn tell(&self) -> Reply {
        ask(self.desk.addr, &self.request(&self.desk.ring)).await.unwrap()
    }
}

fn said(reply: &Reply) -> (u16, String) {
    (reply.status, reply.problem().unwrap_or_default())
}

#[tokio::test]
async fn what_the_user_got_stands_beside_the_turns_end_with_the_verdict_on_it_before() {
    let (model, folder) = (answering().await, tempfile::tempdir().unwrap());
    let mut desk = keeping(&model, folder.path()).await;
    let turn = desk.turn("s1", "canary");
    turn.text().await;
    let id = turn.id.clone();
    drop(turn);
    let report = Report::delivery(&desk, &id, "delivered", None);
    assert_eq!(report.tell().await.status, 202);
    assert_eq!(report.tell().await.status, 202, "the same once more");
    assert_eq!(Report::delivery(&desk, &id, "cut", Some("client_closed")).tell().await.status, 202, "the first word counts");
    assert_eq!(desk.metric("orchestrator_deliveries_total{outcome=\"delivered\"}"), 1);
    assert_eq!(desk.metric("orchestrator_reports_total{call=\"delivery\",result=\"again\"}"), 2);
    desk.shut_down().await.unwrap();
    let events = kept(folder.path(), &id);
    let kinds: Vec<&str> = events.iter().map(|(kind, _)| kind.as_str()).collect();
    assert_eq!(kinds, ["turn.accepted.v1", "verdict.input.v1", "turn.completed.v1", "verdict.output.v1", "delivery.v1"]);
    let (verdict, delivery) = (&events[3].1, &events[4].1);
    assert_eq!((delivery["outcome"].as_str(), delivery["last_seq"].as_u64()), (Some("delivered"), Some(7)));
    assert_eq!((&delivery["verdict"], verdict["decision"].as_str()), (&verdict["verdict"], Some("allow")));
    assert_eq!(verdict["text_digest"], Digest::of(b"canarycanary").to_string());
    assert!(!events.iter().any(|(_, data)| data.to_string().contains("canary")));
    let judged = verify(folder.path()).unwrap();
    assert!(judged.is_good() && judged.owed.is_empty() && judged.settled == 1, "{judged:?}");
}

#[tokio::test]
async fn a_report_that_is_forged_foreign_or_about_nothing_is_refused_and_changes_nothing() {
    let (model, folder) = (answering().await, tempfile::tempdir().unwrap());
    let desk = keeping(&model, folder.path()).await;
    let turn = desk.turn("s1", "hello");
    turn.text().await;
    let (id, other) = (turn.id.clone(), TurnId::fresh().to_string());
    let invalid = |word: &str| (401, "verdict_invalid".to_owned(), word.to_owned());
    let mut altered = Report::delivery(&desk, &id, "delivered", None);
    altered.body["outcome"] = "cut".into();
    let mut elsewhere = Report::delivery(&desk, &id, "delivered", None);
    elsewhere.turn = other.clone();
    let mut of_another = Report::delivery(&desk, &other, "delivered", None);
    of_another.body["session_id"] = "s2".into();
    let output_of_another = {
        let mut report = Report::delivery(&desk, &id, "delivered", None);
        report.body["verdict"] = Report::delivery(&desk, &other, "delivered", None).body["verdict"].clone();
        Report::of(&desk, &id, "delivery", Direction::Output, Decision::Allow, report.body)
    };
    let dispatch_verdict = Report::delivery(&desk, &id, "delivered", None).claiming(|claims| claims.dir = Direction::Input);
    let for_audit = Report::delivery(&desk, &id, "delivered", None).claiming(|claims| {
        claims.aud = "audit".into();
        (claims.htm, claims.htu) = (None, None);
    });
    let old = Report::delivery(&desk, &id, "delivered", None).claiming(|claims| (claims.iat, claims.exp) = (now() - 200, now() - 140));
    for (what, report, expected) in [
        ("other bytes", altered, invalid("digest")),
        ("another turn's path", elsewhere, invalid("turn")),
        ("another session", of_another, invalid("session")),
        ("another turn's output", output_of_another, invalid("output_turn")),
        ("a verdict on a prompt", dispatch_verdict, invalid("direction")),
        ("the client's own verdict", for_audit, invalid("audience")),
        ("an old one", old, invalid("expired")),
    ] {
        let reply = report.tell().await;
        let (status, code) = said(&reply);
        let body: Value = serde_json::from_slice(reply.text().as_bytes()).unwrap();
        assert_eq!((status, code, body["detail"].as_str().unwrap().to_owned()), expected, "{what}");
    }
    let report = Report::delivery(&desk, &id, "delivered", None);
    let forged = ask(desk.addr, &report.request(&Ring::generate(now()).unwrap())).await.unwrap();
    assert_eq!(said(&forged), (401, "verdict_invalid".into()));
    let unproven = Request::new("POST", &format!("/v1/conversation/turns/{id}/delivery")).header("content-type", "application/json");
    let unproven = ask(desk.addr, &unproven.body(report.body.to_string())).await.unwrap();
    assert_eq!(said(&unproven), (401, "verdict_invalid".into()));
    let miscopied = ask(desk.addr, &report.request(&desk.ring).header("policy-version", "8")).await.unwrap();
    assert_eq!(said(&miscopied), (401, "verdict_invalid".into()), "a copy that says something else");
    assert_eq!(said(&Report::delivery(&desk, &other, "delivered", None).tell().await), (404, "session_not_found".into()));
    assert_eq!(said(&Report::delivery(&desk, &id, "unknown", None).tell().await), (400, "invalid_request".into()));
    assert_eq!(verify(folder.path()).unwrap().owed.len(), 1, "it is still to be said");
    assert_eq!(report.tell().await.status, 202);
}

/// A turn that has reached its model, by its id, and the connection it came on.
async fn asked(desk: &Desk, model: &Upstream) -> (Http1, String) {
    let turn = desk.turn("s1", "hello");
    let before = model.opened();
    let mut gateway = Http1::connect(desk.addr).await;
    gateway.send(&turn.request()).await;
    model.request(before).await;
    (gateway, turn.id.clone())
}

#[tokio::test]
async fn an_answer_that_policy_cut_is_a_denied_turn_whichever_is_seen_first_the_leaving_or_the_word() {
    let model = Upstream::always(Script::new().read().sse().stall()).await;
    for leaves_first in [true, false] {
        let folder = tempfile::tempdir().unwrap();
        let mut desk = keeping(&model, folder.path()).await;
        let (gateway, id) = asked(&desk, &model).await;
        if leaves_first {
            drop(gateway);
            desk.idle().await;
            assert_eq!(kinds(folder.path(), &id).len(), 2, "the word is waited for");
        }
        assert_eq!(Report::delivery(&desk, &id, "denied", Some("policy_denied")).tell().await.status, 202);
        desk.idle().await;
        desk.shut_down().await.unwrap();
        let events = kept(folder.path(), &id);
        assert_eq!(events[2].0, "turn.denied.v1", "leaves first: {leaves_first}");
        assert_eq!((events[2].1["code"].as_str(), events[2].1["categories"][0].as_str()), (Some("policy_denied"), Some("hate")));
        assert_eq!((events[4].0.as_str(), events[4].1["outcome"].as_str()), ("delivery.v1", Some("denied")));
        assert!(verify(folder.path()).unwrap().is_good());
    }
}

#[tokio::test]
async fn why_a_turn_was_left_is_the_gateways_word() {
    let model = Upstream::always(Script::new().read().sse().stall()).await;
    for (code, kind, member, expected) in [
        ("stopped", "turn.cancelled.v1", "reason", "stopped"),
        ("slow_consumer", "turn.cancelled.v1", "reason", "slow"),
        ("stream_limit_exceeded", "turn.cancelled.v1", "reason", "limit"),
        ("upstream_stalled", "turn.failed.v1", "code", "upstream_stalled"),
        ("a_code_of_tomorrow", "turn.cancelled.v1", "reason", "left"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let mut desk = keeping(&model, folder.path()).await;
        let (gateway, id) = asked(&desk, &model).await;
        drop(gateway);
        assert_eq!(Report::delivery(&desk, &id, "cut", Some(code)).tell().await.status, 202);
        desk.shut_down().await.unwrap();
        let events = kept(folder.path(), &id);
        assert_eq!((events[2].0.as_str(), events[2].1[member].as_str()), (kind, Some(expected)), "{code}");
    }
}

#[tokio::test]
async fn a_gateway_that_says_nothing_leaves_a_turn_as_it_was_seen_and_what_the_user_got_unknown() {
    let (model, folder) = (answering().await, tempfile::tempdir().unwrap());
    let settings =
        events::Settings { folder: folder.path().to_owned(), cap: events::Settings::LEAST_CAP, turns: 16, topic: None, keys: None };
    let (log, _) = Log::open_with(&settings, Box::new(File::sync_data)).unwrap();
    let told = Settings { delivery: std::time::Duration::from_millis(50), ..Settings::default() };
    let desk = Desk::keeping(Models::new(upstream(&model.url())), told, log).await;
    let turn = desk.turn("s1", "hello");
    turn.text().await;
    let unknown = async {
        while desk.metric("orchestrator_deliveries_total{outcome=\"unknown\"}") == 0 {
            tokio::task::yield_now().await;
        }
    };
    headgate_testkit::soon(unknown, "the word to be given up").await;
    assert_eq!(said(&Report::delivery(&desk, &turn.id, "delivered", None).tell().await), (409, "turn_conflict".into()));
    let (kind, data) = kept(folder.path(), &turn.id).pop().unwrap();
    assert_eq!((kind.as_str(), data["outcome"].as_str()), ("delivery.v1", Some("unknown")));
    assert!(verify(folder.path()).unwrap().is_good());
}

#[tokio::test]
async fn a_prompt_that_was_refused_is_written_once_as_a_verdict_and_a_denial() {
    let (model, folder) = (answering().await, tempfile::tempdir().unwrap());
    let mut desk = keeping(&model, folder.path()).await;
    let id = TurnId::fresh().to_string();
    assert_eq!(Report::denial(&desk, &id).tell().await.status, 202);
    assert_eq!(Report::denial(&desk, &id).tell().await.status, 202);
    let allowed = Report::denial(&desk, &TurnId::fresh().to_string()).claiming(|claims| claims.dec = Decision::Allow);
    assert_eq!(said(&allowed.tell().await), (401, "verdict_invalid".into()));
    let mut another = Report::denial(&desk, &TurnId::fresh().to_string());
    another.body["subject"] = "u2".into();
    let another = Report::of(&desk, &another.turn.clone(), "verdict", Direction::Input, Decision::Deny, another.body);
    assert_eq!(said(&another.tell().await), (401, "verdict_invalid".into()));
    let taken = desk.turn("s1", "hello");
    taken.text().await;
    assert_eq!(said(&Report::denial(&desk, &taken.id).tell().await), (409, "turn_conflict".into()));
    drop(taken);
    desk.shut_down().await.unwrap();
    let events = kept(folder.path(), &id);
    assert_eq!(events.iter().map(|(kind, _)| kind.as_str()).collect::<Vec<_>>(), ["verdict.input.v1", "turn.denied.v1"]);
    assert_eq!(
        (events[0].1["decision"].as_str(), events[0].1["subject"].as_str().map(str::len)),
        (Some("deny"), Some(22)),
        "a name, not u1"
    );
    let judged = verify(folder.path()).unwrap();
    assert!(judged.is_good() && judged.refused == 1, "{judged:?}");
}

#[tokio::test]
async fn where_no_events_are_kept_a_proven_report_is_taken_and_an_unproven_one_is_not() {
    let model = answering().await;
    let desk = Desk::before(&model).await;
    let id = TurnId::fresh().to_string();
    assert_eq!(Report::denial(&desk, &id).tell().await.status, 202);
    let other = Ring::generate(now()).unwrap();
    let forged = ask(desk.addr, &Report::denial(&desk, &id).request(&other)).await.unwrap();
    assert_eq!(forged.status, 401);
}

#[tokio::test]
async fn a_refusal_says_whether_the_turn_was_taken() {
    let model = Upstream::always(Script::new().read().head(503, headgate_testkit::upstream::Framing::Length(0), &[])).await;
    let mut desk = Desk::before(&model).await;
    let taken = desk.turn("s1", "hello").reply().await;
    assert_eq!((taken.status, taken.header("turn-taken")), (503, Some("?1")), "its model failed");
    let open = Upstream::always(Script::new().read().sse().stall()).await;
    let busy = Desk::with(Models::new(upstream(&open.url())), Settings::default()).await;
    let mut first = Http1::connect(busy.addr).await;
    first.send(&busy.turn("s1", "one").request()).await;
    open.request(0).await;
    let conflict = busy.turn("s1", "two").reply().await;
    assert_eq!((conflict.status, conflict.header("turn-taken")), (409, Some("?0")));
    let replayed = desk.turn("s2", "hello").claiming(|claims| claims.tid = "other".into()).reply().await;
    assert_eq!((replayed.status, replayed.header("turn-taken")), (401, Some("?0")));
    drop(desk.shut_down());
}
