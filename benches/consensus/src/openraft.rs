//! `openraft`, set up as its guide "Getting Started" says: a `RaftLogStorage`, a
//! `RaftStateMachine` and a `RaftNetworkV2` for each node, `initialize` on one, and
//! snapshots by policy, behind which it purges the log itself.
//!
//! Where the documentation recommends something faster, it is used. `stream_append` is forwarded
//! ("to enable pipelined replication"). The streams of the log reader are not left to their
//! defaults ("application should implement it for better performance"). Proposals that come
//! together go through `client_write_many` ("more efficient than calling `client_write` multiple
//! times"). A node without data and the standard leader id keep its types small, and logging is
//! compiled away. Of tokio's runtimes, the single-threaded one costs openraft the least CPU time.
//! Its feature `single-threaded` does not change that.
//!
//! This is the alpha of 0.10, which is under development and which the README and the guide
//! describe. 0.9 "won't accept new features". With the same storage, the stable 0.9.25 costs about
//! half as much for proposals that come one by one. For 64 at a time it costs two thirds more,
//! because it has no `client_write_many`.

use std::collections::{BTreeMap, VecDeque};
use std::error::Error;
use std::fmt::{self, Debug, Display};
use std::io;
use std::ops::{Bound, RangeBounds};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use bytes::Bytes;
use futures_util::{Stream, StreamExt, TryStreamExt, stream};
use openraft::alias::{
    EntryOf, LeaderIdOf, LogIdOf, SnapshotMetaOf, SnapshotOf, StoredMembershipOf, VoteOf,
};
use openraft::base::{BoxFuture, BoxStream};
use openraft::errors::{LeaderChanged, RPCError, ReplicationClosed, StreamingError, Unreachable};
use openraft::impls::leader_id_std;
use openraft::network::{RPCOption, RaftNetworkV2};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, StreamAppendResult, VoteRequest,
    VoteResponse,
};
use openraft::storage::{
    EntryResponder, IOFlushed, LeaderBoundedStreamError, LeaderBoundedStreamResult, LogState,
    RaftLogStorage, RaftStateMachine,
};
use openraft::{
    Config, EmptyNode, EntryPayload, OptionalSend, Raft, RaftLogReader, RaftNetworkFactory,
    RaftSnapshotBuilder, SnapshotPolicy,
};
use tokio::runtime::{Builder, Runtime};

use crate::workload::{COMPACT_EVERY, Cluster, KEEP, Load, NODES, Tally, verify};

/// The node that is elected, because it is initialized with the members.
const LEADER: usize = 0;

/// An hour in milliseconds, openraft's unit.
const HOUR: u64 = 60 * 60 * 1000;

#[derive(Clone, Debug)]
pub struct Command(Bytes);

impl Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0.len())
    }
}

openraft::declare_raft_types!(
    pub Types:
        D = Command,
        R = (),
        Node = EmptyNode,
        LeaderId = leader_id_std::LeaderId<Self::Term, Self::NodeId>,
        AsyncRuntime = openraft_rt_tokio::TokioRuntime,
);

type Node = Raft<Types, Machine>;
type Entry = EntryOf<Types>;
type LogId = LogIdOf<Types>;
type Snapshot = SnapshotOf<Types, Tally>;

/// Shared by the node and its replication tasks.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Entries>>);

#[derive(Default)]
struct Entries {
    vote: Option<VoteOf<Types>>,
    purged: Option<LogId>,
    entries: VecDeque<Entry>,
}

impl Log {
    fn lock(&self) -> MutexGuard<'_, Entries> {
        self.0.lock().expect("nobody panics with it")
    }
}

impl Entries {
    fn first(&self) -> u64 {
        self.purged.map_or(0, |id| id.index + 1)
    }

    fn read(&self, range: impl RangeBounds<u64>) -> Vec<Entry> {
        let first = self.first();
        let low = match range.start_bound() {
            Bound::Included(low) => low.saturating_sub(first),
            Bound::Excluded(low) => (low + 1).saturating_sub(first),
            Bound::Unbounded => 0,
        };
        let high = match range.end_bound() {
            Bound::Included(high) => (high + 1).saturating_sub(first),
            Bound::Excluded(high) => high.saturating_sub(first),
            Bound::Unbounded => u64::MAX,
        };
        let high = high.min(self.entries.len() as u64) as usize;
        self.entries.range((low as usize).min(high)..high).cloned().collect()
    }
}

impl RaftLogReader<Types> for Log {
    async fn try_get_log_entries<R: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: R,
    ) -> io::Result<Vec<Entry>> {
        Ok(self.lock().read(range))
    }

    async fn entries_stream<R: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: R,
    ) -> impl Stream<Item = io::Result<Entry>> + OptionalSend {
        stream::iter(self.lock().read(range).into_iter().map(Ok))
    }

    async fn leader_bounded_stream<R: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        leader: LeaderIdOf<Types>,
        range: R,
    ) -> impl Stream<Item = LeaderBoundedStreamResult<Types>> + OptionalSend {
        let log = self.lock();
        let leads = log.vote.is_some_and(|vote| vote.leader_id == leader && vote.committed);
        let (entries, error) = if leads {
            (log.read(range), None)
        } else {
            let changed = LeaderChanged::new(leader, log.vote);
            (Vec::new(), Some(LeaderBoundedStreamError::LeaderChanged(changed)))
        };
        stream::iter(entries.into_iter().map(Ok).chain(error.map(Err)))
    }

    async fn read_vote(&mut self) -> io::Result<Option<VoteOf<Types>>> {
        Ok(self.lock().vote)
    }
}

impl RaftLogStorage<Types> for Log {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> io::Result<LogState<Types>> {
        let log = self.lock();
        let last = log.entries.back().map(|entry| entry.log_id).or(log.purged);
        Ok(LogState { last_purged_log_id: log.purged, last_log_id: last })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &VoteOf<Types>) -> io::Result<()> {
        self.lock().vote = Some(*vote);
        Ok(())
    }

    async fn append<I>(&mut self, entries: I, written: IOFlushed<Types>) -> io::Result<()>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        self.lock().entries.extend(entries);
        written.io_completed(Ok(()));
        Ok(())
    }

    async fn truncate_after(&mut self, last: Option<LogId>) -> io::Result<()> {
        let mut log = self.lock();
        let kept = last.map_or(0, |id| id.index + 1) - log.first();
        log.entries.truncate(kept as usize);
        Ok(())
    }

    async fn purge(&mut self, id: LogId) -> io::Result<()> {
        let mut log = self.lock();
        let dropped = id.index + 1 - log.first();
        log.entries.drain(..dropped as usize);
        log.purged = Some(id);
        Ok(())
    }
}

/// What a machine has applied, which the benchmark checks.
#[derive(Default)]
struct Shown {
    entries: AtomicU64,
    bytes: AtomicU64,
}

impl Shown {
    fn set(&self, tally: Tally) {
        self.bytes.store(tally.bytes, Ordering::Relaxed);
        self.entries.store(tally.entries, Ordering::Release);
    }

    fn get(&self) -> Tally {
        let entries = self.entries.load(Ordering::Acquire);
        Tally { entries, bytes: self.bytes.load(Ordering::Relaxed) }
    }
}

/// A state machine, and a view of one from which a snapshot is built.
#[derive(Clone, Default)]
struct Machine {
    applied: Option<LogId>,
    membership: StoredMembershipOf<Types>,
    tally: Tally,
    shown: Arc<Shown>,
}

impl Machine {
    fn snapshot(&self) -> Snapshot {
        let last_membership = self.membership.clone();
        let meta = SnapshotMetaOf::<Types> { last_log_id: self.applied, last_membership };
        Snapshot { meta, snapshot: self.tally }
    }
}

impl RaftSnapshotBuilder<Types> for Machine {
    type SnapshotData = Tally;

    async fn build_snapshot(&mut self) -> io::Result<Snapshot> {
        Ok(self.snapshot())
    }
}

impl RaftStateMachine<Types> for Machine {
    type SnapshotData = Tally;
    type SnapshotBuilder = Self;

    async fn applied_state(&mut self) -> io::Result<(Option<LogId>, StoredMembershipOf<Types>)> {
        Ok((self.applied, self.membership.clone()))
    }

    async fn apply<S>(&mut self, mut entries: S) -> io::Result<()>
    where
        S: Stream<Item = io::Result<EntryResponder<Types>>> + Unpin + OptionalSend,
    {
        while let Some((entry, client)) = entries.try_next().await? {
            self.applied = Some(entry.log_id);
            match entry.payload {
                EntryPayload::Blank => {}
                EntryPayload::Normal(Command(command)) => self.tally.apply(&command),
                EntryPayload::Membership(members) => {
                    self.membership = StoredMembershipOf::<Types>::new(self.applied, members);
                }
            }
            self.shown.set(self.tally);
            if let Some(client) = client {
                client.send(());
            }
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> Self {
        self.clone()
    }

    async fn install_snapshot(&mut self, _: &SnapshotMetaOf<Types>, _: Tally) -> io::Result<()> {
        unreachable!("no node lags behind what others keep")
    }

    async fn get_current_snapshot(&mut self) -> io::Result<Option<Snapshot>> {
        Ok(self.applied.map(|_| self.snapshot()))
    }
}

/// All nodes, by their ids, once they have started.
#[derive(Clone, Default)]
struct Network(Arc<OnceLock<Vec<Node>>>);

impl RaftNetworkFactory<Types> for Network {
    type Network = Connection;

    async fn new_client(&mut self, target: u64, _: &EmptyNode) -> Connection {
        let nodes = self.0.get().expect("nobody campaigns before all nodes have started");
        Connection(nodes[target as usize].clone())
    }
}

/// A connection to one node, which takes the messages as they are.
struct Connection(Node);

fn unreachable_peer(error: impl Error + 'static) -> RPCError<Types> {
    RPCError::Unreachable(Unreachable::new(&error))
}

type Replies<'s> = BoxStream<'s, Result<StreamAppendResult<Types>, RPCError<Types>>>;

impl RaftNetworkV2<Types> for Connection {
    type SnapshotData = Tally;

    async fn append_entries(
        &mut self,
        request: AppendEntriesRequest<Types>,
        _: RPCOption,
    ) -> Result<AppendEntriesResponse<Types>, RPCError<Types>> {
        self.0.append_entries(request).await.map_err(unreachable_peer)
    }

    fn stream_append<'s, S>(
        &'s mut self,
        requests: S,
        _: RPCOption,
    ) -> BoxFuture<'s, Result<Replies<'s>, RPCError<Types>>>
    where
        S: Stream<Item = AppendEntriesRequest<Types>> + OptionalSend + Unpin + 'static,
    {
        let replies = self.0.stream_append(requests);
        let replies: Replies<'s> = Box::pin(replies.map(|reply| reply.map_err(unreachable_peer)));
        Box::pin(async { Ok(replies) })
    }

    async fn vote(
        &mut self,
        request: VoteRequest<Types>,
        _: RPCOption,
    ) -> Result<VoteResponse<Types>, RPCError<Types>> {
        self.0.vote(request).await.map_err(unreachable_peer)
    }

    async fn full_snapshot(
        &mut self,
        _: VoteOf<Types>,
        _: Snapshot,
        _: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        _: RPCOption,
    ) -> Result<SnapshotResponse<Types>, StreamingError<Types>> {
        unreachable!("no node lags behind what others keep")
    }
}

pub struct Openraft {
    runtime: Runtime,
    nodes: Vec<Node>,
    shown: [Arc<Shown>; NODES],
    expected: Tally,
}

impl Openraft {
    pub fn start() -> Openraft {
        let config = Config {
            // The other libraries are not ticked, so openraft's timers need not run either. But it
            // measures leases, which must not expire while another library has its turn.
            enable_tick: false,
            election_timeout_min: HOUR,
            election_timeout_max: 2 * HOUR,
            snapshot_policy: SnapshotPolicy::LogsSinceLast(COMPACT_EVERY),
            max_in_snapshot_log_to_keep: KEEP,
            // As in its own benchmark.
            purge_batch_size: 1024,
            max_payload_entries: 1024,
            ..Config::default()
        };
        let config = Arc::new(config.validate().expect("these settings make sense"));
        let runtime = Builder::new_current_thread().enable_time().build();
        let runtime = runtime.expect("it needs no thread and no descriptor");
        let shown: [Arc<Shown>; NODES] = Default::default();
        let nodes = runtime.block_on(async {
            let network = Network::default();
            let mut nodes = Vec::new();
            for (id, shown) in (0..).zip(&shown) {
                let machine = Machine { shown: shown.clone(), ..Machine::default() };
                let node = Node::new(id, config.clone(), network.clone(), Log::default(), machine);
                nodes.push(node.await.expect("an empty log makes sense"));
            }
            assert!(network.0.set(nodes.clone()).is_ok(), "the nodes are known only now");
            let members: BTreeMap<_, _> = (0..NODES as u64).map(|id| (id, EmptyNode {})).collect();
            nodes[LEADER].initialize(members).await.expect("the nodes are new");
            let wait = nodes[LEADER].wait(None);
            wait.current_leader(LEADER as u64, "election").await.expect("nobody contests it");
            nodes
        });
        Openraft { runtime, nodes, shown, expected: Tally::default() }
    }
}

async fn propose(leader: &Node, load: Load) {
    let command = || Command(Bytes::from(load.command()));
    if load.proposals == 1 {
        leader.client_write(command()).await.expect("it leads");
    } else {
        let commands = (0..load.proposals).map(|_| command());
        let mut results = leader.client_write_many(commands).await.expect("it runs");
        while let Some(result) = results.try_next().await.expect("it runs") {
            result.expect("it leads");
        }
    }
}

impl Cluster for Openraft {
    /// A step ends when the leader has applied its proposals. So the followers may get the commit
    /// index together with the proposals of the next step.
    fn run(&mut self, steps: u64, load: Load) {
        self.runtime.block_on(async {
            for _ in 0..steps {
                propose(&self.nodes[LEADER], load).await;
                self.expected = load.after(1, self.expected);
                assert_eq!(self.shown[LEADER].get(), self.expected, "the leader applies first");
            }
            while self.shown.iter().any(|shown| shown.get().entries < self.expected.entries) {
                tokio::task::yield_now().await;
            }
        });
        verify(self.shown.each_ref().map(|shown| shown.get()), self.expected);
    }
}

impl Drop for Openraft {
    fn drop(&mut self) {
        self.runtime.block_on(async {
            for node in &self.nodes {
                node.shutdown().await.expect("it did not panic");
            }
        });
    }
}
