//! Upstreams over real sockets, against servers that do exactly what a script says.

mod answers;
mod cancel;
mod faults;
mod figures;
mod forward;
mod hop;
mod kept;
mod requests;
mod retries;
mod tls;

use std::time::Duration;

use headgate_contracts::{Batch, Code, Fault, Finish, Lane, Message, Prompt, Role, SessionId, TurnId, What};
use headgate_upstream::{Answer, Protocol, Settings, Upstream};

/// An upstream with these endpoints and no health checks, changed by the test.
fn upstream(endpoints: &[String], change: impl FnOnce(&mut Settings)) -> Upstream {
    let mut settings = Settings { endpoints: endpoints.iter().map(|uri| uri.parse().unwrap()).collect(), ..Settings::default() };
    settings.health.interval = None;
    change(&mut settings);
    Upstream::new("chat", settings).unwrap()
}

fn openai(endpoint: &headgate_testkit::upstream::Upstream) -> Upstream {
    upstream(&[endpoint.url()], |_| {})
}

fn orchestrator(endpoint: &headgate_testkit::upstream::Upstream) -> Upstream {
    upstream(&[endpoint.url()], |settings| settings.protocol = Protocol::Orchestrator)
}

fn prompt() -> Prompt {
    Prompt::new(TurnId::fresh(), SessionId::fresh(), vec![Message::new(Role::User, "hello")])
}

/// All content an answer gives, and how it ended.
async fn read(answer: &mut Answer) -> (String, Result<Finish, Fault>) {
    let mut batch = Batch::new();
    let mut said = String::new();
    loop {
        match answer.next(&mut batch).await {
            Ok(true) => {
                assert!(!batch.is_empty(), "a batch without events");
                said.push_str(&content(&batch));
            }
            Ok(false) => return (said, Ok(answer.finish())),
            Err(fault) => return (said, Err(fault)),
        }
    }
}

fn content(batch: &Batch) -> String {
    let pieces = batch.events().iter().filter_map(|event| match event.what {
        What::Text { lane: Lane::DEFAULT, text } => Some(batch.text(text)),
        _ => None,
    });
    pieces.collect()
}

/// The whole turn.
async fn turn(upstream: &Upstream) -> (String, Result<Finish, Fault>) {
    match upstream.open(&prompt()).await {
        Ok(mut answer) => read(&mut answer).await,
        Err(fault) => (String::new(), Err(fault)),
    }
}

#[track_caller]
fn code<T: std::fmt::Debug>(result: Result<T, Fault>) -> Code {
    result.expect_err("a fault").code
}

/// A multi-threaded runtime may move them.
fn _is_send(upstream: &'static Upstream, prompt: &'static Prompt, answer: &'static mut Answer, batch: &'static mut Batch) {
    fn send(_: impl Send) {}
    send(upstream.open(prompt));
    send(answer.next(batch));
    send(upstream.forward(http::Request::new(http_body_util::Empty::new())));
}

const SECOND: Duration = Duration::from_secs(1);
