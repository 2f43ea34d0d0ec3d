//! The folders of one run: made for it, gone after it.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use crate::{
    owner::{Owner, make_folder, take_over},
    task,
};

/// A handful of small folders on the container's own disk; of a run that filled it, many files.
const DISK_DEADLINE: Duration = Duration::from_secs(60);

/// A private folder that is removed with its value.
#[derive(Debug)]
pub(super) struct Scratch {
    root: PathBuf,
    is_gone: bool,
}

impl Scratch {
    /// `place` is where the run writes in place. Where runs are `owners` of their own the folders are
    /// its owner's; a place that has none is handed over.
    pub(super) async fn make(
        below: &Path,
        owners: bool,
        place: Option<PathBuf>,
    ) -> io::Result<Self> {
        let root = below.join(uuid::Uuid::new_v4().simple().to_string());
        let scratch = Self {
            root,
            is_gone: false,
        };
        let folders = [
            scratch.root.clone(),
            scratch.home(),
            scratch.temporary(),
            scratch.work(),
        ];
        let make = move || {
            let owner = match owners {
                true => Some(owner_of_run(place.as_deref())?),
                false => None,
            };
            folders
                .iter()
                .try_for_each(|folder| make_folder(folder, owner))
        };
        task::blocking("making a run's folders", DISK_DEADLINE, make)
            .await
            .map_err(io::Error::other)??;
        Ok(scratch)
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// HOME and the CLI's configuration.
    pub(super) fn home(&self) -> PathBuf {
        self.root.join("home")
    }

    pub(super) fn temporary(&self) -> PathBuf {
        self.root.join("tmp")
    }

    /// Where a run works that has no place of its own.
    pub(super) fn work(&self) -> PathBuf {
        self.root.join("work")
    }

    /// Removes it, off the async workers.
    pub(super) async fn remove(mut self) {
        self.is_gone = true;
        let root = self.root.clone();
        let removed = task::blocking("removing a run's folders", DISK_DEADLINE, move || {
            std::fs::remove_dir_all(root)
        })
        .await;
        if !matches!(removed, Ok(Ok(()))) {
            tracing::warn!(?removed, "a one-shot run's folder could not be removed");
        }
    }
}

/// Who a run is: the owner of the place where it works, or of the user's folder that this is in.
fn owner_of_run(place: Option<&Path>) -> io::Result<Owner> {
    let Some(place) = place else {
        return Ok(Owner::of_run());
    };
    if let Some(owner) = Owner::of(place) {
        return Ok(owner);
    }
    let owner = place.ancestors().find_map(Owner::of_user);
    let owner = owner.unwrap_or_else(Owner::of_run);
    take_over(place, Some(owner))?;
    Ok(owner)
}

impl Drop for Scratch {
    /// For a run that is dropped in its midst.
    fn drop(&mut self) {
        if !self.is_gone {
            std::fs::remove_dir_all(&self.root).ok();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_run_without_a_place_is_a_user_of_its_own() {
        let [one, other] = [(); 2].map(|()| owner_of_run(None).unwrap());
        assert!(one.uid() != other.uid() && one.gid() != other.gid());
    }
}
