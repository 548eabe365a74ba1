//! Runs one turn: from a dispatch that holds to the end of the model's answer, whoever reads it and however.

use std::{panic::AssertUnwindSafe, pin::Pin, sync::Arc, time::Duration};

use futures_util::FutureExt;
use headgate_contracts::{
    Batch, Code, Content, End, Fault, Finish, Gone, Message, Prompt, Role, Settings, Stop, TurnId, Usage, What,
    wire::{
        log::{Name, Progress},
        openai::{Completion, ToolCall},
        training::Mode,
    },
};
use headgate_upstream::{Answer, Upstream};
use serde_json::{Map, Value, json};
use tokio::{
    sync::oneshot,
    time::{Instant, Sleep, sleep_until, timeout},
};
use tracing::{Instrument, Span, field};

use crate::{
    Orchestrator,
    ask::{Call, Calls},
    events::{self, Account, Beginning},
    front::Admitted,
    history::Cut,
    metrics::{Metrics, Route},
    partings::Left,
    runs::{Lease, Refused},
    socket::Request,
};

/// A turn that is open. Dropping it leaves the model, and is the caller's leaving unless it had ended.
pub(crate) struct Run {
    pub(crate) turn: TurnId,
    /// The events read last.
    pub(crate) batch: Batch,
    /// What the model said so far; not all of its text, where that is more than anybody will ask for.
    pub(crate) said: Completion,
    /// The most text that is kept in `said`, in bytes.
    keep: usize,
    text_bytes: usize,
    events: u64,
    calls: Calls,
    orchestrator: Arc<Orchestrator>,
    route: Route,
    mode: Mode,
    prompt: Prompt,
    /// What the request brought, before what is remembered was put in front of it; `None` where it is too long to be remembered.
    brought: Option<Vec<Message>>,
    /// Given back when the turn ends.
    lease: Option<Lease>,
    /// Closed when the turn ends; `None` where no events are kept.
    account: Option<Account>,
    answer: Option<Answer>,
    /// What reading the first batch gave, until it is asked for.
    first: Option<bool>,
    begun: Instant,
    deadline: Pin<Box<Sleep>>,
    first_text: Option<Duration>,
    span: Span,
}

impl Run {
    /// Takes the session's place for a dispatch, and waits until its beginning is on disk.
    ///
    /// Errors: the session has an open turn, there is no room, or the event log cannot take the turn.
    pub(crate) async fn begin(orchestrator: &Arc<Orchestrator>, route: Route, admitted: Admitted) -> Result<Run, Fault> {
        let begun = Instant::now();
        let Admitted { mut prompt, claims, body_bytes } = admitted;
        let key = crate::history::Key::of(&prompt);
        let lease = orchestrator.runs.begin(prompt.turn, &key).await.map_err(|refused| match refused {
            Refused::Conflict => Fault::client(Code::TurnConflict),
            Refused::Full => Fault::us(Code::Overloaded).after(Duration::from_secs(1)),
            Refused::Draining => Fault::us(Code::Draining),
        })?;
        // Before anything is done for the turn: what nobody could account for afterwards does not happen.
        let account = match &orchestrator.events {
            Some(log) => {
                let mut beginning = Beginning::of(&prompt, &claims, body_bytes, route);
                if log.keeps_text() {
                    beginning = beginning.saying(&prompt.messages);
                }
                Some(log.begin(beginning).await.map_err(not_taken)?)
            }
            None => None,
        };
        let brought = std::mem::take(&mut prompt.messages);
        prompt.messages = orchestrator.history.recall(&key, &brought);
        orchestrator.metrics.open.inc();
        Ok(Run {
            turn: prompt.turn,
            batch: Batch::new(),
            said: Completion::new(),
            keep: match route {
                Route::Step => orchestrator.settings.limits.text,
                Route::Stream | Route::WebSocket => orchestrator.history.session_bytes(),
            },
            text_bytes: 0,
            events: 0,
            calls: Calls::default(),
            orchestrator: orchestrator.clone(),
            route,
            mode: if claims.fence.is_some() { Mode::Training } else { Mode::Enforce },
            span: span(&prompt),
            prompt,
            brought: orchestrator.history.takes(&brought).then_some(brought),
            lease: Some(lease),
            account,
            answer: None,
            first: None,
            begun,
            deadline: Box::pin(sleep_until(begun + orchestrator.settings.limits.turn)),
            first_text: None,
        })
    }

    /// Asks the model and waits for its first events: until then a fault is a status, and the model's name is not known.
    /// `caller`: watched meanwhile, where there is one to watch.
    ///
    /// Errors: the turn has ended with this stop.
    pub(crate) async fn open(&mut self, caller: Option<&Request>) -> Result<(), Stop> {
        let upstream: Upstream = self.orchestrator.models.choose(self.prompt.settings.model.as_deref()).clone();
        let opening = upstream.open(&self.prompt).instrument(self.span.clone());
        match within(&mut self.lease, &mut self.deadline, caller, &self.orchestrator.metrics, opening).await {
            Ok(answer) => self.answer = Some(answer),
            Err(stop) => return Err(self.end(stop)),
        }
        // What was sent may be a megabyte, and an answer may take minutes: only what the record says is kept.
        self.prompt.messages = Vec::new();
        self.prompt.metadata = Map::new();
        self.prompt.settings = Settings { model: self.prompt.settings.model.take(), ..Settings::default() };
        self.first = Some(self.read(caller).await?);
        Ok(())
    }

    /// The model's name, as its server calls it.
    pub(crate) fn model(&self) -> &str {
        let named = self.answer.as_ref().map(|answer| answer.head.model.as_str()).filter(|name| !name.is_empty());
        named.or(self.prompt.settings.model.as_deref()).unwrap_or_default()
    }

    /// Why the model stopped writing, as far as it has said.
    pub(crate) fn finish(&self) -> Finish {
        self.said.first().and_then(|choice| choice.finish).unwrap_or_default()
    }

    /// Gives the next batch in `self.batch`: `false` is the proper end of the answer, and of the turn. The first one may be empty.
    ///
    /// Errors: the turn has ended with this stop; what was read with it is not in the batch.
    pub(crate) async fn advance(&mut self, caller: Option<&Request>) -> Result<bool, Stop> {
        if let Some(more) = self.first.take() {
            return Ok(more);
        }
        loop {
            // What belongs to a call that waits leaves nothing of a batch.
            let more = self.read(caller).await?;
            if !more || !self.batch.is_empty() {
                return Ok(more);
            }
        }
    }

    async fn read(&mut self, caller: Option<&Request>) -> Result<bool, Stop> {
        self.batch.clear();
        if let Some((call, said)) = self.calls.take_asked() {
            self.hear(call, said, caller).await?;
        } else {
            let Some(answer) = &mut self.answer else { return Ok(false) };
            let reading = answer.next(&mut self.batch).instrument(self.span.clone());
            let read = within(&mut self.lease, &mut self.deadline, caller, &self.orchestrator.metrics, reading).await;
            match read.and_then(|more| self.take_note().map(|()| more)) {
                Ok(true) => return Ok(true),
                Ok(false) => {}
                Err(stop) => return Err(self.end(stop)),
            }
        }
        // The model has said all: what waits is asked about.
        if self.calls.are_held() {
            if self.route == Route::Step {
                // Who gets one answer at the end can be asked nothing before it.
                return Err(self.end(Gone::Declined.into()));
            }
            let Run { calls, batch, orchestrator, turn, .. } = self;
            calls.ask(batch, |id| orchestrator.runs.ask(*turn, id));
        }
        if self.batch.is_empty() {
            self.settle(Ok(()));
        }
        Ok(!self.batch.is_empty())
    }

    /// Waits for what a person says to a call, and lets it go after a yes.
    ///
    /// Errors: the turn has ended with this stop.
    async fn hear(&mut self, call: Call, said: oneshot::Receiver<bool>, caller: Option<&Request>) -> Result<(), Stop> {
        let patience = self.orchestrator.settings.confirm.as_ref().map(|confirm| confirm.within).unwrap_or_default();
        let waiting = async { Ok(timeout(patience, said).await) };
        let heard = within(&mut self.lease, &mut self.deadline, caller, &self.orchestrator.metrics, waiting).await;
        match heard {
            Ok(Ok(Ok(true))) => {
                for event in call.said().events() {
                    self.batch.push_from(call.said(), *event);
                }
                self.keep_said();
                Ok(())
            }
            Ok(Ok(Ok(false))) => Err(self.end(Gone::Declined.into())),
            Ok(Ok(Err(_)) | Err(_)) => Err(self.end(Gone::Unanswered.into())),
            Err(stop) => Err(self.end(stop)),
        }
    }

    /// Waits for something that is not the model, as long as the turn may go on.
    ///
    /// Errors: the turn has ended with this stop.
    pub(crate) async fn meanwhile(&mut self, work: impl Future<Output = ()>) -> Result<(), Stop> {
        let waited = within(&mut self.lease, &mut self.deadline, None, &self.orchestrator.metrics, async {
            work.await;
            Ok(())
        });
        match waited.await {
            Ok(()) => Ok(()),
            Err(stop) => Err(self.end(stop)),
        }
    }

    /// Ends the turn early.
    pub(crate) fn end(&mut self, stop: Stop) -> Stop {
        self.batch.clear();
        self.settle(Err(stop.clone()));
        stop
    }

    /// Notes what the batch says, as far as history, limits and the record want to know.
    fn take_note(&mut self) -> Result<(), Stop> {
        if let Some(account) = &mut self.account {
            account.add(&self.batch);
        }
        if let Some(confirm) = &self.orchestrator.settings.confirm {
            let (events, bytes) = self.calls.hold(&confirm.tools, &mut self.batch)?;
            (self.events, self.text_bytes) = (self.events + events, self.text_bytes + bytes);
        }
        let mut text_came = false;
        for event in self.batch.events() {
            self.events += 1;
            if let What::Text { text, .. } = event.what {
                text_came = true;
                self.text_bytes += text.len();
            }
        }
        self.keep_said();
        if text_came && self.first_text.is_none() {
            let waited = self.begun.elapsed();
            self.first_text = Some(waited);
            self.orchestrator.metrics.first_text.observe(waited.as_secs_f64());
        }
        if self.text_bytes > self.orchestrator.settings.limits.text {
            return Err(Fault::upstream(Code::StreamLimitExceeded).into());
        }
        Ok(())
    }

    /// Keeps what the batch says; text only as long as all of it is no more than anybody will ask for.
    fn keep_said(&mut self) {
        for event in self.batch.events() {
            if self.text_bytes <= self.keep || !matches!(event.what, What::Text { .. }) {
                self.said.add_event(&self.batch, event);
            }
        }
    }

    /// Ends the turn, once: the model is left, the answer remembered, the place given back, the facts written down.
    fn settle(&mut self, end: End) {
        let Some(lease) = self.lease.take() else { return };
        let model = self.model().to_owned();
        let opened = self.answer.take().is_some();
        self.orchestrator.metrics.open.dec();
        if opened {
            self.orchestrator.metrics.ended(self.route, &end);
            let cut = if end.is_ok() { Cut::No } else { Cut::Yes };
            // Remembered before the place is given back and before the last event is sent: whoever reads it may ask at once.
            if let (Some(brought), Some(answer)) = (&self.brought, self.message()) {
                self.orchestrator.history.remember(lease.key(), brought, answer, cut);
            }
        }
        if let Some(account) = self.account.take() {
            let (finish, progress) = (self.finish(), self.progress(&model));
            match end {
                Err(Stop::Gone(gone @ (Gone::Left | Gone::Stopped))) => {
                    let left = Left { account, gone, finish, progress, since: Instant::now() };
                    self.orchestrator.partings.wait(self.turn, left);
                }
                Ok(()) | Err(_) => account.close(&end, finish, progress),
            }
        }
        self.write_down(&end, &model);
        drop(lease);
    }

    fn progress(&self, model: &str) -> Progress {
        Progress {
            model: Name::of(model),
            usage: self.said.usage,
            text_bytes: self.text_bytes as u64,
            events: self.events,
            first_text_ms: self.first_text.map(milliseconds),
            took_ms: milliseconds(self.begun.elapsed()),
        }
    }

    /// What the model said, as the message it will be in the next turn. What is too long to be remembered is not: half of it
    /// would say something that nobody said.
    fn message(&self) -> Option<Message> {
        if self.text_bytes > self.keep {
            return None;
        }
        let said = self.said.first()?;
        let call =
            |call: &ToolCall| json!({"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}});
        let tool_calls = (!said.tools.is_empty()).then(|| said.tools.values().map(call).collect::<Value>());
        let content = (!said.content.is_empty()).then(|| Content::Text(said.content.clone()));
        Some(Message { content, tool_calls, ..Message::new(Role::Assistant, "") })
    }

    /// One log line per turn, and the same on its span. Never text.
    fn write_down(&mut self, end: &End, model: &str) {
        let (word, code, cause) = match end {
            Ok(()) => ("complete", None, None),
            Err(Stop::Failed(fault)) => ("failed", Some(fault.code.as_str()), Some(fault.chain())),
            Err(stop) => (stop.word(), Some(stop.code().as_str()), None),
        };
        let span = std::mem::replace(&mut self.span, Span::none());
        let Usage { input_tokens, output_tokens } = self.said.usage.unwrap_or_default();
        span.record("end", word);
        span.record("code", code);
        span.record("gen_ai.response.model", model);
        span.record("gen_ai.response.finish_reasons", self.finish().as_str());
        span.record("gen_ai.usage.input_tokens", input_tokens);
        span.record("gen_ai.usage.output_tokens", output_tokens);
        let _entered = span.enter();
        let ttft_ms = self.first_text.map(milliseconds);
        tracing::info!(
            end = word,
            code,
            cause,
            route = self.route.as_str(),
            mode = self.mode.as_str(),
            ttft_ms,
            took_ms = milliseconds(self.begun.elapsed()),
            events = self.events,
            text_bytes = self.text_bytes,
            input_tokens,
            output_tokens,
            trace_id = self.prompt.trace.trace_id_hex(),
            turn_id = %self.turn,
            session_id = %self.prompt.session,
            tenant = %self.prompt.principal.tenant,
            "turn ended"
        );
    }
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// The fault that it is, to whoever sent the dispatch, that the event log does not take a turn.
fn not_taken(refused: events::Refused) -> Fault {
    match refused {
        events::Refused::Known => Fault::client(Code::TurnConflict).saying("a turn of that id has been taken before"),
        events::Refused::Full | events::Refused::Behind | events::Refused::Sealed | events::Refused::TooLong | events::Refused::Keyless => {
            Fault::us(Code::EventLogUnavailable).after(Duration::from_secs(1)).caused_by(refused)
        }
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        self.settle(Err(Gone::Left.into()));
    }
}

/// What `work` gives, unless somebody stops the turn, its caller leaves or its time is over first. A panic in it is caught: it
/// costs this turn and no other.
async fn within<T>(
    lease: &mut Option<Lease>,
    deadline: &mut Pin<Box<Sleep>>,
    caller: Option<&Request>,
    metrics: &Metrics,
    work: impl Future<Output = Result<T, Fault>>,
) -> Result<T, Stop> {
    let stopped = async {
        match lease {
            Some(lease) => lease.gone().await,
            None => std::future::pending().await,
        }
    };
    let left = async {
        match caller {
            Some(caller) => caller.gone().await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        biased;
        gone = stopped => Err(gone.into()),
        () = left => Err(Gone::Left.into()),
        // What has come counts, even in the last moment.
        done = AssertUnwindSafe(work).catch_unwind() => match done {
            Ok(done) => Ok(done?),
            Err(_) => {
                metrics.panics.inc();
                Err(Fault::us(Code::InternalError).caused_by("a panic while the model was asked").into())
            }
        },
        () = deadline => Err(Fault::upstream(Code::StreamLimitExceeded).caused_by("the turn's time is over").into()),
    }
}

/// The span of a turn. Its place in the distributed trace is written in fields: what exports spans reads them from there.
fn span(prompt: &Prompt) -> Span {
    let hex = |id: &[u8; 8]| format!("{:016x}", u64::from_be_bytes(*id));
    tracing::info_span!(
        "conversation",
        otel.kind = "server",
        trace_id = prompt.trace.trace_id_hex(),
        span_id = hex(&prompt.trace.span_id),
        parent_span_id = prompt.trace.parent_id.as_ref().map(hex),
        turn_id = %prompt.turn,
        session_id = %prompt.session,
        tenant = %prompt.principal.tenant,
        gen_ai.operation.name = "chat",
        gen_ai.request.model = prompt.settings.model.as_deref(),
        gen_ai.response.model = field::Empty,
        gen_ai.response.finish_reasons = field::Empty,
        gen_ai.usage.input_tokens = field::Empty,
        gen_ai.usage.output_tokens = field::Empty,
        end = field::Empty,
        code = field::Empty,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_panic_while_the_model_is_read_is_a_fault_of_ours() {
        let (metrics, mut deadline) = (Metrics::new(), Box::pin(sleep_until(Instant::now() + Duration::from_secs(60))));
        let work = async { panic!("a fault in our own code") };
        let stop = within::<()>(&mut None, &mut deadline, None, &metrics, work).await.unwrap_err();
        assert_eq!((stop.code(), metrics.panics.get()), (Code::InternalError, 1));
    }

    #[tokio::test(start_paused = true)]
    async fn what_came_in_the_last_moment_counts() {
        let (metrics, mut deadline) = (Metrics::new(), Box::pin(sleep_until(Instant::now())));
        assert!(within(&mut None, &mut deadline, None, &metrics, async { Ok(()) }).await.is_ok());
        let never = std::future::pending::<Result<(), Fault>>();
        assert_eq!(within(&mut None, &mut deadline, None, &metrics, never).await.unwrap_err().code(), Code::StreamLimitExceeded);
    }
}
