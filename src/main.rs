//! The thin end of the program: see `greenroom::cli`.

fn main() {}
