//! `headgate dev`, as a person starts it: the real program, in a process of its own.

use std::{net::SocketAddr, time::Duration};

use headgate_testkit::{
    services::{Program, Ready, Service, Signal},
    within,
};

/// A demo that runs.
pub(crate) struct Demo {
    /// The program.
    pub service: Service,
    /// Where clients connect.
    pub clients: SocketAddr,
    /// Where operators look.
    pub admin: SocketAddr,
    /// The token it printed.
    pub token: String,
}

impl Demo {
    /// Starts one. `pace`: tokens per second, 0 for as fast as the model goes.
    pub(crate) async fn start(pace: u32) -> Demo {
        let any = "127.0.0.1:0";
        let program = Program::at(env!("CARGO_BIN_EXE_headgate")).arguments(["dev", "--listen", any, "--admin", any]);
        let service = program.argument("--pace").argument(pace.to_string()).start(Ready::Line("curl ".into())).await;
        let said = async |name: &str| {
            let line = service.line(name).await;
            line.split_whitespace().nth(1).unwrap_or_else(|| panic!("{line} says nothing")).to_owned()
        };
        let address = |url: String| -> SocketAddr {
            let authority = url.trim_start_matches("http://").split('/').next().unwrap_or_default().to_owned();
            authority.parse().unwrap_or_else(|_| panic!("{url} has no address"))
        };
        let (clients, admin, token) = (address(said("OpenAI ").await), address(said("operators ").await), said("token ").await);
        Demo { service, clients, admin, token }
    }

    /// Tells it to stop: its exit code.
    pub(crate) async fn stop(mut self) -> Option<i32> {
        self.service.signal(Signal::Terminate);
        within(Duration::from_secs(20), self.service.exited(), "the demo to drain and end").await.code()
    }
}
