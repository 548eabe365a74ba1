//! Picks the next token from the model's scores: the best one, or a chance in proportion to them.

use crate::model::softmax;
use crate::tokenizer::Id;

/// How to pick; the words and meanings are OpenAI's.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// 0 always takes the best token; 1 follows the model; more is wilder.
    pub temperature: f32,
    /// Only the likeliest tokens that together reach this share are considered; 1 considers all.
    pub top_p: f32,
    /// The same seed, prompt and numbers give the same answer.
    pub seed: u64,
}

impl Sampling {
    /// Always the best token.
    pub const GREEDY: Self = Self { temperature: 0.0, top_p: 1.0, seed: 0 };
}

#[derive(Debug)]
pub(crate) struct Sampler {
    sampling: Sampling,
    random: u64,
    likely: Vec<(Id, f32)>,
}

impl Sampler {
    pub(crate) fn new(sampling: Sampling) -> Self {
        Self { sampling, random: sampling.seed, likely: Vec::new() }
    }

    /// `logits`: one score per token; scaled in place.
    pub(crate) fn pick(&mut self, logits: &mut [f32]) -> Id {
        let Sampling { temperature, top_p, .. } = self.sampling;
        // A temperature this low is greedy in all but rounding, and dividing by it would overflow.
        if temperature < 1e-3 {
            return best(logits);
        }
        for l in logits.iter_mut() {
            *l /= temperature;
        }
        softmax(logits);
        self.likely.clear();
        self.likely.extend((0..).zip(logits.iter().copied()));
        self.likely.sort_by(|a, b| b.1.total_cmp(&a.1));
        let mut share = 0.0;
        let enough = self.likely.iter().position(|(_, p)| {
            share += p;
            share >= top_p
        });
        self.likely.truncate(enough.map_or(usize::MAX, |last| last + 1));

        let mut left = self.next_share() * self.likely.iter().map(|(_, p)| p).sum::<f32>();
        for (id, p) in &self.likely {
            left -= p;
            if left < 0.0 {
                return *id;
            }
        }
        // Rounding, or scores that are not numbers, can leave a rest.
        self.likely.first().map_or(0, |(id, _)| *id)
    }

    /// A number from 0 to below 1. SplitMix64 (Steele, Lea and Flood 2014): enough for a choice of words.
    fn next_share(&mut self) -> f32 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / (1u64 << 24) as f32
    }
}

/// The first of the best.
fn best(logits: &[f32]) -> Id {
    let mut best = (0, f32::NEG_INFINITY);
    for (id, &score) in (0..).zip(logits) {
        if score > best.1 {
            best = (id, score);
        }
    }
    best.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picks(sampling: Sampling, logits: &[f32], n: usize) -> Vec<Id> {
        let mut sampler = Sampler::new(sampling);
        (0..n).map(|_| sampler.pick(&mut logits.to_vec())).collect()
    }

    #[test]
    fn greedy_takes_the_first_of_the_best() {
        assert_eq!(picks(Sampling::GREEDY, &[0.0, 2.0, 2.0, -1.0], 1), [1]);
    }

    #[test]
    fn a_seed_fixes_the_choice_and_another_seed_changes_it() {
        let logits = [0.3, 0.2, 0.1, 0.0];
        let with = |seed| picks(Sampling { temperature: 1.0, top_p: 1.0, seed }, &logits, 50);
        assert_eq!(with(7), with(7));
        assert_ne!(with(7), with(8));
    }

    #[test]
    fn choices_follow_the_scores() {
        let logits = [3f32.ln(), 0.0];
        let zeros = picks(Sampling { temperature: 1.0, top_p: 1.0, seed: 1 }, &logits, 10_000).iter().filter(|id| **id == 0).count();
        assert!((7_350..7_650).contains(&zeros), "three quarters expected, {zeros} of 10,000 found");
    }

    #[test]
    fn top_p_leaves_out_the_unlikely() {
        let logits = [0.6f32.ln(), 0.3f32.ln(), 0.1f32.ln()];
        let with = |top_p| picks(Sampling { temperature: 1.0, top_p, seed: 3 }, &logits, 1_000);
        assert!(with(0.5).iter().all(|id| *id == 0));
        assert!(with(0.85).iter().all(|id| *id < 2));
        assert!(with(1.0).contains(&2));
    }

    #[test]
    fn scores_that_are_not_numbers_still_give_a_token() {
        assert_eq!(picks(Sampling::GREEDY, &[f32::NAN, f32::NAN], 1), [0]);
        assert!(picks(Sampling { temperature: 1.0, top_p: 0.9, seed: 0 }, &[f32::NAN, 1.0], 9).iter().all(|id| *id < 2));
    }
}
