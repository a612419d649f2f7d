//! The byte forms that the driver stores and the transport carries without looking inside.
//!
//! Every form begins with its version. Numbers are LEB128, because most are small. A byte string
//! has its length before it and is decoded as a slice of the input. Decoding never panics, reserves
//! no more memory than the input could fill, and refuses input with bytes left over.

use bytes::Bytes;
use thiserror::Error;

use crate::configuration::{Configuration, MAX_PEERS};
use crate::entries::Entries;
use crate::message::{AppendOutcome, CommitPoint, Message, MessageBody, Stamp};
use crate::types::{
    ChangeStep, ConfChange, Entry, GroupId, HardState, LeaveJoint, LogIndex, Payload, PeerId,
    SnapshotMeta, Term, Time,
};

/// The version of everything that is stored.
const FORMAT: u8 = 1;

/// The version of everything that is sent.
const WIRE_FORMAT: u8 = 2;

/// Why bytes are not what they should be.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum DecodeError {
    /// Written by another release.
    #[error("format version {found} is unknown, this release reads {known}")]
    Version {
        /// What was found.
        found: u8,
        /// What this release reads.
        known: u8,
    },
    /// The input ends too early.
    #[error("the input ends within a field")]
    Truncated,
    /// A kind, flag or number that is impossible.
    #[error("the field {field} has the impossible value {value}")]
    Value {
        /// The field.
        field: &'static str,
        /// What it held.
        value: u64,
    },
    /// Bytes follow the end of the encoding.
    #[error("{0} bytes follow the end")]
    Trailing(usize),
}

struct Input(Bytes);

impl Input {
    fn open(bytes: Bytes, known: u8) -> Result<Input, DecodeError> {
        let mut input = Input(bytes);
        match input.byte()? {
            found if found == known => Ok(input),
            found => Err(DecodeError::Version { found, known }),
        }
    }

    fn close<T>(self, value: T) -> Result<T, DecodeError> {
        if self.0.is_empty() { Ok(value) } else { Err(DecodeError::Trailing(self.0.len())) }
    }

    fn byte(&mut self) -> Result<u8, DecodeError> {
        let byte = *self.0.first().ok_or(DecodeError::Truncated)?;
        let _ = self.0.split_to(1);
        Ok(byte)
    }

    fn number(&mut self) -> Result<u64, DecodeError> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            let bits = u64::from(byte & 0x7f);
            if shift == 63 && bits > 1 {
                return Err(DecodeError::Value { field: "number", value: bits });
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(DecodeError::Value { field: "number", value })
    }

    fn flag(&mut self, field: &'static str) -> Result<bool, DecodeError> {
        match self.byte()? {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(DecodeError::Value { field, value: other.into() }),
        }
    }

    fn bytes(&mut self) -> Result<Bytes, DecodeError> {
        let length = self.number()?;
        let length = usize::try_from(length).map_err(|_| DecodeError::Truncated)?;
        if length > self.0.len() {
            return Err(DecodeError::Truncated);
        }
        Ok(self.0.split_to(length))
    }

    /// A count of things that take at least one byte each.
    fn count(&mut self) -> Result<usize, DecodeError> {
        let count = self.number()?;
        match usize::try_from(count) {
            Ok(count) if count <= self.0.len() => Ok(count),
            _ => Err(DecodeError::Truncated),
        }
    }

    fn index(&mut self) -> Result<LogIndex, DecodeError> {
        self.number().map(LogIndex)
    }

    fn term(&mut self) -> Result<Term, DecodeError> {
        self.number().map(Term)
    }

    fn peer(&mut self) -> Result<PeerId, DecodeError> {
        self.number().map(PeerId)
    }

    fn commit_point(&mut self) -> Result<CommitPoint, DecodeError> {
        Ok(CommitPoint { index: self.index()?, term: self.term()? })
    }

    fn stamp(&mut self) -> Result<Stamp, DecodeError> {
        Ok(Stamp { round: self.number()?, sent: Time(self.number()?) })
    }
}

fn put_number(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push((value as u8 & 0x7f) | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    put_number(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

fn put_stamp(out: &mut Vec<u8>, stamp: Stamp) {
    put_number(out, stamp.round);
    put_number(out, stamp.sent.0);
}

fn put_commit(out: &mut Vec<u8>, commit: CommitPoint) {
    put_number(out, commit.index.0);
    put_number(out, commit.term.0);
}

impl Payload {
    /// Appends the stored form to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.push(FORMAT);
        match self {
            Payload::Noop => out.push(0),
            Payload::Command(command) => {
                out.push(1);
                out.extend_from_slice(command);
            }
            Payload::Change(change) => {
                out.push(2);
                out.push(u8::from(change.leave == LeaveJoint::Explicit));
                put_number(out, change.steps.len() as u64);
                for step in &change.steps {
                    let (kind, peer) = match *step {
                        ChangeStep::AddVoter(peer) => (0, peer),
                        ChangeStep::AddLearner(peer) => (1, peer),
                        ChangeStep::AddWitness(peer) => (2, peer),
                        ChangeStep::Remove(peer) => (3, peer),
                    };
                    out.push(kind);
                    put_number(out, peer.0);
                }
                out.extend_from_slice(&change.context);
            }
        }
    }

    /// Reads the stored form. A command or context is a slice of `bytes`.
    ///
    /// # Errors
    /// See [`DecodeError`].
    pub fn decode(bytes: Bytes) -> Result<Payload, DecodeError> {
        let mut input = Input::open(bytes, FORMAT)?;
        match input.byte()? {
            0 => input.close(Payload::Noop),
            1 => Ok(Payload::Command(input.0)),
            2 => {
                let explicit = input.flag("leave")?;
                let leave = if explicit { LeaveJoint::Explicit } else { LeaveJoint::Auto };
                let count = input.count()?;
                if count > MAX_PEERS * 2 {
                    return Err(DecodeError::Value { field: "steps", value: count as u64 });
                }
                let mut steps = Vec::with_capacity(count);
                for _ in 0..count {
                    let kind = input.byte()?;
                    let peer = input.peer()?;
                    steps.push(match kind {
                        0 => ChangeStep::AddVoter(peer),
                        1 => ChangeStep::AddLearner(peer),
                        2 => ChangeStep::AddWitness(peer),
                        3 => ChangeStep::Remove(peer),
                        _ => return Err(DecodeError::Value { field: "step", value: kind.into() }),
                    });
                }
                Ok(Payload::Change(Box::new(ConfChange { steps, leave, context: input.0 })))
            }
            kind => Err(DecodeError::Value { field: "payload", value: kind.into() }),
        }
    }
}

impl HardState {
    /// Appends the stored form to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.push(FORMAT);
        put_number(out, self.term.0);
        put_number(out, self.vote.map_or(0, |peer| peer.0));
        put_number(out, self.commit.0);
    }

    /// Reads the stored form.
    ///
    /// # Errors
    /// See [`DecodeError`].
    pub fn decode(bytes: Bytes) -> Result<HardState, DecodeError> {
        let mut input = Input::open(bytes, FORMAT)?;
        let term = input.term()?;
        let vote = Some(input.peer()?).filter(|peer| peer.0 != 0);
        let commit = input.index()?;
        input.close(HardState { term, vote, commit })
    }
}

impl Configuration {
    /// Appends the stored form to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.push(FORMAT);
        self.put(out);
    }

    /// Reads the stored form.
    ///
    /// # Errors
    /// See [`DecodeError`].
    pub fn decode(bytes: Bytes) -> Result<Configuration, DecodeError> {
        let mut input = Input::open(bytes, FORMAT)?;
        let configuration = Configuration::take(&mut input)?;
        input.close(configuration)
    }

    fn put(&self, out: &mut Vec<u8>) {
        let sets = [
            &self.voters,
            &self.voters_outgoing,
            &self.learners,
            &self.learners_next,
            &self.witnesses,
        ];
        for set in sets {
            put_number(out, set.len() as u64);
            set.iter().for_each(|peer| put_number(out, peer.0));
        }
        out.push(u8::from(self.auto_leave));
    }

    fn take(input: &mut Input) -> Result<Configuration, DecodeError> {
        let mut set = || {
            let count = input.count()?;
            if count > MAX_PEERS {
                return Err(DecodeError::Value { field: "peers", value: count as u64 });
            }
            (0..count).map(|_| input.peer()).collect()
        };
        Ok(Configuration {
            voters: set()?,
            voters_outgoing: set()?,
            learners: set()?,
            learners_next: set()?,
            witnesses: set()?,
            auto_leave: input.flag("auto_leave")?,
        })
    }
}

impl Message {
    /// Appends the wire form to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.push(WIRE_FORMAT);
        put_number(out, self.group.0);
        put_number(out, self.from.0);
        put_number(out, self.to.0);
        put_number(out, self.term.0);
        self.body.put(out);
    }

    /// Reads the wire form; commands and data are slices of `bytes`.
    ///
    /// # Errors
    /// See [`DecodeError`].
    pub fn decode(bytes: Bytes) -> Result<Message, DecodeError> {
        let mut input = Input::open(bytes, WIRE_FORMAT)?;
        let group = GroupId(input.number()?);
        let (from, to, term) = (input.peer()?, input.peer()?, input.term()?);
        let body = MessageBody::take(&mut input)?;
        input.close(Message { group, from, to, term, body })
    }
}

impl MessageBody {
    fn put(&self, out: &mut Vec<u8>) {
        match self {
            MessageBody::PreVote { last_index, last_term, commit } => {
                out.push(0);
                put_number(out, last_index.0);
                put_number(out, last_term.0);
                put_commit(out, *commit);
            }
            MessageBody::PreVoteReply { granted, commit } => {
                out.extend([1, u8::from(*granted)]);
                put_commit(out, *commit);
            }
            MessageBody::Vote { last_index, last_term, transfer, commit } => {
                out.push(2);
                put_number(out, last_index.0);
                put_number(out, last_term.0);
                out.push(u8::from(*transfer));
                put_commit(out, *commit);
            }
            MessageBody::VoteReply { granted, commit } => {
                out.extend([3, u8::from(*granted)]);
                put_commit(out, *commit);
            }
            MessageBody::Append { prev_index, prev_term, entries, commit, stamp } => {
                out.push(4);
                put_number(out, prev_index.0);
                put_number(out, prev_term.0);
                put_number(out, commit.0);
                put_stamp(out, *stamp);
                put_entries(out, entries);
            }
            MessageBody::AppendReply { outcome, stamp } => {
                out.push(5);
                put_stamp(out, *stamp);
                match outcome {
                    AppendOutcome::Accepted { match_index } => {
                        out.push(0);
                        put_number(out, match_index.0);
                    }
                    AppendOutcome::Rejected { prev_index, hint_index, hint_term } => {
                        out.push(1);
                        put_number(out, prev_index.0);
                        put_number(out, hint_index.0);
                        put_number(out, hint_term.0);
                    }
                }
            }
            MessageBody::Heartbeat { commit, stamp } => {
                out.push(6);
                put_number(out, commit.0);
                put_stamp(out, *stamp);
            }
            MessageBody::HeartbeatReply { stamp } => {
                out.push(7);
                put_stamp(out, *stamp);
            }
            MessageBody::InstallSnapshot { meta, data } => {
                out.push(8);
                put_number(out, meta.index.0);
                put_number(out, meta.term.0);
                meta.configuration.put(out);
                put_bytes(out, data);
            }
            MessageBody::TimeoutNow => out.push(9),
            MessageBody::ReadIndex { batch } => {
                out.push(10);
                put_number(out, *batch);
            }
            MessageBody::ReadIndexReply { batch, index } => {
                out.push(11);
                put_number(out, *batch);
                put_number(out, index.0);
            }
            MessageBody::TransferRequest { target } => {
                out.push(12);
                put_number(out, target.0);
            }
            MessageBody::Commit { commit } => {
                out.push(13);
                put_commit(out, *commit);
            }
        }
    }

    fn take(input: &mut Input) -> Result<MessageBody, DecodeError> {
        Ok(match input.byte()? {
            0 => MessageBody::PreVote {
                last_index: input.index()?,
                last_term: input.term()?,
                commit: input.commit_point()?,
            },
            1 => MessageBody::PreVoteReply {
                granted: input.flag("granted")?,
                commit: input.commit_point()?,
            },
            2 => MessageBody::Vote {
                last_index: input.index()?,
                last_term: input.term()?,
                transfer: input.flag("transfer")?,
                commit: input.commit_point()?,
            },
            3 => MessageBody::VoteReply {
                granted: input.flag("granted")?,
                commit: input.commit_point()?,
            },
            4 => {
                let (prev_index, prev_term) = (input.index()?, input.term()?);
                let (commit, stamp) = (input.index()?, input.stamp()?);
                let entries = take_entries(input, prev_index)?.into();
                MessageBody::Append { prev_index, prev_term, entries, commit, stamp }
            }
            5 => {
                let stamp = input.stamp()?;
                let outcome = if input.flag("rejected")? {
                    AppendOutcome::Rejected {
                        prev_index: input.index()?,
                        hint_index: input.index()?,
                        hint_term: input.term()?,
                    }
                } else {
                    AppendOutcome::Accepted { match_index: input.index()? }
                };
                MessageBody::AppendReply { outcome, stamp }
            }
            6 => MessageBody::Heartbeat { commit: input.index()?, stamp: input.stamp()? },
            7 => MessageBody::HeartbeatReply { stamp: input.stamp()? },
            8 => {
                let (index, term) = (input.index()?, input.term()?);
                let configuration = Configuration::take(input)?;
                let meta = Box::new(SnapshotMeta { index, term, configuration });
                MessageBody::InstallSnapshot { meta, data: input.bytes()? }
            }
            9 => MessageBody::TimeoutNow,
            10 => MessageBody::ReadIndex { batch: input.number()? },
            11 => MessageBody::ReadIndexReply { batch: input.number()?, index: input.index()? },
            12 => MessageBody::TransferRequest { target: input.peer()? },
            13 => MessageBody::Commit { commit: input.commit_point()? },
            kind => return Err(DecodeError::Value { field: "message", value: kind.into() }),
        })
    }
}

/// The entries of an append have consecutive indexes, which need not be sent.
fn put_entries(out: &mut Vec<u8>, entries: &Entries) {
    put_number(out, entries.len() as u64);
    let mut payload = Vec::new();
    for entry in entries.iter() {
        put_number(out, entry.term.0);
        // Commands are most of the traffic, so a command is copied once, not twice.
        if let Payload::Command(command) = &entry.payload {
            put_number(out, command.len() as u64 + 2);
            out.extend_from_slice(&[FORMAT, 1]);
            out.extend_from_slice(command);
        } else {
            payload.clear();
            entry.payload.encode(&mut payload);
            put_bytes(out, &payload);
        }
    }
}

fn take_entries(input: &mut Input, prev_index: LogIndex) -> Result<Vec<Entry>, DecodeError> {
    /// Term, length, version and kind: no entry is shorter on the wire.
    const SHORTEST: usize = 4;
    let count = input.count()?;
    if count > input.0.len() / SHORTEST {
        return Err(DecodeError::Truncated);
    }
    let mut entries = Vec::with_capacity(count);
    let mut index = prev_index;
    for _ in 0..count {
        if index.0 == u64::MAX {
            return Err(DecodeError::Value { field: "index", value: index.0 });
        }
        index = index.next();
        let term = input.term()?;
        let payload = Payload::decode(input.bytes()?)?;
        entries.push(Entry { term, index, payload });
    }
    Ok(entries)
}
