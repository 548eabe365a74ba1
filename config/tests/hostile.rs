//! Whatever is in the file, reading it neither panics nor takes long, and nothing secret is shown.

use std::{
    fs::{self, File},
    path::Path,
    time::{Duration, Instant},
};

use headgate_config::{Environment, Faults, MAX_BYTES, Plan};
use proptest::prelude::*;

const EVERYTHING: &str = include_str!("../examples/everything.yaml");

fn parse(text: &str) -> Result<Plan, Faults> {
    headgate_config::parse("test.yaml", text, Path::new("examples"), Some(Environment::Staging), &|name| {
        (name == "SET").then(|| "a-secret-value".to_owned())
    })
}

/// Every fault has a place within the text, and nothing that a terminal would act upon.
fn judged(text: &str) {
    let Err(faults) = parse(text) else { return };
    assert!(faults.errors() > 0);
    for fault in &faults.0 {
        assert!(fault.line <= text.lines().count().max(1) + 1, "{fault}");
        let shown = fault.to_string();
        assert!(!shown.contains(|c: char| c.is_control() && c != '\n'), "{shown:?}");
        assert!(shown.len() < 20_000, "{}", shown.len());
    }
    serde_json::to_string(&faults.to_json()).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn any_text_is_judged(text in "(\\PC|[\n :\\-\\[\\]{}&*!|>'\"%@`#,?$~\t]){0,200}") {
        judged(&text);
    }

    #[test]
    fn any_bytes_are_judged(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("headgate.yaml");
        fs::write(&path, &bytes).unwrap();
        prop_assert!(headgate_config::load(&path, None, &|_| None).is_err());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    #[test]
    fn any_change_of_a_good_config_is_judged(
        changes in prop::collection::vec((any::<prop::sample::Index>(), 0..12_usize, "[ -~]{0,12}|\\PC{0,3}|\n[ ]{0,12}"), 1..6)
    ) {
        let mut text: Vec<char> = EVERYTHING.chars().collect();
        for (at, gone, put) in &changes {
            let at = at.index(text.len());
            let end = (at + gone).min(text.len());
            text.splice(at..end, put.chars());
        }
        judged(&text.iter().collect::<String>());
    }

    #[test]
    fn lines_in_any_order_are_judged(
        moves in prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>()), 1..6)
    ) {
        let mut lines: Vec<&str> = EVERYTHING.lines().collect();
        for (from, to) in &moves {
            let line = lines.remove(from.index(lines.len()));
            lines.insert(to.index(lines.len()), line);
        }
        judged(&lines.join("\n"));
    }

    #[test]
    fn a_variable_is_one_text_whatever_is_in_it(value in "\\PC{0,40}|[\n:\\-\\[\\]{}#\"']{0,20}") {
        let text = "listen: 127.0.0.1:8080\npage: true\nobservability: { level: \"${LEVEL}\" }\n";
        let plan = headgate_config::parse("test.yaml", text, Path::new("."), None, &|_| Some(value.clone()));
        // Nothing at all is nothing; every other value is the level and nothing else.
        if !value.is_empty() {
            prop_assert_eq!(plan.unwrap().observability.level, value);
        }
    }
}

#[test]
fn a_huge_file_is_refused_without_being_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("headgate.yaml");
    File::create(&path).unwrap().set_len(100 << 20).unwrap();
    let begun = Instant::now();
    let faults = headgate_config::load(&path, None, &|_| None).unwrap_err();
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    assert!(faults.to_string().contains("larger than 1024 KiB"), "{faults}");
    let faults = parse(&"#".repeat(MAX_BYTES + 1)).unwrap_err();
    assert!(faults.to_string().contains("larger than 1024 KiB"), "{faults}");
}

#[test]
fn a_missing_file_and_one_that_is_no_text_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("headgate.yaml");
    let told = || headgate_config::load(&path, None, &|_| None).unwrap_err().to_string();
    assert!(told().contains("cannot read the config") && told().contains("headgate.yaml"), "{}", told());
    fs::write(&path, b"listen: 127.0.0.1:80\nadmin: \xff\n").unwrap();
    assert!(told().contains("line 2 is not UTF-8"), "{}", told());
    fs::write(&path, "\u{feff}page: 7\r\n").unwrap();
    assert!(told().contains("1:7"), "{}", told());
}

#[test]
fn a_megabyte_of_anything_is_judged_in_seconds() {
    let routes: String = (0..25_000).map(|n| format!("- {{ path: /{n}, upstream: a }}\n")).collect();
    let keys: String = (0..40_000).map(|n| format!("k{n}: 1\n")).collect();
    for text in [
        format!("routes:\n{routes}"),
        keys,
        "[".repeat(MAX_BYTES),
        "{a: ".repeat(MAX_BYTES / 4),
        "- ".repeat(MAX_BYTES / 2),
        format!("listen: {}", "x".repeat(MAX_BYTES - 20)),
        format!("listen: \"{}\"", "${".repeat(MAX_BYTES / 2 - 20)),
        format!("a: &a {}\nb: [{}]", "x".repeat(1000), "*a, ".repeat(200_000)),
        "? ".repeat(MAX_BYTES / 2),
        "|\n".repeat(MAX_BYTES / 2),
    ] {
        let begun = Instant::now();
        judged(&text);
        assert!(begun.elapsed() < Duration::from_secs(20), "{:?} for {:?}...", begun.elapsed(), &text[..40]);
    }
}

#[test]
fn nothing_secret_is_shown() {
    let text = r#"
listen: 127.0.0.1:8080
upstreams:
  model: { protocol: openai, endpoints: [http://127.0.0.1:1], authorization: "${SET}" }
routes:
  - path: /v1/chat/stream
    upstream: model
    filters: [moderation: { deny: [{ phrase: a forbidden phrase }] }]
"#;
    let plan = parse(text).unwrap();
    assert_eq!(plan.upstreams["model"].authorization.as_ref().unwrap().expose(), "a-secret-value");
    let shown = format!("{plan:?}{}{}", plan.summary(), plan.summary().to_json());
    assert!(!shown.contains("a-secret-value") && !shown.contains("forbidden"), "{shown}");
    // Where a secret stands in a wrong place, the variable is shown and not its value.
    for wrong in ["protocol: \"${SET}\"", "timeouts: { idle: \"${SET}\" }", "endpoints: [\"${SET}\"]", "model: [\"${SET}\"]"] {
        let bad = text.replace("authorization: \"${SET}\"", wrong).replace("endpoints: [http://127.0.0.1:1], endpoints", "endpoints");
        let bad = if wrong.starts_with("protocol") { bad.replace("protocol: openai, ", "") } else { bad };
        let faults = parse(&bad).unwrap_err();
        assert!(!format!("{faults}{}", faults.to_json()).contains("a-secret-value"), "{faults}");
    }
}
