//! A site's files as a [`Snapshot`] of its thread has them, and drafts of new contents for some:
//! for what greenroom itself reads and writes in a site, without its agent.
//!
//! Nothing of it goes by the worktree's folder, so that no link leads out of the site.

use std::{
    collections::BTreeMap,
    fmt,
    path::{Component, Path},
};

use git2::{ObjectType, Oid, Repository, Tree};

use super::{
    Operation as _, RepositoryError, Result,
    draft::{Draft, Snapshot},
    gate,
    index::LINK_MODE,
    objects::NewObjects,
    stage::{canonical_mode, in_tree},
    tree, vet,
    worktree::Worktree,
};

/// The regular files of a site: no links, no submodules, no names that are no UTF-8.
pub struct SiteFiles<'r> {
    repo: &'r Repository,
    files: BTreeMap<String, Oid>,
}

impl fmt::Debug for SiteFiles<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SiteFiles")
            .field("files", &self.files.len())
            .finish_non_exhaustive()
    }
}

impl<'r> SiteFiles<'r> {
    fn of(repo: &'r Repository, root: Tree<'r>) -> Result<Self> {
        let mut files = BTreeMap::new();
        let mut folders = vec![(String::new(), root)];
        while let Some((folder, tree)) = folders.pop() {
            for entry in &tree {
                let Ok(name) = str::from_utf8(entry.name_bytes()) else {
                    continue;
                };
                let path = format!("{folder}{name}");
                match entry.kind() {
                    Some(ObjectType::Tree) => {
                        let below = repo.find_tree(entry.id()).during("read a folder")?;
                        folders.push((format!("{path}/"), below));
                    }
                    Some(ObjectType::Blob) if entry.filemode() != LINK => {
                        files.insert(path, entry.id());
                    }
                    _ => {}
                }
            }
        }
        Ok(Self { repo, files })
    }

    /// All of them, in order: relative to the site's root, with `/`.
    pub fn paths(&self) -> impl Iterator<Item = &str> {
        self.files.keys().map(String::as_str)
    }

    /// Is there one of this path?
    pub fn has(&self, path: &str) -> bool {
        self.files.contains_key(path)
    }

    /// Bytes of a file.
    pub fn size(&self, path: &str) -> Option<u64> {
        let store = self.repo.odb().ok()?;
        let (size, _) = store.read_header(*self.files.get(path)?).ok()?;
        Some(size as u64)
    }

    /// What is in a file, as it is committed; `None` also of one with more than `limit` bytes.
    pub fn read(&self, path: &str, limit: u64) -> Option<Vec<u8>> {
        if self.size(path)? > limit {
            return None;
        }
        let blob = self.repo.find_blob(*self.files.get(path)?).ok()?;
        Some(blob.content().to_vec())
    }
}

/// A link's mode, as trees tell it.
const LINK: i32 = LINK_MODE as i32;

impl Worktree {
    /// Has a look at a site's files.
    pub fn look<T>(&self, base: &Snapshot, look: impl FnOnce(&SiteFiles<'_>) -> T) -> Result<T> {
        let repo = self.open()?;
        let tree = repo.find_tree(base.tree_id()).during("read the tree")?;
        Ok(look(&SiteFiles::of(&repo, tree)?))
    }

    /// `base` with these contents (`None`: without the file) at paths relative to the site's root.
    /// They are committed byte for byte, and pass the gate like any other commit.
    ///
    /// # Errors
    /// [`RepositoryError::Unfit`] for a path or a content that cannot be committed;
    /// [`RepositoryError::Conflict`] where a file that is in no commit is in the way.
    pub fn draft_written(
        &self,
        base: &Snapshot,
        files: &[(String, Option<Vec<u8>>)],
    ) -> Result<Draft> {
        let repo = self.open()?;
        let before = repo.find_tree(base.tree_id()).during("read the tree")?;
        let mut edits = tree::Edits::new();
        let mut new = NewObjects::of(&repo);
        for (path, content) in files {
            let unfit = |reason: String| RepositoryError::Unfit {
                path: path.clone(),
                reason,
            };
            if !is_path(path) {
                return Err(unfit("git does not allow a file of this name".into()));
            }
            let present = in_tree(&before, Path::new(path))?;
            let edit = match content {
                None => None,
                Some(content) => {
                    check(&repo, &before, path, content, present).map_err(unfit)?;
                    let id = new.add(ObjectType::Blob, content.clone())?;
                    let mode = present.map_or(0o100_644, |(_, mode)| canonical_mode(mode));
                    let mode = i32::try_from(mode).expect("git's modes have 16 bits");
                    Some((id, mode))
                }
            };
            edits.insert(path.as_bytes().to_vec(), edit);
        }
        let after = tree::edit(&repo, &mut new, Some(&before), &edits)?;
        new.write()?;
        self.draft(&repo, base, after, Vec::new())
    }
}

fn is_path(path: &str) -> bool {
    let at = Path::new(path);
    let is_plain = at
        .components()
        .all(|part| matches!(part, Component::Normal(_)));
    // `a//b`, `a/./b` and `a/` are read as other paths.
    is_plain
        && !path.contains('\0')
        && at.components().count() == path.split('/').count()
        && vet::is_allowed(at)
}

/// Why a content cannot be committed at a path.
fn check(
    repo: &Repository,
    tree: &Tree<'_>,
    path: &str,
    content: &[u8],
    present: Option<(Oid, u32)>,
) -> Result<(), String> {
    let at = Path::new(path);
    if content.len() as u64 > gate::MAX_FILE_BYTES {
        return Err(gate::TOO_LARGE.into());
    }
    let is_file = |entry: &git2::TreeEntry<'_>| entry.kind() == Some(ObjectType::Blob);
    let is_taken = at.ancestors().skip(1).any(|folder| {
        let entry = tree.get_path(folder);
        !folder.as_os_str().is_empty()
            && entry.is_ok_and(|entry| entry.kind() != Some(ObjectType::Tree))
    });
    let is_file = tree.get_path(at).as_ref().map_or(true, is_file);
    if is_taken || !is_file || present.is_some_and(|(_, mode)| mode == LINK_MODE) {
        return Err("something that is no file stands there".into());
    }
    let earlier = present.and_then(|(id, _)| repo.find_blob(id).ok());
    let bad_name = match present {
        Some(_) => None,
        None if gate::packages_folder(at).is_some() => {
            Some("installed packages are not part of the site")
        }
        None => gate::judge_name(at),
    };
    let bad = bad_name
        .map(str::to_owned)
        .or_else(|| gate::judge_content(at, content, earlier.as_ref().map(git2::Blob::content)));
    bad.map_or(Ok(()), Err)
}
