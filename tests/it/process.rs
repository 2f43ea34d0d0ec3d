//! Real children under real wardens, with the real binary.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    os::unix::{fs::PermissionsExt as _, net::UnixListener},
    path::{Path, PathBuf},
    sync::{
        atomic::{AtomicU16, Ordering},
        mpsc::{self, RecvTimeoutError},
    },
    time::{Duration, Instant},
};

use greenroom::{
    owner::Owner,
    process::{
        Bash, Child, ConfinedBy, ConfinementMode, Exit, Launcher, Peers, Ports, ProcessError,
        Profile, Spec, Stdin,
    },
};
use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    time::timeout,
};

/// Generous: machines are slow when others build.
const LIMIT: Duration = Duration::from_secs(120);

fn launcher_with(silence: Duration, mode: ConfinementMode) -> Launcher {
    let binary = Path::new(env!("CARGO_BIN_EXE_greenroom"));
    Launcher::start_with_binary(binary, silence, mode).unwrap()
}

/// Its silence is longer than any test waits: what ends a child is what the test did.
fn launcher() -> Launcher {
    launcher_with(LIMIT * 4, ConfinementMode::Off)
}

/// A launcher whose programs are confined, where this kernel can.
fn confining() -> Option<Launcher> {
    let launcher = launcher_with(LIMIT * 4, ConfinementMode::Auto);
    if launcher.confinement().bash == Bash::All {
        return Some(launcher);
    }
    eprintln!("skipped: this kernel confines too little");
    None
}

fn shell(script: &str) -> Spec {
    Spec {
        name: "test",
        program: "/bin/sh".into(),
        args: vec!["-c".into(), script.into()],
        env: vec![("PATH".into(), "/usr/local/bin:/usr/bin:/bin".into())],
        cwd: "/".into(),
        stdin: Stdin::Null,
        profile: Profile::unconfined(),
    }
}

async fn output(launcher: &Launcher, spec: Spec) -> greenroom::process::Output {
    launcher.run(spec, LIMIT, 64 * 1024).await.unwrap()
}

/// A script's process ids, one a line.
async fn read_pids(child: &mut Child, count: usize) -> Vec<u32> {
    let mut lines = BufReader::new(&mut child.stdout).lines();
    let mut pids = Vec::new();
    while pids.len() < count {
        let line = timeout(LIMIT, lines.next_line()).await.unwrap().unwrap();
        pids.push(
            line.expect("the script prints its pids")
                .trim()
                .parse()
                .unwrap(),
        );
    }
    pids
}

fn is_alive(pid: u32) -> bool {
    let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else {
        return false;
    };
    let state = stat
        .rsplit(')')
        .next()
        .and_then(|rest| rest.split_whitespace().next());
    state.is_some_and(|state| state != "Z" && state != "X")
}

async fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < LIMIT, "waited too long until {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn wait_gone(pids: &[u32]) {
    wait_until("all are gone", || !pids.iter().any(|pid| is_alive(*pid))).await;
}

/// Prints its own pid and that of a sleeper that forked twice into a session of its own.
const LEAVES_A_SLEEPER: &str =
    "trap 'exit 7' USR1 TERM; echo $$; (setsid sh -c 'echo $$; exec sleep 1000' &) ;";

#[tokio::test]
async fn exits_and_signals_are_reported() {
    let launcher = launcher();
    let result = output(&launcher, shell("echo out; echo err >&2; exit 3")).await;
    assert_eq!(
        result.exit,
        Exit {
            code: Some(3),
            signal: None
        }
    );
    assert_eq!(
        (result.stdout.as_str(), result.stderr.as_str()),
        ("out\n", "err\n")
    );
    let result = output(&launcher, shell("kill -SEGV $$")).await;
    assert_eq!(
        result.exit,
        Exit {
            code: None,
            signal: Some(11)
        }
    );
    // A signal without a name of its own.
    let result = output(&launcher, shell("kill -40 $$")).await;
    assert!(!result.exit.is_success());
}

#[tokio::test]
async fn the_environment_is_exactly_the_one_given() {
    let mut spec = shell("");
    spec.program = "env".into();
    spec.args = vec!["-0".into()];
    spec.env.push(("GREETING".into(), "good\nday".into()));
    let result = output(&launcher(), spec).await;
    let mut env: Vec<_> = result.stdout.split_terminator('\0').collect();
    env.sort_unstable();
    assert_eq!(
        env,
        ["GREETING=good\nday", "PATH=/usr/local/bin:/usr/bin:/bin"]
    );
}

#[tokio::test]
async fn a_program_starts_clean() {
    let folder = TempDir::new().unwrap();
    let mut spec = shell(
        // No pipeline: its pipe would stand among the descriptors for a moment.
        "pwd; for fd in /proc/$$/fd/*; do [ -e \"$fd\" ] && printf '%s ' \"${fd##*/}\"; done; \
         echo; ulimit -c; \
         grep -E 'SigBlk|NoNewPrivs' /proc/self/status; cat /proc/$$/oom_score_adj",
    );
    spec.cwd = folder.path().into();
    let result = output(&launcher(), spec).await;
    let lines: Vec<_> = result.stdout.lines().collect();
    assert_eq!(lines[0], folder.path().to_str().unwrap());
    assert_eq!(lines[1].trim(), "0 1 2", "no descriptor of ours");
    assert_eq!(lines[2], "0", "no core files");
    assert_eq!(lines[3], "SigBlk:\t0000000000000000");
    assert_eq!(lines[4], "NoNewPrivs:\t1");
    assert_eq!(lines[5], "500");
}

#[tokio::test]
async fn what_a_program_takes_of_the_machine_is_limited() {
    let folder = TempDir::new().unwrap();
    let mut spec = shell(
        "ulimit -Hc; ulimit -Hn; ulimit -Hu; ulimit -n 100000 2>/dev/null && echo raised; \
         truncate -s 8G most && echo all; truncate -s 9G more; echo $?",
    );
    spec.program = "/bin/bash".into();
    spec.cwd = folder.path().into();
    let result = output(&launcher(), spec).await;
    let lines: Vec<_> = result.stdout.lines().collect();
    let [cores, descriptors, processes, rest @ ..] = &lines[..] else {
        panic!("{lines:?} {}", result.stderr);
    };
    let number = |text: &str| text.parse::<u64>().unwrap();
    assert_eq!(*cores, "0");
    assert!(number(descriptors) <= 65_536 && number(processes) <= 8192);
    // The system's own program says that the file is too large, or is ended by the signal.
    assert!(rest.len() == 2 && rest[0] == "all", "{lines:?}");
    assert!(["1", "153"].contains(&rest[1]), "{lines:?}");
    assert!(fs::metadata(folder.path().join("most")).unwrap().len() == 8 << 30);
    assert!(
        !folder
            .path()
            .join("more")
            .metadata()
            .is_ok_and(|more| more.len() > 8 << 30)
    );
}

#[tokio::test]
async fn standard_input_reaches_the_program() {
    let launcher = launcher();
    let mut spec = shell("cat; echo end");
    spec.stdin = Stdin::Piped;
    let mut child = launcher.spawn(spec).await.unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(b"hello\n").await.unwrap();
    drop(stdin);
    let mut text = String::new();
    timeout(LIMIT, child.stdout.read_to_string(&mut text))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(text, "hello\nend\n");
}

#[tokio::test]
async fn what_cannot_start_says_so() {
    let launcher = launcher();
    let chain = |error: ProcessError| {
        let source = std::error::Error::source(&error).map(ToString::to_string);
        (error.to_string(), source.unwrap_or_default())
    };
    let mut spec = shell("");
    spec.program = "/no/such/program".into();
    let error = launcher.spawn(spec).await.unwrap_err();
    assert!(
        matches!(&error, ProcessError::Start { source, .. } if source.kind() == std::io::ErrorKind::NotFound)
    );
    let (says, why) = chain(error);
    assert_eq!(says, "failed to start program");
    assert!(why.starts_with("No such file"), "{why}");

    let mut spec = shell("");
    spec.program = "/etc/passwd".into();
    let (_, why) = chain(launcher.spawn(spec).await.unwrap_err());
    assert!(why.starts_with("Permission denied"), "{why}");

    let mut spec = shell("");
    spec.cwd = "/no/such/folder".into();
    let error = launcher.spawn(spec).await.unwrap_err();
    assert!(matches!(error, ProcessError::EnterFolder { .. }));

    let mut spec = shell("");
    spec.args.push("x".repeat(4 << 20).into());
    let error = launcher.spawn(spec).await.unwrap_err();
    assert!(matches!(error, ProcessError::Launch { .. }));
    assert!(launcher.stop(LIMIT).await);
    assert!(matches!(
        launcher.spawn(shell("")).await,
        Err(ProcessError::Stopped)
    ));
}

#[tokio::test]
async fn a_sweep_ends_what_a_turn_left_behind_and_spares_the_program() {
    let launcher = launcher();
    let mut spec = shell(&format!("{LEAVES_A_SLEEPER} read line; echo $line"));
    spec.stdin = Stdin::Piped;
    let mut child = launcher.spawn(spec).await.unwrap();
    let pids = read_pids(&mut child, 2).await;
    assert_eq!(pids[0], child.pid());
    assert!(is_alive(pids[1]));
    timeout(LIMIT, child.handle().sweep())
        .await
        .unwrap()
        .unwrap();
    assert!(!is_alive(pids[1]));
    // A second one has nothing to do; the program still listens.
    timeout(LIMIT, child.handle().sweep())
        .await
        .unwrap()
        .unwrap();
    assert_eq!(child.handle().try_exit(), None);
    child
        .stdin
        .take()
        .unwrap()
        .write_all(b"77\n")
        .await
        .unwrap();
    assert_eq!(read_pids(&mut child, 1).await, [77]);
    assert_eq!(
        timeout(LIMIT, child.handle().wait()).await.unwrap().code,
        Some(0)
    );
    timeout(LIMIT, child.handle().sweep())
        .await
        .unwrap()
        .unwrap();
}

#[tokio::test]
async fn a_flood_of_grandchildren_leaves_no_zombie_and_the_status_is_the_program_s() {
    let launcher = launcher();
    // Each falls to the warden, which is its subreaper.
    let flood = "echo $PPID; i=0; while [ $i -lt 3000 ]; do ( : & ); i=$((i+1)); done; echo 0; \
                 sleep 2; exit 7";
    let mut child = launcher.spawn(shell(flood)).await.unwrap();
    let warden = read_pids(&mut child, 2).await[0];
    let zombies = || {
        let all = fs::read_dir("/proc").unwrap().flatten();
        all.filter_map(|entry| fs::read_to_string(entry.path().join("stat")).ok())
            .filter(|stat| {
                let fields = stat.rsplit(") ").next().unwrap_or_default();
                fields.starts_with(&format!("Z {warden} "))
            })
            .count()
    };
    wait_until("all were reaped", || zombies() == 0).await;
    let exit = timeout(LIMIT, child.handle().wait()).await.unwrap();
    assert_eq!(exit.code, Some(7));
}

#[tokio::test]
async fn an_exit_takes_everything_with_it() {
    let launcher = launcher();
    let mut spec = shell(&format!("{LEAVES_A_SLEEPER} read line; exit 5"));
    spec.stdin = Stdin::Piped;
    let mut child = launcher.spawn(spec).await.unwrap();
    let pids = read_pids(&mut child, 2).await;
    assert!(is_alive(pids[1]));
    drop(child.stdin.take());
    let exit = timeout(LIMIT, child.handle().wait()).await.unwrap();
    assert_eq!(exit.code, Some(5));
    assert!(!is_alive(pids[1]), "gone by the time we hear of the exit");
    let mut rest = Vec::new();
    let read = timeout(LIMIT, child.stdout.read_to_end(&mut rest)).await;
    assert!(read.is_ok(), "nobody holds the pipe");
}

#[tokio::test]
async fn dropping_the_last_handle_ends_all() {
    let launcher = launcher();
    let mut child = launcher
        .spawn(shell(&format!("{LEAVES_A_SLEEPER} wait; sleep 1000")))
        .await
        .unwrap();
    let pids = read_pids(&mut child, 2).await;
    let handle = child.handle();
    drop(child);
    assert!(is_alive(pids[0]));
    drop(handle);
    wait_gone(&pids).await;
    assert!(launcher.stop(LIMIT).await);
}

#[tokio::test]
async fn a_program_that_ignores_sigterm_is_killed_after_the_grace() {
    let launcher = launcher();
    // A flood, so that reading has to go on for the end to come.
    let script = "trap '' TERM; echo $$; while :; do echo flood flood flood flood flood; done";
    let mut child = launcher.spawn(shell(script)).await.unwrap();
    let pids = read_pids(&mut child, 1).await;
    let handle = child.handle();
    let started = Instant::now();
    let exit = timeout(LIMIT, handle.terminate(Duration::from_millis(300)))
        .await
        .unwrap();
    assert!(started.elapsed() >= Duration::from_millis(300));
    assert_eq!(
        exit,
        Exit {
            code: None,
            signal: Some(9)
        }
    );
    assert!(!is_alive(pids[0]));
    assert_eq!(handle.kill().await, exit);

    // One that obeys is not waited for, and a second call skips the grace of a stubborn one.
    let mut child = launcher
        .spawn(shell(&format!(
            "{LEAVES_A_SLEEPER} while :; do sleep 0.05; done"
        )))
        .await
        .unwrap();
    read_pids(&mut child, 2).await;
    let exit = timeout(LIMIT, child.handle().terminate(LIMIT * 10))
        .await
        .unwrap();
    assert_eq!(exit.code, Some(7));
    let mut child = launcher.spawn(shell(script)).await.unwrap();
    read_pids(&mut child, 1).await;
    let handle = child.handle();
    let patient =
        tokio::time::timeout(Duration::from_millis(50), handle.terminate(LIMIT * 10)).await;
    assert!(patient.is_err());
    assert_eq!(timeout(LIMIT, handle.kill()).await.unwrap().signal, Some(9));
}

#[tokio::test]
async fn an_interrupt_reaches_the_group() {
    let launcher = launcher();
    let script = "trap 'exit 9' INT; echo $$; while :; do sleep 0.05; done";
    let mut child = launcher.spawn(shell(script)).await.unwrap();
    read_pids(&mut child, 1).await;
    child.handle().interrupt();
    assert_eq!(
        timeout(LIMIT, child.handle().wait()).await.unwrap().code,
        Some(9)
    );
}

#[tokio::test]
async fn a_warden_that_is_killed_or_stopped_leaves_no_program() {
    let launcher = launcher();
    let mut child = launcher
        .spawn(shell("echo $PPID; exec sleep 1000"))
        .await
        .unwrap();
    let warden = read_pids(&mut child, 1).await[0];
    let pid = child.pid();
    signal("KILL", warden);
    assert_eq!(
        timeout(LIMIT, child.handle().wait()).await.unwrap(),
        Exit {
            code: None,
            signal: None
        }
    );
    wait_gone(&[pid]).await;

    let mut child = launcher
        .spawn(shell("echo $PPID; exec sleep 1000"))
        .await
        .unwrap();
    let warden = read_pids(&mut child, 1).await[0];
    let pid = child.pid();
    signal("STOP", warden);
    timeout(LIMIT, child.handle().kill()).await.unwrap();
    assert!(!is_alive(pid));
}

#[tokio::test]
async fn short_programs_are_bounded_in_time_and_output() {
    let launcher = launcher();
    let mut flood =
        shell("i=0; while [ $i -lt 20000 ]; do echo line $i; i=$((i+1)); done; echo end");
    flood.name = "flood";
    let result = launcher.run(flood, LIMIT, 100).await.unwrap();
    assert!(result.truncated && result.stdout.len() == 100 && result.stdout.ends_with("end\n"));

    let stuck = shell("echo why >&2; sleep 1000");
    let error = launcher
        .run(stuck, Duration::from_secs(4), 100)
        .await
        .unwrap_err();
    assert_eq!(error.to_string(), "sh took longer than 4 s");
    assert!(matches!(error, ProcessError::TimedOut { stderr, .. } if stderr == "why\n"));
}

/// Not a test: acts PID 1 in a process where nobody else has children.
#[tokio::test]
#[ignore = "a helper process of another test"]
async fn helper_reaper() {
    if std::env::var_os(HELPER_FOLDER).is_none() {
        return;
    }
    nix::sys::prctl::set_child_subreaper(true).unwrap();
    let launcher = launcher();
    // A warden that is killed leaves its program to us.
    let mut child = launcher
        .spawn(shell("echo $PPID; exec sleep 1000"))
        .await
        .unwrap();
    let warden = read_pids(&mut child, 1).await[0];
    let orphan = format!("/proc/{}", child.pid());
    signal("KILL", warden);
    let mut reaped = 0;
    wait_until("the orphan is reaped", || {
        reaped += launcher.reap_orphans();
        !Path::new(&orphan).exists()
    })
    .await;
    assert_eq!(reaped, 1, "the warden itself is left to tokio");

    let reaper = launcher.clone();
    let (stop, stopped) = mpsc::channel::<()>();
    let reaping = std::thread::spawn(move || {
        while stopped.recv_timeout(Duration::from_millis(1)) == Err(RecvTimeoutError::Timeout) {
            assert_eq!(reaper.reap_orphans(), 0, "a warden's status was stolen");
        }
    });
    for code in 0..50 {
        let result = output(&launcher, shell(&format!("exit {code}"))).await;
        assert_eq!(result.exit.code, Some(code));
    }
    drop(stop);
    reaping.join().unwrap();
}

#[test]
fn orphans_are_reaped_and_no_childs_status_is_stolen() {
    let folder = TempDir::new().unwrap();
    assert!(
        helper("helper_reaper", folder.path())
            .status()
            .unwrap()
            .success()
    );
}

/// Of the whole tree: of a child that left the group, and of one that has ended.
#[tokio::test]
async fn what_a_program_takes_is_what_all_its_processes_take() {
    let launcher = launcher();
    let script = "burn='import time\nwhile time.process_time() < 0.5: pass'
        python3 -c \"$burn\"; echo 1
        export held=\"$burn\nheld = b'x' * (300 << 20)\nprint(2, flush=True)\ntime.sleep(1000)\"
        setsid sh -c 'python3 -c \"$held\"; true'; true";
    let mut child = launcher.spawn(shell(script)).await.unwrap();
    assert_eq!(read_pids(&mut child, 2).await, [1, 2]);
    let load = child.handle().load();
    // Two shells, and what holds the memory.
    assert_eq!(load.processes, 3, "{load:?}");
    assert!((300 << 20..900 << 20).contains(&load.memory), "{load:?}");
    // Of both that used it; the kernel counts in hundredths of a second.
    assert!(load.processor >= Duration::from_millis(900), "{load:?}");
    child.handle().kill().await;
    assert_eq!(child.handle().load().processes, 0);
}

#[tokio::test]
async fn a_listener_is_known_by_its_owner() {
    let launcher = launcher();
    let port = free_port();
    let script = format!(
        "node -e 'require(\"net\").createServer().listen({port},\"127.0.0.1\",()=>console.log(1))' & wait"
    );
    let mut child = launcher.spawn(shell(&script)).await.unwrap();
    read_pids(&mut child, 1).await;
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let handle = child.handle();
    assert!(handle.owns_listener(address), "a descendant's counts");
    let ours = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    assert!(!handle.owns_listener(ours.local_addr().unwrap()));
    let other = launcher.spawn(shell("sleep 1000")).await.unwrap();
    assert!(
        !other.handle().owns_listener(address),
        "another child's does not"
    );
}

/// One below those that dev servers get, and that the kernel gives whoever asks for any: tests beside this
/// one take many of them.
fn free_port() -> u16 {
    static MORE: AtomicU16 = AtomicU16::new(0);
    let own = 10_000 + u16::try_from(std::process::id() % 5_000).unwrap();
    let first = own + MORE.fetch_add(100, Ordering::Relaxed) % 4_900;
    (first..first + 100)
        .find(|port| TcpListener::bind((Ipv4Addr::LOCALHOST, *port)).is_ok())
        .expect("one is free")
}

fn signal(name: &str, pid: u32) {
    #[expect(clippy::disallowed_methods, reason = "the test is the attacker here")]
    let status = std::process::Command::new("kill")
        .args([format!("-{name}"), pid.to_string()])
        .status()
        .unwrap();
    assert!(status.success());
}

// --- A supervisor that dies ------------------------------------------------------------------

const HELPER_FOLDER: &str = "GREENROOM_TEST_HELPER_FOLDER";
/// That supervisor's: longer than a busy machine keeps it from a beat.
const SILENCE: Duration = Duration::from_secs(6);

/// Not a test: the supervisor that the next two tests kill and stop.
#[tokio::test]
#[ignore = "a helper process of other tests"]
async fn helper_supervisor() {
    let Some(folder) = std::env::var_os(HELPER_FOLDER).map(PathBuf::from) else {
        return;
    };
    let launcher = launcher_with(SILENCE, ConfinementMode::Off);
    let script = "trap '' TERM; echo $$ > a; (setsid sh -c 'trap \"\" TERM; echo $$ > b; \
                  mv b pid2; while :; do sleep 0.1; done' &); mv a pid1; while :; do sleep 0.1; done";
    let mut spec = shell(script);
    spec.cwd = folder;
    let child = launcher.spawn(spec).await.unwrap();
    tokio::time::sleep(LIMIT * 2).await;
    drop(child);
}

struct Helper {
    process: std::process::Child,
    _folder: TempDir,
}

impl Drop for Helper {
    fn drop(&mut self) {
        self.process.kill().ok();
        self.process.wait().ok();
    }
}

/// A process of this binary that runs one of the ignored helpers.
fn helper(name: &str, folder: &Path) -> std::process::Command {
    #[expect(clippy::disallowed_methods, reason = "a supervisor of its own")]
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    command
        .args([
            &format!("process::{name}"),
            "--exact",
            "--ignored",
            "--nocapture",
        ])
        .env(HELPER_FOLDER, folder)
        .stdout(std::process::Stdio::null());
    command
}

/// A supervisor process and the pids of what runs below it.
async fn supervisor() -> (Helper, Vec<u32>) {
    let folder = TempDir::new().unwrap();
    let helper = helper("helper_supervisor", folder.path()).spawn().unwrap();
    let files = ["pid1", "pid2"].map(|name| folder.path().join(name));
    let helper = Helper {
        process: helper,
        _folder: folder,
    };
    wait_until("the children run", || {
        files.iter().all(|file| file.exists())
    })
    .await;
    let pids = files.map(|file| fs::read_to_string(file).unwrap().trim().parse().unwrap());
    (helper, pids.to_vec())
}

#[tokio::test]
async fn a_killed_supervisor_leaves_nothing_running() {
    let (helper, pids) = supervisor().await;
    signal("KILL", helper.process.id());
    wait_gone(&pids).await;
}

#[tokio::test]
async fn a_stopped_supervisor_leaves_nothing_running() {
    let (helper, pids) = supervisor().await;
    // Longer than its silence: the heartbeat keeps them.
    tokio::time::sleep(SILENCE + Duration::from_millis(500)).await;
    assert!(pids.iter().all(|pid| is_alive(*pid)));
    signal("STOP", helper.process.id());
    wait_gone(&pids).await;
}

// --- Confinement -----------------------------------------------------------------------------

struct Site {
    _root: TempDir,
    mine: PathBuf,
    tmp: PathBuf,
    other: PathBuf,
}

fn site() -> Site {
    // Not below /tmp's own rule: there is none, so any folder will do.
    let root = TempDir::new().unwrap();
    let mode = |folder: &Path, mode| {
        fs::set_permissions(folder, fs::Permissions::from_mode(mode)).unwrap();
    };
    mode(root.path(), 0o711);
    let [mine, tmp, other] = ["mine", "tmp", "other"].map(|name| root.path().join(name));
    for folder in [&mine, &tmp, &other] {
        fs::create_dir(folder).unwrap();
    }
    fs::write(other.join("secret"), "canary").unwrap();
    for folder in [&mine, &tmp, &other] {
        mode(folder, 0o700);
    }
    // Where programs run as the owners of their folders.
    if nix::unistd::geteuid().is_root() {
        let owner = Owner::new_user("acme/alice", |_| false);
        for folder in [&mine, &tmp] {
            owner.take(folder).unwrap();
        }
    }
    Site {
        _root: root,
        mine,
        tmp,
        other,
    }
}

fn confined(site: &Site, script: &str) -> Spec {
    let mut spec = shell(script);
    spec.cwd = site.mine.clone();
    spec.env.push(("TMPDIR".into(), site.tmp.clone().into()));
    spec.env.push(("OTHER".into(), site.other.clone().into()));
    spec.env
        .push(("SUPERVISOR".into(), std::process::id().to_string().into()));
    spec.profile = Profile::system();
    spec.profile.write.extend([
        site.mine.clone(),
        site.tmp.clone(),
        "/no/such/folder".into(),
    ]);
    spec.profile.owner = Some(site.mine.clone());
    spec
}

#[tokio::test]
async fn files_are_confined() {
    let Some(launcher) = confining() else { return };
    files_are_held(
        &launcher,
        &["echo x > /tmp/greenroom-test-escape", "ls /proc"],
    )
    .await;
}

/// As on a kernel without Landlock, where greenroom is root.
#[tokio::test]
async fn files_are_confined_by_uid() {
    let launcher = launcher_with(LIMIT * 4, ConfinementMode::WithoutLandlock);
    if launcher.confinement().files != ConfinedBy::Uid {
        eprintln!("skipped: only root gives uids");
        return;
    }
    assert_eq!(launcher.confinement().bash, Bash::All);
    files_are_held(
        &launcher,
        &["chmod 777 $OTHER", "echo x > /usr/greenroom-test-escape"],
    )
    .await;

    // A program without a folder of its own is nobody, and never root.
    let site = site();
    let mut spec = confined(&site, "id -u");
    spec.profile.owner = None;
    spec.cwd = "/".into();
    let nobody = output(&launcher, spec).await;
    assert_eq!(nobody.stdout.trim(), Owner::NOBODY.uid().to_string());
    let mut spec = confined(&site, "id -u");
    spec.profile.owner = Some(site.other.clone());
    let error = launcher.spawn(spec).await.unwrap_err();
    assert!(matches!(error, ProcessError::EnterFolder { .. }), "{error}");

    // One that forks without end stops, and is ended with all of it.
    let mut bomb = confined(&site, "");
    bomb.program = "python3".into();
    let forks = "import os, time\nmade = 0\ntry:\n    while made < 2000:\n        if os.fork() == 0: time.sleep(1000)\n        made += 1\nexcept BlockingIOError: pass\nprint(made, flush=True)\ntime.sleep(1000)";
    bomb.args = vec!["-c".into(), forks.into()];
    let mut child = launcher.spawn(bomb).await.unwrap();
    let made = read_pids(&mut child, 1).await[0];
    assert!((100..1024).contains(&made), "{made}");
    child.handle().kill().await;

    // What it prints by its streams' names reaches us too.
    let names = "echo out > /dev/stdout; echo err > /dev/stderr";
    let printed = output(&launcher, confined(&site, names)).await;
    assert_eq!((&*printed.stdout, &*printed.stderr), ("out\n", "err\n"));

    // It ends by our hand all the same, and with whoever started it.
    let mut child = launcher
        .spawn(confined(
            &site,
            &format!("{LEAVES_A_SLEEPER} wait; sleep 1000"),
        ))
        .await
        .unwrap();
    let pids = read_pids(&mut child, 2).await;
    child.handle().kill().await;
    wait_gone(&pids).await;
}

async fn files_are_held(launcher: &Launcher, more: &[&str]) {
    let site = site();
    let inside = "mkdir d && echo x > d/f && mv d/f g && ln g h && cat > \"$TMPDIR/t\" <<EOT\nhello $(cat g)\nEOT\n\
                  cat \"$TMPDIR/t\" && rm -r d && echo 1 > /dev/null && node -p 6*7";
    let result = output(launcher, confined(&site, inside)).await;
    assert_eq!(
        (result.exit.code, result.stdout.as_str()),
        (Some(0), "hello x\n42\n"),
        "{}",
        result.stderr
    );

    let both = [
        "cat $OTHER/secret",
        "ls $OTHER",
        "ls ..",
        "echo x > $OTHER/new",
        "truncate -s 0 $OTHER/secret",
        "rm $OTHER/secret",
        "ln -s $OTHER/secret link && cat link",
        "ln $OTHER/secret hard",
        "cat /proc/1/environ",
        "tr '\\0' ' ' < /proc/$SUPERVISOR/environ",
        "head -c1 /proc/$PPID/mem",
        "ls /proc/$SUPERVISOR/cwd/",
    ];
    for refused in both.iter().chain(more) {
        let result = output(launcher, confined(&site, refused)).await;
        assert!(!result.exit.is_success(), "{refused}: {}", result.stdout);
        // A link out of a folder that may not be moved from is refused as if it were far away.
        let says = ["ermission denied", "cross-device", "not permitted"];
        assert!(
            says.iter().any(|says| result.stderr.contains(says)),
            "{refused}: {}",
            result.stderr
        );
    }
    assert_eq!(
        fs::read_to_string(site.other.join("secret")).unwrap(),
        "canary"
    );

    // Off is off.
    let off = self::launcher();
    let result = output(&off, confined(&site, "cat $OTHER/secret")).await;
    assert_eq!(result.stdout, "canary");
}

#[tokio::test]
async fn other_processes_memory_and_files_are_closed_even_with_proc() {
    let Some(launcher) = confining() else { return };
    let site = site();
    // `environ` itself is open to CAP_PERFMON and CAP_SYS_ADMIN, whatever Landlock says: one more reason not to
    // run as an almighty root, and not to grant /proc.
    let script = "head -c1 /proc/$SUPERVISOR/mem; readlink -v /proc/$SUPERVISOR/cwd; \
                  ls /proc/$SUPERVISOR/cwd/; head -c1 /proc/$PPID/mem; readlink -v /proc/$PPID/exe; \
                  head -c1 /proc/$SUPERVISOR/fd/0; echo done";
    let mut spec = confined(&site, script);
    spec.profile.read.push("/proc".into());
    let result = output(&launcher, spec).await;
    assert_eq!(result.stdout, "done\n");
    assert_eq!(
        result.stderr.matches("ermission denied").count(),
        6,
        "{}",
        result.stderr
    );
}

#[tokio::test]
async fn signals_to_the_supervisor_and_the_warden_are_refused() {
    let Some(launcher) = confining() else { return };
    let site = site();
    let script = "kill -9 $PPID; kill -STOP $PPID; kill -9 $SUPERVISOR; kill -0 1; \
                  sleep 1000 & kill $! && echo own";
    let result = output(&launcher, confined(&site, script)).await;
    assert_eq!(
        (result.exit.code, result.stdout.as_str()),
        (Some(0), "own\n")
    );
    assert_eq!(
        result.stderr.matches("not permitted").count(),
        4,
        "{}",
        result.stderr
    );
}

#[tokio::test]
async fn ports_are_confined() {
    let Some(launcher) = confining() else { return };
    let site = site();
    let gateway = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let api = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = |listener: &TcpListener| listener.local_addr().unwrap().port();
    let own = free_port();
    let script = "const net = require('net');
        const connect = port => new Promise(done => net.connect(port, '127.0.0.1')
            .on('connect', function () { this.destroy(); done('open') }).on('error', e => done(e.code)));
        const listen = port => new Promise(done => { const s = net.createServer()
            .on('error', e => done(e.code)); s.listen(port, '127.0.0.1', () => { s.close(); done('bound') }) });
        const [gateway, api, own] = process.argv.slice(1).map(Number);
        (async () => console.log(await connect(gateway), await connect(api), await listen(own), await listen(0)))()";
    let mut spec = confined(&site, "");
    spec.program = "node".into();
    spec.args = vec!["-e".into(), script.into()];
    spec.args
        .extend([port(&gateway), port(&api), own].map(|port| port.to_string().into()));
    spec.profile.connect = Peers::here(vec![port(&gateway)]);
    spec.profile.bind = Ports::Only(vec![own]);
    let result = output(&launcher, spec).await;
    assert_eq!(
        result.stdout, "open EACCES bound EACCES\n",
        "{}",
        result.stderr
    );
}

/// With Landlock beside it and without: what the broker holds, it holds alone.
#[tokio::test]
async fn connections_are_decided_one_by_one() {
    for mode in [ConfinementMode::Auto, ConfinementMode::WithoutLandlock] {
        let launcher = launcher_with(LIMIT * 4, mode);
        if launcher.confinement().network == ConfinedBy::None {
            eprintln!("skipped: this kernel has no user notification");
            continue;
        }
        let site = site();
        let gateway = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let api = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let _theirs = UnixListener::bind(site.other.join("socket")).unwrap();
        let port = |listener: &TcpListener| listener.local_addr().unwrap().port();
        let own = free_port();
        // Ends with the test's process.
        let answering = gateway.try_clone().unwrap();
        std::thread::spawn(move || answering.incoming().for_each(drop));
        let mut spec = confined(&site, "");
        spec.program = "python3".into();
        spec.args = vec!["-c".into(), include_str!("process/network.py").into()];
        spec.args
            .extend([port(&gateway), port(&api), own].map(|port| port.to_string().into()));
        spec.args.push(site.other.clone().into());
        spec.profile.connect = Peers::here(vec![port(&gateway)]);
        spec.profile.bind = Ports::Only(vec![own]);
        let result = output(&launcher, spec).await;
        assert!(result.exit.is_success(), "{mode:?}: {}", result.stderr);
        let expected = "gateway: open
            gateway, waiting: open
            gateway by IPv6: open
            api: EACCES
            api by any address: EACCES
            api by IPv6: EACCES
            gateway's port elsewhere: EACCES
            credentials of a cloud: EACCES
            fast open: EACCES
            fast open, message: EACCES
            UDP: EACCES
            MPTCP: EACCES
            packets: EAFNOSUPPORT
            vsock: EAFNOSUPPORT
            interfaces: known
            own port: open
            any port: EACCES
            the API's port: EACCES
            path: open
            relative path: open
            path of others: EACCES
            path of others by a link: EACCES
            abstract: EACCES
            named datagrams: EACCES
            a pair: open
            io_uring: ENOSYS
            a listener of its own: EPERM
            many at once: open
            an address that changes: some
            gateway after all: open";
        let expected: Vec<_> = expected.lines().map(str::trim).collect();
        let said: Vec<_> = result.stdout.lines().collect();
        assert_eq!(said, expected, "{mode:?}: {}", result.stderr);
        api.set_nonblocking(true).unwrap();
        let nobody = api.accept().unwrap_err();
        assert_eq!(nobody.kind(), std::io::ErrorKind::WouldBlock, "{mode:?}");
    }
}

#[tokio::test]
async fn the_cost_of_a_start() {
    let launcher = launcher_with(LIMIT * 4, ConfinementMode::Auto);
    let site = site();
    let rounds = 20;
    let start = Instant::now();
    for _ in 0..rounds {
        #[expect(clippy::disallowed_methods, reason = "to compare with")]
        std::process::Command::new("/bin/true").status().unwrap();
    }
    let plain = start.elapsed() / rounds;
    let start = Instant::now();
    for _ in 0..rounds {
        let mut spec = confined(&site, "");
        spec.program = "/bin/true".into();
        output(&launcher, spec).await;
    }
    println!(
        "start to exit: plain {plain:?}, as a child {:?}",
        start.elapsed() / rounds
    );
}
