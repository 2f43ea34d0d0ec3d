//! What of a training's folder is published: the finished model, and of each prompt the last sample.
//!
//! The layout is ai-toolkit's: `my_lora/my_lora.safetensors`, checkpoints beside it
//! (`my_lora_000001000.safetensors`), and `samples/{timestamp}__{step}_{prompt}.jpg`. Links are never
//! followed: a folder that somebody else filled must not publish this machine's files.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs, io,
    path::{Path, PathBuf},
};

use super::source::Source;

/// Entries of one folder that are looked at.
const MAX_ENTRIES: usize = 100_000;
/// Prompts whose sample is published.
const MAX_SAMPLES: usize = 200;
/// The longest file name that is published, in bytes.
const MAX_NAME_BYTES: usize = 255;
const SAMPLES: &str = "samples";
const WEIGHTS: &str = ".safetensors";

/// Why there is nothing to publish. Each says what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FolderError {
    #[error("failed to read {}", path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{} is no folder; name the one that the training wrote its .safetensors to", .0.display())]
    NoFolder(PathBuf),
    #[error("{} holds more than {MAX_ENTRIES} entries; name the training's own folder", .0.display())]
    Crowded(PathBuf),
    #[error(
        "there is no model in {}: no .safetensors file{hint}; name the folder that the training \
         wrote it to", folder.display()
    )]
    NoModel { folder: PathBuf, hint: String },
    #[error(
        "{} holds checkpoints alone, so the training has not finished; --model-file {last} publishes \
         the last one", folder.display()
    )]
    Unfinished { folder: PathBuf, last: String },
    #[error("there are {} models ({}); say which with --model-file NAME", names.len(), listed(names))]
    Several { names: Vec<String> },
    #[error("--model-file {0}: there is no such .safetensors file in the folder itself")]
    NoSuchModel(String),
    #[error("{0} is empty; was the training cut off?")]
    Empty(String),
    #[error(
        "{0:?} cannot be published under its name: give it one without control characters and \
         backslashes"
    )]
    OddName(String),
}

fn listed(names: &[String]) -> String {
    let mut text = names[..names.len().min(5)].join(", ");
    if names.len() > 5 {
        text.push_str(", …");
    }
    text
}

/// Why a file stays where it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    /// A state of the model in the middle of the training.
    Checkpoint,
    /// Another model than the one that was named, or that bears the folder's name.
    OtherModel,
    /// Its prompt has a later sample.
    EarlierSample,
    /// Its prompt may have an earlier one that holds a picture.
    EmptySample,
    UnreadableSample,
    /// There are samples of too many prompts.
    TooMany,
    /// A link, and where it leads is nobody's word.
    Link,
    /// Nothing that belongs to a published model.
    Other,
}

impl Reason {
    /// For a person, after the number of files.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Checkpoint => "checkpoints",
            Self::OtherModel => "other models",
            Self::EarlierSample => "earlier samples",
            Self::EmptySample => "samples without a byte",
            Self::UnreadableSample => "samples that cannot be read",
            Self::TooMany => "samples of prompts beyond the 200th",
            Self::Link => "links, which are not followed",
            Self::Other => "other files",
        }
    }
}

/// What is published of a folder.
#[derive(Debug, Clone)]
pub struct LoraFolder {
    pub model: Source,
    /// One for each prompt, in their order.
    pub samples: Vec<Sample>,
    /// What is not, by its name.
    pub left_out: Vec<(String, Reason)>,
    /// What the training's settings say of it.
    pub training: Training,
}

/// The last picture of a prompt.
#[derive(Debug, Clone)]
pub struct Sample {
    pub prompt: u64,
    pub step: u64,
    pub file: Source,
}

/// What `config.yaml` says, as far as it can be read.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Training {
    /// The Hub's name of the model that this one builds on.
    pub base_model: Option<String>,
    pub trigger: Option<String>,
    /// By their number.
    pub prompts: Vec<String>,
}

impl LoraFolder {
    /// Looks through a folder. `model_file` is the model's name where a person says it.
    ///
    /// # Errors
    /// If it holds no model, or more than one that may be meant.
    pub fn read(folder: &Path, model_file: Option<&str>) -> Result<Self, FolderError> {
        if !folder.is_dir() {
            return Err(FolderError::NoFolder(folder.to_owned()));
        }
        let mut left_out = Vec::new();
        let mut weights = Vec::new();
        let mut has_samples = false;
        let mut config = None;
        for (name, kind) in entries(folder)? {
            match kind {
                EntryKind::Folder if name == SAMPLES => has_samples = true,
                EntryKind::File if is_weights(&name) => weights.push(name),
                EntryKind::File => {
                    if name == OsStr::new("config.yaml") {
                        config = Some(folder.join(&name));
                    }
                    left_out.push((shown(&name), Reason::Other));
                }
                EntryKind::Link => left_out.push((shown(&name), Reason::Link)),
                EntryKind::Folder | EntryKind::Odd => {
                    left_out.push((shown(&name), Reason::Other));
                }
            }
        }
        let weights: Vec<String> = weights.iter().map(|name| shown(name)).collect();
        let chosen = choose_model(folder, &weights, model_file, &left_out)?;
        for name in &weights {
            let reason = match is_checkpoint(name) {
                true => Reason::Checkpoint,
                false => Reason::OtherModel,
            };
            if *name != chosen {
                left_out.push((name.clone(), reason));
            }
        }
        let model = published(folder, &chosen, chosen.clone())?;
        if model.size() == 0 {
            return Err(FolderError::Empty(chosen));
        }
        let samples = match has_samples {
            true => choose_samples(&folder.join(SAMPLES), &mut left_out)?,
            false => Vec::new(),
        };
        left_out.sort();
        Ok(Self {
            model,
            samples,
            left_out,
            training: config.map(|file| Training::read(&file)).unwrap_or_default(),
        })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum EntryKind {
    File,
    Folder,
    Link,
    Odd,
}

/// What a folder holds, by name.
fn entries(folder: &Path) -> Result<Vec<(std::ffi::OsString, EntryKind)>, FolderError> {
    let failed = |source| FolderError::Read {
        path: folder.to_owned(),
        source,
    };
    let mut entries = Vec::new();
    for entry in fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let kind = entry.file_type().map_err(failed)?;
        let kind = match kind {
            kind if kind.is_symlink() => EntryKind::Link,
            kind if kind.is_file() => EntryKind::File,
            kind if kind.is_dir() => EntryKind::Folder,
            _ => EntryKind::Odd,
        };
        if entries.len() == MAX_ENTRIES {
            return Err(FolderError::Crowded(folder.to_owned()));
        }
        entries.push((entry.file_name(), kind));
    }
    entries.sort();
    Ok(entries)
}

/// A name for people; of one that is no UTF-8 what there is.
fn shown(name: &OsStr) -> String {
    name.to_string_lossy().into_owned()
}

fn is_weights(name: &OsStr) -> bool {
    // A name that is no UTF-8 is taken too, and refused with a sentence if it is the chosen one.
    let name = shown(name).to_ascii_lowercase();
    name.ends_with(WEIGHTS) && !name.contains("index")
}

/// `…_000001000.safetensors`.
fn is_checkpoint(name: &str) -> bool {
    let stem = &name[..name.len().saturating_sub(WEIGHTS.len())];
    stem.rsplit_once('_')
        .is_some_and(|(_, step)| step.len() == 9 && step.bytes().all(|b| b.is_ascii_digit()))
}

fn choose_model(
    folder: &Path,
    weights: &[String],
    named: Option<&str>,
    left_out: &[(String, Reason)],
) -> Result<String, FolderError> {
    if let Some(named) = named {
        let known = weights.iter().find(|name| *name == named);
        return known
            .cloned()
            .ok_or_else(|| FolderError::NoSuchModel(named.to_owned()));
    }
    let (checkpoints, finished): (Vec<_>, Vec<_>) = weights
        .iter()
        .cloned()
        .partition(|name| is_checkpoint(name));
    // `output/my_lora/my_lora.safetensors`.
    let folder_name = fs::canonicalize(folder).ok();
    let folder_name = folder_name.as_deref().and_then(Path::file_name).map(shown);
    let same = folder_name.map(|name| format!("{name}{WEIGHTS}"));
    match (&finished[..], checkpoints.last()) {
        ([one], _) => Ok(one.clone()),
        ([], Some(last)) => Err(FolderError::Unfinished {
            folder: folder.to_owned(),
            last: last.clone(),
        }),
        ([], None) => {
            let is_link = |(name, reason): &&(String, Reason)| {
                *reason == Reason::Link && name.ends_with(WEIGHTS)
            };
            let link = left_out.iter().find(is_link);
            Err(FolderError::NoModel {
                folder: folder.to_owned(),
                hint: link
                    .map(|(name, _)| format!(" ({name} is a link, which is not followed: copy it)"))
                    .unwrap_or_default(),
            })
        }
        (several, _) => match same.filter(|same| several.contains(same)) {
            Some(same) => Ok(same),
            None => Err(FolderError::Several { names: finished }),
        },
    }
}

/// The last sample of each prompt that can be had: of the highest step, then the latest.
fn choose_samples(
    folder: &Path,
    left_out: &mut Vec<(String, Reason)>,
) -> Result<Vec<Sample>, FolderError> {
    let mut all: BTreeMap<u64, Vec<(Stamped, String)>> = BTreeMap::new();
    let mut leave = |name: &str, reason| left_out.push((format!("{SAMPLES}/{name}"), reason));
    for (name, kind) in entries(folder)? {
        let name = shown(&name);
        let stamped = match kind {
            EntryKind::File => Stamped::parse(&name),
            EntryKind::Link => {
                leave(&name, Reason::Link);
                continue;
            }
            EntryKind::Folder | EntryKind::Odd => None,
        };
        let Some((prompt, stamped)) = stamped else {
            leave(&name, Reason::Other);
            continue;
        };
        all.entry(prompt).or_default().push((stamped, name));
    }
    let mut samples: Vec<Sample> = Vec::new();
    for (prompt, mut candidates) in all {
        candidates.sort_unstable();
        let mut is_found = false;
        while let Some((stamped, name)) = candidates.pop() {
            if is_found {
                leave(&name, Reason::EarlierSample);
                continue;
            }
            if samples.len() == MAX_SAMPLES {
                leave(&name, Reason::TooMany);
                is_found = true;
                continue;
            }
            let file = match published(folder, &name, format!("{SAMPLES}/{name}")) {
                Ok(file) if file.size() == 0 => Err(Reason::EmptySample),
                Ok(file) => file
                    .sample()
                    .map(|_| file)
                    .map_err(|_| Reason::UnreadableSample),
                Err(FolderError::Read { .. }) => Err(Reason::UnreadableSample),
                Err(error) => return Err(error),
            };
            match file {
                Ok(file) => {
                    is_found = true;
                    samples.push(Sample {
                        prompt,
                        step: stamped.step,
                        file,
                    });
                }
                Err(why) => leave(&name, why),
            }
        }
    }
    Ok(samples)
}

/// When a sample was made; the later one is the greater.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Stamped {
    step: u64,
    at: u64,
}

impl Stamped {
    /// `1737531308253__000000250_0.jpg`: time, step, and the prompt, which is answered first.
    fn parse(name: &str) -> Option<(u64, Self)> {
        let number = |text: &str| {
            let is_plain = text.bytes().all(|b| b.is_ascii_digit());
            text.parse::<u64>().ok().filter(|_| is_plain)
        };
        let (stem, ending) = name.rsplit_once('.')?;
        let is_picture = ["jpg", "jpeg", "png", "webp"]
            .iter()
            .any(|known| ending.eq_ignore_ascii_case(known));
        let (at, rest) = stem.split_once("__").filter(|_| is_picture)?;
        let (step, prompt) = rest.split_once('_')?;
        let stamped = Self {
            step: number(step)?,
            at: number(at)?,
        };
        Some((number(prompt)?, stamped))
    }
}

/// A file of a folder under its name in the repository.
fn published(folder: &Path, name: &str, in_repository: String) -> Result<Source, FolderError> {
    let is_odd = |c: char| c.is_control() || c == '\\' || c == char::REPLACEMENT_CHARACTER;
    if name.contains(is_odd) || name.len() > MAX_NAME_BYTES {
        return Err(FolderError::OddName(name.to_owned()));
    }
    let path = folder.join(name);
    Source::file(&path, in_repository).map_err(|source| FolderError::Read { path, source })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn folder(files: &[&str]) -> tempfile::TempDir {
        let outer = tempfile::tempdir().unwrap();
        fs::create_dir_all(outer.path().join("my_lora/samples")).unwrap();
        for file in files {
            fs::write(outer.path().join("my_lora").join(file), *file).unwrap();
        }
        outer
    }

    fn read(outer: &tempfile::TempDir, model: Option<&str>) -> Result<LoraFolder, FolderError> {
        LoraFolder::read(&outer.path().join("my_lora"), model)
    }

    fn names(folder: &LoraFolder) -> Vec<&str> {
        let samples = folder.samples.iter().map(|sample| sample.file.name());
        std::iter::once(folder.model.name())
            .chain(samples)
            .collect()
    }

    #[test]
    fn the_finished_model_and_the_last_sample_of_each_prompt() {
        let outer = folder(&[
            "my_lora.safetensors",
            "my_lora_000001000.safetensors",
            "my_lora_000002000.safetensors",
            "model.safetensors.index.json",
            "my_index.safetensors",
            "optimizer.pt",
            "samples/1737531308253__000000250_0.jpg",
            "samples/1737531308254__000001000_0.jpg",
            // The step counts before the time, and numbers are no text.
            "samples/1737531308999__000000999_0.jpg",
            "samples/1737531308253__000000250_10.png",
            "samples/1737531308253__000000250_2.webp",
            "samples/999__000000250_2.webp",
            "samples/notes.txt",
            "samples/1__2_3.gif",
            "samples/a__2_3.jpg",
            "samples/1__2_+3.jpg",
        ]);
        let folder = read(&outer, None).unwrap();
        assert_eq!(
            names(&folder),
            [
                "my_lora.safetensors",
                "samples/1737531308254__000001000_0.jpg",
                "samples/1737531308253__000000250_2.webp",
                "samples/1737531308253__000000250_10.png",
            ]
        );
        let of = |reason: Reason| {
            let named = folder.left_out.iter().filter(|(_, why)| *why == reason);
            named.count()
        };
        assert_eq!(of(Reason::Checkpoint), 2);
        assert_eq!(of(Reason::EarlierSample), 3);
        assert_eq!(of(Reason::Other), 7);
    }

    #[test]
    fn a_sample_without_a_picture_gives_way_to_the_one_before() {
        let outer = folder(&[
            "my_lora.safetensors",
            "samples/1__000000100_0.jpg",
            "samples/2__000000200_0.jpg",
            "samples/3__000000300_0.jpg",
            "samples/1__000000100_1.jpg",
        ]);
        for cut_off in ["3__000000300_0.jpg", "1__000000100_1.jpg"] {
            fs::write(outer.path().join("my_lora/samples").join(cut_off), "").unwrap();
        }
        let folder = read(&outer, None).unwrap();
        assert_eq!(
            names(&folder),
            ["my_lora.safetensors", "samples/2__000000200_0.jpg"]
        );
        let left_out = [
            ("samples/1__000000100_0.jpg", Reason::EarlierSample),
            ("samples/1__000000100_1.jpg", Reason::EmptySample),
            ("samples/3__000000300_0.jpg", Reason::EmptySample),
        ];
        let left_out = left_out.map(|(name, why)| (name.to_owned(), why));
        assert_eq!(folder.left_out, left_out);
    }

    #[test]
    fn which_model_is_meant_is_never_guessed() {
        let said = |files: &[&str], model| read(&folder(files), model).unwrap_err().to_string();
        assert!(said(&["notes.txt"], None).starts_with("there is no model in"));
        let unfinished = said(
            &["a_000001000.safetensors", "a_000002000.safetensors"],
            None,
        );
        assert!(
            unfinished.contains("--model-file a_000002000.safetensors"),
            "{unfinished}"
        );
        let several = said(&["b.safetensors", "a.safetensors"], None);
        assert!(
            several.contains("2 models (a.safetensors, b.safetensors)"),
            "{several}"
        );
        assert!(said(&["a.safetensors"], Some("../a.safetensors")).contains("no such"));
        // The folder's own name settles it, and so does a person's word.
        let both = folder(&[
            "a_000001000.safetensors",
            "my_lora.safetensors",
            "b.safetensors",
        ]);
        assert_eq!(names(&read(&both, None).unwrap()), ["my_lora.safetensors"]);
        let named = read(&both, Some("a_000001000.safetensors")).unwrap();
        assert_eq!(names(&named), ["a_000001000.safetensors"]);
        let empty = folder(&[]);
        fs::write(empty.path().join("my_lora/a.safetensors"), "").unwrap();
        assert!(matches!(read(&empty, None), Err(FolderError::Empty(_))));
        let nowhere = LoraFolder::read(&empty.path().join("nowhere"), None);
        assert!(matches!(nowhere, Err(FolderError::NoFolder(_))));
    }

    #[test]
    fn links_are_left_where_they_are() {
        let outer = folder(&["samples/1__2_0.jpg"]);
        let at = |name: &str| outer.path().join("my_lora").join(name);
        fs::write(outer.path().join("secret"), "secret").unwrap();
        symlink(outer.path().join("secret"), at("my_lora.safetensors")).unwrap();
        let error = read(&outer, None).unwrap_err().to_string();
        assert!(error.contains("my_lora.safetensors is a link"), "{error}");
        fs::write(at("real.safetensors"), "x").unwrap();
        symlink(outer.path().join("secret"), at("samples/1__9_0.jpg")).unwrap();
        let folder = read(&outer, None).unwrap();
        assert_eq!(names(&folder), ["real.safetensors", "samples/1__2_0.jpg"]);
        // A folder of samples that is a link is none either.
        fs::rename(at("samples"), outer.path().join("elsewhere")).unwrap();
        symlink(outer.path().join("elsewhere"), at("samples")).unwrap();
        assert!(read(&outer, None).unwrap().samples.is_empty());
    }

    #[test]
    fn odd_names_are_refused_and_ordinary_ones_are_not() {
        for (name, is_fine) in [
            ("brand färben #1 (final).safetensors", true),
            ("a\nb.safetensors", false),
            ("a\\b.safetensors", false),
        ] {
            let outer = folder(&[name]);
            assert_eq!(read(&outer, None).is_ok(), is_fine, "{name}");
        }
        let outer = folder(&[]);
        let odd = <OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(b"a\xff.safetensors");
        fs::write(outer.path().join("my_lora").join(odd), "x").unwrap();
        assert!(matches!(read(&outer, None), Err(FolderError::OddName(_))));
    }
}
