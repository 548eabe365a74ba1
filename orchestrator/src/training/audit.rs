//! Writes the audit of training mode, and says a record's place only once it can no longer be lost.
//!
//! In Kafka a chain belongs to one writer and one tenant: two orchestrators need not agree on whose record comes first, which only
//! the topic can say. A record that is not acknowledged stops what it was to tell of; it may be in the topic all the same, and then
//! the next one has its number too.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

#[cfg(feature = "kafka")]
use headgate_contracts::wire::log::rfc3339;
use headgate_contracts::{
    Code, Trace,
    wire::training::{Outcome, TrainingFacts},
};
use headgate_policy::audit;
use tokio::{sync::Mutex, time::timeout};

use super::Fences;

/// How long a record may take; what waits for it is an admin, not a turn.
const PATIENCE: Duration = Duration::from_secs(10);
/// Bits of a fence that are a place in a topic; those above are its epoch. Together they fit a JSON number.
#[cfg(feature = "kafka")]
const OFFSET_BITS: u32 = 40;
/// Who is not known.
pub(super) const UNKNOWN: &str = "unknown";

/// Where records go.
pub(super) enum Target {
    /// A topic, which is opened when it is first written to, and again after a failure.
    #[cfg(feature = "kafka")]
    Topic { topic: Box<crate::events::Topic>, producer: Mutex<Option<crate::events::Producer>>, epoch: u16 },
    /// A file of a process that is alone.
    File { path: PathBuf },
}

/// The audit.
pub(super) struct Audit {
    target: Target,
    fences: Arc<Fences>,
    /// One at a time: each is bound to the one before.
    turn: Mutex<()>,
    /// Attempts that were counted and not written.
    unwritten: AtomicU64,
}

/// What a record says.
#[derive(Debug, Clone)]
pub(super) struct Entry<'a> {
    pub(super) action: &'static str,
    pub(super) actor: &'a str,
    pub(super) tenant: &'a str,
    pub(super) outcome: Outcome,
    pub(super) code: Option<Code>,
    pub(super) fence: Option<u64>,
    pub(super) owner: Option<&'a str>,
    pub(super) session: Option<&'a str>,
    pub(super) reason: Option<&'a str>,
    pub(super) trace: Option<&'a Trace>,
}

impl<'a> Entry<'a> {
    pub(super) fn of(action: &'static str, actor: &'a str, tenant: &'a str, outcome: Outcome) -> Entry<'a> {
        Entry { action, actor, tenant, outcome, code: None, fence: None, owner: None, session: None, reason: None, trace: None }
    }
}

/// A record was not acknowledged in time.
#[derive(Debug, thiserror::Error)]
#[error("the audit of training mode was not acknowledged: {0}")]
pub(super) struct Unaudited(String);

impl Audit {
    pub(super) fn new(target: Target, fences: Arc<Fences>) -> Audit {
        Audit { target, fences, turn: Mutex::new(()), unwritten: AtomicU64::new(0) }
    }

    /// Counts an attempt that gets no record of its own.
    pub(super) fn leave_out(&self) {
        self.unwritten.fetch_add(1, Ordering::Relaxed);
    }

    /// Writes a record; gives its place as a fence, higher than that of every record before it of its tenant.
    ///
    /// Errors: nobody has acknowledged it, and what it tells of must not be done.
    pub(super) async fn write(&self, entry: &Entry<'_>) -> Result<u64, Unaudited> {
        match timeout(PATIENCE, self.written(entry)).await {
            Ok(written) => written,
            Err(_) => Err(Unaudited("no answer in time".to_owned())),
        }
    }

    async fn written(&self, entry: &Entry<'_>) -> Result<u64, Unaudited> {
        let _turn = self.turn.lock().await;
        let unwritten = self.unwritten.load(Ordering::Relaxed);
        let facts = TrainingFacts {
            tenant: entry.tenant.to_owned(),
            outcome: entry.outcome,
            code: entry.code,
            fence: entry.fence,
            owner: entry.owner.map(str::to_owned),
            session: entry.session.map(str::to_owned),
            reason: entry.reason.map(str::to_owned),
            unwritten: (unwritten > 0).then_some(unwritten),
            traceparent: entry.trace.map(Trace::traceparent),
            writer: self.fences.writer(),
        };
        let unfit = |error: &dyn ToString| Unaudited(error.to_string());
        let facts = serde_json::to_value(facts).map_err(|error| unfit(&error))?;
        let at = SystemTime::now();
        let now = at.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let place = match &self.target {
            #[cfg(feature = "kafka")]
            Target::Topic { topic, producer, epoch } => {
                let head = self.fences.head(entry.tenant);
                let (record, line) = audit::Record::after(head, now, entry.action, entry.actor, facts).map_err(|error| unfit(&error))?;
                let id = headgate_contracts::TurnId::fresh().to_string();
                let time = rfc3339(at);
                let traced = entry.trace.map(Trace::traceparent);
                let mut headers = vec![
                    ("ce_specversion", "1.0"),
                    ("ce_id", id.as_str()),
                    ("ce_type", "training.audit.v1"),
                    ("ce_source", "/headgate/orchestrator"),
                    ("ce_time", time.as_str()),
                    ("ce_partitionkey", entry.tenant),
                    ("ce_dataschema", "urn:headgate:events:training.audit.v1"),
                    ("content-type", "application/json"),
                    ("tenant_id", entry.tenant),
                    ("schema_version", "1"),
                ];
                headers.extend(traced.as_deref().map(|traced| ("traceparent", traced)));
                let mut open = producer.lock().await;
                let writer = match &*open {
                    Some(writer) => writer,
                    None => open.insert(opened(*topic.clone()).await?),
                };
                let place = match writer.write(entry.tenant, &headers, &line).await {
                    Ok(place) => place,
                    Err(error) => {
                        // What the topic is like may have changed while its brokers were away.
                        *open = None;
                        return Err(unfit(&error));
                    }
                };
                let (fences, tenant) = (self.fences.clone(), entry.tenant.to_owned());
                blocking(move || fences.advance(&tenant, record.seq, record.hash)).await?.map_err(|error| unfit(&error))?;
                let offset = u64::try_from(place.offset).unwrap_or(u64::MAX).saturating_add(1);
                if offset >> OFFSET_BITS != 0 {
                    return Err(Unaudited("the topic's places are used up: begin the next epoch".to_owned()));
                }
                (u64::from(*epoch) << OFFSET_BITS) | offset
            }
            Target::File { path } => {
                let _ = at;
                let (path, action, actor) = (path.clone(), entry.action, entry.actor.to_owned());
                let append = move || audit::Audit::open(&path).and_then(|mut file| Ok(file.append(now, action, &actor, facts)?.seq));
                blocking(append).await?.map_err(|error| unfit(&error))?
            }
        };
        self.unwritten.fetch_sub(unwritten, Ordering::Relaxed);
        Ok(place)
    }
}

#[cfg(feature = "kafka")]
async fn opened(topic: crate::events::Topic) -> Result<crate::events::Producer, Unaudited> {
    let here = tokio::runtime::Handle::current();
    // It asks about the topic, and that blocks.
    let open = move || here.block_on(crate::events::Producer::open(&topic, PATIENCE / 2));
    blocking(open).await?.map_err(|error| Unaudited(error.to_string()))
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Unaudited> {
    tokio::task::spawn_blocking(work).await.map_err(|error| Unaudited(error.to_string()))
}
