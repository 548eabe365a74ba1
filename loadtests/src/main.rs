//! `headgate-load`: what a streaming gateway costs, beside others in the same run, and whether it is correct under load.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a command line speaks to a person")]

mod engine;
mod grow;
mod measure;
mod other;
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
    peer::{Cores, Peer},
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
  headgate-load all                                           everything, beside all peers: writes loadtests/RESULTS.md
  headgate-load --peer nginx                                  all workloads; Headgate with its chain on and off, and nginx
  headgate-load --peer nginx --workload W3 --rounds 5 --plot latency.svg
  headgate-load --peer 'relay=relay --listen {port} --to {model}' --workload W2b     any command, which is told where to listen and to pass on
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
    /// Measure everything beside all peers, and write results.json, RESULTS.md and latency.svg.
    All {
        /// Where to write them.
        #[arg(long, value_name = "FOLDER", default_value = concat!(env!("CARGO_MANIFEST_DIR")))]
        out: PathBuf,
        #[command(flatten)]
        common: Common,
    },
    /// Write RESULTS.md and latency.svg anew from results.json.
    Report {
        /// Where it is, and they go.
        #[arg(long, value_name = "FOLDER", default_value = concat!(env!("CARGO_MANIFEST_DIR")))]
        out: PathBuf,
    },
}

#[derive(clap::Args)]
struct RunArgs {
    /// A peer beside Headgate: nginx, haproxy, envoy, litellm, or any command as 'name=command', with {port} and {model} in it. May be repeated.
    #[arg(long = "peer", value_name = "PEER")]
    peers: Vec<Peer>,
    /// A workload: W1, W1o, W2b, W3, W3h, W3t, W3c, W3w, W3m, W3s, W4, W5, W6. May be repeated; all if none is named.
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
    #[arg(long, default_value_t = 1.0, value_parser = seconds)]
    window: f64,
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

fn seconds(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|seconds| (0.2..=60.0).contains(seconds)).ok_or_else(|| "a window takes 0.2 to 60 seconds".to_owned())
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
        Ok(Cores { apart: !self.anywhere && std::thread::available_parallelism()?.get() > 1, realtime: self.realtime })
    }

    /// Brings this process to where it measures from.
    fn settle(&self, cores: Cores) -> io::Result<()> {
        peer::pin(&[1], cores)?;
        if self.realtime {
            peer::hurry()?;
        }
        // Timers fire when they should, not when it is convenient.
        Ok(rustix::thread::set_current_timer_slack(std::num::NonZeroU64::new(1))?)
    }
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let done = peer::open_many().and_then(|()| match cli.command {
        None => run(cli.run),
        Some(Verb::Smoke { headgate }) => smoke(headgate),
        Some(Verb::Grow(common)) => grow(common),
        Some(Verb::All { out, common }) => everything(&out, common),
        Some(Verb::Report { out }) => rewrite(&out),
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
    let report = measure(&args.common, peers, &workloads, false)?;
    print!("{}", report.tables());
    if let Some(path) = &args.plot {
        fs::write(path, plot::svg(&workloads, &report.cells))?;
    }
    finish(&args.common, &report)
}

fn grow(common: Common) -> io::Result<bool> {
    let report = measure(&common, vec![], &[], true)?;
    print!("{}", report.tables());
    finish(&common, &report)
}

fn everything(out: &Path, common: Common) -> io::Result<bool> {
    let names = ["direct", "headgate", "headgate-bare", "headgate-unsigned", "headgate-two", "nginx", "haproxy", "envoy", "litellm"];
    let peers = names.into_iter().filter_map(|name| name.parse().ok()).collect();
    let report = measure(&common, peers, &workload::all(), true)?;
    fs::write(out.join("results.json"), serde_json::to_string(&report).map_err(io::Error::other)?)?;
    write(out, &report)?;
    println!("{}\nwritten to {}", report.tables(), out.display());
    finish(&common, &report)
}

fn rewrite(out: &Path) -> io::Result<bool> {
    let report: Report = serde_json::from_str(&fs::read_to_string(out.join("results.json"))?).map_err(io::Error::other)?;
    write(out, &report)?;
    Ok(true)
}

/// What people read.
fn write(out: &Path, report: &Report) -> io::Result<()> {
    fs::write(out.join("latency.svg"), plot::svg(&workload::all(), &report.cells))?;
    fs::write(out.join("RESULTS.md"), report.document())
}

/// Measures these peers under these workloads, and how cost grows if that is wanted.
fn measure(common: &Common, mut peers: Vec<Peer>, workloads: &[Workload], growth: bool) -> io::Result<Report> {
    let mut missing = Vec::new();
    peers.retain(|peer| match peer.missing() {
        Some(what) => {
            eprintln!("SKIPPED {what}");
            missing.push(what);
            false
        }
        None => true,
    });
    if !missing.is_empty() && std::env::var_os("HEADGATE_REQUIRE_SERVICES").is_some_and(|value| value == "1") {
        return Err(io::Error::other("HEADGATE_REQUIRE_SERVICES=1: no peer may be missing"));
    }
    let needs_headgate = growth || peers.iter().any(Peer::is_ours);
    let headgate = if needs_headgate { Some(peer::headgate_binary(common.headgate.clone())?) } else { None };
    let cores = common.cores()?;
    let course = Course {
        peers: &peers,
        workloads,
        rounds: usize::from(common.rounds),
        window: Duration::from_secs_f64(common.window),
        headgate: headgate.as_deref().unwrap_or(Path::new("headgate")),
        cores,
    };
    let files = peer::files();
    let estimate = measure::estimate(&course) + if growth { grow::estimate(&course, files) } else { Duration::ZERO };
    eprintln!("this takes about {:.1} minutes", estimate.as_secs_f64() / 60.0);
    let _alone = alone()?;
    let machine = Machine::here(headgate.as_deref(), common.realtime);
    common.settle(cores)?;
    let begin = Instant::now();
    let cells = measure::all(&course, &mut progress);
    let growth = if growth { grow::run(&course, files, &mut progress) } else { Vec::new() };
    clear_progress();
    Ok(Report {
        machine,
        command: command(std::env::args().skip(1)),
        rounds: course.rounds,
        window_seconds: common.window,
        seconds: begin.elapsed().as_secs_f64(),
        cells,
        growth,
        missing,
    })
}

/// What was typed, without the folders of this machine.
fn command(args: impl Iterator<Item = String>) -> String {
    args.fold("headgate-load".to_owned(), |line, arg| line + " " + arg.rsplit('/').next().unwrap_or_default())
}

/// Writes the JSON; true where nothing went wrong with Headgate.
fn finish(common: &Common, report: &Report) -> io::Result<bool> {
    if let Some(path) = &common.json {
        fs::write(path, serde_json::to_string(report).map_err(io::Error::other)?)?;
    }
    Ok(report.is_good())
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
