//! TLS: both versions of HTTP by ALPN, certificates exchanged while connections live, and no patience for handshakes.

use std::{sync::Arc, time::Duration};

use headgate_testkit::{
    answer::{Judge, Kind},
    client::{Http1, Http2, Request},
    dialect::{Answer, Cut},
    upstream::{Script, Upstream},
    within,
};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, ServerName},
};
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::support::{Gateway, Setup, start};

const SOON: Duration = Duration::from_secs(5);

struct Pair {
    pem: String,
    key: String,
    der: CertificateDer<'static>,
}

fn pair() -> Pair {
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    Pair { pem: made.cert.pem(), key: made.signing_key.serialize_pem(), der: made.cert.der().clone() }
}

fn put(gateway: &Gateway, certificate: &str, key: &str) {
    std::fs::write(gateway.folder.path().join("a.pem"), certificate).unwrap();
    std::fs::write(gateway.folder.path().join("a.key"), key).unwrap();
}

fn setup(pair: &Pair) -> Setup {
    Setup::new().top("tls: { certificate: a.pem, key: a.key }").file("a.pem", pair.pem.clone()).file("a.key", pair.key.clone())
}

async fn upstream() -> Upstream {
    Upstream::always(Script::stream(Answer::openai("demo", &["Hello"]).cut(Cut::Events))).await
}

/// A handshake with a client that trusts this certificate alone.
async fn connect(gateway: &Gateway, trusted: &Pair, alpn: &[&[u8]]) -> std::io::Result<TlsStream<TcpStream>> {
    let mut roots = RootCertStore::empty();
    roots.add(trusted.der.clone()).unwrap();
    let builder = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()));
    let mut config = builder.with_safe_default_protocol_versions().unwrap().with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    let socket = TcpStream::connect(gateway.addr).await?;
    let name = ServerName::try_from("localhost").unwrap();
    within(SOON, TlsConnector::from(Arc::new(config)).connect(name, socket), "a handshake").await
}

async fn turn(stream: TlsStream<TcpStream>) -> String {
    let mut client = Http1::over(stream, "localhost");
    client.send(&Request::turn("hi")).await;
    client.events(Judge::new(Kind::Client)).await.unwrap().rest().await.unwrap().text()
}

#[tokio::test]
async fn both_versions_of_http_are_spoken_as_the_client_chooses() {
    let (upstream, pair) = (upstream().await, pair());
    let gateway = setup(&pair).start(&upstream.url()).await;
    for alpn in [&[b"http/1.1".as_slice()][..], &[]] {
        let stream = connect(&gateway, &pair, alpn).await.unwrap();
        assert_eq!(stream.get_ref().1.alpn_protocol(), alpn.first().copied());
        assert_eq!(turn(stream).await, "Hello");
    }
    let stream = connect(&gateway, &pair, &[b"h2", b"http/1.1"]).await.unwrap();
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(b"h2".as_slice()));
    let mut client = Http2::over(stream, "localhost").await.unwrap();
    let events = client.events(&Request::turn("hi"), Judge::new(Kind::Client)).await.unwrap();
    assert_eq!(events.rest().await.unwrap().text(), "Hello");
    assert!(connect(&gateway, &pair, &[b"smtp"]).await.is_err());
}

#[tokio::test]
async fn a_certificate_is_exchanged_while_connections_live_and_a_wrong_pair_is_not() {
    let (upstream, old, new) = (upstream().await, pair(), pair());
    let gateway = setup(&old).start(&upstream.url()).await;
    let before = connect(&gateway, &old, &[]).await.unwrap();
    let tls = gateway.process.tls.clone().expect("TLS is on");
    for (certificate, key) in [(&new.pem, &old.key), (&new.pem, &"garbage".to_owned()), (&String::new(), &new.key)] {
        put(&gateway, certificate, key);
        let refused = tls.reload().unwrap_err();
        assert!(!format!("{refused} {refused:?}").contains("PRIVATE"), "{refused}");
        assert!(connect(&gateway, &old, &[]).await.is_ok() && connect(&gateway, &new, &[]).await.is_err());
    }
    put(&gateway, &new.pem, &new.key);
    tls.reload().unwrap();
    assert!(connect(&gateway, &old, &[]).await.is_err());
    assert_eq!(turn(connect(&gateway, &new, &[]).await.unwrap()).await, "Hello");
    assert_eq!(turn(before).await, "Hello", "who was connected stays connected");
}

#[tokio::test]
async fn a_handshake_that_does_not_come_is_not_waited_for() {
    let (upstream, pair) = (upstream().await, pair());
    let (mut plan, folder) = setup(&pair).plan(&upstream.url());
    plan.limits.handshake = Duration::from_millis(300);
    let gateway = start(&plan, folder).await;
    let beginnings: [&[u8]; 3] = [b"", b"\x16\x03\x01\x02\x00\x01", b"GET / HTTP/1.1\r\nhost: h\r\n\r\n"];
    for bytes in beginnings {
        let mut client = Http1::connect(gateway.addr).await;
        client.send_bytes(bytes).await;
        let ended = async { while client.read_bytes(4096).await.is_ok_and(|bytes| !bytes.is_empty()) {} };
        within(SOON, ended, "the handshake to be given up").await;
    }
    let free = async {
        while gateway.process.app.drain().connections() > 0 {
            tokio::task::yield_now().await
        }
    };
    within(SOON, free, "all places to be free").await;
}
