//! A point in the cluster's order of events, handed out by placement.

use std::fmt;

/// Bits of the logical part.
pub const LOGICAL_BITS: u32 = 18;
/// Timestamps within one millisecond.
pub const LOGICAL_LIMIT: u64 = 1 << LOGICAL_BITS;
/// The largest physical part that 64 bits hold.
pub const MAX_PHYSICAL: u64 = (1 << (64 - LOGICAL_BITS)) - 1;

/// One timestamp: milliseconds `<< 18 |` a counter within the millisecond.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(pub u64);

impl Timestamp {
    /// Puts the two parts together.
    ///
    /// # Panics
    /// When a part does not fit, because the result would be out of order.
    pub fn new(physical: u64, logical: u64) -> Self {
        assert!(
            physical <= MAX_PHYSICAL && logical < LOGICAL_LIMIT,
            "timestamp parts {physical}.{logical} do not fit into 46 and 18 bits"
        );
        Self(physical << LOGICAL_BITS | logical)
    }

    /// Milliseconds since the Unix epoch.
    pub fn physical(self) -> u64 {
        self.0 >> LOGICAL_BITS
    }

    /// The counter within the millisecond.
    pub fn logical(self) -> u64 {
        self.0 & (LOGICAL_LIMIT - 1)
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.physical(), self.logical())
    }
}
