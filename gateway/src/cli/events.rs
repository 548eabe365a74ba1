//! `headgate events`: shows and judges the log of what became of each turn, and makes it forget what somebody said.

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
    process::ExitCode,
    thread,
    time::Duration,
};

use headgate_config::Environment;
use headgate_contracts::{Subject, TenantId};
use headgate_filters::{units::Span, unix_now};
use headgate_orchestrator::events::{self, Brokers, Follow, Judged, name, unseal, verify};
use headgate_policy::{
    audit::{Audit, AuditFault},
    custody::audit_beside,
    vault::{Master, Rewrapped, Vault, VaultFault},
};

use super::{EX_CONFIG, EX_UNAVAILABLE, fail, keys::user};
use crate::build;

/// What to do with a log.
#[derive(clap::Subcommand)]
pub enum Events {
    /// Print events as they were written, one JSON object a line.
    #[command(after_help = "\
Each line is a CloudEvents 1.0 event: `type` says what happened to the turn in `subject`, `data` the facts. A turn has turn.accepted.v1, verdict.input.v1, one of turn.completed.v1, turn.cancelled.v1, turn.denied.v1 and turn.failed.v1, and
at last what its user got, delivery.v1. `headgate schema events/turn.accepted.v1` (and so on) prints their schemas.

What was said is there only where the config has `orchestrator.events.text`: sealed pieces of the prompt, input.segment.v1, and of the
answer as the model wrote it, output.segment.v1. With --text the pieces are shown open, to those who have the keys: `data.text` is the
piece, or <erased> where the subject was forgotten, or <altered> where it is not what was sealed.

The log may be written meanwhile; reading takes no lock. Of a topic, events of one session are printed in order.

Exit codes: 0 printed; 69 the events cannot be read.

Examples:
  headgate events tail /var/lib/headgate/events
  headgate events tail --follow events | jq -r '[.time, .type, .subject] | @tsv'
  headgate events tail --text --key secrets/text.key --keys subjects events
  headgate events tail --brokers kafka-1:9092,kafka-2:9092
  headgate events tail --config headgate.yaml")]
    Tail {
        /// Go on with what is written from now on, until stopped.
        #[arg(long, short)]
        follow: bool,
        /// Show what was said.
        #[arg(long, requires = "key", requires = "keys")]
        text: bool,
        /// The file with the master key: `orchestrator.events.text.key` of the config.
        #[arg(long, value_name = "FILE", requires = "text")]
        key: Option<PathBuf>,
        /// The folder with the keys of subjects: `orchestrator.events.text.folder` of the config.
        #[arg(long, value_name = "FOLDER", requires = "text")]
        keys: Option<PathBuf>,
        /// Where the events are.
        #[command(flatten)]
        from: Source,
    },
    /// Check that every record is whole and in order, and that every turn begins once and ends once.
    #[command(after_help = "\
A turn without an end is open: it runs, or a crash cut it, and the orchestrator's next start gives it turn.failed.v1 with the reason
`crash`. With --ended open turns are violations: for the log of an orchestrator that was stopped and not killed.

Of a topic, the same is asked of the events of each turn, and that all of a session is in one partition. An event that is there
again, word for word, counts once: its first place.

Exit codes: 0 all is well; 1 there are violations, the first of them printed; 69 the events cannot be read.

Examples:
  headgate events verify /var/lib/headgate/events
  headgate events verify --ended events
  headgate events verify --brokers kafka-1:9092,kafka-2:9092 --topic conversation.events
  headgate events verify --config headgate.yaml --env production")]
    Verify {
        /// Take open turns for violations.
        #[arg(long)]
        ended: bool,
        /// Where the events are.
        #[command(flatten)]
        from: Source,
    },
    /// End in a topic the turns of an orchestrator whose log is lost for good.
    #[command(
        group(clap::ArgGroup::new("where").required(true).args(["brokers", "config"])),
        after_help = "\
An orchestrator that is started again with its log ends by itself what a crash left open. This is for the one whose log is gone: its turns
stay open in the topic for ever. Each of which nothing was heard for --older-than gets what that start would have written: turn.failed.v1
with the reason `crash`, and delivery.v1 with `unknown`; turns that have only their end get delivery.v1. Each of these events says in
`reapedby` who had it written. A second time finds nothing more to do, and whatever stood first in the topic counts.

A topic does not tell whether an orchestrator lives. Turns that the log of the config knows (orchestrator.events.folder, where it is on this
machine) are left to it. All others that still deliver must have caught up: look at orchestrator_event_log_undelivered of each of them first,
above all after an outage of Kafka. With --config, --older-than must be ten minutes above the longest that a turn and the word on it may take.

Exit codes: 0 nothing is left to reap; 69 the topic cannot be read or written, and a second time goes on; 78 --older-than is too short.

Examples:
  headgate events reap --config headgate.yaml --dry-run
  headgate events reap --config headgate.yaml --older-than 2h
  headgate events reap --brokers kafka-1:9092,kafka-2:9092 --topic conversation.events")]
    Reap {
        /// Where the events are.
        #[command(flatten)]
        from: Topic,
        /// How long nothing may have been heard of a turn that is reaped; at least `10min`.
        #[arg(long, value_name = "TIME", default_value_t = Span(Duration::from_secs(3600)), value_parser = silence)]
        older_than: Span,
        /// Say what would be reaped, and write nothing.
        #[arg(long)]
        dry_run: bool,
        /// Who does it, as the events say. Default: the user of this shell.
        #[arg(long, env = "HEADGATE_ACTOR", default_value_t = user(), value_parser = actor)]
        actor: String,
    },
    /// Print the name that stands for a subject in a log that keeps no text.
    #[command(after_help = "\
Events name nobody: where text is kept, a subject is the name of a key; elsewhere a keyed hash, under the key `names.key` in the folder of
the log. Only who has that file can tell whose name it is.

Exit codes: 0 printed; 69 there is no such key.

Example: headgate events tail events | grep \"$(headgate events name events --tenant acme --subject user-7)\"")]
    Name {
        /// The folder of the log: `orchestrator.events.folder` of the config.
        folder: PathBuf,
        /// Whose subject it is.
        #[arg(long)]
        tenant: TenantId,
        /// The subject, as tokens name them.
        #[arg(long)]
        subject: Subject,
    },
    /// Make a master key, which the keys that seal text are wrapped with.
    #[command(after_help = "\
The file has mode 0600 and is never replaced. Keep a copy where no log is: without the master key no text can be read again.

Example: headgate events key secrets/text.key")]
    Key {
        /// The file to make.
        file: PathBuf,
    },
    /// Have a new master key wrap the keys of subjects, while orchestrators use them.
    #[command(after_help = "\
Makes a new key in the first line of the master key's file, and wraps each key in the folder with it, in its place. The old key stays
in the file: whoever runs reads the file again where it finds a key that it cannot open, and nobody has to be started anew. If it is
stopped half way, run it again. Several folders under one master key: run it for each; the new key is made once.

Then `headgate events retire` takes the old key out of the file. Names of subjects and sessions in events stay what they were.
Both are recorded before they are done; `headgate keys audit` checks and shows the record.

Exit codes: 0 the latest key wraps all; 1 the record is broken, nothing was changed; 69 the keys cannot be used.

Example:
  headgate events rotate --key secrets/text.key --keys subjects
  headgate events retire --key secrets/text.key --keys subjects")]
    Rotate(Masters),
    /// Take old master keys out of the file, once the latest wraps everything.
    #[command(after_help = "\
Looks through every folder once more, and wraps with the latest key what was made meanwhile; name all folders that the key is for, or
what is in the others can be read no more. Copies of the old file, and backups of the folders from before, still go together.

Exit codes: 0 the latest key is the only one; 1 the record is broken, nothing was changed; 69 the keys cannot be used.

Example: headgate events retire --key secrets/text.key --keys subjects --keys /mnt/other/subjects")]
    Retire(Masters),
    /// Forget what a subject said: destroy the key that it is sealed under.
    #[command(after_help = "\
Nobody can read the subject's text after that, neither here nor in a copy of the log nor in a topic, and nobody can tell whose events
they were: these name the key. It needs no restart: orchestrators read a subject's key anew for every turn. If the subject comes back,
they make another. Run it for every folder of keys, if your orchestrators have several; where there was nothing, it says so.

It is recorded before it is done, without naming the subject; `headgate keys audit` checks and shows the record. Not forgotten by
this: a session that an orchestrator remembers to go on with (orchestrator.history, in memory), and copies of the folder of keys.

Exit codes: 0 nothing of the subject can be read; 1 the record is broken, nothing was changed; 69 the keys cannot be used.

Example:
  headgate events forget --key secrets/text.key --keys subjects --tenant acme --subject user-7")]
    Forget {
        /// The file with the master key: `orchestrator.events.text.key` of the config.
        #[arg(long, value_name = "FILE")]
        key: PathBuf,
        /// The folder with the keys of subjects: `orchestrator.events.text.folder` of the config.
        #[arg(long, value_name = "FOLDER")]
        keys: PathBuf,
        /// Whose subject it is.
        #[arg(long)]
        tenant: TenantId,
        /// Who is forgotten, as tokens name them.
        #[arg(long)]
        subject: Subject,
        /// Where it is recorded. Default: beside the folder of keys, `subjects.audit.jsonl` for `subjects`.
        #[arg(long, value_name = "FILE")]
        audit: Option<PathBuf>,
        /// Who does it, as the record says. Default: the user of this shell.
        #[arg(long, env = "HEADGATE_ACTOR", default_value_t = user())]
        actor: String,
    },
}

/// A master key, and what it wraps.
#[derive(clap::Args)]
pub struct Masters {
    /// The file with the master key: `orchestrator.events.text.key` of the config.
    #[arg(long, value_name = "FILE")]
    key: PathBuf,
    /// A folder with keys of subjects: `orchestrator.events.text.folder` of the config.
    #[arg(long, value_name = "FOLDER", required = true)]
    keys: Vec<PathBuf>,
    /// Where it is recorded. Default: beside the first folder of keys, `subjects.audit.jsonl` for `subjects`.
    #[arg(long, value_name = "FILE")]
    audit: Option<PathBuf>,
    /// Who does it, as the record says. Default: the user of this shell.
    #[arg(long, env = "HEADGATE_ACTOR", default_value_t = user())]
    actor: String,
}

/// Where the events are.
#[derive(clap::Args)]
pub struct Source {
    /// The folder of the log: `orchestrator.events.folder` of the config.
    #[arg(required_unless_present_any = ["brokers", "config"], conflicts_with_all = ["brokers", "config", "topic"])]
    folder: Option<PathBuf>,
    /// Instead of a folder, the Kafka topic that the events went on to.
    #[command(flatten)]
    topic: Topic,
}

/// A topic.
#[derive(clap::Args)]
pub struct Topic {
    /// Some brokers of the topic, each as host:port.
    #[arg(long, value_delimiter = ',')]
    brokers: Vec<String>,
    /// The same, with all that `orchestrator.events.kafka` of this config says: for brokers that want TLS or a password.
    #[arg(long, value_name = "FILE", conflicts_with = "brokers")]
    config: Option<PathBuf>,
    /// The overlay of this environment over the config.
    #[arg(long, env = "HEADGATE_ENV")]
    env: Option<Environment>,
    /// The name of the topic. Default: that of the config, or `conversation.events`.
    #[arg(long)]
    topic: Option<String>,
}

impl Topic {
    /// The topic, and what the config says of those who write to it.
    fn found(&self) -> io::Result<(events::Topic, Option<Writers>)> {
        let Some(config) = &self.config else {
            let name = self.topic.clone().unwrap_or_else(|| "conversation.events".to_owned());
            let brokers = Brokers::open(self.brokers.clone());
            return Ok((events::Topic { brokers, name, replication: 1, in_sync: 1, partitions: None }, None));
        };
        let plan = headgate_config::load(config, self.env, &|name| std::env::var(name).ok()).map_err(io::Error::other)?;
        let kept = plan.orchestrator.and_then(|orchestrator| Some((orchestrator.turn, orchestrator.events?)));
        let writers =
            kept.and_then(|(turn, kept)| Some((kept.kafka?, Writers { log: kept.folder, slowest: turn.max(kept.unknown_after) })));
        let Some((kafka, writers)) = writers else {
            return Err(io::Error::other(format!("{} names no topic: it has no `orchestrator.events.kafka`", config.display())));
        };
        let found = build::topic(&kafka);
        Ok((events::Topic { name: self.topic.clone().unwrap_or(found.name), ..found }, Some(writers)))
    }

    /// The brokers, and the topic's name.
    fn named(&self) -> io::Result<(Brokers, String)> {
        self.found().map(|(topic, _)| (topic.brokers, topic.name))
    }
}

/// What a config says of the orchestrators that write to its topic.
#[cfg_attr(not(feature = "kafka"), expect(dead_code, reason = "without Kafka nothing is reaped"))]
struct Writers {
    /// Where the log of one of them is, if it is on this machine.
    log: PathBuf,
    /// The longest that one of them may hear nothing of a turn that it has begun.
    slowest: Duration,
}

/// What is added to the longest that a turn may take, before it counts as lost.
const GRACE: Span = Span(Duration::from_secs(600));

fn silence(text: &str) -> Result<Span, String> {
    let span: Span = text.parse().map_err(|error| format!("{error}"))?;
    if span >= GRACE { Ok(span) } else { Err(format!("expected at least {GRACE}")) }
}

fn actor(text: &str) -> Result<String, String> {
    let is_name = (1..=128).contains(&text.len()) && !text.chars().any(char::is_control);
    if is_name { Ok(text.to_owned()) } else { Err("expected at most 128 bytes of text on one line".to_owned()) }
}

/// How often a log is looked at for what is new.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// Prints, judges or forgets.
pub fn run(events: Events) -> ExitCode {
    let mut out = io::BufWriter::new(io::stdout().lock());
    let done = match &events {
        Events::Tail { follow, key, keys, from, .. } => vault(key.as_deref(), keys.as_deref()).and_then(|vault| match &from.folder {
            Some(folder) => tail(folder, *follow, vault.as_ref(), &mut out),
            None => tail_topic(from, *follow, vault.as_ref(), &mut out),
        }),
        Events::Reap { from, older_than, dry_run, actor } => match reap(from, *older_than, *dry_run, actor, &mut out) {
            Err(Unreaped::Short(short)) => return fail(&io::Error::other(short), EX_CONFIG),
            Err(Unreaped::Topic(error)) => Err(error),
            Ok(code) => Ok(code),
        },
        Events::Name { folder, tenant, subject } => {
            name(folder, tenant, subject).and_then(|name| writeln!(out, "{name}")).map(|()| ExitCode::SUCCESS)
        }
        Events::Key { file } => make_key(file, &mut out),
        Events::Forget { key, keys, tenant, subject, audit, actor } => {
            let audit = audit.clone().unwrap_or_else(|| audit_beside(keys));
            match forget(&Forgotten { key, keys, audit: &audit, actor }, tenant, subject, unix_now(), &mut out) {
                Err(VaultFault::Audit(fault @ AuditFault::Broken { .. })) => return fail(&fault, 1),
                done => done.map_err(io::Error::other),
            }
        }
        Events::Rotate(masters) | Events::Retire(masters) => {
            match change(masters, matches!(events, Events::Retire(_)), unix_now(), &mut out) {
                Err(VaultFault::Audit(fault @ AuditFault::Broken { .. })) => return fail(&fault, 1),
                done => done.map_err(io::Error::other),
            }
        }
        Events::Verify { ended, from: Source { folder: Some(folder), .. } } => {
            verify(folder).map_err(|error| about(folder, error)).and_then(|judged| tell(&judged, "segments", *ended, &mut out))
        }
        Events::Verify { ended, from } => judge_topic(from).and_then(|judged| tell(&judged, "partitions", *ended, &mut out)),
    };
    match done.and_then(|code| out.flush().map(|()| code)) {
        Ok(code) => code,
        // Whoever reads us has gone: `headgate events tail | head`.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => fail(&error, EX_UNAVAILABLE),
    }
}

/// The keys that text is sealed under, where it is to be shown.
fn vault(key: Option<&Path>, keys: Option<&Path>) -> io::Result<Option<Vault>> {
    let (Some(key), Some(keys)) = (key, keys) else { return Ok(None) };
    let master = Master::load(key).map_err(io::Error::other)?;
    // It would be made: whoever mistypes it would see everything erased.
    if !keys.is_dir() {
        return Err(io::Error::new(io::ErrorKind::NotFound, format!("there is no folder of keys {}", keys.display())));
    }
    Vault::open(keys, &master).map(Some).map_err(io::Error::other)
}

fn make_key(file: &Path, out: &mut impl Write) -> io::Result<ExitCode> {
    Master::generate(file).map_err(io::Error::other)?;
    writeln!(out, "made {}; keep a copy where no log is", file.display())?;
    Ok(ExitCode::SUCCESS)
}

/// With which keys a subject is forgotten, and who says so.
struct Forgotten<'a> {
    key: &'a Path,
    keys: &'a Path,
    audit: &'a Path,
    actor: &'a str,
}

fn forget(by: &Forgotten<'_>, tenant: &TenantId, subject: &Subject, now: u64, out: &mut impl Write) -> Result<ExitCode, VaultFault> {
    let fault = |source| VaultFault::Io { folder: by.keys.to_owned(), source };
    let Some(vault) = vault(Some(by.key), Some(by.keys)).map_err(fault)? else { return Ok(ExitCode::FAILURE) };
    let mut audit = Audit::open(by.audit)?;
    let had_key = vault.forget(tenant.as_str(), subject.as_str(), &mut audit, by.actor, now)?;
    let said =
        if had_key { "destroyed the key: what the subject said cannot be read any more" } else { "there was nothing of that subject" };
    writeln!(out, "{said}\nrecorded in {}", by.audit.display()).map_err(fault)?;
    Ok(ExitCode::SUCCESS)
}

/// Rotates a master key, or takes the old ones away.
fn change(masters: &Masters, retire: bool, now: u64, out: &mut impl Write) -> Result<ExitCode, VaultFault> {
    let Masters { key, keys, audit, actor } = masters;
    // They would be made: whoever mistypes one would believe that its keys are wrapped anew.
    if let Some(none) = keys.iter().find(|folder| !folder.is_dir()) {
        let source = io::Error::new(io::ErrorKind::NotFound, "there is no such folder");
        return Err(VaultFault::Io { folder: none.clone(), source });
    }
    let beside = audit.clone().or_else(|| keys.first().map(|folder| audit_beside(folder))).unwrap_or_default();
    let mut audit = Audit::open(&beside)?;
    let done = if retire {
        Vault::retire(key, keys, &mut audit, actor, now)?
    } else {
        let each = keys.iter().map(|folder| Vault::rotate(key, folder, &mut audit, actor, now));
        each.sum::<Result<Rewrapped, VaultFault>>()?
    };
    let left = if retire { "the only key left" } else { "the latest of the keys" };
    writeln!(out, "{} of {} keys wrapped anew; all are under {left} in {}", done.wrapped, done.keys, key.display())
        .and_then(|()| writeln!(out, "recorded in {}", beside.display()))
        .map_err(|source| VaultFault::Io { folder: beside.clone(), source })?;
    Ok(ExitCode::SUCCESS)
}

/// What is printed of an event.
fn shown(event: &[u8], vault: Option<&Vault>) -> io::Result<Option<Vec<u8>>> {
    vault.map_or(Ok(None), |vault| unseal(vault, event)).map_err(io::Error::other)
}

fn about(folder: &Path, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("cannot read the event log in {}: {error}", folder.display()))
}

#[cfg(feature = "kafka")]
fn tail_topic(from: &Source, follow: bool, vault: Option<&Vault>, out: &mut impl Write) -> io::Result<ExitCode> {
    use headgate_orchestrator::events::{Unread, follow_topic};
    let each = |event: Option<&[u8]>| match event {
        Some(event) => {
            let open = shown(event, vault)?;
            out.write_all(open.as_deref().unwrap_or(event)).and_then(|()| out.write_all(b"\n"))
        }
        None => out.flush(),
    };
    let (brokers, topic) = from.topic.named()?;
    match follow_topic(&brokers, &topic, follow, each) {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(Unread::Listener(error)) => Err(error),
        Err(unread @ Unread::Kafka { .. }) => Err(io::Error::other(unread)),
    }
}

#[cfg(feature = "kafka")]
fn judge_topic(from: &Source) -> io::Result<Judged> {
    let (brokers, topic) = from.topic.named()?;
    headgate_orchestrator::events::verify_topic(&brokers, &topic).map_err(io::Error::other)
}

#[cfg(feature = "kafka")]
fn reap(from: &Topic, older_than: Span, dry_run: bool, actor: &str, out: &mut impl Write) -> Result<ExitCode, Unreaped> {
    let (topic, writers) = from.found()?;
    if let Some(Writers { slowest, .. }) = &writers
        && older_than.0 < *slowest + GRACE.0
    {
        let (slowest, least) = (Span(*slowest), Span(*slowest + GRACE.0));
        return Err(Unreaped::Short(format!(
            "--older-than {older_than}: by this config nothing may be heard of a turn for {slowest}; expected at least {least}"
        )));
    }
    let log = writers.map(|writers| writers.log).filter(|log| log.is_dir());
    Ok(end_silent(&topic, log.as_deref(), older_than.0, (!dry_run).then_some(actor), out)?)
}

/// Ends the turns of a topic of which nothing was heard for `silence`, or says which these are where nobody is to end them.
#[cfg(feature = "kafka")]
fn end_silent(
    topic: &events::Topic,
    log: Option<&Path>,
    silence: Duration,
    actor: Option<&str>,
    out: &mut impl Write,
) -> io::Result<ExitCode> {
    let found = events::orphans(&topic.brokers, &topic.name, silence, log).map_err(io::Error::other)?;
    for orphan in &found.found {
        let what = if orphan.is_open { "no end" } else { "no word on what its user got" };
        writeln!(out, "turn {} of {}: {what}, silent for {} min", orphan.turn, orphan.key, orphan.silent.as_secs() / 60)?;
    }
    let left = [(found.young, "may still go on: left alone"), (found.kept, "in the log here: left to its orchestrator")];
    for (count, what) in left.into_iter().filter(|(count, _)| *count > 0) {
        writeln!(out, "{count} turns {what}")?;
    }
    writeln!(out, "{} turns to be ended", found.found.len())?;
    // Whoever watches sees what is about to be done.
    out.flush()?;
    if let Some(actor) = actor.filter(|_| !found.found.is_empty()) {
        events::reap(topic, &found.found, actor).map_err(io::Error::other)?;
        writeln!(out, "ended; each event says by whom: {actor}")?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Why nothing, or not all, was reaped.
enum Unreaped {
    #[cfg_attr(not(feature = "kafka"), expect(dead_code, reason = "without Kafka nothing is reaped"))]
    Short(String),
    Topic(io::Error),
}

impl From<io::Error> for Unreaped {
    fn from(error: io::Error) -> Unreaped {
        Unreaped::Topic(error)
    }
}

#[cfg(not(feature = "kafka"))]
fn tail_topic(from: &Source, _follow: bool, _vault: Option<&Vault>, _out: &mut impl Write) -> io::Result<ExitCode> {
    judge_topic(from).map(|_| ExitCode::SUCCESS)
}

#[cfg(not(feature = "kafka"))]
fn judge_topic(from: &Source) -> io::Result<Judged> {
    unbuilt(&from.topic)
}

#[cfg(not(feature = "kafka"))]
fn reap(from: &Topic, _older_than: Span, _dry_run: bool, _actor: &str, _out: &mut impl Write) -> Result<ExitCode, Unreaped> {
    Ok(unbuilt(from)?)
}

#[cfg(not(feature = "kafka"))]
fn unbuilt<T>(from: &Topic) -> io::Result<T> {
    let (_, topic) = from.named()?;
    Err(io::Error::other(format!("cannot read the topic {topic}: {}", headgate_orchestrator::events::Unfit::Unbuilt)))
}

fn tail(folder: &Path, follow: bool, vault: Option<&Vault>, out: &mut impl Write) -> io::Result<ExitCode> {
    let mut log = Follow::open(folder).map_err(|error| about(folder, error))?;
    loop {
        while let Some(entry) = log.next_entry().map_err(|error| about(folder, error))? {
            let open = shown(&entry.event, vault)?;
            out.write_all(open.as_deref().unwrap_or(&entry.event))?;
            out.write_all(b"\n")?;
        }
        if !follow {
            return Ok(ExitCode::SUCCESS);
        }
        out.flush()?;
        thread::sleep(LOOK_AGAIN);
    }
}

/// `parts`: what the events are kept in.
fn tell(judged: &Judged, parts: &str, ended: bool, out: &mut impl Write) -> io::Result<ExitCode> {
    let Judged { segments, records, first, last, .. } = judged;
    writeln!(out, "{parts:<15} {segments}")?;
    match last {
        // The records of a topic have no numbers of their own.
        0 => writeln!(out, "records         {records}")?,
        last => writeln!(out, "records         {records} ({first} to {last})")?,
    }
    writeln!(out, "turns begun     {}", judged.begun)?;
    writeln!(out, "turns ended     {} ({} by a crash)", judged.ended, judged.crashed)?;
    writeln!(out, "turns open      {}", judged.open.len())?;
    for (count, what) in [
        (judged.settled, "turns of which it is known what their users got"),
        (judged.untold, "of these, turns whose gateways did not say it in time"),
        (judged.owed.len() as u64, "ended turns of which that is still to be said"),
        (judged.reaped, "ends that were reaped: their orchestrators' logs were lost"),
        (judged.refused, "prompts that were refused and became no turns"),
        (judged.repeated, "events that were delivered again, or reaped too late, and count once"),
        (judged.begun_before, "ends of turns that began in what was let go"),
        (judged.unknown, "events of types that this version does not know"),
        (judged.torn_bytes, "bytes torn off the end: never acknowledged, cut at the next start"),
    ] {
        if count > 0 {
            writeln!(out, "                {count} {what}")?;
        }
    }
    let open = if ended { judged.open.as_slice() } else { &[] };
    writeln!(out, "violations      {}", judged.violations_count + open.len() as u64)?;
    for violation in &judged.violations {
        writeln!(out, "  {violation}")?;
    }
    for turn in open.iter().take(20) {
        writeln!(out, "  turn {turn}: it has no end")?;
    }
    Ok(if judged.is_good() && open.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_without_a_log_holds_nothing_and_no_folder_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let mut out = Vec::new();
        tail(folder.path(), false, None, &mut out).unwrap();
        assert_eq!(out, b"");
        assert_eq!(tell(&verify(folder.path()).unwrap(), "segments", true, &mut out).unwrap(), ExitCode::SUCCESS);
        let missing = tail(&folder.path().join("none"), false, None, &mut out).unwrap_err();
        assert!(missing.to_string().contains("cannot read the event log"), "{missing}");
    }

    #[cfg(feature = "kafka")]
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn what_would_be_reaped_is_said_before_it_is_and_nothing_is_left_of_it_afterwards() {
        use headgate_orchestrator::events::{Producer, Topic};
        use headgate_testkit::{kafka::Kafka, services::OrSkip};

        let test = "what_would_be_reaped_is_said_before_it_is_and_nothing_is_left_of_it_afterwards";
        let Some(kafka) = Kafka::start().await.or_skip(test) else { return };
        let brokers = Brokers::open(vec![kafka.addr().to_string()]);
        let topic = Topic { brokers, name: "reaped".into(), replication: 1, in_sync: 1, partitions: Some(1) };
        let producer = Producer::open(&topic, Duration::from_secs(60)).await.unwrap();
        let turn = headgate_contracts::TurnId::fresh();
        let (subject, id) = (turn.to_string(), headgate_contracts::wire::log::Kind::Accepted.id(turn));
        let headers = [
            ("ce_specversion", "1.0"),
            ("ce_id", &id),
            ("ce_source", "/headgate/orchestrator"),
            ("ce_type", "turn.accepted.v1"),
            ("ce_subject", &subject),
            ("ce_time", "2026-11-21T11:44:05.000Z"),
            ("content-type", "application/json"),
            ("ce_partitionkey", "acme/s1"),
            ("ce_sequence", "00000000000000000001"),
            ("traceparent", ""),
        ];
        producer.write("acme/s1", &headers, b"{}").await.unwrap();
        let said = async |silence: u64, actor: Option<&'static str>| {
            let topic = topic.clone();
            let reaped = tokio::task::spawn_blocking(move || {
                let mut out = Vec::new();
                end_silent(&topic, None, Duration::from_secs(silence), actor, &mut out).map(|_| String::from_utf8(out).unwrap())
            });
            reaped.await.unwrap().unwrap()
        };
        assert_eq!(said(600, Some("ann")).await, "1 turns may still go on: left alone\n0 turns to be ended\n");
        let named = format!("turn {turn} of acme/s1: no end, silent for 0 min\n1 turns to be ended\n");
        assert_eq!(said(0, None).await, named);
        assert_eq!(said(0, Some("ann")).await, format!("{named}ended; each event says by whom: ann\n"));
        assert_eq!(said(0, Some("ann")).await, "0 turns to be ended\n");
        assert_eq!(kafka.read("reaped", 3).await[1].header("ce_reapedby"), Some("ann"));
    }
}
