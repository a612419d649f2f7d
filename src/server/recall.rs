//! What placement members remember of one another, so that none comes back with less.
//!
//! An older copy of a member's directory is whole in itself, because its marks agree. Only the
//! others can know that it is old. A member that went on with it would have forgotten votes, and
//! entries that it acknowledged. So each member reports to the others, at its start and every
//! minute, how far its memory has come. They keep that in the file `PEERS`. A member that is one of
//! several asks them before it sends other messages. It waits until so many have answered that they
//! would be a majority with it. Without those the group could not work anyway. A loss of what was
//! written in the last minute before the copy was made can go unnoticed here. Raft's leader notices
//! it when it meets the member.

use std::path::{Path, PathBuf};
use std::time::Duration;

use esker_engine::{DataDir, replace_file};
use esker_placement::MemberInfo;
use esker_rpc::proto::esker::{MemberMemory, MemberStage};
use esker_rpc::repeat::Repeated;
use futures_util::future::join_all;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::founding::{ASK_AGAIN, ASK_AGAIN_AT_MOST, ask};
use super::member::Members;
use crate::Error;

const FILE: &str = "PEERS";
const FORMAT: u32 = 1;

/// How often a member reports to the others how far its memory has come.
const TELL_EVERY: Duration = Duration::from_secs(60);
/// Members that one member remembers, including those that were replaced. The latest are kept.
const MAX_REMEMBERED: usize = 64;

/// How far the memory of one member had come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Known {
    member: u64,
    lineage: u64,
    generation: u64,
    log_sequence: u64,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Peers {
    format: u32,
    /// The group whose members these are.
    group: u64,
    members: Vec<Known>,
}

/// What this node's member remembers of the others.
pub struct Recall {
    directory: PathBuf,
    peers: Mutex<Peers>,
}

/// Whether a member that was last known as `known` may go on as `now`.
fn may_become(known: &MemberMemory, now: &MemberMemory) -> bool {
    known.lineage == 0
        || known.lineage == now.lineage
            && known.generation <= now.generation
            && known.log_sequence <= now.log_sequence
}

impl Recall {
    /// Reads the file.
    ///
    /// # Errors
    /// When the file is damaged.
    pub fn open(data: &DataDir) -> Result<Self, Error> {
        let directory = data.path().to_owned();
        let peers = match data.read_record(FILE)? {
            None => Peers::default(),
            Some(record) => match toml::from_slice::<Peers>(&record) {
                Ok(peers) if peers.format == FORMAT => peers,
                Ok(Peers { format, .. }) => {
                    let reason = format!("it has format {format}, this version reads {FORMAT}");
                    return Err(Error::Record { path: directory.join(FILE), reason });
                }
                Err(error) => {
                    let (path, reason) = (directory.join(FILE), error.message().to_owned());
                    return Err(Error::Damaged { path, reason });
                }
            },
        };
        Ok(Recall { directory, peers: Mutex::new(peers) })
    }

    /// Remembers only the members of this group from now on.
    pub fn belongs_to(&self, group: u64) {
        let mut peers = self.peers.lock();
        if peers.group != group {
            *peers = Peers { format: FORMAT, group, members: Vec::new() };
        }
    }

    /// Takes in a member's report of its memory, and returns how far that memory was known to have
    /// come before. Writes a file, so it must not run on a thread that others wait for.
    pub fn hear(&self, told: &MemberMemory) -> MemberMemory {
        let mut peers = self.peers.lock();
        if told.group == 0 || told.group != peers.group {
            return MemberMemory::default();
        }
        let group = told.group;
        let place = peers.members.iter().position(|known| known.member == told.member);
        let before = place.map(|place| peers.members[place]).map(
            |Known { member, lineage, generation, log_sequence }| MemberMemory {
                group,
                member,
                lineage,
                generation,
                log_sequence,
            },
        );
        let before = before.unwrap_or_default();
        if before != *told && may_become(&before, told) {
            let &MemberMemory { member, lineage, generation, log_sequence, .. } = told;
            let known = Known { member, lineage, generation, log_sequence };
            match place {
                Some(place) => peers.members[place] = known,
                None => peers.members.push(known),
            }
            // Ids grow, so the lowest was replaced longest ago.
            if peers.members.len() > MAX_REMEMBERED {
                peers.members.sort_by_key(|known| known.member);
                peers.members.remove(0);
            }
            self.keep(&peers);
        }
        before
    }

    fn keep(&self, peers: &Peers) {
        static FAULTS: Mutex<Repeated> = Mutex::new(Repeated::new());
        let kept = toml::to_string(peers)
            .map_err(std::io::Error::other)
            .and_then(|text| replace_file(&self.directory, FILE, text.as_bytes()));
        if let Err(error) = kept
            && let Some(times) = FAULTS.lock().failed(std::time::Instant::now())
        {
            let path = self.directory.join(FILE);
            tracing::error!(times, %error, path = %path.display(), "cannot remember the other members");
        }
    }
}

fn others(members: &Members) -> impl Iterator<Item = &MemberInfo> {
    let name = members.name();
    members.all.iter().filter(move |member| member.name != name)
}

async fn tell(members: &Members, memory: &MemberMemory) -> Vec<(String, MemberStage)> {
    let answers = others(members).map(|other| async {
        let answer = ask(&other.address, Some(*memory)).await?;
        // A member that is not in the group, or not yet, remembers nothing.
        let is_of_group = answer.group.as_ref().is_some_and(|group| group.id == memory.group);
        (answer.name == other.name && is_of_group).then(|| (other.name.clone(), answer))
    });
    join_all(answers).await.into_iter().flatten().collect()
}

/// Returns when enough of the others have answered that they have not seen a later memory of this
/// member than `memory`.
///
/// # Errors
/// When a member has seen a later one, because the directory is then an older copy.
pub async fn check(
    members: &Members,
    memory: &MemberMemory,
    directory: &Path,
) -> Result<(), Error> {
    let needed = members.all.len() / 2;
    let mut waiting = Repeated::new();
    let mut pause = ASK_AGAIN;
    loop {
        let answers = tell(members, memory).await;
        for (told_by, answer) in &answers {
            if !answer.known.as_ref().is_none_or(|known| may_become(known, memory)) {
                return Err(Error::OlderMember {
                    path: directory.to_owned(),
                    name: members.name().to_owned(),
                    told_by: told_by.clone(),
                });
            }
        }
        if answers.len() >= needed {
            return Ok(());
        }
        // The first rounds are not logged, because the others are starting, too.
        if pause == ASK_AGAIN_AT_MOST
            && let Some(times) = waiting.failed(Instant::now().into_std())
        {
            tracing::warn!(
                times,
                "this placement member waits for {needed} others to be told that its directory is \
                 no older copy; {} have answered",
                answers.len()
            );
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(ASK_AGAIN_AT_MOST);
    }
}

/// Reports to the others how far the memory has come, until `memory` returns `None`.
pub async fn keep_telling(members: Members, memory: impl Fn() -> Option<MemberMemory>) {
    let mut ticks = tokio::time::interval(TELL_EVERY);
    loop {
        ticks.tick().await;
        let Some(memory) = memory() else { return };
        tell(&members, &memory).await;
    }
}

#[cfg(test)]
mod tests {
    use esker_engine::Kind;

    use super::*;

    fn memory(member: u64, generation: u64, log_sequence: u64) -> MemberMemory {
        MemberMemory { group: 9, member, lineage: 5, generation, log_sequence }
    }

    #[test]
    fn what_was_seen_of_a_member_is_kept_and_never_lowered() {
        let root = tempfile::tempdir().expect("a temporary directory");
        let folder = root.path().join("placement");
        let data = DataDir::open(&folder, Kind::Member).expect("an empty directory");
        let recall = Recall::open(&data).expect("nothing is there");
        assert_eq!(recall.hear(&memory(2, 1, 1)), MemberMemory::default(), "of no group yet");
        recall.belongs_to(9);
        assert_eq!(recall.hear(&memory(2, 3, 70)), MemberMemory::default());
        for older in
            [memory(2, 2, 80), memory(2, 3, 69), MemberMemory { lineage: 6, ..memory(2, 9, 90) }]
        {
            let known = recall.hear(&older);
            assert_eq!(known, memory(2, 3, 70));
            assert!(!may_become(&known, &older), "{older:?}");
        }
        assert_eq!(recall.hear(&memory(2, 4, 70)), memory(2, 3, 70));
        let again = Recall::open(&data).expect("it can be read");
        again.belongs_to(9);
        assert_eq!(again.hear(&memory(2, 4, 71)), memory(2, 4, 70), "it was durable");
        assert_eq!(
            again.hear(&MemberMemory { group: 8, ..memory(2, 1, 1) }),
            MemberMemory::default()
        );
        for member in 10..200 {
            again.hear(&memory(member, 1, 1));
        }
        assert_eq!(again.peers.lock().members.len(), MAX_REMEMBERED);
        assert_eq!(again.hear(&memory(199, 1, 1)), memory(199, 1, 1));
        again.belongs_to(8);
        assert_eq!(
            again.hear(&MemberMemory { group: 8, ..memory(199, 1, 1) }),
            MemberMemory::default()
        );
    }
}
