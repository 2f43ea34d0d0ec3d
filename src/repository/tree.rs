//! New trees from old ones along the changed paths: a commit costs what changed, not what exists.
//!
//! libgit2's own tree updater is not used, because it refuses to put a folder where a file was
//! (or the reverse) and leaves an empty tree where the last file of a folder went.

use std::collections::BTreeMap;

use git2::{ObjectType, Oid, Repository, Tree};

/// What a path shall be: gone, or an object with a mode.
pub(super) type Edits = BTreeMap<Vec<u8>, Edit>;
type Edit = Option<(Oid, i32)>;

const TREE_MODE: i32 = 0o040000;

/// Writes the tree that `base` becomes with `edits` (paths with `/`, relative to it).
pub(super) fn edit(
    repo: &Repository,
    base: Option<&Tree<'_>>,
    edits: &Edits,
) -> Result<Oid, git2::Error> {
    let edits: Vec<_> = edits
        .iter()
        .map(|(path, edit)| (path.as_slice(), *edit))
        .collect();
    match edit_folder(repo, base, &edits)? {
        Some(id) => Ok(id),
        None => repo.treebuilder(None)?.write(),
    }
}

/// As [`edit`] for paths below one folder; `None` if nothing is left in it.
fn edit_folder(
    repo: &Repository,
    base: Option<&Tree<'_>>,
    edits: &[(&[u8], Edit)],
) -> Result<Option<Oid>, git2::Error> {
    let mut here = BTreeMap::<&[u8], Edit>::new();
    let mut below = BTreeMap::<&[u8], Vec<_>>::new();
    for &(path, edit) in edits {
        match path.iter().position(|&b| b == b'/') {
            Some(at) => below
                .entry(&path[..at])
                .or_default()
                .push((&path[at + 1..], edit)),
            None => {
                here.insert(path, edit);
            }
        }
    }
    let mut builder = repo.treebuilder(base)?;
    let existing = |name: &[u8]| base.and_then(|tree| tree.get_name_bytes(name));
    for (&name, edit) in &here {
        let is_folder = existing(name).is_some_and(|e| e.kind() == Some(ObjectType::Tree));
        // "No file of this name" says nothing against a folder of this name.
        if edit.is_none() && !is_folder && existing(name).is_some() {
            builder.remove(name)?;
        }
    }
    for (name, edits) in below {
        let folder = match existing(name) {
            Some(entry) if entry.kind() == Some(ObjectType::Tree) => {
                Some(repo.find_tree(entry.id())?)
            }
            _ => None,
        };
        match edit_folder(repo, folder.as_ref(), &edits)? {
            Some(id) => {
                builder.insert(name, id, TREE_MODE)?;
            }
            None if folder.is_some() => builder.remove(name)?,
            None => {}
        }
    }
    for (name, edit) in here {
        if let Some((id, mode)) = edit {
            builder.insert(name, id, mode)?;
        }
    }
    if builder.is_empty() {
        Ok(None)
    } else {
        builder.write().map(Some)
    }
}
