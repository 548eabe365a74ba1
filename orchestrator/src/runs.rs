//! Knows which turns are open: at most one per session, so many in all, each one stoppable by its id.

use std::{
    collections::{HashMap, hash_map::Entry},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use headgate_contracts::{Code, Fault, Gone, TurnId, wire::chat::Confirmation};
use tokio::{
    sync::{oneshot, watch},
    time::{Instant, timeout_at},
};

use crate::history::Key;

/// The open turns of this process.
pub(crate) struct Runs {
    max: usize,
    grace: Duration,
    open: Mutex<Open>,
    count: watch::Sender<usize>,
}

#[derive(Default)]
struct Open {
    turns: HashMap<TurnId, Turn>,
    sessions: HashMap<Key, TurnId>,
    drained: bool,
}

/// One open turn.
struct Turn {
    key: Key,
    stop: watch::Sender<Option<Gone>>,
    asked: Option<Asked>,
}

/// What its person is asked.
struct Asked {
    id: String,
    /// `None`: there has been an answer.
    reply: Option<oneshot::Sender<bool>>,
}

/// Why no turn can be begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refused {
    /// The session, or a turn of that id, is still open.
    Conflict,
    /// There are as many turns as there may be.
    Full,
    /// No new turns are taken.
    Draining,
}

impl Runs {
    /// At most `max` turns at once; a session that is busy is waited for, for `grace`.
    pub(crate) fn new(max: usize, grace: Duration) -> Runs {
        Runs { max, grace, open: Mutex::default(), count: watch::channel(0).0 }
    }

    /// Begins a turn. Dropping the lease ends it.
    ///
    /// A client that stops a turn and at once begins the next one would meet the last moments of the old one: so a busy session
    /// is waited for, but never longer than the grace. Cancel safe.
    pub(crate) async fn begin(self: &Arc<Runs>, turn: TurnId, key: &Key) -> Result<Lease, Refused> {
        let until = Instant::now() + self.grace;
        loop {
            let mut older = match self.try_begin(turn, key) {
                Ok(lease) => return Ok(lease),
                Err(Busy::Refused(refused)) => return Err(refused),
                Err(Busy::Open(older)) => older,
            };
            // The sender lives in the table until the older turn has ended; then waiting for a change fails.
            let ended = async { while older.changed().await.is_ok() {} };
            timeout_at(until, ended).await.map_err(|_| Refused::Conflict)?;
        }
    }

    fn try_begin(self: &Arc<Runs>, turn: TurnId, key: &Key) -> Result<Lease, Busy> {
        let mut open = self.open();
        if open.drained {
            return Err(Busy::Refused(Refused::Draining));
        }
        if let Some(older) = open.sessions.get(key).and_then(|older| open.turns.get(older)) {
            return Err(Busy::Open(older.stop.subscribe()));
        }
        if open.turns.len() >= self.max {
            return Err(Busy::Refused(Refused::Full));
        }
        let (stop, gone) = watch::channel(None);
        match open.turns.entry(turn) {
            Entry::Occupied(_) => return Err(Busy::Refused(Refused::Conflict)),
            Entry::Vacant(place) => place.insert(Turn { key: key.clone(), stop, asked: None }),
        };
        open.sessions.insert(key.clone(), turn);
        self.count.send_replace(open.turns.len());
        Ok(Lease { runs: self.clone(), turn, key: key.clone(), gone })
    }

    /// Stops a turn, if there is one of that id. Ids are random and known to nobody but the gateway that made them.
    pub(crate) fn stop(&self, turn: TurnId) {
        if let Some(turn) = self.open().turns.get(&turn) {
            turn.stop.send_replace(Some(Gone::Stopped));
        }
    }

    /// Whose turn it is, while it is open.
    pub(crate) fn key(&self, turn: TurnId) -> Option<Key> {
        self.open().turns.get(&turn).map(|turn| turn.key.clone())
    }

    /// A person is asked under this id; what they say comes out of the result. The question before it is over.
    pub(crate) fn ask(&self, turn: TurnId, id: String) -> oneshot::Receiver<bool> {
        let (reply, said) = oneshot::channel();
        if let Some(turn) = self.open().turns.get_mut(&turn) {
            turn.asked = Some(Asked { id, reply: Some(reply) });
        }
        said
    }

    /// Takes what a person says: the first answer to the question that is open counts.
    ///
    /// Errors: `session_not_found`, `not_found` where nothing is asked under that id, `already_answered`.
    pub(crate) fn confirm(&self, turn: TurnId, said: &Confirmation) -> Result<(), Fault> {
        let mut open = self.open();
        let turn = open.turns.get_mut(&turn).ok_or_else(|| Fault::client(Code::SessionNotFound))?;
        let asked = turn.asked.as_mut().filter(|asked| asked.id == said.id).ok_or_else(|| Fault::client(Code::NotFound))?;
        let reply = asked.reply.take().ok_or_else(|| Fault::client(Code::AlreadyAnswered))?;
        // Who asked may be about to end for another reason: then nobody hears it, and the call is not passed on.
        let _ = reply.send(said.accept);
        Ok(())
    }

    /// Stops a turn that nobody waits for, if there is one of that id, and resolves when it has ended. Cancel safe.
    pub(crate) async fn leave(&self, turn: TurnId) {
        let ended = self.open().turns.get(&turn).map(|Turn { stop, .. }| {
            stop.send_if_modified(|gone| {
                let first = gone.is_none();
                *gone = gone.or(Some(Gone::Left));
                first
            });
            stop.subscribe()
        });
        if let Some(mut ended) = ended {
            while ended.changed().await.is_ok() {}
        }
    }

    /// Takes no new turns from here on.
    pub(crate) fn close(&self) {
        self.open().drained = true;
    }

    /// Whether new turns are taken.
    pub(crate) fn is_open(&self) -> bool {
        !self.open().drained
    }

    /// Tells every open turn that the drain time is over.
    pub(crate) fn drain(&self) {
        for Turn { stop, .. } in self.open().turns.values() {
            stop.send_replace(Some(Gone::Drained));
        }
    }

    /// How many turns are open.
    pub(crate) fn count(&self) -> usize {
        *self.count.borrow()
    }

    fn open(&self) -> MutexGuard<'_, Open> {
        // Both maps are changed by calls that do not panic in between.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

enum Busy {
    Open(watch::Receiver<Option<Gone>>),
    Refused(Refused),
}

/// A place among the open turns, and the only one of its session. Given back when dropped.
pub(crate) struct Lease {
    runs: Arc<Runs>,
    turn: TurnId,
    key: Key,
    gone: watch::Receiver<Option<Gone>>,
}

impl Lease {
    /// Whose session it holds.
    pub(crate) fn key(&self) -> &Key {
        &self.key
    }

    /// Resolves when somebody stops the turn. Cancel safe.
    pub(crate) async fn gone(&mut self) -> Gone {
        loop {
            if let Some(gone) = *self.gone.borrow_and_update() {
                return gone;
            }
            if self.gone.changed().await.is_err() {
                // The sender is dropped with this lease and not before.
                std::future::pending::<()>().await;
            }
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut open = self.runs.open();
        open.turns.remove(&self.turn);
        open.sessions.remove(&self.key);
        self.runs.count.send_replace(open.turns.len());
    }
}

#[cfg(test)]
mod tests {
    use headgate_contracts::{Prompt, SessionId};

    use super::*;

    fn key(session: &str) -> Key {
        Key::of(&Prompt::new(TurnId::fresh(), session.parse::<SessionId>().unwrap(), Vec::new()))
    }

    fn runs(max: usize) -> Arc<Runs> {
        Arc::new(Runs::new(max, Duration::from_millis(250)))
    }

    #[tokio::test(start_paused = true)]
    async fn a_session_has_one_open_turn() {
        let runs = runs(10);
        let first = runs.begin(TurnId::fresh(), &key("s")).await.unwrap();
        assert_eq!(runs.begin(TurnId::fresh(), &key("s")).await.err(), Some(Refused::Conflict));
        assert!(runs.begin(TurnId::fresh(), &key("t")).await.is_ok());
        drop(first);
        assert!(runs.begin(TurnId::fresh(), &key("s")).await.is_ok());
        assert_eq!(runs.count(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_turn_begun_while_the_last_one_winds_up_waits_for_it() {
        let runs = runs(10);
        let mut first = runs.begin(TurnId::fresh(), &key("s")).await.unwrap();
        let (turn, session) = (TurnId::fresh(), key("s"));
        let second = runs.begin(turn, &session);
        let winding_up = async {
            let id = *runs.open().turns.keys().next().unwrap();
            runs.stop(id);
            assert_eq!(first.gone().await, Gone::Stopped);
            drop(first);
        };
        let (second, ()) = tokio::join!(second, winding_up);
        assert!(second.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn a_turn_id_is_open_once() {
        let (runs, id) = (runs(10), TurnId::fresh());
        let _first = runs.begin(id, &key("s")).await.unwrap();
        assert_eq!(runs.begin(id, &key("t")).await.err(), Some(Refused::Conflict));
        assert!(runs.begin(TurnId::fresh(), &key("t")).await.is_ok(), "the refused one left nothing behind");
    }

    #[tokio::test]
    async fn no_more_turns_than_there_may_be_and_none_while_draining() {
        let runs = runs(1);
        let mut first = runs.begin(TurnId::fresh(), &key("s")).await.unwrap();
        assert_eq!(runs.begin(TurnId::fresh(), &key("t")).await.err(), Some(Refused::Full));
        runs.close();
        assert_eq!(runs.begin(TurnId::fresh(), &key("t")).await.err(), Some(Refused::Draining));
        runs.drain();
        assert_eq!(first.gone().await, Gone::Drained);
    }

    #[tokio::test]
    async fn the_first_answer_to_an_open_question_counts_and_no_other_changes_anything() {
        let (runs, id) = (runs(10), TurnId::fresh());
        let say =
            |turn, question: &str, accept| runs.confirm(turn, &Confirmation { id: question.into(), accept }).map_err(|fault| fault.code);
        assert_eq!(say(id, "q1", true), Err(Code::SessionNotFound));
        let lease = runs.begin(id, &key("s")).await.unwrap();
        assert_eq!(say(id, "q1", true), Err(Code::NotFound));
        let first = runs.ask(id, "q1".into());
        assert_eq!(say(id, "q2", true), Err(Code::NotFound));
        assert_eq!([say(id, "q1", false), say(id, "q1", true)], [Ok(()), Err(Code::AlreadyAnswered)]);
        assert!(!first.await.unwrap());
        let second = runs.ask(id, "q2".into());
        assert_eq!([say(id, "q1", true), say(id, "q2", true)], [Err(Code::NotFound), Ok(())]);
        assert!(second.await.unwrap());
        drop(lease);
        assert_eq!(say(id, "q2", true), Err(Code::SessionNotFound));
    }

    #[tokio::test]
    async fn stopping_an_unknown_turn_does_nothing() {
        let runs = runs(1);
        runs.stop(TurnId::fresh());
        assert_eq!(runs.count(), 0);
    }
}
