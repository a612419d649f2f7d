//! The other peers of the region, as far as the descriptor does not name them: where senders live,
//! and whether anybody still talks to this one.

use std::collections::HashMap;
use std::time::Duration;

use esker_model::Peer as PeerMeta;
use esker_raft::{PeerId, Time};

/// How long a learner hears of nobody before it asks whether it is still a member.
const QUESTION_AFTER: Duration = Duration::from_secs(10);

/// Senders that are remembered; past it all are forgotten, and learnt again.
const MAX_SENDERS: usize = 16;

pub struct Members {
    /// Where peers live that the descriptor did not name when they sent something: replies go
    /// there. The descriptor has the last word on a peer that it names by now. At most
    /// [`MAX_SENDERS`].
    senders: HashMap<PeerId, PeerMeta>,
    /// When the last message for the group came, whatever it was.
    last_heard: Time,
    /// When a learner looks next whether it has heard of anybody.
    next_question: Time,
}

impl Members {
    pub fn new(now: Time) -> Self {
        Members { senders: HashMap::new(), last_heard: now, next_question: now + QUESTION_AFTER }
    }

    /// A message came from a peer, which the descriptor names or not.
    pub fn heard(&mut self, now: Time, sender: PeerMeta, is_named: bool) {
        if !is_named {
            if self.senders.len() >= MAX_SENDERS {
                self.senders.clear();
            }
            self.senders.insert(sender.id, sender);
        }
        self.last_heard = now;
    }

    /// A peer that the descriptor does not name.
    pub fn sender(&self, peer: PeerId) -> Option<&PeerMeta> {
        self.senders.get(&peer)
    }

    pub fn deadline(&self) -> Time {
        self.next_question
    }

    /// Whether a learner should ask now whether it is still a member.
    pub fn must_ask(&mut self, now: Time) -> bool {
        if now < self.next_question {
            return false;
        }
        self.next_question = now + QUESTION_AFTER;
        now - self.last_heard >= QUESTION_AFTER
    }
}
