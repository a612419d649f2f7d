//! Cutting a failing run down to what a person can read (Zeller's delta debugging). Parts of the
//! run are left out for as long as the rest still breaks the same promise.
//!
//! A message is identified by the step that sent it, or else by its content, not by its place in a
//! queue. Places shift when anything before them is left out. At the end every message has a place
//! again.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::mem::discriminant;
use std::time::{Duration, Instant};

use esker_raft::{AppendOutcome, Message, MessageBody};

use super::action::Action;
use super::run::Recording;
use super::settle;
use super::story::{tell_action, tell_setup};
use super::violation::{Promise, Violation, catching};
use super::world::{Effect, World};

/// The most runs that one cut may take.
pub const MAX_RUNS: u32 = 50_000;

/// The longest time that one cut may take.
pub const MAX_TIME: Duration = Duration::from_secs(60);

/// A hash of a message's content, with its term and without.
type Said = (u64, u64);

/// A recorded step, and the number of the message among those that the step sent.
type Origin = (usize, u64);

/// The message that a step involves.
#[derive(Clone, Copy, Debug)]
struct About {
    origin: Origin,
    said: Said,
}

#[derive(Clone, Debug)]
struct Step {
    /// The step's number in the recording.
    number: usize,
    action: Action,
    about: Option<About>,
}

/// Which step sent which message, by the message's serial, and the other way round.
#[derive(Default)]
struct Origins {
    serials: HashMap<Origin, u64>,
    origins: HashMap<u64, Origin>,
}

impl Origins {
    /// Notes that this step sent everything that was sent since the last call.
    fn note(&mut self, world: &mut World, number: usize) {
        for (ordinal, posted) in (0..).zip(world.posted.drain(..)) {
            self.serials.insert((number, ordinal), posted.serial);
            self.origins.insert(posted.serial, (number, ordinal));
        }
    }
}

fn said(message: &Message) -> Said {
    let mut hasher = DefaultHasher::new();
    discriminant(&message.body).hash(&mut hasher);
    match &message.body {
        MessageBody::Append { prev_index, entries, .. } => {
            (prev_index, entries.len()).hash(&mut hasher);
        }
        MessageBody::AppendReply { outcome, .. } => match outcome {
            AppendOutcome::Accepted { match_index } => (true, match_index).hash(&mut hasher),
            AppendOutcome::Rejected { prev_index, .. } => (false, prev_index).hash(&mut hasher),
        },
        MessageBody::VoteReply { granted, .. } | MessageBody::PreVoteReply { granted, .. } => {
            granted.hash(&mut hasher);
        }
        MessageBody::InstallSnapshot { meta, .. } => meta.index.hash(&mut hasher),
        _ => {}
    }
    let loosely = hasher.finish();
    message.term.hash(&mut hasher);
    (hasher.finish(), loosely)
}

/// The action with the position that its message has now, if there is such a message.
fn place(world: &World, origins: &Origins, step: &Step) -> Option<Action> {
    let mut action = step.action.clone();
    if let (
        Action::Deliver { from, to, at }
        | Action::Drop { from, to, at }
        | Action::Again { from, to, at },
        Some(About { origin, said: (exactly, loosely) }),
    ) = (&mut action, step.about)
    {
        let queue = world.queue(world.at(*from)?, world.at(*to)?);
        let serial = origins.serials.get(&origin);
        let same = serial.and_then(|it| queue.iter().position(|parcel| parcel.serial == *it));
        let find = |wanted: &dyn Fn(Said) -> bool| {
            queue.iter().position(|parcel| wanted(said(&parcel.message)))
        };
        *at = same
            .or_else(|| find(&|said| said.0 == exactly))
            .or_else(|| find(&|said| said.1 == loosely))?;
    }
    Some(action)
}

/// Runs steps until one breaks a promise. Returns the violation, if there was one, how many steps
/// were taken, and the actions.
fn replay(recording: &Recording, steps: &[Step]) -> (Option<Violation>, usize, Vec<Action>) {
    let (mut taken, mut done) = (0, Vec::new());
    let result = catching(|| {
        let mut world = World::new(&recording.setup);
        let mut origins = Origins::default();
        for step in steps {
            taken += 1;
            let Some(action) = place(&world, &origins, step) else { continue };
            done.push(action.clone());
            if world.execute(&action)? == Effect::Nothing {
                done.pop();
            }
            origins.note(&mut world, step.number);
        }
        if recording.violation.promise == Promise::Recovers {
            settle::recover(&mut world, &recording.setup, recording.seed, |_| {})?;
        }
        Ok(())
    });
    (result.err(), taken, done)
}

/// Every recorded action, with the message that it involved.
fn steps_of(recording: &Recording) -> Vec<Step> {
    let mut steps = Vec::new();
    // The replay ends in a broken promise, perhaps in a panic.
    let _ = catching(|| {
        let mut world = World::new(&recording.setup);
        let mut origins = Origins::default();
        for (number, action) in recording.actions.iter().enumerate() {
            let about = match *action {
                Action::Deliver { from, to, at }
                | Action::Drop { from, to, at }
                | Action::Again { from, to, at } => {
                    let pair = world.at(from).zip(world.at(to));
                    let parcel = pair.and_then(|(from, to)| world.queue(from, to).get(at));
                    parcel.and_then(|parcel| {
                        let origin = *origins.origins.get(&parcel.serial)?;
                        Some(About { origin, said: said(&parcel.message) })
                    })
                }
                _ => None,
            };
            steps.push(Step { number, action: action.clone(), about });
            world.execute(action)?;
            origins.note(&mut world, number);
        }
        Ok(())
    });
    steps
}

/// Returns the shortest run that was found to break the same promise.
pub fn shrink(recording: &Recording) -> Recording {
    let until = Instant::now() + MAX_TIME;
    let mut cut = Cut { recording, steps: steps_of(recording), runs: 0, until };
    loop {
        let before = cut.steps.len();
        cut.drop_peers();
        cut.drop_kinds();
        cut.drop_chunks();
        cut.join_waits();
        if cut.steps.len() == before || cut.exhausted() {
            break;
        }
    }
    let (violation, _, actions) = replay(recording, &cut.steps);
    let mut short = recording.clone();
    short.actions = actions;
    short.violation = violation.unwrap_or(short.violation);
    drop_strangers(&mut short);
    short
}

/// Leaves out peers that never belong to the group, and to which nothing happens.
fn drop_strangers(recording: &mut Recording) {
    let lines: Vec<_> = recording.actions.iter().map(tell_action).collect();
    let named = |id: String| lines.iter().any(|line| line.split([' ', '=']).any(|it| it == id));
    let mut fewer = recording.clone();
    let members = &recording.setup.members;
    fewer.setup.peers.retain(|peer| members.contains(peer.id) || named(peer.id.to_string()));
    if fewer.breaks().is_some_and(|violation| violation.promise == fewer.violation.promise) {
        *recording = fewer;
    }
}

struct Cut<'a> {
    recording: &'a Recording,
    steps: Vec<Step>,
    runs: u32,
    until: Instant,
}

impl Cut<'_> {
    fn exhausted(&self) -> bool {
        self.runs >= MAX_RUNS || Instant::now() >= self.until
    }

    /// Goes on with these steps if they break the same promise. Steps after the violation are left
    /// out, too.
    fn keep_if_broken(&mut self, mut steps: Vec<Step>) -> bool {
        if self.exhausted() {
            return false;
        }
        self.runs += 1;
        let promise = &self.recording.violation.promise;
        let (violation, taken, _) = replay(self.recording, &steps);
        let same = violation.is_some_and(|violation| violation.promise == *promise);
        if same {
            steps.truncate(taken);
            self.steps = steps;
        }
        same
    }

    fn keep_without(&mut self, leave_out: impl Fn(&Action) -> bool) -> bool {
        let rest: Vec<_> =
            self.steps.iter().filter(|step| !leave_out(&step.action)).cloned().collect();
        rest.len() < self.steps.len() && self.keep_if_broken(rest)
    }

    /// Leaves out everything that involves one peer, or else everything that happens to it.
    fn drop_peers(&mut self) {
        for peer in &self.recording.setup.peers {
            if !self.keep_without(|action| action.concerns(peer.id)) {
                self.keep_without(|action| action.peer() == Some(peer.id));
            }
        }
    }

    /// Leaves out all reads, all crashes, and so on.
    fn drop_kinds(&mut self) {
        let mut kinds = Vec::new();
        for step in &self.steps {
            let kind = discriminant(&step.action);
            if !kinds.contains(&kind) {
                kinds.push(kind);
            }
        }
        for kind in kinds {
            self.keep_without(|action| discriminant(action) == kind);
        }
    }

    /// Leaves out ever smaller pieces, from the end, because the least depends on the last steps.
    fn drop_chunks(&mut self) {
        let mut size = self.steps.len().div_ceil(2);
        while size > 0 && !self.exhausted() {
            let mut end = self.steps.len();
            while end > 0 && !self.exhausted() {
                let begin = end.saturating_sub(size);
                let mut rest = self.steps[..begin].to_vec();
                rest.extend_from_slice(&self.steps[end..]);
                self.keep_if_broken(rest);
                end = begin.min(self.steps.len());
            }
            size /= 2;
        }
    }

    fn join_waits(&mut self) {
        let mut joined: Vec<Step> = Vec::new();
        for step in &self.steps {
            if let (Some(Step { action: Action::Pass(before), .. }), Action::Pass(more)) =
                (joined.last_mut(), &step.action)
            {
                *before += more;
            } else {
                joined.push(step.clone());
            }
        }
        self.keep_if_broken(joined);
    }
}

impl Recording {
    /// The promise that the actions break, as they are.
    pub fn breaks(&self) -> Option<Violation> {
        let step = |(number, action): (usize, &Action)| {
            let action = action.clone();
            Step { number, action, about: None }
        };
        let steps: Vec<_> = self.actions.iter().enumerate().map(step).collect();
        replay(self, &steps).0
    }

    /// The script that breaks the same promise, in the language of stories.
    pub fn script(&self) -> String {
        let mut script = format!("# Seed {}: {}\n\n", self.seed, self.violation);
        script += &tell_setup(&self.setup);
        script.push('\n');
        for action in &self.actions {
            script += &tell_action(action);
            script.push('\n');
        }
        if self.violation.promise == Promise::Recovers {
            script += &format!("recover {}\n", self.seed);
        }
        script + "---\n"
    }
}
