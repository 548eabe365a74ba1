//! An orchestrator killed at any moment: what it acknowledged is in its event log, and every turn there ends exactly once.

use std::{
    collections::BTreeSet,
    fs,
    net::SocketAddr,
    path::Path,
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use headgate_contracts::TurnId;
use headgate_orchestrator::events::{Follow, Judged, Part, verify};
use headgate_policy::{
    Decision, Digest, Facts, Issuer, Ring,
    vault::{Master, Vault},
};
#[cfg(feature = "kafka-tls")]
use headgate_testkit::kafka::Guard;
#[cfg(feature = "kafka")]
use headgate_testkit::kafka::Kafka;
use headgate_testkit::{
    client::{self, Request},
    dialect::{Answer, Cut},
    services::{OrSkip, Program, Ready, Service, Signal},
    soon,
    upstream::{Script, Upstream},
    within,
};
use serde_json::json;
use tokio::sync::watch;

const STEP: &str = "/v1/conversation/step";
/// How often the orchestrator is killed.
const KILLS: u64 = 20;
/// Callers at once.
const CALLERS: u64 = 8;

fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs()
}

/// Numbers without a pattern, the same in every run.
fn scattered(seed: u64) -> u64 {
    let mixed = (seed + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed ^ (mixed >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 33
}

struct House {
    folder: tempfile::TempDir,
    ring: Arc<Ring>,
    issuer: Issuer,
}

impl House {
    /// `kafka`: what more the config says of the events.
    fn before(model: &Upstream, kafka: &str) -> House {
        let folder = tempfile::tempdir().unwrap();
        let ring = Arc::new(Ring::generate(now()).unwrap());
        fs::write(folder.path().join("gateway.jwks.json"), ring.jwks()).unwrap();
        fs::write(folder.path().join("constitution.md"), "# Be kind\n\nBe kind to whoever asks.\n").unwrap();
        let config = format!(
            "admin: {{ listen: \"off\" }}\npolicy: {{ constitution: constitution.md, version: \"7\" }}\nupstreams:\n  model: {{ protocol: openai, endpoints: [\"{}\"] }}\n\
             orchestrator:\n  listen: 127.0.0.1:0\n  upstream: model\n  keys: file:gateway.jwks.json\n  events: {{ folder: events, cap: 16MiB{kafka} }}\n",
            model.url()
        );
        fs::write(folder.path().join("headgate.yaml"), config).unwrap();
        let plan = headgate_config::load(&folder.path().join("headgate.yaml"), None, &|_| None).unwrap_or_else(|faults| panic!("{faults}"));
        House { issuer: plan.policy.unwrap().issuer, ring, folder }
    }

    fn events(&self) -> std::path::PathBuf {
        self.folder.path().join("events")
    }

    async fn start(&self) -> (Service, SocketAddr) {
        self.start_as(Program::at(env!("CARGO_BIN_EXE_headgate"))).await
    }

    /// `program`: what runs the orchestrator, once it is told which.
    async fn start_as(&self, program: Program) -> (Service, SocketAddr) {
        let program = program.arguments(["orchestrator"]).argument(self.folder.path().join("headgate.yaml"));
        let service = program.start(Ready::Line("\"running\"".to_owned())).await;
        let line = service.line("\"running\"").await;
        let told: serde_json::Value = serde_json::from_str(&line).unwrap();
        let at = told["fields"]["orchestrator"].as_str().or(told["orchestrator"].as_str());
        let at = at.unwrap_or_else(|| panic!("{line}")).parse().unwrap();
        (service, at)
    }

    fn turn(&self, id: TurnId, session: &str) -> Request {
        self.turn_of("u1", id, session)
    }

    fn turn_of(&self, subject: &str, id: TurnId, session: &str) -> Request {
        let id = id.to_string();
        let body = json!({"turn_id": id, "session_id": session, "tenant": "acme", "subject": subject, "model": "demo",
            "messages": [{"role": "user", "content": "canary"}]});
        let body = body.to_string();
        let facts = Facts { tid: "acme", sub: subject, sid: session, turn: &id, dec: Decision::Allow, cat: &[], trc: None };
        let claims: headgate_policy::Claims = self.issuer.dispatch(&facts, "POST", STEP, Digest::of(body.as_bytes()), now()).unwrap();
        Request::new("POST", STEP)
            .header("content-type", "application/json")
            .header("policy-verdict", &self.ring.sign(&claims).unwrap())
            .header("policy-version", &claims.pol.ver)
            .header("constitution-hash", &claims.con.to_string())
            .body(body)
    }
}

/// The turns that begin in a log.
fn begun(folder: &Path) -> BTreeSet<TurnId> {
    let mut log = Follow::open(folder).unwrap();
    let entries = std::iter::from_fn(|| log.next_entry().unwrap());
    entries.filter(|entry| entry.part == Part::Begins).map(|entry| entry.turn).collect()
}

fn good(folder: &Path) -> Judged {
    let judged = verify(folder).unwrap();
    assert!(judged.is_good(), "{:?}", judged.violations);
    judged
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_orchestrator_killed_at_any_moment_has_kept_what_it_acknowledged_and_ends_it_once() {
    let model = answering().await;
    let house = Arc::new(House::before(&model, ""));
    let judged = kill(&house).await;
    let tail = headgate(&["events", "tail", &house.events().display().to_string()]);
    let lines = String::from_utf8(tail.stdout).unwrap();
    assert_eq!(lines.lines().count() as u64, judged.records);
    assert!(lines.contains("turn.completed.v1") && !lines.contains("canary"), "names and numbers, and nothing that was said");
    let name = headgate(&["events", "name", &house.events().display().to_string(), "--tenant", "acme", "--subject", "u1"]);
    let name = String::from_utf8(name.stdout).unwrap();
    assert_eq!(lines.matches(&format!("\"subject\":\"{}\"", name.trim())).count() as u64, judged.begun, "and the name is u1's");
}

#[cfg(feature = "kafka")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_topic_has_what_an_orchestrator_killed_at_any_moment_acknowledged_in_order_and_ended_once() {
    use headgate_orchestrator::events::{Brokers, verify_topic};
    let test = "a_topic_has_what_an_orchestrator_killed_at_any_moment_acknowledged_in_order_and_ended_once";
    let Some(kafka) = Kafka::start().await.or_skip(test) else { return };
    let brokers = kafka.addr().to_string();
    let model = answering().await;
    let settings = "replication_factor: 1, min_insync_replicas: 1, create_with_partitions: 3";
    let house = Arc::new(House::before(&model, &format!(", kafka: {{ brokers: [\"{brokers}\"], {settings} }}")));
    let judged = kill(&house).await;
    // What the last of them did not live to deliver, the next one does.
    let (mut service, _) = house.start().await;
    let all = async {
        while verify_topic(&Brokers::open(vec![brokers.clone()]), "conversation.events").unwrap().records < judged.records {
            // A topic cannot be waited on.
            tokio::time::sleep(std::time::Duration::from_millis(200)).await;
        }
    };
    within(std::time::Duration::from_secs(60), all, "the topic to have everything").await;
    service.signal(Signal::Terminate);
    assert!(service.exited().await.success());
    let verdict = headgate(&["events", "verify", "--ended", "--brokers", &brokers]);
    let told = String::from_utf8(verdict.stdout).unwrap();
    assert!(verdict.status.success() && told.contains("violations      0"), "{told}");
    assert!(told.contains(&format!("turns begun     {}\nturns ended     {}", judged.begun, judged.ended)), "{told}");
    let tail = headgate(&["events", "tail", "--brokers", &brokers]);
    let lines = String::from_utf8(tail.stdout).unwrap();
    assert!(lines.lines().count() as u64 >= judged.records && !lines.contains("canary"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_fails_under_a_running_orchestrator_takes_no_more_turns_and_nothing_acknowledged_is_lost() {
    let test = "a_disk_that_fails_under_a_running_orchestrator_takes_no_more_turns_and_nothing_acknowledged_is_lost";
    for fault in ["fdatasync:error=EIO", "pwrite64:error=ENOSPC"] {
        let Some(strace) = Program::find(&["strace"], "HEADGATE_STRACE", "apt-get install strace").or_skip(test) else { return };
        let model = answering().await;
        let house = House::before(&model, "");
        let call = fault.split(':').next().unwrap_or_default();
        // The first ones succeed: a disk fails while it is used.
        let faults = [format!("trace={call}"), format!("inject={fault}:when=12+")];
        let strace = strace.arguments(["-f", "-qq", "-o", "/dev/null", "-e", &faults[0], "-e", &faults[1]]);
        let (mut service, at) = house.start_as(strace.argument(env!("CARGO_BIN_EXE_headgate"))).await;
        let mut acknowledged = BTreeSet::new();
        let refused = loop {
            let turn = TurnId::fresh();
            let reply = soon(client::ask(at, &house.turn(turn, "s1")), "an answer").await.unwrap();
            match reply.status {
                200 => assert!(acknowledged.insert(turn) && acknowledged.len() < 100, "the fault never comes"),
                _ => break reply,
            }
        };
        assert_eq!((refused.status, refused.problem().as_deref()), (503, Ok("event_log_unavailable")), "{fault}");
        let again = client::ask(at, &house.turn(TurnId::fresh(), "s2")).await.unwrap();
        assert_eq!(again.status, 503, "{fault}: the disk is not asked a second time");
        assert!(acknowledged.len() > 2, "{fault}: no turn was taken before it");
        service.line("the event log is sealed").await;
        service.signal(Signal::Kill);
        service.exited().await;
        let (mut service, at) = house.start().await;
        assert_eq!(client::ask(at, &house.turn(TurnId::fresh(), "s3")).await.unwrap().status, 200, "{fault}");
        service.signal(Signal::Terminate);
        assert!(service.exited().await.success());
        assert_eq!(good(&house.events()).open, []);
        assert!(acknowledged.is_subset(&begun(&house.events())), "{fault}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_said_is_shown_to_those_with_the_keys_until_its_subject_is_forgotten() {
    said_and_forgotten("", &|folder| vec![folder.to_owned()]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_master_key_is_rotated_under_a_running_orchestrator_whenever_the_rotation_is_killed() {
    let model = answering().await;
    let house = House::before(&model, ", text: { key: text.key, folder: subjects }");
    let path = |name: &str| house.folder.path().join(name).display().to_string();
    let (key, keys, events) = (path("text.key"), path("subjects"), path("events"));
    assert!(headgate(&["events", "key", &key]).status.success());
    // Enough subjects for several journals.
    let vault = Vault::open(Path::new(&keys), &Master::load(Path::new(&key)).unwrap()).unwrap();
    (0..600).for_each(|subject| drop(vault.sealer("acme", &format!("s{subject}")).unwrap()));
    let (mut service, at) = house.start().await;
    let turn = async |subject: &str| {
        let reply = client::ask(at, &house.turn_of(subject, TurnId::fresh(), subject)).await.unwrap();
        assert_eq!(reply.status, 200, "{}", reply.text());
    };
    turn("before").await;
    let rotate = ["events", "rotate", "--key", &key, "--keys", &keys];
    let shown = || {
        let tail = headgate(&["events", "tail", "--text", "--key", &key, "--keys", &keys, &events]);
        assert!(tail.status.success(), "{tail:?}");
        String::from_utf8(tail.stdout).unwrap()
    };
    for (kill, wait_ms) in [5, 10, 20, 40, 80, 160, 320].into_iter().enumerate() {
        let mut rotation = std::process::Command::new(env!("CARGO_BIN_EXE_headgate")).args(rotate).spawn().unwrap();
        // Any moment will do: what matters is that it is another one each time.
        tokio::time::sleep(Duration::from_millis(wait_ms)).await;
        turn(&format!("meanwhile{kill}")).await;
        let _ = rotation.kill();
        rotation.wait().unwrap();
        turn("before").await;
        // A prompt is sealed before its turn is answered; the end may be on its way.
        assert!(shown().matches("canary").count() >= 2 + 2 * kill, "{}", shown());
    }
    assert!(headgate(&rotate).status.success());
    let retired = headgate(&["events", "retire", "--key", &key, "--keys", &keys]);
    assert!(retired.status.success() && String::from_utf8_lossy(&retired.stdout).contains(" of 608 keys"), "{retired:?}");
    assert_eq!(fs::read_to_string(&key).unwrap().lines().count(), 1);
    turn("after").await;
    turn("before").await;
    service.signal(Signal::Terminate);
    assert!(service.exited().await.success());
    let all = shown();
    assert!(all.matches("canary").count() == 17 && !all.contains("<erased>") && !all.contains("<altered>"), "{all}");
    let audit = headgate(&["keys", "audit", &path("subjects.audit.jsonl")]);
    assert!(audit.status.success() && String::from_utf8_lossy(&audit.stdout).contains("master.retired"), "{audit:?}");
}

#[cfg(feature = "kafka")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_turn_whose_orchestrator_may_still_live_is_not_reaped() {
    let Some(kafka) = Kafka::start().await.or_skip("a_turn_whose_orchestrator_may_still_live_is_not_reaped") else { return };
    let model = answering().await;
    let kept =
        format!(", kafka: {{ brokers: [\"{}\"], replication_factor: 1, min_insync_replicas: 1, create_with_partitions: 1 }}", kafka.addr());
    let house = House::before(&model, &kept);
    let config = house.folder.path().join("headgate.yaml").display().to_string();
    let (mut service, at) = house.start().await;
    assert_eq!(client::ask(at, &house.turn(TurnId::fresh(), "s1")).await.unwrap().status, 200);
    // It drains what the topic does not have yet.
    service.signal(Signal::Terminate);
    assert!(service.exited().await.success());
    let reap = |more: &[&str]| {
        let output = headgate(&[&["events", "reap"], more].concat());
        let said = [output.stdout, output.stderr].map(|said| String::from_utf8(said).unwrap()).concat();
        (output.status.code(), said)
    };
    let (code, said) = reap(&["--config", &config]);
    assert!(code == Some(0) && said.contains("1 turns in the log here: left to its orchestrator\n0 turns to be ended"), "{said}");
    fs::rename(house.events(), house.folder.path().join("elsewhere")).unwrap();
    let (code, said) = reap(&["--config", &config]);
    assert!(code == Some(0) && said.contains("1 turns may still go on: left alone\n0 turns to be ended"), "{said}");
    let (code, said) = reap(&["--config", &config, "--older-than", "15min"]);
    assert!(code == Some(78) && said.contains("nothing may be heard of a turn for 10min; expected at least 20min"), "{code:?} {said}");
    let brokers = kafka.addr().to_string();
    for usage in [&["--brokers", &brokers, "--older-than", "9min"][..], &["--older-than", "1h"], &["elsewhere"]] {
        let (code, said) = reap(usage);
        assert_eq!(code, Some(64), "{said}");
    }
}

#[cfg(feature = "kafka-tls")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_said_is_erased_from_a_guarded_topic_that_nobody_can_edit() {
    let test = "what_was_said_is_erased_from_a_guarded_topic_that_nobody_can_edit";
    let Some(kafka) = Kafka::guarded().await.or_skip(test) else { return };
    let guard = kafka.guard();
    let password = guard.ca.with_file_name("password");
    fs::write(&password, Guard::PASSWORD).unwrap();
    let topic = format!(
        ", kafka: {{ brokers: [\"{}\"], tls: {{ ca: \"{}\" }}, sasl: {{ mechanism: SCRAM-SHA-512, username: {}, password: \"file:{}\" }}, \
         replication_factor: 1, min_insync_replicas: 1, create_with_partitions: 3 }}",
        guard.password,
        guard.ca.display(),
        Guard::USER,
        password.display()
    );
    // Only the config knows what lets in.
    let config = |events: &str| Path::new(events).with_file_name("headgate.yaml").display().to_string();
    said_and_forgotten(&topic, &|events| vec!["--config".to_owned(), config(events)]).await;
}

#[cfg(feature = "kafka-tls")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn brokers_are_trusted_as_the_machine_trusts_them_and_get_a_password_in_plain_text_only_where_that_is_said() {
    let test = "brokers_are_trusted_as_the_machine_trusts_them_and_get_a_password_in_plain_text_only_where_that_is_said";
    let Some(kafka) = Kafka::guarded().await.or_skip(test) else { return };
    let guard = kafka.guard();
    let password = guard.ca.with_file_name("password");
    fs::write(&password, Guard::PASSWORD).unwrap();
    let model = answering().await;
    for (door, tls, over, topic) in [(&guard.password, ", tls: {}", "", "trusted"), (&guard.plain_text, "", ", over: plain_text", "plain")]
    {
        let sasl = format!("mechanism: SCRAM-SHA-512, username: {}, password: \"file:{}\"{over}", Guard::USER, password.display());
        let kept = format!(
            ", kafka: {{ brokers: [\"{door}\"]{tls}, sasl: {{ {sasl} }}, topic: {topic}, replication_factor: 1, \
             min_insync_replicas: 1, create_with_partitions: 1 }}"
        );
        let house = House::before(&model, &kept);
        // A machine that has the brokers' authority among its own, and one that has somebody else's.
        let machine = |authority: &Path| Program::at(env!("CARGO_BIN_EXE_headgate")).variable("SSL_CERT_FILE", authority);
        let (mut service, at) = house.start_as(machine(&guard.ca)).await;
        assert_eq!(client::ask(at, &house.turn(TurnId::fresh(), "s1")).await.unwrap().status, 200);
        service.signal(Signal::Terminate);
        assert!(service.exited().await.success());
        let verify = async |authority: &Path| {
            let verify = machine(authority).arguments(["events", "verify", "--config"]).argument(house.folder.path().join("headgate.yaml"));
            verify.run(Duration::from_secs(60)).await
        };
        let (status, said) = verify(&guard.ca).await;
        assert!(status.success() && said.contains("turns ended     1"), "{topic}: {said}");
        let (status, said) = verify(&guard.stranger).await;
        match tls {
            "" => assert!(status.success(), "{said}"),
            _ => assert!(status.code() == Some(69) && said.contains("certificate verify failed"), "{said}"),
        }
    }
}

/// `kafka`: what more the config says of the events. `from`: where they are read, given the log's folder.
async fn said_and_forgotten(kafka: &str, from: &dyn Fn(&str) -> Vec<String>) {
    let model = answering().await;
    let house = House::before(&model, &format!(", text: {{ key: text.key, folder: subjects }}{kafka}"));
    let path = |name: &str| house.folder.path().join(name).display().to_string();
    let (key, keys, events) = (path("text.key"), path("subjects"), path("events"));
    assert!(headgate(&["events", "key", &key]).status.success());
    let open = ["--text", "--key", &key, "--keys", &keys];
    let tail = |more: &[&str], from: &[String]| {
        let from: Vec<&str> = from.iter().map(String::as_str).collect();
        let tail = headgate(&[&["events", "tail"], more, &from].concat());
        assert!(tail.status.success(), "{tail:?}");
        String::from_utf8(tail.stdout).unwrap()
    };
    let (mut service, at) = house.start().await;
    for (subject, session) in [("u1@example.com", "one@example.com"), ("u2@example.com", "two@example.com")] {
        let reply = client::ask(at, &house.turn_of(subject, TurnId::fresh(), session)).await.unwrap();
        assert_eq!(reply.status, 200, "{}", reply.text());
    }
    let source = from(&events);
    let ended = async |turns: usize| {
        let all = async {
            while tail(&[], &source).matches("turn.completed.v1").count() < turns {
                // Neither a topic nor a file can be waited on.
                tokio::time::sleep(std::time::Duration::from_millis(50)).await;
            }
        };
        within(std::time::Duration::from_secs(60), all, "the ends of turns").await;
    };
    ended(2).await;
    let shown = tail(&open, &source);
    assert_eq!((shown.matches("canary").count(), shown.matches("yes and no").count()), (2, 2), "{shown}");
    // Whoever has no keys sees none of it, in the lines and in the bytes.
    let copy = house.folder.path().join("copy");
    fs::create_dir(&copy).unwrap();
    for entry in fs::read_dir(&events).unwrap().map(Result::unwrap).filter(|entry| entry.path().is_file()) {
        fs::copy(entry.path(), copy.join(entry.file_name())).unwrap();
    }
    let bytes: Vec<u8> = fs::read_dir(&copy).unwrap().flat_map(|entry| fs::read(entry.unwrap().path()).unwrap()).collect();
    let closed = [tail(&[], &source).into_bytes(), bytes].concat();
    for said in ["canary", "yes", "example.com"] {
        assert!(!closed.windows(said.len()).any(|window| window == said.as_bytes()), "{said}");
    }
    let forget = ["events", "forget", "--key", &key, "--keys", &keys, "--tenant", "acme", "--subject", "u1@example.com"];
    let forgotten = headgate(&forget);
    assert!(forgotten.status.success() && String::from_utf8_lossy(&forgotten.stdout).contains("destroyed the key"), "{forgotten:?}");
    for from in [source.clone(), vec![copy.display().to_string()]] {
        let shown = tail(&open, &from);
        let counts = ["<erased>", "canary", "yes and no"].map(|text| shown.matches(text).count());
        assert_eq!(counts, [2, 1, 1], "{shown}");
    }
    // The orchestrator has not been told, and does not go on with what was destroyed.
    let back = client::ask(at, &house.turn_of("u1@example.com", TurnId::fresh(), "s3")).await.unwrap();
    assert_eq!(back.status, 200);
    ended(3).await;
    assert_eq!(tail(&open, &source).matches("canary").count(), 2);
    service.signal(Signal::Terminate);
    assert!(service.exited().await.success());
    assert!(!service.output().contains("canary") && !service.output().contains("yes and no"), "{}", service.output());
    let audit = headgate(&["keys", "audit", &path("subjects.audit.jsonl")]);
    let told = String::from_utf8_lossy(&audit.stdout);
    assert!(audit.status.success() && told.contains("subject.forgotten") && !told.contains("example.com"), "{told}");
    assert!(good(&house.events()).open.is_empty());
}

async fn answering() -> Upstream {
    Upstream::always(Script::stream(Answer::openai("demo", &["yes", " and", " no"]).cut(Cut::Whole))).await
}

fn headgate(arguments: &[&str]) -> std::process::Output {
    std::process::Command::new(env!("CARGO_BIN_EXE_headgate")).args(arguments).output().unwrap()
}

/// Kills an orchestrator many times under load, and has its log judged each time; then lets it end in peace.
async fn kill(house: &Arc<House>) -> Judged {
    let acknowledged = Arc::new(Mutex::new(BTreeSet::new()));
    let mut crashed = 0;
    for kill in 0..KILLS {
        let (mut service, at) = house.start().await;
        let judged = good(&house.events());
        assert_eq!(judged.open, [], "the start ends what the kill before it cut");
        crashed = judged.crashed;
        let (count, mut counted) = watch::channel(0_u64);
        let callers = (0..CALLERS).map(|caller| {
            let (house, acknowledged, count) = (house.clone(), acknowledged.clone(), count.clone());
            tokio::spawn(async move {
                loop {
                    let turn = TurnId::fresh();
                    let Ok(reply) = client::ask(at, &house.turn(turn, &format!("s{caller}"))).await else { return };
                    assert_eq!(reply.status, 200, "{}", reply.text());
                    acknowledged.lock().unwrap().insert(turn);
                    count.send_modify(|count| *count += 1);
                }
            })
        });
        let callers: Vec<_> = callers.collect();
        // Wherever the writer is at the moment at which that many answers have come.
        let enough = 1 + scattered(kill) % 40;
        soon(counted.wait_for(|count| *count >= enough), "turns to be answered").await.unwrap();
        service.signal(Signal::Kill);
        service.exited().await;
        for caller in callers {
            soon(caller, "a caller to notice").await.unwrap();
        }
        good(&house.events());
        let begun = begun(&house.events());
        let lost: Vec<TurnId> = acknowledged.lock().unwrap().difference(&begun).copied().collect();
        assert_eq!(lost, [], "after kill {kill}");
    }
    assert!(crashed > 0, "no kill met an open turn: the test shows nothing");
    let (mut service, _) = house.start().await;
    service.signal(Signal::Terminate);
    assert!(service.exited().await.success());
    let judged = good(&house.events());
    assert_eq!((judged.begun, judged.open.len()), (judged.ended, 0));

    let verdict = headgate(&["events", "verify", "--ended", &house.events().display().to_string()]);
    assert!(verdict.status.success(), "{verdict:?}");
    assert!(String::from_utf8_lossy(&verdict.stdout).contains("violations      0"), "{verdict:?}");
    judged
}
