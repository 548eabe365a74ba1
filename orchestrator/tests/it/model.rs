//! The same with a real model: ours, in this process, behind its own server.

use std::sync::Arc;

use headgate_orchestrator::{Models, Settings};
use headgate_slm::{Options, Slm, serve};
use headgate_testkit::{
    client::{Request, ask},
    soon,
};
use serde_json::Value;
use tokio::net::TcpListener;

use crate::desk::{Desk, TRACE, upstream};

struct Real {
    slm: Arc<Slm>,
    url: String,
    addr: std::net::SocketAddr,
}

async fn real(options: Options) -> Real {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let slm = Arc::new(Slm::embedded());
    tokio::spawn(serve(listener, slm.clone(), Options { debug_requests: true, ..options }, std::future::pending()));
    Real { slm, url: format!("http://{addr}"), addr }
}

impl Real {
    /// What arrived at the model's server.
    async fn requests(&self) -> Vec<Value> {
        let reply = ask(self.addr, &Request::get("/debug/requests")).await.unwrap();
        reply.json()["requests"].as_array().unwrap().clone()
    }
}

fn header(request: &Value, name: &str) -> String {
    let headers = request["headers"].as_array().unwrap();
    let found = headers.iter().find(|header| header[0] == name).map(|header| header[1].as_str().unwrap().to_owned());
    found.unwrap_or_default()
}

#[tokio::test]
async fn a_real_model_says_the_same_streamed_and_in_one_step() {
    let real = real(Options::default()).await;
    let desk = Desk::with(Models::new(upstream(&real.url)), Settings::default()).await;
    let streamed = desk.turn("s1", "hello").events().await.rest().await.unwrap();
    assert!(!streamed.text().is_empty());
    assert!(streamed.named("text").count() > 1, "it streams");
    let whole = desk.turn("s2", "hello").step().reply().await.json();
    assert_eq!(whole["text"], streamed.text());
    assert_eq!(whole["finish"], streamed.finish());
    assert_eq!(whole["usage"], streamed.end().data["usage"]);
    assert!(whole["usage"]["output_tokens"].as_u64().unwrap() > 0);

    let requests = real.requests().await;
    assert_eq!(header(&requests[0], "policy-version"), "7");
    assert_eq!(header(&requests[0], "constitution-hash"), desk.issuer.con.to_string());
    assert_eq!(header(&requests[0], "policy-verdict").split('.').count(), 3);
    assert_eq!(requests[0]["trace_id"], TRACE[3..35], "one trace runs through all hops");
    assert_eq!(requests[0]["messages"], 1);
    desk.turn("s1", "thanks").text().await;
    assert_eq!(real.requests().await[2]["messages"], 3, "with what was said before");
}

#[tokio::test]
async fn a_real_model_stops_when_its_reader_leaves() {
    let real = real(Options { pace: Some(20.0), ..Options::default() }).await;
    let desk = Desk::with(Models::new(upstream(&real.url)), Settings::default()).await;
    let turn = desk.turn("s1", "tell me a long story about a parcel").with("max_output_tokens", 200);
    let mut events = turn.events().await;
    while events.so_far().text().is_empty() {
        events.expect().await;
    }
    drop(events);
    let stopped = async {
        while real.requests().await[0]["end"] != "cancelled" {
            tokio::task::yield_now().await;
        }
    };
    soon(stopped, "the model to stop").await;
    desk.idle().await;
    let generated = real.slm.tokens_generated();
    assert!(generated < 100, "{generated}");
}
