//! The orchestrator acts on a verdict for these bytes, tenant, session and turn, once, and on no other.

use std::{sync::Arc, time::Duration};

use headgate_orchestrator::{Models, Settings};
use headgate_policy::{Decision, Digest, Direction, Jti, Memory, Mode, Registry, Ring, Standing, Unavailable};
use headgate_testkit::{
    client::{self, Request},
    dialect::{Answer, Cut},
    upstream::{Script, Upstream},
};

use crate::desk::{Desk, STEP, STREAM, TRACE, now, upstream};

async fn model() -> Upstream {
    Upstream::always(Script::stream(Answer::openai("demo-8", &["Hel", "lo"]).cut(Cut::Events))).await
}

#[tokio::test]
async fn a_dispatch_that_holds_is_answered_and_its_policy_travels_on() {
    let model = model().await;
    let desk = Desk::before(&model).await;
    let turn = desk.turn("s1", "hello");
    let request = turn.request();
    let answer = client::stream(desk.addr, &request, crate::desk::client_kind()).await.unwrap().rest().await.unwrap();
    assert_eq!(answer.text(), "Hello");
    assert_eq!(answer.events[0].data["model"], "demo-8");
    assert_eq!(answer.end().data["finish"], "stop");

    let sent = model.request(0).await;
    let said = |name: &str| sent.header(name).unwrap_or_default().to_owned();
    let bytes = String::from_utf8(request.bytes("")).unwrap();
    let had = |name: &str| bytes.lines().find_map(|line| line.strip_prefix(&format!("{name}: "))).unwrap_or_default().to_owned();
    for name in ["policy-verdict", "policy-version", "constitution-hash"] {
        assert_eq!(said(name), had(name), "{name}");
        assert!(!said(name).is_empty(), "{name}");
    }
    assert_eq!(said("traceparent")[..36], TRACE[..36], "the same trace");
    assert_ne!(said("traceparent"), TRACE, "and a span of our own");
    assert_eq!(desk.decided("stream", "accepted"), 1);
    assert_eq!(desk.metric("orchestrator_turns_total{route=\"stream\",end=\"complete\",code=\"none\"}"), 1);
}

#[tokio::test]
async fn a_verdict_about_anything_else_is_refused_with_its_reason() {
    let model = model().await;
    let desk = Desk::before(&model).await;
    let turn = || desk.turn("s1", "hello");
    let other = || "another".to_owned();
    let cases: Vec<(Request, &str, &str)> = vec![
        (turn().claiming(|claims| claims.tid = other()).request(), "verdict_invalid", "tenant"),
        (turn().claiming(|claims| claims.sid = other()).request(), "verdict_invalid", "session"),
        (turn().claiming(|claims| claims.turn = other()).request(), "verdict_invalid", "turn"),
        (turn().claiming(|claims| claims.sub = other()).request(), "verdict_invalid", "subject"),
        (turn().claiming(|claims| claims.iss = other()).request(), "verdict_invalid", "issuer"),
        (turn().claiming(|claims| claims.aud = other()).request(), "verdict_invalid", "audience"),
        (turn().claiming(|claims| claims.htm = Some("PUT".into())).request(), "verdict_invalid", "method"),
        (turn().claiming(|claims| claims.htu = Some(STEP.into())).request(), "verdict_invalid", "path"),
        (turn().claiming(|claims| claims.bdg = Digest::of(b"other bytes")).request(), "verdict_invalid", "digest"),
        (turn().claiming(|claims| claims.dec = Decision::Deny).request(), "verdict_invalid", "denied"),
        (turn().claiming(|claims| claims.dir = Direction::Tool).request(), "verdict_invalid", "direction"),
        (turn().claiming(|claims| claims.exp = claims.iat + 61).request(), "verdict_invalid", "lifetime"),
        (turn().claiming(|claims| (claims.iat, claims.exp) = (claims.iat - 67, claims.exp - 67)).request(), "verdict_invalid", "expired"),
        (turn().claiming(|claims| (claims.iat, claims.exp) = (claims.iat + 60, claims.exp + 60)).request(), "verdict_invalid", "not_yet"),
        (turn().claiming(|claims| (claims.mode, claims.fence) = (Mode::Training, Some(1))).request(), "verdict_invalid", "mode"),
        (turn().claiming(|claims| claims.pol.ver = "8".into()).request(), "version_conflict", "version"),
        (turn().claiming(|claims| claims.con = Digest::of(b"unknown")).request(), "version_conflict", "constitution"),
        (turn().with("temperature", 1.5).request().body(turn().body.to_string()), "verdict_invalid", "digest_header"),
    ];
    for (request, code, reason) in cases {
        let reply = client::ask(desk.addr, &request).await.unwrap();
        assert_eq!(reply.problem().as_deref(), Ok(code), "{reason}: {}", reply.text());
        assert_eq!(reply.status, if code == "version_conflict" { 409 } else { 401 }, "{reason}");
        assert_eq!(reply.json()["detail"], reason);
    }
    assert_eq!(desk.decided("stream", "invalid"), 16);
    assert_eq!(desk.decided("stream", "conflict"), 2);
    assert_eq!(desk.decided("stream", "accepted"), 0);
    assert_eq!(model.opened(), 0, "the model was never asked");
}

/// The request without the headers of this name, and with these instead.
fn replaced(desk: &Desk, name: &str, values: &[&str]) -> Request {
    let turn = desk.turn("s1", "hello");
    let body = turn.body.to_string();
    let mut request = Request::new("POST", STREAM).header("content-type", "application/json").body(body.clone());
    for (known, value) in turn.headers("POST", body.as_bytes()) {
        if known != name {
            request = request.header(known, &value);
        }
    }
    values.iter().fold(request, |request, value| request.header(name, value))
}

#[tokio::test]
async fn headers_that_are_missing_doubled_or_at_odds_with_the_claims_are_refused() {
    let model = model().await;
    let desk = Desk::before(&model).await;
    let hash = desk.issuer.con.to_string();
    let twice = [hash.as_str(); 2];
    let cases: Vec<(&str, &[&str], u16, &str)> = vec![
        ("policy-verdict", &[], 401, "missing"),
        ("policy-verdict", &["a.b.c", "a.b.c"], 400, "the header policy-verdict must come once"),
        ("policy-verdict", &["a.b.c"], 401, "shape"),
        ("policy-verdict", &["\u{e9}"], 401, "shape"),
        ("policy-version", &[], 401, "version_header"),
        ("policy-version", &["8"], 401, "version_header"),
        ("policy-version", &["7", "7"], 400, "the header policy-version must come once"),
        ("constitution-hash", &[], 401, "constitution_header"),
        ("constitution-hash", &["sha-256=:AAAA:"], 401, "constitution_header"),
        ("constitution-hash", &twice, 400, "the header constitution-hash must come once"),
        ("content-digest", &["sha-256=:AAAA:"], 401, "digest_header"),
        ("content-type", &["text/plain"], 400, "the header content-type must come once"),
    ];
    for (name, values, status, detail) in cases {
        let reply = client::ask(desk.addr, &replaced(&desk, name, values)).await.unwrap();
        assert_eq!(reply.problem().as_deref(), Ok(if status == 400 { "invalid_request" } else { "verdict_invalid" }), "{name} {values:?}");
        assert_eq!((reply.status, reply.json()["detail"].as_str().unwrap()), (status, detail), "{name} {values:?}");
    }
    assert_eq!(model.opened(), 0);
    let fine = client::ask(desk.addr, &replaced(&desk, "content-digest", &[])).await.unwrap();
    assert_eq!(fine.status, 200, "the digest is in the verdict already");
}

#[tokio::test]
async fn a_verdict_is_used_up_by_the_turn_it_began_and_by_nothing_less() {
    let model = model().await;
    let desk = Desk::before(&model).await;
    let turn = desk.turn("s1", "hello");
    let body = turn.body.to_string();
    let headers = turn.headers("POST", body.as_bytes());
    let request = |version: &str| {
        let request = Request::new("POST", STREAM).header("content-type", "application/json").body(body.clone());
        headers.iter().fold(request, |request, (name, value)| request.header(name, if *name == "policy-version" { version } else { value }))
    };
    assert_eq!(client::ask(desk.addr, &request("8")).await.unwrap().status, 401);
    assert_eq!(client::ask(desk.addr, &request("7")).await.unwrap().status, 200);
    let again = client::ask(desk.addr, &request("7")).await.unwrap();
    assert_eq!((again.status, again.problem().as_deref()), (401, Ok("verdict_replayed")));
    assert_eq!([desk.decided("stream", "accepted"), desk.decided("stream", "replayed"), desk.decided("stream", "invalid")], [1, 1, 1]);

    // The same number in another verdict is the same verdict.
    let jti = Jti::fresh().unwrap();
    assert_eq!(desk.turn("s1", "one").claiming(|claims| claims.jti = jti).reply().await.status, 200);
    assert_eq!(desk.turn("s1", "two").claiming(|claims| claims.jti = jti).reply().await.problem().as_deref(), Ok("verdict_replayed"));
    assert_eq!(model.requests().len(), 2);
}

#[tokio::test]
async fn a_key_counts_once_it_is_trusted_and_until_it_is_not() {
    let model = model().await;
    let mut desk = Desk::before(&model).await;
    let old = std::mem::replace(&mut desk.ring, Ring::generate(now()).unwrap());
    let stranger = desk.turn("s1", "hello").reply().await;
    assert_eq!((stranger.problem().as_deref(), stranger.json()["detail"].as_str()), (Ok("verdict_invalid"), Some("kid")));
    desk.orchestrator.trust(desk.ring.verifier());
    assert_eq!(desk.turn("s1", "hello").text().await, "Hello");
    desk.ring = old;
    assert_eq!(desk.turn("s1", "hello").reply().await.status, 401);
}

#[tokio::test]
async fn keys_that_nobody_brings_again_are_believed_no_longer_than_they_last() {
    let model = model().await;
    let desk = Desk::before(&model).await;
    let refused = async || {
        let reply = desk.turn("s1", "hello").reply().await;
        (reply.status, reply.problem().unwrap())
    };
    let unavailable = (503, "policy_registry_unavailable".to_owned());
    desk.orchestrator.wait_for_keys();
    assert_eq!(refused().await, unavailable, "not fetched yet");
    desk.orchestrator.trust_for(desk.ring.verifier(), Duration::from_secs(600));
    assert_eq!(desk.turn("s1", "hello").text().await, "Hello");
    assert!(desk.orchestrator.ready().is_ok());
    desk.orchestrator.trust_for(desk.ring.verifier(), Duration::ZERO);
    assert_eq!(refused().await, unavailable, "too old");
    assert_eq!(desk.orchestrator.ready(), Err("the keys that verdicts are judged by cannot be fetched\n"));
    desk.orchestrator.trust_for(desk.ring.verifier(), Duration::from_secs(600));
    assert_eq!(desk.turn("s1", "hello").text().await, "Hello", "and here they are again");
}

#[tokio::test]
async fn the_previous_policy_counts_for_a_while_and_an_unknown_one_never() {
    let model = model().await;
    let mut desk = Desk::before(&model).await;
    desk.amend(b"amended");
    assert_eq!(desk.turn("s1", "hello").text().await, "Hello", "dispatched under the one before");
    desk.issuer.pol.ver = "8".into();
    assert_eq!(desk.turn("s1", "hello").reply().await.problem().as_deref(), Ok("version_conflict"), "its hash with the new version");
    desk.issuer.con = Digest::of(b"amended");
    assert_eq!(desk.turn("s1", "hello").text().await, "Hello");
}

/// A registry that is away, or worse.
struct Broken(fn() -> Result<Standing, Unavailable>);

impl Registry for Broken {
    fn entry(&self, _: &str, _: u64) -> Result<Option<Arc<headgate_policy::Entry>>, Unavailable> {
        (self.0)().map(|_| None)
    }
}

#[tokio::test]
async fn nothing_passes_while_the_registry_is_away() {
    let model = model().await;
    let away = Arc::new(Broken(|| Err(Unavailable)));
    let models = Models::new(upstream(&model.url()));
    let desk = Desk::asking(models, Settings::default(), Arc::new(Memory::new(1)), away).await;
    let reply = desk.turn("s1", "hello").reply().await;
    assert_eq!((reply.status, reply.problem().as_deref()), (503, Ok("policy_registry_unavailable")));
    assert_eq!((desk.decided("stream", "busy"), model.opened()), (1, 0));
}

#[tokio::test]
async fn a_panic_costs_its_own_request_and_no_other() {
    let model = model().await;
    let broken = Arc::new(Broken(|| panic!("a registry with a fault")));
    let models = Models::new(upstream(&model.url()));
    let desk = Desk::asking(models, Settings::default(), Arc::new(Memory::new(1)), broken).await;
    for _ in 0..2 {
        let reply = desk.turn("s1", "hello").reply().await;
        assert_eq!((reply.status, reply.problem().as_deref()), (500, Ok("internal_error")));
    }
    assert_eq!(desk.metric("orchestrator_panics_total"), 2);
    assert_eq!(client::ask(desk.addr, &Request::get("/healthz")).await.unwrap().status, 200);
}
