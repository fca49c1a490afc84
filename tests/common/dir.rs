//! A directory for one test: files, listening sockets.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

/// A directory for one test, which every user may enter. It is removed when dropped.
pub struct Place(PathBuf);

impl Place {
    pub fn new() -> Self {
        // Not named after the process: a test that was killed leaves its directory, and process IDs come again.
        let path = nix::unistd::mkdtemp(&std::env::temp_dir().join("echod-test-XXXXXX")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        Self(path)
    }

    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.0.join(name)
    }

    /// Writes a file with mode 0644.
    pub fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path(name);
        // rename(2) replaces it at once, so that no reader sees half of it.
        let new = self.path(format!("{name}.new"));
        fs::write(&new, text).unwrap();
        fs::set_permissions(&new, fs::Permissions::from_mode(0o644)).unwrap();
        fs::rename(&new, &path).unwrap();
        path
    }

    /// A wrapper that runs a program with this /etc/subuid.
    pub fn with_subuid(&self, text: &str) -> Vec<String> {
        let subuid = self.file("subuid", text);
        fs::OpenOptions::new().append(true).create(true).open("/etc/subuid").unwrap();
        let script = "mount --bind \"$0\" /etc/subuid && exec \"$@\"";
        let words = ["unshare", "-m", "--propagation", "private", "sh", "-c", script, subuid.to_str().unwrap()];
        words.map(str::to_owned).to_vec()
    }

    /// A listening socket, as systemd makes it with SocketMode=0666.
    pub fn listener(&self, name: &str) -> UnixListener {
        let path = self.path(name);
        let listener = UnixListener::bind(&path).unwrap();
        nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(4096).unwrap()).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
        listener
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
