//! Names bytes by their SHA-256, spelled the way `Content-Digest` spells it (RFC 9530).

use std::{fmt, str::FromStr};

use base64::{Engine, engine::general_purpose::STANDARD};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::{Digest as _, Sha256};

/// The SHA-256 of some bytes.
///
/// `Display`, `FromStr` and serde all use one spelling, `sha-256=:<base64>:`, so that the `Content-Digest` and
/// `Constitution-Hash` headers and the `bdg` and `con` claims can be compared as text too. [`Digest::short`] is for people.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest([u8; 32]);

impl Digest {
    /// The digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Digest {
        Digest(Sha256::digest(bytes).into())
    }

    /// The 32 bytes themselves.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// As it is displayed: 54 characters of ASCII.
    pub fn text(&self) -> [u8; 54] {
        let mut text = *b"sha-256=:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=:";
        if let Some(coded) = text.get_mut(9..53) {
            // 32 bytes are 44 characters.
            let _ = STANDARD.encode_slice(self.0, coded);
        }
        text
    }

    /// `sha-256:<64 hex digits>`, for logs and error bodies.
    pub fn short(&self) -> String {
        use fmt::Write;
        let mut text = String::with_capacity(8 + 64);
        text.push_str("sha-256:");
        for byte in self.0 {
            write!(text, "{byte:02x}").expect("writing to a string cannot fail");
        }
        text
    }
}

impl From<[u8; 32]> for Digest {
    fn from(bytes: [u8; 32]) -> Digest {
        Digest(bytes)
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(std::str::from_utf8(&self.text()).unwrap_or_default())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Text that is not a digest in our one spelling.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a digest: expected sha-256=:<44 characters of base64>:")]
pub struct NotADigest;

impl FromStr for Digest {
    type Err = NotADigest;

    /// Exactly one `sha-256` member, no parameters, no spaces. RFC 9530 would allow further algorithms beside it; we make
    /// every header we read, and a second member is a second opinion about the same bytes.
    fn from_str(text: &str) -> Result<Digest, NotADigest> {
        let coded = text.strip_prefix("sha-256=:").and_then(|rest| rest.strip_suffix(':')).ok_or(NotADigest)?;
        // The length goes first: decoding writes into a buffer of fixed size.
        if coded.len() != 44 {
            return Err(NotADigest);
        }
        STANDARD.decode(coded).ok().and_then(|bytes| bytes.try_into().ok()).map(Digest).ok_or(NotADigest)
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(std::str::from_utf8(&self.text()).unwrap_or_default())
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Digest, D::Error> {
        String::deserialize(from)?.parse().map_err(serde::de::Error::custom)
    }
}

/// A digest of bytes that come piece by piece, such as the text sent to a client.
#[derive(Clone, Default)]
pub struct Hasher(Sha256);

impl Hasher {
    /// Nothing hashed yet.
    pub fn new() -> Hasher {
        Hasher::default()
    }

    /// Adds `bytes`; where they are cut does not matter.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The digest of everything added.
    pub fn finish(self) -> Digest {
        Digest(self.0.finalize().into())
    }
}

impl fmt::Debug for Hasher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The inner state of the hash is a function of the text: it does not belong in a log.
        f.write_str("Hasher")
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_examples_of_rfc_9530_are_reproduced() {
        // RFC 9530 appendix B.1 and B.2.
        assert_eq!(Digest::of(b"{\"hello\": \"world\"}\n").to_string(), "sha-256=:RK/0qy18MlBSVnWgjwz6lZEWjP/lF5HF9bvEF8FabDg=:");
        assert_eq!(Digest::of(b"").to_string(), "sha-256=:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=:");
        assert_eq!(Digest::of(b"").short(), "sha-256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    }

    #[test]
    fn only_the_one_spelling_is_read() {
        let right = "sha-256=:RK/0qy18MlBSVnWgjwz6lZEWjP/lF5HF9bvEF8FabDg=:";
        assert_eq!(right.parse(), Ok(Digest::of(b"{\"hello\": \"world\"}\n")));
        for wrong in [
            "",
            "sha-256=::",
            "SHA-256=:RK/0qy18MlBSVnWgjwz6lZEWjP/lF5HF9bvEF8FabDg=:",
            "sha-256=RK/0qy18MlBSVnWgjwz6lZEWjP/lF5HF9bvEF8FabDg=",
            " sha-256=:RK/0qy18MlBSVnWgjwz6lZEWjP/lF5HF9bvEF8FabDg=:",
            "sha-256=:RK/0qy18MlBSVnWgjwz6lZEWjP/lF5HF9bvEF8FabDg=:;a=1",
            "sha-256=:RK/0qy18MlBSVnWgjwz6lZEWjP/lF5HF9bvEF8FabDg=:, sha-256=:RK/0qy18MlBSVnWgjwz6lZEWjP/lF5HF9bvEF8FabDg=:",
            "sha-512=:RK/0qy18MlBSVnWgjwz6lZEWjP/lF5HF9bvEF8FabDg=:",
            // No padding; trailing bits that decode to the same bytes; the alphabet of base64url.
            "sha-256=:RK/0qy18MlBSVnWgjwz6lZEWjP/lF5HF9bvEF8FabDg:",
            "sha-256=:RK/0qy18MlBSVnWgjwz6lZEWjP/lF5HF9bvEF8FabDh=:",
            "sha-256=:RK_0qy18MlBSVnWgjwz6lZEWjP_lF5HF9bvEF8FabDg=:",
        ] {
            assert_eq!(wrong.parse::<Digest>(), Err(NotADigest), "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn a_digest_reads_back_and_pieces_do_not_matter(bytes in prop::collection::vec(any::<u8>(), 0..200), cut in 0usize..200) {
            let digest = Digest::of(&bytes);
            prop_assert_eq!(digest.to_string().parse(), Ok(digest));
            let (head, tail) = bytes.split_at(cut.min(bytes.len()));
            let mut hasher = Hasher::new();
            hasher.update(head);
            hasher.update(tail);
            prop_assert_eq!(hasher.finish(), digest);
        }

        #[test]
        fn reading_a_digest_never_panics(text in ".{0,80}") {
            let _ = text.parse::<Digest>();
        }
    }
}
