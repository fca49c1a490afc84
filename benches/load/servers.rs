//! The servers that are compared: how each is started, and which workloads make sense for it.
use crate::process::{Launch, Server};
use std::io::{Error, Result};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

/// How a server treats a peer that it doesn't serve.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Denies {
    /// It serves every peer that can connect.
    NoPeer,
    /// With the message of the wire.
    WithMessage,
    /// It only closes.
    InSilence,
}

/// One server of the table.
#[derive(Clone)]
pub struct Spec {
    pub name: String,
    pub what: &'static str,
    /// `{socket}` stands for the path of the socket.
    pub command: Vec<String>,
    /// Takes the listening socket as descriptor 3. A server that does not binds `{socket}` itself.
    pub takes_listener: bool,
    /// Appended where other users connect: without it the floor has no policy.
    pub judging: Vec<String>,
    pub denies: Denies,
    /// More connections than this would need a process or a thread for each. Such workloads are left out.
    pub most: u32,
    pub notifies: bool,
    /// Started when the first connection waits, as by a socket unit.
    pub activated: bool,
}

/// Where the programs are and where sockets and configuration go.
pub struct Place {
    pub floor: PathBuf,
    pub inetd_echo: PathBuf,
    pub tokio: PathBuf,
    pub go: Option<PathBuf>,
    pub echods: Vec<(String, PathBuf, Option<PathBuf>)>,
    pub work: PathBuf,
    pub uid: u32,
}

/// The configuration that echod is measured with: its defaults, a policy of a few rules, and limits that admit the
/// largest workload.
const CONFIG: &str = r#"[deny.guests]
users = ["60000-60999"]

[allow.owner]
users = ["self"]

[allow.operators]
groups = ["adm"]

[allow.services]
users = ["400-499"]

[limits]
connections = 20000
connections-per-user = 20000
"#;

/// Every server that is installed, and the names of the missing ones.
pub fn found(place: &Place) -> Result<(Vec<Spec>, Vec<String>)> {
    let mut missing = Vec::new();
    let mut specs = vec![
        floor(place, "floor", "one epoll, no policy, no record", &[]),
        floor(place, "polling floor", "the same, looks again for 50 µs before it sleeps", &["--busy-poll", "50"]),
        Spec {
            most: 2_000,
            denies: Denies::NoPeer,
            ..floor(place, "threads", "blocking thread per connection", &["--threads"])
        },
    ];
    specs.extend(echods(place)?);
    let tokio = |name: &str, what, mode: &str, denies| Spec {
        name: name.into(),
        what,
        command: vec![text(&place.tokio), mode.to_owned()],
        judging: Vec::new(),
        denies,
        notifies: denies == Denies::WithMessage,
        ..floor(place, name, what, &[])
    };
    specs.push(tokio("tokio", "one thread of tokio's runtime, no policy, no record", "plain", Denies::NoPeer));
    specs.push(tokio("tokio gate", "the same behind the gate, with policy and record", "gate", Denies::WithMessage));
    match &place.go {
        Some(go) => specs.push(Spec {
            name: "Go".into(),
            what: "the article's server",
            command: vec![text(go)],
            takes_listener: true,
            judging: Vec::new(),
            denies: Denies::WithMessage,
            most: u32::MAX,
            notifies: false,
            activated: true,
        }),
        None => missing.push("Go (package golang-go)".into()),
    }
    add_forking(place, &mut specs, &mut missing)?;
    Ok((specs, missing))
}

/// The servers that start a process for each connection.
fn add_forking(place: &Place, specs: &mut Vec<Spec>, missing: &mut Vec<String>) -> Result<()> {
    let echo = text(&place.inetd_echo);
    let forking = |name: &str, what, command: &[&str], denies| Spec {
        name: name.into(),
        what,
        command: command.iter().map(|&s| s.to_owned()).collect(),
        takes_listener: false,
        judging: Vec::new(),
        denies,
        most: 100,
        notifies: false,
        activated: false,
    };
    if on_path("socat") {
        let exec = format!("EXEC:{echo},nofork");
        let command = ["socat", "UNIX-LISTEN:{socket},fork,backlog=4096", &exec];
        specs.push(forking("socat", "process per connection, runs a small echo", &command, Denies::NoPeer));
    } else {
        missing.push("socat (package socat)".into());
    }
    if on_path("s6-ipcserver") {
        let rules = place.work.join("s6");
        std::fs::create_dir_all(rules.join(format!("uid/{}", place.uid)))?;
        std::fs::write(rules.join(format!("uid/{}/allow", place.uid)), "")?;
        let rules = text(&rules);
        let mut command = vec!["s6-ipcserver", "-c", "200", "-C", "200", "{socket}"];
        command.extend(["s6-ipcserver-access", "-v0", "-i", &rules, &echo]);
        specs.push(forking(
            "s6",
            "s6-ipcserver with s6-ipcserver-access and a small echo",
            &command,
            Denies::InSilence,
        ));
    } else {
        missing.push("s6-ipcserver (package s6)".into());
    }
    if on_path("systemd-socket-activate") {
        let command = ["systemd-socket-activate", "--accept", "--inetd", "-l", "{socket}", &echo];
        specs.push(forking(
            "systemd inetd",
            "systemd-socket-activate --accept --inetd, a small echo",
            &command,
            Denies::NoPeer,
        ));
    } else {
        missing.push("systemd-socket-activate (package systemd)".into());
    }
    Ok(())
}

fn floor(place: &Place, name: &str, what: &'static str, args: &[&str]) -> Spec {
    Spec {
        name: name.into(),
        what,
        command: std::iter::once(text(&place.floor)).chain(args.iter().map(|&a| a.to_owned())).collect(),
        takes_listener: true,
        judging: vec!["--only-uid".into(), place.uid.to_string()],
        denies: Denies::WithMessage,
        most: u32::MAX,
        notifies: true,
        activated: true,
    }
}

fn echods(place: &Place) -> Result<Vec<Spec>> {
    let mut specs = Vec::new();
    for (name, binary, config) in &place.echods {
        let file = place.work.join(format!("{name}.toml"));
        match config {
            Some(other) => std::fs::copy(other, &file).map(drop)?,
            None => std::fs::write(&file, CONFIG)?,
        }
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600))?;
        specs.push(Spec {
            name: name.clone(),
            what: "with its policy and its record",
            command: vec![text(binary), "--config".into(), text(&file)],
            takes_listener: true,
            judging: Vec::new(),
            denies: Denies::WithMessage,
            most: u32::MAX,
            notifies: true,
            activated: true,
        });
    }
    Ok(specs)
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

fn on_path(program: &str) -> bool {
    std::env::var_os("PATH").is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(program).is_file()))
}

/// What differs from one start of a server to the next.
#[derive(Default)]
pub struct Setting {
    pub cpu: Option<usize>,
    pub judging: bool,
    pub notify: Option<String>,
    pub on_demand: bool,
}

impl Spec {
    /// Starts it on a fresh socket at `socket`, which any user may connect to.
    pub fn start(&self, socket: &Path, setting: Setting) -> Result<Server> {
        match std::fs::remove_file(socket) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let listener = if self.takes_listener {
            let listener = UnixListener::bind(socket)?;
            std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o777))?;
            Some(listener)
        } else {
            None
        };
        let mut command: Vec<String> = self.command.iter().map(|a| a.replace("{socket}", &text(socket))).collect();
        if setting.judging {
            command.extend(self.judging.iter().cloned());
        }
        let errors = std::fs::File::create(socket.with_extension("stderr"))?;
        let launch =
            Launch { command, listener, cpu: setting.cpu, notify: setting.notify, on_demand: setting.on_demand };
        let mut server = Server::start(launch, Stdio::from(errors))?;
        if !setting.on_demand {
            server.line()?;
        }
        if !self.takes_listener {
            await_bound(&mut server, socket)?;
            std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o777))?;
        }
        Ok(server)
    }
}

/// A server that binds its socket itself gives no sign when it has. So this tries to connect until it succeeds.
fn await_bound(server: &mut Server, socket: &Path) -> Result<()> {
    let start = Instant::now();
    while UnixStream::connect(socket).is_err() {
        server.alive()?;
        if start.elapsed() > Duration::from_secs(10) {
            return Err(Error::other("the server has not bound its socket in 10 s"));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}
