//! Speaks to Kafka, through librdkafka: checks a topic, writes to it in order, reads it back.

mod check;
mod message;
mod read;
mod write;

use std::time::Duration;

use rdkafka::{
    ClientConfig, ClientContext,
    config::RDKafkaLogLevel,
    error::{KafkaError, RDKafkaErrorCode},
};

pub use read::{Unread, follow_topic, verify_topic};
pub use write::{Place, Producer, Unacknowledged};
pub(super) use {
    check::check,
    message::Message,
    write::{Offered, Sender},
};

use super::Topic;

/// How long a broker may take to answer a question about a topic.
const ANSWER: Duration = Duration::from_secs(3);

/// What every client of these brokers has in common.
fn client(brokers: &[String]) -> ClientConfig {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", brokers.join(",")).set("client.id", "headgate");
    // After an outage we come back within seconds, not minutes.
    config.set("reconnect.backoff.max.ms", "2000");
    config.set_log_level(RDKafkaLogLevel::Info);
    config
}

/// A client that writes to a topic once and in order, and whom nothing but the broker's word satisfies.
fn writer(brokers: &[String]) -> ClientConfig {
    let mut config = client(brokers);
    for (name, value) in [
        ("enable.idempotence", "true"),
        // What cannot be delivered stops what comes after it: a gap would be filled later, out of order.
        ("enable.gapless.guarantee", "true"),
        ("acks", "all"),
        ("max.in.flight", "5"),
        // For ever: the log owns the events, and an outage has no length at which they are given up.
        ("message.timeout.ms", "0"),
        ("linger.ms", "5"),
        ("compression.codec", "lz4"),
        // What Kafka's own clients take: all writers agree where a key belongs.
        ("partitioner", "murmur2_random"),
        ("queue.buffering.max.messages", "2000"),
        ("queue.buffering.max.kbytes", "16384"),
    ] {
        config.set(name, value);
    }
    config
}

/// Tells what librdkafka has to say where the rest of the process tells it.
#[derive(Debug, Clone, Copy)]
struct Told;

impl ClientContext for Told {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        match level {
            RDKafkaLogLevel::Emerg | RDKafkaLogLevel::Alert | RDKafkaLogLevel::Critical => tracing::error!(facility, message, "kafka"),
            // Every attempt to reach a broker that is away is an error to librdkafka.
            RDKafkaLogLevel::Error
            | RDKafkaLogLevel::Warning
            | RDKafkaLogLevel::Notice
            | RDKafkaLogLevel::Info
            | RDKafkaLogLevel::Debug => tracing::debug!(facility, message, "kafka"),
        }
    }

    fn error(&self, error: KafkaError, reason: &str) {
        match error.rdkafka_error_code() {
            Some(RDKafkaErrorCode::AllBrokersDown) => tracing::warn!(reason, "no Kafka broker can be reached"),
            Some(_) | None => tracing::debug!(%error, reason, "kafka"),
        }
    }
}

#[cfg(test)]
mod tests;
