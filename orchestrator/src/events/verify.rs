//! Judges a log from outside: every record whole and in order, every turn begun once, ended once and settled once.

use std::{collections::HashMap, fmt, io, path::Path};

use headgate_contracts::{
    TurnId,
    wire::log::{Event, Kind},
};
use serde_json::Value;

use super::{
    record::{self, Part, Read, Record},
    segment::{self, Reader},
};

/// Violations that are told one by one; the rest is counted.
const MOST_TOLD: usize = 20;

/// What a log was found to hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Judged {
    /// Segments with records; of a topic, its partitions.
    pub segments: u64,
    /// Records.
    pub records: u64,
    /// The number of the first record; more than 1 where the oldest were let go.
    pub first: u64,
    /// The number of the last record.
    pub last: u64,
    /// Turns that begin in the log.
    pub begun: u64,
    /// Turns that end in it.
    pub ended: u64,
    /// Ends by a crash, among these.
    pub crashed: u64,
    /// Ends that were not written by an orchestrator, among these: its log was lost.
    pub reaped: u64,
    /// Turns without an end: they run, or a crash cut them and the next start will end them.
    pub open: Vec<TurnId>,
    /// Turns that end in the log and began in what was let go.
    pub begun_before: u64,
    /// Ended turns of which the log says what the user got, or that nobody said it.
    pub settled: u64,
    /// Among these, turns whose gateway did not say it in time.
    pub untold: u64,
    /// Turns that have ended, and nothing is said yet of what the user got.
    pub owed: Vec<TurnId>,
    /// Prompts that policy refused, so that they became no turns.
    pub refused: u64,
    /// Events of types that this version does not know.
    pub unknown: u64,
    /// Events of a topic that were there before, word for word, or that a reaper had written too late: they count once.
    pub repeated: u64,
    /// What is torn off the end, in bytes: never promised to anybody, and cut at the next start.
    pub torn_bytes: u64,
    /// What must not be; the first of them.
    pub violations: Vec<Violation>,
    /// All of them.
    pub violations_count: u64,
}

impl Judged {
    /// Whether nothing is as it must not be.
    pub fn is_good(&self) -> bool {
        self.violations_count == 0
    }

    pub(super) fn object(&mut self, number: u64, turn: Option<TurnId>, what: String) {
        self.violations_count += 1;
        if self.violations.len() < MOST_TOLD {
            self.violations.push(Violation { number, turn, what });
        }
    }
}

/// Something that must not be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// At which record.
    pub number: u64,
    /// Of which turn, where that is known.
    pub turn: Option<TurnId>,
    /// What.
    pub what: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "record {}", self.number)?;
        if let Some(turn) = self.turn {
            write!(f, ", turn {turn}")?;
        }
        write!(f, ": {}", self.what)
    }
}

/// Where a turn stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stand {
    /// It has begun; the place of its last event.
    Open(u64),
    /// A prompt was refused; that is to be followed by its end at once.
    Refused,
    /// It has ended; the place of its last event.
    Ended(u64),
    Settled,
}

/// Judges the log in `folder`. It takes no lock and changes nothing: the log may be written meanwhile, and what is written after
/// the call may or may not be judged.
///
/// Errors: it cannot be read.
pub fn verify(folder: &Path) -> io::Result<Judged> {
    let mut judge = Judge::default();
    let mut torn: Option<(u64, u64)> = None;
    for number in segment::list(folder)? {
        let file = match segment::open(folder, number) {
            Ok(file) => file,
            // It was let go meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        let mut reader = Reader::new(file);
        let mut has_records = false;
        loop {
            let at = reader.at();
            match reader.next()? {
                Read::Record(record) => {
                    has_records = true;
                    if let Some((segment, bytes)) = torn.take() {
                        judge.damage(segment, bytes);
                    }
                    judge.record(&record);
                }
                Read::Blank | Read::Broken => {
                    let rest = reader.rest()?;
                    let next = judge.next.unwrap_or(1);
                    if record::was_durable(next, &rest)
                        && let Some(skipped) = record::next_record(&rest)
                    {
                        judge.damage(number, at);
                        reader.skip(skipped as u64);
                        continue;
                    }
                    let bytes = rest.iter().rposition(|byte| *byte != 0).map_or(0, |last| last as u64 + 1);
                    if bytes > 0 {
                        judge.judged.torn_bytes += bytes;
                        torn = torn.or(Some((number, at)));
                    }
                    break;
                }
            }
        }
        judge.judged.segments += u64::from(has_records);
    }
    Ok(judge.end())
}

/// Judges turns, wherever their events stand.
#[derive(Default)]
pub(super) struct Judge {
    pub(super) judged: Judged,
    turns: HashMap<TurnId, Stand>,
    /// The number that the next record should have.
    next: Option<u64>,
    /// The oldest were let go: a turn may be met anywhere.
    pub(super) trimmed: bool,
}

impl Judge {
    /// Judges an event of a topic at `place`, where it has no record around it to say what part it has.
    #[cfg(feature = "kafka")]
    pub(super) fn event_alone(&mut self, place: u64, event: &[u8]) {
        self.judged.records += 1;
        let Ok(found) = serde_json::from_slice::<Event<Value>>(event) else {
            return self.judged.object(place, None, "not an event".to_owned());
        };
        let turn = found.subject;
        let is_refusal = found.data.get("decision").is_some_and(|decision| decision == "deny");
        let part = match Kind::from_name(&found.kind) {
            Some(Kind::Accepted) => Part::Begins,
            Some(Kind::InputVerdict) if is_refusal => Part::Begins,
            Some(Kind::InputVerdict | Kind::InputSegment | Kind::OutputSegment) => Part::Within,
            Some(Kind::Denied) if self.turns.get(&turn) == Some(&Stand::Refused) => Part::Settles,
            Some(Kind::Completed | Kind::Cancelled | Kind::Denied | Kind::Failed) => Part::Ends,
            Some(Kind::OutputVerdict) => Part::After,
            Some(Kind::Delivery) => Part::Settles,
            None => {
                self.judged.unknown += 1;
                return;
            }
        };
        let record = Record { number: place, durable: 0, part, turn, event };
        self.turn(&record);
    }

    fn damage(&mut self, segment: u64, at: u64) {
        let number = self.next.unwrap_or(1);
        self.judged.object(number, None, format!("damaged: it should stand at byte {at} of segment {segment}"));
    }

    fn record(&mut self, record: &Record<'_>) {
        let number = record.number;
        match self.next {
            None => (self.judged.first, self.trimmed) = (number, number > 1),
            Some(next) if next == number => {}
            Some(next) => self.judged.object(number, None, format!("out of order: record {next} should stand here")),
        }
        self.next = Some(number + 1);
        self.judged.records += 1;
        self.judged.last = number;
        self.turn(record);
    }

    /// Judges the record as one of its turn.
    fn turn(&mut self, record: &Record<'_>) {
        let (number, turn) = (record.number, record.turn);
        let event = match self.event(record) {
            Ok(event) => event,
            Err(what) => return self.judged.object(number, Some(turn), what.to_owned()),
        };
        if let Err(what) = self.step(record.part, turn, event) {
            self.judged.object(number, Some(turn), what.to_owned());
        }
    }

    /// Goes on to where the turn stands after the event.
    fn step(
        &mut self,
        part: Part,
        turn: TurnId,
        Judgeable { kind, place, names_verdict, is_untold }: Judgeable,
    ) -> Result<(), &'static str> {
        let stand = self.turns.get(&turn).copied();
        // What this version does not know has no place that it could judge.
        let follows = |before: u64| place.is_none_or(|place| place > before);
        let next = match (part, stand) {
            (Part::Begins, None) if kind == Some(Kind::InputVerdict) => Stand::Refused,
            (Part::Begins, None) => {
                self.judged.begun += 1;
                Stand::Open(place.unwrap_or_default())
            }
            (Part::Within, Some(Stand::Open(before))) if follows(before) => Stand::Open(place.unwrap_or(before)),
            (Part::Ends, Some(Stand::Open(_))) => {
                self.judged.ended += 1;
                Stand::Ended(place.unwrap_or(Kind::Completed.place()))
            }
            (Part::After, Some(Stand::Ended(before))) if follows(before) => Stand::Ended(place.unwrap_or(before)),
            (Part::Settles, Some(Stand::Ended(before))) if follows(before) => {
                self.judged.settled += 1;
                self.judged.untold += u64::from(is_untold);
                self.turns.insert(turn, Stand::Settled);
                return match (names_verdict, before == Kind::OutputVerdict.place()) {
                    (true, false) => Err("what the user got names a verdict that is not there"),
                    (true, true) | (false, _) => Ok(()),
                };
            }
            (Part::Settles, Some(Stand::Refused)) if kind.is_none_or(|kind| kind == Kind::Denied) => {
                self.judged.refused += 1;
                Stand::Settled
            }
            // The oldest were let go: a turn may be met anywhere.
            (Part::Within, None) if self.trimmed => return Ok(()),
            (Part::Ends, None) if self.trimmed => {
                self.judged.ended += 1;
                self.judged.begun_before += 1;
                Stand::Ended(place.unwrap_or(Kind::Completed.place()))
            }
            (Part::After, None) if self.trimmed => Stand::Ended(place.unwrap_or(Kind::Completed.place())),
            (Part::Settles, None) if self.trimmed => Stand::Settled,
            (Part::Within, Some(Stand::Open(_))) | (Part::After, Some(Stand::Ended(_))) | (Part::Settles, Some(Stand::Ended(_))) => {
                return Err("out of order within its turn");
            }
            (Part::Begins, Some(_)) => return Err("the turn begins a second time"),
            (Part::Within | Part::Ends | Part::After | Part::Settles, None) => return Err("the turn has not begun"),
            (Part::After | Part::Settles, Some(Stand::Open(_))) => return Err("the turn has not ended"),
            (Part::Within | Part::Ends | Part::After | Part::Settles, Some(Stand::Refused)) => return Err("the prompt was refused"),
            (Part::Within, Some(Stand::Ended(_) | Stand::Settled)) => return Err("the turn has ended before"),
            (Part::Ends, Some(Stand::Ended(_) | Stand::Settled)) => return Err("the turn ends a second time"),
            (Part::After | Part::Settles, Some(Stand::Settled)) => return Err("the turn was settled before"),
        };
        self.turns.insert(turn, next);
        Ok(())
    }

    /// What is judged of the event, if it is what its record says.
    fn event(&mut self, record: &Record<'_>) -> Result<Judgeable, &'static str> {
        let event: Event<Value> = serde_json::from_slice(record.event).map_err(|_| "not an event")?;
        let place: u64 = event.sequence.parse().map_err(|_| "its sequence is no number")?;
        if event.subject != record.turn {
            return Err("the event is about another turn");
        }
        let Some(kind) = Kind::from_name(&event.kind) else {
            self.judged.unknown += 1;
            return Ok(Judgeable { kind: None, place: None, names_verdict: false, is_untold: false });
        };
        let says = |member: &str, word: &str| event.data.get(member).is_some_and(|said| said == word);
        let fits = match kind {
            Kind::Accepted => record.part == Part::Begins,
            Kind::InputSegment | Kind::OutputSegment => record.part == Part::Within,
            Kind::InputVerdict => record.part == if says("decision", "deny") { Part::Begins } else { Part::Within },
            // Where the prompt was refused, nothing is owed after it; that there was such a prompt is judged with the turn.
            Kind::Denied => matches!(record.part, Part::Ends | Part::Settles),
            Kind::Completed | Kind::Cancelled | Kind::Failed => record.part == Part::Ends,
            Kind::OutputVerdict => record.part == Part::After,
            Kind::Delivery => record.part == Part::Settles,
        };
        let (is_there, id) = if kind.is_segment() {
            (place >= kind.place(), kind.id_at(record.turn, place))
        } else {
            (place == kind.place(), kind.id(record.turn))
        };
        if !fits || !is_there {
            return Err("the event has another part in its turn than its record");
        }
        if event.id != id {
            return Err("its id is not the one of its turn and type");
        }
        self.judged.crashed += u64::from(kind == Kind::Failed && says("reason", "crash"));
        self.judged.reaped += u64::from(record.part == Part::Ends && event.reapedby.is_some());
        Ok(Judgeable {
            kind: Some(kind),
            // Text has an order of its own.
            place: (!kind.is_segment()).then_some(place),
            names_verdict: kind == Kind::Delivery && event.data.get("verdict").is_some(),
            is_untold: kind == Kind::Delivery && says("outcome", "unknown"),
        })
    }

    pub(super) fn end(mut self) -> Judged {
        for (turn, stand) in &self.turns {
            match stand {
                Stand::Open(_) | Stand::Refused => self.judged.open.push(*turn),
                Stand::Ended(_) => self.judged.owed.push(*turn),
                Stand::Settled => {}
            }
        }
        // Ids made later sort later.
        self.judged.open.sort_unstable();
        self.judged.owed.sort_unstable();
        self.judged
    }
}

/// What is judged of an event.
struct Judgeable {
    /// `None`: this version does not know it.
    kind: Option<Kind>,
    /// Its place within its turn.
    place: Option<u64>,
    /// It names the verdict on the output.
    names_verdict: bool,
    /// It says that nobody said what the user got.
    is_untold: bool,
}
