//! A store's first start: its ids, and, for the first store of all, the first regions.
//!
//! A crash may come between any two steps. So each step is written to the file `BOOTSTRAP` of the
//! data directory before it is begun, and the next start continues there:
//!
//! ```text
//! ids from placement → BOOTSTRAP → IDENT → placement.Bootstrap → first regions on disk
//!   → BOOTSTRAP removed
//! ```
//!
//! There are two first regions: one for all keys, and one above all keys, which stays empty (the
//! reason is at [`KEYS_TOP`]). No other bounds are cut before they are asked for. The bounds of
//! TiKV's key spaces are cut when a client first uses a key space.

use std::time::Duration;

use bytes::Bytes;
use esker_client::{ClientError, PlacementClient};
use esker_engine::{DataDir, EngineOptions, Engines, Ident, LogEngine};
use esker_model::limits::KEYS_TOP;
use esker_model::{Epoch, KeyRange, Peer, PeerId, Region, RegionId, StoreId};
use esker_mutants::broken;
use esker_raftstore::state::{bootstrap_region, region_state};
use esker_rpc::convert::Malformed;
use esker_rpc::proto::metapb::{self, Store};
use esker_rpc::proto::pdpb::ErrorType;
use prost::Message as _;

use crate::Error;

const FILE: &str = "BOOTSTRAP";

/// What a store tells placement of itself when it starts.
pub struct Newcomer<'a> {
    /// Where it listens, as `host:port`.
    pub address: &'a str,
    pub labels: &'a [(String, String)],
    /// Whether it may take the place of a store at the same address that has lost its memory.
    pub replace: bool,
}

/// A store that placement knows, and that has not sent a message yet.
pub struct Introduced {
    pub ident: Ident,
    pub engines: Engines,
    pub memory: metapb::StoreMemory,
}

/// Finds out the identity of the store in `data`, makes the cluster's first regions if this store
/// is to make them, and introduces the store to placement.
///
/// # Errors
/// When the directory cannot be used or is not whole, when placement refuses the store, or cannot be
/// asked.
pub async fn introduce(
    data: &mut DataDir,
    placement: &PlacementClient,
    options: &EngineOptions,
    newcomer: Newcomer<'_>,
) -> Result<Introduced, Error> {
    // Existing engines are opened first, because even without IDENT they may be a memory in use.
    // Missing engines are not made before it is known that the store may be started.
    let found = match data.holds_engines() {
        true => Some(data.open_engines(options)?),
        false => None,
    };
    let identity = identify(data, placement, newcomer.address, newcomer.replace).await?;
    let ident = identity.ident;
    let describe = |memory: metapb::StoreMemory| Store {
        id: ident.store_id,
        address: newcomer.address.to_owned(),
        labels: newcomer
            .labels
            .iter()
            .map(|(key, value)| metapb::StoreLabel { key: key.clone(), value: value.clone() })
            .collect(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        esker_memory: Some(memory),
        ..Store::default()
    };
    let lineage = rand::random();
    if let Some(lost) = identity.replaces {
        // Nothing is written for the new store before it has its place.
        let memory = metapb::StoreMemory { lineage, ..metapb::StoreMemory::default() };
        replace_store(placement, lost, describe(memory)).await?;
    }
    let engines = match found {
        Some(engines) => engines,
        None => data.open_engines(options)?,
    };
    if identity.is_new {
        data.found(ident, lineage, &engines)?;
    } else {
        // Before any count is increased: a copy that is refused again and again must not come
        // closer to what the cluster has seen.
        check_memory(data, &engines.log, placement, ident).await?;
    }
    let mark = data.begin(&engines)?;
    let memory = metapb::StoreMemory {
        lineage: mark.lineage,
        generation: mark.generation,
        start: rand::random(),
        log_sequence: engines.log.sequence(),
    };
    let descriptor = describe(memory);
    first_regions(data, placement, &descriptor, &engines).await?;
    // Placement learns of the store before the store sends messages, so that the others find it.
    placement.put_store(descriptor).await?;
    Ok(Introduced { ident, engines, memory })
}

/// The identity of a store, and whether the store is new.
struct Identity {
    ident: Ident,
    is_new: bool,
    /// The store at the same address that has lost its memory, whose place this store takes.
    replaces: Option<u64>,
}

/// The store's identity, from the directory or new from placement. A new store gets no identity if
/// another store has its `address`, unless that store is to be replaced.
async fn identify(
    data: &DataDir,
    placement: &PlacementClient,
    address: &str,
    replace: bool,
) -> Result<Identity, Error> {
    let cluster_id = placement.cluster_id();
    if let Some(ident) = data.ident() {
        if ident.cluster_id != cluster_id {
            return Err(Error::OtherCluster {
                path: data.path().to_owned(),
                found: ident.cluster_id,
                wanted: cluster_id,
                placement: placement.leader_address(),
            });
        }
        return Ok(Identity { ident, is_new: false, replaces: None });
    }
    let stores = placement.get_stores(true).await?;
    let replaces = stores.iter().find(|store| store.address == address).map(|store| store.id);
    if let Some(store) = replaces
        && !replace
    {
        let (path, address) = (data.path().to_owned(), address.to_owned());
        return Err(Error::AddressTaken { path, address, store: StoreId(store) });
    }
    let store_id = placement.alloc_id(1).await?.start;
    let ident = Ident { cluster_id, store_id };
    if !placement.is_bootstrapped().await? {
        let ids = placement.alloc_id(4).await?;
        let region = |first_id: u64, range| Region {
            id: RegionId(first_id),
            range,
            epoch: Epoch::FIRST,
            peers: vec![Peer::voter(PeerId(first_id + 1), StoreId(store_id))],
        };
        let top = [Bytes::from_static(&KEYS_TOP)];
        let parts = KeyRange::all().split_at(&top).expect("the top is a key");
        let regions: Vec<Region> = parts
            .into_iter()
            .zip([ids.start, ids.start + 2])
            .map(|(part, id)| region(id, part))
            .collect();
        remember(data, &regions)?;
    } else {
        // The file is from a start that ended before the store had an identity. Another store has
        // made the first regions.
        data.remove_record(FILE)?;
    }
    Ok(Identity { ident, is_new: true, replaces })
}

/// Checks that the directory holds at least what the cluster has seen of the store.
///
/// # Errors
/// When it does not, because it is an older copy.
async fn check_memory(
    data: &DataDir,
    log: &LogEngine,
    placement: &PlacementClient,
    ident: Ident,
) -> Result<(), Error> {
    let stores = placement.get_stores(true).await?;
    let known = stores.into_iter().find(|store| store.id == ident.store_id);
    // A store that was removed learns that when it introduces itself.
    let Some(known) = known.and_then(|known| known.esker_memory) else { return Ok(()) };
    let Some(mark) = data.mark() else { return Ok(()) };
    let is_whole = known.lineage == mark.lineage
        && known.generation <= mark.generation
        && known.log_sequence <= log.sequence();
    match is_whole || broken!(OlderCopyIsRefused) {
        true => Ok(()),
        false => {
            Err(Error::OlderCopy { path: data.path().to_owned(), store: StoreId(ident.store_id) })
        }
    }
}

/// Takes the address of the store that lost its memory. Waits while that store still counts as
/// alive, for a few seconds after its end.
async fn replace_store(
    placement: &PlacementClient,
    lost: u64,
    descriptor: Store,
) -> Result<(), ClientError> {
    /// For how long, and how often, placement is asked.
    const PATIENCE: Duration = Duration::from_secs(15);
    const AGAIN: Duration = Duration::from_millis(500);
    let began = tokio::time::Instant::now();
    tracing::info!(
        store = descriptor.id,
        lost,
        address = descriptor.address,
        "waiting until the lost store has been silent for long enough to be replaced"
    );
    loop {
        match placement.replace_store(descriptor.clone()).await {
            Err(ClientError::PlacementRefused { kind: ErrorType::DuplicatedEntry, .. })
                if began.elapsed() < PATIENCE =>
            {
                tokio::time::sleep(AGAIN).await;
            }
            outcome => return outcome,
        }
    }
}

fn remember(data: &DataDir, regions: &[Region]) -> Result<(), Error> {
    let record: Vec<u8> = regions
        .iter()
        .flat_map(|region| metapb::Region::from(region).encode_length_delimited_to_vec())
        .collect();
    Ok(data.write_record(FILE, &record)?)
}

/// The first regions, if this store has begun to make them; otherwise none.
fn remembered(data: &DataDir) -> Result<Vec<Region>, Error> {
    let mut rest = Bytes::from(data.read_record(FILE)?.unwrap_or_default());
    let mut regions = Vec::new();
    while !rest.is_empty() {
        let damaged = |reason: String| Error::Damaged { path: data.path().join(FILE), reason };
        let region = metapb::Region::decode_length_delimited(&mut rest)
            .map_err(|error| damaged(error.to_string()))?;
        regions.push(region.try_into().map_err(|error: Malformed| damaged(error.to_string()))?);
    }
    Ok(regions)
}

/// Makes the cluster's first regions here, if this store has begun to make them. To be called
/// before the store is opened, because each step may be repeated.
async fn first_regions(
    data: &DataDir,
    placement: &PlacementClient,
    store: &Store,
    engines: &Engines,
) -> Result<(), Error> {
    let Engines { kv, log } = engines;
    let regions = remembered(data)?;
    let Some(first) = regions.first() else { return Ok(()) };
    // The whole key space is registered for this store. How it is cut becomes known from the
    // regions' leaders.
    let whole = Region { range: KeyRange::all(), ..first.clone() };
    match placement.bootstrap(store.clone(), &whole).await {
        Ok(()) => {}
        Err(ClientError::PlacementRefused { kind: ErrorType::AlreadyBootstrapped, .. }) => {
            // This store bootstrapped the cluster in an earlier attempt only if placement knows the
            // store. Nothing else makes the store known before this is over.
            let known = placement.get_stores(false).await?;
            if !known.iter().any(|other| other.id == store.id) {
                return Ok(data.remove_record(FILE)?);
            }
        }
        Err(error) => return Err(error.into()),
    }
    for region in &regions {
        // A region that is there may have been used already.
        if region_state(kv, region.id)?.is_none() {
            bootstrap_region(kv, log, StoreId(store.id), region)?;
        }
    }
    Ok(data.remove_record(FILE)?)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use esker_engine::{KvEngine, MemoryEnv};
    use esker_raftstore::state::RegionState;

    use super::*;
    use crate::Node;

    /// The steps of a store's first start, until it would open.
    struct Starting {
        data: DataDir,
        store: Store,
        engines: Engines,
        _root: tempfile::TempDir,
    }

    impl Starting {
        async fn new(placement: &PlacementClient, address: &str) -> Self {
            let root = tempfile::tempdir().expect("a directory");
            let data =
                DataDir::open(root.path(), esker_engine::Kind::Store).expect("an empty directory");
            let ident = identify(&data, placement, address, false).await.expect("an id").ident;
            let options = EngineOptions::in_memory(MemoryEnv::new());
            Starting {
                data,
                store: Store {
                    id: ident.store_id,
                    address: address.to_owned(),
                    ..Store::default()
                },
                engines: Engines {
                    kv: KvEngine::open(Path::new("/kv"), &options).expect("an engine"),
                    log: LogEngine::open(Path::new("/log"), &options).expect("an engine"),
                },
                _root: root,
            }
        }

        fn begun(&self) -> Vec<Region> {
            remembered(&self.data).expect("it can be read")
        }

        async fn go_on(&self, placement: &PlacementClient) {
            first_regions(&self.data, placement, &self.store, &self.engines)
                .await
                .expect("the start goes on");
            assert_eq!(self.begun(), [], "it is over");
        }

        fn on_disk(&self, region: &Region) -> Option<RegionState> {
            region_state(&self.engines.kv, region.id).expect("it can be read")
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_first_start_goes_on_after_a_crash_between_any_two_steps() {
        let root = tempfile::tempdir().expect("a directory");
        let node = Node::builder()
            .data_dir(root.path())
            .listen("127.0.0.1:0")
            .roles(crate::node::Roles { placement: true, store: false })
            .start()
            .await
            .expect("placement starts");
        let placement = node.placement();
        let first = Starting::new(placement, "first:1").await;
        // Another store begins before the first is done.
        let second = Starting::new(placement, "second:1").await;
        let regions = first.begun();
        let ranges: Vec<_> = regions.iter().map(|region| region.range.clone()).collect();
        let top = [Bytes::from_static(&KEYS_TOP)];
        assert_eq!(Some(ranges), KeyRange::all().split_at(&top));
        assert_eq!(second.begun().len(), 2);

        // The store is registered, and one of two regions is on disk.
        let whole = Region { range: KeyRange::all(), ..regions[0].clone() };
        placement.bootstrap(first.store.clone(), &whole).await.expect("nobody was faster");
        bootstrap_region(
            &first.engines.kv,
            &first.engines.log,
            StoreId(first.store.id),
            &regions[1],
        )
        .expect("it is written");
        first.go_on(placement).await;
        for region in &regions {
            assert_eq!(first.on_disk(region), Some(RegionState::Normal(region.clone())));
        }
        // All steps but the removal of the file are done. Meanwhile a region has changed.
        remember(&first.data, &regions).expect("it is written");
        let smaller = KeyRange::new(Bytes::new(), Some("m".into())).expect("a range");
        let later = Region { range: smaller, ..regions[0].clone() };
        bootstrap_region(&first.engines.kv, &first.engines.log, StoreId(first.store.id), &later)
            .expect("it is written");
        first.go_on(placement).await;
        assert_eq!(first.on_disk(&regions[0]), Some(RegionState::Normal(later)));

        // The slower store makes no regions.
        let theirs = second.begun();
        second.go_on(placement).await;
        assert!(theirs.iter().all(|region| second.on_disk(region).is_none()));
        node.stop().await;
    }
}
