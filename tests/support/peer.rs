//! A helper process of the tests: a peer that connects as another user, and the last step of a service manager, which
//! passes sockets. Only tests/common uses it.
//!
//! ```text
//! peer [OPTION]... connect SOCKET          connect, and pass the connection over stdin
//! peer [OPTION]... activate N PROGRAM...   take N descriptors from stdin, become PROGRAM with them at 3, 4, ...
//! peer [OPTION]... flood SOCKET N          connect N times, one after the other; print what came back, counted
//! peer [OPTION]... rush SOCKET             connect and close until stdin ends; print the number after the first time
//!                                         and at the end
//! peer [OPTION]... bomb SOCKET N           connect N times, each time send a descriptor that blocks in close(2);
//!                                         print how many the kernel took
//! peer [OPTION]... clog SOCKET LENGTH      connect, and send lines of so many bytes until no connection takes more, reading
//!                                         nothing; print how many are open
//! peer [OPTION]... pairs GATE SOCKET N...  be the service at SOCKET and its clients through GATE: open connections until
//!                                         there are N, ask and answer on each of them, print N, and wait for a line on
//!                                         stdin before the next N; ask and answer on all of them once more at the end
//! peer [OPTION]... listen SOCKET           bind a datagram socket, and pass it over stdin
//!
//! --as UID:GID[:GROUPS]  become that user first; GROUPS: numbers, ranges LO-HI, or NxTIMES for the
//!                        same one so many times, separated by commas
//! --cgroup FILE          write its own pid into FILE first
//! --login UID            be of a login of that user; 4294967295 for of none
//! --comm NAME            be called so; \n and \e stand for themselves
//! --say TEXT             send TEXT on each connection
//! --then UID             after that, become that user ...
//! --say-after TEXT       ... and send TEXT
//! --real UID             become that real user, the effective one staying as it is: a set-uid program
//! --times N              make N connections
//! --ids UID              make each of them as another user, from this one on; `rush` begins anew after N
//! --gone                 exit at once, instead of waiting for the end of stdin
//! ```
//!
//! stdin is a socket. The connections passed over it stay open with their receiver.

use std::error::Error;
use std::ffi::CString;
use std::fs;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg, setsockopt, sockopt};
use nix::unistd::{Gid, Uid, seteuid, setgroups, setresgid, setresuid};

type Outcome<T> = Result<T, Box<dyn Error>>;

#[derive(Default)]
struct Options {
    say: Option<String>,
    then: Option<u32>,
    say_after: Option<String>,
    times: usize,
    ids: Option<u32>,
    gone: bool,
}

fn main() -> Outcome<()> {
    let mut args = std::env::args().skip(1);
    let mut options = Options { times: 1, ..Options::default() };
    loop {
        let word = args.next().ok_or("what shall I do?")?;
        let mut value = || args.next().ok_or("an option lacks its value");
        match word.as_str() {
            "--as" => become_user(&value()?)?,
            "--cgroup" => fs::write(value()?, std::process::id().to_string())?,
            "--login" => fs::write("/proc/self/loginuid", value()?)?,
            "--comm" => nix::sys::prctl::set_name(&CString::new(unescape(&value()?))?)?,
            "--say" => options.say = Some(unescape(&value()?)),
            "--then" => options.then = Some(value()?.parse()?),
            "--say-after" => options.say_after = Some(unescape(&value()?)),
            "--real" => {
                let real = Uid::from_raw(value()?.parse()?);
                setresuid(real, Uid::effective(), Uid::effective())?;
            }
            "--times" => options.times = value()?.parse()?,
            "--ids" => options.ids = Some(value()?.parse()?),
            "--gone" => options.gone = true,
            "connect" => return connect(&value()?, &options),
            "flood" => return flood(&value()?, value()?.parse()?, options.say.as_deref()),
            "rush" => return rush(&value()?, &options),
            "bomb" => return bomb(&value()?, value()?.parse()?),
            "clog" => return clog(&value()?, value()?.parse()?, &options),
            "pairs" => return pairs(&value()?, &value()?, args),
            "listen" => {
                let socket = UnixDatagram::bind(value()?)?;
                return hand_over(&socket);
            }
            "activate" => {
                let count = value()?.parse()?;
                return activate(count, &value()?, args);
            }
            other => return Err(format!("I cannot {other}").into()),
        }
    }
}

fn unescape(text: &str) -> String {
    text.replace("\\n", "\n").replace("\\e", "\u{1b}")
}

fn become_user(text: &str) -> Outcome<()> {
    let mut parts = text.split(':');
    let uid = Uid::from_raw(parts.next().ok_or("no uid")?.parse()?);
    let gid = Gid::from_raw(parts.next().ok_or("no gid")?.parse()?);
    let mut groups = Vec::new();
    for group in parts.next().unwrap_or_default().split(',').filter(|group| !group.is_empty()) {
        if let Some((group, times)) = group.split_once('x') {
            groups.extend(vec![Gid::from_raw(group.parse()?); times.parse()?]);
            continue;
        }
        let (low, high) = group.split_once('-').unwrap_or((group, group));
        groups.extend((low.parse::<u32>()?..=high.parse()?).map(Gid::from_raw));
    }
    setgroups(&groups)?;
    setresgid(gid, gid, gid)?;
    setresuid(uid, uid, uid)?;
    Ok(())
}

/// Becomes the user of that number, if connections are to be made as another one each.
fn become_next(options: &Options, number: u64) -> Outcome<()> {
    if let Some(first) = options.ids {
        // The kernel tells the other end the effective user. Only root changes to any.
        seteuid(Uid::from_raw(0))?;
        seteuid(Uid::from_raw(first + u32::try_from(number)?))?;
    }
    Ok(())
}

/// As many as were asked for, each as another user if that was.
fn connections(path: &str, options: &Options) -> Outcome<Vec<UnixStream>> {
    let mut connections = Vec::new();
    for number in 0_u32..options.times.try_into()? {
        become_next(options, u64::from(number))?;
        let mut connection = UnixStream::connect(path)?;
        if let Some(text) = &options.say {
            connection.write_all(text.as_bytes())?;
        }
        connections.push(connection);
    }
    Ok(connections)
}

fn connect(path: &str, options: &Options) -> Outcome<()> {
    let connections = connections(path, options)?;
    if let Some(uid) = options.then {
        let uid = Uid::from_raw(uid);
        setresuid(uid, uid, uid)?;
    }
    for mut connection in connections {
        if let Some(text) = &options.say_after {
            connection.write_all(text.as_bytes())?;
        }
        hand_over(&connection)?;
    }
    if !options.gone {
        io::stdin().read_to_end(&mut Vec::new())?;
    }
    Ok(())
}

fn hand_over(socket: &impl AsRawFd) -> Outcome<()> {
    let fds = [socket.as_raw_fd()];
    let control = [ControlMessage::ScmRights(&fds)];
    sendmsg::<()>(io::stdin().as_raw_fd(), &[IoSlice::new(b".")], &control, MsgFlags::empty(), None)?;
    Ok(())
}

/// TCP connections with unsent data and SO_LINGER of hours: the last close(2) of one blocks for that long. The
/// descriptors go to the service, and this process exits.
fn bomb(path: &str, times: usize) -> Outcome<()> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let mut taken = 0;
    let mut other_ends = Vec::new();
    for _ in 0..times {
        let connection = UnixStream::connect(path)?;
        let mut bomb = TcpStream::connect(listener.local_addr()?)?;
        other_ends.push(listener.accept()?);
        bomb.set_nonblocking(true)?;
        while bomb.write(&[0; 65536]).is_ok() {}
        setsockopt(&bomb, sockopt::Linger, &nix::libc::linger { l_onoff: 1, l_linger: 10_000 })?;
        let fds = [bomb.as_raw_fd()];
        let control = [ControlMessage::ScmRights(&fds)];
        match sendmsg::<()>(connection.as_raw_fd(), &[IoSlice::new(b"boom\n")], &control, MsgFlags::MSG_NOSIGNAL, None)
        {
            Ok(_) => {
                taken += 1;
                std::mem::forget(connection);
            }
            // The service refused it or closed the connection before: this process has the last descriptor, and closing
            // it must not block.
            Err(_) => setsockopt(&bomb, sockopt::Linger, &nix::libc::linger { l_onoff: 0, l_linger: 0 })?,
        }
        // If the service has already closed it, this was the last descriptor: then it has no effect.
        std::thread::spawn(move || drop(bomb));
    }
    println!("{taken}");
    io::stdin().read_to_end(&mut Vec::new())?;
    // Although a thread may still wait in close(2).
    std::process::exit(0)
}

/// Each connection takes what the service reads and what the kernel keeps of its unread answer.
fn clog(path: &str, length: usize, options: &Options) -> Outcome<()> {
    let connections = connections(path, options)?;
    let line = [&vec![b'm'; length - 1][..], b"\n"].concat();
    let mut sent = vec![0; connections.len()];
    let mut open: Vec<usize> = (0..connections.len()).collect();
    for connection in &connections {
        connection.set_nonblocking(true)?;
    }
    loop {
        let mut room: Vec<_> =
            open.iter().map(|&one| PollFd::new(connections[one].as_fd(), PollFlags::POLLOUT)).collect();
        // A service that has work reads on before that.
        if poll(&mut room, 5000_u16)? == 0 {
            break;
        }
        open.retain(|&one| {
            loop {
                match (&connections[one]).write(&line[sent[one] % length..]) {
                    Ok(count) => sent[one] += count,
                    Err(error) => return error.kind() == io::ErrorKind::WouldBlock,
                }
            }
        });
    }
    println!("{}", open.len());
    io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

/// A connection through a proxy, as its client and as the service behind see it.
fn pairs(gate: &str, behind: &str, counts: impl Iterator<Item = String>) -> Outcome<()> {
    let service = UnixListener::bind(behind)?;
    let mut pairs = Vec::new();
    let mut go_on = String::new();
    for count in counts {
        while pairs.len() < count.parse()? {
            let client = UnixStream::connect(gate)?;
            let pair = (client, service.accept()?.0);
            ask_and_answer(&pair)?;
            pairs.push(pair);
        }
        println!("{count}");
        io::stdin().read_line(&mut go_on)?;
    }
    pairs.iter().try_for_each(ask_and_answer)?;
    println!("all");
    Ok(())
}

fn ask_and_answer((client, service): &(UnixStream, UnixStream)) -> Outcome<()> {
    let mut text = [0; 8];
    for (mut from, mut to, sent) in [(client, service, b"question"), (service, client, b"answered")] {
        from.write_all(sent)?;
        to.read_exact(&mut text)?;
        if text != *sent {
            return Err(format!("{text:?} arrived").into());
        }
    }
    Ok(())
}

/// The answers of all connections, counted: one line of text for each.
fn flood(path: &str, times: usize, say: Option<&str>) -> Outcome<()> {
    let mut counts = std::collections::BTreeMap::<String, usize>::new();
    for _ in 0..times {
        let mut connection = loop {
            match UnixStream::connect(path) {
                Err(error) if error.raw_os_error() == Some(Errno::EAGAIN as i32) => std::thread::yield_now(),
                other => break other?,
            }
        };
        if let Some(text) = say {
            // The connection may be closed before this arrives.
            let _ = connection.write_all(text.as_bytes());
        }
        let mut answer = Vec::new();
        let end = match connection.read_to_end(&mut answer) {
            Ok(_) => "",
            Err(_) => " and a reset",
        };
        *counts.entry(format!("{}{end}", String::from_utf8_lossy(&answer).escape_debug())).or_default() += 1;
    }
    for (answer, count) in counts {
        println!("{count} {answer}");
    }
    Ok(())
}

/// Connects and closes without reading, so that the service alone sets the pace.
fn rush(path: &str, options: &Options) -> Outcome<()> {
    let over = Arc::new(AtomicBool::new(false));
    let is_over = Arc::clone(&over);
    std::thread::spawn(move || {
        let _ = io::stdin().read_to_end(&mut Vec::new());
        over.store(true, Ordering::Relaxed);
    });
    let mut times = 0_u64;
    while !is_over.load(Ordering::Relaxed) {
        become_next(options, times % options.times as u64)?;
        drop(UnixStream::connect(path)?);
        times += 1;
        if times == 1 {
            println!("{times}");
        }
    }
    println!("{times}");
    Ok(())
}

/// Received descriptors get the lowest free numbers, in order: 3, 4, ...
fn activate(count: usize, program: &str, args: impl Iterator<Item = String>) -> Outcome<()> {
    for inherited in 3..1024 {
        // Most of these numbers are not open.
        let _ = nix::unistd::close(inherited);
    }
    let mut next: RawFd = 3;
    while next < 3 + count as RawFd {
        let mut byte = [0];
        let mut parts = [IoSliceMut::new(&mut byte)];
        let mut control = nix::cmsg_space!([RawFd; 250]);
        let message = recvmsg::<()>(io::stdin().as_raw_fd(), &mut parts, Some(&mut control), MsgFlags::empty())?;
        for one in message.cmsgs()? {
            let ControlMessageOwned::ScmRights(fds) = one else { continue };
            for fd in fds {
                if fd != next {
                    return Err(format!("descriptor {fd} where {next} was expected").into());
                }
                next += 1;
            }
        }
    }
    let mut command = Command::new(program);
    if std::env::var_os("LISTEN_PID").is_some_and(|pid| pid == "self") {
        command.env("LISTEN_PID", std::process::id().to_string());
    }
    Err(command.args(args).stdin(Stdio::null()).exec().into())
}
