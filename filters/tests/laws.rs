//! The laws of gates and chains, as properties: over random texts, chunkings, batchings, lanes and notes between them.

use std::{
    collections::BTreeMap,
    future::{Future, poll_fn},
    panic::{AssertUnwindSafe, catch_unwind},
    pin::{Pin, pin},
    sync::{
        Arc, LazyLock, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, Waker},
    time::Duration,
};

use headgate_contracts::{
    Batch, Category, Channel, Code, End, Event, Fault, Finding, Finish, Head, Lane, Outcome, Prompt, Question, Record, Refusal, Source,
    Stage, Stop, What, wire::chat,
};
use headgate_filters::{
    At, BoxFuture, Built, Chain, Filter, Gate, Late, Mode, OnFault, Step, Terms, Text, Tools, Verdict, build_chain, chain,
    units::{Bytes, Span},
};
use proptest::{collection::vec, prelude::*, sample};

#[path = "../src/testing.rs"]
mod testing;
use testing::{built_with, check_chain, prompt, turn};

const LANES: [Lane; 4] = [
    Lane::DEFAULT,
    Lane { choice: 0, channel: Channel::Reasoning },
    Lane { choice: 1, channel: Channel::Content },
    Lane { choice: 0, channel: Channel::ToolArguments(0) },
];

/// A run of text on one lane.
type Run = (Lane, String);

/// An answer: runs of text that hit and nearly hit what the chains below look for.
fn answers() -> impl Strategy<Value = Vec<Run>> {
    let words = sample::select(vec![
        "sec",
        "ret",
        "secret",
        "SECRET",
        "bo",
        "mb",
        "bomb",
        "b",
        " ",
        "x",
        "é",
        "e\u{301}",
        "\u{301}",
        "\u{200b}",
        "a@",
        "b.example.com",
        "a@b.co ",
        "日本",
        "!",
        "secsecret",
        "4111 1111 1111 1111",
    ]);
    let text = vec(words, 1..6).prop_map(|words| words.concat());
    vec((sample::select(LANES.to_vec()), text), 1..8)
}

/// How an answer is cut: after each character `-` nothing, or the piece ends `|`, and a note follows `.`, or the batch ends `/`.
fn cuts() -> impl Strategy<Value = String> {
    "[-|./]{40}"
}

/// Cuts an answer into batches. Every event carries a payload, as decoded events do.
fn batches(answer: &[Run], cuts: &str) -> Vec<Batch> {
    let (mut all, mut batch, mut cuts) = (Vec::new(), Batch::new(), cuts.chars().cycle());
    for (lane, text) in answer {
        let mut piece = String::new();
        let mut rest = text.chars().peekable();
        while let Some(char) = rest.next() {
            piece.push(char);
            let cut = cuts.next().unwrap_or('/');
            if cut != '-' || rest.peek().is_none() {
                push(&mut batch, *lane, &piece);
                piece.clear();
            }
            match cut {
                '.' => {
                    let raw = batch.keep_wire(b"{}");
                    batch.push(Event { what: What::Note, raw: Some(raw) });
                }
                '/' => all.push(std::mem::take(&mut batch)),
                _ => {}
            }
        }
    }
    all.push(batch);
    all
}

fn push(batch: &mut Batch, lane: Lane, words: &str) {
    let (text, raw) = (batch.keep_text(words), batch.keep_wire(words.to_uppercase().as_bytes()));
    batch.push(Event { what: What::Text { lane, text }, raw: Some(raw) });
}

/// One batch, one event for each run.
fn whole(answer: &[Run]) -> Vec<Batch> {
    let mut batch = Batch::new();
    for (lane, text) in answer {
        push(&mut batch, *lane, text);
    }
    vec![batch]
}

/// Cuts an answer that asks things between its runs.
fn asking(answer: &[(Run, Option<String>)], cuts: &str) -> Vec<Batch> {
    let mut all = vec![Batch::new()];
    for ((lane, text), prompt) in answer {
        let pieces = batches(&[(*lane, text.clone())], cuts);
        for (n, piece) in pieces.iter().enumerate() {
            if n > 0 {
                all.push(Batch::new());
            }
            let last = all.last_mut().expect("one");
            piece.events().iter().for_each(|event| last.push_from(piece, *event));
        }
        if let Some(prompt) = prompt {
            let object = serde_json::json!({"id": "q", "prompt": prompt, "tool": "pay"}).to_string();
            chat::decode("confirm", &object, &mut Head::default(), all.last_mut().expect("one")).expect("a question");
        }
    }
    all
}

/// An answer that asks things.
fn asking_answers() -> impl Strategy<Value = Vec<(Run, Option<String>)>> {
    answers().prop_flat_map(|runs| {
        let prompts =
            vec(prop::option::of(answers().prop_map(|runs| runs.into_iter().map(|(_, text)| text).collect::<String>())), runs.len());
        prompts.prop_map(move |prompts| runs.iter().cloned().zip(prompts).collect())
    })
}

/// What a client saw.
#[derive(Debug, PartialEq, Default)]
struct Seen {
    texts: BTreeMap<Lane, String>,
    /// Every character and note in the order they came.
    order: Vec<(Option<Lane>, char)>,
    /// What people were asked.
    asked: Vec<String>,
    end: String,
    outcome: Outcome,
    found: u64,
}

impl Seen {
    fn take(&mut self, batch: &Batch) {
        for event in batch.events() {
            self.asked.extend(batch.question(event).map(|question| question.prompt.to_owned()));
            match event.what {
                What::Text { lane, text } => {
                    self.texts.entry(lane).or_default().push_str(batch.text(text));
                    self.order.extend(batch.text(text).chars().map(|char| (Some(lane), char)));
                }
                _ => self.order.push((None, '.')),
            }
        }
    }

    fn end(&mut self, end: &End) {
        self.end = match end {
            Ok(()) => "complete".to_owned(),
            Err(Stop::Refused(refusal)) => format!("refused {} {:?}", refusal.rule, refusal.categories),
            Err(stop) => format!("{} {}", stop.word(), stop.code()),
        };
    }
}

/// Runs a chain over batches to the end, as a turn does when nothing has to be waited for.
fn run(mut chain: Chain, batches: Vec<Batch>) -> Seen {
    let (mut seen, mut end, mut record) = (Seen::default(), Ok(()), Record::default());
    let mut last = Batch::new();
    for mut batch in batches {
        end = chain.pass(&mut batch);
        seen.take(&batch);
        if end.is_err() {
            break;
        }
    }
    let end = chain.end(end, &mut last, &mut record);
    seen.take(&last);
    seen.end(&end);
    (seen.outcome, seen.found) = (record.outcome, record.found);
    seen
}

fn built(yaml: &str) -> Vec<Built> {
    let steps: Vec<Step> = serde_saphyr::from_str(yaml).unwrap();
    build_chain(&steps, &Tools::none()).unwrap_or_else(|problems| panic!("{problems:?}"))
}

const CHAINS: [&str; 5] = [
    "[moderation: { mask: [{ phrase: secret }, email] }]",
    "[moderation: { deny: [{ phrase: bomb }] }]",
    "[moderation: { deny: [{ phrase: bomb }], mask: [{ phrase: secret }, email, credit_card] }, budget: { output_bytes: 40B }]",
    "[budget: { output_bytes: 25B }, moderation: { deny: [{ phrase: bomb }], mask: [{ phrase: secret }] }]",
    "[moderation: { mask: [email] }, moderation: { deny: [{ phrase: secret }] }, moderation: { deny: [{ phrase: bomb }] }, rate_limit: { output_tokens: 100k/min }]",
];

static COMPILED: LazyLock<Vec<Vec<Built>>> = LazyLock::new(|| CHAINS.iter().map(|yaml| built(yaml)).collect());
static SHADOWED: LazyLock<Vec<Built>> = LazyLock::new(|| {
    built(
        "[{moderation: { deny: [{ phrase: bomb }], mask: [{ phrase: secret }, email] }, mode: shadow},
          {budget: { output_bytes: 20B }, mode: shadow}, {rate_limit: { output_tokens: 1/h, streams: 1 }, mode: shadow}]",
    )
});
static ENFORCED: LazyLock<Vec<Built>> =
    LazyLock::new(|| built("[moderation: { deny: [{ phrase: bomb }], mask: [{ phrase: secret }, email] }]"));
static LOOKING: LazyLock<Vec<Built>> =
    LazyLock::new(|| built("[moderation: { deny: [{ phrase: zebra }], mask: [{ phrase: quagga }] }, budget: { output_bytes: 1GiB }]"));

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    /// Laws 1 and 4.
    #[test]
    fn the_same_comes_out_and_the_turn_ends_alike_however_an_answer_is_cut(answer in answers(), ways in vec(cuts(), 4)) {
        for (yaml, built) in CHAINS.iter().zip(COMPILED.iter()) {
            let expected = run(chain(built, &mut turn()), whole(&answer));
            for cuts in &ways {
                let seen = run(chain(built, &mut turn()), batches(&answer, cuts));
                prop_assert_eq!(&seen.texts, &expected.texts, "{}", yaml);
                prop_assert_eq!(&seen.end, &expected.end, "{}", yaml);
                // A filter before the one that cuts may have read further: how far depends on the chunks.
                if built.iter().filter(|step| step.facts.judges_text).count() == 1 {
                    prop_assert_eq!((seen.outcome, seen.found), (expected.outcome, expected.found), "{}", yaml);
                }
                let chars = |seen: &Seen| seen.order.iter().filter(|(lane, _)| lane.is_some()).copied().collect::<Vec<_>>();
                prop_assert_eq!(chars(&seen), chars(&expected), "{}", yaml);
            }
        }
    }

    /// Laws 1 and 3, of questions: each is judged as the same text would be that is all of an answer, however the answer around it is
    /// cut; it is asked whole or not at all; and it has no part in the words around it.
    #[test]
    fn a_question_is_judged_whole_and_alone(answer in asking_answers(), ways in vec(cuts(), 3)) {
        let quiet: Vec<Run> = answer.iter().map(|(run, _)| run.clone()).collect();
        for (yaml, built) in CHAINS.iter().zip(COMPILED.iter()) {
            let expected = run(chain(built, &mut turn()), asking(&answer, "-"));
            for cuts in &ways {
                let seen = run(chain(built, &mut turn()), asking(&answer, cuts));
                prop_assert_eq!((&seen.texts, &seen.asked, &seen.end), (&expected.texts, &expected.asked, &expected.end), "{}", yaml);
            }
            if yaml.contains("budget") {
                continue;
            }
            let alone = |prompt: &String| run(chain(built, &mut turn()), whole(&[(Lane::DEFAULT, prompt.clone())]));
            let mut asked = answer.iter().filter_map(|(_, prompt)| prompt.as_ref());
            for seen in &expected.asked {
                let judged = alone(asked.next().expect("asked in order"));
                prop_assert_eq!((Some(seen), judged.end.as_str()), (judged.texts.get(&Lane::DEFAULT), "complete"), "{}", yaml);
            }
            // What is not asked ended the turn, or came after its end.
            if let Some(next) = asked.next() {
                prop_assert!(expected.end != "complete", "{} {next:?}", yaml);
            } else {
                let without = run(chain(built, &mut turn()), whole(&quiet));
                prop_assert_eq!((&expected.texts, &expected.end), (&without.texts, &without.end), "{}", yaml);
            }
        }
    }

    /// A question nobody touched keeps the payload it came in, and one in shadow always does.
    #[test]
    fn a_clean_question_goes_as_it_came(answer in asking_answers(), cuts in cuts()) {
        for built in [&LOOKING, &SHADOWED] {
            let mut chain = chain(built, &mut turn());
            for mut batch in asking(&answer, &cuts) {
                let before = batch.clone();
                prop_assert!(chain.pass(&mut batch).is_ok());
                prop_assert_eq!(batch.events().len(), before.events().len());
                for (passed, came) in batch.events().iter().zip(before.events()) {
                    prop_assert_eq!(passed.raw.map(|raw| batch.wire(raw)), came.raw.map(|raw| before.wire(raw)));
                }
            }
        }
    }

    /// Law 5: not a byte, an event or a payload differs, and what was found is still said.
    #[test]
    fn a_shadowed_chain_changes_nothing_but_the_record(answer in answers(), cuts in cuts()) {
        let mut chain_in_shadow = chain(&SHADOWED, &mut turn());
        for batch in batches(&answer, &cuts) {
            let mut passed = batch.clone();
            prop_assert!(chain_in_shadow.pass(&mut passed).is_ok());
            prop_assert_eq!(passed.events(), batch.events());
            for event in batch.events() {
                if let Some(raw) = event.raw {
                    prop_assert_eq!(passed.wire(raw), batch.wire(raw));
                }
            }
        }
        let (mut record, mut last) = (Record::default(), Batch::new());
        prop_assert!(chain_in_shadow.end(Ok(()), &mut last, &mut record).is_ok());
        prop_assert!(last.is_empty());
        let would = run(chain(&ENFORCED, &mut turn()), batches(&answer, &cuts));
        prop_assert!(record.outcome <= Outcome::Flagged);
        if would.outcome > Outcome::Allowed {
            prop_assert_eq!(record.outcome, Outcome::Flagged);
        }
    }

    /// Laws 2 and 4: nothing leaves beyond what is cleared; what is cleared leaves at once, and so does what has no text; a lane
    /// leaves in the order it came; in the end everything has left.
    #[test]
    fn what_is_cleared_leaves_at_once_and_nothing_else_does(answer in answers(), cuts in cuts(), script in vec(0..12_u64, 40)) {
        let cleared = Arc::new(Mutex::new(BTreeMap::new()));
        let filter = Scripted { script, step: 0, cleared: cleared.clone() };
        let mut chain = Chain::new(vec![Gate::new("scripted", Box::new(filter), Terms::default())]);
        let (mut given, mut seen) = (Seen::default(), Seen::default());
        for mut batch in batches(&answer, &cuts) {
            given.take(&batch);
            prop_assert!(chain.pass(&mut batch).is_ok());
            seen.take(&batch);
            let cleared = cleared.lock().unwrap();
            for (lane, text) in &given.texts {
                let may_go = &text[..text.floor_char_boundary(cleared[lane] as usize)];
                prop_assert_eq!(seen.texts.get(lane).map_or("", |text| text), may_go, "{:?}", lane);
            }
            prop_assert_eq!(notes(&seen), notes(&given));
        }
        let (mut last, mut record) = (Batch::new(), Record::default());
        prop_assert!(chain.end(Ok(()), &mut last, &mut record).is_ok());
        seen.take(&last);
        prop_assert_eq!(seen.texts, given.texts);
    }

    /// Law 4, across lanes: only text that is held is overtaken, and by nothing that would have to wait for it.
    #[test]
    fn nothing_but_held_text_is_overtaken(answer in answers(), cuts in cuts()) {
        let mut chain = Chain::new(vec![Gate::new("tails", Box::new(Tails), Terms::default())]);
        let (mut seen, mut expected, mut held) = (Seen::default(), Vec::new(), BTreeMap::new());
        for mut batch in batches(&answer, &cuts) {
            for event in batch.events() {
                let What::Text { lane, text } = event.what else {
                    expected.push((None, '.'));
                    continue;
                };
                expected.extend(held.remove(&lane).map(|char| (Some(lane), char)));
                let mut chars: Vec<char> = batch.text(text).chars().collect();
                held.insert(lane, chars.pop().expect("never empty"));
                expected.extend(chars.into_iter().map(|char| (Some(lane), char)));
            }
            prop_assert!(chain.pass(&mut batch).is_ok());
            seen.take(&batch);
            prop_assert_eq!(&seen.order, &expected);
        }
    }

    /// Edits land where they were put, however the text came and however much of it was cleared at a time.
    #[test]
    fn edits_replace_exactly_their_ranges(
        answer in answers(), cuts in cuts(), places in vec((0..20_usize, 1..5_usize, sample::select(vec!["", "•••", "x"])), 0..6),
    ) {
        let mut texts: BTreeMap<Lane, String> = BTreeMap::new();
        for (lane, text) in &answer {
            texts.entry(*lane).or_default().push_str(text);
        }
        // The same places on every lane: in characters, one after the other, with gaps.
        let edits: BTreeMap<Lane, Vec<(u64, u64, &'static str)>> = texts.iter().map(|(lane, text)| {
            let at: Vec<u64> = text.char_indices().map(|(at, _)| at as u64).chain([text.len() as u64]).collect();
            let (mut edits, mut from) = (Vec::new(), 0);
            for (gap, len, with) in &places {
                let (start, end) = (from + gap, from + gap + len);
                if let (Some(start), Some(end)) = (at.get(start), at.get(end)) {
                    edits.push((*start, *end, *with));
                }
                from = end;
            }
            (*lane, edits)
        }).collect();
        let expected: BTreeMap<Lane, String> = texts.iter().map(|(lane, text)| {
            let (mut out, mut from) = (String::new(), 0);
            for (start, end, with) in &edits[lane] {
                out += &text[from..*start as usize];
                out += with;
                from = *end as usize;
            }
            (*lane, out + &text[from..])
        }).collect();
        let chain = Chain::new(vec![Gate::new("edits", Box::new(Edits { edits, said: BTreeMap::new() }), Terms::default())]);
        let seen = run(chain, batches(&answer, &cuts));
        let seen: BTreeMap<_, _> = expected.keys().map(|lane| (*lane, seen.texts.get(lane).cloned().unwrap_or_default())).collect();
        prop_assert_eq!(seen, expected);
    }

    /// An event nobody touched keeps the payload it came in.
    #[test]
    fn a_clean_event_goes_as_it_came(answer in answers(), cuts in cuts()) {
        let mut chain = chain(&LOOKING, &mut turn());
        for mut batch in batches(&answer, &cuts) {
            let before = batch.clone();
            prop_assert!(chain.pass(&mut batch).is_ok());
            prop_assert_eq!(batch.events(), before.events());
        }
    }
}

fn notes(seen: &Seen) -> usize {
    seen.order.iter().filter(|(lane, _)| lane.is_none()).count()
}

/// Holds the last character of every piece until the next one of its lane comes.
struct Tails;

impl Filter for Tails {
    fn text(&mut self, text: Text<'_>) -> Verdict {
        let last = text.text.char_indices().last().map_or(0, |(at, _)| at as u64);
        Verdict::hold_from(At(text.at.0 + last))
    }
}

/// Clears what its script says, in bytes beyond what it has cleared of the lane; all at the end.
struct Scripted {
    script: Vec<u64>,
    step: usize,
    cleared: Arc<Mutex<BTreeMap<Lane, u64>>>,
}

impl Filter for Scripted {
    fn text(&mut self, text: Text<'_>) -> Verdict {
        let more = self.script[self.step % self.script.len()];
        self.step += 1;
        let mut cleared = self.cleared.lock().unwrap();
        let cleared = cleared.entry(text.lane).or_default();
        *cleared = (*cleared + more).min(text.end().0);
        Verdict::hold_from(At(*cleared))
    }
}

/// Makes edits that were decided before.
struct Edits {
    edits: BTreeMap<Lane, Vec<(u64, u64, &'static str)>>,
    said: BTreeMap<Lane, usize>,
}

impl Edits {
    fn verdict(&mut self, lane: Lane, seen: u64) -> Verdict {
        let (edits, said) = (&self.edits[&lane], self.said.entry(lane).or_default());
        // Nothing inside a range goes before the whole range is there.
        let blocked = edits.iter().skip(*said).find(|(_, end, _)| *end > seen);
        let to = blocked.map_or(seen, |(start, _, _)| (*start).min(seen));
        let mut verdict = Verdict::hold_from(At(to));
        for (start, end, with) in edits.iter().skip(*said).take_while(|(_, end, _)| *end <= seen) {
            verdict = verdict.replacing(At(*start)..At(*end), *with);
            *said += 1;
        }
        verdict
    }
}

impl Filter for Edits {
    fn text(&mut self, text: Text<'_>) -> Verdict {
        self.verdict(text.lane, text.end().0)
    }
}

/// Holds everything, until it is told to say something; may think.
#[derive(Default)]
struct Holds {
    says: Arc<Mutex<Option<(Lane, Verdict)>>>,
    waker: Arc<Mutex<Option<Waker>>>,
    at_last: Option<fn() -> Verdict>,
}

impl Filter for Holds {
    fn text(&mut self, _: Text<'_>) -> Verdict {
        Verdict::hold_from(At(0))
    }
    fn last(&mut self, _: Lane) -> Verdict {
        self.at_last.map_or_else(Verdict::pass, |verdict| verdict())
    }
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<(Lane, Verdict)> {
        *self.waker.lock().unwrap() = Some(cx.waker().clone());
        self.says.lock().unwrap().take().map_or(Poll::Pending, Poll::Ready)
    }
}

fn holding(terms: Terms) -> Chain {
    Chain::new(vec![Gate::new("holds", Box::new(Holds::default()), terms)])
}

fn pass(chain: &mut Chain, lane: Lane, text: &str) -> (String, End) {
    let mut batch = Batch::new();
    push(&mut batch, lane, text);
    let end = chain.pass(&mut batch);
    (all_text(&batch), end)
}

/// What may go now, without new text.
fn more(chain: &mut Chain) -> (String, End) {
    let mut batch = Batch::new();
    let end = chain.pass(&mut batch);
    (all_text(&batch), end)
}

fn all_text(batch: &Batch) -> String {
    let texts = batch.events().iter().filter_map(|event| match event.what {
        What::Text { text, .. } => Some(batch.text(text)),
        _ => None,
    });
    texts.collect()
}

fn finish(chain: &mut Chain) -> (String, End, Record) {
    let (mut batch, mut record) = (Batch::new(), Record::default());
    let end = chain.end(Ok(()), &mut batch, &mut record);
    (all_text(&batch), end, record)
}

fn millis(ms: u64) -> Span {
    Span(Duration::from_millis(ms))
}

#[tokio::test(start_paused = true)]
async fn text_that_waits_too_long_ends_the_turn_at_the_millisecond() {
    let mut chain = holding(Terms { max_hold: Some(millis(80)), ..Terms::default() });
    let start = tokio::time::Instant::now();
    assert_eq!(pass(&mut chain, Lane::DEFAULT, "abc").0, "");
    chain.ripen().await;
    assert_eq!(start.elapsed(), Duration::from_millis(80));
    let (text, end) = more(&mut chain);
    assert_eq!((text.as_str(), end.unwrap_err().code()), ("", Code::ModerationUnavailable));
}

#[tokio::test(start_paused = true)]
async fn text_that_waits_too_long_goes_unjudged_where_the_terms_say_so() {
    let mut chain = holding(Terms { max_hold: Some(millis(80)), late: Late::Release, ..Terms::default() });
    pass(&mut chain, Lane::DEFAULT, "abc").1.unwrap();
    tokio::time::advance(Duration::from_millis(30)).await;
    pass(&mut chain, Lane::DEFAULT, "def").1.unwrap();
    let start = tokio::time::Instant::now();
    chain.ripen().await;
    assert_eq!(start.elapsed(), Duration::from_millis(50), "the oldest text counts");
    assert_eq!(more(&mut chain).0, "abcdef");
    assert_eq!(chain.gates()[0].holds().unjudged_bytes, 6);
    assert_eq!(chain.gates()[0].holds().max, Duration::from_millis(80));
    // The next piece has its own time.
    pass(&mut chain, Lane::DEFAULT, "g").1.unwrap();
    let start = tokio::time::Instant::now();
    chain.ripen().await;
    assert_eq!(start.elapsed(), Duration::from_millis(80));
    assert_eq!(more(&mut chain).0, "g");
    let (_, _, record) = finish(&mut chain);
    assert_eq!((record.held_max, record.held_by), (Duration::from_millis(80), Some("holds")));
}

#[tokio::test(start_paused = true)]
async fn a_mask_that_comes_too_late_still_hides_what_has_not_gone() {
    let yaml = "moderation: { mask: [{ phrase: secret }] }\nmax_hold: 80ms\nlate: release";
    let built = [built_with(yaml, &Tools::none())];
    let mut chain = chain(&built, &mut turn());
    assert_eq!(pass(&mut chain, Lane::DEFAULT, "a sec").0, "a ");
    chain.ripen().await;
    assert_eq!(more(&mut chain).0, "sec");
    assert_eq!(pass(&mut chain, Lane::DEFAULT, "ret b").0, "••• b");
    assert!(finish(&mut chain).1.is_ok());
}

#[tokio::test(start_paused = true)]
async fn without_a_longest_hold_text_waits_as_long_as_it_must() {
    let mut chain = holding(Terms::default());
    pass(&mut chain, Lane::DEFAULT, "abc").1.unwrap();
    assert!(tokio::time::timeout(Duration::from_secs(86_400), chain.ripen()).await.is_err());
    assert_eq!(finish(&mut chain).0, "abc");
}

#[tokio::test(start_paused = true)]
async fn a_verdict_that_was_waited_for_frees_the_text() {
    let filter = Holds::default();
    let (says, waker) = (filter.says.clone(), filter.waker.clone());
    let terms = Terms { max_hold: Some(millis(80)), ..Terms::default() };
    let mut chain = Chain::new(vec![Gate::new("thinks", Box::new(filter), terms)]);
    pass(&mut chain, Lane::DEFAULT, "one ").1.unwrap();
    pass(&mut chain, LANES[1], "two ").1.unwrap();
    pass(&mut chain, Lane::DEFAULT, "three").1.unwrap();
    {
        let mut ripe = pin!(chain.ripen());
        assert!(poll_fn(|cx| Poll::Ready(ripe.as_mut().poll(cx))).await.is_pending());
        *says.lock().unwrap() = Some((Lane::DEFAULT, Verdict::hold_from(At(6)).replacing(At(0)..At(3), "1")));
        waker.lock().unwrap().take().expect("kept").wake();
        ripe.await;
    }
    // The other lane is not cleared yet, and holds nobody up.
    assert_eq!(more(&mut chain).0, "1 th");
    *says.lock().unwrap() = Some((LANES[1], Verdict::hold_from(At(4))));
    chain.ripen().await;
    assert_eq!(more(&mut chain).0, "two ");
    *says.lock().unwrap() = Some((Lane::DEFAULT, Verdict::refuse_from(At(7), Refusal::new(Code::PolicyDenied, "thinks"))));
    chain.ripen().await;
    let (text, end) = more(&mut chain);
    assert_eq!((text.as_str(), end.unwrap_err().code()), ("r", Code::PolicyDenied));
}

#[tokio::test]
async fn a_refusal_that_was_waited_for_ends_the_turn_when_nothing_is_held() {
    let says = Arc::new(Mutex::new(None));
    struct Thinks(Arc<Mutex<Option<(Lane, Verdict)>>>);
    impl Filter for Thinks {
        fn poll(&mut self, _: &mut Context<'_>) -> Poll<(Lane, Verdict)> {
            self.0.lock().unwrap().take().map_or(Poll::Pending, Poll::Ready)
        }
    }
    let mut chain = Chain::new(vec![Gate::new("thinks", Box::new(Thinks(says.clone())), Terms::default())]);
    assert_eq!(pass(&mut chain, Lane::DEFAULT, "gone").0, "gone");
    *says.lock().unwrap() = Some((Lane::DEFAULT, Verdict::refuse_from(At(4), Refusal::new(Code::PolicyDenied, "thinks"))));
    chain.ripen().await;
    assert_eq!(more(&mut chain).1.unwrap_err().code(), Code::PolicyDenied);
}

#[test]
fn what_is_still_held_at_the_end_gets_its_last_verdict() {
    let at_last = |verdict| {
        let filter = Holds { at_last: Some(verdict), ..Holds::default() };
        let mut chain = Chain::new(vec![Gate::new("holds", Box::new(filter), Terms::default())]);
        pass(&mut chain, Lane::DEFAULT, "abcdef").1.unwrap();
        let (text, end, _) = finish(&mut chain);
        (text, end.err().map(|stop| stop.code()))
    };
    assert_eq!(at_last(Verdict::pass), ("abcdef".into(), None));
    assert_eq!(at_last(|| Verdict::pass().replacing(At(1)..At(3), "-")), ("a-def".into(), None));
    assert_eq!(at_last(|| Verdict::refuse_from(At(2), Refusal::new(Code::PolicyDenied, "r"))), ("ab".into(), Some(Code::PolicyDenied)));
    assert_eq!(at_last(|| Verdict::hold_from(At(2))), ("ab".into(), Some(Code::ModerationUnavailable)));
}

/// Holds everything, and judges a lane so many milliseconds after its last text: from some place on it refuses, or nowhere.
struct Slow {
    takes: Duration,
    refuses: Option<u64>,
    due: BTreeMap<Lane, (At, Pin<Box<tokio::time::Sleep>>)>,
}

impl Slow {
    fn gate(takes: u64, refuses: Option<u64>, terms: Terms) -> Gate {
        Gate::new("slow", Box::new(Slow { takes: Duration::from_millis(takes), refuses, due: BTreeMap::new() }), terms)
    }
}

impl Filter for Slow {
    fn text(&mut self, text: Text<'_>) -> Verdict {
        self.due.insert(text.lane, (text.end(), Box::pin(tokio::time::sleep(self.takes))));
        Verdict::hold_from(At(0))
    }
    fn last(&mut self, lane: Lane) -> Verdict {
        if self.due.contains_key(&lane) { Verdict::hold_from(At(0)) } else { Verdict::pass() }
    }
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<(Lane, Verdict)> {
        let ready = self.due.iter_mut().find_map(|(lane, (end, due))| due.as_mut().poll(cx).is_ready().then_some((*lane, *end)));
        let Some((lane, end)) = ready else { return Poll::Pending };
        self.due.remove(&lane);
        Poll::Ready((
            lane,
            match self.refuses {
                Some(at) if at < end.0 => Verdict::refuse_from(At(at), Refusal::new(Code::PolicyDenied, "slow")),
                _ => Verdict::hold_from(end),
            },
        ))
    }
}

/// Runs a turn's answer and its rest, which has until `deadline`: what came out, the end, and how long the rest took.
async fn rested(mut chain: Chain, pieces: &[&str], deadline: Duration) -> (String, Option<Code>, Duration) {
    let mut end = Ok(());
    let (mut out, mut batch, mut record) = (String::new(), Batch::new(), Record::default());
    for piece in pieces {
        let (text, passed) = pass(&mut chain, Lane::DEFAULT, piece);
        out += &text;
        end = passed;
        if end.is_err() {
            break;
        }
    }
    let began = tokio::time::Instant::now();
    let rest = async {
        while chain.rest(&mut batch).await {
            out += &all_text(&batch);
        }
        out += &all_text(&batch);
    };
    let _ = tokio::time::timeout(deadline, rest).await;
    let took = began.elapsed();
    let end = chain.end(end, &mut batch, &mut record);
    (out + &all_text(&batch), end.err().map(|stop| stop.code()), took)
}

#[test]
fn an_answer_that_has_ended_waits_for_slow_judges_as_long_as_their_terms_say() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    let lasts = Duration::from_secs(60);
    proptest!(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() }, |(
        judges in vec((0..200_u64, prop::option::of(0..12_u64)), 1..4), hold in 1..300_u64, release: bool, pieces in vec("[a-z]{1,4}", 1..4),
    )| {
        let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
        let whole = pieces.concat();
        // A refusal of text that has gone unjudged still ends the turn, if it comes before that.
        let judges: Vec<_> = judges.into_iter().map(|(takes, refuses)| (takes, refuses.filter(|_| takes < hold || !release))).collect();
        let late = if release { Late::Release } else { Late::Refuse };
        let terms = Terms { max_hold: Some(millis(hold)), late, ..Terms::default() };
        let chain = Chain::new(judges.iter().map(|&(takes, refuses)| Slow::gate(takes, refuses, terms)).collect());
        let (out, code, took) = runtime.block_on(rested(chain, &pieces, lasts));
        // Each judge sees the text once the one before it has let it go, up to where that one cut it.
        let (mut text, mut expected, mut waited) = (whole.as_str(), None, 0);
        for &(takes, refuses) in &judges {
            if text.is_empty() {
                break;
            }
            // At the very millisecond both are right.
            prop_assume!(takes != hold);
            waited += takes.min(hold);
            match (takes > hold, late, refuses.filter(|at| (*at as usize) < text.len())) {
                (true, Late::Release, _) | (false, _, None) => {}
                (true, Late::Refuse, _) => (text, expected) = ("", Some(Code::ModerationUnavailable)),
                (false, _, Some(at)) => (text, expected) = (&text[..at as usize], Some(Code::PolicyDenied)),
            }
        }
        prop_assert_eq!((out.as_str(), code), (text, expected));
        // A tokio timer is a millisecond coarse.
        prop_assert!((waited..=waited + judges.len() as u64 + 1).contains(&(took.as_millis() as u64)), "{:?} for {}", took, waited);
    });
}

#[tokio::test(start_paused = true)]
async fn whoever_waits_no_longer_for_a_slow_judge_gets_what_its_terms_say() {
    let ends = async |late, max_hold| {
        let chain = Chain::new(vec![Slow::gate(5_000, None, Terms { late, max_hold, ..Terms::default() })]);
        rested(chain, &["abc"], Duration::from_secs(1)).await
    };
    let second = Duration::from_secs(1);
    assert_eq!(ends(Late::Refuse, None).await, (String::new(), Some(Code::ModerationUnavailable), second));
    assert_eq!(ends(Late::Release, None).await, ("abc".into(), None, second));
    assert_eq!(ends(Late::Refuse, Some(millis(9_000))).await, (String::new(), Some(Code::ModerationUnavailable), second));
}

#[tokio::test(start_paused = true)]
async fn what_one_slow_judge_has_cut_is_waited_for_by_nobody() {
    // The first holds its text for good; the second, which was shown none, ends the turn.
    struct Stops;
    impl Filter for Stops {
        fn poll(&mut self, _: &mut Context<'_>) -> Poll<(Lane, Verdict)> {
            Poll::Ready((Lane::DEFAULT, Verdict::refuse_from(At(0), Refusal::new(Code::PolicyDenied, "stops"))))
        }
    }
    let chain = Chain::new(vec![Slow::gate(5_000, None, Terms::default()), Gate::new("stops", Box::new(Stops), Terms::default())]);
    let (out, code, took) = rested(chain, &["abc"], Duration::from_secs(60)).await;
    assert_eq!((out.as_str(), code, took), ("", Some(Code::PolicyDenied), Duration::ZERO));
}

#[test]
fn nobody_is_shown_anything_after_they_left() {
    let mut chain = holding(Terms::default());
    pass(&mut chain, Lane::DEFAULT, "abc").1.unwrap();
    let (mut batch, mut record) = (Batch::new(), Record::default());
    let end = chain.end(Err(Stop::Gone(headgate_contracts::Gone::Left)), &mut batch, &mut record);
    assert!(batch.is_empty() && matches!(end, Err(Stop::Gone(_))));
}

#[test]
fn a_refusal_of_held_text_wins_over_a_later_end() {
    let refuses = || Verdict::refuse_from(At(1), Refusal::new(Code::PolicyDenied, "r"));
    let filter = Holds { at_last: Some(refuses), ..Holds::default() };
    let mut chain = Chain::new(vec![Gate::new("holds", Box::new(filter), Terms::default())]);
    pass(&mut chain, Lane::DEFAULT, "abc").1.unwrap();
    let (mut batch, mut record) = (Batch::new(), Record::default());
    let end = chain.end(Err(Fault::upstream(Code::UpstreamReset).into()), &mut batch, &mut record);
    assert_eq!((all_text(&batch).as_str(), end.unwrap_err().code()), ("a", Code::PolicyDenied));
}

#[test]
fn of_two_refusals_the_earlier_in_the_text_wins_whichever_gate_it_is_of() {
    let (bomb, budget) = ("moderation: { deny: [{ phrase: bomb }] }", "budget: { output_bytes: 9B }");
    for steps in [[bomb, budget], [budget, bomb]] {
        check_chain(&steps, "ab bomb cdefgh", "ab !moderation.deny");
        check_chain(&steps, "abcdefghijk bomb c", "abcdefghi!budget.output_bytes");
    }
}

#[test]
fn a_cut_in_one_lane_lets_the_clean_text_of_the_others_before_it_go() {
    let built = built("[moderation: { deny: [{ phrase: bomb }] }]");
    let answer = |texts: &[(Lane, &str)]| texts.iter().map(|(lane, text)| (*lane, (*text).to_owned())).collect::<Vec<_>>();
    // The first lane waits for what could follow "bo"; the second is refused; nothing of the first will follow.
    let seen = run(chain(&built, &mut turn()), whole(&answer(&[(LANES[0], "a bo"), (LANES[1], "x bomb!"), (LANES[0], "mb!")])));
    assert_eq!((seen.texts[&LANES[0]].as_str(), seen.texts[&LANES[1]].as_str()), ("a bo", "x "));
    // The first lane would have been refused with its next character, and is cut where that would have been.
    let seen = run(chain(&built, &mut turn()), whole(&answer(&[(LANES[0], "a bomb"), (LANES[1], "x bomb!")])));
    assert_eq!((seen.texts[&LANES[0]].as_str(), seen.texts[&LANES[1]].as_str()), ("a ", "x "));
}

#[test]
fn the_last_word_of_the_reasoning_does_not_hold_back_the_answer() {
    let built = built("[moderation: { mask: [email] }]");
    let mut chain = chain(&built, &mut turn());
    let reasoning = LANES[1];
    // An address may begin with any word.
    assert_eq!(pass(&mut chain, reasoning, "So I greet.").0, "So I ");
    assert_eq!(pass(&mut chain, Lane::DEFAULT, "Hello, ").0, "Hello, ");
    assert_eq!(pass(&mut chain, Lane::DEFAULT, "you ").0, "you ");
    // The reasoning goes on after all, and it is an address.
    assert_eq!(pass(&mut chain, reasoning, "me@example.com ").0, "••• ");
    assert_eq!(pass(&mut chain, reasoning, "end").0, "");
    let mut batch = Batch::new();
    batch.push(Event { what: What::Finish { choice: 0, finish: Finish::Stop }, raw: None });
    chain.pass(&mut batch).unwrap();
    // With its finish everything of a choice is settled, and the finish comes last.
    assert_eq!(all_text(&batch), "end");
    assert!(matches!(batch.events().last().map(|event| event.what), Some(What::Finish { .. })));
}

#[test]
fn of_a_burst_only_the_last_word_waits_and_all_before_it_goes_as_it_came() {
    let built = built("[moderation: { mask: [email] }]");
    let mut chain = chain(&built, &mut turn());
    let mut batch = Batch::new();
    for words in ["So", " I", " greet", " you"] {
        push(&mut batch, Lane::DEFAULT, words);
    }
    chain.pass(&mut batch).unwrap();
    let went: Vec<_> = batch.events().iter().map(|event| event.raw.map(|raw| batch.wire(raw))).collect();
    // Of the last event only its blank: it was cut, so that much of it is written anew.
    assert_eq!(went, [Some(&b"SO"[..]), Some(b" I"), Some(b" GREET"), None]);
    assert_eq!(all_text(&batch), "So I greet ");
    // A mask in the middle of a burst touches its own event alone.
    let mut batch = Batch::new();
    for words in [" and", " me@example.com", " too", ". "] {
        push(&mut batch, Lane::DEFAULT, words);
    }
    chain.pass(&mut batch).unwrap();
    let went: Vec<_> = batch.events().iter().map(|event| event.raw.is_some()).collect();
    assert_eq!((all_text(&batch).as_str(), went), ("you and ••• too. ", vec![false, true, false, true, true]));
}

#[test]
fn text_after_the_finish_of_its_choice_is_the_upstreams_fault() {
    let built = built("[moderation: { mask: [email] }]");
    let mut chain = chain(&built, &mut turn());
    let mut batch = Batch::new();
    push(&mut batch, Lane::DEFAULT, "bob");
    batch.push(Event { what: What::Finish { choice: 0, finish: Finish::Stop }, raw: None });
    push(&mut batch, Lane { choice: 1, channel: Channel::Content }, "fine ");
    push(&mut batch, Lane::DEFAULT, "");
    push(&mut batch, Lane::DEFAULT, "@example.com ");
    let end = chain.pass(&mut batch);
    assert_eq!((all_text(&batch).as_str(), end.unwrap_err().code()), ("bobfine ", Code::UpstreamProtocolError));
}

#[test]
fn a_finish_waits_for_the_text_of_its_choice_and_the_usage_for_the_finish() {
    let filter = Holds { at_last: Some(|| Verdict::hold_from(At(0))), ..Holds::default() };
    let says = filter.says.clone();
    let mut chain = Chain::new(vec![Gate::new("thinks", Box::new(filter), Terms::default())]);
    let mut batch = Batch::new();
    push(&mut batch, Lane::DEFAULT, "abc");
    batch.push(Event { what: What::Finish { choice: 0, finish: Finish::Stop }, raw: None });
    batch.push(Event { what: What::Usage(headgate_contracts::Usage::default()), raw: None });
    chain.pass(&mut batch).unwrap();
    assert!(batch.is_empty());
    *says.lock().unwrap() = Some((Lane::DEFAULT, Verdict::pass()));
    let mut cx = Context::from_waker(Waker::noop());
    assert!(pin!(chain.ripen()).poll(&mut cx).is_ready());
    chain.pass(&mut batch).unwrap();
    let kinds: Vec<_> = batch.events().iter().map(|event| std::mem::discriminant(&event.what)).collect();
    let expected = [
        What::Text { lane: Lane::DEFAULT, text: Default::default() },
        What::Finish { choice: 0, finish: Finish::Stop },
        What::Usage(Default::default()),
    ];
    assert_eq!(kinds, expected.iter().map(std::mem::discriminant).collect::<Vec<_>>());
}

#[test]
fn a_question_waits_for_a_filter_that_thinks_about_it_and_what_is_said_of_the_whole_answer_waits_behind_it() {
    let filter = Holds { at_last: Some(|| Verdict::hold_from(At(0))), ..Holds::default() };
    let says = filter.says.clone();
    let mut chain = Chain::new(vec![Gate::new("thinks", Box::new(filter), Terms::default())]);
    let mut batch = Batch::new();
    batch.push_question(Question { id: "q", tool: "pay", prompt: "pay?" });
    batch.push(Event { what: What::Usage(headgate_contracts::Usage::default()), raw: None });
    chain.pass(&mut batch).unwrap();
    assert!(batch.is_empty());
    assert_eq!(chain.gates()[0].held_bytes(), 4);
    *says.lock().unwrap() = Some((Lane { choice: 0, channel: Channel::Question(1) }, Verdict::pass().replacing(At(3)..At(4), ".")));
    assert!(pin!(chain.ripen()).poll(&mut Context::from_waker(Waker::noop())).is_ready());
    chain.pass(&mut batch).unwrap();
    assert_eq!(batch.question(&batch.events()[0]).map(|question| question.prompt), Some("pay."));
    assert!(matches!(batch.events()[1].what, What::Usage(_)));
    assert_eq!(chain.gates()[0].held_bytes(), 0);
}

#[test]
fn endless_questions_are_the_upstreams_fault() {
    let built = built("[moderation: { deny: [{ phrase: bomb }] }]");
    let mut chain = chain(&built, &mut turn());
    let ends = (0..65).map(|_| {
        let mut batch = Batch::new();
        batch.push_question(Question { id: "q", tool: "", prompt: "pay?" });
        chain.pass(&mut batch).map(|()| batch.events().len())
    });
    let ends: Vec<_> = ends.map(|end| end.map_err(|stop| stop.code())).collect();
    assert_eq!((&ends[63], &ends[64]), (&Ok(1), &Err(Code::UpstreamProtocolError)));
}

/// Breaks at the first text.
struct Breaks;
impl Filter for Breaks {
    fn text(&mut self, text: Text<'_>) -> Verdict {
        Verdict::fail_from(At(text.at.0 + 1), Fault::us(Code::ModerationUnavailable))
    }
}

#[test]
fn a_filter_that_breaks_ends_the_turn_or_is_left_out_as_the_terms_say() {
    let broken = |on_fault, mode| {
        let mut chain = Chain::new(vec![Gate::new("breaks", Box::new(Breaks), Terms { on_fault, mode, ..Terms::default() })]);
        let first = pass(&mut chain, Lane::DEFAULT, "abc");
        let second = pass(&mut chain, Lane::DEFAULT, "def");
        (first.0 + &second.0, second.1.err().map(|stop| stop.code()))
    };
    assert_eq!(broken(OnFault::Refuse, Mode::Enforce), ("a".into(), Some(Code::ModerationUnavailable)));
    assert_eq!(broken(OnFault::Pass, Mode::Enforce), ("abcdef".into(), None));
    assert_eq!(broken(OnFault::Refuse, Mode::Shadow), ("abcdef".into(), None));
}

#[test]
fn a_filter_left_out_for_one_lane_does_not_free_what_it_has_cut_in_another() {
    struct Torn;
    impl Filter for Torn {
        fn text(&mut self, text: Text<'_>) -> Verdict {
            Verdict::hold_from(text.at)
        }
        fn last(&mut self, lane: Lane) -> Verdict {
            match lane {
                Lane::DEFAULT => Verdict::refuse_from(At(1), Refusal::new(Code::PolicyDenied, "torn")),
                _ => Verdict::fail_from(At(0), Fault::us(Code::ModerationUnavailable)),
            }
        }
    }
    let terms = Terms { on_fault: OnFault::Pass, ..Terms::default() };
    let answer = [(Lane::DEFAULT, "abc".to_owned()), (LANES[1], "xyz".to_owned())];
    let seen = run(Chain::new(vec![Gate::new("torn", Box::new(Torn), terms)]), whole(&answer));
    assert_eq!((seen.texts[&LANES[0]].as_str(), seen.texts[&LANES[1]].as_str()), ("a", "xyz"));
    assert_eq!(seen.end, "refused torn []");
}

#[test]
fn an_edit_of_text_that_has_gone_is_a_fault_and_never_passes_for_a_mask() {
    struct TooLate;
    impl Filter for TooLate {
        fn text(&mut self, text: Text<'_>) -> Verdict {
            if text.at.0 == 0 { Verdict::pass() } else { Verdict::pass().replacing(At(1)..At(4), "•••") }
        }
    }
    let mut chain = Chain::new(vec![Gate::new("too late", Box::new(TooLate), Terms::default())]);
    assert_eq!(pass(&mut chain, Lane::DEFAULT, "abc").0, "abc");
    let (text, end) = pass(&mut chain, Lane::DEFAULT, "def");
    assert_eq!((text.as_str(), end.unwrap_err().code()), ("", Code::InternalError));
}

#[test]
fn no_more_text_waits_than_the_terms_allow_to_the_byte() {
    for late in [Late::Refuse, Late::Release] {
        let mut chain = holding(Terms { max_held: Some(Bytes(10)), late, ..Terms::default() });
        assert!(pass(&mut chain, Lane::DEFAULT, "12345").1.is_ok());
        assert!(pass(&mut chain, LANES[1], "67890").1.is_ok());
        assert_eq!(chain.gates()[0].held_bytes(), 10);
        let (text, end) = pass(&mut chain, Lane::DEFAULT, "x");
        match late {
            Late::Refuse => assert_eq!(end.unwrap_err().code(), Code::ModerationUnavailable),
            Late::Release => assert_eq!((text.as_str(), end.is_ok()), ("1234567890x", true)),
        }
        assert_eq!(chain.gates()[0].held_bytes(), 0);
    }
}

#[test]
fn text_in_tiny_pieces_waits_as_long_as_text_in_large_ones() {
    let mut chain = holding(Terms::default());
    let mut payload = vec![b'{'; 300];
    payload.push(b'}');
    let text = "0123456789abcdef".repeat(4096);
    for at in 0..text.len() {
        let mut batch = Batch::new();
        let (words, raw) = (batch.keep_text(&text[at..=at]), batch.keep_wire(&payload));
        batch.push(Event { what: What::Text { lane: Lane::DEFAULT, text: words }, raw: Some(raw) });
        assert!(chain.pass(&mut batch).is_ok() && batch.is_empty(), "byte {at}");
    }
    let (out, end, _) = finish(&mut chain);
    assert!(end.is_ok());
    assert_eq!(out, text);
}

#[test]
fn a_flood_of_frames_behind_a_finish_that_waits_is_bounded() {
    let filter = Holds { at_last: Some(|| Verdict::hold_from(At(0))), ..Holds::default() };
    let mut chain = Chain::new(vec![Gate::new("thinks", Box::new(filter), Terms::default())]);
    pass(&mut chain, Lane::DEFAULT, "abc").1.unwrap();
    let frame = |chain: &mut Chain, what| {
        let mut batch = Batch::new();
        let raw = batch.keep_wire(&[b' '; 1000]);
        batch.push(Event { what, raw: Some(raw) });
        (chain.pass(&mut batch), batch.events().len())
    };
    // While only text waits, frames go on.
    for _ in 0..1_000 {
        let (end, gone) = frame(&mut chain, What::Note);
        assert_eq!((end.is_ok(), gone), (true, 1));
    }
    frame(&mut chain, What::Finish { choice: 0, finish: Finish::Stop }).0.unwrap();
    let flood = (0..10_000).find_map(|round| frame(&mut chain, What::Note).0.err().map(|stop| (round, stop.code())));
    let (round, code) = flood.expect("bounded");
    assert_eq!(code, Code::ModerationUnavailable);
    assert!((100..130).contains(&round), "{round} frames of about 1080 bytes waited");
}

#[test]
fn an_answer_with_endless_lanes_is_the_upstreams_fault() {
    let mut chain =
        Chain::new(vec![Gate::new("any", Box::new(Edits { edits: lanes_without_edits(), said: BTreeMap::new() }), Terms::default())]);
    let ends: Vec<End> =
        (0..65).map(|n| pass(&mut chain, Lane { choice: n, channel: Channel::Content }, "x").1).take_while(Result::is_ok).collect();
    assert_eq!(ends.len(), 64);
    assert_eq!(more(&mut chain).1.unwrap_err().code(), Code::UpstreamProtocolError);
}

fn lanes_without_edits() -> BTreeMap<Lane, Vec<(u64, u64, &'static str)>> {
    (0..65).map(|choice| (Lane { choice, channel: Channel::Content }, Vec::new())).collect()
}

/// Would stamp, refuse, find and mask, everywhere.
struct Meddles {
    stop: bool,
}

impl Filter for Meddles {
    fn prompt<'a>(&'a mut self, prompt: &'a mut Prompt) -> BoxFuture<'a, Result<(), Stop>> {
        prompt.messages.clear();
        prompt.outcome = Outcome::Blocked;
        prompt.findings.push(finding(Stage::Input));
        let said = if self.stop { Err(Refusal::new(Code::PolicyDenied, "meddles").into()) } else { Ok(()) };
        Box::pin(std::future::ready(said))
    }
    fn head(&mut self, head: &mut Head) -> Result<(), Stop> {
        head.model = "another".into();
        if self.stop { Err(Refusal::new(Code::PolicyDenied, "meddles").into()) } else { Ok(()) }
    }
    fn end(&mut self, record: &mut Record) {
        record.raise(Outcome::Blocked);
        record.find(finding(Stage::Output));
    }
}

fn finding(stage: Stage) -> Finding {
    Finding { category: Category::Pii, source: Source::Rule, stage, score: 1.0, rule: "meddles".into() }
}

#[tokio::test]
async fn a_shadowed_filter_changes_neither_prompt_nor_head_and_only_flags() {
    for stop in [false, true] {
        let terms = Terms { mode: Mode::Shadow, ..Terms::default() };
        let mut chain = Chain::new(vec![Gate::new("meddles", Box::new(Meddles { stop }), terms)]);
        let (mut prompt, mut head) = (prompt("hello"), Head::default());
        chain.prompt(&mut prompt).await.unwrap();
        chain.head(&mut head).unwrap();
        assert_eq!((prompt.messages.len(), head.model.as_str()), (1, ""));
        assert_eq!((prompt.outcome, prompt.findings.len()), (Outcome::Flagged, 1));
        let (_, end, record) = finish(&mut chain);
        assert!(end.is_ok());
        assert_eq!((record.outcome, record.found), (Outcome::Flagged, 1));
    }
}

#[tokio::test]
async fn a_shadowed_moderation_looks_at_the_answer_of_a_prompt_it_would_have_refused() {
    let built = built("[{moderation: { deny: [{ phrase: bomb }] }, mode: shadow}]");
    let mut chain = chain(&built, &mut turn());
    let mut prompt = prompt("a bomb");
    chain.prompt(&mut prompt).await.unwrap();
    assert_eq!(pass(&mut chain, Lane::DEFAULT, "no bomb here").0, "no bomb here");
    let (_, _, record) = finish(&mut chain);
    assert_eq!((prompt.outcome, record.outcome, record.found), (Outcome::Flagged, Outcome::Flagged, 2));
}

/// Panics at one hook.
struct Panics(&'static str);

impl Panics {
    fn at(&self, hook: &str) {
        assert!(self.0 != hook, "a filter panics in {hook}");
    }
}

impl Filter for Panics {
    fn prompt<'a>(&'a mut self, _: &'a mut Prompt) -> BoxFuture<'a, Result<(), Stop>> {
        Box::pin(async {
            self.at("prompt");
            Ok(())
        })
    }
    fn head(&mut self, _: &mut Head) -> Result<(), Stop> {
        self.at("head");
        Ok(())
    }
    fn text(&mut self, text: Text<'_>) -> Verdict {
        self.at("text");
        Verdict::hold_from(text.at)
    }
    fn last(&mut self, _: Lane) -> Verdict {
        self.at("last");
        Verdict::pass()
    }
    fn poll(&mut self, _: &mut Context<'_>) -> Poll<(Lane, Verdict)> {
        self.at("poll");
        Poll::Pending
    }
    fn end(&mut self, _: &mut Record) {
        self.at("end");
    }
}

#[tokio::test]
async fn a_filter_that_panics_at_any_hook_costs_its_turn_and_no_other() {
    let limit = built_with("rate_limit: { streams: 1, output_tokens: 1000k/min }", &Tools::none());
    let log = Arc::new(AtomicU64::new(0));
    for hook in ["prompt", "head", "text", "poll", "last", "end", "none"] {
        let (limit, seen) = (limit.clone(), log.clone());
        let turn = tokio::spawn(async move {
            let gates = vec![
                Gate::new(limit.name, limit.rule.start(&mut turn()), limit.terms),
                Gate::new("panics", Box::new(Panics(hook)), Terms::default()),
            ];
            let mut chain = Chain::new(gates);
            chain.prompt(&mut prompt("hello")).await.expect("the place of the turn before is free");
            chain.head(&mut Head::default()).unwrap();
            let mut batch = Batch::new();
            push(&mut batch, Lane::DEFAULT, "hello");
            chain.pass(&mut batch).unwrap();
            seen.fetch_add(batch.events().len() as u64, Ordering::Relaxed);
            tokio::select! { biased; () = chain.ripen() => {}, () = std::future::ready(()) => {} }
            chain.end(Ok(()), &mut batch, &mut Record::default()).unwrap();
            all_text(&batch)
        });
        match turn.await {
            Ok(text) => assert_eq!((hook, text.as_str()), ("none", "hello")),
            Err(error) => assert!(error.is_panic() && hook != "none", "{hook}"),
        }
    }
    assert_eq!(log.load(Ordering::Relaxed), 0, "held text never left");
}

#[test]
fn a_panic_leaves_a_chain_that_can_be_dropped() {
    let mut chain = Chain::new(vec![Gate::new("panics", Box::new(Panics("text")), Terms::default())]);
    let caught = catch_unwind(AssertUnwindSafe(|| pass(&mut chain, Lane::DEFAULT, "x").1.is_ok()));
    assert!(caught.is_err());
    drop(chain);
}

#[test]
fn events_without_text_wait_only_for_the_text_they_are_about() {
    let built = built("[moderation: { mask: [{ phrase: secret }] }]");
    let mut chain = chain(&built, &mut turn());
    let mut batch = Batch::new();
    push(&mut batch, Lane::DEFAULT, "a sec");
    let (id, name) = (batch.keep_text("call-1"), batch.keep_text("lookup"));
    batch.push(Event { what: What::Tool { choice: 0, index: 0, id, name }, raw: None });
    push(&mut batch, Lane::DEFAULT, "ret b");
    batch.push(Event { what: What::Finish { choice: 0, finish: Finish::Stop }, raw: None });
    chain.pass(&mut batch).unwrap();
    let line: Vec<String> = batch
        .events()
        .iter()
        .map(|event| match event.what {
            What::Text { text, .. } => batch.text(text).to_owned(),
            What::Tool { id, name, .. } => format!("<{} {}>", batch.text(id), batch.text(name)),
            What::Finish { finish, .. } => format!("<{}>", finish.as_str()),
            What::Confirm { .. } | What::Usage(_) | What::Note => "<>".to_owned(),
        })
        .collect();
    // A call may begin while text waits; a finish comes after all text of its choice.
    assert_eq!(line, ["a ", "<call-1 lookup>", "••• b", "<stop>"].map(str::to_owned));
}
