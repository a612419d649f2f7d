//! How many bytes wait between two parts of a store.
//!
//! A worker never waits for the log writer or for an apply worker: it could not send heartbeats
//! meanwhile, and every region that it leads would lose its lease. So the queues to them have no
//! length at which a sender waits. What is in them is bounded by a [`Backlog`]: a worker asks
//! whether there is room before it hands over anything large. Where there is none, the region
//! keeps what it has, and its worker is woken when there is room again.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use esker_mutants::broken;

/// The bytes in one queue.
#[derive(Debug)]
pub struct Backlog {
    bytes: AtomicUsize,
    limit: usize,
    /// So much of the limit is kept for what cannot be held back.
    reserve: usize,
    /// The workers that wait for room.
    waiting: Box<[AtomicBool]>,
}

impl Backlog {
    pub fn new(limit: usize, workers: usize) -> Backlog {
        let waiting = (0..workers).map(|_| AtomicBool::new(false)).collect();
        Backlog { bytes: AtomicUsize::new(0), limit, reserve: 0, waiting }
    }

    #[must_use]
    pub fn with_reserve(self, reserve: usize) -> Backlog {
        Backlog { reserve, ..self }
    }

    pub fn bytes(&self) -> usize {
        self.bytes.load(Ordering::SeqCst)
    }

    /// Whether something may be added besides so many bytes that will be, without the reserve.
    pub fn has_room_beside(&self, more: usize) -> bool {
        self.is_below(self.limit - self.reserve, more)
    }

    /// The same for what cannot be held back.
    pub fn has_reserve_beside(&self, more: usize) -> bool {
        self.is_below(self.limit, more)
    }

    fn is_below(&self, limit: usize, more: usize) -> bool {
        self.bytes() + more < limit || broken!(BacklogIsBounded)
    }

    /// Something was handed over.
    pub fn add(&self, bytes: usize) {
        self.bytes.fetch_add(bytes, Ordering::SeqCst);
    }

    /// The worker wants to be woken when there is room. Returns whether there is room already.
    pub fn wait(&self, worker: usize) -> bool {
        self.waiting[worker].store(true, Ordering::SeqCst);
        // Looked at again, because nobody wakes it if the last bytes went before.
        let has_room = self.has_room_beside(0);
        if has_room {
            self.waiting[worker].store(false, Ordering::SeqCst);
        }
        has_room
    }

    /// What was handed over is done. Calls `wake` for each worker that waited, if there is room.
    pub fn done(&self, bytes: usize, mut wake: impl FnMut(usize)) {
        let before = self.bytes.fetch_sub(bytes, Ordering::SeqCst);
        assert!(before >= bytes, "{bytes} bytes were done of {before} that were handed over");
        if !self.has_room_beside(0) {
            return;
        }
        for (worker, waits) in self.waiting.iter().enumerate() {
            if waits.load(Ordering::SeqCst) && waits.swap(false, Ordering::SeqCst) {
                wake(worker);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_held_back_finds_room_where_other_things_do_not() {
        let backlog = Backlog::new(12, 1).with_reserve(3);
        backlog.add(9);
        assert!(!backlog.has_room_beside(0) && !backlog.wait(0));
        assert!(backlog.has_reserve_beside(2) && !backlog.has_reserve_beside(3));
        let mut woken = 0;
        backlog.done(1, |_| woken += 1);
        assert_eq!(woken, 1);
    }

    #[test]
    fn who_waits_is_woken_once_when_there_is_room() {
        let backlog = Backlog::new(10, 2);
        assert!(backlog.has_room_beside(9) && !backlog.has_room_beside(10));
        backlog.add(12);
        assert!(!backlog.has_room_beside(0));
        assert!(!backlog.wait(1));
        let woken = |bytes| {
            let mut woken = Vec::new();
            backlog.done(bytes, |worker| woken.push(worker));
            woken
        };
        assert_eq!(woken(2), [0; 0], "it is still full");
        assert_eq!(woken(1), [1]);
        assert_eq!(woken(1), [0; 0], "it was woken");
        assert!(backlog.wait(0), "there is room");
        assert_eq!(woken(8), [0; 0]);
        assert_eq!(backlog.bytes(), 0);
    }
}
