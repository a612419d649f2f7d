//! One peer and its driver. Nothing else in this package calls [`Group`] to make it do something.
//! Others only read its state from [`Node::group`].

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;

use bytes::Bytes;
use esker_raft::{
    ConfChange, Config, ConfigError, Entries, Entry, Group, GroupId, HardState, Identity, LogIndex,
    Message, MessageBody, Payload, PeerId, ProposeError, ReadError, Ready, ReadyNumber, RoleChange,
    RoleKind, SnapshotMeta, SnapshotOutcome, StepError, Term, Time, TransferError,
};

use super::disk::{Borrowed, Disk, EntryLog, Machine};

/// The group of every peer here.
pub const GROUP: GroupId = GroupId(1);

/// What a world decides for each of its peers.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The settings of the core; the driver fills in the seed.
    pub config: Config,
    /// How willing the peer is to lead.
    pub priority: i32,
    /// The randomness of all of the peer's incarnations follows from this seed.
    pub seed: u64,
    /// Whether writes that need no sync are reported at once. A crash loses them if no synced write
    /// came after them.
    pub lazy_sync: bool,
}

/// An event at a peer that a story might report.
#[derive(Clone, Debug)]
pub enum Event {
    /// The peer has another role, term or leader.
    Role(RoleChange),
    /// An entry was added to the peer's log, and is on its way to the disk.
    Appended(Entry),
    /// A committed entry was handed out to be applied.
    Handed(LogIndex, Term),
    /// The peer's state machine applied an entry.
    Applied(Entry),
    /// The read with this id may be served once this index is applied.
    Read(u64, LogIndex),
    /// The read with this id failed.
    ReadFailed(u64),
    /// A follower needs a snapshot.
    SnapshotWanted(PeerId),
    /// A snapshot has replaced the peer's log and its state machine.
    Installed(LogIndex),
}

#[derive(Debug)]
struct Write {
    number: ReadyNumber,
    hard_state: Option<HardState>,
    must_sync: bool,
    entries: Entries,
    then_send: Vec<Message>,
}

/// A peer and its surroundings.
pub struct Node {
    pub id: PeerId,
    settings: Settings,
    pub disk: Rc<RefCell<Disk>>,
    /// `None` while the peer is down.
    pub group: Option<Group<Borrowed>>,
    pub machine: Machine,
    /// The log including the writes under way, as the core must see it.
    pub mirror: EntryLog,
    writes: VecDeque<Write>,
    /// Hard states that were reported as written and are not on the disk. The next sync writes
    /// them.
    unsynced: Vec<HardState>,
    to_apply: VecDeque<Entry>,
    to_install: Option<(SnapshotMeta, Bytes)>,
    pub outgoing: Vec<Message>,
    pub events: Vec<Event>,
    incarnations: u64,
}

impl Node {
    /// Makes a peer that never ran, with this disk.
    pub fn create(id: PeerId, settings: Settings, disk: Disk, now: Time) -> Node {
        let mut node = Node {
            id,
            settings,
            machine: disk.machine.clone(),
            mirror: disk.log.clone(),
            disk: disk.shared(),
            group: None,
            writes: VecDeque::new(),
            unsynced: Vec::new(),
            to_apply: VecDeque::new(),
            to_install: None,
            outgoing: Vec::new(),
            events: Vec::new(),
            incarnations: 0,
        };
        let restored = node.disk.borrow().restored();
        let reader = Borrowed(Rc::clone(&node.disk));
        let group = Group::create(node.identity(), node.config(), reader, restored, now);
        let mut group = group.expect("a new peer's disk makes sense");
        group.set_priority(node.settings.priority);
        node.group = Some(group);
        node
    }

    fn identity(&self) -> Identity {
        Identity { group: GROUP, peer: self.id }
    }

    fn config(&self) -> Arc<Config> {
        let seed = self.settings.seed.wrapping_mul(31).wrapping_add(self.incarnations);
        Arc::new(Config { seed, ..self.settings.config.clone() })
    }

    pub fn is_up(&self) -> bool {
        self.group.is_some()
    }

    /// Loses everything but the disk. The first `kept` of the writes under way have reached the
    /// disk without a report.
    pub fn crash(&mut self, kept: usize) {
        let mut disk = self.disk.borrow_mut();
        let reported = self.unsynced.drain(..).map(|state| (Some(state), Entries::default()));
        let under_way = self.writes.drain(..).map(|write| (write.hard_state, write.entries));
        for (hard_state, entries) in reported.chain(under_way).take(kept) {
            disk.write(hard_state, &entries);
        }
        drop(disk);
        self.unsynced.clear();
        self.writes.clear();
        self.to_apply.clear();
        self.to_install = None;
        self.outgoing.clear();
        self.events.clear();
        self.group = None;
    }

    /// Starts the peer again.
    ///
    /// # Panics
    /// If the disk contradicts itself, which never happens with a disk that keeps its promises.
    pub fn restart(&mut self, now: Time) {
        self.try_restart(now).expect("what was written makes sense after a crash");
    }

    /// Starts the peer again, unless the disk contradicts itself.
    pub fn try_restart(&mut self, now: Time) -> Result<(), ConfigError> {
        self.incarnations += 1;
        self.machine = self.disk.borrow().machine.clone();
        self.mirror = self.disk.borrow().log.clone();
        let restored = self.disk.borrow().restored();
        let reader = Borrowed(Rc::clone(&self.disk));
        let mut group = Group::new(self.identity(), self.config(), reader, restored, now)?;
        group.set_priority(self.settings.priority);
        self.group = Some(group);
        Ok(())
    }

    /// The core of a peer that is up.
    ///
    /// # Panics
    /// If the peer is down.
    pub fn group(&mut self) -> &mut Group<Borrowed> {
        self.group.as_mut().expect("the peer is up")
    }

    pub fn role(&self) -> Option<RoleKind> {
        self.group.as_ref().map(Group::role)
    }

    pub fn leads(&self) -> bool {
        self.role() == Some(RoleKind::Leader)
    }

    pub fn tick(&mut self, now: Time) {
        self.group().tick(now);
    }

    pub fn step(&mut self, now: Time, message: Message) -> Result<(), StepError> {
        self.group().step(now, message)
    }

    pub fn propose(&mut self, now: Time, what: Bytes) -> Result<(LogIndex, Term), ProposeError> {
        self.group().propose(now, what)
    }

    pub fn change(
        &mut self,
        now: Time,
        change: ConfChange,
    ) -> Result<(LogIndex, Term), ProposeError> {
        self.group().propose_change(now, change)
    }

    pub fn transfer(&mut self, now: Time, to: Option<PeerId>) -> Result<PeerId, TransferError> {
        self.group().transfer_leader(now, to)
    }

    pub fn campaign(&mut self, now: Time) {
        self.group().campaign(now);
    }

    pub fn read_index(&mut self, now: Time, id: u64) -> Result<(), ReadError> {
        self.group().read_index(now, id)
    }

    /// Whether the peer may serve a read without a message at this moment.
    pub fn has_lease(&self, now: Time) -> bool {
        self.group.as_ref().and_then(Group::lease_until).is_some_and(|until| now < until)
    }

    pub fn unreachable(&mut self, peer: PeerId) {
        self.group().unreachable(peer);
    }

    pub fn snapshot_sent(&mut self, to: PeerId, outcome: SnapshotOutcome) {
        if let Some(group) = &mut self.group {
            group.snapshot_sent(to, outcome);
        }
    }

    /// Takes every Ready. Its messages go out, its writes are begun, and its committed entries are
    /// queued.
    pub fn collect(&mut self) {
        while let Some(group) = &mut self.group
            && let Some(ready) = group.ready()
        {
            self.carry_out(ready);
        }
    }

    fn carry_out(&mut self, ready: Ready) {
        assert_eq!(ready.log_failure, None, "peer {} could not read its log", self.id);
        if let Some(role) = ready.role {
            self.events.push(Event::Role(role));
        }
        self.outgoing.extend(ready.messages);
        for entry in &ready.entries {
            self.mirror.write([entry.clone()]);
            self.events.push(Event::Appended(entry.clone()));
        }
        let write = Write {
            number: ready.number,
            hard_state: ready.hard_state,
            must_sync: ready.must_sync,
            entries: ready.entries,
            then_send: ready.messages_after_persist,
        };
        let nothing = write.hard_state.is_none() && write.entries.is_empty();
        if !(nothing && write.then_send.is_empty()) {
            self.writes.push_back(write);
        }
        let handed = ready.committed.iter().map(|entry| Event::Handed(entry.index, entry.term));
        self.events.extend(handed);
        self.to_apply.extend(ready.committed.iter().cloned());
        if let Some(snapshot) = ready.snapshot {
            self.to_install = Some(snapshot);
        }
        let reads = ready.reads.into_iter().map(|(id, index)| Event::Read(id, index));
        self.events.extend(reads);
        self.events.extend(ready.failed_reads.into_iter().map(Event::ReadFailed));
        self.events.extend(ready.snapshots_wanted.into_iter().map(Event::SnapshotWanted));
    }

    /// Writes that the disk has not finished.
    pub fn writes_under_way(&self) -> usize {
        self.writes.len()
    }

    /// Lets the oldest write reach the disk and releases its messages. The returned number is to be
    /// reported to [`Node::report_written`], alone or with later ones.
    pub fn finish_write(&mut self) -> Option<ReadyNumber> {
        let write = self.writes.pop_front()?;
        self.outgoing.extend(write.then_send);
        let mut disk = self.disk.borrow_mut();
        if self.settings.lazy_sync && !write.must_sync {
            self.unsynced.extend(write.hard_state);
        } else {
            for state in self.unsynced.drain(..) {
                disk.write(Some(state), &Entries::default());
            }
            disk.write(write.hard_state, &write.entries);
        }
        Some(write.number)
    }

    pub fn report_written(&mut self, now: Time, number: ReadyNumber) {
        self.group().persisted(now, number);
    }

    /// Entries that were handed out and are not applied.
    pub fn applies_under_way(&self) -> usize {
        self.to_apply.len()
    }

    /// Applies the next entry that was handed out. Returns whether there was one.
    pub fn apply(&mut self, now: Time) -> bool {
        let Some(entry) = self.to_apply.pop_front() else { return false };
        if let Payload::Change(change) = &entry.payload {
            let group = self.group();
            let members = group.apply_change(now, change);
            self.machine.configuration = members.unwrap_or_else(|_| group.ignore_change());
            self.forget_data_of_a_witness();
        }
        self.machine.apply(&entry);
        self.group().applied(entry.index);
        self.events.push(Event::Applied(entry));
        true
    }

    fn forget_data_of_a_witness(&mut self) {
        if self.machine.configuration.is_witness(self.id) {
            self.machine.has_data = false;
            self.machine.digest = 0;
        }
    }

    pub fn is_installing(&self) -> bool {
        self.to_install.is_some()
    }

    /// Whether a snapshot can be installed, because everything before it is done.
    pub fn may_install(&self) -> bool {
        self.is_installing() && self.writes.is_empty() && self.to_apply.is_empty()
    }

    /// Finishes the installation of a snapshot, if one is under way and everything before it is
    /// done.
    pub fn install(&mut self, now: Time) {
        if !self.may_install() {
            return;
        }
        let Some((meta, data)) = self.to_install.take() else { return };
        let digest = u64::from_le_bytes(data[..].try_into().expect("eight bytes"));
        let SnapshotMeta { index, term, configuration } = meta;
        self.machine = Machine { index, term, digest, has_data: true, configuration };
        self.forget_data_of_a_witness();
        self.disk.borrow_mut().install(self.machine.clone());
        self.mirror = EntryLog::after((index, term));
        self.group().snapshot_installed(now, index);
        self.events.push(Event::Installed(index));
    }

    /// Writes the state machine to the disk.
    pub fn sync_machine(&mut self) {
        self.disk.borrow_mut().machine.clone_from(&self.machine);
    }

    /// Syncs the machine and drops the log up to `index`, at most what is applied.
    pub fn compact(&mut self, index: LogIndex) {
        self.sync_machine();
        let index = index.min(self.machine.index);
        let term = self.disk.borrow_mut().compact(index);
        if let (Some(term), Some(group)) = (term, &mut self.group) {
            group.compacted(index, term);
        }
    }

    /// A snapshot of the state machine for another peer. A witness has none.
    pub fn snapshot_for(&self, to: PeerId) -> Option<Message> {
        let group = self.group.as_ref().filter(|group| group.role() == RoleKind::Leader)?;
        if !self.machine.has_data {
            return None;
        }
        let Machine { index, term, configuration, .. } = self.machine.clone();
        let meta = SnapshotMeta { index, term, configuration };
        let data = self.machine.encode();
        let body = MessageBody::InstallSnapshot { meta: Box::new(meta), data };
        Some(Message { group: GROUP, from: self.id, to, term: group.term(), body })
    }
}
