//! Why a command failed: one line, with what to do next.

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use esker_client::ClientError;
use esker_model::{RegionId, StoreId};

use super::key::Text;

/// The error of a command that was refused or failed. Wrong usage is reported earlier.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    #[error("cannot start the runtime: {0}; the system may be out of threads or file handles")]
    Runtime(#[source] io::Error),
    #[error("cannot write to standard output: {0}")]
    Output(#[source] io::Error),
    #[error("{variable} is no filter for the log: {reason}; write something like info,esker=debug")]
    Log { variable: &'static str, reason: String },
    /// An error of the servers, whose message contains what to do.
    #[error("{0}")]
    Server(Box<dyn std::error::Error + Send + Sync>),
    #[error(
        "cannot reach the placement driver: {0}; start a cluster with `esker playground`, \
         or name one with --placement HOST:PORT"
    )]
    Connect(ClientError),
    /// The same, where the caller named the members of a cluster.
    #[error(
        "cannot reach the placement driver: {error}; it answers while most of its members run: of \
         the {members} named, start those that do not"
    )]
    ConnectToMost { error: ClientError, members: usize },
    /// An error of a client, which names the request and the key.
    #[error("{error}{advice}", error = .0, advice = advice(.0))]
    Client(ClientError),
    #[error("no region covers the key `{0}`: the cluster has not been bootstrapped; start a store")]
    NoRegionFor(Text),
    #[error("there is no store {0}: `esker store list` shows those that exist")]
    NoSuchStore(StoreId),
    #[error(
        "the key `{key}` does not split region {region}: a split key lies after the region's start {}{}",
        bound(.start), before(.end)
    )]
    KeyOutside { region: RegionId, key: Text, start: Text, end: Text },
    #[error("the key `{0}` is given twice")]
    KeyTwice(Text),
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
    #[error(
        "the benchmark ended early, because {reason}: what it measured until then is above; the \
         first error: {first}"
    )]
    CutShort { reason: String, first: String },
    #[error("cannot reach {system}: {reason}; name its members with --placement HOST:PORT,...")]
    NoTarget { system: &'static str, reason: String },
    #[error("--target rocksdb needs a directory for its data: name one with --dir")]
    NoDirectory,
    #[error("cannot open RocksDB in {path}: {reason}", path = .path.display())]
    RocksDb { path: PathBuf, reason: String },
    #[cfg(not(feature = "tikv-target"))]
    #[error(
        "this program was built without TiKV's client: build one with `cargo build --features \
         tikv-target`"
    )]
    WithoutTikv,
    #[error(
        "{records} records of {size} bytes need {needed} on disk, and {place} has {free} free: \
         choose fewer --records or a smaller --value-size"
    )]
    DiskTooSmall { records: u64, size: u64, needed: String, place: String, free: String },
    #[error("there is no key `{0}`")]
    NoSuchKey(Text),
    #[error("{errors} of {operations} operations failed; the first one: {first}")]
    Benchmark { errors: u64, operations: u64, first: String },
}

/// The exit status if what was looked for is not there.
const NOT_THERE: u8 = 3;

impl CliError {
    /// What the process ends with.
    pub fn exit_code(&self) -> ExitCode {
        match self {
            CliError::NoSuchKey(_) => ExitCode::from(NOT_THERE),
            _ => ExitCode::FAILURE,
        }
    }

    /// Whether the reader of standard output went away, as `head` does.
    pub fn is_broken_pipe(&self) -> bool {
        matches!(self, CliError::Output(error) if error.kind() == io::ErrorKind::BrokenPipe)
    }
}

/// Errors for which the commands have a message of their own have a variant of their own.
impl From<ClientError> for CliError {
    fn from(error: ClientError) -> Self {
        match error {
            ClientError::NoStore { store } => CliError::NoSuchStore(store),
            ClientError::KeyOutside { region, key, start, end } => {
                CliError::KeyOutside { region, key: Text(key), start: Text(start), end: Text(end) }
            }
            error => CliError::Client(error),
        }
    }
}

/// What to do, if the client's own message leaves that open.
fn advice(error: &ClientError) -> String {
    match error {
        ClientError::Deadline { .. } => {
            "; look at `esker store list` and `esker region list`".into()
        }
        ClientError::PlacementUnreachable { .. } | ClientError::PlacementRefused { .. } => {
            "; look at `esker placement members` and try again".into()
        }
        ClientError::NoSuchRegion { .. } => ": `esker region list` shows those that exist".into(),
        ClientError::NotTransferred { region, .. } => {
            format!(": look at `esker region show {region}` and try again")
        }
        ClientError::RegionRefused { region, .. } => {
            format!("; look at `esker region show {region}` and try again")
        }
        ClientError::NoAnswer { .. } | ClientError::ReplicaDown { .. } => {
            "; look at `esker store list`".into()
        }
        _ => String::new(),
    }
}

fn bound(bound: &Text) -> String {
    // As in the tables, because a person could not read every bound.
    format!("`{}`", bound.bound())
}

fn before(end: &Text) -> String {
    if end.0.is_empty() { String::new() } else { format!(" and before its end {}", bound(end)) }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn shown(error: ClientError) -> String {
        CliError::from(error).to_string()
    }

    #[test]
    fn what_does_not_exist_is_named() {
        let text = shown(ClientError::NoSuchRegion { region: RegionId(9) });
        assert!(text.starts_with("there is no region 9: "), "{text}");
        let text = shown(ClientError::NoStore { store: StoreId(9) });
        assert!(text.starts_with("there is no store 9: "), "{text}");
        let text = shown(ClientError::NoReplica {
            region: RegionId(2),
            store: StoreId(4),
            replicas: [1, 2, 3].map(StoreId).to_vec(),
        });
        assert!(text.ends_with("choose one of 1, 2, 3"), "{text}");
    }

    #[test]
    fn a_split_key_outside_the_region_is_refused_with_its_range() {
        let (key, start, end) = (Bytes::from("a"), Bytes::from("g"), Bytes::new());
        let text = shown(ClientError::KeyOutside { region: RegionId(2), key, start, end });
        assert!(text.contains("region 2") && text.ends_with("start `g`"), "{text}");
    }

    #[test]
    fn a_refusal_says_where_to_look() {
        let reason = "no room".to_owned();
        let text = shown(ClientError::RegionRefused { region: RegionId(2), reason });
        assert_eq!(text, "region 2 refused: no room; look at `esker region show 2` and try again");
    }
}
