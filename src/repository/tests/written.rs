//! What greenroom itself reads and writes in a site.

use super::*;

impl Site {
    fn written(&self, files: &[(&str, Option<&[u8]>)]) -> Result<Draft> {
        let base = self.worktree.uncommitted().unwrap();
        let files: Vec<_> = files
            .iter()
            .map(|(path, content)| ((*path).to_owned(), content.map(<[u8]>::to_vec)))
            .collect();
        self.worktree.draft_written(&base, &files)
    }
}

#[test]
fn files_are_seen_as_they_would_be_committed_and_no_link_is_one() {
    let place = Place::new();
    let (_, site) = place.thread("alice", "main");
    write(site.dir.join("src/a.md"), "a\r\n");
    site.commit("Before");
    write(site.dir.join("src/b.md"), "b");
    std::os::unix::fs::symlink("/etc/passwd", site.dir.join("src/c.md")).unwrap();
    let base = site.worktree.uncommitted().unwrap();
    let seen = site.worktree.look(&base, |files| {
        assert_eq!(files.read("src/a.md", 3).unwrap(), b"a\r\n");
        assert_eq!(files.read("src/a.md", 2), None);
        assert!(!files.has("src") && !files.has("src/c.md"));
        assert_eq!(files.size("src/b.md"), Some(1));
        files
            .paths()
            .filter(|path| path.starts_with("src/"))
            .map(str::to_owned)
            .collect::<Vec<_>>()
    });
    let seen = seen.unwrap();
    assert!(seen.contains(&"src/a.md".to_owned()) && seen.contains(&"src/b.md".to_owned()));
}

#[test]
fn new_contents_are_committed_byte_for_byte_and_keep_modes() {
    let place = Place::new();
    let (_, site) = place.thread("alice", "main");
    write(site.dir.join("run.sh"), "old");
    write(site.dir.join("gone.txt"), "x");
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(site.dir.join("run.sh"), mode).unwrap();
    site.commit("Before");
    let new: &[u8] = b"\xef\xbb\xbfnew\r\n\0";
    let draft = site
        .written(&[
            ("run.sh", Some(new)),
            ("a/b/c.webp", Some(b"c")),
            ("gone.txt", None),
        ])
        .unwrap();
    assert_eq!(draft.files().len(), 3);
    let commit = site.write(&draft);
    site.worktree.apply(&commit, &Fence::open()).unwrap();
    assert_eq!(fs::read(site.dir.join("run.sh")).unwrap(), new);
    assert_eq!(fs::read(site.dir.join("a/b/c.webp")).unwrap(), b"c");
    assert!(!site.dir.join("gone.txt").exists());
    assert!(git(&site.dir, &["ls-tree", "HEAD", "run.sh"]).starts_with("100755"));
    assert_eq!(site.status(), "");

    let same = site
        .written(&[("run.sh", Some(new)), ("never.txt", None)])
        .unwrap();
    assert!(same.is_empty());
}

#[test]
fn what_must_not_be_committed_is_refused_and_nothing_else_is_overwritten() {
    let place = Place::new();
    let (_, site) = place.thread("alice", "main");
    write(site.dir.join("folder/file"), "x");
    write(site.dir.join(".gitignore"), "ignored\n");
    std::os::unix::fs::symlink("folder", site.dir.join("link")).unwrap();
    site.commit("Before");
    let (_, secret) = gate::secret_samples().swap_remove(0);
    for (path, content) in [
        ("", "x"),
        ("/etc/x", "x"),
        ("../x", "x"),
        ("a/../x", "x"),
        ("a//x", "x"),
        (".git/config", "x"),
        ("a/.GIT/config", "x"),
        (".env", "A=b"),
        ("node_modules/a/index.js", "x"),
        ("folder", "x"),
        ("folder/file/below", "x"),
        ("link", "x"),
        ("link/x", "x"),
        ("page.md", secret.as_str()),
    ] {
        let refused = site.written(&[(path, Some(content.as_bytes()))]);
        assert!(
            matches!(refused, Err(RepositoryError::Unfit { .. })),
            "{path}: {refused:?}"
        );
    }
    write(site.dir.join("ignored"), "a person's");
    let refused = site.written(&[("ignored", Some(b"ours"))]);
    assert!(
        matches!(refused, Err(RepositoryError::Conflict { .. })),
        "{refused:?}"
    );
    assert_eq!(fs::read(site.dir.join("ignored")).unwrap(), b"a person's");
}
