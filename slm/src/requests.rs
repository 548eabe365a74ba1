//! The trail of each turn: one span in OpenTelemetry's GenAI words, and, when asked for, a short list of what arrived.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use http::HeaderMap;
use serde::Serialize;
use tracing::Span;

use crate::openai::{Request, Usage};

/// Requests the list remembers; the oldest is forgotten first.
const REMEMBERED: usize = 64;
const HEADERS_MAX: usize = 64;
const HEADER_BYTES_MAX: usize = 8 * 1024;

/// The headers whose values may be shown: they say how a request travelled, and hold neither text nor secrets.
const SHOWN: [&str; 7] = ["traceparent", "tracestate", "content-digest", "idempotency-key", "content-type", "accept", "user-agent"];
const SHOWN_PREFIXES: [&str; 2] = ["policy-", "constitution-"];

/// How a turn ended, or that it has not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum End {
    Running,
    Stop,
    Length,
    /// The request was not one this server can answer.
    Refused,
    /// The client left.
    Cancelled,
    /// Something broke here.
    Failed,
}

impl End {
    fn name(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Refused => "refused",
            Self::Cancelled => "cancelled",
            Self::Failed => "failed",
        }
    }
}

/// One request as it arrived and what became of it. No text, and of secrets only that they were there.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Record {
    id: String,
    /// In the order received; a value is null where it may not be shown.
    headers: Vec<(String, Option<String>)>,
    trace_id: Option<String>,
    parent_span_id: Option<String>,
    model: Option<String>,
    stream: bool,
    messages: usize,
    dropped_messages: usize,
    usage: Usage,
    end: End,
}

/// The last requests; nothing is kept unless somebody may ask.
#[derive(Debug, Default)]
pub(crate) struct Requests {
    records: Mutex<VecDeque<Record>>,
}

impl Requests {
    pub(crate) fn to_json(&self) -> String {
        let records = self.records.lock().unwrap_or_else(PoisonError::into_inner);
        serde_json::json!({"requests": *records}).to_string()
    }

    fn remember(&self, record: Record) {
        let mut records = self.records.lock().unwrap_or_else(PoisonError::into_inner);
        if records.len() == REMEMBERED {
            records.pop_front();
        }
        records.push_back(record);
    }

    fn update(&self, id: &str, change: impl FnOnce(&mut Record)) {
        let mut records = self.records.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(record) = records.iter_mut().rev().find(|r| r.id == id) {
            change(record);
        }
    }
}

/// What is known of a turn while it lives; writes the ending when dropped, whichever way that came.
#[derive(Debug)]
pub(crate) struct Trail {
    pub(crate) span: Span,
    id: String,
    requests: Option<Arc<Requests>>,
    prompt_tokens: usize,
    dropped_messages: usize,
    pub(crate) answer_tokens: usize,
    /// Set when the turn ends in order; until then a drop means that the client left.
    pub(crate) end: Option<End>,
}

impl Trail {
    /// `model` is the name that answers; the request may have asked for another.
    pub(crate) fn begin(id: String, model: &str, request: &Request, headers: &HeaderMap, requests: Option<Arc<Requests>>) -> Self {
        let parent = headers.get("traceparent").and_then(|v| v.to_str().ok()).and_then(TraceParent::parse);
        let asked = request.model.as_deref().unwrap_or(model);
        // Names: OpenTelemetry semantic conventions for generative AI, "Inference" spans. The trace ids are fields,
        // so that the process that embeds this server can join them to its own exporter.
        let span = tracing::info_span!(
            "chat",
            "otel.kind" = "server",
            "gen_ai.operation.name" = "chat",
            "gen_ai.provider.name" = "headgate",
            "gen_ai.request.model" = asked,
            "gen_ai.request.max_tokens" = request.max_tokens,
            "gen_ai.request.temperature" = request.temperature,
            "gen_ai.request.top_p" = request.top_p,
            "gen_ai.request.seed" = request.seed,
            "gen_ai.request.choice.count" = 1,
            "gen_ai.response.id" = id,
            "gen_ai.response.model" = model,
            "gen_ai.response.finish_reasons" = tracing::field::Empty,
            "gen_ai.usage.input_tokens" = tracing::field::Empty,
            "gen_ai.usage.output_tokens" = tracing::field::Empty,
            "error.type" = tracing::field::Empty,
            trace_id = parent.map(|p| p.trace_id),
            parent_span_id = parent.map(|p| p.span_id),
        );
        if let Some(requests) = &requests {
            requests.remember(Record {
                id: id.clone(),
                headers: shown(headers),
                trace_id: parent.map(|p| p.trace_id.to_owned()),
                parent_span_id: parent.map(|p| p.span_id.to_owned()),
                model: request.model.clone(),
                stream: request.stream,
                messages: request.messages.len(),
                dropped_messages: 0,
                usage: Usage::new(0, 0),
                end: End::Running,
            });
        }
        Self { span, id, requests, prompt_tokens: 0, dropped_messages: 0, answer_tokens: 0, end: None }
    }

    pub(crate) fn prompted(&mut self, prompt_tokens: usize, dropped_messages: usize) {
        (self.prompt_tokens, self.dropped_messages) = (prompt_tokens, dropped_messages);
    }

    pub(crate) fn usage(&self) -> Usage {
        Usage::new(self.prompt_tokens, self.answer_tokens)
    }
}

impl Drop for Trail {
    fn drop(&mut self) {
        let end = self.end.unwrap_or(End::Cancelled);
        let field = if matches!(end, End::Stop | End::Length) { "gen_ai.response.finish_reasons" } else { "error.type" };
        self.span.record(field, end.name());
        self.span.record("gen_ai.usage.input_tokens", self.prompt_tokens);
        self.span.record("gen_ai.usage.output_tokens", self.answer_tokens);
        self.span.in_scope(|| {
            tracing::info!(
                end = end.name(),
                prompt_tokens = self.prompt_tokens,
                answer_tokens = self.answer_tokens,
                dropped_messages = self.dropped_messages,
                "turn ended"
            );
        });
        if let Some(requests) = &self.requests {
            requests.update(&self.id, |record| {
                record.usage = self.usage();
                record.dropped_messages = self.dropped_messages;
                record.end = end;
            });
        }
    }
}

fn shown(headers: &HeaderMap) -> Vec<(String, Option<String>)> {
    let may_show = |name: &str| SHOWN.contains(&name) || SHOWN_PREFIXES.iter().any(|p| name.starts_with(p));
    let value = |value: &http::HeaderValue| value.to_str().ok().filter(|v| v.len() <= HEADER_BYTES_MAX).map(str::to_owned);
    headers.iter().take(HEADERS_MAX).map(|(n, v)| (n.as_str().to_owned(), may_show(n.as_str()).then(|| value(v)).flatten())).collect()
}

/// The caller's place in its trace. Source: W3C Trace Context, section 3.2.
#[derive(Debug, Clone, Copy, PartialEq)]
struct TraceParent<'a> {
    trace_id: &'a str,
    span_id: &'a str,
}

impl<'a> TraceParent<'a> {
    fn parse(header: &'a str) -> Option<Self> {
        let mut parts = header.split('-');
        let (version, trace_id, span_id, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        let is_hex = |s: &str, length: usize| s.len() == length && s.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        let is_id = |s: &str, length: usize| is_hex(s, length) && s.bytes().any(|b| b != b'0');
        // A later version may have more parts; version 00 may not.
        let ends = version != "00" || parts.next().is_none();
        let holds = is_hex(version, 2) && version != "ff" && is_id(trace_id, 32) && is_id(span_id, 16) && is_hex(flags, 2) && ends;
        holds.then_some(Self { trace_id, span_id })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_whole_traceparent_counts() {
        let (trace_id, span_id) = ("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7");
        let good = format!("00-{trace_id}-{span_id}-01");
        assert_eq!(TraceParent::parse(&good), Some(TraceParent { trace_id, span_id }));
        assert!(TraceParent::parse(&format!("01-{trace_id}-{span_id}-01-more")).is_some());
        for bad in [
            String::new(),
            format!("00-{trace_id}-{span_id}"),
            format!("00-{trace_id}-{span_id}-01-more"),
            format!("ff-{trace_id}-{span_id}-01"),
            format!("00-{}-{span_id}-01", "0".repeat(32)),
            format!("00-{trace_id}-{}-01", "0".repeat(16)),
            good.to_uppercase(),
        ] {
            assert_eq!(TraceParent::parse(&bad), None, "{bad}");
        }
    }

    #[test]
    fn a_secret_header_is_listed_without_its_value() {
        let mut headers = HeaderMap::new();
        headers.insert("authorization", http::HeaderValue::from_static("Bearer abc"));
        headers.insert("policy-version", http::HeaderValue::from_static("7"));
        assert_eq!(shown(&headers), [("authorization".into(), None), ("policy-version".into(), Some("7".into()))]);
    }
}
