//! `headgate-load`: what a streaming gateway costs, beside others in the same run, and whether it is correct under load.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a command line speaks to a person")]

mod engine;
mod grow;
mod measure;
mod peer;
mod plot;
mod reply;
mod report;
mod smoke;
mod words;
mod workload;

use std::{
    fs,
    io::{self, IsTerminal},
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use clap::{Parser, Subcommand};

use crate::{
    measure::Course,
    peer::{Cores, Kind, Peer},
    report::{Machine, Report},
    workload::Workload,
};

/// Loads Headgate and its peers with paced streams and says what an event, a request and an idle stream cost.
///
/// Clients and model server run in this one process, on one core; each peer runs alone on another. The model sends by a
/// timetable that nothing delays, and latency counts from when an event was due. The row `direct` is the harness itself.
#[derive(Parser)]
#[command(
    name = "headgate-load",
    args_conflicts_with_subcommands = true,
    after_help = "\
Examples:
  headgate-load --peer nginx                                  all workloads; Headgate with its chain on and off, and nginx
  headgate-load --peer nginx --workload W3 --rounds 5 --plot latency.svg
  headgate-load --peer 'envoy=envoy --config-path {port}.yaml' --workload W2b      {port}: where to listen, {model}: where to pass on to
  headgate-load grow                                          how cost grows with streams, filters, phrases, size
  headgate-load smoke                                         half a minute, correctness only: for CI"
)]
struct Cli {
    #[command(subcommand)]
    command: Option<Verb>,
    #[command(flatten)]
    run: RunArgs,
}

#[derive(Subcommand)]
enum Verb {
    /// Ask whether a whole gateway is correct, in half a minute. Fails on anything lost, reordered, leaked or left open.
    Smoke {
        /// The gateway's binary; built if not named.
        #[arg(long)]
        headgate: Option<PathBuf>,
    },
    /// Measure how the cost of an event grows with streams, filters, phrases and size.
    Grow(Common),
}

#[derive(clap::Args)]
struct RunArgs {
    /// A peer beside Headgate: nginx, or any command as 'name=command', with {port} and {model} in it. May be repeated.
    #[arg(long = "peer", value_name = "PEER")]
    peers: Vec<Peer>,
    /// A workload: W1, W1o, W2b, W3, W3h, W3t, W3c, W3w, W4, W5. May be repeated; all if none is named.
    #[arg(long = "workload", value_name = "NAME", value_parser = |name: &str| workload::named(name).ok_or("no such workload"))]
    workloads: Vec<Workload>,
    /// Measure only what --peer names.
    #[arg(long)]
    only: bool,
    /// Draw latency histograms here, as SVG.
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
    #[command(flatten)]
    common: Common,
}

#[derive(clap::Args)]
struct Common {
    /// Runs of each pair; medians are told.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=50))]
    rounds: u8,
    /// Seconds that are measured in each run.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=60))]
    window: u8,
    /// The gateway's binary; built if not named.
    #[arg(long)]
    headgate: Option<PathBuf>,
    /// Write everything here, as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Schedule peer and generator before everything else: for a machine that others use too. Needs root.
    #[arg(long)]
    realtime: bool,
    /// Leave it to the system what runs on which core.
    #[arg(long)]
    anywhere: bool,
}

/// Held while this program measures: two at once would measure each other. Waits for its turn, up to ten minutes.
fn alone() -> io::Result<fs::File> {
    let file = fs::File::create(std::env::temp_dir().join("headgate-load.lock"))?;
    for _ in 0..1200 {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(fs::TryLockError::WouldBlock) => std::thread::sleep(Duration::from_millis(500)),
            Err(fs::TryLockError::Error(error)) => return Err(error),
        }
    }
    Err(io::Error::other("another headgate-load is measuring on this machine"))
}

impl Common {
    fn cores(&self) -> io::Result<Cores> {
        let cores = Cores { apart: !self.anywhere && std::thread::available_parallelism()?.get() > 1, realtime: self.realtime };
        peer::pin(1, cores)?;
        if self.realtime {
            peer::hurry()?;
        }
        // Timers fire when they should, not when it is convenient.
        rustix::thread::set_current_timer_slack(std::num::NonZeroU64::new(1))?;
        Ok(cores)
    }
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let done = peer::open_many().and_then(|()| match cli.command {
        None => run(cli.run),
        Some(Verb::Smoke { headgate }) => smoke(headgate),
        Some(Verb::Grow(common)) => grow(&common),
    });
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("headgate-load: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: RunArgs) -> io::Result<bool> {
    let mut peers = args.peers;
    if !args.only {
        let own = ["direct", "headgate", "headgate-bare"].into_iter().filter_map(|name| name.parse().ok());
        let (before, named) = (own.collect::<Vec<Peer>>(), std::mem::take(&mut peers));
        let later = named.into_iter().filter(|peer| before.iter().all(|other| other.name != peer.name)).collect::<Vec<_>>();
        peers.extend(before.into_iter().chain(later));
    }
    if peers.is_empty() {
        return Err(io::Error::other("--only without --peer measures nothing"));
    }
    let workloads = if args.workloads.is_empty() { workload::all() } else { args.workloads };
    let needs_headgate = peers.iter().any(|peer| matches!(peer.kind, Kind::Headgate(_) | Kind::HeadgateProxy));
    let headgate = if needs_headgate { Some(peer::headgate_binary(args.common.headgate.clone())?) } else { None };
    let _alone = alone()?;
    let machine = Machine::here(headgate.as_deref(), args.common.realtime);
    let cores = args.common.cores()?;
    let course = Course {
        peers: &peers,
        workloads: &workloads,
        rounds: usize::from(args.common.rounds),
        window: Duration::from_secs(u64::from(args.common.window)),
        headgate: headgate.as_deref().unwrap_or(Path::new("headgate")),
        cores,
    };
    let cells = measure::all(&course, &mut progress);
    clear_progress();
    print!("{}", report::tables(&machine, &workloads, &cells));
    if let Some(path) = &args.plot {
        fs::write(path, plot::svg(&workloads, &cells))?;
    }
    finish(&args.common, &machine, &cells)
}

fn grow(common: &Common) -> io::Result<bool> {
    let headgate = peer::headgate_binary(common.headgate.clone())?;
    let _alone = alone()?;
    let machine = Machine::here(Some(&headgate), common.realtime);
    let course = Course {
        peers: &[],
        workloads: &[],
        rounds: usize::from(common.rounds),
        window: Duration::from_secs(u64::from(common.window)),
        headgate: &headgate,
        cores: common.cores()?,
    };
    let (tables, cells) = grow::tables(&course, &mut progress);
    clear_progress();
    println!("{}\n{tables}", report::tables(&machine, &[], &cells));
    finish(common, &machine, &cells)
}

/// Writes the JSON; true where nothing went wrong.
fn finish(common: &Common, machine: &Machine, cells: &[measure::Cell]) -> io::Result<bool> {
    if let Some(path) = &common.json {
        let report = Report { machine, window_seconds: f64::from(common.window), cells };
        fs::write(path, serde_json::to_string_pretty(&report).map_err(io::Error::other)?)?;
    }
    Ok(cells.iter().all(|cell| cell.faults.is_empty()))
}

fn smoke(headgate: Option<PathBuf>) -> io::Result<bool> {
    let headgate = peer::headgate_binary(headgate)?;
    let begin = Instant::now();
    let failures = smoke::run(&headgate, &mut |name, outcome| match outcome {
        Ok(()) => println!("ok      {name}"),
        Err(why) => println!("FAILED  {name}: {why}"),
    });
    let seconds = begin.elapsed().as_secs_f64();
    match failures.len() {
        0 => println!("smoke: all is well, in {seconds:.0} s"),
        failed => println!("smoke: {failed} failed, in {seconds:.0} s"),
    }
    Ok(failures.is_empty())
}

/// One line that is written over, where somebody looks.
fn progress(done: usize, total: usize, what: &str) {
    if !io::stderr().is_terminal() {
        return;
    }
    let filled = 30 * done / total.max(1);
    eprint!("\r\x1b[K[{}{}] {done}/{total} {what}", "#".repeat(filled), ".".repeat(30 - filled));
}

fn clear_progress() {
    if io::stderr().is_terminal() {
        eprint!("\r\x1b[K");
    }
}
