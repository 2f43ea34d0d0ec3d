//! Up and down the branches: a thread's work into its user's branch, from there into the client's
//! and to the origin; and what others did, back down.
//!
//! ```text
//! thread/{client}/{user}/{thread} ─► user/{client}/{user} ─► client/{client} ─► origin
//! ```
//!
//! Everything is merged in memory first. Then the origin is asked, and only when it has taken the
//! commit do the branches move here, all in one transaction, and the files in `project/` with
//! them. So whatever stops a publication (a conflict, lines that would silently vanish, a refusal,
//! the network) changes nothing.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use git2::{ErrorCode, Oid, Repository};

use super::{
    CommitRequest, CommitText, Draft, Operation as _, RemoteError, RemoteErrorKind, RemoteUse,
    Remotes, RepositoryError, Result, Scope, Snapshot, Source, Strangers, UserRepository, Worktree,
    gitdir,
    loss::Owner,
    merge::{Combined, How, Merged, Tip, combine, merge},
    uplink::{Pushed, Uplink},
    user::branch_tip,
};
use crate::{
    domain::{MergeStep, Signature},
    identity::{ThreadKey, UserKey},
    lease::Fence,
};

/// How often a push that came too late takes in what came before it, and waits before that: of many
/// that push at once all get their turn.
const MAX_CATCH_UPS: u32 = 12;
const CATCH_UP_PAUSE: Duration = Duration::from_millis(50);

/// How far up a thread's work goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Destination {
    User,
    Client,
    Origin,
}

/// Where a site came from, and how it is reached.
#[derive(Debug, Clone, Copy)]
pub struct Origin<'a> {
    pub source: &'a Source,
    pub remotes: &'a Remotes,
    /// Where the client's work goes in the end; else the origin's default branch.
    pub base_branch: Option<&'a str>,
    /// For isolated git directories, on the repository's file system; what is there is removed.
    pub folder: &'a Path,
    /// No further try at a network that fails begins after it.
    pub deadline: Instant,
}

/// Who moves branches. The caller holds the lease on the repository.
#[derive(Debug, Clone, Copy)]
pub struct Mover<'a> {
    pub key: &'a ThreadKey,
    pub committer: &'a Signature,
    /// For copies of what is held back of edits in `project/`.
    pub held_dir: &'a Path,
    /// Of the lease on the repository.
    pub fence: &'a Fence,
}

/// A publication.
#[derive(Debug, Clone, Copy)]
pub struct PublishRequest<'a> {
    pub mover: Mover<'a>,
    pub to: Destination,
    /// Of a commit of the last branch, which is made also where that only had to move along.
    pub message: Option<&'a str>,
    /// Go on although lines of others vanish that no turn touched.
    pub accepts_loss: bool,
    /// Needed for [`Destination::Origin`].
    pub origin: Option<Origin<'a>>,
}

/// What a publication did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Published {
    pub merged: Vec<MergeStep>,
    /// To the origin.
    pub pushed: Option<PushedBranch>,
}

/// Where the origin's branch is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PushedBranch {
    pub branch: String,
    /// Full id.
    pub commit: String,
    /// It was there before.
    pub up_to_date: bool,
}

/// What bringing changes down did to the branches above the thread's, and is to do to that.
#[derive(Debug)]
pub struct Synced {
    pub merged: Vec<MergeStep>,
    /// `None`: nothing changes for the thread.
    pub draft: Option<Draft>,
}

/// A branch of the user's repository that is on the move.
struct Lane {
    old: Oid,
    tip: Tip,
}

impl UserRepository {
    /// Publishes what is committed of a thread.
    ///
    /// # Errors
    /// [`RepositoryError::Conflict`] and [`RepositoryError::Remote`] say what stopped it; no branch
    /// has moved then, here or at the origin.
    pub fn publish(&self, request: &PublishRequest<'_>) -> Result<Published> {
        let mover = &request.mover;
        let repo = self.git.open(&self.project)?;
        let project = self.settle_project(&repo, mover)?;
        let (mut client, mut user) = self.lanes(&repo, mover)?;
        let thread = tip(&repo, mover.key.branch())?;
        let trailers = mover.trailers("publish");
        let how = |destination| {
            let is_last = destination == request.to.min(Destination::Client);
            let message = request.message.filter(|_| is_last);
            mover.how(message, &trailers)
        };
        let owner = |owner| (!request.accepts_loss).then_some(owner);

        let by_thread = owner(Owner::Thread(mover.key.clone()));
        let how_user = how(Destination::User);
        let step = user.take_in(&repo, &thread, &how_user, by_thread.as_ref())?;
        let mut merged = vec![step];
        if request.to >= Destination::Client {
            let by_user = owner(Owner::User(mover.key.user_key()));
            let how_client = how(Destination::Client);
            merged.push(client.take_in(&repo, &user.tip, &how_client, by_user.as_ref())?);
        }
        check_room(&project, &thread, &user)?;
        let mut moves = Vec::new();
        let mut pushed = None;
        if request.to == Destination::Origin {
            let origin = request.origin.as_ref().ok_or(RepositoryError::NoOrigin)?;
            let how = mover.how(None, &trailers);
            let outcome = self.push(&repo, origin, &mut client, &how, &mut merged)?;
            moves.push(Move::tracking(
                &repo,
                &client.tip.branch,
                Some(client.tip.id),
            )?);
            pushed = Some(outcome);
        }
        self.move_lanes(&repo, &project, &client, &user, moves, mover)?;
        Ok(Published { merged, pushed })
    }

    /// Pushes the client's branch; what others have pushed before is merged into it first.
    fn push(
        &self,
        repo: &Repository,
        origin: &Origin<'_>,
        client: &mut Lane,
        how: &How<'_>,
        merged: &mut Vec<MergeStep>,
    ) -> Result<PushedBranch> {
        let Tip { branch, id: own } = client.tip.clone();
        let uplink = self.uplink(repo, origin, client)?;
        let mut caught_up = None;
        for attempt in 0..MAX_CATCH_UPS {
            let pushed = uplink.push(&branch, client.tip.id)?;
            if pushed != Pushed::Behind {
                merged.extend(caught_up);
                return Ok(PushedBranch {
                    branch,
                    commit: client.tip.id.to_string(),
                    up_to_date: pushed == Pushed::UpToDate,
                });
            }
            std::thread::sleep(CATCH_UP_PAUSE * attempt);
            let upstream = uplink.fetch(&branch, origin.base_branch)?;
            if let Some(id) = upstream.client {
                let theirs = Tip {
                    branch: format!("origin/{branch}"),
                    id,
                };
                // One merge with what is there in the end, not one for each try.
                client.tip.id = own;
                caught_up = Some(client.take_in(repo, &theirs, how, None)?);
            }
        }
        Err(RepositoryError::Remote(RemoteError {
            during: RemoteUse::Push,
            kind: RemoteErrorKind::Network,
            message: "others push to this branch all the time; try again".into(),
        }))
    }

    /// Brings down what others did: from the origin into the client's and the user's branch, and
    /// works out what the thread, being at `base`, is to take in.
    ///
    /// # Errors
    /// As [`UserRepository::publish`]; no branch has moved then.
    pub fn sync(
        &self,
        mover: &Mover<'_>,
        origin: Option<&Origin<'_>>,
        worktree: &Worktree,
        base: &Snapshot,
    ) -> Result<Synced> {
        let repo = self.git.open(&self.project)?;
        let project = self.settle_project(&repo, mover)?;
        let (mut client, mut user) = self.lanes(&repo, mover)?;
        let trailers = mover.trailers("sync");
        let how = mover.how(None, &trailers);
        let mut merged = Vec::new();
        let mut moves = Vec::new();
        if let Some(origin) = origin {
            let branch = client.tip.branch.clone();
            let uplink = self.uplink(&repo, origin, &client)?;
            let upstream = uplink.fetch(&branch, origin.base_branch)?;
            drop(uplink);
            moves.push(Move::tracking(&repo, &branch, upstream.client)?);
            if let Some((name, id)) = &upstream.base {
                moves.push(Move::tracking(&repo, name, Some(*id))?);
            }
            // The client's branch of the origin has what the base branch has, as far as somebody
            // wanted it to.
            let above = upstream.client.map(|id| (branch, id)).or(upstream.base);
            if let Some((name, id)) = above {
                let above = Tip {
                    branch: format!("origin/{name}"),
                    id,
                };
                merged.push(client.take_in(&repo, &above, &how, None)?);
            }
        }
        merged.push(user.take_in(&repo, &client.tip, &how, None)?);

        let thread = Tip {
            branch: mover.key.branch(),
            id: base.head_id(),
        };
        let combined = combine(&repo, &user.tip, &thread, None)?;
        let draft = match combined {
            Combined::UpToDate => None,
            Combined::Forward(tree) | Combined::Mixed(tree) => {
                let repo = worktree.open()?;
                let fits = worktree.draft(&repo, base, tree, vec![user.tip.id]);
                let draft = fits.map_err(|error| error.between(&user.tip, &thread))?;
                Some(draft).filter(|draft| !draft.files().is_empty())
            }
        };
        merged.push(MergeStep {
            from: user.tip.branch.clone(),
            to: thread.branch,
            commit: None,
            up_to_date: draft.is_none(),
        });
        check_room(&project, &client.tip, &user)?;
        self.move_lanes(&repo, &project, &client, &user, moves, mover)?;
        Ok(Synced { merged, draft })
    }

    fn uplink<'a>(
        &'a self,
        repo: &Repository,
        origin: &Origin<'a>,
        client: &Lane,
    ) -> Result<Uplink<'a>> {
        let mut have = vec![client.old];
        // Where the origin stood when it was asked last.
        let references = repo
            .references_glob("refs/remotes/origin/*")
            .during("list the branches")?;
        let known = references.flatten().filter_map(|known| known.target());
        have.extend(known.filter(|id| repo.find_commit(*id).is_ok()).take(100));
        Uplink::open(
            origin.folder,
            &self.git,
            origin.source,
            origin.remotes,
            &have,
            origin.deadline,
        )
    }

    /// Ends what a publication or sync that was cut off had begun in `project/`. The caller holds the
    /// lease on the repository.
    pub fn finish_publication(&self, key: &UserKey, fence: &Fence) -> Result<()> {
        // Nearly always there is nothing, and to find that out should take one look.
        let place = self.git.path().join("landing");
        if super::files::kind_of(&place)
            .during("look for a publication")?
            .is_none()
        {
            return Ok(());
        }
        let repo = self.git.open(&self.project)?;
        match self.checked_out(&repo, key)? {
            Some(project) => project.finish_following(fence),
            None => Ok(()),
        }
    }

    /// `project/`, if the user's branch is checked out there.
    fn checked_out(&self, repo: &Repository, key: &UserKey) -> Result<Option<Worktree>> {
        let head = repo.find_reference("HEAD").during("read the head")?;
        let is_ours = head
            .symbolic_target()
            .is_ok_and(|target| target == Some(&format!("refs/heads/{}", key.user_branch())));
        Ok(is_ours.then(|| Worktree::of_user(self.git.clone(), key, &self.project)))
    }

    /// The branches of client and user.
    fn lanes(&self, repo: &Repository, mover: &Mover<'_>) -> Result<(Lane, Lane)> {
        let key = mover.key.user_key();
        self.ensure_user_branch(repo, &key)?;
        let lane = |branch| {
            let tip = tip(repo, branch)?;
            Ok::<_, RepositoryError>(Lane { old: tip.id, tip })
        };
        Ok((lane(key.client_branch())?, lane(key.user_branch())?))
    }

    /// `project/` with everything in it committed, if the user's branch is checked out there;
    /// what somebody else checked out is theirs.
    fn settle_project(&self, repo: &Repository, mover: &Mover<'_>) -> Result<Option<Worktree>> {
        let key = mover.key.user_key();
        let mut locks: Vec<_> = ["index", "HEAD", "packed-refs"].map(str::to_owned).into();
        let branches = [key.client_branch(), key.user_branch()];
        locks.extend(branches.map(|branch| format!("refs/heads/{branch}")));
        for lock in locks {
            let lock = self.git.path().join(format!("{lock}.lock"));
            gitdir::clear_lock(&lock, &self.project)?;
        }
        self.ensure_user_branch(repo, &key)?;
        let Some(project) = self.checked_out(repo, &key)? else {
            return Ok(None);
        };
        if repo.state() != git2::RepositoryState::Clean {
            return Err(RepositoryError::Unfinished);
        }
        project.finish_following(mover.fence)?;
        project.commit(&CommitRequest {
            text: CommitText {
                instruction: "Edits made in project/",
                trailers: &[("User", key.to_string()), ("Status", "outside".to_owned())],
                author: mover.committer,
                committer: mover.committer,
            },
            scope: Scope::All,
            strangers: Strangers::Keep,
            held_dir: mover.held_dir,
            fence: mover.fence,
        })?;
        Ok(Some(project))
    }

    /// Moves the branches, and the files of `project/` with the user's.
    fn move_lanes(
        &self,
        repo: &Repository,
        project: &Option<Worktree>,
        client: &Lane,
        user: &Lane,
        mut moves: Vec<Move>,
        mover: &Mover<'_>,
    ) -> Result<()> {
        moves.extend([client, user].map(Lane::as_move));
        moves.retain(|wanted| wanted.old != wanted.new);
        if moves.is_empty() {
            return Ok(());
        }
        let go = || self.move_all(repo, &moves, mover.fence);
        match project {
            Some(project) if user.old != user.tip.id => {
                project.follow(user.old, user.tip.id, mover.fence, go)
            }
            _ => go(),
        }
    }

    /// Moves references, all of them or none.
    fn move_all(&self, repo: &Repository, moves: &[Move], fence: &Fence) -> Result<()> {
        const WHAT: &str = "move the branches";
        let mut transaction = repo.transaction().during(WHAT)?;
        for Move { name, old, .. } in moves {
            self.git.check_reference(name)?;
            transaction.lock_ref(name).during(WHAT)?;
            let present = match repo.refname_to_id(name) {
                Ok(id) => Some(id),
                Err(error) if error.code() == ErrorCode::NotFound => None,
                Err(error) => return Err(error).during(WHAT),
            };
            if present != *old {
                return Err(RepositoryError::HeadMoved {
                    branch: name.trim_start_matches("refs/heads/").to_owned(),
                });
            }
        }
        for Move { name, new, .. } in moves {
            match new {
                Some(id) => transaction.set_target(name, *id, None, "greenroom"),
                None => transaction.remove(name),
            }
            .during(WHAT)?;
        }
        fence.check()?;
        transaction.commit().during(WHAT)
    }
}

impl<'a> Mover<'a> {
    fn trailers(&self, kind: &'static str) -> [(&'static str, String); 2] {
        [("Thread", self.key.to_string()), ("Kind", kind.to_owned())]
    }

    fn how(&self, message: Option<&'a str>, trailers: &'a [(&'a str, String)]) -> How<'a> {
        How {
            message,
            trailers,
            author: self.committer,
            committer: self.committer,
            always_commits: message.is_some(),
        }
    }
}

impl Lane {
    /// Merges `from` into this one.
    fn take_in(
        &mut self,
        repo: &Repository,
        from: &Tip,
        how: &How<'_>,
        owner: Option<&Owner>,
    ) -> Result<MergeStep> {
        let merged = merge(repo, from, &self.tip, how, owner)?;
        if let Some(id) = merged.moves_to() {
            self.tip.id = id;
        }
        Ok(MergeStep {
            from: from.branch.clone(),
            to: self.tip.branch.clone(),
            commit: merged.moves_to().map(|id| id.to_string()),
            up_to_date: merged == Merged::UpToDate,
        })
    }

    fn as_move(&self) -> Move {
        Move {
            name: format!("refs/heads/{}", self.tip.branch),
            old: Some(self.old),
            new: Some(self.tip.id),
        }
    }
}

/// A reference that moves, unless somebody else moved it meanwhile.
struct Move {
    name: String,
    old: Option<Oid>,
    new: Option<Oid>,
}

impl Move {
    /// Notes where a branch of the origin is.
    fn tracking(repo: &Repository, branch: &str, new: Option<Oid>) -> Result<Self> {
        let name = format!("refs/remotes/origin/{branch}");
        let old = match repo.refname_to_id(&name) {
            Ok(id) => Some(id),
            Err(error) if error.code() == ErrorCode::NotFound => None,
            Err(error) => return Err(error).during("read a branch of the origin"),
        };
        Ok(Self { name, old, new })
    }
}

/// Would the files of `project/` get into the way of what is there and in no commit?
fn check_room(project: &Option<Worktree>, from: &Tip, user: &Lane) -> Result<()> {
    let Some(project) = project else {
        return Ok(());
    };
    let fits = project.check_following(user.old, user.tip.id);
    fits.map_err(|error| error.between(from, &user.tip))
}

fn tip(repo: &Repository, branch: String) -> Result<Tip> {
    match branch_tip(repo, &branch)? {
        Some(id) => Ok(Tip { branch, id }),
        None => Err(RepositoryError::NoSuchBranch { branch }),
    }
}

#[cfg(test)]
mod tests;
