//! Whether what others committed can be had as files: asked of every commit that comes from outside
//! (a clone, a fetch, somebody's own git), before a file of it is written.
//!
//! A tree of git's may hold what no checkout should make: names that lead out of the folder or into
//! `.git`, two things of one name, links of a megabyte, a file that fills the memory, or ten folders
//! in ten folders in ten folders that are all the same object and ten thousand million files. Only
//! trees and the sizes of their files are read for it, each object once.

use std::{
    collections::{HashMap, HashSet},
    fmt,
    path::Path,
};

use git2::{ObjectType, Oid, Repository, Tree};

use super::{RemoteError, RemoteErrorKind, RemoteUse, message::one_line};

/// Largest file, in bytes. A checkout and a diff hold it in memory; GitHub takes no larger one.
pub(super) const MAX_FILE_BYTES: usize = 100 << 20;
/// Most bytes of all files: every thread has a copy.
const MAX_SITE_BYTES: u64 = 4 << 30;
/// Most files, as many as a scan of a worktree takes up.
const MAX_FILES: u64 = 500_000;
/// Longest path, in bytes: of the 4,095 that Linux takes, the workspace's and our own folders need
/// some.
const MAX_PATH_BYTES: usize = 2_048;
/// Most folders in each other: libgit2 looks into a hundred.
const MAX_DEPTH: usize = 90;
/// Longest name, as Linux has it.
const MAX_NAME_BYTES: usize = 255;
/// Largest list of rules (`.gitignore`, `.gitattributes`), in bytes: libgit2 reads each as a whole,
/// over and over.
const MAX_RULES_BYTES: u64 = 1 << 20;
/// Longest text of a symlink, as Linux has it.
const MAX_LINK_BYTES: usize = 4_095;

const LINK_MODE: i32 = 0o120_000;

/// Why a commit cannot be had as files. Its text goes on after "the repository cannot be used: ".
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Unfit(String);

impl fmt::Display for Unfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Unfit {
    /// As the failure of an operation with a remote.
    pub(super) fn during(self, during: RemoteUse) -> RemoteError {
        RemoteError {
            during,
            kind: RemoteErrorKind::Rejected,
            message: format!("the repository cannot be used: {self}"),
        }
    }
}

/// Judges the files of `commit`, and whether its history is there. What `known`, an earlier commit,
/// has at the same place was judged with that.
pub(super) fn check(repo: &Repository, commit: Oid, known: Option<Oid>) -> Result<(), Unfit> {
    let walk = || -> Result<(), git2::Error> {
        let mut walk = repo.revwalk()?;
        walk.push(commit)?;
        if let Some(known) = known {
            walk.hide(known)?;
        }
        walk.try_for_each(|id| id.map(drop))
    };
    walk().map_err(|_| {
        Unfit("its history is cut off; if it is a shallow clone, fetch all of it first".into())
    })?;
    let tree_of = |commit: Oid| repo.find_commit(commit).and_then(|commit| commit.tree());
    let tree = tree_of(commit).map_err(|_| broken(b""))?;
    let known = known.and_then(|commit| tree_of(commit).ok());
    let mut judge = Judge {
        repo,
        measured: HashMap::new(),
    };
    let whole = judge.folder(&tree, known.as_ref(), &mut Vec::new())?;
    // Parts that are there more than once were looked at once: here they count.
    if whole.files > MAX_FILES {
        return Err(Unfit(format!("it has more than {MAX_FILES} files")));
    }
    if whole.bytes > MAX_SITE_BYTES {
        return Err(Unfit("its files are larger than 4 GB together".into()));
    }
    if whole.longest > MAX_PATH_BYTES || whole.depth > MAX_DEPTH {
        return Err(too_long(b""));
    }
    Ok(())
}

/// Is this the name of a file that libgit2 obeys wherever it stands in a worktree?
pub(super) fn is_rules(name: &[u8]) -> bool {
    name == b".gitignore" || name == b".gitattributes"
}

/// What is wrong with such a file, if anything is: libgit2 would follow a link out of the worktree,
/// wait for a pipe for ever, and read a terabyte into memory. (A folder it leaves alone.)
pub(super) fn rules_fault(is_file: bool, size: u64) -> Option<&'static str> {
    match is_file {
        false => Some("is no regular file"),
        true if size > MAX_RULES_BYTES => Some("is larger than 1 MB"),
        true => None,
    }
}

/// May a file of this path (relative, with `/`) be committed?
pub(super) fn is_allowed(path: &Path) -> bool {
    let path = path.as_os_str().as_encoded_bytes();
    let mut names = path.split(|&b| b == b'/');
    path.len() <= MAX_PATH_BYTES
        && path.iter().filter(|&&b| b == b'/').count() <= MAX_DEPTH
        && names.all(|name| fault(name).is_none())
}

/// What a folder comes to, with all that is below it.
#[derive(Debug, Clone, Copy, Default)]
struct Measure {
    files: u64,
    bytes: u64,
    /// Of the paths from here on.
    longest: usize,
    /// Folders in each other from here on.
    depth: usize,
}

struct Judge<'r> {
    repo: &'r Repository,
    measured: HashMap<Oid, Measure>,
}

impl Judge<'_> {
    fn folder(
        &mut self,
        tree: &Tree<'_>,
        known: Option<&Tree<'_>>,
        path: &mut Vec<u8>,
    ) -> Result<Measure, Unfit> {
        if known.is_some_and(|known| known.id() == tree.id()) {
            return Ok(Measure::default());
        }
        if let Some(measure) = self.measured.get(&tree.id()) {
            return Ok(*measure);
        }
        let depth = path.iter().filter(|&&b| b == b'/').count();
        if path.len() > MAX_PATH_BYTES || depth > MAX_DEPTH {
            return Err(too_long(path));
        }
        let mut measure = Measure::default();
        let mut names = HashSet::new();
        for entry in tree {
            let name = entry.name_bytes();
            let length = path.len();
            if length > 0 {
                path.push(b'/');
            }
            path.extend_from_slice(name);
            if let Some(fault) = fault(name) {
                return Err(Unfit(format!("{} {fault}", shown(path))));
            }
            if !names.insert(name.to_vec()) {
                return Err(broken(path));
            }
            let before = known.and_then(|known| known.get_name_bytes(name));
            let is_known = before.as_ref().is_some_and(|before| {
                before.id() == entry.id() && before.filemode_raw() == entry.filemode_raw()
            });
            let mut below = Measure::default();
            match entry.kind() {
                _ if is_known => {}
                Some(ObjectType::Tree) => {
                    let find = |id| self.repo.find_tree(id);
                    let folder = find(entry.id()).map_err(|_| broken(path))?;
                    let before = before.and_then(|before| find(before.id()).ok());
                    below = self.folder(&folder, before.as_ref(), path)?;
                }
                Some(ObjectType::Blob) => {
                    below.files = 1;
                    below.bytes = self.file(entry.id(), entry.filemode(), path)?;
                    let is_file = entry.filemode() != LINK_MODE;
                    if is_rules(name)
                        && let Some(fault) = rules_fault(is_file, below.bytes)
                    {
                        return Err(Unfit(format!("{} {fault}", shown(path))));
                    }
                }
                // A submodule: a folder that stays empty.
                _ => {}
            }
            measure.files = measure.files.saturating_add(below.files);
            measure.bytes = measure.bytes.saturating_add(below.bytes);
            measure.longest = measure.longest.max(name.len() + 1 + below.longest);
            let is_folder = usize::from(entry.kind() == Some(ObjectType::Tree));
            measure.depth = measure.depth.max(is_folder + below.depth);
            path.truncate(length);
        }
        self.measured.insert(tree.id(), measure);
        Ok(measure)
    }

    /// The size of a file.
    fn file(&self, id: Oid, mode: i32, path: &[u8]) -> Result<u64, Unfit> {
        let header = self.repo.odb().and_then(|odb| odb.read_header(id));
        let (size, kind) = header.map_err(|_| broken(path))?;
        if kind != ObjectType::Blob {
            return Err(broken(path));
        }
        if mode == LINK_MODE {
            if size > MAX_LINK_BYTES {
                return Err(no_link(path));
            }
            let target = self.repo.find_blob(id).map_err(|_| broken(path))?;
            if size == 0 || target.content().contains(&0) {
                return Err(no_link(path));
            }
        }
        if size > MAX_FILE_BYTES {
            return Err(Unfit(format!("{} is larger than 100 MB", shown(path))));
        }
        Ok(size as u64)
    }
}

fn broken(path: &[u8]) -> Unfit {
    match path {
        b"" => Unfit("its files cannot be read".into()),
        path => Unfit(format!("what it has at {} is broken", shown(path))),
    }
}

fn no_link(path: &[u8]) -> Unfit {
    Unfit(format!("{} is a symlink that no disk takes", shown(path)))
}

fn too_long(path: &[u8]) -> Unfit {
    let begins = match path {
        b"" => String::new(),
        path => format!(" (it begins {})", shown(&path[..path.len().min(60)])),
    };
    Unfit(format!(
        "it has a path of more than {MAX_PATH_BYTES} bytes or {MAX_DEPTH} folders{begins}"
    ))
}

/// A path for a person.
fn shown(path: &[u8]) -> String {
    format!("\"{}\"", one_line(&String::from_utf8_lossy(path), 200))
}

/// What is wrong with a name, if anything is: those that git itself refuses, and what no disk takes.
fn fault(name: &[u8]) -> Option<&'static str> {
    if name.is_empty() || name == b"." || name == b".." || name.contains(&b'/') {
        return Some("leads out of its folder");
    }
    if name.len() > MAX_NAME_BYTES {
        return Some("has a name of more than 255 bytes");
    }
    is_git(name).then_some("has a name that git keeps for itself")
}

/// Is the name `.git`, as some file system would read it? (Somebody else may check the site out on
/// a Mac or on Windows.)
fn is_git(name: &[u8]) -> bool {
    // Windows: `\` ends a name too, a short name is `git~1`, dots and spaces at the end go away, and
    // what follows a colon is a stream of the file.
    for part in name.split(|&b| b == b'\\') {
        let file = part.split(|&b| b == b':').next().unwrap_or_default();
        let end = file.iter().rposition(|&b| b != b' ' && b != b'.');
        let file = &file[..end.map_or(0, |end| end + 1)];
        if file.eq_ignore_ascii_case(b".git") || file.eq_ignore_ascii_case(b"git~1") {
            return true;
        }
    }
    // A Mac's HFS+: characters without a width are left out.
    let Ok(name) = std::str::from_utf8(name) else {
        return false;
    };
    let visible = name.chars().filter(|c| {
        !matches!(c, '\u{200c}'..='\u{200f}' | '\u{202a}'..='\u{202e}'
            | '\u{206a}'..='\u{206f}' | '\u{feff}')
    });
    visible.flat_map(char::to_lowercase).eq(".git".chars())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn git_by_any_other_name() {
        for name in [
            ".git",
            ".GIT",
            ".Git",
            "git~1",
            "GIT~1",
            ".git ",
            ".git.",
            ".git . .",
            "git~1.",
            ".git::$INDEX_ALLOCATION",
            ".git:x",
            "a\\.git",
            ".git\\config",
            "..\\.GIT",
            ".g\u{200c}it",
            "\u{feff}.git",
            ".gi\u{202e}t",
            ".GI\u{206a}T",
        ] {
            assert!(fault(name.as_bytes()).is_some(), "{name:?}");
            let below = format!("a/{name}/b");
            assert!(!is_allowed(Path::new(&below)), "{below:?}");
        }
        for name in [
            ".gitignore",
            ".gitattributes",
            ".gitmodules",
            ".github",
            "git",
            "git~2",
            "git~10",
            ".git2",
            ".git-x",
            "x.git",
            "a b",
            "...",
            "a\\b",
            "line\nfeed",
            "\u{202e}cod.exe",
            " .git",
            "é",
            "con",
            "a:b",
        ] {
            assert_eq!(fault(name.as_bytes()), None, "{name:?}");
        }
        assert_eq!(fault(b"\xff\xfe"), None);
        assert_eq!(fault(&[b'x'; 255]), None);
        for name in [b"".as_slice(), b".", b"..", b"a/b", b"/etc", &[b'x'; 256]] {
            assert!(fault(name).is_some());
        }
        assert!(!is_allowed(Path::new("/etc/passwd")));
        assert!(!is_allowed(Path::new("a/../b")));
        assert!(!is_allowed(Path::new(&"a/".repeat(1_100))));
    }
}
