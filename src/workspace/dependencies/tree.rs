//! Trees of files: masters made read-only, hard links of them, and the change of one
//! `node_modules` for another. All blocking. No symlink is followed.

use std::{
    collections::HashSet,
    fs,
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, lchown, symlink},
    path::{Path, PathBuf},
};

use sha2::{Digest, Sha256};

use super::{archive, inventory::Inventory};
use crate::owner::{Owner, make_folder};

const MODULES: &str = "node_modules";
/// In an attached tree: the key that it was made for. A file of the tree's own, never a link.
const MARKER: &str = ".greenroom-key";
/// In a master: what its modules are made of.
const INVENTORY: &str = "inventory.json";
/// In a master whose site has its modules in git.
const COMMITTED: &str = "committed";
/// Where a `node_modules` that isn't ours is kept, inside the one that replaces it.
const ASIDE: &str = ".before-greenroom";
/// Beginning of the names of trees that are being made or removed; git is told to
/// leave such names out.
const TEMPORARY: &str = ".node_modules-";

/// What could not be done.
#[derive(Debug)]
pub(super) struct AttachError {
    pub(super) what: &'static str,
    pub(super) source: io::Error,
}

fn failed(what: &'static str) -> impl Fn(io::Error) -> AttachError {
    move |source| AttachError { what, source }
}

/// Writes a file that isn't there before: whatever stood under the name is replaced.
pub(super) fn write_fresh(path: &Path, bytes: &[u8]) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o644)
        .open(path)?;
    file.write_all(bytes)
}

/// Removes a tree, also one that was made read-only; what can't be removed is logged and left.
pub(super) fn remove(root: &Path) {
    if let Err(error) = fs::remove_dir_all(root)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(%error, "a folder of the dependency cache was not removed");
    }
}

/// Is there a complete master, as it was made? What is there and is not is removed.
pub(super) fn is_whole(master: &Path, key: &str) -> bool {
    if is_committed(master) {
        return true;
    }
    let inventory = inventory_of(master);
    if inventory.is_some_and(|all| all.key == key && all.is_of(&master.join(MODULES))) {
        return true;
    }
    if master.exists() {
        tracing::warn!("installed dependencies were changed in place: they are made anew");
        remove(master);
    }
    false
}

fn inventory_of(master: &Path) -> Option<Inventory> {
    serde_json::from_slice(&fs::read(master.join(INVENTORY)).ok()?).ok()
}

/// Makes a master of an archive; false where there is none, or it is broken or another's.
pub(super) fn restore(
    master: &Path,
    archive: Option<&Path>,
    key: &str,
) -> Result<bool, AttachError> {
    let Some(archive) = archive.filter(|archive| archive.exists()) else {
        return Ok(false);
    };
    let fresh = beside(master)?;
    let unpacked = archive::restore(archive, key, &fresh.join(MODULES));
    let kept = unpacked.and_then(|inventory| keep(&fresh, master, &inventory));
    if let Err(error) = &kept {
        remove(&fresh);
        tracing::warn!(%error, "an archive of dependencies was of no use");
        // It is made anew after the installation.
        fs::remove_file(archive).ok();
    }
    Ok(kept.is_ok())
}

/// Writes a master's archive where there is none. That it could not costs the next container time.
pub(super) fn pack(master: &Path, key: &str, archive: &Path) {
    // Worktrees have links to its files already, and may have changed one in place.
    if archive.exists() || !is_whole(master, key) {
        return;
    }
    if let Some(inventory) = inventory_of(master)
        && let Err(error) = archive::pack(&master.join(MODULES), &inventory, archive)
    {
        tracing::warn!(%error, "the dependencies are not kept for other containers");
    }
}

/// A new folder beside a master, to become it.
fn beside(master: &Path) -> Result<PathBuf, AttachError> {
    let parent = master.parent().expect("masters have a folder");
    fs::create_dir_all(parent).map_err(failed("make the dependency cache"))?;
    let fresh = parent.join(format!(".new-{}", uuid::Uuid::new_v4().simple()));
    fs::create_dir(&fresh).map_err(failed("make the dependency cache"))?;
    Ok(fresh)
}

/// Gives a complete tree its inventory and its name.
fn keep(fresh: &Path, master: &Path, inventory: &Inventory) -> io::Result<()> {
    fs::write(fresh.join(INVENTORY), serde_json::to_vec(inventory)?)?;
    take_name(fresh, master)
}

fn take_name(fresh: &Path, master: &Path) -> io::Result<()> {
    match fs::rename(fresh, master) {
        // Another process of ours was quicker: its tree is as good.
        Err(_) if master.is_dir() => {
            remove(fresh);
            Ok(())
        }
        other => other,
    }
}

/// Has the site its modules in git?
pub(super) fn is_committed(master: &Path) -> bool {
    master.join(COMMITTED).exists()
}

/// Makes the installed tree a master. It appears under its name complete or not at all.
pub(super) fn settle(
    site: &Path,
    master: &Path,
    key: &str,
    committed: bool,
) -> Result<(), AttachError> {
    let fresh = beside(master)?;
    let settled = (|| {
        if committed {
            fs::write(fresh.join(COMMITTED), b"")?;
            return take_name(&fresh, master);
        }
        let modules = site.join(MODULES);
        // A site with scripts alone has none.
        fs::create_dir_all(&modules)?;
        // Vite's cache belongs to one worktree; a marker of a package's making is no one's.
        remove(&modules.join(".vite"));
        fs::remove_file(modules.join(MARKER)).ok();
        make_read_only(&modules)?;
        let inventory = Inventory::take(&modules, key)?;
        fs::rename(&modules, fresh.join(MODULES))?;
        keep(&fresh, master, &inventory)
    })();
    settled.map_err(|source| {
        remove(&fresh);
        AttachError {
            what: "keep the installed dependencies",
            source,
        }
    })
}

/// Files lose their write permission: they will be shared by every worktree. Folders keep it,
/// they are copied. What an installer that is a user of its own made becomes ours.
fn make_read_only(root: &Path) -> io::Result<()> {
    let installer = Owner::of(root);
    let own = |path: &Path, is_folder: bool| {
        if installer.is_some() {
            lchown(path, Some(0), Some(0))?;
            if is_folder {
                fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
            }
        }
        Ok::<_, io::Error>(())
    };
    own(root, true)?;
    let mut inodes = HashSet::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder)? {
            let entry = entry?;
            let (path, found) = (entry.path(), entry.metadata()?);
            // One file may have several names: packages link their programs.
            let is_known = !inodes.insert((found.dev(), found.ino()));
            if found.is_file() && !is_known && Owner::in_metadata(&found) != installer {
                return Err(io::Error::other("a file among them is somebody else's"));
            }
            own(&path, found.is_dir())?;
            if found.is_dir() {
                folders.push(path);
            } else if found.is_file() {
                let executable = found.permissions().mode() & 0o111 != 0;
                let mode = if executable { 0o555 } else { 0o444 };
                fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
            }
        }
    }
    Ok(())
}

/// The state of a worktree whose modules were made for `key`: the folder behind the symlink, if
/// it is one. Nothing if they were made for another key or by somebody else.
pub(super) fn current(worktree: &Path, key: &str) -> Option<Option<PathBuf>> {
    let modules = worktree.join(MODULES);
    let kind = modules.symlink_metadata().ok()?;
    let marker = modules.join(MARKER);
    let is_marked = marker
        .symlink_metadata()
        .is_ok_and(|m| m.is_file() && m.len() == key.len() as u64)
        && fs::read(&marker).is_ok_and(|text| text == key.as_bytes());
    if !is_marked {
        return None;
    }
    if kind.is_symlink() {
        Some(Some(fs::read_link(modules).ok()?))
    } else {
        Some(None)
    }
}

/// The folder in the cache that is behind a worktree's `node_modules` where that is a symlink: of
/// this worktree alone, because Vite keeps its own cache in it.
pub fn linked_folder(cache: &Path, worktree: &Path) -> PathBuf {
    let digest = Sha256::digest(worktree.as_os_str().as_encoded_bytes());
    cache.join("threads").join(hex::encode(&digest[..16]))
}

/// Gives the worktree the master's tree; answers with the folder behind the symlink, where links
/// can't reach the worktree.
pub(super) fn attach(
    master: &Path,
    worktree: &Path,
    cache: &Path,
    key: &str,
) -> Result<Option<PathBuf>, AttachError> {
    remove_leftovers(worktree);
    let source = master.join(MODULES);
    let fresh = worktree.join(temporary_name());
    let owner = Owner::of(worktree);
    match link_tree(&source, &fresh, key, owner) {
        Ok(()) => {
            replace(worktree, &fresh)?;
            return Ok(None);
        }
        Err(error) => {
            remove(&fresh);
            if error.kind() != io::ErrorKind::CrossesDevices {
                return Err(AttachError {
                    what: "link the dependencies",
                    source: error,
                });
            }
        }
    }
    let folder = linked_folder(cache, worktree);
    make_folder(&folder, owner).map_err(failed("make the thread's dependency folder"))?;
    let beside = folder.join(temporary_name());
    link_tree(&source, &beside, key, owner).map_err(failed("link the dependencies"))?;
    let target = folder.join(MODULES);
    swap(&target, &beside).map_err(failed("replace the dependencies"))?;
    symlink(&target, &fresh).map_err(failed("link to the dependencies"))?;
    replace(worktree, &fresh)?;
    Ok(Some(target))
}

fn temporary_name() -> String {
    format!("{TEMPORARY}{}", uuid::Uuid::new_v4().simple())
}

/// What an attach that was killed left behind.
fn remove_leftovers(worktree: &Path) {
    for entry in fs::read_dir(worktree).into_iter().flatten().flatten() {
        if entry
            .file_name()
            .to_str()
            .is_some_and(|name| name.starts_with(TEMPORARY))
        {
            remove_any(&entry.path());
        }
    }
}

fn remove_any(path: &Path) {
    if path.symlink_metadata().is_ok_and(|kind| kind.is_dir()) {
        remove(path);
    } else {
        fs::remove_file(path).ok();
    }
}

/// Puts `fresh` in the place of the worktree's modules. A folder that we made is removed, one
/// that somebody else made is kept aside, inside the new one.
fn replace(worktree: &Path, fresh: &Path) -> Result<(), AttachError> {
    let modules = worktree.join(MODULES);
    let old = worktree.join(temporary_name());
    let is_ours = match modules.symlink_metadata() {
        Err(_) => None,
        Ok(kind) => {
            let marked = modules
                .join(MARKER)
                .symlink_metadata()
                .is_ok_and(|m| m.is_file());
            fs::rename(&modules, &old).map_err(failed("move the old dependencies away"))?;
            Some(marked || kind.is_symlink())
        }
    };
    if let Err(source) = fs::rename(fresh, &modules) {
        if is_ours.is_some() {
            fs::rename(&old, &modules).ok();
        }
        remove_any(fresh);
        return Err(AttachError {
            what: "put the dependencies into place",
            source,
        });
    }
    match is_ours {
        Some(true) => remove_any(&old),
        Some(false) => {
            // The new one may be on another file system: then the old one has no way to go and
            // stays under its temporary name until the next attach.
            fs::rename(&old, modules.join(ASIDE)).ok();
        }
        None => {}
    }
    Ok(())
}

/// Exchanges a folder of ours for a fresh one.
fn swap(target: &Path, fresh: &Path) -> io::Result<()> {
    let old = target.with_file_name(temporary_name());
    match fs::rename(target, &old) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    fs::rename(fresh, target)?;
    remove_any(&old);
    Ok(())
}

/// Copies folders and symlinks, links files. Two files are never links: npm rewrites its own
/// `.package-lock.json` in place, which would reach every worktree; and our marker. Folders and
/// copies are the owner's in the end: nobody changes them under our hands.
fn link_tree(source: &Path, target: &Path, key: &str, owner: Option<Owner>) -> io::Result<()> {
    let folder = |path: &Path| fs::DirBuilder::new().mode(0o755).create(path);
    folder(target)?;
    let (mut folders, mut next) = (vec![PathBuf::new()], 0);
    while let Some(below) = folders.get(next).cloned() {
        next += 1;
        for entry in fs::read_dir(source.join(&below))? {
            let entry = entry?;
            let name = below.join(entry.file_name());
            let (from, to) = (entry.path(), target.join(&name));
            let kind = entry.file_type()?;
            if kind.is_dir() {
                folder(&to)?;
                folders.push(name);
            } else if kind.is_symlink() {
                symlink(fs::read_link(&from)?, &to)?;
            } else if name.as_os_str() == ".package-lock.json" {
                write_fresh(&to, &fs::read(&from)?)?;
                owner.map_or(Ok(()), |owner| owner.take(&to))?;
            } else if kind.is_file() {
                link_file(&from, &to)?;
            }
        }
    }
    write_fresh(&target.join(MARKER), key.as_bytes())?;
    // The deepest first: whoever owns a folder can move what is in it.
    for folder in folders.iter().rev() {
        owner.map_or(Ok(()), |owner| owner.take(&target.join(folder)))?;
    }
    Ok(())
}

fn link_file(from: &Path, to: &Path) -> io::Result<()> {
    match fs::hard_link(from, to) {
        // A file has only so many names (65,000 on ext4).
        Err(error) if error.kind() == io::ErrorKind::TooManyLinks => fs::copy(from, to).map(|_| ()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "0123456789abcdef";

    struct Disk {
        root: tempfile::TempDir,
    }

    impl Disk {
        fn new() -> Self {
            let disk = Self {
                root: tempfile::tempdir().unwrap(),
            };
            let modules = disk.at("site/node_modules");
            for folder in [".bin", ".vite/deps", "pkg/lib"] {
                fs::create_dir_all(modules.join(folder)).unwrap();
            }
            fs::write(modules.join("pkg/lib/a.js"), "a").unwrap();
            fs::write(modules.join("pkg/cli.js"), "#!").unwrap();
            fs::set_permissions(
                modules.join("pkg/cli.js"),
                fs::Permissions::from_mode(0o755),
            )
            .unwrap();
            symlink("../pkg/cli.js", modules.join(".bin/cli")).unwrap();
            symlink("/etc/passwd", modules.join("pkg/out")).unwrap();
            fs::write(modules.join(".package-lock.json"), "{}").unwrap();
            fs::create_dir(disk.at("worktree")).unwrap();
            settle(&disk.at("site"), &disk.at("cache/masters/k"), KEY, false).unwrap();
            disk
        }

        fn at(&self, path: &str) -> PathBuf {
            self.root.path().join(path)
        }

        fn attach(&self, worktree: &Path) -> Option<PathBuf> {
            attach(
                &self.at("cache/masters/k"),
                worktree,
                &self.at("cache"),
                KEY,
            )
            .unwrap()
        }
    }

    fn inode(path: &Path) -> u64 {
        path.symlink_metadata().unwrap().ino()
    }

    #[test]
    fn a_worktree_gets_links_and_copies_of_what_is_written_in_place() {
        let disk = Disk::new();
        let master = disk.at("cache/masters/k/node_modules");
        assert!(!master.join(".vite").exists());
        let mode = |name: &str| master.join(name).metadata().unwrap().mode() & 0o777;
        assert_eq!((mode("pkg/lib/a.js"), mode("pkg/cli.js")), (0o444, 0o555));

        assert_eq!(disk.attach(&disk.at("worktree")), None);
        let modules = disk.at("worktree/node_modules");
        assert_eq!(
            inode(&modules.join("pkg/lib/a.js")),
            inode(&master.join("pkg/lib/a.js"))
        );
        assert_ne!(
            inode(&modules.join(".package-lock.json")),
            inode(&master.join(".package-lock.json"))
        );
        assert_eq!(
            fs::read_link(modules.join(".bin/cli")).unwrap(),
            Path::new("../pkg/cli.js")
        );
        assert_eq!(
            fs::read_link(modules.join("pkg/out")).unwrap(),
            Path::new("/etc/passwd")
        );
        assert!(
            !master.join(MARKER).exists(),
            "the marker is the tree's own"
        );
        assert_eq!(current(&disk.at("worktree"), KEY), Some(None));
        assert_eq!(current(&disk.at("worktree"), "another key here"), None);
        let names: Vec<_> = fs::read_dir(disk.at("worktree"))
            .unwrap()
            .flatten()
            .collect();
        assert_eq!(names.len(), 1, "{names:?}");
    }

    #[test]
    fn modules_of_somebody_else_are_kept_aside_and_ours_are_replaced() {
        let disk = Disk::new();
        let modules = disk.at("worktree/node_modules");
        fs::create_dir(&modules).unwrap();
        fs::write(modules.join("mine"), "x").unwrap();
        fs::create_dir(disk.at("worktree/.node_modules-left")).unwrap();
        disk.attach(&disk.at("worktree"));
        assert!(modules.join(ASIDE).join("mine").exists());
        assert!(!modules.join("mine").exists() && !disk.at("worktree/.node_modules-left").exists());

        fs::write(modules.join("written-later"), "x").unwrap();
        disk.attach(&disk.at("worktree"));
        assert!(!modules.join("written-later").exists() && !modules.join(ASIDE).exists());

        fs::remove_dir_all(&modules).unwrap();
        symlink("/nowhere", &modules).unwrap();
        disk.attach(&disk.at("worktree"));
        assert!(modules.symlink_metadata().unwrap().is_dir());
    }

    #[test]
    fn another_file_system_gets_a_symlink_to_a_folder_of_its_own() {
        let disk = Disk::new();
        let Ok(far) = tempfile::tempdir_in("/dev/shm") else {
            return;
        };
        if far.path().metadata().unwrap().dev() == disk.root.path().metadata().unwrap().dev() {
            return;
        }
        for _ in 0..2 {
            let target = disk.attach(far.path()).unwrap();
            assert_eq!(fs::read_link(far.path().join(MODULES)).unwrap(), target);
            assert_eq!(current(far.path(), KEY), Some(Some(target.clone())));
            let master = disk.at("cache/masters/k/node_modules/pkg/lib/a.js");
            assert_eq!(
                inode(&far.path().join("node_modules/pkg/lib/a.js")),
                inode(&master)
            );
            assert_eq!(fs::read_dir(far.path()).unwrap().count(), 1);
            assert_eq!(fs::read_dir(target.parent().unwrap()).unwrap().count(), 1);
        }
    }

    #[test]
    fn modules_in_git_are_left_alone() {
        let disk = Disk::new();
        settle(&disk.at("site"), &disk.at("cache/masters/git"), KEY, true).unwrap();
        assert!(is_committed(&disk.at("cache/masters/git")));
        assert!(!is_committed(&disk.at("cache/masters/k")));
        assert!(is_whole(&disk.at("cache/masters/k"), KEY));
        assert!(!is_whole(&disk.at("cache/masters/x"), KEY));
    }
}
