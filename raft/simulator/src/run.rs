//! One seed from its beginning to its end, and the same actions again.

use super::action::Action;
use super::generator::{self, MILLISECOND, Theme};
use super::settle;
use super::setup::Setup;
use super::story::{Story, tell_setup};
use super::summary::Summary;
use super::violation::{Checked, Promise, Violation, catching};
use super::world::World;

/// A seed, with the length and the theme of its run.
#[derive(Clone, Copy, Debug)]
pub struct Run {
    pub seed: u64,
    /// Actions that are more than the passing of time.
    pub steps: u64,
    /// What the run stresses. The seed decides if there is no theme.
    pub theme: Option<Theme>,
}

/// What happened in a run that broke a promise: its cluster and all actions, up to the one that
/// broke the promise. If that was [`Promise::Recovers`], the recovery follows.
#[derive(Clone, Debug)]
pub struct Recording {
    pub setup: Setup,
    pub actions: Vec<Action>,
    pub violation: Violation,
    pub seed: u64,
}

impl Run {
    /// Runs the seed.
    ///
    /// # Errors
    /// The first promise that was broken.
    pub fn run(self) -> Checked<Summary> {
        catching(|| self.drive(|_| {}, |_| {}))
    }

    /// Runs the seed once more, and records everything. Returns `None` if no promise is broken.
    pub fn record(self) -> Option<Recording> {
        let mut actions = Vec::new();
        let mut count = None;
        let result = catching(|| {
            let recorded = std::cell::RefCell::new((&mut actions, &mut count));
            self.drive(
                |action| recorded.borrow_mut().0.push(action.clone()),
                |()| {
                    let mut recorded = recorded.borrow_mut();
                    *recorded.1 = Some(recorded.0.len());
                },
            )
        });
        let violation = result.err()?;
        if violation.promise == Promise::Recovers {
            actions.truncate(count.unwrap_or(actions.len()));
        }
        let (setup, _) = generator::begin(self.seed, self.theme);
        Some(Recording { setup, actions, violation, seed: self.seed })
    }

    /// Runs the seed once more as a story. `tell` gets the line that founds the cluster, then every
    /// action and its effects, until it returns `false`.
    pub fn follow(self, mut tell: impl FnMut(&str, Option<&Action>, &str) -> bool) {
        let mut actions = Vec::new();
        let _ = catching(|| self.drive(|action| actions.push(action.clone()), |()| {}));
        let (setup, _) = generator::begin(self.seed, self.theme);
        let (mut story, founding) = (Story::of(&setup), tell_setup(&setup));
        if !tell(&founding, None, "") {
            return;
        }
        for action in &actions {
            let told = catching(|| story.perform(action));
            let broken = told.is_err();
            let told = told.unwrap_or_else(|violation| format!("{violation}\n"));
            if !tell(&founding, Some(action), &told) || broken {
                return;
            }
        }
    }

    fn drive(
        self,
        mut record: impl FnMut(&Action),
        faults_end: impl FnOnce(()),
    ) -> Checked<Summary> {
        let (setup, mut generator) = generator::begin(self.seed, self.theme);
        let mut world = World::new(&setup);
        let mut steps = 0;
        while steps < self.steps {
            let action = generator.next(&world);
            record(&action);
            steps += u64::from(!matches!(action, Action::Pass(_)));
            world.execute(&action)?;
            generator.observe(&mut world, &action);
        }
        faults_end(());
        let virtual_ms = world.now() / MILLISECOND;
        let took = settle::recover(&mut world, &setup, self.seed, record)?;
        let mut summary = world.checks.summary;
        summary.runs = 1;
        summary.steps = steps;
        summary.virtual_ms = virtual_ms;
        summary.partitions = generator.partitions;
        summary.schemes = generator.schemes;
        summary.recoveries = 1;
        summary.worst_recovery_ms = took / MILLISECOND;
        summary.worst_seed = self.seed;
        Ok(summary)
    }
}
