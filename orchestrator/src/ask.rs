//! Calls of tools that a person has to agree to: held while the model writes, asked about one by one when it has finished, and passed
//! on after a yes. `docs/decisions/0181-calls-wait-for-their-person.md` has why they wait for the answer's end.

use std::{
    collections::{BTreeSet, VecDeque},
    sync::Arc,
};

use headgate_contracts::{Batch, Channel, Code, Event, Fault, Lane, Question, TurnId, What, wire::chat::Confirmation};
use http::{Request, Response, StatusCode};
use hyper::body::Incoming;
use tokio::sync::oneshot;

use crate::{
    Orchestrator,
    front::{Body, read, refusal, respond},
    verify::Dispatched,
};

/// The most that a turn's held calls say, in bytes. A question quotes one of them, and escaped it must still fit into an event.
const MAX_HELD_BYTES: usize = 16 << 10;
/// The most calls of a turn, held or not: OpenAI's own bound on tools.
const MAX_CALLS: usize = 128;
/// An id and a yes or no.
const MAX_BODY_BYTES: usize = 1 << 10;

/// The calls of one turn.
#[derive(Default)]
pub(crate) struct Calls {
    /// All that have begun.
    begun: BTreeSet<(u16, u16)>,
    held: VecDeque<Call>,
    held_bytes: usize,
    /// What is asked now, and where the answer comes.
    asked: Option<(Call, oneshot::Receiver<bool>)>,
    questions: u32,
}

/// A call that waits, with all that the model said of it.
pub(crate) struct Call {
    place: (u16, u16),
    name: String,
    said: Batch,
}

impl Call {
    /// The events that it is.
    pub(crate) fn said(&self) -> &Batch {
        &self.said
    }

    /// What its person reads.
    fn prompt(&self) -> String {
        let arguments = self.said.events().iter().filter_map(|event| match event.what {
            What::Text { text, .. } => Some(self.said.text(text)),
            _ => None,
        });
        let arguments: String = arguments.collect();
        match arguments.is_empty() {
            true => format!("Call {}?", self.name),
            false => format!("Call {} with {arguments}?", self.name),
        }
    }
}

impl Calls {
    /// Takes what belongs to calls of these tools out of a batch; gives how many events and bytes of text that were.
    ///
    /// Errors: the model's calls cannot be told apart, so that nobody would know what a person agreed to; or they are too long to be held.
    pub(crate) fn hold(&mut self, tools: &BTreeSet<String>, batch: &mut Batch) -> Result<(u64, usize), Fault> {
        let calls = |event: &Event| {
            matches!(event.what, What::Tool { .. } | What::Text { lane: Lane { channel: Channel::ToolArguments(_), .. }, .. })
        };
        if !batch.events().iter().any(calls) {
            return Ok((0, 0));
        }
        let (mut rest, mut events, before) = (Batch::new(), 0, self.held_bytes);
        rest.dialect = batch.dialect;
        for event in batch.events() {
            match self.take(tools, batch, event)? {
                true => events += 1,
                false => rest.push_from(batch, *event),
            }
        }
        *batch = rest;
        Ok((events, self.held_bytes - before))
    }

    /// Whether an event belongs to a call that waits: then it is kept there.
    fn take(&mut self, tools: &BTreeSet<String>, batch: &Batch, event: &Event) -> Result<bool, Fault> {
        match event.what {
            What::Tool { choice, index, id, name } => {
                let (place, name) = ((choice, index), batch.text(name));
                if !self.begun.insert(place) {
                    // Some servers say the name with every piece. Another name would be another call under the same arguments.
                    let same = self.held.iter().find(|call| call.place == place).map(|call| call.name == name);
                    return match same.unwrap_or(!tools.contains(name)) {
                        true => Ok(same.is_some()),
                        false => Err(unclear("a call that begins twice")),
                    };
                }
                if self.begun.len() > MAX_CALLS {
                    return Err(unclear("more calls than there may be"));
                }
                if !tools.contains(name) {
                    return Ok(false);
                }
                let mut said = Batch::new();
                let (id, kept) = (said.keep_text(batch.text(id)), said.keep_text(name));
                said.push(Event { what: What::Tool { choice, index, id, name: kept }, raw: None });
                self.held.push_back(Call { place, name: name.to_owned(), said });
                Ok(true)
            }
            What::Text { lane: lane @ Lane { choice, channel: Channel::ToolArguments(index) }, text } => {
                if !self.begun.contains(&(choice, index)) {
                    return Err(unclear("arguments of a call that has not begun"));
                }
                let Some(call) = self.held.iter_mut().find(|call| call.place == (choice, index)) else { return Ok(false) };
                self.held_bytes += text.len();
                if self.held_bytes > MAX_HELD_BYTES {
                    return Err(Fault::upstream(Code::StreamLimitExceeded).caused_by("calls to be asked about are longer than may be held"));
                }
                // Pieces are put together: one of a few bytes came in a payload of hundreds.
                call.said.append_text(lane, batch.text(text));
                Ok(true)
            }
            What::Text { .. } | What::Confirm { .. } | What::Finish { .. } | What::Usage(_) | What::Note => Ok(false),
        }
    }

    /// Whether a call waits to be asked about.
    pub(crate) fn are_held(&self) -> bool {
        !self.held.is_empty()
    }

    /// Puts the question about the call that has waited longest into a batch; `open` makes the place where its answer comes.
    pub(crate) fn ask(&mut self, batch: &mut Batch, open: impl FnOnce(String) -> oneshot::Receiver<bool>) {
        let Some(call) = self.held.pop_front() else { return };
        self.questions += 1;
        let id = format!("q{}", self.questions);
        batch.push_question(Question { id: &id, tool: &call.name, prompt: &call.prompt() });
        self.asked = Some((call, open(id)));
    }

    /// What is asked now, once.
    pub(crate) fn take_asked(&mut self) -> Option<(Call, oneshot::Receiver<bool>)> {
        self.asked.take()
    }
}

fn unclear(what: &'static str) -> Fault {
    Fault::upstream(Code::UpstreamProtocolError).caused_by(what)
}

/// Answers what a gateway's client says to the open question of `turn`: 202 where the turn goes on by it. It is proven as a dispatch
/// is, since a yes has effects.
pub(crate) async fn answer(orchestrator: &Arc<Orchestrator>, turn: &str, request: Request<Incoming>) -> Response<Body> {
    let Ok(turn) = turn.parse::<TurnId>() else { return refusal(&Fault::client(Code::SessionNotFound).into(), None) };
    let (head, body) = request.into_parts();
    let heard = async {
        let body = read(orchestrator, &head.headers, body, MAX_BODY_BYTES).await?;
        let said = Confirmation::parse(&body)?;
        let key = orchestrator.runs.key(turn).ok_or_else(|| Fault::client(Code::SessionNotFound))?;
        let told = Dispatched { method: head.method.as_str(), path: head.uri.path(), body: &body };
        orchestrator.court.judge(&head.headers, &told, &key.prompt(turn)).await?;
        orchestrator.runs.confirm(turn, &said)
    };
    match heard.await {
        Ok(()) => respond(StatusCode::ACCEPTED, None, bytes::Bytes::new()),
        Err(fault) => {
            tracing::warn!(code = %fault.code, reason = %fault.message, turn_id = %turn, "an answer to a question not taken");
            refusal(&fault.into(), Some(turn))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tools() -> BTreeSet<String> {
        BTreeSet::from(["pay".to_owned()])
    }

    fn call(batch: &mut Batch, index: u16, name: &str) {
        let (id, name) = (batch.keep_text("c"), batch.keep_text(name));
        batch.push(Event { what: What::Tool { choice: 0, index, id, name }, raw: None });
    }

    fn arguments(batch: &mut Batch, index: u16, words: &str) {
        let (text, raw) = (batch.keep_text(words), batch.keep_wire(&[b'x'; 300]));
        let lane = Lane { choice: 0, channel: Channel::ToolArguments(index) };
        batch.push(Event { what: What::Text { lane, text }, raw: Some(raw) });
    }

    #[test]
    fn only_what_is_asked_about_waits_and_it_is_asked_about_whole_in_order() {
        let (mut calls, mut batch, tools) = (Calls::default(), Batch::new(), tools());
        batch.push_text(Lane::DEFAULT, "I will. ");
        call(&mut batch, 0, "pay");
        call(&mut batch, 1, "look");
        call(&mut batch, 2, "pay");
        for (index, words) in [(2, "{\"b\":"), (0, "{\"a\":"), (1, "{}"), (0, "1}"), (2, "2}")] {
            arguments(&mut batch, index, words);
        }
        assert_eq!(calls.hold(&tools, &mut batch).unwrap(), (6, 14));
        assert_eq!(batch.events().len(), 3);
        let mut asked = Vec::new();
        while calls.are_held() {
            batch.clear();
            let (_reply, answered) = oneshot::channel();
            calls.ask(&mut batch, |_| answered);
            let question = batch.question(&batch.events()[0]).unwrap();
            asked.push((question.id.to_owned(), question.prompt.to_owned()));
            let (call, _) = calls.take_asked().unwrap();
            assert_eq!(call.said().events().len(), 2, "the call, and its arguments in one piece");
        }
        assert_eq!(asked, [("q1".into(), "Call pay with {\"a\":1}?".into()), ("q2".into(), "Call pay with {\"b\":2}?".into())]);
    }

    #[test]
    fn arguments_cannot_be_slipped_under_a_call_that_is_asked_about() {
        let tools = tools();
        let first = |write: &dyn Fn(&mut Batch)| {
            let mut batch = Batch::new();
            write(&mut batch);
            Calls::default().hold(&tools, &mut batch).map_err(|fault| fault.code)
        };
        let unclear = Err(Code::UpstreamProtocolError);
        assert_eq!(first(&|batch| arguments(batch, 0, "{}")), unclear);
        for (one, two) in [("look", "pay"), ("pay", "look")] {
            let twice = |batch: &mut Batch| {
                call(batch, 0, one);
                arguments(batch, 0, "{}");
                call(batch, 0, two);
            };
            assert_eq!(first(&twice), unclear, "{one} {two}");
        }
        // Some servers repeat the name.
        for name in ["look", "pay"] {
            let again = |batch: &mut Batch| {
                call(batch, 0, name);
                call(batch, 0, name);
            };
            assert!(first(&again).is_ok(), "{name}");
        }
    }

    #[test]
    fn what_waits_is_bounded_and_costs_no_more_than_its_words() {
        let (mut calls, tools) = (Calls::default(), tools());
        let mut batch = Batch::new();
        call(&mut batch, 0, "pay");
        calls.hold(&tools, &mut batch).unwrap();
        for byte in 0..=MAX_HELD_BYTES {
            let mut batch = Batch::new();
            arguments(&mut batch, 0, "x");
            match calls.hold(&tools, &mut batch) {
                Ok(held) => assert_eq!((held, batch.is_empty()), ((1, 1), true)),
                Err(fault) => assert_eq!((byte, fault.code), (MAX_HELD_BYTES, Code::StreamLimitExceeded)),
            }
        }
        assert!(calls.held[0].said.bytes() <= MAX_HELD_BYTES + 16 && calls.held[0].said.events().len() == 2);
        let mut many = Batch::new();
        for index in 0..=MAX_CALLS as u16 {
            call(&mut many, index, "look");
        }
        assert_eq!(Calls::default().hold(&tools, &mut many).unwrap_err().code, Code::UpstreamProtocolError);
    }
}
