//! Configs exchanged while streams run, bad ones refused, and what the command line says about them.

use std::{
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use headgate_gateway::reload;
use headgate_testkit::{
    answer::Kind,
    client::{Request, ask, stream},
    dialect::{Answer, Cut},
    services::{Program, Ready, Signal, free_addr},
    upstream::{Script, Upstream},
    within,
};
use tokio::sync::Notify;

use crate::support::Setup;

const SOON: Duration = Duration::from_secs(10);
const SAID: [&str; 2] = ["Hello, ", "bob@example.com."];

/// Waits until the metric says that so many reloads came to `result`.
async fn reloaded(admin: std::net::SocketAddr, result: &str, count: u64) {
    let line = format!("headgate_config_reload_total{{result=\"{result}\"}} {count}");
    let seen = async {
        while !ask(admin, &Request::get("/metrics")).await.is_ok_and(|reply| reply.text().contains(&line)) {
            tokio::task::yield_now().await;
        }
    };
    within(SOON, seen, &line).await;
}

#[tokio::test]
async fn a_changed_file_is_taken_for_the_next_turn_and_a_bad_one_never() {
    let go = Arc::new(Notify::new());
    let answer = Answer::openai("demo", &SAID);
    let waits = Script::new().read().sse().send(answer.events()[..2].concat()).wait(&go).send(answer.events()[2..].concat()).end().close();
    let others = (0..3).map(|_| Script::stream(answer.cut(Cut::Events)));
    let upstream = Upstream::each([waits].into_iter().chain(others)).await;
    let setup = Setup::chain(&["moderation: { deny: [deny.txt] }"]).file("deny.txt", "bluebird\n");
    let (plan, folder) = setup.plan(&upstream.url());
    let file = folder.path().join("headgate.yaml");
    let gateway = crate::support::start(&plan, folder).await;
    let (load, process) = (file.clone(), &gateway.process);
    let load = move || headgate_config::load(&load, None, &|_| None);
    let following = tokio::spawn(reload::follow(plan, load, process.app.clone(), process.lasting.clone(), None));

    let mut open = stream(gateway.addr, &Request::turn("hi"), Kind::Client).await.unwrap();
    while open.expect().await.name != "text" {}
    let good = std::fs::read_to_string(&file).unwrap();
    let masking = good.replace("deny: [deny.txt]", "deny: [deny.txt], mask: [email]");
    std::fs::write(&file, &masking).unwrap();
    reloaded(gateway.admin, "taken", 1).await;
    let masked = stream(gateway.addr, &Request::turn("hi"), Kind::Client).await.unwrap().rest().await.unwrap();
    assert_eq!(masked.text(), "Hello, •••.");
    go.notify_one();
    assert_eq!(open.rest().await.unwrap().text(), SAID.concat(), "a turn keeps the plan it began with");

    for bad in [
        good.replace("upstream: model", "upstream: modle"),
        "routes: [".to_owned(),
        String::new(),
        masking.replace("mask: [email]", "mask: []\n        mode: shadwo"),
    ] {
        let refused = count(&ask(gateway.admin, &Request::get("/metrics")).await.unwrap().text(), "refused");
        std::fs::write(&file, bad).unwrap();
        reloaded(gateway.admin, "refused", refused + 1).await;
    }
    let still = stream(gateway.addr, &Request::turn("hi"), Kind::Client).await.unwrap().rest().await.unwrap();
    assert_eq!(still.text(), "Hello, •••.");
    // A list beside the config is part of it. What was judged by the old one is judged anew, however often it was clean.
    let known = Request::turn("hello again, it is me, about the lamp on the shelf that was lit all through the night");
    for _ in 0..2 {
        assert_ne!(ask(gateway.addr, &known).await.unwrap().status, 403);
    }
    std::fs::write(&file, &masking).unwrap();
    std::fs::write(gateway.folder.path().join("deny.txt"), "hello\n").unwrap();
    let denied = async {
        while ask(gateway.addr, &known).await.unwrap().status != 403 {
            tokio::task::yield_now().await;
        }
    };
    within(SOON, denied, "the new list to be in force").await;
    following.abort();
}

#[tokio::test]
async fn what_changes_before_it_is_watched_is_taken_and_what_was_refused_is_tried_again_when_a_file_comes() {
    let upstream = Upstream::always(Script::stream(Answer::openai("demo", &SAID).cut(Cut::Events))).await;
    let setup = Setup::chain(&["moderation: { deny: [deny.txt] }"]).file("deny.txt", "bluebird\n");
    let (plan, folder) = setup.plan(&upstream.url());
    let (file, list) = (folder.path().join("headgate.yaml"), folder.path().join("lists/more.txt"));
    let gateway = crate::support::start(&plan, folder).await;
    let status = async |said: &str| ask(gateway.addr, &Request::turn(said)).await.unwrap().status;
    // Between the reading and the watching: the config itself, which names a list in another folder.
    std::fs::create_dir(list.parent().unwrap()).unwrap();
    std::fs::write(&list, "redbird\n").unwrap();
    let good = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, good.replace("deny: [deny.txt]", "deny: [deny.txt, lists/more.txt]")).unwrap();
    let process = &gateway.process;
    // And that list, once it was read and before its folder is watched.
    let was_read = std::sync::atomic::AtomicBool::new(false);
    let load = {
        let (file, list) = (file.clone(), list.clone());
        move || {
            let plan = headgate_config::load(&file, None, &|_| None);
            if !was_read.swap(true, std::sync::atomic::Ordering::Relaxed) {
                std::fs::write(&list, "greenbird\n").unwrap();
            }
            plan
        }
    };
    let following = tokio::spawn(reload::follow(plan, load, process.app.clone(), process.lasting.clone(), None));
    reloaded(gateway.admin, "taken", 2).await;
    assert_eq!((status("redbird").await, status("greenbird").await, status("bluebird").await), (200, 403, 403));
    // A config that names a list which is only written afterwards, as people do who edit by hand.
    let late = gateway.folder.path().join("late.txt");
    std::fs::write(&file, good.replace("deny: [deny.txt]", "deny: [late.txt]")).unwrap();
    reloaded(gateway.admin, "refused", 1).await;
    std::fs::write(gateway.folder.path().join("some.log"), "a line\n").unwrap();
    std::fs::write(&late, "blackbird\n").unwrap();
    reloaded(gateway.admin, "taken", 3).await;
    assert_eq!((status("greenbird").await, status("blackbird").await), (200, 403));
    assert_eq!(count(&gateway.metrics().await, "refused"), 1, "said once");
    following.abort();
}

#[tokio::test]
async fn a_file_that_changes_while_it_is_read_is_read_again() {
    let upstream = Upstream::always(Script::stream(Answer::openai("demo", &SAID).cut(Cut::Events))).await;
    let setup = Setup::chain(&["moderation: { deny: [deny.txt] }"]).file("deny.txt", "first\n");
    let (plan, folder) = setup.plan(&upstream.url());
    let (file, list) = (folder.path().join("headgate.yaml"), folder.path().join("deny.txt"));
    let gateway = crate::support::start(&plan, folder).await;
    // Whether the second text was read; held by whoever writes.
    let was_read = Arc::new(Mutex::new(false));
    let load = {
        let (list, was_read) = (list.clone(), was_read.clone());
        move || {
            let mut was_read = was_read.lock().unwrap();
            let plan = headgate_config::load(&file, None, &|_| None);
            // Somebody writes right after we have read, and no longer text than before.
            if !*was_read && std::fs::read(&list).unwrap() == b"other\n" {
                std::fs::write(&list, "third\n").unwrap();
                *was_read = true;
            }
            plan
        }
    };
    let process = &gateway.process;
    let following = tokio::spawn(reload::follow(plan, load, process.app.clone(), process.lasting.clone(), None));
    let in_force = async {
        while ask(gateway.addr, &Request::turn("third")).await.unwrap().status != 403 {
            // The watch begins with the task: until it is there a change is not seen, so it is made again.
            {
                let was_read = was_read.lock().unwrap();
                if !*was_read {
                    std::fs::write(&list, "other\n").unwrap();
                }
            }
            tokio::task::yield_now().await;
        }
    };
    within(SOON, in_force, "what was written last to be in force").await;
    following.abort();
}

fn count(metrics: &str, result: &str) -> u64 {
    let line = metrics.lines().find(|line| line.starts_with("headgate_config_reload_total") && line.contains(result));
    line.and_then(|line| line.rsplit(' ').next()).and_then(|count| count.parse().ok()).unwrap_or(0)
}

fn headgate() -> Program {
    Program::at(env!("CARGO_BIN_EXE_headgate"))
}

fn config(upstream: &str, filters: &str) -> String {
    format!(
        "listen: {}\nadmin: {{ listen: \"{}\" }}\nworkers: 1\nupstreams:\n  model: {{ protocol: openai, endpoints: [\"{upstream}\"], authorization: \"${{MODEL_KEY}}\", health: {{ interval: 0s }} }}\n\
         routes:\n  - path: /v1/chat/stream\n    upstream: model\n    filters: [{filters}]\n",
        free_addr(),
        free_addr()
    )
}

fn field<'a>(config: &'a str, name: &str) -> &'a str {
    let rest = &config[config.find(name).unwrap() + name.len()..];
    rest[..rest.find(['\n', '"']).unwrap()].trim()
}

#[tokio::test]
async fn sighup_exchanges_the_config_of_the_running_binary_and_shows_no_secret() {
    let upstream = Upstream::always(Script::stream(Answer::openai("demo", &SAID).cut(Cut::Events))).await;
    let plain = config(&upstream.url(), "");
    let (addr, admin) = (field(&plain, "listen: ").parse().unwrap(), field(&plain, "listen: \"").parse().unwrap());
    let program = headgate().variable("MODEL_KEY", "Bearer secret-model-key-1");
    let file = program.file("headgate.yaml", &plain);
    let service = program.arguments(["run", file.to_str().unwrap()]).start(Ready::Connects(addr)).await;
    let text = async || stream(addr, &Request::turn("hi"), Kind::Client).await.unwrap().rest().await.unwrap().text();
    assert_eq!(text().await, SAID.concat());
    assert_eq!(upstream.request(0).await.header("authorization"), Some("Bearer secret-model-key-1"));
    // Replaced by renaming, as volume mounts do; then the signal.
    replace(&file, &plain.replace("filters: []", "filters: [{ moderation: { mask: [email] } }]"));
    service.signal(Signal::Hangup);
    let masked = async { while text().await != "Hello, •••." {} };
    within(SOON, masked, "the new config to be in force").await;
    replace(&file, "routes: 7");
    service.signal(Signal::Hangup);
    service.line("the config has faults").await;
    assert_eq!(text().await, "Hello, •••.");
    for path in ["/config", "/metrics", "/readyz"] {
        let page = ask(admin, &Request::get(path)).await.unwrap().text();
        assert!(!page.contains("secret-model-key"), "{path}: {page}");
    }
    assert!(!service.output().contains("secret-model-key"), "{}", service.output());
}

fn replace(file: &Path, text: &str) {
    let fresh = file.with_extension("new");
    std::fs::write(&fresh, text).unwrap();
    std::fs::rename(fresh, file).unwrap();
}

#[tokio::test]
async fn check_says_what_a_config_comes_to_or_what_is_wrong_with_it() {
    let good = config("http://127.0.0.1:1", "{ moderation: { mask: [email] } }");
    let inert = good.replace("{ moderation: { mask: [email] } }", "{ moderation: {} }");
    let bad = good.replace("upstream: model", "upstream: modle").replace("workers", "worker");
    for (config, code, says) in [(&good, 0, "moderation"), (&inert, 78, "moderation"), (&bad, 78, "did you mean")] {
        let program = headgate().variable("MODEL_KEY", "secret-model-key-2");
        let file = program.file("headgate.yaml", config);
        let (status, output) = program.arguments(["check", file.to_str().unwrap()]).run(SOON).await;
        assert_eq!(status.code(), Some(code), "{output}");
        assert!(output.contains(says) && !output.contains("secret-model-key"), "{output}");
        if code != 0 {
            assert!(output.contains("headgate.yaml:"), "{output}");
        }
    }
    let (status, _) = headgate().arguments(["check", "nowhere.yaml"]).run(SOON).await;
    assert_eq!(status.code(), Some(78));
    let (status, output) = headgate().arguments(["run", "nowhere.yaml"]).run(SOON).await;
    assert_eq!(status.code(), Some(78), "{output}");
}
