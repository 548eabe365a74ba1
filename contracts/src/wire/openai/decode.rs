//! Chunks and answers of models: one payload to events.
//!
//! The reader notes whether everything it saw was known and free of text: only then, and only when the payload says exactly one thing, does
//! the event keep the payload's raw form.

use serde::de::{Error as _, IgnoredAny, MapAccess, SeqAccess};

use super::{known::decode_known, request::Form};
use crate::wire::members::{is_call_id, is_tool_name};
use crate::wire::walk::{Blank, Entries, Figures, Kept, List, Number, Object, Shape, is_label, is_one_line, walk};
use crate::wire::{MAX_INDEX, Malformed, Step, problem};
use crate::{Batch, Channel, Dialect, Event, Finish, Head, Lane, Span, Usage, What};

/// Reads one payload of a streamed answer into events.
///
/// `data`: one event's data. `head`: its empty members are filled from the payload. `batch`: events are appended, in
/// OpenAI's dialect; nothing is, where the payload is malformed.
///
/// An event keeps the payload as [`Event::raw`] where that says this and nothing else: every member known and free of other
/// text, no name twice, no escape that stands for half a character, no line end. Otherwise it is taken apart.
pub fn decode(data: &str, head: &mut Head, batch: &mut Batch) -> Result<Step, Malformed> {
    if data.trim_ascii() == "[DONE]" {
        return Ok(Step::Done);
    }
    batch.dialect = Dialect::OpenAi;
    if decode_known(data, head, batch) {
        return Ok(Step::More);
    }
    decode_any(data, Form::Streamed, head, batch)
}

/// Reads a whole answer, which was not streamed, into events without raw form.
pub fn decode_answer(body: &[u8], head: &mut Head, batch: &mut Batch) -> Result<Step, Malformed> {
    let text = std::str::from_utf8(body).map_err(|error| Malformed { what: "not UTF-8", at: error.valid_up_to(), bytes: body.len() })?;
    match decode_any(text, Form::Whole, head, batch)? {
        Step::More | Step::Asked => Ok(Step::Done),
        end @ (Step::Done | Step::Failed(_)) => Ok(end),
    }
}

fn decode_any(data: &str, form: Form, head: &mut Head, batch: &mut Batch) -> Result<Step, Malformed> {
    batch.dialect = Dialect::OpenAi;
    let mark = batch.mark();
    let mut reading = Reading {
        head,
        batch,
        form,
        plain: form == Form::Streamed && is_one_line(data),
        choices: false,
        usage: None,
        failed: false,
        wrong: None,
    };
    let read = walk(data, Chunk(&mut reading)).map(drop);
    let Reading { plain, choices, usage, failed, wrong, .. } = reading;
    let read = match (read, wrong) {
        // Any JSON at all would else be an answer that says nothing, and says it well.
        (Ok(()), None) if form == Form::Whole && !choices && !failed => Err(Malformed::new("an answer without choices", data)),
        (Ok(()), None) => Ok(()),
        (_, Some(what)) => Err(Malformed::new(what, data)),
        (Err(malformed), None) => Err(malformed),
    };
    if let Err(malformed) = read {
        batch.rewind(mark);
        return Err(malformed);
    }
    if failed {
        return Ok(Step::Failed(problem::parse_in_stream(data)));
    }
    if let Some(usage) = usage {
        batch.push(Event { what: What::Usage(usage), raw: None });
    }
    if plain && choices {
        batch.keep_raw_since(mark, data);
    }
    Ok(Step::More)
}

/// What is known while one payload is read.
struct Reading<'a> {
    head: &'a mut Head,
    batch: &'a mut Batch,
    form: Form,
    /// Whether all that was seen is known, said once, and free of text but for the lanes.
    plain: bool,
    /// Whether there was a list of choices.
    choices: bool,
    usage: Option<Usage>,
    /// Whether there was an error.
    failed: bool,
    /// What is wrong, where the JSON itself is not.
    wrong: Option<&'static str>,
}

impl Reading<'_> {
    /// Reads a short text; gives what `read` makes of it, or nothing where there is none.
    fn word<'de, A: MapAccess<'de>, T>(
        &mut self,
        map: &mut A,
        read: impl FnOnce(&mut Head, &str) -> (T, Plain),
    ) -> Result<Option<T>, A::Error> {
        let Some(kept) = map.next_value_seed(Kept(self.batch))? else { return Ok(None) };
        let (value, plain) = read(self.head, self.batch.text(kept.span));
        self.batch.forget_text(kept.span);
        self.plain &= kept.exact && plain == Plain::Yes;
        Ok(Some(value))
    }

    /// Reads a piece of one lane.
    fn piece<'de, A: MapAccess<'de>>(&mut self, map: &mut A, channel: Channel) -> Result<(), A::Error> {
        if let Some(kept) = map.next_value_seed(Kept(self.batch))? {
            self.plain &= kept.exact;
            self.push_text(channel, kept.span);
        }
        Ok(())
    }

    fn push_text(&mut self, channel: Channel, text: Span) {
        if !text.is_empty() {
            // The choice is filled in when all of it has been read: its index may come last.
            self.batch.push(Event { what: What::Text { lane: Lane { choice: 0, channel }, text }, raw: None });
        }
    }

    fn index<E: serde::de::Error>(&mut self, index: Option<u64>) -> Result<u16, E> {
        match index.map(u16::try_from) {
            None => Ok(0),
            Some(Ok(index)) if index <= MAX_INDEX => Ok(index),
            Some(_) => {
                self.wrong = Some("an index is over the limit");
                Err(E::custom("index"))
            }
        }
    }
}

/// Whether a word is one that a client may be shown as it came.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Plain {
    Yes,
    No,
}

impl From<bool> for Plain {
    fn from(yes: bool) -> Plain {
        if yes { Plain::Yes } else { Plain::No }
    }
}

/// A short name, as servers call their builds and tiers.
pub(super) fn is_name(text: &str) -> bool {
    text.len() <= 64 && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.' | b':'))
}

/// Fills an empty member of the head; afterwards only the same words, or none, are plain.
fn fill(member: &mut String, text: &str) -> ((), Plain) {
    if member.is_empty() && is_label(text) {
        member.push_str(text);
    }
    ((), (text.is_empty() || member == text).into())
}

/// llama.cpp's `timings`.
const TIMINGS: &[&str] = &[
    "cache_n",
    "prompt_n",
    "prompt_ms",
    "prompt_per_token_ms",
    "prompt_per_second",
    "predicted_n",
    "predicted_ms",
    "predicted_per_token_ms",
    "predicted_per_second",
    "draft_n",
    "draft_n_accepted",
];
/// OpenAI's `prompt_tokens_details` and `completion_tokens_details`.
const TOKEN_DETAILS: &[&str] = &[
    "cached_tokens",
    "audio_tokens",
    "text_tokens",
    "image_tokens",
    "reasoning_tokens",
    "accepted_prediction_tokens",
    "rejected_prediction_tokens",
];

struct Chunk<'r, 'a>(&'r mut Reading<'a>);

impl<'de> Shape<'de> for Chunk<'_, '_> {
    const NAMES: &'static [&'static str] = &[
        "id",
        "object",
        "created",
        "model",
        "choices",
        "usage",
        "system_fingerprint",
        "service_tier",
        "error",
        "timings",
        "prompt_token_ids",
        "kv_transfer_params",
        "prompt_logprobs",
    ];
    fn plain(&mut self) -> &mut bool {
        &mut self.0.plain
    }
    fn member<A: MapAccess<'de>>(&mut self, name: &'static str, map: &mut A) -> Result<(), A::Error> {
        let reading = &mut *self.0;
        match name {
            "id" => reading.word(map, |head, text| fill(&mut head.id, text)).map(drop),
            "model" => reading.word(map, |head, text| fill(&mut head.model, text)).map(drop),
            "object" => reading.word(map, |_, text| ((), (text == "chat.completion.chunk").into())).map(drop),
            "system_fingerprint" | "service_tier" => reading.word(map, |_, text| ((), is_name(text).into())).map(drop),
            "created" => {
                let created = map.next_value_seed(Number)?.unwrap_or(0);
                if reading.head.created == 0 {
                    reading.head.created = created;
                }
                Ok(())
            }
            "choices" => {
                reading.choices = true;
                map.next_value_seed(List(&mut Choices(reading)))
            }
            "usage" => {
                let counts = map.next_value_seed(Object(Counts { plain: &mut reading.plain, input: None, output: None }))?;
                if let Counts { input: Some(input_tokens), output, .. } = counts {
                    reading.usage = Some(Usage { input_tokens, output_tokens: output.unwrap_or(0) });
                }
                Ok(())
            }
            "error" => {
                reading.failed |= map.next_value::<Option<IgnoredAny>>()?.is_some();
                Ok(())
            }
            "timings" => map.next_value_seed(Figures(&mut reading.plain, TIMINGS)),
            _ => {
                reading.plain &= map.next_value_seed(Blank)?;
                Ok(())
            }
        }
    }
}

struct Counts<'b> {
    plain: &'b mut bool,
    input: Option<u64>,
    output: Option<u64>,
}

impl<'de> Shape<'de> for Counts<'_> {
    const NAMES: &'static [&'static str] =
        &["prompt_tokens", "completion_tokens", "total_tokens", "prompt_tokens_details", "completion_tokens_details"];
    fn plain(&mut self) -> &mut bool {
        self.plain
    }
    fn member<A: MapAccess<'de>>(&mut self, name: &'static str, map: &mut A) -> Result<(), A::Error> {
        match name {
            "prompt_tokens" => self.input = map.next_value_seed(Number)?,
            "completion_tokens" => self.output = map.next_value_seed(Number)?,
            "total_tokens" => drop(map.next_value_seed(Number)?),
            _ => map.next_value_seed(Figures(self.plain, TOKEN_DETAILS))?,
        }
        Ok(())
    }
}

struct Choices<'r, 'a>(&'r mut Reading<'a>);

impl<'de> Entries<'de> for Choices<'_, '_> {
    fn entry<A: SeqAccess<'de>>(&mut self, _: u16, list: &mut A) -> Result<Option<()>, A::Error> {
        let before = self.0.batch.mark();
        let Some(choice) = list.next_element_seed(Object(Choice { reading: self.0, index: None, finish: None }))? else { return Ok(None) };
        let Choice { index, finish, .. } = choice;
        let index = self.0.index(index)?;
        if let Some(finish) = finish {
            self.0.batch.push(Event { what: What::Finish { choice: 0, finish }, raw: None });
        }
        self.0.batch.set_choice_since(before, index);
        Ok(Some(()))
    }
}

struct Choice<'r, 'a> {
    reading: &'r mut Reading<'a>,
    index: Option<u64>,
    finish: Option<Finish>,
}

impl<'de> Shape<'de> for Choice<'_, '_> {
    const NAMES: &'static [&'static str] =
        &["index", "delta", "message", "finish_reason", "logprobs", "stop_reason", "token_ids", "prompt_token_ids", "matched_stop"];
    fn plain(&mut self) -> &mut bool {
        &mut self.reading.plain
    }
    fn member<A: MapAccess<'de>>(&mut self, name: &'static str, map: &mut A) -> Result<(), A::Error> {
        match (name, self.reading.form) {
            ("index", _) => self.index = map.next_value_seed(Number)?,
            ("delta", Form::Streamed) | ("message", Form::Whole) => {
                map.next_value_seed(Object(Delta { reading: self.reading, reasoning: None }))?;
            }
            ("finish_reason", _) => {
                self.finish = self.reading.word(map, |_, text| {
                    let finish = Finish::from_name(text);
                    (finish, (text == finish.as_str()).into())
                })?;
            }
            _ => self.reading.plain &= map.next_value_seed(Blank)?,
        }
        Ok(())
    }
}

struct Delta<'r, 'a> {
    reading: &'r mut Reading<'a>,
    reasoning: Option<Span>,
}

impl<'de> Shape<'de> for Delta<'_, '_> {
    const NAMES: &'static [&'static str] =
        &["role", "content", "reasoning_content", "reasoning", "refusal", "tool_calls", "function_call", "audio", "annotations"];
    fn plain(&mut self) -> &mut bool {
        &mut self.reading.plain
    }
    fn member<A: MapAccess<'de>>(&mut self, name: &'static str, map: &mut A) -> Result<(), A::Error> {
        match name {
            "role" => self.reading.word(map, |_, text| ((), (text == "assistant" || text.is_empty()).into())).map(drop),
            "content" => self.reading.piece(map, Channel::Content),
            // Servers on the way from the one name to the other say the same under both.
            "reasoning_content" | "reasoning" => {
                let Some(kept) = map.next_value_seed(Kept(self.reading.batch))? else { return Ok(()) };
                let batch = &mut *self.reading.batch;
                if self.reasoning.is_some_and(|said| !said.is_empty() && batch.text(said) == batch.text(kept.span)) {
                    self.reading.plain = false;
                    return Ok(());
                }
                self.reasoning = Some(kept.span);
                self.reading.plain &= kept.exact;
                self.reading.push_text(Channel::Reasoning, kept.span);
                Ok(())
            }
            "refusal" => self.reading.piece(map, Channel::Refusal),
            "tool_calls" => map.next_value_seed(List(&mut Calls(self.reading))),
            _ => {
                self.reading.plain &= map.next_value_seed(Blank)?;
                Ok(())
            }
        }
    }
}

struct Calls<'r, 'a>(&'r mut Reading<'a>);

impl<'de> Entries<'de> for Calls<'_, '_> {
    fn entry<A: SeqAccess<'de>>(&mut self, position: u16, list: &mut A) -> Result<Option<()>, A::Error> {
        let seed = Object(Call { reading: self.0, index: None, id: None, name: None, arguments: None });
        let Some(Call { index, id, name, arguments, .. }) = list.next_element_seed(seed)? else { return Ok(None) };
        // Some servers leave the index out; then the place in the list is meant.
        let index = match index {
            Some(_) => self.0.index(index)?,
            None => {
                self.0.plain = false;
                position
            }
        };
        if let Some(name) = name.filter(|name| !name.is_empty()) {
            let id = id.filter(|id| !id.is_empty()).unwrap_or_else(|| {
                self.0.plain = false;
                self.0.batch.keep_text_with(|text| text.push_str(&format!("call_{index}")))
            });
            if !is_tool_name(self.0.batch.text(name)) || !is_call_id(self.0.batch.text(id)) {
                self.0.wrong = Some("a tool call's name or id is none");
                return Err(A::Error::custom("tool call"));
            }
            self.0.batch.push(Event { what: What::Tool { choice: 0, index, id, name }, raw: None });
        } else if id.is_some_and(|id| !is_call_id(self.0.batch.text(id)) && !id.is_empty()) {
            self.0.plain = false;
        }
        if let Some(arguments) = arguments {
            self.0.push_text(Channel::ToolArguments(index), arguments);
        }
        Ok(Some(()))
    }
}

struct Call<'r, 'a> {
    reading: &'r mut Reading<'a>,
    index: Option<u64>,
    id: Option<Span>,
    name: Option<Span>,
    arguments: Option<Span>,
}

impl Call<'_, '_> {
    fn keep<'de, A: MapAccess<'de>>(&mut self, map: &mut A) -> Result<Option<Span>, A::Error> {
        let kept = map.next_value_seed(Kept(self.reading.batch))?;
        self.reading.plain &= kept.as_ref().is_none_or(|words| words.exact);
        Ok(kept.map(|words| words.span))
    }
}

impl<'de> Shape<'de> for Call<'_, '_> {
    const NAMES: &'static [&'static str] = &["index", "id", "type", "function"];
    fn plain(&mut self) -> &mut bool {
        &mut self.reading.plain
    }
    fn member<A: MapAccess<'de>>(&mut self, name: &'static str, map: &mut A) -> Result<(), A::Error> {
        match name {
            "index" => self.index = map.next_value_seed(Number)?,
            "id" => self.id = self.keep(map)?,
            "type" => drop(self.reading.word(map, |_, text| ((), (text == "function").into()))?),
            _ => {
                map.next_value_seed(Object(Function(self)))?;
            }
        }
        Ok(())
    }
}

struct Function<'c, 'r, 'a>(&'c mut Call<'r, 'a>);

impl<'de> Shape<'de> for Function<'_, '_, '_> {
    const NAMES: &'static [&'static str] = &["name", "arguments"];
    fn plain(&mut self) -> &mut bool {
        &mut self.0.reading.plain
    }
    fn member<A: MapAccess<'de>>(&mut self, name: &'static str, map: &mut A) -> Result<(), A::Error> {
        match name {
            "name" => self.0.name = self.0.keep(map)?,
            _ => self.0.arguments = self.0.keep(map)?,
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What a batch says, one line per event.
    fn describe(batch: &Batch) -> Vec<String> {
        let line = |event: &Event| {
            let raw = if event.raw.is_some() { " raw" } else { "" };
            match event.what {
                What::Text { lane, text } => format!("{} {:?} {:?}{raw}", lane.choice, lane.channel, batch.text(text)),
                What::Tool { choice, index, id, name } => {
                    format!("{choice} tool {index} {} {}{raw}", batch.text(id), batch.text(name))
                }
                What::Finish { choice, finish } => format!("{choice} finish {}{raw}", finish.as_str()),
                What::Usage(usage) => format!("usage {} {}{raw}", usage.input_tokens, usage.output_tokens),
                What::Confirm { .. } => unreachable!("the dialect has no questions"),
                What::Note => format!("note{raw}"),
            }
        };
        batch.events().iter().map(line).collect()
    }

    fn head() -> Head {
        Head { id: "c1".into(), model: "m".into(), created: 7, ..Head::default() }
    }

    #[track_caller]
    fn check(data: &str, expected: &[&str]) {
        let mut batch = Batch::new();
        let step = decode(data, &mut head(), &mut batch).unwrap();
        assert!(matches!(step, Step::More));
        assert_eq!(describe(&batch), expected, "{data}");
        for raw in batch.events().iter().filter_map(|event| event.raw) {
            assert_eq!(batch.wire(raw), data.as_bytes());
        }
        // The parser alone, without the reader of the usual shape, says the same.
        let mut parsed = Batch::new();
        decode_any(data, Form::Streamed, &mut head(), &mut parsed).unwrap();
        assert_eq!(describe(&parsed), expected, "{data}");
    }

    fn chunk(choice: &str) -> String {
        format!(r#"{{"id":"c1","object":"chat.completion.chunk","created":7,"model":"m","choices":[{choice}]}}"#)
    }

    fn delta(delta: &str) -> String {
        chunk(&format!(r#"{{"index":0,"delta":{delta},"finish_reason":null}}"#))
    }

    #[test]
    fn the_first_chunk_names_the_answer() {
        let mut head = Head::default();
        let data = delta(r#"{"content":"a"}"#);
        decode(&data, &mut head, &mut Batch::new()).unwrap();
        assert_eq!((head.id.as_str(), head.model.as_str(), head.created), ("c1", "m", 7));
    }

    #[test]
    fn a_chunk_of_one_text_keeps_its_payload() {
        check(&delta(r#"{"content":"hé"}"#), &["0 Content \"hé\" raw"]);
        check(&delta(r#"{"role":"assistant","content":"a","refusal":null,"tool_calls":null}"#), &["0 Content \"a\" raw"]);
        check(&delta(r#"{"reasoning_content":"a","content":null}"#), &["0 Reasoning \"a\" raw"]);
        check(&delta(r#"{"reasoning":"a"}"#), &["0 Reasoning \"a\" raw"]);
        check(&delta(r#"{"refusal":"a"}"#), &["0 Refusal \"a\" raw"]);
        check(&chunk(r#"{"delta":{"content":"a"},"logprobs":null,"finish_reason":null,"index":3}"#), &["3 Content \"a\" raw"]);
        check(r#"{"choices": [{"index": 0, "delta": {"content": "a"}}]}"#, &["0 Content \"a\" raw"]);
        check(r#"{"choices":[{"index":0,"delta":{"content":"a"}}],"usage":null,"system_fingerprint":"b-1.2"}"#, &["0 Content \"a\" raw"]);
    }

    #[test]
    fn escapes_are_read_and_halves_of_characters_are_not_passed_on() {
        check(&delta(r#"{"content":"\"\\\/\b\f\n\r\t\u00e9\ud83d\ude00"}"#), &["0 Content \"\\\"\\\\/\\u{8}\\u{c}\\n\\r\\té😀\" raw"]);
        check(&delta(r#"{"c\u006fntent":"a"}"#), &["0 Content \"a\" raw"]);
        check(&delta(r#"{"content":"\ud83d"}"#), &["0 Content \"\u{fffd}\""]);
        check(&delta(r#"{"content":"a\ude00\ud83db"}"#), &["0 Content \"a\u{fffd}\u{fffd}b\""]);
        check(&delta(r#"{"content":"\ud83d\ud83d\ude00"}"#), &["0 Content \"\u{fffd}😀\""]);
    }

    #[test]
    fn a_chunk_that_says_two_things_is_taken_apart() {
        check(&delta(r#"{"content":"a","reasoning":"b"}"#), &["0 Content \"a\"", "0 Reasoning \"b\""]);
        check(&delta(r#"{"content":"a","content":"b"}"#), &["0 Content \"a\"", "0 Content \"b\""]);
        check(
            &chunk(r#"{"index":0,"delta":{"content":"a"}},{"index":1,"delta":{"content":"b"}}"#),
            &["0 Content \"a\"", "1 Content \"b\""],
        );
        check(&chunk(r#"{"finish_reason":"length","index":1,"delta":{"content":"a"}}"#), &["1 Content \"a\"", "1 finish length"]);
        check(
            r#"{"choices":[{"index":0,"delta":{"content":"a"}}],"usage":{"prompt_tokens":1,"completion_tokens":2,"total_tokens":3}}"#,
            &["0 Content \"a\"", "usage 1 2"],
        );
    }

    #[test]
    fn reasoning_that_is_said_under_both_its_names_is_said_once() {
        check(&delta(r#"{"reasoning":"a","reasoning_content":"a"}"#), &["0 Reasoning \"a\""]);
        check(&delta(r#"{"reasoning":"a","reasoning_content":"b"}"#), &["0 Reasoning \"a\"", "0 Reasoning \"b\""]);
        check(&delta(r#"{"reasoning":"","reasoning_content":"a"}"#), &["0 Reasoning \"a\" raw"]);
    }

    #[test]
    fn text_cannot_hide_in_members_nobody_knows() {
        for hiding in [
            delta(r#"{"content":"a","thoughts":"secret"}"#),
            delta(r#"{"content":"a","thoughts":null}"#),
            delta(r#"{"content":"a","role":"secret"}"#),
            delta(r#"{"content":"a","function_call":{"arguments":"secret"}}"#),
            delta(r#"{"content":"a","audio":["secret"]}"#),
            delta(r#"{"content":"a","role":"\ud800"}"#),
            delta(r#"{"content":null,"content":"a"}"#),
            chunk(r#"{"index":0,"delta":{"content":"a"},"finish_reason":null,"logprobs":{"content":[{"token":"secret"}]}}"#),
            chunk(r#"{"index":0,"index":0,"delta":{"content":"a"}}"#),
            chunk(r#"{"index":0,"delta":{"content":"a"},"message":{"content":"secret"}}"#),
            chunk(r#"{"index":0,"delta":{"content":"a"},"text":"secret"}"#),
            r#"{"id":"secret","choices":[{"index":0,"delta":{"content":"a"}}]}"#.into(),
            r#"{"model":"secret","choices":[{"index":0,"delta":{"content":"a"}}]}"#.into(),
            r#"{"object":"secret","choices":[{"index":0,"delta":{"content":"a"}}]}"#.into(),
            r#"{"system_fingerprint":"a secret","choices":[{"index":0,"delta":{"content":"a"}}]}"#.into(),
            r#"{"choices":[{"index":0,"delta":{"content":"a"}}],"timings":{"secret":1}}"#.into(),
            r#"{"choices":[{"index":0,"delta":{"content":"a"}}],"timings":{"prompt_n":"secret"}}"#.into(),
            r#"{"choices":[{"index":0,"delta":{"content":"a"}}],"usage":{"secret":1}}"#.into(),
            r#"{"choices":[{"index":0,"delta":{"content":"a"}}],"x":{"y":[]}}"#.into(),
            "{\"choices\":[{\"index\":0,\n\"delta\":{\"content\":\"a\"}}]}".into(),
        ] {
            check(&hiding, &["0 Content \"a\""]);
        }
    }

    #[test]
    fn what_servers_add_without_text_does_no_harm() {
        check(
            r#"{"choices":[{"finish_reason":null,"index":0,"delta":{"content":"a"},"stop_reason":null,"token_ids":null}],"timings":{"prompt_n":1,"prompt_ms":1.5},"prompt_token_ids":null}"#,
            &["0 Content \"a\" raw"],
        );
        check(
            r#"{"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":2,"total_tokens":3,"prompt_tokens_details":{"cached_tokens":0},"completion_tokens_details":null}}"#,
            &["usage 1 2 raw"],
        );
    }

    #[test]
    fn chunks_without_text_are_notes_finishes_and_nothing() {
        check(&delta(r#"{"role":"assistant","content":""}"#), &["note raw"]);
        check(&delta(r#"{"role":"assistant","content":null}"#), &["note raw"]);
        check(&chunk(r#"{"index":2,"delta":{},"finish_reason":"stop"}"#), &["2 finish stop raw"]);
        check(&chunk(r#"{"index":0,"delta":{"content":""},"finish_reason":"tool_calls"}"#), &["0 finish tool_calls raw"]);
        check(&chunk(r#"{"index":0,"delta":{},"finish_reason":"eos"}"#), &["0 finish stop"]);
        check(r#"{}"#, &[]);
        check(r#"{"id":"c1","choices":[],"prompt_filter_results":[{"x":"y"}]}"#, &[]);
    }

    #[test]
    fn a_tool_call_begins_and_its_arguments_follow() {
        check(
            &delta(r#"{"tool_calls":[{"index":1,"id":"call_1","type":"function","function":{"name":"get_weather","arguments":""}}]}"#),
            &["0 tool 1 call_1 get_weather raw"],
        );
        check(&delta(r#"{"tool_calls":[{"index":1,"function":{"arguments":"{\"a\""}}]}"#), &["0 ToolArguments(1) \"{\\\"a\\\"\" raw"]);
        check(
            &chunk(
                r#"{"delta":{"tool_calls":[{"function":{"arguments":"{","name":"f"},"id":"a.b:1"},{"function":{"name":"g"}}]},"index":1}"#,
            ),
            &["1 tool 0 a.b:1 f", "1 ToolArguments(0) \"{\"", "1 tool 1 call_1 g"],
        );
    }

    #[track_caller]
    fn check_malformed(data: &str) {
        let mut batch = Batch::new();
        batch.push_text(Lane::DEFAULT, "before");
        let malformed = decode(data, &mut head(), &mut batch).unwrap_err();
        assert_eq!((describe(&batch), batch.bytes()), (vec!["0 Content \"before\"".to_owned()], 6), "{data}");
        assert!(!malformed.to_string().contains("secret"), "{malformed}");
        assert!(!Fault::from(malformed).chain().contains("secret"));
    }

    use crate::Fault;

    #[test]
    fn what_is_no_chunk_is_malformed_and_leaves_nothing() {
        for data in [
            "",
            "null",
            "[]",
            "\"secret\"",
            "secret",
            "{",
            "[DONE",
            "data: x",
            r#"{"choices":[}"#,
            r#"{"choices":"secret"}"#,
            r#"{"choices":[{"index":0,"delta":{"content":"secret"}}"#,
            r#"{"choices":[{"index":0,"delta":{"content":"secret"}}]}x"#,
            r#"{"choices":[{"index":0,"delta":{"content":"\x"}}]}"#,
            r#"{"choices":[{"index":0,"delta":{"content":"a"},"logprobs":secret}]}"#,
        ] {
            check_malformed(data);
        }
        check_malformed(&delta(r#"{"content":1}"#));
        check_malformed(&delta(r#"{"content":["secret"]}"#));
        check_malformed(&chunk(r#"{"index":128,"delta":{"content":"secret"}}"#));
        check_malformed(&chunk(r#"{"index":-1,"delta":{"content":"secret"}}"#));
        check_malformed(&delta(r#"{"tool_calls":[{"index":128,"function":{"arguments":"secret"}}]}"#));
        check_malformed(&delta(r#"{"tool_calls":[{"index":0,"id":"a","function":{"name":"my secret"}}]}"#));
        check_malformed(&delta(r#"{"tool_calls":[{"index":0,"id":"se cret","function":{"name":"f"}}]}"#));
        check_malformed(&chunk(&vec!["{}"; 200].join(",")));
        check_malformed(&format!(r#"{{"x":{}}}"#, "[".repeat(100_000)));
    }

    #[test]
    fn the_end_is_a_payload_of_its_own_and_never_text() {
        assert!(matches!(decode("[DONE]", &mut head(), &mut Batch::new()), Ok(Step::Done)));
        assert!(matches!(decode(" [DONE] ", &mut head(), &mut Batch::new()), Ok(Step::Done)));
        check(&delta(r#"{"content":"[DONE]"}"#), &["0 Content \"[DONE]\" raw"]);
    }

    #[test]
    fn an_error_in_a_stream_fails_the_answer_and_its_words_stay_here() {
        for (data, code, said) in [
            (r#"{"error":{"message":"secret","type":"server_error","code":500}}"#, "upstream_reset", "code=500 type=server_error"),
            (
                r#"{"error":{"message":"secret","code":"context_length_exceeded","status":400}}"#,
                "upstream_reset",
                "code=context_length_exceeded",
            ),
            (r#"{"error":{"code":400,"message":"the secret is too long"}}"#, "upstream_refused", "code=400"),
            (r#"{"error":{"code":429}}"#, "overloaded", "code=429"),
            (r#"{"error":"a secret"}"#, "upstream_reset", "answered"),
            (r#"{"error":{"code":"policy_denied"}}"#, "policy_denied", "code=policy_denied"),
            (r#"{"error":{"code":"unauthenticated"}}"#, "upstream_refused", "code=unauthenticated"),
        ] {
            let Ok(Step::Failed(fault)) = decode(data, &mut head(), &mut Batch::new()) else { panic!("{data}") };
            assert_eq!(fault.code.as_str(), code, "{data}");
            assert!(fault.chain().contains(said) && !fault.chain().contains("secret"), "{}", fault.chain());
        }
        check(r#"{"error":null,"choices":[{"index":0,"delta":{"content":"a"}}]}"#, &["0 Content \"a\" raw"]);
    }

    #[test]
    fn json_that_answers_nothing_is_no_whole_answer() {
        for body in ["{}", r#"{"status":"ok"}"#, r#"{"object":"list","data":[]}"#] {
            let (mut head, mut batch) = (Head::default(), Batch::new());
            assert!(decode_answer(body.as_bytes(), &mut head, &mut batch).is_err(), "{body}");
            assert!(batch.is_empty());
        }
    }

    #[test]
    fn a_whole_answer_gives_the_same_events_without_payload() {
        let body = br#"{"id":"c9","object":"chat.completion","created":9,"model":"m9","choices":[{"index":0,"message":{"role":"assistant","content":"hi","reasoning_content":"hm","tool_calls":[{"id":"a","type":"function","function":{"name":"f","arguments":"{}"}}]},"finish_reason":"tool_calls"}],"usage":{"prompt_tokens":3,"completion_tokens":1,"total_tokens":4}}"#;
        let (mut head, mut batch) = (Head::default(), Batch::new());
        assert!(matches!(decode_answer(body, &mut head, &mut batch), Ok(Step::Done)));
        assert_eq!(
            describe(&batch),
            ["0 Content \"hi\"", "0 Reasoning \"hm\"", "0 tool 0 a f", "0 ToolArguments(0) \"{}\"", "0 finish tool_calls", "usage 3 1"]
        );
        assert_eq!((head.id.as_str(), head.model.as_str(), head.created), ("c9", "m9", 9));
        assert!(decode_answer(b"\xff", &mut head, &mut batch).is_err());
        assert!(matches!(decode_answer(br#"{"error":{"code":503}}"#, &mut head, &mut batch), Ok(Step::Failed(_))));
    }

    /// Payloads near the usual shape: every member may be there, doubled, out of place, escaped or of the wrong kind.
    fn nearly_a_chunk() -> impl Strategy<Value = String> {
        let word = prop_oneof![
            3 => "[a-z\u{e9}\u{65e5} ]{0,6}".prop_map(|text| serde_json::to_string(&text).unwrap()),
            3 => proptest::sample::select(vec![
                r#""c1""#, r#""m""#, r#""chat.completion.chunk""#, r#""assistant""#, r#""fp_1""#, "null", "0", "7", "1", "01", "1.5", "-1",
                "128", "127", "true", r#""\n\u00e9""#, r#""\ud83d\ude00""#, r#""\ud83d""#, r#""\u+123""#, "\"a\tb\"", "{}", "[]", "",
            ]).prop_map(str::to_owned),
        ];
        let space = proptest::sample::select(vec!["", "", "", " ", "  "]);
        fn members(
            names: &'static [&'static str],
            value: impl Strategy<Value = String> + Clone + 'static,
            space: impl Strategy<Value = &'static str> + Clone + 'static,
        ) -> impl Strategy<Value = String> + Clone {
            proptest::collection::vec((proptest::sample::select(names), value, space), 0..6)
                .prop_map(|members| {
                    let members: Vec<String> = members.iter().map(|(name, value, space)| format!("\"{name}\":{space}{value}")).collect();
                    format!("{{{}}}", members.join(","))
                })
                .boxed()
        }
        let delta = members(
            &["content", "content", "reasoning_content", "reasoning", "role", "refusal", "tool_calls", "other"],
            word.clone().boxed(),
            space.clone().boxed(),
        );
        let choice = members(
            &["index", "delta", "delta", "delta", "finish_reason", "logprobs"],
            prop_oneof![3 => delta, 2 => word.clone()].boxed(),
            space.clone().boxed(),
        );
        let choices = proptest::collection::vec(choice, 0..3).prop_map(|choices| format!("[{}]", choices.join(",")));
        members(
            &["id", "object", "created", "model", "choices", "choices", "choices", "usage", "system_fingerprint", "service_tier", "error"],
            prop_oneof![3 => choices, 2 => word].boxed(),
            space.boxed(),
        )
    }

    /// Chunks of the usual shape, as several servers write them.
    fn usual_chunk() -> impl Strategy<Value = (String, String)> {
        let lane = proptest::sample::select(vec!["content", "reasoning_content"]);
        (".{1,20}", lane, any::<bool>(), any::<bool>(), Just(vec![0, 1, 2, 3, 4]).prop_shuffle()).prop_map(|(text, lane, ascii, space, order)| {
            let mut quoted = serde_json::to_string(&text).unwrap();
            if ascii {
                quoted = quoted.encode_utf16().map(|unit| if unit < 0x80 { char::from(unit as u8).to_string() } else { format!("\\u{unit:04X}") }).collect();
            }
            let space = if space { " " } else { "" };
            let choice = format!(
                "{{\"index\":{space}5,{space}\"delta\":{space}{{\"{lane}\":{space}{quoted}}},{space}\"logprobs\":{space}null,{space}\"finish_reason\":{space}null}}"
            );
            let members =
                [r#""id":"c1""#.to_owned(), r#""object":"chat.completion.chunk""#.to_owned(), r#""created":7"#.to_owned(), r#""model":"m""#.to_owned(), format!("\"choices\":{space}[{choice}]")];
            let members: Vec<&str> = order.iter().map(|at: &usize| members[*at].as_str()).collect();
            (text, format!("{{{}}}", members.join(&format!(",{space}"))))
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4096))]
        #[test]
        fn chunks_of_the_usual_shape_take_the_short_way((text, data) in usual_chunk()) {
            let (mut known, mut parsed) = (Batch::new(), Batch::new());
            // `.` matches no line end, but it does match the control characters that only an escape can say.
            prop_assert!(decode_known(&data, &head(), &mut known), "{}", data);
            decode_any(&data, Form::Streamed, &mut head(), &mut parsed).unwrap();
            prop_assert_eq!(describe(&known), describe(&parsed));
            let What::Text { text: said, .. } = known.events()[0].what else { panic!("text") };
            prop_assert_eq!(known.text(said), text);
        }

        #[test]
        fn a_chunk_like_the_one_before_it_says_what_it_says_alone((_, first) in usual_chunk(), words in ".{0,3}|.{0,3}[\"\\\\].{0,3}", edge in 0..3_usize) {
            let (mut batch, mut alone) = (Batch::new(), Batch::new());
            prop_assert!(decode_known(&first, &head(), &mut batch));
            let Some((_, before, after)) = batch.frame() else { return Ok(()) };
            let [before, after] = [before, after].map(|bytes| std::str::from_utf8(bytes).unwrap().to_owned());
            // The frame itself, and two that are almost it.
            let (before, after) = match edge {
                0 => (before.as_str(), after.as_str()),
                1 => (before.as_str(), after.split_at(after.len() - 1).0),
                _ => (before.split_at(before.len() - 1).0, after.as_str()),
            };
            let second = format!("{before}{words}{after}");
            let step = decode(&second, &mut head(), &mut batch).map(drop);
            let expected = decode_any(&second, Form::Streamed, &mut head(), &mut alone).map(drop);
            prop_assert_eq!(step.is_ok(), expected.is_ok());
            prop_assert_eq!(&describe(&batch)[1..], &describe(&alone)[..]);
            let raw = |event: &Event| event.raw.is_some();
            prop_assert_eq!(batch.events()[1..].iter().map(raw).collect::<Vec<_>>(), alone.events().iter().map(raw).collect::<Vec<_>>());
        }

        #[test]
        fn the_reader_of_the_usual_shape_agrees_with_the_parser(data in nearly_a_chunk(), known_head: bool) {
            let given = if known_head { head() } else { Head::default() };
            let (mut head, mut parsed, mut known) = (given.clone(), Batch::new(), Batch::new());
            let step = decode_any(&data, Form::Streamed, &mut head, &mut parsed);
            if decode_known(&data, &given, &mut known) {
                prop_assert!(step.is_ok());
                prop_assert_eq!(describe(&known), describe(&parsed));
                prop_assert_eq!((head.id, head.model, head.created), (given.id, given.model, given.created));
            } else {
                prop_assert!(known.is_empty() && known.bytes() == 0);
            }
        }
    }
}
