//! The config as it is used: checked, complete, without a trace of how it was written.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use headgate_contracts::{Flow, Secret};
use headgate_filters::{Step, auth::AdminTerms};
use headgate_policy::{Constitution, Issuer, Verifier};

pub use crate::file::{Balance, Forwarded, Hop, Kind, Logs, Protocol};
use crate::{Environment, Faults, effect::Effect, fault::Fault};

/// A config, checked. A turn keeps the plan it began with.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The environment whose overlay is in it.
    pub environment: Option<Environment>,
    /// Where clients connect; there is an address wherever there are routes.
    pub listen: Option<SocketAddr>,
    /// Where operators look; `None`: nowhere.
    pub admin: Option<SocketAddr>,
    /// Threads that serve.
    pub workers: usize,
    /// Whether the chat page is shown at `/`.
    pub page: bool,
    /// The certificate that clients see.
    pub tls: Option<Tls>,
    /// The policy in force.
    pub policy: Option<Policy>,
    /// What is shared with other processes.
    pub redis: Option<Redis>,
    /// Where what the orchestrator is still to be told waits, beside memory.
    pub spool: Option<PathBuf>,
    /// The bounds of connections and requests.
    pub limits: Limits,
    /// Who answers, by name.
    pub upstreams: BTreeMap<String, Upstream>,
    /// What clients may ask for, in the order in which it is looked for.
    pub routes: Vec<Route>,
    /// An orchestrator in this process.
    pub orchestrator: Option<Orchestrator>,
    /// The embedded model, served in this process.
    pub slm: Option<Slm>,
    /// Logs and traces.
    pub observability: Observability,
    /// How long open turns may go on once the process is told to stop.
    pub drain: Duration,
    /// What an operator should know, though the config is taken.
    pub warnings: Vec<Fault>,
    pub(crate) files: Files,
}

impl Plan {
    /// The route that a request for `path` takes.
    pub fn route(&self, path: &str) -> Option<&Route> {
        self.routes.iter().find(|route| route.path.fits(path))
    }

    /// A file that the config names, as it was when the config was checked: what `Tools::read` of the filters should be, so
    /// that nothing is used which was not checked.
    pub fn read(&self, path: &Path) -> io::Result<String> {
        self.files.again(path)
    }

    /// What refuses a checked plan after all, because of `setting`: for what only the libraries that will use it can find.
    pub fn refused(&self, setting: &str, found: String, remedy: &str) -> Faults {
        let file = self.files.own.as_ref().map(|path| path.display().to_string()).unwrap_or_default();
        let mut fault = Fault::of_file(&file, found).remedy(remedy);
        fault.path = setting.to_owned();
        Faults::one(fault)
    }

    /// All files whose change is a change of the config: it and its overlay, lists, documents, certificates, secrets.
    pub fn watched(&self) -> impl Iterator<Item = &Path> {
        self.files.all()
    }

    /// What it was made of: those of the watched files that were read, as they then were, secrets among them. It is for telling
    /// whether one of them is another now.
    pub fn made_of(&self) -> impl Iterator<Item = (&Path, &str)> {
        self.files.texts.iter().map(|(path, text)| (path.as_path(), &**text))
    }
}

/// The certificate that clients see.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tls {
    /// PEM, the certificate first.
    pub certificate: PathBuf,
    /// PEM.
    pub key: PathBuf,
}

/// The policy in force.
#[derive(Debug, Clone)]
pub struct Policy {
    /// The principles, and what the filters of all routes look for.
    pub constitution: Constitution,
    /// Who speaks, under which version and constitution hash.
    pub issuer: Issuer,
    /// The key that signs.
    pub key: PolicyKey,
    /// Who says what is in force; `None`: this config.
    pub registry: Option<PolicyRegistry>,
}

/// Where signed policy entries are, and whose count.
#[derive(Debug, Clone)]
pub struct PolicyRegistry {
    /// The public policy keys.
    pub keys: Verifier,
    /// Where the entries are; `None`: in the plan's Redis, which is then there.
    pub folder: Option<PathBuf>,
}

/// A Redis that several processes share.
#[derive(Debug, Clone)]
pub struct Redis {
    /// `redis://` or `rediss://`; there may be a password in it.
    pub url: Secret,
    /// With `rediss://`: the certificates to trust, as PEM; `None`: the system's.
    pub ca: Option<Arc<str>>,
    /// The longest that a turn waits for one answer.
    pub budget: Duration,
}

/// The key that signs verdicts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PolicyKey {
    /// A new one at every start.
    Generated,
    /// In this file, made if it is not there.
    File(PathBuf),
}

/// The bounds of connections and requests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Connections at once.
    pub connections: usize,
    /// From the connection to its first byte, or to the end of the TLS handshake.
    pub handshake: Duration,
    /// From the first byte of a request to the end of its headers.
    pub head: Duration,
    /// The largest request head, in bytes.
    pub head_bytes: usize,
    /// The most header fields of a request.
    pub head_fields: usize,
    /// How long a client may take nothing of what is written to its connection.
    pub stall: Duration,
    /// How long an HTTP/2 connection may carry no request.
    pub idle: Duration,
}

/// A named set of endpoints.
#[derive(Debug, Clone)]
pub struct Upstream {
    /// What they speak.
    pub protocol: Protocol,
    /// How turns travel there.
    pub hop: Hop,
    /// Where they are; at least one.
    pub endpoints: Vec<http::Uri>,
    /// The model to ask for, whatever the prompt says.
    pub model: Option<String>,
    /// The `Authorization` header; without a space in it, a bearer token.
    pub authorization: Option<Secret>,
    /// For one attempt: name lookup, TCP and TLS.
    pub connect: Duration,
    /// Until the answer begins, retries included.
    pub first_byte: Duration,
    /// Between two pieces of an answer.
    pub idle: Duration,
    /// The whole answer.
    pub total: Duration,
    /// Tries after the first.
    pub retries: u32,
    /// Retries as a share of all turns, from 0 to 1.
    pub retry_share: f32,
    /// Retries per second that are always allowed.
    pub retry_floor: u32,
    /// Which endpoint gets the next turn.
    pub balance: Balance,
    /// Time between two rounds of health checks; `None`: there are none.
    pub health_interval: Option<Duration>,
    /// Failed checks in a row after which an endpoint is passed over.
    pub health_failures: usize,
    /// Good checks in a row after which it is asked again.
    pub health_successes: usize,
    /// Connections kept between turns, per endpoint.
    pub kept: usize,
    /// How long one is kept.
    pub kept_for: Duration,
    /// The longest line of an event stream, in bytes.
    pub line_bytes: usize,
    /// The largest event, in bytes.
    pub event_bytes: usize,
    /// The largest response head, in bytes.
    pub head_bytes: usize,
    /// The most fields of a response head.
    pub head_fields: usize,
    /// The largest answer that comes whole, in bytes.
    pub whole_bytes: usize,
    /// A PEM file of certificates to trust instead of the system's.
    pub ca: Option<PathBuf>,
}

/// What clients may ask for at one path.
#[derive(Debug, Clone)]
pub struct Route {
    /// Its path as written, for metrics and logs.
    pub name: Arc<str>,
    /// The paths it takes.
    pub path: PathPattern,
    /// What is spoken there.
    pub kind: Kind,
    /// Who answers: a key of [`Plan::upstreams`].
    pub upstream: String,
    /// What turns go through, as written: for [`headgate_filters::build_chain`], which adds the defaults.
    pub steps: Vec<Step>,
    /// How its turns flow, what the filters set included.
    pub flow: Flow,
    /// Web pages that may call it.
    pub origins: Origins,
    /// The methods that are passed through; all if empty.
    pub methods: Vec<http::Method>,
    /// What is taken away from the front of a request's path.
    pub strip_prefix: Option<String>,
    /// What upstreams are told about clients.
    pub forwarded: Forwarded,
    /// The models that it names.
    pub models: Vec<String>,
    /// From the end of a request's headers to the end of its body.
    pub body: Duration,
    /// The largest request body, in bytes.
    pub body_bytes: usize,
    /// What it comes to: the chain in force, delays, bounds.
    pub effect: Effect,
}

/// The paths of a route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PathPattern {
    /// The path, without `/*` and without a slash at the end.
    pub base: String,
    /// Whether everything below it belongs to it too: for `/*`, and for chat routes, whose turns are below.
    pub below: bool,
    /// Whether the path itself belongs to it.
    pub itself: bool,
}

impl PathPattern {
    /// Whether a request for `path` (without a query) is meant.
    pub fn fits(&self, path: &str) -> bool {
        match path.strip_prefix(self.base.as_str()) {
            Some("") => self.itself,
            Some(rest) => self.below && rest.starts_with('/'),
            None => false,
        }
    }

    /// Whether every path of `other` is one of ours.
    pub(crate) fn covers(&self, other: &PathPattern) -> bool {
        match other.base.strip_prefix(self.base.as_str()) {
            Some("") => (self.itself || !other.itself) && (self.below || !other.below),
            Some(rest) => self.below && rest.starts_with('/'),
            None => false,
        }
    }
}

impl fmt::Display for PathPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.base.as_str(), self.below) {
            ("", false) => f.write_str("/"),
            (base, false) => f.write_str(base),
            (base, true) => write!(f, "{base}/*"),
        }
    }
}

/// Web pages that may call a route from a browser.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origins {
    /// Pages of the gateway's own address, and these: scheme, host and port, in lower case as browsers send it.
    Listed(Vec<String>),
    /// All.
    Any,
}

/// An orchestrator in this process.
#[derive(Debug, Clone)]
pub struct Orchestrator {
    /// Where gateways connect.
    pub listen: SocketAddr,
    /// Who answers: a key of [`Plan::upstreams`].
    pub upstream: String,
    /// Models that another upstream answers for.
    pub models: BTreeMap<String, String>,
    /// Whose verdicts count.
    pub keys: VerdictKeys,
    /// How often keys are read again from a URL.
    pub keys_refresh: Duration,
    /// The issuer whose verdicts count.
    pub issuer: String,
    /// Sessions remembered.
    pub sessions: usize,
    /// Messages remembered per session.
    pub session_messages: usize,
    /// Text remembered per session, in bytes.
    pub session_bytes: usize,
    /// Text remembered in all, in bytes.
    pub history_bytes: usize,
    /// Connections at once.
    pub connections: usize,
    /// Turns open at once.
    pub turns: usize,
    /// The longest a turn may take in all.
    pub turn: Duration,
    /// The largest body of a request, in bytes.
    pub body_bytes: usize,
    /// The most text of one answer, in bytes.
    pub answer_bytes: usize,
    /// What became of each turn, kept on disk.
    pub events: Option<Events>,
    /// Training mode.
    pub training: Option<Training>,
    /// Calls that a person has to agree to.
    pub confirm: Option<Confirm>,
}

/// Calls of tools that a person has to agree to.
#[derive(Debug, Clone)]
pub struct Confirm {
    /// The tools.
    pub tools: BTreeSet<String>,
    /// How long the person may take.
    pub within: Duration,
}

/// Who turns training mode on, and what it stands on.
#[derive(Debug, Clone)]
pub struct Training {
    /// What makes an admin.
    pub admins: AdminTerms,
    /// How long a lock outlives whoever renews it.
    pub ttl: Duration,
    /// The longest that a lock is held.
    pub max_hold: Duration,
    /// The audit topic; `None`: lock and audit are of this process alone.
    pub topic: Option<Kafka>,
    /// The high part of fences.
    pub epoch: u16,
}

/// Where the log of events is, and how large it may be.
#[derive(Debug, Clone)]
pub struct Events {
    /// Its folder.
    pub folder: PathBuf,
    /// The most that it takes on disk, in bytes.
    pub cap: u64,
    /// How long a gateway may take to say what the user got of a turn.
    pub unknown_after: Duration,
    /// The topic that events go on to.
    pub kafka: Option<Kafka>,
    /// What is needed to keep text.
    pub text: Option<Text>,
}

/// Where the keys are that text is sealed under.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Text {
    /// The file with the master key.
    pub key: PathBuf,
    /// The folder with the keys of subjects.
    pub folder: PathBuf,
}

/// A topic, and what it must be like.
#[derive(Debug, Clone)]
pub struct Kafka {
    /// Some of its brokers, each as `host:port`.
    pub brokers: Vec<String>,
    /// How brokers are spoken to in private.
    pub tls: Option<BrokerTls>,
    /// Who we are to them.
    pub sasl: Option<Sasl>,
    /// Its name.
    pub topic: String,
    /// Replicas of each partition, at least.
    pub replication_factor: u16,
    /// Replicas that have an event before it counts as delivered, at least.
    pub min_insync_replicas: u16,
    /// How many partitions it is made with where it is missing.
    pub create_with_partitions: Option<u16>,
}

/// Whom we trust as a broker, and by what brokers know us.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BrokerTls {
    /// The file with the certificates to trust; `None`: those of the machine.
    pub ca: Option<PathBuf>,
    /// The files of our certificate and its key.
    pub own: Option<(PathBuf, PathBuf)>,
}

/// Who we are to brokers.
#[derive(Debug, Clone)]
pub struct Sasl {
    /// The name of a SASL mechanism.
    pub mechanism: &'static str,
    /// The user.
    pub username: String,
    /// Its password.
    pub password: Secret,
}

/// Whose verdicts an orchestrator believes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VerdictKeys {
    /// Those of the gateway in this process.
    Own,
    /// Those with keys in this JWKS.
    Jwks(String),
    /// Those with keys published there.
    Url(http::Uri),
}

/// The embedded model.
#[derive(Debug, Clone, PartialEq)]
pub struct Slm {
    /// Where it listens.
    pub listen: SocketAddr,
    /// A GGUF file instead of the embedded one.
    pub model: Option<PathBuf>,
    /// Tokens per second of each turn at most.
    pub pace: Option<f32>,
}

/// Logs and traces.
#[derive(Debug, Clone, PartialEq)]
pub struct Observability {
    /// The form of the log.
    pub logs: Logs,
    /// What is logged, in the directives of `tracing_subscriber::EnvFilter`.
    pub level: String,
    /// Where traces are sent.
    pub otlp: Option<http::Uri>,
    /// The share of traces that begin here and are sent, from 0 to 1.
    pub sampling: f64,
}

/// The files of a config, as they were when it was checked.
#[derive(Clone, Default)]
pub(crate) struct Files {
    pub(crate) folder: PathBuf,
    /// The config's own, unless it is in no file.
    pub(crate) own: Option<PathBuf>,
    pub(crate) texts: BTreeMap<PathBuf, Arc<str>>,
    pub(crate) unread: Vec<PathBuf>,
}

impl Files {
    pub(crate) fn resolve(&self, path: &Path) -> PathBuf {
        self.folder.join(path)
    }

    fn again(&self, path: &Path) -> io::Result<String> {
        let text = self.texts.get(&self.resolve(path)).ok_or(io::ErrorKind::NotFound)?;
        Ok(text.to_string())
    }

    fn all(&self) -> impl Iterator<Item = &Path> {
        self.texts.keys().chain(&self.unread).map(PathBuf::as_path)
    }
}

impl fmt::Debug for Files {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Lists of forbidden phrases and secrets among them.
        f.debug_list().entries(self.all()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pattern(base: &str, below: bool, itself: bool) -> PathPattern {
        PathPattern { base: base.to_owned(), below, itself }
    }

    #[test]
    fn a_pattern_covers_another_exactly_if_it_fits_all_of_its_paths() {
        let patterns: Vec<PathPattern> = ["", "/a", "/a/b", "/ab", "/"]
            .into_iter()
            .flat_map(|base| [(true, true), (true, false), (false, true)].map(|(below, itself)| pattern(base, below, itself)))
            .filter(|pattern| pattern.base != "/" || !pattern.below)
            .collect();
        // Enough paths to tell any two of these patterns apart.
        let paths = ["", "/", "/a", "/a/", "/a/b", "/a/b/c", "/a/c", "/ab", "/ab/c", "/abc", "/c", "/c/d"];
        for one in &patterns {
            for other in &patterns {
                let fits_all = paths.iter().filter(|path| other.fits(path)).all(|path| one.fits(path));
                assert_eq!(one.covers(other), fits_all, "{one:?} {other:?}");
            }
        }
    }
}
