//! Which threads may keep an idle CLI: the most recently used few. Each holds 160 to 220 MB.

use std::{collections::VecDeque, sync::Mutex};

use super::lock;
use crate::identity::ThreadKey;

/// The threads with an idle agent, least recently used first.
#[derive(Debug)]
pub(super) struct WarmAgents {
    limit: usize,
    threads: Mutex<VecDeque<ThreadKey>>,
}

impl WarmAgents {
    pub(super) fn new(limit: usize) -> Self {
        Self {
            limit,
            threads: Mutex::default(),
        }
    }

    /// May this thread keep an idle agent? Answers those that have to give theirs up for it; the
    /// thread itself among them where none are kept at all.
    pub(super) fn admit(&self, key: &ThreadKey) -> Vec<ThreadKey> {
        let mut threads = lock(&self.threads);
        threads.retain(|other| other != key);
        threads.push_back(key.clone());
        let surplus = threads.len().saturating_sub(self.limit);
        threads.drain(..surplus).collect()
    }

    /// The one to go first, if memory is short.
    pub(super) fn give_up_oldest(&self) -> Option<ThreadKey> {
        lock(&self.threads).pop_front()
    }

    /// The thread's agent is at work, or gone.
    pub(super) fn remove(&self, key: &ThreadKey) {
        lock(&self.threads).retain(|other| other != key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_recently_used_goes_first() {
        let key = |t: &str| ThreadKey::parse("c", "u", t).unwrap();
        let warm = WarmAgents::new(2);
        assert!(warm.admit(&key("a")).is_empty());
        assert!(warm.admit(&key("b")).is_empty());
        assert!(warm.admit(&key("a")).is_empty());
        assert_eq!(warm.admit(&key("c")), [key("b")]);
        warm.remove(&key("a"));
        assert!(warm.admit(&key("d")).is_empty());
        assert_eq!(warm.give_up_oldest(), Some(key("c")));
        assert_eq!(warm.give_up_oldest(), Some(key("d")));
        assert_eq!(warm.give_up_oldest(), None);
        assert_eq!(WarmAgents::new(0).admit(&key("a")), [key("a")]);
    }
}
