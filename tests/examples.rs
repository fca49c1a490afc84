//! Each example as its reader would run it: a process with its socket passed as systemd does, and clients that are
//! other users. Needs root (to change users), nc and setpriv.

use std::fs;
use std::io::{IoSlice, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{OnceLock, mpsc};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg, setsockopt, sockopt};
use nix::unistd::Pid;

const EXAMPLES: [&str; 3] = ["whoami", "view_update", "tokio_echo"];

/// An ordinary user, by number: a peer needs no account.
const ALICE: u32 = 61_001;

/// The longest wait for an event.
const PATIENCE: Duration = Duration::from_secs(120);

fn source(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples").join(file)
}

/// The program of an example, built from the tree.
fn program(example: &str) -> PathBuf {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    let directory = BUILT.get_or_init(|| {
        // TARGET/PROFILE/deps/examples-HASH
        let profile = std::env::current_exe().unwrap().ancestors().nth(2).unwrap().to_path_buf();
        let mut cargo = Command::new(env!("CARGO"));
        cargo.args(["build", "--quiet", "--locked", "--offline"]).arg("--target-dir").arg(profile.parent().unwrap());
        cargo.args(EXAMPLES.into_iter().chain(["peer", "length_daemon"]).flat_map(|example| ["--example", example]));
        cargo.args((!cfg!(debug_assertions)).then_some("--release"));
        assert!(
            cargo.current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../..")).status().unwrap().success(),
            "building the examples"
        );
        profile.join("examples")
    });
    directory.join(example)
}

/// A new directory of a test's own.
fn scratch() -> PathBuf {
    nix::unistd::mkdtemp(&std::env::temp_dir().join("peergate-XXXXXX")).unwrap()
}

/// Each message that comes to a manager's socket. A thread reads them at once: the socket holds ten, and a service that
/// ends does not wait until its last one is taken.
fn notices(socket: UnixDatagram) -> mpsc::Receiver<String> {
    let (sender, notices) = mpsc::channel();
    std::thread::spawn(move || {
        let mut message = [0; 4096];
        while let Ok(length) = socket.recv(&mut message) {
            if sender.send(String::from_utf8_lossy(&message[..length]).into_owned()).is_err() {
                return;
            }
        }
    });
    notices
}

/// A running example and the directory that holds its socket.
struct Server {
    child: Child,
    directory: PathBuf,
    /// What it has sent to its manager.
    notices: mpsc::Receiver<String>,
}

impl Server {
    fn start(example: &str, arguments: &[&Path]) -> Self {
        Self::start_after(example, arguments, |_| ()).0
    }

    /// Connects to the socket at this path before the service starts.
    fn start_after<R>(example: &str, arguments: &[&Path], comes: impl FnOnce(&Path) -> R) -> (Self, R) {
        assert!(nix::unistd::geteuid().is_root(), "run as root: the clients become other users");
        let directory = scratch();
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o755)).unwrap();
        let socket = directory.join("socket");
        let listener = UnixListener::bind(&socket).unwrap();
        fs::set_permissions(&socket, fs::Permissions::from_mode(0o666)).unwrap();
        let notices = notices(UnixDatagram::bind(directory.join("notify")).unwrap());
        let came = comes(&socket);
        // As systemd does before it calls execve(2).
        let pass = r#"exec 3<&0 </dev/null; export LISTEN_PID=$$; exec "$@""#;
        let child = Command::new("sh")
            .args(["-c", pass, "sh"])
            .arg(program(example))
            .args(arguments)
            .env("LISTEN_FDS", "1")
            .env("NOTIFY_SOCKET", directory.join("notify"))
            .env("WATCHDOG_USEC", "100000")
            .stdin(OwnedFd::from(listener))
            .spawn()
            .unwrap();
        (Self { child, directory, notices }, came)
    }

    fn socket(&self) -> PathBuf {
        self.directory.join("socket")
    }

    /// Waits until the service has sent READY=1.
    fn ready(&self) {
        self.says("READY=1");
    }

    /// Waits until the service has sent this to its manager.
    fn says(&self, expected: &str) {
        while !self.notices.recv_timeout(PATIENCE).expect(expected).lines().any(|line| line == expected) {}
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    /// The answer to a client that sends `input` and half-closes, and the client's pid.
    fn answers(&self, ids: &[&str], input: &[u8]) -> (String, u32) {
        let mut client = Command::new("setpriv")
            .args(ids)
            .args(["nc", "-N", "-U"])
            .arg(self.socket())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("setpriv, of util-linux");
        let (mut stdin, mut stdout) = (client.stdin.take().unwrap(), client.stdout.take().unwrap());
        let mut answer = String::new();
        std::thread::scope(|scope| {
            // A denied connection may be closed before all of it is sent.
            scope.spawn(move || stdin.write_all(input));
            stdout.read_to_string(&mut answer).unwrap();
        });
        assert!(client.wait().unwrap().success(), "nc (of netcat-openbsd) failed after {answer:?}");
        (answer, client.id())
    }

    fn answers_user(&self, uid: u32, input: &str) -> String {
        let (uid, gid) = (format!("--reuid={uid}"), format!("--regid={uid}"));
        self.answers(&[&uid, &gid, "--clear-groups"], input.as_bytes()).0
    }

    /// Stops it with SIGTERM.
    fn stop(mut self) {
        self.signal(Signal::SIGTERM);
        assert_eq!(self.child.wait().unwrap().code(), Some(0));
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(&self.directory);
    }
}

#[test]
fn whoami_tells_each_client_its_credentials() {
    let server = Server::start("whoami", &[]);
    let (said, pid) = server.answers(&["--reuid=61001", "--regid=61002", "--groups=61003,4"], b"");
    let (ids, process) = said.split_once('\n').unwrap();
    assert_eq!(ids, "uid 61001, gid 61002, groups 4 61003");
    assert!(process.starts_with(&format!("pid {pid}, command nc, unit ")), "{process}");
    // It has nothing to reload, and does not exit.
    server.signal(Signal::SIGHUP);
    assert!(server.answers_user(0, "").starts_with("uid 0, gid 0, groups \n"));
    server.stop();
}

/// `Service` does all that whoami leaves out.
#[test]
fn a_service_notifies_the_service_manager() {
    let server = Server::start("whoami", &[]);
    server.ready();
    server.says("WATCHDOG=1");
    server.signal(Signal::SIGHUP);
    server.says("RELOADING=1");
    server.ready();
    server.says("WATCHDOG=1");
    server.signal(Signal::SIGTERM);
    server.says("STOPPING=1");
    server.stop();
}

#[test]
fn whoami_denies_the_overflow_uid() {
    let server = Server::start("whoami", &[]);
    assert_eq!(server.answers_user(65_534, ""), "Unauthorized access\n");
    server.stop();
}

fn policy(directory: &str, text: &str) -> PathBuf {
    let file = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("{directory}-{}.toml", std::process::id()));
    fs::write(&file, text).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    file
}

#[test]
fn view_update_gives_each_user_the_rights_of_its_rule() {
    let file = policy("view-update", &fs::read_to_string(source("view_update.toml")).unwrap());
    let server = Server::start("view_update", &[&file]);
    let me = nix::unistd::geteuid().as_raw();
    let guest = 1001;
    assert_eq!(server.answers_user(me, "update Lunch is at one\nview\n"), "updated\nLunch is at one\n");
    assert_eq!(server.answers_user(guest, "update At two\nview\n"), "You may view, not update\nLunch is at one\n");
    let (editors, _) = server.answers(&["--reuid=1002", "--regid=1002", "--groups=adm"], b"update At three\nview\n");
    assert_eq!(editors, "updated\nAt three\n");
    // User 2 is neither the service's user nor in the rule.
    assert_eq!(server.answers_user(2, "view\n"), "Unauthorized access\n");
    server.stop();
    fs::remove_file(file).unwrap();
}

#[test]
fn view_update_reloads_a_policy_and_keeps_the_old_one_on_a_fault() {
    let file = policy("reload", "[allow.guest]\nusers = [61001]\n");
    let server = Server::start("view_update", &[&file]);
    server.ready();
    assert_eq!(server.answers_user(ALICE, "update A\n"), "You may view, not update\n");

    fs::write(&file, "[allow.guest]\nusers = [61001]\nmay = \"update\"\n").unwrap();
    server.signal(Signal::SIGHUP);
    server.ready();
    assert_eq!(server.answers_user(ALICE, "update A\n"), "updated\n");

    fs::write(&file, "[allow.guest]\nusers = [61001]\nmay = \"destroy\"\n").unwrap();
    server.signal(Signal::SIGHUP);
    server.ready();
    assert_eq!(server.answers_user(ALICE, "update A\n"), "updated\n");
    server.stop();
    fs::remove_file(file).unwrap();
}

#[test]
fn view_update_names_the_place_of_a_fault_and_does_not_start() {
    let file = policy("faulty", "[allow.guest]\nusers = [61001]\nmay = \"destroy\"\n");
    let directory = scratch();
    let listener = UnixListener::bind(directory.join("socket")).unwrap();
    let pass = r#"exec 3<&0 </dev/null; export LISTEN_PID=$$; exec "$@""#;
    let ended = Command::new("sh")
        .args(["-c", pass, "sh"])
        .args([program("view_update"), file.clone()])
        .env("LISTEN_FDS", "1")
        .stdin(OwnedFd::from(listener))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&ended.stderr);
    assert_eq!(ended.status.code(), Some(1), "{said}");
    assert!(said.contains(&format!("{}:3:", file.display())), "{said}");
    fs::remove_dir_all(directory).unwrap();
    fs::remove_file(file).unwrap();
}

#[test]
fn tokio_echo_echoes_to_its_owner_and_denies_another_user() {
    let server = Server::start("tokio_echo", &[]);
    let text = "0123456789\n".repeat(30_000);
    assert!(server.answers_user(nix::unistd::geteuid().as_raw(), &text) == text, "not the bytes that were sent");
    server.signal(Signal::SIGHUP);
    assert_eq!(server.answers_user(ALICE, &text), "Unauthorized access\n");
    server.stop();
}

#[test]
fn length_daemon_serves_its_owner_and_denies_another_user() {
    let server = Server::start("length_daemon", &[]);
    server.ready();
    assert_eq!(server.answers_user(0, "hello\nworld, again\nno end"), "5\n12\n");
    assert_eq!(server.answers_user(ALICE, "hello\n"), "Unauthorized access\n");
    server.stop();
}

/// A TCP connection that blocks in close(2) for hours (SO_LINGER with unsent data), and its other end.
fn slow_to_close() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut one = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let other = listener.accept().unwrap().0;
    one.set_nonblocking(true).unwrap();
    while one.write(&[0; 65536]).is_ok() {}
    one.set_nonblocking(false).unwrap();
    let linger = nix::libc::linger { l_onoff: 1, l_linger: 10_000 };
    setsockopt(&one, sockopt::Linger, &linger).unwrap();
    (one, other)
}

/// Sends a word with `what` as a descriptor, and keeps no copy. The kernel may refuse it.
fn send_along(through: &UnixStream, what: TcpStream) {
    let fds = [what.as_raw_fd()];
    let control = [ControlMessage::ScmRights(&fds)];
    let _ = sendmsg::<()>(through.as_raw_fd(), &[IoSlice::new(b"hi")], &control, MsgFlags::empty(), None);
}

/// This client connects before the service starts.
#[test]
fn a_blocking_descriptor_of_an_early_client_delays_no_other() {
    for example in ["whoami", "tokio_echo", "view_update"] {
        let file = policy(&format!("early-{example}"), "[allow.all]\nusers = [\"any\"]\n");
        let (server, (_bomber, _other_end)) = Server::start_after(example, &[&file], |socket| {
            let (bomb, other_end) = slow_to_close();
            let bomber = UnixStream::connect(socket).unwrap();
            send_along(&bomber, bomb);
            (bomber, other_end)
        });
        expect_an_answer(&server);
        server.stop();
        fs::remove_file(file).unwrap();
    }
}

/// A denied client can do so at any time, before Linux 6.16 or where the service does not refuse descriptors.
#[test]
fn a_blocking_descriptor_of_a_denied_client_delays_no_other() {
    let server = Server::start("tokio_echo", &[]);
    server.ready();
    // Meanwhile the client closes its own copy, so that the last close(2) would be the service's.
    server.signal(Signal::SIGSTOP);
    let mut stranger = Command::new(program("peer"))
        .args(["--as", "61001:61001", "bomb"])
        .arg(server.socket())
        .arg("1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // The kernel may have refused it.
    stranger.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
    server.signal(Signal::SIGCONT);
    expect_an_answer(&server);
    server.stop();
    assert!(stranger.wait().unwrap().success());
}

/// A client gets an answer before the timeout.
fn expect_an_answer(server: &Server) {
    let mut client = UnixStream::connect(server.socket()).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    client.write_all(b"view\n").unwrap();
    client.read_exact(&mut [0]).unwrap();
}

#[test]
fn tokio_echo_refuses_a_users_connection_over_the_limit() {
    let server = Server::start("tokio_echo", &[]);
    let connect = || {
        let client = UnixStream::connect(server.socket()).unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        client
    };
    let inside: Vec<UnixStream> = (0..64)
        .map(|_| {
            let mut client = connect();
            let mut echo = [0];
            client.write_all(b"x").and_then(|()| client.read_exact(&mut echo)).unwrap();
            client
        })
        .collect();
    let mut answer = String::new();
    connect().read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "Too many connections\n");
    drop(inside);
    server.stop();
}

#[test]
fn an_example_without_a_socket_says_so_and_exits() {
    for example in EXAMPLES {
        let file = policy(&format!("none-{example}"), "[allow.owner]\nusers = [\"self\"]\n");
        let ended = Command::new(program(example)).arg(&file).stdin(Stdio::null()).output().unwrap();
        let said = String::from_utf8_lossy(&ended.stderr);
        assert_eq!(ended.status.code(), Some(1), "{example}: {said}");
        assert!(said.contains("no listening socket"), "{example}: {said}");
        fs::remove_file(file).unwrap();
    }
}

/// systemd-analyze gets an environment without anything of this machine, so that the result does not depend on it.
#[test]
fn the_examples_units_are_sound() {
    let directory = scratch();
    let mut units = Vec::new();
    for example in EXAMPLES {
        for kind in ["socket", "service"] {
            let name = format!("{example}.{kind}");
            let text = fs::read_to_string(source(&name)).unwrap();
            let installed = format!("/usr/local/libexec/{example}");
            assert_eq!(text.contains(&installed), kind == "service", "{name}");
            let built = program(example);
            fs::write(directory.join(&name), text.replace(&installed, built.to_str().unwrap())).unwrap();
            units.push(directory.join(name));
        }
    }
    let verify = Command::new("systemd-analyze").args(["verify", "--man=no"]).args(&units).output().unwrap();
    let said = String::from_utf8_lossy(&verify.stderr);
    let ours: Vec<_> = said.lines().filter(|line| EXAMPLES.iter().any(|example| line.contains(example))).collect();
    assert!(verify.status.success() && ours.is_empty(), "{said}");
    fs::remove_dir_all(directory).unwrap();
}
