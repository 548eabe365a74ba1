//! What has been found and not yet said: spans to mask, hits to report, and the earliest cut.

use std::ops::Range;

use super::{Action, Edits, Hit, Mask, RuleId, RuleInfo};

#[derive(Default)]
pub(super) struct Found {
    /// Unions of overlapping masked spans, in order, not yet shown to the end.
    masks: Vec<Union>,
    /// Unions of overlapping spans of one rule that may still grow.
    hits: Vec<Hit>,
    /// The match to cut at.
    deny: Option<Denied>,
    /// All before it is decided, whatever still forms: matches are taken to begin here at the earliest.
    pub(super) floor: u64,
}

struct Union {
    start: u64,
    end: u64,
    /// Its beginning has been emitted: what is left is replaced by nothing.
    shown: bool,
}

/// A match to cut at; the least of them is: least start, then least end, then first rule.
///
/// Ends are compared in the normalised text, in which matches come in order: of several that end within one original character
/// the first must win whether or not the others have been seen.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Denied {
    start: u64,
    fed: u64,
    rule: RuleId,
    end: u64,
}

impl Found {
    /// Is there nothing to say?
    pub(super) fn is_empty(&self) -> bool {
        self.masks.is_empty() && self.hits.is_empty() && self.deny.is_none()
    }

    /// A match stands: original bytes, and its end in the normalised text, `fed`. Matches come in the order of their ends.
    pub(super) fn record(&mut self, rule: RuleId, info: Option<&RuleInfo>, start: u64, end: u64, fed: u64) {
        let (start, end) = (start.max(self.floor), end.max(self.floor));
        match info.map_or(Action::Deny, |info| info.action) {
            Action::Deny => {
                let this = Denied { start, fed, rule, end };
                self.deny = Some(self.deny.map_or(this, |best| best.min(this)));
            }
            Action::Mask if start == end => {} // stretched by invisible characters, and masked for that already
            Action::Mask => {
                self.mask(Union { start, end, shown: false });
                self.hit(Hit { rule, range: start..end });
            }
        }
    }

    /// A match of `rule` that ended at `from` goes on to `end`.
    pub(super) fn extend(&mut self, rule: RuleId, from: u64, end: u64) {
        self.mask(Union { start: from, end, shown: true });
        match self.hits.iter_mut().rev().find(|hit| hit.rule == rule && hit.range.end >= from) {
            Some(hit) => hit.range.end = hit.range.end.max(end),
            None => self.hits.push(Hit { rule, range: from..end }),
        }
    }

    fn mask(&mut self, mut new: Union) {
        // What goes on (`shown`) joins what it touches; matches join only what they overlap.
        while let Some(last) = self.masks.pop_if(|last| last.end > new.start || (new.shown && last.end == new.start)) {
            new.shown = match last.start.cmp(&new.start) {
                std::cmp::Ordering::Less => last.shown,
                std::cmp::Ordering::Equal => last.shown || new.shown,
                std::cmp::Ordering::Greater => new.shown,
            };
            new.start = new.start.min(last.start);
            new.end = new.end.max(last.end);
        }
        self.masks.push(new);
    }

    fn hit(&mut self, mut new: Hit) {
        self.hits.retain(|hit| {
            let joins = hit.rule == new.rule && hit.range.end > new.range.start;
            if joins {
                new.range = new.range.start.min(hit.range.start)..new.range.end.max(hit.range.end);
            }
            !joins
        });
        self.hits.push(new);
    }

    /// Everything that begins before `live` is known: says what that settles. Returns how far the text may go, and whether
    /// it ends there. `grows` names the rules whose last match is still going on.
    pub(super) fn settle(&mut self, live: u64, grows: impl Fn(RuleId) -> bool, out: &mut Edits) -> (u64, bool) {
        let (cleared, cut) = match self.deny {
            Some(denied) if denied.start <= live => (denied.start, true),
            Some(_) | None => (live, false),
        };
        let mut done = 0;
        for union in self.masks.iter_mut().take_while(|union| union.start < cleared) {
            let range: Range<u64> = union.start..union.end.min(cleared);
            out.masks.push(Mask { range, first: !union.shown });
            if union.end > cleared {
                (union.start, union.shown) = (cleared, true);
                break;
            }
            done += 1;
        }
        self.masks.drain(..done);
        if cut {
            self.hits.retain(|hit| hit.range.start < cleared);
            self.hits.iter_mut().for_each(|hit| hit.range.end = hit.range.end.min(cleared));
            out.hits.append(&mut self.hits);
            out.hits.extend(self.deny.map(|denied| Hit { rule: denied.rule, range: denied.start..denied.end }));
        } else if !self.hits.is_empty() {
            out.hits.extend(self.hits.extract_if(.., |hit| hit.range.end <= cleared && !grows(hit.rule)));
        }
        (cleared, cut)
    }
}
