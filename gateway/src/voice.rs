//! How a turn's events are written for its client: as ours, as OpenAI's chunks, or as one whole answer.
//!
//! Payloads that nobody changed are passed on as the bytes that came, where upstream and client speak the same dialect.

use std::ops::Range;

use headgate_contracts::{
    Batch, Dialect, End, Event, Finish, Head, Outcome, Record, Refusal, Stop, Turn, TurnId, Usage, What,
    wire::{
        chat::{self, Done, ErrorEvent, Gap, Open, RefusalObject},
        openai::{Completion, DONE, Envelope, Tail},
        problem::ErrorObject,
        sse,
    },
};
use headgate_policy::Hasher;
use smallvec::SmallVec;

use crate::sse::Framing;

/// Takes up an event that was written to the buffer: its name and where its payload stands.
pub(crate) type Add<'a> = &'a mut dyn FnMut(&'static str, Range<usize>);

/// Writes one turn.
pub struct Voice {
    manner: Manner,
    digest: Hasher,
    text_bytes: u64,
    events: u64,
    usage: Option<Usage>,
    finishes: Vec<(u16, Finish)>,
}

enum Manner {
    Chat,
    Chunks(Box<Chunks>),
    Whole(Box<Whole>),
}

/// OpenAI's whole answer.
#[derive(Default)]
struct Whole {
    envelope: Option<Envelope>,
    answer: Completion,
}

/// OpenAI's stream.
#[derive(Default)]
struct Chunks {
    include_usage: bool,
    /// What all chunks have in common: the upstream's own id where it names one.
    envelope: Option<Envelope>,
    /// The upstream names its answer, so its chunks may be passed on as they came beside ours.
    passes: bool,
    /// The choices of which it was said that the assistant speaks.
    spoken: SmallVec<[u16; 4]>,
}

impl Voice {
    fn new(manner: Manner) -> Voice {
        Voice { manner, digest: Hasher::new(), text_bytes: 0, events: 0, usage: None, finishes: Vec::new() }
    }

    /// Our own events.
    pub fn chat() -> Voice {
        Voice::new(Manner::Chat)
    }

    /// OpenAI's chunks.
    pub fn chunks(include_usage: bool) -> Voice {
        Voice::new(Manner::Chunks(Box::new(Chunks { include_usage, ..Chunks::default() })))
    }

    /// One whole answer, as OpenAI writes it: a single payload at the end.
    pub fn whole() -> Voice {
        Voice::new(Manner::Whole(Box::default()))
    }

    /// Whether a client learns how the turn ended from the response's status, since nothing is sent before the end.
    pub(crate) fn is_whole(&self) -> bool {
        matches!(self.manner, Manner::Whole(_))
    }

    /// Whether its client can be asked something.
    pub(crate) fn asks(&self) -> bool {
        matches!(self.manner, Manner::Chat)
    }

    /// Bytes of text written so far.
    pub(crate) fn text_bytes(&self) -> u64 {
        self.text_bytes
    }

    pub(crate) fn open(&mut self, turn: &Turn, head: &Head, bytes: &mut Vec<u8>, add: Add<'_>) {
        let named = |name: &str| head.headers.get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
        let envelope = || {
            let created = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs());
            Envelope::of(head, &format!("chatcmpl-{}", turn.id), "", created)
        };
        match &mut self.manner {
            Manner::Chat => {
                let open = Open {
                    turn_id: Some(turn.id),
                    session_id: Some(turn.session.clone()),
                    model: head.model.clone(),
                    policy_version: named("policy-version"),
                    constitution_hash: named("constitution-hash"),
                };
                written(Open::NAME, bytes, add, |bytes| open.write(bytes));
            }
            Manner::Chunks(chunks) => {
                chunks.envelope = Some(envelope());
                chunks.passes = !head.id.is_empty();
                chunks.speak(0, bytes, add);
            }
            Manner::Whole(whole) => whole.envelope = Some(envelope()),
        }
    }

    pub(crate) fn write(&mut self, batch: &Batch, bytes: &mut Vec<u8>, add: Add<'_>) {
        for event in batch.events() {
            match event.what {
                What::Text { text, .. } => self.count(batch.text(text)),
                // An orchestrator says it with its last event again.
                What::Usage(usage) if self.usage == Some(usage) => continue,
                What::Usage(usage) => self.usage = Some(usage),
                What::Finish { choice, finish } => self.finishes.push((choice, finish)),
                What::Tool { .. } => self.events += 1,
                // What a person reads is text, wherever it stands. No other dialect has a word for it.
                What::Confirm { prompt, .. } if self.asks() => self.count(batch.text(prompt)),
                What::Confirm { .. } | What::Note => continue,
            }
            self.manner.write(batch, event, bytes, add);
        }
    }

    fn count(&mut self, words: &str) {
        self.digest.update(words.as_bytes());
        self.text_bytes += words.len() as u64;
        self.events += 1;
    }

    /// The record with what was sent in it.
    pub(crate) fn settle(&self, turn: &Turn, end: &End) -> Record {
        let mut record = turn.record.clone();
        record.text_bytes = self.text_bytes;
        record.events = self.events;
        record.usage = self.usage;
        record.finish = match end {
            Err(Stop::Refused(refusal)) => refusal.finish,
            _ => self.finishes.first().map_or(Finish::Stop, |(_, finish)| *finish),
        };
        if let Err(Stop::Refused(Refusal { finish: Finish::ContentFilter, .. })) = end {
            record.raise(Outcome::Blocked);
        }
        record
    }

    /// The end: exactly one, and a cut never looks like a success.
    /// Gives the verdict that it carries.
    pub(crate) fn close(&mut self, turn: &Turn, record: &Record, end: &End, seq: u64, bytes: &mut Vec<u8>, add: Add<'_>) -> Option<String> {
        let digest = std::mem::take(&mut self.digest).finish();
        let verdict = record.seal.as_ref().and_then(|seal| seal(record, *digest.as_bytes()));
        let refusal = match end {
            Ok(()) => None,
            Err(Stop::Refused(refusal)) => Some(refusal),
            Err(stop @ (Stop::Failed(_) | Stop::Gone(_))) => {
                match &self.manner {
                    Manner::Chat => {
                        let error = ErrorEvent { verdict: verdict.clone(), ..ErrorEvent::of(stop, Some(turn.id), seq.checked_sub(1)) };
                        written(ErrorEvent::NAME, bytes, add, |bytes| error.write(bytes));
                    }
                    Manner::Chunks(_) => {
                        written("error", bytes, add, |bytes| bytes.extend_from_slice(&ErrorObject::of(stop).body()));
                    }
                    // The response's status says it.
                    Manner::Whole(_) => {}
                }
                return verdict;
            }
        };
        let tail = Tail { outcome: record.outcome, verdict: verdict.as_deref() };
        match &mut self.manner {
            Manner::Chat => {
                let done = Done {
                    finish: record.finish,
                    outcome: Some(record.outcome),
                    usage: record.usage,
                    refusal: refusal.map(RefusalObject::from),
                    verdict: verdict.clone(),
                };
                written(Done::NAME, bytes, add, |bytes| done.write(bytes));
            }
            Manner::Chunks(chunks) => {
                let finishes = finishes(&self.finishes, &chunks.spoken, refusal);
                let Some(envelope) = &chunks.envelope else { return verdict };
                for (index, (choice, finish)) in finishes.iter().enumerate() {
                    let is_last = !chunks.include_usage && index + 1 == finishes.len();
                    written("chunk", bytes, add, |bytes| envelope.finish(bytes, *choice, *finish, is_last.then_some(tail)));
                }
                if chunks.include_usage {
                    written("chunk", bytes, add, |bytes| envelope.usage(bytes, record.usage, Some(tail)));
                }
                written("done", bytes, add, |bytes| bytes.extend_from_slice(DONE));
            }
            Manner::Whole(whole) => {
                let Whole { envelope: Some(envelope), answer } = &mut **whole else { return verdict };
                let choices: Vec<u16> = answer.choices().map(|(choice, _)| choice).collect();
                for (choice, finish) in finishes(&self.finishes, &choices, refusal) {
                    answer.finish(choice, finish);
                }
                written("answer", bytes, add, |bytes| answer.write(bytes, envelope, Some(tail)));
            }
        }
        verdict
    }
}

impl Chunks {
    /// Says, once per choice, that the assistant speaks.
    fn speak(&mut self, choice: u16, bytes: &mut Vec<u8>, add: Add<'_>) {
        if self.spoken.contains(&choice) {
            return;
        }
        if let Some(envelope) = &self.envelope {
            self.spoken.push(choice);
            written("chunk", bytes, add, |bytes| envelope.role(bytes, choice));
        }
    }
}

impl Voice {
    /// What a reader is told that missed the events `from` to `to`: an event's name and object. Who speaks OpenAI knows no gap, and an
    /// answer with a hole must not look whole: there it is the error that `cut` is. `None`: the response's status says it.
    pub(crate) fn gap(&self, from: u64, to: u64, cut: &Stop) -> Option<(&'static str, Vec<u8>)> {
        match self.manner {
            Manner::Chat => {
                let mut payload = Vec::new();
                Gap { from, to }.write(&mut payload);
                Some((Gap::NAME, payload))
            }
            Manner::Chunks(_) => Some(("error", ErrorObject::of(cut).body())),
            Manner::Whole(_) => None,
        }
    }

    /// The end of a turn that broke without one.
    pub(crate) fn break_off(&mut self, stop: &Stop, seq: u64, bytes: &mut Vec<u8>, add: Add<'_>) {
        match self.manner {
            Manner::Chat => {
                let error = ErrorEvent::of(stop, None, seq.checked_sub(1));
                written(ErrorEvent::NAME, bytes, add, |bytes| error.write(bytes));
            }
            Manner::Chunks(_) => written("error", bytes, add, |bytes| bytes.extend_from_slice(&ErrorObject::of(stop).body())),
            Manner::Whole(_) => {}
        }
    }
}

/// How each choice finished: as the model said; where it did not, or policy cut, as the refusal says.
fn finishes(said: &[(u16, Finish)], choices: &[u16], refusal: Option<&Refusal>) -> Vec<(u16, Finish)> {
    let mut finishes: Vec<(u16, Finish)> = said.to_vec();
    for choice in choices {
        if !finishes.iter().any(|(known, _)| known == choice) {
            finishes.push((*choice, refusal.map_or(Finish::Stop, |refusal| refusal.finish)));
        }
    }
    finishes.sort_unstable_by_key(|(choice, _)| *choice);
    finishes
}

impl Manner {
    fn write(&mut self, batch: &Batch, event: &Event, bytes: &mut Vec<u8>, add: Add<'_>) {
        match self {
            Manner::Chat => {
                let start = bytes.len();
                if let Some(name) = chat::encode(batch, event, bytes) {
                    add(name, start..bytes.len());
                }
            }
            Manner::Chunks(chunks) => {
                let choice = match event.what {
                    What::Text { lane, .. } => lane.choice,
                    What::Tool { choice, .. } => choice,
                    What::Confirm { .. } | What::Finish { .. } | What::Usage(_) | What::Note => return,
                };
                chunks.speak(choice, bytes, add);
                let Chunks { envelope: Some(envelope), passes, .. } = &**chunks else { return };
                written("chunk", bytes, add, |bytes| match event.raw {
                    Some(raw) if *passes && batch.dialect == Dialect::OpenAi => bytes.extend_from_slice(batch.wire(raw)),
                    _ => drop(envelope.event(bytes, batch, event)),
                });
            }
            Manner::Whole(whole) => whole.answer.add_event(batch, event),
        }
    }
}

fn written(name: &'static str, bytes: &mut Vec<u8>, add: Add<'_>, write: impl FnOnce(&mut Vec<u8>)) {
    let start = bytes.len();
    write(bytes);
    add(name, start..bytes.len());
}

/// The whole of a stream that was begun before its turn was refused or failed: one error, and no end that looks like a success.
pub(crate) fn write_stop(out: &mut Vec<u8>, turn: TurnId, framing: Framing, stop: &Stop) {
    match framing {
        Framing::Chat => {
            let mut payload = Vec::new();
            ErrorEvent::of(stop, Some(turn), None).write(&mut payload);
            sse::encode(out, Some((&turn, 0)), Some(ErrorEvent::NAME), &payload);
        }
        Framing::OpenAi => sse::encode(out, None, None, &ErrorObject::of(stop).body()),
    }
}
