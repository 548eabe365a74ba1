//! Half a minute that asks whether a whole gateway is correct, not whether it is fast: every event arrives once and in order,
//! every answer ends, nothing denied or masked leaks, a client that leaves stops the model.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    path::Path,
    sync::mpsc,
    time::{Duration, Instant},
};

use crate::{
    engine::{self, MASK, Model, Order},
    peer::{self, Chain, Cores, Peer},
    workload::{self, Workload},
};

/// Far above the half minute it takes: a gateway that hangs is a failure, a machine that is busy with other things is none.
const BUDGET: Duration = Duration::from_secs(300);
const WINDOW: Duration = Duration::from_millis(1500);
const CORES: Cores = Cores { apart: false, realtime: false };

/// Runs it all. `tell` is told each finding as it is made; the result is everything that failed.
pub(crate) fn run(headgate: &Path, tell: &mut dyn FnMut(&str, Result<(), &str>)) -> Vec<String> {
    let begin = Instant::now();
    let mut failures = Vec::new();
    let mut found = |name: &str, outcome: Result<(), String>| {
        tell(name, outcome.as_ref().map(|&()| ()).map_err(String::as_str));
        failures.extend(outcome.err().map(|error| format!("{name}: {error}")));
    };
    for work in workload::all().into_iter().map(Workload::small) {
        if begin.elapsed() > BUDGET {
            found(work.name, Err("no time left".to_owned()));
            continue;
        }
        found(&format!("{}: {}", work.name, work.about), load(headgate, &work));
    }
    match Scripted::start(headgate) {
        Err(error) => found("a gateway before a scripted model", Err(error.to_string())),
        Ok(scripted) => {
            for (case, front) in CASES.iter().flat_map(|case| Voice::ALL.map(|voice| (case, voice))) {
                found(&format!("{} ({})", case.name, front.name()), scripted.check(case, front));
            }
            found("a stranger is not let in, and the model is not asked", scripted.stranger());
        }
    }
    failures
}

/// One workload, small, against the whole chain.
fn load(headgate: &Path, work: &Workload) -> Result<(), String> {
    let model = Model::bind().map_err(|error| error.to_string())?;
    let running =
        peer::start(&Peer::headgate("headgate", Chain::ALL), model.address, headgate, CORES).map_err(|error| error.to_string())?;
    let order = Order { work, peer: running.address, prefix: running.prefix, key: &running.key, window: WINDOW };
    let seen = engine::run(&model, &order, &mut |_| Ok(())).map_err(|error| error.to_string())?;
    if seen.faults_total > 0 {
        return Err(format!("{} faults, the first of them: {}", seen.faults_total, seen.faults.join("; ")));
    }
    if seen.sent != seen.heard {
        return Err(format!("{} events were sent and {} were heard", seen.sent, seen.heard));
    }
    let measured = work.is_idle() || seen.events + seen.requests + seen.left > 0;
    if seen.turns == 0 || !measured { Err("nothing happened".to_owned()) } else { Ok(()) }
}

/// An answer of the model, and what may come of it.
struct Case {
    name: &'static str,
    says: &'static [&'static str],
    /// The client's text, whole.
    heard: &'static str,
    /// How it must end.
    end: End,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum End {
    Done,
    /// Cut by policy, and said so.
    Filtered,
    /// The model's connection was cut: never shown as success.
    Cut,
}

/// The first of the phrases that the chain under test denies is `amber amber amber0`.
const CASES: [Case; 6] = [
    Case {
        name: "clean text arrives whole",
        says: &["All ", "is", " well", ", é 漢 \u{1F642}."],
        heard: "All is well, é 漢 \u{1F642}.",
        end: End::Done,
    },
    Case {
        name: "an e-mail address over four events is masked",
        says: &["write to mari", "a@exa", "mple.or", "g today"],
        heard: "write to ••• today",
        end: End::Done,
    },
    Case {
        name: "a card number over three events is masked",
        says: &["pay 4111 11", "11 1111 1", "111 now"],
        heard: "pay ••• now",
        end: End::Done,
    },
    Case {
        name: "an answer is cut before a denied phrase",
        says: &["it is the am", "ber am", "ber amber0 thing"],
        heard: "it is the ",
        end: End::Filtered,
    },
    Case {
        name: "a denied phrase in other letters is denied too",
        says: &["it is AM\u{200B}BER \u{FF21}mber amb", "ER0 thing"],
        heard: "it is ",
        end: End::Filtered,
    },
    Case { name: "an answer whose model breaks off is no success", says: &["half of ", "it \u{0}"], heard: "half of it ", end: End::Cut },
];

/// What a scripted model says last where it is to break off.
const BREAK: char = '\u{0}';

#[derive(Clone, Copy)]
enum Voice {
    OpenAi,
    Chat,
    WebSocket,
}

impl Voice {
    const ALL: [Voice; 3] = [Voice::OpenAi, Voice::Chat, Voice::WebSocket];

    fn name(self) -> &'static str {
        match self {
            Voice::OpenAi | Voice::Chat => self.path(),
            Voice::WebSocket => "a WebSocket",
        }
    }
    fn path(self) -> &'static str {
        match self {
            Voice::OpenAi => "/v1/chat/completions",
            Voice::Chat | Voice::WebSocket => "/v1/chat/stream",
        }
    }
    fn lane(self) -> &'static str {
        match self {
            Voice::OpenAi => "/choices/0/delta/content",
            Voice::Chat | Voice::WebSocket => "/text",
        }
    }
}

/// A gateway before a model that says what a case has.
struct Scripted {
    gateway: peer::Running,
    says: mpsc::Sender<&'static [&'static str]>,
    asked: mpsc::Receiver<()>,
}

impl Scripted {
    fn start(headgate: &Path) -> io::Result<Scripted> {
        let model = TcpListener::bind("127.0.0.1:0")?;
        let gateway = peer::start(&Peer::headgate("headgate", Chain::ALL), model.local_addr()?, headgate, CORES)?;
        let ((says, script), (tell, asked)) = (mpsc::channel(), mpsc::channel());
        // Ends with the program: it holds nothing that would have to be given back.
        std::thread::spawn(move || {
            for client in model.incoming().flatten() {
                // A connection that asks nothing is a check of health.
                if let Ok(true) = asks(&client) {
                    let _ = tell.send(());
                    let Ok(pieces) = script.recv() else { return };
                    // A gateway that leaves early is what some cases are about.
                    drop(say(client, pieces));
                }
            }
        });
        Ok(Scripted { gateway, says, asked })
    }

    fn check(&self, case: &Case, voice: Voice) -> Result<(), String> {
        self.says.send(case.says).map_err(|_| "the model is gone".to_owned())?;
        let ask = match voice {
            Voice::OpenAi | Voice::Chat => ask,
            Voice::WebSocket => ask_by_frames,
        };
        let answer = ask(self.gateway.address, voice, &self.gateway.key).map_err(|error| error.to_string())?;
        self.asked.recv_timeout(Duration::from_secs(20)).map_err(|_| "the model was not asked".to_owned())?;
        judge(case, voice, &answer)
    }

    fn stranger(&self) -> Result<(), String> {
        let answer = ask(self.gateway.address, Voice::OpenAi, "hg_nobody").map_err(|error| error.to_string())?;
        if !answer.starts_with("HTTP/1.1 401") {
            return Err(format!("answered with {:?}", answer.lines().next()));
        }
        if self.asked.try_recv().is_ok() { Err("the model was asked".to_owned()) } else { Ok(()) }
    }
}

/// Whether an answer, head and body, is what the case wants.
fn judge(case: &Case, voice: Voice, answer: &str) -> Result<(), String> {
    if !answer.starts_with("HTTP/1.1 200") {
        return Err(format!("answered with {:?}", answer.lines().next()));
    }
    let mut heard = String::new();
    for data in answer.lines().filter_map(|line| line.strip_prefix("data: ")).filter(|data| *data != "[DONE]") {
        let object: serde_json::Value = serde_json::from_str(data).map_err(|error| format!("an event that is no JSON: {error}"))?;
        heard += object.pointer(voice.lane()).and_then(serde_json::Value::as_str).unwrap_or_default();
    }
    if heard != case.heard {
        return Err(format!("heard {heard:?}, expected {:?}", case.heard));
    }
    let whole = if answer.contains("\"content_filter\"") { End::Filtered } else { End::Done };
    let end = match voice {
        Voice::OpenAi if answer.contains("data: [DONE]") => whole,
        Voice::OpenAi => End::Cut,
        Voice::Chat | Voice::WebSocket => match (answer.contains("event: done"), answer.contains("event: error")) {
            (true, false) => whole,
            (false, true) => End::Cut,
            (true, true) | (false, false) => return Err("not exactly one end".to_owned()),
        },
    };
    if end == case.end { Ok(()) } else { Err(format!("ended as {end:?}, expected {:?}", case.end)) }
}

/// Reads one request; false where none comes.
fn asks(client: &TcpStream) -> io::Result<bool> {
    client.set_read_timeout(Some(Duration::from_secs(20)))?;
    let mut reader = BufReader::new(client);
    let mut length = 0;
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(false);
        }
        if let Some((name, value)) = line.split_once(':').filter(|(name, _)| name.eq_ignore_ascii_case("content-length")) {
            length = value.trim().parse().map_err(|_| io::Error::other(format!("{name} is no number")))?;
        }
        if line == "\r\n" {
            break;
        }
    }
    io::copy(&mut reader.by_ref().take(length), &mut io::sink())?;
    Ok(true)
}

fn say(mut client: TcpStream, pieces: &[&str]) -> io::Result<()> {
    client.set_nodelay(true)?;
    client.write_all(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n")?;
    for piece in pieces {
        let text = piece.trim_end_matches(BREAK);
        let chunk = serde_json::json!({
            "id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "demo",
            "choices": [{ "index": 0, "delta": { "content": text }, "finish_reason": null }]
        });
        client.write_all(format!("data: {chunk}\n\n").as_bytes())?;
        if piece.ends_with(BREAK) {
            return Ok(());
        }
    }
    let last = serde_json::json!({
        "id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "demo",
        "choices": [{ "index": 0, "delta": {}, "finish_reason": "stop" }]
    });
    client.write_all(format!("data: {last}\n\ndata: [DONE]\n\n").as_bytes())
}

/// One turn over a connection of its own: the whole answer, chunks put together.
fn ask(gateway: SocketAddr, voice: Voice, key: &str) -> io::Result<String> {
    let mut gateway = TcpStream::connect(gateway)?;
    gateway.set_read_timeout(Some(Duration::from_secs(20)))?;
    let stream = match voice {
        Voice::OpenAi => r#""model":"demo","stream":true,"#,
        Voice::Chat | Voice::WebSocket => "",
    };
    let body = format!(r#"{{{stream}"messages":[{{"role":"user","content":"{}"}}]}}"#, peer::filler(40));
    write!(
        gateway,
        "POST {} HTTP/1.1\r\nhost: gateway\r\nconnection: close\r\nauthorization: Bearer {key}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        voice.path(),
        body.len()
    )?;
    let mut answer = Vec::new();
    gateway.take(4 << 20).read_to_end(&mut answer)?;
    let end = memchr::memmem::find(&answer, b"\r\n\r\n").ok_or_else(|| io::Error::other("no response head"))?;
    let (head, mut body) = (String::from_utf8_lossy(&answer[..end]).into_owned(), &answer[end + 4..]);
    if !head.to_ascii_lowercase().contains("transfer-encoding: chunked") {
        return Ok(head + "\n" + &String::from_utf8_lossy(body));
    }
    let mut whole = Vec::new();
    loop {
        let broken = || io::Error::other("a chunk that is framed wrongly");
        let line = memchr::memmem::find(body, b"\r\n").ok_or_else(broken)?;
        let size = std::str::from_utf8(&body[..line]).ok().and_then(|size| usize::from_str_radix(size, 16).ok()).ok_or_else(broken)?;
        if size == 0 {
            break;
        }
        whole.extend_from_slice(body.get(line + 2..line + 2 + size).ok_or_else(broken)?);
        body = body.get(line + 4 + size..).ok_or_else(broken)?;
    }
    Ok(head + "\n" + &String::from_utf8_lossy(&whole))
}

/// One turn over a WebSocket of its own, told as the event stream that it would have been.
fn ask_by_frames(gateway: SocketAddr, voice: Voice, key: &str) -> io::Result<String> {
    let mut gateway = TcpStream::connect(gateway)?;
    gateway.set_read_timeout(Some(Duration::from_secs(20)))?;
    write!(
        gateway,
        "GET {} HTTP/1.1\r\nhost: gateway\r\nauthorization: Bearer {key}\r\nconnection: Upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-protocol: headgate.v1\r\n\r\n",
        voice.path()
    )?;
    let mut reader = BufReader::new(gateway.try_clone()?.take(4 << 20));
    let mut status = String::new();
    reader.read_line(&mut status)?;
    if !status.starts_with("HTTP/1.1 101") {
        return Ok(status);
    }
    let mut line = String::new();
    while line != "\r\n" {
        line.clear();
        if reader.read_line(&mut line)? == 0 {
            return Err(io::Error::other("no response head"));
        }
    }
    let turn = format!(r#"{{"type":"turn","messages":[{{"role":"user","content":"{}"}}]}}"#, peer::filler(40));
    gateway.write_all(&engine::frame(0x81, turn.as_bytes(), Some(MASK)))?;
    let mut answer = "HTTP/1.1 200 OK\n".to_owned();
    loop {
        let mut head = [0; 2];
        reader.read_exact(&mut head)?;
        let len = match head[1] {
            126 => {
                let mut len = [0; 2];
                reader.read_exact(&mut len)?;
                usize::from(u16::from_be_bytes(len))
            }
            len if len < 126 => usize::from(len),
            _ => return Err(io::Error::other("a frame that is longer than any here, or masked")),
        };
        let mut payload = vec![0; len];
        reader.read_exact(&mut payload)?;
        match head[0] {
            0x81 => {}
            0x89 => {
                gateway.write_all(&engine::frame(0x8a, &payload, Some(MASK)))?;
                continue;
            }
            _ => return Err(io::Error::other("a frame that is neither text nor a ping")),
        }
        let event: serde_json::Value = serde_json::from_slice(&payload).map_err(io::Error::other)?;
        let name = event.get("type").and_then(serde_json::Value::as_str).unwrap_or_default();
        answer += &format!("event: {name}\ndata: {event}\n\n");
        if matches!(name, "done" | "error") {
            return Ok(answer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn case(heard: &'static str, end: End) -> Case {
        Case { name: "a case", says: &[], heard, end }
    }

    fn judged(heard: &'static str, end: End, answer: &str) -> Result<(), String> {
        judge(&case(heard, end), Voice::OpenAi, &format!("HTTP/1.1 200 OK\n{answer}"))
    }

    #[test]
    fn what_leaks_or_is_lost_or_ends_wrongly_fails() {
        let event = |text: &str| format!("data: {{\"choices\":[{{\"delta\":{{\"content\":\"{text}\"}}}}]}}\n\n");
        let filtered = "data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"content_filter\"}]}\n\n";
        let done = "data: [DONE]\n\n";
        let whole = event("a ") + &event("b");
        assert_eq!(judged("a b", End::Done, &(whole.clone() + done)), Ok(()));
        assert_eq!(judged("a ", End::Filtered, &(event("a ") + filtered + done)), Ok(()));
        assert_eq!(judged("a b", End::Cut, &whole), Ok(()));
        for (heard, end, answer) in [
            ("a ", End::Done, whole.clone() + done),
            ("a bc", End::Done, whole.clone() + done),
            ("a b", End::Done, whole.clone()),
            ("a b", End::Filtered, whole.clone() + done),
            ("a b", End::Cut, whole.clone() + done),
            ("a b", End::Done, "data: {broken\n\n".to_owned()),
        ] {
            assert!(judged(heard, end, &answer).is_err(), "{heard:?} {end:?} {answer}");
        }
    }

    #[test]
    fn a_gateway_that_does_not_start_fails_everything() {
        let failures = run(Path::new("/bin/false"), &mut |_, _| {});
        assert_eq!(failures.len(), workload::all().len() + 1, "{failures:?}");
    }
}
