//! `headgate chat`: talks through a gateway from a terminal, and says what the gate did to each answer.

mod line;
mod screen;
mod tale;

use std::{
    io::{self, BufRead, IsTerminal, Read, Write},
    process::ExitCode,
    time::Duration,
};

use headgate_contracts::{
    Message, Role, Secret, SessionId, TurnId,
    wire::chat::{Confirmation, TurnRequest},
};
use http::Uri;
use tokio::{
    sync::mpsc,
    time::{Instant, sleep, sleep_until, timeout},
};

use self::{
    line::{DEFAULT_PATH, Heard, Line, Trouble},
    screen::Screen,
    tale::{End, Tale},
};
use super::{
    EX_UNAVAILABLE, EX_USAGE, fail,
    place::{Place, token},
};

/// The longest prompt, in bytes: what a WebSocket message of the gateway's takes, less room for the rest of the frame.
const MAX_PROMPT_BYTES: u64 = 60 << 10;
/// How long a turn may take to end after it was asked to stop.
const STOP_PATIENCE: Duration = Duration::from_secs(5);
/// How long it may take to say yes or no.
const SAY_PATIENCE: Duration = Duration::from_secs(10);
/// How long nothing may come, heartbeats included; a gateway's are at most 300 seconds apart.
const SILENCE: Duration = Duration::from_secs(330);
/// How often, and after which pauses, a stream that was cut is asked for again.
const RETURNS: [Duration; 4] = [Duration::from_millis(250), Duration::from_millis(500), Duration::from_secs(1), Duration::from_secs(2)];
/// What shells take for a program that Ctrl-C ended: 128 and the signal's number.
const EXIT_INTERRUPTED: u8 = 130;

/// Which gateway, as whom, and what to ask.
#[derive(clap::Args)]
#[command(after_help = "\
The answer goes to standard output as it comes. What the gate did to it (outcome, time to the first text, gaps between events, \
the verdict) goes to standard error. Ctrl-C stops the turn and keeps what had been said; a second one leaves at once. Where a tool needs a \
yes, a terminal is asked for it; where there is none, the answer is no.

Exit code: 0 answered, 1 something went wrong, 2 policy refused the prompt or cut the answer, \
or a tool that needs a yes was not called, 130 stopped by Ctrl-C.

Begin, in another terminal, with a gateway that prints a token; the environment hides it from the list of processes:
  headgate dev
  export HEADGATE_TOKEN=hg_...

One turn, a part of it masked; the same over a WebSocket:
  headgate chat \"what is your email address?\"
  headgate chat --ws \"what is your email address?\"

A conversation, one line a turn, until Ctrl-D; and a whole file as one prompt:
  headgate chat
  headgate chat - < letter.txt

The signed verdict of a turn, for a program:
  headgate chat --json hello | jq -r 'select(.type == \"done\").verdict'

A gateway whose certificate an authority of your own has signed:
  SSL_CERT_FILE=ca.pem headgate chat --url https://chat.example.com hello")]
pub struct Args {
    /// The gateway, http or https; a path names a chat route other than /v1/chat/stream.
    #[arg(long, default_value = "http://127.0.0.1:8080", value_name = "URL")]
    pub url: Uri,
    /// An API key or JWT.
    #[arg(long, env = "HEADGATE_TOKEN", hide_env_values = true, value_parser = token)]
    pub token: Option<Secret>,
    /// The model to ask for; without it the route's own answers.
    #[arg(long)]
    pub model: Option<String>,
    /// A session to go on with (`--json` shows its id in `open`); without it a new one begins.
    #[arg(long)]
    pub session: Option<SessionId>,
    /// Speak WebSocket instead of server-sent events.
    #[arg(long)]
    pub ws: bool,
    /// Print every event as it came, one JSON object a line, and nothing else.
    #[arg(long)]
    pub json: bool,
    /// What to ask; `-` reads it from standard input. Without it every line of standard input is a turn.
    pub prompt: Option<String>,
}

/// How a turn ended, as the exit code has it; worse ones last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Came {
    Answered,
    Stopped,
    Refused,
    Wrong,
    Left,
}

impl Came {
    fn code(self) -> u8 {
        match self {
            Came::Answered => 0,
            Came::Wrong => 1,
            Came::Refused => 2,
            Came::Stopped | Came::Left => EXIT_INTERRUPTED,
        }
    }
}

/// Talks until there is nothing left to ask.
pub async fn run(args: Args) -> ExitCode {
    let place = match Place::of(&args.url, DEFAULT_PATH) {
        Ok(place) => place,
        Err(error) => return fail(&error, EX_USAGE),
    };
    let mut screen = Screen::of_process(args.json);
    if args.token.is_some() && place.is_exposed() {
        screen.note("the token goes over a connection that is not encrypted");
    }
    let prompt = match args.prompt.as_deref().map(one_prompt).transpose() {
        Ok(prompt) => prompt,
        Err(error) => return fail(&error, EX_USAGE),
    };
    let mut talk = Talk {
        line: Line::new(place, args.token, args.ws),
        screen,
        interrupts: match interrupts() {
            Ok(interrupts) => interrupts,
            Err(error) => return fail(&error, EX_UNAVAILABLE),
        },
        session: args.session,
        model: args.model,
        input: None,
        is_asking: io::stdin().is_terminal() && io::stderr().is_terminal(),
    };
    let came = match prompt {
        Some(prompt) => talk.turn(prompt).await,
        None => talk.lines().await,
    };
    talk.line.close().await;
    ExitCode::from(came.code())
}

fn one_prompt(prompt: &str) -> io::Result<String> {
    let mut text = String::new();
    if prompt == "-" {
        io::stdin().lock().take(MAX_PROMPT_BYTES + 1).read_to_string(&mut text)?;
    } else {
        text.push_str(prompt);
    }
    if text.len() as u64 > MAX_PROMPT_BYTES { Err(too_long()) } else { Ok(text) }
}

fn too_long() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, format!("a prompt may have {} KiB", MAX_PROMPT_BYTES >> 10))
}

/// Ctrl-C, as often as it comes.
fn interrupts() -> io::Result<mpsc::Receiver<()>> {
    let mut signals = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::interrupt())?;
    let (tell, told) = mpsc::channel(2);
    tokio::spawn(async move {
        // More than two that nobody has looked at say no more than two.
        while signals.recv().await.is_some() && !tell.is_closed() {
            let _ = tell.try_send(());
        }
    });
    Ok(told)
}

/// The lines of standard input, read in a thread of their own: a blocking read cannot be given up.
fn lines() -> mpsc::Receiver<io::Result<String>> {
    let (tell, told) = mpsc::channel(1);
    std::thread::spawn(move || {
        let mut input = io::stdin().lock();
        loop {
            let mut line = String::new();
            let read = match input.by_ref().take(MAX_PROMPT_BYTES).read_line(&mut line) {
                Ok(0) => return,
                Ok(_) if line.len() as u64 == MAX_PROMPT_BYTES && !line.ends_with('\n') => Err(too_long()),
                Ok(_) => Ok(line),
                Err(error) => Err(error),
            };
            let is_over = read.is_err();
            if tell.blocking_send(read).is_err() || is_over {
                return;
            }
        }
    });
    told
}

struct Talk<W: Write, E: Write> {
    line: Line,
    screen: Screen<W, E>,
    interrupts: mpsc::Receiver<()>,
    session: Option<SessionId>,
    model: Option<String>,
    /// Lines of standard input, once somebody was asked for one.
    input: Option<mpsc::Receiver<io::Result<String>>>,
    /// A person sits there.
    is_asking: bool,
}

impl<W: Write, E: Write> Talk<W, E> {
    /// A turn for each line of standard input; the worst of how they came.
    async fn lines(&mut self) -> Came {
        let is_asking = self.is_asking;
        let mut worst = Came::Answered;
        loop {
            if is_asking {
                self.screen.ask();
            }
            let line = tokio::select! {
                line = self.input.get_or_insert_with(lines).recv() => line,
                // Between turns a WebSocket has pings to answer.
                () = self.line.idle() => continue,
                _ = self.interrupts.recv() => {
                    self.screen.rest();
                    return Came::Left;
                }
            };
            let came = match line {
                None => break,
                Some(Ok(line)) if line.trim().is_empty() => continue,
                Some(Ok(line)) => self.turn(line.trim_end_matches(['\r', '\n']).to_owned()).await,
                Some(Err(error)) => {
                    self.screen.note(&error.to_string());
                    worst = worst.max(Came::Wrong);
                    break;
                }
            };
            match came {
                Came::Left => return came,
                // Stopped on purpose, in a conversation that goes on: nothing went wrong.
                Came::Stopped if is_asking => {}
                came => worst = worst.max(came),
            }
        }
        if is_asking {
            self.screen.rest();
        }
        worst
    }

    /// One turn, from its prompt to its status line.
    async fn turn(&mut self, prompt: String) -> Came {
        let request = TurnRequest {
            session_id: self.session.clone(),
            messages: vec![Message::new(Role::User, prompt)],
            model: self.model.clone(),
            max_output_tokens: None,
            temperature: None,
            stop: Vec::new(),
            metadata: serde_json::Map::new(),
        };
        let mut tale = Tale::begin(Instant::now());
        let came = self.follow(&request, &mut tale).await;
        if let Some(session) = tale.session() {
            self.session = Some(session.clone());
        }
        self.screen.end(&tale);
        came
    }

    async fn follow(&mut self, request: &TurnRequest, tale: &mut Tale) -> Came {
        let begun = tokio::select! {
            begun = self.line.begin(request) => begun,
            _ = self.interrupts.recv() => {
                self.line.drop_stream();
                return Came::Left;
            }
        };
        if let Err(trouble) = begun {
            return self.tell(trouble, tale);
        }
        // Set once the turn was asked to stop: when we give up waiting for its end.
        let mut give_up: Option<Instant> = None;
        // A question that waits for a yes or no.
        let mut asked: Option<(TurnId, String)> = None;
        // So many returns in all, so that a gateway that takes us back and sends nothing is left in the end.
        let mut pauses = RETURNS.iter().copied();
        loop {
            let patience = give_up.unwrap_or_else(|| Instant::now() + SILENCE);
            tokio::select! {
                heard = self.line.next() => match heard {
                    Ok(Heard::Heartbeat) => {}
                    Ok(Heard::Event(event)) => {
                        tale.take(&event, Instant::now());
                        self.screen.show(&event);
                        // Whatever else comes, the question is over.
                        asked = event.said.question().zip(tale.turn()).map(|(id, turn)| (turn, id.to_owned()));
                        match &asked {
                            Some(_) if self.is_asking => self.screen.ask_whether(),
                            Some((turn, id)) => {
                                self.screen.note("there is nobody to ask: the answer is no");
                                self.say(*turn, id, false).await;
                                asked = None;
                            }
                            None => {}
                        }
                        if tale.end().is_some() {
                            return came(tale);
                        }
                    }
                    Ok(Heard::Over) | Err(Trouble::Broken(_)) if give_up.is_none() => match self.come_back(tale, &mut pauses).await {
                        None => {}
                        Some(came) => return came,
                    },
                    Ok(Heard::Over) | Err(Trouble::Broken(_)) => return Came::Stopped,
                    Err(trouble) => return self.tell(trouble, tale),
                },
                line = async { self.input.get_or_insert_with(lines).recv().await }, if asked.is_some() => {
                    if let Some((turn, id)) = asked.take() {
                        let accept = matches!(line, Some(Ok(line)) if matches!(line.trim().to_ascii_lowercase().as_str(), "y" | "yes"));
                        self.say(turn, &id, accept).await;
                    }
                }
                _ = self.interrupts.recv() => {
                    if give_up.is_some() {
                        self.line.drop_stream();
                        return Came::Left;
                    }
                    let turn = tale.turn().or(self.line.turn());
                    let asked = tokio::select! {
                        asked = timeout(STOP_PATIENCE, self.line.stop(turn)) => matches!(asked, Ok(Ok(()))),
                        _ = self.interrupts.recv() => false,
                    };
                    if !asked {
                        self.screen.note("the gateway was not asked to stop the turn: left it");
                        self.line.drop_stream();
                        return Came::Left;
                    }
                    give_up = Some(Instant::now() + STOP_PATIENCE);
                }
                () = sleep_until(patience) => {
                    self.line.drop_stream();
                    if give_up.is_some() {
                        self.screen.note("the turn was asked to stop and did not: left it");
                        return Came::Stopped;
                    }
                    self.screen.note("nothing came for minutes, not even a heartbeat: left the turn");
                    return Came::Wrong;
                }
            }
        }
    }

    /// Says yes or no to a question.
    async fn say(&mut self, turn: TurnId, id: &str, accept: bool) {
        let said = Confirmation { id: id.to_owned(), accept };
        match timeout(SAY_PATIENCE, self.line.confirm(turn, &said)).await {
            Ok(Ok(())) => {}
            Ok(Err(Trouble::Problem(problem))) => {
                self.screen.note(&format!("the answer was not taken: {}", problem.code.unwrap_or_default()))
            }
            Ok(Err(Trouble::Broken(_) | Trouble::Nonsense(_))) | Err(_) => self.screen.note("the gateway could not be told the answer"),
        }
    }

    /// Takes a stream up again that was cut. `Some`: it cannot be had back, and the turn came to that.
    async fn come_back(&mut self, tale: &mut Tale, pauses: &mut impl Iterator<Item = Duration>) -> Option<Came> {
        let Some(turn) = tale.turn().or(self.line.turn()) else {
            self.screen.note("the connection broke before the turn had a number to come back to");
            return Some(Came::Wrong);
        };
        tale.interrupt();
        self.screen.note("the stream was cut; coming back");
        for pause in pauses {
            let again = async {
                sleep(pause).await;
                self.line.resume(turn, tale.last_seq()).await
            };
            let again = tokio::select! {
                again = again => again,
                _ = self.interrupts.recv() => return Some(Came::Left),
            };
            match again {
                Ok(()) => return None,
                Err(Trouble::Broken(_)) => {}
                Err(Trouble::Problem(problem)) if problem.retryable => {}
                Err(Trouble::Problem(problem)) if problem.is_gone() => {
                    self.screen.note("the gateway no longer has the turn: its route ends a turn whose client leaves");
                    return Some(Came::Wrong);
                }
                Err(trouble @ (Trouble::Problem(_) | Trouble::Nonsense(_))) => return Some(self.tell(trouble, tale)),
            }
        }
        self.screen.note("the stream was cut and could not be taken up again: what is above may be incomplete");
        Some(Came::Wrong)
    }

    fn tell(&mut self, trouble: Trouble, tale: &mut Tale) -> Came {
        match trouble {
            Trouble::Problem(problem) => {
                self.screen.problem(&problem);
                tale.refused(*problem);
                came(tale)
            }
            Trouble::Broken(error) => {
                self.screen.note(&format!("no answer from the gateway: {error}"));
                Came::Wrong
            }
            Trouble::Nonsense(what) => {
                self.screen.note(&format!("what came does not follow the protocol: {what}"));
                Came::Wrong
            }
        }
    }
}

fn came(tale: &Tale) -> Came {
    match tale.end() {
        Some(End::Done { outcome, .. }) if outcome.as_deref() == Some("blocked") => Came::Refused,
        Some(End::Done { .. }) => Came::Answered,
        Some(End::Error(said)) => match said.code.as_deref() {
            Some("policy_denied" | "declined" | "unanswered") => Came::Refused,
            Some("stopped") => Came::Stopped,
            _ => Came::Wrong,
        },
        None => Came::Wrong,
    }
}
