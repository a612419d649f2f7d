//! The bounded queue of messages that wait for one store.

use std::collections::VecDeque;

use parking_lot::Mutex;
use prost::Message;
use tokio::sync::Notify;

use crate::proto::esker::RaftMessage;

/// Messages that may wait for one store.
pub const MAX_QUEUED_MESSAGES: usize = 16 * 1024;

/// Bytes that may wait for one store. An empty queue takes a message of any size, because such a
/// message could never be sent otherwise.
pub const MAX_QUEUED_BYTES: usize = 64 << 20;

/// The queue to a store has no room. The message was dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the queue to store {store} is full: {messages} messages, {bytes} bytes")]
pub struct Full {
    pub store: u64,
    pub messages: usize,
    pub bytes: usize,
}

/// Filled from any thread, drained by one task.
pub(super) struct Queue {
    store: u64,
    waiting: Mutex<Waiting>,
    /// Keeps one permit, so that a push between a look and a wait is not missed.
    pushed: Notify,
}

#[derive(Default)]
struct Waiting {
    messages: VecDeque<(usize, RaftMessage)>,
    bytes: usize,
    /// No more messages will come, because the transport is gone.
    closed: bool,
}

impl Queue {
    pub(super) fn new(store: u64) -> Self {
        Queue { store, waiting: Mutex::default(), pushed: Notify::new() }
    }

    pub(super) fn push(&self, message: RaftMessage) -> Result<(), Full> {
        let size = message.encoded_len();
        {
            let mut waiting = self.waiting.lock();
            let messages = waiting.messages.len();
            let too_many = messages >= MAX_QUEUED_MESSAGES;
            let too_large = messages > 0 && waiting.bytes + size > MAX_QUEUED_BYTES;
            if too_many || too_large {
                return Err(Full { store: self.store, messages, bytes: waiting.bytes });
            }
            waiting.bytes += size;
            waiting.messages.push_back((size, message));
        }
        self.pushed.notify_one();
        Ok(())
    }

    /// Waits for messages and returns all that are ready, up to the bounds, but at least one.
    /// `None` once the queue is closed and empty.
    pub(super) async fn take(
        &self,
        max_messages: usize,
        max_bytes: usize,
    ) -> Option<Vec<RaftMessage>> {
        loop {
            {
                let mut waiting = self.waiting.lock();
                if !waiting.messages.is_empty() {
                    return Some(waiting.take(max_messages, max_bytes));
                }
                if waiting.closed {
                    return None;
                }
            }
            self.pushed.notified().await;
        }
    }

    /// Waits until there is something to send. Returns `false` once the queue is closed.
    pub(super) async fn ready(&self) -> bool {
        loop {
            {
                let waiting = self.waiting.lock();
                if waiting.closed {
                    return false;
                }
                if !waiting.messages.is_empty() {
                    return true;
                }
            }
            self.pushed.notified().await;
        }
    }

    /// Drops the messages that wait, and returns their number.
    pub(super) fn clear(&self) -> usize {
        let mut waiting = self.waiting.lock();
        waiting.bytes = 0;
        let dropped = std::mem::take(&mut waiting.messages);
        drop(waiting);
        dropped.len()
    }

    pub(super) fn close(&self) {
        self.waiting.lock().closed = true;
        self.pushed.notify_one();
    }

    pub(super) fn is_closed(&self) -> bool {
        self.waiting.lock().closed
    }
}

impl Waiting {
    fn take(&mut self, max_messages: usize, max_bytes: usize) -> Vec<RaftMessage> {
        let mut batch = Vec::with_capacity(self.messages.len().min(max_messages));
        let mut bytes = 0;
        while let Some((size, _)) = self.messages.front() {
            let full = batch.len() >= max_messages || bytes + size > max_bytes;
            if full && !batch.is_empty() {
                break;
            }
            let Some((size, message)) = self.messages.pop_front() else {
                break;
            };
            bytes += size;
            batch.push(message);
        }
        self.bytes -= bytes;
        batch
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::esker::{Consensus, raft_message};

    fn message(region_id: u64, size: usize) -> RaftMessage {
        let consensus = Consensus { message: vec![0; size].into(), ..Default::default() };
        let content = Some(raft_message::Content::Consensus(consensus));
        RaftMessage { region_id, content, ..Default::default() }
    }

    #[test]
    fn a_queue_takes_messages_up_to_its_count_and_says_that_it_is_full() {
        let queue = Queue::new(3);
        for region in 0..MAX_QUEUED_MESSAGES as u64 {
            queue.push(message(region, 0)).expect("within the bound");
        }
        let full = queue.push(message(1, 0)).expect_err("beyond the bound");
        assert_eq!((full.store, full.messages), (3, MAX_QUEUED_MESSAGES));
    }

    #[test]
    fn a_queue_takes_messages_up_to_its_bytes_but_always_one() {
        let queue = Queue::new(3);
        queue.push(message(1, MAX_QUEUED_BYTES * 2)).expect("an empty queue takes anything");
        assert!(queue.push(message(2, 1)).is_err());
        assert_eq!(queue.clear(), 1);
        queue.push(message(2, 1)).expect("room again");
    }

    #[tokio::test]
    async fn a_batch_keeps_the_order_and_stops_at_its_bounds() {
        let queue = Queue::new(3);
        for region in 1..=5 {
            queue.push(message(region, 100)).expect("room");
        }
        let regions = |batch: Option<Vec<RaftMessage>>| -> Vec<u64> {
            batch.expect("open").iter().map(|message| message.region_id).collect()
        };
        assert_eq!(regions(queue.take(2, 1 << 20).await), [1, 2]);
        assert_eq!(regions(queue.take(10, 250).await), [3, 4]);
        assert_eq!(regions(queue.take(10, 1).await), [5], "one message always fits");
        queue.close();
        assert!(queue.take(10, 1).await.is_none());
    }
}
