//! Who polls a turn: its client's connection while there is one, a task of its own afterwards.
//!
//! While the client is there the turn runs inside the client's response body: no task and no channel lie between the
//! upstream's bytes and the client's (`docs/decisions/0003-turns-run-in-their-clients-task.md`). When the client leaves,
//! what is left of the turn, be it a grace period or only the last log line, goes on in a task.

use std::{
    future::Future,
    panic::AssertUnwindSafe,
    pin::Pin,
    task::{Context, Poll},
};

use futures_util::FutureExt;

/// A running turn.
pub struct Drive(Option<Pin<Box<dyn Future<Output = ()> + Send>>>);

impl Drive {
    /// Takes a turn. A panic in it ends that turn and nothing else: its outbox, dropped by the unwinding, tells the client.
    pub fn new(turn: impl Future<Output = ()> + Send + 'static) -> Drive {
        let caught = AssertUnwindSafe(turn).catch_unwind().map(|outcome| {
            if outcome.is_err() {
                tracing::error!(code = "internal_error", "a turn panicked");
            }
        });
        Drive(Some(Box::pin(caught)))
    }

    /// Moves the turn on as far as it can go. Whether it is over is the reader's to find out.
    pub fn poll(&mut self, cx: &mut Context<'_>) {
        if let Some(turn) = &mut self.0
            && let Poll::Ready(()) = turn.as_mut().poll(cx)
        {
            self.0 = None;
        }
    }

    /// A turn that somebody else polls.
    pub fn elsewhere() -> Drive {
        Drive(None)
    }

    /// Lets the turn run by itself, for connections that cannot poll it while their peer reads nothing (HTTP/2 streams).
    #[must_use]
    pub fn detach(mut self) -> Drive {
        self.go_on_alone();
        Drive::elsewhere()
    }

    fn go_on_alone(&mut self) {
        if let (Some(turn), Ok(runtime)) = (self.0.take(), tokio::runtime::Handle::try_current()) {
            runtime.spawn(turn);
        }
    }
}

impl Drop for Drive {
    fn drop(&mut self) {
        self.go_on_alone();
    }
}
