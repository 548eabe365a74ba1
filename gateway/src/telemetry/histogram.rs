//! A histogram that many cores may fill without a lock.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
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

/// Durations, counted. Clones share their counts.
#[derive(Clone, Debug, Default)]
pub struct Histogram(Arc<Counts>);

#[derive(Debug, Default)]
struct Counts {
    buckets: [AtomicU64; BOUNDS.len() + 1],
    nanos: AtomicU64,
}

/// The counts of one turn, merged into a [`Histogram`] when it ends: a stream's events touch no shared memory.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    buckets: [u32; BOUNDS.len() + 1],
    nanos: u64,
}

fn bucket(duration: Duration) -> usize {
    let seconds = duration.as_secs_f64();
    BOUNDS.partition_point(|bound| *bound < seconds)
}

impl Tally {
    /// Counts one.
    pub fn add(&mut self, duration: Duration) {
        self.buckets[bucket(duration)] += 1;
        self.nanos = self.nanos.saturating_add(duration.as_nanos() as u64);
    }

    /// Counts several that lie below a bound; their sum comes with [`Tally::correct_sum`].
    pub fn add_many(&mut self, bound: Duration, count: u32) {
        self.buckets[bucket(bound)] += count;
    }

    /// The sum of all that was counted, where it is known exactly.
    pub fn correct_sum(&mut self, sum: Duration) {
        self.nanos = sum.as_nanos() as u64;
    }
}

impl Histogram {
    /// Counts one.
    pub fn add(&self, duration: Duration) {
        self.0.buckets[bucket(duration)].fetch_add(1, Relaxed);
        self.0.nanos.fetch_add(duration.as_nanos() as u64, Relaxed);
    }

    /// Takes in a turn's counts.
    pub fn merge(&self, tally: &Tally) {
        for (shared, own) in self.0.buckets.iter().zip(tally.buckets) {
            if own > 0 {
                shared.fetch_add(own.into(), Relaxed);
            }
        }
        self.0.nanos.fetch_add(tally.nanos, Relaxed);
    }
}

impl TypedMetric for Histogram {
    const TYPE: MetricType = MetricType::Histogram;
}

impl EncodeMetric for Histogram {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        let bounds = BOUNDS.into_iter().chain([f64::INFINITY]);
        let buckets: Vec<(f64, u64)> = bounds.zip(self.0.buckets.iter().map(|count| count.load(Relaxed))).collect();
        let count = buckets.iter().map(|(_, count)| count).sum();
        let sum = self.0.nanos.load(Relaxed) as f64 / 1e9;
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
    fn a_turns_tally_and_single_durations_add_up() {
        let histogram = Histogram::default();
        let mut registry = Registry::default();
        registry.register("delay_seconds", "Delay", histogram.clone());
        let mut tally = Tally::default();
        tally.add(Duration::from_micros(10));
        tally.add(Duration::from_micros(11));
        histogram.merge(&tally);
        histogram.add(Duration::from_secs(1_000));
        let mut text = String::new();
        encode(&mut text, &registry).unwrap();
        assert!(text.contains("delay_seconds_bucket{le=\"0.00001\"} 1\n"), "{text}");
        assert!(text.contains("delay_seconds_bucket{le=\"0.000025\"} 2\n"), "{text}");
        assert!(text.contains("delay_seconds_bucket{le=\"300.0\"} 2\n"), "{text}");
        assert!(text.contains("delay_seconds_bucket{le=\"+Inf\"} 3\n"), "{text}");
        assert!(text.contains("delay_seconds_count 3\n"), "{text}");
    }
}
