//! Latency histograms of all peers side by side, as one SVG.

use std::fmt::Write as _;

use crate::{
    measure::{Cell, Quantiles, Shape},
    workload::Workload,
};

const ROW: f64 = 46.0;
const LEFT: f64 = 120.0;
const WIDTH: f64 = 640.0;

/// Draws every cell that has latencies; `workloads` gives the order.
pub(crate) fn svg(workloads: &[Workload], cells: &[Cell]) -> String {
    let mut body = String::new();
    let mut y = 20.0;
    for work in workloads {
        let of_work = cells.iter().filter(|cell| cell.workload == work.name);
        let rows: Vec<_> = of_work.filter_map(|cell| Some((cell.peer.as_str(), cell.shape.as_ref()?))).collect();
        if rows.is_empty() {
            continue;
        }
        // Writing into a string cannot fail.
        let _ = writeln!(body, "<text class='title' x='10' y='{y:.0}'>{}: {}</text>", work.name, escaped(work.about));
        y += 12.0;
        for (peer, shape) in &rows {
            row(&mut body, y, peer, shape);
            y += ROW;
        }
        axis(&mut body, y);
        y += 44.0;
    }
    format!(
        "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {:.0} {y:.0}' font-family='sans-serif' font-size='11'>
<style>
  text {{ fill: #222 }} .title {{ font-weight: bold }} .bar {{ fill: #4477aa }} .mark {{ stroke: #cc3311; stroke-width: 1 }} .line {{ stroke: #999; stroke-width: .5 }}
  @media (prefers-color-scheme: dark) {{ text {{ fill: #ddd }} .bar {{ fill: #77aadd }} .mark {{ stroke: #ee7733 }} }}
</style>
{body}</svg>
",
        LEFT + WIDTH + 20.0
    )
}

fn x(us: f64) -> f64 {
    LEFT + WIDTH * (us.max(1.0).log10() / Shape::DECADES as f64).min(1.0)
}

fn row(body: &mut String, y: f64, peer: &str, shape: &Shape) {
    let bars = &shape.parts;
    let most = bars.iter().copied().max().unwrap_or(1).max(1) as f64;
    let (floor, width) = (y + ROW - 8.0, WIDTH / bars.len().max(1) as f64);
    let _ = writeln!(body, "<text x='10' y='{:.1}'>{}</text>", floor - 4.0, escaped(peer));
    for (at, &count) in bars.iter().enumerate().filter(|(_, count)| **count > 0) {
        let height = (f64::max(count as f64 / most, 0.02)) * (ROW - 14.0);
        let (left, top) = (LEFT + at as f64 * width, floor - height);
        let _ = writeln!(body, "<rect class='bar' x='{left:.1}' y='{top:.1}' width='{:.1}' height='{height:.1}'/>", width - 0.5);
    }
    let Quantiles { p50_us, p99_us, p999_us } = shape.quantiles;
    for (us, name) in [(p50_us, "p50"), (p99_us, "p99"), (p999_us, "p99.9")] {
        let at = x(us);
        let _ = writeln!(
            body,
            "<line class='mark' x1='{at:.1}' x2='{at:.1}' y1='{:.1}' y2='{floor:.1}'><title>{name} {us:.0} us</title></line>",
            y + 4.0
        );
    }
    let _ = writeln!(body, "<line class='line' x1='{LEFT}' x2='{:.0}' y1='{floor:.1}' y2='{floor:.1}'/>", LEFT + WIDTH);
}

fn axis(body: &mut String, y: f64) {
    for (at, name) in ["1 us", "10 us", "100 us", "1 ms", "10 ms", "100 ms", "1 s"].iter().enumerate() {
        let at = LEFT + WIDTH * at as f64 / Shape::DECADES as f64;
        let _ = writeln!(body, "<text x='{at:.0}' y='{:.0}' text-anchor='middle'>{name}</text>", y + 6.0);
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        measure::{Course, all},
        peer::{Cores, Peer},
        workload,
    };

    #[test]
    fn a_plot_shows_each_peer_and_its_quantiles() {
        let workloads = [workload::named("W3").unwrap().small()];
        let course = Course {
            peers: &["direct".parse::<Peer>().unwrap()],
            workloads: &workloads,
            rounds: 2,
            window: std::time::Duration::from_millis(200),
            headgate: std::path::Path::new("none"),
            cores: Cores { apart: false, realtime: false },
        };
        let cells = all(&course, &mut |_, _, _| {});
        assert_eq!((cells.len(), cells[0].runs.len(), &cells[0].faults), (1, 2, &vec![]));
        let plot = svg(&workloads, &cells);
        for part in ["W3", "direct", "class='bar'", "p50", "p99.9", "</svg>"] {
            assert!(plot.contains(part), "{part}");
        }
    }
}
