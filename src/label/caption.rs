//! Captions beside images, as trainers of image models read them. A person corrects them: then they are
//! that person's.

use std::{fs, path::Path};

use crate::workspace::{WorkspaceError, read_bounded, write_atomic};

/// More than any caption of ours has.
const MAX_BYTES: u64 = 1 << 20;

/// As it stands in its file.
fn text_of(description: &str) -> String {
    format!("{description}\n")
}

/// Writes a caption where there is none, or one of ours: of these words, or of those that were said
/// `before`. Whatever else is there is replaced only if that `replaces`; answers whether the caption
/// is there now. Blocking.
///
/// # Errors
/// The disk's.
pub(super) fn write(
    at: &Path,
    description: &str,
    before: Option<&str>,
    replaces: bool,
) -> Result<bool, WorkspaceError> {
    let text = text_of(description);
    let is_ours = match read_bounded(at, MAX_BYTES) {
        Ok(Some(there)) if there == text.as_bytes() => return Ok(true),
        Ok(Some(there)) => before.is_some_and(|before| there == text_of(before).as_bytes()),
        // A link that leads nowhere is somebody's too.
        Ok(None) => fs::symlink_metadata(at).is_err(),
        Err(WorkspaceError::TooLarge { .. }) => false,
        Err(error) => return Err(error),
    };
    if is_ours || replaces {
        write_atomic(at, text.as_bytes())?;
    }
    Ok(is_ours || replaces)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_person_s_words_stay() {
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path().join("a.txt");
        let there = || fs::read_to_string(&at).unwrap();
        assert!(write(&at, "A shoe.", None, false).unwrap());
        assert_eq!(there(), "A shoe.\n");
        // What was said before is ours to replace.
        assert!(write(&at, "A boot.", Some("A shoe."), false).unwrap());
        assert!(write(&at, "A boot.", None, false).unwrap());
        assert_eq!(there(), "A boot.\n");
        for own in ["a boot, ACMESHOE\n", "", "A boot."] {
            fs::write(&at, own).unwrap();
            assert!(!write(&at, "A boot.", Some("A shoe."), false).unwrap());
            assert_eq!(there(), own);
        }
        assert!(write(&at, "A boot.", None, true).unwrap());
        assert_eq!(there(), "A boot.\n");
        fs::remove_file(&at).unwrap();
        std::os::unix::fs::symlink("nowhere", &at).unwrap();
        assert!(!write(&at, "A boot.", None, false).unwrap());
    }
}
