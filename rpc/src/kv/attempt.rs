//! One attempt of one request on one region, and what its failure means for the next.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tonic::Status;

use super::cache::Route;
use super::request::{Incoming, Outgoing, RegionRequest};
use super::stores::SendError;
use super::{Attempts, Failure, KvClient, Retry, Wait};
use crate::channel;
use crate::error::{ClientError, display_key};
use crate::placement::RegionInfo;
use crate::proto::errorpb;
use crate::proto::kvrpcpb::{ApiVersion, Context};
use crate::proto::metapb::Region;
use crate::service::is_refusal;

impl KvClient {
    /// Asks the region that holds `key`, until it answers.
    pub(super) async fn ask<R: RegionRequest>(
        &self,
        key: &Bytes,
        request: R,
    ) -> Result<R::Response, ClientError> {
        let mut attempts = Attempts::new(R::CALL, key.clone(), self.deadline);
        loop {
            let failure = match self.route(key).await {
                Ok(route) => {
                    match self.attempt(&route, key, request.clone(), attempts.timeout()).await {
                        Ok(response) => return Ok(response),
                        Err(failure) => failure,
                    }
                }
                Err(failure) => failure,
            };
            match failure {
                Failure::Again(retry) => attempts.next(retry).await?,
                Failure::Final(error) => return Err(error),
            }
        }
    }

    /// The region that holds a key, from the cache or from placement.
    pub(super) async fn route(&self, key: &Bytes) -> Result<Arc<Route>, Failure> {
        if let Some(route) = self.shared.cache.get(key) {
            return Ok(route);
        }
        let found = self.shared.placement.region_by_key(key.clone()).await?;
        self.remember(found, key)
    }

    /// The region that holds the keys just below `bound`; an empty one is above all keys.
    pub(super) async fn route_below(&self, bound: &Bytes) -> Result<Arc<Route>, Failure> {
        if let Some(route) = self.shared.cache.get_below(bound) {
            return Ok(route);
        }
        /// Longer than any key and any bound of a region: filled with the highest byte it is
        /// above all of them.
        const ABOVE_ALL_KEYS: usize = 10 << 10;
        let key = if bound.is_empty() {
            Bytes::from_static(&[0xff; ABOVE_ALL_KEYS])
        } else {
            bound.clone()
        };
        let mut found = self.shared.placement.region_by_key(key.clone()).await?;
        if found.as_ref().is_some_and(|found| found.region.start_key == key) {
            found = self.shared.placement.previous_region(key.clone()).await?;
        }
        let route = self.remember(found, &key)?;
        if route.contains_below(bound) {
            Ok(route)
        } else {
            // A split or merge between the two questions.
            let reason = "placement's regions were changing".into();
            Err(Failure::Again(Retry { wait: Wait::Backoff, reason }))
        }
    }

    fn remember(&self, found: Option<RegionInfo>, key: &[u8]) -> Result<Arc<Route>, Failure> {
        let Some(found) = found else {
            let key = display_key(key);
            return Err(Failure::Final(ClientError::NoRegion { key }));
        };
        // Without a known leader any peer will do: it knows better than placement.
        let Some(leader) = found.leader.or_else(|| found.region.peers.first().cloned()) else {
            let reason = format!("region {} has no peers yet", found.region.id);
            return Err(Failure::Again(Retry { wait: Wait::Backoff, reason }));
        };
        Ok(self.shared.cache.insert(Route { region: found.region, leader, failures: 0 }))
    }

    /// Sends one request to where `route` says, once.
    pub(super) async fn attempt<R: RegionRequest>(
        &self,
        route: &Arc<Route>,
        key: &[u8],
        request: R,
        timeout: Duration,
    ) -> Result<R::Response, Failure> {
        let context = Context {
            region_id: route.region.id,
            region_epoch: route.region.region_epoch,
            peer: Some(route.leader),
            api_version: ApiVersion::V1.into(),
            cluster_id: self.shared.placement.cluster_id(),
            ..Default::default()
        };
        let sending = self.send(route.leader.store_id, request.outgoing(context));
        let sent = match tokio::time::timeout(timeout, sending).await {
            Ok(sent) => sent,
            Err(_) => Err(SendError::Unknown(format!("no answer within {timeout:?}"))),
        };
        let refused = |message: String| {
            Failure::Final(ClientError::Refused {
                call: R::CALL,
                key: display_key(key),
                region: route.region.id,
                store: route.leader.store_id,
                message,
            })
        };
        let incoming = match sent {
            Ok(incoming) => incoming,
            Err(SendError::Refused(message)) => return Err(refused(message)),
            Err(SendError::Final(error)) => return Err(Failure::Final(error)),
            Err(SendError::Unknown(reason)) if !R::REPEATABLE => {
                return Err(unknown::<R>(key, reason));
            }
            Err(SendError::NotSent(reason) | SendError::Unknown(reason)) => {
                // Its leader has probably gone elsewhere, and its peers know that before placement.
                self.shared.cache.try_next_peer(route);
                return Err(Failure::Again(Retry { wait: Wait::Backoff, reason }));
            }
        };
        let mut response = R::response(incoming)
            .ok_or_else(|| refused("the store answered another kind of request".into()))?;
        if let Some(error) = R::region_error(&mut response) {
            if error.undetermined_result.is_some() && !R::REPEATABLE {
                return Err(unknown::<R>(key, error.message));
            }
            // A refusal of this request in a batch, which has no other place for it.
            if error.raft_entry_too_large.is_some_and(|error| error.entry_size == 0) {
                return Err(refused(error.message));
            }
            return Err(self.judge(R::CALL, route, error));
        }
        let complaint = R::complaint(&response);
        if complaint.is_empty() { Ok(response) } else { Err(refused(complaint)) }
    }

    /// Hands a request to a store, by a function call where that is here.
    async fn send(&self, store: u64, request: Outgoing) -> Result<Incoming, SendError> {
        let Some(service) = self.shared.local.get(&store) else {
            return self.shared.remote.send(store, request).await;
        };
        let answered = match request {
            Outgoing::Batched(command) => {
                service.handle(*command).await.map(Box::new).map(Incoming::Batched)
            }
            Outgoing::CompareAndSwap(request) => {
                let answer = service.compare_and_swap(*request).await;
                answer.map(Box::new).map(Incoming::CompareAndSwap)
            }
            Outgoing::KeyTtl(request) => {
                service.key_ttl(*request).await.map(Box::new).map(Incoming::KeyTtl)
            }
            Outgoing::Split(request) => {
                service.split_region(*request).await.map(Box::new).map(Incoming::Split)
            }
        };
        answered.map_err(|status: Status| {
            let reason = format!("store {store}: {}", channel::describe(&status));
            if is_refusal(&status) {
                SendError::Refused(reason)
            } else {
                SendError::Unknown(reason)
            }
        })
    }

    /// Corrects what is believed about a region, and says how to go on.
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
            return match not_leader.leader {
                Some(leader) if leader.id != route.leader.id => {
                    let reason = format!("store {} leads it now", leader.store_id);
                    cache.set_leader(route, leader);
                    again(Wait::None, reason)
                }
                // An election may be under way: placement will hear of its end.
                _ => {
                    cache.remove(route);
                    again(Wait::Backoff, "it has no leader".into())
                }
            };
        }
        if let Some(mismatch) = error.epoch_not_match {
            cache.remove(route);
            let mut newer = false;
            for current in mismatch.current_regions {
                // The store that answered most likely still leads the parts; if not, it says so.
                let store = route.leader.store_id;
                let leader = current.peers.iter().find(|peer| peer.store_id == store).copied();
                // A store that lags behind what we know is no help: placement is asked then.
                let ahead = current.id != region || is_newer(&current, &route.region);
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
            let reason = format!("store {} is busy: {}", route.leader.store_id, busy.reason);
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

fn is_newer(a: &Region, b: &Region) -> bool {
    let (a, b) = (a.region_epoch.unwrap_or_default(), b.region_epoch.unwrap_or_default());
    a.version > b.version || a.conf_ver > b.conf_ver
}

fn unknown<R: RegionRequest>(key: &[u8], reason: String) -> Failure {
    Failure::Final(ClientError::OutcomeUnknown { call: R::CALL, key: display_key(key), reason })
}
