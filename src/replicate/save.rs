//! Fetching what a prediction made: bounded, from Replicate's own places alone, under names of ours.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use bytes::Bytes;
use reqwest::{Response, header};
use serde::Serialize;
use tokio::io::AsyncWriteExt as _;
use url::Url;

use super::{
    Made, Model, Prediction, Replicate, ReplicateError,
    api::{AGENT, PAUSES},
    output::{Found, Source, ending, essence, plain},
};
use crate::outbound::{self, Twice};

/// Where Replicate keeps what predictions made.
const PLACES: [&str; 2] = ["replicate.delivery", "replicate.com"];
/// How often one place may point to another.
const MAX_MOVES: usize = 3;
/// How often a file is begun anew that broke off.
const MAX_TRIES: usize = 3;
/// Files of one name.
const MAX_NAMESAKES: usize = 1000;

/// A file on the disk.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Saved {
    pub path: PathBuf,
    pub bytes: u64,
    pub media_type: String,
}

/// What became of a prediction's files.
#[derive(Debug, Default)]
pub struct SavedAll {
    pub files: Vec<Saved>,
    /// Why others were not saved.
    pub failed: Vec<ReplicateError>,
}

impl Prediction {
    /// What it made.
    pub fn made(&self, model: &Model) -> Made {
        Made::read(&self.output, model.gives())
    }
}

impl Replicate {
    /// Saves all files of a prediction in a folder, each at most `limit` bytes. Nothing that is there
    /// is overwritten.
    pub async fn save(
        &self,
        model: &Model,
        prediction: &Prediction,
        made: &Made,
        folder: &Path,
        limit: u64,
    ) -> SavedAll {
        let mut all = SavedAll::default();
        let id = plain(&prediction.id);
        let stem = format!("{}-{id}", plain(model.name.short()));
        for (index, found) in made.files.iter().enumerate() {
            let stem = match &found.key {
                Some(key) => format!("{stem}-{key}"),
                None if made.files.len() == 1 => stem.clone(),
                None => format!("{stem}-{}", index + 1),
            };
            match self.save_one(found, folder, &stem, limit).await {
                Ok(saved) => all.files.push(saved),
                Err(error) => all.failed.push(error),
            }
        }
        all
    }

    /// Fetches the first `most` files of a prediction into memory, each at most `limit` bytes.
    ///
    /// # Errors
    /// That of the first that cannot be had.
    pub async fn fetch(
        &self,
        made: &Made,
        limit: u64,
        most: usize,
    ) -> Result<Vec<Bytes>, ReplicateError> {
        let mut all = Vec::new();
        for found in made.files.iter().take(most) {
            let mut bytes = Vec::new();
            match &found.source {
                Source::Data { bytes: data, .. } => bytes.clone_from(data),
                Source::Url(url) => {
                    let mut answer = self.open(url, limit).await?;
                    while let Some(piece) = answer.chunk().await.map_err(broke_off)? {
                        if (bytes.len() + piece.len()) as u64 > limit {
                            return Err(too_large(limit));
                        }
                        bytes.extend_from_slice(&piece);
                    }
                }
            }
            if bytes.len() as u64 > limit {
                return Err(too_large(limit));
            }
            all.push(bytes.into());
        }
        Ok(all)
    }

    async fn save_one(
        &self,
        found: &Found,
        folder: &Path,
        stem: &str,
        limit: u64,
    ) -> Result<Saved, ReplicateError> {
        let part = folder.join(format!(".{stem}-{}.part", uuid::Uuid::new_v4().simple()));
        let written = match &found.source {
            Source::Data { media_type, bytes } => {
                let size = bytes.len() as u64;
                let failed = failed(&part);
                match size > limit {
                    true => Err(too_large(limit)),
                    false => tokio::fs::write(&part, bytes)
                        .await
                        .map(|()| (size, media_type.clone(), String::new()))
                        .map_err(failed),
                }
            }
            Source::Url(url) => {
                let written = self.write(url, &part, limit).await;
                written.map(|(size, media_type)| (size, media_type, url.path().to_owned()))
            }
        };
        let named = match written {
            Ok((bytes, media_type, address)) => {
                name(&part, folder, stem, ending(&media_type, &address)).map(|path| Saved {
                    path,
                    bytes,
                    media_type,
                })
            }
            Err(error) => Err(error),
        };
        // Under its own name or not at all.
        fs::remove_file(&part).ok();
        named
    }

    /// Streams a file to the disk; its size and type.
    async fn write(
        &self,
        url: &Url,
        part: &Path,
        limit: u64,
    ) -> Result<(u64, String), ReplicateError> {
        let mut tries = 0;
        loop {
            tries += 1;
            let mut answer = self.open(url, limit).await?;
            let media_type = answer.headers().get(header::CONTENT_TYPE);
            let media_type = media_type.and_then(|kind| kind.to_str().ok());
            let media_type = essence(media_type.unwrap_or_default());
            let file = tokio::fs::File::create(part).await.map_err(failed(part))?;
            let mut file = tokio::io::BufWriter::new(file);
            let mut size = 0;
            loop {
                match answer.chunk().await {
                    Ok(Some(piece)) => {
                        size += piece.len() as u64;
                        if size > limit {
                            return Err(too_large(limit));
                        }
                        file.write_all(&piece).await.map_err(failed(part))?;
                    }
                    Ok(None) => {
                        file.flush().await.map_err(failed(part))?;
                        return Ok((size, media_type));
                    }
                    Err(_) if tries < MAX_TRIES => break,
                    Err(error) => return Err(broke_off(error)),
                }
            }
        }
    }

    /// Opens a file at one of Replicate's places.
    async fn open(&self, url: &Url, limit: u64) -> Result<Response, ReplicateError> {
        let mut url = url.clone();
        for _ in 0..=MAX_MOVES {
            // Somebody's name and password would go along.
            if !url.username().is_empty() || url.password().is_some() {
                return Err(not_fetched("its address holds a password".to_owned()));
            }
            let http = match self.is_own(&url) || self.is_beside(&url) {
                true => self.http(),
                false => {
                    self.check_place(&url)?;
                    self.elsewhere(&url).await?
                }
            };
            let get = || match self.is_kept_file(&url) {
                true => self.request(http.get(url.clone())),
                false => http.get(url.clone()).header("user-agent", AGENT),
            };
            let answer = outbound::send(&PAUSES, Twice::Same, get).await;
            let answer = answer.map_err(broke_off)?;
            let status = answer.status();
            if status.is_redirection() {
                let to = answer.headers().get(header::LOCATION);
                let to = to.and_then(|to| url.join(to.to_str().ok()?).ok());
                url = to.ok_or_else(|| not_fetched("its place points nowhere".to_owned()))?;
                continue;
            }
            if !status.is_success() {
                let why = format!(
                    "its place answers {}; Replicate keeps outputs for an hour",
                    status.as_u16()
                );
                return Err(not_fetched(why));
            }
            if answer.content_length().is_some_and(|size| size > limit) {
                return Err(too_large(limit));
            }
            return Ok(answer);
        }
        Err(not_fetched("its place points on and on".to_owned()))
    }

    /// A model may name any address as its output: only Replicate's are asked, so that nobody reaches
    /// what is inside through us.
    fn check_place(&self, url: &Url) -> Result<(), ReplicateError> {
        let host = url.host_str().unwrap_or_default().to_ascii_lowercase();
        let is_ours = PLACES.iter().any(|place| {
            let below = host.strip_suffix(place);
            below.is_some_and(|below| below.is_empty() || below.ends_with('.'))
        });
        if is_ours && url.scheme() == "https" && url.port().is_none() {
            return Ok(());
        }
        let host: String = host.chars().take(100).collect();
        Err(not_fetched(format!(
            "it lies at {host:?}, which is none of Replicate's places; it stands in the prediction, \
             fetch it from there if you trust it"
        )))
    }
}

/// Gives a written file a name that nobody has; its path.
fn name(part: &Path, folder: &Path, stem: &str, ending: &str) -> Result<PathBuf, ReplicateError> {
    for number in 1..=MAX_NAMESAKES {
        let path = match number {
            1 => folder.join(format!("{stem}.{ending}")),
            _ => folder.join(format!("{stem}-{number}.{ending}")),
        };
        // Unlike a rename, it takes nobody's place.
        match fs::hard_link(part, &path) {
            Ok(()) => return Ok(path),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            // A file system without links: take the place first, then fill it.
            Err(_) => match fs::File::create_new(&path) {
                Ok(_) => {
                    fs::rename(part, &path).map_err(failed(&path))?;
                    return Ok(path);
                }
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(failed(&path)(error)),
            },
        }
    }
    Err(failed(folder)(io::ErrorKind::AlreadyExists.into()))
}

fn failed(path: &Path) -> impl Fn(io::Error) -> ReplicateError + use<> {
    let path = path.to_owned();
    move |source| ReplicateError::File {
        path: path.clone(),
        source,
    }
}

fn not_fetched(why: String) -> ReplicateError {
    ReplicateError::Download { why }
}

fn too_large(limit: u64) -> ReplicateError {
    not_fetched(format!(
        "it has more than the {} MB that are taken",
        limit / 1_000_000
    ))
}

fn broke_off(error: reqwest::Error) -> ReplicateError {
    let error = error.without_url();
    not_fetched(format!(
        "its transfer broke off ({error}); try again within the hour"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn outputs_are_of_replicate_s_places_or_beside_a_stand_in() {
        let at = async |base: &str| {
            let token = crate::config::Secret::new("r8_x".to_owned());
            Replicate::connect(base, Some(token)).await
        };
        for (base, places) in [
            (
                "https://api.replicate.com",
                &[
                    ("https://replicate.delivery/x", true),
                    ("http://replicate.delivery/x", false),
                    ("http://127.0.0.1:9/x", false),
                    ("https://localhost/x", false),
                ][..],
            ),
            (
                "http://127.0.0.1:9",
                &[
                    ("http://127.0.0.1:10/x", true),
                    ("http://files.localhost:10/x", true),
                    ("https://pbxt.replicate.delivery/x", true),
                    ("http://10.0.0.1/x", false),
                    // It would be asked without certificates.
                    ("https://localhost:10/x", false),
                ],
            ),
        ] {
            let replicate = at(base).await.unwrap();
            for (place, is_fine) in places {
                let url = place.parse().unwrap();
                let may = replicate.is_beside(&url) || replicate.check_place(&url).is_ok();
                assert_eq!(may, *is_fine, "{base} {place}");
            }
        }
        // Where the token could be read on its way nobody is asked.
        let refused = at("http://replicate.example.com").await.unwrap_err();
        assert!(refused.to_string().contains("is not https"), "{refused}");
    }
}
