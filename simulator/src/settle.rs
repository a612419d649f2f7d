//! What must be so when the faults are over.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use esker_client::placement::RegionInfo;
use esker_engine::{Cf, KvEngine};
use esker_model::{KeyRange, LogIndex, Region, RegionId, Role, StoreId};
use esker_raftstore::state::{self, RegionState, bounds};
use esker_raftstore::{StoreError, StoreHandle, remembered_records};

use crate::history::short;
use crate::machine::{Machine, On};
use crate::world::World;

/// How many replicas placement gives each region.
const REPLICAS: usize = 3;

/// The regions of a cluster at rest, by where they begin.
pub type Regions = Vec<Arc<Region>>;

/// Whether the cluster has come to rest: its regions, or what is still in motion.
pub fn rests(world: &World) -> Result<Regions, String> {
    if let Some(down) = world.machines.values().find(|machine| machine.on().is_none()) {
        return Err(format!("{} is down", down.host));
    }
    let stores: BTreeMap<StoreId, &StoreHandle> =
        world.running().map(|(_, store)| (store.store_id(), store)).collect();
    let mut newest: BTreeMap<RegionId, Arc<Region>> = BTreeMap::new();
    for region in stores.values().flat_map(|store| store.delegates().descriptors()) {
        let known = newest.entry(region.id).or_insert_with(|| region.clone());
        let age = |region: &Region| (region.epoch.version, region.epoch.conf_ver);
        if age(&region) > age(known) {
            *known = region;
        }
    }
    for region in newest.values() {
        has_settled(world, region, &stores)?;
    }
    let mut regions: Regions = newest.into_values().collect();
    regions.sort_by(|a, b| a.range.start().cmp(b.range.start()));
    tile(&regions)?;
    Ok(regions)
}

/// Each key belongs to exactly one region.
fn tile(regions: &[Arc<Region>]) -> Result<(), String> {
    let mut reached = Some(bytes::Bytes::new());
    for region in regions {
        if reached.as_ref() != Some(region.range.start()) {
            return Err(format!("region {} begins at {}", region.id, short(region.range.start())));
        }
        reached = region.range.end().cloned();
    }
    match reached {
        None => Ok(()),
        Some(end) => Err(format!("no region holds {}", short(&end))),
    }
}

fn has_settled(
    world: &World,
    region: &Region,
    stores: &BTreeMap<StoreId, &StoreHandle>,
) -> Result<(), String> {
    let id = region.id;
    let is_complete =
        region.peers.len() == REPLICAS && region.peers.iter().all(|peer| peer.role == Role::Voter);
    if !is_complete {
        return Err(format!("region {id} has the peers {:?}", region.peers));
    }
    let mut applied = BTreeSet::new();
    for (store, handle) in stores {
        let replica = handle.delegates().get(id).map(|replica| replica.descriptor());
        match (region.peer_on(*store), replica) {
            (None, None) => {}
            (None, Some(_)) => return Err(format!("store {store} still has region {id}")),
            (Some(_), Some(known)) if *known == *region => {
                let index =
                    state::applied(handle.engine(), id).map_err(|error| error.to_string())?;
                applied.insert(index.map(|applied| applied.index));
            }
            (Some(_), _) => return Err(format!("store {store} is behind in region {id}")),
        }
    }
    let lost = region.peers.iter().find(|peer| !stores.contains_key(&peer.store));
    if let Some(lost) = lost {
        return Err(format!("region {id} has a peer on store {}, which is lost", lost.store));
    }
    if applied.len() != 1 {
        return Err(format!("the replicas of region {id} are at {applied:?}"));
    }
    match world.around.leaders.lock().of(id).len() {
        1 => Ok(()),
        leaders => Err(format!("region {id} has {leaders} leaders")),
    }
}

/// Whether placement's map of the regions is the stores'.
pub fn agrees(regions: &Regions, known: &[RegionInfo]) -> Result<(), String> {
    let show = |region: &Region| {
        format!("{} [{}] {}", region.id, short(region.range.start()), region.epoch)
    };
    let theirs: Vec<String> = known.iter().map(|info| show(&info.region)).collect();
    let ours: Vec<String> = regions.iter().map(|region| show(region)).collect();
    if theirs != ours {
        return Err(format!("placement knows {theirs:?}, there are {ours:?}"));
    }
    for (info, region) in known.iter().zip(regions) {
        if info.region != **region {
            return Err(format!("placement knows {:?}, there is {region:?}", info.region));
        }
    }
    Ok(())
}

/// Whether the replicas of each region are equal, byte for byte.
///
/// # Errors
/// The first difference.
pub fn compare(world: &World, regions: &Regions) -> Result<(), String> {
    let mut contents: BTreeMap<RegionId, (StoreId, Vec<Pair>, String)> = BTreeMap::new();
    for on in stores(world) {
        for region in held(regions, on.id) {
            let kv = on.store.handle.engine();
            let said = |error: StoreError| format!("store {}: {error}", on.id);
            let content = content(kv, &region.range).map_err(said)?;
            // Which writes it would recognise if they came again.
            let remembered = remembered_records(kv, region.id).map_err(said)?;
            let remembered = format!("{remembered:?}");
            let Some((other, known, memory)) = contents.get(&region.id) else {
                contents.insert(region.id, (on.id, content, remembered));
                continue;
            };
            if *known == content && *memory == remembered {
                continue;
            }
            let pair = known.iter().zip(&content).find(|(a, b)| a != b);
            let show = |(cf, key, value): &Pair| {
                format!("{cf} {} {} of {} bytes", short(key), short(value), value.len())
            };
            let differs = match pair {
                Some((a, b)) => format!("{} and {}", show(a), show(b)),
                None if known.len() != content.len() => {
                    format!("{} pairs and {}", known.len(), content.len())
                }
                None => format!("remembered writes {memory} and {remembered}"),
            };
            return Err(format!(
                "region {} on store {other} and on store {}: {differs}",
                region.id, on.id
            ));
        }
    }
    Ok(())
}

/// Whether the stores hold nothing but their regions.
///
/// # Errors
/// The first thing that is left over.
pub fn is_clean(world: &World, regions: &Regions) -> Result<(), String> {
    for on in stores(world) {
        let (kv, held) = (on.store.handle.engine(), held(regions, on.id));
        leftovers(kv, &held).map_err(|what| format!("store {}: {what}", on.id))?;
        let mut groups = Vec::new();
        on.log.states(|group, _| groups.push(group)).map_err(|error| error.to_string())?;
        // What a peer has promised that was never filled stays after its removal, because nobody
        // tells it: it must not vote twice in a term should it be filled yet.
        groups.retain(|group| {
            let promised = state::raft_state(&on.log, RegionId(*group));
            !promised.is_ok_and(|state| state.is_some_and(|state| state.last == LogIndex(0)))
        });
        if let Some(group) = groups.iter().find(|group| held.iter().all(|r| r.id.0 != **group)) {
            let id = RegionId(*group);
            let (log, kept) = (state::raft_state(&on.log, id), state::region_state(kv, id));
            return Err(format!("store {} has a log of region {id}: {log:?}, {kept:?}", on.id));
        }
    }
    has_no_files_of_snapshots(world)
}

/// Whether no store keeps the files of a snapshot. A store that starts removes those that it finds,
/// so this says something only about stores that have been up since they got snapshots.
///
/// # Errors
/// The first store that has some.
pub fn has_no_files_of_snapshots(world: &World) -> Result<(), String> {
    for on in stores(world) {
        let waiting = std::fs::read_dir(on.data.snap()).map_or(0, Iterator::count);
        if waiting > 0 {
            return Err(format!("store {} has {waiting} files of snapshots", on.id));
        }
    }
    Ok(())
}

fn stores(world: &World) -> impl Iterator<Item = &On> {
    world.machines.values().filter(|machine| machine.is_store()).filter_map(Machine::on)
}

fn held(regions: &Regions, store: StoreId) -> Vec<&Arc<Region>> {
    regions.iter().filter(|region| region.peer_on(store).is_some()).collect()
}

/// A family, a key in it, and its value.
type Pair = (Cf, Vec<u8>, Vec<u8>);

/// All pairs of a range.
fn content(kv: &KvEngine, range: &KeyRange) -> Result<Vec<Pair>, StoreError> {
    let view = kv.snapshot();
    let (start, end) = bounds(range);
    let mut pairs = Vec::new();
    for cf in Cf::DATA {
        let mut iter = view.iter(cf, start, end);
        iter.seek_to_first();
        while iter.valid()? {
            pairs.push((cf, iter.key().to_vec(), iter.value().to_vec()));
            iter.next();
        }
    }
    Ok(pairs)
}

/// Data, and records of regions, that belong to no region of the store.
fn leftovers(kv: &KvEngine, held: &[&Arc<Region>]) -> Result<(), String> {
    for (region, state) in state::region_states(kv).map_err(|error| error.to_string())? {
        let is_held = held.iter().any(|held| held.id == region);
        let is_right = match &state {
            RegionState::Normal(_) => is_held,
            RegionState::Tombstone { .. } => !is_held,
        };
        if !is_right {
            return Err(format!("region {region} is left as {state:?}"));
        }
    }
    let all = content(kv, &KeyRange::all()).map_err(|error| error.to_string())?;
    let mut expected = 0;
    for region in held {
        expected += content(kv, &region.range).map_err(|error| error.to_string())?.len();
    }
    match all.len() == expected {
        true => Ok(()),
        false => Err(format!("{} pairs, of which {expected} belong to its regions", all.len())),
    }
}
