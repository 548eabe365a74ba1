//! `headgate dev`: everything in one process, nothing to configure; and `headgate slm`, the model alone.

use std::{
    io,
    net::SocketAddr,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
};

use headgate_filters::{auth::KeyHash, unix_now};
use headgate_slm::{Options, Slm};
use tokio::net::TcpListener;

use super::{
    EX_CONFIG, EX_UNAVAILABLE, fail,
    run::{Signals, begin_logs, told_to_stop},
    token,
};
use crate::shell::{Process, Sockets};

/// The config that `headgate dev` runs: a good one to begin from (`headgate dev --print-config`).
const CONFIG: &str = include_str!("dev.yaml");

/// Where to listen, and who answers.
#[derive(clap::Args)]
#[command(
    after_help = "The page is at the printed URL, with the token in it. By hand:\n\n  curl -N http://127.0.0.1:8080/v1/chat/stream -H \"authorization: Bearer $TOKEN\" -H 'content-type: application/json' \\\n    -d '{\"messages\":[{\"role\":\"user\",\"content\":\"what is your email address?\"}]}'\n\nThe demo model is two million parameters small and knows a little about a web shop. Ask it for its e-mail address or the card on file\nto see masking, and to tell a secret to see a refusal."
)]
pub struct Args {
    /// Where clients connect; port 0 lets the system choose.
    #[arg(long, default_value = "127.0.0.1:8080")]
    pub listen: SocketAddr,
    /// Where operators look: /healthz /readyz /metrics /config.
    #[arg(long, default_value = "127.0.0.1:9090")]
    pub admin: SocketAddr,
    /// An OpenAI-compatible server that answers instead of the embedded model, e.g. http://127.0.0.1:8081.
    #[arg(long, value_name = "URL")]
    pub model_server: Option<http::Uri>,
    /// Tokens per second of the embedded model, so that streaming can be seen; 0 is as fast as it goes.
    #[arg(long, default_value_t = 40.0)]
    pub pace: f32,
    /// An OTLP collector for traces, e.g. http://127.0.0.1:4318.
    #[arg(long, value_name = "URL")]
    pub otlp: Option<http::Uri>,
    /// Print the config that this runs, and stop.
    #[arg(long)]
    pub print_config: bool,
}

/// Runs everything until it is told to stop.
pub async fn run(args: Args) -> ExitCode {
    if args.print_config {
        return print(CONFIG);
    }
    let token = match token::fresh() {
        Ok(token) => token,
        Err(error) => return fail(&error, EX_UNAVAILABLE),
    };
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    let open = |address| {
        std::net::TcpListener::bind(address).map_err(|error| io::Error::new(error.kind(), format!("cannot listen on {address}: {error}")))
    };
    let sockets = match (open(args.listen), open(args.admin), open(any), open(any)) {
        (Ok(clients), Ok(admin), Ok(orchestrator), Ok(slm)) => {
            Sockets { clients: Some(clients), admin: Some(admin), orchestrator: Some(orchestrator), slm: Some(slm) }
        }
        (clients, admin, orchestrator, slm) => {
            let errors = [clients.err(), admin.err(), orchestrator.err(), slm.err()];
            return errors.into_iter().flatten().next().map_or(ExitCode::FAILURE, |error| fail(&error, EX_UNAVAILABLE));
        }
    };
    let at = |socket: &Option<std::net::TcpListener>| {
        socket.as_ref().and_then(|socket| socket.local_addr().ok()).map_or_else(String::new, |address| address.to_string())
    };
    let (orchestrator, slm) = (at(&sockets.orchestrator), at(&sockets.slm));
    let events = match events_folder() {
        Ok(folder) => folder,
        Err(error) => return fail(&error, EX_UNAVAILABLE),
    };
    let variables = |name: &str| {
        Some(match name {
            "HEADGATE_DEV_LISTEN" => at(&sockets.clients),
            "HEADGATE_DEV_ADMIN" => at(&sockets.admin),
            "HEADGATE_DEV_ORCHESTRATOR" => orchestrator.clone(),
            "HEADGATE_DEV_EVENTS" => events.display().to_string(),
            "HEADGATE_DEV_SLM" => slm.clone(),
            "HEADGATE_DEV_MODEL_SERVER" => args.model_server.as_ref().map_or_else(|| format!("http://{slm}"), ToString::to_string),
            "HEADGATE_DEV_KEY" => KeyHash::of(&token).to_string(),
            _ => return std::env::var(name).ok(),
        })
    };
    let folder = match written() {
        Ok(folder) => folder,
        Err(error) => return fail(&error, EX_UNAVAILABLE),
    };
    let mut plan = match headgate_config::parse("dev.yaml", CONFIG, &folder, None, &variables) {
        Ok(plan) => plan,
        Err(faults) => return fail(&faults, EX_CONFIG),
    };
    drop(std::fs::remove_dir_all(&folder));
    if let Some(slm) = &mut plan.slm {
        slm.pace = (args.pace > 0.0).then_some(args.pace);
    }
    plan.observability.otlp = args.otlp;
    let logs = match begin_logs(&plan) {
        Ok(logs) => logs,
        Err(error) => return fail(&error, EX_CONFIG),
    };
    // Before anybody can see us run: a signal that nobody listens for ends the process, and leaves the events behind.
    let mut signals = Signals::listen();
    let process = match Process::start(&plan, sockets).await {
        Ok(process) => process,
        Err(error) => return fail(&error, EX_UNAVAILABLE),
    };
    if let Some(clients) = process.clients {
        greet(&clients.to_string(), process.admin, &events, &token);
    }
    signals.stop().await;
    let ended = tokio::select! {
        ended = process.stop() => ended,
        () = signals.stop() => false,
    };
    // Nobody has a use for the events of a demo that is over.
    drop(std::fs::remove_dir_all(&events));
    logs.end(std::time::Duration::from_secs(5)).await;
    if ended { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

#[expect(clippy::print_stdout, reason = "the command line speaks to a person")]
fn greet(clients: &str, admin: Option<SocketAddr>, events: &Path, token: &str) {
    println!("chat page   http://{clients}/#token={token}");
    println!("turns       http://{clients}/v1/chat/stream        server-sent events, WebSocket");
    println!("OpenAI      http://{clients}/v1                    any OpenAI SDK");
    if let Some(admin) = admin {
        println!("operators   http://{admin}/metrics             also /readyz, /config");
    }
    println!("events      headgate events tail --follow {}", events.display());
    println!("token       {token}");
    println!();
    println!("curl -N http://{clients}/v1/chat/stream -H 'authorization: Bearer {token}' \\");
    println!(
        "  -H 'content-type: application/json' -d '{{\"messages\":[{{\"role\":\"user\",\"content\":\"what is your email address?\"}}]}}'"
    );
}

#[expect(clippy::print_stdout, reason = "the command line speaks to a person")]
fn print(text: &str) -> ExitCode {
    print!("{text}");
    ExitCode::SUCCESS
}

/// A folder for the events of this run alone, as long as it lasts: two of them do not meet.
fn events_folder() -> io::Result<PathBuf> {
    let folder = std::env::temp_dir().join(format!("headgate-dev-events-{}-{}", std::process::id(), unix_now()));
    // It fails where something of that name is there: temporary folders are everybody's.
    std::fs::DirBuilder::new().mode(0o700).create(&folder)?;
    Ok(folder)
}

/// The files that the built-in config names, in a folder of their own, as long as it takes to read them.
fn written() -> io::Result<PathBuf> {
    let folder = std::env::temp_dir().join(format!("headgate-dev-{}-{}", std::process::id(), unix_now()));
    std::fs::create_dir(&folder)?;
    std::fs::write(folder.join("constitution.md"), include_str!("dev-constitution.md"))?;
    std::fs::write(folder.join("deny.txt"), include_str!("dev-deny.txt"))?;
    Ok(folder)
}

/// Which model, where.
#[derive(clap::Args)]
#[command(
    after_help = "Example: headgate slm --listen 127.0.0.1:8091, then an upstream `{ protocol: openai, endpoints: [http://127.0.0.1:8091] }`."
)]
pub struct SlmArgs {
    /// Where to listen.
    #[arg(long, default_value = "127.0.0.1:8091")]
    pub listen: SocketAddr,
    /// A GGUF file (llama architecture, F32 or Q8_0, a ChatML vocabulary) instead of the embedded model.
    #[arg(long, value_name = "FILE")]
    pub model: Option<PathBuf>,
    /// Tokens per second of each answer at most; 0 is as fast as it goes.
    #[arg(long, default_value_t = 0.0)]
    pub pace: f32,
}

/// Serves the model until it is told to stop.
pub async fn slm(args: SlmArgs) -> ExitCode {
    let model = match &args.model {
        None => Slm::embedded(),
        Some(path) => match Slm::load(path) {
            Ok(model) => model,
            Err(error) => return fail(&error, EX_CONFIG),
        },
    };
    // Without a collector nothing can fail.
    let _logs = crate::telemetry::logs::begin(Default::default(), "info", None);
    let listener = match TcpListener::bind(args.listen).await {
        Ok(listener) => listener,
        Err(error) => return fail(&io::Error::new(error.kind(), format!("cannot listen on {}: {error}", args.listen)), EX_UNAVAILABLE),
    };
    tracing::info!(listen = %args.listen, model = model.name(), "running");
    let options = Options { pace: (args.pace > 0.0).then_some(args.pace), ..Options::default() };
    headgate_slm::serve(listener, Arc::new(model), options, told_to_stop()).await;
    ExitCode::SUCCESS
}
