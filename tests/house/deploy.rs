//! Whether deployment files fit the code: they parse, use metrics that exist, name files that exist, and drain in time.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::{
    metrics::{base, is_metric, registered},
    tree::{ending, text, texts},
};

/// The documents of a YAML file.
fn yaml(path: &str) -> Vec<Value> {
    serde_saphyr::from_multiple(text(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The document of that kind.
fn kind(documents: &[Value], kind: &str) -> Value {
    documents.iter().find(|document| document["kind"] == kind).unwrap_or_else(|| panic!("there is no {kind}")).clone()
}

/// The metrics that a query names.
fn metrics_of(query: &str) -> impl Iterator<Item = &str> {
    query.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').filter(|word| is_metric(word))
}

/// Every query of a dashboard or a set of rules, wherever it stands.
fn queries(value: &Value, found: &mut Vec<String>) {
    match value {
        Value::Object(members) => {
            for (name, value) in members {
                match value {
                    Value::String(query) if name == "expr" || name == "query" => found.push(query.clone()),
                    value => queries(value, found),
                }
            }
        }
        Value::Array(values) => values.iter().for_each(|value| queries(value, found)),
        _ => {}
    }
}

#[test]
fn every_deployment_file_parses() {
    let yamls =
        ending(".yaml").filter(|(path, _)| path.starts_with("deploy/")).map(|(path, _)| assert!(!yaml(path).is_empty(), "{path} is empty"));
    assert!(yamls.count() >= 8);
    for (path, json) in ending(".json").filter(|(path, _)| path.starts_with("deploy/")) {
        let _: Value = serde_json::from_str(json).unwrap_or_else(|error| panic!("{path}: {error}"));
    }
}

#[test]
fn every_metric_of_dashboards_and_alerts_exists() {
    let dashboard: Value = serde_json::from_str(text("deploy/grafana/headgate.json")).expect("a dashboard");
    let mut found = Vec::new();
    queries(&dashboard, &mut found);
    for rules in yaml("deploy/prometheus/alerts.yaml") {
        queries(&rules, &mut found);
    }
    let names: BTreeSet<&str> = found.iter().flat_map(|query| metrics_of(query)).collect();
    let explained = text("docs/operate.md");
    for name in &names {
        assert!(registered().contains(base(name)), "{name} does not exist");
        // The name as scraped, with its unit and suffix, is the one that operators read.
        let whole = ["_bucket", "_count", "_sum"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name);
        assert!(explained.contains(&format!("| `{whole}` |")), "{name} is scraped under another name");
    }
    assert!(names.len() > 15, "{names:?}");
}

#[test]
fn every_alert_says_what_to_do() {
    let mut alerts = BTreeSet::new();
    for group in yaml("deploy/prometheus/alerts.yaml")[0]["groups"].as_array().expect("groups") {
        for rule in group["rules"].as_array().expect("rules") {
            let name = rule["alert"].as_str().expect("a name");
            assert!(rule["annotations"]["summary"].is_string() && rule["labels"]["severity"].is_string(), "{name} says too little");
            alerts.insert(name.to_owned());
        }
    }
    let (_, chapter) = text("docs/operate.md").split_once("\n## Alerts\n").expect("a chapter about alerts");
    let rows = chapter.lines().filter_map(|line| line.strip_prefix("| `Headgate")).filter_map(|row| row.split('`').next());
    let explained: BTreeSet<String> = rows.map(|name| format!("Headgate{name}")).collect();
    assert_eq!(alerts, explained);
}

/// `60s` or `2min`, in seconds.
fn seconds(span: &str) -> u64 {
    let (number, unit) = span.split_at(span.find(|c: char| !c.is_ascii_digit()).unwrap_or(span.len()));
    let number: u64 = number.parse().unwrap_or_else(|_| panic!("{span} is no time"));
    match unit {
        "s" => number,
        "m" | "min" => 60 * number,
        _ => panic!("{span} has an unknown unit"),
    }
}

#[test]
fn whoever_stops_a_gateway_waits_until_it_has_drained() {
    let config = &yaml("deploy/kubernetes/config/headgate.yaml")[0];
    let drain = seconds(config["drain"]["timeout"].as_str().expect("a drain time"));
    let pod = &kind(&yaml("deploy/kubernetes/headgate.yaml"), "Deployment")["spec"]["template"]["spec"];
    let pause = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"].as_u64().expect("a pause before the drain");
    let grace = pod["terminationGracePeriodSeconds"].as_u64().expect("a grace period");
    assert!(grace >= pause + drain + 10, "{grace} s is less than {pause} + {drain} + 10");

    let gateway = &yaml("deploy/compose.yaml")[0]["services"]["gateway"];
    assert!(seconds(gateway["stop_grace_period"].as_str().expect("a grace period")) >= 60 + 10, "the default drain takes 60 s");
}

#[test]
fn pods_listen_where_they_are_asked_and_are_not_root() {
    let documents = yaml("deploy/kubernetes/headgate.yaml");
    let config = &yaml("deploy/kubernetes/config/headgate.yaml")[0];
    let pod = kind(&documents, "Deployment")["spec"]["template"]["spec"].clone();
    let container = &pod["containers"][0];
    let port = |name: &str| {
        let ports = container["ports"].as_array().expect("ports");
        ports
            .iter()
            .find(|port| port["name"] == name)
            .and_then(|port| port["containerPort"].as_u64())
            .unwrap_or_else(|| panic!("no port {name}"))
    };
    let listens = |address: &Value, port: u64| address.as_str().is_some_and(|address| address.ends_with(&format!(":{port}")));
    assert!(listens(&config["listen"], port("clients")) && listens(&config["admin"]["listen"], port("admin")));
    assert_eq!(container["readinessProbe"]["httpGet"]["path"], "/readyz");
    assert_eq!(container["livenessProbe"]["httpGet"]["path"], "/healthz");

    let user = pod["securityContext"]["runAsUser"].as_u64().expect("a user");
    assert!(user > 0 && pod["securityContext"]["runAsNonRoot"] == true);
    let image = text("deploy/Dockerfile");
    assert!(image.contains(&format!("\nUSER {user}:")), "the image runs as another user than the pod");
    for port in [port("clients"), port("admin")] {
        assert!(image.lines().any(|line| line.starts_with("EXPOSE ") && line.contains(&port.to_string())));
    }
    let manifest = text("Cargo.toml");
    let rust = manifest.split("rust-version = \"").nth(1).and_then(|rest| rest.split('"').next()).expect("a version of Rust");
    assert!(image.contains(&format!("FROM rust:{rust}-")), "the image is built with another Rust than the tree needs");
}

#[test]
fn every_file_that_is_mounted_or_copied_exists() {
    let compose = &yaml("deploy/compose.yaml")[0];
    for (name, service) in compose["services"].as_object().expect("services") {
        for volume in service["volumes"].as_array().into_iter().flatten().filter_map(Value::as_str) {
            let source = volume.split(':').next().unwrap_or_default();
            let Some(file) = source.strip_prefix("./") else {
                assert!(compose["volumes"].get(source).is_some(), "{name} mounts {source}, which is neither a file nor a volume");
                continue;
            };
            let path = format!("deploy/{file}");
            assert!(texts().keys().any(|known| *known == path || known.starts_with(&format!("{path}/"))), "{name} mounts {path}");
        }
    }
    for file in yaml("deploy/kubernetes/kustomization.yaml")[0]["configMapGenerator"][0]["files"].as_array().expect("files") {
        let path = format!("deploy/kubernetes/{}", file.as_str().expect("a path"));
        assert!(texts().contains_key(&path), "the ConfigMap takes {path}");
    }
}
