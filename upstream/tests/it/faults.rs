//! Every way an upstream can break is exactly one fault, and never a success.

use std::{sync::Arc, time::Duration};

use headgate_contracts::{Batch, Code};
use headgate_testkit::{
    AT_ONCE, at_once,
    dialect::{Answer, Cut},
    soon,
    upstream::{Framing, Refusing, Script, Upstream},
};
use tokio::{sync::Notify, time::Instant};

use crate::{SECOND, code, openai, orchestrator, prompt, read, turn, upstream};

#[tokio::test]
async fn a_refused_connection_is_a_fault_at_once() {
    let nobody = Refusing::start();
    let upstream = upstream(&[format!("http://{}", nobody.addr())], |_| {});
    let (_, end) = at_once(turn(&upstream), "the refusal").await;
    assert_eq!(code(end), Code::UpstreamConnectFailed);
    assert!(!upstream.health()[0].ready);
}

#[tokio::test]
async fn a_name_without_an_address_is_a_failed_connection() {
    let upstream = upstream(&["http://nobody.invalid:80".to_owned()], |_| {});
    let (_, end) = turn(&upstream).await;
    let fault = end.unwrap_err();
    assert_eq!(fault.code, Code::UpstreamConnectFailed);
    assert!(fault.chain().contains("chat at nobody.invalid:80"), "{}", fault.chain());
}

#[tokio::test]
async fn a_server_that_never_answers_is_left_at_the_limit() {
    let model = Upstream::always(Script::new().read().stall()).await;
    let limit = Duration::from_millis(150);
    let upstream = upstream(&[model.url()], |settings| settings.timeouts.first_byte = limit);
    let begun = Instant::now();
    let fault = turn(&upstream).await.1.unwrap_err();
    let waited = begun.elapsed();
    assert_eq!(fault.code, Code::UpstreamTimeoutFirstByte);
    assert!(fault.chain().contains(&model.addr().to_string()), "{}", fault.chain());
    assert!(waited >= limit && waited < limit + AT_ONCE, "{waited:?}");
    model.closed(1).await;
}

#[tokio::test]
async fn a_head_without_an_event_is_not_a_beginning() {
    // Comments keep a connection alive, but they are no answer.
    let model = Upstream::always(Script::new().read().sse().send(": thinking\n\n").stall()).await;
    let upstream = upstream(&[model.url()], |settings| settings.timeouts.first_byte = Duration::from_millis(150));
    assert_eq!(code(turn(&upstream).await.1), Code::UpstreamTimeoutFirstByte);
    model.closed(1).await;
}

#[tokio::test]
async fn a_server_that_falls_silent_is_left_at_the_limit_and_its_text_kept() {
    let events = Answer::openai("m", &["safe"]).events();
    let model = Upstream::always(Script::new().read().sse().send_all(events[..2].to_vec()).stall()).await;
    let limit = Duration::from_millis(150);
    let upstream = upstream(&[model.url()], |settings| settings.timeouts.idle = limit);
    let begun = Instant::now();
    let (heard, end) = turn(&upstream).await;
    let waited = begun.elapsed();
    assert_eq!((heard.as_str(), code(end)), ("safe", Code::UpstreamStalled));
    assert!(waited >= limit && waited < limit + AT_ONCE, "{waited:?}");
    model.closed(1).await;
}

#[tokio::test]
async fn an_answer_without_end_is_cut_at_its_total_time() {
    let event = Answer::openai("m", &["again "]).events().remove(1);
    let model = Upstream::always(Script::new().read().sse().send_paced(vec![event; 1000], Duration::from_millis(5))).await;
    let upstream = upstream(&[model.url()], |settings| settings.timeouts.total = Duration::from_millis(100));
    assert_eq!(code(turn(&upstream).await.1), Code::StreamLimitExceeded);
    model.closed(1).await;
}

#[tokio::test]
async fn a_cut_at_every_byte_is_one_fault_and_never_a_success() {
    for (answer, protocol) in [(Answer::openai("m", &["one", " two"]), true), (Answer::conversation("m", &["one", " two"]), false)] {
        let bytes = answer.bytes();
        let events = answer.events();
        // The terminal event is complete one byte before its blank line's second line feed is.
        let terminal = bytes.len() - usize::from(events.last().unwrap().ends_with(b"\n\n"));
        for reset in [false, true] {
            let cut = |at: usize| {
                let script = Script::new().read().sse_framed(Framing::UntilClose).send(bytes[..at].to_vec());
                if reset { script.reset() } else { script.close() }
            };
            let model = Upstream::each((0..=terminal).map(cut)).await;
            let upstream = if protocol { openai(&model) } else { orchestrator(&model) };
            let mut batch = Batch::new();
            for at in 0..terminal {
                match upstream.open(&prompt()).await {
                    Err(fault) => assert_eq!(fault.code, Code::UpstreamReset, "cut at {at}: {}", fault.chain()),
                    Ok(mut answer) => {
                        let (heard, end) = read(&mut answer).await;
                        assert!("one two".starts_with(&heard), "cut at {at}: {heard:?}");
                        let fault = end.expect_err("a cut is no success");
                        assert_eq!(fault.code, Code::UpstreamReset, "cut at {at}: {}", fault.chain());
                        // Asked again, it says the same again.
                        assert_eq!(code(answer.next(&mut batch).await), Code::UpstreamReset);
                    }
                }
            }
        }
    }
}

#[tokio::test]
async fn a_chunked_body_cut_at_every_byte_is_one_fault_until_its_last_event() {
    let event = Answer::openai("m", &["one"]).bytes();
    let mut wire = format!("{:x};ext=1\r\n", event.len()).into_bytes();
    wire.extend_from_slice(&event);
    let last_event = wire.len();
    wire.extend_from_slice(b"\r\n0\r\ntrailer: x\r\n\r\n");
    let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
    let script = |at: usize| Script::new().read().raw([head.as_bytes(), &wire[..at]].concat()).close();
    let model = Upstream::each((0..=wire.len()).map(script)).await;
    let upstream = openai(&model);
    for at in 0..=wire.len() {
        let (heard, end) = turn(&upstream).await;
        if at < last_event {
            assert_eq!(code(end), Code::UpstreamReset, "cut at {at}");
        } else {
            assert_eq!((heard.as_str(), end.is_ok()), ("one", true), "cut at {at}, after the last event");
        }
    }
}

#[tokio::test]
async fn a_half_chunk_is_a_cut() {
    let events = Answer::openai("m", &["one", " two"]).events();
    let model = Upstream::always(Script::new().read().sse().send_all(events[..2].to_vec()).half_chunk(events[2].clone()).close()).await;
    let (heard, end) = turn(&openai(&model)).await;
    assert!(heard.starts_with("one"));
    assert_eq!(code(end), Code::UpstreamReset);
}

#[tokio::test]
async fn what_is_no_answer_is_a_protocol_error_and_none_of_it_is_shown() {
    let secret = "<html>internal-host-7</html>";
    let stream = ("content-type", "text/event-stream");
    let length = Framing::Length(secret.len());
    let with = |status, headers: &[(&str, &str)]| Script::new().read().head(status, length, headers).send(secret);
    let raw = |head: &str| Script::new().read().raw(head.to_owned()).stall();
    let table = [
        ("html", with(200, &[("content-type", "text/html")])),
        ("no type", with(200, &[])),
        ("two types", with(200, &[stream, ("content-type", "text/html")])),
        ("plain text", with(200, &[("content-type", "text/plain")])),
        ("xml", with(200, &[("content-type", "application/xml")])),
        ("nearly a stream", with(200, &[("content-type", "text/event-streams")])),
        ("ndjson", with(200, &[("content-type", "application/x-ndjson")])),
        ("a problem with status 200", with(200, &[("content-type", "application/problem+json")])),
        ("json that is html", with(200, &[("content-type", "application/json")])),
        ("compressed", with(200, &[stream, ("content-encoding", "gzip")])),
        ("created", with(201, &[stream])),
        ("partial", with(206, &[stream])),
        ("no content", Script::no_content()),
        ("moved", with(301, &[("location", "http://127.0.0.1:1/")])),
        ("found", Script::redirect("http://127.0.0.1:1/")),
        ("redirected", with(307, &[("location", "http://127.0.0.1:1/")])),
        ("not modified", Script::new().read().head(304, Framing::None, &[])),
        ("switched", raw("HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n")),
        ("not HTTP", raw("SSH-2.0-OpenSSH_9.6\r\n\r\n")),
        ("HTTP/2", raw("HTTP/2 200 OK\r\n\r\n")),
        ("bare line feeds", raw("HTTP/1.1 200 OK\ncontent-type: text/event-stream\n\n")),
        ("a folded header", raw("HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n x: y\r\n\r\n")),
        ("a space before the colon", raw("HTTP/1.1 200 OK\r\ncontent-type : text/event-stream\r\n\r\n")),
        (
            "a length and an encoding",
            raw("HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n"),
        ),
        ("two lengths", raw("HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 5\r\ncontent-length: 5\r\n\r\n")),
        ("a signed length", raw("HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: +5\r\n\r\n")),
        ("another encoding", raw("HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: gzip, chunked\r\n\r\n")),
        ("an encoding in HTTP/1.0", raw("HTTP/1.0 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")),
        ("a head without end", raw(&format!("HTTP/1.1 200 OK\r\nx: {}", "y".repeat(20 << 10)))),
        ("too many fields", raw(&format!("HTTP/1.1 200 OK\r\n{}\r\n", "x: y\r\n".repeat(101)))),
        ("a chunk that lies", raw("HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n1\r\n:x\r\n")),
        ("a chunk of no size", raw("HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n\r\n")),
        (
            "a chunk of all sizes",
            raw("HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\nffffffffffffffff\r\n"),
        ),
    ];
    for (what, script) in table {
        let model = Upstream::always(script).await;
        let (heard, end) = at_once(turn(&openai(&model)), what).await;
        let fault = end.expect_err(what);
        assert_eq!((fault.code, heard.as_str()), (Code::UpstreamProtocolError, ""), "{what}: {}", fault.chain());
        assert!(!fault.chain().contains("internal-host"), "{what}: {}", fault.chain());
        assert_eq!(model.opened(), 1, "{what}: neither followed nor tried again");
    }
}

#[tokio::test]
async fn an_event_over_the_limit_ends_the_answer_after_what_was_good() {
    let good = Answer::openai("m", &["good"]).events();
    let model = Upstream::always(Script::new().read().sse().send_all(good[..2].to_vec()).flood("x".repeat(64 << 10))).await;
    let (heard, end) = turn(&openai(&model)).await;
    assert_eq!((heard.as_str(), code(end)), ("good", Code::UpstreamEventTooLarge));
    model.closed(1).await;
}

#[tokio::test]
async fn a_whole_answer_over_the_limit_is_not_gathered() {
    let script = Script::new().read().head(200, Framing::Chunked, &[("content-type", "application/json")]).flood("[".repeat(64 << 10));
    let model = Upstream::always(script).await;
    assert_eq!(code(turn(&openai(&model)).await.1), Code::UpstreamEventTooLarge);
    model.closed(1).await;
}

#[tokio::test]
async fn events_before_a_malformed_one_are_given_first() {
    let mut events = Answer::openai("m", &["good"]).events();
    events.truncate(2);
    events.push(b"data: {\"choices\": 7}\n\n".to_vec());
    let model = Upstream::always(Script::new().read().sse().send(events.concat()).stall()).await;
    let (heard, end) = turn(&openai(&model)).await;
    assert_eq!((heard.as_str(), code(end)), ("good", Code::UpstreamProtocolError));
}

#[tokio::test]
async fn an_error_inside_a_stream_is_the_end_and_its_words_are_not_shown() {
    let openai_stream = Answer::openai("m", &["good"]).events()[..2].concat();
    let error = b"data: {\"error\":{\"message\":\"the prompt was: hunter2\",\"type\":\"server_error\",\"code\":500}}\n\n";
    let model = Upstream::always(Script::stream([[openai_stream.as_slice(), error].concat()])).await;
    let (heard, end) = turn(&openai(&model)).await;
    let fault = end.unwrap_err();
    assert_eq!(heard, "good");
    assert!(!fault.chain().contains("hunter2") && !fault.message.contains("hunter2"), "{}", fault.chain());

    let stream = Answer::new(headgate_testkit::dialect::Dialect::Conversation, "m").open().text("good").error("overloaded", "hunter2");
    let model = Upstream::always(Script::stream(stream.cut(Cut::Events))).await;
    let (heard, end) = turn(&orchestrator(&model)).await;
    let fault = end.unwrap_err();
    assert_eq!((heard.as_str(), fault.code), ("good", Code::Overloaded));
    assert!(!fault.chain().contains("hunter2"));
}

#[tokio::test]
async fn an_orchestrators_problem_keeps_its_code_and_its_pause() {
    let problem = |status, code: &str, detail: &str, headers: &[(&str, &str)]| {
        let body = format!(r#"{{"status":{status},"code":"{code}","detail":"{detail}","error":{{"message":"hunter2"}}}}"#);
        let headers = [headers, &[("content-type", "application/problem+json")]].concat();
        Script::new().read().head(status, Framing::Length(body.len()), &headers).send(body)
    };
    let table = [
        (problem(401, "verdict_invalid", "audience", &[]), Code::VerdictRejected, Some("audience"), None),
        (problem(401, "verdict_replayed", "replayed", &[]), Code::VerdictRejected, Some("replayed"), None),
        (problem(409, "version_conflict", "version", &[]), Code::VerdictRejected, Some("version"), None),
        (problem(409, "turn_conflict", "", &[]), Code::TurnConflict, None, None),
        (problem(503, "draining", "", &[("retry-after", "3")]), Code::Draining, None, Some(3 * SECOND)),
        (problem(429, "rate_limited", "", &[("retry-after", "7")]), Code::Overloaded, None, Some(7 * SECOND)),
    ];
    for (script, expected, word, pause) in table {
        let model = Upstream::always(script).await;
        let fault = orchestrator(&model).open(&prompt()).await.unwrap_err();
        assert_eq!((fault.code, fault.retry_after), (expected, pause), "{}", fault.chain());
        assert!(word.is_none_or(|word| fault.chain().contains(word)), "{}", fault.chain());
        assert!(!fault.chain().contains("hunter2"));
    }
}

#[tokio::test]
async fn a_models_refusal_is_a_code_without_its_words() {
    let body = r#"{"error":{"message":"your prompt hunter2 is too long","type":"invalid_request_error","code":"context_length_exceeded"}}"#;
    let table = [(400, Code::UpstreamRefused), (401, Code::UpstreamRefused), (404, Code::UpstreamRefused), (429, Code::Overloaded)];
    for (status, expected) in table {
        let model = Upstream::always(Script::reply(status, "application/json", body)).await;
        let fault = openai(&model).open(&prompt()).await.unwrap_err();
        assert_eq!(fault.code, expected);
        assert!(fault.chain().contains("context_length_exceeded"), "{}", fault.chain());
        assert!(!fault.chain().contains("hunter2") && !fault.message.contains("hunter2"));
    }
}

#[tokio::test]
async fn an_error_whose_body_never_comes_is_known_by_its_status() {
    let script = Script::new().read().head(503, Framing::Length(100), &[("retry-after", "2")]).stall();
    let model = Upstream::always(script).await;
    let fault = at_once(openai(&model).open(&prompt()), "the refusal").await.unwrap_err();
    assert_eq!((fault.code, fault.retry_after), (Code::Overloaded, Some(2 * SECOND)));
}

#[tokio::test]
async fn a_refusal_that_comes_before_the_request_is_sent_is_heard() {
    let here = Arc::new(Notify::new());
    let script = Script::new().read_head().tell(&here).head(413, Framing::Length(0), &[]).close();
    let model = Upstream::always(script).await;
    let mut long = prompt();
    long.messages[0] = headgate_contracts::Message::new(headgate_contracts::Role::User, "x".repeat(16 << 20));
    let fault = soon(openai(&model).open(&long), "the refusal").await.unwrap_err();
    // Where the reset that follows overtakes the refusal, that is what is seen.
    assert!(matches!(fault.code, Code::UpstreamRefused | Code::UpstreamReset), "{}", fault.chain());
}
