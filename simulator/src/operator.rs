//! What operators do to the cluster by its own tools, whether it succeeds or not.

use std::time::Duration;

use bytes::Bytes;
use esker_client::{AdminClient, KvClient, PlacementClient};
use esker_model::{PeerChange, PeerId, Region, RegionId, StoreId};
use esker_raftstore::{Admin, StoreHandle};
use esker_rpc::channel::Dialer;
use tokio::sync::watch;

use crate::network::Host;
use crate::world::Surroundings;

/// Where operators sit.
const HOST: Host = Host(crate::network::CLIENTS + 90);
const PATIENCE: Duration = Duration::from_secs(4);

/// A client of the placement driver, as soon as there is one.
pub async fn connect(around: &Surroundings, host: Host) -> PlacementClient {
    loop {
        let dialer = Dialer::new(around.network.from(host));
        let endpoints = around.members.clone();
        let found = PlacementClient::connect_as_of(dialer, endpoints, None, PATIENCE).await;
        match found {
            Ok(client) => return client,
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}

/// The operators of one cluster.
pub struct Operator {
    around: Surroundings,
    connected: watch::Receiver<Option<PlacementClient>>,
}

impl Operator {
    pub fn new(around: &Surroundings) -> Operator {
        let (tell, connected) = watch::channel(None);
        let here = around.clone();
        tokio::spawn(async move {
            let client = connect(&here, HOST).await;
            let _ = tell.send(Some(client));
        });
        Operator { around: around.clone(), connected }
    }

    fn placement(&self) -> Option<PlacementClient> {
        self.connected.borrow().clone()
    }

    pub fn split(&self, key: Bytes) {
        let Some(placement) = self.placement() else { return };
        let journal = self.around.journal.clone();
        tokio::spawn(async move {
            let client = KvClient::new(placement, []).with_deadline(PATIENCE);
            let split = client.split_region(vec![key.clone()]).await;
            let key = crate::history::text(&key);
            match split {
                Ok(regions) => {
                    let ids: Vec<String> =
                        regions.iter().map(|region| region.id.to_string()).collect();
                    journal.note("operator", format_args!("split at {key}: {}", ids.join(", ")));
                }
                Err(error) => journal.note("operator", format_args!("no split at {key}: {error}")),
            }
        });
    }

    pub fn transfer(&self, region: RegionId, to: StoreId) {
        let Some(placement) = self.placement() else { return };
        let journal = self.around.journal.clone();
        tokio::spawn(async move {
            let client = AdminClient::new(placement);
            let moved = client.transfer_leader(region.0, to.0, PATIENCE).await;
            let outcome = moved.map_or_else(|error| error.to_string(), |()| "done".into());
            let what = format!("the leader of region {region} to store {to}: {outcome}");
            journal.note("operator", what);
        });
    }

    /// Changes the members of a region, as placement orders it. A new peer gets its id.
    pub fn change(&self, leader: StoreHandle, region: Region, mut changes: Vec<PeerChange>) {
        let Some(placement) = self.placement() else { return };
        let journal = self.around.journal.clone();
        tokio::spawn(async move {
            for change in &mut changes {
                if let PeerChange::AddLearner(seat) = change
                    && seat.peer == PeerId(0)
                {
                    let Ok(ids) = placement.alloc_id(1).await else { return };
                    seat.peer = PeerId(ids.start);
                }
            }
            let what = format!("region {}: {changes:?}", region.id);
            let changed = leader.admin(region.id, region.epoch, Admin::ChangePeers(changes)).await;
            let outcome = changed.map_or_else(|error| error.to_string(), |_| "done".into());
            journal.note("operator", format_args!("{what}: {outcome}"));
        });
    }
}
