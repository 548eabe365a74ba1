//! Several orchestrators share a Redis: a verdict counts once among them, a policy is in force for all of them, and none waits.
#![expect(clippy::print_stdout, reason = "figures, for those who ask with --nocapture")]

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use headgate_orchestrator::{Models, events};
use headgate_policy::{ANY_TENANT, Digest, Entry, Registry, Ring, Standing};
use headgate_store::{Followed, Redis, Store, Used, cmd};
use headgate_testkit::{
    AT_ONCE,
    client::{self, Request},
    dialect::{Answer, Cut},
    services::{self, OrSkip, Service, Signal},
    soon,
    upstream::{Script, Upstream},
};

use crate::desk::{Desk, now, upstream};

const BUDGET: Duration = Duration::from_millis(20);
/// What a machine busy with other things may add to a wait.
const BUSY: Duration = AT_ONCE;

async fn model() -> Upstream {
    Upstream::always(Script::stream(Answer::openai("demo-8", &["Hello"]).cut(Cut::Events))).await
}

fn models(model: &Upstream) -> Models {
    Models::new(upstream(&model.url()))
}

async fn connected(server: &Service) -> Redis {
    let redis = Redis::connect(&format!("redis://{}", server.addr()), BUDGET).unwrap();
    soon(redis.up(), "redis").await;
    redis
}

/// Two orchestrators that believe the gateway of the first.
async fn two(model: &Upstream, one: &Redis, other: &Redis) -> [Desk; 2] {
    let desks = [
        Desk::sharing(models(model), Some(Used::new(one.clone())), None, None).await,
        Desk::sharing(models(model), Some(Used::new(other.clone())), None, None).await,
    ];
    desks[1].orchestrator.trust(desks[0].ring.verifier());
    desks
}

async fn code(desk: &Desk, request: &Request) -> String {
    let reply = client::ask(desk.addr, request).await.unwrap();
    if reply.status == 200 { "accepted".to_owned() } else { reply.problem().unwrap() }
}

#[tokio::test]
async fn of_two_orchestrators_that_share_a_redis_one_takes_a_verdict() {
    let Some(server) = services::redis().await.or_skip("of_two_orchestrators_that_share_a_redis") else { return };
    let model = model().await;
    // No hurry: who is asked, and not how fast, is what counts here.
    let patient = Duration::from_secs(10);
    let (one, other) = (connected(&server).await.within(patient), connected(&server).await.within(patient));
    let desks = two(&model, &one, &other).await;
    for turn in 0..20 {
        let request = desks[0].turn(&format!("s{turn}"), "hello").step().request();
        let mut codes = [desks[0].addr, desks[1].addr].map(|addr| (addr, request.clone()));
        codes.rotate_left(turn % 2);
        let [first, second] = codes.map(|(addr, request)| tokio::spawn(async move { client::ask(addr, &request).await.unwrap() }));
        let (first, second) = (first.await.unwrap(), second.await.unwrap());
        let mut statuses = [first.status, second.status];
        statuses.sort_unstable();
        assert_eq!(statuses, [200, 401], "turn {turn}");
        let refused = if first.status == 401 { first } else { second };
        assert_eq!(refused.problem().as_deref(), Ok("verdict_replayed"));
    }
    assert_eq!(desks[0].decided("step", "accepted") + desks[1].decided("step", "accepted"), 20);
    assert_eq!(desks[0].decided("step", "replayed") + desks[1].decided("step", "replayed"), 20);
}

/// What a hundred dispatches, one after the other, took each.
async fn hundred(desk: &Desk, session: &str) -> Vec<Duration> {
    let mut took = Vec::new();
    for turn in 0..100 {
        let request = desk.turn(&format!("{session}-{turn}"), "hello").step().request();
        let begun = Instant::now();
        assert_eq!(code(desk, &request).await, "accepted");
        took.push(begun.elapsed());
    }
    took
}

/// How many answers of this Redis did not come in time, so far.
fn late(redis: &Redis) -> impl Fn() -> u64 + use<> {
    let mut registry = prometheus_client::registry::Registry::default();
    redis.register(&mut registry);
    move || {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        let late = text.lines().find_map(|line| line.strip_prefix("headgate_redis_timeouts_total "));
        late.expect("a counter").parse().expect("a number")
    }
}

fn middle(mut took: Vec<Duration>) -> Duration {
    took.sort_unstable();
    took[took.len() / 2]
}

#[tokio::test]
async fn a_frozen_redis_adds_three_budgets_to_a_hundred_dispatches_and_refuses_none() {
    let Some(server) = services::redis().await.or_skip("a_frozen_redis_adds_three_budgets") else { return };
    let model = model().await;
    let redis = connected(&server).await;
    let late = late(&redis);
    let desk = Desk::sharing(models(&model), Some(Used::new(redis.clone())), None, None).await;
    let before = middle(hundred(&desk, "well").await);
    let alone = desk.metric("orchestrator_verdicts_unshared_total");
    // Whatever was late on a busy machine, nothing is in a row with what comes.
    soon(redis.up(), "redis").await;
    redis.within(AT_ONCE).ask::<()>(&cmd("PING")).await.unwrap();
    let late_before = late();
    server.signal(Signal::Stop);
    let frozen = hundred(&desk, "frozen").await;
    println!("before {before:?}, the first four {:?}, the others {:?}", &frozen[..4], middle(frozen[4..].to_vec()));
    assert_eq!(desk.metric("orchestrator_verdicts_unshared_total") - alone, 100);
    assert!(frozen[..2].iter().all(|took| *took >= BUDGET && *took < BUDGET + BUSY), "{:?}", &frozen[..2]);
    // Three in a row; the connection's own sign of life may be one of them, or be asked for beside the third.
    assert!((3..=4).contains(&(late() - late_before)), "{} answers were waited for", late() - late_before);
    // What this process has taken it does not take again, Redis or no Redis.
    let request = desk.turn("again", "hello").step().request();
    assert_eq!(code(&desk, &request).await, "accepted");
    assert_eq!(code(&desk, &request).await, "verdict_replayed");
    server.signal(Signal::Continue);
    soon(redis.up(), "redis to be asked again").await;
}

#[tokio::test]
async fn a_redis_that_is_killed_or_loading_refuses_no_dispatch_and_guards_again_when_it_is_back() {
    let Some(mut first) = services::redis().await.or_skip("a_redis_that_is_killed_or_loading") else { return };
    let (model, addr) = (model().await, first.addr());
    let patient = Duration::from_secs(10);
    let (one, other) = (connected(&first).await.within(patient), connected(&first).await.within(patient));
    let desks = two(&model, &one, &other).await;
    for number in 0..500 {
        one.ask::<()>(cmd("SET").arg(format!("key:{number}")).arg("v".repeat(64))).await.unwrap();
    }
    one.ask::<()>(&cmd("SAVE")).await.unwrap();
    let dump = std::fs::read(first.folder().join("dump.rdb")).unwrap();
    first.signal(Signal::Kill);
    first.exited().await;
    let (late, late_before) = (late(&one), late(&one)());
    let killed = hundred(&desks[0], "killed").await;
    assert!(late() - late_before <= 3, "{} answers of a Redis that is gone were waited for", late() - late_before);

    let _second = services::redis_loading(addr, &dump, Duration::from_millis(4)).await.unwrap().unwrap();
    let loading = hundred(&desks[0], "loading").await;
    println!("killed: middle {:?}; loading: middle {:?}", middle(killed), middle(loading));
    soon(one.up(), "redis to have loaded").await;
    soon(other.up(), "redis to have loaded").await;
    let request = desks[0].turn("back", "hello").step().request();
    assert_eq!(code(&desks[0], &request).await, "accepted");
    assert_eq!(code(&desks[1], &request).await, "verdict_replayed");
}

#[tokio::test]
async fn without_redis_a_turn_that_the_event_log_knows_is_not_taken_again_after_a_restart() {
    let (model, folder) = (model().await, tempfile::tempdir().unwrap());
    let nobody = Redis::connect(&format!("redis://{}", services::free_addr()), BUDGET).unwrap();
    let keeping = |folder: &Path| {
        let settings = events::Settings { folder: folder.to_owned(), cap: events::Settings::LEAST_CAP, turns: 16, topic: None, keys: None };
        events::Log::open(&settings).unwrap().0
    };
    let mut first = Desk::sharing(models(&model), Some(Used::new(nobody.clone())), None, Some(keeping(folder.path()))).await;
    let request = first.turn("s1", "hello").step().request();
    assert_eq!(code(&first, &request).await, "accepted");
    soon(first.shut_down(), "the orchestrator to end").await.unwrap();
    let ring = std::mem::replace(&mut first.ring, Ring::generate(now()).unwrap());
    drop(first);
    let second = Desk::sharing(models(&model), Some(Used::new(nobody)), None, Some(keeping(folder.path()))).await;
    second.orchestrator.trust(ring.verifier());
    assert_eq!(code(&second, &request).await, "turn_conflict");
    assert_eq!(model.opened(), 1);
}

/// A registry over this Redis, followed for as long as the set lives.
fn followed(redis: &Redis, policy_key: &Ring, follows: &mut tokio::task::JoinSet<()>) -> Arc<Followed> {
    let registry = Arc::new(Followed::new(Store::redis(redis), policy_key.verifier(), now));
    let following = registry.clone();
    follows.spawn(async move { following.follow().await });
    registry
}

#[tokio::test]
async fn what_the_registry_in_redis_says_is_in_force_is_believed_and_nothing_else() {
    let addr = services::free_addr();
    let redis = Redis::connect(&format!("redis://{addr}"), BUDGET).unwrap();
    let (model, policy_key) = (model().await, Ring::generate(now()).unwrap());
    let mut follows = tokio::task::JoinSet::new();
    let registry = followed(&redis, &policy_key, &mut follows);
    let mut desk = Desk::sharing(models(&model), None, Some(registry.clone()), None).await;
    let says = async |ver: &str, con: Digest, wanted: Standing| {
        let said = async {
            while registry.check("acme", ver, con, now()) != Ok(wanted) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        soon(said, &format!("version {ver} to be {wanted:?}")).await;
    };
    assert_eq!(code(&desk, &desk.turn("s1", "hello").step().request()).await, "policy_registry_unavailable");
    assert_eq!(desk.orchestrator.ready(), Err("the policy registry cannot be reached\n"));

    let Some(server) = services::redis_at(addr).await.or_skip("what_the_registry_in_redis_says") else { return };
    let _server = server.unwrap();
    soon(redis.up(), "redis").await;
    let (store, con) = (Store::redis(&redis), desk.issuer.con);
    says("7", con, Standing::Unknown).await;
    assert_eq!(code(&desk, &desk.turn("s1", "hello").step().request()).await, "version_conflict");

    let seventh = Entry::first(ANY_TENANT, "7", con, now() - 1000);
    let token = policy_key.sign_entry(&seventh).unwrap();
    store.put(ANY_TENANT, &token, None).await.unwrap();
    says("7", con, Standing::Active).await;
    assert_eq!(code(&desk, &desk.turn("s1", "hello").step().request()).await, "accepted");

    // In force since a moment: what was signed under the previous one still counts.
    let (eighth, amended) = (seventh.succeeded_by("8", Digest::of(b"amended"), now()), Digest::of(b"amended"));
    let next = policy_key.sign_entry(&eighth).unwrap();
    store.put(ANY_TENANT, &next, Some(&token)).await.unwrap();
    says("8", amended, Standing::Active).await;
    assert_eq!(code(&desk, &desk.turn("s1", "hello").step().request()).await, "accepted");
    desk.issuer.pol.ver = "8".into();
    assert_eq!(code(&desk, &desk.turn("s1", "hello").step().request()).await, "version_conflict", "a version with another's hash");
    desk.issuer.con = amended;
    assert_eq!(code(&desk, &desk.turn("s1", "hello").step().request()).await, "accepted");

    // In force for longer than the previous one counts.
    let ninth = Entry {
        active: headgate_policy::Active { nbf: now() - 61, ..eighth.succeeded_by("9", con, 0).active },
        ..eighth.succeeded_by("9", con, 0)
    };
    store.put(ANY_TENANT, &policy_key.sign_entry(&ninth).unwrap(), Some(&next)).await.unwrap();
    says("9", con, Standing::Active).await;
    let late = desk.turn("s1", "hello").step().request();
    assert_eq!(code(&desk, &late).await, "version_conflict");
    assert_eq!(desk.orchestrator.ready(), Ok(()));
}
