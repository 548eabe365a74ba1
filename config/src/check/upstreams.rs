//! Upstreams: where their endpoints may be, and which of their settings do nothing.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use headgate_filters::{Problem, units::Bytes};

use super::{Check, forbidden, is_near, problem, seconds, size};
use crate::{
    file::{self, File, Protocol},
    plan,
    tree::Path,
};

impl Check<'_> {
    pub(super) fn upstreams(&mut self, file: &File, at: &Path) -> BTreeMap<String, plan::Upstream> {
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
