//! What a majority agrees on. While a configuration is joint, that is a majority of each of two
//! sets of voters.

use crate::configuration::Configuration;
use crate::peer_set::PeerSet;
use crate::rules::broken;
use crate::types::PeerId;

/// Voters whose values are sorted on the stack; larger sets use the heap.
const ON_STACK: usize = 9;

/// The outcome of counting votes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Tally {
    /// Every majority that is needed has been reached.
    Won,
    /// Some majority that is needed can no longer be reached.
    Lost,
    /// It depends on the voters that have not replied.
    Open,
}

/// The highest value that a majority of the voters has reached: in a joint
/// configuration a majority of the old and one of the new.
///
/// # Panics
/// If there are no voters: a group without voters decides nothing, so the caller is wrong.
pub fn reached<T: Ord + Copy + Default>(
    configuration: &Configuration,
    value: impl Fn(PeerId) -> T,
) -> T {
    let incoming = majority(&configuration.voters, &value);
    let outgoing = majority(&configuration.voters_outgoing, &value);
    match (incoming, outgoing) {
        (Some(incoming), Some(_)) if broken!(JointNeedsBothMajorities) => incoming,
        (Some(incoming), Some(outgoing)) => incoming.min(outgoing),
        (Some(one), None) | (None, Some(one)) => one,
        (None, None) => panic!("a group without voters cannot reach a decision"),
    }
}

fn majority<T: Ord + Copy + Default>(voters: &PeerSet, value: impl Fn(PeerId) -> T) -> Option<T> {
    if voters.is_empty() {
        return None;
    }
    // Most groups have three voters: take the middle value, without sorting.
    if let [a, b, c] = voters.as_slice() {
        let (a, b, c) = (value(*a), value(*b), value(*c));
        return Some(a.min(b).max(a.max(b).min(c)));
    }
    let mut few = [T::default(); ON_STACK];
    let mut many;
    let values: &mut [T] = if voters.len() <= ON_STACK {
        &mut few[..voters.len()]
    } else {
        many = vec![T::default(); voters.len()];
        &mut many
    };
    for (slot, &peer) in values.iter_mut().zip(voters) {
        *slot = value(peer);
    }
    values.sort_unstable();
    // Of n sorted values, a majority is at or above the value at (n - 1) / 2.
    Some(values[(values.len() - 1) / 2])
}

/// Counts votes. `vote` returns a peer's reply, or `None` if there is none yet.
pub fn tally(configuration: &Configuration, vote: impl Fn(PeerId) -> Option<bool>) -> Tally {
    let incoming = tally_one(&configuration.voters, &vote);
    let outgoing = tally_one(&configuration.voters_outgoing, &vote);
    if broken!(JointNeedsBothMajorities) {
        return incoming;
    }
    match (incoming, outgoing) {
        (Tally::Lost, _) | (_, Tally::Lost) => Tally::Lost,
        (Tally::Won, Tally::Won) => Tally::Won,
        _ => Tally::Open,
    }
}

fn tally_one(voters: &PeerSet, vote: impl Fn(PeerId) -> Option<bool>) -> Tally {
    let needed = voters.len() / 2 + 1;
    if voters.is_empty() {
        return Tally::Won;
    }
    let (mut yes, mut no) = (0, 0);
    for &peer in voters {
        match vote(peer) {
            Some(true) => yes += 1,
            Some(false) => no += 1,
            None => {}
        }
    }
    if yes >= needed {
        Tally::Won
    } else if voters.len() - no < needed {
        Tally::Lost
    } else {
        Tally::Open
    }
}
