//! What framing costs, beside a plain copy of the same bytes. Run by `cargo bench --bench line`.

use divan::counter::BytesCount;
use divan::{Bencher, black_box};
use echod::line::{Cursor, Room, echo};

/// Bytes received at once, in lines of these lengths.
const INPUT: usize = 16 * 1024;
const LINES: [usize; 4] = [8, 64, 1024, 16 * 1024];

fn lines(length: usize) -> Vec<u8> {
    (1..=INPUT).map(|i| if i % length == 0 { b'\n' } else { b'x' }).collect()
}

#[divan::bench(args = LINES)]
fn frame(bencher: Bencher, length: usize) {
    let (input, mut out) = (lines(length), Vec::with_capacity(3 * INPUT));
    let due = INPUT + 2 * (INPUT / length);
    assert_eq!(echo(&input, Cursor::default(), INPUT, false, Room::ENDLESS, &mut out).lines, (INPUT / length) as u64);
    assert_eq!(out.len(), due);
    bencher.counter(BytesCount::new(INPUT)).bench_local(|| {
        out.clear();
        echo(black_box(&input), Cursor::default(), INPUT, false, Room::ENDLESS, &mut out)
    });
}

/// The lower bound: a copy.
#[divan::bench(args = LINES)]
fn copy(bencher: Bencher, length: usize) {
    let (input, mut out) = (lines(length), Vec::with_capacity(3 * INPUT));
    bencher.counter(BytesCount::new(INPUT)).bench_local(|| {
        out.clear();
        out.extend_from_slice(black_box(&input));
        out.len()
    });
}

fn main() {
    divan::main();
}
