//! File descriptors: how many this process may have, and what a node does with its share.
//!
//! An engine that cannot open a file must stop its store. Any client can open connections, so these
//! never get the descriptors that the engines need. The numbers are shares of the process's limit,
//! which the `esker` program raises as far as it may. A program that embeds a node keeps its own
//! limit.

use rustix::process::{Resource, getrlimit};

/// A node has no use for a higher limit, and some systems allow a billion.
pub(crate) const MOST: u64 = 1 << 20;

/// What a node needs besides the files and connections below: standard streams, its listener,
/// journals, manifests and logs of the engines, and files that flushes and compactions write.
const OWN: u64 = 96;

/// RocksDB instances of a node: `kv` and `log`, of its store and of its placement member.
const ENGINES: u64 = 4;

/// Data files that one engine holds open, at least and at most.
const ENGINE_FILES: std::ops::RangeInclusive<u64> = 20..=8192;

/// Connections that the node opens itself: to other stores, for snapshots, to placement.
const OUTGOING: std::ops::RangeInclusive<u64> = 16..=1024;

/// Connections that the node accepts. Each takes memory, too: some 20 KiB when it is idle.
const ACCEPTED: std::ops::RangeInclusive<u64> = 32..=16_384;

/// With fewer, a node could not even have the minimum of each of the above.
#[cfg(any(test, feature = "cli"))]
pub(crate) const LEAST: u64 =
    OWN + ENGINES * *ENGINE_FILES.start() + *OUTGOING.start() + *ACCEPTED.start();

/// How one node divides its descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Share {
    /// SST files that each engine may hold open.
    pub engine_files: i32,
    /// Connections that the port may hold.
    pub connections: usize,
}

impl Share {
    /// Half for the engines, a sixteenth for the node's own connections, and the rest for
    /// connections of others. Below [`LEAST`] each gets its minimum, in the hope that not all of it
    /// is used.
    pub fn of(descriptors: u64) -> Share {
        let within = |wanted: u64, range: std::ops::RangeInclusive<u64>| {
            wanted.clamp(*range.start(), *range.end())
        };
        // If there are few descriptors, half of them would leave too few for the rest.
        let least = OWN + *OUTGOING.start() + *ACCEPTED.start();
        let spare = descriptors.saturating_sub(least) / ENGINES;
        let engine_files = within((descriptors / 2 / ENGINES).min(spare), ENGINE_FILES);
        let outgoing = within(descriptors / 16, OUTGOING);
        let rest = descriptors.saturating_sub(OWN + ENGINES * engine_files + outgoing);
        Share { engine_files: engine_files as i32, connections: within(rest, ACCEPTED) as usize }
    }
}

/// How many descriptors this process may have.
pub(crate) fn current() -> u64 {
    getrlimit(Resource::Nofile).current.unwrap_or(MOST).min(MOST)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn used(share: Share) -> u64 {
        OWN + ENGINES * share.engine_files as u64 + share.connections as u64
    }

    #[test]
    fn a_node_never_plans_with_more_than_it_has_and_its_engines_come_first() {
        for descriptors in (LEAST..5000).chain([20_000, 65_536, MOST]) {
            let share = Share::of(descriptors);
            assert!(used(share) + OUTGOING.start() <= descriptors, "{descriptors}: {share:?}");
        }
        let (engine_files, connections) = (2500, 8880);
        assert_eq!(Share::of(20_000), Share { engine_files, connections });
        let (engine_files, connections) = (8192, 16_384);
        assert_eq!(Share::of(MOST), Share { engine_files, connections });
    }
}
