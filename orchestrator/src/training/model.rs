//! Many lives of a lock, told step by step: two admins, two orchestrators, verdicts that come late or never, a store that forgets.
//!
//! The locks and the fences are the real ones; what is modelled is the world between them. Between any two steps of one party any
//! step of another may come, and any time may pass. A failure names its seed.

use std::time::Duration;

use futures_util::FutureExt;
use headgate_store::{Acquired, Fenced, Locks};
use tokio::time::{Instant, advance};

use super::{Fences, Weighed};

const TTL: Duration = Duration::from_secs(60);
/// The longest that one admin has the lock without another's approval: a life sees it pass.
const LONGEST: Duration = Duration::from_secs(100);
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

/// What the world of a life leaves out, to see whether that is noticed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Without {
    Nothing,
    /// Nobody weighs fences.
    Fences,
    /// Whoever has the lock may approve of that.
    TwoPersons,
}

/// What an orchestrator acted upon, in order, and who has had the lock for how long.
struct World {
    without: Without,
    born: Instant,
    locks: Locks,
    records: u64,
    admins: [Admin; 2],
    fences: [Fences; 2],
    verdicts: Vec<Verdict>,
    accepted: [Vec<u64>; 2],
    sessions: u64,
    /// Who is about to approve of which taking.
    approving: Option<(usize, String)>,
    /// Who had the lock last, since when without another's word, and when that was seen last.
    alone: Option<(String, Instant, Instant)>,
    /// How often a lock was held for longer than one admin may.
    too_long: u64,
    /// How often it was held for longer with another's word.
    longer: u64,
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
    fn clock(&self) -> u64 {
        self.born.elapsed().as_secs()
    }

    async fn step(&mut self, dice: &mut Dice) {
        let weighs = self.without != Without::Fences;
        let (who, desk) = (dice.below(2), dice.below(2));
        match dice.below(18) {
            0..=5 => self.forward(who),
            6 => advance(Duration::from_secs(dice.below(70) as u64)).await,
            // A failover that lost everything.
            7 => (self.locks, self.alone) = (Locks::here(), None),
            8 => self.verdicts.truncate(self.verdicts.len().saturating_sub(1)),
            9 => {
                if let Admin::Held(session, fence) = &self.admins[who] {
                    let _ = now(self.locks.renew("t", session, *fence, self.clock(), TTL, LONGEST));
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
            11 => {
                let may = |owner: &str| self.without == Without::TwoPersons || owner != who.to_string();
                self.approving = now(self.locks.read("t")).unwrap().filter(|held| may(&held.owner)).map(|held| (who, held.session));
            }
            12 => {
                if let Some((who, session)) = self.approving.take()
                    && now(self.locks.approve("t", &session, &who.to_string(), self.clock(), LONGEST)).unwrap()
                    && let Some((owner, since, _)) = &mut self.alone
                    && *owner != who.to_string()
                {
                    *since = Instant::now();
                    self.longer += 1;
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

    /// Looks who has the lock, and for how long.
    fn look(&mut self) {
        let at = Instant::now();
        let Some(held) = now(self.locks.read("t")).unwrap() else { return };
        match &mut self.alone {
            Some((owner, since, seen)) if *owner == held.owner && at - *seen < LONGEST => {
                *seen = at;
                self.too_long += u64::from(at - *since >= LONGEST);
            }
            alone => *alone = Some((held.owner, at, at)),
        }
    }

    fn forward(&mut self, who: usize) {
        self.sessions += 1;
        let (owner, session) = (who.to_string(), self.sessions.to_string());
        let next = match self.admins[who].clone() {
            Admin::Idle => match now(self.locks.acquire("t", &owner, &session, self.clock(), TTL, LONGEST)).unwrap() {
                Acquired::Ours(_) => Admin::Taken(session),
                Acquired::Taken(_) | Acquired::Spent(_) => Admin::Idle,
            },
            Admin::Taken(session) => {
                self.records += 1;
                Admin::Recorded(session, self.records)
            }
            Admin::Recorded(session, fence) => match now(self.locks.fence("t", &session, fence, self.clock(), TTL)).unwrap() {
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

/// What a life has shown.
struct Life {
    /// Whether a fence fell in it.
    fell: bool,
    /// Under how many fences turns ran.
    fences: usize,
    too_long: u64,
    longer: u64,
}

async fn life(seed: u64, without: Without) -> Life {
    let mut dice = Dice(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
    let mut world = World {
        without,
        born: Instant::now(),
        locks: Locks::here(),
        records: 0,
        admins: [Admin::Idle, Admin::Idle],
        fences: [Fences::unsaved(), Fences::unsaved()],
        verdicts: Vec::new(),
        accepted: [Vec::new(), Vec::new()],
        sessions: 0,
        approving: None,
        alone: None,
        too_long: 0,
        longer: 0,
    };
    for _ in 0..STEPS {
        world.step(&mut dice).await;
        world.look();
    }
    let mut fences = world.accepted.concat();
    fences.sort_unstable();
    fences.dedup();
    Life { fell: world.fell(), fences: fences.len(), too_long: world.too_long, longer: world.longer }
}

#[tokio::test(start_paused = true)]
async fn accepted_fences_never_fall_and_nobody_holds_on_alone_whatever_comes_between() {
    let (mut changed_hands, mut longer) = (0, 0);
    for seed in 0..LIVES {
        let life = life(seed, Without::Nothing).await;
        assert!(!life.fell, "a fence fell: seed {seed}");
        assert_eq!(life.too_long, 0, "a lock was held for too long: seed {seed}");
        changed_hands += u64::from(life.fences > 1);
        longer += life.longer;
    }
    assert!(changed_hands > LIVES / 200, "only {changed_hands} lives say anything about fences");
    assert!(longer > LIVES / 20, "only {longer} approvals");
}

#[tokio::test(start_paused = true)]
async fn without_fences_or_a_second_person_this_model_sees_it() {
    for (without, is_seen) in [(Without::Fences, (|life| life.fell) as fn(&Life) -> bool), (Without::TwoPersons, |life| life.too_long > 0)]
    {
        let mut seed = 0;
        while !is_seen(&life(seed, without).await) {
            seed += 1;
            assert!(seed < LIVES, "the model finds nothing without {without:?}: it shows less than it says");
        }
    }
}
