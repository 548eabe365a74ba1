//! The published normalisation, one character at a time: NFKC, invisible marks removed, case folded.
//!
//! Automata read it *decomposed*: each normalised character as its letter followed by the marks composed into it. A letter
//! can then be fed the moment it arrives, although a mark that comes later may still change it. What the letter has become is
//! known when the next one comes, and each [`Part`] says whether it still belongs to the character before it: a match may
//! neither begin nor end between such parts. That is how `cafe` is found in `cafes` and not in `café`, however é is written.

use unicode_normalization::char::{canonical_combining_class, compose, decompose_compatible};
use unicode_normalization::{IsNormalized, is_nfc_quick};

/// How many combining marks in a row are put in order together; more of them begin a new run that composes with nothing.
///
/// UAX #15, Stream-Safe Text Format (UAX15-D4): 30 is more than any orthography needs.
pub(super) const MOST_MARKS: usize = 30;

/// A character that shows nothing by itself and is ignored when text is compared: Unicode's `Default_Ignorable_Code_Point`.
///
/// Zero-width spaces and joiners, bidi controls, soft hyphens, variation selectors, tags and the Hangul fillers.
pub(super) fn is_invisible(c: char) -> bool {
    matches!(c,
        '\u{AD}' | '\u{34F}' | '\u{61C}' | '\u{115F}'..='\u{1160}' | '\u{17B4}'..='\u{17B5}' | '\u{180B}'..='\u{180F}'
        | '\u{200B}'..='\u{200F}' | '\u{202A}'..='\u{202E}' | '\u{2060}'..='\u{206F}' | '\u{3164}' | '\u{FE00}'..='\u{FE0F}'
        | '\u{FEFF}' | '\u{FFA0}' | '\u{FFF0}'..='\u{FFF8}' | '\u{1BCA0}'..='\u{1BCA3}' | '\u{1D173}'..='\u{1D17A}'
        | '\u{E0000}'..='\u{E0FFF}')
}

/// A character that is its own normalisation and composes with nothing: the unified ideographs. Chinese text is read three
/// times as fast for it.
pub(super) fn is_inert(c: char) -> bool {
    matches!(c, '\u{3400}'..='\u{4DBF}' | '\u{4E00}'..='\u{9FFF}')
}

/// The compatibility decomposition of one character, case folded.
///
/// Case is folded as lower(upper(lower(c))): Unicode's full folding for every letter in use, and beyond it ı is i. Combining
/// marks are left alone, so U+0345 does not become a letter in the middle of a run of marks.
pub(super) fn decompose(c: char, mut emit: impl FnMut(char)) {
    if c.is_ascii() {
        return emit(c.to_ascii_lowercase());
    }
    decompose_compatible(c, |part| {
        if part.is_ascii() {
            emit(part.to_ascii_lowercase());
        } else if canonical_combining_class(part) != 0 {
            emit(part);
        } else {
            for lower in part.to_lowercase() {
                for folded in lower.to_uppercase().flat_map(char::to_lowercase) {
                    decompose_compatible(folded, &mut emit);
                }
            }
        }
    });
}

/// May this character, first of a text, compose with a character before it?
pub(super) fn may_join(c: char) -> bool {
    is_nfc_quick(std::iter::once(c)) != IsNormalized::Yes || canonical_combining_class(c) != 0
}

/// The whole of a phrase or literal as the automata will read it.
pub(super) fn normalise(text: &str) -> String {
    let (mut composer, mut out) = (Composer::default(), String::with_capacity(text.len()));
    for c in text.chars().filter(|c| !is_invisible(*c)) {
        decompose(c, |part| composer.take(part, 0, 0, |part| out.push(part.c)));
    }
    composer.flush(|part| out.push(part.c));
    out
}

/// One decomposed character on its way to the automata.
#[derive(Clone, Copy)]
pub(super) struct Part {
    /// The letter or mark.
    pub(super) c: char,
    /// Where the original character it came from starts, in bytes of the lane.
    pub(super) start: u64,
    /// Where that character ends.
    pub(super) end: u64,
    /// It is composed into the character of the part before it.
    pub(super) joins: bool,
}

/// Puts combining marks in order and knows what composes with what.
#[derive(Default)]
pub(super) struct Composer {
    /// The last letter, with all composed into it so far; `None` when nothing can compose with it any more.
    letter: Option<char>,
    /// The marks after it, ordered by combining class; not fed yet. At most [`MOST_MARKS`].
    marks: Vec<Mark>,
}

struct Mark {
    c: char,
    class: u8,
    start: u64,
    end: u64,
}

impl Composer {
    /// Takes one decomposed character that came from the bytes `start..end`; feeds what is now in its final order.
    pub(super) fn take(&mut self, c: char, start: u64, end: u64, mut feed: impl FnMut(Part)) {
        let class = canonical_combining_class(c);
        if class != 0 {
            if self.marks.len() == MOST_MARKS {
                self.flush(&mut feed);
                self.letter = None;
            }
            let at = self.marks.partition_point(|mark| mark.class <= class);
            return self.marks.insert(at, Mark { c, class, start, end });
        }
        self.flush(&mut feed);
        let joined = self.letter.and_then(|letter| compose(letter, c));
        self.letter = joined.or(Some(c));
        feed(Part { c, start, end, joins: joined.is_some() });
    }

    /// Takes a character that [`is_inert`].
    pub(super) fn take_inert(&mut self, c: char, start: u64, end: u64, mut feed: impl FnMut(Part)) {
        self.flush(&mut feed);
        self.letter = None;
        feed(Part { c, start, end, joins: false });
    }

    /// ASCII was fed, which composes with nothing before it; `last` is its last byte, in lower case.
    pub(super) fn ascii(&mut self, last: u8) {
        debug_assert!(self.marks.is_empty(), "marks are flushed before the letter after them");
        self.letter = Some(char::from(last));
    }

    /// No mark can join the run any more: feeds those that compose with the letter, then the others.
    pub(super) fn flush(&mut self, mut feed: impl FnMut(Part)) {
        if self.marks.is_empty() {
            return;
        }
        if let [mark] = self.marks.as_slice() {
            self.letter = self.letter.and_then(|letter| compose(letter, mark.c));
            let part = Part { c: mark.c, start: mark.start, end: mark.end, joins: self.letter.is_some() };
            self.marks.clear();
            return feed(part);
        }
        let mut parts: [Option<Part>; MOST_MARKS] = [None; MOST_MARKS];
        let (mut letter, mut composed) = (self.letter, 0);
        let joins = Self::joining(&mut letter, &self.marks);
        for (joined, slot) in [(true, 0), (false, joins.count_ones())] {
            let mut slots = parts.iter_mut().skip(slot as usize);
            for (i, mark) in self.marks.iter().enumerate().filter(|(i, _)| (joins >> i & 1 == 1) == joined) {
                debug_assert!(i < MOST_MARKS, "a run has a bound");
                if let Some(slot) = slots.next() {
                    *slot = Some(Part { c: mark.c, start: mark.start, end: mark.end, joins: joined });
                    composed += usize::from(joined);
                }
            }
        }
        // Marks that do not stand in the order they came in cannot be told apart in the original: each stands for the run.
        let run = || parts.iter().flatten();
        if !run().is_sorted_by_key(|part| (part.start, part.end)) {
            let start = run().map(|part| part.start).min().unwrap_or(0);
            let end = run().map(|part| part.end).max().unwrap_or(0);
            for part in parts.iter_mut().flatten() {
                (part.start, part.end) = (start, end);
            }
        }
        self.letter = if composed == self.marks.len() { letter } else { None };
        self.marks.clear();
        parts.into_iter().flatten().for_each(&mut feed);
    }

    /// Are there marks whose order is not settled?
    pub(super) fn waits(&self) -> bool {
        !self.marks.is_empty()
    }

    /// Where the first unsettled mark came from.
    pub(super) fn waits_from(&self) -> Option<u64> {
        self.marks.iter().map(|mark| mark.start).min()
    }

    /// Has a mark already composed with the letter? Later marks cannot undo that: a mark is blocked only by one of its own
    /// class or a higher one standing before it, and a later one is put behind its own class.
    pub(super) fn letter_has_changed(&self) -> bool {
        Self::joining(&mut self.letter.clone(), &self.marks) != 0
    }

    /// Which marks compose with `letter`, as a set of bits by index; `letter` becomes what they make of it (UAX #15, D117).
    fn joining(letter: &mut Option<char>, marks: &[Mark]) -> u32 {
        let (mut joins, mut blocked_to) = (0, 0);
        for (i, mark) in marks.iter().enumerate().take(MOST_MARKS) {
            match letter.filter(|_| mark.class > blocked_to).and_then(|letter| compose(letter, mark.c)) {
                Some(whole) => {
                    *letter = Some(whole);
                    joins |= 1 << i;
                }
                None => blocked_to = mark.class,
            }
        }
        joins
    }
}
