//! llama.cpp is the judge: on the same model file it must see the same tokens and make the same answers.
//!
//! Needs the Python package of `slm/llama_cpp/install.sh --judge`, else the tests are skipped, loudly; with
//! `HEADGATE_REQUIRE_SERVICES=1` they fail instead. `HEADGATE_WRITE_GOLDEN=1` writes the judge's answers to
//! `tests/golden.json`, by which `tests/golden.rs` judges where there is no Python.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;

use headgate_slm::{Id, Slm};
use libtest_mimic::{Arguments, Failed, Trial};
use serde_json::{Value, json};

#[allow(dead_code, reason = "shared by the test programs, each of which uses a part")]
mod support;
use support::{ANSWER_TOKENS_MAX, get, greedy, post};

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let python = python();
    let is_required = std::env::var_os("HEADGATE_REQUIRE_SERVICES").is_some_and(|v| v == "1");
    let is_skipped = python.is_none() && !is_required;
    if is_skipped {
        eprintln!("SKIPPED: llama.cpp does not judge the model here; run slm/llama_cpp/install.sh --judge");
    }
    let trial = |name: &str, test: fn(SocketAddr, &Arc<Slm>) -> Result<(), Failed>| {
        let python = python.clone();
        Trial::test(name, move || {
            let python = python.ok_or("xllamacpp is not installed, and HEADGATE_REQUIRE_SERVICES=1 asks for it")?;
            let judge = Judge::start(&python)?;
            test(judge.address, &Arc::new(Slm::embedded()))
        })
        .with_ignored_flag(is_skipped)
    };
    let trials = vec![
        trial("any_text_has_the_tokens_it_has_in_llama_cpp", any_text_has_the_same_tokens),
        trial("prompts_and_greedy_answers_are_those_of_llama_cpp", prompts_and_answers_are_the_same),
    ];
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// The first Python that has the judge.
fn python() -> Option<PathBuf> {
    let installed = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.tools/llama-cpp/bin/python");
    let candidates = std::env::var_os("HEADGATE_PYTHON").map(PathBuf::from).into_iter().chain([installed, PathBuf::from("python3")]);
    candidates.into_iter().find(|python| {
        let import = Command::new(python).args(["-c", "import xllamacpp"]).stdout(Stdio::null()).stderr(Stdio::null()).status();
        import.is_ok_and(|s| s.success())
    })
}

/// llama.cpp's server on the embedded model; stopped when dropped.
struct Judge {
    process: Child,
    address: SocketAddr,
}

impl Judge {
    fn start(python: &Path) -> Result<Self, Failed> {
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        let mut process = Command::new(python)
            .arg(here.join("llama_cpp/serve.py"))
            .args(["--port", "0", "--turns", "1", "--model"])
            .arg(here.join("model/demo-q8.gguf"))
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let lines = BufReader::new(process.stdout.take().ok_or("no output")?).lines();
        let mut judge = Self { process, address: ([127, 0, 0, 1], 0).into() };
        let line = lines.map_while(Result::ok).find_map(|l| l.strip_prefix("listening http://").map(str::to_owned));
        judge.address = line.ok_or("llama.cpp ended before it listened")?.parse()?;
        block_on(async {
            // Listening is not ready: it answers 503 while the model is loaded.
            while !get(judge.address, "/health").await.status.is_success() {
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
        });
        Ok(judge)
    }
}

impl Drop for Judge {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime").block_on(future)
}

fn ids(value: &Value) -> Vec<Id> {
    value
        .as_array()
        .expect("a list of tokens")
        .iter()
        .map(|id| id.as_u64().and_then(|id| Id::try_from(id).ok()).expect("a token"))
        .collect()
}

fn any_text_has_the_same_tokens(judge: SocketAddr, slm: &Arc<Slm>) -> Result<(), Failed> {
    let parts = [
        "order",
        " ",
        "  ",
        "\n",
        "\t",
        "é",
        "ü",
        "e\u{301}",
        "€",
        "😀",
        "👩‍👩‍👧",
        "#4711",
        "1111",
        "support@example.com",
        "ß",
        "中文",
        "\u{2581}",
        "<|im",
        "The",
        " the",
        "'",
        "\u{202e}",
        "ﬁ",
        "\0",
    ];
    // A fixed sequence (the constants are Knuth's), so that a failure can be run again.
    let mut random = 1u64;
    let texts = (0..300).map(|_| {
        let mut text = String::new();
        loop {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            match parts.get((random >> 33) as usize % (parts.len() + 2)) {
                Some(part) => text.push_str(part),
                None => return text,
            }
        }
    });
    block_on(async {
        for text in texts {
            let theirs =
                post(judge, "/tokenize", &json!({"content": text, "add_special": false, "parse_special": false})).await.json().await;
            let (ours, theirs) = (slm.encode(&text), ids(&theirs["tokens"]));
            if ours != theirs {
                return Err(format!("{text:?}: {ours:?} here, {theirs:?} there").into());
            }
        }
        Ok(())
    })
}

fn prompts_and_answers_are_the_same(judge: SocketAddr, slm: &Arc<Slm>) -> Result<(), Failed> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden.json");
    let mut golden: Vec<Value> = serde_json::from_str(&std::fs::read_to_string(&path)?)?;
    block_on(async {
        for entry in &mut golden {
            let messages = entry["messages"].clone();
            let template = post(judge, "/apply-template", &json!({"messages": messages})).await.json().await;
            let prompt = json!({"content": template["prompt"], "add_special": true, "parse_special": true});
            let prompt = ids(&post(judge, "/tokenize", &prompt).await.json().await["tokens"]);
            let asked =
                json!({"prompt": prompt, "n_predict": ANSWER_TOKENS_MAX, "temperature": 0, "return_tokens": true, "cache_prompt": false});
            let answer = post(judge, "/completion", &asked).await.json().await;
            let is_whole = answer["stop_type"] == "eos";
            let mut answer = ids(&answer["tokens"]);
            if is_whole {
                // llama.cpp lists the token that ended the answer; we do not.
                answer.pop();
            }
            let theirs = (prompt, answer);
            let ours = greedy(slm, &messages);
            if ours != theirs {
                return Err(format!("{messages}: {ours:?} here, {theirs:?} there").into());
            }
            entry["prompt_ids"] = json!(theirs.0);
            entry["answer_ids"] = json!(theirs.1);
        }
        Ok::<_, Failed>(())
    })?;
    if std::env::var_os("HEADGATE_WRITE_GOLDEN").is_some() {
        let lines: Vec<String> = golden.iter().map(|g| format!("  {g}")).collect();
        std::fs::write(&path, format!("[\n{}\n]\n", lines.join(",\n")))?;
    }
    Ok(())
}
