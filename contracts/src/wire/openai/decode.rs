//! Chunks and answers of models: one payload to events.
//!
//! The reader notes whether everything it saw was known and free of text: only then, and only when the payload says exactly one thing, does
//! the event keep the payload's raw form.

use serde::de::{Error as _, IgnoredAny, MapAccess, SeqAccess};

use super::request::Form;
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
    decode_any(data, Form::Streamed, head, batch)
}

/// Reads a whole answer, which was not streamed, into events without raw form.
pub fn decode_answer(body: &[u8], head: &mut Head, batch: &mut Batch) -> Result<Step, Malformed> {
    let text = std::str::from_utf8(body).map_err(|error| Malformed { what: "not UTF-8", at: error.valid_up_to(), bytes: body.len() })?;
    match decode_any(text, Form::Whole, head, batch)? {
        Step::More => Ok(Step::Done),
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
fn is_name(text: &str) -> bool {
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
                map.next_value_seed(Object(Delta(self.reading)))?;
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

struct Delta<'r, 'a>(&'r mut Reading<'a>);

impl<'de> Shape<'de> for Delta<'_, '_> {
    const NAMES: &'static [&'static str] =
        &["role", "content", "reasoning_content", "reasoning", "refusal", "tool_calls", "function_call", "audio", "annotations"];
    fn plain(&mut self) -> &mut bool {
        &mut self.0.plain
    }
    fn member<A: MapAccess<'de>>(&mut self, name: &'static str, map: &mut A) -> Result<(), A::Error> {
        match name {
            "role" => self.0.word(map, |_, text| ((), (text == "assistant" || text.is_empty()).into())).map(drop),
            "content" => self.0.piece(map, Channel::Content),
            "reasoning_content" | "reasoning" => self.0.piece(map, Channel::Reasoning),
            "refusal" => self.0.piece(map, Channel::Refusal),
            "tool_calls" => map.next_value_seed(List(&mut Calls(self.0))),
            _ => {
                self.0.plain &= map.next_value_seed(Blank)?;
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
    use super::*;

    fn read(data: &str) -> (Head, Batch, Step) {
        let (mut head, mut batch) = (Head::default(), Batch::new());
        let step = decode(data, &mut head, &mut batch).unwrap();
        (head, batch, step)
    }

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
                What::Note => format!("note{raw}"),
            }
        };
        batch.events().iter().map(line).collect()
    }

    #[test]
    fn a_plain_chunk_keeps_its_payload() {
        let data = r#"{"id":"c1","object":"chat.completion.chunk","created":7,"model":"m","system_fingerprint":"fp_1","choices":[{"index":0,"delta":{"content":"h\u00e9"},"logprobs":null,"finish_reason":null}],"usage":null}"#;
        let (head, batch, _) = read(data);
        assert_eq!(describe(&batch), ["0 Content \"hé\" raw"]);
        assert_eq!(batch.wire(batch.events()[0].raw.unwrap()), data.as_bytes());
        assert_eq!((head.id.as_str(), head.model.as_str(), head.created), ("c1", "m", 7));
    }
}
