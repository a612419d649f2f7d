//! What a store promised it keeps, whoever lived there before.

use std::time::Duration;

use esker_model::{Epoch, KeyRange, LogIndex, Peer, PeerChange, RegionId, Role, StoreId, Term};
use esker_raft::{CommitPoint, GroupId, Message, MessageBody};
use esker_raftstore::Admin;
use esker_raftstore::envelope::{Address, Consensus, Content};
use esker_rpc::proto::esker::RaftMessage;

use crate::cluster::{Cluster, peer};

/// Store 3 had a peer of region 1 and lost it; store 2 is not cut off.
fn with_a_tombstone_on_store_3() -> Cluster {
    let mut cluster = Cluster::replicated();
    cluster.transfer(1, 1);
    cluster.put("a", "1");
    cluster.await_agreement(&[1, 2, 3]);
    let gone = *cluster.region_on(1, 1).unwrap().peer_on(StoreId(3)).unwrap();
    cluster.admin(1, &Admin::ChangePeers(vec![PeerChange::Remove(gone.into())]));
    cluster.run_until("store 3 holds nothing", |cluster| {
        cluster.region_on(3, 1).is_none() && cluster.contents(3).is_empty()
    });
    cluster
}

/// A request for the vote of `to`, from a member of region 1 with a full log.
fn vote_request(cluster: &Cluster, from: Peer, to: Peer, term: u64) -> RaftMessage {
    let region = cluster.region_on(1, 1).unwrap();
    // As the members know it that have applied the newcomer's addition.
    let epoch = Epoch { conf_ver: region.epoch.conf_ver + 1, ..region.epoch };
    let message = Message {
        group: GroupId(1),
        from: from.id,
        to: to.id,
        term: Term(term),
        body: MessageBody::Vote {
            last_index: LogIndex(1000),
            last_term: Term(term - 1),
            transfer: false,
            commit: CommitPoint::default(),
        },
    };
    let consensus = Consensus { message, applied: LogIndex(0), creates: Some(KeyRange::all()) };
    let address = Address { region: RegionId(1), from, to, epoch };
    address.with(Content::Consensus(Box::new(consensus)))
}

/// Asks store 3 alone; whether it gives its vote.
fn asks(cluster: &mut Cluster, request: RaftMessage) -> Option<bool> {
    let sent = cluster.machines[&StoreId(3)].sent.clone();
    sent.listen();
    cluster.store(3).handle.raft_message(request);
    cluster.settle();
    sent.listen().iter().find_map(|reply| {
        let Content::Consensus(reply) = &reply.content else { return None };
        match reply.message.body {
            MessageBody::VoteReply { granted, .. } => Some(granted),
            _ => None,
        }
    })
}

#[test]
fn a_voter_that_nobody_has_filled_yet_keeps_its_vote_over_a_restart() {
    let mut cluster = with_a_tombstone_on_store_3();
    let region = cluster.region_on(1, 1).unwrap();
    let on = |store| *region.peer_on(StoreId(store)).unwrap();
    let newcomer = peer(cluster.allocate(), 3);
    // From here on only the requests below reach it.
    cluster.isolate(3);
    let first = vote_request(&cluster, on(1), newcomer, 50);
    assert_eq!(asks(&mut cluster, first), Some(true), "an empty voter votes");
    cluster.crash(3);
    cluster.start(StoreId(3));
    // It stays loyal for an election timeout after a start.
    cluster.run(Duration::from_secs(3));
    let second = vote_request(&cluster, on(2), newcomer, 50);
    assert_eq!(asks(&mut cluster, second), Some(false), "it voted twice in term 50");
    let again = vote_request(&cluster, on(1), newcomer, 50);
    assert_eq!(asks(&mut cluster, again), Some(true), "it forgot whom it voted for");
}

#[test]
fn a_removal_and_an_addition_on_one_store_in_one_change_let_the_newcomer_in() {
    let mut cluster = Cluster::replicated();
    cluster.transfer(1, 1);
    cluster.put("a", "1");
    let old = *cluster.region_on(1, 1).unwrap().peer_on(StoreId(3)).unwrap();
    let learner = Peer { role: Role::Learner, ..old };
    cluster.admin(1, &Admin::ChangePeers(vec![PeerChange::AddLearner(learner.into())]));
    cluster.await_agreement(&[1, 2, 3]);
    let newcomer = Peer { role: Role::Learner, ..peer(cluster.allocate(), 3) };
    let both = vec![PeerChange::Remove(learner.into()), PeerChange::AddLearner(newcomer.into())];
    cluster.admin(1, &Admin::ChangePeers(both));
    cluster.run_until("the newcomer holds the data", |cluster| {
        let here = cluster.region_on(3, 1).and_then(|region| region.peer_on(StoreId(3)).copied());
        here.is_some_and(|here| here.id == newcomer.id) && cluster.local(3, "a").is_some()
    });
    // It is a member like any other: it can be promoted, and outlives a restart.
    let voter = Peer { role: Role::Voter, ..newcomer };
    cluster.admin(1, &Admin::ChangePeers(vec![PeerChange::AddVoter(voter.into())]));
    cluster.crash(3);
    cluster.start(StoreId(3));
    cluster.put("b", "2");
    cluster.await_agreement(&[1, 2, 3]);
}

#[test]
#[should_panic(expected = "claims to lead term")]
fn a_store_that_sees_two_leaders_of_one_term_stops() {
    let mut cluster = Cluster::replicated();
    cluster.transfer(1, 1);
    cluster.put("a", "1");
    cluster.await_agreement(&[1, 2, 3]);
    let region = cluster.region_on(1, 1).unwrap();
    let on = |store| *region.peer_on(StoreId(store)).unwrap();
    let term = cluster.status(3, 1).unwrap().term;
    let (liar, to) = (on(2), on(3));
    let message = Message {
        group: GroupId(1),
        from: liar.id,
        to: to.id,
        term,
        body: MessageBody::Heartbeat { commit: LogIndex(0), stamp: Default::default() },
    };
    let consensus = Consensus { message, applied: LogIndex(0), creates: None };
    let address = Address { region: RegionId(1), from: liar, to, epoch: region.epoch };
    let message = address.with(Content::Consensus(Box::new(consensus)));
    cluster.store(3).handle.raft_message(message);
    cluster.settle();
}
