use std::collections::HashMap;

use super::{
    oracle::{self, Whole},
    *,
};

const DENY: Action = Action::Deny;
const MASK: Action = Action::Mask;

enum Is {
    Phrase(&'static str, Action),
    Pattern(&'static str, Action),
}
use Is::{Pattern, Phrase};

fn build(rules: &[Is]) -> (Matcher, Vec<oracle::Rule>) {
    let (mut builder, mut plain) = (MatcherBuilder::new(), Vec::new());
    for rule in rules {
        let (what, action) = match rule {
            Phrase(phrase, action) => {
                builder.phrase(*phrase, *action, "test");
                (oracle::What::Phrase((*phrase).to_owned()), *action)
            }
            Pattern(pattern, action) => {
                builder.pattern(*pattern, *action, "test");
                (oracle::What::Pattern(patterns::fold(pattern).unwrap().hir), *action)
            }
        };
        plain.push(oracle::Rule { what, action });
    }
    (builder.build().unwrap(), plain)
}

/// What a scan said in the end, and how far it had cleared after each piece.
struct Said {
    whole: Whole,
    steps: Vec<Progress>,
}

/// Runs the pieces through a scan, holding every promise of the interface against it on the way.
fn say<'a>(matcher: &Matcher, pieces: impl IntoIterator<Item = &'a str>, leaks: u64) -> Result<Said, String> {
    let (mut scan, mut out, mut said, mut at, mut before) = (matcher.scan(), Edits::default(), Whole::default(), 0, 0);
    scan.leaks = leaks;
    let mut steps = Vec::new();
    let mut pieces = pieces.into_iter();
    loop {
        out.clear();
        let piece = pieces.next();
        let progress = match piece {
            Some(piece) => {
                at += piece.len() as u64;
                scan.push(matcher, piece, &mut out)
            }
            None => scan.finish(matcher, &mut out),
        };
        if progress.cleared < before || progress.cleared > at {
            return Err(format!("cleared {} after {before}, of {at}", progress.cleared));
        }
        for mask in &out.masks {
            if mask.range.start < before.max(said.masks.last().map_or(0, |last| last.end))
                || mask.range.end > progress.cleared
                || mask.range.is_empty()
            {
                return Err(format!("the mask {mask:?} does not lie in {before}..{}", progress.cleared));
            }
            match said.masks.last_mut() {
                _ if mask.first => said.masks.push(mask.range.clone()),
                Some(last) if last.end == mask.range.start => last.end = mask.range.end,
                _ => return Err(format!("the mask {mask:?} continues nothing")),
            }
        }
        said.hits.extend(out.hits.iter().map(|hit| (hit.rule.0 as usize, hit.range.start, hit.range.end)));
        before = progress.cleared;
        steps.push(progress);
        if progress.cut {
            said.cut = Some(progress.cleared);
            break;
        }
        if piece.is_none() {
            if progress.cleared != at {
                return Err(format!("only {} of {at} in the end", progress.cleared));
            }
            break;
        }
    }
    said.hits.sort();
    Ok(Said { whole: said, steps })
}

/// All ways to cut `text`, as sets of bits: bit i is a cut after character i.
fn cut(text: &str, cuts: u32) -> Vec<&str> {
    let (mut pieces, mut from) = (Vec::new(), 0);
    for (i, (at, _)) in text.char_indices().skip(1).enumerate() {
        if cuts >> i & 1 == 1 {
            pieces.push(&text[from..at]);
            from = at;
        }
    }
    pieces.push(&text[from..]);
    pieces
}

fn texts(alphabet: &[&str], longest: usize) -> Vec<String> {
    let (mut all, mut now) = (vec![String::new()], vec![String::new()]);
    for _ in 0..longest {
        now = now.iter().flat_map(|text| alphabet.iter().map(move |c| format!("{text}{c}"))).collect();
        all.extend_from_slice(&now);
    }
    all
}

/// What a scan should say after `text`, by trying all continuations of at most `further` characters: a match is certain if it
/// stands in all of them and a character has followed it.
fn least_hold(rules: &[oracle::Rule], alphabet: &[&str], text: &str, further: usize) -> Progress {
    let end = text.len() as u64;
    let futures = texts(alphabet, further);
    let mut counts: HashMap<(usize, u64, u64), usize> = HashMap::new();
    for more in &futures {
        for found in oracle::matches(rules, &format!("{text}{more}")).into_iter().filter(|(_, start, _)| *start < end) {
            *counts.entry(found).or_default() += 1;
        }
    }
    let (certain, open): (Vec<_>, Vec<_>) = counts.into_iter().partition(|((_, _, to), count)| *to < end && *count == futures.len());
    let open = open.into_iter().map(|((_, start, _), _)| start).min().unwrap_or(end);
    let denied = certain.into_iter().filter(|((rule, ..), _)| rules[*rule].action == DENY).map(|((_, start, _), _)| start).min();
    Progress { cleared: denied.unwrap_or(end).min(open), cut: denied.is_some_and(|denied| denied <= open) }
}

/// Every text over the alphabet, cut in every way: the same as the oracle finds in the whole of it. Where `further` is given,
/// each prefix is also held exactly as far as some continuation of that many characters needs it.
fn exhaust(alphabet: &[&str], longest: usize, further: Option<usize>, rules: &[Is], leaks: u64) -> Result<(), String> {
    let (matcher, plain) = build(rules);
    let mut holds: HashMap<String, Progress> = HashMap::new();
    for text in texts(alphabet, longest) {
        let want = oracle::whole(&plain, &text);
        for cuts in 0..1u32 << text.chars().count().saturating_sub(1) {
            let pieces = cut(&text, cuts);
            let said = say(&matcher, pieces.iter().copied(), leaks).map_err(|error| format!("{text:?} cut as {pieces:?}: {error}"))?;
            if said.whole != want {
                return Err(format!("{text:?} cut as {pieces:?}: {:?} instead of {want:?}", said.whole));
            }
            // Each prefix is the first piece of some way of cutting, so to look at the first is to look at all.
            if let (Some(further), Some(step), Some(first)) = (further, said.steps.first(), pieces.first()) {
                let want = *holds.entry((*first).to_owned()).or_insert_with(|| least_hold(&plain, alphabet, first, further));
                if *step != want {
                    return Err(format!("after {first:?}: {step:?} instead of {want:?}"));
                }
            }
        }
    }
    Ok(())
}

#[test]
fn every_cutting_of_every_short_text_gives_the_same_and_holds_the_least() {
    let abc = &["a", "b", "c"];
    let sets: &[(&[&str], usize, usize, &[Is])] = &[
        (abc, 8, 2, &[Phrase("abc", MASK)]),
        (abc, 8, 3, &[Phrase("aab", MASK), Phrase("abca", DENY)]),
        (abc, 8, 3, &[Phrase("ab", MASK), Phrase("bab", MASK), Phrase("abba", DENY), Phrase("b", MASK)]),
        (abc, 7, 3, &[Phrase("aa", MASK), Phrase("aaba", DENY), Phrase("ca", DENY)]),
        (abc, 7, 3, &[Phrase("abcb", MASK), Phrase("bc", DENY)]),
        (abc, 7, 4, &[Pattern("ab{1,3}c", MASK), Phrase("bb", MASK)]),
        (abc, 7, 4, &[Pattern("a[bc]{0,3}a", DENY), Pattern("cb|bca", MASK)]),
        (abc, 7, 4, &[Pattern("a.{0,2}c", MASK), Phrase("cab", DENY), Pattern("c{2,3}", MASK)]),
        (&["a", "b", " "], 7, 4, &[Pattern(r"\ba{1,3}\b", MASK), Pattern(r"b\Ba", DENY), Phrase("b b", MASK)]),
        (&["a", "b", " "], 7, 3, &[Pattern(r"^ab|ba$", MASK), Pattern(r"\Aa a", DENY)]),
    ];
    for (alphabet, longest, further, rules) in sets {
        exhaust(alphabet, *longest, Some(*further), rules, 0).unwrap();
    }
}

#[test]
fn every_cutting_of_every_short_text_with_marks_gives_the_same() {
    // e and acute compose, e and cedilla do, b and acute do not; cedilla stands before acute in canonical order.
    let marked = &["b", "e", "\u{301}", "\u{327}"];
    for rules in [
        &[Phrase("be", MASK)] as &[Is],
        &[Phrase("be\u{301}", MASK), Phrase("eb", DENY)],
        &[Phrase("b\u{301}", MASK), Phrase("eé", DENY), Pattern("b.e", MASK)],
        &[Pattern("[be]{2}", MASK), Pattern("é", DENY)],
        &[Phrase("b\u{327}\u{301}", MASK), Phrase("ȩ", MASK), Pattern(r"e\b", MASK)],
    ] {
        exhaust(marked, 6, None, rules, 0).unwrap();
    }
    let written = &["e", "é", "\u{327}", "\u{200b}"];
    exhaust(written, 6, None, &[Phrase("ee", MASK), Phrase("éé", DENY), Pattern("eé", MASK)], 0).unwrap();
    let hangul = &["가", "ᆨ", "ᄀ", "ᅡ"];
    exhaust(hangul, 6, None, &[Phrase("가", MASK), Phrase("각가", DENY), Pattern("ᄀ.{0,1}ᄀ", MASK)], 0).unwrap();
}

#[test]
fn with_only_ascii_rules_marks_hold_nothing_longer_than_they_must() {
    // Both letters compose with the dot below, which stands before the acute in canonical order: so it may always come yet.
    let marked = &["b", "e", "\u{301}", "\u{323}"];
    exhaust(marked, 6, Some(2), &[Phrase("be", MASK), Phrase("ebb", DENY)], 0).unwrap();
    exhaust(marked, 5, Some(2), &[Pattern("be{1,2}", MASK), Pattern(r"\bbb\b", DENY)], 0).unwrap();
}

#[test]
fn the_exhaustive_check_notices_a_hold_one_byte_too_short() {
    for rules in [&[Phrase("abc", MASK)] as &[Is], &[Phrase("abc", DENY)], &[Pattern("ab{1,3}c", MASK)]] {
        assert!(exhaust(&["a", "b", "c"], 5, None, rules, 1).is_err());
    }
}
