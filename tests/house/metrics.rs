//! Metrics and log lines: what the code says, docs/operate.md explains, and what deployment files use, the code says.

use std::collections::BTreeSet;

use crate::tree::{ending, quoted, text};

/// Code that makes metrics: everything in the shipped programs that knows the library for them.
fn makers() -> impl Iterator<Item = &'static str> {
    let shipped = |path: &str| {
        ["gateway/src/", "orchestrator/src/", "store/src/"].iter().any(|home| path.starts_with(home)) && !path.ends_with("/tests.rs")
    };
    let code = ending(".rs").filter(move |(path, code)| shipped(path) && code.contains("prometheus_client"));
    code.map(|(_, code)| code.split("#[cfg(test)]\nmod tests").next().unwrap_or(code))
}

pub(crate) fn is_metric(word: &str) -> bool {
    let begins = ["headgate_", "gen_ai_", "orchestrator_"].iter().any(|start| word.starts_with(start));
    begins && word.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
}

/// The names as the code registers them, without what the exposition adds.
pub(crate) fn registered() -> BTreeSet<&'static str> {
    makers().flat_map(|code| code.split('"').skip(1).step_by(2)).filter(|word| is_metric(word)).map(base).collect()
}

/// A name as it is scraped, without what the exposition adds.
pub(crate) fn base(scraped: &str) -> &str {
    let mut name = scraped;
    for end in ["_bucket", "_count", "_sum", "_total", "_seconds", "_bytes"] {
        name = name.strip_suffix(end).unwrap_or(name);
    }
    name
}

#[test]
fn every_metric_is_explained_and_every_explained_metric_exists() {
    let operate = text("docs/operate.md");
    let names = |chapter: &'static str| -> BTreeSet<&'static str> {
        let rows = chapter.lines().filter_map(|line| line.strip_prefix("| `")).filter_map(|row| row.split('`').next());
        rows.filter(|name| is_metric(name)).map(base).collect()
    };
    let registered = registered();
    assert!(registered.len() > 20, "{registered:?}");
    let missing: Vec<_> = registered.difference(&names(operate)).copied().collect();
    assert!(missing.is_empty(), "docs/operate.md does not explain {missing:?}");
    let (_, chapter) = operate.split_once("\n## Metrics\n").expect("a chapter about metrics");
    let chapter = names(chapter.split("\n## ").next().unwrap_or(chapter));
    let invented: Vec<_> = chapter.difference(&registered).copied().collect();
    assert!(invented.is_empty(), "docs/operate.md explains what does not exist: {invented:?}");
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
