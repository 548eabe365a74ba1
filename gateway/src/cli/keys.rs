//! `headgate keys`: makes, rotates, revokes and shows the keys that sign, and keeps a record of it.

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use headgate_filters::{
    units::{Moment, Span},
    unix_now,
};
use headgate_policy::{
    KeyFault, Kid, Ring, State,
    audit::{self, AuditFault, Record},
    custody::{Begin, Custody, CustodyFault, Found, Rotated, audit_beside},
};
use serde_json::json;

use super::{EX_UNAVAILABLE, fail, say};

/// What to do with keys.
#[derive(clap::Subcommand)]
pub enum Keys {
    /// Make a ring file with one key, which signs at once.
    #[command(after_help = "\
The file holds private keys, mode 0600. `headgate run` makes the file that `policy.key` names by itself; make others here, such as
the policy key that signs registry entries, and keep that one where no gateway runs.

Example: headgate keys generate keys/policy.json")]
    Generate(Change),
    /// Take the next step of a rotation: prepare a key, or let it sign when its time has come.
    #[command(after_help = "\
A new key is published for --ahead before it signs, so that every verifier has read it by then. Run the same command twice:
  headgate keys rotate keys/policy.json      # prepares a key, and says from when on it may sign
  headgate keys rotate keys/policy.json      # from then on: it signs, the old one retires
Running gateways see the file change within a second. Nothing is refused meanwhile.

For a timer that rotates by itself, every hour: headgate keys rotate --when-due keys/policy.json

When a key has leaked do not rotate: revoke it, and another takes its place at once.")]
    Rotate {
        /// What to change.
        #[command(flatten)]
        change: Change,
        /// How long a new key is published before it signs: at least twice the longest time after which any verifier reads the keys
        /// again (`orchestrator.keys_refresh`, at most 5min).
        #[arg(long, value_name = "TIME", default_value = "10min", value_parser = ahead)]
        ahead: Span,
        /// Begin only when the current key has signed for its 30 days; a rotation that has begun goes on.
        #[arg(long)]
        when_due: bool,
    },
    /// End a key at once: what it signed is believed no more.
    #[command(after_help = "\
Verifiers know it when they read the keys again: an orchestrator with `keys: URL` within `keys_refresh`, 5 seconds unless set.
In place of the current key another signs at once, the next one if there is one. Verifiers refuse what that one signs until they
have read the keys again too, so turns may be refused for these seconds.

Example: headgate keys revoke keys/policy.json kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k")]
    Revoke {
        /// What to change.
        #[command(flatten)]
        change: Change,
        /// The key's name, from `headgate keys list`.
        #[arg(allow_hyphen_values = true)]
        kid: Kid,
    },
    /// Show the keys of a ring file: names, states, times.
    #[command(after_help = "Examples:\n  headgate keys list keys/policy.json\n  headgate keys list --json keys/policy.json | jq '.due'")]
    List {
        /// One JSON object instead of a table: `{"due", "keys": [{"kid", "state", "nbf", "exp"}]}`, times in Unix seconds.
        #[arg(long)]
        json: bool,
        /// The ring file.
        ring: PathBuf,
    },
    /// Print the public keys as a JSON Web Key Set, for verifiers that take a file.
    #[command(after_help = "Example: headgate keys jwks keys/policy.json > policy.jwks.json")]
    Jwks {
        /// The ring file.
        ring: PathBuf,
    },
    /// Check an audit file from its first line to its last, and show what was done.
    #[command(after_help = "\
Each line is a record {seq, time, action, actor, facts, prev_hash, hash}; `hash` is the SHA-256 of the line before `,\"hash\":`. A
chain shows what was altered, left out or moved. It does not show that its end was cut: compare the last hash, printed here, with one
that was kept elsewhere; of keys, the next change sees that the ring is not as the audit says.

Exit codes: 0 the chain is sound; 1 it is broken, the first bad line is named; 69 the file cannot be read.

Example: headgate keys audit keys/policy.audit.jsonl")]
    Audit {
        /// The audit file: `<ring>.audit.jsonl` beside the ring unless it was made elsewhere.
        file: PathBuf,
    },
}

/// Which keys are changed, by whom, and where it is recorded.
#[derive(clap::Args)]
pub struct Change {
    /// The ring file: `policy.key` of the config.
    pub ring: PathBuf,
    /// Where the change is recorded, before it is made. Default: beside the ring, `keys.audit.jsonl` for `keys.json`.
    #[arg(long, value_name = "FILE")]
    pub audit: Option<PathBuf>,
    /// Who changes it, as the record says. Default: the user of this shell.
    #[arg(long, env = "HEADGATE_ACTOR", default_value_t = user())]
    pub actor: String,
}

/// A name is a claim; the number is what the system knows.
pub(super) fn user() -> String {
    let name = ["SUDO_USER", "USER", "LOGNAME"].iter().find_map(|name| std::env::var(name).ok().filter(|name| !name.is_empty()));
    format!("{} (uid {})", name.as_deref().unwrap_or("somebody"), rustix::process::getuid().as_raw())
}

fn ahead(text: &str) -> Result<Span, String> {
    // A second until a gateway has seen it, one until an orchestrator with the least `keys_refresh` has, and time to fetch.
    let (least, most) = (Span(Duration::from_secs(5)), Span(Duration::from_secs(24 * 3600)));
    let span: Span = text.parse().map_err(|error| format!("{error}"))?;
    if (least..=most).contains(&span) { Ok(span) } else { Err(format!("expected {least} to {most}")) }
}

/// Does it, and says what was done and what is to be done when.
pub fn run(keys: Keys) -> ExitCode {
    match told(&keys, unix_now(), &mut io::stdout().lock(), &mut io::stderr().lock()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failed::Said(error)) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(Failed::Said(error)) => fail(&error, 1),
        Err(Failed::Custody(CustodyFault::Key(fault))) => fail(&fault, code(&fault)),
        Err(Failed::Custody(CustodyFault::Audit(fault @ AuditFault::Broken { .. }))) => {
            say(format_args!("{fault}; nothing was changed. Keep the file as evidence, and begin another with --audit"), 1)
        }
        Err(Failed::Custody(fault @ CustodyFault::Audit(_))) => fail(&fault, EX_UNAVAILABLE),
        Err(Failed::Custody(fault @ CustodyFault::Exists(_))) => fail(&fault, 1),
        Err(Failed::Custody(fault @ CustodyFault::Missing(_))) => fail(&fault, EX_UNAVAILABLE),
        Err(Failed::Audit(fault @ AuditFault::Broken { .. })) => fail(&fault, 1),
        Err(Failed::Audit(fault)) => fail(&fault, EX_UNAVAILABLE),
    }
}

fn code(fault: &KeyFault) -> u8 {
    if matches!(fault, KeyFault::Io { .. }) { EX_UNAVAILABLE } else { 1 }
}

/// What stood in the way.
#[derive(Debug)]
enum Failed {
    Custody(CustodyFault),
    Audit(AuditFault),
    Said(io::Error),
}

impl From<CustodyFault> for Failed {
    fn from(fault: CustodyFault) -> Failed {
        Failed::Custody(fault)
    }
}

impl From<KeyFault> for Failed {
    fn from(fault: KeyFault) -> Failed {
        Failed::Custody(fault.into())
    }
}

impl From<AuditFault> for Failed {
    fn from(fault: AuditFault) -> Failed {
        Failed::Audit(fault)
    }
}

impl From<io::Error> for Failed {
    fn from(error: io::Error) -> Failed {
        Failed::Said(error)
    }
}

fn told(keys: &Keys, now: u64, out: &mut impl Write, err: &mut impl Write) -> Result<(), Failed> {
    match keys {
        Keys::Generate(change) => {
            let kid = change.open(now, err)?.generate(now)?;
            writeln!(out, "made {} with one key, which signs from now on\n  current  {kid}", change.ring.display())?;
        }
        Keys::Rotate { change, ahead, when_due } => {
            let begin = if *when_due { Begin::WhenDue } else { Begin::Now };
            match change.open_there(now, err)?.rotate(begin, ahead.0.as_secs(), now)? {
                Rotated::NotDue => writeln!(out, "nothing to do: the current key's time is not up")?,
                Rotated::Prepared(kid, from) => writeln!(
                    out,
                    "prepared a key; gateways publish it from now on\n  next     {kid}\nIt may sign from {}: run the same command then.",
                    Moment(from)
                )?,
                Rotated::Waiting(kid, from) => writeln!(
                    out,
                    "nothing changed: verifiers may not have seen the next key yet\n  next     {kid}\nIt may sign from {}: run the same command then.",
                    Moment(from)
                )?,
                Rotated::Promoted(rotation) => {
                    writeln!(out, "the next key signs from now on\n  current  {}", rotation.current)?;
                    if let Some(retired) = rotation.retired {
                        writeln!(
                            out,
                            "  retired  {retired}\nWhat the retired key signed is believed for another day. Nothing is left to do."
                        )?;
                    }
                }
            }
        }
        Keys::Revoke { change, kid } => {
            let replaced = change.open_there(now, err)?.revoke(*kid, now)?;
            writeln!(out, "revoked: verifiers refuse it as soon as they read the keys again\n  revoked  {kid}")?;
            if let Some(current) = replaced {
                writeln!(out, "  current  {current}\nUntil they do, they refuse what the new key signs as well.")?;
            }
        }
        Keys::List { json, ring } => list(&Ring::load(ring)?, *json, now, out)?,
        Keys::Jwks { ring } => writeln!(out, "{}", Ring::load(ring)?.jwks())?,
        Keys::Audit { file } => show(file, out)?,
    }
    Ok(())
}

impl Change {
    /// Opens a ring that must be there: a mistyped name leaves no audit behind.
    fn open_there(&self, now: u64, err: &mut impl Write) -> Result<Custody, Failed> {
        if self.ring.exists() { self.open(now, err) } else { Err(CustodyFault::Missing(self.ring.clone()).into()) }
    }

    /// Opens the ring for a change, and says loudly where it is not as its audit says.
    fn open(&self, now: u64, err: &mut impl Write) -> Result<Custody, Failed> {
        let path = self.audit.clone().unwrap_or_else(|| audit_beside(&self.ring));
        let custody = Custody::open(&self.ring, &path, &self.actor, now)?;
        let torn = custody.audit().torn_bytes();
        if torn > 0 {
            writeln!(err, "headgate: {torn} bytes of an unfinished record were cut off the end of {}; that is on record", path.display())?;
        }
        match custody.found() {
            Found::Agreed => {}
            Found::Undone => writeln!(err, "headgate: the change recorded last was never made, a crash came between; that is on record")?,
            Found::Unknown => writeln!(
                err,
                "headgate: {} is not as its audit says: it was made, changed or put back past it, or the audit's end is missing; that is on record",
                self.ring.display()
            )?,
        }
        Ok(custody)
    }
}

fn list(ring: &Ring, as_json: bool, now: u64, out: &mut impl Write) -> io::Result<()> {
    if as_json {
        let keys: Vec<_> = ring.keys().collect();
        return writeln!(out, "{:#}", json!({"due": ring.is_due(now), "keys": keys}));
    }
    writeln!(out, "{:<43}  {:<8}  {:<20}  THEN", "KEY", "STATE", "SIGNS FROM")?;
    for key in ring.keys() {
        let (state, then) = match key.state {
            State::Next => ("next", ""),
            State::Current if ring.is_due(now) => ("current", "a successor is due since "),
            State::Current => ("current", "a successor is due "),
            State::Retired => ("retired", "believed until "),
            State::Revoked => ("revoked", "forgotten after "),
        };
        let then = key.exp.map(|exp| format!("{then}{}", Moment(exp))).unwrap_or_default();
        writeln!(out, "{:<43}  {state:<8}  {:<20}  {then}", key.kid.to_string(), Moment(key.nbf).to_string())?;
    }
    Ok(())
}

fn show(file: &Path, out: &mut impl Write) -> Result<(), Failed> {
    let mut said = Ok(());
    let mut line = |record: &Record| {
        // Which ring it was is for programs.
        let mut facts = record.facts.clone();
        facts.retain(|name, _| name != "was" && name != "ring");
        let facts: Vec<String> = facts.iter().map(|(name, value)| format!("{name}={value}")).collect();
        writeln!(out, "{:>6}  {}  {:<22}  {}  {}", record.seq, Moment(record.time), record.action, record.actor, facts.join(" "))
    };
    let judged = audit::verify(file, |record| {
        if said.is_ok() {
            said = line(record);
        }
    })?;
    said?;
    match &judged.last {
        Some(last) => writeln!(out, "{} records, the chain is sound; last hash {}", judged.records, last.hash)?,
        None => writeln!(out, "no records")?,
    }
    if judged.torn_bytes > 0 {
        writeln!(out, "{} bytes of an unfinished record follow: never acted upon, cut off with the next one", judged.torn_bytes)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use clap::Parser;

    use super::*;

    const NOW: u64 = 1_800_000_000;

    #[derive(Parser)]
    struct Line {
        #[command(subcommand)]
        keys: Keys,
    }

    /// What `headgate keys ...` says at `now`, on both outputs.
    fn keys(args: &[&str], now: u64) -> Result<(String, String), Failed> {
        let line = Line::try_parse_from([&["keys"], args].concat()).unwrap_or_else(|error| panic!("{error}"));
        let (mut out, mut err) = (Vec::new(), Vec::new());
        told(&line.keys, now, &mut out, &mut err)?;
        Ok((String::from_utf8(out).unwrap(), String::from_utf8(err).unwrap()))
    }

    fn states(ring: &str) -> Vec<(String, String)> {
        let (out, _) = keys(&["list", "--json", ring], NOW).unwrap();
        let shown: serde_json::Value = serde_json::from_str(&out).unwrap();
        let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
        shown["keys"].as_array().unwrap().iter().map(|key| (text(&key["state"]), text(&key["kid"]))).collect()
    }

    #[test]
    fn a_ring_lives_from_its_first_key_to_a_revocation_and_all_of_it_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("policy.json");
        let ring = path.to_str().unwrap();
        let (out, err) = keys(&["generate", "--actor", "ann", ring], NOW).unwrap();
        let first = states(ring)[0].1.clone();
        assert!(out.contains(&first) && err.is_empty(), "{out}{err}");
        assert!(matches!(keys(&["generate", ring], NOW), Err(Failed::Custody(CustodyFault::Exists(_)))));

        let (out, _) = keys(&["rotate", "--when-due", ring], NOW).unwrap();
        assert!(out.contains("nothing to do"), "{out}");
        let (out, _) = keys(&["rotate", ring], NOW).unwrap();
        assert!(out.contains("may sign from 2027-01-15T08:10:00Z"), "{out}");
        let (out, _) = keys(&["rotate", ring], NOW + 599).unwrap();
        assert!(out.contains("nothing changed"), "{out}");
        let (out, _) = keys(&["rotate", "--when-due", ring], NOW + 600).unwrap();
        let second = states(ring)[1].1.clone();
        assert!(out.contains(&format!("current  {second}")) && out.contains(&format!("retired  {first}")), "{out}");
        let (table, _) = keys(&["list", ring], NOW).unwrap();
        assert!(table.contains(&format!("{second}  current   2027-01-15T08:10:00Z  a successor is due 2027-02-14T08:10:00Z")), "{table}");

        let (out, _) = keys(&["revoke", ring, &second], NOW + 700).unwrap();
        let third = states(ring)[2].clone();
        assert_eq!(third.0, "current");
        assert!(out.contains(&second) && out.contains(&third.1), "{out}");
        let (jwks, _) = keys(&["jwks", ring], NOW).unwrap();
        assert!(jwks.contains(&first) && !jwks.contains(&second) && jwks.contains(&third.1) && !jwks.contains("\"d\""), "{jwks}");

        let audit = folder.path().join("policy.audit.jsonl");
        let (out, _) = keys(&["audit", audit.to_str().unwrap()], NOW).unwrap();
        for told in [
            "policy.key.generated",
            "  ann  ",
            "policy.key.prepared",
            "policy.key.promoted",
            "policy.key.retired",
            "policy.key.revoked",
            "7 records",
        ] {
            assert!(out.contains(told), "{told}: {out}");
        }
    }

    #[test]
    fn the_first_bad_line_of_an_audit_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let (ring, audit) = (folder.path().join("policy.json"), folder.path().join("elsewhere.jsonl"));
        let (ring, audit) = (ring.to_str().unwrap(), audit.to_str().unwrap());
        keys(&["generate", "--audit", audit, ring], NOW).unwrap();
        keys(&["rotate", "--audit", audit, ring], NOW).unwrap();
        let text = fs::read_to_string(audit).unwrap();
        fs::write(audit, text.replacen(r#""seq":2"#, r#""seq":3"#, 1)).unwrap();
        match keys(&["audit", audit], NOW) {
            Err(Failed::Audit(fault)) => assert!(fault.to_string().contains("line 2"), "{fault}"),
            _ => panic!("a changed record was believed"),
        }
        assert!(matches!(keys(&["rotate", "--audit", audit, ring], NOW), Err(Failed::Custody(CustodyFault::Audit(_)))));
    }

    #[test]
    fn a_ring_that_was_changed_past_its_audit_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("policy.json");
        Ring::generate(NOW).unwrap().save(&path).unwrap();
        let (_, err) = keys(&["rotate", path.to_str().unwrap()], NOW).unwrap();
        assert!(err.contains("not as its audit says"), "{err}");
    }

    #[test]
    fn a_mistyped_name_changes_nothing_and_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let ring = folder.path().join("polciy.json");
        let fault = keys(&["rotate", ring.to_str().unwrap()], NOW).unwrap_err();
        assert!(matches!(fault, Failed::Custody(CustodyFault::Missing(_))));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_key_whose_name_begins_like_an_option_can_be_revoked() {
        let kid = format!("-{}", "A".repeat(42));
        let line = Line::try_parse_from(["keys", "revoke", "policy.json", &kid]).unwrap_or_else(|error| panic!("{error}"));
        assert!(matches!(line.keys, Keys::Revoke { kid: named, .. } if named.to_string() == kid));
    }

    #[test]
    fn a_key_cannot_sign_sooner_than_any_verifier_could_have_read_it() {
        assert_eq!(ahead("5s").unwrap(), Span(Duration::from_secs(5)));
        for wrong in ["4s", "0s", "25h", "soon"] {
            assert!(ahead(wrong).is_err(), "{wrong}");
        }
    }
}
