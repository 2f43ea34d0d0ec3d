//! New trees from old ones along the changed paths: a commit costs what changed, not what exists.
//!
//! libgit2's own tree updater is not used, because it refuses to put a folder where a file was
//! (or the reverse) and leaves an empty tree where the last file of a folder went; nor its builder,
//! which writes each tree before the next one begins (see `objects`).

use std::collections::BTreeMap;

use git2::{ObjectType, Oid, Repository, Tree};

use super::{Operation as _, Result, objects::NewObjects};

/// What a path shall be: gone, or an object with a mode.
pub(super) type Edits = BTreeMap<Vec<u8>, Edit>;
type Edit = Option<(Oid, i32)>;

const TREE_MODE: i32 = 0o040000;

/// The tree that `base` becomes with `edits` (paths with `/`, relative to it), among the new objects.
pub(super) fn edit(
    repo: &Repository,
    new: &mut NewObjects,
    base: Option<&Tree<'_>>,
    edits: &Edits,
) -> Result<Oid> {
    let edits: Vec<_> = edits
        .iter()
        .map(|(path, edit)| (path.as_slice(), *edit))
        .collect();
    match edit_folder(repo, new, base, &edits)? {
        Some(id) => Ok(id),
        None => new.add(ObjectType::Tree, Vec::new()),
    }
}

/// As [`edit`] for paths below one folder; `None` if nothing is left in it.
fn edit_folder(
    repo: &Repository,
    new: &mut NewObjects,
    base: Option<&Tree<'_>>,
    edits: &[(&[u8], Edit)],
) -> Result<Option<Oid>> {
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
    let mut entries: BTreeMap<Vec<u8>, (Oid, i32)> = BTreeMap::new();
    for entry in base.into_iter().flat_map(Tree::iter) {
        entries.insert(
            entry.name_bytes().to_vec(),
            (entry.id(), entry.filemode_raw()),
        );
    }
    let is_tree = |entry: &(Oid, i32)| entry.1 & 0o170_000 == TREE_MODE;
    for (&name, edit) in &here {
        // "No file of this name" says nothing against a folder of this name.
        if edit.is_none() && entries.get(name).is_some_and(|entry| !is_tree(entry)) {
            entries.remove(name);
        }
    }
    for (name, edits) in below {
        let folder = match entries.get(name).filter(|entry| is_tree(entry)) {
            Some((id, _)) => Some(repo.find_tree(*id).during("read a folder's tree")?),
            None => None,
        };
        match edit_folder(repo, new, folder.as_ref(), &edits)? {
            Some(id) => {
                entries.insert(name.to_vec(), (id, TREE_MODE));
            }
            None if folder.is_some() => {
                entries.remove(name);
            }
            None => {}
        }
    }
    for (name, edit) in here {
        if let Some(object) = edit {
            entries.insert(name.to_vec(), object);
        }
    }
    if entries.is_empty() {
        return Ok(None);
    }
    let mut entries: Vec<_> = entries.into_iter().collect();
    // git's order: a folder as if its name ended with a slash.
    entries.sort_by_cached_key(|(name, entry)| {
        let end: &[u8] = if is_tree(entry) { b"/" } else { b"" };
        [name, end].concat()
    });
    let mut text = Vec::new();
    for (name, (id, mode)) in entries {
        text.extend_from_slice(format!("{mode:o} ").as_bytes());
        text.extend_from_slice(&name);
        text.push(0);
        text.extend_from_slice(id.as_bytes());
    }
    new.add(ObjectType::Tree, text).map(Some)
}
