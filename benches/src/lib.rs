//! What is measured, and what it is measured on: chunks as models send them, and chains as configs build them.

pub mod cases;

use std::sync::Arc;

use headgate_contracts::{Batch, Head, Message, Prompt, Record, Role, SessionId, Turn, TurnId, wire::openai};
use headgate_filters::{Built, Chain, PolicyInForce, Step, Tools, build_chain, chain};
use headgate_policy::{Digest, Issuer, Policy, Ring};

/// A second of 2027, at which all keys here are good.
pub const NOW: u64 = 1_800_000_000;

/// One chunk of an answer as vLLM writes it, with this text, which must need no escapes.
pub fn chunk(text: &str) -> String {
    format!(
        r#"{{"id":"chatcmpl-0123456789abcdef0123456789abcdef","object":"chat.completion.chunk","created":1763712000,"model":"demo","choices":[{{"index":0,"delta":{{"content":"{text}"}},"logprobs":null,"finish_reason":null}}]}}"#
    )
}

/// The same with a member nobody has heard of: the fast reader passes, a parser takes over.
pub fn unusual_chunk(text: &str) -> String {
    chunk(text).replace("\"logprobs\":null", "\"logprobs\":null,\"x_vendor\":[1,{\"two\":\"three\"}]")
}

/// A turn that begins.
pub fn turn() -> Turn {
    Turn {
        id: TurnId::fresh(),
        session: SessionId::fresh(),
        route: "/v1/chat/completions".into(),
        flow: Default::default(),
        record: Record::default(),
    }
}

/// 1,000 phrases to deny, a line each; they share their first words, so that holding is put to the test.
pub fn phrases() -> String {
    (0..1000).map(|n| format!("forbidden phrase number {n}\n")).collect()
}

/// Who signs, and under which policy.
pub fn issuer() -> Issuer {
    Issuer { iss: "headgate".into(), pol: Policy { id: "default".into(), ver: "2026-11-21".into() }, con: Digest::of(b"constitution") }
}

/// A fresh signing key.
///
/// # Panics
///
/// Where the system gives no random bytes.
pub fn ring() -> Ring {
    Ring::generate(NOW).expect("random bytes")
}

/// A chain from its YAML, with the filters that stand in every chain; `deny.txt` holds [`phrases`].
///
/// # Panics
///
/// Where the steps are no chain, with all that is wrong with them.
pub fn built(steps: &str) -> Vec<Built> {
    let steps: Vec<Step> = serde_saphyr::from_str(steps).unwrap_or_else(|error| panic!("{steps}: {error}"));
    let policy = PolicyInForce { signer: Arc::new(ring()), issuer: issuer() };
    let tools = Tools { read: &|_| Ok(phrases()), policy: Some(policy), ..Tools::none() };
    build_chain(&steps, &tools).unwrap_or_else(|problems| panic!("{problems:?}"))
}

/// Moderation as a whole route has it: 1,000 phrases and every detector.
pub const MODERATION: &str =
    "- moderation: { deny: [deny.txt], mask: [email, phone, credit_card, iban, ip, us_ssn, api_key, private_key, jwt] }";

/// The gates of a turn that has begun.
pub fn begun(steps: &str) -> Chain {
    chain(&built(steps), &mut turn())
}

/// A conversation of clean messages of about so many bytes each, a person's and a model's in turn; of another `number`, the
/// last `new` of them are others.
pub fn conversation(bytes: &[u64], new: usize, number: u64) -> Prompt {
    const WORDS: &str = "so we looked at the lamp on the shelf and thought about what it would take to light it again, ";
    let message = |(at, &length): (usize, &u64)| {
        let number = if at + new < bytes.len() { 0 } else { number };
        let begins = format!("{at}, {number:x}: ");
        let text: String = begins.chars().chain(WORDS.chars().cycle()).take(length as usize).collect();
        Message::new(if at % 2 == 0 { Role::User } else { Role::Assistant }, text)
    };
    Prompt::new(TurnId::fresh(), SessionId::fresh(), bytes.iter().enumerate().map(message).collect())
}

/// A batch with one event for each text, decoded from its chunk.
///
/// # Panics
///
/// Where a text needs escapes.
pub fn batch_of(texts: &[&str]) -> Batch {
    let (mut batch, mut head) = (Batch::new(), Head::default());
    for text in texts {
        openai::decode(&chunk(text), &mut head, &mut batch).expect("a chunk");
    }
    batch
}
