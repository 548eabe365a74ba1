//! Keys that change while the process runs: our own by their file, those of others by their URL.

use std::{
    collections::HashMap,
    fs::Metadata,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use arc_swap::ArcSwap;
use bytes::Bytes;
use headgate_contracts::{Code, Fault};
use headgate_filters::{BoxFuture, KeySource, Keys, Signer, unix_now};
use headgate_policy::{Claims, KeyFault, Ring, Unsigned};
use headgate_upstream::{Settings, Upstream};
use http::{Request, StatusCode, Uri, header};
use http_body_util::{BodyExt, Full, Limited};
use serde_json::Value;
use tokio::time::{Instant, timeout};

/// How often the file of signing keys is looked at. Polled, as mounted secrets are replaced in ways that not every watch sees.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// Identity providers' keys older than this are fetched again, so that a withdrawn key stops being good by itself.
const REFETCH: Duration = Duration::from_secs(300);
/// After a failed fetch.
const RETRY: Duration = Duration::from_secs(5);
/// Keys older than this are no keys any more: a provider that cannot be reached for so long cannot have withdrawn one either.
const LIFETIME: Duration = Duration::from_secs(3600);
/// How long an orchestrator believes keys it has fetched: one that cannot fetch them hears of no revocation. Twice the longest `keys_refresh`.
pub const VERDICT_KEYS_LIFETIME: Duration = Duration::from_secs(600);
/// The longest a fetch may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// The largest document that is read, in bytes.
const MAX_BYTES: usize = 256 << 10;

/// The ring that signs verdicts. Another takes its place at once, for turns that are running too: a revoked key signs nothing more.
pub struct Signing(ArcSwap<Ring>);

impl Signing {
    /// Signs with this ring at first.
    pub fn new(ring: Ring) -> Signing {
        Signing(ArcSwap::from_pointee(ring))
    }

    /// The ring in use.
    pub fn ring(&self) -> Arc<Ring> {
        self.0.load_full()
    }

    /// Uses what is in `path` now, and whatever is put there, for as long as it is polled; `taken` sees each ring that is.
    ///
    /// A file that cannot be used never replaces the ring in use.
    pub async fn follow(self: Arc<Self>, path: PathBuf, taken: impl Fn(&Ring)) {
        let (mut seen, mut due) = (None, None);
        loop {
            seen = self.take(&path, seen, &taken).await;
            let ring = self.ring();
            if ring.is_due(unix_now()) && due != ring.current() {
                due = ring.current();
                tracing::warn!(key = due.map(tracing::field::display), "a rotation of the signing keys is due: `headgate keys rotate`");
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    /// Looks once: uses what is in `path` if it is not what was `seen` there. What is seen now.
    async fn take(&self, path: &Path, seen: Option<Stamp>, taken: impl Fn(&Ring)) -> Option<Stamp> {
        let file = path.to_owned();
        let Ok((stamp, read)) = tokio::task::spawn_blocking(move || look(&file, seen)).await else { return seen };
        match read {
            Some(Ok(ring)) if ring.digest() != self.ring().digest() => {
                tracing::info!(keys = ?ring, "the signing keys were exchanged");
                taken(&ring);
                self.0.store(Arc::new(ring));
            }
            Some(Err(fault)) => {
                let cause = std::error::Error::source(&fault).map(tracing::field::display);
                tracing::error!(error = %fault, cause, "the signing keys stay as they were");
            }
            Some(Ok(_)) | None => {}
        }
        stamp
    }
}

impl Signer for Signing {
    fn sign(&self, claims: &Claims<&str>) -> Result<String, Unsigned> {
        self.0.load().sign(claims)
    }
}

/// What tells one file from another at the same path: device, node, length, when it was changed.
type Stamp = (u64, u64, u64, i64, i64);

/// The ring at `path`, if the file is not the one that is `known`.
fn look(path: &Path, known: Option<Stamp>) -> (Option<Stamp>, Option<Result<Ring, KeyFault>>) {
    let stamp = |about: Metadata| (about.dev(), about.ino(), about.len(), about.ctime(), about.ctime_nsec());
    // Looked at before it is read: what comes between is seen the next time.
    match std::fs::metadata(path).map(stamp) {
        Ok(stamp) if known == Some(stamp) => (known, None),
        Ok(stamp) => (Some(stamp), Some(Ring::load(path))),
        // A file that is away for a moment, while a volume is exchanged, is no news; `headgate run` makes none anew.
        Err(_) => (None, None),
    }
}

/// Keys by the URL they are published at.
#[derive(Clone, Default)]
pub struct Fetched(Arc<RwLock<HashMap<String, Kept>>>);

/// Keys, and when they were fetched.
type Kept = (Arc<Keys>, Instant);

impl Fetched {
    fn keep(&self, name: &str, keys: Arc<Keys>) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned(), (keys, Instant::now()));
    }

    /// Fetches now, and again and again, for as long as the future is polled. A failed fetch leaves what is there.
    pub async fn follow(self, url: String) {
        loop {
            let failed = fetch(&self, &url).await.err().map(|fault| fault.chain());
            pause(&url, REFETCH, failed).await;
        }
    }
}

/// The keys of identity providers by their issuer: where they are published is what the provider's own discovery document says.
#[derive(Clone, Default)]
pub struct Discovered(Fetched);

impl Discovered {
    /// As [`Fetched::follow`].
    pub async fn follow(self, issuer: String) {
        loop {
            let failed = self.discover(&issuer).await.err().map(|fault| fault.chain());
            pause(&issuer, REFETCH, failed).await;
        }
    }

    async fn discover(&self, issuer: &str) -> Result<Arc<Keys>, Fault> {
        let failed = |cause: &str| Fault::us(Code::InternalError).caused_by(format!("keys of {issuer}: {cause}"));
        let found = timeout(PATIENCE, async {
            let url = format!("{}/.well-known/openid-configuration", issuer.trim_end_matches('/'));
            let document: Value = serde_json::from_slice(&get(&url).await?).map_err(|_| "not a discovery document".to_owned())?;
            // Else one provider could speak for another (OpenID Connect Discovery 1.0, section 4.3).
            if document.get("issuer").and_then(Value::as_str) != Some(issuer) {
                return Err("the discovery document is another issuer's".to_owned());
            }
            let url = document.get("jwks_uri").and_then(Value::as_str).ok_or("a discovery document without `jwks_uri`")?;
            // What was asked for safely is not answered unsafely.
            if issuer.starts_with("https://") && !url.starts_with("https://") {
                return Err("keys that are published without TLS".to_owned());
            }
            let keys = Keys::from_jwks(&get(url).await?).map_err(|error| error.to_string())?;
            Ok(Arc::new(keys))
        });
        let keys = found.await.map_err(|_| failed("no answer in time"))?.map_err(|cause| failed(&cause))?;
        self.0.keep(issuer, keys.clone());
        Ok(keys)
    }
}

impl KeySource for Discovered {
    fn keys(&self, issuer: &str) -> Option<Arc<Keys>> {
        self.0.keys(issuer)
    }

    fn refresh<'a>(&'a self, issuer: &'a str) -> BoxFuture<'a, Result<Arc<Keys>, Fault>> {
        Box::pin(self.discover(issuer))
    }
}

/// Fetches a document of keys now, and again and again; `take` gets each.
pub async fn follow(url: String, refetch: Duration, take: impl Fn(&str) -> Result<(), String> + Send + Sync) {
    loop {
        let body = match timeout(PATIENCE, get(&url)).await {
            Ok(body) => body,
            Err(_) => Err("no answer in time".to_owned()),
        };
        let taken = body.and_then(|body| take(&String::from_utf8_lossy(&body)));
        pause(&url, refetch, taken.err()).await;
    }
}

/// A failed fetch is tried again soon, a good one is good for a while.
async fn pause(url: &str, refetch: Duration, failed: Option<String>) {
    match failed {
        None => tokio::time::sleep(refetch).await,
        Some(cause) => {
            tracing::warn!(url, cause, "cannot fetch keys");
            tokio::time::sleep(refetch.min(RETRY)).await;
        }
    }
}

impl KeySource for Fetched {
    fn keys(&self, url: &str) -> Option<Arc<Keys>> {
        let map = self.0.read().unwrap_or_else(PoisonError::into_inner);
        map.get(url).filter(|(_, at)| at.elapsed() < LIFETIME).map(|(keys, _)| keys.clone())
    }

    fn refresh<'a>(&'a self, url: &'a str) -> BoxFuture<'a, Result<Arc<Keys>, Fault>> {
        Box::pin(fetch(self, url))
    }
}

async fn fetch(fetched: &Fetched, url: &str) -> Result<Arc<Keys>, Fault> {
    let failed = |cause: String| Fault::us(Code::InternalError).caused_by(format!("keys at {url}: {cause}"));
    let body = match timeout(PATIENCE, get(url)).await {
        Ok(body) => body.map_err(failed)?,
        Err(_) => return Err(failed("no answer in time".into())),
    };
    let keys = Arc::new(Keys::from_jwks(&body).map_err(|error| failed(error.to_string()))?);
    fetched.keep(url, keys.clone());
    Ok(keys)
}

/// One small document over HTTP or HTTPS. Redirects are not followed: a key comes from where the config says.
async fn get(url: &str) -> Result<Bytes, String> {
    let uri: Uri = url.parse().map_err(|error| format!("{error}"))?;
    let (Some(scheme), Some(authority)) = (uri.scheme_str(), uri.authority()) else { return Err("not a URL".into()) };
    let origin: Uri = format!("{scheme}://{authority}").parse().map_err(|error| format!("{error}"))?;
    let mut settings = Settings { endpoints: vec![origin], ..Settings::default() };
    settings.health.interval = None;
    settings.idle.max = 0;
    let upstream = Upstream::new("keys", settings).map_err(|error| error.to_string())?;
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    let request = Request::get(path).header(header::ACCEPT, "application/json").body(Full::<Bytes>::default());
    let answer = upstream.forward(request.map_err(|error| error.to_string())?).await.map_err(|fault| fault.chain())?;
    if answer.response.status() != StatusCode::OK {
        return Err(format!("status {}", answer.response.status()));
    }
    let body = Limited::new(answer.response.into_body(), MAX_BYTES).collect().await.map_err(|error| error.to_string())?;
    Ok(body.to_bytes())
}

#[cfg(test)]
mod tests {
    use std::{cell::RefCell, fs, os::unix::fs::PermissionsExt};

    use super::*;

    #[tokio::test]
    async fn a_ring_that_is_put_in_place_is_taken_and_one_that_cannot_be_trusted_never() {
        let folder = tempfile::tempdir().unwrap();
        let (path, beside) = (folder.path().join("policy.json"), folder.path().join("beside.json"));
        let [first, second, exposed, last] = [(); 4].map(|()| Ring::generate(unix_now()).unwrap());
        first.save(&path).unwrap();
        let signing = Signing::new(Ring::load(&path).unwrap());
        let told = RefCell::new(Vec::new());
        let look = async |seen| signing.take(&path, seen, |ring| told.borrow_mut().push(ring.current())).await;
        let mut seen = look(None).await;
        assert!(told.borrow().is_empty(), "it is the one in use");
        second.save(&path).unwrap();
        seen = look(look(seen).await).await;
        assert_eq!(*told.borrow(), [second.current()], "once");
        // Others can read it: its keys are no secret any more.
        exposed.save(&beside).unwrap();
        fs::set_permissions(&beside, fs::Permissions::from_mode(0o644)).unwrap();
        fs::rename(&beside, &path).unwrap();
        seen = look(seen).await;
        fs::write(&path, "{").unwrap();
        seen = look(seen).await;
        fs::remove_file(&path).unwrap();
        seen = look(seen).await;
        assert_eq!((signing.ring().current(), told.borrow().len()), (second.current(), 1));
        last.save(&path).unwrap();
        look(seen).await;
        assert_eq!((signing.ring().current(), told.borrow().len()), (last.current(), 2));
    }
}
