//! Which programs of the system an installation failed for. The default container image has none of
//! them; its target `full` has them all.

/// A program that packages want at install, and the names by which their tools ask for it.
const PROGRAMS: [(&str, &[&str]); 5] = [
    ("git", &["git"]),
    ("python3", &["python3", "python"]),
    ("make", &["make"]),
    ("g++", &["g++", "c++", "gcc", "cc"]),
    ("curl", &["curl"]),
];
/// node-gyp's word for a search in vain; measured with npm 10.9.9.
const NO_PYTHON: &str = "Could not find any Python installation to use";

/// The programs that `output` says were not found, and that are not there. What node-gyp would miss
/// next, once it has Python, is named at once.
pub(super) fn missing_programs(output: &str, is_there: impl Fn(&str) -> bool) -> Vec<&'static str> {
    let compiles = output.contains(NO_PYTHON);
    PROGRAMS
        .iter()
        .filter(|(program, names)| {
            let is_named = names.iter().any(|name| is_not_found(output, name));
            let is_next = compiles && matches!(*program, "python3" | "make" | "g++");
            (is_named || is_next) && !names.iter().any(|name| is_there(name))
        })
        .map(|(program, _)| *program)
        .collect()
}

/// Whether a line says that there is no such program: in the words of Node (npm, pnpm), of a shell,
/// of make, of node-gyp, and of Yarn 1.
fn is_not_found(output: &str, name: &str) -> bool {
    let shell = [
        format!(" {name}: not found"),
        format!(" {name}: command not found"),
        format!(" {name}: No such file or directory"),
    ];
    let words = [
        format!("syscall spawn {name}"),
        format!("spawn {name} ENOENT"),
        format!("Error: not found: {name}"),
        format!("find the binary {name}"),
    ];
    output.lines().map(str::trim_end).any(|line| {
        shell.iter().any(|end| line.ends_with(end.as_str()))
            || words.iter().any(|word| {
                line.split_once(word.as_str())
                    .is_some_and(|(_, rest)| !rest.starts_with(|c: char| c.is_alphanumeric()))
            })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn missing(output: &str) -> Vec<&'static str> {
        missing_programs(output, |_| false)
    }

    #[test]
    fn a_program_that_was_not_found_is_named() {
        for (output, programs) in [
            // npm 10.9.9, a dependency from GitHub.
            (
                "npm error code ENOENT\nnpm error syscall spawn git\nnpm error path git",
                vec!["git"],
            ),
            // node-gyp 11.5.0, and what it says once it has Python.
            (
                "gyp ERR! stack Error: Could not find any Python installation to use",
                vec!["python3", "make", "g++"],
            ),
            ("gyp ERR! stack Error: not found: make", vec!["make"]),
            ("make: g++: No such file or directory", vec!["g++"]),
            ("make: cc: No such file or directory", vec!["g++"]),
            ("sh: 1: make: not found", vec!["make"]),
            ("bash: line 1: curl: command not found", vec!["curl"]),
            ("error Couldn't find the binary git", vec!["git"]),
            ("Error: spawn git ENOENT", vec!["git"]),
            (
                "npm error code E404\nnpm error 404 'maker' is not found",
                vec![],
            ),
            ("sh: 1: cmake: not found\nspawn gitx ENOENT", vec![]),
            ("cat: make: Permission denied", vec![]),
        ] {
            assert_eq!(missing(output), programs, "{output}");
        }
    }

    #[test]
    fn what_is_installed_is_not_missing() {
        let output = "npm error syscall spawn git\nsh: 1: cc: not found";
        assert_eq!(missing_programs(output, |name| name == "git"), ["g++"]);
        assert!(missing_programs(output, |name| ["git", "c++"].contains(&name)).is_empty());
    }
}
