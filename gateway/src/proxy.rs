//! Plain reverse-proxy routes: headers, bodies, trailers and upgrades, after the route's own filters have seen who asks.

use std::sync::Arc;

use headgate_contracts::{Code, Fault, Stop};
use http::{HeaderName, HeaderValue, header};
use hyper::{Request, Response, body::Incoming};
use hyper_util::rt::TokioIo;
use tokio::time::timeout;

use crate::{
    body::Reply,
    front::credential,
    live::{App, Route},
    session::identify,
};

/// Passes a request on, and its answer back.
///
/// A client that leaves drops the response's body, and that closes the upstream's connection. Upgraded connections count as
/// open ones in a drain, and end with the route's deadline.
pub(crate) async fn pass(app: &App, route: &Arc<Route>, mut request: Request<Incoming>) -> Result<Response<Reply>, Stop> {
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
