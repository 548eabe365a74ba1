//! Signs what policy decided, once per dispatch and once per answer, and names the policy in force to both sides.
//!
//! A verdict claims: this tenant, session and turn; these exact bytes; this decision, by this policy and constitution. It is
//! signed when the bytes are known, so a retry is a dispatch of its own with a verdict of its own.

use std::sync::Arc;

use headgate_contracts::{Category, Code, Dispatch, Fault, Finding, Head, Outcome, OutputSeal, Prompt, Record, Seal, Stage, Stop, Turn};
use headgate_policy::{Decision, Digest, Facts as Claimed};
use http::{HeaderMap, HeaderName, HeaderValue};
use schemars::JsonSchema;
use serde::Deserialize;

use crate::{
    BoxFuture, Filter, PolicyInForce, Problem, Rule, Tools,
    table::{self, Fits, Parts},
};

/// The signed verdict, as a compact JWS.
pub const POLICY_VERDICT: HeaderName = HeaderName::from_static("policy-verdict");
/// The version of the policy in force.
pub const POLICY_VERSION: HeaderName = HeaderName::from_static("policy-version");
/// The hash of the constitution in force.
pub const CONSTITUTION_HASH: HeaderName = HeaderName::from_static("constitution-hash");
/// The digest of the body (RFC 9530).
pub const CONTENT_DIGEST: HeaderName = HeaderName::from_static("content-digest");

/// Deletes what only this gateway may say: `policy-*`, `constitution-*`, `content-digest`, `x-gw-*`, `x-headgate-*`, also
/// with `x-` before them and with `_` for `-`. For the headers and trailers of every request, before anything reads them.
///
/// Gives how many fields were there: a client that sends any has something in mind.
pub fn strip_forged(headers: &mut HeaderMap) -> usize {
    // Names in a HeaderMap are lower case already.
    let forged: Vec<HeaderName> = headers.keys().filter(|name| is_forged(name.as_str())).cloned().collect();
    forged.iter().map(|name| {
        let fields = headers.get_all(name).iter().count();
        headers.remove(name);
        fields
    }).sum()
}

fn is_forged(name: &str) -> bool {
    // Some servers read `_` as `-`, as CGI did.
    let name = name.replace('_', "-");
    let plain = name.strip_prefix("x-").unwrap_or(&name);
    let ours = ["policy-", "constitution-"].iter().any(|prefix| plain.starts_with(prefix));
    ours || plain == "content-digest" || name.starts_with("x-gw-") || name.starts_with("x-headgate-")
}

/// Settings of `policy_headers`: there are none. The version, the constitution and the keys stand in the section `policy`.
#[derive(Debug, Clone, PartialEq, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(rename = "PolicyHeadersSettings")]
pub struct Settings {}

impl table::Settings for Settings {
    const TERMS: Fits = Fits { shadow: false, hold: false, pass: false };

    fn build(&self, tools: &Tools<'_>) -> Result<Parts, Vec<Problem>> {
        let unusable = |found: String| {
            vec![
                Problem::new("", found)
                    .expected("a section `policy` with a constitution and a version")
                    .remedy("write e.g. `policy: { constitution: constitution.md, version: 2026-11-21 }`"),
            ]
        };
        let policy = tools.policy.clone().ok_or_else(|| unusable("there is no policy in force to speak of".into()))?;
        let version = HeaderValue::from_str(&policy.issuer.pol.ver)
            .map_err(|_| unusable(format!("the policy version {:?} cannot stand in a header", policy.issuer.pol.ver)))?;
        let constitution = HeaderValue::from_str(&policy.issuer.con.to_string())
            .map_err(|_| unusable("the constitution's hash cannot stand in a header".into()))?;
        let (signing, now, versions) = (policy.clone(), tools.now, (version.clone(), constitution.clone()));
        let seal: Seal = Arc::new(move |prompt, dispatch| sign_dispatch(&signing, prompt, dispatch, now(), &versions));
        Ok(Parts::textless(PolicyHeaders { policy, version, constitution, seal, now }))
    }
}

#[derive(Clone)]
struct PolicyHeaders {
    policy: PolicyInForce,
    version: HeaderValue,
    constitution: HeaderValue,
    seal: Seal,
    now: fn() -> u64,
}

/// What an outcome is called in a verdict.
fn decision(outcome: Outcome) -> Decision {
    match outcome {
        Outcome::Allowed => Decision::Allow,
        Outcome::Flagged => Decision::Flag,
        Outcome::Masked => Decision::Redact,
        Outcome::Blocked => Decision::Deny,
    }
}

/// The categories of some findings, each once, in the order of the documentation.
fn categories<'a>(findings: impl Iterator<Item = &'a Finding>) -> Vec<&'static str> {
    let mut all: Vec<Category> = findings.map(|finding| finding.category).collect();
    all.sort_unstable();
    all.dedup();
    all.into_iter().map(Category::as_str).collect()
}

/// The headers that prove a dispatch. Errors: nothing is sent without a verdict.
fn sign_dispatch(
    policy: &PolicyInForce,
    prompt: &Prompt,
    dispatch: &Dispatch<'_>,
    now: u64,
    (version, constitution): &(HeaderValue, HeaderValue),
) -> Result<HeaderMap, Fault> {
    let digest = Digest::of(dispatch.body);
    let (turn, trace) = (prompt.turn.to_string(), prompt.trace.trace_id_hex());
    let facts = Claimed {
        tid: prompt.principal.tenant.as_str(),
        sub: prompt.principal.subject.as_str(),
        sid: prompt.session.as_str(),
        turn: &turn,
        dec: decision(prompt.outcome),
        cat: &categories(prompt.findings.iter()),
        trc: Some(&trace),
    };
    let claims = policy.issuer.dispatch(&facts, dispatch.method, dispatch.path, digest, now);
    let verdict = claims.and_then(|claims| policy.signer.sign(&claims));
    let verdict = verdict.map_err(|error| Fault::us(Code::InternalError).caused_by(error))?;
    let value = |text: String| HeaderValue::try_from(text).map_err(|error| Fault::us(Code::InternalError).caused_by(error));
    let mut headers = HeaderMap::with_capacity(4);
    headers.insert(POLICY_VERDICT, value(verdict)?);
    headers.insert(POLICY_VERSION, version.clone());
    headers.insert(CONSTITUTION_HASH, constitution.clone());
    headers.insert(CONTENT_DIGEST, value(digest.to_string())?);
    Ok(headers)
}

impl Rule for PolicyHeaders {
    fn start(&self, _: &mut Turn) -> Box<dyn Filter> {
        Box::new(Signs { policy: self.clone(), turn: None })
    }
}

struct Signs {
    policy: PolicyHeaders,
    /// The facts of the turn that the output's verdict will claim.
    turn: Option<Claimant>,
}

/// Who a verdict is about.
struct Claimant {
    tenant: String,
    subject: String,
    session: String,
    turn: String,
    trace: String,
}

impl Filter for Signs {
    fn prompt<'a>(&'a mut self, prompt: &'a mut Prompt) -> BoxFuture<'a, Result<(), Stop>> {
        prompt.seal = Some(self.policy.seal.clone());
        self.turn = Some(Claimant {
            tenant: prompt.principal.tenant.to_string(),
            subject: prompt.principal.subject.to_string(),
            session: prompt.session.to_string(),
            turn: prompt.turn.to_string(),
            trace: prompt.trace.trace_id_hex(),
        });
        Box::pin(std::future::ready(Ok(())))
    }

    fn head(&mut self, head: &mut Head) -> Result<(), Stop> {
        head.headers.insert(POLICY_VERSION, self.policy.version.clone());
        head.headers.insert(CONSTITUTION_HASH, self.policy.constitution.clone());
        Ok(())
    }

    fn end(&mut self, record: &mut Record) {
        let Some(who) = self.turn.take() else { return };
        let (policy, now) = (self.policy.policy.clone(), self.policy.now);
        let seal: OutputSeal = Arc::new(move |record, emitted| {
            let facts = Claimed {
                tid: &who.tenant,
                sub: &who.subject,
                sid: &who.session,
                turn: &who.turn,
                dec: decision(record.outcome),
                cat: &categories(record.findings.iter().filter(|finding| finding.stage != Stage::Input)),
                trc: Some(&who.trace),
            };
            let signed = policy.issuer.output(&facts, Digest::from(emitted), now()).and_then(|claims| policy.signer.sign(&claims));
            // The text has gone: an answer without a verdict is what an auditor will ask about.
            signed.map_err(|error| tracing::error!(turn_id = who.turn, %error, "output verdict not signed")).ok()
        });
        record.seal = Some(seal);
    }
}
