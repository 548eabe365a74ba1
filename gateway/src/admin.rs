//! The admin listener: health, readiness, metrics, the configuration in force, public keys. Never on the public listener.

use http::{HeaderValue, Method, StatusCode, header};
use hyper::{Request, Response, body::Incoming};
use serde_json::json;

use crate::{
    body::Reply,
    live::App,
    registry::{OurPolicy, Stands},
    serve::{Peer, Service},
};

/// Answers admin calls.
#[derive(Clone)]
pub struct Admin(pub App);

impl Service for Admin {
    async fn call(&self, request: Request<Incoming>, _peer: Peer) -> Response<Reply> {
        let app = &self.0;
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            return text(StatusCode::METHOD_NOT_ALLOWED, "GET only\n".into());
        }
        match request.uri().path() {
            // The process is up and its event loop turns.
            "/healthz" => text(StatusCode::OK, "ok\n".into()),
            "/readyz" => ready(app),
            "/metrics" => {
                app.observe();
                let mut response = text(StatusCode::OK, app.meters().text());
                let kind = HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");
                response.headers_mut().insert(header::CONTENT_TYPE, kind);
                response
            }
            "/config" => object(StatusCode::OK, &app.live().describe()),
            "/.well-known/jwks.json" => match app.live().jwks() {
                Some(jwks) => json(StatusCode::OK, jwks),
                None => text(StatusCode::NOT_FOUND, "no policy is in force, so there are no keys\n".into()),
            },
            _ => text(StatusCode::NOT_FOUND, "/healthz /readyz /metrics /config /.well-known/jwks.json\n".into()),
        }
    }
}

/// Ready: takes new turns, each upstream has an endpoint that answers, and the policy that is signed under is in force.
fn ready(app: &App) -> Response<Reply> {
    let draining = app.drain().has_begun();
    let live = app.live();
    let (upstreams, policy) = (live.upstream_health(), live.policy.as_ref().map(OurPolicy::stands));
    let is_ready = !draining
        && policy.is_none_or(Stands::is_good)
        && upstreams.iter().all(|(_, endpoints)| endpoints.iter().any(|endpoint| endpoint.ready));
    let status = if is_ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let upstreams: serde_json::Map<String, serde_json::Value> = upstreams
        .into_iter()
        .map(|(name, endpoints)| {
            let endpoints = endpoints.into_iter().map(|endpoint| {
                json!({"endpoint": endpoint.endpoint, "ready": endpoint.ready, "in_flight": endpoint.in_flight, "idle": endpoint.idle})
            });
            (name, endpoints.collect())
        })
        .collect();
    let policy = policy.map(Stands::as_str);
    object(status, &json!({"ready": is_ready, "draining": draining, "policy": policy, "upstreams": upstreams}))
}

fn text(status: StatusCode, body: String) -> Response<Reply> {
    let mut response = Response::new(Reply::from(body));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

fn object(status: StatusCode, body: &serde_json::Value) -> Response<Reply> {
    json(status, format!("{body:#}\n"))
}

fn json(status: StatusCode, body: String) -> Response<Reply> {
    let mut response = text(status, body);
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}
