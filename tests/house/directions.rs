//! Who imports whom: the walls of ARCHITECTURE.md, and one home for every ingredient.

use std::collections::{BTreeMap, BTreeSet};

use cargo_metadata::{DependencyKind, Metadata, MetadataCommand, Package};

use crate::tree::{ending, root, text};

/// Which of our crates a crate may import.
const OURS: [(&str, &[&str]); 9] = [
    ("contracts", &[]),
    ("policy", &["contracts"]),
    ("filters", &["contracts", "policy"]),
    ("config", &["contracts", "policy", "filters"]),
    ("upstream", &["contracts"]),
    ("store", &["policy"]),
    ("orchestrator", &["contracts", "policy", "upstream", "store"]),
    ("slm", &[]),
    ("gateway", &["contracts", "policy", "filters", "config", "upstream", "store", "orchestrator", "slm"]),
];

/// Crates that measure or judge, and ship nothing. None of ours may need one but to test.
const TOOLS: [&str; 4] = ["testkit", "benches", "loadtests", "tests"];

/// Where an ingredient may be used, in what ships. A crate that is not here has no home yet: give it one, and a record in
/// `docs/decisions`.
const HOMES: &[(&str, &[&str])] = &[
    // runtime and HTTP
    ("tokio", &["filters", "upstream", "store", "orchestrator", "slm", "gateway"]),
    ("hyper", &["upstream", "orchestrator", "slm", "gateway"]),
    ("hyper-util", &["upstream", "orchestrator", "slm", "gateway"]),
    ("http", &["contracts", "filters", "config", "upstream", "orchestrator", "slm", "gateway"]),
    ("http-body", &["upstream", "orchestrator", "slm", "gateway"]),
    ("http-body-util", &["upstream", "orchestrator", "slm", "gateway"]),
    ("httparse", &["upstream"]),
    ("httpdate", &["gateway"]),
    ("tower", &["upstream", "gateway"]),
    ("tokio-tungstenite", &["orchestrator", "gateway", "upstream"]),
    ("pingora-load-balancing", &["upstream"]),
    ("pingora-error", &["upstream"]),
    ("futures-util", &["upstream", "store", "orchestrator", "slm", "gateway"]),
    ("socket2", &["gateway"]),
    ("bytes", &["contracts", "upstream", "orchestrator", "slm", "gateway"]),
    // TLS and signatures
    ("rustls", &["upstream", "store", "gateway"]),
    ("tokio-rustls", &["upstream", "gateway"]),
    ("rustls-native-certs", &["upstream", "gateway"]),
    ("ed25519-dalek", &["policy"]),
    ("aws-lc-rs", &["policy", "filters"]),
    ("sha2", &["policy", "filters"]),
    ("base64", &["policy", "gateway"]),
    ("jsonwebtoken", &["filters"]),
    ("serde_json_canonicalizer", &["policy"]),
    ("zeroize", &["policy", "gateway"]),
    ("getrandom", &["policy", "gateway"]),
    ("subtle", &["filters"]),
    // text
    ("smallvec", &["filters", "gateway"]),
    ("aho-corasick", &["filters"]),
    ("regex-automata", &["filters"]),
    ("regex-syntax", &["filters"]),
    ("unicode-normalization", &["filters"]),
    ("strsim", &["filters", "config"]),
    ("memchr", &["contracts", "filters", "upstream"]),
    // limits and state
    ("governor", &["filters"]),
    ("quick_cache", &["filters"]),
    ("arc-swap", &["gateway"]),
    ("redis", &["store"]),
    ("rdkafka", &["orchestrator"]),
    // The event log: what it writes is on disk, and whole, before a turn is taken.
    ("rustix", &["orchestrator", "gateway"]),
    ("crc32c", &["orchestrator"]),
    // eyes
    ("tracing", &["filters", "upstream", "store", "orchestrator", "slm", "gateway"]),
    // The model's server is a program of its own, too.
    ("tracing-subscriber", &["slm", "gateway"]),
    ("opentelemetry", &["gateway"]),
    ("opentelemetry_sdk", &["gateway"]),
    ("opentelemetry-otlp", &["gateway"]),
    ("prometheus-client", &["store", "orchestrator", "gateway"]),
    // data
    ("serde", &["contracts", "policy", "filters", "config", "orchestrator", "slm", "gateway"]),
    ("serde_json", &["contracts", "policy", "filters", "config", "orchestrator", "slm", "gateway"]),
    ("granit-parser", &["config"]),
    ("schemars", &["contracts", "filters", "config"]),
    ("thiserror", &["contracts", "policy", "filters", "config", "upstream", "store", "orchestrator", "slm", "gateway"]),
    ("uuid", &["contracts", "slm"]),
    ("clap", &["slm", "gateway"]),
    ("clap_complete", &["gateway"]),
    ("notify", &["gateway"]),
    // In what ships, nowhere: these test and measure.
    ("serde-saphyr", &[]),
    ("proptest", &[]),
    ("allocation-counter", &[]),
    ("criterion", &[]),
    ("gungraun", &[]),
    ("hdrhistogram", &[]),
    ("rcgen", &[]),
    ("cargo_metadata", &[]),
    ("tempfile", &[]),
    ("libtest-mimic", &[]),
];

fn metadata() -> Metadata {
    MetadataCommand::new().manifest_path(root().join("Cargo.toml")).no_deps().exec().expect("cargo metadata")
}

/// The crates of the tree, by the folders they are in.
fn members(metadata: &Metadata) -> BTreeMap<String, &Package> {
    let folder = |package: &Package| package.manifest_path.parent().and_then(|folder| folder.file_name()).expect("a folder").to_owned();
    metadata.packages.iter().map(|package| (folder(package), package)).collect()
}

/// What a crate imports to ship, or else to test.
fn imports(package: &Package, to_test: bool) -> impl Iterator<Item = &str> {
    let kind = move |dependency: &&cargo_metadata::Dependency| (dependency.kind == DependencyKind::Development) == to_test;
    package.dependencies.iter().filter(kind).map(|dependency| dependency.name.as_str())
}

#[test]
fn our_crates_import_each_other_in_the_directions_of_the_architecture() {
    let metadata = metadata();
    let members = members(&metadata);
    let known: BTreeSet<&str> = OURS.iter().map(|(name, _)| *name).chain(TOOLS).collect();
    let found: BTreeSet<&str> = members.keys().map(String::as_str).collect();
    assert_eq!(found, known, "every crate has its place");
    for (name, may) in OURS {
        let package = members[name];
        assert_eq!(package.name.as_str(), format!("headgate-{name}"), "a crate is named after its folder");
        for import in imports(package, false).filter_map(|name| name.strip_prefix("headgate-")) {
            assert!(may.contains(&import), "{name} must not import {import}");
        }
        for import in imports(package, true).filter_map(|name| name.strip_prefix("headgate-")) {
            assert!(import != "gateway", "{name} must not need the gateway for its tests");
        }
    }
    for (name, package) in &members {
        assert!(
            name == "gateway" || imports(package, false).all(|import| import != "headgate-gateway"),
            "{name} must not import the gateway"
        );
    }
}

#[test]
fn the_judge_shares_no_code_with_what_it_judges() {
    let metadata = metadata();
    let testkit = members(&metadata)["testkit"];
    let ours: Vec<&str> = imports(testkit, false).filter(|name| name.starts_with("headgate-")).collect();
    assert!(ours.is_empty(), "testkit must not import {ours:?}");
}

#[test]
fn every_ingredient_has_a_home_and_is_used_nowhere_else() {
    let homes: BTreeMap<&str, &[&str]> = HOMES.iter().copied().collect();
    assert_eq!(homes.len(), HOMES.len(), "an ingredient is listed once");
    let metadata = metadata();
    for (name, package) in members(&metadata) {
        let is_tool = TOOLS.contains(&name.as_str());
        for import in imports(package, false).filter(|import| !import.starts_with("headgate-")) {
            let home = homes.get(import).unwrap_or_else(|| panic!("{import} has no home; {name} imports it"));
            assert!(is_tool || home.contains(&name.as_str()), "{name} must not import {import}: its home is {home:?}");
        }
        for import in imports(package, true).filter(|import| !import.starts_with("headgate-")) {
            assert!(homes.contains_key(import), "{import} has no home; {name} tests with it");
        }
    }
}

#[test]
fn every_dependency_of_the_workspace_has_a_home_and_is_used() {
    let homes: BTreeSet<&str> = HOMES.iter().map(|(name, _)| *name).collect();
    let metadata = metadata();
    let used: BTreeSet<&str> =
        metadata.packages.iter().flat_map(|package| package.dependencies.iter().map(|dependency| dependency.name.as_str())).collect();
    let manifest = text("Cargo.toml");
    let (_, table) = manifest.split_once("[workspace.dependencies]\n").expect("a table of dependencies");
    let table = table.split("\n[").next().unwrap_or(table);
    let names = table.lines().filter_map(|line| line.split_once(" = ")).map(|(name, _)| name).filter(|name| !name.starts_with('#'));
    for name in names {
        assert!(name.starts_with("headgate-") || homes.contains(name), "{name} has no home");
        assert!(used.contains(name), "nobody uses {name}");
    }
}

#[test]
fn versions_are_said_once_in_the_workspace() {
    for (path, manifest) in ending("Cargo.toml").filter(|(path, _)| path.matches('/').count() == 1) {
        let sections = manifest.split("\n[").filter(|section| section.split(']').next().is_some_and(|name| name.ends_with("dependencies")));
        for line in sections.flat_map(|section| section.lines().skip(1)).filter(|line| line.contains('=') && !line.starts_with('#')) {
            assert!(line.contains("workspace = true"), "{path}: `{line}` does not take its version from the workspace");
        }
    }
}

#[test]
fn every_crate_takes_the_lints_of_the_workspace() {
    assert!(text("Cargo.toml").contains("unsafe_code = \"forbid\""));
    let metadata = metadata();
    for name in members(&metadata).keys() {
        assert!(text(&format!("{name}/Cargo.toml")).contains("[lints]\nworkspace = true"), "{name} does not take the workspace's lints");
    }
}

#[test]
fn every_crate_says_what_it_is_for() {
    for (name, package) in members(&metadata()) {
        assert!(package.description.as_ref().is_some_and(|said| !said.is_empty()), "{name}/Cargo.toml has no description");
    }
}

/// The lines of a file that are not tests.
fn shipped<'a>(path: &str, code: &'a str) -> impl Iterator<Item = &'a str> {
    let code = if path.ends_with("/tests.rs") { "" } else { code.split("#[cfg(test)]\nmod tests").next().unwrap_or(code) };
    code.lines()
}

#[test]
fn filters_open_no_socket() {
    for (path, code) in ending(".rs").filter(|(path, _)| path.starts_with("filters/src/")) {
        for door in ["TcpStream", "TcpListener", "UdpSocket", "UnixStream", "ToSocketAddrs", "lookup_host", "tokio::net", "tokio::process"]
        {
            assert!(!code.contains(door), "{path} opens {door}");
        }
    }
}

#[test]
fn the_config_is_read_in_one_place_and_nothing_is_written() {
    for (path, code) in ending(".rs").filter(|(path, _)| path.starts_with("config/src/")) {
        let code: String = shipped(path, code).filter(|line| !line.trim_start().starts_with("//")).collect();
        for door in ["fs::write", "File::create", "TcpStream", "std::env::var"] {
            assert!(!code.contains(door), "{path} uses {door}");
        }
        assert!(path == "config/src/lib.rs" || !code.contains("std::fs"), "{path} reads files beside lib.rs");
    }
}

/// The clock is tokio's, so that tests can pause it. Programs that measure need the real one.
#[test]
fn the_clock_that_tests_can_pause_is_the_only_one() {
    for (path, code) in ending(".rs").filter(|(path, _)| {
        ["filters/src/", "gateway/src/", "upstream/src/", "store/src/", "orchestrator/src/"].iter().any(|home| path.starts_with(home))
    }) {
        assert!(shipped(path, code).all(|line| !line.contains("std::time::Instant")), "{path} reads a clock that no test can pause");
    }
}
