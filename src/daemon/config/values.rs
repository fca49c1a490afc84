//! The values of a configuration: sizes, time spans, numbers, words. Each wrong one is told what was expected.

use std::num::NonZeroUsize;
use std::time::Duration;

use peergate::audit::RecordScope;
use peergate::policy_file::ValueKind;

use super::sections::Verify;

/// As many connections as Linux lets a process have descriptors by default (fs.nr_open).
const MOST_CONNECTIONS: u64 = 1 << 20;
const LARGEST_SIZE: u64 = 1 << 30;
const MOST_WORKERS: u64 = 256;
const LONGEST_BUSY_POLL: Duration = Duration::from_secs(1);

/// A number of connections.
pub const CONNECTIONS: ValueKind<usize> = ValueKind {
    expected: "a number of connections from 1 to 1048576, such as 64",
    number: |number| within(1..=MOST_CONNECTIONS, number),
    text: |_| None,
};

/// A size in bytes, above zero.
pub const SIZE: ValueKind<usize> = ValueKind {
    expected: "a size from 1 byte to 1G, such as 65536, \"64K\" or \"1M\"",
    number: |number| within(1..=LARGEST_SIZE, number),
    text: |text| parse_size(text).and_then(|number| within(1..=LARGEST_SIZE, number)),
};

/// A time span above zero.
pub const SPAN: ValueKind<Duration> = ValueKind {
    expected: "a time span above zero, such as \"90s\", \"1min 30s\" or 90",
    number: |seconds| positive(Duration::from_secs(seconds)),
    text: |text| parse_span(text).and_then(positive),
};

/// A time span above zero, or "off".
pub const SPAN_OR_OFF: ValueKind<Option<Duration>> = ValueKind {
    expected: "a time span above zero, such as \"90s\", \"10min\" or 90, or \"off\"",
    number: |seconds| positive(Duration::from_secs(seconds)).map(Some),
    text: |text| if text == "off" { Some(None) } else { parse_span(text).and_then(positive).map(Some) },
};

pub(super) const BUSY_POLL: ValueKind<Option<Duration>> = ValueKind {
    expected: "a time span above zero and up to 1s, such as \"50us\", or \"off\"",
    number: |seconds| short_span(Duration::from_secs(seconds)).map(Some),
    text: |text| if text == "off" { Some(None) } else { parse_span(text).and_then(short_span).map(Some) },
};

pub(super) const BURST: ValueKind<u32> = ValueKind {
    expected: "a number of records from 0 to 4294967295, such as 10",
    number: |number| u32::try_from(number).ok(),
    text: |_| None,
};

pub(super) const WORKERS: ValueKind<Option<NonZeroUsize>> = ValueKind {
    expected: "a number of threads from 1 to 256, such as 4, or \"auto\"",
    number: |number| within(1..=MOST_WORKERS, number).and_then(NonZeroUsize::new).map(Some),
    text: |text| (text == "auto").then_some(None),
};

pub(super) const RECORD: ValueKind<RecordScope> = ValueKind {
    expected: "\"denials\", \"connections\" or \"lines\"",
    number: |_| None,
    text: |text| {
        [RecordScope::Denials, RecordScope::Connections, RecordScope::Lines].into_iter().find(|r| r.as_str() == text)
    },
};

pub(super) const VERIFY: ValueKind<Verify> = ValueKind {
    expected: "\"connection\" or \"line\"",
    number: |_| None,
    text: |text| [Verify::Connection, Verify::Line].into_iter().find(|v| v.as_str() == text),
};

fn within(range: std::ops::RangeInclusive<u64>, number: u64) -> Option<usize> {
    usize::try_from(number).ok().filter(|_| range.contains(&number))
}

fn positive(span: Duration) -> Option<Duration> {
    (!span.is_zero()).then_some(span)
}

fn short_span(span: Duration) -> Option<Duration> {
    positive(span).filter(|span| *span <= LONGEST_BUSY_POLL)
}

/// Bytes, or K, M, G as powers of 1024.
fn parse_size(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(['K', 'M', 'G']);
    let factor = match &text[digits.len()..] {
        "" => 1,
        "K" => 1 << 10,
        "M" => 1 << 20,
        "G" => 1 << 30,
        _ => return None,
    };
    parse_digits(digits)?.checked_mul(factor)
}

/// Digits and nothing else: `u64::from_str` takes a sign, too.
fn parse_digits(text: &str) -> Option<u64> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

/// The units of systemd.time(7), in microseconds.
const UNITS: [(&[&str], u64); 9] = [
    (&["usec", "us", "µs", "μs"], 1),
    (&["msec", "ms"], 1000),
    (&["seconds", "second", "sec", "s", ""], 1_000_000),
    (&["minutes", "minute", "min", "m"], 60 * 1_000_000),
    (&["hours", "hour", "hr", "h"], 3600 * 1_000_000),
    (&["days", "day", "d"], 86_400 * 1_000_000),
    (&["weeks", "week", "w"], 7 * 86_400 * 1_000_000),
    (&["months", "month", "M"], 2_629_800 * 1_000_000),
    (&["years", "year", "y"], 31_557_600 * 1_000_000),
];

/// A time span as systemd.time(7) has it: numbers with units, added up; without a unit, seconds.
fn parse_span(text: &str) -> Option<Duration> {
    let is_number = |c: char| c.is_ascii_digit() || c == '.';
    let mut rest = text.trim();
    let mut total: u64 = 0;
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let (number, after) = rest.split_at(rest.find(|c| !is_number(c)).unwrap_or(rest.len()));
        let after = after.trim_start();
        let (unit, after) = after.split_at(after.find(|c: char| !c.is_alphabetic()).unwrap_or(after.len()));
        let (_, factor) = UNITS.iter().find(|(names, _)| names.contains(&unit))?;
        total = total.checked_add(scaled(number, *factor)?)?;
        rest = after.trim_start();
    }
    Some(Duration::from_micros(total))
}

/// A number, perhaps with a fraction, times `factor`; what is below one is cut off.
fn scaled(number: &str, factor: u64) -> Option<u64> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    let mut total = parse_digits(whole)?.checked_mul(factor)?;
    parse_digits(fraction.get(..fraction.len().min(18))?)?;
    let mut place = factor;
    for digit in fraction.bytes() {
        place /= 10;
        total = total.checked_add(place * u64::from(digit.checked_sub(b'0').filter(|digit| *digit < 10)?))?;
    }
    Some(total)
}

/// A time span as `parse_span` reads it, in the largest units that leave no rest.
pub fn show_span(span: Duration) -> String {
    let mut left = u64::try_from(span.as_micros()).unwrap_or(u64::MAX);
    let mut parts = Vec::new();
    for (unit, factor) in
        [("d", 86_400_000_000), ("h", 3_600_000_000), ("min", 60_000_000), ("s", 1_000_000), ("ms", 1000), ("us", 1)]
    {
        if left >= factor {
            parts.push(format!("{}{unit}", left / factor));
            left %= factor;
        }
    }
    parts.join(" ")
}

/// A size as `parse_size` reads it.
pub fn show_size(bytes: usize) -> String {
    let unit = [("G", 30), ("M", 20), ("K", 10)].into_iter().find(|(_, shift)| bytes > 0 && bytes % (1 << shift) == 0);
    unit.map_or(bytes.to_string(), |(unit, shift)| format!("{}{unit}", bytes >> shift))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_spans_are_read_as_systemd_reads_them() {
        let micros = |text| parse_span(text).map(|span| u64::try_from(span.as_micros()).unwrap());
        for (text, expected) in [
            ("50us", 50),
            ("50µs", 50),
            ("2 h", 7_200_000_000),
            ("2hours", 7_200_000_000),
            ("48hr", 172_800_000_000),
            ("1y 12month", 31_557_600_000_000 + 12 * 2_629_800_000_000),
            ("55s500ms", 55_500_000),
            ("300ms20s 5day", 432_020_300_000),
            ("1min 30s", 90_000_000),
            ("90", 90_000_000),
            ("1min 30", 90_000_000),
            ("1.5s", 1_500_000),
            ("0.000001s", 1),
            ("0", 0),
        ] {
            assert_eq!(micros(text), Some(expected), "{text}");
        }
        for text in
            ["", " ", "s", "min", "-1s", "1 parsec", "1s,", "1.2.3s", ".", "1.s", "off", "99999999999999y", "1e3"]
        {
            assert_eq!(micros(text), None, "{text}");
        }
    }

    #[test]
    fn sizes_are_powers_of_1024() {
        for (text, expected) in [("64K", 65_536), ("1M", 1 << 20), ("2G", 2 << 30), ("7", 7)] {
            assert_eq!(parse_size(text), Some(expected), "{text}");
        }
        for text in
            ["", "K", "64k", "64KB", "64 K", "+64", "-1", "6.4K", "1KK", "99999999999999999999", "99999999999999G"]
        {
            assert_eq!(parse_size(text), None, "{text}");
        }
    }

    #[test]
    fn what_is_shown_reads_back_as_the_same() {
        for micros in [1, 50, 999, 1000, 90_000_000, 90_000_001, 86_400_000_000, 123_456_789_012] {
            let span = Duration::from_micros(micros);
            assert_eq!(parse_span(&show_span(span)), Some(span), "{}", show_span(span));
        }
        for bytes in [1, 1023, 1024, 65_536, 65_537, 1 << 20, 3 << 30] {
            assert_eq!(parse_size(&show_size(bytes)), Some(bytes as u64), "{}", show_size(bytes));
        }
    }
}
