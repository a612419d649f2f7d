//! Which member leads, and the connection to it.
//!
//! A member can be silent without being gone: a frozen process still has its sockets, and the
//! system still accepts connections for it. So no question waits for one member alone. A search
//! asks the members one after another without waiting for answers ([`HEDGE_DELAY`]). It ends with
//! the first answer that leads to a member which itself answers that it leads. A call on a silent
//! leader goes on, but the other members are asked ([`SUSPICION`]). The call moves as soon as
//! another member is found to lead.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use esker_rpc::backoff::Backoff;
use esker_rpc::channel::{self, Dialer};
use esker_rpc::proto::pdpb::pd_client::PdClient;
use esker_rpc::proto::pdpb::{GetMembersRequest, GetMembersResponse, Member, RequestHeader};
use esker_rpc::repeat::Repeated;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::time::Instant;
use tonic::Code;
use tonic::transport::Channel;

use super::{FIRST_RETRY, LONGEST_RETRY};
use crate::error::{ClientError, waited_since};

/// How long one member may take to name the leader. A member that knows no leader waits for an
/// election, and its answer must not be cut off. So this is a little longer than the longest such
/// wait.
const ASK_TIMEOUT: Duration = Duration::from_millis(3_500);

/// How long a search waits for one member before it asks the next one as well.
const HEDGE_DELAY: Duration = Duration::from_millis(100);

/// How long a leader may be silent before another member is asked which one leads. The question is
/// repeated at this interval until the leader answers. Lookups may rightly take longer than this,
/// so it costs no more than a question.
const SUSPICION: Duration = Duration::from_millis(500);

/// Endpoints that are remembered. A placement driver has a handful of members.
const MAX_ENDPOINTS: usize = 32;

/// The leader as far as it is known, shared by all calls.
pub(super) struct Leader {
    dialer: Dialer,
    cluster_id: u64,
    known: watch::Sender<Known>,
    /// When the latest search that was not cut short began. The lock is held by the task that
    /// searches, so that a hundred failed calls make one search.
    looking: tokio::sync::Mutex<Option<Instant>>,
    /// When the leader last answered a call.
    heard: Mutex<Option<Instant>>,
    /// Whether a task waits to find out if the leader is silent: see [`Unanswered`].
    watching: AtomicBool,
}

/// A call on the leader that waits for its answer. If its caller gives up first, which it may do
/// sooner than anybody suspects a leader, the leader is doubted all the same, unless another call
/// is answered meanwhile. Otherwise a client of hasty callers would stay with a frozen leader for
/// ever.
pub(super) struct Unanswered<'a> {
    leader: &'a Arc<Leader>,
    generation: u64,
    since: Instant,
    is_over: bool,
}

impl Unanswered<'_> {
    /// The attempt ended by itself.
    pub(super) fn ended(mut self) {
        self.is_over = true;
    }
}

impl Drop for Unanswered<'_> {
    fn drop(&mut self) {
        let Ok(runtime) = Handle::try_current() else { return };
        if self.is_over || self.leader.watching.swap(true, Ordering::Relaxed) {
            return;
        }
        let (leader, generation, since) = (self.leader.clone(), self.generation, self.since);
        runtime.spawn(async move {
            tokio::time::sleep_until(since + SUSPICION).await;
            let is_silent = leader.heard.lock().is_none_or(|heard| heard < since);
            if is_silent {
                leader.doubt(generation).await;
            }
            leader.watching.store(false, Ordering::Relaxed);
        });
    }
}

struct Known {
    endpoints: Vec<String>,
    current: Current,
}

/// A connection to the member that led when it was found.
#[derive(Clone)]
pub(super) struct Current {
    pub(super) address: String,
    /// The member's id, because a member may be reached under more than one address.
    member: u64,
    pub(super) channel: Channel,
    /// Grows with every connection, so that a caller can name the connection that failed.
    pub(super) generation: u64,
}

impl Current {
    fn is_same_member(&self, member: u64, address: &str) -> bool {
        match (self.member, member) {
            // A placement driver that gives its members no ids.
            (0, _) | (_, 0) => self.address == address,
            (known, member) => known == member,
        }
    }
}

/// The answer of one member.
struct Found {
    cluster_id: u64,
    member: u64,
    address: String,
    channel: Channel,
    endpoints: Vec<String>,
}

/// Which cluster the search is for.
#[derive(Clone, Copy)]
enum Sought {
    /// Any cluster. The id of the cluster known from before, if there is one, is sent along.
    Any(Option<u64>),
    Only(u64),
}

impl Sought {
    fn named(self) -> Option<u64> {
        match self {
            Sought::Any(cluster) => cluster,
            Sought::Only(cluster) => Some(cluster),
        }
    }
}

impl Leader {
    /// `known` is the cluster that the caller has belonged to. The members get its id.
    pub(super) async fn find(
        dialer: Dialer,
        endpoints: Vec<String>,
        known: Option<u64>,
        deadline: Duration,
    ) -> Result<Self, ClientError> {
        if endpoints.is_empty() {
            return Err(ClientError::NoEndpoints);
        }
        for address in &endpoints {
            channel::endpoint(address)?;
        }
        let started = Instant::now();
        let mut backoff = Backoff::new(FIRST_RETRY, LONGEST_RETRY);
        let mut reason = None;
        loop {
            let left = deadline.saturating_sub(started.elapsed());
            let looking = look(&dialer, &endpoints, Sought::Any(known), &mut reason);
            match tokio::time::timeout(left, looking).await {
                Ok(Ok(found)) => {
                    let current = Current {
                        address: found.address,
                        member: found.member,
                        channel: found.channel,
                        generation: 0,
                    };
                    let endpoints = merge(found.endpoints, endpoints);
                    return Ok(Leader {
                        dialer,
                        cluster_id: found.cluster_id,
                        known: watch::Sender::new(Known { endpoints, current }),
                        looking: tokio::sync::Mutex::default(),
                        heard: Mutex::default(),
                        watching: AtomicBool::new(false),
                    });
                }
                Ok(Err(Miss::Fatal(error))) => return Err(error),
                Ok(Err(Miss::Again)) | Err(_) => {}
            }
            let wait = backoff.step();
            if started.elapsed() + wait >= deadline {
                return Err(ClientError::PlacementUnreachable {
                    endpoints: endpoints.join(","),
                    waited: waited_since(started),
                    reason: reason.unwrap_or_else(|| format!("no answer within {deadline:?}")),
                });
            }
            tokio::time::sleep(wait).await;
        }
    }

    pub(super) fn dialer(&self) -> &Dialer {
        &self.dialer
    }

    pub(super) fn cluster_id(&self) -> u64 {
        self.cluster_id
    }

    pub(super) fn current(&self) -> Current {
        self.known.borrow().current.clone()
    }

    pub(super) fn address(&self) -> String {
        self.known.borrow().current.address.clone()
    }

    /// The endpoints that would be asked, for error messages.
    pub(super) fn known(&self) -> String {
        self.known.borrow().endpoints.join(",")
    }

    /// Looks for the leader once, unless another task has looked since the connection of this
    /// generation was handed out. If no leader is found, nothing changes.
    pub(super) async fn refresh(&self, failed_generation: u64) {
        self.search(failed_generation, true).await;
    }

    /// As [`refresh`](Self::refresh), for a connection that has not failed but is silent. The
    /// connection stays if its member still leads.
    pub(super) async fn doubt(&self, generation: u64) {
        self.search(generation, false).await;
    }

    async fn search(&self, generation: u64, failed: bool) {
        let wanted = Instant::now();
        let mut looking = self.looking.lock().await;
        let (endpoints, current) = {
            let known = self.known.borrow();
            (known.endpoints.clone(), known.current.clone())
        };
        let looked = looking.is_some_and(|began| began >= wanted);
        if current.generation != generation || looked {
            return;
        }
        let (began, mut reason) = (Instant::now(), None);
        let sought = Sought::Only(self.cluster_id);
        let found = look(&self.dialer, &endpoints, sought, &mut reason).await;
        *looking = Some(began);
        match found {
            Ok(found) if !failed && current.is_same_member(found.member, &found.address) => {}
            Ok(found) => self.known.send_modify(|known| {
                known.endpoints = merge(found.endpoints, endpoints);
                known.current = Current {
                    address: found.address,
                    member: found.member,
                    channel: found.channel,
                    generation: generation + 1,
                };
            }),
            Err(Miss::Again) => tracing::debug!(?reason, "no placement leader found"),
            Err(Miss::Fatal(error)) => complain("no placement leader found", &error),
        }
    }

    /// A call on the leader begins.
    pub(super) fn asked(self: &Arc<Self>, current: &Current) -> Unanswered<'_> {
        let (generation, since) = (current.generation, Instant::now());
        Unanswered { leader: self, generation, since, is_over: false }
    }

    /// The leader has answered a call.
    pub(super) fn answered(&self) {
        *self.heard.lock() = Some(Instant::now());
    }

    /// Completes when another member than that of `current` is known to lead.
    pub(super) async fn moved(&self, current: &Current) {
        let mut known = self.known.subscribe();
        // The sender is a field of `self`, so the wait ends only with a value.
        let _ = known
            .wait_for(|known| !current.is_same_member(known.current.member, &known.current.address))
            .await;
    }

    /// As [`moved`](Self::moved), for a caller that waits for an answer from `current`. Looks for
    /// another leader while the wait lasts.
    pub(super) async fn left(&self, current: &Current) {
        let doubting = async {
            loop {
                tokio::time::sleep(SUSPICION).await;
                self.doubt(current.generation).await;
            }
        };
        tokio::select! {
            () = self.moved(current) => {}
            () = doubting => {}
        }
    }
}

enum Miss {
    /// No member leads now, or no leader was reached. The reason is returned separately.
    Again,
    Fatal(ClientError),
}

/// Asks the endpoints until one leads to a leader that answers. The next endpoint is asked whenever
/// one has failed, or has been silent for a moment. `reason` becomes why the endpoints were of no
/// use. If it has a value already, it changes only when all endpoints have answered again.
async fn look(
    dialer: &Dialer,
    endpoints: &[String],
    sought: Sought,
    reason: &mut Option<String>,
) -> Result<Found, Miss> {
    let mut asked = FuturesUnordered::new();
    let mut others = endpoints.iter();
    // Why each endpoint is no help. The last reason may make no sense without the others.
    let mut reasons = BTreeSet::new();
    let mut strangers = 0;
    let is_first = reason.is_none();
    loop {
        if let Some(address) = others.next() {
            asked.push(inquire(dialer, address, sought));
        } else if asked.is_empty() {
            if strangers == endpoints.len() {
                let endpoints = endpoints.join(",");
                return Err(Miss::Fatal(ClientError::NoPlacement { endpoints }));
            }
            return Err(Miss::Again);
        }
        tokio::select! {
            Some(answer) = asked.next() => match answer {
                Ok(found) => return Ok(found),
                Err(Useless::Fatal(error)) => return Err(Miss::Fatal(error)),
                Err(useless) => {
                    strangers += usize::from(matches!(useless, Useless::NoMember(_)));
                    reasons.insert(useless.reason());
                    if is_first || asked.is_empty() && others.len() == 0 {
                        let said: Vec<&str> = reasons.iter().map(String::as_str).collect();
                        *reason = Some(said.join("; "));
                    }
                }
            },
            () = tokio::time::sleep(HEDGE_DELAY), if others.len() > 0 => {}
        }
    }
}

/// Why an endpoint led nowhere.
enum Useless {
    Because(String),
    /// There is an answer from this address, but not from a placement member.
    NoMember(String),
    Fatal(ClientError),
}

/// Logs an error, with a limit, because every search may meet the same error, such as a member of
/// another cluster.
fn complain(what: &str, error: &ClientError) {
    static STRANGERS: Mutex<Repeated> = Mutex::new(Repeated::new());
    if let Some(times) = STRANGERS.lock().failed(std::time::Instant::now()) {
        tracing::warn!(times, %error, "{what}");
    }
}

impl Useless {
    fn reason(self) -> String {
        match self {
            Useless::Because(reason) => reason,
            Useless::NoMember(address) => format!("{address} runs no placement member"),
            Useless::Fatal(error) => error.to_string(),
        }
    }
}

/// Asks one endpoint for the leader, and then asks the named member whether it leads.
async fn inquire(dialer: &Dialer, address: &str, sought: Sought) -> Result<Found, Useless> {
    let (channel, members) = ask(dialer, address, sought.named()).await?;
    let cluster_id = members.header.as_ref().map_or(0, |header| header.cluster_id);
    if let Sought::Only(expected) = sought
        && expected != cluster_id
    {
        let address = address.to_owned();
        let error = ClientError::ClusterMismatch { address, expected, actual: cluster_id };
        complain("a placement member was replaced", &error);
        // Another endpoint may still belong to this cluster.
        return Err(Useless::Because(error.to_string()));
    }
    let Some(leader) = members.leader.clone() else {
        return Err(Useless::Because(format!("{address} knows of no leader")));
    };
    let endpoints = urls(&members.members);
    let member = leader.member_id;
    // The member that was asked may itself be the leader, reached under another of its names.
    if leader.client_urls.iter().any(|url| bare(url) == bare(address)) {
        return Ok(Found { cluster_id, member, address: address.to_owned(), channel, endpoints });
    }
    let mut reason = format!("{address} names a leader without an address");
    for url in &leader.client_urls {
        let (channel, answer) = match ask(dialer, url, sought.named()).await {
            Ok(answered) => answered,
            Err(why) => {
                reason = why.reason();
                continue;
            }
        };
        let actual = answer.header.as_ref().map_or(0, |header| header.cluster_id);
        if actual != cluster_id {
            return Err(Useless::Fatal(ClientError::ClusterMismatch {
                address: url.clone(),
                expected: cluster_id,
                actual,
            }));
        }
        if answer.leader.is_none_or(|named| named.member_id != member) {
            reason = format!("{url} does not lead, though {address} says so");
            continue;
        }
        return Ok(Found { cluster_id, member, address: bare(url).into(), channel, endpoints });
    }
    Err(Useless::Because(reason))
}

/// One member's view of the group.
async fn ask(
    dialer: &Dialer,
    address: &str,
    cluster: Option<u64>,
) -> Result<(Channel, GetMembersResponse), Useless> {
    // A member that lost its memory learns from this header that there was a cluster.
    let header = cluster.map(|cluster_id| RequestHeader { cluster_id, ..Default::default() });
    let asking = async {
        let channel = dialer.connect(address).await.map_err(Useless::Because)?;
        let mut client = PdClient::new(channel.clone());
        let members = client
            .get_members(GetMembersRequest { header })
            .await
            .map_err(|status| match status.code() {
                Code::Unimplemented => Useless::NoMember(bare(address).to_owned()),
                _ => Useless::Because(format!("{address}: {}", channel::describe(&status))),
            })?
            .into_inner();
        match members.header.as_ref() {
            None => return Err(Useless::NoMember(bare(address).to_owned())),
            Some(header) => {
                if let Some(error) = &header.error {
                    return Err(Useless::Because(format!("{address}: {}", error.message)));
                }
            }
        }
        Ok((channel, members))
    };
    tokio::time::timeout(ASK_TIMEOUT, asking).await.unwrap_or_else(|_| {
        Err(Useless::Because(format!("{address}: no answer within {ASK_TIMEOUT:?}")))
    })
}

fn bare(url: &str) -> &str {
    url.trim().trim_start_matches("http://").trim_end_matches('/')
}

fn urls(members: &[Member]) -> Vec<String> {
    members.iter().flat_map(|m| &m.client_urls).map(|url| bare(url).into()).collect()
}

/// The addresses that the members report, followed by the given ones. The given addresses may be
/// the only ones that work from here.
fn merge(found: Vec<String>, given: Vec<String>) -> Vec<String> {
    let mut merged: Vec<String> = Vec::new();
    for address in found.into_iter().chain(given) {
        if merged.len() < MAX_ENDPOINTS && !merged.iter().any(|known| bare(known) == bare(&address))
        {
            merged.push(address);
        }
    }
    merged
}
