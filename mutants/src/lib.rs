//! Rules that a test may break, one at a time, in everything around the consensus core.
//!
//! A simulator that finds no fault proves something only if it would find a fault that is there.
//! `broken!(Rule)` in the code of the engine, the stores, their requests, placement and the client
//! marks for the reader a rule that a promise rests on. It is the constant `false`, and the code
//! around it keeps the rule. With the feature `switch`, which nothing but the simulator turns on,
//! it is true on a thread that has called `break_with` for this rule, and on every thread of a
//! process that was started with `ESKER_BROKEN_RULE` set to the rule's name.
//!
//! `simulator/tests/mutants.rs` names for each bug how it is found. The rules of the core itself
//! are in `raft/src/rules.rs`.
//!
//! ```
//! fn sync_follows_every_write() -> bool {
//!     !esker_mutants::broken!(LogIsSynced)
//! }
//! assert!(sync_follows_every_write());
//! ```

#[cfg(feature = "switch")]
pub use switch::{Bug, VARIABLE, break_with, is_broken};

/// `true` if this thread has this bug, which no product build can.
#[cfg(not(feature = "switch"))]
#[macro_export]
macro_rules! broken {
    ($bug:ident) => {
        false
    };
}

/// `true` if this thread has this bug.
#[cfg(feature = "switch")]
#[macro_export]
macro_rules! broken {
    ($bug:ident) => {
        $crate::is_broken($crate::Bug::$bug)
    };
}

#[cfg(feature = "switch")]
mod switch {
    use std::cell::Cell;
    use std::sync::OnceLock;

    macro_rules! bugs {
        ($($(#[$doc:meta])+ $bug:ident,)+) => {
            /// A deliberate bug, by the rule that it breaks.
            #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
            pub enum Bug {
                $($(#[$doc])+ $bug,)+
            }

            impl Bug {
                /// Every bug there is.
                pub const ALL: &[Bug] = &[$(Bug::$bug,)+];

                /// The name of the rule.
                #[must_use]
                pub const fn name(self) -> &'static str {
                    match self {
                        $(Bug::$bug => stringify!($bug),)+
                    }
                }
            }
        };
    }

    bugs! {
        // The engine, and what is on disk of the log.
        /// Broken: the log is written and not synced. A loss of power takes back votes and entries
        /// that were acknowledged.
        LogIsSynced,
        /// Broken: a store opens with an engine that is an older copy of what it had.
        OldPartIsRefused,
        /// Broken: votes and acknowledgements leave before the write that they promise.
        PromiseAfterSync,
        /// Broken: a term and a vote are not stored when no entry comes with them.
        VoteIsStoredAlone,
        /// Broken: a write of the log that failed counts as done.
        FailedWriteStopsStore,
        /// Broken: the log is cut off behind what is applied, and not behind what of that would
        /// survive a crash.
        LogIsCutBehindDurableData,
        /// Broken: the log of a region that left the store stays in the log engine.
        RetiredLogIsRemoved,
        /// Broken: a peer that has no data yet forgets its vote in a restart.
        EmptyPeerKeepsItsVote,
        /// Broken: a peer that restarts votes at once, although it may have promised its leader not
        /// to.
        PromiseOutlivesRestart,

        /// Broken: a leader whose disk is slow or does not answer keeps its regions.
        SlowDiskGivesWay,
        /// Broken: a store whose disk is slow campaigns like any other.
        SlowStoreIsNotChosen,

        // What a write came to.
        /// Broken: a proposal that a snapshot skips over is said to have had no effect.
        SkippedProposalIsUnknown,
        /// Broken: a proposal of a peer that leaves the store is said to have had no effect.
        RemovedPeersProposalIsUnknown,
        /// Broken: clients are told of an unknown outcome as of a write without effect.
        UnknownIsToldAsUnknown,
        /// Broken: a proposal is answered by whatever entry is committed in its place.
        ProposalIsAnsweredByItsEntry,

        // What an entry does when it is applied.
        /// Broken: a compare-and-swap shares its entry with other writes.
        SwapIsAlone,
        /// Broken: the applied index counts a compare-and-swap before its effect is in the batch.
        SwapCountsWithItsEffect,
        /// Broken: a compare-and-swap sees a value that has expired.
        SwapSeesNoExpiredValue,
        /// Broken: a write that was proposed before a split is applied after it.
        EpochIsCheckedAtApply,
        /// Broken: the delete of a range goes on behind the range's end.
        RangeEndsAtItsEnd,
        /// Broken: a tagged write that arrives twice takes effect twice.
        DuplicateChangesNothing,
        /// Broken: a restarted store has forgotten which tagged writes it applied.
        TagsOutliveRestart,
        /// Broken: a snapshot is installed without the tagged writes that are in its data.
        TagsTravelInSnapshots,
        /// Broken: a region that was split has forgotten which tagged writes it applied.
        TagsOutliveSplit,
        /// Broken: a snapshot lacks entries up to its own index, which are not written yet.
        SnapshotHasWhatItSays,

        // The shape of regions.
        /// Broken: a split or a change of members is acted on before it is in the journal.
        ShapeIsDurable,
        /// Broken: that a snapshot is being installed is not in the journal.
        InstallationIsNoted,
        /// Broken: that a peer left the store is not in the journal.
        RemovalIsNoted,
        /// Broken: the journal is dropped before what it speaks of is durable.
        NotesWaitForFlush,
        /// Broken: the files of a snapshot are removed before what came from them is durable.
        FilesWaitForFlush,
        /// Broken: a note is dropped by a flush that began before the note was carried out.
        OpenNoteIsKept,
        /// Broken: the log of a region goes while regions that were split off it are not durable.
        SplitsOutliveTheirLog,
        /// Broken: the part of a split that keeps the region's id keeps its range, too.
        PartsOfSplitAreDisjoint,
        /// Broken: a leader takes writes that were made for the region as it was before a split.
        StaleRequestIsRefused,
        /// Broken: a write that waited for room while its region was split is proposed for what
        /// is left of the region.
        HeldWriteIsCheckedAgain,
        /// Broken: workers hand over however much there is already.
        BacklogIsBounded,
        /// Broken: a message that was long under way brings a removed peer back.
        TombstoneIsHeeded,
        /// Broken: messages for a region that a split is yet to create are dropped.
        EarlyMessagesAreKept,
        /// Broken: the data of a removed peer is left on the disk.
        RemovedDataIsDeleted,
        /// Broken: a peer that was removed while it was away is not told so.
        RemovedPeerIsTold,
        /// Broken: whoever holds the delegate of a removed peer still sees its region.
        RemovedPeerIsUnseen,
        /// Broken: a leader whose split was refused waits for it for ever, and answers no read
        /// under its lease.
        RefusedSplitIsOver,

        // Snapshots.
        /// Broken: a snapshot is put over the old data, of which keys remain.
        InstallReplacesOldData,
        /// Broken: the files of a snapshot stay in `snap/` when it is installed.
        InstalledFilesAreRemoved,
        /// Broken: it is not recorded that data came by a snapshot. If a crash comes before the log
        /// knows, the store takes its log for damaged.
        InstallationIsRecorded,
        /// Broken: a store takes a snapshot of keys that another of its regions holds.
        SnapshotNeedsFreeRange,
        /// Broken: a snapshot that arrived counts as lost, so that another is sent with every
        /// heartbeat while it is being installed.
        DeliveredSnapshotIsAwaited,

        // Reads and leases.
        /// Broken: a leader goes on to read under its lease while it hands its leadership over.
        LeaseEndsWithTransfer,
        /// Broken: a leader goes on to read under its lease after it has proposed a split.
        LeaseEndsWithSplit,
        /// Broken: a follower's view is taken to be as far as the follower was told that it is.
        ViewTellsHowFarItIs,
        /// Broken: a read is answered before the index that was confirmed for it is applied.
        ConfirmedReadWaits,
        /// Broken: a follower shows what its leader has not applied yet.
        FollowerReadsNoFurtherThanLeader,
        /// Broken: a read under a lease does not look again at the region's range when it has its
        /// view.
        LeaseReadLooksTwice,

        // What requests mean.
        /// Broken: a time to live is not stored.
        TimeToLiveIsStored,
        /// Broken: a value that has expired is still read.
        ExpiredValueIsGone,

        // The client.
        /// Broken: a scan goes on behind the bound of a region, and misses the key that equals it.
        ScanGoesOnAtTheBound,
        /// Broken: a scan backwards misses the first key of each region.
        ReverseScanReachesTheBound,
        /// Broken: the delete of a range misses the first key of each further region.
        DeleteRangeGoesOnAtTheBound,
        /// Broken: each further page of a scan lacks its first key.
        PagesLeaveNoGap,
        /// Broken: a batch of which a part was written fails as if nothing was.
        PartOfBatchIsUnknown,
        /// Broken: the delete of a range of which a part is gone fails as if nothing was.
        PartOfRangeIsUnknown,
        /// Broken: a write whose outcome is unknown is sent again under another tag.
        AttemptsShareOneTag,
        /// Broken: a write that may have happened ends as if it had not.
        UnknownWriteEndsAsUnknown,
        /// Broken: a compare-and-swap whose outcome is unknown is sent again.
        SwapIsSentOnce,
        /// Broken: a request that was not answered in time counts as not sent.
        LateAnswerIsUnknown,
        /// Broken: the client keeps its view of a region when a store says that it is outdated.
        EpochErrorCorrectsCache,

        // The placement driver.
        /// Broken: ids of a window are handed out before the window is durable.
        IdsAfterTheirWindow,
        /// Broken: timestamps of a window are handed out before the window is durable.
        TimestampsAfterTheirWindow,
        /// Broken: a new leader hands out the ids again that the one before may have given.
        IdsGoOnBehindTheWindow,
        /// Broken: timestamps follow the wall clock, also back.
        TimestampsGoForward,
        /// Broken: ids and timestamps are handed out without a look at the lease.
        HandedOutUnderLease,
        /// Broken: a write of placement's state succeeds in another term than its leader's.
        StateIsWrittenInItsTerm,
        /// Broken: a new replica is placed where the region has one already.
        OneReplicaOnAStore,
        /// Broken: replicas on lost stores are not replaced.
        LostStoreIsLeft,
        /// Broken: a voter is removed before its successor votes.
        SuccessorVotesFirst,
        /// Broken: an older report of a region takes the place of a newer one.
        NewerEpochWins,
        /// Broken: an operator goes on when somebody else has changed the region's members.
        OperatorKnowsItsMembers,
        /// Broken: an order that was lost is not sent again.
        OrderIsSentAgain,
        /// Broken: a store starts with an older copy of its directory.
        OlderCopyIsRefused,
    }

    impl Bug {
        /// The bug of this name.
        #[must_use]
        pub fn named(name: &str) -> Option<Bug> {
            Bug::ALL.iter().copied().find(|bug| bug.name() == name)
        }
    }

    /// In the environment: the rule that is broken on every thread, until the thread chooses.
    pub const VARIABLE: &str = "ESKER_BROKEN_RULE";

    thread_local! {
        static BROKEN: Cell<Option<Bug>> = Cell::new(of_process());
    }

    /// The bug that the whole process was started with.
    fn of_process() -> Option<Bug> {
        static BUG: OnceLock<Option<Bug>> = OnceLock::new();
        *BUG.get_or_init(|| {
            let name = std::env::var(VARIABLE).ok()?;
            Some(Bug::named(&name).unwrap_or_else(|| panic!("there is no rule {name}")))
        })
    }

    /// Gives everything on this thread the bug, or none.
    pub fn break_with(bug: Option<Bug>) {
        BROKEN.set(bug);
    }

    /// Whether this thread has the bug.
    #[must_use]
    #[inline]
    pub fn is_broken(bug: Bug) -> bool {
        BROKEN.get() == Some(bug)
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn a_bug_is_found_by_its_name_and_is_its_threads_alone() {
            for bug in Bug::ALL {
                assert_eq!(Bug::named(bug.name()), Some(*bug));
            }
            assert_eq!(Bug::named("NoSuchRule"), None);
            break_with(Some(Bug::LogIsSynced));
            assert!(crate::broken!(LogIsSynced) && !crate::broken!(PromiseAfterSync));
            let elsewhere = std::thread::spawn(|| crate::broken!(LogIsSynced)).join();
            assert!(!elsewhere.expect("it looks"));
            break_with(None);
            assert!(!crate::broken!(LogIsSynced));
        }
    }
}
