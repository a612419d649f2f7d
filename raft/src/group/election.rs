//! Campaigns and votes (Raft §5.2, §5.4.1), the vote before the vote
//! (dissertation §9.6), and loyalty to a live leader.

use super::Group;
use super::role::{Candidate, Follower, Role};
use crate::config::{MAX_PRIORITY_WAIT, WITNESS_WAIT};
use crate::log::{LogReadError, LogReader};
use crate::message::{CommitPoint, Message, MessageBody};
use crate::quorum::{self, Tally};
use crate::rules::broken;
use crate::types::{LogIndex, PeerId, Term, Time};

impl<R: LogReader> Group<R> {
    /// Starts a campaign as if the election timeout had passed. Does nothing while this peer leads,
    /// is bound by its promise to a live leader, or may not lead.
    pub fn campaign(&mut self, now: Time) {
        self.advance(now);
        if !self.is_loyal() && self.is_electable() {
            self.start_campaign();
        }
    }

    pub(super) fn start_campaign(&mut self) {
        if self.config.pre_vote {
            self.ask_for_pre_votes();
        } else {
            self.ask_for_votes(false);
        }
    }

    /// Whether this peer follows a live leader, or is one, and so elects no other.
    pub(super) fn is_loyal(&self) -> bool {
        self.config.check_quorum
            && !broken!(LoyaltyToLiveLeader)
            && (self.now < self.loyal_until || matches!(self.role, Role::Leader(_)))
    }

    /// Whether this peer can ever become leader in its configuration.
    pub(super) fn is_candidate_material(&self) -> bool {
        self.configuration.is_voter(self.me.peer)
    }

    /// Whether this peer votes and stores no data. A witness leads only to hand over. It must be
    /// able to lead, because an entry that a lost leader and a witness committed together may be in
    /// no other log. Then the witness refuses its vote to all others, and without it no other peer
    /// could ever be elected.
    pub(super) fn is_witness(&self) -> bool {
        self.configuration.is_witness(self.me.peer)
    }

    /// Whether this peer may campaign now. Configurations take effect when they are applied. So a
    /// peer that knows of a committed change and has not applied it would count its votes in an old
    /// configuration. That configuration may be two changes old, and share no voter with the
    /// current one. See `membership`.
    pub(super) fn is_electable(&self) -> bool {
        let changes_end = self.log.commit().min(self.log.change_horizon());
        self.is_candidate_material()
            && self.installing.is_none()
            && (self.log.applied() >= changes_end || broken!(ApplyBeforeCampaign))
    }

    fn ask_for_pre_votes(&mut self) {
        let (last_index, last_term) = self.log.last();
        self.stand(true, vec![(self.me.peer, true)]);
        let (term, commit) = (self.term.next(), self.commit_point());
        for to in self.rivals() {
            let body = MessageBody::PreVote { last_index, last_term, commit };
            self.outbox.send(Message { term, ..self.message(to, body) });
        }
        self.count_votes();
    }

    pub(super) fn ask_for_votes(&mut self, transfer: bool) {
        self.term = self.term.next();
        self.vote = Some(self.me.peer);
        // The candidate's own vote counts when it is durable, like any other.
        let own = broken!(CandidacyAfterSync).then_some((self.me.peer, true));
        self.stand(false, own.into_iter().collect());
        let ((last_index, last_term), commit) = (self.log.last(), self.commit_point());
        for to in self.rivals() {
            let body = MessageBody::Vote { last_index, last_term, transfer, commit };
            let message = self.message(to, body);
            // The request promises that this log and this vote exist. If it were sent earlier, a
            // crash could bring the candidate back in the same term with a shorter log. The
            // candidate could then be elected by replies that were meant for the longer log.
            if broken!(CandidacyAfterSync) {
                self.outbox.send(message);
                continue;
            }
            self.outbox.send_after_persist(message);
        }
    }

    fn stand(&mut self, pre: bool, votes: Vec<(PeerId, bool)>) {
        // Peers with a higher priority had their chance to go first, so a candidate waits the usual
        // time before its next attempt. Otherwise an impatient peer that cannot win could keep
        // ahead of a patient one.
        let deadline = self.deadline_after(if self.is_witness() { WITNESS_WAIT } else { 0 });
        self.drop_role(Role::Candidate(Candidate { pre, votes, deadline }));
    }

    fn rivals(&self) -> Vec<PeerId> {
        let own = self.me.peer;
        let peers = self.configuration.peers();
        peers.filter(|peer| *peer != own && self.configuration.is_voter(*peer)).collect()
    }

    /// Whether a log that ends at `last` is at least as up-to-date as ours (Raft §5.4.1).
    fn is_up_to_date(&self, last: (Term, LogIndex)) -> bool {
        let (index, term) = self.log.last();
        last >= (term, index) || broken!(VoteForCompleteLog)
    }

    /// The commit point that this peer sends to others in an election.
    pub(super) fn commit_point(&self) -> CommitPoint {
        let index = self.log.commit();
        // A read error is no reason to fail: a peer that sends no commit point is merely less
        // helpful.
        match self.log.term(index) {
            Ok(Some(term)) => CommitPoint { index, term },
            _ => CommitPoint::default(),
        }
    }

    /// Takes a commit point that another peer sent.
    pub(super) fn learn_commit(&mut self, commit: CommitPoint) -> Result<(), LogReadError> {
        let leads = matches!(self.role, Role::Leader(_));
        if leads || self.installing.is_some() || commit.index <= self.log.commit() {
            return Ok(());
        }
        if self.log.matches(commit.index, commit.term)? {
            self.log.commit_to(commit.index);
            if matches!(self.role, Role::Candidate(_)) && !self.is_electable() {
                self.become_follower(self.term, None);
            }
        }
        Ok(())
    }

    pub(super) fn on_pre_vote(&mut self, from: PeerId, term: Term, last: (Term, LogIndex)) {
        let granted = !self.is_loyal() && term > self.term && self.is_up_to_date(last);
        let term = if granted { term } else { self.term };
        let body = MessageBody::PreVoteReply { granted, commit: self.commit_point() };
        self.outbox.send(Message { term, ..self.message(from, body) });
    }

    pub(super) fn on_pre_vote_reply(&mut self, from: PeerId, term: Term, granted: bool) {
        let asked = if granted { self.term.next() } else { self.term };
        if term == asked {
            self.record_vote(true, from, granted);
        }
    }

    pub(super) fn on_vote(&mut self, from: PeerId, last: (Term, LogIndex), transfer: bool) {
        let again = self.vote == Some(from) || broken!(OneVotePerTerm);
        let free = self.vote.is_none() && self.leader().is_none() && (transfer || !self.is_loyal());
        let commit = self.commit_point();
        if (again || free) && self.is_up_to_date(last) {
            if self.vote != Some(from) {
                assert!(
                    self.vote.is_none() || broken!(OneVotePerTerm),
                    "peer {} would vote for {from} in term {} after it voted for {:?}",
                    self.me.peer,
                    self.term,
                    self.vote
                );
                self.become_follower(self.term, None);
                self.vote = Some(from);
            }
            let deadline = self.election_deadline();
            if let Role::Follower(follower) = &mut self.role {
                follower.deadline = deadline;
            }
            let reply = self.message(from, MessageBody::VoteReply { granted: true, commit });
            if broken!(VoteAfterSync) {
                return self.outbox.send(reply);
            }
            self.outbox.send_after_persist(reply);
        } else {
            let reply = self.message(from, MessageBody::VoteReply { granted: false, commit });
            self.outbox.send(reply);
        }
    }

    pub(super) fn on_vote_reply(&mut self, from: PeerId, granted: bool) {
        self.record_vote(false, from, granted);
    }

    /// Counts the candidate's own vote, if it is durable. Called when any write became durable.
    pub(super) fn count_own_vote(&mut self) {
        let own = self.me.peer;
        if self.vote == Some(own) && self.is_vote_durable() {
            self.record_vote(false, own, true);
        }
    }

    /// Whether the term, and the vote in it, are on the disk.
    pub(super) fn is_vote_durable(&self) -> bool {
        let reported = (self.reported_state.term, self.reported_state.vote);
        reported == (self.term, self.vote) && self.vote_ready <= self.persisted_ready
    }

    fn record_vote(&mut self, pre: bool, from: PeerId, granted: bool) {
        let Role::Candidate(candidate) = &mut self.role else { return };
        if candidate.pre != pre || candidate.votes.iter().any(|(peer, _)| *peer == from) {
            return;
        }
        candidate.votes.push((from, granted));
        self.count_votes();
    }

    fn count_votes(&mut self) {
        let Role::Candidate(Candidate { pre, votes, .. }) = &self.role else { return };
        let vote = |peer| votes.iter().find(|(voter, _)| *voter == peer).map(|(_, vote)| *vote);
        match (quorum::tally(&self.configuration, vote), pre) {
            (Tally::Open, _) => {}
            (Tally::Lost, _) => self.become_follower(self.term, None),
            // The members may have changed since this campaign began.
            (Tally::Won, _) if !self.is_electable() => self.become_follower(self.term, None),
            (Tally::Won, true) => self.ask_for_votes(false),
            (Tally::Won, false) => self.become_leader(),
        }
    }

    /// Follows `leader`, or nobody yet, in `term`. Keeps the election deadline if there is one:
    /// only a leader or a granted vote puts it off.
    pub(super) fn become_follower(&mut self, term: Term, leader: Option<PeerId>) {
        assert!(term >= self.term, "terms never fall: {} to {term}", self.term);
        if term > self.term {
            self.term = term;
            self.vote = None;
        } else if let (Role::Follower(follower), Some(_)) = (&self.role, leader)
            && follower.leader == leader
        {
            return;
        }
        let deadline = match &self.role {
            Role::Follower(follower) => follower.deadline,
            Role::Candidate(candidate) => candidate.deadline,
            Role::Leader(_) => self.election_deadline(),
        };
        self.drop_role(Role::Follower(Follower::new(leader, deadline)));
    }

    /// Takes another role. Reads that waited in the old role fail.
    pub(super) fn drop_role(&mut self, next: Role) {
        match std::mem::replace(&mut self.role, next) {
            Role::Follower(follower) => self.outbox.fail_reads(follower.reads.into_ids()),
            Role::Candidate(_) => {}
            Role::Leader(leader) => self.outbox.fail_reads(leader.reads.into_ids()),
        }
    }

    /// Campaigns after a [`MessageBody::TimeoutNow`], as soon as changes of members are applied.
    pub(super) fn campaign_if_asked(&mut self) {
        if let Role::Follower(Follower { asked_to_campaign: true, .. }) = self.role
            && self.is_electable()
        {
            self.ask_for_votes(true);
        }
    }

    pub(super) fn on_timeout_now(&mut self, from: PeerId) {
        let Role::Follower(follower) = &mut self.role else { return };
        if follower.leader == Some(from) {
            follower.asked_to_campaign = true;
            self.campaign_if_asked();
        }
    }

    /// Restarts the election timeout and promises to elect no other leader, because a message from
    /// the leader came.
    pub(super) fn put_off_election(&mut self) {
        self.loyal_until = self.now + self.config.election_timeout;
        let deadline = self.election_deadline();
        if let Role::Follower(follower) = &mut self.role {
            follower.deadline = deadline;
        }
    }

    pub(super) fn election_deadline(&mut self) -> Time {
        let patience = self.priority.min(0).unsigned_abs().min(MAX_PRIORITY_WAIT);
        self.deadline_after(if self.is_witness() { patience.max(WITNESS_WAIT) } else { patience })
    }

    /// A random deadline after one to two election timeouts, plus `waits` more.
    fn deadline_after(&mut self, waits: u32) -> Time {
        // Computed in whole nanoseconds, because it is needed with every message of a leader.
        let base = self.config.election_timeout;
        let base = base.as_secs() * 1_000_000_000 + u64::from(base.subsec_nanos());
        let random = self.random.below(base.max(1));
        Time(self.now.0.saturating_add(base + random + base * u64::from(waits)))
    }
}
