//! `esker placement`: the members of the placement driver, and its clock.

use clap::{Args, Subcommand};
use esker_client::admin::ReplacedMember;
use esker_model::Timestamp;
use serde::Serialize;

use super::cluster::ClusterArguments;
use super::error::CliError;
use super::output::{Align, print, print_json, table};
use super::view::MemberView;

/// Shows the placement driver, which knows where every region is and hands out timestamps
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  esker placement members")]
pub struct PlacementArguments {
    #[command(flatten)]
    cluster: ClusterArguments,
    #[command(subcommand)]
    command: PlacementCommand,
}

#[derive(Debug, Subcommand)]
enum PlacementCommand {
    /// Lists the members and shows which one leads
    #[command(after_help = "Example:\n  esker placement members --json")]
    Members,
    /// Lets a member that lost its directory join again, under a new id
    ///
    /// Start the node with an empty directory first, with the same addresses as before.
    #[command(after_help = "Example:\n  esker placement replace placement-3")]
    Replace {
        /// The member's name, as `esker placement members` shows it
        name: String,
    },
    /// Takes one timestamp
    #[command(after_help = "Example:\n  esker placement tso")]
    Tso,
}

/// The ids of a member that was replaced.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct ReplacedView {
    name: String,
    removed: u64,
    added: u64,
}

/// One timestamp, whole and in its parts.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct TimestampView {
    timestamp: u64,
    physical_ms: u64,
    logical: u64,
}

impl From<Timestamp> for TimestampView {
    fn from(timestamp: Timestamp) -> Self {
        TimestampView {
            timestamp: timestamp.0,
            physical_ms: timestamp.physical(),
            logical: timestamp.logical(),
        }
    }
}

impl PlacementArguments {
    pub async fn execute(self) -> Result<(), CliError> {
        let admin = self.cluster.admin().await?;
        match self.command {
            PlacementCommand::Members => {
                let members = admin.members().await?;
                let members: Vec<_> = members.into_iter().map(MemberView::from).collect();
                if self.cluster.json {
                    print_json(&members)
                } else {
                    print(&member_table(&members))
                }
            }
            PlacementCommand::Replace { name } => {
                let ReplacedMember { removed, added } = admin.replace_member(&name).await?;
                if self.cluster.json {
                    return print_json(&ReplacedView { name, removed, added });
                }
                print(&format!("{name} is a member again, as {added} in the place of {removed}"))
            }
            PlacementCommand::Tso => {
                let view = TimestampView::from(admin.placement().tso(1).await?);
                if self.cluster.json {
                    return print_json(&view);
                }
                print(&format!(
                    "timestamp: {}\nphysical:  {} ms since 1970\nlogical:   {}",
                    view.timestamp, view.physical_ms, view.logical
                ))
            }
        }
    }
}

fn member_table(members: &[MemberView]) -> String {
    let headers = [
        ("MEMBER", Align::Right),
        ("NAME", Align::Left),
        ("ROLE", Align::Left),
        ("STATE", Align::Left),
        ("ADDRESS", Align::Left),
    ];
    table(
        &headers,
        members.iter().map(|member| {
            let role = if member.leader { "leader" } else { "follower" };
            vec![
                member.id.to_string(),
                member.name.clone(),
                role.to_owned(),
                member.state.to_owned(),
                member.addresses.join(", "),
            ]
        }),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timestamp_is_its_milliseconds_above_18_logical_bits() {
        assert_eq!(TimestampView::from(Timestamp::new(1, 2)).timestamp, 262_146);
    }

    #[test]
    fn the_member_that_leads_is_marked() {
        let member = |id, leader| MemberView {
            id,
            name: format!("placement-{id}"),
            addresses: vec![format!("127.0.0.1:{id}")],
            leader,
            state: "up",
        };
        let text = member_table(&[member(1, false), member(2, true)]);
        let roles: Vec<_> =
            text.lines().filter_map(|line| line.split_whitespace().nth(2)).collect();
        assert_eq!(roles, ["ROLE", "follower", "leader"]);
    }
}
