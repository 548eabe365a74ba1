//! Knows admins: people with a role, in a token of one identity provider, who signed in a moment ago.
//!
//! Stricter than the door of a route, because an admin changes what others get: no API keys, one issuer to the letter, no tenant
//! but that of the token, and a token from last night's browser does not do.

use headgate_contracts::{Fault, Subject, TenantId};
use jsonwebtoken::{Algorithm, Validation};
use serde_json::{Map, Value};
use tokio::sync::Mutex;

use super::{LEEWAY, MAX_TOKEN_BYTES, TokenAlgorithm, Tokens, Unfit};
use crate::KeySource;
use std::{fmt, sync::Arc};

/// How long ago an admin may have signed in, in seconds.
pub const FRESH: u64 = 300;
/// Claims that only tokens have that say who signed in to some program, and allow nothing (OpenID Connect Core, 3.1.3.6 and 3.3.2.11).
const OF_ID_TOKENS: [&str; 3] = ["nonce", "at_hash", "c_hash"];

/// What makes an admin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdminTerms {
    /// The identity provider: `iss`, exactly.
    pub issuer: String,
    /// Must stand in `aud`.
    pub audience: String,
    /// The role.
    pub role: String,
    /// The claim with the roles, a list or names with spaces between them; a dot goes into an object, as in `realm_access.roles`.
    pub role_claim: String,
    /// The claim that names the tenant.
    pub tenant_claim: String,
}

/// Somebody whom an identity provider knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Admin {
    /// The tenant of the token, and never another.
    pub tenant: TenantId,
    /// Who: opaque.
    pub subject: Subject,
}

/// Why somebody may not act as admin.
#[derive(Debug)]
pub enum NoAdmin {
    /// Nobody knows who it is.
    Unknown,
    /// The token is over.
    Expired,
    /// Known, with a token that would do, but signed in too long ago.
    Stale(Admin),
    /// Known, without the role.
    Roleless(Admin),
    /// The identity provider cannot be asked.
    Unchecked(Fault),
}

/// Tells admins by their tokens.
pub struct Admins {
    tokens: Tokens,
    terms: AdminTerms,
    now: fn() -> u64,
}

impl Admins {
    /// Admins by `terms`. `source` gives the issuer's keys by its name. `now`: Unix seconds.
    pub fn new(terms: AdminTerms, source: Arc<dyn KeySource>, now: fn() -> u64) -> Admins {
        let mut validation = Validation::new(Algorithm::EdDSA);
        validation.set_required_spec_claims(&["exp", "iss", "aud", "sub"]);
        validation.set_audience(std::slice::from_ref(&terms.audience));
        // Times are checked where those of all tokens are.
        validation.validate_exp = false;
        validation.validate_nbf = false;
        let tokens = Tokens {
            url: terms.issuer.clone(),
            issuer: Some(terms.issuer.clone()),
            origin: String::new(),
            algorithms: TokenAlgorithm::ALL.into_iter().map(TokenAlgorithm::algorithm).collect(),
            validation,
            tenant_claim: terms.tenant_claim.clone(),
            tenant: None,
            subject_claim: "sub".to_owned(),
            source,
            fetched: Mutex::new(None),
        };
        Admins { tokens, terms, now }
    }

    /// Who brings this token, if it is an admin. May wait for the identity provider, at most [`super::REFRESH_TIMEOUT`]. Cancel safe.
    pub async fn admit(&self, token: &str) -> Result<Admin, NoAdmin> {
        if token.is_empty() || token.len() > MAX_TOKEN_BYTES {
            return Err(NoAdmin::Unknown);
        }
        let now = (self.now)();
        let known = async {
            let claims = self.tokens.claims(token).await?;
            let principal = self.tokens.principal(&claims, now)?;
            Ok((claims, Admin { tenant: principal.tenant, subject: principal.subject }))
        };
        let (claims, admin) = known.await.map_err(|unfit| match unfit {
            Unfit::Unknown => NoAdmin::Unknown,
            Unfit::Expired => NoAdmin::Expired,
            Unfit::Unchecked(fault) => NoAdmin::Unchecked(fault),
        })?;
        if OF_ID_TOKENS.iter().any(|name| claims.contains_key(*name)) {
            return Err(NoAdmin::Unknown);
        }
        if !roles(&claims, &self.terms.role_claim).any(|role| role == self.terms.role) {
            return Err(NoAdmin::Roleless(admin));
        }
        // When the person signed in; where the provider does not say, when the token was made.
        let signed_in = ["auth_time", "iat"].into_iter().find_map(|name| claims.get(name)).and_then(Value::as_f64).unwrap_or(0.0);
        let is_fresh = signed_in <= (now + LEEWAY) as f64 && signed_in + (FRESH + LEEWAY) as f64 >= now as f64;
        if is_fresh { Ok(admin) } else { Err(NoAdmin::Stale(admin)) }
    }
}

fn roles<'a>(claims: &'a Map<String, Value>, claim: &str) -> impl Iterator<Item = &'a str> + use<'a> {
    let mut names = claim.split('.');
    let first = names.next().and_then(|name| claims.get(name));
    let found = claims.get(claim).or_else(|| names.fold(first, |found, name| found?.get(name)));
    let (one, list) = match found {
        Some(Value::String(names)) => (Some(names.split_ascii_whitespace()), None),
        Some(Value::Array(list)) => (None, Some(list.iter().filter_map(Value::as_str))),
        _ => (None, None),
    };
    one.into_iter().flatten().chain(list.into_iter().flatten())
}

impl fmt::Debug for Admins {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Admins").field("terms", &self.terms).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn roles_are_found_where_providers_put_them() {
        let claims = json!({"roles": ["a", 7, "b"], "scope": "c d", "realm_access": {"roles": ["e"]}, "https://x.y/roles": ["f"]});
        let claims = claims.as_object().unwrap();
        let of = |claim: &str| roles(claims, claim).collect::<Vec<_>>();
        assert_eq!(of("roles"), ["a", "b"]);
        assert_eq!(of("scope"), ["c", "d"]);
        assert_eq!(of("realm_access.roles"), ["e"]);
        assert_eq!(of("https://x.y/roles"), ["f"], "a name with dots in it is a name first");
        assert!(of("none.at.all").is_empty());
    }
}
