//! How a group of placement members is founded once, and never a second time.
//!
//! A member whose directory is empty may be one of a new cluster, or one that lost its memory. It
//! cannot know which, and must not vote. With an empty memory it could help to elect a leader
//! without the entries that the group has acknowledged. So it asks the other members.
//!
//! - A **nonce** is drawn for the empty directory and kept in the file `FOUNDING` before any other
//!   member hears of it.
//! - When **all** listed members answer that they are empty, and were started with the same list,
//!   each knows the same names and nonces, and so the same group, whose id is made of them. Each
//!   begins with the group's first state. A member may hear of a group that was founded with its
//!   own name and nonce. It was part of the founding and has not sent any message yet, so it begins
//!   with the first state, too.
//! - A member that has lost its memory founds nothing, and the others found nothing with it. The
//!   member knows of the loss by the store beside it, which is in use. Or it receives a request for
//!   a cluster at this address within the first [`FIRST_START`], because the stores of a cluster
//!   whose placement members are gone ask for them every half second. It does not offer itself to
//!   the others before it has listened for so long, and `FOUNDING` keeps what it heard for later
//!   starts.
//! - A member that hears of a group without its nonce is a newcomer. It waits until an operator
//!   runs `esker placement replace NAME`. Then the leader records its nonce under a new id and adds
//!   that id. The newcomer joins under the id, empty, and gets the data. A directory that is
//!   emptied again has another nonce, and waits again.
//!
//! `FOUNDING` is removed before the member sends its first message. The file `MEMBERS` keeps what
//! the founders agreed on.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use esker_engine::{DataDir, replace_file};
use esker_placement::{MemberId, MemberInfo};
use esker_rpc::proto::esker::founding_client::FoundingClient;
use esker_rpc::proto::esker::{
    GroupMember, MemberGroup, MemberMemory, MemberStage, MemberStageRequest,
};
use futures_util::future::join_all;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use tonic::transport::Endpoint;

use super::member::Members;
use crate::Error;

const FOUNDING: &str = "FOUNDING";
pub(super) const MEMBERS: &str = "MEMBERS";
const FORMAT: u32 = 1;

/// How long one member may take to answer with its stage.
const ASK_WITHIN: Duration = Duration::from_secs(1);
/// The pause between two rounds of questions: at first, and at most.
pub(super) const ASK_AGAIN: Duration = Duration::from_millis(50);
pub(super) const ASK_AGAIN_AT_MOST: Duration = Duration::from_secs(1);
/// How long a node with a known address listens for requests for an earlier group before it helps
/// to found one: a few times the longest wait between two such requests.
pub const FIRST_START: Duration = Duration::from_secs(2);
/// How often the log repeats what the member waits for.
const SAY_AGAIN: Duration = Duration::from_secs(60);

/// A member as the founders knew it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Founder {
    pub id: u64,
    pub name: String,
    pub nonce: u64,
}

/// What a group was founded with. The same on each of its members, for ever.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    format: u32,
    /// Distinguishes this group from every other.
    pub group: u64,
    /// Identifies the list of members that this node was started with.
    pub join: u64,
    pub founders: Vec<Founder>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Waiting {
    format: u32,
    nonce: u64,
    /// The cluster that was asked for at this member's address, so that the member has lost it. It
    /// is kept, because at the next start no request may come.
    #[serde(default)]
    lost: u64,
}

/// What a member with an empty directory will be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Adoption {
    pub me: MemberId,
    pub record: Record,
}

impl Record {
    /// Whether the member began with the group's first state, rather than empty.
    pub fn is_founder(&self, member: MemberId) -> bool {
        self.founders.iter().any(|founder| founder.id == member.0)
    }

    /// The record of the group in the directory of a member that was used.
    pub fn read(data: &DataDir) -> Result<Option<Record>, Error> {
        let Some(record) = data.read_record(MEMBERS)? else { return Ok(None) };
        parse(data, MEMBERS, &record, |record: &Record| record.format).map(Some)
    }

    /// Writes the record, before the directory gets its owner.
    pub fn write(&self, data: &DataDir) -> Result<(), Error> {
        Ok(data.write_record(MEMBERS, to_text(self)?.as_bytes())?)
    }
}

fn to_text<T: Serialize>(value: &T) -> Result<String, Error> {
    toml::to_string(value).map_err(|error| Error::Internal { reason: error.to_string() })
}

fn parse<T: for<'a> Deserialize<'a>>(
    data: &DataDir,
    name: &str,
    record: &[u8],
    format: impl Fn(&T) -> u32,
) -> Result<T, Error> {
    let damaged = |reason: String| Error::Record { path: data.path().join(name), reason };
    let value: T = toml::from_slice(record).map_err(|error| damaged(error.message().to_owned()))?;
    match format(&value) {
        FORMAT => Ok(value),
        other => Err(damaged(format!("it has format {other}, this version reads {FORMAT}"))),
    }
}

/// The number of an empty directory, drawn once, and durable before it is sent anywhere. Also the
/// cluster that was asked for at the member's address at an earlier start, or zero.
pub fn nonce(data: &DataDir) -> Result<(u64, u64), Error> {
    if let Some(record) = data.read_record(FOUNDING)? {
        let waiting = parse(data, FOUNDING, &record, |waiting: &Waiting| waiting.format)?;
        return Ok((waiting.nonce, waiting.lost));
    }
    let waiting = Waiting { format: FORMAT, nonce: rand::random::<u64>().max(1), lost: 0 };
    data.write_record(FOUNDING, to_text(&waiting)?.as_bytes())?;
    Ok((waiting.nonce, 0))
}

/// Records for later starts that a cluster was asked for.
pub fn remember_lost(folder: &Path, nonce: u64, lost: u64) -> Result<(), Error> {
    let text = to_text(&Waiting { format: FORMAT, nonce, lost })?;
    replace_file(folder, FOUNDING, text.as_bytes()).map_err(|source| Error::File {
        what: "cannot write",
        path: folder.join(FOUNDING),
        source,
    })
}

/// Removes the nonce, before the member sends messages. From now on an empty directory is another
/// one.
pub fn forget_nonce(data: &DataDir) -> Result<(), Error> {
    Ok(data.remove_record(FOUNDING)?)
}

/// The group that members with these names and nonces found. Every member computes the same.
pub fn founded(members: &Members, nonces: &BTreeMap<String, u64>) -> Record {
    let founders: Vec<Founder> = members
        .all
        .iter()
        .map(|member| Founder {
            id: member.id.0,
            name: member.name.clone(),
            nonce: nonces.get(&member.name).copied().unwrap_or_default(),
        })
        .collect();
    let text: Vec<String> =
        founders.iter().map(|founder| format!("{}={}", founder.name, founder.nonce)).collect();
    Record {
        format: FORMAT,
        group: crate::node::tag_of(&text.join(",")).max(1),
        join: members.tag,
        founders,
    }
}

/// What the answers of all other members mean for a member whose directory is empty.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// The member is part of a group, under a known id.
    Adopt(Adoption),
    /// All members are new, and this is their group.
    Found(Adoption),
    /// There is a group, and this member is not in it.
    Newcomer { told_by: String },
    /// Not all members have answered that they are new, with the reason for each that has not.
    /// `all_are_empty` is whether all of them have answered at least that their directories are
    /// empty. Then there is no group to hear of.
    Wait { others: Vec<String>, all_are_empty: bool },
}

/// `answers` are the answers of the other members, by name.
fn judge(
    members: &Members,
    name: &str,
    nonce: u64,
    answers: &BTreeMap<String, MemberStage>,
) -> Verdict {
    let is_me = |member: &&GroupMember| member.name == name && member.nonce == nonce;
    let mut stranger_to = None;
    for (told_by, answer) in answers {
        let Some(group) = &answer.group else { continue };
        match group.members.iter().find(is_me) {
            Some(me) => {
                let record = Record {
                    format: FORMAT,
                    group: group.id,
                    join: members.tag,
                    founders: group.founders.iter().map(Founder::from).collect(),
                };
                return Verdict::Adopt(Adoption { me: MemberId(me.id), record });
            }
            None => stranger_to = Some(told_by.clone()),
        }
    }
    if let Some(told_by) = stranger_to {
        return Verdict::Newcomer { told_by };
    }
    let mut nonces = BTreeMap::from([(name.to_owned(), nonce)]);
    let (mut missing, mut all_are_empty) = (Vec::new(), true);
    for other in members.all.iter().filter(|other| other.name != name) {
        let answer = answers.get(&other.name);
        let why = match answer.filter(|answer| answer.name == other.name && answer.nonce != 0) {
            None => {
                all_are_empty = false;
                "has not answered yet"
            }
            Some(answer) if answer.join != members.tag => "was started with another --join",
            Some(answer) if answer.lost => "has lost its directory",
            Some(answer) => {
                nonces.insert(other.name.clone(), answer.nonce);
                continue;
            }
        };
        missing.push(format!("{} at {} {why}", other.name, other.address));
    }
    if !missing.is_empty() {
        return Verdict::Wait { others: missing, all_are_empty };
    }
    Verdict::Found(Adoption { me: members.me, record: founded(members, &nonces) })
}

impl From<&GroupMember> for Founder {
    fn from(member: &GroupMember) -> Self {
        Founder { id: member.id, name: member.name.clone(), nonce: member.nonce }
    }
}

impl From<&Founder> for GroupMember {
    fn from(founder: &Founder) -> Self {
        GroupMember { id: founder.id, name: founder.name.clone(), nonce: founder.nonce }
    }
}

/// The group in a message for others.
pub fn group_message(record: &Record, members: Vec<GroupMember>) -> MemberGroup {
    MemberGroup {
        id: record.group,
        founders: record.founders.iter().map(GroupMember::from).collect(),
        members,
    }
}

/// The stage of one member; `None` if it does not answer in time. The request carries how far the
/// `memory` of a member has come.
pub async fn ask(address: &str, memory: Option<MemberMemory>) -> Option<MemberStage> {
    let endpoint = Endpoint::from_shared(format!("http://{address}")).ok()?;
    let endpoint = endpoint.connect_timeout(ASK_WITHIN).timeout(ASK_WITHIN);
    let asked = async {
        let channel = endpoint.connect().await.ok()?;
        let answer =
            FoundingClient::new(channel).stage(MemberStageRequest { memory }).await.ok()?;
        Some(answer.into_inner())
    };
    tokio::time::timeout(ASK_WITHIN, asked).await.ok().flatten()
}

async fn ask_all(others: &[&MemberInfo]) -> BTreeMap<String, MemberStage> {
    let answers = others.iter().map(|other| async {
        let answer = ask(&other.address, None).await?;
        Some((other.name.clone(), answer))
    });
    join_all(answers).await.into_iter().flatten().collect()
}

/// A member whose directory is empty, and that looks for its group.
pub struct Candidate<'a> {
    pub members: &'a Members,
    pub nonce: u64,
    pub directory: &'a Path,
    /// Until when it listens for requests for an earlier group.
    pub listen_until: Instant,
}

impl Candidate<'_> {
    /// Asks the other members until it is known what this member will be. `lost` returns why it
    /// cannot belong to a new group, as soon as there is a reason. Waits for as long as that takes.
    ///
    /// # Errors
    /// When this node is not new, and no other member knows of its group.
    pub async fn settle(&self, lost: impl Fn() -> Option<Error>) -> Result<Adoption, Error> {
        let name = self.members.name();
        let others: Vec<&MemberInfo> =
            self.members.all.iter().filter(|member| member.name != name).collect();
        let mut pause = ASK_AGAIN;
        let mut said: Option<Instant> = None;
        loop {
            // Looked at before the others are asked, because a later request may be for the very
            // group that they have founded meanwhile.
            let reason = lost();
            let answers = ask_all(&others).await;
            let verdict = judge(self.members, name, self.nonce, &answers);
            if let Verdict::Found(_) | Verdict::Wait { all_are_empty: true, .. } = &verdict
                && let Some(error) = reason
            {
                if let Error::ClusterLost { cluster, .. } = &error {
                    remember_lost(self.directory, self.nonce, *cluster)?;
                }
                return Err(error);
            }
            let why = match verdict {
                Verdict::Adopt(adoption) => return Ok(adoption),
                Verdict::Found(adoption)
                    if Instant::now() >= self.listen_until && lost().is_none() =>
                {
                    return Ok(adoption);
                }
                Verdict::Found(_) => "listening for an earlier group".to_owned(),
                Verdict::Newcomer { told_by } => format!(
                    "the placement group exists, as {told_by} says, and does not know this \
                     member: its directory {} is empty; put the directory back, or, if it is \
                     lost for good, run `esker placement replace {name}`",
                    self.directory.display()
                ),
                Verdict::Wait { others, .. } => format!(
                    "the directory of this placement member is empty; waiting for all members, \
                     to found the group together or to hear of it: {}",
                    others.join(", ")
                ),
            };
            // The first rounds are not logged, because the others are starting, too.
            if pause == ASK_AGAIN_AT_MOST && said.is_none_or(|said| said.elapsed() >= SAY_AGAIN) {
                said = Some(Instant::now());
                tracing::warn!("{why}");
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(ASK_AGAIN_AT_MOST);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn members(me: u64) -> Members {
        let all = (1..=3)
            .map(|id| MemberInfo {
                id: MemberId(id),
                name: format!("placement-{id}"),
                address: format!("127.0.0.1:{id}"),
            })
            .collect();
        Members { me: MemberId(me), all, tag: 7 }
    }

    fn empty(id: u64, nonce: u64) -> (String, MemberStage) {
        let name = format!("placement-{id}");
        (name.clone(), MemberStage { name, nonce, join: 7, ..MemberStage::default() })
    }

    fn member(id: u64, group: &MemberGroup) -> (String, MemberStage) {
        let name = format!("placement-{id}");
        let group = Some(group.clone());
        (name.clone(), MemberStage { name, group, join: 7, ..MemberStage::default() })
    }

    fn verdict(me: u64, nonce: u64, answers: &[(String, MemberStage)]) -> Verdict {
        let answers = answers.iter().cloned().collect();
        judge(&members(me), &format!("placement-{me}"), nonce, &answers)
    }

    fn group_of(record: &Record) -> MemberGroup {
        let members = record.founders.iter().map(GroupMember::from).collect();
        group_message(record, members)
    }

    fn adopted(verdict: Verdict) -> Adoption {
        match verdict {
            Verdict::Adopt(adoption) | Verdict::Found(adoption) => adoption,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn all_members_found_the_same_group_whoever_asks() {
        let one = adopted(verdict(1, 11, &[empty(2, 22), empty(3, 33)]));
        let two = adopted(verdict(2, 22, &[empty(1, 11), empty(3, 33)]));
        assert_eq!(one.record, two.record);
        assert_eq!((one.me, two.me), (MemberId(1), MemberId(2)));
        // A slower member hears of the group from the others.
        let three = verdict(3, 33, &[member(1, &group_of(&one.record)), empty(2, 22)]);
        assert_eq!(adopted(three), Adoption { me: MemberId(3), record: one.record });
    }

    #[test]
    fn a_member_that_is_silent_is_waited_for() {
        let others = vec!["placement-3 at 127.0.0.1:3 has not answered yet".to_owned()];
        let waits = Verdict::Wait { others, all_are_empty: false };
        assert_eq!(verdict(1, 11, &[empty(2, 22)]), waits);
        // A node that runs no member, or another member, counts as silent.
        let wrong = (("placement-3").to_owned(), empty(2, 22).1);
        assert!(matches!(verdict(1, 11, &[empty(2, 22), wrong]), Verdict::Wait { .. }));
    }

    #[test]
    fn a_directory_that_was_emptied_is_a_newcomer_and_never_founds_again() {
        let group = group_of(&adopted(verdict(1, 11, &[empty(2, 22), empty(3, 33)])).record);
        let emptied = verdict(3, 34, &[member(1, &group), member(2, &group)]);
        assert_eq!(emptied, Verdict::Newcomer { told_by: "placement-2".to_owned() });
        // Also with only one of the other members there, and with a second one emptied.
        assert!(matches!(verdict(3, 34, &[member(1, &group)]), Verdict::Newcomer { .. }));
        let two_emptied = verdict(3, 34, &[member(1, &group), empty(2, 23)]);
        assert!(matches!(two_emptied, Verdict::Newcomer { .. }));
    }

    #[test]
    fn a_newcomer_joins_under_the_id_that_was_written_down_for_its_nonce() {
        let record = adopted(verdict(1, 11, &[empty(2, 22), empty(3, 33)])).record;
        let mut group = group_of(&record);
        group.members[2] = GroupMember { id: 4, name: "placement-3".to_owned(), nonce: 34 };
        let joined = adopted(verdict(3, 34, &[member(1, &group)]));
        assert_eq!(joined.me, MemberId(4));
        assert!(!joined.record.is_founder(joined.me) && joined.record.is_founder(MemberId(1)));
        // A directory that is emptied once more is a newcomer again.
        assert!(matches!(verdict(3, 35, &[member(1, &group)]), Verdict::Newcomer { .. }));
    }

    #[test]
    fn nobody_founds_with_a_member_that_lost_its_directory_or_has_another_list() {
        for (stage, why) in [
            (MemberStage { lost: true, ..empty(3, 33).1 }, "has lost its directory"),
            (MemberStage { join: 8, ..empty(3, 33).1 }, "was started with another --join"),
        ] {
            let verdict = verdict(1, 11, &[empty(2, 22), (stage.name.clone(), stage)]);
            let others = vec![format!("placement-3 at 127.0.0.1:3 {why}")];
            assert_eq!(verdict, Verdict::Wait { others, all_are_empty: true });
        }
    }
}
