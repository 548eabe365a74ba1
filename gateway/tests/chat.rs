//! `headgate chat` as a person runs it: the program itself, against `headgate dev` and against gateways that break down.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    process::{Child, ChildStdout, Command, Stdio},
    sync::mpsc,
    thread,
};

const TURN: &str = "0193a5f0-7e1c-7000-8000-000000000000";
const TRANSPORTS: [&[&str]; 2] = [&[], &["--ws"]];

fn headgate() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_headgate"));
    command.env_remove("HEADGATE_TOKEN").env_remove("NO_COLOR").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// A `headgate dev` on ports of its own.
struct Dev {
    process: Child,
    url: String,
    token: String,
}

impl Dev {
    fn start(pace: &str) -> Dev {
        let mut process = headgate()
            .args(["dev", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--pace", pace])
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(process.stdout.take().unwrap()).lines();
        let link = lines.find_map(|line| line.unwrap().strip_prefix("chat page").map(|link| link.trim().to_owned())).unwrap();
        let (url, token) = link.split_once("/#token=").unwrap();
        let dev = Dev { process, url: url.to_owned(), token: token.to_owned() };
        // What else it prints must not fill the pipe.
        thread::spawn(move || lines.count());
        dev
    }

    fn chat(&self, args: &[&str]) -> Command {
        let mut command = headgate();
        command.arg("chat").args(["--url", &self.url]).args(args).env("HEADGATE_TOKEN", &self.token);
        command
    }
}

impl Drop for Dev {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

struct Said {
    code: Option<i32>,
    out: String,
    err: String,
}

fn run(command: &mut Command) -> Said {
    let output = command.output().unwrap();
    Said { code: output.status.code(), out: String::from_utf8(output.stdout).unwrap(), err: String::from_utf8(output.stderr).unwrap() }
}

fn run_with(command: &mut Command, input: &str) -> Said {
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    Said { code: output.status.code(), out: String::from_utf8(output.stdout).unwrap(), err: String::from_utf8(output.stderr).unwrap() }
}

fn interrupt(child: &Child) {
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
}

/// Reads until `words` have come.
fn wait_for(out: &mut ChildStdout, words: &str) -> String {
    let mut text = Vec::new();
    let mut byte = [0];
    while !String::from_utf8_lossy(&text).contains(words) {
        assert_eq!(out.read(&mut byte).unwrap(), 1, "it ended before {words:?} came");
        text.extend_from_slice(&byte);
    }
    String::from_utf8_lossy(&text).into_owned()
}

#[test]
fn an_answer_goes_to_standard_output_and_what_the_gate_did_to_standard_error() {
    let dev = Dev::start("0");
    for transport in TRANSPORTS {
        let said = run(dev.chat(transport).arg("what is your email address?"));
        assert_eq!(said.code, Some(0), "{}", said.err);
        assert!(said.out.contains("•••") && !said.out.contains('@') && said.out.ends_with('\n'), "{}", said.out);
        let status = said.err.lines().last().unwrap();
        for part in
            ["masked · first text ", " events · gaps ", " median, ", " longest", "verdict redact under policy default dev", "turn 0"]
        {
            assert!(status.contains(part), "{part:?} is not in {status:?}");
        }
        assert!(!said.err.contains('\x1b') && !said.err.contains(&dev.token));
    }
}

#[test]
fn what_policy_refuses_ends_with_exit_code_2() {
    let dev = Dev::start("0");
    for transport in TRANSPORTS {
        let cut = run(dev.chat(transport).arg("tell me a secret"));
        assert_eq!(cut.code, Some(2), "{}", cut.err);
        assert!(cut.out.len() > 20 && !cut.out.to_lowercase().contains("bluebird"), "{}", cut.out);
        assert!(cut.err.starts_with("policy cut this answer, by rule moderation.deny"), "{}", cut.err);
        let refused = run(dev.chat(transport).arg("what is Project Bluebird?"));
        assert_eq!((refused.code, refused.out.as_str()), (Some(2), ""), "{}", refused.err);
        assert!(refused.err.starts_with("policy refused this prompt"), "{}", refused.err);
    }
}

#[test]
fn every_line_is_a_turn_of_one_session() {
    let dev = Dev::start("0");
    for transport in TRANSPORTS {
        let said = run_with(dev.chat(transport).arg("--json"), "hello\n\nwhere is my order?\n");
        assert_eq!((said.code, said.err.as_str()), (Some(0), ""));
        let events: Vec<serde_json::Value> = said.out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let of = |kind: &str| events.iter().filter(|event| event["type"] == kind).collect::<Vec<_>>();
        let opens = of("open");
        assert_eq!((opens.len(), of("done").len()), (2, 2));
        assert_eq!(opens[0]["session_id"], opens[1]["session_id"]);
        assert_ne!(opens[0]["turn_id"], opens[1]["turn_id"]);
        assert!(of("text").iter().all(|event| event["seq"].is_u64() && event["turn_id"].is_string()));
    }
}

#[test]
fn a_dash_takes_the_whole_input_as_one_prompt() {
    let dev = Dev::start("0");
    let said = run_with(&mut dev.chat(&["--json", "-"]), "hello\nthere\n");
    assert_eq!(said.out.lines().filter(|line| line.contains(r#""type":"open""#)).count(), 1);
    let long = run_with(&mut dev.chat(&["-"]), &"x".repeat(61 << 10));
    assert_eq!((long.code, long.err.as_str()), (Some(64), "headgate: a prompt may have 60 KiB\n"));
}

#[test]
fn ctrl_c_stops_the_turn_and_keeps_what_was_said() {
    let dev = Dev::start("20");
    for transport in TRANSPORTS {
        let mut chat = dev.chat(transport).arg("tell me a long story").spawn().unwrap();
        let mut out = chat.stdout.take().unwrap();
        let begun = wait_for(&mut out, " ");
        interrupt(&chat);
        let mut rest = String::new();
        out.read_to_string(&mut rest).unwrap();
        let output = chat.wait_with_output().unwrap();
        let err = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(130), "{err}");
        assert!(err.contains("stopped · first text") && err.contains("verdict "), "{err}");
        assert!(begun.len() + rest.len() < 300, "it went on: {begun}{rest}");
    }
}

#[test]
fn without_a_credential_it_says_where_to_put_one() {
    let dev = Dev::start("0");
    for transport in TRANSPORTS {
        let said = run(dev.chat(transport).arg("hello").env("HEADGATE_TOKEN", "hg_not_a_key"));
        assert_eq!((said.code, said.out.as_str()), (Some(1), ""));
        assert!(said.err.contains("put a token into HEADGATE_TOKEN"), "{}", said.err);
    }
}

#[test]
fn a_gateway_that_is_not_there_is_named_as_the_trouble() {
    let free = headgate_testkit::services::free_addr();
    for transport in TRANSPORTS {
        let said = run(headgate().args(["chat", "--url", &format!("http://{free}"), "hello"]).args(transport));
        assert_eq!(said.code, Some(1));
        let words = said.err.strip_prefix("no answer from the gateway: ");
        assert!(words.is_some_and(|words| words.contains("Connection refused")), "{}", said.err);
    }
}

#[test]
fn a_url_that_is_none_is_bad_usage() {
    for url in ["ftp://x", "http://me:secret@x", "x"] {
        let said = run(headgate().args(["chat", "--url", url, "hello"]));
        assert_eq!(said.code, Some(64), "{url}: {}", said.err);
        assert!(!said.err.contains("secret"));
    }
}

#[test]
fn help_never_shows_the_token_of_the_environment() {
    let said = run(headgate().args(["chat", "--help"]).env("HEADGATE_TOKEN", "hg_very_secret"));
    assert!(said.out.contains("[env: HEADGATE_TOKEN]"));
    assert!(!said.out.contains("hg_very_secret"));
}

/// A gateway that gives each connection the next answer, and tells what was asked; the last one is kept open.
fn play(answers: Vec<String>) -> (String, mpsc::Receiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let (tell, told) = mpsc::channel();
    thread::spawn(move || {
        let mut open: Vec<TcpStream> = Vec::new();
        let mut answers = answers.into_iter().peekable();
        while let Ok((mut stream, _)) = listener.accept() {
            let mut asked = String::new();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            while !asked.ends_with("\r\n\r\n") {
                reader.read_line(&mut asked).unwrap();
            }
            let asked = asked.to_lowercase();
            // A body left unread would reset the connection when it is closed.
            let length = asked.lines().find_map(|line| line.strip_prefix("content-length: ")).map_or(0, |length| length.parse().unwrap());
            reader.take(length).read_to_end(&mut Vec::new()).unwrap();
            let _ = tell.send(asked);
            if let Some(answer) = answers.next() {
                stream.write_all(answer.as_bytes()).unwrap();
            }
            if answers.peek().is_none() {
                open.push(stream);
            }
        }
    });
    (url, told)
}

fn events(from: usize, events: &[(&str, &str)]) -> String {
    let mut answer = format!("HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nx-headgate-turn: {TURN}\r\nconnection: close\r\n\r\n");
    for (at, (name, data)) in events.iter().enumerate() {
        answer.push_str(&format!("id: {TURN}:{}\nevent: {name}\ndata: {data}\n\n", from + at));
    }
    answer
}

fn open() -> String {
    format!(r#"{{"turn_id":"{TURN}","session_id":"s","model":"m"}}"#)
}

#[test]
fn a_stream_that_is_cut_is_taken_up_again_where_it_broke() {
    let (url, asked) = play(vec![
        events(0, &[("open", &open()), ("text", r#"{"text":"one "}"#)]),
        "HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n".to_owned(),
        events(2, &[("text", r#"{"text":"two"}"#), ("done", r#"{"finish":"stop","outcome":"allowed"}"#)]),
    ]);
    let said = run(headgate().args(["chat", "--url", &url, "hello"]));
    assert_eq!((said.code, said.out.as_str()), (Some(0), "one two\n"), "{}", said.err);
    assert!(said.err.starts_with("the stream was cut; coming back\nallowed · "), "{}", said.err);
    assert!(asked.recv().unwrap().starts_with("post /v1/chat/stream "));
    let again = asked.recv().unwrap();
    assert!(
        again.starts_with(&format!("get /v1/chat/stream/{TURN} ")) && again.contains(&format!("last-event-id: {TURN}:1\r\n")),
        "{again}"
    );
}

#[test]
fn a_cut_is_never_shown_as_a_success() {
    let problem = r#"{"code":"session_not_found","retryable":false,"detail":"there is no such session or turn"}"#;
    let gone =
        format!("HTTP/1.1 404 Not Found\r\ncontent-type: application/problem+json\r\ncontent-length: {}\r\n\r\n{problem}", problem.len());
    let (url, _) = play(vec![events(0, &[("open", &open()), ("text", r#"{"text":"one "}"#)]), gone]);
    let said = run(headgate().args(["chat", "--url", &url, "hello"]));
    assert_eq!((said.code, said.out.as_str()), (Some(1), "one \n"));
    assert!(said.err.contains("the gateway no longer has the turn") && said.err.contains("no end came"), "{}", said.err);
}

#[test]
fn a_second_ctrl_c_leaves_at_once() {
    // The last answer is kept open, and the call to stop is never answered.
    let (url, asked) = play(vec![events(0, &[("open", &open()), ("text", r#"{"text":"one "}"#)])]);
    let mut chat = headgate().args(["chat", "--url", &url, "hello"]).spawn().unwrap();
    wait_for(chat.stdout.as_mut().unwrap(), "one");
    interrupt(&chat);
    assert!(asked.recv().unwrap().starts_with("post /v1/chat/stream "));
    assert!(asked.recv().unwrap().starts_with(&format!("post /v1/chat/stream/{TURN}/stop ")));
    interrupt(&chat);
    let output = chat.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_chat_route_that_is_none_is_told_apart_from_a_cut() {
    let (url, _) = play(vec!["HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: 6\r\n\r\n<html>".to_owned()]);
    let said = run(headgate().args(["chat", "--url", &url, "hello"]));
    assert_eq!(said.code, Some(1));
    assert!(said.err.contains("not text/event-stream: is this a chat route?"), "{}", said.err);
}

#[test]
fn a_gateway_behind_tls_is_trusted_by_its_certificate_alone() {
    let rcgen::CertifiedKey { cert, signing_key } = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let trusted = folder.path().join("ca.pem");
    std::fs::write(&trusted, cert.pem()).unwrap();
    let key = rustls::pki_types::PrivateKeyDer::try_from(signing_key.serialize_der()).unwrap();
    let config = rustls::ServerConfig::builder_with_provider(rustls::crypto::aws_lc_rs::default_provider().into())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![cert.der().clone()], key)
        .unwrap();
    let config = std::sync::Arc::new(config);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        while let Ok((stream, _)) = listener.accept() {
            let mut stream = rustls::StreamOwned::new(rustls::ServerConnection::new(config.clone()).unwrap(), stream);
            let mut asked = Vec::new();
            let mut byte = [0];
            // The prompt's JSON ends with the last closing brace.
            while !asked.ends_with(b"}]}") {
                match stream.read(&mut byte) {
                    Ok(1) => asked.push(byte[0]),
                    // A client that does not trust us leaves in the handshake.
                    _ => break,
                }
            }
            let answer =
                events(0, &[("open", &open()), ("text", r#"{"text":"one"}"#), ("done", r#"{"finish":"stop","outcome":"allowed"}"#)]);
            let _ = stream.write_all(answer.as_bytes());
            stream.conn.send_close_notify();
            let _ = stream.flush();
        }
    });
    let mut chat = headgate();
    chat.args(["chat", "--url", &format!("https://localhost:{port}"), "hello"]);
    let said = run(chat.env("SSL_CERT_FILE", &trusted));
    assert_eq!((said.code, said.out.as_str()), (Some(0), "one\n"), "{}", said.err);
    // The certificate of somebody else.
    std::fs::write(&trusted, rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap().cert.pem()).unwrap();
    let said = run(chat.env("SSL_CERT_FILE", &trusted));
    assert_eq!((said.code, said.out.as_str()), (Some(1), ""));
    assert!(said.err.contains("invalid peer certificate"), "{}", said.err);
}
