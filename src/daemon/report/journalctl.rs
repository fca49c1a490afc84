//! journalctl(1) as a child process: what it is asked, and what it says about its success. Used by [`report`](super).

use std::ffi::OsString;
use std::fs;
use std::io::{self, BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;

use peergate::audit::Event;
use peergate::escape::printable;

use super::entry::{self, Scope};
use super::sources::{self, PERSISTENT, Sources, VOLATILE};
use crate::cli::Report;

/// What journalctl says on standard error is kept up to so many bytes.
const MOST_COMPLAINTS: usize = 16 << 10;

/// The command, with the options that tell which journal to read, as they were given to us.
///
/// journalctl exits with 0 when it skips a file that is damaged. It warns of one that it cannot open, but tells of one
/// whose entries it cannot go through only in a debug message ("Can't iterate through FILE, ignoring: Bad message",
/// systemd 252 and 257). So it is asked for these, each with its priority in front; [`complaint`] picks out what counts.
fn command(asked: &Report) -> Command {
    let mut command = Command::new("journalctl");
    command.env("SYSTEMD_LOG_LEVEL", "debug").env("SYSTEMD_LOG_TARGET", "console-prefixed");
    for name in ["SYSTEMD_LOG_COLOR", "SYSTEMD_LOG_LOCATION", "SYSTEMD_LOG_TIME", "SYSTEMD_LOG_TID"] {
        command.env(name, "0");
    }
    command.args(["--no-pager", "--quiet"]);
    let text = |text: &Option<String>| text.as_ref().map(OsString::from);
    let path = |path: &PathBuf| path.clone().into_os_string();
    let options = [
        ("--namespace=", text(&asked.namespace)),
        ("--directory=", asked.directory.as_ref().map(path)),
        ("--machine=", text(&asked.machine)),
    ];
    let files = asked.file.iter().map(|file| ("--file=", Some(path(file))));
    for (option, value) in options.into_iter().chain(files) {
        if let Some(value) = value {
            let mut argument = OsString::from(option);
            argument.push(value);
            command.arg(argument);
        }
    }
    if asked.merge {
        command.arg("--merge");
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Starts it: one line of JSON for each record that may count.
///
/// # Errors
/// What starting it says.
pub fn start(asked: &Report, scope: Scope) -> io::Result<Child> {
    let mut command = command(asked);
    command.arg("--output=json").arg(format!("--output-fields={}", entry::FIELDS));
    for (option, value) in [("since", &asked.since), ("until", &asked.until)] {
        if let Some(value) = value {
            command.arg(format!("--{option}={value}"));
        }
    }
    let (Scope::System(program) | Scope::User(program, _)) = scope;
    command.arg(format!("SYSLOG_IDENTIFIER={}", program.name));
    if let Scope::User(_, uid) = scope {
        command.arg(format!("_UID={uid}"));
    }
    let ids = [Event::Denied, Event::Refused, Event::Summary, Event::Revoked].into_iter().filter_map(Event::message_id);
    command.args(ids.map(|id| format!("MESSAGE_ID={id}")));
    command.args(["+", "_TRANSPORT=driver"]).arg(format!("MESSAGE_ID={}", entry::SUPPRESSED));
    command.spawn()
}

/// How a child ended. An exit status of 0 alone does not mean that every file was read.
#[derive(Debug, Default)]
pub struct Ended {
    /// That it, or reading from it, failed, and how.
    pub failed: Option<String>,
    /// What it said on standard error, line by line.
    pub said: Vec<String>,
}

impl Ended {
    fn in_failure(what: &str, error: &io::Error) -> Self {
        Self { failed: Some(format!("{what} journalctl: {error}")), said: Vec::new() }
    }
}

/// Has `take` read the child's output to its end.
pub fn read(journalctl: &mut Child, take: impl FnOnce(&mut dyn BufRead) -> io::Result<()>) -> Ended {
    let (output, errors) = (journalctl.stdout.take(), journalctl.stderr.take());
    // On a thread of its own, so that neither pipe can fill up while we wait for the other.
    let said = thread::Builder::new().spawn(move || {
        let mut said = Vec::new();
        let mut length = 0;
        for line in errors.into_iter().flat_map(|errors| BufReader::new(errors).split(b'\n')).map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line);
            if let Some(complaint) = complaint(&line).filter(|complaint| length + complaint.len() <= MOST_COMPLAINTS) {
                length += complaint.len();
                said.push(format!("journalctl: {}", printable(complaint)));
            }
        }
        said
    });
    let outcome = match (&said, output) {
        (Ok(_), Some(output)) => take(&mut BufReader::with_capacity(64 << 10, output)),
        (Err(error), _) => Err(io::Error::new(error.kind(), error.to_string())),
        (_, None) => Err(io::ErrorKind::BrokenPipe.into()),
    };
    if outcome.is_err() {
        let _ = journalctl.kill();
    }
    let status = journalctl.wait();
    let mut ended = match (outcome, status) {
        (Err(error), _) => Ended::in_failure("reading from", &error),
        (_, Err(error)) => Ended::in_failure("waiting for", &error),
        (_, Ok(status)) => {
            Ended { failed: (!status.success()).then(|| format!("journalctl failed ({status})")), said: Vec::new() }
        }
    };
    ended.said = said.ok().and_then(|thread| thread.join().ok()).unwrap_or_default();
    ended
}

/// What a line on standard error complains of: every warning and error, every line that no log message begins with,
/// and a debug message that tells of damage. `<31>` in front is facility and priority, as in syslog(3).
fn complaint(line: &str) -> Option<&str> {
    let prefixed = line.strip_prefix('<').and_then(|rest| rest.split_once('>'));
    let parsed = prefixed.and_then(|(number, message)| Some((number.parse::<u32>().ok()? & 7, message)));
    let (priority, message) = parsed.unwrap_or((4, line));
    let damage =
        || ["Can't iterate", "corrupt", "Bad message", "Input/output error"].iter().any(|word| message.contains(word));
    (!message.trim().is_empty() && (priority <= 4 || damage())).then_some(message)
}

/// Finds out which files journalctl reads, and which it may not; and what failed in finding out.
pub fn sources(asked: &Report, scope: Scope) -> (Sources, Option<String>) {
    let mut headers = Vec::new();
    let ended = match command(asked).arg("--header").spawn() {
        Ok(mut child) => read(&mut child, |output| output.read_to_end(&mut headers).map(drop)),
        Err(error) => Ended::in_failure("starting", &error),
    };
    let opened = sources::parse_headers(&String::from_utf8_lossy(&headers));
    let explicit = asked.directory.is_some() || !asked.file.is_empty() || asked.merge || asked.machine.is_some();
    let mut found = Sources::new(scope, explicit, opened, unreadable(asked));
    found.places = places(asked);
    if !explicit && asked.namespace.is_none() {
        found.namespaces = namespaces();
    }
    // What it says on standard error it has said before, when it read the same files.
    (found, ended.failed.map(|failed| format!("the journal files' headers: {failed}")))
}

/// Where journalctl looks for files, in words.
fn places(asked: &Report) -> Vec<String> {
    let path = |path: &PathBuf| printable(&path.to_string_lossy());
    if let Some(machine) = &asked.machine {
        return vec![format!("the container {}", printable(machine))];
    }
    if asked.directory.is_some() || !asked.file.is_empty() {
        return asked.directory.iter().chain(&asked.file).map(path).collect();
    }
    let below = match &asked.namespace {
        _ if asked.merge => String::new(),
        None => format!("/{}", machine_id()),
        Some(namespace) => format!("/{}.{}", machine_id(), printable(namespace.trim_start_matches('+'))),
    };
    [VOLATILE, PERSISTENT].map(|root| format!("{root}{below}")).into()
}

/// The directories in which journalctl looks for files; none where it takes those that it is told, or a container's.
fn directories(asked: &Report) -> Vec<PathBuf> {
    if let Some(directory) = &asked.directory {
        return [directory.clone()].into_iter().chain(entries(directory).unwrap_or_default()).collect();
    }
    if !asked.file.is_empty() || asked.machine.is_some() {
        return Vec::new();
    }
    let is_read = |path: &Path| asked.merge || is_read(&name(path), &machine_id(), asked.namespace.as_deref());
    let roots = [VOLATILE, PERSISTENT].map(Path::new);
    roots.into_iter().flat_map(|root| entries(root).unwrap_or_default()).filter(|path| is_read(path)).collect()
}

/// Whether journalctl looks into a directory of this name: `MACHINE-ID`, or `MACHINE-ID.NAMESPACE`. A namespace may be
/// asked for as `+NAMESPACE`, in addition to the default one, or as `*`, which is all (journalctl(1)).
fn is_read(name: &str, machine: &str, namespace: Option<&str>) -> bool {
    let (id, of) = name.split_once('.').unwrap_or((name, ""));
    let wanted = match namespace {
        None | Some("") => of.is_empty(),
        Some("*") => true,
        Some(asked) => asked.strip_prefix('+').map_or(of == asked, |added| of == added || of.is_empty()),
    };
    wanted && id == machine
}

/// The files in these directories that the caller may not read, and the directories that they may not look into.
fn unreadable(asked: &Report) -> Vec<PathBuf> {
    let denied = |error: &io::Error| error.kind() == io::ErrorKind::PermissionDenied;
    let mut unreadable = Vec::new();
    for directory in directories(asked) {
        match entries(&directory) {
            Ok(paths) => unreadable.extend(paths.into_iter().filter(|path| {
                sources::is_file(path)
                    // Not what is no regular file: opening a FIFO would wait.
                    && fs::metadata(path).is_ok_and(|metadata| metadata.is_file())
                    && fs::File::open(path).is_err_and(|error| denied(&error))
            })),
            Err(error) if denied(&error) => unreadable.push(directory),
            Err(_) => {}
        }
    }
    unreadable
}

/// The journal namespaces of this machine that have files.
fn namespaces() -> Vec<String> {
    let machine = machine_id();
    let roots = [VOLATILE, PERSISTENT].map(Path::new);
    let paths = roots.into_iter().flat_map(|root| entries(root).unwrap_or_default());
    let of_machine = |path: PathBuf| name(&path).strip_prefix(&machine)?.strip_prefix('.').map(str::to_owned);
    let mut namespaces: Vec<_> = paths.filter_map(of_machine).collect();
    namespaces.sort_unstable();
    namespaces.dedup();
    namespaces
}

fn entries(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let mut paths: Vec<_> = fs::read_dir(directory)?.flatten().map(|entry| entry.path()).collect();
    paths.sort_unstable();
    Ok(paths)
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// machine-id(5); empty where the machine has none.
fn machine_id() -> String {
    fs::read_to_string("/etc/machine-id").unwrap_or_default().trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_skipped_file_is_a_complaint_and_a_debug_message_is_none() {
        assert_eq!(complaint("<31>File r/a.journal added."), None);
        assert_eq!(complaint("<30>1 files"), None);
        assert_eq!(complaint(""), None);
        for said in ["Can't iterate through r/a.journal, ignoring: Bad message", "Journal file r corrupted, ignoring."]
        {
            assert_eq!(complaint(&format!("<31>{said}")), Some(said));
        }
        for line in ["Journal file r/a.journal is truncated, ignoring file.", "<x>y", "<3"] {
            assert_eq!(complaint(line), Some(line));
            assert_eq!(complaint(&format!("<28>{line}")), Some(line));
        }
    }

    #[test]
    fn a_namespace_is_a_directory_beside_the_machines_own() {
        let read = |namespace| ["m", "m.audit", "m.web", "n", "n.audit"].map(|name| is_read(name, "m", namespace));
        assert_eq!(read(None), [true, false, false, false, false]);
        assert_eq!(read(Some("audit")), [false, true, false, false, false]);
        assert_eq!(read(Some("+audit")), [true, true, false, false, false]);
        assert_eq!(read(Some("*")), [true, true, true, false, false]);
    }
}
