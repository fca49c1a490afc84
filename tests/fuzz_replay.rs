//! Replays the fuzzers' corpora (fuzz/corpus) through the same functions with any compiler, so that what the fuzzers
//! found stays tested without a fuzzer. The included modules' own tests run once more.

use std::fs;
use std::path::Path;

#[path = "../fuzz/targets.rs"]
mod targets;

#[test]
fn every_input_of_the_fuzz_corpora_holds_every_claim() {
    for (name, target) in targets::ALL {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus").join(name);
        let inputs = fs::read_dir(&corpus).unwrap_or_else(|error| panic!("{}: {error}", corpus.display()));
        let mut replayed = 0;
        for input in inputs {
            let path = input.unwrap().path();
            // Shown only if the test fails: the last one printed is the input that failed.
            println!("{}", path.display());
            target(&fs::read(&path).unwrap());
            replayed += 1;
        }
        assert!(replayed >= 5, "{}: {replayed} inputs", corpus.display());
    }
}

#[test]
fn every_fuzz_target_takes_empty_and_arbitrary_input() {
    let mut seed = 0x2545_f491_4f6c_dd1d_u64;
    for (_, target) in targets::ALL {
        target(b"");
        for length in 0..200 {
            let noise: Vec<u8> = (0..length)
                .map(|_| {
                    seed ^= seed << 13;
                    seed ^= seed >> 7;
                    seed ^= seed << 17;
                    seed as u8
                })
                .collect();
            target(&noise);
        }
    }
}
