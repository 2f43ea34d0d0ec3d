//! What a commit leaves out on purpose, and the copy that is kept of it.
//!
//! Names are judged for new files alone: what the site's own history already holds is the
//! site's business, and leaving its edits out would make preview and repository differ for ever.
//! Size and content are judged for new content of old files too. A deletion is never held back.

mod secrets;

use std::{
    fs::{self, File},
    io::{self, Seek},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Component, Path, PathBuf},
};

/// Largest file that is committed, in bytes.
pub(super) const MAX_FILE_BYTES: u64 = 20_000_000;
/// Most bytes that one commit copies aside.
const MAX_COPIED_BYTES: u64 = 500_000_000;

/// The folder of installed packages that `path` lies in, if any.
pub(super) fn packages_folder(path: &Path) -> Option<PathBuf> {
    let mut folder = PathBuf::new();
    for part in path.components() {
        folder.push(part);
        if part == Component::Normal("node_modules".as_ref()) {
            return Some(folder);
        }
    }
    None
}

/// Why a new file of this name is held back.
pub(super) fn judge_name(path: &Path) -> Option<&'static str> {
    let name = path.file_name()?.to_string_lossy().to_ascii_lowercase();
    if name == ".env" || name.starts_with(".env.") {
        let is_sample = [".example", ".sample", ".template"]
            .iter()
            .any(|end| name.ends_with(end));
        return (!is_sample).then_some("it holds settings that are often secret");
    }
    let is_key = [".pem", ".key", ".p12", ".pfx", ".ppk", ".jks", ".keystore"]
        .iter()
        .any(|end| name.ends_with(end))
        || ["id_rsa", "id_dsa", "id_ecdsa", "id_ed25519"]
            .iter()
            .any(|key| name.starts_with(key) && !name.ends_with(".pub"));
    if is_key {
        return Some("its name says that it is a private key");
    }
    let keeps_logins = matches!(
        name.as_str(),
        ".netrc"
            | "_netrc"
            | ".pgpass"
            | ".my.cnf"
            | ".git-credentials"
            | ".htpasswd"
            | ".dockercfg"
            | "kubeconfig"
    ) || [".kdbx", ".tfstate"].iter().any(|end| name.ends_with(end))
        || [".aws/credentials", ".docker/config.json", ".kube/config"]
            .iter()
            .any(|end| path.ends_with(end));
    keeps_logins.then_some("its name says that it keeps passwords")
}

/// Why this content is held back. What stands in `earlier`, the content that the history has of
/// this file, is no reason.
pub(super) fn judge_content(path: &Path, content: &[u8], earlier: Option<&[u8]>) -> Option<String> {
    let decoded = decode_utf16(content);
    let content = decoded.as_deref().unwrap_or(content);
    let found = secrets::find(path, content, earlier);
    let first = found.first()?;
    let more = match found.len() {
        1 => String::new(),
        count => format!(", and {} more", count - 1),
    };
    Some(format!(
        "it holds {} (line {}{more})",
        first.kind(),
        first.line
    ))
}

/// The text of a file that Windows wrote with two bytes a character.
fn decode_utf16(content: &[u8]) -> Option<Vec<u8>> {
    let read: fn([u8; 2]) -> u16 = match content.get(..2)? {
        [0xff, 0xfe] => u16::from_le_bytes,
        [0xfe, 0xff] => u16::from_be_bytes,
        _ => return None,
    };
    let units = content[2..]
        .as_chunks::<2>()
        .0
        .iter()
        .map(|pair| read(*pair));
    let text: String = char::decode_utf16(units)
        .map(|c| c.unwrap_or(char::REPLACEMENT_CHARACTER))
        .collect();
    Some(text.into_bytes())
}

/// Secrets of every form: what each is, and a file's content that holds it.
#[cfg(test)]
pub(super) fn secret_samples() -> Vec<(&'static str, String)> {
    secrets::samples::all()
}

/// The reason for a file over [`MAX_FILE_BYTES`].
pub(super) const TOO_LARGE: &str = "it is larger than 20 MB";

/// Keeps copies of held-back files in one folder, which it makes when it is needed.
#[derive(Debug)]
pub(super) struct Keeper<'a> {
    /// `None`: nothing is kept.
    folder: Option<&'a Path>,
    copied: u64,
}

impl<'a> Keeper<'a> {
    pub(super) fn new(folder: &'a Path) -> Self {
        Self {
            folder: Some(folder),
            copied: 0,
        }
    }

    /// Of a commit that is not made.
    pub(super) fn none() -> Self {
        Self {
            folder: None,
            copied: 0,
        }
    }

    /// Copies `file` to `path` below the folder, for the owner's eyes alone.
    ///
    /// A file that stays held back for many turns is stored once: if the newest folder beside
    /// this one has it with the same size and time, it is linked from there.
    ///
    /// # Errors
    /// The disk's; also if the folder would grow beyond [`MAX_COPIED_BYTES`].
    pub(super) fn keep(&mut self, path: &Path, file: &mut File) -> io::Result<()> {
        let Some(folder) = self.folder else {
            return Ok(());
        };
        let metadata = file.metadata()?;
        let target = folder.join(path);
        let parent = target.parent().unwrap_or(folder);
        if is_copy(&target, &metadata) {
            return Ok(());
        }
        let earlier = earlier(folder, path, &metadata);
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(parent)?;
        // An earlier commit of the same turn may have kept an older state.
        super::files::remove_all(&target)?;
        if earlier.is_some_and(|earlier| fs::hard_link(earlier, &target).is_ok()) {
            return Ok(());
        }
        if self.copied.saturating_add(metadata.len()) > MAX_COPIED_BYTES {
            return Err(io::Error::other("too much to copy aside"));
        }
        self.copied += metadata.len();
        file.rewind()?;
        let mut copy = File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&target)?;
        // `take`: the file may still grow.
        io::copy(&mut io::Read::take(&mut *file, metadata.len()), &mut copy)?;
        copy.set_modified(metadata.modified()?)
    }
}

/// The copy that the newest folder beside `folder` has of this file.
fn earlier(folder: &Path, path: &Path, metadata: &fs::Metadata) -> Option<PathBuf> {
    let own_name = folder.file_name()?;
    let siblings = fs::read_dir(folder.parent()?).ok()?;
    let newest = siblings
        .filter_map(|e| Some(e.ok()?.file_name()))
        .filter(|n| n != own_name)
        .max()?;
    let candidate = folder.parent()?.join(newest).join(path);
    is_copy(&candidate, metadata).then_some(candidate)
}

/// Is `path` a copy that was made of this file as it is?
fn is_copy(path: &Path, metadata: &fs::Metadata) -> bool {
    fs::symlink_metadata(path).is_ok_and(|found| {
        found.is_file()
            && found.len() == metadata.len()
            && found.modified().ok() == metadata.modified().ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for held in [
            ".env",
            "a/.env.local",
            ".ENV",
            "x.pem",
            "tls/server.KEY",
            "id_rsa",
            "id_ed25519",
        ] {
            assert!(judge_name(Path::new(held)).is_some(), "{held}");
        }
        for fine in [
            ".env.example",
            ".env.sample",
            "a/.env.template",
            "env.d.ts",
            "id_rsa.pub",
            ".envrc.md",
            "keys.ts",
        ] {
            assert!(judge_name(Path::new(fine)).is_none(), "{fine}");
        }
        assert_eq!(
            packages_folder(Path::new("a/node_modules/b/node_modules/c")),
            Some("a/node_modules".into())
        );
        assert_eq!(packages_folder(Path::new("src/node_modules.md")), None);
    }

    #[test]
    fn contents() {
        // Put together here, so that this file holds no key itself.
        let key = format!("x\n-----BEGIN RSA {}\nMIIE", "PRIVATE KEY-----");
        let judge = |content: &[u8]| judge_content(Path::new("a.txt"), content, None);
        assert_eq!(
            judge(key.as_bytes()).as_deref(),
            Some("it holds a private key (line 2)")
        );
        assert_eq!(judge(b"-----BEGIN CERTIFICATE-----"), None);
        assert_eq!(judge(b"the text PRIVATE KEY----- alone"), None);
        for (mark, bytes) in [
            ([0xff, 0xfe], u16::to_le_bytes as fn(u16) -> [u8; 2]),
            ([0xfe, 0xff], u16::to_be_bytes),
        ] {
            let mut wide = mark.to_vec();
            wide.extend(key.encode_utf16().flat_map(bytes));
            assert!(judge(&wide).is_some(), "as Windows writes it");
        }
        let earlier = Some(key.as_bytes());
        assert_eq!(
            judge_content(Path::new("a.txt"), key.as_bytes(), earlier),
            None
        );
    }

    #[test]
    fn what_stays_held_back_is_stored_once() {
        use std::os::unix::fs::MetadataExt;
        let root = tempfile::tempdir().unwrap();
        let source = root.path().join("film.mp4");
        fs::write(&source, "film").unwrap();
        for turn in ["1", "2"] {
            let folder = root.path().join("held").join(turn);
            let mut file = File::open(&source).unwrap();
            Keeper::new(&folder)
                .keep(Path::new("a/film.mp4"), &mut file)
                .unwrap();
        }
        let inode = |turn: &str| {
            let copy = root.path().join("held").join(turn).join("a/film.mp4");
            let metadata = fs::metadata(copy).unwrap();
            assert_eq!(metadata.mode() & 0o777, 0o600);
            metadata.ino()
        };
        assert_eq!(inode("1"), inode("2"));

        // A second commit of one turn keeps the file as it is by then.
        fs::write(&source, "a longer film").unwrap();
        let folder = root.path().join("held/2");
        for _ in 0..2 {
            let mut file = File::open(&source).unwrap();
            Keeper::new(&folder)
                .keep(Path::new("a/film.mp4"), &mut file)
                .unwrap();
        }
        assert_eq!(
            fs::read(folder.join("a/film.mp4")).unwrap(),
            b"a longer film"
        );
        let before = root.path().join("held/1/a/film.mp4");
        assert_eq!(
            fs::read(before).unwrap(),
            b"film",
            "the earlier copy stays what it was"
        );
    }
}
