//! The question that the person of a turn is asked: the first answer counts, and goes to whoever asks.

use std::sync::Arc;

use headgate_contracts::{Code, Fault, wire::chat::Confirmation};
use headgate_upstream::Line;

/// A question that is open, or has been answered.
pub(crate) struct Asked {
    id: String,
    line: Arc<Line>,
    is_answered: bool,
}

impl Asked {
    pub(crate) fn new(id: &str, line: Line) -> Asked {
        Asked { id: id.to_owned(), line: Arc::new(line), is_answered: false }
    }

    /// Where the answer `said` goes, if it is the first.
    ///
    /// Errors: `not_found`, where it is to another question; `already_answered`.
    pub(crate) fn answer(&mut self, said: &Confirmation) -> Result<Arc<Line>, Fault> {
        if self.id != said.id {
            return Err(nothing_asked());
        }
        match std::mem::replace(&mut self.is_answered, true) {
            true => Err(Fault::client(Code::AlreadyAnswered)),
            false => Ok(self.line.clone()),
        }
    }

    /// That answer was not heard: there may be another.
    pub(crate) fn unhear(&mut self, said: &Confirmation) {
        self.is_answered &= self.id != said.id;
    }
}

pub(crate) fn nothing_asked() -> Fault {
    Fault::client(Code::NotFound).saying("the turn asks nothing of this id")
}
