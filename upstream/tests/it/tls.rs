//! Endpoints behind TLS: a named authority is trusted, nothing else is.

use std::{env, fs, sync::Arc, time::Duration};

use headgate_contracts::{Code, Finish};
use headgate_testkit::{dialect::Answer, services::Program};
use headgate_upstream::settings::Tls;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
};
use tokio_rustls::{TlsAcceptor, rustls};

use crate::{code, turn, upstream};

/// Serves one canned stream per request on `localhost`; gives its port and its certificate.
async fn serve(answer: Vec<u8>) -> (u16, String) {
    let pair = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let pem = pair.cert.pem();
    let key = rustls::pki_types::PrivateKeyDer::try_from(pair.signing_key.serialize_der()).unwrap();
    let mut config = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![pair.cert.der().clone()], key)
        .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            let (acceptor, answer) = (acceptor.clone(), answer.clone());
            tokio::spawn(async move {
                let mut tls = acceptor.accept(tcp).await?;
                assert_eq!(tls.get_ref().1.alpn_protocol(), Some(b"http/1.1".as_slice()));
                let mut request = vec![0; 64 << 10];
                while tls.read(&mut request).await? > 0 {
                    let head = format!("HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: {}\r\n\r\n", answer.len());
                    tls.write_all(head.as_bytes()).await?;
                    for byte in answer.chunks(50) {
                        tls.write_all(byte).await?;
                        tls.flush().await?;
                    }
                }
                std::io::Result::Ok(())
            });
        }
    });
    (port, pem)
}

#[tokio::test]
async fn an_answer_over_tls_needs_the_named_authority() {
    let (port, pem) = serve(Answer::openai("m", &["private"]).bytes()).await;
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), pem).unwrap();
    let endpoint = format!("https://localhost:{port}");
    let trusting = upstream(std::slice::from_ref(&endpoint), |settings| settings.tls = Tls { ca: Some(file.path().into()) });
    for _ in 0..3 {
        let (heard, end) = turn(&trusting).await;
        assert_eq!((heard.as_str(), end.unwrap()), ("private", Finish::Stop));
    }
    assert_eq!(trusting.stats().connected.get(), 1, "TLS connections are kept too");

    let (_, other) = serve(Vec::new()).await;
    std::fs::write(file.path(), other).unwrap();
    let wary = upstream(&[endpoint], |settings| settings.tls = Tls { ca: Some(file.path().into()) });
    let (_, end) = turn(&wary).await;
    assert_eq!(code(end), Code::UpstreamConnectFailed);

    std::fs::write(file.path(), "no certificate here").unwrap();
    let mut settings = headgate_upstream::Settings { endpoints: vec!["https://localhost".parse().unwrap()], ..Default::default() };
    settings.tls.ca = Some(file.path().into());
    assert!(headgate_upstream::Upstream::new("chat", settings).is_err());
}

/// Where the test below has its endpoint, for the processes that it starts.
const ENDPOINT: &str = "HEADGATE_TEST_ENDPOINT";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_named_authority_those_of_the_machine_are_trusted_and_no_others() {
    if let Ok(endpoint) = env::var(ENDPOINT) {
        let (heard, end) = turn(&upstream(&[endpoint], |_| {})).await;
        assert_eq!((heard.as_str(), end.unwrap()), ("private", Finish::Stop));
        return;
    }
    let (port, pem) = serve(Answer::openai("m", &["private"]).bytes()).await;
    let (_, other) = serve(Vec::new()).await;
    let folder = tempfile::tempdir().unwrap();
    let machine = async |name: &str, certificates: &str| {
        let file = folder.path().join(name);
        fs::write(&file, certificates).unwrap();
        // What a machine trusts is read from the environment, and that belongs to a process: this test once more, in another one.
        let asking = Program::at(env::current_exe().unwrap()).variable("SSL_CERT_FILE", &file);
        let asking = asking.variable(ENDPOINT, format!("https://localhost:{port}"));
        asking
            .arguments(["--exact", "tls::without_a_named_authority_those_of_the_machine_are_trusted_and_no_others"])
            .run(Duration::from_secs(60))
            .await
    };
    let (status, said) = machine("ours.pem", &pem).await;
    assert!(status.success() && said.contains("1 passed"), "{said}");
    let (status, said) = machine("others.pem", &other).await;
    assert!(!status.success() && said.contains("invalid peer certificate"), "{said}");
}
