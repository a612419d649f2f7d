//! Under which key a client's key is stored.
//!
//! Clients of API version 2 ask placement for the memcomparable form of a key, and expect the
//! bounds of regions in that form. But the keys in their requests are plain. So their keys are
//! stored in memcomparable form, and decoded for answers. Clients of version 1 see keys and bounds
//! as they are stored.

use bytes::Bytes;
use esker_model::limits::MAX_KEY_BYTES;
use esker_raftstore::RequestError;
use esker_rpc::proto::kvrpcpb::{ApiVersion, Context};

/// Bytes of a key that share one marker.
const GROUP: usize = 8;

/// How the keys of one request are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyLayout {
    Plain,
    Memcomparable,
}

impl KeyLayout {
    pub fn of(context: Option<&Context>) -> Self {
        match context.map(Context::api_version) {
            Some(ApiVersion::V2) => KeyLayout::Memcomparable,
            _ => KeyLayout::Plain,
        }
    }

    /// The key to store for a client's key.
    ///
    /// # Errors
    /// When the client's key is empty or too long.
    pub fn stored(self, key: &Bytes) -> Result<Bytes, RequestError> {
        if key.is_empty() {
            return Err(RequestError::EmptyKey);
        }
        if key.len() > MAX_KEY_BYTES {
            return Err(RequestError::KeyTooLarge { size: key.len(), limit: MAX_KEY_BYTES });
        }
        Ok(self.bound(key))
    }

    /// The stored form of a bound of a range, where an empty key means that there is no bound.
    pub fn bound(self, key: &Bytes) -> Bytes {
        match self {
            KeyLayout::Memcomparable if !key.is_empty() => memcomparable(key),
            _ => key.clone(),
        }
    }

    /// Returns the client's key for a stored one, or `None` where no key of a client is stored like
    /// that.
    pub fn of_client(self, stored: &[u8]) -> Option<Bytes> {
        match self {
            KeyLayout::Plain => Some(Bytes::copy_from_slice(stored)),
            KeyLayout::Memcomparable => plain(stored),
        }
    }
}

/// The memcomparable form of a key, which sorts as the key does. It has groups of eight bytes, each
/// followed by a marker for the number of padding bytes in the group.
pub fn memcomparable(key: &[u8]) -> Bytes {
    let mut out = Vec::with_capacity((key.len() / GROUP + 1) * (GROUP + 1));
    for at in (0..=key.len()).step_by(GROUP) {
        let group = &key[at..key.len().min(at + GROUP)];
        out.extend_from_slice(group);
        let pad = GROUP - group.len();
        out.resize(out.len() + pad, 0);
        out.push(0xFF - u8::try_from(pad).expect("at most eight"));
    }
    out.into()
}

/// The key whose memcomparable form `stored` is; `None` if it is not such a form.
fn plain(stored: &[u8]) -> Option<Bytes> {
    let (last, full) =
        stored.split_last_chunk::<{ GROUP + 1 }>().map(|(rest, last)| (last, rest))?;
    if full.len() % (GROUP + 1) != 0 {
        return None;
    }
    let mut key = Vec::with_capacity(stored.len());
    for group in full.chunks_exact(GROUP + 1) {
        if group[GROUP] != 0xFF {
            return None;
        }
        key.extend_from_slice(&group[..GROUP]);
    }
    let pad = usize::from(0xFF - last[GROUP]);
    let (rest, padding) = last[..GROUP].split_at(GROUP.checked_sub(pad)?);
    // A full last group is followed by one of padding only.
    if pad == 0 || padding.iter().any(|byte| *byte != 0) {
        return None;
    }
    key.extend_from_slice(rest);
    Some(key.into())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn memcomparable_keys_are_as_the_protocol_says() {
        assert_eq!(&memcomparable(b"")[..], b"\0\0\0\0\0\0\0\0\xf7");
        assert_eq!(&memcomparable(b"abc")[..], b"abc\0\0\0\0\0\xfa");
        assert_eq!(&memcomparable(b"12345678")[..], b"12345678\xff\0\0\0\0\0\0\0\0\xf7");
    }

    #[test]
    fn what_is_no_memcomparable_key_is_no_key_of_a_client() {
        for stored in [
            &b""[..],
            b"abc",
            b"abcd\0\0\0\0\xfa",
            b"abc\0\0\0\0\0\xff",
            b"abc\0\0\0\0\0\x01",
            b"abc\0\0\0\0\0\xfaabc\0\0\0\0\0\xfa",
            b"12345678\xff",
        ] {
            assert_eq!(KeyLayout::Memcomparable.of_client(stored), None, "{stored:?}");
        }
    }

    proptest! {
        #[test]
        fn memcomparable_keys_sort_as_the_keys_do_and_read_back(one: Vec<u8>, other: Vec<u8>) {
            prop_assert_eq!(memcomparable(&one).cmp(&memcomparable(&other)), one.cmp(&other));
            let back = KeyLayout::Memcomparable.of_client(&memcomparable(&one));
            prop_assert_eq!(back, Some(Bytes::from(one)));
        }

        #[test]
        fn whatever_is_stored_makes_no_panic(stored: Vec<u8>) {
            if let Some(key) = KeyLayout::Memcomparable.of_client(&stored) {
                prop_assert_eq!(&memcomparable(&key)[..], &stored[..]);
            }
        }
    }
}
