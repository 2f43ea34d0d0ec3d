//! How many dev servers are awake at once, and which one sleeps when another is needed.
//!
//! A driver takes a [`Slot`] before it starts its server and keeps it while that one lives. Where
//! none is left the least recently used server is asked to sleep; its slot is free once it ended.

use std::{
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use tokio::{
    sync::{Notify, OwnedSemaphorePermit, Semaphore},
    time::{Instant, timeout},
};

use super::notes::Notes;

/// A server ends within its driver's grace of 5 s, after a start that is just under way.
const PATIENCE: Duration = Duration::from_secs(15);

/// Those that are awake, and the room for them. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Slots(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    permits: Arc<Semaphore>,
    awake: Mutex<Vec<Resident>>,
    /// Held by the one that looks for room: each asks one other to sleep.
    door: tokio::sync::Mutex<()>,
}

#[derive(Debug)]
struct Resident {
    notes: Notes,
    sleep: Arc<Notify>,
    is_leaving: bool,
}

/// Room for one dev server, until it is dropped.
#[derive(Debug)]
pub(crate) struct Slot {
    slots: Slots,
    sleep: Arc<Notify>,
    _permit: OwnedSemaphorePermit,
}

/// Who is awake, for the decision.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Guest {
    last_used: Instant,
    has_turn: bool,
    has_person: bool,
}

impl Guest {
    fn is_needed(self) -> bool {
        self.has_turn || self.has_person
    }
}

/// Which of these sleeps first: of those that nobody needs the least recently used one. If all are
/// needed, one with a turn alone comes before one that somebody has before their eyes.
fn first_to_sleep(guests: &[Guest]) -> Option<usize> {
    let order = |(_, guest): &(usize, &Guest)| (guest.has_person, guest.has_turn, guest.last_used);
    guests
        .iter()
        .enumerate()
        .min_by_key(order)
        .map(|(index, _)| index)
}

impl Slots {
    /// Room for so many.
    pub(crate) fn new(most: usize) -> Self {
        Self(Arc::new(Inner {
            permits: Arc::new(Semaphore::new(most)),
            awake: Mutex::default(),
            door: tokio::sync::Mutex::default(),
        }))
    }

    /// Room for this preview, made where there is none; `None` if nobody went within 15 s.
    pub(crate) async fn take(&self, notes: &Notes) -> Option<Slot> {
        let permits = &self.0.permits;
        let find = async {
            let _door = self.0.door.lock().await;
            if permits.available_permits() == 0 {
                self.ask_one_to_sleep();
            }
            permits.clone().acquire_owned().await.ok()
        };
        let permit = timeout(PATIENCE, find).await.ok().flatten()?;
        notes.note_used();
        let sleep = Arc::new(Notify::new());
        self.awake().push(Resident {
            notes: notes.clone(),
            sleep: sleep.clone(),
            is_leaving: false,
        });
        Some(Slot {
            slots: self.clone(),
            sleep,
            _permit: permit,
        })
    }

    /// Could one more be awake without taking anything from somebody?
    pub(crate) fn has_room(&self) -> bool {
        if self.0.permits.available_permits() > 0 {
            return true;
        }
        let guests = guests(&self.awake());
        guests.iter().any(|guest| !guest.is_needed())
    }

    fn ask_one_to_sleep(&self) {
        let mut awake = self.awake();
        // Of one that goes the room is somebody else's.
        awake.sort_by_key(|resident| resident.is_leaving);
        let staying = awake.partition_point(|resident| !resident.is_leaving);
        if let Some(index) = first_to_sleep(&guests(&awake[..staying])) {
            awake[index].is_leaving = true;
            awake[index].sleep.notify_one();
        }
    }

    fn awake(&self) -> MutexGuard<'_, Vec<Resident>> {
        self.0.awake.lock().expect("no panic while it is held")
    }
}

fn guests(awake: &[Resident]) -> Vec<Guest> {
    let now = Instant::now();
    let guest = |resident: &Resident| Guest {
        last_used: resident.notes.last_used(),
        has_turn: resident.notes.has_turn(),
        has_person: resident.notes.has_person(now),
    };
    awake.iter().map(guest).collect()
}

impl Slot {
    /// Waits until somebody else needs the room.
    pub(crate) async fn is_wanted(&self) {
        self.sleep.notified().await;
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut awake = self.slots.awake();
        awake.retain(|resident| !Arc::ptr_eq(&resident.sleep, &self.sleep));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_recently_used_one_sleeps_that_nobody_needs() {
        let start = Instant::now();
        let guest = |used, needs: &str| Guest {
            last_used: start + Duration::from_secs(used),
            has_turn: needs.contains('t'),
            has_person: needs.contains('p'),
        };
        type Who = (u64, &'static str);
        let cases: &[(&[Who], Option<usize>)] = &[
            (&[], None),
            (&[(5, "")], Some(0)),
            (&[(5, ""), (3, ""), (4, "")], Some(1)),
            (&[(1, "p"), (2, "t"), (9, "")], Some(2)),
            (&[(1, "p"), (7, ""), (6, "")], Some(2)),
            // All are needed.
            (&[(1, "p"), (2, "t"), (3, "tp")], Some(1)),
            (&[(1, "tp"), (2, "p"), (3, "p")], Some(1)),
            (&[(2, "tp"), (1, "tp")], Some(1)),
        ];
        for (guests, sleeper) in cases {
            let all: Vec<Guest> = guests.iter().map(|(used, who)| guest(*used, who)).collect();
            assert_eq!(first_to_sleep(&all), *sleeper, "{guests:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn room_is_made_once_for_each_that_needs_it() {
        let slots = Slots::new(2);
        let notes: Vec<Notes> = (0..4).map(|_| Notes::default()).collect();
        let first = slots.take(&notes[0]).await.unwrap();
        let second = slots.take(&notes[1]).await.unwrap();
        let (turn, other) = (notes[0].begin_turn(), notes[1].begin_turn());
        assert!(!slots.has_room());
        drop((turn, other));
        assert!(slots.has_room());
        tokio::time::advance(Duration::from_secs(1)).await;
        notes[0].note_used();
        let leave = async {
            second.is_wanted().await;
            drop(second);
            first.is_wanted().await;
            drop(first);
        };
        let (third, fourth, ()) = tokio::join!(slots.take(&notes[2]), slots.take(&notes[3]), leave);
        assert!(third.is_some() && fourth.is_some());
        assert!(slots.take(&notes[0]).await.is_none(), "nobody goes");
    }
}
