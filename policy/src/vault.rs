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
//! A copy of what was sealed is erased with the key, wherever it is. A copy of the folder with the keys is not: see `docs/operate.md`.

use std::{
    fmt,
    fs::{self, File},
    io::{self, Read, Write},
    path::{Path, PathBuf},
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
/// Begins the name of a key that is about to be destroyed.
const GONE: &str = "gone-";

/// The key that wraps all others: 32 bytes, in a file of its own as base64url. Whoever has it and the folder can read everything
/// that was not erased.
pub struct Master(Prk);

impl Master {
    /// Makes a file with a fresh one, mode 0600. It never replaces one.
    ///
    /// Errors: [`KeyFault::Io`], [`KeyFault::Random`].
    pub fn generate(path: &Path) -> Result<(), KeyFault> {
        let mut key = Zeroizing::new([0; KEY]);
        random(key.as_mut_slice()).map_err(|_| KeyFault::Random)?;
        let mut line = Zeroizing::new(String::with_capacity(64));
        URL_SAFE_NO_PAD.encode_string(key.as_slice(), &mut line);
        line.push('\n');
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

    fn names(&self) -> Result<Names, Unspecified> {
        self.0.expand(&[b"headgate: names of subjects"], hmac::HMAC_SHA256).map(|key| Names(hmac::Key::from(key)))
    }

    /// Reads its file. One that others can read is refused, as a ring's is.
    ///
    /// Errors: [`KeyFault::Io`], [`KeyFault::Exposed`], [`KeyFault::Malformed`].
    pub fn load(path: &Path) -> Result<Master, KeyFault> {
        let fault = |source| KeyFault::Io { path: path.to_owned(), source };
        let file = File::open(path).map_err(fault)?;
        refuse_exposed(&file.metadata().map_err(fault)?, path)?;
        let mut line = Zeroizing::new(String::with_capacity(128));
        file.take(64).read_to_string(&mut line).map_err(fault)?;
        let malformed = KeyFault::Malformed("master key: expected 32 bytes as base64url, as `headgate events key` writes them");
        let key = Zeroizing::new(bytes_32(line.trim_end()).ok_or(malformed)?);
        Ok(Master(Prk::new_less_safe(HKDF_SHA256, key.as_slice())))
    }
}

impl fmt::Debug for Master {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Master")
    }
}

/// Names that stand for people: the same for the same person for as long as the key is, and nothing leads back from them without it.
pub struct Names(hmac::Key);

impl Names {
    /// Names under the key in a file, which is made (mode 0600) where there is none.
    ///
    /// Errors: [`KeyFault::Io`], [`KeyFault::Exposed`], [`KeyFault::Malformed`], [`KeyFault::Random`].
    pub fn open(path: &Path) -> Result<Names, KeyFault> {
        Master::load_or_generate(path)?.names().map_err(|_| KeyFault::Random)
    }

    /// The name of a tenant's subject: 22 characters of base64url.
    pub fn subject(&self, tenant: &str, subject: &str) -> String {
        self.keyed("subject", &[tenant, subject])
    }

    /// 128 bits of a keyed hash, as 22 characters.
    fn keyed(&self, what: &str, of: &[&str]) -> String {
        let mut context = hmac::Context::with_key(&self.0);
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

/// The keys of all subjects, in one folder. Any number of processes may use it at once; none of them keeps a subject's key: each use
/// reads it again, so that one which is destroyed is destroyed for all.
pub struct Vault {
    folder: PathBuf,
    wrap: LessSafeKey,
    names: Names,
}

impl Vault {
    /// Opens the folder, or makes it with mode 0700. Finishes what a crash kept from being destroyed.
    ///
    /// Errors: [`VaultFault::Io`]; [`VaultFault::OtherMaster`] where its keys were wrapped with another.
    pub fn open(folder: &Path, master: &Master) -> Result<Vault, VaultFault> {
        let wrap = master.0.expand(&[b"headgate: keys of subjects"], &AES_256_GCM).map(UnboundKey::from)?;
        let vault = Vault { folder: folder.to_owned(), wrap: LessSafeKey::new(wrap), names: master.names()? };
        let fault = |source| vault.fault(source);
        let mut builder = fs::DirBuilder::new();
        #[cfg(unix)]
        std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
        builder.recursive(true).create(folder).map_err(fault)?;
        let (path, name) = (folder.join(MASTER), vault.names.keyed("master", &[]));
        match fs::read(&path) {
            Ok(found) if found == name.as_bytes() => {}
            Ok(_) => return Err(VaultFault::OtherMaster(folder.to_owned())),
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
        for entry in fs::read_dir(folder).map_err(fault)? {
            let entry = entry.map_err(fault)?;
            if entry.file_name().to_string_lossy().starts_with(GONE) {
                vault.destroy(&entry.path())?;
            }
        }
        Ok(vault)
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
        let file = match File::open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            file => file.map_err(|source| self.fault(source))?,
        };
        let mut wrapped = Zeroizing::new(Vec::with_capacity(2 * WRAPPED));
        file.take(WRAPPED as u64 + 1).read_to_end(&mut wrapped).map_err(|source| self.fault(source))?;
        if wrapped.len() == WRAPPED && wrapped.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        let damaged = || VaultFault::Damaged(path.to_owned());
        let (nonce, sealed) = wrapped.split_first_chunk_mut::<NONCE_LEN>().ok_or_else(damaged)?;
        let nonce = Nonce::assume_unique_for_key(*nonce);
        let key = self.wrap.open_in_place(nonce, Aad::empty(), sealed).map_err(|_| damaged())?;
        Ok(Some(Zeroizing::new(key.to_vec())))
    }

    /// Makes a key and gives it that name; `None` where another has it by now.
    fn make(&self, of: &Path) -> Result<Option<Zeroizing<Vec<u8>>>, VaultFault> {
        let mut key = Zeroizing::new(vec![0; KEY]);
        random(&mut key)?;
        // Random nonces: with 2^32 subjects under one master key two are the same with a chance of 2^-33 (SP 800-38D section 8.3).
        let mut at = [0; NONCE_LEN];
        random(&mut at)?;
        let mut sealed = Zeroizing::new(Vec::with_capacity(WRAPPED));
        sealed.extend_from_slice(&key);
        self.wrap.seal_in_place_append_tag(Nonce::assume_unique_for_key(at), Aad::empty(), &mut *sealed)?;
        let path = self.folder.join(format!("key-{}", name(&key)?));
        write_private(&path, &[&at[..], &sealed].concat()).map_err(|source| self.fault(source))?;
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
    /// The record of a change cannot be written: nothing was changed.
    #[error("cannot record that a subject is forgotten")]
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
