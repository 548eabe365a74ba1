//! Logs: one line per turn, JSON by default, to standard error; spans to a collector where one is named.

use tracing_subscriber::{
    EnvFilter, Layer,
    filter::{FilterExt, filter_fn},
    fmt,
    layer::SubscriberExt,
    registry,
    util::SubscriberInitExt,
};

use super::spans::{Flush, Spans};

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Format {
    /// One JSON object a line: for machines.
    #[default]
    Json,
    /// For eyes.
    Text,
}

/// Begins logging, once per process. `level` is what is logged, e.g. `info,headgate=debug`; `HEADGATE_LOG` overrules it.
///
/// Errors: the collector's address is not one.
pub fn begin(format: Format, level: &str, collector: Option<(&str, f64)>) -> Result<Option<Flush>, opentelemetry_otlp::ExporterBuildError> {
    let filter = EnvFilter::try_from_env("HEADGATE_LOG").unwrap_or_else(|_| EnvFilter::new(level));
    // A line says itself what it has to say, so spans are kept from whoever writes lines: nobody then pays for their fields.
    let lines = match format {
        Format::Json => {
            fmt::layer().json().flatten_event(true).with_current_span(false).with_span_list(false).with_writer(std::io::stderr).boxed()
        }
        Format::Text => fmt::layer().compact().with_target(false).with_writer(std::io::stderr).boxed(),
    };
    // At their most talkative, libraries of HTTP and WebSocket show headers and frames: tokens and text, whatever the level asked for.
    let is_ours = |metadata: &tracing::Metadata<'_>| metadata.target().starts_with("headgate") || *metadata.level() <= tracing::Level::INFO;
    let lines = lines.with_filter(filter.and(filter_fn(move |metadata| metadata.is_event() && is_ours(metadata))));
    let (spans, flush) = match collector {
        None => (None, None),
        Some((endpoint, sampling)) => {
            let (spans, flush) = Spans::to(endpoint, sampling)?;
            // Only turns' spans, whatever the lines' filter says.
            (Some(spans.with_filter(filter_fn(|metadata| metadata.is_span() && metadata.target().starts_with("headgate")))), Some(flush))
        }
    };
    // A second call, as in tests of several gateways in one process, keeps the first.
    let _ = registry().with(lines).with(spans).try_init();
    // What a panic says may quote the text that it was about: where it happened has to do.
    std::panic::set_hook(Box::new(|panic| {
        tracing::error!(at = panic.location().map(tracing::field::display), thread = std::thread::current().name(), "panicked");
    }));
    Ok(flush)
}
