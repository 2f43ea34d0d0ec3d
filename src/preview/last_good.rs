//! The last good rendering of each page that somebody looked at, to be shown while it is broken.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
};

use bytes::{Bytes, BytesMut};

/// Of one preview.
const MOST_PAGES: usize = 16;
/// Of one page; a larger one is not kept.
const MOST_BYTES: usize = 512 * 1024;

/// The pages of one preview. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(crate) struct LastGood(Arc<Mutex<VecDeque<(String, Bytes)>>>);

impl LastGood {
    /// A page is on its way to a browser.
    pub(crate) fn begin(&self, target: &str) -> Rendering {
        Rendering {
            pages: self.clone(),
            target: target.to_owned(),
            html: BytesMut::new(),
        }
    }

    /// As this page was when it was whole.
    pub(crate) fn page(&self, target: &str) -> Option<Bytes> {
        let pages = self.0.lock().expect("no panic while it is held");
        let found = pages.iter().find(|(known, _)| known == target);
        found.map(|(_, html)| html.clone())
    }

    fn keep(&self, target: String, html: Bytes) {
        let mut pages = self.0.lock().expect("no panic while it is held");
        pages.retain(|(known, _)| *known != target);
        pages.push_back((target, html));
        if pages.len() > MOST_PAGES {
            pages.pop_front();
        }
    }
}

/// A page as far as it came; kept once it is whole.
#[derive(Debug)]
pub(crate) struct Rendering {
    pages: LastGood,
    target: String,
    html: BytesMut,
}

impl Rendering {
    /// More of it; nothing if it is too large to be kept.
    pub(crate) fn add(mut self, bytes: &Bytes) -> Option<Self> {
        let fits = self.html.len() + bytes.len() <= MOST_BYTES;
        if fits {
            self.html.extend_from_slice(bytes);
        }
        fits.then_some(self)
    }

    /// That was all.
    pub(crate) fn finish(self) {
        if !self.html.is_empty() {
            self.pages.keep(self.target, self.html.freeze());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn show(pages: &LastGood, target: &str, html: &[u8]) {
        let rendering = pages.begin(target).add(&Bytes::copy_from_slice(html));
        if let Some(rendering) = rendering {
            rendering.finish();
        }
    }

    #[test]
    fn the_last_whole_pages_are_kept() {
        let pages = LastGood::default();
        show(&pages, "/", b"one");
        show(&pages, "/", b"two");
        drop(pages.begin("/").add(&Bytes::from_static(b"half")));
        assert_eq!(pages.page("/").as_deref(), Some(&b"two"[..]));
        assert_eq!(pages.page("/?q=1"), None);
        show(&pages, "/large", &vec![b'x'; MOST_BYTES + 1]);
        assert_eq!(pages.page("/large"), None);
        for number in 0..MOST_PAGES {
            show(&pages, &format!("/{number}"), b"x");
        }
        assert_eq!(pages.page("/"), None);
        assert!(pages.page("/0").is_some());
    }
}
