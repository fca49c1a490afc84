//! The protocol: which bytes come back, and how a connection ends (echod(8), PROTOCOL). Needs no privileges: the owner
//! of the service is the user that runs the tests, admitted or denied by the policy of each test.

mod common;

use std::io::Write;
use std::thread;

use common::{BUSY, Client, DENIED, DENY_ALL, End, OWNER, Start, TOO_LONG, show};

/// The whole answer to `input`, computed in the plainest way.
fn answer(input: &[u8], limit: usize) -> Vec<u8> {
    let mut out = Vec::new();
    for line in input.split_inclusive(|byte| *byte == b'\n') {
        if line.len() > limit {
            out.extend_from_slice(TOO_LONG);
            break;
        }
        out.extend_from_slice(b"> ");
        out.extend_from_slice(line);
    }
    out
}

/// Sends `input` from another thread while it reads the answer.
fn exchange(client: &Client, input: &[u8]) -> (Vec<u8>, End) {
    thread::scope(|scope| {
        scope.spawn(|| {
            // The service may close the connection in the middle of it.
            let _ = client.try_send(input);
            let _ = client.0.shutdown(std::net::Shutdown::Write);
        });
        client.rest()
    })
}

fn random(seed: u64) -> impl FnMut(usize) -> usize {
    let mut state = seed | 1;
    move |below| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % below as u64) as usize
    }
}

#[test]
fn each_line_is_echoed_at_once_with_its_prompt() {
    let echod = Start::serving(OWNER).ready();
    let client = echod.connect();
    for line in ["hello", "", "a line with spaces ", "> not a prompt"] {
        client.echo(line);
    }
    client.half_close();
    client.expect_end(b"");
    echod.stop();
}

#[test]
fn bytes_that_are_no_text_are_echoed_unchanged() {
    let echod = Start::serving(OWNER).ready();
    let every_byte: Vec<u8> = (0..=255).collect();
    for line in [&b"\0\0\n"[..], b"a\r\n", b"\xff\xfe\xc3\x28\n", b"\n", b"\r\r\r\n", b"> \x1b[2J\n"] {
        let client = echod.connect();
        client.send(line);
        client.expect([b"> ", line].concat());
    }
    let client = echod.connect();
    client.send(&every_byte);
    client.half_close();
    client.expect_end(answer(&every_byte, 1 << 16));
}

#[test]
fn a_fragment_without_newline_is_echoed_at_the_half_close() {
    let echod = Start::serving(OWNER).ready();
    let client = echod.connect();
    client.send("one\ntw");
    client.expect("> one\n");
    client.half_close();
    client.expect_end("> tw");
}

#[test]
fn one_byte_at_a_time_makes_the_same_lines() {
    let echod = Start::serving(OWNER).ready();
    let client = echod.connect();
    let input = b"slowly\n\ndoes it\n\0\n";
    for byte in input {
        client.send([*byte]);
    }
    client.half_close();
    client.expect_end(answer(input, 1 << 16));
}

#[test]
fn ten_thousand_lines_in_one_write_are_echoed_in_order() {
    let echod = Start::serving(OWNER).ready();
    let input: String = (0..10_000).map(|number| format!("line {number}\n")).collect();
    let (output, end) = exchange(&echod.connect(), input.as_bytes());
    assert_eq!(show(&output), show(&answer(input.as_bytes(), 1 << 16)));
    assert_eq!(end, End::Eof);
}

#[test]
fn any_bytes_in_any_chunks_give_the_echo_of_the_whole() {
    let echod = Start::serving(&format!("[limits]\nline-length = 5000\n{OWNER}")).ready();
    let mut random = random(0x9e37_79b9_7f4a_7c15);
    for round in 0..60 {
        let length = random(60_000);
        let newline_every = 1 + random(4000);
        let input: Vec<u8> =
            (0..length).map(|_| if random(newline_every) == 0 { b'\n' } else { random(256) as u8 }).collect();
        let client = echod.connect();
        let (output, end) = thread::scope(|scope| {
            let mut cut = self::random(round + 1);
            let (client, input) = (&client, &input);
            scope.spawn(move || {
                let mut rest = &input[..];
                while !rest.is_empty() {
                    let (chunk, after) = rest.split_at(1 + cut(rest.len().min(9000)));
                    if client.try_send(chunk).is_err() {
                        return;
                    }
                    rest = after;
                }
                let _ = client.0.shutdown(std::net::Shutdown::Write);
            });
            client.rest()
        });
        assert_eq!((show(&output), end), (show(&answer(&input, 5000)), End::Eof), "round {round}");
    }
}

#[test]
fn a_line_of_the_limit_passes_and_one_byte_more_is_refused() {
    for (setting, limit) in [("1", 1), ("16", 16), ("\"64K\"", 65_536), ("\"1M\"", 1 << 20)] {
        let echod = Start::serving(&format!("[limits]\nline-length = {setting}\n{OWNER}")).ready();
        let fits = [vec![b'x'; limit - 1], b"\n".to_vec()].concat();
        let (output, end) = exchange(&echod.connect(), &fits);
        assert_eq!((show(&output), end), (show(&answer(&fits, limit)), End::Eof), "at the limit of {limit}");

        let before: &[u8] = if limit > 1 { b"a\n" } else { b"\n" };
        let over = [before, &vec![b'x'; limit], b"\n"].concat();
        let (output, end) = exchange(&echod.connect(), &over);
        let expected = [b"> ", before, TOO_LONG].concat();
        assert_eq!((show(&output), end), (show(&expected), End::Eof), "one over the limit of {limit}");
    }
}

#[test]
fn a_line_is_too_long_before_its_newline_comes() {
    let echod = Start::serving(&format!("[limits]\nline-length = 16\n{OWNER}")).ready();
    let client = echod.connect();
    client.send("first\n");
    client.expect("> first\n");
    client.send([b'x'; 17]);
    client.expect_end(TOO_LONG);
}

#[test]
fn a_fragment_of_the_limit_is_echoed_at_the_half_close() {
    let echod = Start::serving(&format!("[limits]\nline-length = 16\n{OWNER}")).ready();
    let client = echod.connect();
    client.send([b'x'; 16]);
    client.half_close();
    client.expect_end([&b"> "[..], &[b'x'; 16]].concat());
}

#[test]
fn a_client_that_sends_on_after_too_long_a_line_gets_the_message() {
    let echod = Start::serving(&format!("[limits]\nline-length = 1024\n{OWNER}")).ready();
    for _ in 0..20 {
        let client = echod.connect();
        client.send("before\n");
        client.expect("> before\n");
        let (output, end) = thread::scope(|scope| {
            scope.spawn(|| while client.try_send(vec![b'y'; 4096]).is_ok() {});
            client.rest()
        });
        assert_eq!((show(&output), end), (show(TOO_LONG), End::Eof));
    }
}

#[test]
fn a_denied_peer_gets_the_message_and_not_one_byte_of_echo() {
    let echod = Start::serving(DENY_ALL).ready();
    let client = echod.connect();
    client.expect_end(DENIED);

    let client = echod.connect();
    client.half_close();
    client.expect_end(DENIED);
}

#[test]
fn a_denied_peer_that_has_sent_data_gets_the_message_and_no_reset() {
    let echod = Start::serving(DENY_ALL).ready();
    for size in [1, 100, 5_000, 100_000] {
        for _ in 0..20 {
            let client = echod.connect();
            client.0.set_nonblocking(true).unwrap();
            // As much as the socket takes; the connection may be closed by now.
            let _ = client.try_send(vec![b'\n'; size]);
            client.0.set_nonblocking(false).unwrap();
            client.expect_end(DENIED);
        }
    }
}

#[test]
fn a_denied_peer_that_keeps_sending_gets_the_message_and_no_reset() {
    let echod = Start::serving(DENY_ALL).ready();
    for _ in 0..20 {
        let client = echod.connect();
        let (output, end) = thread::scope(|scope| {
            scope.spawn(|| while client.try_send([b'z'; 1000]).is_ok() {});
            client.rest()
        });
        assert_eq!((show(&output), end), (show(DENIED), End::Eof));
    }
}

#[test]
fn a_denied_peer_that_never_reads_finds_the_message_later() {
    let echod = Start::serving(DENY_ALL).ready();
    let client = echod.connect();
    // Writes until the connection is closed: no other event tells.
    while client.try_send([b'z'; 1000]).is_ok() {}
    client.expect_end(DENIED);
}

#[test]
fn data_sent_before_the_service_starts_is_answered() {
    let start = Start::serving(OWNER);
    let client = Client::connect(start.place().path("socket"));
    client.send("early\nand a fragment");
    client.half_close();
    let echod = start.ready();
    client.expect_end("> early\n> and a fragment");
    echod.stop();
}

#[test]
fn a_client_that_does_not_read_stops_sending_and_loses_no_byte() {
    let echod = Start::serving(OWNER).ready();
    let client = echod.connect();
    let line = [vec![b'a'; 8191], b"\n".to_vec()].concat();
    client.0.set_nonblocking(true).unwrap();
    // Until the socket takes no more: then all buffers are full, and bounded.
    let mut sent = 0_usize;
    let mut stalls = 0;
    while stalls < 20 {
        match (&client.0).write(&line[sent % line.len()..]) {
            Ok(count) => {
                sent += count;
                stalls = 0;
            }
            // The service may still be running: wait and try again.
            Err(_) => {
                stalls += 1;
                thread::sleep(std::time::Duration::from_millis(5));
            }
        }
    }
    assert!(sent < 4 << 20, "{sent} bytes were taken from a client that does not read");
    let others = echod.connect();
    others.echo("nobody else notices");
    client.0.set_nonblocking(false).unwrap();
    client.half_close();
    let input: Vec<u8> = line.iter().copied().cycle().take(sent).collect();
    let (output, end) = client.rest();
    assert_eq!((show(&output), end), (show(&answer(&input, 1 << 16)), End::Eof));
}

#[test]
fn clients_that_close_mid_line_disturb_no_other() {
    let echod = Start::serving(OWNER).ready();
    let steady = echod.connect();
    for round in 0..100 {
        let client = echod.connect();
        match round % 4 {
            0 => client.send("half a li"),
            1 => client.send(vec![b'\n'; 30_000]),
            2 => client.send("never read\n"),
            _ => {}
        }
        // With unread data this close is a reset for the service.
        drop(client);
        steady.echo(&format!("still here {round}"));
    }
    steady.half_close();
    steady.expect_end(b"");
    echod.stop();
}

#[test]
fn a_client_that_sends_nothing_may_stay() {
    let echod = Start::serving(OWNER).ready();
    let silent: Vec<Client> = (0..10).map(|_| echod.connect()).collect();
    echod.connect().echo("others talk");
    for client in &silent {
        client.echo("now I do");
    }
}

#[test]
fn a_peer_over_a_limit_gets_its_message_and_a_clean_end() {
    let echod = Start::serving(&format!("[limits]\nconnections-per-user = 1\n{OWNER}")).ready();
    let first = echod.connect();
    first.echo("in");
    for _ in 0..20 {
        let client = echod.connect();
        let _ = client.try_send("let me in\n");
        client.expect_end(BUSY);
    }
    first.echo("still in");
}
