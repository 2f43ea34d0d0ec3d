//! Pull requests, by GitHub's REST API.
//!
//! The token goes to the configured address of the API and nowhere else: a redirect (of a renamed
//! repository) is followed on that host alone.

use std::time::Duration;

use http::{Method, StatusCode, header};
use reqwest::{Client, Response, redirect};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep, timeout_at};
use url::Url;

use super::{
    RemoteError, RemoteErrorKind, RemoteUse, Remotes, Source,
    remote::{client, follow, innermost, words},
};

/// Longest wait for the API, with all tries.
const DEADLINE: Duration = Duration::from_secs(60);
/// Waits before another try at a network that failed.
const PAUSES: [Duration; 2] = [Duration::from_millis(500), Duration::from_secs(2)];
/// Most bytes of an answer.
const MAX_ANSWER: usize = 4 << 20;

/// Where pull requests are opened.
#[derive(Debug, Clone)]
pub struct GitHub {
    api: Url,
    remotes: Remotes,
}

/// What a pull request is to say.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PullRequestText {
    pub title: String,
    pub body: String,
    /// The branch that it asks to be merged into; else the repository's default one.
    pub base: Option<String>,
}

/// A pull request that is open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PullRequest {
    pub url: String,
    pub number: u64,
    /// It was not there before.
    pub created: bool,
}

/// Why pull requests cannot be opened for a site at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NoPullRequests {
    #[error(
        "pullRequest needs a site whose repository is on GitHub; publish without it, and open the \
         pull request where the repository is"
    )]
    NotGitHub,
    #[error("pullRequest needs an access token; the operator must set GITHUB_TOKEN")]
    NoToken,
}

/// A repository on GitHub.
#[derive(Debug, Clone)]
pub struct GitHubRepository {
    github: GitHub,
    token: String,
    owner: String,
    name: String,
}

impl GitHub {
    /// `api` is the base address of the REST API; the token is the one of `remotes`.
    pub fn new(api: Url, remotes: Remotes) -> Self {
        Self { api, remotes }
    }

    /// The repository that a site came from. Asks nobody.
    ///
    /// # Errors
    /// [`NoPullRequests`].
    pub fn repository(&self, origin: &Source) -> Result<GitHubRepository, NoPullRequests> {
        let Source::Remote(url) = origin else {
            return Err(NoPullRequests::NotGitHub);
        };
        let path = url.path().trim_matches('/');
        let path = path.strip_suffix(".git").unwrap_or(path);
        let (owner, name) = path.split_once('/').unwrap_or_default();
        if !self.remotes.knows(url) || owner.is_empty() || name.is_empty() || name.contains('/') {
            return Err(NoPullRequests::NotGitHub);
        }
        let token = self.remotes.secret().ok_or(NoPullRequests::NoToken)?;
        Ok(GitHubRepository {
            github: self.clone(),
            token: token.to_owned(),
            owner: owner.to_owned(),
            name: name.to_owned(),
        })
    }
}

/// What the API sends of a pull request.
#[derive(Debug, Deserialize)]
struct Sent {
    html_url: String,
    number: u64,
}

impl Sent {
    fn known(self, created: bool) -> PullRequest {
        PullRequest {
            url: self.html_url,
            number: self.number,
            created,
        }
    }
}

#[derive(Debug, Deserialize)]
struct Repository {
    /// Owner and name, also after it was renamed.
    full_name: String,
    default_branch: String,
}

impl GitHubRepository {
    /// Opens a pull request for `branch`, or finds the one that is open. `None`: the base has
    /// everything that the branch has.
    ///
    /// # Errors
    /// [`RemoteError`]; asking again is safe.
    pub async fn open_pull_request(
        &self,
        branch: &str,
        text: &PullRequestText,
    ) -> Result<Option<PullRequest>, RemoteError> {
        let deadline = Instant::now() + DEADLINE;
        let client = self.client().await?;
        let tried = async {
            for pause in PAUSES {
                match self.try_open(&client, branch, text).await {
                    // Whether it was created is seen by the next try.
                    Err(Failure::Network(_)) => sleep(pause).await,
                    outcome => return outcome,
                }
            }
            self.try_open(&client, branch, text).await
        };
        let outcome = timeout_at(deadline, tried)
            .await
            .unwrap_or_else(|_| Err(Failure::Network("it took too long to answer".into())));
        outcome.map_err(|failure| self.explain(failure))
    }

    async fn client(&self) -> Result<Client, RemoteError> {
        let mut builder = client()
            .user_agent(concat!("greenroom/", env!("CARGO_PKG_VERSION")))
            .redirect(redirect::Policy::custom(follow));
        if self.github.api.scheme() == "https" {
            builder = builder.https_only(true);
        } else {
            // A stand-in beside us.
            builder = builder.no_proxy();
        }
        // It reads the platform's certificates.
        let built = crate::task::blocking("making an HTTPS client", DEADLINE, || builder.build());
        let why = match built.await {
            Ok(Ok(client)) => return Ok(client),
            Ok(Err(error)) => innermost(&error),
            Err(error) => error.to_string(),
        };
        Err(self.explain(Failure::Network(format!(
            "HTTPS could not be set up: {why}"
        ))))
    }

    async fn try_open(
        &self,
        client: &Client,
        branch: &str,
        text: &PullRequestText,
    ) -> Result<Option<PullRequest>, Failure> {
        let asked = format!("{}/{}", self.owner, self.name);
        let url = self.url(&asked, None);
        let answer = self.ask(client, Method::GET, url, None).await?;
        let there = read::<Repository>(answer).await?;
        let base = text.base.as_ref().unwrap_or(&there.default_branch);
        let pulls = self.url(&there.full_name, Some("pulls"));
        let owner = there.full_name.split('/').next().unwrap_or_default();
        let mut open = pulls.clone();
        open.query_pairs_mut()
            .append_pair("state", "open")
            .append_pair("head", &format!("{owner}:{branch}"))
            .append_pair("base", base);
        if let Some(found) = self.find(client, open.clone()).await? {
            return Ok(Some(found));
        }
        let wish = json!({
            "title": text.title,
            "body": text.body,
            "head": branch,
            "base": base,
        });
        match self.ask(client, Method::POST, pulls, Some(wish)).await {
            Ok(answer) => Ok(Some(read::<Sent>(answer).await?.known(true))),
            Err(Failure::Invalid(why)) if why.contains("already exists") => {
                let found = self.find(client, open).await?;
                found.map(Some).ok_or(Failure::Invalid(why))
            }
            Err(Failure::Invalid(why)) if why.contains("No commits between") => Ok(None),
            Err(failure) => Err(failure),
        }
    }

    async fn find(&self, client: &Client, open: Url) -> Result<Option<PullRequest>, Failure> {
        let answer = self.ask(client, Method::GET, open, None).await?;
        let found = read::<Vec<Sent>>(answer).await?;
        Ok(found.into_iter().next().map(|sent| sent.known(false)))
    }

    /// Below the address of a repository, by its owner and name.
    fn url(&self, repository: &str, below: Option<&str>) -> Url {
        let mut url = self.github.api.clone();
        url.path_segments_mut()
            .expect("an http address has a path")
            .pop_if_empty()
            .push("repos")
            .extend(repository.split('/'))
            .extend(below);
        url
    }

    async fn ask(
        &self,
        client: &Client,
        method: Method,
        url: Url,
        body: Option<Value>,
    ) -> Result<Response, Failure> {
        let mut token = header::HeaderValue::from_str(&format!("Bearer {}", self.token))
            .map_err(|_| Failure::Auth("the access token holds odd characters".into()))?;
        token.set_sensitive(true);
        let mut request = client
            .request(method, url)
            .header(header::AUTHORIZATION, token)
            .header(header::ACCEPT, "application/vnd.github+json")
            .header("x-github-api-version", "2022-11-28");
        if let Some(body) = body {
            request = request
                .header(header::CONTENT_TYPE, "application/json")
                .body(body.to_string());
        }
        let answer = request
            .send()
            .await
            .map_err(|error| match error.is_redirect() {
                true => Failure::Invalid("it redirects to another place".into()),
                false => Failure::Network(innermost(&error)),
            })?;
        if answer.status().is_success() {
            return Ok(answer);
        }
        Err(self.refused(answer).await)
    }

    async fn refused(&self, answer: Response) -> Failure {
        let status = answer.status();
        let is_spent = |name: &str| {
            let value = answer.headers().get(name);
            value.is_some_and(|value| name == "retry-after" || value == "0")
        };
        let is_limited = is_spent("retry-after") || is_spent("x-ratelimit-remaining");
        let said = read::<Value>(answer).await.unwrap_or_default();
        let mut why = said["message"].as_str().unwrap_or_default().to_owned();
        for error in said["errors"].as_array().into_iter().flatten() {
            let detail = error["message"].as_str().or(error.as_str());
            why.extend(detail.map(|detail| format!(" ({detail})")));
        }
        let why = words(&why, Some(&self.token));
        match status {
            StatusCode::UNAUTHORIZED => {
                Failure::Auth("it does not accept the access token (GITHUB_TOKEN)".into())
            }
            StatusCode::TOO_MANY_REQUESTS => Failure::Limited,
            StatusCode::FORBIDDEN if is_limited => Failure::Limited,
            StatusCode::FORBIDDEN => Failure::Auth(format!(
                "the access token may not open pull requests here; it says: {why}"
            )),
            StatusCode::NOT_FOUND => Failure::Auth(format!(
                "there is no repository {}/{}, or the access token may not see it",
                self.owner, self.name
            )),
            StatusCode::UNPROCESSABLE_ENTITY => Failure::Invalid(why),
            status if status.is_server_error() => {
                Failure::Network(format!("it is not available ({status})"))
            }
            status => Failure::Invalid(format!("{status}; it says: {why}")),
        }
    }

    fn explain(&self, failure: Failure) -> RemoteError {
        let host = self.github.api.host_str().unwrap_or("GitHub");
        let (kind, why) = match failure {
            Failure::Auth(why) => (RemoteErrorKind::Auth, why),
            Failure::Invalid(why) => (RemoteErrorKind::Rejected, why),
            Failure::Limited => (
                RemoteErrorKind::Network,
                "it takes no more requests for now; ask again in a few minutes".into(),
            ),
            Failure::Network(why) => (RemoteErrorKind::Network, format!("{why}; try again")),
        };
        RemoteError {
            during: RemoteUse::PullRequest,
            kind,
            message: format!("the pull request could not be opened at {host}: {why}"),
        }
    }
}

enum Failure {
    Auth(String),
    /// The request does not please it; in its words.
    Invalid(String),
    /// Too many requests.
    Limited,
    Network(String),
}

async fn read<T: serde::de::DeserializeOwned>(mut answer: Response) -> Result<T, Failure> {
    let mut body = Vec::new();
    while let Some(chunk) = answer
        .chunk()
        .await
        .map_err(|error| Failure::Network(innermost(&error)))?
    {
        body.extend_from_slice(&chunk);
        if body.len() > MAX_ANSWER {
            return Err(Failure::Invalid("its answer is too large".into()));
        }
    }
    serde_json::from_slice(&body)
        .map_err(|_| Failure::Invalid("its answer is not what GitHub answers".into()))
}

#[cfg(test)]
mod tests;
