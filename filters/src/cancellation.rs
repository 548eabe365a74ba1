//! Says how long a turn may take, and what it means for the model that the client has left.

use std::{fmt, str::FromStr, time::Duration};

use headgate_contracts::{OnDisconnect, Turn};
use schemars::JsonSchema;
use serde::{Deserialize, Deserializer};

use crate::{
    Filter, Problem, Rule, Tools,
    table::{self, Fits, Parts},
    units::Span,
};

/// Settings of `cancellation`. Stands in every chain.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(rename = "CancellationSettings")]
pub struct Settings {
    /// What a client's leaving means: `cancel` (default) stops the model at once; `grace 30s` waits so long for the client to
    /// come back; `drain 10m` lets the model finish within that time, so that the answer can be fetched afterwards.
    pub on_disconnect: Leaving,
    /// The longest a turn may take in all. Default `10min`.
    pub deadline: Span,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings { on_disconnect: Leaving(OnDisconnect::Cancel), deadline: Span(Duration::from_secs(600)) }
    }
}

/// What a client's leaving means, as written: `cancel`, `grace <time>` or `drain <time>`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Leaving(pub OnDisconnect);

/// A word for what a client's leaving means that is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not `cancel`, or `grace` or `drain` with a time, such as `grace 30s`")]
pub struct NotALeaving(String);

impl FromStr for Leaving {
    type Err = NotALeaving;
    fn from_str(text: &str) -> Result<Leaving, NotALeaving> {
        let unknown = || NotALeaving(text.to_owned());
        if text == "cancel" {
            return Ok(Leaving(OnDisconnect::Cancel));
        }
        let (word, time) = text.split_once(' ').ok_or_else(unknown)?;
        let Span(time) = time.trim().parse().map_err(|_| unknown())?;
        match word {
            "grace" => Ok(Leaving(OnDisconnect::Grace(time))),
            "drain" => Ok(Leaving(OnDisconnect::Drain(time))),
            _ => Err(unknown()),
        }
    }
}

impl fmt::Display for Leaving {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            OnDisconnect::Cancel => f.write_str("cancel"),
            OnDisconnect::Grace(time) => write!(f, "grace {}", Span(time)),
            OnDisconnect::Drain(time) => write!(f, "drain {}", Span(time)),
        }
    }
}

impl<'de> Deserialize<'de> for Leaving {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Leaving, D::Error> {
        String::deserialize(from)?.parse().map_err(serde::de::Error::custom)
    }
}

impl JsonSchema for Leaving {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Leaving".into()
    }
    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "type": "string", "pattern": "^(cancel|(grace|drain) [0-9]+ ?(ms|s|min|h|d))$", "examples": ["cancel", "grace 30s"]
        })
    }
}

impl table::Settings for Settings {
    const TERMS: Fits = Fits { shadow: false, hold: false, pass: false };

    fn build(&self, _: &Tools<'_>) -> Result<Parts, Vec<Problem>> {
        let mut problems = Vec::new();
        if self.deadline.0.is_zero() {
            problems.push(Problem::new("deadline", "`0ms`: no turn could begin").expected("a duration above 0").remedy("set e.g. `10min`"));
        }
        if let OnDisconnect::Grace(time) | OnDisconnect::Drain(time) = self.on_disconnect.0 {
            let (written, deadline) = (self.on_disconnect, self.deadline);
            if time.is_zero() {
                let found = format!("`{written}` leaves no time");
                problems.push(Problem::new("on_disconnect", found).expected("a time above 0").remedy("write `cancel`"));
            } else if time > deadline.0 && !deadline.0.is_zero() {
                problems.push(
                    Problem::new("on_disconnect", format!("`{written}`, but every turn ends at its deadline of {deadline}"))
                        .expected(format!("at most {deadline}"))
                        .remedy("raise `deadline`, or shorten the time"),
                );
            }
        }
        if problems.is_empty() { Ok(Parts::textless(Cancellation(self.clone()))) } else { Err(problems) }
    }
}

struct Cancellation(Settings);

impl Rule for Cancellation {
    fn start(&self, turn: &mut Turn) -> Box<dyn Filter> {
        turn.flow.on_disconnect = self.0.on_disconnect.0;
        turn.flow.deadline = self.0.deadline.0;
        Box::new(Leaves)
    }
}

/// Judges nothing: the turn's flow has been set.
struct Leaves;
impl Filter for Leaves {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{built, problems, turn};

    #[test]
    fn what_leaving_means_reads_back_as_written() {
        for text in ["cancel", "grace 30s", "drain 5min"] {
            assert_eq!(text.parse::<Leaving>().unwrap().to_string(), text);
        }
        for text in ["", "stay", "grace", "grace 30", "cancel 3s", "wait 3s"] {
            assert!(text.parse::<Leaving>().unwrap_err().to_string().contains("`grace 30s`"), "{text}");
        }
    }

    #[test]
    fn the_flow_of_a_turn_is_set_when_it_starts() {
        let mut turn = turn();
        built("cancellation: { on_disconnect: grace 5s, deadline: 1min }").rule.start(&mut turn);
        assert_eq!(turn.flow.on_disconnect, OnDisconnect::Grace(Duration::from_secs(5)));
        assert_eq!(turn.flow.deadline, Duration::from_secs(60));
    }

    #[test]
    fn a_grace_beyond_the_deadline_is_refused() {
        let found = problems("cancellation: { on_disconnect: drain 1h }");
        assert_eq!(found.len(), 1);
        assert!(found[0].to_string().contains("deadline of 10min"), "{}", found[0]);
    }
}
