//! Logs of other versions: what one before this wrote is good, and what one after this may add is neither lost nor objected to.

use std::{fs, path::Path};

use headgate_contracts::TurnId;
use serde_json::{Value, json};

use super::{
    Entry, Follow, Log, Settings,
    record::{Part, Record},
    verify,
};

/// The events of one turn as they were recorded, in the order of a log.
const TURN: [(&str, Part); 5] = [
    ("turn.accepted.v1", Part::Begins),
    ("verdict.input.v1", Part::Within),
    ("turn.completed.v1", Part::Ends),
    ("verdict.output.v1", Part::After),
    ("delivery.v1", Part::Settles),
];

fn recorded(kind: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../contracts/recordings/events/{kind}.json"));
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// A log of these events, as another version would have written it.
fn log_of(folder: &Path, events: &[(Value, Part)]) -> Vec<Vec<u8>> {
    let (mut bytes, mut written) = (Vec::new(), Vec::new());
    for (number, (event, part)) in (1..).zip(events) {
        let turn: TurnId = serde_json::from_value(event["subject"].clone()).unwrap();
        let event = serde_json::to_vec(event).unwrap();
        Record { number, durable: number - 1, part: *part, turn, event: &event }.write(&mut bytes);
        written.push(event);
    }
    fs::write(folder.join("0000000001.events"), bytes).unwrap();
    written
}

fn followed(folder: &Path) -> Vec<Vec<u8>> {
    let mut log = Follow::open(folder).unwrap();
    std::iter::from_fn(|| log.next_entry().unwrap()).map(|entry: Entry| entry.event).collect()
}

fn goes_on(folder: &Path) {
    let settings = Settings { folder: folder.to_owned(), cap: Settings::LEAST_CAP, turns: 16, topic: None, keys: None };
    let (log, recovered) = Log::open(&settings).unwrap();
    assert_eq!((recovered.crashed, recovered.torn_bytes), (0, 0));
    drop(log);
    assert!(verify(folder).unwrap().is_good());
}

#[test]
fn a_log_of_this_version_as_it_was_recorded_is_good() {
    let folder = tempfile::tempdir().unwrap();
    let written = log_of(folder.path(), &TURN.map(|(kind, part)| (recorded(kind), part)));
    let judged = verify(folder.path()).unwrap();
    assert!(judged.is_good(), "{:?}", judged.violations);
    assert_eq!((judged.begun, judged.ended, judged.settled, judged.unknown), (1, 1, 1, 0));
    assert_eq!(followed(folder.path()), written);
    goes_on(folder.path());
}

#[test]
fn a_log_from_before_there_were_deliveries_is_good_and_they_are_owed() {
    let folder = tempfile::tempdir().unwrap();
    log_of(folder.path(), &[TURN[0], TURN[1], TURN[2]].map(|(kind, part)| (recorded(kind), part)));
    let judged = verify(folder.path()).unwrap();
    assert!(judged.is_good(), "{:?}", judged.violations);
    assert_eq!((judged.ended, judged.settled, judged.owed.len()), (1, 0, 1));
    goes_on(folder.path());
}

#[test]
fn a_log_of_a_later_version_is_judged_as_far_as_it_is_known_and_passed_on_whole() {
    let later = |kind: &str| {
        let mut event = recorded(kind);
        event["tomorrow"] = "an attribute".into();
        event["data"]["tomorrow"] = json!({"more": [1, null]});
        event
    };
    let unknown = |kind: &str, place: u64| {
        let mut event = later("delivery.v1");
        (event["type"], event["sequence"]) = (kind.into(), format!("{place:020}").into());
        event["id"] = "00000000-0000-5000-8000-000000000000".into();
        event
    };
    let mut events = TURN.map(|(kind, part)| (later(kind), part)).to_vec();
    events.insert(2, (unknown("output.tomorrow.v1", 40), Part::Within));
    events.insert(4, (unknown("turn.tomorrow.v1", 3), Part::After));
    let folder = tempfile::tempdir().unwrap();
    let written = log_of(folder.path(), &events);
    let judged = verify(folder.path()).unwrap();
    assert!(judged.is_good(), "{:?}", judged.violations);
    assert_eq!((judged.records, judged.settled, judged.unknown), (7, 1, 2));
    assert_eq!(followed(folder.path()), written, "byte for byte");
    goes_on(folder.path());
}
