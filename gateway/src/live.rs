//! The configuration as it runs: routes with their chains compiled and their upstreams connected, exchanged as a whole.
//!
//! A turn keeps the routes it began with; a new configuration is for the turns after it.

use std::sync::Arc;

use arc_swap::ArcSwap;
use headgate_config::plan::{self, Origins};
use headgate_contracts::Trace;
use headgate_filters::{Built, Spec, Step, trace::Inbound};
use headgate_upstream::{EndpointHealth, Upstream};
use http::{HeaderMap, HeaderValue};
use serde_json::Value;

use crate::{
    delivery::Courier,
    keys::Signing,
    registry::OurPolicy,
    serve::Drain,
    session::Turns,
    telemetry::{Meters, RouteMeters},
};

/// The gateway: what all its workers share.
#[derive(Clone)]
pub struct App(Arc<Shared>);

struct Shared {
    live: ArcSwap<Live>,
    turns: Turns,
    drain: Drain,
    meters: Arc<Meters>,
}

/// A route, ready to run.
pub struct Route {
    /// What the configuration says of it.
    pub plan: plan::Route,
    /// Whom it asks.
    pub upstream: Upstream,
    /// Its chain, in order.
    pub filters: Vec<Built>,
    /// Its metrics.
    pub meters: RouteMeters,
    /// Who tells its upstream, where that is an orchestrator, what became of a turn.
    pub courier: Courier,
}

/// A configuration at work.
pub struct Live {
    /// In the order they are tried.
    pub routes: Vec<Arc<Route>>,
    /// Whether the chat page is served on paths that no route has.
    pub page: bool,
    /// What verdicts are signed under, where they are.
    pub policy: Option<OurPolicy>,
    /// The keys that verdicts are signed with.
    pub signing: Option<Arc<Signing>>,
    /// The configuration as people may see it: no secret in it.
    pub shown: Value,
}

impl Route {
    /// The trace of a request: the one it brings, or one that begins here, as the route's filter `trace` says.
    ///
    /// The filter says the same of a turn; here it also goes for the response's head and for what is no turn.
    pub fn trace(&self, headers: &HeaderMap) -> Trace {
        let restarts = |step: &Step| matches!(&step.spec, Spec::Trace(settings) if settings.inbound == Inbound::Restart);
        if self.plan.steps.iter().any(restarts) { Trace::fresh() } else { Trace::from_headers(headers) }
    }

    /// Whether a page of `origin` may call: one of the route's own list, or one that this very host served, where the host is an
    /// address or `localhost`. Names do not count: whoever owns one can make it lead here (DNS rebinding), and then their page
    /// and its calls name the same host.
    pub fn allows(&self, origin: &HeaderValue, host: Option<&str>) -> bool {
        let Ok(origin) = origin.to_str() else { return false };
        let authority = origin.split_once("://").map(|(_, authority)| authority);
        let own = authority.is_some_and(|authority| is_nobodys(authority) && host == Some(authority));
        own || match &self.plan.origins {
            Origins::Any => true,
            Origins::Listed(listed) => listed.iter().any(|allowed| allowed == origin),
        }
    }
}

/// Whether an authority names its host by what nobody can register: an address, or `localhost`.
fn is_nobodys(authority: &str) -> bool {
    let Ok(authority) = authority.parse::<http::uri::Authority>() else { return false };
    let host = authority.host();
    host == "localhost" || host.trim_start_matches('[').trim_end_matches(']').parse::<std::net::IpAddr>().is_ok()
}

impl Live {
    /// The route of a path.
    pub fn route(&self, path: &str) -> Option<&Arc<Route>> {
        self.routes.iter().find(|route| route.plan.path.fits(path))
    }

    /// The public keys, as RFC 7517 writes them.
    pub fn jwks(&self) -> Option<String> {
        self.signing.as_ref().map(|signing| signing.ring().jwks())
    }

    /// Each upstream's endpoints, once.
    pub fn upstream_health(&self) -> Vec<(String, Vec<EndpointHealth>)> {
        let mut all: Vec<(String, Vec<EndpointHealth>)> = Vec::new();
        for route in &self.routes {
            let name = route.upstream.name();
            if !all.iter().any(|(known, _)| known == name) {
                all.push((name.to_owned(), route.upstream.health()));
            }
        }
        all
    }

    /// The configuration, for people.
    pub fn describe(&self) -> Value {
        self.shown.clone()
    }
}

impl App {
    /// A gateway that runs `live`, for at most so many connections.
    pub fn new(live: Live, meters: Arc<Meters>, connections: usize) -> App {
        App(Arc::new(Shared { live: ArcSwap::from_pointee(live), turns: Turns::new(connections), drain: Drain::new(connections), meters }))
    }

    /// The configuration now.
    pub fn live(&self) -> Arc<Live> {
        self.0.live.load_full()
    }

    /// Runs another configuration from the next turn on.
    pub fn exchange(&self, live: Live) {
        self.0.live.store(Arc::new(live));
    }

    /// The turns that are running.
    pub fn turns(&self) -> &Turns {
        &self.0.turns
    }

    /// How the gateway is told to stop.
    pub fn drain(&self) -> &Drain {
        &self.0.drain
    }

    /// What `/metrics` shows.
    pub fn meters(&self) -> &Meters {
        &self.0.meters
    }

    /// Brings the gauges up to date that are read, not kept.
    pub fn observe(&self) {
        self.0.meters.observe(self.0.drain.connections(), &self.0.live.load());
    }
}
