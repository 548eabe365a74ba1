//! What is wrong with a config: where, what was found, what would do, and the remedy; for people and for machines.

use std::fmt;

use serde::Serialize;

use crate::tree::{Path, Place, Source};

/// The most faults that are collected. Whoever has more will read again after mending these.
pub(crate) const MOST: usize = 50;

/// How bad a fault is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// The config is refused.
    Error,
    /// The config is taken; this is what an operator should know about it.
    Warning,
}

/// One thing that is wrong with a config.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Fault {
    /// How bad it is.
    pub severity: Severity,
    /// The file, as it was named.
    pub file: String,
    /// Counted from 1; 0 where no line can be named.
    pub line: usize,
    /// Counted from 1, in characters.
    pub column: usize,
    /// The setting, e.g. `routes[0].filters[2].max_hold`; empty for the file as a whole.
    pub path: String,
    /// What stands there. Never the value of a variable or of a secret.
    pub found: String,
    /// What could stand there; may be empty.
    pub expected: String,
    /// What to do; may be empty.
    pub remedy: String,
    /// The line, fit for a terminal, and how many characters to underline.
    #[serde(skip)]
    shown: Option<(String, usize)>,
}

impl Fault {
    /// A fault of a whole file: it cannot be read, it is too large.
    pub(crate) fn of_file(file: &str, found: impl Into<String>) -> Fault {
        Fault {
            severity: Severity::Error,
            file: file.to_owned(),
            line: 0,
            column: 0,
            path: String::new(),
            found: told(found.into()),
            expected: String::new(),
            remedy: String::new(),
            shown: None,
        }
    }

    /// A fault at a place of one of `sources`.
    pub(crate) fn at(sources: &[Source], place: Place, path: &Path, found: impl Into<String>) -> Fault {
        let mut fault = Fault::of_file("", found);
        if let Some(source) = sources.get(place.source) {
            fault.file = source.name.clone();
            fault.shown = source.line(place.line).map(|line| snippet(line, place));
        }
        Fault { line: place.line, column: place.column, path: path.to_string(), ..fault }
    }

    pub(crate) fn expected(mut self, expected: impl Into<String>) -> Fault {
        self.expected = told(expected.into());
        self
    }

    pub(crate) fn remedy(mut self, remedy: impl Into<String>) -> Fault {
        self.remedy = told(remedy.into());
        self
    }

    pub(crate) fn warning(mut self) -> Fault {
        self.severity = Severity::Warning;
        self
    }

    pub(crate) fn is_error(&self) -> bool {
        self.severity == Severity::Error
    }
}

/// The most characters of a line, and of what was found, that are shown.
const WIDEST: usize = 160;
const LONGEST: usize = 600;

/// A line without what a terminal would act upon, and how much of it to underline.
fn snippet(line: &str, place: Place) -> (String, usize) {
    let shown: String = masked(line).chars().take(WIDEST).map(|c| if c.is_control() { ' ' } else { c }).collect();
    let left = shown.chars().count().saturating_sub(place.column.saturating_sub(1));
    (shown, place.width.clamp(1, left.max(1)))
}

/// The line with dots for what may be a secret, whatever the fault is about: as many as it had characters.
fn masked(line: &str) -> String {
    let mut masked = line.to_owned();
    for (name, is_secret) in
        [("authorization:", is_no_reference as fn(&str) -> bool), ("password:", is_no_reference), ("key:", looks_like_a_key)]
    {
        for at in line.match_indices(name).map(|(at, _)| at + name.len()) {
            let rest = &line[at..];
            let start = at + rest.len() - rest.trim_start_matches([' ', '"', '\'']).len();
            let end = line[start..].find(['"', '\'', ',', '}', ' ']).map_or(line.len(), |end| start + end);
            // A secret with spaces goes to the end of its quotes or of the line.
            let end = if name != "key:" { line[start..].find(['"', '\'', ',', '}']).map_or(line.len(), |end| start + end) } else { end };
            cover(&mut masked, line, start, end, is_secret);
        }
    }
    for (at, _) in line.match_indices("://") {
        let start = at + 3;
        let end = line[start..].find(['/', '"', '\'', ',', ']', ' ']).map_or(line.len(), |end| start + end);
        if let Some(user) = line.get(start..end).and_then(|authority| authority.rfind('@')) {
            cover(&mut masked, line, start, start + user, |_| true);
        }
    }
    masked
}

/// Puts dots over a part of `line`. Dots are as wide as what they cover in characters, not in bytes, so parts are found anew.
fn cover(masked: &mut String, line: &str, start: usize, end: usize, is_secret: impl Fn(&str) -> bool) {
    let Some(part) = line.get(start..end).filter(|part| !part.is_empty() && is_secret(part)) else { return };
    let (before, width) = (line[..start].chars().count(), part.chars().count());
    *masked = masked.chars().enumerate().map(|(at, c)| if (before..before + width).contains(&at) { '•' } else { c }).collect();
}

fn is_no_reference(text: &str) -> bool {
    !text.starts_with("${") && !text.starts_with("file:")
}

/// Not a reference, a hash, a word or the name of a file.
fn looks_like_a_key(text: &str) -> bool {
    let ending = text.rsplit_once('.').is_some_and(|(_, ending)| (1..=5).contains(&ending.len()));
    is_no_reference(text) && !text.starts_with("sha256:") && !ending && text.len() > 12
}

/// What was found, in one line that a terminal can show.
fn told(found: String) -> String {
    let cut = found.chars().count() > LONGEST;
    if !cut && !found.contains(char::is_control) {
        return found;
    }
    let mut told: String = found.chars().take(LONGEST).map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect();
    if cut {
        told.push('…');
    }
    told
}

impl fmt::Display for Fault {
    /// As compilers do: the fault, the place, the line, then what would do and the remedy.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = match self.severity {
            Severity::Error => "error",
            Severity::Warning => "warning",
        };
        write!(f, "{word}: {}", self.found)?;
        let gutter = self.line.to_string();
        let gap = " ".repeat(gutter.len());
        if self.line > 0 {
            write!(f, "\n{gap}--> {}:{}:{}", self.file, self.line, self.column)?;
        } else {
            write!(f, "\n{gap}--> {}", self.file)?;
        }
        if !self.path.is_empty() {
            write!(f, " at {}", self.path)?;
        }
        if let Some((line, width)) = &self.shown {
            write!(f, "\n{gap} |\n{gutter} | {line}\n{gap} | {}{}", " ".repeat(self.column.saturating_sub(1)), "^".repeat(*width))?;
        }
        for (word, text) in [("expected", &self.expected), ("remedy", &self.remedy)] {
            if !text.is_empty() {
                write!(f, "\n{gap} = {word}: {text}")?;
            }
        }
        Ok(())
    }
}

/// Everything that is wrong with a config, in the order of its lines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Faults(pub Vec<Fault>);

impl Faults {
    pub(crate) fn one(fault: Fault) -> Faults {
        Faults(vec![fault])
    }

    /// How many of them are errors.
    pub fn errors(&self) -> usize {
        self.0.iter().filter(|fault| fault.is_error()).count()
    }

    /// The faults as one JSON object: `{"ok": false, "faults": [...]}`.
    pub fn to_json(&self) -> serde_json::Value {
        serde_json::json!({ "ok": self.errors() == 0, "faults": self.0 })
    }
}

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for fault in &self.0 {
            write!(f, "{fault}\n\n")?;
        }
        match self.errors() {
            1 => f.write_str("1 error"),
            MOST.. => write!(f, "{MOST} errors, and perhaps more"),
            many => write!(f, "{many} errors"),
        }
    }
}

impl std::error::Error for Faults {}

/// ", did you mean `x`?" where one of `names` is near `found`, else nothing.
pub(crate) fn did_you_mean<'a>(found: &str, names: impl IntoIterator<Item = &'a str>) -> String {
    let near = names.into_iter().map(|name| (distance(found, name), name)).min();
    match near {
        Some((distance, name)) if distance <= name.chars().count().div_ceil(3) => format!(", did you mean `{name}`?"),
        _ => String::new(),
    }
}

/// Letters to insert, remove, replace or swap with a neighbour. Long names are not compared: nobody mistypes those by a letter.
fn distance(a: &str, b: &str) -> usize {
    if a.len() > 64 || b.len() > 64 { usize::MAX } else { strsim::osa_distance(a, b) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_be_a_secret_is_covered_and_nothing_else() {
        for (line, shown) in [
            ("authorization: sk-live-1", "authorization: •••••••••"),
            ("a: { authorization: \"Basic ab cd\", model: x }", "a: { authorization: \"•••••••••••\", model: x }"),
            ("authorization: ${MODEL_KEY}", "authorization: ${MODEL_KEY}"),
            ("authorization: \"${MODEL_KEY}\"", "authorization: \"${MODEL_KEY}\""),
            ("authorization: file:secrets/key", "authorization: file:secrets/key"),
            ("sasl: { username: me, password: a-secret, over: tls }", "sasl: { username: me, password: ••••••••, over: tls }"),
            ("- key: hg_0123456789abcdef", "- key: •••••••••••••••••••"),
            ("- key: sha256:0123456789abcdef", "- key: sha256:0123456789abcdef"),
            ("key: certificates/gateway.key", "key: certificates/gateway.key"),
            ("key: generated", "key: generated"),
            ("- http://me:secret@host/a@b", "- http://•••••••••@host/a@b"),
            ("- http://host/a@b", "- http://host/a@b"),
            ("é authorization: ü", "é authorization: •"),
        ] {
            assert_eq!(masked(line), shown);
        }
    }

    #[test]
    fn a_near_name_is_proposed_and_a_far_one_is_not() {
        let names = ["upstream", "filters"];
        assert_eq!(did_you_mean("upstrem", names), ", did you mean `upstream`?");
        assert_eq!(did_you_mean("fitlers", names), ", did you mean `filters`?");
        assert_eq!(did_you_mean("workers", names), "");
        assert_eq!(did_you_mean(&"u".repeat(1000), names), "");
    }
}
