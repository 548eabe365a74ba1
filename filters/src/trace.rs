//! Continues the client's distributed trace, or begins a new one where clients are strangers.

use headgate_contracts::{Prompt, Stop, Trace, Turn};
use schemars::JsonSchema;
use serde::Deserialize;

use crate::{
    BoxFuture, Filter, Problem, Rule, Tools,
    table::{self, Fits, Parts},
};

/// Settings of `trace`. Stands in every chain.
#[derive(Debug, Clone, PartialEq, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(rename = "TraceSettings")]
pub struct Settings {
    /// What a client's `traceparent` is taken for: `continue` (default), or `restart` where anybody may call, so that
    /// strangers cannot join their requests to traces of yours.
    pub inbound: Inbound,
}

/// What a client's `traceparent` is taken for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Inbound {
    /// The turn is a child of the client's span.
    #[default]
    Continue,
    /// The turn begins a trace.
    Restart,
}

impl table::Settings for Settings {
    const TERMS: Fits = Fits { shadow: false, hold: false, pass: false };

    fn build(&self, _: &Tools<'_>) -> Result<Parts, Vec<Problem>> {
        Ok(Parts::textless(Traces(self.inbound)))
    }
}

struct Traces(Inbound);

impl Rule for Traces {
    fn start(&self, _: &mut Turn) -> Box<dyn Filter> {
        Box::new(Traces(self.0))
    }
}

impl Filter for Traces {
    fn prompt<'a>(&'a mut self, prompt: &'a mut Prompt) -> BoxFuture<'a, Result<(), Stop>> {
        if self.0 == Inbound::Restart && (prompt.trace.parent_id.is_some() || prompt.trace.state.is_some()) {
            prompt.trace = Trace::fresh();
        }
        Box::pin(std::future::ready(Ok(())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{prompt, turn};

    async fn traced(inbound: Inbound, trace: &Trace) -> Trace {
        let mut prompt = prompt("hello");
        prompt.trace = trace.clone();
        Traces(inbound).start(&mut turn()).prompt(&mut prompt).await.unwrap();
        prompt.trace
    }

    #[tokio::test]
    async fn a_strangers_trace_is_restarted_and_a_friends_is_continued() {
        let theirs = Trace { state: Some("a=1".into()), ..Trace::fresh().child() };
        assert_eq!(traced(Inbound::Continue, &theirs).await, theirs);
        let ours = traced(Inbound::Restart, &theirs).await;
        assert_ne!(ours.trace_id, theirs.trace_id);
        assert_eq!((ours.parent_id, ours.state), (None, None));
    }
}
