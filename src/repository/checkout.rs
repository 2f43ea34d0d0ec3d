//! The one place that writes a tree's files to disk.

use std::path::{Path, PathBuf};

use git2::{Repository, Tree, build::CheckoutBuilder};

/// Where the files go and whether git follows them there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Target<'a> {
    /// The folder becomes the repository's working directory; its index is written to match.
    Worktree(&'a Path),
    /// A plain copy, which git knows nothing of.
    Copy(&'a Path),
}

/// Writes all files of `tree` into a folder that holds none (a `.git` at most) and is ours alone.
pub(super) fn fill(
    repo: &Repository,
    tree: &Tree<'_>,
    target: Target<'_>,
) -> Result<(), git2::Error> {
    let mut options = CheckoutBuilder::new();
    // "Force" overwrites nothing in an empty folder; the safe way would compare with HEAD first
    // and take the files that are missing for deleted on purpose.
    options.force();
    match target {
        Target::Worktree(folder) => {
            repo.set_workdir(folder, false)?;
            let mut index = repo.index()?;
            index.clear()?;
            index.write()?;
        }
        Target::Copy(folder) => {
            options.target_dir(folder).update_index(false);
        }
    }
    repo.checkout_tree(tree.as_object(), Some(&mut options))
}

/// Writes some files of `tree`, as git would (line endings, modes, symlinks), into a folder of ours.
pub(super) fn fill_some<'p>(
    repo: &Repository,
    tree: &Tree<'_>,
    paths: impl Iterator<Item = &'p PathBuf>,
    folder: &Path,
) -> Result<(), git2::Error> {
    let mut options = CheckoutBuilder::new();
    options
        .force()
        .target_dir(folder)
        .update_index(false)
        .disable_pathspec_match(true);
    let mut is_empty = true;
    for path in paths {
        options.path(path.as_path());
        is_empty = false;
    }
    // No path at all would mean every path.
    if is_empty {
        return Ok(());
    }
    repo.checkout_tree(tree.as_object(), Some(&mut options))
}
