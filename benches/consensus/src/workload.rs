//! The work of every library, and how its cost is measured: CPU time of the whole process, all of
//! its threads, per committed proposal. Wall time would flatter a library that spreads its work
//! over many cores.

use std::time::Duration;

use criterion::Throughput;
use criterion::measurement::{Measurement, ValueFormatter};
use rustix::time::{ClockId, clock_gettime};

/// Three nodes are the smallest group that survives a loss, and the usual number of a region's
/// replicas.
pub const NODES: usize = 3;

/// A log is compacted when it holds this many applied entries more than [`KEEP`], the number that
/// stays for followers that lag. Both are openraft's defaults, used for all libraries. So each log
/// is bounded, and compaction is part of the price.
pub const COMPACT_EVERY: u64 = 5000;
pub const KEEP: u64 = 1000;

/// The load of a step.
#[derive(Clone, Copy)]
pub struct Load {
    pub payload: usize,
    pub proposals: usize,
}

pub const LOADS: [Load; 4] = [
    Load { payload: 16, proposals: 1 },
    Load { payload: 16, proposals: 64 },
    Load { payload: 1024, proposals: 1 },
    Load { payload: 1024, proposals: 64 },
];

impl Load {
    /// A command in a buffer of its own, like a request from a socket.
    pub fn command(self) -> Vec<u8> {
        vec![7; self.payload]
    }

    /// The tally that all nodes must have after this many more steps.
    pub fn after(self, steps: u64, before: Tally) -> Tally {
        let entries = steps * self.proposals as u64;
        Tally {
            entries: before.entries + entries,
            bytes: before.bytes + entries * self.payload as u64,
        }
    }
}

/// The state machine: how many commands it applied, and how long they were.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Tally {
    pub entries: u64,
    pub bytes: u64,
}

impl Tally {
    pub fn apply(&mut self, command: &[u8]) {
        self.entries += 1;
        self.bytes += command.len() as u64;
    }
}

/// Three nodes of one library that have elected a leader. Messages go from node to node by value,
/// logs and state machines are in memory, and time does not pass: no node is ticked.
pub trait Cluster {
    /// Runs `steps` steps. In each the leader gets the proposals, and the step ends when they are
    /// committed and applied. At the end of the last step they are applied on all nodes, and the
    /// cluster has checked that.
    fn run(&mut self, steps: u64, load: Load);
}

pub fn verify(nodes: [Tally; NODES], expected: Tally) {
    assert_eq!(nodes, [expected; NODES], "every node applies every command once");
}

/// The CPU time of all threads of this process so far.
fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.try_into().expect("a process has not used a negative amount of time")
}

/// The CPU time that `work` takes.
pub fn cost_of(work: impl FnOnce()) -> Duration {
    let began = cpu_time();
    work();
    cpu_time() - began
}

/// CPU time for criterion. Its report shows the cost of a step as `time`. As `thrpt` it shows the
/// cost of a proposal, not the number of proposals in a second.
pub struct CpuTime;

impl Measurement for CpuTime {
    type Intermediate = Duration;
    type Value = Duration;

    fn start(&self) -> Duration {
        cpu_time()
    }

    fn end(&self, began: Duration) -> Duration {
        cpu_time() - began
    }

    fn add(&self, a: &Duration, b: &Duration) -> Duration {
        *a + *b
    }

    fn zero(&self) -> Duration {
        Duration::ZERO
    }

    fn to_f64(&self, value: &Duration) -> f64 {
        value.as_nanos() as f64
    }

    fn formatter(&self) -> &dyn ValueFormatter {
        &MicrosOfCpu
    }
}

struct MicrosOfCpu;

impl ValueFormatter for MicrosOfCpu {
    fn scale_values(&self, _typical: f64, values: &mut [f64]) -> &'static str {
        values.iter_mut().for_each(|nanos| *nanos /= 1e3);
        "CPU µs"
    }

    fn scale_throughputs(
        &self,
        _typical: f64,
        throughput: &Throughput,
        values: &mut [f64],
    ) -> &'static str {
        let Throughput::Elements(proposals) = throughput else {
            panic!("the workload counts proposals");
        };
        values.iter_mut().for_each(|nanos| *nanos /= 1e3 * *proposals as f64);
        "CPU µs/proposal"
    }

    fn scale_for_machines(&self, _values: &mut [f64]) -> &'static str {
        "CPU ns"
    }
}
