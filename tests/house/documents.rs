//! Whether documents say what is so: snippets, links, names of tests, decisions, figures of the config, paths.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use crate::tree::{ending, fenced, functions, quoted, text, texts};

#[test]
fn the_readmes_config_is_the_minimal_example() {
    let blocks = fenced(text("README.md"), "yaml");
    assert_eq!(blocks.first().copied(), Some(text("config/examples/minimal.yaml").trim_end()));
    assert!(blocks[0].lines().count() <= 15, "a moderated route takes fifteen lines at most");
    let one_line = blocks.get(1).expect("another upstream, in one line").trim();
    assert!(one_line.starts_with("chat: ") && one_line.lines().count() == 1, "{one_line}");
}

#[test]
fn every_command_of_the_readme_exists() {
    let makefile = text("Makefile");
    for (path, markdown) in ending(".md") {
        let spans = quoted(markdown).into_iter().chain(fenced(markdown, "sh").into_iter().flat_map(str::lines));
        for target in spans.filter_map(|span| span.strip_prefix("make ")) {
            let target = target.split_whitespace().next().unwrap_or_default();
            assert!(makefile.contains(&format!("\n{target}:")), "{path} says `make {target}`");
        }
    }
}

/// Where a link or a path, written in `from`, leads.
fn resolve(from: &str, link: &str) -> String {
    let mut steps: Vec<&str> = from.split('/').collect();
    steps.pop();
    for step in link.split('/') {
        match step {
            ".." => drop(steps.pop()),
            "." | "" => {}
            step => steps.push(step),
        }
    }
    steps.join("/")
}

#[test]
fn every_link_leads_somewhere() {
    let mut links = 0;
    for (path, markdown) in ending(".md") {
        for link in markdown.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let link = link.split('#').next().unwrap_or_default();
            if link.is_empty() || link.contains("://") || link.contains(' ') {
                continue;
            }
            links += 1;
            let target = resolve(path, link);
            let found = texts().keys().any(|file| *file == target || file.starts_with(&format!("{target}/")));
            assert!(found, "{path} links to {link}");
        }
    }
    assert!(links > 20, "only {links} links were looked at");
}

#[test]
fn every_document_that_code_or_prose_names_exists() {
    for (path, content) in texts().iter().filter(|(path, _)| [".rs", ".md", ".sh", ".toml", ".yaml"].iter().any(|end| path.ends_with(end)))
    {
        for start in content.match_indices("docs/").map(|(at, _)| at) {
            let named = content[start..].split(|c: char| !c.is_ascii_alphanumeric() && !"/-_.".contains(c)).next().unwrap_or_default();
            let named = named.trim_end_matches('.');
            // `NNNN` stands for a number to be.
            if named.ends_with(".md") && !named.contains("NNNN") {
                assert!(texts().contains_key(named) || texts().contains_key(&resolve(path, named)), "{path} names {named}");
            }
        }
    }
}

/// A name of several words, of the form that tests have.
fn is_sentence(word: &str) -> bool {
    word.matches('_').count() >= 3 && word.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
}

#[test]
fn every_test_that_a_promise_names_exists() {
    let functions = functions();
    for path in ["ARCHITECTURE.md", "docs/guarantees.md"] {
        let named: Vec<&str> = quoted(text(path)).into_iter().filter(|word| is_sentence(word)).collect();
        assert!(named.len() > 10, "{path} names {} tests", named.len());
        for name in named {
            assert!(functions.contains(name), "{path} says that `{name}` holds a promise");
        }
    }
}

#[test]
fn what_the_architecture_names_exists() {
    let markdown = text("ARCHITECTURE.md");
    for name in quoted(markdown) {
        let is_file = [".rs", ".md"].iter().any(|end| name.ends_with(end)) && !name.contains(['*', ' ']);
        if is_file {
            assert!(
                texts().keys().any(|path| path == name || path.ends_with(&format!("/{name}"))),
                "ARCHITECTURE.md names the file {name}"
            );
        }
        if let Some((_, method)) = name.split_once("::").filter(|(_, method)| method.chars().all(|c| c.is_ascii_lowercase() || c == '_')) {
            assert!(functions().contains(method), "ARCHITECTURE.md names {name}");
        }
    }
}

#[test]
fn decisions_are_numbered_once_and_listed() {
    let index = text("docs/decisions/README.md");
    let mut numbers = BTreeSet::new();
    let decisions = texts().iter().filter_map(|(path, text)| Some((path.strip_prefix("docs/decisions/")?, text)));
    for (file, decision) in decisions.filter(|(file, _)| *file != "README.md") {
        let number = file.split('-').next().unwrap_or_default();
        assert!(number.len() == 4 && number.parse::<u16>().is_ok(), "docs/decisions/{file} begins with no number");
        assert!(numbers.insert(number.to_owned()), "there are two decisions with the number {number}");
        assert!(index.contains(&format!("]({file})")), "docs/decisions/{file} is not in the index: run scripts/docs.sh");
        assert!(decision.starts_with("# "), "docs/decisions/{file} has no title");
    }
}

/// Folders that are of one machine, and names that only this rule may say.
#[test]
fn no_file_names_a_path_of_somebodys_machine() {
    let homes = ["home", "root", "Users", "work", "workspace", "builds"].map(|folder| format!("/{folder}/"));
    for (path, content) in texts() {
        for (number, line) in content.lines().enumerate() {
            for home in &homes {
                // After a letter it is part of a longer path or URL.
                let found = line
                    .match_indices(home.as_str())
                    .any(|(at, _)| !line[..at].ends_with(|c: char| c.is_alphanumeric() || "._-}$*~".contains(c)));
                assert!(!found, "{path}:{}: {line}", number + 1);
            }
        }
    }
}

#[test]
fn lock_files_name_no_registry_of_somebodys_own() {
    for (path, lock) in ending("package-lock.json") {
        assert!(!lock.contains("\"resolved\""), "{path} says where packages were downloaded from");
    }
    for (path, lock) in ending("Cargo.lock") {
        for source in lock.lines().filter_map(|line| line.strip_prefix("source = ")) {
            assert_eq!(source, "\"registry+https://github.com/rust-lang/crates.io-index\"", "{path}");
        }
    }
}

#[test]
fn the_table_of_limits_has_the_defaults_that_hold() {
    let schema: Value = serde_json::from_str(text("config/schema/headgate.schema.json")).expect("the config's schema");
    let default = |settings: &str, name: &str| {
        let default = &schema["$defs"][settings]["properties"][name]["default"];
        assert!(!default.is_null(), "{settings} has no setting {name} with a default");
        default.as_str().map_or_else(|| default.to_string(), str::to_owned)
    };
    let (_, table) = text("docs/operate.md").split_once("\n## Limits\n").expect("a chapter about limits");
    let mut looked_at = 0;
    for row in table.lines().filter(|line| line.starts_with("| ") && line.contains('`')) {
        let cells: Vec<&str> = row.split(" | ").collect();
        let written: Vec<&str> = cells[2].split(", ").collect();
        let defaults: Vec<String> = quoted(cells[1])
            .into_iter()
            .filter_map(|setting| match setting.split('.').collect::<Vec<_>>()[..] {
                ["limits", name] => Some(default("Limits", name)),
                ["upstreams", "*", "timeouts", name] => Some(default("Timeouts", name)),
                ["upstreams", "*", "limits", name] => Some(default("UpstreamLimits", name)),
                ["deadline"] => Some(default("CancellationSettings", "deadline")),
                ["max_buffered"] => Some(default("BackpressureSettings", "max_buffered")),
                ["cancellation" | "backpressure"] => None,
                ["max_held"] => Some("64KiB".to_owned()),
                _ => panic!("docs/operate.md has a limit that is no setting: {setting}"),
            })
            .collect();
        assert_eq!(written, defaults, "{row}");
        looked_at += 1;
    }
    assert!(looked_at > 10, "only {looked_at} limits were looked at");
}

#[test]
fn the_changelog_begins_with_the_version_of_the_workspace() {
    let manifest = text("Cargo.toml");
    let version = manifest.split("version = \"").nth(1).and_then(|rest| rest.split('"').next()).expect("a version");
    let first = text("CHANGELOG.md").lines().find_map(|line| line.strip_prefix("## ")).expect("a version");
    assert!(first.starts_with(version), "CHANGELOG.md begins with {first}, the workspace is at {version}");
}

/// Rules for prose that is read by everybody: no line so long that a diff of it cannot be read, no heading twice.
#[test]
fn headings_are_said_once_per_document() {
    for path in ["README.md", "ARCHITECTURE.md", "docs/operate.md", "docs/guarantees.md"] {
        let mut seen: BTreeMap<&str, usize> = BTreeMap::new();
        for heading in text(path).lines().filter(|line| line.starts_with("## ")) {
            *seen.entry(heading).or_default() += 1;
        }
        assert!(seen.values().all(|count| *count == 1), "{path}: {seen:?}");
    }
}
