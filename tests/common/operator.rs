//! Someone who looks at every replica of a cluster, and splits and moves its regions.

use std::collections::HashMap;
use std::time::Duration;

use bytes::Bytes;
use esker_client::{KvClient, PlacementClient, RegionInfo};
use esker_rpc::proto::esker as wire;
use esker_rpc::proto::esker::admin_client::AdminClient;
use esker_rpc::proto::metapb;
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
        self.regions_between(b"", b"").await
    }

    /// In the order of their keys; an empty `end` is above all keys.
    pub async fn regions_between(&self, start: &[u8], end: &[u8]) -> Vec<RegionInfo> {
        let (start, end) = (Bytes::copy_from_slice(start), Bytes::copy_from_slice(end));
        self.placement.scan_regions(start, end, 0).await.expect("placement answers")
    }

    /// The store that listens at an address.
    pub async fn store_at(&self, address: &str) -> u64 {
        let stores = self.placement.get_stores(true).await.expect("placement answers");
        let found = stores.iter().find(|store| store.address == address);
        found.unwrap_or_else(|| panic!("no store at {address}: {stores:?}")).id
    }

    pub async fn address(&self, store: u64) -> Result<String, String> {
        let (store, _) =
            self.placement.get_store(store).await.map_err(|error| error.to_string())?;
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

    /// What one store says of its replica.
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

    /// Asks a region's leader to hand over to the replica on another store. Whether it
    /// does shows in the region's leader; a refusal is an answer like any other.
    pub async fn transfer_leader(&self, region: &RegionInfo, to: u64) -> Result<(), String> {
        let leader = region.leader.ok_or_else(|| "no leader is known".to_owned())?;
        let request = wire::TransferLeaderRequest {
            region_id: region.region.id,
            region_epoch: region.region.region_epoch,
            to_store: to,
        };
        let answer = self.admin(leader.store_id).await?.transfer_leader(request).await;
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
                .scan_regions(Bytes::new(), Bytes::new(), 0)
                .await
                .map_err(|error| error.to_string())?;
            let mut covered = Some(Bytes::new());
            for region in &regions {
                if covered.as_ref() != Some(&region.region.start_key) || !is_whole(region, replicas)
                {
                    return Err(format!("{covered:?}, then {region:?}"));
                }
                // No region follows the one that has no end.
                covered = Some(region.region.end_key.clone()).filter(|end| !end.is_empty());
            }
            if covered.is_some() {
                return Err(format!("nobody speaks for what follows {covered:?}"));
            }
            Ok(regions)
        })
        .await
    }

    /// Waits until all replicas of every region hold the same data: the same checksum at
    /// the same applied index. To be called when nobody writes. Answers how many pairs
    /// one replica of each region holds, all together.
    pub async fn replicas_are_equal(&self, replicas: usize, within: Duration) -> u64 {
        let mut pairs = 0;
        for region in self.whole(replicas, within).await {
            let id = region.region.id;
            pairs +=
                eventually(&format!("region {id} is the same everywhere"), within, async || {
                    let mut seen = Vec::new();
                    for peer in &region.region.peers {
                        let detail = self.replica(id, peer.store_id, true).await?;
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
    let voter = |peer: &&metapb::Peer| peer.role == metapb::PeerRole::Voter as i32;
    region.leader.is_some()
        && region.pending_peers.is_empty()
        && region.down_peers.is_empty()
        && region.region.peers.len() == replicas
        && region.region.peers.iter().filter(voter).count() == replicas
}
