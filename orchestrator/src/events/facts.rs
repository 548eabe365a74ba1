//! What is written of a turn: who, how much, how it went. What was said is for `sealed` alone.

use std::time::SystemTime;

use headgate_contracts::{
    Category, Code, End, Finish, Message, Prompt, SessionId, Stop, Subject, TenantId, Trace, TurnId,
    wire::{
        conversation::{DeliveryReport, DenialReport},
        log::{
            Accepted, Cancelled, Completed, Delivered, Delivery, Denied, Event, Failed, FailedReason, InputVerdict, Kind, Name,
            OutputVerdict, Progress,
        },
        training::Mode,
    },
};
use headgate_policy::{Claims, Decision};
use serde::Serialize;
use serde_json::Value;

use super::sealed;
use crate::metrics::Route;

/// Who asks, and where; or the names that stand for them.
#[derive(Clone)]
pub(super) struct Whose {
    pub(super) tenant: TenantId,
    pub(super) session: SessionId,
    pub(super) subject: Subject,
}

impl Whose {
    fn key(&self) -> String {
        format!("{}/{}", self.tenant, self.session)
    }
}

/// A turn that is about to begin.
pub(crate) struct Beginning {
    accepted: Event<Accepted>,
    verdict: Event<InputVerdict>,
    /// The messages of its prompt, a line of JSON each; empty where no text is kept.
    lines: String,
}

impl Beginning {
    /// That `prompt` was dispatched in `body_bytes` bytes, with a verdict that claims `claims`.
    pub(crate) fn of(prompt: &Prompt, claims: &Claims, body_bytes: usize, route: Route) -> Beginning {
        let now = SystemTime::now();
        let accepted = Accepted {
            tenant: prompt.principal.tenant.clone(),
            session: prompt.session.clone(),
            subject: prompt.principal.subject.clone(),
            route: route.as_str().to_owned(),
            model: prompt.settings.model.as_deref().and_then(Name::of),
            messages: prompt.messages.len() as u64,
            body_bytes: body_bytes as u64,
            body_digest: claims.bdg.to_string(),
        };
        let accepted = Event::accepted(prompt.turn, now, prompt.trace.traceparent(), accepted);
        let verdict = accepted.followed_by(Kind::InputVerdict, now, verdict(claims));
        Beginning { accepted, verdict, lines: String::new() }
    }

    /// The same, with what was said: for a log that keeps text.
    pub(crate) fn saying(self, messages: &[Message]) -> Beginning {
        Beginning { lines: sealed::lines(messages), ..self }
    }

    #[cfg(test)]
    pub(super) fn new(accepted: Event<Accepted>, verdict: Event<InputVerdict>) -> Beginning {
        Beginning { accepted, verdict, lines: String::new() }
    }

    /// Who asks, and where.
    pub(super) fn whose(&self) -> Whose {
        let Accepted { tenant, session, subject, .. } = &self.accepted.data;
        Whose { tenant: tenant.clone(), session: session.clone(), subject: subject.clone() }
    }

    /// Says `name` in place of who asks.
    pub(super) fn pseudonym(&mut self, name: Subject) {
        self.accepted.data.subject = name;
    }

    /// Says `names` in place of who asks and where, and gives what there is to be sealed.
    pub(super) fn rename(&mut self, names: Whose) -> String {
        self.accepted.partitionkey = names.key();
        self.verdict.partitionkey = names.key();
        (self.accepted.data.subject, self.accepted.data.session) = (names.subject, names.session);
        std::mem::take(&mut self.lines)
    }

    pub(super) fn turn(&self) -> TurnId {
        self.accepted.subject
    }

    /// The first two events, and what later ones need to know.
    pub(super) fn events(self) -> ([Vec<u8>; 2], Begun) {
        let events = [json(&self.accepted), json(&self.verdict)];
        (events, Begun::of(&self.accepted))
    }
}

fn verdict(claims: &Claims) -> InputVerdict {
    InputVerdict {
        verdict: claims.jti.to_string(),
        issuer: claims.iss.clone(),
        decision: decision(claims.dec).to_owned(),
        // Names that only newer gateways know are not repeated: nobody has said what they may hold.
        categories: claims.cat.iter().filter_map(|name| Category::from_name(name)).collect(),
        policy: claims.pol.id.clone(),
        policy_version: claims.pol.ver.clone(),
        constitution: claims.con.to_string(),
        mode: claims.fence.map(|_| Mode::Training),
        fence: claims.fence,
        subject: None,
    }
}

/// A prompt that policy refused, so that it became no turn.
pub(crate) struct Denial {
    whose: Whose,
    verdict: Event<InputVerdict>,
    denied: Event<Denied>,
}

impl Denial {
    /// That `report` was told of `turn`, with a verdict that claims `claims`.
    pub(crate) fn of(turn: TurnId, report: &DenialReport, claims: &Claims, trace: &Trace) -> Denial {
        let now = SystemTime::now();
        let facts = InputVerdict { subject: Some(report.subject.clone()), ..verdict(claims) };
        let categories = facts.categories.clone();
        let verdict = Event::refused(turn, now, trace.traceparent(), (&report.tenant, &report.session_id), facts);
        let code = Code::from_name(&report.code).unwrap_or(Code::PolicyDenied);
        let denied = verdict.followed_by(Kind::Denied, now, Denied { code, categories, progress: Progress::default() });
        let whose = Whose { tenant: report.tenant.clone(), session: report.session_id.clone(), subject: report.subject.clone() };
        Denial { whose, verdict, denied }
    }

    pub(super) fn turn(&self) -> TurnId {
        self.verdict.subject
    }

    /// Who asked, and where.
    pub(super) fn whose(&self) -> Whose {
        self.whose.clone()
    }

    /// Says `name` in place of who asked.
    pub(super) fn pseudonym(&mut self, name: Subject) {
        self.verdict.data.subject = Some(name);
    }

    /// Says `names` in place of who asked and where.
    pub(super) fn rename(&mut self, names: Whose) {
        self.verdict.partitionkey = names.key();
        self.denied.partitionkey = names.key();
        self.pseudonym(names.subject);
    }

    pub(super) fn events(&self) -> [Vec<u8>; 2] {
        [json(&self.verdict), json(&self.denied)]
    }
}

/// What a gateway says of a turn after its end.
pub(crate) struct Told {
    verdict: Option<OutputVerdict>,
    delivery: Delivery,
}

impl Told {
    /// What `report` says, with an output verdict that claims `claims`.
    pub(crate) fn of(report: &DeliveryReport, claims: Option<&Claims>) -> Told {
        let delivery = Delivery {
            outcome: report.outcome,
            code: report.code.as_deref().and_then(Code::from_name),
            last_seq: report.last_seq,
            text_bytes: Some(report.text_bytes),
            verdict: claims.map(|claims| claims.jti.to_string()),
        };
        let signed = |claims: &Claims| OutputVerdict { verdict: verdict(claims), text_digest: claims.bdg.to_string() };
        Told { verdict: claims.map(signed), delivery }
    }

    pub(super) fn outcome(&self) -> Delivered {
        self.delivery.outcome
    }
}

fn decision(decision: Decision) -> &'static str {
    match decision {
        Decision::Allow => "allow",
        Decision::Redact => "redact",
        Decision::Flag => "flag",
        Decision::Deny => "deny",
    }
}

/// What all later events of a turn have in common with its first.
#[derive(Clone)]
pub(crate) struct Begun(Event<()>);

impl Begun {
    fn of<D>(first: &Event<D>) -> Begun {
        Begun(first.followed_by(Kind::Accepted, SystemTime::UNIX_EPOCH, ()))
    }

    /// From the first event, as it is in the log. A newer version may have written what this one cannot read; its turn goes on.
    pub(super) fn read(turn: TurnId, first: &[u8]) -> Begun {
        serde_json::from_slice::<Event<Value>>(first).map_or_else(|_| Begun(Event::unknown(turn)), |first| Begun::of(&first))
    }

    /// The first event, without its facts.
    pub(super) fn first(&self) -> &Event<()> {
        &self.0
    }

    /// Whose turn it is: `{tenant}/{session}`.
    pub(super) fn key(&self) -> &str {
        &self.0.partitionkey
    }

    /// What the gateway signed of its answer, if it did, and what the user got.
    pub(super) fn told(&self, told: &Told) -> (Option<Vec<u8>>, Vec<u8>) {
        let now = SystemTime::now();
        let verdict = told.verdict.as_ref().map(|verdict| json(&self.0.followed_by(Kind::OutputVerdict, now, verdict)));
        (verdict, json(&self.0.followed_by(Kind::Delivery, now, &told.delivery)))
    }

    /// That nobody said what the user got; `reaper`: who has it written in place of the turn's orchestrator.
    pub(super) fn untold(&self, reaper: Option<&str>) -> Vec<u8> {
        let delivery = Delivery { outcome: Delivered::Unknown, code: None, last_seq: None, text_bytes: None, verdict: None };
        written(self.0.followed_by(Kind::Delivery, SystemTime::now(), delivery), reaper)
    }

    /// The event that ends the turn.
    pub(super) fn ended(self, end: &End, finish: Finish, progress: Progress) -> (TurnId, Vec<u8>) {
        let (Begun(begun), now) = (self, SystemTime::now());
        let event = match end {
            Ok(()) => json(&begun.followed_by(Kind::Completed, now, Completed { finish, progress })),
            Err(Stop::Gone(gone)) => {
                let cancelled = Cancelled { reason: Cancelled::reason(*gone).to_owned(), progress };
                json(&begun.followed_by(Kind::Cancelled, now, cancelled))
            }
            // A limit of the gateway's judges no text.
            Err(Stop::Refused(refusal)) if refusal.finish == Finish::Length => {
                json(&begun.followed_by(Kind::Cancelled, now, Cancelled { reason: "limit".to_owned(), progress }))
            }
            Err(Stop::Refused(refusal)) => {
                let denied = Denied { code: refusal.code, categories: refusal.categories.clone(), progress };
                json(&begun.followed_by(Kind::Denied, now, denied))
            }
            Err(Stop::Failed(fault)) => {
                let failed = Failed { reason: FailedReason::Fault, code: Some(fault.code), progress: Some(progress) };
                json(&begun.followed_by(Kind::Failed, now, failed))
            }
        };
        (begun.subject, event)
    }
}

/// A turn that a crash left open.
pub(super) struct Crashed {
    pub(super) turn: TurnId,
    /// The event that ends it.
    pub(super) end: Vec<u8>,
    /// What more there is to be said of it; `None` where it was a prompt that was refused.
    pub(super) begun: Option<Begun>,
}

impl Crashed {
    /// By the turn's first event; `reaper`: who has the end written in place of the turn's orchestrator.
    pub(super) fn of(turn: TurnId, first: &[u8], reaper: Option<&str>) -> Crashed {
        let begun = Begun::read(turn, first);
        let now = SystemTime::now();
        match serde_json::from_slice::<Event<InputVerdict>>(first) {
            // Its second event was torn off; the gateway, which was told nothing yet, will say the same once more.
            Ok(refused) if refused.kind == Kind::InputVerdict.as_str() => {
                let categories = refused.data.categories.clone();
                let denied = Denied { code: Code::PolicyDenied, categories, progress: Progress::default() };
                Crashed { turn, end: written(refused.followed_by(Kind::Denied, now, denied), reaper), begun: None }
            }
            Ok(_) | Err(_) => {
                let failed = Failed { reason: FailedReason::Crash, code: None, progress: None };
                Crashed { turn, end: written(begun.0.followed_by(Kind::Failed, now, failed), reaper), begun: Some(begun) }
            }
        }
    }
}

/// How a turn was settled, by the event that did it.
pub(super) fn settled(event: &[u8]) -> Word {
    match serde_json::from_slice::<Event<Value>>(event) {
        Ok(event) if event.kind == Kind::Denied.as_str() => Word::Refused,
        Ok(event) if event.data.get("outcome").is_some_and(|outcome| outcome == Delivered::Unknown.as_str()) => Word::Unknown,
        Ok(_) | Err(_) => Word::Said,
    }
}

/// What is known of a turn that has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Word {
    /// Nobody has said yet what the user got.
    Owed,
    /// Its gateway has said it.
    Said,
    /// Its gateway did not say it in time.
    Unknown,
    /// It never was one: its prompt was refused.
    Refused,
}

fn written<D: Serialize>(event: Event<D>, reaper: Option<&str>) -> Vec<u8> {
    match reaper {
        Some(who) => json(&event.reaped(who)),
        None => json(&event),
    }
}

fn json<D: Serialize>(event: &Event<D>) -> Vec<u8> {
    // Strings and numbers under string keys: nothing in them can fail to be written.
    serde_json::to_vec(event).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use headgate_contracts::{Fault, Gone, Refusal, Usage};

    use super::*;
    use crate::events::writer::{MAX_DELIVERY_BYTES, MAX_END_BYTES, MAX_VERDICT_BYTES};

    /// The beginning of a turn whose every name is as long as it may be.
    fn longest() -> Begun {
        let name = "x".repeat(128);
        let accepted = Accepted {
            tenant: name.parse().unwrap(),
            session: name.parse().unwrap(),
            subject: name.parse().unwrap(),
            route: "websocket".into(),
            model: Name::of(&"\\".repeat(128)),
            messages: u64::MAX,
            body_bytes: u64::MAX,
            body_digest: "y".repeat(64),
        };
        let traceparent = headgate_contracts::Trace::fresh().traceparent();
        let accepted = Event::accepted(TurnId::fresh(), SystemTime::now(), traceparent, accepted);
        Begun::of(&accepted)
    }

    #[test]
    fn the_longest_end_fits_its_room() {
        let progress = Progress {
            model: Name::of(&"\"".repeat(128)),
            usage: Some(Usage { input_tokens: u32::MAX.into(), output_tokens: u32::MAX.into() }),
            text_bytes: u64::MAX,
            events: u64::MAX,
            first_text_ms: Some(u64::MAX),
            took_ms: u64::MAX,
        };
        let longest_code = Code::ALL.iter().copied().max_by_key(|code| code.as_str().len()).unwrap();
        let mut refusal = Refusal::new(longest_code, "rule");
        refusal.categories = Category::ALL.to_vec();
        let ends: [End; 4] = [Ok(()), Err(refusal.into()), Err(Fault::us(longest_code).into()), Err(Gone::Drained.into())];
        for end in ends {
            let (_, event) = longest().ended(&end, Finish::ContentFilter, progress.clone());
            assert!((500..=MAX_END_BYTES).contains(&event.len()), "{} bytes", event.len());
        }
    }

    #[test]
    fn the_longest_word_of_a_gateway_fits_its_room() {
        let long = |bytes: usize| "x".repeat(bytes);
        let verdict = InputVerdict {
            verdict: long(22),
            issuer: long(128),
            decision: "redact".into(),
            categories: Category::ALL.to_vec(),
            policy: long(128),
            policy_version: long(64),
            constitution: long(64),
            mode: Some(Mode::Training),
            fence: Some(u64::MAX),
            subject: None,
        };
        let delivery = Delivery {
            outcome: Delivered::Delivered,
            code: Code::ALL.iter().copied().max_by_key(|code| code.as_str().len()),
            last_seq: Some(u64::MAX),
            text_bytes: Some(u64::MAX),
            verdict: Some(long(22)),
        };
        let told = Told { verdict: Some(OutputVerdict { verdict, text_digest: long(64) }), delivery };
        let (verdict, delivery) = longest().told(&told);
        assert!((1000..=MAX_VERDICT_BYTES).contains(&verdict.unwrap().len()));
        assert!((500..=MAX_DELIVERY_BYTES).contains(&delivery.len()), "{}", delivery.len());
        assert_eq!((settled(&delivery), settled(&longest().untold(None))), (Word::Said, Word::Unknown));
    }

    #[test]
    fn an_end_says_how_it_went_and_nothing_that_was_said() {
        let fault = Fault::upstream(Code::UpstreamReset).saying("canary").caused_by("canary");
        let (turn, event) = longest().ended(&Err(fault.after(Duration::from_secs(1)).into()), Finish::Stop, Progress::default());
        let event = String::from_utf8(event).unwrap();
        assert!(event.contains("\"code\":\"upstream_reset\"") && !event.contains("canary"), "{event}");
        assert!(event.contains(&Kind::Failed.id(turn)), "{event}");
    }
}
