//! `headgate-slm`: serves the embedded model, or one from a file, on its own port.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use headgate_slm::{Options, Slm, serve};
use tracing_subscriber::EnvFilter;

/// A small language model behind an OpenAI-compatible API, for demos and tests.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// Where to listen; port 0 takes any free one, which the log names.
    #[arg(long, env = "HEADGATE_SLM_LISTEN", default_value = "127.0.0.1:8081")]
    listen: SocketAddr,
    /// A GGUF file (llama architecture, F32 or Q8_0) instead of the embedded model.
    #[arg(long, env = "HEADGATE_SLM_MODEL")]
    model: Option<PathBuf>,
    /// Tokens per second of each turn at most, so that one can watch them come.
    #[arg(long, env = "HEADGATE_SLM_PACE")]
    pace: Option<f32>,
    /// Turns answered at once.
    #[arg(long, default_value_t = Options::default().turns)]
    turns: usize,
    /// Turns that may wait for their turn; more are refused.
    #[arg(long, default_value_t = Options::default().queue)]
    queue: usize,
    /// Keep the last requests, without their text, for GET /debug/requests.
    #[arg(long)]
    debug_requests: bool,
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().json().with_env_filter(filter).with_writer(std::io::stderr).init();
    match run(arguments).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            tracing::error!("{why}");
            ExitCode::FAILURE
        }
    }
}

async fn run(arguments: Arguments) -> Result<(), String> {
    let slm = match &arguments.model {
        Some(path) => Slm::load(path).map_err(|e| format!("cannot load {}: {e}", path.display()))?,
        None => Slm::embedded(),
    };
    let listener =
        tokio::net::TcpListener::bind(arguments.listen).await.map_err(|e| format!("cannot listen on {}: {e}", arguments.listen))?;
    let address = listener.local_addr().map_err(|e| format!("cannot tell the address: {e}"))?;
    let options = Options {
        turns: arguments.turns,
        queue: arguments.queue,
        pace: arguments.pace,
        debug_requests: arguments.debug_requests,
        ..Options::default()
    };
    tracing::info!(%address, model = slm.name(), context_tokens = slm.context_tokens(), turns_bytes_max = slm.turn_bytes_max() * options.turns, "serving");
    serve(listener, Arc::new(slm), options, asked_to_stop()).await;
    Ok(())
}

async fn asked_to_stop() {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        if let Ok(mut terminate) = signal(SignalKind::terminate()) {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = tokio::signal::ctrl_c() => {}
            }
            return;
        }
    }
    let _ = tokio::signal::ctrl_c().await;
}
