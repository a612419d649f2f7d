//! One node: a store, a placement member, or both, behind one port.
//!
//! A [`NodeBuilder`] flows in. A [`Node`] that serves flows out, or one [`Error`], after which
//! nothing keeps running. The types beside it are what a builder is given, and why it is refused:
//! [`Roles`], the settings in [`NodeConfig`], and an [`Address`] as it was typed.

pub(crate) mod address;
mod config;
mod damage;
pub(crate) mod descriptors;
mod start;
mod vital;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;

use esker_client::{KvClient, PlacementClient};
use esker_model::StoreId;
use esker_placement::{MemberId, MemberInfo};
use esker_rpc::service::StoreService;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::Error;
use crate::server::health::Health;
use crate::server::late::LateStore;
use crate::server::member::Members;
use crate::server::traffic::Traffic;

pub use address::{Address, AddressError, AddressesError};
pub use config::{ConfigError, NodeConfig, SETTINGS, Setting, SettingError};

/// The folders of the store and of the placement member in a node's data directory.
pub(crate) const STORE_FOLDER: &str = "store";
pub(crate) const PLACEMENT_FOLDER: &str = "placement";

/// Which parts a node runs. At least one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Roles {
    /// A member of the placement driver. The node's address must be among those of
    /// [`NodeBuilder::join`], unless none are given.
    pub placement: bool,
    /// A store of data. A node without one has a client, too, whose requests all use the network.
    pub store: bool,
}

/// What a node is started with. [`Node::builder`] returns one, and [`start`](Self::start) takes it.
///
/// One of three machines that are a cluster together. On the others, only `advertise` and the
/// labels differ:
///
/// ```no_run
/// use esker::Node;
///
/// # async fn example() -> Result<(), esker::Error> {
/// let node = Node::builder()
///     .data_dir("/var/lib/example/esker")
///     .listen("0.0.0.0:2379")
///     .advertise("db-1:2379")
///     .join(["db-1:2379", "db-2:2379", "db-3:2379"])
///     .labels(vec![("zone".into(), "a".into())])
///     .start()
///     .await?;
/// # node.stop().await;
/// # Ok(())
/// # }
/// ```
///
/// A node whose address `join` does not list has only a store.
#[derive(Debug)]
pub struct NodeBuilder {
    data_dir: Option<PathBuf>,
    listen: String,
    advertise: Option<String>,
    listener: Option<TcpListener>,
    max_descriptors: Option<u64>,
    join: Vec<String>,
    roles: Option<Roles>,
    labels: Vec<(String, String)>,
    members: Option<Members>,
    config: NodeConfig,
    replace: bool,
}

/// A node that runs in this process. Stop it with [`Node::stop`]. A node that is dropped without
/// that stops, too, but without waiting for the last flush. That loses no write that was
/// acknowledged, and makes the next start slower.
///
/// ```no_run
/// use esker::{Node, NodeConfig};
///
/// # async fn example() -> Result<(), esker::Error> {
/// // One node, which is a cluster of its own, with more memory for blocks than by default.
/// let config = NodeConfig { block_cache_mib: Some(1_024), ..NodeConfig::default() };
/// let node = Node::builder().data_dir("data").config(config).start().await?;
/// println!("TiKV's clients find it at {}", node.address());
///
/// let client = node.client().await?;
/// client.put("fruit/apple", "red").await?;
/// node.stop().await;
/// # Ok(())
/// # }
/// ```
///
/// What a program that embeds a node should know:
///
/// - A node is started and used within a tokio runtime whose time and I/O are enabled. Besides
///   tasks of that runtime it has threads of its own: see [`NodeConfig`].
/// - **It may end the process.** A store that cannot write, a placement member that cannot read its
///   state, and a node without its port or a task of its own must not go on. The node then writes a
///   line to standard error and aborts. After a restart everything that was acknowledged is there.
///   A store whose data does not match its checksums is another matter: it stops serving, the node
///   lives on to report that, and other nodes take over.
/// - It logs by the crate `tracing` and counts by the crate `metrics`. Both go where the program
///   sends them. The node's page `/metrics` is empty unless the program is `esker`.
/// - There is no authentication and no TLS. Whoever reaches the port can read and write everything.
pub struct Node {
    address: String,
    store_id: Option<StoreId>,
    placement: PlacementClient,
    store_service: Arc<LateStore>,
    health: Health,
    traffic: Arc<Traffic>,
    shutdown: watch::Sender<bool>,
    server: Option<JoinHandle<()>>,
    tasks: Vec<JoinHandle<()>>,
    store: start::StoreSlot,
    directory: Option<esker_engine::DataDir>,
    member: start::MemberSlot,
    store_failure: Option<Error>,
}

impl Node {
    /// A node of a cluster of its own on a free port of 127.0.0.1, unless the builder's methods
    /// change that. Only [`NodeBuilder::data_dir`] must be called.
    pub fn builder() -> NodeBuilder {
        NodeBuilder {
            data_dir: None,
            listen: "127.0.0.1:0".into(),
            advertise: None,
            listener: None,
            max_descriptors: None,
            join: Vec::new(),
            roles: None,
            labels: Vec::new(),
            members: None,
            config: NodeConfig::default(),
            replace: false,
        }
    }

    /// `host:port`, where this node serves everything: the address that others reach it by, with
    /// the port that was bound.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// The id of this node's store, if it has one that has started. A store keeps its id as long as
    /// it keeps its directory.
    pub fn store_id(&self) -> Option<StoreId> {
        self.store_id
    }

    /// Why this node's store did not start although it should. The node's placement member runs
    /// without it, because its group may need it. A node without a placement member, or with one
    /// that nobody needs yet, does not start at all then.
    pub fn store_failure(&self) -> Option<&Error> {
        self.store_failure.as_ref()
    }

    /// A client of the placement driver of this node's cluster. With it the clients for other
    /// purposes are made:
    ///
    /// ```no_run
    /// use std::time::Duration;
    ///
    /// use esker::AdminClient;
    /// use esker::client::admin::SplitAt;
    /// use esker::model::{RegionId, StoreId};
    /// # use esker::{ClientError, Node};
    ///
    /// # async fn example(node: &Node) -> Result<(), ClientError> {
    /// let admin = AdminClient::new(node.placement().clone());
    /// for found in admin.regions().await? {
    ///     println!("region {} holds {:?}", found.region.id, found.region.range);
    /// }
    /// // Region 4 is cut in two, and store 2 is to lead the part that keeps the id.
    /// admin.split_region(RegionId(4), &SplitAt::Keys(vec!["m".into()])).await?;
    /// admin.transfer_leader(RegionId(4), StoreId(2), Duration::from_secs(10)).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn placement(&self) -> &PlacementClient {
        &self.placement
    }

    /// A client whose requests to regions that are led on this node are function calls. All others
    /// use the network. Its cache of regions is its own: clone a client rather than making a
    /// second. After the node has stopped, the client works as long as other nodes serve.
    ///
    /// # Errors
    /// None at present. Later versions may return errors.
    pub async fn client(&self) -> Result<KvClient, Error> {
        Ok(KvClient::new(self.placement.clone(), self.local_store()))
    }

    /// The node's store, for clients in this process.
    pub(crate) fn local_store(&self) -> Option<Arc<dyn StoreService>> {
        self.store_id.map(|_| self.store_service.clone() as Arc<dyn StoreService>)
    }

    /// Stops the node and waits until its data is on disk and its directory is free. Calls that are
    /// under way get half a second to end. Regions that were led here elect other leaders.
    pub async fn stop(mut self) {
        self.begin_stop();
        if let Some(server) = self.server.take() {
            let _ = server.await;
        }
        // The tasks hold the stores, whose directories must be free when this returns.
        for task in self.tasks.drain(..) {
            let _ = task.await;
        }
        let (store, member) = (self.store.lock().take(), self.member.lock().take());
        let member = match member {
            Some(start::RunningMember { store, watch }) => {
                watch.abort();
                let _ = watch.await;
                Some(store)
            }
            None => None,
        };
        let directory = self.directory.take();
        let stopping = tokio::task::spawn_blocking(move || {
            if let Some(store) = store {
                store.stop();
            }
            drop(directory);
            if let Some(member) = member {
                member.stop();
            }
        });
        let _ = stopping.await;
    }

    fn begin_stop(&self) {
        // Before anything stops, so that watching clients turn to other nodes while calls still
        // succeed.
        self.health.stop();
        self.shutdown.send_replace(true);
        self.traffic.clear();
        self.store_service.close();
        for task in &self.tasks {
            task.abort();
        }
        if let Some(member) = &*self.member.lock() {
            member.watch.abort();
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.begin_stop();
        if let Some(server) = &self.server {
            server.abort();
        }
    }
}

impl NodeBuilder {
    /// Where the node keeps its data. The directory is made if it does not exist. Required. It
    /// belongs to this node for good, and no other process may use it.
    pub fn data_dir(mut self, directory: impl Into<PathBuf>) -> Self {
        self.data_dir = Some(directory.into());
        self
    }

    /// `host:port` to serve on; `127.0.0.1:0` by default. Others reach this node by it, unless
    /// [`advertise`](Self::advertise) sets another address. Port 0 takes any free port. All
    /// addresses of the machine (`0.0.0.0` or `[::]`) need `advertise`.
    pub fn listen(mut self, address: impl Into<String>) -> Self {
        self.listen = address.into();
        self
    }

    /// `host:port` by which others reach this node, if that is not the address at which it listens:
    /// behind a forwarded port, or when it listens at all addresses of the machine.
    pub fn advertise(mut self, address: impl Into<String>) -> Self {
        self.advertise = Some(address.into());
        self
    }

    /// The members of the placement driver: one, three or five `host:port`. A node whose own
    /// address is among them is a member. Without any, this node is a cluster of its own. Give the
    /// same list, in the same spelling, to every node, and keep it: it is fixed at the first start.
    pub fn join<A: Into<String>>(mut self, members: impl IntoIterator<Item = A>) -> Self {
        self.join = members.into_iter().map(Into::into).collect();
        self
    }

    /// Which parts the node runs. By default it has a store, and a placement member if
    /// [`join`](Self::join) lists it or is empty.
    pub fn roles(mut self, roles: Roles) -> Self {
        self.roles = Some(roles);
        self
    }

    /// The location of the node, as pairs such as `zone` and `a`. At most 64, each part of at most
    /// 256 bytes. They are kept and shown. Placement does not act on them yet.
    pub fn labels(mut self, labels: Vec<(String, String)>) -> Self {
        self.labels = labels;
        self
    }

    /// The settings; all at their defaults without this.
    pub fn config(mut self, config: NodeConfig) -> Self {
        self.config = config;
        self
    }

    /// Lets a store with an empty directory take the place of the store that had its address and
    /// lost its memory for good. The old store becomes a tombstone, and its replicas are made anew
    /// from the others. Has no effect once the directory is in use.
    pub fn replace(mut self, replace: bool) -> Self {
        self.replace = replace;
        self
    }

    /// How many file descriptors this node may use. From that number a node bounds its connections
    /// and the files that its engines hold open, so that neither takes the descriptors of the
    /// other.
    ///
    /// Without it, a node assumes all that this process may have at the start (the soft limit,
    /// `RLIMIT_NOFILE`). A node never changes that limit. Set fewer if the process has other uses
    /// for descriptors, or other nodes. Raise the process's limit if it is the usual 1,024.
    pub fn max_descriptors(mut self, descriptors: u64) -> Self {
        self.max_descriptors = Some(descriptors);
        self
    }

    /// Serves on a socket that is bound already.
    pub(crate) fn listener(mut self, listener: TcpListener) -> Self {
        self.listener = Some(listener);
        self
    }

    /// The placement members, under ids of their own that stay when the addresses change.
    pub(crate) fn members(mut self, members: Members, join: Vec<String>) -> Self {
        self.members = Some(members);
        self.join = join;
        self
    }

    /// Starts the node. Returns when its store is open and known to placement.
    ///
    /// It waits without a limit for others: the first start of a cluster for all placement members,
    /// later starts for a majority of them. It logs what it waits for. To give up, drop the future,
    /// which stops what was started.
    ///
    /// # Errors
    /// [`Error::NoDataDir`], [`Error::NoRole`], [`Error::NotAMember`], [`Error::Setting`] and
    /// [`Error::Addresses`] for a builder that cannot be right, before anything is made on disk.
    /// [`Error::Listen`] if the port is taken. The others are about the directory, or come from
    /// placement: see [`Error`]. After an error nothing keeps running.
    pub async fn start(self) -> Result<Node, Error> {
        start::start(self).await
    }

    async fn bind(&mut self) -> Result<TcpListener, Error> {
        let failed = |source| Error::Listen { address: self.listen.clone(), source };
        match self.listener.take() {
            Some(bound) => Ok(bound),
            None => esker_rpc::server::listen(&self.listen).await.map_err(failed),
        }
    }

    fn bound(&self, listener: &TcpListener) -> Result<std::net::SocketAddr, Error> {
        let failed = |source| Error::Listen { address: self.listen.clone(), source };
        listener.local_addr().map_err(failed)
    }

    /// The placement members, if this node, at `address`, is one of them.
    fn placement_members(&self, address: &str) -> Result<Option<Members>, Error> {
        if let Some(members) = &self.members {
            return Ok(Some(members.clone()));
        }
        let mut addresses: BTreeSet<String> = self.join.iter().cloned().collect();
        // A cluster of one node may change its address, because no other node knows it.
        let tag = match addresses.is_empty() {
            true => tag_of("alone"),
            false => tag_of(&addresses.iter().cloned().collect::<Vec<_>>().join(",")),
        };
        if addresses.is_empty() {
            addresses.insert(address.to_owned());
        }
        let wanted = self.roles.map(|roles| roles.placement);
        let all: Vec<MemberInfo> = addresses
            .iter()
            .zip(1..)
            .map(|(address, number)| MemberInfo {
                id: MemberId(number),
                name: format!("placement-{number}"),
                address: address.clone(),
            })
            .collect();
        let me = all.iter().find(|member| member.address == address).map(|member| member.id);
        match (wanted, me) {
            (Some(false), _) | (None, None) => Ok(None),
            (_, Some(me)) => Ok(Some(Members { me, all, tag })),
            (Some(true), None) => {
                Err(Error::NotAMember { address: address.to_owned(), members: self.join.join(",") })
            }
        }
    }
}

/// A number that distinguishes sets of members: FNV-1a, which is the same in every build.
pub(crate) fn tag_of(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    })
}
