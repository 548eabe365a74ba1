//! Any text, cut anywhere, against what the oracle finds in the whole of it: the body of the fuzz target `matcher`.

use super::{Action, Edits, MatcherBuilder, oracle};

/// `data`: how many rules; then each rule as action, length and text; then the cuts, two bytes; the rest is the lane's text.
pub(crate) fn check(data: &[u8]) {
    let Some((&count, mut rest)) = data.split_first() else { return };
    let (mut builder, mut rules) = (MatcherBuilder::new(), Vec::new());
    for _ in 0..count % 5 {
        let [kind, length, ..] = *rest else { return };
        let Some((phrase, later)) = rest[2..].split_at_checked(usize::from(length % 12)) else { return };
        rest = later;
        let action = if kind & 1 == 0 { Action::Mask } else { Action::Deny };
        let phrase = String::from_utf8_lossy(phrase).into_owned();
        // A phrase that cannot be used is refused when it is built: leave it out.
        if MatcherBuilder::new().phrase(phrase.clone(), action, "fuzz").build().is_ok() {
            builder.phrase(phrase.clone(), action, "fuzz");
            rules.push(oracle::Rule { what: oracle::What::Phrase(phrase), action });
        }
    }
    let [low, high, ref text @ ..] = *rest else { return };
    let (cuts, text) = (u16::from_le_bytes([low, high]), String::from_utf8_lossy(text));
    let Ok(matcher) = builder.build() else { panic!("each phrase can be built alone, so all can") };

    let (mut scan, mut out, mut masks, mut cleared, mut from) = (matcher.scan(), Edits::default(), Vec::new(), 0, 0);
    let mut cut = None;
    let ends = text.char_indices().enumerate().skip(1).filter(|(i, _)| cuts >> (i % 16) & 1 == 1).map(|(_, (at, _))| at);
    for end in ends.chain([text.len(), text.len()]).map(Some).chain([None]) {
        let progress = match end {
            Some(end) => scan.push(&matcher, &text[std::mem::replace(&mut from, end)..end], &mut out),
            None => scan.finish(&matcher, &mut out),
        };
        assert!(progress.cleared >= cleared && text.is_char_boundary(progress.cleared as usize));
        assert!(from as u64 - progress.cleared <= matcher.longest() as u64);
        cleared = progress.cleared;
        cut = progress.cut.then_some(cleared);
    }
    for mask in &out.masks {
        match masks.last_mut() {
            Some(std::ops::Range { end, .. }) if !mask.first && *end == mask.range.start => *end = mask.range.end,
            _ => masks.push(mask.range.clone()),
        }
    }
    // Text stretched by very many invisible characters is masked on the way: the oracle knows nothing of that.
    if !out.hits.iter().any(|hit| hit.rule.0 as usize == matcher.rules().len() - 1) {
        let want = oracle::whole(&rules, &text);
        assert_eq!((masks, cut), (want.masks, want.cut));
    }
}

#[test]
fn the_fuzz_target_reads_its_input_and_agrees_with_the_oracle() {
    let mut data = b"\x02\x00\x03abc\x01\x04bcde".to_vec();
    for cuts in [0u16, 1, 0b10_1010, u16::MAX] {
        data.truncate(12);
        data.extend(cuts.to_le_bytes());
        data.extend("xABc ab\u{200b}cd bcbcde!".as_bytes());
        check(&data);
    }
}
