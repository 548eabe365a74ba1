//! Writes the streams that models and orchestrators send, well-formed or as odd as the rules allow, and cuts them up.

use bytes::Bytes;
use serde_json::{Value, json};

/// An answer as an upstream would stream it: said once, written in either dialect.
#[derive(Debug, Clone)]
pub struct Answer {
    dialect: Dialect,
    model: String,
    items: Vec<Item>,
    writing: Writing,
}

/// Whose events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// OpenAI's chat completion chunks, with `[DONE]`.
    OpenAi,
    /// The orchestrator's: `open`, `text`, `tool`, `usage`, `done`, `error`, without ids.
    Conversation,
}

/// Where a piece of text goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lane {
    /// What the user reads.
    Content,
    /// What the model thinks aloud.
    Reasoning,
    /// The model's own refusal.
    Refusal,
    /// The arguments of the tool call with this index.
    ToolArguments(u16),
}

#[derive(Debug, Clone)]
enum Item {
    Open,
    Text(u16, Lane, String),
    Tool { choice: u16, index: u16, id: String, name: String },
    Finish { choice: u16, finish: String },
    Usage(u64, u64),
    Done { finish: String, usage: Option<(u64, u64)> },
    Error { code: String, message: String },
    Data { event: Option<String>, data: String },
    Comment(String),
}

/// How the events are spelt: every choice here is legal, and some decoder somewhere falls over it.
#[derive(Debug, Clone, Copy)]
pub struct Writing {
    /// What ends a line: `\n`, `\r\n` or `\r`.
    pub newline: &'static str,
    /// What stands between a field's colon and its value: one space, or nothing.
    pub after_colon: &'static str,
    /// How much of JSON strings is escaped.
    pub escapes: Escapes,
    /// Whether the stream begins with a byte order mark.
    pub mark: Mark,
}

/// How much of JSON strings is written as `\u....`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Escapes {
    /// Only what must be.
    Least,
    /// Everything that is not ASCII, as Python's `json.dumps` does; surrogate pairs where needed.
    NotAscii,
    /// Every character of every value.
    All,
}

/// The byte order mark.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mark {
    /// None.
    Absent,
    /// One, before the first event.
    Present,
}

impl Default for Writing {
    fn default() -> Writing {
        Writing { newline: "\n", after_colon: " ", escapes: Escapes::Least, mark: Mark::Absent }
    }
}

/// Where a stream is cut into the pieces that are sent one by one.
#[derive(Debug, Clone)]
pub enum Cut {
    /// Nowhere.
    Whole,
    /// After each event.
    Events,
    /// After every so many bytes.
    Bytes(usize),
    /// At these offsets.
    At(Vec<usize>),
    /// Into pieces of 1 to `most` bytes, chosen by `seed`: the same seed cuts the same stream in the same way.
    Random {
        /// Chooses the cuts.
        seed: u64,
        /// The longest piece, in bytes.
        most: usize,
    },
    /// Everywhere a careless decoder goes wrong: inside each UTF-8 sequence, each JSON escape, each CRLF and each blank line.
    Inside,
}

impl Answer {
    /// An answer that has said nothing yet, not even `open`.
    pub fn new(dialect: Dialect, model: &str) -> Answer {
        Answer { dialect, model: model.into(), items: Vec::new(), writing: Writing::default() }
    }

    /// A complete answer of OpenAI's kind: the role, each text in a chunk of its own, `stop`, the usage, `[DONE]`.
    pub fn openai(model: &str, texts: &[&str]) -> Answer {
        Answer::complete(Dialect::OpenAi, model, texts)
    }

    /// A complete answer of the orchestrator's kind: `open`, each text, `done` with `stop` and the usage.
    pub fn conversation(model: &str, texts: &[&str]) -> Answer {
        Answer::complete(Dialect::Conversation, model, texts)
    }

    /// A complete answer: each text in an event of its own, ended by `stop`; one output token is counted for each.
    pub fn complete(dialect: Dialect, model: &str, texts: &[&str]) -> Answer {
        let said = texts.iter().fold(Answer::new(dialect, model).open(), |answer, text| answer.text(text));
        said.done("stop", Some((1, texts.len() as u64)))
    }

    /// The first event: the role chunk, or `open`.
    #[must_use]
    pub fn open(self) -> Answer {
        self.and(Item::Open)
    }

    /// A piece of the first choice's content.
    #[must_use]
    pub fn text(self, text: &str) -> Answer {
        self.text_in(0, Lane::Content, text)
    }

    /// A piece of any lane.
    #[must_use]
    pub fn text_in(self, choice: u16, lane: Lane, text: &str) -> Answer {
        self.and(Item::Text(choice, lane, text.into()))
    }

    /// A tool call begins. Its arguments are text of [`Lane::ToolArguments`].
    #[must_use]
    pub fn tool(self, choice: u16, index: u16, id: &str, name: &str) -> Answer {
        self.and(Item::Tool { choice, index, id: id.into(), name: name.into() })
    }

    /// One of several choices is finished; the answer goes on. The orchestrator's dialect has no event for it.
    #[must_use]
    pub fn finish(self, choice: u16, finish: &str) -> Answer {
        self.and(Item::Finish { choice, finish: finish.into() })
    }

    /// Tokens in and out so far.
    #[must_use]
    pub fn usage(self, input: u64, output: u64) -> Answer {
        self.and(Item::Usage(input, output))
    }

    /// The end: the first choice's finish, the usage, and the dialect's terminal.
    #[must_use]
    pub fn done(self, finish: &str, usage: Option<(u64, u64)>) -> Answer {
        self.and(Item::Done { finish: finish.into(), usage })
    }

    /// The end of an answer that failed.
    #[must_use]
    pub fn error(self, code: &str, message: &str) -> Answer {
        self.and(Item::Error { code: code.into(), message: message.into() })
    }

    /// An event of any name, with any data: malformed, unknown, enormous.
    #[must_use]
    pub fn data(self, event: Option<&str>, data: &str) -> Answer {
        self.and(Item::Data { event: event.map(Into::into), data: data.into() })
    }

    /// A comment, as heartbeats are.
    #[must_use]
    pub fn comment(self, text: &str) -> Answer {
        self.and(Item::Comment(text.into()))
    }

    /// Spells the events in another way.
    #[must_use]
    pub fn written(mut self, writing: Writing) -> Answer {
        self.writing = writing;
        self
    }

    fn and(mut self, item: Item) -> Answer {
        self.items.push(item);
        self
    }

    /// Everything one lane says: what must come out at the other end, where nothing is filtered.
    pub fn said(&self, choice: u16, lane: Lane) -> String {
        let pieces = self.items.iter().filter_map(|item| match item {
            Item::Text(c, l, text) if (*c, *l) == (choice, lane) => Some(text.as_str()),
            _ => None,
        });
        pieces.collect()
    }

    /// The bytes of each event.
    pub fn events(&self) -> Vec<Vec<u8>> {
        let mut events: Vec<Vec<u8>> = self.items.iter().flat_map(|item| self.write(item)).collect();
        if let (Mark::Present, Some(first)) = (self.writing.mark, events.first_mut()) {
            first.splice(0..0, *b"\xef\xbb\xbf");
        }
        events
    }

    /// The whole stream.
    pub fn bytes(&self) -> Vec<u8> {
        self.events().concat()
    }

    /// The whole stream in pieces.
    pub fn cut(&self, cut: Cut) -> Vec<Bytes> {
        match cut {
            Cut::Events => self.events().into_iter().map(Bytes::from).collect(),
            cut => pieces(self.bytes(), &cut),
        }
    }

    fn write(&self, item: &Item) -> Vec<Vec<u8>> {
        if let Item::Data { event, data } = item {
            return vec![self.event(event.as_deref(), data)];
        }
        if let Item::Comment(text) = item {
            let end = self.writing.newline;
            return vec![format!(":{}{text}{end}{end}", self.writing.after_colon).into_bytes()];
        }
        match self.dialect {
            Dialect::OpenAi => self.chunks(item).iter().map(|data| self.event(None, data)).collect(),
            Dialect::Conversation => {
                self.step(item).map(|(name, object)| self.event(Some(name), &self.json(&object))).into_iter().collect()
            }
        }
    }

    /// The payloads of an item in OpenAI's dialect.
    fn chunks(&self, item: &Item) -> Vec<String> {
        let chunk = |choices: Value| json!({"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1_763_700_000, "model": self.model, "choices": choices});
        let delta = |choice: u16, delta: Value, finish: Value| chunk(json!([{"index": choice, "delta": delta, "finish_reason": finish}]));
        let usage = |input: u64, output: u64| {
            let mut last = chunk(json!([]));
            last["usage"] = json!({"prompt_tokens": input, "completion_tokens": output, "total_tokens": input + output});
            last
        };
        let objects = match item {
            Item::Open => vec![delta(0, json!({"role": "assistant", "content": ""}), Value::Null)],
            Item::Text(choice, lane, text) => {
                let said = match lane {
                    Lane::Content => json!({"content": text}),
                    Lane::Reasoning => json!({"reasoning_content": text}),
                    Lane::Refusal => json!({"refusal": text}),
                    Lane::ToolArguments(index) => json!({"tool_calls": [{"index": index, "function": {"arguments": text}}]}),
                };
                vec![delta(*choice, said, Value::Null)]
            }
            Item::Tool { choice, index, id, name } => {
                let call = json!({"index": index, "id": id, "type": "function", "function": {"name": name, "arguments": ""}});
                vec![delta(*choice, json!({"tool_calls": [call]}), Value::Null)]
            }
            Item::Finish { choice, finish } => vec![delta(*choice, json!({}), json!(finish))],
            Item::Usage(input, output) => vec![usage(*input, *output)],
            Item::Done { finish, usage: used } => {
                let last = used.map(|(input, output)| usage(input, output));
                let objects = std::iter::once(delta(0, json!({}), json!(finish))).chain(last);
                return objects.map(|object| self.json(&object)).chain(["[DONE]".to_owned()]).collect();
            }
            Item::Error { code, message } => {
                vec![json!({"error": {"message": message, "type": "server_error", "param": null, "code": code}})]
            }
            Item::Data { .. } | Item::Comment(_) => Vec::new(),
        };
        objects.iter().map(|object| self.json(object)).collect()
    }

    /// The answer as the frames of a turn on an orchestrator's WebSocket.
    pub fn frames(&self, turn: &str) -> Vec<String> {
        let events = self.items.iter().filter_map(|item| self.step(item));
        events.zip(0..).map(|((name, object), seq)| crate::hop::frame(turn, seq, name, &self.json(&object))).collect()
    }

    /// Name and object of an item in the orchestrator's dialect.
    fn step(&self, item: &Item) -> Option<(&'static str, Value)> {
        let usage = |(input, output): (u64, u64)| json!({"input_tokens": input, "output_tokens": output});
        let (name, mut object, choice) = match item {
            Item::Open => ("open", json!({"model": self.model}), 0),
            Item::Text(choice, lane, text) => {
                let object = match lane {
                    Lane::Content => json!({"text": text}),
                    Lane::Reasoning => json!({"text": text, "lane": "reasoning"}),
                    Lane::Refusal => json!({"text": text, "lane": "refusal"}),
                    Lane::ToolArguments(index) => json!({"text": text, "lane": "tool_arguments", "tool": index}),
                };
                ("text", object, *choice)
            }
            Item::Tool { choice, index, id, name } => ("tool", json!({"id": id, "name": name, "index": index}), *choice),
            Item::Usage(input, output) => ("usage", usage((*input, *output)), 0),
            Item::Done { finish, usage: used } => {
                let mut object = json!({"finish": finish});
                if let Some(used) = used {
                    object["usage"] = usage(*used);
                }
                ("done", object, 0)
            }
            Item::Error { code, message } => {
                let error = json!({"message": message, "type": "upstream_error", "param": null, "code": code});
                ("error", json!({"code": code, "message": message, "retryable": true, "error": error}), 0)
            }
            Item::Finish { .. } | Item::Data { .. } | Item::Comment(_) => return None,
        };
        if choice != 0 {
            object["choice"] = json!(choice);
        }
        Some((name, object))
    }

    fn event(&self, name: Option<&str>, data: &str) -> Vec<u8> {
        let Writing { newline, after_colon, .. } = self.writing;
        let name = name.map(|name| format!("event:{after_colon}{name}{newline}")).unwrap_or_default();
        format!("{name}data:{after_colon}{data}{newline}{newline}").into_bytes()
    }

    fn json(&self, value: &Value) -> String {
        let mut out = String::new();
        write_json(value, self.writing.escapes, &mut out);
        out
    }
}

/// Cuts any bytes. [`Cut::Events`] cuts after each blank line of LFs.
pub fn pieces(bytes: impl Into<Bytes>, cut: &Cut) -> Vec<Bytes> {
    let bytes = bytes.into();
    let mut offsets: Vec<usize> = match cut {
        Cut::Whole => Vec::new(),
        Cut::Events => bytes.windows(2).enumerate().filter(|(_, pair)| *pair == b"\n\n").map(|(at, _)| at + 2).collect(),
        Cut::Bytes(size) => (1..bytes.len()).filter(|at| at % size.max(&1) == 0).collect(),
        Cut::At(offsets) => offsets.clone(),
        Cut::Random { seed, most } => {
            let mut random = Random(*seed);
            let mut at = 0;
            std::iter::from_fn(|| {
                at += 1 + random.below(*most);
                (at < bytes.len()).then_some(at)
            })
            .collect()
        }
        Cut::Inside => inside(&bytes),
    };
    offsets.retain(|&at| at > 0 && at < bytes.len());
    offsets.sort_unstable();
    offsets.dedup();
    let begins = std::iter::once(0).chain(offsets.iter().copied());
    let ends = offsets.iter().copied().chain([bytes.len()]);
    begins.zip(ends).filter(|(begin, end)| begin < end).map(|(begin, end)| bytes.slice(begin..end)).collect()
}

/// Offsets that split a UTF-8 sequence, a JSON escape, a CRLF or a blank line.
fn inside(bytes: &[u8]) -> Vec<usize> {
    let mut offsets: Vec<usize> = (0..bytes.len()).filter(|&at| bytes[at] & 0xc0 == 0x80).collect();
    offsets.extend((1..bytes.len()).filter(|&at| matches!(&bytes[at - 1..=at], b"\r\n" | b"\n\n" | b"\n\r" | b"\r\r")));
    let mut at = 0;
    while at < bytes.len() {
        let long = match (bytes[at], bytes.get(at + 1)) {
            (b'\\', Some(b'u')) => 6,
            (b'\\', _) => 2,
            _ => 1,
        };
        offsets.extend(at + 1..at + long);
        at += long;
    }
    offsets
}

fn write_json(value: &Value, escapes: Escapes, out: &mut String) {
    let mut list = |open: char, close: char, items: &mut dyn Iterator<Item = (Option<&String>, &Value)>| {
        out.push(open);
        for (n, (key, item)) in items.enumerate() {
            if n > 0 {
                out.push(',');
            }
            if let Some(key) = key {
                write_string(key, Escapes::Least, out);
                out.push(':');
            }
            write_json(item, escapes, out);
        }
        out.push(close);
    };
    match value {
        Value::Array(items) => list('[', ']', &mut items.iter().map(|item| (None, item))),
        Value::Object(members) => list('{', '}', &mut members.iter().map(|(key, item)| (Some(key), item))),
        Value::String(text) => write_string(text, escapes, out),
        Value::Null | Value::Bool(_) | Value::Number(_) => out.push_str(&value.to_string()),
    }
}

fn write_string(text: &str, escapes: Escapes, out: &mut String) {
    out.push('"');
    for c in text.chars() {
        match c {
            c if escapes == Escapes::All || (escapes == Escapes::NotAscii && !c.is_ascii()) => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    out.push_str(&format!("\\u{unit:04x}"));
                }
            }
            '"' | '\\' => out.extend(['\\', c]),
            '\n' => out.push_str("\\n"),
            c if c < ' ' => out.push_str(&format!("\\u{:04x}", u32::from(c))),
            c => out.push(c),
        }
    }
    out.push('"');
}

/// SplitMix64 (Steele, Lea and Flood 2014): small, and the same on every machine.
pub struct Random(pub u64);

impl Random {
    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number from 0 to below `end`; 0 where `end` is 0.
    pub fn below(&mut self, end: usize) -> usize {
        (self.bits() % (end.max(1) as u64)) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn payloads(answer: &Answer) -> Vec<Value> {
        let text = String::from_utf8(answer.bytes()).unwrap();
        let lines = text.lines().filter_map(|line| line.strip_prefix("data: ")).filter(|data| *data != "[DONE]");
        lines.map(|data| serde_json::from_str(data).unwrap()).collect()
    }

    #[test]
    fn escapes_change_the_spelling_and_not_the_text() {
        let answer = Answer::openai("demo", &["naïve \"😀\"\n", "[DONE]"]);
        for escapes in [Escapes::Least, Escapes::NotAscii, Escapes::All] {
            let written = answer.clone().written(Writing { escapes, ..Writing::default() });
            assert_eq!(payloads(&written), payloads(&answer));
            assert_eq!(written.bytes().is_ascii(), escapes != Escapes::Least);
        }
        assert_eq!(answer.said(0, Lane::Content), "naïve \"😀\"\n[DONE]");
    }

    #[test]
    fn every_cut_keeps_every_byte() {
        let answer = Answer::conversation("demo", &["grün", "\\u0041"]).written(Writing { newline: "\r\n", ..Writing::default() });
        let whole = answer.bytes();
        let cuts = [Cut::Whole, Cut::Events, Cut::Bytes(1), Cut::Bytes(7), Cut::At(vec![3, 3, 9999]), Cut::Inside];
        for cut in cuts.into_iter().chain((0..20).map(|seed| Cut::Random { seed, most: 9 })) {
            let pieces = answer.cut(cut.clone());
            assert_eq!(pieces.concat(), whole, "{cut:?}");
            assert!(pieces.iter().all(|piece| !piece.is_empty()), "{cut:?}");
        }
        assert_eq!(answer.cut(Cut::Bytes(1)).len(), whole.len());
        assert_eq!(answer.cut(Cut::At(vec![3, 3, 9999])).len(), 2);
    }

    #[test]
    fn a_seed_cuts_in_the_same_way_every_time() {
        let answer = Answer::openai("demo", &["one", "two"]);
        assert_eq!(answer.cut(Cut::Random { seed: 5, most: 40 }), answer.cut(Cut::Random { seed: 5, most: 40 }));
        assert_ne!(answer.cut(Cut::Random { seed: 5, most: 40 }), answer.cut(Cut::Random { seed: 6, most: 40 }));
    }

    #[test]
    fn the_inside_of_characters_escapes_and_blank_lines_is_cut() {
        let joined =
            |text: &str| pieces(text.as_bytes().to_vec(), &Cut::Inside).iter().map(|p| p.escape_ascii().to_string()).collect::<Vec<_>>();
        assert_eq!(joined("aüb"), [r"a\xc3", r"\xbcb"]);
        assert_eq!(joined("x\\n\n\n"), [r"x\\", r"n\n", r"\n"]);
        assert_eq!(joined("\\u00fc").len(), 6);
    }
}
