//! What comes after the faults: a group whose peers are all up, whose network
//! loses nothing and whose disks are fast must work again before long.

use esker_raft::{ConfChange, LogIndex, PeerId, RoleKind, Term};

use super::action::Action;
use super::generator::{Generator, MILLISECOND};
use super::setup::Setup;
use super::story::{members, padded};
use super::violation::{Checked, Promise, Violation};
use super::world::{Effect, World};

/// The longest that a recovery may take, in virtual milliseconds: sixty election
/// timeouts, about twice the worst that was seen in forty thousand seeds. The slow
/// ones have no pre-votes, and removed peers that go on campaigning.
pub const RECOVERY_LIMIT: u64 = 6_000;

/// How often the group is looked at, in virtual time.
const INTERVAL: u64 = 2 * MILLISECOND;

/// The name of the reads and writes that a recovery makes: above all others.
const OURS: u64 = 1 << 40;

/// What is still to be seen.
#[derive(Default)]
struct Progress {
    /// A write, where and when it was proposed, and by whom.
    write: Option<(PeerId, LogIndex, Term)>,
    /// Reads answered before ours.
    reads_before: Option<u64>,
    tries: u64,
}

/// Lets the world recover. Returns how much virtual time that took.
///
/// # Errors
/// [`Promise::Recovers`] if it took too long, or whatever else was broken.
pub fn recover(
    world: &mut World,
    setup: &Setup,
    seed: u64,
    mut record: impl FnMut(&Action),
) -> Checked<u64> {
    let mut generator = Generator::calm(seed, setup, world);
    let begin = world.now();
    let mut look_at = begin;
    let mut progress = Progress::default();
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
    let sentence =
        format!("the group did not recover in {RECOVERY_LIMIT} ms: {}", states.join("; "));
    Err(Violation { promise: Promise::Recovers, sentence })
}

/// Whether no protocol can help this group: no voter with data has all that is
/// committed, and a witness that has it has dropped what they lack, so that they
/// need a snapshot and only a peer that cannot lead, if any, could give one. It
/// comes of removing the voter that had the data before another had caught up.
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
    /// What the group is asked for next, or that there is nothing left to ask.
    fn next(&mut self, world: &World) -> Option<Step> {
        let at = world.leader()?;
        let node = &world.nodes[at];
        let (peer, group) = (node.id, node.group.as_ref()?);
        let members = group.configuration();
        if !node.machine.has_data {
            return None;
        }
        if members.is_joint() {
            // Who is not to leave by itself is told to.
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
            // Asked again until it is answered: one may be lost to a change of leader.
            let again = self.tries % 10 == 2;
            let read = Action::Read { peer, id: OURS + self.tries };
            return again.then_some(Step::Do(read));
        }
        let there = |peer| world.node(peer).is_some_and(|other| other.machine.index >= index);
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
