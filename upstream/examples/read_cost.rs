//! What reading an answer costs: this crate's reader against hyper's client on the same stream, in CPU time of the reading thread.
//!
//! `cargo run --release -p headgate-upstream --example read_cost`
//!
//! Both decode the same events with the same codecs. The server is a thread that writes whole bursts, the case in which reading
//! is most of the work; with events that come one by one the kernel is.

#![allow(clippy::print_stdout, reason = "its output is what it is for")]

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener},
    pin::Pin,
};

use bytes::Bytes;
use headgate_contracts::{
    Batch, Head, Message, Prompt, Role, SessionId, TurnId,
    wire::{Step, openai, sse},
};
use headgate_upstream::{Settings, Upstream};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use tokio::{net::TcpStream, runtime::Builder};

const EVENTS: usize = 200_000;
const TURNS: usize = 5;

fn main() {
    let server = serve();
    let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
    // One of each first, so that neither pays for being first.
    runtime.block_on(async { (by_hand(server).await, by_hyper(server).await) });
    let (mut hand, mut hyper) = (Vec::new(), Vec::new());
    for _ in 0..TURNS {
        hand.push(ns_per_event(|| assert_eq!(runtime.block_on(by_hand(server)), EVENTS)));
        hyper.push(ns_per_event(|| assert_eq!(runtime.block_on(by_hyper(server)), EVENTS)));
    }
    println!("ns of CPU per event, {TURNS} runs of {EVENTS} events of {} bytes, in one chunk each", event().len());
    let piece = event().repeat(64);
    let decoding = ns_per_event(|| assert_eq!(decode_alone(&piece), EVENTS));
    println!("decoding alone     [{decoding}]");
    println!("this reader        {hand:?}");
    println!("hyper, same task   {hyper:?}");
    println!(
        "an open answer takes {} bytes, and its decoder's buffer while an event is unfinished",
        size_of::<headgate_upstream::Answer>()
    );
}

/// The share of both that is neither's: the same events out of memory, in pieces of one read.
fn decode_alone(piece: &str) -> usize {
    let mut frames = sse::Decoder::new(sse::Limits::default());
    let (mut head, mut batch, mut events) = (Head::default(), Batch::new(), 0);
    for _ in 0..EVENTS / 64 {
        batch.clear();
        frames.push(piece.as_bytes());
        while let Some(frame) = frames.next().expect("well-formed events") {
            openai::decode(frame.data, &mut head, &mut batch).expect("well-formed chunks");
        }
        events += batch.events().len();
    }
    events
}

fn ns_per_event(run: impl FnOnce()) -> u64 {
    let before = thread_cpu_ns();
    run();
    (thread_cpu_ns() - before) / EVENTS as u64
}

/// Time this thread has run, in nanoseconds: the first field of its schedstat.
fn thread_cpu_ns() -> u64 {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").expect("Linux with schedstat");
    stat.split(' ').next().and_then(|ns| ns.parse().ok()).expect("nanoseconds")
}

async fn by_hand(server: SocketAddr) -> usize {
    let endpoints = vec![format!("http://{server}").parse().expect("a URI")];
    let mut settings = Settings { endpoints, ..Settings::default() };
    settings.health.interval = None;
    let upstream = Upstream::new("model", settings).expect("an upstream");
    let prompt = Prompt::new(TurnId::fresh(), SessionId::fresh(), vec![Message::new(Role::User, "hello")]);
    let mut answer = upstream.open(&prompt).await.expect("an answer");
    let (mut batch, mut events) = (Batch::new(), 0);
    while answer.next(&mut batch).await.expect("events") {
        events += batch.events().len();
    }
    events
}

async fn by_hyper(server: SocketAddr) -> usize {
    let tcp = TcpStream::connect(server).await.expect("a connection");
    let (mut send, connection) =
        hyper::client::conn::http1::Builder::new().max_buf_size(64 << 10).handshake(TokioIo::new(tcp)).await.expect("a handshake");
    let mut connection = Box::pin(connection);
    let request = hyper::Request::post("/").header("host", "x").body(Full::new(Bytes::from_static(b"{}"))).expect("a request");
    let mut sent = Box::pin(send.send_request(request));
    let response = tokio::select! {
        response = &mut sent => response,
        _ = &mut connection => sent.await,
    };
    let mut body = response.expect("a response").into_body();
    let mut frames = sse::Decoder::new(sse::Limits::default());
    let (mut head, mut batch, mut events) = (Head::default(), Batch::new(), 0);
    loop {
        let frame = std::future::poll_fn(|cx| {
            let polled = Pin::new(&mut body.frame()).poll(cx);
            if polled.is_ready() {
                return polled;
            }
            let _ = connection.as_mut().poll(cx);
            Pin::new(&mut body.frame()).poll(cx)
        })
        .await;
        let Some(Ok(frame)) = frame else { return events };
        let Some(data) = frame.data_ref() else { continue };
        batch.clear();
        frames.push(data);
        while let Some(frame) = frames.next().expect("well-formed events") {
            if let Step::Done = openai::decode(frame.data, &mut head, &mut batch).expect("well-formed chunks") {
                return events + batch.events().len();
            }
        }
        events += batch.events().len();
    }
}

fn event() -> String {
    let chunk = r#"{"id":"chatcmpl-8f3c2a","object":"chat.completion.chunk","created":1763712000,"model":"demo","system_fingerprint":null,"choices":[{"index":0,"delta":{"content":" word"},"logprobs":null,"finish_reason":null}]}"#;
    format!("data: {chunk}\n\n")
}

/// Answers every request with the same burst: one chunk per event, many chunks per write.
fn serve() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address");
    let chunk = format!("{:x}\r\n{}\r\n", event().len(), event());
    let mut response = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n".to_vec();
    response.extend_from_slice(chunk.repeat(EVENTS).as_bytes());
    response.extend_from_slice(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n");
    std::thread::spawn(move || {
        for tcp in listener.incoming() {
            let (mut tcp, response) = (tcp.expect("a connection"), response.clone());
            std::thread::spawn(move || {
                let mut request = [0; 4096];
                if tcp.read(&mut request).is_ok_and(|n| n > 0) {
                    let _ = tcp.write_all(&response);
                }
            });
        }
    });
    address
}
