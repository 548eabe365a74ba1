//! Leaving the stage: what runs ends whole, what is new goes elsewhere, and nothing is left behind.

use std::{
    fmt::Write,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use headgate_testkit::{
    answer::{Judge, Kind, Transcript},
    at_once,
    client::{Events, Http1, Request, ask, stream},
    dialect::Answer,
    services::{Program, Ready, Service, Signal, free_addr},
    soon,
    upstream::{Script, Upstream},
};
use tokio::{net::TcpStream, sync::Notify, task::JoinSet};

use crate::support::{Gateway, Setup};

const SECOND: Duration = Duration::from_secs(1);

/// A model that begins, and goes on when it is told to.
fn halting(go: &Arc<Notify>) -> Script {
    let events = Answer::openai("demo", &["Hello", " there"]).events();
    Script::new().read().sse().send(events[..2].concat()).wait(go).send(events[2..].concat()).end()
}

/// As many streams as that, each of them under way.
async fn under_way(addr: SocketAddr, streams: usize) -> Vec<Events> {
    let mut all = Vec::new();
    for _ in 0..streams {
        let mut events = stream(addr, &Request::turn("hi"), Kind::Client).await.unwrap();
        while events.expect().await.name != "text" {}
        all.push(events);
    }
    all
}

async fn rest(all: Vec<Events>) -> Vec<Transcript> {
    let mut reading: JoinSet<Transcript> = all.into_iter().map(|events| async { events.rest().await.unwrap() }).collect();
    let mut read = Vec::new();
    while let Some(transcript) = reading.join_next().await {
        read.push(transcript.unwrap());
    }
    read
}

#[tokio::test]
async fn streams_under_way_end_whole_while_nothing_new_is_taken() {
    let go = Arc::new(Notify::new());
    let upstream = Upstream::always(halting(&go)).await;
    let gateway = Setup::new().start(&upstream.url()).await;
    let all = under_way(gateway.addr, 50).await;
    let mut kept = Http1::connect(gateway.addr).await;
    kept.send(&Request::get("/nowhere")).await;
    assert_eq!(kept.reply().await.unwrap().status, 404);
    let Gateway { addr, admin, process, folder } = gateway;
    assert_eq!(ask(admin, &Request::get("/readyz")).await.unwrap().status, 200);
    let stopped = tokio::spawn(process.stop());
    kept.closed().await.expect("an idle connection is closed properly");
    assert_eq!(ask(admin, &Request::get("/readyz")).await.unwrap().status, 503);
    assert_eq!(ask(admin, &Request::get("/healthz")).await.unwrap().status, 200, "it is alive");
    let refused = async {
        while TcpStream::connect(addr).await.is_ok() {
            tokio::task::yield_now().await
        }
    };
    at_once(refused, "new connections to be refused").await;
    assert!(!stopped.is_finished(), "it waits for its streams");
    let telling = async {
        loop {
            go.notify_waiters();
            tokio::task::yield_now().await;
        }
    };
    let all = tokio::select! { all = rest(all) => all, () = telling => unreachable!() };
    assert!(all.iter().all(|answer| answer.text() == "Hello there" && answer.outcome() == "allowed"));
    assert!(at_once(stopped, "the gateway to stop").await.unwrap(), "all ended by themselves");
    drop(folder);
}

#[tokio::test]
async fn over_the_drain_time_streams_are_told_and_the_gateway_stops_all_the_same() {
    let go = Arc::new(Notify::new());
    let upstream = Upstream::always(halting(&go)).await;
    let gateway = Setup::new().top("drain: { timeout: 1s }").start(&upstream.url()).await;
    let all = under_way(gateway.addr, 5).await;
    let Gateway { process, folder, .. } = gateway;
    let stopped = tokio::spawn(process.stop());
    for answer in rest(all).await {
        assert_eq!((answer.text().as_str(), answer.error()), ("Hello", Some("draining")));
    }
    at_once(upstream.idle(), "the models to be stopped").await;
    assert!(!at_once(stopped, "the gateway to stop").await.unwrap(), "not by themselves");
    drop(folder);
}

/// The real program in front of `url`.
struct Running {
    service: Service,
    clients: SocketAddr,
    admin: SocketAddr,
}

async fn run(url: &str, top: &str) -> Running {
    let (clients, admin) = (free_addr(), free_addr());
    let mut yaml = String::new();
    let _ = write!(
        yaml,
        "listen: {clients}\nadmin: {{ listen: \"{admin}\" }}\nworkers: 2\n{top}upstreams:\n  model: {{ protocol: openai, endpoints: [\"{url}\"], \
         health: {{ interval: 0s }}, idle: {{ max: 0 }} }}\nroutes:\n  - path: /v1/chat/stream\n    upstream: model\n    \
         filters:\n      - moderation: {{ mask: [credit_card] }}\n"
    );
    let program = Program::at(env!("CARGO_BIN_EXE_headgate"));
    let config = program.file("headgate.yaml", yaml);
    let service = program.argument("run").argument(config).start(Ready::Line("\"message\":\"running\"".into())).await;
    Running { service, clients, admin }
}

/// Lines of turns in the program's log.
fn lines(output: &str) -> Vec<serde_json::Value> {
    let lines = output.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    lines.filter(|line| line["target"] == "headgate::turn").collect()
}

#[tokio::test]
async fn the_program_drains_when_it_is_told_to_terminate_and_says_how_every_turn_ended() {
    let go = Arc::new(Notify::new());
    let upstream = Upstream::always(halting(&go)).await;
    let mut running = run(&upstream.url(), "").await;
    let mut all = under_way(running.clients, 3).await;
    all.remove(0).into_inner().abort();
    at_once(upstream.closed(1), "the model to be stopped").await;
    running.service.signal(Signal::Terminate);
    running.service.line("draining").await;
    let telling = async {
        loop {
            go.notify_waiters();
            tokio::task::yield_now().await;
        }
    };
    let all = tokio::select! { all = rest(all) => all, () = telling => unreachable!() };
    assert!(all.iter().all(|answer| answer.text() == "Hello there"));
    assert_eq!(soon(running.service.exited(), "the program to end").await.code(), Some(0));
    let lines = lines(&running.service.output());
    let mut ends: Vec<_> = lines.iter().map(|line| (line["end"].as_str().unwrap(), line["code"].as_str().unwrap())).collect();
    ends.sort_unstable();
    assert_eq!(ends, [("cancelled", "client_closed"), ("complete", "ok"), ("complete", "ok")], "one line each");
}

#[tokio::test]
async fn the_program_says_when_turns_had_to_be_cut_and_stops_at_once_at_the_second_signal() {
    let go = Arc::new(Notify::new());
    let upstream = Upstream::always(halting(&go)).await;
    let mut running = run(&upstream.url(), "drain: { timeout: 1s }\n").await;
    let all = under_way(running.clients, 1).await;
    running.service.signal(Signal::Terminate);
    assert_eq!(rest(all).await[0].error(), Some("draining"));
    assert_eq!(soon(running.service.exited(), "the program to end").await.code(), Some(1));

    let mut running = run(&upstream.url(), "").await;
    let all = under_way(running.clients, 1).await;
    running.service.signal(Signal::Terminate);
    running.service.line("draining").await;
    running.service.signal(Signal::Terminate);
    assert_eq!(at_once(running.service.exited(), "the program to end").await.code(), Some(1));
    drop(all);
}

#[tokio::test]
async fn after_two_hundred_streams_memory_and_descriptors_are_what_they_were() {
    let answered = Arc::new(AtomicUsize::new(0));
    let upstream = Upstream::answering({
        let answered = answered.clone();
        move |_| {
            // Half of them end, half of them are left.
            let events = Answer::openai("demo", &vec!["word "; 50]).events();
            match answered.fetch_add(1, Ordering::Relaxed) % 2 {
                0 => Script::new().sse().send_all(events).end().close(),
                _ => Script::new().sse().send(events[..2].concat()).stall(),
            }
        }
    })
    .await;
    let running = run(&upstream.url(), "").await;
    let round = async || {
        let mut open: JoinSet<()> = (0..200)
            .map(|_| {
                let addr = running.clients;
                async move {
                    let mut client = Http1::connect(addr).await;
                    client.send(&Request::turn("hi")).await;
                    let mut events = client.events(Judge::new(Kind::Client)).await.unwrap();
                    while events.expect().await.name != "text" {}
                    // The one that is whole is read on; the other one says no more.
                    let _ =
                        tokio::time::timeout(SECOND / 4, async { while events.next().await.is_ok_and(|event| event.is_some()) {} }).await;
                }
            })
            .collect();
        while let Some(done) = open.join_next().await {
            done.unwrap();
        }
        soon(upstream.idle(), "every model to be stopped").await;
        let idle = async {
            loop {
                let metrics = ask(running.admin, &Request::get("/metrics")).await.unwrap().text();
                let none = |name: &str| metrics.lines().filter(|line| line.starts_with(name)).all(|line| line.ends_with(" 0"));
                if none("headgate_connections ") && none("headgate_open_turns{") {
                    return;
                }
            }
        };
        soon(idle, "every connection to be closed").await;
        (running.service.resident_bytes(), running.service.open_descriptors())
    };
    // Allocators take a few rounds to have what they need. What is leaked by every stream grows with every round.
    const LEAST_LEAK_BYTES: u64 = 1 << 10;
    let (mut sizes, mut descriptors) = (Vec::new(), Vec::new());
    let levelled_out = loop {
        let (bytes, open) = round().await;
        sizes.push(bytes);
        descriptors.push(open);
        if let [.., before, _, _, after] = sizes[..]
            && after < before + 3 * 200 * LEAST_LEAK_BYTES
        {
            break true;
        }
        if sizes.len() == 20 {
            break false;
        }
    };
    assert!(levelled_out, "{sizes:?}");
    let (first, last) = (descriptors[0], descriptors[descriptors.len() - 1]);
    assert!(last <= first + 2, "{descriptors:?}");
}
