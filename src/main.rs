//! The thin end of the program: see [`greenroom::cli`].

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    // Before anything else: a child's stages run while there is one thread.
    if let Some(code) = greenroom::process::run_child_if_asked() {
        return code;
    }
    greenroom::cli::main()
}
