//! What a seed decides before a run begins: the cluster and its faults.

use std::time::Duration;

use esker_raft::{Configuration, PeerId};
use rand::RngExt as _;
use rand_chacha::ChaCha8Rng;

use super::super::setup::{PeerSetup, Setup};
use super::fault::Fault;

/// The most peers in a world.
pub const MAX_NODES: u64 = 7;

/// Rates of the slowest and the fastest clock. They are at the edge of the drift that the settings
/// allow between any two clocks, because 0.95 / 1.055 is just above nine tenths.
const RATES: (u64, u64) = (950, 1055);

/// One microsecond in nanoseconds. Everything is planned in whole microseconds, so that scripts
/// stay short.
pub const MICROSECOND: u64 = 1_000;
/// One millisecond in nanoseconds.
pub const MILLISECOND: u64 = 1_000_000;

/// A mix of faults. Each stresses something else.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Theme {
    Calm,
    Network,
    Partitions,
    Elections,
    Crashes,
    Members,
    Leases,
    Snapshots,
    Transfers,
    Disks,
    Everything,
}

impl Theme {
    pub const ALL: &[Theme] = &[
        Theme::Everything,
        Theme::Partitions,
        Theme::Members,
        Theme::Elections,
        Theme::Leases,
        Theme::Crashes,
        Theme::Disks,
        Theme::Snapshots,
        Theme::Transfers,
        Theme::Network,
        Theme::Calm,
    ];

    /// The name on the command line.
    pub fn name(self) -> String {
        format!("{self:?}").to_lowercase()
    }

    /// The theme with this name.
    pub fn named(name: &str) -> Option<Theme> {
        Theme::ALL.iter().copied().find(|theme| theme.name() == name)
    }
}

/// The parameters of a run.
#[derive(Clone, Debug)]
pub struct Profile {
    /// How long a message takes, in microseconds.
    pub delay: (u64, u64),
    /// Messages that are lost, out of a thousand.
    pub loss: u32,
    /// Messages that come twice, out of a thousand.
    pub doubled: u32,
    /// Messages that take very long, out of a thousand.
    pub late: u32,
    /// Votes and replies that take very long, out of a thousand.
    pub late_answers: u32,
    /// The longest that such a message takes, in milliseconds.
    pub latest: u64,
    /// How long a write takes, in microseconds, by node.
    pub disk: Vec<(u64, u64)>,
    /// How long it takes until entries are applied.
    pub machine: Vec<(u64, u64)>,
    /// The longest time between two operations of clients, in microseconds.
    pub clients: u64,
    /// Reads, out of a hundred operations.
    pub reads: u32,
    /// The longest time between two faults, in milliseconds.
    pub faults: u64,
    /// The weights of the faults.
    pub weights: Vec<(Fault, u32)>,
    /// How often a new leader gets a request or a fault at once, out of a hundred.
    pub greeting: u32,
    /// How often the log is compacted right after an application, out of a thousand.
    pub compacts: u32,
    /// How often a peer restarts right after it applied a change of members, out of a hundred.
    pub change_restarts: u32,
    /// The most microseconds by which a tick comes after its deadline.
    pub tick_lateness: u64,
}

/// One of the values.
pub fn pick<T: Copy>(random: &mut ChaCha8Rng, values: &[T]) -> T {
    values[random.random_range(0..values.len())]
}

/// Whether witnesses are few enough among these voters. Every majority then has a peer with data,
/// so that the committed data is always available.
pub fn may_form(members: &Configuration) -> bool {
    let few = |voters: usize, witnesses: usize| voters == 0 || witnesses < voters / 2 + 1;
    let witnesses = |incoming: bool| {
        let voters = if incoming { &members.voters } else { &members.voters_outgoing };
        voters.iter().filter(|peer| members.is_witness(**peer)).count()
    };
    few(members.voters.len(), witnesses(true))
        && few(members.voters_outgoing.len(), witnesses(false))
}

/// The cluster of a seed.
pub fn setup(random: &mut ChaCha8Rng, theme: Theme) -> Setup {
    let voters: u64 = match theme {
        Theme::Members => pick(random, &[1, 2, 3, 3, 3, 4, 5]),
        Theme::Leases => pick(random, &[1, 2, 2, 3, 3, 3, 3, 3, 3, 5]),
        Theme::Transfers => pick(random, &[2, 3, 3, 3, 5]),
        Theme::Elections | Theme::Partitions => pick(random, &[2, 3, 3, 3, 4, 5, 5, 5, 6, 7]),
        _ => pick(random, &[1, 2, 3, 3, 3, 3, 4, 5, 5, 6, 7]),
    };
    let spare = MAX_NODES - voters;
    let learners = if random.random_bool(0.2) { random.random_range(0..=spare.min(2)) } else { 0 };
    let spare = spare - learners;
    let fresh = random.random_bool(0.2);
    let new = match theme {
        _ if fresh => 0,
        Theme::Members | Theme::Everything | Theme::Snapshots => {
            random.random_range(spare.min(1)..=spare.min(4))
        }
        Theme::Leases => random.random_range(0..=spare.min(2)),
        _ => 0,
    };
    let mut members = Configuration::of_voters((1..=voters).map(PeerId));
    members.learners = (voters + 1..=voters + learners).map(PeerId).collect();
    if voters > 1 && random.random_bool(0.4) {
        let most = if voters > 4 && random.random_bool(0.3) { 2 } else { 1 };
        members.witnesses = (voters + 1 - most..=voters).map(PeerId).collect();
    }
    let mut setup = Setup { members, fresh, ..Setup::default() };
    let config = &mut setup.config;
    config.heartbeat_interval = Duration::from_millis(pick(random, &[10, 20, 20, 50]));
    config.max_append_bytes = pick(random, &[1, 1, 100, 400, 1 << 20]);
    config.max_inflight_messages = pick(random, &[1, 2, 4, 64]);
    config.max_inflight_bytes = pick(random, &[100, 1000, 1 << 20]);
    config.max_entry_cache_bytes = pick(random, &[0, 300, 1 << 20]);
    config.max_uncommitted_bytes = pick(random, &[100, 4000, 1 << 20]);
    config.pre_vote = random.random_bool(0.75);
    config.check_quorum = theme == Theme::Leases || random.random_bool(0.8);
    setup.lazy_sync = random.random_bool(0.5);
    let exact = random.random_bool(0.2);
    setup.peers = (1..=voters + learners + new)
        .map(|id| {
            let mut peer = PeerSetup::plain(PeerId(id));
            peer.seed = random.random_range(0..1_000_000);
            let (slowest, fastest) = RATES;
            peer.rate = match random.random_range(0..4) {
                _ if exact => peer.rate,
                0 => slowest,
                1 => fastest,
                2 => random.random_range(slowest..=fastest),
                _ => peer.rate,
            };
            peer.ahead = random.random_range(0..10_000) * MILLISECOND;
            // Without pre-votes, if only a patient peer can win, it may forever be a term behind an
            // impatient one that cannot.
            if random.random_bool(0.1) && config.pre_vote {
                peer.priority = -random.random_range(1..=2);
            }
            peer
        })
        .collect();
    setup
}

/// How fast a disk or a machine is, in microseconds.
fn speed(random: &mut ChaCha8Rng, slow: bool) -> (u64, u64) {
    if slow {
        pick(random, &[(50, 500), (1_000, 8_000), (5_000, 40_000), (20_000, 120_000)])
    } else {
        pick(random, &[(10, 100), (10, 100), (50, 500), (200, 2_000), (1_000, 8_000)])
    }
}

/// The faults of a seed.
pub fn profile(random: &mut ChaCha8Rng, theme: Theme, nodes: usize) -> Profile {
    use Fault::*;
    let fast = theme == Theme::Leases;
    let delay = match theme {
        Theme::Leases => pick(random, &[(20, 300), (50, 600)]),
        _ => pick(random, &[(20, 300), (100, 2_000), (200, 6_000), (100, 12_000)]),
    };
    let slow = theme == Theme::Disks;
    let mut speeds = |slow| (0..nodes).map(|_| speed(random, slow)).collect::<Vec<_>>();
    let mut disk = speeds(slow);
    let mut machine = speeds(slow || theme == Theme::Members);
    if fast {
        disk.fill((10, 150));
        machine.fill((10, 150));
        for speed in &mut machine {
            if random.random_bool(0.2) {
                *speed = pick(random, &[(200, 2_000), (1_000, 8_000), (5_000, 40_000)]);
            }
        }
    }
    let mut profile = Profile {
        delay,
        loss: pick(random, &[0, 0, 10, 40]),
        doubled: pick(random, &[0, 20]),
        late: pick(random, &[0, 0, 10]),
        late_answers: pick(random, &[0, 0, 20]),
        latest: pick(random, &[30, 150, 400]),
        disk,
        machine,
        clients: pick(random, &[2_000, 8_000, 20_000]),
        reads: pick(random, &[20, 50]),
        faults: pick(random, &[40, 100]),
        weights: vec![(Compact, 1), (Save, 1), (Slow, 1)],
        greeting: 30,
        compacts: pick(random, &[0, 0, 0, 20, 300]),
        change_restarts: pick(random, &[0, 10, 30]),
        tick_lateness: pick(random, &[1, 1_000, 20_000]),
    };
    let more: &[(Fault, u32)] = match theme {
        Theme::Calm => {
            profile.loss = 0;
            profile.late = 0;
            profile.greeting = 0;
            profile.change_restarts = 0;
            &[(Transfer, 1)]
        }
        Theme::Network => {
            profile.loss = pick(random, &[50, 150, 300]);
            profile.doubled = pick(random, &[20, 200]);
            profile.late = pick(random, &[20, 100]);
            &[(Unreachable, 3), (CutLink, 2), (Campaign, 1)]
        }
        Theme::Partitions => &[
            (Partition, 3),
            (CutLink, 2),
            (LongLink, 1),
            (IsolateLeader, 5),
            (Heal, 2),
            (Campaign, 2),
            (DeposedTrap, 3),
        ],
        Theme::Elections => {
            profile.late_answers = pick(random, &[0, 100, 300]);
            profile.faults = pick(random, &[20, 50]);
            &[
                (CampaignTwo, 4),
                (Campaign, 2),
                (IsolateLeader, 4),
                (CrashLeader, 3),
                (CrashVoter, 4),
                (CrashSender, 2),
                (DeposedTrap, 6),
            ]
        }
        Theme::Crashes => &[
            (Crash, 4),
            (CrashLeader, 4),
            (CrashAll, 1),
            (CrashVoter, 2),
            (CrashSender, 3),
            (IsolateLeader, 1),
        ],
        Theme::Members => {
            profile.faults = pick(random, &[10, 30]);
            &[
                (Change, 12),
                (ChangeTwice, 4),
                (Farewell, 2),
                (IsolateLeader, 2),
                (Crash, 1),
                (Campaign, 2),
                (CrashLeader, 1),
                (Transfer, 1),
            ]
        }
        Theme::Leases => {
            profile.loss = pick(random, &[0, 0, 10]);
            profile.late = 0;
            profile.clients = pick(random, &[8_000, 20_000]);
            profile.reads = 60;
            profile.faults = 100;
            profile.tick_lateness = pick(random, &[1, 200]);
            if random.random_bool(0.5) {
                profile.weights.extend([(Change, 6), (Farewell, 4), (CrashSender, 2)]);
            } else {
                profile.change_restarts = 0;
                profile.machine.fill((10, 150));
            }
            &[
                (LeaseTrap, 8),
                (LoyaltyTrap, 8),
                (TransferTrap, 4),
                (Campaign, 2),
                (Transfer, 1),
                (Crash, 1),
            ]
        }
        Theme::Snapshots => {
            profile.faults = pick(random, &[10, 30]);
            &[
                (Compact, 8),
                (Crash, 2),
                (CutLink, 3),
                (IsolateLeader, 1),
                (LongCut, 3),
                (LongLink, 2),
                (Change, 2),
            ]
        }
        Theme::Transfers => &[(Transfer, 4), (TransferTrap, 5), (IsolateLeader, 1), (Campaign, 1)],
        Theme::Disks => &[
            (Slow, 4),
            (IsolateLeader, 3),
            (Crash, 2),
            (CrashLeader, 2),
            (Campaign, 3),
            (CampaignTwo, 1),
        ],
        Theme::Everything => &[
            (Partition, 2),
            (CutLink, 2),
            (IsolateLeader, 3),
            (Heal, 1),
            (Crash, 2),
            (CrashLeader, 2),
            (CrashAll, 1),
            (CrashVoter, 1),
            (Campaign, 2),
            (CampaignTwo, 1),
            (Transfer, 2),
            (TransferTrap, 1),
            (Change, 4),
            (ChangeTwice, 1),
            (Compact, 3),
            (LongCut, 1),
            (Hold, 2),
            (LeaseTrap, 1),
            (LoyaltyTrap, 1),
            (DeposedTrap, 1),
            (Farewell, 1),
            (CrashSender, 1),
            (LongLink, 1),
            (Unreachable, 1),
            (Stall, 2),
            (Slow, 1),
        ],
    };
    profile.weights.extend(more);
    if theme != Theme::Calm {
        profile.weights.push((LongLink, 1));
    }
    if theme != Theme::Calm && random.random_bool(0.3) {
        profile.weights.extend([(Hold, 3), (Stall, 2)]);
    }
    profile
}
