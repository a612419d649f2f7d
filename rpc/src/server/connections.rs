//! The connections of one port: how many there are, and which of them must go.
//!
//! A port holds at most [`ConnectionLimits::connections`]. When it is full, a new connection takes
//! the place of the connection that has been idle for longest. So idle clients cannot lock out a
//! client that works. A connection with an open call over HTTP/2 is never idle. When all
//! connections are such, the new one is refused. Also, a connection that does not send its greeting
//! or its request in time is closed. All this is decided here, with the time as an argument, and
//! carried out in `socket`.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Context;
use std::time::{Duration, Instant};

use futures_util::task::AtomicWaker;
use parking_lot::Mutex;
use tokio::sync::Notify;

/// Connections of a port whose owner sets no other number.
pub const DEFAULT_CONNECTIONS: usize = 4096;

/// How long a connection may take for its greeting: an HTTP/2 preface with SETTINGS, or the whole
/// head of an HTTP/1 request. Longer than a busy server may take to read it.
pub const GREETING_TIMEOUT: Duration = Duration::from_secs(10);

/// How long an HTTP/1 connection may stay open between two requests. (An HTTP/2 connection may stay
/// for as long as it answers pings, because clients keep theirs, and an unexpected end can fail a
/// call.)
pub const HTTP1_IDLE_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a request over HTTP/1 may take, its body and its answer included. Only pages are served
/// that way.
pub const HTTP1_CALL_TIMEOUT: Duration = Duration::from_secs(300);

/// Connections that are severed, but still have their descriptor.
pub const MAX_ENDING: usize = 256;

/// How many connections one search for the longest idle ones finds, so that a burst of new
/// connections does not cause a search through all for each of them.
const FOUND_AT_ONCE: usize = 256;

/// The limits of a port.
#[derive(Clone, Copy, Debug)]
pub struct ConnectionLimits {
    pub connections: usize,
    pub greeting: Duration,
    pub http1_idle: Duration,
    pub http1_call: Duration,
}

impl Default for ConnectionLimits {
    fn default() -> Self {
        ConnectionLimits {
            connections: DEFAULT_CONNECTIONS,
            greeting: GREETING_TIMEOUT,
            http1_idle: HTTP1_IDLE_TIMEOUT,
            http1_call: HTTP1_CALL_TIMEOUT,
        }
    }
}

/// The protocol that a connection has shown so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Protocol {
    /// No greeting, or half of one.
    Unknown,
    Http1,
    Http2,
}

/// What a connection is doing.
#[derive(Clone, Copy, Debug)]
struct Activity {
    protocol: Protocol,
    calls: u32,
    /// When the connection was accepted or greeted, or when a call last began or ended. Not when
    /// bytes came, because a byte now and then is no use of a connection.
    since: Instant,
}

impl Activity {
    /// Since when the connection could be closed without harm; `None` while it could not.
    fn idle_since(&self) -> Option<Instant> {
        match self {
            Activity { protocol: Protocol::Http2, calls: 1.., .. } => None,
            // A client asks for a page again.
            _ => Some(self.since),
        }
    }

    /// The reason why the connection must go even if there is room; `None` if it may stay.
    fn overdue(&self, now: Instant, limits: &ConnectionLimits) -> Option<&'static str> {
        let (allowed, reason) = match (self.protocol, self.calls) {
            (Protocol::Unknown, _) => (limits.greeting, "silent"),
            (Protocol::Http1, 0) => (limits.http1_idle, "idle"),
            (Protocol::Http1, _) => (limits.http1_call, "idle"),
            (Protocol::Http2, _) => return None,
        };
        (now.saturating_duration_since(self.since) >= allowed).then_some(reason)
    }
}

/// One accepted connection, as its socket and its calls see it.
#[derive(Debug)]
pub(super) struct Connection {
    number: u64,
    activity: Mutex<Activity>,
    severed: AtomicBool,
    /// Reading and writing have a waker each, because different tasks may do them.
    reader: AtomicWaker,
    writer: AtomicWaker,
}

impl Connection {
    /// Notes that HTTP/2 has begun: the client's greeting is complete.
    pub(super) fn greeted(&self, now: Instant) {
        let mut activity = self.activity.lock();
        activity.protocol = Protocol::Http2;
        activity.since = now;
    }

    /// Begins a call, which ends when the result is dropped.
    pub(super) fn begin_call(self: Arc<Self>, http2: bool, now: Instant) -> OpenCall {
        {
            let mut activity = self.activity.lock();
            activity.protocol = if http2 { Protocol::Http2 } else { Protocol::Http1 };
            activity.calls += 1;
            activity.since = now;
        }
        OpenCall(self)
    }

    /// Whether the connection is severed. If not, the reader is woken when it is.
    pub(super) fn is_severed_for_reader(&self, context: &Context<'_>) -> bool {
        // Registered before the look, because a signal in between would be missed.
        self.reader.register(context.waker());
        self.severed.load(Ordering::Acquire)
    }

    /// Whether the connection is severed. If not, the writer is woken when it is.
    pub(super) fn is_severed_for_writer(&self, context: &Context<'_>) -> bool {
        self.writer.register(context.waker());
        self.severed.load(Ordering::Acquire)
    }

    fn sever(&self) {
        self.severed.store(true, Ordering::Release);
        self.reader.wake();
        self.writer.wake();
    }

    fn is_severed(&self) -> bool {
        self.severed.load(Ordering::Acquire)
    }

    fn activity(&self) -> Activity {
        *self.activity.lock()
    }
}

/// A call whose request or response has not ended.
#[derive(Debug)]
pub(super) struct OpenCall(Arc<Connection>);

impl Drop for OpenCall {
    fn drop(&mut self) {
        let mut activity = self.0.activity.lock();
        activity.calls -= 1;
        activity.since = Instant::now();
    }
}

/// All connections of a port.
pub(super) struct Connections {
    limits: ConnectionLimits,
    register: Mutex<Register>,
    /// Notified when a connection's descriptor is free again. Keeps one permit.
    freed: Notify,
}

#[derive(Default)]
struct Register {
    open: HashMap<u64, Arc<Connection>>,
    /// How many of the open connections are not severed.
    staying: usize,
    next: u64,
    /// The longest idle connections of the last search. The one that was idle for longest is last.
    found: Vec<(u64, Instant)>,
    /// No further connection is admitted.
    closed: bool,
}

impl Register {
    fn sever(&mut self, connection: &Connection, reason: Option<&'static str>) {
        if connection.is_severed() {
            return;
        }
        connection.sever();
        self.staying -= 1;
        if let Some(reason) = reason {
            metrics::counter!("esker_connections_dropped_total", "reason" => reason).increment(1);
        }
    }

    /// Severs the connection that has been idle for longest. Returns false if none is idle.
    fn sever_longest_idle(&mut self) -> bool {
        // Connections found earlier come first, and then one search through all.
        for look in [false, true] {
            if look {
                self.find_longest_idle();
            }
            while let Some((number, since)) = self.found.pop() {
                let Some(connection) = self.open.get(&number).cloned() else { continue };
                // The connection may have been used since it was found.
                if connection.is_severed() || connection.activity().idle_since() != Some(since) {
                    continue;
                }
                self.sever(&connection, Some("full"));
                return true;
            }
        }
        false
    }

    fn find_longest_idle(&mut self) {
        let mut idle: Vec<(u64, Instant)> = self
            .open
            .values()
            .filter(|connection| !connection.is_severed())
            .filter_map(|connection| Some((connection.number, connection.activity().idle_since()?)))
            .collect();
        if idle.len() > FOUND_AT_ONCE {
            idle.select_nth_unstable_by_key(FOUND_AT_ONCE, |(_, since)| *since);
            idle.truncate(FOUND_AT_ONCE);
        }
        idle.sort_unstable_by_key(|(_, since)| std::cmp::Reverse(*since));
        self.found = idle;
    }
}

impl Connections {
    pub(super) fn new(limits: ConnectionLimits) -> Arc<Self> {
        Arc::new(Connections { limits, register: Mutex::default(), freed: Notify::new() })
    }

    /// Admits a connection, if necessary in the place of another one; `None` if there is no room.
    pub(super) fn admit(self: &Arc<Self>, now: Instant) -> Option<Admission> {
        let mut register = self.register.lock();
        let full = register.staying >= self.limits.connections;
        if register.closed || (full && !register.sever_longest_idle()) {
            return None;
        }
        let number = register.next;
        register.next += 1;
        let connection = Arc::new(Connection {
            number,
            activity: Mutex::new(Activity { protocol: Protocol::Unknown, calls: 0, since: now }),
            severed: AtomicBool::new(false),
            reader: AtomicWaker::new(),
            writer: AtomicWaker::new(),
        });
        register.open.insert(number, Arc::clone(&connection));
        register.staying += 1;
        metrics::gauge!("esker_connections_open").increment(1);
        Some(Admission { connection, connections: Arc::clone(self) })
    }

    /// Waits until there is a descriptor for one more connection. Severed connections may still
    /// hold theirs.
    pub(super) async fn room(&self) {
        while self.register.lock().open.len() >= self.limits.connections.saturating_add(MAX_ENDING)
        {
            self.freed.notified().await;
        }
    }

    /// Frees the descriptor of an idle connection, if there is one. Waits for that, but not longer
    /// than `within`.
    pub(super) async fn free_one(&self, within: Duration) {
        self.register.lock().sever_longest_idle();
        let _ = tokio::time::timeout(within, self.freed.notified()).await;
    }

    /// Severs the connections that are overdue.
    pub(super) fn sweep(&self, now: Instant) {
        let mut register = self.register.lock();
        let overdue: Vec<_> = register
            .open
            .values()
            .filter(|connection| !connection.is_severed())
            .filter_map(|connection| {
                let reason = connection.activity().overdue(now, &self.limits)?;
                Some((Arc::clone(connection), reason))
            })
            .collect();
        for (connection, reason) in overdue {
            register.sever(&connection, Some(reason));
        }
    }

    /// Severs all connections, and admits no other.
    pub(super) fn close(&self) {
        let mut register = self.register.lock();
        register.closed = true;
        for connection in register.open.values().cloned().collect::<Vec<_>>() {
            register.sever(&connection, None);
        }
    }
}

/// A connection's place in the register. Dropping this frees the place.
pub(super) struct Admission {
    pub(super) connection: Arc<Connection>,
    connections: Arc<Connections>,
}

impl Drop for Admission {
    fn drop(&mut self) {
        {
            let mut register = self.connections.register.lock();
            register.open.remove(&self.connection.number);
            if !self.connection.is_severed() {
                register.staying -= 1;
            }
        }
        metrics::gauge!("esker_connections_open").decrement(1);
        self.connections.freed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn port(connections: usize) -> Arc<Connections> {
        Connections::new(ConnectionLimits { connections, ..ConnectionLimits::default() })
    }

    fn severed(admissions: &[Admission]) -> Vec<usize> {
        (0..admissions.len()).filter(|at| admissions[*at].connection.is_severed()).collect()
    }

    #[test]
    fn a_new_connection_takes_the_place_of_the_longest_idle_one_and_never_of_one_with_a_call() {
        let port = port(3);
        let start = Instant::now();
        let admit = |second: u32| port.admit(start + SECOND * second);
        let mut open: Vec<_> = (0..3).map(|second| admit(second).expect("there is room")).collect();
        // The connection that was opened first has a call open.
        let first = Arc::clone(&open[0].connection);
        let call = first.begin_call(true, start + SECOND * 3);
        open.push(admit(10).expect("1 was idle for longest"));
        assert_eq!(severed(&open), [1]);
        open.push(admit(11).expect("2 was"));
        assert_eq!(severed(&open), [1, 2]);
        let calls: Vec<_> = [3, 4]
            .map(|at: usize| Arc::clone(&open[at].connection).begin_call(true, start + SECOND * 12))
            .into();
        assert!(admit(13).is_none(), "all are in use");
        drop(call);
        open.push(admit(14).expect("the call of 0 has ended"));
        assert_eq!(severed(&open), [0, 1, 2]);
        drop(calls);
    }

    #[test]
    fn a_page_that_is_never_done_gives_way() {
        let port = port(1);
        let start = Instant::now();
        let page = port.admit(start).expect("there is room");
        let _call = Arc::clone(&page.connection).begin_call(false, start);
        let _next = port.admit(start + SECOND).expect("a page is asked for again");
        assert!(page.connection.is_severed());
    }

    #[test]
    fn who_says_nothing_in_time_or_half_a_greeting_is_dropped() {
        let port = port(9);
        let start = Instant::now();
        let open: Vec<_> = (0..5).map(|_| port.admit(start).expect("there is room")).collect();
        open[1].connection.greeted(start);
        let http1 = Arc::clone(&open[2].connection).begin_call(false, start);
        let ended = Arc::clone(&open[3].connection).begin_call(false, start);
        drop(ended);
        let _stream = Arc::clone(&open[4].connection).begin_call(true, start);
        port.sweep(start + GREETING_TIMEOUT - SECOND);
        assert_eq!(severed(&open), [0; 0]);
        port.sweep(start + GREETING_TIMEOUT);
        assert_eq!(severed(&open), [0], "it never said anything");
        port.sweep(start + HTTP1_IDLE_TIMEOUT + SECOND);
        assert_eq!(severed(&open), [0, 3], "nothing came after its last page");
        port.sweep(start + HTTP1_CALL_TIMEOUT);
        assert_eq!(severed(&open), [0, 2, 3], "its page is never done");
        drop(http1);
        port.sweep(start + HTTP1_CALL_TIMEOUT * 100);
        assert_eq!(severed(&open), [0, 2, 3], "HTTP/2 answers pings");
        port.close();
        assert_eq!(severed(&open), [0, 1, 2, 3, 4]);
        assert!(port.admit(start).is_none(), "the port is closed");
    }

    #[test]
    fn places_are_given_back() {
        let port = port(2);
        let now = Instant::now();
        for _ in 0..100 {
            let (one, other) = (port.admit(now), port.admit(now));
            let third = port.admit(now).expect("in the place of one of them");
            assert_eq!(port.register.lock().staying, 2);
            drop((one, other, third));
            let register = port.register.lock();
            assert_eq!((register.staying, register.open.len()), (0, 0));
        }
    }
}
