//! No allocation per clean event: counted, through the chain of a full route.

use std::{io::Write, sync::Arc};

use allocation_counter::measure;
use headgate_contracts::{Batch, Event, Lane, Record, What};
use headgate_filters::{Built, Chain, PolicyInForce, Step, Tools, auth::KeyHash, build_chain, chain};
use headgate_policy::{Digest, Issuer, Policy, Ring};

#[path = "../src/testing.rs"]
mod testing;
use testing::{prompt, turn};

/// The route of the README, with a limit of its own on every filter.
fn full_chain() -> Vec<Built> {
    let yaml = format!(
        "- auth: {{ keys: [{{ key: '{}', tenant: acme }}] }}
- rate_limit: {{ per: tenant, requests: 60/min, output_tokens: 1000k/min, streams: 20 }}
- moderation: {{ deny: [rules/deny.txt], mask: [email, credit_card, api_key, iban, phone] }}
- policy_headers
- budget: {{ output_tokens: 2000000 }}",
        KeyHash::of("hg_key")
    );
    let phrases: String = (0..1000).map(|n| format!("forbidden phrase number {n}\n")).collect();
    let issuer = Issuer { iss: "headgate".into(), pol: Policy { id: "default".into(), ver: "1".into() }, con: Digest::of(b"constitution") };
    let policy = PolicyInForce { signer: Arc::new(Ring::generate(1_800_000_000).unwrap()), issuer };
    let tools = Tools { read: &move |_| Ok(phrases.clone()), policy: Some(policy), ..Tools::none() };
    let steps: Vec<Step> = serde_saphyr::from_str(&yaml).unwrap();
    build_chain(&steps, &tools).unwrap_or_else(|problems| panic!("{problems:?}"))
}

/// One event of the answer, as a decoder writes it into the batch it uses again and again.
fn fill(batch: &mut Batch, words: &str) {
    batch.clear();
    let (text, raw) = (batch.keep_text(words), batch.keep_wire(b"{\"text\":\"...\"}"));
    batch.push(Event { what: What::Text { lane: Lane::DEFAULT, text }, raw: Some(raw) });
}

async fn begun(built: &[Built]) -> Chain {
    let (mut prompt, mut chain) = (prompt("hello"), chain(built, &mut turn()));
    let key = headgate_contracts::Secret::new("hg_key");
    prompt.credential = headgate_contracts::Credential::Bearer(key);
    chain.prompt(&mut prompt).await.unwrap();
    chain
}

/// Allocations of 1,000 passes of these words, one event each, after 100 to warm up.
fn allocations(chain: &mut Chain, words: &[&str]) -> u64 {
    let mut batch = Batch::new();
    let mut pass = |n: usize| {
        for words in words.iter().cycle().take(n) {
            fill(&mut batch, words);
            chain.pass(&mut batch).unwrap();
        }
    };
    pass(100);
    measure(|| pass(1_000)).count_total
}

#[tokio::test]
async fn a_clean_event_costs_no_allocation_through_the_full_chain() {
    let built = full_chain();
    assert_eq!(built.len(), 8, "the five steps and the three that stand in every chain");
    let mut chain = begun(&built).await;
    assert_eq!(allocations(&mut chain, &["The ", "quick, ", "brown. ", "fox! ", "jumps ", "über ", "日本。", "2026 "]), 0);
    let mut record = Record::default();
    assert!(chain.end(Ok(()), &mut Batch::new(), &mut record).is_ok());
    assert_eq!(record.found, 0);
}

#[tokio::test]
async fn text_that_is_held_for_a_moment_costs_no_allocation_either() {
    let built = full_chain();
    let mut chain = begun(&built).await;
    // A model's tokens carry the blank before them, so the end of each could go on: as a phrase, or as an address.
    assert_eq!(allocations(&mut chain, &[" forbidden", " phrase", " name", " 4111", " quick", " fo"]), 0);
}

#[tokio::test]
async fn the_counter_counts() {
    assert!(measure(|| drop(std::hint::black_box(Box::new([0_u8; 64])))).count_total > 0);
    // A match has to be said, and may cost something.
    let built = full_chain();
    let mut chain = begun(&built).await;
    assert!(allocations(&mut chain, &["write to bob@example.com "]) > 0);
}

/// Not a law, a figure: `cargo test -p headgate-filters --test allocations -- --ignored --nocapture`.
#[tokio::test]
#[ignore = "measures"]
async fn what_a_clean_event_costs() {
    let words = ["The", " quick", " brown", " fox", " jumps", " over", " the", " lazy", " dog", "."];
    for (name, built) in [("full chain", full_chain()), ("defaults only", build_chain(&[], &Tools::none()).unwrap())] {
        let mut chain = begun(&built).await;
        let mut batch = Batch::new();
        let mut pass = |n: usize| {
            let start = tokio::time::Instant::now();
            for words in words.iter().cycle().take(n) {
                fill(&mut batch, words);
                chain.pass(&mut batch).unwrap();
            }
            start.elapsed().as_nanos() as f64 / n as f64
        };
        pass(10_000);
        let best = (0..5).map(|_| pass(100_000)).fold(f64::MAX, f64::min);
        let _ = writeln!(std::io::stderr(), "{name}: {best:.0} ns per event, its batch filled anew each time");
    }
}
