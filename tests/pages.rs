//! The manual pages as they are read: rendered by man(1) for a terminal of 80 columns.
//!
//! Apart from tests/docs.rs, which also runs in the package's build, without man.

use std::fs;
use std::path::Path;
use std::process::Command;

const WIDTH: usize = 80;
/// A column narrower than this cannot hold a sentence.
const NARROWEST: usize = 20;
/// So many lines in so narrow a column have a word or two each.
const MOST_NARROW_LINES: usize = 2;
/// Text that begins to the left of this column has room, and is short by itself.
const DEEPEST_INDENT: usize = 24;

/// The page as text without overstrikes, and what troff complains of.
fn render(page: &Path) -> (String, String) {
    let mut man = Command::new("man");
    man.args(["--warnings", "--local-file"]).arg(page);
    man.env("MANWIDTH", WIDTH.to_string()).env("LC_ALL", "C.UTF-8").env("PAGER", "cat").env_remove("MANROFFOPT");
    // Without escape sequences for bold and underlined text.
    let output = man.env("GROFF_NO_SGR", "1").output().expect("man(1), of the package man-db");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut text = String::new();
    for character in String::from_utf8(output.stdout).unwrap().chars() {
        if character == '\u{8}' {
            text.pop();
        } else {
            text.push(character);
        }
    }
    (text, String::from_utf8(output.stderr).unwrap())
}

/// The places that are hard to read at 80 columns.
fn faults(text: &str) -> Vec<String> {
    let mut faults: Vec<_> = text.lines().filter(|line| line.chars().count() > WIDTH).map(too_long).collect();
    let indent = |line: &str| line.chars().take_while(|c| *c == ' ').count();
    let lines: Vec<_> = text.lines().collect();
    // The lines of a table cell below its first: they begin far to the right, and are short.
    let narrow = |line: &&str| {
        !line.trim().is_empty() && indent(line) > DEEPEST_INDENT && line.trim().chars().count() < NARROWEST
    };
    for cell in lines.chunk_by(|a, b| narrow(a) && narrow(b) && indent(a) == indent(b)) {
        if narrow(&cell[0]) && cell.len() > MOST_NARROW_LINES {
            faults.push(format!("a column of {} lines, one or a few words each:\n{}", cell.len(), cell.join("\n")));
        }
    }
    // Only words of a language may be hyphenated; in a path or a setting a reader would take the hyphen as part of it.
    for pair in lines.windows(2) {
        let Some(begin) = pair[0].strip_suffix('\u{2010}') else { continue };
        let [begin, end] = [begin.split_whitespace().next_back(), pair[1].split_whitespace().next()];
        let word = format!("{}{}", begin.unwrap_or_default(), end.unwrap_or_default());
        let bare = word.trim_matches(|c: char| "()‘’“”\"'.,;:".contains(c));
        if !bare.chars().all(|c| c.is_alphabetic() || c == '-') {
            faults.push(format!("hyphenated: {word}"));
        }
    }
    faults
}

fn too_long(line: &str) -> String {
    format!("longer than {WIDTH} columns: {line}")
}

#[test]
fn every_manual_page_is_readable_at_80_columns() {
    let pages: Vec<_> = fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../packaging/man"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    assert!(pages.len() >= 4, "{pages:?}");
    for page in pages {
        let (text, warnings) = render(&page);
        assert!(text.contains("SECURITY CONSIDERATIONS"), "not rendered: {text}");
        assert_eq!((warnings.as_str(), faults(&text)), ("", vec![]), "{}", page.display());
    }
}

#[test]
fn a_table_column_with_one_word_a_line_would_be_noticed() {
    let page = Path::new(env!("CARGO_TARGET_TMPDIR")).join("pages-narrow.8");
    let table = ".Dd November 23, 2026\n.Dt NARROW 8\n.Os\n.Sh NAME\n.Nm narrow\n.Nd too narrow\n.Sh TABLE\n\
                 .Bl -column \"72261db9963c465c8c6121daadeb1cbc\" \"GATE_VERDICT\" \"PRIORITY\" \"what happened\"\n\
                 .It Li 00e1479225c6488a9e2fed748c43c786 Ta \\(en Ta 3 Ta a configuration was refused, the old one stays\n\
                 .El\n";
    fs::write(&page, table).unwrap();
    let (text, warnings) = render(&page);
    let found = faults(&text);
    assert!(found.iter().any(|fault| fault.starts_with("a column of 7 lines")), "{found:?}\n{text}");
    assert!(warnings.contains("break line"), "{warnings}");
}
