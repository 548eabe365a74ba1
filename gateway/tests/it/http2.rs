//! Many turns on one HTTP/2 connection.

use std::time::Duration;

use headgate_testkit::{
    answer::{Judge, Kind},
    client::{Http2, Request},
    dialect::{Answer, Cut},
    upstream::{Script, Upstream},
    within,
};

use crate::support::{Setup, end};

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
    within(Duration::from_secs(1), upstream.closed(1), "the model to be stopped").await;
    let one = async {
        while gateway.open().await != 1 {
            tokio::task::yield_now().await
        }
    };
    within(Duration::from_secs(1), one, "its turn to end").await;
    assert_eq!(upstream.open(), 1);
    drop((staying, client));
    within(Duration::from_secs(1), upstream.closed(2), "the other model to be stopped").await;
    assert_eq!(gateway.ended().await, [end("cancelled", "client_closed", 2)]);
}
