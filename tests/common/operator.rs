//! An operator, which inspects every replica of a cluster, and splits and moves its regions.

use std::collections::HashMap;
use std::time::Duration;

use bytes::Bytes;
use esker_client::{KvClient, PlacementClient, RegionInfo};
use esker_model::{KeyRange, Peer, Role, StoreId};
use esker_rpc::proto::esker as wire;
use esker_rpc::proto::esker::admin_client::AdminClient;
use parking_lot::Mutex;
use tonic::transport::{Channel, Endpoint};

use super::eventually;
use super::process::PATIENCE;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

pub struct Operator {
    placement: PlacementClient,
    kv: KvClient,
    channels: Mutex<HashMap<String, Channel>>,
}

impl Operator {
    pub async fn connect(placement: &[String]) -> Self {
        let placement = PlacementClient::connect_within(placement.to_vec(), PATIENCE)
            .await
            .expect("a cluster that runs answers");
        let kv = KvClient::new(placement.clone(), []);
        Operator { placement, kv, channels: Mutex::default() }
    }

    pub fn placement(&self) -> &PlacementClient {
        &self.placement
    }

    pub fn kv(&self) -> &KvClient {
        &self.kv
    }

    pub async fn regions(&self) -> Vec<RegionInfo> {
        self.regions_in(&KeyRange::all()).await
    }

    /// The regions that hold keys of a range, in the order of their keys.
    pub async fn regions_in(&self, range: &KeyRange) -> Vec<RegionInfo> {
        self.placement.scan_regions(range, 0).await.expect("placement answers")
    }

    /// The store that listens at an address.
    pub async fn store_at(&self, address: &str) -> u64 {
        let stores = self.placement.get_stores(true).await.expect("placement answers");
        let found = stores.iter().find(|store| store.address == address);
        found.unwrap_or_else(|| panic!("no store at {address}: {stores:?}")).id
    }

    pub async fn address(&self, store: u64) -> Result<String, String> {
        let (store, _) =
            self.placement.get_store(StoreId(store)).await.map_err(|error| error.to_string())?;
        Ok(store.address)
    }

    async fn admin(&self, store: u64) -> Result<AdminClient<Channel>, String> {
        let address = self.address(store).await?;
        let mut channels = self.channels.lock();
        let channel = channels.entry(address).or_insert_with_key(|address| {
            Endpoint::from_shared(format!("http://{address}"))
                .expect("stores have addresses")
                .connect_timeout(CONNECT_TIMEOUT)
                .timeout(ANSWER_TIMEOUT)
                .connect_lazy()
        });
        Ok(AdminClient::new(channel.clone()))
    }

    /// The state of one store's replica, as that store reports it.
    pub async fn replica(
        &self,
        region: u64,
        store: u64,
        with_checksum: bool,
    ) -> Result<wire::RegionDetailResponse, String> {
        let request = wire::RegionDetailRequest { region_id: region, with_checksum };
        let answer = self.admin(store).await?.region_detail(request).await;
        let answer = answer.map_err(|status| format!("store {store}: {status}"))?.into_inner();
        match &answer.region_error {
            None => Ok(answer),
            Some(error) => Err(format!("region {region} on store {store}: {error:?}")),
        }
    }

    /// Asks a region's leader to hand over to the replica on another store. Whether that happens
    /// shows in the region's leader. A refusal is returned as an error.
    pub async fn transfer_leader(&self, region: &RegionInfo, to: u64) -> Result<(), String> {
        let leader = region.leader.ok_or_else(|| "no leader is known".to_owned())?;
        let request = wire::TransferLeaderRequest {
            region_id: region.region.id.0,
            region_epoch: Some(region.region.epoch.into()),
            to_store: to,
        };
        let answer = self.admin(leader.store.0).await?.transfer_leader(request).await;
        match answer.map_err(|status| status.to_string())?.into_inner().region_error {
            None => Ok(()),
            Some(error) => Err(error.message),
        }
    }

    /// Waits until there is a region for every key, and every region has this many voters,
    /// all of which keep up.
    pub async fn whole(&self, replicas: usize, within: Duration) -> Vec<RegionInfo> {
        eventually("every region has all its replicas", within, async || {
            let regions = self
                .placement
                .scan_regions(&KeyRange::all(), 0)
                .await
                .map_err(|error| error.to_string())?;
            let mut covered = Some(Bytes::new());
            for region in &regions {
                if covered.as_ref() != Some(region.region.range.start())
                    || !is_whole(region, replicas)
                {
                    return Err(format!("{covered:?}, then {region:?}"));
                }
                // No region follows the one that has no end.
                covered = region.region.range.end().cloned();
            }
            if covered.is_some() {
                return Err(format!("nobody speaks for what follows {covered:?}"));
            }
            Ok(regions)
        })
        .await
    }

    /// Waits until all replicas of every region hold the same data: the same checksum at the same
    /// applied index. To be called when there are no writes. Returns the number of pairs that one
    /// replica of each region holds, all together.
    pub async fn replicas_are_equal(&self, replicas: usize, within: Duration) -> u64 {
        let mut pairs = 0;
        for region in self.whole(replicas, within).await {
            let id = region.region.id.0;
            pairs +=
                eventually(&format!("region {id} is the same everywhere"), within, async || {
                    let mut seen = Vec::new();
                    for peer in &region.region.peers {
                        let detail = self.replica(id, peer.store.0, true).await?;
                        seen.push(detail.checksum.ok_or("no checksum")?);
                    }
                    match seen.iter().all(|checksum| *checksum == seen[0]) {
                        true => Ok(seen[0].pairs),
                        false => Err(format!("{seen:?}")),
                    }
                })
                .await;
        }
        pairs
    }
}

fn is_whole(region: &RegionInfo, replicas: usize) -> bool {
    let voter = |peer: &&Peer| peer.role == Role::Voter;
    region.leader.is_some()
        && region.pending.is_empty()
        && region.down.is_empty()
        && region.region.peers.len() == replicas
        && region.region.peers.iter().filter(voter).count() == replicas
}
