//! Lays an environment's file over the config: what differs between places may change, what protects people may not.

use headgate_filters::Spec;

use crate::{
    Environment,
    fault::{Fault, did_you_mean},
    tree::{Key, Node, Path, Scalar, Source, Step, Value},
};

/// What an overlay may set. `*` stands for one name that the config has too; what is below a setting goes with it.
const MAY: [&str; 33] = [
    "listen",
    "admin",
    "workers",
    "page",
    "tls",
    "limits",
    "observability",
    "drain",
    "policy.key",
    "policy.issuer",
    "policy.registry",
    "redis",
    "spool",
    "upstreams.*.endpoints",
    "upstreams.*.hop",
    "upstreams.*.authorization",
    "upstreams.*.model",
    "upstreams.*.timeouts",
    "upstreams.*.retry",
    "upstreams.*.balance",
    "upstreams.*.health",
    "upstreams.*.idle",
    "upstreams.*.limits",
    "upstreams.*.tls",
    "orchestrator.listen",
    "orchestrator.keys",
    "orchestrator.issuer",
    "orchestrator.history",
    "orchestrator.limits",
    "orchestrator.events",
    "slm.listen",
    "slm.model",
    "slm.pace",
];

/// What an overlay may set of a route, beside its filters.
const OF_A_ROUTE: [&str; 4] = ["path", "origins", "limits", "filters"];

/// Lays `over` over `base`. Both have their variables put in already.
pub(crate) fn lay(base: &mut Node, over: Node, sources: &[Source], environment: Environment, faults: &mut Vec<Fault>) {
    let mut overlay = Overlay { sources, environment, faults };
    let Value::Map(entries) = over.value else { return };
    for (key, node) in entries {
        let path = Path::root().key(&key.name);
        match key.name.as_str() {
            "routes" => overlay.routes(base, node, &path),
            _ => overlay.settings(base, key, node, &path),
        }
    }
}

struct Overlay<'a> {
    sources: &'a [Source],
    environment: Environment,
    faults: &'a mut Vec<Fault>,
}

impl Overlay<'_> {
    fn fault(&mut self, at: &Key, path: &Path, found: String, remedy: &str) {
        self.faults.push(Fault::at(self.sources, at.place, path, found).remedy(remedy));
    }

    /// Sets `key` of `base` to what stands in the overlay, where it may.
    fn settings(&mut self, base: &mut Node, key: Key, node: Node, path: &Path) {
        match may(path) {
            May::Yes => merge(base, key, node),
            May::Deeper => {
                let Value::Map(entries) = node.value else {
                    return self.fault(&key, path, "an overlay cannot replace this as a whole".into(), "name what changes, in a map");
                };
                let Value::Map(all) = &mut base.value else { return };
                let Some((_, inner)) = all.iter_mut().find(|(other, _)| other.name == key.name) else {
                    let near = did_you_mean(&key.name, all.iter().map(|(other, _)| other.name.as_str()));
                    let found = format!("`{}` is not in the config that this is laid over{near}", key.name);
                    return self.fault(&key, path, found, "add it there: an overlay changes what is there");
                };
                for (key, node) in entries {
                    let path = path.key(&key.name);
                    self.settings(inner, key, node, &path);
                }
            }
            May::No => {
                let found = format!("an overlay may not set `{}`: it must be the same everywhere", key.name);
                self.fault(&key, path, found, "set it in the config that this is laid over");
            }
        }
    }

    /// Routes are found by their path.
    fn routes(&mut self, base: &mut Node, over: Node, path: &Path) {
        let at = Key { name: "routes".into(), place: over.place };
        let Value::List(routes) = over.value else {
            return self.fault(&at, path, "routes are a list".into(), "begin each with `- path: ...`");
        };
        for (index, route) in routes {
            let path = path.index(index);
            let at = Key { name: String::new(), place: route.place };
            let Some(name) = route.get("path").and_then(Node::text).map(str::to_owned) else {
                self.fault(&at, &path, "an overlay's route needs its `path`".into(), "name the route that is changed");
                continue;
            };
            let of_base = match base.value_of("routes") {
                Some(Value::List(list)) => {
                    list.iter_mut().map(|(_, node)| node).find(|node| node.get("path").and_then(Node::text) == Some(&name))
                }
                _ => None,
            };
            let Some(of_base) = of_base else {
                self.fault(&at, &path, format!("the config has no route `{name}`"), "add it there: an overlay changes what is there");
                continue;
            };
            let Value::Map(entries) = route.value else { continue };
            for (key, node) in entries {
                let path = path.key(&key.name);
                match key.name.as_str() {
                    "path" => {}
                    "filters" => self.filters(of_base, node, &path),
                    name if OF_A_ROUTE.contains(&name) => merge(of_base, key, node),
                    name => {
                        let found = format!("an overlay may not set `{name}` of a route");
                        self.fault(&key, &path, found, "set it in the config that this is laid over");
                    }
                }
            }
        }
    }

    /// Filters are found by their name, the second of a name by the second; their order is the config's.
    fn filters(&mut self, route: &mut Node, over: Node, path: &Path) {
        let Value::List(steps) = over.value else { return };
        let mut counts: Vec<(&'static str, usize)> = Vec::new();
        for (index, step) in steps {
            let path = path.index(index);
            let at = Key { name: String::new(), place: step.place };
            let Some(name) = filter_of(&step) else {
                self.fault(&at, &path, "an overlay's step needs the name of a filter".into(), "name the filter that is changed");
                continue;
            };
            let nth = counts.iter().filter(|(other, _)| *other == name).count();
            counts.push((name, index));
            let of_base = match route.value_of("filters") {
                Some(Value::List(list)) => list.iter_mut().map(|(_, step)| step).filter(|step| filter_of(step) == Some(name)).nth(nth),
                _ => None,
            };
            let Some(of_base) = of_base else {
                let found = format!("the config's route has no `{name}` here");
                self.fault(&at, &path, found, "add it there: an overlay can neither add nor remove filters");
                continue;
            };
            let Value::Map(entries) = step.value else { continue };
            for (key, node) in entries {
                let path = path.key(&key.name);
                // `- budget:` with terms beside it only says which filter is meant.
                if key.name == name && matches!(&node.value, Value::Scalar(scalar) if scalar.is_null()) {
                    continue;
                }
                self.loosens(&key, &node, &path);
                if key.name == name && name == "moderation" {
                    // The constitution's hash is over these lists: one version of a policy has one hash.
                    let found = "an overlay may not set what `moderation` looks for: it must be the same everywhere".to_owned();
                    self.fault(
                        &key,
                        &path,
                        found,
                        "set it in the config that this is laid over; an overlay may set terms, such as `max_hold`",
                    );
                    continue;
                }
                // A filter's name alone is a step too; to take settings it must be a map.
                if let Value::Scalar(_) = &of_base.value {
                    let nothing = Scalar { text: String::new(), plain: true, written: None };
                    let empty = Node { place: of_base.place, value: Value::Scalar(nothing) };
                    of_base.value = Value::Map(vec![(Key { name: name.to_owned(), place: of_base.place }, empty)]);
                }
                merge(of_base, key, node);
            }
        }
    }

    /// In production nothing becomes less safe than the config says.
    fn loosens(&mut self, key: &Key, node: &Node, path: &Path) {
        let text = node.text().unwrap_or_default();
        let unsafe_words = [("late", "release"), ("on_fault", "pass"), ("mode", "shadow")];
        if self.environment == Environment::Production && unsafe_words.contains(&(key.name.as_str(), text)) {
            let found = format!("the overlay of production may not say `{}: {text}`", key.name);
            self.fault(key, path, found, "say it in the config that this is laid over, where everybody sees it, or remove it");
        }
    }
}

impl Node {
    fn value_of(&mut self, key: &str) -> Option<&mut Value> {
        match &mut self.value {
            Value::Map(entries) => entries.iter_mut().find(|(entry, _)| entry.name == key).map(|(_, node)| &mut node.value),
            Value::Scalar(_) | Value::List(_) => None,
        }
    }
}

/// The filter that a step names.
fn filter_of(step: &Node) -> Option<&'static str> {
    let name = |text: &str| Spec::NAMES.iter().copied().find(|name| *name == text);
    match &step.value {
        Value::Scalar(scalar) => name(&scalar.text),
        Value::Map(entries) => entries.iter().find_map(|(key, _)| name(&key.name)),
        Value::List(_) => None,
    }
}

enum May {
    Yes,
    /// Something below it.
    Deeper,
    No,
}

fn may(path: &Path) -> May {
    let names: Vec<&str> = path.0.iter().filter_map(|step| if let Step::Key(name) = step { Some(name.as_str()) } else { None }).collect();
    let mut found = May::No;
    for rule in MAY {
        let parts: Vec<&str> = rule.split('.').collect();
        let fits = parts.iter().zip(&names).all(|(part, name)| *part == "*" || part == name);
        if fits && names.len() >= parts.len() {
            return May::Yes;
        }
        if fits {
            found = May::Deeper;
        }
    }
    found
}

/// Maps are merged; everything else is replaced.
fn merge(base: &mut Node, key: Key, node: Node) {
    let Value::Map(entries) = &mut base.value else { return };
    match entries.iter_mut().find(|(other, _)| other.name == key.name) {
        None => entries.push((key, node)),
        Some((_, old)) => match (&mut old.value, node) {
            (Value::Map(_), Node { value: Value::Map(new), .. }) => new.into_iter().for_each(|(key, node)| merge(old, key, node)),
            (_, node) => *old = node,
        },
    }
}
