//! The column families of the key-value engine.

use std::fmt;

/// A column family. `Default`, `Lock` and `Write` hold users' data as TiKV lays
/// it out; `Meta` holds the store's own records about its regions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Cf {
    Default,
    Lock,
    Write,
    Meta,
}

impl Cf {
    pub const ALL: [Cf; 4] = [Cf::Default, Cf::Lock, Cf::Write, Cf::Meta];
    /// The families that hold users' data, so that a region's content is a
    /// range of each.
    pub const DATA: [Cf; 3] = [Cf::Default, Cf::Lock, Cf::Write];

    /// The name on disk and in the client protocol.
    pub fn name(self) -> &'static str {
        match self {
            Cf::Default => "default",
            Cf::Lock => "lock",
            Cf::Write => "write",
            Cf::Meta => "meta",
        }
    }

    /// The number that stands for the family in log entries and snapshots;
    /// never reassigned.
    pub fn number(self) -> u8 {
        match self {
            Cf::Default => 0,
            Cf::Lock => 1,
            Cf::Write => 2,
            Cf::Meta => 3,
        }
    }

    pub fn from_number(number: u32) -> Option<Cf> {
        Cf::ALL.into_iter().find(|cf| u32::from(cf.number()) == number)
    }
}

impl fmt::Display for Cf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
