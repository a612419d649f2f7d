//! One region in detail: what each of its replicas reports of itself, and what the leader knows of
//! each.

use esker_client::{AdminClient, RegionInfo};
use esker_model::{RegionId, StoreId};
use esker_rpc::proto::esker as wire;
use serde::Serialize;

use crate::cli::error::CliError;
use crate::cli::output::{Align, one_line, table};
use crate::cli::view::{PeerView, RegionView, epoch};

/// A region, what each replica reports of itself, and what the leader knows of each.
#[derive(Debug, Serialize)]
pub struct RegionDetail {
    #[serde(flatten)]
    region: RegionView,
    approximate_size: Option<u64>,
    replicas: Vec<Replica>,
}

#[derive(Debug, Serialize)]
struct Replica {
    #[serde(flatten)]
    peer: PeerView,
    /// What the replica answered, or why it did not answer.
    #[serde(flatten)]
    status: Status,
    /// What the leader knows of the replica.
    progress: Option<Progress>,
}

#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Status {
    Answered(RaftStatus),
    Silent { error: String },
}

#[derive(Debug, Serialize)]
struct RaftStatus {
    raft_role: &'static str,
    term: u64,
    first_index: u64,
    last_index: u64,
    commit_index: u64,
    applied_index: u64,
}

#[derive(Debug, Clone, Serialize)]
struct Progress {
    state: String,
    match_index: u64,
    next_index: u64,
    recently_active: bool,
}

/// Asks all replicas at once. A replica that does not answer is shown as such.
pub async fn detail(admin: &AdminClient, region: RegionInfo) -> RegionDetail {
    let region = RegionView::from(region);
    let questions = region.peers.iter().map(|peer| async {
        Ok(admin.replica(RegionId(region.id), StoreId(peer.store), false).await?)
    });
    let answers = futures_util::future::join_all(questions).await;
    RegionDetail::new(region, answers)
}

impl RegionDetail {
    /// `answers` come in the order of the region's peers.
    fn new(region: RegionView, answers: Vec<Result<wire::RegionDetailResponse, CliError>>) -> Self {
        let leading = answers
            .iter()
            .filter_map(|answer| answer.as_ref().ok())
            .filter(|answer| answer.role == wire::Role::Leader as i32)
            // A deposed leader may not know yet that it is deposed, so the newest term is right.
            .max_by_key(|answer| answer.term)
            .cloned();
        let progress_of = |peer: u64| {
            let progress = &leading.as_ref()?.progress;
            let known = progress
                .iter()
                .find(|known| known.peer.as_ref().is_some_and(|known| known.id == peer))?;
            Some(Progress {
                state: known.state.clone(),
                match_index: known.match_index,
                next_index: known.next_index,
                recently_active: known.recently_active,
            })
        };
        let replicas = region
            .peers
            .iter()
            .zip(&answers)
            .map(|(peer, answer)| Replica {
                peer: peer.clone(),
                status: Status::new(answer),
                progress: progress_of(peer.id),
            })
            .collect();
        RegionDetail {
            region,
            approximate_size: leading.as_ref().map(|leader| leader.approximate_size),
            replicas,
        }
    }

    /// The text for people.
    pub fn text(&self) -> String {
        let region = &self.region;
        let known =
            |number: Option<u64>| number.map_or("unknown".to_owned(), |number| number.to_string());
        let leader = match &region.leader {
            Some(leader) => format!("peer {} on store {}", leader.id, leader.store),
            None => "unknown".to_owned(),
        };
        let headers = [
            ("PEER", Align::Right),
            ("STORE", Align::Right),
            ("ROLE", Align::Left),
            ("RAFT", Align::Left),
            ("TERM", Align::Right),
            ("FIRST", Align::Right),
            ("LAST", Align::Right),
            ("COMMIT", Align::Right),
            ("APPLIED", Align::Right),
            ("MATCH", Align::Right),
            ("FLOW", Align::Left),
        ];
        let silent: String = self.replicas.iter().filter_map(Replica::silence).collect();
        format!(
            "region:  {}\nrange:   [{}, {})\nepoch:   {}\nleader:  {leader}\nsize:    {} bytes (approximate)\n\n{}{silent}",
            region.id,
            region.start_key.bound(),
            region.end_key.bound(),
            epoch(region.epoch),
            known(self.approximate_size),
            table(&headers, self.replicas.iter().map(Replica::row)),
        )
    }
}

impl Replica {
    /// Why the replica did not answer, as a line below the table.
    fn silence(&self) -> Option<String> {
        match &self.status {
            Status::Answered(_) => None,
            Status::Silent { error } => Some(format!("\nno answer: {error}")),
        }
    }

    fn row(&self) -> Vec<String> {
        let mut row =
            vec![self.peer.id.to_string(), self.peer.store.to_string(), self.peer.role.to_owned()];
        match &self.status {
            Status::Answered(status) => {
                row.push(status.raft_role.to_owned());
                let numbers = [
                    status.term,
                    status.first_index,
                    status.last_index,
                    status.commit_index,
                    status.applied_index,
                ];
                row.extend(numbers.map(|number| number.to_string()));
            }
            Status::Silent { .. } => {
                row.push("no answer".to_owned());
                row.extend(std::iter::repeat_n("-".to_owned(), 5));
            }
        }
        match &self.progress {
            Some(progress) => {
                row.extend([progress.match_index.to_string(), progress.state.clone()])
            }
            None => row.extend(["-".to_owned(), "-".to_owned()]),
        }
        row
    }
}

impl Status {
    fn new(answer: &Result<wire::RegionDetailResponse, CliError>) -> Self {
        match answer {
            Ok(answer) => Status::Answered(RaftStatus {
                raft_role: match wire::Role::try_from(answer.role) {
                    Ok(wire::Role::Follower) => "follower",
                    Ok(wire::Role::Candidate) => "candidate",
                    Ok(wire::Role::Leader) => "leader",
                    Ok(wire::Role::Learner) => "learner",
                    Ok(wire::Role::Unknown) | Err(_) => "unknown",
                },
                term: answer.term,
                first_index: answer.first_index,
                last_index: answer.last_index,
                commit_index: answer.commit_index,
                applied_index: answer.applied_index,
            }),
            Err(error) => Status::Silent { error: one_line(error) },
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use esker_client::ClientError;

    use super::*;
    use crate::cli::key::Text;
    use crate::cli::view::EpochView;

    fn peer(id: u64, store: u64) -> PeerView {
        PeerView { id, store, role: "voter" }
    }

    fn region() -> RegionView {
        RegionView {
            id: 2,
            start_key: Text(Bytes::from_static(b"g")),
            end_key: Text::default(),
            epoch: EpochView { version: 1, conf_ver: 3 },
            leader: Some(peer(3, 1)),
            peers: vec![peer(3, 1), peer(4, 2), peer(5, 3)],
            pending: vec![],
            down: vec![],
        }
    }

    fn answer(role: wire::Role, term: u64, applied_index: u64) -> wire::RegionDetailResponse {
        wire::RegionDetailResponse {
            role: role as i32,
            term,
            applied_index,
            ..wire::RegionDetailResponse::default()
        }
    }

    fn silent() -> Result<wire::RegionDetailResponse, CliError> {
        let (address, reason) = ("a:1".to_owned(), "refused".to_owned());
        Err(ClientError::NoAnswer { store: StoreId(3), address, reason }.into())
    }

    #[test]
    fn each_replica_shows_what_it_says_and_what_the_leader_knows_of_it() {
        let mut leader = answer(wire::Role::Leader, 7, 90);
        leader.approximate_size = 4_096;
        leader.progress = vec![wire::PeerProgress {
            peer: Some(esker_rpc::proto::metapb::Peer { id: 4, store_id: 2, ..Default::default() }),
            match_index: 88,
            next_index: 89,
            state: "replicate".to_owned(),
            recently_active: true,
        }];
        let detail = RegionDetail::new(
            region(),
            vec![Ok(leader), Ok(answer(wire::Role::Follower, 7, 87)), silent()],
        );
        let text = detail.text();
        let row = |peer: &str| {
            let line = text.lines().find(|line| line.trim_start().starts_with(peer));
            line.map(|line| line.split_whitespace().collect::<Vec<_>>()).unwrap_or_default()
        };
        assert_eq!(row("3 ")[..4], ["3", "1", "voter", "leader"], "{text}");
        let follower = row("4 ");
        assert_eq!(follower[..5], ["4", "2", "voter", "follower", "7"], "{text}");
        assert_eq!(follower[8..], ["87", "88", "replicate"], "{text}");
        assert!(text.contains("store 3 at a:1 did not answer"), "{text}");
        assert!(text.contains("[g, \"\")") && text.contains("4096 bytes"), "{text}");
        let json = serde_json::to_value(&detail).expect("plain data");
        assert_eq!(json["replicas"][1]["applied_index"], 87);
        assert_eq!(json["replicas"][1]["progress"]["match_index"], 88);
        assert!(json["replicas"][2]["error"].is_string());
        assert_eq!(json["start_key"], "g");
    }

    #[test]
    fn a_leader_that_was_deposed_and_does_not_know_is_not_believed() {
        let (mut old, mut new) =
            (answer(wire::Role::Leader, 7, 1), answer(wire::Role::Leader, 8, 1));
        (old.approximate_size, new.approximate_size) = (1, 2);
        let detail = RegionDetail::new(region(), vec![Ok(old), Ok(new), silent()]);
        assert_eq!(detail.approximate_size, Some(2));
    }

    #[test]
    fn a_replica_on_a_store_that_does_not_exist_says_so() {
        let answers =
            vec![silent(), silent(), Err(ClientError::NoStore { store: StoreId(3) }.into())];
        let text = RegionDetail::new(region(), answers).text();
        assert!(text.contains("\nno answer: there is no store 3: "), "{text}");
        assert!(text.lines().all(|line| line.len() < 100), "{text}");
    }

    #[test]
    fn without_a_leader_the_size_is_unknown() {
        let detail = RegionDetail::new(region(), vec![silent(), silent(), silent()]);
        assert!(detail.text().contains("unknown bytes"));
    }
}
