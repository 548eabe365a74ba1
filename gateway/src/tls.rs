//! TLS towards clients: rustls with aws-lc-rs, TLS 1.2 and 1.3, ALPN for HTTP/2 and HTTP/1.1, certificates exchanged while
//! connections live.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use arc_swap::ArcSwap;
use rustls::{
    ServerConfig,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, server::TlsStream};

/// Why a certificate cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Unusable {
    /// A file cannot be read as PEM.
    #[error("cannot read {what} from {}", path.display())]
    File {
        /// `certificates` or `a private key`.
        what: &'static str,
        /// Which file.
        path: PathBuf,
        /// Why.
        source: rustls::pki_types::pem::Error,
    },
    /// There is no certificate in the file.
    #[error("no certificate in {}", .0.display())]
    Empty(PathBuf),
    /// The key does not fit, or is of a kind that cannot sign.
    #[error("the key in {} does not fit the certificate", path.display())]
    Key {
        /// The key's file.
        path: PathBuf,
        /// Why.
        source: rustls::Error,
    },
    /// The TLS library refuses the set-up.
    #[error("TLS cannot be set up")]
    Setup(#[from] rustls::Error),
}

/// The acceptor of a listener, and the certificate that new handshakes get.
#[derive(Clone)]
pub struct Tls {
    acceptor: TlsAcceptor,
    certificate: Arc<Certificate>,
}

struct Certificate {
    files: (PathBuf, PathBuf),
    current: ArcSwap<CertifiedKey>,
}

impl std::fmt::Debug for Certificate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Certificate").field("file", &self.files.0).finish_non_exhaustive()
    }
}

impl ResolvesServerCert for Certificate {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current.load_full())
    }
}

impl Tls {
    /// Reads a PEM chain and its key.
    pub fn load(chain: &Path, key: &Path) -> Result<Tls, Unusable> {
        let current = ArcSwap::from_pointee(read(chain, key)?);
        let certificate = Arc::new(Certificate { files: (chain.to_owned(), key.to_owned()), current });
        let mut config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_cert_resolver(certificate.clone());
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(Tls { acceptor: TlsAcceptor::from(Arc::new(config)), certificate })
    }

    /// Reads the files again. New handshakes get the new pair; a pair that does not fit leaves the old one in place.
    pub fn reload(&self) -> Result<(), Unusable> {
        let (chain, key) = &self.certificate.files;
        self.certificate.current.store(Arc::new(read(chain, key)?));
        Ok(())
    }

    pub(crate) async fn accept(&self, socket: TcpStream) -> io::Result<TlsStream<TcpStream>> {
        self.acceptor.accept(socket).await
    }
}

fn read(chain: &Path, key: &Path) -> Result<CertifiedKey, Unusable> {
    let certificates = CertificateDer::pem_file_iter(chain).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let certificates = certificates.map_err(|source| Unusable::File { what: "certificates", path: chain.into(), source })?;
    if certificates.is_empty() {
        return Err(Unusable::Empty(chain.into()));
    }
    let private = PrivateKeyDer::from_pem_file(key).map_err(|source| Unusable::File { what: "a private key", path: key.into(), source })?;
    CertifiedKey::from_der(certificates, private, &aws_lc_rs::default_provider())
        .map_err(|source| Unusable::Key { path: key.into(), source })
}
