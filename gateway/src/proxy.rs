//! Plain reverse-proxy routes: headers, bodies, trailers and upgrades, after the route's own filters have seen who asks.

use std::sync::Arc;

use headgate_config::plan::Forwarded;
use headgate_contracts::{Code, Fault, Stop};
use http::{HeaderMap, HeaderName, HeaderValue, Version, header};
use hyper::{Request, Response, body::Incoming};
use hyper_util::rt::TokioIo;
use tokio::time::timeout;

use crate::{
    body::Reply,
    front::{self, credential},
    live::{App, Route},
    serve::Peer,
    session::identify,
};

/// Passes a request on, and its answer back.
///
/// A client that leaves drops the response's body, and that closes the upstream's connection. Upgraded connections count as
/// open ones in a drain, and end with the route's deadline.
pub(crate) async fn pass(app: &App, route: &Arc<Route>, mut request: Request<Incoming>, peer: Peer) -> Result<Response<Reply>, Stop> {
    let methods = &route.plan.methods;
    if !methods.is_empty() && !methods.contains(request.method()) {
        return Err(Fault::client(Code::MethodNotAllowed).into());
    }
    identify(route, credential(request.headers())).await?;
    let place = app.drain().hold().ok_or_else(|| Stop::Failed(Fault::us(Code::Overloaded)))?;
    let trace = route.trace(request.headers());
    if let Ok(value) = HeaderValue::try_from(trace.traceparent()) {
        request.headers_mut().insert(HeaderName::from_static("traceparent"), value);
    }
    tell(&mut request, &peer, route.plan.forwarded);
    let asks_upgrade = request.headers().contains_key(header::UPGRADE);
    // Taken before the request is given away: bytes after it wait for the 101.
    let client = asks_upgrade.then(|| hyper::upgrade::on(&mut request));
    if let Some(prefix) = &route.plan.strip_prefix {
        strip(&mut request, prefix);
    }
    let forwarded = route.upstream.forward(request).await?;
    if let (Some(tunnel), Some(client)) = (forwarded.tunnel, client) {
        let deadline = route.plan.flow.deadline;
        tokio::spawn(async move {
            let _place = place;
            if let Ok(client) = client.await {
                // Either side's end ends the tunnel; how is between the two of them.
                let _ = timeout(deadline, tunnel.run(TokioIo::new(client))).await;
            }
        });
    }
    Ok(forwarded.response.map(Reply::passed))
}

/// Tells the upstream who asks, over what and for which host, and that we stand between.
fn tell(request: &mut Request<Incoming>, peer: &Peer, forwarded: Forwarded) {
    let host = front::host(request).map(str::to_owned);
    let by = match request.version() {
        Version::HTTP_2 => "2.0 headgate",
        Version::HTTP_10 => "1.0 headgate",
        _ => "1.1 headgate",
    };
    let headers = request.headers_mut();
    match forwarded {
        Forwarded::Seen => unsay(headers),
        Forwarded::Appended => {}
    }
    let address = peer.address.ip().to_canonical().to_string();
    let before = headers.get_all(FORWARDED_FOR).iter().map(HeaderValue::as_bytes);
    // One line: of several, many readers go by the first alone.
    if let Ok(all) = HeaderValue::try_from(before.chain([address.as_bytes()]).collect::<Vec<_>>().join(&b", "[..])) {
        headers.insert(FORWARDED_FOR, all);
    }
    // The first of several proxies knows best.
    headers.entry(FORWARDED_PROTO).or_insert(HeaderValue::from_static(if peer.tls { "https" } else { "http" }));
    if let Some(Ok(host)) = host.map(HeaderValue::try_from) {
        headers.entry(FORWARDED_HOST).or_insert(host);
    }
    headers.append(header::VIA, HeaderValue::from_static(by));
}

/// Deletes what a client may have written there, in every spelling: many servers read `_` and `-` as the same.
fn unsay(headers: &mut HeaderMap) {
    let said = |name: &&HeaderName| {
        let name = name.as_str().replace('_', "-");
        name.starts_with("x-forwarded-") || matches!(name.as_str(), "forwarded" | "x-real-ip" | "x-client-ip" | "true-client-ip")
    };
    let said: Vec<HeaderName> = headers.keys().filter(said).cloned().collect();
    for name in said {
        headers.remove(name);
    }
}

const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");

fn strip(request: &mut Request<Incoming>, prefix: &str) {
    let Some(rest) = request.uri().path_and_query().and_then(|path| path.as_str().strip_prefix(prefix)) else { return };
    let path = if rest.starts_with('/') { rest.to_owned() } else { format!("/{rest}") };
    let mut parts = request.uri().clone().into_parts();
    if let Ok(path) = path.parse() {
        parts.path_and_query = Some(path);
        if let Ok(uri) = http::Uri::from_parts(parts) {
            *request.uri_mut() = uri;
        }
    }
}
