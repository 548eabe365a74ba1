//! The files of the log: numbered segments of one size, taken from the disk whole before anything is written to them.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io,
    os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{FallocateFlags, fallocate},
    io::Errno,
};

use super::record::{self, MAX_RECORD_BYTES, Read, Record};

/// The largest segment there may be, whatever a file of that name says.
pub(crate) const MAX_SEGMENT_BYTES: u64 = 64 << 20;
/// The smallest: room for a good many records.
pub(crate) const MIN_SEGMENT_BYTES: u64 = 256 << 10;

const ENDING: &str = ".events";

/// The folder of a log, and the one process that writes to it.
#[derive(Debug)]
pub(crate) struct Folder {
    path: PathBuf,
    /// Held open so that names in it can be made durable.
    directory: File,
    /// Locked until it is dropped, or the process is gone.
    _lock: File,
}

impl Folder {
    /// Opens the folder, or makes it.
    ///
    /// Errors: it cannot be made, or another process writes to it.
    pub(crate) fn open(path: &Path) -> io::Result<Folder> {
        if !path.is_dir() {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(path)?;
            if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
                File::open(parent)?.sync_all()?;
            }
        }
        let lock = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(path.join("lock"))?;
        lock.try_lock().map_err(|refused| match refused {
            TryLockError::WouldBlock => io::Error::new(io::ErrorKind::ResourceBusy, "another process writes to it"),
            TryLockError::Error(error) => error,
        })?;
        let directory = File::open(path)?;
        Ok(Folder { path: path.to_owned(), directory, _lock: lock })
    }

    /// Where segment `number` is.
    pub(crate) fn path(&self, number: u64) -> PathBuf {
        self.path.join(name(number))
    }

    /// Makes segment `number` with `bytes` of room that the disk cannot take back. Nothing is left behind where that fails.
    pub(crate) fn create(&self, number: u64, bytes: u64) -> io::Result<File> {
        let path = self.path(number);
        let file = OpenOptions::new().create_new(true).read(true).write(true).mode(0o600).open(&path)?;
        let made = take(&file, bytes).and_then(|()| file.sync_all()).and_then(|()| self.directory.sync_all());
        if let Err(error) = made {
            drop(fs::remove_file(&path));
            return Err(error);
        }
        Ok(file)
    }

    /// Removes segment `number`.
    pub(crate) fn remove(&self, number: u64) -> io::Result<()> {
        fs::remove_file(self.path(number))?;
        self.directory.sync_all()
    }
}

/// Takes `bytes` for `file` from the disk.
fn take(file: &File, bytes: u64) -> io::Result<()> {
    match fallocate(file, FallocateFlags::empty(), 0, bytes) {
        // A file system that cannot promise room is made to give it.
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
            let zeros = vec![0; 1 << 20];
            let mut at = 0;
            while at < bytes {
                let piece = usize::try_from(bytes - at).unwrap_or(usize::MAX).min(zeros.len());
                file.write_all_at(zeros.get(..piece).unwrap_or_default(), at)?;
                at += piece as u64;
            }
            Ok(())
        }
        taken => Ok(taken?),
    }
}

fn name(number: u64) -> String {
    format!("{number:010}{ENDING}")
}

/// The numbers of the segments in a folder, the oldest first.
pub(crate) fn list(folder: &Path) -> io::Result<Vec<u64>> {
    let mut numbers = Vec::new();
    for entry in fs::read_dir(folder)? {
        let file = entry?.file_name();
        let number = file.to_str().and_then(|file| file.strip_suffix(ENDING)).and_then(|number| number.parse().ok());
        numbers.extend(number.filter(|number| name(*number).as_str() == file));
    }
    numbers.sort_unstable();
    Ok(numbers)
}

/// Opens segment `number` of a folder to read it.
pub(crate) fn open(folder: &Path, number: u64) -> io::Result<File> {
    File::open(folder.join(name(number)))
}

/// Reads the records of one segment, one after the other, with no more than two records in memory.
#[derive(Debug)]
pub(crate) struct Reader {
    file: File,
    /// Where the next record should begin.
    at: u64,
    /// What was read ahead, from `ahead_from` on.
    ahead: Vec<u8>,
    ahead_from: u64,
    /// How much is read ahead next time: less at the end of what is written, where most of it is read before there is anything.
    stride: usize,
}

/// How much is read ahead at least and at most, in bytes.
const STRIDES: [usize; 2] = [32 << 10, 256 << 10];
const _: () = assert!(STRIDES[0] > MAX_RECORD_BYTES);

impl Reader {
    pub(crate) fn new(file: File) -> Reader {
        Reader { file, at: 0, ahead: Vec::new(), ahead_from: 0, stride: STRIDES[0] }
    }

    /// Where the next record should begin, in bytes from the segment's beginning.
    pub(crate) fn at(&self) -> u64 {
        self.at
    }

    /// The next record, or what stands in its place. What is no record is looked at anew with every call: it may be one by then.
    pub(crate) fn next(&mut self) -> io::Result<Read<'_>> {
        let begin = usize::try_from(self.at - self.ahead_from).unwrap_or(usize::MAX);
        let there = self.ahead.get(begin..).unwrap_or_default();
        // What was read before it was written would stay broken for ever: only whole records are taken from what is there.
        let ahead_holds_it = there.len() >= MAX_RECORD_BYTES && matches!(record::read(there), Read::Record(_));
        let begin = if ahead_holds_it { begin } else { self.refill()? };
        let found = record::read(self.ahead.get(begin..).unwrap_or_default());
        if let Read::Record(Record { event, .. }) = found {
            self.at += record::record_bytes(event.len()) as u64;
        }
        Ok(found)
    }

    /// Goes on `bytes` further.
    pub(crate) fn skip(&mut self, bytes: u64) {
        self.at += bytes;
        self.ahead.clear();
        self.ahead_from = self.at;
    }

    fn refill(&mut self) -> io::Result<usize> {
        let left = self.file.metadata()?.len().saturating_sub(self.at);
        let read = usize::try_from(self.at - self.ahead_from).unwrap_or(usize::MAX);
        self.stride = if read >= self.stride / 2 { (self.stride * 2).min(STRIDES[1]) } else { STRIDES[0] };
        self.ahead.resize(self.stride.min(usize::try_from(left).unwrap_or(usize::MAX)), 0);
        self.ahead_from = self.at;
        let mut filled = 0;
        while let Some(room) = self.ahead.get_mut(filled..).filter(|room| !room.is_empty()) {
            match self.file.read_at(room, self.at + filled as u64) {
                Ok(0) => break,
                Ok(read) => filled += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.ahead.truncate(filled);
        Ok(0)
    }

    /// Everything from the next record's place to the end of the segment.
    ///
    /// Errors: there is more than a segment may have.
    pub(crate) fn rest(&self) -> io::Result<Vec<u8>> {
        let bytes = self.file.metadata()?.len();
        if bytes > MAX_SEGMENT_BYTES {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, "larger than any segment"));
        }
        let mut rest = vec![0; usize::try_from(bytes.saturating_sub(self.at)).unwrap_or(usize::MAX)];
        self.file.read_exact_at(&mut rest, self.at)?;
        Ok(rest)
    }
}

#[cfg(test)]
mod tests {
    use headgate_contracts::TurnId;

    use super::*;
    use crate::events::record::Part;

    #[test]
    fn a_folder_has_one_writer() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a/b");
        let first = Folder::open(&path).unwrap();
        assert_eq!(Folder::open(&path).unwrap_err().kind(), io::ErrorKind::ResourceBusy);
        drop(first);
        Folder::open(&path).unwrap();
    }

    #[test]
    fn a_segment_takes_its_room_at_once_and_is_listed_by_its_number() {
        let folder = tempfile::tempdir().unwrap();
        let opened = Folder::open(folder.path()).unwrap();
        for number in [12, 3] {
            let file = opened.create(number, MIN_SEGMENT_BYTES).unwrap();
            assert_eq!(file.metadata().unwrap().len(), MIN_SEGMENT_BYTES);
            assert!(std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap()) * 512 >= MIN_SEGMENT_BYTES);
        }
        fs::write(folder.path().join("7.events"), "not ours").unwrap();
        assert_eq!(list(folder.path()).unwrap(), [3, 12]);
        opened.remove(3).unwrap();
        assert_eq!(list(folder.path()).unwrap(), [12]);
    }

    #[test]
    fn records_written_after_a_reader_came_to_the_end_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let opened = Folder::open(folder.path()).unwrap();
        let file = opened.create(1, MIN_SEGMENT_BYTES).unwrap();
        let mut reader = Reader::new(open(folder.path(), 1).unwrap());
        let mut at = 0;
        for number in 1..=500_u64 {
            assert_eq!(reader.next().unwrap(), Read::Blank);
            let mut out = Vec::new();
            let event = vec![b'x'; number as usize];
            let record = Record { number, durable: 0, part: Part::Begins, turn: TurnId::fresh(), event: &event };
            record.write(&mut out);
            // Half of it first, as a reader may find it.
            file.write_all_at(&out[..out.len() / 2], at).unwrap();
            assert_eq!(reader.next().unwrap(), Read::Broken);
            file.write_all_at(&out, at).unwrap();
            assert_eq!(reader.next().unwrap(), Read::Record(record));
            at += out.len() as u64;
        }
        assert_eq!(reader.at(), at);
        assert_eq!(reader.rest().unwrap().len() as u64, MIN_SEGMENT_BYTES - at);
    }
}
