//! A site's files, kept ready for the user's next thread.
//!
//! Writing them is nearly all that a new thread costs: on a local disk the kernel takes its time for
//! each, on a network disk each is some round trips. So they are written once more, ahead, while
//! nobody waits. The next thread has them by a rename, and only what differs by then is written.
//!
//! ```text
//! {git directory}/spare/files/    as a checkout left them
//! {git directory}/spare/index     git's index of them
//! ```
//!
//! A spare is there whole or not at all, and whoever renames it first has it: no lease is needed.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use git2::{DiffFile, FileMode, Repository, Tree};

use super::{
    Operation as _, Result, checkout,
    files::{self, Root},
    index::Index,
};

/// More files than that are better written anew, by several threads.
const MOST_CHANGES: usize = 100;
/// Older leftovers are of a process that was killed.
const LEFT: Duration = Duration::from_secs(60 * 60);

/// The place of a user's spare.
pub(super) struct Spare<'a> {
    git: &'a Path,
}

impl<'a> Spare<'a> {
    /// In this git directory.
    pub(super) fn of(git: &'a Path) -> Self {
        Self { git }
    }

    fn place(&self) -> PathBuf {
        self.git.join("spare")
    }

    /// A name that nobody else has.
    fn aside(&self) -> PathBuf {
        self.git
            .join(format!("spare-{}", uuid::Uuid::now_v7().simple()))
    }

    /// Makes one of `tree`, unless there is one; how old that is, is whoever takes it to look at.
    pub(super) fn make(&self, repo: &Repository, tree: &Tree<'_>) -> Result<()> {
        const WHAT: &str = "keep a worktree ready";
        let place = self.place();
        if files::kind_of(&place).during(WHAT)?.is_some() {
            return Ok(());
        }
        self.sweep();
        let making = Aside(self.aside());
        let folder = making.files();
        fs::create_dir_all(&folder).during(WHAT)?;
        let index = checkout::fill(repo, tree, &folder)?;
        index
            .write(&making.index(), tree.id(), &BTreeMap::new())
            .during(WHAT)?;
        match fs::rename(&making.0, &place) {
            // Another container was quicker.
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => Ok(()),
            renamed => renamed.during(WHAT),
        }
    }

    /// Removes what killed processes have left.
    fn sweep(&self) {
        let entries = fs::read_dir(self.git).into_iter().flatten().flatten();
        for entry in entries {
            let is_ours = entry.file_name().as_encoded_bytes().starts_with(b"spare-");
            let age = || {
                let changed = entry.metadata().and_then(|about| about.modified()).ok()?;
                SystemTime::now().duration_since(changed).ok()
            };
            if is_ours && age().is_some_and(|age| age > LEFT) {
                files::remove_all(&entry.path()).ok();
            }
        }
    }

    /// Moves the spare's files to `folder`, where nothing is; `None` if there is none.
    pub(super) fn take(&self, folder: &Path) -> io::Result<Option<Taken>> {
        let taken = Taken(Aside(self.aside()));
        match fs::rename(self.place(), &taken.0.0) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            renamed => renamed?,
        }
        let files = taken.0.files();
        if !files::kind_of(&files)?.is_some_and(|kind| kind.is_dir()) {
            return Ok(None);
        }
        fs::rename(files, folder)?;
        Ok(Some(taken))
    }
}

/// A folder of a name of its own, removed with what is still in it.
struct Aside(PathBuf);

impl Aside {
    fn files(&self) -> PathBuf {
        self.0.join("files")
    }

    fn index(&self) -> PathBuf {
        self.0.join("index")
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        if let Err(error) = files::remove_all(&self.0) {
            tracing::warn!(%error, "what was kept ready could not be removed");
        }
    }
}

/// A spare whose files are where they are needed.
pub(super) struct Taken(Aside);

impl Taken {
    /// Makes the files in `folder` those of `tree`. `None` if they are too different from it, or
    /// what is known of them cannot be used: then they are of no use.
    pub(super) fn renew(
        self,
        repo: &Repository,
        tree: &Tree<'_>,
        folder: &Path,
    ) -> Result<Option<Index>> {
        const WHAT: &str = "use the worktree that was kept ready";
        let file = self.0.index();
        let Some(known) = Index::tree_of(&file) else {
            return Ok(None);
        };
        if known != tree.id() {
            // Packing may have removed what no branch has any more.
            let Ok(known) = repo.find_tree(known) else {
                return Ok(None);
            };
            let Some(changes) = changes(repo, &known, tree).during(WHAT)? else {
                return Ok(None);
            };
            let root = Root::open(folder).during(WHAT)?;
            for path in &changes.gone {
                root.remove(path).during(WHAT)?;
                root.prune(path).during(WHAT)?;
            }
            checkout::fill_some(repo, tree, changes.new.iter(), folder).during(WHAT)?;
        }
        let (index, damage) = Index::load(&file, repo, tree).during(WHAT)?;
        Ok(damage.is_none().then_some(index))
    }
}

#[derive(Default)]
struct Changes {
    gone: Vec<PathBuf>,
    new: Vec<PathBuf>,
}

/// What leads from one tree's files to another's; `None` if that is more than it is worth, or says
/// of other files how they are written.
fn changes(
    repo: &Repository,
    from: &Tree<'_>,
    to: &Tree<'_>,
) -> Result<Option<Changes>, git2::Error> {
    let diff = repo.diff_tree_to_tree(Some(from), Some(to), None)?;
    if diff.deltas().len() > MOST_CHANGES {
        return Ok(None);
    }
    let mut changes = Changes::default();
    for delta in diff.deltas() {
        let sides = [
            (delta.old_file(), &mut changes.gone),
            (delta.new_file(), &mut changes.new),
        ];
        for (file, paths) in sides {
            if !file.exists() {
                continue;
            }
            match plain_path(&file) {
                Some(path) => paths.push(path),
                None => return Ok(None),
            }
        }
    }
    Ok(Some(changes))
}

/// The path of what is written like any other file.
fn plain_path(file: &DiffFile<'_>) -> Option<PathBuf> {
    let path = file.path()?;
    let is_plain = file.mode() != FileMode::Commit && !path.ends_with(".gitattributes");
    is_plain.then(|| path.to_owned())
}
