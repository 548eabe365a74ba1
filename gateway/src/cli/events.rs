//! `headgate events`: shows and judges the log of what became of each turn.

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
    process::ExitCode,
    thread,
    time::Duration,
};

use headgate_orchestrator::events::{Follow, Judged, verify};

use super::{EX_UNAVAILABLE, fail};

/// What to do with a log.
#[derive(clap::Subcommand)]
pub enum Events {
    /// Print events as they were written, one JSON object a line.
    #[command(after_help = "\
Each line is a CloudEvents 1.0 event: `type` says what happened to the turn in `subject`, `data` the facts; never what was said. A
turn has turn.accepted.v1, verdict.input.v1, one of turn.completed.v1, turn.cancelled.v1, turn.denied.v1 and turn.failed.v1, and
at last what its user got, delivery.v1. `headgate schema events/turn.accepted.v1` (and so on) prints their schemas.

The log may be written meanwhile; reading takes no lock. Of a topic, events of one session are printed in order.

Exit codes: 0 printed; 69 the events cannot be read.

Examples:
  headgate events tail /var/lib/headgate/events
  headgate events tail --follow events | jq -r '[.time, .type, .subject] | @tsv'
  headgate events tail --brokers kafka-1:9092,kafka-2:9092")]
    Tail {
        /// Go on with what is written from now on, until stopped.
        #[arg(long, short)]
        follow: bool,
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
  headgate events verify --brokers kafka-1:9092,kafka-2:9092 --topic conversation.events")]
    Verify {
        /// Take open turns for violations.
        #[arg(long)]
        ended: bool,
        /// Where the events are.
        #[command(flatten)]
        from: Source,
    },
}

/// Where the events are.
#[derive(clap::Args)]
pub struct Source {
    /// The folder of the log: `orchestrator.events.folder` of the config.
    #[arg(required_unless_present = "brokers", conflicts_with = "brokers")]
    folder: Option<PathBuf>,
    /// Instead of a folder, the Kafka topic that the events went on to: some of its brokers, each as host:port.
    #[arg(long, value_delimiter = ',')]
    brokers: Vec<String>,
    /// The name of the topic.
    #[arg(long, requires = "brokers", default_value = "conversation.events")]
    topic: String,
}

/// How often a log is looked at for what is new.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// Prints or judges.
pub fn run(events: Events) -> ExitCode {
    let mut out = io::BufWriter::new(io::stdout().lock());
    let done = match &events {
        Events::Tail { follow, from: Source { folder: Some(folder), .. } } => tail(folder, *follow, &mut out),
        Events::Tail { follow, from } => tail_topic(from, *follow, &mut out),
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

fn about(folder: &Path, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("cannot read the event log in {}: {error}", folder.display()))
}

#[cfg(feature = "kafka")]
fn tail_topic(from: &Source, follow: bool, out: &mut impl Write) -> io::Result<ExitCode> {
    use headgate_orchestrator::events::{Unread, follow_topic};
    let each = |event: Option<&[u8]>| match event {
        Some(event) => out.write_all(event).and_then(|()| out.write_all(b"\n")),
        None => out.flush(),
    };
    match follow_topic(&from.brokers, &from.topic, follow, each) {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(Unread::Listener(error)) => Err(error),
        Err(unread @ Unread::Kafka { .. }) => Err(io::Error::other(unread)),
    }
}

#[cfg(feature = "kafka")]
fn judge_topic(from: &Source) -> io::Result<Judged> {
    headgate_orchestrator::events::verify_topic(&from.brokers, &from.topic).map_err(io::Error::other)
}

#[cfg(not(feature = "kafka"))]
fn tail_topic(from: &Source, _follow: bool, _out: &mut impl Write) -> io::Result<ExitCode> {
    judge_topic(from).map(|_| ExitCode::SUCCESS)
}

#[cfg(not(feature = "kafka"))]
fn judge_topic(from: &Source) -> io::Result<Judged> {
    let Source { topic, .. } = from;
    Err(io::Error::other(format!("cannot read the topic {topic}: {}", headgate_orchestrator::events::Unfit::Unbuilt)))
}

fn tail(folder: &Path, follow: bool, out: &mut impl Write) -> io::Result<ExitCode> {
    let mut log = Follow::open(folder).map_err(|error| about(folder, error))?;
    loop {
        while let Some(entry) = log.next_entry().map_err(|error| about(folder, error))? {
            out.write_all(&entry.event)?;
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
        (judged.refused, "prompts that were refused and became no turns"),
        (judged.repeated, "events that were delivered again, and count once"),
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
        tail(folder.path(), false, &mut out).unwrap();
        assert_eq!(out, b"");
        assert_eq!(tell(&verify(folder.path()).unwrap(), "segments", true, &mut out).unwrap(), ExitCode::SUCCESS);
        let missing = tail(&folder.path().join("none"), false, &mut out).unwrap_err();
        assert!(missing.to_string().contains("cannot read the event log"), "{missing}");
    }
}
