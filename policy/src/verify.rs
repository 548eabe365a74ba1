//! Decides whether a verdict is believed: cheap questions first, the one that uses it up last.

use crate::{
    Claims, Decision, Digest, Direction, Jti, LIFETIME, Registry, Replays, Standing, Use, Verifier,
    jws::{self, Typ},
};

/// Seconds two clocks may differ.
pub const LEEWAY: u64 = 5;

/// What the receiver knows about the request that came with the verdict; the verdict must say the same.
#[derive(Debug, Clone, Copy)]
pub struct Expect<'a> {
    /// The gateway deployment that is trusted.
    pub iss: &'a str,
    /// The receiver: [`crate::ORCHESTRATOR`] or [`crate::AUDIT`].
    pub aud: &'a str,
    /// What should have been judged.
    pub dir: Direction,
    /// The tenant.
    pub tid: &'a str,
    /// The session.
    pub sid: &'a str,
    /// The turn.
    pub turn: &'a str,
    /// The method of the request; `None` for an output.
    pub htm: Option<&'a str>,
    /// The path of the request, without query; `None` for an output.
    pub htu: Option<&'a str>,
    /// The digest of the bytes received, computed by the receiver and not read from a header.
    pub body: Digest,
    /// Unix seconds.
    pub now: u64,
    /// Seconds the clocks may differ; [`LEEWAY`] unless there is a reason. It widens both ends, inclusively.
    pub leeway: u64,
}

/// Why a verdict is not believed, in the order the questions are asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Rejected {
    /// Larger than any verdict.
    #[error("the verdict is too large")]
    Size,
    /// Not a compact JWS of our shape, or claims that are not ours.
    #[error("the verdict is malformed")]
    Shape,
    /// A token made for something else.
    #[error("the token is not a policy verdict")]
    Typ,
    /// Any algorithm but Ed25519.
    #[error("the verdict is not signed with Ed25519")]
    Alg,
    /// A key that is not known here.
    #[error("the verdict's key is unknown")]
    Kid,
    /// A key that is revoked, past its time, or not in use yet.
    #[error("the verdict's key is not in use")]
    KeyState,
    /// Not signed by that key, or changed since.
    #[error("the verdict's signature is wrong")]
    Signature,
    /// Signed for another deployment's name.
    #[error("the verdict is from another issuer")]
    Issuer,
    /// Made for another receiver.
    #[error("the verdict is for another audience")]
    Audience,
    /// A life that is empty or longer than allowed.
    #[error("the verdict's lifetime is out of bounds")]
    Lifetime,
    /// From the future.
    #[error("the verdict is not valid yet")]
    NotYet,
    /// From the past.
    #[error("the verdict has expired")]
    Expired,
    /// Judged something else than what came.
    #[error("the verdict is about another direction")]
    Direction,
    /// Another tenant's.
    #[error("the verdict is for another tenant")]
    Tenant,
    /// Another session's.
    #[error("the verdict is for another session")]
    Session,
    /// Another turn's.
    #[error("the verdict is for another turn")]
    Turn,
    /// For another method.
    #[error("the verdict is for another method")]
    Method,
    /// For another path.
    #[error("the verdict is for another path")]
    Path,
    /// For other bytes.
    #[error("the verdict is for another body")]
    Digest,
    /// It says no: what it judged must not go on.
    #[error("the verdict denies the dispatch")]
    Denied,
    /// The constitution is in force under another version.
    #[error("the verdict names another policy version")]
    Version,
    /// The constitution is not in force.
    #[error("the verdict's constitution is not in force")]
    Constitution,
    /// Whether it is in force cannot be told.
    #[error("the policy registry is unavailable")]
    Registry,
    /// Used before.
    #[error("the verdict has been used before")]
    Replayed,
    /// Whether it was used before cannot be told.
    #[error("the replay guard is unavailable")]
    Unguarded,
}

impl Rejected {
    /// Every reason, so that its counter can stand at zero before it happens.
    pub const ALL: [Rejected; 25] = [
        Rejected::Size,
        Rejected::Shape,
        Rejected::Typ,
        Rejected::Alg,
        Rejected::Kid,
        Rejected::KeyState,
        Rejected::Signature,
        Rejected::Issuer,
        Rejected::Audience,
        Rejected::Lifetime,
        Rejected::NotYet,
        Rejected::Expired,
        Rejected::Direction,
        Rejected::Tenant,
        Rejected::Session,
        Rejected::Turn,
        Rejected::Method,
        Rejected::Path,
        Rejected::Digest,
        Rejected::Denied,
        Rejected::Version,
        Rejected::Constitution,
        Rejected::Registry,
        Rejected::Replayed,
        Rejected::Unguarded,
    ];

    /// The stable word for metrics and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Rejected::Size => "size",
            Rejected::Shape => "shape",
            Rejected::Typ => "typ",
            Rejected::Alg => "alg",
            Rejected::Kid => "kid",
            Rejected::KeyState => "key_state",
            Rejected::Signature => "signature",
            Rejected::Issuer => "issuer",
            Rejected::Audience => "audience",
            Rejected::Lifetime => "lifetime",
            Rejected::NotYet => "not_yet",
            Rejected::Expired => "expired",
            Rejected::Direction => "direction",
            Rejected::Tenant => "tenant",
            Rejected::Session => "session",
            Rejected::Turn => "turn",
            Rejected::Method => "method",
            Rejected::Path => "path",
            Rejected::Digest => "digest",
            Rejected::Denied => "denied",
            Rejected::Version => "version",
            Rejected::Constitution => "constitution",
            Rejected::Registry => "registry",
            Rejected::Replayed => "replayed",
            Rejected::Unguarded => "unguarded",
        }
    }
}

/// A verdict that is right in everything but may have been used before.
#[derive(Debug)]
#[must_use = "a verdict that is not spent can be replayed"]
pub struct Unspent {
    claims: Claims,
    leeway: u64,
}

impl Unspent {
    /// What it claims, to look it up in a shared store; acting on it has to wait for [`Unspent::settle`].
    pub fn claims(&self) -> &Claims {
        &self.claims
    }

    /// Its number, and the Unix second until which a store has to remember it.
    pub fn number(&self) -> (Jti, u64) {
        // Once for the verifier's own leeway, once more for verifiers whose clocks differ.
        (self.claims.jti, self.claims.exp.saturating_add(self.leeway.saturating_mul(2)))
    }

    /// Uses it up in this process's memory. Errors: [`Rejected::Replayed`], [`Rejected::Unguarded`].
    pub fn spend(self, replays: &Replays, now: u64) -> Result<Claims, Rejected> {
        let (jti, until) = self.number();
        self.settle(replays.spend(jti, until, now))
    }

    /// Gives the claims if this was the verdict's first use, by the word of a shared store the caller asked.
    ///
    /// Errors: [`Rejected::Replayed`], [`Rejected::Unguarded`].
    pub fn settle(self, used: Use) -> Result<Claims, Rejected> {
        match used {
            Use::First => Ok(self.claims),
            Use::Again => Err(Rejected::Replayed),
            Use::Unknown => Err(Rejected::Unguarded),
        }
    }
}

/// What a verdict is brought for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Word {
    /// To act on what it judged.
    Go,
    /// To tell what was decided.
    Told,
}

impl Verifier {
    /// Tells who signed a verdict and what it says, and nothing about whether it fits a request: for audits.
    ///
    /// `at`: the Unix second at which the key has to be good; for a late audit, when the event was recorded, with a verifier
    /// made from the key archive.
    ///
    /// Errors: from [`Rejected::Size`] to [`Rejected::Signature`].
    pub fn open(&self, token: &str, at: u64) -> Result<Claims, Rejected> {
        let parsed = jws::parse(token, Typ::Verdict)?;
        let key = self.key(parsed.kid, at)?;
        let claims: Claims = jws::object(&parsed.signed_by(key)?).ok_or(Rejected::Shape)?;
        if claims.is_consistent() { Ok(claims) } else { Err(Rejected::Shape) }
    }

    /// Asks everything but whether the verdict was used before; the caller then asks a store and calls [`Unspent::settle`].
    ///
    /// Errors: any [`Rejected`] but the last two, the first that applies.
    pub fn check(&self, token: &str, expect: &Expect<'_>, registry: &(impl Registry + ?Sized)) -> Result<Unspent, Rejected> {
        self.weigh(token, expect, registry, Word::Go)
    }

    /// The claims of a verdict that a gateway only tells about: nothing is run on it, so it may say no, and be told twice.
    ///
    /// Errors: as [`Verifier::check`], but for [`Rejected::Denied`]: that is a prompt's verdict that does not say no.
    pub fn hear(&self, token: &str, expect: &Expect<'_>, registry: &(impl Registry + ?Sized)) -> Result<Claims, Rejected> {
        self.weigh(token, expect, registry, Word::Told).map(|unspent| unspent.claims)
    }

    fn weigh(&self, token: &str, expect: &Expect<'_>, registry: &(impl Registry + ?Sized), word: Word) -> Result<Unspent, Rejected> {
        let claims = self.open(token, expect.now)?;
        let questions = [
            (claims.iss == expect.iss, Rejected::Issuer),
            (claims.aud == expect.aud, Rejected::Audience),
            (claims.iat < claims.exp && claims.exp - claims.iat <= LIFETIME, Rejected::Lifetime),
            (claims.iat <= expect.now.saturating_add(expect.leeway), Rejected::NotYet),
            (expect.now <= claims.exp.saturating_add(expect.leeway), Rejected::Expired),
            (claims.dir == expect.dir, Rejected::Direction),
            (claims.tid == expect.tid, Rejected::Tenant),
            (claims.sid == expect.sid, Rejected::Session),
            (claims.turn == expect.turn, Rejected::Turn),
            (claims.htm.as_deref() == expect.htm, Rejected::Method),
            (claims.htu.as_deref() == expect.htu, Rejected::Path),
            (claims.bdg == expect.body, Rejected::Digest),
            // An output that was cut is still an output; a dispatch that was denied is none, and what was let go was not refused.
            (claims.dir == Direction::Output || (claims.dec == Decision::Deny) == (word == Word::Told), Rejected::Denied),
        ];
        if let Some((_, rejected)) = questions.into_iter().find(|(holds, _)| !holds) {
            return Err(rejected);
        }
        match registry.check(&claims.tid, &claims.pol.ver, claims.con, expect.now) {
            Ok(Standing::Active | Standing::Previous) => Ok(Unspent { claims, leeway: expect.leeway }),
            Ok(Standing::OtherVersion) => Err(Rejected::Version),
            Ok(Standing::Unknown) => Err(Rejected::Constitution),
            Err(_) => Err(Rejected::Registry),
        }
    }

    /// Believes a verdict once: [`Verifier::check`], then [`Unspent::spend`].
    ///
    /// Work: one Ed25519 verification for a token of the right shape and a known key, none for others.
    pub fn verify(
        &self,
        token: &str,
        expect: &Expect<'_>,
        registry: &(impl Registry + ?Sized),
        replays: &Replays,
    ) -> Result<Claims, Rejected> {
        self.check(token, expect, registry)?.spend(replays, expect.now)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;
    use crate::{
        ANY_TENANT, AUDIT, Entry, Facts, Issuer, Memory, ORCHESTRATOR, PUBLISH_AHEAD, Policy, RETIRED_FOR, Ring, Unavailable,
        jws::tests::forge,
    };

    const NOW: u64 = 1_800_000_000;
    const BODY: &[u8] = br#"{"messages":[]}"#;

    /// A gateway and an orchestrator that know each other.
    struct Both {
        ring: Ring,
        registry: Memory,
        replays: Replays,
    }

    fn both() -> Both {
        let (ring, policy_key, registry) = (Ring::generate(NOW).unwrap(), Ring::generate(NOW).unwrap(), Memory::new(8));
        let entry = Entry::first(ANY_TENANT, "7", constitution(), NOW - 1000);
        registry.install(&policy_key.sign_entry(&entry).unwrap(), &policy_key.verifier(), NOW).unwrap();
        Both { ring, registry, replays: Replays::new(64) }
    }

    fn constitution() -> Digest {
        Digest::of(b"constitution")
    }

    fn issuer() -> Issuer {
        Issuer { iss: "headgate".into(), pol: Policy { id: "default".into(), ver: "7".into() }, con: constitution() }
    }

    fn facts() -> Facts<'static> {
        Facts { tid: "acme", sub: "u-1", sid: "s-1", turn: "t-1", dec: Decision::Allow, cat: &[], trc: None }
    }

    fn claims() -> Claims {
        issuer().dispatch(&facts(), "POST", "/v1/conversation/stream", Digest::of(BODY), NOW).unwrap()
    }

    fn expect() -> Expect<'static> {
        Expect {
            iss: "headgate",
            aud: ORCHESTRATOR,
            dir: Direction::Input,
            tid: "acme",
            sid: "s-1",
            turn: "t-1",
            htm: Some("POST"),
            htu: Some("/v1/conversation/stream"),
            body: Digest::of(BODY),
            now: NOW,
            leeway: LEEWAY,
        }
    }

    impl Both {
        fn verify(&self, token: &str, expect: &Expect<'_>) -> Result<Claims, Rejected> {
            self.ring.verifier().verify(token, expect, &self.registry, &self.replays)
        }

        /// Whether these claims, truly signed, are believed for that request.
        fn judge(&self, claims: &Claims, expect: &Expect<'_>) -> Result<Claims, Rejected> {
            self.verify(&self.ring.sign(claims).unwrap(), expect)
        }
    }

    #[test]
    fn a_verdict_is_believed_once() {
        let both = both();
        let (claims, token) = (claims(), both.ring.sign(&claims()).unwrap());
        assert_eq!(both.judge(&claims, &expect()), Ok(claims.clone()));
        assert_eq!(both.judge(&claims, &expect()), Err(Rejected::Replayed));
        assert_eq!(both.judge(&claims, &Expect { now: claims.exp + LEEWAY, ..expect() }), Err(Rejected::Replayed));
        assert!(both.verify(&token, &expect()).is_ok(), "another verdict for the same turn is another number");
    }

    #[test]
    fn every_changed_byte_is_noticed() {
        let both = both();
        let token = both.ring.sign(&claims()).unwrap();
        let verifier = both.ring.verifier();
        for at in 0..token.len() {
            let mut bytes = token.clone().into_bytes();
            // One of the seven bits that leave it text, so that all of them have their turn.
            bytes[at] ^= 1 << (at % 7);
            let changed = String::from_utf8(bytes).unwrap();
            assert!(verifier.check(&changed, &expect(), &both.registry).is_err(), "byte {at}");
        }
        for at in (0..token.len()).step_by(13) {
            let (head, tail) = token.split_at(at);
            assert!(verifier.check(&format!("{head}{}", &tail[1..]), &expect(), &both.registry).is_err(), "byte {at} left out");
        }
        assert!(verifier.check(&token, &expect(), &both.registry).is_ok());
    }

    #[test]
    fn a_verdict_moved_to_another_request_is_rejected() {
        let both = both();
        for (expect, why) in [
            (Expect { iss: "other", ..expect() }, Rejected::Issuer),
            (Expect { aud: AUDIT, ..expect() }, Rejected::Audience),
            (Expect { dir: Direction::Tool, ..expect() }, Rejected::Direction),
            (Expect { tid: "acme2", ..expect() }, Rejected::Tenant),
            (Expect { sid: "s-2", ..expect() }, Rejected::Session),
            (Expect { turn: "t-2", ..expect() }, Rejected::Turn),
            (Expect { htm: Some("post"), ..expect() }, Rejected::Method),
            (Expect { htm: None, ..expect() }, Rejected::Method),
            (Expect { htu: Some("/v1/conversation/step"), ..expect() }, Rejected::Path),
            (Expect { htu: None, ..expect() }, Rejected::Path),
            (Expect { body: Digest::of(b"{}"), ..expect() }, Rejected::Digest),
        ] {
            assert_eq!(both.judge(&claims(), &expect), Err(why));
        }
        assert_eq!(both.replays.held(), 0, "a rejected verdict is not used up");
    }

    #[test]
    fn clocks_may_differ_by_five_seconds_and_not_by_six() {
        let both = both();
        let at = |now| both.judge(&claims(), &Expect { now, ..expect() }).map(|_| ());
        assert_eq!(at(NOW - 6), Err(Rejected::NotYet));
        assert_eq!(at(NOW - 5), Ok(()));
        assert_eq!(at(NOW + LIFETIME + 5), Ok(()));
        assert_eq!(at(NOW + LIFETIME + 6), Err(Rejected::Expired));
    }

    #[test]
    fn a_life_longer_than_a_minute_is_rejected() {
        let both = both();
        for exp in [NOW + LIFETIME + 1, u64::MAX, NOW, NOW - 1] {
            assert_eq!(both.judge(&Claims { exp, ..claims() }, &expect()), Err(Rejected::Lifetime), "{exp}");
        }
        assert_eq!(both.judge(&Claims { iat: u64::MAX - 1, exp: u64::MAX, ..claims() }, &expect()), Err(Rejected::NotYet));
    }

    #[test]
    fn a_refusal_is_heard_and_never_acted_on_and_what_was_let_go_is_no_refusal() {
        let both = both();
        let denied = both.ring.sign(&Claims { dec: Decision::Deny, ..claims() }).unwrap();
        let allowed = both.ring.sign(&claims()).unwrap();
        let keys = both.ring.verifier();
        assert_eq!(keys.hear(&denied, &expect(), &both.registry).unwrap().dec, Decision::Deny);
        assert_eq!(keys.hear(&denied, &expect(), &both.registry).unwrap().dec, Decision::Deny, "as often as it is told");
        assert_eq!(keys.check(&denied, &expect(), &both.registry).unwrap_err(), Rejected::Denied);
        assert_eq!(keys.hear(&allowed, &expect(), &both.registry).unwrap_err(), Rejected::Denied);
        let output = Expect { dir: Direction::Output, ..expect() };
        assert_eq!(keys.hear(&denied, &output, &both.registry).unwrap_err(), Rejected::Direction);
        let told = both.ring.sign(&Claims { dir: Direction::Output, ..claims() }).unwrap();
        assert!(keys.hear(&told, &output, &both.registry).is_ok());
        assert_eq!(keys.hear(&told, &Expect { body: Digest::of(b"other"), ..output }, &both.registry).unwrap_err(), Rejected::Digest);
    }

    #[test]
    fn a_denied_dispatch_is_not_believed_and_a_cut_output_is() {
        let both = both();
        assert_eq!(both.judge(&Claims { dec: Decision::Deny, ..claims() }, &expect()), Err(Rejected::Denied));
        let emitted = Digest::of(b"my \xe2\x80\xa2\xe2\x80\xa2\xe2\x80\xa2 ");
        let output = issuer().output(&Facts { dec: Decision::Deny, cat: &["secrets"], ..facts() }, emitted, NOW).unwrap();
        let of_output = Expect { aud: AUDIT, dir: Direction::Output, htm: None, htu: None, body: emitted, ..expect() };
        assert_eq!(both.judge(&output, &of_output).map(|claims| claims.cat), Ok(vec!["secrets".to_owned()]));
        assert_eq!(both.judge(&claims(), &of_output), Err(Rejected::Audience));
    }

    #[test]
    fn only_the_constitution_in_force_counts() {
        let both = both();
        assert_eq!(both.judge(&Claims { con: Digest::of(b"other"), ..claims() }, &expect()), Err(Rejected::Constitution));
        let other = Policy { id: "default".into(), ver: "6".into() };
        assert_eq!(both.judge(&Claims { pol: other, ..claims() }, &expect()), Err(Rejected::Version));

        struct Away;
        impl Registry for Away {
            fn entry(&self, _: &str, _: u64) -> Result<Option<std::sync::Arc<Entry>>, Unavailable> {
                Err(Unavailable)
            }
        }
        let token = both.ring.sign(&claims()).unwrap();
        assert_eq!(both.ring.verifier().check(&token, &expect(), &Away).unwrap_err(), Rejected::Registry);
        assert_eq!(both.ring.verifier().check(&token, &expect(), &Memory::new(1)).unwrap_err(), Rejected::Constitution);
    }

    #[test]
    fn a_guard_that_cannot_tell_rejects() {
        let both = Both { replays: Replays::new(1), ..both() };
        assert!(both.judge(&claims(), &expect()).is_ok());
        assert_eq!(both.judge(&claims(), &expect()), Err(Rejected::Unguarded));
        let token = both.ring.sign(&claims()).unwrap();
        let unspent = || both.ring.verifier().check(&token, &expect(), &both.registry).unwrap();
        assert_eq!(unspent().number().1, NOW + LIFETIME + 2 * LEEWAY);
        assert_eq!(unspent().settle(Use::Unknown), Err(Rejected::Unguarded));
        assert_eq!(unspent().settle(Use::Again), Err(Rejected::Replayed));
        assert!(unspent().settle(Use::First).is_ok());
    }

    #[test]
    fn a_verdict_signed_just_before_a_rotation_is_believed_after_it() {
        let mut both = both();
        let old = both.ring.sign(&claims()).unwrap();
        let first = both.ring.current().unwrap();
        both.ring.prepare(NOW - PUBLISH_AHEAD, PUBLISH_AHEAD).unwrap();
        both.ring.promote(NOW).unwrap();
        assert!(both.verify(&old, &expect()).is_ok());
        assert!(both.judge(&claims(), &expect()).is_ok());
        assert_eq!(both.ring.verifier().open(&old, NOW + RETIRED_FOR + 1), Err(Rejected::KeyState));

        both.ring.revoke(first, NOW).unwrap();
        assert_eq!(both.verify(&old, &expect()), Err(Rejected::KeyState));
        let published = Verifier::from_jwks(&both.ring.jwks()).unwrap();
        assert_eq!(published.open(&old, NOW), Err(Rejected::Kid));
    }

    #[test]
    fn another_key_is_not_believed_under_any_name() {
        let both = both();
        let (stranger, token) = (Ring::generate(NOW).unwrap(), both.ring.sign(&claims()).unwrap());
        assert_eq!(both.verify(&stranger.sign(&claims()).unwrap(), &expect()), Err(Rejected::Kid));
        // The stranger's signature under our key's name.
        let key = ed25519_dalek::SigningKey::from_bytes(&[7; 32]);
        let header = format!(r#"{{"alg":"Ed25519","typ":"policy-verdict+jwt","kid":"{}"}}"#, both.ring.current().unwrap());
        let forged = forge(&key, &header, &serde_json::to_vec(&claims()).unwrap());
        assert_eq!(both.verify(&forged, &expect()), Err(Rejected::Signature));
        // The signature of one verdict on the claims of another.
        let other = both.ring.sign(&Claims { tid: "acme2".into(), ..claims() }).unwrap();
        let grafted = format!("{}.{}", other.rsplit_once('.').unwrap().0, token.rsplit_once('.').unwrap().1);
        assert_eq!(both.verify(&grafted, &Expect { tid: "acme2", ..expect() }), Err(Rejected::Signature));
    }

    #[test]
    fn signed_claims_that_are_not_ours_are_rejected() {
        let key = crate::jws::tests::rfc_key();
        let verifier =
            Verifier::from_jwks(&format!(r#"{{"keys":[{{"kty":"OKP","crv":"Ed25519","x":"{}"}}]}}"#, crate::jws::tests::X)).unwrap();
        let header = r#"{"alg":"Ed25519","typ":"policy-verdict+jwt","kid":"kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k"}"#;
        let right = serde_json::to_string(&claims()).unwrap();
        assert!(verifier.open(&forge(&key, header, right.as_bytes()), NOW).is_ok());
        for wrong in [
            right.replace("\"tid\"", "\"tid\":\"acme2\",\"tid\""),
            right.replace("\"exp\":", "\"exp\":\"0\",\"x\":"),
            right.replace("\"mode\":\"enforce\"", "\"mode\":\"training\""),
            right.replace("\"mode\":\"enforce\"", "\"mode\":\"enforce\",\"fence\":1"),
            right.replace("\"htm\":\"POST\",", ""),
            format!("{right} {{}}"),
            format!(" {right}"),
            "[]".into(),
            "null".into(),
            String::new(),
        ] {
            assert_eq!(verifier.open(&forge(&key, header, wrong.as_bytes()), NOW), Err(Rejected::Shape), "{wrong}");
        }
    }

    #[test]
    fn a_registry_entry_is_no_verdict() {
        let both = both();
        let entry = both.ring.sign_entry(&Entry::first("acme", "7", constitution(), NOW)).unwrap();
        assert_eq!(both.verify(&entry, &expect()), Err(Rejected::Typ));
    }

    #[test]
    fn claims_too_large_are_not_signed() {
        let both = both();
        let claims = Claims { sub: "x".repeat(2048), ..claims() };
        assert_eq!(both.ring.sign(&claims), Err(crate::Unsigned::TooLarge));
    }

    #[test]
    fn every_reason_has_its_own_word() {
        let words: HashSet<_> = Rejected::ALL.iter().map(|rejected| rejected.as_str()).collect();
        assert_eq!(words.len(), Rejected::ALL.len());
        assert!(words.iter().all(|word| word.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_')));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn any_claims_survive_signing(
            names in prop::array::uniform4("\\PC{1,40}"),
            cat in prop::collection::vec("[a-z_]{1,20}", 0..8),
            fence in prop::option::of(any::<u64>()),
        ) {
            let both = both();
            let [tid, sub, sid, turn] = names;
            let mut claims = Claims { tid, sub, sid, turn, cat, ..claims() };
            if let Some(fence) = fence {
                claims = claims.in_training(fence);
            }
            let expect = Expect { tid: &claims.tid, sid: &claims.sid, turn: &claims.turn, ..expect() };
            prop_assert_eq!(both.judge(&claims, &expect), Ok(claims.clone()));
        }
    }
}
