//! The roll call: which members answer, and which one leads. A member returns its result for
//! `GetMembers`.
//!
//! Published clients ask the members in the order in which they are listed, and wait for each
//! answer without a limit. A frozen member still has its sockets, so a client that is sent to it
//! waits for as long as it is frozen. Raft does not know enough to prevent that. A follower hears
//! only from the leader, and trusts the leader for an election timeout after its last message. So
//! before it answers, a member asks all the others, at once.
//!
//! What it promises: the leader that it names has answered since the request came that it leads
//! under a lease. When there is no such leader, it waits for one, up to [`ROLL_PATIENCE`], and then
//! names none. Members that were heard from come before those that were not.
//!
//! It costs nothing while no client asks. Requests that come in together share a round. A member
//! that was silent before is asked one question at a time, and not waited for.

use std::cmp::Reverse;
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use esker_model::MemberId;
use esker_rpc::channel::Dialer;
use esker_rpc::members::MemberClient;
use esker_rpc::proto::esker::members_server::Members;
use esker_rpc::proto::esker::{MemberStatusRequest, MemberStatusResponse};
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior};
use tonic::{Request, Response, Status};
use tracing::debug;

use super::Shared;
use crate::state::MemberInfo;

/// How long a roll call waits for a member that leads: longer than an election takes, or two in a
/// row.
pub(super) const ROLL_PATIENCE: Duration = Duration::from_secs(3);
/// How often the members are asked again while none of them leads.
const ASK_AGAIN: Duration = Duration::from_millis(250);
/// How long the other members may take when the leader is known.
const GRACE: Duration = Duration::from_millis(100);
/// How long an answer may take. After that the connection counts as dead, and the next question
/// opens another.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);
/// Answers that wait for a roll call to read them.
const MAX_ANSWERS: usize = 64;

/// The result of a roll call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Roll {
    /// All members: the leader first, then those that answered, then the others. Among the others,
    /// those that were heard from last come first.
    pub members: Vec<MemberInfo>,
    pub leader: Option<MemberInfo>,
    /// The members that answered, and this member.
    pub present: BTreeSet<MemberId>,
}

/// The roll calls of one member.
#[derive(Default)]
pub(crate) struct RollCall {
    /// The result of the latest roll call and the time of its answers. Held by the task that asks.
    latest: tokio::sync::Mutex<Option<(Instant, Arc<Roll>)>>,
    others: Arc<Mutex<HashMap<MemberId, Other>>>,
}

/// Another member, as far as roll calls know it.
struct Other {
    client: MemberClient,
    heard: Option<Instant>,
    /// The member did not answer the latest question.
    silent: bool,
    /// Questions to the member that are not answered.
    asked: usize,
}

/// The outcome of one question.
struct Answer {
    member: MemberId,
    asked: Instant,
    status: Option<MemberStatusResponse>,
}

impl RollCall {
    /// Which members answer now.
    pub async fn take(&self, shared: &Shared) -> Arc<Roll> {
        let wanted = Instant::now();
        let mut latest = self.latest.lock().await;
        if let Some((as_of, roll)) = &*latest
            && *as_of >= wanted
        {
            return Arc::clone(roll);
        }
        let (as_of, roll) = self.call(shared, wanted).await;
        let roll = Arc::new(roll);
        *latest = Some((as_of, Arc::clone(&roll)));
        roll
    }

    /// `wanted` is when the request came, so that the wait for an earlier roll call counts.
    async fn call(&self, shared: &Shared, wanted: Instant) -> (Instant, Roll) {
        let me = shared.state.me();
        let members = shared.state.members();
        let is_member = |id: MemberId| members.iter().any(|member| member.id == id);
        // Members that were replaced are forgotten.
        self.others.lock().retain(|id, _| is_member(*id));
        let expected = self.expected(&members, me);

        let mut leadership = shared.state.leadership();
        let mut leads = shared.lead.subscribe();
        let (tell, mut told) = mpsc::channel(MAX_ANSWERS);
        let mut asking = tokio::time::interval(ASK_AGAIN);
        asking.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut present = BTreeSet::from([me]);
        let mut accounted = BTreeSet::new();
        let mut leader: Option<(MemberId, Instant)> = None;
        let mut as_of = Instant::now();
        let mut asked_all = false;
        let mut until = wanted + ROLL_PATIENCE;
        loop {
            if leader.is_none() && shared.leads() {
                let now = Instant::now();
                leader = Some((me, now));
                until = until.min(now + GRACE);
            }
            // Every member is asked once, even if the leader is known.
            if leader.is_some() && asked_all && expected.is_subset(&accounted) {
                break;
            }
            tokio::select! {
                () = tokio::time::sleep_until(until) => break,
                _ = asking.tick(), if leader.is_none() || !asked_all => {
                    asked_all = true;
                    as_of = Instant::now();
                    self.ask_all(shared, &members, &tell);
                }
                Some(answer) = told.recv() => {
                    accounted.insert(answer.member);
                    let Some(status) = answer.status else { continue };
                    present.insert(answer.member);
                    if status.leads && leader.is_none() {
                        leader = Some((answer.member, answer.asked));
                        until = until.min(Instant::now() + GRACE);
                    }
                }
                // The next leader may be this member or another, so all are asked at once.
                changed = leadership.changed(), if leader.is_none() => {
                    if changed.is_err() {
                        break;
                    }
                    asking.reset_immediately();
                }
                changed = leads.changed(), if leader.is_none() => {
                    if changed.is_err() {
                        break;
                    }
                }
            }
        }
        if let Some((_, asked)) = leader {
            as_of = asked;
        }
        self.note(&accounted, &present);
        let leader = leader.map(|(id, _)| id);
        (as_of, self.order(members, leader, present, me))
    }

    /// The members that a roll call waits for: those that were not silent when last asked.
    fn expected(&self, members: &[MemberInfo], me: MemberId) -> BTreeSet<MemberId> {
        let others = self.others.lock();
        let is_silent = |id| others.get(&id).is_some_and(|other: &Other| other.silent);
        let ids = members.iter().map(|member| member.id);
        ids.filter(|id| *id != me && !is_silent(*id)).collect()
    }

    fn ask_all(&self, shared: &Shared, members: &[MemberInfo], tell: &mpsc::Sender<Answer>) {
        let me = shared.state.me();
        let cluster = shared.cluster_id();
        for member in members.iter().filter(|member| member.id != me) {
            let Some(client) = self.client(&shared.config.dialer, member) else { continue };
            let (member, others, tell) = (member.id, Arc::clone(&self.others), tell.clone());
            // An answer that comes after the end of the roll call is still of use to the next one,
            // so this is a task of its own.
            tokio::spawn(async move {
                let asked = Instant::now();
                let status = match client.status(ANSWER_TIMEOUT).await {
                    Ok(status) if is_from(&status, member, cluster) => Some(status),
                    Ok(status) => {
                        debug!(%member, ?status, "another one answers in a member's place");
                        None
                    }
                    Err(reason) => {
                        debug!(%member, reason, "a member does not answer");
                        None
                    }
                };
                settle(&others, member, &client, status.is_some());
                let _ = tell.try_send(Answer { member, asked, status });
            });
        }
    }

    /// The connection on which a member is to be asked now; `None` if it is not to be asked.
    fn client(&self, dialer: &Dialer, member: &MemberInfo) -> Option<MemberClient> {
        let mut others = self.others.lock();
        if let Some(other) = others.get_mut(&member.id)
            && other.client.address() == member.address
        {
            if other.silent && other.asked > 0 {
                return None;
            }
            other.asked += 1;
            return Some(other.client.clone());
        }
        let client = match MemberClient::new(dialer, &member.address) {
            Ok(client) => client,
            Err(error) => {
                debug!(member = %member.id, %error, "a member cannot be asked");
                return None;
            }
        };
        // The member has its first chance to answer, so it is not silent.
        let heard = others.get(&member.id).and_then(|other| other.heard);
        others.insert(member.id, Other { client: client.clone(), heard, silent: false, asked: 1 });
        Some(client)
    }

    /// Notes the members that did not answer in time, so that the next roll call does not wait for
    /// them.
    fn note(&self, accounted: &BTreeSet<MemberId>, present: &BTreeSet<MemberId>) {
        for (id, other) in self.others.lock().iter_mut() {
            if !accounted.contains(id) && !present.contains(id) {
                other.silent = true;
            }
        }
    }

    fn order(
        &self,
        mut members: Vec<MemberInfo>,
        leader: Option<MemberId>,
        present: BTreeSet<MemberId>,
        me: MemberId,
    ) -> Roll {
        let others = self.others.lock();
        let heard = |id: MemberId| others.get(&id).and_then(|other| other.heard);
        members.sort_by_key(|member| {
            let id = member.id;
            let is_silent = !present.contains(&id);
            let heard = if id == me || !is_silent { None } else { heard(id) };
            (leader != Some(id), is_silent, Reverse(heard))
        });
        let leader = members.iter().find(|member| leader == Some(member.id)).cloned();
        Roll { members, leader, present }
    }
}

/// Whether an answer is from the member that was asked. Another process may have its address by
/// now.
fn is_from(status: &MemberStatusResponse, member: MemberId, cluster: Option<u64>) -> bool {
    let is_of_cluster =
        status.cluster_id == 0 || cluster.is_none_or(|cluster| cluster == status.cluster_id);
    status.member_id == member.0 && is_of_cluster
}

/// Notes the outcome of a question, unless the member has another address by now.
fn settle(
    others: &Mutex<HashMap<MemberId, Other>>,
    member: MemberId,
    client: &MemberClient,
    answered: bool,
) {
    let mut others = others.lock();
    let Some(other) = others.get_mut(&member) else { return };
    if other.client.address() != client.address() {
        return;
    }
    other.asked = other.asked.saturating_sub(1);
    other.silent = !answered;
    if answered {
        other.heard = Some(Instant::now());
    } else {
        // Perhaps only the connection is dead.
        other.client = client.reopened();
    }
}

/// The service by which the members ask each other.
pub struct MembersService {
    shared: Arc<Shared>,
}

impl MembersService {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }
}

#[tonic::async_trait]
impl Members for MembersService {
    async fn member_status(
        &self,
        _: Request<MemberStatusRequest>,
    ) -> Result<Response<MemberStatusResponse>, Status> {
        Ok(Response::new(MemberStatusResponse {
            cluster_id: self.shared.cluster_id().unwrap_or(0),
            member_id: self.shared.state.me().0,
            leads: self.shared.leads(),
        }))
    }
}
