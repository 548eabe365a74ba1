//! Models that misbehave in every way, seen from the client: the same text for every cut, one error for every fault, and
//! never an end that is none.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
};

use headgate_testkit::{
    Broken,
    answer::{Kind, Transcript},
    at_once,
    client::{Request, ask, stream},
    dialect::{self, Answer, Cut, Dialect, Escapes, Lane, Mark, Writing},
    hop::{self, Orchestrator, Said, Speaking, Then},
    upstream::{Framing, Script, Upstream},
    ws::Ws,
};
use serde_json::{Value, json};
use tokio::sync::Notify;

use crate::support::{Gateway, Setup};

/// The chain with everything in it that reads text.
fn whole_chain() -> Setup {
    Setup::chain(&["moderation: { deny: [deny.txt], mask: [email, credit_card] }", "policy_headers", "budget: { output_tokens: 2000 }"])
        .file("deny.txt", "bluebird\n")
}

/// How an answer comes to the gateway: the same is true whichever way it came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// As server-sent events, in this dialect.
    Events(Dialect),
    /// As frames of an orchestrator's WebSocket.
    Frames,
}

const WAYS: [Way; 3] = [Way::Events(Dialect::OpenAi), Way::Events(Dialect::Conversation), Way::Frames];

impl Way {
    fn dialect(self) -> Dialect {
        match self {
            Way::Events(dialect) => dialect,
            Way::Frames => Dialect::Conversation,
        }
    }

    fn setup(self) -> Setup {
        match self {
            Way::Events(Dialect::OpenAi) => whole_chain(),
            Way::Events(Dialect::Conversation) => whole_chain().orchestrated(),
            Way::Frames => whole_chain().orchestrated().upstream("hop: websocket"),
        }
    }

    /// How long an answer is on this way, in bytes.
    fn bytes(self, answer: &Answer) -> usize {
        match self {
            Way::Events(_) => answer.bytes().len(),
            // The ids of turns are all of one length.
            Way::Frames => hop::wire(answer.frames("00000000-0000-0000-0000-000000000000")).len(),
        }
    }

    /// A model that answers the first turn with the first of these, so much of it and so cut, and so on.
    async fn serve(self, answers: impl IntoIterator<Item = (Answer, usize, Cut, Then)>) -> Model {
        match self {
            Way::Events(_) => {
                let scripts = answers.into_iter().map(|(answer, bytes, cut, then)| {
                    let whole = answer.bytes();
                    let said = dialect::pieces(whole[..bytes.min(whole.len())].to_vec(), &cut);
                    let sent = Script::new().sse().send_all(said);
                    let sent = if bytes >= whole.len() { sent.end() } else { sent };
                    if then == Then::Reset { sent.reset() } else { sent.close() }
                });
                let scripts = Mutex::new(scripts.collect::<VecDeque<_>>());
                // What an orchestrator is told of turns that have ended is no turn.
                let told = Script::new().head(202, Framing::Length(0), &[]);
                let answering = Upstream::answering(move |request| match request.target.contains("/turns/") {
                    true => told.clone(),
                    false => scripts.lock().unwrap().pop_front().expect("something to say to every turn"),
                });
                Model::Http(answering.await)
            }
            Way::Frames => Model::Socket(Orchestrator::start().await.saying(answers.into_iter().map(|(answer, bytes, cut, then)| {
                let said = move |turn: &str| {
                    let whole = hop::wire(answer.frames(turn));
                    dialect::pieces(whole.slice(..bytes.min(whole.len())), &cut)
                };
                Said::pieces(said, then)
            }))),
        }
    }
}

enum Model {
    Http(Upstream),
    Socket(Speaking),
}

impl Model {
    fn url(&self) -> String {
        match self {
            Model::Http(upstream) => upstream.url(),
            Model::Socket(speaking) => speaking.url(),
        }
    }
}

async fn answered(gateway: &Gateway) -> Transcript {
    stream(gateway.addr, &Request::turn("hi"), Kind::Client).await.unwrap().rest().await.unwrap()
}

/// What the client has to see of it: the code of the event or of the problem.
async fn fault(gateway: &Gateway, request: &Request, kind: Kind) -> (u16, String, String) {
    match stream(gateway.addr, request, kind).await {
        Ok(events) => {
            let answer = events.rest().await.unwrap();
            (200, answer.error().expect("an error at the end").to_owned(), answer.text())
        }
        Err(_) => {
            let reply = ask(gateway.addr, request).await.unwrap();
            (reply.status, reply.problem().unwrap(), String::new())
        }
    }
}

/// Every lane, with hits cut over events, with a phrase that is allowed but nearly denied, in scripts of one to four bytes.
fn rich(dialect: Dialect) -> Answer {
    let said = Answer::new(dialect, "demo").open();
    let said = said.text_in(0, Lane::Reasoning, "think: mail eve@ex").text_in(0, Lane::Reasoning, "ample.com? ");
    let said = ["Grüße, bluebi", "n \u{1F600} 世界 write to bob@exa", "mple.com", ", card 4111 1111 11", "11 1111 ok\r\n", "\"q\" \\ end"]
        .iter()
        .fold(said, |said, text| said.text(text));
    let said = said.tool(0, 0, "call_1", "send_mail").text_in(0, Lane::ToolArguments(0), "{\"to\":\"al").text_in(
        0,
        Lane::ToolArguments(0),
        "ice@example.org\"}",
    );
    said.done("tool_calls", Some((3, 9)))
}

fn lanes(answer: &Transcript) -> [String; 3] {
    ["content", "reasoning", "tool_arguments"].map(|lane| answer.text_in(0, lane))
}

#[tokio::test]
async fn the_same_text_comes_out_for_every_cut_and_every_spelling() {
    let expected = ["Grüße, bluebin \u{1F600} 世界 write to •••, card ••• ok\r\n\"q\" \\ end", "think: mail •••? ", "{\"to\":\"•••\"}"];
    for way in WAYS {
        let plain = rich(way.dialect());
        let crlf =
            plain.clone().written(Writing { newline: "\r\n", escapes: Escapes::NotAscii, mark: Mark::Present, ..Writing::default() });
        let tight = plain.clone().written(Writing { newline: "\r", after_colon: "", escapes: Escapes::All, ..Writing::default() });
        let cuts = [Cut::Whole, Cut::Events, Cut::Bytes(1), Cut::Bytes(3), Cut::Inside]
            .into_iter()
            .chain((0..8).map(|seed| Cut::Random { seed, most: 40 }));
        let mut answers = Vec::new();
        for cut in cuts {
            for answer in [&plain, &crlf, &tight] {
                answers.push((answer.clone(), usize::MAX, cut.clone(), Then::Stay));
            }
        }
        let whats: Vec<String> = answers.iter().map(|(_, _, cut, _)| format!("{way:?} {cut:?}")).collect();
        let model = way.serve(answers).await;
        let gateway = way.setup().start(&model.url()).await;
        for what in whats {
            let answer = answered(&gateway).await;
            assert_eq!(lanes(&answer), expected, "{what}");
            assert_eq!((answer.outcome(), answer.finish()), ("masked", "tool_calls"), "{what}");
        }
    }
}

#[tokio::test]
async fn a_refusal_cuts_at_the_same_byte_for_every_cut() {
    for way in WAYS {
        let said = Answer::complete(way.dialect(), "demo", &["The name is b", "l", "ue\u{200b}bi", "RD, and more"]);
        let cuts: Vec<Cut> = [Cut::Whole, Cut::Events, Cut::Bytes(1), Cut::Bytes(2), Cut::Inside]
            .into_iter()
            .chain((0..20).map(|seed| Cut::Random { seed, most: 60 }))
            .collect();
        let model = way.serve(cuts.iter().map(|cut| (said.clone(), usize::MAX, cut.clone(), Then::Stay)).collect::<Vec<_>>()).await;
        let gateway = way.setup().start(&model.url()).await;
        for cut in cuts {
            let answer = answered(&gateway).await;
            let said = (answer.text(), answer.outcome().to_owned(), answer.finish().to_owned());
            assert_eq!(said, ("The name is ".to_owned(), "blocked".to_owned(), "content_filter".to_owned()), "{way:?} {cut:?}");
        }
    }
}

#[tokio::test]
async fn a_stream_reset_or_closed_at_every_byte_is_one_error_and_never_an_end() {
    for way in WAYS {
        let said = Answer::complete(way.dialect(), "demo", &["Hel", "lo é"]);
        let bytes = way.bytes(&said);
        let cuts: Vec<(usize, Then)> = (0..bytes).flat_map(|at| [(at, Then::Reset), (at, Then::End)]).collect();
        // A cut before the first byte is asked again; then the connection after it answers for it.
        let model = way.serve(cuts.iter().map(|&(at, then)| (said.clone(), at, Cut::Whole, then)).collect::<Vec<_>>()).await;
        let gateway = way.setup().upstream("retry: { attempts: 0 }").start(&model.url()).await;
        for (at, then) in cuts {
            let what = format!("{way:?}, {then:?} at {at}");
            match stream(gateway.addr, &Request::turn("hi"), Kind::Client).await {
                Ok(events) => {
                    let answer = events.rest().await.unwrap_or_else(|broken| panic!("{what}: {broken}"));
                    if answer.named("done").next().is_some() {
                        // Everything but the empty line of the very last event had come. A frame has no such line.
                        assert!(way != Way::Frames && at + 2 >= bytes, "{what}");
                        continue;
                    }
                    assert_eq!(answer.error(), Some("upstream_reset"), "{what}");
                    assert!("Hello é".starts_with(&answer.text()), "{what}");
                }
                Err(Broken::Answer(sentence)) => assert!(sentence.contains("502"), "{what}: {sentence}"),
                Err(broken) => panic!("{what}: {broken}"),
            }
        }
    }
}

#[tokio::test]
async fn a_cut_stream_has_no_done_for_openai_clients_and_no_answer_where_it_was_not_streamed() {
    let begun = Answer::openai("demo", &["Hello"]).events()[..2].concat();
    let upstream = Upstream::always(Script::new().read().sse().send(begun).reset()).await;
    let gateway = whole_chain().start(&upstream.url()).await;
    let chunks = stream(gateway.addr, &Request::completion("demo", "hi"), Kind::OpenAi).await.unwrap().rest().await.unwrap();
    assert_eq!((chunks.error(), chunks.named("[DONE]").count()), (Some("upstream_reset"), 0));
    let whole = Request::post("/v1/chat/completions", &json!({"model": "demo", "messages": [{"role": "user", "content": "hi"}]}));
    let reply = ask(gateway.addr, &whole).await.unwrap();
    assert_eq!((reply.status, reply.problem().unwrap().as_str()), (502, "upstream_reset"));
}

#[tokio::test]
async fn answers_that_are_no_stream_have_a_code_and_are_never_passed_on() {
    let secret = "internal words of the model server";
    let error = json!({"error": {"message": secret, "type": "server_error", "param": null, "code": "x"}}).to_string();
    let html = Script::reply(200, "text/html", format!("<html>{secret}</html>"));
    let cases = [
        ("a page", html, 502, "upstream_protocol_error"),
        ("204", Script::no_content(), 502, "upstream_protocol_error"),
        ("a redirect", Script::redirect("http://127.0.0.1:1/"), 502, "upstream_protocol_error"),
        (
            "a JSON that is no answer",
            Script::reply(200, "application/json", format!("{{\"a\":\"{secret}\"}}")),
            502,
            "upstream_protocol_error",
        ),
        ("500", Script::reply(500, "application/json", error.clone()), 502, "upstream_reset"),
        ("401", Script::reply(401, "application/json", error.clone()), 502, "upstream_refused"),
        ("404", Script::reply(404, "text/plain", secret), 502, "upstream_refused"),
        ("429", Script::reply(429, "application/json", error.clone()), 503, "overloaded"),
        ("503", Script::reply(503, "application/json", error.clone()), 503, "overloaded"),
        ("no HTTP", Script::new().read().raw("hello, this is SMTP\r\n\r\n").close(), 502, "upstream_protocol_error"),
        (
            "a compressed stream",
            Script::new()
                .read()
                .head(200, Framing::Chunked, &[("content-type", "text/event-stream"), ("content-encoding", "gzip")])
                .send("x")
                .end(),
            502,
            "upstream_protocol_error",
        ),
        (
            "two lengths",
            Script::new()
                .read()
                .raw("HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n")
                .close(),
            502,
            "upstream_protocol_error",
        ),
        ("an endless head", Script::new().read().raw("HTTP/1.1 200 OK\r\n").flood("x-a: 1\r\n"), 502, "upstream_protocol_error"),
        ("an error at once", Script::stream([format!("data: {error}\n\n")]), 502, "upstream_reset"),
        ("a stream without an event", Script::stream([": nothing\n\n"]), 502, "upstream_reset"),
        ("silence and a close", Script::new().read().close(), 502, "upstream_reset"),
        ("JSON that is none", Script::stream(["data: {\"choices\":\n\n"]), 502, "upstream_protocol_error"),
        (
            "a line without an end",
            Script::new().read().sse().flood("data: xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"),
            502,
            "upstream_event_too_large",
        ),
        (
            "an event without an end",
            Script::new().read().sse().flood("data: xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx\n"),
            502,
            "upstream_event_too_large",
        ),
    ];
    let mut found = Vec::new();
    for (what, script, status, code) in cases {
        let upstream = Upstream::always(script).await;
        let gateway = whole_chain().upstream("retry: { attempts: 0 }").start(&upstream.url()).await;
        let reply = ask(gateway.addr, &Request::turn("hi")).await.unwrap_or_else(|broken| panic!("{what}: {broken}"));
        let Ok(problem) = reply.problem() else {
            found.push(format!("{what}: {}", reply.text()));
            continue;
        };
        assert!(!reply.text().contains(secret), "{what}: {}", reply.text());
        if (reply.status, problem.as_str()) != (status, code) {
            found.push(format!("{what}: {} {problem}, expected {status} {code}", reply.status));
        }
        assert_eq!(gateway.process.app.turns().len(), 0, "{what}");
    }
    assert!(found.is_empty(), "{found:#?}");
}

#[tokio::test]
async fn faults_in_the_middle_keep_the_safe_prefix_and_end_with_their_code() {
    let begun = || Script::new().read().sse().send(Answer::openai("demo", &["Hello", " there"]).events()[..3].concat());
    let error = json!({"error": {"message": "quoting the prompt", "type": "server_error", "param": null, "code": "boom"}});
    let cases = [
        ("an error", begun().send(format!("data: {error}\n\n")).end(), "upstream_reset"),
        ("no JSON", begun().send("data: nonsense\n\n").end(), "upstream_protocol_error"),
        ("half a chunk", begun().half_chunk("data: {\"ch").close(), "upstream_reset"),
        ("a chunk size that is none", begun().raw("zz\r\n").close(), "upstream_protocol_error"),
        ("an end without its mark", begun().end(), "upstream_reset"),
        ("an event too large", begun().send(format!("data: {}\n\n", "x".repeat(200 << 10))).end(), "upstream_event_too_large"),
        ("a flood of one line", begun().flood("data: xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"), "upstream_event_too_large"),
    ];
    for (what, script, code) in cases {
        let upstream = Upstream::always(script).await;
        let gateway = whole_chain().start(&upstream.url()).await;
        let answer = answered(&gateway).await;
        assert_eq!((answer.error(), answer.text().as_str()), (Some(code), "Hello there"), "{what}");
        assert!(!answer.end().raw.contains("quoting"), "{what}");
        assert_eq!(gateway.process.app.turns().len(), 0, "{what}");
    }
}

#[tokio::test]
async fn silence_ends_a_turn_at_the_limit_before_and_after_the_first_byte() {
    let begun = Answer::openai("demo", &["Hello"]).events()[..2].concat();
    let upstream = Upstream::always(Script::new().read().stall()).await;
    let gateway = whole_chain().upstream("timeouts: { first_byte: 1s }").upstream("retry: { attempts: 0 }").start(&upstream.url()).await;
    assert_eq!(fault(&gateway, &Request::turn("hi"), Kind::Client).await.1, "upstream_timeout_first_byte");
    at_once(upstream.idle(), "the silent model to be left").await;
    let upstream = Upstream::always(Script::new().read().sse().send(begun).stall()).await;
    let gateway = whole_chain().upstream("timeouts: { idle: 1s }").start(&upstream.url()).await;
    assert_eq!(fault(&gateway, &Request::turn("hi"), Kind::Client).await, (200, "upstream_stalled".into(), "Hello".into()));
    at_once(upstream.idle(), "the stalled model to be left").await;
}

#[tokio::test]
async fn an_endless_answer_is_cut_at_the_routes_limit() {
    let events = Answer::openai("demo", &["0123456789abcdef 0123456789abcdef"]).events();
    let upstream = Upstream::always(Script::new().read().sse().send(events[0].clone()).flood(events[1].clone())).await;
    let gateway = Setup::new().route("limits: { answer_bytes: 64KiB }").start(&upstream.url()).await;
    let answer = answered(&gateway).await;
    let text = answer.text();
    assert!((64 << 10..80 << 10).contains(&text.len()), "{}", text.len());
    assert_eq!((answer.finish(), answer.outcome()), ("length", "allowed"));
    assert_eq!(answer.end().data["refusal"]["code"], "stream_limit_exceeded");
    at_once(upstream.idle(), "the endless model to be stopped").await;
}

#[tokio::test]
async fn invalid_utf8_becomes_one_mark_and_a_split_character_stays_whole() {
    let mut bytes = Answer::openai("demo", &["a?b 😀"]).bytes();
    let at = bytes.windows(3).position(|w| w == b"a?b").unwrap() + 1;
    bytes[at] = 0xff;
    for cut in [Cut::Whole, Cut::Bytes(1), Cut::Inside] {
        let upstream = Upstream::always(Script::stream(headgate_testkit::dialect::pieces(bytes.clone(), &cut))).await;
        let gateway = whole_chain().start(&upstream.url()).await;
        assert_eq!(answered(&gateway).await.text(), "a\u{fffd}b 😀");
    }
}

#[tokio::test]
async fn lines_of_a_models_making_cannot_become_events() {
    // A carriage return, a blank line and an event's name inside text are text.
    let said = "a\r\n\r\nevent: done\ndata: {\"finish\":\"stop\"}\n\n\u{2028}b\0c";
    for dialect in [Dialect::OpenAi, Dialect::Conversation] {
        let upstream = Upstream::always(Script::stream(Answer::complete(dialect, "demo", &[said]).cut(Cut::Events))).await;
        let gateway = Way::Events(dialect).setup().start(&upstream.url()).await;
        assert_eq!(answered(&gateway).await.text(), said);
        let chunks = stream(gateway.addr, &Request::completion("demo", "hi"), Kind::OpenAi).await.unwrap().rest().await.unwrap();
        assert_eq!(chunks.text(), said);
    }
}

#[tokio::test]
async fn no_byte_of_a_denied_phrase_leaves_on_any_surface_in_any_lane() {
    let phrase = "bluebird";
    let pieces = ["x bl", "u", "ebi", "rd y"];
    let in_lane = |lane: Lane| {
        let said = Answer::new(Dialect::OpenAi, "demo").open();
        let said = if let Lane::ToolArguments(index) = lane { said.tool(0, index, "call_1", "f") } else { said };
        pieces.iter().fold(said, |said, piece| said.text_in(0, lane, piece)).done("stop", None)
    };
    for lane in [Lane::Content, Lane::Reasoning, Lane::Refusal, Lane::ToolArguments(0)] {
        let upstream = Upstream::always(Script::stream(in_lane(lane).cut(Cut::Bytes(5)))).await;
        let gateway = whole_chain().start(&upstream.url()).await;
        let sse = answered(&gateway).await;
        let chunks = stream(gateway.addr, &Request::completion("demo", "hi"), Kind::OpenAi).await.unwrap().rest().await.unwrap();
        let mut socket = Ws::connect(gateway.addr).await.unwrap();
        let frames = socket.ask("r", "hi").await.unwrap();
        let whole = Request::post("/v1/chat/completions", &json!({"model": "demo", "messages": [{"role": "user", "content": "hi"}]}));
        let reply = ask(gateway.addr, &whole).await.unwrap();
        for (surface, answer) in [("SSE", &sse), ("chunks", &chunks), ("WebSocket", &frames)] {
            let all: String = answer.events.iter().map(|event| event.raw.as_str()).collect();
            for length in 2..=phrase.len() {
                assert!(!texts(answer).contains(&phrase[..length]), "{surface} {lane:?} says {}", &phrase[..length]);
            }
            assert!(!all.contains(phrase) && texts(answer).contains("x "), "{surface} {lane:?}: {all}");
        }
        assert_eq!((sse.outcome(), frames.outcome(), chunks.outcome()), ("blocked", "blocked", "blocked"), "{lane:?}");
        assert_eq!(chunks.finish(), "content_filter");
        let body = reply.text();
        assert!(!body.contains("blu"), "{body}");
        assert_eq!(reply.json()["choices"][0]["finish_reason"], "content_filter", "{body}");
    }
}

/// All text of all lanes, in order.
fn texts(answer: &Transcript) -> String {
    ["content", "reasoning", "refusal", "tool_arguments"].iter().map(|lane| answer.text_in(0, lane)).collect()
}

#[tokio::test]
async fn two_choices_are_masked_each_for_itself() {
    let said = Answer::new(Dialect::OpenAi, "demo").open();
    let said = said
        .text_in(0, Lane::Content, "a bob@exa")
        .text_in(1, Lane::Content, "b eve@exam")
        .text_in(0, Lane::Content, "mple.com.")
        .text_in(1, Lane::Content, "ple.org!");
    let said = said.finish(1, "stop").done("stop", None);
    let upstream = Upstream::always(Script::stream(said.cut(Cut::Events))).await;
    let gateway = whole_chain().start(&upstream.url()).await;
    let answer = answered(&gateway).await;
    assert_eq!((answer.text_in(0, "content"), answer.text_in(1, "content")), ("a •••.".into(), "b •••!".into()));
    let chunks = stream(gateway.addr, &Request::completion("demo", "hi"), Kind::OpenAi).await.unwrap().rest().await.unwrap();
    assert_eq!((chunks.text_in(0, "content"), chunks.text_in(1, "content")), ("a •••.".into(), "b •••!".into()));
}

#[tokio::test]
async fn a_lane_leaves_in_the_order_it_came_and_text_that_is_held_is_overtaken_by_other_lanes() {
    let go = Arc::new(Notify::new());
    let said = Answer::new(Dialect::OpenAi, "demo").open();
    let said = said
        .text("one blue")
        .text_in(0, Lane::Reasoning, "two, ")
        .text_in(0, Lane::Reasoning, "three, ")
        .text("bell four")
        .done("stop", None);
    let events = said.events();
    let script = Script::new().read().sse().send(events[..4].concat()).wait(&go).send(events[4..].concat()).end().close();
    let upstream = Upstream::always(script).await;
    let gateway = whole_chain().start(&upstream.url()).await;
    let mut open = stream(gateway.addr, &Request::turn("hi"), Kind::Client).await.unwrap();
    // `blue` may still become a denied phrase; nobody else waits for that (docs/decisions/0031-held-text-is-overtaken.md).
    while !open.so_far().text_in(0, "reasoning").contains("three,") {
        open.expect().await;
    }
    assert_eq!(open.so_far().text(), "one ");
    go.notify_one();
    let answer = open.rest().await.unwrap();
    assert_eq!((answer.text().as_str(), answer.text_in(0, "reasoning").as_str()), ("one bluebell four", "two, three, "));
}

#[tokio::test]
async fn shadow_changes_nothing_but_the_record() {
    let said = Answer::openai("demo", &["mail bob@exam", "ple.com about blue", "bird now"]);
    let upstream = Upstream::always(Script::stream(said.cut(Cut::Events))).await;
    let shadow = Setup::chain(&["moderation: { deny: [deny.txt], mask: [email] }\n        mode: shadow"])
        .file("deny.txt", "bluebird\n")
        .start(&upstream.url())
        .await;
    let plain = Setup::new().start(&upstream.url()).await;
    let (shadowed, bare) = (answered(&shadow).await, answered(&plain).await);
    let told = |answer: &Transcript| -> Vec<Value> { answer.named("text").map(|event| event.data.clone()).collect() };
    assert_eq!(told(&shadowed), told(&bare));
    assert_eq!((shadowed.text().as_str(), shadowed.finish()), ("mail bob@example.com about bluebird now", "stop"));
    let metrics = ask(shadow.admin, &Request::get("/metrics")).await.unwrap().text();
    assert!(metrics.lines().any(|line| line.starts_with("headgate_findings_total") && !line.ends_with(" 0")), "{metrics}");
}
