//! The client's view of the regions.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;

use bytes::Bytes;
use esker_model::{KeyRange, Peer, Region};
use parking_lot::RwLock;

/// Regions that are remembered.
pub const MAX_CACHED_REGIONS: usize = 1 << 16;

/// A region and the peer to send its requests to.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Route {
    pub(super) region: Region,
    pub(super) leader: Peer,
    /// Peers in a row that could not be reached since placement was last asked.
    pub(super) failures: usize,
}

impl Route {
    pub(super) fn contains(&self, key: &[u8]) -> bool {
        self.region.contains(key)
    }

    /// Whether keys just below `bound` belong to the region. An empty bound is above all keys.
    pub(super) fn contains_below(&self, bound: &[u8]) -> bool {
        self.region.range.contains_below((!bound.is_empty()).then_some(bound))
    }
}

/// Routes by start key. No two overlap.
#[derive(Default)]
pub(super) struct RegionCache {
    routes: RwLock<BTreeMap<Bytes, Arc<Route>>>,
}

impl RegionCache {
    /// The region that holds a key.
    pub(super) fn get(&self, key: &[u8]) -> Option<Arc<Route>> {
        let routes = self.routes.read();
        let (_, route) =
            routes.range::<[u8], _>((Bound::Unbounded, Bound::Included(key))).next_back()?;
        route.contains(key).then(|| Arc::clone(route))
    }

    /// The region that holds the keys just below a bound.
    pub(super) fn get_below(&self, bound: &[u8]) -> Option<Arc<Route>> {
        let routes = self.routes.read();
        let route = if bound.is_empty() {
            routes.values().next_back()?
        } else {
            routes.range::<[u8], _>((Bound::Unbounded, Bound::Excluded(bound))).next_back()?.1
        };
        route.contains_below(bound).then(|| Arc::clone(route))
    }

    /// Remembers a region in place of all that it overlaps. An older view of a region than the
    /// known one is ignored, because answers may overtake each other.
    pub(super) fn insert(&self, route: Route) -> Arc<Route> {
        let route = Arc::new(route);
        let mut routes = self.routes.write();
        let overlapping = overlapping(&routes, &route.region.range);
        let stale = overlapping.iter().any(|start| {
            let known = &routes[start];
            known.region.id == route.region.id
                && (known.region.epoch.version > route.region.epoch.version
                    || known.region.epoch.conf_ver > route.region.epoch.conf_ver)
        });
        if stale {
            return route;
        }
        for start in overlapping {
            routes.remove(&start);
        }
        if routes.len() >= MAX_CACHED_REGIONS {
            // Any region will do, as long as it is cheap to find. If it is needed, it comes back.
            routes.pop_first();
        }
        routes.insert(route.region.range.start().clone(), Arc::clone(&route));
        route
    }

    /// Forgets a route, unless a newer route has taken its place.
    pub(super) fn remove(&self, route: &Arc<Route>) {
        let mut routes = self.routes.write();
        let start = route.region.range.start();
        if routes.get(start).is_some_and(|known| Arc::ptr_eq(known, route)) {
            routes.remove(start);
        }
    }

    /// Sends a region's requests to another of its peers, unless the route has changed meanwhile.
    pub(super) fn set_leader(&self, route: &Arc<Route>, leader: Peer) {
        self.redirect(route, leader, 0);
    }

    /// Goes on to the next of a region's peers when a peer cannot be reached. Forgets the route
    /// after all peers have been tried.
    pub(super) fn try_next_peer(&self, route: &Arc<Route>) {
        let peers = &route.region.peers;
        let tried = peers.iter().position(|peer| peer.id == route.leader.id);
        match tried {
            Some(tried) if route.failures + 1 < peers.len() => {
                let next = peers[(tried + 1) % peers.len()];
                self.redirect(route, next, route.failures + 1);
            }
            _ => self.remove(route),
        }
    }

    fn redirect(&self, route: &Arc<Route>, leader: Peer, failures: usize) {
        let mut routes = self.routes.write();
        if let Some(known) = routes.get_mut(route.region.range.start())
            && Arc::ptr_eq(known, route)
        {
            let region = route.region.clone();
            *known = Arc::new(Route { region, leader, failures });
        }
    }
}

/// The start keys of all known regions that overlap this range.
fn overlapping(routes: &BTreeMap<Bytes, Arc<Route>>, range: &KeyRange) -> Vec<Bytes> {
    let end = range.end().map_or(Bound::Unbounded, |end| Bound::Excluded(end.as_ref()));
    routes
        .range::<[u8], _>((Bound::Unbounded, end))
        .rev()
        // Going down from the end, the first region that lies wholly below the range is the last.
        .take_while(|(_, known)| known.region.range.is_above(range.start()))
        .map(|(start, _)| start.clone())
        .collect()
}

#[cfg(test)]
mod tests {
    use esker_model::{Epoch, PeerId, RegionId, StoreId};
    use esker_rpc::convert::bound;

    use super::*;

    fn route(id: u64, start: &'static str, end: &'static str, version: u64) -> Route {
        Route {
            region: Region {
                id: RegionId(id),
                range: KeyRange::new(Bytes::from(start), bound(Bytes::from(end))).expect("a range"),
                epoch: Epoch { conf_ver: 1, version },
                peers: Vec::new(),
            },
            leader: Peer::voter(PeerId(id * 10), StoreId(1)),
            failures: 0,
        }
    }

    fn id(route: Option<Arc<Route>>) -> Option<u64> {
        route.map(|route| route.region.id.0)
    }

    #[test]
    fn a_key_belongs_to_the_region_that_starts_at_or_before_it() {
        let cache = RegionCache::default();
        cache.insert(route(1, "", "g", 1));
        cache.insert(route(3, "m", "", 1));
        assert_eq!(id(cache.get(b"")), Some(1));
        assert_eq!(id(cache.get(b"f")), Some(1));
        assert_eq!(id(cache.get(b"g")), None, "the range between the two is not known");
        assert_eq!(id(cache.get(b"m")), Some(3));
        assert_eq!(id(cache.get(b"zzz")), Some(3));
    }

    #[test]
    fn a_bound_belongs_to_the_region_that_ends_at_or_after_it() {
        let cache = RegionCache::default();
        cache.insert(route(1, "", "g", 1));
        cache.insert(route(3, "m", "", 1));
        assert_eq!(id(cache.get_below(b"g")), Some(1));
        assert_eq!(id(cache.get_below(b"h")), None);
        assert_eq!(id(cache.get_below(b"m")), None);
        assert_eq!(id(cache.get_below(b"n")), Some(3));
        assert_eq!(id(cache.get_below(b"")), Some(3), "no bound is above all keys");
    }

    #[test]
    fn a_new_region_takes_the_place_of_all_that_it_overlaps() {
        let cache = RegionCache::default();
        for (region, start, end) in [(1, "", "d"), (2, "d", "h"), (3, "h", "p"), (4, "p", "")] {
            cache.insert(route(region, start, end, 1));
        }
        cache.insert(route(9, "f", "j", 2));
        assert_eq!(id(cache.get(b"a")), Some(1));
        assert_eq!(id(cache.get(b"e")), None, "a part of region 2 is gone with it");
        assert_eq!(id(cache.get(b"f")), Some(9));
        assert_eq!(id(cache.get(b"k")), None);
        assert_eq!(id(cache.get(b"q")), Some(4));
        cache.insert(route(10, "", "", 3));
        assert_eq!(id(cache.get(b"q")), Some(10));
    }

    #[test]
    fn old_news_of_a_region_does_not_replace_what_is_known() {
        let cache = RegionCache::default();
        cache.insert(route(1, "", "g", 5));
        cache.insert(route(1, "", "", 4));
        assert_eq!(id(cache.get(b"x")), None);
        let known = cache.get(b"a").expect("known");
        assert_eq!(known.region.epoch.version, 5);
    }

    #[test]
    fn a_late_answer_neither_removes_nor_redirects_a_newer_route() {
        let cache = RegionCache::default();
        let old = cache.insert(route(1, "", "", 1));
        cache.insert(route(1, "", "", 2));
        cache.remove(&old);
        cache.set_leader(&old, Peer::voter(PeerId(99), StoreId(1)));
        let known = cache.get(b"a").expect("still known");
        assert_eq!((known.region.epoch.version, known.leader.id), (2, PeerId(10)));
    }
}
