//! Proves what policy decided: a verdict is signed once per dispatch and once per answer, and checked where it arrives.
//!
//! | word | type |
//! |---|---|
//! | **claims**: what a verdict says | [`Claims`], built by an [`Issuer`] |
//! | **ring**: the private keys of one signer, through their states | [`Ring`] |
//! | **custody**: a ring's file and its audit, for changes | [`custody::Custody`] |
//! | **verifier**: the public keys a party trusts | [`Verifier`] |
//! | **digest**: SHA-256 of bytes, spelled as in `Content-Digest` | [`Digest`] |
//! | **constitution**: the document of principles in force | [`Constitution`] |
//! | **registry**: which constitution is in force for a tenant | [`Registry`], [`Entry`] |
//! | **replays**: the verdicts already used | [`Replays`] |
//! | **audit**: who changed what, as a chain of records | [`audit::Audit`] |
//! | **vault**: a key for each subject, which can be destroyed | [`vault::Vault`] |
//!
//! The gateway signs:
//!
//! ```
//! use headgate_policy::*;
//! # let now = 1_800_000_000;
//! # let constitution = Constitution::from_markdown("1. Be kind.")?;
//! let ring = Ring::generate(now)?;
//! let issuer = Issuer { iss: "headgate".into(), pol: Policy { id: "default".into(), ver: "2026-11-21".into() }, con: constitution.hash() };
//! let facts = Facts { tid: "acme", sub: "u-1", sid: "s-1", turn: "t-1", dec: Decision::Allow, cat: &[], trc: None };
//! let body = br#"{"messages":[]}"#;
//! let claims: Claims<&str> = issuer.dispatch(&facts, "POST", "/v1/conversation/stream", Digest::of(body), now)?;
//! let token = ring.sign(&claims)?;
//!
//! // The orchestrator verifies, with keys and a registry it got another way.
//! let verifier = Verifier::from_jwks(&ring.jwks())?;
//! let policy_key = Ring::generate(now)?;
//! let registry = Memory::new(1_000);
//! let entry = Entry::first(ANY_TENANT, "2026-11-21", constitution.hash(), now);
//! registry.install(&policy_key.sign_entry(&entry)?, &policy_key.verifier(), now)?;
//! let expect = Expect {
//!     iss: "headgate", aud: ORCHESTRATOR, dir: Direction::Input, tid: "acme", sid: "s-1", turn: "t-1",
//!     htm: Some("POST"), htu: Some("/v1/conversation/stream"), body: Digest::of(body), now, leeway: LEEWAY,
//! };
//! let replays = Replays::new(65_536);
//! assert_eq!(verifier.verify(&token, &expect, &registry, &replays)?.dec, Decision::Allow);
//! assert_eq!(verifier.verify(&token, &expect, &registry, &replays), Err(Rejected::Replayed));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Times are whole Unix seconds and come in as arguments: nothing here reads a clock. Nothing here opens a socket; the only
//! files touched are those of [`Ring::load`], [`Ring::save`], [`audit`], [`custody`] and [`vault`].

pub mod audit;
mod claims;
mod constitution;
pub mod custody;
mod digest;
mod jws;
mod keys;
mod registry;
mod replays;
pub mod vault;
mod verify;

pub use claims::{AUDIT, Claims, Decision, Direction, Facts, Issuer, Jti, LIFETIME, Mode, ORCHESTRATOR, Policy, Unsigned};
pub use constitution::{Clause, Constitution, NotAConstitution};
pub use digest::{Digest, Hasher, NotADigest};
pub use keys::{Key, KeyFault, Kid, PUBLISH_AHEAD, RETIRED_FOR, ROTATE_AFTER, Ring, Rotation, State, Verifier};
pub use registry::{
    ANY_TENANT, Active, Entry, Installed, LONGEST_OVERLAP, Memory, NotInstalled, PREVIOUS_FOR, Previous, Registry, Standing, Unavailable,
};
pub use replays::{Replays, Use};
pub use verify::{Expect, LEEWAY, Rejected, Unspent};
