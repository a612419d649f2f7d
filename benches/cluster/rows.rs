//! The loads, and what was measured of each.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use esker::ycsb::{Kind, PhaseReport, Workload};

use crate::limit::Limits;
use crate::systems::Place;

/// Bytes of a record, unless the load says otherwise.
pub const VALUE_BYTES: usize = 1_000;
/// Records of the usual size.
pub const RECORDS: u64 = 100_000;
/// Bytes of all records of another size, together.
const OTHER_BYTES: u64 = 128 << 20;
/// The larger values, and how many are in one batch of the limit.
pub const LARGE_BATCHES: [(usize, usize); 2] = [(64 << 10, 16), (1 << 20, 4)];

/// One load: clients that make one request after the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Load {
    pub value_bytes: usize,
    kind: LoadKind,
    pub clients: usize,
    pub workload: Workload,
}

/// The order of the loads in the table. Those that read come first: they find what was loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum LoadKind {
    Read,
    Mixed,
    Update,
}

impl Load {
    pub const fn new(workload: Workload, clients: usize, value_bytes: usize) -> Load {
        let kind = match workload {
            Workload::C => LoadKind::Read,
            Workload::U => LoadKind::Update,
            _ => LoadKind::Mixed,
        };
        Load { value_bytes, kind, clients, workload }
    }

    pub const fn updates(clients: usize) -> Load {
        Load::new(Workload::U, clients, VALUE_BYTES)
    }

    /// How many records it goes over.
    pub fn records(&self) -> u64 {
        match self.value_bytes {
            VALUE_BYTES => RECORDS,
            bytes => (OTHER_BYTES / bytes as u64).clamp(64, RECORDS),
        }
    }

    pub fn is_update(&self) -> bool {
        self.kind == LoadKind::Update
    }

    pub fn is_read(&self) -> bool {
        self.kind == LoadKind::Read
    }
}

impl fmt::Display for Load {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.workload {
            Workload::U => "updates".into(),
            Workload::C => "reads".into(),
            other => format!("YCSB {}", other.letter().to_uppercase()),
        };
        let clients = if self.clients == 1 { "client" } else { "clients" };
        let size = match self.value_bytes {
            bytes if bytes >= 1 << 20 => format!("{} MiB", bytes >> 20),
            bytes if bytes >= 1 << 10 => format!("{} KiB", bytes >> 10),
            bytes => format!("{bytes} B"),
        };
        write!(f, "{what}, {} {clients}, {size}", self.clients)
    }
}

/// What one load measured in one round.
#[derive(Debug, Clone)]
pub struct Sample {
    /// Operations a second.
    pub rate: f64,
    pub p50_us: f64,
    pub p99_us: f64,
    /// The 99th percentile of the reads alone, where a load mixes them with writes.
    pub reads_p99_us: Option<f64>,
    /// Processor time of an operation: of the whole cluster and its clients.
    pub processor_us: f64,
}

impl Sample {
    pub fn new(report: &PhaseReport, processor: Duration, load: Load) -> Sample {
        let of = |kind: Kind| report.requests.iter().find(|request| request.kind == kind);
        // Of a mixed load, the writes are the slower part.
        let main = [Kind::ReadModifyWrite, Kind::Update, Kind::Read].into_iter().find_map(of);
        let reads = of(Kind::Read).filter(|_| !load.is_read());
        Sample {
            rate: report.throughput,
            p50_us: main.map_or(0.0, |main| main.p50_us as f64),
            p99_us: main.map_or(0.0, |main| main.p99_us as f64),
            reads_p99_us: reads.map(|reads| reads.p99_us as f64),
            processor_us: processor.as_secs_f64() * 1e6 / report.operations.max(1) as f64,
        }
    }
}

/// Everything that one round measured.
#[derive(Debug, Default)]
pub struct Round {
    pub limits: Limits,
    pub samples: BTreeMap<(Place, u32, Load), Sample>,
}
