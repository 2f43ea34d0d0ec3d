//! Texts for the images of a site in a folder of this machine: the same, in place and without a
//! thread.

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use super::{
    AltTexts, Asked, DescribeError, Files, Progress, Report, foreseen, is_of_site, look, write_all,
};
use crate::{
    task::{self, BlockingError},
    workspace::read_bounded,
};

/// Looking through a site on a slow disk.
const DISK_DEADLINE: Duration = Duration::from_secs(300);
/// How deep folders are looked through.
const MAX_DEPTH: usize = 32;
/// Files that are looked at, most.
const MAX_FILES: usize = 200_000;

/// The regular files below a folder. No link is followed.
#[derive(Debug)]
struct Folder {
    root: PathBuf,
    files: BTreeMap<String, u64>,
}

impl Folder {
    fn open(root: &Path) -> io::Result<Self> {
        let mut files = BTreeMap::new();
        let mut folders = vec![(String::new(), 0)];
        while let Some((folder, depth)) = folders.pop() {
            for entry in fs::read_dir(root.join(&folder))? {
                let entry = entry?;
                let Ok(name) = entry.file_name().into_string() else {
                    continue;
                };
                let path = match folder.is_empty() {
                    true => name,
                    false => format!("{folder}/{name}"),
                };
                let metadata = entry.metadata()?;
                // Builds and packages are larger than all else, and no part of it.
                let has = |file: &str| root.join(file).is_file();
                if metadata.is_dir() && depth < MAX_DEPTH && is_of_site(&format!("{path}/x"), has) {
                    folders.push((path, depth + 1));
                } else if metadata.is_file() {
                    files.insert(path, metadata.size());
                }
            }
            if files.len() > MAX_FILES {
                return Err(io::Error::other(format!(
                    "it has more than {MAX_FILES} files"
                )));
            }
        }
        Ok(Self {
            root: root.to_owned(),
            files,
        })
    }

    /// Replaces a file by a rename, with its mode.
    fn put(&self, path: &str, content: &[u8]) -> io::Result<()> {
        let target = self.root.join(path);
        let name = format!(".greenroom-{}", uuid::Uuid::new_v4().simple());
        let beside = target.with_file_name(name);
        let put = || {
            fs::write(&beside, content)?;
            fs::set_permissions(&beside, fs::symlink_metadata(&target)?.permissions())?;
            fs::rename(&beside, &target)
        };
        let done = put();
        if done.is_err() {
            fs::remove_file(&beside).ok();
        }
        done
    }
}

impl Files for Folder {
    fn paths(&self) -> Vec<&str> {
        self.files.keys().map(String::as_str).collect()
    }

    fn has(&self, path: &str) -> bool {
        self.files.contains_key(path)
    }

    fn read(&self, path: &str, limit: u64) -> Option<Vec<u8>> {
        if !self.has(path) {
            return None;
        }
        read_bounded(&self.root.join(path), limit).ok().flatten()
    }
}

/// What came of a folder's images.
#[derive(Debug, Clone)]
pub struct FolderAnswer {
    pub report: Report,
    /// Images that are, or would be, asked about.
    pub images: usize,
    /// What that may cost at most, in US dollars, where nothing was done.
    pub worst_usd: Option<f64>,
    /// What it cost.
    pub cost_usd: f64,
}

/// Why a folder's images have no texts.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    #[error("{} cannot be read", folder.display())]
    Read { folder: PathBuf, source: io::Error },
    #[error("{file} cannot be written")]
    Write { file: String, source: io::Error },
    #[error(transparent)]
    Blocking(#[from] BlockingError),
    #[error(transparent)]
    Describe(#[from] DescribeError),
}

impl AltTexts {
    /// Gives the images of a site in a folder texts; its files are written in place. With `dry_run`
    /// it says what would be done.
    ///
    /// # Errors
    /// [`FolderError`].
    pub async fn write_folder(
        &self,
        folder: PathBuf,
        language: Option<String>,
        asked: &Asked,
        dry_run: bool,
        tell: &mut (dyn FnMut(&Progress) + Send),
    ) -> Result<FolderAnswer, FolderError> {
        let unreadable = |folder: &Path| {
            let folder = folder.to_owned();
            move |source| FolderError::Read { folder, source }
        };
        let (texts, root, code) = (self.clone(), folder.clone(), language.clone());
        let looked = task::blocking("looking through a site", DISK_DEADLINE, move || {
            let files = Folder::open(&root).map_err(unreadable(&root))?;
            let mut kept = texts.kept();
            let sights = look(&files, code.as_deref(), &mut |subject, bytes| {
                kept.keep(subject, bytes);
            });
            Ok::<_, FolderError>((sights, kept))
        });
        let (mut sights, kept) = looked.await??;
        if dry_run {
            sights.leave(&self.unfit(&kept, &sights.wanted).await);
        }
        let images = sights.wanted.len();
        if dry_run {
            let worst = self.worst(&sights.wanted, asked);
            return Ok(FolderAnswer {
                images,
                worst_usd: Some(worst.map_err(DescribeError::from)?),
                report: foreseen(sights),
                cost_usd: 0.0,
            });
        }
        let answers = self.describe(&kept, &sights.wanted, asked, tell).await?;
        drop(kept);
        let cost_usd = answers.usage.cost_usd;
        let written = task::blocking("writing texts", DISK_DEADLINE, move || {
            let files = Folder::open(&folder).map_err(unreadable(&folder))?;
            let (written, mut report) = write_all(&files, language.as_deref(), &answers.texts);
            report.stopped = answers.stopped;
            for (file, content) in written {
                let put = files.put(&file, &content);
                put.map_err(|source| FolderError::Write { file, source })?;
            }
            Ok::<_, FolderError>(report)
        });
        Ok(FolderAnswer {
            report: written.await??,
            images,
            worst_usd: None,
            cost_usd,
        })
    }
}
