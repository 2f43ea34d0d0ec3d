//! Files into the Hub's large-file storage (Git LFS, and the Hub's own way in several parts).
//!
//! A file is streamed from the disk a piece at a time. What the storage has already is not sent again,
//! which is how an interrupted publication goes on. Within a file nothing tells what arrived, unless it
//! goes in parts ([`parts`](super::parts)): then it goes on with those that are not up yet. The storage is
//! another host: it gets what the Hub named for it and no token.

use std::{collections::BTreeSet, io, ops::Range, sync::Arc, time::Duration};

use futures_util::TryStreamExt;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use reqwest::{Body, Client, Response};
use tokio::sync::mpsc;
use url::{Origin, Url};

use super::{
    client::{Hub, PAUSES},
    error::HubError,
    lfs::Action,
    meter::{Meter, Stage},
    name::ModelId,
    parts::{Notes, Plan, Tags, part_number, tag},
    place::{self, storage},
    source::Source,
};
use crate::outbound::{self, Twice};

/// How often what does not move is looked at.
const LOOK: Duration = Duration::from_millis(250);
/// How often new addresses are asked for without that a file gets there: they are good for a while only.
const ROUNDS: usize = 3;

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
    /// It does not move; its addresses may be good still.
    Stalled(HubError),
    Final(HubError),
}

impl From<HubError> for Failure {
    fn from(error: HubError) -> Self {
        Self::Final(error)
    }
}

/// Sees to it that these files are in the storage. Adds to `sent` how many bytes went there.
pub(super) async fn store(
    hub: &Hub,
    id: &ModelId,
    files: &[Large<'_>],
    meter: &Arc<Meter>,
    sent: &mut u64,
) -> Result<(), HubError> {
    let mut seen = BTreeSet::new();
    let files: Vec<Large<'_>> = (files.iter().copied())
        .filter(|file| seen.insert(file.sha256))
        .collect();
    let asked: Vec<(&str, u64)> = (files.iter())
        .map(|file| (file.sha256, file.source.size()))
        .collect();
    let mut way = Way {
        hub,
        id,
        meter,
        clients: Vec::new(),
        sent,
    };
    let mut round = 0;
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
                // Those after it may need newer addresses by now.
                Ok(()) => round = 1,
                Err(Failure::Stale(error) | Failure::Stalled(error)) if round < ROUNDS => {
                    let error = &error as &dyn std::error::Error;
                    tracing::warn!(file = name, error, "an upload broke off; it is tried again");
                    continue 'rounds;
                }
                Err(Failure::Stale(error) | Failure::Stalled(error) | Failure::Final(error)) => {
                    return Err(error);
                }
            }
            tracing::info!(file = name, bytes = file.source.size(), "uploaded");
        }
        return Ok(());
    }
}

/// The way to the storage's hosts.
struct Way<'a> {
    hub: &'a Hub,
    id: &'a ModelId,
    meter: &'a Arc<Meter>,
    clients: Vec<(Origin, Client)>,
    /// Bytes that went there.
    sent: &'a mut u64,
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
        match Plan::of(upload, source.size()).map_err(refused)? {
            None => {
                let url = storage(self.hub, &upload.href).map_err(refused)?;
                let headers = headers_of(upload);
                self.put(source, &url, &headers, 0..source.size()).await?;
            }
            Some(asked) => self.in_parts(file, asked).await?,
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

    /// A file in parts, those that are up already left out.
    async fn in_parts(&mut self, file: &Large<'_>, asked: Plan) -> Result<(), Failure> {
        let id = self.id.to_string();
        let whose = [self.hub.endpoint.as_str(), &id, file.sha256];
        let folder = self.hub.unfinished.as_deref();
        let (notes, plan, mut tags) = Notes::open(folder, &whose, asked).await;
        let done = self.all_parts(file, &plan, notes.as_ref(), &mut tags).await;
        // With addresses that are good no more nobody goes on.
        if let (Some(notes), Ok(()) | Err(Failure::Stale(_))) = (notes, &done) {
            notes.forget().await;
        }
        done
    }

    async fn all_parts(
        &mut self,
        file: &Large<'_>,
        plan: &Plan,
        notes: Option<&Notes>,
        tags: &mut Tags,
    ) -> Result<(), Failure> {
        let source = file.source;
        let refused = |why| unsafe_address(source, why);
        let is_up = |part: &usize| tags.contains_key(part);
        let parts: Vec<_> = plan.parts().enumerate().collect();
        let there = parts.iter().filter(|(part, _)| is_up(part));
        let there: u64 = there.map(|(_, (_, range))| range.end - range.start).sum();
        self.meter.skip(there);
        for (part, (href, range)) in parts {
            if tags.contains_key(&part) {
                continue;
            }
            let url = storage(self.hub, href).map_err(refused)?;
            let answer = self.put(source, &url, &HeaderMap::new(), range).await?;
            let told = answer.headers().get(header::ETAG);
            let told = told.and_then(|told| told.to_str().ok()).and_then(tag);
            let told = told.ok_or_else(|| refused("a part has no tag"))?;
            if let Some(notes) = notes {
                notes.up(part, told).await;
            }
            tags.insert(part, told.to_owned());
        }
        let url = storage(self.hub, &plan.end).map_err(refused)?;
        let client = self.client(&url).await?;
        let tags: Vec<&str> = tags.values().map(String::as_str).collect();
        let answer = self.hub.complete(&client, &url, file.sha256, &tags).await?;
        judged("the end of the upload", answer.status, &answer.headers)
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
        let size = range.end - range.start;
        let (failed, mut failures) = mpsc::channel(1);
        let build = || {
            meter.set(begun_at);
            let (meter, failed) = (Arc::clone(meter), failed.clone());
            let body = (source.clone().stream(range.clone()))
                .inspect_ok(move |piece| meter.add(piece.len() as u64))
                .inspect_err(move |error| {
                    let copy = io::Error::new(error.kind(), error.to_string());
                    // One failure is enough.
                    let _full = failed.try_send(copy);
                });
            let put = client.put(url.clone()).headers(headers.clone());
            put.header(header::CONTENT_LENGTH, size)
                .body(Body::wrap_stream(body))
        };
        let answer = tokio::select! {
            biased;
            Some(error) = failures.recv() => return Err(Failure::Final(HubError::Local {
                file: source.name().to_owned(),
                source: error,
            })),
            answer = outbound::send(&PAUSES, Twice::Same, build) => answer,
            () = stands_still(meter, self.hub.still) => {
                return Err(Failure::Stalled(HubError::Stalled {
                    file: source.name().to_owned(),
                }));
            }
        };
        let answer = answer.map_err(|error| match place::is_refusal(&error) {
            true => unsafe_address(source, place::INSIDE),
            false => HubError::Unreachable {
                what: WHAT,
                source: error,
            },
        })?;
        judged(WHAT, answer.status(), answer.headers())?;
        *self.sent += size;
        Ok(answer)
    }

    async fn client(&mut self, url: &Url) -> Result<Client, HubError> {
        let origin = url.origin();
        if origin == self.hub.url.origin() {
            return Ok(self.hub.http.clone());
        }
        if let Some((_, known)) = self.clients.iter().find(|(known, _)| *known == origin) {
            return Ok(known.clone());
        }
        let made = place::client(self.hub, url).await?;
        self.clients.push((origin, made.clone()));
        Ok(made)
    }
}

/// What an answer of the storage means. Its words are not told: they may repeat the address, which lets
/// whoever has it upload.
fn judged(what: &'static str, status: StatusCode, headers: &HeaderMap) -> Result<(), Failure> {
    let refused = HubError::Refused {
        what,
        status,
        said: String::new(),
    };
    match status {
        status if status.is_success() => Ok(()),
        // How storages say that an address was good for a while.
        StatusCode::BAD_REQUEST
        | StatusCode::UNAUTHORIZED
        | StatusCode::FORBIDDEN
        | StatusCode::NOT_FOUND
        | StatusCode::GONE => Err(Failure::Stale(refused)),
        StatusCode::TOO_MANY_REQUESTS => Err(Failure::Final(HubError::TooMany {
            what,
            wait: outbound::retry_after(headers),
        })),
        status if status.is_server_error() => {
            Err(Failure::Final(HubError::Broken { what, status }))
        }
        _ => Err(Failure::Final(refused)),
    }
}

async fn stands_still(meter: &Meter, still: Duration) {
    while meter.still() < still {
        tokio::time::sleep(LOOK).await;
    }
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

    fn action(header: Value) -> Action {
        serde_json::from_value(json!({"href": "https://x.example", "header": header})).unwrap()
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
