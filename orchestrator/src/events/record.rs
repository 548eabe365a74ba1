//! One record of the log: a head with a checksum, then an event as JSON.
//!
//! | bytes | what, little endian |
//! |---|---|
//! | 0..4 | magic |
//! | 4..8 | CRC32C of everything that follows in the record |
//! | 8..12 | length of the event, in bytes |
//! | 12..16 | the record's part in its turn, see [`Part`] |
//! | 16..24 | number of the record in the log, from 1 |
//! | 24..32 | number of the last record that was durable when this one was written |
//! | 32..48 | turn id |
//! | 48.. | the event, then zeros up to the next multiple of 8 |
//!
//! The durable number is what tells a torn end from a damaged middle: a record that a later one calls durable was once on disk,
//! so if it cannot be read any more, the log is damaged and nobody may cut it there.

use headgate_contracts::TurnId;

/// Begins every record; its last character is the version of the form.
const MAGIC: [u8; 4] = *b"HGE1";
/// The size of a record's head.
pub(crate) const HEAD_BYTES: usize = 48;
/// The largest event. Events hold names and numbers, all of them bounded; what is longer is not one of ours.
pub(crate) const MAX_EVENT_BYTES: usize = 16 << 10;
/// The largest record.
pub(crate) const MAX_RECORD_BYTES: usize = record_bytes(MAX_EVENT_BYTES);

/// The size of a record with an event of so many bytes.
pub(crate) const fn record_bytes(event_bytes: usize) -> usize {
    HEAD_BYTES + event_bytes.next_multiple_of(8)
}

/// A record's part in its turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// The turn begins with it.
    Begins,
    /// It belongs to a turn that has begun.
    Within,
    /// The turn ends with it; what the user got of it is still to be said.
    Ends,
    /// It is about a turn that has ended.
    After,
    /// It is the last that is said of the turn.
    Settles,
}

impl Part {
    fn number(self) -> u32 {
        match self {
            Part::Begins => 1,
            Part::Within => 2,
            Part::Ends => 3,
            Part::After => 4,
            Part::Settles => 5,
        }
    }

    fn of(number: u32) -> Option<Part> {
        [Part::Begins, Part::Within, Part::Ends, Part::After, Part::Settles].into_iter().find(|part| part.number() == number)
    }
}

/// A record that was read whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Record<'a> {
    /// Its number in the log, from 1, without gaps.
    pub(crate) number: u64,
    /// The number of the last record that was durable when it was written.
    pub(crate) durable: u64,
    /// Its part in its turn.
    pub(crate) part: Part,
    /// Its turn.
    pub(crate) turn: TurnId,
    /// The event, as JSON.
    pub(crate) event: &'a [u8],
}

impl Record<'_> {
    /// Appends the record. The event must not be longer than [`MAX_EVENT_BYTES`].
    pub(crate) fn write(&self, out: &mut Vec<u8>) {
        debug_assert!(self.event.len() <= MAX_EVENT_BYTES, "an event of {} bytes", self.event.len());
        let begin = out.len();
        out.reserve(record_bytes(self.event.len()));
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(&u32::try_from(self.event.len()).unwrap_or(u32::MAX).to_le_bytes());
        out.extend_from_slice(&self.part.number().to_le_bytes());
        out.extend_from_slice(&self.number.to_le_bytes());
        out.extend_from_slice(&self.durable.to_le_bytes());
        out.extend_from_slice(&self.turn.to_bytes());
        out.extend_from_slice(self.event);
        out.resize(begin + record_bytes(self.event.len()), 0);
        let checked = crc32c::crc32c(out.get(begin + 8..).unwrap_or_default());
        if let Some(place) = out.get_mut(begin + 4..begin + 8) {
            place.copy_from_slice(&checked.to_le_bytes());
        }
    }

    /// The record's size in the log.
    pub(crate) fn bytes(&self) -> usize {
        record_bytes(self.event.len())
    }
}

/// What stands at the beginning of some bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Read<'a> {
    /// A record.
    Record(Record<'a>),
    /// Nothing has been written here yet.
    Blank,
    /// Something that is no record, or not all of one.
    Broken,
}

/// Reads the record at the beginning of `bytes`.
pub(crate) fn read(bytes: &[u8]) -> Read<'_> {
    let Some(head) = bytes.first_chunk::<HEAD_BYTES>() else {
        return if bytes.iter().all(|byte| *byte == 0) { Read::Blank } else { Read::Broken };
    };
    if *head == [0; HEAD_BYTES] {
        return Read::Blank;
    }
    parse(bytes).map_or(Read::Broken, Read::Record)
}

fn parse(bytes: &[u8]) -> Option<Record<'_>> {
    let (magic, rest) = bytes.split_first_chunk::<4>()?;
    let (crc, checked) = rest.split_first_chunk::<4>()?;
    let (event_bytes, rest) = checked.split_first_chunk::<4>()?;
    let (part, rest) = rest.split_first_chunk::<4>()?;
    let (number, rest) = rest.split_first_chunk::<8>()?;
    let (durable, rest) = rest.split_first_chunk::<8>()?;
    let (turn, rest) = rest.split_first_chunk::<16>()?;
    let event_bytes = usize::try_from(u32::from_le_bytes(*event_bytes)).ok()?;
    if *magic != MAGIC || event_bytes > MAX_EVENT_BYTES {
        return None;
    }
    let checked = checked.get(..record_bytes(event_bytes) - 8)?;
    if crc32c::crc32c(checked) != u32::from_le_bytes(*crc) {
        return None;
    }
    Some(Record {
        number: u64::from_le_bytes(*number),
        durable: u64::from_le_bytes(*durable),
        part: Part::of(u32::from_le_bytes(*part))?,
        turn: TurnId::from_bytes(*turn),
        event: rest.get(..event_bytes)?,
    })
}

/// Where the next record begins in `bytes`, from a place where one should stand and does not.
pub(crate) fn next_record(bytes: &[u8]) -> Option<usize> {
    let places = (8..bytes.len()).step_by(8);
    places.into_iter().find(|at| bytes.get(*at..).is_some_and(|rest| rest.starts_with(&MAGIC) && parse(rest).is_some()))
}

/// Whether `bytes`, from a place where record `number` should stand, show that this record was durable once. Records begin at
/// multiples of 8.
pub(crate) fn was_durable(number: u64, bytes: &[u8]) -> bool {
    let places = (8..bytes.len()).step_by(8);
    let later = places.filter_map(|at| bytes.get(at..).filter(|rest| rest.starts_with(&MAGIC)).and_then(parse));
    later.into_iter().any(|later| later.durable >= number)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(number: u64, durable: u64, event: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        Record { number, durable, part: Part::Begins, turn: TurnId::fresh(), event }.write(&mut out);
        out
    }

    #[test]
    fn a_record_is_read_as_it_was_written() {
        for event in [&b""[..], b"x", b"12345678", &[b'y'; MAX_EVENT_BYTES]] {
            let turn = TurnId::fresh();
            let record = Record { number: 7, durable: 3, part: Part::Ends, turn, event };
            let mut out = Vec::new();
            record.write(&mut out);
            assert_eq!((out.len(), out.len() % 8), (record.bytes(), 0));
            assert_eq!(read(&out), Read::Record(record));
            out.extend_from_slice(&written(8, 3, b"next"));
            assert_eq!(read(&out), Read::Record(record));
        }
    }

    #[test]
    fn a_record_with_any_bit_flipped_is_none() {
        let whole = written(1, 0, br#"{"type":"turn.accepted.v1"}"#);
        for at in 0..whole.len() {
            for bit in 0..8 {
                let mut flipped = whole.clone();
                flipped[at] ^= 1 << bit;
                assert_eq!(read(&flipped), Read::Broken, "byte {at} bit {bit}");
            }
        }
    }

    #[test]
    fn a_record_cut_anywhere_is_none() {
        let whole = written(1, 0, br#"{"type":"turn.accepted.v1"}"#);
        assert_eq!(read(&[]), Read::Blank);
        assert_eq!(read(&[0; 4096]), Read::Blank);
        for cut in 1..whole.len() {
            assert_eq!(read(&whole[..cut]), Read::Broken, "cut at {cut}");
            let mut zeroed = whole[..cut].to_vec();
            zeroed.resize(4096, 0);
            // The padding at the end is zeros anyway.
            let padding = whole[cut..].iter().all(|byte| *byte == 0);
            assert_eq!(matches!(read(&zeroed), Read::Record(_)), padding, "zeros from {cut}");
        }
    }

    #[test]
    fn only_a_later_record_shows_that_one_was_durable() {
        let (lost, torn, later) = (written(5, 4, b"five"), written(6, 4, b"six"), written(7, 6, b"seven"));
        let blank = vec![0; lost.len()];
        assert!(!was_durable(5, &lost), "it does not vouch for itself");
        assert!(!was_durable(5, &[blank.clone(), torn.clone()].concat()), "of one group, any may be torn");
        assert!(was_durable(5, &[blank.clone(), torn, later.clone()].concat()));
        let mut far = vec![0xff; 800];
        far.extend_from_slice(&later);
        assert!(was_durable(5, &far) && !was_durable(7, &far));
        assert!(!was_durable(5, &[]));
    }
}
