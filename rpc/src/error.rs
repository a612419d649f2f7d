//! What a client of a cluster can fail with.

use std::time::{Duration, Instant};

use crate::proto::pdpb::ErrorType;
use crate::text::Printable;

/// Why a request did not succeed. Each message is one line that names what to look at.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ClientError {
    #[error("`{address}` is not an address: {reason}; write HOST:PORT")]
    Address { address: String, reason: String },

    #[error("no placement address was given; write HOST:PORT[,HOST:PORT...]")]
    NoEndpoints,

    #[error("no placement leader found at {endpoints} within {waited:?}: {reason}")]
    PlacementUnreachable { endpoints: String, waited: Duration, reason: String },

    #[error(
        "no placement driver at {endpoints}: what answers there is a node that runs no placement \
         member, or another program; give the addresses of the placement members"
    )]
    NoPlacement { endpoints: String },

    #[error("placement refused {call}: {message} ({kind:?})")]
    PlacementRefused { call: &'static str, kind: ErrorType, message: String },

    #[error("placement answered {call} with {problem}")]
    PlacementAnswer { call: &'static str, problem: &'static str },

    #[error(
        "{address} belongs to cluster {actual}, not to {expected}: check the placement addresses"
    )]
    ClusterMismatch { address: String, expected: u64, actual: u64 },

    #[error("no region holds key {key}: the cluster is not bootstrapped yet")]
    NoRegion { key: String },

    #[error("store {store} is not known to placement")]
    NoStore { store: u64 },

    #[error("{call} of key {key} gave up after {waited:?}: {reason}")]
    Deadline { call: &'static str, key: String, waited: Duration, reason: String },

    #[error(
        "{call} of key {key} may or may not have happened ({reason}): read the key before \
         trying again"
    )]
    OutcomeUnknown { call: &'static str, key: String, reason: String },

    #[error("store {store} refused {call} of key {key} in region {region}: {message}")]
    Refused { call: &'static str, key: String, region: u64, store: u64, message: String },

    #[error(
        "{call} is too large for one log entry of region {region} ({size} bytes): send less at once"
    )]
    TooLarge { call: &'static str, region: u64, size: u64 },

    #[error("the client has been shut down")]
    Closed,
}

/// How long it has been, without the digits that nobody reads.
pub(crate) fn waited_since(started: Instant) -> Duration {
    Duration::from_millis(u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX))
}

/// A key as text, as [`Printable`] has it.
pub fn display_key(key: &[u8]) -> String {
    /// Longer keys are cut: an error is one line.
    const SHOWN: usize = 64;
    if key.is_empty() {
        return "\"\"".into();
    }
    if key.len() <= SHOWN {
        return Printable(key).to_string();
    }
    // Not in the middle of a character, where it is one.
    let is_inside = |at: &usize| (0x80..0xC0).contains(&key[*at]);
    let cut = (SHOWN - 3..=SHOWN).rev().find(|at| !is_inside(at)).unwrap_or(SHOWN);
    format!("{}...", Printable(&key[..cut]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_in_an_error_is_text_and_not_too_long() {
        assert_eq!(display_key(b""), "\"\"");
        assert_eq!(display_key("clé\n".as_bytes()), "clé\\x0A");
        let long = "é".repeat(100);
        assert_eq!(display_key(long.as_bytes()), format!("{}...", "é".repeat(32)));
        let odd = format!("a{long}");
        assert_eq!(display_key(odd.as_bytes()), format!("a{}...", "é".repeat(31)));
        assert_eq!(display_key(&[0x80; 65]), format!("{}...", "\\x80".repeat(64)));
    }
}
