//! Text that a peer or another user chose, as it may stand in a record and on a terminal.
//!
//! Such text must not end a line, move the cursor, or reorder or hide the text around it. Each function has the rule for
//! one kind of place. The rules differ only in the backslash and the parenthesis.

use std::borrow::Cow;

/// For text as it was found: every control character, every invisible character and every backslash is escaped as in Rust
/// (`\n`, `\u{202e}`, `\\`). Two different texts stay different.
pub fn printable(text: &str) -> String {
    escape(text, |c| c == '\\' || is_unseen(c))
}

/// For text that has been escaped before, and for quotations from a file: as [`printable`], but backslashes stay.
pub fn printable_again(text: &str) -> String {
    escape(text, is_unseen)
}

/// For the name of a program in a message, after [`printable`]: a `)` in it does not close the parentheses around it.
pub(crate) fn in_parentheses(name: &str) -> Cow<'_, str> {
    match name.trim_end_matches(')') {
        head if head.contains(')') => Cow::Owned(head.replace(')', "\\x29") + &name[head.len()..]),
        _ => Cow::Borrowed(name),
    }
}

fn escape(text: &str, is_escaped: impl Fn(char) -> bool) -> String {
    text.chars().fold(String::with_capacity(text.len()), |mut out, c| {
        if is_escaped(c) {
            out.extend(c.escape_default())
        } else {
            out.push(c)
        }
        out
    })
}

/// Controls, and the characters that reorder or hide what stands around them, or show nothing at all: Unicode's format
/// characters and default ignorables (UAX #44, DerivedCoreProperties).
fn is_unseen(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{ad}' | '\u{34f}' | '\u{600}'..='\u{605}' | '\u{61c}' | '\u{6dd}' | '\u{70f}' | '\u{115f}' | '\u{1160}'
            | '\u{17b4}' | '\u{17b5}' | '\u{180b}'..='\u{180f}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{3164}' | '\u{fe00}'..='\u{fe0f}' | '\u{feff}' | '\u{ffa0}'
            | '\u{fff0}'..='\u{fffb}' | '\u{1bca0}'..='\u{1bca3}' | '\u{1d173}'..='\u{1d17a}' | '\u{e0000}'..='\u{e0fff}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_text_moves_the_cursor_or_ends_a_line() {
        assert_eq!(printable("a\nb\u{1b}[2J\u{202e}\\"), "a\\nb\\u{1b}[2J\\u{202e}\\\\");
        assert_eq!(printable("köln"), "köln");
        assert_eq!(printable_again("dev\\x2d1\u{ad}\r"), "dev\\x2d1\\u{ad}\\r");
    }
}
