//! Real programs for tests: started on free ports in folders of their own, ready when handed out, gone when dropped.

use std::ffi::OsStr;
use std::io::Write;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rustix::process::{Pid, kill_process_group};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::net::{TcpSocket, TcpStream};
use tokio::process::{Child, Command};
use tokio::sync::watch;

use crate::{PATIENCE, soon, within};

/// How much of a program's output is kept, in bytes; the oldest lines go first.
const MAX_OUTPUT_BYTES: usize = 4 << 20;
/// How long a program may take to start: a Java or a browser on a busy machine takes its time.
const START: Duration = Duration::from_secs(90);
/// Set to `1`, it makes a missing program a failure instead of a skip.
const REQUIRE: &str = "HEADGATE_REQUIRE_SERVICES";

/// A program that a test needs and this machine has not.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} is missing; to get it: {how}")]
pub struct Missing {
    /// What.
    pub what: String,
    /// The command that gets it, or the variable that tells where it is.
    pub how: String,
}

impl Missing {
    /// Says loudly that a test was skipped, and panics where skipping is not allowed.
    pub fn skip(&self, test: &str) {
        let sentence = format!("SKIPPED {test}: {self}");
        // Past the harness, which keeps what a passing test prints to itself.
        let _ = writeln!(std::io::stderr(), "{sentence}");
        assert!(std::env::var_os(REQUIRE).is_none_or(|value| value != "1"), "{sentence} ({REQUIRE}=1)");
    }
}

/// For results of this module, in a test.
pub trait OrSkip<T> {
    /// The service; or `None`, after saying loudly that `test` is skipped.
    fn or_skip(self, test: &str) -> Option<T>;
}

impl<T> OrSkip<T> for Result<T, Missing> {
    fn or_skip(self, test: &str) -> Option<T> {
        self.map_err(|missing| missing.skip(test)).ok()
    }
}

/// A program about to be started.
pub struct Program {
    name: String,
    command: Command,
    stdin: Stdio,
    /// Removed when the service is dropped.
    folder: TempDir,
}

/// How a program tells that it can be used.
#[derive(Debug, Clone)]
pub enum Ready {
    /// It prints a line that contains this.
    Line(String),
    /// It takes connections.
    Connects(SocketAddr),
    /// It need not be waited for.
    AtOnce,
}

/// A signal to a whole process group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    /// SIGHUP: reload.
    Hangup,
    /// SIGTERM: finish what is under way and end.
    Terminate,
    /// SIGKILL.
    Kill,
    /// SIGSTOP: silent, with every connection open.
    Stop,
    /// SIGCONT.
    Continue,
}

impl Program {
    /// The program at this path, such as one that Cargo built. It runs in an empty folder of its own.
    pub fn at(path: impl AsRef<Path>) -> Program {
        let path = path.as_ref();
        let name = path.file_name().map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into_owned());
        let folder = tempfile::Builder::new().prefix("headgate-test-").tempdir().expect("a temporary folder");
        // Servers that give up root for another user must still reach what is in it.
        std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).expect("to open the temporary folder");
        let mut command = Command::new(path);
        command.current_dir(folder.path());
        Program { name, command, stdin: Stdio::null(), folder }
    }

    /// The same, with a standard input that says nothing and ends with this process, however that ends.
    #[must_use]
    pub fn leashed(mut self) -> Program {
        self.stdin = Stdio::piped();
        self
    }

    /// The program's own path.
    pub fn path(&self) -> &Path {
        Path::new(self.command.as_std().get_program())
    }

    /// The first of `names` that is installed, or the program the environment variable `variable` points to.
    pub fn find(names: &[&str], variable: &str, how: &str) -> Result<Program, Missing> {
        if let Some(path) = std::env::var_os(variable).filter(|path| !path.is_empty()) {
            return Ok(Program::at(path));
        }
        let path = std::env::var_os("PATH").unwrap_or_default();
        // Servers live where an ordinary user's PATH does not look.
        let folders = std::env::split_paths(&path).chain(["/usr/sbin", "/usr/local/sbin"].map(PathBuf::from));
        let found = folders.flat_map(|folder| names.iter().map(move |name| folder.join(name))).find(|file| file.is_file());
        found.map(Program::at).ok_or_else(|| Missing { what: names.join(" or "), how: format!("{how}, or set {variable}") })
    }

    /// Adds an argument.
    #[must_use]
    pub fn argument(mut self, argument: impl AsRef<OsStr>) -> Program {
        self.command.arg(argument);
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn arguments<A: AsRef<OsStr>>(mut self, arguments: impl IntoIterator<Item = A>) -> Program {
        self.command.args(arguments);
        self
    }

    /// Sets an environment variable.
    #[must_use]
    pub fn variable(mut self, name: &str, value: impl AsRef<OsStr>) -> Program {
        self.command.env(name, value);
        self
    }

    /// Writes a file into the program's folder: its path.
    pub fn file(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.folder().join(name);
        std::fs::write(&path, content).unwrap_or_else(|error| panic!("cannot write {}: {error}", path.display()));
        path
    }

    /// The folder it runs in.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Starts it and waits until it is ready. Panics, with its output, where it ends before that.
    pub async fn start(self, ready: Ready) -> Service {
        self.try_start(ready).await.unwrap_or_else(|sentence| panic!("{sentence}"))
    }

    pub(crate) async fn try_start(self, ready: Ready) -> Result<Service, String> {
        let Program { name, mut command, stdin, folder } = self;
        command.stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true).process_group(0);
        let mut child = command.spawn().map_err(|error| format!("cannot start {name}: {error}"))?;
        let group = child.id().and_then(|id| Pid::from_raw(i32::try_from(id).ok()?)).ok_or_else(|| format!("{name} ended at once"))?;
        let (log, output) = watch::channel(Log { pipes: 2, ..Log::default() });
        tokio::spawn(keep(child.stdout.take(), log.clone()));
        tokio::spawn(keep(child.stderr.take(), log));
        let addr = if let Ready::Connects(addr) = ready { Some(addr) } else { None };
        let mut service = Service { name, child, group, output, addr, ended: false, folder };
        let is_ready = match ready {
            Ready::AtOnce => true,
            Ready::Line(text) => service.find_line(&text, START).await.is_some(),
            Ready::Connects(addr) => service.connects(addr).await,
        };
        if is_ready { Ok(service) } else { Err(format!("{} ended before it was ready: {}", service.name, service.output())) }
    }

    /// Runs it to its end: its status and everything it printed.
    pub async fn run(self, limit: Duration) -> (ExitStatus, String) {
        let mut service = self.start(Ready::AtOnce).await;
        let status = service.exited_within(limit).await;
        (status, service.output())
    }
}

/// What a program has printed.
#[derive(Default)]
struct Log {
    text: String,
    /// How many of its two pipes are still open.
    pipes: usize,
}

async fn keep(pipe: Option<impl AsyncRead + Unpin>, log: watch::Sender<Log>) {
    if let Some(pipe) = pipe {
        let mut lines = BufReader::new(pipe).split(b'\n');
        while let Ok(Some(line)) = lines.next_segment().await {
            log.send_modify(|log| {
                log.text.push_str(&String::from_utf8_lossy(&line));
                log.text.push('\n');
                if log.text.len() > MAX_OUTPUT_BYTES {
                    let half = log.text.ceil_char_boundary(log.text.len() / 2);
                    log.text.drain(..half);
                }
            });
        }
    }
    log.send_modify(|log| log.pipes -= 1);
}

/// A running program. Dropped, it is killed with everything it has started, and its folder is removed.
pub struct Service {
    name: String,
    child: Child,
    group: Pid,
    output: watch::Receiver<Log>,
    addr: Option<SocketAddr>,
    /// Whether the program has been waited for: from then on its group's number may be another's.
    ended: bool,
    folder: TempDir,
}

impl Service {
    /// Where it listens; panics for a program that was not started as one that listens.
    pub fn addr(&self) -> SocketAddr {
        self.addr.unwrap_or_else(|| panic!("{} was not started as a server", self.name))
    }

    /// Its process id.
    pub fn id(&self) -> i32 {
        self.group.as_raw_nonzero().get()
    }

    /// The folder it runs in.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// What it has printed so far, both streams together.
    pub fn output(&self) -> String {
        self.output.borrow().text.clone()
    }

    /// The first line that contains `text`, as soon as it is printed. Panics where the program ends before.
    pub async fn line(&self, text: &str) -> String {
        match self.find_line(text, PATIENCE).await {
            Some(line) => line,
            None => panic!("{} ended without printing `{text}`: {}", self.name, self.output()),
        }
    }

    async fn find_line(&self, text: &str, limit: Duration) -> Option<String> {
        let mut output = self.output.clone();
        let come = output.wait_for(|log| log.text.contains(text) || log.pipes == 0);
        let log = within(limit, come, &format!("{} to print `{text}`", self.name)).await.ok()?;
        log.text.lines().find(|line| line.contains(text)).map(Into::into)
    }

    /// Waits until it takes connections; false where it ends before that.
    async fn connects(&mut self, addr: SocketAddr) -> bool {
        let connected = async {
            loop {
                if TcpStream::connect(addr).await.is_ok() {
                    return true;
                }
                if self.output.borrow().pipes == 0 {
                    return false;
                }
                // No event tells that another process has begun to listen.
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        within(START, connected, "a program to listen").await
    }

    /// Sends a signal to it and everything it has started.
    pub fn signal(&self, signal: Signal) {
        let signal = match signal {
            Signal::Hangup => rustix::process::Signal::HUP,
            Signal::Terminate => rustix::process::Signal::TERM,
            Signal::Kill => rustix::process::Signal::KILL,
            Signal::Stop => rustix::process::Signal::STOP,
            Signal::Continue => rustix::process::Signal::CONT,
        };
        if !self.ended {
            // It may be about to end, which is what most signals are for.
            let _ = kill_process_group(self.group, signal);
        }
    }

    /// Waits until it has ended by itself; what it started and left behind is killed.
    pub async fn exited(&mut self) -> ExitStatus {
        self.exited_within(PATIENCE).await
    }

    async fn exited_within(&mut self, limit: Duration) -> ExitStatus {
        let what = format!("{} to end", self.name);
        let status = within(limit, self.child.wait(), &what).await.expect("a child of ours can be waited for");
        self.signal(Signal::Kill);
        self.ended = true;
        let mut output = self.output.clone();
        let _ = soon(output.wait_for(|log| log.pipes == 0), "the last words of a program").await;
        status
    }

    /// Memory it holds now, in bytes, as the system counts it; 0 once it has ended.
    pub fn resident_bytes(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.id())).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        line.and_then(|line| line.trim().strip_suffix(" kB")).and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) * 1024
    }

    /// Time it has computed, of all its threads; nothing once it has ended.
    pub fn computed(&self) -> Duration {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.id())).unwrap_or_default();
        // proc(5): utime and stime are the 14th and 15th field, counted behind the name, which may have blanks in it.
        let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields).split_whitespace().skip(11).take(2);
        let ticks: u64 = fields.filter_map(|ticks| ticks.parse::<u64>().ok()).sum();
        // A tick is a hundredth of a second wherever Linux runs.
        Duration::from_millis(ticks * 10)
    }

    /// How many descriptors it has open; 0 once it has ended.
    pub fn open_descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.id())).map_or(0, Iterator::count)
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.signal(Signal::Kill);
    }
}

/// A port for a program that is told its number, and for the one that comes back there: the system gives it to nobody who asks for any,
/// for as long as this process lives. Where nobody listens on it, it refuses connections.
pub fn free_addr() -> SocketAddr {
    static KEPT: Mutex<Vec<TcpSocket>> = Mutex::new(Vec::new());
    let socket = TcpSocket::new_v4().expect("a socket");
    // Bound and never listening: whoever binds the number with this option, as servers do that are to start again at once, shares it.
    socket.set_reuseaddr(true).expect("a shared port");
    socket.bind(SocketAddr::from(([127, 0, 0, 1], 0))).expect("a free port");
    let addr = socket.local_addr().expect("an address");
    KEPT.lock().unwrap_or_else(PoisonError::into_inner).push(socket);
    addr
}

/// An empty Redis that keeps nothing on disk.
pub async fn redis() -> Result<Service, Missing> {
    Ok(redis_at(free_addr()).await?.unwrap_or_else(|sentence| panic!("{sentence}")))
}

/// A Redis where another one was before: the one that comes back. The inner error says why it could not start there.
pub async fn redis_at(addr: SocketAddr) -> Result<Result<Service, String>, Missing> {
    let started = redis_program(addr)?.try_start(Ready::Line("eady to accept connections".into())).await;
    Ok(started.map(|mut service| {
        service.addr = Some(addr);
        service
    }))
}

/// A Redis that takes its time over `dump`, what another one wrote as `dump.rdb`: it loads a key every `per_key`, and answers
/// `-LOADING` to everybody meanwhile. The inner error says why it could not start there.
pub async fn redis_loading(addr: SocketAddr, dump: &[u8], per_key: Duration) -> Result<Result<Service, String>, Missing> {
    let program = redis_program(addr)?;
    program.file("dump.rdb", dump);
    let delay = per_key.as_micros().to_string();
    let program = program.arguments(["--key-load-delay", &delay, "--loading-process-events-interval-bytes", "1024"]);
    Ok(program.try_start(Ready::Connects(addr)).await)
}

/// A Redis that speaks TLS alone, with this certificate and key in PEM, to nobody but the user `headgate` with this password.
pub async fn redis_tls(certificate: &str, key: &str, password: &str) -> Result<Service, Missing> {
    let addr = free_addr();
    let port = addr.port().to_string();
    let program = redis_program(addr)?;
    let (certificate, key) = (program.file("certificate.pem", certificate), program.file("key.pem", key));
    let program = program.arguments(["--port", "0", "--tls-port", &port, "--tls-auth-clients", "no", "--tls-cert-file"]);
    let program = program.argument(certificate).argument("--tls-key-file").argument(key);
    let user = ["--user", "headgate", "on", &format!(">{password}"), "~*", "&*", "+@all", "--user", "default", "off"];
    let mut service = program.arguments(user).start(Ready::Line("eady to accept connections".into())).await;
    service.addr = Some(addr);
    Ok(service)
}

fn redis_program(addr: SocketAddr) -> Result<Program, Missing> {
    let program = Program::find(&["redis-server", "valkey-server"], "HEADGATE_REDIS_SERVER", "apt-get install redis-server")?;
    let port = addr.port().to_string();
    Ok(program.arguments(["--bind", "127.0.0.1", "--port", &port, "--save", "", "--appendonly", "no", "--daemonize", "no"]))
}

/// A real OpenID Connect provider at `addr`, which signs with a key of this name, new at every start. It knows ann, bob, carl, dora and
/// stale: `tests/identity/provider.mjs` says who they are. The inner error says why it could not start there.
pub async fn identity_at(addr: SocketAddr, key: &str) -> Result<Result<Service, String>, Missing> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/identity");
    if !folder.join("node_modules/oidc-provider").is_dir() {
        return Err(Missing { what: "the identity provider".into(), how: "scripts/tools.sh".into() });
    }
    let program = Program::find(&["node"], "HEADGATE_NODE", "apt-get install nodejs")?;
    let program = program.argument(folder.join("provider.mjs")).argument(addr.port().to_string()).argument(key);
    let started = program.try_start(Ready::Line("issuing at".into())).await;
    Ok(started.map(|mut service| {
        service.addr = Some(addr);
        service
    }))
}

/// A real OpenID Connect provider: its issuer is `http://` and where it listens.
pub async fn identity() -> Result<Service, Missing> {
    Ok(identity_at(free_addr(), "first").await?.unwrap_or_else(|sentence| panic!("{sentence}")))
}

/// An nginx with this inside its `http` block; every `{listen}` is replaced by the address it is to listen on.
pub async fn nginx(http: &str) -> Result<Service, Missing> {
    let addr = free_addr();
    let program = Program::find(&["nginx"], "HEADGATE_NGINX", "apt-get install nginx-light")?;
    let folder = program.folder().display().to_string();
    let paths = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"].map(|kind| format!("{kind}_temp_path {folder}/{kind};"));
    let http = http.replace("{listen}", &addr.to_string());
    let config = program.file(
        "nginx.conf",
        format!(
            "daemon off;\nworker_processes 1;\npid {folder}/pid;\nerror_log stderr;\nevents {{ worker_connections 16384; }}\n\
             http {{ access_log off;\n{}\n{http}\n}}\n",
            paths.join("\n")
        ),
    );
    // Before it has read its config it would complain in a log of its own, which may not be ours to write.
    let program = program.arguments(["-e", "stderr", "-p", &folder]).argument("-c").argument(config);
    Ok(program.start(Ready::Connects(addr)).await)
}

/// A Python that can import every one of `modules`: the one `HEADGATE_PYTHON` points to (that of a venv), or the system's.
pub async fn python(modules: &[&str]) -> Result<Program, Missing> {
    let find = || Program::find(&["python3"], "HEADGATE_PYTHON", "apt-get install python3-venv");
    for module in modules {
        let (status, _) = find()?.arguments(["-c", &format!("import {module}")]).run(Duration::from_secs(60)).await;
        if !status.success() {
            let how = format!("python3 -m venv venv && venv/bin/pip install {module}, and set HEADGATE_PYTHON=venv/bin/python");
            return Err(Missing { what: format!("Python's module {module}"), how });
        }
    }
    find()
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;

    use tokio::net::TcpListener;

    use super::*;
    use crate::client::{Http1, Request, ask};
    use crate::upstream::{Script, Upstream};

    fn shell(script: &str) -> Program {
        Program::at("/bin/sh").argument("-c").argument(script)
    }

    #[tokio::test]
    async fn a_program_runs_to_its_end_and_everything_it_printed_is_kept() {
        let (status, output) = shell("echo out; echo err >&2; pwd; exit 3").run(Duration::from_secs(20)).await;
        assert_eq!(status.code(), Some(3));
        assert!(["out", "err", "headgate-test-"].iter().all(|text| output.contains(text)), "{output}");
    }

    #[tokio::test]
    async fn a_dropped_service_takes_its_children_and_its_folder_with_it() {
        let service = shell("sleep 1000 & echo child $!; wait").start(Ready::Line("child".into())).await;
        let (folder, id) = (service.folder().to_owned(), service.line("child").await);
        let id = id.trim_start_matches("child ").to_owned();
        assert!(is_alive(&id) && folder.is_dir());
        drop(service);
        assert!(!folder.exists());
        let gone = async {
            while is_alive(&id) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        within(Duration::from_secs(10), gone, "the grandchild to be killed").await;
    }

    /// A process that is neither gone nor a zombie waiting for whoever inherited it.
    fn is_alive(id: &str) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
        stat.rsplit(')').next().is_some_and(|rest| !rest.is_empty() && !rest.starts_with(" Z"))
    }

    #[tokio::test]
    async fn a_signal_is_delivered_and_the_end_awaited() {
        let script = "trap 'echo finishing; exit 0' TERM; echo ready; while :; do sleep 0.05; done";
        let mut service = shell(script).start(Ready::Line("ready".into())).await;
        assert!(service.resident_bytes() > 0 && service.open_descriptors() > 0);
        // To the leader's whole group, so that the shell need not wait for its sleep.
        service.signal(Signal::Terminate);
        assert!(service.exited().await.success());
        assert!(service.output().contains("finishing"));
    }

    #[tokio::test]
    #[should_panic(expected = "ended before it was ready: no such thing")]
    async fn a_program_that_fails_to_start_fails_the_test_with_its_words() {
        shell("echo no such thing; exit 1").start(Ready::Line("ready".into())).await;
    }

    #[test]
    fn what_is_missing_is_named_with_the_way_to_get_it() {
        let missing = Program::find(&["no-such-program"], "HEADGATE_NO_SUCH_PROGRAM", "apt-get install nothing")
            .err()
            .expect("nothing has this name");
        let sentence = "no-such-program is missing; to get it: apt-get install nothing, or set HEADGATE_NO_SUCH_PROGRAM";
        assert_eq!(missing.to_string(), sentence);
    }

    #[tokio::test]
    async fn a_free_port_refuses_until_its_program_listens_there_and_again_when_that_is_gone() {
        let addr = free_addr();
        for _ in 0..2 {
            assert_eq!(TcpStream::connect(addr).await.unwrap_err().kind(), ErrorKind::ConnectionRefused);
            let listener = TcpListener::bind(addr).await.expect("it is ours");
            let (_client, accepted) = (TcpStream::connect(addr).await.unwrap(), listener.accept().await.unwrap().0);
            drop((listener, accepted));
        }
    }

    #[tokio::test]
    async fn redis_answers_and_comes_back_where_it_was() {
        let Some(redis) = redis().await.or_skip("redis_answers_and_comes_back_where_it_was") else { return };
        let addr = redis.addr();
        let ping = async || {
            let mut client = Http1::connect(addr).await;
            client.send_bytes(b"PING\r\n").await;
            client.read_bytes(100).await.expect("an answer from Redis")
        };
        assert_eq!(&ping().await[..], b"+PONG\r\n");
        let mut redis = redis;
        redis.signal(Signal::Kill);
        redis.exited().await;
        assert!(TcpStream::connect(addr).await.is_err());
        let _again = redis_at(addr).await.expect("it is installed").expect("its port is free");
        assert_eq!(&ping().await[..], b"+PONG\r\n");
    }

    #[tokio::test]
    async fn nginx_proxies_what_it_is_told_to() {
        let upstream = Upstream::always(Script::reply(200, "text/plain", "behind nginx")).await;
        let server = format!("server {{ listen {{listen}}; location / {{ proxy_pass {}; proxy_http_version 1.1; }} }}", upstream.url());
        let Some(nginx) = nginx(&server).await.or_skip("nginx_proxies_what_it_is_told_to") else { return };
        assert_eq!(ask(nginx.addr(), &Request::get("/")).await.unwrap().text(), "behind nginx");
    }

    #[tokio::test]
    async fn python_is_found_with_the_modules_it_must_have() {
        let Some(python) = python(&["json"]).await.or_skip("python_is_found_with_the_modules_it_must_have") else { return };
        let (status, output) = python.arguments(["-c", "print(6 * 7)"]).run(Duration::from_secs(60)).await;
        assert!(status.success() && output == "42\n", "{output}");
        let missing = super::python(&["no_such_module_at_all"]).await.err().expect("nobody has this module");
        assert!(missing.how.contains("pip install no_such_module_at_all"));
    }
}
