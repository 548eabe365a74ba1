//! An event as a message of a topic, and back: CloudEvents 1.0, the Kafka protocol binding in binary mode.
//!
//! Attributes are headers named `ce_...`, the facts are the value, and the key keeps the events of a session in one partition.

use std::{borrow::Cow, fmt};

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor},
};
use serde_json::value::RawValue;

/// An event on its way into a topic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::events) struct Message {
    /// `{tenant}/{session}`.
    pub(in crate::events) key: String,
    /// Names and values.
    pub(in crate::events) headers: Vec<(String, String)>,
    /// The facts, as JSON.
    pub(in crate::events) value: Vec<u8>,
    /// When it happened, in milliseconds since 1970; 0 where the event does not say.
    pub(in crate::events) at_ms: i64,
}

/// Attributes that have a header of another name: the value's type has Kafka's own, and traces are read everywhere without a prefix.
const RENAMED: [(&str, &str); 2] = [("datacontenttype", "content-type"), ("traceparent", "traceparent")];
const PREFIX: &str = "ce_";

impl Message {
    /// The message of an event, as it stands in the log. Attributes that only newer versions know are headers too. What is no event
    /// is a value without headers: it was kept, so it is delivered.
    pub(in crate::events) fn of(event: &[u8]) -> Message {
        let Ok(Members(members)) = serde_json::from_slice(event) else {
            return Message { key: String::new(), headers: Vec::new(), value: event.to_vec(), at_ms: 0 };
        };
        let mut message = Message { key: String::new(), headers: Vec::with_capacity(members.len() + 2), value: Vec::new(), at_ms: 0 };
        for (name, raw) in members {
            if name == "data" {
                message.value = raw.get().as_bytes().to_vec();
                continue;
            }
            let value = attribute(raw);
            match name.as_ref() {
                "partitionkey" => message.key = value.clone().into_owned(),
                "time" => message.at_ms = unix_ms(&value).unwrap_or(0),
                "type" => {
                    message.headers.push(("ce_dataschema".to_owned(), format!("urn:headgate:events:{value}")));
                    let version = value.rsplit_once(".v").map_or("1", |(_, version)| version);
                    message.headers.push(("schema_version".to_owned(), version.to_owned()));
                }
                _ => {}
            }
            message.headers.push((header(&name), value.into_owned()));
        }
        if let Some((tenant, _)) = message.key.split_once('/') {
            message.headers.push(("tenant_id".to_owned(), tenant.to_owned()));
        }
        message
    }
}

/// A string's own text; a number or a truth value as it is written.
fn attribute(raw: &RawValue) -> Cow<'_, str> {
    match raw.get().strip_prefix('"').and_then(|rest| rest.strip_suffix('"')) {
        Some(plain) if !plain.contains('\\') => plain.into(),
        Some(_) => serde_json::from_str::<String>(raw.get()).map_or_else(|_| raw.get().into(), Cow::from),
        None => raw.get().into(),
    }
}

/// The members of an event, as they stand in it.
struct Members<'a>(Vec<(Cow<'a, str>, &'a RawValue)>);

impl<'de> Deserialize<'de> for Members<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Members<'de>, D::Error> {
        #[derive(Deserialize)]
        struct Name<'a>(#[serde(borrow)] Cow<'a, str>);

        struct All;
        impl<'de> Visitor<'de> for All {
            type Value = Members<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an event")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Members<'de>, A::Error> {
                let mut members = Vec::with_capacity(16);
                while let Some((Name(name), raw)) = map.next_entry()? {
                    members.push((name, raw));
                }
                Ok(Members(members))
            }
        }
        deserializer.deserialize_map(All)
    }
}

fn header(attribute: &str) -> String {
    let renamed = RENAMED.iter().find(|(name, _)| *name == attribute);
    renamed.map_or_else(|| format!("{PREFIX}{attribute}"), |(_, header)| (*header).to_owned())
}

/// The event of a message, as one line of JSON; `None` where it is none.
pub(super) fn event<'a>(headers: impl Iterator<Item = (&'a str, &'a [u8])>, value: &[u8]) -> Option<Vec<u8>> {
    let mut event = serde_json::Map::new();
    for (name, value) in headers {
        let renamed = RENAMED.iter().find(|(_, header)| *header == name).map(|(attribute, _)| *attribute);
        let Some(attribute) = renamed.or_else(|| name.strip_prefix(PREFIX)) else { continue };
        event.insert(attribute.to_owned(), str::from_utf8(value).ok()?.into());
    }
    event.insert("data".to_owned(), serde_json::from_slice(value).ok()?);
    serde_json::to_vec(&event).ok()
}

/// Milliseconds since 1970 of a time as events have it: `2026-11-21T11:44:05.000Z`.
fn unix_ms(time: &str) -> Option<i64> {
    let time = time.strip_suffix('Z')?;
    let (date, time) = time.split_once('T')?;
    let mut date = date.splitn(3, '-').map(str::parse::<i64>);
    let (year, month, day) = (date.next()?.ok()?, date.next()?.ok()?, date.next()?.ok()?);
    let mut time = time.splitn(3, ':');
    let (hour, minute, second) = (time.next()?.parse::<i64>().ok()?, time.next()?.parse::<i64>().ok()?, time.next()?.parse::<f64>().ok()?);
    if !(1970..=9999).contains(&year) || !(1..=12).contains(&month) || !(1..=31).contains(&day) || !(0.0..61.0).contains(&second) {
        return None;
    }
    // The inverse of what the events are written with: years of 400-year eras that begin in March.
    let year = if month <= 2 { year - 1 } else { year };
    let day_of_year = (153 * (month + if month > 2 { -3 } else { 9 }) + 2) / 5 + day - 1;
    let day_of_era = year % 400 * 365 + year % 400 / 4 - year % 400 / 100 + day_of_year;
    let days = year / 400 * 146_097 + day_of_era - 719_468;
    Some(((days * 24 + hour) * 60 + minute) * 60_000 + (second * 1000.0).round() as i64)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use headgate_contracts::{
        TurnId,
        wire::log::{Event, Kind, rfc3339},
    };

    use super::*;

    #[test]
    fn a_time_is_read_as_it_was_written() {
        for ms in [0, 1, 951_782_399_999, 951_782_400_000, 1_740_787_200_001, 1_795_261_445_000, 4_102_444_799_999] {
            let written = rfc3339(SystemTime::UNIX_EPOCH + Duration::from_millis(ms));
            assert_eq!(unix_ms(&written), Some(ms as i64), "{written}");
        }
        for bad in ["", "2026-11-21", "2026-11-21T11:44:05.000+01:00", "2026-13-01T00:00:00.000Z", "x-1-1T0:0:0Z"] {
            assert_eq!(unix_ms(bad), None, "{bad}");
        }
    }

    #[test]
    fn every_attribute_is_a_header_and_the_facts_are_the_value() {
        let turn = TurnId::fresh();
        let at = SystemTime::UNIX_EPOCH + Duration::from_millis(1_795_261_445_007);
        let mut begun = Event::unknown(turn);
        (begun.partitionkey, begun.traceparent) = ("acme/s1".to_owned(), "00-a-b-01".to_owned());
        let written = serde_json::to_vec(&begun.followed_by(Kind::Completed, at, serde_json::json!({"finish": "stop"}))).unwrap();
        let message = Message::of(&written);
        let header = |name: &str| message.headers.iter().find(|(header, _)| header == name).map(|(_, value)| value.as_str());
        let (id, subject) = (Kind::Completed.id(turn), turn.to_string());
        for (name, value) in [
            ("ce_specversion", "1.0"),
            ("ce_id", id.as_str()),
            ("ce_type", "turn.completed.v1"),
            ("ce_source", "/headgate/orchestrator"),
            ("ce_time", "2026-11-21T11:44:05.007Z"),
            ("ce_subject", subject.as_str()),
            ("ce_partitionkey", "acme/s1"),
            ("ce_dataschema", "urn:headgate:events:turn.completed.v1"),
            ("content-type", "application/json"),
            ("traceparent", "00-a-b-01"),
            ("tenant_id", "acme"),
            ("schema_version", "1"),
        ] {
            assert_eq!(header(name), Some(value), "{name}");
        }
        assert_eq!(header("ce_sequence").map(str::len), Some(20));
        assert_eq!((message.key.as_str(), message.value.as_slice()), ("acme/s1", &br#"{"finish":"stop"}"#[..]));
        assert_eq!(message.at_ms, 1_795_261_445_007);
        let headers = message.headers.iter().map(|(name, value)| (name.as_str(), value.as_bytes()));
        let back: serde_json::Value = serde_json::from_slice(&event(headers, &message.value).unwrap()).unwrap();
        let mut kept: serde_json::Value = serde_json::from_slice(&written).unwrap();
        kept["dataschema"] = "urn:headgate:events:turn.completed.v1".into();
        assert_eq!(back, kept);
    }

    #[test]
    fn a_message_has_the_headers_that_the_asyncapi_document_gives_its_kind() {
        let document = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../contracts/schema/asyncapi.json");
        let document: serde_json::Value = serde_json::from_slice(&std::fs::read(document).unwrap()).unwrap();
        let mut begun = Event::unknown(TurnId::fresh());
        (begun.partitionkey, begun.traceparent) = ("acme/s1".to_owned(), "00-a-b-01".to_owned());
        for kind in Kind::ALL {
            let event = begun.followed_by(*kind, SystemTime::UNIX_EPOCH, serde_json::json!({})).reaped("ann");
            let written = serde_json::to_vec(&event).unwrap();
            let there: std::collections::BTreeMap<String, String> = Message::of(&written).headers.into_iter().collect();
            let headers = &document["components"]["messages"][kind.as_str()]["headers"];
            let named = headers["properties"].as_object().unwrap();
            assert_eq!(
                there.keys().collect::<Vec<_>>(),
                named.keys().collect::<std::collections::BTreeSet<_>>().into_iter().collect::<Vec<_>>(),
                "{kind:?}"
            );
            for (name, value) in there {
                let constant = named[&name].get("const").and_then(|value| value.as_str());
                assert!(constant.is_none_or(|constant| constant == value), "{kind:?}: {name}");
            }
        }
    }

    #[test]
    fn what_is_no_event_is_delivered_as_it_is() {
        let message = Message::of(b"not json");
        assert_eq!((message.headers.len(), message.value.as_slice()), (0, &b"not json"[..]));
    }
}
