//! The ledger on a real disk: what is reserved, settled, found again, and refused.

use std::time::Duration;

use jiff::tz::TimeZone;

use super::*;
use crate::{
    domain::Account,
    identity::{ThreadKey, TurnId},
    task::Tasks,
};

const MODEL: &str = "claude-opus-5";

fn turn(client: &str, user: &str, thread: &str) -> Account {
    Account::turn(&TurnId::new(
        &ThreadKey::parse(client, user, thread).unwrap(),
    ))
}

fn ledger(root: &std::path::Path, limits: &[(Level, Term, f64)]) -> Ledger {
    let limits = limits.iter().map(|(level, term, usd)| Limit {
        level: *level,
        term: *term,
        usd: *usd,
    });
    let settings = LedgerSettings {
        workspace: Some(root.to_owned()),
        prices: Prices::default(),
        budgets: Budgets {
            limits: limits.collect(),
            zone: TimeZone::UTC,
        },
    };
    Ledger::new(settings, &Tasks::new())
}

/// Asks for at most so many dollars: an answer of opus costs 25 for a million tokens.
fn ask(usd: f64) -> Ask {
    Ask {
        model: MODEL.into(),
        prompt: 0,
        answer: (usd / 25e-6).round() as u64,
    }
}

/// That cost so many dollars.
fn outcome(usd: f64) -> Outcome {
    Outcome {
        verdict: Verdict::Settled,
        model: None,
        message: Some("msg".into()),
        tokens: Tokens {
            output: (usd / 25e-6).round() as u64,
            ..Tokens::default()
        },
        is_estimated: false,
    }
}

async fn spend(meter: &Meter, usd: f64) -> Result<(), Denied> {
    let reservation = soon(meter.reserve(ask(usd))).await?;
    soon(reservation.settle(outcome(usd))).await.unwrap();
    Ok(())
}

async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(30), future)
        .await
        .expect("it should have happened by now")
}

fn report(root: &std::path::Path) -> Report {
    let mut book = Book::new(root, Tenants::default());
    book.refresh().unwrap();
    book.report(&Question {
        period: Period::Daily,
        by: By::Thread,
        zone: TimeZone::UTC,
        tenants: Tenants::default(),
        thread: None,
        from: None,
        to: None,
    })
}

fn breach(denied: Result<(), Denied>) -> Breach {
    match denied {
        Err(Denied::OverBudget(breach)) => breach,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_request_is_reserved_then_settled_and_reported() {
    let dir = tempfile::tempdir().unwrap();
    let ledger = ledger(dir.path(), &[]);
    let meter = ledger.meter(turn("acme", "alice", "main"));
    let mut reservation = soon(meter.reserve(ask(1.0))).await.unwrap();
    soon(reservation.on_disk()).await;
    // Under way: it is on the disk at its worst, and in no report.
    let files = files(dir.path());
    assert_eq!(files.len(), 1);
    assert!(files[0].contains(r#""status":"reserved""#) && files[0].contains(r#""costUsd":1.0"#));
    assert_eq!(report(dir.path()).totals.requests, 0);
    let aborted = Outcome {
        verdict: Verdict::Aborted,
        ..outcome(0.25)
    };
    soon(reservation.settle(aborted)).await.unwrap();
    spend(&meter, 0.5).await.unwrap();
    drop(soon(meter.reserve(ask(9.0))).await.unwrap());
    let report = report(dir.path());
    assert_eq!(report.rows.len(), 1, "{report:?}");
    assert_eq!(report.rows[0].key, "acme/alice/main");
    let totals = report.totals;
    assert_eq!(
        (totals.requests, totals.aborted, totals.unsettled),
        (2, 1, 0)
    );
    assert!((totals.cost_usd - 0.75).abs() < 1e-9, "{totals:?}");
    assert_eq!(totals.output_tokens, 30_000);
    assert_eq!(meter.spent().requests, 2);
    let tally = ledger.tally();
    assert_eq!((tally.settled, tally.aborted), (1, 1));
}

fn files(root: &std::path::Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap().flatten() {
            if entry.path().is_dir() {
                folders.push(entry.path());
            } else {
                found.push(std::fs::read_to_string(entry.path()).unwrap());
            }
        }
    }
    found
}

#[tokio::test]
async fn limits_hold_for_whom_they_are_about() {
    let day = Term::Day;
    for (level, term, others_may) in [
        // Another turn of the thread, another thread, another user, another client.
        (Level::Turn, Term::Whole, [true, true, true, true]),
        (Level::Thread, day, [false, true, true, true]),
        (Level::User, day, [false, false, true, true]),
        (Level::Client, Term::Month, [false, false, false, true]),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let ledger = ledger(dir.path(), &[(level, term, 1.0)]);
        let meter = ledger.meter(turn("acme", "alice", "main"));
        spend(&meter, 0.7).await.unwrap();
        // It may go beyond the limit by one request.
        spend(&meter, 0.7).await.unwrap();
        let breach = breach(spend(&meter, 0.1).await);
        assert_eq!(breach.limit.level, level);
        assert!((breach.spent_usd - 1.4).abs() < 1e-9);
        assert_eq!(breach.resets.is_some(), term != Term::Whole);
        assert!(meter.news().borrow().breach.is_some());
        assert!(meter.check_now().is_err());
        for ((client, user, thread), may) in [
            ("acme", "alice", "main"),
            ("acme", "alice", "two"),
            ("acme", "bob", "main"),
            ("globex", "alice", "main"),
        ]
        .into_iter()
        .zip(others_may)
        {
            let other = ledger.meter(turn(client, user, thread));
            assert_eq!(
                soon(other.check()).await.is_ok(),
                may,
                "{level:?} {client} {user}"
            );
        }
    }
}

#[tokio::test]
async fn most_of_a_limit_is_warned_of_once() {
    let dir = tempfile::tempdir().unwrap();
    let limits = [
        (Level::User, Term::Day, 1.0),
        (Level::Turn, Term::Whole, 0.5),
    ];
    let first = ledger(dir.path(), &limits);
    let meter = first.meter(turn("acme", "alice", "main"));
    spend(&meter, 0.39).await.unwrap();
    assert!(meter.news().borrow().warnings.is_empty());
    spend(&meter, 0.05).await.unwrap();
    let turn_limit = meter.news().borrow().warnings.clone();
    assert_eq!(turn_limit.len(), 1);
    assert_eq!(turn_limit[0].limit.level, Level::Turn);
    let second = first.meter(turn("acme", "alice", "two"));
    spend(&second, 0.38).await.unwrap();
    let warnings = second.news().borrow().warnings.clone();
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert_eq!(warnings[0].limit.level, Level::User);
    spend(&second, 0.01).await.unwrap();
    assert_eq!(second.news().borrow().warnings.len(), 1);
    // Who starts anew does not hear it again.
    let again = ledger(dir.path(), &limits).meter(turn("acme", "alice", "three"));
    spend(&again, 0.01).await.unwrap();
    assert!(again.news().borrow().warnings.is_empty());
}

#[tokio::test]
async fn what_others_spent_counts_also_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let limits = [(Level::Client, Term::Day, 1.0)];
    // Two containers of a client.
    let (one, two) = (ledger(dir.path(), &limits), ledger(dir.path(), &limits));
    let alice = one.meter(turn("acme", "alice", "main"));
    let bob = two.meter(turn("acme", "bob", "main"));
    for _ in 0..2 {
        spend(&alice, 0.3).await.unwrap();
        spend(&bob, 0.3).await.unwrap();
    }
    assert!((breach(spend(&alice, 0.1).await).spent_usd - 1.2).abs() < 1e-9);
    breach(spend(&bob, 0.1).await);
    let anew = ledger(dir.path(), &limits).meter(turn("acme", "carol", "main"));
    breach(soon(anew.check()).await);
    breach(spend(&anew, 0.1).await);
}

#[tokio::test]
async fn who_may_take_what_is_left_is_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let limits = [(Level::Client, Term::Day, 1.0)];
    let (one, two) = (ledger(dir.path(), &limits), ledger(dir.path(), &limits));
    for (first, second) in [(&one, &one), (&one, &two)] {
        let first = first.meter(turn("acme", "alice", "main"));
        let second = second.meter(turn("acme", "bob", "main"));
        let reservation = soon(first.reserve(ask(5.0))).await.unwrap();
        let waiting = second.clone();
        let tasks = Tasks::new();
        let (sender, mut receiver) = tokio::sync::oneshot::channel();
        tasks.spawn("waits", async move {
            drop(sender.send(spend(&waiting, 0.1).await));
        });
        // It does not go up while the other one may take it all.
        tokio::time::sleep(Duration::from_millis(400)).await;
        assert!(receiver.try_recv().is_err());
        soon(reservation.settle(outcome(0.1))).await.unwrap();
        soon(receiver).await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn two_that_ask_at_once_overspend_by_one() {
    let dir = tempfile::tempdir().unwrap();
    let limits = [(Level::Client, Term::Day, 1.0)];
    let containers: Vec<Ledger> = (0..3).map(|_| ledger(dir.path(), &limits)).collect();
    let tasks = Tasks::new();
    let mut done = Vec::new();
    for (number, ledger) in containers.iter().enumerate() {
        for request in 0..4 {
            let meter = ledger.meter(turn("acme", &format!("u{number}"), &format!("t{request}")));
            let (sender, receiver) = tokio::sync::oneshot::channel();
            tasks.spawn("spends", async move {
                let mut spent = 0.0;
                while spend(&meter, 0.4).await.is_ok() {
                    spent += 0.4;
                }
                sender.send(spent).ok();
            });
            done.push(receiver);
        }
    }
    let mut spent = 0.0;
    for receiver in done {
        spent += soon(receiver).await.unwrap();
    }
    assert!((1.0..1.4 - 1e-9).contains(&spent), "{spent}");
    assert!((report(dir.path()).totals.cost_usd - spent).abs() < 1e-9);
}

#[tokio::test]
async fn a_reservation_of_a_dead_container_is_spent() {
    let dir = tempfile::tempdir().unwrap();
    let limits = [(Level::User, Term::Day, 1.0)];
    let dead = ledger(dir.path(), &limits);
    let meter = dead.meter(turn("acme", "alice", "main"));
    let reservation = soon(meter.reserve(ask(2.0))).await.unwrap();
    // As if its process were killed: the line stays, its owner is nobody any more.
    std::mem::forget(reservation);
    let folder = dir.path().join("acme/alice/.greenroom/usage");
    let file = std::fs::read_dir(&folder)
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path();
    let text = std::fs::read_to_string(&file).unwrap();
    let pid = format!(r#""pid":{}"#, std::process::id());
    assert!(text.contains(&pid));
    std::fs::write(&file, text.replace(&pid, r#""pid":4194305"#)).unwrap();
    let totals = report(dir.path()).totals;
    assert_eq!((totals.requests, totals.unsettled), (1, 1));
    assert!((totals.cost_usd - 2.0).abs() < 1e-9);
    let next = ledger(dir.path(), &limits).meter(turn("acme", "alice", "main"));
    assert!((breach(soon(next.check()).await).spent_usd - 2.0).abs() < 1e-9);
}

/// What a process that was killed leaves: a reservation, noted, whose owner is nobody any more.
async fn left_by_the_dead(root: &std::path::Path, usd: f64) -> Noted {
    let dead = ledger(root, &[]);
    let account = Account {
        kind: Account::IMAGES.into(),
        turn: None,
        ..turn("acme", "alice", "main")
    };
    let meter = dead.meter(account);
    let mut reservation = soon(meter.reserve_paid("acme/painter", Some(usd)))
        .await
        .unwrap();
    let noted = reservation.leave();
    soon(reservation.on_disk()).await;
    drop(reservation);
    let folder = root.join("acme/alice/.greenroom/usage");
    for file in std::fs::read_dir(&folder).unwrap() {
        let path = file.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        let pid = format!(r#""pid":{}"#, std::process::id());
        std::fs::write(&path, text.replace(&pid, r#""pid":4194305"#)).unwrap();
    }
    noted
}

#[tokio::test]
async fn a_prediction_is_counted_like_a_request_and_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let limits = [
        (Level::User, Term::Day, 1.0),
        (Level::Turn, Term::Whole, 0.7),
    ];
    let ledger = ledger(dir.path(), &limits);
    let account = Account {
        kind: Account::IMAGES.into(),
        turn: None,
        ..turn("acme", "alice", "main")
    };
    let meter = ledger.meter(account);
    let first = soon(meter.reserve_paid("acme/painter", Some(5.0)))
        .await
        .unwrap();
    assert!(files(dir.path())[0].contains(r#""costUsd":5.0"#));
    soon(first.settle_paid(Verdict::Settled, Some("p1".into()), Some(0.25)))
        .await
        .unwrap();
    // Of a model whose price nobody says; one that never ran; one that was given back.
    let unknown = soon(meter.reserve_paid("acme/other", None)).await.unwrap();
    soon(unknown.settle_paid(Verdict::Settled, Some("p2".into()), None))
        .await
        .unwrap();
    let never = soon(meter.reserve_paid("acme/painter", Some(5.0)))
        .await
        .unwrap();
    soon(never.settle_paid(Verdict::Refused, Some("p3".into()), Some(0.0)))
        .await
        .unwrap();
    drop(
        soon(meter.reserve_paid("acme/painter", Some(5.0)))
            .await
            .unwrap(),
    );
    let totals = report(dir.path()).totals;
    assert_eq!(
        (
            totals.requests,
            totals.predictions,
            totals.uncounted,
            totals.unsettled
        ),
        (2, 2, 1, 0)
    );
    assert!((totals.cost_usd - 0.25).abs() < 1e-9, "{totals:?}");
    assert!((totals.prediction_cost_usd - 0.25).abs() < 1e-9);
    let line = files(dir.path())[0].lines().nth(2).unwrap().to_owned();
    for said in [
        r#""kind":"images""#,
        r#""thread":"main""#,
        r#""model":"acme/painter""#,
        r#""message":"p1""#,
    ] {
        assert!(line.contains(said), "{line}");
    }
    // Of the model API's figures it is no part.
    let tally = ledger.tally();
    assert_eq!(
        (tally.settled, tally.predictions, tally.uncounted),
        (0, 2, 1)
    );
    assert!(tally.cost_usd.abs() < 1e-9 && (tally.prediction_cost_usd - 0.25).abs() < 1e-9);

    // The budgets know it: warned at 80 %, of the call's own and of the day; refused when it is used up.
    let second = soon(meter.reserve_paid("acme/painter", Some(5.0)))
        .await
        .unwrap();
    soon(second.settle_paid(Verdict::Aborted, Some("p4".into()), Some(0.6)))
        .await
        .unwrap();
    let warned = meter.news().borrow().warnings.clone();
    let levels: Vec<Level> = warned.iter().map(|warning| warning.limit.level).collect();
    assert_eq!(levels, [Level::User, Level::Turn], "{warned:?}");
    let denied = soon(meter.reserve_paid("acme/painter", None))
        .await
        .map(drop);
    assert_eq!(breach(denied).limit.level, Level::Turn);
    // The turn that comes of it has that much less to spend, and no turn beside it has.
    let placing = ledger.meter(turn("acme", "alice", "main"));
    placing.spent_before(0.85);
    assert_eq!(breach(soon(placing.check()).await).limit.level, Level::Turn);
    let other = ledger.meter(turn("acme", "alice", "main"));
    soon(other.check()).await.unwrap();
    spend(&other, 0.2).await.unwrap();
    assert_eq!(breach(spend(&other, 0.1).await).limit.level, Level::User);
}

#[tokio::test]
async fn what_a_dead_process_left_is_settled_by_the_next_one_and_counted_once() {
    let limits = [(Level::User, Term::Day, 0.3)];
    for knows_it_before in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let noted = left_by_the_dead(dir.path(), 2.0).await;
        let totals = report(dir.path()).totals;
        assert_eq!(
            (totals.predictions, totals.unsettled),
            (1, 1),
            "until then at its worst"
        );
        let kept = serde_json::to_string(&noted).unwrap();
        let noted: Noted = serde_json::from_str(&kept).unwrap();
        let next = ledger(dir.path(), &limits);
        let meter = next.meter(turn("acme", "alice", "main"));
        if knows_it_before {
            assert!((breach(soon(meter.check()).await).spent_usd - 2.0).abs() < 1e-9);
        }
        let taken = next.take_up(noted);
        soon(taken.settle_paid(Verdict::Settled, Some("p".into()), Some(0.3)))
            .await
            .unwrap();
        // Files are read in whatever order they come.
        for _ in 0..16 {
            let totals = report(dir.path()).totals;
            assert_eq!((totals.requests, totals.unsettled), (1, 0), "{totals:?}");
            assert!((totals.cost_usd - 0.3).abs() < 1e-9, "{totals:?}");
            let third = ledger(dir.path(), &limits).meter(turn("acme", "alice", "two"));
            assert!((breach(soon(third.check()).await).spent_usd - 0.3).abs() < 1e-9);
        }
        assert!((breach(soon(meter.check()).await).spent_usd - 0.3).abs() < 1e-9);
    }
}

#[tokio::test]
async fn what_was_left_and_is_taken_up_by_nobody_counts_at_its_worst() {
    let dir = tempfile::tempdir().unwrap();
    left_by_the_dead(dir.path(), 2.0).await;
    let limits = [(Level::User, Term::Day, 1.0)];
    let next = ledger(dir.path(), &limits).meter(turn("acme", "alice", "main"));
    assert!((breach(soon(next.check()).await).spent_usd - 2.0).abs() < 1e-9);
}

#[test]
fn ledgers_of_before_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("acme/alice/.greenroom/usage");
    std::fs::create_dir_all(&folder).unwrap();
    let line = r#"{"status":"settled","at":"2026-11-21T10:00:00Z","id":"r","kind":"turn","client":"acme","user":"alice","thread":"main","model":"claude-opus-5","inputTokens":1,"outputTokens":2,"cacheReadTokens":3,"cacheWrite5mTokens":4,"cacheWrite1hTokens":5,"costUsd":0.25,"durationMs":7,"isUnpriced":true}"#;
    std::fs::write(folder.join("2026-11-21~old-1.jsonl"), format!("{line}\n")).unwrap();
    let totals = report(dir.path()).totals;
    assert_eq!(
        (totals.requests, totals.predictions, totals.uncounted),
        (1, 0, 0)
    );
    assert!((totals.cost_usd - 0.25).abs() < 1e-9);
}

#[tokio::test]
async fn nothing_goes_up_that_cannot_be_written_down() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("acme");
    std::fs::write(&file, "in the way").unwrap();
    let meter = ledger(dir.path(), &[]).meter(turn("acme", "alice", "main"));
    assert!(matches!(
        soon(meter.reserve(ask(1.0))).await,
        Err(Denied::Ledger(_))
    ));
    std::fs::remove_file(&file).unwrap();
    spend(&meter, 0.1).await.unwrap();
}
