//! What the documents say of the running program is so.

use std::{collections::BTreeSet, path::Path, time::Duration};

use headgate_testkit::{
    client::{Request, ask},
    services::Program,
};

use crate::demo::Demo;

fn document(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Whether `line` is `shown`, where `…` stands for anything.
fn is_shown(line: &str, shown: &str) -> bool {
    let mut rest = line;
    let mut parts = shown.split('…').peekable();
    let Some(first) = parts.next().and_then(|first| rest.strip_prefix(first)) else { return false };
    rest = first;
    while let Some(part) = parts.next() {
        if parts.peek().is_none() {
            return rest.ends_with(part);
        }
        let Some((_, after)) = rest.split_once(part) else { return false };
        rest = after;
    }
    rest.is_empty()
}

#[tokio::test]
async fn the_readmes_transcript_is_what_the_demo_prints() {
    let readme = document("README.md");
    let console = readme.split("\n```console\n").nth(1).and_then(|rest| rest.split("\n```").next()).expect("a transcript");
    let (command, shown) = console.split_once("| grep ^data\n").expect("a command, and the data it prints");
    let body = command.split("-d '").nth(1).and_then(|rest| rest.split('\'').next()).expect("a body");

    let demo = Demo::start(0).await;
    let request = Request::new("POST", "/v1/chat/stream").header("content-type", "application/json").bearer(&demo.token);
    let reply = ask(demo.clients, &request.body(body.to_owned())).await.expect("an answer");
    let answer = reply.text();
    let said: Vec<&str> = answer.lines().filter(|line| line.starts_with("data")).collect();
    // Where one event ends and the next begins is a matter of time; what they say together is not.
    let text = |lines: &[&str]| -> String {
        let objects = lines.iter().filter_map(|line| serde_json::from_str::<serde_json::Value>(line.strip_prefix("data: ")?).ok());
        objects.filter_map(|object| object["text"].as_str().map(str::to_owned)).collect()
    };
    let (beginning, end) = shown.trim_end().split_once("\n…\n").expect("what is left away");
    let (beginning, end): (Vec<&str>, Vec<&str>) = (beginning.lines().collect(), end.lines().collect());
    assert!(is_shown(said[0], beginning[0]), "the README shows `{}`, the demo says `{}`", beginning[0], said[0]);
    let (last, shown_last) = (said[said.len() - 1], end[end.len() - 1]);
    assert!(is_shown(last, shown_last), "the README shows `{shown_last}`, the demo says `{last}`");
    let (whole, beginning, end) = (text(&said), text(&beginning), text(&end));
    assert!(
        whole.starts_with(&beginning) && whole.ends_with(&end) && beginning.len() + end.len() <= whole.len(),
        "the demo says `{whole}`"
    );
    assert!(beginning.len() > 10 && end.len() > 10);
    assert_eq!(demo.stop().await, Some(0));
}

#[tokio::test]
async fn every_metric_of_a_running_gateway_is_explained_under_its_own_name() {
    let demo = Demo::start(0).await;
    for prompt in ["what is your email address?", "tell me a secret", "tell me about project bluebird"] {
        ask(demo.clients, &Request::turn(prompt).bearer(&demo.token)).await.expect("an answer");
    }
    let metrics = ask(demo.admin, &Request::get("/metrics")).await.expect("metrics").text();
    let operate = document("docs/operate.md");
    let mut seen = BTreeSet::new();
    for line in metrics.lines().filter(|line| !line.starts_with('#')) {
        let series = line.split(['{', ' ']).next().unwrap_or_default();
        let name = ["_bucket", "_count", "_sum"].iter().find_map(|end| series.strip_suffix(end)).unwrap_or(series);
        let row =
            operate.lines().find(|row| row.starts_with(&format!("| `{name}` |"))).unwrap_or_else(|| panic!("{name} is not explained"));
        let labels =
            line.split(['{', '}']).nth(1).into_iter().flat_map(|labels| labels.split("\",")).filter_map(|label| label.split('=').next());
        for label in labels.filter(|label| *label != "le") {
            assert!(row.contains(&format!("`{label}`")), "{name} has the label {label}, which is not explained");
        }
        seen.insert(name);
    }
    assert!(seen.len() > 20, "{seen:?}");
    assert_eq!(demo.stop().await, Some(0));
}

#[tokio::test]
async fn the_configs_of_deployments_pass_the_check() {
    let tree = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    for (config, environment) in [("compose/headgate.yaml", "staging"), ("kubernetes/config/headgate.yaml", "production")] {
        let check = Program::at(env!("CARGO_BIN_EXE_headgate"))
            .variable("MODEL_KEY", "a-key")
            .variable("HEADGATE_KEY_HASH", format!("sha256:{}", "0".repeat(64)));
        // As it is mounted: with the documents beside it.
        for document in ["constitution.md", "deny.txt"] {
            check.file(document, std::fs::read_to_string(tree.join("deploy").join(document)).expect("a document"));
        }
        let path = check.file("headgate.yaml", std::fs::read_to_string(tree.join("deploy").join(config)).expect("a config"));
        let (status, said) = check.argument("check").argument(path).arguments(["--env", environment]).run(Duration::from_secs(30)).await;
        assert!(status.success(), "deploy/{config}: {said}");
    }
}
