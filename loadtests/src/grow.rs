//! How cost grows: one thing is varied at a time, the rest stays as in W3.

use std::{fmt::Write as _, time::Duration};

use crate::{
    measure::{Cell, Course, all},
    peer::{Chain, Peer},
    workload::{self, Workload},
};

/// Events per second in all, whatever the number of streams: what is compared is an event.
const RATE: u64 = 25_000;

fn streams(count: usize) -> Workload {
    Workload { streams: count, every: Duration::from_nanos(1_000_000_000 * count as u64 / RATE), ..ground() }
}

fn ground() -> Workload {
    Workload { streams: 500, ..workload::named("W3").unwrap_or_else(|| unreachable!("W3 is in the table")) }
}

/// One row of a series: what is varied, the load, and who is measured.
type Step = (String, Workload, Vec<Peer>);

/// Runs all series and returns their tables.
pub(crate) fn tables(course: &Course<'_>, tell: &mut dyn FnMut(usize, usize, &str)) -> (String, Vec<Cell>) {
    let nginx = Peer { name: "nginx".to_owned(), kind: crate::peer::Kind::Nginx };
    let whole = || Peer::headgate("headgate", Chain::ALL);
    let names = ["none", "auth", "rate_limit", "moderation", "policy_headers", "budget"];
    let filters = (0..names.len())
        .map(|filters| (format!("+ {}", names[filters]), ground(), vec![Peer::headgate("headgate", Chain { filters, ..Chain::ALL })]));
    let phrases = [0, 10, 100, 1000, 10_000]
        .map(|phrases| (phrases.to_string(), ground(), vec![Peer::headgate("headgate", Chain { phrases, ..Chain::ALL })]));
    let counts = [50, 250, 1000, 4000].map(|count| (count.to_string(), streams(count), vec![nginx.clone(), whole()]));
    let sizes = [16, 64, 256, 1024, 4096].map(|text| (format!("{text} B"), Workload { text, ..ground() }, vec![nginx.clone(), whole()]));
    let series: Vec<(&str, Vec<Step>)> =
        vec![("streams", counts.into()), ("filters", filters.collect()), ("phrases", phrases.into()), ("text per event", sizes.into())];
    let total: usize = series.iter().map(|(_, steps)| steps.len()).sum();
    let (mut out, mut cells, mut done) = (String::new(), Vec::new(), 0);
    for (name, steps) in series {
        // Writing into a string cannot fail.
        let _ = writeln!(
            out,
            "### By {name}, at {RATE} events a second\n\n| {name} | peer | n | CPU us/event | of it user | p50 us | p99 us |\n|---|---|---|---|---|---|---|"
        );
        for (label, work, peers) in steps {
            tell(done, total, &format!("{name} {label}"));
            done += 1;
            let workloads = [work];
            for cell in all(&Course { peers: &peers, workloads: &workloads, ..*course }, &mut |_, _, _| {}) {
                let m = &cell.median;
                let _ = writeln!(
                    out,
                    "| {label} | {} | {} | {:.2} | {:.2} | {:.0} | {:.0} |",
                    cell.peer,
                    cell.runs.len(),
                    m.cpu_us,
                    m.user_us,
                    m.due.p50_us,
                    m.due.p99_us
                );
                cells.push(cell);
            }
        }
        out.push('\n');
    }
    (out, cells)
}
