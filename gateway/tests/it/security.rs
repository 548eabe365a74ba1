//! Who may do what: forged headers, traces, tokens, tenants, limits, other people's pages, and filters that break.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use headgate_contracts::{Prompt, Stop, Turn};
use headgate_filters::{BoxFuture, Built, Facts, Filter, Rule, Terms, Text, Verdict};
use headgate_gateway::{
    build,
    live::{Live, Route},
};
use headgate_testkit::{
    answer::Kind,
    client::{Http1, Http2, Request, ask, stream},
    dialect::{Answer, Cut},
    soon,
    upstream::{Script, Upstream},
    within,
    ws::Ws,
};
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use serde_json::{Value, json};
use tokio::sync::Notify;

use crate::support::{Gateway, Setup, key};

const SOON: Duration = Duration::from_secs(5);

fn hello() -> Script {
    Script::stream(Answer::openai("demo", &["Hello"]).cut(Cut::Events))
}

async fn text(gateway: &Gateway, request: &Request) -> String {
    stream(gateway.addr, request, Kind::Client).await.unwrap().rest().await.unwrap().text()
}

#[tokio::test]
async fn forged_headers_never_reach_the_upstream_whatever_their_spelling() {
    let upstream = Upstream::always(hello()).await;
    let gateway = Setup::chain(&["policy_headers"]).start(&upstream.url()).await;
    let names = [
        "Policy-Verdict",
        "policy-version",
        "POLICY_VERDICT",
        "x-policy-mode",
        "X_Policy_Mode",
        "Constitution-Hash",
        "constitution_hash",
        "x-constitution-hash",
        "Content-Digest",
        "content_digest",
        "X-GW-Trust",
        "x-headgate-turn",
        "X_Headgate_Tenant",
        "policy-anything",
    ];
    let forged = |request: Request| names.iter().fold(request, |request, name| request.header(name, "forged").header(name, "forged again"));
    let nominated = |request: Request| request.header("connection", "policy-verdict, x-secret").header("x-secret", "forged");
    text(&gateway, &nominated(forged(Request::turn("hi")))).await;
    let chunks = stream(gateway.addr, &forged(Request::completion("demo", "hi")), Kind::OpenAi).await.unwrap();
    chunks.rest().await.unwrap();
    let mut client = Http2::connect(gateway.addr).await;
    let request = names.iter().fold(Request::turn("hi"), |request, name| request.header(&name.to_ascii_lowercase(), "forged"));
    client.events(&request, headgate_testkit::answer::Judge::new(Kind::Client)).await.unwrap().rest().await.unwrap();
    let mut socket = Ws::open(gateway.addr, &forged(Request::get("/v1/chat/stream"))).await.unwrap();
    socket.ask("r", "hi").await.unwrap();
    let chunked = "POST /v1/chat/stream HTTP/1.1\r\nhost: h\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\ntrailer: policy-verdict\r\n\r\n";
    let turn = json!({"messages": [{"role": "user", "content": "hi"}]}).to_string();
    let mut trailing = Http1::connect(gateway.addr).await;
    trailing.send_bytes(format!("{chunked}{:x}\r\n{turn}\r\n0\r\npolicy-verdict: forged\r\n\r\n", turn.len()).as_bytes()).await;
    assert_eq!(trailing.head().await.unwrap().start, "HTTP/1.1 200 OK");
    drop(trailing);
    let requests = upstream.requests();
    assert_eq!(requests.len(), 5);
    for request in requests {
        assert!(!String::from_utf8_lossy(&request.head.raw).contains("forged"), "{:?}", request.head.headers);
        assert!(request.trailers.is_empty());
        assert_eq!((request.head.all("policy-verdict").count(), request.header("policy-version")), (1, Some("7")));
        assert_eq!(request.header("policy-verdict").unwrap().split('.').count(), 3);
    }
}

#[tokio::test]
async fn what_a_client_writes_beside_its_turn_is_never_forwarded() {
    let upstream = Upstream::always(hello()).await;
    let gateway = Setup::new().start(&upstream.url()).await;
    let request = Request::turn("hi")
        .header("cookie", "a=b")
        .header("x-forwarded-for", "1.2.3.4")
        .header("x-api-key", "k")
        .bearer("t")
        .header("accept-encoding", "gzip")
        .header("te", "trailers");
    text(&gateway, &request).await;
    let twice = "{\"messages\":[{\"role\":\"user\",\"content\":\"first\"}],\"messages\":[{\"role\":\"user\",\"content\":\"second\"}]}";
    text(&gateway, &Request::new("POST", "/v1/chat/stream").header("content-type", "application/json").body(twice)).await;
    let extra = json!({"model": "demo", "stream": true, "messages": [{"role": "user", "content": "hi", "x": "smuggled"}], "extra_body": {"a": "smuggled"}, "logit_bias": {"1": 100}});
    stream(gateway.addr, &Request::post("/v1/chat/completions", &extra), Kind::OpenAi).await.unwrap().rest().await.unwrap();
    let requests = upstream.requests();
    let mut names: Vec<String> = requests[0].head.headers.iter().map(|(name, _)| name.to_ascii_lowercase()).collect();
    names.sort();
    assert_eq!(names, ["accept", "accept-encoding", "content-length", "content-type", "host", "traceparent"]);
    // What is sent is what was read, and nothing but that.
    let sent = String::from_utf8_lossy(&requests[1].body).into_owned();
    assert!(sent.contains("second") && !sent.contains("first"), "{sent}");
    assert!(!String::from_utf8_lossy(&requests[2].body).contains("smuggled"));
}

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const PARENT: &str = "b7ad6b7169203331";

#[tokio::test]
async fn a_trace_is_continued_through_the_gateways_own_span() {
    let upstream = Upstream::always(hello()).await;
    let gateway = Setup::new().start(&upstream.url()).await;
    let request = Request::turn("hi").header("traceparent", &format!("00-{TRACE}-{PARENT}-01")).header("tracestate", "a=1,b=2");
    let events = stream(gateway.addr, &request, Kind::Client).await.unwrap();
    let told = events.head.header("traceparent").unwrap().to_owned();
    events.rest().await.unwrap();
    let sent = upstream.request(0).await;
    let traceparent = sent.header("traceparent").unwrap();
    assert!(traceparent.starts_with(&format!("00-{TRACE}-")) && !traceparent.contains(PARENT), "{traceparent}");
    assert_eq!((told.as_str(), sent.header("tracestate")), (traceparent, Some("a=1,b=2")));
}

#[tokio::test]
async fn a_trace_that_is_none_or_a_strangers_is_begun_anew() {
    let upstream = Upstream::always(hello()).await;
    let trusting = Setup::new().start(&upstream.url()).await;
    let strict = Setup::chain(&["trace: { inbound: restart }"]).start(&upstream.url()).await;
    let good = format!("00-{TRACE}-{PARENT}-01");
    let wrong = [
        "garbage".into(),
        format!("ff-{TRACE}-{PARENT}-01"),
        format!("00-{}-{PARENT}-01", "0".repeat(32)),
        good.to_uppercase(),
        format!("{good}-x"),
    ];
    for traceparent in &wrong {
        text(&trusting, &Request::turn("hi").header("traceparent", traceparent).header("tracestate", "a=1")).await;
    }
    text(&trusting, &Request::turn("hi").header("traceparent", &good).header("traceparent", &good)).await;
    let head = {
        let events =
            stream(strict.addr, &Request::turn("hi").header("traceparent", &good).header("tracestate", "a=1"), Kind::Client).await.unwrap();
        let head = events.head.header("traceparent").unwrap().to_owned();
        events.rest().await.unwrap();
        head
    };
    for request in upstream.requests() {
        let raw = String::from_utf8_lossy(&request.head.raw).into_owned();
        assert!(!raw.contains(TRACE) && !raw.contains("tracestate"), "{raw}");
    }
    assert!(!head.contains(TRACE), "the client is told the trace that is really used: {head}");
    assert_eq!(upstream.requests().last().unwrap().header("traceparent"), Some(head.as_str()));
}

#[tokio::test]
async fn another_tenants_turn_is_not_there() {
    let begun = Answer::openai("demo", &["Hello"]).events()[..2].concat();
    let upstream = Upstream::always(Script::new().read().sse().send(begun).stall()).await;
    let (one, other) = ("hg_one_0123456789abcdef", "hg_two_0123456789abcdef");
    let hash = |key: &str| headgate_filters::auth::KeyHash::of(key).to_string();
    let auth = format!(
        "auth: {{ keys: [{{ key: \"{}\", tenant: acme, subject: u1 }}, {{ key: \"{}\", tenant: zeta, subject: u1 }}] }}",
        hash(one),
        hash(other)
    );
    let gateway = Setup::chain(&[&auth]).start(&upstream.url()).await;
    let mut events = stream(gateway.addr, &Request::turn("hi").bearer(one), Kind::Client).await.unwrap();
    let turn = events.expect().await.text("turn_id").unwrap().to_owned();
    let resume = Request::get(&format!("/v1/chat/stream/{turn}"));
    let stop = Request::post(&format!("/v1/chat/stream/{turn}/stop"), &json!({}));
    let unknown = Request::get("/v1/chat/stream/0193a5f0-7e1c-7000-8000-000000000000");
    let nothing = ask(gateway.addr, &unknown.bearer(other)).await.unwrap();
    for request in [&resume, &stop] {
        let reply = ask(gateway.addr, &request.clone().bearer(other)).await.unwrap();
        assert_eq!((reply.status, reply.text()), (404, nothing.text()), "another's turn looks like none");
        let reply = ask(gateway.addr, request).await.unwrap();
        assert_eq!((reply.status, reply.problem().unwrap().as_str()), (401, "unauthenticated"));
    }
    assert_eq!(ask(gateway.addr, &stop.bearer(one)).await.unwrap().status, 202);
    assert_eq!(events.rest().await.unwrap().error(), Some("stopped"));
}

/// An identity provider over HTTP.
pub(crate) struct Provider {
    pub(crate) server: Upstream,
    published: Arc<Mutex<Vec<Value>>>,
}

pub(crate) struct SigningKey {
    key: EncodingKey,
    jwk: Value,
    kid: String,
}

impl SigningKey {
    pub(crate) fn new(kid: &str) -> SigningKey {
        use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
        let pair = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
        let x = URL_SAFE_NO_PAD.encode(pair.public_key_raw());
        let jwk = json!({"kty": "OKP", "crv": "Ed25519", "use": "sig", "alg": "EdDSA", "kid": kid, "x": x});
        SigningKey { key: EncodingKey::from_ed_der(&pair.serialize_der()), jwk, kid: kid.to_owned() }
    }

    pub(crate) fn token(&self, claims: &Value) -> String {
        let header = Header { kid: Some(self.kid.clone()), ..Header::new(Algorithm::EdDSA) };
        jsonwebtoken::encode(&header, claims, &self.key).unwrap()
    }
}

impl Provider {
    pub(crate) async fn start(keys: &[&SigningKey]) -> Provider {
        let published = Arc::new(Mutex::new(keys.iter().map(|key| key.jwk.clone()).collect::<Vec<_>>()));
        let shown = published.clone();
        let answer = move |_: &headgate_testkit::upstream::Request| {
            Script::reply(200, "application/json", json!({"keys": *shown.lock().unwrap()}).to_string())
        };
        Provider { server: Upstream::answering(answer).await, published }
    }

    pub(crate) fn claims(&self) -> Value {
        json!({"iss": self.server.url(), "aud": "chat", "sub": "u7", "tenant": "acme", "exp": headgate_filters::unix_now() + 300})
    }

    pub(crate) fn auth(&self) -> String {
        format!("auth: {{ jwks: \"{}/jwks.json\", audience: chat }}", self.server.url())
    }
}

pub(crate) fn with(mut claims: Value, name: &str, value: Value) -> Value {
    claims[name] = value;
    claims
}

#[tokio::test]
async fn tokens_of_the_provider_are_let_in_and_no_others() {
    let (key, foreign) = (SigningKey::new("a"), SigningKey::new("a"));
    let provider = Provider::start(&[&key]).await;
    let upstream = Upstream::always(hello()).await;
    let gateway = Setup::chain(&[&provider.auth(), "policy_headers"]).start(&upstream.url()).await;
    let good = provider.claims();
    assert_eq!(text(&gateway, &Request::turn("hi").bearer(&key.token(&good))).await, "Hello");
    let now = headgate_filters::unix_now();
    let unsigned = {
        use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
        let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        format!("{}.{}.", part(&json!({"alg": "none", "typ": "JWT", "kid": "a"})), part(&good))
    };
    let refused = [
        ("another's signature", foreign.token(&good), "unauthenticated"),
        ("no signature", unsigned, "unauthenticated"),
        ("expired", key.token(&with(good.clone(), "exp", json!(now - 60))), "token_expired"),
        ("an end in words", key.token(&with(good.clone(), "exp", json!("2999"))), "unauthenticated"),
        ("not yet", key.token(&with(good.clone(), "nbf", json!(now + 600))), "unauthenticated"),
        ("for another service", key.token(&with(good.clone(), "aud", json!("mail"))), "unauthenticated"),
        ("by another issuer", key.token(&with(good.clone(), "iss", json!("https://evil.example"))), "unauthenticated"),
        ("without a tenant", key.token(&with(good.clone(), "tenant", Value::Null)), "unauthenticated"),
        ("a tenant that is no name", key.token(&with(good.clone(), "tenant", json!("a/../b"))), "unauthenticated"),
        ("too long", format!("{}{}", key.token(&good), "x".repeat(9000)), "unauthenticated"),
        ("cut", key.token(&good)[..60].to_owned(), "unauthenticated"),
    ];
    for (what, token, code) in refused {
        let reply = ask(gateway.addr, &Request::turn("hi").bearer(&token)).await.unwrap();
        assert_eq!((reply.status, reply.problem().unwrap().as_str()), (401, code), "{what}");
        assert_eq!(reply.header("www-authenticate"), Some("Bearer"), "{what}");
    }
    assert_eq!(upstream.requests().len(), 1);
    assert!(provider.server.requests().len() <= 2, "keys were fetched {} times", provider.server.requests().len());
    let mut socket = Ws::connect(gateway.addr).await.unwrap();
    socket.auth(&key.token(&good)).await;
    assert_eq!(socket.ask("r", "hi").await.unwrap().text(), "Hello");
}

#[tokio::test]
async fn a_rotated_key_is_fetched_once_and_an_unknown_one_is_not_asked_for_again_and_again() {
    let (old, new, invented) = (SigningKey::new("old"), SigningKey::new("new"), SigningKey::new("invented"));
    let provider = Provider::start(&[&old]).await;
    let upstream = Upstream::always(hello()).await;
    let gateway = Setup::chain(&[&provider.auth()]).start(&upstream.url()).await;
    let claims = provider.claims();
    // The first fetch is the start's own; a turn may be quicker and do it itself.
    soon(provider.server.request(0), "the keys to be fetched").await;
    assert_eq!(text(&gateway, &Request::turn("hi").bearer(&old.token(&claims))).await, "Hello");
    let before = provider.server.requests().len();
    provider.published.lock().unwrap().push(new.jwk.clone());
    let (new, invented) = (new.token(&claims), invented.token(&claims));
    assert_eq!(text(&gateway, &Request::turn("hi").bearer(&new)).await, "Hello");
    let after = provider.server.requests().len();
    assert!(after <= before + 1, "{before} {after}");
    for _ in 0..20 {
        assert_eq!(ask(gateway.addr, &Request::turn("hi").bearer(&invented)).await.unwrap().status, 401);
    }
    // Who invents key ids does not make us knock at the provider's door each time.
    assert!(provider.server.requests().len() <= after + 1);
    assert_eq!(text(&gateway, &Request::turn("hi").bearer(&new)).await, "Hello");
}

#[tokio::test]
async fn a_provider_that_cannot_be_reached_lets_nobody_in() {
    let key = SigningKey::new("a");
    let provider = Provider::start(&[&key]).await;
    let (auth, claims) = (provider.auth(), provider.claims());
    let addr = provider.server.addr();
    drop(provider);
    let upstream = Upstream::always(hello()).await;
    let gateway = Setup::chain(&[&auth]).start(&upstream.url()).await;
    let reply = ask(gateway.addr, &Request::turn("hi").bearer(&key.token(&claims))).await.unwrap();
    assert!((500..600).contains(&reply.status), "{} {addr}", reply.text());
    assert!(!reply.text().contains("127.0.0.1"), "{}", reply.text());
    reply.problem().unwrap();
    assert_eq!(upstream.requests().len(), 0);
}

#[tokio::test]
async fn over_the_rate_the_answer_is_429_and_when_to_come_back() {
    let (key, auth) = key();
    let upstream = Upstream::always(hello()).await;
    let gateway = Setup::chain(&[auth, "rate_limit: { per: tenant, requests: 2/min }"]).start(&upstream.url()).await;
    for _ in 0..2 {
        text(&gateway, &Request::turn("hi").bearer(key)).await;
    }
    let reply = ask(gateway.addr, &Request::turn("hi").bearer(key)).await.unwrap();
    assert_eq!((reply.status, reply.problem().unwrap().as_str()), (429, "rate_limited"));
    let pause: u64 = reply.header("retry-after").unwrap().parse().unwrap();
    assert!((1..=60).contains(&pause), "{pause}");
    assert_eq!(upstream.requests().len(), 2);
}

#[tokio::test]
async fn a_place_for_a_stream_is_free_again_however_its_turn_ends() {
    let (key, auth) = key();
    let begun = Answer::openai("demo", &["Hello"]).events()[..2].concat();
    let stalled = || Script::new().read().sse().send(begun.clone()).stall();
    let silent = Arc::new(Notify::new());
    let scripts = [
        stalled(),
        Script::new().read().tell(&silent).stall(),
        Script::new().read().sse().send(begun.clone()).reset(),
        Script::reply(500, "text/plain", "no"),
        hello(),
    ];
    let upstream = Upstream::each(scripts).await;
    let gateway = Setup::chain(&[auth, "rate_limit: { per: subject, streams: 1 }"])
        .upstream("retry: { attempts: 0 }")
        .upstream("idle: { max: 0 }")
        .start(&upstream.url())
        .await;
    let turn = Request::turn("hi").bearer(key);
    let free = || {
        within(
            SOON,
            async {
                while !gateway.process.app.turns().is_empty() {
                    tokio::task::yield_now().await
                }
            },
            "the turn to end",
        )
    };
    // One open: no place for a second.
    let mut open = stream(gateway.addr, &turn, Kind::Client).await.unwrap();
    while open.expect().await.name != "text" {}
    let reply = ask(gateway.addr, &turn).await.unwrap();
    assert_eq!((reply.status, reply.problem().unwrap().as_str()), (429, "rate_limited"));
    // Its client leaves in the middle.
    open.into_inner().abort();
    free().await;
    // The next one's client leaves before the first byte.
    let mut client = Http1::connect(gateway.addr).await;
    client.send(&turn).await;
    soon(silent.notified(), "the model to be asked").await;
    client.abort();
    free().await;
    // Then the model breaks off, and then it refuses.
    assert_eq!(stream(gateway.addr, &turn, Kind::Client).await.unwrap().rest().await.unwrap().error(), Some("upstream_reset"));
    assert_eq!(ask(gateway.addr, &turn).await.unwrap().status, 502);
    assert_eq!(text(&gateway, &turn).await, "Hello");
}

/// When a filter breaks.
#[derive(Clone, Copy, PartialEq)]
enum At {
    Start,
    Prompt,
    Head,
    Text,
    End,
}

/// A filter with a fault of its own, for turns that say so.
struct Breaks(At);

struct Breaking {
    at: At,
    asked: bool,
}

impl Rule for Breaks {
    fn start(&self, _: &mut Turn) -> Box<dyn Filter> {
        assert!(self.0 != At::Start, "a filter that cannot start");
        Box::new(Breaking { at: self.0, asked: false })
    }
}

impl Breaking {
    fn here(&self, at: At) {
        assert!(!(self.asked && self.at == at), "a filter with a fault");
    }
}

impl Filter for Breaking {
    fn prompt<'a>(&'a mut self, prompt: &'a mut Prompt) -> BoxFuture<'a, Result<(), Stop>> {
        self.asked = prompt.messages.iter().any(|message| format!("{:?}", message.role).eq_ignore_ascii_case("user"))
            && prompt.settings.model.as_deref() == Some("break");
        self.here(At::Prompt);
        Box::pin(std::future::ready(Ok(())))
    }
    fn head(&mut self, _: &mut headgate_contracts::Head) -> Result<(), Stop> {
        self.here(At::Head);
        Ok(())
    }
    fn text(&mut self, text: Text<'_>) -> Verdict {
        if text.text.contains("there") {
            self.here(At::Text);
        }
        Verdict::pass()
    }
    fn end(&mut self, _: &mut headgate_contracts::Record) {
        self.here(At::End);
    }
}

async fn with_broken_filter(at: At, upstream: &Upstream) -> Gateway {
    let (plan, folder) = Setup::chain(&["moderation: { mask: [email] }"]).plan(&upstream.url());
    let gateway = crate::support::start(&plan, folder).await;
    let lasting = &gateway.process.lasting;
    let live = build::live(&plan, lasting).unwrap();
    let routes = live.routes.iter().map(|route| {
        let mut filters = route.filters.clone();
        let facts = Facts { judges_text: true, ..Facts::default() };
        filters.push(Built { name: "breaks", terms: Terms::default(), rule: Arc::new(Breaks(at)), facts, admit: None });
        Arc::new(Route {
            plan: route.plan.clone(),
            upstream: route.upstream.clone(),
            filters,
            meters: lasting.meters.route(&route.plan.name),
            courier: lasting.courier.clone(),
        })
    });
    let routes = routes.collect();
    gateway.process.app.exchange(Live { routes, ..live });
    gateway
}

#[tokio::test]
async fn a_filter_that_panics_costs_its_own_turn_and_no_other() {
    let go = Arc::new(Notify::new());
    // A comma, for "Hello" alone may still become an address and is held.
    let answer = Answer::openai("demo", &["Hello,", " there", " bob@example.com"]);
    let waits = Script::new().read().sse().send(answer.events()[..2].concat()).wait(&go).send(answer.events()[2..].concat()).end().close();
    let upstream = Upstream::answering(move |request| {
        match request.json()["model"].as_str() {
            Some("wait") => waits.clone(),
            // At a model's pace: the answer has begun when its filter breaks.
            _ => Script::new().read().sse().send_paced(answer.cut(Cut::Events), Duration::from_millis(20)).end().close(),
        }
    })
    .await;
    let asks = |model: &str| Request::post("/v1/chat/stream", &json!({"model": model, "messages": [{"role": "user", "content": "hi"}]}));
    for at in [At::Prompt, At::Head, At::Text, At::End] {
        let gateway = with_broken_filter(at, &upstream).await;
        let mut neighbour = stream(gateway.addr, &asks("wait"), Kind::Client).await.unwrap();
        while neighbour.expect().await.name != "text" {}
        match at {
            At::Start | At::Prompt | At::Head => {
                let reply = ask(gateway.addr, &asks("break")).await.unwrap();
                assert_eq!((reply.status, reply.problem().unwrap().as_str()), (500, "internal_error"));
                let mut socket = Ws::connect(gateway.addr).await.unwrap();
                socket.send(&json!({"type": "turn", "model": "break", "messages": [{"role": "user", "content": "hi"}]})).await;
                assert_eq!(socket.next().await.unwrap().unwrap().event.text("code"), Some("internal_error"));
                assert_eq!(socket.ask("r", "hi").await.unwrap().text(), "Hello, there •••", "the socket goes on");
            }
            At::Text | At::End => {
                let answer = stream(gateway.addr, &asks("break"), Kind::Client).await.unwrap().rest().await.unwrap();
                assert_eq!(answer.error(), Some("internal_error"));
                assert!("Hello, there •••".starts_with(&answer.text()), "{}", answer.text());
                let chunks = Request::post(
                    "/v1/chat/completions",
                    &json!({"model": "break", "stream": true, "messages": [{"role": "user", "content": "hi"}]}),
                );
                let chunks = stream(gateway.addr, &chunks, Kind::OpenAi).await.unwrap().rest().await.unwrap();
                assert_eq!((chunks.error(), chunks.named("[DONE]").count()), (Some("internal_error"), 0));
            }
        }
        go.notify_one();
        let untouched = neighbour.rest().await.unwrap();
        assert_eq!(untouched.text(), "Hello, there •••", "{}", untouched.end().raw);
        assert_eq!(text(&gateway, &asks("other")).await, "Hello, there •••");
        let quiet = async {
            while !gateway.process.app.turns().is_empty() {
                tokio::task::yield_now().await
            }
        };
        within(SOON, quiet, "every turn to be gone").await;
        let metrics = ask(gateway.admin, &Request::get("/metrics")).await.unwrap().text();
        let failed = metrics.lines().find(|line| line.starts_with("headgate_turns_total") && line.contains("internal_error"));
        assert!(failed.is_some_and(|line| !line.ends_with(" 0")), "{metrics}");
        let open = metrics.lines().filter(|line| line.starts_with("headgate_open_turns{")).all(|line| line.ends_with(" 0"));
        assert!(open, "{metrics}");
    }
}

#[tokio::test]
async fn a_filter_that_cannot_even_start_is_a_500() {
    let upstream = Upstream::always(hello()).await;
    let gateway = with_broken_filter(At::Start, &upstream).await;
    for _ in 0..2 {
        let reply = ask(gateway.addr, &Request::turn("hi")).await.unwrap();
        assert_eq!((reply.status, reply.problem().unwrap().as_str()), (500, "internal_error"));
    }
    let mut socket = Ws::connect(gateway.addr).await.unwrap();
    socket.turn("r", "hi").await;
    assert_eq!(socket.next().await.unwrap().unwrap().event.text("code"), Some("internal_error"));
    assert_eq!(upstream.requests().len(), 0);
}

#[tokio::test]
async fn pages_of_allowed_origins_may_call_and_others_may_not() {
    let upstream = Upstream::always(hello()).await;
    let gateway = Setup::new().route("origins: [\"https://app.example.com\"]").start(&upstream.url()).await;
    let own = format!("http://{}", gateway.addr);
    for origin in ["https://app.example.com", own.as_str()] {
        let events = stream(gateway.addr, &Request::turn("hi").header("origin", origin), Kind::Client).await.unwrap();
        assert_eq!(events.head.header("access-control-allow-origin"), Some(origin));
        assert!(events.head.all("vary").any(|vary| vary.eq_ignore_ascii_case("origin")));
        assert!(events.head.header("access-control-expose-headers").unwrap().contains("x-headgate-turn"));
        assert_eq!(events.head.header("access-control-allow-credentials"), None);
        events.rest().await.unwrap();
        let asked = Request::new("OPTIONS", "/v1/chat/stream")
            .header("origin", origin)
            .header("access-control-request-method", "POST")
            .header("access-control-request-headers", "authorization,content-type");
        let reply = ask(gateway.addr, &asked).await.unwrap();
        assert_eq!((reply.status, reply.header("access-control-allow-origin")), (204, Some(origin)));
        assert!(reply.header("access-control-allow-headers").unwrap().contains("authorization"));
        // What goes wrong may be read by the page, too.
        let wrong = ask(gateway.addr, &Request::post("/v1/chat/stream", &json!({})).header("origin", origin)).await.unwrap();
        assert_eq!((wrong.status, wrong.header("access-control-allow-origin")), (400, Some(origin)));
        assert!(Ws::open(gateway.addr, &Request::get("/v1/chat/stream").header("origin", origin)).await.is_ok());
    }
    let before = upstream.requests().len();
    for origin in [
        "https://evil.example",
        "http://app.example.com",
        "https://app.example.com.evil.example",
        "https://app.example.com:8443",
        "null",
        "",
    ] {
        let asked = Request::new("OPTIONS", "/v1/chat/stream").header("origin", origin).header("access-control-request-method", "POST");
        let socket = Ws::open(gateway.addr, &Request::get("/v1/chat/stream").header("origin", origin)).await.err();
        let replies = [
            ask(gateway.addr, &Request::turn("hi").header("origin", origin)).await.unwrap(),
            ask(gateway.addr, &asked).await.unwrap(),
            *socket.expect("refused before 101"),
        ];
        for reply in replies {
            assert_eq!((reply.status, reply.problem().unwrap().as_str()), (403, "origin_denied"), "{origin}");
            assert_eq!(reply.header("access-control-allow-origin"), None, "{origin}");
        }
    }
    let twice = Request::turn("hi").header("origin", "https://app.example.com").header("origin", "https://evil.example");
    // A page whose name was made to lead here says of itself what it calls: the same name.
    for (host, status) in [("evil.example", 403), ("localhost.evil.example", 403), ("127.0.0.1.evil.example", 403), ("localhost:8080", 200)]
    {
        let request = Request::turn("hi").header("host", host).header("origin", &format!("http://{host}"));
        assert_eq!(ask(gateway.addr, &request).await.unwrap().status, status, "{host}");
    }
    let before = before + 1;
    assert_eq!(ask(gateway.addr, &twice).await.unwrap().status, 403);
    assert_eq!(upstream.requests().len(), before);
}
