//! The binary `headgate`.

use std::process::ExitCode;

fn main() -> ExitCode {
    headgate_gateway::cli::main()
}
