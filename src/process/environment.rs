//! The environment that this process was started with, taken out of everybody's sight.
//!
//! The kernel shows it in `/proc/PID/environ` as it stands in memory at the place where the process
//! found it at its start. Taking a variable away (`unsetenv`) leaves its text there.

use std::{fs, os::unix::ffi::OsStrExt as _};

/// Overwrites the environment where `/proc/PID/environ` shows it. Every variable keeps its value for
/// this process, in memory of its own. To be called while there is one thread.
pub fn hide_environment() {
    let Some((start, end)) = shown() else {
        return;
    };
    for (name, value) in std::env::vars_os() {
        if name.is_empty() || name.as_bytes().contains(&b'=') {
            continue;
        }
        #[expect(
            unsafe_code,
            clippy::disallowed_methods,
            reason = "there is one thread; the same value, copied"
        )]
        // The C library copies what it is given.
        unsafe {
            std::env::set_var(name, value);
        }
    }
    #[expect(
        unsafe_code,
        reason = "the block lies above the stack and nothing refers to it any more"
    )]
    unsafe {
        std::ptr::with_exposed_provenance_mut::<u8>(start).write_bytes(0, end - start);
    }
}

/// From where to where it lies, as the kernel says: the 50th and 51st field of `stat`.
fn shown() -> Option<(usize, usize)> {
    let stat = fs::read_to_string("/proc/self/stat").ok()?;
    // The name may hold anything, parentheses too; the third field comes after it.
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace().skip(50 - 3);
    let start = fields.next()?.parse().ok()?;
    let end = fields.next()?.parse().ok()?;
    (0 < start && start < end).then_some((start, end))
}
