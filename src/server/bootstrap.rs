//! A store's first start: its ids, and, for the first store of all, the first region.
//!
//! A crash may come between any two steps. What was begun is written down before
//! it is begun, in the file `BOOTSTRAP` of the data directory, and is taken up
//! again at the next start:
//!
//! ```text
//! ids from placement → BOOTSTRAP → IDENT → placement.Bootstrap → first region on disk
//!   → the key space cut at the bounds of keyspaces → BOOTSTRAP removed
//! ```

use std::fs;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use esker_engine::{DataDir, Ident, KvEngine, LogEngine};
use esker_raftstore::state::{bootstrap_region, region_state};
use esker_raftstore::{RegionExt, RegionId, StoreHandle, StoreId};
use esker_rpc::error::ClientError;
use esker_rpc::placement::PlacementClient;
use esker_rpc::proto::metapb::{Peer, Region, RegionEpoch, Store};
use esker_rpc::proto::pdpb::ErrorType;
use prost::Message as _;

use super::keys::memcomparable;
use super::regions::RegionService;
use crate::Error;

const FILE: &str = "BOOTSTRAP";

/// Where the raw and the transactional keys of the default key space of API version 2
/// begin and end. Clients that scan to the end of a key space rely on a region ending there.
const BOUNDS: [&[u8]; 4] = [b"r\0\0\0", b"r\0\0\x01", b"x\0\0\0", b"x\0\0\x01"];

/// What a store is, and whether it has just become it.
pub struct Identity {
    pub ident: Ident,
    pub is_new: bool,
}

/// The store's identity, from the directory or new from placement. Nothing is made for one
/// whose `address` another store has, unless that one is to be replaced.
pub async fn identify(
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
        return Ok(Identity { ident, is_new: false });
    }
    if !replace {
        let stores = placement.get_stores(true).await?;
        if let Some(holder) = stores.iter().find(|store| store.address == address) {
            return Err(Error::AddressTaken {
                path: data.path().to_owned(),
                address: address.to_owned(),
                store: holder.id,
            });
        }
    }
    let store_id = placement.alloc_id(1).await?.start;
    let ident = Ident { cluster_id, store_id };
    if !placement.is_bootstrapped().await? {
        let ids = placement.alloc_id(2).await?;
        let region = Region {
            id: ids.start,
            region_epoch: Some(RegionEpoch { conf_ver: 1, version: 1 }),
            peers: vec![Peer { id: ids.start + 1, store_id, ..Peer::default() }],
            ..Region::default()
        };
        remember(data.path(), &region)?;
    }
    Ok(Identity { ident, is_new: true })
}

fn failed(what: &'static str, path: PathBuf) -> impl FnOnce(std::io::Error) -> Error {
    move |source| Error::File { what, path, source }
}

fn remember(directory: &Path, region: &Region) -> Result<(), Error> {
    let path = directory.join(FILE);
    let write = || {
        let mut file = fs::File::create(&path)?;
        file.write_all(&region.encode_to_vec())?;
        file.sync_all()?;
        fs::File::open(directory)?.sync_all()
    };
    write().map_err(failed("cannot write", path.clone()))
}

/// The first region, where this store has begun to make it.
fn remembered(directory: &Path) -> Result<Option<Region>, Error> {
    let path = directory.join(FILE);
    match fs::read(&path) {
        Ok(bytes) => Region::decode(&bytes[..])
            .map(Some)
            .map_err(|error| Error::Config { path, reason: error.to_string() }),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(source) => Err(Error::File { what: "cannot read", path, source }),
    }
}

fn forget(directory: &Path) -> Result<(), Error> {
    let path = directory.join(FILE);
    fs::remove_file(&path).map_err(failed("cannot remove", path))
}

/// Makes the cluster's first region here, if this store was the one to begin it.
/// Tells the region while the key space is not cut yet.
pub async fn first_region(
    directory: &Path,
    placement: &PlacementClient,
    store: &Store,
    kv: &KvEngine,
    log: &LogEngine,
) -> Result<Option<Region>, Error> {
    let Some(region) = remembered(directory)? else { return Ok(None) };
    let id = region.region_id();
    if region_state(kv, id)?.is_some() {
        return Ok(Some(region));
    }
    match placement.bootstrap(store.clone(), region.clone()).await {
        Ok(()) => {}
        Err(ClientError::PlacementRefused { kind: ErrorType::AlreadyBootstrapped, .. }) => {
            // By this store, in an earlier attempt, only if placement knows it: it
            // is not made known in any other way before this is over.
            let known = placement.get_stores(false).await?;
            if !known.iter().any(|other| other.id == store.id) {
                forget(directory)?;
                return Ok(None);
            }
        }
        Err(error) => return Err(error.into()),
    }
    bootstrap_region(kv, log, StoreId(store.id), &region)?;
    Ok(Some(region))
}

/// Cuts the first region at the bounds of the key spaces. Tries until it is done:
/// the region may still be electing, or placement may be away.
pub async fn cut_key_spaces(
    directory: PathBuf,
    store: StoreHandle,
    placement: PlacementClient,
    region: Region,
) {
    const RETRY: Duration = Duration::from_millis(50);
    let id = RegionId(region.id);
    loop {
        match try_cut(&store, &placement, id).await {
            Ok(()) => break,
            Err(why) => tracing::debug!(region = %id, why, "the key space is not cut yet"),
        }
        if store.is_stopped() {
            return;
        }
        tokio::time::sleep(RETRY).await;
    }
    if let Err(error) = forget(&directory) {
        tracing::warn!(%error, "the first start will be checked again at the next");
    }
}

async fn try_cut(
    store: &StoreHandle,
    placement: &PlacementClient,
    id: RegionId,
) -> Result<(), String> {
    let status = store.status(id).await.map_err(|error| error.to_string())?;
    let region = status.region;
    let keys: Vec<Bytes> = BOUNDS
        .iter()
        .map(|key| memcomparable(key))
        .filter(|key| region.contains_key(key) && *key != region.start_key)
        .collect();
    if keys.len() < BOUNDS.len() {
        // It was cut before, here or by somebody else.
        return Ok(());
    }
    match RegionService::split_at(store, placement, id, region.epoch(), keys).await {
        Ok(_) => Ok(()),
        Err(super::raw::RawError::Region(error)) => Err(error.to_string()),
        Err(super::raw::RawError::Text(error)) => Err(error),
    }
}
