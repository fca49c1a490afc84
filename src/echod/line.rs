//! The framing: which bytes answer which. Pure; knows only bytes, and takes them in any chunks.
//!
//! A line is bytes up to and including LF; its echo is `> ` and the same bytes. What has been received and
//! not yet been echoed is kept as it came, with a [`Cursor`] into it, never as echo: so a connection holds no
//! more than it received.

use memchr::memchr;

/// What stands before each line that comes back.
const PROMPT: &[u8] = b"> ";

/// What a peer gets whose line is too long.
pub const TOO_LONG: &[u8] = b"Line too long\n";

/// How far the echo of some received bytes has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cursor {
    /// Where the first line that is not wholly echoed begins.
    pub start: usize,
    /// How many bytes of that line's echo are out already.
    pub sent: usize,
}

/// How much is echoed at once.
#[derive(Clone, Copy, Debug)]
pub struct Room {
    /// Bytes of echo; at least one.
    pub bytes: usize,
    /// Lines; at least one.
    pub lines: u64,
}

impl Room {
    /// Room for everything.
    pub const ENDLESS: Self = Self { bytes: usize::MAX, lines: u64::MAX };
}

/// Why [`echo`] stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Every line is echoed; what is left, if anything, is a line that has not ended yet.
    Complete,
    /// No more room.
    Full,
    /// The next line is longer than allowed.
    TooLong,
}

/// What [`echo`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Echoed {
    /// Where the next call goes on, if all output is taken.
    pub next: Cursor,
    /// How many lines were completed.
    pub lines: u64,
    /// Why it stopped.
    pub end: End,
}

/// Appends the echo of `input` from `from` on to `out`, as far as there is room.
///
/// `limit` is the longest line allowed, LF included. `ended` says that nothing follows `input`: then a
/// last fragment without LF is a line too.
pub fn echo(input: &[u8], from: Cursor, limit: usize, ended: bool, room: Room, out: &mut Vec<u8>) -> Echoed {
    let Room { bytes: room, lines: most } = room;
    let mut at = from;
    let mut lines = 0;
    let mut put = |at: &mut Cursor, end: usize| {
        let line = &input[at.start..end];
        if lines == most {
            return Err(End::Full);
        }
        if line.len() > limit {
            return Err(End::TooLong);
        }
        let space = room.saturating_sub(out.len());
        if at.sent == 0 && PROMPT.len() + line.len() <= space {
            out.extend_from_slice(PROMPT);
            out.extend_from_slice(line);
        } else if !put_part(at, line, space, out) {
            return Err(End::Full);
        }
        *at = Cursor { start: end, sent: 0 };
        lines += 1;
        Ok(())
    };
    // Of a line that was begun, what is out holds no end; and it was held against the limit then, so that no more of it
    // needs to be looked at than there is room for. A long line takes many calls, and each must not look at all of it.
    let out_already = from.start + from.sent.saturating_sub(PROMPT.len());
    if from.sent > 0 && input.len() - out_already > room && memchr(b'\n', &input[out_already..][..room]).is_none() {
        put_part(&mut at, &input[from.start..], room.saturating_sub(out.len()), out);
        return Echoed { next: at, lines: 0, end: End::Full };
    }
    let mut end = End::Complete;
    let mut next = out_already;
    while let Some(lf) = find_lf(&input[next..]) {
        next += lf + 1;
        if let Err(why) = put(&mut at, next) {
            end = why;
            break;
        }
    }
    if end == End::Complete && at.start < input.len() {
        if ended {
            end = put(&mut at, input.len()).err().unwrap_or(End::Complete);
        } else if input.len() - at.start > limit {
            end = End::TooLong;
        }
    }
    Echoed { next: at, lines, end }
}

/// Where the next line ends. An empty one is found without the search, which costs more than all the rest of its echo.
fn find_lf(input: &[u8]) -> Option<usize> {
    if input.first() == Some(&b'\n') { Some(0) } else { memchr(b'\n', input) }
}

/// As much of a line's echo as there is space for. True when that was all of it.
fn put_part(at: &mut Cursor, line: &[u8], space: usize, out: &mut Vec<u8>) -> bool {
    let rest = [PROMPT, line].into_iter().scan(at.sent, |skip, part| {
        let skipped = (*skip).min(part.len());
        *skip -= skipped;
        Some(&part[skipped..])
    });
    let mut space = space;
    for part in rest {
        let fits = part.len().min(space);
        out.extend_from_slice(&part[..fits]);
        at.sent += fits;
        space -= fits;
        if fits < part.len() {
            return false;
        }
    }
    true
}

/// Where the echo of `input` stands once `written` more bytes of it are out, and how many lines that completed.
pub fn advance(input: &[u8], from: Cursor, mut written: usize) -> (Cursor, u64) {
    let mut at = from;
    let mut lines = 0;
    loop {
        // An end that is not among what was written does not matter: no need to look for it through a long line.
        let out_already = at.start + at.sent.saturating_sub(PROMPT.len());
        let reach = input.len().min(out_already.saturating_add(written));
        let end = match memchr(b'\n', &input[out_already..reach]) {
            Some(lf) => out_already + lf + 1,
            None if reach == input.len() => reach,
            None => break,
        };
        let left = PROMPT.len() + (end - at.start) - at.sent;
        if written < left || end == at.start {
            break;
        }
        written -= left;
        at = Cursor { start: end, sent: 0 };
        lines += 1;
    }
    at.sent += written;
    (at, lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: usize = 16;

    /// What the contract says, as slowly and plainly as it can be said: the whole answer to `input`.
    fn model(input: &[u8], limit: usize) -> Vec<u8> {
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

    /// A connection: chunks in, as much out at a time as `rooms` says, in turn.
    fn run(chunks: &[&[u8]], limit: usize, rooms: &[usize]) -> Vec<u8> {
        let mut rooms = rooms.iter().copied().cycle();
        let (mut held, mut at, mut out) = (Vec::new(), Cursor::default(), Vec::new());
        for (i, chunk) in chunks.iter().chain(std::iter::once(&&b""[..])).enumerate() {
            held.extend_from_slice(chunk);
            let ended = i == chunks.len();
            loop {
                let mut some = Vec::new();
                let echoed = echo(&held, at, limit, ended, Room { bytes: 64, lines: 3 }, &mut some);
                // The socket takes part of it.
                let taken = some.len().min(rooms.next().unwrap());
                out.extend_from_slice(&some[..taken]);
                if taken == some.len() {
                    at = echoed.next;
                    assert_eq!(advance(&held, at, 0).0, at);
                } else {
                    at = advance(&held, at, taken).0;
                }
                held.drain(..at.start);
                at.start = 0;
                if taken == some.len() && echoed.end == End::TooLong {
                    out.extend_from_slice(TOO_LONG);
                    return out;
                }
                if taken == some.len() && echoed.end == End::Complete {
                    break;
                }
            }
        }
        out
    }

    #[test]
    fn each_line_comes_back_with_its_prompt() {
        assert_eq!(run(&[b"a\n\nb\r\n\0\xff\n"], LIMIT, &[1000]), b"> a\n> \n> b\r\n> \0\xff\n");
    }

    #[test]
    fn a_fragment_at_the_end_comes_back_with_nothing_added() {
        assert_eq!(run(&[b"a\nbc"], LIMIT, &[1000]), b"> a\n> bc");
    }

    #[test]
    fn a_line_at_the_limit_passes_and_one_over_it_does_not() {
        let fits = [&[b'x'; LIMIT - 1][..], b"\n"].concat();
        assert_eq!(run(&[&fits], LIMIT, &[1000]), [b"> ", &fits[..]].concat());
        let fragment = [b'x'; LIMIT];
        assert_eq!(run(&[&fragment], LIMIT, &[1000]), [b"> ", &fragment[..]].concat());
        for over in [[&[b'x'; LIMIT][..], b"\n"].concat(), vec![b'x'; LIMIT + 1]] {
            assert_eq!(run(&[b"a\n", &over], LIMIT, &[1000]), [b"> a\n", TOO_LONG].concat());
        }
    }

    #[test]
    fn any_bytes_in_any_chunks_give_the_same_echo() {
        let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
        let mut random = |below: usize| {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            (seed % below as u64) as usize
        };
        // Miri takes hundreds of times as long.
        for _ in 0..if cfg!(miri) { 100 } else { 20_000 } {
            // Lines that fit into the room, and now and then some that take it several times.
            let (length, alphabet, longest): (_, &[u8], _) = if random(4) == 0 {
                (600, b"\nabcdefghijklmnopqrstuvwxyz", 400)
            } else {
                (60, b"\n\nab\0\xff\r> ", 20)
            };
            let input: Vec<u8> = (0..random(length)).map(|_| alphabet[random(alphabet.len())]).collect();
            let mut rest = &input[..];
            let mut chunks = Vec::new();
            while !rest.is_empty() {
                let (chunk, after) = rest.split_at(1 + random(rest.len()));
                chunks.push(chunk);
                rest = after;
            }
            let limit = 1 + random(longest);
            let most = [9, 70][random(2)];
            let rooms: Vec<usize> = (0..5).map(|_| random(most)).chain([3]).collect();
            assert_eq!(run(&chunks, limit, &rooms), model(&input, limit), "{chunks:?} limit {limit} rooms {rooms:?}");
        }
    }

    #[test]
    fn lines_are_counted_when_they_are_out() {
        let echoed = echo(b"a\nb\nc", Cursor::default(), LIMIT, false, Room::ENDLESS, &mut Vec::new());
        assert_eq!((echoed.lines, echoed.next.start, echoed.end), (2, 4, End::Complete));
        let one = Room { lines: 1, ..Room::ENDLESS };
        let echoed = echo(b"a\nb\nc", Cursor::default(), LIMIT, false, one, &mut Vec::new());
        assert_eq!((echoed.lines, echoed.next.start, echoed.end), (1, 2, End::Full));
        assert_eq!(advance(b"a\nb\nc", Cursor::default(), 5), (Cursor { start: 2, sent: 1 }, 1));
        assert_eq!(advance(b"a\nb\nc", Cursor::default(), 11), (Cursor { start: 5, sent: 0 }, 3));
    }
}
