//! Puts variables in: `${NAME}`, `${NAME:-default}`; `$${` is a `${` that is meant as it stands.
//!
//! It happens after YAML was read, so that a variable's value is one text whatever is in it, and never becomes settings.

use crate::{
    fault::Fault,
    tree::{Node, Path, Place, Scalar, Source, Value},
};

/// Longer values have no place in a config.
const MAX_VALUE_BYTES: usize = 64 << 10;

/// Puts variables into every scalar. Scalars that name a variable which is not set, or badly, are struck out and their paths given.
pub(crate) fn expand(root: &mut Node, sources: &[Source], vars: &dyn Fn(&str) -> Option<String>, faults: &mut Vec<Fault>) -> Vec<Path> {
    let mut bad = Vec::new();
    visit(root, &Path::root(), &mut |scalar, place, path| {
        if !scalar.text.contains("${") {
            return;
        }
        match filled(&scalar.text, vars) {
            Ok(text) => scalar.written = Some(std::mem::replace(&mut scalar.text, text)),
            Err(why) => {
                faults.push(why.fault(sources, locate(sources, place, &scalar.text, why.at), path));
                bad.push(path.clone());
            }
        }
    });
    for path in &bad {
        root.strike(path);
    }
    bad
}

fn visit(node: &mut Node, path: &Path, see: &mut impl FnMut(&mut Scalar, Place, &Path)) {
    match &mut node.value {
        Value::Scalar(scalar) => see(scalar, node.place, path),
        Value::List(list) => list.iter_mut().for_each(|(index, node)| visit(node, &path.index(*index), see)),
        Value::Map(entries) => entries.iter_mut().for_each(|(key, node)| visit(node, &path.key(&key.name), see)),
    }
}

/// Why a text cannot be filled, and at which byte of it.
struct Bad {
    at: usize,
    why: Why,
}

enum Why {
    Unset(String),
    Unclosed,
    NoName,
    TooLong(String),
}

impl Bad {
    fn fault(&self, sources: &[Source], place: Place, path: &Path) -> Fault {
        let fault = |found: String| Fault::at(sources, place, path, found);
        match &self.why {
            Why::Unset(name) => {
                fault(format!("the variable `{name}` is not set")).remedy(format!("set `{name}`, or give a default: `${{{name}:-...}}`"))
            }
            Why::Unclosed => fault("`${` without a `}`".into()).remedy("close it, or write `$${` for a `${` that is meant as it stands"),
            Why::NoName => fault("`${` without the name of a variable".into())
                .expected("`${NAME}` or `${NAME:-default}`")
                .remedy("write `$${` for a `${` that is meant as it stands"),
            Why::TooLong(name) => fault(format!("the variable `{name}` is longer than {MAX_VALUE_BYTES} bytes")),
        }
    }
}

fn filled(text: &str, vars: &dyn Fn(&str) -> Option<String>) -> Result<String, Bad> {
    let (mut out, mut rest) = (String::with_capacity(text.len()), text);
    while let Some(dollar) = rest.find('$') {
        let at = text.len() - rest.len() + dollar;
        out.push_str(&rest[..dollar]);
        rest = &rest[dollar..];
        if let Some(after) = rest.strip_prefix("$${") {
            out.push_str("${");
            rest = after;
        } else if let Some(after) = rest.strip_prefix("${") {
            let (inside, after) = after.split_once('}').ok_or(Bad { at, why: Why::Unclosed })?;
            let (name, default) = match inside.split_once(":-") {
                Some((name, default)) => (name, Some(default)),
                None => (inside, None),
            };
            let is_name = name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') && !name.starts_with(|c: char| c.is_ascii_digit());
            if name.is_empty() || !is_name {
                return Err(Bad { at, why: Why::NoName });
            }
            // As in a shell: what is set to nothing counts as not set where there is a default.
            let value = vars(name).filter(|value| default.is_none() || !value.is_empty()).or(default.map(str::to_owned));
            let value = value.ok_or_else(|| Bad { at, why: Why::Unset(name.to_owned()) })?;
            if value.len() > MAX_VALUE_BYTES {
                return Err(Bad { at, why: Why::TooLong(name.to_owned()) });
            }
            out.push_str(&value);
            rest = after;
        } else {
            out.push('$');
            rest = &rest[1..];
        }
    }
    out.push_str(rest);
    Ok(out)
}

/// The place of byte `at` of a scalar, where the scalar stands on one line as it is; else the scalar's own.
fn locate(sources: &[Source], place: Place, text: &str, at: usize) -> Place {
    let line = sources.get(place.source).and_then(|source| source.line(place.line));
    let from = line.map(|line| line.chars().skip(place.column.saturating_sub(1)).collect::<String>());
    let Some(start) = from.as_deref().and_then(|from| from.find(text)) else { return place };
    let before = from.as_deref().and_then(|from| from.get(..start + at)).map_or(0, |before| before.chars().count());
    let width = text.get(at..).map_or(1, |rest| rest.split_inclusive('}').next().unwrap_or(rest).chars().count());
    Place { column: place.column + before, width: width.max(1), ..place }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fill(text: &str) -> Result<String, usize> {
        let vars = |name: &str| match name {
            "A" => Some("1".to_owned()),
            "_b2" => Some("${A} $$ }".to_owned()),
            "EMPTY" => Some(String::new()),
            "HUGE" => Some("x".repeat(MAX_VALUE_BYTES + 1)),
            _ => None,
        };
        filled(text, &vars).map_err(|bad| bad.at)
    }

    #[test]
    fn a_variable_is_put_in_once_and_never_read_again() {
        for (text, filled) in [
            ("plain", "plain"),
            ("$ and $A and $5", "$ and $A and $5"),
            ("${A}", "1"),
            ("x${A}y${A}", "x1y1"),
            ("${_b2}", "${A} $$ }"),
            ("${EMPTY}", ""),
            ("${EMPTY:-full}", "full"),
            ("${NONE:-}", ""),
            ("${NONE:-a:-b}", "a:-b"),
            ("$${A}", "${A}"),
            ("$$${A}", "$${A}"),
            ("ä${A}ö", "ä1ö"),
        ] {
            assert_eq!(fill(text).as_deref(), Ok(filled), "{text}");
        }
    }

    #[test]
    fn a_bad_reference_is_found_at_its_first_byte() {
        for (text, at) in [("${NONE}", 0), ("ab${A", 2), ("${A}${}", 4), ("${a-b}", 0), ("${1}", 0), ("${ A }", 0), ("${HUGE}", 0)] {
            assert_eq!(fill(text), Err(at), "{text}");
        }
    }
}
