//! Ends an answer that grows past a limit of tokens or bytes, at the same byte however it was cut into chunks.

use headgate_contracts::{Category, Code, Finding, Finish, Prompt, Record, Refusal, Source, Stage, Stop, Turn};
use schemars::JsonSchema;
use serde::Deserialize;

use crate::{
    At, BoxFuture, Filter, Problem, Rule, Text, Tools, Verdict,
    table::{self, Facts, Fits, Parts},
    units::Bytes,
};

/// Bytes of UTF-8 text that count as one token. An estimate: English text has about four to a token, other languages more
/// bytes but also more tokens to a character. What a model really counts is known only to it, and too late to cut by.
pub const BYTES_PER_TOKEN: u64 = 4;

/// Settings of `budget`. All choices, and all channels of text (reasoning and tool arguments too), count together.
#[derive(Debug, Clone, PartialEq, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(rename = "BudgetSettings")]
pub struct Settings {
    /// The most tokens one answer may have, counted as 4 bytes of UTF-8 each. The model is asked for no more, too.
    pub output_tokens: Option<u32>,
    /// The most bytes of text one answer may have, e.g. `64KiB`.
    pub output_bytes: Option<Bytes>,
}

impl table::Settings for Settings {
    const TERMS: Fits = Fits { shadow: true, hold: false, pass: false };

    fn build(&self, _: &Tools<'_>) -> Result<Parts, Vec<Problem>> {
        let mut problems = Vec::new();
        let by_tokens = self.output_tokens.map(|tokens| (u64::from(tokens) * BYTES_PER_TOKEN, "budget.output_tokens"));
        let by_bytes = self.output_bytes.map(|bytes| (bytes.0, "budget.output_bytes"));
        for (limit, rule) in [by_tokens, by_bytes].into_iter().flatten() {
            if limit == 0 {
                let at = rule.trim_start_matches("budget.");
                problems
                    .push(Problem::new(at, "0: no answer could have a word").expected("a limit above 0").remedy(format!("remove `{at}`")));
            }
        }
        match [by_tokens, by_bytes].into_iter().flatten().min() {
            Some((limit, rule)) if problems.is_empty() => {
                let rule = Limit { limit, rule, tokens: self.output_tokens };
                Ok(Parts {
                    rule: std::sync::Arc::new(rule),
                    facts: Facts { judges_text: true, cuts: true, ..Facts::default() },
                    admit: None,
                })
            }
            None => Err(vec![
                Problem::new("", "no limit is set, so nothing would be limited")
                    .expected("`output_tokens`, `output_bytes` or both")
                    .remedy("write e.g. `budget: { output_tokens: 2000 }`"),
            ]),
            Some(_) => Err(problems),
        }
    }
}

#[derive(Clone, Copy)]
struct Limit {
    limit: u64,
    rule: &'static str,
    tokens: Option<u32>,
}

impl Rule for Limit {
    fn start(&self, _: &mut Turn) -> Box<dyn Filter> {
        Box::new(Budget { limit: *self, shown: 0, over: false })
    }
}

struct Budget {
    limit: Limit,
    shown: u64,
    over: bool,
}

impl Filter for Budget {
    fn prompt<'a>(&'a mut self, prompt: &'a mut Prompt) -> BoxFuture<'a, Result<(), Stop>> {
        if let Some(tokens) = self.limit.tokens {
            let asked = &mut prompt.settings.max_output_tokens;
            *asked = Some(asked.map_or(tokens, |asked| asked.min(tokens)));
        }
        Box::pin(std::future::ready(Ok(())))
    }

    fn text(&mut self, text: Text<'_>) -> Verdict {
        let before = self.shown;
        self.shown += text.text.len() as u64;
        if self.shown <= self.limit.limit {
            return Verdict::pass();
        }
        self.over = true;
        let left = self.limit.limit.saturating_sub(before);
        let why = Refusal::new(Code::StreamLimitExceeded, self.limit.rule).finishing(Finish::Length);
        Verdict::refuse_from(At(text.at.0 + left), why)
    }

    fn end(&mut self, record: &mut Record) {
        if self.over {
            record.find(Finding {
                category: Category::UnboundedConsumption,
                source: Source::Rule,
                stage: Stage::Output,
                score: 1.0,
                rule: self.limit.rule.into(),
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{built, check, ended, problems, prompt, turn};

    #[test]
    fn an_answer_is_cut_at_the_limit_and_not_before() {
        check("budget: { output_bytes: 5B }", "abcde", "abcde");
        check("budget: { output_bytes: 5B }", "abcdef", "abcde!budget.output_bytes");
        check("budget: { output_tokens: 2 }", "12345678", "12345678");
        check("budget: { output_tokens: 2 }", "123456789", "12345678!budget.output_tokens");
        check("budget: { output_tokens: 2, output_bytes: 3B }", "123456789", "123!budget.output_bytes");
    }

    #[test]
    fn a_limit_inside_a_character_cuts_before_it() {
        check("budget: { output_bytes: 5B }", "abcéé", "abcé!budget.output_bytes");
        check("budget: { output_bytes: 4B }", "abcé", "abc!budget.output_bytes");
    }

    #[test]
    fn a_cut_by_budget_finishes_as_length() {
        let (_, end) = ended("budget: { output_bytes: 2B }", &["abc"]);
        let Err(Stop::Refused(refusal)) = end else { panic!("{end:?}") };
        assert_eq!((refusal.code, refusal.finish), (Code::StreamLimitExceeded, Finish::Length));
    }

    #[tokio::test]
    async fn the_model_is_asked_for_no_more_than_the_budget() {
        let rule = built("budget: { output_tokens: 100 }").rule;
        for (asked, sent) in [(None, 100), (Some(7), 7), (Some(4000), 100)] {
            let mut prompt = prompt("hello");
            prompt.settings.max_output_tokens = asked;
            rule.start(&mut turn()).prompt(&mut prompt).await.unwrap();
            assert_eq!(prompt.settings.max_output_tokens, Some(sent));
        }
    }

    #[test]
    fn a_budget_without_a_limit_is_refused() {
        assert!(problems("budget")[0].to_string().contains("output_tokens: 2000"));
        assert_eq!(problems("budget: { output_tokens: 0 }")[0].at, "budget.output_tokens");
    }
}
