//! What an upstream is sent: a body made anew from the parsed prompt, the headers filters put on it, and nothing a client wrote.

use std::{borrow::Cow, io::Write};

use headgate_contracts::{Code, Dispatch, Fault, Prompt, TurnId, wire};
use http::{
    HeaderMap, HeaderName, HeaderValue,
    header::{
        ACCEPT, ACCEPT_ENCODING, AUTHORIZATION, CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, EXPECT, HOST, PROXY_AUTHENTICATE,
        PROXY_AUTHORIZATION, TE, TRAILER, TRANSFER_ENCODING, UPGRADE,
    },
};

use crate::{endpoint::Endpoint, settings::Protocol};

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");
const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");

/// What frames the message or names its peer is ours alone, whatever a filter says.
const OURS: [HeaderName; 15] = [
    HOST,
    CONTENT_LENGTH,
    CONTENT_TYPE,
    TRANSFER_ENCODING,
    CONNECTION,
    UPGRADE,
    TE,
    TRAILER,
    EXPECT,
    ACCEPT,
    ACCEPT_ENCODING,
    PROXY_AUTHENTICATE,
    PROXY_AUTHORIZATION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
];

/// A turn as it is sent; the same body for every try.
pub(crate) struct TurnRequest<'a> {
    prompt: &'a Prompt,
    protocol: Protocol,
    authorization: Option<&'a HeaderValue>,
    path: Option<&'a str>,
    body: Vec<u8>,
}

impl<'a> TurnRequest<'a> {
    pub(crate) fn new(
        prompt: &'a Prompt,
        protocol: Protocol,
        model: Option<&str>,
        authorization: Option<&'a HeaderValue>,
        path: Option<&'a str>,
    ) -> TurnRequest<'a> {
        let asked = match model {
            Some(model) if prompt.settings.model.as_deref() != Some(model) => {
                let mut prompt = prompt.clone();
                prompt.settings.model = Some(model.to_owned());
                Cow::Owned(prompt)
            }
            _ => Cow::Borrowed(prompt),
        };
        let body = match protocol {
            Protocol::OpenAi => wire::openai::encode_request(&asked, wire::openai::Form::Streamed),
            Protocol::Orchestrator => wire::conversation::encode(&asked),
        };
        TurnRequest { prompt, protocol, authorization, path, body }
    }

    /// The bytes for one try at one endpoint, sealed for just this try: a verdict may be used once.
    pub(crate) fn bytes_for(&self, endpoint: &Endpoint) -> Result<Vec<u8>, Fault> {
        let path = turn_path(self.protocol, self.path, endpoint);
        let mut headers = self.headers("POST", &path)?;
        if let Some(authorization) = self.authorization {
            headers.entry(AUTHORIZATION).or_insert_with(|| authorization.clone());
        }
        let mut out = Vec::with_capacity(2048 + self.body.len());
        begin(&mut out, &path, endpoint);
        out.extend_from_slice(b"accept: text/event-stream\r\naccept-encoding: identity\r\ncontent-type: application/json\r\n");
        fields(&mut out, headers.iter().filter(|(name, _)| !OURS.contains(name)));
        finish(&mut out, &self.body);
        Ok(out)
    }

    /// The frame for one try on a WebSocket of an endpoint, sealed for just this try over the bytes of its payload.
    pub(crate) fn frame_for(&self, endpoint: &Endpoint, credit_bytes: u32) -> Result<Vec<u8>, Fault> {
        let headers = self.headers("GET", &turn_path(self.protocol, self.path, endpoint))?;
        // Made by our own encoder, which writes UTF-8.
        let payload = std::str::from_utf8(&self.body).map_err(|broken| Fault::us(Code::InternalError).caused_by(broken))?;
        let mut out = Vec::with_capacity(2048 + self.body.len() + self.body.len() / 4);
        wire::hop::turn(&mut out, &self.prompt.turn, payload, &headers, credit_bytes);
        Ok(out)
    }

    /// The headers of a try: what filters put on the prompt, what seals this try, and the trace.
    fn headers(&self, method: &str, path: &str) -> Result<HeaderMap, Fault> {
        let mut headers = self.prompt.headers.clone();
        if let Some(seal) = &self.prompt.seal {
            let path = path.split('?').next().unwrap_or_default();
            let proof = seal(self.prompt, &Dispatch { method, path, body: &self.body })?;
            if headers.is_empty() { headers = proof } else { replace(&mut headers, proof) }
        }
        // Our own span is the parent: what travels is what a collector has been shown.
        let trace = &self.prompt.trace;
        insert(&mut headers, TRACEPARENT, &trace.traceparent());
        match &trace.state {
            Some(state) => insert(&mut headers, TRACESTATE, state),
            None => drop(headers.remove(TRACESTATE)),
        }
        if self.protocol == Protocol::Orchestrator {
            match &self.prompt.idempotency_key {
                Some(key) => insert(&mut headers, IDEMPOTENCY_KEY, key),
                None => insert(&mut headers, IDEMPOTENCY_KEY, &self.prompt.turn.to_string()),
            }
        }
        Ok(headers)
    }
}

/// The request that stops a turn at an orchestrator.
pub(crate) fn cancel_bytes(endpoint: &Endpoint, turn: TurnId, traceparent: &str, authorization: Option<&HeaderValue>) -> Vec<u8> {
    let mut headers = HeaderMap::new();
    insert(&mut headers, TRACEPARENT, traceparent);
    if let Some(authorization) = authorization {
        headers.insert(AUTHORIZATION, authorization.clone());
    }
    let mut out = Vec::with_capacity(512);
    begin(&mut out, &format!("{}/v1/conversation/turns/{turn}/cancel", endpoint.prefix), endpoint);
    fields(&mut out, headers.iter());
    finish(&mut out, b"");
    out
}

/// A request that tells an orchestrator something, with what proves it.
pub(crate) fn told_bytes(
    endpoint: &Endpoint,
    path: &str,
    mut headers: HeaderMap,
    body: &[u8],
    authorization: Option<&HeaderValue>,
) -> Vec<u8> {
    if let Some(authorization) = authorization {
        headers.insert(AUTHORIZATION, authorization.clone());
    }
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    let mut out = Vec::with_capacity(2048 + body.len());
    begin(&mut out, path, endpoint);
    fields(&mut out, headers.iter());
    finish(&mut out, body);
    out
}

/// Where turns are asked for; `path`: instead of the endpoint's and the protocol's.
pub(crate) fn turn_path<'a>(protocol: Protocol, path: Option<&'a str>, endpoint: &Endpoint) -> Cow<'a, str> {
    match (path, protocol, &*endpoint.prefix) {
        (Some(path), _, _) => path.into(),
        // As OpenAI's SDKs read a base URL: it carries the version itself.
        (None, Protocol::OpenAi, "") => "/v1/chat/completions".into(),
        (None, Protocol::OpenAi, prefix) => format!("{prefix}/chat/completions").into(),
        (None, Protocol::Orchestrator, prefix) => format!("{prefix}/v1/conversation/stream").into(),
    }
}

fn begin(out: &mut Vec<u8>, path: &str, endpoint: &Endpoint) {
    for part in [b"POST ", path.as_bytes(), b" HTTP/1.1\r\nhost: ", endpoint.host.as_bytes(), b"\r\n"] {
        out.extend_from_slice(part);
    }
}

// A header value of this type holds no line break, so a field cannot become two.
fn fields<'a>(out: &mut Vec<u8>, headers: impl Iterator<Item = (&'a HeaderName, &'a HeaderValue)>) {
    for (name, value) in headers {
        for part in [name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"] {
            out.extend_from_slice(part);
        }
    }
}

fn finish(out: &mut Vec<u8>, body: &[u8]) {
    // A buffer takes all that is written to it.
    let _ = write!(out, "content-length: {}\r\n\r\n", body.len());
    out.extend_from_slice(body);
}

fn insert(headers: &mut HeaderMap, name: HeaderName, text: &str) {
    match HeaderValue::from_str(text) {
        Ok(value) => drop(headers.insert(name, value)),
        Err(_) => drop(headers.remove(name)),
    }
}

/// What `by` names replaces what `headers` said under the same name: a second value would be a way around the first.
fn replace(headers: &mut HeaderMap, by: HeaderMap) {
    let mut last = None;
    for (name, value) in by {
        match (name, &last) {
            (Some(name), _) => {
                headers.insert(name.clone(), value);
                last = Some(name);
            }
            (None, Some(name)) => drop(headers.append(name.clone(), value)),
            (None, None) => {}
        }
    }
}
