//! Ids above one Raft group. Placement hands them out and never gives one twice.
//!
//! The number inside is what tools print and what the protocol carries. 0 is no id.

use std::fmt;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub u64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

id!(
    /// A region: one range of keys and the Raft group that replicates it.
    RegionId
);
id!(
    /// A store: one data directory on one node.
    StoreId
);
id!(
    /// A member of the placement driver itself.
    MemberId
);
