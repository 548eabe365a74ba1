//! What a turn's events said and when they came: the measures, and the end.

use std::time::Duration;

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use headgate_contracts::{SessionId, TurnId, Usage, wire::frames};
use serde::Deserialize;
use serde_json::Value;
use tokio::time::Instant;

use super::line::Trouble;

/// A stream longer than this keeps its first gaps for the median; the longest is never forgotten.
const MAX_GAPS: usize = 1 << 16;

/// One event, as it came.
pub(super) struct Event {
    /// What it says.
    pub said: Said,
    /// Its frame, on one line: the same for both transports.
    pub frame: String,
}

/// The members of all events and problems together; each has some of them.
#[derive(Default, Deserialize)]
#[serde(default)]
pub(super) struct Said {
    #[serde(rename = "type")]
    pub kind: String,
    #[serde(rename = "ref")]
    pub reference: Option<String>,
    pub turn_id: Option<TurnId>,
    pub seq: Option<u64>,
    pub session_id: Option<SessionId>,
    pub text: Option<String>,
    pub lane: Option<String>,
    pub choice: u16,
    pub name: Option<String>,
    /// Of a question.
    pub id: Option<String>,
    pub prompt: Option<String>,
    pub from: Option<u64>,
    pub to: Option<u64>,
    pub input_tokens: Option<u64>,
    pub output_tokens: Option<u64>,
    pub outcome: Option<String>,
    pub usage: Option<Usage>,
    pub refusal: Option<Why>,
    pub policy: Option<Why>,
    pub verdict: Option<String>,
    pub code: Option<String>,
    pub message: Option<String>,
    pub detail: Option<String>,
    pub retryable: bool,
    pub retry_after_ms: Option<u64>,
    /// A problem's body, as it came.
    #[serde(skip)]
    pub raw: Option<String>,
}

// Most of it is message text.
impl std::fmt::Debug for Said {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Said").field("kind", &self.kind).field("turn_id", &self.turn_id).field("seq", &self.seq).finish_non_exhaustive()
    }
}

impl Said {
    /// The id of the question that it is, if it is one.
    pub(super) fn question(&self) -> Option<&str> {
        if self.kind == "confirm" { self.id.as_deref() } else { None }
    }

    /// Whether it says that the turn is not there any more.
    pub(super) fn is_gone(&self) -> bool {
        self.code.as_deref() == Some("session_not_found")
    }
}

/// Why policy said no.
#[derive(Default, Deserialize)]
#[serde(default)]
pub(super) struct Why {
    pub rule: String,
    pub categories: Vec<String>,
}

impl Event {
    /// An event of an SSE stream.
    pub(super) fn of_sse(name: &str, turn: Option<TurnId>, seq: Option<u64>, data: &str) -> Result<Event, Trouble> {
        if !data.trim_start().starts_with('{') {
            return Err(Trouble::Nonsense("an event that is no object"));
        }
        let mut frame = Vec::new();
        match (turn, seq) {
            (Some(turn), Some(seq)) => frames::frame(&mut frame, name, &turn, seq, data.as_bytes()),
            (_, seq) => frames::frame_with_ref(&mut frame, name, None, seq, data.as_bytes()),
        }
        Event::of_frame(&String::from_utf8_lossy(&frame))
    }

    /// An event of a WebSocket.
    pub(super) fn of_frame(frame: &str) -> Result<Event, Trouble> {
        let said = serde_json::from_str(frame).map_err(|_| Trouble::Nonsense("an event that is not the object it should be"))?;
        Ok(Event { said, frame: one_line(frame) })
    }
}

/// JSON on one line that no terminal takes for commands. Control characters stand raw only between its members, where they are
/// white space, or above ASCII, where an escape says the same.
pub(super) fn one_line(json: &str) -> String {
    use std::fmt::Write;
    let mut line = String::with_capacity(json.len());
    for char in json.chars() {
        match char {
            '\t' | '\n' | '\r' => line.push(' '),
            char if super::screen::is_command(char) => {
                let _ = write!(line, "\\u{:04x}", u32::from(char));
            }
            char => line.push(char),
        }
    }
    line
}

/// How a turn ended.
pub(super) enum End {
    Done { outcome: Option<String>, refusal: Option<Why>, verdict: Option<String> },
    Error(Box<Said>),
}

/// One turn as it was told.
pub(super) struct Tale {
    begun: Instant,
    turn: Option<TurnId>,
    session: Option<SessionId>,
    last_seq: Option<u64>,
    events: u64,
    first_text: Option<Duration>,
    last_text: Option<Instant>,
    gaps: Vec<Duration>,
    longest: Duration,
    usage: Option<Usage>,
    missing: u64,
    end: Option<End>,
}

impl Tale {
    pub(super) fn begin(now: Instant) -> Tale {
        Tale {
            begun: now,
            turn: None,
            session: None,
            last_seq: None,
            events: 0,
            first_text: None,
            last_text: None,
            gaps: Vec::new(),
            longest: Duration::ZERO,
            usage: None,
            missing: 0,
            end: None,
        }
    }

    pub(super) fn turn(&self) -> Option<TurnId> {
        self.turn
    }

    pub(super) fn session(&self) -> Option<&SessionId> {
        self.session.as_ref()
    }

    pub(super) fn last_seq(&self) -> Option<u64> {
        self.last_seq
    }

    pub(super) fn end(&self) -> Option<&End> {
        self.end.as_ref()
    }

    /// A break in the connection is no gap of the stream's.
    pub(super) fn interrupt(&mut self) {
        self.last_text = None;
    }

    /// An event that came at `now`.
    pub(super) fn take(&mut self, event: &Event, now: Instant) {
        let said = &event.said;
        self.events += 1;
        self.turn = self.turn.or(said.turn_id);
        if let Some(seq) = said.seq {
            let expected = self.last_seq.map_or(0, |last| last + 1);
            self.missing += seq.saturating_sub(expected);
            self.last_seq = Some(seq);
        }
        match said.kind.as_str() {
            "open" => self.session = said.session_id.clone(),
            "text" => {
                self.first_text.get_or_insert(now - self.begun);
                if let Some(last) = self.last_text.replace(now) {
                    let gap = now - last;
                    self.longest = self.longest.max(gap);
                    if self.gaps.len() < MAX_GAPS {
                        self.gaps.push(gap);
                    }
                }
            }
            "usage" => {
                if let (Some(input_tokens), Some(output_tokens)) = (said.input_tokens, said.output_tokens) {
                    self.usage = Some(Usage { input_tokens, output_tokens });
                }
            }
            "gap" => self.missing += 1,
            "done" => {
                self.usage = said.usage.or(self.usage);
                let refusal = said.refusal.as_ref().map(|why| Why { rule: why.rule.clone(), categories: why.categories.clone() });
                self.end = Some(End::Done { outcome: said.outcome.clone(), refusal, verdict: said.verdict.clone() });
            }
            "error" => {
                let Said { code, message, retryable, retry_after_ms, verdict, .. } = said;
                self.end = Some(End::Error(Box::new(Said {
                    code: code.clone(),
                    message: message.clone(),
                    retryable: *retryable,
                    retry_after_ms: *retry_after_ms,
                    verdict: verdict.clone(),
                    ..Said::default()
                })));
            }
            _ => {}
        }
    }

    /// The gateway answered with a problem instead of a stream.
    pub(super) fn refused(&mut self, problem: Said) {
        self.turn = self.turn.or(problem.turn_id);
        self.end = Some(End::Error(Box::new(problem)));
    }

    /// What became of the turn, as sentences for a person; the last is the line of measures.
    pub(super) fn sum(&self) -> Vec<String> {
        let mut lines = Vec::new();
        let mut parts = Vec::new();
        let verdict = match &self.end {
            None => {
                parts.push("no end came".to_owned());
                None
            }
            Some(End::Done { outcome, refusal, verdict }) => {
                lines.extend(refusal.as_ref().map(|why| format!("policy cut this answer{}", because(why))));
                parts.push(outcome.clone().unwrap_or_else(|| "done".to_owned()));
                verdict.as_deref()
            }
            Some(End::Error(said)) => {
                lines.push(complain(said));
                parts.push(said.code.clone().unwrap_or_else(|| "error".to_owned()));
                said.verdict.as_deref()
            }
        };
        if let Some(first) = self.first_text {
            parts.push(format!("first text {}", time(first)));
        }
        match self.events {
            0 => {}
            1 => parts.push("1 event".to_owned()),
            events => parts.push(format!("{events} events")),
        }
        if let Some(median) = median(&self.gaps) {
            parts.push(format!("gaps {} median, {} longest", time(median), time(self.longest)));
        }
        if self.missing > 0 {
            parts.push(format!("{} missing", self.missing));
        }
        if let Some(Usage { input_tokens, output_tokens }) = self.usage {
            parts.push(format!("{input_tokens} tokens read, {output_tokens} written"));
        }
        if let Some(verdict) = verdict {
            parts.push(summary(verdict));
        }
        if let Some(turn) = self.turn {
            parts.push(format!("turn {turn}"));
        }
        lines.push(parts.join(" · "));
        lines
    }
}

fn complain(said: &Said) -> String {
    let (code, message) = (said.code.as_deref().unwrap_or_default(), said.message.as_deref().unwrap_or_default());
    if code == "policy_denied" {
        return said
            .policy
            .as_ref()
            .map_or_else(|| "policy refused this prompt".to_owned(), |why| format!("policy refused this prompt{}", because(why)));
    }
    let advice = match (code, said.retryable, said.retry_after_ms) {
        ("stopped" | "declined" | "unanswered", ..) => "",
        ("unauthenticated" | "token_expired", ..) => "; put a token into HEADGATE_TOKEN",
        (_, false, _) => "; the same request will fail again",
        (_, true, None | Some(0)) => "; the same request may work now",
        (_, true, Some(wait)) => return format!("{message}; the same request may work in {}", time(Duration::from_millis(wait))),
    };
    format!("{message}{advice}")
}

fn because(why: &Why) -> String {
    let categories = why.categories.iter().map(|category| category.replace('_', " ")).collect::<Vec<_>>().join(", ");
    match (why.rule.as_str(), categories.as_str()) {
        ("", "") => String::new(),
        (rule, "") => format!(", by rule {rule}"),
        ("", categories) => format!(" ({categories})"),
        (rule, categories) => format!(", by rule {rule} ({categories})"),
    }
}

/// What a verdict says, in short. Its signature is not checked here, and that is said.
fn summary(verdict: &str) -> String {
    let claims = verdict
        .split('.')
        .nth(1)
        .and_then(|claims| URL_SAFE_NO_PAD.decode(claims).ok())
        .and_then(|json| serde_json::from_slice::<Value>(&json).ok());
    let word = |pointer: &str| claims.as_ref().and_then(|claims| claims.pointer(pointer)).and_then(Value::as_str).map(str::to_owned);
    match (word("/dec"), word("/pol/id"), word("/pol/ver")) {
        (Some(decision), Some(id), Some(version)) => format!("verdict {decision} under policy {id} {version}, signature not checked"),
        _ => "a verdict that cannot be read".to_owned(),
    }
}

fn median(gaps: &[Duration]) -> Option<Duration> {
    let mut sorted = gaps.to_vec();
    sorted.sort_unstable();
    let middle = sorted.len() / 2;
    let upper = sorted.get(middle)?;
    match sorted.len() % 2 {
        0 => sorted.get(middle - 1).map(|lower| (*lower + *upper) / 2),
        _ => Some(*upper),
    }
}

fn time(span: Duration) -> String {
    let ms = span.as_secs_f64() * 1e3;
    match ms {
        ms if ms < 1.0 => "<1 ms".to_owned(),
        ms if ms < 10.0 => format!("{ms:.1} ms"),
        ms if ms < 1000.0 => format!("{ms:.0} ms"),
        ms => format!("{:.1} s", ms / 1e3),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TURN: &str = "0193a5f0-7e1c-7000-8000-000000000000";

    fn event(name: &str, seq: u64, data: &str) -> Event {
        Event::of_sse(name, TURN.parse().ok(), Some(seq), data).unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn a_turn_is_summed_up_on_one_line() {
        let mut tale = Tale::begin(Instant::now());
        tale.take(&event("open", 0, r#"{"turn_id":"0193a5f0-7e1c-7000-8000-000000000000","session_id":"s","model":"m"}"#), Instant::now());
        for (seq, wait) in [(1, 212), (2, 10), (3, 30), (4, 20)] {
            tokio::time::advance(Duration::from_millis(wait)).await;
            tale.take(&event("text", seq, r#"{"text":"x"}"#), Instant::now());
        }
        let claims = URL_SAFE_NO_PAD.encode(r#"{"dec":"redact","pol":{"id":"default","ver":"7"}}"#);
        let done =
            format!(r#"{{"finish":"stop","outcome":"masked","usage":{{"input_tokens":7,"output_tokens":4}},"verdict":"h.{claims}.s"}}"#);
        tale.take(&event("done", 5, &done), Instant::now());
        assert_eq!(
            tale.sum(),
            [format!(
                "masked · first text 212 ms · 6 events · gaps 20 ms median, 30 ms longest · 7 tokens read, 4 written · \
                 verdict redact under policy default 7, signature not checked · turn {TURN}"
            )]
        );
        assert_eq!(tale.session().map(ToString::to_string).as_deref(), Some("s"));
    }

    #[test]
    fn a_refusal_names_its_rule_and_what_it_is_about() {
        let mut tale = Tale::begin(Instant::now());
        let problem = r#"{"type":"https://x","code":"policy_denied","retryable":false,"policy":{"stage":"input","rule":"moderation.deny","categories":["prompt_injection"]}}"#;
        tale.refused(serde_json::from_str(problem).unwrap());
        assert_eq!(tale.sum(), ["policy refused this prompt, by rule moderation.deny (prompt injection)", "policy_denied"]);
    }

    #[test]
    fn an_error_says_whether_to_try_again() {
        for (error, told) in [
            (r#"{"code":"upstream_reset","message":"cut","retryable":true}"#, "cut; the same request may work now"),
            (
                r#"{"code":"rate_limited","message":"slow down","retryable":true,"retry_after_ms":2500}"#,
                "slow down; the same request may work in 2.5 s",
            ),
            (r#"{"code":"invalid_request","message":"no","retryable":false}"#, "no; the same request will fail again"),
            (r#"{"code":"unauthenticated","message":"who?","retryable":false}"#, "who?; put a token into HEADGATE_TOKEN"),
        ] {
            let mut tale = Tale::begin(Instant::now());
            tale.take(&event("error", 0, error), Instant::now());
            assert_eq!(tale.sum()[0], told);
        }
    }

    #[test]
    fn events_that_never_came_are_counted() {
        let mut tale = Tale::begin(Instant::now());
        for (name, seq, data) in [("open", 0, "{}"), ("text", 3, r#"{"text":"x"}"#), ("gap", 9, r#"{"from":4,"to":9}"#), ("done", 10, "{}")]
        {
            tale.take(&event(name, seq, data), Instant::now());
        }
        assert_eq!(tale.missing, 2 + 6);
        assert_eq!(tale.last_seq(), Some(10));
    }

    #[test]
    fn an_event_reads_the_same_from_both_transports() {
        let sse = event("text", 3, "{\"text\":\"a\u{9b}b\",\n\"lane\":\"reasoning\"}");
        let frame = format!("{{\"type\":\"text\",\"turn_id\":\"{TURN}\",\"seq\":3,\"text\":\"a\u{9b}b\", \"lane\":\"reasoning\"}}");
        let websocket = Event::of_frame(&frame).unwrap();
        assert_eq!(sse.frame, websocket.frame);
        assert_eq!((sse.said.text.as_deref(), sse.said.lane.as_deref(), sse.said.seq), (Some("a\u{9b}b"), Some("reasoning"), Some(3)));
        assert!(sse.frame.contains(r"a\u009bb") && !sse.frame.contains('\u{9b}'));
    }

    #[test]
    fn what_is_not_the_object_it_should_be_is_refused_without_being_quoted() {
        for data in ["", "hunter2", "[]", "{\"text\":7}", "{\"text\":\"hunter2\"", "{\"type\":\"done\"}"] {
            let trouble = Event::of_sse("text", None, Some(1), data).err().unwrap_or_else(|| panic!("{data} was read"));
            assert!(!format!("{trouble:?}").contains("hunter2"));
        }
    }

    #[test]
    fn a_verdict_that_cannot_be_read_is_called_that() {
        for verdict in ["", "a.b", "a.!.c", "h.e30.s"] {
            assert_eq!(summary(verdict), "a verdict that cannot be read");
        }
    }
}
