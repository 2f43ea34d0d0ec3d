//! Texts for those who do not see a site's images: which images have none, what they show, and the
//! text at its place.
//!
//! ```text
//! files ─► survey (images without a text) ─► labels, one for each image and language ─► write ─► report
//! ```
//!
//! A survey reads the site and writes nothing. Labels take their time; when they are there the
//! files are read anew, as they are by then, and each image is found again by its bytes: what was
//! edited meanwhile is left alone. What is not certain is nobody's guess but a person's task, and
//! stands in the report: a file that does not add up, an image that is chosen when the page is
//! made, one of another server, one that is not fit for everybody.
//!
//! **Invariant:** of a file that is written every byte stays but those of the texts, and read again
//! it is the same but for them.

mod ask;
mod find;
mod folder;
mod language;
mod markdown;
mod scan;
mod source;
#[cfg(test)]
mod tests;
mod thread;
mod write;

use std::collections::{BTreeMap, HashMap, HashSet};

use serde::Serialize;
use sha2::{Digest, Sha256};
use utoipa::ToSchema;

use self::{
    find::{Found, Kind, Page, Place, What},
    language::Languages,
    source::Sources,
};
use crate::picture;

pub use ask::{AltTextSettings, AltTexts, Asked, DescribeError, Progress};
pub use folder::{FolderAnswer, FolderError};
pub use language::is_code as is_language;
pub use thread::{AltTextAnswer, AltTextError, AltTextWish};

/// Largest file that is read for images.
const MAX_FILE: u64 = 1 << 20;
/// Most bytes of a site's pages that are read: what comes after is a person's.
const MAX_PAGES: usize = 64 << 20;
/// Most places of images without a text in a site.
const MAX_PLACES: usize = 20_000;
/// Most places of one kind that a report names.
const MAX_NAMED: usize = 1_000;
/// Most images that are described at once; the rest is for the next time.
const MAX_IMAGES: usize = 1_000;
/// Most bytes of text on either side of an image that are told of.
const AROUND: usize = 240;

/// A site's regular files, by paths relative to it, with `/`.
pub trait Files {
    /// All of them.
    fn paths(&self) -> Vec<&str>;
    /// Is there one of this path?
    fn has(&self, path: &str) -> bool;
    /// What is in it; `None` also if that is more than `limit` bytes.
    fn read(&self, path: &str, limit: u64) -> Option<Vec<u8>>;
}

/// What was done about a site's images, and what is left.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// Images that have a text now; of a dry run, those that would get one.
    pub done: Vec<Described>,
    /// Images that need a person, or another call.
    pub person: Vec<Left>,
    /// Images that are there to be seen alone.
    pub decorative: usize,
    /// Places that are in neither list, because those have a thousand.
    #[serde(skip_serializing_if = "is_zero")]
    pub more: usize,
    /// Why images are left that a further call would describe.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stopped: Option<String>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks for it so")]
fn is_zero(number: &usize) -> bool {
    *number == 0
}

/// An image with its new text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct Described {
    pub file: String,
    /// From 1, in the file as it is now.
    pub line: usize,
    /// The image's file.
    pub image: String,
    /// Empty in a dry run.
    pub alt: String,
    /// The language that it is written in, where the site says one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub language: Option<String>,
}

/// An image that needs a person.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct Left {
    pub file: String,
    pub line: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// A sentence without its end.
    pub why: String,
}

impl Report {
    fn leave(&mut self, left: Left) {
        match self.person.len() < MAX_NAMED {
            true => self.person.push(left),
            false => self.more += 1,
        }
    }

    fn tell(&mut self, described: Described) {
        match self.done.len() < MAX_NAMED {
            true => self.done.push(described),
            false => self.more += 1,
        }
    }

    /// In words, for a person.
    pub fn in_words(&self) -> String {
        let images = |count: usize| match count {
            1 => "1 image".to_owned(),
            count => format!("{count} images"),
        };
        let mut text = match self.done.len() {
            0 => "No image got a text".to_owned(),
            count => format!("{} got a text", images(count)),
        };
        if !self.person.is_empty() {
            let needs = if self.person.len() == 1 {
                "needs"
            } else {
                "need"
            };
            text.push_str(&format!("; {} {needs} a person", images(self.person.len())));
        }
        text.push('.');
        text
    }
}

/// One description that is wanted: of an image, in a language.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Subject {
    /// SHA-256 of the file, in hex.
    digest: String,
    language: Option<String>,
}

/// What is to be asked about a subject.
#[derive(Debug, Clone, PartialEq)]
struct Wanted {
    subject: Subject,
    /// Where its first place has it.
    image: String,
    /// What the page is called there, and what stands around.
    title: Option<String>,
    around: String,
}

/// An image without a text, and what of it is known by the site.
struct Sight {
    file: String,
    line: usize,
    place: Place,
    outcome: Result<(Subject, String), String>,
    /// The image's path, where it is known.
    image: Option<String>,
}

/// What a look at a site has found.
#[derive(Default)]
struct Sights {
    sights: Vec<Sight>,
    wanted: Vec<Wanted>,
    decorative: usize,
    /// Files that could not be read.
    left: Vec<Left>,
}

/// A file's images with what is told of them, before the site's language is known.
struct Seen {
    file: String,
    said: Option<String>,
    title: Option<String>,
    found: Vec<(Found, String)>,
}

impl Sights {
    /// Takes out what cannot be described: that is a person's.
    fn leave(&mut self, unfit: &HashMap<Subject, String>) {
        self.wanted
            .retain(|wanted| !unfit.contains_key(&wanted.subject));
        for sight in &mut self.sights {
            let why = match &sight.outcome {
                Ok((subject, _)) => unfit.get(subject),
                Err(_) => None,
            };
            if let Some(why) = why {
                sight.outcome = Err(why.clone());
            }
        }
    }
}

/// Is it a file of the site, and none about it or of its tools? `has` says whether there is a file: a
/// site may be one of several in a folder.
fn is_of_site(path: &str, has: impl Fn(&str) -> bool) -> bool {
    /// Never a page's.
    const APART: [&str; 2] = ["node_modules", "__tests__"];
    /// Beside `package.json`, where tools put them. Elsewhere these may be what a page is called.
    const BESIDE: [&str; 8] = [
        "dist",
        "build",
        "out",
        "coverage",
        "vendor",
        "test",
        "tests",
        "storybook-static",
    ];
    let mut at = 0;
    let is_apart = path.split('/').any(|part| {
        let folder = &path[..at];
        at += part.len() + 1;
        let is_root = || folder.is_empty() || has(&format!("{folder}package.json"));
        part.starts_with('.') || APART.contains(&part) || BESIDE.contains(&part) && is_root()
    });
    // A README, a list of changes.
    let is_about = !path.contains('/') && matches!(find::dialect_of(path), Some(Kind::Markdown));
    !is_apart && !is_about
}

/// Looks through a site. `language` is what all of it is in, if the caller says so; `keep` gets the
/// bytes of each image that is to be described, once.
fn look(
    files: &dyn Files,
    language: Option<&str>,
    keep: &mut dyn FnMut(&Subject, &[u8]),
) -> Sights {
    let mut sights = Sights::default();
    let mut pages: BTreeMap<String, usize> = BTreeMap::new();
    let mut seen = Vec::new();
    let (mut bytes_left, mut places_left) = (MAX_PAGES, MAX_PLACES);
    for path in files.paths() {
        let is_ours = |_: &Kind| is_of_site(path, |file| files.has(file));
        let Some(kind) = find::dialect_of(path).filter(is_ours) else {
            continue;
        };
        match see(files, path, kind, &mut bytes_left, &mut places_left) {
            Ok(page) => {
                if let Some(code) = page.said.as_ref().filter(|code| language::is_code(code)) {
                    *pages.entry(code.clone()).or_default() += 1;
                }
                if !page.found.is_empty() {
                    seen.push(page);
                }
            }
            Err(left) => sights.left.extend(left),
        }
    }
    let languages = Languages::of_site(files, &pages);
    let mut sources = Sources::new(files);
    let mut digests: HashMap<String, Result<String, String>> = HashMap::new();
    let mut asked: HashSet<Subject> = HashSet::new();
    for page in seen {
        let language = match language {
            Some(code) => Some(code.to_owned()),
            None => languages.of(&page.file, page.said.as_deref()),
        };
        for (found, around) in page.found {
            let why = match found.what {
                What::Decorative => {
                    sights.decorative += 1;
                    continue;
                }
                What::Person(why) => Some(why),
                What::Wants => None,
            };
            let image = sources.resolve(&page.file, &found.shown);
            let outcome = match (why, &image) {
                (Some(why), _) => Err(why.to_owned()),
                (None, Err(why)) => Err((*why).to_owned()),
                (None, Ok(path)) => {
                    let digest = digests
                        .entry(path.clone())
                        .or_insert_with(|| digest_of(files, path));
                    digest.clone().and_then(|digest| {
                        let subject = Subject {
                            digest,
                            language: language.clone(),
                        };
                        let is_new = !asked.contains(&subject);
                        if is_new && asked.len() >= MAX_IMAGES {
                            return Err(format!(
                                "{MAX_IMAGES} images are described at a time: ask again for the rest"
                            ));
                        }
                        if is_new {
                            asked.insert(subject.clone());
                            if let Some(bytes) = files.read(path, picture::MAX_BYTES as u64) {
                                keep(&subject, &bytes);
                            }
                            sights.wanted.push(Wanted {
                                subject: subject.clone(),
                                image: path.clone(),
                                title: page.title.clone(),
                                around,
                            });
                        }
                        Ok((subject, path.clone()))
                    })
                }
            };
            sights.sights.push(Sight {
                file: page.file.clone(),
                line: found.line,
                place: found.place,
                outcome,
                image: image.ok(),
            });
        }
    }
    sights
}

/// The images of one file that have no text. An error without a place: there is nothing in it.
fn see(
    files: &dyn Files,
    path: &str,
    kind: Kind,
    bytes_left: &mut usize,
    places_left: &mut usize,
) -> Result<Seen, Option<Left>> {
    let left = |line: usize, why: &str| Left {
        file: path.to_owned(),
        line,
        image: None,
        why: why.to_owned(),
    };
    const MANY: &str = "the site has too many pages or images: this one was not looked at";
    let Some(bytes) = files.read(path, MAX_FILE) else {
        return Err(Some(left(
            1,
            "the file is larger than 1 MiB, and was not looked at",
        )));
    };
    // All pages of a site together, so that one that is made for it costs no more than its time.
    match bytes_left.checked_sub(bytes.len()) {
        Some(less) => *bytes_left = less,
        None => return Err(Some(left(1, MANY))),
    }
    let Ok(text) = String::from_utf8(bytes) else {
        return Err(Some(left(1, "the file is no UTF-8, and was not looked at")));
    };
    let page = Page::read(&text, kind).map_err(|unsure| {
        let line = 1 + text.as_bytes()[..unsure.at.min(text.len())]
            .iter()
            .filter(|byte| **byte == b'\n')
            .count();
        // Of a file without any there is nothing to say.
        let has_images = ["<img", "<Image", "<Picture", "!["]
            .iter()
            .any(|mark| text.contains(mark));
        has_images.then(|| {
            left(
                line,
                "the file cannot be read with certainty: look at its images by hand",
            )
        })
    })?;
    let title = page.title(kind).map(str::to_owned);
    let found = page.images(kind);
    match places_left.checked_sub(found.len()) {
        Some(less) => *places_left = less,
        None => return Err(Some(left(1, MANY))),
    }
    let found = found.into_iter().map(|found| {
        let around = page.around(&found.at, AROUND);
        (found, around)
    });
    Ok(Seen {
        file: path.to_owned(),
        said: page.language(kind).map(str::to_owned),
        title,
        found: found.collect(),
    })
}

fn digest_of(files: &dyn Files, path: &str) -> Result<String, String> {
    match files.read(path, picture::MAX_BYTES as u64) {
        Some(bytes) => Ok(hex::encode(Sha256::digest(bytes))),
        None => Err("its image has more than 10 MB: scale it down".to_owned()),
    }
}

/// A text for each subject, or why there is none.
type Texts = HashMap<Subject, Result<String, String>>;

/// Writes texts into a site as it is now. Answers the files that change, with their new contents.
fn write_all(
    files: &dyn Files,
    language: Option<&str>,
    texts: &Texts,
) -> (Vec<(String, Vec<u8>)>, Report) {
    const SINCE: &str = "it came or changed while images were described: ask again";
    let sights = look(files, language, &mut |_, _| {});
    let mut report = Report {
        decorative: sights.decorative,
        ..Report::default()
    };
    sights.left.into_iter().for_each(|left| report.leave(left));
    let mut edits: BTreeMap<String, Vec<(Sight, String)>> = BTreeMap::new();
    for sight in sights.sights {
        let text = match &sight.outcome {
            Err(why) => Err(why.clone()),
            Ok((subject, _)) => match texts.get(subject) {
                Some(text) => text.clone(),
                None => Err(SINCE.to_owned()),
            },
        };
        match text {
            Ok(text) => edits
                .entry(sight.file.clone())
                .or_default()
                .push((sight, text)),
            Err(why) => report.leave(left(sight, why)),
        }
    }
    let mut written = Vec::new();
    for (file, edits) in edits {
        match edited(files, &file, &edits) {
            Some(bytes) => {
                written.push((file, bytes));
                let mut lines = 0;
                for (sight, alt) in edits {
                    lines += sight.place.before.matches('\n').count();
                    let (subject, image) = match sight.outcome {
                        Ok(known) => known,
                        Err(_) => continue,
                    };
                    report.tell(Described {
                        line: sight.line + lines - sight.place.before.matches('\n').count(),
                        file: sight.file,
                        image,
                        alt,
                        language: subject.language,
                    });
                }
            }
            None => {
                for (sight, _) in edits {
                    let why = "the file cannot be written with certainty: give it a text by hand";
                    report.leave(left(sight, why.to_owned()));
                }
            }
        }
    }
    (written, report)
}

fn left(sight: Sight, why: String) -> Left {
    Left {
        file: sight.file,
        line: sight.line,
        image: sight.image,
        why,
    }
}

/// A file with its texts, if it is the same but for them.
fn edited(files: &dyn Files, path: &str, edits: &[(Sight, String)]) -> Option<Vec<u8>> {
    let kind = find::dialect_of(path)?;
    let text = String::from_utf8(files.read(path, MAX_FILE)?).ok()?;
    let mut sorted: Vec<&(Sight, String)> = edits.iter().collect();
    sorted.sort_by_key(|(sight, _)| sight.place.at.start);
    let mut new = String::with_capacity(text.len() + 128 * edits.len());
    let mut at = 0;
    for (sight, alt) in sorted {
        let place = &sight.place;
        new.push_str(text.get(at..place.at.start)?);
        new.push_str(&write::written(place, alt));
        at = place.at.end;
    }
    new.push_str(text.get(at..)?);
    let (before, after) = (Page::read(&text, kind).ok()?, Page::read(&new, kind).ok()?);
    let is_same = before.shape() == after.shape()
        && before.images(kind).len() == after.images(kind).len() + edits.len();
    is_same.then(|| new.into_bytes())
}

/// What would be done.
fn foreseen(sights: Sights) -> Report {
    let mut report = Report {
        decorative: sights.decorative,
        ..Report::default()
    };
    sights.left.into_iter().for_each(|left| report.leave(left));
    for sight in sights.sights {
        match &sight.outcome {
            Ok((subject, image)) => report.tell(Described {
                file: sight.file.clone(),
                line: sight.line,
                image: image.clone(),
                alt: String::new(),
                language: subject.language.clone(),
            }),
            Err(why) => {
                let why = why.clone();
                report.leave(self::left(sight, why));
            }
        }
    }
    report
}
