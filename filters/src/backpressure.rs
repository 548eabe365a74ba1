//! Bounds what may wait for a slow client: beyond it the model is not read, and a client that takes nothing loses its turn.

use headgate_contracts::Turn;
use schemars::JsonSchema;
use serde::Deserialize;

use crate::{
    Filter, Problem, Rule, Tools,
    table::{self, Fits, Parts},
    units::{Bytes, Span},
};

/// Settings of `backpressure`. Stands in every chain.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(rename = "BackpressureSettings")]
pub struct Settings {
    /// The most bytes of an answer that may wait for its client; beyond it the upstream is not read. Default `64KiB`.
    pub max_buffered: Bytes,
    /// How long a client may take nothing while something waits for it; then the turn ends as `slow_consumer`. Default `30s`.
    pub stall: Span,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings { max_buffered: Bytes(64 << 10), stall: Span(std::time::Duration::from_secs(30)) }
    }
}

/// Less could not take one event of the largest size that upstreams may send, and one batch is always let through whole.
const LEAST_BUFFERED: u64 = 1 << 10;
/// The hard cap of one stream's share of memory.
const MOST_BUFFERED: u64 = 16 << 20;

impl table::Settings for Settings {
    const TERMS: Fits = Fits { shadow: false, hold: false, pass: false };

    fn build(&self, _: &Tools<'_>) -> Result<Parts, Vec<Problem>> {
        let mut problems = Vec::new();
        if !(LEAST_BUFFERED..=MOST_BUFFERED).contains(&self.max_buffered.0) {
            problems.push(
                Problem::new("max_buffered", format!("{}", self.max_buffered))
                    .expected("1KiB to 16MiB")
                    .remedy("remove it: the default is 64KiB"),
            );
        }
        if self.stall.0.is_zero() {
            problems.push(
                Problem::new("stall", "`0ms`: every client would be too slow").expected("a duration above 0").remedy("set e.g. `30s`"),
            );
        }
        if problems.is_empty() { Ok(Parts::textless(Backpressure(self.clone()))) } else { Err(problems) }
    }
}

struct Backpressure(Settings);

impl Rule for Backpressure {
    fn start(&self, turn: &mut Turn) -> Box<dyn Filter> {
        turn.flow.max_buffered = usize::try_from(self.0.max_buffered.0).unwrap_or(usize::MAX);
        turn.flow.stall = self.0.stall.0;
        Box::new(Waits)
    }
}

/// Judges nothing: the turn's flow has been set.
struct Waits;
impl Filter for Waits {}

#[cfg(test)]
mod tests {
    use crate::testing::{built, problems, turn};

    #[test]
    fn the_flow_of_a_turn_is_set_when_it_starts() {
        let mut turn = turn();
        built("backpressure: { max_buffered: 8KiB, stall: 2s }").rule.start(&mut turn);
        assert_eq!((turn.flow.max_buffered, turn.flow.stall.as_secs()), (8192, 2));
    }

    #[test]
    fn a_stall_of_nothing_and_a_buffer_of_nothing_are_refused() {
        let found = problems("backpressure: { max_buffered: 0B, stall: 0s }");
        assert_eq!(found.iter().map(|p| p.at.as_str()).collect::<Vec<_>>(), ["backpressure.max_buffered", "backpressure.stall"]);
    }
}
