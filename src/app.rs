//! (room)

use crate::config::{Loaded, Mode};

/// Placeholder: the composition root is written elsewhere.
///
/// # Errors
/// No credential of the model API.
#[expect(clippy::unused_async, reason = "placeholder")]
pub async fn serve(loaded: Loaded, _mode: Mode) -> anyhow::Result<()> {
    loaded.credential()?;
    Ok(())
}
