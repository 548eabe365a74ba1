//! What was measured, as JSON for programs and, written from that JSON alone, as tables for people.

use std::{fmt::Write as _, fs, path::Path, process::Command};

use serde::{Deserialize, Serialize};

use crate::{
    grow::{Growth, Series},
    measure::{Cell, Figures},
    other::Other,
    workload::{self, Clients, Workload},
};

/// The machine, and when it was measured.
#[derive(Default, Serialize, Deserialize)]
pub(crate) struct Machine {
    date: String,
    processor: String,
    cores: usize,
    kernel: String,
    load: String,
    /// The commit that was checked out, `-dirty` where files differed from it.
    tree: String,
    versions: Vec<String>,
    realtime: bool,
}

/// Everything, as JSON has it.
#[derive(Default, Serialize, Deserialize)]
pub(crate) struct Report {
    pub(crate) machine: Machine,
    /// What was typed.
    pub(crate) command: String,
    pub(crate) rounds: usize,
    pub(crate) window_seconds: f64,
    pub(crate) seconds: f64,
    pub(crate) cells: Vec<Cell>,
    pub(crate) growth: Vec<Series>,
    /// Peers that are not installed.
    pub(crate) missing: Vec<String>,
}

impl Machine {
    pub(crate) fn here(headgate: Option<&Path>, realtime: bool) -> Machine {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let processor =
            read("/proc/cpuinfo").lines().find_map(|line| line.strip_prefix("model name")?.split(": ").nth(1).map(str::to_owned));
        let said = |program: &Path, args: &[&str]| {
            let output = Command::new(program).args(args).output().ok().filter(|output| output.status.success())?;
            String::from_utf8_lossy(&output.stdout).lines().next().map(|line| line.trim().to_owned())
        };
        let headgate = headgate.and_then(|path| said(path, &["--version"]));
        let others = Other::ALL.into_iter().filter(|other| other.missing().is_none()).filter_map(Other::version);
        let unknown = || "unknown".to_owned();
        Machine {
            date: said("date".as_ref(), &["-u", "+%Y-%m-%d %H:%M UTC"]).unwrap_or_else(unknown),
            processor: processor.unwrap_or_else(unknown),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            load: read("/proc/loadavg").split(' ').take(3).collect::<Vec<_>>().join(" "),
            tree: said("git".as_ref(), &["-C", env!("CARGO_MANIFEST_DIR"), "describe", "--always", "--dirty"]).unwrap_or_else(unknown),
            versions: headgate.into_iter().chain(others).collect(),
            realtime,
        }
    }
}

// Writing into a string cannot fail.

impl Report {
    /// The machine and all tables, in Markdown.
    pub(crate) fn tables(&self) -> String {
        let mut out = String::new();
        let _ = writeln!(out, "{}\n", self.conditions());
        self.workloads(&mut out);
        self.growth(&mut out);
        self.wrong(&mut out);
        out
    }

    /// The same with what a reader needs who was not there: `loadtests/RESULTS.md`.
    pub(crate) fn document(&self) -> String {
        let mut out = "# What was measured\n\nWritten by `headgate-load all` from [results.json](results.json), which has every run; `headgate-load report` writes it anew. Nothing in it is copied\nby hand, and a test holds it against the JSON.\n\n".to_owned();
        let _ = writeln!(out, "{}\n\n```\n{}\n```\n\n{HOW_TO_READ}", self.conditions(), self.command);
        self.targets(&mut out);
        out.push_str("![Latency histograms of all peers](latency.svg)\n\n## Every workload\n\n");
        self.workloads(&mut out);
        out.push_str("## How cost grows\n\n");
        self.growth(&mut out);
        out.push_str("## What went wrong, and what was missed\n\n");
        self.wrong(&mut out);
        out
    }

    fn conditions(&self) -> String {
        let Machine { date, processor, cores, kernel, load, tree, versions, realtime } = &self.machine;
        let urgency = if *realtime { " Peer and generator were scheduled in real time." } else { "" };
        format!(
            "{date}: {processor}, {cores} cores, Linux {kernel}; load before it {load}. Tree {tree}; {}. {} runs of {} s for each pair, their medians; {:.0} minutes in all.{urgency}",
            versions.join("; "),
            self.rounds,
            self.window_seconds,
            self.seconds / 60.0
        )
    }

    fn cell(&self, workload: &str, peer: &str) -> Option<&Figures> {
        self.cells.iter().find(|cell| cell.workload == workload && cell.peer == peer && !cell.runs.is_empty()).map(|cell| &cell.median)
    }

    /// Each target, what was measured, and whether it was met.
    fn targets(&self, out: &mut String) {
        out.push_str("## Against the targets\n\nThe chain is on.\n\n| target | measured | beside it | ratio | |\n|---|---|---|---|---|\n");
        let of = |workload, peer, figure: fn(&Figures) -> f64| self.cell(workload, peer).map(figure).filter(|value| *value > 0.0);
        let cpu = |workload, peer| of(workload, peer, |it| it.cpu_us);
        let mut row = |what: &str, unit: &str, value: Option<f64>, beside: Option<(&str, f64)>, most: f64| {
            let Some(value) = value else {
                let _ = writeln!(out, "| {what} | not measured | | | |");
                return;
            };
            let ratio = beside.map(|(_, beside)| value / beside);
            let beside = beside.map_or(String::new(), |(whose, beside)| format!("{whose} {} {unit}", figure(beside)));
            let met = if ratio.unwrap_or(value) <= most { "met" } else { "**missed**" };
            let ratio = ratio.map_or(String::new(), |ratio| format!("{ratio:.2}"));
            let _ = writeln!(out, "| {what} | {} {unit} | {beside} | {ratio} | {met} |", figure(value));
        };
        let nginx = |workload| cpu(workload, "nginx").map(|it| ("nginx", it));
        row("W3, CPU per spaced event: at most nginx's", "us", cpu("W3", "headgate"), nginx("W3"), 1.0);
        row("W2b, CPU per event of a burst: at most nginx's", "us", cpu("W2b", "headgate"), nginx("W2b"), 1.0);
        row("W1, CPU per request: at most 1.2 times nginx's", "us", cpu("W1", "headgate"), nginx("W1"), 1.2);
        let added = |figure: fn(&Figures) -> f64| Some(of("W3h", "headgate", figure)? - of("W3h", "direct", figure)?);
        row("W3h, added latency, p50: at most 60 us", "us", added(|it| it.sent.p50_us), None, 60.0);
        row("W3h, added latency, p99: at most 250 us", "us", added(|it| it.sent.p99_us), None, 250.0);
        let memory = of("W4", "headgate", |it| it.rss_per_stream_bytes);
        row("W4, memory per idle stream: at most 12 KiB", "bytes", memory, None, 12288.0);
        row("W4, memory per idle stream: stretch, at most 4 KiB", "bytes", memory, None, 4096.0);
        row("W5, a leaving seen by the model, p99: at most 1 ms", "us", of("W5", "headgate", |it| it.leaving.p99_us), None, 1000.0);
        let events = cpu("W3", "headgate").map(|it| ("as server-sent events", it));
        row(
            "W3w, CPU per event, a WebSocket for each stream: at most 1.2 times that of server-sent events",
            "us",
            cpu("W3w", "headgate"),
            events,
            1.2,
        );
        row("W3m, the same with 20 turns on each of 50 WebSockets", "us", cpu("W3m", "headgate"), events, 1.2);
        // Twice the processors must give 1.8 times as much: what one costs may grow by 2 / 1.8.
        for (workload, unit) in [("W1", "request"), ("W6", "event")] {
            let one = cpu(workload, "headgate").map(|it| ("one worker", it));
            row(
                &format!("{workload}, two workers on two cores take 1.8 times as much as one: CPU per {unit} at most 1.11 times"),
                "us",
                cpu(workload, "headgate-two"),
                one,
                2.0 / 1.8,
            );
        }
        out.push('\n');
        for workload in ["W1", "W6"] {
            let seen = |peer| of(workload, peer, |it| it.per_second).zip(self.cell(workload, peer));
            if let (Some((one, _)), Some((two, it))) = (seen("headgate"), seen("headgate-two")) {
                let _ = writeln!(
                    out,
                    "In {workload} two workers took {:.2} times as much as one, while the generator used {:.0} % of one of their two cores: what they take by themselves is told by the CPU time.\n",
                    two / one,
                    it.generator_busy * 100.0
                );
            }
        }
    }

    fn workloads(&self, out: &mut String) {
        for work in workload::all() {
            let cells: Vec<&Cell> = self.cells.iter().filter(|cell| cell.workload == work.name && !cell.runs.is_empty()).collect();
            if cells.is_empty() {
                continue;
            }
            let _ = writeln!(out, "### {}: {}\n", work.name, work.about);
            if work.is_idle() {
                memory(out, &cells);
            } else if matches!(work.clients, Clients::Leave(_)) {
                leaving(out, &cells);
            } else {
                cost(out, &work, &cells);
            }
            out.push('\n');
        }
    }

    fn growth(&self, out: &mut String) {
        for series in &self.growth {
            let Series { name, rate, rows } = series;
            let _ = writeln!(
                out,
                "### By {name}, at {} events a second\n\n| {name} | peer | n | CPU us/event | of it user | from due: p50 us | p99 us | generator busy | others' cores |\n|---|---|---|---|---|---|---|---|---|",
                thousands(*rate as f64)
            );
            for row in rows.iter().filter(|row| !row.cell.runs.is_empty()) {
                let (m, (least, most)) = (&row.cell.median, Figures::cpu_range(&row.cell.runs));
                let _ = writeln!(
                    out,
                    "| {} | {} | {} | {:.2} ({least:.2}-{most:.2}) | {:.2} | {:.0} | {:.0} | {:.2} | {:.2} |",
                    row.label,
                    row.cell.peer,
                    row.cell.runs.len(),
                    m.cpu_us,
                    m.user_us,
                    m.due.p50_us,
                    m.due.p99_us,
                    m.generator_busy,
                    m.foreign_cores
                );
            }
            out.push('\n');
            for peer in series.peers() {
                let Some(Growth { cost, much, worse }) = series.growth(peer) else { continue };
                let _ = write!(out, "{peer}: {} times as much costs {cost:.2} times as much per event; ", thousands(much));
                let _ = match worse.as_slice() {
                    [] => writeln!(out, "nowhere worse than linear.\n"),
                    worse => {
                        let places: Vec<String> = worse.iter().map(|(from, to)| format!("from {from} to {to}")).collect();
                        writeln!(out, "**worse than linear** {}.\n", places.join(", "))
                    }
                };
            }
        }
    }

    /// Everything that went wrong, is missing, or was disturbed.
    fn wrong(&self, out: &mut String) {
        let cells = || self.cells.iter().chain(self.growth.iter().flat_map(|series| series.rows.iter().map(|row| &row.cell)));
        let faults: Vec<String> =
            cells().flat_map(|cell| cell.faults.iter().map(move |fault| format!("- {} {}: {fault}", cell.workload, cell.peer))).collect();
        let _ = match faults.as_slice() {
            [] => writeln!(out, "Every event arrived once and in order, and every answer ended."),
            faults => writeln!(out, "FAULTS. All else arrived once and in order, and ended.\n\n{}", faults.join("\n")),
        };
        for missing in &self.missing {
            let _ = writeln!(out, "\nNOT MEASURED: {missing}.");
        }
        let most = cells().filter(|cell| !cell.runs.is_empty()).map(|cell| cell.median.foreign_cores).fold(0.0, f64::max);
        if most > DISTURBED {
            let _ = writeln!(
                out,
                "\nDISTURBED: others used up to {most:.2} cores of this machine meanwhile. Measure again before anybody quotes it."
            );
        }
    }

    /// Whether nothing went wrong with Headgate itself.
    pub(crate) fn is_good(&self) -> bool {
        let rows = self.growth.iter().flat_map(|series| &series.rows).map(|row| &row.cell);
        self.cells.iter().chain(rows).all(|cell| !cell.ours || cell.faults.is_empty())
    }
}

/// Cores that others may use without a word about it.
const DISTURBED: f64 = 0.25;

const HOW_TO_READ: &str = "How to read it:

- Clients and the model server are one process on core 1; the peer is alone on core 0, with one worker. CPU is the time of all of the peer's threads and processes, in the
  kernel's nanoseconds (`schedstat`); \"of it user\" comes from ticks of 10 ms and is rough. Every peer writes a log line for each request.
- `headgate` has the whole chain: auth by key, rate limit, moderation with 1,000 phrases and nine detectors, signed policy headers, budget, and the three that stand
  in every chain. `headgate-bare` has those three; `headgate-unsigned` has all but the signed policy headers. `headgate-two` is `headgate` with two workers, on
  both cores, one of which the generator uses too.
- `headgate-pgo` in the command is the release build laid out by what such a run calls (`make pgo`); `headgate` is the plain one.
- nginx, HAProxy and Envoy pass everything on unread, as `loadtests/src/other.rs` sets them up; LiteLLM reads and writes every event.
- Latency \"from due\" counts from when the timetable wanted the event, whatever the generator did: nothing is left out that came late. \"From sending\" leaves the
  generator's own lateness away. `direct` is the harness without a peer; added latency is what is beyond it.
- At 50,000 events a second (W3, W3w, W3m) the generator is short of time: they are good for CPU per event. W3h and W3s are good for latency.
- Compare within one table only: at a lower rate each event wakes the peer by itself and costs more processor time, for every peer.
- W3t: models' tokens begin with a blank, so each ends with a word that may still become an e-mail address. With that detector on it waits for the next token.
- What one event costs without sockets is counted in instructions: `benches/counts.yaml`. Where the time goes, and what was tried, is in
  [docs/decisions](../docs/decisions/README.md).
";

fn cost(out: &mut String, work: &Workload, cells: &[&Cell]) {
    let nginx = cells.iter().find(|cell| cell.peer == "nginx").map(|cell| cell.median.cpu_us);
    let (unit, sent) = if work.is_by_request() { ("request", false) } else { ("event", true) };
    let sent_head = if sent { " from sending: p50 us | p99 us | p99.9 us |" } else { "" };
    let rule = if sent { "---|---|---|" } else { "" };
    let _ = writeln!(
        out,
        "| peer | n | {unit}s/s | CPU us/{unit} | of it user | x nginx | from due: p50 us | p99 us | p99.9 us |{sent_head} generator busy | others' cores |\n|---|---|---|---|---|---|---|---|---|{rule}---|---|"
    );
    for cell in cells {
        let m = &cell.median;
        let is_direct = cell.peer == "direct";
        let (least, most) = Figures::cpu_range(&cell.runs);
        let cpu = if is_direct { "-".to_owned() } else { format!("{:.2} ({least:.2}-{most:.2})", m.cpu_us) };
        let user = if is_direct { "-".to_owned() } else { format!("{:.2}", m.user_us) };
        let ratio = nginx.filter(|_| !is_direct).map_or("-".to_owned(), |nginx| format!("{:.2}", m.cpu_us / nginx));
        let _ = write!(
            out,
            "| {} | {} | {} | {cpu} | {user} | {ratio} | {:.0} | {:.0} | {:.0} |",
            cell.peer,
            cell.runs.len(),
            thousands(m.per_second),
            m.due.p50_us,
            m.due.p99_us,
            m.due.p999_us
        );
        if sent {
            let _ = write!(out, " {:.0} | {:.0} | {:.0} |", m.sent.p50_us, m.sent.p99_us, m.sent.p999_us);
        }
        let _ = writeln!(out, " {:.2} | {:.2} |", m.generator_busy, m.foreign_cores);
    }
}

fn memory(out: &mut String, cells: &[&Cell]) {
    let _ = writeln!(out, "| peer | streams open | bytes/stream | MB before |\n|---|---|---|---|");
    for cell in cells.iter().filter(|cell| cell.peer != "direct") {
        let m = &cell.median;
        let _ = writeln!(
            out,
            "| {} | {} | {} | {:.1} |",
            cell.peer,
            thousands(m.open),
            thousands(m.rss_per_stream_bytes),
            m.rss_empty_bytes / 1e6
        );
    }
}

fn leaving(out: &mut String, cells: &[&Cell]) {
    let _ = writeln!(out, "| peer | n | clients left | model not told | p50 us | p99 us | others' cores |\n|---|---|---|---|---|---|---|");
    for cell in cells {
        let m = &cell.median;
        let _ = writeln!(
            out,
            "| {} | {} | {:.0} | {:.0} | {:.0} | {:.0} | {:.2} |",
            cell.peer,
            cell.runs.len(),
            m.left,
            m.left_unseen,
            m.leaving.p50_us,
            m.leaving.p99_us,
            m.foreign_cores
        );
    }
}

fn thousands(value: f64) -> String {
    let digits = format!("{value:.0}");
    let mut out = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// A figure with as many digits as it deserves.
fn figure(value: f64) -> String {
    if value < 100.0 { format!("{value:.2}") } else { thousands(value) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plot;

    #[test]
    fn thousands_are_told_apart() {
        for (value, text) in [(0.0, "0"), (999.4, "999"), (1000.0, "1,000"), (1234567.0, "1,234,567")] {
            assert_eq!(thousands(value), text);
        }
    }

    fn cell(workload: &str, peer: &str, cpu_us: f64) -> Cell {
        let figures = Figures { cpu_us, ..Figures::none() };
        let (runs, ours) = (vec![figures.clone()], peer.starts_with("headgate"));
        Cell { workload: workload.to_owned(), peer: peer.to_owned(), ours, median: figures, runs, faults: vec![], shape: None }
    }

    #[test]
    fn a_target_is_met_missed_or_not_measured() {
        let cells =
            vec![cell("W3", "headgate", 20.0), cell("W3", "nginx", 10.0), cell("W3w", "headgate", 21.0), cell("W2b", "headgate", 1.0)];
        let mut out = String::new();
        Report { cells, ..Report::default() }.targets(&mut out);
        let row = |name: &str| out.lines().find(|line| line.starts_with(&format!("| {name}"))).unwrap().to_owned();
        assert!(row("W3,").ends_with("| 20.00 us | nginx 10.00 us | 2.00 | **missed** |"), "{out}");
        assert!(row("W3w,").ends_with("| 21.00 us | as server-sent events 20.00 us | 1.05 | met |"), "{out}");
        assert!(row("W4,").contains("not measured"), "{out}");
    }

    #[test]
    fn what_goes_wrong_with_others_is_told_and_is_no_failure() {
        let wrong = |peer: &str| {
            let cells = vec![Cell { faults: vec!["stream 1 was cut".to_owned()], ..cell("W3", peer, 1.0) }];
            Report { cells, missing: vec!["envoy is not installed".to_owned()], ..Report::default() }
        };
        assert!(wrong("nginx").is_good() && !wrong("headgate").is_good());
        let told = wrong("nginx").document();
        assert!(told.contains("W3 nginx: stream 1 was cut") && told.contains("NOT MEASURED: envoy is not installed"), "{told}");
    }

    #[test]
    fn what_is_published_is_what_its_json_says() {
        let read = |name: &str| fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(name)).unwrap();
        let report: Report = serde_json::from_str(&read("results.json")).unwrap();
        assert!(read("RESULTS.md") == report.document(), "RESULTS.md: run `headgate-load report`");
        assert!(read("latency.svg") == plot::svg(&workload::all(), &report.cells), "latency.svg: run `headgate-load report`");
    }
}
