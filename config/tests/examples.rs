//! Every example is a config that is taken, and says what it claims to say.

use std::{collections::BTreeSet, fs, path::Path, time::Duration};

use headgate_config::{
    Environment, Plan,
    effect::Delay,
    plan::{Kind, Origins, PolicyKey, VerdictKeys},
};
use headgate_contracts::OnDisconnect;

/// The examples in a folder of their own, with the files that an operator would bring.
fn examples() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    copy(&Path::new(env!("CARGO_MANIFEST_DIR")).join("examples"), folder.path());
    for (name, text) in [
        ("certificates/gateway.pem", "a certificate"),
        ("certificates/gateway.key", "a key"),
        ("certificates/models-ca.pem", "a certificate"),
        ("certificates/kafka-ca.pem", "a certificate"),
        ("secrets/model-key", "sk-test\n"),
        ("secrets/kafka-password", "let-us-in\n"),
        // The public key of RFC 8037, appendix A.
        ("registry.jwks.json", r#"{"keys":[{"kty":"OKP","crv":"Ed25519","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}]}"#),
    ] {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    folder
}

fn copy(from: &Path, to: &Path) {
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            fs::create_dir_all(&to).unwrap();
            copy(&entry.path(), &to);
        } else {
            fs::copy(entry.path(), to).unwrap();
        }
    }
}

fn load(folder: &Path, name: &str, environment: Option<Environment>) -> Plan {
    headgate_config::load(&folder.join(name), environment, &|_| None).unwrap_or_else(|faults| panic!("{name}:\n{faults}"))
}

fn warnings(plan: &Plan) -> Vec<String> {
    plan.warnings.iter().map(|warning| format!("{}: {}", warning.path, warning.found)).collect()
}

#[test]
fn every_example_is_taken() {
    let folder = examples();
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(folder.path()).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        if name.ends_with(".yaml") && name != "everything.production.yaml" {
            load(folder.path(), &name, None);
            names.insert(name);
        }
    }
    assert!(names.len() >= 9, "{names:?}");
}

#[test]
fn a_moderated_streaming_route_takes_fifteen_lines_and_warns_of_nothing() {
    let folder = examples();
    let plan = load(folder.path(), "minimal.yaml", None);
    let lines = fs::read_to_string(folder.path().join("minimal.yaml")).unwrap();
    assert!(lines.lines().filter(|line| !line.starts_with('#')).count() <= 15);
    assert_eq!(warnings(&plan), [""; 0]);
    let [route] = plan.routes.as_slice() else { panic!("{:?}", plan.routes) };
    assert_eq!((route.kind, route.upstream.as_str(), route.effect.unverified_bytes), (Kind::Chat, "chat", 0));
    let chain: Vec<&str> = route.effect.chain.iter().map(|link| link.filter).collect();
    assert_eq!(chain, ["trace", "backpressure", "cancellation", "auth", "rate_limit", "moderation", "policy_headers", "budget"]);
    assert!(matches!(route.effect.delay, Delay::UntilDecided { bytes } if bytes > 0), "{:?}", route.effect.delay);
    assert_eq!(plan.policy.unwrap().issuer.pol.ver, "2026-11-21");
}

#[test]
fn openai_direct_answers_the_list_of_models_too() {
    let folder = examples();
    let plan = load(folder.path(), "openai-direct.yaml", None);
    let kinds: Vec<_> = plan.routes.iter().map(|route| (route.name.to_string(), route.kind)).collect();
    assert_eq!(kinds, [("/v1/chat/completions".into(), Kind::OpenAi), ("/v1/models".into(), Kind::OpenAi)]);
    assert_eq!(plan.routes[1].models, ["qwen3-8b"]);
    assert_eq!(plan.upstreams["models"].authorization.as_ref().unwrap().expose(), "none");
    assert_eq!(plan.upstreams["models"].first_byte, Duration::from_secs(60));
}

#[test]
fn orchestrator_runs_three_parts_in_one_process() {
    let folder = examples();
    let plan = load(folder.path(), "orchestrator.yaml", None);
    let orchestrator = plan.orchestrator.as_ref().unwrap();
    assert_eq!((&orchestrator.keys, orchestrator.issuer.as_str(), orchestrator.sessions), (&VerdictKeys::Own, "headgate", 1000));
    let events = orchestrator.events.as_ref().unwrap();
    assert_eq!((events.folder.as_path(), events.cap), (folder.path().join("events").as_path(), 1 << 30));
    assert_eq!(plan.slm.as_ref().unwrap().pace, Some(40.0));
    assert!(plan.page && plan.route("/").is_none());
    assert_eq!(warnings(&plan), ["routes[0].path: anybody who can connect may call this"]);
}

#[test]
fn browser_lets_named_pages_in_and_waits_for_those_that_reload() {
    let folder = examples();
    let plan = load(folder.path(), "browser.yaml", None);
    let route = &plan.routes[0];
    let pages = ["https://app.example.com", "http://localhost:5173"].map(str::to_owned);
    assert_eq!(route.origins, Origins::Listed(pages.into()));
    assert_eq!(route.flow.on_disconnect, OnDisconnect::Grace(Duration::from_secs(30)));
    assert_eq!((route.flow.deadline, route.flow.heartbeat), (Duration::from_secs(300), Duration::from_secs(10)));
    assert_eq!((route.flow.max_buffered, route.flow.stall), (256 << 10, Duration::from_secs(20)));
}

#[test]
fn tls_names_its_files_and_keeps_its_secret() {
    let folder = examples();
    let plan = load(folder.path(), "tls.yaml", None);
    assert_eq!(plan.tls.as_ref().unwrap().key, folder.path().join("certificates/gateway.key"));
    assert_eq!(plan.upstreams["models"].authorization.as_ref().unwrap().expose(), "sk-test");
    assert!(!format!("{plan:?}").contains("sk-test"));
    let watched: Vec<_> = plan.watched().collect();
    for name in ["tls.yaml", "certificates/gateway.pem", "certificates/gateway.key", "certificates/models-ca.pem", "secrets/model-key"] {
        assert!(watched.contains(&folder.path().join(name).as_path()), "{name}: {watched:?}");
    }
}

#[test]
fn shadow_says_which_list_only_watches() {
    let folder = examples();
    let plan = load(folder.path(), "shadow.yaml", None);
    let told = plan.summary().to_string();
    assert!(told.contains("moderation (masks, cuts, holds until it knows)"), "{told}");
    assert!(told.contains("moderation (shadow, masks, cuts)"), "{told}");
    assert_eq!(warnings(&plan), [""; 0]);
}

#[test]
fn reverse_proxy_passes_the_rest_through() {
    let folder = examples();
    let plan = load(folder.path(), "reverse-proxy.yaml", None);
    let names = |path: &str| plan.route(path).map(|route| route.name.to_string());
    assert_eq!(names("/v1/chat/stream").as_deref(), Some("/v1/chat/stream"));
    assert_eq!(names("/v1/chat/stream/018f-turn/stop").as_deref(), Some("/v1/chat/stream"));
    assert_eq!(names("/files/a/b").as_deref(), Some("/files/*"));
    assert_eq!(names("/files").as_deref(), Some("/*"));
    assert_eq!(names("/filesystem").as_deref(), Some("/*"));
    assert_eq!(names("/").as_deref(), Some("/*"));
    let files = plan.route("/files/a").unwrap();
    assert_eq!((files.strip_prefix.as_deref(), files.methods.len()), (Some("/files"), 2));
    assert_eq!(files.effect.chain.iter().map(|link| link.filter).collect::<Vec<_>>(), ["auth"]);
}

#[test]
fn everything_sets_every_setting_of_the_schema() {
    let folder = examples();
    let text = fs::read_to_string(folder.path().join("everything.yaml")).unwrap();
    for line in headgate_config::schema::reference().lines().filter(|line| line.starts_with("| `")) {
        let setting = line.trim_start_matches("| `").split('`').next().unwrap();
        let elsewhere = ["issuer", "algorithms", "tenant_claim", "subject_claim", "subject", "expires", "model"];
        assert!(text.contains(&format!("{setting}:")) || elsewhere.contains(&setting), "everything.yaml does not show `{setting}`");
    }
    let plan = load(folder.path(), "everything.yaml", None);
    assert_eq!(plan.policy.as_ref().unwrap().key, PolicyKey::File(folder.path().join("keys/policy.json")));
    assert_eq!(plan.routes[0].effect.delay, Delay::Milliseconds(250));
    assert_eq!(plan.observability.sampling, 0.1);
}

#[test]
fn a_shared_registry_is_in_redis_and_its_password_is_never_shown() {
    let folder = examples();
    let url = |name: &str| (name == "REDIS_URL").then(|| "rediss://headgate:canary-7f3a@redis.internal:6380/2".to_owned());
    let plan = headgate_config::load(&folder.path().join("shared.yaml"), None, &url).unwrap_or_else(|faults| panic!("{faults}"));
    let redis = plan.redis.as_ref().unwrap();
    assert_eq!(redis.url.expose(), "rediss://headgate:canary-7f3a@redis.internal:6380/2");
    assert_eq!(redis.budget, Duration::from_millis(20));
    assert_eq!(plan.policy.as_ref().unwrap().registry.as_ref().unwrap().folder, None);
    assert_eq!(warnings(&plan), [""; 0]);
    assert!(!format!("{plan:?}{}", plan.summary().to_json()).contains("canary"));
    // In plain text, over the network.
    let url = |name: &str| (name == "REDIS_URL").then(|| "redis://:canary-7f3a@redis.internal".to_owned());
    let plan = headgate_config::load(&folder.path().join("shared.yaml"), None, &url).unwrap();
    assert_eq!(warnings(&plan), ["redis.url: the password travels in plain text"]);
}

#[test]
fn production_lays_its_overlay_over_everything() {
    let folder = examples();
    let plan = load(folder.path(), "everything.yaml", Some(Environment::Production));
    assert_eq!((plan.workers, plan.limits.connections), (16, 65536));
    assert_eq!(plan.upstreams["chat"].endpoints[0].host(), Some("orchestrator-a.internal"));
    assert_eq!(plan.routes[0].effect.delay, Delay::Milliseconds(100));
    assert_eq!(plan.routes[0].origins, Origins::Listed(vec!["https://chat.example.com".into()]));
    // What the overlay does not name stays.
    let told = format!("{:?}", plan.routes[0].steps);
    assert!(told.contains("count: 600") && told.contains("count: 100000"), "{told}");
}

#[test]
fn what_is_read_is_what_was_checked() {
    let folder = examples();
    let plan = load(folder.path(), "minimal.yaml", None);
    let before = plan.read(Path::new("rules/deny.txt")).unwrap();
    fs::write(folder.path().join("rules/deny.txt"), "/[/").unwrap();
    assert_eq!(plan.read(Path::new("rules/deny.txt")).unwrap(), before);
    assert!(plan.read(Path::new("rules/other.txt")).is_err());
}

#[test]
fn the_constitutions_hash_changes_with_what_is_looked_for() {
    let folder = examples();
    let hash = || load(folder.path(), "minimal.yaml", None).policy.unwrap().issuer.con;
    let before = hash();
    assert_eq!(before, hash());
    let path = folder.path().join("rules/deny.txt");
    let rules = fs::read_to_string(&path).unwrap();
    fs::write(&path, format!("# a comment decides nothing\n{rules}")).unwrap();
    assert_eq!(before, hash());
    fs::write(&path, format!("{rules}\nanother phrase\n")).unwrap();
    assert_ne!(before, hash());
}
