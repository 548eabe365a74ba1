//! Which endpoint gets the next turn: pingora's balancer and health state, our endpoints and leases. The one home of pingora here.

use std::{
    collections::BTreeSet,
    future::Future,
    hash::{DefaultHasher, Hash, Hasher},
    net::{IpAddr, Ipv6Addr, SocketAddr},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use futures_util::FutureExt;
use pingora_error::{Error, ErrorType};
use pingora_load_balancing::{
    Backend, Backends, LoadBalancer, discovery,
    health_check::HealthCheck,
    selection::{BackendIter, BackendSelection, Consistent, RoundRobin},
};
use tokio::time::Instant;

use crate::{
    endpoint::Endpoint,
    settings::{Balance, Health, Invalid},
};

/// The endpoints of one upstream, behind one balancer.
pub(crate) struct Fleet {
    endpoints: Vec<Arc<Endpoint>>,
    balancer: Balancer,
}

enum Balancer {
    LeastBusy(LoadBalancer<LeastBusy>),
    RoundRobin(LoadBalancer<RoundRobin>),
    Session(LoadBalancer<Consistent>),
}

macro_rules! each {
    ($balancer:expr, $it:ident => $do:expr) => {
        match $balancer {
            Balancer::LeastBusy($it) => $do,
            Balancer::RoundRobin($it) => $do,
            Balancer::Session($it) => $do,
        }
    };
}

impl Fleet {
    pub(crate) fn new(endpoints: Vec<Arc<Endpoint>>, balance: Balance, health: Health, connect: Duration) -> Result<Fleet, Invalid> {
        let mut set = BTreeSet::new();
        for endpoint in &endpoints {
            let mut backend = Backend::new(&identity(endpoint).to_string())
                .map_err(|_| Invalid::Endpoint { uri: endpoint.name.to_string(), expected: "a host and a port" })?;
            backend.ext.insert(Arc::clone(endpoint));
            if !set.insert(backend) {
                return Err(Invalid::Endpoint { uri: endpoint.name.to_string(), expected: "each endpoint named once" });
            }
        }
        let check = Check { connect, health };
        let balancer = match balance {
            Balance::LeastBusy => Balancer::LeastBusy(balancer(set, check)),
            Balance::RoundRobin => Balancer::RoundRobin(balancer(set, check)),
            Balance::Session => Balancer::Session(balancer(set, check)),
        };
        Ok(Fleet { endpoints, balancer })
    }

    pub(crate) fn endpoints(&self) -> &[Arc<Endpoint>] {
        &self.endpoints
    }

    /// The endpoint for the next try, none of `tried`; `key` matters to [`Balance::Session`] alone.
    ///
    /// One in good health if there is any, else any: a check can be wrong, and refusing without asking helps nobody.
    pub(crate) fn pick(&self, key: &[u8], tried: &[Arc<Endpoint>]) -> Option<Lease> {
        let untried = |endpoint: &Arc<Endpoint>| !tried.iter().any(|other| Arc::ptr_eq(other, endpoint));
        if let [only] = self.endpoints.as_slice() {
            return untried(only).then(|| Lease::new(only));
        }
        let now = Instant::now();
        // Twice around: pingora's rings may name the same endpoint several times in a row.
        let steps = self.endpoints.len() * 2;
        let pick = |demand_health: bool| {
            each!(&self.balancer, it => it.select_with(key, steps, |backend, healthy| {
                endpoint_of(backend).is_some_and(|endpoint| untried(endpoint) && (!demand_health || (healthy && endpoint.awake(now))))
            }))
        };
        let backend = pick(true).or_else(|| pick(false));
        match backend.as_ref().and_then(endpoint_of) {
            Some(endpoint) => Some(Lease::new(endpoint)),
            None => self.endpoints.iter().find(|endpoint| untried(endpoint)).map(Lease::new),
        }
    }

    /// Whether the checks and the latest connections speak for each endpoint, in the order of the settings.
    pub(crate) fn ready(&self) -> Vec<bool> {
        let now = Instant::now();
        let backends = each!(&self.balancer, it => it.backends());
        let members = backends.get_backend();
        let healthy = |endpoint: &Arc<Endpoint>| {
            members.iter().any(|backend| endpoint_of(backend).is_some_and(|it| Arc::ptr_eq(it, endpoint)) && backends.ready(backend))
        };
        self.endpoints.iter().map(|endpoint| endpoint.awake(now) && healthy(endpoint)).collect()
    }

    /// Checks every endpoint once, side by side.
    pub(crate) async fn check(&self) {
        each!(&self.balancer, it => it.backends().run_health_check(true).await);
    }
}

fn balancer<S: BackendSelection<Iter: BackendIter> + 'static>(set: BTreeSet<Backend>, check: Check) -> LoadBalancer<S> {
    let mut balancer = LoadBalancer::from_backends(Backends::new(discovery::Static::new(set)));
    balancer.set_health_check(Box::new(check));
    // A static list is there at once; only lists that are discovered elsewhere wait.
    let _ = balancer.update().now_or_never();
    balancer
}

/// pingora knows its members by socket address. Ours are names, which may have many addresses or new ones tomorrow: a name
/// becomes an address in a private range that nobody connects to, the same one in every process, so that Ketama's ring is too.
fn identity(endpoint: &Endpoint) -> SocketAddr {
    if let Ok(address) = endpoint.target.host.parse::<IpAddr>() {
        return SocketAddr::new(address, endpoint.target.port);
    }
    let mut hasher = DefaultHasher::new();
    endpoint.target.host.hash(&mut hasher);
    let address = 0xfd00_u128 << 112 | u128::from(hasher.finish());
    SocketAddr::new(IpAddr::V6(Ipv6Addr::from(address)), endpoint.target.port)
}

fn endpoint_of(backend: &Backend) -> Option<&Arc<Endpoint>> {
    backend.ext.get::<Arc<Endpoint>>()
}

/// The less busy of two chosen by chance, then the others: enough to keep queues short, without everybody running to the
/// one that is empty (Mitzenmacher, "The Power of Two Choices", 2001).
pub(crate) struct LeastBusy {
    backends: Vec<Backend>,
    seed: AtomicU64,
}

impl BackendSelection for LeastBusy {
    type Iter = TwoThenRest;
    type Config = ();

    fn build(backends: &BTreeSet<Backend>) -> LeastBusy {
        LeastBusy { backends: backends.iter().cloned().collect(), seed: AtomicU64::new(0) }
    }

    fn iter(self: &Arc<LeastBusy>, _key: &[u8]) -> TwoThenRest {
        let n = self.backends.len().max(1);
        // SplitMix64 (Steele, Lea, Flood, 2014): a counter and three multiplications, no state to lock.
        let mut bits = self.seed.fetch_add(0x9e37_79b9_7f4a_7c15, Relaxed);
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^= bits >> 31;
        let first = (bits as u32) as usize % n;
        let second = (first + 1 + (bits >> 32) as usize % (n - 1).max(1)) % n;
        let busy = |at: usize| self.backends.get(at).and_then(endpoint_of).map_or(usize::MAX, |it| it.in_flight.load(Relaxed));
        let (better, other) = if busy(second) < busy(first) { (second, first) } else { (first, second) };
        TwoThenRest { from: Arc::clone(self), better, other, step: 0 }
    }
}

pub(crate) struct TwoThenRest {
    from: Arc<LeastBusy>,
    better: usize,
    other: usize,
    step: usize,
}

impl BackendIter for TwoThenRest {
    fn next(&mut self) -> Option<&Backend> {
        let n = self.from.backends.len();
        let at = match self.step {
            0 => self.better,
            1 => self.other,
            step if step < n + 2 => (self.other + step - 1) % n.max(1),
            _ => return None,
        };
        self.step += 1;
        self.from.backends.get(at)
    }
}

/// Connects as a turn would, name and TLS included, and hangs up.
struct Check {
    connect: Duration,
    health: Health,
}

type Checking<'a> = Pin<Box<dyn Future<Output = pingora_error::Result<()>> + Send + 'a>>;

impl HealthCheck for Check {
    // Spelt out as `async_trait` would: it saves a dependency.
    fn check<'a, 'b, 'c>(&'a self, backend: &'b Backend) -> Checking<'c>
    where
        'a: 'c,
        'b: 'c,
    {
        Box::pin(async move {
            let Some(endpoint) = endpoint_of(backend) else { return Ok(()) };
            match tokio::time::timeout(self.connect, endpoint.target.connect()).await {
                Ok(Ok(_)) => {
                    endpoint.worked();
                    Ok(())
                }
                Ok(Err(error)) => Error::e_because(ErrorType::ConnectError, "health check", error),
                Err(_) => Error::e_explain(ErrorType::ConnectTimedout, "health check"),
            }
        })
    }

    fn health_status_change<'a, 'b, 'c>(&'a self, backend: &'b Backend, healthy: bool) -> Pin<Box<dyn Future<Output = ()> + Send + 'c>>
    where
        'a: 'c,
        'b: 'c,
    {
        if let Some(endpoint) = endpoint_of(backend) {
            tracing::warn!(endpoint = %endpoint.name, healthy, "endpoint changed");
        }
        Box::pin(async {})
    }

    fn backend_summary(&self, backend: &Backend) -> String {
        endpoint_of(backend).map(|endpoint| endpoint.name.to_string()).unwrap_or_default()
    }

    fn health_threshold(&self, success: bool) -> usize {
        if success { self.health.successes } else { self.health.failures }
    }
}

/// A turn's place on an endpoint, given back when dropped.
pub(crate) struct Lease(Arc<Endpoint>);

impl Lease {
    fn new(endpoint: &Arc<Endpoint>) -> Lease {
        endpoint.in_flight.fetch_add(1, Relaxed);
        Lease(Arc::clone(endpoint))
    }

    pub(crate) fn endpoint(&self) -> &Arc<Endpoint> {
        &self.0
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Relaxed);
    }
}

/// Kept in the endpoint: answers open on it.
pub(crate) type InFlight = AtomicUsize;
