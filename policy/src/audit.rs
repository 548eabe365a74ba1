//! Records who changed what, each record bound to the one before, so that none can be altered or left out unseen.
//!
//! One JSON object a line. `hash` is the SHA-256 of the line's bytes before `,"hash":`, and `prev_hash` is the `hash` of the
//! line before, so a chain can be checked with a hash tool and nothing of ours. Whoever may write the file can still write a
//! whole chain anew, or cut its end: what was printed of its last hash elsewhere is what tells.

use std::{
    fs::{File, TryLockError},
    io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::Digest;

/// The longest line, in bytes: facts are names, numbers and hashes, never documents.
const MAX_LINE: usize = 16 * 1024;
/// How much of a file's end is checked before something is added to it.
const TAIL: u64 = 8 * MAX_LINE as u64;
/// `,"hash":"sha-256=:<44 characters of base64>:"}`
const SEAL: usize = r#","hash":"sha-256=::"}"#.len() + 44;
/// Another writer is waited for so often, so long each time: five seconds together.
const TRIES: u32 = 100;
const TRY_AGAIN: Duration = Duration::from_millis(50);

/// The action of the record that says what was torn off by a crash.
pub const REPAIRED: &str = "audit.repaired";

/// Something that was done, or was about to be.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// Counts from 1.
    pub seq: u64,
    /// Unix seconds.
    pub time: u64,
    /// What was done: `policy.key.promoted`.
    pub action: String,
    /// Who did it.
    pub actor: String,
    /// To what, and how. Never a secret.
    pub facts: Map<String, Value>,
    /// The hash of the record before; of the first: that of no bytes.
    pub prev_hash: Digest,
    /// The hash of this one.
    #[serde(skip_serializing)]
    pub hash: Digest,
}

impl Record {
    /// The record that follows the one with this number and hash, `None` for the first of a chain, and its line without an end:
    /// for chains that are kept elsewhere than in a file. See [`Audit::append`] for what fits.
    ///
    /// Errors: [`AuditFault::Unfit`].
    pub fn after(last: Option<(u64, Digest)>, now: u64, action: &str, actor: &str, facts: Value) -> Result<(Record, Vec<u8>), AuditFault> {
        let is_action = (1..=64).contains(&action.len()) && action.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'_' | b'.'));
        let is_actor = (1..=128).contains(&actor.len()) && !actor.chars().any(char::is_control);
        let Value::Object(facts) = facts else { return Err(AuditFault::Unfit("facts are an object")) };
        if !is_action || !is_actor {
            return Err(AuditFault::Unfit("an action is a dotted word, and an actor a name of at most 128 bytes"));
        }
        let (seq, prev_hash) = last.map_or((1, Digest::of(b"")), |(seq, hash)| (seq + 1, hash));
        let mut next = Record { seq, time: now, action: action.into(), actor: actor.into(), facts, prev_hash, hash: prev_hash };
        let mut line = serde_json::to_vec(&next).expect("strings, numbers and maps of them always serialise");
        line.pop();
        next.hash = Digest::of(&line);
        line.extend_from_slice(seal(&next.hash).as_bytes());
        if line.len() >= MAX_LINE {
            return Err(AuditFault::Unfit("a record has at most 16 KiB"));
        }
        Ok((next, line))
    }

    /// The record in `line`, if nothing of it was changed. Whether it follows another is told by `seq` and `prev_hash`.
    ///
    /// Errors: what is wrong with it.
    pub fn read(line: &[u8]) -> Result<Record, &'static str> {
        record(line)
    }
}

/// An audit file, open for writing by this process alone for as long as the value lives.
///
/// Hold it over a whole change: open, read what is to be changed, append, change. A change then never goes without its record,
/// and of two changes at once the second sees the first. A process that lives long opens it anew for each change.
#[derive(Debug)]
pub struct Audit {
    path: PathBuf,
    file: File,
    last: Option<Record>,
    torn_bytes: u64,
    // After a failed write nobody knows what is on disk: the next to open it finds out.
    failed: bool,
}

impl Audit {
    /// Opens the file, or makes it with mode 0600, and checks its end. Blocks for up to five seconds while another writes.
    ///
    /// A last line that a crash left unfinished is cut off: nothing was done on its word. See [`Audit::torn_bytes`].
    ///
    /// Errors: [`AuditFault::Io`], [`AuditFault::Busy`], [`AuditFault::Broken`] where the end is not sound.
    pub fn open(path: &Path) -> Result<Audit, AuditFault> {
        let fault = |source| AuditFault::Io { path: path.to_owned(), source };
        let mut options = File::options();
        options.read(true).append(true).create(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let mut file = options.open(path).map_err(fault)?;
        wait(path, || file.try_lock())?;
        let len = file.metadata().map_err(fault)?.len();
        let begin = len.saturating_sub(TAIL);
        let mut tail = Vec::new();
        file.seek(SeekFrom::Start(begin)).and_then(|_| Read::by_ref(&mut file).take(TAIL).read_to_end(&mut tail)).map_err(fault)?;
        let whole = tail.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        let torn_bytes = (tail.len() - whole) as u64;
        if torn_bytes > MAX_LINE as u64 {
            return Err(AuditFault::Broken { path: path.to_owned(), place: "its end".into(), why: "it ends with no record of ours" });
        }
        let mut lines = tail[..whole].split_inclusive(|byte| *byte == b'\n');
        if begin > 0 {
            // The window begins inside this one.
            lines.next();
        }
        // What comes before the window is believed here, and checked by `verify`.
        let mut last = None;
        for line in lines {
            let next = record(line).and_then(|next| follows(last.as_ref(), begin == 0, &next).map(|()| next));
            let broken = |why| AuditFault::Broken { path: path.to_owned(), place: "its end".into(), why };
            last = Some(next.map_err(broken)?);
        }
        if len == 0 {
            // The name of the file outlives a crash as well.
            let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
            File::open(folder).and_then(|folder| folder.sync_all()).map_err(fault)?;
        }
        if torn_bytes > 0 {
            file.set_len(len - torn_bytes).and_then(|()| file.sync_all()).map_err(fault)?;
        }
        Ok(Audit { path: path.to_owned(), file, last, torn_bytes, failed: false })
    }

    /// Adds a record. It is on disk when this returns: do what it says after that, and not before.
    ///
    /// `now`: Unix seconds. `action`: at most 64 of `a-z`, `0-9`, `_` and `.`. `actor`: who, at most 128 bytes. `facts`: an object,
    /// with no secret in it.
    ///
    /// Errors: [`AuditFault::Unfit`] for what is none of that, [`AuditFault::Io`].
    pub fn append(&mut self, now: u64, action: &str, actor: &str, facts: Value) -> Result<&Record, AuditFault> {
        let (next, mut line) = Record::after(self.last.as_ref().map(|last| (last.seq, last.hash)), now, action, actor, facts)?;
        if self.torn_bytes > 0 && action != REPAIRED {
            self.append(now, REPAIRED, actor, serde_json::json!({"torn_bytes": self.torn_bytes}))?;
            return self.append(now, action, actor, Value::Object(next.facts));
        }
        line.push(b'\n');
        let fault = |source| AuditFault::Io { path: self.path.clone(), source };
        if self.failed {
            return Err(fault(io::Error::other("an earlier write failed: open it anew")));
        }
        self.failed = true;
        self.file.write_all(&line).and_then(|()| self.file.sync_data()).map_err(fault)?;
        (self.failed, self.torn_bytes) = (false, 0);
        Ok(self.last.insert(next))
    }

    /// Checks the whole file and shows each record, as [`verify`] does for those who only read.
    pub fn verify(&self, each: impl FnMut(&Record)) -> Result<Judged, AuditFault> {
        judge(&self.path, &self.file, each)
    }

    /// The last record.
    pub fn last(&self) -> Option<&Record> {
        self.last.as_ref()
    }

    /// How many bytes of an unfinished line were cut off when it was opened. The chain will say it too, see [`REPAIRED`].
    pub fn torn_bytes(&self) -> u64 {
        self.torn_bytes
    }
}

/// What a whole chain comes to.
#[derive(Debug, Clone, PartialEq)]
pub struct Judged {
    /// How many records there are.
    pub records: u64,
    /// The last of them.
    pub last: Option<Record>,
    /// Bytes of an unfinished line at the end: never acted upon, cut off when the next record is written.
    pub torn_bytes: u64,
}

/// Checks a whole file and shows each record. Stops at the first that is not sound; writes nothing.
///
/// Errors: [`AuditFault::Broken`] with the number of the line, [`AuditFault::Io`], [`AuditFault::Busy`].
pub fn verify(path: &Path, each: impl FnMut(&Record)) -> Result<Judged, AuditFault> {
    let file = File::open(path).map_err(|source| AuditFault::Io { path: path.to_owned(), source })?;
    wait(path, || file.try_lock_shared())?;
    judge(path, &file, each)
}

fn judge(path: &Path, mut file: &File, mut each: impl FnMut(&Record)) -> Result<Judged, AuditFault> {
    let fault = |source| AuditFault::Io { path: path.to_owned(), source };
    file.rewind().map_err(fault)?;
    let mut reader = BufReader::new(file);
    let mut judged = Judged { records: 0, last: None, torn_bytes: 0 };
    let mut line = Vec::new();
    loop {
        line.clear();
        let read = Read::by_ref(&mut reader).take(MAX_LINE as u64 + 1).read_until(b'\n', &mut line).map_err(fault)?;
        let broken = |why| AuditFault::Broken { path: path.to_owned(), place: format!("line {}", judged.records + 1), why };
        if read == 0 {
            return Ok(judged);
        }
        if read > MAX_LINE {
            return Err(broken("it is longer than 16 KiB"));
        }
        if line.last() != Some(&b'\n') {
            judged.torn_bytes = read as u64;
            return Ok(judged);
        }
        let next = record(&line).and_then(|next| follows(judged.last.as_ref(), true, &next).map(|()| next)).map_err(broken)?;
        each(&next);
        judged.records += 1;
        judged.last = Some(next);
    }
}

fn seal(hash: &Digest) -> String {
    format!(r#","hash":"{hash}"}}"#)
}

/// A line with its end.
fn record(line: &[u8]) -> Result<Record, &'static str> {
    let line = line.strip_suffix(b"\n").unwrap_or(line);
    let (body, sealed) = line.len().checked_sub(SEAL).map(|at| line.split_at(at)).ok_or("it is no record of ours")?;
    let record: Record = serde_json::from_slice(line).map_err(|_| "it is no record of ours")?;
    if sealed == seal(&Digest::of(body)).as_bytes() { Ok(record) } else { Err("it was changed: its hash is another") }
}

/// Whether `next` may follow `last`; without one, whether it may be the `first` of a file.
fn follows(last: Option<&Record>, first: bool, next: &Record) -> Result<(), &'static str> {
    let fits = match last {
        Some(last) => next.seq == last.seq + 1 && next.prev_hash == last.hash,
        None => !first || (next.seq == 1 && next.prev_hash == Digest::of(b"")),
    };
    if fits { Ok(()) } else { Err("it does not follow the line before: something was left out, put in or moved") }
}

fn wait(path: &Path, mut lock: impl FnMut() -> Result<(), TryLockError>) -> Result<(), AuditFault> {
    for _ in 0..TRIES {
        match lock() {
            Ok(()) => return Ok(()),
            Err(TryLockError::WouldBlock) => thread::sleep(TRY_AGAIN),
            Err(TryLockError::Error(source)) => return Err(AuditFault::Io { path: path.to_owned(), source }),
        }
    }
    Err(AuditFault::Busy(path.to_owned()))
}

/// Why nothing can be recorded, or a record not be believed. What was to be recorded must then not be done.
#[derive(Debug, thiserror::Error)]
pub enum AuditFault {
    /// The file could not be read or written.
    #[error("cannot use audit file {}", path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// Another process has been writing for five seconds.
    #[error("audit file {} is in use by another process: try again", .0.display())]
    Busy(PathBuf),
    /// A record is not sound.
    #[error("audit file {} is broken at {place}: {why}", path.display())]
    Broken {
        /// Which file.
        path: PathBuf,
        /// Which line, from 1, or its end.
        place: String,
        /// What is wrong.
        why: &'static str,
    },
    /// What was given is no record.
    #[error("cannot record that: {0}")]
    Unfit(&'static str),
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::json;

    use super::*;

    fn three(path: &Path) -> Vec<Record> {
        (1..=3).map(|n| Audit::open(path).unwrap().append(n, "policy.key.prepared", "ann", json!({"kid": n})).unwrap().clone()).collect()
    }

    fn shown(path: &Path) -> Vec<Record> {
        let mut all = Vec::new();
        let judged = verify(path, |record| all.push(record.clone())).unwrap();
        assert_eq!((judged.records as usize, judged.last.as_ref()), (all.len(), all.last()));
        all
    }

    #[test]
    fn what_was_appended_is_read_back_in_order() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("audit.jsonl");
        let written = three(&path);
        assert_eq!(shown(&path), written);
        assert_eq!(written.iter().map(|record| record.seq).collect::<Vec<_>>(), [1, 2, 3]);
        let text = fs::read_to_string(&path).unwrap();
        let (body, _) = text.lines().next().unwrap().split_once(r#","hash":"#).unwrap();
        assert_eq!(Digest::of(body.as_bytes()), written[0].hash, "the rule that other people's tools go by");
    }

    #[test]
    fn no_byte_can_be_changed_unseen() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("audit.jsonl");
        three(&path);
        let sound = fs::read(&path).unwrap();
        for at in 0..sound.len() {
            let mut changed = sound.clone();
            changed[at] ^= 1;
            fs::write(&path, &changed).unwrap();
            let line = sound[..at].iter().filter(|byte| **byte == b'\n').count() + 1;
            match verify(&path, |_| {}) {
                Err(AuditFault::Broken { place, .. }) => assert_eq!(place, format!("line {line}"), "byte {at}"),
                // Its last newline gone, the last record is one that was never finished.
                Ok(judged) => assert!(at == sound.len() - 1 && judged.torn_bytes > 0, "byte {at}"),
                Err(other) => panic!("{other}"),
            }
        }
    }

    #[test]
    fn no_line_can_be_left_out_moved_or_put_in_unseen() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("audit.jsonl");
        three(&path);
        let text = fs::read_to_string(&path).unwrap();
        let lines: Vec<&str> = text.split_inclusive('\n').collect();
        let [a, b, c] = [lines[0], lines[1], lines[2]];
        for (wrong, line) in
            [([b, c, ""], 1), ([a, c, ""], 2), ([b, a, c], 1), ([a, c, b], 2), ([a, a, b], 2), ([a, b, "\n"], 3), ([a, b, "{}\n"], 3)]
        {
            fs::write(&path, wrong.concat()).unwrap();
            let fault = verify(&path, |_| {}).unwrap_err();
            assert!(matches!(&fault, AuditFault::Broken { place, .. } if *place == format!("line {line}")), "{fault}");
            assert!(matches!(Audit::open(&path), Err(AuditFault::Broken { .. })), "nothing is added to a broken chain");
        }
    }

    #[test]
    fn a_line_that_a_crash_left_unfinished_is_cut_off_and_the_chain_says_so() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("audit.jsonl");
        three(&path);
        let sound = fs::read(&path).unwrap();
        let third = sound.iter().take(sound.len() - 1).rposition(|byte| *byte == b'\n').unwrap() + 1;
        for cut in third + 1..sound.len() {
            fs::write(&path, &sound[..cut]).unwrap();
            assert_eq!(verify(&path, |_| {}).unwrap().torn_bytes, (cut - third) as u64);
            let mut audit = Audit::open(&path).unwrap();
            assert_eq!(audit.torn_bytes(), (cut - third) as u64);
            audit.append(9, "policy.key.revoked", "ann", json!({})).unwrap();
            drop(audit);
            let all = shown(&path);
            assert_eq!(all[2].action, REPAIRED);
            assert_eq!(all[2].facts["torn_bytes"], cut - third);
            assert_eq!(all[3].action, "policy.key.revoked");
        }
    }

    #[test]
    fn two_who_write_at_once_take_turns() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("audit.jsonl");
        std::thread::scope(|scope| {
            for name in ["ann", "bob", "eve"] {
                let path = &path;
                scope.spawn(move || {
                    (0..8).for_each(|n| drop(Audit::open(path).unwrap().append(n, "a.b", name, json!({})).unwrap().clone()))
                });
            }
        });
        assert_eq!(shown(&path).len(), 24);
    }

    #[test]
    fn a_chain_longer_than_the_window_goes_on() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("audit.jsonl");
        let mut audit = Audit::open(&path).unwrap();
        for n in 0..40 {
            audit.append(n, "a.b", "ann", json!({"what": "x".repeat(8_000)})).unwrap();
        }
        drop(audit);
        assert!(fs::metadata(&path).unwrap().len() > 2 * TAIL);
        assert_eq!(Audit::open(&path).unwrap().append(41, "a.b", "ann", json!({})).unwrap().seq, 41);
        assert_eq!(shown(&path).len(), 41);
    }

    #[test]
    fn what_is_no_record_is_not_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("audit.jsonl");
        let mut audit = Audit::open(&path).unwrap();
        for (action, actor, facts) in [
            ("", "ann", json!({})),
            ("Two Words", "ann", json!({})),
            ("a.b", "", json!({})),
            ("a.b", "ann\n", json!({})),
            ("a.b", "ann", json!([])),
            ("a.b", "ann", json!({"what": "x".repeat(MAX_LINE)})),
        ] {
            assert!(matches!(audit.append(0, action, actor, facts), Err(AuditFault::Unfit(_))), "{action} {actor}");
        }
        assert_eq!(fs::metadata(&path).unwrap().len(), 0);
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn after_a_write_that_failed_nothing_is_recorded_until_it_is_opened_anew() {
        // A device that takes nothing: the lock and the check of the end pass, the write does not.
        let file = File::options().read(true).append(true).open("/dev/full").unwrap();
        let mut audit = Audit { path: "/dev/full".into(), file, last: None, torn_bytes: 0, failed: false };
        let refused = |audit: &mut Audit| match audit.append(0, "a.b", "ann", json!({})).unwrap_err() {
            AuditFault::Io { source, .. } => source.to_string(),
            other => panic!("{other}"),
        };
        assert!(refused(&mut audit).contains("No space left"));
        assert!(refused(&mut audit).contains("open it anew"));
        assert_eq!(audit.last(), None);
    }
}
