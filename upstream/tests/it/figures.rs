//! Figures, not checks: what an event costs over each hop, and how long one may be kept. `docs/decisions` has them, in
//! `0120-a-task-reads-a-shared-socket.md` and `0243-quick-events-share-an-acknowledgement.md`.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::mpsc,
    time::{Duration, Instant},
};

use futures_util::StreamExt;
use headgate_contracts::{
    Batch, Head, What,
    wire::{chat, hop::AnswerFrame},
};
use headgate_testkit::hop::{frame, wire};
use headgate_upstream::{Hop, Protocol, Upstream};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::protocol::{Role, WebSocketConfig},
};

use crate::prompt;

const TURNS: usize = 64;
const ROUNDS: usize = 200;
const TEXT: &str = r#"{"text":" word"}"#;
const DONE: &str = r#"{"finish":"stop"}"#;

/// How the turns speak: one after the other, or all of them at once.
#[derive(Debug, Clone, Copy)]
enum Pace {
    Apart,
    Together,
}

impl Pace {
    fn between_turns(self) {
        if let Pace::Apart = self {
            std::thread::sleep(Duration::from_micros(100));
        }
    }
    fn between_rounds(self) {
        if let Pace::Together = self {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// CPU time of this thread so far. Source: `/proc/thread-self/schedstat`, its first number, in nanoseconds.
fn cpu() -> Duration {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    Duration::from_nanos(stat.split(' ').next().unwrap().parse().unwrap())
}

/// Takes a connection, reads its request, and begins an answer.
fn answering(listener: &TcpListener) -> TcpStream {
    let (mut tcp, _) = listener.accept().unwrap();
    tcp.set_nodelay(true).unwrap();
    let mut reader = BufReader::new(tcp.try_clone().unwrap());
    let mut length = 0;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().unwrap();
        }
        if line == "\r\n" {
            break;
        }
    }
    reader.read_exact(&mut vec![0; length]).unwrap();
    tcp.write_all(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\nevent: open\ndata: {\"model\":\"m\"}\n\n").unwrap();
    tcp
}

/// Serves `TURNS` connections of server-sent events.
fn events(listener: &TcpListener, pace: Pace) {
    let mut turns: Vec<TcpStream> = (0..TURNS).map(|_| answering(listener)).collect();
    for round in 0..=ROUNDS {
        let (name, object) = if round == ROUNDS { ("done", DONE) } else { ("text", TEXT) };
        for tcp in &mut turns {
            tcp.write_all(format!("event: {name}\ndata: {object}\n\n").as_bytes()).unwrap();
            pace.between_turns();
        }
        pace.between_rounds();
    }
}

/// Serves one socket of `TURNS` turns.
fn frames(listener: &TcpListener, pace: Pace) {
    let (tcp, _) = listener.accept().unwrap();
    tcp.set_nodelay(true).unwrap();
    let mut socket = tokio_tungstenite::tungstenite::accept(tcp.try_clone().unwrap()).unwrap();
    let mut tcp = tcp;
    let mut turns = Vec::new();
    while turns.len() < TURNS {
        let message = socket.read().unwrap();
        let Ok(text) = message.to_text() else { continue };
        let Some((_, rest)) = text.split_once("\"turn_id\":\"") else { continue };
        turns.push(rest[..36].to_owned());
        tcp.write_all(&wire([frame(turns.last().unwrap(), 0, "open", r#"{"model":"m"}"#)])).unwrap();
    }
    for round in 0..=ROUNDS {
        let (name, object) = if round == ROUNDS { ("done", DONE) } else { ("text", TEXT) };
        for turn in &turns {
            tcp.write_all(&wire([frame(turn, round as u64 + 1, name, object)])).unwrap();
            pace.between_turns();
        }
        pace.between_rounds();
    }
    // Until the other side has gone: a close would be an end before its time.
    while socket.read().is_ok() {}
}

/// CPU per event of reading all turns, in microseconds.
fn measured(hop: Hop, pace: Pace) -> f64 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let server = std::thread::spawn(move || match hop {
        Hop::Events => events(&listener, pace),
        Hop::WebSocket => frames(&listener, pace),
    });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let spent = runtime.block_on(async {
        let upstream: Upstream = crate::upstream(&[url], |settings| (settings.protocol, settings.hop) = (Protocol::Orchestrator, hop));
        let mut answers = futures_util::future::join_all((0..TURNS).map(|_| async { upstream.open(&prompt()).await.unwrap() })).await;
        let begun = cpu();
        let reading = answers.drain(..).map(|mut answer| {
            tokio::spawn(async move {
                let mut batch = Batch::new();
                let mut heard = 0;
                while answer.next(&mut batch).await.unwrap() {
                    heard += batch.events().len();
                }
                assert!(heard >= ROUNDS);
            })
        });
        for reading in reading.collect::<Vec<_>>() {
            reading.await.unwrap();
        }
        cpu() - begun
    });
    drop(runtime);
    server.join().unwrap();
    spent.as_secs_f64() * 1e6 / (TURNS * ROUNDS) as f64
}

/// The same without a task: every turn has a socket of its own and reads it itself, which is the least that turns which read for each
/// other could cost.
fn alone(pace: Pace) -> f64 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr: SocketAddr = listener.local_addr().unwrap();
    let (go, told) = mpsc::channel::<()>();
    let server = std::thread::spawn(move || {
        let mut turns: Vec<TcpStream> = (0..TURNS).map(|_| listener.accept().unwrap().0).collect();
        told.recv().unwrap();
        for round in 0..=ROUNDS {
            let (name, object) = if round == ROUNDS { ("done", DONE) } else { ("text", TEXT) };
            for tcp in &mut turns {
                let _ = tcp.set_nodelay(true);
                let turn = "0193a5f0-7e1c-7000-8000-000000000000";
                tcp.write_all(&wire([frame(turn, round as u64 + 1, name, object)])).unwrap();
                pace.between_turns();
            }
            pace.between_rounds();
        }
    });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let spent = runtime.block_on(async {
        let config = WebSocketConfig::default().read_buffer_size(16 << 10);
        let mut sockets = Vec::new();
        for _ in 0..TURNS {
            let tcp = tokio::net::TcpStream::connect(addr).await.unwrap();
            sockets.push(WebSocketStream::from_raw_socket(tcp, Role::Client, Some(config)).await);
        }
        go.send(()).unwrap();
        let begun = cpu();
        let reading = sockets.drain(..).map(|mut socket| {
            tokio::spawn(async move {
                let (mut head, mut batch, mut object) = (Head::default(), Batch::new(), String::new());
                while let Some(Ok(message)) = socket.next().await {
                    let frame = AnswerFrame::parse(message.to_text().unwrap()).unwrap();
                    object.clear();
                    frame.object(&mut object);
                    batch.clear();
                    chat::decode(frame.name, &object, &mut head, &mut batch).unwrap();
                    if frame.name == "done" {
                        break;
                    }
                }
            })
        });
        for reading in reading.collect::<Vec<_>>() {
            reading.await.unwrap();
        }
        cpu() - begun
    });
    server.join().unwrap();
    spent.as_secs_f64() * 1e6 / (TURNS * ROUNDS) as f64
}

#[test]
#[ignore = "measures; prints what an event costs over each hop: cargo test -p headgate-upstream --test it -- --ignored --nocapture figure"]
fn a_figure_of_what_an_event_costs_over_each_hop() {
    for pace in [Pace::Apart, Pace::Together] {
        for _ in 0..3 {
            let (events, socket, alone) = (measured(Hop::Events, pace), measured(Hop::WebSocket, pace), alone(pace));
            eprintln!("{pace:?}: events {events:.1} µs, socket with its task {socket:.1} µs, a socket each without a task {alone:.1} µs");
        }
    }
}

#[test]
#[ignore = "measures; prints how long events are kept by who waits for acknowledgements: cargo test -p headgate-upstream --test it -- --ignored --nocapture figure"]
fn a_figure_of_how_long_events_wait_for_acknowledgements() {
    for (nodelay, gap_ms) in [(true, 5), (true, 20), (false, 1), (false, 5), (false, 20), (false, 60)] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let server = std::thread::spawn(move || {
            let mut tcp = answering(&listener);
            tcp.set_nodelay(nodelay).unwrap();
            (0..=ROUNDS)
                .map(|round| {
                    std::thread::sleep(Duration::from_millis(gap_ms));
                    let (name, object) = if round == ROUNDS { ("done", DONE) } else { ("text", TEXT) };
                    let sent = Instant::now();
                    tcp.write_all(format!("event: {name}\ndata: {object}\n\n").as_bytes()).unwrap();
                    sent
                })
                .collect::<Vec<_>>()
        });
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let heard = runtime.block_on(async {
            let upstream = crate::upstream(&[url], |settings| settings.protocol = Protocol::Orchestrator);
            let (mut answer, mut batch, mut heard) = (upstream.open(&prompt()).await.unwrap(), Batch::new(), Vec::new());
            while answer.next(&mut batch).await.unwrap() {
                let text = batch.events().iter().filter(|event| matches!(event.what, What::Text { .. })).count();
                heard.extend(std::iter::repeat_n(Instant::now(), text));
            }
            heard
        });
        let sent = server.join().unwrap();
        let kept: Vec<f64> = sent.iter().zip(heard).map(|(sent, heard)| heard.duration_since(*sent).as_secs_f64() * 1e3).collect();
        let (late, longest) = (kept.iter().filter(|kept| **kept > 10.0).count(), kept.iter().copied().fold(0.0, f64::max));
        eprintln!(
            "TCP_NODELAY {nodelay}, an event per {gap_ms} ms: {late} of {ROUNDS} kept for more than 10 ms, the longest for {longest:.1}"
        );
    }
}
