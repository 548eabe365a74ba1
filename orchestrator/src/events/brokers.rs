//! Which brokers a topic is on, by what we trust them, and by what they know us.

use std::path::PathBuf;

use headgate_contracts::Secret;

/// Brokers of Kafka.
#[derive(Debug, Clone, Default)]
pub struct Brokers {
    /// Some of them, each as `host:port`.
    pub addresses: Vec<String>,
    /// How they are spoken to in private; `None`: in plain text.
    pub tls: Option<Tls>,
    /// Who we are to them; `None`: nobody, or whom our certificate names.
    pub sasl: Option<Sasl>,
    /// Whether they are librdkafka's own mock.
    #[cfg(all(test, feature = "kafka"))]
    pub(super) is_mock: bool,
}

impl Brokers {
    /// Brokers that ask for nothing.
    pub fn open(addresses: Vec<String>) -> Brokers {
        Brokers { addresses, ..Brokers::default() }
    }
}

/// TLS with brokers, from files in PEM. They are read whenever a client is made.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tls {
    /// The certificates to trust; `None`: those of the machine.
    pub ca: Option<PathBuf>,
    /// Our certificate and its key.
    pub own: Option<(PathBuf, PathBuf)>,
}

/// A user of the brokers.
#[derive(Debug, Clone)]
pub struct Sasl {
    /// How the password is proved: `PLAIN`, `SCRAM-SHA-256` or `SCRAM-SHA-512`.
    pub mechanism: &'static str,
    /// The user.
    pub username: String,
    /// Its password.
    pub password: Secret,
}
