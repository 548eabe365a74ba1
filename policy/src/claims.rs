//! Says what a verdict says: who decided what, about which bytes, under which policy, until when.

use std::{cell::RefCell, fmt, str::FromStr};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::Digest;

/// The audience of a dispatch verdict.
pub const ORCHESTRATOR: &str = "orchestrator";
/// The audience of an output verdict: whoever asks later what left.
pub const AUDIT: &str = "audit";
/// Seconds from `iat` to `exp`; a verifier accepts no longer life, so that remembering used verdicts has a bound.
pub const LIFETIME: u64 = 60;

/// What a verdict claims. No message text and nothing about a person beyond the opaque `sub`; at most 2 KiB as JSON.
///
/// Unknown and repeated members are refused: a claim one does not know may be the one that restricts. A new claim therefore
/// needs a new `typ`, and verifiers are upgraded before signers.
///
/// `T`: whose texts they are. A verifier has its own; a signer borrows those of its turn.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Claims<T = String> {
    /// The gateway deployment; its instances share this name and differ by key.
    pub iss: T,
    /// For whom: [`ORCHESTRATOR`] or [`AUDIT`].
    pub aud: T,
    /// Signed at, Unix seconds.
    pub iat: u64,
    /// Good until, Unix seconds: `iat` + [`LIFETIME`].
    pub exp: u64,
    /// This verdict's own number: it is accepted once.
    pub jti: Jti,
    /// The tenant.
    pub tid: T,
    /// The subject within the tenant: opaque.
    pub sub: T,
    /// The session.
    pub sid: T,
    /// The turn.
    pub turn: T,
    /// What was judged.
    pub dir: Direction,
    /// The HTTP method of the dispatch; absent for an output.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub htm: Option<T>,
    /// The path of the dispatch, without query; absent for an output.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub htu: Option<T>,
    /// The digest of the exact bytes judged: the dispatched body or WebSocket payload, or the text sent to the client.
    pub bdg: Digest,
    /// The decision.
    pub dec: Decision,
    /// The categories found, by their stable names.
    pub cat: Vec<T>,
    /// The policy applied.
    pub pol: Policy<T>,
    /// The hash of the constitution in force.
    pub con: Digest,
    /// Whether policy was enforced, or the turn ran in training mode.
    pub mode: Mode,
    /// The fence of the training lock; present exactly in training mode.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fence: Option<u64>,
    /// The W3C trace id, 32 hex digits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trc: Option<T>,
}

impl<T> Claims<T> {
    /// The same claims for a turn in training mode, under the lock with this `fence`.
    pub fn in_training(mut self, fence: u64) -> Claims<T> {
        self.mode = Mode::Training;
        self.fence = Some(fence);
        self
    }

    /// Whether the members fit each other; serde has checked each alone.
    pub(crate) fn is_consistent(&self) -> bool {
        let fenced = match self.mode {
            Mode::Enforce => self.fence.is_none(),
            Mode::Training => self.fence.is_some(),
        };
        let addressed = match self.dir {
            Direction::Input | Direction::Tool => self.htm.is_some() && self.htu.is_some(),
            // For an audit it is about a text and no request; told to an orchestrator, about the request that tells it.
            Direction::Output => self.htm.is_some() == self.htu.is_some(),
        };
        fenced && addressed
    }
}

/// What was decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decision {
    /// It went as it came.
    Allow,
    /// Parts were masked.
    Redact,
    /// Something was found; it went as it came.
    Flag,
    /// It did not go, or was cut.
    Deny,
}

/// What was judged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// A prompt, on its way to the orchestrator.
    Input,
    /// The answer, as the client got it.
    Output,
    /// A tool call, on its way out.
    Tool,
}

/// How policy was applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// As written.
    Enforce,
    /// In training mode, by an admin holding the lock.
    Training,
}

/// A policy by name and version.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Policy<T = String> {
    /// Its name.
    pub id: T,
    /// Its version, as in the `Policy-Version` header.
    pub ver: T,
}

/// A verdict's number: 128 random bits, on the wire as 22 characters of base64url.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Jti([u8; 16]);

impl Jti {
    /// A number nobody can guess. Errors: [`Unsigned::Random`].
    pub fn fresh() -> Result<Jti, Unsigned> {
        let draw = |drawn: &RefCell<Drawn>| {
            let Drawn { numbers, left } = &mut *drawn.borrow_mut();
            if *left == 0 {
                getrandom::fill(numbers.as_flattened_mut()).ok()?;
                *left = numbers.len();
            }
            *left -= 1;
            // Taken out of it, so that none is used again.
            numbers.get_mut(*left).map(|number| Jti(std::mem::take(number)))
        };
        DRAWN.try_with(draw).ok().flatten().ok_or(Unsigned::Random)
    }

    fn text(&self) -> [u8; 22] {
        let mut text = [b'A'; 22];
        // 16 bytes are 22 characters.
        let _ = URL_SAFE_NO_PAD.encode_slice(self.0, &mut text);
        text
    }
}

/// Numbers nobody has had yet. The system is asked for many at once: that costs more than all that is done with them.
struct Drawn {
    numbers: [[u8; 16]; 64],
    left: usize,
}

thread_local! {
    static DRAWN: RefCell<Drawn> = const { RefCell::new(Drawn { numbers: [[0; 16]; 64], left: 0 }) };
}

impl FromStr for Jti {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Jti, &'static str> {
        const EXPECTED: &str = "expected 16 bytes as 22 characters of base64url";
        if text.len() != 22 {
            return Err(EXPECTED);
        }
        URL_SAFE_NO_PAD.decode(text).ok().and_then(|bytes| bytes.try_into().ok()).map(Jti).ok_or(EXPECTED)
    }
}

impl fmt::Display for Jti {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(std::str::from_utf8(&self.text()).unwrap_or_default())
    }
}

impl fmt::Debug for Jti {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for Jti {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(std::str::from_utf8(&self.text()).unwrap_or_default())
    }
}

impl<'de> Deserialize<'de> for Jti {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Jti, D::Error> {
        String::deserialize(from)?.parse().map_err(serde::de::Error::custom)
    }
}

/// The part of every verdict that a plan fixes once: who speaks, and under which policy.
#[derive(Debug, Clone)]
pub struct Issuer {
    /// The gateway deployment.
    pub iss: String,
    /// The policy in force.
    pub pol: Policy,
    /// Its constitution's hash.
    pub con: Digest,
}

/// The part of a verdict that belongs to its turn.
#[derive(Debug, Clone, Copy)]
pub struct Facts<'a> {
    /// The tenant.
    pub tid: &'a str,
    /// The subject, opaque.
    pub sub: &'a str,
    /// The session.
    pub sid: &'a str,
    /// The turn.
    pub turn: &'a str,
    /// The decision.
    pub dec: Decision,
    /// The categories found, by their stable names.
    pub cat: &'a [&'a str],
    /// The W3C trace id, where there is one.
    pub trc: Option<&'a str>,
}

impl Issuer {
    /// The claims for a dispatch to the orchestrator.
    ///
    /// `htu`: the path; a query is cut off, as it may hold text. `body`: the digest of the exact bytes to be sent. `now`: Unix
    /// seconds. Errors: [`Unsigned::Random`].
    pub fn dispatch<'a, T: From<&'a str>>(
        &'a self,
        facts: &Facts<'a>,
        htm: &'a str,
        htu: &'a str,
        body: Digest,
        now: u64,
    ) -> Result<Claims<T>, Unsigned> {
        let path = htu.split(['?', '#']).next().unwrap_or_default();
        Ok(Claims { htm: Some(htm.into()), htu: Some(path.into()), ..self.claims(facts, ORCHESTRATOR, Direction::Input, body, now)? })
    }

    /// The claims for an answer that has ended.
    ///
    /// `emitted`: the digest of the text the client was sent, see [`crate::Hasher`]. `now`: Unix seconds. Errors:
    /// [`Unsigned::Random`].
    pub fn output<'a, T: From<&'a str>>(&'a self, facts: &Facts<'a>, emitted: Digest, now: u64) -> Result<Claims<T>, Unsigned> {
        self.claims(facts, AUDIT, Direction::Output, emitted, now)
    }

    fn claims<'a, T: From<&'a str>>(
        &'a self,
        facts: &Facts<'a>,
        aud: &'static str,
        dir: Direction,
        bdg: Digest,
        now: u64,
    ) -> Result<Claims<T>, Unsigned> {
        Ok(Claims {
            iss: self.iss.as_str().into(),
            aud: aud.into(),
            iat: now,
            exp: now.saturating_add(LIFETIME),
            jti: Jti::fresh()?,
            tid: facts.tid.into(),
            sub: facts.sub.into(),
            sid: facts.sid.into(),
            turn: facts.turn.into(),
            dir,
            htm: None,
            htu: None,
            bdg,
            dec: facts.dec,
            cat: facts.cat.iter().map(|&category| category.into()).collect(),
            pol: Policy { id: self.pol.id.as_str().into(), ver: self.pol.ver.as_str().into() },
            con: self.con,
            mode: Mode::Enforce,
            fence: None,
            trc: facts.trc.map(T::from),
        })
    }

    /// The claims for what a gateway tells the orchestrator of a turn: `Input`, that its prompt was refused; `Output`, what the
    /// user got. As [`Issuer::dispatch`] otherwise.
    pub fn report<'a, T: From<&'a str>>(
        &'a self,
        facts: &Facts<'a>,
        dir: Direction,
        htm: &'a str,
        htu: &'a str,
        body: Digest,
        now: u64,
    ) -> Result<Claims<T>, Unsigned> {
        Ok(Claims { dir, ..self.dispatch(facts, htm, htu, body, now)? })
    }
}

/// Why a verdict could not be signed. The turn must fail: nothing is dispatched without one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unsigned {
    /// The ring has no current key.
    #[error("cannot sign: no current key")]
    NoCurrentKey,
    /// The claims are larger than 2 KiB.
    #[error("cannot sign: claims exceed {} bytes", crate::jws::MAX_PAYLOAD_BYTES)]
    TooLarge,
    /// The operating system gave no randomness.
    #[error("cannot sign: no randomness")]
    Random,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claims() -> Claims {
        let issuer =
            Issuer { iss: "headgate".into(), pol: Policy { id: "default".into(), ver: "7".into() }, con: Digest::of(b"constitution") };
        let facts = Facts { tid: "acme", sub: "u", sid: "s", turn: "t", dec: Decision::Redact, cat: &["pii"], trc: Some("0af7") };
        issuer.dispatch(&facts, "POST", "/v1/conversation/step?secret=1#x", Digest::of(b"body"), 1000).unwrap()
    }

    #[test]
    fn a_dispatch_verdict_has_the_published_members() {
        let json = serde_json::to_string(&claims()).unwrap();
        let jti = claims().jti.to_string();
        let shape = format!(
            "{{\"iss\":\"headgate\",\"aud\":\"orchestrator\",\"iat\":1000,\"exp\":1060,\"jti\":\"{jti}\",\"tid\":\"acme\",\"sub\":\"u\",\
             \"sid\":\"s\",\"turn\":\"t\",\"dir\":\"input\",\"htm\":\"POST\",\"htu\":\"/v1/conversation/step\",\
             \"bdg\":\"{}\",\"dec\":\"redact\",\"cat\":[\"pii\"],\"pol\":{{\"id\":\"default\",\"ver\":\"7\"}},\"con\":\"{}\",\
             \"mode\":\"enforce\",\"trc\":\"0af7\"}}",
            Digest::of(b"body"),
            Digest::of(b"constitution"),
        );
        let blank = |text: &str| {
            let at = text.find("\"jti\":\"").unwrap() + 7;
            format!("{}{}", &text[..at], &text[at + 22..])
        };
        assert_eq!(blank(&json), blank(&shape));
    }

    #[test]
    fn two_verdicts_never_share_a_number() {
        // More than are drawn at once, and on two threads.
        let drawn = || (0..200).map(|_| Jti::fresh().unwrap()).collect::<Vec<_>>();
        let (here, there) = (drawn(), std::thread::spawn(drawn).join().unwrap());
        assert_eq!(here.into_iter().chain(there).collect::<std::collections::HashSet<_>>().len(), 400);
        let jti = Jti::fresh().unwrap();
        assert_eq!(jti.to_string().parse(), Ok(jti));
        assert!("AAAAAAAAAAAAAAAAAAAAAB".parse::<Jti>().is_err(), "trailing bits");
        assert!("AAAAAAAAAAAAAAAAAAAAAA==".parse::<Jti>().is_err());
    }

    #[test]
    fn repeated_unknown_and_mistyped_claims_are_refused() {
        let json = serde_json::to_string(&claims()).unwrap();
        assert!(serde_json::from_str::<Claims>(&json).is_ok());
        for (from, to) in [
            ("\"tid\":\"acme\"", "\"tid\":\"acme\",\"tid\":\"other\""),
            ("\"tid\":\"acme\"", "\"tid\":\"acme\",\"admin\":true"),
            ("\"exp\":1060", "\"exp\":\"1060\""),
            ("\"exp\":1060", "\"exp\":1060.5"),
            ("\"exp\":1060", "\"exp\":-1"),
            ("\"exp\":1060", "\"exp\":1e99"),
            ("\"exp\":1060,", ""),
            ("\"dec\":\"redact\"", "\"dec\":\"Allow\""),
            ("\"ver\":\"7\"", "\"ver\":\"7\",\"ver\":\"8\""),
        ] {
            let changed = json.replacen(from, to, 1);
            assert_ne!(changed, json, "{from}");
            assert!(serde_json::from_str::<Claims>(&changed).is_err(), "{to}");
        }
    }

    #[test]
    fn a_fence_goes_with_training_and_with_nothing_else() {
        assert!(claims().is_consistent());
        assert!(claims().in_training(7).is_consistent());
        assert!(!Claims { fence: Some(7), ..claims() }.is_consistent());
        assert!(!Claims { mode: Mode::Training, ..claims() }.is_consistent());
        assert!(Claims { dir: Direction::Output, ..claims() }.is_consistent());
        assert!(!Claims { dir: Direction::Output, htm: None, ..claims() }.is_consistent());
        assert!(!Claims { htu: None, ..claims() }.is_consistent());
    }
}
