//! Filters judge, gates hold, a chain runs them in order.
//!
//! A [`Filter`] sees one turn: its prompt, the head of its answer, then the answer's text piece by piece. It says how far the
//! text may go and with which edits ([`Verdict`]); its [`Gate`] does the holding. A [`Rule`] is what a filter's settings
//! compile to, shared by all turns of a route. To add a filter write one file with its settings, rule, behaviour and tests,
//! and one line in the table in `table.rs`: `docs/add-a-filter.md` walks through it.

use std::{
    future::{Future, ready},
    pin::Pin,
    task::{Context, Poll},
};

use headgate_contracts::{Head, Lane, Prompt, Record, Stop, Turn};

// Tests are written against the same names from inside and from outside.
#[cfg(test)]
extern crate self as headgate_filters;

// The walk-through's code is compiled and run with the documentation's tests.
#[cfg(doctest)]
#[doc = include_str!("../../docs/add-a-filter.md")]
pub struct AddAFilter;

mod chain;
mod gate;
pub mod matcher;
mod memory;
mod problem;
mod table;
mod terms;
#[cfg(test)]
mod testing;
mod tools;
pub mod units;
mod verdict;

pub mod auth;
pub mod backpressure;
pub mod budget;
pub mod cancellation;
pub mod moderation;
pub mod policy_headers;
pub mod rate_limit;
pub mod trace;

pub use auth::Keys;
pub use chain::Chain;
pub use gate::{Gate, Holds};
pub use policy_headers::strip_forged;
pub use problem::Problem;
pub use rate_limit::LocalLedger;
pub use table::{Built, DEFAULTS, Facts, Spec, Step, build_chain, chain, with_defaults};
pub use terms::{Late, Mode, OnFault, Terms};
pub use tools::{Account, Admit, KeySource, Lease, Ledger, Modes, PolicyInForce, Signer, Taken, Tools, unix_now};
pub use verdict::{At, Edit, Text, Verdict};

/// A future in a box, as object-safe traits need it.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// A filter's compiled settings, shared by all turns of a route.
pub trait Rule: Send + Sync {
    /// A filter for one turn. May also set the turn's flow.
    fn start(&self, turn: &mut Turn) -> Box<dyn Filter>;
}

/// Judges one turn; its gate holds. Implement what you need, the rest passes.
pub trait Filter: Send {
    /// The prompt on its way up: may be stamped, changed or refused; may wait. Cancel safe: may be dropped at any await.
    fn prompt<'a>(&'a mut self, _prompt: &'a mut Prompt) -> BoxFuture<'a, Result<(), Stop>> {
        Box::pin(ready(Ok(())))
    }

    /// The head of the answer, before the client has seen a byte: the place for headers.
    fn head(&mut self, _head: &mut Head) -> Result<(), Stop> {
        Ok(())
    }

    /// More text of one lane. The verdict may clear less than was shown; the gate keeps the rest and shows nothing twice.
    /// Must not allocate while the text is clean.
    fn text(&mut self, _text: Text<'_>) -> Verdict {
        Verdict::pass()
    }

    /// Nothing more will come on this lane (its choice has finished, the answer or the turn has ended): the last verdict on
    /// what is still held. Asked once a lane.
    fn last(&mut self, _lane: Lane) -> Verdict {
        Verdict::pass()
    }

    /// A verdict that had to be waited for, and the lane it is about. Pending while there is none; keeps the waker. An answer that
    /// has ended waits for it as long as the gate's terms allow text to be held, and no longer than the route's deadline.
    fn poll(&mut self, _cx: &mut Context<'_>) -> Poll<(Lane, Verdict)> {
        Poll::Pending
    }

    /// The turn is over, however it ended: say what was found.
    fn end(&mut self, _record: &mut Record) {}
}
