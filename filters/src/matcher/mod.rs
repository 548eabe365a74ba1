//! Finds phrases, patterns and personal data in text that comes in pieces, exactly, and holds nothing longer than it must.
//!
//! What is found is a function of the whole text, whatever the pieces:
//!
//! - Text is normalised for matching only: NFKC, invisible marks removed, case folded ([`normal`]). What goes out is the
//!   original. A match covers the whole original characters its normalised ones came from, and the invisible ones between.
//! - All matches of all rules count, not the leftmost ones. Masked is the union of all masked spans; overlapping spans show
//!   one replacement, spans that only touch show one each.
//! - The text is cut at the least start of any denied match. What stands before it still goes; a mask that reaches over the
//!   cut ends there.
//!
//! While the text comes, a byte is held exactly as long as a match that covers it is forming, or has formed with the last
//! character and could be undone by a combining mark. Two cases hold a little longer, until the next letter: text that ends in
//! combining marks while a rule with letters beyond ASCII is forming, and a match just completed by a character no mark
//! composes with. A forming match that is stretched by invisible characters beyond [`Matcher::longest`] is masked and goes:
//! so the hold has a bound and no byte of a phrase leaves.
//!
//! Phrases run in one Aho-Corasick automaton, patterns in anchored automata that are started where a match can begin. Most
//! bytes of ordinary text cost a step of the first and a look at where the others begin.

mod detectors;
mod found;
mod normal;
mod patterns;
mod phrases;
mod places;
mod scan;

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
#[cfg(any(test, fuzzing))]
mod oracle;
#[cfg(test)]
mod tests;

use std::{fmt, ops::Range, sync::Arc};

pub use detectors::{Detector, UnknownDetector};
pub use scan::Scan;

use patterns::{Goal, Patterns, Wanted};
use phrases::Phrases;

/// How far invisible characters may stretch a forming match, in bytes.
const INVISIBLE_ROOM: u64 = 1024;

/// What a match does to the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Action {
    /// The text ends before it.
    Deny,
    /// It is replaced.
    Mask,
}

/// A rule of a matcher: an index into [`Matcher::rules`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RuleId(pub u32);

/// What a rule is, without its text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleInfo {
    /// The category its hits are reported under.
    pub category: Arc<str>,
    /// What its matches do.
    pub action: Action,
    /// What kind of rule it is.
    pub kind: Kind,
}

/// The kinds of rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// A literal phrase.
    Phrase,
    /// A regular expression.
    Pattern,
    /// A built-in detector.
    Detector(Detector),
    /// Text stretched by invisible characters beyond what can be held: always there, always masks.
    Invisible,
}

/// A match, or the union of overlapping matches of one rule; never the text.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Hit {
    /// Whose.
    pub rule: RuleId,
    /// Bytes of the lane. Of denied matches only the one at the cut is reported, of masked ones the part before it.
    pub range: Range<u64>,
}

/// A range of the lane's text to be replaced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mask {
    /// Bytes of the lane.
    pub range: Range<u64>,
    /// The first of its union, where the replacement is shown. The others are replaced by nothing.
    pub first: bool,
}

/// What a scan has settled. The caller empties it and uses it again.
#[derive(Clone, Debug, Default)]
pub struct Edits {
    /// In order, not overlapping, each within what was cleared by the same call.
    pub masks: Vec<Mask>,
    /// In no particular order.
    pub hits: Vec<Hit>,
}

impl Edits {
    /// Forgets what has been dealt with and keeps the memory.
    pub fn clear(&mut self) {
        self.masks.clear();
        self.hits.clear();
    }
}

/// How far a lane's text may go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// In bytes of the lane, at the start of a character. Never goes back.
    pub cleared: u64,
    /// The text ends there: a denied match follows.
    pub cut: bool,
}

/// Why a matcher cannot be built.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BuildError {
    /// Nothing is left of a phrase after normalisation.
    #[error("the phrase {phrase:?} is empty, or all of it is invisible; remove it")]
    EmptyPhrase {
        /// As written.
        phrase: String,
    },
    /// A phrase begins with something that is part of the character before it.
    #[error("the phrase {phrase:?} begins with a mark that belongs to the character before it; write that character too")]
    LoosePhrase {
        /// As written.
        phrase: String,
    },
    /// A phrase is too long to be held.
    #[error("the phrase {start:?}... is {bytes} bytes long, at most {most} can be held; shorten it", most = patterns::LONGEST)]
    LongPhrase {
        /// Its beginning.
        start: String,
        /// Its length after normalisation.
        bytes: usize,
    },
    /// A pattern that cannot be used on a stream.
    #[error("the pattern {pattern:?} cannot be used: {reason}; {remedy}")]
    Pattern {
        /// As written.
        pattern: String,
        /// What is wrong with it.
        reason: String,
        /// What to write instead.
        remedy: &'static str,
    },
    /// Too much of something.
    #[error("{what} needs too much memory: {reason}")]
    TooBig {
        /// What.
        what: &'static str,
        /// The builder's words.
        reason: String,
    },
}

/// Collects rules.
#[derive(Default)]
pub struct MatcherBuilder {
    rules: Vec<RuleInfo>,
    phrases: Vec<(RuleId, String)>,
    patterns: Vec<(RuleId, String)>,
    detectors: Vec<(RuleId, Detector)>,
}

impl MatcherBuilder {
    /// No rules yet.
    pub fn new() -> MatcherBuilder {
        MatcherBuilder::default()
    }

    /// A phrase, found wherever it stands, inside words too.
    pub fn phrase(&mut self, phrase: impl Into<String>, action: Action, category: impl Into<Arc<str>>) -> &mut MatcherBuilder {
        let rule = self.rule(category.into(), action, Kind::Phrase);
        self.phrases.push((rule, phrase.into()));
        self
    }

    /// A regular expression in the syntax of the `regex` crate, over normalised text.
    ///
    /// Case does not matter. `\w \d \s \b` are ASCII, `.` and negated classes match one decomposed character. It must match at
    /// least one character, and its longest match must be bounded: at most 4096 bytes. Work is at worst one step for each
    /// byte of the longest match and each byte of text, so long patterns should begin with something rare.
    pub fn pattern(&mut self, pattern: impl Into<String>, action: Action, category: impl Into<Arc<str>>) -> &mut MatcherBuilder {
        let rule = self.rule(category.into(), action, Kind::Pattern);
        self.patterns.push((rule, pattern.into()));
        self
    }

    /// A built-in detector; its category is its name.
    pub fn detector(&mut self, detector: Detector, action: Action) -> &mut MatcherBuilder {
        let rule = self.rule(detector.name().into(), action, Kind::Detector(detector));
        self.detectors.push((rule, detector));
        self
    }

    fn rule(&mut self, category: Arc<str>, action: Action, kind: Kind) -> RuleId {
        self.rules.push(RuleInfo { category, action, kind });
        RuleId(u32::try_from(self.rules.len() - 1).unwrap_or(u32::MAX))
    }

    /// Compiles the rules.
    ///
    /// Errors: the first rule that cannot be used, with the remedy.
    pub fn build(&self) -> Result<Matcher, BuildError> {
        let mut phrases = Vec::with_capacity(self.phrases.len());
        for (rule, phrase) in &self.phrases {
            let text = normal::normalise(phrase);
            match text.chars().next() {
                None => return Err(BuildError::EmptyPhrase { phrase: phrase.clone() }),
                Some(first) if normal::may_join(first) => return Err(BuildError::LoosePhrase { phrase: phrase.clone() }),
                Some(_) if text.len() > patterns::LONGEST => {
                    return Err(BuildError::LongPhrase { start: phrase.chars().take(32).collect(), bytes: text.len() });
                }
                Some(_) => phrases.push((*rule, text)),
            }
        }
        let phrases = if phrases.is_empty() { None } else { Some(Phrases::build(&phrases)?) };

        let (mut written, mut built_in) = (Vec::with_capacity(self.patterns.len()), Vec::new());
        for (rule, pattern) in &self.patterns {
            written.push(Wanted { hir: patterns::fold(pattern)?, name: pattern, goal: Goal { rule: *rule, check: None, tail: None } });
        }
        for (rule, detector) in &self.detectors {
            for shape in detector.shapes() {
                let goal = Goal { rule: *rule, check: shape.check, tail: shape.tail };
                built_in.push(Wanted { hir: patterns::fold(shape.pattern)?, name: shape.pattern, goal });
            }
        }
        let longest = written.iter().chain(&built_in).filter_map(|wanted| wanted.hir.properties().maximum_len()).max().unwrap_or(0);
        let mut machines = patterns::machines(&written)?;
        machines.extend(patterns::machines(&built_in)?);
        let patterns = Patterns::build(machines, longest)?;

        let mut rules = self.rules.clone();
        rules.push(RuleInfo { category: "invisible".into(), action: Action::Mask, kind: Kind::Invisible });
        Ok(Matcher { rules, phrases, patterns })
    }
}

impl fmt::Debug for MatcherBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MatcherBuilder").field("rules", &self.rules.len()).finish_non_exhaustive()
    }
}

/// Compiled rules, shared by all lanes of all turns.
pub struct Matcher {
    rules: Vec<RuleInfo>,
    phrases: Option<Phrases>,
    patterns: Patterns,
}

impl Matcher {
    /// A new lane's scan.
    pub fn scan(&self) -> Scan {
        Scan::new(self)
    }

    /// The rules, in the order they were added, and the one for invisible text at the end.
    pub fn rules(&self) -> &[RuleInfo] {
        &self.rules
    }

    /// The most a scan ever holds, in bytes of original text.
    ///
    /// The longest phrase or pattern, four original bytes to each of its normalised ones (a mathematical 𝐚 is an a), once
    /// before and once after the invisible characters that may stretch it, 1024 bytes of those, and a run of marks.
    pub fn longest(&self) -> usize {
        usize::try_from(self.stretch()).unwrap_or(usize::MAX).saturating_add(4 * self.memory() + 4 * (normal::MOST_MARKS + 2))
    }

    /// How far a forming match may be stretched by invisible characters.
    fn stretch(&self) -> u64 {
        4 * self.memory() as u64 + INVISIBLE_ROOM
    }

    /// The longest match, in normalised bytes.
    fn memory(&self) -> usize {
        self.phrases_reach().max(self.patterns.longest)
    }

    /// The longest phrase, in normalised bytes.
    fn phrases_reach(&self) -> usize {
        self.phrases.as_ref().map_or(0, |phrases| phrases.longest)
    }

    /// The rule for text stretched by invisible characters: the last one.
    fn invisible(&self) -> RuleId {
        RuleId(u32::try_from(self.rules.len().saturating_sub(1)).unwrap_or(u32::MAX))
    }
}

impl fmt::Debug for Matcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Matcher").field("rules", &self.rules.len()).field("longest", &self.longest()).finish_non_exhaustive()
    }
}
