//! The performance of one store on this machine's disk: durable appends of many groups, alone and
//! merged, and reads and writes of a region with a single replica.

use std::hint::black_box;
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use bytes::Bytes;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use esker_engine::{Cf, EngineOptions, KvEngine, LogBatch, LogEngine};
use esker_model::{
    Epoch, KeyRange, LogIndex, Peer, PeerId, Region, RegionId, RegionReport, StoreId, SystemClock,
    Term,
};
use esker_raftstore::raw_value::RawValue;
use esker_raftstore::state::bootstrap_region;
use esker_raftstore::{
    Envelope, Mutation, Outbox, Parts, RegionSnapshotSource, RequestContext, Store, StoreConfig,
    WriteTag,
};

/// One fsync serves the appends of all groups, so the cost of a durable append falls with their
/// number.
fn log_append(c: &mut Criterion) {
    let folder = tempfile::tempdir().expect("a folder");
    let log = LogEngine::open(folder.path(), &EngineOptions::default()).expect("a log");
    let entry = vec![7u8; 1024];
    let mut group = c.benchmark_group("log_append_1KiB");
    let mut index = 0;
    for groups in [1u64, 16, 256] {
        group.throughput(Throughput::Elements(groups));
        group.bench_with_input(BenchmarkId::from_parameter(groups), &groups, |b, groups| {
            b.iter(|| {
                index += 1;
                let mut batch = LogBatch::new();
                for id in 0..*groups {
                    batch.append(id, index, &entry);
                }
                log.write(&batch).expect("a durable write");
            });
        });
    }
    group.finish();
}

/// An outbox that drops everything, for a store that is alone.
struct Nobody;

impl Outbox for Nobody {
    fn send(&self, _: Envelope) {}
    fn send_snapshot(&self, _: Envelope, _: RegionSnapshotSource) {}
    fn report_region(&self, _: RegionReport) {}
    fn report_split(&self, _: Vec<Region>) {}
    fn leadership(&self, _: RegionId, _: Term, _: Option<Peer>, _: bool) {}
}

fn put(key: u64, value: &Bytes) -> Mutation {
    let key = Bytes::copy_from_slice(&key.to_be_bytes());
    Mutation::Put { cf: Cf::Default, key, value: value.clone() }
}

fn region(c: &mut Criterion) {
    const KEYS: u64 = 10_000;
    const WRITERS: u64 = 64;
    let folder = tempfile::tempdir().expect("a folder");
    let options = EngineOptions::default();
    let kv = KvEngine::open(&folder.path().join("kv"), &options).expect("an engine");
    let log = LogEngine::open(&folder.path().join("log"), &options).expect("a log");
    let descriptor = Region {
        id: RegionId(1),
        range: KeyRange::all(),
        epoch: Epoch::FIRST,
        peers: vec![Peer::voter(PeerId(2), StoreId(1))],
    };
    bootstrap_region(&kv, &log, StoreId(1), &descriptor).expect("a first region");
    let store = Store::open(Parts {
        store: StoreId(1),
        kv,
        log,
        snapshots: folder.path().join("snap"),
        config: StoreConfig::default(),
        outbox: Arc::new(Nobody),
        clock: Arc::new(SystemClock::new()),
    })
    .expect("a store");
    let running = store.start().expect("threads");
    let handle = running.handle().clone();
    let context = RequestContext { epoch: descriptor.epoch, ..RequestContext::default() };
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let value = RawValue::new(Bytes::from(vec![7; 1000]), None).encode();
    let write_all = |keys: std::ops::Range<u64>, tag: &mut Option<WriteTag>| {
        runtime.block_on(async {
            let writes = keys.map(|key| {
                // As with our client, no two writes have the same tag.
                let tag = tag.as_mut().map(|tag| {
                    tag.sequence += 1;
                    *tag
                });
                let context = RequestContext { tag, ..context };
                handle.write(RegionId(1), context, vec![put(key, &value)])
            });
            let outcomes = futures_util::future::join_all(writes).await;
            for outcome in outcomes {
                let done = outcome.expect("a write");
                if let Some(tag) = tag {
                    tag.horizon = done.index;
                }
            }
        });
    };
    // The region elects itself within a few timeouts.
    while !handle.holds_lease(RegionId(1)) {
        std::thread::yield_now();
    }
    for first in (0..KEYS).step_by(500) {
        write_all(first..first + 500, &mut None);
    }

    let mut group = c.benchmark_group("region_1000B");
    let mut key = 0;
    group.bench_function("read_under_lease", |b| {
        b.iter(|| {
            key = (key + 7919) % KEYS;
            let view = runtime.block_on(handle.snapshot(RegionId(1), context)).expect("a view");
            black_box(view.get(esker_engine::Cf::Default, &key.to_be_bytes()).expect("a read"))
        });
    });
    group.throughput(Throughput::Elements(WRITERS));
    group.bench_function("64_writes_at_once", |b| {
        b.iter(|| write_all(0..WRITERS, &mut None));
    });
    let now_s = UNIX_EPOCH.elapsed().map_or(0, |since| since.as_secs());
    let first = WriteTag { client: 1, sequence: 0, horizon: LogIndex(0), now_s };
    let mut tag = Some(first);
    group.bench_function("64_tagged_writes_at_once", |b| {
        b.iter(|| write_all(0..WRITERS, &mut tag));
    });
    group.finish();
    running.stop();
}

criterion_group!(benches, log_append, region);
criterion_main!(benches);
