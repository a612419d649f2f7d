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

/// In a node's data directory: those of its store and of its placement member.
pub(crate) const STORE_FOLDER: &str = "store";
pub(crate) const PLACEMENT_FOLDER: &str = "placement";

/// What a node does.
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

/// A node that runs in this process. Stop it with [`Node::stop`]; dropped without
/// that it stops too, but without waiting for the last flush.
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
    /// A node of a cluster of its own on a free port of 127.0.0.1, unless told otherwise.
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

    /// Why this node's store does not run although it should: its placement member goes on
    /// without it.
    pub fn store_failure(&self) -> Option<&Error> {
        self.store_failure.as_ref()
    }

    pub fn placement(&self) -> &PlacementClient {
        &self.placement
    }

    /// A client whose requests to regions that are led on this node are function
    /// calls; all others travel.
    ///
    /// # Errors
    /// None at present; connecting later may find some.
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
        // They hold the stores, whose directories must be free when this returns.
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
        // Before anything stops: those who watch turn to other nodes while calls still end well.
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
    /// Where the node keeps its data; made if it is not there. Required.
    pub fn data_dir(mut self, directory: impl Into<PathBuf>) -> Self {
        self.data_dir = Some(directory.into());
        self
    }

    /// `host:port` to serve on, by which others reach this node unless
    /// [`advertise`](Self::advertise) says otherwise. Port 0 takes any that is free.
    pub fn listen(mut self, address: impl Into<String>) -> Self {
        self.listen = address.into();
        self
    }

    /// `host:port` by which others reach this node, where that is not what it listens at:
    /// behind a forwarded port, or when it listens at all addresses of the machine.
    pub fn advertise(mut self, address: impl Into<String>) -> Self {
        self.advertise = Some(address.into());
        self
    }

    /// The members of the placement driver, one, three or five `host:port`. A node whose own
    /// address is among them is one; without any, this node is a cluster of its own.
    pub fn join<A: Into<String>>(mut self, members: impl IntoIterator<Item = A>) -> Self {
        self.join = members.into_iter().map(Into::into).collect();
        self
    }

    /// What the node does, where `join` alone does not say it right.
    pub fn roles(mut self, roles: Roles) -> Self {
        self.roles = Some(roles);
        self
    }

    /// Where the node stands, for placement's rules: `zone=a`, `host=b`.
    pub fn labels(mut self, labels: Vec<(String, String)>) -> Self {
        self.labels = labels;
        self
    }

    pub fn config(mut self, config: NodeConfig) -> Self {
        self.config = config;
        self
    }

    /// Lets a store with an empty directory take the place of the one that had its address
    /// and lost its memory for good: that one becomes a tombstone, and its replicas are
    /// made anew from the others. Without an effect once the directory is in use.
    pub fn replace(mut self, replace: bool) -> Self {
        self.replace = replace;
        self
    }

    /// How many file descriptors this node may use. A node bounds its connections and the files
    /// that its engines hold open by it, so that they cannot take each other's.
    ///
    /// Without it, a node reckons with all that this process may have at the start (the soft
    /// limit, `RLIMIT_NOFILE`), which it never changes. Give less where the process has other uses
    /// for descriptors, or other nodes; raise the process's limit where it is the usual 1,024.
    pub fn max_descriptors(mut self, descriptors: u64) -> Self {
        self.max_descriptors = Some(descriptors);
        self
    }

    /// Serves on a socket that is bound already.
    pub(crate) fn listener(mut self, listener: TcpListener) -> Self {
        self.listener = Some(listener);
        self
    }

    /// The placement members under ids of their own, whose addresses may change.
    pub(crate) fn members(mut self, members: Members, join: Vec<String>) -> Self {
        self.members = Some(members);
        self.join = join;
        self
    }

    /// Starts the node; returns when its store is open and known to placement.
    ///
    /// # Errors
    /// See [`Error`]; nothing keeps running.
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

    /// Which placement members there are, and whether this node, at `address`, is one.
    fn placement_members(&self, address: &str) -> Result<Option<Members>, Error> {
        if let Some(members) = &self.members {
            return Ok(Some(members.clone()));
        }
        let mut addresses: BTreeSet<String> = self.join.iter().cloned().collect();
        // A cluster of one node may change its address; no one else knows it.
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

/// A number that tells sets of members apart: FNV-1a, which stays the same in
/// every build.
pub(crate) fn tag_of(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    })
}
