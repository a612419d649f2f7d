//! The recovery after the faults. When all peers are up, the network loses nothing and disks are
//! fast, a group must work again within a bounded time.

use esker_raft::{ConfChange, LogIndex, Payload, PeerId, RoleKind, Term};
use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use super::action::Action;
use super::checks::is_majority;
use super::generator::{Generator, MILLISECOND};
use super::setup::Setup;
use super::story::{members, padded};
use super::violation::{Checked, Promise, Violation};
use super::world::{Effect, World};

/// The longest that a recovery may take, in virtual milliseconds. This is sixty election timeouts,
/// about twice the worst that was seen in forty thousand seeds. Slow recoveries have no pre-votes,
/// and removed peers that go on campaigning.
pub const RECOVERY_LIMIT: u64 = 6_000;

/// How often the group is checked, in virtual time.
const INTERVAL: u64 = 2 * MILLISECOND;

/// The first id of the reads that a recovery makes, above all other ids.
const OURS: u64 = 1 << 40;

/// What the recovery has seen so far.
#[derive(Default)]
struct Progress {
    /// The proposer of a write, and the index and term of its entry.
    write: Option<(PeerId, LogIndex, Term)>,
    /// How many reads were answered before ours.
    reads_before: Option<u64>,
    tries: u64,
    /// Whether a link stays cut, so that not all peers reach each other.
    around: bool,
}

/// Lets the world recover. Returns how much virtual time that took.
///
/// # Errors
/// [`Promise::Recovers`] if it took too long, or another promise that was broken.
pub fn recover(
    world: &mut World,
    setup: &Setup,
    seed: u64,
    mut record: impl FnMut(&Action),
) -> Checked<u64> {
    let broken = broken_link(world, seed);
    world.checks.summary.around += u64::from(broken.is_some());
    let mut generator = Generator::calm(seed, setup, world, broken);
    let begin = world.now();
    let mut look_at = begin;
    let mut progress = Progress { around: broken.is_some(), ..Progress::default() };
    while world.now() - begin < RECOVERY_LIMIT * MILLISECOND {
        let action = if world.now() >= look_at {
            look_at = world.now() + INTERVAL;
            match progress.next(world) {
                Some(Step::Done) => return Ok(world.now() - begin),
                Some(Step::Do(action)) => action,
                None => generator.next(world),
            }
        } else {
            generator.next(world)
        };
        record(&action);
        let effect = world.execute(&action)?;
        progress.learn(&action, &effect);
        generator.observe(world, &action);
    }
    if is_hopeless(world) {
        world.checks.summary.hopeless += 1;
        return Ok(0);
    }
    let states: Vec<_> = world.nodes.iter().map(describe).collect();
    let cut = broken.map(|(one, other)| (world.nodes[one].id, world.nodes[other].id));
    let cut = cut.map(|(one, other)| format!(", the link between {one} and {other} cut"));
    let (cut, states) = (cut.unwrap_or_default(), states.join("; "));
    let sentence = format!("the group did not recover in {RECOVERY_LIMIT} ms{cut}: {states}");
    Err(Violation { promise: Promise::Recovers, sentence })
}

/// A link that stays cut, or none. Without one of its ends, the others are still a majority and
/// reach each other, and one of them has everything that is committed.
fn broken_link(world: &World, seed: u64) -> Option<(usize, usize)> {
    let mut random = ChaCha8Rng::seed_from_u64(!seed);
    let latest = world.nodes.iter().max_by_key(|node| node.machine.index)?;
    let members = &latest.machine.configuration;
    let changes = world.nodes.iter().flat_map(|node| node.mirror.iter());
    let changes = changes.filter(|entry| matches!(entry.payload, Payload::Change(_)));
    let changing = changes.map(|entry| entry.index).max() > Some(latest.machine.index);
    if random.random_bool(0.4) || members.is_joint() || changing {
        return None;
    }
    let nodes = &world.nodes;
    let voters: Vec<_> = (0..nodes.len()).filter(|at| members.is_voter(nodes[*at].id)).collect();
    let committed = world.checks.max_committed();
    let is_complete = |at: usize| {
        nodes[at].machine.has_data && world.checks.agrees_up_to(&nodes[at]) >= committed
    };
    let mut any = |from: &[usize]| match from.len() {
        0 => None,
        all => Some(from[random.random_range(0..all)]),
    };
    let of = |wanted: &dyn Fn(usize) -> bool| -> Vec<usize> {
        voters.iter().copied().filter(|at| wanted(*at)).collect()
    };
    // The link that is missed most: between a witness that may lead, and a peer that has
    // everything.
    let one = any(&of(&|at| members.is_witness(nodes[at].id))).or_else(|| any(&voters))?;
    let other = any(&of(&|at| at != one && is_complete(at))).or_else(|| any(&voters))?;
    let goes_on_without = |end: usize| {
        is_majority(members, |peer| peer != nodes[end].id)
            && voters.iter().any(|at| *at != end && is_complete(*at))
    };
    let goes_on = one != other && (goes_on_without(one) || goes_on_without(other));
    goes_on.then(|| (one.min(other), one.max(other)))
}

/// Whether no protocol can help this group. No voter with data has all that is committed, and a
/// witness that has it has dropped the entries that they lack. So they need a snapshot, and only a
/// peer that cannot lead, if any, could give one. That happens if the voter that had the data is
/// removed before another has caught up.
pub fn is_hopeless(world: &World) -> bool {
    let Some(latest) = world.nodes.iter().max_by_key(|node| node.machine.index) else {
        return true;
    };
    let members = &latest.machine.configuration;
    let voters = || world.nodes.iter().filter(|node| members.is_voter(node.id));
    let committed = world.checks.max_committed();
    let with_data = voters().filter(|node| node.machine.has_data);
    let furthest = with_data.map(|node| world.checks.agrees_up_to(node));
    let furthest = furthest.max().unwrap_or_default();
    let dropped = |node: &&super::driver::Node| node.disk.borrow().log.compacted().0;
    let witnesses = voters().filter(|node| !node.machine.has_data);
    let dropped = witnesses.map(|node| dropped(&node)).max().unwrap_or_default();
    furthest < committed && furthest < dropped
}

enum Step {
    Do(Action),
    Done,
}

impl Progress {
    /// The next request to the group, or `Done` when there is nothing left to ask.
    fn next(&mut self, world: &World) -> Option<Step> {
        let at = world.leader()?;
        let node = &world.nodes[at];
        let (peer, group) = (node.id, node.group.as_ref()?);
        let members = group.configuration();
        if !node.machine.has_data {
            return None;
        }
        if members.is_joint() {
            // A group that does not leave the joint configuration by itself is asked to.
            let told = members.auto_leave || group.has_pending_change();
            let change = ConfChange::default();
            return (!told).then_some(Step::Do(Action::Change { peer, change }));
        }
        self.tries += 1;
        let Some((proposer, index, term)) = self.write else {
            let command = padded(&format!("r{}", self.tries), 0);
            return Some(Step::Do(Action::Propose { peer, command }));
        };
        if (proposer, term) != (peer, group.term()) {
            self.write = None;
            return None;
        }
        let checks = &world.checks.summary;
        let reads = checks.reads_at_leaders + checks.reads_at_followers;
        let before = *self.reads_before.get_or_insert(reads);
        if reads == before {
            // The read is asked again until it is answered, because a change of leader may lose
            // one.
            let again = self.tries % 10 == 2;
            let read = Action::Read { peer, id: OURS + self.tries };
            return again.then_some(Step::Do(read));
        }
        let there = |peer| world.node(peer).is_some_and(|other| other.machine.index >= index);
        if self.around {
            return is_majority(members, there).then_some(Step::Done);
        }
        let same =
            |peer| world.node(peer).is_some_and(|other| other.machine.index == node.machine.index);
        (members.peers().all(there) && members.peers().all(same)).then_some(Step::Done)
    }

    fn learn(&mut self, action: &Action, effect: &Effect) {
        if let (Action::Propose { peer, .. }, Effect::Proposed(index, term)) = (action, effect) {
            self.write = Some((*peer, *index, *term));
        }
    }
}

fn describe(node: &super::driver::Node) -> String {
    let Some(group) = &node.group else { return format!("{} is down", node.id) };
    let leads = if group.role() == RoleKind::Leader { " and leads" } else { "" };
    format!(
        "{} ({}) is in term {}{leads}, has {}..{}, committed {}, applied {}",
        node.id,
        members(group.configuration()),
        group.term(),
        group.first_index(),
        group.last_index(),
        group.commit_index(),
        group.applied_index()
    )
}
