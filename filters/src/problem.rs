//! What is wrong with settings: where, what was found, what would do, and the remedy.

use std::fmt;

/// One fault of a step's settings. All of them are collected and shown at once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Where in the step or chain, e.g. `moderation.mask[0]` or `[2].max_hold`.
    pub at: String,
    /// What stands there, e.g. "`emial` is no detector".
    pub found: String,
    /// What could stand there.
    pub expected: String,
    /// What to do about it.
    pub remedy: String,
}

impl Problem {
    /// A problem with what stands at `at`.
    pub fn new(at: impl Into<String>, found: impl Into<String>) -> Problem {
        Problem { at: at.into(), found: found.into(), expected: String::new(), remedy: String::new() }
    }

    /// With what could stand there.
    pub fn expected(mut self, expected: impl Into<String>) -> Problem {
        self.expected = expected.into();
        self
    }

    /// With what to do about it.
    pub fn remedy(mut self, remedy: impl Into<String>) -> Problem {
        self.remedy = remedy.into();
        self
    }

    /// The same problem, seen from further out: `path` and the place within it. A place that begins with `[` follows
    /// without a dot.
    pub fn within(mut self, path: &str) -> Problem {
        self.at = match self.at.as_str() {
            "" => path.to_owned(),
            at if at.starts_with('[') || path.is_empty() => format!("{path}{at}"),
            at => format!("{path}.{at}"),
        };
        self
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.at, self.found)?;
        if !self.expected.is_empty() {
            write!(f, "; expected {}", self.expected)?;
        }
        if !self.remedy.is_empty() {
            write!(f, "; {}", self.remedy)?;
        }
        Ok(())
    }
}

/// ", did you mean `x`?" where one of `names` is near `found`, else nothing.
pub(crate) fn did_you_mean<'a>(found: &str, names: impl IntoIterator<Item = &'a str>) -> String {
    let near = names.into_iter().map(|name| (strsim::damerau_levenshtein(found, name), name)).min();
    match near {
        Some((distance, name)) if distance <= name.len().div_ceil(3) => format!(", did you mean `{name}`?"),
        _ => String::new(),
    }
}
