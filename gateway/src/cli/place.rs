//! Where a URL of the command line leads, and how to ask there for something.

use std::{io, sync::Arc, time::Duration};

use headgate_contracts::Secret;
use http::{HeaderMap, HeaderValue, Response, Uri, header};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, RootCertStore, pki_types::ServerName};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::TlsConnector;

/// How long a connection may take to be made, TLS and WebSocket handshakes included.
pub(super) const CONNECT_PATIENCE: Duration = Duration::from_secs(10);

/// What a URL leads to, and how to get there.
pub(super) struct Place {
    host: String,
    port: u16,
    tls: Option<(TlsConnector, ServerName<'static>)>,
    pub(super) authority: HeaderValue,
    pub(super) path: String,
}

/// Why a URL is no place to go.
#[derive(Debug, thiserror::Error)]
pub(super) enum BadUrl {
    #[error("the URL must begin with http:// or https://")]
    Scheme,
    #[error("the URL must name a host, such as http://127.0.0.1:8080")]
    Host,
    #[error("the URL must not hold a name or password: use --token")]
    UserInfo,
    #[error("the URL must not have a query: it says where, and nothing else")]
    Query,
    #[error("this system has no certificates to check a server by; name some in SSL_CERT_FILE")]
    NoRoots,
    #[error("cannot speak TLS")]
    Tls(#[from] rustls::Error),
}

impl Place {
    /// `path`: where the URL names none.
    pub(super) fn of(url: &Uri, path: &str) -> Result<Place, BadUrl> {
        let is_tls = match url.scheme_str() {
            Some("http") => false,
            Some("https") => true,
            _ => return Err(BadUrl::Scheme),
        };
        let authority = url.authority().ok_or(BadUrl::Host)?;
        if authority.as_str().contains('@') {
            return Err(BadUrl::UserInfo);
        }
        if url.query().is_some() {
            return Err(BadUrl::Query);
        }
        let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
        let tls = match is_tls {
            false => None,
            true => Some((connector()?, ServerName::try_from(host.clone()).map_err(|_| BadUrl::Host)?)),
        };
        let path = match url.path().trim_end_matches('/') {
            "" => path,
            named => named,
        };
        Ok(Place {
            port: authority.port_u16().unwrap_or(if is_tls { 443 } else { 80 }),
            authority: HeaderValue::from_str(authority.as_str()).map_err(|_| BadUrl::Host)?,
            path: path.to_owned(),
            host,
            tls,
        })
    }

    /// Whether others on the way can read along.
    pub(super) fn is_exposed(&self) -> bool {
        let is_here = self.host == "localhost" || self.host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback());
        self.tls.is_none() && !is_here
    }

    pub(super) async fn connect(&self) -> io::Result<Box<dyn Wire>> {
        let connecting = async {
            let tcp = TcpStream::connect((&*self.host, self.port)).await?;
            tcp.set_nodelay(true)?;
            Ok(match &self.tls {
                None => Box::new(tcp) as Box<dyn Wire>,
                Some((tls, name)) => Box::new(tls.connect(name.clone(), tcp).await?),
            })
        };
        timeout(CONNECT_PATIENCE, connecting).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
    }

    /// One request on a connection of its own, which lives as long as the response is read.
    pub(super) async fn ask(
        &self,
        token: Option<&Secret>,
        request: http::request::Builder,
        body: Vec<u8>,
    ) -> Result<Response<Incoming>, Unreached> {
        let mut request = request.body(Full::<Bytes>::from(body))?;
        sign(token, request.headers_mut())?;
        request.headers_mut().insert(header::HOST, self.authority.clone());
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(self.connect().await?)).await?;
        // Ends with the response: with its last byte, or when its body is dropped.
        tokio::spawn(connection);
        Ok(sender.send_request(request).await?)
    }
}

/// Shows who asks.
pub(super) fn sign(token: Option<&Secret>, headers: &mut HeaderMap) -> Result<(), Unreached> {
    if let Some(token) = token {
        let mut value = HeaderValue::try_from(format!("Bearer {}", token.expose())).map_err(|_| Unreached::Token)?;
        value.set_sensitive(true);
        headers.insert(header::AUTHORIZATION, value);
    }
    Ok(())
}

/// A token as it is given on the command line or kept in a file.
pub(super) fn token(text: &str) -> Result<Secret, &'static str> {
    let text = text.trim();
    let is_token = !text.is_empty() && text.bytes().all(|b| b.is_ascii_graphic());
    if is_token { Ok(Secret::new(text)) } else { Err("a token has no spaces and only ASCII characters") }
}

/// Why there is no response.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unreached {
    #[error("cannot connect")]
    Connect(#[from] io::Error),
    #[error("the connection broke")]
    Broken(#[from] hyper::Error),
    #[error("this cannot be asked for")]
    Unfit(#[from] http::Error),
    #[error("a token that no header can hold")]
    Token,
}

fn connector() -> Result<TlsConnector, BadUrl> {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if roots.is_empty() {
        return Err(BadUrl::NoRoots);
    }
    let mut config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsConnector::from(Arc::new(config)))
}

/// A connection, private or not.
pub(super) trait Wire: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Wire for T {}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(url: &str) -> Result<Place, BadUrl> {
        Place::of(&url.parse().unwrap(), "/v1/chat/stream")
    }

    #[test]
    fn a_url_names_the_gateway_and_may_name_the_route() {
        for (url, host, port, path) in [
            ("http://127.0.0.1:8080", "127.0.0.1", 8080, "/v1/chat/stream"),
            ("http://gate/", "gate", 80, "/v1/chat/stream"),
            ("http://[::1]:9000/team/chat/", "::1", 9000, "/team/chat"),
        ] {
            let place = place(url).unwrap_or_else(|error| panic!("{url}: {error}"));
            assert_eq!((&*place.host, place.port, &*place.path), (host, port, path), "{url}");
        }
    }

    #[test]
    fn a_url_that_would_be_misread_is_refused() {
        assert!(matches!(place("ftp://gate/"), Err(BadUrl::Scheme)));
        assert!(matches!(place("/v1/chat"), Err(BadUrl::Scheme)));
        assert!(matches!(place("http://me:secret@gate/"), Err(BadUrl::UserInfo)));
        assert!(matches!(place("http://gate/?token=x"), Err(BadUrl::Query)));
    }

    #[test]
    fn a_token_is_exposed_only_where_others_can_read_along() {
        for (url, exposed) in
            [("http://127.0.0.1:1", false), ("http://localhost:1", false), ("http://[::1]", false), ("http://10.0.0.1", true)]
        {
            assert_eq!(place(url).map(|place| place.is_exposed()).ok(), Some(exposed), "{url}");
        }
    }
}
