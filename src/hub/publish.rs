//! One publication: what the Hub has is compared with what it should have, and the difference goes there
//! as one commit.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use serde::Serialize;
use tokio_util::sync::CancellationToken;

use super::{
    calls::{Added, Entry, Me},
    card::{CARD, card, is_ours},
    client::Hub,
    error::HubError,
    folder::LoraFolder,
    meter::{Meter, Stage},
    name::{ModelId, ModelName},
    source::{MAX_INLINE_BYTES, Source, Sums},
    upload::{Large, store},
};
use crate::task;

/// How often it is compared anew because somebody else commits, or an answer was lost.
const ROUNDS: usize = 3;
/// Reading all files may take so long: a slow disk, gigabytes.
const READING: Duration = Duration::from_secs(4 * 3600);
/// Reading small ones.
const READING_LITTLE: Duration = Duration::from_secs(120);
/// What goes up inside of a commit, of all files together; the rest goes to the storage.
const MAX_INLINE_TOTAL: u64 = 4 * MAX_INLINE_BYTES;
/// A longer card on the Hub is somebody's own.
const MAX_CARD_BYTES: u64 = 1024 * 1024;

/// What is to be published, and how.
#[derive(Debug, Clone)]
pub struct Publication {
    pub name: ModelName,
    pub folder: LoraFolder,
    pub is_private: bool,
    /// Also where somebody edited the card that is there.
    pub replaces_card: bool,
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Published {
    /// With its owner.
    pub repository: String,
    pub url: String,
    pub private: bool,
    /// The repository was not there before.
    pub created: bool,
    /// Committed now; with none of them nothing was committed.
    pub files: Vec<String>,
    pub unchanged: Vec<String>,
    /// What went up as large files; less than the files' size where the Hub had some of it.
    pub uploaded_bytes: u64,
    /// The commit that holds it, where the Hub says which.
    pub commit: Option<String>,
    /// Somebody edited the card on the Hub, so it was kept.
    pub card_kept: bool,
}

impl Publication {
    /// Everything that goes into the repository; the card is the last.
    pub fn files(&self) -> Vec<Source> {
        let card = card(self.name.name(), &self.folder);
        let samples = self.folder.samples.iter().map(|sample| sample.file.clone());
        std::iter::once(self.folder.model.clone())
            .chain(samples)
            .chain([Source::text(CARD, card)])
            .collect()
    }
}

impl Hub {
    /// Publishes. What is there as it should be stays as it is; nothing is ever removed, and no
    /// repository's privacy changed. To be dropped is to be interrupted, at any point: the same again
    /// goes on from there.
    ///
    /// # Errors
    /// Each says what to do.
    pub async fn publish(
        &self,
        publication: &Publication,
        meter: &Arc<Meter>,
    ) -> Result<Published, HubError> {
        let me = self.me().await?;
        let id = self.owned(&publication.name, &me)?;
        let created = self.create(&id, &me, publication.is_private).await?;
        let mut attempt = Attempt {
            hub: self,
            publication,
            id,
            meter,
            sums: BTreeMap::new(),
            uploaded_bytes: 0,
            committed: Vec::new(),
        };
        let mut round = 0;
        loop {
            round += 1;
            match attempt.bring_up_to_date().await {
                Ok(published) => {
                    return Ok(Published {
                        created,
                        ..published
                    });
                }
                Err(error) if error.may_pass() && round < ROUNDS => {
                    let error = &error as &dyn std::error::Error;
                    tracing::warn!(error, "the publication is looked at anew");
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// The full name, if it is one of ours.
    fn owned(&self, name: &ModelName, me: &Me) -> Result<ModelId, HubError> {
        if me.is_read_only {
            let endpoint = self.endpoint.clone();
            return Err(HubError::ReadOnly { endpoint });
        }
        let mut ours = std::iter::once(&me.name).chain(&me.organisations);
        let owner = match name.owner() {
            None => Some(&me.name),
            Some(owner) => ours.clone().find(|our| our.eq_ignore_ascii_case(owner)),
        };
        match owner {
            Some(owner) => Ok(ModelId {
                owner: owner.clone(),
                name: name.name().to_owned(),
            }),
            None => Err(HubError::NotMember {
                owner: name.owner().unwrap_or_default().to_owned(),
                me: me.name.clone(),
                own: ours.by_ref().cloned().collect(),
            }),
        }
    }
}

struct Attempt<'a> {
    hub: &'a Hub,
    publication: &'a Publication,
    id: ModelId,
    meter: &'a Arc<Meter>,
    /// By name; of files that were read already.
    sums: BTreeMap<String, Sums>,
    uploaded_bytes: u64,
    /// Sent in a commit whose answer did not come.
    committed: Vec<String>,
}

impl Attempt<'_> {
    async fn bring_up_to_date(&mut self) -> Result<Published, HubError> {
        let hub = self.hub;
        self.meter.begin(Stage::Asking, 0);
        let info = hub.info(&self.id).await?;
        self.check_privacy(info.private)?;
        let mut files = self.publication.files();
        let names: BTreeSet<&str> = files.iter().map(Source::name).collect();
        let there = hub.files(&self.id, &names).await?;
        self.read(&files).await?;
        let card_kept = self.keeps_card(&there).await?;
        if card_kept {
            files.retain(|file| file.name() != CARD);
        }
        let (unchanged, changed): (Vec<_>, Vec<_>) = files
            .iter()
            .partition(|file| is_same(&self.sums[file.name()], file, there.get(file.name())));
        let names = |files: &[&Source]| -> Vec<String> {
            files.iter().map(|file| file.name().to_owned()).collect()
        };
        let mut published = Published {
            repository: self.id.to_string(),
            url: format!("{}/{}", hub.endpoint, self.id),
            private: info.private,
            created: false,
            files: names(&changed),
            unchanged: names(&unchanged),
            uploaded_bytes: self.uploaded_bytes,
            commit: info.sha.clone(),
            card_kept,
        };
        if changed.is_empty() {
            published.files = std::mem::take(&mut self.committed);
            published
                .unchanged
                .retain(|name| !published.files.contains(name));
            return Ok(published);
        }
        let added = self.bring(&changed).await?;
        published.uploaded_bytes = self.uploaded_bytes;
        self.meter.begin(Stage::Committing, 0);
        self.committed = names(&changed);
        let summary = format!("Publish {}", self.publication.folder.model.name());
        let commit = hub.commit(&self.id, &summary, info.sha.as_deref(), &added);
        published.commit = commit.await?.commit_oid;
        Ok(published)
    }

    fn check_privacy(&self, is_private: bool) -> Result<(), HubError> {
        let (id, endpoint) = (self.id.clone(), self.hub.endpoint.clone());
        match (self.publication.is_private, is_private) {
            (true, false) => Err(HubError::IsPublic { id, endpoint }),
            (false, true) => Err(HubError::IsPrivate { id, endpoint }),
            _ => Ok(()),
        }
    }

    /// Reads what was not read yet, for its sums.
    async fn read(&mut self, files: &[Source]) -> Result<(), HubError> {
        let unread = files
            .iter()
            .filter(|file| !self.sums.contains_key(file.name()));
        let unread: Vec<Source> = unread.cloned().collect();
        let total = unread.iter().map(Source::size).sum();
        self.meter.begin(Stage::Reading, total);
        let stop = CancellationToken::new();
        // Whoever does not wait any more wants no reading either.
        let _stops = stop.clone().drop_guard();
        let meter = Arc::clone(self.meter);
        let read = move || {
            let sums = unread.into_iter().map(|file| {
                meter.file(file.name());
                match file.sums(&meter, &stop) {
                    Ok(sums) => Ok((file.name().to_owned(), sums)),
                    Err(source) => Err(local(&file, source)),
                }
            });
            sums.collect::<Result<Vec<_>, _>>()
        };
        let sums = blocking("reading the files", READING, read).await??;
        self.sums.extend(sums);
        Ok(())
    }

    /// Is the card on the Hub somebody's own, which stays?
    async fn keeps_card(&self, there: &BTreeMap<String, Entry>) -> Result<bool, HubError> {
        let Some(entry) = there.get(CARD) else {
            return Ok(false);
        };
        let is_same = self.sums[CARD].blob.as_deref() == Some(&*entry.oid);
        if is_same || self.publication.replaces_card {
            return Ok(false);
        }
        if entry.lfs.is_some() || entry.size > MAX_CARD_BYTES {
            return Ok(true);
        }
        Ok(!is_ours(&self.hub.text(&self.id, CARD).await?))
    }

    /// Sees to it that the Hub has the content of these files; what is left for the commit.
    async fn bring(&mut self, changed: &[&Source]) -> Result<Vec<Added>, HubError> {
        let sources: Vec<Source> = changed.iter().copied().cloned().collect();
        let look = move || {
            let samples = sources.iter().map(|file| {
                let sample = file.sample().map_err(|source| local(file, source))?;
                Ok((file.name().to_owned(), file.size(), sample))
            });
            samples.collect::<Result<Vec<_>, _>>()
        };
        let samples = blocking("reading samples", READING_LITTLE, look).await??;
        let asked: Vec<(&str, u64, Vec<u8>)> = (samples.iter())
            .map(|(name, size, sample)| (name.as_str(), *size, sample.clone()))
            .collect();
        let wishes = self.hub.wishes(&self.id, &asked).await?;
        let (mut large, mut inline, mut inline_total) = (Vec::new(), Vec::new(), 0);
        for (source, wish) in changed.iter().copied().zip(wishes) {
            if wish.should_ignore {
                return Err(HubError::Ignored {
                    id: self.id.clone(),
                    file: source.name().to_owned(),
                    endpoint: self.hub.endpoint.clone(),
                });
            }
            // The storage takes nothing that is empty.
            let fits = source.size() <= MAX_INLINE_BYTES
                && inline_total + source.size() <= MAX_INLINE_TOTAL;
            if source.size() == 0 || fits && !wish.is_large() {
                inline_total += source.size();
                inline.push(source.clone());
            } else {
                large.push(Large {
                    source,
                    sha256: &self.sums[source.name()].sha256,
                });
            }
        }
        if !large.is_empty() {
            let sent = &mut self.uploaded_bytes;
            store(self.hub, &self.id, &large, self.meter, sent).await?;
        }
        let mut added: Vec<Added> = large
            .iter()
            .map(|file| Added::Large {
                path: file.source.name().to_owned(),
                sha256: file.sha256.to_owned(),
                size: file.source.size(),
            })
            .collect();
        let read = move || {
            let contents = inline.iter().map(|file| {
                let content = file.whole().map_err(|source| local(file, source))?;
                let path = file.name().to_owned();
                Ok(Added::Inline { path, content })
            });
            contents.collect::<Result<Vec<_>, _>>()
        };
        added.extend(blocking("reading small files", READING_LITTLE, read).await??);
        Ok(added)
    }
}

/// Is a file on the Hub what it should be?
fn is_same(sums: &Sums, source: &Source, there: Option<&Entry>) -> bool {
    let Some(there) = there else { return false };
    match &there.lfs {
        Some(large) => large.oid == sums.sha256,
        None => there.size == source.size() && sums.blob.as_deref() == Some(&*there.oid),
    }
}

fn local(file: &Source, source: std::io::Error) -> HubError {
    HubError::Local {
        file: file.name().to_owned(),
        source,
    }
}

async fn blocking<T: Send + 'static>(
    what: &'static str,
    deadline: Duration,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, HubError> {
    let done = task::blocking_apart(what, deadline, work).await;
    done.map_err(|error| HubError::Local {
        file: what.to_owned(),
        source: std::io::Error::other(error),
    })
}
