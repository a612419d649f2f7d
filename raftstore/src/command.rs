//! What a region's log entries hold, as types, and how they are written.
//!
//! Entries outlive a process and travel between stores of different ages: `command.proto` is their
//! form, and [`Command::decode`] the only way to read it. What it returns can be carried out: each
//! mutation has a kind and a column family that are known, each tag its mutations, and the epoch is
//! there.

use bytes::Bytes;
use esker_engine::Cf;
use esker_model::{
    Epoch, KeyRange, LogIndex, NewRegion, PeerChange, PeerId, RegionId, Role, Seat, Term,
};
use esker_mutants::broken;
use esker_rpc::convert::{self, Malformed, end_key};
use esker_rpc::proto::esker::command as wire;
use esker_rpc::proto::esker::command::{admin_command, mutation};
use esker_rpc::proto::metapb;
use prost::Message as _;

pub use esker_rpc::proto::esker::command::TaggedCommand;

/// The format of entries.
const FORMAT: u32 = 1;
/// The format of entries with tagged commands: a store that does not know tags must not apply them.
const TAGGED_FORMAT: u32 = 2;

/// One change to a region's keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mutation {
    Put {
        cf: Cf,
        key: Bytes,
        value: Bytes,
    },
    Delete {
        cf: Cf,
        key: Bytes,
    },
    DeleteRange {
        cf: Cf,
        range: KeyRange,
    },
    /// Alone in its entry.
    CompareAndSwap(CompareAndSwap),
}

/// A change of one raw value that depends on the value found. It is decided when it is applied, so
/// that every replica decides alike: nothing in it depends on a local clock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CompareAndSwap {
    pub cf: Cf,
    pub key: Bytes,
    /// The live value that must be there; `None` where there must be none.
    pub expected: Option<Bytes>,
    pub then: Swap,
    /// The leader's time in seconds since 1970, by which every replica judges whether the value
    /// found has expired.
    pub now_s: u64,
}

/// What a compare-and-swap does where it finds what it expects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Swap {
    Put {
        value: Bytes,
        /// Seconds since 1970.
        expires_at: Option<u64>,
    },
    Delete,
}

impl Mutation {
    /// Bytes of the keys and values in it.
    pub fn bytes(&self) -> usize {
        match self {
            Mutation::Put { key, value, .. } => key.len() + value.len(),
            Mutation::Delete { key, .. } => key.len(),
            Mutation::DeleteRange { range, .. } => {
                range.start().len() + range.end().map_or(0, Bytes::len)
            }
            Mutation::CompareAndSwap(swap) => {
                let value = match &swap.then {
                    Swap::Put { value, .. } => value.len(),
                    Swap::Delete => 0,
                };
                swap.key.len() + swap.expected.as_ref().map_or(0, Bytes::len) + value
            }
        }
    }

    pub fn is_swap(&self) -> bool {
        matches!(self, Mutation::CompareAndSwap(_))
    }

    /// Whether all keys that it touches are in the range.
    pub fn lies_in(&self, region: &KeyRange) -> bool {
        match self.keys() {
            Keys::One(key) => region.contains(key),
            Keys::Range(range) => region.contains_range(range),
        }
    }

    /// The keys that it touches.
    pub fn keys(&self) -> Keys<'_> {
        match self {
            Mutation::Put { key, .. } | Mutation::Delete { key, .. } => Keys::One(key),
            Mutation::CompareAndSwap(swap) => Keys::One(&swap.key),
            Mutation::DeleteRange { range, .. } => Keys::Range(range),
        }
    }
}

/// The keys that a mutation touches.
#[derive(Clone, Copy, Debug)]
pub enum Keys<'a> {
    One(&'a Bytes),
    Range(&'a KeyRange),
}

/// The payload of one log entry.
#[derive(Clone, Debug, PartialEq)]
pub struct Command {
    /// The region's epoch when this was proposed. At apply, a command whose epoch no longer fits
    /// is skipped on every replica alike.
    pub epoch: Epoch,
    pub body: Body,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Body {
    /// All client commands that waited for the region.
    Write(Write),
    Split(Split),
    /// The log up to and including this entry may be dropped.
    Compact {
        index: LogIndex,
        term: Term,
    },
    /// Travels as the context of a change of members.
    ChangePeers(Vec<PeerChange>),
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Write {
    pub mutations: Vec<Mutation>,
    /// The commands among them that carry a tag, in the order of their mutations.
    pub tagged: Vec<TaggedCommand>,
    /// The leader's time in seconds since 1970, by which every replica forgets what is old. Only
    /// with tagged commands.
    pub now_s: u64,
}

/// Cuts a region at `keys` into one region more than there are keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Split {
    pub keys: Vec<Bytes>,
    /// One for each key.
    pub regions: Vec<NewRegion>,
    /// The old region keeps the rightmost part, otherwise the leftmost.
    pub right_derive: bool,
}

/// Why the bytes of an entry are no command that can be carried out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CommandError {
    #[error("it has format {found}, and this version reads format {known}")]
    Format { found: u32, known: u32 },
    #[error("{0}")]
    Decode(String),
    #[error("{0}")]
    Malformed(#[from] Malformed),
    #[error("it has no {0}")]
    Missing(&'static str),
    #[error("its column family cannot be {0}")]
    Family(u32),
    #[error("{0} contradict each other")]
    Contradiction(&'static str),
    #[error("{0}")]
    Tags(&'static str),
}

fn family(number: u32) -> Result<Cf, CommandError> {
    Cf::from_number(number).filter(|cf| *cf != Cf::Meta).ok_or(CommandError::Family(number))
}

impl TryFrom<wire::Mutation> for Mutation {
    type Error = CommandError;

    fn try_from(message: wire::Mutation) -> Result<Mutation, CommandError> {
        let kind =
            message.kind.ok_or(CommandError::Missing("kind of change that is known here"))?;
        Ok(match kind {
            mutation::Kind::Put(put) => {
                Mutation::Put { cf: family(put.cf)?, key: put.key, value: put.value }
            }
            mutation::Kind::Delete(delete) => {
                Mutation::Delete { cf: family(delete.cf)?, key: delete.key }
            }
            mutation::Kind::DeleteRange(range) => Mutation::DeleteRange {
                cf: family(range.cf)?,
                range: convert::key_range(range.start, range.end)?,
            },
            mutation::Kind::Cas(cas) => Mutation::CompareAndSwap(CompareAndSwap {
                cf: family(cas.cf)?,
                key: cas.key,
                expected: (!cas.expect_absent).then_some(cas.expected),
                then: match cas.delete {
                    true => Swap::Delete,
                    false => Swap::Put {
                        value: cas.value,
                        expires_at: Some(cas.expire_at_s).filter(|at| *at != 0),
                    },
                },
                now_s: cas.now_s,
            }),
        })
    }
}

impl From<Mutation> for wire::Mutation {
    fn from(mutation: Mutation) -> Self {
        let number = |cf: Cf| u32::from(cf.number());
        let kind = match mutation {
            Mutation::Put { cf, key, value } => {
                mutation::Kind::Put(wire::Put { cf: number(cf), key, value })
            }
            Mutation::Delete { cf, key } => {
                mutation::Kind::Delete(wire::Delete { cf: number(cf), key })
            }
            Mutation::DeleteRange { cf, range } => mutation::Kind::DeleteRange(wire::DeleteRange {
                cf: number(cf),
                start: range.start().clone(),
                end: end_key(&range),
            }),
            Mutation::CompareAndSwap(swap) => {
                let (delete, value, expires_at) = match swap.then {
                    Swap::Put { value, expires_at } => (false, value, expires_at),
                    Swap::Delete => (true, Bytes::new(), None),
                };
                mutation::Kind::Cas(wire::CompareAndSwap {
                    cf: number(swap.cf),
                    key: swap.key,
                    expect_absent: swap.expected.is_none(),
                    expected: swap.expected.unwrap_or_default(),
                    value,
                    delete,
                    expire_at_s: expires_at.unwrap_or(0),
                    now_s: swap.now_s,
                })
            }
        };
        wire::Mutation { kind: Some(kind) }
    }
}

/// The numbers are those of the wire's `ConfChangeType`.
fn change_from(change: wire::ChangePeer) -> Result<PeerChange, CommandError> {
    let peer = change.peer.ok_or(CommandError::Missing("peer to change"))?;
    let seat = Seat::from(&esker_model::Peer::try_from(peer)?);
    match change.kind {
        0 => Ok(PeerChange::AddVoter(seat)),
        1 => Ok(PeerChange::Remove(seat)),
        2 => Ok(PeerChange::AddLearner(seat)),
        _ => Err(CommandError::Missing("kind of change that is known here")),
    }
}

fn change_message(change: PeerChange) -> wire::ChangePeer {
    let (kind, role) = match change {
        PeerChange::AddVoter(_) => (0, Role::Voter),
        PeerChange::Remove(_) => (1, Role::Voter),
        PeerChange::AddLearner(_) => (2, Role::Learner),
    };
    wire::ChangePeer { kind, peer: Some(metapb::Peer::from(change.seat().with(role))) }
}

/// Where a tagged command's mutations are, checked to be there.
fn check_tagged(command: &wire::RaftCommand) -> Result<(), &'static str> {
    let mut next = 0;
    for tagged in &command.tagged {
        let (first, count) = (tagged.first as usize, tagged.count as usize);
        if count == 0 || first < next {
            return Err("its tagged commands overlap or are out of order");
        }
        next = first.saturating_add(count);
    }
    if next > command.mutations.len() {
        return Err("a tagged command has mutations that are not there");
    }
    if !command.tagged.is_empty() && command.admin.is_some() {
        return Err("an admin command carries a tag");
    }
    Ok(())
}

impl Command {
    /// Reads what an entry holds.
    ///
    /// # Errors
    /// When it cannot be carried out as it stands.
    pub fn decode(stored: Bytes) -> Result<Command, CommandError> {
        let command = wire::RaftCommand::decode(stored)
            .map_err(|error| CommandError::Decode(error.to_string()))?;
        let expected = if command.tagged.is_empty() { FORMAT } else { TAGGED_FORMAT };
        if command.format != expected {
            return Err(CommandError::Format { found: command.format, known: TAGGED_FORMAT });
        }
        check_tagged(&command).map_err(CommandError::Tags)?;
        let epoch = convert::epoch(command.epoch)?;
        let body = match command.admin {
            Some(_) if !command.mutations.is_empty() => {
                return Err(CommandError::Contradiction("its changes of data and of the region"));
            }
            Some(admin) => Body::of(admin)?,
            None => {
                let mutations = command.mutations.into_iter().map(Mutation::try_from);
                let mutations: Vec<Mutation> = mutations.collect::<Result<_, _>>()?;
                let holds_swap = mutations.iter().any(Mutation::is_swap);
                if mutations.len() > 1 && holds_swap && !broken!(SwapIsAlone) {
                    return Err(CommandError::Contradiction(
                        "a compare-and-swap and the changes beside it",
                    ));
                }
                Body::Write(Write { mutations, tagged: command.tagged, now_s: command.now_s })
            }
        };
        Ok(Command { epoch, body })
    }

    /// As an entry holds it.
    pub fn encode(self) -> Bytes {
        let mut command = wire::RaftCommand {
            format: FORMAT,
            epoch: Some(self.epoch.into()),
            ..wire::RaftCommand::default()
        };
        let admin = match self.body {
            Body::Write(write) => {
                if !write.tagged.is_empty() {
                    command.format = TAGGED_FORMAT;
                }
                command.mutations = write.mutations.into_iter().map(Into::into).collect();
                command.tagged = write.tagged;
                command.now_s = write.now_s;
                None
            }
            Body::Split(split) => Some(admin_command::Kind::Split(wire::Split {
                keys: split.keys,
                regions: split
                    .regions
                    .into_iter()
                    .map(|new| wire::NewRegion {
                        id: new.id.0,
                        peer_ids: new.peers.into_iter().map(|peer| peer.0).collect(),
                    })
                    .collect(),
                right_derive: split.right_derive,
            })),
            Body::Compact { index, term } => Some(admin_command::Kind::Compact(wire::CompactLog {
                index: index.0,
                term: term.0,
            })),
            Body::ChangePeers(changes) => Some(admin_command::Kind::Change(wire::ChangePeers {
                changes: changes.into_iter().map(change_message).collect(),
                leave: false,
            })),
        };
        command.admin = admin.map(|kind| wire::AdminCommand { kind: Some(kind) });
        command.encode_to_vec().into()
    }
}

impl Body {
    fn of(admin: wire::AdminCommand) -> Result<Body, CommandError> {
        match admin.kind {
            Some(admin_command::Kind::Split(split)) => Ok(Body::Split(Split {
                keys: split.keys,
                regions: split
                    .regions
                    .into_iter()
                    .map(|new| NewRegion {
                        id: RegionId(new.id),
                        peers: new.peer_ids.into_iter().map(PeerId).collect(),
                    })
                    .collect(),
                right_derive: split.right_derive,
            })),
            Some(admin_command::Kind::Compact(wire::CompactLog { index, term })) => {
                Ok(Body::Compact { index: LogIndex(index), term: Term(term) })
            }
            Some(admin_command::Kind::Change(change)) => {
                let changes = change.changes.into_iter().map(change_from);
                Ok(Body::ChangePeers(changes.collect::<Result<_, _>>()?))
            }
            None => Err(CommandError::Missing("kind of command that is known here")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(text: &'static str) -> Bytes {
        Bytes::from_static(text.as_bytes())
    }

    #[test]
    fn commands_read_back_as_they_were_written() {
        let (cf, key) = (Cf::Default, bytes("k"));
        let range = KeyRange::from(bytes("b"));
        let swap = CompareAndSwap {
            cf,
            key: key.clone(),
            expected: None,
            then: Swap::Put { value: bytes("v"), expires_at: Some(9) },
            now_s: 3,
        };
        let delete =
            CompareAndSwap { expected: Some(bytes("")), then: Swap::Delete, ..swap.clone() };
        let tagged = TaggedCommand { client: 1, sequence: 2, horizon: 3, first: 1, count: 1 };
        let writes = vec![
            Mutation::Put { cf, key: key.clone(), value: bytes("v") },
            Mutation::Delete { cf: Cf::Lock, key: key.clone() },
            Mutation::DeleteRange { cf: Cf::Write, range },
        ];
        let alone =
            |swap| Write { mutations: vec![Mutation::CompareAndSwap(swap)], ..Write::default() };
        let seat = Seat { peer: PeerId(4), store: esker_model::StoreId(2) };
        for body in [
            Body::Write(Write::default()),
            Body::Write(Write { mutations: writes.clone(), ..Write::default() }),
            Body::Write(Write { mutations: writes, tagged: vec![tagged], now_s: 7 }),
            Body::Write(alone(swap)),
            Body::Write(alone(delete)),
            Body::Split(Split {
                keys: vec![key],
                regions: vec![NewRegion { id: RegionId(9), peers: vec![PeerId(10)] }],
                right_derive: true,
            }),
            Body::Compact { index: LogIndex(4), term: Term(2) },
            Body::ChangePeers(vec![
                PeerChange::AddVoter(seat),
                PeerChange::AddLearner(seat),
                PeerChange::Remove(seat),
            ]),
        ] {
            let command = Command { epoch: Epoch::FIRST, body };
            assert_eq!(Command::decode(command.clone().encode()), Ok(command));
        }
    }

    #[test]
    fn a_mutation_without_a_kind_is_no_command() {
        let message = wire::RaftCommand {
            format: FORMAT,
            epoch: Some(Epoch::FIRST.into()),
            mutations: vec![wire::Mutation { kind: None }],
            ..Default::default()
        };
        let refused = Command::decode(message.encode_to_vec().into());
        assert_eq!(refused, Err(CommandError::Missing("kind of change that is known here")));
        let message = wire::RaftCommand { format: FORMAT, ..Default::default() };
        let refused = Command::decode(message.encode_to_vec().into());
        assert_eq!(refused, Err(CommandError::Malformed(Malformed::Missing("epoch"))));
    }

    #[test]
    fn tags_without_their_mutations_are_refused() {
        let command = |tagged: &[(u32, u32)], mutations| wire::RaftCommand {
            mutations: vec![wire::Mutation::default(); mutations],
            tagged: tagged
                .iter()
                .map(|(first, count)| TaggedCommand {
                    first: *first,
                    count: *count,
                    ..TaggedCommand::default()
                })
                .collect(),
            ..wire::RaftCommand::default()
        };
        assert_eq!(check_tagged(&command(&[(0, 1), (2, 2)], 4)), Ok(()));
        for (tagged, mutations) in [
            (&[(0, 2)][..], 1),
            (&[(0, 0)], 1),
            (&[(1, 1), (0, 1)], 2),
            (&[(0, 2), (1, 1)], 3),
            (&[(u32::MAX, u32::MAX)], 1),
        ] {
            assert!(check_tagged(&command(tagged, mutations)).is_err(), "{tagged:?}");
        }
    }
}
