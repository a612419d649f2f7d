//! The limits that more than one part of the system enforces. What one part refuses because of such
//! a limit, no other part accepts.

pub use esker_raft::MAX_PEERS;

/// The longest key that a client may use, in bytes: the same as TiKV's limit. The four bytes that
/// name a key space count, too.
pub const MAX_KEY_BYTES: usize = 8 << 10;
/// The longest memcomparable form of a client's key: one more byte for each eight, and up to nine.
const MAX_MEMCOMPARABLE_BYTES: usize = MAX_KEY_BYTES / 8 * 9 + 9;
/// The longest key that is stored: a key in its memcomparable form, and a version of eight bytes.
pub const MAX_STORED_KEY_BYTES: usize = MAX_MEMCOMPARABLE_BYTES + 8;
/// The longest bound of a range: the length of [`KEYS_TOP`], which is longer than any key.
pub const MAX_BOUND_BYTES: usize = KEYS_TOP.len();

/// A key above every key that can be stored. The last region begins here, and is empty for ever.
///
/// The published `tikv-client` 0.4 takes a region without an end for "go on at the beginning" when
/// its scan has an upper bound, and stops at the first region's end when its scan has none. With
/// this bound both are right: the region before it has an end, and nothing can be behind that end.
/// The bound is the memcomparable form of a key, because clients in a key space, and transactional
/// clients, decode the bounds of regions.
pub static KEYS_TOP: [u8; MAX_MEMCOMPARABLE_BYTES + 9] = {
    let mut top = [0xff; MAX_MEMCOMPARABLE_BYTES + 9];
    let mut at = MAX_MEMCOMPARABLE_BYTES;
    while at < top.len() - 1 {
        top[at] = 0;
        at += 1;
    }
    // A group of padding only, because the key's length is a multiple of eight.
    top[at] = 0xf7;
    top
};

/// The largest single write command, in bytes: its keys and values, and 32 bytes for each mutation.
pub const MAX_COMMAND_BYTES: usize = 8 << 20;
/// Keys of one split command.
pub const MAX_SPLIT_KEYS: usize = 256;

/// The highest id of a region, a store of data or a peer. Placement counts up from one.
pub const MAX_ID: u64 = u64::MAX >> 1;
/// The highest version or `conf_ver` that a region can have.
pub const MAX_EPOCH: u64 = 1 << 48;
/// How far another store's epoch of a region may be ahead of the known one. No region has so many
/// splits or changes of members while one of its stores is away.
pub const MAX_EPOCH_LEAP: u64 = 1 << 32;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_key_that_can_be_stored_reaches_the_top() {
        assert!([0xff; MAX_KEY_BYTES][..] < KEYS_TOP[..]);
        // The memcomparable form of the highest key, and whatever version follows it.
        let mut highest = vec![0xff; MAX_KEY_BYTES / 8 * 9];
        highest.extend([0; 8]);
        highest.push(0xf7);
        highest.extend([0xff; 8]);
        assert_eq!(highest.len(), MAX_STORED_KEY_BYTES);
        assert!(highest[..] < KEYS_TOP[..]);
        assert_eq!(KEYS_TOP.len() % 9, 0, "whole groups");
    }
}
