//! The first thread is made along with its repository, as if it had been made after it.

use super::*;

struct Made {
    place: Place,
    created: Created,
    dir: PathBuf,
}

impl Made {
    fn thread(&self) -> ThreadState {
        let repository = &self.created.repository;
        repository
            .ensure_thread(&key("acme", "alice", "main"), &self.dir, &Fence::open())
            .unwrap()
    }

    fn project(&self) -> PathBuf {
        self.place.home("alice").join("project")
    }
}

fn make(place: Place) -> Made {
    let home = place.home("alice");
    let (scratch, dir) = (home.join(".greenroom/scratch"), home.join("threads/main"));
    let key = key("acme", "alice", "main");
    let created = UserRepository::create(
        &home.join("project"),
        Workshop {
            scratch: &scratch,
            local: None,
            thread: Some(FirstThread {
                key: &key,
                worktree: &dir,
                owner: None,
                fence: &Fence::open(),
            }),
        },
        &place.source(),
        &Remotes::default(),
        &key.user_key(),
        None,
        &greenroom(),
    )
    .unwrap();
    Made {
        place,
        created,
        dir,
    }
}

/// What git's own files say of the thread.
fn papers(made: &Made) -> Vec<(PathBuf, Vec<u8>)> {
    let git = made.project().join(".git");
    let branch = "thread/acme/alice/main";
    let names = [
        format!("refs/heads/{branch}"),
        format!("refs/greenroom/heads/{branch}"),
    ];
    let entry = ["HEAD", "commondir", "gitdir", "locked", "index"];
    let mut files: Vec<_> = names.iter().map(|name| git.join(name)).collect();
    files.extend(entry.map(|name| git.join("worktrees/main").join(name)));
    files.push(made.dir.join(".git"));
    let read = |file: PathBuf| {
        let content = fs::read(&file).unwrap();
        (file, content)
    };
    files.into_iter().map(read).collect()
}

#[test]
fn nothing_of_it_has_to_be_put_right() {
    let made = make(Place::new());
    assert!(made.created.has_thread);
    let before = papers(&made);
    assert!(made.thread().resumed);
    assert_eq!(papers(&made), before, "git's files are as they should be");
    for folder in [&made.project(), &made.dir] {
        assert_eq!(git(folder, &["status", "--porcelain"]), "");
    }
    git(&made.project(), &["fsck", "--strict"]);
    let worktrees = git(&made.project(), &["worktree", "list", "--porcelain"]);
    let own = format!("worktree {}", made.dir.display());
    assert!(worktrees.lines().any(|line| line == own), "{worktrees}");
    let index = git(&made.dir, &["ls-files", "--debug", "package.json"]);
    assert!(
        !index.contains("size: 0"),
        "it vouches for its files: {index}"
    );
    let home = made.place.home("alice");
    let left = |folder: &str| fs::read_dir(home.join(folder)).unwrap().count();
    assert_eq!((left("threads"), left(".greenroom")), (1, 0));
    write(made.dir.join("package.json"), "{\"a\":1}\n");
    let repository = &made.created.repository;
    let site = Site {
        worktree: repository.worktree(&key("acme", "alice", "main"), &made.dir),
        dir: made.dir.clone(),
    };
    let committed = site.commit("Change");
    assert_eq!(committed.commit.unwrap().files.len(), 1);
    assert!(committed.repairs.is_empty());
}

#[test]
fn a_crash_that_parts_the_two_is_made_up_for() {
    // Before the files were put in their place; with them lost altogether; with half of the entry.
    for case in 0..3 {
        let made = make(Place::new());
        let partial = made.dir.with_file_name(".main.partial");
        fs::rename(&made.dir, &partial).unwrap();
        fs::remove_file(partial.join("package.json")).unwrap();
        let entry = made.project().join(".git/worktrees/main");
        match case {
            0 => {}
            1 => fs::remove_dir_all(&partial).unwrap(),
            _ => fs::remove_file(entry.join("index")).unwrap(),
        }
        made.thread();
        assert!(!partial.exists());
        assert!(made.dir.join("package.json").exists());
        assert_eq!(git(&made.dir, &["status", "--porcelain"]), "");
        git(&made.project(), &["fsck", "--strict"]);
    }
}

#[test]
fn a_thread_that_began_elsewhere_is_left_to_its_own_making() {
    let place = Place::new();
    let origin = place.origin();
    git(&origin, &["checkout", "-qb", "thread-main"]);
    write(origin.join("old.txt"), "old\n");
    git(&origin, &["add", "-A"]);
    git(&origin, &["commit", "-qm", "older"]);
    git(&origin, &["checkout", "-q", "trunk"]);
    let made = make(place);
    assert!(!made.created.has_thread);
    assert!(made.thread().resumed);
    assert!(made.dir.join("old.txt").exists());

    // Files that are there already are nobody's to replace.
    let place = Place::new();
    let dir = place.home("alice").join("threads/main");
    write(dir.join("mine.txt"), "mine\n");
    let made = make(place);
    assert!(!made.created.has_thread);
    assert!(!made.thread().resumed);
    assert!(made.dir.join("mine.txt").exists());
}
