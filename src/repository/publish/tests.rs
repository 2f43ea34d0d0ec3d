//! Moving references: all of them or none.

use super::*;
use crate::repository::{gitdir::GitDir, tests::git};

#[test]
fn branches_move_together_or_not_at_all() {
    let root = tempfile::tempdir().unwrap();
    let project = root.path().join("project");
    std::fs::create_dir(&project).unwrap();
    let run = |args: &[&str]| git(&project, args).trim().to_owned();
    run(&["init", "-q", "-b", "user/acme/alice"]);
    for subject in ["one", "two", "three"] {
        run(&["commit", "-qm", subject, "--allow-empty"]);
    }
    let id = |name: &str| Oid::from_str(&run(&["rev-parse", name])).unwrap();
    let (one, two, three) = (id("HEAD~2"), id("HEAD~1"), id("HEAD"));
    for branch in ["client/acme", "other"] {
        run(&["branch", branch, "HEAD~2"]);
    }
    let users = UserRepository {
        git: GitDir::of_project(&project),
        project: project.clone(),
        owner: None,
    };
    let repo = users.git.open(&project).unwrap();
    let a_move = |name: &str, old: Option<Oid>, new: Option<Oid>| Move {
        name: format!("refs/{name}"),
        old,
        new,
    };
    let fence = Fence::open();
    let moves = [
        a_move("heads/client/acme", Some(one), Some(three)),
        // Somebody else was quicker.
        a_move("heads/other", Some(two), Some(three)),
    ];
    let error = users.move_all(&repo, &moves, &fence).unwrap_err();
    assert!(matches!(&error, RepositoryError::HeadMoved { branch } if branch == "other"));
    assert_eq!((id("client/acme"), id("other")), (one, one));

    let moves = [
        a_move("heads/client/acme", Some(one), Some(three)),
        a_move("heads/other", Some(one), None),
        a_move("remotes/origin/client/acme", None, Some(two)),
    ];
    users.move_all(&repo, &moves, &fence).unwrap();
    assert_eq!((id("client/acme"), id("origin/client/acme")), (three, two));
    assert_eq!(run(&["branch", "--list", "other"]), "");
    run(&["fsck", "--strict"]);
}
