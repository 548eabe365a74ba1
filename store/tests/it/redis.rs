//! Nobody waits for Redis longer than the budget, whatever is wrong with it.
#![expect(clippy::print_stdout, reason = "figures, for those who ask with --nocapture")]

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use headgate_policy::{Jti, Use};
use headgate_store::{Redis, Unanswered, Unusable, Used, cmd, pipe};
use headgate_testkit::{
    services::{self, OrSkip, Signal},
    soon,
};

use crate::{BUDGET, PATIENT, connected, connected_within};

/// What a machine busy with other things may add to a wait. The budget itself is counted, not timed: see the tests. Less than a hundred
/// budgets.
const BUSY: Duration = Duration::from_millis(1500);

async fn ping(redis: &Redis) -> Result<String, Unanswered> {
    redis.ask(&cmd("PING")).await
}

async fn answers(redis: &Redis) {
    assert_eq!(ping(&redis.within(PATIENT)).await.as_deref(), Ok("PONG"));
}

#[tokio::test]
async fn a_frozen_redis_costs_three_budgets_and_then_nothing_until_it_thaws() {
    let Some(server) = services::redis().await.or_skip("a_frozen_redis_costs_three_budgets") else { return };
    let redis = connected(&server).await;
    answers(&redis).await;
    server.signal(Signal::Stop);
    let mut waits = Vec::new();
    for _ in 0..100 {
        let asked = Instant::now();
        waits.push((ping(&redis).await.unwrap_err(), asked.elapsed()));
    }
    let late: Vec<Duration> = waits.iter().filter(|(why, _)| *why == Unanswered::Late).map(|(_, wait)| *wait).collect();
    let after: Duration = waits.iter().filter(|(why, _)| *why == Unanswered::Away).map(|(_, wait)| *wait).sum();
    println!("frozen: late {late:?}, the other {} together {after:?}", waits.len() - late.len());
    // One of the three may have been the sign of life that is asked for every second.
    assert!((2..=3).contains(&late.len()), "after three late answers nobody asks any more: {late:?}");
    assert_eq!(waits.len(), 100);
    assert!(late.iter().all(|wait| *wait >= BUDGET && *wait < BUDGET + BUSY), "{late:?}");
    assert!(after < BUSY, "calls that ask nobody took {after:?}");

    server.signal(Signal::Continue);
    soon(redis.up(), "redis to be asked again").await;
    answers(&redis).await;
}

#[tokio::test]
async fn a_hundred_who_ask_a_frozen_redis_at_once_wait_one_budget_together() {
    let Some(server) = services::redis().await.or_skip("a_hundred_who_ask_a_frozen_redis_at_once") else { return };
    let redis = connected(&server).await;
    server.signal(Signal::Stop);
    let asked = Instant::now();
    let answers = join_all((0..100).map(|_| ping(&redis))).await;
    let wait = asked.elapsed();
    println!("frozen: 100 at once waited {wait:?}");
    assert!(answers.iter().all(Result::is_err));
    assert!(wait < BUDGET + BUSY, "{wait:?}");
    assert_eq!(ping(&redis).await, Err(Unanswered::Away));
    server.signal(Signal::Continue);
}

#[tokio::test]
async fn a_redis_that_dies_is_not_waited_for_and_is_used_again_when_it_is_back() {
    let Some(mut server) = services::redis().await.or_skip("a_redis_that_dies_is_not_waited_for") else { return };
    let (redis, addr) = (connected(&server).await, server.addr());
    server.signal(Signal::Kill);
    server.exited().await;
    let refused = async { while ping(&redis).await != Err(Unanswered::Away) {} };
    soon(refused, "the broken connection to be noticed").await;
    let _again = services::redis_at(addr).await.unwrap().unwrap();
    let back = Instant::now();
    soon(redis.up(), "redis to be asked again").await;
    println!("killed: asked again {:?} after it was back", back.elapsed());
    answers(&redis).await;
}

#[tokio::test]
async fn a_redis_that_is_not_there_at_first_is_used_once_it_is() {
    let addr = services::free_addr();
    let redis = Redis::connect(&format!("redis://{addr}"), BUDGET).unwrap();
    assert_eq!(ping(&redis).await, Err(Unanswered::Away));
    let Some(server) = services::redis_at(addr).await.or_skip("a_redis_that_is_not_there_at_first") else { return };
    let _server = server.unwrap();
    soon(redis.up(), "redis to be asked").await;
    answers(&redis).await;
}

#[tokio::test]
async fn a_redis_that_is_loading_counts_as_away_until_it_has_loaded() {
    let Some(mut first) = services::redis().await.or_skip("a_redis_that_is_loading_counts_as_away") else { return };
    let (redis, addr) = (connected(&first).await, first.addr());
    let mut keys = pipe();
    for number in 0..1000 {
        keys.set(format!("key:{number}"), "v".repeat(64)).ignore();
    }
    let patient = redis.within(PATIENT);
    patient.ask_all::<()>(&keys).await.unwrap();
    patient.ask::<()>(&cmd("SAVE")).await.unwrap();
    let dump = std::fs::read(first.folder().join("dump.rdb")).unwrap();
    first.signal(Signal::Kill);
    first.exited().await;

    let second = services::redis_loading(addr, &dump, Duration::from_millis(2)).await.unwrap().unwrap();
    let other = Redis::connect(&format!("redis://{addr}"), BUDGET).unwrap();
    let loading = raw_ping(addr).await;
    assert!(loading.starts_with("-LOADING"), "the server is loading: {loading}");
    for redis in [&redis, &other] {
        let asked = Instant::now();
        assert!(ping(redis).await.is_err());
        assert!(asked.elapsed() < BUDGET + BUSY);
        assert!(!redis.is_up());
    }
    soon(other.up(), "redis to have loaded").await;
    soon(redis.up(), "redis to have loaded").await;
    assert!(second.output().contains("DB loaded from disk"), "{}", second.output());
    assert_eq!(redis.within(PATIENT).ask::<usize>(&cmd("DBSIZE")).await, Ok(1000));
}

/// What a server says to a PING, without any client of ours.
async fn raw_ping(addr: std::net::SocketAddr) -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut socket = tokio::net::TcpStream::connect(addr).await.unwrap();
    socket.write_all(b"PING\r\n").await.unwrap();
    let mut answer = [0; 64];
    let read = soon(socket.read(&mut answer), "an answer from redis").await.unwrap();
    String::from_utf8_lossy(&answer[..read]).into_owned()
}

#[tokio::test]
async fn an_answer_that_is_an_error_is_no_reason_to_give_redis_up() {
    let Some(server) = services::redis().await.or_skip("an_answer_that_is_an_error") else { return };
    let redis = connected_within(&server, PATIENT).await;
    for _ in 0..10 {
        assert_eq!(redis.ask::<()>(&cmd("NO-SUCH-COMMAND-canary-7f3a")).await, Err(Unanswered::Refused("ERR".into())));
        assert!(matches!(redis.ask::<u64>(&cmd("PING")).await, Err(Unanswered::Refused(_))));
    }
    answers(&redis).await;
}

#[tokio::test]
async fn a_number_is_used_once_by_all_who_share_a_redis_and_it_is_forgotten_in_time() {
    let Some(server) = services::redis().await.or_skip("a_number_is_used_once_by_all") else { return };
    let redis = connected_within(&server, PATIENT).await;
    let (here, there) = (Used::new(redis.clone()), Used::new(connected_within(&server, PATIENT).await));
    let jti = Jti::fresh().unwrap();
    assert_eq!(here.spend(jti).await, Use::First);
    assert_eq!(there.spend(jti).await, Use::Again);
    assert_eq!(here.spend(jti).await, Use::Again);
    assert_eq!(there.spend(Jti::fresh().unwrap()).await, Use::First);
    let left: u64 = redis.ask(cmd("PTTL").arg(format!("vj:{jti}"))).await.unwrap();
    assert!((60_000..=70_000).contains(&left), "{left}");
    server.signal(Signal::Stop);
    assert_eq!(Used::new(redis.within(BUDGET)).spend(Jti::fresh().unwrap()).await, Use::Unknown);
}

#[tokio::test]
async fn a_password_is_never_shown() {
    let redis = Redis::connect("redis://user:canary-7f3a@127.0.0.1:1/0", BUDGET).unwrap();
    assert!(!format!("{redis:?}").contains("canary"), "{redis:?}");
    let unusable = Redis::connect("redis-canary-7f3a", BUDGET).unwrap_err();
    assert!(!format!("{unusable} {unusable:?}").contains("canary"));
}

#[tokio::test]
async fn redis_over_tls_is_believed_by_its_certificate_and_believes_us_by_our_password() {
    let test = "redis_over_tls_is_believed_by_its_certificate";
    let made = || rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let (own, other) = (made(), made());
    let Some(server) = services::redis_tls(&own.cert.pem(), &own.signing_key.serialize_pem(), "s3cret#/").await.or_skip(test) else {
        return;
    };
    // What has a meaning in URLs is written by its number.
    let url = |password: &str| format!("rediss://headgate:{password}@localhost:{}", server.addr().port());
    let trusting = |url: &str, ca: &str| Redis::connect_trusting(url, ca.as_bytes(), PATIENT).unwrap();
    let redis = trusting(&url("s3cret%23%2F"), &own.cert.pem());
    soon(redis.up(), "redis over TLS").await;
    answers(&redis).await;
    // Its messages come the same way.
    let mut changes = redis.listen("changes").await.unwrap();
    redis.ask::<()>(cmd("PUBLISH").arg("changes").arg("x")).await.unwrap();
    soon(futures_util::StreamExt::next(&mut changes), "a message over TLS").await.unwrap();

    let wrong = [
        ("another authority", trusting(&url("s3cret%23%2F"), &other.cert.pem())),
        ("the machine's own authorities", Redis::connect(&url("s3cret%23%2F"), BUDGET).unwrap()),
        ("another name", trusting(&url("s3cret%23%2F").replace("localhost", "127.0.0.1"), &own.cert.pem())),
        ("another password", trusting(&url("wrong"), &own.cert.pem())),
    ];
    for _ in 0..5 {
        // Each of these takes as long as a try of the others, and comes after it.
        soon(trusting(&url("s3cret%23%2F"), &own.cert.pem()).up(), "redis over TLS").await;
    }
    for (what, redis) in wrong {
        assert_eq!(ping(&redis).await, Err(Unanswered::Away), "{what}");
    }
    for ca in ["", "no PEM", &own.signing_key.serialize_pem()] {
        assert_eq!(Redis::connect_trusting(&url("x"), ca.as_bytes(), BUDGET).unwrap_err(), Unusable::Certificates, "{ca}");
    }
    assert_eq!(Redis::connect_trusting("redis://localhost", own.cert.pem().as_bytes(), BUDGET).unwrap_err(), Unusable::Certificates);
}
