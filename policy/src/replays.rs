//! Remembers the verdicts already used, for as long as they could be used again.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashSet},
    fmt,
    sync::{Mutex, PoisonError},
};

use crate::Jti;

/// Whether a verdict's number was seen before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// No: this is its one use.
    First,
    /// Yes.
    Again,
    /// It cannot be told, because the store is full or away. Treated as a replay, under its own name.
    Unknown,
}

/// The used verdicts of this process, with a bound.
///
/// About 64 bytes per number held; a number is held for its verdict's life plus twice the leeway, so a capacity of 65,536
/// serves 900 dispatches a second. Several orchestrators need one shared store: see [`crate::Unspent::settle`].
pub struct Replays {
    capacity: usize,
    seen: Mutex<Seen>,
}

#[derive(Default)]
struct Seen {
    numbers: HashSet<Jti>,
    by_end: BinaryHeap<Reverse<(u64, Jti)>>,
}

impl Replays {
    /// An empty memory of at most `capacity` numbers.
    pub fn new(capacity: usize) -> Replays {
        Replays { capacity, seen: Mutex::default() }
    }

    /// Uses `jti` up, and remembers it until `until` has passed.
    ///
    /// When full of numbers that still matter it answers [`Use::Unknown`]: forgetting one early would open the door it guards.
    /// Work: logarithmic, amortised over the numbers forgotten.
    pub fn spend(&self, jti: Jti, until: u64, now: u64) -> Use {
        // A poisoned lock guards whole data: both collections are changed by calls that do not panic in between.
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some(&Reverse((end, old))) = seen.by_end.peek() {
            if end >= now {
                break;
            }
            seen.by_end.pop();
            seen.numbers.remove(&old);
        }
        if seen.numbers.contains(&jti) {
            return Use::Again;
        }
        if seen.numbers.len() >= self.capacity {
            return Use::Unknown;
        }
        seen.numbers.insert(jti);
        seen.by_end.push(Reverse((until, jti)));
        Use::First
    }

    /// How many numbers are held now; those past their end are forgotten at the next use.
    pub fn held(&self) -> usize {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).numbers.len()
    }
}

impl fmt::Debug for Replays {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Replays").field("capacity", &self.capacity).field("held", &self.held()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_used_once_until_its_end_has_passed() {
        let (replays, jti) = (Replays::new(4), Jti::fresh().unwrap());
        assert_eq!(replays.spend(jti, 100, 40), Use::First);
        assert_eq!(replays.spend(jti, 100, 40), Use::Again);
        assert_eq!(replays.spend(jti, 100, 100), Use::Again);
        assert_eq!(replays.spend(jti, 200, 101), Use::First);
    }

    #[test]
    fn a_full_memory_forgets_nothing_that_matters() {
        let replays = Replays::new(2);
        let [a, b, c] = [(); 3].map(|()| Jti::fresh().unwrap());
        assert_eq!(replays.spend(a, 100, 40), Use::First);
        assert_eq!(replays.spend(b, 110, 40), Use::First);
        assert_eq!(replays.spend(c, 110, 40), Use::Unknown);
        assert_eq!(replays.spend(a, 100, 41), Use::Again);
        assert_eq!(replays.held(), 2);
        assert_eq!(replays.spend(c, 170, 101), Use::First);
        assert_eq!(replays.spend(b, 110, 101), Use::Again);
        assert_eq!(replays.held(), 2);
    }

    #[test]
    fn of_many_who_use_a_number_at_once_one_is_first() {
        let (replays, jti) = (Replays::new(4), Jti::fresh().unwrap());
        let first = std::thread::scope(|scope| {
            let runs: Vec<_> = (0..8).map(|_| scope.spawn(|| replays.spend(jti, 100, 40))).collect();
            runs.into_iter().map(|run| run.join().unwrap()).filter(|&used| used == Use::First).count()
        });
        assert_eq!(first, 1);
    }
}
