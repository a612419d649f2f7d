//! A small set of peers.

use std::fmt;

use crate::types::PeerId;

/// A sorted set of peers, in one allocation of exactly its size, or in none if it is empty. Memory
/// matters: a group holds several sets, and a node many thousands of groups. A set changes only
/// when members do, and is read all the time.
#[derive(Clone, PartialEq, Eq, Hash, Default)]
pub struct PeerSet(Box<[PeerId]>);

impl PeerSet {
    /// Whether the peer is one of them.
    #[must_use]
    #[inline]
    pub fn contains(&self, peer: &PeerId) -> bool {
        // For a few peers this is faster than a binary search.
        self.0.contains(peer)
    }

    /// The peers in rising order.
    #[must_use]
    pub fn as_slice(&self) -> &[PeerId] {
        &self.0
    }

    /// The peers in rising order.
    pub fn iter(&self) -> std::slice::Iter<'_, PeerId> {
        self.0.iter()
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Adds a peer. Returns whether it was not there.
    pub fn insert(&mut self, peer: PeerId) -> bool {
        let Err(at) = self.0.binary_search(&peer) else { return false };
        let mut peers = std::mem::take(&mut self.0).into_vec();
        peers.reserve_exact(1);
        peers.insert(at, peer);
        self.0 = peers.into_boxed_slice();
        true
    }

    /// Takes a peer out. Returns whether it was there.
    pub fn remove(&mut self, peer: &PeerId) -> bool {
        let there = self.contains(peer);
        self.retain(|other| other != peer);
        there
    }

    /// Keeps the peers for which `keep` holds.
    pub fn retain(&mut self, keep: impl Fn(&PeerId) -> bool) {
        if !self.0.iter().all(&keep) {
            *self = self.iter().copied().filter(|peer| keep(peer)).collect();
        }
    }
}

impl FromIterator<PeerId> for PeerSet {
    fn from_iter<I: IntoIterator<Item = PeerId>>(peers: I) -> Self {
        let mut peers: Vec<_> = peers.into_iter().collect();
        peers.sort_unstable();
        peers.dedup();
        PeerSet(peers.into_boxed_slice())
    }
}

impl<'a> IntoIterator for &'a PeerSet {
    type Item = &'a PeerId;
    type IntoIter = std::slice::Iter<'a, PeerId>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl fmt::Debug for PeerSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.iter().map(|peer| peer.0)).finish()
    }
}
