//! Reads a topic from its beginning, and judges it as the log itself is judged.

use std::{
    collections::{HashMap, hash_map::Entry},
    io,
    time::{Duration, Instant},
};

use rdkafka::{
    Message as _, Offset, TopicPartitionList,
    config::FromClientConfigAndContext,
    consumer::{BaseConsumer, Consumer as _, ConsumerContext},
    error::{KafkaError, RDKafkaErrorCode},
    message::{BorrowedMessage, Headers as _},
    types::RDKafkaRespErr,
};

use super::{Brokers, REASONS, Told, client, message};
use crate::events::verify::{Judge, Judged};

/// The header of an event that no orchestrator wrote.
const REAPED_BY: &str = "ce_reapedby";
/// How long nothing may come from a topic that has more.
const SILENCE: Duration = Duration::from_secs(30);
/// How often whoever follows a silent topic is told that there is nothing new.
const MOMENT: Duration = Duration::from_millis(500);
/// How long the brokers may take to tell what there is: they may just be starting.
const ANSWER: Duration = Duration::from_secs(10);

impl ConsumerContext for Told {}

/// Why a topic cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum Unread {
    /// No broker gives it.
    #[error("cannot read the topic {topic}: {reason}")]
    Kafka {
        /// Which.
        topic: String,
        /// Why.
        reason: String,
    },
    /// Whoever is told does not listen.
    #[error(transparent)]
    Listener(#[from] io::Error),
}

/// Reads everything that is in a topic now, partition by partition mixed, each in its order, and gives each event to `each` as one
/// line of JSON; with `on`, also what comes later, for ever.
///
/// Errors: it cannot be read, or `each` failed.
pub fn follow_topic(brokers: &Brokers, topic: &str, on: bool, mut each: impl FnMut(Option<&[u8]>) -> io::Result<()>) -> Result<(), Unread> {
    read(brokers, topic, on, |_, message| match message {
        Some(message) => match event(message) {
            Some(event) => each(Some(&event)),
            None => Ok(()),
        },
        None => each(None),
    })
    .map(drop)
}

/// Judges everything that is in a topic now. An event that is there again, word for word, counts once: its first place. What a reaper
/// had written where something stood already counts for nothing.
///
/// Errors: it cannot be read.
pub fn verify_topic(brokers: &Brokers, topic: &str) -> Result<Judged, Unread> {
    judge(brokers, topic, |_, _| {})
}

/// The same, and gives each event to `each`, with the message that it came in.
pub(super) fn judge(brokers: &Brokers, topic: &str, mut each: impl FnMut(&BorrowedMessage<'_>, &[u8])) -> Result<Judged, Unread> {
    let mut judge = Judge::default();
    // Which partition each event came in first, and what it said.
    let mut seen: HashMap<String, (i32, u32)> = HashMap::new();
    // Where the oldest is gone is known only at the end of a partition's beginning: before anything is judged.
    let partitions = read(brokers, topic, false, |trimmed, message| {
        judge.trimmed |= trimmed;
        let Some(message) = message else { return Ok(()) };
        let offset = u64::try_from(message.offset()).unwrap_or(0);
        let Some(event) = event(message) else {
            judge.judged.object(offset, None, format!("not an event, in partition {}", message.partition()));
            return Ok(());
        };
        each(message, &event);
        let of = |name| header(message, name).unwrap_or_default();
        if message.key() != Some(of("ce_partitionkey").as_bytes()) {
            judge.judged.object(offset, None, format!("its key is not that of its session, in partition {}", message.partition()));
        }
        let said = crc32c::crc32c_append(crc32c::crc32c(of("ce_type").as_bytes()), message.payload().unwrap_or_default());
        match seen.entry(of("ce_id").to_owned()) {
            Entry::Vacant(place) => {
                place.insert((message.partition(), said));
                judge.event_alone(offset, &event);
            }
            Entry::Occupied(first) if *first.get() == (message.partition(), said) || header(message, REAPED_BY).is_some() => {
                judge.judged.repeated += 1;
            }
            Entry::Occupied(first) => {
                let (partition, _) = first.get();
                let what = format!("another event of its id came before, in partition {partition}, not {}", message.partition());
                judge.judged.object(offset, None, what);
            }
        }
        Ok(())
    })?;
    judge.judged.segments = partitions;
    Ok(judge.end())
}

/// A record as a topic keeps it.
pub(crate) struct Kept<'a> {
    pub(crate) partition: i32,
    pub(crate) offset: u64,
    pub(crate) key: Option<&'a [u8]>,
    pub(crate) value: &'a [u8],
}

/// Gives every record that is in a topic now to `each`, and whether older ones than the first were let go.
///
/// Errors: it cannot be read.
pub(crate) fn read_topic(brokers: &Brokers, topic: &str, mut each: impl FnMut(bool, &Kept<'_>)) -> Result<(), Unread> {
    read(brokers, topic, false, |trimmed, message| {
        if let Some(message) = message {
            let (partition, offset) = (message.partition(), u64::try_from(message.offset()).unwrap_or(0));
            each(trimmed, &Kept { partition, offset, key: message.key(), value: message.payload().unwrap_or_default() });
        }
        Ok(())
    })
    .map(drop)
}

fn header<'a>(message: &'a BorrowedMessage<'_>, name: &str) -> Option<&'a str> {
    let found = message.headers()?.iter().find(|header| header.key == name)?.value?;
    str::from_utf8(found).ok()
}

fn event(message: &BorrowedMessage<'_>) -> Option<Vec<u8>> {
    let headers = message.headers()?.iter().filter_map(|header| Some((header.key, header.value?)));
    message::event(headers, message.payload().unwrap_or_default())
}

/// Gives each message, and whether older ones than the first were let go; `None` wherever all that there is has been given. How
/// many partitions there are.
fn read(
    brokers: &Brokers,
    topic: &str,
    on: bool,
    mut each: impl FnMut(bool, Option<&BorrowedMessage<'_>>) -> io::Result<()>,
) -> Result<u64, Unread> {
    let unread = |reason: &dyn ToString| Unread::Kafka { topic: topic.to_owned(), reason: reason.to_string() };
    let kafka = |error: KafkaError| unread(&error);
    let mut config = client(brokers).map_err(|unfit| unread(&unfit))?;
    // Nothing is remembered of us: we belong to no group.
    config.set("group.id", "headgate-events").set("enable.auto.commit", "false").set("auto.offset.reset", "earliest");
    let consumer: BaseConsumer<Told> = BaseConsumer::from_config_and_context(&config, Told::default()).map_err(kafka)?;
    let metadata = consumer.fetch_metadata(Some(topic), ANSWER).map_err(|error| {
        // What it was told of meanwhile it hears when it is asked for messages.
        while consumer.poll(REASONS).is_some() {}
        unread(&consumer.context().unanswered(&error))
    })?;
    let found = metadata.topics().iter().find(|found| found.name() == topic);
    let found = found.filter(|found| found.error() != Some(RDKafkaRespErr::RD_KAFKA_RESP_ERR_UNKNOWN_TOPIC_OR_PART));
    let found = found.ok_or_else(|| unread(&"there is no such topic"))?;
    // Up to where each partition is to be read.
    let mut ends = HashMap::new();
    let mut assigned = TopicPartitionList::new();
    let mut trimmed = false;
    for partition in found.partitions() {
        let (first, end) = consumer.fetch_watermarks(topic, partition.id(), ANSWER).map_err(kafka)?;
        trimmed |= first > 0;
        if end > first {
            ends.insert(partition.id(), end);
        }
        assigned.add_partition_offset(topic, partition.id(), Offset::Beginning).map_err(kafka)?;
    }
    consumer.assign(&assigned).map_err(kafka)?;
    each(trimmed, None)?;
    let mut heard = Instant::now();
    while on || !ends.is_empty() {
        match consumer.poll(MOMENT) {
            Some(Ok(message)) => {
                heard = Instant::now();
                if ends.get(&message.partition()).is_some_and(|end| message.offset() + 1 >= *end) {
                    ends.remove(&message.partition());
                }
                each(trimmed, Some(&message))?;
            }
            Some(Err(error)) if !is_passing(&error) => return Err(kafka(error)),
            Some(Err(_)) | None if ends.is_empty() => each(trimmed, None)?,
            Some(Err(_)) | None if heard.elapsed() < SILENCE => {}
            Some(Err(_)) | None => return Err(unread(&format!("nothing came for {} s", SILENCE.as_secs()))),
        }
    }
    Ok(found.partitions().len() as u64)
}

/// Whether it may be over by itself: the client goes on trying.
fn is_passing(error: &KafkaError) -> bool {
    use RDKafkaErrorCode::{AllBrokersDown, BrokerTransportFailure, OperationTimedOut, Resolve};
    error.rdkafka_error_code().is_some_and(|code| matches!(code, AllBrokersDown | BrokerTransportFailure | OperationTimedOut | Resolve))
}
