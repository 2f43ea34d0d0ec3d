//! How much memory the container has left: of its own limit (cgroup v2), else of the machine.

use std::{fs, path::Path};

/// What is left and what there is, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    pub available: u64,
    pub total: u64,
}

impl Memory {
    /// As the kernel tells it now; `None` where it tells nothing. Reads `/proc` and `/sys` alone.
    pub fn now() -> Option<Self> {
        let machine = of_machine(&fs::read_to_string("/proc/meminfo").ok()?)?;
        let cgroup = of_cgroup(Path::new("/sys/fs/cgroup"));
        Some(cgroup.map_or(machine, |cgroup| {
            if cgroup.available < machine.available {
                cgroup
            } else {
                machine
            }
        }))
    }

    /// Less than a tenth is left: what is only convenient should go, before the kernel chooses.
    pub fn is_short(self) -> bool {
        self.available < self.total / 10
    }
}

fn of_machine(meminfo: &str) -> Option<Memory> {
    let field = |name: &str| -> Option<u64> {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
        Some(line.split_whitespace().next()?.parse::<u64>().ok()? * 1024)
    };
    Some(Memory {
        available: field("MemAvailable:")?,
        total: field("MemTotal:")?,
    })
}

/// A container sees its own group at the root. What the group's files fill of the page cache and
/// nobody used lately can be had at once.
fn of_cgroup(group: &Path) -> Option<Memory> {
    let read = |name: &str| fs::read_to_string(group.join(name)).ok();
    let total: u64 = read("memory.max")?.trim().parse().ok()?;
    let used: u64 = read("memory.current")?.trim().parse().ok()?;
    let stat = read("memory.stat").unwrap_or_default();
    let cached: u64 = stat
        .lines()
        .find_map(|line| line.strip_prefix("inactive_file "))
        .and_then(|bytes| bytes.parse().ok())
        .unwrap_or(0);
    Some(Memory {
        available: total.saturating_sub(used.saturating_sub(cached)),
        total,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_groups_limit_counts_and_its_page_cache_does_not() {
        let group = tempfile::tempdir().unwrap();
        let put = |name: &str, text: &str| fs::write(group.path().join(name), text).unwrap();
        assert_eq!(of_cgroup(group.path()), None, "no group");
        put("memory.max", "max\n");
        put("memory.current", "950\n");
        assert_eq!(of_cgroup(group.path()), None, "no limit");
        put("memory.max", "1000\n");
        put(
            "memory.stat",
            "anon 100\ninactive_file 500\nactive_file 100\n",
        );
        let roomy = of_cgroup(group.path()).unwrap();
        assert_eq!((roomy.available, roomy.is_short()), (550, false));
        put("memory.current", "1450\n");
        assert!(of_cgroup(group.path()).unwrap().is_short());

        let machine = of_machine("MemTotal:  2000 kB\nMemFree: 5 kB\nMemAvailable: 199 kB\n");
        assert!(machine.unwrap().is_short());
        assert!(Memory::now().is_some(), "this machine tells");
    }
}
