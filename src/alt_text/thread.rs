//! Texts for the images of a thread's site: a look at it, descriptions outside of its queue, one
//! turn that writes them.

use serde_json::to_value;
use tokio_util::sync::CancellationToken;

use super::{
    AltTexts, Asked, DescribeError, Files, Progress, Report, Wanted, ask::Answers, foreseen, look,
    write_all,
};
use crate::{
    domain::{Account, Author, TurnKind},
    identity::ThreadKey,
    repository::SiteFiles,
    service::ServiceError,
    supervisor::{
        Operation, OperationAnswer, OperationRequest, SiteChange, SiteEdit, Supervisor,
        SupervisorError,
    },
    usage::Denied,
};

impl Files for SiteFiles<'_> {
    fn paths(&self) -> Vec<&str> {
        SiteFiles::paths(self).collect()
    }

    fn has(&self, path: &str) -> bool {
        SiteFiles::has(self, path)
    }

    fn read(&self, path: &str, limit: u64) -> Option<Vec<u8>> {
        SiteFiles::read(self, path, limit)
    }
}

/// What somebody wants of a thread.
#[derive(Debug, Clone)]
pub struct AltTextWish {
    pub key: ThreadKey,
    /// Of all texts, whatever the site says.
    pub language: Option<String>,
    pub model: Option<String>,
    /// Most that may be spent, in US dollars.
    pub most_usd: Option<f64>,
    /// Say what would be described, and do nothing.
    pub dry_run: bool,
    pub expected_head: Option<String>,
    pub author: Option<Author>,
    pub idempotency_key: Option<String>,
    /// For the log.
    pub request_id: Option<String>,
}

/// What came of it.
#[derive(Debug, Clone)]
pub enum AltTextAnswer {
    /// Nothing was done: what would be, how many images it asks about, and what that may cost at
    /// most.
    DryRun {
        report: Report,
        images: usize,
        worst_usd: f64,
    },
    /// The turn, or that there was nothing to change. With a [`Report`].
    Written(OperationAnswer),
}

/// Why a site's images have no texts.
#[derive(Debug, thiserror::Error)]
pub enum AltTextError {
    #[error(transparent)]
    Supervisor(#[from] SupervisorError),
    #[error(transparent)]
    Service(#[from] ServiceError),
    #[error(transparent)]
    Describe(#[from] DescribeError),
    #[error(
        "one image may cost ${worst:.4}, more than maxCostUsd allows; raise it, or leave it out"
    )]
    TooLittle { worst: f64 },
    /// By whoever asked for it.
    #[error("it was cancelled before anything of the site was changed")]
    Cancelled,
    /// Not one could be described.
    #[error("no image could be described: {0}")]
    Stopped(String),
}

impl AltTexts {
    /// Gives the images of a thread's site texts, as one turn. `tell` hears how far the
    /// descriptions are. `stop` ends it as long as they are under way.
    ///
    /// # Errors
    /// [`AltTextError`]; nothing was changed then.
    pub async fn write(
        &self,
        supervisor: &Supervisor,
        wish: AltTextWish,
        stop: &CancellationToken,
        tell: &mut (dyn FnMut(&Progress) + Send),
    ) -> Result<AltTextAnswer, AltTextError> {
        let asked = Asked {
            model: wish.model.clone(),
            account: Account {
                client: Some(wish.key.client.clone()),
                user: Some(wish.key.user.clone()),
                thread: Some(wish.key.thread.clone()),
                ..Account::of_kind(Account::LABEL)
            },
            most_usd: wish.most_usd,
        };
        // Before anything is looked at: what has come or changed since is none of that call's.
        if let Some(call) = &wish.idempotency_key {
            let seen = supervisor.seen(&wish.key, call);
            if let Some(turn) = unless(supervisor, stop, seen).await?? {
                let turn = turn.outcome().await.map_err(SupervisorError::from)?;
                let done = OperationAnswer::Done(Box::new(turn));
                return Ok(AltTextAnswer::Written(done));
            }
        }
        let (texts, language) = (self.clone(), wish.language.clone());
        let look = supervisor.look_at_site(&wish.key, wish.expected_head.clone(), move |files| {
            let mut kept = texts.kept();
            let sights = look(files, language.as_deref(), &mut |subject, bytes| {
                kept.keep(subject, bytes);
            });
            (sights, kept)
        });
        let (mut sights, kept) = unless(supervisor, stop, look).await??;
        if wish.dry_run {
            let unfit = self.unfit(&kept, &sights.wanted);
            sights.leave(&unless(supervisor, stop, unfit).await?);
            let worst_usd = self
                .worst(&sights.wanted, &asked)
                .map_err(DescribeError::from)?;
            return Ok(AltTextAnswer::DryRun {
                images: sights.wanted.len(),
                report: foreseen(sights),
                worst_usd,
            });
        }
        if let Some(first) = sights.wanted.first() {
            self.check_budget(first, &asked).await?;
        }
        let described = self.describe(&kept, &sights.wanted, &asked, tell);
        let answers = unless(supervisor, stop, described).await??;
        drop(kept);
        let is_any = answers.texts.values().any(Result::is_ok);
        if let (Some(why), false) = (&answers.stopped, is_any) {
            return match supervisor.is_draining() {
                true => Err(SupervisorError::Draining.into()),
                false => Err(AltTextError::Stopped(why.clone())),
            };
        }
        let request = OperationRequest {
            key: wish.key,
            operation: Operation::Edit(edit(answers, wish.language)),
            expected_head: wish.expected_head,
            dry_run: false,
            author: wish.author,
            idempotency_key: wish.idempotency_key,
            request_id: wish.request_id,
        };
        Ok(AltTextAnswer::Written(supervisor.operate(request).await?))
    }

    /// Says that there is no money for one image before anything is begun.
    async fn check_budget(&self, first: &Wanted, asked: &Asked) -> Result<(), AltTextError> {
        let worst = self
            .worst(std::slice::from_ref(first), asked)
            .map_err(DescribeError::from)?;
        if asked.most_usd.is_some_and(|most| worst > most) {
            return Err(AltTextError::TooLittle { worst });
        }
        let ledger = self.labels().service().ledger();
        match ledger.meter(asked.account.clone()).check().await {
            Err(Denied::OverBudget(breach)) => Err(ServiceError::OverBudget { breach }.into()),
            // The gateway asks again, and knows what to do.
            _ => Ok(()),
        }
    }
}

/// Waits for something, unless somebody cancels it before. A stop of greenroom is none of theirs: then
/// what is under way ends in peace.
async fn unless<T>(
    supervisor: &Supervisor,
    stop: &CancellationToken,
    work: impl Future<Output = T>,
) -> Result<T, AltTextError> {
    let cancelled = async {
        stop.cancelled().await;
        if supervisor.is_draining() {
            std::future::pending::<()>().await;
        }
    };
    tokio::select! {
        biased;
        () = cancelled => Err(AltTextError::Cancelled),
        done = work => Ok(done),
    }
}

/// The turn that writes what was answered.
fn edit(answers: Answers, language: Option<String>) -> SiteEdit {
    SiteEdit::new(TurnKind::AltText, move |files| {
        let (written, mut report) = write_all(files, language.as_deref(), &answers.texts);
        report.stopped.clone_from(&answers.stopped);
        let count = report.done.len();
        Ok(SiteChange {
            title: match count {
                1 => "Describe an image".to_owned(),
                count => format!("Describe {count} images"),
            },
            text: report.in_words(),
            files: written
                .into_iter()
                .map(|(path, bytes)| (path, Some(bytes)))
                .collect(),
            usage: answers.usage,
            report: to_value(&report).expect("plain data serialises"),
        })
    })
}
