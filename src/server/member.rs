//! The placement driver's replicated state: one region, never split, on a store of
//! its own beside the data.
//!
//! How the group is founded is in [`super::founding`]. How a member that lost its directory is
//! replaced is in [`super::replacing`].

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use esker_engine::{Cf, DataDir, DirError, EngineOptions, Engines, Ident, Kind, KvSnapshot, Mark};
use esker_model::{Epoch, KeyRange, Peer, PeerId, Region, RegionId, StoreId, Term};
use esker_mutants::broken;
use esker_placement::{
    Leadership, MemberId, MemberInfo, Pairs, ReplicatedState, StateError, StateWrite,
};
use esker_raftstore::state::bootstrap_region;
use esker_raftstore::{Mutation, RequestContext, RequestError, StoreConfig, StoreHandle};
use esker_rpc::proto::esker::{GroupMember, MemberMemory};
use esker_rpc::repeat::Repeated;
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use prost::Message as _;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::assembly::{OpenStore, Plan};
use super::founding::{Adoption, MEMBERS, Record};
use super::outbox::{Audience, MemberAddresses, RegionLeader};
use super::recall;
use super::traffic::Traffic;
use crate::Error;
use crate::node::descriptors::Share;

/// The one region.
pub const REGION: RegionId = RegionId(1);
/// Store ids of placement members have the top bit set, so they never equal those of data stores.
const MEMBER_STORES: u64 = 1 << 63;
/// The prefix of the records of members that came after the founders, by their ids. They are beside
/// the placement driver's own keys.
const LATER_MEMBERS: &[u8] = b"members/";
const FORMAT: u8 = 1;

/// Half of a data store's, because no region can be found while the placement driver has no leader.
/// Its one group has so little traffic that this is possible.
const ELECTION_TIMEOUT: Duration = Duration::from_millis(500);
const HEARTBEAT_INTERVAL: Duration = Duration::from_millis(100);

/// The members of this node's configuration. The same on each of them, except for `me`.
#[derive(Clone, Debug)]
pub struct Members {
    /// This node's id as a founder. A member that was replaced has another id, under the same name.
    pub me: MemberId,
    pub all: Vec<MemberInfo>,
    /// Identifies this list of members. It is kept in the data directory.
    pub tag: u64,
}

impl Members {
    /// This node's name among them.
    pub fn name(&self) -> &str {
        self.named(self.me).map_or("placement", |me| &me.name)
    }

    fn named(&self, id: MemberId) -> Option<&MemberInfo> {
        self.all.iter().find(|member| member.id == id)
    }

    fn address(&self, name: &str) -> Option<&str> {
        self.all.iter().find(|member| member.name == name).map(|member| &member.address[..])
    }
}

pub fn store_of(member: MemberId) -> StoreId {
    StoreId(MEMBER_STORES | member.0)
}

/// How a member's store runs.
pub fn store_config() -> StoreConfig {
    StoreConfig {
        workers: 1,
        apply_workers: 1,
        election_timeout: ELECTION_TIMEOUT,
        heartbeat_interval: HEARTBEAT_INTERVAL,
        ..StoreConfig::default()
    }
}

/// Whether this is the store of a placement member, of any group.
pub fn is_member_store(store: StoreId) -> bool {
    store.0 & MEMBER_STORES != 0
}

/// A running member's store.
pub struct MemberStore {
    store: OpenStore,
    _directory: DataDir,
    book: Arc<MemberBook>,
    /// Tasks that end with the store.
    _tasks: JoinSet<()>,
}

/// A member's directory that is opened and found whole, but not in use yet.
pub struct MemberDirectory {
    data: DataDir,
    engines: Engines,
    /// The member's id and group, unless the directory is empty.
    adoption: Option<Adoption>,
}

impl MemberDirectory {
    /// Opens the directory.
    ///
    /// # Errors
    /// When the directory cannot be used, is not whole, or is of another list of members.
    pub fn open(directory: &Path, members: &Members, share: Share) -> Result<Self, Error> {
        let data = DataDir::open(directory, Kind::Member)?;
        let options = EngineOptions {
            block_cache_bytes: 16 << 20,
            write_buffer_bytes: 8 << 20,
            log_write_buffer_bytes: 16 << 20,
            max_open_files: share.engine_files,
            ..EngineOptions::default()
        };
        let engines = data.open_engines(&options)?;
        let adoption = match data.ident() {
            None => None,
            Some(ident) => {
                let record = Record::read(&data)?
                    .filter(|record| record.group == ident.cluster_id)
                    .ok_or_else(|| Error::Record {
                        path: directory.join(MEMBERS),
                        reason: "it is missing, or of another group; put it back".to_owned(),
                    })?;
                if record.join != members.tag {
                    return Err(Error::OtherMembers { path: directory.to_owned() });
                }
                let me = MemberId(ident.store_id & !MEMBER_STORES);
                let (path, wanted) = (directory.to_owned(), members.name().to_owned());
                match name_of(me, &record, &engines)? {
                    Some(found) if found != wanted => {
                        return Err(Error::OtherMember { path, found, wanted });
                    }
                    // A member that did not get its data yet cannot know its name.
                    Some(_) | None => Some(Adoption { me, record }),
                }
            }
        };
        Ok(MemberDirectory { data, engines, adoption })
    }

    /// How far the member's memory has come, if the directory was used.
    pub fn memory(&self) -> Option<MemberMemory> {
        let (group, mark) = (self.adoption.as_ref()?.record.group, self.data.mark()?);
        Some(memory(group, &mark, self.engines.log.sequence()))
    }

    /// The member's id and group, if its directory knows them.
    pub fn adoption(&self) -> Option<&Adoption> {
        self.adoption.as_ref()
    }

    pub fn data(&self) -> &DataDir {
        &self.data
    }

    /// Gives the member its id and group, and lets it send messages.
    pub fn start(
        mut self,
        members: &Members,
        adoption: &Adoption,
        traffic: &Traffic,
    ) -> Result<(MemberStore, Arc<MemberState>), Error> {
        let record = &adoption.record;
        let me = store_of(adoption.me);
        if self.adoption.is_none() {
            record.write(&self.data)?;
            let ident = Ident { cluster_id: record.group, store_id: me.0 };
            self.data.found(ident, rand::random(), &self.engines)?;
        }
        // A founder that was never started has promised nothing, and may begin anew.
        if record.is_founder(adoption.me) && !self.data.was_started() {
            let Engines { kv, log } = &self.engines;
            bootstrap_region(kv, log, me, &first_region(record))?;
        }
        let mark = self.data.begin(&self.engines)?;
        super::founding::forget_nonce(&self.data)?;
        let book = Arc::new(MemberBook::new(members.clone(), record.clone()));
        let (leaders, leader) = watch::channel(RegionLeader::default());
        let plan = Plan {
            store: me,
            cluster: record.group,
            config: store_config(),
            addresses: Arc::new(MemberAddresses(book.clone())),
            audience: Audience::Member(leaders),
        };
        let store = OpenStore::open(plan, &self.data, self.engines, traffic)?;
        let handle = store.handle().clone();
        book.open(handle.clone());
        let (group, told) = (record.group, book.clone());
        let mut tasks = JoinSet::new();
        tasks.spawn(say_when_replaced(
            book.clone(),
            record.is_founder(adoption.me),
            self.data.path().to_owned(),
        ));
        tasks.spawn(recall::keep_telling(members.clone(), move || {
            let store = told.store.load();
            Some(memory(group, &mark, store.as_ref()?.log_sequence()))
        }));
        let state = MemberState::new(handle, book.clone(), leader);
        let store = MemberStore { store, _directory: self.data, book, _tasks: tasks };
        Ok((store, Arc::new(state)))
    }
}

/// The name of the member with this id, as its directory knows it.
fn name_of(me: MemberId, record: &Record, engines: &Engines) -> Result<Option<String>, Error> {
    if let Some(founder) = record.founders.iter().find(|founder| founder.id == me.0) {
        return Ok(Some(founder.name.clone()));
    }
    let stored = engines.kv.get(Cf::Default, &later_member(me.0)).map_err(DirError::from)?;
    Ok(stored.and_then(|stored| read_member(&stored)).map(|member| member.name))
}

impl MemberStore {
    /// Blocks until everything is on disk.
    pub fn stop(self) {
        // Connections to the other members end a little later, and ask for addresses until then.
        self.book.store.store(None);
        self.store.stop();
    }
}

/// Logs, again and again, that this member is no longer a member. It may have found that out from
/// the others, without an operator's notice here. `was_member` is false for a member that did not
/// get its data yet.
async fn say_when_replaced(book: Arc<MemberBook>, mut was_member: bool, folder: PathBuf) {
    const SAY_EVERY: Duration = Duration::from_secs(60);
    let mut ticks = tokio::time::interval(SAY_EVERY);
    loop {
        ticks.tick().await;
        let Some(store) = book.store.load_full() else { return };
        let is_member = store.delegates().get(REGION).is_some();
        drop(store);
        was_member |= is_member;
        if was_member && !is_member {
            let name = book.members.name();
            tracing::error!(
                "this placement member was replaced by another, and does nothing any more: stop \
                 the node, empty {}, start it, and run `esker placement replace {name}`",
                folder.display()
            );
        }
    }
}

fn memory(group: u64, mark: &Mark, log_sequence: u64) -> MemberMemory {
    MemberMemory {
        group,
        member: mark.owner.store_id & !MEMBER_STORES,
        lineage: mark.lineage,
        generation: mark.generation,
        log_sequence,
    }
}

/// The first state of every founder.
pub fn first_region(record: &Record) -> Region {
    Region {
        id: REGION,
        range: KeyRange::all(),
        epoch: Epoch::FIRST,
        peers: record
            .founders
            .iter()
            .map(|founder| Peer::voter(PeerId(founder.id), store_of(MemberId(founder.id))))
            .collect(),
    }
}

/// The members, as far as this member has applied their changes.
pub struct MemberBook {
    members: Members,
    record: Record,
    /// Set while the member's store runs.
    store: ArcSwapOption<StoreHandle>,
}

impl MemberBook {
    pub fn new(members: Members, record: Record) -> Self {
        MemberBook { members, record, store: ArcSwapOption::empty() }
    }

    /// The member's store runs.
    pub fn open(&self, store: StoreHandle) {
        self.store.store(Some(Arc::new(store)));
    }

    /// The present members of the group; none while this member did not get its data yet.
    pub fn group(&self) -> Vec<GroupMember> {
        let store = self.store.load();
        let region = store.as_ref().and_then(|store| store.delegates().get(REGION));
        let Some(region) = region.map(|region| region.descriptor()) else { return Vec::new() };
        region.peers.iter().filter_map(|peer| self.member(MemberId(peer.id.0))).collect()
    }

    /// The members, and newcomers whose nonce is recorded already.
    pub fn known(&self) -> Vec<GroupMember> {
        let mut known = self.group();
        for later in self.later() {
            // A lower id than the present one of its name was given up.
            let is_newest = known.iter().all(|m| m.name != later.name || m.id < later.id);
            if is_newest {
                known.push(later);
            }
        }
        known
    }

    /// A member, which may have left the group.
    pub fn member(&self, id: MemberId) -> Option<GroupMember> {
        if let Some(founder) = self.record.founders.iter().find(|founder| founder.id == id.0) {
            return Some(GroupMember::from(founder));
        }
        let store = self.store.load_full()?;
        let stored = store.engine().get(Cf::Default, &later_member(id.0)).ok()??;
        read_member(&stored)
    }

    /// Every member that was ever recorded after the founders.
    pub fn later(&self) -> Vec<GroupMember> {
        let Some(store) = self.store.load_full() else { return Vec::new() };
        let pairs = with_prefix(&store.engine().snapshot(), LATER_MEMBERS).unwrap_or_default();
        pairs.iter().filter_map(|(_, stored)| read_member(stored)).collect()
    }

    pub fn record(&self) -> &Record {
        &self.record
    }

    /// The address of the member of this name.
    pub fn address(&self, name: &str) -> Option<&str> {
        self.members.address(name)
    }

    /// The members with their addresses. Those of the configuration while the group is not known.
    pub fn infos(&self) -> Vec<MemberInfo> {
        let infos: Vec<MemberInfo> = self
            .group()
            .into_iter()
            .filter_map(|member| {
                let address = self.address(&member.name)?.to_owned();
                Some(MemberInfo { id: MemberId(member.id), name: member.name, address })
            })
            .collect();
        if infos.is_empty() { self.members.all.clone() } else { infos }
    }

    /// The address of a member's store.
    pub fn address_of_store(&self, store: u64) -> Option<String> {
        let member = self.member(MemberId(store & !MEMBER_STORES))?;
        self.address(&member.name).map(str::to_owned)
    }
}

pub fn later_member(id: u64) -> Vec<u8> {
    [LATER_MEMBERS, &id.to_be_bytes()].concat()
}

/// The record of a member that comes after the founders.
pub fn write_member(member: &GroupMember) -> Vec<u8> {
    let mut value = vec![FORMAT];
    value.extend(member.encode_to_vec());
    value
}

fn read_member(stored: &[u8]) -> Option<GroupMember> {
    match stored.split_first() {
        Some((&FORMAT, rest)) => GroupMember::decode(rest).ok(),
        _ => None,
    }
}

/// The replicated state for the placement driver.
pub struct MemberState {
    store: StoreHandle,
    book: Arc<MemberBook>,
    leadership: watch::Receiver<Leadership>,
}

impl MemberState {
    /// Must be called within a runtime.
    pub fn new(
        store: StoreHandle,
        book: Arc<MemberBook>,
        mut leaders: watch::Receiver<RegionLeader>,
    ) -> Self {
        let translate = |leader: &RegionLeader| Leadership {
            term: leader.term.0,
            leader: leader.leader.map(|peer| MemberId(peer.id.0)),
            is_self: leader.here,
        };
        let (sender, leadership) = watch::channel(translate(&leaders.borrow_and_update()));
        tokio::spawn(async move {
            while leaders.changed().await.is_ok() {
                sender.send_replace(translate(&leaders.borrow_and_update()));
            }
        });
        MemberState { store, book, leadership }
    }

    pub fn store(&self) -> &StoreHandle {
        &self.store
    }

    pub fn book(&self) -> &MemberBook {
        &self.book
    }

    /// The region as this member has applied it.
    ///
    /// # Errors
    /// When this member has no replica of it: it did not get its data yet, or was replaced.
    fn context(&self) -> Result<RequestContext, StateError> {
        let region = self.store.delegates().get(REGION);
        let region = region.ok_or(StateError::NotLeader { leader: None })?.descriptor();
        Ok(RequestContext { epoch: region.epoch, ..RequestContext::default() })
    }
}

/// Logs a fault, with a limit, because every call of the placement driver may meet the same fault.
fn complain(fault: &dyn std::fmt::Display) {
    static FAULTS: Mutex<Repeated> = Mutex::new(Repeated::new());
    if let Some(times) = FAULTS.lock().failed(Instant::now()) {
        tracing::error!(times, "placement state: {fault}");
    }
}

fn refused(error: RequestError) -> StateError {
    match error {
        // A temporary refusal may be tried again, like an unknown outcome. Nothing was done in that
        // case, so the caller's caution does no harm.
        RequestError::Undetermined(_)
        | RequestError::ServerIsBusy { .. }
        | RequestError::ReadIndexNotReady(_) => StateError::Unknown,
        RequestError::NotLeader { leader, .. } => {
            StateError::NotLeader { leader: leader.map(|peer| MemberId(peer.id.0)) }
        }
        other => {
            // No other refusal has an effect, and each ends a term of office.
            complain(&other);
            StateError::NotLeader { leader: None }
        }
    }
}

fn with_prefix(kv: &KvSnapshot, prefix: &[u8]) -> Result<Pairs, StateError> {
    let failed = |error: esker_engine::EngineError| {
        complain(&error);
        StateError::Unknown
    };
    let mut iter = kv.iter(Cf::Default, prefix, None);
    iter.seek_to_first();
    let mut pairs = Vec::new();
    while iter.valid().map_err(failed)? && iter.key().starts_with(prefix) {
        pairs.push((iter.key().to_vec(), iter.value().to_vec()));
        iter.next();
    }
    Ok(pairs)
}

impl ReplicatedState for MemberState {
    fn write(
        &self,
        writes: Vec<StateWrite>,
        term: u64,
    ) -> BoxFuture<'static, Result<(), StateError>> {
        let (store, context) = (self.store.clone(), self.context());
        let mutations = writes
            .into_iter()
            .map(|write| match write {
                StateWrite::Put { key, value } => {
                    Mutation::Put { cf: Cf::Default, key: key.into(), value: value.into() }
                }
                StateWrite::Delete { key } => Mutation::Delete { cf: Cf::Default, key: key.into() },
            })
            .collect();
        Box::pin(async move {
            let term = Some(Term(term)).filter(|_| !broken!(StateIsWrittenInItsTerm));
            let context = RequestContext { term, ..context? };
            store.write(REGION, context, mutations).await.map(|_| ()).map_err(refused)
        })
    }

    fn scan(&self, prefix: Vec<u8>) -> BoxFuture<'static, Result<Pairs, StateError>> {
        let (store, context) = (self.store.clone(), self.context());
        Box::pin(async move {
            let view = store.snapshot(REGION, context?).await.map_err(refused)?;
            with_prefix(view.uncounted(), &prefix)
        })
    }

    fn scan_stale(&self, prefix: Vec<u8>) -> BoxFuture<'static, Result<Pairs, StateError>> {
        let kv = self.store.engine().snapshot();
        Box::pin(async move { with_prefix(&kv, &prefix) })
    }

    fn leadership(&self) -> watch::Receiver<Leadership> {
        self.leadership.clone()
    }

    fn me(&self) -> MemberId {
        MemberId(self.store.store_id().0 & !MEMBER_STORES)
    }

    fn members(&self) -> Vec<MemberInfo> {
        self.book.infos()
    }

    fn lease(&self) -> Option<u64> {
        self.store.lease_term(REGION).map(|term| term.0)
    }
}
