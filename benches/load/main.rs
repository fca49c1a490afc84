//! The benchmark's own program: starts each server in turn, loads it, checks every byte that comes back, and prints one
//! table. `benches/run` builds it and all it needs and starts it; `benches/README.md` says what it measures and why.
//!
//! `process` starts and meters servers, `servers` knows which there are, `client` speaks the wire, `workloads` says
//! what is asked, `report` makes the table.
mod attacks;
mod client;
mod process;
mod report;
mod servers;
mod workloads;

use clap::Parser;
use nix::sys::signal::{SigSet, Signal};
use std::io::{Error, Result};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;
use workloads::{Bench, Workload};

/// Measure echod beside the floor and what else a user would pick.
#[derive(Parser)]
#[command(name = "benches/run")]
struct Args {
    /// Only these workloads, separated by commas
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Only these servers, separated by commas (the floor is needed for the ratios)
    #[arg(long, value_delimiter = ',')]
    servers: Vec<String>,
    /// How often each server is measured, in turn
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// How long one measurement lasts
    #[arg(long, default_value_t = 0.5)]
    seconds: f64,
    /// Everything once and briefly, to show that it works: no figure means anything
    #[arg(long)]
    quick: bool,
    /// Name the workloads and the servers that are found, and end
    #[arg(long)]
    list: bool,
    /// A further echod to compare: its name, its program, and optionally its configuration
    #[arg(long, value_name = "NAME=PROGRAM[,CONFIG]")]
    also: Vec<String>,
    /// echod's configuration, in place of the benchmark's own
    #[arg(long)]
    config: Option<PathBuf>,
    /// Start the servers under this command, which must keep their process: "strace -DDD -f -c -o FILE"
    #[arg(long, value_name = "COMMAND")]
    wrap: Option<String>,
    /// Put the table into this file, between the lines `<!-- table -->` and `<!-- end of table -->`
    #[arg(long, value_name = "FILE", conflicts_with_all = ["quick", "list"])]
    write: Option<PathBuf>,
    /// Stand in for journald: take and drop what is sent to /run/systemd/journal/socket (which must be ours alone)
    #[arg(long, hide = true)]
    journal: bool,
    /// echod itself
    #[arg(long, hide = true)]
    echod: Option<PathBuf>,
    /// The article's server, built
    #[arg(long, hide = true)]
    go: Option<PathBuf>,
}

/// What users type, and what messages begin with.
const NAME: &str = "benches/run";

fn main() -> ExitCode {
    let own: Vec<String> = std::env::args().skip(1).collect();
    let role = own.first().map_or("", String::as_str);
    let end = match role {
        process::LAUNCH => process::launcher(&own[1..]).map(|never| match never {}),
        attacks::DENIED_CLIENT | attacks::ATTACKER | attacks::STREAMER => attacks::denied_client(role, &own[1..]),
        _ => bench(&Args::parse()),
    };
    match end {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            match role {
                process::LAUNCH | attacks::DENIED_CLIENT | attacks::ATTACKER | attacks::STREAMER => {
                    eprintln!("{NAME}, {role}: {error}")
                }
                _ => eprintln!("{NAME}: {error}"),
            }
            ExitCode::FAILURE
        }
    }
}

fn bench(args: &Args) -> Result<()> {
    if let Some(file) = &args.write {
        // Before an hour is spent on a table that cannot be written.
        around_table(file, &std::fs::read_to_string(file).map_err(|e| named(file, &e))?)?;
    }
    let work = tempdir()?;
    clear_up_when_interrupted(work.clone())?;
    let end = bench_in(args, work.clone());
    std::fs::remove_dir_all(work)?;
    end
}

/// Removes `work` when a signal ends this process. The servers and the other users' clients die with it.
fn clear_up_when_interrupted(work: PathBuf) -> Result<()> {
    // A signal that was ignored at the start, as by nohup, stays ignored: if it were blocked, it would arrive.
    let status = std::fs::read_to_string("/proc/self/status")?;
    let ignored = status.lines().find_map(|l| l.strip_prefix("SigIgn:")).map(str::trim).unwrap_or_default();
    let ignored = u64::from_str_radix(ignored, 16).map_err(Error::other)?;
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        if ignored >> (signal as i32 - 1) & 1 == 0 {
            signals.add(signal);
        }
    }
    // Every thread that is made from here on has them blocked too.
    signals.thread_block()?;
    std::thread::spawn(move || {
        let Ok(signal) = signals.wait() else { return };
        // The run goes on meanwhile, and may make files in it.
        let _ = (0..100).find(|_| std::fs::remove_dir_all(&work).is_ok());
        // The signal's own effect.
        let _ = signals.thread_unblock();
        let _ = nix::sys::signal::raise(signal);
    });
    Ok(())
}

/// A fresh directory that every user may reach: other users connect to the socket in it.
fn tempdir() -> Result<PathBuf> {
    let work = nix::unistd::mkdtemp(&std::env::temp_dir().join("echod-bench.XXXXXX"))?;
    std::fs::set_permissions(&work, std::fs::Permissions::from_mode(0o755))?;
    Ok(work)
}

fn bench_in(args: &Args, work: PathBuf) -> Result<()> {
    if args.journal {
        drain_journal(Path::new("/run/systemd/journal/socket"))?;
    }
    let bench = Bench {
        work: work.clone(),
        span: Duration::from_secs_f64(if args.quick { 0.03 } else { args.seconds }),
        cpus: std::thread::available_parallelism()?.get(),
        root: nix::unistd::geteuid().is_root(),
        quick: args.quick,
    };
    let (specs, missing) = servers::found(&place(args, work)?)?;
    known("workload", &args.only, &workloads::ALL.iter().map(|w| w.name).collect::<Vec<_>>(), &[])?;
    known("server", &args.servers, &specs.iter().map(|s| s.name.as_str()).collect::<Vec<_>>(), &missing)?;
    let mut specs: Vec<_> = specs.into_iter().filter(|s| wanted(&args.servers, &s.name)).collect();
    for word in args.wrap.iter().flat_map(|w| w.split_whitespace().rev()) {
        specs.iter_mut().for_each(|spec| spec.command.insert(0, word.to_owned()));
    }
    let workloads: Vec<_> = workloads::ALL.iter().filter(|w| wanted(&args.only, w.name)).collect();
    if args.list {
        workloads.iter().for_each(|w| println!("workload {:12} {}", w.name, w.what));
        specs.iter().for_each(|s| println!("server   {:14} {}", s.name, s.what));
        missing.iter().for_each(|m| println!("missing  {m}"));
        return Ok(());
    }
    raise_descriptors()?;
    let rounds = if args.quick { 1 } else { args.rounds };
    let mut results = report::Results::default();
    for round in 1..=rounds {
        for workload in &workloads {
            eprintln!("round {round} of {rounds}: {}", workload.name);
            for spec in specs.iter().filter(|s| workload.skips(&bench, s).is_none()) {
                let figures = workload.run(&bench, spec).map_err(|e| explain(&bench, workload, spec, &e))?;
                if let Some((figure, value)) = figures.iter().find(|(_, v)| !v.is_finite()) {
                    return Err(Error::other(format!("{}, {}: {figure:?} is {value}", workload.name, spec.name)));
                }
                results.add(workload, spec, figures);
            }
        }
    }
    if args.quick {
        return show_quick(&bench, &workloads, &specs, &missing);
    }
    let mut text = heading(&bench, rounds)?;
    text.push_str(&results.table(&workloads, &specs, |w, s| w.skips(&bench, s)));
    missing.iter().for_each(|m| text.push_str(&format!("\nMissing: {m}.\n")));
    let (echods, others): (Vec<_>, Vec<_>) = specs.iter().partition(|s| s.command.iter().any(|a| a == "--config"));
    let others: Vec<&str> = others.iter().map(|s| s.name.as_str()).collect();
    for spec in echods {
        text.push_str(&format!("\n{}", results.reach(&spec.name, &others)));
    }
    println!("{text}");
    args.write.as_deref().map_or(Ok(()), |file| put(file, &text))
}

/// What `--quick` has shown.
fn show_quick(bench: &Bench, workloads: &[&Workload], specs: &[servers::Spec], missing: &[String]) -> Result<()> {
    let (mut lied, mut not_lied) = (Vec::new(), Vec::new());
    for workload in workloads {
        let noticed = notices_lies(bench, workload, specs)?;
        if noticed { &mut lied } else { &mut not_lied }.push(workload.name);
    }
    let runs: Vec<_> = workloads.iter().map(|w| specs.iter().filter(|s| w.skips(bench, s).is_none()).count()).collect();
    let (ran, runs) = (runs.iter().filter(|&&n| n > 0).count(), runs.iter().sum::<usize>());
    missing.iter().for_each(|m| println!("missing: {m}"));
    println!("quick: {runs} runs of {ran} workloads, every byte as due");
    if !lied.is_empty() {
        println!("quick: every wrong answer of the floor was noticed, in {}", lied.join(", "));
    }
    if !not_lied.is_empty() {
        println!("quick: no wrong answer was given in {}", not_lied.join(", "));
    }
    Ok(())
}

/// A server that spoils an answer now and then must fail the run: without that no figure could be trusted. False where
/// no server here can spoil one.
fn notices_lies(bench: &Bench, workload: &Workload, specs: &[servers::Spec]) -> Result<bool> {
    let floor = specs.iter().find(|s| s.name == report::FLOOR && workload.skips(bench, s).is_none());
    let Some(floor) = floor else { return Ok(false) };
    for lie in workload.lies(bench) {
        let mut liar = floor.clone();
        liar.command.extend([lie.option.to_owned(), lie.nth.to_string()]);
        let patient = Bench { span: lie.span, work: bench.work.clone(), ..*bench };
        match workload.run(&patient, &liar) {
            Err(e) if e.kind() == std::io::ErrorKind::InvalidData => {}
            Err(e) => return Err(Error::other(format!("{}: {} made {e}", workload.name, lie.option))),
            Ok(_) => return Err(Error::other(format!("{}: {} went unnoticed", workload.name, lie.option))),
        }
    }
    Ok(true)
}

/// Names are compared up to case; nothing given means everything.
fn wanted(names: &[String], name: &str) -> bool {
    names.is_empty() || names.iter().any(|n| n.eq_ignore_ascii_case(name))
}

/// An error where one of `names` is not in `known`: otherwise a misspelt name would be left out without a notice.
fn known(kind: &str, names: &[String], known: &[&str], missing: &[String]) -> Result<()> {
    let Some(stray) = names.iter().find(|n| !known.iter().any(|k| k.eq_ignore_ascii_case(n))) else { return Ok(()) };
    let missing: String = missing.iter().map(|m| format!("; not installed: {m}")).collect();
    Err(Error::other(format!("no {kind} is named {stray:?}; there are: {}{missing}", known.join(", "))))
}

fn place(args: &Args, work: PathBuf) -> Result<servers::Place> {
    let here = std::env::current_exe()?;
    let beside = |name: &str| here.with_file_name(name);
    let mut echods = Vec::new();
    if let Some(echod) = &args.echod {
        echods.push(("echod".to_owned(), echod.clone(), args.config.clone()));
    }
    for also in &args.also {
        let (name, rest) = also.split_once('=').ok_or_else(|| Error::other("--also wants NAME=PROGRAM[,CONFIG]"))?;
        let (program, config) = rest.split_once(',').map_or((rest, None), |(p, c)| (p, Some(c.into())));
        echods.push((name.to_owned(), program.into(), config));
    }
    let uid = nix::unistd::geteuid().as_raw();
    Ok(servers::Place {
        floor: beside("floor"),
        inetd_echo: beside("inetd-echo"),
        tokio: beside("tokio"),
        go: args.go.clone(),
        echods,
        work,
        uid,
    })
}

/// The error with its place and what the server said last.
fn explain(bench: &Bench, workload: &Workload, spec: &servers::Spec, error: &Error) -> Error {
    let said = std::fs::read_to_string(bench.work.join("echo.stderr")).unwrap_or_default();
    let last: Vec<&str> = said.lines().rev().take(5).collect();
    let said: String = last.iter().rev().map(|l| format!("\n  {l}")).collect();
    Error::new(error.kind(), format!("{}, {}: {error}{said}", workload.name, spec.name))
}

/// Both ends of 10,000 connections need descriptors; the servers inherit the limit.
fn raise_descriptors() -> Result<()> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let enough = 12_000;
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if soft < enough {
        setrlimit(Resource::RLIMIT_NOFILE, enough, hard.max(enough))?;
    }
    Ok(())
}

/// Records must be received as on a real system, but a flood of them must not reach this machine's journal.
fn drain_journal(path: &Path) -> Result<()> {
    let journal = UnixDatagram::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o666))?;
    std::thread::spawn(move || {
        let mut record = vec![0; 64 * 1024];
        while journal.recv(&mut record).is_ok() {}
    });
    Ok(())
}

fn heading(bench: &Bench, rounds: u32) -> Result<String> {
    let said = |program: &str, args: &[&str]| {
        let output = std::process::Command::new(program).args(args).output().ok();
        output.map_or_else(String::new, |o| String::from_utf8_lossy(&o.stdout).trim().to_owned())
    };
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo")?;
    let model = cpuinfo
        .lines()
        .find_map(|l| l.strip_prefix("model name"))
        .map_or("", |l| l.trim_start_matches([' ', '\t', ':']));
    let command: Vec<String> = std::env::var("BENCH_COMMAND").map_or_else(|_| std::env::args().collect(), |c| vec![c]);
    Ok(format!(
        "{} CPUs ({model}), Linux {}, {}. `{}`: {rounds} rounds of {} s each.\n\n",
        bench.cpus,
        said("uname", &["-rm"]),
        said("date", &["-u", "+%Y-%m-%d %H:%M UTC"]),
        command.join(" ").trim(),
        bench.span.as_secs_f64(),
    ))
}

fn put(file: &Path, text: &str) -> Result<()> {
    let old = std::fs::read_to_string(file).map_err(|e| named(file, &e))?;
    let (before, after) = around_table(file, &old)?;
    std::fs::write(file, format!("{before}\n{text}\n{after}")).map_err(|e| named(file, &e))
}

/// The parts of `file`'s text that stay: up to the first marker and from the second, both included.
fn around_table<'a>(file: &Path, text: &'a str) -> Result<(&'a str, &'a str)> {
    const FROM: &str = "<!-- table -->\n";
    const TO: &str = "<!-- end of table -->";
    let from = text.find(FROM).map(|at| at + FROM.len());
    let to = from.and_then(|from| text[from..].find(TO).map(|at| from + at));
    from.zip(to).map(|(from, to)| (&text[..from], &text[to..])).ok_or_else(|| {
        Error::other(format!("{}: no place for the table: {TO} has to follow {}", file.display(), FROM.trim()))
    })
}

fn named(file: &Path, error: &Error) -> Error {
    Error::new(error.kind(), format!("{}: {error}", file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_goes_between_its_markers_and_nowhere_else() -> Result<()> {
        let file = Path::new("README.md");
        let (from, to) = ("<!-- table -->\n", "<!-- end of table -->");
        let whole = format!("before {from} old {to} after");
        let kept = around_table(file, &whole)?;
        assert_eq!(kept, ("before <!-- table -->\n", "<!-- end of table --> after"));
        for text in [String::new(), from.to_owned(), to.to_owned(), format!("{to}\n{from}")] {
            assert!(around_table(file, &text).is_err(), "{text:?}");
        }
        Ok(())
    }

    #[test]
    fn a_name_that_nothing_has_is_an_error_that_names_those_there_are() {
        let names = |names: &[&str]| names.iter().map(|&n| n.to_owned()).collect::<Vec<_>>();
        let missing = names(&["Go (package golang-go)"]);
        let check = |given: &[&str]| known("server", &names(given), &["floor", "echod", "mine"], &missing);
        assert!(check(&[]).is_ok());
        assert!(check(&["Floor", "mine"]).is_ok());
        let said = check(&["floor", "ecohd"]).map_err(|e| e.to_string());
        let due = "no server is named \"ecohd\"; there are: floor, echod, mine; not installed: Go (package golang-go)";
        assert_eq!(said, Err(due.to_owned()));
    }
}
