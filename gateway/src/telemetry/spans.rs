//! Turns' spans on their way to an OTLP collector: one trace over gateway, orchestrator and model.
//!
//! Who runs a turn opens a `tracing` span with the W3C ids it was given or chose (`trace_id`, `span_id`,
//! `parent_span_id`, in hexadecimal) and closes it when the stream ends. This layer makes an OpenTelemetry span of each,
//! under the same ids, so that what travels in `traceparent` is what the collector shows. Spans without a `trace_id` are
//! not a turn's and are left alone.

use std::{cell::Cell, collections::HashMap, time::Duration, time::SystemTime};

use opentelemetry::{
    Context, KeyValue, SpanId, TraceFlags, TraceId, Value,
    trace::{Span as _, SpanBuilder, SpanContext, SpanKind, Status, TraceContextExt, TraceState, Tracer, TracerProvider},
};
use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig};
use opentelemetry_sdk::{
    Resource, runtime,
    trace::{IdGenerator, RandomIdGenerator, Sampler, SdkTracer, SdkTracerProvider, span_processor_with_async_runtime::BatchSpanProcessor},
};
use tracing::{
    Subscriber,
    field::{Field, Visit},
    span::{Attributes, Id, Record},
};
use tracing_subscriber::{layer, registry::LookupSpan};

/// The services whose spans are told apart, by the crate that opens them.
const SERVICES: [(&str, &str); 3] =
    [("headgate_orchestrator", "headgate-orchestrator"), ("headgate_slm", "headgate-slm"), ("headgate", "headgate-gateway")];

/// Sends turns' spans to a collector.
pub(super) struct Spans {
    tracers: HashMap<&'static str, SdkTracer>,
    providers: Vec<SdkTracerProvider>,
}

/// Ends the export: what is queued is still sent.
pub(super) struct Flush(Vec<SdkTracerProvider>);

impl Flush {
    /// Sends what is queued, waiting at most `patience`.
    pub(super) async fn flush(self, patience: Duration) {
        let flushed = tokio::task::spawn_blocking(move || {
            for provider in &self.0 {
                if let Err(error) = provider.shutdown() {
                    tracing::warn!(%error, "spans were not all sent");
                }
            }
        });
        let _ = tokio::time::timeout(patience, flushed).await;
    }
}

impl Spans {
    /// To the collector at `endpoint` (OTLP over HTTP, protobuf; `/v1/traces` is appended where there is no path), a share of
    /// `sampling` of all traces. Must be called within a runtime: the export runs on it.
    pub(super) fn to(endpoint: &str, sampling: f64) -> Result<(Spans, Flush), opentelemetry_otlp::ExporterBuildError> {
        let path = endpoint.split_once("://").and_then(|(_, rest)| rest.split_once('/')).map_or("", |(_, path)| path);
        let endpoint = if path.is_empty() { format!("{}/v1/traces", endpoint.trim_end_matches('/')) } else { endpoint.to_owned() };
        let (mut tracers, mut providers) = (HashMap::new(), Vec::new());
        for (krate, service) in SERVICES {
            let exporter = SpanExporter::builder().with_http().with_protocol(Protocol::HttpBinary).with_endpoint(&endpoint).build()?;
            let provider = SdkTracerProvider::builder()
                .with_span_processor(BatchSpanProcessor::builder(exporter, runtime::Tokio).build())
                // Whole traces or nothing: the decision depends on the trace's id alone.
                .with_sampler(Sampler::TraceIdRatioBased(sampling))
                .with_id_generator(GivenIds(RandomIdGenerator::default()))
                .with_resource(Resource::builder().with_service_name(service).build())
                .build();
            tracers.insert(krate, provider.tracer("headgate"));
            providers.push(provider);
        }
        Ok((Spans { tracers, providers: providers.clone() }, Flush(providers)))
    }

    fn tracer(&self, target: &str) -> Option<&SdkTracer> {
        let krate = target.split("::").next().unwrap_or_default();
        SERVICES.iter().find(|(name, _)| krate == *name).or(SERVICES.last()).and_then(|(name, _)| self.tracers.get(name))
    }
}

thread_local! {
    static IDS: Cell<Option<(TraceId, SpanId)>> = const { Cell::new(None) };
}

/// Gives a span the ids that already travel in `traceparent`.
#[derive(Debug)]
struct GivenIds(RandomIdGenerator);

impl IdGenerator for GivenIds {
    fn new_trace_id(&self) -> TraceId {
        IDS.get().map_or_else(|| self.0.new_trace_id(), |(trace, _)| trace)
    }
    fn new_span_id(&self) -> SpanId {
        IDS.get().filter(|(_, span)| *span != SpanId::INVALID).map_or_else(|| self.0.new_span_id(), |(_, span)| span)
    }
}

/// What a span has said so far.
struct Seen {
    start: SystemTime,
    trace: Option<String>,
    span: Option<String>,
    parent: Option<String>,
    kind: SpanKind,
    failed: bool,
    attributes: Vec<KeyValue>,
}

impl Seen {
    fn put(&mut self, name: &'static str, value: Value) {
        match (name, &value) {
            ("trace_id", Value::String(id)) => self.trace = Some(id.to_string()),
            ("span_id", Value::String(id)) => self.span = Some(id.to_string()),
            ("parent_span_id", Value::String(id)) => self.parent = Some(id.to_string()),
            ("otel.kind", Value::String(kind)) => self.kind = if kind.as_str() == "client" { SpanKind::Client } else { SpanKind::Server },
            _ => {
                self.failed |= name == "end" && value.as_str() == "failed";
                self.attributes.push(KeyValue::new(name, value));
            }
        }
    }
}

impl Visit for Seen {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field.name(), value.to_owned().into());
    }
    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field.name(), value.into());
    }
    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field.name(), i64::try_from(value).unwrap_or(i64::MAX).into());
    }
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.put(field.name(), value.into());
    }
    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field.name(), value.into());
    }
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        self.put(field.name(), format!("{value:?}").into());
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> layer::Layer<S> for Spans {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: layer::Context<'_, S>) {
        let mut seen = Seen {
            start: SystemTime::now(),
            trace: None,
            span: None,
            parent: None,
            kind: SpanKind::Server,
            failed: false,
            attributes: Vec::new(),
        };
        attributes.record(&mut seen);
        if let (Some(_), Some(span)) = (&seen.trace, context.span(id)) {
            span.extensions_mut().insert(seen);
        }
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: layer::Context<'_, S>) {
        if let Some(span) = context.span(id)
            && let Some(seen) = span.extensions_mut().get_mut::<Seen>()
        {
            values.record(seen);
        }
    }

    fn on_close(&self, id: Id, context: layer::Context<'_, S>) {
        let Some(span) = context.span(&id) else { return };
        let Some(seen) = span.extensions_mut().remove::<Seen>() else { return };
        let Some(tracer) = self.tracer(span.metadata().target()) else { return };
        let hex = |id: Option<&String>| id.and_then(|id| SpanId::from_hex(id).ok()).unwrap_or(SpanId::INVALID);
        let Some(trace) = seen.trace.as_ref().and_then(|id| TraceId::from_hex(id).ok()) else { return };
        let parent = SpanContext::new(trace, hex(seen.parent.as_ref()), TraceFlags::SAMPLED, true, TraceState::NONE);
        let parent = if parent.is_valid() { Context::new().with_remote_span_context(parent) } else { Context::new() };
        IDS.set(Some((trace, hex(seen.span.as_ref()))));
        let builder = SpanBuilder::from_name(span.name()).with_kind(seen.kind).with_start_time(seen.start).with_attributes(seen.attributes);
        let mut exported = tracer.build_with_context(builder, &parent);
        IDS.set(None);
        if seen.failed {
            exported.set_status(Status::error("failed"));
        }
        exported.end();
    }
}

impl std::fmt::Debug for Spans {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Spans({} services)", self.providers.len())
    }
}
