//! A gateway for a test: one chat route, one OpenAI route, a chain as the test wants it.

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc, time::Duration};

use headgate_gateway::{
    live::{App, Kind, Live, Route},
    serve::{Limits, serve},
    telemetry::Meters,
};
use headgate_contracts::Flow;
use headgate_filters::{PolicyInForce, Step, Tools, build_chain};
use headgate_policy::{Issuer, Policy, Ring};
use headgate_upstream::{Protocol, Settings, Upstream};
use serde_json::{Value, json};

/// A gateway that runs.
pub(crate) struct Gateway {
    /// Where.
    pub addr: SocketAddr,
    /// What its workers share.
    pub app: App,
}

/// What a test changes about it.
pub(crate) struct Setup {
    /// The chain, as the config would write it.
    pub chain: Value,
    /// The upstreams' protocol.
    pub protocol: Protocol,
    /// Everything else about the upstream.
    pub upstream: Settings,
    /// The routes' bounds.
    pub flow: Flow,
    /// Files that the chain names.
    pub files: BTreeMap<&'static str, &'static str>,
    /// Origins of pages.
    pub origins: Vec<String>,
}

impl Default for Setup {
    fn default() -> Setup {
        Setup {
            chain: json!([]),
            protocol: Protocol::OpenAi,
            upstream: Settings::default(),
            flow: Flow::default(),
            files: BTreeMap::new(),
            origins: Vec::new(),
        }
    }
}

impl Setup {
    /// With this chain.
    pub(crate) fn chain(chain: Value) -> Setup {
        Setup { chain, ..Setup::default() }
    }

    /// Starts it in front of `upstream`.
    pub(crate) async fn start(self, upstream: &str) -> Gateway {
        let mut settings = self.upstream;
        settings.endpoints = vec![upstream.parse().expect("an address")];
        settings.protocol = self.protocol;
        settings.health.interval = None;
        let upstream = Upstream::new("model", settings).expect("settings that fit");
        let ring = Arc::new(Ring::generate(headgate_filters::unix_now()).expect("a key"));
        let steps: Vec<Step> = serde_json::from_value(self.chain).expect("a chain");
        let steps = headgate_filters::with_defaults(steps);
        let files = self.files;
        let read = move |path: &std::path::Path| {
            let text = path.to_str().and_then(|path| files.get(path));
            text.map(|text| text.to_string()).ok_or_else(|| std::io::Error::from(std::io::ErrorKind::NotFound))
        };
        let constitution = headgate_policy::Constitution::from_markdown("# 1 Be kind\n\nBe kind.\n").expect("a constitution");
        let issuer = Issuer { iss: "headgate".into(), pol: Policy { id: "test".into(), ver: "1".into() }, con: constitution.hash() };
        let policy = PolicyInForce { signer: ring.clone(), issuer };
        let tools = Tools { read: &read, policy: Some(policy), ..Tools::none() };
        let meters = Arc::new(Meters::default());
        let mut routes = Vec::new();
        for (path, kind) in [("/v1/chat/stream", Kind::Chat), ("/v1/chat/completions", Kind::OpenAi), ("/v1/models", Kind::OpenAi), ("/files", Kind::Proxy)] {
            routes.push(Arc::new(Route {
                name: path.into(),
                base: path.into(),
                below: kind == Kind::Proxy,
                kind,
                upstream: upstream.clone(),
                filters: build_chain(&steps, &tools).unwrap_or_else(|problems| panic!("{problems:?}")),
                flow: self.flow.clone(),
                origins: self.origins.clone(),
                models: vec!["demo".into()],
                max_body: 1 << 20,
                body_time: Duration::from_secs(30),
                strip_prefix: None,
                meters: meters.route(path),
            }));
        }
        let live = Live { routes, page: false, ring: Some(ring), shown: Value::Null };
        let app = App::new(live, meters, 1_000);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let addr = listener.local_addr().expect("an address");
        tokio::spawn(serve(listener, None, Limits::default(), app.clone(), app.drain().clone()));
        Gateway { addr, app }
    }
}
