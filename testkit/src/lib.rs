//! Judges Headgate from outside: torture upstreams, strict clients, a fault proxy and real services.
//!
//! Nothing here uses the crates it judges. The readers are strict where a client would be lenient: what they accept is what
//! `docs/wire.md` allows, and every refusal is a [`Broken`] that names the rule. Sockets are real, ports are chosen by the
//! system, and no wait is endless: see [`within`]. Do not pause tokio's clock in a test that uses a socket: an idle runtime
//! would run through every time limit at once.

mod broken;
mod http1;

pub mod answer;
pub mod browser;
pub mod canary;
pub mod client;
pub mod dialect;
pub mod frames;
pub mod hop;
pub mod kafka;
pub mod proxy;
pub mod services;
pub mod sse;
pub mod upstream;
pub mod ws;

pub use broken::Broken;
pub use http1::Head;

use std::future::Future;
use std::panic::Location;
use std::time::Duration;

/// How long the kit itself waits for a peer before it calls the test failed. Longer than any default of Headgate's that a
/// test may have to wait for (15 s between heartbeats), shorter than a person's patience.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// What happens at once has happened by then, also on a machine that gives a test a fifth of its time. Less than any default of Headgate's
/// that would make it happen all the same (10 s without a byte taken, 15 s between heartbeats).
pub const AT_ONCE: Duration = Duration::from_secs(5);

/// Waits for `future`, and panics with a sentence if it is not done after `limit`.
///
/// `what` completes the sentence "waited 2s in vain for ...": `within(SECOND * 2, upstream.closed(1), "the model to be stopped")`.
#[track_caller]
pub fn within<F: Future>(limit: Duration, future: F, what: &str) -> impl Future<Output = F::Output> {
    let caller = Location::caller();
    async move {
        match tokio::time::timeout(limit, future).await {
            Ok(output) => output,
            Err(_) => panic!("waited {limit:?} in vain for {what} (at {caller})"),
        }
    }
}

/// [`within`] the kit's own [`PATIENCE`].
#[track_caller]
pub fn soon<F: Future>(future: F, what: &str) -> impl Future<Output = F::Output> {
    within(PATIENCE, future, what)
}

/// [`within`] the time that what happens [`AT_ONCE`] may take.
#[track_caller]
pub fn at_once<F: Future>(future: F, what: &str) -> impl Future<Output = F::Output> {
    within(AT_ONCE, future, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_done_in_time_is_handed_on() {
        assert_eq!(within(Duration::from_secs(5), async { 7 }, "a number").await, 7);
    }

    #[tokio::test(start_paused = true)]
    #[should_panic(expected = "waited 2s in vain for the model to be stopped")]
    async fn what_never_comes_fails_the_test_with_a_sentence() {
        within(Duration::from_secs(2), std::future::pending::<()>(), "the model to be stopped").await;
    }
}
