//! What a filter answers: how far the text may go, with which edits, or not at all.

use std::{borrow::Cow, ops::Range};

use headgate_contracts::{Fault, Lane, Refusal, Stop};

/// A position in one lane's text: bytes of UTF-8 before it, as this gate counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default, Hash)]
pub struct At(pub u64);

impl At {
    /// Beyond any text.
    pub const END: At = At(u64::MAX);
}

/// A piece of one lane, shown to a filter in order and without holes.
#[derive(Clone, Copy)]
pub struct Text<'a> {
    /// Which lane.
    pub lane: Lane,
    /// Where in that lane's text it begins.
    pub at: At,
    /// The words; never empty.
    pub text: &'a str,
}

impl Text<'_> {
    /// Where it ends.
    pub fn end(&self) -> At {
        At(self.at.0 + self.text.len() as u64)
    }
}

/// Other words for a range of a lane's text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Edit {
    /// What is replaced.
    pub range: Range<At>,
    /// What stands there instead; may be empty.
    pub with: Cow<'static, str>,
}

/// How far the lane's text may go, with which edits, and whether the turn ends there: the safe prefix still reaches the client.
#[derive(Debug)]
pub struct Verdict {
    pub(crate) to: At,
    pub(crate) edits: Vec<Edit>,
    pub(crate) stop: Option<Box<Stop>>,
}

impl Verdict {
    /// All that was shown may go.
    pub fn pass() -> Verdict {
        Verdict::hold_from(At::END)
    }

    /// What was shown may go up to `at`; the rest waits. Edits already given may reach to `at`, not beyond.
    pub fn hold_from(at: At) -> Verdict {
        Verdict { to: at, edits: Vec::new(), stop: None }
    }

    /// What was shown may go up to `at`, and the turn ends there.
    pub fn refuse_from(at: At, why: Refusal) -> Verdict {
        Verdict { to: at, edits: Vec::new(), stop: Some(Box::new(Stop::Refused(why))) }
    }

    /// The filter cannot judge: what the gate's terms say about faults happens at `at`.
    pub fn fail_from(at: At, fault: Fault) -> Verdict {
        Verdict { to: at, edits: Vec::new(), stop: Some(Box::new(Stop::Failed(fault))) }
    }

    /// With other words for `range`. Ranges come in order, do not overlap, and lie between what has gone and what this verdict clears.
    pub fn replacing(mut self, range: Range<At>, with: impl Into<Cow<'static, str>>) -> Verdict {
        self.edits.push(Edit { range, with: with.into() });
        self
    }
}
