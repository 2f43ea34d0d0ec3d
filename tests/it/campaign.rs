//! Long runs: kills and signals at random moments, orphans, escapes, a thousand turns, a reader that
//! hardly reads. A few rounds
//! here; `scripts/campaign` makes many and shows the figures, which `docs/reliability.md` keeps.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot be set up has failed"
)]

mod escape;
mod orphans;
mod signals;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant, SystemTime},
};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpSocket,
};

use crate::support::{
    Folders, Options, PATIENCE, SITE, Sent, ServerEvent, StandIn, TestGreenroom, Who, git,
    processes_below, request, rule, runs, try_stream, wait_for, wait_for_async, who,
};

/// How many rounds this run makes.
fn rounds(few: usize) -> usize {
    std::env::var("CAMPAIGN_ROUNDS").map_or(few, |rounds| rounds.parse().unwrap())
}

/// Were so many rounds enough, though there were to be more? On a slow machine, where nobody asked for a
/// number, those of some minutes are.
fn is_enough(round: usize, begun: Instant) -> bool {
    let is_asked = std::env::var_os("CAMPAIGN_ROUNDS").is_some();
    !is_asked && round >= 4 && begun.elapsed() > PATIENCE
}

/// Numbers that look random and come again with the same seed.
struct Dice(u64);

impl Dice {
    fn new() -> Self {
        let seed = std::env::var("CAMPAIGN_SEED").map_or_else(
            |_| {
                let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
                now.unwrap().as_millis() as u64
            },
            |seed| seed.parse().unwrap(),
        );
        println!("CAMPAIGN_SEED={seed}");
        Self(seed)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (self.0 >> 33) % limit
    }
}

/// The site's files as they lie in the worktree.
fn files(worktree: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    let mut folders = vec![worktree.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
            let path = entry.path();
            if path.is_dir() {
                folders.push(path);
            } else if !path.ends_with(".git") {
                files.insert(path.clone(), fs::read(path).unwrap());
            }
        }
    }
    files
}

/// Asks for a turn of a program that may be killed meanwhile: its id, if it was accepted.
async fn try_begin(port: u16, alice: &Who, instruction: &str) -> Option<String> {
    let fields = json!({"instruction": instruction, "async": true});
    let sent = Sent::new("POST", "/api/execute", &alice.body(fields));
    let answer = request(port, sent).await.ok()?;
    // It may be stopping already.
    Some(answer.body["turnId"].as_str()?.to_owned())
}

/// What could be seen of a turn until the program was gone.
async fn watch(port: u16, turn: String) -> Vec<ServerEvent> {
    let path = format!("/api/turns/{turn}/events");
    let sent = Sent::new("GET", &path, &Value::Null);
    match try_stream(port, sent).await {
        Ok(events) => events.all().await,
        Err(_) => Vec::new(),
    }
}

/// Waits until a thread has nothing to do: also no turn whose acceptance nobody heard of, since the
/// program was gone too soon.
async fn is_at_rest(greenroom: &TestGreenroom, who: &Who) {
    let history = format!("{}/history", who.path());
    wait_for_async("it has nothing to do", async || {
        let turns = greenroom.get(&history).await.ok()["result"]["turns"].take();
        let is_over = |turn: &Value| turn["status"] != "queued" && turn["status"] != "running";
        turns.as_array().unwrap().iter().all(is_over).then_some(())
    })
    .await;
}

fn is_outcome(event: &ServerEvent) -> bool {
    let names = [
        "turn.completed",
        "turn.failed",
        "turn.cancelled",
        "turn.recovered",
    ];
    names.contains(&event.name.as_str())
}

#[tokio::test]
async fn kills_lose_nothing() {
    // New files all the time, each with content that comes once.
    let work = "for i in 1 2 3 4 5 6 7 8 9 10 11 12; do \
                head -c 2000 /dev/urandom | base64 > f-$(date +%s%N).txt; sleep 0.02; done";
    let script = json!({"rules": [rule("work", &[runs(work), runs(work)])]});
    let api = StandIn::start(script).await;
    let folders = Folders::new();
    let site = folders.site("site", SITE);
    let alice = who("acme", "alice", "main");
    let worktree = folders.worktree(&alice);
    let mut greenroom = TestGreenroom::start(Options::new(&folders).api(&api)).await;
    greenroom.init(&alice, json!({"repoUrl": site})).await.ok();

    let rounds = rounds(20);
    let mut dice = Dice::new();
    let (mut accepted_turns, mut outcomes) = (BTreeSet::new(), BTreeMap::<String, usize>::new());
    let begun = Instant::now();
    for round in 1..=rounds {
        if is_enough(round, begun) {
            break;
        }
        let port = greenroom.api_port;
        let moment = Duration::from_millis(dice.below(2500));
        let begin = async {
            let mut accepted = Vec::new();
            for _ in 0..2 {
                accepted.extend(try_begin(port, &alice, "work").await);
            }
            let seen = accepted.iter().map(|turn| watch(port, turn.clone()));
            let seen = futures_util::future::join_all(seen).await;
            accepted.into_iter().zip(seen).collect::<Vec<_>>()
        };
        let kill = async {
            tokio::time::sleep(moment).await;
            greenroom.kill().await;
        };
        let (seen, ()) = tokio::join!(begin, kill);
        let left = || processes_below(&folders.join("")).is_empty().then_some(());
        wait_for("every child has ended", left).await;
        let written = files(&worktree);

        greenroom = greenroom.restart().await;
        greenroom.init(&alice, json!({})).await.ok();
        for (turn, seen) in seen {
            let all = greenroom.events(&turn, 0).await.all().await;
            assert_eq!(
                all[..seen.len()],
                seen,
                "round {round}: {turn} is told otherwise"
            );
            let ids: Vec<u64> = all.iter().map(|event| event.id).collect();
            assert_eq!(
                ids,
                (1..=all.len() as u64).collect::<Vec<_>>(),
                "round {round}"
            );
            assert_eq!(all.iter().filter(|event| is_outcome(event)).count(), 1);
            let last = all.last().unwrap();
            assert!(is_outcome(last), "round {round}: {last:?}");
            *outcomes.entry(last.name.clone()).or_default() += 1;
            accepted_turns.insert(turn);
        }
        is_at_rest(&greenroom, &alice).await;
        assert_eq!(
            git(&worktree, &["status", "--porcelain"]),
            "",
            "round {round}"
        );
        for (path, content) in written {
            let kept = fs::read(&path).unwrap_or_default();
            assert!(
                kept == content,
                "round {round}: {} was lost",
                path.display()
            );
        }
        git(
            folders.workspace().join("acme/alice/project"),
            &["fsck", "--strict"],
        );
        if round % 10 == 0 {
            println!(
                "{round} kills, {} turns: {outcomes:?}",
                accepted_turns.len()
            );
        }
    }
    let told = git(
        &worktree,
        &[
            "log",
            "--format=%(trailers:key=Turn-Id,valueonly,separator=)",
        ],
    );
    let mut told: Vec<_> = told.lines().filter(|line| !line.is_empty()).collect();
    let commits = told.len();
    told.sort_unstable();
    told.dedup();
    assert_eq!(told.len(), commits, "a turn has one commit");
    println!(
        "{rounds} kills, {} turns, {commits} commits, nothing lost",
        accepted_turns.len()
    );
}

/// What a process holds.
#[derive(Debug, Clone, Copy)]
struct Holds {
    memory_kb: u64,
    descriptors: usize,
    threads: u64,
    tasks: u64,
    children: usize,
    zombies: usize,
}

impl Holds {
    async fn of(greenroom: &TestGreenroom) -> Self {
        let pid = greenroom.pid();
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let field = |name: &str| -> u64 {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.unwrap()
                .split_whitespace()
                .next()
                .unwrap()
                .parse()
                .unwrap()
        };
        let metrics = greenroom.get("/metrics").await.text;
        let tasks = metrics
            .lines()
            .find_map(|line| line.strip_prefix("greenroom_tasks "));
        let (mut children, mut zombies) = (0, 0);
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
            let Some((_, rest)) = stat.rsplit_once(") ") else {
                continue;
            };
            let mut fields = rest.split(' ');
            let (state, parent) = (fields.next().unwrap(), fields.next().unwrap());
            if parent == pid.to_string() {
                children += 1;
                zombies += usize::from(state == "Z");
            }
        }
        Self {
            memory_kb: field("VmRSS:"),
            descriptors: fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count(),
            threads: field("Threads:"),
            tasks: tasks.unwrap().parse().unwrap(),
            children,
            zombies,
        }
    }
}

#[tokio::test]
async fn many_turns_leave_nothing_behind() {
    let folders = Folders::new();
    let site = folders.site("site", SITE);
    let alice = who("acme", "alice", "main");
    let greenroom = TestGreenroom::start(Options::new(&folders).acting()).await;
    greenroom.init(&alice, json!({"repoUrl": site})).await.ok();
    let turns = rounds(60);
    // After a turn that left its agent alive, as the last one does.
    let warm_up = (turns / 6).next_multiple_of(20);
    let mut first = None;
    let begun = Instant::now();
    for turn in 1..=turns {
        // Most work; some fail in one of the ways there are.
        let act = match turn % 20 {
            5 => "die",
            9 => "leave sleep 1000",
            13 => "exit 3",
            17 => "fail 500",
            _ => "text Done.",
        };
        let script = format!("append log.txt {turn}\\n\n{act}");
        let answer = greenroom.execute(&alice, &script).await.answer;
        assert!(
            answer.body["result"].is_object() || answer.status == 502,
            "{}",
            answer.text
        );
        if turn == warm_up {
            first = Some(Holds::of(&greenroom).await);
        }
        if turn % 100 == 0 {
            println!(
                "{turn} turns, {:?}: {:?}",
                begun.elapsed(),
                Holds::of(&greenroom).await
            );
        }
    }
    // What the last turn left is being swept.
    let first = first.unwrap();
    let begun = Instant::now();
    let last = loop {
        let last = Holds::of(&greenroom).await;
        let is_level = last.descriptors <= first.descriptors + 2
            && last.tasks <= first.tasks + 2
            && last.children <= first.children
            && last.threads <= first.threads + 16
            && last.memory_kb <= first.memory_kb + (64 << 10)
            && last.zombies == 0;
        if is_level || begun.elapsed() > PATIENCE {
            assert!(is_level, "{first:?} became {last:?}");
            break last;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    println!("after {warm_up} turns {first:?}\nafter {turns} turns {last:?}");
    let log = fs::read_to_string(folders.worktree(&alice).join("log.txt")).unwrap();
    assert_eq!(log.lines().count(), turns, "every edit is there");
    assert_eq!(
        git(folders.worktree(&alice), &["status", "--porcelain"]),
        ""
    );
}

#[tokio::test]
async fn a_reader_that_hardly_reads_slows_no_turn() {
    let folders = Folders::new();
    let site = folders.site("site", SITE);
    let alice = who("acme", "alice", "main");
    let greenroom = TestGreenroom::start(Options::new(&folders).acting()).await;
    greenroom.init(&alice, json!({"repoUrl": site})).await.ok();
    // More than the sockets' buffers take.
    let talk = vec![format!("text {}", "many words ".repeat(200)); 100].join("\n");
    let mut took = Vec::new();
    for is_slow in [false, true, false, true] {
        let begun = Instant::now();
        let turn = greenroom.begin(&alice, &talk).await;
        let mut slow = None;
        if is_slow {
            let socket = TcpSocket::new_v4().unwrap();
            socket.set_recv_buffer_size(2048).unwrap();
            let address = ([127, 0, 0, 1], greenroom.api_port).into();
            let mut reader = socket.connect(address).await.unwrap();
            let ask = format!("GET /api/turns/{turn}/events HTTP/1.1\r\nHost: localhost\r\n\r\n");
            reader.write_all(ask.as_bytes()).await.unwrap();
            assert_eq!(reader.read_u8().await.unwrap(), b'H');
            slow = Some(reader);
        }
        let result = greenroom.ended(&turn).await;
        assert_eq!(result["status"], "completed", "{result}");
        took.push((is_slow, begun.elapsed()));
        // It is still being served, a byte at a time.
        if let Some(mut reader) = slow {
            assert_eq!(reader.read_u8().await.unwrap(), b'T');
        }
    }
    println!("with a slow reader or not: {took:?}");
}
