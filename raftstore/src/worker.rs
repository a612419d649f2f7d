//! One of a store's workers: it owns some of the regions and drives their peers.
//!
//! A turn takes what waits in the inbox and among the notices, lets each touched
//! peer say what it wants, and then hands over the appends of all of them as one
//! task for the log writer, the committed entries to the apply workers, and the
//! messages to the outbox. The production shell calls [`Worker::turn`] from a
//! thread, a test from its own loop: there is no other difference.

mod arrivals;
mod giving_way;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender};
use esker_engine::{KvEngine, LogEngine};
use esker_model::{Clock, Peer as PeerMeta, Region, RegionId, StoreId};
use esker_mutants::broken;
use esker_raft::{LogIndex, SnapshotMeta, Term, Time};
use esker_rpc::repeat::Repeated;

use crate::backlog::Backlog;
use crate::config::{INITIAL_INDEX, StoreConfig, WORKER_TURN};
use crate::disk::DiskWatch;
use crate::error::{RequestError, StoreError};
use crate::flusher::Points;
use crate::journal::Journal;
use crate::message::{AppliedNotice, ApplyTask, Effect, Input, LogTask, Notice};
use crate::outbox::Outbox;
use crate::peer::{Held, Outputs, Peer, PeerSeed};
use crate::ranges::Ranges;
use crate::read::ReadDelegates;
use crate::router::worker_of;
use crate::state::{Applied, RaftState, raft_state};

/// What a store's workers have in common.
pub(crate) struct Shared {
    pub store: StoreId,
    pub config: StoreConfig,
    /// The settings of all groups.
    pub raft: Arc<esker_raft::Config>,
    pub kv: KvEngine,
    pub log: LogEngine,
    pub outbox: Arc<dyn Outbox>,
    pub delegates: Arc<ReadDelegates>,
    pub ranges: Arc<Ranges>,
    pub log_tasks: Sender<LogTask>,
    pub apply_tasks: Vec<Sender<ApplyTask>>,
    /// What waits for the log writer, and for each apply worker.
    pub log_backlog: Arc<Backlog>,
    pub apply_backlogs: Vec<Arc<Backlog>>,
    pub notices: Vec<Sender<Notice>>,
    pub journal: Arc<Journal>,
    /// How much of the key-value engine is durable.
    pub points: Arc<Points>,
    pub disk: Arc<DiskWatch>,
}

impl Shared {
    /// What waits for the apply worker of a region.
    pub fn apply_backlog(&self, region: RegionId) -> &Backlog {
        &self.apply_backlogs[worker_of(region, self.apply_backlogs.len())]
    }
}

/// What comes to a worker.
#[derive(Clone)]
pub(crate) struct Queues {
    /// Requests.
    pub requests: Receiver<Input>,
    /// Other stores' messages.
    pub raft: Receiver<Input>,
    /// From the store's own parts.
    pub notices: Receiver<Notice>,
}

pub struct Worker {
    shared: Arc<Shared>,
    number: usize,
    queues: Queues,
    peers: HashMap<RegionId, Peer>,
    next_generation: u64,
    /// Regions that something happened to in this turn.
    touched: BTreeSet<RegionId>,
    /// Regions that keep something until there is room for it.
    held: BTreeMap<RegionId, Held>,
    /// The region that comes first when there is room: the first that found none for its writes.
    begin_with: RegionId,
    /// Bytes of other stores' entries that were taken in this turn.
    appended: usize,
    deadlines: BTreeSet<(Time, RegionId)>,
    scheduled: HashMap<RegionId, Time>,
    out: Outputs,
    stopping: bool,
    /// The store's data is damaged: no peer of this worker serves any more.
    retired: bool,
    /// While the store gives way to others, because its disk is slow.
    giving_way: Option<giving_way::GivingWay>,
    /// Snapshots that other regions are in the way of: they may come again and again.
    crowded: Repeated<Time>,
    /// Room for what one turn takes, kept from turn to turn.
    inputs: Vec<Input>,
    taken_notices: Vec<Notice>,
}

impl Worker {
    pub(crate) fn new(shared: Arc<Shared>, number: usize, queues: Queues) -> Self {
        Worker {
            shared,
            number,
            queues,
            peers: HashMap::new(),
            next_generation: 1,
            touched: BTreeSet::new(),
            held: BTreeMap::new(),
            begin_with: RegionId(0),
            appended: 0,
            deadlines: BTreeSet::new(),
            scheduled: HashMap::new(),
            out: Outputs::default(),
            stopping: false,
            retired: false,
            giving_way: None,
            crowded: Repeated::new(),
            inputs: Vec::new(),
            taken_notices: Vec::new(),
        }
    }

    pub fn is_stopping(&self) -> bool {
        self.stopping
    }

    pub(crate) fn queues(&self) -> &Queues {
        &self.queues
    }

    /// When the next turn is due even if nothing comes in.
    pub fn next_deadline(&self) -> Option<Time> {
        let regions = self.deadlines.first().map(|(time, _)| *time);
        let giving_way = self.giving_way.as_ref().map(|giving| giving.look_at);
        regions.into_iter().chain(giving_way).min()
    }

    /// Takes what waits, and lets go of what follows; tells whether there was anything.
    ///
    /// # Errors
    /// When the disk fails or holds what cannot be: the store must stop.
    pub fn turn(&mut self, clock: &dyn Clock) -> Result<bool, StoreError> {
        let mut inputs = std::mem::take(&mut self.inputs);
        let mut notices = std::mem::take(&mut self.taken_notices);
        // Each has a share of its own: a flood of one holds up nobody else.
        let Queues { requests, raft, notices: waiting } = &self.queues;
        notices.extend(waiting.try_iter().take(WORKER_TURN));
        inputs.extend(raft.try_iter().take(WORKER_TURN));
        inputs.extend(requests.try_iter().take(WORKER_TURN));
        let mut taken = notices.len() + inputs.len();
        // The time is taken when the messages are here. A follower promises its
        // leader not to vote for another for a while from when it heard of it; were
        // that counted from before the message was received, and this thread held
        // up in between, the leader's lease could outlive the promise.
        let now = clock.now();
        for notice in notices.drain(..) {
            self.on_notice(now, notice)?;
        }
        for input in inputs.drain(..) {
            self.on_input(now, input)?;
        }
        self.inputs = inputs;
        self.taken_notices = notices;
        while let Some(&(deadline, region)) = self.deadlines.first() {
            if deadline > now {
                break;
            }
            self.deadlines.remove(&(deadline, region));
            self.scheduled.remove(&region);
            if let Some(peer) = self.peers.get_mut(&region) {
                peer.tick(now);
                if let Some(report) = peer.housekeep(now, &self.shared, &mut self.out)? {
                    self.shared.outbox.report_region(report);
                }
                self.touched.insert(region);
            }
            taken += 1;
        }
        self.watch_disk(now);
        self.collect(now)?;
        // Something is to be done at once if there is room by now for what was held.
        Ok(taken > 0 || self.wait_for_room())
    }

    fn collect(&mut self, now: Time) -> Result<(), StoreError> {
        self.take_up_held();
        // Collecting may destroy peers, and destroying touches none.
        let touched = std::mem::take(&mut self.touched);
        let first = self.begin_with;
        // Turns without room, which do not touch it, do not cost it its place.
        if touched.contains(&first) || !self.held.contains_key(&first) {
            self.begin_with = RegionId(0);
        }
        for &region in touched.range(first..).chain(touched.range(..first)) {
            let Some(peer) = self.peers.get_mut(&region) else { continue };
            peer.collect(now, &self.shared, &mut self.out)?;
            let held = peer.held(&self.shared.config);
            if held == Held::default() {
                self.held.remove(&region);
            } else {
                self.held.insert(region, held);
                if held.for_log && self.begin_with == RegionId(0) {
                    self.begin_with = region;
                }
            }
            let deadline = peer.next_deadline();
            self.schedule(region, deadline);
        }
        for region in std::mem::take(&mut self.out.leadership) {
            let Some(peer) = self.peers.get_mut(&region) else { continue };
            let deadline = peer.next_deadline();
            self.schedule(region, deadline);
        }
        self.hand_over(now);
        Ok(())
    }

    /// Lets regions go on that had to keep something for which there is room now.
    fn take_up_held(&mut self) {
        for (&region, held) in &self.held {
            let has_room = |backlog: &Backlog| backlog.has_room_beside(0);
            if held.for_log && has_room(&self.shared.log_backlog)
                || held.for_apply && has_room(self.shared.apply_backlog(region))
            {
                self.touched.insert(region);
            }
        }
    }

    /// Asks to be woken when there is room for what is held. Returns whether there is already.
    fn wait_for_room(&mut self) -> bool {
        // A region that is gone holds nothing.
        self.held.retain(|region, _| self.peers.contains_key(region));
        let mut has_room = false;
        if self.held.values().any(|held| held.for_log) {
            has_room |= self.shared.log_backlog.wait(self.number);
        }
        for (number, backlog) in self.shared.apply_backlogs.iter().enumerate() {
            let appliers = self.shared.apply_backlogs.len();
            let is_its = |region: &RegionId| worker_of(*region, appliers) == number;
            if self.held.iter().any(|(region, held)| held.for_apply && is_its(region)) {
                has_room |= backlog.wait(self.number);
            }
        }
        has_room
    }

    fn schedule(&mut self, region: RegionId, deadline: Option<Time>) {
        if self.scheduled.get(&region).copied() == deadline {
            return;
        }
        if let Some(old) = self.scheduled.remove(&region) {
            self.deadlines.remove(&(old, region));
        }
        if let Some(deadline) = deadline {
            self.scheduled.insert(region, deadline);
            self.deadlines.insert((deadline, region));
        }
    }

    fn hand_over(&mut self, now: Time) {
        self.appended = 0;
        // Messages first: followers write while this store does.
        for message in self.out.messages.drain(..) {
            self.shared.outbox.send(message);
        }
        if !self.out.log.batch.is_empty() || !self.out.log.persisted.is_empty() {
            let task = std::mem::take(&mut self.out.log);
            if !task.batch.is_empty() {
                self.shared.disk.handed(now);
            }
            self.shared.log_backlog.add(task.batch.bytes());
            // The log writer is gone only when the store ends.
            let _ = self.shared.log_tasks.send(task);
        }
        let appliers = self.shared.apply_tasks.len();
        for (region, task) in self.out.apply.drain(..) {
            let _ = self.shared.apply_tasks[worker_of(region, appliers)].send(task);
        }
    }

    fn on_notice(&mut self, now: Time, notice: Notice) -> Result<(), StoreError> {
        match notice {
            Notice::Persisted { region, generation, number } => {
                if let Some(peer) = self.current(region, generation) {
                    peer.on_persisted(now, number);
                    self.touched.insert(region);
                }
            }
            Notice::Applied(applied) => self.on_applied(now, applied)?,
            Notice::SnapshotTaken { region, generation, to, taken } => {
                if let Some(peer) = self.current(region, generation)
                    && let Some(message) = peer.snapshot_message(to, &taken)
                {
                    self.shared.outbox.send_snapshot(message, *taken);
                }
            }
            Notice::Installed { region, generation, descriptor, meta } => {
                if self.current(region, generation).is_some() {
                    self.on_installed(now, region, descriptor, &meta);
                }
            }
            Notice::Destroyed { region, generation } => {
                if self.current(region, generation).is_some() {
                    self.peers.remove(&region);
                    if !broken!(RetiredLogIsRemoved) {
                        self.out.log.batch.remove(region.0);
                    }
                    self.shared.ranges.release(region);
                    self.shared.ranges.settle(region);
                    self.schedule(region, None);
                    tracing::info!(%region, store = %self.shared.store, "region removed");
                }
            }
            Notice::Cleared { range } => self.shared.ranges.cleared(&range),
            Notice::SnapshotSent { region, to, delivered } => {
                if let Some(peer) = self.peers.get_mut(&region) {
                    peer.snapshot_sent(to, delivered);
                    self.touched.insert(region);
                }
            }
            Notice::Create { descriptor, campaign } => self.create(now, descriptor, campaign)?,
            Notice::Room => {}
            Notice::Retire => {
                self.retired = true;
                for (region, peer) in &mut self.peers {
                    peer.retire(now);
                    self.touched.insert(*region);
                }
            }
            Notice::Stop => {
                self.stopping = true;
                let store = self.shared.store;
                for (region, peer) in &mut self.peers {
                    peer.fail_all(&RequestError::Stopped { store, region: *region });
                }
            }
        }
        Ok(())
    }

    fn current(&mut self, region: RegionId, generation: u64) -> Option<&mut Peer> {
        self.peers.get_mut(&region).filter(|peer| peer.generation() == generation)
    }

    fn on_applied(&mut self, now: Time, notice: AppliedNotice) -> Result<(), StoreError> {
        let region = notice.region;
        let Some(peer) =
            self.peers.get_mut(&region).filter(|peer| peer.generation() == notice.generation)
        else {
            return Ok(());
        };
        let mut created = Vec::new();
        let mut removed = false;
        for effect in &notice.effects {
            match effect {
                Effect::Split { parent, children, left, .. } => {
                    let range = |region: &Region| (region.id, region.range.clone());
                    let parts = children.iter().chain([parent]).map(range);
                    let nobodys = left.iter().map(|region| region.range.clone());
                    self.shared.ranges.replace(region, parts, nobodys);
                    peer.on_split(parent.clone());
                    for region in left {
                        tracing::info!(
                            region = %region.id, store = %self.shared.store,
                            "a split that came late creates no replica here"
                        );
                    }
                    let clear = |left: &Region| {
                        (region, ApplyTask::Clear { region, range: left.range.clone() })
                    };
                    self.out.apply.extend(left.iter().map(clear));
                    if peer.is_leader() {
                        let regions = children.iter().chain(left).chain([parent]);
                        self.shared.outbox.report_split(regions.cloned().collect());
                    }
                    created.extend(children.iter().map(|child| (child.clone(), peer.is_leader())));
                }
                Effect::Changed { change, descriptor } => {
                    removed |= !peer.on_changed(now, change, descriptor.clone())?;
                }
                Effect::ChangeRefused { .. } => peer.on_change_refused(),
                Effect::MayTruncate { .. } | Effect::SplitRefused { .. } => {}
            }
        }
        peer.on_applied(&notice);
        if removed {
            let conf_ver = peer.descriptor().epoch.conf_ver;
            // A leader's last words: that its removal is committed.
            peer.collect(now, &self.shared, &mut self.out)?;
            self.destroy(region, conf_ver);
        }
        self.touched.insert(region);
        for (descriptor, campaign) in created {
            let owner = worker_of(descriptor.id, self.shared.notices.len());
            if owner == self.number {
                self.create(now, descriptor, campaign)?;
            } else {
                let _ = self.shared.notices[owner].send(Notice::Create { descriptor, campaign });
            }
        }
        Ok(())
    }

    /// A region that a split created; its data and descriptor are on this store already.
    fn create(&mut self, now: Time, descriptor: Region, campaign: bool) -> Result<(), StoreError> {
        let id = descriptor.id;
        let Some(me) = descriptor.peer_on(self.shared.store).copied() else { return Ok(()) };
        let earlier = match self.peers.get(&id) {
            Some(peer) if peer.is_initialized() || peer.is_installing() => return Ok(()),
            // A message came before the split and made an empty peer. It may have
            // voted, and the vote may be on its way to the disk: what it promised
            // is carried over from memory.
            Some(peer) => {
                assert!(
                    peer.me().id <= me.id && !peer.is_destroying(),
                    "a split filled peer {} of region {id}, whose place peer {} has or leaves",
                    me.id,
                    peer.me().id
                );
                Some(*peer.raft_state())
            }
            None => raft_state(&self.shared.log, id)?,
        };
        if let Some(earlier) = earlier
            && earlier.peer == me.id
            && earlier.last.0 > INITIAL_INDEX
        {
            // It lived already: what it acknowledged would be forgotten.
            return Err(StoreError::Corrupt {
                what: format!("the state of region {id}"),
                why: "a split would create it anew, but its log has entries; the data is an older \
                      copy"
                    .into(),
            });
        }
        let mut state = RaftState::initial(me.id);
        if let Some(earlier) = earlier
            && earlier.hard_state.term > state.hard_state.term
        {
            state.hard_state.term = earlier.hard_state.term;
            state.hard_state.vote = earlier.hard_state.vote;
        }
        self.out.log.batch.put_state(id.0, &state.encode());
        let seed = PeerSeed {
            descriptor,
            me,
            raft_state: state,
            last_term: Applied::INITIAL.term,
            applied: Applied::INITIAL,
            generation: 0,
            fresh: earlier.is_none(),
        };
        self.add_peer(now, seed)?;
        self.shared.ranges.settle(id);
        if campaign && let Some(peer) = self.peers.get_mut(&id) {
            peer.campaign(now);
        }
        for message in self.shared.ranges.take_early(id) {
            self.on_raft(now, message)?;
        }
        Ok(())
    }

    /// Begins to drive a peer. For regions found at the start of a store, too.
    pub(crate) fn add_peer(&mut self, now: Time, mut seed: PeerSeed) -> Result<(), StoreError> {
        seed.generation = self.next_generation;
        self.next_generation += 1;
        let generation = seed.generation;
        let applied = seed.applied;
        let mut peer = Peer::new(seed, &self.shared, now)?;
        if self.retired {
            peer.retire(now);
        } else if self.giving_way.is_some() {
            peer.yield_elections(true);
        }
        let region = peer.id();
        if peer.is_initialized() {
            self.shared.delegates.insert(region, peer.delegate().clone());
        }
        self.out.apply.push((
            region,
            ApplyTask::Register { region: (**peer.descriptor()).clone(), generation, applied },
        ));
        if let Some(mut replaced) = self.peers.insert(region, peer) {
            replaced.fail_all(&RequestError::StaleCommand(region));
        }
        self.touched.insert(region);
        Ok(())
    }

    /// An empty peer, to be filled by its leader.
    fn add_empty_peer(
        &mut self,
        now: Time,
        region: RegionId,
        me: PeerMeta,
    ) -> Result<(), StoreError> {
        let stored = raft_state(&self.shared.log, region)?;
        let fresh = stored.is_none();
        let mut state = RaftState::empty(me.id);
        if let Some(stored) = stored.filter(|_| !broken!(EmptyPeerKeepsItsVote)) {
            // What it voted before a restart binds it; it has no entries yet.
            state.hard_state.term = stored.hard_state.term;
            state.hard_state.vote = stored.hard_state.vote;
        }
        let seed = PeerSeed {
            descriptor: Region::uninitialized(region),
            me,
            raft_state: state,
            last_term: Term(0),
            applied: Applied { index: LogIndex(0), term: Term(0) },
            generation: 0,
            fresh,
        };
        self.add_peer(now, seed)
    }

    fn on_installed(
        &mut self,
        now: Time,
        region: RegionId,
        descriptor: Region,
        meta: &SnapshotMeta,
    ) {
        let Some(peer) = self.peers.get_mut(&region).filter(|peer| !peer.is_destroying()) else {
            return;
        };
        let claimed = self.shared.ranges.claim(region, &descriptor.range);
        assert!(claimed.is_ok(), "region {region} was installed over the range of another region");
        self.shared.ranges.settle(region);
        peer.on_installed(now, descriptor, meta, &mut self.out);
        self.shared.delegates.insert(region, peer.delegate().clone());
        tracing::info!(%region, store = %self.shared.store, index = %meta.index, "snapshot installed");
        self.touched.insert(region);
    }

    /// Takes a peer off this store: first nobody reads it any more, then its data goes.
    pub(super) fn destroy(&mut self, region: RegionId, tombstone_conf_ver: u64) {
        let Some(peer) = self.peers.get_mut(&region) else { return };
        // One that a split is filling goes when it is asked the next time.
        if peer.is_destroying() || !self.shared.ranges.leave(region) {
            return;
        }
        let (generation, id) = (peer.generation(), peer.me().id);
        peer.begin_destroy();
        self.shared.delegates.remove(region);
        let task = ApplyTask::Destroy { region, generation, peer: id, tombstone_conf_ver };
        self.out.apply.push((region, task));
        self.schedule(region, None);
    }
}
