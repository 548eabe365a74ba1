//! How cost grows: one thing is varied at a time, the rest stays as in W3.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{
    measure::{self, Cell, Course},
    other::Other,
    peer::{Chain, Kind, Peer},
    workload::{self, Workload},
};

/// Events per second in all, whatever the number of streams: what is compared is an event.
const RATE: u64 = 20_000;
/// The same where events are large: 64 MiB a second at most.
const RATE_OF_SIZES: u64 = 1_000;

/// What was measured while one thing was varied.
#[derive(Serialize, Deserialize)]
pub(crate) struct Series {
    /// What was varied.
    pub(crate) name: String,
    /// Events per second.
    pub(crate) rate: u64,
    pub(crate) rows: Vec<Row>,
}

/// One of its values, and one peer at it.
#[derive(Serialize, Deserialize)]
pub(crate) struct Row {
    pub(crate) label: String,
    pub(crate) x: f64,
    pub(crate) cell: Cell,
}

/// One value to measure: how it is called, how much it is, the load, and who is measured.
struct Step {
    label: String,
    x: usize,
    work: Workload,
    peers: Vec<Peer>,
}

fn ground() -> Workload {
    Workload { streams: 400, ..workload::named("W3").unwrap_or_else(|| unreachable!("W3 is in the table")) }
}

fn paced(work: Workload, rate: u64) -> Workload {
    Workload { every: Duration::from_nanos(1_000_000_000 * work.streams as u64 / rate), ..work }
}

/// All that is varied. `files` is how many a process may have open: a stream takes two of a proxy's, which needs
/// some for itself, and two of ours.
fn plan(files: usize) -> Vec<(&'static str, u64, Vec<Step>)> {
    let nginx = Peer { name: Other::Nginx.name().to_owned(), kind: Kind::Other(Other::Nginx) };
    let with = |chain: Chain| Peer::headgate("headgate", chain);
    let both = || vec![nginx.clone(), with(Chain::ALL)];
    let most = 10_000.min(files.saturating_sub(1000) / 2);
    let streams = [1, 10, 100, 1000, most].map(|count| Step {
        label: count.to_string(),
        x: count,
        work: paced(Workload { streams: count, ..ground() }, RATE),
        peers: both(),
    });
    let names = ["none", "auth", "+ rate_limit", "+ moderation", "+ policy_headers", "+ budget", "+ 3 budgets", "+ 8 budgets"];
    let filters = [0, 1, 2, 3, 4, 5, 8, 16].into_iter().zip(names).map(|(filters, name)| Step {
        label: format!("{filters}: {name}"),
        x: filters,
        work: paced(ground(), RATE),
        peers: vec![with(Chain { filters, ..Chain::ALL })],
    });
    let phrases = [1, 10, 100, 1000, 10_000].map(|phrases| Step {
        label: phrases.to_string(),
        x: phrases,
        work: paced(ground(), RATE),
        peers: vec![with(Chain { phrases, ..Chain::ALL })],
    });
    let sizes = [16, 64, 256, 1 << 10, 4 << 10, 16 << 10, 64 << 10].map(|text| Step {
        label: if text < 1024 { format!("{text} B") } else { format!("{} KiB", text >> 10) },
        x: text,
        work: paced(Workload { text, streams: 100, ..ground() }, RATE_OF_SIZES),
        peers: both(),
    });
    vec![
        ("streams", RATE, streams.into()),
        ("filters", RATE, filters.collect()),
        ("phrases", RATE, phrases.into()),
        ("text per event", RATE_OF_SIZES, sizes.into()),
    ]
}

/// About how long [`run`] takes.
pub(crate) fn estimate(course: &Course<'_>, files: usize) -> Duration {
    let steps = plan(files).into_iter().flat_map(|(.., steps)| steps);
    steps.map(|step| measure::estimate(&Course { peers: &step.peers, workloads: &[step.work], ..*course })).sum()
}

/// Measures all series.
pub(crate) fn run(course: &Course<'_>, files: usize, tell: &mut dyn FnMut(usize, usize, &str)) -> Vec<Series> {
    let plan = plan(files);
    let total = plan.iter().map(|(.., steps)| steps.len()).sum();
    let mut done = 0;
    let mut series = Vec::new();
    for (name, rate, steps) in plan {
        let mut rows = Vec::new();
        for Step { label, x, work, peers } in steps {
            tell(done, total, &format!("{name} {label}"));
            done += 1;
            let cells = measure::all(&Course { peers: &peers, workloads: &[work], ..*course }, &mut |_, _, _| {});
            rows.extend(cells.into_iter().map(|cell| Row { label: label.clone(), x: x as f64, cell }));
        }
        series.push(Series { name: name.to_owned(), rate, rows });
    }
    series
}

/// How much worse than linear a step may be: what is noise.
const NOISE: f64 = 1.25;

/// How the cost of an event grew for one peer, from the first value to the last.
#[derive(Debug, PartialEq)]
pub(crate) struct Growth<'a> {
    pub(crate) cost: f64,
    /// How the values themselves did.
    pub(crate) much: f64,
    /// Values between which the cost grew faster than they.
    pub(crate) worse: Vec<(&'a str, &'a str)>,
}

impl Series {
    /// Peers, in the order of their rows.
    pub(crate) fn peers(&self) -> Vec<&str> {
        let mut peers: Vec<&str> = Vec::new();
        for row in &self.rows {
            if !peers.contains(&row.cell.peer.as_str()) {
                peers.push(&row.cell.peer);
            }
        }
        peers
    }

    pub(crate) fn growth(&self, peer: &str) -> Option<Growth<'_>> {
        let rows: Vec<&Row> = self.rows.iter().filter(|row| row.cell.peer == peer && row.cell.median.cpu_us > 0.0).collect();
        let (first, last) = (rows.first()?, rows.last()?);
        let cost = |from: &Row, to: &Row| to.cell.median.cpu_us / from.cell.median.cpu_us;
        let much = |from: &Row, to: &Row| to.x / from.x.max(1.0);
        let worse = rows.windows(2).filter(|pair| cost(pair[0], pair[1]) > NOISE * much(pair[0], pair[1]).max(1.0));
        let worse = worse.map(|pair| (pair[0].label.as_str(), pair[1].label.as_str())).collect();
        Some(Growth { cost: cost(first, last), much: much(first, last), worse })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measure::Figures;

    fn series(costs: &[(usize, f64)]) -> Series {
        let cell = |cpu_us| Cell {
            workload: "W3".to_owned(),
            peer: "headgate".to_owned(),
            ours: true,
            median: Figures { cpu_us, ..Figures::none() },
            runs: vec![],
            faults: vec![],
            shape: None,
        };
        let rows = costs.iter().map(|&(x, cpu_us)| Row { label: x.to_string(), x: x as f64, cell: cell(cpu_us) }).collect();
        Series { name: "streams".to_owned(), rate: RATE, rows }
    }

    #[test]
    fn a_curve_that_is_worse_than_linear_is_named_with_its_place() {
        let linear = series(&[(1, 10.0), (10, 11.0), (100, 120.0)]);
        assert_eq!(linear.growth("headgate"), Some(Growth { cost: 12.0, much: 100.0, worse: vec![] }));
        let worse = series(&[(1, 10.0), (10, 11.0), (100, 1200.0)]);
        assert_eq!(worse.growth("headgate"), Some(Growth { cost: 120.0, much: 100.0, worse: vec![("10", "100")] }));
        assert_eq!(worse.growth("nginx"), None);
    }

    #[test]
    fn what_is_varied_fits_the_files_that_may_be_open() {
        let streams = |files| plan(files)[0].2.iter().map(|step| step.x).max();
        assert_eq!((streams(1 << 20), streams(20_000)), (Some(10_000), Some(9_500)));
    }
}
