//! The small echo that inetd-style servers start for each connection: standard input and output are the socket.
//! Only the benchmark uses it, behind socat, s6-ipcserver and systemd-socket-activate --inetd.
use std::io::{BufRead, Read, Write};

fn main() -> std::io::Result<()> {
    let (mut input, mut output) = (std::io::stdin().lock(), std::io::stdout().lock());
    let (mut chunk, mut answer) = (vec![0; 64 * 1024], Vec::with_capacity(3 * 64 * 1024));
    let mut at_start = true;
    loop {
        let n = input.read(&mut chunk)?;
        if n == 0 {
            return Ok(());
        }
        answer.clear();
        let mut rest = &chunk[..n];
        while !rest.is_empty() {
            if at_start {
                answer.extend_from_slice(b"> ");
            }
            rest.read_until(b'\n', &mut answer)?;
            at_start = answer.ends_with(b"\n");
        }
        // Standard output is line-buffered; an answer that ends inside a line still has to leave.
        output.write_all(&answer)?;
        output.flush()?;
    }
}
