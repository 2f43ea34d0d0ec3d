//! What is in the file, and who is held up by it: nobody.

use std::io::Read;

use super::*;

const SMALL: Limits = Limits {
    max_bytes: 100,
    kept: 3,
};

fn unpacked(path: &Path) -> String {
    let mut text = String::new();
    flate2::read::GzDecoder::new(File::open(path).unwrap())
        .read_to_string(&mut text)
        .unwrap();
    text
}

/// Everything below a folder, oldest first.
fn whole(path: &Path) -> String {
    let packed = (1..=9).rev().map(|number| {
        let name = format!("{}.{number}.gz", path.display());
        Some(name).filter(|name| Path::new(name).exists())
    });
    let packed: String = packed
        .flatten()
        .map(|name| unpacked(Path::new(&name)))
        .collect();
    packed + &fs::read_to_string(path).unwrap()
}

fn line(number: usize) -> String {
    format!("line {number:04} {}\n", "x".repeat(19))
}

#[test]
fn it_is_packed_when_it_is_full_and_the_oldest_goes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.log");
    let mut file = Rotating::open(path.clone(), SMALL, Arc::default()).unwrap();
    for number in 0..30 {
        file.write(line(number).as_bytes()).unwrap();
    }
    let mut names: Vec<String> = fs::read_dir(folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["a.log", "a.log.1.gz", "a.log.2.gz", "a.log.3.gz"]);
    for name in &names {
        let mode = fs::metadata(folder.path().join(name)).unwrap().mode();
        assert_eq!(mode & 0o777, 0o600, "{name}");
    }
    // Three lines fit; the last twelve are there, in order.
    let expected: String = (18..30).map(line).collect();
    assert_eq!(whole(&path), expected);
    // A line that is longer than a file is one all the same.
    file.write(&[b'y'; 500]).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().len(), 500);
}

#[test]
fn two_writers_of_one_file_lose_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.log");
    let limits = Limits {
        max_bytes: 2000,
        kept: 9,
    };
    thread::scope(|scope| {
        for writer in 0..2 {
            let path = path.clone();
            scope.spawn(move || {
                let mut file = Rotating::open(path, limits, Arc::default()).unwrap();
                for number in 0..200 {
                    file.write(line(writer * 1000 + number).as_bytes()).unwrap();
                }
            });
        }
    });
    let text = whole(&path);
    let mut lines: Vec<&str> = text.lines().collect();
    lines.sort_unstable();
    let all = (0..200).chain(1000..1200).map(line);
    let all: Vec<String> = all.map(|line| line.trim_end().to_owned()).collect();
    assert_eq!(lines, all);
}

#[test]
fn of_two_that_find_it_full_one_packs_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.log");
    let open = || Rotating::open(path.clone(), SMALL, Arc::default()).unwrap();
    let (mut one, mut other) = (open(), open());
    for number in 0..3 {
        one.write(line(number).as_bytes()).unwrap();
    }
    for writer in [&mut one, &mut other] {
        // Each found it full, and goes on from there when its turn comes.
        writer.file.lock_shared().unwrap();
        writer.rotate().unwrap();
        writer.file.unlock().unwrap();
        writer.write(b"new\n").unwrap();
    }
    assert!(!folder.path().join("a.log.2.gz").exists());
    let expected: String = (0..3).map(line).collect();
    assert_eq!(whole(&path), expected + "new\nnew\n");
}

#[test]
fn what_a_killed_one_left_is_packed_and_an_old_file_is_made_private() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.log");
    fs::write(&path, "new\n").unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
    fs::write(folder.path().join("a.log.1"), "old\n").unwrap();
    fs::write(folder.path().join("a.log.1.gz.new"), "half").unwrap();
    let mut file = Rotating::open(path.clone(), SMALL, Arc::default()).unwrap();
    file.write(b"newest\n").unwrap();
    assert_eq!(whole(&path), "old\nnew\nnewest\n");
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    // Taken away by somebody, it is begun anew.
    fs::remove_file(&path).unwrap();
    file.write(b"again\n").unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), "again\n");
}

#[test]
fn whoever_logs_never_waits_and_what_is_dropped_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.log");
    // Nobody takes lines, as on a disk that is stuck.
    let (mut file, messages) = LogFile::unread();
    let line = [b"x".repeat(999), b"\n".to_vec()].concat();
    for _ in 0..10_000 {
        file.write_all(&line).unwrap();
    }
    let dropped = file.0.dropped.load(Ordering::Relaxed);
    assert_eq!(dropped, 10_000 - (QUEUE_BYTES / line.len()) as u64);
    // At the end none of them is in the file.
    assert_eq!(file.finish(Duration::from_millis(20)), 10_000);
    // The disk goes on.
    let rotating = Rotating::open(path.clone(), LIMITS, Arc::default()).unwrap();
    let shared = Arc::clone(&file.0);
    thread::spawn(move || write_all(rotating, &messages, &shared, true));
    assert_eq!(file.finish(Duration::from_secs(60)), 0);
    let text = fs::read_to_string(&path).unwrap();
    let told = text.lines().next().unwrap();
    let told: serde_json::Value = serde_json::from_str(told).unwrap();
    assert_eq!(told["missing"], dropped, "{told}");
    assert_eq!(text.lines().count() as u64, 1 + 10_000 - dropped);
    // What was written leaves room for as much again.
    for _ in 0..1000 {
        file.write_all(&line).unwrap();
    }
    assert_eq!(file.finish(Duration::from_secs(60)), 0);
    let text = fs::read_to_string(&path).unwrap();
    assert_eq!(text.lines().count() as u64, 1 + 11_000 - dropped);
}

#[test]
fn a_line_that_a_full_disk_cut_off_is_no_part_of_the_next_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.log");
    let mut file = Rotating::open(path.clone(), SMALL, Arc::default()).unwrap();
    file.file.write_all(b"half a li").unwrap();
    file.is_cut = true;
    file.write(b"next\n").unwrap();
    file.write(b"last\n").unwrap();
    assert_eq!(
        fs::read_to_string(&path).unwrap(),
        "half a li\nnext\nlast\n"
    );
}

#[test]
fn at_the_end_a_file_that_is_packed_is_waited_for_and_a_stuck_one_is_not() {
    let (mut log, messages) = LogFile::unread();
    log.write_all(b"x\n").unwrap();
    log.0.packs.store(true, Ordering::Relaxed);
    let shared = Arc::clone(&log.0);
    let begun = Instant::now();
    let packing = thread::spawn(move || {
        // It takes longer than the end allows otherwise.
        thread::sleep(Duration::from_millis(300));
        shared.packs.store(false, Ordering::Relaxed);
        for message in messages {
            match message {
                Message::Line(_) => drop(shared.queued.fetch_sub(1, Ordering::Relaxed)),
                // Nobody waits for it any more on a busy machine.
                Message::Flush(done) => {
                    done.try_send(()).ok();
                    return;
                }
            }
        }
    });
    log.finish(Duration::from_millis(1));
    assert!(begun.elapsed() >= Duration::from_millis(250));
    packing.join().unwrap();

    let (mut log, _messages) = LogFile::unread();
    log.write_all(b"x\n").unwrap();
    let begun = Instant::now();
    assert_eq!(log.finish(Duration::from_millis(1)), 1);
    assert!(begun.elapsed() < PACKING);
}

#[test]
fn what_is_no_file_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let link = folder.path().join("link");
    std::os::unix::fs::symlink("/etc/hostname", &link).unwrap();
    let nowhere = folder.path().join("nowhere/a.log");
    let pipe = folder.path().join("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    for path in [
        Path::new("/dev/full"),
        folder.path(),
        &link,
        &nowhere,
        &pipe,
    ] {
        let error = LogFile::start(path, true).unwrap_err();
        assert!(error.to_string().contains("LOG_FILE"), "{error}");
    }
}

#[test]
fn what_somebody_put_beside_it_is_neither_followed_nor_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::write(at("mine"), "mine").unwrap();
    // Where it is packed to.
    std::os::unix::fs::symlink(at("mine"), at("a.log.1.gz.new")).unwrap();
    let mut file = Rotating::open(at("a.log"), SMALL, Arc::default()).unwrap();
    for number in 0..5 {
        file.write(line(number).as_bytes()).unwrap();
    }
    assert_eq!(fs::read_to_string(at("mine")).unwrap(), "mine");
    assert!(at("a.log.1.gz").exists());
    // What is packed: nothing is read that is not a log, and the next log takes its place.
    std::os::unix::fs::symlink(at("mine"), at("a.log.1")).unwrap();
    let mut file = Rotating::open(at("a.log"), SMALL, Arc::default()).unwrap();
    for number in 5..9 {
        file.write(line(number).as_bytes()).unwrap();
    }
    nix::unistd::mkfifo(&at("a.log.1"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let mut file = Rotating::open(at("a.log"), SMALL, Arc::default()).unwrap();
    for number in 9..12 {
        file.write(line(number).as_bytes()).unwrap();
    }
    let expected: String = (0..12).map(line).collect();
    assert_eq!(whole(&at("a.log")), expected);
    assert_eq!(fs::read_to_string(at("mine")).unwrap(), "mine");
    assert!(!at("a.log.1").exists());
}

#[test]
fn a_folder_that_cannot_be_written_any_more_costs_lines_and_tells_how_many() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.log");
    let (mut log, messages) = LogFile::unread();
    let rotating = Rotating::open(path.clone(), SMALL, Arc::default()).unwrap();
    let shared = Arc::clone(&log.0);
    thread::spawn(move || write_all(rotating, &messages, &shared, false));
    log.write_all(line(0).as_bytes()).unwrap();
    assert_eq!(log.finish(Duration::from_secs(60)), 0);
    // It is gone, and no file can be made where it was.
    let moved = folder.path().with_extension("moved");
    fs::rename(folder.path(), &moved).unwrap();
    for number in 1..8 {
        log.write_all(line(number).as_bytes()).unwrap();
    }
    assert_eq!(log.finish(Duration::from_secs(60)), 7);
    fs::rename(&moved, folder.path()).unwrap();
    log.write_all(line(8).as_bytes()).unwrap();
    assert_eq!(log.finish(Duration::from_secs(60)), 0);
    let text = whole(&path);
    assert!(
        text.starts_with(&line(0)) && text.ends_with(&line(8)),
        "{text}"
    );
    assert!(text.contains("7 lines are missing here"), "{text}");
}
