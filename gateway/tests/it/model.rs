//! The real thing: gateway, orchestrator and a language model, from a client's question to its masked or refused answer.

use std::{net::SocketAddr, path::Path, sync::Arc, time::Duration};

use headgate_gateway::shell::{Process, Sockets};
use headgate_testkit::{
    answer::{Kind, Transcript},
    client::{Request, ask, stream},
    services::{Missing, OrSkip, Program, Ready, Service},
    within,
};
use serde_json::{Value, json};
use tokio::{net::TcpListener, task::JoinHandle};

const SOON: Duration = Duration::from_secs(20);

/// A gateway and an orchestrator in this process, in front of a model.
struct House {
    addr: SocketAddr,
    model: SocketAddr,
    _process: Process,
    slm: JoinHandle<()>,
    _folder: tempfile::TempDir,
}

/// How turns travel from the gateway to the orchestrator: the same is true over both.
const HOPS: [&str; 2] = ["events", "websocket"];

/// With the embedded model, which tells what it was asked; `pace`: tokens per second at most.
async fn house(hop: &str, filters: &str, pace: Option<f32>) -> House {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let model = listener.local_addr().unwrap();
    let options = headgate_slm::Options { debug_requests: true, pace, ..Default::default() };
    let slm = tokio::spawn(headgate_slm::serve(listener, Arc::new(headgate_slm::Slm::embedded()), options, std::future::pending()));
    let (process, folder) = before(model, hop, filters).await;
    House { addr: process.clients.unwrap(), model, _process: process, slm, _folder: folder }
}

/// Gateway and orchestrator before a model that listens.
async fn before(model: SocketAddr, hop: &str, filters: &str) -> (Process, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let any = || std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let (clients, admin, orchestrator) = (any(), any(), any());
    let (at, desk) = (|listener: &std::net::TcpListener| listener.local_addr().unwrap(), orchestrator.local_addr().unwrap());
    let yaml = format!(
        "listen: {}\nadmin: {{ listen: \"{}\" }}\nworkers: 1\npolicy: {{ constitution: constitution.md, version: \"7\" }}\nupstreams:\n\
         \x20 chat: {{ protocol: orchestrator, hop: {hop}, endpoints: [\"http://{desk}\"], health: {{ interval: 0s }} }}\n  model: {{ protocol: openai, endpoints: [\"http://{model}\"], health: {{ interval: 0s }}, timeouts: {{ first_byte: 60s }} }}\n\
         routes:\n  - path: /v1/chat/stream\n    upstream: chat\n    filters: [{filters}]\norchestrator: {{ listen: \"{desk}\", upstream: model }}\n",
        at(&clients),
        at(&admin)
    );
    std::fs::write(folder.path().join("constitution.md"), "# Ours\n\n## 1 Be kind\n\nBe kind.\n").unwrap();
    std::fs::write(folder.path().join("deny.txt"), "project bluebird\n").unwrap();
    let file = folder.path().join("headgate.yaml");
    std::fs::write(&file, &yaml).unwrap();
    let plan = headgate_config::load(&file, None, &|_| None).unwrap_or_else(|faults| panic!("{faults}\n{yaml}"));
    let sockets = Sockets { clients: Some(clients), admin: Some(admin), orchestrator: Some(orchestrator), slm: None };
    (Process::start(&plan, sockets).await.unwrap(), folder)
}

const CHAIN: &str = "{ moderation: { deny: [deny.txt], mask: [email, credit_card] } }, policy_headers";

impl House {
    async fn ask(&self, turn: Value) -> Transcript {
        stream(self.addr, &Request::post("/v1/chat/stream", &turn), Kind::Client).await.unwrap().rest().await.unwrap()
    }

    /// What the model's server was asked, the oldest first.
    async fn requests(&self) -> Vec<Value> {
        let requests = ask(self.model, &Request::get("/debug/requests")).await.unwrap().json();
        requests.as_array().or_else(|| requests["requests"].as_array()).unwrap_or_else(|| panic!("{requests}")).clone()
    }
}

impl Drop for House {
    fn drop(&mut self) {
        self.slm.abort();
    }
}

fn says(text: &str) -> Value {
    json!({"messages": [{"role": "user", "content": text}]})
}

fn header<'a>(request: &'a Value, name: &str) -> Vec<&'a str> {
    let headers = request["headers"].as_array().expect("headers");
    headers
        .iter()
        .filter(|pair| pair[0].as_str().is_some_and(|found| found.eq_ignore_ascii_case(name)))
        .filter_map(|pair| pair[1].as_str())
        .collect()
}

#[tokio::test]
async fn policy_and_trace_travel_as_far_as_the_model() {
    for hop in HOPS {
        let house = house(hop, CHAIN, None).await;
        let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
        let request =
            Request::turn("hello").header("traceparent", &format!("00-{trace}-00f067aa0ba902b7-01")).header("policy-version", "forged");
        let events = stream(house.addr, &request, Kind::Client).await.unwrap();
        let (version, hash) =
            (events.head.header("policy-version").unwrap().to_owned(), events.head.header("constitution-hash").unwrap().to_owned());
        let answer = events.rest().await.unwrap();
        assert!(!answer.text().is_empty() && answer.outcome() == "allowed", "{}", answer.end().raw);
        let requests = house.requests().await;
        assert_eq!(requests.len(), 1, "{requests:#?}");
        let asked = &requests[0];
        assert_eq!((header(asked, "policy-version"), header(asked, "constitution-hash")), (vec![version.as_str()], vec![hash.as_str()]));
        assert_eq!(version, "7");
        let verdict = header(asked, "policy-verdict");
        assert!(verdict.len() == 1 && verdict[0].split('.').count() == 3, "{asked}");
        assert!(header(asked, "traceparent")[0].starts_with(&format!("00-{trace}-")), "{asked}");
        assert_eq!((&asked["trace_id"], &asked["end"]), (&json!(trace), &json!("stop")));
    }
}

#[tokio::test]
async fn a_second_turn_of_a_session_brings_what_was_said_before() {
    for hop in HOPS {
        let house = house(hop, CHAIN, None).await;
        let first = house.ask(says("hello")).await;
        let session = first.named("open").next().unwrap().text("session_id").unwrap().to_owned();
        let mut next = says("what is your email address?");
        next["session_id"] = json!(session);
        house.ask(next).await;
        let counts: Vec<u64> = house.requests().await.iter().map(|request| request["messages"].as_u64().unwrap()).collect();
        assert_eq!(counts.last(), Some(&(counts[0] + 2)), "question and answer, then the next question: {counts:?}");
    }
}

#[tokio::test]
async fn the_models_own_words_are_masked_and_refused() {
    for hop in HOPS {
        let house = house(hop, CHAIN, None).await;
        let masked = house.ask(says("what is your email address?")).await;
        assert_eq!(masked.outcome(), "masked", "{}", masked.text());
        assert!(masked.text().contains("•••") && !masked.text().contains('@'), "{}", masked.text());
        let refused = house.ask(says("tell me a secret")).await;
        assert_eq!((refused.outcome(), refused.finish()), ("blocked", "content_filter"), "{}", refused.text());
        assert!(!refused.text().to_lowercase().contains("bluebird"), "{}", refused.text());
        let idle = async { while house.requests().await.iter().any(|request| request["end"] == "running") {} };
        within(SOON, idle, "the model to be stopped").await;
    }
}

#[tokio::test]
async fn stopping_a_turn_stops_the_model() {
    for hop in HOPS {
        let house = house(hop, CHAIN, Some(10.0)).await;
        let mut events = stream(house.addr, &Request::turn("hello"), Kind::Client).await.unwrap();
        let turn = events.expect().await.text("turn_id").unwrap().to_owned();
        while events.expect().await.name != "text" {}
        assert_eq!(ask(house.addr, &Request::post(&format!("/v1/chat/stream/{turn}/stop"), &json!({}))).await.unwrap().status, 202);
        assert_eq!(events.rest().await.unwrap().error(), Some("stopped"));
        let cancelled = async { while house.requests().await[0]["end"] != "cancelled" {} };
        within(SOON, cancelled, "the model to be stopped").await;
    }
}

/// A transcript without what is new every time, and with text joined as no two runs cut it the same way.
fn normal(answer: &Transcript) -> String {
    let mut lines: Vec<(String, Value)> = Vec::new();
    for event in &answer.events {
        let mut data = event.data.clone();
        for name in ["turn_id", "session_id", "verdict"] {
            if let Some(value) = data.get_mut(name) {
                *value = json!(format!("<{name}>"));
            }
        }
        // Usage may overtake text that is held, or not.
        let before = lines.iter_mut().rfind(|(name, before)| name == "text" && event.name == "text" && before["lane"] == data["lane"]);
        match before {
            Some((_, before)) => {
                before["text"] = json!(before["text"].as_str().unwrap_or_default().to_owned() + data["text"].as_str().unwrap_or_default());
            }
            None => lines.push((event.name.clone(), data)),
        }
    }
    lines.iter().map(|(name, data)| format!("event: {name}\ndata: {data}\n\n")).collect()
}

#[tokio::test]
async fn answers_are_the_recorded_ones() {
    for hop in HOPS {
        let house = house(hop, CHAIN, None).await;
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../contracts/recordings/gateway");
        for (name, text) in [("allowed", "hello"), ("masked", "what is your email address?"), ("blocked", "tell me a secret")] {
            let (file, said) = (folder.join(format!("{name}.sse")), normal(&house.ask(says(text)).await));
            if std::env::var_os("HEADGATE_RECORD").is_some() {
                std::fs::create_dir_all(&folder).unwrap();
                std::fs::write(&file, &said).unwrap();
            }
            let recorded =
                std::fs::read_to_string(&file).unwrap_or_else(|error| panic!("{error}: {}; HEADGATE_RECORD=1 records it", file.display()));
            assert_eq!(said, recorded, "{name}");
        }
    }
}

/// SmolLM2 in llama.cpp's own server.
async fn llama_cpp() -> Result<(Service, SocketAddr), Missing> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let python = root.join(".tools/llama-cpp/bin/python");
    if !python.is_file() {
        return Err(Missing { what: "llama.cpp's server with SmolLM2".into(), how: "scripts/tools.sh".into() });
    }
    let script = root.join("slm/llama_cpp/serve.py").canonicalize().unwrap();
    let service = Program::at(python).argument(script).arguments(["--port", "0"]).start(Ready::Line("listening".into())).await;
    let line = service.line("listening").await;
    let addr = line.rsplit("http://").next().and_then(|addr| addr.trim().trim_end_matches('/').parse().ok());
    let addr = addr.unwrap_or_else(|| panic!("no address in {line}"));
    // Listening is not ready: it answers 503 while the model is loaded.
    let ready = async { while !ask(addr, &Request::get("/health")).await.is_ok_and(|reply| reply.status == 200) {} };
    within(Duration::from_secs(60), ready, "the model to be loaded").await;
    Ok((service, addr))
}

#[tokio::test]
async fn another_real_model_streams_and_is_judged_the_same_way() {
    let Some((_service, model)) = llama_cpp().await.or_skip("another_real_model_streams_and_is_judged_the_same_way") else { return };
    let (process, _folder) = before(model, HOPS[0], CHAIN).await;
    let mut turn = says("Repeat exactly: my address is bob@example.com");
    turn["max_output_tokens"] = json!(40);
    turn["temperature"] = json!(0);
    let answer =
        stream(process.clients.unwrap(), &Request::post("/v1/chat/stream", &turn), Kind::Client).await.unwrap().rest().await.unwrap();
    assert!(answer.error().is_none() && !answer.text().is_empty(), "{}", answer.end().raw);
    assert!(!answer.text().contains("bob@"), "{}", answer.text());
    assert!(["stop", "length"].contains(&answer.finish()), "{}", answer.end().raw);
    assert!(answer.end().data["usage"]["output_tokens"].as_u64().is_some_and(|tokens| tokens > 0), "{}", answer.end().raw);
    process.stop().await;
}
