//! Keeps a key for each subject, so that what was sealed with it can be erased by destroying 60 bytes.
//!
//! ```text
//! master key ──▶ of-<keyed hash of tenant and subject> ─┐  two names of one file:
//!                key-<name of the key> ─────────────────┴─ the subject's key, wrapped with the master key
//!                    └──▶ a key per sealer ──▶ nonces that count from 1
//! ```
//!
//! The name of a key comes of the key itself. It stands in for the subject wherever what was sealed is kept, and with the key goes
//! the only thing that leads from the one to the other: nobody can tell any more whose it was, whoever holds the master key.
//!
//! A master key is rotated while the keys are in use: its file has the new one and the old, and each key in the folder is wrapped anew in
//! its place. What stands there opens with one of the two at every moment, and whoever finds a key that it cannot open reads the file
//! again. Names stay what they were: the key that they are made with is wrapped, too.
//!
//! A copy of what was sealed is erased with the key, wherever it is. A copy of the folder with the keys is not: see `docs/operate.md`.

use std::{
    fmt,
    fs::{self, File},
    io::{self, Read, Write},
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
};

use aws_lc_rs::{
    aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey},
    error::Unspecified,
    hkdf::{HKDF_SHA256, KeyType, Prk, Salt},
    hmac,
};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use serde_json::json;
use zeroize::Zeroizing;

use crate::{
    KeyFault,
    audit::{Audit, AuditFault},
    keys::{bytes_32, refuse_exposed, write_private},
};

/// The action of the record that says that a subject's key is about to be destroyed.
pub const FORGOTTEN: &str = "subject.forgotten";

const KEY: usize = 32;
const TAG: usize = 16;
/// A nonce, then the key and its tag.
const WRAPPED: usize = NONCE_LEN + KEY + TAG;
/// The random part of what a sealer's own key is made of.
const SALT: usize = 16;
/// How often a nonce is written after the salt: the number of what was sealed, big endian.
const COUNT: usize = 4;
/// How often another process may come between before that is a fault.
const TRIES: u32 = 8;
/// The file that tells whether a master key is the one of the folder.
const MASTER: &str = "master";
/// The key that names are made with, wrapped as subjects' keys are; before the first rotation it is made of the master key.
const NAMES: &str = "names";
/// Keys that are being wrapped anew: in which file what is to stand, and at last a line that says that this is all.
const JOURNAL: &str = "wrapping";
const ALL: &str = "all";
/// Keys wrapped anew at once.
const AT_ONCE: usize = 256;
/// Master keys that a file may hold: the latest and those before.
const MOST_MASTERS: usize = 4;
/// The actions of the records that say that a master key is followed by another, and that only the latest is left.
const ROTATED: &str = "master.rotated";
const RETIRED: &str = "master.retired";
/// Begins the name of a key that is about to be destroyed.
const GONE: &str = "gone-";

/// The key that wraps all others: 32 bytes, in a file of its own as base64url. Whoever has it and the folder can read everything
/// that was not erased. While it is rotated, the file has a line for each key, the latest first.
pub struct Master {
    keys: Vec<Prk>,
    path: PathBuf,
}

impl Master {
    /// Makes a file with a fresh one, mode 0600. It never replaces one.
    ///
    /// Errors: [`KeyFault::Io`], [`KeyFault::Random`].
    pub fn generate(path: &Path) -> Result<(), KeyFault> {
        let line = fresh_line()?;
        write_private(path, line.as_bytes()).map_err(|source| KeyFault::Io { path: path.to_owned(), source })
    }

    /// Reads its file, or makes it where there is none: for what needs no copy elsewhere.
    ///
    /// Errors: as of [`Master::generate`] and [`Master::load`].
    fn load_or_generate(path: &Path) -> Result<Master, KeyFault> {
        match Master::load(path) {
            Err(KeyFault::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
            found => return found,
        }
        let name = fresh_name().map_err(|_| KeyFault::Random)?;
        let new = path.with_file_name(format!("new-{name}"));
        Master::generate(&new)?;
        // It is there whole or not at all; of two that begin at once, one puts it there.
        let placed = fs::hard_link(&new, path);
        let placed = fs::remove_file(&new).and(match placed {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            placed => placed,
        });
        placed.map_err(|source| KeyFault::Io { path: path.to_owned(), source })?;
        Master::load(path)
    }

    /// Reads its file. One that others can read is refused, as a ring's is.
    ///
    /// Errors: [`KeyFault::Io`], [`KeyFault::Exposed`], [`KeyFault::Malformed`].
    pub fn load(path: &Path) -> Result<Master, KeyFault> {
        let fault = |source| KeyFault::Io { path: path.to_owned(), source };
        let file = File::open(path).map_err(fault)?;
        refuse_exposed(&file.metadata().map_err(fault)?, path)?;
        let mut lines = Zeroizing::new(String::with_capacity(512));
        file.take(256).read_to_string(&mut lines).map_err(fault)?;
        let malformed = || KeyFault::Malformed("master key: expected 32 bytes as base64url, as `headgate events key` writes them");
        let key = |line| {
            let key = Zeroizing::new(bytes_32(line).ok_or_else(malformed)?);
            Ok(Prk::new_less_safe(HKDF_SHA256, key.as_slice()))
        };
        let keys = lines.trim_end().split('\n').map(key).collect::<Result<Vec<_>, KeyFault>>()?;
        if keys.len() > MOST_MASTERS {
            return Err(malformed());
        }
        Ok(Master { keys, path: path.to_owned() })
    }

    /// Writes the file anew, with `change` of its lines.
    fn exchange(path: &Path, change: impl FnOnce(&str) -> Zeroizing<String>) -> Result<(), KeyFault> {
        let fault = |source| KeyFault::Io { path: path.to_owned(), source };
        let lines = Zeroizing::new(fs::read_to_string(path).map_err(fault)?);
        replace(path, change(&lines).as_bytes()).map_err(fault)
    }
}

impl fmt::Debug for Master {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Master")
    }
}

/// A fresh master key, as its file has it.
fn fresh_line() -> Result<Zeroizing<String>, KeyFault> {
    let mut key = Zeroizing::new([0; KEY]);
    random(key.as_mut_slice()).map_err(|_| KeyFault::Random)?;
    let mut line = Zeroizing::new(String::with_capacity(64));
    URL_SAFE_NO_PAD.encode_string(key.as_slice(), &mut line);
    line.push('\n');
    Ok(line)
}

/// The key that names are made with in a folder that began with this master key.
fn names_of(master: &Prk) -> Result<Zeroizing<Vec<u8>>, Unspecified> {
    struct Bytes;
    impl KeyType for Bytes {
        fn len(&self) -> usize {
            KEY
        }
    }
    let mut names = Zeroizing::new(vec![0; KEY]);
    master.expand(&[b"headgate: names of subjects"], Bytes)?.fill(&mut names)?;
    Ok(names)
}

/// What tells a master key from others.
fn id_of(master: &Prk) -> Result<String, Unspecified> {
    Ok(Names::of(names_of(master)?).keyed("master", &[]))
}

/// What wraps keys, by each master key in turn.
fn wraps(master: &Master) -> Result<Arc<[LessSafeKey]>, Unspecified> {
    let wrap = |key: &Prk| key.expand(&[b"headgate: keys of subjects"], &AES_256_GCM).map(UnboundKey::from).map(LessSafeKey::new);
    master.keys.iter().map(wrap).collect()
}

/// Puts `bytes` in place of a file: it is there whole, before or after.
fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let name = fresh_name().map_err(io::Error::other)?;
    let new = path.with_file_name(format!("new-{name}"));
    write_private(&new, bytes)?;
    fs::rename(&new, path)?;
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    File::open(folder.unwrap_or(Path::new(".")))?.sync_all()
}

/// Names that stand for people: the same for the same person for as long as the key is, and nothing leads back from them without it.
pub struct Names {
    key: hmac::Key,
    bytes: Zeroizing<Vec<u8>>,
}

impl Names {
    /// Names under the key in a file, which is made (mode 0600) where there is none.
    ///
    /// Errors: [`KeyFault::Io`], [`KeyFault::Exposed`], [`KeyFault::Malformed`], [`KeyFault::Random`].
    pub fn open(path: &Path) -> Result<Names, KeyFault> {
        let master = Master::load_or_generate(path)?;
        master.keys.first().ok_or(Unspecified).and_then(names_of).map(Names::of).map_err(|_| KeyFault::Random)
    }

    fn of(bytes: Zeroizing<Vec<u8>>) -> Names {
        Names { key: hmac::Key::new(hmac::HMAC_SHA256, &bytes), bytes }
    }

    /// The name of a tenant's subject: 22 characters of base64url.
    pub fn subject(&self, tenant: &str, subject: &str) -> String {
        self.keyed("subject", &[tenant, subject])
    }

    /// 128 bits of a keyed hash, as 22 characters.
    fn keyed(&self, what: &str, of: &[&str]) -> String {
        let mut context = hmac::Context::with_key(&self.key);
        for part in std::iter::once(&what).chain(of) {
            context.update(&(part.len() as u64).to_be_bytes());
            context.update(part.as_bytes());
        }
        URL_SAFE_NO_PAD.encode(context.sign().as_ref().get(..16).unwrap_or_default())
    }
}

impl fmt::Debug for Names {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Names")
    }
}

/// What became of keys that were to be wrapped anew.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Rewrapped {
    /// Keys that the latest master key wraps now, and did not before.
    pub wrapped: usize,
    /// All keys of subjects that there are.
    pub keys: usize,
}

impl std::iter::Sum for Rewrapped {
    fn sum<I: Iterator<Item = Rewrapped>>(all: I) -> Rewrapped {
        all.fold(Rewrapped::default(), |sum, one| Rewrapped { wrapped: sum.wrapped + one.wrapped, keys: sum.keys + one.keys })
    }
}

/// The keys of all subjects, in one folder. Any number of processes may use it at once; none of them keeps a subject's key: each use
/// reads it again, so that one which is destroyed is destroyed for all.
pub struct Vault {
    folder: PathBuf,
    /// The file of the master key.
    master: PathBuf,
    /// What wraps keys, by each master key that the file had when it was read last.
    wraps: RwLock<Arc<[LessSafeKey]>>,
    names: Names,
}

impl Vault {
    /// Opens the folder, or makes it with mode 0700. Finishes what a crash kept from being destroyed.
    ///
    /// Errors: [`VaultFault::Io`]; [`VaultFault::OtherMaster`] where its keys were wrapped with another.
    pub fn open(folder: &Path, master: &Master) -> Result<Vault, VaultFault> {
        let ids = master.keys.iter().map(id_of).collect::<Result<Vec<_>, _>>()?;
        let latest = master.keys.first().ok_or(Unspecified)?;
        let mut vault = Vault {
            folder: folder.to_owned(),
            master: master.path.clone(),
            wraps: RwLock::new(wraps(master)?),
            names: Names::of(names_of(latest)?),
        };
        let fault = |source| vault.fault(source);
        let mut builder = fs::DirBuilder::new();
        #[cfg(unix)]
        std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
        builder.recursive(true).create(folder).map_err(fault)?;
        let (path, name) = (folder.join(MASTER), id_of(latest)?);
        match fs::read(&path) {
            Ok(found) => {
                let began = ids.iter().position(|id| found == id.as_bytes()).and_then(|at| master.keys.get(at));
                vault.names = Names::of(names_of(began.ok_or_else(|| VaultFault::OtherMaster(folder.to_owned()))?)?);
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                // It is there whole or not at all; of two that begin at once, one puts it there.
                let new = folder.join(format!("{MASTER}-{}", fresh_name()?));
                let placed = write_private(&new, name.as_bytes()).and_then(|()| fs::hard_link(&new, &path));
                fs::remove_file(&new).map_err(fault)?;
                match placed {
                    Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Vault::open(folder, master),
                    done => done.and_then(|()| vault.sync()).map_err(fault)?,
                }
            }
            Err(error) => return Err(fault(error)),
        }
        vault.finish()?;
        if let Some(names) = vault.key(&folder.join(NAMES))? {
            vault.names = Names::of(names);
        }
        Ok(vault)
    }

    /// Finishes what a crash left half done.
    fn finish(&self) -> Result<(), VaultFault> {
        let fault = |source| self.fault(source);
        let mut left = Vec::new();
        for entry in fs::read_dir(&self.folder).map_err(fault)? {
            let name = entry.map_err(fault)?.file_name();
            left.extend(name.to_str().filter(|name| name.starts_with(GONE) || *name == JOURNAL).map(str::to_owned));
        }
        if left.is_empty() {
            return Ok(());
        }
        let _alone = self.alone().map_err(fault)?;
        self.apply().map_err(fault)?;
        for gone in left.iter().filter(|name| name.starts_with(GONE)) {
            self.destroy(&self.folder.join(gone))?;
        }
        Ok(())
    }

    /// Keeps others from destroying keys and from wrapping them anew, for as long as what it gives is held.
    fn alone(&self) -> io::Result<File> {
        let lock = File::open(&self.folder)?;
        lock.lock()?;
        Ok(lock)
    }

    /// Has a new master key wrap the keys in `folder`, on record. Where the file of the master key has several, a new one was made
    /// before, and only what it does not wrap yet is wrapped: for a second folder, or after a crash. Whoever uses the folder meanwhile
    /// goes on. `now`: Unix seconds. `actor`: who does it.
    ///
    /// Errors: [`VaultFault`]; do it again, it ends what was begun.
    pub fn rotate(master: &Path, folder: &Path, audit: &mut Audit, actor: &str, now: u64) -> Result<Rewrapped, VaultFault> {
        let before = Master::load(master)?;
        // That the folder is this key's is known before anything is changed.
        let vault = Vault::open(folder, &before)?;
        if let [only] = &before.keys[..] {
            audit.append(now, ROTATED, actor, json!({"master": id_of(only)?}))?;
            let line = fresh_line()?;
            Master::exchange(master, |lines| Zeroizing::new(format!("{}{lines}", *line)))?;
            vault.reread()?;
        }
        vault.rewrap()
    }

    /// Leaves only the latest key in the file of the master key, on record, once it wraps all keys in `folders`: with an older one
    /// nothing can be opened any more.
    ///
    /// Errors: [`VaultFault`]; nothing is left out then.
    pub fn retire(master: &Path, folders: &[PathBuf], audit: &mut Audit, actor: &str, now: u64) -> Result<Rewrapped, VaultFault> {
        let found = Master::load(master)?;
        let all = folders.iter().map(|folder| Vault::open(folder, &found)?.rewrap()).sum::<Result<Rewrapped, VaultFault>>()?;
        if let [latest, _, ..] = &found.keys[..] {
            audit.append(now, RETIRED, actor, json!({"master": id_of(latest)?}))?;
            let first = |lines: &str| lines.split_inclusive('\n').next().unwrap_or_default().to_owned();
            Master::exchange(master, |lines| Zeroizing::new(first(lines)))?;
        }
        Ok(all)
    }

    /// Has the latest master key wrap what others wrap.
    fn rewrap(&self) -> Result<Rewrapped, VaultFault> {
        let fault = |source| self.fault(source);
        let latest = id_of(Master::load(&self.master)?.keys.first().ok_or(Unspecified)?)?;
        let mut done = Rewrapped::default();
        let mut all = vec![NAMES.to_owned()];
        for entry in fs::read_dir(&self.folder).map_err(fault)? {
            let name = entry.map_err(fault)?.file_name();
            all.extend(name.to_str().filter(|name| name.starts_with("key-")).map(str::to_owned));
        }
        for some in all.chunks(AT_ONCE) {
            let _alone = self.alone().map_err(fault)?;
            let mut journal = String::new();
            for name in some {
                let (path, is_subject) = (self.folder.join(name), name != NAMES);
                let (key, by) = match self.opened(&path)? {
                    Some(found) => found,
                    // Here they are kept for the first time.
                    None if !is_subject => {
                        replace(&path, &self.wrapped(&self.names.bytes)?).map_err(fault)?;
                        continue;
                    }
                    // It was destroyed meanwhile.
                    None => continue,
                };
                done.keys += usize::from(is_subject);
                if by > 0 {
                    done.wrapped += usize::from(is_subject);
                    journal.push_str(&format!("{name} {}\n", URL_SAFE_NO_PAD.encode(self.wrapped(&key)?)));
                }
            }
            if !journal.is_empty() {
                journal.push_str(ALL);
                write_private(&self.folder.join(JOURNAL), journal.as_bytes()).and_then(|()| self.sync()).map_err(fault)?;
                self.apply().map_err(fault)?;
            }
        }
        // From here on the folder is the latest key's: all that names are made of is in it, too.
        replace(&self.folder.join(MASTER), latest.as_bytes()).map_err(fault)?;
        Ok(done)
    }

    /// Does what the journal says, if there is one, and removes it. Some of it may have been done before.
    fn apply(&self) -> io::Result<()> {
        let path = self.folder.join(JOURNAL);
        let journal = match fs::read_to_string(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            journal => journal?,
        };
        // Without its last line it was never whole, and nothing was done of it. What cannot be read was done, and is half removed.
        let lines = journal.strip_suffix(ALL).unwrap_or_default().lines().filter_map(|line| line.split_once(' '));
        let whole = lines.filter_map(|(name, wrapped)| Some((name, URL_SAFE_NO_PAD.decode(wrapped).ok()?)));
        for (name, wrapped) in whole.filter(|(name, wrapped)| wrapped.len() == WRAPPED && !name.contains(['\0', '/'])) {
            // In its place: its other name is that of the same file, and nothing of the old is left behind.
            match File::options().write(true).open(self.folder.join(name)) {
                Ok(mut file) => file.write_all(&wrapped).and_then(|()| file.sync_all())?,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        let mut file = File::options().write(true).open(&path)?;
        file.write_all(&vec![0; journal.len()])?;
        file.sync_all()?;
        fs::remove_file(&path)?;
        self.sync()
    }

    /// What seals text of a subject. Makes the subject's key where there is none, and then waits for the disk.
    ///
    /// Errors: [`VaultFault::Io`], [`VaultFault::Damaged`], [`VaultFault::Random`].
    pub fn sealer(&self, tenant: &str, subject: &str) -> Result<Sealer, VaultFault> {
        let path = self.of(tenant, subject);
        for _ in 0..TRIES {
            let key = match self.key(&path)? {
                Some(key) => key,
                None => match self.make(&path)? {
                    Some(key) => key,
                    // Another made it meanwhile.
                    None => continue,
                },
            };
            let mut salt = [0; SALT];
            random(&mut salt)?;
            return Ok(Sealer { name: name(&key)?, key: of_salt(&key, &salt)?, salt, count: 0 });
        }
        Err(self.fault(io::Error::other("the key is made and destroyed again and again")))
    }

    /// The name that stands for a session of a tenant where anybody may look: only who has the master key can tell whether it is
    /// one that they know.
    pub fn session(&self, tenant: &str, session: &str) -> String {
        self.names.keyed("session", &[tenant, session])
    }

    /// What was sealed under a key of that name, bound to `bound`.
    ///
    /// Errors: [`VaultFault::Io`], [`VaultFault::Damaged`].
    pub fn open_sealed(&self, name: &str, bound: &[u8], sealed: &str) -> Result<Opened, VaultFault> {
        let is_name = name.len() == 22 && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'));
        if !is_name {
            return Ok(Opened::Altered);
        }
        let Some(key) = self.key(&self.folder.join(format!("key-{name}")))? else { return Ok(Opened::Erased) };
        Ok(self.unseal(&key, bound, sealed).map_or(Opened::Altered, Opened::Text))
    }

    fn unseal(&self, key: &[u8], bound: &[u8], sealed: &str) -> Option<Vec<u8>> {
        let sealed = URL_SAFE_NO_PAD.decode(sealed).ok()?;
        let (salt, rest) = sealed.split_first_chunk::<SALT>()?;
        let (count, text) = rest.split_first_chunk::<COUNT>()?;
        let mut text = text.to_vec();
        let length = of_salt(key, salt).ok()?.open_in_place(nonce(u32::from_be_bytes(*count)), Aad::from(bound), &mut text).ok()?.len();
        text.truncate(length);
        Some(text)
    }

    /// Destroys the key of a subject, on record: `true` where there was one. What was sealed under it, here and in every copy, nobody
    /// can read any more, and nobody can tell whose it was. A sealer that is in use seals on under the destroyed key; the next one
    /// makes another.
    ///
    /// `now`: Unix seconds. `actor`: who does it. Errors: [`VaultFault`]; do it again, it ends what was begun.
    pub fn forget(&self, tenant: &str, subject: &str, audit: &mut Audit, actor: &str, now: u64) -> Result<bool, VaultFault> {
        let path = self.of(tenant, subject);
        // The name is not recorded: the record would lead from the subject's hash to its events.
        let hash = self.names.keyed("of", &[tenant, subject]);
        let was = path.try_exists().map_err(|source| self.fault(source))?;
        audit.append(now, FORGOTTEN, actor, json!({"tenant": tenant, "subject_hash": hash, "had_key": was}))?;
        let gone = self.folder.join(format!("{GONE}{}", fresh_name()?));
        let _alone = self.alone().map_err(|source| self.fault(source))?;
        // Nothing may write to a key that is being destroyed, nor hold a copy of it.
        self.apply().map_err(|source| self.fault(source))?;
        // From here on nobody finds it by the subject, and a crash leaves a name that says what is to be done.
        match fs::rename(&path, &gone) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(self.fault(error)),
        }
        self.sync().map_err(|source| self.fault(source))?;
        self.destroy(&gone)?;
        Ok(true)
    }

    /// Overwrites a key under both its names, and removes them.
    fn destroy(&self, gone: &Path) -> Result<(), VaultFault> {
        let fault = |source| self.fault(source);
        let other = match self.key(gone) {
            Ok(Some(key)) => Some(self.folder.join(format!("key-{}", name(&key)?))),
            // It is overwritten already, or was never whole: its other name, if there is one, leads to nothing.
            Ok(None) | Err(VaultFault::Damaged(_)) => None,
            Err(error) => return Err(error),
        };
        let overwrite = |path: &Path| -> io::Result<()> {
            let mut file = File::options().write(true).open(path)?;
            file.write_all(&[0; WRAPPED])?;
            file.sync_all()
        };
        let missing = |done: io::Result<()>| match done {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            done => done,
        };
        if let Some(other) = other {
            // One file where the folder was not copied; a copy has two.
            missing(overwrite(&other)).and_then(|()| missing(fs::remove_file(&other))).map_err(fault)?;
        }
        missing(overwrite(gone)).and_then(|()| missing(fs::remove_file(gone))).and_then(|()| self.sync()).map_err(fault)
    }

    /// The key in a file; `None` where there is none any more.
    fn key(&self, path: &Path) -> Result<Option<Zeroizing<Vec<u8>>>, VaultFault> {
        for _ in 0..TRIES {
            match self.opened(path) {
                // Another process has rotated the master key, or is just writing.
                Err(VaultFault::Damaged(_)) => self.reread()?,
                found => return Ok(found?.map(|(key, _)| key)),
            }
        }
        Ok(self.opened(path)?.map(|(key, _)| key))
    }

    /// Reads the master keys again.
    fn reread(&self) -> Result<(), VaultFault> {
        let found = wraps(&Master::load(&self.master)?)?;
        *self.wraps.write().unwrap_or_else(PoisonError::into_inner) = found;
        Ok(())
    }

    fn wraps(&self) -> Arc<[LessSafeKey]> {
        self.wraps.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The key in a file, and which of the master keys wraps it, from 0 for the latest; `None` where there is none any more.
    fn opened(&self, path: &Path) -> Result<Option<Opening>, VaultFault> {
        let file = match File::open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            file => file.map_err(|source| self.fault(source))?,
        };
        let mut wrapped = Zeroizing::new(Vec::with_capacity(2 * WRAPPED));
        file.take(WRAPPED as u64 + 1).read_to_end(&mut wrapped).map_err(|source| self.fault(source))?;
        if wrapped.len() == WRAPPED && wrapped.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        for (by, wrap) in self.wraps().iter().enumerate() {
            let mut wrapped = wrapped.clone();
            let Some((nonce, sealed)) = wrapped.split_first_chunk_mut::<NONCE_LEN>() else { break };
            if let Ok(key) = wrap.open_in_place(Nonce::assume_unique_for_key(*nonce), Aad::empty(), sealed) {
                return Ok(Some((Zeroizing::new(key.to_vec()), by)));
            }
        }
        Err(VaultFault::Damaged(path.to_owned()))
    }

    /// A key, wrapped with the latest master key.
    fn wrapped(&self, key: &[u8]) -> Result<Vec<u8>, VaultFault> {
        let wraps = self.wraps();
        let latest = wraps.first().ok_or(Unspecified)?;
        // Random nonces: with 2^32 subjects under one master key two are the same with a chance of 2^-33 (SP 800-38D section 8.3).
        let mut at = [0; NONCE_LEN];
        random(&mut at)?;
        let mut sealed = Zeroizing::new(Vec::with_capacity(WRAPPED));
        sealed.extend_from_slice(key);
        latest.seal_in_place_append_tag(Nonce::assume_unique_for_key(at), Aad::empty(), &mut *sealed)?;
        Ok([&at[..], &sealed].concat())
    }

    /// Makes a key and gives it that name; `None` where another has it by now.
    fn make(&self, of: &Path) -> Result<Option<Zeroizing<Vec<u8>>>, VaultFault> {
        let mut key = Zeroizing::new(vec![0; KEY]);
        random(&mut key)?;
        // Wrapped with the latest there is by now: this is seldom, and waits for the disk anyway.
        self.reread()?;
        let path = self.folder.join(format!("key-{}", name(&key)?));
        write_private(&path, &self.wrapped(&key)?).map_err(|source| self.fault(source))?;
        match fs::hard_link(&path, of) {
            Ok(()) => self.sync().map_err(|source| self.fault(source)).map(|()| Some(key)),
            Err(error) => {
                fs::remove_file(&path).map_err(|source| self.fault(source))?;
                if error.kind() == io::ErrorKind::AlreadyExists { Ok(None) } else { Err(self.fault(error)) }
            }
        }
    }

    fn of(&self, tenant: &str, subject: &str) -> PathBuf {
        self.folder.join(format!("of-{}", self.names.keyed("of", &[tenant, subject])))
    }

    fn sync(&self) -> io::Result<()> {
        File::open(&self.folder)?.sync_all()
    }

    fn fault(&self, source: io::Error) -> VaultFault {
        VaultFault::Io { folder: self.folder.clone(), source }
    }
}

impl fmt::Debug for Vault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vault").field("folder", &self.folder).finish_non_exhaustive()
    }
}

/// Seals pieces of text of one subject under a key of its own, made of the subject's and of 128 random bits. So its nonces may simply
/// count: no other sealer has that key, and this one counts each of them once.
pub struct Sealer {
    name: String,
    key: LessSafeKey,
    salt: [u8; SALT],
    count: u32,
}

impl Sealer {
    /// The name of the subject's key, which stands in for the subject: 22 characters of base64url.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Seals a piece, bound to `bound`: with any other it cannot be opened.
    ///
    /// Errors: it has sealed all that one key may: 2^32 pieces.
    pub fn seal(&mut self, bound: &[u8], text: &[u8]) -> Result<String, VaultFault> {
        self.count = self.count.checked_add(1).ok_or(VaultFault::Random)?;
        let mut sealed = Zeroizing::new(Vec::with_capacity(text.len() + TAG));
        sealed.extend_from_slice(text);
        self.key.seal_in_place_append_tag(nonce(self.count), Aad::from(bound), &mut *sealed)?;
        Ok(URL_SAFE_NO_PAD.encode([&self.salt[..], &self.count.to_be_bytes(), &sealed].concat()))
    }
}

impl fmt::Debug for Sealer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sealer").field("name", &self.name).finish_non_exhaustive()
    }
}

/// A subject's key, and which of the master keys wraps it.
type Opening = (Zeroizing<Vec<u8>>, usize);

/// What became of something sealed.
#[derive(Clone, PartialEq, Eq)]
pub enum Opened {
    /// The text.
    Text(Vec<u8>),
    /// Its key was destroyed.
    Erased,
    /// It is not what was sealed, or not where it was.
    Altered,
}

impl fmt::Debug for Opened {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Opened::Text(text) => write!(f, "<{} bytes>", text.len()),
            Opened::Erased => f.write_str("Erased"),
            Opened::Altered => f.write_str("Altered"),
        }
    }
}

/// Why keys of subjects cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum VaultFault {
    /// A file could not be read or written.
    #[error("cannot use the keys of subjects in {}", folder.display())]
    Io {
        /// Where.
        folder: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// The master key is another than the one that wrapped the keys in the folder.
    #[error("the keys of subjects in {} belong to another master key", .0.display())]
    OtherMaster(PathBuf),
    /// A key is not as it was written.
    #[error("key {} is damaged", .0.display())]
    Damaged(PathBuf),
    /// The operating system gave no randomness, or a sealer has sealed all it may.
    #[error("cannot make a key")]
    Random,
    /// The master key cannot be read, or not be written.
    #[error("cannot use the master key")]
    Master(#[from] KeyFault),
    /// The record of a change cannot be written: nothing was changed.
    #[error("cannot record a change of keys")]
    Audit(#[from] AuditFault),
}

/// Of the library for ciphers: only what is longer than any of ours.
impl From<Unspecified> for VaultFault {
    fn from(_: Unspecified) -> VaultFault {
        VaultFault::Random
    }
}

fn random(bytes: &mut [u8]) -> Result<(), VaultFault> {
    getrandom::fill(bytes).map_err(|_| VaultFault::Random)
}

/// A name that nothing else has.
fn fresh_name() -> Result<String, VaultFault> {
    let mut name = [0; SALT];
    random(&mut name)?;
    Ok(URL_SAFE_NO_PAD.encode(name))
}

fn nonce(count: u32) -> Nonce {
    let mut nonce = [0; NONCE_LEN];
    nonce[NONCE_LEN - COUNT..].copy_from_slice(&count.to_be_bytes());
    Nonce::assume_unique_for_key(nonce)
}

/// A sealer's own key.
fn of_salt(key: &[u8], salt: &[u8; SALT]) -> Result<LessSafeKey, Unspecified> {
    let prk = Salt::new(HKDF_SHA256, salt).extract(key);
    Ok(LessSafeKey::new(prk.expand(&[b"headgate: text"], &AES_256_GCM).map(UnboundKey::from)?))
}

/// The name of a key: nothing leads back from it.
fn name(key: &[u8]) -> Result<String, Unspecified> {
    struct Name;
    impl KeyType for Name {
        fn len(&self) -> usize {
            16
        }
    }
    let mut name = [0; 16];
    Prk::new_less_safe(HKDF_SHA256, key).expand(&[b"headgate: name of a key"], Name)?.fill(&mut name)?;
    Ok(URL_SAFE_NO_PAD.encode(name))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    struct House(tempfile::TempDir);

    impl House {
        fn new() -> House {
            let house = House(tempfile::tempdir().unwrap());
            Master::generate(&house.path("master.key")).unwrap();
            house
        }
        fn path(&self, name: &str) -> PathBuf {
            self.0.path().join(name)
        }
        fn vault(&self) -> Vault {
            Vault::open(&self.path("keys"), &Master::load(&self.path("master.key")).unwrap()).unwrap()
        }
        fn forget(&self, subject: &str) -> bool {
            let mut audit = Audit::open(&self.path("audit.jsonl")).unwrap();
            self.vault().forget("acme", subject, &mut audit, "officer", 7).unwrap()
        }
        fn names(&self) -> BTreeSet<String> {
            let all = fs::read_dir(self.path("keys")).unwrap();
            all.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
        }
    }

    fn sealed(vault: &Vault, subject: &str, text: &str) -> (String, String) {
        let mut sealer = vault.sealer("acme", subject).unwrap();
        let sealed = sealer.seal(b"bound", text.as_bytes()).unwrap();
        (sealer.name().to_owned(), sealed)
    }

    fn opened(vault: &Vault, (name, sealed): &(String, String)) -> Opened {
        vault.open_sealed(name, b"bound", sealed).unwrap()
    }

    /// A house with subjects that have said something, before its master key is rotated.
    fn rotating(subjects: usize) -> (House, Vec<(String, String)>) {
        let house = House::new();
        let vault = house.vault();
        let kept = (0..subjects).map(|subject| sealed(&vault, &format!("u{subject}"), "canary")).collect();
        (house, kept)
    }

    impl House {
        fn rotate(&self) -> Rewrapped {
            let mut audit = Audit::open(&self.path("audit.jsonl")).unwrap();
            Vault::rotate(&self.path("master.key"), &self.path("keys"), &mut audit, "officer", 7).unwrap()
        }
        fn retire(&self) -> Result<Rewrapped, VaultFault> {
            let mut audit = Audit::open(&self.path("audit.jsonl")).unwrap();
            Vault::retire(&self.path("master.key"), &[self.path("keys")], &mut audit, "officer", 7)
        }
    }

    #[test]
    fn a_master_key_is_rotated_under_those_who_use_it_and_the_old_one_opens_nothing_afterwards() {
        let (house, kept) = rotating(AT_ONCE + 50);
        let (running, old) = (house.vault(), fs::read_to_string(house.path("master.key")).unwrap());
        let (session, name) = (running.session("acme", "s1"), kept[0].0.clone());
        assert_eq!(house.rotate(), Rewrapped { wrapped: kept.len(), keys: kept.len() });
        let text = || Opened::Text(b"canary".to_vec());
        for vault in [&running, &house.vault()] {
            assert!(kept.iter().all(|kept| opened(vault, kept) == text()));
            assert_eq!((vault.session("acme", "s1"), sealed(vault, "u0", "more").0), (session.clone(), name.clone()));
        }
        // Whoever ran before makes keys under the new one, too.
        sealed(&running, "new", "canary");
        assert_eq!(house.rotate(), Rewrapped { wrapped: 0, keys: kept.len() + 1 }, "again, and there is nothing to do");
        assert_eq!(house.retire().unwrap(), Rewrapped { wrapped: 0, keys: kept.len() + 1 });
        assert_eq!(fs::read_to_string(house.path("master.key")).unwrap().lines().count(), 1);
        assert!(kept.iter().all(|kept| opened(&running, kept) == text() && opened(&house.vault(), kept) == text()));
        assert!(house.forget("u0") && opened(&running, &kept[0]) == Opened::Erased);
        assert_eq!(house.vault().session("acme", "s1"), session);
        fs::remove_file(house.path("master.key")).unwrap();
        write_private(&house.path("master.key"), old.as_bytes()).unwrap();
        let refused = Vault::open(&house.path("keys"), &Master::load(&house.path("master.key")).unwrap());
        assert!(matches!(refused, Err(VaultFault::OtherMaster(_))));
        let audit = fs::read_to_string(house.path("audit.jsonl")).unwrap();
        assert_eq!((audit.matches(ROTATED).count(), audit.matches(RETIRED).count()), (1, 1));
        let left: Vec<String> = house.names().into_iter().filter(|name| !name.starts_with("key-") && !name.starts_with("of-")).collect();
        assert_eq!(left, [MASTER, NAMES]);
    }

    #[test]
    fn a_rotation_that_was_cut_at_any_byte_is_ended_by_the_next_start() {
        let (house, kept) = rotating(3);
        let before: Vec<(PathBuf, Vec<u8>)> = house
            .names()
            .iter()
            .filter(|name| name.starts_with("key-"))
            .map(|name| {
                let path = house.path("keys").join(name);
                let bytes = fs::read(&path).unwrap();
                (path, bytes)
            })
            .collect();
        house.rotate();
        let after: Vec<Vec<u8>> = before.iter().map(|(path, _)| fs::read(path).unwrap()).collect();
        let line =
            |path: &Path, bytes: &[u8]| format!("{} {}\n", path.file_name().unwrap().to_str().unwrap(), URL_SAFE_NO_PAD.encode(bytes));
        let journal: String = before.iter().zip(&after).map(|((path, _), bytes)| line(path, bytes)).collect::<String>() + ALL;
        let all_open = || kept.iter().all(|kept| opened(&house.vault(), kept) == Opened::Text(b"canary".to_vec()));
        let write = |path: &Path, bytes: &[u8]| File::options().write(true).open(path).unwrap().write_all(bytes).unwrap();
        // While the journal is written, no key is touched.
        for cut in 0..=journal.len() {
            before.iter().for_each(|(path, bytes)| write(path, bytes));
            fs::write(house.path("keys").join(JOURNAL), &journal[..cut]).unwrap();
            assert!(all_open(), "journal cut at {cut}");
            assert!(!house.path("keys").join(JOURNAL).exists());
        }
        // Then each key is written, and any byte of it may be the last.
        for cut in 0..=WRAPPED {
            for torn in [1] {
                for (at, (path, old)) in before.iter().enumerate() {
                    let new = &after[at];
                    let bytes = match at.cmp(&torn) {
                        std::cmp::Ordering::Less => new.clone(),
                        std::cmp::Ordering::Equal => [&new[..cut], &old[cut..]].concat(),
                        std::cmp::Ordering::Greater => old.clone(),
                    };
                    write(path, &bytes);
                }
                fs::write(house.path("keys").join(JOURNAL), &journal).unwrap();
                assert!(all_open(), "key {torn} cut at {cut}");
            }
        }
        // At last the journal is overwritten.
        for cut in 0..=journal.len() {
            let rest = [vec![0; cut], journal.as_bytes()[cut..].to_vec()].concat();
            fs::write(house.path("keys").join(JOURNAL), rest).unwrap();
            assert!(all_open(), "journal overwritten up to {cut}");
        }
    }

    #[test]
    fn names_are_the_same_after_a_start_and_others_under_another_key() {
        let folder = tempfile::tempdir().unwrap();
        let (path, other) = (folder.path().join("names.key"), folder.path().join("other.key"));
        let name = Names::open(&path).unwrap().subject("acme", "u1@example.com");
        assert_eq!(Names::open(&path).unwrap().subject("acme", "u1@example.com"), name);
        let others = [
            Names::open(&path).unwrap().subject("acme", "u2@example.com"),
            Names::open(&path).unwrap().subject("acmeu1", "@example.com"),
            Names::open(&other).unwrap().subject("acme", "u1@example.com"),
        ];
        assert!(name.len() == 22 && !others.contains(&name), "{name} {others:?}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2, "nothing but the keys is left behind");
        fs::write(&path, "half").unwrap();
        assert!(matches!(Names::open(&path), Err(KeyFault::Malformed(_))), "another key would make others of everybody");
    }

    #[test]
    fn what_was_sealed_is_opened_by_whoever_has_the_master_key_and_shows_nothing_to_others() {
        let house = House::new();
        let kept = sealed(&house.vault(), "alice", "canary");
        assert!(opened(&house.vault(), &kept) == Opened::Text(b"canary".to_vec()));
        assert!(!URL_SAFE_NO_PAD.decode(&kept.1).unwrap().windows(6).any(|six| six == b"canary"));
        Master::generate(&house.path("other.key")).unwrap();
        let other = Vault::open(&house.path("keys"), &Master::load(&house.path("other.key")).unwrap());
        assert!(matches!(other, Err(VaultFault::OtherMaster(_))));
    }

    #[test]
    fn who_is_forgotten_cannot_be_read_again_and_others_can() {
        let house = House::new();
        let vault = house.vault();
        let (alice, bob) = (sealed(&vault, "alice", "hers"), sealed(&vault, "bob", "his"));
        assert!(house.forget("alice"));
        assert_eq!((opened(&vault, &alice), opened(&vault, &bob)), (Opened::Erased, Opened::Text(b"his".to_vec())));
        assert!(!house.forget("alice"), "there is nothing left of her");
        // She comes back: as somebody whom nothing connects with what was.
        let again = sealed(&vault, "alice", "new");
        assert_ne!(again.0, alice.0);
        assert_eq!((opened(&vault, &again), opened(&vault, &alice)), (Opened::Text(b"new".to_vec()), Opened::Erased));
    }

    #[test]
    fn a_forgotten_key_is_overwritten_before_its_names_go() {
        let house = House::new();
        let (name, _) = sealed(&house.vault(), "alice", "hers");
        // Whoever holds the file open still sees what is in its place.
        let mut held = File::open(house.path("keys").join(format!("key-{name}"))).unwrap();
        house.forget("alice");
        let mut bytes = Vec::new();
        held.read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes, [0; WRAPPED]);
        assert_eq!(house.names(), BTreeSet::from([MASTER.to_owned()]));
    }

    #[test]
    fn what_a_crash_kept_from_being_destroyed_is_destroyed_at_the_next_start() {
        let house = House::new();
        let vault = house.vault();
        let kept = sealed(&vault, "alice", "hers");
        fs::rename(vault.of("acme", "alice"), house.path("keys").join("gone-x")).unwrap();
        assert_eq!(opened(&house.vault(), &kept), Opened::Erased);
        assert_eq!(house.names(), BTreeSet::from([MASTER.to_owned()]));
    }

    #[test]
    fn it_is_recorded_before_it_is_done_and_the_record_names_nobody() {
        let house = House::new();
        sealed(&house.vault(), "alice@example.com", "hers");
        assert!(house.forget("alice@example.com"));
        let mut seen = Vec::new();
        crate::audit::verify(&house.path("audit.jsonl"), |record| seen.push(record.clone())).unwrap();
        assert_eq!((seen.len(), seen[0].action.as_str(), seen[0].actor.as_str()), (1, FORGOTTEN, "officer"));
        assert_eq!((&seen[0].facts["tenant"], &seen[0].facts["had_key"]), (&json!("acme"), &json!(true)));
        assert!(!fs::read_to_string(house.path("audit.jsonl")).unwrap().contains("alice"));
        assert!(!house.names().iter().any(|name| name.contains("alice")));
    }

    #[test]
    fn nothing_sealed_can_be_moved_or_altered() {
        let house = House::new();
        let vault = house.vault();
        let (name, sealed) = sealed(&vault, "alice", "hers");
        assert_eq!(vault.open_sealed(&name, b"elsewhere", &sealed).unwrap(), Opened::Altered);
        let bytes = URL_SAFE_NO_PAD.decode(&sealed).unwrap();
        for at in 0..bytes.len() {
            let mut bytes = bytes.clone();
            bytes[at] ^= 1;
            assert_eq!(vault.open_sealed(&name, b"bound", &URL_SAFE_NO_PAD.encode(bytes)).unwrap(), Opened::Altered, "byte {at}");
        }
        for hostile in ["", "../../master.key", "x", &"/".repeat(22)] {
            assert_eq!(vault.open_sealed(hostile, b"bound", &sealed).unwrap(), Opened::Altered);
        }
        assert_eq!(vault.open_sealed(&name, b"bound", "not sealed").unwrap(), Opened::Altered);
    }

    #[test]
    fn no_nonce_comes_twice_under_one_key() {
        let house = House::new();
        let vault = house.vault();
        let mut seen = BTreeSet::new();
        for _ in 0..64 {
            let mut sealer = vault.sealer("acme", "alice").unwrap();
            for _ in 0..64 {
                let sealed = URL_SAFE_NO_PAD.decode(sealer.seal(b"", b"the same").unwrap()).unwrap();
                // The salt makes the key, the count the nonce.
                assert!(seen.insert(sealed[..SALT + COUNT].to_vec()));
            }
        }
        let mut spent = vault.sealer("acme", "alice").unwrap();
        spent.count = u32::MAX;
        assert!(spent.seal(b"", b"one more").is_err(), "it never begins anew");
    }

    #[test]
    fn subjects_that_come_at_once_get_one_key_each_and_tenants_share_none() {
        let house = House::new();
        let vault = house.vault();
        let names: BTreeSet<String> = std::thread::scope(|scope| {
            let all: Vec<_> = (0..8).map(|_| scope.spawn(|| vault.sealer("acme", "alice").unwrap().name().to_owned())).collect();
            all.into_iter().map(|one| one.join().unwrap()).collect()
        });
        assert_eq!(names.len(), 1);
        assert_eq!(house.names().len(), 3, "one key under two names, and the mark of the master");
        assert_ne!(vault.sealer("other", "alice").unwrap().name(), names.first().unwrap());
    }

    #[test]
    fn of_many_that_open_a_new_folder_at_once_each_finds_it_whole() {
        let house = House::new();
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| house.vault());
            }
        });
        assert_eq!(house.names(), BTreeSet::from([MASTER.to_owned()]));
    }

    #[test]
    #[cfg(unix)]
    fn a_master_key_that_others_can_read_is_refused_and_none_is_ever_replaced() {
        use std::os::unix::fs::PermissionsExt;
        let house = House::new();
        let path = house.path("master.key");
        assert!(matches!(Master::generate(&path), Err(KeyFault::Io { .. })));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(Master::load(&path), Err(KeyFault::Exposed { .. })));
        fs::write(house.path("short.key"), "c2hvcnQ").unwrap();
        fs::set_permissions(house.path("short.key"), fs::Permissions::from_mode(0o600)).unwrap();
        assert!(matches!(Master::load(&house.path("short.key")), Err(KeyFault::Malformed(_))));
    }
}
