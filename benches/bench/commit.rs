//! What git costs: a first clone, a new thread's worktree, and the commit of one changed file in
//! sites of three sizes, beside the git program on the same files.

use std::{
    fmt::Write as _,
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use greenroom::{
    domain::Signature,
    identity::ThreadKey,
    lease::Fence,
    repository::{
        CommitRequest, CommitText, Committed, Remotes, Scope, Strangers, UserRepository, Watch,
        Workshop, Worktree, parse_source,
    },
};

use crate::{
    report::{Table, Unit},
    world::{World, git},
};

/// Files, and how often each thing is done with so many.
const SIZES: [(usize, usize, usize); 3] = [(1_000, 20, 7), (10_000, 15, 3), (100_000, 7, 1)];
const FILES_PER_FOLDER: usize = 100;

#[expect(clippy::unused_async, reason = "a part like the others")]
pub(crate) async fn measure(world: &World) -> anyhow::Result<Table> {
    let mut table = Table::default();
    for (files, commits, checkouts) in SIZES {
        eprintln!("bench: {files} files …");
        size(world, &mut table, files, commits, checkouts)?;
    }
    table.note(
        "Files of 150 bytes in folders of 100. A commit stands when the branch has moved, and is \
         whole when git's own `status` is empty. A turn looks at all files before it begins, and \
         commits what the kernel says has changed since.",
    );
    Ok(table)
}

fn size(
    world: &World,
    table: &mut Table,
    files: usize,
    commits: usize,
    checkouts: usize,
) -> anyhow::Result<()> {
    let folder = world.folder(&format!("commit-{files}"));
    fs::create_dir_all(&folder)?;
    let origin = origin(&folder, files)?;
    let who = Signature {
        name: "bench".into(),
        email: "bench@localhost".into(),
    };
    let key = |thread: &str| ThreadKey::parse("bench", "u", thread).context("a thread's name");
    let source = parse_source(text(&origin)?, Some(&folder))?;

    let project = folder.join("project");
    let started = Instant::now();
    let repository = UserRepository::create(
        &project,
        Workshop {
            scratch: &folder.join("scratch"),
            local: None,
            thread: None,
        },
        &source,
        &Remotes::default(),
        &key("t0")?.user_key(),
        None,
        &who,
    )?
    .repository;
    let clone = vec![ms(started)];
    let by_hand = folder.join("by-hand");
    let started = Instant::now();
    git(
        &folder,
        &["clone", "-q", "--no-local", text(&origin)?, text(&by_hand)?],
    )?;
    let clone_by_hand = vec![ms(started)];

    let (mut ready, mut thread, mut add) = (Vec::new(), Vec::new(), Vec::new());
    let tree = |number: usize| folder.join(format!("threads/t{number}"));
    let make = |number: usize| -> anyhow::Result<f64> {
        let started = Instant::now();
        repository.ensure_thread(&key(&format!("t{number}"))?, &tree(number), &Fence::open())?;
        Ok(ms(started))
    };
    fs::create_dir_all(folder.join("threads"))?;
    for number in 0..checkouts {
        // As the program does while nobody waits.
        repository.keep_spare(&key("t0")?.user_key())?;
        ready.push(make(checkouts + number)?);
        thread.push(make(number)?);
        let hand = folder.join(format!("hand{number}"));
        let started = Instant::now();
        let branch = format!("hand{number}");
        git(
            &by_hand,
            &["worktree", "add", "-q", "-b", &branch, text(&hand)?],
        )?;
        add.push(ms(started));
    }

    let worktree = repository.worktree(&key("t0")?, &tree(0));
    let hand = folder.join("hand0");
    let (mut stands, mut whole, mut rival) = (Vec::new(), Vec::new(), Vec::new());
    let (mut look, mut status) = (Vec::new(), Vec::new());
    let watch = Watch::default();
    for round in 0..=commits {
        let path = format!(
            "d{}/f{}.txt",
            round % (files / FILES_PER_FOLDER),
            round % 90
        );
        let content = format!("round {round}\n{}", "x".repeat(130));
        let started = Instant::now();
        commit(&worktree, &who, &folder, Scope::AllAndWatch(&watch))?;
        let looked = ms(started);
        let started = Instant::now();
        ensure!(is_clean(&hand)?, "git's worktree is not clean");
        let asked = ms(started);
        fs::write(tree(0).join(&path), &content)?;
        fs::write(hand.join(&path), &content)?;
        let (stood, all) = timed(&worktree, &who, &folder, &watch)?;
        let started = Instant::now();
        git(&hand, &["add", "-A"])?;
        git(&hand, &["commit", "-q", "-m", "An edit"])?;
        let by_hand = ms(started);
        // The first one finds everything cold.
        if round > 0 {
            stands.push(stood);
            whole.push(all);
            rival.push(by_hand);
            look.push(looked);
            status.push(asked);
        }
    }
    for (folder, what) in [(tree(0), "greenroom's"), (hand, "git's")] {
        ensure!(is_clean(&folder)?, "{what} worktree is not clean");
    }

    let grouped = group(files);
    let base = table.own(
        format!("{grouped} files: clone and checkout"),
        Unit::Ms,
        clone,
        "",
    );
    table.rival("`git clone`", Unit::Ms, clone_by_hand, base);
    let base = table.own(
        format!("{grouped} files: a new thread's worktree, kept ready"),
        Unit::Ms,
        ready,
        "half of git's",
    );
    table.rival("`git worktree add`", Unit::Ms, add.clone(), base);
    let base = table.own(
        format!("{grouped} files: the same, nothing kept ready"),
        Unit::Ms,
        thread,
        "",
    );
    table.rival("`git worktree add`", Unit::Ms, add, base);
    let base = table.own(
        format!("{grouped} files: one changed, until the commit stands"),
        Unit::Ms,
        stands,
        "a tenth of git's",
    );
    table.rival("`git add -A && git commit`", Unit::Ms, rival.clone(), base);
    let base = table.own(
        format!("{grouped} files: the same, until index and status agree"),
        Unit::Ms,
        whole,
        "a quarter of git's",
    );
    table.rival("`git add -A && git commit`", Unit::Ms, rival, base);
    let base = table.own(
        format!("{grouped} files: a look at all of them before a turn"),
        Unit::Ms,
        look,
        "",
    );
    table.rival("`git status`", Unit::Ms, status, base);
    // Nothing is removed before the end: for some seconds ext4 walks around each inode that was given
    // back, which costs more than all that is measured here.
    Ok(())
}

/// Milliseconds until the branch has moved, and until everything is done.
fn timed(
    worktree: &Worktree,
    who: &Signature,
    folder: &Path,
    watch: &Watch,
) -> anyhow::Result<(f64, f64)> {
    let before = worktree.head()?;
    let branch = folder.join("project/.git/refs/heads/thread/bench/u/t0");
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let started = Instant::now();
        let (done, before, branch) = (&done, &before, &branch);
        let watcher = scope.spawn(move || {
            while !done.load(Ordering::Acquire) {
                if fs::read_to_string(branch).is_ok_and(|head| head.trim() != before) {
                    break;
                }
                std::thread::sleep(Duration::from_micros(200));
            }
            ms(started)
        });
        let committed = commit(worktree, who, folder, Scope::Since(watch));
        let whole = ms(started);
        done.store(true, Ordering::Release);
        let stood = watcher.join().ok().context("the watcher ended")?;
        ensure!(committed?.commit.is_some(), "nothing was committed");
        Ok((stood.min(whole), whole))
    })
}

fn commit(
    worktree: &Worktree,
    who: &Signature,
    folder: &Path,
    scope: Scope<'_>,
) -> anyhow::Result<Committed> {
    Ok(worktree.commit(&CommitRequest {
        text: CommitText {
            instruction: "An edit",
            trailers: &[],
            author: who,
            committer: who,
        },
        scope,
        strangers: Strangers::Keep,
        held_dir: &folder.join("held"),
        fence: &Fence::open(),
    })?)
}

/// A repository made by the git program: `files` small files, one commit.
fn origin(folder: &Path, files: usize) -> anyhow::Result<PathBuf> {
    let origin = folder.join("origin.git");
    fs::create_dir_all(&origin)?;
    git(&origin, &["init", "-q", "--bare", "-b", "main"])?;
    let mut stream = String::from(
        "commit refs/heads/main\ncommitter bench <bench@localhost> 1700000000 +0000\ndata 5\nBegin\n",
    );
    for number in 0..files {
        let content = format!("file {number}\n{}\n", "text ".repeat(27));
        let (at, name) = (number / FILES_PER_FOLDER, number % FILES_PER_FOLDER);
        write!(
            stream,
            "M 100644 inline d{at}/f{name}.txt\ndata {}\n{content}\n",
            content.len()
        )?;
    }
    let mut import = Command::new("git")
        .args(["fast-import", "--quiet"])
        .current_dir(&origin)
        .stdin(Stdio::piped())
        .spawn()?;
    import
        .stdin
        .take()
        .context("git takes no input")?
        .write_all(stream.as_bytes())?;
    ensure!(import.wait()?.success(), "git fast-import failed");
    Ok(origin)
}

fn is_clean(worktree: &Path) -> anyhow::Result<bool> {
    let output = Command::new("git")
        .args(["status", "--porcelain"])
        .current_dir(worktree)
        .output()?;
    Ok(output.status.success() && output.stdout.is_empty())
}

/// 100000 as "100,000".
fn group(number: usize) -> String {
    match number / 1_000 {
        0 => number.to_string(),
        thousands => format!("{thousands},{:03}", number % 1_000),
    }
}

fn ms(started: Instant) -> f64 {
    started.elapsed().as_secs_f64() * 1e3
}

fn text(path: &Path) -> anyhow::Result<&str> {
    path.to_str().context("a path of ASCII")
}
