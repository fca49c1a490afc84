//! What the program writes to may be full, closed, or not read for as long as it likes: a descriptor that it was given,
//! the service manager's socket, a terminal. None of them decides how it ends, nor holds up what it serves.

mod common;

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;

use common::{Client, DENIED, Echod, NOBODY, OWNER, Place, Start, eventually, needs_root};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::Signal;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};

/// Intervals as long as the test; standard error hears of what is in full, and of the rest at the stop.
const LONG: &str = "[audit]\ninterval = \"1h\"\n";

/// A pipe that takes a page, and no more until it is read.
fn small_pipe() -> (OwnedFd, OwnedFd) {
    let (reader, writer) = nix::unistd::pipe2(OFlag::O_CLOEXEC).unwrap();
    fcntl(&writer, FcntlArg::F_SETPIPE_SZ(4096)).unwrap();
    (reader, writer)
}

/// A terminal: its other side, and itself.
fn terminal() -> (OwnedFd, File) {
    let controller = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
    grantpt(&controller).unwrap();
    unlockpt(&controller).unwrap();
    let name = ptsname(&controller, Vec::new()).unwrap().into_string().unwrap();
    use std::os::unix::fs::OpenOptionsExt;
    let terminal =
        fs::OpenOptions::new().read(true).write(true).custom_flags(OFlag::O_NOCTTY.bits()).open(name).unwrap();
    (controller, terminal)
}

/// Writes until nothing more is taken. Only for what no other process writes to meanwhile: all processes share the flag.
fn fill(fd: &OwnedFd) {
    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL).unwrap());
    fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK)).unwrap();
    for size in [4096, 1] {
        while nix::unistd::write(fd, &vec![b'.'; size]).is_ok() {}
    }
    fcntl(fd, FcntlArg::F_SETFL(flags)).unwrap();
}

/// A process that the test started: it does not outlive it.
struct Running(Child);

impl Running {
    fn pid(&self) -> nix::unistd::Pid {
        nix::unistd::Pid::from_raw(self.0.id() as i32)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Waits for its end.
fn ended(mut process: Running, what: &str) -> ExitStatus {
    eventually(what, || process.0.try_wait().unwrap())
}

fn wait(child: Child, what: &str) -> ExitStatus {
    ended(Running(child), what)
}

/// Everything that the program can be asked for, and the code it ends with.
fn everything(place: &Place) -> Vec<(Vec<String>, i32)> {
    let good = place.file("good.toml", "[allow.root]\nusers = [0]\n[allow.missing]\nusers = [\"no-such-user\"]\n");
    let bad = place.file("bad.toml", "[allow.x]\nusers = [\"9-1\"]\nwho = 1\n");
    let (good, bad) = (good.to_str().unwrap(), bad.to_str().unwrap());
    let missing = place.path("missing.toml");
    let (socket, unbindable) = (place.path("s"), place.path("no/such/directory"));
    let all: &[(&[&str], i32)] = &[
        (&[], 64),
        (&["--config", bad, "--listen", socket.to_str().unwrap()], 78),
        (&["--listen", unbindable.to_str().unwrap(), "--config", good], 71),
        (&["--config", missing.to_str().unwrap(), "--listen", socket.to_str().unwrap()], 66),
        (&["check", "--config", good], 0),
        (&["check", "--config", bad], 78),
        (&["explain", "--uid", "0", "--config", good], 0),
        (&["explain", "--uid", "5", "--config", good], 1),
        (&["explain", "--uid", "5", "--config", bad], 78),
        (&["explain", "--user", "no-such-user", "--config", good], 64),
        (&["reload", "1"], 71),
        (&["report", "--system"], 0),
        (&["report", "--system", "--json"], 0),
        (&["report", "--system", "--since", "never"], 74),
        (&["--help"], 0),
        (&["explain", "--help"], 0),
        (&["--version"], 0),
        (&["--no-such-option"], 2),
    ];
    all.iter().map(|(args, code)| (args.iter().map(|arg| (*arg).to_owned()).collect(), *code)).collect()
}

/// A journal for `echod report`, of one file, which complains of a time that it does not know.
fn journalctl(place: &Place) {
    use std::os::unix::fs::PermissionsExt;
    let script = "#!/bin/sh\ncase $* in\n*never*) echo 'Failed to parse timestamp' >&2; exit 1 ;;\n\
                  *--header*) echo 'File path: /var/log/journal/m/system.journal' ;;\nesac\n";
    let path = place.file("journalctl", script);
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

type Sink = Box<dyn Fn() -> (Stdio, Stdio, Vec<OwnedFd>)>;

/// What becomes of standard output and standard error, and what has to stay open for it.
fn sinks() -> Vec<(&'static str, Sink)> {
    let both = |make: fn() -> (OwnedFd, Vec<OwnedFd>)| -> Sink {
        Box::new(move || {
            let (fd, others) = make();
            (fd.try_clone().unwrap().into(), fd.into(), others)
        })
    };
    vec![
        ("both full", both(|| (File::options().write(true).open("/dev/full").unwrap().into(), vec![]))),
        (
            "output full",
            Box::new(|| (File::options().write(true).open("/dev/full").unwrap().into(), Stdio::null(), vec![])),
        ),
        (
            "error full",
            Box::new(|| (Stdio::null(), File::options().write(true).open("/dev/full").unwrap().into(), vec![])),
        ),
        ("not for writing", both(|| (File::open("/dev/null").unwrap().into(), vec![]))),
        ("the reader has gone", both(|| (small_pipe().1, vec![]))),
        (
            "not read",
            both(|| {
                let (reader, writer) = small_pipe();
                fill(&writer);
                (writer, vec![reader])
            }),
        ),
        (
            "a socket that is not read",
            both(|| {
                let (reader, writer) = UnixStream::pair().unwrap();
                let writer = OwnedFd::from(writer);
                fill(&writer);
                (writer, vec![reader.into()])
            }),
        ),
        ("a terminal that has gone", both(|| (terminal().1.into(), vec![]))),
    ]
}

#[test]
fn exit_codes_hold_whatever_becomes_of_the_output() {
    let place = Place::new();
    journalctl(&place);
    let path = format!("{}:{}", place.path("").display(), std::env::var("PATH").unwrap());
    let command = |program: &str, args: &[&str]| {
        let mut command = Command::new(program);
        command.args(args).env_clear().env("PATH", &path).stdin(Stdio::null());
        command
    };
    let echod = env!("CARGO_BIN_EXE_echod");
    let mut running = Vec::new();
    for (args, code) in everything(&place) {
        let args: Vec<_> = args.iter().map(String::as_str).collect();
        let output = command(echod, &args).output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{args:?}: {output:?}");
        for (name, sink) in sinks() {
            let (stdout, stderr, others) = sink();
            let child = command(echod, &args).stdout(stdout).stderr(stderr).spawn().unwrap();
            running.push((format!("{args:?}, {name}"), code, child, others));
        }
        // As the shell closes them, and where files may not grow any more.
        for (name, script) in [
            ("closed", "exec \"$0\" \"$@\" >&- 2>&-".to_owned()),
            (
                "a file at its limit",
                format!("ulimit -f 0; exec \"$0\" \"$@\" >{0} 2>{0}", place.path("file").display()),
            ),
        ] {
            let child = command("sh", &[&["-c", &script, echod], &args[..]].concat()).spawn().unwrap();
            running.push((format!("{args:?}, {name}"), code, child, Vec::new()));
        }
    }
    let ends = running.into_iter().map(|(what, code, child, _others)| {
        let status = wait(child, &what);
        (status.code() != Some(code)).then(|| format!("{what}: {status}, expected {code}"))
    });
    let wrong: Vec<_> = ends.flatten().collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Denials that text accounts for.
fn told(stderr: &str) -> usize {
    stderr.matches(": no rule allows it\n").count() + common::summed(stderr)
}

fn be_denied(echod: &Echod, times: usize) {
    (0..times).for_each(|_| echod.connect().expect_end(DENIED));
}

fn read_all(mut from: impl Read + Send + 'static) -> thread::JoinHandle<String> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        // EIO: no process has the terminal open any more.
        let _ = from.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).replace('\r', "")
    })
}

/// Something that takes a few kilobytes and no more until it is read: its other end, and standard error.
fn unread(kind: &str) -> (File, OwnedFd) {
    match kind {
        "pipe" => {
            let (reader, writer) = small_pipe();
            (reader.into(), writer)
        }
        "terminal" => {
            let (controller, terminal) = terminal();
            (controller.into(), terminal.into())
        }
        _ => {
            let (reader, writer) = UnixStream::pair().unwrap();
            nix::sys::socket::setsockopt(&writer, nix::sys::socket::sockopt::SndBuf, &4096).unwrap();
            (OwnedFd::from(reader).into(), writer.into())
        }
    }
}

const UNREAD: [&str; 3] = ["pipe", "terminal", "socket"];

#[test]
fn standard_error_that_is_not_read_keeps_no_sign_of_life_back() {
    for kind in UNREAD {
        let (reader, stderr) = unread(kind);
        let config = format!("{LONG}burst = 200\n{NOBODY}");
        let echod = Start::serving(&config).env("WATCHDOG_USEC", "200000").stderr(stderr).ready();
        // More than the journal's thread gets rid of.
        be_denied(&echod, 300);
        let fed = echod.manager.told.lock().count("WATCHDOG=1");
        echod.manager.wait_for("WATCHDOG=1", fed + 5);
        be_denied(&echod, 10);
        // Read after all, it has been told everything.
        let text = read_all(reader);
        echod.stop();
        let text = text.join().unwrap();
        assert_eq!(told(&text), 310, "{kind}: {text}");
    }
}

#[test]
fn a_stop_does_not_wait_for_standard_error_that_is_never_read() {
    for kind in UNREAD {
        let (mut reader, stderr) = unread(kind);
        let echod = Start::serving(&format!("{LONG}burst = 200\n{NOBODY}")).stderr(stderr).ready();
        be_denied(&echod, 300);
        echod.signal(Signal::SIGTERM);
        let (status, ..) = echod.wait();
        assert!(status.success(), "{kind}: {status}");
        let mut text = vec![0; 65536];
        let count = reader.read(&mut text).unwrap();
        let told = told(&String::from_utf8_lossy(&text[..count]).replace('\r', ""));
        assert!(told > 0 && told < 200, "{kind}: {told} of them were told, nothing was tested");
    }
}

#[test]
fn what_finds_no_room_on_a_full_disk_is_counted_and_told_later() {
    needs_root();
    for frees in [true, false] {
        let start = Start::serving(&format!("[audit]\ninterval = \"50ms\"\nburst = 20\n{NOBODY}"));
        let disk = start.place().path("disk");
        fs::create_dir(&disk).unwrap();
        let script = "mount -t tmpfs -o size=64k tmpfs \"$0\" && exec 2>>\"$0/log\" && \
                      { head -c 1M /dev/zero >\"$0/filler\"; exec \"$@\"; } 2>>\"$0/log\"";
        let wrapper = ["unshare", "-m", "--propagation", "private", "sh", "-c", script, disk.to_str().unwrap()];
        let echod = start.wrapper(&wrapper).stderr(File::options().write(true).open("/dev/null").unwrap()).ready();
        let inside = format!("/proc/{}/root{}", echod.pid(), disk.display());
        let log = || fs::read_to_string(format!("{inside}/log")).unwrap();
        be_denied(&echod, 40);
        assert_eq!(told(&log()), 0, "the disk has room");
        if frees {
            fs::remove_file(format!("{inside}/filler")).unwrap();
            // Also when no further peer comes.
            eventually("all of them", || (told(&log()) >= 40).then_some(()));
            be_denied(&echod, 5);
            eventually("those after them", || (told(&log()) >= 45).then_some(()));
            assert_eq!(told(&log()), 45);
        }
        echod.stop();
    }
}

#[test]
fn a_journal_that_comes_back_is_told_while_standard_error_is_not_read() {
    needs_root();
    let journald = common::Journald::new();
    let (_reader, stderr) = unread("pipe");
    let config = format!("[audit]\ninterval = \"50ms\"\nburst = 1000\n{NOBODY}");
    let echod = Start::serving(&config).journal(&journald).stderr(stderr).ready();
    be_denied(&echod, 1);
    journald.wait_for_sum("denied", &["policy"], 1);
    journald.vanish();
    be_denied(&echod, 100);
    journald.start();
    journald.wait_for_sum("denied", &["policy"], 101);
    echod.stop();
    assert_eq!(common::stands_for(&journald.entries(), "denied", &["policy"]), 101);
}

/// The manager's queue, full.
fn fill_queue(echod: &Echod) {
    let sender = UnixDatagram::unbound().unwrap();
    sender.set_nonblocking(true).unwrap();
    while sender.send_to(b"X=1", echod.manager.socket()).is_ok() {}
}

fn reload(echod: &Echod) -> Option<i32> {
    let pid = echod.pid().to_string();
    let child = Command::new(env!("CARGO_BIN_EXE_echod")).args(["reload", &pid]).spawn().unwrap();
    wait(child, "the reload").code()
}

#[test]
fn a_manager_that_does_not_read_holds_up_no_reload_and_no_stop() {
    let echod = Start::serving(OWNER).ready();
    let manager = std::sync::Arc::clone(&echod.manager);
    let client = echod.connect();
    client.echo("before");
    // Its thread waits for this after the next datagram.
    let asleep = manager.told.lock();
    fill_queue(&echod);
    echod.place.file("echod.toml", &format!("{OWNER}[deny.x]\nusers = [1]\n"));
    assert_eq!(reload(&echod), Some(0), "a reload");
    assert_eq!(reload(&echod), Some(0), "one more");
    client.echo("still served");
    drop(asleep);
    // Both were told, in order, once it could hear it; or the last of them alone.
    manager.wait("the end of the reload", |told| {
        let last = |field: &str| told.messages.iter().rposition(|message| message.iter().any(|one| one == field));
        (last("READY=1")? > last("RELOADING=1")?).then_some(())
    });
    let asleep = manager.told.lock();
    fill_queue(&echod);
    echod.signal(Signal::SIGTERM);
    client.expect_end(b"");
    eventually("the end", || {
        let stat = fs::read_to_string(format!("/proc/{}/stat", echod.pid())).unwrap();
        stat.rsplit_once(") ").unwrap().1.starts_with('Z').then_some(())
    });
    drop(asleep);
    assert!(echod.wait().0.success());
}

#[test]
fn a_manager_that_does_not_read_at_the_start_is_told_that_it_is_ready_later() {
    let start = Start::serving(OWNER);
    let path = start.place().path("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    let sender = UnixDatagram::unbound().unwrap();
    sender.set_nonblocking(true).unwrap();
    let mut junk = 0;
    while sender.send_to(b"X=1", &path).is_ok() {
        junk += 1;
    }
    let echod = start.env("NOTIFY_SOCKET", path.to_str().unwrap()).env("WATCHDOG_USEC", "100000").spawn();
    let client = echod.connect();
    client.echo("served");
    assert_eq!(reload(&echod), Some(0), "it hears signals");
    socket.set_read_timeout(Some(common::PATIENCE)).unwrap();
    let mut buffer = [0; 4096];
    for _ in 0..junk {
        socket.recv(&mut buffer).unwrap();
    }
    loop {
        let count = socket.recv(&mut buffer).expect("it is told");
        if buffer[..count].starts_with(b"READY=1\n") {
            break;
        }
    }
    echod.stop();
}

#[test]
fn what_is_stored_is_sent_again_to_a_manager_that_did_not_read() {
    let manager = std::sync::Arc::new(common::Manager::new());
    manager.told.change(|told| told.capacity = 100);
    let echod = Start::serving(OWNER).env("FDSTORE", "100").ready_with(manager);
    let manager = std::sync::Arc::clone(&echod.manager);
    let client = echod.connect();
    client.echo("before");
    let asleep = manager.told.lock();
    fill_queue(&echod);
    echod.signal(Signal::SIGTERM);
    let pid = echod.pid();
    // It waits for room in the manager's queue, in a call that sleeps: every worker has ended.
    eventually("the workers' end", || {
        let mut names = fs::read_dir(format!("/proc/{pid}/task"))
            .unwrap()
            .filter_map(|task| fs::read_to_string(task.unwrap().path().join("comm")).ok());
        (!names.any(|name| name.starts_with("worker"))).then_some(())
    });
    drop(asleep);
    let echod = echod.start_again(|start, _| start);
    client.echo("and goes on");
    echod.stop();
}

/// echod in the foreground of a terminal of its own: the terminal's other side, the process, and its socket.
fn in_a_terminal(place: &Place) -> (OwnedFd, Running, std::path::PathBuf) {
    let (controller, terminal) = terminal();
    let socket = place.path("foreground");
    let config = place.file("echod.toml", OWNER);
    let duplicate = || terminal.try_clone().unwrap();
    let child = Command::new("setsid")
        .args(["--ctty", env!("CARGO_BIN_EXE_echod"), "--listen", socket.to_str().unwrap()])
        .args(["--config", config.to_str().unwrap()])
        .env_remove("NOTIFY_SOCKET")
        .stdin(duplicate())
        .stdout(duplicate())
        .stderr(duplicate())
        .spawn()
        .unwrap();
    (controller, Running(child), socket)
}

#[test]
fn in_a_terminal_it_ends_when_the_terminal_closes() {
    let place = Place::new();
    let (controller, child, socket) = in_a_terminal(&place);
    let client = Client::of(eventually("it serves", || UnixStream::connect(&socket).ok()));
    client.echo("hello");
    drop(controller);
    let status = ended(child, "the terminal has gone");
    assert!(status.success(), "{status}");
    client.expect_end(b"");
    assert!(!socket.exists(), "the socket stayed");
}

#[test]
fn a_terminal_that_is_stopped_holds_up_neither_service_nor_stop() {
    let place = Place::new();
    let (controller, child, socket) = in_a_terminal(&place);
    let client = Client::of(eventually("it serves", || UnixStream::connect(&socket).ok()));
    client.echo("hello");
    // ^S: what is written to it waits.
    nix::unistd::write(&controller, b"\x13").unwrap();
    place.file("echod.toml", NOBODY);
    assert_eq!(
        wait(
            Command::new(env!("CARGO_BIN_EXE_echod")).args(["reload", &child.pid().to_string()]).spawn().unwrap(),
            "it"
        )
        .code(),
        Some(0)
    );
    client.expect_end(DENIED);
    nix::sys::signal::kill(child.pid(), Signal::SIGTERM).unwrap();
    assert!(ended(child, "a stopped terminal").success());
    drop(controller);
}

#[test]
fn without_a_terminal_a_hangup_reloads() {
    let place = Place::new();
    let config = place.file("echod.toml", NOBODY);
    let socket = place.path("background");
    let (reader, stderr) = nix::unistd::pipe2(OFlag::O_CLOEXEC).unwrap();
    let child = Command::new(env!("CARGO_BIN_EXE_echod"))
        .args(["--listen", socket.to_str().unwrap(), "--config", config.to_str().unwrap()])
        .env_remove("NOTIFY_SOCKET")
        .stderr(stderr)
        .spawn()
        .unwrap();
    let child = Running(child);
    let text = read_all(File::from(reader));
    let denied = Client::of(eventually("it serves", || UnixStream::connect(&socket).ok()));
    denied.expect_end(DENIED);
    place.file("echod.toml", OWNER);
    nix::sys::signal::kill(child.pid(), Signal::SIGHUP).unwrap();
    eventually("the new policy", || {
        let client = Client::connect(&socket);
        client.try_send("hello\n").ok()?;
        (client.read(1) == b">").then_some(())
    });
    nix::sys::signal::kill(child.pid(), Signal::SIGTERM).unwrap();
    assert!(ended(child, "told to stop").success());
    assert!(text.join().unwrap().contains("Configuration reloaded"));
}
