//! A whole cluster in this process, for `esker playground`, tests and programs.

mod size;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use esker_client::{KvClient, PlacementClient};
use esker_model::{KeyRange, Role};
use esker_placement::{MemberId, MemberInfo};
use futures_util::future::{join_all, try_join_all};
use tempfile::TempDir;
use tokio::net::TcpListener;

pub(crate) use self::size::FILE as SIZE_FILE;
use self::size::Size;
use crate::Error;
use crate::node::address::PLACEMENT_MEMBERS;
use crate::node::{Node, NodeConfig, Roles, descriptors, tag_of};
use crate::server::member::Members;

/// The most stores of a cluster on one machine. With more, the cluster only gets slower.
pub const MAX_STORES: u32 = 32;
/// How many replicas placement gives every region, if there are that many stores.
const REPLICAS: usize = 3;
/// How long a cluster on one machine may take until every region has all its replicas.
const READY_WITHIN: Duration = Duration::from_secs(60);
/// The file in a node's folder that keeps the port at which the node listened last.
const PORT_FILE: &str = "PORT";
const LOOK_AGAIN: Duration = Duration::from_millis(25);

/// The size and the settings of a cluster. By default it has three stores and one placement member,
/// keeps nothing, and takes free ports.
#[derive(Clone, Debug)]
pub struct ClusterOptions {
    /// Nodes, each with a store: 1 to [`MAX_STORES`]. The same number as before if the directory
    /// holds a cluster. A region has three replicas, or as many as there are stores.
    pub stores: u32,
    /// Members of the placement driver, on the first nodes: 1, 3 or 5, at most one for each store.
    /// The same number as before if the directory holds a cluster.
    pub placements: u32,
    /// Where the data is kept, a folder for each node. Without a directory, the data is temporary,
    /// and is deleted when the cluster has stopped.
    pub data_dir: Option<PathBuf>,
    /// The port of the first placement member. 0 takes the one of last time, or any free port. The
    /// other nodes always do.
    pub port: u16,
    /// The settings of all nodes. `schedule_interval_ms` is 100 unless it is set, so that a test
    /// need not wait for replicas.
    pub config: NodeConfig,
}

impl Default for ClusterOptions {
    fn default() -> Self {
        ClusterOptions {
            stores: 3,
            placements: 1,
            data_dir: None,
            port: 0,
            config: NodeConfig::default(),
        }
    }
}

impl ClusterOptions {
    /// Checks that there can be such a cluster, and that nothing else is in its directory.
    fn check(&self) -> Result<Size, Error> {
        let &ClusterOptions { stores, placements, .. } = self;
        if !(1..=MAX_STORES).contains(&stores) {
            return Err(Error::Stores { stores });
        }
        if !PLACEMENT_MEMBERS.contains(&(placements as usize)) || placements > stores {
            return Err(Error::Placements { placements, stores });
        }
        self.config.check()?;
        let size = Size { stores, placements };
        if let Some(directory) = &self.data_dir {
            size.check(directory)?;
        }
        Ok(size)
    }
}

/// A running cluster, whose nodes listen on 127.0.0.1. Stop it with [`Cluster::stop`].
///
/// It is what `esker playground` runs: real nodes that speak to each other over sockets, in one
/// process. What [`Node`] says of programs that embed a node holds here, too.
///
/// ```no_run
/// use esker::{Cluster, ClusterOptions};
///
/// # async fn example() -> Result<(), esker::Error> {
/// let options = ClusterOptions { stores: 3, ..ClusterOptions::default() };
/// let mut cluster = Cluster::start(options).await?;
/// let client = cluster.client().await?;
/// client.put("hello", "world").await?;
///
/// // A store stops. The two others have the data.
/// cluster.take_node(2).stop().await;
/// assert_eq!(client.get("hello").await?.as_deref(), Some(&b"world"[..]));
/// cluster.stop().await;
/// # Ok(())
/// # }
/// ```
pub struct Cluster {
    nodes: Vec<Node>,
    placement: PlacementClient,
    placement_address: String,
    _temporary: Option<TempDir>,
}

impl Cluster {
    /// Starts all nodes and waits until every region has all its replicas: see
    /// [`ready`](Self::ready).
    ///
    /// # Errors
    /// [`Error::Stores`] or [`Error::Placements`] for a size that cannot be, [`Error::OtherSize`],
    /// [`Error::SingleNode`] or [`Error::PlaygroundPart`] for a directory with something else in
    /// it, [`Error::Slow`] if the cluster does not get ready, and those of
    /// [`NodeBuilder::start`](crate::NodeBuilder::start). After an error nothing keeps running.
    pub async fn start(options: ClusterOptions) -> Result<Cluster, Error> {
        let cluster = Cluster::launch(options).await?;
        cluster.ready().await?;
        Ok(cluster)
    }

    async fn launch(options: ClusterOptions) -> Result<Cluster, Error> {
        let size = options.check()?;
        let (directory, temporary) = match &options.data_dir {
            Some(directory) => (directory.clone(), None),
            None => {
                let failed = |source| Error::File {
                    what: "cannot make a temporary directory in",
                    path: std::env::temp_dir(),
                    source,
                };
                let temporary =
                    tempfile::Builder::new().prefix("esker-").tempdir().map_err(failed)?;
                (temporary.path().to_owned(), Some(temporary))
            }
        };
        let (stores, placements) = (options.stores as usize, options.placements as usize);
        let mut listeners = Vec::new();
        for node in 0..stores {
            listeners.push(match node {
                0 if options.port != 0 => listen(options.port).await?,
                _ => listen_again(&node_folder(&directory, node + 1)).await?,
            });
        }
        let descriptors = descriptors::current() / stores as u64;
        let addresses: Vec<String> = listeners.iter().map(|(_, address)| address.clone()).collect();
        let all: Vec<MemberInfo> = addresses[..placements]
            .iter()
            .zip(1..)
            .map(|(address, number)| MemberInfo {
                id: MemberId(number),
                name: format!("placement-{number}"),
                address: address.clone(),
            })
            .collect();
        let config = NodeConfig {
            schedule_interval_ms: options.config.schedule_interval_ms.or(Some(100)),
            ..options.config.clone()
        };
        let starts = listeners.into_iter().enumerate().map(|(number, (listener, address))| {
            let mut builder = Node::builder()
                .data_dir(node_folder(&directory, number + 1))
                .listen(address)
                .listener(listener)
                .max_descriptors(descriptors)
                .config(config.clone());
            let join = addresses[..placements].to_vec();
            builder = match number < placements {
                true => builder.members(
                    Members {
                        me: MemberId(number as u64 + 1),
                        all: all.clone(),
                        // The members find each other again even if their ports change.
                        tag: tag_of(&format!("playground of {placements}")),
                    },
                    join,
                ),
                false => builder.join(join).roles(Roles { placement: false, store: true }),
            };
            builder.start()
        });
        // The first failure ends all nodes, because the others might wait for the failed one for
        // ever.
        let nodes = try_join_all(starts).await?;
        for (number, node) in nodes.iter().enumerate() {
            let folder = node_folder(&directory, number + 1);
            let path = folder.join(PORT_FILE);
            let port = node.address().rsplit(':').next().unwrap_or_default();
            std::fs::write(&path, port).map_err(|source| Error::File {
                what: "cannot write",
                path,
                source,
            })?;
        }
        // If some node's store did not come up, the cluster is not complete. It may be started
        // again as it is.
        if nodes.iter().all(|node| node.store_id().is_some()) {
            size.remember(&directory)?;
        }
        let placement = nodes[0].placement().clone();
        let placement_address = nodes[0].address().to_owned();
        Ok(Cluster { nodes, placement, placement_address, _temporary: temporary })
    }

    /// `host:port` of the placement driver's first member, which any client of this cluster may be
    /// given.
    pub fn placement_address(&self) -> &str {
        &self.placement_address
    }

    /// The first node's client of the placement driver. [`Node::placement`] shows what it is for.
    pub fn placement(&self) -> &PlacementClient {
        &self.placement
    }

    /// The nodes that were not taken out. The placement members are on the first ones.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// A client that reaches all nodes over their sockets, as a client in another process would.
    ///
    /// # Errors
    /// When placement cannot be reached.
    pub async fn client(&self) -> Result<KvClient, Error> {
        let placement = PlacementClient::connect(vec![self.placement_address.clone()]).await?;
        Ok(KvClient::new(placement, []))
    }

    /// A client whose requests are function calls, whichever of the nodes leads the region. Requests
    /// to a node that was taken out use the network.
    ///
    /// # Errors
    /// None at present. Later versions may return errors.
    pub async fn local_client(&self) -> Result<KvClient, Error> {
        let stores = self.nodes.iter().filter_map(Node::local_store);
        Ok(KvClient::new(self.placement.clone(), stores))
    }

    /// Takes a node out of the cluster, so that the caller can stop it on its own. It runs on until
    /// then. `number` is its place in [`nodes`](Self::nodes), from 0, and the nodes after it move
    /// up by one.
    ///
    /// # Panics
    /// When there is no node of that number.
    pub fn take_node(&mut self, number: usize) -> Node {
        self.nodes.remove(number)
    }

    /// Waits until every region has a leader and all its replicas: three, or as many as there are
    /// nodes.
    ///
    /// # Errors
    /// [`Error::Slow`] when that takes more than 60 s.
    pub async fn ready(&self) -> Result<(), Error> {
        let began = Instant::now();
        let wanted = REPLICAS.min(self.nodes.len());
        loop {
            let reason = match self.missing(wanted).await {
                Ok(None) => return Ok(()),
                Ok(Some(reason)) => reason,
                Err(error) => error.to_string(),
            };
            if began.elapsed() > READY_WITHIN {
                return Err(Error::Slow { seconds: READY_WITHIN.as_secs(), reason });
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    /// What the cluster lacks to be complete.
    async fn missing(&self, replicas: usize) -> Result<Option<String>, Error> {
        let regions = self.placement.scan_regions(&KeyRange::all(), 0).await?;
        // One region for all keys, and the empty one above them.
        const FIRST_REGIONS: usize = 2;
        if regions.len() < FIRST_REGIONS {
            return Ok(Some(format!("{} of {FIRST_REGIONS} regions are there", regions.len())));
        }
        for info in &regions {
            let id = info.region.id;
            let voters = info.region.peers.iter().filter(|peer| peer.role == Role::Voter).count();
            if voters < replicas || voters != info.region.peers.len() {
                return Ok(Some(format!("region {id} has {voters} of {replicas} replicas")));
            }
            if info.leader.is_none() {
                return Ok(Some(format!("region {id} has no leader")));
            }
            if !info.pending.is_empty() {
                return Ok(Some(format!("a replica of region {id} is catching up")));
            }
        }
        Ok(None)
    }

    /// Stops all nodes and waits until their data is on disk, or deleted if it was temporary.
    pub async fn stop(self) {
        join_all(self.nodes.into_iter().map(Node::stop)).await;
    }
}

fn node_folder(directory: &Path, number: usize) -> PathBuf {
    directory.join(format!("node-{number}"))
}

/// Binds the port that the node had when it ran last, if it is still free. The other nodes know the
/// node by that port, and the old port of another node must not become this node's.
async fn listen_again(folder: &Path) -> Result<(TcpListener, String), Error> {
    let last = std::fs::read_to_string(folder.join(PORT_FILE)).ok();
    if let Some(port) = last.and_then(|port| port.trim().parse().ok())
        && let Ok(listener) = listen(port).await
    {
        return Ok(listener);
    }
    listen(0).await
}

async fn listen(port: u16) -> Result<(TcpListener, String), Error> {
    let wanted = format!("127.0.0.1:{port}");
    let failed = |source| Error::Listen { address: wanted.clone(), source };
    let listener = esker_rpc::server::listen(&wanted).await.map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?.to_string();
    Ok((listener, address))
}
