//! Speaks to Kafka, through librdkafka: checks a topic, writes to it in order, reads it back.

mod check;
mod message;
mod read;
mod reap;
mod write;

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use rdkafka::{
    ClientConfig, ClientContext,
    config::RDKafkaLogLevel,
    error::{KafkaError, RDKafkaErrorCode},
    message::DeliveryResult,
    producer::ProducerContext,
};

pub(crate) use read::read_topic;
pub use read::{Unread, follow_topic, verify_topic};
pub use reap::{Left, Orphan, Orphans, orphans, reap};
pub use write::{Place, Producer, Unacknowledged};
pub(super) use {
    check::check,
    message::Message,
    write::{Offered, Sender},
};

use super::{Brokers, Sasl, Tls, Topic, Unfit};

/// How long a broker may take to answer a question about a topic.
const ANSWER: Duration = Duration::from_secs(3);
/// How long a client that got none is asked what it was told meanwhile: it tells one thing after the other.
const REASONS: Duration = Duration::from_millis(50);

/// What every client of these brokers has in common.
///
/// Errors: [`Unfit::Unprotected`], [`Unfit::Refused`].
fn client(brokers: &Brokers) -> Result<ClientConfig, Unfit> {
    if cfg!(not(feature = "kafka-tls")) && (brokers.tls.is_some() || brokers.sasl.is_some()) {
        return Err(Unfit::Unprotected);
    }
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", brokers.addresses.join(",")).set("client.id", "headgate");
    let protocol = match (&brokers.tls, &brokers.sasl) {
        (None, None) => "plaintext",
        (Some(_), None) => "ssl",
        (None, Some(_)) => "sasl_plaintext",
        (Some(_), Some(_)) => "sasl_ssl",
    };
    config.set("security.protocol", protocol);
    if let Some(Tls { ca, own }) = &brokers.tls {
        let (certificate, key) = own.as_ref().map(|(certificate, key)| (certificate, key)).unzip();
        for (name, path) in [("ssl.ca.location", ca.as_ref()), ("ssl.certificate.location", certificate), ("ssl.key.location", key)] {
            let Some(path) = path else { continue };
            // OpenSSL would not say which file it is that it cannot read.
            std::fs::File::open(path).map_err(|error| Unfit::Refused(format!("cannot read {}: {error}", path.display())))?;
            let text = path.to_str().ok_or_else(|| Unfit::Refused(format!("librdkafka takes no such path: {}", path.display())))?;
            config.set(name, text);
        }
        // The OpenSSL that is built in believes that its certificates are where it was built. It hears the environment, as all others do.
        if ca.is_none() && ["SSL_CERT_FILE", "SSL_CERT_DIR"].into_iter().all(|name| std::env::var_os(name).is_none()) {
            config.set("ssl.ca.location", "probe");
        }
    }
    if let Some(Sasl { mechanism, username, password }) = &brokers.sasl {
        config.set("sasl.mechanism", *mechanism).set("sasl.username", username).set("sasl.password", password.expose());
    }
    // After an outage we come back within seconds, not minutes.
    config.set("reconnect.backoff.max.ms", "2000");
    config.set_log_level(RDKafkaLogLevel::Info);
    Ok(config)
}

/// A client that writes to a topic once and in order, and whom nothing but the broker's word satisfies.
fn writer(brokers: &Brokers) -> Result<ClientConfig, Unfit> {
    let mut config = client(brokers)?;
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
    // Brokers refuse what comes after a batch that they have not taken. The mock takes it, and that is heard as its word for the batch.
    #[cfg(test)]
    if brokers.is_mock {
        config.set("max.in.flight", "1");
    }
    Ok(config)
}

/// Tells what librdkafka has to say where the rest of the process tells it, and keeps why brokers are not reached, or do not let us in.
#[derive(Debug, Default)]
struct Told {
    away: Mutex<Option<String>>,
    barred: Mutex<Option<String>>,
}

impl Told {
    /// Why brokers did not let us in since this was asked last, if one did not.
    fn barred(&self) -> Option<String> {
        self.barred.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Why a question was not answered.
    fn unanswered(&self, error: &KafkaError) -> Unfit {
        let away = || self.away.lock().unwrap_or_else(PoisonError::into_inner).take().unwrap_or_else(|| error.to_string());
        self.barred().map_or_else(|| Unfit::Away(away()), Unfit::Barred)
    }
}

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
            code => {
                tracing::debug!(%error, reason, "kafka");
                // Both sides speak TLS and one of them breaks off: no code of its own says so.
                let is_refusal = matches!(code, Some(RDKafkaErrorCode::Authentication | RDKafkaErrorCode::SSL)) || reason.contains("SSL");
                let kept = if is_refusal { &self.barred } else { &self.away };
                *kept.lock().unwrap_or_else(PoisonError::into_inner) = Some(reason.to_owned());
            }
        }
    }
}

/// For a producer that asks and writes nothing.
impl ProducerContext for Told {
    type DeliveryOpaque = ();

    fn delivery(&self, _: &DeliveryResult<'_>, (): ()) {}
}

#[cfg(test)]
mod tests;
