//! A histogram that many cores may fill without a lock.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use prometheus_client::{
    encoding::{EncodeMetric, MetricEncoder, NoLabelSet},
    metrics::{MetricType, TypedMetric},
};

/// Upper bounds in seconds, from 10 microseconds to 5 minutes: the delay that we add and the time that models take, on one scale.
const BOUNDS: [f64; 22] = [
    0.000_01, 0.000_025, 0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0,
    10.0, 30.0, 60.0, 300.0,
];

/// Workers beyond so many share the counts of others.
const SHARDS: usize = 8;

/// Durations, counted. Clones share their counts.
///
/// Each worker has counts of its own: they stay in its cache, where a stream's own, of a thousand streams, would not be.
#[derive(Clone, Debug, Default)]
pub struct Histogram(Arc<[Counts; SHARDS]>);

/// Whole cache lines, so that no worker waits for what another one counts.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Counts {
    buckets: [AtomicU64; BOUNDS.len() + 1],
    nanos: AtomicU64,
}

/// Which counts are this thread's.
fn shard() -> usize {
    static THREADS: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static SHARD: usize = THREADS.fetch_add(1, Relaxed) % SHARDS;
    }
    SHARD.try_with(|shard| *shard).unwrap_or_default()
}

fn bucket(duration: Duration) -> usize {
    let seconds = duration.as_secs_f64();
    BOUNDS.partition_point(|bound| *bound < seconds)
}

impl Histogram {
    /// Counts one.
    pub fn add(&self, duration: Duration) {
        self.add_many(duration, 1);
        self.add_sum(duration);
    }

    /// Counts several that lie below a bound; their sum comes with [`Histogram::add_sum`].
    pub fn add_many(&self, bound: Duration, count: u32) {
        self.0[shard()].buckets[bucket(bound)].fetch_add(count.into(), Relaxed);
    }

    /// The sum of what was counted by its bound.
    pub fn add_sum(&self, sum: Duration) {
        self.0[shard()].nanos.fetch_add(sum.as_nanos() as u64, Relaxed);
    }

    fn total(&self, count: impl Fn(&Counts) -> &AtomicU64) -> u64 {
        self.0.iter().map(|counts| count(counts).load(Relaxed)).sum()
    }
}

impl TypedMetric for Histogram {
    const TYPE: MetricType = MetricType::Histogram;
}

impl EncodeMetric for Histogram {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        let bounds = BOUNDS.into_iter().chain([f64::INFINITY]);
        let buckets: Vec<(f64, u64)> =
            bounds.enumerate().map(|(index, bound)| (bound, self.total(|counts| &counts.buckets[index]))).collect();
        let count = buckets.iter().map(|(_, count)| count).sum();
        let sum = self.total(|counts| &counts.nanos) as f64 / 1e9;
        encoder.encode_histogram::<NoLabelSet>(sum, count, &buckets, None)
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Histogram
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use prometheus_client::{encoding::text::encode, registry::Registry};

    #[test]
    fn what_many_threads_count_adds_up() {
        let histogram = Histogram::default();
        let mut registry = Registry::default();
        registry.register("delay_seconds", "Delay", histogram.clone());
        std::thread::scope(|scope| {
            for _ in 0..2 * SHARDS {
                scope.spawn(|| {
                    histogram.add(Duration::from_micros(10));
                    histogram.add_many(Duration::from_micros(11), 2);
                    histogram.add_sum(Duration::from_micros(22));
                });
            }
        });
        histogram.add(Duration::from_secs(1_000));
        let mut text = String::new();
        encode(&mut text, &registry).unwrap();
        assert!(text.contains("delay_seconds_bucket{le=\"0.00001\"} 16\n"), "{text}");
        assert!(text.contains("delay_seconds_bucket{le=\"0.000025\"} 48\n"), "{text}");
        assert!(text.contains("delay_seconds_bucket{le=\"300.0\"} 48\n"), "{text}");
        assert!(text.contains("delay_seconds_bucket{le=\"+Inf\"} 49\n"), "{text}");
        assert!(text.contains("delay_seconds_count 49\n"), "{text}");
        assert!(text.contains("delay_seconds_sum 1000.000512\n"), "{text}");
    }
}
