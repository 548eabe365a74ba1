//! The log and a topic: a real Kafka where what counts is what it keeps, librdkafka's mock where it is what goes wrong.

use std::{
    collections::BTreeMap,
    path::Path,
    time::{Duration, Instant, SystemTime},
};

use headgate_contracts::{
    Finish, TurnId,
    wire::log::{Event, Kind, Progress},
};
use headgate_testkit::{
    kafka::{Kafka, Record},
    services::OrSkip,
    within,
};
use rdkafka::{
    mocking::MockCluster,
    types::{RDKafkaApiKey, RDKafkaRespErr},
};

#[cfg(feature = "kafka-tls")]
use {
    super::{Sasl, Tls},
    headgate_contracts::Secret,
    headgate_testkit::kafka::Guard,
};

use super::{
    super::{
        Account, Brokers, Failure, Follow, Log, Refused, Settings, Topic, Unfit, Unopened,
        tests::{accepted, of_session, verdict},
    },
    Message, Orphan, Producer, orphans, reap, verify_topic,
};

const MINUTE: Duration = Duration::from_secs(60);

/// Brokers that are killed, one after the other: each is a Java, and they would only get into each other's way.
static KILLED: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

fn at(brokers: &str) -> Brokers {
    Brokers::open(brokers.split(',').map(str::to_owned).collect())
}

fn topic(brokers: &str, name: &str) -> Topic {
    Topic { brokers: at(brokers), name: name.to_owned(), replication: 1, in_sync: 1, partitions: Some(3) }
}

fn settings(folder: &Path, topic: Topic) -> Settings {
    Settings { folder: folder.to_owned(), cap: Settings::LEAST_CAP, turns: 4096, topic: Some(topic), keys: None }
}

fn open(folder: &Path, topic: Topic) -> Log {
    Log::open(&settings(folder, topic)).unwrap().0
}

fn complete(account: Account) {
    account.close(&Ok(()), Finish::Stop, Progress::default());
}

/// A turn of the session, from its beginning to its end.
async fn whole_turn(log: &Log, session: usize) -> Result<(), Refused> {
    log.begin(of_session(TurnId::fresh(), &format!("s{session}"))).await.map(complete)
}

/// Waits until the topic has everything.
async fn delivered(log: &Log) {
    log.flush().await.unwrap();
    within(MINUTE, log.until_delivered(log.durable()), "the topic to have everything").await;
}

/// The ids of a log's events, by session, in order.
fn kept(folder: &Path) -> BTreeMap<String, Vec<String>> {
    let mut log = Follow::open(folder).unwrap();
    let mut ids: BTreeMap<String, Vec<String>> = BTreeMap::new();
    while let Some(entry) = log.next_entry().unwrap() {
        let event: serde_json::Value = serde_json::from_slice(&entry.event).unwrap();
        ids.entry(event["partitionkey"].as_str().unwrap().to_owned()).or_default().push(event["id"].as_str().unwrap().to_owned());
    }
    ids
}

/// The same of records read by Kafka's own consumer.
fn read(records: &[Record]) -> BTreeMap<String, Vec<String>> {
    let mut ids: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for record in records {
        ids.entry(record.key.clone()).or_default().push(record.header("ce_id").unwrap().to_owned());
    }
    ids
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_log_keeps_is_in_the_topic_once_and_in_the_order_of_its_session() {
    let Some(kafka) = Kafka::shared().await.or_skip("what_the_log_keeps_is_in_the_topic_once_and_in_the_order_of_its_session") else {
        return;
    };
    let brokers = kafka.addr().to_string();
    let folder = tempfile::tempdir().unwrap();
    let log = open(folder.path(), topic(&brokers, "once"));
    for turn in 0..40 {
        whole_turn(&log, turn % 7).await.unwrap();
    }
    delivered(&log).await;
    let records = kafka.read("once", 120).await;
    assert_eq!(read(&records), kept(folder.path()));
    let first = &records[0];
    for (name, value) in [
        ("ce_specversion", "1.0"),
        ("ce_source", "/headgate/orchestrator"),
        ("content-type", "application/json"),
        ("tenant_id", "acme"),
        ("schema_version", "1"),
        ("traceparent", "00-a-b-01"),
        ("ce_partitionkey", &first.key),
        ("ce_sequence", "00000000000000000001"),
    ] {
        assert_eq!(first.header(name), Some(value), "{name}");
    }
    assert!(first.value.contains("\"tenant\":\"acme\""), "{}", first.value);
    // All of a session is in one partition.
    let partitions: std::collections::BTreeSet<(&str, u32)> =
        records.iter().map(|record| (record.key.as_str(), record.partition)).collect();
    assert_eq!(partitions.len(), 7);

    // Whoever comes next goes on where this one stopped.
    drop(log);
    let log = open(folder.path(), topic(&brokers, "once"));
    whole_turn(&log, 1).await.unwrap();
    delivered(&log).await;
    let judged = verify_topic(&at(&brokers), "once").unwrap();
    assert!(judged.is_good(), "{judged:?}");
    assert_eq!((judged.records, judged.begun, judged.ended, judged.repeated), (123, 41, 41, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_outage_under_load_loses_nothing_and_keeps_every_session_in_order() {
    let _alone = KILLED.lock().await;
    let Some(mut kafka) = Kafka::start().await.or_skip("an_outage_under_load_loses_nothing_and_keeps_every_session_in_order") else {
        return;
    };
    let brokers = kafka.addr().to_string();
    let folder = tempfile::tempdir().unwrap();
    let (log, _) = Log::open(&Settings { cap: 64 << 20, ..settings(folder.path(), topic(&brokers, "outage")) }).unwrap();
    let load = async |turns: usize| {
        for turn in 0..turns {
            whole_turn(&log, turn % 31).await.unwrap();
        }
        log.flush().await.unwrap();
    };
    load(200).await;
    // Killed with events on their way.
    kafka.kill().await;
    let before = log.durable();
    load(3000).await;
    assert!(log.durable() >= before + 9000, "turns are taken as if nothing had happened");
    kafka.again().await;
    delivered(&log).await;
    let judged = verify_topic(&at(&brokers), "outage").unwrap();
    assert!(judged.is_good(), "{judged:?}");
    assert_eq!((judged.begun, judged.ended, judged.open.len()), (3200, 3200, 0));
    let count = usize::try_from(judged.records + judged.repeated).unwrap();
    let mut records = kafka.read("outage", count).await;
    let mut seen = std::collections::BTreeSet::new();
    records.retain(|record| seen.insert(record.header("ce_id").unwrap().to_owned()));
    assert_eq!(read(&records), kept(folder.path()), "first places alone count");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_topic_that_is_not_as_it_must_be_is_refused_with_the_remedy() {
    let Some(kafka) = Kafka::shared().await.or_skip("a_topic_that_is_not_as_it_must_be_is_refused_with_the_remedy") else { return };
    let brokers = kafka.addr().to_string();
    let folder = tempfile::tempdir().unwrap();
    let refused = |topic: Topic| match Log::open(&settings(folder.path(), topic)).map(drop) {
        Err(Unopened::Undeliverable(unfit)) => unfit,
        other => panic!("{other:?}"),
    };
    let missing = refused(Topic { partitions: None, ..topic(&brokers, "nowhere") });
    assert!(matches!(missing, Unfit::Missing { .. }) && missing.to_string().contains("create_with_partitions"), "{missing}");
    kafka.topic("single", 1, &["min.insync.replicas=1"]).await;
    let few = refused(Topic { replication: 3, ..topic(&brokers, "single") });
    assert!(matches!(few, Unfit::Replicas { found: 1, wanted: 3, .. }), "{few}");
    let unsynced = refused(Topic { in_sync: 2, ..topic(&brokers, "single") });
    assert!(matches!(unsynced, Unfit::InSync { found: 1, wanted: 2, .. }), "{unsynced}");
    let unmakeable = refused(Topic { replication: 3, ..topic(&brokers, "unmakeable") });
    assert!(matches!(unmakeable, Unfit::Refused(_)), "{unmakeable}");
    kafka.topic("impossible", 1, &["min.insync.replicas=2"]).await;
    let impossible = refused(topic(&brokers, "impossible"));
    assert!(impossible.to_string().contains("no write to it can succeed"), "{impossible}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_let_go_before_the_topic_has_it_and_turns_are_refused_before_there_is_no_room_for_their_ends() {
    let test = "nothing_is_let_go_before_the_topic_has_it_and_turns_are_refused_before_there_is_no_room_for_their_ends";
    let _alone = KILLED.lock().await;
    let Some(mut kafka) = Kafka::start().await.or_skip(test) else { return };
    let brokers = kafka.addr().to_string();
    kafka.kill().await;
    let folder = tempfile::tempdir().unwrap();
    // An orchestrator that is started during an outage takes turns, too.
    let log = open(folder.path(), topic(&brokers, "room"));
    let mut begun = 0;
    let refused = loop {
        match whole_turn(&log, begun % 5).await {
            Ok(()) => begun += 1,
            Err(refused) => break refused,
        }
    };
    assert_eq!(refused, Refused::Full);
    log.flush().await.unwrap();
    let judged = crate::events::verify(folder.path()).unwrap();
    assert_eq!((judged.is_good(), judged.first, judged.begun), (true, 1, begun as u64), "all of it is still there");
    assert!(log.shared.pinned_bytes.load(std::sync::atomic::Ordering::Relaxed) * 100 / Settings::LEAST_CAP >= 84);
    assert!(log.shared.oldest_seconds() > 0.0);
    kafka.again().await;
    delivered(&log).await;
    // With room again, turns are taken, and the oldest segments make it.
    for turn in 0..begun {
        whole_turn(&log, turn % 5).await.unwrap();
    }
    delivered(&log).await;
    assert!(crate::events::verify(folder.path()).unwrap().first > 1);
    let judged = verify_topic(&at(&brokers), "room").unwrap();
    assert!(judged.is_good(), "{judged:?}");
    assert_eq!((judged.begun, judged.ended), (2 * begun as u64, 2 * begun as u64));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn errors_of_leaders_and_brokers_that_fall_lose_nothing_and_keep_the_order() {
    use RDKafkaRespErr::{
        RD_KAFKA_RESP_ERR_NOT_ENOUGH_REPLICAS, RD_KAFKA_RESP_ERR_NOT_ENOUGH_REPLICAS_AFTER_APPEND,
        RD_KAFKA_RESP_ERR_NOT_LEADER_FOR_PARTITION, RD_KAFKA_RESP_ERR_OUT_OF_ORDER_SEQUENCE_NUMBER, RD_KAFKA_RESP_ERR_REQUEST_TIMED_OUT,
        RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED, RD_KAFKA_RESP_ERR_UNKNOWN_PRODUCER_ID,
    };
    let mock = MockCluster::new(3).unwrap();
    mock.create_topic("errors", 3, 3).unwrap();
    let brokers = mock.bootstrap_servers();
    let folder = tempfile::tempdir().unwrap();
    let mock_brokers = Brokers { is_mock: true, ..at(&brokers) };
    let log = open(folder.path(), Topic { partitions: None, brokers: mock_brokers, ..topic(&brokers, "errors") });
    // Those that are over by themselves.
    let passing = [
        RD_KAFKA_RESP_ERR_NOT_LEADER_FOR_PARTITION,
        RD_KAFKA_RESP_ERR_NOT_ENOUGH_REPLICAS,
        RD_KAFKA_RESP_ERR_NOT_ENOUGH_REPLICAS_AFTER_APPEND,
        RD_KAFKA_RESP_ERR_REQUEST_TIMED_OUT,
    ];
    // Those after which a producer is of no more use.
    let fatal = [
        RD_KAFKA_RESP_ERR_OUT_OF_ORDER_SEQUENCE_NUMBER,
        RD_KAFKA_RESP_ERR_UNKNOWN_PRODUCER_ID,
        RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED,
    ];
    for (round, error) in passing.into_iter().chain(fatal).enumerate() {
        if round == passing.len() {
            // What such a producer still has on its way is refused by brokers, since a number before it is missing. The mock takes it, and
            // its order tells nothing from here on.
            let judged = verify_topic(&at(&brokers), "errors").unwrap();
            assert!(judged.is_good(), "{judged:?}");
            assert_eq!((judged.begun, judged.ended, judged.open.len()), (162, 162, 0));
        }
        mock.request_errors(RDKafkaApiKey::Produce, &[error, error, error]);
        for turn in 0..40 {
            whole_turn(&log, turn % 5).await.unwrap();
        }
        if round % 2 == 1 {
            let broker = i32::try_from(round % 3).unwrap() + 1;
            mock.broker_down(broker).unwrap();
            whole_turn(&log, 0).await.unwrap();
            mock.broker_up(broker).unwrap();
        }
        delivered(&log).await;
    }
    let judged = verify_topic(&at(&brokers), "errors").unwrap();
    assert_eq!((judged.begun, judged.records), (283, 3 * 283), "{:?}", judged.violations);
    let failure = Failure { why: "event" };
    assert!(
        log.shared.delivery_failures.get_or_create(&failure).get() > 0,
        "no error was one that a producer does not survive: the test shows less than it says"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_single_record_has_a_place_or_an_error_in_time() {
    let Some(kafka) = Kafka::shared().await.or_skip("a_single_record_has_a_place_or_an_error_in_time") else { return };
    let audit = Topic { partitions: Some(1), ..topic(&kafka.addr().to_string(), "training.audit") };
    let producer = Producer::open(&audit, MINUTE).await.unwrap();
    for offset in 0..3 {
        let place = producer.write("acme", &[("ce_type", "training.enabled.v1")], b"{}").await.unwrap();
        assert_eq!((place.partition, place.offset), (0, offset));
    }
    let record = kafka.read("training.audit", 3).await.remove(0);
    assert_eq!((record.key.as_str(), record.header("ce_type"), record.value.as_str()), ("acme", Some("training.enabled.v1"), "{}"));

    let mock = MockCluster::new(1).unwrap();
    mock.create_topic("training.audit", 1, 1).unwrap();
    let audit = topic(&mock.bootstrap_servers(), "training.audit");
    let producer = Producer::open(&audit, Duration::from_secs(1)).await.unwrap();
    mock.broker_down(1).unwrap();
    let refused = within(MINUTE, producer.write("acme", &[], b"{}"), "the record to be given up").await.unwrap_err();
    assert!(refused.to_string().contains("training.audit"), "{refused}");
    assert!(matches!(Producer::open(&audit, MINUTE).await, Err(Unfit::Away(_))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_judge_of_a_topic_objects_to_whatever_must_not_be() {
    let mock = MockCluster::new(1).unwrap();
    let brokers = mock.bootstrap_servers();
    let turn = TurnId::fresh();
    let begun = Event::accepted(turn, SystemTime::UNIX_EPOCH, "00-a-b-01".into(), accepted("s1"));
    let ended = |kind| serde_json::to_vec(&begun.followed_by(kind, SystemTime::UNIX_EPOCH, serde_json::json!({}))).unwrap();
    let (accepted, completed, failed) = (serde_json::to_vec(&begun).unwrap(), ended(Kind::Completed), ended(Kind::Failed));
    /// Events, the key they come with if it is another, and what is objected to.
    type Case<'a> = (&'a [&'a [u8]], Option<&'a str>, &'a str);
    let cases: [Case<'_>; 7] = [
        (&[&accepted, &completed], None, ""),
        // Delivered again, word for word.
        (&[&accepted, &accepted, &completed, &accepted, &completed], None, ""),
        (&[&accepted, &completed, &failed], None, "another event of its id"),
        (&[&completed, &accepted], None, "has not begun"),
        (&[&completed], None, "has not begun"),
        (&[&accepted], Some("acme/s2"), "its key is not"),
        (&[b"not an event"], None, "not an event"),
    ];
    // At once: the mock lets each of them wait for an answer that it does not have.
    let open = async |number: usize| {
        let name = format!("judged-{number}");
        mock.create_topic(&name, 1, 1).unwrap();
        (Producer::open(&topic(&brokers, &name), MINUTE).await.unwrap(), name)
    };
    let opened = futures_util::future::join_all((0..cases.len()).map(open)).await;
    for ((events, key, objection), (producer, name)) in cases.into_iter().zip(opened) {
        for event in events {
            let message = Message::of(event);
            let headers: Vec<(&str, &str)> = message.headers.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
            producer.write(key.unwrap_or(&message.key), &headers, &message.value).await.unwrap();
        }
        let judged = verify_topic(&at(&brokers), &name).unwrap();
        assert_eq!(judged.is_good(), objection.is_empty(), "{objection}: {judged:?}");
        assert!(judged.violations.iter().any(|violation| violation.to_string().contains(objection)) || objection.is_empty(), "{judged:?}");
    }
    assert!(verify_topic(&at(&brokers), "no-such-topic").is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn turns_whose_log_is_lost_are_ended_once_by_whoever_reaps_them_and_no_others_are() {
    let test = "turns_whose_log_is_lost_are_ended_once_by_whoever_reaps_them_and_no_others_are";
    let Some(kafka) = Kafka::shared().await.or_skip(test) else { return };
    let (hour, now) = (60 * MINUTE, SystemTime::now());
    let topic = topic(&kafka.addr().to_string(), "reaped");
    let producer = Producer::open(&topic, MINUTE).await.unwrap();
    let say = async |event: Vec<u8>| {
        producer.write_beside(2, &Message::of(&event)).await.unwrap();
    };
    fn line<D: serde::Serialize>(event: &Event<D>) -> Vec<u8> {
        serde_json::to_vec(event).unwrap()
    }
    let nothing = serde_json::json!({});
    let begin = async |session: &str, at: SystemTime| {
        let begun = Event::accepted(TurnId::fresh(), at, "00-a-b-01".into(), accepted(session));
        say(line(&begun)).await;
        say(line(&begun.followed_by(Kind::InputVerdict, at, verdict("allow")))).await;
        begun
    };
    let long_ago = now - 2 * hour;
    let lost = begin("lost", long_ago).await;
    let untold = begin("untold", long_ago).await;
    say(line(&untold.followed_by(Kind::Completed, long_ago, &nothing))).await;
    let refused = TurnId::fresh();
    let whose = (&"acme".parse().unwrap(), &"refused".parse().unwrap());
    say(line(&Event::refused(refused, long_ago, "00-a-b-01".into(), whose, verdict("deny")))).await;
    let young = begin("young", now - MINUTE).await;
    // It began long ago, and the end of it came a moment ago.
    let just_ended = begin("just-ended", long_ago).await;
    say(line(&just_ended.followed_by(Kind::Completed, now, &nothing))).await;
    let settled = begin("settled", long_ago).await;
    say(line(&settled.followed_by(Kind::Completed, long_ago, &nothing))).await;
    say(line(&settled.followed_by(Kind::Delivery, long_ago, &nothing))).await;
    // Its log is not lost.
    let folder = tempfile::tempdir().unwrap();
    let (log, _) = Log::open(&Settings { topic: None, ..settings(folder.path(), topic.clone()) }).unwrap();
    let kept = begin("kept", long_ago).await;
    let account = log.begin(of_session(kept.subject, "kept")).await.unwrap();

    let found = orphans(&topic.brokers, &topic.name, hour, Some(folder.path())).unwrap();
    let named: std::collections::BTreeMap<TurnId, (&str, bool)> =
        found.found.iter().map(|orphan| (orphan.turn, (orphan.key.as_str(), orphan.is_open))).collect();
    let expected = [(lost.subject, ("acme/lost", true)), (untold.subject, ("acme/untold", false)), (refused, ("acme/refused", true))];
    assert_eq!(named, expected.into());
    assert_eq!((found.young, found.kept), (2, 1));
    let before = verify_topic(&topic.brokers, &topic.name).unwrap();
    // A runtime must not wait for another in its place.
    let reaping = async |orphans: Vec<Orphan>| {
        let topic = topic.clone();
        tokio::task::spawn_blocking(move || reap(&topic, &orphans, "ann (uid 7)")).await.unwrap().unwrap();
    };
    // Two at once, who have found the same.
    let again = orphans(&topic.brokers, &topic.name, hour, Some(folder.path())).unwrap();
    reaping(found.found).await;
    reaping(again.found).await;
    let judged = verify_topic(&topic.brokers, &topic.name).unwrap();
    assert!(judged.is_good(), "{judged:?}");
    assert_eq!((judged.records, judged.repeated), (before.records + 4, 4), "whatever stood first counts");
    assert_eq!((judged.crashed, judged.reaped, judged.refused, judged.untold), (1, 1, 1, 2));
    assert_eq!(judged.open, [young.subject, kept.subject]);
    assert_eq!(judged.owed, [just_ended.subject]);
    // Whoever comes later finds nothing more.
    let found = orphans(&topic.brokers, &topic.name, hour, Some(folder.path())).unwrap();
    assert!(found.found.is_empty(), "{found:?}");

    let count = usize::try_from(judged.records + judged.repeated).unwrap();
    let records = kafka.read("reaped", count).await;
    let reaped: Vec<&Record> = records.iter().filter(|record| record.header("ce_reapedby").is_some()).collect();
    assert_eq!(reaped.len(), 8);
    assert!(reaped.iter().all(|record| record.partition == 2 && record.header("ce_reapedby") == Some("ann (uid 7)")), "{reaped:?}");
    let said = |session: &str| {
        let of = reaped.iter().filter(move |record| record.key == format!("acme/{session}"));
        of.map(|record| (record.header("ce_type").unwrap(), record.value.as_str())).take(2).collect::<Vec<_>>()
    };
    let unknown = ("delivery.v1", r#"{"outcome":"unknown"}"#);
    assert_eq!(said("lost"), [("turn.failed.v1", r#"{"reason":"crash"}"#), unknown]);
    assert_eq!(said("untold"), [unknown, unknown]);
    assert_eq!(said("refused")[0].0, "turn.denied.v1");

    // An orchestrator that lived after all, and says something else, is not overheard.
    say(line(&lost.followed_by(Kind::Completed, now, &nothing))).await;
    let judged = verify_topic(&topic.brokers, &topic.name).unwrap();
    assert_eq!(judged.violations_count, 1, "{judged:?}");
    complete(account);
}

/// Brokers that let in whoever has the password.
#[cfg(feature = "kafka-tls")]
fn by_password(guard: &Guard, mechanism: &'static str, password: &str) -> Brokers {
    let sasl = Sasl { mechanism, username: Guard::USER.to_owned(), password: Secret::new(password) };
    let tls = Tls { ca: Some(guard.ca.clone()), own: None };
    Brokers { tls: Some(tls), sasl: Some(sasl), ..at(&guard.password) }
}

#[cfg(feature = "kafka-tls")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn brokers_that_ask_who_we_are_get_a_password_or_a_certificate_and_then_the_events() {
    let test = "brokers_that_ask_who_we_are_get_a_password_or_a_certificate_and_then_the_events";
    let Some(kafka) = Kafka::guarded().await.or_skip(test) else { return };
    let guard = kafka.guard();
    let own = Some((guard.client.clone(), guard.client_key.clone()));
    let mutual = Brokers { tls: Some(Tls { ca: Some(guard.ca.clone()), own }), ..at(&guard.certificate) };
    let doors = [
        ("scram", by_password(guard, "SCRAM-SHA-512", Guard::PASSWORD)),
        ("plain", by_password(guard, "PLAIN", Guard::PASSWORD)),
        ("certificate", mutual),
    ];
    for (name, brokers) in doors {
        let folder = tempfile::tempdir().unwrap();
        let log = open(folder.path(), Topic { brokers: brokers.clone(), ..topic("", name) });
        for turn in 0..10 {
            whole_turn(&log, turn % 3).await.unwrap();
        }
        delivered(&log).await;
        let judged = verify_topic(&brokers, name).unwrap();
        assert!(judged.is_good() && judged.ended == 10, "{name}: {judged:?}");
        assert_eq!(read(&kafka.read(name, 30).await), kept(folder.path()), "as Kafka's own consumer has it");
        let audit = Topic { brokers, ..topic("", name) };
        Producer::open(&audit, MINUTE).await.unwrap().write("acme", &[], b"{}").await.unwrap();
    }
}

#[cfg(feature = "kafka-tls")]
#[tokio::test(flavor = "multi_thread", worker_threads = 6)]
async fn a_log_that_is_not_let_in_says_why_goes_on_and_is_delivered_once_it_is() {
    let Some(kafka) = Kafka::guarded().await.or_skip("a_log_that_is_not_let_in_says_why_goes_on_and_is_delivered_once_it_is") else {
        return;
    };
    let guard = kafka.guard();
    let wrong = by_password(guard, "SCRAM-SHA-512", "a guess");
    let doors = [
        ("password", wrong.clone(), "uthentication"),
        ("plain", by_password(guard, "PLAIN", "a guess"), "uthentication"),
        ("mechanism", by_password(guard, "SCRAM-SHA-256", Guard::PASSWORD), "SCRAM-SHA-256"),
        (
            "authority",
            Brokers { tls: Some(Tls { ca: Some(guard.stranger.clone()), own: None }), ..wrong.clone() },
            "certificate verify failed",
        ),
        ("certificate", Brokers { addresses: at(&guard.certificate).addresses, sasl: None, ..wrong.clone() }, "SSL"),
    ];
    let mut barred = Vec::new();
    for (name, brokers, reason) in doors {
        let folder = tempfile::tempdir().unwrap();
        let (at, why) = (Topic { brokers: brokers.clone(), ..topic("", name) }, reason.to_owned());
        // Each of them waits for a first word.
        barred.push(tokio::spawn(async move {
            let log = open(folder.path(), at.clone());
            whole_turn(&log, 0).await.unwrap();
            log.flush().await.unwrap();
            let mut registry = prometheus_client::registry::Registry::default();
            log.register(&mut registry);
            let mut metrics = String::new();
            prometheus_client::encoding::text::encode(&mut metrics, &registry).unwrap();
            let failed = "orchestrator_event_log_delivery_failures_total{why=\"barred\"} ";
            assert!(metrics.contains(failed), "{why}: {metrics}");
            assert!(metrics.contains("orchestrator_event_log_undelivered 3\n"), "{why}: {metrics}");
            let unread = verify_topic(&brokers, &at.name).unwrap_err().to_string();
            assert!(unread.contains("does not let us in") && unread.contains(&why), "{why}: {unread}");
            assert!(!unread.contains("a guess"), "{unread}");
            let unfit = Producer::open(&at, MINUTE).await.unwrap_err();
            assert!(matches!(unfit, Unfit::Barred(_)), "{unfit}");
            (name == "password").then_some((log, folder))
        }));
    }
    let mut logs = Vec::new();
    for log in barred {
        logs.extend(log.await.unwrap());
    }
    // The password is the other one now: nobody starts anything again.
    kafka.user("a guess").await;
    let (log, folder) = logs.remove(0);
    delivered(&log).await;
    assert_eq!(read(&kafka.read("password", 3).await), kept(folder.path()));
    // What cannot be read at all is a fault of the config.
    let folder = tempfile::tempdir().unwrap();
    let missing = Brokers { tls: Some(Tls { ca: Some("nowhere.pem".into()), own: None }), ..wrong };
    let refused = Log::open(&settings(folder.path(), Topic { brokers: missing, ..topic("", "password") })).unwrap_err();
    assert!(matches!(&refused, Unopened::Undeliverable(unfit) if unfit.to_string().contains("cannot read nowhere.pem")), "{refused:?}");
}

#[cfg(not(feature = "kafka-tls"))]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_build_without_tls_refuses_brokers_that_want_it_with_the_remedy() {
    let folder = tempfile::tempdir().unwrap();
    let brokers = Brokers { tls: Some(super::Tls::default()), ..at("localhost:1") };
    let refused = Log::open(&settings(folder.path(), Topic { brokers, ..topic("", "any") })).unwrap_err();
    assert!(matches!(&refused, Unopened::Undeliverable(unfit) if unfit.to_string().contains("--features kafka-tls")), "{refused:?}");
}

/// How fast an outage is drained: `cargo test -p headgate-orchestrator --lib -- --ignored --nocapture drained`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement"]
#[allow(clippy::print_stdout, reason = "the figures are what it is for")]
async fn how_fast_an_outage_is_drained() {
    let Some(kafka) = Kafka::shared().await.or_skip("how_fast_an_outage_is_drained") else { return };
    let folder = tempfile::tempdir().unwrap();
    let settings = Settings { cap: 1 << 30, ..settings(folder.path(), topic(&kafka.addr().to_string(), "drained")) };
    let log = std::sync::Arc::new(Log::open(&Settings { topic: None, ..settings.clone() }).unwrap().0);
    let begun = Instant::now();
    let tasks = (0..64).map(|session| {
        let log = log.clone();
        tokio::spawn(async move {
            for _ in 0..1000 {
                whole_turn(&log, session).await.unwrap();
            }
        })
    });
    futures_util::future::join_all(tasks.collect::<Vec<_>>()).await;
    log.flush().await.unwrap();
    let (events, ingest) = (log.durable(), begun.elapsed().as_secs_f64());
    drop(log);
    let (log, _) = Log::open(&settings).unwrap();
    let begun = Instant::now();
    delivered(&log).await;
    let drain = begun.elapsed().as_secs_f64();
    let rate = |seconds: f64| events as f64 / seconds;
    println!("{events} events: taken at {:.0} a second by 64 callers at once, drained at {:.0} a second", rate(ingest), rate(drain));
    assert!(verify_topic(&settings.topic.unwrap().brokers, "drained").unwrap().is_good());
}
