//! `esker region`: what covers the key space, and changes that an operator makes to it.

mod detail;

use std::time::Duration;

use clap::{Args, Subcommand};
use esker_raftstore::config::KEYS_TOP;
use esker_rpc::proto::{errorpb, esker as wire};
use tokio::time::{Instant, sleep};

use super::cluster::{Cluster, ClusterArguments};
use super::error::CliError;
use super::key::Text;
use super::output::{print, print_json};
use super::view::{RegionView, region_table};

/// The most parts of one split: each costs a region id and peers from placement.
const MAX_PARTS: i64 = 128;

/// How often a change is sent to the leader that the placement driver names, when the
/// store answers that it does not lead, or that the region has changed since.
const CHANGE_ATTEMPTS: usize = 20;

/// Between two looks at something that is about to change.
const LOOK_AGAIN: Duration = Duration::from_millis(150);

/// How long a transfer of leadership may take: some election timeouts.
const TRANSFER_DEADLINE: Duration = Duration::from_secs(10);

/// Shows and changes regions, the ranges of keys that are replicated together
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  esker region list")]
pub struct RegionArguments {
    #[command(flatten)]
    cluster: ClusterArguments,
    #[command(subcommand)]
    command: RegionCommand,
}

#[derive(Debug, Subcommand)]
enum RegionCommand {
    /// Lists all regions in the order of their keys
    #[command(after_help = "Example:\n  esker region list --json")]
    List,
    /// Shows one region and how far each of its replicas has come
    #[command(after_help = "Example:\n  esker region show 2")]
    Show {
        /// The region
        #[arg(value_name = "ID", allow_negative_numbers = true, value_parser = id)]
        id: u64,
    },
    /// Shows the region that covers a key
    #[command(after_help = "Example:\n  esker region key 'user42\\x00'")]
    Key {
        /// The key, with \xNN for bytes that cannot be typed
        #[arg(value_name = "KEY", allow_hyphen_values = true)]
        key: Text,
    },
    /// Splits a region, at the keys given or into parts of about equal size
    #[command(
        after_help = "Examples:\n  esker region split 2 --key g --key p\n  esker region split 2 --parts 4"
    )]
    Split {
        /// The region
        #[arg(value_name = "ID", allow_negative_numbers = true, value_parser = id)]
        id: u64,
        /// Where a new region starts; may be given more than once
        #[arg(long = "key", value_name = "KEY", allow_hyphen_values = true)]
        keys: Vec<Text>,
        /// How many regions there are to be afterwards [default: 2]
        #[arg(long, value_name = "N", conflicts_with = "keys", allow_negative_numbers = true,
              value_parser = clap::value_parser!(u32).range(2..=MAX_PARTS))]
        parts: Option<u32>,
    },
    /// Makes the replica on another store the leader of a region
    #[command(after_help = "Example:\n  esker region transfer-leader 2 --to 3")]
    TransferLeader {
        /// The region
        #[arg(value_name = "ID", allow_negative_numbers = true, value_parser = id)]
        id: u64,
        /// The store whose replica is to lead
        #[arg(long, value_name = "STORE", allow_negative_numbers = true, value_parser = id)]
        to: u64,
    },
}

/// Of a region or a store.
fn id(typed: &str) -> Result<u64, String> {
    typed.parse().map_err(|_| {
        "an id is a number, as `esker region list` and `esker store list` show them".to_owned()
    })
}

impl RegionArguments {
    pub async fn execute(self) -> Result<(), CliError> {
        let json = self.cluster.json;
        let cluster = Cluster::connect(&self.cluster).await?;
        match self.command {
            RegionCommand::List => print_regions(&cluster.regions().await?, json),
            RegionCommand::Key { key } => print_regions(&[cluster.region_of(&key).await?], json),
            RegionCommand::Show { id } => {
                let detail = detail::detail(&cluster, cluster.region(id).await?).await;
                if json { print_json(&detail) } else { print(&detail.text()) }
            }
            RegionCommand::Split { id, keys, parts } => {
                print_regions(&split(&cluster, id, &keys, parts.unwrap_or(2)).await?, json)
            }
            RegionCommand::TransferLeader { id, to } => {
                transfer_leader(&cluster, id, to, TRANSFER_DEADLINE).await?;
                print_regions(&[cluster.region(id).await?], json)
            }
        }
    }
}

fn print_regions(regions: &[RegionView], json: bool) -> Result<(), CliError> {
    if json { print_json(&regions) } else { print(&region_table(regions)) }
}

async fn split(
    cluster: &Cluster,
    id: u64,
    keys: &[Text],
    parts: u32,
) -> Result<Vec<RegionView>, CliError> {
    for _ in 0..CHANGE_ATTEMPTS {
        let region = cluster.region(id).await?;
        check_split_keys(&region, keys)?;
        let Some(leader) = region.leader.clone() else {
            sleep(LOOK_AGAIN).await;
            continue;
        };
        let request = wire::SplitRegionRequest {
            region_id: id,
            region_epoch: Some(region.region_epoch()),
            parts: if keys.is_empty() { parts } else { 0 },
            keys: keys.iter().map(|key| key.0.clone()).collect(),
        };
        let answer = cluster.admin(leader.store).await?.split_region(request).await?;
        match answer.region_error {
            None => {
                return Ok(answer
                    .regions
                    .into_iter()
                    .map(|region| RegionView::new(region, None))
                    .collect());
            }
            Some(error) => look_again_or_refuse(id, error).await?,
        }
    }
    Err(CliError::NoLeader(id))
}

/// A key outside is the caller's mistake only as long as the region is what it was.
fn check_split_keys(region: &RegionView, keys: &[Text]) -> Result<(), CliError> {
    if region.start_key.0 >= KEYS_TOP[..] {
        return Err(CliError::TopRegion(region.id));
    }
    let is_twice = |(at, key): &(usize, &Text)| keys[..*at].contains(key);
    if let Some((_, key)) = keys.iter().enumerate().find(is_twice) {
        return Err(CliError::KeyTwice(key.clone()));
    }
    match keys.iter().find(|key| !region.is_split_by(&key.0)) {
        None => Ok(()),
        Some(key) => Err(CliError::KeyOutside {
            region: region.id,
            key: key.clone(),
            start: region.start_key.clone(),
            end: region.end_key.clone(),
        }),
    }
}

/// Waits where the placement driver's view was only old; gives up on anything else.
async fn look_again_or_refuse(region: u64, error: errorpb::Error) -> Result<(), CliError> {
    if !is_outdated_view(&error) {
        return Err(CliError::Refused { region, reason: error.message });
    }
    sleep(LOOK_AGAIN).await;
    Ok(())
}

/// The command was not executed, and may be when sent to the leader of now.
fn is_outdated_view(error: &errorpb::Error) -> bool {
    error.not_leader.is_some()
        || error.epoch_not_match.is_some()
        || error.region_not_found.is_some()
        || error.stale_command.is_some()
}

/// Asks the leader until the one on store `to` leads, or until `patience` ends.
async fn transfer_leader(
    cluster: &Cluster,
    id: u64,
    to: u64,
    patience: Duration,
) -> Result<(), CliError> {
    let deadline = Instant::now() + patience;
    while Instant::now() < deadline {
        let region = cluster.region(id).await?;
        check_replica(cluster, &region, to).await?;
        let Some(leader) = region.leader.clone() else {
            sleep(LOOK_AGAIN).await;
            continue;
        };
        if leader.store == to {
            return Ok(());
        }
        let request = wire::TransferLeaderRequest {
            region_id: id,
            region_epoch: Some(region.region_epoch()),
            to_store: to,
        };
        let answer = cluster.admin(leader.store).await?.transfer_leader(request).await?;
        match answer.region_error {
            None => sleep(LOOK_AGAIN).await,
            Some(error) => look_again_or_refuse(id, error).await?,
        }
    }
    Err(CliError::NotTransferred { region: id, store: to, patience })
}

async fn check_replica(cluster: &Cluster, region: &RegionView, store: u64) -> Result<(), CliError> {
    let replicas: Vec<_> = region.peers.iter().map(|peer| peer.store).collect();
    if replicas.contains(&store) {
        return Ok(());
    }
    cluster.address(store).await?;
    Err(CliError::NoReplica { region: region.id, store, replicas })
}

#[cfg(test)]
mod tests;
