//! The book that a running program keeps: shared, and read on threads of its own.

use std::{
    io,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use jiff::Timestamp;

use super::{Book, Budgets, Live, Question, Report, Tenants};
use crate::task::{self, BlockingError};

/// The first look reads all ledgers that there are.
const DEADLINE: Duration = Duration::from_secs(60);

/// The ledgers could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    #[error("failed to read the usage ledgers")]
    Read(#[from] io::Error),
    #[error(transparent)]
    Blocking(#[from] BlockingError),
}

/// A workspace's ledgers, for whoever asks. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Books {
    book: Arc<Mutex<Book>>,
    tenants: Tenants,
    budgets: Budgets,
}

impl Books {
    /// Of these tenants; reads nothing yet.
    pub fn new(workspace: impl Into<PathBuf>, tenants: Tenants, budgets: Budgets) -> Self {
        Self {
            book: Arc::new(Mutex::new(Book::new(workspace, tenants.clone()))),
            tenants,
            budgets,
        }
    }

    /// Where days begin.
    pub fn zone(&self) -> &jiff::tz::TimeZone {
        &self.budgets.zone
    }

    /// A report of what is on the disk now.
    ///
    /// # Errors
    /// [`ReadError`].
    pub async fn report(&self, question: Question) -> Result<Report, ReadError> {
        self.look(move |book| book.report(&question)).await
    }

    /// What is spent right now.
    ///
    /// # Errors
    /// [`ReadError`].
    pub async fn live(&self) -> Result<Live, ReadError> {
        let (budgets, tenants) = (self.budgets.clone(), self.tenants.clone());
        self.look(move |book| Live::of(book, &budgets, &tenants, Timestamp::now()))
            .await
    }

    async fn look<T: Send + 'static>(
        &self,
        look: impl FnOnce(&Book) -> T + Send + 'static,
    ) -> Result<T, ReadError> {
        let book = self.book.clone();
        let read = move || {
            let mut book = book.lock().unwrap_or_else(PoisonError::into_inner);
            book.refresh()?;
            Ok(look(&book))
        };
        task::blocking("reading the usage ledgers", DEADLINE, read).await?
    }
}
