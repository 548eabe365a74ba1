//! Judges the audit of training mode: that nothing in it was changed, left out or put in, and that it tells of locks that can have been.
//!
//! | asked of | what |
//! |---|---|
//! | each record | its hash is that of its bytes; a topic keeps it under its tenant |
//! | each chain, of a writer and a tenant | each record follows the one before |
//! | each lock | it is acquired once, before anything is said of its fence, which is the place of that record |
//! | each tenant | fences rise; nobody approves of a lock of their own |
//!
//! What was cut off the end of a chain leaves no trace in it: the orchestrators' own [`Heads`] tell.

use std::{
    collections::{BTreeMap, HashMap, VecDeque, hash_map::Entry},
    fs::File,
    io::{self, BufRead, BufReader, Read},
    path::Path,
};

use headgate_contracts::wire::training::{Outcome, TrainingFacts};
use headgate_policy::{
    Digest,
    audit::{self, AuditFault, Record},
};

pub use super::fences::Heads;

/// Violations that are told; the others are counted.
const MOST_TOLD: usize = 20;
/// Records at the end of a chain that the next may follow: one that nobody heard of may come late.
const RECENT: usize = 8;
/// The longest record of a file, in bytes; the audit's own bound.
const MAX_LINE: u64 = 16 << 10;
/// Bits of a fence that are a place in a topic.
const PLACE: u64 = (1 << 40) - 1;

/// What an audit comes to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Judged {
    /// Records.
    pub records: u64,
    /// Chains, each of a writer and a tenant.
    pub chains: u64,
    /// Locks that were acquired.
    pub acquired: u64,
    /// Locks that have an end on record, among them those that were given up before they were held.
    pub ended: u64,
    /// Times that somebody approved of another's lock.
    pub approved: u64,
    /// Calls that were denied.
    pub denied: u64,
    /// Calls that could not be done.
    pub failed: u64,
    /// Denied calls that have no record of their own.
    pub unwritten: u64,
    /// Records whose number came twice: their writer did not hear that they had been written, and did not do what they tell of.
    pub given_up: u64,
    /// Records about locks that were acquired in what was let go.
    pub begun_before: u64,
    /// Locks without an end: those that are held, and those whose end nobody could tell of. In order.
    pub open: Vec<Lock>,
    /// Bytes of an unfinished record at the end of a file: never acted upon.
    pub torn_bytes: u64,
    /// What must not be; the first of it.
    pub violations: Vec<String>,
    /// All of it.
    pub violations_count: u64,
}

impl Judged {
    /// Whether nothing is as it must not be.
    pub fn is_good(&self) -> bool {
        self.violations_count == 0
    }

    fn object(&mut self, at: &str, what: &str) {
        self.violations_count += 1;
        if self.violations.len() < MOST_TOLD {
            self.violations.push(format!("{at}: {what}"));
        }
    }
}

/// A lock that the audit tells of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lock {
    /// Whose training mode.
    pub tenant: String,
    /// Who had it.
    pub owner: String,
    /// Which taking it was.
    pub session: String,
    /// When it was acquired, in Unix seconds.
    pub since: u64,
    /// Its fence, where anything after its acquisition tells it.
    pub fence: Option<u64>,
    /// The place of its acquisition, which its fence ends with; `None` in an export without places.
    place: Option<u64>,
    ended: bool,
}

/// Judges a file of records, one a line, as they were exported from a topic: those of one tenant in their order.
///
/// `heads`: where the chains must at least have come. Errors: the file cannot be read.
pub fn verify_export(file: &Path, heads: &[Heads]) -> io::Result<Judged> {
    let mut judge = Judge { trimmed: true, ..Judge::default() };
    let mut reader = BufReader::new(File::open(file)?);
    let (mut line, mut number) = (Vec::new(), 0);
    loop {
        line.clear();
        if Read::by_ref(&mut reader).take(MAX_LINE + 1).read_until(b'\n', &mut line)? == 0 {
            return Ok(judge.end(heads));
        }
        number += 1;
        let at = format!("line {number}");
        match Record::read(&line) {
            Ok(record) => judge.chained(&at, &record, None),
            Err(why) => judge.judged.object(&at, why),
        }
        if line.len() as u64 > MAX_LINE {
            // Where it ends is not known: what comes next is judged from its next line on.
            reader.skip_until(b'\n')?;
        }
    }
}

/// Judges the file that an orchestrator writes which is alone: `training.jsonl` beside its event log.
///
/// Errors: it cannot be read.
pub fn verify_file(file: &Path) -> Result<Judged, AuditFault> {
    let mut judge = Judge::default();
    let sound = audit::verify(file, |record| judge.fact(&format!("line {}", record.seq), record, Some(record.seq)));
    judge.judged.chains = 1;
    match sound {
        Ok(sound) => judge.judged.torn_bytes = sound.torn_bytes,
        Err(AuditFault::Broken { place, why, .. }) => judge.judged.object(&place, why),
        Err(fault) => return Err(fault),
    }
    Ok(judge.end(&[]))
}

/// Judges everything that is in a topic now.
///
/// `heads`: where the chains must at least have come; read before. Errors: it cannot be read.
#[cfg(feature = "kafka")]
pub fn verify_topic(brokers: &crate::events::Brokers, topic: &str, heads: &[Heads]) -> Result<Judged, crate::events::Unread> {
    let mut judge = Judge::default();
    // Places compare within a partition only.
    let mut homes: HashMap<String, i32> = HashMap::new();
    crate::events::read_topic(brokers, topic, |trimmed, kept| {
        judge.trimmed |= trimmed;
        let at = format!("partition {} offset {}", kept.partition, kept.offset);
        let record = match Record::read(kept.value) {
            Ok(record) => record,
            Err(why) => return judge.judged.object(&at, why),
        };
        let tenant = record.facts.get("tenant").and_then(|tenant| tenant.as_str()).unwrap_or_default();
        if kept.key != Some(tenant.as_bytes()) {
            judge.judged.object(&at, "its key is not its tenant");
        }
        if *homes.entry(tenant.to_owned()).or_insert(kept.partition) != kept.partition {
            judge.judged.object(&at, "its tenant's records before are in another partition: fences need not rise any more");
        }
        judge.chained(&at, &record, Some(kept.offset.saturating_add(1)));
    })?;
    Ok(judge.end(heads))
}

/// The end of a chain: number, hash before and hash of its last records.
#[derive(Default)]
struct Chain(VecDeque<(u64, Digest, Digest)>);

impl Chain {
    fn last(&self) -> u64 {
        self.0.iter().map(|(seq, ..)| *seq).max().unwrap_or(0)
    }
}

#[derive(Default)]
struct Judge {
    judged: Judged,
    /// By writer and tenant.
    chains: BTreeMap<(String, String), Chain>,
    locks: Vec<Lock>,
    /// Where each lock is, by tenant and session.
    known: HashMap<(String, String), usize>,
    /// Whether the oldest may be missing.
    trimmed: bool,
}

impl Judge {
    /// A record of a chain of its writer and tenant. `place`: what its fence would end with.
    fn chained(&mut self, at: &str, record: &Record, place: Option<u64>) {
        let of = |name| record.facts.get(name).and_then(|value| value.as_str()).unwrap_or_default().to_owned();
        let chain = self.chains.entry((of("writer"), of("tenant"))).or_default();
        let (seq, before, hash) = (record.seq, record.prev_hash, record.hash);
        if chain.0.iter().any(|(.., known)| *known == hash) {
            return self.judged.object(at, "it is there twice");
        }
        let is_first = seq == 1 && before == Digest::of(b"");
        let follows = chain.0.iter().any(|(number, _, known)| number + 1 == seq && *known == before);
        let is_again = chain.0.iter().any(|(number, known, _)| *number == seq && *known == before);
        // Its writer wrote it again, having heard nothing of the one before.
        if is_again {
            self.judged.given_up += 1;
        } else if chain.0.is_empty() && !is_first && !self.trimmed {
            self.judged.object(at, "its chain does not begin with it: the beginning was left out");
        } else if !chain.0.is_empty() && !follows {
            self.judged
                .object(at, "it does not follow the record before of its writer and tenant: something was left out, put in or moved");
        }
        if chain.0.len() == RECENT {
            chain.0.pop_front();
        }
        chain.0.push_back((seq, before, hash));
        self.fact(at, record, place);
    }

    /// What a record tells.
    fn fact(&mut self, at: &str, record: &Record, place: Option<u64>) {
        self.judged.records += 1;
        if record.action == audit::REPAIRED {
            return;
        }
        let Ok(facts) = serde_json::from_value::<TrainingFacts>(record.facts.clone().into()) else {
            return self.judged.object(at, "it tells nothing of training mode");
        };
        self.judged.unwritten += facts.unwritten.unwrap_or(0);
        match facts.outcome {
            Outcome::Allowed => {}
            Outcome::Denied => self.judged.denied += 1,
            Outcome::Failed => self.judged.failed += 1,
        }
        let Some(session) = facts.session else {
            if record.action.starts_with("training.lock.") {
                self.judged.object(at, "it tells of a lock and does not name it");
            }
            return;
        };
        let known = self.known.entry((facts.tenant.clone(), session.clone()));
        if record.action == "training.lock.acquired" {
            self.judged.acquired += 1;
            match known {
                Entry::Occupied(_) => self.judged.object(at, "this lock was acquired before"),
                Entry::Vacant(here) => {
                    here.insert(self.locks.len());
                    let (tenant, owner, since) = (facts.tenant, record.actor.clone(), record.time);
                    self.locks.push(Lock { tenant, owner, session, since, fence: None, place, ended: false });
                }
            }
            return;
        }
        let lock = match known {
            Entry::Occupied(at) => self.locks.get_mut(*at.get()),
            Entry::Vacant(_) => None,
        };
        let Some(lock) = lock else {
            // Without a fence it was not held yet: of what is taken and never held there may be no other record.
            match facts.fence {
                Some(_) if self.trimmed => self.judged.begun_before += 1,
                Some(_) => self.judged.object(at, "it tells of a lock that nobody had acquired"),
                None => {}
            }
            return;
        };
        if let Some(fence) = facts.fence {
            if lock.fence.is_some_and(|known| known != fence) || lock.place.is_some_and(|place| place != fence & PLACE) {
                self.judged.object(at, "its fence is not that of its lock");
            }
            lock.fence.get_or_insert(fence);
        }
        match (record.action.as_str(), facts.outcome) {
            ("training.lock.released" | "training.lock.expired" | "training.lock.lost", _) | ("training.enable", Outcome::Failed) => {
                lock.ended = true;
            }
            ("training.lock.approved", _) => {
                self.judged.approved += 1;
                if lock.owner == record.actor {
                    self.judged.object(at, "its owner approved of it");
                }
            }
            _ => {}
        }
    }

    fn end(mut self, heads: &[Heads]) -> Judged {
        let mut highest: HashMap<String, u64> = HashMap::new();
        for lock in self.locks {
            if let Some(fence) = lock.fence {
                let before = highest.entry(lock.tenant.clone()).or_insert(0);
                if fence <= *before {
                    let at = format!("lock {} of {}", lock.session, lock.tenant);
                    self.judged.object(&at, &format!("its fence {fence} is not higher than {before}, which was given before"));
                }
                *before = fence.max(*before);
            }
            if lock.ended {
                self.judged.ended += 1;
            } else {
                self.judged.open.push(lock);
            }
        }
        for Heads { writer, tenants } in heads {
            for (tenant, (seq, hash)) in tenants {
                let at = format!("chain of {writer} for {tenant}");
                let chain = self.chains.get(&(writer.clone(), tenant.clone()));
                let last = chain.map_or(0, Chain::last);
                let is_there = chain.is_some_and(|chain| chain.0.iter().any(|(number, _, known)| number == seq && known == hash));
                if last < *seq {
                    self.judged.object(&at, &format!("its end is cut off: its writer remembers record {seq}, the last here is {last}"));
                } else if last == *seq && !is_there {
                    self.judged.object(&at, &format!("its record {seq} is not the one that its writer remembers"));
                }
            }
        }
        self.judged.chains = self.judged.chains.max(self.chains.len() as u64);
        self.judged
    }
}

#[cfg(test)]
mod tests {
    use headgate_policy::audit::Audit;
    use serde_json::json;

    use super::*;

    /// One thing that the audit of a test tells: writer, action, actor, and more facts.
    type Told<'a> = (&'a str, &'a str, &'a str, serde_json::Value);

    /// Two orchestrators, a lock that is given back, one that another approves of and that runs out while its owner sleeps, one that is
    /// given up, and one that is held.
    fn story() -> Vec<Told<'static>> {
        vec![
            ("w1", "training.lock.acquired", "ann", json!({"session": "s1"})),
            ("w1", "training.lock.released", "ann", json!({"session": "s1", "fence": 1})),
            ("w2", "training.enable", "carl", json!({"outcome": "denied", "unwritten": 3})),
            ("w2", "training.lock.acquired", "ann", json!({"session": "s2"})),
            ("w1", "training.lock.approved", "bob", json!({"session": "s2", "fence": 4})),
            ("w1", "training.lock.expired", "ann", json!({"session": "s2", "fence": 4})),
            ("w1", "training.lock.acquired", "bob", json!({"session": "s3"})),
            ("w1", "training.enable", "bob", json!({"session": "s3", "outcome": "failed"})),
            ("w2", "training.lock.lost", "ann", json!({"session": "s2", "fence": 4, "outcome": "failed"})),
            ("w1", "training.lock.acquired", "bob", json!({"session": "s4"})),
            ("w2", "training.enable", "ann", json!({"session": "s4", "fence": 10, "outcome": "denied"})),
        ]
    }

    fn facts(writer: &str, more: &serde_json::Value) -> serde_json::Value {
        let mut facts = json!({"tenant": "acme", "outcome": "allowed", "writer": writer});
        facts.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        facts
    }

    /// The lines of an export, and where its writers say that their chains end.
    fn export(story: &[Told<'_>]) -> (Vec<String>, Vec<Heads>) {
        let mut ends = BTreeMap::new();
        let mut lines = Vec::new();
        for (n, (writer, action, actor, more)) in story.iter().enumerate() {
            let last = ends.get(*writer).copied();
            let (record, line) = Record::after(last, n as u64, action, actor, facts(writer, more)).unwrap();
            ends.insert(writer.to_string(), (record.seq, record.hash));
            lines.push(String::from_utf8(line).unwrap());
        }
        let heads = |(writer, end)| Heads { writer, tenants: [("acme".to_owned(), end)].into() };
        (lines, ends.into_iter().map(heads).collect())
    }

    fn judged(lines: &[String], heads: &[Heads]) -> Judged {
        let mut judge = Judge::default();
        for (n, line) in lines.iter().enumerate() {
            match Record::read(line.as_bytes()) {
                // In a topic of one partition, of which nothing was let go.
                Ok(record) => judge.chained(&format!("line {}", n + 1), &record, Some(n as u64 + 1)),
                Err(why) => judge.judged.object(&format!("line {}", n + 1), why),
            }
        }
        judge.end(heads)
    }

    #[test]
    fn an_audit_of_several_writers_is_sound_and_is_counted() {
        let (lines, heads) = export(&story());
        let all = judged(&lines, &heads);
        assert_eq!(all.violations, Vec::<String>::new());
        assert_eq!((all.records, all.chains, all.acquired, all.ended, all.approved), (11, 2, 4, 3, 1));
        assert_eq!((all.denied, all.failed, all.unwritten, all.given_up), (2, 2, 3, 0));
        let open: Vec<_> = all.open.iter().map(|lock| (lock.owner.as_str(), lock.since, lock.fence)).collect();
        assert_eq!(open, [("bob", 9, Some(10))]);

        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("audit.jsonl");
        std::fs::write(&file, lines.join("\n")).unwrap();
        let exported = verify_export(&file, &heads).unwrap();
        assert_eq!((exported.violations_count, exported.records, exported.ended, exported.open.len()), (0, 11, 3, 1));
    }

    #[test]
    fn every_line_that_is_left_out_doubled_or_changed_is_noticed() {
        let (lines, heads) = export(&story());
        for n in 0..lines.len() {
            let mut fewer = lines.clone();
            fewer.remove(n);
            // The last record of a chain is missed by those alone who remember it.
            assert!(!judged(&fewer, &heads).is_good(), "without line {}", n + 1);
            let mut more = lines.clone();
            more.insert(n, lines[n].clone());
            assert!(!judged(&more, &heads).is_good(), "line {} twice", n + 1);
            let mut changed = lines.clone();
            changed[n] = changed[n].replace("\"tenant\":\"acme\"", "\"tenant\":\"other\"");
            assert!(!judged(&changed, &heads).is_good(), "line {} of another tenant", n + 1);
            for m in n + 1..lines.len() {
                let writer = |line: &String| line.contains("\"writer\":\"w1\"");
                let mut moved = lines.clone();
                moved.swap(n, m);
                // Two writers need not agree on whose record comes first; a lock's story has an order all the same.
                assert!(!judged(&moved, &heads).is_good() || writer(&lines[n]) != writer(&lines[m]), "{n} and {m} changed places");
            }
        }
    }

    #[test]
    fn a_cut_end_is_noticed_by_whoever_remembers_it() {
        let (lines, heads) = export(&story());
        let cut = judged(&lines[..9], &heads);
        assert_eq!(judged(&lines[..9], &[]).violations_count, 0, "nothing in the chain tells");
        assert_eq!(cut.violations_count, 2, "{:?}", cut.violations);
        assert!(
            cut.violations[0].contains("its end is cut off: its writer remembers record 7, the last here is 6"),
            "{:?}",
            cut.violations
        );
        // A whole chain that somebody wrote anew, with other facts.
        let mut other = story();
        other[10].2 = "eve";
        let forged = judged(&export(&other).0, &heads);
        assert_eq!(forged.violations.len(), 1, "{:?}", forged.violations);
        assert!(forged.violations[0].contains("is not the one that its writer remembers"), "{:?}", forged.violations);
    }

    #[test]
    fn whatever_no_lock_can_have_done_is_a_violation_although_every_hash_is_right() {
        type Plant = fn(&mut Vec<Told<'static>>);
        let planted: [(&str, Plant); 6] = [
            ("its fence is not that of its lock", |story| story[1].3["fence"] = json!(2)),
            ("its fence is not that of its lock", |story| story[8].3["fence"] = json!(4 | 1_u64 << 40)),
            ("its owner approved of it", |story| story[4].2 = "ann"),
            ("it tells of a lock that nobody had acquired", |story| story[1].3["session"] = json!("s9")),
            ("this lock was acquired before", |story| story[3].3["session"] = json!("s1")),
            ("it tells of a lock and does not name it", |story| story[5].3 = json!({})),
        ];
        for (what, plant) in planted {
            let mut planted = story();
            plant(&mut planted);
            let (lines, heads) = export(&planted);
            let found = judged(&lines, &heads);
            assert!(found.violations.iter().any(|violation| violation.ends_with(what)), "{what}: {:?}", found.violations);
        }
        // An epoch that was taken back.
        let mut fallen = story();
        fallen[1].3["fence"] = json!(1 | 1_u64 << 40);
        let found = judged(&export(&fallen).0, &[]);
        assert!(found.violations.iter().any(|violation| violation.contains("is not higher than")), "{:?}", found.violations);
    }

    #[test]
    fn of_what_was_taken_and_never_held_there_may_be_one_record_alone() {
        let lines = export(&[
            ("w1", "training.enable", "ann", json!({"session": "s1", "outcome": "failed"})),
            ("w2", "training.lock.expired", "bob", json!({"session": "s2"})),
            // Somebody asked between the taking and its record.
            ("w2", "training.enable", "ann", json!({"session": "s3", "outcome": "denied"})),
            ("w1", "training.lock.acquired", "bob", json!({"session": "s3"})),
        ]);
        let found = judged(&lines.0, &lines.1);
        assert_eq!((found.violations, found.acquired, found.open.len()), (Vec::new(), 1, 1));
    }

    #[test]
    fn a_record_that_its_writer_did_not_hear_of_comes_twice_and_is_no_violation() {
        let (mut lines, heads) = export(&story());
        // Written, not heard of, given up: the next one of its writer has its number.
        let first = Record::read(lines[0].as_bytes()).unwrap();
        let unheard = facts("w1", &json!({"outcome": "denied"}));
        let (_, unheard) = Record::after(Some((first.seq, first.hash)), 1, "training.status", "carl", unheard).unwrap();
        let unheard = String::from_utf8(unheard).unwrap();
        // It may even come after the one that took its number.
        for at in [1, 2, 4] {
            lines.insert(at, unheard.clone());
            let mut judge = Judge::default();
            for line in &lines {
                judge.chained("here", &Record::read(line.as_bytes()).unwrap(), None);
            }
            let found = judge.end(&heads);
            assert_eq!((found.violations_count, found.given_up), (0, 1), "at {at}: {:?}", found.violations);
            lines.remove(at);
        }
    }

    #[test]
    fn the_file_of_an_orchestrator_that_is_alone_is_one_chain() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("training.jsonl");
        for (n, (_, action, actor, more)) in story().iter().enumerate() {
            Audit::open(&file).unwrap().append(n as u64, action, actor, facts("w1", more)).unwrap();
        }
        let sound = verify_file(&file).unwrap();
        assert_eq!((sound.records, sound.chains, sound.open.len(), sound.violations), (11, 1, 1, Vec::new()));
        let text = std::fs::read_to_string(&file).unwrap();
        std::fs::write(&file, text.replacen("\"actor\":\"bob\"", "\"actor\":\"eve\"", 1)).unwrap();
        let broken = verify_file(&file).unwrap();
        assert_eq!(broken.violations, ["line 5: it was changed: its hash is another"]);
    }
}
