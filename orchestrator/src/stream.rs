//! Streams a turn as server-sent events: the response's body reads the model itself, so that nobody reading it stops the model.

use std::io;

use bytes::Bytes;
use futures_util::stream;
use headgate_contracts::{
    Gone, Stop,
    wire::{
        chat::{self, Done, ErrorEvent, Open},
        sse,
    },
};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;

use crate::{front::Body, run::Run, socket::Request};

/// The events of a turn whose first batch has been read. One write per batch; the last event is `done` or `error`, unless the
/// caller has left. `request` is over when the body is.
pub(crate) fn body(run: Run, request: Request) -> Body {
    let begin = Reading { run: Box::new(run), request, events: Events::default(), begun: false };
    let frames = stream::unfold(Some(begin), |reading| async {
        let mut reading = reading?;
        let (written, goes_on) = reading.step().await;
        Some((written.map(Frame::data), goes_on.then_some(reading)))
    });
    BodyExt::boxed_unsync(StreamBody::new(frames))
}

struct Reading {
    run: Box<Run>,
    request: Request,
    events: Events,
    begun: bool,
}

impl Reading {
    /// What is to be written next, and whether the stream goes on after it.
    async fn step(&mut self) -> (io::Result<Bytes>, bool) {
        if !self.begun {
            self.begun = true;
            self.events.open(&self.run);
        }
        let goes_on = match self.run.advance(Some(&self.request)).await {
            Ok(true) => {
                self.events.batch(&self.run);
                true
            }
            Ok(false) => {
                self.events.done(&self.run);
                false
            }
            Err(Stop::Gone(Gone::Left)) => return (Err(io::ErrorKind::ConnectionAborted.into()), false),
            Err(stop) => {
                self.events.error(&self.run, &stop);
                false
            }
        };
        (Ok(self.events.take()), goes_on)
    }
}

/// Writes events. What was written is given away; the next batch gets as much room at once.
#[derive(Default)]
struct Events {
    out: Vec<u8>,
    object: Vec<u8>,
}

impl Events {
    fn open(&mut self, run: &Run) {
        self.write(Open::NAME, |object| open(run).write(object));
    }

    fn batch(&mut self, run: &Run) {
        for event in run.batch.events() {
            self.object.clear();
            if let Some(name) = chat::encode(&run.batch, event, &mut self.object) {
                sse::encode(&mut self.out, None, Some(name), &self.object);
            }
        }
    }

    fn done(&mut self, run: &Run) {
        self.write(Done::NAME, |object| done(run).write(object));
    }

    fn error(&mut self, run: &Run, stop: &Stop) {
        self.write(ErrorEvent::NAME, |object| ErrorEvent::of(stop, Some(run.turn), None).write(object));
    }

    fn write(&mut self, name: &str, object: impl FnOnce(&mut Vec<u8>)) {
        self.object.clear();
        object(&mut self.object);
        sse::encode(&mut self.out, None, Some(name), &self.object);
    }

    fn take(&mut self) -> Bytes {
        let room = self.out.len();
        std::mem::replace(&mut self.out, Vec::with_capacity(room)).into()
    }
}

/// The first event of a turn.
pub(crate) fn open(run: &Run) -> Open {
    Open { turn_id: None, session_id: None, model: run.model().to_owned(), policy_version: None, constitution_hash: None }
}

/// The last event of a turn that came to its end.
pub(crate) fn done(run: &Run) -> Done {
    Done { finish: run.finish(), outcome: None, usage: run.said.usage, refusal: None, verdict: None }
}
