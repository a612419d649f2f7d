//! What `esker ycsb` measures: a cluster of Esker, or another system in the same way.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::ValueEnum;
use esker_client::KvClient;
use indicatif::BinaryBytes;

use super::super::cluster::ClusterArguments;
use super::super::error::CliError;
use super::{Plan, measure};
use crate::ycsb::{BareRocksDb, EtcdClient, PhaseReport};

/// The most threads that RocksDB is measured with. Each client has one, up to this number. With more
/// clients, the last wait for the first to end.
const MAX_ROCKSDB_THREADS: usize = 512;

/// Bytes of a record beside its value: the key, and what a store keeps of a pair.
const RECORD_OVERHEAD: u64 = 64;

/// Copies of a record in a cluster that has enough stores.
const REPLICAS: u64 = 3;

/// A system that `esker ycsb` can measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Target {
    /// A cluster of Esker, by its own client
    Esker,
    /// A cluster of TiKV, or of Esker, by TiKV's client
    Tikv,
    /// A cluster of etcd
    Etcd,
    /// RocksDB alone, in this process
    Rocksdb,
}

impl Target {
    /// Runs the phases of `plan` against this system.
    pub(super) async fn measure(
        self,
        cluster: &ClusterArguments,
        directory: Option<&Path>,
        plan: &Plan,
    ) -> Result<Vec<PhaseReport>, CliError> {
        let json = cluster.json;
        match self {
            Target::Esker => {
                let client = cluster.kv().await?;
                if plan.loads {
                    check_stores(&client, plan).await?;
                }
                measure(&Arc::new(client), plan, json).await
            }
            Target::Tikv => tikv(cluster, plan).await,
            Target::Etcd => {
                let endpoints: Vec<_> = cluster.placement.iter().map(ToString::to_string).collect();
                let connected = EtcdClient::connect(&endpoints).await;
                let client =
                    connected.map_err(|reason| CliError::NoTarget { system: "etcd", reason })?;
                if !client.is_at_leader() {
                    eprintln!(
                        "note: none of the members named leads, and one that follows is slower: name \
                         all with --placement"
                    );
                }
                measure(&Arc::new(client), plan, json).await
            }
            Target::Rocksdb => {
                let directory = directory.ok_or(CliError::NoDirectory)?;
                rocksdb(directory, plan, json)
            }
        }
    }
}

#[cfg(feature = "tikv-target")]
async fn tikv(cluster: &ClusterArguments, plan: &Plan) -> Result<Vec<PhaseReport>, CliError> {
    let endpoints = cluster.placement.iter().map(ToString::to_string).collect();
    let connected = crate::ycsb::TikvClient::connect(endpoints).await;
    let client = connected.map_err(|reason| CliError::NoTarget { system: "TiKV", reason })?;
    measure(&Arc::new(client), plan, cluster.json).await
}

#[cfg(not(feature = "tikv-target"))]
async fn tikv(_: &ClusterArguments, _: &Plan) -> Result<Vec<PhaseReport>, CliError> {
    Err(CliError::WithoutTikv)
}

/// RocksDB's calls block, so its clients have a runtime with a thread for each.
fn rocksdb(directory: &Path, plan: &Plan, json: bool) -> Result<Vec<PhaseReport>, CliError> {
    let failed = |reason| CliError::RocksDb { path: PathBuf::from(directory), reason };
    std::fs::create_dir_all(directory).map_err(|error| failed(error.to_string()))?;
    if plan.loads {
        let space = rustix::fs::statvfs(directory).map_err(|error| failed(error.to_string()))?;
        let free = space.f_bavail.saturating_mul(space.f_frsize);
        plan.check_space(1, free, &directory.display().to_string())?;
    }
    tokio::task::block_in_place(|| {
        let database = Arc::new(BareRocksDb::open(directory).map_err(failed)?);
        let runtime = tokio::runtime::Builder::new_multi_thread()
            // One more keeps the time.
            .worker_threads(plan.options.threads.min(MAX_ROCKSDB_THREADS) + 1)
            .enable_all()
            .build()
            .map_err(CliError::Runtime)?;
        runtime.block_on(measure(&database, plan, json))
    })
}

/// Checks that the stores of the cluster have room for the records.
async fn check_stores(client: &KvClient, plan: &Plan) -> Result<(), CliError> {
    let placement = client.placement();
    let stores = placement.get_stores(true).await?;
    let mut disks = BTreeMap::new();
    for store in &stores {
        let (store, stats) = placement.get_store(esker_model::StoreId(store.id)).await?;
        // A store that has not reported yet knows nothing of its disk.
        if stats.capacity == 0 {
            return Ok(());
        }
        // Stores of one host with as large a disk share it, as those of a playground do.
        let host = store.address.rsplit_once(':').map_or_else(String::new, |(host, _)| host.into());
        let disk = disks.entry((host, stats.capacity)).or_insert((0_u64, stats.available));
        disk.0 += 1;
    }
    let count = stores.len() as u64;
    if count <= REPLICAS {
        // Every store has a copy, and the fullest disk decides.
        let tightest = disks.values().map(|(stores, free)| (free / stores, stores, free)).min();
        let Some((_, stores, free)) = tightest else { return Ok(()) };
        return plan.check_space(*stores, *free, "the fullest disk of the cluster");
    }
    let free = disks.values().fold(0, |sum: u64, (_, free)| sum.saturating_add(*free));
    plan.check_space(REPLICAS, free, "the cluster")
}

impl Plan {
    /// Checks that `copies` of the records fit into the `free` bytes of a place.
    fn check_space(&self, copies: u64, free: u64, place: &str) -> Result<(), CliError> {
        let (records, size) = (self.options.records, self.options.shape.value_size() as u64);
        let needed = records.saturating_mul(size + RECORD_OVERHEAD).saturating_mul(copies);
        if needed <= free {
            return Ok(());
        }
        Err(CliError::DiskTooSmall {
            records,
            size,
            needed: BinaryBytes(needed).to_string(),
            place: place.into(),
            free: BinaryBytes(free).to_string(),
        })
    }
}
