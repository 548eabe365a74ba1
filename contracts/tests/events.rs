//! Events that are kept outlive the version that wrote them: those of this version stand in `recordings/events`, and must be read
//! for as long as their types are called `.v1`; and what a newer version adds must pass a reader of this one.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use headgate_contracts::{
    Category, Code, Finish, Gone, TurnId, Usage,
    wire::log::{
        Accepted, Cancelled, Completed, Delivered, Delivery, Denied, Event, Failed, FailedReason, InputVerdict, Kind, Name, OutputVerdict,
        Progress, Segment,
    },
    wire::training::Mode,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::{Value, json};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("recordings/events")
}

fn turn() -> TurnId {
    TurnId::from_bytes([7; 16])
}

/// One event of each kind, with every member it may have; the same in every run.
fn written() -> Vec<(Kind, Value)> {
    let at = SystemTime::UNIX_EPOCH + Duration::from_millis(1_795_261_445_007);
    let name = |text: &str| Name::of(text);
    let accepted = Accepted {
        tenant: "acme".parse().unwrap(),
        session: "s1".parse().unwrap(),
        subject: "u1".parse().unwrap(),
        route: "stream".into(),
        model: name("demo"),
        messages: 3,
        body_bytes: 412,
        body_digest: "sha-256=:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=:".into(),
    };
    let verdict = |decision: &str| InputVerdict {
        verdict: "AAAAAAAAAAAAAAAAAAAAAA".into(),
        issuer: "headgate".into(),
        decision: decision.into(),
        categories: vec![Category::Privacy, Category::Hate],
        policy: "default".into(),
        policy_version: "2026-11-21".into(),
        constitution: "sha-256=:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=:".into(),
        mode: Some(Mode::Training),
        fence: Some(7),
        subject: Some("u1".parse().unwrap()),
    };
    let progress = Progress {
        model: name("demo-2"),
        usage: Some(Usage { input_tokens: 12, output_tokens: 34 }),
        text_bytes: 120,
        events: 36,
        first_text_ms: Some(80),
        took_ms: 2100,
    };
    let output = OutputVerdict { verdict: verdict("redact"), text_digest: "sha-256=:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=:".into() };
    let delivery = Delivery {
        outcome: Delivered::Cut,
        code: Some(Code::ClientClosed),
        last_seq: Some(31),
        text_bytes: Some(118),
        verdict: Some("AAAAAAAAAAAAAAAAAAAAAA".into()),
    };
    let begun = Event::accepted(turn(), at, "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01".into(), accepted);
    let failed = Failed { reason: FailedReason::Fault, code: Some(Code::UpstreamReset), progress: Some(progress.clone()) };
    let cancelled = Cancelled { reason: Cancelled::reason(Gone::Left).into(), progress: progress.clone() };
    let completed = Completed { finish: Finish::Stop, progress: progress.clone() };
    let denied = Denied { code: Code::PolicyDenied, categories: vec![Category::Hate], progress };
    let segment = Segment { subject: "kE3xW1V0eC2mQbG5uX9fTA".parse().unwrap(), last: true, sealed: "AAECAwQFBgcICQoLDA0ODwAAAAE".into() };
    fn value<D: Serialize>(event: Event<D>) -> Value {
        serde_json::to_value(event).unwrap()
    }
    let all = Kind::ALL.iter().map(|kind| {
        let event = match kind {
            Kind::Accepted => value(begun.clone()),
            Kind::InputVerdict => value(begun.followed_by(*kind, at, verdict("redact"))),
            Kind::Completed => value(begun.followed_by(*kind, at, completed.clone())),
            Kind::Cancelled => value(begun.followed_by(*kind, at, cancelled.clone())),
            Kind::Denied => value(begun.followed_by(*kind, at, denied.clone())),
            Kind::Failed => value(begun.followed_by(*kind, at, failed.clone())),
            Kind::OutputVerdict => value(begun.followed_by(*kind, at, output.clone())),
            Kind::Delivery => value(begun.followed_by(*kind, at, delivery.clone())),
            Kind::InputSegment | Kind::OutputSegment => value(begun.segment(*kind, 3, at, segment.clone())),
        };
        (*kind, event)
    });
    all.collect()
}

/// Reads an event by its kind and gives what was understood.
fn understood(kind: Kind, event: &Value) -> Value {
    fn read<D: DeserializeOwned + Serialize>(event: &Value) -> Value {
        let event: Event<D> = serde_json::from_value(event.clone()).unwrap_or_else(|error| panic!("{error}: {event}"));
        serde_json::to_value(event).unwrap()
    }
    match kind {
        Kind::Accepted => read::<Accepted>(event),
        Kind::InputVerdict => read::<InputVerdict>(event),
        Kind::Completed => read::<Completed>(event),
        Kind::Cancelled => read::<Cancelled>(event),
        Kind::Denied => read::<Denied>(event),
        Kind::Failed => read::<Failed>(event),
        Kind::OutputVerdict => read::<OutputVerdict>(event),
        Kind::Delivery => read::<Delivery>(event),
        Kind::InputSegment | Kind::OutputSegment => read::<Segment>(event),
    }
}

fn recorded(kind: Kind) -> Value {
    let path = folder().join(format!("{}.json", kind.as_str()));
    let text = fs::read_to_string(&path).unwrap_or_else(|_| panic!("{} is missing: HEADGATE_WRITE=1 writes it once", path.display()));
    serde_json::from_str(&text).unwrap()
}

/// Whether everything in `part` is in `whole`, as it is.
fn contains(whole: &Value, part: &Value) -> bool {
    match (whole, part) {
        (Value::Object(whole), Value::Object(part)) => {
            part.iter().all(|(name, value)| whole.get(name).is_some_and(|other| contains(other, value)))
        }
        (whole, part) => whole == part,
    }
}

#[test]
fn what_was_written_once_is_read_with_nothing_lost_and_still_written_with_nothing_left_out() {
    let write = std::env::var_os("HEADGATE_WRITE").is_some();
    for (kind, event) in written() {
        let path = folder().join(format!("{}.json", kind.as_str()));
        // Once and never again: what stands there may be in somebody's topic.
        if write && !path.exists() {
            fs::write(&path, format!("{event:#}\n")).unwrap();
        }
        let kept = recorded(kind);
        assert_eq!(understood(kind, &kept), kept, "{}: a member is not understood any more", kind.as_str());
        assert!(contains(&event, &kept), "{}: what was written is written no more, or otherwise", kind.as_str());
    }
    let files = fs::read_dir(folder()).unwrap().count();
    assert_eq!(files, Kind::ALL.len(), "a kind that was written can be read for ever");
}

/// The same event from a version to come: more attributes, and more members in every object.
fn of_tomorrow(event: &Value) -> Value {
    fn grow(value: &mut Value) {
        match value {
            Value::Object(members) => {
                members.values_mut().for_each(grow);
                members.insert("tomorrow".into(), json!({"a": [1, {"b": null}]}));
            }
            Value::Array(items) => items.iter_mut().for_each(grow),
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
        }
    }
    let mut event = event.clone();
    grow(&mut event);
    event
}

#[test]
fn a_reader_of_today_understands_of_an_event_of_tomorrow_what_it_does_of_todays() {
    for (kind, event) in written() {
        assert_eq!(understood(kind, &of_tomorrow(&event)), event, "{}", kind.as_str());
    }
}

/// The types of the version before there were deliveries, as they were then.
mod yesterday {
    use super::*;

    pub(super) const KINDS: [&str; 6] =
        ["turn.accepted.v1", "verdict.input.v1", "turn.completed.v1", "turn.cancelled.v1", "turn.denied.v1", "turn.failed.v1"];

    #[derive(Deserialize)]
    pub(super) struct Event<D> {
        pub(super) specversion: String,
        pub(super) id: String,
        #[serde(rename = "type")]
        pub(super) kind: String,
        pub(super) subject: TurnId,
        pub(super) partitionkey: String,
        pub(super) sequence: String,
        pub(super) data: D,
    }

    #[derive(Deserialize)]
    pub(super) struct InputVerdict {
        pub(super) verdict: String,
        pub(super) issuer: String,
        pub(super) decision: String,
        pub(super) categories: Vec<Category>,
        pub(super) policy: String,
        pub(super) policy_version: String,
        pub(super) constitution: String,
    }

    #[derive(Deserialize)]
    pub(super) struct Progress {
        pub(super) text_bytes: u64,
        pub(super) events: u64,
        pub(super) took_ms: u64,
    }

    #[derive(Deserialize)]
    pub(super) struct Denied {
        pub(super) code: Code,
        pub(super) categories: Vec<Category>,
        #[serde(flatten)]
        pub(super) progress: Progress,
    }
}

#[test]
fn a_reader_of_yesterday_takes_what_is_written_today_and_passes_over_what_it_does_not_know() {
    for (kind, event) in written() {
        let read: yesterday::Event<Value> = serde_json::from_value(event.clone()).unwrap();
        assert_eq!((read.specversion.as_str(), read.subject, read.partitionkey.as_str()), ("1.0", turn(), "acme/s1"));
        assert_eq!((read.kind.as_str(), read.sequence.len()), (kind.as_str(), 20));
        // It knows the ends of turns by their one id, and what it does not know has another.
        let known = yesterday::KINDS.contains(&kind.as_str());
        assert_eq!(known && kind.is_terminal(), read.id == Kind::Completed.id(turn()), "{}", kind.as_str());
        assert_eq!(read.data, event["data"]);
    }
    let find = |kind: Kind| written().into_iter().find(|(other, _)| *other == kind).unwrap().1;
    let verdict: yesterday::Event<yesterday::InputVerdict> = serde_json::from_value(find(Kind::InputVerdict)).unwrap();
    let yesterday::InputVerdict { verdict, issuer, decision, categories, policy, policy_version, constitution } = verdict.data;
    assert_eq!((verdict.len(), issuer.as_str(), decision.as_str(), categories.len()), (22, "headgate", "redact", 2));
    assert_eq!((policy.as_str(), policy_version.as_str(), constitution.len()), ("default", "2026-11-21", 54));
    let denied: yesterday::Event<yesterday::Denied> = serde_json::from_value(find(Kind::Denied)).unwrap();
    let yesterday::Denied { code, categories, progress } = denied.data;
    assert_eq!((code, categories.as_slice(), progress.text_bytes), (Code::PolicyDenied, &[Category::Hate][..], 120));
    assert_eq!((progress.events, progress.took_ms), (36, 2100));
}
