//! From a checked plan to what runs: routes, orchestrator, model.

use std::{collections::BTreeSet, path::Path, sync::Arc, time::Duration};

use headgate_config::plan::{self, Plan, PolicyKey, Protocol, VerdictKeys};
use headgate_filters::{LocalLedger, PolicyInForce, Problem, Spec, Tools, build_chain, unix_now};
use headgate_orchestrator::{Bounds, Confirm, Models, Orchestrator, events};
use headgate_policy::{KeyFault, Ring, Verifier, custody};
use headgate_slm::Slm;
use headgate_store::{Locks, Modes, Redis, Used};
use headgate_upstream::{Settings, Upstream, settings};

use crate::{
    delivery::Courier,
    keys::{Discovered, Fetched, Signing},
    live::{Live, Route},
    registry::{OurPolicy, Policies},
    telemetry::Meters,
    tls::{Tls, Unusable},
    training::{self, Seen},
};

/// Why a plan that was checked cannot run here.
#[derive(Debug, thiserror::Error)]
pub enum Unbuildable {
    /// An upstream cannot be set up.
    #[error("upstream `{name}` cannot be set up")]
    Upstream {
        /// Which.
        name: String,
        /// Why.
        source: settings::Invalid,
    },
    /// A chain cannot be built, though it was when it was checked: a file has changed since.
    #[error("route `{route}`: {}", problems.iter().map(Problem::to_string).collect::<Vec<_>>().join("; "))]
    Chain {
        /// Which.
        route: Arc<str>,
        /// Why.
        problems: Vec<Problem>,
    },
    /// A signing key cannot be made, or the keys of verdicts cannot be read.
    #[error("the policy's signing key cannot be used")]
    Key(#[from] KeyFault),
    /// The file of signing keys cannot be read, or not be made on record.
    #[error("the policy's signing key cannot be used")]
    Custody(#[from] custody::CustodyFault),
    /// The signing key cannot sign.
    #[error("the policy's signing key cannot sign: {0}")]
    Unsigned(#[from] headgate_policy::Unsigned),
    /// The registry does not take our own policy.
    #[error("the policy registry refuses the policy: {0}")]
    Registry(#[from] headgate_policy::NotInstalled),
    /// Redis cannot be asked where the config says it is.
    #[error("redis cannot be used")]
    Redis(#[from] headgate_store::Unusable),
    /// The registry is to be in Redis, and there is none.
    #[error("the policy registry is to be in redis, and the config names none")]
    NoRedis,
    /// The certificate cannot be used.
    #[error("the certificate cannot be used")]
    Tls(#[from] Unusable),
    /// The model cannot be loaded.
    #[error("the model cannot be loaded")]
    Model(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The orchestrator's event log cannot be opened.
    #[error(transparent)]
    Events(#[from] headgate_orchestrator::events::Unopened),
    /// What training mode remembers cannot be used.
    #[error("training mode cannot be used")]
    Training(#[source] std::io::Error),
    /// The folder for what the orchestrator is still to be told cannot be used.
    #[error("the spool cannot be used")]
    Spool(#[source] std::io::Error),
    /// An orchestrator is to believe the gateway's keys, and there are none.
    #[error("the orchestrator believes this gateway's verdicts, but no policy is in force that signs them")]
    NoKeys,
}

/// What outlives an exchange of configurations: counters of limits, fetched keys, the signing keys, what is shared.
#[derive(Clone)]
pub struct Lasting {
    /// Counters of limits.
    pub ledger: Arc<LocalLedger>,
    /// Identity providers' keys.
    pub keys: Fetched,
    /// What is shared with other processes.
    pub redis: Option<Redis>,
    /// Admins' identity providers' keys, by their issuers.
    pub issuers: Discovered,
    /// Which tenants are in training mode.
    pub modes: Arc<Modes>,
    /// Who says which policy is in force.
    pub policies: Policies,
    /// Our signing keys.
    pub signing: Option<Arc<Signing>>,
    /// Metrics.
    pub meters: Arc<Meters>,
    /// What the orchestrator is still to be told.
    pub courier: Courier,
}

/// A connection to the Redis of a plan. Must be called within the runtime that it lives on.
pub(crate) fn redis(told: &plan::Redis, budget: Duration) -> Result<Redis, headgate_store::Unusable> {
    match &told.ca {
        None => Redis::connect(told.url.expose(), budget),
        Some(ca) => Redis::connect_trusting(told.url.expose(), ca.as_bytes(), budget),
    }
}

impl Lasting {
    /// For a first plan. Must be called within the runtime that the process lives on.
    pub fn of(plan: &Plan) -> Result<Lasting, Unbuildable> {
        let ring = match plan.policy.as_ref().map(|policy| &policy.key) {
            None => None,
            Some(PolicyKey::Generated) => Some(Ring::generate(unix_now())?),
            Some(PolicyKey::File(path)) => Some(custody::load_or_generate(path, unix_now(), "headgate run")?),
        };
        let redis = plan.redis.as_ref().map(|told| redis(told, told.budget)).transpose()?;
        Ok(Lasting {
            ledger: Arc::new(LocalLedger::new()),
            keys: Fetched::default(),
            issuers: Discovered::default(),
            modes: Modes::new(redis.as_ref().map_or_else(Locks::here, Locks::shared)),
            policies: Policies::of(plan, redis.as_ref())?,
            redis,
            signing: ring.map(Signing::new).map(Arc::new),
            meters: Arc::default(),
            courier: Courier::new(plan.spool.as_deref()).map_err(Unbuildable::Spool)?,
        })
    }
}

/// The gateway's part of a plan.
pub fn live(plan: &Plan, lasting: &Lasting) -> Result<Live, Unbuildable> {
    let policy = match (&plan.policy, &lasting.signing) {
        (Some(policy), Some(signing)) => Some(PolicyInForce { signer: signing.clone(), issuer: policy.issuer.clone() }),
        _ => None,
    };
    let read = |path: &Path| plan.read(path);
    let tools = Tools {
        read: &read,
        ledger: lasting.ledger.clone(),
        keys: Arc::new(lasting.keys.clone()),
        policy: policy.clone(),
        registry: Some(lasting.policies.registry()),
        modes: Some(Arc::new(Seen(lasting.modes.clone()))),
        now: unix_now,
    };
    let mut upstreams: Vec<Upstream> = Vec::new();
    let mut routes = Vec::new();
    for route in &plan.routes {
        let upstream = match upstreams.iter().find(|upstream| upstream.name() == route.upstream) {
            Some(upstream) => upstream.clone(),
            None => {
                upstreams.push(upstream(plan, &route.upstream)?);
                upstreams[upstreams.len() - 1].clone()
            }
        };
        let filters = build_chain(&route.steps, &tools).map_err(|problems| Unbuildable::Chain { route: route.name.clone(), problems })?;
        let (meters, courier) = (lasting.meters.route(&route.name), lasting.courier.clone());
        routes.push(Arc::new(Route { plan: route.clone(), upstream, filters, meters, courier }));
    }
    // Last: what could not be built is not in force either.
    lasting.policies.adopt(plan)?;
    lasting.courier.serve(policy, upstreams);
    let policy = OurPolicy::of(plan, &lasting.policies);
    Ok(Live { routes, page: plan.page, policy, signing: lasting.signing.clone(), shown: plan.summary().to_json() })
}

/// Where identity providers publish their keys, once each.
pub fn key_urls(plan: &Plan) -> BTreeSet<String> {
    let steps = plan.routes.iter().flat_map(|route| &route.steps);
    steps.filter_map(|step| if let Spec::Auth(auth) = &step.spec { auth.jwks.clone() } else { None }).collect()
}

/// The upstream of that name.
pub fn upstream(plan: &Plan, name: &str) -> Result<Upstream, Unbuildable> {
    // A checked plan names no upstream that it does not have.
    let settings = plan.upstreams.get(name).map(told).unwrap_or_default();
    Upstream::new(name, settings).map_err(|source| Unbuildable::Upstream { name: name.to_owned(), source })
}

fn told(upstream: &plan::Upstream) -> Settings {
    Settings {
        protocol: match upstream.protocol {
            Protocol::Orchestrator => headgate_upstream::Protocol::Orchestrator,
            // Only proxied: nothing is asked of it in any protocol of ours.
            Protocol::OpenAi | Protocol::Http => headgate_upstream::Protocol::OpenAi,
        },
        hop: match upstream.hop {
            plan::Hop::Events => headgate_upstream::Hop::Events,
            plan::Hop::WebSocket => headgate_upstream::Hop::WebSocket,
        },
        endpoints: upstream.endpoints.clone(),
        timeouts: settings::Timeouts {
            connect: upstream.connect,
            first_byte: upstream.first_byte,
            idle: upstream.idle,
            total: upstream.total,
        },
        retry: settings::Retry { attempts: upstream.retries, share: upstream.retry_share, floor: upstream.retry_floor },
        limits: settings::Limits {
            line: upstream.line_bytes,
            event: upstream.event_bytes,
            head: upstream.head_bytes,
            fields: upstream.head_fields,
            whole: upstream.whole_bytes,
        },
        authorization: upstream.authorization.clone(),
        model: upstream.model.clone(),
        tls: settings::Tls { ca: upstream.ca.clone() },
        balance: match upstream.balance {
            plan::Balance::LeastBusy => settings::Balance::LeastBusy,
            plan::Balance::RoundRobin => settings::Balance::RoundRobin,
            plan::Balance::Session => settings::Balance::Session,
        },
        health: settings::Health {
            interval: upstream.health_interval,
            failures: upstream.health_failures,
            successes: upstream.health_successes,
        },
        idle: settings::Idle { max: upstream.kept, timeout: upstream.kept_for },
        path: None,
    }
}

/// The certificate of a plan, read.
pub fn tls(plan: &Plan) -> Result<Option<Tls>, Unbuildable> {
    Ok(plan.tls.as_ref().map(|tls| Tls::load(&tls.certificate, &tls.key)).transpose()?)
}

/// The orchestrator's part of a plan, and the URL of keys it must follow, if any.
pub fn orchestrator(plan: &Plan, told: &plan::Orchestrator, lasting: &Lasting) -> Result<Arc<Orchestrator>, Unbuildable> {
    let verifier = match &told.keys {
        VerdictKeys::Own => lasting.signing.as_ref().ok_or(Unbuildable::NoKeys)?.ring().verifier(),
        VerdictKeys::Jwks(jwks) => Verifier::from_jwks(jwks)?,
        // Nothing is believed until the keys have been fetched.
        VerdictKeys::Url(_) => Verifier::from_jwks(r#"{"keys":[]}"#)?,
    };
    let mut models = Models::new(upstream(plan, &told.upstream)?);
    for (model, name) in &told.models {
        models = models.with(model, upstream(plan, name)?);
    }
    let mut settings = headgate_orchestrator::Settings { issuer: told.issuer.clone(), drain: plan.drain, ..Default::default() };
    settings.history =
        Bounds { sessions: told.sessions, messages: told.session_messages, session_bytes: told.session_bytes, bytes: told.history_bytes };
    settings.limits.connections = told.connections;
    settings.limits.turns = told.turns;
    settings.limits.turn = told.turn;
    settings.limits.body = told.body_bytes;
    settings.limits.text = told.answer_bytes;
    if let Some(events) = &told.events {
        settings.delivery = events.unknown_after;
    }
    settings.confirm = told.confirm.clone().map(|plan::Confirm { tools, within }| Confirm { tools, within });
    let turns = settings.limits.turns;
    let mut orchestrator = Orchestrator::new(settings, models, verifier, lasting.policies.registry());
    if let Some(redis) = &lasting.redis {
        orchestrator = orchestrator.sharing(Used::new(redis.clone()));
    }
    if let Some(plan::Events { folder, cap, kafka, text, .. }) = &told.events {
        let topic = kafka.as_ref().map(topic);
        let keys = text.as_ref().map(|text| events::Keys { master: text.key.clone(), folder: text.folder.clone() });
        let (log, recovered) = events::Log::open(&events::Settings { folder: folder.clone(), cap: *cap, turns, topic, keys })?;
        tracing::info!(
            folder = %folder.display(),
            records = recovered.records,
            crashed_turns = recovered.crashed,
            torn_bytes = recovered.torn_bytes,
            "event log opened"
        );
        orchestrator = orchestrator.keeping(log);
    }
    if let (Some(told), Some(events)) = (&told.training, &told.events) {
        orchestrator = orchestrator.training(training::open(told, events, &lasting.issuers, lasting)?);
    }
    Ok(Arc::new(orchestrator))
}

/// A topic of the plan, and how its brokers are spoken to.
pub fn topic(kafka: &plan::Kafka) -> events::Topic {
    let tls = kafka.tls.as_ref().map(|tls| events::Tls { ca: tls.ca.clone(), own: tls.own.clone() });
    let sasl = kafka.sasl.as_ref().map(|sasl| events::Sasl {
        mechanism: sasl.mechanism,
        username: sasl.username.clone(),
        password: sasl.password.clone(),
    });
    events::Topic {
        brokers: events::Brokers { addresses: kafka.brokers.clone(), tls, sasl },
        name: kafka.topic.clone(),
        replication: kafka.replication_factor,
        in_sync: kafka.min_insync_replicas,
        partitions: kafka.create_with_partitions,
    }
}

/// The embedded model, or the one of the plan's file.
pub fn slm(told: &plan::Slm) -> Result<Arc<Slm>, Unbuildable> {
    Ok(Arc::new(match &told.model {
        None => Slm::embedded(),
        Some(path) => Slm::load(path).map_err(|error| Unbuildable::Model(error.into()))?,
    }))
}
