//! What becomes of a turn is on disk: its beginning before anything is done for it, its end exactly once.

use std::{
    fs::File,
    io,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
};

use headgate_contracts::TurnId;
use headgate_orchestrator::{
    Models, Settings,
    events::{self, Follow, Log, Sync, verify},
};
use headgate_testkit::{
    client::{Http1, Request, ask},
    dialect::{Answer, Cut},
    soon,
    upstream::{Script, Upstream},
};
use serde_json::Value;

use crate::desk::{Desk, upstream};

async fn keeping(model: &Upstream, folder: &Path, sync: Sync) -> Desk {
    let settings = events::Settings { folder: folder.to_owned(), cap: events::Settings::LEAST_CAP, turns: 16, topic: None, keys: None };
    let (log, _) = Log::open_with(&settings, sync).unwrap();
    Desk::keeping(Models::new(upstream(&model.url())), Settings::default(), log).await
}

/// The types of the events of a turn, and the facts of the last.
fn kept(folder: &Path, turn: &str) -> (Vec<String>, Value) {
    let mut log = Follow::open(folder).unwrap();
    let turn: TurnId = turn.parse().unwrap();
    let all = std::iter::from_fn(|| log.next_entry().unwrap()).filter(|entry| entry.turn == turn);
    let events: Vec<Value> = all.map(|entry| serde_json::from_slice(&entry.event).unwrap()).collect();
    let kinds = events.iter().map(|event| event["type"].as_str().unwrap().to_owned()).collect();
    (kinds, events.last().map(|event| event["data"].clone()).unwrap_or_default())
}

#[tokio::test]
async fn the_events_of_a_turn_say_how_it_went_and_nothing_that_was_said() {
    let model = Upstream::always(Script::stream(Answer::openai("demo", &["canary", "canary"]).cut(Cut::Whole))).await;
    let folder = tempfile::tempdir().unwrap();
    let mut desk = keeping(&model, folder.path(), Box::new(File::sync_data)).await;
    let (streamed, whole) = (desk.turn("s1", "canary"), desk.turn("s2", "canary").step());
    streamed.text().await;
    assert_eq!(whole.reply().await.status, 200);
    let ids = [streamed.id.clone(), whole.id.clone()];
    drop((streamed, whole));
    desk.shut_down().await.unwrap();
    for turn in &ids {
        let (kinds, data) = kept(folder.path(), turn);
        assert_eq!(kinds, ["turn.accepted.v1", "verdict.input.v1", "turn.completed.v1"]);
        assert_eq!((data["finish"].as_str(), data["text_bytes"].as_u64(), data["model"].as_str()), (Some("stop"), Some(12), Some("demo")));
    }
    let mut log = Follow::open(folder.path()).unwrap();
    while let Some(entry) = log.next_entry().unwrap() {
        assert!(!String::from_utf8(entry.event).unwrap().contains("canary"));
    }
    let judged = verify(folder.path()).unwrap();
    assert!(judged.is_good() && judged.open.is_empty(), "{judged:?}");
}

#[tokio::test]
async fn a_turn_that_is_left_is_cancelled_and_one_whose_model_breaks_has_failed() {
    let model = Upstream::each([Script::new().read().sse().stall(), Script::new().read().reset()]).await;
    let folder = tempfile::tempdir().unwrap();
    let mut desk = keeping(&model, folder.path(), Box::new(File::sync_data)).await;
    let left = desk.turn("s1", "one");
    let mut client = Http1::connect(desk.addr).await;
    client.send(&left.request()).await;
    model.request(0).await;
    drop(client);
    desk.idle().await;
    let broken = desk.turn("s2", "two");
    assert_eq!(broken.reply().await.status, 502);
    let ids = [left.id.clone(), broken.id.clone()];
    drop((left, broken));
    desk.shut_down().await.unwrap();
    let (kinds, data) = kept(folder.path(), &ids[0]);
    assert_eq!((kinds[2].as_str(), data["reason"].as_str()), ("turn.cancelled.v1", Some("left")));
    let (kinds, data) = kept(folder.path(), &ids[1]);
    assert_eq!((kinds[2].as_str(), data["reason"].as_str()), ("turn.failed.v1", Some("fault")));
}

#[tokio::test]
async fn no_model_is_asked_and_nothing_is_answered_before_the_beginning_is_durable() {
    let model = Upstream::always(Script::stream(Answer::openai("demo", &["yes"]).cut(Cut::Whole))).await;
    let folder = tempfile::tempdir().unwrap();
    let (written, mut asked) = tokio::sync::mpsc::unbounded_channel();
    let (pass, gate) = mpsc::channel::<()>();
    let sync = move |file: &File| {
        let _ = written.send(());
        let _ = gate.recv();
        file.sync_data()
    };
    let desk = keeping(&model, folder.path(), Box::new(sync)).await;
    let turn = desk.turn("s1", "one");
    let mut client = Http1::connect(desk.addr).await;
    client.send(&turn.request()).await;
    soon(asked.recv(), "the disk to be asked").await.unwrap();
    // The turn waits for the disk and for nothing else.
    assert_eq!((model.opened(), desk.decided("stream", "accepted")), (0, 0));
    drop(pass);
    assert_eq!(soon(client.reply(), "the answer").await.unwrap().status, 200);
    assert_eq!(model.opened(), 1);
}

#[tokio::test]
async fn while_the_disk_does_not_take_writes_turns_are_refused_and_probes_are_told() {
    let model = Upstream::always(Script::stream(Answer::openai("demo", &["yes"]).cut(Cut::Whole))).await;
    let folder = tempfile::tempdir().unwrap();
    let broken = Arc::new(AtomicBool::new(false));
    let breaks = broken.clone();
    let sync = move |file: &File| match breaks.load(Ordering::SeqCst) {
        true => Err(io::Error::from_raw_os_error(5)),
        false => file.sync_data(),
    };
    let desk = keeping(&model, folder.path(), Box::new(sync)).await;
    assert_eq!(desk.turn("s1", "one").reply().await.status, 200);
    broken.store(true, Ordering::SeqCst);
    let reply = desk.turn("s1", "two").reply().await;
    assert_eq!((reply.status, reply.problem().as_deref()), (503, Ok("event_log_unavailable")));
    assert_eq!(model.opened(), 1, "nothing was done for it");
    let ready = ask(desk.addr, &Request::get("/readyz")).await.unwrap();
    assert_eq!((ready.status, ready.text().contains("event log")), (503, true));
    assert_eq!(desk.metric("orchestrator_event_log_sealed"), 1);
    assert_eq!(desk.decided("stream", "busy"), 1);
}

#[tokio::test]
async fn a_turn_id_that_was_taken_before_is_a_conflict() {
    let model = Upstream::always(Script::stream(Answer::openai("demo", &["yes"]).cut(Cut::Whole))).await;
    let folder = tempfile::tempdir().unwrap();
    let desk = keeping(&model, folder.path(), Box::new(File::sync_data)).await;
    let turn = desk.turn("s1", "one");
    turn.text().await;
    desk.idle().await;
    // With a verdict of its own, so that only the log can know.
    let again = turn.reply().await;
    assert_eq!((again.status, again.problem().as_deref()), (409, Ok("turn_conflict")));
}
