//! Making a thread ready: repository, branches, worktree, what an earlier process left behind,
//! the agent ahead of its first instruction, dependencies and dev server.

use std::{
    collections::{BTreeMap, HashSet},
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use jiff::Timestamp;
use sha2::{Digest, Sha256};
use tokio::{
    sync::{Notify, watch},
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{DISK_DEADLINE, InitAnswer, InitRequest, Inner, PREVIEW_GRACE, SupervisorError};
use crate::{
    agent::{Agent, AgentSite},
    domain::{Continuity, PreviewError, PreviewState, TurnKind},
    identity::{ThreadKey, TurnId},
    lease::{Fence, Lease, Patience},
    owner::{Owner, make_folder},
    preview::{PreviewSite, pick_port},
    repository::{
        self, Created, FirstThread, Source, ThreadState, UserRepository, Watch, Workshop, Worktree,
    },
    task,
    turn::{Accepted, Journal, StoredContext, TurnFile, TurnSite},
    workspace::{
        DependencyRequest, InstallError, Metadata, PreviewPlace, ThreadPaths, Unkept,
        WorkspaceError, linked_folder, read_bounded, settle_owners, template_files, write_atomic,
    },
};

/// Cloning a large repository over a slow line, or checking it out on a slow disk.
const CLONE_DEADLINE: Duration = Duration::from_secs(15 * 60);

/// A thread that is ready. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Prepared {
    /// With the fence of the thread's lease.
    pub(super) site: TurnSite,
    pub(super) attach: Attach,
    /// What `repoUrl` has to mean for this workspace; `None` for the template.
    pub(super) repo_url: Option<String>,
    timings: BTreeMap<&'static str, Duration>,
}

/// What comes of a preparation.
#[derive(Debug)]
pub(super) struct Preparation {
    pub(super) lease: Arc<Lease>,
    pub(super) prepared: Prepared,
    pub(super) context: StoredContext,
    pub(super) agent: Option<(Agent, Continuity)>,
    /// Turns that waited in line when an earlier process ended, oldest first.
    pub(super) requeued: Vec<(Accepted, Journal)>,
    pub(super) resumed: bool,
}

struct CheckedOut {
    state: ThreadState,
    worktree: Worktree,
    repo_url: Option<String>,
    place: PreviewPlace,
    context: StoredContext,
    notes: Option<String>,
    /// Who the thread's programs run as, where that is not who we are.
    owner: Option<Owner>,
    timings: BTreeMap<&'static str, Duration>,
}

/// Prepares the thread.
pub(super) async fn prepare(
    inner: &Arc<Inner>,
    key: &ThreadKey,
    wishes: Option<InitRequest>,
) -> Result<Preparation, SupervisorError> {
    let paths = inner.paths(key);
    {
        // Bad wishes leave no trace, not even a lease.
        let (inner, key, paths, wishes) =
            (inner.clone(), key.clone(), paths.clone(), wishes.clone());
        task::blocking("looking at the repository", DISK_DEADLINE, move || {
            choose_repository(&inner, &key, &paths, wishes.as_ref()).map(drop)
        })
        .await??;
    }
    let term = inner.settings.lease;
    let lease = Lease::acquire(&paths.lease(), term, Patience::None, &inner.tasks).await?;
    let fence = lease.fence().clone();
    let lease = Arc::new(lease);
    let repository = inner.lock_repository(&key.user_key()).await?;
    let checked_out = {
        let (inner, key, paths) = (inner.clone(), key.clone(), paths.clone());
        let checked = fence.clone();
        let work = move || check_out(&inner, &key, &paths, wishes, &checked);
        fence
            .write("checking the site out", CLONE_DEADLINE, work)
            .await?
    };
    repository.release().await;

    let CheckedOut {
        state,
        worktree,
        repo_url,
        place,
        context,
        notes,
        owner,
        timings,
    } = checked_out;
    let runtime = inner.settings.runtime.join(key.slug());
    let temporary = runtime.join("tmp");
    {
        let (temporary, session) = (temporary.clone(), paths.session());
        task::blocking("making the thread's folders", DISK_DEADLINE, move || {
            for folder in [temporary, session] {
                make_folder(&folder, owner).map_err(WorkspaceError::io("make", &folder))?;
            }
            Ok::<_, WorkspaceError>(())
        })
        .await??;
    }
    let dependencies = inner.cache().user(&key.user_key());
    let agent_site = AgentSite {
        worktree: paths.worktree(),
        git_dir: paths.user.project().join(".git"),
        config_dir: paths.session(),
        temporary,
        dependencies,
        preview_port: place.port,
        notes,
    };
    let agent_settings = inner.settings.agent.clone();
    let site = TurnSite {
        key: key.clone(),
        paths: paths.clone(),
        worktree: Arc::new(worktree),
        watch: Watch::default(),
        agent_site,
        agent_settings: agent_settings.clone(),
        launcher: inner.launcher.clone(),
        gateway: inner.gateway.clone(),
        committer: inner.settings.committer.clone(),
        outcomes: inner.outcomes.clone(),
        fence,
        tasks: inner.tasks.clone(),
    };
    let (mut context, requeued) = recover(inner, &site, &paths, context).await?;
    let agent = if agent_settings.is_some() && inner.settings.max_warm_agents > 0 {
        site.start_agent_ahead(&mut context).await
    } else {
        None
    };
    let attach = Attach::start(inner.clone(), site.clone(), place, lease.clone());
    let spare = keep_spare(inner.clone(), key.clone(), paths, attach.clone());
    inner.tasks.spawn("spare worktree", spare);
    Ok(Preparation {
        lease,
        prepared: Prepared {
            site,
            attach,
            repo_url,
            timings,
        },
        context,
        agent,
        requeued,
        resumed: state.resumed,
    })
}

/// Everything of git and of small files. Blocking.
fn check_out(
    inner: &Inner,
    key: &ThreadKey,
    paths: &ThreadPaths,
    wishes: Option<InitRequest>,
    fence: &Fence,
) -> Result<CheckedOut, SupervisorError> {
    let mut timings = BTreeMap::new();
    let mut clock = Instant::now();
    let mut lap = |timings: &mut BTreeMap<_, _>, name| {
        timings.insert(name, clock.elapsed());
        clock = Instant::now();
    };
    let settings = &inner.settings;
    let user = key.user_key();
    let (present, repo_url) = choose_repository(inner, key, paths, wishes.as_ref())?;
    let owner = match inner.launcher.runs_as_owners() {
        true => Some(settle_owners(
            &settings.workspace,
            &inner.cache().user(&user),
            paths,
            key,
        )?),
        false => None,
    };
    let project = paths.user.project();
    let base = wishes
        .as_ref()
        .and_then(|wishes| wishes.base_branch.as_deref());
    let is_there = present.is_some() && project.join(".git").exists();
    let created = if is_there {
        Created {
            repository: UserRepository::open(&project)?,
            has_thread: false,
        }
    } else {
        let source = match &repo_url {
            Some(url) => repository::parse_source(url, settings.allowed_local_repos.as_deref())?,
            None => Source::Template(template_files()),
        };
        let workshop = Workshop {
            scratch: &paths.user.scratch(),
            local: Some(&inner.cache().scratch()),
            thread: Some(FirstThread {
                key,
                worktree: &paths.worktree(),
                owner,
                fence,
            }),
        };
        let created = UserRepository::create(
            &project,
            workshop,
            &source,
            &settings.remotes,
            &user,
            base,
            &settings.committer,
        )?;
        lap(&mut timings, "cloneMs");
        created
    };
    let repository = created.repository.making_for(owner);
    let now = Timestamp::now();
    let has_thread = created.has_thread;
    let (created, base_branch) = match present {
        Some(metadata) => (metadata.created, metadata.base_branch),
        None => (now, base.map(str::to_owned)),
    };
    let metadata = Metadata {
        created,
        last_accessed: now,
        repo_url: repo_url.clone(),
        base_branch,
    };
    let worktree = repository.worktree(key, &paths.worktree());
    // Small files and git's, side by side: either is some waits for a slow disk.
    let (small, state) = std::thread::scope(|scope| {
        let small = scope.spawn(|| {
            metadata.save(&paths.user.metadata())?;
            let context = StoredContext::load(&paths.context(), key)?;
            context.save(&paths.context())?;
            Ok::<_, WorkspaceError>(context)
        });
        let state = repository
            .finish_publication(&user, fence)
            .and_then(|()| repository.ensure_worktree(key, &worktree, fence));
        let small = small
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        (small, state)
    });
    let (context, mut state) = (small?, state?);
    // What was made along with the repository was not there before.
    state.resumed &= !has_thread;
    lap(&mut timings, "worktreeMs");
    let notes = read_notes(&worktree);
    let place = place(inner, key, paths)?;
    lap(&mut timings, "contextMs");
    Ok(CheckedOut {
        state,
        worktree,
        repo_url,
        place,
        context,
        notes,
        owner,
        timings,
    })
}

/// What the user's workspace holds or is to hold; reads only.
fn choose_repository(
    inner: &Inner,
    key: &ThreadKey,
    paths: &ThreadPaths,
    wishes: Option<&InitRequest>,
) -> Result<(Option<Metadata>, Option<String>), SupervisorError> {
    let settings = &inner.settings;
    let present = Metadata::load(&paths.user.metadata())?;
    let asked = wishes.and_then(|wishes| wishes.repo_url.as_deref());
    let parse = |url: &str| {
        repository::parse_source(url, settings.allowed_local_repos.as_deref())
            .map_err(SupervisorError::from)
    };
    let repo_url = match &present {
        Some(metadata) => {
            let present = metadata.repo_url.as_deref();
            check_repository(&key.user_key(), present, asked, &parse)?;
            metadata.repo_url.clone()
        }
        None => match asked.or(settings.repo_url.as_deref()) {
            Some(url) => parse(url)?.url(),
            None => None,
        },
    };
    Ok((present, repo_url))
}

fn check_repository(
    user: &crate::identity::UserKey,
    present: Option<&str>,
    asked: Option<&str>,
    parse: &impl Fn(&str) -> Result<Source, SupervisorError>,
) -> Result<(), SupervisorError> {
    let Some(asked) = asked else { return Ok(()) };
    let asked = parse(asked)?.identity();
    let present = match present.map(parse).transpose()? {
        Some(present) if present.identity() == asked => return Ok(()),
        // Where it lies on this machine is no caller's business.
        Some(Source::Local(_)) => "one of this machine".to_owned(),
        Some(present) => present.url().unwrap_or_default(),
        None => "the built-in template".to_owned(),
    };
    Err(SupervisorError::RepoMismatch {
        user: user.clone(),
        present,
    })
}

/// What the site's owner wants agents to know, of the committed tree.
fn read_notes(worktree: &Worktree) -> Option<String> {
    const LIMIT: usize = 64 << 10;
    ["AGENTS.md", "CLAUDE.md"].iter().find_map(|name| {
        let notes = worktree.read_at_head(name, LIMIT).ok().flatten()?;
        Some(String::from_utf8_lossy(&notes).into_owned())
    })
}

/// The thread's slug and port: the stored ones, or new ones that are stored. Also the mark that
/// the thread was initialised.
fn place(
    inner: &Inner,
    key: &ThreadKey,
    paths: &ThreadPaths,
) -> Result<PreviewPlace, SupervisorError> {
    let path = paths.preview_place();
    let stored = PreviewPlace::load(&path)?;
    let slug = key.slug();
    let taken: HashSet<u16> = inner.previews.ports();
    let wanted = stored.as_ref().map(|place| place.port);
    // Of the worktree, not of the slug alone: another workspace on this machine may hold a thread of
    // the same name.
    let seed = format!("{}\n{slug}", paths.worktree().display());
    let port = pick_port(wanted, &taken, &seed);
    let place = PreviewPlace { slug, port };
    if stored.as_ref() != Some(&place) {
        place.save(&path)?;
    }
    Ok(place)
}

/// Gives turns without a live owner their outcome, and those that never began their place in line.
async fn recover(
    inner: &Arc<Inner>,
    site: &TurnSite,
    paths: &ThreadPaths,
    mut context: StoredContext,
) -> Result<(StoredContext, Vec<(Accepted, Journal)>), SupervisorError> {
    let (folder, key) = (paths.open_turns(), site.key.clone());
    let open = task::blocking("looking for open turns", DISK_DEADLINE, move || {
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
        let mut open: Vec<(PathBuf, TurnId)> = entries
            .filter_map(|entry| {
                let name = entry.file_name().into_string().ok()?;
                let id = format!("{}~{}~{}~{name}", key.client, key.user, key.thread);
                Some((entry.path(), id.parse().ok()?))
            })
            .collect();
        open.sort_by(|(_, a), (_, b)| a.cmp(b));
        open
    })
    .await?;
    let mut requeued = Vec::new();
    for (mark, id) in open {
        let file = TurnFile::new(paths, id.clone());
        let look = file.clone();
        let accepted = task::blocking("reading an open turn", DISK_DEADLINE, move || {
            look.accepted()
        })
        .await?;
        let Ok(accepted) = accepted else {
            // The process died before the turn was accepted: nobody was told of it.
            task::blocking("sweeping a mark", DISK_DEADLINE, move || {
                std::fs::remove_file(mark).ok()
            })
            .await?;
            continue;
        };
        let journal = Journal::reopen(file, &site.fence, &inner.tasks).await?;
        let record = journal.record();
        if !record.is_live() {
            task::blocking("sweeping a mark", DISK_DEADLINE, move || {
                std::fs::remove_file(mark).ok()
            })
            .await?;
        } else if record.has_started() || accepted.kind != TurnKind::Turn {
            tracing::warn!(turn_id = %id, "recovering a turn whose supervisor died");
            context = recover_one(site, &accepted, &journal, context).await?;
        } else {
            requeued.push((accepted, journal));
        }
    }
    Ok((context, requeued))
}

async fn recover_one(
    site: &TurnSite,
    accepted: &Accepted,
    journal: &Journal,
    context: StoredContext,
) -> Result<StoredContext, SupervisorError> {
    site.recover(accepted, journal, context)
        .await
        .map_err(|error| match site.fence.check() {
            Ok(()) => error.into(),
            Err(lost) => lost.into(),
        })
}

/// Answers an init of a thread that is prepared.
pub(super) async fn answer(
    inner: &Arc<Inner>,
    key: &ThreadKey,
    prepared: &Prepared,
    request: &InitRequest,
    resumed: bool,
) -> Result<InitAnswer, SupervisorError> {
    if let Some(asked) = &request.repo_url {
        let parse = |url: &str| {
            repository::parse_source(url, inner.settings.allowed_local_repos.as_deref())
                .map_err(SupervisorError::from)
        };
        check_repository(
            &key.user_key(),
            prepared.repo_url.as_deref(),
            Some(asked),
            &parse,
        )?;
    }
    let slug = key.slug();
    inner.previews.set_default(&slug);
    let mut timings = if resumed {
        BTreeMap::new()
    } else {
        prepared.timings.clone()
    };
    let started = Instant::now();
    prepared.attach.done().await?;
    timings.insert("dependenciesMs", started.elapsed());
    if let Some(preview) = inner.previews.get(&slug) {
        preview.wake();
    }
    let waited = Instant::now();
    if request.wait_for_preview && inner.settings.runs_previews {
        wait_for_preview(inner, &slug).await;
    }
    timings.insert("previewMs", waited.elapsed());
    let worktree = prepared.site.worktree.clone();
    let head = {
        let (paths, repo_url) = (inner.paths(key), prepared.repo_url.clone());
        let read = move || {
            touch(&paths, repo_url);
            Ok::<_, SupervisorError>(worktree.head()?)
        };
        let fence = &prepared.site.fence;
        fence.write("reading the head", DISK_DEADLINE, read).await?
    };
    Ok(InitAnswer {
        paths: inner.paths(key),
        branch: key.branch(),
        head,
        resumed,
        preview: inner.preview_view(key, &inner.preview_status(key)),
        timings,
    })
}

fn touch(paths: &ThreadPaths, repo_url: Option<String>) {
    let path = paths.user.metadata();
    let now = Timestamp::now();
    let known = Metadata::load(&path).ok().flatten();
    let metadata = Metadata {
        last_accessed: now,
        ..known.unwrap_or(Metadata {
            created: now,
            last_accessed: now,
            repo_url,
            base_branch: None,
        })
    };
    if let Err(error) = metadata.save(&path) {
        tracing::warn!(%error, "failed to note the access");
    }
}

/// Waits until the dev server is up or has failed, or the time is over.
async fn wait_for_preview(inner: &Inner, slug: &str) {
    let Some(preview) = inner.previews.get(slug) else {
        return;
    };
    let mut status = preview.status();
    let settled = status.wait_for(|status| {
        matches!(
            status.state,
            PreviewState::Live | PreviewState::Error | PreviewState::Off
        )
    });
    timeout(inner.settings.preview_ready, settled).await.ok();
}

/// Keeps a worktree ready for the user's next thread, once this one's page is there.
async fn keep_spare(inner: Arc<Inner>, key: ThreadKey, paths: ThreadPaths, mut attach: Attach) {
    let make = async {
        attach.outcome.wait_for(Option::is_some).await.ok();
        wait_for_preview(&inner, &key.slug()).await;
        let (project, user) = (paths.user.project(), key.user_key());
        let make = move || UserRepository::open(&project)?.keep_spare(&user);
        match task::blocking("keeping a worktree ready", CLONE_DEADLINE, make).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "no worktree is kept ready"),
            Err(error) => tracing::warn!(%error, "no worktree is kept ready"),
        }
    };
    tokio::select! {
        () = make => {}
        () = inner.draining.cancelled() => {}
    }
}

/// Dependencies and dev server of a prepared thread: brought up beside the turns, so that an
/// agent may mend what keeps them from coming up. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Attach {
    again: Arc<Notify>,
    end: CancellationToken,
    outcome: watch::Receiver<Option<Result<(), Arc<InstallError>>>>,
}

impl Attach {
    /// Holds the lease until nothing of it can write any more.
    fn start(inner: Arc<Inner>, site: TurnSite, place: PreviewPlace, lease: Arc<Lease>) -> Self {
        let again = Arc::new(Notify::new());
        let (publish, outcome) = watch::channel(None);
        let tasks = inner.tasks.clone();
        let wake = again.clone();
        let end = CancellationToken::new();
        let ended = end.clone();
        let token = tasks.token().clone();
        let work = async move {
            let work = async {
                loop {
                    let (attached, unkept) = match attach(&inner, &site, &place).await {
                        Ok(unkept) => (Ok(()), unkept),
                        Err(error) => (Err(Arc::new(error)), None),
                    };
                    publish.send_replace(Some(attached));
                    let keep = async {
                        if let (Some(dependencies), Some(unkept)) = (&inner.dependencies, unkept) {
                            wait_for_preview(&inner, &place.slug).await;
                            dependencies.keep(unkept).await;
                        }
                        std::future::pending().await
                    };
                    tokio::select! {
                        () = keep => {}
                        () = wake.notified() => {}
                        () = token.cancelled() => return,
                        () = inner.draining.cancelled() => return,
                    }
                }
            };
            tokio::select! {
                // What it is just starting ends with it.
                () = lease.fence().lost() => {}
                () = ended.cancelled() => {}
                () = work => {}
            }
            drop(publish);
        };
        tasks.spawn("attach", work);
        Self {
            again,
            end,
            outcome,
        }
    }

    /// Ends it, with what it is just starting.
    pub(super) async fn stop(&self) {
        self.end.cancel();
        let mut outcome = self.outcome.clone();
        while outcome.changed().await.is_ok() {}
    }

    /// The site's manifest changed: look at the dependencies again.
    pub(super) fn again(&self) {
        self.again.notify_one();
    }

    /// Waits for the dependencies. A failure is tried once more by the next caller.
    async fn done(&self) -> Result<(), SupervisorError> {
        let mut outcome = self.outcome.clone();
        let attached = outcome
            .wait_for(Option::is_some)
            .await
            .map_err(|_| SupervisorError::Draining)?
            .clone()
            .expect("waited for");
        if attached.is_err() {
            self.again.notify_one();
        }
        Ok(attached?)
    }
}

/// Brings dependencies and dev server up; what is to be kept for other containers then.
async fn attach(
    inner: &Arc<Inner>,
    site: &TurnSite,
    place: &PreviewPlace,
) -> Result<Option<Unkept>, InstallError> {
    let worktree = site.paths.worktree();
    let cache = site.agent_site.dependencies.clone();
    let preview = inner.previews.ensure(PreviewSite {
        slug: place.slug.clone(),
        port: place.port,
        hosts: inner.settings.preview_hosts.clone(),
        readable: vec![cache.clone()],
        writable: vec![linked_folder(&cache, &worktree)],
        worktree: worktree.clone(),
    });
    if let Some(Err(what_to_do)) = inner.settings.node.get() {
        let message = what_to_do.clone();
        preview.fail(PreviewError {
            message,
            ..PreviewError::default()
        });
        return Ok(None);
    }
    let mut unkept = None;
    // What a dev server has open must not vanish under it.
    preview.stop(PREVIEW_GRACE).await;
    if let Some(dependencies) = &inner.dependencies {
        preview.set_progress("Looking at the dependencies");
        let tree = site.worktree.clone();
        let request = DependencyRequest {
            worktree,
            export: move |folder: &Path| tree.export(folder).map_err(io::Error::other),
            cache,
            archives: Some(site.paths.user.dependency_archives()),
        };
        let status = preview.clone();
        let attached = dependencies
            .ensure(request, move |progress| status.set_progress(progress))
            .await;
        match attached {
            Ok(attached) => {
                tracing::info!(
                    kind = ?attached.kind,
                    elapsed_ms = attached.took.as_millis() as u64,
                    "dependencies are in place"
                );
                unkept = attached.unkept;
            }
            Err(error) => {
                tracing::warn!(%error, "dependencies are not in place");
                let message = error.to_string();
                preview.fail(PreviewError {
                    message,
                    ..PreviewError::default()
                });
                return Err(error);
            }
        }
    }
    if inner.settings.runs_previews {
        preview.restart("the site was attached").await;
    } else {
        preview.stop(PREVIEW_GRACE).await;
    }
    Ok(unkept)
}

/// Which turn an idempotency key stands for.
#[derive(Debug)]
pub(super) struct IdempotencyMark(PathBuf);

impl IdempotencyMark {
    /// The key itself may be anything: its digest names the file.
    pub(super) fn new(paths: &ThreadPaths, key: &str) -> Self {
        Self(paths.idempotency().join(hex::encode(Sha256::digest(key))))
    }

    /// The turn that was accepted with this key, if there is one.
    pub(super) async fn turn(&self, key: &ThreadKey) -> Result<Option<TurnId>, SupervisorError> {
        let path = self.0.clone();
        let read = task::blocking("reading an idempotency key", DISK_DEADLINE, move || {
            read_bounded(&path, 1024)
        })
        .await??;
        let id = read.and_then(|text| String::from_utf8(text).ok()?.parse::<TurnId>().ok());
        let Some(id) = id.filter(|id| id.key() == key) else {
            return Ok(None);
        };
        let folder = self
            .0
            .parent()
            .and_then(|path| path.parent())
            .map(PathBuf::from);
        let journal = folder
            .unwrap_or_default()
            .join("turns")
            .join(format!("{}.jsonl", id.sequence()));
        let exists = task::blocking("looking for the turn", DISK_DEADLINE, move || {
            journal.exists()
        })
        .await?;
        Ok(exists.then_some(id))
    }

    pub(super) async fn set(&self, turn: &TurnId, fence: &Fence) -> Result<(), SupervisorError> {
        let (path, text) = (self.0.clone(), turn.to_string());
        let set = move || Ok(write_atomic(&path, text.as_bytes())?);
        fence
            .write("writing an idempotency key", DISK_DEADLINE, set)
            .await
    }
}
