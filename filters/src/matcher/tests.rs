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
                (oracle::What::Pattern(patterns::fold(pattern).unwrap()), *action)
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
    let mut counts: HashMap<oracle::Match, usize> = HashMap::new();
    for more in &futures {
        for found in oracle::matches(rules, &format!("{text}{more}")).into_iter().filter(|found| found.start < end) {
            *counts.entry(found).or_default() += 1;
        }
    }
    let (certain, open): (Vec<_>, Vec<_>) = counts.into_iter().partition(|(found, count)| found.end < end && *count == futures.len());
    let open = open.into_iter().map(|(found, _)| found.start).min().unwrap_or(end);
    let denied = certain.into_iter().filter(|(found, _)| rules[found.rule].action == DENY).map(|(found, _)| found.start).min();
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
        (abc, 7, 2, &[Phrase("abc", MASK)]),
        (abc, 7, 3, &[Phrase("aab", MASK), Phrase("abca", DENY)]),
        (abc, 7, 3, &[Phrase("ab", MASK), Phrase("bab", MASK), Phrase("abba", DENY), Phrase("b", MASK)]),
        (abc, 7, 3, &[Phrase("aa", MASK), Phrase("aaba", DENY), Phrase("ca", DENY)]),
        (abc, 7, 3, &[Phrase("abcb", MASK), Phrase("bc", DENY)]),
        (abc, 6, 4, &[Pattern("ab{1,3}c", MASK), Phrase("bb", MASK)]),
        (abc, 6, 4, &[Pattern("a[bc]{0,3}a", DENY), Pattern("cb|bca", MASK)]),
        (abc, 6, 4, &[Pattern("a.{0,2}c", MASK), Phrase("cab", DENY), Pattern("c{2,3}", MASK)]),
        (&["a", "b", " "], 6, 4, &[Pattern(r"\ba{1,3}\b", MASK), Pattern(r"b\Ba", DENY), Phrase("b b", MASK)]),
        (&["a", "b", " "], 6, 3, &[Pattern(r"^ab|ba$", MASK), Pattern(r"\Aa a", DENY)]),
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
        exhaust(marked, 5, None, rules, 0).unwrap();
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

/// The text with its masks shown, for one way of cutting.
fn shown(matcher: &Matcher, pieces: &[&str]) -> String {
    let said = say(matcher, pieces.iter().copied(), 0).unwrap();
    let (text, mut out, mut at) = (pieces.concat(), String::new(), 0);
    for mask in &said.whole.masks {
        out += &text[at..mask.start as usize];
        out += "•";
        at = mask.end as usize;
    }
    out += &text[at..said.whole.cut.map_or(text.len(), |cut| cut as usize)];
    out + if said.whole.cut.is_some() { "|" } else { "" }
}

/// Shown the same in one piece, character by character, and in two pieces cut anywhere.
pub(super) fn shown_always(matcher: &Matcher, text: &str) -> String {
    let want = shown(matcher, &[text]);
    assert_eq!(shown(matcher, &cut_every(text, 1)), want, "{text:?} in single characters");
    assert_eq!(shown(matcher, &cut_every(text, 7)), want, "{text:?} in sevens");
    for (at, _) in text.char_indices() {
        assert_eq!(shown(matcher, &[&text[..at], &text[at..]]), want, "{text:?} cut at {at}");
    }
    want
}

fn cut_every(text: &str, every: usize) -> Vec<&str> {
    let ends: Vec<usize> = text.char_indices().map(|(at, _)| at).skip(every).step_by(every).chain([text.len()]).collect();
    let starts = std::iter::once(0).chain(ends.iter().copied());
    starts.zip(&ends).map(|(start, end)| &text[start..*end]).collect()
}

fn matcher(rules: &[Is]) -> Matcher {
    build(rules).0
}

#[test]
fn overlapping_masks_show_one_replacement_and_touching_ones_show_two() {
    let matcher = matcher(&[Phrase("abc", MASK), Phrase("cde", MASK), Phrase("xy", MASK)]);
    assert_eq!(shown_always(&matcher, "-abcde-"), "-•-");
    assert_eq!(shown_always(&matcher, "-abcxy-"), "-••-");
    assert_eq!(shown_always(&matcher, "-xyxy-"), "-••-");
}

#[test]
fn a_cut_lets_the_text_before_it_go_and_clips_the_mask_that_reaches_over_it() {
    let matcher = matcher(&[Phrase("secret", MASK), Phrase("retry", DENY), Phrase("zz", DENY)]);
    assert_eq!(shown_always(&matcher, "my secret is"), "my • is");
    assert_eq!(shown_always(&matcher, "my secretry is zz"), "my •|");
    assert_eq!(shown_always(&matcher, "ok zzz"), "ok |");
    let said = say(&matcher, ["my secr", "etry"], 0).unwrap().whole;
    assert_eq!(said.hits, [(0, 3, 6), (1, 6, 11)]);
}

#[test]
fn the_least_start_is_cut_though_another_denied_phrase_ends_first() {
    let matcher = matcher(&[Phrase("bcdef", DENY), Phrase("cd", DENY)]);
    assert_eq!(shown_always(&matcher, "abcdef"), "a|");
    assert_eq!(shown_always(&matcher, "abcdex"), "ab|");
}

#[test]
fn of_two_denied_matches_that_end_in_one_character_the_first_to_end_is_reported() {
    // ǆ is d and ž: the pattern ends with the d, the phrase with all of it.
    let rules = &[Phrase("aǆ", DENY), Pattern("ad", DENY)];
    let (matcher, plain) = build(rules);
    for pieces in [&["aǆaǆ"] as &[&str], &["a", "ǆ", "aǆ"], &["aǆ", "a"]] {
        let said = say(&matcher, pieces.iter().copied(), 0).unwrap().whole;
        assert_eq!(said, oracle::whole(&plain, &pieces.concat()));
        assert_eq!(said.hits, [(1, 0, 3)]);
    }
}

#[test]
fn a_phrase_is_found_however_it_is_written() {
    let matcher = matcher(&[Phrase("Straße 1", MASK), Phrase("bomb", MASK), Phrase("café", MASK), Phrase("강남", MASK)]);
    for written in [
        "STRASSE 1",
        "straße\u{a0}①",
        "Bo\u{200b}m\u{ad}B",
        "ｂｏｍｂ",
        "𝐛𝐨𝐦𝐛",
        "ⓑⓞⓜⓑ",
        "cafe\u{301}",
        "CAFÉ",
        "ca\u{202e}f\u{2066}é",
        "\u{1100}\u{1161}\u{11bc}\u{1102}\u{1161}\u{11b7}",
    ] {
        assert_eq!(shown_always(&matcher, &format!("({written})")), "(•)", "{written:?}");
    }
    // é is another letter than e, a syllable with a final another than the one without; but a dot on nothing it joins is b still.
    let matcher = super::tests::matcher(&[Phrase("cafe", MASK), Phrase("bomb", MASK), Phrase("가", MASK)]);
    for other in ["café", "cafe\u{301}", "cafe\u{327}\u{301}", "bomb\u{323}", "각", "가\u{11a8}", "\u{1100}\u{1161}\u{11a8}"] {
        assert_eq!(shown_always(&matcher, other), other);
    }
    assert_eq!(shown_always(&matcher, "bomb\u{301} cafés cafes"), "•\u{301} cafés •s");
}

#[test]
fn a_match_covers_the_invisible_characters_inside_it_and_not_those_around_it() {
    let matcher = matcher(&[Phrase("bomb", MASK)]);
    let said = say(&matcher, ["\u{200b}bo\u{200b}mb\u{200b}!"], 0).unwrap().whole;
    assert_eq!((said.masks.len(), said.masks.first()), (1, Some(&(3..10))));
}

#[test]
fn clean_text_waits_for_nothing_and_a_forming_match_only_until_it_fails() {
    let matcher = matcher(&[Phrase("bomb", DENY), Phrase("big boat", MASK)]);
    let said = say(&matcher, ["hello ", "wor", "ld bo", "x bi", "g bo", "mb"], 0).unwrap();
    let cleared: Vec<_> = said.steps.iter().map(|step| step.cleared).collect();
    assert_eq!(cleared, [6, 9, 12, 16, 16, 20, 20]);
}

#[test]
fn invisible_characters_cannot_make_a_scan_hold_more_than_it_says() {
    for (action, want) in [(MASK, "a •• b"), (DENY, "a •|")] {
        let matcher = matcher(&[Phrase("bomb", action)]);
        let stretched = format!("a b{}omb b", "\u{200b}".repeat(2000));
        let pieces = cut_every(&stretched, 50);
        let mut at = 0;
        for (piece, step) in pieces.iter().zip(say(&matcher, pieces.iter().copied(), 0).unwrap().steps) {
            at += piece.len();
            assert!(at - step.cleared as usize <= matcher.longest(), "{} held, {} promised", at - step.cleared as usize, matcher.longest());
        }
        let said = [1, 3, 50, 10_000].map(|every| shown(&matcher, &cut_every(&stretched, every)));
        assert!(said.iter().all(|said| said == &said[..]), "{said:?}");
        assert_eq!(said.iter().map(String::as_str).collect::<Vec<_>>(), vec![want.replace("••", "•"); 4]);
    }
}

#[test]
fn what_cannot_be_used_on_a_stream_is_refused_with_the_remedy() {
    let fault = |rule: Is| {
        let mut builder = MatcherBuilder::new();
        match rule {
            Phrase(phrase, action) => builder.phrase(phrase, action, "test"),
            Pattern(pattern, action) => builder.pattern(pattern, action, "test"),
        };
        builder.build().unwrap_err().to_string()
    };
    assert_eq!(fault(Phrase("\u{200b}", MASK)), "the phrase \"\\u{200b}\" is empty, or all of it is invisible; remove it");
    assert!(fault(Phrase("\u{301}e", MASK)).contains("begins with a mark"));
    assert!(fault(Phrase(&*"long ".repeat(1000).leak(), MASK)).contains("5000 bytes long"));
    assert!(fault(Pattern("ab+", DENY)).contains("no greatest length"));
    assert!(fault(Pattern("a{0,3}", DENY)).contains("empty text"));
    assert!(fault(Pattern("a{5000}", DENY)).contains("at most 4096"));
    assert!(fault(Pattern(r"é\w", DENY)).contains("very many letters"));
    assert!(fault(Pattern(r"(?-u:\xFF)", DENY)).contains("write characters"));
    assert!(fault(Pattern("a(b", DENY)).contains("unclosed"));
    assert!(fault(Pattern(r"[a-c]{0,60}(?:.{0,9}a.{15}b){1,9}", DENY)).contains("MiB"), "its table has millions of states");
}

#[test]
fn letters_beyond_ascii_can_be_written_in_patterns() {
    let matcher = matcher(&[Pattern("stra(?:ß|\u{df})e [0-9]{1,3}", MASK), Pattern("[äöü]x", MASK), Pattern("k[^a ]k", MASK)]);
    assert_eq!(shown_always(&matcher, "STRASSE 12 Äx kék k\u{e4}k kak kßk"), "• • kék käk kak kßk");
    assert_eq!(shown_always(&matcher, "kbk k日k"), "• •");
}

#[test]
fn clean_text_allocates_nothing() {
    let mut builder = MatcherBuilder::new();
    builder.phrase("bomb", DENY, "test").pattern("[a-z]{3}-[0-9]{4}", MASK, "test");
    Detector::ALL.into_iter().for_each(|detector| _ = builder.detector(detector, MASK));
    let matcher = builder.build().unwrap();
    let (mut scan, mut out) = (matcher.scan(), Edits::default());
    let mut read = || {
        for piece in ["The bo", "x has ", "3 abc-12 parts, l'été", " fini\u{301}", ": 日本", " ada@home 4111 1111 -- "] {
            scan.push(&matcher, piece, &mut out);
        }
    };
    read(); // the scan takes what memory it needs for forming matches
    assert_eq!(allocation_counter::measure(read).count_total, 0);
    assert!(out.masks.is_empty() && out.hits.is_empty());
}

#[test]
fn debug_shows_no_text() {
    let (matcher, mut out) = (matcher(&[Phrase("hunter2", MASK), Pattern("hunter[0-9]", MASK)]), Edits::default());
    let mut scan = matcher.scan();
    scan.push(&matcher, "my hunter", &mut out);
    assert!(!format!("{scan:?}{matcher:?}{out:?}").contains("hunter"));
}

mod any_text {
    use std::sync::OnceLock;

    use proptest::prelude::*;

    use super::*;

    /// Characters that meet often enough to compose, fold, expand and hide each other.
    fn letter() -> impl Strategy<Value = &'static str> {
        proptest::sample::select(vec![
            "a",
            "b",
            "e",
            "E",
            "i",
            "k",
            "s",
            "S",
            "o",
            " ",
            "-",
            "1",
            "é",
            "É",
            "ß",
            "ẞ",
            "İ",
            "ı",
            "ſ",
            "ﬁ",
            "ﬀ",
            "K",
            "Å",
            "ǅ",
            "ŉ",
            "ΐ",
            "ς",
            "Σ",
            "ᾳ",
            "①",
            "½",
            "ａ",
            "Ｂ",
            "𝐞",
            "ế",
            "\u{301}",
            "\u{300}",
            "\u{323}",
            "\u{327}",
            "\u{308}",
            "\u{345}",
            "\u{307}",
            "\u{338}",
            "\u{344}",
            "\u{200b}",
            "\u{200d}",
            "\u{ad}",
            "\u{202e}",
            "\u{fe0f}",
            "\u{e0061}",
            "가",
            "각",
            "ᄀ",
            "ᅡ",
            "ᆨ",
            "ㄱ",
            "ﾡ",
            "か",
            "が",
            "\u{3099}",
            "\u{9c7}",
            "\u{9be}",
            "क",
            "\u{93c}",
            "😀",
            "👩",
            "日",
            "ﷺ",
        ])
    }

    fn text(most: usize) -> impl Strategy<Value = String> {
        let few = || prop::collection::vec(letter(), 0..most).prop_map(|letters| letters.concat());
        // A few letters again and again, so that phrases meet in the text.
        let again = (prop::collection::vec(letter(), 1..5), prop::collection::vec(any::<prop::sample::Index>(), 0..most))
            .prop_map(|(letters, picks)| picks.iter().map(|pick| *pick.get(&letters)).collect::<String>());
        prop_oneof![few(), again]
    }

    fn part_of(text: String) -> impl Strategy<Value = String> {
        (any::<prop::sample::Index>(), 1..6usize, text_or(text)).prop_map(|(at, length, text)| {
            let chars: Vec<char> = text.chars().collect();
            let at = if chars.is_empty() { 0 } else { at.index(chars.len()) };
            chars.iter().skip(at).take(length).collect()
        })
    }

    fn text_or(whole: String) -> impl Strategy<Value = String> {
        prop_oneof![4 => Just(whole), 1 => text(8)]
    }

    fn action() -> impl Strategy<Value = Action> {
        prop_oneof![3 => Just(MASK), 1 => Just(DENY)]
    }

    const PATTERNS: &[&str] = &["a.{0,2}e", "[a-z]{2,4}", r"\b[es]{1,3}\b", "é.", "(?:가|か).{1,2}", "s[^a]{2}", r"-?1{1,2}$", "[é日]i"];

    fn check(text: &str, cuts: &[bool], rules: &[(String, Action)], more: &[(usize, Action)]) -> Result<(), TestCaseError> {
        let (mut builder, mut plain) = (MatcherBuilder::new(), Vec::new());
        for (phrase, action) in rules {
            // Phrases that cannot be used are refused by name: that is another test.
            let first = normal::normalise(phrase).chars().next();
            if first.is_some_and(|first| !normal::may_join(first)) {
                builder.phrase(phrase, *action, "test");
                plain.push(oracle::Rule { what: oracle::What::Phrase(phrase.clone()), action: *action });
            }
        }
        for (pattern, action) in more {
            let pattern = PATTERNS[pattern % PATTERNS.len()];
            builder.pattern(pattern, *action, "test");
            plain.push(oracle::Rule { what: oracle::What::Pattern(patterns::fold(pattern).unwrap()), action: *action });
        }
        let matcher = builder.build().map_err(|error| TestCaseError::fail(error.to_string()))?;
        agree(&matcher, text, cuts, &oracle::whole(&plain, text))
    }

    fn pieces<'t>(text: &'t str, cuts: &[bool]) -> Vec<&'t str> {
        let (mut pieces, mut from) = (Vec::new(), 0);
        for ((at, _), cut) in text.char_indices().zip(cuts.iter().cycle()).skip(1) {
            if *cut {
                pieces.push(&text[from..at]);
                from = at;
            }
        }
        pieces.push(&text[from..]);
        pieces
    }

    fn agree(matcher: &Matcher, text: &str, cuts: &[bool], want: &Whole) -> Result<(), TestCaseError> {
        let pieces = pieces(text, cuts);
        let said = say(matcher, pieces.iter().copied(), 0).map_err(TestCaseError::fail)?;
        prop_assert_eq!(&said.whole, want, "{:?} cut as {:?}", text, pieces);
        let said = say(matcher, [text], 0).map_err(TestCaseError::fail)?;
        prop_assert_eq!(&said.whole, want, "{:?} in one piece", text);
        Ok(())
    }

    /// A matcher, the same for the oracle, and which rule of the matcher each of the oracle's is.
    type Both = (Matcher, Vec<oracle::Rule>, Vec<usize>);

    /// All detectors, masking but for `denied`, and the same for the oracle: built once each.
    fn detectors(denied: usize) -> &'static Both {
        static BUILT: [OnceLock<Both>; 3] = [const { OnceLock::new() }; 3];
        BUILT[denied].get_or_init(|| {
            let (mut builder, mut plain, mut rules) = (MatcherBuilder::new(), Vec::new(), Vec::new());
            for (number, detector) in Detector::ALL.into_iter().enumerate() {
                let action = match (denied, detector) {
                    (1, Detector::PrivateKey | Detector::Phone) | (2, Detector::Jwt | Detector::Ip) => DENY,
                    (_, _) => MASK,
                };
                builder.detector(detector, action);
                for shape in detector.shapes() {
                    plain.push(oracle::Rule { what: oracle::What::Shape(patterns::fold(shape.pattern).unwrap(), shape), action });
                    rules.push(number);
                }
            }
            (builder.build().unwrap(), plain, rules)
        })
    }

    /// What detectors are made of, whole and in parts.
    fn shard() -> impl Strategy<Value = &'static str> {
        proptest::sample::select(vec![
            "ada",
            "the lamp was lit, ",
            "x",
            "@",
            ".",
            "-",
            " ",
            "_",
            "+",
            ":",
            ",",
            "example",
            ".com",
            ".co.uk",
            "4111 1111 1111 1111",
            "4111",
            "1111",
            "37828",
            "2246310005",
            "1",
            "0",
            "12",
            "415",
            "555-0132",
            "+49 30 901820",
            "(415) ",
            "DE89 3704 0044 0532 0130 00",
            "DE89",
            "370400440532013000",
            "gb82west12345698765432",
            "192.168.0.1",
            "10.",
            "255",
            "2001:db8",
            "::",
            "::1",
            "fe80",
            "cafe",
            "078-05-1120",
            "-05-",
            "AKIA",
            "IOSFODNN7EXAMPLE",
            "sk-",
            "proj-",
            "abcdefghij0123456789",
            "ghp_",
            "-----BEGIN PRIVATE KEY-----",
            "-----BEGIN ",
            "PRIVATE KEY-----",
            "-----END ",
            "-----",
            "MIIE+/=",
            "\n",
            "eyJhbGciOiJI",
            ".eyJzdWIiOiIx",
            "eyj",
            "\u{200b}",
            "\u{301}",
            "é",
            "４",
            "日",
        ])
    }

    /// Words, and what stands between them.
    fn word() -> impl Strategy<Value = &'static str> {
        let words = "the lamp Was lit a AKIA npm sk akiabcdefghijklmnop akiabcdefghijklmnopqrstuv Lampwaslitlampwaslit copper 7";
        let between = vec![", ", "\n", "\r\n", "; ", "(", ")", "'", "\"", "/", "_"];
        prop_oneof![
            3 => proptest::sample::select(words.split(' ').collect::<Vec<_>>()),
            2 => Just(" "),
            1 => proptest::sample::select(between),
        ]
    }

    /// All detectors and some phrases; and the same as a matcher that steps through every word.
    fn with_words_and_without() -> &'static (Matcher, Matcher) {
        static BUILT: OnceLock<(Matcher, Matcher)> = OnceLock::new();
        BUILT.get_or_init(|| {
            let build = || {
                let mut builder = MatcherBuilder::new();
                for phrase in ["the lamp", "lamp was lit", "copper", "it, a", "opp", "was\nlit"] {
                    builder.phrase(phrase, MASK, "test");
                }
                Detector::ALL.into_iter().for_each(|detector| _ = builder.detector(detector, MASK));
                builder.pattern(r"\blit [a-z]{2}\b", MASK, "test");
                builder.build().unwrap()
            };
            let (words, mut asked) = (build(), build());
            assert!(words.patterns.prose.is_some(), "what all detectors allow");
            asked.patterns.prose = None;
            (words, asked)
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 3 * ProptestConfig::default().cases, ..ProptestConfig::default() })]

        #[test]
        fn any_text_however_cut_gives_what_the_whole_text_gives(
            (text, phrases) in text(40).prop_flat_map(|text| (Just(text.clone()), prop::collection::vec((part_of(text), action()), 0..5))),
            cuts in prop::collection::vec(any::<bool>(), 1..40),
            more in prop::collection::vec((any::<usize>(), action()), 0..3),
        ) {
            check(&text, &cuts, &phrases, &more)?;
        }

        #[test]
        fn detectors_find_in_any_text_however_cut_what_they_find_in_the_whole_of_it(
            shards in prop::collection::vec(shard(), 0..14),
            cuts in prop::collection::vec(any::<bool>(), 1..40),
            denied in 0..3usize,
        ) {
            let (matcher, plain, rules) = detectors(denied);
            let text = shards.concat();
            agree(matcher, &text, &cuts, &oracle::whole_as(plain, &text, rules))?;
        }

        #[test]
        fn words_that_no_automaton_is_asked_about_are_read_as_if_one_were(
            shards in prop::collection::vec(prop_oneof![3 => word(), 1 => shard()], 0..80),
            cuts in prop::collection::vec(prop::bool::weighted(0.1), 1..200),
        ) {
            let (matcher, asked) = with_words_and_without();
            let text = shards.concat();
            let pieces = pieces(&text, &cuts);
            let said = |matcher| say(matcher, pieces.iter().copied(), 0).map_err(TestCaseError::fail);
            let (said, want) = (said(matcher)?, said(asked)?);
            prop_assert_eq!(said.whole, want.whole, "{:?} cut as {:?}", text, pieces);
            prop_assert_eq!(said.steps, want.steps, "{:?} cut as {:?}", text, pieces);
        }

        #[test]
        fn long_runs_of_marks_are_put_in_order_as_the_library_does(
            marks in prop::collection::vec(prop::sample::select(vec!['\u{301}', '\u{323}', '\u{327}', '\u{308}', '\u{345}', 'e']), 25..70),
            cuts in prop::collection::vec(any::<bool>(), 1..9),
        ) {
            let text: String = std::iter::once('e').chain(marks).collect();
            check(&text, &cuts, &[("ẹ".into(), MASK), ("e\u{327}\u{308}".into(), MASK), ("e".into(), MASK)], &[])?;
        }
    }
}

#[test]
fn no_character_becomes_invisible_or_changes_when_it_is_normalised_twice() {
    for c in ('\u{80}'..=char::MAX).filter(|c| !normal::is_invisible(*c)) {
        let (mut once, mut twice) = (String::new(), String::new());
        normal::decompose(c, |c| once.push(c));
        once.chars().for_each(|c| normal::decompose(c, |c| twice.push(c)));
        assert!(!once.is_empty() && !once.chars().any(normal::is_invisible), "{c:?}");
        assert_eq!(once, twice, "{c:?}");
        assert!(!normal::is_inert(c) || (once == c.to_string() && !normal::may_join(c)), "{c:?}");
    }
}

#[test]
fn a_pattern_without_a_check_may_have_begun_before_one_with_a_check() {
    let mut builder = MatcherBuilder::new();
    builder.pattern(r"\blit [a-z]{2}\b", MASK, "test").detector(Detector::ApiKey, MASK);
    let matcher = builder.build().unwrap();
    assert_eq!(say(&matcher, ["lit sk "], 0).unwrap().whole.masks.first(), Some(&(0..6)));
}

/// `cargo test --release -p headgate-filters speed -- --ignored --nocapture`
#[test]
#[ignore = "a measurement, not a test"]
#[expect(clippy::print_stdout, reason = "it prints what it measured")]
fn speed() {
    let mut seed = 7u64;
    let mut letter = || {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        char::from(b'a' + (seed >> 33) as u8 % 26)
    };
    let phrases: Vec<String> = (0..1000).map(|i| (0..6 + i % 9).map(|_| letter()).collect()).collect();
    let prose = "The quick brown fox jumps over the lazy dog, and then it walks 3 miles home in the rain because nobody thought of bringing \
                 an umbrella; tomorrow will surely be better than today was. ";
    let words = |prose: &'static str| -> Vec<&'static str> { prose.split_inclusive(' ').collect() };
    let accented = "Où est passé l'été dernier? Là-bas, près de la forêt, où les élèves étudiaient déjà la leçon du maître. ";
    let chinese = "今天 天气 很好， 我们 一起 去 公园 散步， 然后 回家 吃饭。 ";
    for (name, detectors, with_phrases, prose) in [
        ("1000 phrases", false, true, prose),
        ("all detectors", true, false, prose),
        ("1000 phrases and all detectors", true, true, prose),
        ("the same, French", true, true, accented),
        ("the same, Chinese", true, true, chinese),
    ] {
        let mut builder = MatcherBuilder::new();
        if with_phrases {
            phrases.iter().for_each(|phrase| _ = builder.phrase(phrase, DENY, "test"));
        }
        if detectors {
            Detector::ALL.into_iter().for_each(|detector| _ = builder.detector(detector, MASK));
        }
        let started = std::time::Instant::now();
        let matcher = builder.build().unwrap();
        let built = started.elapsed();
        let (pieces, rounds) = (words(prose), 20_000);
        let bytes: usize = pieces.iter().map(|piece| piece.len()).sum();
        let (mut scan, mut out, mut best) = (matcher.scan(), Edits::default(), f64::MAX);
        for _ in 0..5 {
            let started = std::time::Instant::now();
            for _ in 0..rounds {
                for piece in &pieces {
                    std::hint::black_box(scan.push(&matcher, piece, &mut out));
                }
            }
            best = best.min(started.elapsed().as_nanos() as f64 / rounds as f64);
        }
        assert!(out.masks.is_empty(), "the text is clean");
        println!(
            "{name}: {:.1} ns a piece of {:.1} bytes, {:.2} ns a byte, built in {built:.1?}, longest {}",
            best / pieces.len() as f64,
            bytes as f64 / pieces.len() as f64,
            best / bytes as f64,
            matcher.longest()
        );
    }
}
