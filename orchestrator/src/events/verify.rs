//! Judges a log from outside: every record whole and in order, every turn begun once and ended once.

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
    /// Segments with records.
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
    /// Turns without an end: they run, or a crash cut them and the next start will end them.
    pub open: Vec<TurnId>,
    /// Turns that end in the log and began in what was let go.
    pub begun_before: u64,
    /// Events of types that this version does not know.
    pub unknown: u64,
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

    fn object(&mut self, number: u64, turn: Option<TurnId>, what: String) {
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
    Ended,
}

/// Judges the log in `folder`. It takes no lock and changes nothing: the log may be written meanwhile, and what is written after
/// the call may or may not be judged.
///
/// Errors: it cannot be read.
pub fn verify(folder: &Path) -> io::Result<Judged> {
    let mut judge = Judge { judged: Judged::default(), turns: HashMap::new(), next: None };
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

struct Judge {
    judged: Judged,
    turns: HashMap<TurnId, Stand>,
    /// The number that the next record should have.
    next: Option<u64>,
}

impl Judge {
    fn damage(&mut self, segment: u64, at: u64) {
        let number = self.next.unwrap_or(1);
        self.judged.object(number, None, format!("damaged: it should stand at byte {at} of segment {segment}"));
    }

    fn record(&mut self, record: &Record<'_>) {
        let (number, turn) = (record.number, record.turn);
        match self.next {
            None => self.judged.first = number,
            Some(next) if next == number => {}
            Some(next) => self.judged.object(number, None, format!("out of order: record {next} should stand here")),
        }
        self.next = Some(number + 1);
        self.judged.records += 1;
        self.judged.last = number;
        let place = match self.event(record) {
            Ok(place) => place,
            Err(what) => return self.judged.object(number, Some(turn), what.to_owned()),
        };
        let stand = self.turns.get(&turn).copied();
        let what = match (record.part, stand) {
            (Part::Begins, None) => {
                self.judged.begun += 1;
                self.turns.insert(turn, Stand::Open(place));
                return;
            }
            (Part::Within, Some(Stand::Open(before))) if place > before => {
                self.turns.insert(turn, Stand::Open(place));
                return;
            }
            (Part::Ends, Some(Stand::Open(_))) => {
                self.judged.ended += 1;
                self.turns.insert(turn, Stand::Ended);
                return;
            }
            (Part::Within | Part::Ends, None) if self.judged.first > 1 => {
                if record.part == Part::Ends {
                    self.judged.ended += 1;
                    self.judged.begun_before += 1;
                    self.turns.insert(turn, Stand::Ended);
                }
                return;
            }
            (Part::Within, Some(Stand::Open(_))) => "out of order within its turn",
            (Part::Begins, Some(_)) => "the turn begins a second time",
            (Part::Within | Part::Ends, None) => "the turn has not begun",
            (Part::Within, Some(Stand::Ended)) => "the turn has ended before",
            (Part::Ends, Some(Stand::Ended)) => "the turn ends a second time",
        };
        self.judged.object(number, Some(turn), what.to_owned());
    }

    /// The place within its turn that the event claims, if it is what its record says.
    fn event(&mut self, record: &Record<'_>) -> Result<u64, &'static str> {
        let event: Event<Value> = serde_json::from_slice(record.event).map_err(|_| "not an event")?;
        let place = event.sequence.parse().map_err(|_| "its sequence is no number")?;
        if event.subject != record.turn {
            return Err("the event is about another turn");
        }
        let Some(kind) = Kind::from_name(&event.kind) else {
            self.judged.unknown += 1;
            return Ok(place);
        };
        let part = match kind {
            Kind::Accepted => Part::Begins,
            Kind::InputVerdict => Part::Within,
            Kind::Completed | Kind::Cancelled | Kind::Denied | Kind::Failed => Part::Ends,
        };
        if part != record.part || place != kind.place() {
            return Err("the event has another part in its turn than its record");
        }
        if event.id != kind.id(record.turn) {
            return Err("its id is not the one of its turn and type");
        }
        let is_crash = kind == Kind::Failed && event.data.get("reason").is_some_and(|reason| reason == "crash");
        self.judged.crashed += u64::from(is_crash);
        Ok(place)
    }

    fn end(mut self) -> Judged {
        let is_open = |(turn, stand): (&TurnId, &Stand)| matches!(stand, Stand::Open(_)).then_some(*turn);
        self.judged.open = self.turns.iter().filter_map(is_open).collect();
        // Ids made later sort later.
        self.judged.open.sort_unstable();
        self.judged
    }
}
