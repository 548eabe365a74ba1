//! What a filter found, in words that can be counted and shown; never the matched text.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

macro_rules! categories {
    ($($variant:ident $name:literal $ailuminate:expr, $llama_guard:expr;)*) => {
        /// Why text was refused, masked or flagged. The first fourteen map one to one to MLCommons AILuminate hazards and
        /// Llama Guard S1 to S14; the rest are OWASP LLM Top 10 (2026) risks and the tenant's own rules.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, schemars::JsonSchema)]
        #[serde(rename_all = "snake_case")]
        #[allow(missing_docs, reason = "the names are the words on the wire")]
        pub enum Category { $($variant,)* }

        impl Category {
            /// Every category.
            pub const ALL: &'static [Category] = &[$(Category::$variant),*];
            /// The word on the wire.
            pub fn as_str(self) -> &'static str { match self { $(Category::$variant => $name),* } }
            /// The MLCommons AILuminate hazard, where there is one.
            pub fn ailuminate(self) -> Option<&'static str> { match self { $(Category::$variant => $ailuminate),* } }
            /// The Llama Guard 3 and 4 category, where there is one.
            pub fn llama_guard(self) -> Option<&'static str> { match self { $(Category::$variant => $llama_guard),* } }
        }
    };
}

categories! {
    ViolentCrimes "violent_crimes" Some("vcr"), Some("S1");
    NonViolentCrimes "non_violent_crimes" Some("ncr"), Some("S2");
    SexRelatedCrimes "sex_related_crimes" Some("src"), Some("S3");
    ChildSexualExploitation "child_sexual_exploitation" Some("cse"), Some("S4");
    Defamation "defamation" Some("dfm"), Some("S5");
    SpecializedAdvice "specialized_advice" Some("spc"), Some("S6");
    Privacy "privacy" Some("prv"), Some("S7");
    IntellectualProperty "intellectual_property" Some("ipv"), Some("S8");
    IndiscriminateWeapons "indiscriminate_weapons" Some("iwp"), Some("S9");
    Hate "hate" Some("hte"), Some("S10");
    SuicideSelfHarm "suicide_self_harm" Some("ssh"), Some("S11");
    SexualContent "sexual_content" Some("sxc_prn"), Some("S12");
    Elections "elections" Some("spc_ele"), Some("S13");
    CodeInterpreterAbuse "code_interpreter_abuse" None, Some("S14");
    PromptInjection "prompt_injection" None, None;
    Jailbreak "jailbreak" None, None;
    Pii "pii" None, None;
    Secrets "secrets" None, None;
    ExcessiveAgency "excessive_agency" None, None;
    UnboundedConsumption "unbounded_consumption" None, None;
    HiddenContextExposure "hidden_context_exposure" None, None;
    UnsafeOutput "unsafe_output" None, None;
    TenantPolicy "tenant_policy" None, None;
    ConstitutionClause "constitution_clause" None, None;
}

impl Category {
    /// The category of that name.
    pub fn from_name(name: &str) -> Option<Category> {
        Category::ALL.iter().copied().find(|category| category.as_str() == name)
    }
}

/// Who found it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs, reason = "the names are the words on the wire")]
pub enum Source {
    Rule,
    Model,
    Human,
}

/// Where in the turn it was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs, reason = "the names are the words on the wire")]
pub enum Stage {
    Input,
    Output,
    Tool,
}

/// One hit of a filter.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Finding {
    /// Why.
    pub category: Category,
    /// Who found it.
    pub source: Source,
    /// Where.
    pub stage: Stage,
    /// 0 to 1; a rule that matched exactly says 1.
    pub score: f32,
    /// The rule's name as configured, e.g. `moderation.mask.email`; never the matched text.
    pub rule: Arc<str>,
}
