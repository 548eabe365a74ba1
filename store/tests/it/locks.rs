//! Locks are one owner's for a time, wherever they are kept, and modes say what they say.

use std::time::Duration;

use headgate_store::{Acquired, Fenced, Locks, ModeNow, Modes, Redis, Renewed, cmd};
use headgate_testkit::{
    services::{self, OrSkip, Signal},
    soon,
};

use crate::{BUDGET, PATIENT, connected_within};

const LONG: Duration = Duration::from_secs(60);
const SHORT: Duration = Duration::from_secs(1);
/// The longest that one owner has a lock.
const HOURS: Duration = Duration::from_secs(4 * 3600);

async fn gone(locks: &Locks, tenant: &str) {
    let gone = async { while locks.read(tenant).await.unwrap().is_some() {} };
    soon(gone, "a lock to run out").await;
}

#[tokio::test]
async fn a_lock_has_one_owner_for_a_time_and_its_end_is_told_once() {
    let Some(server) = services::redis().await.or_skip("a_lock_has_one_owner_for_a_time") else { return };
    let redis = connected_within(&server, PATIENT).await;
    for locks in [Locks::shared(&redis), Locks::here()] {
        assert_eq!(locks.acquire("acme", "ann", "s1", 7, LONG, HOURS).await.unwrap(), Acquired::Ours(None));
        let Acquired::Taken(held) = locks.acquire("acme", "bob", "s2", 8, LONG, HOURS).await.unwrap() else { panic!("it is ann's") };
        assert_eq!((held.owner.as_str(), held.session.as_str(), held.since, held.fence), ("ann", "s1", 7, None));
        assert!(!held.left.is_zero() && held.left <= LONG);
        assert!(matches!(locks.acquire("other", "bob", "s3", 8, LONG, HOURS).await.unwrap(), Acquired::Ours(None)), "of another tenant");
        assert_eq!(locks.fence("acme", "s2", 5, 10, LONG).await.unwrap(), Fenced::Lost);
        assert_eq!(locks.renew("acme", "s1", 5, 10, LONG, HOURS).await.unwrap(), Renewed::Lost, "it is not held without a fence");
        assert_eq!(locks.fence("acme", "s1", 5, 10, LONG).await.unwrap(), Fenced::Held);
        assert_eq!(locks.renew("acme", "s1", 5, 10, SHORT, HOURS).await.unwrap(), Renewed::Held(7 + 14_400));
        gone(&locks, "acme").await;
        // It ran out without a word.
        assert_eq!(locks.renew("acme", "s1", 5, 10, LONG, HOURS).await.unwrap(), Renewed::Lost);
        let last = locks.expired("acme").await.unwrap().unwrap();
        assert_eq!((last.owner.as_str(), last.fence), ("ann", Some(5)));
        assert_eq!(locks.expired("acme").await.unwrap(), None, "it is told once");
        // Whoever comes next is told, where nobody was.
        assert_eq!(locks.acquire("acme", "ann", "s4", 9, SHORT, HOURS).await.unwrap(), Acquired::Ours(None));
        assert_eq!(locks.fence("acme", "s4", 6, 10, SHORT).await.unwrap(), Fenced::Held);
        gone(&locks, "acme").await;
        let Acquired::Ours(Some(last)) = locks.acquire("acme", "bob", "s5", 10, LONG, HOURS).await.unwrap() else { panic!("it was ann's") };
        assert_eq!((last.owner.as_str(), last.session.as_str(), last.fence), ("ann", "s4", Some(6)));
        assert!(!locks.release("acme", "s4").await.unwrap(), "it is bob's");
        assert!(locks.release("acme", "s5").await.unwrap());
        assert_eq!(locks.expired("acme").await.unwrap(), None, "it was given back");
        let (held, _) = locks.all().await.unwrap();
        assert_eq!(held.keys().collect::<Vec<_>>(), ["other"]);
    }
    let locks = Locks::shared(&redis);
    assert!(matches!(locks.acquire("acme", "bob", "s6", 10, LONG, HOURS).await.unwrap(), Acquired::Ours(None)));
    assert_eq!(locks.fence("acme", "s6", 6, 10, LONG).await.unwrap(), Fenced::Low, "no fence is given twice");
    assert_eq!(locks.fence("acme", "s6", 7, 10, LONG).await.unwrap(), Fenced::Held);
    assert!(locks.release("acme", "s6").await.unwrap());
    assert_eq!(locks.renew("acme", "s6", 7, 10, LONG, HOURS).await.unwrap(), Renewed::GivenBack);
    let ttl: i64 = redis.ask(cmd("PTTL").arg("training:{other}:lock")).await.unwrap();
    assert!(ttl > 0, "a lock that nobody renews is over");
}

#[tokio::test]
async fn one_owner_has_a_lock_for_so_long_and_no_longer_unless_another_approves() {
    let Some(server) = services::redis().await.or_skip("one_owner_has_a_lock_for_so_long") else { return };
    let redis = connected_within(&server, PATIENT).await;
    let (ttl, longest) = (Duration::from_secs(60), Duration::from_secs(1000));
    for locks in [Locks::shared(&redis), Locks::here()] {
        let acquire = async |owner: &str, session: &str, now: u64| locks.acquire("acme", owner, session, now, ttl, longest).await.unwrap();
        let renew = async |session: &str, fence: u64, now: u64| locks.renew("acme", session, fence, now, ttl, longest).await.unwrap();
        // To ten seconds, which are more than the asking takes.
        let left = async || locks.read("acme").await.unwrap().map(|held| held.left.as_secs().div_ceil(10) * 10);
        assert_eq!(acquire("ann", "s1", 100).await, Acquired::Ours(None));
        assert_eq!(locks.fence("acme", "s1", 1, 100, ttl).await.unwrap(), Fenced::Held);
        assert_eq!((renew("s1", 1, 1000).await, left().await), (Renewed::Held(1100), Some(60)));
        assert_eq!((renew("s1", 1, 1080).await, left().await), (Renewed::Held(1100), Some(20)), "not beyond its end");
        assert!(locks.release("acme", "s1").await.unwrap());

        // Whoever gives it back and takes it again has no more time than before.
        let Acquired::Spent(wait) = acquire("ann", "s2", 1041).await else { panic!("it would be over before it could be renewed") };
        assert!(wait > longest && wait <= longest + 2 * ttl, "{wait:?}");
        assert_eq!(acquire("ann", "s2", 1040).await, Acquired::Ours(None));
        assert_eq!(locks.fence("acme", "s2", 2, 1040, ttl).await.unwrap(), Fenced::Held);
        assert_eq!(renew("s2", 2, 1041).await, Renewed::Held(1100));
        assert!(!locks.approve("acme", "s1", "bob", 1050, longest).await.unwrap(), "that taking is over");
        assert!(locks.approve("acme", "s2", "bob", 1050, longest).await.unwrap());
        assert_eq!((renew("s2", 2, 1090).await, left().await), (Renewed::Held(2050), Some(60)));
        let held = locks.read("acme").await.unwrap().unwrap();
        assert_eq!((held.owner.as_str(), held.approved.as_deref(), held.since, held.until), ("ann", Some("bob"), 1040, 2050));
        assert_eq!((renew("s2", 2, 2050).await, left().await), (Renewed::Held(2050), None), "it is over");
        assert_eq!(locks.expired("acme").await.unwrap().unwrap().approved.as_deref(), Some("bob"));

        // Another may take it, and then the first again.
        assert!(matches!(acquire("ann", "s3", 2051).await, Acquired::Spent(_)));
        assert_eq!(acquire("bob", "s4", 2052).await, Acquired::Ours(None));
        assert!(locks.release("acme", "s4").await.unwrap());
        assert_eq!(acquire("ann", "s5", 2053).await, Acquired::Ours(None));
        assert_eq!(locks.read("acme").await.unwrap().unwrap().until, 3053);
        assert_eq!(locks.fence("acme", "s5", 5, 3043, ttl).await.unwrap(), Fenced::Held);
        assert_eq!(left().await, Some(10), "a fence that comes late gains no time");
    }
    // What is remembered of an owner is forgotten in time.
    let ttl: i64 = redis.ask(cmd("PTTL").arg("training:{acme}:stay")).await.unwrap();
    assert!((1_000_000..=1_120_000).contains(&ttl), "{ttl}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_approves_of_a_lock_at_its_very_end_moves_that_end_or_is_told_that_it_is_over() {
    let Some(server) = services::redis().await.or_skip("whoever_approves_of_a_lock_at_its_very_end") else { return };
    let redis = connected_within(&server, PATIENT).await;
    for locks in [Locks::shared(&redis), Locks::here()] {
        let (mut moved, mut over) = (0, 0);
        for round in 0..200 {
            let (tenant, now) = (format!("t{round}"), 1000);
            let Acquired::Ours(None) = locks.acquire(&tenant, "ann", "s1", now, LONG, HOURS).await.unwrap() else { panic!("it is free") };
            assert_eq!(locks.fence(&tenant, "s1", 1, now, LONG).await.unwrap(), Fenced::Held);
            let until = now + HOURS.as_secs();
            let late = until - 1;
            let (approving, closing) = (locks.clone(), locks.clone());
            let (of, to) = (tenant.clone(), tenant.clone());
            // Now the one comes first and now the other.
            let approved = tokio::spawn(async move { approving.approve(&of, "s1", "bob", late, HOURS).await.unwrap() });
            let closed = tokio::spawn(async move { closing.close(&to, "s1", until).await.unwrap() });
            let (approved, closed) = (approved.await.unwrap(), closed.await.unwrap());
            assert_ne!(approved, closed, "in round {round}");
            let Renewed::Held(end) = locks.renew(&tenant, "s1", 1, late, LONG, HOURS).await.unwrap() else { panic!("it is ann's") };
            assert_eq!(end, if approved { late + HOURS.as_secs() } else { until });
            assert!(closed || locks.close(&tenant, "s1", end).await.unwrap());
            assert!(!locks.approve(&tenant, "s1", "bob", late, HOURS).await.unwrap(), "its end is final");
            *if approved { &mut moved } else { &mut over } += 1;
        }
        assert!(moved + over == 200 && moved > 0, "{moved} moved, {over} over");
        assert!(locks.close("t1", "s2", 7).await.unwrap(), "a lock that is not ours needs no end");
    }
}

#[tokio::test]
async fn a_mode_is_unknown_while_its_lock_may_be_held_and_nobody_can_say() {
    let Some(server) = services::redis().await.or_skip("a_mode_is_unknown_while_its_lock_may_be_held") else { return };
    let redis = connected_within(&server, PATIENT).await;
    let locks = Locks::shared(&redis);
    let modes = Modes::new(locks.clone());
    let ttl = Duration::from_secs(5);
    locks.acquire("acme", "ann", "s1", 7, ttl, HOURS).await.unwrap();
    modes.look().await.unwrap();
    assert_eq!(modes.of("acme"), ModeNow::Enforce, "a lock without a fence is not held");
    locks.fence("acme", "s1", 5, 10, ttl).await.unwrap();
    modes.look().await.unwrap();
    assert_eq!((modes.of("acme"), modes.of("other")), (ModeNow::Training(5), ModeNow::Enforce));
    assert!(modes.holds("acme", 5).await.unwrap() && !modes.holds("acme", 4).await.unwrap());
    server.signal(Signal::Kill);
    let says = async |wanted: ModeNow| {
        let said = async {
            while modes.of("acme") != wanted {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        soon(said, &format!("{wanted:?}")).await;
    };
    says(ModeNow::Unknown).await;
    assert!(modes.look().await.is_err() && modes.holds("acme", 5).await.is_err());
    assert_eq!(modes.of("other"), ModeNow::Enforce, "who was not training is not kept waiting");
    says(ModeNow::Enforce).await;
}

#[tokio::test]
async fn a_gateway_that_began_without_redis_signs_as_always_says_so_and_catches_up() {
    let addr = services::free_addr();
    let modes = Modes::new(Locks::shared(&Redis::connect(&format!("redis://{addr}"), BUDGET).unwrap()));
    let following = tokio::spawn({
        let modes = modes.clone();
        async move { modes.follow().await }
    });
    let mut registry = prometheus_client::registry::Registry::default();
    modes.register(&mut registry);
    let unknown = || {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        text.contains("training_mode_unknown 1\n")
    };
    assert!(unknown() && modes.of("acme") == ModeNow::Enforce);
    let Some(server) = services::redis_at(addr).await.or_skip("a_gateway_that_began_without_redis") else { return };
    let server = server.unwrap();
    let locks = Locks::shared(&connected_within(&server, PATIENT).await);
    locks.acquire("acme", "ann", "s1", 7, LONG, HOURS).await.unwrap();
    locks.fence("acme", "s1", 5, 7, LONG).await.unwrap();
    let caught_up = async {
        while modes.of("acme") != ModeNow::Training(5) || unknown() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    soon(caught_up, "the lock to be seen").await;
    // Nobody knows any more.
    server.signal(Signal::Stop);
    let noticed = async {
        while modes.of("acme") != ModeNow::Unknown || !unknown() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    soon(noticed, "the silence of Redis").await;
    following.abort();
}
