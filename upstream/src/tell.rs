//! Tells an orchestrator something about a turn and hears whether it took it: one endpoint, one try, no answer but a status.

use std::sync::Arc;

use headgate_contracts::{Code, Dispatch, Fault};
use http::{HeaderMap, StatusCode};
use tokio::time::timeout;

use crate::{
    Shared, Upstream,
    endpoint::Endpoint,
    exchange::{Begun, Broken, exchange},
    open::{Failed, connect},
    request::told_bytes,
};

impl Upstream {
    /// Sends `body` to `path` at the endpoint of that name (as [`Upstream::health`] lists them) and gives the status of its
    /// response. `seal` proves the exact bytes, as `prompt.seal` does a dispatch. Waits no longer than for a first byte.
    /// Cancel safe: dropping the future closes the connection.
    ///
    /// Errors: `upstream_connect_failed`, `upstream_timeout_first_byte`, `upstream_reset`, `upstream_protocol_error`, what the
    /// seal says, and `config_invalid` where there is no such endpoint. After the middle three nobody knows whether it was taken.
    pub async fn tell(
        &self,
        endpoint: &str,
        path: &str,
        body: &[u8],
        seal: impl FnOnce(&Dispatch<'_>) -> Result<HeaderMap, Fault>,
    ) -> Result<StatusCode, Fault> {
        let shared = &self.0;
        let found = shared.fleet.endpoints().iter().find(|one| *one.name == *endpoint);
        let endpoint = found.ok_or_else(|| Fault::us(Code::ConfigInvalid).caused_by("there is no such endpoint any more"))?;
        let path = format!("{}{path}", endpoint.prefix);
        let proof = seal(&Dispatch { method: "POST", path: &path, body })?;
        let bytes = told_bytes(endpoint, &path, proof, body, shared.authorization.as_ref());
        match timeout(shared.settings.timeouts.first_byte, call(shared, endpoint, &bytes)).await {
            Ok(heard) => heard.map_err(|fault| shared.placed(endpoint, fault)),
            Err(_) => Err(shared.placed(endpoint, Fault::upstream(Code::UpstreamTimeoutFirstByte))),
        }
    }
}

/// Sends a request whose response is its status; the connection is kept where it can be.
pub(crate) async fn call(shared: &Shared, endpoint: &Arc<Endpoint>, bytes: &[u8]) -> Result<StatusCode, Fault> {
    let mut kept = endpoint.reuse();
    loop {
        let reused = kept.is_some();
        let mut io = match kept.take() {
            Some(io) => io,
            None => connect(shared, endpoint).await.map_err(|Failed { fault, .. }| fault)?,
        };
        let Begun { mut head, early } = match exchange(&mut io, bytes, &shared.settings.limits).await {
            Ok(begun) => begun,
            // What is told may be told twice.
            Err(Broken::Unanswered(_)) if reused => continue,
            Err(broken @ (Broken::Unanswered(_) | Broken::Cut(_))) => return Err(Fault::upstream(Code::UpstreamReset).caused_by(broken)),
            Err(broken @ Broken::Malformed(_)) => return Err(Fault::upstream(Code::UpstreamProtocolError).caused_by(broken)),
        };
        let mut rest = early.as_slice();
        while !rest.is_empty() {
            match head.body.strip(rest) {
                Ok((used, _)) if used > 0 => rest = rest.get(used..).unwrap_or_default(),
                Ok(_) | Err(_) => return Ok(head.status),
            }
        }
        // What is left of a short body is swallowed before the connection is used again.
        if head.keep {
            endpoint.keep(io, head.body);
        }
        return Ok(head.status);
    }
}
