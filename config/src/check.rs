//! Judges settings together: what is inert, contradictory or out of bounds is a fault; the rest becomes the plan.

mod orchestrator;
mod policy;
mod routes;
mod upstreams;

use std::{
    collections::{BTreeSet, HashSet},
    fmt::Display,
    io,
    net::{IpAddr, SocketAddr},
    ops::RangeInclusive,
    path::Path as FilePath,
    sync::Arc,
    time::Duration,
};

use headgate_contracts::{Secret, may_serve};
use headgate_filters::{
    Problem, Step,
    units::{Bytes, Span},
};

use crate::{
    Disk, Environment,
    fault::Fault,
    file::{self, AdminListen, File},
    plan::{self, Plan},
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
                Some((scheme, _)) if scheme.contains("sentinel") || scheme.contains("cluster") => {
                    problem("Sentinel and Cluster are not spoken")
                        .expected(expected)
                        .remedy("name one Redis, or a name or proxy that leads to the one that takes writes")
                }
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
            Some(ca) => Some(self.text(&at_ca, ca, "the certificates to trust")?),
        };
        Some(plan::Redis { url, ca, budget: redis.budget.0 })
    }

    /// A folder that will be made where it is not there; one could be called `example`.
    fn folder(&mut self, folder: &FilePath, at: &Path, example: &str) -> std::path::PathBuf {
        if folder.as_os_str().is_empty() {
            self.refuse(at, problem("no folder").expected(format!("a path, such as `{example}` or `/var/lib/headgate/{example}`")));
        }
        self.disk.files.resolve(folder)
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

/// On this machine, where nobody listens in.
fn is_near(host: &str) -> bool {
    host == "localhost" || host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}
