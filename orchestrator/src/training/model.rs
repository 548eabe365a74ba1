//! Many lives of a lock, told step by step: two admins, two orchestrators, verdicts that come late or never, a store that forgets.
//!
//! The locks and the fences are the real ones; what is modelled is the world between them. Between any two steps of one party any
//! step of another may come, and any time may pass. A failure names its seed.

use std::time::Duration;

use futures_util::FutureExt;
use headgate_store::{Acquired, Fenced, Locks};
use tokio::time::advance;

use super::{Fences, Weighed};

const TTL: Duration = Duration::from_secs(60);
const LIVES: u64 = 200_000;
const STEPS: usize = 40;

/// How far an admin has come.
#[derive(Debug, Clone)]
enum Admin {
    Idle,
    Taken(String),
    Recorded(String, u64),
    Held(String, u64),
}

/// A verdict on its way.
#[derive(Debug, Clone, Copy)]
enum Verdict {
    Sent(u64),
    /// An orchestrator has seen that the lock is held with it, and has not acted yet.
    Checked(u64, usize),
}

/// What an orchestrator acted upon, in order, and whether it weighs fences.
struct World {
    locks: Locks,
    records: u64,
    admins: [Admin; 2],
    fences: [Fences; 2],
    verdicts: Vec<Verdict>,
    accepted: [Vec<u64>; 2],
    sessions: u64,
}

struct Dice(u64);

impl Dice {
    /// xorshift64*
    fn below(&mut self, most: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) as usize % most
    }
}

/// What the locks of one process answer at once.
fn now<T>(answer: impl Future<Output = T>) -> T {
    answer.now_or_never().expect("locks of this process keep nobody waiting")
}

impl World {
    async fn step(&mut self, dice: &mut Dice, weighs: bool) {
        let (who, desk) = (dice.below(2), dice.below(2));
        match dice.below(16) {
            0..=5 => self.forward(who),
            6 => advance(Duration::from_secs(dice.below(70) as u64)).await,
            // A failover that lost everything.
            7 => self.locks = Locks::here(),
            8 => self.verdicts.truncate(self.verdicts.len().saturating_sub(1)),
            9 => {
                if let Admin::Held(session, fence) = &self.admins[who] {
                    let _ = now(self.locks.renew("t", session, *fence, TTL));
                }
            }
            10 => {
                if let Admin::Taken(session) | Admin::Recorded(session, _) | Admin::Held(session, _) = &self.admins[who] {
                    let _ = now(self.locks.release("t", session));
                    // The record of an attempt that was given up may be in the topic all the same.
                    self.records += u64::from(matches!(self.admins[who], Admin::Taken(_)));
                    self.admins[who] = Admin::Idle;
                }
            }
            _ if self.verdicts.is_empty() => {}
            _ => {
                let at = dice.below(self.verdicts.len());
                match self.verdicts[at] {
                    Verdict::Sent(fence) => {
                        if weighs && fence < self.fences[desk].highest("t") {
                            self.verdicts.swap_remove(at);
                            return;
                        }
                        let held = now(self.locks.read("t")).unwrap();
                        if held.is_some_and(|held| held.fence == Some(fence)) {
                            self.verdicts[at] = Verdict::Checked(fence, desk);
                        } else if dice.below(4) == 0 {
                            self.verdicts.swap_remove(at);
                        }
                    }
                    Verdict::Checked(fence, desk) => {
                        self.verdicts.swap_remove(at);
                        if !weighs || self.fences[desk].weigh("t", fence).unwrap() == Weighed::Good {
                            self.accepted[desk].push(fence);
                        }
                    }
                }
            }
        }
    }

    fn forward(&mut self, who: usize) {
        self.sessions += 1;
        let next = match self.admins[who].clone() {
            Admin::Idle => match now(self.locks.acquire("t", &who.to_string(), &self.sessions.to_string(), 0, TTL)).unwrap() {
                Acquired::Ours(_) => Admin::Taken(self.sessions.to_string()),
                Acquired::Taken(_) => Admin::Idle,
            },
            Admin::Taken(session) => {
                self.records += 1;
                Admin::Recorded(session, self.records)
            }
            Admin::Recorded(session, fence) => match now(self.locks.fence("t", &session, fence, TTL)).unwrap() {
                Fenced::Held => Admin::Held(session, fence),
                Fenced::Lost | Fenced::Low => Admin::Idle,
            },
            // A gateway signs what it saw last, however old that is.
            held @ Admin::Held(_, fence) => {
                self.verdicts.push(Verdict::Sent(fence));
                held
            }
        };
        self.admins[who] = next;
    }

    /// Whether some orchestrator acted upon a fence after a higher one.
    fn fell(&self) -> bool {
        self.accepted.iter().any(|fences| !fences.is_sorted())
    }
}

/// Lives a life: whether a fence fell in it, and how many turns ran under how many fences.
async fn life(seed: u64, weighs: bool) -> (bool, usize) {
    let mut dice = Dice(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
    let mut world = World {
        locks: Locks::here(),
        records: 0,
        admins: [Admin::Idle, Admin::Idle],
        fences: [Fences::unsaved(), Fences::unsaved()],
        verdicts: Vec::new(),
        accepted: [Vec::new(), Vec::new()],
        sessions: 0,
    };
    for _ in 0..STEPS {
        world.step(&mut dice, weighs).await;
    }
    let mut fences = world.accepted.concat();
    fences.sort_unstable();
    fences.dedup();
    (world.fell(), fences.len())
}

#[tokio::test(start_paused = true)]
async fn accepted_fences_never_fall_whatever_comes_between() {
    let mut changed_hands = 0;
    for seed in 0..LIVES {
        let (fell, fences) = life(seed, true).await;
        assert!(!fell, "seed {seed}");
        changed_hands += u64::from(fences > 1);
    }
    assert!(changed_hands > LIVES / 200, "only {changed_hands} lives say anything");
}

#[tokio::test(start_paused = true)]
async fn without_fences_they_do_fall_and_this_model_sees_it() {
    let mut seed = 0;
    while !life(seed, false).await.0 {
        seed += 1;
        assert!(seed < LIVES, "the model finds nothing: it shows less than it says");
    }
}
