//! Changes the keys of a ring's file, by one at a time, and never without a record.
//!
//! A change is recorded, then done, and the record names the ring before and after by its digest. So what a crash kept from being
//! done is seen by whoever opens the ring next, and recorded too; and so is what was changed past the audit, or what was cut off
//! its end.

use std::{
    io,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};

use crate::{
    KeyFault, Kid, Ring, Rotation, State,
    audit::{Audit, AuditFault, Record},
};

/// A ring's file and its audit, held against every other who would change them for as long as the value lives.
#[derive(Debug)]
pub struct Custody {
    path: PathBuf,
    ring: Option<Ring>,
    audit: Audit,
    actor: String,
    found: Found,
}

/// How the ring and its audit stood to each other when they were opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// The ring is as the audit says; or there is neither.
    Agreed,
    /// The last change that was recorded was not done: a crash came between.
    Undone,
    /// There is a ring that the audit does not know: made or changed past it, or the audit's end is missing.
    Unknown,
}

/// What a step of a rotation came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rotated {
    /// The current key's time is not up.
    NotDue,
    /// There is a new `next` key, which may sign from then on, in Unix seconds.
    Prepared(Kid, u64),
    /// The `next` key may sign from then on, in Unix seconds, and not yet.
    Waiting(Kid, u64),
    /// The `next` key signs.
    Promoted(Rotation),
}

/// When a rotation begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Begin {
    /// Now.
    Now,
    /// When the current key has signed for its time.
    WhenDue,
}

/// Where the audit of a ring's file is, unless somebody says otherwise: `keys.audit.jsonl` beside `keys.json`.
pub fn audit_beside(ring: &Path) -> PathBuf {
    ring.with_extension("audit.jsonl")
}

/// Reads the ring's file, or makes one, on record, if there is none. Of several processes that start together one makes it.
pub fn load_or_generate(path: &Path, now: u64, actor: &str) -> Result<Ring, CustodyFault> {
    match Ring::load(path) {
        Err(KeyFault::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
        other => return Ok(other?),
    }
    let mut custody = Custody::open(path, &audit_beside(path), actor, now)?;
    if custody.ring.is_none() {
        custody.generate(now)?;
    }
    custody.ring.ok_or_else(|| CustodyFault::Missing(path.to_owned()))
}

impl Custody {
    /// Opens both, checks the whole audit, and brings on record where the ring is not as the audit says.
    ///
    /// `actor`: who is about to change something. `now`: Unix seconds.
    ///
    /// Errors: the ring's or the audit's; nothing is changed where the audit is broken.
    pub fn open(path: &Path, audit: &Path, actor: &str, now: u64) -> Result<Custody, CustodyFault> {
        // The lock first: what is read after it nobody changes.
        let audit = Audit::open(audit)?;
        let ring = match Ring::load(path) {
            Err(KeyFault::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => None,
            other => Some(other?),
        };
        let mut custody = Custody { path: path.to_owned(), ring, audit, actor: actor.to_owned(), found: Found::Agreed };
        let mut last: Option<Record> = None;
        custody.audit.verify(|record| {
            if record.action.starts_with("policy.key.") {
                last = Some(record.clone());
            }
        })?;
        let here = custody.digest();
        let of = last.as_ref().map(|last| last.seq);
        let said = |member: &str| last.as_ref().and_then(|last| last.facts.get(member)).unwrap_or(&Value::Null);
        if here != *said("ring") {
            let (found, action) = if of.is_some() && here == *said("was") {
                (Found::Undone, "policy.key.undone")
            } else {
                (Found::Unknown, "policy.key.adopted")
            };
            custody.found = found;
            let facts = json!({"record": of, "was": said("ring"), "ring": here});
            custody.audit.append(now, action, &custody.actor, facts)?;
        }
        Ok(custody)
    }

    /// The ring, if there is one.
    pub fn ring(&self) -> Option<&Ring> {
        self.ring.as_ref()
    }

    /// How ring and audit stood to each other.
    pub fn found(&self) -> Found {
        self.found
    }

    /// The audit.
    pub fn audit(&self) -> &Audit {
        &self.audit
    }

    /// Makes the ring, with one key that signs at once. Errors: [`CustodyFault::Exists`].
    pub fn generate(&mut self, now: u64) -> Result<Kid, CustodyFault> {
        if self.ring.is_some() {
            return Err(CustodyFault::Exists(self.path.clone()));
        }
        let ring = Ring::generate(now)?;
        let kid = ring.current().ok_or(KeyFault::Random)?;
        self.commit(now, ring, vec![("policy.key.generated", json!({"kid": kid}))])?;
        Ok(kid)
    }

    /// Takes the next step of a rotation: prepares a key, or lets it sign when its time has come.
    ///
    /// `ahead`: how long a new key is published before it may sign, in seconds. With no current key there is nothing to wait for.
    /// Keys whose time is over are dropped on the way.
    ///
    /// Errors: [`CustodyFault::Missing`], those of [`Ring::prepare`].
    pub fn rotate(&mut self, begin: Begin, ahead: u64, now: u64) -> Result<Rotated, CustodyFault> {
        let mut ring = self.reread()?;
        let mut records: Vec<_> = ring.sweep(now).into_iter().map(|kid| ("policy.key.removed", json!({"kid": kid}))).collect();
        let next = ring.keys().find(|key| key.state == State::Next);
        let rotated = match next {
            Some(next) if ring.current().is_some() && now < next.nbf => Rotated::Waiting(next.kid, next.nbf),
            Some(_) => Rotated::Promoted(promote(&mut ring, now, &mut records)?),
            None if begin == Begin::WhenDue && !ring.is_due(now) => Rotated::NotDue,
            None => {
                let kid = ring.prepare(now, ahead)?;
                records.push(("policy.key.prepared", json!({"kid": kid, "from": now.saturating_add(ahead)})));
                match ring.current() {
                    Some(_) => Rotated::Prepared(kid, now.saturating_add(ahead)),
                    None => Rotated::Promoted(promote(&mut ring, now, &mut records)?),
                }
            }
        };
        self.commit(now, ring, records)?;
        Ok(rotated)
    }

    /// Ends a key at once. In place of a current key the next one signs from now on, or a new one where there is none: verifiers
    /// refuse what it signs until they have read the keys again, which is better than signing nothing.
    ///
    /// Returns the key that took its place, if it needed one. Errors: [`CustodyFault::Missing`], [`KeyFault::Unknown`].
    pub fn revoke(&mut self, kid: Kid, now: u64) -> Result<Option<Kid>, CustodyFault> {
        let mut ring = self.reread()?;
        ring.revoke(kid, now)?;
        let mut records = vec![("policy.key.revoked", json!({"kid": kid}))];
        if ring.current().is_none() {
            if !ring.keys().any(|key| key.state == State::Next) {
                let kid = ring.prepare(now, 0)?;
                records.push(("policy.key.prepared", json!({"kid": kid, "from": now})));
            }
            promote(&mut ring, now, &mut records)?;
        }
        let current = ring.current();
        let replaced = self.ring.as_ref().and_then(Ring::current) != current;
        self.commit(now, ring, records)?;
        Ok(current.filter(|_| replaced))
    }

    fn reread(&self) -> Result<Ring, CustodyFault> {
        match &self.ring {
            Some(_) => Ok(Ring::load(&self.path)?),
            None => Err(CustodyFault::Missing(self.path.clone())),
        }
    }

    /// As the facts of a record name it.
    fn digest(&self) -> Value {
        self.ring.as_ref().map_or(Value::Null, |ring| json!(ring.digest()))
    }

    /// Records, then does.
    fn commit(&mut self, now: u64, ring: Ring, records: Vec<(&str, Value)>) -> Result<(), CustodyFault> {
        let (was, will) = (self.digest(), json!(ring.digest()));
        if records.is_empty() {
            return Ok(());
        }
        for (action, mut facts) in records {
            facts["was"] = was.clone();
            facts["ring"] = will.clone();
            self.audit.append(now, action, &self.actor, facts)?;
        }
        // Where this fails, whoever opens the ring next sees what was done, and records it.
        ring.save(&self.path)?;
        self.ring = Some(ring);
        Ok(())
    }
}

fn promote(ring: &mut Ring, now: u64, records: &mut Vec<(&str, Value)>) -> Result<Rotation, KeyFault> {
    let rotation = ring.promote(now)?;
    for key in ring.keys() {
        if key.kid == rotation.current {
            records.push(("policy.key.promoted", json!({"kid": key.kid, "due": key.exp})));
        }
        if Some(key.kid) == rotation.retired {
            records.push(("policy.key.retired", json!({"kid": key.kid, "until": key.exp})));
        }
    }
    Ok(rotation)
}

/// Why keys were not changed.
#[derive(Debug, thiserror::Error)]
pub enum CustodyFault {
    /// The ring cannot be used.
    #[error(transparent)]
    Key(#[from] KeyFault),
    /// The change cannot be recorded, so it was not made.
    #[error("nothing was changed, as it cannot be recorded")]
    Audit(#[from] AuditFault),
    /// There are keys already.
    #[error("there are keys in {} already: rotate them", .0.display())]
    Exists(PathBuf),
    /// There are no keys yet.
    #[error("there are no keys in {}: generate them first", .0.display())]
    Missing(PathBuf),
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::{PUBLISH_AHEAD, ROTATE_AFTER, audit};

    const NOW: u64 = 1_800_000_000;

    struct Desk {
        folder: tempfile::TempDir,
    }

    impl Desk {
        fn new() -> Desk {
            Desk { folder: tempfile::tempdir().unwrap() }
        }

        fn ring(&self) -> PathBuf {
            self.folder.path().join("keys.json")
        }

        fn open(&self) -> Custody {
            Custody::open(&self.ring(), &audit_beside(&self.ring()), "ann", NOW).unwrap()
        }

        /// The actions on record, without the prefix they share.
        fn actions(&self) -> Vec<String> {
            let mut all = Vec::new();
            let each = |record: &Record| all.push(record.action.trim_start_matches("policy.key.").to_owned());
            audit::verify(&audit_beside(&self.ring()), each).unwrap();
            all
        }
    }

    #[test]
    fn every_step_of_a_rotation_is_on_record() {
        let desk = Desk::new();
        let first = desk.open().generate(NOW).unwrap();
        assert!(matches!(desk.open().generate(NOW), Err(CustodyFault::Exists(_))));
        let mut custody = desk.open();
        let Rotated::Prepared(second, from) = custody.rotate(Begin::Now, 60, NOW).unwrap() else { panic!("no key prepared") };
        assert_eq!(from, NOW + 60);
        assert_eq!(custody.rotate(Begin::Now, 60, NOW + 59).unwrap(), Rotated::Waiting(second, NOW + 60));
        let done = custody.rotate(Begin::Now, 60, NOW + 60).unwrap();
        assert_eq!(done, Rotated::Promoted(Rotation { current: second, retired: Some(first) }));
        drop(custody);
        assert_eq!(Ring::load(&desk.ring()).unwrap().current(), Some(second));
        assert_eq!(desk.actions(), ["generated", "prepared", "retired", "promoted"]);
        let later = NOW + 60 + crate::RETIRED_FOR + 1;
        assert!(matches!(desk.open().rotate(Begin::WhenDue, 60, later), Ok(Rotated::NotDue)));
        assert_eq!(desk.actions().last().unwrap(), "removed");
        assert_eq!(desk.open().found(), Found::Agreed);
    }

    #[test]
    fn a_rotation_that_waits_for_its_time_does_nothing_before() {
        let desk = Desk::new();
        desk.open().generate(NOW).unwrap();
        let mut custody = desk.open();
        assert_eq!(custody.rotate(Begin::WhenDue, PUBLISH_AHEAD, NOW + ROTATE_AFTER - 1).unwrap(), Rotated::NotDue);
        let due = NOW + ROTATE_AFTER;
        let Rotated::Prepared(next, from) = custody.rotate(Begin::WhenDue, PUBLISH_AHEAD, due).unwrap() else { panic!("not begun") };
        assert_eq!(from, due + PUBLISH_AHEAD);
        assert!(matches!(custody.rotate(Begin::WhenDue, PUBLISH_AHEAD, from).unwrap(), Rotated::Promoted(done) if done.current == next));
    }

    #[test]
    fn in_place_of_a_revoked_key_another_signs_at_once() {
        let desk = Desk::new();
        let first = desk.open().generate(NOW).unwrap();
        let second = desk.open().revoke(first, NOW + 1).unwrap().unwrap();
        let Rotated::Prepared(third, _) = desk.open().rotate(Begin::Now, 600, NOW + 2).unwrap() else { panic!("no key prepared") };
        assert_eq!(desk.open().revoke(second, NOW + 3).unwrap(), Some(third), "the next one, however young");
        assert_eq!(desk.open().revoke(second, NOW + 3).unwrap(), None, "nothing needs a successor");
        let ring = Ring::load(&desk.ring()).unwrap();
        let states: Vec<_> = ring.keys().map(|key| (key.kid, key.state)).collect();
        assert_eq!(states, [(first, State::Revoked), (second, State::Revoked), (third, State::Current)]);
        assert!(!ring.jwks().contains(&first.to_string()));
        assert_eq!(desk.actions(), ["generated", "revoked", "prepared", "promoted", "prepared", "revoked", "promoted", "revoked"]);
        assert!(matches!(
            desk.open().revoke(Ring::generate(0).unwrap().current().unwrap(), NOW),
            Err(CustodyFault::Key(KeyFault::Unknown(_)))
        ));
    }

    #[test]
    fn nothing_is_changed_that_cannot_be_recorded() {
        let desk = Desk::new();
        let first = desk.open().generate(NOW).unwrap();
        let path = audit_beside(&desk.ring());
        let sound = fs::read_to_string(&path).unwrap();
        fs::write(&path, sound.replace("ann", "bob")).unwrap();
        let fault = Custody::open(&desk.ring(), &path, "ann", NOW).unwrap_err();
        assert!(matches!(fault, CustodyFault::Audit(AuditFault::Broken { .. })), "{fault}");
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        assert!(matches!(Custody::open(&desk.ring(), &path, "ann", NOW), Err(CustodyFault::Audit(AuditFault::Io { .. }))));
        assert_eq!(Ring::load(&desk.ring()).unwrap().current(), Some(first));
    }

    #[test]
    fn what_was_recorded_and_not_done_is_told_and_recorded() {
        let desk = Desk::new();
        desk.open().generate(NOW).unwrap();
        let before = fs::read(desk.ring()).unwrap();
        desk.open().rotate(Begin::Now, 60, NOW).unwrap();
        // As after a crash between the record and the change.
        fs::write(desk.ring(), before).unwrap();
        assert_eq!(desk.open().found(), Found::Undone);
        assert_eq!(desk.open().found(), Found::Agreed);
        assert_eq!(desk.actions(), ["generated", "prepared", "undone"]);
    }

    #[test]
    fn a_change_past_the_audit_and_a_cut_of_its_end_are_told_and_recorded() {
        let desk = Desk::new();
        desk.open().generate(NOW).unwrap();
        let begun = fs::read(audit_beside(&desk.ring())).unwrap();
        Ring::generate(NOW).unwrap().save(&desk.ring()).unwrap();
        assert_eq!(desk.open().found(), Found::Unknown);
        assert_eq!(desk.actions(), ["generated", "adopted"]);
        desk.open().rotate(Begin::Now, 60, NOW).unwrap();
        fs::write(audit_beside(&desk.ring()), begun).unwrap();
        assert_eq!(desk.open().found(), Found::Unknown);
        fs::remove_file(desk.ring()).unwrap();
        assert_eq!(desk.open().found(), Found::Unknown);
        assert_eq!(desk.actions(), ["generated", "adopted", "adopted"]);
    }

    #[test]
    fn of_many_processes_that_start_together_one_makes_the_key() {
        let desk = Desk::new();
        let path = desk.ring();
        let kids = std::thread::scope(|scope| {
            let runs: Vec<_> = (0..8).map(|_| scope.spawn(|| load_or_generate(&path, NOW, "headgate run").unwrap().current())).collect();
            runs.into_iter().map(|run| run.join().unwrap()).collect::<std::collections::HashSet<_>>()
        });
        assert_eq!(kids.len(), 1);
        assert_eq!(desk.actions(), ["generated"]);
    }
}
