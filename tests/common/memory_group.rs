//! A control group with a limit on memory, of the test's own: as a unit's MemoryMax=.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Version 1 or 2 of cgroups(7), whichever has the memory controller. Removed when dropped; by then it must be empty.
pub struct MemoryGroup {
    path: PathBuf,
    is_v2: bool,
}

impl MemoryGroup {
    /// `None` where this system gives no memory controller to a test.
    pub fn new() -> Option<Self> {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let name = format!("peergate-test-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let _ = fs::write("/sys/fs/cgroup/cgroup.subtree_control", "+memory");
        [("/sys/fs/cgroup/memory", false), ("/sys/fs/cgroup", true)].into_iter().find_map(|(root, is_v2)| {
            let group = Self { path: Path::new(root).join(&name), is_v2 };
            fs::create_dir(&group.path).ok()?;
            group.path.join(group.limit_file()).exists().then_some(group)
        })
    }

    fn limit_file(&self) -> &'static str {
        if self.is_v2 { "memory.max" } else { "memory.limit_in_bytes" }
    }

    fn number(&self, v1: &str, v2: &str) -> u64 {
        self.read(v1, v2).trim().parse().unwrap()
    }

    fn read(&self, v1: &str, v2: &str) -> String {
        fs::read_to_string(self.path.join(if self.is_v2 { v2 } else { v1 })).unwrap()
    }

    /// What starts a command in it.
    pub fn wrapper(&self) -> [String; 4] {
        let script = format!("echo $$ > {}/cgroup.procs && exec \"$@\"", self.path.display());
        ["sh".into(), "-c".into(), script, "sh".into()]
    }

    pub fn set_limit(&self, bytes: u64) {
        fs::write(self.path.join(self.limit_file()), bytes.to_string()).unwrap();
        if !self.is_v2 {
            // Swap would hide a lack of memory. Not every kernel counts it.
            let _ = fs::write(self.path.join("memory.memsw.limit_in_bytes"), bytes.to_string());
        } else {
            let _ = fs::write(self.path.join("memory.swap.max"), "0");
        }
    }

    /// Bytes in use now, the kernel's for the group's processes among them.
    pub fn usage(&self) -> u64 {
        self.number("memory.usage_in_bytes", "memory.current")
    }

    /// The most so far.
    pub fn peak(&self) -> u64 {
        self.number("memory.max_usage_in_bytes", "memory.peak")
    }

    /// How many processes were killed for want of memory.
    pub fn killed(&self) -> u64 {
        let told = self.read("memory.oom_control", "memory.events");
        let line = told.lines().find_map(|line| line.strip_prefix("oom_kill ")).unwrap();
        line.trim().parse().unwrap()
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        // The last process may be about to end.
        for _ in 0..1000 {
            if fs::remove_dir(&self.path).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }
}
