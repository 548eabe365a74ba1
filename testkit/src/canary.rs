//! Words that must not turn up where they have no business: a canary for each kind of text and secret.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;

use base64::Engine;
use base64::engine::general_purpose::STANDARD_NO_PAD;

/// A run of this many bytes of a canary counts as the canary: logs cut long values.
const TELLING_BYTES: usize = 12;

/// One canary for each thing Headgate must keep to itself. New ones for every test, so that no test finds another's.
#[derive(Clone)]
pub struct Canaries {
    /// To be said in a prompt.
    pub prompt: String,
    /// To be said by a model.
    pub answer: String,
    /// To be used as a client's token.
    pub token: String,
    /// To be used as a key of ours: towards a model, for signing, in a config.
    pub key: String,
}

impl Default for Canaries {
    fn default() -> Canaries {
        Canaries::new()
    }
}

impl Canaries {
    /// Four words nobody has ever said.
    pub fn new() -> Canaries {
        let word = |kind: &str| {
            let random = || RandomState::new().hash_one(kind);
            // Letters and digits only: no escaping in JSON, URLs, headers or logs can hide one.
            format!("canary{kind}{:016x}{:016x}", random(), random())
        };
        Canaries { prompt: word("prompt"), answer: word("answer"), token: word("token"), key: word("key") }
    }

    /// Panics if any canary is in any haystack: as it is, cut, in other letter case, in hex, or inside something in base64.
    ///
    /// `haystacks`: a name for the sentence, and the text: logs, metrics, traces, `Debug` output, records.
    pub fn assert_absent<'a>(&self, haystacks: impl IntoIterator<Item = (&'a str, &'a str)>) {
        let words = [("prompt", &self.prompt), ("answer", &self.answer), ("token", &self.token), ("key", &self.key)];
        for (place, text) in haystacks {
            let lower = text.to_ascii_lowercase();
            for (kind, word) in words {
                if let Some(form) = found(word, text, &lower) {
                    panic!("the {kind} is in {place}, {form}");
                }
            }
        }
    }
}

/// In which form `word` is in `text`, whose lower case is `lower`.
fn found(word: &str, text: &str, lower: &str) -> Option<&'static str> {
    // What is the same in every canary tells nothing: the random part begins after the letters of its kind.
    let random = &word[word.len() - 32..];
    let windows = (0..=random.len() - TELLING_BYTES).map(|at| &random[at..at + TELLING_BYTES]);
    for window in windows {
        if lower.contains(window) {
            return Some("in plain");
        }
        let hex: String = window.bytes().map(|byte| format!("{byte:02x}")).collect();
        if lower.contains(&hex) {
            return Some("in hex");
        }
        // Twelve bytes are four whole groups of base64 wherever one begins, and every third window begins one.
        if text.contains(&STANDARD_NO_PAD.encode(window)) {
            return Some("in base64");
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn caught(canaries: &Canaries, text: &str) -> bool {
        std::panic::catch_unwind(|| canaries.assert_absent([("a log", text)])).is_err()
    }

    #[test]
    fn a_canary_is_found_in_every_disguise() {
        let canaries = Canaries::new();
        for word in [&canaries.prompt, &canaries.answer, &canaries.token, &canaries.key] {
            let hex: String = word.bytes().map(|byte| format!("{byte:02X}")).collect();
            let cut = &word[..word.len() - 18];
            for text in [word.clone(), format!("msg=\"{word}\""), word.to_uppercase(), cut.to_owned(), hex] {
                assert!(caught(&canaries, &text), "{text}");
            }
            for before in ["", "a", "ab"] {
                let wrapped = STANDARD_NO_PAD.encode(format!("{before}{{\"text\":\"{word}\"}}"));
                assert!(caught(&canaries, &wrapped), "{wrapped}");
            }
        }
    }

    #[test]
    fn other_text_is_let_alone() {
        let canaries = Canaries::new();
        let other = Canaries::new();
        canaries.assert_absent([("nothing", ""), ("a log", "canaryprompt canaryanswer"), ("another's", other.prompt.as_str())]);
    }
}
