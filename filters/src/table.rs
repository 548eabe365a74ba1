//! The table of filters: what a step of a route's chain may be, how it reads in the config, how it becomes a gate.
//!
//! A step is a name (`policy_headers`), or a map with one filter's name and, beside it, terms that differ from the defaults:
//!
//! ```yaml
//! - moderation: { deny: [rules/deny.txt] }
//!   mode: shadow
//!   max_hold: 80ms
//! ```

use std::{borrow::Cow, collections::BTreeMap, fmt, sync::Arc, time::Duration};

use headgate_contracts::Turn;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{
    Deserialize, Deserializer,
    de::{self, DeserializeSeed, MapAccess, Visitor, value::MapDeserializer},
};

use crate::{
    Admit, Chain, Late, Mode, OnFault, Problem, Rule, Terms, Tools, auth, backpressure, budget, cancellation, gate, moderation,
    policy_headers, problem::did_you_mean, rate_limit, trace,
};

/// Settings that become a rule.
pub(crate) trait Settings: de::DeserializeOwned {
    /// Which terms mean something for this filter.
    const TERMS: Fits;

    /// The rule and what it is like. Errors: everything that is wrong with the settings, by its place in them.
    fn build(&self, tools: &Tools<'_>) -> Result<Parts, Vec<Problem>>;
}

/// Which terms fit a filter; the others would be inert and are refused.
#[derive(Clone, Copy)]
pub(crate) struct Fits {
    /// `mode: shadow`.
    pub(crate) shadow: bool,
    /// `max_hold`, `max_held` and `late`.
    pub(crate) hold: bool,
    /// `on_fault: pass`.
    pub(crate) pass: bool,
}

/// What settings become.
pub(crate) struct Parts {
    pub(crate) rule: Arc<dyn Rule>,
    pub(crate) facts: Facts,
    pub(crate) admit: Option<Arc<dyn Admit>>,
}

impl Parts {
    /// A rule that judges no text.
    pub(crate) fn textless(rule: impl Rule + 'static) -> Parts {
        Parts { rule: Arc::new(rule), facts: Facts::default(), admit: None }
    }
}

macro_rules! rules {
    ($($(#[$doc:meta])* $name:literal => $variant:ident($module:ident);)*) => {
        /// A filter's settings, as written.
        #[derive(Debug, Clone, PartialEq)]
        pub enum Spec {
            $($(#[$doc])* $variant(Box<$module::Settings>),)*
        }

        impl Spec {
            /// The names of all filters, in the order of the documentation.
            pub const NAMES: &'static [&'static str] = &[$($name),*];

            /// The filter's name.
            pub fn name(&self) -> &'static str {
                match self { $(Spec::$variant(_) => $name),* }
            }

            fn read<'de, A: MapAccess<'de>>(name: &str, map: &mut A) -> Result<Spec, A::Error> {
                match name {
                    $($name => match map.next_value::<Option<$module::Settings>>()? {
                        Some(settings) => Ok(Spec::$variant(Box::new(settings))),
                        None => Spec::bare(name),
                    },)*
                    _ => Err(unknown_filter(name)),
                }
            }

            /// The filter of that name with nothing set.
            fn bare<E: de::Error>(name: &str) -> Result<Spec, E> {
                let nothing = || MapDeserializer::<_, E>::new(std::iter::empty::<(&str, &str)>());
                match name {
                    $($name => Ok(Spec::$variant(Box::new(Deserialize::deserialize(nothing())?))),)*
                    _ => Err(unknown_filter(name)),
                }
            }

            fn fits(&self) -> Fits {
                match self { $(Spec::$variant(_) => <$module::Settings as Settings>::TERMS),* }
            }

            fn build(&self, tools: &Tools<'_>) -> Result<Parts, Vec<Problem>> {
                match self { $(Spec::$variant(settings) => settings.build(tools)),* }
            }

            fn schemas(generator: &mut SchemaGenerator) -> Vec<(&'static str, Schema)> {
                vec![$(($name, generator.subschema_for::<$module::Settings>())),*]
            }
        }
    };
}

rules! {
    /// Continues or restarts the client's distributed trace.
    "trace" => Trace(trace);
    /// Bounds what may wait for a slow client.
    "backpressure" => Backpressure(backpressure);
    /// Says how long a turn may take and what the client's leaving means.
    "cancellation" => Cancellation(cancellation);
    /// Establishes who asks: API keys, JSON web tokens.
    "auth" => Auth(auth);
    /// Limits requests, output tokens and open streams.
    "rate_limit" => RateLimit(rate_limit);
    /// Refuses and masks phrases, patterns and personal data.
    "moderation" => Moderation(moderation);
    /// Signs what policy decided and names the policy in force.
    "policy_headers" => PolicyHeaders(policy_headers);
    /// Ends an answer that grows past a limit.
    "budget" => Budget(budget);
}

/// What stands in every chain, in this order, before the steps a route names; naming one moves it and sets it.
pub const DEFAULTS: [&str; 3] = ["trace", "backpressure", "cancellation"];

/// The steps with those of [`DEFAULTS`] that are not among them put first.
pub fn with_defaults(steps: Vec<Step>) -> Vec<Step> {
    let mut all: Vec<Step> =
        DEFAULTS.into_iter().filter(|name| steps.iter().all(|step| step.name() != *name)).filter_map(Step::bare).collect();
    all.extend(steps);
    all
}

/// One step of a route's chain, as written: a filter's settings and its gate's terms.
#[derive(Debug, Clone, PartialEq)]
pub struct Step {
    /// The filter and its settings.
    pub spec: Spec,
    /// The terms beside it.
    pub terms: Terms,
}

impl Step {
    /// The filter of that name with nothing set; `None` where there is none, or where it needs settings.
    pub fn bare(name: &str) -> Option<Step> {
        Spec::bare::<de::value::Error>(name).ok().map(|spec| Step { spec, terms: Terms::default() })
    }

    /// The filter's name.
    pub fn name(&self) -> &'static str {
        self.spec.name()
    }

    /// The step, compiled. Errors: everything wrong with it, by its place in the step; what is wrong between steps is found
    /// by [`build_chain`].
    pub fn build(&self, tools: &Tools<'_>) -> Result<Built, Vec<Problem>> {
        let mut problems = self.inert_terms();
        match self.spec.build(tools) {
            Ok(Parts { rule, facts, admit }) => {
                problems.extend(self.contradictions(&facts));
                if problems.is_empty() {
                    return Ok(Built { name: self.name(), terms: self.terms, rule, facts, admit });
                }
            }
            Err(found) => problems.extend(found.into_iter().map(|problem| problem.within(self.name()))),
        }
        Err(problems)
    }

    /// Terms that mean nothing for this filter.
    fn inert_terms(&self) -> Vec<Problem> {
        let (name, terms, fits) = (self.name(), &self.terms, self.spec.fits());
        let mut problems = Vec::new();
        if terms.mode == Mode::Shadow && !fits.shadow {
            let found = format!("`{name}` cannot be shadowed: it judges nothing that could be recorded instead");
            problems.push(Problem::new("mode", found).expected("enforce").remedy(format!("remove `mode`, or remove `{name}`")));
        }
        if terms.on_fault == OnFault::Pass && !fits.pass {
            let found = format!("`{name}` cannot be left out of a turn when it breaks");
            problems.push(Problem::new("on_fault", found).expected("refuse").remedy("remove `on_fault`"));
        }
        if !fits.hold {
            let written =
                [("max_hold", terms.max_hold.is_some()), ("max_held", terms.max_held.is_some()), ("late", terms.late == Late::Release)];
            for (term, _) in written.into_iter().filter(|(_, written)| *written) {
                let found = format!("`{name}` never holds text, so `{term}` would do nothing");
                problems.push(Problem::new(term, found).remedy(format!("remove `{term}`")));
            }
        }
        problems
    }

    /// Terms that contradict each other or what the filter is like.
    fn contradictions(&self, facts: &Facts) -> Vec<Problem> {
        let (terms, mut problems) = (&self.terms, Vec::new());
        if !self.spec.fits().hold {
            return problems;
        }
        if terms.late == Late::Release && terms.max_hold.is_none() {
            problems.push(
                Problem::new("late", "`release` without `max_hold`: text is never late")
                    .expected("`late: release` beside a `max_hold`")
                    .remedy("set `max_hold`, e.g. `80ms`, or remove `late`"),
            );
        }
        if terms.max_hold.is_some_and(|span| span.0.is_zero()) {
            problems.push(
                Problem::new("max_hold", "`0ms`: text that has to wait at all would be late at once")
                    .expected("a duration above 0")
                    .remedy("remove `max_hold`, or set it to what a reader does not notice, e.g. `80ms`"),
            );
        }
        if terms.max_held() < facts.worst_hold_bytes {
            problems.push(
                Problem::new("max_held", format!("{}B, but a match may need {}B", terms.max_held(), facts.worst_hold_bytes))
                    .expected(format!("at least {}B", facts.worst_hold_bytes))
                    .remedy("raise `max_held`, or shorten the longest pattern"),
            );
        }
        problems
    }
}

/// What a filter is like, once its settings are known.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Facts {
    /// It is shown the answer's text.
    pub judges_text: bool,
    /// It may hold text back.
    pub holds_text: bool,
    /// The most text it ever has to hold of one lane, in bytes, whatever the terms say.
    pub worst_hold_bytes: u64,
    /// It may replace text.
    pub masks: bool,
    /// It may end an answer.
    pub cuts: bool,
}

/// A step, compiled: shared by all turns of a route.
#[derive(Clone)]
pub struct Built {
    /// The filter's name.
    pub name: &'static str,
    /// Its gate's terms.
    pub terms: Terms,
    /// Starts it for a turn.
    pub rule: Arc<dyn Rule>,
    /// What it is like.
    pub facts: Facts,
    /// Checks a credential at the door, where the filter can.
    pub admit: Option<Arc<dyn Admit>>,
}

impl Built {
    /// The longest this step can delay text: `None` where only the end of a match in the making ends the wait.
    pub fn worst_delay(&self) -> Option<Duration> {
        if self.facts.holds_text && self.terms.mode == Mode::Enforce { self.terms.max_hold() } else { Some(Duration::ZERO) }
    }

    /// The most text of one turn that may wait here, in bytes.
    pub fn worst_held_bytes(&self) -> u64 {
        if self.facts.holds_text && self.terms.mode == Mode::Enforce { self.terms.max_held() } else { 0 }
    }

    /// The most memory this step takes for one turn, in bytes, beside one event of the largest size the upstream may send: its
    /// gate's buffers, and what a match in the making costs. 0 where nothing is ever held.
    pub fn ceiling_bytes(&self) -> u64 {
        if self.worst_held_bytes() == 0 {
            return 0;
        }
        // A few dozen bytes for each character of a match, and a character has up to four bytes.
        let forming = 8 * self.facts.worst_hold_bytes;
        gate::ceiling_bytes(&self.terms).saturating_add(forming)
    }

    /// The most text in one wait that may leave unjudged, in bytes: above 0 only where the config says `late: release`.
    pub fn worst_unverified_bytes(&self) -> u64 {
        match self.terms.late {
            Late::Release => self.worst_held_bytes(),
            Late::Refuse => 0,
        }
    }
}

impl fmt::Debug for Built {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Built { name, terms, facts, .. } = self;
        f.debug_struct("Built").field("name", name).field("terms", terms).field("facts", facts).finish_non_exhaustive()
    }
}

/// The gates of one turn: each rule starts its filter, and may set the turn's flow.
pub fn chain(built: &[Built], turn: &mut Turn) -> Chain {
    let gates = built.iter().filter(|step| step.facts.judges_text).count();
    let mut chain = Chain::with_room(gates, built.len() - gates);
    for step in built {
        chain.add(step.name, step.rule.start(turn), &step.terms, step.facts.judges_text);
    }
    chain
}

/// A whole chain, compiled: the steps as written and the defaults among them.
///
/// Errors: everything wrong with each step and between them, by its place in `steps`, e.g. `[2].moderation.mask[0]`.
pub fn build_chain(steps: &[Step], tools: &Tools<'_>) -> Result<Vec<Built>, Vec<Problem>> {
    let mut problems = Vec::new();
    for (index, step) in steps.iter().enumerate() {
        if let Err(found) = step.build(tools) {
            problems.extend(found.into_iter().map(|problem| problem.within(&format!("[{index}]"))));
        }
    }
    problems.extend(misplaced(steps));
    if !problems.is_empty() {
        return Err(problems);
    }
    with_defaults(steps.to_vec()).iter().map(|step| step.build(tools)).collect()
}

/// Steps that stand twice, or where they cannot do what they say.
fn misplaced(steps: &[Step]) -> Vec<Problem> {
    let mut problems = Vec::new();
    let mut first = BTreeMap::new();
    for (index, step) in steps.iter().enumerate() {
        let (at, name) = (format!("[{index}].{}", step.name()), step.name());
        let before = first.entry(name).or_insert(index);
        // Several limits, moderations and budgets add up; of the others a second one would undo or repeat the first.
        let adds_up = matches!(step.spec, Spec::RateLimit(_) | Spec::Moderation(_) | Spec::Budget(_));
        if *before != index && !adds_up {
            problems.push(Problem::new(&at, format!("`{name}` stands at [{before}] already")).remedy("remove one of the two"));
        }
        let Some(auth) = steps.iter().position(|step| matches!(step.spec, Spec::Auth(_))) else { continue };
        let harm = match step.spec {
            Spec::RateLimit(_) => "all clients would share one limit",
            Spec::PolicyHeaders(_) => "answers would be signed for nobody",
            _ => continue,
        };
        if index < auth {
            problems.push(
                Problem::new(at, format!("`{name}` stands before `auth` at [{auth}], so {harm}"))
                    .expected("`auth` first")
                    .remedy(format!("move `{name}` below `auth`")),
            );
        }
    }
    problems
}

const TERMS: [&str; 5] = ["mode", "max_hold", "max_held", "late", "on_fault"];

fn unknown_filter<E: de::Error>(name: &str) -> E {
    let near = did_you_mean(name, Spec::NAMES.iter().copied());
    E::custom(format_args!("unknown filter `{name}`{near}; filters: {}", Spec::NAMES.join(", ")))
}

/// The next key of a step's map, where it may stand after those seen. It is refused while it is read, so that a format that
/// keeps positions points at the key and not at the step.
struct Key<'a> {
    seen: &'a [&'static str],
}

impl<'de> DeserializeSeed<'de> for Key<'_> {
    type Value = &'static str;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<&'static str, D::Error> {
        let name = Cow::<'de, str>::deserialize(from)?;
        let Some(known) = Spec::NAMES.iter().chain(&TERMS).find(|known| **known == name).copied() else {
            let near = did_you_mean(&name, Spec::NAMES.iter().chain(&TERMS).copied());
            let (filters, terms) = (Spec::NAMES.join(", "), TERMS.join(", "));
            return Err(de::Error::custom(format_args!("unknown filter or term `{name}`{near}; filters: {filters}; terms: {terms}")));
        };
        if self.seen.contains(&known) {
            return Err(de::Error::custom(format_args!("`{known}` stands twice in one step")));
        }
        let first = self.seen.iter().find(|seen| Spec::NAMES.contains(seen));
        match first.filter(|_| Spec::NAMES.contains(&known)) {
            Some(first) => {
                Err(de::Error::custom(format_args!("`{first}` and `{known}` in one step; begin `{known}` with a dash of its own")))
            }
            None => Ok(known),
        }
    }
}

impl<'de> Deserialize<'de> for Step {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Step, D::Error> {
        struct Steps;

        impl<'de> Visitor<'de> for Steps {
            type Value = Step;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a filter's name, or a map of one filter's name to its settings with terms beside it")
            }

            fn visit_str<E: de::Error>(self, name: &str) -> Result<Step, E> {
                Ok(Step { spec: Spec::bare(name)?, terms: Terms::default() })
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Step, A::Error> {
                let (mut spec, mut terms, mut seen) = (None::<Spec>, Terms::default(), Vec::new());
                while let Some(key) = map.next_key_seed(Key { seen: &seen })? {
                    seen.push(key);
                    match key {
                        "mode" => terms.mode = map.next_value()?,
                        "max_hold" => terms.max_hold = map.next_value()?,
                        "max_held" => terms.max_held = map.next_value()?,
                        "late" => terms.late = map.next_value()?,
                        "on_fault" => terms.on_fault = map.next_value()?,
                        name => spec = Some(Spec::read(name, &mut map)?),
                    }
                }
                let spec =
                    spec.ok_or_else(|| de::Error::custom(format_args!("a step without a filter; filters: {}", Spec::NAMES.join(", "))))?;
                Ok(Step { spec, terms })
            }
        }

        from.deserialize_any(Steps)
    }
}

impl JsonSchema for Step {
    fn schema_name() -> Cow<'static, str> {
        "Step".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let terms = Terms::json_schema(generator);
        let terms = terms.get("properties").and_then(|terms| terms.as_object()).cloned().unwrap_or_default();
        let mut forms = vec![json_schema!({ "enum": Spec::NAMES, "description": "a filter with nothing set" })];
        for (name, settings) in Spec::schemas(generator) {
            let mut properties = terms.clone();
            properties.insert(name.to_owned(), settings.into());
            forms.push(json_schema!({
                "type": "object", "properties": properties, "required": [name], "additionalProperties": false
            }));
        }
        json_schema!({ "anyOf": forms })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{problems, step, turn};

    const DENY: &str = "moderation: { deny: [{ phrase: bomb }] }";

    fn refused(yaml: &str) -> String {
        serde_saphyr::from_str::<Vec<Step>>(yaml).expect_err(yaml).to_string()
    }

    #[test]
    fn a_step_is_a_name_or_a_map_with_terms_beside_it_in_any_order() {
        for yaml in ["budget: { output_tokens: 5 }\nmode: shadow", "mode: shadow\nbudget: { output_tokens: 5 }"] {
            let step = step(yaml);
            assert_eq!((step.name(), step.terms.mode), ("budget", Mode::Shadow));
        }
        let terms = step(&format!("{DENY}\nmax_hold: 80ms\nmax_held: 32KiB\nlate: release\non_fault: pass")).terms;
        assert_eq!(terms.max_hold(), Some(Duration::from_millis(80)));
        assert_eq!((terms.max_held(), terms.late, terms.on_fault), (32 << 10, Late::Release, OnFault::Pass));
        for yaml in ["policy_headers", "policy_headers:", "policy_headers: {}"] {
            assert_eq!(step(yaml).name(), "policy_headers");
        }
    }

    #[test]
    fn faults_of_form_point_at_their_line_and_column() {
        for (yaml, line, column, words) in [
            ("- trace\n- moderatoin: {}", 2, 3, "did you mean `moderation`?"),
            ("- trace\n- polcy_headers", 2, 3, "did you mean `policy_headers`?"),
            ("- budget: { output_tokens: 5 }\n  max_hol: 5s", 2, 3, "did you mean `max_hold`?"),
            ("- budget:\n    output_tokens: 5\n    output_byte: 5", 3, 5, "output_byte"),
            ("- budget:\n    output_tokens: many", 2, 20, "many"),
            ("- cancellation: { deadline: 10 }", 1, 29, "`10` is not a duration"),
            ("- auth: { jwks: x }\n  mode: shadowy", 2, 9, "shadowy"),
            ("- moderation:\n    deny: [rules/a.txt]\n    mask: [emial]", 3, 12, "did you mean `email`?"),
            ("- rate_limit: { requests: 60/min }\n  budget: { output_tokens: 5 }", 2, 3, "`rate_limit` and `budget` in one step"),
            ("- mode: shadow", 1, 3, "a step without a filter"),
        ] {
            let error = serde_saphyr::from_str::<Vec<Step>>(yaml).expect_err(yaml);
            let place = error.location().map(|at| (at.line(), at.column()));
            assert!(error.to_string().contains(words), "{yaml}: {error}");
            assert_eq!(place, Some((line, column)), "{yaml}: {error}");
        }
        assert!(refused("- nonsense").contains("filters: trace, backpressure"));
        assert!(refused("- 17").contains("a filter's name"));
    }

    #[test]
    fn steps_read_from_json_too() {
        let step: Step = serde_json::from_str(r#"{"budget":{"output_tokens":5},"mode":"shadow"}"#).unwrap();
        assert_eq!(step, self::step("budget: { output_tokens: 5 }\nmode: shadow"));
        assert!(serde_json::from_str::<Step>(r#"{"budget":{"output_tokens":5},"budget":{"output_tokens":6}}"#).is_err());
    }

    #[test]
    fn terms_that_would_do_nothing_or_contradict_each_other_are_refused() {
        let at = |yaml: &str| problems(yaml).into_iter().map(|problem| problem.at).collect::<Vec<_>>();
        assert_eq!(at("trace: {}\nmode: shadow\non_fault: pass\nmax_hold: 5ms"), ["mode", "on_fault", "max_hold"]);
        assert_eq!(at("budget: { output_tokens: 5 }\nlate: release\nmax_held: 5B"), ["max_held", "late"]);
        assert_eq!(at(&format!("{DENY}\nlate: release")), ["late"]);
        assert_eq!(at(&format!("{DENY}\nmax_hold: 0s\nmax_held: 1B")), ["max_hold", "max_held"]);
    }

    #[test]
    fn the_defaults_stand_in_every_chain_once() {
        let names = |yaml: &str| {
            let steps: Vec<Step> = serde_saphyr::from_str(yaml).unwrap();
            with_defaults(steps).iter().map(Step::name).collect::<Vec<_>>()
        };
        assert_eq!(names("[]"), DEFAULTS);
        assert_eq!(names("- budget: { output_tokens: 5 }\n- trace"), ["backpressure", "cancellation", "budget", "trace"]);
    }

    fn build(yaml: &str) -> Result<Vec<Built>, Vec<String>> {
        let steps: Vec<Step> = serde_saphyr::from_str(yaml).unwrap();
        build_chain(&steps, &Tools::none()).map_err(|problems| problems.iter().map(Problem::to_string).collect())
    }

    #[test]
    fn a_chain_tells_all_its_problems_at_once_by_their_places() {
        let problems = build("- budget\n- rate_limit: { streams: 0 }\n  mode: shadow\n- trace\n- trace\n- auth").unwrap_err();
        let places: Vec<_> = problems.iter().map(|problem| problem.split(": ").next().unwrap()).collect();
        assert_eq!(places, ["[0].budget", "[1].rate_limit.streams", "[4].auth", "[1].rate_limit", "[3].trace"]);
    }

    #[test]
    fn a_built_chain_knows_its_worst_delay_and_its_worst_unverified_bytes() {
        let built = build(&format!("- {DENY}\n  max_hold: 80ms\n  late: release\n- budget: {{ output_tokens: 5 }}")).unwrap();
        let facts: Vec<_> = built.iter().map(|b| (b.name, b.worst_delay(), b.worst_unverified_bytes())).collect();
        let none = Some(Duration::ZERO);
        assert_eq!(
            facts,
            [
                ("trace", none, 0),
                ("backpressure", none, 0),
                ("cancellation", none, 0),
                ("moderation", Some(Duration::from_millis(80)), 64 << 10),
                ("budget", none, 0),
            ]
        );
        let strict = build(&format!("- {DENY}")).unwrap();
        assert_eq!((strict[3].worst_delay(), strict[3].worst_unverified_bytes()), (None, 0));
        let mut chain = chain(&strict, &mut turn());
        assert_eq!(chain.posts().map(|post| post.name).collect::<Vec<_>>(), ["trace", "backpressure", "cancellation", "moderation"]);
    }

    #[test]
    fn the_schema_knows_every_filter_and_every_term() {
        let schema = serde_json::to_string(&schemars::schema_for!(Vec<Step>)).unwrap();
        for word in Spec::NAMES.iter().chain(&TERMS) {
            assert!(schema.contains(&format!("\"{word}\"")), "{word}");
        }
    }
}
