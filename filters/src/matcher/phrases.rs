//! Literal phrases, all of them at once, by Aho and Corasick's automaton.

use aho_corasick::{
    Anchored, MatchKind, StartKind,
    automaton::{Automaton, StateID},
    dfa,
    nfa::contiguous,
};

use super::{BuildError, RuleId, patterns::Prose};

/// Beyond this many bytes of phrases the transition table would leave the caches (and, far beyond, the memory): the compact
/// form is used, which costs some 4 times the time per byte and a tenth of the memory.
const MOST_TABLE_BYTES: usize = 128 * 1024;

pub(super) struct Phrases {
    automaton: Form,
    start: StateID,
    /// The rule of each phrase and its length in normalised bytes.
    rules: Vec<(RuleId, u32)>,
    /// How many bytes back the longest phrase now forming began, by state.
    depths: Vec<u16>,
    /// State ids are multiples of a power of two: what to shift by to index `depths`.
    shift: u32,
    pub(super) longest: usize,
    pub(super) ascii: bool,
}

enum Form {
    Table(dfa::DFA),
    Compact(contiguous::NFA),
}

impl Phrases {
    /// `phrases` are normalised, none is empty.
    pub(super) fn build(phrases: &[(RuleId, String)]) -> Result<Phrases, BuildError> {
        let texts = || phrases.iter().map(|(_, text)| text.as_bytes());
        let too_big = |error: aho_corasick::BuildError| BuildError::TooBig { what: "the list of phrases", reason: error.to_string() };
        let automaton = if texts().map(<[u8]>::len).sum::<usize>() <= MOST_TABLE_BYTES {
            let mut builder = dfa::DFA::builder();
            builder.match_kind(MatchKind::Standard).start_kind(StartKind::Unanchored).prefilter(false);
            Form::Table(builder.build(texts()).map_err(too_big)?)
        } else {
            let mut builder = contiguous::NFA::builder();
            builder.match_kind(MatchKind::Standard).prefilter(false);
            Form::Compact(builder.build(texts()).map_err(too_big)?)
        };
        let start = match &automaton {
            Form::Table(table) => table.start_state(Anchored::No),
            Form::Compact(compact) => compact.start_state(Anchored::No),
        };
        let start = start.map_err(|error| BuildError::TooBig { what: "the list of phrases", reason: error.to_string() })?;
        let mut built = Phrases {
            automaton,
            start,
            rules: phrases.iter().map(|(rule, text)| (*rule, u32::try_from(text.len()).unwrap_or(u32::MAX))).collect(),
            depths: Vec::new(),
            shift: 0,
            longest: texts().map(<[u8]>::len).max().unwrap_or(0),
            ascii: texts().all(<[u8]>::is_ascii),
        };
        built.measure(texts());
        Ok(built)
    }

    /// The state after a prefix of a phrase is that prefix, so its depth is the prefix's length.
    fn measure<'a>(&mut self, texts: impl Iterator<Item = &'a [u8]> + Clone) {
        let mut depths = vec![(self.start.as_usize(), 0u16)];
        for text in texts {
            let mut state = self.start;
            for (byte, depth) in text.iter().zip(1u16..) {
                state = self.next(state, *byte);
                depths.push((state.as_usize(), depth));
            }
        }
        let (all, most) = depths.iter().fold((0, 0), |(all, most), (id, _)| (all | id, most.max(*id)));
        self.shift = if all == 0 { 0 } else { all.trailing_zeros() };
        self.depths = vec![0; (most >> self.shift) + 1];
        for (id, depth) in depths {
            if let Some(slot) = self.depths.get_mut(id >> self.shift) {
                *slot = depth;
            }
        }
    }

    pub(super) fn start(&self) -> StateID {
        self.start
    }

    #[inline]
    pub(super) fn next(&self, state: StateID, byte: u8) -> StateID {
        match &self.automaton {
            Form::Table(table) => table.next_state(Anchored::No, state, byte),
            Form::Compact(compact) => compact.next_state(Anchored::No, state, byte),
        }
    }

    #[inline]
    pub(super) fn is_match(&self, state: StateID) -> bool {
        match &self.automaton {
            Form::Table(table) => table.is_special(state) && table.is_match(state),
            Form::Compact(compact) => compact.is_special(state) && compact.is_match(state),
        }
    }

    /// Reads on while no phrase ends and `other` agrees to the byte, in lower case.
    #[inline]
    pub(super) fn coast(&self, state: &mut StateID, run: &[u8], other: impl FnMut(u8) -> bool) {
        #[inline]
        fn of<A: Automaton>(automaton: &A, state: &mut StateID, run: &[u8], mut other: impl FnMut(u8) -> bool) {
            let mut now = *state;
            for byte in run {
                let byte = byte.to_ascii_lowercase();
                let next = automaton.next_state(Anchored::No, now, byte);
                if (automaton.is_special(next) && automaton.is_match(next)) || !other(byte) {
                    break;
                }
                now = next;
            }
            *state = now;
        }
        match &self.automaton {
            Form::Table(table) => of(table, state, run, other),
            Form::Compact(compact) => of(compact, state, run, other),
        }
    }

    /// Reads the words before the first in which a phrase ends, and gives them.
    pub(super) fn words<'t>(&self, state: &mut StateID, words: &'t [u8], prose: &Prose) -> &'t [u8] {
        let (before, mut read) = (*state, 0);
        self.coast(state, words, |_| {
            read += 1;
            true
        });
        if read == words.len() {
            return words;
        }
        let words = words.get(..read).unwrap_or_default();
        let words = words.get(..prose.whole(words)).unwrap_or_default();
        *state = before;
        self.coast(state, words, |_| true);
        words
    }

    /// The phrases that end in this state: their rules and lengths.
    pub(super) fn ending(&self, state: StateID) -> impl Iterator<Item = (RuleId, u32)> + '_ {
        fn of<A: Automaton>(automaton: &A, state: StateID, i: usize) -> Option<usize> {
            (i < automaton.match_len(state)).then(|| automaton.match_pattern(state, i).as_usize())
        }
        (0..)
            .map_while(move |i| match &self.automaton {
                Form::Table(table) => of(table, state, i),
                Form::Compact(compact) => of(compact, state, i),
            })
            .filter_map(|pattern| self.rules.get(pattern).copied())
    }

    /// How many bytes back the longest phrase now forming began; 0 while none is.
    pub(super) fn depth(&self, state: StateID) -> u16 {
        self.depths.get(state.as_usize() >> self.shift).copied().unwrap_or(0)
    }
}
