//! Rules of the protocol that a test may break, one at a time.
//!
//! A simulator that finds no fault proves something only if it would find a fault that is there.
//! `raft/mutants` compiles this crate's sources a second time with `cfg(esker_break_rules)`. There,
//! `broken!(Rule)` is true if the current thread is set to break that rule. Everywhere else the
//! macro is the constant `false`, and marks for the reader each rule that the proof rests on.

#[cfg(esker_break_rules)]
pub use switch::{Rule, break_rule, is_broken};

/// `true` if this thread breaks the rule, which no product build can.
#[cfg(not(esker_break_rules))]
macro_rules! broken {
    ($rule:ident) => {
        false
    };
}

/// `true` if this thread breaks the rule.
#[cfg(esker_break_rules)]
macro_rules! broken {
    ($rule:ident) => {
        $crate::rules::is_broken($crate::rules::Rule::$rule)
    };
}

pub(crate) use broken;

#[cfg(esker_break_rules)]
mod switch {
    use std::cell::Cell;

    macro_rules! rules {
        ($($(#[$doc:meta])+ $rule:ident,)+) => {
            /// A rule of the protocol, and what breaking it means.
            #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
            pub enum Rule {
                $($(#[$doc])+ $rule,)+
            }

            impl Rule {
                /// Every rule that can be broken.
                pub const ALL: &[Rule] = &[$(Rule::$rule,)+];
            }
        };
    }

    rules! {
        // Elections.
        /// Broken: a peer votes for every candidate that asks in a term.
        OneVotePerTerm,
        /// Broken: a peer that restarts has forgotten its vote.
        VoteSurvivesRestart,
        /// Broken: votes are sent before they are durable.
        VoteAfterSync,
        /// Broken: a candidate asks for votes, and counts its own, before its term,
        /// vote and log are durable.
        CandidacyAfterSync,
        /// Broken: a vote is given to a candidate with a log behind the voter's own.
        VoteForCompleteLog,
        // Replication and commit.
        /// Broken: entries of older terms are committed by counting (figure 8).
        CommitOwnTermOnly,
        /// Broken: an append is taken without a look at the entry before it.
        AppendAfterEqualEntry,
        /// Broken: every append cuts off the log behind it, also where the logs agree.
        TruncateOnConflictOnly,
        /// Broken: a follower commits entries that this leader has not verified.
        CommitVerifiedPrefix,
        /// Broken: heartbeats make followers commit entries that they may not share with the
        /// leader.
        HeartbeatCommitCapped,
        /// Broken: peers learn from elections what later terms have committed.
        CommitOfLaterTerms,
        /// Broken: acknowledgements are sent before the entries are durable.
        AcknowledgeAfterSync,
        /// Broken: a leader counts itself for entries that its disk does not hold.
        LeaderCountsDurableOnly,
        /// Broken: the end of a write proves the durability of entries that have
        /// replaced the written ones.
        ReplacedEntriesNotDurable,
        /// Broken: committed entries are applied before they are durable on this peer.
        ApplyDurableOnly,
        /// Broken: replies of older terms are taken for replies of the current term.
        OlderTermsIgnored,
        /// Broken: a snapshot is acknowledged before it is installed.
        SnapshotAckAfterInstall,
        // Members.
        /// Broken: in a joint configuration the new majority decides alone.
        JointNeedsBothMajorities,
        /// Broken: a change of many voters takes effect at once.
        ManyVotersJointly,
        /// Broken: a change is proposed before the one before it is applied.
        OneChangeAtATime,
        /// Broken: a new leader assumes that its tail contains no change.
        TailMayHoldChange,
        /// Broken: a peer campaigns with a committed change that it has not applied.
        ApplyBeforeCampaign,
        // Reads and leases.
        /// Broken: ReadIndex is answered without asking whether this peer still leads.
        ReadConfirmsLeadership,
        /// Broken: ReadIndex is answered before the term's first entry is committed.
        ReadAfterOwnTermCommits,
        /// Broken: reads join a round that was sent before they came.
        ReadWaitsForNextRound,
        /// Broken: a lease lasts as long as if all clocks ran alike.
        LeaseAllowsForDrift,
        /// Broken: a lease counts from the time of the reply, not of the request.
        LeaseFromSendTime,
        /// Broken: a lease goes on after another peer was ordered to campaign.
        LeaseVoidAfterHandover,
        /// Broken: a leader has a lease while a change of members is not applied on it.
        NoLeaseDuringChange,
        /// Broken: a peer promises before there is any record that it ever ran.
        PromiseAfterFirstRecord,
        /// Broken: a voter forgets its promise to a live leader by restarting.
        LoyaltySurvivesRestart,
        /// Broken: a voter forgets its promise to a live leader.
        LoyaltyToLiveLeader,
        /// Broken: a voter that restarts takes itself for the only one although an entry that it
        /// has not applied may have added another.
        LoneVoterAppliesFirst,
        /// Broken: the acknowledgement of a snapshot, which may have been on its way for long,
        /// proves like a heartbeat's that the follower was loyal just now.
        UnstampedProvesNoAge,
    }

    thread_local! {
        static BROKEN: Cell<Option<Rule>> = const { Cell::new(None) };
    }

    /// Makes all groups on this thread break `rule`, or none.
    pub fn break_rule(rule: Option<Rule>) {
        BROKEN.set(rule);
    }

    /// Whether this thread breaks `rule`.
    #[must_use]
    pub fn is_broken(rule: Rule) -> bool {
        BROKEN.get() == Some(rule)
    }
}
