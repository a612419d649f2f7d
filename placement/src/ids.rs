//! The id allocator: stores, regions and replicas draw their ids from one sequence that never
//! repeats.
//!
//! A window of ids is made durable before the first of them is handed out. A new leader starts
//! behind the whole window of the leader before, because it cannot know how much of the window was
//! used. The rest of the window is lost, which costs nothing.
//!
//! Flows in: requests, and notices that a window is durable. Flows out: ids, and the bound that
//! should be made durable next. Promise: no id is ever given twice, across restarts and leaders.

use esker_mutants::broken;
use thiserror::Error;

/// Ids that one durable write reserves, unless a single request wants more.
pub const ID_WINDOW: u64 = 1_000;
/// The most ids that one request may draw.
pub const MAX_IDS_PER_REQUEST: u32 = 65_536;

/// Why no ids were handed out.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum IdError {
    #[error("{count} ids in one request: at most {MAX_IDS_PER_REQUEST} are given")]
    TooMany { count: u32 },
    #[error("the durable window of ids is used up; the next one is being written")]
    WindowExhausted,
    #[error("the 64 bits of ids are used up")]
    SequenceExhausted,
}

/// Hands out ids below a durable bound.
#[derive(Debug)]
pub struct IdAllocator {
    next: u64,
    /// Ids below this are reserved on disk.
    durable: u64,
    /// The largest request that the rest of the window did not satisfy.
    unmet: u64,
}

impl IdAllocator {
    /// Continues behind `durable`, the bound read from the replicated state; `None` if there is
    /// none yet. Zero is never an id.
    pub fn resume(durable: Option<u64>) -> Self {
        let again = if broken!(IdsGoOnBehindTheWindow) { ID_WINDOW } else { 0 };
        let next = durable.unwrap_or(1).saturating_sub(again).max(1);
        Self { next, durable: next, unmet: 0 }
    }

    /// The bound to write next, when less than half a window is left or a request found too few
    /// ids.
    pub fn wanted_bound(&self) -> Option<u64> {
        let left = self.durable - self.next;
        let needed = self.unmet.max(ID_WINDOW / 2);
        (left < needed).then(|| self.next.saturating_add(self.unmet).saturating_add(ID_WINDOW))
    }

    /// Notes that the replicated state holds `bound` now.
    pub fn bound_is_durable(&mut self, bound: u64) {
        self.durable = self.durable.max(bound);
        self.unmet = 0;
    }

    /// Draws `count` consecutive ids (zero counts as one) and returns the last.
    pub fn allocate(&mut self, count: u32) -> Result<u64, IdError> {
        let count = count.max(1);
        if count > MAX_IDS_PER_REQUEST {
            return Err(IdError::TooMany { count });
        }
        let after = self.next.checked_add(u64::from(count)).ok_or(IdError::SequenceExhausted)?;
        if after > self.durable {
            self.unmet = self.unmet.max(u64::from(count));
            return Err(IdError::WindowExhausted);
        }
        self.next = after;
        Ok(after - 1)
    }

    /// Whether `id` may have been handed out by this cluster.
    pub fn may_have_given(&self, id: u64) -> bool {
        id != 0 && id < self.next
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write_window(ids: &mut IdAllocator) -> u64 {
        let bound = ids.wanted_bound().expect("a window is wanted");
        ids.bound_is_durable(bound);
        bound
    }

    #[test]
    fn no_id_is_given_before_its_window_is_durable() {
        let mut ids = IdAllocator::resume(None);
        assert_eq!(ids.allocate(1), Err(IdError::WindowExhausted));
        write_window(&mut ids);
        assert_eq!(ids.allocate(1), Ok(1));
        assert_eq!(ids.allocate(3), Ok(4));
        assert_eq!(ids.allocate(0), Ok(5));
    }

    #[test]
    fn a_new_leader_starts_behind_the_whole_window_of_the_one_before() {
        let mut old = IdAllocator::resume(None);
        let bound = write_window(&mut old);
        let last = old.allocate(10).unwrap();
        let mut new = IdAllocator::resume(Some(bound));
        write_window(&mut new);
        assert!(new.allocate(1).unwrap() > last);
        assert!(new.may_have_given(last));
    }

    #[test]
    fn a_request_larger_than_the_window_gets_a_larger_window() {
        let mut ids = IdAllocator::resume(None);
        write_window(&mut ids);
        assert_eq!(ids.allocate(5_000), Err(IdError::WindowExhausted));
        write_window(&mut ids);
        assert_eq!(ids.allocate(5_000), Ok(5_000));
        assert_eq!(
            ids.allocate(MAX_IDS_PER_REQUEST + 1),
            Err(IdError::TooMany { count: MAX_IDS_PER_REQUEST + 1 })
        );
    }

    #[test]
    fn the_end_of_the_sequence_is_an_error_and_not_a_repetition() {
        let mut ids = IdAllocator::resume(Some(u64::MAX - 1));
        ids.bound_is_durable(u64::MAX);
        assert_eq!(ids.allocate(2), Err(IdError::SequenceExhausted));
        assert_eq!(ids.allocate(1), Ok(u64::MAX - 1));
    }
}
