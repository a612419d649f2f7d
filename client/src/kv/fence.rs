//! What makes it safe to send a write again, and what is known of a write that was sent.
//!
//! An attempt whose outcome is unknown may be applied at any time: before the next attempt, after
//! it, or after other writes that came later. So all attempts of one write carry one tag, and the
//! region remembers the tags of the writes that it applied. It carries out the first attempt that
//! it meets and no other. Where it no longer remembers everything that was applied since the tag's
//! *horizon*, it refuses. The horizon is an index of the region's log that had been applied before
//! the first attempt was sent. The write can be in the log only behind the horizon.
//!
//! Horizons come with the answers to tagged writes and with that refusal. So a client that writes
//! to a region knows a fresh horizon. Without one, 0 is enough until the region has forgotten
//! something.
//!
//! Three things end a write with [`ClientError::OutcomeUnknown`] instead of another attempt:
//!
//! - a store that does not remember writes;
//! - a region that has forgotten too much;
//! - a split that put the key into a new region. Its log is its own, so its indexes are not
//!   comparable, and it does not know what its parent applied.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};

use esker_model::RegionId;
use esker_mutants::broken;
use esker_rpc::display_key;
use esker_rpc::proto::kvrpcpb::WriteTag;
use parking_lot::RwLock;

use super::cache::MAX_CACHED_REGIONS;
use crate::error::ClientError;

/// The source of a client's tags.
pub(super) struct Tags {
    client: u64,
    next: AtomicU64,
    /// For each region, an index that its log has applied. A region's log goes on through its
    /// splits, and its id is never given to another region.
    horizons: RwLock<HashMap<RegionId, AtomicU64>>,
}

impl Default for Tags {
    fn default() -> Self {
        Tags { client: rand::random(), next: AtomicU64::new(1), horizons: RwLock::default() }
    }
}

impl Tags {
    fn horizon(&self, region: RegionId) -> u64 {
        self.horizons.read().get(&region).map_or(0, |known| known.load(Ordering::Relaxed))
    }

    /// Notes an answer of the region that its log has been applied up to this index.
    pub(super) fn learn(&self, region: RegionId, index: u64) {
        if index == 0 {
            return;
        }
        if let Some(known) = self.horizons.read().get(&region) {
            known.fetch_max(index, Ordering::Relaxed);
            return;
        }
        let mut horizons = self.horizons.write();
        if horizons.len() >= MAX_CACHED_REGIONS {
            // A horizon that is needed comes back, at the cost of a refusal for each region.
            horizons.clear();
        }
        horizons.entry(region).or_default().fetch_max(index, Ordering::Relaxed);
    }
}

/// The state of one write over all its attempts. Each attempt makes the same changes to one region.
#[derive(Debug, Default)]
pub(super) struct Fence {
    /// Drawn when the write is sent first, because reads need none.
    sequence: Option<u64>,
    /// The region that the write was sent to, and the horizon that went with it.
    first: Option<(RegionId, u64)>,
    /// Why the outcome of an attempt is not known.
    unknown: Option<String>,
}

impl Fence {
    /// The tag for the next attempt; `None` where the attempt would not be recognised as the same
    /// write.
    pub(super) fn tag(&mut self, tags: &Tags, region: RegionId) -> Option<WriteTag> {
        let (_, horizon) = match self.first {
            Some(first) if first.0 == region => first,
            Some(_) if self.unknown.is_some() => return None,
            // Earlier attempts had no effect and never will.
            _ => *self.first.insert((region, tags.horizon(region))),
        };
        if broken!(AttemptsShareOneTag) {
            self.sequence = None;
        }
        let sequence =
            *self.sequence.get_or_insert_with(|| tags.next.fetch_add(1, Ordering::Relaxed));
        Some(WriteTag { client: tags.client, sequence, horizon })
    }

    /// Notes that an attempt may have been applied, or may be applied later.
    pub(super) fn lost_sight(&mut self, reason: String) {
        self.unknown = Some(reason);
    }

    /// Notes that the region did not apply the write, and needs a fresher horizon.
    pub(super) fn renew(&mut self) {
        self.first = None;
    }

    /// Why it is not known whether the write happened; `None` if it is known.
    pub(super) fn unknown(&self) -> Option<&str> {
        self.unknown.as_deref()
    }

    /// The error of a call that ends with `error`. That is the outcome only if nothing can have
    /// happened.
    pub(super) fn conclude(
        &self,
        call: &'static str,
        key: &[u8],
        error: ClientError,
    ) -> ClientError {
        match self.unknown {
            Some(_) if !broken!(UnknownWriteEndsAsUnknown) => unknown(call, key, error),
            _ => error,
        }
    }
}

/// The outcome of a call that ends with `error` after something may have happened.
pub(super) fn unknown(call: &'static str, key: &[u8], error: ClientError) -> ClientError {
    let reason = match error {
        ClientError::OutcomeUnknown { .. } => return error,
        ClientError::Deadline { waited, reason, .. } => {
            format!("gave up after {waited:?}: {reason}")
        }
        other => other.to_string(),
    };
    ClientError::OutcomeUnknown { call, key: display_key(key), reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_repetition_keeps_its_tag_and_its_horizon_whatever_was_learnt_meanwhile() {
        let tags = Tags::default();
        tags.learn(RegionId(7), 40);
        let mut fence = Fence::default();
        let first = fence.tag(&tags, RegionId(7)).expect("a tag");
        assert_eq!(first.horizon, 40);
        tags.learn(RegionId(7), 90);
        tags.learn(RegionId(7), 60);
        fence.lost_sight("cut off".into());
        assert_eq!(fence.tag(&tags, RegionId(7)), Some(first));
        let next = Fence::default().tag(&tags, RegionId(7)).expect("a tag");
        assert_eq!((next.client, next.horizon), (first.client, 90), "horizons only grow");
        assert_ne!(next.sequence, first.sequence);
    }

    #[test]
    fn a_horizon_is_never_used_for_another_region() {
        let tags = Tags::default();
        tags.learn(RegionId(7), 40);
        let mut fence = Fence::default();
        assert_eq!(fence.tag(&tags, RegionId(7)).map(|tag| tag.horizon), Some(40));
        assert_eq!(
            fence.tag(&tags, RegionId(8)).map(|tag| tag.horizon),
            Some(0),
            "nothing is known of it"
        );
        fence.lost_sight("cut off".into());
        assert_eq!(fence.tag(&tags, RegionId(7)), None, "region 8 may have applied it");
        assert!(fence.tag(&tags, RegionId(8)).is_some());
    }

    #[test]
    fn a_call_that_may_have_happened_does_not_end_as_if_it_had_not() {
        let deadline = || ClientError::Deadline {
            call: "put",
            key: "a".into(),
            waited: std::time::Duration::from_millis(300),
            reason: "region 1: it has no leader".into(),
        };
        let mut fence = Fence::default();
        let error = fence.conclude("put", b"a", deadline());
        assert!(matches!(error, ClientError::Deadline { .. }), "{error}");
        fence.lost_sight("cut off".into());
        assert_eq!(
            fence.conclude("put", b"a", deadline()).to_string(),
            "put of key a may or may not have happened (gave up after 300ms: region 1: it has no \
             leader): read the key before trying again"
        );
    }
}
