//! Changes to the regions while clients work.

use std::time::Duration;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::Layout;
use crate::common::eventually;
use crate::common::operator::Operator;
use crate::common::process::PATIENCE;
use crate::model;

/// The time between two changes. A client repeats a request at most ten times, so a region that
/// keeps changing its leader would cause errors.
const PACE: Duration = Duration::from_millis(50);

/// How long a transfer may take before another one is tried.
const TRANSFER: Duration = Duration::from_secs(2);

/// Splits regions at random keys of the workers, and moves leaders between stores, until there have
/// been `splits` of one and `transfers` of the other.
pub async fn split_and_transfer(
    operator: &Operator,
    workers: usize,
    splits: usize,
    transfers: usize,
) {
    let mut random = ChaCha8Rng::seed_from_u64(7);
    let mut pace = tokio::time::interval(PACE);
    let (mut split, mut moved) = (0, 0);
    let started = std::time::Instant::now();
    while split < splits || moved < transfers {
        assert!(started.elapsed() < PATIENCE, "only {split} splits and {moved} transfers");
        pace.tick().await;
        let layout = Layout::ALL[random.random_range(0..Layout::ALL.len())];
        if split < splits {
            let key =
                model::key(random.random_range(0..workers), random.random_range(0..model::KEYS));
            let made = operator
                .kv()
                .split_region(vec![layout.bound(&key)])
                .await
                .expect("a region splits");
            split += usize::from(!made.is_empty());
        }
        let range = layout.range(b"k", b"l");
        let regions = operator.regions_in(&range).await;
        let region = &regions[random.random_range(0..regions.len())];
        let Some(leader) = region.leader else { continue };
        let others: Vec<_> =
            region.region.peers.iter().filter(|peer| peer.id != leader.id).collect();
        let to = others[random.random_range(0..others.len())].store.0;
        // A region that has changed since is not moved, but there are others.
        if operator.transfer_leader(region, to).await.is_ok() {
            moved += usize::from(leads(operator, region.region.id.0, to).await);
        }
    }
}

/// Waits until the replica on a store leads. Returns whether it does.
async fn leads(operator: &Operator, region: u64, store: u64) -> bool {
    use esker_rpc::proto::esker::Role;
    let looking = eventually("the leader moves", PATIENCE, async || {
        match operator.replica(region, store, false).await {
            Ok(replica) if replica.role == Role::Leader as i32 => Ok(()),
            Ok(replica) => Err(format!("{replica:?}")),
            Err(reason) => Err(reason),
        }
    });
    tokio::time::timeout(TRANSFER, looking).await.is_ok()
}
