//! A user database of the test's own, for the program and for peers.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::Place;
use super::program::PROGRAM;

/// A user database of files that the test can change while the program runs.
pub struct Database(Place);

impl Database {
    pub fn new() -> Self {
        let database = Self(Place::new());
        for file in ["passwd", "group"] {
            database.put(file, &fs::read_to_string(Path::new("/etc").join(file)).unwrap());
        }
        database.put("nsswitch.conf", "passwd: files\ngroup: files\n");
        fs::copy("/etc/ld.so.cache", database.0.path("ld.so.cache")).unwrap();
        database
    }

    pub fn path(&self, file: &str) -> PathBuf {
        self.0.path(file)
    }

    pub fn put(&self, file: &str, text: &str) {
        self.0.file(file, text);
    }

    /// As useradd(8) does it: writes a new file and renames it.
    pub fn add(&self, file: &str, line: &str) {
        let text = fs::read_to_string(self.0.path(file)).unwrap();
        self.put(file, &format!("{text}{line}\n"));
    }

    /// Replaces a file by a pipe: reading it blocks until the test writes.
    pub fn hang(&self, file: &str) -> PathBuf {
        let pipe = self.0.path("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::from_bits_truncate(0o644)).unwrap();
        fs::rename(&pipe, self.0.path(file)).unwrap();
        self.0.path(file)
    }

    /// A wrapper with a mount namespace in which this is /etc.
    pub fn wrapper(&self) -> Vec<String> {
        let script = "mount --bind \"$0\" /etc && exec \"$@\"";
        let place = self.0.path("").to_string_lossy().into_owned();
        ["unshare", "-m", "--propagation", "private", "sh", "-c", script, &place].map(str::to_owned).to_vec()
    }

    /// Runs `echod ARGUMENTS --config FILE` with it: exit code, standard output, standard error.
    pub fn echod(&self, arguments: &[&str], config: &Path) -> (i32, String, String) {
        let wrapper = self.wrapper();
        let mut command = Command::new(&wrapper[0]);
        command.args(&wrapper[1..]).arg(PROGRAM).args(arguments).arg("--config").arg(config);
        let output = command.output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (output.status.code().unwrap_or(-1), text(output.stdout), text(output.stderr))
    }
}
