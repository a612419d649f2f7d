//! Operators: the changes that the placement driver makes to a region, step by step.
//!
//! A scheduler proposes an [`Operator`]. [`OperatorSet`] admits it when its region has none and its
//! stores have room. From then on every heartbeat of the region is compared with the current step:
//! the step is done, is to be sent, is to be waited for, or is no longer possible. Nothing is
//! remembered of what was sent. Only what leaders report counts, so a lost order is sent again, and
//! a step that was already taken in another way is not taken twice. If anybody else changed the
//! region's members, the operator ends: it was planned for the members that it saw.
//!
//! Flows in: operators, reports, the time. Flows out: orders for regions' leaders, and how
//! operators ended.

mod set;
mod step;

pub use set::{Admission, Finished, OperatorLimits, OperatorSet};
pub use step::{Progress, Step};

use std::collections::BTreeMap;
use std::fmt;

use esker_model::{PeerId, Region, RegionId, RegionReport, Role, StoreId, Time};
use esker_mutants::broken;

/// Why an operator exists, as far as limits and timeouts are concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OperatorKind {
    /// Repairs the set of replicas; may copy a region's data.
    Replica,
    /// Spreads leaders.
    Leader,
    /// Asked for by a client or an admin.
    Scatter,
}

impl OperatorKind {
    /// Milliseconds after which an operator is given up. A replica may have to be copied by a
    /// snapshot with a limited rate. A leader moves at once.
    pub fn timeout_ms(self) -> u64 {
        match self {
            Self::Replica => 10 * 60_000,
            Self::Leader | Self::Scatter => 10_000,
        }
    }
}

impl fmt::Display for OperatorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Replica => "replica",
            Self::Leader => "leader",
            Self::Scatter => "scatter",
        })
    }
}

/// Whether an operator runs, or how it ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Status {
    Running,
    Success,
    Timeout,
    /// The region is no longer as it was when the operator was planned.
    Cancelled(String),
}

/// Steps that bring one region from its present state to the wanted one.
#[derive(Clone, Debug)]
pub struct Operator {
    pub region: RegionId,
    pub kind: OperatorKind,
    /// For a person: why, and from where to where.
    pub reason: String,
    /// The version of the region's range that the operator was planned for.
    pub version: u64,
    pub created: Time,
    steps: Vec<Step>,
    current: usize,
    /// The version of the members that the operator was planned for. The id of a new peer, which is
    /// added before anything else is changed, was drawn for it: if another peer has come and gone
    /// since, its store would take no peer with a smaller id.
    conf_ver: u64,
    /// The members that the region has if nothing but the steps that are done has changed them.
    members: Members,
}

/// The role of each member, as it is when a joint configuration was left.
type Members = BTreeMap<PeerId, Role>;

fn members(region: &Region) -> Members {
    let settled = |role| match role {
        Role::IncomingVoter => Role::Voter,
        Role::DemotingVoter => Role::Learner,
        Role::Voter | Role::Learner => role,
    };
    region.peers.iter().map(|peer| (peer.id, settled(peer.role))).collect()
}

impl Operator {
    /// Plans `steps` for the region as `report` shows it.
    ///
    /// # Panics
    /// Without a step: a scheduler that has nothing to do proposes no operator.
    pub fn plan(
        report: &RegionReport,
        kind: OperatorKind,
        reason: String,
        steps: Vec<Step>,
        now: Time,
    ) -> Self {
        assert!(!steps.is_empty(), "an operator has at least one step");
        Self {
            region: report.region.id,
            kind,
            reason,
            version: report.region.epoch.version,
            conf_ver: report.region.epoch.conf_ver,
            created: now,
            steps,
            current: 0,
            members: members(&report.region),
        }
    }

    /// All steps, and the number of those that are done.
    pub fn steps(&self) -> (&[Step], usize) {
        (&self.steps, self.current)
    }

    /// The stores that the operator burdens, each once.
    pub fn stores(&self) -> Vec<StoreId> {
        let mut stores: Vec<_> = self.steps.iter().flat_map(Step::stores).collect();
        stores.sort_unstable();
        stores.dedup();
        stores
    }

    /// The target of the operator's last transfer of leadership; `None` if none is left to do.
    pub fn moves_leader_to(&self) -> Option<StoreId> {
        self.steps[self.current..].iter().rev().find_map(|step| match step {
            Step::TransferLeader { to, .. } => Some(to.store),
            _ => None,
        })
    }

    /// The store on which the operator's next replica is added; `None` if none is left to add.
    pub fn adds_replica_on(&self) -> Option<StoreId> {
        self.steps[self.current..].iter().find_map(|step| match step {
            Step::AddLearner(seat) => Some(seat.store),
            _ => None,
        })
    }

    /// The store whose replica has to do its part for the current step. `None` if the step is
    /// between the others.
    pub fn counts_on(&self) -> Option<StoreId> {
        self.steps.get(self.current).and_then(Step::counts_on)
    }

    /// Compares the operator with the report of the region's leader. Passes over the steps that are
    /// done, and returns what comes next.
    pub(crate) fn advance(&mut self, report: &RegionReport, now: Time) -> Advance {
        if report.region.epoch.version != self.version {
            return Advance::Ended(Status::Cancelled(format!(
                "the range changed: version {} became {}",
                self.version, report.region.epoch.version
            )));
        }
        while let Some(step) = self.steps.get(self.current) {
            match step.progress(report) {
                Progress::Done => {
                    step.take_effect(&mut self.members);
                    self.current += 1;
                }
                Progress::Impossible(why) => return Advance::Ended(Status::Cancelled(why)),
                _ if self.is_late(now) => return Advance::Ended(Status::Timeout),
                Progress::Wait => return Advance::Wait,
                // The learner that nobody needed may be a voter now.
                Progress::Send
                    if self.is_changed(step, &report.region)
                        && !broken!(OperatorKnowsItsMembers) =>
                {
                    let why = "somebody else changed its members".to_owned();
                    return Advance::Ended(Status::Cancelled(why));
                }
                Progress::Send => return Advance::Send(step.clone()),
            }
        }
        Advance::Ended(Status::Success)
    }

    /// Whether somebody else has changed the region's members before the next step, perhaps there
    /// and back.
    fn is_changed(&self, step: &Step, region: &Region) -> bool {
        let adds = matches!(step, Step::AddLearner(_));
        members(region) != self.members || adds && region.epoch.conf_ver != self.conf_ver
    }

    /// Whether the operator's time is over.
    pub fn is_late(&self, now: Time) -> bool {
        now.millis_since(self.created) >= self.kind.timeout_ms()
    }
}

impl fmt::Display for Operator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.reason)?;
        for (index, step) in self.steps.iter().enumerate() {
            let mark = if index < self.current { "done " } else { "" };
            let comma = if index == 0 { "" } else { "," };
            write!(f, "{comma} {mark}{step}")?;
        }
        Ok(())
    }
}

/// What comes next for an operator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Advance {
    Send(Step),
    Wait,
    Ended(Status),
}
