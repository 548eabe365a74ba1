//! A registry that is followed: signed entries and no others, soon, and for a minute more once the store is gone.

use std::{sync::Arc, time::Duration};

use headgate_policy::{ANY_TENANT, Digest, Entry, Registry, Ring, Standing, Unavailable};
use headgate_store::{Followed, NotPut, Redis, Store, TRUSTED_FOR, cmd};
use headgate_testkit::{
    services::{self, OrSkip, Signal},
    soon,
};

use crate::{BUDGET, PATIENT, connected_within, now};

fn con(name: &str) -> Digest {
    Digest::of(name.as_bytes())
}

/// A followed registry, and what follows it; dropped, it stands still.
struct Reader {
    registry: Arc<Followed>,
    _follows: tokio::task::JoinSet<()>,
}

impl Reader {
    fn of(store: Store, policy_key: &Ring) -> Reader {
        let registry = Arc::new(Followed::new(store, policy_key.verifier(), now));
        let mut follows = tokio::task::JoinSet::new();
        let following = registry.clone();
        follows.spawn(async move { following.follow().await });
        Reader { registry, _follows: follows }
    }

    fn standing(&self, tenant: &str, ver: &str, con: Digest) -> Result<Standing, Unavailable> {
        self.registry.check(tenant, ver, con, now())
    }

    /// Resolves once it says so.
    async fn says(&self, tenant: &str, ver: &str, con: Digest, wanted: Result<Standing, Unavailable>) {
        let said = async {
            while self.standing(tenant, ver, con) != wanted {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        soon(said, &format!("{wanted:?} for {tenant} {ver}")).await;
    }
}

async fn stores(test: &str) -> Option<(services::Service, tempfile::TempDir, [Store; 2], Redis)> {
    let server = services::redis().await.or_skip(test)?;
    let redis = connected_within(&server, PATIENT).await;
    let folder = tempfile::tempdir().unwrap();
    let stores = [Store::redis(&redis), Store::Folder(folder.path().join("policies"))];
    Some((server, folder, stores, redis))
}

#[tokio::test]
async fn what_is_published_is_in_force_wherever_it_is_followed() {
    let Some((_server, _folder, stores, _)) = stores("what_is_published_is_in_force").await else { return };
    for store in stores {
        let policy_key = Ring::generate(now()).unwrap();
        let first = Entry::first(ANY_TENANT, "1", con("one"), now() - 100);
        let token = policy_key.sign_entry(&first).unwrap();
        store.put(ANY_TENANT, &token, None).await.unwrap();
        let readers = [Reader::of(store.clone(), &policy_key), Reader::of(store.clone(), &policy_key)];
        for reader in &readers {
            reader.says("acme", "1", con("one"), Ok(Standing::Active)).await;
        }
        let second = first.succeeded_by("2", con("two"), now());
        let next = policy_key.sign_entry(&second).unwrap();
        store.put(ANY_TENANT, &next, Some(&token)).await.unwrap();
        let own = Entry::first("Acme/x*", "9", con("nine"), now());
        store.put("Acme/x*", &policy_key.sign_entry(&own).unwrap(), None).await.unwrap();
        for reader in &readers {
            reader.says("other", "2", con("two"), Ok(Standing::Active)).await;
            reader.says("Acme/x*", "9", con("nine"), Ok(Standing::Active)).await;
            assert_eq!(reader.standing("other", "1", con("one")), Ok(Standing::Previous));
            assert_eq!(reader.registry.entries().unwrap().len(), 2);
        }
        assert_eq!(store.entry(ANY_TENANT).await.unwrap(), Some(next));
    }
}

#[tokio::test]
async fn of_two_who_publish_at_once_one_is_told_to_look_again() {
    let Some((_server, _folder, stores, _)) = stores("of_two_who_publish_at_once").await else { return };
    for store in stores {
        store.put("acme", "one", None).await.unwrap();
        assert!(matches!(store.put("acme", "two", None).await, Err(NotPut::Overtaken)));
        assert!(matches!(store.put("acme", "two", Some("other")).await, Err(NotPut::Overtaken)));
        assert_eq!(store.entry("acme").await.unwrap().as_deref(), Some("one"));
        store.put("acme", "two", Some("one")).await.unwrap();
        assert_eq!(store.entry("acme").await.unwrap().as_deref(), Some("two"));
    }
}

#[tokio::test]
async fn writing_to_redis_alone_installs_nothing() {
    let Some((_server, _folder, [store, _], redis)) = stores("writing_to_redis_alone_installs_nothing").await else { return };
    let (policy_key, writer) = (Ring::generate(now()).unwrap(), Ring::generate(now()).unwrap());
    let first = Entry::first(ANY_TENANT, "1", con("one"), now() - 1000);
    let second = first.succeeded_by("2", con("two"), now() - 500);
    let (older, token) = (policy_key.sign_entry(&first).unwrap(), policy_key.sign_entry(&second).unwrap());
    store.put(ANY_TENANT, &token, None).await.unwrap();
    let reader = Reader::of(store, &policy_key);
    reader.says("acme", "2", con("two"), Ok(Standing::Active)).await;

    let lax = second.succeeded_by("3", con("lax"), now() - 100);
    let unsigned = format!(r#"{{"tid":"*","seq":3,"active":{{"con":"{}","ver":"3","nbf":0}}}}"#, con("lax"));
    let foreign = writer.sign_entry(&lax).unwrap();
    let grafted = {
        let (head, _) = foreign.rsplit_once('.').unwrap();
        format!("{head}.{}", token.rsplit_once('.').unwrap().1)
    };
    let huge = "x".repeat(1 << 20);
    for raw in [unsigned.as_str(), &foreign, &grafted, &older, "", &huge] {
        redis.ask::<()>(cmd("SET").arg("policy:*").arg(raw)).await.unwrap();
        redis.ask::<()>(cmd("PUBLISH").arg("policies").arg("*")).await.unwrap();
        // What comes after it in the same store, signed, tells that it has been read.
        let seen = Entry::first("witness", &Digest::of(raw.as_bytes()).short().to_string(), con("w"), now());
        let seen = Entry { seq: witness(&redis).await, ..seen };
        redis.ask::<()>(cmd("SADD").arg("policies").arg("witness")).await.unwrap();
        redis.ask::<()>(cmd("SET").arg("policy:witness").arg(policy_key.sign_entry(&seen).unwrap())).await.unwrap();
        redis.ask::<()>(cmd("PUBLISH").arg("policies").arg("witness")).await.unwrap();
        reader.says("witness", &seen.active.ver, con("w"), Ok(Standing::Active)).await;
        assert_eq!(reader.standing("acme", "2", con("two")), Ok(Standing::Active), "{}", &raw[..raw.len().min(60)]);
        assert_eq!(reader.standing("acme", "3", con("lax")), Ok(Standing::Unknown));
        assert_eq!(reader.standing("acme", "1", con("one")), Ok(Standing::Unknown));
    }
    // Nor does taking away what is there.
    redis.ask::<()>(&cmd("FLUSHALL")).await.unwrap();
    redis.ask::<()>(cmd("PUBLISH").arg("policies").arg("*")).await.unwrap();
    assert_eq!(reader.standing("acme", "2", con("two")), Ok(Standing::Active));
}

async fn witness(redis: &Redis) -> u64 {
    redis.ask(cmd("INCR").arg("witnesses")).await.unwrap()
}

#[tokio::test]
async fn nothing_is_known_before_the_store_was_reached_once() {
    let addr = services::free_addr();
    let redis = Redis::connect(&format!("redis://{addr}"), BUDGET).unwrap();
    let policy_key = Ring::generate(now()).unwrap();
    let reader = Reader::of(Store::redis(&redis), &policy_key);
    assert_eq!(reader.standing("acme", "1", con("one")), Err(Unavailable));
    assert!(reader.registry.entries().is_err());
    let Some(server) = services::redis_at(addr).await.or_skip("nothing_is_known_before_the_store_was_reached") else { return };
    let _server = server.unwrap();
    // Reached, and empty: no policy is in force.
    reader.says("acme", "1", con("one"), Ok(Standing::Unknown)).await;
    let entry = policy_key.sign_entry(&Entry::first(ANY_TENANT, "1", con("one"), now())).unwrap();
    soon(redis.up(), "redis").await;
    Store::redis(&redis).put(ANY_TENANT, &entry, None).await.unwrap();
    reader.says("acme", "1", con("one"), Ok(Standing::Active)).await;
}

#[tokio::test]
async fn what_was_read_is_trusted_for_a_minute_once_the_store_is_gone() {
    let Some((mut server, _folder, [store, _], redis)) = stores("what_was_read_is_trusted_for_a_minute").await else { return };
    let policy_key = Ring::generate(now()).unwrap();
    let entry = policy_key.sign_entry(&Entry::first(ANY_TENANT, "1", con("one"), now())).unwrap();
    store.put(ANY_TENANT, &entry, None).await.unwrap();
    let reader = Reader::of(store, &policy_key);
    reader.says("acme", "1", con("one"), Ok(Standing::Active)).await;
    server.signal(Signal::Kill);
    server.exited().await;
    let gone = async {
        while redis.is_up() {
            tokio::time::sleep(Duration::from_millis(5)).await;
            let _ = redis.ask::<()>(&cmd("PING")).await;
        }
    };
    soon(gone, "redis to be gone").await;
    assert_eq!(reader.standing("acme", "1", con("one")), Ok(Standing::Active));
    // From here on nothing but time matters, and it is ours.
    tokio::time::pause();
    tokio::time::advance(TRUSTED_FOR / 2).await;
    assert_eq!(reader.standing("acme", "1", con("one")), Ok(Standing::Active));
    tokio::time::advance(TRUSTED_FOR).await;
    assert_eq!(reader.standing("acme", "1", con("one")), Err(Unavailable));
}

#[tokio::test]
async fn entries_of_a_new_policy_key_count_once_it_is_trusted() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::Folder(folder.path().to_owned());
    let (old, new) = (Ring::generate(now()).unwrap(), Ring::generate(now()).unwrap());
    let first = Entry::first(ANY_TENANT, "1", con("one"), now() - 100);
    let token = old.sign_entry(&first).unwrap();
    store.put(ANY_TENANT, &token, None).await.unwrap();
    let reader = Reader::of(store.clone(), &old);
    reader.says("acme", "1", con("one"), Ok(Standing::Active)).await;
    let second = new.sign_entry(&first.succeeded_by("2", con("two"), now())).unwrap();
    store.put(ANY_TENANT, &second, Some(&token)).await.unwrap();
    reader.registry.trust(new.verifier());
    reader.says("acme", "2", con("two"), Ok(Standing::Active)).await;
}
