//! A client: what it sends, what it receives, and how its connection ends.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use super::PATIENCE;

/// How a connection ended, as the client sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// A clean end of file.
    Eof,
    /// ECONNRESET.
    Reset,
}

/// A connection to the program.
#[derive(Debug)]
pub struct Client(pub UnixStream);

impl Client {
    pub fn connect(path: impl AsRef<Path>) -> Self {
        Self::of(UnixStream::connect(path).unwrap())
    }

    pub fn of(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Self(stream)
    }

    pub fn send(&self, bytes: impl AsRef<[u8]>) {
        (&self.0).write_all(bytes.as_ref()).unwrap();
    }

    /// Sends to a service that may close the connection meanwhile.
    pub fn try_send(&self, bytes: impl AsRef<[u8]>) -> io::Result<()> {
        (&self.0).write_all(bytes.as_ref())
    }

    /// Sends as much as the socket takes without reading, so that all buffers are full of echo. Returns what was sent.
    pub fn clog(&self, line: &[u8]) -> Vec<u8> {
        self.0.set_nonblocking(true).unwrap();
        let mut sent = 0;
        let mut stalls = 0;
        while stalls < 10 {
            match (&self.0).write(&line[sent % line.len()..]) {
                Ok(count) => {
                    sent += count;
                    stalls = 0;
                }
                Err(_) => {
                    stalls += 1;
                    std::thread::sleep(std::time::Duration::from_millis(3));
                }
            }
        }
        self.0.set_nonblocking(false).unwrap();
        line.iter().copied().cycle().take(sent).collect()
    }

    pub fn half_close(&self) {
        self.0.shutdown(std::net::Shutdown::Write).unwrap();
    }

    /// Reads exactly `count` bytes.
    pub fn read(&self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        (&self.0).read_exact(&mut bytes).unwrap();
        bytes
    }

    /// Reads up to and including these bytes.
    #[track_caller]
    pub fn until(&self, end: impl AsRef<[u8]>) -> Vec<u8> {
        let mut bytes = Vec::new();
        while !bytes.ends_with(end.as_ref()) {
            let mut byte = [0];
            assert_eq!((&self.0).read(&mut byte).unwrap(), 1, "the end after {:?}", show(&bytes));
            bytes.push(byte[0]);
        }
        bytes
    }

    /// Reads as many bytes as these and compares them.
    #[track_caller]
    pub fn expect(&self, bytes: impl AsRef<[u8]>) {
        let bytes = bytes.as_ref();
        let mut got = vec![0; bytes.len()];
        let mut count = 0;
        while count < got.len() {
            match (&self.0).read(&mut got[count..]) {
                Ok(0) => break,
                Ok(more) => count += more,
                Err(error) => panic!("after {:?}: {error}", show(&got[..count])),
            }
        }
        assert_eq!(show(&got[..count]), show(bytes));
    }

    /// Sends a line and reads its echo.
    #[track_caller]
    pub fn echo(&self, line: &str) {
        self.send(format!("{line}\n"));
        self.expect(format!("> {line}\n"));
    }

    /// Reads until the connection ends: the bytes, and how it ended.
    pub fn rest(&self) -> (Vec<u8>, End) {
        let mut all = Vec::new();
        match (&self.0).read_to_end(&mut all) {
            Ok(_) => (all, End::Eof),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => (all, End::Reset),
            Err(error) => panic!("after {:?}: {error}", show(&all)),
        }
    }

    /// Reads until the connection ends, and expects these bytes and a clean end of file.
    #[track_caller]
    pub fn expect_end(&self, bytes: impl AsRef<[u8]>) {
        let (all, end) = self.rest();
        assert_eq!((show(&all), end), (show(bytes.as_ref()), End::Eof));
    }
}

/// Sends on all of them, the same bytes again and again, until none takes more. What each has sent.
pub fn clog_all(clients: &[Client], bytes: &[u8]) -> Vec<Vec<u8>> {
    let mut sent = vec![0; clients.len()];
    clients.iter().for_each(|client| client.0.set_nonblocking(true).unwrap());
    let mut quiet = 0;
    while quiet < 5 {
        let before: usize = sent.iter().sum();
        for (client, sent) in clients.iter().zip(&mut sent) {
            while let Ok(count) = (&client.0).write(&bytes[*sent % bytes.len()..]) {
                *sent += count;
            }
        }
        quiet = if sent.iter().sum::<usize>() > before { 0 } else { quiet + 1 };
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    clients.iter().for_each(|client| client.0.set_nonblocking(false).unwrap());
    sent.into_iter().map(|count| bytes.iter().copied().cycle().take(count).collect()).collect()
}

/// What the service answers to these bytes.
pub fn answer(input: &[u8]) -> Vec<u8> {
    input.split_inclusive(|byte| *byte == b'\n').flat_map(|line| [b"> ", line].concat()).collect()
}

/// Bytes as text for an assertion's message, shortened if long.
pub fn show(bytes: &[u8]) -> String {
    let text = bytes.escape_ascii().to_string();
    if text.len() <= 2000 {
        return text;
    }
    // With a hash, so that different bytes stay different.
    let sum = bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3));
    format!("{}...{} ({} bytes, hash {sum:x})", &text[..500], &text[text.len() - 500..], bytes.len())
}
