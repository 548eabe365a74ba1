//! How long each case takes, as criterion says.

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use headgate_benches::cases::{Meter, Size, measure};

struct Watch<'a>(&'a mut Criterion);

impl Meter for Watch<'_> {
    fn measure<I>(&mut self, name: &str, size: Size, mut setup: impl FnMut() -> I, mut run: impl FnMut(&mut I)) {
        let (group, name) = name.split_once(": ").expect("a group before the name");
        let mut group = self.0.benchmark_group(group);
        group.throughput(match size {
            Size::Events(events) => Throughput::Elements(events),
            Size::Bytes(bytes) => Throughput::Bytes(bytes),
        });
        group.bench_function(name, |b| b.iter_batched_ref(&mut setup, &mut run, BatchSize::SmallInput));
        group.finish();
    }
}

fn all(c: &mut Criterion) {
    measure(&mut Watch(c));
}

criterion_group!(time, all);
criterion_main!(time);
