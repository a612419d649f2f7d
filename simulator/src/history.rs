//! What the clients saw, and whether a single copy of the data could have answered so.
//!
//! Each key is a history of its own. Every value that is written is unique, so that a read says
//! which write it saw. A write whose outcome is unknown may take effect at any later moment or
//! never, and a write that failed otherwise must never be seen: its value is one that nobody wrote.
//!
//! A key is used until its history has [`OPERATIONS_PER_KEY`] operations; then its place in the key
//! space goes on under another name.

use std::collections::BTreeMap;
use std::ops::Bound;

use bytes::Bytes;
use todc_utils::linearizability::WGLChecker;
use todc_utils::linearizability::history::Action::{self, Call, Response};
use todc_utils::specifications::Specification;

/// Calls after which a key's history is complete: long enough for most interleavings, short enough
/// to be decided in no time.
pub const OPERATIONS_PER_KEY: usize = 60;

/// What one value is: a number that no other write has.
pub type Value = u64;

/// An operation on one key, with its outcome.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Operation {
    Read(Option<Value>),
    /// Nothing: the key was removed.
    Write(Option<Value>),
    Swap {
        expected: Option<Value>,
        new: Value,
        /// What the store said: the value before, and whether it was exchanged. Nothing if it said
        /// nothing.
        outcome: Option<(Option<Value>, bool)>,
    },
}

/// A register.
struct Register;

impl Specification for Register {
    type State = Option<Value>;
    type Operation = Operation;

    fn init() -> Self::State {
        None
    }

    fn apply(operation: &Operation, state: &Self::State) -> (bool, Self::State) {
        match operation {
            Operation::Read(found) => (found == state, *state),
            Operation::Write(value) => (true, *value),
            Operation::Swap { expected, new, outcome } => {
                let swaps = expected == state;
                let is_possible =
                    outcome.is_none_or(|(before, swapped)| before == *state && swapped == swaps);
                (is_possible, if swaps { Some(*new) } else { *state })
            }
        }
    }
}

/// An operation that is under way.
#[derive(Clone, Debug)]
pub struct Ticket {
    pub key: Bytes,
    process: usize,
}

#[derive(Default)]
struct KeyHistory {
    actions: Vec<(usize, Action<Operation>)>,
    /// Operations that may take effect after everything else.
    unknown: Vec<(usize, Operation)>,
    calls: usize,
}

/// All histories of one simulation.
pub struct History {
    keys: BTreeMap<Bytes, KeyHistory>,
    /// The present name of each place.
    places: Vec<(Bytes, u32)>,
    next_process: usize,
    next_value: Value,
    /// Operations on whole ranges that may take effect on keys that are used for the first time.
    ranges: BTreeMap<usize, RangeOperation>,
}

/// An operation on all keys of a range that is under way.
struct RangeOperation {
    start: Bytes,
    end: Bytes,
    operation: Operation,
    tickets: Vec<Ticket>,
    /// Nobody will ever know what became of it.
    is_unknown: bool,
}

/// An operation on all keys of a range.
#[derive(Debug)]
pub struct RangeTicket(usize);

impl History {
    /// With keys at so many places of the key space.
    pub fn new(places: usize) -> History {
        let places = (0..places).map(|place| (name(place, 0), 0)).collect();
        History {
            keys: BTreeMap::new(),
            places,
            next_process: 0,
            next_value: 1,
            ranges: BTreeMap::new(),
        }
    }

    /// The key that is in use at a place.
    pub fn key(&mut self, place: usize) -> Bytes {
        let (key, generation) = &mut self.places[place];
        let calls = self.keys.get(key).map_or(0, |history| history.calls);
        if calls >= OPERATIONS_PER_KEY {
            *generation += 1;
            *key = name(place, *generation);
        }
        key.clone()
    }

    pub fn places(&self) -> usize {
        self.places.len()
    }

    /// A value that no write had.
    pub fn fresh_value(&mut self) -> Value {
        self.next_value += 1;
        self.next_value
    }

    /// An operation begins; nothing if the key's history is complete.
    pub fn begin(&mut self, key: &Bytes, operation: Operation) -> Option<Ticket> {
        if !self.keys.contains_key(key) {
            self.keys.insert(key.clone(), KeyHistory::default());
            self.join_ranges(key);
        }
        let history = self.keys.entry(key.clone()).or_default();
        // A read need not be looked at. A write must be: others see it.
        let is_read = matches!(operation, Operation::Read(_));
        if is_read && history.calls >= OPERATIONS_PER_KEY + OPERATIONS_PER_KEY / 4 {
            return None;
        }
        history.calls += 1;
        let process = self.next_process;
        self.next_process += 1;
        history.actions.push((process, Call(operation)));
        Some(Ticket { key: key.clone(), process })
    }

    /// The same for every key that was ever used in `[start, end)`.
    pub fn begin_all(&mut self, start: &Bytes, end: &Bytes, operation: &Operation) -> Vec<Ticket> {
        let upper = match end.is_empty() {
            true => Bound::Unbounded,
            false => Bound::Excluded(end.clone()),
        };
        if !end.is_empty() && start >= end {
            return Vec::new();
        }
        let range = (Bound::Included(start.clone()), upper);
        let keys: Vec<Bytes> = self.keys.range(range).map(|(key, _)| key.clone()).collect();
        keys.iter().filter_map(|key| self.begin(key, operation.clone())).collect()
    }

    /// A key is used for the first time, within ranges that are being written.
    fn join_ranges(&mut self, key: &Bytes) {
        let covering: Vec<(usize, Operation, bool)> = self
            .ranges
            .iter()
            .filter(|(_, range)| range.start <= *key && *key < range.end)
            .map(|(number, range)| (*number, range.operation.clone(), range.is_unknown))
            .collect();
        for (number, operation, is_unknown) in covering {
            let Some(ticket) = self.begin(key, operation.clone()) else { continue };
            match self.ranges.get_mut(&number) {
                Some(range) if !is_unknown => range.tickets.push(ticket),
                _ => self.lose_sight(ticket, operation),
            }
        }
    }

    /// A write to every key of `[start, end)` begins, also to those that are not used yet.
    pub fn begin_range(&mut self, start: &Bytes, end: &Bytes, operation: Operation) -> RangeTicket {
        let tickets = self.begin_all(start, end, &operation);
        let number = self.next_process;
        self.next_process += 1;
        let (start, end) = (start.clone(), end.clone());
        let range = RangeOperation { start, end, operation, tickets, is_unknown: false };
        self.ranges.insert(number, range);
        RangeTicket(number)
    }

    /// What became of it: known to be done or not to be done, or not known.
    pub fn end_range(&mut self, ticket: &RangeTicket, is_done: Option<bool>) {
        let Some(range) = self.ranges.get_mut(&ticket.0) else { return };
        let (tickets, operation) = (std::mem::take(&mut range.tickets), range.operation.clone());
        match is_done {
            Some(_) => drop(self.ranges.remove(&ticket.0)),
            None => range.is_unknown = true,
        }
        for ticket in tickets {
            match is_done {
                Some(true) => self.finish(ticket, operation.clone()),
                Some(false) => self.fail(ticket),
                None => self.lose_sight(ticket, operation.clone()),
            }
        }
    }

    /// It is done, with this outcome.
    pub fn finish(&mut self, ticket: Ticket, operation: Operation) {
        if let Some(history) = self.keys.get_mut(&ticket.key) {
            history.actions.push((ticket.process, Response(operation)));
        }
    }

    /// It was not done and will not be.
    pub fn fail(&mut self, ticket: Ticket) {
        if let Some(history) = self.keys.get_mut(&ticket.key) {
            history.actions.retain(|(process, _)| *process != ticket.process);
        }
    }

    /// Whether it was or will be done is not known.
    pub fn lose_sight(&mut self, ticket: Ticket, operation: Operation) {
        if let Some(history) = self.keys.get_mut(&ticket.key) {
            history.unknown.push((ticket.process, operation));
        }
    }

    /// Whether anything was ever written to `key`.
    pub fn is_known(&self, key: &Bytes) -> bool {
        self.keys.contains_key(key)
    }

    /// Every key that was ever used.
    pub fn keys(&self) -> Vec<Bytes> {
        self.keys.keys().cloned().collect()
    }

    /// A read of a key when all else has ended, however long its history is.
    pub fn begin_last_read(&mut self, key: &Bytes) -> Option<Ticket> {
        let history = self.keys.get_mut(key)?;
        let process = self.next_process;
        self.next_process += 1;
        history.actions.push((process, Call(Operation::Read(None))));
        Some(Ticket { key: key.clone(), process })
    }

    pub fn operations(&self) -> usize {
        self.keys.values().map(|history| history.calls).sum()
    }

    /// Decides each key's history. What is still under way counts as unknown.
    ///
    /// # Errors
    /// The first key whose history is impossible, with the history.
    pub fn check(&self) -> Result<(), String> {
        for (key, history) in &self.keys {
            history.check().map_err(|history| {
                format!("the history of key {} is not linearizable:\n{history}", text(key))
            })?;
        }
        Ok(())
    }
}

impl KeyHistory {
    fn check(&self) -> Result<(), String> {
        let mut actions = self.actions.clone();
        let is_answered = |process: usize| {
            self.actions.iter().any(|(of, action)| *of == process && matches!(action, Response(_)))
                || self.unknown.iter().any(|(of, _)| *of == process)
        };
        for (process, action) in &self.actions {
            let Call(operation) = action else { continue };
            match (is_answered(*process), operation) {
                (false, Operation::Read(_)) => actions.retain(|(of, _)| of != process),
                (false, operation) => actions.push((*process, Response(operation.clone()))),
                (true, _) => {}
            }
        }
        // An operation that ends after all others may as well not have happened.
        let unknown = self.unknown.iter();
        actions.extend(unknown.map(|(process, operation)| (*process, Response(operation.clone()))));
        if actions.is_empty() {
            return Ok(());
        }
        let history = todc_utils::linearizability::history::History::from_actions(actions.clone());
        if WGLChecker::<Register>::is_linearizable(history) {
            return Ok(());
        }
        let line = |(process, action): &(usize, Action<Operation>)| {
            let is_unknown = self.unknown.iter().any(|(of, _)| of == process);
            match action {
                Call(Operation::Read(_)) => format!("  {process} calls a read"),
                Call(operation) => format!("  {process} calls {operation:?}"),
                Response(_) if is_unknown => format!("  {process} is never answered"),
                Response(operation) => format!("  {process} is answered {operation:?}"),
            }
        };
        Err(actions.iter().map(line).collect::<Vec<_>>().join("\n"))
    }
}

fn name(place: usize, generation: u32) -> Bytes {
    format!("k{place:02}/{generation:02}").into()
}

/// A key as text.
pub fn text(key: &[u8]) -> String {
    String::from_utf8_lossy(key).into_owned()
}

/// The same, cut off where it gets long.
pub fn short(key: &[u8]) -> String {
    const LONG: usize = 40;
    match key.len() > LONG {
        true => format!("{}…", text(&key[..LONG])),
        false => text(key),
    }
}

/// The bytes that stand for a value; their length differs from value to value.
pub fn encode(value: Value) -> Bytes {
    let padding = usize::try_from(value * 37 % 300).unwrap_or(0);
    format!("{value}:{}", "x".repeat(padding)).into()
}

/// The value that bytes stand for.
pub fn decode(bytes: &[u8]) -> Option<Value> {
    let text = std::str::from_utf8(bytes).ok()?;
    let value: Value = text.split_once(':')?.0.parse().ok()?;
    (encode(value) == bytes).then_some(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> Bytes {
        Bytes::from_static(b"k")
    }

    fn write(history: &mut History, value: Value) -> (Ticket, Operation) {
        let operation = Operation::Write(Some(value));
        (history.begin(&key(), operation.clone()).expect("it is short"), operation)
    }

    fn read(history: &mut History, found: Option<Value>) {
        let ticket = history.begin(&key(), Operation::Read(None)).expect("it is short");
        history.finish(ticket, Operation::Read(found));
    }

    #[test]
    fn an_acknowledged_write_is_read_until_the_next() {
        let mut history = History::new(1);
        let (ticket, operation) = write(&mut history, 1);
        history.finish(ticket, operation);
        read(&mut history, Some(1));
        assert_eq!(history.check(), Ok(()));
        read(&mut history, None);
        assert!(history.check().is_err());
    }

    #[test]
    fn a_write_that_failed_is_never_read_and_an_unknown_one_may_be() {
        for is_unknown in [false, true] {
            let mut history = History::new(1);
            let (ticket, operation) = write(&mut history, 1);
            match is_unknown {
                true => history.lose_sight(ticket, operation),
                false => history.fail(ticket),
            }
            read(&mut history, None);
            read(&mut history, Some(1));
            assert_eq!(history.check().is_ok(), is_unknown);
            read(&mut history, None);
            assert!(history.check().is_err(), "it happened once");
        }
    }

    #[test]
    fn a_swap_that_was_not_answered_may_have_happened_only_if_it_could() {
        for (expected, could) in [(Some(1), true), (Some(7), false)] {
            let mut history = History::new(1);
            let (ticket, operation) = write(&mut history, 1);
            history.finish(ticket, operation);
            let swap = Operation::Swap { expected, new: 2, outcome: None };
            let ticket = history.begin(&key(), swap.clone()).expect("it is short");
            history.lose_sight(ticket, swap);
            read(&mut history, Some(2));
            assert_eq!(history.check().is_ok(), could);
        }
    }

    #[test]
    fn values_are_what_was_written_or_nothing() {
        for value in [1, 17, 300, 4_711] {
            assert_eq!(decode(&encode(value)), Some(value));
            assert_eq!(decode(&encode(value)[1..]), None);
        }
    }
}
