//! What operators do to the cluster by its own tools, whether it succeeds or not.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use esker_client::{AdminClient, KvClient, PlacementClient};
use esker_model::{PeerChange, PeerId, Region, RegionId, Role, Seat, StoreId};
use esker_raft::ProgressState;
use esker_raftstore::{Admin, PeerProgress, StoreHandle};
use esker_rpc::channel::Dialer;
use tokio::sync::watch;

use crate::network::Host;
use crate::world::Surroundings;

/// Where operators sit.
const HOST: Host = Host(crate::network::CLIENTS + 90);
const PATIENCE: Duration = Duration::from_secs(4);
/// Between two attempts.
const AGAIN: Duration = Duration::from_millis(20);

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
                    journal.count("splits");
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
            let moved = client.transfer_leader(region, to, PATIENCE).await;
            if moved.is_ok() {
                journal.count("transfers");
            }
            let outcome = moved.map_or_else(|error| error.to_string(), |()| "done".into());
            let what = format!("the leader of region {region} to store {to}: {outcome}");
            journal.note("operator", what);
        });
    }

    /// Changes the members of a region, as placement orders it. A new peer gets its id.
    pub fn change(&self, region: RegionId, mut changes: Vec<PeerChange>) {
        let Some(placement) = self.placement() else { return };
        let around = self.around.clone();
        tokio::spawn(async move {
            let Some(known) = known(&around, region) else { return };
            for change in &mut changes {
                if let PeerChange::AddLearner(seat) = change {
                    let Some(known) = with_id(&placement, *seat).await else { return };
                    *seat = known;
                }
            }
            ask(&around, &known, changes).await;
        });
    }

    /// Puts one peer of a region in the place of another, step by step, as placement does it: the
    /// new one votes when it has caught up.
    pub fn swap(&self, region: RegionId, joining: Seat, leaving: Seat) {
        let Some(placement) = self.placement() else { return };
        let around = self.around.clone();
        tokio::spawn(async move {
            let joining = match joining.peer {
                PeerId(0) => add_learner(&around, &placement, region, joining).await,
                _ => Some(joining),
            };
            let Some(joining) = joining else { return };
            let exchange = [PeerChange::AddVoter(joining), PeerChange::AddLearner(leaving)];
            let until = tokio::time::Instant::now() + PATIENCE;
            while !is_caught_up(&around, region, joining).await {
                if tokio::time::Instant::now() >= until {
                    return;
                }
                tokio::time::sleep(AGAIN).await;
            }
            if insist(&around, region, &exchange).await {
                around.journal.count("replicas exchanged");
                insist(&around, region, &[PeerChange::Remove(leaving)]).await;
            }
        });
    }
}

/// The seat of a new peer with an id from placement.
async fn with_id(placement: &PlacementClient, seat: Seat) -> Option<Seat> {
    if seat.peer != PeerId(0) {
        return Some(seat);
    }
    let ids = placement.alloc_id(1).await.ok()?;
    Some(Seat { peer: PeerId(ids.start), ..seat })
}

/// Adds a learner, which gets a new id with each attempt: an id is drawn when the region is known,
/// and is good for that epoch of the region alone. Another peer may come and go before the next
/// attempt, and a store takes no peer with a smaller id than one that has left it.
async fn add_learner(
    around: &Surroundings,
    placement: &PlacementClient,
    region: RegionId,
    joining: Seat,
) -> Option<Seat> {
    let until = tokio::time::Instant::now() + PATIENCE;
    while tokio::time::Instant::now() < until {
        if let Some(known) = known(around, region) {
            let seat = with_id(placement, joining).await?;
            if ask(around, &known, vec![PeerChange::AddLearner(seat)]).await {
                return Some(seat);
            }
        }
        tokio::time::sleep(AGAIN).await;
    }
    None
}

/// Asks until it is done, for some seconds.
async fn insist(around: &Surroundings, region: RegionId, changes: &[PeerChange]) -> bool {
    let until = tokio::time::Instant::now() + PATIENCE;
    while tokio::time::Instant::now() < until {
        if let Some(known) = known(around, region)
            && ask(around, &known, changes.to_vec()).await
        {
            return true;
        }
        tokio::time::sleep(AGAIN).await;
    }
    false
}

/// A region as its leader knows it.
fn known(around: &Surroundings, region: RegionId) -> Option<Arc<Region>> {
    let replica = leader_of(around, region)?.delegates().get(region)?;
    Some(replica.descriptor())
}

/// The store that leads a region.
fn leader_of(around: &Surroundings, region: RegionId) -> Option<StoreHandle> {
    let leader = around.leaders.lock().of(region).first().copied()?;
    let door = around.doors.lock().get(&leader).cloned()?;
    Some(door.get()?.store().clone())
}

/// Whether three voters would be left if this peer replaced one of them, by what the leader knows.
async fn is_caught_up(around: &Surroundings, region: RegionId, joining: Seat) -> bool {
    let Some(store) = leader_of(around, region) else { return false };
    let asked = tokio::time::timeout(Duration::from_secs(1), store.status(region)).await;
    let Ok(Ok(status)) = asked else { return false };
    let voters = status.region.peers.iter().filter(|peer| peer.role == Role::Voter).count();
    let replicates = |of: &PeerProgress| {
        of.peer == joining.peer && of.state == ProgressState::Replicate && of.recently_active
    };
    voters >= 3 && status.progress.iter().any(replicates)
}

/// Asks the leader of a region for changes of its members, if the region is as it is known, and
/// returns whether they were made.
async fn ask(around: &Surroundings, known: &Region, changes: Vec<PeerChange>) -> bool {
    let region = known.id;
    let Some(store) = leader_of(around, region) else { return false };
    // Placement removes learners that it does not need, and a peer that has left does not come back.
    let is_member = |seat: &Seat| known.peer(seat.peer).is_some();
    let is_possible = changes.iter().all(|change| match change {
        PeerChange::AddLearner(seat) if changes.len() == 1 => !is_member(seat),
        PeerChange::AddLearner(seat) | PeerChange::AddVoter(seat) | PeerChange::Remove(seat) => {
            is_member(seat)
        }
    });
    if !is_possible {
        return false;
    }
    let what = format!("region {region}: {changes:?}");
    let counted = changes.clone();
    let changed = store.admin(region, known.epoch, Admin::ChangePeers(changes)).await;
    for change in counted.iter().filter(|_| changed.is_ok()) {
        around.journal.count(match change {
            PeerChange::AddVoter(_) => "voters added",
            PeerChange::AddLearner(_) => "learners added",
            PeerChange::Remove(_) => "peers removed",
        });
    }
    let is_done = changed.is_ok();
    let outcome = changed.map_or_else(|error| error.to_string(), |_| "done".into());
    around.journal.note("operator", format_args!("{what}: {outcome}"));
    is_done
}
