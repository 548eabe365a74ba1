//! Many turns on one WebSocket: what is true of a turn on a connection of its own is true here, whatever its neighbours do.

use std::{sync::Arc, time::Duration};

use headgate_contracts::{Batch, Code, Prompt};
use headgate_testkit::{
    at_once,
    dialect::Answer,
    hop::{Heard, Orchestrator, Said, Socket, Then, frame, wire},
    upstream::{Refusing, Script, Upstream as Http},
    within,
};
use headgate_upstream::{Hop, Protocol, Settings, Upstream, settings::Balance};
use http::{HeaderMap, HeaderName, HeaderValue};

use crate::{SECOND, code, content, prompt, read, turn};

fn over(urls: &[String], change: impl FnOnce(&mut Settings)) -> Upstream {
    crate::upstream(urls, |settings| {
        (settings.protocol, settings.hop) = (Protocol::Orchestrator, Hop::WebSocket);
        change(settings);
    })
}

async fn pair() -> (Orchestrator, Upstream) {
    let desk = Orchestrator::start().await;
    let upstream = over(&[desk.url()], |_| {});
    (desk, upstream)
}

/// Opens a turn beside `socket`, which opens it with its first frame.
async fn opened(upstream: &Upstream, socket: &mut Socket) -> (headgate_upstream::Answer, String) {
    let prompt = prompt();
    let (answer, id) = tokio::join!(upstream.open(&prompt), async {
        let id = socket.turn().await;
        socket.say(&id, 0, "open", r#"{"model":"demo"}"#).await;
        id
    });
    assert_eq!(id, prompt.turn.to_string());
    (answer.unwrap(), id)
}

/// Opens the first turn, and with it the first socket.
async fn begun(desk: &mut Orchestrator, upstream: &Upstream) -> (Socket, headgate_upstream::Answer, String) {
    let prompt = prompt();
    let (answer, (socket, id)) = tokio::join!(upstream.open(&prompt), async {
        let mut socket = desk.socket().await;
        let id = socket.turn().await;
        socket.say(&id, 0, "open", r#"{"model":"demo"}"#).await;
        (socket, id)
    });
    (socket, answer.unwrap(), id)
}

#[tokio::test]
async fn a_turn_is_a_frame_sealed_over_the_bytes_of_its_payload() {
    let mut desk = Orchestrator::start().await;
    let upstream = over(&[desk.url() + "/pre"], |settings| settings.authorization = Some(headgate_contracts::Secret::new("hunter2")));
    let mut prompt = prompt();
    prompt.headers.insert("policy-version", HeaderValue::from_static("7"));
    prompt.headers.insert("x-other", HeaderValue::from_static("no"));
    prompt.seal = Some(Arc::new(|_: &Prompt, dispatch| {
        let seen = format!("{} {} {}", dispatch.method, dispatch.path, String::from_utf8_lossy(dispatch.body));
        let seen: String = seen.bytes().map(|byte| format!("{byte:02x}")).collect();
        Ok(HeaderMap::from_iter([(HeaderName::from_static("policy-verdict"), HeaderValue::from_str(&seen).unwrap())]))
    }));
    let open = upstream.open(&prompt);
    let asked = async {
        let mut socket = desk.socket().await;
        let frame = socket.frame().await;
        socket.answer(frame["turn_id"].as_str().unwrap(), "yes").await;
        (socket, frame)
    };
    let (answer, (socket, frame)) = tokio::join!(open, asked);
    assert_eq!(read(&mut answer.unwrap()).await.0, "yes");
    assert_eq!(socket.handshake.uri().path(), "/pre/v1/conversation/stream");
    assert_eq!(socket.handshake.headers()["authorization"], "Bearer hunter2");
    assert!(socket.handshake.headers().get("policy-verdict").is_none(), "a verdict is one turn's");
    let headers = frame["headers"].as_object().unwrap();
    let payload = frame["payload"].as_str().unwrap();
    let sealed: String = format!("GET /pre/v1/conversation/stream {payload}").bytes().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(headers["policy-verdict"], sealed.as_str());
    let names: Vec<_> = headers.keys().map(String::as_str).collect();
    assert_eq!(names, ["policy-verdict", "policy-version", "idempotency-key", "traceparent"]);
    assert!(headers["traceparent"].as_str().unwrap().contains(&prompt.trace.trace_id_hex()));
    assert!(payload.contains(&format!("\"turn_id\":\"{}\"", prompt.turn)) && frame["credit"].as_u64().unwrap() > 0);
}

#[tokio::test]
async fn a_thousand_turns_on_one_socket_each_get_their_own_bytes() {
    const TURNS: usize = 1000;
    let (mut desk, upstream) = pair().await;
    let texts = |id: &str| -> Vec<String> { (0..20).map(|n| format!("{id}:{n} Grüße \u{1F980}\n")).collect() };
    let speaking = async {
        let mut socket = desk.socket().await;
        let mut open: Vec<(String, u64)> = Vec::new();
        let (mut begun, mut random) = (0, headgate_testkit::dialect::Random(7));
        while begun < TURNS || !open.is_empty() {
            // Each round takes a turn that waits, if there is one, and says the next of any.
            if begun < TURNS && (open.len() < 100 && (open.is_empty() || random.below(3) == 0)) {
                let id = socket.turn().await;
                socket.say(&id, 0, "open", r#"{"model":"demo"}"#).await;
                open.push((id, 0));
                begun += 1;
            }
            let at = random.below(open.len());
            let (id, said) = &mut open[at];
            let all = texts(id);
            let mut frames = Vec::new();
            for _ in 0..1 + random.below(8) {
                if let Some(text) = all.get(*said as usize) {
                    *said += 1;
                    frames.push(frame(id, *said, "text", &format!("{{\"text\":{text:?}}}").replace("\\u{1f980}", "\u{1F980}")));
                }
            }
            if *said as usize == all.len() {
                frames.push(frame(id, *said + 1, "done", r#"{"finish":"stop"}"#));
                open.swap_remove(at);
            }
            socket.write(&wire(frames)).await;
        }
        socket
    };
    let asking = async {
        let room = tokio::sync::Semaphore::new(150);
        let turns = (0..TURNS).map(|_| async {
            let _place = room.acquire().await.unwrap();
            let prompt = prompt();
            let mut answer = upstream.open(&prompt).await.unwrap();
            let (heard, end) = read(&mut answer).await;
            assert!(end.is_ok(), "{:?}", end);
            assert_eq!(heard, texts(&prompt.turn.to_string()).concat());
        });
        futures_util::future::join_all(turns).await;
    };
    let (_socket, _) = within(60 * SECOND, async { tokio::join!(speaking, asking) }, "a thousand turns").await;
    assert_eq!((desk.opened(), upstream.stats().connected.get(), upstream.stats().reused.get()), (1, 1, TURNS as u64 - 150));
}

#[tokio::test]
async fn every_cutting_of_frames_gives_the_same_answer() {
    let answer = Answer::conversation("m", &["Grüße", " an", " 🦀", " \"alle\"\n"]);
    let cuts: Vec<usize> = vec![1, 2, 3, 7, 64, 1 << 20];
    let said = cuts.clone().into_iter().map(|size| {
        let answer = answer.clone();
        Said::pieces(
            move |turn| {
                let whole = wire(answer.frames(turn));
                (0..whole.len()).step_by(size).map(|at| whole.slice(at..whole.len().min(at + size))).collect()
            },
            Then::Stay,
        )
    });
    let desk = Orchestrator::start().await.saying(said);
    let upstream = over(&[desk.url()], |_| {});
    for size in cuts {
        let (heard, end) = turn(&upstream).await;
        assert_eq!((heard.as_str(), end.is_ok()), ("Grüße an 🦀 \"alle\"\n", true), "pieces of {size}");
    }
}

#[tokio::test]
async fn an_untouched_event_keeps_its_bytes() {
    let (mut desk, upstream) = pair().await;
    let (mut socket, mut answer, id) = begun(&mut desk, &upstream).await;
    let odd = r#"{"text":"\u0047r\u00fc\u00dfe" , "lane":"content"}"#;
    socket.say(&id, 1, "text", odd).await;
    let mut batch = Batch::new();
    assert!(answer.next(&mut batch).await.unwrap());
    let raw = batch.events()[0].raw.expect("its bytes");
    assert_eq!((std::str::from_utf8(batch.wire(raw)).unwrap(), answer.head.model.as_str()), (odd, "demo"));
}

#[tokio::test]
async fn a_turn_that_nobody_reads_holds_its_credit_and_stalls_no_neighbour() {
    let (mut desk, upstream) = pair().await;
    let (mut socket, mut slow, id) = begun(&mut desk, &upstream).await;
    // As much as there is credit for, and not one byte more: the last frame takes what is left of it and more.
    let word = format!("{{\"text\":\"{}\"}}", "x".repeat(1000));
    let (mut sent, mut seq) = (frame(&id, 0, "open", r#"{"model":"demo"}"#).len(), 1);
    while sent < headgate_contracts::wire::hop::WINDOW as usize {
        let text = frame(&id, seq, "text", &word);
        sent += text.len();
        socket.text(text).await;
        seq += 1;
    }
    for n in 0..50 {
        let (mut quick, other) = opened(&upstream, &mut socket).await;
        socket.say(&other, 1, "text", &format!("{{\"text\":\"{n}\"}}")).await;
        socket.say(&other, 2, "done", r#"{"finish":"stop"}"#).await;
        let (heard, end) = at_once(read(&mut quick), "a neighbour").await;
        assert_eq!((heard, end.is_ok()), (n.to_string(), true));
    }
    // It gets credit for what is read, and goes on.
    let mut batch = Batch::new();
    let mut heard = 0;
    while heard < (seq as usize - 1) * 1000 {
        assert!(slow.next(&mut batch).await.unwrap());
        assert!(batch.bytes() < 64 << 10, "a batch of {} bytes", batch.bytes());
        heard += content(&batch).len();
    }
    let credit = socket.frame_of("credit").await;
    assert_eq!((credit["turn_id"].as_str(), credit["bytes"].as_u64()), (Some(id.as_str()), Some(sent as u64)));
    socket.say(&id, seq, "text", &word).await;
    socket.say(&id, seq + 1, "done", r#"{"finish":"length"}"#).await;
    let (rest, end) = read(&mut slow).await;
    assert_eq!((rest.len(), end.unwrap().as_str()), (1000, "length"));
}

#[tokio::test]
async fn who_sends_more_than_there_is_credit_for_loses_that_turn_alone() {
    let x = "x".repeat(4000);
    for (name, object, said) in [("text", format!("{{\"text\":\"{x}\"}}"), 9 * 4000), ("open", format!("{{\"model\":\"{x}\"}}"), 0)] {
        let (mut desk, upstream) = pair().await;
        let (mut socket, mut greedy, id) = begun(&mut desk, &upstream).await;
        let (mut good, other) = opened(&upstream, &mut socket).await;
        for seq in 1..100 {
            socket.say(&id, seq, name, &object).await;
        }
        assert_eq!(socket.frame_of("stop").await["turn_id"], id.as_str(), "{name}: nobody had read a byte of it");
        let (heard, end) = read(&mut greedy).await;
        // Nine of them: the one that took the last of the 32 KiB too.
        assert_eq!((heard.len(), code(end)), (said, Code::UpstreamProtocolError), "{name}");
        socket.say(&other, 1, "done", r#"{"finish":"stop"}"#).await;
        assert!(read(&mut good).await.1.is_ok(), "{name}");
    }
}

#[tokio::test]
async fn leaving_mid_stream_stops_the_turn_by_a_frame_and_frees_its_place() {
    let (mut desk, upstream) = pair().await;
    let (mut socket, answer, id) = begun(&mut desk, &upstream).await;
    let (mut good, other) = opened(&upstream, &mut socket).await;
    assert_eq!(upstream.health()[0].in_flight, 2);
    drop(answer);
    assert_eq!(upstream.health()[0].in_flight, 1);
    let stop = at_once(socket.frame(), "the stop").await;
    assert_eq!((stop["type"].as_str(), stop["turn_id"].as_str()), (Some("stop"), Some(id.as_str())));
    // What was on its way is nobody's.
    socket.say(&id, 1, "text", r#"{"text":"late"}"#).await;
    socket.say(&id, 2, "error", r#"{"code":"stopped","message":"","retryable":false,"error":{}}"#).await;
    socket.say(&other, 1, "done", r#"{"finish":"stop"}"#).await;
    assert!(read(&mut good).await.1.is_ok());
    assert_eq!((upstream.stats().left.get(), upstream.stats().cancelled.get(), desk.opened()), (1, 1, 1));
}

#[tokio::test]
async fn leaving_before_the_first_byte_stops_the_turn_too() {
    let (mut desk, upstream) = pair().await;
    let prompt = prompt();
    let mut socket = tokio::select! {
        opened = upstream.open(&prompt) => panic!("nobody answered: {opened:?}"),
        socket = async {
            let mut socket = desk.socket().await;
            socket.turn().await;
            socket
        } => socket,
    };
    let stop = at_once(socket.frame(), "the stop").await;
    assert_eq!((stop["type"].as_str(), stop["turn_id"].as_str()), (Some("stop"), Some(prompt.turn.to_string().as_str())));
    assert_eq!(upstream.health()[0].in_flight, 0);
}

#[tokio::test]
async fn a_socket_that_ends_at_any_frame_is_one_fault_for_each_of_its_turns_and_never_a_success() {
    let answer = Answer::conversation("m", &["one", " two"]);
    let count = answer.frames("x").len();
    for then in [Then::End, Then::Reset, Then::Close(1000), Then::Close(1012)] {
        let ends = (0..count).map(|at| {
            let answer = answer.clone();
            Said::pieces(move |turn| vec![wire(&answer.frames(turn)[..at])], then)
        });
        let desk = Orchestrator::start().await.saying(ends);
        let upstream = over(&[desk.url()], |_| {});
        for at in 0..count {
            let what = format!("{then:?} after {at} of {count} frames");
            match upstream.open(&prompt()).await {
                Err(fault) => assert_eq!((fault.code, at), (Code::UpstreamReset, 0), "{what}: {}", fault.chain()),
                Ok(mut answer) => {
                    let (heard, end) = read(&mut answer).await;
                    assert!("one two".starts_with(&heard), "{what}: {heard:?}");
                    assert_eq!(code(end), Code::UpstreamReset, "{what}");
                    assert_eq!(code(answer.next(&mut Batch::new()).await), Code::UpstreamReset, "{what}: asked again");
                }
            }
        }
    }
}

#[tokio::test]
async fn a_socket_that_ends_takes_all_its_turns_along_and_the_next_turn_opens_another() {
    let (mut desk, upstream) = pair().await;
    let (mut socket, mut one, _) = begun(&mut desk, &upstream).await;
    let (mut two, _) = opened(&upstream, &mut socket).await;
    socket.abort();
    for answer in [&mut one, &mut two] {
        assert_eq!(code(at_once(read(answer), "the fault").await.1), Code::UpstreamReset);
    }
    let (mut socket, mut answer, id) = begun(&mut desk, &upstream).await;
    socket.say(&id, 1, "done", r#"{"finish":"stop"}"#).await;
    assert!(read(&mut answer).await.1.is_ok());
    assert_eq!(desk.opened(), 2);
}

#[tokio::test]
async fn frames_that_cannot_be_end_their_turn_alone() {
    let text = r#"{"text":"x"}"#;
    let (mut desk, upstream) = pair().await;
    let (mut socket, mut good, other) = begun(&mut desk, &upstream).await;
    let large = format!("{{\"text\":\"{}\"}}", "x".repeat(200 << 10));
    let cases = [
        ("a number twice", vec![(1, "text", text), (1, "text", text)], "x", Code::UpstreamProtocolError),
        ("a number left out", vec![(1, "text", text), (3, "text", text)], "x", Code::UpstreamProtocolError),
        ("no JSON", vec![(1, "text", text), (2, "text", "{nonsense}")], "x", Code::UpstreamProtocolError),
        ("no text", vec![(1, "text", text), (2, "text", "{}")], "x", Code::UpstreamProtocolError),
        ("an event too large", vec![(1, "text", text), (2, "text", large.as_str())], "x", Code::UpstreamEventTooLarge),
        ("an error", vec![(1, "text", text), (2, "error", r#"{"code":"overloaded","message":"hunter2"}"#)], "x", Code::Overloaded),
    ];
    for (what, frames, said, expected) in cases {
        let (mut answer, id) = opened(&upstream, &mut socket).await;
        for (seq, name, object) in frames {
            socket.say(&id, seq, name, object).await;
        }
        let (heard, end) = at_once(read(&mut answer), what).await;
        let fault = end.expect_err(what);
        assert_eq!((heard.as_str(), fault.code), (said, expected), "{what}: {}", fault.chain());
        assert!(!fault.chain().contains("hunter2") && !fault.chain().contains("nonsense"), "{what}: {}", fault.chain());
    }
    socket.say(&other, 1, "text", text).await;
    socket.say(&other, 2, "done", r#"{"finish":"stop"}"#).await;
    let (heard, end) = read(&mut good).await;
    assert_eq!((heard.as_str(), end.is_ok(), desk.opened()), ("x", true, 1));
}

#[tokio::test]
async fn frames_of_no_turn_of_ours_are_passed_over() {
    let (mut desk, upstream) = pair().await;
    let (mut socket, mut answer, id) = begun(&mut desk, &upstream).await;
    for stranger in ["0193a5f0-7e1c-7000-8000-000000000000", "0193a5f0-7e1c-7000-8000-000000000001"] {
        socket.say(stranger, 0, "text", r#"{"text":"forged"}"#).await;
        socket.say(stranger, 1, "done", r#"{"finish":"stop"}"#).await;
    }
    socket.say(&id, 1, "sung", r#"{"text":"an event of tomorrow"}"#).await;
    // Whose it is stands in front; what is said behind is not believed, and not passed on.
    socket
        .text(format!(
            "{{\"type\":\"text\",\"turn_id\":\"{id}\",\"seq\":2,\"text\":\"mine\",\"turn_id\":\"0193a5f0-7e1c-7000-8000-000000000000\"}}"
        ))
        .await;
    let mut batch = Batch::new();
    assert!(answer.next(&mut batch).await.unwrap());
    assert_eq!((content(&batch).as_str(), batch.events()[0].raw), ("mine", None));
    socket.say(&id, 3, "done", r#"{"finish":"stop"}"#).await;
    assert!(read(&mut answer).await.1.is_ok());
}

#[tokio::test]
async fn frames_that_say_not_whose_they_are_end_the_socket() {
    let message = tokio_tungstenite::tungstenite::Message::binary;
    for (what, text) in [
        ("no JSON", Some("secret words")),
        ("no type", Some(r#"{"turn_id":"0193a5f0-7e1c-7000-8000-000000000000"}"#)),
        ("no turn", Some(r#"{"type":"text","seq":1,"text":"x"}"#)),
        ("a turn that is none", Some(r#"{"type":"text","turn_id":"secret","seq":1}"#)),
        ("what it did not understand", Some(r#"{"type":"error","code":"invalid_request","message":"secret"}"#)),
        ("bytes", None),
    ] {
        let (mut desk, upstream) = pair().await;
        let (mut socket, mut answer, _) = begun(&mut desk, &upstream).await;
        match text {
            Some(text) => socket.text(text.to_owned()).await,
            None => socket.message(message(vec![1])).await,
        }
        let fault = at_once(read(&mut answer), what).await.1.expect_err(what);
        assert_eq!(fault.code, Code::UpstreamProtocolError, "{what}: {}", fault.chain());
        assert!(!fault.chain().contains("secret"), "{what}: {}", fault.chain());
        assert_eq!(socket.hear().await, Heard::Closed(Some(1002)), "{what}");
    }
}

#[tokio::test]
async fn a_turn_goes_elsewhere_only_where_it_surely_was_not_taken() {
    let refusal = |code: &'static str, taken: &'static str| {
        Said::pieces(
            move |turn| {
                vec![wire([format!("{{\"type\":\"error\"{taken},\"turn_id\":\"{turn}\",\"code\":\"{code}\",\"retryable\":true}}")])]
            },
            Then::Stay,
        )
    };
    for (what, said, goes_on) in [
        ("one that is full", refusal("overloaded", ",\"taken\":false"), true),
        ("one that drains", refusal("draining", ",\"taken\":false"), true),
        ("one that does not say", refusal("overloaded", ""), false),
        ("one that took it", refusal("overloaded", ",\"taken\":true"), false),
        ("one that rejects the verdict", refusal("verdict_invalid", ",\"taken\":false"), false),
        ("one that goes away before it has said anything", Said::pieces(|_| Vec::new(), Then::Close(1012)), true),
        ("one that breaks before it has said anything", Said::pieces(|_| Vec::new(), Then::Reset), false),
    ] {
        let good = || Said::pieces(|turn| vec![wire(Answer::conversation("m", &["good"]).frames(turn))], Then::Stay);
        let first = Orchestrator::start().await.saying([said]);
        let second = Orchestrator::start().await.saying([good(), good()]);
        let upstream = over(&[first.url(), second.url()], |settings| settings.balance = Balance::RoundRobin);
        let mut heard = vec![turn(&upstream).await.0];
        if heard[0] == "good" && upstream.stats().retried.get() == 0 {
            heard = vec![turn(&upstream).await.0];
        }
        assert_eq!(heard, [if goes_on { "good" } else { "" }], "{what}");
        assert_eq!(upstream.stats().retried.get(), u64::from(goes_on), "{what}");
    }
}

#[tokio::test]
async fn an_endpoint_that_refuses_the_handshake_has_a_code() {
    let (refused, desk) = (Refusing::start(), Orchestrator::start().await);
    let good = desk.saying([Said::pieces(|turn| vec![wire(Answer::conversation("m", &["good"]).frames(turn))], Then::Stay)]);
    let upstream = over(&[format!("http://{}", refused.addr()), good.url()], |settings| settings.balance = Balance::Session);
    // Whichever is asked first, the turn is answered.
    assert_eq!(turn(&upstream).await.0, "good");
    for (what, script, expected) in [
        ("no WebSocket", Script::reply(200, "text/html", "<html>secret</html>"), Code::UpstreamProtocolError),
        ("not here", Script::reply(404, "application/json", r#"{"code":"not_found"}"#), Code::UpstreamRefused),
        ("busy", Script::reply(503, "application/json", r#"{"code":"overloaded"}"#), Code::Overloaded),
        ("hanging up", Script::new().read().close(), Code::UpstreamReset),
    ] {
        let http = Http::always(script).await;
        let fault = turn(&over(&[http.url()], |_| {})).await.1.expect_err(what);
        assert_eq!(fault.code, expected, "{what}: {}", fault.chain());
        assert!(!fault.chain().contains("secret"), "{what}: {}", fault.chain());
    }
    let mute = Http::always(Script::new().read().stall()).await;
    let upstream = over(&[mute.url()], |settings| settings.timeouts.connect = Duration::from_millis(100));
    assert_eq!(code(at_once(turn(&upstream), "the limit").await.1), Code::UpstreamConnectFailed);
}

#[tokio::test]
async fn a_socket_that_went_while_it_was_idle_is_replaced_unseen() {
    let (mut desk, upstream) = pair().await;
    let (mut socket, mut answer, id) = begun(&mut desk, &upstream).await;
    socket.say(&id, 1, "done", r#"{"finish":"stop"}"#).await;
    assert!(read(&mut answer).await.1.is_ok());
    socket.close(1012).await;
    let (mut socket, mut answer, id) = begun(&mut desk, &upstream).await;
    socket.say(&id, 1, "done", r#"{"finish":"stop"}"#).await;
    assert!(read(&mut answer).await.1.is_ok());
    assert_eq!((upstream.stats().retried.get(), desk.opened()), (0, 2));
}

#[tokio::test]
async fn a_socket_without_turns_is_closed_in_time_and_with_its_upstream() {
    for idle in [Duration::ZERO, Duration::from_millis(30), Duration::from_secs(60)] {
        let mut desk = Orchestrator::start().await;
        let upstream = over(&[desk.url()], |settings| settings.idle.timeout = idle);
        let (mut socket, mut answer, id) = begun(&mut desk, &upstream).await;
        socket.say(&id, 1, "done", r#"{"finish":"stop"}"#).await;
        assert!(read(&mut answer).await.1.is_ok());
        drop(answer);
        if idle > SECOND {
            assert_eq!(upstream.health()[0].idle, 1);
            drop(upstream);
        }
        assert_eq!(at_once(socket.hear(), "the goodbye").await, Heard::Closed(Some(1000)));
    }
}

#[tokio::test]
async fn an_upstream_that_goes_lets_its_turns_end() {
    let (mut desk, upstream) = pair().await;
    let (mut socket, mut answer, id) = begun(&mut desk, &upstream).await;
    drop(upstream);
    socket.say(&id, 1, "text", r#"{"text":"still here"}"#).await;
    socket.say(&id, 2, "done", r#"{"finish":"stop"}"#).await;
    assert_eq!(read(&mut answer).await.0, "still here");
    drop(answer);
    assert_eq!(at_once(socket.hear(), "the goodbye").await, Heard::Closed(Some(1000)));
}

#[tokio::test]
async fn a_socket_takes_no_more_turns_than_it_may() {
    let (mut desk, upstream) = pair().await;
    let (mut socket, first, _) = begun(&mut desk, &upstream).await;
    let mut answers = vec![first];
    for _ in 1..headgate_contracts::wire::hop::MAX_TURNS {
        answers.push(opened(&upstream, &mut socket).await.0);
    }
    let (_second, one_more, _) = begun(&mut desk, &upstream).await;
    assert_eq!(desk.opened(), 2);
    drop((answers, one_more));
}

#[tokio::test]
async fn each_worker_has_its_own_socket() {
    let mut desk = Orchestrator::start().await;
    let upstream = over(&[desk.url()], |_| {});
    let workers: Vec<_> = (0..2)
        .map(|_| {
            let upstream = upstream.clone();
            std::thread::spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                runtime.block_on(async { (turn(&upstream).await.0, turn(&upstream).await.0) })
            })
        })
        .collect();
    for _ in &workers {
        let mut socket = desk.socket().await;
        tokio::spawn(async move {
            while let Heard::Frame(frame) = socket.hear().await {
                if frame["type"] == "turn" {
                    socket.answer(frame["turn_id"].as_str().unwrap(), "yes").await;
                }
            }
        });
    }
    for worker in workers {
        let said = tokio::task::spawn_blocking(|| worker.join().unwrap()).await.unwrap();
        assert_eq!(said, ("yes".to_owned(), "yes".to_owned()));
    }
    assert_eq!(desk.opened(), 2);
}

#[tokio::test]
async fn a_socket_that_falls_silent_is_asked_for_a_sign_of_life_and_given_up() {
    let mut desk = Orchestrator::start().await;
    let upstream = over(&[desk.url()], |settings| (settings.timeouts.first_byte, settings.timeouts.idle) = (300 * SECOND, 300 * SECOND));
    let (mut socket, mut answer, _) = begun(&mut desk, &upstream).await;
    // Everything is connected: from here on only the clock moves, and whoever does not read does not answer.
    tokio::time::pause();
    let begun = tokio::time::Instant::now();
    let fault = read(&mut answer).await.1.unwrap_err();
    let waited = begun.elapsed();
    assert_eq!(fault.code, Code::UpstreamReset, "{}", fault.chain());
    assert!(fault.chain().contains("silent") && (30 * SECOND..40 * SECOND).contains(&waited), "{waited:?}: {}", fault.chain());
    tokio::time::resume();
    while socket.hear().await != Heard::Closed(Some(1001)) {}
    assert_eq!(socket.pings(), 1);
}

#[tokio::test]
async fn a_turn_that_is_not_answered_is_left_at_the_limit_and_stopped() {
    let mut desk = Orchestrator::start().await;
    let upstream = over(&[desk.url()], |settings| settings.timeouts.first_byte = Duration::from_millis(150));
    let (end, mut socket) = tokio::join!(turn(&upstream), desk.socket());
    assert_eq!(code(end.1), Code::UpstreamTimeoutFirstByte);
    assert_eq!((socket.frame().await["type"].as_str(), socket.frame().await["type"].as_str()), (Some("turn"), Some("stop")));
}
