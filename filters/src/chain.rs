//! The filters of a route, in the order of the config: prompt and answer run the same list, top to bottom.

use std::{future::poll_fn, iter::from_fn, task::Poll};

use headgate_contracts::{Batch, End, Head, Prompt, Record, Stop};

use crate::{Filter, Gate, Terms, gate::Post};

/// The filters of one turn.
pub struct Chain {
    /// Those that judge text.
    gates: Vec<Gate>,
    /// Those that judge none: they stand aside while an answer lasts.
    aside: Vec<Post>,
}

impl Chain {
    /// A chain of these gates, in this order.
    pub fn new(gates: Vec<Gate>) -> Chain {
        Chain { gates, aside: Vec::new() }
    }

    /// A chain that is to have so many gates, and so many filters aside.
    pub(crate) fn with_room(gates: usize, aside: usize) -> Chain {
        Chain { gates: Vec::with_capacity(gates), aside: Vec::with_capacity(aside) }
    }

    /// Puts a filter at the end.
    pub(crate) fn add(&mut self, name: &'static str, filter: Box<dyn Filter>, terms: &Terms, judges_text: bool) {
        let place = (self.gates.len() + self.aside.len()).try_into().unwrap_or(u16::MAX);
        let post = Post::new(name, filter, terms, place);
        if judges_text {
            self.gates.push(Gate::at(post, terms));
        } else {
            self.aside.push(post);
        }
    }

    /// The gates of the filters that judge text, in order.
    pub fn gates(&self) -> &[Gate] {
        &self.gates
    }

    /// All filters, in order.
    pub(crate) fn posts(&mut self) -> impl Iterator<Item = &mut Post> {
        let mut gates = self.gates.iter_mut().map(Gate::post).peekable();
        let mut aside = self.aside.iter_mut().peekable();
        from_fn(move || match (gates.peek(), aside.peek()) {
            (Some(gate), Some(other)) if gate.place > other.place => aside.next(),
            (Some(_), _) => gates.next(),
            (None, _) => aside.next(),
        })
    }

    /// The prompt on its way up: each filter may stamp, change or refuse it, or wait. Cancel safe: dropping it drops what waits.
    pub async fn prompt(&mut self, prompt: &mut Prompt) -> Result<(), Stop> {
        for post in self.posts() {
            post.prompt(prompt).await?;
        }
        Ok(())
    }

    /// The answer's head on its way down, before the client has seen a byte.
    pub fn head(&mut self, head: &mut Head) -> Result<(), Stop> {
        for post in self.posts() {
            post.head(head)?;
        }
        Ok(())
    }

    /// In: what came. Out: what may go. `Err`: the turn ends after what is now in `batch`.
    ///
    /// Of two refusals the earlier in the text wins: a later gate only ever sees what an earlier one lets go, so the last
    /// gate to refuse lies earliest.
    ///
    /// Work: one pass per gate; nothing is copied or allocated while nothing is held and all is clean.
    pub fn pass(&mut self, batch: &mut Batch) -> Result<(), Stop> {
        for gate in &mut self.gates {
            gate.pass(batch);
        }
        self.stop()
    }

    /// Whether more may come in.
    pub fn has_room(&self) -> bool {
        self.gates.iter().all(Gate::has_room)
    }

    /// Waits until something may go that was held, without new text. Cancel safe: what became ripe is kept in its gate.
    pub async fn ripen(&mut self) {
        ripen(&mut self.gates).await;
    }

    /// Nothing more will come. Out: what was still held and may go. `true`: there may be more, and so it is asked again.
    ///
    /// A filter that still thinks gets the time that its terms give; whoever drops this when that is too long has lost nothing, and
    /// what still waits then is late. Cancel safe.
    pub async fn rest(&mut self, batch: &mut Batch) -> bool {
        batch.clear();
        loop {
            let from = self.uncut();
            // Whether all that a gate will ever be shown has come to it.
            let mut is_over = true;
            for gate in &mut self.gates[from..] {
                gate.pass(batch);
                if is_over {
                    gate.last(batch);
                }
                is_over &= gate.is_empty();
            }
            if is_over || !batch.is_empty() {
                return !is_over;
            }
            // Behind a cut that was just made nothing may be left to wait for.
            if self.uncut() == from {
                ripen(&mut self.gates[from..]).await;
            }
        }
    }

    /// There is no more time. In: how the turn would end. Out: what was still held and may go, and how the turn does end:
    /// a refusal of held text lies earlier in the text than any end after it, and so it wins.
    ///
    /// What filters report counts all they were shown: also what a later filter then cut.
    pub fn end(&mut self, end: End, batch: &mut Batch, record: &mut Record) -> End {
        batch.clear();
        let from = self.uncut();
        let end = match end {
            // Nobody is listening: nothing needs to be cleared.
            Err(Stop::Gone(gone)) => Err(Stop::Gone(gone)),
            end => {
                for gate in &mut self.gates[from..] {
                    gate.pass(batch);
                    gate.last(batch);
                    gate.close(batch);
                }
                self.stop().and(end)
            }
        };
        for post in self.posts() {
            post.end(record);
        }
        for gate in &self.gates {
            gate.end(record);
        }
        end
    }

    /// The first gate behind the last that has refused: those before it have nothing more to say, for what they hold lies behind the cut.
    fn uncut(&self) -> usize {
        self.gates.iter().rposition(|gate| gate.stop().is_some()).map_or(0, |index| index + 1)
    }

    fn stop(&self) -> Result<(), Stop> {
        match self.gates.iter().rev().find_map(|gate| gate.stop().cloned()) {
            Some(stop) => Err(stop),
            None => Ok(()),
        }
    }
}

/// Waits until one of these gates has something that may go, without new text.
async fn ripen(gates: &mut [Gate]) {
    poll_fn(|cx| match gates.iter_mut().any(|gate| gate.poll_ripe(cx).is_ready()) {
        true => Poll::Ready(()),
        false => Poll::Pending,
    })
    .await;
}
