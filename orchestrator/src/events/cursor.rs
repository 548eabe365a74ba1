//! How far a log has been taken to its topic, kept on disk beside it.
//!
//! The file has two places, written in turn, so that one of them is whole whatever happens while the other is written. Its room is
//! taken when it is made: a full disk must not keep a log from letting go of what was delivered.
//!
//! | bytes of a place | what, little endian |
//! |---|---|
//! | 0..4 | magic |
//! | 4..8 | CRC32C of everything that follows in the place |
//! | 8..16 | number of the last record that was delivered, with all before it |
//! | 16..512 | the topic's name, then zeros |

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::Path,
};

const NAME: &str = "delivered";
const MAGIC: [u8; 4] = *b"HGC1";
/// One sector: disks write it whole or not at all, mostly.
const PLACE_BYTES: usize = 512;

/// The last record that a topic has, with all before it.
#[derive(Debug)]
pub(super) struct Cursor {
    file: File,
    topic: String,
    number: u64,
    /// Which place is written next.
    next: u64,
}

impl Cursor {
    /// Opens the cursor of the log in `folder`, or makes one that stands before its first record. It stands there, too, where it
    /// cannot be read or is that of another topic: what is delivered twice is counted once, and what is not delivered is lost.
    ///
    /// Errors: its file cannot be used.
    pub(super) fn open(folder: &Path, topic: &str) -> io::Result<Cursor> {
        let path = folder.join(NAME);
        let file = OpenOptions::new().create(true).truncate(false).read(true).write(true).mode(0o600).open(path)?;
        let mut cursor = Cursor { file, topic: topic.to_owned(), number: 0, next: 0 };
        if cursor.file.metadata()?.len() != 2 * PLACE_BYTES as u64 {
            cursor.file.write_all_at(&[0; 2 * PLACE_BYTES], 0)?;
            cursor.file.set_len(2 * PLACE_BYTES as u64)?;
            cursor.file.sync_all()?;
            File::open(folder)?.sync_all()?;
            return Ok(cursor);
        }
        let mut found: Option<(u64, String, u64)> = None;
        for place in 0..2 {
            let mut bytes = [0; PLACE_BYTES];
            cursor.file.read_exact_at(&mut bytes, place * PLACE_BYTES as u64)?;
            if let Some((number, of)) = read(&bytes)
                && found.as_ref().is_none_or(|(highest, ..)| number > *highest)
            {
                found = Some((number, of, 1 - place));
            }
        }
        if let Some((number, of, next)) = found {
            cursor.next = next;
            if of == topic {
                cursor.number = number;
            } else {
                tracing::warn!(was = of, now = topic, "the event log goes to another topic: everything that is kept is delivered there");
                // Lest the place that is left be read as that of this topic's predecessor for ever.
                cursor.save(0)?;
                cursor.save(0)?;
            }
        }
        Ok(cursor)
    }

    /// The same for a log that holds the records from `first` up to `next`: a cursor beyond them is of another log, and one before
    /// them lost what was let go.
    pub(super) fn within(mut self, first: u64, next: u64) -> io::Result<Cursor> {
        if self.number >= next {
            tracing::warn!(
                delivered = self.number,
                next,
                "the event log ends before what was delivered of it: all of it is delivered again"
            );
            self.save(first - 1)?;
        } else if self.number + 1 < first {
            tracing::warn!(lost = first - 1 - self.number, "events were let go before they were delivered");
            self.save(first - 1)?;
        }
        Ok(self)
    }

    /// The number of the last record that was delivered, with all before it.
    pub(super) fn number(&self) -> u64 {
        self.number
    }

    /// Moves it, and waits until the disk has it.
    ///
    /// Errors: the disk did not take it. It stands where it stood.
    pub(super) fn save(&mut self, number: u64) -> io::Result<()> {
        self.file.write_all_at(&written(number, &self.topic), self.next * PLACE_BYTES as u64)?;
        self.file.sync_data()?;
        (self.number, self.next) = (number, 1 - self.next);
        Ok(())
    }
}

fn written(number: u64, topic: &str) -> Vec<u8> {
    let mut rest = number.to_le_bytes().to_vec();
    rest.extend_from_slice(topic.as_bytes());
    rest.resize(PLACE_BYTES - 8, 0);
    [&MAGIC[..], &crc32c::crc32c(&rest).to_le_bytes(), &rest].concat()
}

fn read(place: &[u8]) -> Option<(u64, String)> {
    let (magic, rest) = place.split_first_chunk::<4>()?;
    let (crc, rest) = rest.split_first_chunk::<4>()?;
    if *magic != MAGIC || crc32c::crc32c(rest) != u32::from_le_bytes(*crc) {
        return None;
    }
    let (number, topic) = rest.split_first_chunk::<8>()?;
    let topic = topic.split(|byte| *byte == 0).next()?;
    Some((u64::from_le_bytes(*number), str::from_utf8(topic).ok()?.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_is_where_it_was_saved_last() {
        let folder = tempfile::tempdir().unwrap();
        let mut cursor = Cursor::open(folder.path(), "events").unwrap();
        assert_eq!(cursor.number(), 0);
        for number in [3, 7, 8] {
            cursor.save(number).unwrap();
            assert_eq!(Cursor::open(folder.path(), "events").unwrap().number(), number);
        }
    }

    #[test]
    fn a_cursor_torn_at_any_byte_stands_where_it_stood_before() {
        let folder = tempfile::tempdir().unwrap();
        let mut cursor = Cursor::open(folder.path(), "events").unwrap();
        cursor.save(5).unwrap();
        let place = cursor.next;
        let before = std::fs::read(folder.path().join(NAME)).unwrap();
        let next = written(6, "events");
        for torn in 0..=PLACE_BYTES {
            let mut bytes = before.clone();
            let begin = place as usize * PLACE_BYTES;
            bytes[begin..begin + torn].copy_from_slice(&next[..torn]);
            std::fs::write(folder.path().join(NAME), bytes).unwrap();
            let number = Cursor::open(folder.path(), "events").unwrap().number();
            let whole = next[torn..].iter().all(|byte| *byte == 0);
            assert_eq!(number, if whole { 6 } else { 5 }, "torn at {torn}");
        }
    }

    #[test]
    fn for_another_topic_a_cursor_begins_anew() {
        let folder = tempfile::tempdir().unwrap();
        Cursor::open(folder.path(), "events").unwrap().save(9).unwrap();
        assert_eq!(Cursor::open(folder.path(), "others").unwrap().number(), 0);
        assert_eq!(Cursor::open(folder.path(), "events").unwrap().number(), 0);
    }
}
