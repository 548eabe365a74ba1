//! Keeps a turn that its gateway left from being written down for a moment: only the gateway knows why, and it is about to say.

use std::{
    collections::{HashMap, hash_map::Entry},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use headgate_contracts::{End, Finish, Gone, TurnId, wire::log::Progress};
use tokio::time::Instant;

use crate::events::Account;

/// How long a gateway has for its word on why it left: it says it at once, and after that what was seen here is written.
const PATIENCE: Duration = Duration::from_secs(2);
/// Turns that wait at once; the others are written down as they were seen.
const MOST: usize = 4096;

/// The turns that wait, and the words that came before their turn had ended.
#[derive(Default)]
pub(crate) struct Partings(Mutex<HashMap<TurnId, Parting>>);

enum Parting {
    Waits(Box<Left>),
    Said(End),
}

/// A turn that was left: what it takes to write it down.
pub(crate) struct Left {
    pub(crate) account: Account,
    pub(crate) gone: Gone,
    pub(crate) finish: Finish,
    pub(crate) progress: Progress,
    pub(crate) since: Instant,
}

impl Left {
    fn write(self, end: &End) {
        self.account.close(end, self.finish, self.progress);
    }

    fn write_as_seen(self) {
        let gone = self.gone;
        self.write(&Err(gone.into()));
    }
}

impl Partings {
    /// The gateway left `turn`, and may say why.
    pub(crate) fn wait(&self, turn: TurnId, left: Left) {
        let mut partings = self.lock();
        let room = partings.len() < MOST;
        match partings.entry(turn) {
            Entry::Occupied(said) => match said.get() {
                Parting::Said(end) => left.write(end),
                Parting::Waits(_) => left.write_as_seen(),
            },
            Entry::Vacant(place) if room => drop(place.insert(Parting::Waits(Box::new(left)))),
            Entry::Vacant(_) => left.write_as_seen(),
        }
    }

    /// The gateway says how `turn` ended for it: for the turn that waits, or one that ends while the result lives.
    pub(crate) fn say(&self, turn: TurnId, end: End) -> Said<'_> {
        let mut partings = self.lock();
        match partings.remove(&turn) {
            Some(Parting::Waits(left)) => left.write(&end),
            Some(Parting::Said(_)) | None if partings.len() < MOST => drop(partings.insert(turn, Parting::Said(end))),
            Some(Parting::Said(_)) | None => {}
        }
        Said { partings: self, turn }
    }

    /// Writes down what has waited long enough.
    pub(crate) fn sweep(&self) {
        self.end(|left| left.since.elapsed() >= PATIENCE);
    }

    /// Writes down all that wait: nobody will be heard any more.
    pub(crate) fn close(&self) {
        self.end(|_| true);
    }

    fn end(&self, is_over: impl Fn(&Left) -> bool) {
        let over = self.lock().extract_if(|_, parting| matches!(parting, Parting::Waits(left) if is_over(left))).collect::<Vec<_>>();
        for (_, parting) in over {
            if let Parting::Waits(left) = parting {
                left.write_as_seen();
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<TurnId, Parting>> {
        // Writing down is a message to the log's writer, which does not panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A word that is listened to as long as this lives.
pub(crate) struct Said<'a> {
    partings: &'a Partings,
    turn: TurnId,
}

impl Drop for Said<'_> {
    fn drop(&mut self) {
        let mut partings = self.partings.lock();
        if matches!(partings.get(&self.turn), Some(Parting::Said(_))) {
            partings.remove(&self.turn);
        }
    }
}
