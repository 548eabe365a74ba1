//! The command line: one binary, one verb for each thing a person wants.

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

pub mod chat;
pub mod check;
pub mod dev;
pub mod events;
pub mod keys;
mod place;
pub mod policy;
pub mod run;
pub mod schema;
pub mod token;
pub mod training;

/// A streaming chat gateway: moderates answers while they stream, releases each byte the moment it is provably clean, and signs
/// what it did.
#[derive(Parser)]
#[command(
    name = "headgate",
    version,
    about,
    after_help = "Begin with `headgate dev`: everything in one process, nothing to configure.\nThen write a config, `headgate check` it, and `headgate run` it."
)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run everything in one process on embedded defaults: gateway, orchestrator, a small language model, a chat page.
    Dev(dev::Args),
    /// Run what a config file names.
    Run(run::Args),
    /// Run only the orchestrator of a config file.
    Orchestrator(run::Args),
    /// Run only the embedded language model, behind an OpenAI-compatible server.
    Slm(dev::SlmArgs),
    /// Say what a config comes to, or everything that is wrong with it.
    Check(check::Args),
    /// Print the schemas of the config and of everything on the wire.
    Schema(schema::Args),
    /// Show or judge the log of what became of each turn.
    #[command(subcommand)]
    Events(events::Events),
    /// Make, rotate, revoke and show the keys that sign verdicts; check the record of it.
    #[command(subcommand)]
    Keys(keys::Keys),
    /// Put a policy in force, show what is, and go back to the one before.
    #[command(subcommand)]
    Policy(policy::Policy),
    /// Turn training mode on and off, approve of it, show it, and judge its audit.
    #[command(subcommand)]
    Training(training::Training),
    /// Make an API key.
    Token(token::Args),
    /// Talk through a gateway from this terminal.
    Chat(chat::Args),
    /// Print completions for a shell.
    #[command(after_help = "Example: headgate completions bash > /etc/bash_completion.d/headgate")]
    Completions {
        /// bash, zsh, fish, elvish or powershell.
        shell: clap_complete::Shell,
    },
}

/// Exit code for bad usage, as sysexits has it.
pub const EX_USAGE: u8 = 64;
/// Exit code for something that is not available: a port, a file.
pub const EX_UNAVAILABLE: u8 = 69;
/// Exit code for a bad configuration.
pub const EX_CONFIG: u8 = 78;

/// Runs the command line to its end.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let code = if error.use_stderr() { ExitCode::from(EX_USAGE) } else { ExitCode::SUCCESS };
            // Nobody is left to tell if even this fails.
            drop(error.print());
            return code;
        }
    };
    match cli.command {
        Command::Dev(args) => block_on(dev::run(args)),
        Command::Run(args) => block_on(run::run(args, run::Part::All)),
        Command::Orchestrator(args) => block_on(run::run(args, run::Part::Orchestrator)),
        Command::Slm(args) => block_on(dev::slm(args)),
        Command::Check(args) => check::run(args),
        Command::Schema(args) => schema::run(args),
        Command::Events(args) => events::run(args),
        Command::Keys(keys) => keys::run(keys),
        Command::Policy(policy) => block_on(policy::run(policy)),
        Command::Training(training) => block_on(training::run(training)),
        Command::Token(args) => token::run(args),
        Command::Chat(args) => block_on(chat::run(args)),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "headgate", &mut std::io::stdout());
            ExitCode::SUCCESS
        }
    }
}

fn block_on(run: impl Future<Output = ExitCode>) -> ExitCode {
    match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime.block_on(run),
        Err(error) => say(format_args!("cannot start: {error}"), EX_UNAVAILABLE),
    }
}

/// An error for a person, with all its causes, and the exit code for it.
pub(crate) fn fail(error: &dyn std::error::Error, code: u8) -> ExitCode {
    let mut line = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        line.push_str(": ");
        line.push_str(&cause.to_string());
        next = cause.source();
    }
    say(format_args!("{line}"), code)
}

#[expect(clippy::print_stderr, reason = "the command line speaks to a person")]
fn say(line: std::fmt::Arguments<'_>, code: u8) -> ExitCode {
    eprintln!("headgate: {line}");
    ExitCode::from(code)
}
