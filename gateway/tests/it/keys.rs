//! Signing keys that change under load: gateway, orchestrator and command line are processes of their own, as in production.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, Mutex},
    time::Duration,
};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use headgate_contracts::TurnId;
use headgate_filters::unix_now;
use headgate_policy::{Decision, Digest, Facts, Issuer, ROTATE_AFTER, Ring, State};
use headgate_testkit::{
    answer::Kind,
    client::{Reply, Request, ask, stream},
    dialect::{Answer, Cut},
    services::{Program, Ready, Service, free_addr},
    upstream::{Script, Upstream},
    within,
};
use tokio::sync::watch;

const SOON: Duration = Duration::from_secs(20);
const STEP: &str = "/v1/conversation/step";
/// Clients at once.
const CLIENTS: usize = 4;

/// A gateway that signs, an orchestrator elsewhere that fetches its keys every second, and a model.
struct House {
    folder: tempfile::TempDir,
    gateway: SocketAddr,
    admin: SocketAddr,
    orchestrator: SocketAddr,
    issuer: Issuer,
    _running: [Service; 2],
    _model: Upstream,
}

impl House {
    /// `ring`: the keys that the gateway finds; it makes some where there are none.
    async fn start(ring: Option<Ring>) -> House {
        let model = Upstream::always(Script::stream(Answer::openai("demo", &["yes", " and", " no"]).cut(Cut::Whole))).await;
        let [gateway, admin, orchestrator] = [free_addr(), free_addr(), free_addr()];
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, text: String| {
            let path = folder.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        if let Some(ring) = ring {
            ring.save(&folder.path().join("policy.json")).unwrap();
        }
        file("constitution.md", "# Be kind\n\nBe kind to whoever asks.\n".into());
        let policy = "policy: { constitution: constitution.md, version: \"7\"";
        let signs = file(
            "gateway.yaml",
            format!(
                "listen: {gateway}\nadmin: {{ listen: \"{admin}\" }}\nworkers: 1\n{policy}, key: file:policy.json }}\nupstreams:\n  chat: {{ protocol: orchestrator, endpoints: [\"http://{orchestrator}\"] }}\n\
                 routes:\n  - path: /v1/chat/stream\n    upstream: chat\n    filters: [policy_headers]\n"
            ),
        );
        let believes = file(
            "orchestrator.yaml",
            format!(
                "admin: {{ listen: \"off\" }}\n{policy} }}\nupstreams:\n  model: {{ protocol: openai, endpoints: [\"{}\"] }}\n\
                 orchestrator:\n  listen: {orchestrator}\n  upstream: model\n  keys: http://{admin}/.well-known/jwks.json\n  keys_refresh: 1s\n",
                model.url()
            ),
        );
        let plan = headgate_config::load(&signs, None, &|_| None).unwrap_or_else(|faults| panic!("{faults}"));
        let issuer = plan.policy.unwrap().issuer;
        let start =
            |command: &'static str, config: PathBuf, at| headgate().arguments([command]).argument(config).start(Ready::Connects(at));
        let running = [start("run", signs, gateway).await, start("orchestrator", believes, orchestrator).await];
        let house = House { folder, gateway, admin, orchestrator, issuer, _running: running, _model: model };
        // The first fetch may have come before the gateway listened.
        let answered = async { while house.turn().await.is_err() {} };
        within(SOON, answered, "the orchestrator to have fetched the keys").await;
        house
    }

    fn ring(&self) -> Ring {
        Ring::load(&self.folder.path().join("policy.json")).unwrap()
    }

    /// `headgate keys ...`: what it prints.
    async fn keys(&self, command: &str, more: &[&str]) -> String {
        let program = headgate().arguments(["keys", command]).arguments(more).argument(self.folder.path().join("policy.json"));
        let (status, output) = program.run(SOON).await;
        assert!(status.success(), "{output}");
        output
    }

    /// A turn through the gateway: which key signed its verdict, or what went wrong.
    async fn turn(&self) -> Result<String, String> {
        let answer = stream(self.gateway, &Request::turn("hi"), Kind::Client).await.map_err(|broken| format!("{broken:?}"))?;
        let answer = answer.rest().await.map_err(|broken| format!("{broken:?}"))?;
        if let Some(code) = answer.error() {
            return Err(code.to_owned());
        }
        assert_eq!(answer.text(), "yes and no");
        let header = answer.verdict().split('.').next().unwrap();
        let header: serde_json::Value = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(header).unwrap()).unwrap();
        Ok(header["kid"].as_str().unwrap().to_owned())
    }

    /// A dispatch past the gateway, signed with a copy of its keys.
    async fn forged(&self, ring: &Ring) -> Reply {
        let id = TurnId::fresh().to_string();
        let body = serde_json::json!({"turn_id": id, "session_id": "s1", "tenant": "acme", "subject": "u1", "model": "demo",
            "messages": [{"role": "user", "content": "hi"}]});
        let body = body.to_string();
        let facts = Facts { tid: "acme", sub: "u1", sid: "s1", turn: &id, dec: Decision::Allow, cat: &[], trc: None };
        let claims: headgate_policy::Claims = self.issuer.dispatch(&facts, "POST", STEP, Digest::of(body.as_bytes()), unix_now()).unwrap();
        let dispatch = Request::new("POST", STEP)
            .header("content-type", "application/json")
            .header("policy-verdict", &ring.sign(&claims).unwrap())
            .header("policy-version", &claims.pol.ver)
            .header("constitution-hash", &claims.con.to_string());
        ask(self.orchestrator, &dispatch.body(body)).await.unwrap()
    }
}

fn headgate() -> Program {
    Program::at(env!("CARGO_BIN_EXE_headgate"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_rotate_under_load_and_nothing_is_rejected() {
    let house = Arc::new(House::start(None).await);
    let (before, first) = (house.ring(), house.ring().current().unwrap().to_string());
    let failed = Arc::new(Mutex::new(Vec::new()));
    let (signed, mut seen) = watch::channel(BTreeMap::<String, u64>::new());
    let (stop, stopped) = watch::channel(false);
    let clients: Vec<_> = (0..CLIENTS)
        .map(|_| {
            let (house, failed, signed, stopped) = (house.clone(), failed.clone(), signed.clone(), stopped.clone());
            tokio::spawn(async move {
                while !*stopped.borrow() {
                    match house.turn().await {
                        Ok(kid) => signed.send_modify(|seen| *seen.entry(kid).or_default() += 1),
                        Err(why) => failed.lock().unwrap().push(why),
                    }
                }
            })
        })
        .collect();
    let mut many = async |kid: &str| {
        let seen = seen.wait_for(|seen| seen.get(kid).is_some_and(|count| *count >= 20));
        within(SOON, seen, "turns signed with a key").await.map(drop).unwrap();
    };
    many(&first).await;

    let prepared = house.keys("rotate", &["--ahead", "5s"]).await;
    assert!(prepared.contains("prepared a key"), "{prepared}");
    let second = house.ring().keys().find(|key| key.state == State::Next).unwrap().kid.to_string();
    let promoted = async {
        // The command says when; asking it before then changes nothing.
        while !house.keys("rotate", &["--ahead", "5s"]).await.contains("signs from now on") {
            tokio::time::sleep(Duration::from_millis(250)).await;
        }
    };
    within(SOON, promoted, "the next key's time to come").await;
    many(&second).await;
    stop.send_replace(true);
    for client in clients {
        client.await.unwrap();
    }
    assert_eq!(*failed.lock().unwrap(), Vec::<String>::new(), "no turn is rejected");
    let seen = signed.borrow().clone();
    assert_eq!(seen.keys().collect::<std::collections::BTreeSet<_>>(), [&first, &second].into(), "{seen:?}");
    let reply = house.forged(&before).await;
    assert_eq!(reply.status, 200, "what a retired key signed is still believed: {}", reply.text());

    let audit = house.folder.path().join("policy.audit.jsonl");
    let (status, shown) = headgate().arguments(["keys", "audit"]).argument(audit).run(SOON).await;
    assert!(status.success() && shown.contains("headgate run") && shown.contains("the chain is sound"), "{shown}");
    let order = ["generated", "prepared", "retired", "promoted"].map(|action| shown.find(&format!("policy.key.{action}")).unwrap());
    assert!(order.is_sorted(), "{shown}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_revoked_key_signs_is_refused_as_soon_as_the_keys_are_read_again() {
    let house = House::start(None).await;
    let stolen = house.ring();
    let kid = stolen.current().unwrap().to_string();
    let reply = house.forged(&stolen).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    let ring = house.folder.path().join("policy.json");
    let (status, output) = headgate().arguments(["keys", "revoke"]).argument(ring).argument(&kid).run(SOON).await;
    assert!(status.success() && output.contains("revoked"), "{output}");
    let refused = async {
        loop {
            let reply = house.forged(&stolen).await;
            if reply.status != 200 {
                return reply;
            }
        }
    };
    // A second until the gateway has seen its file, a second until the orchestrator asks again, and a slow machine.
    let refused = within(Duration::from_secs(8), refused, "the revoked key to be refused").await;
    assert_eq!((refused.problem().unwrap().as_str(), &refused.json()["detail"]), ("verdict_invalid", &"kid".into()));
    let another = async {
        loop {
            if let Ok(signer) = house.turn().await {
                return signer;
            }
        }
    };
    assert_ne!(within(SOON, another, "another key to be believed").await, kid);
    assert_ne!(house.forged(&stolen).await.status, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rotation_that_is_due_is_shown_until_it_is_done() {
    let old = Ring::generate(unix_now() - ROTATE_AFTER).unwrap();
    let house = House::start(Some(old)).await;
    let due = async || ask(house.admin, &Request::get("/metrics")).await.unwrap().text().contains("headgate_signing_key_due 1\n");
    assert!(due().await);
    assert!(house.keys("list", &[]).await.contains("a successor is due since"));
    house.keys("rotate", &["--when-due", "--ahead", "5s"]).await;
    let done = async {
        while due().await {
            house.keys("rotate", &["--when-due", "--ahead", "5s"]).await;
            tokio::time::sleep(Duration::from_millis(250)).await;
        }
    };
    within(SOON, done, "the rotation to be done").await;
    assert!(house.keys("rotate", &["--when-due"]).await.contains("nothing to do"));
}
