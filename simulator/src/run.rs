//! One run from its beginning to its end.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use esker_client::KvClient;
use parking_lot::Mutex;
use tokio::sync::{OnceCell, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::actors::{EXPIRING, Given, Work};
use crate::history::{encode, text};
use crate::journal::{self, Counts, Journal, Violation};
use crate::network::{CLIENTS, Host};
use crate::operator::connect;
use crate::plan::Plan;
use crate::settle;
use crate::world::World;
use crate::{disk, entropy};

/// How long the cluster may take to come to rest, and to serve everywhere, when the faults are over.
const REST_WITHIN: Duration = Duration::from_secs(60);
/// How often it is looked whether it has.
const LOOK: Duration = Duration::from_millis(500);
/// How often it is looked whether what was removed has gone.
const CLEANED: Duration = Duration::from_secs(5);

/// What became of a run.
#[derive(Clone, Debug)]
pub struct Outcome {
    pub violation: Option<Violation>,
    /// The same for the same events.
    pub hash: u64,
    /// Operations on keys.
    pub operations: usize,
    /// How often what the simulation is made of took effect.
    pub counts: Counts,
    /// From the end of the faults until the cluster was at rest.
    pub rested_after: Duration,
}

/// Simulates what is planned, on a thread of its own. `tells` prints what happens.
///
/// Only the first run of a process is one that replays: see [`crate::fleet`].
pub fn run(plan: &Plan, tells: bool) -> Outcome {
    let plan = plan.clone();
    let simulating = std::thread::Builder::new()
        .name(format!("seed {}", plan.seed))
        .spawn(move || simulate(&plan, tells));
    match simulating.map(std::thread::JoinHandle::join) {
        Ok(Ok(outcome)) => outcome,
        Ok(Err(_)) => panic!("a simulation ended without an outcome"),
        Err(error) => panic!("no thread for a simulation: {error}"),
    }
}

fn simulate(plan: &Plan, tells: bool) -> Outcome {
    #[cfg(feature = "mutants")]
    esker_mutants::break_with(plan.bug);
    entropy::seed_thread(plan.seed);
    disk::count_syncs();
    journal::watch_panics();
    let root = match tempfile::Builder::new().prefix("esker-simulator-").tempdir_in(disks()) {
        Ok(root) => root,
        Err(error) => panic!("no directory for a simulation: {error}"),
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap_or_else(|error| panic!("no runtime for a simulation: {error}"));
    let outcome = runtime.block_on(async {
        let journal = Journal::new(Instant::now(), tells);
        let live = live(plan, root.path(), &journal);
        let ended = std::panic::AssertUnwindSafe(live);
        let (operations, rested_after) =
            futures_util::FutureExt::catch_unwind(ended).await.unwrap_or_default();
        if let Some(panic) = journal::panicked() {
            journal.violated("nothing panics", panic);
        }
        let (violation, hash, counts) = (journal.violation(), journal.hash(), journal.counts());
        Outcome { violation, hash, operations, counts, rested_after }
    });
    drop(runtime);
    outcome
}

/// Where the machines' files are: in memory where the system has such a place, because making many
/// small files costs a disk more time than everything else together.
fn disks() -> std::path::PathBuf {
    let memory = std::path::PathBuf::from("/dev/shm");
    if memory.is_dir() { memory } else { std::env::temp_dir() }
}

async fn live(plan: &Plan, root: &std::path::Path, journal: &Journal) -> (usize, Duration) {
    let mut world = match World::new(plan, root, journal.clone()) {
        Ok(world) => world,
        Err(error) => panic!("the machines cannot be made: {error}"),
    };
    let given = Arc::new(Mutex::new(Given::default()));
    let (stop, stopped) = watch::channel(false);
    let mut actors = JoinSet::new();
    let programs: Vec<Arc<OnceCell<KvClient>>> =
        (0..plan.programs).map(|_| Arc::default()).collect();
    for (number, actor) in &plan.actors {
        let program = plan.program(*number);
        let work = Work {
            number: *number as u32,
            actor: *actor,
            host: Host::client(program),
            client: programs[program as usize].clone(),
            skew: plan.skew(),
            around: world.around.clone(),
            given: given.clone(),
            stopped: stopped.clone(),
            seed: plan.seed,
        };
        actors.spawn(work.run());
    }
    let began = Instant::now();
    let is_broken =
        |journal: &Journal| journal.violation().is_some() || journal::panicked().is_some();
    for (at, fault) in &plan.faults {
        let due = began + Duration::from_millis(*at);
        world.drive(tokio::time::sleep_until(due)).await;
        if is_broken(journal) {
            return (0, Duration::ZERO);
        }
        if *at < plan.length_ms {
            world.happen(*fault);
        }
    }
    let end = began + Duration::from_millis(plan.length_ms);
    world.drive(tokio::time::sleep_until(end)).await;
    let calm = Instant::now();
    world.calm(plan);
    stop.send_replace(true);
    world.drive(async { while actors.join_next().await.is_some() {} }).await;
    if is_broken(journal) {
        return (0, Duration::ZERO);
    }
    let regions = rest(&mut world, journal).await;
    let rested_after = calm.elapsed();
    let history = world.around.history.clone();
    let operations = history.lock().operations();
    if regions.is_some() {
        journal.note("settle", format_args!("at rest after {rested_after:?}"));
        serve(&mut world, journal).await;
        // Before it restarts the stores, which empties the directory of snapshots.
        no_files_stay(&mut world, journal).await;
        // Whatever was acknowledged is on the disks.
        world.around.journal.note("settle", "all lose power once more");
        world.black_out(Duration::from_millis(100));
        if rest(&mut world, journal).await.is_some() {
            read_all(&mut world, journal).await;
        }
    }
    // The replicas apply what was just written, and what was removed goes.
    let mut regions = None;
    let until = Instant::now() + REST_WITHIN;
    while !is_broken(journal) {
        let Some(resting) = rest(&mut world, journal).await else { break };
        if let Err(what) = settle::compare(&world, &resting) {
            journal.violated("replicas are equal", what);
        }
        match settle::is_clean(&world, &resting) {
            Ok(()) => {
                regions = Some(resting);
                break;
            }
            Err(what) if Instant::now() >= until => {
                journal.violated("nothing is left over", what);
            }
            Err(what) => {
                journal.note("settle", what);
                world.drive(tokio::time::sleep(CLEANED)).await;
            }
        }
    }
    for region in regions.iter().flatten() {
        let peers = region.peers.iter().map(|peer| peer.id.0);
        if let Some(id) = peers.chain([region.id.0]).find(|id| given.lock().has(*id)) {
            journal.violated("an id is given once", format!("{id}, in region {}", region.id));
        }
    }
    if let Err(what) = history.lock().check() {
        journal.violated("every history is linearizable", what);
    }
    (operations, rested_after)
}

/// Waits until the cluster is at rest and placement knows it as it is.
async fn rest(world: &mut World, journal: &Journal) -> Option<settle::Regions> {
    let around = world.around.clone();
    let host = Host(CLIENTS + 91);
    let until = Instant::now() + REST_WITHIN;
    let mut reason = String::from("nothing was looked at");
    while Instant::now() < until {
        world.drive(tokio::time::sleep(LOOK)).await;
        if journal.violation().is_some() || journal::panicked().is_some() {
            return None;
        }
        let regions = match settle::rests(world) {
            Ok(regions) => regions,
            Err(why) => {
                journal.note("settle", &why);
                reason = why;
                continue;
            }
        };
        let asking = async {
            let placement = connect(&around, host).await;
            placement.scan_regions(&esker_model::KeyRange::all(), 1_000).await
        };
        let known = world.drive(tokio::time::timeout(Duration::from_secs(5), asking)).await;
        let agreed = match known {
            Ok(Ok(known)) => settle::agrees(&regions, &known),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err("placement does not answer".into()),
        };
        match agreed {
            Ok(()) if settle::rests(world).as_ref() == Ok(&regions) => return Some(regions),
            Ok(()) => reason = "it moves on".into(),
            Err(why) => reason = why,
        }
    }
    let what = format!("{reason}\n{}", world.describe().await);
    journal.violated("the cluster comes to rest", what);
    None
}

/// The files of snapshots go when these are installed or not wanted.
async fn no_files_stay(world: &mut World, journal: &Journal) {
    let until = Instant::now() + REST_WITHIN;
    while let Err(what) = settle::has_no_files_of_snapshots(world) {
        if Instant::now() >= until {
            journal.violated("nothing is left over", what);
            return;
        }
        world.drive(tokio::time::sleep(CLEANED)).await;
    }
}

/// Every key can be written and read.
async fn serve(world: &mut World, journal: &Journal) {
    let around = world.around.clone();
    let history = around.history.clone();
    let keys: Vec<_> = {
        let mut history = history.lock();
        (0..history.places()).map(|place| history.key(place)).collect()
    };
    let serving = async {
        let placement = connect(&around, Host(CLIENTS + 92)).await;
        let client = KvClient::new(placement, []).with_deadline(Duration::from_secs(10));
        for key in keys {
            use crate::history::Operation::{Read, Write};
            let value = history.lock().fresh_value();
            let (write, read) = {
                let mut history = history.lock();
                (history.begin(&key, Write(Some(value))), history.begin(&key, Read(None)))
            };
            let found = async {
                let before = client.get(key.clone()).await?;
                client.put(key.clone(), encode(value)).await?;
                Ok::<_, esker_client::ClientError>(before)
            };
            match found.await {
                Ok(before) => {
                    let before = before.as_deref().and_then(crate::history::decode);
                    let mut history = history.lock();
                    if let Some(read) = read {
                        history.finish(read, Read(before));
                    }
                    if let Some(write) = write {
                        history.finish(write, Write(Some(value)));
                    }
                }
                Err(error) => {
                    let what = format!("{}: {error}", text(&key));
                    journal.violated("every key is served again", what);
                }
            }
        }
    };
    world.drive(serving).await;
}

/// Reads every key that was ever written, also under names that are no longer in use, one by one
/// and all at once.
async fn read_all(world: &mut World, journal: &Journal) {
    let around = world.around.clone();
    let history = around.history.clone();
    let reading = async {
        use crate::history::Operation::Read;
        let placement = connect(&around, Host(CLIENTS + 93)).await;
        let client = KvClient::new(placement, []).with_deadline(Duration::from_secs(10));
        let keys = history.lock().keys();
        let mut seen = BTreeMap::new();
        for key in keys {
            let Some(ticket) = history.lock().begin_last_read(&key) else { continue };
            match client.get(key.clone()).await {
                Ok(found) => {
                    let value = found.as_deref().map(crate::history::decode);
                    if value == Some(None) {
                        let what =
                            format!("{} is {:?}", text(&key), found.map(|found| text(&found)));
                        journal.violated("a value is what somebody wrote", what);
                        return;
                    }
                    history.lock().finish(ticket, Read(value.flatten()));
                    seen.extend(found.map(|found| (key.clone(), found)));
                }
                Err(error) => {
                    let what = format!("{}: {error}", text(&key));
                    journal.violated("every key is served again", what);
                    return;
                }
            }
        }
        let limit = u32::try_from(seen.len()).unwrap_or(u32::MAX).saturating_add(1);
        match client.scan(Bytes::new(), Bytes::from_static(EXPIRING), limit).await {
            Ok(pairs) if pairs.iter().map(|(key, value)| (key, value)).eq(seen.iter()) => {}
            Ok(pairs) => {
                let what = format!("{} pairs, and one by one {}", pairs.len(), seen.len());
                journal.violated("a scan of all keys has what they have", what);
            }
            Err(error) => journal.violated("every key is served again", error.to_string()),
        }
    };
    world.drive(reading).await;
}
