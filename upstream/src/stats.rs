//! What an upstream counts, for whoever turns it into metrics.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Counters that only grow, one set per upstream.
#[derive(Debug, Default)]
pub struct Stats {
    /// Turns for which an answer was asked.
    pub opened: Count,
    /// Connections made.
    pub connected: Count,
    /// Connections that could not be made.
    pub connect_failed: Count,
    /// Requests sent on a connection kept from an earlier turn.
    pub reused: Count,
    /// Of these, requests sent again because the endpoint had closed the connection meanwhile.
    pub stale: Count,
    /// Turns tried again on another endpoint.
    pub retried: Count,
    /// Turns that would have been, had the budget allowed it.
    pub retry_denied: Count,
    /// Answers that were left before their end.
    pub left: Count,
    /// Cancel calls that the orchestrator took, and stops sent on a WebSocket.
    pub cancelled: Count,
    /// Cancel calls that it did not, or for which there was no room.
    pub cancel_failed: Count,
    /// Bytes read from answers.
    pub bytes: Count,
    /// Requests forwarded as they are.
    pub forwarded: Count,
}

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Count(AtomicU64);

impl Count {
    /// Where it stands.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
    pub(crate) fn one(&self) {
        self.add(1);
    }
    pub(crate) fn add(&self, n: u64) {
        self.0.fetch_add(n, Relaxed);
    }
}

/// How one endpoint is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointHealth {
    /// Host and port.
    pub endpoint: String,
    /// Whether it gets turns: the checks and the latest connections say so.
    pub ready: bool,
    /// Answers open on it now.
    pub in_flight: usize,
    /// Connections kept for later.
    pub idle: usize,
}
