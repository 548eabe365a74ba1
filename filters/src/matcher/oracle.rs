//! What a matcher must find, computed from the whole text by the plainest means: no automaton, no state, nothing of the scan.
//!
//! Phrases are looked for in the composed normalised text, character by character; patterns by trying every start and
//! walking the expression with sets of ends.

use std::{collections::BTreeSet, ops::Range};

use regex_syntax::{
    hir::{Class, Hir, HirKind, Look},
    utf8::Utf8Sequences,
};
use unicode_normalization::{
    UnicodeNormalization,
    char::{canonical_combining_class, compose, decompose_canonical},
};

use super::{
    Action,
    detectors::{Shape, Tail},
    normal,
};

pub(super) enum What {
    Phrase(String),
    Pattern(Hir),
    Shape(Hir, &'static Shape),
}

pub(super) struct Rule {
    pub(super) what: What,
    pub(super) action: Action,
}

#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub(super) struct Whole {
    /// Masked unions, clipped at the cut.
    pub(super) masks: Vec<Range<u64>>,
    pub(super) cut: Option<u64>,
    /// By rule index, sorted.
    pub(super) hits: Vec<(usize, u64, u64)>,
}

/// One character of the normalised text and the original bytes it came from.
#[derive(Debug)]
struct Character {
    c: char,
    from: Range<u64>,
}

/// A match, in original bytes, and its end in normalised characters: a character that becomes several has several ends.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Match {
    pub(super) rule: usize,
    pub(super) start: u64,
    pub(super) end: u64,
    to: usize,
}

pub(super) fn matches(rules: &[Rule], text: &str) -> Vec<Match> {
    let characters = characters(text);
    let (mut bytes, mut borders) = (Vec::new(), vec![0]);
    for character in &characters {
        decompose_canonical(character.c, |c| bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()));
        borders.push(bytes.len());
    }
    let mut found = Vec::new();
    for (i, rule) in rules.iter().enumerate() {
        let mut add = |from: usize, to: usize| {
            let start = characters[from..to].iter().map(|c| c.from.start).min().unwrap();
            let end = characters[from..to].iter().map(|c| c.from.end).max().unwrap();
            found.push(Match { rule: i, start, end, to });
        };
        match &rule.what {
            What::Phrase(phrase) => {
                let phrase: Vec<char> = composed(phrase);
                for (from, window) in characters.windows(phrase.len()).enumerate() {
                    if window.iter().map(|c| c.c).eq(phrase.iter().copied()) {
                        add(from, from + phrase.len());
                    }
                }
            }
            What::Pattern(hir) => {
                for (from, start) in borders.iter().enumerate() {
                    for end in ends(hir, &bytes, *start) {
                        if let Ok(to) = borders.binary_search(&end) {
                            add(from, to);
                        }
                    }
                }
            }
            What::Shape(hir, shape) => {
                for (from, start) in borders.iter().enumerate() {
                    for end in ends(hir, &bytes, *start) {
                        if let Ok(to) = borders.binary_search(&end)
                            && shape.check.is_none_or(|check| check(&bytes[*start..end]))
                        {
                            let tail = shape.tail.filter(|_| rule.action == Action::Mask);
                            add(from, to + tail.map_or(0, |tail| tail_length(tail, &characters[to..])));
                        }
                    }
                }
            }
        }
    }
    found
}

/// How many of the characters after a match belong to its tail.
fn tail_length(tail: &Tail, after: &[Character]) -> usize {
    let belongs = |character: &&Character| character.c.is_ascii() && (tail.class)(character.c as u8);
    let body: String = after.iter().take(tail.limit as usize).take_while(belongs).map(|character| character.c).collect();
    let end_line = body.find("-----end").and_then(|at| Some(at + 8 + body[at + 8..].find("-----")? + 5));
    end_line.filter(|_| tail.until_end_line).unwrap_or(body.len())
}

pub(super) fn whole(rules: &[Rule], text: &str) -> Whole {
    let each: Vec<usize> = (0..rules.len()).collect();
    whole_as(rules, text, &each)
}

/// The same where several of these rules are one rule of the matcher: `as_rule` says which.
pub(super) fn whole_as(rules: &[Rule], text: &str, as_rule: &[usize]) -> Whole {
    let found = matches(rules, text);
    let denied = found.iter().filter(|found| rules[found.rule].action == Action::Deny);
    let denied = denied.map(|found| (found.start, found.to, as_rule[found.rule], found.end)).min();
    let cut = denied.map(|(start, ..)| start);
    let spans = |of: &dyn Fn(usize) -> bool| -> Vec<Range<u64>> {
        let masked = found.iter().filter(|found| rules[found.rule].action == Action::Mask && of(as_rule[found.rule]));
        let mut spans: Vec<_> = masked.map(|found| found.start..found.end).collect();
        spans.sort_by_key(|span| (span.start, span.end));
        let to = cut.unwrap_or(u64::MAX);
        unions(spans).into_iter().filter(|span| span.start < to).map(|span| span.start..span.end.min(to)).collect()
    };
    let mut hits: Vec<_> = denied.map(|(start, _, rule, end)| (rule, start, end)).into_iter().collect();
    for rule in as_rule.iter().collect::<BTreeSet<_>>() {
        hits.extend(spans(&|other| other == *rule).into_iter().map(|span| (*rule, span.start, span.end)));
    }
    hits.sort();
    Whole { masks: spans(&|_| true), cut, hits }
}

fn unions(spans: Vec<Range<u64>>) -> Vec<Range<u64>> {
    let mut out: Vec<Range<u64>> = Vec::new();
    for span in spans {
        match out.last_mut() {
            Some(last) if span.start < last.end => last.end = last.end.max(span.end),
            _ => out.push(span),
        }
    }
    out
}

fn folded(text: &str) -> Vec<char> {
    let mut out = Vec::new();
    text.chars().filter(|c| !normal::is_invisible(*c)).for_each(|c| normal::decompose(c, |c| out.push(c)));
    out
}

/// The normalised text as the Unicode library has it.
fn composed(text: &str) -> Vec<char> {
    stream_safe(&folded(text)).into_iter().nfc().filter(|c| *c != '\u{34F}').collect()
}

/// UAX15-D4: a grapheme joiner after each 30 marks.
fn stream_safe(chars: &[char]) -> Vec<char> {
    let (mut out, mut marks) = (Vec::new(), 0);
    for c in chars {
        marks = if canonical_combining_class(*c) == 0 { 0 } else { marks + 1 };
        if marks > normal::MOST_MARKS {
            out.push('\u{34F}');
            marks = 1;
        }
        out.push(*c);
    }
    out
}

/// The normalised text, with where each character came from; written after UAX #15 and held against the library.
fn characters(text: &str) -> Vec<Character> {
    let mut parts: Vec<Character> = Vec::new();
    for (at, c) in text.char_indices().filter(|(_, c)| !normal::is_invisible(*c)) {
        let from = at as u64..(at + c.len_utf8()) as u64;
        normal::decompose(c, |c| parts.push(Character { c, from: from.clone() }));
    }
    let mut out: Vec<Character> = Vec::new();
    let mut open = false; // may the next letter compose with the last character of `out`?
    let mut rest = parts.into_iter().peekable();
    while rest.peek().is_some() {
        if let Some(letter) = rest.next_if(|part| canonical_combining_class(part.c) == 0) {
            match out.last_mut().filter(|_| open).and_then(|last| compose(last.c, letter.c).map(|c| (last, c))) {
                Some((last, c)) => (last.c, last.from.end) = (c, letter.from.end),
                None => out.push(letter),
            }
            open = true;
        }
        let mut run: Vec<Character> = Vec::new();
        while run.len() < normal::MOST_MARKS
            && let Some(mark) = rest.next_if(|part| canonical_combining_class(part.c) != 0)
        {
            run.push(mark);
        }
        if run.is_empty() {
            continue;
        }
        run.sort_by_key(|mark| canonical_combining_class(mark.c));
        let (mut joined, mut left): (Vec<Character>, Vec<Character>) = Default::default();
        let mut letter = if open { out.last().map(|last| last.c) } else { None };
        for mark in run {
            let class = canonical_combining_class(mark.c);
            let blocked = left.last().is_some_and(|mark| canonical_combining_class(mark.c) >= class);
            match letter.filter(|_| !blocked).and_then(|letter| compose(letter, mark.c)) {
                Some(c) => {
                    letter = Some(c);
                    joined.push(mark);
                }
                None => left.push(mark),
            }
        }
        let order: Vec<_> = joined.iter().chain(&left).map(|mark| (mark.from.start, mark.from.end)).collect();
        if !order.is_sorted() {
            let all = order.iter().map(|o| o.0).min().unwrap()..order.iter().map(|o| o.1).max().unwrap();
            joined.iter_mut().chain(&mut left).for_each(|mark| mark.from = all.clone());
        }
        open = left.is_empty() && open && rest.peek().is_some_and(|part| canonical_combining_class(part.c) == 0);
        if let (Some(last), Some(c)) = (out.last_mut(), letter)
            && !joined.is_empty()
        {
            last.c = c;
            last.from.end = last.from.end.max(joined.iter().map(|mark| mark.from.end).max().unwrap());
            last.from.start = last.from.start.min(joined.iter().map(|mark| mark.from.start).min().unwrap());
        }
        out.extend(left);
    }
    assert_eq!(out.iter().map(|c| c.c).collect::<String>(), composed(text).into_iter().collect::<String>(), "the library agrees");
    out
}

/// All ends of matches of `hir` that begin at `at`.
fn ends(hir: &Hir, text: &[u8], at: usize) -> BTreeSet<usize> {
    match hir.kind() {
        HirKind::Empty => [at].into(),
        HirKind::Literal(literal) => text[at..].starts_with(&literal.0).then(|| at + literal.0.len()).into_iter().collect(),
        HirKind::Class(Class::Unicode(class)) => {
            let c = std::str::from_utf8(&text[at..]).ok().and_then(|text| text.chars().next());
            c.filter(|c| class.iter().any(|range| (range.start()..=range.end()).contains(c)))
                .map(|c| at + c.len_utf8())
                .into_iter()
                .collect()
        }
        HirKind::Class(Class::Bytes(class)) => {
            assert!(class.is_ascii() && Utf8Sequences::new('a', 'a').count() == 1);
            text.get(at)
                .filter(|b| class.iter().any(|range| (range.start()..=range.end()).contains(b)))
                .map(|_| at + 1)
                .into_iter()
                .collect()
        }
        HirKind::Look(look) => {
            let word = |at: Option<usize>| at.and_then(|at| text.get(at)).is_some_and(|b| b.is_ascii_alphanumeric() || *b == b'_');
            let border = word(at.checked_sub(1)) != word(Some(at));
            let holds = match look {
                Look::Start => at == 0,
                Look::End => at == text.len(),
                Look::WordAscii => border,
                Look::WordAsciiNegate => !border,
                other => unimplemented_look(*other),
            };
            holds.then_some(at).into_iter().collect()
        }
        HirKind::Repetition(repetition) => {
            let (mut now, mut all) = (BTreeSet::from([at]), BTreeSet::new());
            for n in 0..=repetition.max.unwrap() {
                if n >= repetition.min {
                    all.extend(&now);
                }
                now = now.iter().flat_map(|at| ends(&repetition.sub, text, *at)).collect();
                if now.is_empty() {
                    break;
                }
            }
            all
        }
        HirKind::Capture(capture) => ends(&capture.sub, text, at),
        HirKind::Concat(parts) => {
            parts.iter().fold([at].into(), |now: BTreeSet<usize>, part| now.iter().flat_map(|at| ends(part, text, *at)).collect())
        }
        HirKind::Alternation(parts) => parts.iter().flat_map(|part| ends(part, text, at)).collect(),
    }
}

fn unimplemented_look(look: Look) -> bool {
    panic!("the tests use no {look:?}")
}
