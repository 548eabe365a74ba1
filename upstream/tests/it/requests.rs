//! What an upstream receives is what was parsed, sealed over its exact bytes, with the headers of filters and no others.

use std::sync::{Arc, Mutex};

use headgate_contracts::{Code, Credential, Fault, Secret, Trace};
use headgate_testkit::{
    dialect::Answer,
    upstream::{Script, Upstream},
};
use headgate_upstream::{Protocol, Settings};
use http::{HeaderMap, HeaderValue};

use crate::{openai, prompt, turn, upstream};

async fn model() -> Upstream {
    Upstream::always(Script::stream([Answer::openai("m", &["x"]).bytes()])).await
}

async fn asked(change: impl FnOnce(&mut Settings), prompt: &headgate_contracts::Prompt) -> headgate_testkit::upstream::Request {
    let model = model().await;
    let upstream = upstream(&[model.url()], change);
    // What is answered does not matter here.
    let _ = upstream.open(prompt).await;
    model.request(0).await
}

#[tokio::test]
async fn a_model_is_asked_for_a_stream_at_its_path() {
    let request = asked(|_| {}, &prompt()).await;
    assert_eq!((request.method.as_str(), request.target.as_str()), ("POST", "/v1/chat/completions"));
    assert_eq!(request.header("content-type"), Some("application/json"));
    assert_eq!(request.header("accept"), Some("text/event-stream"));
    let body = request.json();
    assert_eq!((&body["stream"], &body["messages"][0]["content"]), (&true.into(), &"hello".into()));
}

#[tokio::test]
async fn an_orchestrator_is_asked_with_an_idempotency_key() {
    let mut prompt = prompt();
    let request = asked(|settings| settings.protocol = Protocol::Orchestrator, &prompt).await;
    assert_eq!(request.target, "/v1/conversation/stream");
    assert_eq!(request.header("idempotency-key"), Some(prompt.turn.to_string().as_str()));
    assert_eq!(request.json()["turn_id"], prompt.turn.to_string());
    prompt.idempotency_key = Some("client-key".into());
    let request = asked(|settings| settings.protocol = Protocol::Orchestrator, &prompt).await;
    assert_eq!(request.header("idempotency-key"), Some("client-key"));
}

#[tokio::test]
async fn the_path_the_model_and_the_credential_come_from_the_settings() {
    let mut prompt = prompt();
    prompt.settings.model = Some("theirs".into());
    prompt.credential = Credential::Bearer(Secret::new("client-token"));
    let request = asked(
        |settings| {
            settings.model = Some("ours".into());
            settings.path = Some("/api/chat".into());
            settings.authorization = Some(Secret::new("key-1"));
        },
        &prompt,
    )
    .await;
    assert_eq!(request.target, "/api/chat");
    assert_eq!(request.json()["model"], "ours");
    assert_eq!(request.header("authorization"), Some("Bearer key-1"));
    assert!(!String::from_utf8_lossy(&request.body).contains("client-token"));
}

#[tokio::test]
async fn an_endpoints_path_stands_before_the_protocols() {
    let model = model().await;
    let upstream = upstream(&[format!("{}/v1/", model.url())], |_| {});
    let _ = turn(&upstream).await;
    assert_eq!(model.request(0).await.target, "/v1/chat/completions");
}

#[tokio::test]
async fn the_seal_signs_the_exact_bytes_and_its_headers_stand_alone() {
    type Sealed = (String, String, Vec<u8>);
    let sealed: Arc<Mutex<Vec<Sealed>>> = Arc::default();
    let mut prompt = prompt();
    // An older value under the same name must not stand beside the seal's.
    prompt.headers.insert("policy-verdict", HeaderValue::from_static("stale"));
    prompt.headers.append("policy-verdict", HeaderValue::from_static("staler"));
    prompt.headers.insert("policy-version", HeaderValue::from_static("7"));
    let seen = Arc::clone(&sealed);
    prompt.seal = Some(Arc::new(move |_, dispatch| {
        seen.lock().unwrap().push((dispatch.method.into(), dispatch.path.into(), dispatch.body.to_vec()));
        let mut headers = HeaderMap::new();
        headers.insert("policy-verdict", HeaderValue::from_static("signed"));
        Ok(headers)
    }));
    let request = asked(|_| {}, &prompt).await;
    assert_eq!(request.header("policy-verdict"), Some("signed"));
    assert_eq!(request.header("policy-version"), Some("7"));
    assert_eq!(*sealed.lock().unwrap(), [("POST".to_owned(), "/v1/chat/completions".to_owned(), request.body.to_vec())]);
}

#[tokio::test]
async fn every_try_is_sealed_anew() {
    let sealed = Arc::new(Mutex::new(0));
    let mut prompt = prompt();
    let seen = Arc::clone(&sealed);
    prompt.seal = Some(Arc::new(move |_, _| {
        let mut n = seen.lock().unwrap();
        *n += 1;
        Ok(HeaderMap::from_iter([(http::HeaderName::from_static("policy-verdict"), HeaderValue::from(*n))]))
    }));
    let model = Upstream::always(Script::new().read().close()).await;
    let other = Upstream::always(Script::new().read().close()).await;
    let upstream = upstream(&[model.url(), other.url()], |_| {});
    let _ = upstream.open(&prompt).await;
    let verdicts = [model.request(0).await, other.request(0).await].map(|request| request.header("policy-verdict").unwrap().to_owned());
    assert_ne!(verdicts[0], verdicts[1]);
}

#[tokio::test]
async fn a_seal_that_fails_stops_the_turn_before_a_byte_is_sent() {
    let model = model().await;
    let mut prompt = prompt();
    prompt.seal = Some(Arc::new(|_, _| Err(Fault::us(Code::PolicyRegistryUnavailable))));
    let fault = openai(&model).open(&prompt).await.unwrap_err();
    assert_eq!(fault.code, Code::PolicyRegistryUnavailable);
    assert!(model.requests().is_empty());
}

#[tokio::test]
async fn headers_of_filters_cannot_reframe_the_request() {
    let mut prompt = prompt();
    for (name, value) in [
        ("host", "elsewhere"),
        ("content-length", "1"),
        ("transfer-encoding", "chunked"),
        ("connection", "close"),
        ("upgrade", "websocket"),
        ("expect", "100-continue"),
        ("traceparent", "00-00000000000000000000000000000001-0000000000000001-01"),
        ("x-filter", "kept"),
    ] {
        prompt.headers.insert(name, HeaderValue::from_static(value));
    }
    let model = model().await;
    let _ = openai(&model).open(&prompt).await;
    let request = model.request(0).await;
    assert_eq!(request.header("host"), Some(model.addr().to_string().as_str()));
    assert_eq!(request.header("x-filter"), Some("kept"));
    assert_eq!(request.json()["messages"][0]["content"], "hello");
    for gone in ["transfer-encoding", "connection", "upgrade", "expect"] {
        assert_eq!(request.header(gone), None, "{gone}");
    }
    assert!(request.header("traceparent").unwrap().contains(&prompt.trace.trace_id_hex()));
}

#[tokio::test]
async fn the_trace_goes_on_below_our_own_span() {
    let mut prompt = prompt();
    prompt.trace = Trace { state: Some("vendor=1".into()), ..Trace::fresh() };
    let request = asked(|_| {}, &prompt).await;
    let parent = request.header("traceparent").unwrap();
    assert_eq!(parent, prompt.trace.traceparent());
    assert_eq!(request.header("tracestate"), Some("vendor=1"));
}

#[tokio::test]
async fn settings_that_cannot_be_an_upstream_are_named() {
    let invalid = |endpoint: &str, change: fn(&mut Settings)| {
        let mut settings = Settings { endpoints: vec![endpoint.parse().unwrap()], ..Settings::default() };
        change(&mut settings);
        headgate_upstream::Upstream::new("chat", settings).expect_err(endpoint).to_string()
    };
    assert_eq!(invalid("ftp://a", |_| {}), "endpoint `ftp://a/`: expected http:// or https://");
    assert_eq!(invalid("/path", |_| {}), "endpoint `/path`: expected http:// or https://");
    assert!(invalid("http://u:p@a", |_| {}).contains("authorization"));
    assert!(invalid("http://a", |settings| settings.endpoints.push("http://a:80/x".parse().unwrap())).contains("once"));
    assert!(invalid("http://a", |settings| settings.endpoints.clear()).contains("no endpoint"));
    assert!(invalid("http://a", |settings| settings.retry.share = 2.0).contains("retry.share"));
    assert!(invalid("http://a", |settings| settings.path = Some("a\r\nb".into())).contains("path"));
    assert!(invalid("http://a", |settings| settings.authorization = Some(Secret::new("a\nb"))).contains("authorization"));
    assert!(invalid("https://a", |settings| settings.tls.ca = Some("/nowhere.pem".into())).contains("/nowhere.pem"));
}
