//! A wire that can be made bad: stands between two peers and pauses, cuts, resets or slows what passes.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

use crate::soon;

/// The most one step carries, in bytes.
const STEP_BYTES: usize = 16 * 1024;
/// A slowed flow moves this often in a second.
const STEPS_PER_SECOND: u64 = 50;
/// How long a cut connection waits for its peers to close too.
const LINGER: Duration = Duration::from_secs(5);

/// What happens to the bytes of one direction, on every connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flow {
    /// They pass.
    Pass,
    /// They wait, and so does the end of the stream: the peer is silent, not gone. Also what a vanished machine looks like.
    Pause,
    /// After so many bytes of a connection in this direction, both its ends see a FIN.
    CutAfter(u64),
    /// After so many bytes of a connection in this direction, both its ends see a RST.
    ResetAfter(u64),
    /// At most so many bytes pass in a second, on each connection.
    PerSecond(u64),
}

/// How much has passed, over all connections, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Traffic {
    /// Connections accepted.
    pub connections: usize,
    /// From the side that connects.
    pub up_bytes: u64,
    /// To the side that connects.
    pub down_bytes: u64,
}

/// A listening proxy. Dropped, it resets nothing and closes everything.
pub struct Proxy {
    addr: SocketAddr,
    up: watch::Sender<Flow>,
    down: watch::Sender<Flow>,
    traffic: watch::Receiver<Traffic>,
    accepting: JoinHandle<()>,
}

impl Proxy {
    /// Forwards every connection to `target`; everything passes until said otherwise.
    pub async fn start(target: SocketAddr) -> Proxy {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a free port");
        let addr = listener.local_addr().expect("an address");
        let (up, up_flow) = watch::channel(Flow::Pass);
        let (down, down_flow) = watch::channel(Flow::Pass);
        let (count, traffic) = watch::channel(Traffic::default());
        let accepting = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                tokio::select! {
                    Some(_) = connections.join_next() => {}
                    accepted = listener.accept() => {
                        let Ok((client, _)) = accepted else { tokio::task::yield_now().await; continue };
                        count.send_modify(|traffic| traffic.connections += 1);
                        connections.spawn(forward(client, target, up_flow.clone(), down_flow.clone(), count.clone()));
                    }
                }
            }
        });
        Proxy { addr, up, down, traffic, accepting }
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Changes what happens to the bytes of those who connect, on connections that are open too.
    pub fn up(&self, flow: Flow) {
        self.up.send_replace(flow);
    }

    /// Changes what happens to the bytes that go to those who connect.
    pub fn down(&self, flow: Flow) {
        self.down.send_replace(flow);
    }

    /// Changes both directions.
    pub fn both(&self, flow: Flow) {
        self.up(flow);
        self.down(flow);
    }

    /// What has passed so far.
    pub fn traffic(&self) -> Traffic {
        *self.traffic.borrow()
    }

    /// Waits until what has passed is enough for `enough`.
    pub async fn passed(&self, enough: impl Fn(&Traffic) -> bool) -> Traffic {
        let mut traffic = self.traffic.clone();
        *soon(traffic.wait_for(|traffic| enough(traffic)), "enough to pass the proxy").await.expect("the proxy is running")
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// Why a connection is not carried on.
enum Ending {
    Cut,
    Reset,
}

async fn forward(
    mut client: TcpStream,
    target: SocketAddr,
    up: watch::Receiver<Flow>,
    down: watch::Receiver<Flow>,
    count: watch::Sender<Traffic>,
) {
    let Ok(mut server) = TcpStream::connect(target).await else {
        // The client sees what it would have seen without us, as nearly as a connection already accepted can show it.
        let _ = client.set_zero_linger();
        return;
    };
    let _ = client.set_nodelay(true);
    let _ = server.set_nodelay(true);
    let carried = {
        let (from_client, to_client) = client.split();
        let (from_server, to_server) = server.split();
        tokio::try_join!(
            carry(from_client, to_server, up, |bytes| count.send_modify(|traffic| traffic.up_bytes += bytes)),
            carry(from_server, to_client, down, |bytes| count.send_modify(|traffic| traffic.down_bytes += bytes)),
        )
    };
    match carried {
        Ok(_) => {}
        Err(Ending::Reset) => {
            let _ = client.set_zero_linger();
            let _ = server.set_zero_linger();
        }
        Err(Ending::Cut) => {
            let _ = tokio::time::timeout(LINGER, async { tokio::join!(close(&mut client), close(&mut server)) }).await;
        }
    }
}

/// A FIN, and only a FIN: unread bytes would make it a RST, which overtakes what was sent before it.
async fn close(stream: &mut TcpStream) {
    let _ = stream.shutdown().await;
    let mut unread = vec![0; STEP_BYTES];
    while stream.read(&mut unread).await.is_ok_and(|read| read > 0) {}
}

async fn carry(mut from: ReadHalf<'_>, mut to: WriteHalf<'_>, mut flow: watch::Receiver<Flow>, count: impl Fn(u64)) -> Result<(), Ending> {
    let mut buffer = vec![0; STEP_BYTES];
    let mut carried: u64 = 0;
    loop {
        let now = *flow.borrow_and_update();
        let most = match now {
            Flow::Pass => STEP_BYTES as u64,
            Flow::Pause => {
                changed(&mut flow).await;
                continue;
            }
            Flow::CutAfter(bytes) if carried >= bytes => return Err(Ending::Cut),
            Flow::ResetAfter(bytes) if carried >= bytes => return Err(Ending::Reset),
            Flow::CutAfter(bytes) | Flow::ResetAfter(bytes) => bytes - carried,
            Flow::PerSecond(bytes) => (bytes / STEPS_PER_SECOND).max(1),
        };
        let most = usize::try_from(most).unwrap_or(STEP_BYTES).min(STEP_BYTES);
        let read = tokio::select! {
            read = from.read(&mut buffer[..most]) => read.map_err(|_| Ending::Reset)?,
            () = changed(&mut flow) => continue,
        };
        // The flow may have been paused while these bytes came.
        while *flow.borrow_and_update() == Flow::Pause {
            changed(&mut flow).await;
        }
        if read == 0 {
            let _ = to.shutdown().await;
            return Ok(());
        }
        to.write_all(&buffer[..read]).await.map_err(|_| Ending::Reset)?;
        carried += read as u64;
        count(read as u64);
        if let Flow::PerSecond(bytes) = now {
            tokio::time::sleep(Duration::from_secs_f64(read as f64 / bytes.max(1) as f64)).await;
        }
    }
}

/// The next change; never, once nobody is left to make one.
async fn changed(flow: &mut watch::Receiver<Flow>) {
    if flow.changed().await.is_err() {
        std::future::pending::<()>().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::{Chunks, Http1, Request};
    use crate::upstream::{Framing, Script, Upstream};
    use crate::{Broken, within};

    const BODY: usize = 100_000;

    /// A server of one long answer, behind a proxy.
    async fn long() -> (Upstream, Proxy) {
        let server = Upstream::always(Script::reply(200, "text/plain", vec![b'x'; BODY])).await;
        let proxy = Proxy::start(server.addr()).await;
        (server, proxy)
    }

    /// How many bytes a client gets, past all framing, and whether the end was a RST.
    async fn received(proxy: &Proxy) -> (usize, bool) {
        let mut client = Http1::connect(proxy.addr()).await;
        client.send(&Request::get("/")).await;
        let mut got = 0;
        loop {
            match client.read_bytes(1 << 20).await {
                Ok(bytes) if bytes.is_empty() => return (got, false),
                Ok(bytes) => got += bytes.len(),
                Err(Broken::Reset(_)) => return (got, true),
                Err(other) => panic!("{other}"),
            }
        }
    }

    #[tokio::test]
    async fn what_passes_is_unchanged_and_counted() {
        let (_server, proxy) = long().await;
        let mut client = Http1::connect(proxy.addr()).await;
        client.send(&Request::get("/")).await;
        assert_eq!(client.reply().await.unwrap().body.len(), BODY);
        assert!(proxy.passed(|traffic| traffic.down_bytes > BODY as u64).await.up_bytes > 0);
    }

    #[tokio::test]
    async fn a_cut_lets_exactly_so_many_bytes_through() {
        let (_server, proxy) = long().await;
        for bytes in [0, 1, 77, 20_000] {
            proxy.down(Flow::CutAfter(bytes));
            assert_eq!(received(&proxy).await, (bytes as usize, false));
        }
    }

    #[tokio::test]
    async fn a_reset_is_seen_as_a_reset_by_both_ends() {
        let (server, proxy) = long().await;
        proxy.down(Flow::ResetAfter(10));
        let (got, reset) = received(&proxy).await;
        assert!(got <= 10 && reset, "{got} bytes, reset: {reset}");
        assert_eq!(server.closed(1).await.how, crate::upstream::How::Reset);
    }

    #[tokio::test]
    async fn a_paused_wire_tells_nothing_not_even_the_end() {
        let server = Upstream::always(Script::new().read().head(200, Framing::UntilClose, &[]).send("x").close()).await;
        let proxy = Proxy::start(server.addr()).await;
        proxy.down(Flow::Pause);
        let mut client = Http1::connect(proxy.addr()).await;
        client.send(&Request::get("/")).await;
        server.request(0).await;
        assert!(tokio::time::timeout(Duration::from_millis(100), client.head()).await.is_err(), "nothing passes");
        proxy.down(Flow::Pass);
        client.head().await.unwrap();
        assert_eq!(client.chunk().await.unwrap().as_deref(), Some(&b"x"[..]));
        assert_eq!(client.chunk().await.unwrap(), None);
    }

    #[tokio::test]
    async fn a_slow_wire_takes_its_time() {
        let (_server, proxy) = long().await;
        proxy.down(Flow::PerSecond(400_000));
        let began = tokio::time::Instant::now();
        within(Duration::from_secs(10), received_all(&proxy), "a slow answer").await;
        assert!(began.elapsed() > Duration::from_millis(200), "{:?}", began.elapsed());
    }

    async fn received_all(proxy: &Proxy) {
        let mut client = Http1::connect(proxy.addr()).await;
        client.send(&Request::get("/")).await;
        assert_eq!(client.reply().await.unwrap().body.len(), BODY);
    }
}
