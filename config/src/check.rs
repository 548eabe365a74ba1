//! Judges settings together: what is inert, contradictory or out of bounds is a fault; the rest becomes the plan.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet, HashSet},
    fmt::Display,
    io,
    net::{IpAddr, SocketAddr},
    ops::RangeInclusive,
    path::Path as FilePath,
    sync::Arc,
    time::Duration,
};

use headgate_contracts::{Flow, OnDisconnect, Record, Secret, SessionId, Turn, TurnId, may_serve};
use headgate_filters::{
    Built, Mode, PolicyInForce, Problem, Signer, Spec, Step, Tools,
    auth::AdminTerms,
    build_chain, chain, moderation,
    units::{Bytes, Span},
};
use headgate_policy::{Claims, Constitution, Issuer, PUBLISH_AHEAD, Unsigned, Verifier};

use crate::{
    Disk, Environment,
    effect::{Bounds, Effect, Link},
    fault::{Fault, did_you_mean},
    file::{self, AdminListen, Endpoint, File, Hop, Kind, Origin, Over, Protocol, SigningKey},
    plan::{self, Origins, PathPattern, Plan, PolicyKey},
    tree::{Node, Path, Scalar, Source, Step as PathStep, Value},
};

/// The most routes, and the most upstreams.
const MOST_NAMED: usize = 1000;
/// The most of a request's body, whatever a config says: it is held whole, to be judged and signed.
const MOST_BODY: u64 = 16 << 20;
/// The most text of an answer, whatever a config says.
const MOST_ANSWER: u64 = 64 << 20;

/// The plan of a file, or nothing where too much is wrong. Faults and warnings are added to `faults`.
pub(crate) fn check(
    file: &File,
    tree: &Node,
    sources: &[Source],
    struck: &HashSet<Path>,
    environment: Option<Environment>,
    disk: &mut Disk,
    faults: &mut Vec<Fault>,
) -> Option<Plan> {
    let root = Path::root();
    let mut check = Check { tree, sources, struck, environment, disk, faults };
    for (name, count) in [("upstreams", file.upstreams.len()), ("routes", file.routes.len())] {
        if count > MOST_NAMED {
            check.refuse(&root.key(name), problem(format!("{count} of them")).expected(format!("at most {MOST_NAMED}")));
            return None;
        }
    }
    check.addresses(file, &root);
    check.limits(&file.limits, &root.key("limits"));
    check.span(&root.key("drain").key("timeout"), file.drain.timeout, seconds(0)..=seconds(3600));
    let tls = check.tls(file.tls.as_ref(), &root.key("tls"));
    let upstreams = check.upstreams(file, &root.key("upstreams"));
    let redis = check.redis(file, &root.key("redis"));
    let policy = check.policy(file, &root.key("policy"));
    let spool = file.spool.as_ref().map(|spool| check.folder(spool, &root.key("spool"), "spool"));
    let routes = check.routes(file, &upstreams, policy.as_ref(), &root.key("routes"));
    let orchestrator = check.orchestrator(file, &upstreams, &routes, &root.key("orchestrator"));
    check.unused(file);
    let slm = check.slm(file.slm.as_ref(), &root.key("slm"));
    let observability = check.observability(&file.observability, &root.key("observability"));

    let limits = &file.limits;
    Some(Plan {
        environment,
        listen: file.listen.map(|listen| listen.0).filter(|_| !file.routes.is_empty() || file.page),
        admin: match file.admin.listen {
            AdminListen::Off => None,
            AdminListen::At(address) => Some(address),
        },
        workers: file.workers.map_or_else(|| std::thread::available_parallelism().map_or(1, usize::from), usize::from),
        page: file.page,
        tls,
        policy: policy.flatten(),
        redis,
        spool,
        limits: plan::Limits {
            connections: limits.connections.get(),
            handshake: limits.handshake.0,
            head: limits.head.0,
            head_bytes: size(limits.head_bytes),
            head_fields: limits.head_fields.get(),
            stall: limits.stall.0,
            idle: limits.idle.0,
        },
        upstreams,
        routes,
        orchestrator,
        slm,
        observability,
        drain: file.drain.timeout.0,
        warnings: Vec::new(),
        files: plan::Files::default(),
    })
}

fn seconds(count: u64) -> Duration {
    Duration::from_secs(count)
}

fn size(bytes: Bytes) -> usize {
    usize::try_from(bytes.0).unwrap_or(usize::MAX)
}

struct Check<'a> {
    tree: &'a Node,
    sources: &'a [Source],
    struck: &'a HashSet<Path>,
    environment: Option<Environment>,
    disk: &'a mut Disk,
    faults: &'a mut Vec<Fault>,
}

/// A problem at the setting itself.
fn problem(found: impl Into<String>) -> Problem {
    Problem::new("", found)
}

impl Check<'_> {
    fn refuse(&mut self, path: &Path, problem: Problem) {
        self.say(path, problem, |fault| fault);
    }

    fn warn(&mut self, path: &Path, problem: Problem) {
        self.say(path, problem, Fault::warning);
    }

    fn say(&mut self, path: &Path, problem: Problem, and: impl FnOnce(Fault) -> Fault) {
        // A file of phrases has places of its own: "deny[0] (rules/deny.txt line 7)".
        let (inside, within) = problem.at.split_once(" (").unwrap_or((&problem.at, ""));
        let path = self.written_path(&path.inside(inside));
        // What is wrong around a place that could not be read is likely wrong because of that.
        if self.struck.iter().any(|struck| struck.starts_with(&path) || path.starts_with(struck)) {
            return;
        }
        let mut found = match within.strip_suffix(')') {
            Some(within) => format!("{within}: {}", problem.found),
            None => problem.found,
        };
        if let Some(Node { value: Value::Scalar(Scalar { text, written: Some(written), .. }), .. }) = self.tree.find(&path)
            && !text.is_empty()
        {
            found = found.replace(text.as_str(), written);
        }
        let fault = Fault::at(self.sources, self.tree.place(&path), &path, found).expected(problem.expected).remedy(problem.remedy);
        self.faults.push(and(fault));
    }

    /// Elements that were struck out leave holes: what is third now may have been written fourth.
    fn written_path(&self, path: &Path) -> Path {
        let mut written = Path::root();
        for step in &path.0 {
            let step = match (step, self.tree.find(&written).map(|node| &node.value)) {
                (PathStep::Index(index), Some(Value::List(list))) => {
                    PathStep::Index(list.get(*index).map_or(*index, |(number, _)| *number))
                }
                (step, _) => step.clone(),
            };
            written.0.push(step);
        }
        written
    }

    /// Whether a setting is written, and not a default.
    fn is_written(&self, path: &Path) -> bool {
        self.tree.find(&self.written_path(path)).is_some()
    }

    fn was_struck(&self, path: &Path) -> bool {
        self.struck.iter().any(|struck| struck.starts_with(path) || path.starts_with(struck))
    }

    fn is_production(&self) -> bool {
        self.environment == Some(Environment::Production)
    }

    fn within<T: PartialOrd + Display>(&mut self, path: &Path, value: T, range: RangeInclusive<T>) {
        if !range.contains(&value) {
            let (least, most) = range.into_inner();
            self.refuse(path, problem(format!("`{}` cannot be `{value}`", path.last())).expected(format!("{least} to {most}")));
        }
    }

    fn span(&mut self, path: &Path, value: Span, range: RangeInclusive<Duration>) {
        let (least, most) = range.into_inner();
        self.within(path, value, Span(least)..=Span(most));
    }

    /// A time that has to pass before something can.
    fn time(&mut self, path: &Path, value: Span) {
        self.span(path, value, Duration::from_millis(1)..=seconds(24 * 3600));
    }

    fn addresses(&mut self, file: &File, root: &Path) {
        let listen = root.key("listen");
        if file.listen.is_none() && !file.routes.is_empty() {
            self.refuse(
                &listen,
                problem("there are routes, but nowhere to connect")
                    .expected("an address with a port")
                    .remedy("add `listen: 127.0.0.1:8080`"),
            );
        }
        if file.listen.is_some() && file.routes.is_empty() && !file.page && !self.was_struck(&root.key("routes")) {
            self.refuse(&listen, problem("clients can connect, but there are no routes").remedy("add `routes`, or remove `listen`"));
        }
        if file.routes.is_empty() && file.orchestrator.is_none() && file.slm.is_none() && file.listen.is_none() {
            let sections = ["routes", "orchestrator", "slm", "listen"];
            if !sections.iter().any(|section| self.was_struck(&root.key(section))) {
                self.refuse(
                    root,
                    problem("nothing to do: no `routes`, no `orchestrator`, no `slm`")
                        .remedy("begin with one of the examples: `listen`, `upstreams` and `routes`"),
                );
            }
        }
        let admin = match file.admin.listen {
            AdminListen::At(address) => Some(address),
            AdminListen::Off => None,
        };
        let all = [
            (listen, file.listen.map(|listen| listen.0)),
            (root.key("admin").key("listen"), admin),
            (root.key("orchestrator").key("listen"), file.orchestrator.as_ref().map(|orchestrator| orchestrator.listen.0)),
            (root.key("slm").key("listen"), file.slm.as_ref().map(|slm| slm.listen.0)),
        ];
        let mut taken: Vec<(&Path, SocketAddr)> = Vec::new();
        for (path, address) in all.iter().filter_map(|(path, address)| address.map(|address| (path, address))) {
            match taken.iter().find(|(_, other)| clash(*other, address)) {
                None => taken.push((path, address)),
                Some((first, other)) => {
                    // Said where it is written: a default gives way.
                    let (at, beside) = if self.is_written(path) { (path, *first) } else { (*first, path) };
                    let found =
                        format!("`{address}` is the address of `{beside}` too{}", if *other == address { "" } else { ", as one of all" });
                    self.refuse(&at.clone(), problem(found).expected("an address of its own").remedy("choose another port"));
                }
            }
        }
    }

    fn limits(&mut self, limits: &file::Limits, at: &Path) {
        self.within(&at.key("connections"), limits.connections.get(), 1..=1_000_000);
        for (name, value) in
            [("handshake", limits.handshake), ("head", limits.head), ("body", limits.body), ("stall", limits.stall), ("idle", limits.idle)]
        {
            self.span(&at.key(name), value, seconds(1)..=seconds(600));
        }
        self.within(&at.key("head_bytes"), limits.head_bytes, Bytes(8 << 10)..=Bytes(256 << 10));
        self.within(&at.key("head_fields"), limits.head_fields.get(), 10..=1000);
        self.within(&at.key("body_bytes"), limits.body_bytes, Bytes(1 << 10)..=Bytes(MOST_BODY));
        self.within(&at.key("answer_bytes"), limits.answer_bytes, Bytes(1 << 10)..=Bytes(MOST_ANSWER));
        self.span(&at.key("heartbeat"), limits.heartbeat, seconds(1)..=seconds(300));
    }

    fn tls(&mut self, tls: Option<&file::Tls>, at: &Path) -> Option<plan::Tls> {
        let tls = tls?;
        let certificate = self.names(&at.key("certificate"), &tls.certificate, "the certificate");
        let key = self.names(&at.key("key"), &tls.key, "the key");
        if certificate.is_some() && certificate == key {
            self.refuse(
                &at.key("key"),
                problem("the file of the certificate")
                    .expected("a file of its own")
                    .remedy("keep the key in a file that only the gateway can read"),
            );
        }
        Some(plan::Tls { certificate: certificate?, key: key? })
    }

    /// A file that somebody else will read.
    fn names(&mut self, at: &Path, path: &FilePath, what: &str) -> Option<std::path::PathBuf> {
        match self.disk.name(path) {
            Ok(path) => Some(path),
            Err(error) => {
                self.refuse(at, unreadable(what, path, &error));
                None
            }
        }
    }

    /// The text of a file.
    fn text(&mut self, at: &Path, path: &FilePath, what: &str) -> Option<Arc<str>> {
        match self.disk.read(path) {
            Ok(text) => Some(text),
            Err(error) => {
                self.refuse(at, unreadable(what, path, &error));
                None
            }
        }
    }

    fn upstreams(&mut self, file: &File, at: &Path) -> BTreeMap<String, plan::Upstream> {
        let all = file.upstreams.iter().map(|(name, upstream)| {
            let at = at.key(name);
            if name.is_empty() || name.len() > 64 || !name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-".contains(&b)) {
                self.refuse(&at, problem(format!("{name:?} is no name for an upstream")).expected("letters, digits, `-` and `_`"));
            }
            (name.clone(), self.upstream(file, upstream, &at))
        });
        all.collect()
    }

    fn upstream(&mut self, file: &File, upstream: &file::Upstream, at: &Path) -> plan::Upstream {
        let endpoints = at.key("endpoints");
        if upstream.endpoints.is_empty() && !self.was_struck(&endpoints) {
            self.refuse(&endpoints, problem("no endpoint is named").remedy("write e.g. `endpoints: [http://127.0.0.1:8090]`"));
        }
        let mut seen = BTreeSet::new();
        for (index, endpoint) in upstream.endpoints.iter().enumerate() {
            let path = endpoints.index(index);
            if let Some(problem) = forbidden(&endpoint.0).or_else(|| itself(file, &endpoint.0)) {
                self.refuse(&path, problem);
            }
            if !seen.insert(endpoint.to_string()) {
                self.refuse(&path, problem(format!("`{endpoint}` is named twice")).remedy("remove one of the two"));
            }
        }
        let timeouts = &upstream.timeouts;
        let times = at.key("timeouts");
        for (name, value) in
            [("connect", timeouts.connect), ("first_byte", timeouts.first_byte), ("idle", timeouts.idle), ("total", timeouts.total)]
        {
            self.time(&times.key(name), value);
        }
        for (inner, value, outer, bound) in [
            ("connect", timeouts.connect, "first_byte", timeouts.first_byte),
            ("first_byte", timeouts.first_byte, "total", timeouts.total),
            ("idle", timeouts.idle, "total", timeouts.total),
        ] {
            if value > bound {
                // A default gives way to what is written.
                let at = if self.is_written(&times.key(inner)) { inner } else { outer };
                self.refuse(
                    &times.key(at),
                    problem(format!("`{inner}` of {value} can never run out: `{outer}` ends the turn after {bound}"))
                        .expected(format!("`{inner}` at most {bound}"))
                        .remedy(format!("shorten `{inner}`, or raise `{outer}`")),
                );
            }
        }
        let retry = at.key("retry");
        self.within(&retry.key("attempts"), upstream.retry.attempts, 0..=3);
        self.within(&retry.key("share"), upstream.retry.share, 0.0..=1.0);
        self.within(&retry.key("floor"), upstream.retry.floor, 0..=1000);
        self.span(&at.key("health").key("interval"), upstream.health.interval, seconds(0)..=seconds(3600));
        self.within(&at.key("idle").key("max"), upstream.idle.max, 0..=10_000);
        self.time(&at.key("idle").key("timeout"), upstream.idle.timeout);
        let (limits, most) = (&upstream.limits, Bytes(16 << 20));
        for (name, value) in [
            ("line_bytes", limits.line_bytes),
            ("event_bytes", limits.event_bytes),
            ("head_bytes", limits.head_bytes),
            ("whole_bytes", limits.whole_bytes),
        ] {
            self.within(&at.key("limits").key(name), value, Bytes(1 << 10)..=most);
        }
        self.inert_of_upstream(upstream, at);
        plan::Upstream {
            protocol: upstream.protocol,
            hop: upstream.hop,
            endpoints: upstream.endpoints.iter().map(|endpoint| endpoint.0.clone()).collect(),
            model: upstream.model.clone(),
            authorization: upstream.authorization.as_ref().and_then(|secret| self.secret(secret, &at.key("authorization"))),
            connect: timeouts.connect.0,
            first_byte: timeouts.first_byte.0,
            idle: timeouts.idle.0,
            total: timeouts.total.0,
            retries: upstream.retry.attempts,
            retry_share: upstream.retry.share as f32,
            retry_floor: upstream.retry.floor,
            balance: upstream.balance,
            health_interval: Some(upstream.health.interval.0).filter(|interval| !interval.is_zero()),
            health_failures: upstream.health.failures.get(),
            health_successes: upstream.health.successes.get(),
            kept: upstream.idle.max,
            kept_for: upstream.idle.timeout.0,
            line_bytes: size(limits.line_bytes),
            event_bytes: size(limits.event_bytes),
            head_bytes: size(limits.head_bytes),
            head_fields: limits.head_fields.get(),
            whole_bytes: size(limits.whole_bytes),
            ca: upstream.tls.ca.as_ref().and_then(|ca| self.names(&at.key("tls").key("ca"), ca, "the certificates to trust")),
        }
    }

    /// Settings of an upstream that would do nothing, or what nobody wants.
    fn inert_of_upstream(&mut self, upstream: &file::Upstream, at: &Path) {
        let secure = |endpoint: &file::Endpoint| endpoint.0.scheme_str() == Some("https");
        let near = |endpoint: &file::Endpoint| endpoint.0.host().is_some_and(is_near);
        if upstream.tls.ca.is_some() && !upstream.endpoints.iter().any(secure) {
            self.refuse(
                &at.key("tls").key("ca"),
                problem("no endpoint is `https`, so nobody is asked for a certificate").remedy("write `https://`, or remove `ca`"),
            );
        }
        if self.is_written(&at.key("hop")) && upstream.protocol != Protocol::Orchestrator {
            let remedy = "remove `hop`, or write `protocol: orchestrator`";
            self.refuse(&at.key("hop"), problem("`hop` says how turns travel to an orchestrator, and this is none").remedy(remedy));
        }
        if upstream.protocol == Protocol::Http {
            for (name, written) in [("model", upstream.model.is_some()), ("authorization", upstream.authorization.is_some())] {
                if written {
                    let found = format!("requests to an `http` upstream pass through as they are, so `{name}` would do nothing");
                    self.refuse(&at.key(name), problem(found).remedy(format!("remove `{name}`")));
                }
            }
        }
        if upstream.authorization.is_some() && upstream.endpoints.iter().any(|endpoint| !secure(endpoint) && !near(endpoint)) {
            self.warn(
                &at.key("authorization"),
                problem("the secret travels in plain text").remedy("write `https://` where the way is not private"),
            );
        }
        if self.is_written(&at.key("balance")) && upstream.endpoints.len() == 1 {
            self.warn(&at.key("balance"), problem("there is one endpoint, so there is nothing to choose").remedy("remove `balance`"));
        }
    }

    /// A secret that stands in a variable or a file; as text in the config it would be in everybody's copy of it.
    fn secret(&mut self, secret: &file::SecretText, at: &Path) -> Option<Secret> {
        let from_variable = matches!(self.tree.find(at).map(|node| &node.value), Some(Value::Scalar(Scalar { written: Some(_), .. })));
        let text = match secret.0.strip_prefix("file:") {
            Some(path) => self.text(at, FilePath::new(path), "the secret")?.trim_end_matches(['\n', '\r']).to_owned(),
            None if from_variable => secret.0.clone(),
            None => {
                let problem = problem("a secret, in the config")
                    .expected("`${VARIABLE}`, or `file:` and a path")
                    .remedy("put it into a file or a variable, and replace it: it has been seen");
                self.refuse(at, problem);
                return None;
            }
        };
        let visible = !text.is_empty() && text.len() <= 8 << 10 && text.bytes().all(|b| b.is_ascii_graphic() || b == b' ');
        if !visible {
            let found = if text.is_empty() { "the secret is empty" } else { "the secret cannot stand in a header" };
            self.refuse(at, problem(found).expected("1 to 8192 visible characters on one line"));
            return None;
        }
        Some(Secret::new(&text))
    }

    /// `None`: there is a section, but nothing can be told from it.
    fn policy(&mut self, file: &File, at: &Path) -> Option<Option<plan::Policy>> {
        let Some(policy) = &file.policy else {
            return if self.was_struck(at) { None } else { Some(None) };
        };
        for (name, text) in [("version", &policy.version), ("name", &policy.name), ("issuer", &policy.issuer)] {
            if text.is_empty() || text.len() > 128 || !text.bytes().all(|b| b.is_ascii_graphic()) {
                self.refuse(&at.key(name), problem(format!("{text:?}")).expected("1 to 128 visible characters without spaces"));
            }
        }
        let key = match &policy.key {
            SigningKey::Generated => {
                if self.is_production() {
                    self.refuse(
                        &at.key("key"),
                        problem("in production verdicts would be signed with a key that is gone after a restart")
                            .expected("a file")
                            .remedy("set `key: file:keys/policy.json`; it is made if it is not there"),
                    );
                }
                PolicyKey::Generated
            }
            SigningKey::File(path) => PolicyKey::File(self.disk.files.resolve(path)),
        };
        let text = self.text(&at.key("constitution"), &policy.constitution, "the constitution")?;
        let mut constitution = match Constitution::from_markdown(&text) {
            Ok(constitution) => constitution,
            Err(error) => {
                self.refuse(&at.key("constitution"), problem(error.to_string()));
                return None;
            }
        };
        for step in file.routes.iter().flat_map(|route| &route.filters) {
            if let Spec::Moderation(settings) = &step.spec {
                constitution = constitution.with_patterns("deny", self.patterns(&settings.deny));
                constitution = constitution.with_patterns("mask", self.patterns(&settings.mask));
            }
        }
        let (id, ver) = (policy.name.clone(), policy.version.clone());
        let issuer = Issuer { iss: policy.issuer.clone(), pol: headgate_policy::Policy { id, ver }, con: constitution.hash() };
        let used = file.routes.iter().flat_map(|route| &route.filters).any(|step| matches!(step.spec, Spec::PolicyHeaders(_)));
        if !used && file.orchestrator.is_none() && !self.was_struck(&Path::root().key("routes")) {
            self.warn(
                at,
                problem("no route has `policy_headers`, so nothing is signed")
                    .remedy("add `policy_headers` to the filters of a route, or remove `policy`"),
            );
        }
        let registry = match &policy.registry {
            None => None,
            Some(registry) => Some(self.policy_registry(registry, file, &at.key("registry"))?),
        };
        Some(Some(plan::Policy { constitution, issuer, key, registry }))
    }

    fn policy_registry(&mut self, registry: &file::PolicyRegistry, file: &File, at: &Path) -> Option<plan::PolicyRegistry> {
        if registry.folder.is_none() && file.redis.is_none() && !self.was_struck(&Path::root().key("redis")) {
            self.refuse(
                at,
                problem("the registry is nowhere: there is no section `redis`, and no folder is named")
                    .remedy("add e.g. `redis: { url: ${REDIS_URL} }`, or name a `folder` here"),
            );
        }
        if registry.folder.as_ref().is_some_and(|folder| folder.as_os_str().is_empty()) {
            self.refuse(&at.key("folder"), problem("no folder").expected("a path, such as `policies` or `/var/lib/headgate/policies`"));
        }
        let at = at.key("keys");
        let jwks = self.text(&at, &registry.keys, "the policy keys")?;
        match Verifier::from_jwks(&jwks) {
            Ok(keys) => Some(plan::PolicyRegistry { keys, folder: registry.folder.as_ref().map(|folder| self.disk.files.resolve(folder)) }),
            Err(error) => {
                let found = format!("not public policy keys: {error}");
                self.refuse(
                    &at,
                    problem(found)
                        .expected("a JWKS of public keys")
                        .remedy("write it with `headgate keys jwks`, from the ring of policy keys"),
                );
                None
            }
        }
    }

    fn redis(&mut self, file: &File, at: &Path) -> Option<plan::Redis> {
        let redis = file.redis.as_ref()?;
        self.span(&at.key("budget"), redis.budget, Duration::from_millis(1)..=seconds(1));
        let (at_ca, at) = (at.key("ca"), at.key("url"));
        // A URL without a password is no secret.
        let open = (!redis.url.0.starts_with("file:") && !redis.url.0.contains('@')).then(|| Secret::new(&redis.url.0));
        let url = match open {
            Some(url) => url,
            None => self.secret(&file::SecretText(redis.url.0.clone()), &at)?,
        };
        let uri = url
            .expose()
            .parse::<http::Uri>()
            .ok()
            .filter(|uri| uri.host().is_some_and(|host| !host.is_empty()) && matches!(uri.scheme_str(), Some("redis" | "rediss")));
        let Some(uri) = uri else {
            let expected = "`redis://host:6379`, or `rediss://` for TLS";
            let what = match url.expose().split_once("://") {
                Some((scheme, _)) if scheme.contains("sentinel") || scheme.contains("cluster") => problem("Sentinel and Cluster are not spoken")
                    .expected(expected)
                    .remedy("name one Redis, or a name or proxy that leads to the one that takes writes"),
                _ => problem("not a URL of Redis").expected(expected),
            };
            self.refuse(&at, what);
            return None;
        };
        if url.expose().contains('#') {
            let remedy = "remove what comes from `#` on; in a password, write it `%23`";
            self.refuse(&at, problem("a fragment, by which some clients are told to check no certificate").remedy(remedy));
        }
        let has_password = uri.authority().is_some_and(|authority| authority.as_str().contains('@'));
        let is_here = uri.host().is_some_and(|host| matches!(host, "localhost" | "127.0.0.1" | "[::1]"));
        if has_password && uri.scheme_str() == Some("redis") && !is_here {
            self.warn(&at, problem("the password travels in plain text").remedy("write `rediss://` where the way is not private"));
        }
        let ca = match &redis.ca {
            None => None,
            Some(_) if uri.scheme_str() == Some("redis") => {
                let found = "with `redis://` nobody is asked for a certificate";
                self.refuse(&at_ca, problem(found).remedy("write `rediss://`, or remove `ca`"));
                None
            }
            Some(ca) => Some(self.text(&at_ca, ca, "the certificates to trust")?.into()),
        };
        Some(plan::Redis { url, ca, budget: redis.budget.0 })
    }

    /// What a list looks for, for the constitution's hash. Files that cannot be read are the filter's to complain about.
    fn patterns(&mut self, entries: &[moderation::Entry]) -> Vec<String> {
        let mut patterns = Vec::new();
        for entry in entries {
            match entry {
                moderation::Entry::Detector(detector) => patterns.push(detector.to_string()),
                moderation::Entry::Phrase { phrase, .. } => patterns.push(phrase.clone()),
                moderation::Entry::Pattern { pattern, .. } => patterns.push(format!("/{pattern}/")),
                moderation::Entry::File(path) => {
                    let text = self.disk.read(path).unwrap_or_default();
                    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
                    patterns.extend(lines.map(str::to_owned));
                }
            }
        }
        patterns
    }

    fn routes(
        &mut self,
        file: &File,
        upstreams: &BTreeMap<String, plan::Upstream>,
        policy: Option<&Option<plan::Policy>>,
        at: &Path,
    ) -> Vec<plan::Route> {
        let mut routes: Vec<plan::Route> = Vec::new();
        for (index, route) in file.routes.iter().enumerate() {
            let at = at.index(index);
            let kind = route.kind.unwrap_or_else(|| kind_of(&route.path.0));
            let path = pattern(&route.path.0, kind);
            if let Some(earlier) = routes.iter().find(|earlier| earlier.path.covers(&path)) {
                let found = match earlier.name.as_ref() == route.path.0 {
                    true => format!("`{}` is the path of an earlier route", route.path),
                    false => format!("every request for `{}` takes the earlier route `{}`", route.path, earlier.name),
                };
                let remedy = if earlier.path == path { "remove one of the two" } else { "move this route up, or remove it" };
                self.refuse(&at.key("path"), problem(found).remedy(remedy));
            }
            if let Some(route) = self.route(file, route, kind, path, upstreams, policy, &at) {
                routes.push(route);
            }
        }
        let page = file.page && routes.iter().any(|route| route.path.fits("/"));
        if page {
            let found = "a route takes `/`, so the page is never shown";
            self.refuse(&Path::root().key("page"), problem(found).remedy("remove `page`, or give the route another path"));
        }
        with_model_lists(routes)
    }

    #[allow(clippy::too_many_arguments, reason = "everything a route is judged by, and used here only")]
    fn route(
        &mut self,
        file: &File,
        route: &file::Route,
        kind: Kind,
        path: PathPattern,
        upstreams: &BTreeMap<String, plan::Upstream>,
        policy: Option<&Option<plan::Policy>>,
        at: &Path,
    ) -> Option<plan::Route> {
        self.shape_of_route(route, kind, at);
        let upstream = self.upstream_named(&route.upstream, upstreams, &at.key("upstream"));
        if let Some(upstream) = upstream {
            self.protocol_fits(route, kind, upstream.protocol, at);
        }
        let limits = self.limits_of_route(file, route, kind, at);
        let filters = at.key("filters");
        self.placement(route, kind, &filters);

        // A policy that cannot be told is no reason to complain about its absence.
        let in_force = match policy {
            None => Some(stand_in(Issuer {
                iss: "x".into(),
                pol: headgate_policy::Policy { id: "x".into(), ver: "x".into() },
                con: headgate_policy::Digest::of(b""),
            })),
            Some(policy) => policy.as_ref().map(|policy| stand_in(policy.issuer.clone())),
        };
        let built = {
            let disk = RefCell::new(&mut *self.disk);
            let read = |path: &FilePath| disk.borrow_mut().read(path).map(|text| text.to_string());
            build_chain(&route.filters, &Tools { read: &read, policy: in_force, ..Tools::none() })
        };
        let built = match built {
            Ok(built) => built,
            Err(problems) => {
                for problem in problems {
                    self.refuse(&filters, problem);
                }
                return None;
            }
        };
        let flow = flow_of(&built, &limits);
        let upstream = upstream?;
        self.together(route, kind, upstream, &built, &flow, at);

        let bounds = Bounds {
            head_bytes: file.limits.head_bytes.0,
            body_bytes: limits.body_bytes.0,
            line_bytes: upstream.line_bytes as u64,
            event_bytes: upstream.event_bytes as u64,
            upstream_head_bytes: upstream.head_bytes as u64,
            shares_socket: upstream.hop == Hop::WebSocket,
        };
        let effect = match kind {
            Kind::Chat | Kind::OpenAi => Effect::of(&route.filters, &built, &flow, &bounds),
            Kind::Proxy => {
                let whole = Effect::of(&route.filters, &built, &flow, &bounds);
                let acts = |link: &Link| !link.by_default;
                Effect::passing(whole.chain.into_iter().filter(acts).collect(), &bounds)
            }
        };
        let models = if route.models.is_empty() { upstream.model.iter().cloned().collect() } else { route.models.clone() };
        Some(plan::Route {
            name: route.path.0.as_str().into(),
            strip_prefix: route.strip_prefix.then(|| path.base.clone()),
            forwarded: route.forwarded,
            path,
            kind,
            upstream: route.upstream.clone(),
            steps: route.filters.clone(),
            flow,
            origins: origins(&route.origins),
            methods: route.methods.iter().map(|method| method.0.clone()).collect(),
            models: if kind == Kind::OpenAi { models } else { Vec::new() },
            body: limits.body.0,
            body_bytes: size(limits.body_bytes),
            effect,
        })
    }

    /// Settings that do not fit the route's kind.
    fn shape_of_route(&mut self, route: &file::Route, kind: Kind, at: &Path) {
        let below = route.path.0.ends_with("/*");
        match kind {
            Kind::Chat if below => {
                let found = "a chat route has one path; its turns are below it anyway";
                self.refuse(&at.key("path"), problem(found).remedy(format!("write `{}`", route.path.0.trim_end_matches("/*"))));
            }
            Kind::OpenAi if !route.path.0.ends_with("/chat/completions") && !route.path.0.ends_with("/models") => {
                let found = format!("`{}` is no call of OpenAI's that is spoken here", route.path);
                self.refuse(
                    &at.key("path"),
                    problem(found)
                        .expected("a path that ends in `/chat/completions` or `/models`")
                        .remedy("write `/v1/chat/completions`, or `kind: proxy` to pass it through unread"),
                );
            }
            Kind::Chat | Kind::OpenAi | Kind::Proxy => {}
        }
        let inert = [
            ("methods", !route.methods.is_empty(), kind == Kind::Proxy, "`proxy` routes"),
            ("strip_prefix", route.strip_prefix, kind == Kind::Proxy && below, "`proxy` routes that end in `/*`"),
            ("forwarded", route.forwarded != file::Forwarded::default(), kind == Kind::Proxy, "`proxy` routes"),
            ("models", !route.models.is_empty(), kind == Kind::OpenAi, "`openai` routes"),
        ];
        for (name, written, means, only) in inert {
            if written && !means {
                let found = format!("`{name}` means something for {only} only; this one is `{kind}`");
                self.refuse(&at.key(name), problem(found).remedy(format!("remove `{name}`")));
            }
        }
        if route.origins.contains(&Origin::Any) && route.origins.len() > 1 {
            self.refuse(&at.key("origins"), problem("`any` makes the others mean nothing").remedy("remove `any`, or the others"));
        }
    }

    fn upstream_named<'b>(&mut self, name: &str, upstreams: &'b BTreeMap<String, plan::Upstream>, at: &Path) -> Option<&'b plan::Upstream> {
        let found = upstreams.get(name);
        if found.is_none() && !self.was_struck(&Path::root().key("upstreams").key(name)) {
            let near = did_you_mean(name, upstreams.keys().map(String::as_str));
            let names: Vec<String> = upstreams.keys().map(|name| format!("`{name}`")).collect();
            let expected =
                if names.is_empty() { "a name of `upstreams`, which has none".to_owned() } else { format!("one of {}", names.join(", ")) };
            self.refuse(at, problem(format!("unknown upstream `{name}`{near}")).expected(expected).remedy("add it to `upstreams`"));
        }
        found
    }

    fn protocol_fits(&mut self, route: &file::Route, kind: Kind, protocol: Protocol, at: &Path) {
        let name = &route.upstream;
        match (kind, protocol) {
            (Kind::Chat | Kind::OpenAi, Protocol::Http) => {
                let found = format!("a `{kind}` route needs an upstream that answers turns; `{name}` is `http`");
                self.refuse(&at.key("upstream"), problem(found).expected("an upstream with `protocol: openai` or `orchestrator`"));
            }
            (Kind::Proxy, Protocol::Orchestrator) => {
                let found = format!("`{name}` is an orchestrator: it takes signed turns only, and this route passes requests through");
                self.refuse(&at.key("upstream"), problem(found).remedy("write `kind: chat`, or name an `http` upstream"));
            }
            (Kind::Chat | Kind::OpenAi, Protocol::Orchestrator) if !has(route, "policy_headers") => {
                let found = format!("`{name}` is an orchestrator: it refuses turns without a signed verdict, and this route signs none");
                self.refuse(&at.key("filters"), problem(found).remedy("add `- policy_headers` to the route's filters"));
            }
            (Kind::Chat | Kind::OpenAi | Kind::Proxy, Protocol::OpenAi | Protocol::Orchestrator | Protocol::Http) => {}
        }
    }

    fn limits_of_route(&mut self, file: &File, route: &file::Route, kind: Kind, at: &Path) -> file::Limits {
        let (own, at) = (&route.limits, at.key("limits"));
        let written = [
            ("body", own.body.is_some()),
            ("body_bytes", own.body_bytes.is_some()),
            ("heartbeat", own.heartbeat.is_some()),
            ("answer_bytes", own.answer_bytes.is_some()),
        ];
        if kind == Kind::Proxy {
            for (name, _) in written.into_iter().filter(|(_, written)| *written) {
                let found = format!("a `proxy` route passes bodies through as they come, so `{name}` would do nothing");
                self.refuse(&at.key(name), problem(found).remedy(format!("remove `{name}`")));
            }
        }
        let all = &file.limits;
        let limits = file::Limits {
            body: own.body.unwrap_or(all.body),
            body_bytes: own.body_bytes.unwrap_or(all.body_bytes),
            heartbeat: own.heartbeat.unwrap_or(all.heartbeat),
            answer_bytes: own.answer_bytes.unwrap_or(all.answer_bytes),
            ..all.clone()
        };
        // Those of all routes have been judged.
        for (name, _) in written.into_iter().filter(|(_, written)| *written) {
            match name {
                "body" => self.span(&at.key(name), limits.body, seconds(1)..=seconds(600)),
                "heartbeat" => self.span(&at.key(name), limits.heartbeat, seconds(1)..=seconds(300)),
                "body_bytes" => self.within(&at.key(name), limits.body_bytes, Bytes(1 << 10)..=Bytes(MOST_BODY)),
                _ => self.within(&at.key(name), limits.answer_bytes, Bytes(1 << 10)..=Bytes(MOST_ANSWER)),
            }
        }
        limits
    }

    /// Filters that cannot do on this route what they are for.
    fn placement(&mut self, route: &file::Route, kind: Kind, at: &Path) {
        for (index, step) in route.filters.iter().enumerate() {
            let (at, name) = (at.index(index), step.name());
            if kind == Kind::Proxy && !matches!(step.spec, Spec::Auth(_) | Spec::Cancellation(_)) {
                let found = format!("a `proxy` route reads no prompt and no answer, so `{name}` would do nothing");
                self.refuse(
                    &at.key(name),
                    problem(found)
                        .expected("`auth` and `cancellation`")
                        .remedy(format!("remove `{name}`, or make the route `chat` or `openai`")),
                );
            }
            match &step.spec {
                Spec::RateLimit(_) if kind != Kind::Proxy && !has(route, "auth") => {
                    self.refuse(
                        &at.key(name),
                        problem("without `auth` nobody is known, so all clients would share one limit")
                            .expected("`auth` before `rate_limit`")
                            .remedy("add `- auth: ...` above it"),
                    );
                }
                Spec::Cancellation(settings) => match settings.on_disconnect.0 {
                    OnDisconnect::Grace(_) | OnDisconnect::Drain(_) if kind != Kind::Chat => {
                        let found = format!(
                            "a client of an `{kind}` route cannot come back for its answer, so `{}` would only waste it",
                            settings.on_disconnect
                        );
                        self.refuse(
                            &at.key(name).key("on_disconnect"),
                            problem(found).expected("`cancel`").remedy("remove `on_disconnect`"),
                        );
                    }
                    OnDisconnect::Grace(_) | OnDisconnect::Drain(_) | OnDisconnect::Cancel => {}
                },
                Spec::Auth(settings) => {
                    let uri = settings.jwks.as_deref().and_then(|jwks| jwks.parse::<http::Uri>().ok());
                    if let Some(problem) = uri.as_ref().and_then(forbidden) {
                        self.refuse(&at.key(name).key("jwks"), problem);
                    }
                }
                _ => {}
            }
        }
    }

    /// What only shows when a route, its chain and its upstream are seen together.
    fn together(&mut self, route: &file::Route, kind: Kind, upstream: &plan::Upstream, built: &[Built], flow: &Flow, at: &Path) {
        if kind == Kind::Proxy {
            return;
        }
        let filters = at.key("filters");
        for (index, step) in route.filters.iter().enumerate() {
            if let Some(hold) = step.terms.max_hold.filter(|hold| hold.0 >= upstream.idle) {
                let idle = Span(upstream.idle);
                self.refuse(
                    &filters.index(index).key("max_hold"),
                    problem(format!("text may wait {hold}, but the upstream's silence ends the turn after {idle} (`timeouts.idle`)"))
                        .expected(format!("less than {idle}"))
                        .remedy(format!("shorten `max_hold`, or raise `upstreams.{}.timeouts.idle`", route.upstream)),
                );
            }
            if let Spec::Budget(settings) = &step.spec {
                let answer = flow.max_text;
                let tokens = settings.output_tokens.map(|tokens| u64::from(tokens) * headgate_filters::budget::BYTES_PER_TOKEN);
                for (name, limit) in [("output_tokens", tokens), ("output_bytes", settings.output_bytes.map(|bytes| bytes.0))] {
                    if limit.is_some_and(|limit| limit > answer) {
                        let found = format!(
                            "the budget of {} can never be used up: `answer_bytes` ends the answer after {}",
                            Bytes(limit.unwrap_or(0)),
                            Bytes(answer)
                        );
                        self.refuse(
                            &filters.index(index).key("budget").key(name),
                            problem(found).remedy("lower the budget, or raise `limits.answer_bytes`"),
                        );
                    }
                }
            }
        }
        let cancellation = route.filters.iter().position(|step| matches!(step.spec, Spec::Cancellation(_)));
        let deadline = match cancellation {
            Some(index) => filters.index(index).key("cancellation").key("deadline"),
            None => Path::root().key("upstreams").key(&route.upstream).key("timeouts").key("first_byte"),
        };
        if flow.deadline < upstream.first_byte {
            let (deadline_is, first) = (Span(flow.deadline), Span(upstream.first_byte));
            self.refuse(
                &deadline,
                problem(format!(
                    "turns of `{}` end after {deadline_is}, before the upstream's first byte is given up on, after {first}",
                    route.path
                ))
                .expected(format!("`cancellation.deadline` at least {first}"))
                .remedy(format!("raise `cancellation.deadline`, or shorten `upstreams.{}.timeouts.first_byte`", route.upstream)),
            );
        }
        // The default is not worth a word: so short a turn needs none.
        let is_default = route.limits.heartbeat.is_none() && !self.is_written(&Path::root().key("limits").key("heartbeat"));
        if flow.heartbeat >= flow.deadline && !is_default {
            let path = if route.limits.heartbeat.is_some() {
                at.key("limits").key("heartbeat")
            } else {
                Path::root().key("limits").key("heartbeat")
            };
            let found = format!("no heartbeat would ever be sent: turns of `{}` end after {}", route.path, Span(flow.deadline));
            self.refuse(
                &path,
                problem(found).expected(format!("less than {}", Span(flow.deadline))).remedy("remove it: the default is 15s"),
            );
        }
        self.guards(route, kind, built, at);
    }

    /// What an operator should know about who watches this route.
    fn guards(&mut self, route: &file::Route, kind: Kind, built: &[Built], at: &Path) {
        if route.path.0.ends_with("/models") && kind == Kind::OpenAi {
            return;
        }
        let watching = |built: &&Built| built.name == "moderation" && built.facts.judges_text;
        if !built.iter().any(|built| watching(&built)) {
            let found = match has(route, "moderation") {
                true => "answers are not moderated: every `moderation` here has `answer: off`",
                false => "nothing moderates what passes here",
            };
            self.warn(&at.key("path"), problem(found).remedy("add e.g. `- moderation: { mask: [email, credit_card, api_key] }`"));
        } else if built.iter().filter(watching).all(|built| built.terms.mode == Mode::Shadow) {
            let index = route.filters.iter().position(|step| matches!(step.spec, Spec::Moderation(_))).unwrap_or(0);
            self.warn(
                &at.key("filters").index(index).key("mode"),
                problem("every `moderation` here is shadowed: what it finds is recorded and leaves all the same"),
            );
        }
        if !has(route, "auth") {
            self.warn(&at.key("path"), problem("anybody who can connect may call this").remedy("add `- auth: ...` to the route's filters"));
        }
    }

    fn orchestrator(
        &mut self,
        file: &File,
        upstreams: &BTreeMap<String, plan::Upstream>,
        routes: &[plan::Route],
        at: &Path,
    ) -> Option<plan::Orchestrator> {
        let orchestrator = file.orchestrator.as_ref()?;
        let named = std::iter::once((at.key("upstream"), &orchestrator.upstream))
            .chain(orchestrator.models.iter().map(|(model, name)| (at.key("models").key(model), name)));
        for (at, name) in named {
            if let Some(upstream) = self.upstream_named(name, upstreams, &at)
                && upstream.protocol != Protocol::OpenAi
            {
                let found = format!("an orchestrator asks models, and `{name}` is none");
                self.refuse(&at, problem(found).expected("an upstream with `protocol: openai`"));
            }
        }
        if file.policy.is_none() && !self.was_struck(&Path::root().key("policy")) {
            self.refuse(
                at,
                problem("an orchestrator takes turns under a policy it knows, and there is no section `policy`")
                    .remedy("add the `policy` of the gateways that call it: the same constitution and version"),
            );
        }
        let keys = match &orchestrator.keys {
            file::VerdictKeys::Own => {
                let signs = file.routes.iter().any(|route| has(route, "policy_headers"));
                if !signs && !self.was_struck(&Path::root().key("routes")) {
                    self.refuse(
                        &at.key("keys"),
                        problem("`own` keys, but no route here signs verdicts, so every turn would be refused")
                            .remedy("name the gateways' keys: `keys: http://gateway:9090/.well-known/jwks.json`"),
                    );
                }
                Some(plan::VerdictKeys::Own)
            }
            file::VerdictKeys::File(path) => {
                let at = at.key("keys");
                let jwks = self.text(&at, path, "the keys");
                if let Some(Err(error)) = jwks.as_deref().map(Verifier::from_jwks) {
                    self.refuse(&at, problem(format!("not keys of a gateway: {error}")).expected("a JWKS, as a gateway publishes it"));
                }
                jwks.map(|jwks| plan::VerdictKeys::Jwks(jwks.to_string()))
            }
            file::VerdictKeys::Url(uri) => {
                if let Some(problem) = forbidden(uri) {
                    self.refuse(&at.key("keys"), problem);
                }
                Some(plan::VerdictKeys::Url(uri.clone()))
            }
        };
        // A new key is published for twice the longest of these before it signs (`PUBLISH_AHEAD`).
        self.span(&at.key("keys_refresh"), orchestrator.keys_refresh, seconds(1)..=seconds(PUBLISH_AHEAD / 2));
        let (history, limits) = (&orchestrator.history, &orchestrator.limits);
        let at_history = at.key("history");
        self.within(&at_history.key("sessions"), history.sessions, 1..=10_000_000);
        self.within(&at_history.key("messages"), history.messages, 1..=10_000);
        if history.session_bytes > history.bytes {
            let found = format!("one session may have {}, all together {}", history.session_bytes, history.bytes);
            self.refuse(&at_history.key("session_bytes"), problem(found).expected(format!("at most {}", history.bytes)));
        }
        let at_limits = at.key("limits");
        self.within(&at_limits.key("connections"), limits.connections.get(), 1..=1_000_000);
        self.within(&at_limits.key("turns"), limits.turns.get(), 1..=1_000_000);
        self.time(&at_limits.key("turn"), limits.turn);
        self.within(&at_limits.key("body_bytes"), limits.body_bytes, Bytes(1 << 10)..=Bytes(MOST_BODY));
        self.within(&at_limits.key("answer_bytes"), limits.answer_bytes, Bytes(1 << 10)..=Bytes(MOST_ANSWER));
        let events = self.events(orchestrator.events.as_ref(), at);
        if let Some(events) = &events {
            let away = |route: &&plan::Route| match route.flow.on_disconnect {
                OnDisconnect::Grace(time) | OnDisconnect::Drain(time) => time,
                OnDisconnect::Cancel => Duration::ZERO,
            };
            let told = routes.iter().filter(|route| upstreams.get(&route.upstream).is_some_and(|to| to.protocol == Protocol::Orchestrator));
            if let Some(route) = told.max_by_key(away).filter(|route| away(route) >= events.unknown_after) {
                let (name, time) = (&route.name, Span(away(&route)));
                let found = format!("on `{name}` a client may come back for its answer after {time}, when it would be written already that nobody knows what it got");
                self.refuse(
                    &at.key("events").key("unknown_after"),
                    problem(found).expected(format!("more than {time}")).remedy("raise `unknown_after`, or shorten the route's `on_disconnect`"),
                );
            }
        }
        let training = orchestrator.training.as_ref().and_then(|training| {
            let at = at.key("training");
            self.training(training, file, events.as_ref(), &at)
        });
        let confirm = orchestrator.confirm.as_ref().map(|confirm| self.confirm(confirm, limits.turn, upstreams, routes, at));
        let issuer = orchestrator.issuer.clone().or_else(|| file.policy.as_ref().map(|policy| policy.issuer.clone()));
        Some(plan::Orchestrator {
            listen: orchestrator.listen.0,
            upstream: orchestrator.upstream.clone(),
            models: orchestrator.models.clone(),
            keys: keys?,
            keys_refresh: orchestrator.keys_refresh.0,
            issuer: issuer.unwrap_or_else(|| "headgate".to_owned()),
            sessions: history.sessions,
            session_messages: history.messages,
            session_bytes: size(history.session_bytes),
            history_bytes: size(history.bytes),
            connections: limits.connections.get(),
            turns: limits.turns.get(),
            turn: limits.turn.0,
            body_bytes: size(limits.body_bytes),
            answer_bytes: size(limits.answer_bytes),
            events,
            training,
            confirm,
        })
    }

    /// `turn`: the longest that a turn may take at the orchestrator `at`.
    fn confirm(
        &mut self,
        confirm: &file::Confirm,
        turn: Span,
        upstreams: &BTreeMap<String, plan::Upstream>,
        routes: &[plan::Route],
        at: &Path,
    ) -> plan::Confirm {
        let (at_tools, at_within) = (at.key("confirm").key("tools"), at.key("confirm").key("within"));
        if !(1..=128).contains(&confirm.tools.len()) {
            self.refuse(&at_tools, problem(format!("{} tools", confirm.tools.len())).expected("1 to 128 names"));
        }
        let is_name = |name: &String| {
            (1..=64).contains(&name.len()) && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-'))
        };
        for (index, name) in confirm.tools.iter().enumerate().filter(|(_, name)| !is_name(name)) {
            let found = format!("no call is one of `{name}`, so nobody would ever be asked");
            self.refuse(&at_tools.index(index), problem(found).expected("a tool's name: 1 to 64 of A-Z a-z 0-9 _ -"));
        }
        self.span(&at_within, confirm.within, seconds(1)..=seconds(3600));
        // What ends first makes the answer one that nobody waits for.
        let own = [(turn.0, format!("{}.limits.turn", at))];
        let ours = upstreams.iter().filter(|(_, upstream)| upstream.protocol == Protocol::Orchestrator);
        let totals = ours.map(|(name, upstream)| (upstream.total, format!("upstreams.{name}.timeouts.total")));
        let asked = routes.iter().filter(|route| upstreams.get(&route.upstream).is_some_and(|up| up.protocol == Protocol::Orchestrator));
        let deadlines = asked.map(|route| (route.flow.deadline, format!("the `cancellation.deadline` of `{}`", route.name)));
        let shortest = own.into_iter().chain(totals).chain(deadlines).min_by_key(|(time, _)| *time);
        if let Some((time, name)) = shortest.filter(|(time, _)| *time <= confirm.within.0) {
            let (time, within) = (Span(time), confirm.within);
            self.refuse(
                &at_within,
                problem(format!("a person may take {within}, but the turn ends after {time} ({name})"))
                    .expected(format!("less than {time}"))
                    .remedy(format!("shorten `within`, or raise {name}")),
            );
        }
        plan::Confirm { tools: confirm.tools.iter().cloned().collect(), within: confirm.within.0 }
    }

    fn events(&mut self, events: Option<&file::Events>, at: &Path) -> Option<plan::Events> {
        let Some(events) = events else {
            self.warn(
                at,
                problem("what becomes of a turn is not kept: after a crash nobody knows which turns were cut")
                    .remedy("add e.g. `events: { folder: events, cap: 1GiB }`"),
            );
            return None;
        };
        let at = at.key("events");
        self.within(&at.key("cap"), events.cap, Bytes(16 << 20)..=Bytes(1 << 40));
        self.span(&at.key("unknown_after"), events.unknown_after, seconds(1)..=seconds(3600));
        let folder = self.folder(&events.folder, &at.key("folder"), "events");
        let kafka = events.kafka.as_ref().map(|kafka| self.kafka(kafka, &at.key("kafka")));
        let text = events.text.as_ref().map(|text| self.text_kept(text, &folder, &at.key("text")));
        Some(plan::Events { folder, cap: events.cap.0, unknown_after: events.unknown_after.0, kafka, text })
    }

    fn text_kept(&mut self, text: &file::Text, events: &FilePath, at: &Path) -> plan::Text {
        let folder = self.folder(&text.folder, &at.key("folder"), "subjects");
        let key = self.folder(&text.key, &at.key("key"), "secrets/text.key");
        // What lies together is copied together, and a backup of keys brings back what was erased.
        if folder.starts_with(events) || events.starts_with(&folder) {
            let found = "the keys of subjects would be copied along with the events that they seal";
            self.refuse(&at.key("folder"), problem(found).expected("a folder beside that of the events, such as `subjects`"));
        }
        if key.starts_with(&folder) || key.starts_with(events) {
            let found = "the master key would be copied along with what it protects";
            self.refuse(&at.key("key"), problem(found).expected("a file elsewhere, such as `secrets/text.key`"));
        }
        plan::Text { key, folder }
    }

    fn training(&mut self, training: &file::Training, file: &File, events: Option<&plan::Events>, at: &Path) -> Option<plan::Training> {
        for (name, written) in [
            ("audience", &training.audience),
            ("role", &training.role),
            ("role_claim", &training.role_claim),
            ("tenant_claim", &training.tenant_claim),
        ] {
            if written.is_empty() {
                self.refuse(&at.key(name), problem("nothing is written").expected("a name"));
            }
        }
        match training.issuer.parse::<Endpoint>() {
            Ok(Endpoint(uri)) => {
                let local = uri.host().is_some_and(|host| ["localhost", "127.0.0.1", "[::1]"].contains(&host));
                if let Some(problem) = forbidden(&uri) {
                    self.refuse(&at.key("issuer"), problem);
                } else if uri.scheme_str() != Some("https") && !local {
                    let found = format!("`{}`: whoever is between could say who is an admin", training.issuer);
                    self.refuse(&at.key("issuer"), problem(found).expected("an https URL").remedy("use https"));
                }
            }
            Err(_) => {
                self.refuse(&at.key("issuer"), problem("not a URL").expected("the issuer of your tokens, such as `https://id.example.com`"))
            }
        }
        self.span(&at.key("ttl"), training.ttl, seconds(3)..=seconds(600));
        self.span(&at.key("max_hold"), training.max_hold, seconds(3)..=seconds(24 * 3600));
        if training.max_hold < training.ttl {
            let found = format!("training mode would have to end before its lock is renewed, which lasts {}", training.ttl);
            self.refuse(&at.key("max_hold"), problem(found).expected(format!("at least {}", training.ttl)));
        }
        self.within(&at.key("epoch"), training.epoch, 0..=8000);
        let kafka = events.and_then(|events| events.kafka.as_ref());
        let events_remedy = "add `events: { folder: events }` to the orchestrator: fences that were seen are remembered there";
        if events.is_none() {
            self.refuse(at, problem("training mode without `events`: after a restart an old lock would be believed").remedy(events_remedy));
        }
        let topic = if training.alone {
            if self.is_production() {
                let found = "in production training mode would be audited on this machine alone";
                self.refuse(&at.key("alone"), problem(found).remedy("remove `alone`, and add `redis` and `events.kafka`"));
            }
            None
        } else {
            let alone = "; or, where this is the only process, write `alone: true` here";
            if file.redis.is_none() {
                let remedy = format!("add `redis: {{ url: redis://localhost:6379 }}` at the top{alone}");
                self.refuse(at, problem("training mode without `redis`: nobody would keep its lock").remedy(remedy));
            }
            if events.is_some() && kafka.is_none() {
                let remedy = format!("add `kafka: {{ brokers: [localhost:9092] }}` to `events`{alone}");
                self.refuse(at, problem("training mode without `events.kafka`: nobody would acknowledge its audit").remedy(remedy));
            }
            if !is_topic(&training.topic) || kafka.is_some_and(|kafka| kafka.topic == training.topic) {
                let found = format!("`{}` is no topic for an audit", training.topic);
                let expected = "another name than that of the events: 1 to 249 letters, digits, `.`, `_` or `-`";
                self.refuse(&at.key("topic"), problem(found).expected(expected));
            }
            Some(plan::Kafka { topic: training.topic.clone(), ..kafka?.clone() })
        };
        Some(plan::Training {
            admins: AdminTerms {
                issuer: training.issuer.clone(),
                audience: training.audience.clone(),
                role: training.role.clone(),
                role_claim: training.role_claim.clone(),
                tenant_claim: training.tenant_claim.clone(),
            },
            ttl: training.ttl.0,
            max_hold: training.max_hold.0,
            topic,
            epoch: training.epoch,
        })
    }

    /// A folder that will be made where it is not there; one could be called `example`.
    fn folder(&mut self, folder: &FilePath, at: &Path, example: &str) -> std::path::PathBuf {
        if folder.as_os_str().is_empty() {
            self.refuse(at, problem("no folder").expected(format!("a path, such as `{example}` or `/var/lib/headgate/{example}`")));
        }
        self.disk.files.resolve(folder)
    }

    fn broker_tls(&mut self, tls: &file::BrokerTls, at: &Path) -> Option<plan::BrokerTls> {
        let mut named = |name, path: &Option<std::path::PathBuf>, what| match path {
            Some(path) => self.names(&at.key(name), path, what).map(Some),
            None => Some(None),
        };
        let (ca, certificate) = (named("ca", &tls.ca, "the certificates to trust"), named("certificate", &tls.certificate, "the certificate"));
        let own = match (certificate?, named("key", &tls.key, "the key")?) {
            (Some(certificate), Some(key)) => Some((certificate, key)),
            (None, None) => None,
            (certificate, _) => {
                let (there, missing) = if certificate.is_some() { ("certificate", "key") } else { ("key", "certificate") };
                self.refuse(&at.key(there), problem(format!("there is no `{missing}`")).remedy(format!("add `{missing}`, or remove `{there}`")));
                return None;
            }
        };
        Some(plan::BrokerTls { ca: ca?, own })
    }

    fn sasl(&mut self, sasl: &file::Sasl, has_tls: bool, at: &Path) -> Option<plan::Sasl> {
        match (sasl.over, has_tls) {
            (Over::Tls, false) => {
                let remedy = "add `tls: {}` beside it; or, where everybody on the way may know the password, write `over: plain_text` here";
                self.refuse(at, problem("a password for brokers that are spoken to in plain text").remedy(remedy));
            }
            (Over::PlainText, true) => {
                self.refuse(&at.key("over"), problem("the password travels over TLS").remedy("remove `over`, or `tls` beside `sasl`"));
            }
            (Over::PlainText, false) => {
                self.warn(&at.key("over"), problem("whoever is on the way to the brokers may write to the topic").remedy("add `tls`"));
            }
            (Over::Tls, true) => {}
        }
        if sasl.username.is_empty() {
            self.refuse(&at.key("username"), problem("nothing is written").expected("the name of a user"));
        }
        let password = self.secret(&sasl.password, &at.key("password"))?;
        Some(plan::Sasl { mechanism: sasl.mechanism.as_str(), username: sasl.username.clone(), password })
    }

    fn kafka(&mut self, kafka: &file::Kafka, at: &Path) -> plan::Kafka {
        let brokers = at.key("brokers");
        if kafka.brokers.is_empty() {
            self.refuse(&brokers, problem("no broker").expected("at least one, such as `kafka-1:9092`"));
        }
        for (index, broker) in kafka.brokers.iter().enumerate() {
            let is_broker = broker.parse::<http::uri::Authority>().is_ok_and(|named| named.port_u16().is_some_and(|port| port > 0))
                && !broker.contains('@');
            if !is_broker {
                self.refuse(
                    &brokers.index(index),
                    problem(format!("`{broker}` is no broker")).expected("`host:port`, such as `kafka-1:9092`"),
                );
            }
        }
        if !is_topic(&kafka.topic) {
            self.refuse(&at.key("topic"), problem("no name of a topic").expected("1 to 249 letters, digits, `.`, `_` or `-`"));
        }
        self.within(&at.key("replication_factor"), kafka.replication_factor, 1..=100);
        self.within(&at.key("min_insync_replicas"), kafka.min_insync_replicas, 1..=kafka.replication_factor.max(1));
        if let Some(partitions) = kafka.create_with_partitions {
            self.within(&at.key("create_with_partitions"), partitions, 1..=10_000);
        }
        let tls = kafka.tls.as_ref().and_then(|tls| self.broker_tls(tls, &at.key("tls")));
        let sasl = kafka.sasl.as_ref().and_then(|sasl| self.sasl(sasl, kafka.tls.is_some(), &at.key("sasl")));
        plan::Kafka {
            brokers: kafka.brokers.clone(),
            tls,
            sasl,
            topic: kafka.topic.clone(),
            replication_factor: kafka.replication_factor,
            min_insync_replicas: kafka.min_insync_replicas,
            create_with_partitions: kafka.create_with_partitions,
        }
    }

    /// Upstreams that nobody asks.
    fn unused(&mut self, file: &File) {
        let of_routes = file.routes.iter().map(|route| &route.upstream);
        let of_orchestrator =
            file.orchestrator.iter().flat_map(|orchestrator| orchestrator.models.values().chain([&orchestrator.upstream]));
        let used: BTreeSet<&String> = of_routes.chain(of_orchestrator).collect();
        let (routes, orchestrator) = (Path::root().key("routes"), Path::root().key("orchestrator"));
        if self.was_struck(&routes) || self.was_struck(&orchestrator) {
            return;
        }
        for name in file.upstreams.keys().filter(|name| !used.contains(name)) {
            let at = Path::root().key("upstreams").key(name);
            self.warn(&at, problem(format!("no route asks `{name}`")).remedy("name it as a route's `upstream`, or remove it"));
        }
    }

    fn slm(&mut self, slm: Option<&file::Slm>, at: &Path) -> Option<plan::Slm> {
        let slm = slm?;
        if slm.pace.is_some_and(|pace| !(0.1..=10_000.0).contains(&pace)) {
            self.refuse(
                &at.key("pace"),
                problem(format!("`{}`", slm.pace.unwrap_or_default()))
                    .expected("0.1 to 10000 tokens per second")
                    .remedy("remove `pace` to let it run as fast as it goes"),
            );
        }
        let model = match &slm.model {
            Some(path) => Some(self.names(&at.key("model"), path, "the model")?),
            None => None,
        };
        Some(plan::Slm { listen: slm.listen.0, model, pace: slm.pace })
    }

    fn observability(&mut self, written: &file::Observability, at: &Path) -> plan::Observability {
        if let Some(sampling) = written.sampling {
            self.within(&at.key("sampling"), sampling, 0.0..=1.0);
            if written.otlp.is_none() && !self.was_struck(&at.key("otlp")) {
                self.refuse(
                    &at.key("sampling"),
                    problem("traces are sent nowhere, so there is nothing to choose from")
                        .remedy("add `otlp: http://127.0.0.1:4318`, or remove `sampling`"),
                );
            }
        }
        if let Some(problem) = written.otlp.as_ref().and_then(|endpoint| forbidden(&endpoint.0)) {
            self.refuse(&at.key("otlp"), problem);
        }
        plan::Observability {
            logs: written.logs,
            level: written.level.clone().unwrap_or_else(|| "info".to_owned()),
            otlp: written.otlp.as_ref().map(|endpoint| endpoint.0.clone()),
            sampling: written.sampling.unwrap_or(1.0),
        }
    }
}

fn has(route: &file::Route, filter: &str) -> bool {
    route.filters.iter().any(|step: &Step| step.name() == filter)
}

fn unreadable(what: &str, path: &FilePath, error: &io::Error) -> Problem {
    problem(format!("cannot read {what} {}: {error}", path.display())).remedy("paths are relative to the folder of the config")
}

/// Whether two listeners would want the same port. Port 0 is any free one.
fn clash(one: SocketAddr, other: SocketAddr) -> bool {
    one.port() != 0 && one.port() == other.port() && (one.ip() == other.ip() || one.ip().is_unspecified() || other.ip().is_unspecified())
}

fn kind_of(path: &str) -> Kind {
    match path {
        "/v1/chat/stream" => Kind::Chat,
        "/v1/chat/completions" | "/v1/models" => Kind::OpenAi,
        _ => Kind::Proxy,
    }
}

fn pattern(path: &str, kind: Kind) -> PathPattern {
    match path.strip_suffix("/*") {
        Some(base) => PathPattern { base: base.to_owned(), below: true, itself: base.is_empty() },
        // `/` alone has an empty base and itself spelled out.
        None if path == "/" => PathPattern { base: "/".to_owned(), below: false, itself: true },
        None => PathPattern { base: path.to_owned(), below: kind == Kind::Chat, itself: true },
    }
}

/// `GET /v1/models` beside every `/v1/chat/completions`, where no route of its own has it: SDKs ask for it.
fn with_model_lists(routes: Vec<plan::Route>) -> Vec<plan::Route> {
    let mut all: Vec<plan::Route> = Vec::with_capacity(routes.len());
    let lists: Vec<plan::Route> = routes
        .iter()
        .filter(|route| route.kind == Kind::OpenAi)
        .filter_map(|route| {
            let base = format!("{}/models", route.path.base.strip_suffix("/chat/completions")?);
            let taken = routes.iter().any(|other| other.path.fits(&base));
            (!taken).then(|| plan::Route {
                name: base.as_str().into(),
                path: PathPattern { base, below: false, itself: true },
                ..route.clone()
            })
        })
        .collect();
    all.extend(routes);
    all.extend(lists);
    all
}

fn origins(written: &[Origin]) -> Origins {
    let listed = written.iter().map(|origin| match origin {
        Origin::Any => None,
        Origin::Is(origin) => Some(origin.clone()),
    });
    listed.collect::<Option<Vec<_>>>().map_or(Origins::Any, Origins::Listed)
}

/// How turns of a route flow, once the filters have set what is theirs to set.
fn flow_of(built: &[Built], limits: &file::Limits) -> Flow {
    let mut turn = Turn {
        id: TurnId::fresh(),
        session: SessionId::fresh(),
        route: "".into(),
        flow: Flow { heartbeat: limits.heartbeat.0, max_text: limits.answer_bytes.0, ..Flow::default() },
        record: Record::default(),
    };
    drop(chain(built, &mut turn));
    turn.flow
}

/// A policy to build filters with that never sign.
fn stand_in(issuer: Issuer) -> PolicyInForce {
    struct Nobody;
    impl Signer for Nobody {
        fn sign(&self, _: &Claims) -> Result<String, Unsigned> {
            Err(Unsigned::NoCurrentKey)
        }
    }
    PolicyInForce { signer: Arc::new(Nobody), issuer }
}

/// Whether Kafka takes it as the name of a topic.
fn is_topic(name: &str) -> bool {
    let is_legal = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    (1..=249).contains(&name.len()) && name.bytes().all(is_legal) && name != "." && name != ".."
}

/// Where no endpoint may be: what clouds tell their machines, secrets among it, is found at such addresses.
fn forbidden(uri: &http::Uri) -> Option<Problem> {
    let host = uri.host()?.trim_start_matches('[').trim_end_matches(']').trim_end_matches('.').to_ascii_lowercase();
    let refused = |why: &str| {
        Some(problem(format!("`{host}` {why}")).expected("the name or the address of a service").remedy("name the service itself"))
    };
    if matches!(host.as_str(), "metadata" | "metadata.google.internal" | "instance-data" | "instance-data.ec2.internal") {
        return refused("answers with the cloud's metadata");
    }
    let Ok(address) = host.parse::<IpAddr>() else {
        // 2852039166, 0xA9FEA9FE and 169.254.43518 are 169.254.169.254 to many resolvers.
        let numeric = |part: &str| {
            let (digits, hex) = match part.strip_prefix("0x") {
                Some(digits) => (digits, true),
                None => (part, false),
            };
            !digits.is_empty() && digits.bytes().all(|b| if hex { b.is_ascii_hexdigit() } else { b.is_ascii_digit() })
        };
        return if host.split('.').all(numeric) { refused("is an address in disguise") } else { None };
    };
    if may_serve(address) { None } else { refused("is a link-local, metadata or unspecified address, never a service") }
}

/// A gateway that asks itself would never stop.
fn itself(file: &File, uri: &http::Uri) -> Option<Problem> {
    let port = uri.port_u16().unwrap_or(if uri.scheme_str() == Some("https") { 443 } else { 80 });
    let address = match uri.host()?.trim_start_matches('[').trim_end_matches(']') {
        "localhost" => IpAddr::from([127, 0, 0, 1]),
        host => host.parse().ok()?,
    };
    let listen = file.listen.map(|listen| listen.0).filter(|listen| listen.port() == port && port != 0)?;
    let same = listen.ip() == address || (listen.ip().is_unspecified() && address.is_loopback());
    same.then(|| problem(format!("`{uri}` is this gateway's own address")).remedy("name the address of what should answer"))
}

/// On this machine, where nobody listens in.
fn is_near(host: &str) -> bool {
    host == "localhost" || host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}
