//! Training mode with everything real: gateway, orchestrators, Redis, Kafka and an identity provider are processes of their own.

use std::{
    collections::{HashMap, HashSet},
    fs,
    net::SocketAddr,
    path::Path,
    sync::atomic::{AtomicUsize, Ordering},
    time::{Duration, SystemTime},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use headgate_contracts::TurnId;
use headgate_filters::auth::KeyHash;
use headgate_orchestrator::events::Follow;
use headgate_policy::{Claims, Decision, Digest, Facts, Issuer, Ring, audit};
use headgate_testkit::{
    answer::Kind,
    client::{Reply, Request, ask, stream},
    dialect::{Answer, Cut},
    kafka::Kafka,
    proxy::{Flow, Proxy},
    services::{self, Missing, OrSkip, Program, Ready, Service, Signal, free_addr},
    soon,
    upstream::{Script, Upstream},
    within,
};
use serde_json::{Value, json};

const KEY: &str = "hg_0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
const AUDIENCE: &str = "urn:headgate";
const STEP: &str = "/v1/conversation/step";
/// The shortest that may be configured.
const TTL: Duration = Duration::from_secs(3);
const MINUTE: Duration = Duration::from_secs(60);

fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs()
}

/// What admins and gateways of a test share.
struct House {
    folder: tempfile::TempDir,
    ring: Ring,
    issuer: Issuer,
    model: Upstream,
    redis: Service,
    identity: Service,
    kafka: SocketAddr,
    topics: String,
}

/// A program of ours that runs.
struct Running {
    service: Service,
    at: SocketAddr,
    admin: SocketAddr,
}

impl House {
    async fn new(kafka: &Kafka) -> Result<House, Missing> {
        static TESTS: AtomicUsize = AtomicUsize::new(0);
        let (redis, identity) = (services::redis().await?, services::identity().await?);
        let folder = tempfile::tempdir().unwrap();
        let ring = Ring::generate(now()).unwrap();
        ring.save(&folder.path().join("ring.json")).unwrap();
        fs::write(folder.path().join("gateway.jwks.json"), ring.jwks()).unwrap();
        fs::write(folder.path().join("constitution.md"), "# Be kind\n\nBe kind to whoever asks.\n").unwrap();
        let model = Upstream::always(Script::stream(Answer::openai("demo", &["yes", " and", " no"]).cut(Cut::Whole))).await;
        let text = "listen: 127.0.0.1:1\npolicy: { constitution: constitution.md, version: \"7\" }\nupstreams: { a: { protocol: openai, endpoints: [\"http://127.0.0.1:9\"] } }\nroutes: [{ path: /v1/chat/stream, upstream: a }]\n";
        let plan = headgate_config::parse("x.yaml", text, folder.path(), None, &|_| None).unwrap_or_else(|faults| panic!("{faults}"));
        let issuer = plan.policy.unwrap().issuer;
        let topics = format!("t{}", TESTS.fetch_add(1, Ordering::Relaxed));
        Ok(House { folder, ring, issuer, model, redis, identity, kafka: kafka.addr(), topics })
    }

    async fn started(&self, command: &str, name: &str, at: SocketAddr, admin: SocketAddr, redis: SocketAddr, config: &str) -> Running {
        let file = self.folder.path().join(format!("{name}.yaml"));
        let head = format!("admin: {{ listen: \"{admin}\" }}\nredis: {{ url: \"redis://{redis}\" }}\nobservability: {{ logs: json }}\n");
        fs::write(&file, head + config).unwrap();
        let service = Program::at(env!("CARGO_BIN_EXE_headgate")).argument(command).argument(&file).start(Ready::Connects(at)).await;
        Running { service, at, admin }
    }

    async fn orchestrator(&self, name: &str) -> Running {
        self.orchestrator_for(name, "3s", "4h").await
    }

    /// One at which an admin alone keeps training mode on for `max_hold`. A twelfth of `ttl` before the end it gives the lock back: who
    /// asks for that leaves it a time that a busy machine has.
    async fn orchestrator_for(&self, name: &str, ttl: &str, max_hold: &str) -> Running {
        let (at, admin) = (free_addr(), free_addr());
        let House { kafka, topics, identity, model, .. } = self;
        let config = format!(
            "policy: {{ constitution: constitution.md, version: \"7\" }}\nupstreams:\n  model: {{ protocol: openai, endpoints: [\"{}\"], health: {{ interval: 0s }} }}\n\
             orchestrator:\n  listen: {at}\n  upstream: model\n  keys: file:gateway.jwks.json\n  events:\n    folder: events-{name}\n    cap: 16MiB\n\
             \x20   kafka: {{ brokers: [\"{kafka}\"], topic: {topics}.events, replication_factor: 1, min_insync_replicas: 1, create_with_partitions: 1 }}\n\
             \x20 training: {{ issuer: \"http://{}\", audience: \"{AUDIENCE}\", ttl: {ttl}, max_hold: {max_hold}, topic: {topics}.audit }}\n",
            model.url(),
            identity.addr(),
        );
        self.started("orchestrator", name, at, admin, self.redis.addr(), &config).await
    }

    async fn gateway(&self, desk: &Running) -> Running {
        self.gateway_beside(desk, self.redis.addr()).await
    }

    /// One that believes Redis to be at this address.
    async fn gateway_beside(&self, desk: &Running, redis: SocketAddr) -> Running {
        let (at, admin) = (free_addr(), free_addr());
        let hash = KeyHash::of(KEY);
        let config = format!(
            "listen: {at}\nworkers: 1\npolicy: {{ constitution: constitution.md, version: \"7\", key: \"file:ring.json\" }}\n\
             upstreams:\n  desk: {{ protocol: orchestrator, endpoints: [\"http://{0}\"], health: {{ interval: 0s }} }}\n  admins: {{ protocol: http, endpoints: [\"http://{0}\"], health: {{ interval: 0s }} }}\n\
             routes:\n  - path: /v1/chat/stream\n    upstream: desk\n    filters:\n      - auth: {{ keys: [{{ key: \"{hash}\", tenant: acme, subject: u1 }}] }}\n      - policy_headers\n\
             \x20 - path: /v1/training/*\n    kind: proxy\n    upstream: admins\n",
            desk.at
        );
        self.started("run", "gateway", at, admin, redis, &config).await
    }

    /// What `headgate training verify` says of the audit in the topic, with what these orchestrators remember of it.
    async fn judged(&self, names: &[&str]) -> (Option<i32>, String) {
        let mut program =
            headgate(&["training", "verify", "--brokers", &self.kafka.to_string(), "--topic", &format!("{}.audit", self.topics)]);
        for name in names {
            program = program.argument("--heads").argument(self.folder.path().join(format!("events-{name}/training.json")));
        }
        let (status, said) = program.run(MINUTE).await;
        (status.code(), said)
    }

    async fn sound(&self, names: &[&str]) {
        let (code, said) = self.judged(names).await;
        assert!(code == Some(0) && said.contains("violations      0"), "{said}");
    }

    async fn token(&self, who: &str) -> String {
        token(self.identity.addr(), who).await
    }

    /// A dispatch past the gateway in training mode under `fence`, as one would arrive that was sent before its gateway fell asleep.
    async fn dispatch(&self, desk: &Running, fence: u64) -> Reply {
        let id = TurnId::fresh().to_string();
        let body = json!({"turn_id": id, "session_id": id, "tenant": "acme", "subject": "u1", "model": "demo",
            "messages": [{"role": "user", "content": "hi"}]});
        let body = body.to_string();
        let facts = Facts { tid: "acme", sub: "u1", sid: &id, turn: &id, dec: Decision::Allow, cat: &[], trc: None };
        let claims: Claims = self.issuer.dispatch(&facts, "POST", STEP, Digest::of(body.as_bytes()), now()).unwrap();
        let claims = claims.in_training(fence);
        let request = Request::new("POST", STEP)
            .header("content-type", "application/json")
            .header("policy-verdict", &self.ring.sign(&claims).unwrap())
            .header("policy-version", &claims.pol.ver)
            .header("constitution-hash", &claims.con.to_string());
        ask(desk.at, &request.body(body)).await.unwrap()
    }

    /// A turn through the gateway: what the verdict over its answer claims.
    async fn turn(&self, gateway: &Running) -> Claims {
        let answer = stream(gateway.at, &Request::turn("hi").bearer(KEY), Kind::Client).await.unwrap().rest().await.unwrap();
        assert_eq!(answer.text(), "yes and no");
        self.ring.verifier().open(answer.verdict(), now()).unwrap()
    }

    fn events(&self, name: &str) -> Vec<Value> {
        let mut events = Vec::new();
        let mut follow = Follow::open(&self.folder.path().join(format!("events-{name}"))).unwrap();
        while let Some(entry) = follow.next_entry().unwrap() {
            events.extend(serde_json::from_slice::<Value>(&entry.event));
        }
        events
    }
}

fn headgate(arguments: &[&str]) -> Program {
    Program::at(env!("CARGO_BIN_EXE_headgate")).arguments(arguments)
}

/// An access token for one of the provider's people.
async fn token(identity: SocketAddr, who: &str) -> String {
    let basic = STANDARD.encode(format!("{who}:{who}-secret"));
    let request = Request::new("POST", "/token")
        .header("authorization", &format!("Basic {basic}"))
        .header("content-type", "application/x-www-form-urlencoded")
        .body(format!("grant_type=client_credentials&scope=training&resource={AUDIENCE}"));
    let reply = ask(identity, &request).await.unwrap();
    reply.json()["access_token"].as_str().unwrap_or_else(|| panic!("no token: {}", reply.text())).to_owned()
}

async fn call(at: &Running, call: &str, token: &str) -> Reply {
    let path = format!("/v1/training{call}");
    let request = if call.is_empty() { Request::get(&path) } else { Request::new("POST", &path) };
    within(MINUTE, ask(at.at, &request.bearer(token)), "an answer about training mode").await.unwrap()
}

async fn enabled(at: &Running, token: &str) -> u64 {
    // A first record has its topic made first. On a machine with much else to do that takes longer than the shortest lock lasts.
    let held = async {
        loop {
            let reply = call(at, "/enable", token).await;
            if !(reply.status == 503 && reply.json()["code"] == "overloaded") {
                return reply;
            }
        }
    };
    let reply = within(MINUTE, held, "the lock").await;
    assert_eq!(reply.status, 200, "{}\n{}", reply.text(), at.service.output());
    assert_eq!(reply.json()["mode"], "training");
    reply.json()["fence"].as_u64().unwrap()
}

/// The records of an audit topic, each sound and bound to the one before of its writer and tenant.
async fn audited(kafka: &Kafka, topic: &str, least: usize) -> Vec<audit::Record> {
    let mut last: HashMap<(String, String), audit::Record> = HashMap::new();
    let mut records = Vec::new();
    let document = Path::new(env!("CARGO_MANIFEST_DIR")).join("../contracts/schema/asyncapi.json");
    let document: Value = serde_json::from_slice(&fs::read(document).unwrap()).unwrap();
    let documented = &document["components"]["messages"]["training.audit.v1"]["headers"]["required"];
    let documented: HashSet<String> = serde_json::from_value(documented.clone()).unwrap();
    for found in kafka.read(topic, least).await {
        let record = audit::Record::read(found.value.as_bytes()).unwrap_or_else(|why| panic!("{why}: {}", found.value));
        let of = |name: &str| record.facts[name].as_str().unwrap().to_owned();
        assert_eq!((found.key.clone(), found.header("ce_type")), (of("tenant"), Some("training.audit.v1")));
        let mut headers = documented.clone();
        for (name, _) in &found.headers {
            assert!(headers.remove(name) || name == "traceparent", "the document has no header {name}");
        }
        assert!(headers.is_empty(), "the document promises {headers:?}");
        let before = last.insert((of("writer"), of("tenant")), record.clone());
        let expected = before.map_or((1, Digest::of(b"")), |before| (before.seq + 1, before.hash));
        assert_eq!((record.seq, record.prev_hash), expected, "{}", found.value);
        records.push(record);
    }
    records
}

fn said(record: &audit::Record) -> (&str, &str, &str, &str) {
    let fact = |name: &str| record.facts.get(name).and_then(Value::as_str).unwrap_or_default();
    (record.action.as_str(), record.actor.as_str(), fact("outcome"), fact("code"))
}

async fn shared(test: &str) -> Option<(&'static Kafka, House)> {
    let kafka = Kafka::shared().await.or_skip(test)?;
    let house = House::new(kafka).await.or_skip(test)?;
    Some((kafka, house))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_admin_turns_training_mode_on_and_off_and_turns_between_are_marked() {
    let Some((kafka, house)) = shared("an_admin_turns_training_mode_on_and_off").await else { return };
    let (first, second) = (house.orchestrator("first").await, house.orchestrator("second").await);
    let gateway = house.gateway(&first).await;
    let (ann, bob) = (house.token("ann").await, house.token("bob").await);
    assert_eq!(house.turn(&gateway).await.fence, None);
    assert_eq!(call(&second, "", &ann).await.json(), json!({"tenant": "acme", "mode": "enforce"}));

    // Through the gateway, as an operator would.
    let fence = enabled(&gateway, &ann).await;
    let marked = async {
        loop {
            if let Some(fence) = house.turn(&gateway).await.fence {
                return fence;
            }
        }
    };
    assert_eq!(soon(marked, "a turn in training mode").await, fence);
    let shown = async {
        for admin in [gateway.admin, first.admin] {
            while !ask(admin, &Request::get("/metrics")).await.unwrap().text().contains("training_mode_state{tenant=\"acme\"} 1\n") {}
        }
    };
    soon(shown, "the gauge of training mode at gateway and orchestrator").await;
    let state = call(&second, "", &bob).await.json();
    assert_eq!((&state["mode"], &state["fence"], &state["owner"]), (&json!("training"), &json!(fence), &json!("ann")));
    assert_eq!(enabled(&second, &ann).await, fence, "the owner may ask again, anywhere");

    let locked = call(&second, "/enable", &bob).await;
    assert_eq!((locked.status, locked.problem().unwrap().as_str()), (423, "training_locked"));
    assert!(locked.header("retry-after").unwrap().parse::<u64>().unwrap() <= 3);
    let dora = house.token("dora").await;
    assert_eq!(call(&second, "", &dora).await.json(), json!({"tenant": "other", "mode": "enforce"}));

    // The lock is renewed for longer than it would last.
    tokio::time::sleep(TTL + Duration::from_secs(1)).await;
    assert_eq!(house.turn(&gateway).await.fence, Some(fence));
    // Any admin may turn it off, at any orchestrator.
    let off = call(&second, "/disable", &bob).await;
    assert_eq!((off.status, off.json()), (200, json!({"tenant": "acme", "mode": "enforce"})));
    // A turn that is signed in the moment in which the lock is given back is refused.
    let enforced = async { while ask(gateway.at, &Request::turn("hi").bearer(KEY)).await.unwrap().status != 200 {} };
    soon(enforced, "a turn as always").await;
    assert_eq!(house.turn(&gateway).await.fence, None);

    let marks: Vec<(Value, Value)> = house
        .events("first")
        .iter()
        .filter(|event| event["type"] == "verdict.input.v1")
        .map(|event| (event["data"]["mode"].clone(), event["data"]["fence"].clone()))
        .collect();
    assert!(marks.contains(&(json!("training"), json!(fence))), "{marks:?}");
    assert_eq!((&marks[0], marks.last().unwrap()), (&(Value::Null, Value::Null), &(Value::Null, Value::Null)));
    let log = first.service.output();
    assert!(log.contains("training mode is on") && log.contains("\"owner\":\"ann\""), "{log}");

    let records = audited(kafka, &format!("{}.audit", house.topics), 4).await;
    let told: Vec<_> = records.iter().map(said).collect();
    assert_eq!(
        told,
        [
            ("training.lock.acquired", "ann", "allowed", ""),
            ("training.enable", "ann", "allowed", ""),
            ("training.enable", "bob", "denied", "training_locked"),
            ("training.lock.released", "bob", "allowed", ""),
        ]
    );
    assert!(records.iter().all(|record| record.facts["traceparent"].is_string()));
    house.sound(&["first", "second"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn training_mode_goes_on_only_while_another_admin_approves() {
    let Some((kafka, house)) = shared("training_mode_goes_on_only_while_another_admin_approves").await else { return };
    let (first, second) = (house.orchestrator_for("first", "9s", "12s").await, house.orchestrator_for("second", "9s", "12s").await);
    let (ann, bob, carl) = (house.token("ann").await, house.token("bob").await, house.token("carl").await);
    let refused = async |token: &str, status: u16, code: &str| {
        let reply = call(&second, "/approve", token).await;
        assert_eq!((reply.status, reply.problem().unwrap().as_str()), (status, code), "{}", reply.text());
    };
    refused(&bob, 409, "stale_fence").await;
    let fence = enabled(&first, &ann).await;
    let before = call(&second, "", &ann).await.json();
    refused(&ann, 403, "permission_denied").await;
    refused(&carl, 403, "permission_denied").await;
    assert_eq!(call(&second, "", &ann).await.json(), before, "her own word changes nothing");
    let first_end = before["until"].as_u64().unwrap();
    assert_eq!(before["since"].as_u64().unwrap() + 12, first_end);

    // At another orchestrator than the one that renews, when half of her time is over.
    let half = async {
        while now() + 6 < first_end {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    within(MINUTE, half, "half of the time").await;
    let state = call(&second, "/approve", &bob).await;
    assert_eq!(state.status, 200, "{}", state.text());
    let state = state.json();
    let last_end = state["until"].as_u64().unwrap();
    assert_eq!((&state["owner"], &state["approved_by"], &state["fence"]), (&json!("ann"), &json!("bob"), &json!(fence)));
    assert!(last_end >= first_end + 6, "{state}");
    let off = async {
        let (mut asked, mut last_seen) = (now(), 0);
        while call(&second, "", &bob).await.json()["mode"] == "training" {
            last_seen = asked;
            // Nothing tells a caller that a lock is over but asking again.
            tokio::time::sleep(Duration::from_millis(100)).await;
            asked = now();
        }
        last_seen
    };
    let last_seen = within(MINUTE, off, "training mode to be off").await;
    assert!(last_seen > first_end, "bob's word counted for nothing: {last_seen}, {first_end}");
    assert!(last_seen <= last_end, "{last_seen}, {last_end}");
    first.service.line("\"reason\":\"max_hold\"").await;

    // Her time is used up, and his begins.
    let spent = call(&second, "/enable", &ann).await;
    assert_eq!((spent.status, spent.problem().unwrap().as_str()), (423, "training_locked"));
    assert!((1..=12 + 2 * 9).contains(&spent.header("retry-after").unwrap().parse::<u64>().unwrap()));
    let again = headgate(&["training", "enable", "--orchestrator", &format!("http://{}", first.at)]).variable("HEADGATE_TOKEN", &ann);
    let (status, words) = again.run(MINUTE).await;
    assert!(status.code() == Some(1) && words.contains("ask another admin to run `headgate training enable`"), "{words}");
    assert!(enabled(&second, &bob).await > fence);
    assert_eq!(call(&first, "", &ann).await.json()["approved_by"], Value::Null);
    assert_eq!(call(&second, "/disable", &bob).await.status, 200);

    let records = audited(kafka, &format!("{}.audit", house.topics), 10).await;
    // What the second orchestrator wrote, and what the first.
    let (second_writer, mut first_writer): (Vec<_>, Vec<_>) =
        records.iter().partition(|record| record.facts["writer"] == records[0].facts["writer"]);
    let acquired = first_writer.remove(0);
    let mut told: Vec<_> = second_writer.into_iter().map(said).collect();
    told.insert(1, said(acquired));
    told.extend(first_writer.into_iter().map(said));
    assert_eq!(
        told,
        [
            ("training.approve", "bob", "denied", "stale_fence"),
            ("training.lock.acquired", "ann", "allowed", ""),
            ("training.approve", "ann", "denied", "permission_denied"),
            ("training.approve", "carl", "denied", "permission_denied"),
            ("training.lock.approved", "bob", "allowed", ""),
            ("training.enable", "ann", "denied", "training_locked"),
            ("training.lock.acquired", "bob", "allowed", ""),
            ("training.lock.released", "bob", "allowed", ""),
            ("training.lock.released", "ann", "allowed", ""),
            ("training.enable", "ann", "denied", "training_locked"),
        ]
    );
    house.sound(&["first", "second"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_command_line_does_what_the_calls_do_and_says_what_helps() {
    let Some((_, mut house)) = shared("the_command_line_does_what_the_calls_do").await else { return };
    let desk = house.orchestrator("first").await;
    let tokens: HashMap<&str, String> =
        [("ann", house.token("ann").await), ("bob", house.token("bob").await), ("carl", house.token("carl").await)].into();
    let run = async |verb: &str, who: &str| {
        let url = format!("http://{}", desk.at);
        let program = headgate(&["training", verb, "--orchestrator", &url]);
        let program = if who == "bob" {
            let file = program.file("token.txt", format!("{}\n", tokens[who]));
            program.argument("--token-file").argument(file)
        } else {
            program.variable("HEADGATE_TOKEN", tokens.get(who).map_or(who, String::as_str))
        };
        let (status, said) = program.run(MINUTE).await;
        assert!(tokens.values().all(|token| !said.contains(token.as_str())), "{said}");
        (status.code().unwrap(), said)
    };
    let says = async |verb: &str, who: &str, code: i32, words: &[&str]| {
        let (status, said) = run(verb, who).await;
        assert!(status == code && words.iter().all(|word| said.contains(word)), "{verb} by {who}: {status}, {said}");
    };
    says("show", "ann", 0, &["training mode of acme is off"]).await;
    says("enable", "ann", 0, &["is on", "owner        ann", "until        20"]).await;
    says("enable", "bob", 1, &["423 training_locked", "headgate training show", "ask again in"]).await;
    says("enable", "carl", 1, &["403 permission_denied", "role"]).await;
    says("enable", "nonsense", 1, &["401 unauthenticated", "audience"]).await;
    says("approve", "ann", 1, &["403 permission_denied", "another admin"]).await;
    says("approve", "bob", 0, &["approved by  bob"]).await;
    says("disable", "bob", 0, &["is off"]).await;
    says("approve", "bob", 1, &["409 stale_fence", "off"]).await;
    house.redis.signal(Signal::Kill);
    house.redis.exited().await;
    says("show", "ann", 69, &["503 policy_registry_unavailable", "Redis"]).await;
    let gone = headgate(&["training", "show", "--orchestrator", &format!("http://{}", free_addr())]).variable("HEADGATE_TOKEN", "x");
    let (status, said) = gone.run(MINUTE).await;
    assert!(status.code() == Some(69) && said.contains("cannot connect"), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_judge_of_the_audit_reads_a_topic_and_finds_what_was_planted_there() {
    let Some((kafka, house)) = shared("the_judge_of_the_audit_reads_a_topic").await else { return };
    let desk = house.orchestrator("first").await;
    let ann = house.token("ann").await;
    enabled(&desk, &ann).await;
    assert_eq!(call(&desk, "/disable", &ann).await.status, 200);
    let named = headgate(&["training", "verify", "--ended", "--config"]).argument(house.folder.path().join("first.yaml"));
    let (status, said) = named.run(MINUTE).await;
    assert!(status.success() && said.contains("locks ended     1"), "{said}");

    // A chain that goes on elsewhere than its writer remembers: the last record was taken away and another put there.
    let topic = format!("{}.audit", house.topics);
    let records = kafka.read(&topic, 2).await;
    let first = audit::Record::read(records[0].value.as_bytes()).unwrap();
    let mut facts = first.facts.clone();
    facts["outcome"] = json!("denied");
    facts.remove("session");
    let (_, other) = audit::Record::after(Some((first.seq, first.hash)), now(), "training.status", "eve", facts.into()).unwrap();
    let cut = format!("{topic}.cut");
    kafka.topic(&cut, 1, &[]).await;
    kafka.write(&cut, &[("acme", &records[0].value), ("acme", str::from_utf8(&other).unwrap())]).await;
    let heads = house.folder.path().join("events-first/training.json");
    let judged = async |topic: &str| {
        let program = headgate(&["training", "verify", "--brokers", &house.kafka.to_string(), "--topic", topic]);
        let (status, said) = program.argument("--heads").argument(&heads).run(MINUTE).await;
        assert_eq!(status.code(), Some(1), "{said}");
        said
    };
    assert!(judged(&cut).await.contains("is not the one that its writer remembers"));
    // A record that is put in, and one under another tenant's key.
    kafka.write(&topic, &[("acme", &records[0].value), ("other", str::from_utf8(&other).unwrap())]).await;
    let said = judged(&topic).await;
    assert!(said.contains("it is there twice") && said.contains("its key is not its tenant"), "{said}");
    let (status, said) = headgate(&["training", "verify", "--brokers", &house.kafka.to_string(), "--topic", "none.such"]).run(MINUTE).await;
    assert_eq!(status.code(), Some(69), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_that_starts_without_redis_marks_nothing_until_it_has_seen_the_locks() {
    let Some((_, house)) = shared("a_gateway_that_starts_without_redis_marks_nothing").await else { return };
    let desk = house.orchestrator("first").await;
    let fence = enabled(&desk, &house.token("ann").await).await;
    // Its way to Redis, and to Redis alone, is broken.
    let way = Proxy::start(house.redis.addr()).await;
    way.both(Flow::ResetAfter(0));
    let gateway = house.gateway_beside(&desk, way.addr()).await;
    assert_eq!(house.turn(&gateway).await.fence, None);
    gateway.service.line("\"mode\":\"unknown\"").await;
    let shows = async |line: &str| ask(gateway.admin, &Request::get("/metrics")).await.unwrap().text().contains(line);
    assert!(shows("training_mode_unknown 1\n").await);
    way.both(Flow::Pass);
    let marked = async { while house.turn(&gateway).await.fence != Some(fence) {} };
    within(Duration::from_secs(10), marked, "a turn in training mode").await;
    assert!(shows("training_mode_unknown 0\n").await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_but_a_fresh_admin_of_this_provider_gets_in_and_every_attempt_is_on_record() {
    let Some((kafka, mut house)) = shared("nobody_but_a_fresh_admin_of_this_provider_gets_in").await else { return };
    let desk = house.orchestrator("first").await;
    let foreign = services::identity().await.unwrap_or_else(|missing| panic!("{missing}"));
    let (carl, stale) = (house.token("carl").await, house.token("stale").await);
    let (stranger, ann) = (token(foreign.addr(), "ann").await, house.token("ann").await);
    // Its last character holds bits that are no part of the signature: one in the middle is changed.
    let forged = ann.replace(&ann[ann.len() - 20..ann.len() - 10], "AAAAAAAAAA");
    for (token, status, code) in [
        (carl.as_str(), 403, "permission_denied"),
        (&stale, 401, "token_expired"),
        (&stranger, 401, "unauthenticated"),
        (&forged, 401, "unauthenticated"),
        (KEY, 401, "unauthenticated"),
        ("", 401, "unauthenticated"),
    ] {
        let reply = call(&desk, "/enable", token).await;
        assert_eq!((reply.status, reply.problem().unwrap().as_str()), (status, code), "{token}");
        assert_eq!(reply.header("www-authenticate").is_some(), status == 401);
    }
    assert_eq!(call(&desk, "", &carl).await.status, 403, "not even to look");
    assert_eq!(ask(desk.at, &Request::get("/v1/training/enable").bearer(&ann)).await.unwrap().status, 405);
    assert_eq!(ask(desk.at, &Request::get("/v1/trainings").bearer(&ann)).await.unwrap().status, 404);

    // The provider's keys change: a new one is asked for, and what the old one signed is over with it.
    let at = house.identity.addr();
    house.identity.signal(Signal::Kill);
    house.identity.exited().await;
    house.identity = services::identity_at(at, "second").await.unwrap().unwrap();
    let rotated = house.token("ann").await;
    let fence = enabled(&desk, &rotated).await;
    assert!(fence > 0);
    assert_eq!(call(&desk, "/disable", &ann).await.status, 401);

    let records = audited(kafka, &format!("{}.audit", house.topics), 9).await;
    let told: Vec<_> = records.iter().map(said).collect();
    let denied = |actor, code| ("training.enable", actor, "denied", code);
    assert_eq!(told[..2], [denied("carl", "permission_denied"), denied("stale", "token_expired")]);
    assert_eq!(told[2..6], [denied("unknown", "unauthenticated"); 4]);
    assert_eq!(
        told[6..],
        [
            ("training.status", "carl", "denied", "permission_denied"),
            ("training.lock.acquired", "ann", "allowed", ""),
            ("training.disable", "unknown", "denied", "unauthenticated"),
        ]
    );

    // A stranger cannot fill the audit: what is left out is counted.
    let at_once = futures_util::future::join_all((0..30).map(|_| call(&desk, "/enable", "nonsense"))).await;
    let limited = at_once.iter().filter(|reply| reply.status == 429).count();
    assert!(limited > 5, "{limited}");
    assert_eq!(call(&desk, "/disable", &rotated).await.status, 200);
    let records = audited(kafka, &format!("{}.audit", house.topics), 10 + 30 - limited).await;
    let unwritten: u64 = records.iter().filter_map(|record| record.facts.get("unwritten")?.as_u64()).sum();
    assert_eq!((records.len() - 10, unwritten), (30 - limited, limited as u64));
}

async fn rejected(house: &House, desk: &Running, fence: u64, status: u16, code: &str) {
    let reply = house.dispatch(desk, fence).await;
    assert_eq!((reply.status, reply.problem().unwrap().as_str()), (status, code), "{}", reply.text());
}

/// The fence that `token` gets as soon as whoever has the lock no longer has it, and how often it was refused before.
async fn waited_for(desk: &Running, token: &str) -> (u64, usize) {
    let acquired = async {
        for refused in 0.. {
            let reply = call(desk, "/enable", token).await;
            if reply.status == 200 {
                return (reply.json()["fence"].as_u64().unwrap(), refused);
            }
            assert!([423, 503].contains(&reply.status), "{}", reply.text());
            // Nothing tells a caller that a lock is over but asking again.
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        unreachable!("numbers do not end")
    };
    within(MINUTE, acquired, "the lock").await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_slept_through_the_end_of_its_lock_is_refused_with_its_fence() {
    let Some((kafka, house)) = shared("whoever_slept_through_the_end_of_its_lock_is_refused").await else { return };
    let (first, mut second) = (house.orchestrator("first").await, house.orchestrator("second").await);
    let (ann, bob) = (house.token("ann").await, house.token("bob").await);
    let old = enabled(&first, &ann).await;
    for desk in [&first, &second] {
        assert_eq!(house.dispatch(desk, old).await.status, 200);
        rejected(&house, desk, old + 1, 409, "stale_fence").await;
    }
    first.service.signal(Signal::Stop);
    let (new, refused) = waited_for(&second, &bob).await;
    assert!(new > old);
    first.service.signal(Signal::Continue);
    for desk in [&first, &second] {
        // Sent by somebody who believes that ann still holds the lock.
        rejected(&house, desk, old, 409, "stale_fence").await;
        let reply = house.dispatch(desk, new).await;
        assert_eq!(reply.status, 200, "{}", reply.text());
    }
    let state = call(&first, "", &ann).await.json();
    assert_eq!((&state["owner"], &state["fence"]), (&json!("bob"), &json!(new)));
    first.service.line("the lock was lost").await;

    // What was seen is remembered when nobody else does.
    second.service.signal(Signal::Kill);
    second.service.exited().await;
    let second = house.orchestrator("second").await;
    rejected(&house, &second, old, 409, "stale_fence").await;
    let (last, refused_again) = waited_for(&second, &ann).await;
    assert!(last > new);
    rejected(&house, &first, new, 409, "stale_fence").await;

    let records = audited(kafka, &format!("{}.audit", house.topics), 6 + refused + refused_again).await;
    let of = |action: &str| records.iter().filter(|record| record.action == action).map(|record| record.actor.as_str()).collect::<Vec<_>>();
    assert_eq!(of("training.lock.acquired"), ["ann", "bob", "ann"]);
    assert_eq!(of("training.lock.expired"), ["ann", "bob"], "each end is told once");
    assert_eq!(of("training.lock.lost"), ["ann"]);
    house.sound(&["first", "second"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_redis_nothing_runs_in_training_mode_and_a_forgotten_lock_must_be_taken_again() {
    let Some((_, mut house)) = shared("without_redis_nothing_runs_in_training_mode").await else { return };
    let desk = house.orchestrator("first").await;
    let gateway = house.gateway(&desk).await;
    let (ann, bob) = (house.token("ann").await, house.token("bob").await);
    let old = enabled(&desk, &ann).await;
    let marked = async { while house.turn(&gateway).await.fence != Some(old) {} };
    soon(marked, "a turn in training mode").await;
    let at = house.redis.addr();
    house.redis.signal(Signal::Kill);
    house.redis.exited().await;
    rejected(&house, &desk, old, 503, "policy_registry_unavailable").await;
    for (command, token) in [("/enable", &bob), ("/disable", &ann), ("", &ann)] {
        let reply = call(&desk, command, token).await;
        assert_eq!((reply.status, reply.problem().unwrap().as_str()), (503, "policy_registry_unavailable"));
    }
    // Once the lock must be over, turns run as always; until then, none is run that nobody can name the mode of.
    let enforced = async {
        loop {
            let reply = ask(gateway.at, &Request::turn("hi").bearer(KEY)).await.unwrap();
            if reply.status == 200 {
                return house.ring.verifier().open(&verdict(&reply), now()).unwrap().fence;
            }
            assert!([502, 503].contains(&reply.status), "{}", reply.text());
        }
    };
    assert_eq!(within(MINUTE, enforced, "a turn without Redis").await, None);

    // It comes back and has forgotten everything: locks, fences, who was there.
    house.redis = services::redis_at(at).await.unwrap().unwrap();
    let (new, _) = waited_for(&desk, &bob).await;
    assert!(new > old);
    rejected(&house, &desk, old, 409, "stale_fence").await;
    assert_eq!(house.dispatch(&desk, new).await.status, 200);
    desk.service.line("the lock was lost").await;
    house.sound(&["first"]).await;
}

/// The verdict of an answer that came whole.
fn verdict(reply: &Reply) -> String {
    let done = reply.text().lines().rev().find_map(|line| serde_json::from_str::<Value>(line.strip_prefix("data: ")?).ok()).unwrap();
    done["verdict"].as_str().unwrap_or_else(|| panic!("{done}")).to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_kafka_there_is_no_training_mode() {
    let test = "without_kafka_there_is_no_training_mode";
    let Some(mut kafka) = Kafka::start().await.or_skip(test) else { return };
    let Some(house) = House::new(&kafka).await.or_skip(test) else { return };
    let desk = house.orchestrator("first").await;
    let (ann, carl) = (house.token("ann").await, house.token("carl").await);
    let old = enabled(&desk, &ann).await;
    assert_eq!(call(&desk, "/disable", &ann).await.status, 200);
    kafka.kill().await;
    for token in [&ann, &carl] {
        let reply = call(&desk, "/enable", token).await;
        assert_eq!((reply.status, reply.problem().unwrap().as_str()), (503, "event_log_unavailable"), "{}", reply.text());
    }
    assert_eq!(call(&desk, "", &ann).await.json()["mode"], "enforce", "nobody was left with a lock");
    kafka.again().await;
    let (new, _) = waited_for(&desk, &ann).await;
    assert!(new > old);
    assert_eq!(house.dispatch(&desk, new).await.status, 200);
    house.sound(&["first"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_that_is_alone_keeps_lock_and_audit_itself_and_ends_training_mode_in_time() {
    let test = "a_process_that_is_alone_keeps_lock_and_audit_itself";
    let Some(identity) = services::identity().await.or_skip(test) else { return };
    let folder = tempfile::tempdir().unwrap();
    let model = Upstream::always(Script::stream(Answer::openai("demo", &["yes"]).cut(Cut::Whole))).await;
    let (at, desk, admin) = (free_addr(), free_addr(), free_addr());
    fs::write(folder.path().join("constitution.md"), "# Be kind\n\nBe kind to whoever asks.\n").unwrap();
    let config = format!(
        "listen: {at}\nadmin: {{ listen: {admin} }}\nworkers: 1\npolicy: {{ constitution: constitution.md, version: \"7\" }}\n\
         upstreams:\n  model: {{ protocol: openai, endpoints: [\"{}\"], health: {{ interval: 0s }} }}\n  desk: {{ protocol: orchestrator, endpoints: [\"http://{desk}\"], health: {{ interval: 0s }} }}\n\
         routes:\n  - path: /v1/chat/stream\n    upstream: desk\n    filters:\n      - auth: {{ keys: [{{ key: \"{}\", tenant: acme, subject: u1 }}] }}\n      - policy_headers\n\
         orchestrator:\n  listen: {desk}\n  upstream: model\n  events: {{ folder: events, cap: 16MiB }}\n  training: {{ issuer: \"http://{}\", audience: \"{AUDIENCE}\", ttl: 6s, max_hold: 9s, alone: true }}\n",
        model.url(),
        KeyHash::of(KEY),
        identity.addr(),
    );
    let file = folder.path().join("headgate.yaml");
    fs::write(&file, config).unwrap();
    let service = Program::at(env!("CARGO_BIN_EXE_headgate")).argument("run").argument(&file).start(Ready::Connects(at)).await;
    let house = Running { service, at: desk, admin };
    let ann = token(identity.addr(), "ann").await;
    let fence = enabled(&house, &ann).await;
    assert_eq!(fence, 1, "the record's number");
    let whole = stream(at, &Request::turn("hi").bearer(KEY), Kind::Client).await.unwrap().rest().await.unwrap();
    assert_eq!(whole.text(), "yes");
    let metrics = ask(admin, &Request::get("/metrics")).await.unwrap().text();
    assert!(metrics.contains("training_mode_state{tenant=\"acme\"} 1\n"), "{metrics}");
    // It is renewed beyond its time, and not beyond the longest that it may be held.
    house.service.line("\"reason\":\"max_hold\"").await;
    let off = async { while call(&house, "", &ann).await.json()["mode"] == "training" {} };
    soon(off, "training mode to be off").await;
    let mut told = Vec::new();
    audit::verify(&folder.path().join("events/training.jsonl"), |record| told.push(record.action.clone())).unwrap();
    assert_eq!(told, ["training.lock.acquired", "training.lock.released"]);
    let audit = folder.path().join("events/training.jsonl");
    let (status, said) = headgate(&["training", "verify", "--ended", "--alone"]).argument(audit).run(MINUTE).await;
    assert!(status.success(), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn redis_is_reached_over_tls_with_a_user_from_a_file_and_neither_is_shown() {
    let pair = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let (certificate, key) = (pair.cert.pem(), pair.signing_key.serialize_pem());
    let redis = services::redis_tls(&certificate, &key, "canary-7f3a").await.or_skip("redis_is_reached_over_tls_with_a_user_from_a_file");
    let Some(redis) = redis else { return };
    let (at, admin) = (free_addr(), free_addr());
    let program = Program::at(env!("CARGO_BIN_EXE_headgate"));
    program.file("redis-url", format!("rediss://headgate:canary-7f3a@localhost:{}/0\n", redis.addr().port()));
    program.file("ca.pem", certificate);
    let config = program.file(
        "headgate.yaml",
        format!(
            "listen: {at}\nadmin: {{ listen: \"{admin}\" }}\nworkers: 1\nredis: {{ url: \"file:redis-url\", ca: ca.pem }}\nobservability: {{ level: debug }}\n\
             upstreams: {{ a: {{ protocol: openai, endpoints: [\"http://127.0.0.1:9\"] }} }}\nroutes: [{{ path: /v1/chat/stream, upstream: a }}]\n"
        ),
    );
    let service = program.argument("run").argument(config).start(Ready::Connects(at)).await;
    service.line("redis is there").await;
    let metrics = async { while !ask(admin, &Request::get("/metrics")).await.unwrap().text().contains("training_mode_unknown 0\n") {} };
    soon(metrics, "the locks to be read").await;
    assert!(!service.output().contains("canary"), "{}", service.output());
}
