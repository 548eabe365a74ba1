//! Remembers what was found in texts of prompts, so that a long conversation costs only what is new in it.
//!
//! A memory is a part of one compiled rule and goes with it: other lists have another memory, which is empty. It knows a text
//! by a digest under a key of its own and a nonce of whoever sent it. So what one principal sends is never found by another,
//! nobody can make two texts that are taken for one, and text itself is not kept. What is denied is not remembered either:
//! each refusal comes from the lists.

use std::{borrow::Cow, fmt, hash::RandomState, sync::Arc};

use aws_lc_rs::{
    aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey},
    error::Unspecified,
    rand,
};
use headgate_contracts::Principal;
use quick_cache::{
    OptionsBuilder, Weighter,
    sync::{Cache, DefaultLifecycle},
};
use serde_json::Value;

use crate::matcher::{Edits, Hit, Mask};

/// The least memory that is worth having, in bytes.
pub(crate) const LEAST_BYTES: u64 = 64 << 10;
/// Shorter texts are judged each time, in bytes: to look for them costs about as much.
const SHORTEST: usize = 64;
/// More edits than this in one text are found anew each time.
const MOST_EDITS: usize = 32;
/// What it takes to remember that a text is clean, in bytes: measured, with the room that growing tables leave unused.
const CLEAN_BYTES: usize = 160;
/// Locks, so that turns on many processors seldom meet.
const SHARDS: usize = 16;

/// What the texts of prompts held when they were judged.
pub(crate) struct Memory {
    /// Only ever makes digests. That a nonce comes again would tell things to whoever sees two of them, and nobody does: they
    /// are keys of the map below, and never leave it.
    key: LessSafeKey,
    found: Cache<Digest, Found, Weight, RandomState>,
}

/// The authentication tag that AES-GCM gives a text without encrypting anything (GMAC). Two texts that are chosen without the
/// key have the same with a chance of about one in 2^128 for every 16 bytes of the longer one: GHASH is almost XOR universal (McGrew
/// and Viega, "The Security and Performance of the Galois/Counter Mode", 2004).
pub(crate) type Digest = [u8; 16];
/// The edits of a text; `None`: it is clean.
type Found = Option<Arc<Edits>>;

#[derive(Clone)]
struct Weight;

impl Weighter<Digest, Found> for Weight {
    fn weight(&self, _: &Digest, found: &Found) -> u64 {
        let edits = found.as_ref().map_or(0, |edits| {
            size_of::<(usize, usize, Edits)>() + edits.masks.len() * size_of::<Mask>() + edits.hits.len() * size_of::<Hit>()
        });
        (CLEAN_BYTES + edits) as u64
    }
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Memory").field("texts", &self.found.len()).finish_non_exhaustive()
    }
}

impl Memory {
    /// A memory that grows up to so many bytes. Errors: the system has no random bytes.
    pub(crate) fn new(bytes: u64) -> Result<Memory, Unspecified> {
        let mut key = [0; 32];
        rand::fill(&mut key)?;
        let key = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &key)?);
        let texts = usize::try_from(bytes).unwrap_or(usize::MAX) / CLEAN_BYTES;
        let mut options = OptionsBuilder::new();
        // Ghosts, which are keys of what has been thrown out, would take room that has no weight.
        options.shards(SHARDS).estimated_items_capacity(texts).weight_capacity(bytes).ghost_allocation(0.0);
        let options = options.build().expect("both capacities are set");
        Ok(Memory { key, found: Cache::with_options(options, Weight, RandomState::new(), DefaultLifecycle::default()) })
    }

    /// The part of the memory that is about what `whose` sent; `None` where it cannot be told apart.
    pub(crate) fn of(&self, whose: &Principal) -> Option<Recall<'_>> {
        let (tenant, subject) = (whose.tenant.as_str(), whose.subject.as_str());
        let names = format!("{} {tenant}{subject}", tenant.len());
        let [nonce @ .., _, _, _, _] = self.digest([0; NONCE_LEN], names.as_bytes())?;
        Some(Recall { memory: self, nonce, known: 0, new: 0 })
    }

    fn digest(&self, nonce: [u8; NONCE_LEN], bytes: &[u8]) -> Option<Digest> {
        let tag = self.key.seal_in_place_separate_tag(Nonce::assume_unique_for_key(nonce), Aad::from(bytes), &mut []).ok()?;
        tag.as_ref().try_into().ok()
    }
}

/// What a digest is of.
#[derive(Clone, Copy)]
enum Kind {
    Text = 1,
    /// Judged piece by piece, so that it is not its text.
    Value = 2,
}

/// A memory as one principal's prompt meets it.
pub(crate) struct Recall<'a> {
    memory: &'a Memory,
    nonce: [u8; NONCE_LEN],
    /// Texts that were found here.
    pub(crate) known: u64,
    /// Texts that were not.
    pub(crate) new: u64,
}

impl Recall<'_> {
    /// What stands for texts that are read as one; `None` where they are too short. How the text is cut makes no difference,
    /// as it makes none for what is found in it.
    pub(crate) fn digest(&self, texts: &[&mut String]) -> Option<Digest> {
        let text = match texts {
            [text] => Cow::Borrowed(text.as_str()),
            texts => Cow::Owned(texts.iter().map(|text| text.as_str()).collect()),
        };
        if text.len() < SHORTEST { None } else { self.digest_of(Kind::Text, text.as_bytes()) }
    }

    /// What stands for a value, with the order of its members.
    pub(crate) fn digest_of_value(&self, value: &Value) -> Option<Digest> {
        self.digest_of(Kind::Value, &serde_json::to_vec(value).ok()?)
    }

    fn digest_of(&self, kind: Kind, bytes: &[u8]) -> Option<Digest> {
        let mut nonce = self.nonce;
        nonce[NONCE_LEN - 1] = kind as u8;
        self.memory.digest(nonce, bytes)
    }

    /// What was found, where it is remembered.
    pub(crate) fn find(&mut self, digest: &Digest) -> Option<Edits> {
        let found = self.memory.found.get(digest);
        *(if found.is_some() { &mut self.known } else { &mut self.new }) += 1;
        found.map(|edits| edits.as_deref().cloned().unwrap_or_default())
    }

    /// Remembers what was found. All of it: whoever is denied something does not come here.
    pub(crate) fn keep(&self, digest: Digest, edits: &Edits) {
        let count = edits.masks.len() + edits.hits.len();
        if count <= MOST_EDITS {
            let exact = || Edits { masks: edits.masks.as_slice().into(), hits: edits.hits.as_slice().into() };
            self.memory.found.insert(digest, (count > 0).then(|| Arc::new(exact())));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use headgate_contracts::{Batch, Content, End, Message, Part, Prompt, Record, Role, SessionId, TurnId};
    use proptest::{collection::vec, option, prelude::*, sample};
    use serde_json::json;

    use super::*;
    use crate::{
        Built, chain,
        matcher::RuleId,
        testing::{built, problems, turn},
    };

    const LISTS: &str = "deny: [{ phrase: bomb }, { phrase: is in the }], mask: [{ phrase: secret }, email, credit_card]";

    fn moderation(settings: &str) -> Built {
        built(&format!("moderation: {{ {LISTS}, {settings} }}"))
    }

    fn said_by(tenant: &str, subject: &str, messages: Vec<Message>) -> Prompt {
        let mut prompt = Prompt::new(TurnId::fresh(), SessionId::fresh(), messages);
        (prompt.principal.tenant, prompt.principal.subject) = (tenant.parse().unwrap(), subject.parse().unwrap());
        prompt
    }

    fn said(texts: &[&str]) -> Prompt {
        said_by("acme", "ann", texts.iter().map(|text| Message::new(Role::User, *text)).collect())
    }

    /// What became of a prompt, and of its turn.
    fn judged(built: &Built, mut prompt: Prompt) -> (Prompt, End, Record) {
        let mut chain = chain(std::slice::from_ref(built), &mut turn());
        let mut record = Record::default();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let end = runtime.block_on(chain.prompt(&mut prompt));
        let end = chain.end(end, &mut Batch::new(), &mut record);
        (prompt, end, record)
    }

    /// How many of a prompt's texts were known, and how many not.
    fn texts(built: &Built, prompt: Prompt) -> (u64, u64) {
        let (_, _, record) = judged(built, prompt);
        (record.known_texts, record.new_texts)
    }

    const FIRST: &str = "The lamp on the shelf was lit when we came, as it had been all week.";
    const SECOND: &str = "Write to ann@example.com about what we saw, and keep the secret, please.";
    const THIRD: &str = "Nobody had told us who would be there that night, or where they were from.";
    const DENIED: &str = "What we were looking for all this time is in the cellar, behind the coal.";

    #[test]
    fn a_long_conversation_costs_only_what_is_new_in_it() {
        let moderation = moderation("");
        assert_eq!(texts(&moderation, said(&[FIRST])), (0, 1));
        assert_eq!(texts(&moderation, said(&[FIRST, SECOND])), (1, 1));
        assert_eq!(texts(&moderation, said(&[FIRST, SECOND, THIRD])), (2, 1));
        assert_eq!(texts(&moderation, said(&[THIRD, FIRST, "ok", SECOND])), (3, 0));
        assert_eq!(texts(&moderation, said(&[&FIRST.to_uppercase()])), (0, 1));
    }

    #[test]
    fn what_is_remembered_is_masked_and_reported_again() {
        let moderation = moderation("");
        let first = judged(&moderation, said(&[SECOND]));
        let second = judged(&moderation, said(&[SECOND]));
        assert_eq!((first.2.known_texts, second.2.known_texts), (0, 1));
        let masked = Some(Content::Text("Write to ••• about what we saw, and keep the •••, please.".into()));
        for (prompt, end, record) in [first, second] {
            assert!(end.is_ok() && prompt.messages[0].content == masked);
            assert_eq!((prompt.findings.len(), record.found), (2, 2));
        }
    }

    #[test]
    fn what_is_denied_is_judged_each_time() {
        let moderation = moderation("");
        for _ in 0..3 {
            let (_, end, record) = judged(&moderation, said(&[FIRST, DENIED]));
            assert!(end.is_err());
            assert_eq!(record.new_texts, 2 - record.known_texts);
            assert!(record.known_texts <= 1, "the denied text was found");
        }
    }

    #[test]
    fn what_one_principal_sends_is_never_found_by_another() {
        let moderation = moderation("");
        let by = |tenant: &str, subject: &str| texts(&moderation, said_by(tenant, subject, vec![Message::new(Role::User, FIRST)]));
        assert_eq!((by("acme", "ann"), by("acme", "ann")), ((0, 1), (1, 0)));
        assert_eq!((by("acme", "bob"), by("other", "ann"), by("acmea", "nn")), ((0, 1), (0, 1), (0, 1)));
    }

    #[test]
    fn other_lists_know_nothing_of_what_these_have_judged() {
        let before = moderation("");
        assert!(judged(&before, said(&[FIRST])).1.is_ok());
        assert_eq!(texts(&before, said(&[FIRST])), (1, 0));
        let after = built("moderation: { deny: [{ phrase: lamp }] }");
        assert!(judged(&after, said(&[FIRST])).1.is_err());
        assert_eq!(texts(&moderation(""), said(&[FIRST])), (0, 1), "nor does another rule with the same lists");
    }

    #[test]
    fn a_text_is_known_however_it_is_cut_into_parts() {
        let moderation = moderation("");
        assert_eq!(texts(&moderation, said(&[FIRST])), (0, 1));
        let (front, back) = FIRST.split_at(14);
        let mut prompt = said(&[""]);
        prompt.messages[0].content = Some(Content::Parts([front, back].map(|text| Part::Text { text: text.into() }).into()));
        let (prompt, _, record) = judged(&moderation, prompt);
        assert_eq!((record.known_texts, record.new_texts), (1, 0), "each part by itself is too short");
        assert!(prompt.messages[0].content.iter().flat_map(Content::texts).eq([front, back]));
    }

    #[test]
    fn calls_and_tools_are_known_where_nothing_of_them_changes() {
        let moderation = moderation("");
        let prompt = |arguments: &str| {
            let mut prompt = said(&[]);
            prompt.settings.tools = Some(json!([{ "function": { "name": "f", "description": "says what the weather is" } }]));
            prompt.messages.push(Message::new(Role::Assistant, ""));
            prompt.messages[0].tool_calls = Some(json!([{ "function": { "name": "f", "arguments": arguments } }]));
            prompt
        };
        for (arguments, again) in [(r#"{"at":"Ulm"}"#, (2, 0)), (r#"{ "at": "Ulm" }"#, (1, 1)), (r#"{"at":"a@b.example"}"#, (1, 1))] {
            let (first, ..) = judged(&moderation, prompt(arguments));
            let (second, _, record) = judged(&moderation, prompt(arguments));
            assert!(first.messages == second.messages && first.settings == second.settings, "{arguments}");
            assert_eq!((record.known_texts, record.new_texts), again, "{arguments}");
        }
        // A text that reads like a value is no value.
        assert_eq!(texts(&moderation, said(&[&prompt("").settings.tools.unwrap().to_string()])), (0, 1));
    }

    #[test]
    fn short_texts_and_texts_of_which_nothing_may_be_remembered_are_judged_each_time() {
        let moderation = moderation("");
        let secrets = "secret ".repeat(MOST_EDITS);
        for text in ["secret", &FIRST[..SHORTEST - 1], &secrets] {
            let (first, _, _) = judged(&moderation, said(&[text]));
            let (second, _, record) = judged(&moderation, said(&[text]));
            assert!(first.messages == second.messages && record.known_texts == 0);
        }
        let off = built(&format!("moderation: {{ {LISTS}, remember: 0B }}"));
        assert_eq!((texts(&off, said(&[FIRST])), texts(&off, said(&[FIRST]))), ((0, 0), (0, 0)));
    }

    #[test]
    fn a_memory_that_cannot_remember_is_refused() {
        for settings in ["remember: 0B", "remember: 64KiB", "remember: 1GiB"] {
            moderation(settings);
        }
        let at = |settings: &str| problems(&format!("moderation: {{ {LISTS}, {settings} }}"))[0].at.clone();
        assert_eq!(at("remember: 1KiB"), "moderation.remember");
        assert_eq!(at("remember: 1MiB, prompt: off"), "moderation.remember");
    }

    #[test]
    fn whatever_is_remembered_takes_no_more_room_than_it_may() {
        let hit = Hit { rule: RuleId(0), range: 0..9 };
        let mask = Mask { range: 0..9, first: true };
        for most in [LEAST_BYTES, 1 << 20] {
            for edits in [0, 1, 16] {
                let edits = Edits { masks: vec![mask.clone(); edits], hits: vec![hit.clone(); edits] };
                let memory = Memory::new(most).unwrap();
                let recall = memory.of(&said(&[]).principal).unwrap();
                let taken = allocation_counter::measure(|| {
                    (0..50_000_u128).for_each(|text| recall.keep(((text << 64) | (text * text)).to_le_bytes(), &edits));
                });
                assert!(taken.bytes_max <= most, "{} bytes for {} texts, {most} may be taken", taken.bytes_max, memory.found.len());
                assert!(memory.found.len() as u64 * 320 > most / (1 + edits.hits.len() as u64), "{}", memory.found.len());
            }
        }
    }

    /// A message of one kind or another.
    fn message((role, kind, texts): (Role, u8, Vec<String>)) -> Message {
        let mut message = Message::new(role, "");
        let first = texts.first().cloned().unwrap_or_default();
        match kind {
            0 => message.content = Some(Content::Parts(texts.into_iter().map(|text| Part::Text { text }).collect())),
            1 => {
                message.tool_calls = Some(json!([{ "function": { "name": "f", "arguments": json!({ "a": texts, "n": 7 }).to_string() } }]))
            }
            2 => message.tool_calls = Some(json!([{ "arguments": format!("{{ \"a\": {first:?} }}") }, texts])),
            3 => message.name = Some(first),
            _ => message.content = Some(Content::Text(first)),
        }
        message
    }

    fn messages() -> impl Strategy<Value = Message> {
        let words = vec![
            "secret",
            "secret ",
            "bomb",
            " is in the",
            "a@b.example",
            "4111 1111 1111 1111",
            "sec",
            "ret",
            "é\u{301}",
            " ",
            "who knows ",
        ];
        let filled = (vec(sample::select(words), 0..4), sample::select(vec!["", " the lamp on the shelf was lit "]));
        let text = (filled, option::of(Just(FIRST))).prop_map(|((words, fill), end)| words.join(fill) + end.unwrap_or_default());
        let role = sample::select(vec![Role::System, Role::User, Role::Assistant, Role::Tool]);
        (role, 0..8_u8, vec(text, 1..3)).prop_map(message)
    }

    /// Moderation of each kind: without a memory, with one, with a small one. What one case leaves in them, the next one meets.
    static COMPILED: LazyLock<Vec<[Built; 3]>> = LazyLock::new(|| {
        let kinds = ["", "with: '[x]', ", "exempt: [system], ", "prompt: deny, "];
        let with = |kind: &str, mode: &str, remember: &str| built(&format!("moderation: {{ {LISTS}, {kind}{remember} }}\nmode: {mode}"));
        let all = kinds.iter().flat_map(|kind| ["enforce", "shadow"].map(|mode| (kind, mode)));
        all.map(|(kind, mode)| ["remember: 0B", "", "remember: 64KiB"].map(|remember| with(kind, mode, remember))).collect()
    });

    proptest! {
        #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

        /// Whatever was judged before, in whichever order and by whomever: the prompt, its end and the record are the same.
        #[test]
        fn what_is_remembered_makes_no_difference_to_any_prompt(
            known in vec(messages(), 1..5),
            prompts in vec((sample::select(vec!["acme", "other"]), vec(any::<sample::Index>(), 1..5), any::<bool>()), 1..8),
        ) {
            for [without, remembering @ ..] in COMPILED.iter() {
                for (tenant, places, tools) in &prompts {
                        let mut prompt = said_by(tenant, "ann", places.iter().map(|place| place.get(&known).clone()).collect());
                        prompt.settings.tools = tools.then(|| json!({ "said": known[0].content, "calls": known[0].tool_calls }));
                        let (expected, end, record) = judged(without, prompt.clone());
                        for built in remembering {
                            let (seen, seen_end, seen_record) = judged(built, prompt.clone());
                            prop_assert!(seen.messages == expected.messages && seen.settings == expected.settings);
                            prop_assert_eq!(format!("{seen_end:?}"), format!("{end:?}"));
                            prop_assert_eq!((&seen.findings, seen.outcome), (&expected.findings, expected.outcome));
                            prop_assert_eq!((&seen_record.findings, seen_record.found), (&record.findings, record.found));
                            prop_assert_eq!(seen_record.outcome, record.outcome);
                        }
                }
            }
        }
    }
}
