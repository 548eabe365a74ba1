//! Whole streams: recorded ones against what they say, random ones against a slow reader that follows the standard word by word.

use std::{fmt::Write as _, fs, path::Path};

use headgate_contracts::{
    Batch, Channel, Dialect, Head, Lane, Question, TurnId, What,
    wire::{
        Step, chat,
        openai::{self, DONE, Envelope},
        sse::{self, Decoder, Limits},
    },
};
use proptest::prelude::*;

/// What a stream says, one line per event, and how it ends. The same for every way of cutting it.
fn read<'a>(dialect: Dialect, pieces: impl IntoIterator<Item = &'a [u8]>) -> String {
    let (mut decoder, mut head, mut batch, mut said) = (Decoder::new(Limits::default()), Head::default(), Batch::new(), String::new());
    for piece in pieces {
        decoder.push(piece);
        while let Some(frame) = decoder.next().expect("within the limits") {
            batch.clear();
            let step = match dialect {
                Dialect::OpenAi => openai::decode(frame.data, &mut head, &mut batch),
                Dialect::Headgate => chat::decode(frame.event, frame.data, &mut head, &mut batch),
            };
            for event in batch.events() {
                let raw = if event.raw.is_some() { " raw" } else { "" };
                let _ = match event.what {
                    What::Text { lane: Lane { choice, channel }, text } => {
                        let channel = match channel {
                            Channel::Content => "content".to_owned(),
                            Channel::Reasoning => "reasoning".to_owned(),
                            Channel::Refusal => "refusal".to_owned(),
                            Channel::ToolArguments(index) => format!("arguments {index}"),
                            Channel::Question(_) => panic!("a question is no text event"),
                        };
                        writeln!(said, "{choice} {channel} {:?}{raw}", batch.text(text))
                    }
                    What::Tool { choice, index, id, name } => {
                        writeln!(said, "{choice} tool {index} {} {}{raw}", batch.text(id), batch.text(name))
                    }
                    What::Confirm { .. } => {
                        let Question { id, tool, prompt } = batch.question(event).expect("a question");
                        writeln!(said, "confirm {id} {tool} {prompt:?}{raw}")
                    }
                    What::Finish { choice, finish } => writeln!(said, "{choice} finish {}{raw}", finish.as_str()),
                    What::Usage(usage) => writeln!(said, "usage {} {}{raw}", usage.input_tokens, usage.output_tokens),
                    What::Note => writeln!(said, "note{raw}"),
                };
            }
            let _ = match step {
                Ok(Step::More | Step::Asked) => Ok(()),
                Ok(Step::Done) => writeln!(said, "done"),
                Ok(Step::Failed(fault)) => writeln!(said, "failed {}", fault.chain()),
                Err(malformed) => writeln!(said, "malformed {malformed}"),
            };
        }
    }
    let _ = writeln!(said, "id {:?} model {:?}{}", head.id, head.model, if decoder.unfinished() { " cut" } else { "" });
    said
}

#[test]
fn recorded_streams_say_what_they_said_however_they_are_cut() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("recordings");
    let mut read_any = false;
    for entry in fs::read_dir(folder).expect("the recordings") {
        let path = entry.expect("a file").path();
        let name = path.file_name().and_then(|name| name.to_str()).expect("a readable name").to_owned();
        let dialect = match name.strip_suffix(".sse") {
            Some(name) if name.ends_with(".openai") => Dialect::OpenAi,
            Some(name) if name.ends_with(".headgate") => Dialect::Headgate,
            Some(_) => panic!("{name}: a recording is called <name>.openai.sse or <name>.headgate.sse"),
            None => continue,
        };
        read_any = true;
        let stream = fs::read(&path).expect("a recording");
        let expected = fs::read_to_string(path.with_extension("events")).unwrap_or_default();
        let whole = read(dialect, [&stream[..]]);
        assert_eq!(whole, expected, "{name}: its .events file should say\n{whole}");
        for size in [1, 2, 3, 7, 64, 1000] {
            assert_eq!(read(dialect, stream.chunks(size)), expected, "{name} in pieces of {size}");
        }
        for at in 0..stream.len() {
            assert_eq!(read(dialect, [&stream[..at], &stream[at..]]), expected, "{name} cut at {at}");
        }
    }
    assert!(read_any);
}

#[test]
fn a_recording_that_breaks_off_is_never_done() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("recordings");
    for (name, dialect) in [("llama-cpp.openai.sse", Dialect::OpenAi), ("orchestrator.headgate.sse", Dialect::Headgate)] {
        let stream = fs::read(folder.join(name)).expect("a recording");
        for at in 0..stream.len() {
            let said = read(dialect, [&stream[..at]]);
            assert!(!said.lines().any(|line| line == "done"), "{name} broken off at {at}");
        }
    }
}

/// Frames as `event|data|id`, read the way the standard puts it: all of it decoded, then split into lines, then the fields.
fn by_the_standard(stream: &[u8]) -> Vec<String> {
    let text = String::from_utf8_lossy(stream);
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text).replace("\r\n", "\n").replace('\r', "\n");
    let (mut frames, mut data, mut event, mut id) = (Vec::new(), None::<String>, String::new(), None::<String>);
    // What comes after the last line end is no line.
    for line in text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n')) {
        let (field, value) = line.split_once(':').map_or((line, ""), |(field, value)| (field, value.strip_prefix(' ').unwrap_or(value)));
        match field {
            _ if line.is_empty() => {
                if let Some(data) = data.take() {
                    let event = if event.is_empty() { "message" } else { &event };
                    frames.push(format!("{event}|{data}|{}", id.as_deref().unwrap_or("-")));
                }
                (event, id) = (String::new(), None);
            }
            "data" => match &mut data {
                Some(data) => {
                    data.push('\n');
                    data.push_str(value);
                }
                None => data = Some(value.to_owned()),
            },
            "event" => event = value.to_owned(),
            "id" if !value.contains('\0') => id = Some(value.to_owned()),
            _ => {}
        }
    }
    frames
}

fn frames<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Vec<String> {
    let (mut decoder, mut frames) = (Decoder::new(Limits::default()), Vec::new());
    for piece in pieces {
        decoder.push(piece);
        while let Some(frame) = decoder.next().expect("within the limits") {
            frames.push(format!("{}|{}|{}", frame.event, frame.data, frame.id.unwrap_or("-")));
        }
    }
    frames
}

/// Cuts a stream at these places, each a share of its length.
fn cut<'a>(stream: &'a [u8], cuts: &[f64]) -> Vec<&'a [u8]> {
    let mut places: Vec<usize> = cuts.iter().map(|cut| (cut * stream.len() as f64) as usize).collect();
    places.sort_unstable();
    let (mut pieces, mut from) = (Vec::new(), 0);
    for place in places {
        pieces.push(&stream[from..place]);
        from = place;
    }
    pieces.push(&stream[from..]);
    pieces
}

fn streams() -> impl Strategy<Value = Vec<u8>> {
    let piece = proptest::sample::select(vec![
        &b"data"[..],
        b"data:",
        b"data: ",
        b"event: ",
        b"event",
        b"id: ",
        b"id:7",
        b"retry: 5",
        b":",
        b" ",
        b"\n",
        b"\n",
        b"\n\n",
        b"\r",
        b"\r\n",
        b"\r\n\r\n",
        b"x",
        b"{\"text\":\"a\"}",
        b"\xef\xbb\xbf",
        b"\xe2\x82\xac",
        b"\xe2\x82",
        b"\xac",
        b"\xf0\x9f",
        b"\x98\x80",
        b"\xff",
        b"\0",
        b"\xed\xa0\x80",
    ]);
    proptest::collection::vec(piece, 0..40).prop_map(|pieces| pieces.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1024))]

    #[test]
    fn frames_are_what_the_standard_says_however_they_are_cut(stream in streams(), cuts in proptest::collection::vec(0.0..1.0f64, 0..6)) {
        let expected = by_the_standard(&stream);
        prop_assert_eq!(&frames(cut(&stream, &cuts)), &expected);
        prop_assert_eq!(&frames(stream.chunks(1)), &expected);
    }

    #[test]
    fn whatever_is_written_as_data_comes_back_as_one_frame(data in "(\\PC|[\r\n:\0]){0,60}", event in proptest::option::of("[a-z]{1,8}"), seq: u64) {
        let (turn, mut out) = (TurnId::fresh(), Vec::new());
        sse::encode(&mut out, Some((&turn, seq)), event.as_deref(), data.as_bytes());
        let lines = data.replace("\r\n", "\n").replace('\r', "\n");
        prop_assert_eq!(frames([&out[..]]), [format!("{}|{lines}|{turn}:{seq}", event.as_deref().unwrap_or("message"))]);
    }

    /// Law 1: the text of every lane is the same for every way of cutting the stream into reads, and the same as was written.
    #[test]
    fn text_survives_every_cut(pieces in proptest::collection::vec((0..3u16, "(\\PC|[\r\n\t\"\\\\]){1,12}"), 1..12), cuts in proptest::collection::vec(0.0..1.0f64, 0..8)) {
        let (mut batch, mut openai, mut headgate) = (Batch::new(), Vec::new(), Vec::new());
        let envelope = Envelope::new("c1", "m", 1);
        let mut expected = [String::new(), String::new(), String::new()];
        for (choice, words) in &pieces {
            batch.push_text(Lane { choice: *choice, channel: Channel::Content }, words);
            expected[usize::from(*choice)].push_str(words);
        }
        let mut payload = Vec::new();
        for event in batch.events() {
            payload.clear();
            envelope.event(&mut payload, &batch, event);
            sse::encode(&mut openai, None, None, &payload);
            payload.clear();
            let name = chat::encode(&batch, event, &mut payload);
            sse::encode(&mut headgate, None, name, &payload);
        }
        sse::encode(&mut openai, None, None, DONE);
        for (stream, dialect) in [(&openai, Dialect::OpenAi), (&headgate, Dialect::Headgate)] {
            let (mut decoder, mut head, mut read) = (Decoder::new(Limits::default()), Head::default(), Batch::new());
            for piece in cut(stream, &cuts) {
                decoder.push(piece);
                while let Some(frame) = decoder.next().expect("within the limits") {
                    let step = match dialect {
                        Dialect::OpenAi => openai::decode(frame.data, &mut head, &mut read),
                        Dialect::Headgate => chat::decode(frame.event, frame.data, &mut head, &mut read),
                    };
                    prop_assert!(matches!(step, Ok(Step::More | Step::Done)));
                }
            }
            prop_assert!(!decoder.unfinished());
            let mut lanes = [String::new(), String::new(), String::new()];
            for event in read.events() {
                let What::Text { lane, text } = event.what else { panic!("only text was written") };
                lanes[usize::from(lane.choice)].push_str(read.text(text));
                prop_assert!(event.raw.is_some());
            }
            prop_assert_eq!(&lanes, &expected);
        }
    }

    /// No bytes at all make a decoder panic, or give text that was not there.
    #[test]
    fn hostile_payloads_are_read_or_refused(data in "(\\PC|[\\x00-\\x1f]|[{}\\[\\]:,\"\\\\u0-9]|\"choices\"|\"delta\"|\"text\"|null){0,80}", name in "open|text|tool|usage|done|error") {
        let mut batch = Batch::new();
        let _ = openai::decode(&data, &mut Head::default(), &mut batch);
        let _ = openai::decode_answer(data.as_bytes(), &mut Head::default(), &mut batch);
        let _ = chat::decode(&name, &data, &mut Head::default(), &mut batch);
        let _ = chat::TurnRequest::parse(data.as_bytes());
        let _ = openai::Request::parse(data.as_bytes());
    }
}
