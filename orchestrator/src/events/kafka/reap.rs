//! Ends in a topic what nobody else will: turns of an orchestrator whose log is lost for good, as its next start would have ended them.
//!
//! Nobody can tell from a topic whether an orchestrator lives, so whoever reaps says which silence is long enough. What is found ended
//! is left as it is, so a second time finds nothing more; and whatever stood first in the topic is what counts.

use std::{
    collections::{HashMap, HashSet, hash_map::Entry},
    io,
    path::Path,
    time::{Duration, SystemTime},
};

use futures_util::{TryStreamExt, stream};
use headgate_contracts::{
    TurnId,
    wire::log::{Event, Kind},
};
use rdkafka::Message as _;
use serde::de::IgnoredAny;

use super::{Brokers, Message, Producer, Topic, Unacknowledged, Unfit, Unread, read::judge};
use crate::events::{
    Follow,
    facts::{Begun, Crashed},
};

/// Turns reaped at once.
const AT_ONCE: usize = 64;
/// How long the topic may take to acknowledge one event.
const PATIENCE: Duration = Duration::from_secs(30);

/// A turn that has no end in its topic, or an end and no word on what its user got, and of which nothing was heard for long.
#[derive(Debug)]
pub struct Orphan {
    /// Which.
    pub turn: TurnId,
    /// Of whom: `{tenant}/{session}`.
    pub key: String,
    /// How long nothing was heard of it.
    pub silent: Duration,
    /// Whether it has no end.
    pub is_open: bool,
    /// The partition that its events are in.
    partition: i32,
    /// Its first event that the topic has.
    first: Vec<u8>,
}

/// What was found in a topic.
#[derive(Debug, Default)]
pub struct Orphans {
    /// What is to be reaped; the oldest first.
    pub found: Vec<Orphan>,
    /// What is neither ended and settled nor orphaned: something was heard of it not long ago.
    pub young: usize,
    /// What a log that is there has: its orchestrator will say what is to be said.
    pub kept: usize,
}

/// Reaping was left half way: what is done is done, and the rest is found again.
#[derive(Debug, thiserror::Error)]
pub enum Left {
    /// The topic cannot be written to.
    #[error(transparent)]
    Topic(#[from] Unfit),
    /// It was not heard to have an event.
    #[error(transparent)]
    Event(#[from] Unacknowledged),
    /// Nobody could write.
    #[error(transparent)]
    Runtime(#[from] io::Error),
}

/// What is gathered of a turn until it is settled.
struct Sign {
    key: String,
    partition: i32,
    first: Vec<u8>,
    /// When something was heard of it last, in milliseconds since 1970.
    last_ms: i64,
}

/// Finds the turns in a topic of which nothing was heard for `silence`, and that are not in the log in `log`, where one is named.
///
/// Errors: the topic or the log cannot be read.
pub fn orphans(brokers: &Brokers, topic: &str, silence: Duration, log: Option<&Path>) -> Result<Orphans, Unread> {
    // Before the topic: what is begun meanwhile is young there.
    let kept = log.map(turns).transpose()?.unwrap_or_default();
    let mut signs: HashMap<TurnId, Sign> = HashMap::new();
    let judged = judge(brokers, topic, |message, event| {
        let Ok(event_of) = serde_json::from_slice::<Event<IgnoredAny>>(event) else { return };
        let at_ms = message.timestamp().to_millis().unwrap_or(i64::MAX);
        match signs.entry(event_of.subject) {
            // Nothing more is to be said; should more come all the same, the judge knows better.
            Entry::Occupied(sign) if event_of.kind == Kind::Delivery.as_str() => drop(sign.remove()),
            // What a reaper had written is no sign of life.
            Entry::Occupied(_) if event_of.reapedby.is_some() => {}
            Entry::Occupied(mut sign) => sign.get_mut().last_ms = sign.get().last_ms.max(at_ms),
            Entry::Vacant(place) => {
                let sign = Sign { key: event_of.partitionkey, partition: message.partition(), first: event.to_vec(), last_ms: at_ms };
                place.insert(sign);
            }
        }
    })?;
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let mut orphans = Orphans::default();
    let turns = judged.open.into_iter().map(|turn| (turn, true)).chain(judged.owed.into_iter().map(|turn| (turn, false)));
    for (turn, is_open) in turns {
        let Some(Sign { key, partition, first, last_ms }) = signs.remove(&turn) else { continue };
        let silent = now.saturating_sub(Duration::from_millis(u64::try_from(last_ms).unwrap_or(0)));
        if kept.contains(&turn) {
            orphans.kept += 1;
        } else if silent < silence {
            orphans.young += 1;
        } else {
            orphans.found.push(Orphan { turn, key, silent, is_open, partition, first });
        }
    }
    orphans.found.sort_by_key(|orphan| std::cmp::Reverse(orphan.silent));
    Ok(orphans)
}

/// The turns that a log has anything of.
fn turns(folder: &Path) -> io::Result<HashSet<TurnId>> {
    let mut log = Follow::open(folder)?;
    std::iter::from_fn(|| log.next_entry().transpose()).map(|entry| entry.map(|entry| entry.turn)).collect()
}

/// Has written what an orchestrator would have written at its next start, and in the end, of turns that it had left open: that they
/// crashed, and that nobody said what their users got. `who` stands in each event.
///
/// Errors: the topic did not acknowledge an event; reaping again goes on there.
pub fn reap(topic: &Topic, orphans: &[Orphan], who: &str) -> Result<(), Left> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
        let producer = Producer::open(&Topic { partitions: None, ..topic.clone() }, PATIENCE).await?;
        stream::iter(orphans.iter().map(Ok))
            .try_for_each_concurrent(AT_ONCE, |orphan| {
                let producer = &producer;
                async move {
                    // One after the other: nobody is told what the user got of a turn that has no end.
                    for event in orphan.events(who) {
                        producer.write_beside(orphan.partition, &Message::of(&event)).await?;
                    }
                    Ok(())
                }
            })
            .await
    })
}

impl Orphan {
    /// What is to be said of it, in order.
    fn events(&self, who: &str) -> Vec<Vec<u8>> {
        if !self.is_open {
            return vec![Begun::read(self.turn, &self.first).untold(Some(who))];
        }
        let Crashed { end, begun, .. } = Crashed::of(self.turn, &self.first, Some(who));
        // Of a prompt that was refused there is nothing more.
        std::iter::once(end).chain(begun.map(|begun| begun.untold(Some(who)))).collect()
    }
}
