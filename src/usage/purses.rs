//! What is spent and what is held, by whom, as far as it is known here. Plain data, given the time.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use jiff::{SignedDuration, Timestamp, Zoned};

use super::{
    budget::Purse,
    row::{Request, Row},
};
use crate::lease::Owner;

/// A reservation that nobody settled for so long counts as spent: no request of a model's lasts so
/// long. A prediction may; it counts so until it is settled.
pub(super) const LOST_AFTER: SignedDuration = SignedDuration::from_mins(15);

/// Purses by what is in them.
#[derive(Debug, Default)]
pub(super) struct Purses {
    /// By all containers, as far as their files were read.
    pub(super) spent: HashMap<Purse, f64>,
    /// Requests that are not settled, ours and other containers'.
    pub(super) open: HashMap<String, OpenRequest>,
    /// Limits that were told to be nearly spent.
    pub(super) warned: HashSet<Purse>,
    /// Purses that were looked into before.
    pub(super) known: HashSet<Purse>,
    /// Requests that were settled by another process than reserved them, and whose reservation was
    /// not read yet.
    pub(super) settled_first: HashSet<String>,
}

/// A request that is not settled.
#[derive(Debug)]
pub(super) struct OpenRequest {
    pub(super) purses: Vec<Purse>,
    pub(super) usd: f64,
    pub(super) at: Timestamp,
    pub(super) owner: Option<Arc<Owner>>,
    /// It counts as spent already.
    pub(super) is_lost: bool,
}

impl Purses {
    pub(super) fn take_in(
        &mut self,
        row: Row,
        owner: Option<Arc<Owner>>,
        purses: impl FnOnce(&Request) -> Vec<Purse>,
    ) {
        match row {
            Row::Reserved(request) if self.settled_first.remove(&request.id) => {}
            Row::Reserved(request) => {
                let open = OpenRequest {
                    purses: purses(&request),
                    usd: request.cost_usd,
                    at: request.at,
                    owner,
                    is_lost: false,
                };
                self.open.insert(request.id, open);
            }
            Row::Settled(request) | Row::Aborted(request) | Row::Refused(request) => {
                if !self.close(&request.id) {
                    self.settled_first.insert(request.id.clone());
                }
                for purse in purses(&request) {
                    *self.spent.entry(purse).or_default() += request.cost_usd;
                }
            }
            Row::Opened { .. } | Row::Unknown => {}
        }
    }

    /// Reservations that nobody will settle any more are spent.
    pub(super) fn find_lost(&mut self, now: Timestamp) {
        for open in self.open.values_mut().filter(|open| !open.is_lost) {
            let is_dead = open.owner.as_ref().is_some_and(|owner| owner.is_gone());
            if is_dead || now.duration_since(open.at) > LOST_AFTER {
                open.is_lost = true;
                for purse in &open.purses {
                    *self.spent.entry(purse.clone()).or_default() += open.usd;
                }
            }
        }
    }

    pub(super) fn forget_over(&mut self, now: &Zoned) {
        self.spent.retain(|purse, _| !purse.is_over(now));
        self.warned.retain(|purse| !purse.is_over(now));
        self.known.retain(|purse| !purse.is_over(now));
        self.open
            .retain(|_, open| !open.is_lost || open.purses.iter().any(|purse| !purse.is_over(now)));
    }

    pub(super) fn spent(&self, purse: &Purse) -> f64 {
        self.spent.get(purse).copied().unwrap_or_default()
    }

    /// The most that open requests may come to; only those before `before`, where that is given.
    pub(super) fn held(&self, purse: &Purse, before: Option<(Timestamp, &str)>) -> f64 {
        self.open
            .iter()
            .filter(|(id, open)| {
                let is_before = before.is_none_or(|before| (open.at, id.as_str()) < before);
                !open.is_lost && is_before && open.purses.contains(purse)
            })
            .map(|(_, open)| open.usd)
            .sum()
    }

    /// The request is over: what it held is free, and what it was thought to have cost. False: its
    /// reservation is not known.
    pub(super) fn close(&mut self, id: &str) -> bool {
        let Some(open) = self.open.remove(id) else {
            return false;
        };
        for purse in open.purses.iter().filter(|_| open.is_lost) {
            if let Some(spent) = self.spent.get_mut(purse) {
                *spent -= open.usd;
            }
        }
        true
    }
}
