//! Establishes who asks: an API key that is known here, or a JSON web token of an identity provider.
//!
//! API keys are stored as `sha256:` and the hash of the key. A fast hash is right here and wrong for passwords: a key is 256
//! random bits, so nobody can find it by trying, however fast; a slow hash would only let strangers burn our processor with
//! wrong keys. Whoever invents keys of their own for people to remember must not use this.

mod admins;

use std::{collections::HashMap, fmt, str::FromStr, sync::Arc, time::Duration};

use headgate_contracts::{Code, Credential, Fault, Principal, Prompt, Refusal, Stop, Subject, TenantId, Turn};
use jsonwebtoken::{
    Algorithm, DecodingKey, Validation,
    jwk::{AlgorithmParameters, EllipticCurve, Jwk, PublicKeyUse},
};
use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, de};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use tokio::{sync::Mutex, time::Instant};

use crate::{
    Admit, BoxFuture, Filter, KeySource, Problem, Rule, Tools,
    table::{self, Facts, Fits, Parts},
    units::Moment,
};

pub use admins::{Admin, AdminTerms, Admins, FRESH, NoAdmin};

/// The longest token that is looked at, in bytes.
pub const MAX_TOKEN_BYTES: usize = 8 << 10;
/// How far the clocks of an identity provider and of this machine may differ, in seconds.
pub const LEEWAY: u64 = 5;
/// The longest a turn waits for an identity provider.
pub const REFRESH_TIMEOUT: Duration = Duration::from_secs(5);
/// The least time between two fetches of keys because of a token that names an unknown one: anybody can write such a token.
const REFRESH_PAUSE: Duration = Duration::from_secs(30);
/// The same, after a fetch that failed.
const RETRY_PAUSE: Duration = Duration::from_secs(1);
/// The most keys of one provider that are kept.
const MAX_KEYS: usize = 64;

/// Settings of `auth`: `keys`, `jwks` or both.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(rename = "AuthSettings")]
pub struct Settings {
    /// API keys, each stored as the hash of a random key.
    pub keys: Vec<ApiKey>,
    /// Where the identity provider publishes its public keys: an `https` URL (`http` only on this machine).
    pub jwks: Option<String>,
    /// Who a token must be for: one of these names must stand in its `aud`. Needed with `jwks`.
    pub audience: OneOrMore,
    /// Who a token must be by: its `iss`, exactly. Default: any URL with the scheme, host and port of `jwks`.
    pub issuer: Option<String>,
    /// The signature algorithms taken. Default: RS256, ES256, EdDSA.
    pub algorithms: Vec<TokenAlgorithm>,
    /// The claim that names the tenant. Default `tenant`.
    pub tenant_claim: String,
    /// The tenant of all tokens, instead of a claim: for a provider that serves one tenant.
    pub tenant: Option<TenantId>,
    /// The claim that names the subject. Default `sub`. A value that is no plain name is replaced by a hash of it.
    pub subject_claim: String,
    /// Scopes a credential must have, all of them, e.g. `[chat:send]`. A token's stand in `scope` or `scp`.
    pub scopes: Vec<String>,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            keys: Vec::new(),
            jwks: None,
            audience: OneOrMore(Vec::new()),
            issuer: None,
            algorithms: vec![TokenAlgorithm::RS256, TokenAlgorithm::ES256, TokenAlgorithm::EdDSA],
            tenant_claim: "tenant".into(),
            tenant: None,
            subject_claim: "sub".into(),
            scopes: Vec::new(),
        }
    }
}

/// One API key.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ApiKey {
    /// `sha256:` and 64 hex digits: the hash of a random key of 256 bits.
    pub key: KeyHash,
    /// Who pays and whose policy applies.
    pub tenant: TenantId,
    /// Who asks. Default `key`.
    #[serde(default = "a_key")]
    pub subject: Subject,
    /// What it allows, e.g. `[chat:send]`.
    #[serde(default)]
    pub scopes: Vec<String>,
    /// When it ends, e.g. `2027-01-31`. Default: never.
    #[serde(default)]
    pub expires: Option<Moment>,
}

fn a_key() -> Subject {
    "key".parse().expect("a valid name")
}

/// An API key as it is stored: its hash.
#[derive(Clone, PartialEq, Eq)]
pub struct KeyHash([u8; 32]);

impl KeyHash {
    /// The stored form of `key`.
    pub fn of(key: &str) -> KeyHash {
        KeyHash(Sha256::digest(key.as_bytes()).into())
    }
}

impl fmt::Display for KeyHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("sha256:")?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for KeyHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("sha256:…")
    }
}

impl FromStr for KeyHash {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<KeyHash, &'static str> {
        // What was written is not repeated: it may be the key itself.
        const EXPECTED: &str = "not a stored key: expected `sha256:` and 64 hex digits, the hash of a random key and never the key itself";
        let digits = text.strip_prefix("sha256:").filter(|digits| digits.len() == 64 && digits.is_ascii()).ok_or(EXPECTED)?;
        let mut hash = [0; 32];
        for (index, byte) in hash.iter_mut().enumerate() {
            let pair = digits.get(2 * index..2 * index + 2).filter(|pair| !pair.starts_with('+')).ok_or(EXPECTED)?;
            *byte = u8::from_str_radix(pair, 16).map_err(|_| EXPECTED)?;
        }
        Ok(KeyHash(hash))
    }
}

impl<'de> Deserialize<'de> for KeyHash {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<KeyHash, D::Error> {
        String::deserialize(from)?.parse().map_err(de::Error::custom)
    }
}

impl JsonSchema for KeyHash {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "KeyHash".into()
    }
    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({ "type": "string", "pattern": "^sha256:[0-9a-fA-F]{64}$" })
    }
}

/// One name or a list of them.
#[derive(Debug, Clone, PartialEq, Default, JsonSchema)]
pub struct OneOrMore(#[schemars(with = "OneOrMoreForms")] pub Vec<String>);

/// How [`OneOrMore`] may be written.
#[derive(JsonSchema)]
#[serde(untagged)]
#[allow(dead_code, reason = "describes the schema only")]
enum OneOrMoreForms {
    One(String),
    More(Vec<String>),
}

impl<'de> Deserialize<'de> for OneOrMore {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<OneOrMore, D::Error> {
        struct Names;
        impl<'de> de::Visitor<'de> for Names {
            type Value = OneOrMore;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a name or a list of names")
            }
            fn visit_str<E: de::Error>(self, name: &str) -> Result<OneOrMore, E> {
                Ok(OneOrMore(vec![name.to_owned()]))
            }
            fn visit_seq<A: de::SeqAccess<'de>>(self, list: A) -> Result<OneOrMore, A::Error> {
                Deserialize::deserialize(de::value::SeqAccessDeserializer::new(list)).map(OneOrMore)
            }
        }
        from.deserialize_any(Names)
    }
}

/// The algorithms a token may be signed with: all of them with two keys, so that who can check a token cannot write one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[allow(missing_docs, reason = "the names of RFC 7518 and RFC 8037")]
pub enum TokenAlgorithm {
    RS256,
    RS384,
    RS512,
    PS256,
    PS384,
    PS512,
    ES256,
    ES384,
    EdDSA,
}

impl TokenAlgorithm {
    const ALL: [TokenAlgorithm; 9] = {
        use TokenAlgorithm::*;
        [RS256, RS384, RS512, PS256, PS384, PS512, ES256, ES384, EdDSA]
    };

    fn algorithm(self) -> Algorithm {
        match self {
            TokenAlgorithm::RS256 => Algorithm::RS256,
            TokenAlgorithm::RS384 => Algorithm::RS384,
            TokenAlgorithm::RS512 => Algorithm::RS512,
            TokenAlgorithm::PS256 => Algorithm::PS256,
            TokenAlgorithm::PS384 => Algorithm::PS384,
            TokenAlgorithm::PS512 => Algorithm::PS512,
            TokenAlgorithm::ES256 => Algorithm::ES256,
            TokenAlgorithm::ES384 => Algorithm::ES384,
            TokenAlgorithm::EdDSA => Algorithm::EdDSA,
        }
    }
}

/// The public keys of an identity provider, ready for use.
pub struct Keys(Vec<PublicKey>);

struct PublicKey {
    kid: Option<String>,
    algorithms: Vec<Algorithm>,
    key: DecodingKey,
}

/// Text that is no set of keys.
#[derive(Debug, thiserror::Error)]
pub enum NotKeys {
    /// It is not JSON, or has no list `keys`.
    #[error("not a JWK set: expected a JSON object with a list `keys`")]
    Shape,
    /// None of its keys can check a signature that is taken here.
    #[error("a JWK set without a key for signatures by RSA (2048 bits or more), P-256, P-384 or Ed25519")]
    NoneFits,
}

impl Keys {
    /// Reads a JWK set (RFC 7517). Keys of unknown kinds, keys for encryption, symmetric and short keys are left out; so are
    /// all after the 64th. Bound the size before: an honest set has a few KiB.
    pub fn from_jwks(json: &[u8]) -> Result<Keys, NotKeys> {
        let set: Value = serde_json::from_slice(json).map_err(|_| NotKeys::Shape)?;
        let keys = set.get("keys").and_then(Value::as_array).ok_or(NotKeys::Shape)?;
        let keys: Vec<PublicKey> = keys.iter().filter_map(public_key).take(MAX_KEYS).collect();
        if keys.is_empty() { Err(NotKeys::NoneFits) } else { Ok(Keys(keys)) }
    }

    /// The key named `kid`; without a name the only one that can have made a signature by `algorithm`.
    fn find(&self, kid: Option<&str>, algorithm: Algorithm) -> Option<&DecodingKey> {
        let mut fitting = self.0.iter().filter(|key| key.algorithms.contains(&algorithm));
        match kid {
            Some(kid) => fitting.find(|key| key.kid.as_deref() == Some(kid)).map(|key| &key.key),
            None => match (fitting.next(), fitting.next()) {
                (Some(only), None) => Some(&only.key),
                _ => None,
            },
        }
    }
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.iter().map(|key| key.kid.as_deref().unwrap_or("unnamed"))).finish()
    }
}

fn public_key(jwk: &Value) -> Option<PublicKey> {
    let jwk = Jwk::deserialize(jwk).ok()?;
    if !matches!(jwk.common.public_key_use, None | Some(PublicKeyUse::Signature)) {
        return None;
    }
    let algorithms = match &jwk.algorithm {
        // 2048 bits are 342 characters of base64url.
        AlgorithmParameters::RSA(rsa) if rsa.n.len() >= 342 => {
            vec![Algorithm::RS256, Algorithm::RS384, Algorithm::RS512, Algorithm::PS256, Algorithm::PS384, Algorithm::PS512]
        }
        AlgorithmParameters::EllipticCurve(ec) if ec.curve == EllipticCurve::P256 => vec![Algorithm::ES256],
        AlgorithmParameters::EllipticCurve(ec) if ec.curve == EllipticCurve::P384 => vec![Algorithm::ES384],
        AlgorithmParameters::OctetKeyPair(okp) if okp.curve == EllipticCurve::Ed25519 => vec![Algorithm::EdDSA],
        _ => return None,
    };
    // A key that names its algorithm is used with no other.
    let algorithms = match jwk.common.key_algorithm.map(|named| named.to_string()) {
        Some(named) => algorithms.into_iter().filter(|algorithm| format!("{algorithm:?}") == named).collect(),
        None => algorithms,
    };
    let key = DecodingKey::from_jwk(&jwk).ok()?;
    Some(PublicKey { kid: jwk.common.key_id, algorithms, key })
}

impl table::Settings for Settings {
    const TERMS: Fits = Fits { shadow: false, hold: false, pass: false };

    fn build(&self, tools: &Tools<'_>) -> Result<Parts, Vec<Problem>> {
        let mut problems = Vec::new();
        if self.keys.is_empty() && self.jwks.is_none() {
            problems.push(
                Problem::new("", "neither `keys` nor `jwks`, so nobody could be let in")
                    .expected("`keys`, `jwks` or both")
                    .remedy("write e.g. `auth: { jwks: https://id.example.com/jwks.json, audience: chat }`"),
            );
        }
        let mut first = HashMap::new();
        for (index, key) in self.keys.iter().enumerate() {
            let before = *first.entry(key.key.0).or_insert(index);
            if before != index {
                let found = format!("the same key as keys[{before}]");
                problems.push(Problem::new(format!("keys[{index}].key"), found).remedy("remove one of the two"));
            }
        }
        let tokens = self.jwks.as_deref().map(|url| self.tokens(url, tools, &mut problems));
        if self.jwks.is_none() {
            let inert = [("audience", !self.audience.0.is_empty()), ("issuer", self.issuer.is_some()), ("tenant", self.tenant.is_some())];
            for (name, _) in inert.into_iter().filter(|(_, written)| *written) {
                problems.push(
                    Problem::new(name, format!("`{name}` without `jwks`: it is about tokens, and none are taken"))
                        .remedy(format!("set `jwks`, or remove `{name}`")),
                );
            }
        }
        if !problems.is_empty() {
            return Err(problems);
        }
        let keys = self.keys.iter().map(|key| (key.key.clone(), key.principal())).collect();
        let door = Arc::new(Door { keys, tokens, scopes: self.scopes.clone(), now: tools.now });
        let admit: Arc<dyn Admit> = door.clone();
        Ok(Parts { rule: Arc::new(Auth(door)), facts: Facts::default(), admit: Some(admit) })
    }
}

impl Settings {
    fn tokens(&self, url: &str, tools: &Tools<'_>, problems: &mut Vec<Problem>) -> Tokens {
        let origin = origin(url);
        let local = ["http://localhost", "http://127.0.0.1", "http://[::1]"];
        let is_local = origin.is_some_and(|origin| {
            local.iter().any(|host| origin.strip_prefix(host).is_some_and(|rest| rest.is_empty() || rest.starts_with(':')))
        });
        if !(is_local || origin.is_some_and(|origin| origin.starts_with("https://"))) {
            problems.push(
                Problem::new("jwks", format!("`{url}`: whoever is between could bring keys of their own"))
                    .expected("an https URL")
                    .remedy("use https"),
            );
        }
        if self.audience.0.is_empty() {
            problems.push(
                Problem::new("audience", "absent, so a token made for another service would be taken")
                    .expected("the name your tokens carry in `aud`")
                    .remedy("set e.g. `audience: chat`"),
            );
        }
        if self.algorithms.is_empty() {
            problems.push(Problem::new("algorithms", "empty, so no token could be taken").remedy("remove `algorithms`"));
        }
        let mut validation = Validation::new(Algorithm::EdDSA);
        validation.set_required_spec_claims(&["exp", "iss", "aud", "sub"]);
        validation.set_audience(&self.audience.0);
        // Times are checked here, by the clock everything else is checked by.
        validation.validate_exp = false;
        validation.validate_nbf = false;
        Tokens {
            url: url.to_owned(),
            issuer: self.issuer.clone(),
            origin: origin.unwrap_or_default().to_owned(),
            algorithms: TokenAlgorithm::ALL.into_iter().filter(|a| self.algorithms.contains(a)).map(TokenAlgorithm::algorithm).collect(),
            validation,
            tenant_claim: self.tenant_claim.clone(),
            tenant: self.tenant.clone(),
            subject_claim: self.subject_claim.clone(),
            source: tools.keys.clone(),
            fetched: Mutex::new(None),
        }
    }
}

/// Scheme, host and port of a URL.
fn origin(url: &str) -> Option<&str> {
    let host = url.find("://")? + 3;
    let rest = url.get(host..)?;
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let authority = rest.get(..end)?;
    (!authority.is_empty() && !authority.contains('@')).then(|| url.get(..host + end)).flatten()
}

impl ApiKey {
    fn principal(&self) -> Principal {
        Principal {
            tenant: self.tenant.clone(),
            subject: self.subject.clone(),
            scopes: self.scopes.clone(),
            expires: self.expires.map(|Moment(seconds)| seconds),
        }
    }
}

/// Checks credentials: once at the door of a connection, and again on every turn.
struct Door {
    keys: Vec<(KeyHash, Principal)>,
    tokens: Option<Tokens>,
    scopes: Vec<String>,
    now: fn() -> u64,
}

struct Tokens {
    url: String,
    issuer: Option<String>,
    origin: String,
    algorithms: Vec<Algorithm>,
    validation: Validation,
    tenant_claim: String,
    tenant: Option<TenantId>,
    subject_claim: String,
    source: Arc<dyn KeySource>,
    /// When keys were last fetched because of a token, and whether that worked.
    fetched: Mutex<Option<(Instant, bool)>>,
}

/// Why a credential does not do. The client learns no more than that, and whether a new one would do.
enum Unfit {
    Unknown,
    Expired,
    Unchecked(Fault),
}

impl From<Unfit> for Stop {
    fn from(unfit: Unfit) -> Stop {
        match unfit {
            Unfit::Unknown => Refusal::new(Code::Unauthenticated, "auth").into(),
            Unfit::Expired => Refusal::new(Code::TokenExpired, "auth").into(),
            Unfit::Unchecked(fault) => {
                Fault::us(Code::Overloaded).saying("credentials cannot be checked now").after(RETRY_PAUSE).caused_by(fault).into()
            }
        }
    }
}

impl Door {
    async fn check(&self, credential: &Credential) -> Result<Principal, Stop> {
        let Credential::Bearer(token) = credential else { return Err(Unfit::Unknown.into()) };
        let token = token.expose();
        if token.is_empty() || token.len() > MAX_TOKEN_BYTES {
            return Err(Unfit::Unknown.into());
        }
        let now = (self.now)();
        let principal = match (self.by_key(token), &self.tokens) {
            (Some(principal), _) if principal.expires.is_some_and(|end| end <= now) => return Err(Unfit::Expired.into()),
            (Some(principal), _) => principal,
            (None, Some(tokens)) => tokens.check(token, now).await?,
            (None, None) => return Err(Unfit::Unknown.into()),
        };
        if self.scopes.iter().all(|scope| principal.scopes.contains(scope)) {
            Ok(principal)
        } else {
            Err(Refusal::new(Code::PermissionDenied, "auth.scopes").into())
        }
    }

    /// Looks at every key, so that the time taken says nothing about which one came near.
    fn by_key(&self, token: &str) -> Option<Principal> {
        if self.keys.is_empty() {
            return None;
        }
        let hash = KeyHash::of(token);
        let mut found = None;
        for (stored, principal) in &self.keys {
            if bool::from(stored.0.ct_eq(&hash.0)) {
                found = Some(principal);
            }
        }
        found.cloned()
    }
}

impl Tokens {
    async fn check(&self, token: &str, now: u64) -> Result<Principal, Unfit> {
        self.principal(&self.claims(token).await?, now)
    }

    /// What a token of the provider says; its times and names are not looked at yet.
    async fn claims(&self, token: &str) -> Result<Map<String, Value>, Unfit> {
        // Not a JWT at all: no reason to ask anybody for keys.
        let header = jsonwebtoken::decode_header(token).map_err(|_| Unfit::Unknown)?;
        let is_access_token = header
            .typ
            .as_deref()
            .is_none_or(|typ| ["JWT", "at+jwt", "application/at+jwt"].iter().any(|known| typ.eq_ignore_ascii_case(known)));
        // RFC 7515 section 4.1.11: what must be understood and is not, is refused. RFC 7797: unencoded payloads likewise.
        let is_plain = header.crit.is_none() && !header.extras.inner().contains_key("b64");
        if !(self.algorithms.contains(&header.alg) && is_access_token && is_plain) {
            return Err(Unfit::Unknown);
        }
        let kid = header.kid.as_deref();
        let cached = self.source.keys(&self.url).filter(|keys| keys.find(kid, header.alg).is_some());
        let keys = match cached {
            Some(keys) => keys,
            None => self.refresh(kid, header.alg).await?,
        };
        let key = keys.find(kid, header.alg).ok_or(Unfit::Unknown)?;
        let validation = Validation { algorithms: vec![header.alg], ..self.validation.clone() };
        Ok(jsonwebtoken::decode::<Claims>(token, key, &validation).map_err(|_| Unfit::Unknown)?.claims.0)
    }

    /// The keys, fetched anew unless that was done a moment ago. Turns that wait for the same fetch share it.
    async fn refresh(&self, kid: Option<&str>, algorithm: Algorithm) -> Result<Arc<Keys>, Unfit> {
        let mut fetched = self.fetched.lock().await;
        let cached = self.source.keys(&self.url);
        if let Some(keys) = &cached
            && keys.find(kid, algorithm).is_some()
        {
            return Ok(keys.clone());
        }
        if let Some((at, worked)) = *fetched
            && at.elapsed() < if worked { REFRESH_PAUSE } else { RETRY_PAUSE }
        {
            return match (worked, cached) {
                (true, Some(keys)) => Ok(keys),
                _ => Err(Unfit::Unchecked(Fault::upstream(Code::UpstreamConnectFailed).saying("keys could not be fetched a moment ago"))),
            };
        }
        // Written first: a turn that is dropped while it fetches must not free the next one to fetch at once.
        *fetched = Some((Instant::now(), false));
        let keys = match tokio::time::timeout(REFRESH_TIMEOUT, self.source.refresh(&self.url)).await {
            Ok(Ok(keys)) => keys,
            Ok(Err(fault)) => return Err(Unfit::Unchecked(fault)),
            Err(_) => {
                return Err(Unfit::Unchecked(Fault::upstream(Code::UpstreamTimeoutFirstByte).saying("keys could not be fetched in time")));
            }
        };
        *fetched = Some((Instant::now(), true));
        Ok(keys)
    }

    fn principal(&self, claims: &Map<String, Value>, now: u64) -> Result<Principal, Unfit> {
        let text = |name: &str| claims.get(name).and_then(Value::as_str).ok_or(Unfit::Unknown);
        let seconds = |name: &str| match claims.get(name) {
            None => Ok(None),
            // RFC 7519 NumericDate: a number, perhaps with a fraction; never a string.
            Some(value) => value.as_f64().filter(|time| (0.0..1e15).contains(time)).map(|time| Some(time as u64)).ok_or(Unfit::Unknown),
        };
        let issuer = text("iss")?;
        let is_ours = match &self.issuer {
            Some(expected) => issuer == expected,
            None => !self.origin.is_empty() && origin(issuer) == Some(&self.origin),
        };
        let end = seconds("exp")?.ok_or(Unfit::Unknown)?;
        let begin = seconds("nbf")?.unwrap_or(0);
        if !is_ours || begin > now + LEEWAY {
            return Err(Unfit::Unknown);
        }
        if end + LEEWAY <= now {
            return Err(Unfit::Expired);
        }
        let tenant = match &self.tenant {
            Some(tenant) => tenant.clone(),
            None => text(&self.tenant_claim)?.parse().map_err(|_| Unfit::Unknown)?,
        };
        let subject = text(&self.subject_claim)?;
        let subject = subject.parse().unwrap_or_else(|_| hashed_subject(subject));
        Ok(Principal { tenant, subject, scopes: scopes(claims), expires: Some(end) })
    }
}

/// A name for a subject that is none: the same for the same subject, and telling nothing about it.
fn hashed_subject(subject: &str) -> Subject {
    let hash = KeyHash::of(subject).to_string().replace("sha256:", "h-");
    hash.parse().expect("letters, digits and a hyphen")
}

/// `scope` as one string with spaces (RFC 8693), `scp` as a string or a list.
fn scopes(claims: &Map<String, Value>) -> Vec<String> {
    let mut scopes = Vec::new();
    for value in [claims.get("scope"), claims.get("scp")].into_iter().flatten() {
        match value {
            Value::String(text) => scopes.extend(text.split_ascii_whitespace().map(str::to_owned)),
            Value::Array(list) => scopes.extend(list.iter().filter_map(Value::as_str).map(str::to_owned)),
            _ => {}
        }
    }
    scopes
}

/// The claims of a token, each named once: of two values for one name every reader might take another.
struct Claims(Map<String, Value>);

impl<'de> Deserialize<'de> for Claims {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Claims, D::Error> {
        struct Once;
        impl<'de> de::Visitor<'de> for Once {
            type Value = Claims;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of claims")
            }
            fn visit_map<A: de::MapAccess<'de>>(self, mut map: A) -> Result<Claims, A::Error> {
                let mut claims = Map::new();
                while let Some((name, value)) = map.next_entry::<String, Value>()? {
                    if claims.insert(name, value).is_some() {
                        return Err(de::Error::custom("a claim stands twice"));
                    }
                }
                Ok(Claims(claims))
            }
        }
        from.deserialize_map(Once)
    }
}

impl Admit for Door {
    fn admit<'a>(&'a self, credential: &'a Credential) -> BoxFuture<'a, Result<Principal, Stop>> {
        Box::pin(self.check(credential))
    }
}

struct Auth(Arc<Door>);

impl Rule for Auth {
    fn start(&self, _: &mut Turn) -> Box<dyn Filter> {
        Box::new(Authenticates(self.0.clone()))
    }
}

struct Authenticates(Arc<Door>);

impl Filter for Authenticates {
    fn prompt<'a>(&'a mut self, prompt: &'a mut Prompt) -> BoxFuture<'a, Result<(), Stop>> {
        Box::pin(async {
            prompt.principal = self.0.check(&prompt.credential).await?;
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Mutex as StdMutex,
        atomic::{AtomicUsize, Ordering},
    };

    use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
    use headgate_contracts::Secret;
    use jsonwebtoken::{EncodingKey, Header};
    use serde_json::json;

    use super::*;
    use crate::testing::{built_with, problems, prompt, step, turn};

    const NOW: u64 = 1_800_000_000;
    const URL: &str = "https://id.example.com/jwks.json";

    /// An identity provider: signs tokens, publishes keys, counts the fetches.
    #[derive(Default)]
    struct Provider {
        cached: StdMutex<Option<Arc<Keys>>>,
        published: StdMutex<Vec<Value>>,
        fetches: AtomicUsize,
        is_down: std::sync::atomic::AtomicBool,
    }

    impl KeySource for Provider {
        fn keys(&self, url: &str) -> Option<Arc<Keys>> {
            assert_eq!(url, URL);
            self.cached.lock().unwrap().clone()
        }
        fn refresh<'a>(&'a self, _: &'a str) -> BoxFuture<'a, Result<Arc<Keys>, Fault>> {
            self.fetches.fetch_add(1, Ordering::Relaxed);
            if self.is_down.load(Ordering::Relaxed) {
                return Box::pin(std::future::ready(Err(Fault::upstream(Code::UpstreamConnectFailed))));
            }
            let keys = Arc::new(self.keys_now());
            *self.cached.lock().unwrap() = Some(keys.clone());
            Box::pin(std::future::ready(Ok(keys)))
        }
    }

    impl Provider {
        fn keys_now(&self) -> Keys {
            Keys::from_jwks(json!({ "keys": *self.published.lock().unwrap() }).to_string().as_bytes()).unwrap()
        }
        fn publish(&self, key: &Signer) {
            self.published.lock().unwrap().push(key.jwk.clone());
        }
    }

    struct Signer {
        key: EncodingKey,
        algorithm: Algorithm,
        kid: String,
        jwk: Value,
    }

    impl Signer {
        fn of(kid: &str, pair: &rcgen::KeyPair, algorithm: Algorithm) -> Signer {
            let der = pair.serialize_der();
            let key = match algorithm {
                Algorithm::ES256 => EncodingKey::from_ec_der(&der),
                Algorithm::EdDSA => EncodingKey::from_ed_der(&der),
                _ => EncodingKey::from_rsa_pem(pair.serialize_pem().as_bytes()).unwrap(),
            };
            let mut jwk = match algorithm {
                Algorithm::EdDSA => json!({ "kty": "OKP", "crv": "Ed25519", "x": URL_SAFE_NO_PAD.encode(pair.public_key_raw()) }),
                _ => serde_json::to_value(Jwk::from_encoding_key(&key, algorithm).unwrap()).unwrap(),
            };
            jwk["kid"] = kid.into();
            Signer { key, algorithm, kid: kid.into(), jwk }
        }
        fn es256(kid: &str) -> Signer {
            Signer::of(kid, &rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap(), Algorithm::ES256)
        }
        fn header(&self) -> Header {
            Header { kid: Some(self.kid.clone()), ..Header::new(self.algorithm) }
        }
        fn sign(&self, claims: &Value) -> String {
            jsonwebtoken::encode(&self.header(), claims, &self.key).unwrap()
        }
    }

    fn claims() -> Value {
        json!({ "iss": "https://id.example.com/", "aud": "chat", "sub": "auth0|17", "tenant": "acme",
                "exp": NOW + 60, "nbf": NOW - 60, "scope": "chat:send chat:read" })
    }

    fn with(name: &str, value: impl Into<Value>) -> Value {
        let mut claims = claims();
        claims[name] = value.into();
        claims
    }

    fn without(name: &str) -> Value {
        let mut claims = claims();
        claims.as_object_mut().unwrap().remove(name);
        claims
    }

    fn tools(provider: Arc<Provider>) -> Tools<'static> {
        Tools { keys: provider, now: || NOW, ..Tools::none() }
    }

    const TOKENS: &str = "auth: { jwks: 'https://id.example.com/jwks.json', audience: chat, scopes: [chat:send] }";

    fn door(provider: &Arc<Provider>) -> Arc<dyn Admit> {
        built_with(TOKENS, &tools(provider.clone())).admit.unwrap()
    }

    async fn admit(door: &Arc<dyn Admit>, token: &str) -> Result<Principal, Code> {
        door.admit(&Credential::Bearer(Secret::new(token))).await.map_err(|stop| stop.code())
    }

    fn provider(key: &Signer) -> Arc<Provider> {
        let provider = Arc::new(Provider::default());
        provider.publish(key);
        *provider.cached.lock().unwrap() = Some(Arc::new(provider.keys_now()));
        provider
    }

    #[tokio::test]
    async fn a_good_token_says_who_asks() {
        let key = Signer::es256("a");
        let principal = admit(&door(&provider(&key)), &key.sign(&claims())).await.unwrap();
        assert_eq!((principal.tenant.as_str(), principal.subject.as_str()), ("acme", "auth0|17"));
        assert_eq!(principal.scopes, ["chat:send", "chat:read"]);
        assert_eq!(principal.expires, Some(NOW + 60));
    }

    #[tokio::test]
    async fn every_algorithm_with_two_keys_is_taken_where_it_is_listed() {
        let rsa = rcgen::KeyPair::generate_rsa_for(&rcgen::PKCS_RSA_SHA256, rcgen::RsaKeySize::_2048).unwrap();
        let ed = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
        let ec = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
        for (pair, algorithm) in [(&rsa, Algorithm::RS256), (&ed, Algorithm::EdDSA), (&ec, Algorithm::ES256)] {
            let key = Signer::of("k", pair, algorithm);
            assert!(admit(&door(&provider(&key)), &key.sign(&claims())).await.is_ok(), "{algorithm:?}");
            let listed = "auth: { jwks: 'https://id.example.com/jwks.json', audience: chat, algorithms: [PS512] }";
            let strict = built_with(listed, &tools(provider(&key))).admit.unwrap();
            assert_eq!(admit(&strict, &key.sign(&claims())).await, Err(Code::Unauthenticated), "{algorithm:?}");
        }
    }

    #[tokio::test]
    async fn a_token_with_anything_wrong_is_refused_without_a_reason() {
        let key = Signer::es256("a");
        let door = door(&provider(&key));
        for wrong in [
            with("iss", "https://evil.example.com/"),
            with("iss", "https://id.example.com.evil.net/"),
            with("iss", "https://id.example.com@evil.net/"),
            with("iss", json!(["https://id.example.com/"])),
            with("aud", "another"),
            with("aud", json!([])),
            with("aud", json!(["another", "third"])),
            with("sub", ""),
            with("sub", 17),
            with("tenant", "a b"),
            with("tenant", json!(["acme"])),
            with("exp", format!("{}", NOW + 60)),
            with("exp", -1),
            with("exp", 1e300),
            with("exp", Value::Null),
            with("nbf", NOW + LEEWAY + 1),
            with("nbf", "soon"),
            without("exp"),
            without("iss"),
            without("aud"),
            without("sub"),
            without("tenant"),
        ] {
            // An empty subject is a subject: it is hashed like every name that is none.
            let expected = if wrong["sub"] == "" { Ok(()) } else { Err(Code::Unauthenticated) };
            assert_eq!(admit(&door, &key.sign(&wrong)).await.map(|_| ()), expected, "{wrong}");
        }
        assert_eq!(admit(&door, &key.sign(&with("scope", "chat:read"))).await, Err(Code::PermissionDenied));
        assert_eq!(admit(&door, &key.sign(&with("exp", NOW - LEEWAY))).await, Err(Code::TokenExpired));
        assert!(admit(&door, &key.sign(&with("exp", NOW - LEEWAY + 1))).await.is_ok());
        assert!(admit(&door, &key.sign(&with("aud", json!(["x", "chat"])))).await.is_ok());
    }

    #[tokio::test]
    async fn forged_tokens_are_refused() {
        let (key, other) = (Signer::es256("a"), Signer::es256("a"));
        let provider = provider(&key);
        let door = door(&provider);
        let good = key.sign(&claims());
        let b64 = |text: &str| URL_SAFE_NO_PAD.encode(text);
        let [header, payload, signature] = good.split('.').collect::<Vec<_>>()[..] else { panic!() };
        let headed = |header: Value| format!("{}.{payload}.{signature}", b64(&header.to_string()));
        let sign = |header: Header, claims: &Value| jsonwebtoken::encode(&header, claims, &key.key).unwrap();
        let hmac = {
            // The public key as the secret of a symmetric algorithm: the oldest confusion.
            let secret = EncodingKey::from_secret(key.jwk.to_string().as_bytes());
            jsonwebtoken::encode(&Header { kid: Some("a".into()), ..Header::new(Algorithm::HS256) }, &claims(), &secret).unwrap()
        };
        let twice = {
            let json = claims().to_string().replacen('{', "{\"tenant\":\"evil\",", 1);
            let message = format!("{header}.{}", b64(&json));
            let signed = jsonwebtoken::crypto::sign(message.as_bytes(), &key.key, Algorithm::ES256).unwrap();
            format!("{message}.{signed}")
        };
        for (what, token) in [
            ("signed by another", other.sign(&claims())),
            ("none", headed(json!({ "alg": "none", "kid": "a" }))),
            ("NoNe", headed(json!({ "alg": "NoNe", "kid": "a" }))),
            ("no algorithm", headed(json!({ "kid": "a" }))),
            ("symmetric", hmac),
            ("another algorithm", headed(json!({ "alg": "ES384", "kid": "a" }))),
            ("key brought along", headed(json!({ "alg": "ES256", "jwk": other.jwk }))),
            ("crit", sign(Header { crit: Some(vec!["b64".into()]), ..key.header() }, &claims())),
            ("another type", sign(Header { typ: Some("policy-verdict+jwt".into()), ..key.header() }, &claims())),
            ("kid as a path", headed(json!({ "alg": "ES256", "kid": "../../etc/passwd" }))),
            ("a claim twice", twice),
            ("padded", format!("{good}=")),
            ("four parts", format!("{good}.x")),
            ("two parts", format!("{header}.{payload}")),
            ("no signature", format!("{header}.{payload}.")),
            ("JSON", claims().to_string()),
            ("empty", String::new()),
            ("too long", format!("{header}.{}.{signature}", "A".repeat(MAX_TOKEN_BYTES))),
        ] {
            assert_eq!(admit(&door, &token).await.map(|_| ()), Err(Code::Unauthenticated), "{what}");
        }
        for at in 0..good.len() {
            let mut bytes = good.clone().into_bytes();
            bytes[at] = if bytes[at] == b'A' { b'B' } else { b'A' };
            let changed = String::from_utf8(bytes).unwrap();
            assert!(admit(&door, &changed).await.is_err(), "byte {at}");
        }
        assert!(admit(&door, &good).await.is_ok());
        assert!(door.admit(&Credential::None).await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn an_unknown_key_is_fetched_once_however_many_ask() {
        let (old, new) = (Signer::es256("old"), Signer::es256("new"));
        let provider = provider(&old);
        let door = door(&provider);
        let token = new.sign(&claims());
        for _ in 0..100 {
            assert_eq!(admit(&door, &token).await, Err(Code::Unauthenticated));
        }
        assert_eq!(provider.fetches.load(Ordering::Relaxed), 1);
        // The provider has rotated meanwhile; the next fetch is due after the pause.
        provider.publish(&new);
        tokio::time::advance(REFRESH_PAUSE).await;
        let all = ask_at_once(&door, &token, 20).await;
        assert!(all.iter().all(Result::is_ok));
        assert_eq!(provider.fetches.load(Ordering::Relaxed), 2);
    }

    async fn ask_at_once(door: &Arc<dyn Admit>, token: &str, n: usize) -> Vec<Result<Principal, Code>> {
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..n {
            let (door, token) = (door.clone(), token.to_owned());
            tasks.spawn(async move { admit(&door, &token).await });
        }
        tasks.join_all().await
    }

    #[tokio::test(start_paused = true)]
    async fn without_keys_nobody_is_let_in_and_nobody_is_told_that_they_are_unknown() {
        let key = Signer::es256("a");
        let provider = Arc::new(Provider::default());
        provider.publish(&key);
        provider.is_down.store(true, Ordering::Relaxed);
        let door = door(&provider);
        assert_eq!(admit(&door, &key.sign(&claims())).await, Err(Code::Overloaded));
        provider.is_down.store(false, Ordering::Relaxed);
        tokio::time::advance(RETRY_PAUSE).await;
        assert!(admit(&door, &key.sign(&claims())).await.is_ok());
        assert_eq!(admit(&door, "no token at all").await, Err(Code::Unauthenticated));
        assert_eq!(provider.fetches.load(Ordering::Relaxed), 2);
    }

    #[tokio::test]
    async fn an_api_key_says_who_asks_until_it_ends() {
        let yaml = |expires: &str| {
            format!(
                "auth: {{ keys: [{{ key: '{}', tenant: acme, subject: ci, scopes: [chat:send]{expires} }}] }}",
                KeyHash::of("hg_secret")
            )
        };
        let door = |expires: &str| built_with(&yaml(expires), &tools(Arc::default())).admit.unwrap();
        let principal = admit(&door(""), "hg_secret").await.unwrap();
        assert_eq!((principal.tenant.as_str(), principal.subject.as_str(), principal.expires), ("acme", "ci", None));
        assert_eq!(admit(&door(""), "hg_secret2").await, Err(Code::Unauthenticated));
        assert_eq!(admit(&door(""), &KeyHash::of("hg_secret").to_string()).await, Err(Code::Unauthenticated));
        assert_eq!(admit(&door(", expires: 2027-01-15"), "hg_secret").await, Err(Code::TokenExpired));
        assert!(admit(&door(", expires: 2027-01-16"), "hg_secret").await.is_ok());
    }

    #[tokio::test]
    async fn the_filter_puts_the_principal_on_the_prompt() {
        let yaml = format!("auth: {{ keys: [{{ key: '{}', tenant: acme }}] }}", KeyHash::of("hg_secret"));
        let rule = built_with(&yaml, &Tools::none()).rule;
        let mut prompt = prompt("hello");
        assert_eq!(rule.start(&mut turn()).prompt(&mut prompt).await.unwrap_err().code(), Code::Unauthenticated);
        prompt.credential = Credential::Bearer(Secret::new("hg_secret"));
        rule.start(&mut turn()).prompt(&mut prompt).await.unwrap();
        assert_eq!(prompt.principal.tenant.as_str(), "acme");
    }

    #[test]
    fn settings_that_let_in_nobody_or_anybody_are_refused() {
        let at = |yaml: &str| problems(yaml).into_iter().map(|problem| problem.at).collect::<Vec<_>>();
        assert_eq!(at("auth"), ["auth"]);
        assert_eq!(at("auth: { jwks: 'http://id.example.com/jwks', audience: chat }"), ["auth.jwks"]);
        assert_eq!(at("auth: { jwks: 'http://localhost.evil.net/jwks', audience: chat }"), ["auth.jwks"]);
        assert_eq!(at("auth: { jwks: 'https://id.example.com/jwks' }"), ["auth.audience"]);
        assert_eq!(at("auth: { keys: [], audience: chat }"), ["auth", "auth.audience"]);
        assert_eq!(at("auth: { jwks: 'http://127.0.0.1:9000/jwks', audience: chat }\nmode: shadow\non_fault: pass"), ["mode", "on_fault"]);
    }

    #[test]
    fn a_key_in_the_clear_is_refused_and_not_repeated() {
        let error = serde_saphyr::from_str::<crate::Step>("auth: { keys: [{ key: hg_secret, tenant: acme }] }").unwrap_err();
        assert!(error.to_string().contains("never the key itself"));
        let shown = format!("{:?}", step(&format!("auth: {{ keys: [{{ key: '{}', tenant: acme }}] }}", KeyHash::of("hg_secret"))));
        assert!(!shown.contains("hg_secret") && !shown.contains(&KeyHash::of("hg_secret").to_string()), "{shown}");
    }

    #[test]
    fn of_a_key_set_only_what_can_check_a_signature_is_kept() {
        let key = Signer::es256("a").jwk;
        let mut encryption = key.clone();
        encryption["use"] = "enc".into();
        let set = json!({ "keys": [
            { "kty": "oct", "k": "c2VjcmV0", "kid": "symmetric" }, { "kty": "RSA", "n": "AQAB", "e": "AQAB", "kid": "short" },
            { "kty": "new-kind" }, 17, encryption, key,
        ] });
        assert_eq!(Keys::from_jwks(set.to_string().as_bytes()).unwrap().0.len(), 1);
        for bad in ["", "[]", "{}", "{\"keys\": {}}", "{\"keys\": []}"] {
            assert!(Keys::from_jwks(bad.as_bytes()).is_err(), "{bad}");
        }
    }
}
