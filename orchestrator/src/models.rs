//! Chooses who answers: an upstream by the name of its model, or the one for every other name.

use std::collections::{HashMap, HashSet};

use headgate_upstream::Upstream;

/// The models that can answer.
///
/// Metrics tell upstreams apart by their names, so each should have its own.
#[derive(Clone)]
pub struct Models {
    any: Upstream,
    by_name: HashMap<String, Upstream>,
}

impl Models {
    /// One upstream that answers whatever model is asked for.
    pub fn new(any: Upstream) -> Models {
        Models { any, by_name: HashMap::new() }
    }

    /// With an upstream of its own for the model `name`.
    pub fn with(mut self, name: impl Into<String>, upstream: Upstream) -> Models {
        self.by_name.insert(name.into(), upstream);
        self
    }

    /// Who answers for `model`.
    pub(crate) fn choose(&self, model: Option<&str>) -> &Upstream {
        model.and_then(|name| self.by_name.get(name)).unwrap_or(&self.any)
    }

    /// All of them, each once.
    pub(crate) fn all(&self) -> impl Iterator<Item = &Upstream> {
        let mut names = HashSet::new();
        std::iter::once(&self.any).chain(self.by_name.values()).filter(move |upstream| names.insert(upstream.name()))
    }

    /// Whether some endpoint of the upstream for every other name takes turns.
    pub(crate) fn ready(&self) -> bool {
        self.any.health().iter().any(|endpoint| endpoint.ready)
    }
}
