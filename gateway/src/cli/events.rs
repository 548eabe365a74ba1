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
turn has turn.accepted.v1, verdict.input.v1, and at last one of turn.completed.v1, turn.cancelled.v1, turn.denied.v1 and
turn.failed.v1. `headgate schema events/turn.accepted.v1` (and so on) prints their schemas.

The log may be written meanwhile; reading takes no lock.

Exit codes: 0 printed; 69 the folder cannot be read.

Examples:
  headgate events tail /var/lib/headgate/events
  headgate events tail --follow events | jq -r '[.time, .type, .subject] | @tsv'")]
    Tail {
        /// Go on with what is written from now on, until stopped.
        #[arg(long, short)]
        follow: bool,
        /// The folder of the log: `orchestrator.events.folder` of the config.
        folder: PathBuf,
    },
    /// Check that every record is whole and in order, and that every turn begins once and ends once.
    #[command(after_help = "\
A turn without an end is open: it runs, or a crash cut it, and the orchestrator's next start gives it turn.failed.v1 with the reason
`crash`. With --ended open turns are violations: for the log of an orchestrator that was stopped and not killed.

Exit codes: 0 all is well; 1 there are violations, the first of them printed; 69 the folder cannot be read.

Examples:
  headgate events verify /var/lib/headgate/events
  headgate events verify --ended events")]
    Verify {
        /// Take open turns for violations.
        #[arg(long)]
        ended: bool,
        /// The folder of the log: `orchestrator.events.folder` of the config.
        folder: PathBuf,
    },
}

/// How often a log is looked at for what is new.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// Prints or judges.
pub fn run(events: Events) -> ExitCode {
    let mut out = io::BufWriter::new(io::stdout().lock());
    let done = match &events {
        Events::Tail { follow, folder } => tail(folder, *follow, &mut out).map(|()| ExitCode::SUCCESS),
        Events::Verify { ended, folder } => {
            verify(folder).map_err(|error| about(folder, error)).and_then(|judged| tell(&judged, *ended, &mut out))
        }
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

fn tail(folder: &Path, follow: bool, out: &mut impl Write) -> io::Result<()> {
    let mut log = Follow::open(folder).map_err(|error| about(folder, error))?;
    loop {
        while let Some(entry) = log.next_entry().map_err(|error| about(folder, error))? {
            out.write_all(&entry.event)?;
            out.write_all(b"\n")?;
        }
        if !follow {
            return Ok(());
        }
        out.flush()?;
        thread::sleep(LOOK_AGAIN);
    }
}

fn tell(judged: &Judged, ended: bool, out: &mut impl Write) -> io::Result<ExitCode> {
    let Judged { segments, records, first, last, .. } = judged;
    writeln!(out, "segments        {segments}")?;
    writeln!(out, "records         {records} ({first} to {last})")?;
    writeln!(out, "turns begun     {}", judged.begun)?;
    writeln!(out, "turns ended     {} ({} by a crash)", judged.ended, judged.crashed)?;
    writeln!(out, "turns open      {}", judged.open.len())?;
    for (count, what) in [
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
        assert_eq!(tell(&verify(folder.path()).unwrap(), true, &mut out).unwrap(), ExitCode::SUCCESS);
        let missing = tail(&folder.path().join("none"), false, &mut out).unwrap_err();
        assert!(missing.to_string().contains("cannot read the event log"), "{missing}");
    }
}
