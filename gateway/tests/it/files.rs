//! A gateway that the system lets open few files, and more clients than it has room for.

use std::{sync::Arc, time::Duration};

use headgate_testkit::{
    answer::Kind,
    client::{Http1, Request, ask, stream},
    dialect::Answer,
    services::{Program, Ready, free_addr},
    soon,
    upstream::{Script, Upstream},
};
use tokio::{sync::Notify, time::Instant};

#[tokio::test]
async fn with_few_files_streams_go_on_operators_are_answered_and_nothing_spins() {
    let go = Arc::new(Notify::new());
    let mut events = Answer::openai("demo", &["Hello", " world"]).events();
    let rest = events.split_off(2);
    let waits = Script::new().read().sse().send(events.concat()).wait(&go).send(rest.concat()).end().close();
    let upstream = Upstream::each([waits, Script::stream(Answer::openai("demo", &["again"]).events())]).await;
    let (addr, admin) = (free_addr(), free_addr());
    let program = Program::at("/bin/sh");
    let config = format!(
        "listen: {addr}\nadmin: {{ listen: \"{admin}\" }}\nworkers: 2\nupstreams:\n  model: {{ protocol: openai, endpoints: [\"{}\"], health: {{ interval: 0s }} }}\n\
         routes:\n  - {{ path: /v1/chat/stream, upstream: model }}\n",
        upstream.url()
    );
    let file = program.file("headgate.yaml", config);
    let script = format!("ulimit -n 256 && exec {} run {}", env!("CARGO_BIN_EXE_headgate"), file.display());
    let gateway = program.arguments(["-c", &script]).start(Ready::Connects(addr)).await;
    gateway.line("allows fewer connections").await;

    let mut open = stream(addr, &Request::turn("hi"), Kind::Client).await.unwrap();
    while open.expect().await.name != "text" {}
    let mut clients = Vec::new();
    for _ in 0..400 {
        clients.push(Http1::connect(addr).await);
    }
    // The last one is one too many: when it is closed, nobody is waiting to be taken any more.
    clients[399].closed().await.expect("a proper end");
    let (before, begun) = (gateway.computed(), Instant::now());
    while begun.elapsed() < Duration::from_secs(1) {
        // Each call is a connection of its own, which needs a file.
        assert_eq!(ask(admin, &Request::get("/healthz")).await.unwrap().status, 200);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let computed = gateway.computed() - before;
    assert!(computed < begun.elapsed() / 5, "{computed:?} in {:?}", begun.elapsed());
    assert!(gateway.open_descriptors() < 256);
    go.notify_one();
    assert_eq!(open.rest().await.unwrap().text(), "Hello world");

    drop(clients);
    let recovered = async {
        loop {
            if let Ok(events) = stream(addr, &Request::turn("hi"), Kind::Client).await {
                return events.rest().await.unwrap().text();
            }
            tokio::task::yield_now().await;
        }
    };
    assert_eq!(soon(recovered, "new clients to be taken").await, "again");
}
