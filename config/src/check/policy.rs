//! The policy in force: its constitution, its signing key, and where its versions come from.

use headgate_filters::{Spec, moderation};
use headgate_policy::{Constitution, Issuer, Verifier};

use super::{Check, problem};
use crate::{
    file::{self, File, SigningKey},
    plan::{self, PolicyKey},
    tree::Path,
};

impl Check<'_> {
    /// `None`: there is a section, but nothing can be told from it.
    pub(super) fn policy(&mut self, file: &File, at: &Path) -> Option<Option<plan::Policy>> {
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
}
