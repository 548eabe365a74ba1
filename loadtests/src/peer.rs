//! Who is measured: Headgate, other proxies, any command; started alone on a core, looked at through `/proc`, and stopped.

use std::{
    fmt, fs,
    io::{self, Read as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    str::FromStr,
    time::{Duration, Instant},
};

use rustix::{
    process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, setrlimit},
    thread::{CpuSet, sched_setaffinity},
};
use tempfile::TempDir;

use crate::{
    other::Other,
    workload::{Whom, Workload, fill},
};

/// How long a peer may take to listen: what is written in Python reads thousands of files first.
const PATIENCE: Duration = Duration::from_secs(120);

/// Something that stands between clients and the model, or nothing.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Peer {
    pub(crate) name: String,
    pub(crate) kind: Kind,
}

/// How it is started.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Kind {
    /// Nothing: clients speak to the model. This row is the harness itself.
    Direct,
    /// Another proxy, passing streams on unread, or an AI gateway.
    Other(Other),
    /// Headgate with these filters, on so many workers.
    Headgate { chain: Chain, workers: usize },
    /// Headgate passing on unread, as any reverse proxy.
    HeadgateProxy,
    /// Any command: `{port}` is where it must listen, `{model}` the model's address.
    Command(String),
}

/// The filters of a Headgate under test.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Chain {
    /// How many of auth, rate_limit, moderation, policy_headers, budget, and more budgets, in this order; those of every chain
    /// stand before.
    pub(crate) filters: usize,
    /// Phrases that moderation denies.
    pub(crate) phrases: usize,
    /// Whether moderation masks what all detectors find.
    pub(crate) detectors: bool,
    /// Whether policy_headers is among them, which signs each dispatch and each output.
    pub(crate) signed: bool,
}

impl Chain {
    pub(crate) const NONE: Chain = Chain { filters: 0, phrases: 0, detectors: false, signed: true };
    pub(crate) const ALL: Chain = Chain { filters: 5, phrases: 1000, detectors: true, signed: true };
    const UNSIGNED: Chain = Chain { filters: 4, signed: false, ..Chain::ALL };
}

impl Peer {
    pub(crate) fn headgate(name: impl Into<String>, chain: Chain) -> Peer {
        Peer { name: name.into(), kind: Kind::Headgate { chain, workers: 1 } }
    }

    /// Whether it is a Headgate, however it is set up.
    pub(crate) fn is_ours(&self) -> bool {
        matches!(self.kind, Kind::Headgate { .. } | Kind::HeadgateProxy)
    }

    /// Whether it can serve this workload, and should.
    pub(crate) fn serves(&self, work: &Workload) -> bool {
        match &self.kind {
            // Two workers show how much more they can take, and signatures what they cost, where that is what is measured.
            Kind::Headgate { workers, chain } => (*workers == 1 && chain.signed) || work.is_at_most(),
            Kind::Other(other) if other.is_ai_gateway() => work.whom == Whom::All && work.is_plain(),
            Kind::Other(Other::Nginx) | Kind::Direct | Kind::HeadgateProxy => work.is_plain(),
            Kind::Other(_) | Kind::Command(_) => work.is_plain() && work.whom != Whom::Us,
        }
    }

    /// What is missing on this machine to start it, and how to get it.
    pub(crate) fn missing(&self) -> Option<String> {
        match &self.kind {
            Kind::Other(other) => other.missing(),
            Kind::Direct | Kind::Headgate { .. } | Kind::HeadgateProxy | Kind::Command(_) => None,
        }
    }

    /// About how long it takes to start.
    pub(crate) fn start_time(&self) -> Duration {
        Duration::from_millis(match &self.kind {
            Kind::Direct => 0,
            Kind::Other(other) if other.is_ai_gateway() => 12_000,
            Kind::Other(_) | Kind::Command(_) => 300,
            Kind::Headgate { .. } | Kind::HeadgateProxy => 700,
        })
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

impl FromStr for Peer {
    type Err = String;
    fn from_str(text: &str) -> Result<Peer, String> {
        let kind = match text.split_once('=') {
            Some((name, command)) if !name.is_empty() && command.contains("{port}") => {
                return Ok(Peer { name: name.to_owned(), kind: Kind::Command(command.to_owned()) });
            }
            Some(_) => {
                return Err("a command needs a name before it and `{port}` in it: 'name=command --listen {port} --to {model}'".to_owned());
            }
            None => match text {
                "direct" => Kind::Direct,
                "headgate" => Kind::Headgate { chain: Chain::ALL, workers: 1 },
                "headgate-two" => Kind::Headgate { chain: Chain::ALL, workers: 2 },
                "headgate-unsigned" => Kind::Headgate { chain: Chain::UNSIGNED, workers: 1 },
                "headgate-bare" => Kind::Headgate { chain: Chain::NONE, workers: 1 },
                "headgate-proxy" => Kind::HeadgateProxy,
                other => Kind::Other(Other::named(other).ok_or(
                    "known peers are direct, headgate, headgate-two (workers), headgate-unsigned, headgate-bare, headgate-proxy, nginx, haproxy, envoy and litellm; any other is 'name=command'",
                )?),
            },
        };
        Ok(Peer { name: text.to_owned(), kind })
    }
}

/// Which core runs what, and how urgently.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cores {
    /// Cores 0 and 1 are told apart; else the system places threads.
    pub(crate) apart: bool,
    /// Both run before everything else on the machine.
    pub(crate) realtime: bool,
}

/// A peer that runs.
pub(crate) struct Running {
    child: Option<Child>,
    pub(crate) address: SocketAddr,
    /// What stands before `/v1/...`.
    pub(crate) prefix: &'static str,
    pub(crate) key: String,
    files: TempDir,
}

/// Starts a peer before a model at this address, and waits until it listens.
pub(crate) fn start(peer: &Peer, model: SocketAddr, headgate: &Path, cores: Cores) -> io::Result<Running> {
    let files = tempfile::tempdir()?;
    let address = free_port()?;
    let mut running = Running { child: None, address, prefix: "", key: "hg_none".to_owned(), files };
    let folder = running.files.path().to_owned();
    // A config has its folder to itself: Headgate reads it anew when anything in there changes, a log for example.
    let etc = folder.join("etc");
    fs::create_dir(&etc)?;
    let mut command = match &peer.kind {
        Kind::Direct => {
            running.address = model;
            return Ok(running);
        }
        Kind::Other(other) => {
            let mut command = urgent(other.program(), cores);
            running.key = random_key()?;
            other.set_up(&mut command, &etc, address, model, &running.key)?;
            command
        }
        Kind::Headgate { chain, workers } => {
            running.key = headgate_config(&etc, headgate, address, model, *chain, *workers)?;
            headgate_command(&etc, headgate, cores)
        }
        Kind::HeadgateProxy => {
            running.prefix = "/plain";
            running.key = headgate_config(&etc, headgate, address, model, Chain::NONE, 1)?;
            headgate_command(&etc, headgate, cores)
        }
        Kind::Command(line) => {
            let line = line.replace("{port}", &address.port().to_string()).replace("{model}", &model.to_string());
            let mut command = urgent("sh", cores);
            command.arg("-c").arg(format!("exec {line}"));
            command
        }
    };
    let log = fs::File::create(folder.join("log"))?;
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).current_dir(&folder);
    // A child inherits the cores of the thread that starts it, with all threads of its own.
    let two = matches!(peer.kind, Kind::Headgate { workers, .. } if workers > 1);
    pin(if two { &[0, 1] } else { &[0] }, cores)?;
    let child = command.spawn();
    pin(&[1], cores)?;
    running.child = Some(child.map_err(|error| io::Error::new(error.kind(), format!("cannot start {peer}: {error}")))?);
    let until = Instant::now() + PATIENCE;
    loop {
        if TcpStream::connect_timeout(&address, Duration::from_millis(200)).is_ok() {
            return Ok(running);
        }
        let ended = running.child.as_mut().map_or(Ok(None), Child::try_wait)?;
        if ended.is_some() || Instant::now() > until {
            let log = fs::read_to_string(folder.join("log")).unwrap_or_default();
            let lines: Vec<&str> = log.lines().collect();
            return Err(io::Error::other(format!("{peer} does not listen\n{}", lines[lines.len().saturating_sub(30)..].join("\n"))));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Keeps the calling thread on these cores.
pub(crate) fn pin(on: &[usize], cores: Cores) -> io::Result<()> {
    if !cores.apart {
        return Ok(());
    }
    let mut set = CpuSet::new();
    on.iter().for_each(|core| set.set(*core));
    Ok(sched_setaffinity(None, &set)?)
}

fn urgent(program: impl AsRef<std::ffi::OsStr>, cores: Cores) -> Command {
    if !cores.realtime {
        return Command::new(program);
    }
    let mut command = Command::new("chrt");
    command.args(["--rr", "10"]).arg(program);
    command
}

/// A key as AI gateways want them: one that cannot be guessed.
fn random_key() -> io::Result<String> {
    let mut random = [0; 24];
    fs::File::open("/dev/urandom")?.read_exact(&mut random)?;
    Ok(random.iter().fold("sk-".to_owned(), |key, byte| key + &format!("{byte:02x}")))
}

/// A port that was free a moment ago.
fn free_port() -> io::Result<SocketAddr> {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()
}

fn headgate_command(folder: &Path, headgate: &Path, cores: Cores) -> Command {
    let mut command = urgent(headgate, cores);
    command.arg("run").arg(folder.join("headgate.yaml"));
    command
}

/// Writes a config and what it needs; returns the key that it admits.
fn headgate_config(
    folder: &Path,
    headgate: &Path,
    listen: SocketAddr,
    model: SocketAddr,
    chain: Chain,
    workers: usize,
) -> io::Result<String> {
    let (key, entry) = if chain.filters == 0 { ("hg_none".to_owned(), String::new()) } else { token(headgate)? };
    fs::write(folder.join("constitution.md"), "# Constitution\n\n1. Answer what was asked.\n")?;
    fs::write(folder.join("deny.txt"), phrases(chain.phrases))?;
    let deny = if chain.phrases > 0 { "deny: [deny.txt], " } else { "" };
    let mask = if chain.detectors { "email, phone, credit_card, iban, ip, us_ssn, api_key, private_key, jwt" } else { "us_ssn" };
    let filters = [
        format!("      - auth:\n          keys:\n{entry}"),
        "      - rate_limit: { per: tenant, requests: 100M/min, output_tokens: 1000M/min, streams: 100000 }\n".to_owned(),
        format!("      - moderation: {{ {deny}mask: [{mask}] }}\n"),
        "      - policy_headers\n".to_owned(),
    ];
    let filters = filters.into_iter().filter(|filter| chain.signed || !filter.contains("policy_headers"));
    let budgets = std::iter::repeat("      - budget: { output_tokens: 10000000 }\n".to_owned());
    let filters: String = filters.chain(budgets).take(chain.filters).collect();
    let filters = if filters.is_empty() { "    filters: []\n".to_owned() } else { format!("    filters:\n{filters}") };
    let patience = "timeouts: { connect: 5s, first_byte: 30s, idle: 2h, total: 2h }";
    let endpoints = format!("endpoints: [\"http://{model}\"], {patience}, idle: {{ max: 1024, timeout: 1h }}, health: {{ interval: 0s }}");
    let config = format!(
        "listen: {listen}
admin: {{ listen: off }}
workers: {workers}
policy: {{ constitution: constitution.md, version: load }}
limits: {{ heartbeat: 5min, answer_bytes: 64MiB, connections: 20000 }}
upstreams:
  model: {{ protocol: openai, {endpoints} }}
  plain: {{ protocol: http, {endpoints} }}
routes:
  - path: /v1/chat/completions
    upstream: model
{filters}  - path: /v1/chat/stream
    upstream: model
{filters}  - path: /plain/*
    upstream: plain
    strip_prefix: true
"
    );
    fs::write(folder.join("headgate.yaml"), config)?;
    Ok(key)
}

/// A key, and its entry in a config.
fn token(headgate: &Path) -> io::Result<(String, String)> {
    let made = Command::new(headgate).args(["token", "--tenant", "load", "--only-key"]).output()?;
    if !made.status.success() {
        return Err(io::Error::other(format!("`headgate token` failed: {}", String::from_utf8_lossy(&made.stderr))));
    }
    let entry = String::from_utf8_lossy(&made.stderr).lines().map(|line| format!("            {line}\n")).collect();
    Ok((String::from_utf8_lossy(&made.stdout).trim().to_owned(), entry))
}

/// Phrases of two or three words. They share words with each other and none with what the model says.
fn phrases(count: usize) -> String {
    const WORDS: [&str; 32] = [
        "amber", "basin", "copper", "delta", "ember", "falcon", "granite", "harbor", "indigo", "jasper", "kestrel", "lantern", "marble",
        "nectar", "onyx", "prairie", "quartz", "raven", "saffron", "timber", "umbra", "velvet", "willow", "xenon", "yonder", "zephyr",
        "beacon", "cinder", "drift", "echo", "fable", "glacier",
    ];
    let word = |n: usize| WORDS[n % WORDS.len()];
    (0..count).map(|n| format!("{} {} {}{n}\n", word(n), word(n / 32), word(n / 7))).collect()
}

impl Running {
    /// Processor time and memory so far: of the peer, and what else the machine did.
    pub(crate) fn look(&self) -> io::Result<Look> {
        let mut look = Look { at: Some(Instant::now()), ..Look::default() };
        if let Some(child) = &self.child {
            for pid in tree(child.id())? {
                look.add(pid)?;
            }
        }
        look.own_ns = run_ns(Path::new("/proc/self/schedstat"))?;
        let stat = fs::read_to_string("/proc/stat")?;
        let mut fields = stat.lines().next().unwrap_or_default().split_whitespace().skip(1).map(|n| n.parse().unwrap_or(0_u64));
        // user nice system idle iowait irq softirq steal: all but idle and iowait.
        let busy: u64 = (0..8)
            .map(|at| match (at, fields.next().unwrap_or(0)) {
                (3 | 4, _) => 0,
                (_, ticks) => ticks,
            })
            .sum();
        look.machine_ns = busy * TICK_NS;
        Ok(look)
    }
}

/// `/proc` counts in hundredths of a second on every Linux of today.
const TICK_NS: u64 = 10_000_000;

impl Drop for Running {
    fn drop(&mut self) {
        let Some(mut child) = self.child.take() else { return };
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        // Told to stop at once: drained turns are not what is tested here.
        for signal in [Signal::TERM, Signal::TERM] {
            if let Some(pid) = pid {
                // It may have ended by itself.
                let _ = kill_process(pid, signal);
            }
            let until = Instant::now() + Duration::from_millis(500);
            while Instant::now() < until {
                if !matches!(child.try_wait(), Ok(None)) {
                    return;
                }
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        drop(child.kill());
        drop(child.wait());
    }
}

/// What a peer has used so far.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Look {
    at: Option<Instant>,
    /// Processor time of all its threads.
    pub(crate) cpu_ns: u64,
    /// Of that, outside the kernel; in steps of 10 ms.
    pub(crate) user_ns: u64,
    pub(crate) rss_bytes: u64,
    /// Processor time of the generator.
    pub(crate) own_ns: u64,
    machine_ns: u64,
}

impl Look {
    fn add(&mut self, pid: u32) -> io::Result<()> {
        let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { return Ok(()) };
        for task in tasks {
            self.cpu_ns += run_ns(&task?.path().join("schedstat"))?;
        }
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        // The command's name may hold anything; fields are counted from behind it.
        let mut fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
        self.user_ns += fields.nth(11).and_then(|ticks| ticks.parse::<u64>().ok()).unwrap_or(0) * TICK_NS;
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let rss = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.split_whitespace().next()?.parse::<u64>().ok());
        self.rss_bytes += rss.unwrap_or(0) << 10;
        Ok(())
    }

    /// Cores that others used since `before`: neither the peer nor the generator.
    pub(crate) fn foreign_cores(&self, before: &Look) -> f64 {
        let (Some(now), Some(then)) = (self.at, before.at) else { return 0.0 };
        let ours = self.cpu_ns.saturating_sub(before.cpu_ns) + (self.own_ns - before.own_ns);
        let busy = self.machine_ns.saturating_sub(before.machine_ns);
        busy.saturating_sub(ours) as f64 / (now - then).as_nanos().max(1) as f64
    }
}

/// The first field of a thread's schedstat: nanoseconds it ran.
fn run_ns(path: &Path) -> io::Result<u64> {
    let stat = match fs::read_to_string(path) {
        Ok(stat) => stat,
        // The thread has ended.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(error),
    };
    Ok(stat.split(' ').next().and_then(|ns| ns.parse().ok()).unwrap_or(0))
}

/// A process and all below it.
fn tree(root: u32) -> io::Result<Vec<u32>> {
    let mut parents = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else { continue };
        let parent = stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(1)?.parse::<u32>().ok());
        parents.push((pid, parent.unwrap_or(0)));
    }
    let mut tree = vec![root];
    let mut at = 0;
    while let Some(&above) = tree.get(at) {
        tree.extend(
            parents.iter().filter(|(pid, parent)| *parent == above && !tree.contains(pid)).map(|(pid, _)| *pid).collect::<Vec<_>>(),
        );
        at += 1;
    }
    Ok(tree)
}

/// The gateway's binary: as named, else built now by the cargo that runs this, as this program was built.
pub(crate) fn headgate_binary(named: Option<PathBuf>) -> io::Result<PathBuf> {
    if let Some(path) = named {
        return if path.is_file() { path.canonicalize() } else { Err(io::Error::other(format!("{} is no file", path.display()))) };
    }
    if let Some(cargo) = std::env::var_os("CARGO") {
        let mut build = Command::new(cargo);
        build.args(["build", "--package", "headgate-gateway", "--bin", "headgate"]).current_dir(env!("CARGO_MANIFEST_DIR"));
        if !cfg!(debug_assertions) {
            build.arg("--release");
        }
        if !build.status()?.success() {
            return Err(io::Error::other("the gateway does not build"));
        }
    }
    let beside = std::env::current_exe()?.with_file_name("headgate");
    if beside.is_file() { Ok(beside) } else { Err(io::Error::other("no gateway beside this program; name one with --headgate")) }
}

/// Lets this process and its peers open as many files as the system allows: each idle stream is two here and two there.
pub(crate) fn open_many() -> io::Result<()> {
    let limit = getrlimit(Resource::Nofile);
    Ok(setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum })?)
}

/// How many that is.
pub(crate) fn files() -> usize {
    getrlimit(Resource::Nofile).current.and_then(|most| usize::try_from(most).ok()).unwrap_or(usize::MAX)
}

/// Runs the calling process before everything else on its core, as peers do that [`start`] starts so.
pub(crate) fn hurry() -> io::Result<()> {
    let status = Command::new("chrt").args(["--rr", "--pid", "10", &std::process::id().to_string()]).status()?;
    if status.success() { Ok(()) } else { Err(io::Error::other("`chrt` was refused: --realtime needs root")) }
}

/// A prompt's worth of filler, for the smoke test.
pub(crate) fn filler(len: usize) -> String {
    let mut text = Vec::new();
    fill(&mut text, len);
    String::from_utf8_lossy(&text).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peers_are_read_from_the_command_line() {
        assert_eq!("nginx".parse::<Peer>().unwrap().kind, Kind::Other(Other::Nginx));
        let other = "relay=relay --listen {port} --to {model}".parse::<Peer>().unwrap();
        assert_eq!((other.name.as_str(), other.kind), ("relay", Kind::Command("relay --listen {port} --to {model}".to_owned())));
        for bad in ["apache", "=sleep {port}", "x=sleep 1"] {
            assert!(bad.parse::<Peer>().is_err(), "{bad}");
        }
    }

    #[test]
    fn phrases_are_all_different_and_foreign_to_the_answers() {
        let list = phrases(1000);
        let mut lines: Vec<&str> = list.lines().collect();
        lines.sort_unstable();
        lines.dedup();
        assert_eq!(lines.len(), 1000);
        let spoken = filler(4096);
        assert!(list.split_whitespace().all(|word| !spoken.contains(word)));
    }

    #[test]
    fn a_process_that_works_is_seen_to_work() {
        let peer = Peer { name: "spin".to_owned(), kind: Kind::Direct };
        let model: SocketAddr = "127.0.0.1:9".parse().unwrap();
        let mut running = start(&peer, model, Path::new("none"), Cores { apart: false, realtime: false }).unwrap();
        running.child = Some(Command::new("sh").args(["-c", "while :; do :; done"]).spawn().unwrap());
        let before = running.look().unwrap();
        let after = loop {
            let look = running.look().unwrap();
            if look.cpu_ns > before.cpu_ns + 20_000_000 {
                break look;
            }
        };
        assert!(after.rss_bytes > 0 && after.own_ns >= before.own_ns);
        drop(running);
    }
}
