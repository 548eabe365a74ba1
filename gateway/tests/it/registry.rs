//! A gateway and an orchestrator under a registry that others write: what it says is in force is served, and nothing else.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use headgate_gateway::{
    build,
    shell::{Process, Sockets},
};
use headgate_policy::{ANY_TENANT, Digest, Entry, Ring};
use headgate_testkit::{
    answer::Kind,
    client::{Http1, Request, ask, stream},
    dialect::{Answer, Cut},
    services::{self, OrSkip, Program, Ready, Service, Signal},
    soon,
    upstream::{Script, Upstream},
};
use serde_json::{Value, json};

/// Gateway and orchestrator in this process, before a scripted model; the registry is elsewhere, or there is none.
struct House {
    addr: SocketAddr,
    admin: SocketAddr,
    process: Process,
    folder: tempfile::TempDir,
    _model: Upstream,
}

impl House {
    /// `top`: lines of the config; `registry`: a member of its policy.
    async fn start(top: &str, registry: &str) -> House {
        let model = Upstream::always(Script::stream(Answer::openai("demo", &["Hel", "lo"]).cut(Cut::Events))).await;
        let folder = tempfile::tempdir().unwrap();
        let any = || std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let (clients, admin, desk) = (any(), any(), any());
        let at = |listener: &std::net::TcpListener| listener.local_addr().unwrap();
        let ring = Ring::generate(headgate_filters::unix_now()).unwrap();
        ring.save(&folder.path().join("ring.json")).unwrap();
        std::fs::write(folder.path().join("registry.jwks.json"), ring.jwks()).unwrap();
        for (version, constitution) in [("7", "Be kind."), ("8", "Be kinder.")] {
            std::fs::write(folder.path().join(format!("constitution-{version}.md")), format!("# Ours\n\n## 1 Be kind\n\n{constitution}\n"))
                .unwrap();
            let yaml = format!(
                "listen: {}\nadmin: {{ listen: \"{}\" }}\nworkers: 1\n{top}\n\
                 policy: {{ constitution: constitution-{version}.md, version: \"{version}\", {registry} }}\n\
                 upstreams:\n  chat: {{ protocol: orchestrator, endpoints: [\"http://{2}\"], health: {{ interval: 0s }} }}\n\
                 \x20 model: {{ protocol: openai, endpoints: [\"{3}\"], health: {{ interval: 0s }} }}\n\
                 routes:\n  - path: /v1/chat/stream\n    upstream: chat\n    filters: [policy_headers]\n\
                 orchestrator: {{ listen: \"{2}\", upstream: model }}\n",
                at(&clients),
                at(&admin),
                at(&desk),
                model.url()
            );
            std::fs::write(folder.path().join(format!("headgate-{version}.yaml")), yaml).unwrap();
        }
        let plan =
            headgate_config::load(&folder.path().join("headgate-7.yaml"), None, &|_| None).unwrap_or_else(|faults| panic!("{faults}"));
        let sockets = Sockets { clients: Some(clients), admin: Some(admin), orchestrator: Some(desk), slm: None };
        let process = Process::start(&plan, sockets).await.unwrap();
        House { addr: process.clients.unwrap(), admin: process.admin.unwrap(), process, folder, _model: model }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The text of a turn, or the code it was refused with.
    async fn turn(&self) -> Result<String, String> {
        let call = || Request::post("/v1/chat/stream", &json!({"messages": [{"role": "user", "content": "hello"}]}));
        let reply = ask(self.addr, &call()).await.unwrap();
        if reply.status != 200 {
            return Err(format!("{} {}", reply.status, reply.problem().unwrap()));
        }
        Ok(stream(self.addr, &call(), Kind::Client).await.unwrap().rest().await.unwrap().text())
    }

    async fn ready(&self) -> (u16, Value) {
        let reply = ask(self.admin, &Request::get("/readyz")).await.unwrap();
        (reply.status, reply.json()["policy"].clone())
    }

    async fn is(&self, status: u16, policy: &str) {
        let come = async {
            while self.ready().await != (status, json!(policy)) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        soon(come, &format!("/readyz to say {status} and {policy}")).await;
    }

    /// Resolves once `/metrics` has this line.
    async fn shows(&self, line: &str) {
        let shown = async {
            while !ask(self.admin, &Request::get("/metrics")).await.unwrap().text().lines().any(|shown| shown == line) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        soon(shown, &format!("/metrics to show {line}")).await;
    }

    /// What `headgate policy ...` prints, and its exit code.
    async fn policy(&self, verb: &str, version: &str, more: &[&str]) -> (i32, String) {
        let mut program = Program::at(env!("CARGO_BIN_EXE_headgate"))
            .arguments(["policy", verb])
            .argument(self.path(&format!("headgate-{version}.yaml")))
            .arguments(more);
        if verb != "show" {
            program = program.argument("--ring").argument(self.path("ring.json"));
        }
        let (status, output) = program.run(Duration::from_secs(60)).await;
        (status.code().unwrap_or(-1), output)
    }
}

fn redis_at(redis: &Service) -> String {
    format!("redis: {{ url: \"redis://{}\" }}", redis.addr())
}

const REGISTRY: &str = "registry: { keys: registry.jwks.json }";

#[tokio::test]
async fn a_version_is_served_once_it_is_published_counts_while_another_takes_over_and_comes_back_with_a_rollback() {
    let Some(redis) = services::redis().await.or_skip("a_version_is_served_once_it_is_published") else { return };
    let house = House::start(&redis_at(&redis), REGISTRY).await;
    house.is(503, "unknown").await;
    assert_eq!(house.turn().await, Err("409 version_conflict".into()));
    assert_eq!(house.policy("show", "7", &[]).await.0, 1);

    let (code, said) = house.policy("publish", "7", &[]).await;
    assert_eq!(code, 0, "{said}");
    house.is(200, "active").await;
    assert_eq!(house.turn().await.as_deref(), Ok("Hello"));

    // Another takes over: this gateway counts as one that is late.
    let (code, said) = house.policy("publish", "8", &["--overlap", "10min"]).await;
    assert_eq!(code, 0, "{said}");
    house.is(200, "previous").await;
    assert_eq!(house.turn().await.as_deref(), Ok("Hello"));

    // The roll-out fails, and is taken back.
    let (code, said) = house.policy("rollback", "7", &["--overlap", "0s"]).await;
    assert_eq!(code, 0, "{said}");
    house.is(200, "active").await;
    assert_eq!(house.turn().await.as_deref(), Ok("Hello"));

    // Once more, for good and without an overlap: turns are refused here, and not one by one further on.
    let (code, said) = house.policy("publish", "8", &["--overlap", "0s"]).await;
    assert_eq!(code, 0, "{said}");
    house.is(503, "unknown").await;
    assert_eq!(house.turn().await, Err("409 version_conflict".into()));
    for line in ["headgate_policy_standing{standing=\"unknown\"} 1", "headgate_redis_up 1", "headgate_policy_registry_entries 1"] {
        house.shows(line).await;
    }
    let (code, shown) = house.policy("show", "8", &["--json"]).await;
    let shown: Value = serde_json::from_str(&shown).unwrap();
    assert_eq!((code, &shown["entries"][0]["config"]), (0, &json!("active")));

    // The config of the new version.
    let plan = headgate_config::load(&house.path("headgate-8.yaml"), None, &|_| None).unwrap();
    house.process.app.exchange(build::live(&plan, &house.process.lasting).unwrap());
    house.is(200, "active").await;
    assert_eq!(house.turn().await.as_deref(), Ok("Hello"));
    assert!(house.process.stop().await);
}

#[tokio::test]
async fn who_can_write_to_redis_and_nothing_else_puts_nothing_in_force() {
    let Some(redis) = services::redis().await.or_skip("who_can_write_to_redis") else { return };
    let house = House::start(&redis_at(&redis), REGISTRY).await;
    assert_eq!(house.policy("publish", "7", &[]).await.0, 0);
    house.is(200, "active").await;

    let stranger = Ring::generate(0).unwrap();
    let lax = Entry { seq: u64::MAX, ..Entry::first(ANY_TENANT, "9", Digest::of(b"lax"), 0) };
    let mut client = Http1::connect(redis.addr()).await;
    for (raw, refused) in [stranger.sign_entry(&lax).unwrap(), "not signed at all".to_owned()].iter().zip(1..) {
        client.send_bytes(format!("SET policy:* \"{raw}\"\r\nPUBLISH policies *\r\n").as_bytes()).await;
        let (code, shown) = house.policy("show", "7", &[]).await;
        assert!(code == 1 && shown.contains("it changes nothing"), "{shown}");
        house.shows(&format!("headgate_policy_registry_rejected_total {refused}")).await;
        assert_eq!(house.ready().await, (200, json!("active")));
        assert_eq!(house.turn().await.as_deref(), Ok("Hello"));
    }
    // Publishing over it takes a word that says so.
    let (code, said) = house.policy("publish", "8", &[]).await;
    assert!(code == 1 && said.contains("--replace"), "{said}");
    assert_eq!(house.policy("publish", "8", &["--replace"]).await.0, 0);
    house.is(503, "unknown").await;
}

#[tokio::test]
async fn a_gateway_whose_registry_was_never_reached_takes_no_turn_and_one_that_has_read_it_goes_on_without() {
    let addr = services::free_addr();
    let top = format!("redis: {{ url: \"redis://{addr}\" }}");
    let house = House::start(&top, REGISTRY).await;
    assert_eq!(house.ready().await, (503, json!("unavailable")));
    assert_eq!(house.turn().await, Err("503 policy_registry_unavailable".into()));
    let (code, said) = house.policy("show", "7", &[]).await;
    assert!(code == 69 && said.contains("does not answer within 5s"), "{code} {said}");

    let Some(redis) = services::redis_at(addr).await.or_skip("a_gateway_whose_registry_was_never_reached") else { return };
    let mut redis = redis.unwrap();
    house.is(503, "unknown").await;
    assert_eq!(house.policy("publish", "7", &[]).await.0, 0);
    house.is(200, "active").await;
    redis.signal(Signal::Kill);
    redis.exited().await;
    assert_eq!(house.turn().await.as_deref(), Ok("Hello"));
    assert_eq!(house.ready().await, (200, json!("active")));
}

#[tokio::test]
async fn a_registry_is_reached_over_tls_where_the_system_trusts_its_certificate_and_not_otherwise() {
    let test = "a_registry_is_reached_over_tls";
    let names = ["redis-server", "valkey-server"];
    let Some(server) = Program::find(&names, "HEADGATE_REDIS_SERVER", "apt-get install redis-server").or_skip(test) else { return };
    let pair = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let (pem, key) = (server.file("a.pem", pair.cert.pem()), server.file("a.key", pair.signing_key.serialize_pem()));
    let addr = services::free_addr();
    let port = addr.port().to_string();
    let server = server
        .arguments(["--port", "0", "--tls-port", &port, "--tls-auth-clients", "no", "--save", "", "--tls-cert-file"])
        .argument(&pem)
        .argument("--tls-key-file")
        .argument(key)
        .start(Ready::Connects(addr))
        .await;
    let house = House::start(&format!("redis: {{ url: \"rediss://localhost:{port}\" }}"), REGISTRY).await;
    // As a system that has this certificate among its own.
    let trusting = |verb: &str| {
        let program = Program::at(env!("CARGO_BIN_EXE_headgate")).variable("SSL_CERT_FILE", &pem);
        let program = program.arguments(["policy", verb]).argument(house.path("headgate-7.yaml"));
        if verb == "show" { program } else { program.argument("--ring").argument(house.path("ring.json")) }
    };
    let (status, output) = trusting("publish").run(Duration::from_secs(60)).await;
    assert!(status.success(), "{output}");
    let (status, output) = trusting("show").run(Duration::from_secs(60)).await;
    assert!(status.success() && output.contains("is in force"), "{output}");
    // This process trusts no such certificate, and nor does one without the variable.
    assert_eq!(house.ready().await, (503, json!("unavailable")));
    let (code, said) = house.policy("show", "7", &[]).await;
    assert_eq!(code, 69, "{said}");
    drop(server);
}

#[tokio::test]
async fn a_registry_in_a_folder_needs_no_redis() {
    let house = House::start("", "registry: { keys: registry.jwks.json, folder: policies }").await;
    assert_eq!(house.turn().await, Err("503 policy_registry_unavailable".into()), "there is no folder yet");
    assert_eq!(house.policy("publish", "7", &[]).await.0, 0);
    house.is(200, "active").await;
    assert_eq!(house.turn().await.as_deref(), Ok("Hello"));
}

#[tokio::test]
async fn without_a_registry_the_config_is_in_force_and_so_is_the_next_one() {
    let house = House::start("", "name: default").await;
    assert_eq!(house.ready().await, (200, json!("active")));
    assert_eq!(house.turn().await.as_deref(), Ok("Hello"));
    let plan = headgate_config::load(&house.path("headgate-8.yaml"), None, &|_| None).unwrap();
    house.process.app.exchange(build::live(&plan, &house.process.lasting).unwrap());
    assert_eq!(house.ready().await, (200, json!("active")));
    assert_eq!(house.turn().await.as_deref(), Ok("Hello"));
}
