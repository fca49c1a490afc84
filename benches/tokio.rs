//! What the gate costs a service on tokio: the same echo with the `> ` prefix, behind the gate (`tokio gate`) and on tokio's own
//! listener (`tokio plain`). Both run on one thread. Only the benchmark uses it.

use std::io;

use peergate::{Limits, Policy, Rule, Service, Uid, User, activation};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::runtime::{Builder, Runtime};

type Outcome = Result<(), Box<dyn std::error::Error>>;

fn main() -> Outcome {
    match std::env::args().nth(1).as_deref() {
        Some("gate") => gate(),
        Some("plain") => plain(),
        _ => Err("expected: tokio gate, or tokio plain".into()),
    }
}

fn runtime() -> io::Result<Runtime> {
    Builder::new_current_thread().enable_all().build()
}

fn gate() -> Outcome {
    let rules = [
        Rule::deny("guests").users([60_000..=60_999]),
        Rule::allow("owner", ()).users([User::Me]),
        Rule::allow("services", ()).users([400..=499]),
    ];
    let service = Service::from_systemd("tokio").policy(Policy::new(rules, Uid::effective())?);
    service.limits(Limits::new(20_000, 20_000)).block_on_runtime(runtime()?, |gate| async move {
        loop {
            tokio::select! {
                connection = gate.accept() => drop(tokio::spawn(echo(connection))),
                () = gate.stopping() => return io::Result::Ok(()),
            }
        }
    })?;
    Ok(())
}

fn plain() -> Outcome {
    let passed = activation::adopt(|_| false)?.listeners;
    let listener = passed.first().ok_or("no socket was passed")?.to_std()?;
    runtime()?.block_on(async {
        let listener = tokio::net::UnixListener::from_std(listener)?;
        loop {
            tokio::spawn(echo(listener.accept().await?.0));
        }
    })
}

/// What a connection begins to read into. With room for the longest line from the start, a connection costs as much for its
/// memory as for everything else, and how much depends on what else lies at the end of the heap.
const FIRST: usize = 4 * 1024;
const LONGEST: usize = 64 * 1024;

/// An error means that the client has gone.
async fn echo(mut stream: impl AsyncRead + AsyncWrite + Unpin) -> io::Result<()> {
    let (mut input, mut answer, mut held) = (vec![0; FIRST], Vec::new(), 0);
    loop {
        let count = stream.read(&mut input[held..]).await?;
        if count == 0 {
            return Ok(());
        }
        let all = held + count;
        let end = input[held..all].iter().rposition(|byte| *byte == b'\n').map_or(0, |place| held + place + 1);
        for line in input[..end].split_inclusive(|byte| *byte == b'\n') {
            answer.extend_from_slice(b"> ");
            answer.extend_from_slice(line);
        }
        stream.write_all(&answer).await?;
        answer.clear();
        input.copy_within(end..all, 0);
        held = all - end;
        if held == LONGEST {
            return Err(io::ErrorKind::InvalidData.into());
        }
        if held == input.len() {
            input.resize(LONGEST, 0);
        }
    }
}
