//! Counts the instructions of each case and holds them against `counts.yaml`: a regression shows on the busiest machine too.
//!
//! valgrind runs this program once more, as `headgate-counts run`, and writes down what is counted in each call of [`counted`].
//! It shows programs one and the same processor wherever it runs on one with AVX2, so libraries that look for the
//! processor's abilities find the same ones; the code of ours is compiled for plain x86-64.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a command line speaks to a person")]

use std::{
    collections::BTreeMap,
    env, fs,
    path::Path,
    process::{Command, ExitCode, Stdio},
};

use headgate_benches::cases::{Meter, Size, measure};

const KEPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/counts.yaml");
const ACCEPT: &str = "cargo run --release -p headgate-benches -- accept";
/// Runs of a case that are counted together; as many before them are not, since the first ones allocate.
const RUNS: u64 = 100;

/// The file in which counts are kept.
#[derive(Debug, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Kept {
    /// The compiler whose code was counted.
    rustc: String,
    /// By how much a count may grow.
    tolerance_percent: f64,
    /// Instructions of one run of each case.
    instructions: BTreeMap<String, u64>,
}

fn main() -> ExitCode {
    let done = match env::args().nth(1).as_deref() {
        None => check(),
        Some("accept") => accept(),
        Some("run") => {
            measure(&mut Counter);
            Ok(true)
        }
        Some(_) => Err("usage: headgate-counts [accept]".to_owned()),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("headgate-counts: {error}");
            ExitCode::FAILURE
        }
    }
}

struct Counter;

impl Meter for Counter {
    fn measure<I>(&mut self, name: &str, _: Size, mut setup: impl FnMut() -> I, mut run: impl FnMut(&mut I)) {
        let mut inputs: Vec<I> = (0..2 * RUNS).map(|_| setup()).collect();
        let (warm, measured) = inputs.split_at_mut(RUNS as usize);
        warm.iter_mut().for_each(&mut run);
        println!("{name}");
        counted(&mut || measured.iter_mut().for_each(&mut run));
    }
}

/// What valgrind looks at: it counts from the call to the return, and writes a file after each.
#[inline(never)]
fn counted(run: &mut dyn FnMut()) {
    run();
}

/// Instructions of one run of each case, in the order of the cases.
fn count() -> Result<Vec<(String, u64)>, String> {
    if cfg!(debug_assertions) || !cfg!(all(target_arch = "x86_64", target_os = "linux")) {
        return Err("counts are of optimised code on x86-64 Linux: run it with --release".to_owned());
    }
    if cfg!(target_feature = "avx2") {
        return Err("counts are of code for plain x86-64: build without -C target-cpu".to_owned());
    }
    let files = tempfile::tempdir().map_err(|error| error.to_string())?;
    let program = env::current_exe().map_err(|error| error.to_string())?;
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--dump-after=headgate_counts::counted", "--toggle-collect=headgate_counts::counted"])
        .arg(format!("--callgrind-out-file={}/counts", files.path().display()))
        .arg(program)
        .arg("run")
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("cannot run valgrind ({error}): apt-get install valgrind, or run scripts/tools.sh"))?;
    let (said, log) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if !output.status.success() {
        return Err(format!("valgrind failed:\n{log}"));
    }
    let total = |at: usize| total(&files.path().join(format!("counts.{at}")));
    said.lines().enumerate().map(|(at, name)| Ok((name.to_owned(), total(at + 1)?.div_ceil(RUNS)))).collect()
}

/// The sum of what valgrind wrote into one file.
fn total(path: &Path) -> Result<u64, String> {
    let text = fs::read_to_string(path).map_err(|error| format!("valgrind did not write {}: {error}", path.display()))?;
    let total = text.lines().find_map(|line| line.strip_prefix("totals: ").or(line.strip_prefix("summary: "))?.trim().parse().ok());
    total.filter(|&total| total > 0).ok_or_else(|| format!("valgrind counted nothing in {}", path.display()))
}

fn rustc() -> String {
    let output = Command::new("rustc").arg("--version").output().ok();
    output.and_then(|it| String::from_utf8_lossy(&it.stdout).split(' ').nth(1).map(str::to_owned)).unwrap_or_else(|| "unknown".to_owned())
}

fn kept() -> Result<Kept, String> {
    let text = fs::read_to_string(KEPT).map_err(|error| format!("cannot read {KEPT}: {error}"))?;
    serde_saphyr::from_str(&text).map_err(|error| format!("{KEPT}: {error}"))
}

fn check() -> Result<bool, String> {
    let (kept, now) = (kept()?, count()?);
    let (table, good) = compare(&kept, &now);
    print!("{table}");
    if kept.rustc != rustc() {
        println!("counted with rustc {}, kept from {}: a difference may be the compiler's", rustc(), kept.rustc);
    }
    if !good {
        println!("a count grew by more than {} %, or a case came or went; where that is right: {ACCEPT}", kept.tolerance_percent);
    }
    Ok(good)
}

fn accept() -> Result<bool, String> {
    let tolerance = kept().map_or(5.0, |kept| kept.tolerance_percent);
    let mut text = format!(
        "# Instructions of one run of each case, counted by valgrind. Written by `{ACCEPT}`, held by the stage `counts` of scripts/test.sh.\nrustc: {}\ntolerance_percent: {tolerance}\ninstructions:\n",
        rustc()
    );
    for (name, count) in count()? {
        text += &format!("  {name:?}: {count}\n");
    }
    fs::write(KEPT, text).map_err(|error| format!("cannot write {KEPT}: {error}"))?;
    Ok(true)
}

/// A table of all cases, and whether none of them is worse than what is kept.
fn compare(kept: &Kept, now: &[(String, u64)]) -> (String, bool) {
    let mut good = true;
    let mut table = format!("{:<52} {:>12} {:>12} {:>8}\n", "instructions of one run", "kept", "now", "change");
    for (name, count) in now {
        let (before, change, word) = match kept.instructions.get(name) {
            None => ("-".to_owned(), "-".to_owned(), "NEW"),
            Some(&before) => {
                let (count, kept_count, tolerance) = (*count as f64, before.max(1) as f64, kept.tolerance_percent / 100.0);
                let word = if count > kept_count * (1.0 + tolerance) {
                    "WORSE"
                } else if count < kept_count * (1.0 - tolerance) {
                    "better: keep it"
                } else {
                    ""
                };
                (before.to_string(), format!("{:+.1} %", (count / kept_count - 1.0) * 100.0), word)
            }
        };
        good &= !matches!(word, "NEW" | "WORSE");
        table += format!("{name:<52} {before:>12} {count:>12} {change:>8} {word}").trim_end();
        table.push('\n');
    }
    for name in kept.instructions.keys().filter(|name| now.iter().all(|(other, _)| other != *name)) {
        good = false;
        table += &format!("{name:<52} {:>12} {:>12} {:>8} GONE\n", kept.instructions[name], "-", "-");
    }
    (table, good)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compared(before: &[(&str, u64)], now: &[(&str, u64)]) -> (String, bool) {
        let instructions = before.iter().map(|(name, count)| ((*name).to_owned(), *count)).collect();
        let kept = Kept { rustc: "1".to_owned(), tolerance_percent: 5.0, instructions };
        compare(&kept, &now.iter().map(|(name, count)| ((*name).to_owned(), *count)).collect::<Vec<_>>())
    }

    #[test]
    fn a_count_may_grow_by_the_tolerance_and_not_by_more() {
        assert!(compared(&[("a", 1000), ("b", 1000)], &[("a", 1050), ("b", 10)]).1);
        let (table, good) = compared(&[("a", 1000), ("b", 1000)], &[("a", 1051), ("b", 1000)]);
        assert!(!good);
        assert!(table.lines().any(|line| line.starts_with("a ") && line.ends_with("+5.1 % WORSE")), "{table}");
    }

    #[test]
    fn a_case_that_came_or_went_must_be_accepted() {
        let (table, good) = compared(&[("a", 1), ("old", 1)], &[("a", 1)]);
        assert!(!good && table.contains("GONE"), "{table}");
        let (table, good) = compared(&[("a", 1)], &[("a", 1), ("new", 1)]);
        assert!(!good && table.contains("NEW"), "{table}");
    }

    #[test]
    fn every_case_is_kept_and_nothing_else() {
        struct Names(Vec<String>);
        impl Meter for Names {
            fn measure<I>(&mut self, name: &str, _: Size, _: impl FnMut() -> I, _: impl FnMut(&mut I)) {
                assert!(name.contains(": "), "{name}");
                self.0.push(name.to_owned());
            }
        }
        let mut names = Names(vec![]);
        measure(&mut names);
        names.0.sort_unstable();
        assert_eq!(names.0, kept().unwrap().instructions.into_keys().collect::<Vec<_>>(), "accept them with {ACCEPT}");
    }
}
