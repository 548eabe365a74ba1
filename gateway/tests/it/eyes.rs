//! What operators see: health, metrics, one line and one span a turn. And what nobody may see there.

use std::{collections::HashSet, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use headgate_testkit::{
    answer::{Kind, Transcript},
    canary::Canaries,
    client::{Request, ask, stream},
    dialect::{Answer, Cut},
    services::{Missing, OrSkip, Program, Ready, Service, Signal, free_addr},
    upstream::{Refusing, Script, Upstream},
    within,
    ws::Ws,
};
use serde_json::{Value, json};
use tokio::sync::Notify;

use crate::support::Setup;

const SOON: Duration = Duration::from_secs(15);

#[tokio::test]
async fn readiness_follows_the_upstream_and_the_drain() {
    let upstream = Upstream::always(Script::stream(Answer::openai("demo", &["Hello"]).cut(Cut::Events))).await;
    let gateway = Setup::new().start(&upstream.url()).await;
    assert_eq!(ask(gateway.admin, &Request::get("/healthz")).await.unwrap().text(), "ok\n");
    let ready = ask(gateway.admin, &Request::get("/readyz")).await.unwrap();
    assert_eq!((ready.status, &ready.json()["ready"]), (200, &json!(true)));
    gateway.process.app.drain().begin();
    let ready = ask(gateway.admin, &Request::get("/readyz")).await.unwrap();
    assert_eq!((ready.status, &ready.json()["draining"]), (503, &json!(true)));
    assert_eq!(ask(gateway.admin, &Request::get("/healthz")).await.unwrap().status, 200, "a draining process is alive");

    let refusing = Refusing::start();
    let (mut plan, folder) = Setup::new().plan(&format!("http://{}", refusing.addr()));
    if let Some(upstream) = plan.upstreams.get_mut("model") {
        (upstream.health_interval, upstream.health_failures) = (Some(Duration::from_millis(50)), 1);
    }
    let gateway = crate::support::start(&plan, folder).await;
    let unready = async { while ask(gateway.admin, &Request::get("/readyz")).await.unwrap().status != 503 {} };
    within(SOON, unready, "the gateway to be unready").await;
}

#[tokio::test]
async fn operators_pages_are_not_on_the_clients_listener() {
    let upstream = Upstream::always(Script::no_content()).await;
    let gateway = Setup::new().start(&upstream.url()).await;
    for path in ["/metrics", "/config", "/readyz", "/healthz", "/.well-known/jwks.json"] {
        assert_eq!(ask(gateway.addr, &Request::get(path)).await.unwrap().status, 404, "{path}");
        assert_eq!(ask(gateway.admin, &Request::post(path, &json!({}))).await.unwrap().status, 405, "{path}");
        assert_eq!(ask(gateway.admin, &Request::get(path)).await.unwrap().status, 200, "{path}");
    }
}

#[tokio::test]
async fn metrics_are_openmetrics_and_count_each_turn_once() {
    let answers = |request: &headgate_testkit::upstream::Request| match request.json()["model"].as_str() {
        Some("cut") => Script::new().read().sse().send(Answer::openai("demo", &["Hello, "]).events()[..2].concat()).reset(),
        _ => Script::new()
            .read()
            .sse()
            .send_paced(Answer::openai("demo", &["Hello, bob@exam", "ple.com."]).cut(Cut::Events), Duration::from_millis(5))
            .end()
            .again(),
    };
    let upstream = Upstream::answering(answers).await;
    let gateway =
        Setup::chain(&["moderation: { mask: [email], deny: [deny.txt] }"]).file("deny.txt", "bluebird\n").start(&upstream.url()).await;
    let asks = |model: &str, text: &str| {
        Request::post("/v1/chat/stream", &json!({"model": model, "messages": [{"role": "user", "content": text}]}))
    };
    let long = "hi, it is me again, about the lamp on the shelf that was lit all through the night";
    for _ in 0..3 {
        stream(gateway.addr, &asks("demo", long), Kind::Client).await.unwrap().rest().await.unwrap();
    }
    stream(gateway.addr, &asks("cut", "hi"), Kind::Client).await.unwrap().rest().await.unwrap();
    assert_eq!(ask(gateway.addr, &asks("demo", "bluebird")).await.unwrap().status, 403);
    let reply = ask(gateway.admin, &Request::get("/metrics")).await.unwrap();
    assert!(reply.header("content-type").unwrap().starts_with("application/openmetrics-text; version=1.0.0"));
    let text = reply.text();
    let samples = openmetrics(&text);
    let value = |start: &str, has: &[&str]| -> f64 {
        samples
            .iter()
            .filter(|(name, _)| name.starts_with(start) && has.iter().all(|label| name.contains(label)))
            .map(|(_, value)| value)
            .sum()
    };
    assert_eq!(value("headgate_turns_total", &["end=\"complete\"", "code=\"ok\""]), 3.0, "{text}");
    assert_eq!(value("headgate_turns_total", &["end=\"failed\"", "code=\"upstream_reset\""]), 1.0, "{text}");
    assert_eq!(value("headgate_turns_total", &["end=\"refused\"", "code=\"policy_denied\""]), 1.0, "{text}");
    assert_eq!(value("headgate_turns_total", &[]), 5.0, "{text}");
    assert_eq!(value("headgate_prompt_texts_total", &["judged=\"now\""]), 1.0, "{text}");
    assert_eq!(value("headgate_prompt_texts_total", &["judged=\"before\""]), 2.0, "{text}");
    assert_eq!(value("headgate_open_turns", &[]), 0.0, "{text}");
    assert_eq!(value("gen_ai_server_time_to_first_token_seconds_count", &[]), 4.0, "{text}");
    assert!(value("headgate_hold_seconds_count", &["filter=\"moderation\""]) > 0.0, "{text}");
    assert_eq!(value("headgate_outcomes_total", &["outcome=\"masked\""]), 3.0, "{text}");
}

/// Every sample by name and labels, after the rules of the format have been checked.
fn openmetrics(text: &str) -> Vec<(String, f64)> {
    let (mut types, mut seen, mut samples) = (std::collections::HashMap::new(), HashSet::new(), Vec::new());
    assert!(text.ends_with("# EOF\n") && text.matches("# EOF").count() == 1);
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').expect("a name and a type");
            assert!(types.insert(name.to_owned(), kind.to_owned()).is_none(), "two types for {name}");
            continue;
        }
        if line.starts_with('#') {
            continue;
        }
        let (series, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("{line}"));
        assert!(seen.insert(series.to_owned()), "twice: {series}");
        let name = series.split('{').next().unwrap_or_default();
        let family = types.iter().find(|(family, kind)| {
            let suffix = name.strip_prefix(family.as_str());
            suffix.is_some_and(|suffix| match kind.as_str() {
                "counter" => suffix == "_total" || suffix == "_created",
                "histogram" => ["_bucket", "_sum", "_count", "_created"].contains(&suffix),
                _ => suffix.is_empty(),
            })
        });
        assert!(family.is_some(), "a sample without a type: {series}");
        samples.push((series.to_owned(), value.parse().unwrap_or_else(|_| panic!("{line}"))));
    }
    samples
}

/// The binary with everything on that could tell something.
struct Running {
    service: Service,
    addr: SocketAddr,
    admin: SocketAddr,
}

async fn run(yaml: &str, files: &[(&str, &str)], variables: &[(&str, &str)]) -> Running {
    let (addr, admin) = (free_addr(), free_addr());
    let yaml = format!("listen: {addr}\nadmin: {{ listen: \"{admin}\" }}\nworkers: 1\n{yaml}");
    let mut program = Program::at(env!("CARGO_BIN_EXE_headgate"));
    for (name, text) in files {
        program.file(name, text);
    }
    for (name, value) in variables {
        program = program.variable(name, value);
    }
    let file = program.file("headgate.yaml", yaml);
    let service = program.arguments(["run", file.to_str().expect("a plain path")]).start(Ready::Connects(addr)).await;
    Running { service, addr, admin }
}

#[tokio::test]
async fn nothing_that_was_said_and_no_secret_is_in_logs_metrics_traces_or_pages() {
    let canaries = Canaries::new();
    let said = Answer::openai("demo", &[&canaries.answer, " and ", "bob@example.com", " again ", &canaries.answer]);
    let (begun, answer) = (said.events()[..2].concat(), said.cut(Cut::Bytes(11)));
    let quoting =
        json!({"error": {"message": format!("bad prompt: {}", canaries.prompt), "type": "server_error", "param": null, "code": null}})
            .to_string();
    let here = Arc::new(Notify::new());
    let tells = here.clone();
    let upstream = Upstream::answering(move |request| match request.json()["model"].as_str() {
        Some("cut") => Script::new().read().sse().send(begun.clone()).reset(),
        Some("quote") => Script::reply(400, "application/json", quoting.clone()),
        Some("quote-late") => Script::new().read().sse().send(begun.clone()).send(format!("data: {quoting}\n\n")).end().close(),
        Some("nonsense") => Script::new().read().sse().send(begun.clone()).send(format!("data: {{\"{quoting}\n\n")).end().close(),
        Some("stall") => Script::new().read().sse().send(begun.clone()).tell(&tells).stall(),
        _ => Script::stream(answer.clone()),
    })
    .await;
    let collector = Upstream::answering(|_| Script::reply(200, "application/x-protobuf", "")).await;
    let hash = headgate_filters::auth::KeyHash::of(&canaries.token);
    let yaml = format!(
        "policy: {{ constitution: constitution.md, version: \"7\" }}\nobservability: {{ otlp: \"{}\", level: trace }}\nupstreams:\n  model: {{ protocol: openai, endpoints: [\"{}\"], authorization: \"${{MODEL_KEY}}\", health: {{ interval: 0s }} }}\nroutes:\n\
         {}",
        collector.url(),
        upstream.url(),
        ["/v1/chat/stream", "/v1/chat/completions"].map(|path| format!("  - path: {path}\n    upstream: model\n    filters:\n      - auth: {{ keys: [{{ key: \"{hash}\", tenant: acme, subject: u1 }}] }}\n      - moderation: {{ deny: [deny.txt], mask: [email] }}\n      - policy_headers\n")).concat()
    );
    let files = [("constitution.md", "# Ours\n\n## 1 Be kind\n\nBe kind.\n"), ("deny.txt", "bluebird\n")];
    let running = run(&yaml, &files, &[("MODEL_KEY", &canaries.key)]).await;
    let trace = "0af7651916cd43dd8448eb211c80319c";
    let asks = |model: &str, text: &str| {
        let text = format!("{} {text}", canaries.prompt);
        let body = json!({"model": model, "session_id": "s1", "messages": [{"role": "user", "content": text}], "metadata": {"note": canaries.prompt}});
        Request::post("/v1/chat/stream", &body).bearer(&canaries.token).header("traceparent", &format!("00-{trace}-b7ad6b7169203331-01"))
    };
    let told = |answer: Transcript| answer.error().map(str::to_owned);
    // Ok, and failed in the middle in three ways.
    for (model, error) in [
        ("demo", None),
        ("cut", Some("upstream_reset")),
        ("quote-late", Some("upstream_reset")),
        ("nonsense", Some("upstream_protocol_error")),
    ] {
        let answer = stream(running.addr, &asks(model, "hi"), Kind::Client).await.unwrap().rest().await.unwrap();
        assert_eq!(told(answer).as_deref(), error, "{model}");
    }
    // Refused by policy, by the model, at the door; malformed; left.
    assert_eq!(ask(running.addr, &asks("demo", "bluebird")).await.unwrap().status, 403);
    assert_eq!(ask(running.addr, &asks("quote", "hi")).await.unwrap().status, 502);
    assert_eq!(ask(running.addr, &Request::turn(&canaries.prompt).bearer(&format!("{}x", canaries.token))).await.unwrap().status, 401);
    assert_eq!(
        ask(
            running.addr,
            &Request::post("/v1/chat/stream", &json!({"messages": canaries.prompt, &canaries.prompt: 1})).bearer(&canaries.token)
        )
        .await
        .unwrap()
        .status,
        400
    );
    let mut left = stream(running.addr, &asks("stall", "hi"), Kind::Client).await.unwrap();
    left.expect().await;
    here.notified().await;
    left.into_inner().abort();
    let mut socket = Ws::connect(running.addr).await.unwrap();
    socket.auth(&canaries.token).await;
    socket.ask("r", &canaries.prompt).await.unwrap();
    drop(socket);
    let ended = "\"message\":\"turn ended\"";
    within(
        SOON,
        async {
            while running.service.output().matches(ended).count() < 9 {
                tokio::task::yield_now().await
            }
        },
        "nine turns in the log",
    )
    .await;
    let mut pages = Vec::new();
    for path in ["/metrics", "/config", "/readyz", "/.well-known/jwks.json"] {
        pages.push((path, ask(running.admin, &Request::get(path)).await.unwrap().text()));
    }
    let Running { mut service, .. } = running;
    service.signal(Signal::Terminate);
    service.exited().await;
    let log = service.output();
    let spans: Vec<u8> = collector.requests().iter().flat_map(|request| request.body.to_vec()).collect();
    let spans = String::from_utf8_lossy(&spans).into_owned();
    assert!(spans.contains("gen_ai.operation.name") && spans.contains("policy_denied") && spans.contains("headgate-gateway"), "spans came");
    canaries.assert_absent(
        pages.iter().map(|(path, text)| (*path, text.as_str())).chain([("the log", log.as_str()), ("spans", spans.as_str())]),
    );

    // One line a turn, each of them JSON, and each says whose it was and where to look further.
    let lines: Vec<Value> = log.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))).collect();
    let turns: Vec<&Value> = lines.iter().filter(|line| line["message"] == "turn ended").collect();
    let ids: HashSet<&str> = turns.iter().map(|line| line["turn_id"].as_str().expect("an id")).collect();
    assert_eq!((turns.len(), ids.len()), (9, 9), "{turns:#?}");
    let of = |code: &str| turns.iter().filter(|line| line["code"] == code).count();
    assert_eq!((of("ok"), of("policy_denied"), of("client_closed"), of("unauthenticated")), (2, 1, 1, 1), "{turns:#?}");
    for line in turns.iter().filter(|line| line["session_id"] == "s1") {
        assert_eq!((&line["tenant"], &line["subject"], &line["trace_id"]), (&json!("acme"), &json!("u1"), &json!(trace)));
    }
    assert_eq!(turns.iter().filter(|line| line["session_id"] == "s1").count(), 7);
}

/// A real OpenTelemetry collector that prints what it gets.
fn collector() -> Result<(Program, SocketAddr), Missing> {
    let lib = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../.tools/python/lib"));
    let versions = std::fs::read_dir(lib).into_iter().flatten().flatten();
    let found = versions.map(|python| python.path().join("site-packages/rotel/rotel-agent")).find(|path| path.is_file());
    let addr = free_addr();
    let program = match found {
        Some(path) => Program::at(path),
        None => Program::find(&["rotel-agent"], "HEADGATE_ROTEL", "scripts/tools.sh")?,
    };
    let (http, grpc) = (addr.to_string(), free_addr().to_string());
    let program = program.arguments(["start", "--otlp-http-endpoint", &http, "--otlp-grpc-endpoint", &grpc, "--exporter", "blackhole"]);
    Ok((program.arguments(["--debug-log", "traces", "--debug-log-verbosity", "detailed", "--disable-batching"]), addr))
}

#[tokio::test]
async fn one_turn_is_one_trace_over_gateway_orchestrator_and_model() {
    for hop in ["events", "websocket"] {
        let Some((program, addr)) = collector().or_skip("one_turn_is_one_trace_over_gateway_orchestrator_and_model") else { return };
        let mut collector = program.start(Ready::Connects(addr)).await;
        let (orchestrator, slm) = (free_addr(), free_addr());
        let yaml = format!(
            "policy: {{ constitution: constitution.md, version: \"7\" }}\nobservability: {{ otlp: \"http://{addr}\" }}\nupstreams:\n  chat: {{ protocol: orchestrator, hop: {hop}, endpoints: [\"http://{orchestrator}\"], health: {{ interval: 0s }} }}\n\
         \x20 model: {{ protocol: openai, endpoints: [\"http://{slm}\"], health: {{ interval: 0s }} }}\nroutes:\n  - path: /v1/chat/stream\n    upstream: chat\n    filters: [policy_headers]\n\
         orchestrator: {{ listen: \"{orchestrator}\", upstream: model }}\nslm: {{ listen: \"{slm}\" }}\n"
        );
        let mut running = run(&yaml, &[("constitution.md", "# Ours\n\n## 1 Be kind\n\nBe kind.\n")], &[]).await;
        let (trace, caller) = ("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7");
        let request = Request::turn("hello").header("traceparent", &format!("00-{trace}-{caller}-01"));
        let answer = stream(running.addr, &request, Kind::Client).await.unwrap().rest().await.unwrap();
        assert_eq!(answer.error(), None);
        // What is queued is sent before the process ends.
        running.service.signal(Signal::Terminate);
        running.service.exited().await;
        let all = async {
            while collector.output().matches("Trace ID").count() < 3 {
                tokio::task::yield_now().await
            }
        };
        within(SOON, all, "three spans at the collector").await;
        // The last of them may still be being printed: it is whole once the collector has ended in peace.
        collector.signal(Signal::Terminate);
        collector.exited().await;
        let output = collector.output();
        let spans = spans(&output);
        let span = |service: &str| {
            spans.iter().find(|span| span.service.contains(service)).unwrap_or_else(|| panic!("no span of {service} in {output}"))
        };
        let (gateway, orchestrator, model) = (span("headgate-gateway"), span("headgate-orchestrator"), span("headgate-slm"));
        assert_eq!(spans.len(), 3, "{output}");
        assert!(spans.iter().all(|span| span.trace == trace), "{spans:?}");
        assert_eq!((gateway.parent.as_str(), &orchestrator.parent, &model.parent), (caller, &gateway.id, &orchestrator.id), "{spans:?}");
        for name in ["gen_ai.operation.name", "gen_ai.usage.output_tokens", "gen_ai.response.finish_reasons"] {
            assert!(output.contains(name), "{name}: {output}");
        }
    }
}

#[derive(Debug, Default)]
struct Span {
    service: String,
    trace: String,
    parent: String,
    id: String,
}

/// The spans in a collector's own words.
fn spans(output: &str) -> Vec<Span> {
    let (mut spans, mut service): (Vec<Span>, String) = (Vec::new(), String::new());
    for line in output.lines() {
        let line = line.trim();
        let value =
            |name: &str| line.strip_prefix(name).and_then(|rest| rest.trim_start().strip_prefix(':')).map(|value| value.trim().to_owned());
        if let Some((_, rest)) = line.split_once("service.name") {
            service = rest.to_owned();
        } else if let Some(trace) = value("Trace ID") {
            spans.push(Span { service: service.clone(), trace, ..Span::default() });
        } else if let (Some(parent), Some(span)) = (value("Parent ID"), spans.last_mut()) {
            span.parent = parent;
        } else if let (Some(id), Some(span)) = (value("ID"), spans.last_mut()) {
            span.id = id;
        }
    }
    spans
}
