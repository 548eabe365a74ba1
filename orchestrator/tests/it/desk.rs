//! A gateway's desk: dispatches turns with verdicts, true ones unless told otherwise.

use std::{
    io,
    net::SocketAddr,
    sync::{Arc, Mutex, OnceLock},
    time::SystemTime,
};

use headgate_contracts::TurnId;
use headgate_orchestrator::{Models, Orchestrator, Settings, events, serve};
use headgate_policy::{ANY_TENANT, Claims, Decision, Digest, Entry, Facts, Issuer, Memory, Policy, Registry, Ring};
use headgate_store::Used;
use headgate_testkit::{
    client::{self, Events, Reply, Request},
    soon,
    upstream::Upstream,
};
use headgate_upstream::{Protocol, settings::Health};
use prometheus_client::registry::Registry as Metrics;
use serde_json::{Value, json};
use tokio::{net::TcpListener, sync::oneshot, task::JoinHandle};

pub(crate) const STREAM: &str = "/v1/conversation/stream";
pub(crate) const STEP: &str = "/v1/conversation/step";
pub(crate) const TRACE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

pub(crate) struct Desk {
    pub(crate) addr: SocketAddr,
    pub(crate) orchestrator: Arc<Orchestrator>,
    pub(crate) ring: Ring,
    pub(crate) issuer: Issuer,
    pub(crate) registry: Arc<Memory>,
    policy_ring: Ring,
    metrics: Metrics,
    shutdown: Option<oneshot::Sender<()>>,
    serving: Option<JoinHandle<()>>,
}

/// What was logged so far, by all tests: JSON lines.
///
/// One subscriber for the whole binary, because tracing remembers what a thread without one thought of a place in the code.
pub(crate) fn logged() -> String {
    String::from_utf8(log().0.lock().unwrap().clone()).unwrap()
}

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn log() -> &'static Log {
    static LOG: OnceLock<Log> = OnceLock::new();
    LOG.get_or_init(|| {
        let log = Log::default();
        let writer = log.clone();
        tracing_subscriber::fmt().json().with_max_level(tracing::Level::TRACE).with_writer(move || writer.clone()).init();
        log
    })
}

pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs()
}

/// An upstream without health checks: what a script counts is then turns alone.
pub(crate) fn upstream(url: &str) -> headgate_upstream::Upstream {
    upstream_with(url, |_| {})
}

pub(crate) fn upstream_with(url: &str, change: impl FnOnce(&mut headgate_upstream::Settings)) -> headgate_upstream::Upstream {
    let mut settings = headgate_upstream::Settings {
        protocol: Protocol::OpenAi,
        endpoints: vec![url.parse().unwrap()],
        health: Health { interval: None, ..Health::default() },
        ..headgate_upstream::Settings::default()
    };
    change(&mut settings);
    headgate_upstream::Upstream::new("model", settings).unwrap()
}

impl Desk {
    pub(crate) async fn before(model: &Upstream) -> Desk {
        Desk::with(Models::new(upstream(&model.url())), Settings::default()).await
    }

    pub(crate) async fn with(models: Models, settings: Settings) -> Desk {
        let registry = Arc::new(Memory::new(16));
        Desk::asking(models, settings, registry.clone(), registry).await
    }

    pub(crate) async fn asking(models: Models, settings: Settings, registry: Arc<Memory>, asked: Arc<dyn Registry>) -> Desk {
        Desk::made(models, settings, registry, asked, |orchestrator| orchestrator).await
    }

    /// One that uses verdicts up for all who share `used`, and asks `registry`, or else its own.
    pub(crate) async fn sharing(models: Models, used: Option<Used>, registry: Option<Arc<dyn Registry>>, log: Option<events::Log>) -> Desk {
        let own = Arc::new(Memory::new(16));
        let asked = registry.unwrap_or_else(|| own.clone());
        let with = |orchestrator: Orchestrator| {
            let orchestrator = match used {
                Some(used) => orchestrator.sharing(used),
                None => orchestrator,
            };
            match log {
                Some(log) => orchestrator.keeping(log),
                None => orchestrator,
            }
        };
        Desk::made(models, Settings::default(), own, asked, with).await
    }

    pub(crate) async fn keeping(models: Models, settings: Settings, log: events::Log) -> Desk {
        let registry = Arc::new(Memory::new(16));
        Desk::made(models, settings, registry.clone(), registry, |orchestrator| orchestrator.keeping(log)).await
    }

    async fn made(
        models: Models,
        settings: Settings,
        registry: Arc<Memory>,
        asked: Arc<dyn Registry>,
        with: impl FnOnce(Orchestrator) -> Orchestrator,
    ) -> Desk {
        log();
        let (ring, policy_ring) = (Ring::generate(now()).unwrap(), Ring::generate(now()).unwrap());
        let con = Digest::of(b"constitution");
        let entry = Entry::first(ANY_TENANT, "7", con, now() - 1000);
        registry.install(&policy_ring.sign_entry(&entry).unwrap(), &policy_ring.verifier(), now()).unwrap();
        let orchestrator = Arc::new(with(Orchestrator::new(settings, models, ring.verifier(), asked)));
        let mut metrics = Metrics::default();
        orchestrator.register(&mut metrics);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let (shutdown, told) = oneshot::channel::<()>();
        let serving = tokio::spawn(serve(listener, orchestrator.clone(), async {
            let _ = told.await;
        }));
        let issuer = Issuer { iss: "headgate".into(), pol: Policy { id: "default".into(), ver: "7".into() }, con };
        Desk { addr, orchestrator, ring, issuer, registry, policy_ring, metrics, shutdown: Some(shutdown), serving: Some(serving) }
    }

    /// Puts version 8 in force; what was in force becomes the previous one.
    pub(crate) fn amend(&mut self, constitution: &[u8]) {
        let entry = Entry::first(ANY_TENANT, "7", self.issuer.con, now() - 1000).succeeded_by("8", Digest::of(constitution), now());
        self.registry.install(&self.policy_ring.sign_entry(&entry).unwrap(), &self.policy_ring.verifier(), now()).unwrap();
    }

    /// A turn of one user message.
    pub(crate) fn turn(&self, session: &str, text: &str) -> Turn<'_> {
        self.turn_of(session, json!([{"role": "user", "content": text}]))
    }

    pub(crate) fn turn_of(&self, session: &str, messages: Value) -> Turn<'_> {
        let id = TurnId::fresh().to_string();
        let body = json!({"turn_id": id, "session_id": session, "tenant": "acme", "subject": "u1", "messages": messages, "model": "demo"});
        Turn { desk: self, id, path: STREAM, body, sign: Box::new(|_| {}) }
    }

    pub(crate) async fn cancel(&self, turn: &str) -> u16 {
        let call = Request::new("POST", &format!("/v1/conversation/turns/{turn}/cancel"));
        client::ask(self.addr, &call).await.unwrap().status
    }

    /// Begins the shutdown; the returned handle ends with it.
    pub(crate) fn shut_down(&mut self) -> JoinHandle<()> {
        let _ = self.shutdown.take().expect("it is running").send(());
        self.serving.take().expect("it is running")
    }

    /// The value of a series, e.g. `orchestrator_requests_total{route="stream",decision="accepted"}`; 0 where it never counted.
    pub(crate) fn metric(&self, series: &str) -> u64 {
        let text = self.exported();
        let value = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        value.map_or(0, |value| value.parse::<f64>().unwrap() as u64)
    }

    pub(crate) fn decided(&self, route: &str, decision: &str) -> u64 {
        self.metric(&format!("orchestrator_requests_total{{route=\"{route}\",decision=\"{decision}\"}}"))
    }

    pub(crate) fn exported(&self) -> String {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.metrics).unwrap();
        text
    }

    /// Resolves when no turn is open.
    pub(crate) async fn idle(&self) {
        let idle = async {
            while self.orchestrator.open_turns() > 0 {
                tokio::task::yield_now().await;
            }
        };
        soon(idle, "every turn to end").await;
    }
}

/// A turn about to be dispatched.
pub(crate) struct Turn<'a> {
    desk: &'a Desk,
    pub(crate) id: String,
    path: &'static str,
    pub(crate) body: Value,
    sign: Box<dyn Fn(&mut Claims) + 'a>,
}

impl<'a> Turn<'a> {
    pub(crate) fn step(mut self) -> Turn<'a> {
        self.path = STEP;
        self
    }

    pub(crate) fn with(mut self, member: &str, value: impl Into<Value>) -> Turn<'a> {
        self.body[member] = value.into();
        self
    }

    /// Changes what the verdict claims before it is signed.
    pub(crate) fn claiming(mut self, change: impl Fn(&mut Claims) + 'a) -> Turn<'a> {
        self.sign = Box::new(change);
        self
    }

    /// The verdict's headers for these bytes, as the gateway would dispatch them.
    pub(crate) fn headers(&self, method: &str, bytes: &[u8]) -> Vec<(&'static str, String)> {
        let text = |member: &str| self.body[member].as_str().unwrap();
        let facts = Facts {
            tid: text("tenant"),
            sub: text("subject"),
            sid: text("session_id"),
            turn: &self.id,
            dec: Decision::Allow,
            cat: &[],
            trc: None,
        };
        let mut claims = self.desk.issuer.dispatch(&facts, method, self.path, Digest::of(bytes), now()).unwrap();
        (self.sign)(&mut claims);
        vec![
            ("policy-verdict", self.desk.ring.sign(&claims).unwrap()),
            ("policy-version", claims.pol.ver),
            ("constitution-hash", claims.con.to_string()),
            ("content-digest", Digest::of(bytes).to_string()),
            ("traceparent", TRACE.to_owned()),
        ]
    }

    pub(crate) fn request(&self) -> Request {
        let body = self.body.to_string();
        let request = Request::new("POST", self.path).header("content-type", "application/json");
        let headers = self.headers("POST", body.as_bytes());
        headers.iter().fold(request, |request, (name, value)| request.header(name, value)).body(body)
    }

    pub(crate) async fn reply(&self) -> Reply {
        client::ask(self.desk.addr, &self.request()).await.unwrap()
    }

    pub(crate) async fn events(&self) -> Events {
        client::stream(self.desk.addr, &self.request(), client_kind()).await.unwrap()
    }

    /// The text of the whole answer.
    pub(crate) async fn text(&self) -> String {
        self.events().await.rest().await.unwrap().text()
    }
}

pub(crate) fn client_kind() -> headgate_testkit::answer::Kind {
    headgate_testkit::answer::Kind::Conversation
}

/// What a model was sent, as `role:text`.
pub(crate) fn words(request: &headgate_testkit::upstream::Request) -> Vec<String> {
    let body = request.json();
    let messages = body["messages"].as_array().unwrap();
    messages.iter().map(|message| format!("{}:{}", message["role"].as_str().unwrap(), message["content"].as_str().unwrap())).collect()
}
