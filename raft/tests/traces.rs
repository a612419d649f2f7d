//! Whole clusters, as recorded stories.
//!
//! Each file in `tests/traces` is a script of commands and, below `---`, their effects.
//! `UPDATE_GOLDENFILES=1 cargo test -p esker-raft --test traces` records them anew; read the
//! difference before you accept it. `Story::command` in `raft/simulator/src/story` documents the
//! commands.

use esker_raft_simulator::Story;

#[test]
fn every_story_ends_as_it_was_told() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/traces");
    let files = std::fs::read_dir(folder).expect("the traces are there");
    let mut paths: Vec<_> = files.map(|file| file.expect("a readable folder").path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "txt"));
    paths.sort();
    assert!(paths.len() >= 20, "only {} traces were found", paths.len());
    for path in paths {
        println!("{}", path.display());
        goldenscript::run(&mut Story::default(), &path).expect("a trace that can be run");
    }
}
