//! Ranges of keys.

use std::fmt;

use bytes::Bytes;

/// The keys from `start` (included) to `end` (excluded), in the order of their bytes. Without an
/// end, every key from `start` on. Never empty.
///
/// ```
/// use esker_model::KeyRange;
///
/// let range = KeyRange::new("b".into(), Some("m".into()))?;
/// assert!(range.contains(b"b") && !range.contains(b"m"));
/// assert!(range.overlaps(&KeyRange::from("k".into())));
/// # Ok::<(), esker_model::EmptyRange>(())
/// ```
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub struct KeyRange {
    start: Bytes,
    /// Greater than `start`.
    end: Option<Bytes>,
}

/// A range that would hold no key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the range is empty: its end is not above its start")]
pub struct EmptyRange;

impl KeyRange {
    /// All keys.
    pub const fn all() -> KeyRange {
        KeyRange { start: Bytes::new(), end: None }
    }

    /// The keys from `start` up to `end`, or all from `start` on where `end` is `None`.
    ///
    /// # Errors
    /// [`EmptyRange`] when the end is not above the start. An empty end is such an end, and not "no
    /// end".
    pub fn new(start: Bytes, end: Option<Bytes>) -> Result<KeyRange, EmptyRange> {
        match &end {
            Some(end) if *end <= start => Err(EmptyRange),
            _ => Ok(KeyRange { start, end }),
        }
    }

    /// The keys from `start` on.
    pub const fn from(start: Bytes) -> KeyRange {
        KeyRange { start, end: None }
    }

    /// The first key that may be in the range. Empty where the range begins at the lowest key.
    pub fn start(&self) -> &Bytes {
        &self.start
    }

    /// The first key above the range; `None` where every higher key is in it.
    pub fn end(&self) -> Option<&Bytes> {
        self.end.as_ref()
    }

    /// Whether `key` is neither below the start, nor at or above the end.
    pub fn contains(&self, key: &[u8]) -> bool {
        *key >= *self.start && self.is_above(key)
    }

    /// Whether the range's end lies above `key`.
    pub fn is_above(&self, key: &[u8]) -> bool {
        self.end.as_ref().is_none_or(|end| *key < **end)
    }

    /// Whether the keys just below `bound` are in the range. `None` as a bound stands for the
    /// highest keys of all.
    pub fn contains_below(&self, bound: Option<&[u8]>) -> bool {
        match (bound, &self.end) {
            (None, end) => end.is_none(),
            (Some(bound), None) => *bound > *self.start,
            (Some(bound), Some(end)) => *bound > *self.start && *bound <= **end,
        }
    }

    /// Whether all of `other` lies in this range.
    pub fn contains_range(&self, other: &KeyRange) -> bool {
        other.start >= self.start
            && match (&self.end, &other.end) {
                (None, _) => true,
                (Some(_), None) => false,
                (Some(end), Some(other)) => other <= end,
            }
    }

    /// Whether some key is in both ranges.
    pub fn overlaps(&self, other: &KeyRange) -> bool {
        self.is_above(&other.start) && other.is_above(&self.start)
    }

    /// The keys that are in both ranges; `None` where there are none.
    pub fn intersection(&self, other: &KeyRange) -> Option<KeyRange> {
        let start = self.start.clone().max(other.start.clone());
        let end = match (&self.end, &other.end) {
            (None, end) | (end, None) => end.clone(),
            (Some(a), Some(b)) => Some(a.min(b).clone()),
        };
        KeyRange::new(start, end).ok()
    }

    /// The smallest range that holds both.
    pub fn spanning(&self, other: &KeyRange) -> KeyRange {
        let end = match (&self.end, &other.end) {
            (Some(a), Some(b)) => Some(a.max(b).clone()),
            _ => None,
        };
        KeyRange { start: self.start.clone().min(other.start.clone()), end }
    }

    /// The parts into which `keys` cut the range, in key order: one more than there are keys.
    /// `None` where a key does not lie inside the range, or the keys are not in ascending order.
    pub fn split_at(&self, keys: &[Bytes]) -> Option<Vec<KeyRange>> {
        let mut parts = Vec::with_capacity(keys.len() + 1);
        let mut start = self.start.clone();
        for key in keys {
            if *key <= start || !self.is_above(key) {
                return None;
            }
            parts.push(KeyRange { start, end: Some(key.clone()) });
            start = key.clone();
        }
        parts.push(KeyRange { start, end: self.end.clone() });
        Some(parts)
    }
}

impl fmt::Debug for KeyRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.end {
            Some(end) => write!(f, "[{:?}, {end:?})", self.start),
            None => write!(f, "[{:?}, ∞)", self.start),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: &str, end: &str) -> KeyRange {
        let end = (!end.is_empty()).then(|| Bytes::copy_from_slice(end.as_bytes()));
        KeyRange::new(Bytes::copy_from_slice(start.as_bytes()), end).unwrap()
    }

    #[test]
    fn a_range_without_a_key_is_refused() {
        let key = Bytes::from_static(b"k");
        assert_eq!(KeyRange::new(key.clone(), Some(key.clone())), Err(EmptyRange));
        assert_eq!(KeyRange::new(Bytes::new(), Some(Bytes::new())), Err(EmptyRange));
        assert!(KeyRange::new(key, None).is_ok());
    }

    #[test]
    fn ranges_without_an_end_contain_and_overlap_as_they_should() {
        let (all, low, high) = (KeyRange::all(), range("", "m"), range("m", ""));
        assert!(all.contains_range(&all) && all.overlaps(&range("x", "")));
        assert!(!low.contains_range(&range("a", "")) && low.contains_range(&range("a", "m")));
        assert!(!low.overlaps(&high) && low.overlaps(&range("l", "m")));
        assert!(!low.contains(b"m") && low.contains(b"") && high.contains(b"m"));
    }

    #[test]
    fn a_bound_is_the_end_of_the_range_whose_keys_lie_just_below_it() {
        let (low, high) = (range("b", "m"), range("m", ""));
        assert!(low.contains_below(Some(b"m")) && !high.contains_below(Some(b"m")));
        assert!(high.contains_below(None) && !low.contains_below(None));
        assert!(!low.contains_below(Some(b"b")));
    }

    #[test]
    fn a_range_is_cut_at_keys_inside_of_it_only() {
        let keys = |keys: &[&'static str]| -> Vec<Bytes> {
            keys.iter().map(|key| Bytes::from_static(key.as_bytes())).collect()
        };
        let all = KeyRange::all();
        let parts = all.split_at(&keys(&["g", "m"])).unwrap();
        assert_eq!(parts, [range("", "g"), range("g", "m"), range("m", "")]);
        for wrong in [&["g", "g"][..], &["m", "g"], &[""]] {
            assert_eq!(all.split_at(&keys(wrong)), None, "{wrong:?}");
        }
        assert_eq!(range("b", "d").split_at(&keys(&["b"])), None);
        assert_eq!(range("b", "d").split_at(&keys(&["d"])), None);
    }

    #[test]
    fn what_two_ranges_share_and_span() {
        let (a, b) = (range("b", "m"), range("g", ""));
        assert_eq!(a.intersection(&b), Some(range("g", "m")));
        assert_eq!(a.spanning(&b), range("b", ""));
        assert_eq!(range("a", "b").intersection(&range("b", "c")), None);
    }
}
