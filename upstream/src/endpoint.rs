//! One endpoint: where it is, how busy it is, and the connections kept to it.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll, Waker},
    time::Duration,
};

use http::{HeaderValue, Uri};
use rustls::pki_types::ServerName;
use tokio::{
    io::{AsyncRead, ReadBuf},
    time::Instant,
};
use tokio_rustls::TlsConnector;

use crate::{
    balance::InFlight,
    connect::{Io, Target},
    hop::Sockets,
    http1::Framing,
    settings::{Idle, Invalid},
};

/// One endpoint of an upstream.
pub(crate) struct Endpoint {
    /// Host and port, for the log.
    pub(crate) name: Arc<str>,
    pub(crate) target: Target,
    /// The `Host` header.
    pub(crate) host: HeaderValue,
    /// The path of its URI, without a slash at the end.
    pub(crate) prefix: Box<str>,
    pub(crate) in_flight: InFlight,
    idle: Idle,
    kept: Mutex<VecDeque<Kept>>,
    /// WebSockets, each open for many turns.
    pub(crate) sockets: Sockets,
    rest: Rest,
}

impl Endpoint {
    /// `tls` is asked for a connector only if the endpoint is `https`.
    pub(crate) fn new(uri: &Uri, idle: Idle, tls: impl FnOnce() -> Result<TlsConnector, Invalid>) -> Result<Endpoint, Invalid> {
        let invalid = |expected| Invalid::Endpoint { uri: uri.to_string(), expected };
        let secure = match uri.scheme_str() {
            Some("http") => false,
            Some("https") => true,
            _ => return Err(invalid("expected http:// or https://")),
        };
        let authority = uri.authority().ok_or_else(|| invalid("expected a host"))?;
        if authority.as_str().contains('@') {
            return Err(invalid("a user or password does not belong here; use `authorization`"));
        }
        if uri.query().is_some() {
            return Err(invalid("a query does not belong here"));
        }
        let host = authority.host().trim_start_matches('[').trim_end_matches(']');
        if host.is_empty() {
            return Err(invalid("expected a host"));
        }
        let port = authority.port_u16().unwrap_or(if secure { 443 } else { 80 });
        let name = ServerName::try_from(host.to_owned()).map_err(|_| invalid("expected a name or an address"))?;
        let tls = if secure { Some((tls()?, name)) } else { None };
        Ok(Endpoint {
            name: if host.contains(':') { format!("[{host}]:{port}").into() } else { format!("{host}:{port}").into() },
            target: Target { host: host.into(), port, tls },
            host: HeaderValue::from_str(authority.as_str()).map_err(|_| invalid("expected a host"))?,
            prefix: uri.path().trim_end_matches('/').into(),
            in_flight: InFlight::default(),
            idle,
            kept: Mutex::default(),
            sockets: Sockets::default(),
            rest: Rest::new(),
        })
    }

    /// A connection of an earlier turn that is still good, if there is one: the one used last, since the others may then age.
    pub(crate) fn reuse(&self) -> Option<Io> {
        let now = Instant::now();
        loop {
            let mut kept = self.lock().pop_back()?;
            if now.duration_since(kept.since) < self.idle.timeout && kept.settled() {
                return Some(kept.io);
            }
        }
    }

    /// Keeps a connection for a later turn. `body` is where the last answer stands in its frame: after the last event there may
    /// still be the frame's end to come, and nobody waits for that.
    pub(crate) fn keep(&self, io: Io, body: Framing) {
        if self.idle.max == 0 {
            return;
        }
        let mut kept = self.lock();
        if kept.len() >= self.idle.max {
            kept.pop_front();
        }
        kept.push_back(Kept { io, body, since: Instant::now() });
    }

    /// Closes connections that were kept too long or that the endpoint has closed.
    pub(crate) fn sweep(&self) {
        let now = Instant::now();
        // Taken out meanwhile: reading may close a socket, which is not for a lock.
        let all = std::mem::take(&mut *self.lock());
        let good: VecDeque<_> = all
            .into_iter()
            .filter_map(|mut kept| (now.duration_since(kept.since) < self.idle.timeout && kept.open()).then_some(kept))
            .collect();
        let mut kept = self.lock();
        for one in good.into_iter().rev() {
            if kept.len() < self.idle.max {
                kept.push_front(one);
            }
        }
    }

    pub(crate) fn kept(&self) -> usize {
        self.lock().len() + self.sockets.idle()
    }

    /// Whether it is not resting after failed connections.
    pub(crate) fn awake(&self, now: Instant) -> bool {
        self.rest.over(now)
    }
    /// A connection was made.
    pub(crate) fn worked(&self) {
        self.rest.end();
    }
    /// A connection could not be made: it rests.
    pub(crate) fn failed(&self) {
        self.rest.begin(Instant::now());
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, VecDeque<Kept>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Kept {
    io: Io,
    body: Framing,
    since: Instant,
}

impl Kept {
    /// Whether the connection is open and nothing is left of the last answer.
    fn settled(&mut self) -> bool {
        self.open() && self.body.ended()
    }

    /// Whether the connection is open; swallows the end of the last answer. Never waits.
    fn open(&mut self) -> bool {
        let mut cx = Context::from_waker(Waker::noop());
        let mut space = [0; 512];
        // Two reads: the frame's end, then nothing. Whoever has more to say has not finished.
        for _ in 0..2 {
            let mut buffer = ReadBuf::new(&mut space);
            match Pin::new(&mut self.io).poll_read(&mut cx, &mut buffer) {
                Poll::Pending => return true,
                Poll::Ready(Err(_)) => return false,
                Poll::Ready(Ok(())) => {
                    let mut rest = buffer.filled();
                    if rest.is_empty() {
                        return false;
                    }
                    while !rest.is_empty() {
                        // Bytes behind the frame's end are an answer to nothing: `strip` uses none of them.
                        match self.body.strip(rest) {
                            Ok((0, _)) | Err(_) => return false,
                            Ok((used, _)) => rest = rest.get(used..).unwrap_or_default(),
                        }
                    }
                }
            }
        }
        false
    }
}

/// How long an endpoint that refused connections is passed over: one second, doubling up to sixteen, until one is made.
struct Rest {
    born: Instant,
    until_ms: AtomicU64,
    times: AtomicU64,
}

impl Rest {
    fn new() -> Rest {
        Rest { born: Instant::now(), until_ms: AtomicU64::new(0), times: AtomicU64::new(0) }
    }
    fn over(&self, now: Instant) -> bool {
        self.until_ms.load(Relaxed) <= self.since_birth(now)
    }
    fn begin(&self, now: Instant) {
        let times = self.times.fetch_add(1, Relaxed).min(4);
        self.until_ms.store(self.since_birth(now) + Duration::from_secs(1 << times).as_millis() as u64, Relaxed);
    }
    fn end(&self) {
        self.times.store(0, Relaxed);
        self.until_ms.store(0, Relaxed);
    }
    fn since_birth(&self, now: Instant) -> u64 {
        now.duration_since(self.born).as_millis() as u64
    }
}
