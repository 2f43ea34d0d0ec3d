//! Git's protocol for large files (LFS), as the Hub speaks it: what is to be sent where, and that it was.

use std::collections::BTreeMap;

use reqwest::{Method, RequestBuilder, StatusCode, header};
use serde::Deserialize;
use serde_json::{Value, json};
use url::Url;

use super::{
    client::{ANSWER, Answer, COMMIT_ANSWER, Hub, malformed, said},
    error::HubError,
    name::ModelId,
};
use crate::outbound::Twice;

const LFS_JSON: &str = "application/vnd.git-lfs+json";

/// What is to be done with an object of the large-file storage.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Object {
    pub(super) oid: String,
    /// None: it is there already.
    pub(super) actions: Option<Actions>,
    error: Option<ObjectError>,
}

#[derive(Debug, Clone, Deserialize)]
struct ObjectError {
    #[serde(default)]
    message: String,
}

#[derive(Debug, Clone, Deserialize)]
pub(super) struct Actions {
    pub(super) upload: Option<Action>,
    pub(super) verify: Option<Action>,
}

#[derive(Debug, Clone, Deserialize)]
pub(super) struct Action {
    pub(super) href: String,
    #[serde(default)]
    pub(super) header: BTreeMap<String, Value>,
}

impl Hub {
    /// What is to be done so that these objects (SHA-256, size) are in the large-file storage.
    pub(super) async fn batch(
        &self,
        id: &ModelId,
        objects: &[(&str, u64)],
    ) -> Result<Vec<Object>, HubError> {
        #[derive(Deserialize)]
        struct Batch {
            objects: Vec<Object>,
        }
        const WHAT: &str = "the wish to upload";
        let asked = objects
            .iter()
            .map(|(oid, size)| json!({"oid": oid, "size": size}));
        let asked = json!({
            "operation": "upload",
            "transfers": ["basic", "multipart"],
            "objects": asked.collect::<Vec<_>>(),
            "hash_algo": "sha256",
            "ref": {"name": "main"},
        });
        let url = self.at(&format!("/{id}.git/info/lfs/objects/batch"));
        let build = || lfs_body(self.request(Method::POST, &url), &asked).timeout(ANSWER);
        let answer = self.call(WHAT, Twice::Same, build).await?;
        let told: Batch = self.success(answer, WHAT)?.json(WHAT)?;
        for object in &told.objects {
            if let Some(error) = &object.error {
                return Err(HubError::Refused {
                    what: WHAT,
                    status: StatusCode::OK,
                    said: said(&error.message),
                });
            }
        }
        let mut told: BTreeMap<String, Object> = (told.objects.into_iter())
            .map(|object| (object.oid.clone(), object))
            .collect();
        let objects = objects.iter().map(|(oid, _)| {
            told.remove(*oid)
                .ok_or_else(|| malformed(WHAT, "an object is missing in it"))
        });
        objects.collect()
    }

    /// Tells that an object is uploaded.
    pub(super) async fn verify(
        &self,
        url: &Url,
        headers: header::HeaderMap,
        oid: &str,
        size: u64,
    ) -> Result<(), HubError> {
        const WHAT: &str = "the check of the upload";
        let asked = json!({"oid": oid, "size": size});
        let build = || {
            lfs_body(self.request(Method::POST, url), &asked)
                .headers(headers.clone())
                .timeout(ANSWER)
        };
        let answer = self.call(WHAT, Twice::Same, build).await?;
        self.success(answer, WHAT).map(drop)
    }

    /// Tells that all parts of an object are uploaded: their tags, in order. The address itself says
    /// who may; what the answer means is the uploader's to judge.
    pub(super) async fn complete(
        &self,
        http: &reqwest::Client,
        url: &Url,
        oid: &str,
        tags: &[&str],
    ) -> Result<Answer, HubError> {
        const WHAT: &str = "the end of the upload";
        let parts = tags.iter().zip(1..);
        let parts = parts.map(|(tag, number)| json!({"partNumber": number, "etag": tag}));
        let asked = json!({"oid": oid, "parts": parts.collect::<Vec<_>>()});
        let build = || lfs_body(http.post(url.clone()), &asked).timeout(COMMIT_ANSWER);
        self.call(WHAT, Twice::Same, build).await
    }
}

fn lfs_body(request: RequestBuilder, body: &Value) -> RequestBuilder {
    let request = request.header(header::ACCEPT, LFS_JSON);
    request
        .header(header::CONTENT_TYPE, LFS_JSON)
        .body(body.to_string())
}
