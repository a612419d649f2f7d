//! One peer, driven.

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use std::sync::Arc;

use esker_raft::{
    Config, ConfigError, Entries, Entry, Group, GroupId, HardState, Identity, LogIndex, Message,
    MessageBody, Payload, PeerId, Ready, ReadyNumber, RoleChange, RoleKind, SnapshotMeta, Time,
};

use super::disk::{Borrowed, Disk, Machine};

/// The group that every test has.
pub const GROUP: GroupId = GroupId(1);

/// What a test decides for every peer it starts.
#[derive(Clone, Debug)]
pub struct Settings {
    pub config: Config,
    pub priority: i32,
    pub seed: u64,
}

/// What happened at a peer that a story might tell.
#[derive(Clone, Debug)]
pub enum Event {
    Role(RoleChange),
    Appended(Entry),
    Applied(Entry),
    Read(u64, LogIndex),
    ReadFailed(u64),
    SnapshotWanted(PeerId),
    Installed(LogIndex),
}

#[derive(Debug)]
struct Write {
    number: ReadyNumber,
    hard_state: Option<HardState>,
    entries: Entries,
    then_send: Vec<Message>,
}

pub struct Node {
    pub id: PeerId,
    settings: Settings,
    pub disk: Rc<RefCell<Disk>>,
    pub group: Option<Group<Borrowed>>,
    pub machine: Machine,
    /// The log with the writes under way, as the core must see it.
    pub mirror: BTreeMap<LogIndex, Entry>,
    writes: VecDeque<Write>,
    to_apply: VecDeque<Entry>,
    to_install: Option<(SnapshotMeta, bytes::Bytes)>,
    pub outgoing: Vec<Message>,
    pub events: Vec<Event>,
    incarnations: u64,
}

impl Node {
    /// A peer that never ran, with this on its disk.
    pub fn create(id: PeerId, settings: Settings, disk: Disk, now: Time) -> Node {
        let mut node = Node {
            id,
            settings,
            machine: disk.machine.clone(),
            mirror: disk.log.clone(),
            disk: disk.shared(),
            group: None,
            writes: VecDeque::new(),
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

    pub fn settings(&mut self) -> &mut Settings {
        &mut self.settings
    }

    pub fn is_up(&self) -> bool {
        self.group.is_some()
    }

    /// Loses everything but the disk. The first `kept` of the writes under way
    /// reached it, unreported.
    pub fn crash(&mut self, kept: usize) {
        for write in self.writes.drain(..).take(kept) {
            self.disk.borrow_mut().write(write.hard_state, write.entries);
        }
        self.writes.clear();
        self.to_apply.clear();
        self.to_install = None;
        self.outgoing.clear();
        self.events.clear();
        self.group = None;
    }

    pub fn restart(&mut self, now: Time) {
        self.try_restart(now).expect("what was written makes sense after a crash");
    }

    /// Comes back, unless the disk contradicts itself.
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

    pub fn group(&mut self) -> &mut Group<Borrowed> {
        self.group.as_mut().expect("the peer is up")
    }

    /// Takes every Ready: its messages are out, its writes under way, its
    /// committed entries queued.
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
        if let Some(first) = ready.entries.first() {
            self.mirror.split_off(&first.index);
        }
        self.mirror.extend(ready.entries.iter().map(|entry| (entry.index, entry.clone())));
        self.events.extend(ready.entries.iter().cloned().map(Event::Appended));
        self.writes.push_back(Write {
            number: ready.number,
            hard_state: ready.hard_state,
            entries: ready.entries,
            then_send: ready.messages_after_persist,
        });
        self.to_apply.extend(ready.committed.iter().cloned());
        if let Some(snapshot) = ready.snapshot {
            self.to_install = Some(snapshot);
        }
        let reads = ready.reads.into_iter().map(|(id, index)| Event::Read(id, index));
        self.events.extend(reads);
        self.events.extend(ready.failed_reads.into_iter().map(Event::ReadFailed));
        self.events.extend(ready.snapshots_wanted.into_iter().map(Event::SnapshotWanted));
    }

    pub fn writes_under_way(&self) -> usize {
        self.writes.len()
    }

    /// Whether the oldest write has anything to write at all.
    pub fn has_empty_write(&self) -> bool {
        self.writes.front().is_some_and(|w| w.hard_state.is_none() && w.entries.is_empty())
    }

    /// The oldest `count` writes reach the disk, are reported at once, and
    /// release their messages.
    pub fn finish_writes(&mut self, now: Time, count: usize) {
        let mut last = None;
        for write in self.writes.drain(..count.min(self.writes.len())) {
            self.disk.borrow_mut().write(write.hard_state, write.entries);
            self.outgoing.extend(write.then_send);
            last = Some(write.number);
        }
        if let (Some(number), Some(group)) = (last, &mut self.group) {
            group.persisted(now, number);
        }
    }

    pub fn applies_under_way(&self) -> usize {
        self.to_apply.len()
    }

    /// Applies the next `count` entries that were handed out.
    pub fn apply(&mut self, now: Time, count: usize) {
        for _ in 0..count {
            let Some(entry) = self.to_apply.pop_front() else { return };
            let group = self.group.as_mut().expect("the peer is up");
            if let Payload::Change(change) = &entry.payload {
                let members = group.apply_change(now, change);
                self.machine.configuration = members.unwrap_or_else(|_| group.ignore_change());
            }
            self.machine.apply(&entry);
            group.applied(entry.index);
            self.events.push(Event::Applied(entry));
        }
    }

    pub fn is_installing(&self) -> bool {
        self.to_install.is_some()
    }

    /// Finishes the installation of a snapshot, if one is under way and all that
    /// goes before it is done.
    pub fn install(&mut self, now: Time) {
        if !self.writes.is_empty() || !self.to_apply.is_empty() {
            return;
        }
        let Some((meta, data)) = self.to_install.take() else { return };
        let digest = u64::from_le_bytes(data[..].try_into().expect("eight bytes"));
        let SnapshotMeta { index, term, configuration } = meta;
        self.machine = Machine { index, term, digest, configuration };
        self.disk.borrow_mut().install(self.machine.clone());
        self.mirror.clear();
        self.group().snapshot_installed(now, index);
        self.events.push(Event::Installed(index));
    }

    /// The state machine reaches the disk.
    pub fn sync_machine(&mut self) {
        self.disk.borrow_mut().machine = self.machine.clone();
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

    /// A snapshot of the state machine for another peer.
    pub fn snapshot_for(&self, to: PeerId) -> Option<Message> {
        let group = self.group.as_ref().filter(|group| group.role() == RoleKind::Leader)?;
        let Machine { index, term, configuration, .. } = self.machine.clone();
        let meta = Box::new(SnapshotMeta { index, term, configuration });
        let body = MessageBody::InstallSnapshot { meta, data: self.machine.encode() };
        Some(Message { group: GROUP, from: self.id, to, term: group.term(), body })
    }
}
