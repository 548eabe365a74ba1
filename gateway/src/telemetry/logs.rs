//! Logs: one line per turn, JSON by default, to standard error; spans to a collector where one is named.

use std::{io, time::Duration};

use tracing_subscriber::{
    EnvFilter, Layer,
    filter::{FilterExt, filter_fn},
    fmt,
    layer::SubscriberExt,
    registry,
    util::SubscriberInitExt,
};

use super::{
    lines::{Json, Lines, Tail},
    spans::{Flush, Spans},
};

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Format {
    /// One JSON object a line: for machines.
    #[default]
    Json,
    /// For eyes.
    Text,
}

/// What logs, for as long as it is kept. Dropped, it has written every line.
pub struct Logs {
    spans: Option<Flush>,
    _lines: Option<Tail>,
}

impl Logs {
    /// Ends the export of spans, which may take as long as `patience`, and writes the last lines.
    pub async fn end(self, patience: Duration) {
        if let Some(spans) = self.spans {
            spans.flush(patience).await;
        }
    }
}

/// Begins logging, once per process. `level` is what is logged, e.g. `info,headgate=debug`; `HEADGATE_LOG` overrules it.
///
/// Errors: the collector's address is not one.
pub fn begin(format: Format, level: &str, collector: Option<(&str, f64)>) -> Result<Logs, opentelemetry_otlp::ExporterBuildError> {
    let filter = EnvFilter::try_from_env("HEADGATE_LOG").unwrap_or_else(|_| EnvFilter::new(level));
    // A line says itself what it has to say, so spans are kept from whoever writes lines: nobody then pays for their fields.
    let lines = Lines::default();
    let out = lines.clone();
    let layer = match format {
        Format::Json => Json(out).boxed(),
        Format::Text => fmt::layer().compact().with_target(false).with_writer(move || out.clone()).boxed(),
    };
    // At their most talkative, libraries of HTTP and WebSocket show headers and frames: tokens and text, whatever the level asked for.
    let is_ours = |metadata: &tracing::Metadata<'_>| metadata.target().starts_with("headgate") || *metadata.level() <= tracing::Level::INFO;
    let layer = layer.with_filter(filter.and(filter_fn(move |metadata| metadata.is_event() && is_ours(metadata))));
    let (spans, flush) = match collector {
        None => (None, None),
        Some((endpoint, sampling)) => {
            let (spans, flush) = Spans::to(endpoint, sampling)?;
            // Only turns' spans, whatever the lines' filter says.
            (Some(spans.with_filter(filter_fn(|metadata| metadata.is_span() && metadata.target().starts_with("headgate")))), Some(flush))
        }
    };
    // A second call, as in tests of several gateways in one process, keeps the first.
    let lines_alone = registry().with(layer);
    let is_first = match spans {
        Some(spans) => lines_alone.with(spans).try_init().is_ok(),
        // No layer, rather than an absent one, which would have a span kept for each turn.
        None => lines_alone.try_init().is_ok(),
    };
    // What a panic says may quote the text that it was about: where it happened has to do.
    std::panic::set_hook(Box::new(|panic| {
        tracing::error!(at = panic.location().map(tracing::field::display), thread = std::thread::current().name(), "panicked");
    }));
    Ok(Logs { spans: flush, _lines: is_first.then(|| lines.begin(io::stderr())) })
}
