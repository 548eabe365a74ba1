//! `headgate training`: turns training mode on and off, approves of it, shows it, and judges its audit.

use std::{
    io::{self, Read, Write},
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, SystemTime},
};

use headgate_config::Environment;
use headgate_contracts::{
    Code, Secret,
    wire::{
        log::rfc3339,
        problem,
        training::{Mode, TrainingState},
    },
};
use headgate_orchestrator::{
    events::Brokers,
    training::{Heads, Judged, verify_export, verify_file},
};
use headgate_policy::audit::AuditFault;
use http::{Request, Response, StatusCode, Uri, header};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use tokio::time::timeout;

use super::{
    EX_UNAVAILABLE, EX_USAGE, fail,
    place::{Place, token},
    say,
};
use crate::build;

/// Where the calls are, unless the URL names another path.
const PATH: &str = "/v1/training";
/// How long an answer may take: an orchestrator waits for its audit ten seconds at most, for each of up to three records.
const PATIENCE: Duration = Duration::from_secs(40);

/// What to do about training mode.
#[derive(clap::Subcommand)]
pub enum Training {
    /// Turn training mode on for the tenant of the token.
    #[command(after_help = "\
Turns of the tenant then run as always, and their verdicts and events say `mode: training`. One admin at a time: the lock is renewed
until it is given back, and for as long as `max_hold` of the config says. To go on for longer, ask another admin to run
`headgate training approve` before that; without it, training mode is off then, and only another admin can turn it on again.

The token is an access token of the identity provider that `orchestrator.training` of the config names: for its audience, with its
role, of somebody who has signed in within five minutes. Give it in the environment or a file; nothing prints it.

Exit codes: 0 it is on; 1 refused, with the reason and what helps; 69 nobody can say or do it now.

Examples:
  export HEADGATE_TOKEN=...
  headgate training enable --orchestrator http://orchestrator:8090
  headgate training enable --orchestrator https://chat.example.com --token-file token.txt")]
    Enable(Call),
    /// Let another admin go on who has turned training mode on.
    #[command(after_help = "\
The lock's end moves to `max_hold` from now; its owner and its fence stay. It needs another admin than the owner, and is on record.

Exit codes: as for enable. Example: headgate training approve --orchestrator http://orchestrator:8090")]
    Approve(Call),
    /// Turn training mode off. Any admin of the tenant may.
    #[command(after_help = "Exit codes: as for enable. Example: headgate training disable --orchestrator http://orchestrator:8090")]
    Disable(Call),
    /// Show whether the tenant of the token is in training mode, by whom and until when.
    #[command(after_help = "\
Exit codes: as for enable.

Example: headgate training show --orchestrator http://orchestrator:8090 --json | jq .until")]
    Show(Call),
    /// Judge the audit: that no record was changed, left out or put in, and that it tells of locks that can have been.
    #[command(after_help = "\
Each record's hash is that of its bytes, and names the record before of its writer and tenant. Each lock is acquired once, before
anything is said of its fence, which is the place of that record; fences of a tenant rise; nobody approves of a lock of their own.

Records cut off the end leave no trace in the chain. Each orchestrator remembers where its chains end, in `training.json` beside its
event log: copy it first, then judge, with --heads for every orchestrator that writes.

A lock without an end is held, or nobody could tell of its end: Redis had forgotten it and its orchestrator was gone.

Exit codes: 0 all is well; 1 there are violations, the first of them printed; 69 the audit cannot be read.

Examples:
  headgate training verify --brokers kafka-1:9092,kafka-2:9092
  headgate training verify --config headgate.yaml --env production --heads desk-1.json --heads desk-2.json
  headgate training verify --file exported.jsonl
  headgate training verify --alone events/training.jsonl")]
    Verify(Verify),
}

/// Whom to ask, as whom.
#[derive(clap::Args)]
pub struct Call {
    /// The orchestrator, or a gateway with a route to it; http or https. A path names another than /v1/training.
    #[arg(long, value_name = "URL", env = "HEADGATE_ORCHESTRATOR")]
    orchestrator: Uri,
    /// An access token of the identity provider. Others see what is on a command line: better HEADGATE_TOKEN, or --token-file.
    #[arg(long, env = "HEADGATE_TOKEN", hide_env_values = true, value_parser = token, conflicts_with = "token_file")]
    token: Option<Secret>,
    /// The file with the token; `-`: standard input.
    #[arg(long, value_name = "FILE", required_unless_present = "token")]
    token_file: Option<PathBuf>,
    /// Print the state as the orchestrator answers it, one JSON object.
    #[arg(long)]
    json: bool,
}

/// Which audit, and what must be in it.
#[derive(clap::Args)]
pub struct Verify {
    /// The topic is on these brokers, each as host:port.
    #[arg(long, value_delimiter = ',', required_unless_present_any = ["config", "file", "alone"])]
    brokers: Vec<String>,
    /// The topic of this config, with all that `orchestrator.events.kafka` says: for brokers that want TLS or a password.
    #[arg(long, value_name = "FILE", conflicts_with = "brokers")]
    config: Option<PathBuf>,
    /// The overlay of this environment over the config.
    #[arg(long, env = "HEADGATE_ENV")]
    env: Option<Environment>,
    /// The name of the topic. Default: that of the config, or `training.audit`.
    #[arg(long)]
    topic: Option<String>,
    /// A file of records that were exported from the topic, one a line, those of a tenant in their order.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["brokers", "config", "topic"])]
    file: Option<PathBuf>,
    /// The audit of an orchestrator that is alone: `training.jsonl` beside its event log.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["brokers", "config", "topic", "file", "heads"])]
    alone: Option<PathBuf>,
    /// Where an orchestrator remembers that its chains end: `training.json` beside its event log. May be given several times.
    #[arg(long, value_name = "FILE")]
    heads: Vec<PathBuf>,
    /// Take locks without an end for violations.
    #[arg(long)]
    ended: bool,
}

/// Asks, or judges.
pub async fn run(training: Training) -> ExitCode {
    let (call, args) = match &training {
        Training::Enable(args) => ("/enable", args),
        Training::Approve(args) => ("/approve", args),
        Training::Disable(args) => ("/disable", args),
        Training::Show(args) => ("", args),
        Training::Verify(args) => {
            let judged = tokio::task::block_in_place(|| judge(args));
            return match judged.and_then(|judged| tell(&judged, args.ended, &mut io::stdout().lock())) {
                Ok(code) => code,
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
                Err(error) => fail(&error, EX_UNAVAILABLE),
            };
        }
    };
    let place = match Place::of(&args.orchestrator, PATH) {
        Ok(place) => place,
        Err(error) => return fail(&error, EX_USAGE),
    };
    let token = match args.token.clone().map_or_else(|| token_of(args.token_file.as_deref()), Ok) {
        Ok(token) => token,
        Err(error) => return fail(&error, EX_USAGE),
    };
    if place.is_exposed() {
        say(format_args!("the token goes over a connection that is not encrypted"), 0);
    }
    let path = format!("{}{call}", place.path);
    let request = if call.is_empty() { Request::get(path) } else { Request::post(path) };
    let answered = timeout(PATIENCE, async {
        let response = place.ask(Some(&token), request.header(header::ACCEPT, "application/json"), Vec::new()).await?;
        Ok::<_, super::place::Unreached>(Answer::of(response).await)
    });
    match answered.await {
        Ok(Ok(answer)) => match answer.state() {
            Some(state) => match shown(&state, &answer, args.json, &mut io::stdout().lock()) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
                Err(error) => fail(&error, EX_UNAVAILABLE),
            },
            None => say(format_args!("{}", answer.refusal()), answer.exit_code()),
        },
        Ok(Err(error)) => fail(&error, EX_UNAVAILABLE),
        Err(_) => {
            say(format_args!("no answer in {} s; whether it was done, `headgate training show` tells", PATIENCE.as_secs()), EX_UNAVAILABLE)
        }
    }
}

fn token_of(file: Option<&Path>) -> io::Result<Secret> {
    let Some(file) = file else { return Err(io::Error::other("no token")) };
    let about = |error: io::Error| io::Error::new(error.kind(), format!("cannot read the token in {}: {error}", file.display()));
    let mut text = String::new();
    // Longer than any header that an orchestrator takes.
    let limit = 64 << 10;
    if file == Path::new("-") {
        io::stdin().lock().take(limit).read_to_string(&mut text).map_err(about)?;
    } else {
        std::fs::File::open(file).and_then(|opened| opened.take(limit).read_to_string(&mut text)).map_err(about)?;
    }
    token(&text).map_err(|why| io::Error::other(format!("no token in {}: {why}", file.display())))
}

/// What an orchestrator answered.
struct Answer {
    status: StatusCode,
    /// Seconds after which to ask again.
    wait: Option<u64>,
    body: Vec<u8>,
}

/// What a refusal says.
#[derive(Default, serde::Deserialize)]
struct Problem {
    code: Option<String>,
    detail: Option<String>,
}

impl Answer {
    async fn of(response: Response<Incoming>) -> Answer {
        let status = response.status();
        let wait = response.headers().get(header::RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
        let body = Limited::new(response.into_body(), problem::MAX_BODY_BYTES).collect().await;
        Answer { status, wait, body: body.map(|body| body.to_bytes().to_vec()).unwrap_or_default() }
    }

    /// The state, if it is one.
    fn state(&self) -> Option<TrainingState> {
        (self.status == StatusCode::OK).then(|| serde_json::from_slice(&self.body).ok()).flatten()
    }

    fn exit_code(&self) -> u8 {
        if self.status.is_server_error() { EX_UNAVAILABLE } else { 1 }
    }

    /// Why not, and what helps.
    fn refusal(&self) -> String {
        let Problem { code, detail } = serde_json::from_slice(&self.body).unwrap_or_default();
        let code = code.as_deref();
        let detail = detail.filter(|detail| Code::ALL.iter().all(|code| code.summary() != detail));
        let remedy = match (self.status.as_u16(), code) {
            (401, Some("token_expired")) => "sign in again and take a new token: it counts for five minutes after signing in",
            (401, _) => {
                "the token is none that the orchestrator believes: take an access token of the provider and for the audience in `orchestrator.training`"
            }
            (403, Some("permission_denied")) if detail.is_none() => "your token has not the role that `orchestrator.training` asks for",
            (404 | 405, _) => {
                "there is no training mode at this URL: name an orchestrator with `orchestrator.training`, or a gateway's route to one"
            }
            (409, _) => "look with `headgate training show`",
            (423, _) if detail.is_some() => "ask another admin to run `headgate training enable`, or wait",
            (423, _) => {
                "`headgate training show` says who holds the lock and until when; any admin may end it with `headgate training disable`"
            }
            (429, _) => "too many attempts were refused: wait",
            (503, Some("policy_registry_unavailable")) => "the orchestrator's Redis is away; nothing runs in training mode without it",
            (503, Some("event_log_unavailable")) => "the audit in Kafka cannot be written, and nothing is done without it",
            (503, Some("overloaded")) => "the identity provider cannot be asked, or the orchestrator has no room: try again",
            (500.., _) => "try again; the orchestrator's log has the reason",
            (200, _) => "this is no orchestrator: its answer is no state of training mode",
            _ => "look at the orchestrator's log",
        };
        let status = self.status.as_u16();
        let mut line = code.map_or_else(|| format!("HTTP {status}"), |code| format!("{status} {code}"));
        if let Some(detail) = detail {
            line += &format!(": {}", detail.replace(char::is_control, " "));
        }
        line += &format!("\n  {remedy}");
        if let Some(wait) = self.wait {
            line += &format!("\n  ask again in {wait} s");
        }
        line
    }
}

fn shown(state: &TrainingState, answer: &Answer, json: bool, out: &mut impl Write) -> io::Result<()> {
    if json {
        out.write_all(&answer.body)?;
        return out.write_all(b"\n");
    }
    let TrainingState { tenant, mode, fence, owner, since, until, approved_by } = state;
    writeln!(out, "training mode of {tenant} is {}", if *mode == Mode::Training { "on" } else { "off" })?;
    let time = |seconds: u64| SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds)).map(rfc3339).unwrap_or_default();
    let lines = [
        ("owner", owner.as_ref().map(ToString::to_string)),
        ("since", since.map(time)),
        ("until", until.map(time)),
        ("approved by", approved_by.as_ref().map(ToString::to_string)),
        ("fence", fence.map(|fence| fence.to_string())),
    ];
    for (name, value) in lines {
        if let Some(value) = value {
            writeln!(out, "{name:<12} {value}")?;
        }
    }
    Ok(())
}

fn judge(args: &Verify) -> io::Result<Judged> {
    let about = |file: &Path, error: io::Error| io::Error::new(error.kind(), format!("cannot read {}: {error}", file.display()));
    // Before the audit: what is written meanwhile is not missed then.
    let heads = args.heads.iter().map(|file| Heads::read(file).map_err(|error| about(file, error))).collect::<io::Result<Vec<_>>>()?;
    match (&args.file, &args.alone) {
        (Some(file), _) => verify_export(file, &heads).map_err(|error| about(file, error)),
        (_, Some(file)) => verify_file(file).map_err(|fault| match fault {
            AuditFault::Io { source, .. } => about(file, source),
            fault => io::Error::other(fault),
        }),
        (None, None) => {
            let (brokers, topic) = args.topic()?;
            judge_topic(&brokers, &topic, &heads)
        }
    }
}

impl Verify {
    fn topic(&self) -> io::Result<(Brokers, String)> {
        let Some(config) = &self.config else {
            let topic = self.topic.clone().unwrap_or_else(|| "training.audit".to_owned());
            return Ok((Brokers::open(self.brokers.clone()), topic));
        };
        let plan = headgate_config::load(config, self.env, &|name| std::env::var(name).ok()).map_err(io::Error::other)?;
        let kafka = plan.orchestrator.and_then(|orchestrator| orchestrator.training?.topic);
        let none = || io::Error::other(format!("{} names no audit topic: it has no `orchestrator.training`", config.display()));
        let found = build::topic(&kafka.ok_or_else(none)?);
        Ok((found.brokers, self.topic.clone().unwrap_or(found.name)))
    }
}

#[cfg(feature = "kafka")]
fn judge_topic(brokers: &Brokers, topic: &str, heads: &[Heads]) -> io::Result<Judged> {
    headgate_orchestrator::training::verify_topic(brokers, topic, heads).map_err(io::Error::other)
}

#[cfg(not(feature = "kafka"))]
fn judge_topic(_: &Brokers, topic: &str, _: &[Heads]) -> io::Result<Judged> {
    Err(io::Error::other(format!("cannot read the topic {topic}: {}", headgate_orchestrator::events::Unfit::Unbuilt)))
}

fn tell(judged: &Judged, ended: bool, out: &mut impl Write) -> io::Result<ExitCode> {
    writeln!(out, "records         {}", judged.records)?;
    writeln!(out, "chains          {}", judged.chains)?;
    writeln!(out, "locks acquired  {}", judged.acquired)?;
    writeln!(out, "locks ended     {}", judged.ended)?;
    for (count, what) in [
        (judged.approved, "times another admin approved"),
        (judged.denied, "calls that were denied"),
        (judged.unwritten, "denied calls without a record of their own"),
        (judged.failed, "calls that could not be done, and locks that were lost"),
        (judged.given_up, "records that their writer did not hear of: not acted upon"),
        (judged.begun_before, "records about locks from before the first record"),
        (judged.torn_bytes, "bytes torn off the end: never acted upon"),
    ] {
        if count > 0 {
            writeln!(out, "                {count} {what}")?;
        }
    }
    for lock in judged.open.iter().take(20) {
        let fence = lock.fence.map_or_else(String::new, |fence| format!(", fence {fence}"));
        let since = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(lock.since)).map(rfc3339).unwrap_or_default();
        writeln!(out, "  no end yet: {} of {} since {since}{fence}", lock.owner, lock.tenant)?;
    }
    let open = if ended { judged.open.len() as u64 } else { 0 };
    writeln!(out, "violations      {}", judged.violations_count + open)?;
    for violation in &judged.violations {
        writeln!(out, "  {violation}")?;
    }
    Ok(if judged.is_good() && open == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(status: u16, body: &str) -> Answer {
        Answer { status: StatusCode::from_u16(status).unwrap(), wait: Some(7), body: body.as_bytes().to_vec() }
    }

    #[test]
    fn every_refusal_says_what_helps_and_control_characters_stay_out_of_the_terminal() {
        for (status, code, word, exit) in [
            (401, "token_expired", "sign in again", 1),
            (401, "unauthenticated", "audience", 1),
            (403, "permission_denied", "role", 1),
            (409, "stale_fence", "headgate training show", 1),
            (423, "training_locked", "headgate training disable", 1),
            (429, "rate_limited", "wait", 1),
            (503, "policy_registry_unavailable", "Redis", EX_UNAVAILABLE),
            (503, "event_log_unavailable", "Kafka", EX_UNAVAILABLE),
            (503, "overloaded", "identity provider", EX_UNAVAILABLE),
        ] {
            let answer = answer(status, &format!("{{\"code\":\"{code}\"}}"));
            let said = answer.refusal();
            assert!(said.starts_with(&format!("{status} {code}")) && said.contains(word) && said.contains("ask again in 7 s"), "{said}");
            assert_eq!(answer.exit_code(), exit, "{code}");
        }
        let told = answer(403, r#"{"code":"permission_denied","detail":"another\u001b[31m admin"}"#).refusal();
        assert!(told.contains("another [31m admin") && !told.contains("role"), "{told}");
        for body in ["", "<html>", "[]", "\u{1b}[2J"] {
            assert!(answer(404, body).refusal().starts_with("HTTP 404\n  there is no training mode at this URL"), "{body}");
        }
        assert!(answer(200, "{}").state().is_none() && answer(200, "{}").refusal().contains("no orchestrator"));
    }

    #[test]
    fn a_token_in_a_file_may_end_with_a_line_and_what_is_none_is_not_shown() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("token.txt");
        std::fs::write(&file, "eyJ.canary.x\n").unwrap();
        assert_eq!(token_of(Some(&file)).unwrap().expose(), "eyJ.canary.x");
        std::fs::write(&file, "two canary words").unwrap();
        let refused = token_of(Some(&file)).unwrap_err().to_string();
        assert!(refused.contains("token.txt") && !refused.contains("canary"), "{refused}");
        assert!(token_of(Some(&folder.path().join("none"))).is_err());
    }

    #[test]
    fn a_state_is_told_in_words() {
        let body =
            r#"{"tenant":"acme","mode":"training","fence":12,"owner":"ann","since":1795271435,"until":1795285835,"approved_by":"bob"}"#;
        let answer = answer(200, body);
        let mut out = Vec::new();
        shown(&answer.state().unwrap(), &answer, false, &mut out).unwrap();
        let expected = "training mode of acme is on\nowner        ann\nsince        2026-11-21T14:30:35.000Z\nuntil        2026-11-21T18:30:35.000Z\n\
                        approved by  bob\nfence        12\n";
        assert_eq!(String::from_utf8(out).unwrap(), expected);
    }
}
