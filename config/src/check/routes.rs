//! Routes: what each asks of its filters and its upstream, and what comes of that.

use std::{cell::RefCell, collections::BTreeMap, path::Path as FilePath, sync::Arc};

use headgate_contracts::{Flow, OnDisconnect, Record, SessionId, Turn, TurnId};
use headgate_filters::{
    Built, Mode, PolicyInForce, Signer, Spec, Tools, build_chain, chain,
    units::{Bytes, Span},
};
use headgate_policy::{Claims, Issuer, Unsigned};

use super::{Check, MOST_ANSWER, MOST_BODY, forbidden, has, problem, seconds, size};
use crate::{
    effect::{Bounds, Effect, Link},
    fault::did_you_mean,
    file::{self, File, Hop, Kind, Origin, Protocol},
    plan::{self, Origins, PathPattern},
    tree::Path,
};

/// A route as it is written, and where that is.
struct Draft<'a> {
    route: &'a file::Route,
    kind: Kind,
    at: Path,
}

impl Check<'_> {
    pub(super) fn routes(
        &mut self,
        file: &File,
        upstreams: &BTreeMap<String, plan::Upstream>,
        policy: Option<&Option<plan::Policy>>,
        at: &Path,
    ) -> Vec<plan::Route> {
        let mut routes: Vec<plan::Route> = Vec::new();
        for (index, route) in file.routes.iter().enumerate() {
            let draft = Draft { route, kind: route.kind.unwrap_or_else(|| kind_of(&route.path.0)), at: at.index(index) };
            let path = pattern(&route.path.0, draft.kind);
            if let Some(earlier) = routes.iter().find(|earlier| earlier.path.covers(&path)) {
                let found = match earlier.name.as_ref() == route.path.0 {
                    true => format!("`{}` is the path of an earlier route", route.path),
                    false => format!("every request for `{}` takes the earlier route `{}`", route.path, earlier.name),
                };
                let remedy = if earlier.path == path { "remove one of the two" } else { "move this route up, or remove it" };
                self.refuse(&draft.at.key("path"), problem(found).remedy(remedy));
            }
            if let Some(route) = self.route(file, &draft, path, upstreams, policy) {
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

    fn route(
        &mut self,
        file: &File,
        draft: &Draft<'_>,
        path: PathPattern,
        upstreams: &BTreeMap<String, plan::Upstream>,
        policy: Option<&Option<plan::Policy>>,
    ) -> Option<plan::Route> {
        let &Draft { route, kind, ref at } = draft;
        self.shape_of_route(draft);
        let upstream = self.upstream_named(&route.upstream, upstreams, &at.key("upstream"));
        if let Some(upstream) = upstream {
            self.protocol_fits(draft, upstream.protocol);
        }
        let limits = self.limits_of_route(file, draft);
        let filters = at.key("filters");
        self.placement(draft);

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
        self.together(draft, upstream, &built, &flow);

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
    fn shape_of_route(&mut self, draft: &Draft<'_>) {
        let &Draft { route, kind, ref at } = draft;
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

    pub(super) fn upstream_named<'b>(
        &mut self,
        name: &str,
        upstreams: &'b BTreeMap<String, plan::Upstream>,
        at: &Path,
    ) -> Option<&'b plan::Upstream> {
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

    fn protocol_fits(&mut self, draft: &Draft<'_>, protocol: Protocol) {
        let &Draft { route, kind, ref at } = draft;
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

    fn limits_of_route(&mut self, file: &File, draft: &Draft<'_>) -> file::Limits {
        let &Draft { route, kind, ref at } = draft;
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
    fn placement(&mut self, draft: &Draft<'_>) {
        let &Draft { route, kind, ref at } = draft;
        let at = at.key("filters");
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
    fn together(&mut self, draft: &Draft<'_>, upstream: &plan::Upstream, built: &[Built], flow: &Flow) {
        let &Draft { route, kind, ref at } = draft;
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
        self.guards(draft, built);
    }

    /// What an operator should know about who watches this route.
    fn guards(&mut self, draft: &Draft<'_>, built: &[Built]) {
        let &Draft { route, kind, ref at } = draft;
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
        fn sign(&self, _: &Claims<&str>) -> Result<String, Unsigned> {
            Err(Unsigned::NoCurrentKey)
        }
    }
    PolicyInForce { signer: Arc::new(Nobody), issuer }
}
