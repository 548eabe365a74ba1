//! Sessions and their turns: begins turns, finds running ones again, stops them.

use std::{
    collections::HashMap,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::Duration,
};

use futures_util::FutureExt;
use headgate_contracts::{
    Code, Credential, Fault, Gone, OnDisconnect, Principal, Prompt, Record, SessionId, Stop, Subject, TenantId, Turn, TurnId,
};
use headgate_policy::Digest;
use tokio::sync::Semaphore;

use crate::{
    drive::Drive,
    live::Route,
    outbox::{Hook, Reader, Stay, outbox},
    telemetry::Watch,
    turn,
    voice::Voice,
};

/// The most ended turns that are kept for clients that may come back: beyond it a turn is gone when it ends.
const MAX_KEPT: usize = 1024;

/// The fewest keys that are looked through for turns that are gone.
const MIN_SWEPT: usize = 128;
/// How long the turn of an idempotency key is kept once it has ended, for the copies of its request.
const KEY_KEPT: Duration = Duration::from_secs(60);

/// The turns that are running, or kept for a client that may come back.
#[derive(Clone)]
pub struct Turns(Arc<Shared>);

struct Shared {
    map: Mutex<HashMap<TurnId, Kept>>,
    keyed: Mutex<Keyed>,
    keeping: Arc<Semaphore>,
    places: Arc<Semaphore>,
}

struct Kept {
    hook: Hook,
    owner: Arc<OnceLock<Principal>>,
}

/// A request that may come more than once and is answered by one turn: the client's key, and whose it is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Key {
    /// The route.
    pub route: Arc<str>,
    /// Who asks: the same key of another tenant or subject is another key.
    pub tenant: TenantId,
    /// Who asks.
    pub subject: Subject,
    /// What the client wrote.
    pub key: String,
}

/// The turns that a client gave a key: at most twice as many as there are, or [`MIN_SWEPT`].
#[derive(Default)]
struct Keyed {
    asked: HashMap<Key, Asked>,
    /// How many there were when those whose turn is gone were last thrown away.
    swept: usize,
}

/// What was asked under a key, and the turn that answers.
struct Asked {
    body: Digest,
    turn: TurnId,
    session: SessionId,
    hook: Hook,
}

/// A turn that has begun.
pub struct Begun {
    /// Its id.
    pub turn: TurnId,
    /// Its session.
    pub session: SessionId,
    /// What runs it.
    pub drive: Drive,
    /// Where its events come out.
    pub reader: Reader,
}

impl Turns {
    fn map(&self) -> MutexGuard<'_, HashMap<TurnId, Kept>> {
        self.0.map.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Room for `most` turns at once, over all connections: a socket or an HTTP/2 connection carries many, and the memory
    /// ceiling printed at start-up counts on it.
    pub fn new(most: usize) -> Turns {
        let places = Arc::new(Semaphore::new(most.min(Semaphore::MAX_PERMITS)));
        Turns(Arc::new(Shared { map: Mutex::default(), keyed: Mutex::default(), keeping: Arc::new(Semaphore::new(MAX_KEPT)), places }))
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.map().len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.map().is_empty()
    }

    /// Begins a turn: nothing happens yet, the drive has to be polled.
    ///
    /// Errors: `overloaded`, while as many turns run as may.
    pub fn begin(&self, route: &Arc<Route>, prompt: Prompt, voice: Voice) -> Result<Begun, Stop> {
        Ok(self.start(route, prompt, voice, None)?.0)
    }

    /// Begins a turn, or comes to the one that answers a copy of this request: racing copies have one turn, and it can be read
    /// for a while after its end. One that came to nothing (it failed, was stopped, its clients left) frees its key.
    ///
    /// `body`: what makes two requests with the same key copies of each other.
    /// Errors: `idempotency_mismatch`, where the key was used for another body; those of [`Turns::begin`].
    pub fn begin_once(&self, route: &Arc<Route>, prompt: Prompt, voice: Voice, key: Key, body: Digest) -> Result<Begun, Stop> {
        // Held over the beginning, which waits for nothing: of two copies one has to be the first.
        let mut keyed = self.0.keyed.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(asked) = keyed.asked.get(&key).filter(|asked| asked.hook.is_good()) {
            if asked.body != body {
                return Err(Fault::client(Code::IdempotencyMismatch).into());
            }
            if let Some(reader) = asked.hook.read(None) {
                return Ok(Begun { turn: asked.turn, session: asked.session.clone(), drive: Drive::elsewhere(), reader });
            }
        }
        let (begun, hook) = self.start(route, prompt, voice, Some(KEY_KEPT))?;
        if keyed.asked.len() >= 2 * keyed.swept.max(MIN_SWEPT / 2) {
            keyed.asked.retain(|_, asked| asked.hook.is_here());
            keyed.swept = keyed.asked.len();
        }
        keyed.asked.insert(key, Asked { body, turn: begun.turn, session: begun.session.clone(), hook });
        Ok(begun)
    }

    /// `kept`: how long the turn is kept after its end, whatever its route says of clients that leave.
    fn start(&self, route: &Arc<Route>, prompt: Prompt, voice: Voice, kept: Option<Duration>) -> Result<(Begun, Hook), Stop> {
        let place = self.0.places.clone().try_acquire_owned();
        let place = place.map_err(|_| Fault::us(Code::Overloaded).after(Duration::from_secs(1)))?;
        let (id, session) = (prompt.turn, prompt.session.clone());
        let mut turn =
            Turn { id, session: session.clone(), route: route.plan.name.clone(), flow: route.plan.flow.clone(), record: Record::default() };
        // A filter that cannot even start costs its own turn, not the connection with its neighbours.
        let chain = catch_unwind(AssertUnwindSafe(|| headgate_filters::chain(&route.filters, &mut turn)));
        let (outbox, reader) = outbox(&turn, voice);
        let owner = Arc::new(OnceLock::new());
        let hook = outbox.hook();
        let kept = match turn.flow.on_disconnect {
            OnDisconnect::Cancel => kept,
            OnDisconnect::Grace(patience) | OnDisconnect::Drain(patience) => kept.max(Some(patience)),
        };
        let entry = self.enter(id, hook.clone(), owner.clone(), kept);
        let watch = Watch::begin(route.clone(), &prompt, owner);
        let upstream = route.upstream.clone();
        let drive = match chain {
            Ok(chain) => Drive::new(turn::run(turn, Box::new(prompt), chain, upstream, outbox, watch).map(|()| drop((entry, place)))),
            // Without a chain there is no turn: its outbox and its watch, dropped, say so.
            Err(_) => Drive::elsewhere(),
        };
        Ok((Begun { turn: id, session, drive, reader }, hook))
    }

    fn enter(&self, id: TurnId, hook: Hook, owner: Arc<OnceLock<Principal>>, kept: Option<Duration>) -> Entry {
        let keep = kept.and_then(|patience| hook.stay().map(|stay| (stay, patience)));
        self.map().insert(id, Kept { hook, owner });
        Entry { turns: self.clone(), id, keep }
    }

    /// The hook of a turn that `principal` owns. Another's turn is simply not there.
    pub fn find(&self, id: TurnId, principal: &Principal) -> Result<Hook, Stop> {
        let map = self.map();
        let kept = map
            .get(&id)
            .filter(|kept| kept.owner.get().is_some_and(|owner| owner.tenant == principal.tenant && owner.subject == principal.subject));
        kept.map(|kept| kept.hook.clone()).ok_or_else(|| Stop::Failed(Fault::client(Code::SessionNotFound)))
    }

    /// Ends every turn: the drain ran out of time.
    pub fn stop_all(&self, why: Gone) -> usize {
        let hooks: Vec<Hook> = self.map().values().map(|kept| kept.hook.clone()).collect();
        hooks.into_iter().filter(|hook| hook.stop(why)).count()
    }
}

/// A turn's place among the running ones; gone with it, or kept a while for whoever comes back.
struct Entry {
    turns: Turns,
    id: TurnId,
    keep: Option<(Stay, Duration)>,
}

impl Drop for Entry {
    fn drop(&mut self) {
        let (turns, id) = (self.turns.clone(), self.id);
        let place = turns.0.keeping.clone().try_acquire_owned();
        match (self.keep.take(), place, tokio::runtime::Handle::try_current()) {
            (Some((stay, patience)), Ok(place), Ok(runtime)) => {
                runtime.spawn(async move {
                    tokio::time::sleep(patience).await;
                    turns.map().remove(&id);
                    drop((stay, place));
                });
            }
            _ => {
                turns.map().remove(&id);
            }
        }
    }
}

/// Who a credential belongs to, as the route's own filters say: for calls that are not turns.
pub async fn identify(route: &Route, credential: Credential) -> Result<Principal, Stop> {
    let mut principal = Principal::anonymous();
    for admit in route.filters.iter().filter_map(|built| built.admit.as_ref()) {
        principal = admit.admit(&credential).await?;
    }
    Ok(principal)
}
