//! What was measured, as tables for people and as JSON for programs.

use std::{fmt::Write as _, fs, process::Command};

use serde::Serialize;

use crate::{
    measure::{Cell, Figures},
    workload::{Clients, Workload},
};

/// The machine, and when it was measured.
#[derive(Serialize)]
pub(crate) struct Machine {
    processor: String,
    cores: usize,
    kernel: String,
    load: String,
    versions: Vec<String>,
    realtime: bool,
}

/// Everything, as JSON has it.
#[derive(Serialize)]
pub(crate) struct Report<'a> {
    pub(crate) machine: &'a Machine,
    pub(crate) window_seconds: f64,
    pub(crate) cells: &'a [Cell],
}

impl Machine {
    pub(crate) fn here(headgate: Option<&std::path::Path>, realtime: bool) -> Machine {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let processor =
            read("/proc/cpuinfo").lines().find_map(|line| line.strip_prefix("model name")?.split(": ").nth(1).map(str::to_owned));
        let said = |program: &std::ffi::OsStr, arg: &str| {
            let output = Command::new(program).arg(arg).output().ok()?;
            // nginx tells its version on standard error.
            let text = [output.stdout, output.stderr].concat();
            String::from_utf8_lossy(&text).lines().next().map(|line| line.trim().to_owned())
        };
        let headgate = headgate.and_then(|path| said(path.as_os_str(), "--version"));
        Machine {
            processor: processor.unwrap_or_else(|| "unknown".to_owned()),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            load: read("/proc/loadavg").split(' ').take(3).collect::<Vec<_>>().join(" "),
            versions: [headgate, said("nginx".as_ref(), "-v")].into_iter().flatten().collect(),
            realtime,
        }
    }
}

/// The tables, in Markdown.
pub(crate) fn tables(machine: &Machine, workloads: &[Workload], cells: &[Cell]) -> String {
    let mut out = String::new();
    let Machine { processor, cores, kernel, load, versions, realtime } = machine;
    let urgency = if *realtime { ", peer and generator scheduled in real time" } else { "" };
    // Writing into a string cannot fail.
    let _ = writeln!(out, "{processor}, {cores} cores, Linux {kernel}; load before {load}; {}{urgency}\n", versions.join(", "));
    for work in workloads {
        let cells: Vec<&Cell> = cells.iter().filter(|cell| cell.workload == work.name && !cell.runs.is_empty()).collect();
        if cells.is_empty() {
            continue;
        }
        let _ = writeln!(out, "### {}: {}\n", work.name, work.about);
        let nginx = cells.iter().find(|cell| cell.peer == "nginx").map(|cell| cell.median.cpu_us);
        if work.is_idle() {
            memory(&mut out, &cells);
        } else if matches!(work.clients, Clients::Leave(_)) {
            leaving(&mut out, &cells);
        } else {
            cost(&mut out, work, &cells, nginx);
        }
        out.push('\n');
    }
    let faults: Vec<String> =
        cells.iter().flat_map(|cell| cell.faults.iter().map(move |fault| format!("- {} {}: {fault}", cell.workload, cell.peer))).collect();
    let _ = match faults.as_slice() {
        [] => writeln!(out, "Every event arrived once and in order, and every answer ended."),
        faults => writeln!(out, "FAULTS\n\n{}", faults.join("\n")),
    };
    out
}

fn cost(out: &mut String, work: &Workload, cells: &[&Cell], nginx: Option<f64>) {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thousands_are_told_apart() {
        for (value, text) in [(0.0, "0"), (999.4, "999"), (1000.0, "1,000"), (1234567.0, "1,234,567")] {
            assert_eq!(thousands(value), text);
        }
    }
}
