//! Refuses and masks phrases, patterns and personal data: in the prompt before it is sent, in the answer while it streams.
//!
//! The answer's text is held exactly as long as a match may still be forming; what is found does not depend on how the text
//! was cut into chunks ([`crate::matcher`] says what counts as a match). Each channel of the answer is a text of its own.

use std::{
    borrow::Cow,
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
};

use headgate_contracts::{
    Category, Channel, Code, Content, Finding, Lane, MAX_FINDINGS, Message, Outcome, Prompt, Record, Refusal, Role, Source, Stage, Stop,
    Turn,
};
use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, de};
use serde_json::{Map, Value};
use smallvec::SmallVec;

use crate::{
    At, BoxFuture, Filter, Problem, Rule, Text, Tools, Verdict,
    matcher::{Action, BuildError, Detector, Edits, Hit, Mask, Matcher, MatcherBuilder, Progress, RuleInfo, Scan},
    memory::{self, Memory, Recall},
    problem::did_you_mean,
    table::{self, Facts, Fits, Parts},
    units::Bytes,
};

/// Settings of `moderation`.
///
/// The lists take names of detectors (`email`, `phone`, `credit_card`, `iban`, `ip`, `us_ssn`, `api_key`, `private_key`,
/// `jwt`), files of phrases (`rules/deny.txt`), patterns (`/[a-z]{2}-[0-9]{6}/`), or `{ phrase: ... }` and `{ pattern: ... }`
/// with a `category` of their own.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(rename = "ModerationSettings")]
pub struct Settings {
    /// What ends a turn: a prompt with it is refused, an answer is cut before it.
    pub deny: Vec<Entry>,
    /// What is replaced, in prompt and answer.
    pub mask: Vec<Entry>,
    /// What stands in place of masked text. Default `•••`.
    pub with: String,
    /// What is reported for phrases and patterns without a category of their own. Default `tenant_policy`.
    pub category: Category,
    /// What happens on the way up: `check` (default): both lists; `deny`: only that one, and what would be masked is only
    /// recorded; `off`.
    pub prompt: OnPrompt,
    /// What happens on the way down: `check` (default) or `off`.
    pub answer: OnAnswer,
    /// Messages of a prompt that are not looked at, by role; `system` stands for tool descriptions too. Default: none. Exempt
    /// only what your own programs write: a client that chooses the role chooses whether it is checked.
    pub exempt: Vec<Role>,
    /// Room for remembering what was found in the texts of prompts, so that a long conversation costs only what is new in it.
    /// Each principal has memories of its own; none outlives these lists, and none holds text. Default `16MiB`; `0B`: nothing
    /// is remembered.
    pub remember: Option<Bytes>,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            deny: Vec::new(),
            mask: Vec::new(),
            with: DEFAULT_WITH.into(),
            category: Category::TenantPolicy,
            prompt: OnPrompt::Check,
            answer: OnAnswer::Check,
            exempt: Vec::new(),
            remember: None,
        }
    }
}

const DEFAULT_REMEMBER: Bytes = Bytes(16 << 20);
const DEFAULT_WITH: &str = "•••";
/// The longest replacement, in bytes.
const MAX_WITH_BYTES: usize = 64;
/// The largest file of phrases, in bytes.
const MAX_FILE_BYTES: usize = 4 << 20;

/// What happens to a prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnPrompt {
    /// It is refused, or masked.
    #[default]
    Check,
    /// It is refused, but never masked.
    Deny,
    /// Nothing.
    Off,
}

/// What happens to an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnAnswer {
    /// It is cut, or masked.
    #[default]
    Check,
    /// Nothing.
    Off,
}

/// One entry of a list, as written.
#[derive(Clone, PartialEq)]
pub enum Entry {
    /// A built-in detector, by name.
    Detector(Detector),
    /// A file of phrases and patterns.
    File(PathBuf),
    /// A phrase, found wherever it stands, inside words too.
    Phrase {
        /// The phrase.
        phrase: String,
        /// What is reported.
        category: Option<Category>,
    },
    /// A regular expression.
    Pattern {
        /// The expression.
        pattern: String,
        /// What is reported.
        category: Option<Category>,
    },
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A list of forbidden phrases is nothing for a log.
        match self {
            Entry::Detector(detector) => write!(f, "{detector}"),
            Entry::File(path) => write!(f, "{}", path.display()),
            Entry::Phrase { .. } => f.write_str("<phrase>"),
            Entry::Pattern { .. } => f.write_str("<pattern>"),
        }
    }
}

/// An entry with its members spelled out.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Spelled {
    /// A phrase, found wherever it stands, inside words too.
    #[serde(default)]
    phrase: Option<String>,
    /// A regular expression in the syntax of Rust's regex crate; case does not matter; at most 4096 bytes long matches.
    #[serde(default)]
    pattern: Option<String>,
    /// What is reported.
    #[serde(default)]
    category: Option<Category>,
}

fn pattern_of(text: &str) -> Option<&str> {
    text.strip_prefix('/')?.strip_suffix('/').filter(|pattern| !pattern.is_empty())
}

impl<'de> Deserialize<'de> for Entry {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Entry, D::Error> {
        struct Entries;
        impl<'de> de::Visitor<'de> for Entries {
            type Value = Entry;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a detector's name, a file, a /pattern/, or a map with `phrase` or `pattern`")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Entry, E> {
                if let Ok(detector) = text.parse() {
                    return Ok(Entry::Detector(detector));
                }
                if let Some(pattern) = pattern_of(text) {
                    return Ok(Entry::Pattern { pattern: pattern.to_owned(), category: None });
                }
                // A word alone is taken for a misspelled detector, not for a phrase: it would never do what was meant.
                if text.contains(['/', '.']) {
                    return Ok(Entry::File(PathBuf::from(text)));
                }
                let names = Detector::ALL.map(Detector::name);
                let near = did_you_mean(text, names);
                Err(E::custom(format_args!(
                    "`{text}` is no detector{near}; detectors: {}; for the words themselves write `phrase: {text}`",
                    names.join(", ")
                )))
            }

            fn visit_map<A: de::MapAccess<'de>>(self, map: A) -> Result<Entry, A::Error> {
                match Spelled::deserialize(de::value::MapAccessDeserializer::new(map))? {
                    Spelled { phrase: Some(phrase), pattern: None, category } => Ok(Entry::Phrase { phrase, category }),
                    Spelled { phrase: None, pattern: Some(pattern), category } => Ok(Entry::Pattern { pattern, category }),
                    _ => Err(de::Error::custom("expected `phrase` or `pattern`, one of the two")),
                }
            }
        }
        from.deserialize_any(Entries)
    }
}

impl JsonSchema for Entry {
    fn schema_name() -> Cow<'static, str> {
        "ModerationEntry".into()
    }
    fn json_schema(generator: &mut schemars::SchemaGenerator) -> schemars::Schema {
        let spelled = generator.subschema_for::<Spelled>();
        schemars::json_schema!({ "anyOf": [
            { "enum": Detector::ALL.map(Detector::name), "description": "a built-in detector" },
            { "type": "string", "pattern": "^/.+/$", "description": "a pattern" },
            { "type": "string", "pattern": "[/.]", "description": "a file of phrases" },
            spelled,
        ] })
    }
}

impl table::Settings for Settings {
    const TERMS: Fits = Fits { shadow: true, hold: true, pass: true };

    fn build(&self, tools: &Tools<'_>) -> Result<Parts, Vec<Problem>> {
        let mut problems = self.inert();
        let mut lists = Lists { builder: MatcherBuilder::new(), names: Vec::new(), written: Vec::new() };
        for (list, action, entries) in [("deny", Action::Deny, &self.deny), ("mask", Action::Mask, &self.mask)] {
            for (index, entry) in entries.iter().enumerate() {
                let at = format!("{list}[{index}]");
                if let Err(found) = lists.add(&at, entry, action, self.category, tools) {
                    problems.extend(found);
                }
            }
        }
        if !problems.is_empty() {
            return Err(problems);
        }
        let Lists { builder, mut names, written } = lists;
        let matcher = builder.build().map_err(|error| vec![unusable(&error, &written)])?;
        // The matcher's last rule is its own: text stretched by invisible characters beyond what can be held.
        names.push(Named { category: Category::PromptInjection, rule: "moderation.mask.invisible".into() });
        let with = if self.with == DEFAULT_WITH { Cow::Borrowed(DEFAULT_WITH) } else { Cow::Owned(self.with.clone()) };
        let remember = if self.prompt == OnPrompt::Off { Bytes(0) } else { self.remember.unwrap_or(DEFAULT_REMEMBER) };
        let memory = (remember.0 > 0).then(|| Memory::new(remember.0)).transpose();
        let memory = memory.map_err(|_| vec![Problem::new("remember", "the system has no random bytes for a key")])?;
        let moderation = Moderation {
            matcher,
            names,
            with,
            prompt: self.prompt,
            exempt: self.exempt.clone(),
            checks_answer: self.answer == OnAnswer::Check,
            memory,
        };
        if !moderation.whole([moderation.with.as_ref()]).edits.hits.is_empty() {
            return Err(vec![
                Problem::new("with", "the replacement is itself found by the lists")
                    .expected("a text that no entry matches")
                    .remedy("remove `with`: the default is `•••`"),
            ]);
        }
        let judges_text = moderation.checks_answer;
        let facts = Facts {
            judges_text,
            holds_text: judges_text,
            worst_hold_bytes: if judges_text { moderation.matcher.longest() as u64 } else { 0 },
            masks: judges_text && !self.mask.is_empty(),
            cuts: judges_text && !self.deny.is_empty(),
        };
        Ok(Parts { rule: Arc::new(Moderates(Arc::new(moderation))), facts, admit: None })
    }
}

impl Settings {
    /// Settings that would do nothing, or not what they say.
    fn inert(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        if self.deny.is_empty() && self.mask.is_empty() {
            problems.push(
                Problem::new("", "neither `deny` nor `mask`, so nothing would be looked for")
                    .expected("`deny`, `mask` or both")
                    .remedy("write e.g. `moderation: { deny: [rules/deny.txt], mask: [email] }`"),
            );
        }
        if self.prompt == OnPrompt::Off && self.answer == OnAnswer::Off {
            problems.push(Problem::new("answer", "`off`, and `prompt` too, so nothing would be looked at").remedy("remove one of the two"));
        }
        if !self.mask.is_empty() && self.prompt != OnPrompt::Check && self.answer == OnAnswer::Off {
            problems.push(
                Problem::new("mask", "neither prompt nor answer may be masked, so this list cannot mask")
                    .remedy("set `prompt: check`, or remove `answer: off`, or remove `mask`"),
            );
        }
        if self.deny.is_empty() && self.prompt == OnPrompt::Deny {
            problems.push(Problem::new("prompt", "`deny` without a list `deny`").remedy("write `prompt: off`, or add a list `deny`"));
        }
        if self.with.is_empty() || self.with.len() > MAX_WITH_BYTES {
            problems.push(
                Problem::new("with", format!("{} bytes", self.with.len()))
                    .expected(format!(
                        "1 to {MAX_WITH_BYTES} bytes: with nothing between them, the neighbours of masked text could form a new word"
                    ))
                    .remedy("remove `with`: the default is `•••`"),
            );
        }
        match self.remember {
            Some(_) if self.prompt == OnPrompt::Off => problems.push(
                Problem::new("remember", "prompts are not looked at, and of answers nothing is remembered").remedy("remove `remember`"),
            ),
            Some(Bytes(1..memory::LEAST_BYTES)) => problems.push(
                Problem::new("remember", "too little to remember a conversation")
                    .expected(format!("{} or more, or `0B` for nothing", Bytes(memory::LEAST_BYTES)))
                    .remedy(format!("remove `remember`: the default is `{DEFAULT_REMEMBER}`")),
            ),
            Some(_) | None => {}
        }
        for (index, entry) in self.mask.iter().enumerate() {
            if matches!(entry, Entry::Detector(_)) && self.deny.contains(entry) {
                problems.push(
                    Problem::new(format!("mask[{index}]"), format!("`{entry:?}` is denied too, so it is never masked"))
                        .remedy("remove it from one of the two lists"),
                );
            }
        }
        problems
    }
}

/// What is reported for a rule of the matcher.
struct Named {
    category: Category,
    rule: Arc<str>,
}

/// The lists on their way into a matcher.
struct Lists {
    builder: MatcherBuilder,
    /// By the matcher's rule ids.
    names: Vec<Named>,
    /// Each phrase and pattern, and where it was written.
    written: Vec<(String, String)>,
}

impl Lists {
    fn add(&mut self, at: &str, entry: &Entry, action: Action, category: Category, tools: &Tools<'_>) -> Result<(), Vec<Problem>> {
        match entry {
            Entry::Detector(detector) => {
                self.builder.detector(*detector, action);
                self.name(action, detector.name(), detected(*detector));
            }
            Entry::Phrase { phrase, category: own } => self.phrase(at.to_owned(), phrase, action, own.unwrap_or(category)),
            Entry::Pattern { pattern, category: own } => self.pattern(at.to_owned(), pattern, action, own.unwrap_or(category)),
            Entry::File(path) => return self.file(at, path, action, category, tools),
        }
        Ok(())
    }

    fn name(&mut self, action: Action, what: &str, category: Category) {
        let list = match action {
            Action::Deny => "deny",
            Action::Mask => "mask",
        };
        self.names.push(Named { category, rule: format!("moderation.{list}.{what}").into() });
    }

    fn phrase(&mut self, at: String, phrase: &str, action: Action, category: Category) {
        self.builder.phrase(phrase, action, category.as_str());
        self.name(action, "phrase", category);
        self.written.push((phrase.to_owned(), at));
    }

    fn pattern(&mut self, at: String, pattern: &str, action: Action, category: Category) {
        self.builder.pattern(pattern, action, category.as_str());
        self.name(action, "pattern", category);
        self.written.push((pattern.to_owned(), at));
    }

    /// A file: one phrase a line, `/pattern/` lines, `#` comments; `category: name` holds for the lines below it. A phrase
    /// that begins with one of these signs is written with a backslash before it.
    fn file(&mut self, at: &str, path: &Path, action: Action, mut category: Category, tools: &Tools<'_>) -> Result<(), Vec<Problem>> {
        let unread = |found: String| {
            vec![Problem::new(at, found).expected("a text file of phrases, one a line").remedy("mend the path or the file")]
        };
        let text = (tools.read)(path).map_err(|error| unread(format!("cannot read {}: {error}", path.display())))?;
        if text.len() > MAX_FILE_BYTES {
            return Err(unread(format!("{} is larger than 4MiB", path.display())));
        }
        let (mut problems, mut any) = (Vec::new(), false);
        for (number, line) in text.trim_start_matches('\u{feff}').lines().enumerate() {
            let line = line.trim();
            let place = || format!("{at} ({} line {})", path.display(), number + 1);
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            if let Some(name) = line.strip_prefix("category:").map(str::trim) {
                match Category::from_name(name) {
                    Some(named) => category = named,
                    None => {
                        let near = did_you_mean(name, Category::ALL.iter().map(|category| category.as_str()));
                        let names: Vec<_> = Category::ALL.iter().map(|category| category.as_str()).collect();
                        problems.push(Problem::new(place(), format!("unknown category `{name}`{near}")).expected(names.join(", ")));
                    }
                }
                continue;
            }
            any = true;
            match pattern_of(line) {
                Some(pattern) => self.pattern(place(), pattern, action, category),
                None => self.phrase(place(), line.strip_prefix('\\').unwrap_or(line), action, category),
            }
        }
        if !any {
            problems.push(Problem::new(at, format!("{} has no phrase in it", path.display())).remedy("add one, or remove the entry"));
        }
        if problems.is_empty() { Ok(()) } else { Err(problems) }
    }
}

/// The category of what a detector finds.
fn detected(detector: Detector) -> Category {
    match detector {
        Detector::Email | Detector::Phone | Detector::CreditCard | Detector::Iban | Detector::Ip | Detector::UsSsn => Category::Pii,
        Detector::ApiKey | Detector::PrivateKey | Detector::Jwt => Category::Secrets,
    }
}

/// The matcher's refusal of a rule, at the place where that was written.
fn unusable(error: &BuildError, written: &[(String, String)]) -> Problem {
    let at = match error {
        BuildError::EmptyPhrase { phrase: text } | BuildError::LoosePhrase { phrase: text } | BuildError::Pattern { pattern: text, .. } => {
            written.iter().find(|(other, _)| other == text)
        }
        BuildError::LongPhrase { start, .. } => written.iter().find(|(other, _)| other.starts_with(start.as_str())),
        BuildError::TooBig { .. } => None,
    };
    Problem::new(at.map_or("", |(_, at)| at), error.to_string())
}

/// The lists, compiled: shared by all turns of a route.
struct Moderation {
    matcher: Matcher,
    names: Vec<Named>,
    with: Cow<'static, str>,
    prompt: OnPrompt,
    exempt: Vec<Role>,
    checks_answer: bool,
    /// What was found in texts of prompts; other lists are another `Moderation`, so it cannot outlive these.
    memory: Option<Memory>,
}

/// What was found in a text that is known as a whole.
struct Whole {
    edits: Edits,
    cut: bool,
}

impl Moderation {
    fn whole<'a>(&self, pieces: impl IntoIterator<Item = &'a str>) -> Whole {
        let (mut scan, mut edits) = (self.matcher.scan(), Edits::default());
        for piece in pieces {
            scan.push(&self.matcher, piece, &mut edits);
        }
        let Progress { cut, .. } = scan.finish(&self.matcher, &mut edits);
        Whole { edits, cut }
    }

    fn rule(&self, hit: &Hit) -> Option<(&RuleInfo, &Named)> {
        let index = hit.rule.0 as usize;
        self.matcher.rules().get(index).zip(self.names.get(index))
    }

    /// The refusal that the denied ones among `hits` call for.
    fn refusal(&self, hits: &[Hit]) -> Refusal {
        let denied = hits.iter().filter_map(|hit| self.rule(hit)).filter(|(info, _)| info.action == Action::Deny);
        Refusal::new(Code::PolicyDenied, "moderation.deny").about(denied.map(|(_, named)| named.category))
    }
}

struct Moderates(Arc<Moderation>);

impl Rule for Moderates {
    fn start(&self, _: &mut Turn) -> Box<dyn Filter> {
        Box::new(Moderator {
            rules: self.0.clone(),
            scans: SmallVec::new(),
            edits: Edits::default(),
            findings: Vec::new(),
            unlisted: 0,
            outcome: Outcome::Allowed,
            known_texts: 0,
            new_texts: 0,
        })
    }
}

/// Moderation of one turn.
struct Moderator {
    rules: Arc<Moderation>,
    /// Nearly every answer has one lane.
    scans: SmallVec<[(Lane, Scan); 1]>,
    /// Emptied after each piece.
    edits: Edits,
    findings: Vec<Finding>,
    /// Findings beyond those kept.
    unlisted: u64,
    /// What became of the answer.
    outcome: Outcome,
    /// Texts of the prompt whose verdicts were remembered, and the others that were looked for.
    known_texts: u64,
    new_texts: u64,
}

impl Moderator {
    fn find(&mut self, hits: &[Hit], stage: Stage) {
        for hit in hits {
            let Some((_, named)) = self.rules.rule(hit) else { continue };
            if self.findings.len() == MAX_FINDINGS {
                self.unlisted += 1;
                continue;
            }
            let (category, rule) = (named.category, named.rule.clone());
            self.findings.push(Finding { category, source: Source::Rule, stage, score: 1.0, rule });
        }
    }

    /// What a scan has settled of a lane, as a verdict.
    fn verdict(&mut self, lane: Lane, progress: Progress) -> Verdict {
        let mut edits = std::mem::take(&mut self.edits);
        if edits.hits.is_empty() && edits.masks.is_empty() && !progress.cut {
            self.edits = edits;
            return Verdict::hold_from(At(progress.cleared));
        }
        let stage = if matches!(lane.channel, Channel::ToolArguments(_)) { Stage::Tool } else { Stage::Output };
        self.find(&edits.hits, stage);
        let mut verdict = if progress.cut {
            self.outcome = Outcome::Blocked;
            Verdict::refuse_from(At(progress.cleared), self.rules.refusal(&edits.hits))
        } else {
            Verdict::hold_from(At(progress.cleared))
        };
        for Mask { range, first } in &edits.masks {
            self.outcome = self.outcome.max(Outcome::Masked);
            let with = if *first { self.rules.with.clone() } else { Cow::Borrowed("") };
            verdict = verdict.replacing(At(range.start)..At(range.end), with);
        }
        edits.clear();
        self.edits = edits;
        verdict
    }

    fn scan(&mut self, lane: Lane) -> usize {
        self.scans.iter().position(|(other, _)| *other == lane).unwrap_or_else(|| {
            self.scans.push((lane, self.rules.matcher.scan()));
            self.scans.len() - 1
        })
    }

    fn check(&mut self, prompt: &mut Prompt) -> Result<(), Stop> {
        let rules = self.rules.clone();
        let recall = rules.memory.as_ref().and_then(|memory| memory.of(&prompt.principal));
        let mut check = Check { rules: &rules, recall, hits: Vec::new(), masked: false };
        let verdict = check.prompt(prompt);
        let Check { hits, masked, recall, .. } = check;
        if let Some(Recall { known, new, .. }) = recall {
            (self.known_texts, self.new_texts) = (known, new);
        }
        let before = self.findings.len();
        self.find(&hits, Stage::Input);
        let room = MAX_FINDINGS.saturating_sub(prompt.findings.len());
        prompt.findings.extend(self.findings.iter().skip(before).take(room).cloned());
        prompt.outcome = prompt.outcome.max(match (&verdict, masked, hits.is_empty()) {
            (Err(_), _, _) => Outcome::Blocked,
            (Ok(()), true, _) => Outcome::Masked,
            (Ok(()), false, false) => Outcome::Flagged,
            (Ok(()), false, true) => Outcome::Allowed,
        });
        if verdict.is_err() {
            self.outcome = Outcome::Blocked;
        }
        verdict
    }
}

impl Filter for Moderator {
    fn prompt<'a>(&'a mut self, prompt: &'a mut Prompt) -> BoxFuture<'a, Result<(), Stop>> {
        let verdict = if self.rules.prompt == OnPrompt::Off { Ok(()) } else { self.check(prompt) };
        Box::pin(std::future::ready(verdict))
    }

    fn text(&mut self, text: Text<'_>) -> Verdict {
        let index = self.scan(text.lane);
        let Some((lane, scan)) = self.scans.get_mut(index) else { return Verdict::hold_from(text.at) };
        let (lane, progress) = (*lane, scan.push(&self.rules.matcher, text.text, &mut self.edits));
        self.verdict(lane, progress)
    }

    fn last(&mut self, lane: Lane) -> Verdict {
        let index = self.scan(lane);
        let Some((_, scan)) = self.scans.get_mut(index) else { return Verdict::hold_from(At(0)) };
        let progress = scan.finish(&self.rules.matcher, &mut self.edits);
        self.verdict(lane, progress)
    }

    fn end(&mut self, record: &mut Record) {
        for finding in self.findings.drain(..) {
            record.find(finding);
        }
        record.found += std::mem::take(&mut self.unlisted);
        record.known_texts += std::mem::take(&mut self.known_texts);
        record.new_texts += std::mem::take(&mut self.new_texts);
        record.raise(self.outcome);
    }
}

/// Hits of a prompt beyond these are not counted.
const MOST_HITS: usize = 4 * MAX_FINDINGS;

/// A look through a prompt: every text of it, wherever it stands.
struct Check<'a> {
    rules: &'a Moderation,
    recall: Option<Recall<'a>>,
    hits: Vec<Hit>,
    masked: bool,
}

impl Check<'_> {
    fn prompt(&mut self, prompt: &mut Prompt) -> Result<(), Stop> {
        let exempt = &self.rules.exempt;
        for message in prompt.messages.iter_mut().filter(|message| !exempt.contains(&message.role)) {
            self.message(message)?;
        }
        if !exempt.contains(&Role::System) {
            let settings = &mut prompt.settings;
            for value in [&mut settings.tools, &mut settings.tool_choice, &mut settings.response_format].into_iter().flatten() {
                self.whole_value(value)?;
            }
            for stop in &mut prompt.settings.stop {
                self.text(stop)?;
            }
        }
        Ok(())
    }

    fn message(&mut self, message: &mut Message) -> Result<(), Stop> {
        match &mut message.content {
            Some(Content::Text(text)) => self.text(text)?,
            Some(content @ Content::Parts(_)) => {
                for text in content.texts_mut() {
                    self.text(text)?;
                }
                // Models see the parts of a message as one text: a phrase cut over two of them is still one.
                self.joined(&mut content.texts_mut().collect::<Vec<_>>())?;
            }
            None => {}
        }
        for name in [&mut message.name, &mut message.tool_call_id].into_iter().flatten() {
            self.text(name)?;
        }
        match &mut message.tool_calls {
            Some(calls) => self.whole_value(calls),
            None => Ok(()),
        }
    }

    fn text(&mut self, text: &mut String) -> Result<(), Stop> {
        self.joined(&mut [text])
    }

    /// Judges texts that are read as one, and masks them where they stand.
    fn joined(&mut self, texts: &mut [&mut String]) -> Result<(), Stop> {
        let Whole { edits, cut } = self.whole(texts);
        let refusal = cut.then(|| self.rules.refusal(&edits.hits));
        self.hits.extend(edits.hits);
        self.hits.truncate(MOST_HITS);
        if let Some(refusal) = refusal {
            return Err(refusal.into());
        }
        if edits.masks.is_empty() || self.rules.prompt != OnPrompt::Check {
            return Ok(());
        }
        self.masked = true;
        let mut start = 0;
        for text in texts {
            let end = start + text.len() as u64;
            if edits.masks.iter().any(|mask| mask.range.start < end && start < mask.range.end) {
                **text = masked(text, start, &edits.masks, &self.rules.with);
            }
            start = end;
        }
        Ok(())
    }

    /// What is found in texts that are read as one, now or when they were judged before.
    fn whole(&mut self, texts: &[&mut String]) -> Whole {
        let digest = self.recall.as_ref().and_then(|recall| recall.digest(texts));
        let known = self.recall.as_mut().zip(digest.as_ref()).and_then(|(recall, digest)| recall.find(digest));
        if let Some(edits) = known {
            return Whole { edits, cut: false };
        }
        let whole = self.rules.whole(texts.iter().map(|text| text.as_str()));
        if let Some((recall, digest)) = self.recall.as_ref().zip(digest).filter(|_| !whole.cut) {
            recall.keep(digest, &whole.edits);
        }
        whole
    }

    /// Judges a JSON value, unless it is remembered that nothing is found in it and nothing of it written anew.
    fn whole_value(&mut self, value: &mut Value) -> Result<(), Stop> {
        let digest = self.recall.as_ref().and_then(|recall| recall.digest_of_value(value));
        if self.recall.as_mut().zip(digest.as_ref()).is_some_and(|(recall, digest)| recall.find(digest).is_some()) {
            return Ok(());
        }
        let mut hits = std::mem::take(&mut self.hits);
        let judged = self.value(value);
        let clean = judged.is_ok() && self.hits.is_empty();
        hits.append(&mut self.hits);
        hits.truncate(MOST_HITS);
        self.hits = hits;
        if let Some((recall, digest)) = self.recall.as_ref().zip(digest).filter(|_| clean)
            && recall.digest_of_value(value) == Some(digest)
        {
            recall.keep(digest, &Edits::default());
        }
        judged
    }

    /// Judges every text in a JSON value: names of members, numbers, and the JSON inside of `arguments`.
    fn value(&mut self, value: &mut Value) -> Result<(), Stop> {
        match value {
            Value::String(text) => self.text(text),
            Value::Number(number) => {
                let (written, mut text) = (number.to_string(), number.to_string());
                self.text(&mut text)?;
                if text != written {
                    *value = Value::String(text);
                }
                Ok(())
            }
            Value::Array(items) => items.iter_mut().try_for_each(|item| self.value(item)),
            Value::Object(members) => {
                let mut checked = Map::new();
                for (mut name, mut member) in std::mem::take(members) {
                    match &mut member {
                        Value::String(arguments) if name == "arguments" => self.arguments(arguments)?,
                        other => self.value(other)?,
                    }
                    self.text(&mut name)?;
                    checked.insert(name, member);
                }
                *members = checked;
                Ok(())
            }
            Value::Null | Value::Bool(_) => Ok(()),
        }
    }

    /// The arguments of a tool call: a string with JSON in it, in which escapes could hide a phrase and a member written
    /// twice could hide the first. What is sent is what was judged: written anew.
    fn arguments(&mut self, arguments: &mut String) -> Result<(), Stop> {
        match serde_json::from_str::<Value>(arguments) {
            Ok(mut inner) => {
                self.value(&mut inner)?;
                *arguments = inner.to_string();
                Ok(())
            }
            Err(_) => self.text(arguments),
        }
    }
}

/// The part of a text that begins at `start` of a longer one, with that one's masks.
fn masked(text: &str, start: u64, masks: &[Mask], with: &str) -> String {
    let place = |at: u64| usize::try_from(at.saturating_sub(start)).unwrap_or(usize::MAX).min(text.len());
    let (mut out, mut at) = (String::with_capacity(text.len()), 0);
    for Mask { range, first } in masks {
        let (from, to) = (place(range.start), place(range.end));
        out.push_str(text.get(at..from).unwrap_or_default());
        // A mask that begins in an earlier part has shown its replacement there.
        if *first && range.start >= start && range.start < start + text.len() as u64 {
            out.push_str(with);
        }
        at = at.max(to);
    }
    out.push_str(text.get(at..).unwrap_or_default());
    out
}

#[cfg(test)]
mod tests {
    use std::io;

    use headgate_contracts::{Batch, Part, SessionId, TurnId};
    use serde_json::json;

    use super::*;
    use crate::{
        Chain, LocalLedger,
        testing::{built_with, chain_of, check, check_chain, ended, problems, prompt, step, text_of, turn},
    };

    const DENY: &str = "moderation: { deny: [{ phrase: bomb }] }";
    const MASK: &str = "moderation: { mask: [{ phrase: secret }] }";
    const BOTH: &str = "moderation: { deny: [{ phrase: bomb }], mask: [{ phrase: secret }, email] }";

    #[test]
    fn a_word_cut_over_chunks_is_masked() {
        check(MASK, "a secret b", "a ••• b");
        check(MASK, "SE\u{200b}CRET", "•••");
        check(MASK, "secre", "secre");
        check(BOTH, "write to bob@example.com, it is secret", "write to •••, it is •••");
    }

    #[test]
    fn an_answer_is_cut_before_what_is_denied() {
        check(DENY, "a bomb b", "a !moderation.deny");
        check(BOTH, "a secret bomb b", "a ••• !moderation.deny");
        check("moderation: { deny: [{ phrase: bomb }], answer: off }", "a bomb b", "a bomb b");
    }

    #[test]
    fn what_one_moderation_leaves_the_next_one_sees() {
        check_chain(&[MASK, "moderation: { deny: [{ phrase: secret }] }"], "a secret b", "a ••• b");
        check_chain(&["moderation: { deny: [{ phrase: secret }] }", MASK], "a secret b", "a !moderation.deny");
    }

    #[test]
    fn text_of_one_channel_never_forms_a_word_with_another() {
        let mut chain = chain_of(&[DENY]);
        let mut batch = Batch::new();
        let reasoning = Lane { channel: Channel::Reasoning, ..Lane::DEFAULT };
        for (lane, text) in [(Lane::DEFAULT, "bo"), (reasoning, "mb"), (Lane::DEFAULT, "w"), (reasoning, "x bomb!")] {
            batch.push_text(lane, text);
        }
        let end = chain.pass(&mut batch);
        assert_eq!((text_of(&batch, Lane::DEFAULT), text_of(&batch, reasoning)), ("bow".into(), "mbx ".into()));
        assert_eq!(end.unwrap_err().code(), Code::PolicyDenied);
    }

    #[test]
    fn what_was_found_is_on_the_record_and_no_text_is() {
        let mut chain = chain_of(&["moderation: { deny: [{ phrase: bomb, category: indiscriminate_weapons }], mask: [email] }"]);
        let mut batch = Batch::new();
        batch.push_text(Lane { channel: Channel::ToolArguments(0), choice: 0 }, "ask a@example.com ");
        batch.push_text(Lane::DEFAULT, "about the bomb!");
        let end = chain.pass(&mut batch);
        let Err(Stop::Refused(refusal)) = &end else { panic!("{end:?}") };
        assert_eq!(refusal.categories, [Category::IndiscriminateWeapons]);
        let mut record = Record::default();
        drop(chain.end(end, &mut Batch::new(), &mut record));
        assert_eq!(record.outcome, Outcome::Blocked);
        let found: Vec<_> = record.findings.iter().map(|f| (f.category, f.stage, f.rule.as_ref())).collect();
        assert_eq!(
            found,
            [
                (Category::Pii, Stage::Tool, "moderation.mask.email"),
                (Category::IndiscriminateWeapons, Stage::Output, "moderation.deny.phrase"),
            ]
        );
    }

    #[test]
    fn a_flood_of_matches_is_counted_and_not_kept() {
        let mut chain = chain_of(&[MASK]);
        let mut batch = Batch::new();
        batch.push_text(Lane::DEFAULT, &"secret ".repeat(1000));
        chain.pass(&mut batch).unwrap();
        assert_eq!(text_of(&batch, Lane::DEFAULT), "••• ".repeat(1000));
        let mut record = Record::default();
        chain.end(Ok(()), &mut batch, &mut record).unwrap();
        assert_eq!((record.found, record.findings.len(), record.outcome), (1000, MAX_FINDINGS, Outcome::Masked));
    }

    async fn checked(yaml: &str, mut prompt: Prompt) -> Result<Prompt, Refusal> {
        let mut chain: Chain = chain_of(&[yaml]);
        match chain.prompt(&mut prompt).await {
            Ok(()) => Ok(prompt),
            Err(Stop::Refused(refusal)) => Err(refusal),
            Err(other) => panic!("{other:?}"),
        }
    }

    fn conversation(messages: Vec<Message>) -> Prompt {
        Prompt::new(TurnId::fresh(), SessionId::fresh(), messages)
    }

    fn said(prompt: &Prompt) -> Vec<String> {
        prompt.messages.iter().flat_map(|message| &message.content).flat_map(Content::texts).map(str::to_owned).collect()
    }

    #[tokio::test]
    async fn a_prompt_is_refused_or_masked_before_it_is_sent() {
        let refusal = checked(BOTH, prompt("build a bomb")).await.unwrap_err();
        assert_eq!((refusal.code, refusal.rule.as_ref()), (Code::PolicyDenied, "moderation.deny"));
        assert_eq!(refusal.categories, [Category::TenantPolicy]);
        let masked = checked(BOTH, prompt("my secret is bob@example.com")).await.unwrap();
        assert_eq!(said(&masked), ["my ••• is •••"]);
        assert_eq!((masked.outcome, masked.findings.len()), (Outcome::Masked, 2));
        assert!(masked.findings.iter().all(|finding| finding.stage == Stage::Input));
        let clean = checked(BOTH, prompt("hello")).await.unwrap();
        assert_eq!((clean.outcome, clean.findings.len()), (Outcome::Allowed, 0));
    }

    #[tokio::test]
    async fn every_text_of_a_prompt_is_looked_at() {
        let parts = |texts: &[&str]| Content::Parts(texts.iter().map(|text| Part::Text { text: (*text).into() }).collect());
        let with = |change: &dyn Fn(&mut Prompt)| -> Prompt {
            let mut prompt = conversation(vec![Message::new(Role::User, "hello"), Message::new(Role::Assistant, "hi")]);
            change(&mut prompt);
            prompt
        };
        let call = |arguments: &str| Some(json!([{ "id": "1", "type": "function", "function": { "name": "f", "arguments": arguments } }]));
        type Change<'a> = &'a dyn Fn(&mut Prompt);
        let places: [(&str, Change<'_>); 14] = [
            ("system", &|p| p.messages.push(Message::new(Role::System, "bomb"))),
            ("assistant", &|p| p.messages[1] = Message::new(Role::Assistant, "bomb")),
            ("tool", &|p| p.messages.push(Message::new(Role::Tool, "bomb"))),
            ("a part", &|p| p.messages[0].content = Some(parts(&["a", "bomb"]))),
            ("over two parts", &|p| p.messages[0].content = Some(parts(&["bo", "mb"]))),
            ("name", &|p| p.messages[0].name = Some("bomb".into())),
            ("call id", &|p| p.messages[1].tool_call_id = Some("bomb".into())),
            ("arguments", &|p| p.messages[1].tool_calls = call("{\"a\":\"bomb\"}")),
            ("escaped", &|p| p.messages[1].tool_calls = call("{\"a\":\"\\u0062omb\"}")),
            ("a member's name", &|p| p.messages[1].tool_calls = call("{\"bomb\":1}")),
            ("broken JSON", &|p| p.messages[1].tool_calls = call("{\"a\":\"bomb")),
            ("function name", &|p| p.messages[1].tool_calls = Some(json!([{ "function": { "name": "bomb" } }]))),
            ("tools", &|p| p.settings.tools = Some(json!([{ "function": { "description": "bomb" } }]))),
            ("stop", &|p| p.settings.stop = vec!["bomb".into()]),
        ];
        for (place, change) in places {
            assert!(checked(DENY, with(change)).await.is_err(), "{place}");
        }
        assert!(checked(DENY, with(&|_| {})).await.is_ok());
        let exempt = "moderation: { deny: [{ phrase: bomb }], exempt: [system] }";
        assert!(checked(exempt, with(&|p| p.messages.push(Message::new(Role::System, "no bomb")))).await.is_ok());
        assert!(checked(exempt, with(&|p| p.messages.push(Message::new(Role::Tool, "bomb")))).await.is_err());
    }

    #[tokio::test]
    async fn masks_in_prompts_stand_where_the_text_stood() {
        let parts = ["my se", "cret and ", "secret", "s"].map(|text| Part::Text { text: text.into() });
        let message = Message { content: Some(Content::Parts(parts.to_vec())), ..Message::new(Role::User, "") };
        let masked = checked(MASK, conversation(vec![message])).await.unwrap();
        assert_eq!(said(&masked), ["my •••", " and ", "•••", "s"]);

        let arguments = r#"{"to":"a\u0040example.com","card":4111111111111111,"n":7}"#;
        let mut message = Message::new(Role::Assistant, "");
        message.tool_calls = Some(json!([{ "function": { "name": "f", "arguments": arguments } }]));
        let masked = checked("moderation: { mask: [email, credit_card] }", conversation(vec![message])).await.unwrap();
        let calls = masked.messages[0].tool_calls.clone().unwrap();
        assert_eq!(calls[0]["function"]["arguments"], r#"{"to":"•••","card":"•••","n":7}"#);
    }

    #[tokio::test]
    async fn a_member_written_twice_in_arguments_is_sent_once() {
        let mut message = Message::new(Role::Assistant, "");
        message.tool_calls = Some(json!([{ "function": { "arguments": r#"{"a":"bomb","a":"x"}"# } }]));
        let sent = checked(DENY, conversation(vec![message])).await.unwrap();
        assert_eq!(sent.messages[0].tool_calls.clone().unwrap()[0]["function"]["arguments"], r#"{"a":"x"}"#);
    }

    #[tokio::test]
    async fn where_prompts_are_not_masked_findings_are_still_recorded() {
        let flagged =
            checked("moderation: { deny: [{ phrase: bomb }], mask: [email], prompt: deny }", prompt("a@example.com")).await.unwrap();
        assert_eq!((said(&flagged), flagged.outcome), (vec!["a@example.com".to_owned()], Outcome::Flagged));
        let off = checked("moderation: { deny: [{ phrase: bomb }], prompt: off }", prompt("bomb")).await.unwrap();
        assert_eq!((off.outcome, off.findings.len()), (Outcome::Allowed, 0));
    }

    fn reading(files: &'static [(&'static str, &'static str)]) -> Tools<'static> {
        let read: &'static dyn Fn(&Path) -> io::Result<String> = Box::leak(Box::new(move |path: &Path| {
            let found = files.iter().find(|(name, _)| Path::new(name) == path);
            found.map(|(_, text)| (*text).to_owned()).ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))
        }));
        Tools { read, ledger: Arc::new(LocalLedger::new()), ..Tools::none() }
    }

    #[test]
    fn a_file_has_phrases_patterns_comments_and_categories() {
        let tools = reading(&[("rules/deny.txt", "\u{feff}# ours\nplain\n\ncategory: privacy\n/x[0-9]{2}/\n\\#tag\n  spaced out  \n")]);
        let built = built_with("moderation: { deny: [rules/deny.txt] }", &tools);
        for (text, category) in [
            ("a plain b", Some(Category::TenantPolicy)),
            ("a X42 b", Some(Category::Privacy)),
            ("a #tag b", Some(Category::Privacy)),
            ("a spaced out b", Some(Category::Privacy)),
            ("# ours x4 tag category", None),
        ] {
            let (_, end) = crate::testing::run(crate::chain(std::slice::from_ref(&built), &mut turn()), &[text]);
            let found = end.err().map(|stop| match stop {
                Stop::Refused(refusal) => refusal.categories[0],
                other => panic!("{other:?}"),
            });
            assert_eq!(found, category, "{text}");
        }
    }

    #[test]
    fn what_is_wrong_in_a_file_is_told_by_its_line() {
        let tools = reading(&[("a.txt", "ok\ncategory: privcy\n/[a/\n"), ("b.txt", "# nothing\n"), ("c.txt", "ok\n/a*/\n")]);
        let told = |yaml: &str| step(yaml).build(&tools).unwrap_err().iter().map(Problem::to_string).collect::<Vec<_>>().join("\n");
        assert!(
            told("moderation: { deny: [a.txt] }")
                .contains("moderation.deny[0] (a.txt line 2): unknown category `privcy`, did you mean `privacy`?")
        );
        assert!(told("moderation: { deny: [b.txt, gone.txt] }").contains("b.txt has no phrase in it"));
        assert!(told("moderation: { deny: [b.txt, gone.txt] }").contains("moderation.deny[1]: cannot read gone.txt"));
        let unbounded = told("moderation: { deny: [c.txt] }");
        assert!(unbounded.starts_with("moderation.deny[0] (c.txt line 2): the pattern \"a*\""), "{unbounded}");
    }

    #[test]
    fn settings_that_would_do_nothing_are_refused() {
        let at = |yaml: &str| problems(yaml).into_iter().map(|problem| problem.at).collect::<Vec<_>>();
        assert_eq!(at("moderation"), ["moderation"]);
        assert_eq!(at("moderation: { mask: [email], prompt: off, answer: off }"), ["moderation.answer", "moderation.mask"]);
        assert_eq!(at("moderation: { mask: [email], prompt: deny }"), ["moderation.prompt"]);
        assert_eq!(at("moderation: { mask: [email], with: '' }"), ["moderation.with"]);
        assert_eq!(at("moderation: { mask: [email], with: a@example.com }"), ["moderation.with"]);
        assert_eq!(at("moderation: { mask: [email], deny: [email] }"), ["moderation.mask[0]"]);
        assert_eq!(at("moderation: { mask: [email] }\nmax_held: 100B"), ["max_held"]);
        assert_eq!(at("moderation: { mask: [email] }\nlate: release"), ["late"]);
        let error = serde_saphyr::from_str::<crate::Step>("moderation: { mask: [emial] }").unwrap_err().to_string();
        assert!(error.contains("did you mean `email`?"), "{error}");
    }

    #[test]
    fn a_replacement_of_ones_own_is_shown() {
        check("moderation: { mask: [{ phrase: secret }], with: '[hidden]' }", "a secret", "a [hidden]");
        assert_eq!(ended(MASK, &["a sec", "ret"]).0, "a •••");
    }

    #[test]
    fn the_lists_never_show_in_debug_output() {
        let shown = format!("{:?}", step("moderation: { deny: [{ phrase: hunter2 }, '/hunter[0-9]/'] }"));
        assert!(!shown.contains("hunter"), "{shown}");
    }
}
