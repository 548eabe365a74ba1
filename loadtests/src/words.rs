//! Numbers as words: what is counted travels inside the text, so that it survives filters and re-encoding.
//!
//! Only consonants in upper case: no detector begins a match at them (digits would look like phone numbers and cards, `AKIA`
//! like a key), and the filler around them, in lower case, cannot be taken for them.

/// Letters of a word: four for the stream, six for the event.
pub(crate) const LEN: usize = 10;
/// Streams that can be told apart.
#[cfg(test)]
pub(crate) const STREAMS: usize = 1 << 16;
/// Events that can be told apart in one stream.
pub(crate) const EVENTS: u32 = 1 << 24;

const LETTERS: &[u8; 16] = b"BCDFGHJLMNPQRSTV";

/// Which event of which stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Word {
    pub(crate) stream: u16,
    /// Below [`EVENTS`].
    pub(crate) index: u32,
}

impl Word {
    pub(crate) fn letters(self) -> [u8; LEN] {
        let bits = u64::from(self.stream) << 24 | u64::from(self.index % EVENTS);
        let mut word = [0; LEN];
        for (at, letter) in word.iter_mut().enumerate() {
            let nibble = bits >> (4 * (LEN - 1 - at)) & 0xf;
            *letter = LETTERS[nibble as usize];
        }
        word
    }

    fn of(letters: &[u8; LEN]) -> Option<Word> {
        let mut bits = 0_u64;
        for &letter in letters {
            bits = bits << 4 | u64::from(digit(letter)?);
        }
        Some(Word { stream: (bits >> 24) as u16, index: (bits & 0xff_ffff) as u32 })
    }

    /// The first whole word in some text.
    pub(crate) fn find(text: &[u8]) -> Option<Word> {
        text.windows(LEN).find_map(|window| Word::of(window.try_into().ok()?))
    }
}

fn digit(letter: u8) -> Option<u8> {
    const DIGITS: [u8; 256] = {
        let mut digits = [0xff; 256];
        let mut at = 0;
        while at < LETTERS.len() {
            digits[LETTERS[at] as usize] = at as u8;
            at += 1;
        }
        digits
    };
    let digit = DIGITS[usize::from(letter)];
    (digit != 0xff).then_some(digit)
}

/// Picks words out of text that comes in pieces, cut anywhere.
#[derive(Debug, Default)]
pub(crate) struct Listener {
    letters: [u8; LEN],
    len: usize,
}

/// Text with letters of a word, but no whole one.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Broken;

impl Listener {
    pub(crate) fn hear(&mut self, text: &[u8], mut word: impl FnMut(Word)) -> Result<(), Broken> {
        for &byte in text {
            if digit(byte).is_none() {
                if self.len != 0 {
                    return Err(Broken);
                }
                continue;
            }
            self.letters[self.len] = byte;
            self.len += 1;
            if self.len == LEN {
                self.len = 0;
                word(Word::of(&self.letters).ok_or(Broken)?);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_come_back_however_the_text_is_cut() {
        let words = [(0, 0), (1, 2), (u16::MAX, EVENTS - 1), (9_000, 123_456)].map(|(stream, index)| Word { stream, index });
        let text: Vec<u8> = words.iter().flat_map(|word| [b" filler ".as_slice(), &word.letters(), b" "].concat()).collect();
        for size in 1..text.len() {
            let (mut listener, mut heard) = (Listener::default(), Vec::new());
            for piece in text.chunks(size) {
                listener.hear(piece, |word| heard.push(word)).unwrap();
            }
            assert_eq!(heard, words);
        }
    }

    #[test]
    fn a_word_with_a_letter_missing_is_noticed() {
        let word = Word { stream: 3, index: 4 }.letters();
        let text = [&word[1..], b" "].concat();
        assert_eq!(Listener::default().hear(&text, |_| unreachable!("no whole word")), Err(Broken));
    }

    #[test]
    fn a_word_is_found_in_a_request() {
        let word = Word { stream: 513, index: 77 };
        let body = [br#"{"messages":[{"role":"user","content":"tell "#.as_slice(), &word.letters(), b" please\"}]}"].concat();
        assert_eq!(Word::find(&body), Some(word));
        assert_eq!(Word::find(b"nothing BCDFG here"), None);
    }
}
