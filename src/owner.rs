//! Whose files are whose, where programs run as users of the system of their own.
//!
//! ```text
//! {workspace}/{client}/{user}/    root:U  0750   U is the user's number: who has that group gets in
//!   project/                      root    0755   read, never written
//!   threads/{thread}/             T:U     0700   T is the thread's: its programs run as T and U
//!   .claude/sessions/{thread}/    T:U     0700
//!   .greenroom/                   root    0700
//! ```
//!
//! Nothing else says who is who: a program runs as the owner of its folder, what greenroom makes in
//! a folder goes to the folder's owner, and another container sees the same numbers on the same
//! disk. Where nobody has a number (Landlock holds programs, or greenroom is not root) each
//! [`Owner::of`] is `None`, and nothing is given to anybody.
//!
//! The numbers lie where neither people, packages, systemd nor containers' user namespaces have
//! theirs.

use std::{
    fs::{self, DirBuilder, Metadata},
    io,
    os::{
        fd::AsFd,
        unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _, fchown, lchown},
    },
    path::{Path, PathBuf},
};

use sha2::{Digest, Sha256};

/// Numbers of users, of threads, and of runs that have no thread: 2^26 each.
const USERS: u32 = 0x7000_0000;
const THREADS: u32 = 0x7400_0000;
const RUNS: u32 = 0x7800_0000;
const EACH: u32 = 1 << 26;
const END: u32 = RUNS + EACH;

/// A uid and a gid, both of the numbers that greenroom gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    uid: u32,
    gid: u32,
}

impl Owner {
    /// Owns nothing: for programs that need no file of anybody's.
    pub const NOBODY: Self = Self { uid: END, gid: END };

    /// The owner of a folder or file, if greenroom gave it one. A link is not followed.
    pub fn of(path: &Path) -> Option<Self> {
        Self::in_metadata(&fs::symlink_metadata(path).ok()?)
    }

    /// The same of what is open.
    pub fn in_metadata(metadata: &Metadata) -> Option<Self> {
        Self::new(metadata.uid(), metadata.gid())
    }

    /// `None` for numbers that greenroom does not give.
    pub fn new(uid: u32, gid: u32) -> Option<Self> {
        let given = USERS..END;
        (given.contains(&uid) && given.contains(&gid)).then_some(Self { uid, gid })
    }

    /// What belongs to a user's threads together, from the user's folder, which has the number as
    /// its group.
    pub fn of_user(folder: &Path) -> Option<Self> {
        let gid = fs::symlink_metadata(folder).ok()?.gid();
        Self::new(gid, gid)
    }

    /// For one run that has no thread.
    pub fn of_run() -> Self {
        let id = uuid::Uuid::new_v4();
        let number = RUNS + in_range(id.as_bytes());
        Self {
            uid: number,
            gid: number,
        }
    }

    /// Of a user whose name this is, another than those that are taken.
    pub fn new_user(name: &str, taken: impl Fn(u32) -> bool) -> Self {
        let number = free(USERS, name, taken);
        Self {
            uid: number,
            gid: number,
        }
    }

    /// Of a thread of this user.
    pub fn new_thread(self, name: &str, taken: impl Fn(u32) -> bool) -> Self {
        Self {
            uid: free(THREADS, name, taken),
            gid: self.gid,
        }
    }

    pub fn uid(self) -> u32 {
        self.uid
    }

    pub fn gid(self) -> u32 {
        self.gid
    }

    /// Gives it what stands at `path`, which nobody but us can have put there. A link is not
    /// followed.
    pub fn take(self, path: &Path) -> io::Result<()> {
        lchown(path, Some(self.uid), Some(self.gid))
    }

    /// The same of what is open.
    pub fn take_open(self, file: impl AsFd) -> io::Result<()> {
        fchown(file, Some(self.uid), Some(self.gid))
    }
}

/// A place in a range, the same for the same name for ever.
fn in_range(name: &[u8]) -> u32 {
    let digest = Sha256::digest(name);
    let start = digest.first_chunk().expect("a digest has 32 bytes");
    u32::from_be_bytes(*start) % EACH
}

fn free(range: u32, name: &str, taken: impl Fn(u32) -> bool) -> u32 {
    let first = in_range(name.as_bytes());
    (0..EACH)
        .map(|step| range + (first + step) % EACH)
        .find(|number| !taken(*number))
        .expect("no disk holds 2^26 folders side by side")
}

/// Makes a folder, closed to everybody but its owner, and gives it away. Parents that are made with
/// it are ours, and where there is an owner he gets through.
pub fn make_folder(path: &Path, owner: Option<Owner>) -> io::Result<()> {
    if let Some(parent) = path.parent() {
        let mode = owner.map_or(0o700, |_| 0o711);
        DirBuilder::new()
            .recursive(true)
            .mode(mode)
            .create(parent)?;
    }
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => {}
        made => made?,
    }
    owner.map_or(Ok(()), |owner| owner.take(path))
}

/// Lets everybody through a folder of ours, and nobody look into it.
pub fn let_pass(folder: &Path) -> io::Result<()> {
    let mode = fs::symlink_metadata(folder)?.permissions().mode();
    match mode & 0o011 {
        0o011 => Ok(()),
        _ => fs::set_permissions(folder, fs::Permissions::from_mode(mode & 0o7777 | 0o011)),
    }
}

/// Does everybody get through all folders above this path?
pub fn is_passable(path: &Path) -> bool {
    path.ancestors().skip(1).all(|folder| {
        // A path that begins with a name ends in one that is empty.
        folder.as_os_str().is_empty()
            || fs::metadata(folder).is_ok_and(|found| found.permissions().mode() & 0o001 != 0)
    })
}

/// Gives a whole tree to an owner, or back to root. Its top goes last: as long as that is another's
/// the work is not done.
///
/// Only folders, and files that have one name: one with more may be somebody else's, under a second
/// name that was planted here (and is a file of a master where it is of `node_modules`).
///
/// # Errors
/// The disk's; what vanishes meanwhile is none.
pub fn take_over(top: &Path, owner: Option<Owner>) -> io::Result<()> {
    let (uid, gid) = owner.map_or((0, 0), |owner| (owner.uid, owner.gid));
    let is_gone = |error: &io::Error| error.kind() == io::ErrorKind::NotFound;
    let mut folders: Vec<PathBuf> = vec![top.to_owned()];
    while let Some(folder) = folders.pop() {
        let entries = match fs::read_dir(&folder) {
            Err(error) if is_gone(&error) => continue,
            entries => entries?,
        };
        for entry in entries {
            let path = entry?.path();
            let found = match fs::symlink_metadata(&path) {
                Err(error) if is_gone(&error) => continue,
                found => found?,
            };
            let is_folder = found.is_dir();
            let is_its = (found.uid(), found.gid()) == (uid, gid);
            if !is_its && (is_folder || found.nlink() == 1) {
                match lchown(&path, Some(uid), Some(gid)) {
                    Err(error) if is_gone(&error) => {}
                    given => given?,
                }
            }
            if is_folder {
                folders.push(path);
            }
        }
    }
    lchown(top, Some(uid), Some(gid))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_numbers_of_their_own_and_keep_them() {
        let none = |_| false;
        let alice = Owner::new_user("acme/alice", none);
        assert_eq!(alice, Owner::new_user("acme/alice", none));
        assert_ne!(alice, Owner::new_user("acme/bob", none));
        let main = alice.new_thread("acme/alice/main", none);
        assert_eq!(main.gid(), alice.gid());
        assert!((THREADS..RUNS).contains(&main.uid()) && (USERS..THREADS).contains(&alice.gid()));
        // Whoever comes second takes the next one.
        let second = alice.new_thread("acme/alice/main", |number| number == main.uid());
        assert_eq!(second.uid(), THREADS + (main.uid() - THREADS + 1) % EACH);
        assert_ne!(Owner::of_run(), Owner::of_run());
        for owner in [alice, main, Owner::of_run()] {
            assert_eq!(Owner::new(owner.uid(), owner.gid()), Some(owner));
        }
    }

    #[test]
    fn nobody_else_is_an_owner() {
        for (uid, gid) in [(0, 0), (1000, 1000), (USERS, 0), (0, USERS), (END, END)] {
            assert_eq!(Owner::new(uid, gid), None);
        }
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(Owner::of(folder.path()), None);
        assert_eq!(Owner::of_user(&folder.path().join("none")), None);
    }

    #[test]
    fn everybody_gets_through_and_nobody_looks() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("a/b");
        fs::create_dir_all(&folder).unwrap();
        let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
        fs::set_permissions(root.path(), fs::Permissions::from_mode(0o700)).unwrap();
        assert!(!is_passable(&folder));
        let_pass(root.path()).unwrap();
        assert_eq!(mode(root.path()), 0o711);
        assert_eq!(is_passable(&folder), is_passable(root.path()));
        make_folder(&folder.join("mine"), None).unwrap();
        make_folder(&folder.join("mine"), None).unwrap();
        assert_eq!(mode(&folder.join("mine")), 0o700);
    }

    #[test]
    fn a_tree_is_taken_over_but_for_what_others_may_have() {
        if !is_root() {
            eprintln!("skipped: only root gives files away");
            return;
        }
        let root = tempfile::tempdir().unwrap();
        let at = |path: &str| root.path().join(path);
        fs::create_dir_all(at("site/src")).unwrap();
        fs::write(at("secret"), "x").unwrap();
        fs::write(at("site/src/page"), "x").unwrap();
        fs::hard_link(at("secret"), at("site/src/planted")).unwrap();
        std::os::unix::fs::symlink(at("secret"), at("site/link")).unwrap();
        let owner = Owner::new_user("a", |_| false);
        take_over(&at("site"), Some(owner)).unwrap();
        for given in ["site", "site/src", "site/src/page", "site/link"] {
            assert_eq!(Owner::of(&at(given)), Some(owner), "{given}");
        }
        assert_eq!(Owner::of(&at("secret")), None);
        take_over(&at("site"), None).unwrap();
        assert_eq!(Owner::of(&at("site/src/page")), None);
    }

    fn is_root() -> bool {
        fs::metadata("/proc/self").is_ok_and(|own| own.uid() == 0)
    }
}
