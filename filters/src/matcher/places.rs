//! Where the normalised bytes came from: a short memory, as long as the longest phrase.

use std::collections::VecDeque;

/// Maps a position in the normalised text to the start of the original character it came from.
#[derive(Default)]
pub(super) struct Places {
    /// In order of position. A run of ASCII is one stretch, any other character is one each.
    stretches: VecDeque<Stretch>,
}

struct Stretch {
    /// First normalised byte.
    from: u64,
    /// The original byte it came from.
    start: u64,
    /// Byte for byte, or all of it from the one character at `start`.
    even: bool,
}

impl Places {
    /// ASCII follows: from here on each normalised byte is one original byte.
    pub(super) fn ascii(&mut self, at: u64, start: u64, memory: usize) {
        match self.stretches.back() {
            Some(last) if last.even && at - last.from == start - last.start => {}
            Some(_) | None => self.push(Stretch { from: at, start, even: true }, memory),
        }
    }

    /// A character that is not ASCII follows, or a part of one.
    pub(super) fn character(&mut self, at: u64, start: u64, memory: usize) {
        self.push(Stretch { from: at, start, even: false }, memory);
    }

    fn push(&mut self, stretch: Stretch, memory: usize) {
        // A stretch is forgotten when all of it lies further back than any match can begin: so at most `memory + 1` are kept.
        while self.stretches.get(1).is_some_and(|second| second.from + memory as u64 <= stretch.from) {
            self.stretches.pop_front();
        }
        self.stretches.push_back(stretch);
    }

    /// The start of the original character from which normalised byte `at` came.
    pub(super) fn start(&self, at: u64) -> u64 {
        let found = self.stretches.iter().rev().find(|stretch| stretch.from <= at);
        debug_assert!(found.is_some(), "a match begins within the longest phrase");
        found.map_or(0, |stretch| if stretch.even { stretch.start + (at - stretch.from) } else { stretch.start })
    }
}
