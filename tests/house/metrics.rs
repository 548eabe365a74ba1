//! Metrics and log lines: what the code says, docs/operate.md explains, and what deployment files use, the code says.

use std::collections::BTreeSet;

use crate::tree::{quoted, text};

/// Where metrics are made.
const MADE_IN: [&str; 2] = ["gateway/src/telemetry/meters.rs", "orchestrator/src/metrics.rs"];

pub(crate) fn is_metric(word: &str) -> bool {
    let begins = ["headgate_", "gen_ai_", "orchestrator_"].iter().any(|start| word.starts_with(start));
    begins && word.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
}

/// The names as the code registers them, without what the exposition adds.
pub(crate) fn registered() -> BTreeSet<&'static str> {
    let literals = MADE_IN.iter().flat_map(|path| {
        let code = text(path).split("#[cfg(test)]").next().unwrap_or_default();
        code.split('"').skip(1).step_by(2)
    });
    literals.filter(|word| is_metric(word)).collect()
}

/// A name as it is scraped, without what the exposition adds.
pub(crate) fn base(scraped: &str) -> &str {
    let mut name = scraped;
    for end in ["_bucket", "_count", "_sum", "_total", "_seconds"] {
        name = name.strip_suffix(end).unwrap_or(name);
    }
    name
}

#[test]
fn every_metric_is_explained_and_every_explained_metric_exists() {
    let (_, chapter) = text("docs/operate.md").split_once("\n## Metrics\n").expect("a chapter about metrics");
    let chapter = chapter.split("\n## ").next().unwrap_or(chapter);
    let rows = chapter.lines().filter_map(|line| line.strip_prefix("| `"));
    let explained: BTreeSet<&str> = rows.map(|row| base(row.split('`').next().unwrap_or_default())).collect();
    assert_eq!(explained, registered());
}

#[test]
fn every_field_of_a_turns_log_line_is_explained() {
    let code = text("gateway/src/telemetry/mod.rs");
    let line = code.split("tracing::info!(").nth(1).and_then(|rest| rest.split("\"turn ended\"").next()).expect("the line of a turn");
    let name = |line: &'static str| {
        line.trim().split([' ', ',', '=']).next().filter(|name| !name.is_empty() && !name.contains(['(', ')', ':', '}']))
    };
    let said: BTreeSet<&str> = line.lines().filter_map(name).collect();
    assert!(said.contains("end") && said.len() > 20, "{said:?}");
    let (_, chapter) = text("docs/operate.md").split_once("\n## The log line of a turn\n").expect("a chapter about the log");
    let chapter = chapter.split("\n## ").next().unwrap_or(chapter);
    let rows = chapter.lines().filter(|line| line.starts_with("| `"));
    let explained: BTreeSet<&str> = rows.flat_map(|row| quoted(row.split(" | ").next().unwrap_or_default())).collect();
    assert_eq!(explained, said);
}
