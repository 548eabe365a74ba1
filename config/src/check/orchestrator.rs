//! The orchestrator: whose verdicts it believes, what it keeps and for how long, and who is told.

use std::{collections::BTreeMap, path::Path as FilePath, time::Duration};

use headgate_contracts::OnDisconnect;
use headgate_filters::{
    auth::AdminTerms,
    units::{Bytes, Span},
};
use headgate_policy::{PUBLISH_AHEAD, Verifier};

use super::{Check, MOST_ANSWER, MOST_BODY, forbidden, has, problem, seconds, size};
use crate::{
    file::{self, Endpoint, File, Over, Protocol},
    plan,
    tree::Path,
};

impl Check<'_> {
    pub(super) fn orchestrator(
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
                let found = format!(
                    "on `{name}` a client may come back for its answer after {time}, when it would be written already that nobody knows what it got"
                );
                self.refuse(
                    &at.key("events").key("unknown_after"),
                    problem(found)
                        .expected(format!("more than {time}"))
                        .remedy("raise `unknown_after`, or shorten the route's `on_disconnect`"),
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

    fn broker_tls(&mut self, tls: &file::BrokerTls, at: &Path) -> Option<plan::BrokerTls> {
        let mut named = |name, path: &Option<std::path::PathBuf>, what| match path {
            Some(path) => self.names(&at.key(name), path, what).map(Some),
            None => Some(None),
        };
        let (ca, certificate) =
            (named("ca", &tls.ca, "the certificates to trust"), named("certificate", &tls.certificate, "the certificate"));
        let own = match (certificate?, named("key", &tls.key, "the key")?) {
            (Some(certificate), Some(key)) => Some((certificate, key)),
            (None, None) => None,
            (certificate, _) => {
                let (there, missing) = if certificate.is_some() { ("certificate", "key") } else { ("key", "certificate") };
                self.refuse(
                    &at.key(there),
                    problem(format!("there is no `{missing}`")).remedy(format!("add `{missing}`, or remove `{there}`")),
                );
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
}

/// Whether Kafka takes it as the name of a topic.
fn is_topic(name: &str) -> bool {
    let is_legal = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    (1..=249).contains(&name.len()) && name.bytes().all(is_legal) && name != "." && name != ".."
}
