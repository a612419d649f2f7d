//! A budget of bytes that many may take from and give back to.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// How many bytes may be taken at the same time.
#[derive(Debug)]
pub struct Budget {
    taken: AtomicUsize,
    limit: usize,
}

/// Bytes of a budget, given back when this is dropped.
#[derive(Debug)]
pub struct Taken(Option<(Arc<Budget>, usize)>);

impl Budget {
    pub fn new(limit: usize) -> Arc<Budget> {
        Arc::new(Budget { taken: AtomicUsize::new(0), limit })
    }

    /// Takes so many bytes, if so many are left. Something larger than the whole budget is taken
    /// when nothing else is, because it could never be taken otherwise.
    pub fn take(self: &Arc<Self>, bytes: usize) -> Option<Taken> {
        let before = self.taken.fetch_add(bytes, Ordering::Relaxed);
        if before + bytes <= self.limit || before == 0 {
            return Some(Taken(Some((self.clone(), bytes))));
        }
        self.taken.fetch_sub(bytes, Ordering::Relaxed);
        None
    }
}

impl Taken {
    /// Nothing of any budget.
    pub fn nothing() -> Taken {
        Taken(None)
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        if let Some((budget, bytes)) = self.0.take() {
            budget.taken.fetch_sub(bytes, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_taken_is_given_back_and_never_more_is_taken_than_there_is() {
        let budget = Budget::new(10);
        let first = budget.take(6).expect("there are ten");
        assert!(budget.take(5).is_none());
        let second = budget.take(4).expect("four are left");
        assert!(budget.take(1).is_none());
        drop(first);
        drop(second);
        let large = budget.take(25).expect("nothing else is taken");
        assert!(budget.take(0).is_none());
        drop(large);
        assert!(budget.take(10).is_some());
    }
}
