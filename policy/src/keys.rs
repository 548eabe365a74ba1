//! Keeps the keys that sign verdicts, and shows the public half to those who check them.
//!
//! A key goes `next` → `current` → `retired` and is then dropped; `revoked` ends it at once. A verifier may work from a copy
//! of the published keys that is minutes old, so a `next` key is published well before it signs and carries the time from
//! which it may: rotation rejects nothing.

use std::{
    collections::HashMap,
    fmt,
    fs::{self, File},
    io::{self, Read, Write},
    path::{Path, PathBuf},
    str::FromStr,
};

use aws_lc_rs::signature::Ed25519KeyPair;
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use ed25519_dalek::{SigningKey, VerifyingKey};
use serde::{Deserialize, Serialize, Serializer, de::IgnoredAny};
use zeroize::Zeroizing;

use crate::{
    Claims, Digest, Entry, Jti, LEEWAY, Rejected, Unsigned,
    jws::{self, Header, Typ},
};

/// Seconds a `next` key is published before it may sign: twice the time a verifier may keep a copy of the keys.
pub const PUBLISH_AHEAD: u64 = 10 * 60;
/// Seconds a key signs before a successor is due.
pub const ROTATE_AFTER: u64 = 30 * 24 * 60 * 60;
/// Seconds a `retired` key still verifies: a day of spooled turns, the life of a verdict and the leeway.
pub const RETIRED_FOR: u64 = 24 * 60 * 60 + crate::LIFETIME + LEEWAY;

const MAX_KEYS: usize = 32;
const MAX_FILE_BYTES: usize = 32 * 1024;
const MAX_JWKS_BYTES: usize = 64 * 1024;

/// A key's name: the RFC 7638 thumbprint of its public half, 43 characters of base64url.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Kid([u8; 32]);

impl Kid {
    /// RFC 8037 appendix A.3: the required members in lexical order, without white space.
    pub(crate) fn of(key: &VerifyingKey) -> Kid {
        let jwk = format!(r#"{{"crv":"Ed25519","kty":"OKP","x":"{}"}}"#, URL_SAFE_NO_PAD.encode(key.as_bytes()));
        Kid(*Digest::of(jwk.as_bytes()).as_bytes())
    }
}

impl FromStr for Kid {
    type Err = KeyFault;
    fn from_str(text: &str) -> Result<Kid, KeyFault> {
        bytes_32(text).map(Kid).ok_or(KeyFault::Malformed("kid"))
    }
}

impl fmt::Display for Kid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        base64::display::Base64Display::new(&self.0, &URL_SAFE_NO_PAD).fmt(f)
    }
}

impl Serialize for Kid {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl fmt::Debug for Kid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Where a key stands in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Published, not signing yet.
    Next,
    /// Signs.
    Current,
    /// Verifies what it signed, for a while.
    Retired,
    /// Good for nothing, at once.
    Revoked,
}

/// What is known about a key beside the key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Life {
    state: State,
    /// Unix seconds from which it may sign.
    nbf: u64,
    /// Unix seconds: `current`, when a successor is due; `retired`, when it stops verifying.
    exp: Option<u64>,
}

struct Pair {
    kid: Kid,
    // Cleared from memory when dropped, both.
    secret: SigningKey,
    // The same key where it signs: twice as fast (docs/decisions/0004-verdicts-are-our-own-jws.md).
    signer: Ed25519KeyPair,
    /// The same in each of its tokens.
    verdict: Header,
    entry: Header,
    life: Life,
}

/// The private keys of one signer. At most one is current and at most one is next.
///
/// One ring per gateway instance; another, kept offline, for the policy key that signs registry entries. Changes are made
/// here and then stored with [`Ring::save`]: save first, swap the ring in use after.
pub struct Ring {
    pairs: Vec<Pair>,
}

/// What may be known of a key by everybody.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Key {
    /// Its name.
    pub kid: Kid,
    /// Where it stands in its life.
    pub state: State,
    /// Unix seconds from which it may sign.
    pub nbf: u64,
    /// Unix seconds: `current`, when a successor is due; `retired` and `revoked`, when it is dropped; `next`: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exp: Option<u64>,
}

/// What a promotion did, for the audit log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rotation {
    /// The key that signs from now on.
    pub current: Kid,
    /// The key that signed until now.
    pub retired: Option<Kid>,
}

impl Ring {
    /// A ring with one fresh key, current at once. Errors: [`KeyFault::Random`].
    pub fn generate(now: u64) -> Result<Ring, KeyFault> {
        let life = Life { state: State::Current, nbf: now, exp: Some(now.saturating_add(ROTATE_AFTER)) };
        Ok(Ring { pairs: vec![Pair::generate(life)?] })
    }

    /// The key that signs now.
    pub fn current(&self) -> Option<Kid> {
        self.in_state(State::Current).map(|pair| pair.kid)
    }

    /// All keys, as people may see them, in the order they were made.
    pub fn keys(&self) -> impl Iterator<Item = Key> {
        self.pairs.iter().map(|Pair { kid, life: Life { state, nbf, exp }, .. }| Key { kid: *kid, state: *state, nbf: *nbf, exp: *exp })
    }

    /// Names this state of the ring: changes with every change of a key.
    pub fn digest(&self) -> Digest {
        Digest::of(&serde_json::to_vec(&self.keys().collect::<Vec<_>>()).expect("strings and integers always serialise"))
    }

    /// Whether the current key has signed for its time, or there is none. It goes on signing: a late rotation is a page for
    /// the operator and not an outage.
    pub fn is_due(&self, now: u64) -> bool {
        self.in_state(State::Current).is_none_or(|pair| pair.life.exp.is_some_and(|exp| now >= exp))
    }

    /// Signs a verdict with the current key.
    pub fn sign(&self, claims: &Claims<impl Serialize>) -> Result<String, Unsigned> {
        self.seal(Typ::Verdict, claims)
    }

    /// Signs a registry entry with the current key: this ring is then a policy key.
    pub fn sign_entry(&self, entry: &Entry) -> Result<String, Unsigned> {
        self.seal(Typ::Entry, entry)
    }

    fn seal(&self, typ: Typ, payload: &impl Serialize) -> Result<String, Unsigned> {
        let pair = self.in_state(State::Current).ok_or(Unsigned::NoCurrentKey)?;
        // In one piece: a verdict has some 600 bytes.
        let mut json = Vec::with_capacity(1024);
        serde_json::to_writer(&mut json, payload).expect("strings, integers and lists of them always serialise");
        jws::sign(|bytes| pair.sign(bytes), pair.header(typ), &json).ok_or(Unsigned::TooLarge)
    }

    /// Adds a `next` key, to be published now and promoted `ahead` seconds later: [`PUBLISH_AHEAD`], or as little as twice the
    /// time after which every verifier reads the keys again.
    ///
    /// Errors: [`KeyFault::NextExists`], [`KeyFault::Full`], [`KeyFault::Random`].
    pub fn prepare(&mut self, now: u64, ahead: u64) -> Result<Kid, KeyFault> {
        if self.in_state(State::Next).is_some() {
            return Err(KeyFault::NextExists);
        }
        if self.pairs.len() >= MAX_KEYS {
            return Err(KeyFault::Full);
        }
        let pair = Pair::generate(Life { state: State::Next, nbf: now.saturating_add(ahead), exp: None })?;
        let kid = pair.kid;
        self.pairs.push(pair);
        Ok(kid)
    }

    /// Makes the `next` key sign; the current one retires.
    ///
    /// With no current key, after a revocation, the next key is promoted however young it is: some verifiers will reject
    /// until they have read the keys again, which is better than signing nothing.
    ///
    /// Errors: [`KeyFault::NoNext`], [`KeyFault::TooEarly`].
    pub fn promote(&mut self, now: u64) -> Result<Rotation, KeyFault> {
        let next = self.in_state(State::Next).ok_or(KeyFault::NoNext)?;
        let (current, nbf, retired) = (next.kid, next.life.nbf, self.current());
        if retired.is_some() && now < nbf {
            return Err(KeyFault::TooEarly { from: nbf });
        }
        for pair in &mut self.pairs {
            match pair.life.state {
                State::Current => pair.life = Life { state: State::Retired, exp: Some(now.saturating_add(RETIRED_FOR)), ..pair.life },
                State::Next => pair.life = Life { state: State::Current, nbf: nbf.min(now), exp: Some(now.saturating_add(ROTATE_AFTER)) },
                State::Retired | State::Revoked => {}
            }
        }
        Ok(Rotation { current, retired })
    }

    /// Ends a key at once. A verifier learns it when it reads the keys again. Errors: [`KeyFault::Unknown`].
    pub fn revoke(&mut self, kid: Kid, now: u64) -> Result<(), KeyFault> {
        let pair = self.pairs.iter_mut().find(|pair| pair.kid == kid).ok_or(KeyFault::Unknown(kid))?;
        // Kept as long as a retired key would be, so that its rejections are told apart from those of a key never seen.
        pair.life = Life { state: State::Revoked, exp: Some(now.saturating_add(RETIRED_FOR)), ..pair.life };
        Ok(())
    }

    /// Drops the retired and revoked keys whose time has passed, and names them.
    pub fn sweep(&mut self, now: u64) -> Vec<Kid> {
        let ended = |pair: &Pair| match pair.life.state {
            State::Next | State::Current => false,
            State::Retired | State::Revoked => pair.life.exp.is_none_or(|exp| now > exp),
        };
        let gone = self.pairs.iter().filter(|pair| ended(pair)).map(|pair| pair.kid).collect();
        self.pairs.retain(|pair| !ended(pair));
        gone
    }

    /// The public halves, with their states.
    pub fn verifier(&self) -> Verifier {
        let public = |pair: &Pair| (pair.kid, Public { key: pair.secret.verifying_key(), life: pair.life });
        Verifier { keys: self.pairs.iter().map(public).collect() }
    }

    /// The public keys to publish, see [`Verifier::jwks`].
    pub fn jwks(&self) -> String {
        self.verifier().jwks()
    }

    /// Reads a key file.
    ///
    /// A file that others can read, or its group can write, is refused: the key is to be replaced and not only hidden. Reading
    /// by the group is allowed, as that is how a mounted secret reaches a process without root.
    pub fn load(path: &Path) -> Result<Ring, KeyFault> {
        let fault = |source| KeyFault::Io { path: path.to_owned(), source };
        let file = File::open(path).map_err(fault)?;
        refuse_exposed(&file.metadata().map_err(fault)?, path)?;
        // Full size at once: growing would leave copies of the keys behind.
        let mut json = Zeroizing::new(Vec::with_capacity(MAX_FILE_BYTES + 1));
        file.take(MAX_FILE_BYTES as u64 + 1).read_to_end(&mut json).map_err(fault)?;
        if json.len() > MAX_FILE_BYTES {
            return Err(KeyFault::Malformed("key file: larger than 32 KiB"));
        }
        Ring::from_json(&json)
    }

    /// Writes a key file, mode 0600, in place of what is there: readers see the old file or the new one, never a part.
    pub fn save(&self, path: &Path) -> Result<(), KeyFault> {
        let fault = |source| KeyFault::Io { path: path.to_owned(), source };
        let name = path.file_name().ok_or_else(|| fault(io::ErrorKind::InvalidInput.into()))?.to_string_lossy();
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let new = folder.join(format!(".{name}.{}", Jti::fresh().map_err(|_| KeyFault::Random)?));
        let placed = write_private(&new, &self.to_json()).and_then(|()| fs::rename(&new, path));
        if placed.is_err() {
            // What failed is told; what is left of it cannot be helped.
            let _ = fs::remove_file(&new);
        }
        placed.and_then(|()| File::open(folder)?.sync_all()).map_err(fault)
    }

    fn to_json(&self) -> Zeroizing<Vec<u8>> {
        let coded: Vec<_> = self
            .pairs
            .iter()
            .map(|pair| {
                let mut d = Zeroizing::new(String::with_capacity(64));
                URL_SAFE_NO_PAD.encode_string(Zeroizing::new(pair.secret.to_bytes()).as_slice(), &mut d);
                (pair, d, URL_SAFE_NO_PAD.encode(pair.secret.verifying_key().as_bytes()), pair.kid.to_string())
            })
            .collect();
        let keys = coded.iter().map(|(pair, d, x, kid)| PrivateJwk {
            kty: "OKP",
            crv: "Ed25519",
            kid,
            x,
            d,
            state: pair.life.state,
            nbf: pair.life.nbf,
            exp: pair.life.exp,
        });
        let mut json = Zeroizing::new(Vec::with_capacity(MAX_FILE_BYTES));
        serde_json::to_writer(&mut *json, &PrivateSet { keys: keys.collect() }).expect("strings and integers always serialise");
        json
    }

    fn from_json(json: &[u8]) -> Result<Ring, KeyFault> {
        let set: PrivateSet<'_> =
            serde_json::from_slice(json).map_err(|_| KeyFault::Malformed("key file: not a private key set of ours"))?;
        let mut ring = Ring { pairs: Vec::with_capacity(set.keys.len().min(MAX_KEYS)) };
        for jwk in set.keys {
            if jwk.kty != "OKP" || jwk.crv != "Ed25519" {
                return Err(KeyFault::Malformed("key file: a key that is not Ed25519"));
            }
            let secret = Zeroizing::new(bytes_32(jwk.d).ok_or(KeyFault::Malformed("key file: d"))?);
            let life = Life { state: jwk.state, nbf: jwk.nbf, exp: jwk.exp };
            let pair = Pair::from_seed(&secret, life).ok_or(KeyFault::Malformed("key file: d"))?;
            let kid = pair.kid;
            if bytes_32(jwk.x) != Some(pair.secret.verifying_key().to_bytes()) || jwk.kid.parse::<Kid>().ok() != Some(kid) {
                return Err(KeyFault::Malformed("key file: d, x and kid are not of one key"));
            }
            if ring.pairs.iter().any(|pair| pair.kid == kid) {
                return Err(KeyFault::Malformed("key file: a key twice"));
            }
            if matches!(jwk.state, State::Current | State::Next) && ring.in_state(jwk.state).is_some() {
                return Err(KeyFault::Malformed("key file: two keys are current, or two are next"));
            }
            if ring.pairs.len() >= MAX_KEYS {
                return Err(KeyFault::Full);
            }
            ring.pairs.push(pair);
        }
        Ok(ring)
    }

    fn in_state(&self, state: State) -> Option<&Pair> {
        self.pairs.iter().find(|pair| pair.life.state == state)
    }
}

impl fmt::Debug for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.pairs.iter().map(|pair| (pair.kid, pair.life.state))).finish()
    }
}

impl Pair {
    fn generate(life: Life) -> Result<Pair, KeyFault> {
        let mut seed = Zeroizing::new([0; 32]);
        getrandom::fill(seed.as_mut_slice()).map_err(|_| KeyFault::Random)?;
        Pair::from_seed(&seed, life).ok_or(KeyFault::Random)
    }

    /// `None` never comes of 32 bytes, but the library says that it may.
    fn from_seed(seed: &[u8; 32], life: Life) -> Option<Pair> {
        let secret = SigningKey::from_bytes(seed);
        let signer = Ed25519KeyPair::from_seed_unchecked(seed).ok()?;
        let kid = Kid::of(&secret.verifying_key());
        let (verdict, entry) = (Header::of(kid, Typ::Verdict), Header::of(kid, Typ::Entry));
        Some(Pair { kid, secret, signer, verdict, entry, life })
    }

    fn header(&self, typ: Typ) -> &Header {
        match typ {
            Typ::Verdict => &self.verdict,
            Typ::Entry => &self.entry,
        }
    }

    fn sign(&self, bytes: &[u8]) -> [u8; 64] {
        let signature = self.signer.sign(bytes);
        // An Ed25519 signature has 64 bytes: RFC 8032 section 5.1.6.
        signature.as_ref().try_into().unwrap_or([0; 64])
    }
}

#[derive(Clone)]
struct Public {
    key: VerifyingKey,
    life: Life,
}

/// The public keys a party trusts, by name and with their states. Checks verdicts: see [`Verifier::verify`].
#[derive(Clone)]
pub struct Verifier {
    keys: HashMap<Kid, Public>,
}

impl Verifier {
    /// Reads published keys (RFC 7517, RFC 8037): at most 64 KiB and 32 keys.
    ///
    /// Keys of other kinds are skipped, as RFC 7517 asks. An Ed25519 key without our `state` member counts as current: whoever
    /// publishes it vouches for it. Refused: a private member, a weak key, a `kid` that is not the thumbprint, a key twice.
    pub fn from_jwks(json: &str) -> Result<Verifier, KeyFault> {
        if json.len() > MAX_JWKS_BYTES {
            return Err(KeyFault::Malformed("key set: larger than 64 KiB"));
        }
        let set: PublicSet = jws::object(json.as_bytes()).ok_or(KeyFault::Malformed("key set: not a JSON Web Key Set"))?;
        let mut keys = HashMap::new();
        for jwk in set.keys {
            if jwk.d.is_some() {
                return Err(KeyFault::Malformed("key set: it publishes a private key"));
            }
            if jwk.kty != "OKP" || jwk.crv.as_deref() != Some("Ed25519") {
                continue;
            }
            if jwk.alg.is_some_and(|alg| alg != "Ed25519") || jwk.r#use.is_some_and(|r#use| r#use != "sig") {
                continue;
            }
            let x = jwk.x.as_deref().and_then(bytes_32).ok_or(KeyFault::Malformed("key set: x"))?;
            let key = VerifyingKey::from_bytes(&x).map_err(|_| KeyFault::Malformed("key set: x"))?;
            if key.is_weak() {
                return Err(KeyFault::Malformed("key set: a weak key"));
            }
            let kid = Kid::of(&key);
            if jwk.kid.is_some_and(|named| named.parse::<Kid>().ok() != Some(kid)) {
                return Err(KeyFault::Malformed("key set: a kid that is not the thumbprint"));
            }
            let life = Life { state: jwk.state.unwrap_or(State::Current), nbf: jwk.nbf.unwrap_or(0), exp: jwk.exp };
            if keys.insert(kid, Public { key, life }).is_some() {
                return Err(KeyFault::Malformed("key set: a key twice"));
            }
            if keys.len() > MAX_KEYS {
                return Err(KeyFault::Full);
            }
        }
        Ok(Verifier { keys })
    }

    /// The keys as a JSON Web Key Set, for `/.well-known/jwks.json`: all but the revoked.
    ///
    /// Beside the standard members each key has `state`, `nbf` (may sign from) and `exp` where it is set, in Unix seconds.
    pub fn jwks(&self) -> String {
        let mut keys: Vec<_> = self.keys.iter().filter(|(_, public)| public.life.state != State::Revoked).collect();
        keys.sort_by_key(|(kid, _)| **kid);
        let keys = keys.into_iter().map(|(kid, Public { key, life })| PublicJwk {
            kty: "OKP".into(),
            crv: Some("Ed25519".into()),
            r#use: Some("sig".into()),
            alg: Some("Ed25519".into()),
            kid: Some(kid.to_string()),
            x: Some(URL_SAFE_NO_PAD.encode(key.as_bytes())),
            d: None,
            state: Some(life.state),
            nbf: Some(life.nbf),
            exp: life.exp,
        });
        serde_json::to_string(&PublicSet { keys: keys.collect() }).expect("strings and integers always serialise")
    }

    /// The key named `kid`, if what it signed may be believed at `now`.
    ///
    /// Errors: [`Rejected::Kid`] for a key never seen, [`Rejected::KeyState`] for one seen and not good.
    pub(crate) fn key(&self, kid: Kid, now: u64) -> Result<&VerifyingKey, Rejected> {
        let Public { key, life } = self.keys.get(&kid).ok_or(Rejected::Kid)?;
        let good = match life.state {
            // Our copy may be from before the promotion.
            State::Next => now.saturating_add(LEEWAY) >= life.nbf,
            State::Current => true,
            State::Retired => life.exp.is_some_and(|exp| now <= exp),
            State::Revoked => false,
        };
        if good { Ok(key) } else { Err(Rejected::KeyState) }
    }
}

impl fmt::Debug for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.keys.iter().map(|(kid, public)| (kid, public.life.state))).finish()
    }
}

/// Why a key could not be read, kept or moved on.
#[derive(Debug, thiserror::Error)]
pub enum KeyFault {
    /// The file could not be read or written.
    #[error("cannot use key file {}", path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// Others than its owner can get at the file.
    #[error("key file {} has mode {mode:04o}: its keys are exposed, replace them and set mode 0600", path.display())]
    Exposed {
        /// Which file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// What was read is not what it should be; never shows what it was.
    #[error("cannot read {0}")]
    Malformed(&'static str),
    /// There is a next key already.
    #[error("there is a next key already: promote or revoke it first")]
    NextExists,
    /// There is no next key to promote.
    #[error("there is no next key: prepare one first")]
    NoNext,
    /// The next key has not been published long enough.
    #[error("the next key may sign from {from} (Unix seconds): verifiers may not have seen it yet")]
    TooEarly {
        /// Unix seconds.
        from: u64,
    },
    /// The ring or set has as many keys as it may.
    #[error("more than {MAX_KEYS} keys: sweep the retired ones")]
    Full,
    /// No such key.
    #[error("no key {0}")]
    Unknown(Kid),
    /// The operating system gave no randomness.
    #[error("cannot make a key: no randomness")]
    Random,
}

#[derive(Serialize, Deserialize)]
struct PublicSet {
    keys: Vec<PublicJwk>,
}

/// Foreign members are ignored (RFC 7517 section 4), `d` is looked for.
#[derive(Serialize, Deserialize)]
struct PublicJwk {
    kty: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    crv: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    r#use: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    alg: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    kid: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    x: Option<String>,
    #[serde(skip_serializing)]
    d: Option<IgnoredAny>,
    #[serde(skip_serializing_if = "Option::is_none")]
    state: Option<State>,
    #[serde(skip_serializing_if = "Option::is_none")]
    nbf: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    exp: Option<u64>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PrivateSet<'a> {
    #[serde(borrow)]
    keys: Vec<PrivateJwk<'a>>,
}

/// Borrows from the file's bytes, so that no copy of `d` outlives them.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PrivateJwk<'a> {
    kty: &'a str,
    crv: &'a str,
    kid: &'a str,
    x: &'a str,
    d: &'a str,
    state: State,
    nbf: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    exp: Option<u64>,
}

/// 32 bytes in their one spelling of base64url.
pub(crate) fn bytes_32(text: &str) -> Option<[u8; 32]> {
    if text.len() != 43 {
        return None;
    }
    // One byte more than the value: what the decoder asks for as room.
    let mut bytes = Zeroizing::new([0; 33]);
    match URL_SAFE_NO_PAD.decode_slice(text, bytes.as_mut_slice()) {
        Ok(32) => bytes.first_chunk().copied(),
        Ok(_) | Err(_) => None,
    }
}

pub(crate) fn write_private(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut options = File::options();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let mut file = options.open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

#[cfg(unix)]
pub(crate) fn refuse_exposed(metadata: &fs::Metadata, path: &Path) -> Result<(), KeyFault> {
    use std::os::unix::fs::PermissionsExt;
    let mode = metadata.permissions().mode() & 0o777;
    if mode & 0o037 == 0 { Ok(()) } else { Err(KeyFault::Exposed { path: path.to_owned(), mode }) }
}

#[cfg(not(unix))]
pub(crate) fn refuse_exposed(_: &fs::Metadata, _: &Path) -> Result<(), KeyFault> {
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::jws::tests::{D, X, rfc_key};

    const NOW: u64 = 1_800_000_000;

    fn jwk(more: &str) -> String {
        format!(r#"{{"keys":[{{"kty":"OKP","crv":"Ed25519","x":"{X}"{more}}}]}}"#)
    }

    #[test]
    fn the_thumbprint_of_rfc_8037_appendix_a3_is_reproduced() {
        assert_eq!(URL_SAFE_NO_PAD.encode(rfc_key().verifying_key().as_bytes()), X);
        assert_eq!(Kid::of(&rfc_key().verifying_key()).to_string(), "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k");
    }

    #[test]
    fn published_keys_read_back_without_the_revoked() {
        let mut ring = Ring::generate(NOW).unwrap();
        let first = ring.current().unwrap();
        let second = ring.prepare(NOW, PUBLISH_AHEAD).unwrap();
        ring.promote(NOW + PUBLISH_AHEAD).unwrap();
        let third = ring.prepare(NOW + PUBLISH_AHEAD, PUBLISH_AHEAD).unwrap();
        let read = |ring: &Ring| {
            let verifier = Verifier::from_jwks(&ring.jwks()).unwrap();
            move |kid| verifier.keys.get(&kid).map(|public| public.life.state)
        };
        let state = read(&ring);
        assert_eq!([first, second, third].map(state), [Some(State::Retired), Some(State::Current), Some(State::Next)]);
        ring.revoke(second, NOW).unwrap();
        assert_eq!(read(&ring)(second), None);
        assert!(!ring.jwks().contains("\"d\""));
        assert!(ring.jwks().contains(r#"{"kty":"OKP","crv":"Ed25519","use":"sig","alg":"Ed25519","kid":""#));
    }

    #[test]
    fn a_key_set_that_is_not_sound_is_refused() {
        let kid = Kid::of(&rfc_key().verifying_key());
        assert!(Verifier::from_jwks(&jwk("")).unwrap().key(kid, 0).is_ok());
        assert!(Verifier::from_jwks(&jwk(&format!(r#","kid":"{kid}","state":"current","x5t":"whatever""#))).is_ok());
        for wrong in [
            jwk(&format!(r#","d":"{D}""#)),
            jwk(r#","kid":"mine""#),
            jwk(r#","state":"eternal""#),
            jwk(&format!(r#","x":"{X}""#)),
            jwk("").replace(X, &X[..42]),
            jwk("").replace(X, &format!("{X}=")),
            // The neutral element, of order one.
            jwk("").replace(X, &URL_SAFE_NO_PAD.encode([&[1][..], &[0; 31]].concat())),
            jwk("").replace("}]", &format!(r#"}},{{"kty":"OKP","crv":"Ed25519","x":"{X}"}}]"#)),
            format!("[{}]", jwk("")),
            "{".into(),
            " ".repeat(MAX_JWKS_BYTES + 1),
        ] {
            assert!(Verifier::from_jwks(&wrong).is_err(), "{wrong:.200}");
        }
    }

    #[test]
    fn keys_for_other_purposes_are_skipped() {
        for other in [
            r#"{"keys":[{"kty":"RSA","n":"AQAB","e":"AQAB"},{"kty":"EC","crv":"P-256","x":"a","y":"b"},{"kty":"oct"}]}"#.to_owned(),
            jwk(r#","alg":"EdDSA""#),
            jwk(r#","use":"enc""#),
            jwk("").replace("Ed25519", "X25519"),
        ] {
            assert!(Verifier::from_jwks(&other).unwrap().keys.is_empty(), "{other}");
        }
    }

    #[test]
    fn a_next_key_waits_until_verifiers_have_seen_it() {
        let mut ring = Ring::generate(NOW).unwrap();
        let first = ring.current().unwrap();
        assert!(matches!(ring.promote(NOW), Err(KeyFault::NoNext)));
        let next = ring.prepare(NOW, PUBLISH_AHEAD).unwrap();
        assert!(matches!(ring.prepare(NOW, PUBLISH_AHEAD), Err(KeyFault::NextExists)));
        assert!(matches!(ring.promote(NOW + PUBLISH_AHEAD - 1), Err(KeyFault::TooEarly { from }) if from == NOW + PUBLISH_AHEAD));
        assert_eq!(ring.current(), Some(first));
        assert_eq!(ring.promote(NOW + PUBLISH_AHEAD).unwrap(), Rotation { current: next, retired: Some(first) });
        assert_eq!(ring.current(), Some(next));
    }

    #[test]
    fn a_copy_from_before_the_promotion_believes_the_promoted_key() {
        let mut ring = Ring::generate(NOW).unwrap();
        let next = ring.prepare(NOW, PUBLISH_AHEAD).unwrap();
        let stale = Verifier::from_jwks(&ring.jwks()).unwrap();
        ring.promote(NOW + PUBLISH_AHEAD).unwrap();
        assert!(stale.key(next, NOW + PUBLISH_AHEAD).is_ok());
        assert!(stale.key(next, NOW + PUBLISH_AHEAD - LEEWAY).is_ok());
        assert_eq!(stale.key(next, NOW + PUBLISH_AHEAD - LEEWAY - 1), Err(Rejected::KeyState));
    }

    #[test]
    fn a_retired_key_verifies_for_its_time_and_is_then_dropped() {
        let mut ring = Ring::generate(NOW).unwrap();
        let first = ring.current().unwrap();
        ring.prepare(NOW, PUBLISH_AHEAD).unwrap();
        let promoted = NOW + PUBLISH_AHEAD;
        ring.promote(promoted).unwrap();
        assert!(ring.verifier().key(first, promoted + RETIRED_FOR).is_ok());
        assert_eq!(ring.verifier().key(first, promoted + RETIRED_FOR + 1), Err(Rejected::KeyState));
        assert_eq!(ring.sweep(promoted + RETIRED_FOR), []);
        assert_eq!(ring.sweep(promoted + RETIRED_FOR + 1), [first]);
        assert_eq!(ring.verifier().key(first, promoted), Err(Rejected::Kid));
    }

    #[test]
    fn with_the_current_key_revoked_nothing_is_signed_until_the_next_is_promoted() {
        let mut ring = Ring::generate(NOW).unwrap();
        let entry = Entry::first("acme", "1", Digest::of(b""), NOW);
        assert!(!ring.is_due(NOW + ROTATE_AFTER - 1) && ring.is_due(NOW + ROTATE_AFTER));
        ring.revoke(ring.current().unwrap(), NOW).unwrap();
        assert!(ring.is_due(NOW));
        assert_eq!(ring.sign_entry(&entry), Err(Unsigned::NoCurrentKey));
        let next = ring.prepare(NOW, PUBLISH_AHEAD).unwrap();
        assert_eq!(ring.promote(NOW).unwrap(), Rotation { current: next, retired: None });
        assert!(ring.verifier().key(next, NOW).is_ok());
        assert!(ring.sign_entry(&entry).is_ok());
        assert!(ring.jwks().contains(&format!("\"nbf\":{NOW},")), "published as good from now on: {}", ring.jwks());
    }

    #[test]
    fn a_ring_has_a_bound() {
        let mut ring = Ring::generate(NOW).unwrap();
        let mut now = NOW;
        while ring.pairs.len() < MAX_KEYS {
            ring.prepare(now, PUBLISH_AHEAD).unwrap();
            now += PUBLISH_AHEAD;
            ring.promote(now).unwrap();
        }
        assert!(matches!(ring.prepare(now, PUBLISH_AHEAD), Err(KeyFault::Full)));
        assert!(Verifier::from_jwks(&ring.jwks()).is_ok());
        assert!(ring.to_json().len() <= MAX_FILE_BYTES / 2, "{}", ring.to_json().len());
        assert_eq!(Ring::from_json(&ring.to_json()).unwrap().pairs.len(), MAX_KEYS);
    }

    #[test]
    fn a_saved_ring_loads_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keys.json");
        let mut ring = Ring::generate(NOW).unwrap();
        ring.save(&path).unwrap();
        ring.prepare(NOW, PUBLISH_AHEAD).unwrap();
        ring.promote(NOW + PUBLISH_AHEAD).unwrap();
        ring.save(&path).unwrap();
        let loaded = Ring::load(&path).unwrap();
        assert_eq!((loaded.jwks(), loaded.digest()), (ring.jwks(), ring.digest()));
        assert_eq!(loaded.current(), ring.current());
        let names: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, ["keys.json"], "nothing is left beside it");
    }

    #[cfg(unix)]
    #[test]
    fn a_key_file_is_private_and_must_stay_so() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keys.json");
        Ring::generate(NOW).unwrap().save(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        for (mode, fine) in [(0o400, true), (0o440, true), (0o640, true), (0o660, false), (0o604, false), (0o644, false), (0o666, false)] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            match Ring::load(&path) {
                Ok(_) => assert!(fine, "{mode:o}"),
                Err(KeyFault::Exposed { mode: seen, .. }) => assert!(!fine && seen == mode, "{mode:o}"),
                Err(other) => panic!("{other}"),
            }
        }
    }

    #[test]
    fn a_damaged_key_file_is_refused() {
        let ring = Ring::generate(NOW).unwrap();
        let json = String::from_utf8(ring.to_json().to_vec()).unwrap();
        let other = Ring::generate(NOW).unwrap().current().unwrap().to_string();
        let key = &json[9..json.len() - 2];
        assert!(Ring::from_json(json.as_bytes()).is_ok());
        for wrong in [
            String::new(),
            json[..json.len() - 1].to_owned(),
            json.replace("OKP", "EC"),
            json.replace("current", "eternal"),
            json.replace(&ring.current().unwrap().to_string(), &other),
            json.replace("\"d\":\"", "\"d\":\"A"),
            json.replace("\"kty\"", "\"extra\":1,\"kty\""),
            format!("{{\"keys\":[{key},{key}]}}"),
        ] {
            assert!(matches!(Ring::from_json(wrong.as_bytes()), Err(KeyFault::Malformed(_))), "{wrong}");
        }
    }

    #[test]
    fn debug_output_shows_names_and_states_only() {
        let ring = Ring::generate(NOW).unwrap();
        let shown = format!("{ring:?}");
        assert_eq!(shown, format!("{{{}: Current}}", ring.current().unwrap()));
        assert_eq!(format!("{:?}", ring.verifier()), shown);
    }
}
