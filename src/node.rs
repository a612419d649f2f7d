//! One node: a store, a placement member, or both, behind one port.

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

/// Which parts a node runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Roles {
    pub placement: bool,
    pub store: bool,
}

/// Starts a node in this process; see [`Node::builder`].
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
/// that stops, too, but without waiting for the last flush.
pub struct Node {
    address: String,
    store_id: Option<u64>,
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
    /// change that.
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

    /// `host:port`, where this node serves everything.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// The id of this node's store, if it has one.
    pub fn store_id(&self) -> Option<u64> {
        self.store_id
    }

    /// Why this node's store does not run although it should. The node's placement member goes on
    /// without it.
    pub fn store_failure(&self) -> Option<&Error> {
        self.store_failure.as_ref()
    }

    pub fn placement(&self) -> &PlacementClient {
        &self.placement
    }

    /// A client whose requests to regions that are led on this node are function calls. All others
    /// use the network.
    ///
    /// # Errors
    /// None at present. Later versions may return errors.
    pub async fn client(&self) -> Result<KvClient, Error> {
        let local: Option<Arc<dyn StoreService>> =
            self.store_id.map(|_| self.store_service.clone() as Arc<dyn StoreService>);
        Ok(KvClient::new(self.placement.clone(), local))
    }

    /// Stops the node and waits until its data is on disk.
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
    /// Where the node keeps its data. The directory is made if it does not exist. Required.
    pub fn data_dir(mut self, directory: impl Into<PathBuf>) -> Self {
        self.data_dir = Some(directory.into());
        self
    }

    /// `host:port` to serve on. Others reach this node by it, unless [`advertise`](Self::advertise)
    /// sets another address. Port 0 takes any free port.
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
    /// address is among them is a member. Without any, this node is a cluster of its own.
    pub fn join<A: Into<String>>(mut self, members: impl IntoIterator<Item = A>) -> Self {
        self.join = members.into_iter().map(Into::into).collect();
        self
    }

    /// Which parts the node runs, if `join` alone does not determine it correctly.
    pub fn roles(mut self, roles: Roles) -> Self {
        self.roles = Some(roles);
        self
    }

    /// The location of the node, for placement's rules: `zone=a`, `host=b`.
    pub fn labels(mut self, labels: Vec<(String, String)>) -> Self {
        self.labels = labels;
        self
    }

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
    /// # Errors
    /// See [`Error`]. After an error nothing keeps running.
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
