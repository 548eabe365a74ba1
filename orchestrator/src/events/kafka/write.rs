//! Writes to a topic: a stream of events in order, or one record whose place is waited for.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use rdkafka::{
    ClientContext,
    config::{FromClientConfigAndContext, RDKafkaLogLevel},
    error::{KafkaError, RDKafkaErrorCode},
    message::{BorrowedMessage, DeliveryResult, Header, OwnedHeaders, ToBytes},
    producer::{BaseProducer, BaseRecord, FutureProducer, FutureRecord, Producer as _, ProducerContext},
    util::Timeout,
};

use super::{Message, Told, Topic, check, writer};
use crate::events::Unfit;

/// Sends events, and gives back which of them the topic has.
pub(in crate::events) struct Sender {
    producer: BaseProducer<Reports>,
    topic: String,
}

/// Whether there was room for an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::events) enum Offered {
    Taken,
    Full,
}

/// What was heard of events that were sent, until somebody asks.
#[derive(Default)]
struct Reports {
    heard: Mutex<Vec<(u64, Result<(), KafkaError>)>>,
    told: Told,
}

impl ClientContext for Reports {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        self.told.log(level, facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        self.told.error(error, reason);
    }
}

impl ProducerContext for Reports {
    /// The number of a record of the log.
    type DeliveryOpaque = Box<u64>;

    fn delivery(&self, result: &DeliveryResult<'_>, number: Box<u64>) {
        let result = result.as_ref().map(|_: &BorrowedMessage<'_>| ()).map_err(|(error, _)| error.clone());
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).push((*number, result));
    }
}

impl Sender {
    pub(in crate::events) fn new(topic: &Topic) -> Result<Sender, Unfit> {
        let producer = BaseProducer::from_config_and_context(&writer(&topic.brokers)?, Reports::default());
        let producer = producer.map_err(|error| Unfit::Refused(error.to_string()))?;
        Ok(Sender { producer, topic: topic.name.clone() })
    }

    /// Sends the event of record `number`, unless too many are on their way.
    pub(in crate::events) fn offer(&self, number: u64, message: &Message) -> Result<Offered, KafkaError> {
        let record = BaseRecord::with_opaque_to(&self.topic, Box::new(number))
            .key(&message.key)
            .payload(&message.value)
            .timestamp(message.at_ms)
            .headers(message.all_headers());
        match self.producer.send(record) {
            Ok(()) => Ok(Offered::Taken),
            Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), _)) => Ok(Offered::Full),
            Err((error, _)) => Err(error),
        }
    }

    /// Waits so long for the brokers' word, and gives what they have said: which records were delivered, in any order.
    ///
    /// Errors: one was not, or no later one can be: from there on everything has to be sent again, by another sender.
    pub(in crate::events) fn heard(&self, wait: Duration) -> Result<Vec<u64>, KafkaError> {
        self.producer.poll(wait);
        let reports = std::mem::take(&mut *self.producer.context().heard.lock().unwrap_or_else(PoisonError::into_inner));
        let heard: Result<Vec<u64>, KafkaError> = reports.into_iter().map(|(number, result)| result.map(|()| number)).collect();
        match self.producer.client().fatal_error() {
            Some((code, _)) => Err(KafkaError::MessageProduction(code)),
            None => heard,
        }
    }

    /// Why brokers did not let us in since this was asked last, if one did not. They are asked again without end.
    pub(in crate::events) fn barred(&self) -> Option<String> {
        self.producer.context().told.barred()
    }
}

impl Message {
    fn all_headers(&self) -> OwnedHeaders {
        headers(self.headers.iter().map(|(name, value)| (name.as_str(), value.as_str())))
    }
}

fn headers<'a>(pairs: impl Iterator<Item = (&'a str, &'a str)>) -> OwnedHeaders {
    pairs.fold(OwnedHeaders::new_with_capacity(16), |headers, (key, value)| headers.insert(Header { key, value: Some(value) }))
}

/// Where a record is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// The partition of the topic, from 0.
    pub partition: i32,
    /// The place in the partition, from 0.
    pub offset: i64,
}

/// The topic was not heard to have a record. It may have it all the same: nobody knows.
#[derive(Debug, thiserror::Error)]
#[error("the topic {topic} did not acknowledge a record: {reason}")]
pub struct Unacknowledged {
    topic: String,
    reason: String,
}

/// Writes single records, and waits until every replica that must have them has them.
#[derive(Clone)]
pub struct Producer {
    inner: FutureProducer<Told>,
    topic: String,
}

impl Producer {
    /// A producer for `topic`, after [`check`]ing that it keeps what it is given. A record that is not acknowledged within
    /// `patience` is given up.
    ///
    /// Errors: the topic cannot be asked about now, or must not be used.
    pub async fn open(topic: &Topic, patience: Duration) -> Result<Producer, Unfit> {
        check(topic).await?;
        let mut config = writer(&topic.brokers)?;
        // Whoever waits decides what becomes of a failure; one record must not stop the next.
        config.set("message.timeout.ms", patience.as_millis().max(1).to_string()).set("enable.gapless.guarantee", "false");
        config.set("linger.ms", "0");
        let inner = FutureProducer::from_config_and_context(&config, Told::default()).map_err(|error| Unfit::Refused(error.to_string()))?;
        Ok(Producer { inner, topic: topic.name.clone() })
    }

    /// Writes one record and gives its place. Cancel safe, but the record may then have been written or not.
    ///
    /// Errors: it was not acknowledged in time; it may have been written all the same.
    pub async fn write(&self, key: &str, named: &[(&str, &str)], value: &[u8]) -> Result<Place, Unacknowledged> {
        self.send(FutureRecord::to(&self.topic).key(key).payload(value).headers(headers(named.iter().copied()))).await
    }

    /// Writes an event beside those of its turn: where these are, even if keys belong elsewhere by now.
    pub(super) async fn write_beside(&self, partition: i32, message: &Message) -> Result<Place, Unacknowledged> {
        let record = FutureRecord::to(&self.topic).partition(partition).timestamp(message.at_ms);
        self.send(record.key(&message.key).payload(&message.value).headers(message.all_headers())).await
    }

    async fn send<K: ToBytes + ?Sized, V: ToBytes + ?Sized>(&self, record: FutureRecord<'_, K, V>) -> Result<Place, Unacknowledged> {
        match self.inner.send(record, Timeout::After(Duration::ZERO)).await {
            Ok(place) => Ok(Place { partition: place.partition, offset: place.offset }),
            Err((error, _)) => Err(Unacknowledged { topic: self.topic.clone(), reason: error.to_string() }),
        }
    }
}

impl std::fmt::Debug for Producer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Producer").field("topic", &self.topic).finish_non_exhaustive()
    }
}
