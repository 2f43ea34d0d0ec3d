//! The thin end of the program: see `greenroom::cli`.

use std::process::ExitCode;

fn main() -> ExitCode {
    // Before anything else: a child's stages run while there is one thread.
    if let Some(code) = greenroom::process::run_child_if_asked() {
        return code;
    }
    ExitCode::SUCCESS
}
