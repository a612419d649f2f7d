//! Requests that are refused for a reason that is over soon, as a rule: they are held and tried
//! again for a while before their client is told.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use crate::config::{HOLD_PATIENCE, HOLD_RETRY, MAX_HELD_LEADERLESS, MAX_HELD_REQUESTS};
use crate::error::{Passing, RequestError};

/// Room for requests that wait until the store is less busy, and for those that wait until a
/// region has a leader.
#[derive(Clone)]
pub(crate) struct HeldRoom {
    busy: Arc<Semaphore>,
    leaderless: Arc<Semaphore>,
}

impl Default for HeldRoom {
    fn default() -> Self {
        HeldRoom {
            busy: Arc::new(Semaphore::new(MAX_HELD_REQUESTS)),
            leaderless: Arc::new(Semaphore::new(MAX_HELD_LEADERLESS)),
        }
    }
}

impl HeldRoom {
    fn of(&self, passing: Passing) -> &Arc<Semaphore> {
        match passing {
            Passing::Busy => &self.busy,
            Passing::Leaderless => &self.leaderless,
        }
    }
}

/// How one request is held.
#[derive(Default)]
pub(super) struct Held {
    place: Option<Place>,
}

/// A place in one of the two rooms.
struct Place {
    /// The first refusal, in whichever room.
    since: Instant,
    passing: Passing,
    /// Between the next two attempts.
    wait: Duration,
    _permit: OwnedSemaphorePermit,
}

impl Held {
    /// How long to wait before the next attempt; nothing when there should be none.
    pub fn next_wait(&mut self, room: &HeldRoom, error: &RequestError) -> Option<Duration> {
        let (first, longest) = HOLD_RETRY;
        let passing = error.passing()?;
        if self.place.as_ref().is_none_or(|place| place.passing != passing) {
            let permit = Arc::clone(room.of(passing)).try_acquire_owned().ok()?;
            let (since, wait) = match &self.place {
                // In the other room by now, and for no longer in all.
                Some(place) => (place.since, place.wait),
                None => {
                    metrics::counter!("esker_requests_held_total").increment(1);
                    (Instant::now(), first)
                }
            };
            self.place = Some(Place { since, passing, wait, _permit: permit });
        }
        let place = self.place.as_mut()?;
        let wait = place.wait;
        if place.since.elapsed() + wait > HOLD_PATIENCE {
            return None;
        }
        place.wait = (wait * 2).min(longest);
        Some(wait)
    }
}
