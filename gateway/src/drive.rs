//! Who polls a turn: its client's connection while there is one, a task of its own afterwards.
//!
//! While the client is there the turn runs inside the client's response body: no task and no channel lie between the
//! upstream's bytes and the client's (`docs/decisions/0003-turns-run-in-their-clients-task.md`). When the client leaves,
//! what is left of the turn, be it a grace period or only the last log line, goes on in a task; and so it does once the
//! client takes nothing, since a connection that cannot write polls no body.

use std::{
    future::Future,
    panic::AssertUnwindSafe,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
};

use futures_util::FutureExt;

/// A running turn.
#[derive(Default)]
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

/// What an HTTP/1.1 connection and the turn that it carries have to know of each other, and HTTP has no words for.
#[derive(Default)]
pub struct Line {
    drive: Mutex<Drive>,
    is_busy: AtomicBool,
    is_stalled: AtomicBool,
    is_late: AtomicBool,
    wrong: OnceLock<&'static str>,
    is_shared: bool,
}

impl Line {
    /// One stream of an HTTP/2 connection: while its window is shut nobody polls its body, so its turns always run by themselves.
    pub fn shared() -> Line {
        Line { is_shared: true, ..Line::default() }
    }

    fn drive(&self) -> MutexGuard<'_, Drive> {
        // Panics of a turn are caught below this lock.
        self.drive.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether an answer is under way: whatever the client sends now counts as leaving.
    pub fn is_busy(&self) -> bool {
        self.is_busy.load(Ordering::Relaxed)
    }

    /// The client takes nothing: its turn goes on by itself, so that it sees its clock and whoever stops it.
    pub fn let_go(&self) {
        self.drive().go_on_alone();
    }

    /// The client took nothing for so long that its connection ends.
    pub fn stall(&self) {
        self.is_stalled.store(true, Ordering::Relaxed);
    }

    /// The connection ends because a request's head did not come in time.
    pub fn be_late(&self) {
        self.is_late.store(true, Ordering::Relaxed);
    }

    /// Whether it does.
    pub fn is_late(&self) -> bool {
        self.is_late.load(Ordering::Relaxed)
    }

    /// A request came that has to be refused for how it is framed. It is the connection's last one.
    pub fn be_wrong(&self, why: &'static str) {
        // The first fault is the one that counts: what comes after it may be read one way or the other.
        let _ = self.wrong.set(why);
    }

    /// What is wrong with a request that came.
    pub fn wrong(&self) -> Option<&'static str> {
        self.wrong.get().copied()
    }
}

/// A turn on its client's line. Dropping it is the client's leaving.
pub struct Call(Arc<Line>);

impl Call {
    /// The turn is polled here from now on, where the line is its own.
    pub fn new(line: Arc<Line>, drive: Drive) -> Call {
        *line.drive() = drive;
        if line.is_shared {
            line.let_go();
        }
        line.is_busy.store(true, Ordering::Relaxed);
        Call(line)
    }

    /// Moves the turn on, where it is still here.
    pub fn poll(&self, cx: &mut Context<'_>) {
        self.0.drive().poll(cx);
    }

    /// Whether the client left by taking nothing.
    pub fn is_stalled(&self) -> bool {
        self.0.is_stalled.load(Ordering::Relaxed)
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        self.0.is_busy.store(false, Ordering::Relaxed);
        self.0.let_go();
    }
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use tokio::sync::oneshot;

    use super::*;

    /// A turn that waits to be told, and tells when it is over.
    fn turn() -> (Drive, oneshot::Sender<()>, oneshot::Receiver<()>) {
        let (go, told) = oneshot::channel();
        let (over, ended) = oneshot::channel();
        let drive = Drive::new(async move {
            let _ = told.await;
            let _ = over.send(());
        });
        (drive, go, ended)
    }

    fn poll(call: &Call) {
        call.poll(&mut Context::from_waker(Waker::noop()));
    }

    #[tokio::test]
    async fn a_turn_goes_on_by_itself_when_its_client_leaves() {
        let (drive, go, ended) = turn();
        let call = Call::new(Arc::default(), drive);
        poll(&call);
        drop(call);
        go.send(()).unwrap();
        ended.await.unwrap();
    }

    #[tokio::test]
    async fn a_turn_goes_on_by_itself_when_its_client_takes_nothing_and_its_line_polls_on_for_nothing() {
        let (drive, go, ended) = turn();
        let line = Arc::new(Line::default());
        let call = Call::new(line.clone(), drive);
        poll(&call);
        assert!(line.is_busy());
        line.let_go();
        poll(&call);
        go.send(()).unwrap();
        ended.await.unwrap();
        assert!(line.is_busy(), "its answer is still under way");
        drop(call);
        assert!(!line.is_busy());
    }

    #[tokio::test]
    async fn a_turn_on_a_shared_line_never_waits_for_its_client() {
        let (drive, go, ended) = turn();
        let _call = Call::new(Arc::new(Line::shared()), drive);
        go.send(()).unwrap();
        ended.await.unwrap();
    }

    #[tokio::test]
    async fn a_panic_ends_its_turn_and_leaves_the_line_whole() {
        let line = Arc::new(Line::default());
        let call = Call::new(line.clone(), Drive::new(async { panic!("a turn that panics") }));
        poll(&call);
        poll(&call);
        drop(call);
        let (drive, go, ended) = turn();
        let call = Call::new(line, drive);
        go.send(()).unwrap();
        poll(&call);
        ended.await.unwrap();
    }
}
