//! Why a command did not do what it was asked to: one line, with what to do next.

use std::io;
use std::time::Duration;

use esker_client::ClientError;

use super::key::Text;

/// A command that was refused or failed. Wrong usage never comes this far.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    #[error("cannot start the runtime: {0}; the system may be out of threads or file handles")]
    Runtime(#[source] io::Error),
    #[error("cannot write to standard output: {0}")]
    Output(#[source] io::Error),
    #[error("{variable} is no filter for the log: {reason}; write something like info,esker=debug")]
    Log { variable: &'static str, reason: String },
    /// Of the servers; they say what to do themselves.
    #[error("{0}")]
    Server(Box<dyn std::error::Error + Send + Sync>),
    #[error(
        "cannot reach the placement driver: {0}; start a cluster with `esker playground`, \
         or name one with --placement HOST:PORT"
    )]
    Connect(ClientError),
    /// Of a client, which names the request and the key.
    #[error("{error}{advice}", error = .0, advice = advice(.0))]
    Client(#[from] ClientError),
    #[error("there is no region {0}: `esker region list` shows those that exist")]
    NoSuchRegion(u64),
    #[error("no region covers the key `{0}`: the cluster has not been bootstrapped; start a store")]
    NoRegionFor(Text),
    #[error(
        "region {0} has no leader that the placement driver knows of: wait for an election, or start more stores"
    )]
    NoLeader(u64),
    #[error("there is no store {0}: `esker store list` shows those that exist")]
    NoSuchStore(u64),
    #[error("store {store} has no replica of region {region}: choose one of {}", list(.replicas))]
    NoReplica { region: u64, store: u64, replicas: Vec<u64> },
    #[error(
        "leadership of region {region} did not come to store {store} within {patience:?}: \
         look at `esker region show {region}` and try again"
    )]
    NotTransferred { region: u64, store: u64, patience: Duration },
    #[error(
        "the key `{key}` does not split region {region}: a split key lies after the region's start {}{}",
        bound(.start), before(.end)
    )]
    KeyOutside { region: u64, key: Text, start: Text, end: Text },
    #[error("region {0} lies above all keys and stays empty: it cannot be split")]
    TopRegion(u64),
    #[error("the key `{0}` is given twice")]
    KeyTwice(Text),
    #[error("store {store} at {address} did not answer: {reason}; look at `esker store list`")]
    Store { store: u64, address: String, reason: String },
    #[error(
        "region {region} refused: {reason}; look at `esker region show {region}` and try again"
    )]
    Refused { region: u64, reason: String },
    #[error("the member was not replaced: {0}")]
    NotReplaced(String),
    #[error("no key lies from `{from}` up to `{to}`: a range begins with its smaller key")]
    EmptyRange { from: Text, to: Text },
    #[error(
        "a record of {size} bytes is more than a store takes in one write ({limit} bytes): \
         choose a smaller --value-size or fewer --fields"
    )]
    LargeRecord { size: u64, limit: u64 },
    #[error(
        "{batch} records of {size} bytes are more than one request may have ({limit} bytes): \
         choose a smaller --batch"
    )]
    LargeRequest { size: u64, batch: u64, limit: u64 },
    #[error("there is no key `{0}`")]
    NoSuchKey(Text),
    #[error("{errors} of {operations} operations failed; the first one: {first}")]
    Benchmark { errors: u64, operations: u64, first: String },
}

impl CliError {
    /// Whether the reader of standard output went away, as `head` does.
    pub fn is_broken_pipe(&self) -> bool {
        matches!(self, CliError::Output(error) if error.kind() == io::ErrorKind::BrokenPipe)
    }
}

/// What to do, where the client's own message leaves it open.
fn advice(error: &ClientError) -> &'static str {
    match error {
        ClientError::Deadline { .. } | ClientError::NoStore { .. } => {
            "; look at `esker store list` and `esker region list`"
        }
        ClientError::PlacementUnreachable { .. } | ClientError::PlacementRefused { .. } => {
            "; look at `esker placement members` and try again"
        }
        _ => "",
    }
}

fn list(stores: &[u64]) -> String {
    let names: Vec<_> = stores.iter().map(u64::to_string).collect();
    names.join(", ")
}

fn bound(bound: &Text) -> String {
    // As in the tables: a bound may be one that nobody could read.
    format!("`{}`", bound.bound())
}

fn before(end: &Text) -> String {
    if end.0.is_empty() { String::new() } else { format!(" and before its end {}", bound(end)) }
}
