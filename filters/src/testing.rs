//! What tests of filters share: turns and prompts, steps from YAML, and `check`, which runs a chain over a text however cut.

#![allow(dead_code, reason = "unit tests and tests/laws.rs use different parts")]

use headgate_contracts::{Batch, End, Lane, Message, Prompt, Record, Role, SessionId, Stop, Turn, TurnId, What};
use headgate_filters::{Built, Chain, Problem, Step, Tools, chain};

/// A turn that begins.
pub(crate) fn turn() -> Turn {
    Turn {
        id: TurnId::fresh(),
        session: SessionId::fresh(),
        route: "/v1/chat/stream".into(),
        flow: Default::default(),
        record: Record::default(),
    }
}

/// A prompt of one message by the user.
pub(crate) fn prompt(text: &str) -> Prompt {
    Prompt::new(TurnId::fresh(), SessionId::fresh(), vec![Message::new(Role::User, text)])
}

/// A step as the config has it.
pub(crate) fn step(yaml: &str) -> Step {
    serde_saphyr::from_str(yaml).unwrap_or_else(|error| panic!("{yaml}: {error}"))
}

/// A step, compiled.
pub(crate) fn built(yaml: &str) -> Built {
    built_with(yaml, &Tools::none())
}

/// A step, compiled with these tools.
pub(crate) fn built_with(yaml: &str, tools: &Tools<'_>) -> Built {
    step(yaml).build(tools).unwrap_or_else(|problems| panic!("{yaml}: {problems:?}"))
}

/// What is wrong with a step.
pub(crate) fn problems(yaml: &str) -> Vec<Problem> {
    step(yaml).build(&Tools::none()).err().unwrap_or_else(|| panic!("{yaml} has no problem"))
}

/// A chain of these steps (one a line), begun for a turn.
pub(crate) fn chain_of(steps: &[&str]) -> Chain {
    let built: Vec<Built> = steps.iter().map(|yaml| built(yaml)).collect();
    chain(&built, &mut turn())
}

/// The text of one lane in a batch.
pub(crate) fn text_of(batch: &Batch, wanted: Lane) -> String {
    let pieces = batch.events().iter().filter_map(|event| match event.what {
        What::Text { lane, text } if lane == wanted => Some(batch.text(text)),
        _ => None,
    });
    pieces.collect()
}

/// Runs a chain over pieces of the answer's text, one batch each: what came out, and how it ended.
pub(crate) fn run(mut chain: Chain, pieces: &[&str]) -> (String, End) {
    let (mut out, mut end, mut record) = (String::new(), Ok(()), Record::default());
    let mut batch = Batch::new();
    for piece in pieces {
        batch.clear();
        batch.push_text(Lane::DEFAULT, piece);
        end = chain.pass(&mut batch);
        out += &text_of(&batch, Lane::DEFAULT);
        if end.is_err() {
            break;
        }
    }
    let end = chain.end(end, &mut batch, &mut record);
    (out + &text_of(&batch, Lane::DEFAULT), end)
}

/// The same for a chain of one step.
pub(crate) fn ended(yaml: &str, pieces: &[&str]) -> (String, End) {
    run(chain_of(&[yaml]), pieces)
}

/// What came out and how it ended, in one line: `text`, `text!rule` of a refusal, `text?code` of a fault.
pub(crate) fn line((text, end): (String, End)) -> String {
    match end {
        Ok(()) => text,
        Err(Stop::Refused(refusal)) => format!("{text}!{}", refusal.rule),
        Err(stop) => format!("{text}?{}", stop.code()),
    }
}

/// Every way of cutting a text into pieces where it has up to 10 characters; else whole, by characters, and 300 ways by chance.
pub(crate) fn chunkings(text: &str) -> Vec<Vec<&str>> {
    let cuts: Vec<usize> = text.char_indices().map(|(at, _)| at).skip(1).collect();
    let by = |keep: &dyn Fn(usize) -> bool| {
        let (mut pieces, mut last) = (Vec::new(), 0);
        for (index, &cut) in cuts.iter().enumerate() {
            if keep(index) {
                pieces.push(&text[last..cut]);
                last = cut;
            }
        }
        pieces.push(&text[last..]);
        pieces
    };
    if cuts.len() < 10 {
        return (0..1_u32 << cuts.len()).map(|bits| by(&|index| bits >> index & 1 == 1)).collect();
    }
    let mut ways = vec![by(&|_| false), by(&|_| true)];
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for way in 0..300_u64 {
        let one_in = 1 + way % 9;
        let chance: Vec<bool> = cuts
            .iter()
            .map(|_| {
                state = state.wrapping_mul(0xd134_2543_de82_ef95).wrapping_add(1);
                (state >> 33).is_multiple_of(one_in)
            })
            .collect();
        ways.push(by(&|index| chance[index]));
    }
    ways
}

/// Runs one step over a text cut in every way: the same must come out each time, written as by [`line`].
pub(crate) fn check(yaml: &str, text: &str, expected: &str) {
    check_chain(&[yaml], text, expected);
}

/// The same for several steps.
pub(crate) fn check_chain(steps: &[&str], text: &str, expected: &str) {
    let built: Vec<Built> = steps.iter().map(|yaml| built(yaml)).collect();
    for pieces in chunkings(text) {
        assert_eq!(line(run(chain(&built, &mut turn()), &pieces)), expected, "{steps:?} over {pieces:?}");
    }
}
