//! The end: what is stopped, in which order, and within which share of the platform's patience.

use std::{path::PathBuf, time::Duration};

use anyhow::bail;

use super::{
    outside::Outside,
    runtime::RuntimeFolder,
    stops::{self, Step, StopNote},
};
use crate::{
    config::Settings,
    control_plane::Notice,
    label::Labels,
    lifecycle::{Activity, HolderKind, Shares, Signals, StopReason, wait_for_reason},
    process::Launcher,
    service::Service,
    supervisor::Supervisor,
    task::{self, Tasks},
};

/// For what fell to PID 1 to end once it was told to.
const ORPHANS_END: Duration = Duration::from_secs(2);

/// What the control plane may take to hear of the end.
const LAST_NEWS: Duration = Duration::from_secs(2);

/// What is ended, in order, when it is time.
pub(super) struct Ending {
    pub(super) outside: Outside,
    pub(super) supervisor: Option<Supervisor>,
    pub(super) service: Service,
    pub(super) labels: Option<Labels>,
    pub(super) launcher: Launcher,
    pub(super) tasks: Tasks,
    pub(super) activity: Activity,
    /// Goes last.
    pub(super) runtime: RuntimeFolder,
}

impl Ending {
    /// Where stops are noted for the next start; the one-shot service has no workspace for that.
    fn stops_folder(&self, settings: &Settings) -> Option<PathBuf> {
        self.supervisor
            .as_ref()
            .map(|_| settings.workspace_path.join(".greenroom/stops"))
    }

    pub(super) async fn wait_and_stop(
        self,
        settings: &Settings,
        mut signals: Signals,
    ) -> anyhow::Result<()> {
        if std::process::id() == 1 {
            let reaper = reap(self.launcher.clone(), self.tasks.clone());
            self.tasks.spawn("reaper", reaper);
        }
        let circuit = self.outside.clone();
        let circuit = circuit.tell_circuit(self.service.circuit_changes());
        let ending = self.tasks.token().clone();
        self.tasks.spawn("circuit", async move {
            ending.run_until_cancelled(circuit).await;
        });
        let told = &self.outside.control_plane;
        let stops = self.stops_folder(settings);
        told.tell(Notice::Ready {
            cut_short: stops::report(stops.clone()).await,
        });
        let going = |stops_at| told.tell(Notice::GoingIdle { stops_at });
        let reason = tokio::select! {
            reason = wait_for_reason(&mut signals, &self.activity, going) => reason,
            () = self.tasks.token().cancelled() => StopReason::Broken,
        };
        let why = reason.as_str();
        told.tell(Notice::Stopping { reason: why });
        let begin = tokio::time::Instant::now();
        let shares = Shares::of(settings.drain, settings.stop_timeout);
        let note = StopNote::begin(stops, why, settings.stop_timeout);
        let stopping = stop(reason, begin, shares, &self, &note);
        tokio::select! {
            () = stopping => {}
            // Whoever asks twice means now. Children end by themselves when we are gone.
            () = signals.next(), if reason != StopReason::Broken => {
                tracing::warn!("stopping at once");
                note.cut("a second signal ended it at once");
            }
        }
        tracing::info!(reason = why, "stopped");
        told.tell(Notice::Stopped { reason: why });
        let left = (begin + shares.told).saturating_duration_since(tokio::time::Instant::now());
        let news = async {
            told.finish(LAST_NEWS.min(left)).await;
        };
        tokio::join!(news, note.end(left));
        drop(self.runtime);
        match reason {
            StopReason::Broken => bail!("a part of greenroom broke; the log says which"),
            StopReason::IdleTimeout | StopReason::Signal => Ok(()),
        }
    }
}

/// Ends everything in order: admit nothing, let turns end, stop children, close tasks. Each step has
/// its share of the platform's patience; one that is cut short is noted.
async fn stop(
    reason: StopReason,
    begin: tokio::time::Instant,
    shares: Shares,
    ending: &Ending,
    note: &StopNote,
) {
    let Ending {
        supervisor,
        service,
        labels,
        launcher,
        tasks,
        activity,
        ..
    } = ending;
    tracing::info!(reason = reason.as_str(), "stopping");
    let (turns_end, saved) = (begin + shares.turns, begin + shares.saved);
    let turns = async {
        let Some(supervisor) = supervisor else { return };
        let drained = supervisor.drain(turns_end, saved).await;
        if drained.interrupted > 0 {
            let turns = drained.interrupted;
            note.cut(format!("{turns} running turns were interrupted"));
        }
        for thread in drained.unsaved {
            note.cut(format!(
                "{thread} was not saved in time; its next init recovers it"
            ));
        }
    };
    let runs = async {
        match service.drain(turns_end).await {
            0 => {}
            runs => note.cut(format!("{runs} one-shot runs were ended")),
        }
    };
    let images = async {
        let Some(labels) = labels else { return };
        match labels.service().drain(turns_end).await {
            0 => {}
            runs => note.cut(format!("{runs} runs that label an image were ended")),
        }
    };
    let runs = async { tokio::join!(runs, images) };
    tokio::join!(turns, tokio::time::timeout_at(saved, runs))
        .1
        .ok();
    note.reached(Step::Children);
    if std::process::id() == 1 {
        launcher.terminate_orphans();
    }
    let now = tokio::time::Instant::now();
    let children = (begin + shares.children).saturating_duration_since(now);
    // Half of it to end by themselves, half to be ended.
    let ended = launcher.stop(children / 2);
    if !matches!(tokio::time::timeout(children, ended).await, Ok(true)) {
        tracing::error!("children were left that did not end");
        note.cut("children were left that did not end");
    }
    if std::process::id() == 1 {
        // With us the kernel ends whatever is left.
        let ended = async {
            while launcher.has_orphans() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let end = (begin + shares.children).min(tokio::time::Instant::now() + ORPHANS_END);
        tokio::time::timeout_at(end, ended).await.ok();
    }
    note.reached(Step::Answers);
    // Answers that are on their way get out.
    let answered = async {
        while activity.count(HolderKind::Request) > 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let in_a_second = tokio::time::Instant::now() + Duration::from_secs(1);
    let answers_end = in_a_second.min(begin + shares.answers);
    if tokio::time::timeout_at(answers_end, answered)
        .await
        .is_err()
    {
        note.cut("requests were left without an answer");
    }
    note.reached(Step::Tasks);
    let now = tokio::time::Instant::now();
    let left = (begin + shares.tasks).saturating_duration_since(now);
    if !tasks.stop(left).await {
        tracing::warn!("tasks were left that did not end");
        note.cut("tasks were left that did not end");
    }
}

/// As PID 1 every orphan falls to us.
async fn reap(launcher: Launcher, tasks: Tasks) {
    let Ok(mut died) = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::child()) else {
        return;
    };
    loop {
        tokio::select! {
            () = tasks.token().cancelled() => return,
            _ = died.recv() => {}
            () = tokio::time::sleep(Duration::from_secs(1)) => {}
        }
        let launcher = launcher.clone();
        let reaped = task::blocking("reaping orphans", Duration::from_secs(10), move || {
            launcher.reap_orphans()
        });
        let reaped = reaped.await.unwrap_or_default();
        metrics::counter!("greenroom_orphans_reaped_total").increment(reaped as u64);
    }
}
