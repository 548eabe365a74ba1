//! Other people's clients, unchanged, against the real program: OpenAI's SDKs for Python and Node, and a WebSocket library.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use headgate_testkit::services::{Missing, OrSkip, Program};

use crate::demo::Demo;

/// Slow enough that a long answer can be stopped within it, fast enough that nobody waits.
const PACE: u32 = 200;
/// The longest that one client's visit may take.
const PATIENCE: Duration = Duration::from_secs(120);

fn tree() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn missing(what: &str) -> Missing {
    Missing { what: what.to_owned(), how: "scripts/tools.sh".to_owned() }
}

/// The Python that has other people's clients: named, or installed by scripts/tools.sh.
async fn python(module: &str) -> Result<Program, Missing> {
    let installed = tree().join(".tools/python/bin/python");
    let path = std::env::var_os("HEADGATE_PYTHON").filter(|path| !path.is_empty()).map_or(installed, PathBuf::from);
    if !path.is_file() {
        return Err(missing("a Python with other people's clients"));
    }
    let (status, _) = Program::at(&path).arguments(["-c", &format!("import {module}")]).run(PATIENCE).await;
    if status.success() { Ok(Program::at(path)) } else { Err(missing(&format!("Python's module {module}"))) }
}

/// Node, with the packages of tests/clients.
fn node() -> Result<Program, Missing> {
    if !tree().join("tests/clients/node_modules/openai").is_dir() {
        return Err(missing("the npm package openai"));
    }
    Program::find(&["node"], "HEADGATE_NODE", "scripts/tools.sh")
}

/// Runs a client's script; it must end well and say so.
async fn visit(client: Program, script: &str, url: &str, token: &str) {
    let script = tree().join("tests/clients").join(script);
    let (status, said) = client.argument(script).arguments([url, token]).run(PATIENCE).await;
    assert!(status.success() && said.contains("ok: "), "{status}\n{said}");
}

#[tokio::test]
async fn openais_python_sdk_works_unchanged() {
    let Some(client) = python("openai").await.or_skip("openais_python_sdk_works_unchanged") else { return };
    let demo = Demo::start(PACE).await;
    visit(client, "openai_sdk.py", &format!("http://{}", demo.clients), &demo.token).await;
    assert_eq!(demo.stop().await, Some(0));
}

#[tokio::test]
async fn openais_node_sdk_works_unchanged() {
    let Some(client) = node().or_skip("openais_node_sdk_works_unchanged") else { return };
    let demo = Demo::start(PACE).await;
    visit(client, "openai_sdk.mjs", &format!("http://{}", demo.clients), &demo.token).await;
    assert_eq!(demo.stop().await, Some(0));
}

#[tokio::test]
async fn a_websocket_library_runs_turns_side_by_side_and_stops_one() {
    let name = "a_websocket_library_runs_turns_side_by_side_and_stops_one";
    let Some(client) = python("websockets").await.or_skip(name) else { return };
    let demo = Demo::start(PACE).await;
    visit(client, "websocket.py", &format!("ws://{}/v1/chat/stream", demo.clients), &demo.token).await;
    assert_eq!(demo.stop().await, Some(0));
}
