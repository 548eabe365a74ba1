//! The config as it is written: settings, their defaults, and what an operator should know about each.

use std::{collections::BTreeMap, fmt, net::SocketAddr, num::NonZeroUsize, path::PathBuf, str::FromStr, time::Duration};

use headgate_filters::{
    Step,
    units::{Bytes, Span},
};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

const fn seconds(count: u64) -> Span {
    Span(Duration::from_secs(count))
}

const fn minutes(count: u64) -> Span {
    seconds(60 * count)
}

const fn kib(count: u64) -> Bytes {
    Bytes(count << 10)
}

const fn mib(count: u64) -> Bytes {
    Bytes(count << 20)
}

/// A Headgate config. Paths of files are relative to the folder of this file; `${NAME}` and `${NAME:-default}` stand for
/// environment variables, in any value.
#[derive(Debug, Clone, PartialEq, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(title = "Headgate config")]
pub struct File {
    /// Where clients connect, e.g. `0.0.0.0:8080`. Needed where there are routes. Port 0 takes any free one.
    pub listen: Option<Address>,
    /// Where operators look: health, metrics, public keys.
    pub admin: Admin,
    /// Threads that serve. Default: one per core.
    pub workers: Option<NonZeroUsize>,
    /// Shows a small chat page at `/` to try the gateway with. Not for production.
    pub page: bool,
    /// The certificate that clients see. Without it clients connect in plain text, as behind a load balancer that ends TLS.
    pub tls: Option<Tls>,
    /// Which policy is in force, and who signs for it.
    pub policy: Option<Policy>,
    /// What is shared with other processes: used verdicts, and the policy registry where it is in no folder. Without it,
    /// each process keeps its own.
    pub redis: Option<Redis>,
    /// A folder for what the orchestrator is still to be told of turns, so that it is told after a restart, a kill or an outage: what users got of them, and which prompts
    /// were refused. It is made if it is not there, and only one process may write to it. Without it, that waits in memory alone.
    pub spool: Option<PathBuf>,
    /// How much and how long is taken from clients, on every route.
    pub limits: Limits,
    /// Who answers: named sets of endpoints.
    pub upstreams: BTreeMap<String, Upstream>,
    /// What clients may ask for, and through which filters it goes. The first route that fits is taken.
    pub routes: Vec<Route>,
    /// An orchestrator in this process: judged turns come in, models answer.
    pub orchestrator: Option<Orchestrator>,
    /// The embedded small language model, served in this process.
    pub slm: Option<Slm>,
    /// Logs and traces. Metrics are always at `/metrics` of the admin address.
    pub observability: Observability,
    /// What happens to open turns when the process is told to stop.
    pub drain: Drain,
}

/// Where operators look.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Admin {
    /// The address for health checks, metrics and public keys, or `off`. Nothing secret is there, but keep clients away.
    pub listen: AdminListen,
}

impl Default for Admin {
    fn default() -> Admin {
        Admin { listen: AdminListen::At(SocketAddr::from(([127, 0, 0, 1], 9090))) }
    }
}

/// An address, or `off`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AdminListen {
    /// Nothing listens.
    Off,
    /// There.
    At(SocketAddr),
}

impl FromStr for AdminListen {
    type Err = String;
    fn from_str(text: &str) -> Result<AdminListen, String> {
        match text {
            "off" => Ok(AdminListen::Off),
            text => text
                .parse()
                .map(AdminListen::At)
                .map_err(|_| format!("`{text}` is not an address with a port, such as `127.0.0.1:9090`, or `off`")),
        }
    }
}

impl fmt::Display for AdminListen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            AdminListen::Off => f.write_str("off"),
            AdminListen::At(address) => write!(f, "{address}"),
        }
    }
}

/// Where to listen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Address(pub SocketAddr);

impl FromStr for Address {
    type Err = String;
    fn from_str(text: &str) -> Result<Address, String> {
        text.parse().map(Address).map_err(|_| format!("`{text}` is not an address with a port, such as `127.0.0.1:8080` or `[::]:8080`"))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A word or text that is read by its `FromStr` and shown by its `Display`.
macro_rules! text {
    ($type:ident, $schema:tt) => {
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(from: D) -> Result<$type, D::Error> {
                String::deserialize(from)?.parse().map_err(serde::de::Error::custom)
            }
        }
        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
                to.collect_str(self)
            }
        }
        impl JsonSchema for $type {
            fn schema_name() -> std::borrow::Cow<'static, str> {
                stringify!($type).into()
            }
            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!($schema)
            }
        }
    };
}
text!(Address, { "type": "string", "examples": ["127.0.0.1:8080", "0.0.0.0:8080"] });
text!(AdminListen, { "type": "string", "examples": ["127.0.0.1:9090", "off"] });

/// The certificate that clients see. It is read again when its file changes.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Tls {
    /// A PEM file: the certificate, then those between it and the root.
    pub certificate: PathBuf,
    /// A PEM file: the private key.
    pub key: PathBuf,
}

/// Which policy is in force, and who signs for it.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    /// The document of principles: a Markdown file whose headings and numbered paragraphs are its clauses. Its hash travels
    /// with every dispatch and every answer.
    pub constitution: PathBuf,
    /// The policy's version, as shown in `Policy-Version`, e.g. `2026-11-21`.
    pub version: String,
    /// The policy's name in verdicts.
    #[serde(default = "default_policy_name")]
    pub name: String,
    /// The key that signs verdicts: `file:keys/policy.json`, made if it is not there; or `generated`: a new one at every
    /// start, for development.
    #[serde(default)]
    pub key: SigningKey,
    /// Who signs: `iss` of the verdicts. An orchestrator believes only the issuer it knows.
    #[serde(default = "default_issuer")]
    pub issuer: String,
    /// Who says which version is in force: a registry of signed entries, written by `headgate policy publish`. Without it, what
    /// this file says is in force.
    #[serde(default)]
    pub registry: Option<PolicyRegistry>,
}

/// Where the policy registry is, and whose entries count. In the Redis of the section `redis`, unless a folder is named.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PolicyRegistry {
    /// The public policy keys, as a JWKS file: entries that are signed with one of them count, and no others. Who can write to
    /// Redis or into the folder can install nothing without the private key.
    pub keys: PathBuf,
    /// A folder instead of Redis: for processes of one machine, or of one volume.
    #[serde(default)]
    pub folder: Option<PathBuf>,
}

/// A Redis that several processes share.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Redis {
    /// Where it is: `redis://user:password@host:6379`, or `rediss://` for TLS; where there is a password in it, `${REDIS_URL}` or
    /// `file:` and a path. One Redis, or a name that leads to the one that takes writes: Sentinel and Cluster are not spoken.
    pub url: RedisUrl,
    /// With `rediss://`: the certificates to trust, as a PEM file, in place of the system's.
    #[serde(default)]
    pub ca: Option<PathBuf>,
    /// The longest that a turn waits for one answer of Redis. From `1ms` to `1s`.
    #[serde(default = "default_redis_budget")]
    pub budget: Span,
}

fn default_redis_budget() -> Span {
    Span(Duration::from_millis(20))
}

/// Where Redis is: a URL, or by where it is kept. Never shown.
#[derive(Clone, PartialEq, Eq, Deserialize)]
pub struct RedisUrl(pub(crate) String);

impl fmt::Debug for RedisUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("<secret>")
    }
}

impl JsonSchema for RedisUrl {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "RedisUrl".into()
    }
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string", "pattern": r"(^file:.+$|^rediss?://|\$\{[A-Za-z_][A-Za-z0-9_]*)", "examples": ["redis://127.0.0.1:6379", "${REDIS_URL}", "file:/run/secrets/redis-url"] })
    }
}

fn default_policy_name() -> String {
    "default".to_owned()
}

fn default_issuer() -> String {
    "headgate".to_owned()
}

/// The key that signs verdicts.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum SigningKey {
    /// A new one at every start.
    #[default]
    Generated,
    /// A file of ours, as it was named.
    File(PathBuf),
}

impl FromStr for SigningKey {
    type Err = String;
    fn from_str(text: &str) -> Result<SigningKey, String> {
        match text.strip_prefix("file:") {
            Some(path) if !path.is_empty() => Ok(SigningKey::File(path.into())),
            None if text == "generated" => Ok(SigningKey::Generated),
            // Not shown: whoever pastes a key here has it in the log else.
            _ => Err("neither `generated` nor a file, such as `file:keys/policy.json`".to_owned()),
        }
    }
}

impl fmt::Display for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SigningKey::Generated => f.write_str("generated"),
            SigningKey::File(path) => write!(f, "file:{}", path.display()),
        }
    }
}
text!(SigningKey, { "type": "string", "pattern": "^(generated|file:.+)$", "examples": ["file:keys/policy.json", "generated"] });

/// A secret, by where it is kept. Never shown.
#[derive(Clone, PartialEq, Eq, Deserialize)]
pub struct SecretText(pub(crate) String);

impl fmt::Debug for SecretText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("<secret>")
    }
}

impl JsonSchema for SecretText {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "SecretText".into()
    }
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string", "pattern": r"(^file:.+$|\$\{[A-Za-z_][A-Za-z0-9_]*)", "examples": ["${MODEL_KEY}", "file:/run/secrets/model-key"] })
    }
}

/// How much and how long is taken from clients. The longest turn and what may wait for a slow client are settings of the
/// filters `cancellation` and `backpressure`, which stand in every chain.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Connections at once; more are closed. Never more than half of the files that the system lets the process open, since
    /// most connections need a second one upstream.
    pub connections: NonZeroUsize,
    /// From the connection to its first byte, or to the end of the TLS handshake.
    pub handshake: Span,
    /// From the first byte of a request to the end of its headers.
    pub head: Span,
    /// The largest request head.
    pub head_bytes: Bytes,
    /// The most header fields of a request.
    pub head_fields: NonZeroUsize,
    /// From the end of a request's headers to the end of its body.
    pub body: Span,
    /// The largest request body. Up to `16MiB`.
    pub body_bytes: Bytes,
    /// How long a client may take nothing of what is written to its connection.
    pub stall: Span,
    /// How long an HTTP/2 connection may carry no request. Over HTTP/1.1 the next one has as long as its headers.
    pub idle: Span,
    /// Silence after which a heartbeat is sent: a comment on event streams, a ping on WebSockets. From `1s`, and shorter than
    /// the patience of any load balancer in front.
    pub heartbeat: Span,
    /// The most text of one answer. Up to `64MiB`.
    pub answer_bytes: Bytes,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            connections: const { NonZeroUsize::new(16_384).unwrap() },
            handshake: seconds(5),
            head: seconds(10),
            head_bytes: kib(16),
            head_fields: const { NonZeroUsize::new(100).unwrap() },
            body: seconds(30),
            body_bytes: mib(1),
            stall: seconds(30),
            idle: seconds(60),
            heartbeat: seconds(15),
            answer_bytes: mib(4),
        }
    }
}

/// A named set of endpoints that speak one protocol, behind one balancer.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Upstream {
    /// What the endpoints speak: `openai` (vLLM, llama.cpp, Ollama, OpenAI itself), `orchestrator` (Headgate's own), or `http`
    /// (anything, for plain reverse-proxy routes).
    pub protocol: Protocol,
    /// How turns travel to an `orchestrator`: each as a request answered by server-sent `events` on a connection of its own, or many on
    /// one `websocket`.
    #[serde(default)]
    pub hop: Hop,
    /// Where they are: `http://` or `https://`, a host, perhaps a port, perhaps a path that stands before the protocol's own.
    pub endpoints: Vec<Endpoint>,
    /// The model to ask for, whatever the client says.
    #[serde(default)]
    pub model: Option<String>,
    /// The `Authorization` header to send: `${VARIABLE}` or `file:...`. Without a space in it, it is sent as a bearer token.
    #[serde(default)]
    pub authorization: Option<SecretText>,
    /// How long to wait for what.
    #[serde(default)]
    pub timeouts: Timeouts,
    /// How often a turn may be tried on another endpoint, before its first byte.
    #[serde(default)]
    pub retry: Retry,
    /// Which endpoint gets the next turn: `least_busy` of two chosen by chance, `round_robin`, or `session`: the same one for
    /// the same session, which keeps a model's prefix cache warm.
    #[serde(default)]
    pub balance: Balance,
    /// How endpoints are checked while nobody asks them.
    #[serde(default)]
    pub health: Health,
    /// Connections kept between turns, per endpoint.
    #[serde(default)]
    pub idle: Idle,
    /// How much is taken from the endpoints.
    #[serde(default)]
    pub limits: UpstreamLimits,
    /// Whom to trust where an endpoint is `https`.
    #[serde(default)]
    pub tls: UpstreamTls,
}

/// What an upstream speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// OpenAI chat completions.
    #[serde(rename = "openai")]
    OpenAi,
    /// Headgate's own conversation protocol.
    Orchestrator,
    /// Any HTTP, passed through.
    Http,
}

/// How turns travel to an orchestrator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Hop {
    /// Each as a request of its own, answered by server-sent events.
    #[default]
    Events,
    /// As frames, many on one WebSocket.
    WebSocket,
}

/// Where an upstream is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint(pub http::Uri);

impl FromStr for Endpoint {
    type Err = String;
    fn from_str(text: &str) -> Result<Endpoint, String> {
        // What stands in an endpoint beside a host may be a secret: not shown.
        let wrong = |why: &str| Err(format!("{why}; expected e.g. `http://127.0.0.1:8090` or `https://api.example.com/v1`"));
        let uri: http::Uri = match text.parse() {
            Ok(uri) => uri,
            Err(_) => return wrong("an endpoint that is no URL"),
        };
        if !matches!(uri.scheme_str(), Some("http" | "https")) {
            return wrong("an endpoint without `http://` or `https://`");
        }
        match uri.authority() {
            None => return wrong("an endpoint without a host"),
            Some(authority) if authority.as_str().contains('@') => {
                return Err("a user or password does not belong into an endpoint; use `authorization`".to_owned());
            }
            Some(authority) if authority.host().is_empty() => return wrong("an endpoint without a host"),
            Some(authority) if authority.port().is_some() && authority.port_u16().is_none_or(|port| port == 0) => {
                return wrong("an endpoint with a port that is none");
            }
            Some(_) => {}
        }
        if uri.query().is_some() || text.contains('#') {
            return wrong("an endpoint with a query or a fragment");
        }
        Ok(Endpoint(uri))
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}
text!(Endpoint, { "type": "string", "pattern": r"(^https?://[^@?#]+$|\$\{)", "examples": ["http://127.0.0.1:8090"] });

/// How long to wait for what. A time that runs out ends the turn and closes the connection.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Timeouts {
    /// Name lookup, TCP and TLS together, for one attempt.
    pub connect: Span,
    /// Until the answer begins, retries included.
    pub first_byte: Span,
    /// Between two pieces of an answer that has begun.
    pub idle: Span,
    /// The whole answer.
    pub total: Span,
}

impl Default for Timeouts {
    fn default() -> Timeouts {
        Timeouts { connect: seconds(1), first_byte: seconds(30), idle: seconds(30), total: minutes(10) }
    }
}

/// How often a turn may be tried on another endpoint, before its first byte. Never after it.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Retry {
    /// Tries after the first. At most 3.
    pub attempts: u32,
    /// Retries as a share of all turns of the last ten seconds, from 0 to 1: a sick upstream is not asked twice by everybody.
    pub share: f64,
    /// Retries per second that are allowed whatever the share says.
    pub floor: u32,
}

impl Default for Retry {
    fn default() -> Retry {
        Retry { attempts: 1, share: 0.1, floor: 1 }
    }
}

/// Which endpoint gets the next turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Balance {
    /// The less busy of two chosen by chance.
    #[default]
    LeastBusy,
    /// Each in turn.
    RoundRobin,
    /// The same one for the same session.
    Session,
}

/// How endpoints are checked while nobody asks them: a connection is opened and closed.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Health {
    /// Time between two rounds of checks; `0s` switches them off.
    pub interval: Span,
    /// Failed checks in a row after which an endpoint is passed over.
    pub failures: NonZeroUsize,
    /// Good checks in a row after which it is asked again.
    pub successes: NonZeroUsize,
}

impl Default for Health {
    fn default() -> Health {
        Health {
            interval: seconds(5),
            failures: const { NonZeroUsize::new(2).unwrap() },
            successes: const { NonZeroUsize::new(1).unwrap() },
        }
    }
}

/// Connections kept between turns, per endpoint.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Idle {
    /// The most that are kept; 0 opens a new one for every turn.
    pub max: usize,
    /// How long one is kept: shorter than the endpoint's own patience.
    pub timeout: Span,
}

impl Default for Idle {
    fn default() -> Idle {
        Idle { max: 32, timeout: seconds(30) }
    }
}

/// How much is taken from an upstream.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct UpstreamLimits {
    /// The longest line of an event stream.
    pub line_bytes: Bytes,
    /// The largest event.
    pub event_bytes: Bytes,
    /// The largest response head.
    pub head_bytes: Bytes,
    /// The most fields of a response head.
    pub head_fields: NonZeroUsize,
    /// The largest answer that comes whole instead of as a stream.
    pub whole_bytes: Bytes,
}

impl Default for UpstreamLimits {
    fn default() -> UpstreamLimits {
        UpstreamLimits {
            line_bytes: kib(128),
            event_bytes: kib(128),
            head_bytes: kib(16),
            head_fields: const { NonZeroUsize::new(100).unwrap() },
            whole_bytes: mib(1),
        }
    }
}

/// Whom to trust where an endpoint is `https`.
#[derive(Debug, Clone, PartialEq, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct UpstreamTls {
    /// A PEM file of certificates to trust instead of the system's.
    pub ca: Option<PathBuf>,
}

/// What clients may ask for at one path, and through which filters it goes.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Route {
    /// The path: exact (`/v1/chat/stream`), or everything below one (`/files/*`).
    pub path: PathText,
    /// What is spoken there: `chat` (turns as event streams and WebSockets), `openai` (chat completions and the list of
    /// models), or `proxy` (any HTTP, passed through). Default: `chat` for `/v1/chat/stream`, `openai` for
    /// `/v1/chat/completions` and `/v1/models`, else `proxy`.
    #[serde(default)]
    pub kind: Option<Kind>,
    /// Who answers: a name of `upstreams`.
    pub upstream: String,
    /// What turns go through, in this order. A filter is its name, or its name with settings; terms stand beside the name.
    #[serde(default)]
    pub filters: Vec<Step>,
    /// Web pages that may call this route from a browser, e.g. `https://app.example.com`; or `any`. Pages of the gateway itself
    /// may where it is called by its address or as `localhost`; where it has a name, list it. Programs that are no browsers name
    /// no origin and are not held back by this.
    #[serde(default)]
    pub origins: Vec<Origin>,
    /// The methods that are passed through, e.g. `[GET, POST]`; all if none is named. For `proxy` routes.
    #[serde(default)]
    pub methods: Vec<Method>,
    /// Takes the route's path away from the request's before passing it on. For `proxy` routes that end in `/*`.
    #[serde(default)]
    pub strip_prefix: bool,
    /// What upstreams are told about clients in `X-Forwarded-For`, `-Proto` and `-Host`: what the gateway sees (`seen`: what a
    /// client wrote itself is deleted), or what stands there already with the peer's address after it (`appended`: where
    /// only proxies of yours can reach the gateway). For `proxy` routes.
    #[serde(default)]
    pub forwarded: Forwarded,
    /// The models that `GET /v1/models` names. For `openai` routes.
    #[serde(default)]
    pub models: Vec<String>,
    /// Limits of this route that differ from those of all routes.
    #[serde(default)]
    pub limits: RouteLimits,
}

/// What upstreams are told about clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Forwarded {
    /// What the gateway sees.
    #[default]
    Seen,
    /// What stands there already, and the peer's address after it.
    Appended,
}

/// A path, exact or with `/*` at its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PathText(pub(crate) String);

impl FromStr for PathText {
    type Err = String;
    fn from_str(text: &str) -> Result<PathText, String> {
        let base = text.strip_suffix("/*").unwrap_or(text);
        let plain = base.bytes().all(|b| b.is_ascii_alphanumeric() || b"/-._~!$&'()+,;=:@".contains(&b));
        let whole = text == "/*" || base == "/" || (base.starts_with('/') && !base.ends_with('/'));
        let steps = base.split('/').skip(1).all(|step| step != "." && step != ".." && (!step.is_empty() || base == "/"));
        if plain && whole && (steps || text == "/*") && text.len() <= 256 {
            Ok(PathText(text.to_owned()))
        } else {
            Err(format!("`{text}` is not a path: `/v1/chat/stream`, or `/files/*` for everything below `/files`"))
        }
    }
}

impl fmt::Display for PathText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
text!(PathText, { "type": "string", "pattern": "^/", "examples": ["/v1/chat/stream", "/files/*"] });

/// What is spoken on a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Headgate's own turns: event streams and WebSockets.
    Chat,
    /// OpenAI's chat completions and list of models.
    #[serde(rename = "openai")]
    OpenAi,
    /// Any HTTP, passed through.
    Proxy,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Chat => "chat",
            Kind::OpenAi => "openai",
            Kind::Proxy => "proxy",
        })
    }
}

/// A web page's origin, or `any`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// Every page.
    Any,
    /// Pages of this scheme, host and port, in lower case as browsers send it.
    Is(String),
}

impl FromStr for Origin {
    type Err = String;
    fn from_str(text: &str) -> Result<Origin, String> {
        if text == "any" {
            return Ok(Origin::Any);
        }
        let bad =
            || Err(format!("`{text}` is not an origin: scheme, host and perhaps a port, such as `https://app.example.com`, or `any`"));
        let lower = text.to_ascii_lowercase();
        let Some((scheme, rest)) = lower.split_once("://") else { return bad() };
        let Ok(authority) = rest.parse::<http::uri::Authority>() else { return bad() };
        if !matches!(scheme, "http" | "https") || rest.contains(['@', '*', '/']) || authority.host().is_empty() {
            return bad();
        }
        // Browsers leave the scheme's own port away.
        let rest = match (scheme, rest.strip_suffix(":80"), rest.strip_suffix(":443")) {
            ("http", Some(host), _) | ("https", _, Some(host)) => host,
            _ => rest,
        };
        Ok(Origin::Is(format!("{scheme}://{rest}")))
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Any => f.write_str("any"),
            Origin::Is(origin) => f.write_str(origin),
        }
    }
}
text!(Origin, { "type": "string", "pattern": r"(^any$|^https?://[^/*@]+$|\$\{)", "examples": ["https://app.example.com", "any"] });

/// An HTTP method.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Method(pub http::Method);

impl FromStr for Method {
    type Err = String;
    fn from_str(text: &str) -> Result<Method, String> {
        match text {
            "GET" | "HEAD" | "POST" | "PUT" | "PATCH" | "DELETE" | "OPTIONS" => {
                text.parse().map(Method).map_err(|_| format!("`{text}` is not a method"))
            }
            _ => Err(format!("`{text}` is not one of GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS")),
        }
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}
text!(Method, { "enum": ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"] });

/// Limits of one route that differ from those of all routes.
#[derive(Debug, Clone, PartialEq, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RouteLimits {
    /// From the end of a request's headers to the end of its body.
    pub body: Option<Span>,
    /// The largest request body. Up to `16MiB`.
    pub body_bytes: Option<Bytes>,
    /// Silence after which a heartbeat is sent.
    pub heartbeat: Option<Span>,
    /// The most text of one answer. Up to `64MiB`.
    pub answer_bytes: Option<Bytes>,
}

/// An orchestrator in this process.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Orchestrator {
    /// Where gateways connect.
    pub listen: Address,
    /// Who answers: a name of `upstreams`.
    pub upstream: String,
    /// Models that another upstream answers for: a model's name and a name of `upstreams`.
    #[serde(default)]
    pub models: BTreeMap<String, String>,
    /// Whose verdicts count: `own` (the gateway in this process), a JWKS file (`file:keys/gateway.jwks.json`) or a JWKS URL.
    #[serde(default)]
    pub keys: VerdictKeys,
    /// How often keys are read again from a URL: a revoked key is believed for so long. `1s` to `5min`.
    #[serde(default = "default_keys_refresh")]
    pub keys_refresh: Span,
    /// The issuer whose verdicts count: `policy.issuer` of the gateways. Default: this file's own.
    #[serde(default)]
    pub issuer: Option<String>,
    /// How much is remembered of sessions.
    #[serde(default)]
    pub history: History,
    /// How much is taken from gateways.
    #[serde(default)]
    pub limits: OrchestratorLimits,
    /// What became of each turn, kept on disk. Without it, a turn leaves nothing but a line in the log.
    #[serde(default)]
    pub events: Option<Events>,
    /// Training mode, which admins turn on and off for their tenant. Without it, there is none.
    #[serde(default)]
    pub training: Option<Training>,
    /// Calls of tools that a person has to agree to. Without it, all calls are passed on as the model makes them.
    #[serde(default)]
    pub confirm: Option<Confirm>,
}

/// Calls of tools that a person has to agree to. Nothing of such a call is passed on before: it waits until the model has finished its
/// answer, then the client is sent a `confirm` event with the tool's name and arguments, and the call follows once the client says
/// yes. After a no the turn ends with `declined`, and after silence with `unanswered`. Where nobody can be asked, on
/// `/v1/chat/completions` and on `/v1/conversation/step`, the answer is no.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Confirm {
    /// The tools, by name: 1 to 128.
    pub tools: Vec<String>,
    /// How long a person may take, from `1s` to `1h`, and less than the turn: `limits.turn` here, and at the gateways `timeouts.total`
    /// and `cancellation.deadline`.
    #[serde(default = "default_confirm_within")]
    pub within: Span,
}

fn default_confirm_within() -> Span {
    seconds(60)
}

/// Training mode: `POST /v1/training/enable` and `/disable`, `GET /v1/training`, on the orchestrator's own address. Whoever calls
/// must be an admin by a token of this identity provider (OpenID Connect discovery), and have signed in within five minutes. The
/// lock of a tenant is kept in `redis`; every attempt is written to an audit topic of the brokers in `events.kafka`, and nothing
/// happens that the topic has not acknowledged.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Training {
    /// The identity provider: an `https` URL (`http` only on this machine), as it stands in `iss`, to the letter.
    pub issuer: String,
    /// Who a token must be for: must stand in its `aud`.
    pub audience: String,
    /// The role that an admin has.
    #[serde(default = "default_role")]
    pub role: String,
    /// The claim with the roles; a dot goes into an object, as in `realm_access.roles`.
    #[serde(default = "default_role_claim")]
    pub role_claim: String,
    /// The claim that names the tenant.
    #[serde(default = "default_tenant_claim")]
    pub tenant_claim: String,
    /// How long the lock outlives an orchestrator that no longer renews it, from `3s` to `10min`. It is renewed three times as often.
    #[serde(default = "default_ttl")]
    pub ttl: Span,
    /// The longest that one admin keeps training mode on, up to `24h`, pauses shorter than that included: then it is off, unless
    /// another admin approved before (`POST /v1/training/approve`), and another must turn it on.
    #[serde(default = "default_max_hold")]
    pub max_hold: Span,
    /// The audit topic. It must be another than that of the events, and keep its records.
    #[serde(default = "default_audit_topic")]
    pub topic: String,
    /// Raise it by one whenever the audit topic was made anew, or its number of partitions changed: fences must never fall, and they are
    /// made of this and of a record's place in the topic. Up to `8000`.
    #[serde(default)]
    pub epoch: u16,
    /// This is the only process: the lock is kept in it, and the audit in the file `training.jsonl` in the folder of the events, whose
    /// records are the fences. For development: needs neither `redis` nor `events.kafka`.
    #[serde(default)]
    pub alone: bool,
}

fn default_role() -> String {
    "training:admin".to_owned()
}

fn default_role_claim() -> String {
    "roles".to_owned()
}

fn default_tenant_claim() -> String {
    "tenant".to_owned()
}

fn default_ttl() -> Span {
    seconds(60)
}

fn default_max_hold() -> Span {
    minutes(240)
}

fn default_audit_topic() -> String {
    "training.audit".to_owned()
}

fn default_keys_refresh() -> Span {
    seconds(5)
}

/// Whose verdicts an orchestrator believes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum VerdictKeys {
    /// Those of the gateway in this process.
    #[default]
    Own,
    /// Those with keys in this JWKS file, as it was named.
    File(PathBuf),
    /// Those with keys published there.
    Url(http::Uri),
}

impl FromStr for VerdictKeys {
    type Err = String;
    fn from_str(text: &str) -> Result<VerdictKeys, String> {
        if text == "own" {
            return Ok(VerdictKeys::Own);
        }
        if let Some(path) = text.strip_prefix("file:").filter(|path| !path.is_empty()) {
            return Ok(VerdictKeys::File(path.into()));
        }
        match text.parse::<Endpoint>() {
            Ok(Endpoint(uri)) => Ok(VerdictKeys::Url(uri)),
            Err(_) => Err(format!(
                "`{text}` is not `own`, a file (`file:keys/gateway.jwks.json`) or a URL (`http://gateway:9090/.well-known/jwks.json`)"
            )),
        }
    }
}

impl fmt::Display for VerdictKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            VerdictKeys::Own => f.write_str("own"),
            VerdictKeys::File(path) => write!(f, "file:{}", path.display()),
            VerdictKeys::Url(uri) => write!(f, "{uri}"),
        }
    }
}
text!(VerdictKeys, { "type": "string", "pattern": r"^(own|file:.+|https?://.+|.*\$\{.*)$", "examples": ["own", "http://gateway:9090/.well-known/jwks.json"] });

/// How much an orchestrator remembers of sessions. The oldest is forgotten first.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct History {
    /// Sessions.
    pub sessions: usize,
    /// Messages per session.
    pub messages: usize,
    /// Text per session.
    pub session_bytes: Bytes,
    /// Text of all sessions together.
    pub bytes: Bytes,
}

impl Default for History {
    fn default() -> History {
        History { sessions: 10_000, messages: 128, session_bytes: kib(64), bytes: mib(256) }
    }
}

/// How much an orchestrator takes from gateways.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct OrchestratorLimits {
    /// Connections at once; more wait in the system's queue.
    pub connections: NonZeroUsize,
    /// Turns open at once, over all connections.
    pub turns: NonZeroUsize,
    /// The longest a turn may take in all.
    pub turn: Span,
    /// The largest body of a request.
    pub body_bytes: Bytes,
    /// The most text of one answer.
    pub answer_bytes: Bytes,
}

impl Default for OrchestratorLimits {
    fn default() -> OrchestratorLimits {
        OrchestratorLimits {
            connections: const { NonZeroUsize::new(8192).unwrap() },
            turns: const { NonZeroUsize::new(4096).unwrap() },
            turn: minutes(10),
            body_bytes: mib(1),
            answer_bytes: mib(4),
        }
    }
}

/// The log of what became of each turn: who asked, what the verdict was, how much was answered, how it ended; what was said only
/// with `text`. A turn is answered only after its beginning is on disk, and every turn gets exactly one end, even across a crash. While
/// the log cannot take a turn, turns are refused with `event_log_unavailable`. Read it with `headgate events tail`.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Events {
    /// The folder of its files, made if it is not there. It must survive a restart, and only one process may write to it.
    pub folder: PathBuf,
    /// The most that it takes on disk, from `16MiB` to `1TiB`. The oldest events are let go first; where they go on to `kafka`, only
    /// those that the topic has.
    #[serde(default = "default_events_cap")]
    pub cap: Bytes,
    /// How long after a turn's end its gateway may take to say what the user got, from `1s` to `1h`; then that is written as unknown.
    #[serde(default = "default_unknown_after")]
    pub unknown_after: Span,
    /// The Kafka topic that events go on to, in order and without end. Without it, they stay here.
    #[serde(default)]
    pub kafka: Option<Kafka>,
    /// Keep what was said too, sealed. Without it, no text is kept anywhere.
    #[serde(default)]
    pub text: Option<Text>,
}

/// Prompts and answers in the log of events, each sealed (AES-256-GCM) under a key of whoever asked, and events name that key in place
/// of them. `headgate events forget` destroys a subject's key: then their text cannot be read any more, in no copy of the log and of
/// the topic. While the keys cannot be used, turns are refused with `event_log_unavailable`. Text is let go where the log has no room
/// to spare; no turn is refused for it.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Text {
    /// The file with the master key, which wraps all others; `headgate events key` makes it. Keep a copy: without it no text can be read.
    pub key: PathBuf,
    /// The folder with the keys of subjects, made if it is not there. Outside the folder of the events: whoever copies these must not
    /// copy the keys along, or what is erased here can be read there.
    pub folder: PathBuf,
}

fn default_unknown_after() -> Span {
    minutes(5)
}

fn default_events_cap() -> Bytes {
    mib(1 << 10)
}

/// The topic that events go on to, as CloudEvents in Kafka's binary mode. While no broker can be reached, events gather in the log;
/// where that has no room left, new turns are refused. The topic is checked before anything is written to it. Without `tls`, brokers
/// are spoken to in plain text.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Kafka {
    /// Some of its brokers, each as `host:port`; they tell of the others.
    pub brokers: Vec<String>,
    /// Speak TLS with the brokers; `{}` is enough where the machine knows who signed their certificates.
    #[serde(default)]
    pub tls: Option<BrokerTls>,
    /// Say by a password who we are.
    #[serde(default)]
    pub sasl: Option<Sasl>,
    /// The topic.
    #[serde(default = "default_topic")]
    pub topic: String,
    /// Replicas that each partition of the topic must have.
    #[serde(default = "default_replication_factor")]
    pub replication_factor: u16,
    /// The topic's `min.insync.replicas` must be at least this: so many have an event before it counts as delivered.
    #[serde(default = "default_min_insync_replicas")]
    pub min_insync_replicas: u16,
    /// Make the topic, with so many partitions, where it is missing; without this, a missing topic is an error. Their number must
    /// never change: events of a session would move to another partition and lose their order.
    #[serde(default)]
    pub create_with_partitions: Option<u16>,
}

/// TLS with brokers. The files are read at the start; a broker must have a certificate of the name that it is called by.
#[derive(Debug, Clone, PartialEq, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct BrokerTls {
    /// The certificates (PEM) that brokers are trusted by. Default: those of the machine.
    pub ca: Option<PathBuf>,
    /// Our certificate and those between it and a root (PEM), where brokers want one; with `key`.
    pub certificate: Option<PathBuf>,
    /// Its key (PEM).
    pub key: Option<PathBuf>,
}

/// Who we are to brokers.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Sasl {
    /// How the password is proved: `SCRAM-SHA-512`, `SCRAM-SHA-256`, or `PLAIN`, which shows it to the broker.
    pub mechanism: Mechanism,
    /// The user.
    pub username: String,
    /// Its password: `${VARIABLE}`, or `file:` and a path.
    pub password: SecretText,
    /// What it is said over: `tls`, or `plain_text` for a network where everybody may know it.
    #[serde(default)]
    pub over: Over,
}

/// A SASL mechanism of Kafka.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum Mechanism {
    /// The password itself.
    #[serde(rename = "PLAIN")]
    Plain,
    /// A proof (RFC 5802).
    #[serde(rename = "SCRAM-SHA-256")]
    ScramSha256,
    /// A proof (RFC 5802).
    #[serde(rename = "SCRAM-SHA-512")]
    ScramSha512,
}

impl Mechanism {
    /// Its name.
    pub fn as_str(self) -> &'static str {
        match self {
            Mechanism::Plain => "PLAIN",
            Mechanism::ScramSha256 => "SCRAM-SHA-256",
            Mechanism::ScramSha512 => "SCRAM-SHA-512",
        }
    }
}

/// What a password is said over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Over {
    /// TLS.
    #[default]
    Tls,
    /// Nothing that hides it.
    PlainText,
}

fn default_topic() -> String {
    "conversation.events".to_owned()
}

fn default_replication_factor() -> u16 {
    3
}

fn default_min_insync_replicas() -> u16 {
    2
}

/// The embedded small language model behind an OpenAI-compatible API: for demos and tests.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Slm {
    /// Where it listens.
    pub listen: Address,
    /// A GGUF file (llama architecture, F32 or Q8_0) instead of the embedded model.
    #[serde(default)]
    pub model: Option<PathBuf>,
    /// Tokens per second of each turn at most, so that one can watch them come.
    #[serde(default)]
    pub pace: Option<f32>,
}

/// Logs and traces.
#[derive(Debug, Clone, PartialEq, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Observability {
    /// The form of the log: `json` (default) or `text`. One line per turn; never what was said.
    pub logs: Logs,
    /// What is logged, e.g. `info` or `info,headgate_upstream=debug`. Default `info`.
    pub level: Option<String>,
    /// Where traces are sent: an OTLP collector over HTTP, e.g. `http://127.0.0.1:4318`.
    pub otlp: Option<Endpoint>,
    /// The share of traces that begin here and are sent, from 0 to 1. Default 1.
    pub sampling: Option<f64>,
}

/// The form of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Logs {
    /// One JSON object per line.
    #[default]
    Json,
    /// For people.
    Text,
}

/// What happens to open turns when the process is told to stop.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Drain {
    /// How long they may go on. Whoever starts and stops the process should wait two seconds longer.
    pub timeout: Span,
}

impl Default for Drain {
    fn default() -> Drain {
        Drain { timeout: seconds(60) }
    }
}
