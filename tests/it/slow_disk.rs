//! The workspace on a disk as slow and as forgetful as a network's (`slow_disk.c`, a FUSE stand-in for
//! EFS): one container, two, and one whose disk does not answer for a while. Skipped, with a word on
//! why, where no such disk can be made.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot be set up has failed"
)]

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Stdio},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};

use crate::support::{
    Answer, Folders, Options, PATIENCE, SITE, Sent, TestGreenroom, Who, git, request, wait_for,
    wait_for_async, who,
};

/// A mount of the folder that all of a test's disks show.
struct Disk {
    server: Child,
    told: BufReader<ChildStdout>,
    point: PathBuf,
    source: PathBuf,
}

impl Disk {
    /// `None` where it cannot be had.
    fn mount(folders: &Folders, name: &str, options: &[&str]) -> Option<Self> {
        let skip = |why: &str| eprintln!("skipped: no slow disk can be made: {why}");
        if !Path::new("/dev/fuse").exists() {
            skip("there is no /dev/fuse");
            return None;
        }
        if !nix::unistd::geteuid().is_root() {
            skip("only root may mount it");
            return None;
        }
        let program = folders.join("tmp/slow_disk");
        if !program.exists() {
            let text = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/slow_disk.c");
            #[expect(clippy::disallowed_methods, reason = "builds the disk's server")]
            let built = Command::new("cc")
                .args(["-O2", "-pthread", "-o"])
                .args([&program, &text])
                .output();
            let why = match built {
                Ok(built) if built.status.success() => None,
                Ok(built) => Some(String::from_utf8_lossy(&built.stderr).into_owned()),
                Err(_) => Some("there is no C compiler".to_owned()),
            };
            if let Some(why) = why {
                skip(&why);
                return None;
            }
        }
        let (source, point) = (folders.join("source"), folders.join(name));
        fs::create_dir_all(&source).unwrap();
        fs::create_dir_all(&point).unwrap();
        #[expect(clippy::disallowed_methods, reason = "the disk's server")]
        let mut server = Command::new(program)
            .args([&source, &point])
            .args(options)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(fs::File::create(folders.join("tmp/disk.log")).unwrap())
            .spawn()
            .unwrap();
        let told = BufReader::new(server.stdout.take().unwrap());
        let mut disk = Self {
            server,
            told,
            point,
            source,
        };
        let begun = Instant::now();
        while !disk.is_mounted() {
            if disk.server.try_wait().unwrap().is_some() || begun.elapsed() > PATIENCE {
                let said = fs::read_to_string(folders.join("tmp/disk.log")).unwrap();
                skip(
                    said.trim()
                        .lines()
                        .next_back()
                        .unwrap_or("it does not say why"),
                );
                return None;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Some(disk)
    }

    /// What it was called for since it was last asked, by name.
    fn calls(&mut self) -> Calls {
        self.signal(Signal::SIGUSR1);
        let mut line = String::new();
        self.told.read_line(&mut line).unwrap();
        Calls(serde_json::from_str(&line).unwrap())
    }

    fn is_mounted(&self) -> bool {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let point = self.point.to_str().unwrap();
        mounts
            .lines()
            .any(|line| line.split(' ').nth(1) == Some(point))
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.server.id().cast_signed()), signal).unwrap();
    }

    /// It does not answer from now on.
    fn stall(&self) {
        self.signal(Signal::SIGSTOP);
    }

    fn go_on(&self) {
        self.signal(Signal::SIGCONT);
    }

    fn workspace(&self) -> PathBuf {
        self.point.join("workspace")
    }

    /// A thread's worktree, past the slow disk.
    fn worktree(&self, who: &Who) -> PathBuf {
        let user = self
            .source
            .join("workspace")
            .join(&who.client)
            .join(&who.user);
        user.join("threads").join(&who.thread)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.go_on();
        #[expect(clippy::disallowed_methods, reason = "takes the disk away")]
        let unmounted = Command::new("umount")
            .arg("--lazy")
            .arg(&self.point)
            .output();
        unmounted.ok();
        self.server.kill().ok();
        self.server.wait().ok();
    }
}

/// Calls of the file system that reached the disk.
struct Calls(BTreeMap<String, u64>);

impl Calls {
    fn count(&self) -> u64 {
        self.0.values().sum()
    }
}

impl std::fmt::Display for Calls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut calls: Vec<_> = self.0.iter().filter(|(_, count)| **count > 0).collect();
        calls.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
        let calls = calls.iter().map(|(name, count)| format!("{name} {count}"));
        write!(
            f,
            "{} ({})",
            self.count(),
            calls.collect::<Vec<_>>().join(", ")
        )
    }
}

fn options(folders: &Folders, disk: &Disk, name: &str) -> Options {
    Options::new(folders)
        .acting()
        .previews()
        .env("PREVIEW_READY_SECONDS", "100")
        .env("WORKSPACE_PATH", disk.workspace())
        .env("CACHE_PATH", folders.join(format!("cache-{name}")))
}

async fn page(greenroom: &TestGreenroom, init: &Value) -> Answer {
    let url = init["preview"]["url"].as_str().unwrap();
    let host = url.strip_prefix("http://").unwrap();
    let sent = Sent::new("GET", "/", &Value::Null).header("host", host);
    request(greenroom.preview_port, sent).await.unwrap()
}

#[tokio::test]
async fn two_containers_share_a_slow_disk() {
    let folders = Folders::new();
    let Some(one) = Disk::mount(&folders, "one", &[]) else {
        return;
    };
    let two = Disk::mount(&folders, "two", &[]).expect("as the first one");
    let site = folders.site("site", SITE);
    let mut a = TestGreenroom::start(options(&folders, &one, "one")).await;
    let b = TestGreenroom::start(options(&folders, &two, "two")).await;
    let alice = who("acme", "alice", "main");
    let init = a.init(&alice, json!({"repoUrl": site})).await.ok();
    assert_eq!(init["preview"]["state"], "live", "{init}");
    assert!(page(&a, &init).await.text.contains("<h1>Pots</h1>"));
    let heading = |text: &str| format!("write src/pages/index.astro <h1>{text}</h1>\\n");
    a.execute(&alice, &heading("Jugs")).await.ok();
    assert!(page(&a, &init).await.text.contains("<h1>Jugs</h1>"));

    // The same user's other thread, from the other container, at the same time.
    let other = who("acme", "alice", "other");
    let beside = b.init(&other, json!({"repoUrl": site})).await.ok();
    assert_eq!(beside["preview"]["state"], "live", "{beside}");
    let (left, right) = (heading("Left"), heading("Right"));
    let (first, second) = tokio::join!(a.execute(&alice, &left), b.execute(&other, &right));
    for (result, text, greenroom, init) in [
        (first.ok(), "Left", &a, &init),
        (second.ok(), "Right", &b, &beside),
    ] {
        assert_eq!(
            result["commit"]["files"].as_array().unwrap().len(),
            1,
            "{result}"
        );
        let shown = page(greenroom, init).await.text;
        assert!(shown.contains(text), "{shown}");
    }
    b.init(&alice, json!({}))
        .await
        .error(409, "thread_busy_elsewhere");

    // Handed over in order.
    assert_eq!(a.stop().await.code(), Some(0));
    let taken = b.init(&alice, json!({})).await.ok();
    assert_eq!(
        (&taken["resumed"], &taken["preview"]["state"]),
        (&json!(true), &json!("live"))
    );
    assert!(page(&b, &taken).await.text.contains("<h1>Left</h1>"));
    b.execute(&alice, &heading("Bowls")).await.ok();
    let undo = format!("{}/undo", alice.path());
    b.api("POST", &undo, json!({})).await.ok();
    assert!(page(&b, &taken).await.text.contains("<h1>Left</h1>"));
    let history = b.get(&format!("{}/history", alice.path())).await.ok();
    assert_eq!(
        history["result"]["turns"].as_array().unwrap().len(),
        4,
        "{history}"
    );
    for who in [&alice, &other] {
        assert_eq!(git(one.worktree(who), &["status", "--porcelain"]), "");
    }
    git(
        one.source.join("workspace/acme/alice/project"),
        &["fsck", "--strict"],
    );
}

/// As NFS does: what was not there is believed not to be there for a while, and folders' attributes last.
#[tokio::test]
async fn a_thread_goes_back_and_forth_while_names_are_believed_gone() {
    let folders = Folders::new();
    let forgetful = ["--gone-s", "30", "--read-ms", "0.5", "--write-ms", "1"];
    let Some(one) = Disk::mount(&folders, "one", &forgetful) else {
        return;
    };
    let two = Disk::mount(&folders, "two", &forgetful).expect("as the first one");
    let site = folders.site("site", SITE);
    let without_pages = |disk, name| options(&folders, disk, name).env("ASTRO_DEV_MODE", "false");
    let mut here = TestGreenroom::start(without_pages(&one, "one")).await;
    let mut there = TestGreenroom::start(without_pages(&two, "two")).await;
    let alice = who("acme", "alice", "main");
    here.init(&alice, json!({"repoUrl": site})).await.ok();
    let mut written = Vec::new();
    for round in 0..4 {
        // Whoever has it writes; the other one looks, and finds names that will be there soon missing.
        let name = format!("{round}.txt");
        here.execute(&alice, &format!("write {name} {round}"))
            .await
            .ok();
        there
            .init(&alice, json!({}))
            .await
            .error(409, "thread_busy_elsewhere");
        written.push(name);
        here.stop().await;
        let taken = there.init(&alice, json!({})).await.ok();
        assert_eq!(taken["resumed"], json!(true));
        let history = there.get(&format!("{}/history", alice.path())).await.ok();
        let turns = history["result"]["turns"].as_array().unwrap();
        assert_eq!(turns.len(), written.len(), "{history}");
        assert!(
            turns.iter().all(|turn| turn["status"] == "completed"),
            "{history}"
        );
        here = here.restart().await;
        std::mem::swap(&mut here, &mut there);
    }
    let worktree = one.worktree(&alice);
    assert_eq!(git(&worktree, &["status", "--porcelain"]), "");
    let commits = git(&worktree, &["log", "--format=%s", "--grep=^Turn-Id"]);
    assert_eq!(commits.lines().count(), written.len(), "{commits}");
    for name in &written {
        assert!(worktree.join(name).exists(), "{name}");
    }
    let project = one.source.join("workspace/acme/alice/project");
    git(project, &["fsck", "--strict"]);
}

/// The first init builds all of it aside, side by side, and puts it in place by two renames.
#[tokio::test]
async fn a_first_init_that_is_killed_anywhere_is_made_up_for() {
    let folders = Folders::new();
    // Slower still, so that there is time to see how far it has come.
    let Some(disk) = Disk::mount(&folders, "one", &["--write-ms", "12"]) else {
        return;
    };
    let site = folders.site("site", SITE);
    let options = options(&folders, &disk, "one").env("ASTRO_DEV_MODE", "false");
    let mut greenroom = TestGreenroom::start(options).await;
    // What is on the disk when it is killed, and what is not there yet.
    let moments = [
        (".greenroom/scratch", "threads/main"),
        (".greenroom/scratch/.git/objects", "threads/main"),
        (".greenroom/scratch/.git/refs/heads/thread", "threads/main"),
        ("threads/.main.partial", "threads/main"),
        ("threads/.main.partial/src", "threads/main"),
        ("threads/.main.partial/.git", "threads/main"),
        (".greenroom/scratch/.git/worktrees/main/index", "project"),
        ("project", ".greenroom/threads/main/preview.json"),
        ("threads/main", ".greenroom/threads/main/preview.json"),
        ("metadata.json", ".greenroom/threads/main/preview.json"),
    ];
    let (mut cut_off, mut parted) = (0, 0);
    for (number, (there, missing)) in moments.into_iter().enumerate() {
        let who = who("acme", &format!("user{number}"), "main");
        let home = disk.source.join("workspace/acme").join(&who.user);
        let sent = Sent::new("POST", "/api/init", &who.body(json!({"repoUrl": site})));
        let (place, port) = (home.join(there), greenroom.api_port);
        let has_come = async {
            while !place.exists() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        let is_cut_off = tokio::select! {
            _ = request(port, sent) => false,
            () = has_come => true,
        };
        greenroom.kill().await;
        cut_off += u32::from(is_cut_off);
        parted += u32::from(home.join("project").exists() && !home.join("threads/main").exists());
        println!(
            "at {there}: {missing} is there: {}",
            home.join(missing).exists()
        );
        greenroom = greenroom.restart().await;

        greenroom.init(&who, json!({"repoUrl": site})).await.ok();
        let (project, worktree) = (home.join("project"), home.join("threads/main"));
        git(&project, &["fsck", "--strict"]);
        for folder in [&project, &worktree] {
            assert_eq!(git(folder, &["status", "--porcelain"]), "", "{there}");
        }
        // By the path that it has on the slow disk.
        let mounted = disk.workspace().join("acme").join(&who.user);
        let worktrees = git(
            mounted.join("project"),
            &["worktree", "list", "--porcelain"],
        );
        let own = format!("worktree {}", mounted.join("threads/main").display());
        assert!(worktrees.lines().any(|line| line == own), "{worktrees}");
        assert!(!worktrees.contains("prunable"), "{worktrees}");
        let branch = git(&worktree, &["symbolic-ref", "HEAD"]);
        assert_eq!(branch, format!("refs/heads/{}", who.branch()));
        for leftover in ["threads/.main.partial", ".greenroom/scratch"] {
            assert!(!home.join(leftover).exists(), "{leftover} after {there}");
        }
        let turn = greenroom.execute(&who, "write after.txt after").await.ok();
        assert_eq!(
            turn["commit"]["files"].as_array().unwrap().len(),
            1,
            "{turn}"
        );
        assert_eq!(git(&worktree, &["status", "--porcelain"]), "", "{there}");
    }
    println!(
        "{cut_off} of {} had no answer, {parted} had a repository alone",
        moments.len()
    );
    // On however quick a machine: the first ones are long before the end.
    assert!(cut_off >= 4, "{cut_off}");
}

#[tokio::test]
async fn a_disk_that_does_not_answer_hangs_nothing_for_good() {
    let seconds = std::env::var("SLOW_DISK_STALL_SECONDS");
    let stall = Duration::from_secs(seconds.map_or(4, |seconds| seconds.parse().unwrap()));
    let folders = Folders::new();
    let Some(disk) = Disk::mount(&folders, "one", &[]) else {
        return;
    };
    let site = folders.site("site", SITE);
    let options = options(&folders, &disk, "one").env("STOP_TIMEOUT_SECONDS", "10");
    let greenroom = TestGreenroom::start(options).await;
    let (alice, bob) = (who("acme", "alice", "main"), who("acme", "bob", "main"));
    let init = greenroom.init(&alice, json!({"repoUrl": site})).await.ok();
    let lines = "run for i in $(seq 200); do echo $i >> lines.txt; sleep 0.02; done";
    let turn = greenroom.begin(&alice, lines).await;
    let file = disk.worktree(&alice).join("lines.txt");
    wait_for("the turn writes", || file.exists().then_some(())).await;

    disk.stall();
    let begun = Instant::now();
    let mut slowest = Duration::ZERO;
    let asked = async {
        let init = Sent::new("POST", "/api/init", &bob.body(json!({"repoUrl": site})));
        let more = Sent::new(
            "POST",
            "/api/execute",
            &alice.body(json!({"instruction": "write a.txt a"})),
        );
        let port = greenroom.api_port;
        tokio::join!(request(port, init), request(port, more))
    };
    let watched = async {
        while begun.elapsed() < stall {
            for path in ["/health", "/metrics", "/api/idle", "/openapi.json"] {
                let since = Instant::now();
                assert_eq!(greenroom.get(path).await.status, 200, "{path}");
                slowest = slowest.max(since.elapsed());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        disk.go_on();
    };
    let ((init_of_bob, more), ()) = tokio::join!(asked, watched);
    println!("without an answer for {stall:?}: slowest of /health and its like {slowest:?}");
    assert!(
        slowest < Duration::from_secs(1),
        "they touch no disk: {slowest:?}"
    );
    println!(
        "asked meanwhile: init {}, execute {}",
        init_of_bob.unwrap().status,
        more.unwrap().status
    );

    // It has its outcome, whatever the disk made of it; and everything goes on.
    let begun = Instant::now();
    let outcome = greenroom.ended(&turn).await;
    println!(
        "the turn: {} after {:?}",
        outcome["status"],
        begun.elapsed()
    );
    for who in [&alice, &bob] {
        wait_for_async("it can be prepared", async || {
            let answer = greenroom.init(who, json!({"repoUrl": site})).await;
            (answer.status == 200).then_some(())
        })
        .await;
        greenroom.execute(who, "write after.txt after").await.ok();
        assert_eq!(git(disk.worktree(who), &["status", "--porcelain"]), "");
    }
    println!("all goes on {:?} after the disk", begun.elapsed());
    assert!(page(&greenroom, &init).await.text.contains("<h1>Pots</h1>"));
    let kept = fs::read_to_string(&file).unwrap();
    assert_eq!(
        git(disk.worktree(&alice), &["show", "HEAD:lines.txt"]),
        kept.trim_end()
    );

    // A stop while it does not answer is done before the platform's time is over. Its process may
    // wait on: the kernel ends no thread in the middle of a call to such a disk.
    let mut greenroom = greenroom;
    disk.stall();
    let begun = Instant::now();
    greenroom.signal(Signal::SIGTERM);
    wait_for("it is done", || {
        let log = greenroom.log();
        let is_done = |line: &String| line.contains("\"stopped\"");
        log.iter().any(is_done).then_some(())
    })
    .await;
    let done = begun.elapsed();
    tokio::time::sleep(Duration::from_secs(1)).await;
    let is_gone = greenroom.exited().is_some();
    disk.go_on();
    println!("a stop: done after {done:?}, gone before the disk was back: {is_gone}");
    assert!(done < Duration::from_secs(10), "{done:?}");
    assert_eq!(greenroom.wait_exit(PATIENCE).await.code(), Some(0));
    let greenroom = greenroom.restart().await;
    greenroom.init(&alice, json!({})).await.ok();
    greenroom.execute(&alice, "write end.txt end").await.ok();
    assert_eq!(git(disk.worktree(&alice), &["status", "--porcelain"]), "");
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

/// The aims on a slow disk: `scripts/campaign disk`, on a machine that does nothing else.
#[tokio::test]
#[ignore = "measures"]
async fn what_work_takes_on_a_slow_disk() {
    const TURNS: u64 = 21;
    let folders = Folders::new();
    let Some(mut disk) = Disk::mount(&folders, "one", &[]) else {
        return;
    };
    let mut files = SITE.to_vec();
    let pages: Vec<String> = (0..400)
        .map(|n| format!("src/content/{}/{n}.md", n % 20))
        .collect();
    files.extend(
        pages
            .iter()
            .map(|name| (name.as_str(), "a page of words\n")),
    );
    let site = folders.site("site", &files);
    git(&site, &["repack", "-adq"]);

    // By the git program, one file after another; greenroom's first init does all three.
    let clone = disk.point.join("clone");
    let clone = clone.to_str().unwrap();
    let origin = format!("file://{site}");
    let alone = ["-c", "checkout.workers=1"];
    let steps: [(&str, &str, Vec<&str>); 3] = [
        (
            "git clone --no-checkout",
            &site,
            vec!["clone", "-q", "-n", &origin, clone],
        ),
        (
            "git checkout",
            clone,
            [&alone[..], &["checkout", "-q", "main"]].concat(),
        ),
        (
            "git worktree add",
            clone,
            [&alone[..], &["worktree", "add", "-q", "../thread"]].concat(),
        ),
    ];
    let mut by_git = Vec::new();
    disk.calls();
    for (what, at, args) in steps {
        let begun = Instant::now();
        git(at, &args);
        by_git.push(begun.elapsed());
        println!("{what}: {:?}, calls {}", begun.elapsed(), disk.calls());
    }

    let options = options(&folders, &disk, "one").env("ASTRO_DEV_MODE", "false");
    let greenroom = TestGreenroom::start(options).await;
    let mut inits = Vec::new();
    for user in ["a", "b", "c", "d", "e"] {
        // A thread of the one before is written ahead, which is not this one's.
        settled(&mut disk).await;
        let begun = Instant::now();
        let answer = greenroom
            .init(&who("acme", user, "main"), json!({"repoUrl": site}))
            .await
            .ok();
        inits.push(begun.elapsed());
        println!(
            "first init: {:?}, calls {}, {}",
            begun.elapsed(),
            disk.calls(),
            answer["timings"]
        );
    }
    settled(&mut disk).await;
    let begun = Instant::now();
    greenroom
        .init(&who("acme", "a", "second"), json!({"repoUrl": site}))
        .await
        .ok();
    println!(
        "second thread: {:?}, calls {}",
        begun.elapsed(),
        disk.calls()
    );

    let alice = who("acme", "a", "main");
    let mut turns = Vec::new();
    settled(&mut disk).await;
    for turn in 0..TURNS {
        // The first ones start the CLI and warm the caches.
        if turn == 3 {
            settled(&mut disk).await;
        }
        let begun = Instant::now();
        greenroom
            .execute(&alice, &format!("write src/content/0/0.md {turn}"))
            .await
            .ok();
        if turn > 2 {
            turns.push(begun.elapsed());
        }
    }
    let mut calls = disk.calls();
    calls.0.values_mut().for_each(|count| *count /= TURNS - 3);
    println!("calls of a turn: {calls}");
    println!("first inits {inits:?}; warm turns {turns:?}");
    let (init, turn) = (median(inits), median(turns));
    println!(
        "first init {init:?}: {:.1} times as fast as one checkout by one thread, {:.1} times as fast as clone, \
         checkout and worktree; a warm turn {turn:?}",
        by_git[1].as_secs_f64() / init.as_secs_f64(),
        by_git.iter().sum::<Duration>().as_secs_f64() / init.as_secs_f64(),
    );
}

/// Waits until nothing but beats of leases reaches the disk.
async fn settled(disk: &mut Disk) {
    let begun = Instant::now();
    let mut quiet = 0;
    while quiet < 4 && begun.elapsed() < PATIENCE {
        tokio::time::sleep(Duration::from_millis(500)).await;
        quiet = if disk.calls().count() < 20 {
            quiet + 1
        } else {
            0
        };
    }
}
