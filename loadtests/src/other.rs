//! Other people's proxies, each set up as one would before a model server: streams are neither buffered nor delayed,
//! connections are kept, upgrades are passed on, a line is logged for each request, and one core is used.

use std::{
    fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
};

/// One of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Other {
    Nginx,
    Haproxy,
    Envoy,
    LiteLlm,
}

impl Other {
    pub(crate) const ALL: [Other; 4] = [Other::Nginx, Other::Haproxy, Other::Envoy, Other::LiteLlm];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Other::Nginx => "nginx",
            Other::Haproxy => "haproxy",
            Other::Envoy => "envoy",
            Other::LiteLlm => "litellm",
        }
    }

    pub(crate) fn named(name: &str) -> Option<Other> {
        Other::ALL.into_iter().find(|other| other.name() == name)
    }

    /// Whether it reads and writes every event, in Python, and so cannot take what proxies can.
    pub(crate) fn is_ai_gateway(self) -> bool {
        self == Other::LiteLlm
    }

    /// Where it is: as `scripts/tools.sh load` installed it, else where the system has it.
    pub(crate) fn program(self) -> PathBuf {
        let python = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.tools/load");
        let installed = match self {
            // The package's own command is a script that takes a second and a place in the tree of processes.
            Other::Envoy => packages(&python).map(|packages| packages.join("envoy/_bin/envoy")),
            Other::LiteLlm => Some(python.join("bin/litellm")),
            Other::Nginx | Other::Haproxy => None,
        };
        installed.filter(|path| path.is_file()).unwrap_or_else(|| self.name().into())
    }

    /// What has to be installed before it can be measured.
    pub(crate) fn missing(self) -> Option<String> {
        let program = self.program();
        let searched = std::env::var_os("PATH").unwrap_or_default();
        // nginx and haproxy are where only root looks.
        let folders = std::env::split_paths(&searched).chain([PathBuf::from("/usr/sbin")]);
        let is_here = program.is_absolute() || folders.into_iter().any(|folder| folder.join(&program).is_file());
        (!is_here).then(|| format!("{} is not installed (scripts/tools.sh load)", self.name()))
    }

    /// Its version, in its own words.
    pub(crate) fn version(self) -> Option<String> {
        let line = |program: &Path, args: &[&str]| {
            let output = Command::new(program).args(args).output().ok()?;
            // nginx tells its version on standard error.
            let text = [output.stdout, output.stderr].concat();
            String::from_utf8_lossy(&text).lines().map(str::trim).find(|line| !line.is_empty()).map(str::to_owned)
        };
        let program = self.program();
        match self {
            // HAProxy adds its date and address.
            Other::Nginx | Other::Haproxy => {
                line(&program, &["-v"]).map(|said| said.split_whitespace().take(3).collect::<Vec<_>>().join(" "))
            }
            // "/where/it/is/envoy  version: 8a..d3/1.40.0/Clean/RELEASE/BoringSSL"
            Other::Envoy => {
                let said = line(&program, &["--version"])?;
                Some(format!("Envoy {}", said.split("version: ").nth(1)?.split('/').nth(1)?))
            }
            // Asked of itself it loads all its providers first.
            Other::LiteLlm => {
                let version = "import importlib.metadata as m; print('LiteLLM', m.version('litellm'))";
                line(&program.with_file_name("python"), &["-c", version])
            }
        }
    }

    /// Writes its config into a folder, and says to the command where it is. `key` is what clients will show.
    pub(crate) fn set_up(self, command: &mut Command, folder: &Path, listen: SocketAddr, model: SocketAddr, key: &str) -> io::Result<()> {
        let config = folder.join("config.yaml");
        fs::write(
            &config,
            match self {
                Other::Nginx => nginx(folder, listen, model),
                Other::Haproxy => haproxy(listen, model),
                Other::Envoy => envoy(folder, listen, model),
                Other::LiteLlm => litellm(model),
            },
        )?;
        match self {
            Other::Nginx => command.arg("-c").arg(config).arg("-p").arg(folder),
            Other::Haproxy => command.arg("-db").arg("-f").arg(config),
            Other::Envoy => command.arg("-c").arg(config).args(["--concurrency", "1", "--disable-hot-restart", "--log-level", "error"]),
            Other::LiteLlm => command
                .arg("--config")
                .arg(config)
                .args(["--host", "127.0.0.1", "--num_workers", "1", "--telemetry", "False", "--port"])
                .arg(listen.port().to_string())
                // It would fetch a list of prices.
                .env("LITELLM_LOCAL_MODEL_COST_MAP", "True")
                .env("LITELLM_LOG", "ERROR")
                .env("LITELLM_MASTER_KEY", key),
        };
        Ok(())
    }
}

/// Where a virtual environment keeps its packages.
fn packages(python: &Path) -> Option<PathBuf> {
    let mut versions = fs::read_dir(python.join("lib")).ok()?.flatten();
    versions.find(|entry| entry.file_name().to_string_lossy().starts_with("python")).map(|entry| entry.path().join("site-packages"))
}

fn nginx(folder: &Path, listen: SocketAddr, model: SocketAddr) -> String {
    let folder = folder.display();
    format!(
        "daemon off; worker_processes 1; worker_rlimit_nofile 20000; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{ worker_connections 20000; }}
http {{
  access_log {folder}/access.log;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  tcp_nodelay on; keepalive_requests 1000000000; keepalive_timeout 1h;
  upstream model {{ server {model}; keepalive 1024; keepalive_requests 1000000000; keepalive_timeout 1h; }}
  map $http_upgrade $connection_of_model {{ default upgrade; '' ''; }}
  server {{
    listen {listen} backlog=4096;
    location / {{
      proxy_pass http://model; proxy_http_version 1.1;
      proxy_set_header Upgrade $http_upgrade; proxy_set_header Connection $connection_of_model;
      proxy_buffering off; proxy_read_timeout 1h; proxy_send_timeout 1h;
    }}
  }}
}}
"
    )
}

/// `http-no-delay`, since events would wait for each other, and `abortonclose`, since a client that leaves would not be seen
/// before the second event after it.
fn haproxy(listen: SocketAddr, model: SocketAddr) -> String {
    format!(
        "global
  maxconn 9900
  nbthread 1
  log stdout format raw local0
defaults
  mode http
  log global
  option httplog
  option http-no-delay
  option abortonclose
  http-reuse always
  timeout connect 5s
  timeout client 1h
  timeout server 1h
  timeout tunnel 1h
frontend clients
  bind {listen} backlog 4096
  default_backend model
backend model
  server model {model} pool-max-conn 1024 pool-purge-delay 1h
"
    )
}

fn envoy(folder: &Path, listen: SocketAddr, model: SocketAddr) -> String {
    let address = |at: SocketAddr| format!("{{ socket_address: {{ address: {}, port_value: {} }} }}", at.ip(), at.port());
    let (listen, model, folder) = (address(listen), address(model), folder.display());
    format!(
        "static_resources:
  listeners:
    - name: clients
      address: {listen}
      tcp_backlog_size: 4096
      filter_chains:
        - filters:
            - name: envoy.filters.network.http_connection_manager
              typed_config:
                '@type': type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
                stat_prefix: clients
                stream_idle_timeout: 0s
                upgrade_configs: [{{ upgrade_type: websocket }}]
                access_log:
                  - name: envoy.access_loggers.file
                    typed_config:
                      '@type': type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog
                      path: {folder}/access.log
                route_config:
                  virtual_hosts:
                    - name: all
                      domains: ['*']
                      routes: [{{ match: {{ prefix: / }}, route: {{ cluster: model, timeout: 0s }} }}]
                http_filters:
                  - name: envoy.filters.http.router
                    typed_config: {{ '@type': type.googleapis.com/envoy.extensions.filters.http.router.v3.Router }}
  clusters:
    - name: model
      connect_timeout: 5s
      circuit_breakers:
        thresholds: [{{ max_connections: 100000, max_pending_requests: 100000, max_requests: 100000 }}]
      load_assignment:
        cluster_name: model
        endpoints: [{{ lb_endpoints: [{{ endpoint: {{ address: {model} }} }}] }}]
"
    )
}

fn litellm(model: SocketAddr) -> String {
    format!(
        "model_list:
  - model_name: demo
    litellm_params: {{ model: openai/demo, api_base: 'http://{model}/v1', api_key: none, timeout: 3600 }}
litellm_settings: {{ num_retries: 0, request_timeout: 3600, telemetry: false }}
"
    )
}

#[cfg(test)]
mod tests {
    use std::{io::Write as _, net::Ipv4Addr, process::Stdio};

    use super::*;

    /// What an installed proxy says of its config; those that are not installed are named.
    #[test]
    fn proxies_accept_their_configs() {
        let (listen, model) = ((Ipv4Addr::LOCALHOST, 1).into(), (Ipv4Addr::LOCALHOST, 9).into());
        for (other, checking) in [(Other::Nginx, &["-t"][..]), (Other::Haproxy, &["-c"]), (Other::Envoy, &["--mode", "validate"])] {
            if let Some(missing) = other.missing() {
                // Envoy is a large download, which only load runs need.
                let may_lack = other == Other::Envoy || std::env::var("HEADGATE_REQUIRE_SERVICES").as_deref() != Ok("1");
                assert!(may_lack, "{missing}");
                // Past the capture of a test's output: it is to be seen.
                drop(writeln!(io::stderr(), "SKIPPED the config of a peer: {missing}"));
                continue;
            }
            let folder = tempfile::tempdir().unwrap();
            let mut command = Command::new(other.program());
            other.set_up(&mut command, folder.path(), listen, model, "sk-none").unwrap();
            let output = command.args(checking).stdin(Stdio::null()).output().unwrap();
            assert!(output.status.success(), "{}: {}", other.name(), String::from_utf8_lossy(&output.stderr));
            assert!(other.version().is_some_and(|version| version.contains('.')), "{}", other.name());
        }
    }
}
