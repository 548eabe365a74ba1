//! The gates of a route, in the order of the config: prompt and answer run the same list, top to bottom.

use std::{future::poll_fn, task::Poll};

use headgate_contracts::{Batch, End, Head, Prompt, Record, Stop};

use crate::Gate;

/// The gates of one turn.
pub struct Chain {
    gates: Vec<Gate>,
    /// How many stand before the first that judges text: they have no part in what is done for each batch.
    textless: usize,
}

impl Chain {
    /// A chain of these gates, in this order.
    pub fn new(gates: Vec<Gate>) -> Chain {
        let textless = gates.iter().position(Gate::judges_text).unwrap_or(gates.len());
        Chain { gates, textless }
    }

    /// The gates, in order.
    pub fn gates(&self) -> &[Gate] {
        &self.gates
    }

    /// The prompt on its way up: each filter may stamp, change or refuse it, or wait. Cancel safe: dropping it drops what waits.
    pub async fn prompt(&mut self, prompt: &mut Prompt) -> Result<(), Stop> {
        for gate in &mut self.gates {
            gate.prompt(prompt).await?;
        }
        Ok(())
    }

    /// The answer's head on its way down, before the client has seen a byte.
    pub fn head(&mut self, head: &mut Head) -> Result<(), Stop> {
        for gate in &mut self.gates {
            gate.head(head)?;
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
        for gate in self.judges_mut() {
            gate.pass(batch);
        }
        self.stop()
    }

    fn judges(&self) -> &[Gate] {
        self.gates.get(self.textless..).unwrap_or_default()
    }

    fn judges_mut(&mut self) -> &mut [Gate] {
        self.gates.get_mut(self.textless..).unwrap_or_default()
    }

    /// Whether more may come in.
    pub fn has_room(&self) -> bool {
        self.judges().iter().all(Gate::has_room)
    }

    /// Waits until something may go that was held, without new text. Cancel safe: what became ripe is kept in its gate.
    pub async fn ripen(&mut self) {
        ripen(self.judges_mut()).await;
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
        for gate in &mut self.gates {
            gate.end(record);
        }
        end
    }

    /// The first gate behind the last that has refused: those before it have nothing more to say, for what they hold lies behind the cut.
    fn uncut(&self) -> usize {
        self.gates.iter().rposition(|gate| gate.stop().is_some()).map_or(0, |index| index + 1)
    }

    fn stop(&self) -> Result<(), Stop> {
        match self.judges().iter().rev().find_map(|gate| gate.stop().cloned()) {
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
