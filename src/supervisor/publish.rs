//! Publishing a thread's work, and bringing others' work down to it: what the repository needs for
//! it, under the lease on what the user's threads share.

use std::{sync::Arc, time::Duration};

use super::{DISK_DEADLINE, Inner, SupervisorError, prepare::Prepared};
use crate::{
    domain::{HeldBack, MergeStep},
    lease::Fence,
    repository::{
        self, Destination, Mover, Origin, PublishRequest, Published, PullRequest, PullRequestText,
        PushedBranch, Repair, RepositoryError, Snapshot, Source, Synced, UserRepository,
    },
    task,
    turn::Folder,
    workspace::Metadata,
};

/// A publication, and so everything that is sent and fetched for it.
const PUBLISH_DEADLINE: Duration = Duration::from_secs(15 * 60);
/// No further try at a network that fails begins after this.
const RETRY_FOR: Duration = Duration::from_secs(60);

/// What somebody wants to be published.
#[derive(Debug, Clone)]
pub struct PublishWish {
    pub to: Destination,
    /// Of a commit of the last branch, which is made also where that only had to move along.
    pub message: Option<String>,
    /// Go on although lines of others vanish that no turn touched.
    pub accepts_loss: bool,
    pub pull_request: Option<PullRequestWish>,
}

/// What a pull request is to say; all of it may be left to us.
#[derive(Debug, Clone, Default)]
pub struct PullRequestWish {
    pub title: Option<String>,
    pub body: Option<String>,
    pub base: Option<String>,
}

/// What was published.
#[derive(Debug, Clone)]
pub struct PublishAnswer {
    pub to: Destination,
    pub merged: Vec<MergeStep>,
    pub pushed: Option<PushedBranch>,
    pub pull_request: Option<PullRequest>,
    /// Files of the thread that are in no commit, and so were not published.
    pub held_back: Vec<HeldBack>,
}

/// Everything about the user's repository that its operations need. Moves into blocking work.
struct Place {
    inner: Arc<Inner>,
    prepared: Prepared,
    source: Option<Source>,
    base_branch: Option<String>,
}

impl Place {
    async fn of(inner: &Arc<Inner>, prepared: &Prepared) -> Result<Self, SupervisorError> {
        let (inner, prepared) = (inner.clone(), prepared.clone());
        let look = move || {
            let allowed = inner.settings.allowed_local_repos.as_deref();
            let parse = |url: &String| repository::parse_source(url, allowed);
            let source = prepared.repo_url.as_ref().map(parse).transpose()?;
            let metadata = Metadata::load(&prepared.site.paths.user.metadata())?;
            Ok(Self {
                source,
                base_branch: metadata.and_then(|metadata| metadata.base_branch),
                inner,
                prepared,
            })
        };
        task::blocking("looking at the repository", DISK_DEADLINE, look).await?
    }

    fn mover<'a>(&'a self, held_dir: &'a std::path::Path, fence: &'a Fence) -> Mover<'a> {
        Mover {
            key: &self.prepared.site.key,
            committer: &self.prepared.site.committer,
            held_dir,
            fence,
        }
    }

    fn origin<'a>(&'a self, folder: &'a std::path::Path) -> Option<Origin<'a>> {
        Some(Origin {
            source: self.source.as_ref()?,
            remotes: &self.inner.settings.remotes,
            base_branch: self.base_branch.as_deref(),
            folder,
            deadline: std::time::Instant::now() + RETRY_FOR,
        })
    }

    /// Runs `work` while no other thread of the user moves branches.
    async fn alone<T: Send + 'static>(
        self,
        what: &'static str,
        work: impl FnOnce(
            &UserRepository,
            &Mover<'_>,
            Option<&Origin<'_>>,
        ) -> Result<T, RepositoryError>
        + Send
        + 'static,
    ) -> Result<T, SupervisorError> {
        let inner = self.inner.clone();
        let user = self.prepared.site.key.user_key();
        let lock = inner.lock_repository(&user).await?;
        let fence = lock.fence().clone();
        let checked = fence.clone();
        let work = move || -> Result<T, SupervisorError> {
            let paths = &self.prepared.site.paths.user;
            let (held_dir, uplink) = (paths.held_outside(), paths.uplink());
            let repository = UserRepository::open(&paths.project())?;
            let origin = self.origin(&uplink);
            let mover = self.mover(&held_dir, &checked);
            Ok(work(&repository, &mover, origin.as_ref())?)
        };
        let outcome = fence.write(what, PUBLISH_DEADLINE, work).await;
        // Work that is stuck moves nothing any more from here on: its fence is closed.
        lock.release().await;
        outcome
    }
}

/// Publishes what the thread has committed, outside edits too. Says if the worktree's folder had
/// to be made anew for it.
pub(super) async fn publish(
    inner: &Arc<Inner>,
    prepared: &Prepared,
    wish: &PublishWish,
    folder: &mut Folder,
) -> Result<PublishAnswer, SupervisorError> {
    let place = Place::of(inner, prepared).await?;
    // What cannot be had is refused before anything is done.
    let hub = match (&wish.pull_request, &place.source) {
        _ if wish.to == Destination::Origin && place.source.is_none() => {
            return Err(RepositoryError::NoOrigin.into());
        }
        (Some(_), Some(source)) => Some(inner.settings.github.repository(source)?),
        _ => None,
    };
    let base_branch = place.base_branch.clone();
    let outside = prepared.site.commit_outside_edits().await?;
    if outside.repairs.contains(&Repair::Folder) {
        *folder = Folder::New;
    }
    let (to, message, accepts_loss) = (wish.to, wish.message.clone(), wish.accepts_loss);
    let work =
        move |repository: &UserRepository, mover: &Mover<'_>, origin: Option<&Origin<'_>>| {
            repository.publish(&PublishRequest {
                mover: *mover,
                to,
                message: message.as_deref(),
                accepts_loss,
                origin: origin.copied(),
            })
        };
    let Published { merged, pushed } = place.alone("publishing", work).await?;
    for step in merged.iter().filter(|step| !step.up_to_date) {
        tracing::info!(
            from = step.from,
            to = step.to,
            commit = step.commit,
            "merged"
        );
    }
    if let Some(pushed) = pushed.as_ref().filter(|pushed| !pushed.up_to_date) {
        tracing::info!(branch = pushed.branch, commit = pushed.commit, "pushed");
    }
    let mut answer = PublishAnswer {
        to,
        merged,
        pushed,
        pull_request: None,
        held_back: outside.held_back,
    };
    if let (Some(hub), Some(asked), Some(pushed)) = (hub, &wish.pull_request, &answer.pushed) {
        let first_line = |text: &String| text.lines().next().map(str::to_owned);
        let title = asked
            .title
            .clone()
            .or_else(|| wish.message.as_ref().and_then(first_line));
        let text = PullRequestText {
            title: title.unwrap_or_else(|| format!("Publish {}", pushed.branch)),
            body: asked.body.clone().unwrap_or_default(),
            base: asked.base.clone().or(base_branch),
        };
        match hub.open_pull_request(&pushed.branch, &text).await {
            Ok(found) => answer.pull_request = found,
            Err(error) => {
                return Err(SupervisorError::PullRequest {
                    error,
                    published: Box::new(answer),
                });
            }
        }
    }
    Ok(answer)
}

/// Brings others' work down as far as the user's branch, and drafts what the thread, being at
/// `base`, is to take in.
pub(super) async fn sync(
    inner: &Arc<Inner>,
    prepared: &Prepared,
    base: Snapshot,
) -> Result<Synced, SupervisorError> {
    let place = Place::of(inner, prepared).await?;
    let worktree = prepared.site.worktree.clone();
    let work =
        move |repository: &UserRepository, mover: &Mover<'_>, origin: Option<&Origin<'_>>| {
            repository.sync(mover, origin, &worktree, &base)
        };
    place.alone("bringing changes down", work).await
}
