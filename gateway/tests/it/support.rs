//! A whole gateway for a test: its config, its workers, on ports that the system chose.

use std::{fmt::Write, net::SocketAddr, sync::OnceLock};

use headgate_config::Plan;
use headgate_gateway::shell::{Process, Sockets};

/// A gateway that runs.
pub(crate) struct Gateway {
    /// Where clients connect.
    pub(crate) addr: SocketAddr,
    /// Where operators look.
    pub(crate) admin: SocketAddr,
    /// The process, to be stopped, or looked into.
    pub(crate) process: Process,
    /// Holds the files that the config names.
    pub(crate) folder: tempfile::TempDir,
}

/// What a test changes about it, as lines of its config.
pub(crate) struct Setup {
    filters: String,
    upstream: String,
    route: String,
    top: String,
    chat: String,
    protocol: &'static str,
    files: Vec<(&'static str, String)>,
}

impl Setup {
    /// No filters but the defaults.
    pub(crate) fn new() -> Setup {
        Setup {
            filters: String::new(),
            upstream: String::new(),
            route: String::new(),
            top: String::new(),
            chat: String::new(),
            protocol: "openai",
            files: Vec::new(),
        }
    }

    /// With these filters, one a line, as the config has them: `moderation: { mask: [email] }`.
    pub(crate) fn chain(filters: &[&str]) -> Setup {
        let mut setup = Setup::new();
        for filter in filters {
            let _ = writeln!(setup.filters, "      - {filter}");
        }
        setup
    }

    /// With this filter on `/v1/chat/stream` alone: `cancellation: { on_disconnect: grace 30s }`.
    pub(crate) fn chat(mut self, filter: &str) -> Setup {
        let _ = writeln!(self.chat, "      - {filter}");
        self
    }

    /// With these settings of the upstream: `timeouts: { idle: 1s }`.
    pub(crate) fn upstream(mut self, settings: &str) -> Setup {
        let _ = writeln!(self.upstream, "    {settings}");
        self
    }

    /// With these settings of all routes: `origins: [...]`.
    pub(crate) fn route(mut self, settings: &str) -> Setup {
        let _ = writeln!(self.route, "    {settings}");
        self
    }

    /// With these settings at the top: `limits: {...}`.
    pub(crate) fn top(mut self, settings: &str) -> Setup {
        let _ = writeln!(self.top, "{settings}");
        self
    }

    /// With an upstream that speaks the orchestrator's protocol.
    pub(crate) fn orchestrated(mut self) -> Setup {
        self.protocol = "orchestrator";
        self
    }

    /// With a file beside the config.
    pub(crate) fn file(mut self, name: &'static str, text: impl Into<String>) -> Setup {
        self.files.push((name, text.into()));
        self
    }

    fn yaml(&self, url: &str) -> String {
        let Setup { filters, upstream, route, top, chat, protocol, .. } = self;
        // A socket of many turns is shaken hands with in this time too, by a test that the machine may not let run for a second.
        let timeouts = if upstream.contains("timeouts:") { "" } else { "    timeouts: { connect: 20s }\n" };
        let mut yaml = format!(
            "listen: 127.0.0.1:1\nadmin: {{ listen: \"127.0.0.1:2\" }}\nworkers: 1\npolicy: {{ constitution: constitution.md, version: \"7\" }}\n{top}\
             upstreams:\n  model:\n    protocol: {protocol}\n    endpoints: [\"{url}\"]\n    health: {{ interval: 0s }}\n{timeouts}{upstream}routes:\n"
        );
        for path in ["/v1/chat/stream", "/v1/chat/completions", "/v1/models"] {
            let models = if path == "/v1/models" { "    models: [demo]\n" } else { "" };
            let filters = format!("{}{filters}", if path == "/v1/chat/stream" { chat } else { "" });
            let filters = if filters.is_empty() { filters } else { format!("    filters:\n{filters}") };
            let _ = write!(yaml, "  - path: {path}\n    upstream: model\n{models}{filters}{route}");
        }
        yaml
    }

    /// The plan in front of `url`, and the folder with its files.
    pub(crate) fn plan(&self, url: &str) -> (Plan, tempfile::TempDir) {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::write(folder.path().join("constitution.md"), "# Ours\n\n## 1 Be kind\n\nBe kind.\n").expect("a file");
        for (name, text) in &self.files {
            std::fs::write(folder.path().join(name), text).expect("a file");
        }
        let yaml = self.yaml(url);
        std::fs::write(folder.path().join("headgate.yaml"), &yaml).expect("a file");
        match headgate_config::load(&folder.path().join("headgate.yaml"), None, &|_| None) {
            Ok(plan) => (plan, folder),
            Err(faults) => panic!("{faults}\n{yaml}"),
        }
    }

    /// Starts it in front of `url`.
    pub(crate) async fn start(self, url: &str) -> Gateway {
        let (plan, folder) = self.plan(url);
        start(&plan, folder).await
    }
}

/// Starts a plan on ports that the system chooses.
pub(crate) async fn start(plan: &Plan, folder: tempfile::TempDir) -> Gateway {
    let any = || std::net::TcpListener::bind("127.0.0.1:0").ok();
    let sockets = Sockets { clients: any(), admin: any(), orchestrator: None, slm: None };
    let process = Process::start(plan, sockets).await.expect("a process");
    Gateway { addr: process.clients.expect("an address"), admin: process.admin.expect("an address"), process, folder }
}

/// An API key, and the line of an `auth` filter that takes it.
pub(crate) fn key() -> (&'static str, &'static str) {
    static LINE: OnceLock<String> = OnceLock::new();
    let key = "hg_0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
    let hash = headgate_filters::auth::KeyHash::of(key);
    (key, LINE.get_or_init(|| format!("auth: {{ keys: [{{ key: \"{hash}\", tenant: acme, subject: u1 }}] }}")))
}

impl Gateway {
    /// What `/metrics` shows.
    pub(crate) async fn metrics(&self) -> String {
        headgate_testkit::client::ask(self.admin, &headgate_testkit::client::Request::get("/metrics")).await.expect("metrics").text()
    }

    /// The turns that have ended: how, with which code, how often.
    pub(crate) async fn ends(&self) -> Vec<(String, String, u64)> {
        let metrics = self.metrics().await;
        let label = |line: &str, name: &str| {
            let (_, rest) = line.split_once(&format!("{name}=\"")).expect("a label");
            rest.split('"').next().unwrap_or_default().to_owned()
        };
        let lines = metrics.lines().filter(|line| line.starts_with("headgate_turns_total{"));
        let mut ends: Vec<_> = lines
            .map(|line| {
                let count = line.rsplit(' ').next().and_then(|count| count.parse().ok()).expect("a number");
                (label(line, "end"), label(line, "code"), count)
            })
            .collect();
        ends.sort();
        ends
    }

    /// Waits until every turn has ended, and gives how they did.
    pub(crate) async fn ended(&self) -> Vec<(String, String, u64)> {
        let none = async {
            while self.open().await > 0 {
                tokio::task::yield_now().await;
            }
        };
        headgate_testkit::soon(none, "every turn to end").await;
        self.ends().await
    }

    /// Turns that run now.
    pub(crate) async fn open(&self) -> u64 {
        let metrics = self.metrics().await;
        let lines = metrics.lines().filter(|line| line.starts_with("headgate_open_turns{"));
        lines.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum()
    }
}

/// One end, as [`Gateway::ends`] has it.
pub(crate) fn end(end: &str, code: &str, times: u64) -> (String, String, u64) {
    (end.into(), code.into(), times)
}
