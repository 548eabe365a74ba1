//! A turn is tried again on another endpoint, within a budget, and only while nothing has been answered.

use headgate_contracts::Code;
use headgate_testkit::{
    at_once,
    dialect::Answer,
    services::free_addr,
    upstream::{Framing, Refusing, Script, Upstream},
};
use headgate_upstream::{Protocol, settings::Balance};

use crate::{code, prompt, turn, upstream};

async fn good() -> Upstream {
    Upstream::always(Script::stream([Answer::openai("m", &["good"]).bytes()])).await
}

#[tokio::test]
async fn a_refused_connection_is_tried_elsewhere() {
    let (nobody, model) = (Refusing::start(), good().await);
    let upstream = upstream(&[format!("http://{}", nobody.addr()), model.url()], |_| {});
    for _ in 0..8 {
        assert_eq!(turn(&upstream).await.0, "good");
    }
    // Having refused once, it rests: the others were not sent there first.
    assert_eq!(upstream.stats().connect_failed.get().max(1), 1);
    assert!(!upstream.health()[0].ready || upstream.stats().connect_failed.get() == 0);
}

#[tokio::test]
async fn what_fails_before_the_first_byte_is_tried_elsewhere() {
    let status = |status| Script::new().read().head(status, Framing::Length(0), &[]);
    for (what, script) in [
        ("closed", Script::new().read().close()),
        ("reset", Script::new().read().reset()),
        ("502", status(502)),
        ("503", status(503)),
        ("504", status(504)),
    ] {
        let (bad, model) = (Upstream::always(script).await, good().await);
        let upstream = upstream(&[bad.url(), model.url()], |settings| settings.balance = Balance::RoundRobin);
        for _ in 0..2 {
            assert_eq!(turn(&upstream).await.0, "good", "{what}");
        }
        assert!(upstream.stats().retried.get() >= 1, "{what}");
        assert_eq!(bad.requests().len() as u64, upstream.stats().retried.get(), "{what}");
    }
}

#[tokio::test]
async fn a_turn_is_tried_at_another_orchestrator_only_where_it_surely_was_not_taken() {
    let status = |status, taken: &[(&str, &str)]| Script::new().read().head(status, Framing::Length(0), taken);
    let refused = Refusing::start();
    for (what, script, goes_on) in [
        ("503 that says so", status(503, &[("turn-taken", "?0")]), true),
        ("503 that does not, as a proxy's", status(503, &[]), false),
        ("503 of a turn that was taken", status(503, &[("turn-taken", "?1")]), false),
        ("502 of its model", status(502, &[]), false),
        ("504 of its model", status(504, &[("turn-taken", "?0")]), false),
        ("closed after the request", Script::new().read().close(), false),
        ("reset after the request", Script::new().read().reset(), false),
        ("no connection", Script::new(), true),
    ] {
        let (bad, other) =
            (Upstream::always(script).await, Upstream::always(Script::stream(Answer::conversation("m", &["good"]).events())).await);
        let first = if what == "no connection" { format!("http://{}", refused.addr()) } else { bad.url() };
        let upstream = upstream(&[first, other.url()], |settings| {
            (settings.protocol, settings.balance) = (Protocol::Orchestrator, Balance::RoundRobin);
        });
        let mut heard = Vec::new();
        for _ in 0..2 {
            heard.push(turn(&upstream).await.0);
        }
        heard.sort_unstable();
        assert_eq!(heard, [if goes_on { "good" } else { "" }, "good"], "{what}");
        let dispatches = |to: &Upstream| to.requests().iter().filter(|request| request.target.ends_with("/stream")).count();
        assert!(goes_on || dispatches(&bad) + dispatches(&other) == 2, "{what}");
    }
}

#[tokio::test]
async fn a_turn_sent_on_a_kept_connection_that_was_cut_is_not_sent_to_another_orchestrator() {
    // The first turn leaves its connection behind; the second is sent on it, and the orchestrator begins anew.
    let answer = || Script::new().read().sse().send_all(Answer::conversation("m", &["good"]).events()).end();
    let anew = Script::new().read().head(503, Framing::Length(0), &[("turn-taken", "?0")]);
    let (dying, other) = (Upstream::each([answer().read().close(), anew]).await, Upstream::always(answer().again()).await);
    let upstream = upstream(&[dying.url(), other.url()], |settings| {
        (settings.protocol, settings.balance) = (Protocol::Orchestrator, Balance::Session);
    });
    let mut at_dying = prompt();
    while dying.requests().is_empty() {
        at_dying = prompt();
        let mut answer = upstream.open(&at_dying).await.unwrap();
        crate::read(&mut answer).await.1.unwrap();
    }
    let before = other.requests().len();
    at_dying.turn = headgate_contracts::TurnId::fresh();
    assert!(upstream.open(&at_dying).await.is_err());
    assert_eq!((dying.requests().len(), other.requests().len()), (3, before));
}

#[tokio::test]
async fn what_has_begun_is_never_tried_again() {
    let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n";
    for (what, script, expected) in [
        ("one byte of a head", Script::new().read().raw("H").close(), Code::UpstreamReset),
        ("a head", Script::new().read().raw(head).close(), Code::UpstreamReset),
        ("a refusal", Script::reply(400, "application/json", "{}"), Code::UpstreamRefused),
        ("too many requests", Script::reply(429, "application/json", "{}"), Code::Overloaded),
    ] {
        let (bad, also) = (Upstream::always(script.clone()).await, Upstream::always(script).await);
        let upstream = upstream(&[bad.url(), also.url()], |_| {});
        assert_eq!(code(turn(&upstream).await.1), expected, "{what}");
        assert_eq!(bad.requests().len() + also.requests().len(), 1, "{what}");
    }
}

#[tokio::test]
async fn one_turn_is_tried_no_more_often_than_allowed() {
    let mut models = Vec::new();
    for _ in 0..4 {
        models.push(Upstream::always(Script::new().read().close()).await);
    }
    let urls: Vec<_> = models.iter().map(Upstream::url).collect();
    let upstream = upstream(&urls, |settings| settings.retry.attempts = 2);
    assert_eq!(code(turn(&upstream).await.1), Code::UpstreamReset);
    assert_eq!(models.iter().map(|model| model.requests().len()).sum::<usize>(), 3);
}

#[tokio::test]
async fn retries_end_with_their_budget() {
    let (a, b) = (Upstream::always(Script::new().read().close()).await, Upstream::always(Script::new().read().close()).await);
    let upstream = upstream(&[a.url(), b.url()], |settings| (settings.retry.share, settings.retry.floor) = (0.1, 0));
    for _ in 0..100 {
        assert_eq!(code(turn(&upstream).await.1), Code::UpstreamReset);
    }
    let stats = upstream.stats();
    assert!((9..=11).contains(&stats.retried.get()), "{stats:?}");
    assert_eq!(stats.retried.get() + stats.retry_denied.get(), 100);
}

#[tokio::test]
async fn a_lone_endpoint_is_asked_once() {
    let bad = Upstream::always(Script::new().read().close()).await;
    let upstream = upstream(&[bad.url()], |_| {});
    assert_eq!(code(turn(&upstream).await.1), Code::UpstreamReset);
    assert_eq!(bad.requests().len(), 1);
}

#[tokio::test]
async fn open_answers_are_spread_over_the_less_busy() {
    let mut models = Vec::new();
    for _ in 0..4 {
        models.push(Upstream::always(Script::new().read().sse().stall()).await);
    }
    let urls: Vec<_> = models.iter().map(Upstream::url).collect();
    let upstream = upstream(&urls, |_| {});
    let mut answers = Vec::new();
    for _ in 0..80 {
        answers.push(upstream.open(&prompt()).await.unwrap());
    }
    let busy: Vec<_> = upstream.health().iter().map(|endpoint| endpoint.in_flight).collect();
    assert_eq!(busy.iter().sum::<usize>(), 80);
    assert!(busy.iter().all(|n| (14..=26).contains(n)), "{busy:?}");
    drop(answers);
    assert!(upstream.health().iter().all(|endpoint| endpoint.in_flight == 0));
}

#[tokio::test]
async fn a_session_stays_with_its_endpoint_and_moves_when_that_is_gone() {
    let mut models = Vec::new();
    for _ in 0..4 {
        models.push(good().await);
    }
    let urls: Vec<_> = models.iter().map(Upstream::url).collect();
    let upstream = upstream(&urls, |settings| settings.balance = Balance::Session);
    let prompt = prompt();
    for _ in 0..10 {
        let mut answer = upstream.open(&prompt).await.unwrap();
        assert_eq!(crate::read(&mut answer).await.0, "good");
    }
    let home = models.iter().position(|model| !model.requests().is_empty()).unwrap();
    assert_eq!(models[home].requests().len(), 10);
    drop(models.remove(home));
    let mut answer = upstream.open(&prompt).await.unwrap();
    assert_eq!(crate::read(&mut answer).await.0, "good");
}

#[tokio::test]
async fn health_checks_find_an_endpoint_that_is_gone_and_one_that_is_back() {
    let (model, address) = (good().await, free_addr());
    let listens = async || tokio::net::TcpListener::bind(address).await.unwrap();
    let other = listens().await;
    let upstream = upstream(&[model.url(), format!("http://{address}")], |settings| {
        settings.health.interval = Some(std::time::Duration::from_millis(10));
    });
    let until = async |ready: bool| {
        while upstream.health()[1].ready != ready {
            tokio::task::yield_now().await;
        }
    };
    until(true).await;
    drop(other);
    at_once(until(false), "the loss to be seen").await;
    for _ in 0..10 {
        assert_eq!(turn(&upstream).await.0, "good");
    }
    assert_eq!(upstream.stats().connect_failed.get(), 0, "no turn was sent to it");
    let back = listens().await;
    at_once(until(true), "the return to be seen").await;
    drop(back);
}
