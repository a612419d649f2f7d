//! How a raw value is stored: one byte of flags, an optional expiry, the user's bytes.
//!
//! ```text
//! flags: u8 | expires_at: u64 big-endian, seconds since the epoch (only if flags & 1) | value
//! ```
//!
//! The flags byte is there even without an expiry, so that a value written by a
//! client without a time to live is never mistaken for one with.

use bytes::{BufMut, Bytes, BytesMut};

const HAS_EXPIRY: u8 = 1;
const EXPIRY_BYTES: usize = 8;

/// A raw value as the user knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RawValue {
    pub value: Bytes,
    /// Seconds since the epoch at which the value ceases to exist.
    pub expires_at: Option<u64>,
}

/// Stored bytes that are no raw value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("stored raw value is malformed")]
pub struct MalformedRawValue;

impl RawValue {
    pub fn new(value: Bytes, expires_at: Option<u64>) -> Self {
        RawValue { value, expires_at }
    }

    pub fn encode(&self) -> Bytes {
        let mut out = BytesMut::with_capacity(1 + EXPIRY_BYTES + self.value.len());
        match self.expires_at {
            Some(at) => {
                out.put_u8(HAS_EXPIRY);
                out.put_u64(at);
            }
            None => out.put_u8(0),
        }
        out.put_slice(&self.value);
        out.freeze()
    }

    /// Reads a stored value without copying the user's bytes.
    ///
    /// # Errors
    /// When the bytes were not written by [`RawValue::encode`].
    pub fn decode(stored: Bytes) -> Result<Self, MalformedRawValue> {
        match stored.first() {
            Some(&0) => Ok(RawValue::new(stored.slice(1..), None)),
            Some(&HAS_EXPIRY) if stored.len() > EXPIRY_BYTES => {
                let at = stored[1..=EXPIRY_BYTES].try_into().map_err(|_| MalformedRawValue)?;
                Ok(RawValue::new(stored.slice(1 + EXPIRY_BYTES..), Some(u64::from_be_bytes(at))))
            }
            _ => Err(MalformedRawValue),
        }
    }

    /// Whether the value still exists at `now` (seconds since the epoch).
    pub fn is_live(&self, now: u64) -> bool {
        self.expires_at.is_none_or(|at| now < at)
    }

    /// Seconds left at `now`; zero when the value never expires.
    pub fn ttl(&self, now: u64) -> u64 {
        self.expires_at.map_or(0, |at| at.saturating_sub(now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_was_encoded_decodes_to_itself(value: Vec<u8>, expires_at: Option<u64>) {
            let raw = RawValue::new(value.into(), expires_at);
            prop_assert_eq!(RawValue::decode(raw.encode()), Ok(raw));
        }

        #[test]
        fn arbitrary_bytes_never_panic(stored: Vec<u8>) {
            let _ = RawValue::decode(stored.into());
        }
    }

    #[test]
    fn a_value_ends_at_its_expiry_and_not_before() {
        let raw = RawValue::new(Bytes::from_static(b"v"), Some(10));
        assert!(raw.is_live(9) && !raw.is_live(10));
        assert_eq!(raw.ttl(4), 6);
    }
}
