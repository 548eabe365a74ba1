//! What a turn leaves in traces and logs: one span in OpenTelemetry's GenAI words, one line, and no text.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use headgate_slm::{Options, Slm, serve};
use http::Method;
use serde_json::{Value, json};
use tokio::net::TcpListener;

#[allow(dead_code, reason = "shared by the test programs, each of which uses a part")]
mod support;
use support::send;

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

// One thread: the subscriber is this thread's, and the server must run under it.
#[tokio::test(flavor = "current_thread")]
async fn a_turn_is_one_span_with_counts_and_parent_and_without_text() {
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt().json().with_max_level(tracing::Level::TRACE).with_writer(move || writer.clone()).finish();
    let _guard = tracing::subscriber::set_default(subscriber);

    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("an address");
    tokio::spawn(serve(listener, Arc::new(Slm::embedded()), Options::default(), std::future::pending()));
    let traceparent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let body = json!({"model": "demo", "max_tokens": 5, "stop": "never-said", "messages": [{"role": "user", "content": "hello xyzzy"}]});
    let headers = [("traceparent", traceparent), ("authorization", "Bearer hush-hush")];
    let answer = send(address, Method::POST, "/v1/chat/completions", &headers, body.to_string()).await.json().await;

    let log = String::from_utf8(log.0.lock().expect("no panic").clone()).expect("UTF-8");
    let ours: Vec<Value> = log
        .lines()
        .map(|l| serde_json::from_str::<Value>(l).expect("JSON"))
        .filter(|l| l["target"].as_str().is_some_and(|t| t.starts_with("headgate")))
        .collect();
    let [line] = ours.as_slice() else { panic!("one line for one turn: {log}") };
    let expected = json!({
        "name": "chat",
        "otel.kind": "server",
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "headgate",
        "gen_ai.request.model": "demo",
        "gen_ai.request.max_tokens": 5,
        "gen_ai.request.choice.count": 1,
        "gen_ai.response.id": answer["id"],
        "gen_ai.response.model": "headgate-demo-2m",
        "gen_ai.response.finish_reasons": "length",
        "gen_ai.usage.input_tokens": answer["usage"]["prompt_tokens"],
        "gen_ai.usage.output_tokens": 5,
        "trace_id": "4bf92f3577b34da6a3ce929d0e0e4736",
        "parent_span_id": "00f067aa0ba902b7",
    });
    assert_eq!(line["span"], expected);
    assert_eq!(line["fields"]["end"], "length");
    for secret in ["xyzzy", "hush-hush", "never-said", answer["choices"][0]["message"]["content"].as_str().expect("text")] {
        assert!(!log.contains(secret), "{secret:?} in {log}");
    }
}
