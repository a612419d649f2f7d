//! How a story prints things: `3@2` is the entry at index 3 of term 2.

use esker_raft::{
    AppendOutcome, ChangeStep, Configuration, Entry, Group, LogReader, Message, MessageBody,
    Payload, PeerId, PeerSet, Progress, RoleKind,
};

use super::super::action::Action;
use super::super::driver::Event;
use super::super::world::Effect;
use super::script::PADDING;

pub fn entry(entry: &Entry) -> String {
    format!("{}@{}:{}", entry.index, entry.term, payload(&entry.payload))
}

fn payload(payload: &Payload) -> String {
    match payload {
        Payload::Noop => "(begin)".into(),
        Payload::Command(command) => text(command),
        Payload::Change(change) if change.steps.is_empty() => "(leave)".into(),
        Payload::Change(change) => {
            let steps: Vec<_> = change.steps.iter().map(step).collect();
            format!("({})", steps.join(","))
        }
    }
}

/// A command as its story wrote it, without the padding.
pub fn text(command: &[u8]) -> String {
    String::from_utf8_lossy(command).trim_end_matches(PADDING).to_owned()
}

fn step(step: &ChangeStep) -> String {
    match step {
        ChangeStep::AddVoter(peer) => format!("+{peer}"),
        ChangeStep::AddLearner(peer) => format!("~{peer}"),
        ChangeStep::AddWitness(peer) => format!("?{peer}"),
        ChangeStep::Remove(peer) => format!("-{peer}"),
    }
}

fn set(peers: &PeerSet) -> String {
    let peers: Vec<_> = peers.iter().map(PeerId::to_string).collect();
    peers.join(" ")
}

pub fn members(members: &Configuration) -> String {
    let mut text = format!("voters {}", set(&members.voters));
    let more = [
        (" and ", set(&members.voters_outgoing)),
        (", learners ", set(&members.learners)),
        (", learners next ", set(&members.learners_next)),
        (", witnesses ", set(&members.witnesses)),
    ];
    for (label, peers) in more.into_iter().filter(|(_, peers)| !peers.is_empty()) {
        text += label;
        text += &peers;
    }
    text
}

pub fn status<R: LogReader>(group: &Group<R>) -> String {
    let leader = group.leader().map_or("nobody".into(), |leader| leader.to_string());
    format!(
        "{}: {} in term {}, leader {leader}, log {}..{}, durable {}, committed {}, applied {}",
        group.id(),
        role(group.role()),
        group.term(),
        group.first_index(),
        group.last_index(),
        group.persisted_index(),
        group.commit_index(),
        group.applied_index()
    )
}

fn role(role: RoleKind) -> &'static str {
    match role {
        RoleKind::Follower => "follower",
        RoleKind::PreCandidate => "pre-candidate",
        RoleKind::Candidate => "candidate",
        RoleKind::Leader => "leader",
    }
}

pub fn progress(peer: PeerId, progress: &Progress) -> String {
    let Progress { match_index, next_index, state, recently_active, .. } = progress;
    let silent = if *recently_active { "" } else { ", silent" };
    format!("{peer}: {state:?}, has {match_index}, next {next_index}{silent}").to_lowercase()
}

pub fn event(id: PeerId, event: &Event) -> Option<String> {
    Some(match event {
        Event::Role(change) if change.role == RoleKind::Follower => match change.leader {
            Some(leader) => format!("{id} follows {leader} in term {}", change.term),
            None => format!("{id} follows nobody in term {}", change.term),
        },
        Event::Role(change) => format!("{id} is {} in term {}", role(change.role), change.term),
        Event::Appended(_) | Event::Handed(..) => return None,
        Event::Applied(applied) => format!("{id} applies {}", entry(applied)),
        Event::Read(read, index) => format!("{id} may serve read {read} at {index}"),
        Event::ReadFailed(read) => format!("{id} gives up read {read}"),
        Event::SnapshotWanted(peer) => format!("{id} sends a snapshot to {peer}"),
        Event::Installed(index) => format!("{id} has installed the snapshot at {index}"),
    })
}

/// The immediate effect of an action, before the reactions of the peers.
pub fn effect(action: &Action, effect: &Effect) -> Option<String> {
    let id = action.peer()?;
    Some(match (action, effect) {
        (Action::Propose { command, .. }, Effect::Proposed(index, term)) => {
            format!("{id} proposes {} as {index}@{term}", text(command))
        }
        (Action::Propose { command, .. }, Effect::Refused(refusal)) => {
            format!("{id} refuses {}: {refusal}", text(command))
        }
        (_, Effect::Proposed(index, term)) => {
            format!("{id} proposes the change as {index}@{term}")
        }
        (_, Effect::Refused(refusal)) => format!("{id} refuses the change: {refusal}"),
        (_, Effect::Transferring(target)) => format!("{id} takes {target} for the next leader"),
        (_, Effect::TransferRefused(refusal)) => format!("{id} refuses the transfer: {refusal}"),
        (Action::Read { id: read, .. }, Effect::ReadRefused(refusal)) => {
            format!("{id} refuses read {read}: {refusal}")
        }
        (_, Effect::Leased(index)) => format!("{id} reads at {index} by its lease"),
        (Action::LeaseRead(_), Effect::Nothing) => format!("{id} may not read alone"),
        (Action::Crash { .. }, Effect::None) => format!("{id} is down"),
        (_, Effect::DoesNotStart(refusal)) => format!("{id} does not start: {refusal}"),
        _ => return None,
    })
}

fn granted(granted: bool) -> &'static str {
    if granted { "yes" } else { "no" }
}

pub fn message(message: &Message) -> String {
    let Message { from, to, term, body, .. } = message;
    let said = match body {
        MessageBody::PreVote { last_index, last_term, .. } => {
            format!("would you vote for me? My log ends at {last_index}@{last_term}")
        }
        MessageBody::Vote { last_index, last_term, transfer, .. } => {
            let by = if *transfer { ", by order of the leader" } else { "" };
            format!("vote for me! My log ends at {last_index}@{last_term}{by}")
        }
        MessageBody::PreVoteReply { granted: vote, .. } => format!("I would: {}", granted(*vote)),
        MessageBody::VoteReply { granted: vote, .. } => format!("my vote: {}", granted(*vote)),
        MessageBody::Append { prev_index, prev_term, entries, commit, .. } => {
            let entries: Vec<_> = entries.iter().map(entry).collect();
            let entries = if entries.is_empty() { "nothing".into() } else { entries.join(" ") };
            format!("append {entries} after {prev_index}@{prev_term}, committed {commit}")
        }
        MessageBody::AppendReply { outcome, .. } => match outcome {
            AppendOutcome::Accepted { match_index } => format!("accepted up to {match_index}"),
            AppendOutcome::Rejected { prev_index, hint_index, hint_term } => {
                format!("rejected after {prev_index}, try {hint_index}@{hint_term}")
            }
        },
        MessageBody::Heartbeat { commit, .. } => format!("heartbeat, committed {commit}"),
        MessageBody::Commit { commit } => format!("committed {}@{}", commit.index, commit.term),
        MessageBody::HeartbeatReply { .. } => "still with you".into(),
        MessageBody::InstallSnapshot { meta, .. } => {
            format!("snapshot at {}@{}", meta.index, meta.term)
        }
        MessageBody::TimeoutNow => "campaign now!".into(),
        MessageBody::ReadIndex { .. } => "from which index may I read?".into(),
        MessageBody::ReadIndexReply { index, .. } => format!("read at {index}"),
        MessageBody::TransferRequest { target } => format!("make {target} the leader"),
    };
    format!("  {from} → {to} [{term}] {said}")
}
