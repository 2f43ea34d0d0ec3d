//! What the proxy and the driver of one preview know of its site beside the status.

use std::sync::{Arc, OnceLock};

use super::{PreviewSite, filter::Folders, touched::LastPage};

/// Shared by both. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(crate) struct Notes(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    last_page: LastPage,
    folders: OnceLock<Folders>,
}

impl Notes {
    /// The page that somebody was shown last.
    pub(crate) fn last_page(&self) -> &LastPage {
        &self.0.last_page
    }

    /// Looks where the site's folders really are. Blocking; before a server is up.
    pub(crate) fn resolve_folders(&self, site: &PreviewSite) {
        self.0.folders.get_or_init(|| {
            let others = site.readable.iter().chain(&site.writable);
            Folders::resolve(
                [&site.worktree]
                    .into_iter()
                    .chain(others)
                    .map(AsRef::as_ref),
            )
        });
    }

    /// The folders whose files may be named by their whole path; none before a server was up.
    pub(crate) fn folders(&self) -> Option<&Folders> {
        self.0.folders.get()
    }
}
