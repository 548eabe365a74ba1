//! Reads a log from outside, while it is written or after: record by record, across segments.

use std::{
    io,
    path::{Path, PathBuf},
};

use headgate_contracts::TurnId;

use super::{
    record::{Part, Read},
    segment::{self, Reader},
};

/// A record of a log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its number in the log, from 1, without gaps.
    pub number: u64,
    /// Its part in its turn.
    pub part: Part,
    /// Its turn.
    pub turn: TurnId,
    /// The event, as one line of JSON.
    pub event: Vec<u8>,
}

/// Reads a log from its oldest record on, and goes on with what is written meanwhile. It takes no lock and changes nothing.
#[derive(Debug)]
pub struct Follow {
    folder: PathBuf,
    segment: Option<(u64, Reader)>,
}

impl Follow {
    /// Reads the log in `folder`. It may be empty.
    ///
    /// Errors: there is no such folder.
    pub fn open(folder: &Path) -> io::Result<Follow> {
        segment::list(folder)?;
        Ok(Follow { folder: folder.to_owned(), segment: None })
    }

    /// Reads the log in `folder` from a segment on that holds record `number`, or from its oldest: earlier records may come first.
    #[cfg(feature = "kafka")]
    pub(super) fn from(folder: &Path, number: u64) -> io::Result<Follow> {
        let mut follow = Follow::open(folder)?;
        for segment in segment::list(folder)?.into_iter().rev() {
            let file = segment::open(folder, segment)?;
            let first = match Reader::new(file.try_clone()?).next()? {
                Read::Record(record) => record.number,
                Read::Blank | Read::Broken => continue,
            };
            follow.segment = Some((segment, Reader::new(file)));
            if first <= number {
                break;
            }
        }
        Ok(follow)
    }

    /// The next record; `None` where there is none yet: ask again later. What is torn or damaged counts as not there; `verify` tells.
    pub fn next_entry(&mut self) -> io::Result<Option<Entry>> {
        loop {
            if let Some(entry) = self.in_segment()? {
                return Ok(Some(entry));
            }
            let current = self.segment.as_ref().map(|(number, _)| *number);
            let later = segment::list(&self.folder)?.into_iter().find(|number| current.is_none_or(|current| *number > current));
            let Some(number) = later else { return Ok(None) };
            let file = match segment::open(&self.folder, number) {
                Ok(file) => file,
                // It was let go meanwhile.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            if current.is_some() {
                let has_begun = matches!(Reader::new(file.try_clone()?).next()?, Read::Record(_));
                if !has_begun {
                    return Ok(None);
                }
                // What this segment got between our look at it and the beginning of the next comes first.
                if let Some(entry) = self.in_segment()? {
                    return Ok(Some(entry));
                }
            }
            self.segment = Some((number, Reader::new(file)));
        }
    }

    fn in_segment(&mut self) -> io::Result<Option<Entry>> {
        let Some((_, reader)) = &mut self.segment else { return Ok(None) };
        Ok(match reader.next()? {
            Read::Record(record) => {
                Some(Entry { number: record.number, part: record.part, turn: record.turn, event: record.event.to_vec() })
            }
            Read::Blank | Read::Broken => None,
        })
    }
}
