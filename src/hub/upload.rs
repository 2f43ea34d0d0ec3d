//! Files into the Hub's large-file storage (Git LFS, and the Hub's own way in several parts).
//!
//! A file is streamed from the disk a piece at a time. What the storage has already is not sent again,
//! which is how an interrupted publication goes on; within a file nothing tells what arrived, so the one
//! that was cut off begins again. The storage is another host: it gets what the Hub named for it and no
//! token.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    ops::Range,
    pin::Pin,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use futures_util::{Stream, StreamExt, TryStreamExt, stream};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use reqwest::{Body, Client, Response};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncSeekExt},
    sync::mpsc,
};
use tokio_util::io::ReaderStream;
use url::{Host, Origin, Url};

use super::{
    client::{Action, Hub, PAUSES, client},
    error::HubError,
    meter::{Meter, Stage},
    name::ModelId,
    source::{Opened, Source},
};
use crate::{
    address::is_inside,
    outbound::{self, Twice, is_loopback},
    task,
};

/// What is held of a file at once.
const PIECE_BYTES: usize = 256 * 1024;
/// An upload that does not move for so long is given up. More than the longest pause between tries.
const STILL: Duration = Duration::from_secs(150);
/// How often that is looked at.
const LOOK: Duration = Duration::from_secs(1);
/// Opening a file takes so long at most.
const OPEN: Duration = Duration::from_secs(60);
/// How often new addresses are asked for: they are good for a while only.
const ROUNDS: usize = 3;
const MAX_PARTS: u64 = 10_000;
const MAX_TAG_BYTES: usize = 1024;

/// A file and the SHA-256 that it goes by.
#[derive(Debug, Clone, Copy)]
pub(super) struct Large<'a> {
    pub(super) source: &'a Source,
    pub(super) sha256: &'a str,
}

/// Why an upload did not work.
enum Failure {
    /// Addresses asked for anew may help.
    Stale(HubError),
    Final(HubError),
}

impl From<HubError> for Failure {
    fn from(error: HubError) -> Self {
        Self::Final(error)
    }
}

/// Sees to it that these files are in the storage; answers how many bytes went there.
pub(super) async fn store(
    hub: &Hub,
    id: &ModelId,
    files: &[Large<'_>],
    meter: &Arc<Meter>,
) -> Result<u64, HubError> {
    let mut seen = BTreeSet::new();
    let files: Vec<Large<'_>> = (files.iter().copied())
        .filter(|file| seen.insert(file.sha256))
        .collect();
    let asked: Vec<(&str, u64)> = (files.iter())
        .map(|file| (file.sha256, file.source.size()))
        .collect();
    let mut way = Way {
        hub,
        meter,
        clients: Vec::new(),
    };
    let (mut sent, mut round) = (0, 0);
    'rounds: loop {
        round += 1;
        let objects = hub.batch(id, &asked).await?;
        let missing = files.iter().zip(&objects).filter_map(|(file, object)| {
            let actions = object.actions.as_ref()?;
            Some((file, actions.upload.as_ref()?, actions.verify.as_ref()))
        });
        let missing: Vec<_> = missing.collect();
        let total = missing.iter().map(|(file, ..)| file.source.size()).sum();
        meter.begin(Stage::Uploading, total);
        for (file, upload, verify) in missing {
            let name = file.source.name();
            meter.file(name);
            match way.upload(file, upload, verify).await {
                Ok(()) => sent += file.source.size(),
                Err(Failure::Stale(error)) if round < ROUNDS => {
                    let error = &error as &dyn std::error::Error;
                    tracing::warn!(file = name, error, "an upload broke off; it begins again");
                    continue 'rounds;
                }
                Err(Failure::Stale(error) | Failure::Final(error)) => return Err(error),
            }
            tracing::info!(file = name, bytes = file.source.size(), "uploaded");
        }
        return Ok(sent);
    }
}

/// The way to the storage's hosts.
struct Way<'a> {
    hub: &'a Hub,
    meter: &'a Arc<Meter>,
    clients: Vec<(Origin, Client)>,
}

impl Way<'_> {
    async fn upload(
        &mut self,
        file: &Large<'_>,
        upload: &Action,
        verify: Option<&Action>,
    ) -> Result<(), Failure> {
        let source = file.source;
        let refused = |why| unsafe_address(source, why);
        let url = storage(self.hub, &upload.href).map_err(refused)?;
        match parts_of(upload, source.size()).map_err(refused)? {
            None => {
                let headers = headers_of(upload);
                self.put(source, &url, &headers, 0..source.size()).await?;
            }
            Some(parts) => {
                let mut tags = Vec::with_capacity(parts.len());
                for (href, range) in parts {
                    let url = storage(self.hub, href).map_err(refused)?;
                    let answer = self.put(source, &url, &HeaderMap::new(), range).await?;
                    let tag = answer.headers().get(header::ETAG);
                    let tag = tag.and_then(|tag| tag.to_str().ok());
                    let tag = tag.filter(|tag| !tag.is_empty() && tag.len() <= MAX_TAG_BYTES);
                    tags.push(tag.ok_or_else(|| refused("a part has no tag"))?.to_owned());
                }
                let client = self.client(&url).await?;
                self.hub.complete(&client, &url, file.sha256, &tags).await?;
            }
        }
        if let Some(verify) = verify {
            let url = self.hub.on_hub(&verify.href);
            let url = url.ok_or_else(|| refused("the check's is not the Hub's own"))?;
            let headers = headers_of(verify);
            let (sum, size) = (file.sha256, source.size());
            self.hub.verify(&url, headers, sum, size).await?;
        }
        Ok(())
    }

    /// Sends a range of a file; again from its beginning where that may help.
    async fn put(
        &mut self,
        source: &Source,
        url: &Url,
        headers: &HeaderMap,
        range: Range<u64>,
    ) -> Result<Response, Failure> {
        const WHAT: &str = "the upload";
        let client = self.client(url).await?;
        let meter = self.meter;
        let begun_at = meter.done();
        let (failed, mut failures) = mpsc::channel(1);
        let build = || {
            meter.set(begun_at);
            let (meter, failed) = (Arc::clone(meter), failed.clone());
            let body = content(source.clone(), range.clone())
                .inspect_ok(move |piece| meter.add(piece.len() as u64))
                .inspect_err(move |error| {
                    let copy = io::Error::new(error.kind(), error.to_string());
                    // One failure is enough.
                    let _full = failed.try_send(copy);
                });
            let put = client.put(url.clone()).headers(headers.clone());
            put.header(header::CONTENT_LENGTH, range.end - range.start)
                .body(Body::wrap_stream(body))
        };
        let answer = tokio::select! {
            biased;
            Some(error) = failures.recv() => return Err(Failure::Final(HubError::Local {
                file: source.name().to_owned(),
                source: error,
            })),
            answer = outbound::send(&PAUSES, Twice::Same, build) => answer,
            () = stands_still(meter) => return Err(Failure::Stale(HubError::Stalled {
                file: source.name().to_owned(),
            })),
        };
        let answer = answer.map_err(|source| HubError::Unreachable { what: WHAT, source })?;
        let status = answer.status();
        let refused = HubError::Refused {
            what: WHAT,
            status,
            said: String::new(),
        };
        match status {
            status if status.is_success() => Ok(answer),
            // How storages say that an address was good for a while.
            StatusCode::BAD_REQUEST
            | StatusCode::FORBIDDEN
            | StatusCode::NOT_FOUND
            | StatusCode::GONE => Err(Failure::Stale(refused)),
            StatusCode::TOO_MANY_REQUESTS => Err(HubError::TooMany { what: WHAT }.into()),
            status if status.is_server_error() => {
                Err(HubError::Broken { what: WHAT, status }.into())
            }
            _ => Err(refused.into()),
        }
    }

    async fn client(&mut self, url: &Url) -> Result<Client, HubError> {
        let origin = url.origin();
        if origin == self.hub.url.origin() {
            return Ok(self.hub.http.clone());
        }
        if let Some((_, known)) = self.clients.iter().find(|(known, _)| *known == origin) {
            return Ok(known.clone());
        }
        let made = client(url).await?;
        self.clients.push((origin, made.clone()));
        Ok(made)
    }
}

async fn stands_still(meter: &Meter) {
    while meter.still() < STILL {
        tokio::time::sleep(LOOK).await;
    }
}

/// A range of a file, opened when it is first asked for.
fn content(
    source: Source,
    range: Range<u64>,
) -> impl Stream<Item = io::Result<Bytes>> + Send + 'static {
    let opened = async move {
        let opened = task::blocking_apart("opening a file", OPEN, move || source.open()).await;
        let reader: Pin<Box<dyn AsyncRead + Send>> = match opened.map_err(io::Error::other)?? {
            Opened::File(file) => {
                let mut file = tokio::fs::File::from_std(file);
                file.seek(io::SeekFrom::Start(range.start)).await?;
                Box::pin(file)
            }
            Opened::Text(mut text) => {
                text.set_position(range.start);
                Box::pin(text)
            }
        };
        let reader = reader.take(range.end - range.start);
        Ok::<_, io::Error>(ReaderStream::with_capacity(reader, PIECE_BYTES))
    };
    stream::once(opened).try_flatten().boxed()
}

/// An address to which a file may be sent: another host by https, this machine only where the Hub is
/// on it too.
fn storage(hub: &Hub, href: &str) -> Result<Url, &'static str> {
    if let Some(url) = hub.on_hub(href) {
        return Ok(url);
    }
    let url: Url = href.parse().map_err(|_| "it is none")?;
    if !url.username().is_empty() || url.password().is_some() {
        return Err("it holds a password");
    }
    if is_loopback(&url) {
        return match is_loopback(&hub.url) {
            true => Ok(url),
            false => Err("it is of this machine"),
        };
    }
    let literal = match url.host() {
        Some(Host::Ipv4(ip)) => Some(ip.into()),
        Some(Host::Ipv6(ip)) => Some(ip.into()),
        _ => None,
    };
    if literal.is_some_and(is_inside) {
        return Err("it is of a network inside");
    }
    match url.scheme() == "https" {
        true => Ok(url),
        false => Err("it is not https"),
    }
}

/// The address of a part, and what of the file it is.
type Part<'a> = (&'a str, Range<u64>);

/// The parts in which a file is wanted, if it is.
fn parts_of(upload: &Action, size: u64) -> Result<Option<Vec<Part<'_>>>, &'static str> {
    let Some(chunk) = upload.header.get("chunk_size") else {
        return Ok(None);
    };
    let chunk = chunk.as_u64().or_else(|| chunk.as_str()?.parse().ok());
    let chunk = chunk
        .filter(|chunk| *chunk > 0)
        .ok_or("its parts have no size")?;
    let count = size.div_ceil(chunk);
    if count > MAX_PARTS {
        return Err("it has too many parts");
    }
    let named: BTreeMap<u64, &str> = (upload.header.iter())
        .filter_map(|(name, value)| Some((part_number(name)?, value.as_str()?)))
        .collect();
    if !named.keys().copied().eq(1..=count) {
        return Err("its parts are not those of the file");
    }
    let parts = named.into_values().zip(0..count).map(|(href, at)| {
        let from = at * chunk;
        (href, from..size.min(from + chunk))
    });
    Ok(Some(parts.collect()))
}

fn part_number(name: &str) -> Option<u64> {
    let is_plain = name.bytes().all(|b| b.is_ascii_digit());
    name.parse().ok().filter(|_| is_plain)
}

/// What the Hub wants to be sent along. How a request is framed and where it goes is ours to say.
fn headers_of(action: &Action) -> HeaderMap {
    let ours = [
        header::HOST,
        header::CONTENT_LENGTH,
        header::TRANSFER_ENCODING,
        header::CONNECTION,
        header::UPGRADE,
        header::EXPECT,
        header::TE,
        header::TRAILER,
    ];
    let headers = action.header.iter().filter_map(|(name, value)| {
        let name: HeaderName = name.parse().ok()?;
        let value: HeaderValue = value.as_str()?.parse().ok()?;
        let is_part = name == "chunk_size" || part_number(name.as_str()).is_some();
        (!is_part && !ours.contains(&name)).then_some((name, value))
    });
    headers.take(50).collect()
}

fn unsafe_address(source: &Source, why: &'static str) -> HubError {
    HubError::Address {
        file: source.name().to_owned(),
        why,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::hub::HubSettings;

    async fn hub(endpoint: &str) -> Hub {
        let settings = HubSettings {
            endpoint: endpoint.to_owned(),
            token: None,
        };
        Hub::new(settings).await.unwrap()
    }

    #[tokio::test]
    async fn files_go_to_addresses_outside_by_https_alone() {
        let public = hub("https://huggingface.co").await;
        for (href, is_fine) in [
            ("https://s3.example.com/bucket/x?signature=1", true),
            ("https://huggingface.co/x", true),
            ("http://s3.example.com/x", false),
            ("http://huggingface.co/x", false),
            ("https://127.0.0.1/x", false),
            ("http://127.0.0.1:8080/x", false),
            ("https://localhost/x", false),
            ("https://169.254.169.254/x", false),
            ("https://[fd00::1]/x", false),
            ("https://[::ffff:10.0.0.1]/x", false),
            (concat!("https://user:", "word@s3.example.com/x"), false),
            ("file:///etc/passwd", false),
            ("data:,x", false),
        ] {
            assert_eq!(storage(&public, href).is_ok(), is_fine, "{href}");
        }
        // A stand-in on this machine may name another port of it.
        let here = hub("http://127.0.0.1:9").await;
        assert!(storage(&here, "http://127.0.0.1:10/x").is_ok());
        assert!(storage(&here, "http://10.0.0.1/x").is_err());
    }

    fn action(header: Value) -> Action {
        serde_json::from_value(json!({"href": "https://x.example", "header": header})).unwrap()
    }

    #[test]
    fn parts_are_those_of_the_file() {
        let three = json!({"chunk_size": "10", "1": "a", "2": "b", "3": "c"});
        let upload = action(three);
        let parts = parts_of(&upload, 25).unwrap().unwrap();
        assert_eq!(parts, [("a", 0..10), ("b", 10..20), ("c", 20..25)]);
        assert_eq!(parts_of(&action(json!({})), 25).unwrap(), None);
        for (wrong, size) in [
            (json!({"chunk_size": 10, "1": "a", "2": "b", "3": "c"}), 31),
            (json!({"chunk_size": 10, "1": "a", "3": "c"}), 20),
            (json!({"chunk_size": 10, "1": "a", "+2": "c"}), 20),
            (json!({"chunk_size": 0, "1": "a"}), 20),
            (json!({"chunk_size": "ten", "1": "a"}), 20),
            (json!({"chunk_size": 1, "1": "a"}), u64::MAX),
        ] {
            assert!(parts_of(&action(wrong.clone()), size).is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_frames_a_request_is_not_the_hubs_to_say() {
        let headers = headers_of(&action(json!({
            "x-amz-acl": "private", "Host": "evil", "content-length": "1", "a\nb": "x", "n": 1,
            "Transfer-Encoding": "chunked", "chunk_size": "1", "1": "https://x", "bad": "a\nb",
        })));
        let names: Vec<&str> = headers.keys().map(HeaderName::as_str).collect();
        assert_eq!(names, ["x-amz-acl"]);
    }
}
