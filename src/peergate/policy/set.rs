//! Sets of ids as sorted, disjoint ranges. Used by [`policy`](super), and by the policy file for the groups that deny rules list.

use std::collections::BTreeSet;

use crate::ids::{OVERFLOW_ID, Uid};

/// The highest id that a process can have; `u32::MAX` is `(uid_t) -1`.
pub(crate) const HIGHEST: u32 = u32::MAX - 1;

/// A set of user or group ids. It never holds an unmapped id ([`Uid::is_known`]), whatever the rule says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct IdSet {
    /// Inclusive, ascending, with at least one id between one and the next.
    ranges: Vec<(u32, u32)>,
}

impl IdSet {
    pub(crate) fn new(ranges: impl IntoIterator<Item = (u32, u32)>) -> Self {
        let mut pieces: Vec<(u32, u32)> = ranges.into_iter().flat_map(without_unknown).collect();
        pieces.sort_unstable();
        let mut ranges: Vec<(u32, u32)> = Vec::with_capacity(pieces.len());
        for (low, high) in pieces {
            match ranges.last_mut() {
                Some(last) if low <= last.1.saturating_add(1) => last.1 = last.1.max(high),
                _ => ranges.push((low, high)),
            }
        }
        Self { ranges }
    }

    pub(crate) fn contains(&self, id: u32) -> bool {
        let after = self.ranges.partition_point(|range| range.0 <= id);
        after > 0 && id <= self.ranges[after - 1].1
    }

    /// Whether every id in here is also in `other`.
    pub(super) fn is_subset(&self, other: &Self) -> bool {
        self.ranges.iter().all(|&(low, high)| {
            let after = other.ranges.partition_point(|range| range.0 <= low);
            after > 0 && high <= other.ranges[after - 1].1
        })
    }

    /// Whether any id is in both.
    pub(super) fn overlaps(&self, other: &Self) -> bool {
        self.ranges.iter().any(|&(low, high)| {
            let next = other.ranges.partition_point(|range| range.1 < low);
            other.ranges.get(next).is_some_and(|range| range.0 <= high)
        })
    }

    pub(super) fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// How many ids it holds.
    pub(super) fn size(&self) -> u64 {
        self.ranges.iter().map(|&(low, high)| u64::from(high - low) + 1).sum()
    }

    pub(super) fn ranges(&self) -> &[(u32, u32)] {
        &self.ranges
    }

    /// Takes in every id of `other`.
    pub(super) fn unite(&mut self, other: &Self) {
        for &(mut low, mut high) in &other.ranges {
            let from = self.ranges.partition_point(|range| range.1.saturating_add(1) < low);
            let to = self.ranges.partition_point(|range| range.0 <= high.saturating_add(1));
            if from < to {
                low = low.min(self.ranges[from].0);
                high = high.max(self.ranges[to - 1].1);
            }
            self.ranges.splice(from..to, [(low, high)]);
        }
    }
}

/// Goes through the ids at which ranges begin and cease, ascending, each with the places of the ranges that cover the ids from
/// there to the next. A range is its place, its first id and its last, which is at most [`HIGHEST`]; ranges of one place must not
/// overlap. Stops where `at` returns `None`.
pub(super) fn sweep(
    ranges: impl Iterator<Item = (usize, u32, u32)>,
    mut at: impl FnMut(u32, &BTreeSet<usize>) -> Option<()>,
) -> Option<()> {
    let mut edges: Vec<_> =
        ranges.flat_map(|(place, low, high)| [(low, true, place), (high + 1, false, place)]).collect();
    edges.sort_unstable();
    let mut active = BTreeSet::new();
    for group in edges.chunk_by(|a, b| a.0 == b.0) {
        for &(_, begins, place) in group {
            if begins {
                active.insert(place)
            } else {
                active.remove(&place)
            };
        }
        at(group[0].0, &active)?;
    }
    Some(())
}

/// What remains of a range without the unmapped ids.
fn without_unknown((low, high): (u32, u32)) -> impl Iterator<Item = (u32, u32)> {
    let high = high.min(HIGHEST);
    let below = (low, high.min(OVERFLOW_ID - 1));
    let above = (low.max(OVERFLOW_ID + 1), high);
    debug_assert!(!Uid::new(OVERFLOW_ID).is_known());
    [below, above].into_iter().filter(|(low, high)| low <= high)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlapping_and_touching_ranges_become_one() {
        let set = IdSet::new([(10, 20), (21, 30), (5, 12), (40, 40)]);
        assert_eq!(set.ranges(), [(5, 30), (40, 40)]);
        assert_eq!(set.size(), 27);
        for (id, inside) in [(4, false), (5, true), (30, true), (31, false), (40, true), (41, false)] {
            assert_eq!(set.contains(id), inside, "{id}");
        }
    }

    #[test]
    fn unmapped_ids_are_in_no_set() {
        let everyone = IdSet::new([(0, u32::MAX)]);
        assert!(!everyone.contains(OVERFLOW_ID) && !everyone.contains(u32::MAX));
        assert!(everyone.contains(OVERFLOW_ID - 1) && everyone.contains(OVERFLOW_ID + 1) && everyone.contains(HIGHEST));
        assert!(IdSet::new([(OVERFLOW_ID, OVERFLOW_ID)]).is_empty());
    }

    #[test]
    fn uniting_gives_what_building_at_once_gives() {
        let pieces = [(100, 200), (10, 20), (201, 210), (0, 5), (15, 150), (HIGHEST, u32::MAX), (70_000, 80_000)];
        let mut united = IdSet::default();
        for (n, piece) in pieces.iter().enumerate() {
            united.unite(&IdSet::new([*piece]));
            assert_eq!(united, IdSet::new(pieces[..=n].iter().copied()));
        }
    }

    #[test]
    fn a_subset_lies_within_single_ranges() {
        let set = IdSet::new([(1, 5), (7, 9)]);
        assert!(IdSet::new([(2, 3), (7, 7)]).is_subset(&set));
        assert!(!IdSet::new([(5, 7)]).is_subset(&set));
        assert!(IdSet::default().is_subset(&set));
    }
}
