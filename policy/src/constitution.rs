//! Turns the document of principles into clauses, and everything that decides into one hash.
//!
//! The hash is SHA-256 over the RFC 8785 canonical JSON of `{clauses, models, patterns, thresholds}`. It changes when what is
//! decided may change, and only then: not with the order in which patterns are listed, and not with white space. Precisely,
//! within a clause every run of white space counts as one space, blank lines and line ends included, and a byte order mark is
//! skipped. Every other character counts; nothing is normalised, so that the hash never calls two texts equal that a reader
//! could tell apart.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    fmt,
};

use serde::Serialize;

use crate::Digest;

const MAX_DOCUMENT_BYTES: usize = 256 * 1024;
const MAX_CLAUSES: usize = 1000;

/// The principles in force and the settings that apply them.
#[derive(Clone, PartialEq, Serialize)]
pub struct Constitution {
    clauses: Vec<Clause>,
    models: BTreeSet<String>,
    patterns: BTreeMap<String, BTreeSet<String>>,
    thresholds: BTreeMap<String, f64>,
}

/// One principle.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Clause {
    /// Its name in findings and logs: `2.1`, `privacy`, `privacy.3`.
    pub id: String,
    /// Its heading without the number; empty for a numbered paragraph.
    pub title: String,
    /// Its text, every run of white space one space.
    pub text: String,
}

impl Constitution {
    /// Reads a Markdown document; its headings (`## Privacy`) and numbered paragraphs (`1. Never ...`) are its clauses.
    ///
    /// A heading's id is its number (`## 2.1 Names` is `2.1`) or its words (`privacy`). A numbered paragraph's id is its
    /// number as written, after the id of the heading above it: `privacy.3`. A heading of the first level is the document's
    /// title and goes before nothing. Text ahead of all clauses is the clause `preamble`. A heading or number may be indented
    /// by three spaces at most; inside a fenced block there are none.
    pub fn from_markdown(document: &str) -> Result<Constitution, NotAConstitution> {
        if document.len() > MAX_DOCUMENT_BYTES {
            return Err(NotAConstitution::TooLarge);
        }
        let document = document.strip_prefix('\u{feff}').unwrap_or(document);
        let (mut clauses, mut ids) = (Vec::<Clause>::new(), HashSet::new());
        let mut open = |clauses: &mut Vec<Clause>, line: usize, id: String, title: &str, text: &str| {
            if !ids.insert(id.clone()) {
                return Err(NotAConstitution::Repeated { id, line });
            }
            if clauses.len() >= MAX_CLAUSES {
                return Err(NotAConstitution::TooMany);
            }
            clauses.push(Clause { id, title: collapse(title), text: collapse(text) });
            Ok(())
        };
        let (mut section, mut fence) = (String::new(), None);
        for (line, text) in (1..).zip(document.lines()) {
            match Line::read(text, &mut fence) {
                Line::Heading { level, title } => {
                    let (id, title) = name(title).ok_or(NotAConstitution::Nameless { line })?;
                    section = if level == 1 { String::new() } else { id.clone() };
                    open(&mut clauses, line, id, title, "")?;
                }
                Line::Numbered { number, text } => {
                    let id = if section.is_empty() { number.to_owned() } else { format!("{section}.{number}") };
                    open(&mut clauses, line, id, "", text)?;
                }
                Line::Text(text) => match clauses.last_mut() {
                    Some(clause) => {
                        for word in text.split_whitespace() {
                            append(&mut clause.text, word);
                        }
                    }
                    None if text.trim().is_empty() => {}
                    None => open(&mut clauses, line, "preamble".into(), "", text)?,
                },
            }
        }
        if clauses.is_empty() {
            return Err(NotAConstitution::Empty);
        }
        Ok(Constitution { clauses, models: BTreeSet::new(), patterns: BTreeMap::new(), thresholds: BTreeMap::new() })
    }

    /// Adds a model that judges, by an id that pins its weights.
    pub fn with_model(mut self, id: &str) -> Constitution {
        self.models.insert(id.to_owned());
        self
    }

    /// Adds patterns to the list called `name`. Order and repetition do not count.
    pub fn with_patterns<P: Into<String>>(mut self, name: &str, patterns: impl IntoIterator<Item = P>) -> Constitution {
        self.patterns.entry(name.to_owned()).or_default().extend(patterns.into_iter().map(Into::into));
        self
    }

    /// Sets the threshold called `name`. Errors: [`NotAConstitution::Threshold`] if it is no finite number.
    pub fn with_threshold(mut self, name: &str, value: f64) -> Result<Constitution, NotAConstitution> {
        if !value.is_finite() {
            return Err(NotAConstitution::Threshold { name: name.to_owned() });
        }
        self.thresholds.insert(name.to_owned(), value);
        Ok(self)
    }

    /// The clauses, in the order of the document.
    pub fn clauses(&self) -> &[Clause] {
        &self.clauses
    }

    /// The bytes that are hashed: RFC 8785 canonical JSON, for publication and for others who compute the hash.
    pub fn canonical(&self) -> Vec<u8> {
        serde_json_canonicalizer::to_vec(self).expect("strings and finite numbers always have a canonical form")
    }

    /// The hash, as in `Constitution-Hash`; [`Digest::short`] for logs. Work: serialises everything; compute it once per plan.
    pub fn hash(&self) -> Digest {
        Digest::of(&self.canonical())
    }
}

impl fmt::Debug for Constitution {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Pattern lists can hold what must not be said, or a tenant's secrets.
        f.debug_struct("Constitution").field("hash", &self.hash()).field("clauses", &self.clauses.len()).finish()
    }
}

/// Why a document is not a constitution.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotAConstitution {
    /// Too large.
    #[error("constitution exceeds {MAX_DOCUMENT_BYTES} bytes")]
    TooLarge,
    /// It says nothing.
    #[error("constitution has no clauses: expected headings or numbered paragraphs")]
    Empty,
    /// Too many clauses.
    #[error("constitution has more than {MAX_CLAUSES} clauses")]
    TooMany,
    /// Two clauses of one name: findings could not tell them apart.
    #[error("constitution line {line}: clause {id} appears twice, give it another number or heading")]
    Repeated {
        /// The name.
        id: String,
        /// The line of the second, counted from 1.
        line: usize,
    },
    /// A heading without a letter or digit.
    #[error("constitution line {line}: the heading has no words")]
    Nameless {
        /// Counted from 1.
        line: usize,
    },
    /// A threshold that is not a number.
    #[error("threshold {name} is not a finite number")]
    Threshold {
        /// Which.
        name: String,
    },
}

/// What a line of Markdown is to us.
enum Line<'a> {
    Heading { level: usize, title: &'a str },
    Numbered { number: &'a str, text: &'a str },
    Text(&'a str),
}

impl<'a> Line<'a> {
    /// `fence`: the mark that opened the fenced block this line is in, if it is in one.
    fn read(line: &'a str, fence: &mut Option<&'a str>) -> Line<'a> {
        let text = line.trim_start_matches(' ');
        if line.len() - text.len() > 3 {
            return Line::Text(line);
        }
        if let Some(open) = *fence {
            // CommonMark 4.5: closed by a run of the same mark, at least as long, with nothing after it.
            if text.starts_with(open) && text.trim_end().trim_start_matches(&open[..1]).is_empty() {
                *fence = None;
            }
            return Line::Text(line);
        }
        for mark in ["`", "~"] {
            let run = text.len() - text.trim_start_matches(mark).len();
            if run >= 3 {
                *fence = Some(&text[..run]);
                return Line::Text(line);
            }
        }
        let title = text.trim_start_matches('#');
        let level = text.len() - title.len();
        if (1..=6).contains(&level) && title.chars().next().is_none_or(char::is_whitespace) {
            return Line::Heading { level, title };
        }
        let rest = text.trim_start_matches(|c: char| c.is_ascii_digit());
        let number = &text[..text.len() - rest.len()];
        // CommonMark 5.2: at most nine digits.
        if let Some(text) = rest.strip_prefix(['.', ')'])
            && (1..=9).contains(&number.len())
            && text.starts_with(char::is_whitespace)
        {
            return Line::Numbered { number, text };
        }
        Line::Text(line)
    }
}

/// A heading's id and the title that is left: its number and the rest, or its words and all of it.
fn name(heading: &str) -> Option<(String, &str)> {
    let heading = heading.trim();
    let (first, rest) = heading.split_once(char::is_whitespace).unwrap_or((heading, ""));
    let number = first.strip_suffix(['.', ')']).unwrap_or(first);
    if number.split('.').all(|part| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit())) {
        return Some((number.to_owned(), rest));
    }
    let words = heading.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty());
    let id = words.map(str::to_lowercase).collect::<Vec<_>>().join("-");
    (!id.is_empty()).then_some((id, heading))
}

fn collapse(text: &str) -> String {
    let mut collapsed = String::with_capacity(text.len());
    for word in text.split_whitespace() {
        append(&mut collapsed, word);
    }
    collapsed
}

fn append(text: &mut String, word: &str) {
    if !text.is_empty() {
        text.push(' ');
    }
    text.push_str(word);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DOCUMENT: &str = "\
Why we have this.

# Constitution

## 1. Safety
Never help to hurt.

1. Not by words.
2) Nor by
   code.

## Privacy & Names

Names stay here.
1. Never repeat a secret.

```
# not a heading
9. not a clause
```
";

    fn read(document: &str) -> Constitution {
        Constitution::from_markdown(document).unwrap()
    }

    fn ids(document: &str) -> Vec<String> {
        read(document).clauses().iter().map(|clause| clause.id.clone()).collect()
    }

    #[test]
    fn headings_and_numbered_paragraphs_are_clauses() {
        let constitution = read(DOCUMENT);
        let clauses: Vec<_> = constitution.clauses().iter().map(|c| (c.id.as_str(), c.title.as_str(), c.text.as_str())).collect();
        assert_eq!(
            clauses,
            [
                ("preamble", "", "Why we have this."),
                ("constitution", "Constitution", ""),
                ("1", "Safety", "Never help to hurt."),
                ("1.1", "", "Not by words."),
                ("1.2", "", "Nor by code."),
                ("privacy-names", "Privacy & Names", "Names stay here."),
                ("privacy-names.1", "", "Never repeat a secret. ``` # not a heading 9. not a clause ```"),
            ]
        );
    }

    #[test]
    fn numbers_under_the_title_stand_alone() {
        assert_eq!(ids("# Title\n1. a\n2. b\n## 3.1 c\n### d\n1. e"), ["title", "1", "2", "3.1", "d", "d.1"]);
        assert_eq!(ids("1. 2024. was a year\n2024 too\n12.5 percent\n    7. indented"), ["1"]);
        assert_eq!(ids("#hashtag\n####### seven"), ["preamble"]);
    }

    #[test]
    fn a_fence_ends_with_its_own_mark_only() {
        assert_eq!(ids("1. a\n~~~~\n```\n2. b\n~~~\n3. c\n~~~~\n4. d"), ["1", "4"]);
        assert_eq!(ids("1. a\n```rust\n2. b\n``` x\n3. c\n  ````\n4. d"), ["1", "4"]);
    }

    #[test]
    fn a_document_that_cannot_be_cited_is_refused() {
        let refused = |document: &str| Constitution::from_markdown(document).unwrap_err();
        assert_eq!(refused(" \n\n"), NotAConstitution::Empty);
        assert_eq!(refused("1. a\n\n1. b"), NotAConstitution::Repeated { id: "1".into(), line: 3 });
        assert_eq!(refused("## A\n## a!"), NotAConstitution::Repeated { id: "a".into(), line: 2 });
        assert_eq!(refused("x\n## !!"), NotAConstitution::Nameless { line: 2 });
        assert_eq!(refused("##"), NotAConstitution::Nameless { line: 1 });
        assert_eq!(refused(&"x".repeat(MAX_DOCUMENT_BYTES + 1)), NotAConstitution::TooLarge);
        let many: String = (0..=MAX_CLAUSES).map(|n| format!("{n}. x\n")).collect();
        assert_eq!(refused(&many), NotAConstitution::TooMany);
        assert_eq!(read("1. a").with_threshold("t", f64::NAN).unwrap_err(), NotAConstitution::Threshold { name: "t".into() });
    }

    #[test]
    fn the_hash_is_over_the_published_bytes() {
        let constitution =
            read("1. Be kind.").with_model("m-1").with_patterns("deny", ["b", "a"]).with_threshold("toxicity", 0.80).unwrap();
        let json = r#"{"clauses":[{"id":"1","text":"Be kind.","title":""}],"models":["m-1"],"patterns":{"deny":["a","b"]},"thresholds":{"toxicity":0.8}}"#;
        assert_eq!(String::from_utf8(constitution.canonical()).unwrap(), json);
        assert_eq!(constitution.hash(), Digest::of(json.as_bytes()));
        assert!(constitution.hash().short().starts_with("sha-256:"));
        assert!(!format!("{constitution:?}").contains("kind"));
    }

    #[test]
    fn everything_that_decides_is_in_the_hash() {
        let base = || read("1. Be kind.");
        let hashes = [
            base(),
            read("1. Be kinder."),
            read("2. Be kind."),
            read("# Be kind."),
            base().with_model("m"),
            base().with_patterns("m", ["x"]),
            base().with_patterns("m", [""; 0]),
            base().with_patterns("m", ["x y"]),
            base().with_patterns("m", ["x", "y"]),
            base().with_threshold("m", 0.5).unwrap(),
            base().with_threshold("m", 0.25).unwrap(),
        ];
        assert_eq!(hashes.iter().map(Constitution::hash).collect::<HashSet<_>>().len(), hashes.len());
        assert_eq!(base().with_patterns("m", ["x", "y", "x"]).hash(), base().with_patterns("m", ["y"]).with_patterns("m", ["x"]).hash());
    }

    #[test]
    fn line_ends_and_a_byte_order_mark_do_not_matter() {
        let windows = format!("\u{feff}{}", DOCUMENT.replace('\n', "\r\n"));
        assert_eq!(read(&windows).hash(), read(DOCUMENT).hash());
        assert_eq!(read("1. a b\u{a0}c\n\n\nd").hash(), read("1. a\tb c d").hash());
    }

    #[test]
    fn canonical_json_is_that_of_rfc_8785() {
        let canonical =
            |json: &str| serde_json_canonicalizer::to_string(&serde_json::from_str::<serde_json::Value>(json).unwrap()).unwrap();
        // Section 3.2.2.
        assert_eq!(
            canonical(
                r#"{"numbers": [333333333.33333329, 1E30, 4.50, 2e-3, 0.000000000000000000000000001],
                    "string": "\u20ac$\u000F\u000aA'\u0042\u0022\u005c\\\"\/", "literals": [null, true, false]}"#
            ),
            r#"{"literals":[null,true,false],"numbers":[333333333.3333333,1e+30,4.5,0.002,1e-27],"string":"€$\u000f\nA'B\"\\\\\"/"}"#
        );
        // Section 3.2.3: by UTF-16 code units, which puts the emoji before the Hebrew letter.
        assert_eq!(
            canonical(r#"{"\u20ac":1,"\r":2,"\ufb33":3,"1":4,"\ud83d\ude00":5,"\u0080":6,"\u00f6":7}"#),
            "{\"\\r\":2,\"1\":4,\"\u{80}\":6,\"ö\":7,\"€\":1,\"😀\":5,\"\u{fb33}\":3}"
        );
        // Appendix B.
        for (bits, text) in [
            (0x0000_0000_0000_0000_u64, "0"),
            (0x8000_0000_0000_0000, "0"),
            (0x0000_0000_0000_0001, "5e-324"),
            (0x7fef_ffff_ffff_ffff, "1.7976931348623157e+308"),
            (0x4340_0000_0000_0000, "9007199254740992"),
            (0x44b5_2d02_c7e1_4af6, "1e+23"),
            (0x444b_1ae4_d6e2_ef50, "1e+21"),
            (0x41b3_de43_5555_5555, "333333333.3333333"),
        ] {
            assert_eq!(serde_json_canonicalizer::to_string(&f64::from_bits(bits)).unwrap(), text);
        }
    }

    proptest! {
        #[test]
        fn white_space_within_a_clause_does_not_matter(words in prop::collection::vec("[a-zA-Zäß.,!-]{1,8}", 1..20), gaps in prop::collection::vec("[ \t\n]{1,4}", 20)) {
            let spaced: String = words.iter().zip(&gaps).map(|(word, gap)| format!("{word}{gap}")).collect();
            prop_assert_eq!(read(&format!("1. {spaced}")).hash(), read(&format!("1. {}", words.join(" "))).hash());
        }

        #[test]
        fn every_other_change_matters(words in prop::collection::vec("[a-z]{1,8}", 1..20), at in any::<prop::sample::Index>(), to in "[a-z]{1,8}") {
            let mut changed = words.clone();
            *at.get_mut(&mut changed) = to;
            let same = changed == words;
            prop_assert_eq!(read(&format!("1. {}", changed.join(" "))).hash() == read(&format!("1. {}", words.join(" "))).hash(), same);
        }

        #[test]
        fn reading_never_panics(document in "(#|1\\.|```|~~~| |\n|\\PC){0,60}") {
            if let Ok(constitution) = Constitution::from_markdown(&document) {
                constitution.hash();
            }
        }
    }
}
