//! The conversation's events as they are kept: what became of each turn, as CloudEvents 1.0. What was said in it is there only where
//! somebody asked for it, and then sealed: see [`Segment`].
//!
//! A turn that is taken has `turn.accepted.v1`, then `verdict.input.v1`, and then exactly one of the four that end it: what was
//! generated. Those four share one id, so that two of them can never both count. After it comes what the gateway says:
//! `verdict.output.v1`, if it signed one, and exactly one `delivery.v1`: what the user got.
//!
//! A prompt that policy refused became no turn: it has `verdict.input.v1`, which says no, and `turn.denied.v1`, and nothing else.

use std::time::{Duration, SystemTime};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::training::Mode;
use crate::{Category, Code, Finish, Gone, SessionId, Subject, TenantId, TurnId, Usage};

/// The version of CloudEvents.
pub const SPEC_VERSION: &str = "1.0";
/// Who writes these events.
pub const SOURCE: &str = "/headgate/orchestrator";

/// What an event says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// A turn was taken.
    Accepted,
    /// What the gateway had decided about its prompt.
    InputVerdict,
    /// A piece of its prompt, sealed.
    InputSegment,
    /// A piece of what the model wrote, sealed.
    OutputSegment,
    /// It came to its proper end.
    Completed,
    /// Nobody wanted it any more.
    Cancelled,
    /// Policy ended it.
    Denied,
    /// It broke.
    Failed,
    /// What the gateway had decided about its answer.
    OutputVerdict,
    /// What the user got of it.
    Delivery,
}

impl Kind {
    /// Every kind, in the order in which a turn has them.
    pub const ALL: &'static [Kind] = &[
        Kind::Accepted,
        Kind::InputVerdict,
        Kind::InputSegment,
        Kind::OutputSegment,
        Kind::Completed,
        Kind::Cancelled,
        Kind::Denied,
        Kind::Failed,
        Kind::OutputVerdict,
        Kind::Delivery,
    ];

    /// The `type` of the event.
    pub fn as_str(self) -> &'static str {
        match self {
            Kind::Accepted => "turn.accepted.v1",
            Kind::InputVerdict => "verdict.input.v1",
            Kind::InputSegment => "input.segment.v1",
            Kind::OutputSegment => "output.segment.v1",
            Kind::Completed => "turn.completed.v1",
            Kind::Cancelled => "turn.cancelled.v1",
            Kind::Denied => "turn.denied.v1",
            Kind::Failed => "turn.failed.v1",
            Kind::OutputVerdict => "verdict.output.v1",
            Kind::Delivery => "delivery.v1",
        }
    }

    /// The kind of that `type`; newer versions may have some that this one does not know.
    pub fn from_name(name: &str) -> Option<Kind> {
        Kind::ALL.iter().copied().find(|kind| kind.as_str() == name)
    }

    /// Whether the turn ends with it.
    pub fn is_terminal(self) -> bool {
        match self {
            Kind::Accepted | Kind::InputVerdict | Kind::OutputVerdict | Kind::Delivery => false,
            Kind::InputSegment | Kind::OutputSegment => false,
            Kind::Completed | Kind::Cancelled | Kind::Denied | Kind::Failed => true,
        }
    }

    /// Whether a turn may have any number of it: pieces of text, which are counted from 0.
    pub fn is_segment(self) -> bool {
        matches!(self, Kind::InputSegment | Kind::OutputSegment)
    }

    /// The event's place within its turn, from 1; of segments, that of the first. Text has places of its own behind those of the
    /// facts, so that a turn's facts have the same places with it and without.
    pub fn place(self) -> u64 {
        match self {
            Kind::Accepted => 1,
            Kind::InputVerdict => 2,
            Kind::Completed | Kind::Cancelled | Kind::Denied | Kind::Failed => 3,
            Kind::OutputVerdict => 4,
            Kind::Delivery => 5,
            Kind::InputSegment => 1_000_000,
            Kind::OutputSegment => 2_000_000,
        }
    }

    /// The `id` of that event of `turn`: a UUID version 5 in the turn's own namespace, the same however often it is written.
    pub fn id(self, turn: TurnId) -> String {
        turn.named(if self.is_terminal() { "terminal" } else { self.as_str() })
    }

    /// The `id` of the segment of `turn` at `place`.
    pub fn id_at(self, turn: TurnId, place: u64) -> String {
        turn.named(&format!("{}/{place}", self.as_str()))
    }
}

/// An event: the attributes of CloudEvents, and `data` by its type. Unknown members are for newer readers and are ignored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Event<D> {
    /// `1.0`.
    pub specversion: String,
    /// Unique, and the same when the event is written again: consumers count it once.
    #[schemars(extend("format" = "uuid"))]
    pub id: String,
    /// Who wrote it.
    #[schemars(extend("format" = "uri-reference"))]
    pub source: String,
    /// What it says.
    #[serde(rename = "type")]
    pub kind: String,
    /// Of which turn.
    pub subject: TurnId,
    /// When, in UTC.
    #[schemars(extend("format" = "date-time"))]
    pub time: String,
    /// `application/json`.
    pub datacontenttype: String,
    /// `{tenant}/{session}`: events with the same key stay in order.
    #[schemars(length(min = 3, max = 257))]
    pub partitionkey: String,
    /// The event's place within its turn, as 20 digits: compared as text, it orders.
    #[schemars(regex(pattern = r"^[0-9]{20}$"))]
    pub sequence: String,
    /// W3C Trace Context.
    pub traceparent: String,
    /// Who had it written in place of the orchestrator, whose own log was lost; absent from all that an orchestrator writes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 128))]
    pub reapedby: Option<String>,
    /// The facts.
    pub data: D,
}

impl<D> Event<D> {
    /// The event of that kind which belongs beside this one: of the same turn, with the same key and trace.
    pub fn followed_by<E>(&self, kind: Kind, at: SystemTime, data: E) -> Event<E> {
        Event {
            specversion: self.specversion.clone(),
            id: kind.id(self.subject),
            source: self.source.clone(),
            kind: kind.as_str().to_owned(),
            subject: self.subject,
            time: rfc3339(at),
            datacontenttype: self.datacontenttype.clone(),
            partitionkey: self.partitionkey.clone(),
            sequence: format!("{:020}", kind.place()),
            traceparent: self.traceparent.clone(),
            reapedby: None,
            data,
        }
    }

    /// The same, had written by `who` in place of an orchestrator whose log was lost.
    pub fn reaped(self, who: &str) -> Event<D> {
        Event { reapedby: Some(who.to_owned()), ..self }
    }
}

impl<D> Event<D> {
    /// The segment number `nth`, from 0, which belongs beside this event. It is sealed afterwards: see [`Event::binding`].
    pub fn segment(&self, kind: Kind, nth: u32, at: SystemTime, data: Segment) -> Event<Segment> {
        let place = kind.place() + u64::from(nth);
        let event = self.followed_by(kind, at, data);
        Event { id: kind.id_at(self.subject, place), sequence: format!("{place:020}"), ..event }
    }
}

impl Event<()> {
    /// What there is to follow where the first event of `turn` cannot be read.
    pub fn unknown(turn: TurnId) -> Event<()> {
        Event {
            specversion: SPEC_VERSION.to_owned(),
            id: Kind::Accepted.id(turn),
            source: SOURCE.to_owned(),
            kind: Kind::Accepted.as_str().to_owned(),
            subject: turn,
            time: rfc3339(SystemTime::UNIX_EPOCH),
            datacontenttype: "application/json".to_owned(),
            partitionkey: "unknown/unknown".to_owned(),
            sequence: format!("{:020}", Kind::Accepted.place()),
            traceparent: String::new(),
            reapedby: None,
            data: (),
        }
    }
}

impl Event<InputVerdict> {
    /// The first event of a prompt that was refused, of `tenant` in `session`.
    pub fn refused(
        turn: TurnId,
        at: SystemTime,
        traceparent: String,
        (tenant, session): (&TenantId, &SessionId),
        data: InputVerdict,
    ) -> Event<InputVerdict> {
        let begun = Event { partitionkey: format!("{tenant}/{session}"), traceparent, ..Event::unknown(turn) };
        begun.followed_by(Kind::InputVerdict, at, data)
    }
}

impl Event<Accepted> {
    /// The first event of a turn.
    pub fn accepted(turn: TurnId, at: SystemTime, traceparent: String, data: Accepted) -> Event<Accepted> {
        let partitionkey = format!("{}/{}", data.tenant, data.session);
        let begun = Event { partitionkey, traceparent, ..Event::unknown(turn) };
        begun.followed_by(Kind::Accepted, at, data)
    }
}

/// A turn was taken: its verdict holds, and the model is asked next.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Accepted {
    /// Who pays.
    pub tenant: TenantId,
    /// Of which session.
    pub session: SessionId,
    /// A name that stands for who asks: where text is kept, that of the subject's key, else a keyed hash.
    pub subject: Subject,
    /// By which call: `stream`, `step` or `websocket`.
    pub route: String,
    /// The model asked for, where its name is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<Name>,
    /// Messages in the dispatch, without those that are remembered.
    pub messages: u64,
    /// The size of the dispatch's body, in bytes.
    pub body_bytes: u64,
    /// RFC 9530, of that body: what the verdict binds.
    pub body_digest: String,
}

/// What the gateway decided about the prompt, as its signed verdict claims.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct InputVerdict {
    /// The verdict's own number.
    pub verdict: String,
    /// Who signed it.
    pub issuer: String,
    /// `allow`, `redact` or `flag`; `deny` where the prompt became no turn.
    pub decision: String,
    /// What was found.
    pub categories: Vec<Category>,
    /// The policy applied.
    pub policy: String,
    /// Its version.
    pub policy_version: String,
    /// The hash of the constitution in force.
    pub constitution: String,
    /// `training` where the turn ran in training mode; absent where policy was enforced as always.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<Mode>,
    /// The fence of the lock that it ran under; present exactly in training mode.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fence: Option<u64>,
    /// The name that stands for who asked, where no `turn.accepted.v1` has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subject: Option<Subject>,
}

/// What the gateway decided about the answer, as the verdict claims that it signed over the text it sent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct OutputVerdict {
    /// The same as about a prompt; the decision may be `deny` here: the answer was cut.
    #[serde(flatten)]
    pub verdict: InputVerdict,
    /// RFC 9530, of the text that was sent: what the verdict binds.
    pub text_digest: String,
}

/// What the user got, as far as the gateway can know: what the client's connection took.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Delivery {
    /// In one word.
    pub outcome: Delivered,
    /// Why it was not the whole answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code: Option<Code>,
    /// The number of the last event that the client's connection took; absent where it took none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_seq: Option<u64>,
    /// Text that was let go to the client, in bytes; absent where nobody knows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text_bytes: Option<u64>,
    /// The number of the output's verdict, where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verdict: Option<String>,
}

/// What became of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Delivered {
    /// The client took all of it, to its proper end.
    Delivered,
    /// Policy cut it.
    Denied,
    /// The client did not get all of it: it left, it stopped the turn, a limit or a fault ended it.
    Cut,
    /// The gateway did not say in time. Only the orchestrator writes it.
    Unknown,
}

impl Delivered {
    /// Every outcome.
    pub const ALL: [Delivered; 4] = [Delivered::Delivered, Delivered::Denied, Delivered::Cut, Delivered::Unknown];

    /// The word.
    pub fn as_str(self) -> &'static str {
        match self {
            Delivered::Delivered => "delivered",
            Delivered::Denied => "denied",
            Delivered::Cut => "cut",
            Delivered::Unknown => "unknown",
        }
    }
}

/// A piece of text, sealed: of the prompt, as the orchestrator took it, or of the answer, as the model wrote it. Opened and put
/// together in order, the pieces are lines of JSON: each a message, or a run of text as clients are sent it.
///
/// A piece that is missing, by its `sequence`, was not kept: there was no room. So was the end, where a turn has ended and its last
/// piece is not there.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Segment {
    /// Whose text it is, as in `turn.accepted.v1`: the name of the key that it is sealed under.
    pub subject: Subject,
    /// It is the last piece.
    pub last: bool,
    /// The piece, as base64url: 16 random bytes that with the subject's key make the key of the turn, the number of what that sealed,
    /// and AES-256-GCM of the text, bound to the event's place: see [`Event::binding`].
    pub sealed: String,
}

impl Event<Segment> {
    /// What a sealed piece is bound to: which turn, whose, which piece of it, and whether there are more.
    pub fn binding(&self) -> Vec<u8> {
        let Event { id, kind, subject, partitionkey, sequence, data, .. } = self;
        // None of these holds a line's end.
        format!("{id}\n{kind}\n{subject}\n{partitionkey}\n{sequence}\n{}\n{}", data.subject, data.last).into_bytes()
    }
}

/// What was done until the turn ended.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Progress {
    /// The model that answered, where its name is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<Name>,
    /// Tokens, as the model counts them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
    /// Text that the model wrote, in bytes.
    pub text_bytes: u64,
    /// Events of its answer.
    pub events: u64,
    /// Milliseconds from the dispatch to its first text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_text_ms: Option<u64>,
    /// Milliseconds from the dispatch to the end.
    pub took_ms: u64,
}

/// The turn came to its proper end.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Completed {
    /// Why the model stopped.
    pub finish: Finish,
    /// What was done.
    #[serde(flatten)]
    pub progress: Progress,
}

/// Nobody wanted the turn any more.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Cancelled {
    /// `left`, `stopped`, `slow`, `drained`; `declined` or `unanswered` by the person who was asked about a tool; or `limit`: the
    /// gateway's own for a turn.
    pub reason: String,
    /// What was done.
    #[serde(flatten)]
    pub progress: Progress,
}

impl Cancelled {
    /// The word for why nobody listens.
    pub fn reason(gone: Gone) -> &'static str {
        match gone {
            Gone::Left => "left",
            Gone::Stopped => "stopped",
            Gone::Slow => "slow",
            Gone::Drained => "drained",
            Gone::Declined => "declined",
            Gone::Unanswered => "unanswered",
        }
    }
}

/// Policy ended the turn.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Denied {
    /// The stable code.
    pub code: Code,
    /// Why, where it is about text.
    pub categories: Vec<Category>,
    /// What was done.
    #[serde(flatten)]
    pub progress: Progress,
}

/// The turn broke.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Failed {
    /// `fault`, or `crash`: the orchestrator stopped without a word, and found the turn without an end when it came back; or it never
    /// came back, and the event says by whom it was reaped.
    pub reason: FailedReason,
    /// The stable code; absent after a crash.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code: Option<Code>,
    /// What was done; absent after a crash, when nobody knows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<Progress>,
}

/// Why a turn broke.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum FailedReason {
    /// Something broke while it ran; the code says what.
    Fault,
    /// The process that ran it ended without a word.
    Crash,
}

/// A name that may be kept: at most 128 visible ASCII characters. Models are named by clients and by servers, in any text they like.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct Name(#[schemars(length(min = 1, max = 128), regex(pattern = r"^[\x21-\x7e]+$"))] String);

impl Name {
    /// `text`, if it is one.
    pub fn of(text: &str) -> Option<Name> {
        let is_name = (1..=128).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic());
        is_name.then(|| Name(text.to_owned()))
    }
}

/// RFC 3339, in UTC, to the millisecond. Times before 1970 and after 9999 are shown as the nearest that can be.
pub fn rfc3339(at: SystemTime) -> String {
    /// 9999-12-31T23:59:59.
    const LAST_SECOND: u64 = 253_402_300_799;
    let since = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
    let seconds = since.as_secs().min(LAST_SECOND);
    // Days in eras of 400 years that begin in March: leap days come last (Howard Hinnant, "chrono-compatible low-level date algorithms").
    let days = seconds / 86_400 + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year_of_era = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day_of_year = day - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (second, millis) = (seconds % 86_400, since.subsec_millis());
    let (hour, minute) = (second / 3600, second / 60 % 60);
    format!("{year:04}-{month:02}-{:02}T{hour:02}:{minute:02}:{:02}.{millis:03}Z", day_of_year - (153 * shifted + 2) / 5 + 1, second % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_those_of_the_calendar() {
        let at = |seconds: u64, millis: u64| rfc3339(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds) + Duration::from_millis(millis));
        assert_eq!(at(0, 0), "1970-01-01T00:00:00.000Z");
        assert_eq!(at(951_782_399, 999), "2000-02-28T23:59:59.999Z");
        assert_eq!(at(951_782_400, 0), "2000-02-29T00:00:00.000Z");
        assert_eq!(at(1_740_787_200, 1), "2025-03-01T00:00:00.001Z");
        assert_eq!(at(1_795_261_445, 0), "2026-11-21T11:44:05.000Z");
        assert_eq!(at(253_402_300_799, 0), "9999-12-31T23:59:59.000Z");
        assert_eq!(rfc3339(SystemTime::UNIX_EPOCH - Duration::from_secs(1)), "1970-01-01T00:00:00.000Z");
    }

    #[test]
    fn the_four_ends_of_a_turn_share_one_id_and_nothing_else_does() {
        let turn = TurnId::fresh();
        let ids: std::collections::BTreeSet<String> = Kind::ALL.iter().map(|kind| kind.id(turn)).collect();
        assert_eq!(ids.len(), 7);
        assert_eq!(Kind::Completed.id(turn), Kind::Failed.id(turn));
        assert_ne!(Kind::Completed.id(turn), Kind::Completed.id(TurnId::fresh()));
        for kind in Kind::ALL {
            assert_eq!(Kind::from_name(kind.as_str()), Some(*kind));
        }
    }

    #[test]
    fn a_name_is_short_and_visible() {
        assert!(Name::of("meta-llama/Llama-3.1-8B").is_some());
        for bad in ["", "two words", "line\nbreak", "\u{202e}x", &"x".repeat(129)] {
            assert!(Name::of(bad).is_none(), "{bad:?}");
        }
    }

    #[test]
    fn a_reader_of_today_takes_an_event_of_tomorrow() {
        let turn = TurnId::fresh();
        let data = Accepted {
            tenant: "acme".parse().unwrap(),
            session: "s1".parse().unwrap(),
            subject: "u1".parse().unwrap(),
            route: "stream".into(),
            model: None,
            messages: 1,
            body_bytes: 2,
            body_digest: "sha-256=::".into(),
        };
        let event = Event::accepted(turn, SystemTime::UNIX_EPOCH, "00-a-b-01".into(), data);
        let mut written = serde_json::to_value(&event).unwrap();
        assert_eq!((written["partitionkey"].as_str(), written["sequence"].as_str()), (Some("acme/s1"), Some("00000000000000000001")));
        written["newer"] = 1.into();
        written["data"]["newer"] = 1.into();
        assert_eq!(serde_json::from_value::<Event<Accepted>>(written).unwrap(), event);
        let end =
            event.followed_by(Kind::Failed, SystemTime::UNIX_EPOCH, Failed { reason: FailedReason::Crash, code: None, progress: None });
        assert_eq!((end.id, end.partitionkey, end.subject), (Kind::Completed.id(turn), "acme/s1".to_owned(), turn));
        assert_eq!(serde_json::to_string(&end.data).unwrap(), r#"{"reason":"crash"}"#);
    }
}
