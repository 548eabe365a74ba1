//! A plain HTTP client for the tests: one connection per request, so that dropping it is leaving.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use headgate_slm::{Id, Limits, Message, Role, Slm, Step};
use http::{HeaderMap, Method, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpStream;

/// Far longer than anything here takes: a test that hangs should say where.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) struct Reply {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    body: Incoming,
    connection: tokio::task::JoinHandle<()>,
}

impl Drop for Reply {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

impl Reply {
    pub(crate) async fn text(mut self) -> String {
        let mut whole = Vec::new();
        while let Some(bytes) = self.next().await {
            whole.extend_from_slice(&bytes);
        }
        String::from_utf8(whole).expect("answers are UTF-8")
    }

    pub(crate) async fn json(self) -> Value {
        serde_json::from_str(&self.text().await).expect("answers are JSON")
    }

    /// The next bytes of the body, as they arrive.
    pub(crate) async fn next(&mut self) -> Option<Bytes> {
        let frame = tokio::time::timeout(PATIENCE, self.body.frame()).await.expect("bytes or an end in time");
        frame.map(|f| f.expect("a body without errors").into_data().expect("data"))
    }
}

pub(crate) async fn send(address: SocketAddr, method: Method, path: &str, headers: &[(&str, &str)], body: impl Into<Bytes>) -> Reply {
    let stream = TcpStream::connect(address).await.expect("the server listens");
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.expect("a handshake");
    let connection = tokio::spawn(async move {
        let _ = connection.await;
    });
    let mut request = http::Request::builder().method(method).uri(path).header("host", "slm");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let request = request.body(Full::new(body.into())).expect("a request");
    let reply = tokio::time::timeout(PATIENCE, sender.send_request(request)).await.expect("an answer in time").expect("an answer");
    let (head, body) = reply.into_parts();
    Reply { status: head.status, headers: head.headers, body, connection }
}

pub(crate) async fn get(address: SocketAddr, path: &str) -> Reply {
    send(address, Method::GET, path, &[], Bytes::new()).await
}

pub(crate) async fn post(address: SocketAddr, path: &str, body: &Value) -> Reply {
    send(address, Method::POST, path, &[("content-type", "application/json")], body.to_string()).await
}

/// The most tokens of an answer that are compared with the judge's.
pub(crate) const ANSWER_TOKENS_MAX: usize = 150;

/// The prompt for `messages`, a list as in a request, and the answer of best tokens, without the one that ends it.
pub(crate) fn greedy(slm: &Arc<Slm>, messages: &Value) -> (Vec<Id>, Vec<Id>) {
    let messages: Vec<Message> = messages
        .as_array()
        .expect("a list of messages")
        .iter()
        .map(|m| Message {
            role: serde_json::from_value::<Role>(m["role"].clone()).expect("a role"),
            content: m["content"].as_str().expect("text").to_owned(),
        })
        .collect();
    let prompt = slm.prompt(&messages, ANSWER_TOKENS_MAX).expect("a prompt that fits");
    let ids = prompt.ids().to_vec();
    let mut generation = slm.generate(prompt, Limits { max_tokens: ANSWER_TOKENS_MAX, ..Limits::default() });
    while !matches!(generation.step(), Step::End(..)) {}
    (ids, generation.answer_ids().to_vec())
}
