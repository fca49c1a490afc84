//! Generates the shell completions and the manual pages' lists from the definitions of the command lines.
//!
//! `cargo run --example generate` rewrites `packaging/completions/*` and, in the manual pages, what stands between the
//! lines `generated: NAME` and `end of NAME`. `tests/docs.rs` includes this file and compares.
//!
//! What the pages of both configurations say alike is written in echod.toml(5), between `shared: NAME` and
//! `end of shared NAME`, and generated into peergate.toml(5).

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use clap::{Arg, ArgAction, Command};
use clap_complete::Shell;
use echod::echo::Echo;
use peergate_daemon::cli;
use peergate_proxy::forward::Forward;

/// Each generated file: its path inside the tree, and its content.
///
/// `root` is the source tree; the manual pages are read from it, because most of a page is written by hand.
pub fn files(root: &Path) -> std::io::Result<Vec<(PathBuf, Vec<u8>)>> {
    let mut files = Vec::new();
    for (program, mut command) in [("echod", cli::command::<Echo>()), ("peergate", cli::command::<Forward>())] {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let mut text = Vec::new();
            clap_complete::generate(shell, &mut command, program, &mut text);
            files.push((format!("packaging/completions/{program}.{shell}").into(), text));
        }
        command.build();
        let parts =
            [("synopsis", synopses(&command)), ("options", options(&command)), ("commands", commands(&command))];
        let path = format!("packaging/man/{program}.8");
        let mut page = std::fs::read_to_string(root.join(&path))?;
        for (name, text) in parts {
            page = replace_part(&page, &path, name, &text)?;
        }
        files.push((path.into(), page.into_bytes()));
    }
    files.push(shared_parts(root)?);
    Ok(files)
}

/// The page of the proxy's configuration with what it shares with the echo's.
fn shared_parts(root: &Path) -> std::io::Result<(PathBuf, Vec<u8>)> {
    const FROM: &str = "packaging/man/echod.toml.5";
    const TO: &str = "packaging/man/peergate.toml.5";
    let from = std::fs::read_to_string(root.join(FROM))?;
    let mut page = std::fs::read_to_string(root.join(TO))?;
    for part in from.split(".\\\" shared: ").skip(1) {
        let (name, rest) = part.split_once('\n').unwrap_or_default();
        let end = format!(".\\\" end of shared {name}\n");
        let (text, _) = rest.split_once(&end).ok_or_else(|| missing(FROM, &end))?;
        // The echo's own key, and names.
        let text = text.replace(".It Ic line\\-length\n", "").replace("/run/echo.sock", "/run/peergate/docker.sock");
        page = replace_part(&page, TO, name, &text.replace("echod", "peergate"))?;
    }
    Ok((TO.into(), page.into_bytes()))
}

/// The page with a generated part written anew.
fn replace_part(page: &str, path: &str, name: &str, text: &str) -> std::io::Result<String> {
    let (begin, end) = (format!(".\\\" generated: {name}\n"), format!(".\\\" end of {name}\n"));
    let (before, rest) = page.split_once(&begin).ok_or_else(|| missing(path, &begin))?;
    let (_, after) = rest.split_once(&end).ok_or_else(|| missing(path, &end))?;
    Ok(format!("{before}{begin}{text}{end}{after}"))
}

fn missing(path: &str, line: &str) -> std::io::Error {
    std::io::Error::other(format!("{path} lacks the line {line:?}"))
}

/// The subcommands that are the program's own.
fn subcommands(command: &Command) -> impl Iterator<Item = &Command> {
    command.get_subcommands().filter(|sub| sub.get_name() != "help")
}

/// The arguments that are the program's own; clap adds help and version.
fn arguments(command: &Command) -> impl Iterator<Item = &Arg> {
    command.get_arguments().filter(|arg| !matches!(arg.get_id().as_str(), "help" | "version"))
}

fn synopses(command: &Command) -> String {
    let mut out = String::new();
    out += ".Nm\n";
    out += &synopsis(command);
    for sub in subcommands(command) {
        let _ = writeln!(out, ".Nm\n.Cm {}", sub.get_name());
        out += &synopsis(sub);
    }
    out
}

/// One line for each argument. Arguments of which exactly one must be given share a line.
fn synopsis(command: &Command) -> String {
    let mut out = String::new();
    let choice = command.get_groups().find(|group| group.is_required_set());
    let of_choice: Vec<&Arg> = match choice {
        Some(group) => arguments(command).filter(|arg| group.get_args().any(|id| id == arg.get_id())).collect(),
        None => Vec::new(),
    };
    if !of_choice.is_empty() {
        let each: Vec<String> = of_choice.iter().map(|arg| usage(arg)).collect();
        let _ = writeln!(out, ".Brq {}", each.join(" | "));
    }
    for arg in arguments(command).filter(|arg| !of_choice.iter().any(|chosen| chosen.get_id() == arg.get_id())) {
        let repeated = if matches!(arg.get_action(), ArgAction::Append) { " ..." } else { "" };
        let _ = match arg.is_required_set() {
            true => writeln!(out, ".{}", usage(arg)),
            false => writeln!(out, ".Op {}{repeated}", usage(arg)),
        };
    }
    out
}

/// An argument as mdoc(7) marks it up: `Fl \-listen Ar PATH`.
fn usage(arg: &Arg) -> String {
    let value = arg.get_value_names().filter(|_| arg.get_action().takes_values());
    let value = value.map(|names| names.iter().fold(String::new(), |all, name| all + " Ar " + name));
    match arg.get_long() {
        Some(long) => format!("Fl \\-{}{}", escape(long), value.unwrap_or_default()),
        None => value.unwrap_or_default().trim_start().to_owned(),
    }
}

fn options(command: &Command) -> String {
    list(command.get_arguments())
}

fn list<'a>(arguments: impl Iterator<Item = &'a Arg>) -> String {
    let mut out = ".Bl -tag -width Ds\n".to_owned();
    for arg in arguments {
        let short = arg.get_short().map(|short| format!("Fl {short} , ")).unwrap_or_default();
        let _ = writeln!(out, ".It {short}{}", usage(arg).replace(" Ar ", " Ns = Ns Ar "));
        let _ = writeln!(out, "{}.", escape(&arg.get_help().map(ToString::to_string).unwrap_or_default()));
    }
    out + ".El\n"
}

fn commands(command: &Command) -> String {
    let mut out = String::new();
    for sub in subcommands(command) {
        let _ = writeln!(out, ".Ss {}", sub.get_name());
        let _ = writeln!(out, "{}.", escape(&sub.get_about().map(ToString::to_string).unwrap_or_default()));
        if arguments(sub).next().is_some() {
            out += &list(arguments(sub));
        }
    }
    out
}

/// Text for roff(7): a typed hyphen stays a hyphen, a path or setting is not hyphenated, and no line begins with a
/// request.
fn escape(text: &str) -> String {
    let text = text.replace('\\', "\\e").replace('-', "\\-").replace('\n', " ");
    let whole = |word: &str| if word.contains(['/', '=', '_']) { format!("\\%{word}") } else { word.to_owned() };
    let text = text.split(' ').map(whole).collect::<Vec<_>>().join(" ");
    if text.starts_with(['.', '\'']) { format!("\\&{text}") } else { text }
}

#[allow(dead_code)] // Included by tests/docs.rs as well, which has no use for it.
fn main() -> std::io::Result<()> {
    let root = &Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    for (path, text) in files(root)? {
        std::fs::write(root.join(path), text)?;
    }
    Ok(())
}
