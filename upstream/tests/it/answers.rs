//! What a good upstream says arrives, however it is framed and cut.

use headgate_contracts::{Batch, Dialect, Finish, Usage, What};
use headgate_testkit::{
    dialect::{Answer, Cut},
    upstream::{Framing, Script, Upstream},
};

use crate::{openai, orchestrator, prompt, turn};

const WORDS: &[&str] = &["Grüße", " an", " 🦀", " \"alle\"\n"];

#[tokio::test]
async fn an_answer_arrives_whole_for_every_framing_and_cutting() {
    let said = WORDS.concat();
    for (answer, protocol) in [(Answer::openai("m", WORDS), true), (Answer::conversation("m", WORDS), false)] {
        let length = answer.bytes().len();
        let cuts = [Cut::Whole, Cut::Events, Cut::Bytes(1), Cut::Bytes(7), Cut::Inside, Cut::Random { seed: 7, most: 40 }];
        for framing in [Framing::Chunked, Framing::Length(length), Framing::UntilClose] {
            let scripts = cuts.iter().map(|cut| Script::new().read().sse_framed(framing).send_all(answer.cut(cut.clone())).end());
            let model = Upstream::each(scripts).await;
            let upstream = if protocol { openai(&model) } else { orchestrator(&model) };
            for cut in &cuts {
                let (heard, end) = turn(&upstream).await;
                assert_eq!(heard, said, "{framing:?} {cut:?}");
                assert_eq!(end.unwrap(), Finish::Stop, "{framing:?} {cut:?}");
            }
        }
    }
}

#[tokio::test]
async fn what_one_read_brings_is_one_batch_in_the_dialect_it_came_in() {
    let model = Upstream::always(Script::stream([Answer::openai("m", &["a", "b", "c"]).bytes()])).await;
    let upstream = openai(&model);
    let mut answer = upstream.open(&prompt()).await.unwrap();
    let mut batch = Batch::new();
    let mut batches = 0;
    let mut usage = None;
    while answer.next(&mut batch).await.unwrap() {
        batches += 1;
        assert_eq!(batch.dialect, Dialect::OpenAi);
        usage = batch.events().iter().find_map(|event| if let What::Usage(usage) = event.what { Some(usage) } else { usage });
    }
    assert!(batches <= 2, "{batches} batches for one write");
    assert_eq!(usage, Some(Usage { input_tokens: 1, output_tokens: 3 }));
    assert_eq!(answer.head.model, "m");
    // It has ended, and stays so.
    assert!(!answer.next(&mut batch).await.unwrap());
    assert!(batch.is_empty());
}

#[tokio::test]
async fn a_server_that_does_not_stream_is_understood() {
    let body = r#"{"id":"x","object":"chat.completion","created":1,"model":"m","choices":[{"index":0,"message":{"role":"assistant",
        "content":"whole"},"finish_reason":"length"}],"usage":{"prompt_tokens":1,"completion_tokens":2,"total_tokens":3}}"#;
    let model = Upstream::always(Script::reply(200, "application/json; charset=utf-8", body)).await;
    let (heard, end) = turn(&openai(&model)).await;
    assert_eq!((heard.as_str(), end.unwrap()), ("whole", Finish::Length));
}

#[tokio::test]
async fn dropping_the_wait_for_events_loses_none() {
    let model = Upstream::always(Script::new().read().sse().send_all(Answer::openai("m", WORDS).cut(Cut::Bytes(5))).end()).await;
    let upstream = openai(&model);
    let mut answer = upstream.open(&prompt()).await.unwrap();
    let mut batch = Batch::new();
    let mut heard = String::new();
    loop {
        // Polled once and dropped, again and again.
        let next = tokio::select! {
            biased;
            next = answer.next(&mut batch) => next,
            () = tokio::task::yield_now() => continue,
        };
        if !next.unwrap() {
            break;
        }
        heard.push_str(&crate::content(&batch));
    }
    assert_eq!(heard, WORDS.concat());
}

#[tokio::test]
async fn an_informational_response_is_passed_over() {
    let stream = Answer::openai("m", WORDS).bytes();
    let script = Script::new().read().raw("HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n").sse().send(stream).end();
    let (heard, end) = turn(&openai(&Upstream::always(script).await)).await;
    assert_eq!((heard, end.is_ok()), (WORDS.concat(), true));
}

#[tokio::test]
async fn an_unread_answer_stops_the_upstream_after_what_the_sockets_hold() {
    let event = "data: {\"id\":\"x\",\"object\":\"chat.completion.chunk\",\"created\":1,\"model\":\"m\",\"choices\":[{\"index\":0,\
                 \"delta\":{\"content\":\"word \"},\"finish_reason\":null}]}\n\n";
    let model = Upstream::always_unbuffered(Script::new().read().sse().flood(event.repeat(100))).await;
    let mut answer = openai(&model).open(&prompt()).await.unwrap();
    let mut batch = Batch::new();
    assert!(answer.next(&mut batch).await.unwrap());
    let held = model.blocked().await;
    // The kernel's receive buffer may grow to megabytes; ours takes no byte more than it was asked for.
    assert!(held < 16 << 20, "{held} bytes were taken from a flood nobody reads");
    assert!(batch.bytes() <= 64 << 10);
    let before = model.written();
    let mut more = 0;
    for _ in 0..4 * (held / (16 << 10)) {
        assert!(answer.next(&mut batch).await.unwrap());
        assert!(batch.bytes() <= 64 << 10, "one read is one batch");
        more += batch.events().len();
    }
    assert!(more > 0 && model.written() > before, "reading on lets the upstream write on");
}
