//! Changes that an operator makes to a region: splits, and transfers of its leadership.

use std::time::Duration;

use bytes::Bytes;
use esker_model::limits::KEYS_TOP;
use esker_model::{Region, RegionId, StoreId};
use esker_rpc::convert::end_key;
use esker_rpc::proto::{errorpb, esker as wire};
use tokio::time::{Instant, sleep, timeout};

use super::AdminClient;
use crate::error::ClientError;
use crate::placement::RegionInfo;

/// How often a change is sent to the leader that the placement driver names, when the store answers
/// that it does not lead, that the region has changed since, or that it is busy.
pub const CHANGE_ATTEMPTS: usize = 20;

/// The time between two looks at something that is about to change.
const LOOK_AGAIN: Duration = Duration::from_millis(150);

/// How long a split that is done waits for placement to know its parts.
const KNOWN_WITHIN: Duration = Duration::from_secs(5);

/// Where a region is to be split.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SplitAt {
    /// Each of these keys begins a region afterwards: 1 to 256 keys, in any order.
    Keys(Vec<Bytes>),
    /// As many keys as cut the region into so many parts of about equal size: 2 to 128.
    Parts(u32),
}

impl AdminClient {
    /// Splits one region, and returns the parts in the order of their keys. The last part keeps the
    /// region's id. The leader that placement names is asked up to [`CHANGE_ATTEMPTS`] times, until
    /// the view of the region is the latest. When the region is split, the call waits until placement
    /// knows the parts, so that it finds them for whoever asks next, but for 5 s at most.
    ///
    /// # Errors
    /// [`ClientError::KeyOutside`] for a key that leaves nothing on one side,
    /// [`ClientError::TopRegion`], [`ClientError::NoSuchRegion`], [`ClientError::NoLeader`] after the last attempt,
    /// [`ClientError::RegionRefused`] with the leader's reason, also if it was busy in the last
    /// attempt, and those of [`AdminClient::store`]. After [`ClientError::ChangeUnknown`] and
    /// [`ClientError::NoAnswer`] the region may be split, or may be split later.
    pub async fn split_region(
        &self,
        region: RegionId,
        at: &SplitAt,
    ) -> Result<Vec<Region>, ClientError> {
        let (keys, parts) = match at {
            SplitAt::Keys(keys) => (&keys[..], 0),
            SplitAt::Parts(parts) => (&[][..], *parts),
        };
        let mut busy = None;
        for _ in 0..CHANGE_ATTEMPTS {
            let found = self.region(region).await?;
            if *found.region.range.start() >= KEYS_TOP[..] {
                return Err(ClientError::TopRegion { region });
            }
            check_split_keys(&found.region, keys)?;
            let Some(leader) = found.leader else {
                busy = None;
                sleep(LOOK_AGAIN).await;
                continue;
            };
            let request = wire::SplitRegionRequest {
                region_id: region.0,
                region_epoch: Some(found.region.epoch.into()),
                parts,
                keys: keys.to_vec(),
            };
            let answer = self.store(leader.store).await?.split_region(request).await?;
            match answer.region_error {
                // A part that cannot be read is treated as one that the answer leaves out.
                None => {
                    let parts = answer.regions.into_iter();
                    let parts: Vec<Region> =
                        parts.filter_map(|part| part.try_into().ok()).collect();
                    // The split is done, whether placement hears of it in time or not.
                    let _ = timeout(KNOWN_WITHIN, self.until_known(&parts)).await;
                    return Ok(parts);
                }
                Some(error) => busy = look_again_or_fail("the split", region, *error).await?,
            }
        }
        Err(match busy {
            Some(reason) => ClientError::RegionRefused { region, reason },
            None => ClientError::NoLeader { region },
        })
    }

    /// Returns when placement knows these regions as they are, or newer ones with their ids.
    async fn until_known(&self, parts: &[Region]) {
        for part in parts {
            loop {
                let known = self.region(part.id).await;
                if known.is_ok_and(|known| known.region.epoch.version >= part.epoch.version) {
                    break;
                }
                sleep(LOOK_AGAIN).await;
            }
        }
    }

    /// Asks the leader of a region to hand over until the replica on store `to` leads, or until
    /// `patience` ends. A few election timeouts are enough. Does nothing if that replica leads
    /// already.
    ///
    /// # Errors
    /// [`ClientError::NotTransferred`] when the time is over, [`ClientError::NoReplica`] if store
    /// `to` has no replica, [`ClientError::ReplicaDown`] if its replica is known to be silent,
    /// [`ClientError::NoSuchRegion`], [`ClientError::RegionRefused`] with the leader's reason, and
    /// those of [`AdminClient::store`]. After [`ClientError::ChangeUnknown`] and
    /// [`ClientError::NoAnswer`] the replica may become the leader.
    pub async fn transfer_leader(
        &self,
        region: RegionId,
        to: StoreId,
        patience: Duration,
    ) -> Result<(), ClientError> {
        // None if it never comes.
        let deadline = Instant::now().checked_add(patience);
        let mut is_ordered = false;
        loop {
            let found = self.region(region).await?;
            self.check_replica(&found.region, to).await?;
            if found.leader.is_some_and(|leader| leader.store == to) {
                return Ok(());
            }
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return Err(ClientError::NotTransferred { region, store: to, waited: patience });
            }
            let Some(leader) = found.leader else {
                sleep(LOOK_AGAIN).await;
                continue;
            };
            if let Some(silent) = silence_of(&found, to).filter(|_| !is_ordered) {
                return Err(ClientError::ReplicaDown { region, store: to, silent });
            }
            let request = wire::TransferLeaderRequest {
                region_id: region.0,
                region_epoch: Some(found.region.epoch.into()),
                to_store: to.0,
            };
            let answer = self.store(leader.store).await?.transfer_leader(request).await?;
            match answer.region_error {
                None => {
                    is_ordered = true;
                    sleep(LOOK_AGAIN).await;
                }
                Some(error) => {
                    let looked = look_again_or_fail("the transfer of leadership", region, *error);
                    match looked.await {
                        // The order that was accepted may still be carried out.
                        Err(ClientError::RegionRefused { .. }) if is_ordered => {
                            sleep(LOOK_AGAIN).await
                        }
                        Err(error) => return Err(error),
                        Ok(_) => {}
                    }
                }
            }
        }
    }

    async fn check_replica(&self, region: &Region, store: StoreId) -> Result<(), ClientError> {
        let mut replicas: Vec<_> = region.peers.iter().map(|peer| peer.store).collect();
        if replicas.contains(&store) {
            return Ok(());
        }
        self.address(store).await?;
        replicas.sort_unstable();
        Err(ClientError::NoReplica { region: region.id, store, replicas })
    }
}

/// For how long the region's leader has not heard of its replica on a store, if that is long.
fn silence_of(found: &RegionInfo, store: StoreId) -> Option<Duration> {
    let peer = found.region.peer_on(store)?.id;
    let down = found.down.iter().find(|down| down.peer == peer)?;
    Some(Duration::from_secs(down.seconds))
}

/// A key outside the region is the caller's mistake only while the region is as the caller saw it.
fn check_split_keys(region: &Region, keys: &[Bytes]) -> Result<(), ClientError> {
    match keys.iter().find(|key| !is_split_by(region, key)) {
        None => Ok(()),
        Some(key) => Err(ClientError::KeyOutside {
            region: region.id,
            key: key.clone(),
            start: region.range.start().clone(),
            end: end_key(&region.range),
        }),
    }
}

/// Whether a split at `key` leaves something on both sides.
fn is_split_by(region: &Region, key: &Bytes) -> bool {
    region.contains(key) && key != region.range.start()
}

/// Waits if the placement driver's view was only outdated, or if the store is busy, and returns what
/// a busy store said. Any other error of a change is returned, one that leaves open whether the
/// change was made as [`ClientError::ChangeUnknown`].
async fn look_again_or_fail(
    change: &'static str,
    region: RegionId,
    error: errorpb::Error,
) -> Result<Option<String>, ClientError> {
    // Asked first, because such an error promises nothing, whatever else is in it.
    if let Some(undetermined) = &error.undetermined_result {
        let reason = first_said([&error.message, &undetermined.message]);
        return Err(ClientError::ChangeUnknown { change, region, reason });
    }
    let outdated = is_outdated_view(&error);
    let busy = error.server_is_busy.as_ref();
    let busy = busy.map(|busy| first_said([&error.message, &busy.reason]));
    if !outdated && busy.is_none() {
        return Err(ClientError::RegionRefused { region, reason: error.message });
    }
    sleep(LOOK_AGAIN).await;
    Ok(busy)
}

/// The first text that is not empty.
fn first_said(texts: [&String; 2]) -> String {
    texts.into_iter().find(|text| !text.is_empty()).cloned().unwrap_or_default()
}

/// Whether the command was not executed, and may succeed when it is sent to the current leader.
fn is_outdated_view(error: &errorpb::Error) -> bool {
    error.not_leader.is_some()
        || error.epoch_not_match.is_some()
        || error.region_not_found.is_some()
        || error.stale_command.is_some()
}

#[cfg(test)]
mod tests {
    use esker_model::{KeyRange, RegionId};

    use super::*;

    #[test]
    fn only_a_key_strictly_inside_splits_a_region() {
        let range = KeyRange::new(Bytes::new(), Some(Bytes::from_static(b"m\x00")));
        let region =
            Region { range: range.expect("a range"), ..Region::uninitialized(RegionId(1)) };
        let splits = |key: &'static [u8]| is_split_by(&region, &Bytes::from_static(key));
        assert!(splits(b"a") && splits(b"m"));
        assert!(!splits(b"") && !splits(b"m\x00") && !splits(b"z"));
    }

    #[test]
    fn only_an_outdated_view_is_tried_again() {
        let moved = errorpb::Error { not_leader: Some(Default::default()), ..Default::default() };
        let full = errorpb::Error { disk_full: Some(Default::default()), ..Default::default() };
        assert!(is_outdated_view(&moved) && !is_outdated_view(&full));
    }
}
