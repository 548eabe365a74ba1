//! Remembers across restarts the highest fence of each tenant, and where the chains of the audit end.
//!
//! One small file beside the event log, replaced as a whole: what it says is on disk before anything is done on its word.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use headgate_contracts::SessionId;
use headgate_policy::Digest;
use serde::{Deserialize, Serialize};

const NAME: &str = "training.json";
/// The most tenants that are remembered; more are refused.
const MOST: usize = 10_000;
/// What as many take is less.
const MAX_BYTES: u64 = 8 << 20;

/// The file, and what it says.
pub(crate) struct Fences {
    /// Nowhere, in a model of many lives.
    folder: Option<PathBuf>,
    kept: Mutex<Kept>,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Kept {
    /// Who writes the audit here: random.
    writer: String,
    tenants: BTreeMap<String, Of>,
}

/// What is remembered of a tenant.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
struct Of {
    /// The highest fence that was acted upon; 0: none.
    fence: u64,
    /// Number and hash of the last record of the audit that was acknowledged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    head: Option<(u64, Digest)>,
}

/// Where an orchestrator remembers that its chains of the audit end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Heads {
    /// Who writes them.
    pub writer: String,
    /// Number and hash of the last record that was acknowledged, by tenant.
    pub tenants: BTreeMap<String, (u64, Digest)>,
}

impl Heads {
    /// Those in `file`, the `training.json` beside an orchestrator's event log. Blocks.
    ///
    /// Errors: it cannot be read, or is none of ours.
    pub fn read(file: &Path) -> io::Result<Heads> {
        let Kept { writer, tenants } = kept(file)?;
        Ok(Heads { writer, tenants: tenants.into_iter().filter_map(|(tenant, of)| Some((tenant, of.head?))).collect() })
    }
}

fn kept(file: &Path) -> io::Result<Kept> {
    if fs::metadata(file)?.len() > MAX_BYTES {
        return Err(io::Error::other("training.json is too large to be ours"));
    }
    serde_json::from_slice(&fs::read(file)?).map_err(|_| io::Error::other("training.json cannot be understood"))
}

/// What became of a fence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Weighed {
    /// It is as high as any, and on disk.
    Good,
    /// A higher one was acted upon.
    Stale,
}

impl Fences {
    /// Those remembered in `folder`. Blocks.
    ///
    /// Errors: the file is there and cannot be read, or is none of ours: nobody knows then which fences are old.
    pub(crate) fn open(folder: &Path) -> io::Result<Fences> {
        let kept = match kept(&folder.join(NAME)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Kept { writer: SessionId::fresh().to_string(), tenants: BTreeMap::new() }
            }
            kept => kept?,
        };
        let fences = Fences { folder: Some(folder.to_owned()), kept: Mutex::new(kept) };
        fences.save(&fences.kept())?;
        Ok(fences)
    }

    /// Those that are remembered nowhere but here.
    #[cfg(test)]
    pub(super) fn unsaved() -> Fences {
        Fences { folder: None, kept: Mutex::default() }
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn save(&self, kept: &Kept) -> io::Result<()> {
        let Some(folder) = &self.folder else { return Ok(()) };
        let (path, next) = (folder.join(NAME), folder.join("training.json.next"));
        let mut file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&next)?;
        file.write_all(&serde_json::to_vec(kept)?)?;
        file.sync_all()?;
        fs::rename(&next, &path)?;
        File::open(folder)?.sync_all()
    }

    /// Changes what is remembered of `tenant`, on disk first.
    fn change(&self, tenant: &str, change: impl FnOnce(&mut Of)) -> io::Result<()> {
        let mut kept = self.kept();
        let mut next = kept.clone();
        if next.tenants.len() >= MOST && !next.tenants.contains_key(tenant) {
            return Err(io::Error::other("more tenants than are remembered"));
        }
        change(next.tenants.entry(tenant.to_owned()).or_default());
        self.save(&next)?;
        *kept = next;
        Ok(())
    }

    /// Who writes here.
    pub(crate) fn writer(&self) -> String {
        self.kept().writer.clone()
    }

    /// The highest fence of `tenant` that was acted upon; 0: none.
    pub(crate) fn highest(&self, tenant: &str) -> u64 {
        self.kept().tenants.get(tenant).map_or(0, |of| of.fence)
    }

    /// Whether a fence may be acted upon: it is not lower than another that was. Then it is remembered first. Blocks, where it is new.
    ///
    /// Errors: the disk did not take it, and it must not be acted upon.
    pub(crate) fn weigh(&self, tenant: &str, fence: u64) -> io::Result<Weighed> {
        let highest = self.highest(tenant);
        if fence == highest {
            return Ok(Weighed::Good);
        }
        let mut weighed = Weighed::Stale;
        if fence > highest {
            self.change(tenant, |of| {
                // Another may have been quicker.
                if fence >= of.fence {
                    (of.fence, weighed) = (fence, Weighed::Good);
                }
            })?;
        }
        Ok(weighed)
    }

    /// Where the chain of `tenant` ends in the topic.
    #[cfg(feature = "kafka")]
    pub(crate) fn head(&self, tenant: &str) -> Option<(u64, Digest)> {
        self.kept().tenants.get(tenant).and_then(|of| of.head)
    }

    /// The chain of `tenant` goes on from here. Blocks.
    ///
    /// Errors: the disk did not take it.
    #[cfg(feature = "kafka")]
    pub(crate) fn advance(&self, tenant: &str, seq: u64, hash: Digest) -> io::Result<()> {
        self.change(tenant, |of| of.head = Some((seq, hash)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_highest_fence_outlives_the_process_and_a_lower_one_is_stale() {
        let folder = tempfile::tempdir().unwrap();
        let fences = Fences::open(folder.path()).unwrap();
        assert_eq!((fences.highest("acme"), fences.weigh("acme", 5).unwrap()), (0, Weighed::Good));
        let again = Fences::open(folder.path()).unwrap();
        assert_eq!(again.writer(), fences.writer());
        for (fence, weighed) in [(4, Weighed::Stale), (5, Weighed::Good), (9, Weighed::Good), (5, Weighed::Stale), (8, Weighed::Stale)] {
            assert_eq!(again.weigh("acme", fence).unwrap(), weighed, "{fence}");
        }
        assert_eq!(again.weigh("other", 1).unwrap(), Weighed::Good, "tenants have fences of their own");
    }

    #[test]
    fn what_the_disk_does_not_take_is_not_acted_upon() {
        let folder = tempfile::tempdir().unwrap();
        let fences = Fences::open(folder.path()).unwrap();
        let gone = folder.path().to_owned();
        drop(folder);
        assert!(!gone.exists());
        assert!(fences.weigh("acme", 5).is_err());
        assert_eq!(fences.highest("acme"), 0);
    }

    #[test]
    fn a_file_that_cannot_be_understood_is_never_replaced_by_an_empty_one() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(NAME), "{").unwrap();
        assert!(Fences::open(folder.path()).is_err());
        assert_eq!(fs::read(folder.path().join(NAME)).unwrap(), b"{");
    }
}
