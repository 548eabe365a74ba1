//! Signs what policy decided, once per dispatch and once per answer, and names the policy in force to both sides.
//!
//! A verdict claims: this tenant, session and turn; these exact bytes; this decision, by this policy and constitution. It is
//! signed when the bytes are known, so a retry is a dispatch of its own with a verdict of its own.

use std::{borrow::Cow, sync::Arc, time::Duration};

use headgate_contracts::{
    Category, Code, Dispatch, Fault, Finding, Head, Outcome, OutputSeal, Prompt, Record, Seal, SessionId, Stage, Stop, Subject, TenantId,
    Trace, Turn, TurnId,
};
use headgate_policy::{Claims, Decision, Digest, Facts as Claimed, Issuer, Registry, Standing};
use http::{HeaderMap, HeaderName, HeaderValue};
use schemars::JsonSchema;
use serde::Deserialize;

use crate::{
    BoxFuture, Filter, Modes, PolicyInForce, Problem, Rule, Tools,
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

/// When to try again while the registry is away: it is asked once a second.
const TRY_AGAIN: Duration = Duration::from_secs(1);

/// Deletes what only this gateway may say: `policy-*`, `constitution-*`, `content-digest`, `x-gw-*`, `x-headgate-*`, also
/// with `x-` before them and with `_` for `-`. For the headers and trailers of every request, before anything reads them.
///
/// Gives how many fields were there: a client that sends any has something in mind.
pub fn strip_forged(headers: &mut HeaderMap) -> usize {
    // Names in a HeaderMap are lower case already.
    let forged: Vec<HeaderName> = headers.keys().filter(|name| is_forged(name.as_str())).cloned().collect();
    forged
        .iter()
        .map(|name| {
            let fields = headers.get_all(name).iter().count();
            headers.remove(name);
            fields
        })
        .sum()
}

fn is_forged(name: &str) -> bool {
    // Some servers read `_` as `-`, as CGI did.
    let name = if name.contains('_') { Cow::Owned(name.replace('_', "-")) } else { Cow::Borrowed(name) };
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
        let seal = seal(policy.clone(), None, tools.now, (version.clone(), constitution.clone()));
        let (registry, modes) = (tools.registry.clone(), tools.modes.clone());
        let rule = PolicyHeaders { policy, registry, modes, version, constitution, seal, now: tools.now };
        Ok(Parts::textless(SignsAll(Arc::new(rule))))
    }
}

struct PolicyHeaders {
    policy: PolicyInForce,
    registry: Option<Arc<dyn Registry>>,
    modes: Option<Arc<dyn Modes>>,
    version: HeaderValue,
    constitution: HeaderValue,
    seal: Seal,
    now: fn() -> u64,
}

impl PolicyHeaders {
    /// Errors: what is signed now would be believed by nobody who asks the registry.
    fn in_force(&self, tenant: &str) -> Result<(), Fault> {
        let (Some(registry), Issuer { pol, con, .. }) = (&self.registry, &self.policy.issuer) else { return Ok(()) };
        match registry.check(tenant, &pol.ver, *con, (self.now)()) {
            Ok(Standing::Active | Standing::Previous) => Ok(()),
            Ok(Standing::OtherVersion | Standing::Unknown) => Err(Fault::us(Code::VersionConflict)),
            Err(unavailable) => Err(Fault::us(Code::PolicyRegistryUnavailable).after(TRY_AGAIN).caused_by(unavailable)),
        }
    }
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

fn in_mode(claims: Claims<&str>, fence: Option<u64>) -> Claims<&str> {
    match fence {
        Some(fence) => claims.in_training(fence),
        None => claims,
    }
}

/// What signs dispatches, in the mode that their turn began in: under a lock that is over by then, nobody believes it.
fn seal(policy: PolicyInForce, fence: Option<u64>, now: fn() -> u64, versions: (HeaderValue, HeaderValue)) -> Seal {
    Arc::new(move |prompt, dispatch| sign_dispatch(&policy, prompt, dispatch, fence, now(), &versions))
}

/// The headers that prove a dispatch. Errors: nothing is sent without a verdict.
fn sign_dispatch(
    policy: &PolicyInForce,
    prompt: &Prompt,
    dispatch: &Dispatch<'_>,
    fence: Option<u64>,
    now: u64,
    (version, constitution): &(HeaderValue, HeaderValue),
) -> Result<HeaderMap, Fault> {
    let digest = Digest::of(dispatch.body);
    let (mut turn, mut trace) = ([0; 45], [0; 32]);
    let facts = Claimed {
        tid: prompt.principal.tenant.as_str(),
        sub: prompt.principal.subject.as_str(),
        sid: prompt.session.as_str(),
        turn: prompt.turn.text(&mut turn),
        dec: decision(prompt.outcome),
        cat: &categories(prompt.findings.iter()),
        trc: Some(Trace::hex(prompt.trace.trace_id, &mut trace)),
    };
    let claims = policy.issuer.dispatch(&facts, dispatch.method, dispatch.path, digest, now);
    let verdict = claims.and_then(|claims| policy.signer.sign(&in_mode(claims, fence)));
    let verdict = verdict.map_err(|error| Fault::us(Code::InternalError).caused_by(error))?;
    let broken = |error: http::header::InvalidHeaderValue| Fault::us(Code::InternalError).caused_by(error);
    let mut headers = HeaderMap::with_capacity(4);
    headers.insert(POLICY_VERDICT, HeaderValue::try_from(verdict).map_err(broken)?);
    headers.insert(POLICY_VERSION, version.clone());
    headers.insert(CONSTITUTION_HASH, constitution.clone());
    headers.insert(CONTENT_DIGEST, HeaderValue::from_bytes(&digest.text()).map_err(broken)?);
    Ok(headers)
}

struct SignsAll(Arc<PolicyHeaders>);

impl Rule for SignsAll {
    fn start(&self, _: &mut Turn) -> Box<dyn Filter> {
        Box::new(Signs { policy: self.0.clone(), turn: None })
    }
}

/// Signs for one turn.
struct Signs {
    policy: Arc<PolicyHeaders>,
    /// The facts of the turn that the output's verdict will claim.
    turn: Option<Claimant>,
}

/// Who a verdict is about.
struct Claimant {
    tenant: TenantId,
    subject: Subject,
    session: SessionId,
    turn: TurnId,
    trace_id: [u8; 16],
    fence: Option<u64>,
}

impl Filter for Signs {
    fn prompt<'a>(&'a mut self, prompt: &'a mut Prompt) -> BoxFuture<'a, Result<(), Stop>> {
        if let Err(fault) = self.policy.in_force(prompt.principal.tenant.as_str()) {
            return Box::pin(std::future::ready(Err(fault.into())));
        }
        let policy = &self.policy;
        let fence = match policy.modes.as_ref().map_or(Ok(None), |modes| modes.fence(prompt.principal.tenant.as_str())) {
            Ok(fence) => fence,
            Err(fault) => return Box::pin(std::future::ready(Err(fault.into()))),
        };
        prompt.seal = Some(match fence {
            None => policy.seal.clone(),
            fenced => seal(policy.policy.clone(), fenced, policy.now, (policy.version.clone(), policy.constitution.clone())),
        });
        self.turn = Some(Claimant {
            fence,
            tenant: prompt.principal.tenant.clone(),
            subject: prompt.principal.subject.clone(),
            session: prompt.session.clone(),
            turn: prompt.turn,
            trace_id: prompt.trace.trace_id,
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
        let rule = self.policy.clone();
        let seal: OutputSeal = Arc::new(move |record, emitted| {
            let PolicyHeaders { policy, now, .. } = &*rule;
            let (mut turn, mut trace) = ([0; 45], [0; 32]);
            let facts = Claimed {
                tid: who.tenant.as_str(),
                sub: who.subject.as_str(),
                sid: who.session.as_str(),
                turn: who.turn.text(&mut turn),
                dec: decision(record.outcome),
                cat: &categories(record.findings.iter().filter(|finding| finding.stage != Stage::Input)),
                trc: Some(Trace::hex(who.trace_id, &mut trace)),
            };
            let signed = policy
                .issuer
                .output(&facts, Digest::from(emitted), now())
                .and_then(|claims| policy.signer.sign(&in_mode(claims, who.fence)));
            // The text has gone: an answer without a verdict is what an auditor will ask about.
            signed.map_err(|error| tracing::error!(turn_id = %who.turn, %error, "output verdict not signed")).ok()
        });
        record.seal = Some(seal);
    }
}

#[cfg(test)]
mod tests {
    use headgate_contracts::{Batch, Source};
    use headgate_policy::{
        ANY_TENANT, AUDIT, Constitution, Direction, Entry, Expect, Issuer, LEEWAY, Memory, ORCHESTRATOR, Policy, Rejected, Replays, Ring,
        Unavailable,
    };

    use super::*;
    use crate::{
        Chain,
        testing::{built_with, problems, prompt, turn},
    };

    const NOW: u64 = 1_800_000_000;

    fn policy() -> (PolicyInForce, Arc<Ring>) {
        let ring = Arc::new(Ring::generate(NOW).unwrap());
        let con = Constitution::from_markdown("1. Be kind.").unwrap().hash();
        let issuer = Issuer { iss: "headgate".into(), pol: Policy { id: "default".into(), ver: "2026-11-21".into() }, con };
        (PolicyInForce { signer: ring.clone(), issuer }, ring)
    }

    fn chain(policy: &PolicyInForce) -> Chain {
        let tools = Tools { policy: Some(policy.clone()), now: || NOW, ..Tools::none() };
        crate::chain(&[built_with("policy_headers", &tools)], &mut turn())
    }

    fn finding(category: Category, stage: Stage) -> Finding {
        Finding { category, source: Source::Rule, stage, score: 1.0, rule: "r".into() }
    }

    #[tokio::test]
    async fn a_dispatch_is_signed_over_its_exact_bytes_and_accepted_once() {
        let (policy, ring) = policy();
        let mut prompt = prompt("hello");
        prompt.principal.tenant = "acme".parse::<TenantId>().unwrap();
        prompt.principal.subject = "u1".parse::<Subject>().unwrap();
        prompt.outcome = Outcome::Masked;
        prompt.findings = vec![finding(Category::Pii, Stage::Input); 3];
        chain(&policy).prompt(&mut prompt).await.unwrap();
        let seal = prompt.seal.clone().unwrap();
        let dispatch = Dispatch { method: "POST", path: "/v1/conversation/stream", body: b"{}" };
        let headers = seal(&prompt, &dispatch).unwrap();
        assert_eq!(headers[POLICY_VERSION], "2026-11-21");
        assert_eq!(headers[CONSTITUTION_HASH], policy.issuer.con.to_string());
        assert_eq!(headers[CONTENT_DIGEST], Digest::of(b"{}").to_string());

        let policy_key = Ring::generate(NOW).unwrap();
        let registry = Memory::new(10);
        let entry = Entry::first(ANY_TENANT, "2026-11-21", policy.issuer.con, NOW);
        registry.install(&policy_key.sign_entry(&entry).unwrap(), &policy_key.verifier(), NOW).unwrap();
        let replays = Replays::new(100);
        let (session, turn) = (prompt.session.to_string(), prompt.turn.to_string());
        let expect = |body: &[u8]| Expect {
            iss: "headgate",
            aud: ORCHESTRATOR,
            dir: Direction::Input,
            tid: "acme",
            sid: &session,
            turn: &turn,
            htm: Some("POST"),
            htu: Some("/v1/conversation/stream"),
            body: Digest::of(body),
            now: NOW,
            leeway: LEEWAY,
        };
        let token = headers[POLICY_VERDICT].to_str().unwrap();
        let verifier = ring.verifier();
        assert_eq!(verifier.verify(token, &expect(b"{} "), &registry, &replays).unwrap_err(), Rejected::Digest);
        let claims = verifier.verify(token, &expect(b"{}"), &registry, &replays).unwrap();
        assert_eq!((claims.dec, claims.cat), (Decision::Redact, vec!["pii".to_owned()]));
        assert_eq!(claims.trc, Some(prompt.trace.trace_id_hex()));
        assert_eq!(verifier.verify(token, &expect(b"{}"), &registry, &replays).unwrap_err(), Rejected::Replayed);
        // A retry is a dispatch of its own.
        let again = seal(&prompt, &dispatch).unwrap();
        assert!(verifier.verify(again[POLICY_VERDICT].to_str().unwrap(), &expect(b"{}"), &registry, &replays).is_ok());
    }

    #[tokio::test]
    async fn a_turn_of_a_tenant_in_training_mode_says_so_under_its_fence_and_one_whose_mode_is_unknown_does_not_run() {
        struct Locks;
        impl Modes for Locks {
            fn fence(&self, tenant: &str) -> Result<Option<u64>, Fault> {
                match tenant {
                    "trains" => Ok(Some(12)),
                    "unknown" => Err(Fault::us(Code::PolicyRegistryUnavailable)),
                    _ => Ok(None),
                }
            }
        }
        let (policy, ring) = policy();
        let tools = Tools { policy: Some(policy), modes: Some(Arc::new(Locks)), now: || NOW, ..Tools::none() };
        let rules = [built_with("policy_headers", &tools)];
        for (tenant, fence) in [("trains", Some(12)), ("acme", None)] {
            let mut prompt = prompt("hello");
            prompt.principal.tenant = tenant.parse::<TenantId>().unwrap();
            let mut chain = crate::chain(&rules, &mut turn());
            chain.prompt(&mut prompt).await.unwrap();
            let headers = prompt.seal.clone().unwrap()(&prompt, &Dispatch { method: "POST", path: "/", body: b"{}" }).unwrap();
            let claims = ring.verifier().open(headers[POLICY_VERDICT].to_str().unwrap(), NOW).unwrap();
            assert_eq!((claims.fence, claims.mode == headgate_policy::Mode::Training), (fence, fence.is_some()), "{tenant}");
        }
        let mut prompt = prompt("hello");
        prompt.principal.tenant = "unknown".parse::<TenantId>().unwrap();
        let stop = crate::chain(&rules, &mut turn()).prompt(&mut prompt).await.unwrap_err();
        assert_eq!(stop.code(), Code::PolicyRegistryUnavailable);
    }

    #[tokio::test]
    async fn nothing_is_signed_under_a_policy_that_the_registry_does_not_know() {
        struct Away;
        impl Registry for Away {
            fn entry(&self, _: &str, _: u64) -> Result<Option<Arc<Entry>>, Unavailable> {
                Err(Unavailable)
            }
        }
        let (policy, _) = policy();
        let policy_key = Ring::generate(NOW).unwrap();
        let (ver, con) = (policy.issuer.pol.ver.as_str(), policy.issuer.con);
        let installed = |entries: &[Entry]| -> Arc<dyn Registry> {
            let memory = Memory::new(10);
            for entry in entries {
                memory.install(&policy_key.sign_entry(entry).unwrap(), &policy_key.verifier(), NOW).unwrap();
            }
            Arc::new(memory)
        };
        let ours = Entry::first(ANY_TENANT, ver, con, NOW - 1000);
        let of_acme = Entry::first("acme", "2", Digest::of(b"another"), NOW - 1000);
        for (registry, refused) in [
            (installed(std::slice::from_ref(&ours)), None),
            (installed(&[ours.succeeded_by("2", Digest::of(b"another"), NOW - 60)]), None),
            (installed(&[ours.succeeded_by("2", Digest::of(b"another"), NOW - 61)]), Some(Code::VersionConflict)),
            (installed(&[Entry::first(ANY_TENANT, "1", con, NOW - 1000)]), Some(Code::VersionConflict)),
            (installed(&[ours, of_acme]), Some(Code::VersionConflict)),
            (installed(&[]), Some(Code::VersionConflict)),
            (Arc::new(Away), Some(Code::PolicyRegistryUnavailable)),
        ] {
            let tools = Tools { policy: Some(policy.clone()), registry: Some(registry), now: || NOW, ..Tools::none() };
            let mut chain = crate::chain(&[built_with("policy_headers", &tools)], &mut turn());
            let mut prompt = prompt("hello");
            prompt.principal.tenant = "acme".parse::<TenantId>().unwrap();
            let stopped = chain.prompt(&mut prompt).await.err().map(|stop| stop.code());
            assert_eq!(stopped, refused);
            assert_eq!(prompt.seal.is_none(), refused.is_some());
        }
    }

    #[tokio::test]
    async fn the_client_learns_the_policy_in_force_and_gets_a_verdict_on_what_it_was_sent() {
        let (policy, ring) = policy();
        let (mut chain, mut prompt, mut head) = (chain(&policy), prompt("hello"), Head::default());
        chain.prompt(&mut prompt).await.unwrap();
        chain.head(&mut head).unwrap();
        assert_eq!(head.headers[POLICY_VERSION], "2026-11-21");
        assert_eq!(head.headers[CONSTITUTION_HASH], policy.issuer.con.to_string());
        let mut record = Record::default();
        chain.end(Ok(()), &mut Batch::new(), &mut record).unwrap();
        // What other filters found is known only when the seal is used.
        record.raise(Outcome::Blocked);
        record.find(finding(Category::Hate, Stage::Output));
        record.find(finding(Category::Pii, Stage::Input));
        let emitted = Digest::of("safe prefix".as_bytes());
        let token = record.seal.clone().unwrap()(&record, *emitted.as_bytes()).unwrap();
        let claims = ring.verifier().open(&token, NOW);
        let claims = claims.unwrap();
        assert_eq!((claims.dir, claims.aud.as_str(), claims.dec), (Direction::Output, AUDIT, Decision::Deny));
        assert_eq!((claims.bdg, claims.cat, claims.turn), (emitted, vec!["hate".to_owned()], prompt.turn.to_string()));
    }

    #[test]
    fn without_a_policy_there_is_nothing_to_say() {
        assert!(problems("policy_headers")[0].to_string().contains("constitution: constitution.md"));
    }

    #[test]
    fn what_only_this_gateway_may_say_is_deleted_in_every_spelling() {
        let mut headers = HeaderMap::new();
        for forged in [
            "Policy-Verdict",
            "policy-verdict",
            "POLICY_VERSION",
            "x-policy-mode",
            "X_Policy_Mode",
            "constitution-hash",
            "Constitution_Hash",
            "x-constitution-hash",
            "content-digest",
            "Content_Digest",
            "X-Content-Digest",
            "x-gw-tenant",
            "x_gw_tenant",
            "x-headgate-turn",
            "X_Headgate-Turn",
        ] {
            headers.append(HeaderName::from_bytes(forged.as_bytes()).unwrap(), HeaderValue::from_static("forged"));
        }
        let honest =
            ["authorization", "content-type", "permissions-policy", "x-policyholder", "digest", "traceparent", "x-request-id", "policy"];
        for name in honest {
            headers.append(name, HeaderValue::from_static("honest"));
        }
        assert_eq!(strip_forged(&mut headers), 15);
        assert!(headers.values().all(|value| value == "honest"));
        assert_eq!(headers.len(), honest.len());
        assert_eq!(strip_forged(&mut headers), 0);
    }
}
