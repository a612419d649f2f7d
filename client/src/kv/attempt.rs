//! One attempt of one request on one region, and what its failure means for the next.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use esker_model::limits::MAX_COMMAND_BYTES;
use esker_model::{Region, StoreId};
use esker_mutants::broken;
use esker_rpc::convert::optional_peer;
use esker_rpc::display_key;
use esker_rpc::proto::errorpb;
use esker_rpc::proto::kvrpcpb::{ApiVersion, Context};
use esker_rpc::service::{Caller, Reply, Request, StoreService};
use tokio::time::Instant;

use super::cache::Route;
use super::fence::Fence;
use super::request::{Effect, RegionRequest};
use super::stores::{Connection, SendError};
use super::{Attempts, Failure, KvClient, Retry, Wait};
use crate::error::ClientError;
use crate::placement::RegionInfo;

impl KvClient {
    /// Sends the request to the region that holds `key`, until it is answered.
    pub(super) async fn ask<R: RegionRequest>(
        &self,
        key: &Bytes,
        request: R,
    ) -> Result<R::Response, ClientError> {
        self.ask_at(At::Key, key, |_| request.clone()).await.map(|(_, response)| response)
    }

    /// Sends the request that `make` returns to the region that lies `at` a key, until it is
    /// answered. Returns that region's route and the answer.
    pub(super) async fn ask_at<R: RegionRequest>(
        &self,
        at: At,
        key: &Bytes,
        make: impl Fn(&Route) -> R,
    ) -> Result<(Arc<Route>, R::Response), ClientError> {
        let mut attempts = Attempts::new(R::CALL, key.clone(), self.deadline);
        let mut fence = Fence::default();
        loop {
            let asked = async {
                let known = match at {
                    At::Key => self.shared.cache.get(key),
                    At::Below => self.shared.cache.get_below(key),
                };
                let route = match known {
                    Some(route) => route,
                    // Rare, and large: it would make every request's future as large.
                    None => {
                        let lookup = async {
                            match at {
                                At::Key => self.route(key).await,
                                At::Below => self.route_below(key).await,
                            }
                        };
                        Box::pin(attempts.look_up(lookup)).await?
                    }
                };
                let timeout = attempts.timeout();
                let request = make(&route);
                let response = self.attempt(&route, key, request, timeout, &mut fence).await?;
                Ok((route, response))
            };
            let ended = match asked.await {
                Ok(answered) => return Ok(answered),
                Err(Failure::Final(error)) => error,
                Err(Failure::Again(retry)) => match attempts.next(retry).await {
                    Ok(()) => continue,
                    Err(error) => error,
                },
            };
            return Err(fence.conclude(R::CALL, key, ended));
        }
    }

    /// The region that holds a key, from the cache or from placement. Takes as long as placement
    /// does: see [`Attempts::look_up`].
    pub(super) async fn route(&self, key: &Bytes) -> Result<Arc<Route>, Failure> {
        if let Some(route) = self.shared.cache.get(key) {
            return Ok(route);
        }
        let found = self.shared.placement.region_by_key(key.clone()).await?;
        let route = self.remember(found, key)?;
        if route.contains(key) { Ok(route) } else { Err(changing()) }
    }

    /// The region that holds the keys just below `bound`. An empty bound is above all keys. Takes as
    /// long as placement does: see [`Attempts::look_up`].
    pub(super) async fn route_below(&self, bound: &Bytes) -> Result<Arc<Route>, Failure> {
        if let Some(route) = self.shared.cache.get_below(bound) {
            return Ok(route);
        }
        /// Longer than any key and any bound of a region. Filled with the highest byte, such a key
        /// is above all of them.
        const ABOVE_ALL_KEYS: usize = 10 << 10;
        let key = if bound.is_empty() {
            Bytes::from_static(&[0xff; ABOVE_ALL_KEYS])
        } else {
            bound.clone()
        };
        let mut found = self.shared.placement.region_by_key(key.clone()).await?;
        if found.as_ref().is_some_and(|found| *found.region.range.start() == key) {
            found = self.shared.placement.previous_region(key.clone()).await?;
        }
        let route = self.remember(found, &key)?;
        // There may have been a split or a merge between the two questions.
        if route.contains_below(bound) { Ok(route) } else { Err(changing()) }
    }

    fn remember(&self, found: Option<RegionInfo>, key: &[u8]) -> Result<Arc<Route>, Failure> {
        let Some(found) = found else {
            let key = display_key(key);
            return Err(Failure::Final(ClientError::NoRegion { key }));
        };
        // Without a known leader any peer will do, because each peer knows better than placement.
        let Some(leader) = found.leader.or_else(|| found.region.peers.first().cloned()) else {
            let reason = format!("region {} has no peers yet", found.region.id);
            return Err(Failure::Again(Retry { wait: Wait::Backoff, reason }));
        };
        Ok(self.shared.cache.insert(Route { region: found.region, leader, failures: 0 }))
    }

    /// Sends one request to where `route` says, once, and not at all if `timeout` is zero. All
    /// attempts of one write share its `fence`.
    pub(super) async fn attempt<R: RegionRequest>(
        &self,
        route: &Arc<Route>,
        key: &[u8],
        request: R,
        timeout: Duration,
        fence: &mut Fence,
    ) -> Result<R::Response, Failure> {
        let until = Instant::now() + timeout;
        let (region, store) = (route.region.id, route.leader.store);
        check_size(R::CALL, route, request.encoded_len())?;
        if timeout.is_zero() {
            let reason = format!("there was no time left to ask store {store}");
            return Err(Failure::Again(Retry { wait: Wait::Backoff, reason }));
        }
        let refused = |message: String| {
            let key = display_key(key);
            Failure::Final(ClientError::Refused { call: R::CALL, key, region, store, message })
        };
        let opened = match self.open_door(store) {
            Some(door) => Ok(Ok(door)),
            None => Box::pin(tokio::time::timeout_at(until, self.connect_door(store))).await,
        };
        let door = match opened {
            Ok(Ok(door)) => door,
            Ok(Err(SendError::Final(error))) => return Err(Failure::Final(error)),
            Ok(Err(SendError::Refused(message))) => return Err(refused(message)),
            Ok(Err(SendError::NotSent(reason) | SendError::Unknown(reason))) => {
                return Err(self.elsewhere(route, reason));
            }
            Err(_) => {
                let reason = format!("no connection to store {store} within {timeout:?}");
                return Err(self.elsewhere(route, reason));
            }
        };
        let mut tag = None;
        if R::EFFECT == Effect::Write {
            if door.remembers_writes() {
                tag = fence.tag(&self.shared.tags, region);
            }
            if tag.is_none()
                && let Some(reason) = fence.unknown()
            {
                // This store could apply the write a second time.
                return Err(lost::<R>(key, reason.to_owned()));
            }
        }
        let context = Context {
            region_id: region.0,
            region_epoch: Some(route.region.epoch.into()),
            peer: Some(route.leader.into()),
            api_version: ApiVersion::V1.into(),
            cluster_id: self.shared.placement.cluster_id(),
            write_tag: tag,
            ..Default::default()
        };
        let may_repeat = match R::EFFECT {
            Effect::Read | Effect::Settle => true,
            Effect::Write => tag.is_some(),
            Effect::Swap => broken!(SwapIsSentOnce),
        };
        let seen = AtomicBool::new(false);
        let mut request = request;
        request.set_context(context);
        let sent = tokio::time::timeout_at(until, door.send(request.into(), &seen)).await;
        let sent = sent.unwrap_or_else(|_| {
            let reason = format!("store {store}: no answer within {timeout:?}");
            Err(match seen.load(Ordering::Relaxed) && !broken!(LateAnswerIsUnknown) {
                true => SendError::Unknown(reason),
                false => SendError::NotSent(reason),
            })
        });
        let reply = match sent {
            Ok(reply) => reply,
            Err(SendError::Refused(message)) => return Err(refused(message)),
            Err(SendError::Final(error)) => return Err(Failure::Final(error)),
            Err(SendError::Unknown(reason)) if !may_repeat => return Err(lost::<R>(key, reason)),
            Err(SendError::Unknown(reason)) => {
                lose_sight::<R>(fence, &reason);
                return Err(self.elsewhere(route, reason));
            }
            Err(SendError::NotSent(reason)) => return Err(self.elsewhere(route, reason)),
        };
        let Some(mut response) = R::response(reply) else {
            let strange = refused("the store answered another kind of request".into());
            lose_sight::<R>(fence, "the store answered another kind of request");
            return Err(strange);
        };
        if let Some(error) = R::region_error(&mut response) {
            if let Some(forgotten) = error.forgotten {
                self.shared.tags.learn(region, forgotten.applied_index);
                if fence.unknown().is_some() {
                    return Err(lost::<R>(key, error.message));
                }
                fence.renew();
                let reason = format!("region {region} remembers fewer writes than were made");
                return Err(Failure::Again(Retry { wait: Wait::None, reason }));
            }
            if let Some(undetermined) = &error.undetermined_result {
                let said =
                    if error.message.is_empty() { &undetermined.message } else { &error.message };
                let reason = format!("store {store}: {said}");
                if !may_repeat {
                    return Err(lost::<R>(key, reason));
                }
                lose_sight::<R>(fence, &reason);
            }
            // A refusal of this request in a batch, where the answer has no other place for it.
            if error.raft_entry_too_large.is_some_and(|error| error.entry_size == 0) {
                return Err(refused(error.message));
            }
            return Err(self.judge(R::CALL, route, error));
        }
        self.shared.tags.learn(region, R::applied_index(&response));
        let complaint = R::complaint(&response);
        if complaint.is_empty() { Ok(response) } else { Err(refused(complaint)) }
    }

    /// The failure of a request to a store that could not be asked. The leader has probably moved,
    /// and the region's peers know that before placement does.
    fn elsewhere(&self, route: &Arc<Route>, reason: String) -> Failure {
        self.shared.cache.try_next_peer(route);
        Failure::Again(Retry { wait: Wait::Backoff, reason })
    }

    /// The way to a store in this process, or to one that there is a connection to.
    fn open_door(&self, store: StoreId) -> Option<Door<'_>> {
        match self.shared.local.get(&store) {
            Some(service) => Some(Door::Local(store, service)),
            None => self.shared.remote.open(store).map(Door::Remote),
        }
    }

    /// The way to a store in another process.
    async fn connect_door(&self, store: StoreId) -> Result<Door<'_>, SendError> {
        self.shared.remote.connection(store).await.map(Door::Remote)
    }

    /// Corrects the cached view of a region, and returns how to go on.
    fn judge(&self, call: &'static str, route: &Arc<Route>, error: errorpb::Error) -> Failure {
        let cache = &self.shared.cache;
        let region = route.region.id;
        metrics::counter!("esker_client_region_errors_total").increment(1);
        let again = |wait, reason: String| {
            let reason = format!("region {region}: {reason}");
            Failure::Again(Retry { wait, reason })
        };
        if let Some(too_large) = error.raft_entry_too_large {
            return Failure::Final(ClientError::TooLarge {
                call,
                region,
                size: too_large.entry_size,
            });
        }
        if let Some(not_leader) = error.not_leader {
            // An impossible peer is no hint.
            let hint = optional_peer(not_leader.leader).ok().flatten();
            return match hint {
                Some(leader) if leader.id != route.leader.id => {
                    let reason = format!("store {} leads it now", leader.store);
                    cache.set_leader(route, leader);
                    again(Wait::None, reason)
                }
                // An election may be under way. Placement will hear of its end.
                _ => {
                    cache.remove(route);
                    again(Wait::Backoff, "it has no leader".into())
                }
            };
        }
        if let Some(mismatch) = error.epoch_not_match {
            if broken!(EpochErrorCorrectsCache) {
                return again(Wait::Backoff, "it was split, merged or moved".into());
            }
            cache.remove(route);
            let mut newer = false;
            // An impossible region is no help, like a region that the store left out.
            let current = mismatch.current_regions.into_iter();
            for current in current.filter_map(|current| Region::try_from(current).ok()) {
                // The store that answered most likely still leads the parts. If not, it answers so.
                let leader = current.peer_on(route.leader.store).copied();
                // A store that lags behind the cached view is no help. Placement is asked then.
                let ahead = current.id != route.region.id || is_newer(&current, &route.region);
                if let Some(leader) = leader.filter(|_| ahead) {
                    newer = true;
                    cache.insert(Route { region: current, leader, failures: 0 });
                }
            }
            let wait = if newer { Wait::None } else { Wait::Backoff };
            return again(wait, "it was split, merged or moved".into());
        }
        if let Some(busy) = error.server_is_busy {
            let asked = Duration::from_millis(busy.backoff_ms);
            let reason = format!("store {} is busy: {}", route.leader.store, busy.reason);
            return again(Wait::AtLeast(asked), reason);
        }
        let stays = error.read_index_not_ready.is_some()
            || error.stale_command.is_some()
            || error.proposal_in_merging_mode.is_some()
            || error.max_timestamp_not_synced.is_some()
            || error.disk_full.is_some()
            || error.undetermined_result.is_some();
        if !stays {
            // Not found, another store, a key outside, another peer: the route is wrong.
            cache.remove(route);
        }
        let reason = if error.message.is_empty() { "not served now".into() } else { error.message };
        again(Wait::Backoff, reason)
    }
}

/// Which region belongs to a key.
#[derive(Clone, Copy, Debug)]
pub(super) enum At {
    /// The region that holds the key.
    Key,
    /// The region that holds the keys just below the key.
    Below,
}

/// The way to one store.
enum Door<'a> {
    Local(StoreId, &'a Arc<dyn StoreService>),
    Remote(Connection),
}

impl Door<'_> {
    fn remembers_writes(&self) -> bool {
        match self {
            Door::Local(_, service) => service.remembers_writes(),
            Door::Remote(connection) => connection.remembers_writes(),
        }
    }

    /// Hands a request over, by a function call if the store is in this process. See
    /// [`Connection::send`].
    async fn send(&self, request: Request, seen: &AtomicBool) -> Result<Reply, SendError> {
        let (store, service) = match self {
            Door::Local(store, service) => (store, service),
            Door::Remote(connection) => return connection.send(request, seen).await,
        };
        seen.store(true, Ordering::Relaxed);
        let answered = service.handle(request, Caller::default()).await;
        answered.map_err(|status| SendError::of(format_args!("store {store}"), &status))
    }
}

/// Refuses a request that every store would refuse. A request that is larger than a message would
/// also end the stream that it shares with others. `size` counts keys and values, and may count what
/// the protocol puts around them: that is less than the 32 bytes that a store counts for each
/// mutation. Requests that write nothing are smaller than this by far.
pub(super) fn check_size(call: &'static str, route: &Route, size: usize) -> Result<(), Failure> {
    if size <= MAX_COMMAND_BYTES {
        return Ok(());
    }
    let (region, size) = (route.region.id, size as u64);
    Err(Failure::Final(ClientError::TooLarge { call, region, size }))
}

/// The failure of a lookup where placement named a region that does not hold the keys asked for.
fn changing() -> Failure {
    let reason = "placement's regions were changing".into();
    Failure::Again(Retry { wait: Wait::Backoff, reason })
}

fn is_newer(a: &Region, b: &Region) -> bool {
    let (a, b) = (a.epoch, b.epoch);
    a.version > b.version || a.conf_ver > b.conf_ver
}

/// Notes that an attempt may have been applied, if the request changes a region.
fn lose_sight<R: RegionRequest>(fence: &mut Fence, reason: &str) {
    if R::EFFECT != Effect::Read {
        fence.lost_sight(reason.to_owned());
    }
}

/// The failure of a request that may have been applied and is not sent again.
fn lost<R: RegionRequest>(key: &[u8], reason: String) -> Failure {
    Failure::Final(ClientError::OutcomeUnknown { call: R::CALL, key: display_key(key), reason })
}
