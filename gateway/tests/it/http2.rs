//! Many turns on one HTTP/2 connection.

use std::{sync::Arc, time::Duration};

use headgate_testkit::{
    answer::{Judge, Kind},
    at_once,
    client::{Events, Http1, Http2, Request, stream},
    dialect::{Answer, Cut},
    frames::{END_HEADERS, END_STREAM, End, Frame, Frames, kind},
    soon,
    upstream::{Script, Upstream},
    within,
};
use tokio::sync::Notify;

use crate::support::{Gateway, Setup, end, start};

const TURN: &str = "{\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}]}";

#[tokio::test]
async fn fifty_turns_of_small_events_run_at_once_beside_one_that_is_not_read() {
    // Servers that charge small frames to the connection break here.
    let texts = vec!["word "; 200];
    let upstream = Upstream::always(Script::stream(Answer::openai("demo", &texts).cut(Cut::Events))).await;
    let gateway = Setup::new().start(&upstream.url()).await;
    let mut client = Http2::connect(gateway.addr).await;
    let unread = client.events(&Request::turn("hi"), Judge::new(Kind::Client)).await.unwrap();
    let mut all = Vec::new();
    for _ in 0..50 {
        all.push(client.events(&Request::turn("hi"), Judge::new(Kind::Client)).await.unwrap());
    }
    for events in all {
        assert_eq!(events.rest().await.unwrap().text().len(), 200 * 5);
    }
    assert_eq!(unread.rest().await.unwrap().text().len(), 200 * 5);
    assert_eq!(gateway.ended().await, [end("complete", "ok", 51)]);
}

#[tokio::test]
async fn a_stream_that_is_reset_stops_its_model_and_no_other() {
    let begun = Answer::openai("demo", &["Hello"]).events()[..2].concat();
    let upstream = Upstream::always(Script::new().read().sse().send(begun).stall()).await;
    let gateway = Setup::new().start(&upstream.url()).await;
    let mut client = Http2::connect(gateway.addr).await;
    let mut leaving = client.events(&Request::turn("hi"), Judge::new(Kind::Client)).await.unwrap();
    let mut staying = client.events(&Request::turn("hi"), Judge::new(Kind::Client)).await.unwrap();
    for events in [&mut leaving, &mut staying] {
        while events.expect().await.name != "text" {}
    }
    drop(leaving);
    at_once(upstream.closed(1), "the model to be stopped").await;
    let one = async {
        while gateway.open().await != 1 {
            tokio::task::yield_now().await
        }
    };
    at_once(one, "its turn to end").await;
    assert_eq!(upstream.open(), 1);
    drop((staying, client));
    at_once(upstream.closed(2), "the other model to be stopped").await;
    assert_eq!(gateway.ended().await, [end("cancelled", "client_closed", 2)]);
}

/// A gateway, a turn of a neighbour that has begun, and what lets it go on.
async fn besieged() -> (Gateway, Upstream, Events<Http1>, Arc<Notify>) {
    let go = Arc::new(Notify::new());
    let mut events = Answer::openai("demo", &["Hello", " world"]).events();
    let rest = events.split_off(2);
    let upstream = Upstream::always(Script::new().read().sse().send(events.concat()).wait(&go).send(rest.concat()).end()).await;
    let gateway = Setup::new().start(&upstream.url()).await;
    let mut neighbour = stream(gateway.addr, &Request::turn("hi"), Kind::Client).await.unwrap();
    while neighbour.expect().await.name != "text" {}
    (gateway, upstream, neighbour, go)
}

/// An odd number for every round: a client's streams.
fn nth(round: u32) -> u32 {
    2 * round + 1
}

#[tokio::test]
async fn a_connection_that_attacks_is_ended_and_its_neighbours_do_not_notice() {
    type Attack = fn(u32) -> Vec<Frame>;
    let attacks: [(&str, Attack); 6] = [
        ("streams reset before their bodies", |round| {
            vec![Frame::post(nth(round), "/v1/chat/stream"), Frame::new(kind::RST_STREAM, 0, nth(round), &[0, 0, 0, 8][..])]
        }),
        ("turns reset as soon as they are sent", |round| {
            vec![
                Frame::post(nth(round), "/v1/chat/stream"),
                Frame::new(kind::DATA, END_STREAM, nth(round), TURN),
                Frame::new(kind::RST_STREAM, 0, nth(round), &[0, 0, 0, 8][..]),
            ]
        }),
        ("streams that make the gateway reset them", |round| {
            // A window that grows by nothing is an error of its stream (section 6.9).
            vec![Frame::post(nth(round), "/v1/chat/stream"), Frame::new(kind::WINDOW_UPDATE, 0, nth(round), &[0; 4][..])]
        }),
        ("a head without an end", |round| match round {
            0 => vec![Frame { flags: 0, ..Frame::post(1, "/v1/chat/stream") }],
            _ => vec![Frame::new(kind::CONTINUATION, 0, 1, &b"\0\x01x\x01y"[..])],
        }),
        ("a body of nothing", |round| match round {
            0 => vec![Frame::post(1, "/v1/chat/stream")],
            _ => vec![Frame::new(kind::DATA, 0, 1, "")],
        }),
        ("a head that is larger than any", |round| match round {
            0 => vec![Frame { flags: 0, ..Frame::post(1, "/v1/chat/stream") }],
            _ => vec![Frame::new(kind::CONTINUATION, 0, 1, [&b"\0\x01x\x7f\x80\x7f"[..], &[b'y'; 16_255]].concat())],
        }),
    ];
    for (what, attack) in attacks {
        let (gateway, upstream, neighbour, go) = besieged().await;
        let client = Frames::connect(gateway.addr).await;
        let ended = client.flood(100_000, Duration::from_secs(5), attack).await;
        assert!(ended.is_some(), "{what} goes on");
        let quiet = async {
            while gateway.process.app.drain().connections() > 1 {
                tokio::task::yield_now().await;
            }
        };
        within(Duration::from_secs(10), quiet, what).await;
        // Of a hundred thousand streams, one in a hundred at most.
        assert!(upstream.requests().len() <= 1_000, "{what}: {} calls", upstream.requests().len());
        go.notify_waiters();
        go.notify_one();
        assert_eq!(neighbour.rest().await.unwrap().text(), "Hello world", "{what}");
    }
}

#[tokio::test]
async fn a_client_that_gives_up_turn_after_turn_and_takes_its_time_is_refused_and_then_cut_off() {
    let upstream = Upstream::always(Script::new().read().stall()).await;
    let gateway = Setup::new().start(&upstream.url()).await;
    let mut client = Frames::connect(gateway.addr).await;
    let turn = |round| [Frame::post(nth(round), "/v1/chat/stream"), Frame::new(kind::DATA, END_STREAM, nth(round), TURN)];
    let reset = |round| [Frame::new(kind::RST_STREAM, 0, nth(round), &[0, 0, 0, 8][..])];
    // Each turn is under way before it is given up, so that no limit of streams that nobody accepted is in question.
    for round in 0..=100 {
        client.send(&turn(round)).await.unwrap();
        soon(upstream.accepted(round as usize + 1), "the model to be asked").await;
        client.send(&reset(round)).await.unwrap();
    }
    soon(upstream.idle(), "every model to be stopped").await;
    while soon(client.next(), "the end to be announced").await.expect("an end that is announced").kind != kind::GOAWAY {}
    // It does not confirm the end, and goes on: nobody is asked any more, and it is cut off.
    let ended = client.flood(1_000, Duration::from_secs(5), |round| [&turn(round + 101)[..], &reset(round + 101)].concat()).await;
    assert!(ended.is_some(), "it goes on");
    assert_eq!(upstream.requests().len(), 101);
}

#[tokio::test]
async fn a_connection_that_only_talks_about_itself_is_an_idle_one() {
    let upstream = Upstream::always(Script::stream(Answer::openai("demo", &["Hello"]).cut(Cut::Events))).await;
    type Talk = fn(u32) -> Vec<Frame>;
    let talks: [(&str, u32, Talk); 3] = [
        ("silence", 0, |_| Vec::new()),
        ("pings", u32::MAX, |_| vec![Frame::new(kind::PING, 0, 0, &[7; 8][..])]),
        ("settings", u32::MAX, |_| vec![Frame::new(kind::SETTINGS, 0, 0, "")]),
    ];
    for (what, most, talk) in talks {
        let (mut plan, folder) = Setup::new().plan(&upstream.url());
        plan.limits.idle = Duration::from_secs(1);
        let gateway = start(&plan, folder).await;
        let mut client = Frames::connect(gateway.addr).await;
        let asked = [Frame { flags: END_HEADERS | END_STREAM, ..Frame::post(1, "/v1/models") }];
        client.send(&asked).await.unwrap();
        while client.next().await.is_some_and(|frame| frame.stream != 1 || frame.flags & END_STREAM == 0) {}
        let ended = client.flood(most, Duration::from_secs(20), talk);
        let ended = within(Duration::from_secs(20), ended, what).await;
        assert_eq!(ended, Some(End::GoAway(0)), "{what}");
    }
}

#[tokio::test]
async fn two_hundred_streams_of_small_events_run_beside_one_that_is_not_read() {
    let texts = vec!["word "; 1_000];
    let upstream = Upstream::always(Script::stream(Answer::openai("demo", &texts).cut(Cut::Events))).await;
    let gateway = Setup::new().start(&upstream.url()).await;
    // Two connections: one takes a hundred streams.
    for _ in 0..2 {
        let mut client = Http2::connect(gateway.addr).await;
        let unread = client.events(&Request::turn("hi"), Judge::new(Kind::Client)).await.unwrap();
        let mut all = Vec::new();
        for _ in 0..99 {
            all.push(client.events(&Request::turn("hi"), Judge::new(Kind::Client)).await.unwrap());
        }
        for events in all {
            assert_eq!(events.rest().await.unwrap().text().len(), 1_000 * 5);
        }
        assert_eq!(unread.rest().await.unwrap().text().len(), 1_000 * 5);
    }
    assert_eq!(gateway.ended().await, [end("complete", "ok", 200)]);
}
