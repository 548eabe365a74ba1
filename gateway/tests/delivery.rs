//! What the user really got reaches the event log: from a real gateway, to a scripted orchestrator and to a real one, either of
//! them killed at will.

use std::{
    collections::BTreeSet,
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime},
};

use headgate_contracts::TurnId;
use headgate_filters::auth::KeyHash;
use headgate_orchestrator::events::{Entry, Follow, Judged, verify};
use headgate_policy::{Decision, Direction, Ring};
use headgate_testkit::{
    answer::{Judge, Kind},
    client::{Events, Http1, Request, ask, stream},
    dialect::{Answer, Cut},
    services::{Program, Ready, Service, Signal, free_addr},
    soon,
    upstream::{Framing, Request as Asked, Script, Upstream},
};
use serde_json::Value;

const KEY: &str = "hg_0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

/// How often a gateway is killed.
const KILLS: usize = 8;

fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs()
}

/// A folder with the configs and keys of a gateway and an orchestrator.
struct House {
    folder: tempfile::TempDir,
    ring: Ring,
}

/// A program of ours that runs.
struct Running {
    service: Service,
    clients: Option<SocketAddr>,
    admin: Option<SocketAddr>,
    orchestrator: Option<SocketAddr>,
}

impl Running {
    async fn killed(mut self) {
        self.service.signal(Signal::Kill);
        self.service.exited().await;
    }

    async fn stopped(mut self) {
        self.service.signal(Signal::Terminate);
        assert!(self.service.exited().await.success(), "{}", self.service.output());
    }

    /// Waits until a counter of `/metrics` stands at so much.
    async fn counts(&self, series: &str, least: u64) {
        let counted = async {
            loop {
                let text = ask(self.admin.unwrap(), &Request::get("/metrics")).await.unwrap().text();
                let value = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')?.parse::<f64>().ok());
                if value.unwrap_or_default() as u64 >= least {
                    return;
                }
            }
        };
        soon(counted, series).await;
    }
}

impl House {
    fn new() -> House {
        let folder = tempfile::tempdir().unwrap();
        let ring = Ring::generate(now()).unwrap();
        ring.save(&folder.path().join("ring.json")).unwrap();
        fs::write(folder.path().join("gateway.jwks.json"), ring.jwks()).unwrap();
        fs::write(folder.path().join("constitution.md"), "# Be kind\n\nBe kind to whoever asks.\n").unwrap();
        fs::write(folder.path().join("deny.txt"), "bluebird\n").unwrap();
        House { folder, ring }
    }

    fn events(&self) -> PathBuf {
        self.folder.path().join("events")
    }

    async fn started(&self, arguments: &[&str], config: &str) -> Running {
        let file = self.folder.path().join(format!("{}.yaml", arguments[0]));
        fs::write(&file, config).unwrap();
        let program = Program::at(env!("CARGO_BIN_EXE_headgate")).arguments(arguments.iter().copied()).argument(file);
        let service = program.start(Ready::Line("\"running\"".to_owned())).await;
        let told: Value = serde_json::from_str(&service.line("\"running\"").await).unwrap();
        let at = |name: &str| told["fields"][name].as_str().or(told[name].as_str()).map(|at| at.parse().unwrap());
        Running { clients: at("clients"), admin: at("admin"), orchestrator: at("orchestrator"), service }
    }

    /// A gateway before these orchestrators. The verdicts' filter stands below the one that refuses.
    /// Its upstream has the settings `upstream` too.
    async fn gateway_with(&self, upstream: &str, desk: &Running) -> Running {
        let protocol = format!("orchestrator, {upstream}");
        self.gateway(&protocol, &[format!("http://{}", desk.orchestrator.unwrap())], "").await
    }

    async fn gateway(&self, protocol: &str, desks: &[String], spool: &str) -> Running {
        let config = format!(
            "listen: 127.0.0.1:0\nadmin: {{ listen: 127.0.0.1:0 }}\nworkers: 1\npolicy: {{ constitution: constitution.md, version: \"7\", key: \"file:ring.json\" }}\n{spool}\
             upstreams:\n  desk: {{ protocol: {protocol}, endpoints: {desks:?}, health: {{ interval: 0s }} }}\n{}",
            routes("desk")
        );
        self.started(&["run"], &config).await
    }

    async fn orchestrator(&self, model: &Upstream, listen: &str, unknown_after: &str) -> Running {
        let config = format!(
            "listen: 127.0.0.1:0\nadmin: {{ listen: \"off\" }}\npolicy: {{ constitution: constitution.md, version: \"7\" }}\nupstreams:\n  model: {{ protocol: openai, endpoints: [\"{}\"], health: {{ interval: 0s }} }}\n\
             orchestrator:\n  listen: {listen}\n  upstream: model\n  keys: file:gateway.jwks.json\n  events: {{ folder: events, cap: 16MiB, unknown_after: {unknown_after} }}\n{}",
            model.url(),
            // Not run here, but the lists of its rules are part of the constitution.
            routes("model")
        );
        self.started(&["orchestrator"], &config).await
    }

    /// The events of a turn, as `type` and `data`.
    fn kept(&self, turn: &str) -> Vec<(String, Value)> {
        let turn: TurnId = turn.parse().unwrap();
        let event = |entry: Entry| serde_json::from_slice::<Value>(&entry.event).unwrap();
        let events = entries(&self.events()).into_iter().filter(|entry| entry.turn == turn).map(event);
        events.map(|event| (event["type"].as_str().unwrap().to_owned(), event["data"].clone())).collect()
    }

    /// Waits until the log says of a turn what its user got.
    async fn settled(&self, turn: &str) -> Vec<(String, Value)> {
        let settled = async {
            loop {
                let events = self.kept(turn);
                if events.last().is_some_and(|(kind, _)| kind == "delivery.v1") {
                    return events;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        soon(settled, "the log to say what the user got").await
    }

    fn good(&self) -> Judged {
        let judged = verify(&self.events()).unwrap();
        assert!(judged.is_good(), "{:?}", judged.violations);
        judged
    }
}

fn routes(upstream: &str) -> String {
    let hash = KeyHash::of(KEY);
    format!(
        "routes:\n  - path: /v1/chat/stream\n    upstream: {upstream}\n    filters:\n      - auth: {{ keys: [{{ key: \"{hash}\", tenant: acme, subject: u1 }}] }}\n      \
         - moderation: {{ deny: [deny.txt] }}\n      - policy_headers\n"
    )
}

fn entries(folder: &Path) -> Vec<Entry> {
    let mut log = Follow::open(folder).unwrap();
    std::iter::from_fn(|| log.next_entry().unwrap()).collect()
}

fn turn(text: &str) -> Request {
    Request::turn(text).bearer(KEY)
}

async fn asked(gateway: &Running, text: &str) -> Events {
    stream(gateway.clients.unwrap(), &turn(text), Kind::Client).await.unwrap()
}

fn taken() -> Script {
    Script::new().head(202, Framing::Length(0), &[]).again()
}

/// An orchestrator that answers every turn with `answer` and takes what it is told.
async fn desk(answer: impl Fn() -> Script + Send + Sync + 'static) -> Upstream {
    Upstream::answering(move |request: &Asked| if request.target.ends_with("/stream") { answer() } else { taken() }).await
}

fn whole(texts: &[&str]) -> Script {
    Script::new().sse().send_all(Answer::conversation("demo", texts).events()).end().again()
}

/// The first report that an orchestrator is told, as its path ends.
async fn told(desk: &Upstream, path: &str) -> Asked {
    let told = async {
        loop {
            let found = desk.requests().into_iter().find(|request| request.target.ends_with(path));
            match found {
                Some(request) => return request,
                None => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        }
    };
    soon(told, "the orchestrator to be told").await
}

#[tokio::test]
async fn what_the_user_got_is_told_over_the_exact_bytes_with_the_verdict_that_the_user_has() {
    let (house, desk) = (House::new(), desk(|| whole(&["one ", "two"])).await);
    let gateway = house.gateway("orchestrator", &[desk.url()], "").await;
    let said = asked(&gateway, "hello").await.rest().await.unwrap();
    let report = told(&desk, "/delivery").await;
    assert_eq!(report.target, format!("/v1/conversation/turns/{}/delivery", said.turn_id()));
    let body = report.json();
    assert_eq!(
        (body["outcome"].as_str(), body["last_seq"].as_u64(), body["text_bytes"].as_u64()),
        (Some("delivered"), said.end().seq, Some(7))
    );
    assert_eq!((body["verdict"].as_str(), body["tenant"].as_str()), (Some(said.verdict()), Some("acme")));
    let claims = house.ring.verifier().open(report.header("policy-verdict").unwrap(), now()).unwrap();
    assert_eq!((claims.dir, claims.dec, claims.turn.as_str()), (Direction::Output, Decision::Allow, said.turn_id()));
    assert_eq!(claims.bdg, headgate_policy::Digest::of(&report.body));
    assert_eq!(claims.htu.as_deref(), Some(report.target.as_str()));
    assert!(!String::from_utf8_lossy(&report.body).contains("two"));
    gateway.counts("headgate_reports_total{call=\"delivery\",result=\"told\"}", 1).await;
    gateway.stopped().await;
}

#[tokio::test]
async fn an_answer_that_policy_cut_is_told_as_denied_and_one_that_its_user_left_as_cut_with_what_it_took() {
    let house = House::new();
    let begun = || Script::new().sse().send_all(Answer::conversation("demo", &["one ", "two "]).events()[..3].to_vec());
    let desk = Upstream::answering(move |request: &Asked| match &request.target {
        target if !target.ends_with("/stream") => taken(),
        _ if String::from_utf8_lossy(&request.body).contains("sing") => whole(&["a blue", "bird sings"]),
        _ => begun().stall(),
    })
    .await;
    let gateway = house.gateway("orchestrator", &[desk.url()], "").await;
    let said = asked(&gateway, "sing").await.rest().await.unwrap();
    let body = told(&desk, &format!("{}/delivery", said.turn_id())).await.json();
    assert_eq!(
        (body["outcome"].as_str(), body["code"].as_str(), body["verdict"].as_str()),
        (Some("denied"), Some("policy_denied"), Some(said.verdict()))
    );

    let mut events = asked(&gateway, "hello").await;
    let (mut last, mut id) = (0, String::new());
    while last < 2 {
        let event = events.expect().await;
        last = event.seq.unwrap();
        if event.name == "open" {
            id = event.text("turn_id").unwrap().to_owned();
        }
    }
    drop(events);
    let body = told(&desk, &format!("{id}/delivery")).await.json();
    assert_eq!((body["outcome"].as_str(), body["code"].as_str(), body["last_seq"].as_u64()), (Some("cut"), Some("client_closed"), Some(2)));
    gateway.stopped().await;
}

#[tokio::test]
async fn a_prompt_that_is_refused_is_told_with_a_signed_no_and_who_is_nobody_is_not() {
    let (house, desk) = (House::new(), desk(|| whole(&["never"])).await);
    let gateway = house.gateway("orchestrator", &[desk.url()], "").await;
    let stranger = ask(gateway.clients.unwrap(), &Request::turn("bluebird")).await.unwrap();
    assert_eq!(stranger.status, 401);
    let refused = ask(gateway.clients.unwrap(), &turn("where is the bluebird")).await.unwrap();
    assert_eq!((refused.status, refused.problem().unwrap().as_str()), (403, "policy_denied"));
    let report = told(&desk, "/verdict").await;
    assert!(report.target.contains(refused.json()["turn_id"].as_str().unwrap()));
    let claims = house.ring.verifier().open(report.header("policy-verdict").unwrap(), now()).unwrap();
    assert_eq!((claims.dir, claims.dec, claims.tid.as_str(), claims.sub.as_str()), (Direction::Input, Decision::Deny, "acme", "u1"));
    assert_eq!(claims.cat, ["tenant_policy"]);
    gateway.stopped().await;
    assert_eq!(desk.requests().len(), 1, "nothing was dispatched, and nothing is told of who was not let in");
}

#[tokio::test]
async fn where_a_model_answers_itself_nobody_is_told() {
    let house = House::new();
    let model = Upstream::always(Script::stream(Answer::openai("demo", &["yes"]).cut(Cut::Whole))).await;
    let gateway = house.gateway("openai", &[model.url()], "").await;
    asked(&gateway, "hello").await.rest().await.unwrap();
    assert_eq!(ask(gateway.clients.unwrap(), &turn("bluebird")).await.unwrap().status, 403);
    gateway.stopped().await;
    assert_eq!(model.requests().len(), 1);
}

#[tokio::test]
async fn what_an_orchestrator_cannot_take_waits_for_it_even_across_a_start_of_the_gateway() {
    let house = House::new();
    let away = Arc::new(AtomicUsize::new(1));
    let asks = away.clone();
    let desk = Upstream::answering(move |request: &Asked| match request.target.ends_with("/stream") {
        true => whole(&["yes"]),
        false if asks.load(Ordering::SeqCst) > 0 => Script::new().head(503, Framing::Length(0), &[]).again(),
        false => taken(),
    })
    .await;
    let gateway = house.gateway("orchestrator", &[desk.url()], "spool: spool\n").await;
    let mut ids = Vec::new();
    for _ in 0..3 {
        ids.push(asked(&gateway, "hello").await.rest().await.unwrap().turn_id().to_owned());
    }
    // Between two tries, all of them wait: on disk, by then.
    gateway.counts("headgate_reports_waiting", 3).await;
    gateway.killed().await;
    // What it said last has been read.
    desk.idle().await;
    let before = desk.requests().len();
    away.store(0, Ordering::SeqCst);
    let gateway = house.gateway("orchestrator", &[desk.url()], "spool: spool\n").await;
    gateway.counts("headgate_reports_total{call=\"delivery\",result=\"told\"}", 3).await;
    let again: Vec<String> = desk.requests()[before..].iter().map(|request| request.target.clone()).collect();
    let mut expected: Vec<String> = ids.iter().map(|id| format!("/v1/conversation/turns/{id}/delivery")).collect();
    expected.sort();
    let mut told = again.clone();
    told.sort();
    assert_eq!(told, expected);
    gateway.stopped().await;
    let spool = fs::read_dir(house.folder.path().join("spool")).unwrap();
    let left: Vec<String> = spool.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    assert_eq!(left, ["lock"], "what was told is gone from the disk");
}

#[tokio::test]
async fn a_gateway_killed_again_and_again_while_it_tells_has_told_everything_in_the_end() {
    let house = House::new();
    let hears = Arc::new(AtomicBool::new(false));
    let heard = hears.clone();
    let desk = Upstream::answering(move |request: &Asked| match request.target.ends_with("/stream") {
        true => whole(&["yes"]),
        false if heard.load(Ordering::SeqCst) => taken(),
        // It is under way for as long as the gateway lives: nothing has failed, and nothing was heard.
        false => Script::new().stall(),
    })
    .await;
    let mut expected = BTreeSet::new();
    for _ in 0..KILLS {
        let gateway = house.gateway("orchestrator", &[desk.url()], "spool: spool\n").await;
        for _ in 0..2 {
            let said = asked(&gateway, "hello").await.rest().await.unwrap();
            expected.insert(format!("/v1/conversation/turns/{}/delivery", said.turn_id()));
        }
        let refused = ask(gateway.clients.unwrap(), &turn("bluebird")).await.unwrap();
        expected.insert(format!("/v1/conversation/turns/{}/verdict", refused.json()["turn_id"].as_str().unwrap()));
        for report in &expected {
            told(&desk, report).await;
        }
        gateway.killed().await;
    }
    desk.idle().await;
    hears.store(true, Ordering::SeqCst);
    let before = desk.requests().len();
    let gateway = house.gateway("orchestrator", &[desk.url()], "spool: spool\n").await;
    gateway.counts("headgate_reports_total{call=\"delivery\",result=\"told\"}", 2 * KILLS as u64).await;
    gateway.counts("headgate_reports_total{call=\"verdict\",result=\"told\"}", KILLS as u64).await;
    gateway.killed().await;
    let told: Vec<String> = desk.requests().into_iter().skip(before).map(|request| request.target).collect();
    assert_eq!((told.len(), told.into_iter().collect::<BTreeSet<_>>()), (expected.len(), expected));
    // What was told is not told again, although nobody had time to clean up.
    let before = desk.requests().len();
    let gateway = house.gateway("orchestrator", &[desk.url()], "spool: spool\n").await;
    let last = asked(&gateway, "hello").await.rest().await.unwrap().turn_id().to_owned();
    gateway.counts("headgate_reports_total{call=\"delivery\",result=\"told\"}", 1).await;
    gateway.stopped().await;
    let told: Vec<String> = desk.requests().into_iter().skip(before + 1).map(|request| request.target).collect();
    assert!(told == [format!("/v1/conversation/turns/{last}/delivery")], "{told:?}");
}

#[tokio::test]
async fn whoever_took_the_turn_is_told_and_where_nobody_knows_everybody_is_asked() {
    let house = House::new();
    let unknowing = Upstream::answering(|request: &Asked| {
        let not_taken = [("turn-taken", "?0")];
        let status = if request.target.ends_with("/stream") { (503, &not_taken[..]) } else { (404, &[][..]) };
        Script::new().head(status.0, Framing::Length(0), status.1).again()
    })
    .await;
    let knowing = desk(|| whole(&["yes"])).await;
    let gateway = house.gateway("orchestrator", &[unknowing.url(), knowing.url()], "").await;
    for _ in 0..4 {
        asked(&gateway, "hello").await.rest().await.unwrap();
    }
    assert_eq!(ask(gateway.clients.unwrap(), &turn("bluebird")).await.unwrap().status, 403);
    told(&knowing, "/verdict").await;
    gateway.counts("headgate_reports_total{call=\"delivery\",result=\"told\"}", 4).await;
    gateway.stopped().await;
    assert!(!unknowing.requests().iter().any(|request| request.target.ends_with("/delivery")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_that_policy_cuts_midway_is_a_denied_turn_over_either_hop() {
    let said = Answer::openai("demo", &["a blue", "bird ", "sings"]).events();
    for hop in ["events", "websocket"] {
        let (house, said) = (House::new(), said.clone());
        // The model would go on for ever: the turn has no end of its own.
        let model = Upstream::answering(move |_: &Asked| Script::new().sse().send_all(said[..4].to_vec()).stall()).await;
        let orchestrator = house.orchestrator(&model, "127.0.0.1:0", "1min").await;
        let gateway = house.gateway_with(&format!("hop: {hop}"), &orchestrator).await;
        let answer = asked(&gateway, "sing").await.rest().await.unwrap();
        assert_eq!(answer.outcome(), "blocked");
        let events = house.settled(answer.turn_id()).await;
        let kinds: Vec<&str> = events.iter().map(|(kind, _)| kind.as_str()).collect();
        assert_eq!(kinds, ["turn.accepted.v1", "verdict.input.v1", "turn.denied.v1", "verdict.output.v1", "delivery.v1"], "{hop}");
        assert_eq!((events[2].1["code"].as_str(), events[3].1["decision"].as_str()), (Some("policy_denied"), Some("deny")));
        assert_eq!(events[4].1["outcome"], "denied");
        gateway.stopped().await;
        orchestrator.stopped().await;
        house.good();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_that_is_killed_leaves_a_turn_ended_and_what_its_user_got_unknown() {
    let house = House::new();
    let model = Upstream::always(Script::new().read().sse().send(Answer::openai("demo", &["yes"]).events()[..2].concat()).stall()).await;
    let orchestrator = house.orchestrator(&model, "127.0.0.1:0", "1s").await;
    let gateway = house.gateway("orchestrator", &[format!("http://{}", orchestrator.orchestrator.unwrap())], "").await;
    let mut client = Http1::connect(gateway.clients.unwrap()).await;
    client.send(&turn("hello")).await;
    let mut events = client.events(Judge::new(Kind::Client)).await.unwrap();
    let id = events.expect().await.text("turn_id").unwrap().to_owned();
    gateway.killed().await;
    let events = house.settled(&id).await;
    let kinds: Vec<&str> = events.iter().map(|(kind, _)| kind.as_str()).collect();
    assert_eq!(kinds, ["turn.accepted.v1", "verdict.input.v1", "turn.cancelled.v1", "delivery.v1"]);
    assert_eq!(events[3].1["outcome"], "unknown");
    orchestrator.stopped().await;
    let judged = house.good();
    assert_eq!((judged.settled, judged.untold, judged.owed.len()), (1, 1, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_orchestrator_that_is_killed_hears_after_its_start_what_users_got_meanwhile() {
    let house = House::new();
    let model = Upstream::answering(|request: &Asked| match String::from_utf8_lossy(&request.body).contains("wait") {
        true => Script::new().sse().send(Answer::openai("demo", &["yes"]).events()[..2].concat()).stall(),
        false => Script::new().sse().send_all(Answer::openai("demo", &["yes"]).events()).end().again(),
    })
    .await;
    let at = free_addr();
    let orchestrator = house.orchestrator(&model, &at.to_string(), "1min").await;
    let gateway = house.gateway("orchestrator", &[format!("http://{at}")], "spool: spool\n").await;
    let whole = asked(&gateway, "hello").await.rest().await.unwrap();
    house.settled(whole.turn_id()).await;
    let mut cut = asked(&gateway, "wait").await;
    while cut.expect().await.name != "text" {}
    let cut_id = cut.so_far().turn_id().to_owned();
    orchestrator.killed().await;
    let said = cut.rest().await.unwrap();
    assert_eq!(said.error(), Some("upstream_reset"));
    // While it is away a prompt is refused: that is told afterwards, too.
    let refused = ask(gateway.clients.unwrap(), &turn("bluebird")).await.unwrap();
    let refused = refused.json()["turn_id"].as_str().unwrap().to_owned();
    gateway.counts("headgate_reports_waiting", 1).await;

    let orchestrator = house.orchestrator(&model, &at.to_string(), "1min").await;
    let events = house.settled(&cut_id).await;
    let kinds: Vec<&str> = events.iter().map(|(kind, _)| kind.as_str()).collect();
    assert_eq!(kinds, ["turn.accepted.v1", "verdict.input.v1", "turn.failed.v1", "verdict.output.v1", "delivery.v1"]);
    assert_eq!((events[2].1["reason"].as_str(), events[4].1["outcome"].as_str()), (Some("crash"), Some("cut")));
    gateway.counts("headgate_reports_total{call=\"verdict\",result=\"told\"}", 1).await;
    assert_eq!(house.kept(&refused).iter().map(|(kind, _)| kind.as_str()).collect::<Vec<_>>(), ["verdict.input.v1", "turn.denied.v1"]);
    gateway.stopped().await;
    orchestrator.stopped().await;
    let judged = house.good();
    assert_eq!((judged.begun, judged.settled, judged.untold, judged.refused, judged.owed.len()), (2, 2, 0, 1, 0));
}
