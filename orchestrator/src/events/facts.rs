//! What is written of a turn: who, how much, how it went. Never what was said.

use std::time::SystemTime;

use headgate_contracts::{
    Category, End, Finish, Prompt, Stop, TurnId,
    wire::log::{Accepted, Cancelled, Completed, Denied, Event, Failed, FailedReason, InputVerdict, Kind, Name, Progress},
};
use headgate_policy::{Claims, Decision};
use serde::Serialize;
use serde_json::Value;

use crate::metrics::Route;

/// A turn that is about to begin.
pub(crate) struct Beginning {
    accepted: Event<Accepted>,
    verdict: Event<InputVerdict>,
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
        let verdict = InputVerdict {
            verdict: claims.jti.to_string(),
            issuer: claims.iss.clone(),
            decision: decision(claims.dec).to_owned(),
            // Names that only newer gateways know are not repeated: nobody has said what they may hold.
            categories: claims.cat.iter().filter_map(|name| Category::from_name(name)).collect(),
            policy: claims.pol.id.clone(),
            policy_version: claims.pol.ver.clone(),
            constitution: claims.con.to_string(),
        };
        let verdict = accepted.followed_by(Kind::InputVerdict, now, verdict);
        Beginning { accepted, verdict }
    }

    #[cfg(test)]
    pub(super) fn new(accepted: Event<Accepted>, verdict: Event<InputVerdict>) -> Beginning {
        Beginning { accepted, verdict }
    }

    pub(super) fn turn(&self) -> TurnId {
        self.accepted.subject
    }

    /// The first two events, and what the last one needs to know.
    pub(super) fn events(self) -> ([Vec<u8>; 2], Ending) {
        let events = [json(&self.accepted), json(&self.verdict)];
        (events, Ending(self.accepted.followed_by(Kind::Accepted, SystemTime::UNIX_EPOCH, ())))
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

/// What the end of a turn has in common with its beginning.
pub(crate) struct Ending(Event<()>);

impl Ending {
    /// The last event of the turn.
    pub(super) fn event(self, end: &End, finish: Finish, progress: Progress) -> (TurnId, Vec<u8>) {
        let (Ending(begun), now) = (self, SystemTime::now());
        let event = match end {
            Ok(()) => json(&begun.followed_by(Kind::Completed, now, Completed { finish, progress })),
            Err(Stop::Gone(gone)) => {
                let cancelled = Cancelled { reason: Cancelled::reason(*gone).to_owned(), progress };
                json(&begun.followed_by(Kind::Cancelled, now, cancelled))
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

/// The ends of turns that a crash left open, by their first events.
pub(super) fn crashed(open: Vec<(TurnId, Vec<u8>)>) -> Vec<(TurnId, Vec<u8>)> {
    let now = SystemTime::now();
    let end = |(turn, first): (TurnId, Vec<u8>)| {
        let failed = Failed { reason: FailedReason::Crash, code: None, progress: None };
        // A newer version may have written what this one cannot read; its turn ends all the same.
        let event = match serde_json::from_slice::<Event<Value>>(&first) {
            Ok(begun) => json(&begun.followed_by(Kind::Failed, now, failed)),
            Err(_) => json(&Event::unknown(turn).followed_by(Kind::Failed, now, failed)),
        };
        (turn, event)
    };
    open.into_iter().map(end).collect()
}

fn json<D: Serialize>(event: &Event<D>) -> Vec<u8> {
    // Strings and numbers under string keys: nothing in them can fail to be written.
    serde_json::to_vec(event).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use headgate_contracts::{Code, Fault, Gone, Refusal, Usage};

    use super::*;
    use crate::events::writer::MAX_END_BYTES;

    /// The ending of a turn whose every name is as long as it may be.
    fn longest() -> Ending {
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
        Ending(accepted.followed_by(Kind::Accepted, SystemTime::UNIX_EPOCH, ()))
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
            let (_, event) = longest().event(&end, Finish::ContentFilter, progress.clone());
            assert!((500..=MAX_END_BYTES).contains(&event.len()), "{} bytes", event.len());
        }
    }

    #[test]
    fn an_end_says_how_it_went_and_nothing_that_was_said() {
        let fault = Fault::upstream(Code::UpstreamReset).saying("canary").caused_by("canary");
        let (turn, event) = longest().event(&Err(fault.after(Duration::from_secs(1)).into()), Finish::Stop, Progress::default());
        let event = String::from_utf8(event).unwrap();
        assert!(event.contains("\"code\":\"upstream_reset\"") && !event.contains("canary"), "{event}");
        assert!(event.contains(&Kind::Failed.id(turn)), "{event}");
    }
}
