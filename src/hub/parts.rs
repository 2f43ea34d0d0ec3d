//! An upload in several parts, and what of it was up when it was cut off.
//!
//! The Hub's own way for large files: each part has an address, its answer a tag, and all tags together
//! end the upload. The addresses are good for a while, so that an upload that was cut off goes on with
//! them where it was. For that they are noted, with the tags of the parts that are up, in a file of ours:
//!
//! ```text
//! CACHE_PATH/hub/{sum of endpoint, repository and file}.jsonl     0600: its addresses let whoever has
//!                                                                 them upload these very parts
//! ```
//!
//! A file that cannot be read or written costs the upload nothing: it begins again, as one in one piece
//! has to.

use std::{
    collections::BTreeMap,
    fs::{self, DirBuilder, File},
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    ops::Range,
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use nix::fcntl::OFlag;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use url::Url;

use super::lfs::Action;
use crate::task;

const MAX_PARTS: u64 = 10_000;
/// The longest tag, in bytes.
const MAX_TAG_BYTES: usize = 1024;
/// No address is good for longer.
const GOOD_FOR: Duration = Duration::from_secs(24 * 3600);
/// The longest file of ours.
const MAX_NOTED_BYTES: u64 = 32 * 1024 * 1024;
/// Files of ours that are looked at, to remove the old ones.
const MAX_FILES: usize = 1000;
/// For one small read or write.
const DISK: Duration = Duration::from_secs(10);

/// In which parts a file is wanted, and where.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Plan {
    size: u64,
    chunk: u64,
    /// What is told that all of them are up.
    pub(super) end: String,
    parts: Vec<String>,
}

impl Plan {
    /// The parts of a file, if it is wanted in parts.
    pub(super) fn of(upload: &Action, size: u64) -> Result<Option<Self>, &'static str> {
        let Some(chunk) = upload.header.get("chunk_size") else {
            return Ok(None);
        };
        let chunk = chunk.as_u64().or_else(|| chunk.as_str()?.parse().ok());
        let chunk = chunk
            .filter(|chunk| *chunk > 0)
            .ok_or("its parts have no size")?;
        let count = size.div_ceil(chunk);
        if count > MAX_PARTS {
            return Err("it has too many parts");
        }
        let named: BTreeMap<u64, &str> = (upload.header.iter())
            .filter_map(|(name, value)| Some((part_number(name)?, value.as_str()?)))
            .collect();
        if !named.keys().copied().eq(1..=count) {
            return Err("its parts are not those of the file");
        }
        Ok(Some(Self {
            size,
            chunk,
            end: upload.href.clone(),
            parts: named.into_values().map(str::to_owned).collect(),
        }))
    }

    /// The address of each part, and what of the file it is.
    pub(super) fn parts(&self) -> impl Iterator<Item = (&str, Range<u64>)> {
        self.parts.iter().zip(0_u64..).map(|(href, at)| {
            let from = at * self.chunk;
            let to = from.saturating_add(self.chunk).min(self.size);
            (href.as_str(), from..to)
        })
    }

    /// Is it the same upload, with addresses that are good for longer? The storage's name for an upload is
    /// a part of them.
    fn continues(&self, earlier: &Self) -> bool {
        let upload = |href: &String| -> Option<(String, String)> {
            let url: Url = href.parse().ok()?;
            let id = url.query_pairs().find(|(name, _)| name == "uploadId")?.1;
            Some((format!("{:?}{}", url.origin(), url.path()), id.into_owned()))
        };
        let is_same = |(one, other): (&String, &String)| {
            let one = upload(one);
            one.is_some() && one == upload(other)
        };
        (self.size, self.chunk, self.parts.len())
            == (earlier.size, earlier.chunk, earlier.parts.len())
            && self.parts.iter().zip(&earlier.parts).all(is_same)
    }
}

/// Is this the name of a part?
pub(super) fn part_number(name: &str) -> Option<u64> {
    let is_plain = name.bytes().all(|b| b.is_ascii_digit());
    name.parse().ok().filter(|_| is_plain)
}

/// A tag, if it can be one.
pub(super) fn tag(text: &str) -> Option<&str> {
    Some(text).filter(|tag| !tag.is_empty() && tag.len() <= MAX_TAG_BYTES)
}

/// Tags of the parts that are up, by their number from 0.
pub(super) type Tags = BTreeMap<usize, String>;

#[derive(Debug, Serialize, Deserialize)]
struct Up {
    part: usize,
    tag: String,
}

/// What is noted of one upload. It is ours alone as long as this lives.
#[derive(Debug)]
pub(super) struct Notes {
    path: PathBuf,
    file: Arc<File>,
}

impl Notes {
    /// Goes on with what is noted, else begins with `asked`; the plan that holds, and what is up. `whose`
    /// tells uploads from each other. Without notes that is `asked`.
    pub(super) async fn open(
        folder: Option<&Path>,
        whose: &[&str],
        asked: Plan,
    ) -> (Option<Self>, Plan, Tags) {
        let Some(folder) = folder.map(Path::to_owned) else {
            return (None, asked, Tags::new());
        };
        let sum = hex::encode(Sha256::digest(whose.join("\n")));
        let plan = asked.clone();
        let work = move || Self::read_or_begin(&folder, &sum, plan);
        match task::blocking_apart("looking for an upload's notes", DISK, work).await {
            Ok(Ok((notes, plan, tags))) => (Some(notes), plan, tags),
            Ok(Err(error)) => {
                tracing::debug!(%error, "an upload has no notes");
                (None, asked, Tags::new())
            }
            Err(error) => {
                tracing::debug!(%error, "an upload has no notes");
                (None, asked, Tags::new())
            }
        }
    }

    /// Blocking.
    fn read_or_begin(folder: &Path, sum: &str, asked: Plan) -> io::Result<(Self, Plan, Tags)> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)?;
        remove_old(folder);
        let path = folder.join(format!("{sum}.jsonl"));
        let file = File::options()
            .read(true)
            .append(true)
            .create(true)
            .mode(0o600)
            .custom_flags((OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK).bits())
            .open(&path)?;
        if !file.metadata()?.is_file() {
            return Err(io::Error::other("it is no ordinary file"));
        }
        // Somebody else uploads the same at this moment.
        file.try_lock()?;
        let (plan, tags) = match known(&file) {
            Some((earlier, tags)) if asked.continues(&earlier) => (asked, tags),
            Some((earlier, tags)) if earlier.size == asked.size && !tags.is_empty() => {
                (earlier, tags)
            }
            _ => (asked, Tags::new()),
        };
        // Anew, since a line that was cut off would be one with the next.
        file.set_len(0)?;
        let mut text = line(&plan);
        for (part, tag) in &tags {
            text.extend(line(&Up {
                part: *part,
                tag: tag.clone(),
            }));
        }
        (&file).write_all(&text)?;
        let file = Arc::new(file);
        Ok((Self { path, file }, plan, tags))
    }

    /// Notes that a part is up.
    pub(super) async fn up(&self, part: usize, tag: &str) {
        let file = Arc::clone(&self.file);
        let line = line(&Up {
            part,
            tag: tag.to_owned(),
        });
        // What is not noted is uploaded again.
        let write = move || (&*file).write_all(&line);
        let written = task::blocking_apart("noting a part", DISK, write).await;
        if !matches!(written, Ok(Ok(()))) {
            tracing::debug!("a part could not be noted");
        }
    }

    /// Forgets it: it is over, or its addresses are good no more.
    pub(super) async fn forget(self) {
        let path = self.path.clone();
        let remove = move || fs::remove_file(path);
        task::blocking_apart("forgetting an upload", DISK, remove)
            .await
            .ok();
    }
}

fn line(value: &impl Serialize) -> Vec<u8> {
    let mut line = serde_json::to_vec(value).expect("plain data serialises");
    line.push(b'\n');
    line
}

/// What is noted in a file, if that can be read and may be good still. A last line that was cut off is
/// none.
fn known(file: &File) -> Option<(Plan, Tags)> {
    let metadata = file.metadata().ok()?;
    let age = SystemTime::now().duration_since(metadata.modified().ok()?);
    if age.is_ok_and(|age| age > GOOD_FOR) {
        return None;
    }
    let mut lines = BufReader::new(file.take(MAX_NOTED_BYTES)).lines();
    let plan: Plan = serde_json::from_str(&lines.next()?.ok()?).ok()?;
    let is_sound = plan.chunk > 0
        && plan.parts.len() as u64 <= MAX_PARTS
        && plan.parts.len() as u64 == plan.size.div_ceil(plan.chunk);
    let mut tags = Tags::new();
    for line in lines.map_while(Result::ok) {
        let Ok(up) = serde_json::from_str::<Up>(&line) else {
            break;
        };
        if up.part < plan.parts.len() && tag(&up.tag).is_some() {
            tags.insert(up.part, up.tag);
        }
    }
    is_sound.then_some((plan, tags))
}

/// Removes what nobody went on with.
fn remove_old(folder: &Path) {
    let Ok(entries) = fs::read_dir(folder) else {
        return;
    };
    for entry in entries.flatten().take(MAX_FILES) {
        let modified = entry.metadata().and_then(|metadata| metadata.modified());
        let age = modified.map(|modified| SystemTime::now().duration_since(modified));
        if matches!(age, Ok(Ok(age)) if age > GOOD_FOR) {
            fs::remove_file(entry.path()).ok();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use serde_json::{Value, json};

    use super::*;

    fn action(header: Value) -> Action {
        serde_json::from_value(json!({"href": "https://x.example", "header": header})).unwrap()
    }

    #[test]
    fn parts_are_those_of_the_file() {
        let three = json!({"chunk_size": "10", "1": "a", "2": "b", "3": "c"});
        let plan = Plan::of(&action(three), 25).unwrap().unwrap();
        let parts: Vec<_> = plan.parts().collect();
        assert_eq!(parts, [("a", 0..10), ("b", 10..20), ("c", 20..25)]);
        let whole = json!({"chunk_size": u64::MAX, "1": "a"});
        let plan = Plan::of(&action(whole), 25).unwrap().unwrap();
        assert_eq!(plan.parts().collect::<Vec<_>>(), [("a", 0..25)]);
        assert_eq!(Plan::of(&action(json!({})), 25).unwrap(), None);
        for (wrong, size) in [
            (json!({"chunk_size": 10, "1": "a", "2": "b", "3": "c"}), 31),
            (json!({"chunk_size": 10, "1": "a", "3": "c"}), 20),
            (json!({"chunk_size": 10, "1": "a", "+2": "c"}), 20),
            (json!({"chunk_size": 0, "1": "a"}), 20),
            (json!({"chunk_size": "ten", "1": "a"}), 20),
            (json!({"chunk_size": 1, "1": "a"}), u64::MAX),
        ] {
            assert!(Plan::of(&action(wrong.clone()), size).is_err(), "{wrong}");
        }
    }

    fn plan(upload: &str, signature: &str) -> Plan {
        let part =
            |number| format!("https://s3.example/x?uploadId={upload}&n={number}&s={signature}");
        let header = json!({"chunk_size": 10, "1": part(1), "2": part(2), "3": part(3)});
        Plan::of(&action(header), 25).unwrap().unwrap()
    }

    async fn open(folder: &Path, asked: Plan) -> (Option<Notes>, Plan, Tags) {
        Notes::open(Some(folder), &["https://hub", "a/b", "sum"], asked).await
    }

    #[tokio::test]
    async fn what_was_cut_off_goes_on_with_its_own_addresses() {
        let outer = tempfile::tempdir().unwrap();
        let folder = outer.path().join("hub");
        let (first, second) = (plan("one", "s1"), plan("two", "s2"));
        let (notes, holds, tags) = open(&folder, first.clone()).await;
        assert_eq!((holds, tags.len()), (first.clone(), 0));
        // Without a part that is up there is nothing to go on with.
        drop(notes);
        let (notes, holds, _) = open(&folder, second.clone()).await;
        assert_eq!(holds, second);
        let notes = notes.unwrap();
        notes.up(0, "\"t0\"").await;
        notes.up(2, "\"t2\"").await;
        assert_eq!(fs::metadata(&notes.path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(fs::metadata(&folder).unwrap().mode() & 0o777, 0o700);
        // Two at once do not mix.
        let (none, holds, tags) = open(&folder, first.clone()).await;
        assert!(none.is_none() && tags.is_empty() && holds == first);
        // Killed in the middle of a line.
        (&*notes.file).write_all(b"{\"part\":1,\"ta").unwrap();
        drop(notes);
        let (notes, holds, tags) = open(&folder, first.clone()).await;
        let expected = Tags::from([(0, "\"t0\"".to_owned()), (2, "\"t2\"".to_owned())]);
        assert_eq!((&holds, &tags), (&second, &expected));
        drop(notes);
        // The same upload with newer addresses keeps its parts, and a further one.
        let newer = plan("two", "s3");
        let (notes, holds, tags) = open(&folder, newer.clone()).await;
        assert_eq!((&holds, &tags), (&newer, &expected));
        notes.unwrap().up(1, "\"t1\"").await;
        let (notes, holds, tags) = open(&folder, first.clone()).await;
        assert_eq!((holds, tags.len()), (newer, 3));
        let notes = notes.unwrap();
        let path = notes.path.clone();
        notes.forget().await;
        assert!(!path.exists());
        let (_, holds, tags) = open(&folder, first.clone()).await;
        assert_eq!((holds, tags.len()), (first, 0));
    }

    #[tokio::test]
    async fn notes_that_are_old_or_no_notes_are_none() {
        let outer = tempfile::tempdir().unwrap();
        let folder = outer.path().join("hub");
        let asked = plan("one", "s");
        let (notes, ..) = open(&folder, plan("zero", "s")).await;
        let notes = notes.unwrap();
        notes.up(0, "\"t0\"").await;
        let path = notes.path.clone();
        let old = SystemTime::now() - GOOD_FOR - Duration::from_secs(60);
        notes.file.set_modified(old).unwrap();
        drop(notes);
        // Of another upload, removed on the way.
        let other = folder.join("other.jsonl");
        fs::write(&other, "x").unwrap();
        File::options()
            .append(true)
            .open(&other)
            .unwrap()
            .set_modified(old)
            .unwrap();
        let (notes, holds, tags) = open(&folder, asked.clone()).await;
        assert_eq!((&holds, tags.len()), (&asked, 0));
        assert!(!other.exists());
        drop(notes);
        let up = "{\"part\":0,\"tag\":\"t\"}\n";
        for garbage in [
            "".to_owned(),
            "\u{0}".to_owned(),
            format!("{{\"size\":25,\"chunk\":0,\"end\":\"e\",\"parts\":[\"a\"]}}\n{up}"),
            format!("{{\"size\":25,\"chunk\":10,\"end\":\"e\",\"parts\":[\"a\"]}}\n{up}"),
            format!("{{\"size\":9,\"chunk\":10,\"end\":\"e\",\"parts\":[\"a\"]}}\n{up}"),
        ] {
            fs::write(&path, &garbage).unwrap();
            let (_, holds, tags) = open(&folder, asked.clone()).await;
            assert_eq!((&holds, tags.len()), (&asked, 0), "{garbage}");
        }
        // A link that somebody put there, and a place where nothing can be noted.
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink(&other, &path).unwrap();
        let (none, holds, _) = open(&folder, asked.clone()).await;
        assert!(none.is_none() && holds == asked && !other.exists());
        let (none, ..) = open(Path::new("/proc/nowhere"), asked).await;
        assert!(none.is_none());
    }
}
