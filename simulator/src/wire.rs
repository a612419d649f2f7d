//! Messages between stores, and what leaves a simulated store.

use std::collections::BTreeMap;
use std::sync::Arc;

use esker::parts::{Audience, RegionLeader};
use esker_engine::{KvEngine, LogEngine};
use esker_model::{Peer, Region, RegionId, RegionReport, StoreId, Term};
use esker_raft::{AppendOutcome, Message, MessageBody};
use esker_raftstore::envelope::Content;
use esker_raftstore::state::{RegionState, raft_state, region_state};
use esker_raftstore::{Envelope, Outbox, RegionSnapshotSource};
use esker_rpc::proto::esker::RaftMessage;
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::journal::Journal;
use crate::network::{Host, Network};

/// What is on its way from one store to another.
pub struct Parcel {
    pub from: Host,
    /// Which life of the sending machine it comes from.
    pub life: u64,
    pub sender: StoreId,
    pub to: StoreId,
    pub content: ParcelContent,
}

pub enum ParcelContent {
    Message(RaftMessage),
    Snapshot(RaftMessage, Box<RegionSnapshotSource>),
}

/// All that is on its way, by when it arrives.
#[derive(Default)]
pub struct Wire {
    parcels: BTreeMap<(Instant, u64), Parcel>,
    sent: u64,
}

impl Wire {
    fn put(&mut self, at: Instant, parcel: Parcel) {
        self.sent += 1;
        self.parcels.insert((at, self.sent), parcel);
    }

    /// What has arrived.
    pub fn due(&mut self, now: Instant) -> Vec<Parcel> {
        let later = self.parcels.split_off(&(now, u64::MAX));
        std::mem::replace(&mut self.parcels, later).into_values().collect()
    }
}

/// Which store leads each region, by what the stores said.
#[derive(Default)]
pub struct Leaders(BTreeMap<RegionId, BTreeMap<Host, Term>>);

impl Leaders {
    fn heard(&mut self, region: RegionId, term: Term, host: Host, leads: bool) {
        let leaders = self.0.entry(region).or_default();
        match leads {
            true => drop(leaders.insert(host, term)),
            false => drop(leaders.remove(&host)),
        }
    }

    /// A host has ended.
    pub fn end(&mut self, host: Host) {
        for leaders in self.0.values_mut() {
            leaders.remove(&host);
        }
    }

    /// Those that lead a region: more than one while the older ones do not know better.
    pub fn of(&self, region: RegionId) -> Vec<Host> {
        let mut leaders: Vec<(Term, Host)> = self
            .0
            .get(&region)
            .map(|leaders| leaders.iter().map(|(host, term)| (*term, *host)).collect())
            .unwrap_or_default();
        leaders.sort_by(|a, b| b.cmp(a));
        leaders.into_iter().map(|(_, host)| host).collect()
    }
}

/// The outbox of one store.
pub struct SimulatedOutbox {
    pub host: Host,
    pub life: u64,
    pub store: StoreId,
    pub audience: Audience,
    pub wire: Arc<Mutex<Wire>>,
    pub network: Network,
    /// Where each store is.
    pub hosts: Arc<Mutex<BTreeMap<StoreId, Host>>>,
    pub leaders: Arc<Mutex<Leaders>>,
    pub kv: KvEngine,
    pub log: LogEngine,
    pub journal: Journal,
}

impl SimulatedOutbox {
    fn put(&self, to: StoreId, content: ParcelContent) -> bool {
        let Some(there) = self.hosts.lock().get(&to).copied() else { return false };
        let Some(delay) = self.network.fate(self.host, there) else { return false };
        let (from, life, sender) = (self.host, self.life, self.store);
        let parcel = Parcel { from, life, sender, to, content };
        self.wire.lock().put(Instant::now() + delay, parcel);
        true
    }

    /// Reads back what a message promises: a vote and an acknowledgement say that something is in
    /// the log.
    fn check_promise(&self, region: RegionId, message: &Message) {
        let broken = |what: String| {
            // A peer that has left for good may still say what it had promised before.
            if let Ok(Some(RegionState::Tombstone { peer, .. })) = region_state(&self.kv, region)
                && peer == message.from
            {
                return;
            }
            let what = format!("{} to {}: {what}", self.host, message.to);
            self.journal.violated("what a message promises is in the log", what);
        };
        let stored = match raft_state(&self.log, region) {
            Ok(stored) => stored,
            Err(error) => return broken(error.to_string()),
        };
        match message.body {
            MessageBody::VoteReply { granted: true, .. } => {
                let kept = stored.is_some_and(|stored| {
                    let known = stored.hard_state;
                    known.term > message.term
                        || known.term == message.term && known.vote == Some(message.to)
                });
                if !kept {
                    broken(format!("region {region}: a vote in {} over {stored:?}", message.term));
                }
            }
            MessageBody::AppendReply {
                outcome: AppendOutcome::Accepted { match_index }, ..
            } => {
                let kept = stored.is_some_and(|stored| {
                    stored.hard_state.term > message.term
                        || stored.hard_state.term == message.term && stored.last >= match_index
                });
                if !kept {
                    broken(format!(
                        "region {region}: index {match_index} in {} over {stored:?}",
                        message.term
                    ));
                }
            }
            MessageBody::Vote { .. } => {
                let kept = stored.is_some_and(|stored| stored.hard_state.term >= message.term);
                if !kept {
                    broken(format!(
                        "region {region}: a candidate of {} over {stored:?}",
                        message.term
                    ));
                }
            }
            _ => {}
        }
    }
}

impl Outbox for SimulatedOutbox {
    fn send(&self, message: Envelope) {
        if let Content::Consensus(consensus) = &message.content {
            self.check_promise(message.address.region, &consensus.message);
        }
        let to = message.address.to.store;
        let wire = message.into_wire();
        self.put(to, ParcelContent::Message(wire));
    }

    fn send_snapshot(&self, message: Envelope, source: RegionSnapshotSource) {
        let (to, region) = (message.address.to.store, message.address.region);
        self.journal.note(self.host, format_args!("sends {to} a snapshot of region {region}"));
        self.journal.count("snapshots sent");
        // One that is lost is reported by whoever waits for it: see the machine's deliveries.
        let (from, life, sender) = (self.host, self.life, self.store);
        let there = self.hosts.lock().get(&to).copied();
        let fate = there.and_then(|there| self.network.fate(self.host, there));
        let content = ParcelContent::Snapshot(message.into_wire(), Box::new(source));
        let parcel = Parcel { from, life, sender, to, content };
        // A lost one arrives nowhere, late, so that its sender hears of it.
        let to = if fate.is_some() { parcel.to } else { StoreId(0) };
        let delay = fate.unwrap_or(std::time::Duration::from_millis(500)) * 4;
        self.wire.lock().put(Instant::now() + delay, Parcel { to, ..parcel });
    }

    fn report_region(&self, report: RegionReport) {
        self.audience.report_region(report);
    }

    fn report_split(&self, regions: Vec<Region>) {
        self.audience.report_split(regions);
    }

    fn leadership(&self, region: RegionId, term: Term, leader: Option<Peer>, here: bool) {
        if here {
            self.journal.note(self.host, format_args!("leads region {region} in term {term}"));
        }
        self.leaders.lock().heard(region, term, self.host, here);
        self.audience.leadership(RegionLeader { term, leader, here });
    }

    fn knows_store(&self, store: StoreId) -> bool {
        self.audience.knows_store(store)
    }
}
