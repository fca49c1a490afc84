//! The way from README.md to a service of one's own, as it is written there: a package outside this tree with the
//! README's code, built, run by systemd-socket-activate, and connected to. Needs root, for two users.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// The user that runs the service.
const ALICE: u32 = 61_011;

/// A directory outside the tree, removed at the end.
struct Directory(PathBuf);

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn client(socket: &Path, uid: u32) -> String {
    let mut nc = Command::new("setpriv");
    nc.arg(format!("--reuid={uid}")).arg(format!("--regid={uid}")).arg("--clear-groups").args(["nc", "-U"]).arg(socket);
    let output = nc.stdin(Stdio::null()).output().expect("setpriv, of util-linux");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn the_readmes_service_builds_alone_and_admits_only_its_owner() {
    assert!(nix::unistd::geteuid().is_root(), "this test makes other users' processes: run it as root");
    let root = &Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let readme = fs::read_to_string(root.join("README.md")).unwrap();
    let dependency = readme.split('`').find(|code| code.starts_with("peergate = {")).expect("the dependency");
    assert!(dependency.contains("\"…/src/peergate\""), "{dependency}");
    let main = readme.split("```rust\n").nth(1).and_then(|rest| rest.split("```").next()).expect("the code");

    let directory = Directory(nix::unistd::mkdtemp(&std::env::temp_dir().join("peergate-newcomer-XXXXXX")).unwrap());
    fs::set_permissions(&directory.0, fs::Permissions::from_mode(0o755)).unwrap();
    let mut new = Command::new(env!("CARGO"));
    new.args(["new", "--quiet", "--vcs", "none", "hello"]).current_dir(&directory.0);
    assert!(new.status().unwrap().success());
    let package = &directory.0.join("hello");
    let dependency = dependency.replace("…", root.to_str().unwrap());
    let manifest = fs::read_to_string(package.join("Cargo.toml")).unwrap();
    assert!(manifest.ends_with("[dependencies]\n"), "{manifest}");
    fs::write(package.join("Cargo.toml"), manifest + &dependency + "\n").unwrap();
    fs::write(package.join("src/main.rs"), main).unwrap();
    let target = std::env::current_exe().unwrap().ancestors().nth(3).unwrap().join("newcomer");
    let build = || {
        let mut cargo = Command::new(env!("CARGO"));
        cargo.args(["build", "--quiet"]).current_dir(package).env("CARGO_TARGET_DIR", &target);
        // This test needs no network.
        cargo.env("CARGO_NET_OFFLINE", "true").env("RUSTFLAGS", "--deny warnings").status().unwrap().success()
    };
    // A new package gets the newest versions of its dependencies. Offline that may fail; then it gets the tree's.
    if !build() {
        fs::copy(root.join("Cargo.lock"), package.join("Cargo.lock")).unwrap();
        assert!(build());
    }
    // Dependencies of the program alone are not among them.
    let lock = fs::read_to_string(package.join("Cargo.lock")).unwrap();
    assert!(lock.contains("name = \"peergate\""));
    let tree = Command::new(env!("CARGO")).args(["tree", "--offline", "--edges=normal"]).current_dir(package).output();
    let tree = String::from_utf8(tree.unwrap().stdout).unwrap();
    assert!(tree.contains("listenfd"), "{tree}");
    for unwanted in ["clap", "memchr", "serde_json", "tokio"] {
        assert!(!tree.contains(&format!(" {unwanted} v")), "{unwanted} comes with the library:\n{tree}");
    }

    // A directory of Alice's own, in which she can bind. Every user may enter it.
    let home = directory.0.join("home");
    fs::create_dir(&home).unwrap();
    chown(&home, Some(ALICE), Some(ALICE)).unwrap();
    fs::copy(target.join("debug/hello"), home.join("hello")).unwrap();
    let socket = home.join("hello.sock");
    let mut service = Command::new("setpriv")
        .args([format!("--reuid={ALICE}"), format!("--regid={ALICE}"), "--clear-groups".to_owned()])
        .args(["systemd-socket-activate", "-l"])
        .arg(&socket)
        .arg(home.join("hello"))
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stderr = BufReader::new(service.stderr.take().unwrap()).lines().map_while(Result::ok);
    assert!(stderr.any(|line| line.contains("Listening on")), "systemd-socket-activate, of systemd");
    // Read to the end, so that the pipe does not fill.
    let reader = std::thread::spawn(move || stderr.for_each(drop));

    assert_eq!(client(&socket, ALICE), format!("Hello, uid {ALICE}, by allow.owner\n"));
    // Root gets past the socket's mode, but not past the gate.
    assert_eq!(client(&socket, 0), "Unauthorized access\n");
    kill(Pid::from_raw(service.id() as i32), Signal::SIGTERM).unwrap();
    assert_eq!(service.wait().unwrap().code(), Some(0));
    reader.join().unwrap();
}
