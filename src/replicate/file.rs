//! Files as input: small ones in the request itself, others sent to Replicate first.

use std::{
    io,
    path::{Path, PathBuf},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use reqwest::Body;
use serde::Deserialize;
use tokio::{fs, io::AsyncReadExt as _};
use tokio_util::io::ReaderStream;

use super::{Replicate, ReplicateError, api::PAUSES, output::media_type_of};

/// Largest file that goes into the request: Replicate's own advice for data URLs.
const MAX_INLINE: u64 = 256 << 10;
/// Largest file that Replicate takes.
const MAX_FILE: u64 = 100 << 20;
/// Longest name that goes along.
const MAX_NAME: usize = 100;

/// A file for a parameter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileInput {
    /// The parameter.
    pub param: String,
    pub path: PathBuf,
}

#[derive(Deserialize)]
struct FileWire {
    urls: Urls,
}

#[derive(Deserialize)]
struct Urls {
    get: String,
}

impl FileInput {
    /// Whether it can be sent; its size.
    ///
    /// # Errors
    /// If it is no file, or too large for Replicate.
    pub async fn check(&self) -> Result<u64, ReplicateError> {
        let about = fs::metadata(&self.path).await.map_err(self.failed())?;
        let wrong = |why: &str| ReplicateError::BadFile {
            path: self.path.clone(),
            why: why.to_owned(),
        };
        // Opening a pipe could wait for ever.
        if !about.is_file() {
            return Err(wrong("it is no file"));
        }
        match about.len() {
            0 => Err(wrong("it is empty")),
            size if size > MAX_FILE => Err(wrong(
                "it has more than the 100 MiB that Replicate takes; put it on the web and give its \
                 https:// URL as the parameter",
            )),
            size => Ok(size),
        }
    }

    fn failed(&self) -> impl Fn(io::Error) -> ReplicateError {
        let path = self.path.clone();
        move |source| ReplicateError::File {
            path: path.clone(),
            source,
        }
    }
}

impl Replicate {
    /// Sends a file; what stands for it among the parameters.
    ///
    /// # Errors
    /// [`ReplicateError`].
    pub async fn send_file(&self, input: &FileInput) -> Result<String, ReplicateError> {
        let size = input.check().await?;
        let media_type = media_type_of(&input.path);
        if size > MAX_INLINE {
            return self.upload(input, size, media_type).await;
        }
        let file = fs::File::open(&input.path).await.map_err(input.failed())?;
        let mut data = Vec::new();
        // It may have grown meanwhile.
        let read = file.take(MAX_INLINE + 1).read_to_end(&mut data).await;
        read.map_err(input.failed())?;
        Ok(format!(
            "data:{media_type};base64,{}",
            STANDARD.encode(data)
        ))
    }

    /// As a form with one field, read from the disk as it goes.
    async fn upload(
        &self,
        input: &FileInput,
        size: u64,
        media_type: &str,
    ) -> Result<String, ReplicateError> {
        let boundary = format!("greenroom-{}", uuid::Uuid::new_v4().simple());
        let name = plain_name(&input.path);
        let head = Bytes::from(format!(
            "--{boundary}\r\ncontent-disposition: form-data; name=\"content\"; \
             filename=\"{name}\"\r\ncontent-type: {media_type}\r\n\r\n"
        ));
        let tail = Bytes::from(format!("\r\n--{boundary}--\r\n"));
        let length = head.len() as u64 + size + tail.len() as u64;
        let mut pauses = PAUSES.into_iter();
        loop {
            let file = fs::File::open(&input.path).await.map_err(input.failed())?;
            let (head, tail) = (head.clone(), tail.clone());
            let parts = stream::iter([Ok(head)])
                .chain(ReaderStream::new(file.take(size)))
                .chain(stream::iter([Ok(tail)]));
            let at = self.at("/v1/files");
            let request = self
                .request(self.http().post(at))
                .header(
                    "content-type",
                    format!("multipart/form-data; boundary={boundary}"),
                )
                .header("content-length", length)
                .body(Body::wrap_stream(parts));
            let error = match request.send().await {
                Ok(answer) if answer.status().is_success() => {
                    let found: FileWire = self.read(answer, "the file").await?;
                    return checked(found.urls.get);
                }
                Ok(answer) => self.refusal(answer).await,
                Err(source) => self.unreachable(Some(source)),
            };
            // A file that came twice costs nothing.
            match pauses.next().filter(|_| error.is_passing()) {
                Some(pause) => tokio::time::sleep(pause).await,
                None => return Err(error),
            }
        }
    }
}

/// Only handed back to Replicate; it has to be an address all the same.
fn checked(url: String) -> Result<String, ReplicateError> {
    match url.parse::<url::Url>() {
        Ok(parsed) if matches!(parsed.scheme(), "https" | "http") => Ok(url),
        _ => Err(ReplicateError::Answer { what: "the file" }),
    }
}

/// Its last part without anything that means something in a header.
fn plain_name(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    let name: String = name
        .chars()
        .map(|c| if fits(c) { c } else { '_' })
        .collect();
    // The ending is at the end.
    let start = name.len().saturating_sub(MAX_NAME);
    name[start..].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_say_nothing_in_a_header() {
        for (path, name) in [
            ("/a/b/photo 1.png", "photo_1.png"),
            ("x\"\r\ncontent-type: a.png", "x___content-type__a.png"),
            ("grün.jpg", "gr_n.jpg"),
        ] {
            assert_eq!(plain_name(Path::new(path)), name);
        }
        let long = format!("{}.webp", "a".repeat(400));
        let name = plain_name(Path::new(&long));
        assert!(name.len() == MAX_NAME && name.ends_with("a.webp"));
    }

    #[tokio::test]
    async fn what_cannot_be_sent_is_refused_before() {
        let folder = tempfile::tempdir().unwrap();
        let input = |name: &str| FileInput {
            param: "image".to_owned(),
            path: folder.path().join(name),
        };
        std::fs::write(folder.path().join("empty"), "").unwrap();
        let large = std::fs::File::create(folder.path().join("large")).unwrap();
        large.set_len(MAX_FILE + 1).unwrap();
        for (name, said) in [
            ("none", "none"),
            ("", "no file"),
            ("empty", "empty"),
            ("large", "100 MiB"),
        ] {
            let error = input(name).check().await.unwrap_err().to_string();
            assert!(error.contains(said), "{name}: {error}");
        }
    }
}
