//! Writes and reads the one JWS we speak: compact, Ed25519, a header of exactly three members (RFC 7515, RFC 8037, RFC 9864).
//!
//! General JOSE libraries are built to negotiate. Here there is nothing to negotiate: one algorithm, keys found by thumbprint
//! among those already trusted, no header that could point elsewhere. What is not exactly that shape is not read at all.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use ed25519_dalek::{Signature, VerifyingKey};
use serde::{Deserialize, de::DeserializeOwned};

use crate::{Kid, Rejected};

/// The largest payload, in bytes of JSON.
pub(crate) const MAX_PAYLOAD_BYTES: usize = 2048;
/// The largest header, in characters of base64url: ours needs 122.
const MAX_HEADER_CHARS: usize = 256;
const MAX_PAYLOAD_CHARS: usize = (MAX_PAYLOAD_BYTES * 4).div_ceil(3);
/// An Ed25519 signature is 64 bytes.
const SIGNATURE_CHARS: usize = 86;
const MAX_CHARS: usize = MAX_HEADER_CHARS + 1 + MAX_PAYLOAD_CHARS + 1 + SIGNATURE_CHARS;

/// RFC 9864 section 2.2: the fully specified name; the older `EdDSA` would leave the curve open.
const ALG: &str = "Ed25519";

/// What a token is for. A token of one kind is never read as the other (RFC 8725 section 3.11).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Typ {
    Verdict,
    Entry,
}

impl Typ {
    fn as_str(self) -> &'static str {
        match self {
            Typ::Verdict => "policy-verdict+jwt",
            Typ::Entry => "policy-entry+jwt",
        }
    }
}

/// The header of a key's tokens of one kind, as it stands in each of them.
pub(crate) struct Header(String);

impl Header {
    pub(crate) fn of(kid: Kid, typ: Typ) -> Header {
        Header(URL_SAFE_NO_PAD.encode(format!(r#"{{"alg":"{ALG}","typ":"{}","kid":"{kid}"}}"#, typ.as_str())))
    }
}

/// Signs `payload`; `None` when it is larger than [`MAX_PAYLOAD_BYTES`].
pub(crate) fn sign(sign: impl FnOnce(&[u8]) -> [u8; 64], header: &Header, payload: &[u8]) -> Option<String> {
    (payload.len() <= MAX_PAYLOAD_BYTES).then(|| seal(sign, header, payload))
}

fn seal(sign: impl FnOnce(&[u8]) -> [u8; 64], Header(header): &Header, payload: &[u8]) -> String {
    let mut token = String::with_capacity(header.len() + 2 + (payload.len() * 4).div_ceil(3) + SIGNATURE_CHARS);
    token.push_str(header);
    token.push('.');
    URL_SAFE_NO_PAD.encode_string(payload, &mut token);
    let signature = sign(token.as_bytes());
    token.push('.');
    URL_SAFE_NO_PAD.encode_string(signature, &mut token);
    token
}

/// A token of the right shape, whose signature is still to be checked: hence no way to its payload but [`Parsed::signed_by`].
#[derive(Debug)]
pub(crate) struct Parsed<'a> {
    pub(crate) kid: Kid,
    signed: &'a str,
    payload: Vec<u8>,
    signature: Signature,
}

/// Takes a token apart.
///
/// Errors, in this order: [`Rejected::Size`], [`Rejected::Shape`], [`Rejected::Typ`], [`Rejected::Alg`], [`Rejected::Kid`].
/// Work: bounded by the size limit; nothing is decoded before the sizes are known to be right.
pub(crate) fn parse(token: &str, typ: Typ) -> Result<Parsed<'_>, Rejected> {
    if token.len() > MAX_CHARS {
        return Err(Rejected::Size);
    }
    let (signed, signature) = token.rsplit_once('.').ok_or(Rejected::Shape)?;
    let (header, payload) = signed.split_once('.').ok_or(Rejected::Shape)?;
    if header.len() > MAX_HEADER_CHARS || payload.len() > MAX_PAYLOAD_CHARS {
        return Err(Rejected::Size);
    }
    // A fourth part leaves a dot in the payload, which is not in the alphabet.
    let header = decode(header)?;
    let payload = decode(payload)?;
    let signature = Signature::from_slice(&decode(signature)?).map_err(|_| Rejected::Shape)?;

    let header: Members = object(&header).ok_or(Rejected::Shape)?;
    if header.typ.as_deref() != Some(typ.as_str()) {
        return Err(Rejected::Typ);
    }
    if header.alg.as_deref() != Some(ALG) {
        return Err(Rejected::Alg);
    }
    let kid = header.kid.and_then(|kid| kid.parse().ok()).ok_or(Rejected::Kid)?;
    Ok(Parsed { kid, signed, payload, signature })
}

impl Parsed<'_> {
    /// The payload, if `key` signed it. Strict: small-order keys and points are refused, so that a signature says one thing.
    pub(crate) fn signed_by(self, key: &VerifyingKey) -> Result<Vec<u8>, Rejected> {
        key.verify_strict(self.signed.as_bytes(), &self.signature).map_err(|_| Rejected::Signature)?;
        Ok(self.payload)
    }
}

/// `crit`, `jwk`, `jku`, `x5u`, `x5c`, `b64`, `zip` and everything else are unknown members, and so refused.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Members {
    typ: Option<String>,
    alg: Option<String>,
    kid: Option<String>,
}

/// Reads a JSON object and nothing else. serde would also fill a struct from an array, whose members have no names to check.
pub(crate) fn object<T: DeserializeOwned>(json: &[u8]) -> Option<T> {
    if json.first() != Some(&b'{') {
        return None;
    }
    serde_json::from_slice(json).ok()
}

/// Base64url without padding and with no stray trailing bits: one text per value.
fn decode(text: &str) -> Result<Vec<u8>, Rejected> {
    URL_SAFE_NO_PAD.decode(text).map_err(|_| Rejected::Shape)
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use ed25519_dalek::{Signer, SigningKey};

    use super::*;

    /// The key pair of RFC 8037 appendix A.1.
    pub(crate) const D: &str = "nWGxne_9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2A";
    pub(crate) const X: &str = "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo";

    pub(crate) fn rfc_key() -> SigningKey {
        SigningKey::from_bytes(&URL_SAFE_NO_PAD.decode(D).unwrap().try_into().unwrap())
    }

    /// A token with a header of the test's choosing, truly signed.
    pub(crate) fn forge(key: &SigningKey, header: &str, payload: &[u8]) -> String {
        seal(|bytes| key.sign(bytes).to_bytes(), &Header(URL_SAFE_NO_PAD.encode(header)), payload)
    }

    fn header(key: &SigningKey) -> String {
        format!(r#"{{"alg":"Ed25519","typ":"policy-verdict+jwt","kid":"{}"}}"#, Kid::of(&key.verifying_key()))
    }

    fn read(token: &str) -> Result<Vec<u8>, Rejected> {
        parse(token, Typ::Verdict)?.signed_by(&rfc_key().verifying_key())
    }

    #[test]
    fn the_signature_of_rfc_8037_appendix_a4_is_reproduced() {
        let token = forge(&rfc_key(), r#"{"alg":"EdDSA"}"#, b"Example of Ed25519 signing");
        assert_eq!(
            token,
            "eyJhbGciOiJFZERTQSJ9.RXhhbXBsZSBvZiBFZDI1NTE5IHNpZ25pbmc.hgyY0il_MGCjP0JzlnLWG1PPOt7-09PGcvMg3AIbQR6dWbhijcNR4ki4iylGjg5BhVsPt9g7sVvpAr_MuM0KAg"
        );
        // As a verdict it is refused: no typ, and the algorithm by its deprecated name.
        assert_eq!(read(&token), Err(Rejected::Typ));
    }

    #[test]
    fn what_was_signed_reads_back() {
        let key = rfc_key();
        let kid = Kid::of(&key.verifying_key());
        let token = sign(|bytes| key.sign(bytes).to_bytes(), &Header::of(kid, Typ::Verdict), b"{\"a\":1}").unwrap();
        assert_eq!(parse(&token, Typ::Verdict).unwrap().kid, kid);
        assert_eq!(read(&token), Ok(b"{\"a\":1}".to_vec()));
        assert_eq!(parse(&token, Typ::Entry).unwrap_err(), Rejected::Typ);
    }

    #[test]
    fn another_algorithm_is_refused_even_when_truly_signed() {
        let kid = Kid::of(&rfc_key().verifying_key());
        for alg in ["none", "NoNe", "NONE", "", "EdDSA", "ed25519", "Ed448", "ES256", "RS256", "HS256"] {
            let header = format!(r#"{{"alg":"{alg}","typ":"policy-verdict+jwt","kid":"{kid}"}}"#);
            assert_eq!(read(&forge(&rfc_key(), &header, b"{}")), Err(Rejected::Alg), "{alg}");
        }
        let header = format!(r#"{{"typ":"policy-verdict+jwt","kid":"{kid}"}}"#);
        assert_eq!(read(&forge(&rfc_key(), &header, b"{}")), Err(Rejected::Alg));
    }

    #[test]
    fn an_hmac_with_the_public_key_as_secret_is_refused() {
        use sha2::{Digest, Sha256};
        // The classic confusion: a verifier that lets the token choose takes the public key for an HMAC secret.
        let public = rfc_key().verifying_key().to_bytes();
        let kid = Kid::of(&rfc_key().verifying_key());
        for alg in ["HS256", "Ed25519"] {
            let header = format!(r#"{{"alg":"{alg}","typ":"policy-verdict+jwt","kid":"{kid}"}}"#);
            let signed = format!("{}.{}", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode("{}"));
            let (mut inner, mut outer) = ([0x36_u8; 64], [0x5c_u8; 64]);
            for (at, byte) in public.iter().enumerate() {
                inner[at] ^= byte;
                outer[at] ^= byte;
            }
            let mac = Sha256::digest([&inner[..], signed.as_bytes()].concat());
            let mac = Sha256::digest([&outer[..], &mac[..]].concat());
            assert_eq!(read(&format!("{signed}.{}", URL_SAFE_NO_PAD.encode(mac))), Err(Rejected::Shape), "32 bytes as {alg}");
            let doubled = URL_SAFE_NO_PAD.encode([&mac[..], &mac[..]].concat());
            let why = if alg == "HS256" { Rejected::Alg } else { Rejected::Signature };
            assert_eq!(read(&format!("{signed}.{doubled}")), Err(why), "64 bytes as {alg}");
        }
    }

    #[test]
    fn a_header_with_anything_more_is_refused() {
        let kid = Kid::of(&rfc_key().verifying_key());
        for more in [
            r#""crit":["exp"]"#,
            r#""jwk":{"kty":"OKP"}"#,
            r#""jku":"https://x/""#,
            r#""x5u":"https://x/""#,
            r#""x5c":[]"#,
            r#""x5t":"""#,
            r#""b64":false"#,
            r#""zip":"DEF""#,
            r#""cty":"JWT""#,
            r#""enc":"A256GCM""#,
            r#""alg":"Ed25519""#,
            r#""kid":"other""#,
        ] {
            let header = format!(r#"{{"alg":"Ed25519","typ":"policy-verdict+jwt","kid":"{kid}",{more}}}"#);
            assert_eq!(read(&forge(&rfc_key(), &header, b"{}")), Err(Rejected::Shape), "{more}");
        }
        let array = format!(r#"["policy-verdict+jwt","Ed25519","{kid}"]"#);
        assert_eq!(read(&forge(&rfc_key(), &array, b"{}")), Err(Rejected::Shape));
    }

    #[test]
    fn the_order_of_header_members_does_not_matter() {
        let kid = Kid::of(&rfc_key().verifying_key());
        let header = format!(r#"{{ "kid":"{kid}", "typ":"policy-verdict+jwt", "alg":"Ed25519" }}"#);
        assert_eq!(read(&forge(&rfc_key(), &header, b"{}")), Ok(b"{}".to_vec()));
    }

    #[test]
    fn a_kid_that_is_no_thumbprint_is_refused() {
        for kid in
            ["", "../../etc/passwd", "' OR 1=1 --", &"A".repeat(42), &"A".repeat(44), &format!("{}=", "A".repeat(42)), &"B".repeat(43)]
        {
            let header = format!(r#"{{"alg":"Ed25519","typ":"policy-verdict+jwt","kid":"{kid}"}}"#);
            assert_eq!(read(&forge(&rfc_key(), &header, b"{}")), Err(Rejected::Kid), "{kid}");
        }
    }

    #[test]
    fn only_three_canonical_parts_are_read() {
        let token = forge(&rfc_key(), &header(&rfc_key()), b"{\"ab\":1}");
        let parts: Vec<&str> = token.split('.').collect();
        let [head, body, signature] = parts[..] else { panic!("three parts") };
        assert!(read(&token).is_ok());
        for wrong in [
            String::new(),
            "..".into(),
            head.into(),
            format!("{head}.{body}"),
            format!("{head}.{body}."),
            format!("{head}.{body}.{signature}."),
            format!(".{head}.{body}.{signature}"),
            format!("{head}.{body}.{signature}.{signature}.{signature}"),
            format!("{head}.{body}=.{signature}"),
            format!("{head}.{body}.{signature}=="),
            format!("{head}.{body}.{signature} "),
            format!("{head}.{body}\n.{signature}"),
            format!("{head}.{body}.{}", &signature[..84]),
            format!(r#"{{"protected":"{head}","payload":"{body}","signature":"{signature}"}}"#),
        ] {
            assert_eq!(read(&wrong), Err(Rejected::Shape), "{wrong}");
        }
        // The last character of 64 bytes carries two bits: of the sixteen that carry the same two, one is canonical.
        let stem = &signature[..85];
        let others = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_".chars();
        let accepted = others.filter(|last| read(&format!("{head}.{body}.{stem}{last}")).is_ok()).count();
        assert_eq!(accepted, 1);
    }

    #[test]
    fn size_is_the_first_thing_looked_at() {
        assert_eq!(read(&"A".repeat(10_000_000)), Err(Rejected::Size));
        let kid = Kid::of(&rfc_key().verifying_key());
        assert!(
            sign(|bytes| rfc_key().sign(bytes).to_bytes(), &Header::of(kid, Typ::Verdict), &vec![b' '; MAX_PAYLOAD_BYTES + 1]).is_none()
        );
        let largest =
            sign(|bytes| rfc_key().sign(bytes).to_bytes(), &Header::of(kid, Typ::Verdict), &vec![b' '; MAX_PAYLOAD_BYTES]).unwrap();
        assert!(read(&largest).is_ok());
        let larger = forge(&rfc_key(), &header(&rfc_key()), &vec![b' '; MAX_PAYLOAD_BYTES + 1]);
        assert_eq!(read(&larger), Err(Rejected::Size));
        let wide = header(&rfc_key()) + &" ".repeat(200);
        assert_eq!(read(&forge(&rfc_key(), &wide, b"{}")), Err(Rejected::Size));
    }

    #[test]
    fn a_signature_has_one_form() {
        // The group's order, little-endian: adding it to the scalar gives a second signature that a lax verifier accepts.
        const ORDER: &str = "edd3f55c1a631258d69cf7a2def9de1400000000000000000000000000000010";
        let token = forge(&rfc_key(), &header(&rfc_key()), b"{}");
        let (signed, signature) = token.rsplit_once('.').unwrap();
        let mut bytes = URL_SAFE_NO_PAD.decode(signature).unwrap();
        let mut carry = 0;
        for (at, byte) in bytes[32..].iter_mut().enumerate() {
            let sum = u16::from(*byte) + u16::from_str_radix(&ORDER[2 * at..2 * at + 2], 16).unwrap() + carry;
            *byte = sum.to_le_bytes()[0];
            carry = sum >> 8;
        }
        assert_eq!(carry, 0);
        assert_eq!(read(&format!("{signed}.{}", URL_SAFE_NO_PAD.encode(&bytes))), Err(Rejected::Signature));
        // A point of small order signs everything for a key of small order: neither is believed.
        let weak = [&[1][..], &[0; 63]].concat();
        let weak_key = VerifyingKey::from_bytes(weak[..32].try_into().unwrap()).unwrap();
        let token = format!("{signed}.{}", URL_SAFE_NO_PAD.encode(&weak));
        assert_eq!(parse(&token, Typ::Verdict).unwrap().signed_by(&weak_key), Err(Rejected::Signature));
        use ed25519_dalek::Verifier;
        assert!(weak_key.verify(signed.as_bytes(), &Signature::from_slice(&weak).unwrap()).is_ok(), "the lax check would be fooled");
    }

    proptest! {
        #[test]
        fn reading_never_panics(token in "[A-Za-z0-9_.=-]{0,200}|.{0,100}") {
            prop_assert!(read(&token).is_err());
        }
    }
}
