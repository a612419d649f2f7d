//! Actions and setups as lines of a story, and back.

use std::error::Error;
use std::fmt::Write as _;
use std::time::Duration;

use bytes::Bytes;
use esker_raft::{ChangeStep, ConfChange, Config, LeaveJoint, PeerId};
use goldenscript::Command;

use super::super::action::Action;
use super::super::setup::{PeerSetup, Setup, TRUE_RATE};
use super::words;

/// The character that pads a command to its size.
pub const PADDING: char = '.';

type Parsed<T> = Result<T, Box<dyn Error>>;

pub fn peer(text: &str) -> Parsed<PeerId> {
    Ok(PeerId(text.parse()?))
}

pub fn peers(text: &str) -> Parsed<Vec<PeerId>> {
    text.split('/').filter(|part| !part.is_empty()).map(peer).collect()
}

/// Nanoseconds: `20ms`, `1.25ms`, `3us` or `7ns`.
pub fn duration(text: &str) -> Parsed<Duration> {
    let unit = |suffix, nanos: u64| text.strip_suffix(suffix).map(|number| (number, nanos));
    let (number, nanos) = unit("ms", 1_000_000)
        .or_else(|| unit("us", 1_000))
        .or_else(|| unit("ns", 1))
        .ok_or("a duration looks like 20ms, 1.25ms, 3us or 7ns")?;
    let (whole, part) = number.split_once('.').unwrap_or((number, ""));
    let mut total = whole.parse::<u64>()? * nanos;
    let mut unit = nanos;
    for digit in part.chars() {
        unit /= 10;
        total += u64::from(digit.to_digit(10).ok_or("a digit is missing")?) * unit;
    }
    Ok(Duration::from_nanos(total))
}

/// Writes a duration in its shortest exact form.
pub fn tell_duration(nanos: u64) -> String {
    let (whole, part) = (nanos / 1_000_000, nanos % 1_000_000);
    let digits = format!("{part:06}");
    let digits = digits.trim_end_matches('0');
    if digits.is_empty() { format!("{whole}ms") } else { format!("{whole}.{digits}ms") }
}

fn list<'a>(peers: impl IntoIterator<Item = &'a PeerId>) -> String {
    let peers: Vec<_> = peers.into_iter().map(PeerId::to_string).collect();
    peers.join("/")
}

/// A peer's own value: `2/-1`.
fn own<T>(text: &str) -> Parsed<(PeerId, T)>
where
    T: std::str::FromStr,
    T::Err: Error + 'static,
{
    let (id, value) = text.split_once('/').ok_or("PEER/VALUE")?;
    Ok((peer(id)?, value.parse()?))
}

/// Reads a `cluster` line. Returns whether disks and machines wait for commands.
pub fn setup(command: &Command) -> Parsed<(Setup, bool)> {
    let mut arguments = command.consume_args();
    let mut setup = Setup::default();
    let manual = match arguments.next_pos() {
        Some("manual") => true,
        Some(other) => return Err(format!("there is no setting {other}").into()),
        None => false,
    };
    let (mut empty, mut own_settings) = (Vec::new(), Vec::new());
    let yes = |value: &str| value != "no";
    let Setup { members, config, lazy_sync, fresh, .. } = &mut setup;
    while let Some((key, value)) = arguments.next_key() {
        match key {
            "voters" => members.voters = peers(value)?.into_iter().collect(),
            "learners" => members.learners = peers(value)?.into_iter().collect(),
            "witnesses" => members.witnesses = peers(value)?.into_iter().collect(),
            "new" => empty = peers(value)?,
            "append" => config.max_append_bytes = value.parse()?,
            "entry" => config.max_entry_bytes = value.parse()?,
            "inflight" => config.max_inflight_messages = value.parse()?,
            "inflightbytes" => config.max_inflight_bytes = value.parse()?,
            "uncommitted" => config.max_uncommitted_bytes = value.parse()?,
            "cache" => config.max_entry_cache_bytes = value.parse()?,
            "heartbeat" => config.heartbeat_interval = duration(value)?,
            "prevote" => config.pre_vote = yes(value),
            "checkquorum" => config.check_quorum = yes(value),
            "lazysync" => *lazy_sync = yes(value),
            "fresh" => *fresh = yes(value),
            "priority" | "seed" | "rate" | "ahead" => own_settings.push((key, value)),
            other => return Err(format!("there is no setting {other}").into()),
        }
    }
    let founders = setup.members.peers();
    setup.peers = founders.chain(empty.iter().copied()).map(PeerSetup::plain).collect();
    setup.peers.sort_by_key(|peer| peer.id);
    for (key, value) in own_settings {
        let (id, _) = value.split_once('/').ok_or("PEER/VALUE")?;
        let id = peer(id)?;
        let it = setup.peers.iter_mut().find(|peer| peer.id == id);
        let it = it.ok_or("there is no such peer")?;
        match key {
            "priority" => it.priority = own(value)?.1,
            "seed" => it.seed = own(value)?.1,
            "rate" => it.rate = own(value)?.1,
            _ => it.ahead = u64::try_from(duration(&own::<String>(value)?.1)?.as_nanos())?,
        }
    }
    arguments.reject_next()?;
    Ok((setup, manual))
}

/// The `cluster` line that founds this cluster, in manual mode: nothing happens
/// without a command.
pub fn tell_setup(setup: &Setup) -> String {
    let mut line = String::from("cluster manual");
    let mut tell = |key: &str, value: String| {
        write!(line, " {key}={value}").expect("a string takes everything");
    };
    let Setup { members, peers, config, lazy_sync, fresh } = setup;
    let usual = Setup::default().config;
    let lists = [
        ("voters", list(&members.voters)),
        ("witnesses", list(&members.witnesses)),
        ("learners", list(&members.learners)),
        ("new", list(peers.iter().map(|peer| &peer.id).filter(|peer| !members.contains(**peer)))),
    ];
    for (key, value) in lists.into_iter().filter(|(_, value)| !value.is_empty()) {
        tell(key, value);
    }
    let sizes = |config: &Config| {
        [
            ("append", config.max_append_bytes),
            ("entry", config.max_entry_bytes),
            ("inflight", config.max_inflight_messages),
            ("inflightbytes", config.max_inflight_bytes),
            ("uncommitted", config.max_uncommitted_bytes),
            ("cache", config.max_entry_cache_bytes),
        ]
    };
    for ((key, value), (_, usual)) in sizes(config).into_iter().zip(sizes(&usual)) {
        if value != usual {
            tell(key, value.to_string());
        }
    }
    if config.heartbeat_interval != usual.heartbeat_interval {
        tell("heartbeat", tell_duration(config.heartbeat_interval.as_nanos() as u64));
    }
    for (key, no) in [("prevote", !config.pre_vote), ("checkquorum", !config.check_quorum)] {
        if no {
            tell(key, "no".into());
        }
    }
    if *lazy_sync {
        tell("lazysync", "yes".into());
    }
    if *fresh {
        tell("fresh", "yes".into());
    }
    for peer in peers {
        let PeerSetup { id, priority, seed, rate, ahead } = peer;
        if *priority != 0 {
            tell("priority", format!("{id}/{priority}"));
        }
        if *seed != id.0 {
            tell("seed", format!("{id}/{seed}"));
        }
        if *rate != TRUE_RATE {
            tell("rate", format!("{id}/{rate}"));
        }
        if *ahead != 0 {
            tell("ahead", format!("{id}/{}", tell_duration(*ahead)));
        }
    }
    line
}

/// Reads the arguments of a `change`.
pub fn change(command: &Command) -> Parsed<(PeerId, ConfChange)> {
    let mut arguments = command.consume_args();
    let id = peer(arguments.next_pos().ok_or("whom?")?)?;
    let mut change = ConfChange::default();
    while let Some((key, value)) = arguments.next_key() {
        let step = match key {
            "add" => ChangeStep::AddVoter,
            "remove" => ChangeStep::Remove,
            "learner" => ChangeStep::AddLearner,
            "witness" => ChangeStep::AddWitness,
            "leave" if value == "explicit" => {
                change.leave = LeaveJoint::Explicit;
                continue;
            }
            other => return Err(format!("{other}={value} is no step").into()),
        };
        change.steps.extend(peers(value)?.into_iter().map(step));
    }
    arguments.reject_next()?;
    Ok((id, change))
}

fn tell_change(peer: PeerId, change: &ConfChange) -> String {
    let mut line = format!("change {peer}");
    for step in &change.steps {
        let (key, peer) = match step {
            ChangeStep::AddVoter(peer) => ("add", peer),
            ChangeStep::AddLearner(peer) => ("learner", peer),
            ChangeStep::AddWitness(peer) => ("witness", peer),
            ChangeStep::Remove(peer) => ("remove", peer),
        };
        write!(line, " {key}={peer}").expect("a string takes everything");
    }
    if change.leave == LeaveJoint::Explicit {
        line += " leave=explicit";
    }
    line
}

/// A command of `size` bytes, or as long as its text if that is longer.
pub fn padded(text: &str, size: usize) -> Bytes {
    let mut command = text.as_bytes().to_vec();
    command.resize(size.max(command.len()), PADDING as u8);
    Bytes::from(command)
}

/// The line that makes this action happen in a cluster of manual peers.
pub fn tell_action(action: &Action) -> String {
    let queue =
        |word: &str, from: PeerId, to: PeerId, at: usize| format!("{word} {from} {to} at={at}");
    match action {
        Action::Pass(nanos) => format!("wait {}", tell_duration(*nanos)),
        Action::Tick(peer) => format!("tick {peer}"),
        Action::Deliver { from, to, at } => queue("deliver", *from, *to, *at),
        Action::Drop { from, to, at } => queue("drop", *from, *to, *at),
        Action::Again { from, to, at } => queue("again", *from, *to, *at),
        Action::Sync { peer, count } => format!("sync {peer} {count}"),
        Action::Apply { peer, count } => format!("apply {peer} {count}"),
        Action::Install(peer) => format!("install {peer}"),
        Action::Save(peer) => format!("save {peer}"),
        Action::Compact { peer, index } => format!("compact {peer} {index}"),
        Action::Hold(peer) => format!("hold {peer}"),
        Action::Release(peer) => format!("release {peer}"),
        Action::Propose { peer, command } => {
            let text = words::text(command);
            let size = command.len();
            let size = if size > text.len() { format!(" size={size}") } else { String::new() };
            format!("propose {peer} {text}{size}")
        }
        Action::Read { peer, id } => format!("read {peer} {id}"),
        Action::LeaseRead(peer) => format!("leaseread {peer}"),
        Action::Change { peer, change } => tell_change(*peer, change),
        Action::Transfer { peer, to: Some(to) } => format!("transfer {peer} {to}"),
        Action::Transfer { peer, to: None } => format!("transfer {peer}"),
        Action::Campaign(peer) => format!("campaign {peer}"),
        Action::Crash { peer, kept } => format!("crash {peer} {kept}"),
        Action::Restart(peer) => format!("restart {peer}"),
        Action::Unreachable { peer, other } => format!("unreachable {peer} {other}"),
    }
}
