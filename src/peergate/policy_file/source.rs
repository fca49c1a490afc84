//! A configuration file's text, and faults with their place in it. Used by [`policy_file`](super), which makes these
//! names public.

use std::fmt;
use std::io::{self, Read as _};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use super::trust;
use crate::escape::printable_again;
use crate::ids::Uid;

/// The longest file that is read.
const LONGEST: u64 = 1 << 20;

/// Something wrong with a file, or worth a warning: where, what was found, and what was expected. Its
/// [`Display`](fmt::Display) form is one line, `FILE:LINE:COLUMN: FOUND; expected …`, free of control characters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    file: Arc<Path>,
    place: Option<(usize, usize)>,
    message: String,
}

impl Fault {
    /// A fault of the file as a whole, such as its mode.
    pub fn of_file(file: impl AsRef<Path>, message: impl Into<String>) -> Self {
        Self { file: file.as_ref().into(), place: None, message: message.into() }
    }

    /// The file.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// Line and column, both from 1, the column counted in characters. `None` for a fault of the file as a whole,
    /// such as its mode.
    pub fn place(&self) -> Option<(usize, usize)> {
        self.place
    }

    /// What was found, and what was expected.
    pub fn message(&self) -> &str {
        &self.message
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Keys and values are quoted from a file that may hold anything.
        f.write_str(&printable_again(&self.file.to_string_lossy()))?;
        if let Some((line, column)) = self.place {
            write!(f, ":{line}:{column}")?;
        }
        f.write_str(": ")?;
        f.write_str(&printable_again(&self.message))
    }
}

impl std::error::Error for Fault {}

/// All faults of a file, in the order of their places; one line each in the [`Display`](fmt::Display) form, and in the
/// [`Debug`](fmt::Debug) form too: that is what a `main` that returns them prints.
#[derive(Clone, PartialEq, Eq)]
pub struct Faults(pub Vec<Fault>);

impl fmt::Debug for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, fault) in self.0.iter().enumerate() {
            let separator = if number == 0 { "" } else { "\n" };
            write!(f, "{separator}{fault}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Faults {}

/// A file's path and text.
#[derive(Clone, Debug)]
pub struct Source {
    path: Arc<Path>,
    text: String,
    /// Where each line begins.
    lines: Vec<usize>,
}

/// Why a file gives no text.
#[derive(Debug)]
#[non_exhaustive]
pub enum ReadError {
    /// There is no such file, nor anything else by that name, such as a link that leads nowhere.
    Missing,
    /// The system refused to open or read it, or something on the way to it is not what it should be.
    Unreadable(io::Error),
    /// It exists, but it is not to be trusted, or it is not text.
    Refused(Fault),
}

impl fmt::Display for ReadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing => f.write_str("no such file"),
            Self::Unreadable(error) => error.fmt(f),
            Self::Refused(fault) => fault.fmt(f),
        }
    }
}

impl std::error::Error for ReadError {}

impl Source {
    /// Text from elsewhere than a file; `path` is what faults call it.
    pub fn new(path: impl AsRef<Path>, text: impl Into<String>) -> Self {
        let text = text.into();
        let newlines = text.bytes().enumerate().filter(|(_, byte)| *byte == b'\n');
        let lines = std::iter::once(0).chain(newlines.map(|(at, _)| at + 1)).collect();
        Self { path: path.as_ref().into(), text, lines }
    }

    /// Reads a file of at most 1 MiB of UTF-8. Its owner must be root or `me`, and only its owner may write it. The same
    /// must hold of each directory on the way, or another user could replace the file. A directory with the sticky bit,
    /// such as /tmp, may be writable by all.
    ///
    /// # Errors
    /// See [`ReadError`]. Never waits, whatever the path leads to.
    pub fn read(path: impl AsRef<Path>, me: Uid) -> Result<Self, ReadError> {
        let path = path.as_ref();
        let file = trust::open(path, me)?;
        let mut bytes = Vec::new();
        file.take(LONGEST + 1).read_to_end(&mut bytes).map_err(ReadError::Unreadable)?;
        if bytes.len() as u64 > LONGEST {
            let message = format!("longer than {LONGEST} bytes; expected at most that");
            return Err(ReadError::Refused(Fault::of_file(path, message)));
        }
        Self::from_bytes(path, bytes).map_err(ReadError::Refused)
    }

    /// Text from bytes that should be UTF-8.
    ///
    /// # Errors
    /// The place of the first byte that is not.
    pub fn from_bytes(path: impl AsRef<Path>, bytes: Vec<u8>) -> Result<Self, Fault> {
        String::from_utf8(bytes).map(|text| Self::new(path.as_ref(), text)).map_err(|error| {
            let valid = error.utf8_error().valid_up_to();
            let byte = error.as_bytes()[valid];
            let whole = Self::new(path.as_ref(), String::from_utf8_lossy(&error.as_bytes()[..valid]));
            whole.fault(valid, format!("the byte {byte:#04x}, which is not UTF-8; expected text in UTF-8"))
        })
    }

    /// The path.
    pub fn path(&self) -> &Arc<Path> {
        &self.path
    }

    /// The text.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// A fault at this byte offset.
    fn fault(&self, offset: usize, message: impl Into<String>) -> Fault {
        Fault { file: self.path.clone(), place: Some(self.place(offset)), message: message.into() }
    }

    /// Faults at these byte offsets, which ascend. One pass over the text, however many there are.
    pub(super) fn faults(&self, spots: Vec<(usize, String)>) -> Vec<Fault> {
        let (mut line, mut seen, mut column) = (0, 0, 1);
        let fault = |(offset, message): (usize, String)| {
            let offset = offset.min(self.text.len());
            let now = self.line(offset);
            if now != line {
                (line, seen, column) = (now, self.lines[now - 1], 1);
            }
            column += characters(&self.text.as_bytes()[seen..offset]);
            seen = offset;
            Fault { file: self.path.clone(), place: Some((line, column)), message }
        };
        spots.into_iter().map(fault).collect()
    }

    /// The number of the line that holds a byte offset, from 1.
    pub(super) fn line(&self, offset: usize) -> usize {
        self.lines.partition_point(|&start| start <= offset.min(self.text.len()))
    }

    /// Where a line begins and where it ends, behind its newline.
    pub(super) fn span_of_line(&self, line: usize) -> Range<usize> {
        self.lines[line - 1]..self.lines.get(line).copied().unwrap_or(self.text.len() + 1)
    }

    /// Line and column of a byte offset.
    fn place(&self, offset: usize) -> (usize, usize) {
        let offset = offset.min(self.text.len());
        let line = self.line(offset);
        (line, characters(&self.text.as_bytes()[self.lines[line - 1]..offset]) + 1)
    }
}

/// How many characters begin in these bytes: each byte that does not continue another begins one.
fn characters(bytes: &[u8]) -> usize {
    bytes.iter().filter(|&&byte| byte & 0xC0 != 0x80).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_count_lines_and_characters_from_one() {
        let source = Source::new("f", "ab\nöd x\n");
        for (offset, place) in [(0, (1, 1)), (2, (1, 3)), (3, (2, 1)), (5, (2, 2)), (7, (2, 4)), (99, (3, 1))] {
            assert_eq!(source.place(offset), place, "{offset}");
        }
        let spots = [0, 2, 3, 5, 5, 7, 99].map(|offset| (offset, String::new()));
        let places: Vec<_> = source.faults(spots.into()).iter().filter_map(Fault::place).collect();
        assert_eq!(places, [(1, 1), (1, 3), (2, 1), (2, 2), (2, 2), (2, 4), (3, 1)]);
    }

    #[test]
    fn a_byte_that_is_no_text_is_a_fault_with_its_place() {
        let fault = Source::from_bytes("f", b"a\n\xc3\xb6\xff".to_vec()).unwrap_err();
        assert_eq!(fault.to_string(), "f:2:2: the byte 0xff, which is not UTF-8; expected text in UTF-8");
    }

    #[test]
    fn a_fault_cannot_forge_a_line_or_steer_a_terminal() {
        let fault = Source::new("f\n", "").fault(0, "unknown key `a\nb\u{1b}[2J\u{9b}`");
        assert_eq!(fault.to_string(), r"f\n:1:1: unknown key `a\nb\u{1b}[2J\u{9b}`");
    }
}
