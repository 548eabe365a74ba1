//! Connections to one endpoint: name, TCP, TLS.

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures_util::{StreamExt, stream::FuturesUnordered};
use headgate_contracts::may_serve;
use rustls::{ClientConfig, RootCertStore, pki_types::ServerName};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpStream, lookup_host},
    time::timeout,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::settings::{Invalid, Tls};

/// Where to connect, and how.
pub(crate) struct Target {
    pub(crate) host: Box<str>,
    pub(crate) port: u16,
    pub(crate) tls: Option<(TlsConnector, ServerName<'static>)>,
}

/// Before the next address is tried beside the one that does not answer (RFC 8305 section 5 recommends 250 ms). Shorter than
/// its, for all of them share one second.
const STAGGER: Duration = Duration::from_millis(150);

impl Target {
    /// Connects to the first address that takes us. The caller sets the deadline; dropping the future closes what was opened.
    pub(crate) async fn connect(&self) -> io::Result<Io> {
        // Looked up for every connection: the system's resolver caches, and a name that moves is followed at once.
        let tcp = first_of(services(lookup_host((&*self.host, self.port)).await?)).await?;
        tcp.set_nodelay(true)?;
        match &self.tls {
            None => Ok(Io::Plain(tcp)),
            Some((tls, name)) => Ok(Io::Tls(Box::new(tls.connect(name.clone(), tcp).await?))),
        }
    }
}

/// Those of a name's addresses that a service may have. Whoever answers for a name may answer with any address, and what a
/// config must not name it must not lead to by a detour.
fn services(addresses: impl Iterator<Item = SocketAddr>) -> impl Iterator<Item = SocketAddr> {
    addresses.filter(|address| may_serve(address.ip()))
}

/// Tries one address after the other: the next one once the last has failed, or has been silent for a while.
async fn first_of(mut addresses: impl Iterator<Item = SocketAddr>) -> io::Result<TcpStream> {
    let mut trying = FuturesUnordered::new();
    let mut failed = io::Error::new(io::ErrorKind::NotFound, "the name has no address that a service may have");
    loop {
        let next = addresses.next();
        let more = next.is_some();
        trying.extend(next.map(TcpStream::connect));
        let tried = if more { timeout(STAGGER, trying.next()).await } else { Ok(trying.next().await) };
        match tried {
            Ok(Some(Ok(tcp))) => return Ok(tcp),
            Ok(Some(Err(error))) => failed = error,
            Ok(None) => return Err(failed),
            Err(_) => {}
        }
    }
}

/// TLS as upstreams need it: HTTP/1.1 only, one connection per open answer, so that slow answers cannot starve each other.
pub(crate) fn tls(settings: &Tls) -> Result<TlsConnector, Invalid> {
    let mut roots = RootCertStore::empty();
    match &settings.ca {
        Some(path) => {
            let unreadable = |source: Box<dyn std::error::Error + Send + Sync>| Invalid::Ca { path: path.clone(), source };
            let pem = std::fs::read(path).map_err(|error| unreadable(error.into()))?;
            for certificate in rustls::pki_types::pem::PemObject::pem_slice_iter(&pem) {
                let certificate = certificate.map_err(|error: rustls::pki_types::pem::Error| unreadable(error.to_string().into()))?;
                roots.add(certificate).map_err(|error| unreadable(error.into()))?;
            }
            if roots.is_empty() {
                return Err(unreadable("the file holds no certificate".into()));
            }
        }
        None => {
            // Some certificates of a system store are often unusable; what counts is that any are left.
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
            if roots.is_empty() {
                return Err(Invalid::NoRoots);
            }
        }
    }
    // The provider is named, not the process's default: pingora would install another one.
    let mut config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|_| Invalid::Setting { name: "tls", expected: "a provider with TLS 1.2 or 1.3" })?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsConnector::from(Arc::new(config)))
}

/// A connection to an endpoint.
pub(crate) enum Io {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl Io {
    /// The connection below.
    pub(crate) fn tcp(&self) -> &TcpStream {
        match self {
            Io::Plain(tcp) => tcp,
            Io::Tls(tls) => tls.get_ref().0,
        }
    }
}

impl AsyncRead for Io {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Io::Plain(tcp) => Pin::new(tcp).poll_read(cx, buffer),
            Io::Tls(tls) => Pin::new(tls).poll_read(cx, buffer),
        }
    }
}

impl AsyncWrite for Io {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Io::Plain(tcp) => Pin::new(tcp).poll_write(cx, bytes),
            Io::Tls(tls) => Pin::new(tls).poll_write(cx, bytes),
        }
    }
    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Io::Plain(tcp) => Pin::new(tcp).poll_flush(cx),
            Io::Tls(tls) => Pin::new(tls).poll_flush(cx),
        }
    }
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Io::Plain(tcp) => Pin::new(tcp).poll_shutdown(cx),
            Io::Tls(tls) => Pin::new(tls).poll_shutdown(cx),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use headgate_testkit::services::free_addr;
    use tokio::net::TcpListener;

    #[tokio::test]
    async fn a_later_address_serves_when_earlier_ones_refuse() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let tcp = first_of([free_addr(), free_addr(), address].into_iter()).await.unwrap();
        assert_eq!(tcp.peer_addr().unwrap(), address);
    }

    #[tokio::test]
    async fn a_name_that_leads_to_the_clouds_metadata_leads_nowhere() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let moved = ["169.254.169.254:80", "[::ffff:169.254.169.254]:80", "[fe80::1]:80"].map(|moved| moved.parse().unwrap());
        assert_eq!(first_of(services(moved.into_iter())).await.unwrap_err().kind(), io::ErrorKind::NotFound);
        // What it leads to besides is tried.
        let tcp = first_of(services(moved.into_iter().chain([address]))).await.unwrap();
        assert_eq!(tcp.peer_addr().unwrap(), address);
    }

    #[tokio::test]
    async fn no_address_and_no_listener_are_errors() {
        assert_eq!(first_of(std::iter::empty()).await.unwrap_err().kind(), io::ErrorKind::NotFound);
        assert_eq!(first_of([free_addr()].into_iter()).await.unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    }
}
