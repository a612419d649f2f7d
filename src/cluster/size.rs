//! How large the cluster in a playground's directory is.
//!
//! A cluster that is started again with fewer stores would wait for replicas that never come back,
//! and one with another number of placement members would be another group. So its size is written
//! beside the nodes' folders when the nodes run, and compared at each start.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use esker_engine::{IDENT, replace_file};
use serde::{Deserialize, Serialize};

use super::node_folder;
use crate::Error;
use crate::node::{PLACEMENT_FOLDER, STORE_FOLDER};

pub(crate) const FILE: &str = "CLUSTER";

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Size {
    pub(super) stores: u32,
    pub(super) placements: u32,
}

impl Size {
    /// Refuses a directory that holds a cluster of another size, or a single node.
    pub(super) fn check(self, directory: &Path) -> Result<(), Error> {
        if [STORE_FOLDER, PLACEMENT_FOLDER].iter().any(|part| directory.join(part).is_dir()) {
            return Err(Error::SingleNode { path: directory.to_owned() });
        }
        let (found, is_exact) = match Size::written(directory)? {
            Some(found) => (found, true),
            None => (Size::counted(directory), false),
        };
        let differs = |found, wanted| found > wanted || is_exact && found != wanted;
        let other = |what, option, found, wanted| {
            let path = directory.to_owned();
            Err(Error::OtherSize { path, what, option, found, wanted })
        };
        if differs(found.stores, self.stores) {
            return other("stores", "--stores", found.stores, self.stores);
        }
        if differs(found.placements, self.placements) {
            let what = "placement members";
            return other(what, "--placements", found.placements, self.placements);
        }
        // The file was written when all nodes ran. A majority of the members can admit the others.
        if is_exact {
            let missing = |count: u32, part: &str| -> Vec<PathBuf> {
                let folders = (1..=count).map(|number| node_folder(directory, number as usize));
                folders
                    .map(|node| node.join(part))
                    .filter(|part| !part.join(IDENT).is_file())
                    .collect()
            };
            let members = missing(found.placements, PLACEMENT_FOLDER);
            let is_minority = members.len() * 2 < found.placements as usize;
            let members = members.into_iter().filter(|_| !is_minority);
            if let Some(path) =
                missing(found.stores, STORE_FOLDER).into_iter().chain(members).next()
            {
                return Err(Error::PlaygroundPart { path });
            }
        }
        Ok(())
    }

    /// Writes the size to a file, for the next start.
    pub(super) fn remember(self, directory: &Path) -> Result<(), Error> {
        let text = toml::to_string(&self)
            .map_err(|error| Error::Internal { reason: error.to_string() })?;
        replace_file(directory, FILE, text.as_bytes()).map_err(|source| Error::File {
            what: "cannot write",
            path: directory.join(FILE),
            source,
        })
    }

    fn written(directory: &Path) -> Result<Option<Size>, Error> {
        let path = directory.join(FILE);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            // It is not a directory at all. The first node reports that.
            Err(error) if error.kind() == ErrorKind::NotADirectory => return Ok(None),
            Err(source) => return Err(Error::File { what: "cannot read", path, source }),
        };
        match toml::from_slice(&text) {
            Ok(size) => Ok(Some(size)),
            Err(error) => Err(Error::Damaged { path, reason: error.message().to_owned() }),
        }
    }

    /// The number of nodes whose first start was completed, for a directory without a record of the
    /// size. There may have been meant to be more.
    fn counted(directory: &Path) -> Size {
        // The folders of its store and its member have this file when they have an owner.
        let has = |part: &'static str| move |node: &PathBuf| node.join(part).join(IDENT).is_file();
        let nodes =
            || (1..).map(|number| node_folder(directory, number)).take_while(|node| node.is_dir());
        let count = |part| u32::try_from(nodes().filter(has(part)).count()).unwrap_or(u32::MAX);
        Size { stores: count(STORE_FOLDER), placements: count(PLACEMENT_FOLDER) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const THREE: Size = Size { stores: 3, placements: 1 };

    #[test]
    fn a_directory_is_only_used_with_the_size_that_it_has() {
        let root = tempfile::tempdir().expect("a temporary directory");
        assert!(THREE.check(root.path()).is_ok(), "nothing is there yet");
        assert!(THREE.check(&root.path().join("missing")).is_ok());
        THREE.remember(root.path()).expect("it can be written");
        let lost = THREE.check(root.path()).expect_err("no node is there").to_string();
        assert!(lost.contains("node-1") && lost.contains("is lost"), "{lost}");
        for (node, part) in
            [(1, STORE_FOLDER), (2, STORE_FOLDER), (3, STORE_FOLDER), (1, PLACEMENT_FOLDER)]
        {
            let folder = node_folder(root.path(), node).join(part);
            fs::create_dir_all(&folder).expect("it can be made");
            fs::write(folder.join(IDENT), "").expect("it can be written");
        }
        assert!(THREE.check(root.path()).is_ok());
        for (size, option) in [
            (Size { stores: 1, ..THREE }, "--stores 3"),
            (Size { stores: 4, ..THREE }, "--stores 3"),
            (Size { placements: 3, ..THREE }, "--placements 1"),
        ] {
            let refused = size.check(root.path()).expect_err("another size").to_string();
            assert!(refused.contains(option), "{refused}");
        }
        fs::write(root.path().join(FILE), "stores = three\n").expect("it can be written");
        assert!(matches!(THREE.check(root.path()), Err(Error::Damaged { .. })));
    }

    #[test]
    fn the_directory_of_a_single_node_is_none_of_a_playground() {
        let root = tempfile::tempdir().expect("a temporary directory");
        fs::create_dir(root.path().join(STORE_FOLDER)).expect("it can be made");
        assert!(matches!(THREE.check(root.path()), Err(Error::SingleNode { .. })));
    }

    #[test]
    fn without_a_written_size_the_nodes_are_counted_and_none_is_left_out() {
        let root = tempfile::tempdir().expect("a temporary directory");
        for node in 1..=3 {
            let store = node_folder(root.path(), node).join("store");
            fs::create_dir_all(&store).expect("it can be made");
            fs::write(store.join(IDENT), "").expect("it can be written");
        }
        let refused = Size { stores: 2, ..THREE }.check(root.path()).expect_err("a node too few");
        assert!(refused.to_string().contains("3 stores"), "{refused}");
        assert!(THREE.check(root.path()).is_ok());
        // The first start may have been killed before the other nodes were made.
        assert!(Size { stores: 5, ..THREE }.check(root.path()).is_ok());
    }
}
