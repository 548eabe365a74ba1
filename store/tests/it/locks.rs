//! Locks are one owner's for a time, wherever they are kept, and modes say what they say.

use std::time::Duration;

use headgate_store::{Acquired, Fenced, Locks, ModeNow, Modes, Renewed, cmd};
use headgate_testkit::{
    services::{self, OrSkip, Signal},
    soon,
};

use crate::connected;

const LONG: Duration = Duration::from_secs(60);
const SHORT: Duration = Duration::from_millis(200);

async fn gone(locks: &Locks, tenant: &str) {
    let gone = async { while locks.read(tenant).await.unwrap().is_some() {} };
    soon(gone, "a lock to run out").await;
}

#[tokio::test]
async fn a_lock_has_one_owner_for_a_time_and_its_end_is_told_once() {
    let Some(server) = services::redis().await.or_skip("a_lock_has_one_owner_for_a_time") else { return };
    let redis = connected(&server).await;
    for locks in [Locks::shared(&redis), Locks::here()] {
        assert_eq!(locks.acquire("acme", "ann", "s1", 7, LONG).await.unwrap(), Acquired::Ours(None));
        let Acquired::Taken(held) = locks.acquire("acme", "bob", "s2", 8, LONG).await.unwrap() else { panic!("it is ann's") };
        assert_eq!((held.owner.as_str(), held.session.as_str(), held.since, held.fence), ("ann", "s1", 7, None));
        assert!(!held.left.is_zero() && held.left <= LONG);
        assert!(matches!(locks.acquire("other", "bob", "s3", 8, LONG).await.unwrap(), Acquired::Ours(None)), "of another tenant");
        assert_eq!(locks.fence("acme", "s2", 5, LONG).await.unwrap(), Fenced::Lost);
        assert_eq!(locks.renew("acme", "s1", 5, LONG).await.unwrap(), Renewed::Lost, "it is not held without a fence");
        assert_eq!(locks.fence("acme", "s1", 5, LONG).await.unwrap(), Fenced::Held);
        assert_eq!(locks.renew("acme", "s1", 5, SHORT).await.unwrap(), Renewed::Held);
        gone(&locks, "acme").await;
        // It ran out without a word.
        assert_eq!(locks.renew("acme", "s1", 5, LONG).await.unwrap(), Renewed::Lost);
        let last = locks.expired("acme").await.unwrap().unwrap();
        assert_eq!((last.owner.as_str(), last.fence), ("ann", Some(5)));
        assert_eq!(locks.expired("acme").await.unwrap(), None, "it is told once");
        // Whoever comes next is told, where nobody was.
        assert_eq!(locks.acquire("acme", "ann", "s4", 9, SHORT).await.unwrap(), Acquired::Ours(None));
        assert_eq!(locks.fence("acme", "s4", 6, SHORT).await.unwrap(), Fenced::Held);
        gone(&locks, "acme").await;
        let Acquired::Ours(Some(last)) = locks.acquire("acme", "bob", "s5", 10, LONG).await.unwrap() else { panic!("it was ann's") };
        assert_eq!((last.owner.as_str(), last.session.as_str(), last.fence), ("ann", "s4", Some(6)));
        assert!(!locks.release("acme", "s4").await.unwrap(), "it is bob's");
        assert!(locks.release("acme", "s5").await.unwrap());
        assert_eq!(locks.expired("acme").await.unwrap(), None, "it was given back");
        let (held, _) = locks.all().await.unwrap();
        assert_eq!(held.keys().collect::<Vec<_>>(), ["other"]);
    }
    let locks = Locks::shared(&redis);
    assert!(matches!(locks.acquire("acme", "bob", "s6", 10, LONG).await.unwrap(), Acquired::Ours(None)));
    assert_eq!(locks.fence("acme", "s6", 6, LONG).await.unwrap(), Fenced::Low, "no fence is given twice");
    assert_eq!(locks.fence("acme", "s6", 7, LONG).await.unwrap(), Fenced::Held);
    assert!(locks.release("acme", "s6").await.unwrap());
    assert_eq!(locks.renew("acme", "s6", 7, LONG).await.unwrap(), Renewed::GivenBack);
    let ttl: i64 = redis.ask(cmd("PTTL").arg("training:{other}:lock")).await.unwrap();
    assert!(ttl > 0, "a lock that nobody renews is over");
}

#[tokio::test]
async fn a_mode_is_unknown_while_its_lock_may_be_held_and_nobody_can_say() {
    let Some(server) = services::redis().await.or_skip("a_mode_is_unknown_while_its_lock_may_be_held") else { return };
    let redis = connected(&server).await;
    let locks = Locks::shared(&redis);
    let modes = Modes::new(locks.clone());
    let ttl = Duration::from_secs(5);
    locks.acquire("acme", "ann", "s1", 7, ttl).await.unwrap();
    modes.look().await.unwrap();
    assert_eq!(modes.of("acme"), ModeNow::Enforce, "a lock without a fence is not held");
    locks.fence("acme", "s1", 5, ttl).await.unwrap();
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
