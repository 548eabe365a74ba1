//! What every gate promises, with one meaning for all filters: mode, longest hold, most held, what happens then.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::units::{Bytes, Span};

/// Whether a filter's verdicts count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// They do.
    #[default]
    Enforce,
    /// They are recorded and change nothing.
    Shadow,
}

/// What happens to text that could not be cleared in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Late {
    /// The turn ends there.
    #[default]
    Refuse,
    /// The text goes unjudged: an unsafe choice, and so spelled out.
    Release,
}

/// What happens when a filter cannot judge.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnFault {
    /// The turn ends there.
    #[default]
    Refuse,
    /// The filter is left out for the rest of the turn: an unsafe choice, and so spelled out.
    Pass,
}

/// The terms of a gate. As written in the config beside the filter's name.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Terms {
    /// `enforce` (default) or `shadow`: record what would be done and do nothing.
    pub mode: Mode,
    /// The longest time text may wait for this filter, e.g. `80ms`. Without it text that may still become a match waits until that is decided, or the upstream's idle timeout ends the turn.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_hold: Option<Span>,
    /// The most text that may wait for this filter, e.g. `64KiB`. Default `64KiB`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_held: Option<Bytes>,
    /// What happens to text that waited too long or grew too much: `refuse` (default) or `release`.
    pub late: Late,
    /// What happens when the filter breaks: `refuse` (default) or `pass`.
    pub on_fault: OnFault,
}

impl Terms {
    /// The most text that may wait where the config does not say.
    pub const MAX_HELD: u64 = 64 << 10;

    pub(crate) fn max_held(&self) -> u64 {
        self.max_held.map_or(Terms::MAX_HELD, |bytes| bytes.0)
    }

    pub(crate) fn max_hold(&self) -> Option<Duration> {
        self.max_hold.map(|span| span.0)
    }
}
