//! One run is one workload against one peer, started afresh; a cell is all runs of one pair, told by their medians.

use std::{io, path::Path, time::Duration};

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use crate::{
    engine::{self, Mark, Model, Order},
    peer::{self, Cores, Look, Peer},
    workload::{Clients, Workload},
};

/// What is run, and how often.
pub(crate) struct Course<'a> {
    pub(crate) peers: &'a [Peer],
    pub(crate) workloads: &'a [Workload],
    pub(crate) rounds: usize,
    pub(crate) window: Duration,
    pub(crate) headgate: &'a Path,
    pub(crate) cores: Cores,
}

/// Latencies in microseconds.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub(crate) struct Quantiles {
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
    pub(crate) p999_us: f64,
}

impl Quantiles {
    fn of(histogram: &Histogram<u64>) -> Option<Quantiles> {
        let at = |q| histogram.value_at_quantile(q) as f64 / 1000.0;
        (!histogram.is_empty()).then(|| Quantiles { p50_us: at(0.5), p99_us: at(0.99), p999_us: at(0.999) })
    }
}

/// What one run, or the median of several, comes to. An event is a request where the workload is about requests.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Figures {
    pub(crate) per_second: f64,
    /// The peer's processor time per event.
    pub(crate) cpu_us: f64,
    /// Of that, outside the kernel.
    pub(crate) user_us: f64,
    /// From when an event or a request was due.
    pub(crate) due: Quantiles,
    /// From when an event was sent.
    pub(crate) sent: Quantiles,
    /// From a client's leaving until the model saw it.
    pub(crate) leaving: Quantiles,
    pub(crate) open: f64,
    /// Resident memory before the first stream, and what each stream added.
    pub(crate) rss_empty_bytes: f64,
    pub(crate) rss_per_stream_bytes: f64,
    /// The share of its core that the generator used.
    pub(crate) generator_busy: f64,
    /// Cores that neither peer nor generator used, but others.
    pub(crate) foreign_cores: f64,
    /// The most requests that waited for a connection.
    pub(crate) queued: f64,
    pub(crate) left: f64,
    pub(crate) left_unseen: f64,
}

/// Latencies of all runs, as a plot shows them.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Shape {
    /// How many fell into each part of the scale: [`Shape::PER_DECADE`] parts for each decade from 1 us on, equally wide in its
    /// logarithm; the first and the last have what lies beyond.
    pub(crate) parts: Vec<u64>,
    pub(crate) quantiles: Quantiles,
}

impl Shape {
    /// 1 us to 1 s.
    pub(crate) const DECADES: usize = 6;
    pub(crate) const PER_DECADE: usize = 10;

    fn of(histogram: &Histogram<u64>) -> Option<Shape> {
        let mut parts = vec![0; Shape::DECADES * Shape::PER_DECADE];
        for value in histogram.iter_recorded() {
            let us = value.value_iterated_to() as f64 / 1000.0;
            let at = (us.max(1.0).log10() * Shape::PER_DECADE as f64) as usize;
            parts[at.min(Shape::DECADES * Shape::PER_DECADE - 1)] += value.count_at_value();
        }
        Some(Shape { parts, quantiles: Quantiles::of(histogram)? })
    }
}

/// All runs of one workload against one peer.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Cell {
    pub(crate) workload: String,
    pub(crate) peer: String,
    /// Whether it is a Headgate: what goes wrong with others is told, and is no failure.
    pub(crate) ours: bool,
    /// Each figure's median over the runs.
    pub(crate) median: Figures,
    pub(crate) runs: Vec<Figures>,
    pub(crate) faults: Vec<String>,
    pub(crate) shape: Option<Shape>,
}

/// Memory does not vary, and what starts for a quarter of a minute differs by more than its noise.
fn is_once(work: &Workload, peer: &Peer) -> bool {
    work.is_idle() || peer.start_time() > Duration::from_secs(5)
}

/// About how long [`all`] takes.
pub(crate) fn estimate(course: &Course<'_>) -> Duration {
    let pairs = course.workloads.iter().flat_map(|work| course.peers.iter().filter(|peer| peer.serves(work)).map(move |peer| (work, peer)));
    pairs
        .map(|(work, peer)| {
            // Streams are opened at 2,000 a second, things settle, and at the end all are closed.
            let around = Duration::from_millis(700) + Duration::from_micros(750) * work.streams as u32;
            let rounds = if is_once(work, peer) { 1 } else { course.rounds as u32 };
            (peer.start_time() + around + course.window) * rounds
        })
        .sum()
}

/// Runs everything; `tell` is told what comes next, and of how many.
pub(crate) fn all(course: &Course<'_>, tell: &mut dyn FnMut(usize, usize, &str)) -> Vec<Cell> {
    let mut cells: Vec<Cell> = Vec::new();
    let mut latencies: Vec<Option<Histogram<u64>>> = Vec::new();
    let pairs: Vec<(usize, usize)> =
        (0..course.workloads.len()).flat_map(|work| (0..course.peers.len()).map(move |peer| (work, peer))).collect();
    let total = course.rounds * pairs.len();
    for round in 0..course.rounds {
        for (index, &(work, peer)) in pairs.iter().enumerate() {
            // Peers take turns at being first.
            let (work, peer) = (&course.workloads[work], &course.peers[(peer + round) % course.peers.len()]);
            if !peer.serves(work) || (round > 0 && is_once(work, peer)) {
                continue;
            }
            tell(round * pairs.len() + index, total, &format!("{} {peer}", work.name));
            let at = match cells.iter().position(|cell| cell.workload == work.name && cell.peer == peer.name) {
                Some(at) => at,
                None => {
                    cells.push(Cell {
                        workload: work.name.to_owned(),
                        peer: peer.name.clone(),
                        ours: peer.is_ours(),
                        median: Figures::none(),
                        runs: vec![],
                        faults: vec![],
                        shape: None,
                    });
                    latencies.push(None);
                    cells.len() - 1
                }
            };
            let cell = &mut cells[at];
            match run(course, work, peer) {
                Ok((figures, due, faults)) => {
                    cell.runs.push(figures);
                    cell.faults.extend(faults);
                    match &mut latencies[at] {
                        // Of the same bounds, so it fits.
                        Some(all) => drop(all.add(due)),
                        none => *none = Some(due),
                    }
                }
                Err(error) => {
                    let error = error.to_string();
                    // A log that follows is for whoever runs this, not for whoever reads the figures.
                    let mut lines = error.lines();
                    cell.faults.push(format!("could not be run: {}", lines.next().unwrap_or_default()));
                    lines.for_each(|line| eprintln!("{peer}: {line}"));
                }
            }
        }
    }
    for (cell, latencies) in cells.iter_mut().zip(latencies) {
        cell.median = Figures::median(&cell.runs);
        cell.shape = latencies.as_ref().and_then(Shape::of);
    }
    cells
}

/// One run: the figures, the latencies, and what went wrong.
pub(crate) fn run(course: &Course<'_>, work: &Workload, peer: &Peer) -> io::Result<(Figures, Histogram<u64>, Vec<String>)> {
    let model = Model::bind()?;
    let running = peer::start(peer, model.address, course.headgate, course.cores)?;
    let order = Order { work, peer: running.address, prefix: running.prefix, key: &running.key, window: course.window };
    let mut looks = [Look::default(); 3];
    let seen = engine::run(&model, &order, &mut |mark| {
        looks[match mark {
            Mark::Empty => 0,
            Mark::Begin => 1,
            Mark::End => 2,
        }] = running.look()?;
        Ok(())
    })?;
    let [empty, begin, end] = looks;
    let count = if work.is_by_request() { seen.requests } else { seen.events };
    let seconds = seen.window.as_secs_f64();
    let per = |ns: u64| ns as f64 / 1000.0 / count.max(1) as f64;
    let figures = Figures {
        per_second: count as f64 / seconds,
        // A thread that ended takes its time along.
        cpu_us: per(end.cpu_ns.saturating_sub(begin.cpu_ns)),
        user_us: per(end.user_ns.saturating_sub(begin.user_ns)),
        due: Quantiles::of(&seen.due).unwrap_or_default(),
        sent: Quantiles::of(&seen.sent_to_heard).unwrap_or_default(),
        leaving: Quantiles::of(&seen.leaving).unwrap_or_default(),
        open: seen.open as f64,
        rss_empty_bytes: empty.rss_bytes as f64,
        rss_per_stream_bytes: begin.rss_bytes.saturating_sub(empty.rss_bytes) as f64 / seen.open.max(1) as f64,
        generator_busy: (end.own_ns - begin.own_ns) as f64 / 1e9 / seconds,
        foreign_cores: end.foreign_cores(&begin),
        queued: seen.queued as f64,
        left: seen.left as f64,
        left_unseen: seen.left as f64 - seen.leaving.len() as f64,
    };
    let mut faults = seen.faults;
    let more = seen.faults_total.saturating_sub(faults.len() as u64);
    if more > 0 {
        faults.push(format!("and {more} more"));
    }
    let latencies = if matches!(work.clients, Clients::Leave(_)) { seen.leaving } else { seen.due };
    Ok((figures, latencies, faults))
}

macro_rules! each {
    ($runs:ident, $($($path:ident).+),*) => {{
        let mut median = Figures::none();
        $(
            let mut values: Vec<f64> = $runs.iter().map(|run| run.$($path).+).collect();
            values.sort_unstable_by(f64::total_cmp);
            median.$($path).+ = match values.len() {
                0 => 0.0,
                n if n % 2 == 1 => values[n / 2],
                n => (values[n / 2 - 1] + values[n / 2]) / 2.0,
            };
        )*
        median
    }};
}

impl Figures {
    pub(crate) fn none() -> Figures {
        let none = Quantiles::default();
        Figures {
            per_second: 0.0,
            cpu_us: 0.0,
            user_us: 0.0,
            due: none,
            sent: none,
            leaving: none,
            open: 0.0,
            rss_empty_bytes: 0.0,
            rss_per_stream_bytes: 0.0,
            generator_busy: 0.0,
            foreign_cores: 0.0,
            queued: 0.0,
            left: 0.0,
            left_unseen: 0.0,
        }
    }

    fn median(runs: &[Figures]) -> Figures {
        each!(
            runs,
            per_second,
            cpu_us,
            user_us,
            due.p50_us,
            due.p99_us,
            due.p999_us,
            sent.p50_us,
            sent.p99_us,
            sent.p999_us,
            leaving.p50_us,
            leaving.p99_us,
            leaving.p999_us,
            open,
            rss_empty_bytes,
            rss_per_stream_bytes,
            generator_busy,
            foreign_cores,
            queued,
            left,
            left_unseen
        )
    }

    /// The least and the most of the processor time per event.
    pub(crate) fn cpu_range(runs: &[Figures]) -> (f64, f64) {
        runs.iter().fold((f64::MAX, 0.0), |(least, most), run| (run.cpu_us.min(least), run.cpu_us.max(most)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_taken_of_each_figure_by_itself() {
        let run = |cpu_us, p50_us| Figures { cpu_us, due: Quantiles { p50_us, ..Quantiles::default() }, ..Figures::none() };
        let runs = [run(3.0, 10.0), run(1.0, 30.0), run(2.0, 20.0)];
        let median = Figures::median(&runs);
        assert_eq!((median.cpu_us, median.due.p50_us), (2.0, 20.0));
        assert_eq!(Figures::cpu_range(&runs), (1.0, 3.0));
        assert_eq!(Figures::median(&runs[..2]).cpu_us, 2.0);
    }
}
