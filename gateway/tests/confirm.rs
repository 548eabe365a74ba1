//! A person is asked before a tool is called: a real gateway, a real orchestrator and a scripted model, over both hops and both of the
//! transports that clients have.

use std::{fs, net::SocketAddr, process::Stdio, time::Duration};

use headgate_contracts::TurnId;
use headgate_filters::auth::KeyHash;
use headgate_orchestrator::events::{Entry, Follow, verify};
use headgate_testkit::{
    answer::{Event, Judge, Kind, Transcript},
    client::{Events, Http1, Reply, Request, ask, stream},
    services::{Program, Ready, Service},
    soon,
    upstream::{Script, Upstream},
    ws::Ws,
};
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;

/// Of the person, and of somebody else.
const KEYS: [&str; 2] = [
    "hg_0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
    "hg_fedcba9876543210fedcba9876543210fedcba9876543210fedcba9876543210",
];
const HOPS: [&str; 2] = ["events", "websocket"];

/// One chunk of a model's stream.
fn chunk(delta: Value, finish: Option<&str>) -> String {
    let chunk = json!({"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "demo",
        "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]});
    format!("data: {chunk}\n\n")
}

/// A model that says `Let me. ` and then makes these calls, their arguments in two pieces.
fn calls(calls: &[(&str, &str)]) -> Script {
    let mut pieces = vec![chunk(json!({"role": "assistant", "content": "Let me. "}), None)];
    for (index, (name, arguments)) in calls.iter().enumerate() {
        let (first, second) = arguments.split_at(arguments.len() / 2);
        let begun =
            json!({"index": index, "id": format!("call_{index}"), "type": "function", "function": {"name": name, "arguments": first}});
        pieces.push(chunk(json!({ "tool_calls": [begun] }), None));
        pieces.push(chunk(json!({ "tool_calls": [{"index": index, "function": {"arguments": second}}] }), None));
    }
    pieces.push(chunk(json!({}), Some("tool_calls")));
    pieces.push("data: [DONE]\n\n".to_owned());
    Script::new().read().sse().send_all(pieces).end().again()
}

/// A gateway before an orchestrator, as two programs of ours.
struct House {
    folder: tempfile::TempDir,
    clients: SocketAddr,
    admin: SocketAddr,
    _programs: [Service; 2],
    _model: Upstream,
}

impl House {
    async fn new(hop: &str, within: &str, model: Script) -> House {
        let folder = tempfile::tempdir().unwrap();
        let model = Upstream::always(model).await;
        let ring = headgate_policy::Ring::generate(now()).unwrap();
        ring.save(&folder.path().join("ring.json")).unwrap();
        fs::write(folder.path().join("gateway.jwks.json"), ring.jwks()).unwrap();
        fs::write(folder.path().join("constitution.md"), "# Be kind\n\nBe kind to whoever asks.\n").unwrap();
        let desk = format!(
            "listen: 127.0.0.1:0\nadmin: {{ listen: \"off\" }}\npolicy: {{ constitution: constitution.md, version: \"7\" }}\n\
             upstreams:\n  model: {{ protocol: openai, endpoints: [\"{}\"], health: {{ interval: 0s }} }}\n\
             orchestrator:\n  listen: 127.0.0.1:0\n  upstream: model\n  keys: file:gateway.jwks.json\n  confirm: {{ tools: [pay], within: {within} }}\n  \
             events: {{ folder: events, cap: 16MiB, unknown_after: 5min }}\n{}",
            model.url(),
            routes("model")
        );
        let desk = started(&folder, "orchestrator", &desk).await;
        let gateway = format!(
            "listen: 127.0.0.1:0\nadmin: {{ listen: 127.0.0.1:0 }}\nworkers: 2\npolicy: {{ constitution: constitution.md, version: \"7\", key: \"file:ring.json\" }}\n\
             upstreams:\n  desk: {{ protocol: orchestrator, hop: {hop}, endpoints: [\"http://{}\"], health: {{ interval: 0s }}, timeouts: {{ idle: 3s }} }}\n{}",
            at(&desk, "orchestrator").await,
            routes("desk")
        );
        let gateway = started(&folder, "run", &gateway).await;
        let (clients, admin) = (at(&gateway, "clients").await, at(&gateway, "admin").await);
        House { folder, clients, admin, _programs: [gateway, desk], _model: model }
    }

    async fn asked(&self) -> Events {
        stream(self.clients, &Request::turn("pay him").bearer(KEYS[0]), Kind::Client).await.unwrap()
    }

    /// What the gateway says to an answer.
    async fn say(&self, key: &str, turn: &str, id: &str, accept: bool) -> Reply {
        let request = Request::post(&format!("/v1/chat/stream/{turn}/confirm"), &json!({"id": id, "accept": accept}));
        ask(self.clients, &request.bearer(key)).await.unwrap()
    }

    /// How a turn ended, by the log: the last event but the one on its delivery.
    async fn ended(&self, turn: &str) -> (String, Value) {
        let turn: TurnId = turn.parse().unwrap();
        let settled = async {
            loop {
                let mut log = Follow::open(&self.folder.path().join("events")).unwrap();
                let of_turn = |entry: &Entry| entry.turn == turn;
                let all = std::iter::from_fn(|| log.next_entry().unwrap()).filter(of_turn);
                let all: Vec<Value> = all.map(|entry| serde_json::from_slice(&entry.event).unwrap()).collect();
                if all.last().is_some_and(|event| event["type"] == "delivery.v1") {
                    let ends = |event: &&Value| {
                        ["completed", "cancelled", "denied", "failed"].iter().any(|end| event["type"] == format!("turn.{end}.v1"))
                    };
                    let end = all.iter().find(ends).unwrap();
                    return (end["type"].as_str().unwrap().to_owned(), end["data"].clone());
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let ended = soon(settled, "the log to say how the turn ended").await;
        assert!(verify(&self.folder.path().join("events")).unwrap().is_good());
        ended
    }
}

fn now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs()
}

fn routes(upstream: &str) -> String {
    let [person, other] = KEYS.map(KeyHash::of);
    let mut routes = "routes:\n".to_owned();
    for (path, more) in [("/v1/chat/stream", "      - cancellation: { on_disconnect: grace 30s }\n"), ("/v1/chat/completions", "")] {
        routes += &format!(
            "  - path: {path}\n    upstream: {upstream}\n    limits: {{ heartbeat: 1s }}\n    filters:\n{more}      - auth: {{ keys: [{{ key: \"{person}\", tenant: acme, subject: u1 }}, \
             {{ key: \"{other}\", tenant: other, subject: u1 }}] }}\n      - moderation: {{ deny: [{{ phrase: bluebird }}], mask: [email] }}\n      - policy_headers\n"
        );
    }
    routes
}

async fn started(folder: &tempfile::TempDir, command: &str, config: &str) -> Service {
    let file = folder.path().join(format!("{command}.yaml"));
    fs::write(&file, config).unwrap();
    let program = Program::at(env!("CARGO_BIN_EXE_headgate")).argument(command).argument(file);
    program.start(Ready::Line("\"running\"".to_owned())).await
}

async fn at(service: &Service, name: &str) -> SocketAddr {
    let told: Value = serde_json::from_str(&service.line("\"running\"").await).unwrap();
    told["fields"][name].as_str().or(told[name].as_str()).unwrap().parse().unwrap()
}

/// Reads on to the question: its turn, and the question.
async fn question(events: &mut Events) -> (String, Event) {
    loop {
        let event = events.expect().await;
        if event.name == "confirm" {
            let turn = events.head.header("x-headgate-turn").unwrap().to_owned();
            return (turn, event);
        }
    }
}

fn names(transcript: &Transcript) -> Vec<&str> {
    let mut names: Vec<&str> = transcript.events.iter().map(|event| event.name.as_str()).collect();
    names.dedup();
    names
}

#[tokio::test]
async fn a_call_comes_after_its_persons_yes_over_both_hops_and_both_transports_and_not_before() {
    for hop in HOPS {
        let house = House::new(hop, "60s", calls(&[("look", "{\"at\":1}"), ("pay", "{\"amount\":5}")])).await;
        let mut events = house.asked().await;
        let (turn, asked) = question(&mut events).await;
        assert_eq!(asked.data, json!({"id": "q1", "prompt": "Call pay with {\"amount\":5}?", "tool": "pay"}));
        let before: Vec<&Event> = events.so_far().named("tool").collect();
        assert!(matches!(before[..], [Event { data, .. }] if data["name"] == "look"), "{before:?}");
        assert_eq!(house.say(KEYS[0], &turn, "q1", true).await.status, 202);
        let said = events.rest().await.unwrap();
        assert_eq!(names(&said), ["open", "text", "tool", "text", "confirm", "tool", "text", "done"]);
        assert_eq!(
            (said.text_in(0, "tool_arguments").as_str(), said.end().data["finish"].as_str()),
            ("{\"at\":1}{\"amount\":5}", Some("tool_calls"))
        );
        assert_eq!(house.ended(&turn).await.0, "turn.completed.v1");

        let mut socket = Ws::open(house.clients, &Request::get("/v1/chat/stream").bearer(KEYS[0])).await.unwrap();
        socket.turn("r", "pay him").await;
        let turn = socket.opened("r").await.unwrap();
        loop {
            let frame = socket.next().await.unwrap().unwrap();
            if frame.event.name == "confirm" {
                break;
            }
        }
        socket.send(&json!({"type": "confirm", "turn_id": turn, "id": "q1", "accept": true})).await;
        let said = socket.finish(&turn).await.unwrap();
        assert_eq!(names(&said), ["open", "text", "tool", "text", "confirm", "tool", "text", "done"]);
        socket.close(1000, "").await.unwrap();
    }
}

#[tokio::test]
async fn after_a_no_nothing_of_the_call_is_passed_on_and_the_log_says_declined() {
    for hop in HOPS {
        let house = House::new(hop, "60s", calls(&[("pay", "{\"amount\":5}")])).await;
        let mut events = house.asked().await;
        let (turn, _) = question(&mut events).await;
        assert_eq!(house.say(KEYS[0], &turn, "q1", false).await.status, 202);
        let said = events.rest().await.unwrap();
        assert_eq!(names(&said), ["open", "text", "confirm", "error"]);
        assert_eq!((said.end().data["code"].as_str(), said.end().data["retryable"].as_bool()), (Some("declined"), Some(false)));
        let (kind, data) = house.ended(&turn).await;
        assert_eq!((kind.as_str(), data["reason"].as_str()), ("turn.cancelled.v1", Some("declined")));
        // It is no failure, on either side.
        let metrics = ask(house.admin, &Request::get("/metrics")).await.unwrap().text();
        assert!(metrics.lines().any(|line| line.contains("cancelled") && line.contains("declined")), "{metrics}");
    }
}

#[tokio::test]
async fn silence_is_no_yes_and_is_not_the_upstreams() {
    for hop in HOPS {
        let house = House::new(hop, "5s", calls(&[("pay", "{}")])).await;
        let mut events = house.asked().await;
        let (turn, _) = question(&mut events).await;
        let said = events.rest().await.unwrap();
        assert_eq!(said.end().data["code"], "unanswered");
        assert!(said.heartbeats > 0, "the client hears that it is waited for");
        assert_eq!(house.say(KEYS[0], &turn, "q1", true).await.status, 404, "too late");
        let (kind, data) = house.ended(&turn).await;
        assert_eq!((kind.as_str(), data["reason"].as_str()), ("turn.cancelled.v1", Some("unanswered")));
    }
}

#[tokio::test]
async fn only_the_first_answer_of_the_person_to_the_question_that_is_open_counts() {
    for hop in HOPS {
        let house = House::new(hop, "60s", calls(&[("pay", "{\"amount\":5}"), ("pay", "{\"amount\":6}")])).await;
        let mut events = house.asked().await;
        let (turn, _) = question(&mut events).await;
        assert_eq!(house.say(KEYS[1], &turn, "q1", true).await.status, 404, "somebody else's turn");
        assert_eq!(house.say("hg_nobody", &turn, "q1", true).await.status, 401);
        assert_eq!(house.say(KEYS[0], &TurnId::fresh().to_string(), "q1", true).await.status, 404);
        assert_eq!(house.say(KEYS[0], &turn, "q2", true).await.status, 404, "not asked yet");
        // A second reader sees the question too; of two who answer, one is first.
        let resume = Request::get(&format!("/v1/chat/stream/{turn}")).bearer(KEYS[0]);
        let mut client = Http1::connect(house.clients).await;
        client.send(&resume).await;
        let mut second = client.events(Judge::new(Kind::Client)).await.unwrap();
        assert_eq!(question(&mut second).await.1.data["id"], "q1");
        let (one, other) = tokio::join!(house.say(KEYS[0], &turn, "q1", true), house.say(KEYS[0], &turn, "q1", true));
        let mut statuses = [one.status, other.status];
        statuses.sort_unstable();
        assert!(matches!(statuses, [202, 404 | 409]), "{statuses:?}");
        assert_eq!(question(&mut events).await.1.data["prompt"], "Call pay with {\"amount\":6}?");
        assert_eq!(house.say(KEYS[0], &turn, "q1", true).await.status, 404, "it was over");
        assert_eq!(house.say(KEYS[0], &turn, "q2", false).await.status, 202);
        let said = events.rest().await.unwrap();
        assert_eq!((said.text_in(0, "tool_arguments").as_str(), said.end().data["code"].as_str()), ("{\"amount\":5}", Some("declined")));
        assert_eq!(second.rest().await.unwrap().end().data["code"], "declined");
    }
}

#[tokio::test]
async fn a_turn_that_is_stopped_or_left_while_its_person_is_asked_ends_as_ever() {
    for hop in HOPS {
        let house = House::new(hop, "60s", calls(&[("pay", "{}")])).await;
        let mut events = house.asked().await;
        let (turn, _) = question(&mut events).await;
        let stop = Request::new("POST", &format!("/v1/chat/stream/{turn}/stop")).bearer(KEYS[0]);
        assert_eq!(ask(house.clients, &stop).await.unwrap().status, 202);
        assert_eq!(events.rest().await.unwrap().end().data["code"], "stopped");
        assert_eq!(house.say(KEYS[0], &turn, "q1", true).await.status, 404);
        let (kind, data) = house.ended(&turn).await;
        assert_eq!((kind.as_str(), data["reason"].as_str()), ("turn.cancelled.v1", Some("stopped")));
    }
}

#[tokio::test]
async fn who_comes_back_is_asked_again_and_may_answer() {
    for hop in HOPS {
        let house = House::new(hop, "60s", calls(&[("pay", "{\"amount\":5}")])).await;
        let mut events = house.asked().await;
        let (turn, asked) = question(&mut events).await;
        let before = asked.seq.unwrap() - 1;
        drop(events);
        let resume = Request::get(&format!("/v1/chat/stream/{turn}")).header("last-event-id", &format!("{turn}:{before}")).bearer(KEYS[0]);
        let mut client = Http1::connect(house.clients).await;
        client.send(&resume).await;
        let mut events = client.events(Judge::resumed(&turn, before)).await.unwrap();
        let again = events.expect().await;
        assert_eq!((again.name.as_str(), again.seq, &again.data), ("confirm", asked.seq, &asked.data));
        assert_eq!(house.say(KEYS[0], &turn, "q1", true).await.status, 202);
        assert_eq!(names(&events.rest().await.unwrap()), ["confirm", "tool", "text", "done"]);
    }
}

#[tokio::test]
async fn what_a_person_is_asked_has_gone_through_every_filter_whole() {
    for hop in HOPS {
        let house = House::new(hop, "60s", calls(&[("pay", "{\"to\":\"bob@example.com\"}")])).await;
        let mut events = house.asked().await;
        let (turn, asked) = question(&mut events).await;
        assert_eq!(asked.data["prompt"], "Call pay with {\"to\":\"•••\"}?");
        assert_eq!(house.say(KEYS[0], &turn, "q1", true).await.status, 202);
        let said = events.rest().await.unwrap();
        assert_eq!((said.text_in(0, "tool_arguments").as_str(), said.end().data["outcome"].as_str()), ("{\"to\":\"•••\"}", Some("masked")));

        let house = House::new(hop, "60s", calls(&[("pay", "{\"to\":\"the blue\u{200b}bird\"}")])).await;
        let said = house.asked().await.rest().await.unwrap();
        assert_eq!(names(&said), ["open", "text", "done"]);
        assert_eq!((said.end().data["outcome"].as_str(), said.end().data["finish"].as_str()), (Some("blocked"), Some("content_filter")));
    }
}

#[tokio::test]
async fn where_nobody_can_be_asked_the_answer_is_no() {
    for hop in HOPS {
        let house = House::new(hop, "60s", calls(&[("pay", "{}")])).await;
        let completion = |stream: bool| {
            let body = json!({"model": "demo", "stream": stream, "messages": [{"role": "user", "content": "pay him"}]});
            Request::post("/v1/chat/completions", &body).bearer(KEYS[0])
        };
        let whole = ask(house.clients, &completion(false)).await.unwrap();
        assert_eq!((whole.status, whole.json()["code"].as_str()), (403, Some("declined")));
        let streamed = ask(house.clients, &completion(true)).await.unwrap().text();
        assert!(streamed.contains("\"code\":\"declined\"") && !streamed.contains("pay") && !streamed.contains("[DONE]"), "{streamed}");
    }
}

#[tokio::test]
async fn the_terminal_client_says_no_where_nobody_sits_at_it() {
    let house = House::new("events", "60s", calls(&[("pay", "{\"amount\":5}")])).await;
    for transport in [&[][..], &["--ws"]] {
        let mut chat = tokio::process::Command::new(env!("CARGO_BIN_EXE_headgate"));
        chat.args(["chat", "--url", &format!("http://{}", house.clients), "pay him"]).args(transport);
        let said = chat.env("HEADGATE_TOKEN", KEYS[0]).env("NO_COLOR", "1").stdin(Stdio::null()).output().await.unwrap();
        let err = String::from_utf8(said.stderr).unwrap();
        assert_eq!((said.status.code(), String::from_utf8(said.stdout).unwrap().as_str()), (Some(2), "Let me. \n"), "{err}");
        assert!(
            err.contains("Call pay with {\"amount\":5}?\nthere is nobody to ask: the answer is no\n") && err.contains("declined"),
            "{err}"
        );
    }
}

/// `script` gives a program a terminal; it stands on every Debian.
#[tokio::test]
async fn the_terminal_client_asks_who_sits_at_it() {
    let house = House::new("websocket", "60s", calls(&[("pay", "{\"amount\":5}")])).await;
    for (transport, answer, ends) in [("", "yes\n", "allowed"), (" --ws", "y\n", "allowed"), ("", "what?\n", "declined")] {
        let chat = format!("{} chat --url http://{} 'pay him'{transport}", env!("CARGO_BIN_EXE_headgate"), house.clients);
        let mut terminal = tokio::process::Command::new("script");
        terminal.args(["-qec", &chat, "/dev/null"]).env("HEADGATE_TOKEN", KEYS[0]);
        let mut terminal = terminal.stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true).spawn().unwrap();
        let mut keyboard = terminal.stdin.take().unwrap();
        keyboard.write_all(answer.as_bytes()).await.unwrap();
        let said = soon(terminal.wait_with_output(), "the turn to end").await.unwrap();
        let said = String::from_utf8(said.stdout).unwrap();
        assert!(said.contains("Call pay with {\"amount\":5}?") && said.contains("yes or no? "), "{said}");
        assert!(said.contains(ends) && said.contains("calls the tool pay") == (ends == "allowed"), "{said}");
    }
}
