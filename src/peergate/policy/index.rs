//! Which rules a uid or a gid can touch, looked up instead of scanned for. Used by [`policy`](super) alone.
//!
//! The id space is cut into segments inside which the same rules apply. Each segment lists these rules in the order
//! of decision and ends with the first one that needs nothing but the id itself: nothing behind it could decide.

use super::matcher::Matcher;
use super::set::{IdSet, sweep};

/// No rule: higher than the number of any.
pub(super) const NONE: u32 = u32::MAX;

/// Rules that overlap in many places would make long lists in many segments. Beyond this many entries (16 MiB)
/// a policy is scanned instead; a file of ordinary rules stays thousands of times below.
const MOST_ENTRIES: usize = 4 << 20;

/// The candidates for one id, or for every subject.
#[derive(Clone, Copy, Debug)]
pub(super) struct Candidates<'i> {
    /// The first rule that this id alone decides, or [`NONE`].
    pub(super) sure: u32,
    /// Rules before it that depend on another id too, ascending.
    pub(super) by_ids: &'i [u32],
    /// Rules before it that depend on the process, ascending.
    pub(super) by_process: &'i [u32],
}

/// The look-up tables of a policy.
#[derive(Debug)]
pub(super) struct Index {
    users: Table,
    groups: Table,
    /// The gids that any of these rules is listed under. Most gids of most subjects are none of them.
    listed_gids: IdSet,
    /// Rules that depend on nothing but the process, ascending.
    of_any: Vec<u32>,
}

impl Index {
    /// `None` where the tables would grow out of proportion to the rules.
    pub(super) fn new(matchers: &[Matcher]) -> Option<Self> {
        let (mut by_uid, mut by_gid, mut of_any) = (Vec::new(), Vec::new(), Vec::new());
        for (number, matcher) in (0..NONE).zip(matchers) {
            // Listed under the rarest of the ids that it needs, so that few subjects meet it.
            let rarest = matcher.ids().min_by_key(|ids| ids.size());
            let Some(ids) = rarest else {
                of_any.push(number);
                continue;
            };
            let (needs_process, alone) = (matcher.needs_process(), matcher.is_one_key());
            for (list, set) in [(&mut by_uid, ids.uids()), (&mut by_gid, ids.gids())] {
                list.extend(set.map(|set| Entry { number, set, needs_process, alone }));
            }
        }
        let mut left = MOST_ENTRIES;
        let listed_gids = IdSet::new(by_gid.iter().flat_map(|entry| entry.set.ranges().iter().copied()));
        let (users, groups) = (Table::new(&by_uid, &mut left)?, Table::new(&by_gid, &mut left)?);
        Some(Self { users, groups, listed_gids, of_any })
    }

    pub(super) fn of_uid(&self, uid: u32) -> Candidates<'_> {
        self.users.at(uid)
    }

    pub(super) fn of_gid(&self, gid: u32) -> Candidates<'_> {
        self.groups.at(gid)
    }

    /// Whether any rule is listed by this gid.
    pub(super) fn lists_gid(&self, gid: u32) -> bool {
        self.listed_gids.contains(gid)
    }

    /// Whether any rule that is listed by gid depends on something besides.
    pub(super) fn has_conditions_on_gids(&self) -> bool {
        !self.groups.lists.is_empty()
    }

    /// The rules that depend on nothing but the process.
    pub(super) fn of_any(&self) -> &[u32] {
        &self.of_any
    }
}

struct Entry<'s> {
    number: u32,
    set: &'s IdSet,
    needs_process: bool,
    /// The set is all that the rule depends on.
    alone: bool,
}

#[derive(Debug)]
struct Table {
    /// The first id of each segment, ascending from 0. A segment ends where the next begins.
    starts: Vec<u32>,
    directory: Directory,
    segments: Vec<Segment>,
    /// The lists of all segments, one behind the other.
    lists: Vec<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Segment {
    sure: u32,
    by_ids: (u32, u32),
    by_process: (u32, u32),
}

/// Where in `starts` to look for an id. Ids below the last start are cut into equal pages, about as many as there are
/// starts; in a page a binary search is left. It keeps the cost of a decision from growing with the number of rules: in
/// one run of `benches/policy.rs` a decision by 100 rules took 89 ns and by 10,000 rules 129 ns, with a binary search over
/// all starts instead 130 and 220 ns.
#[derive(Debug, Default)]
struct Directory {
    /// An id shifted by this is its page.
    shift: u32,
    /// For each page, how many starts lie before it; one more entry for the end of the last.
    pages: Vec<u32>,
}

impl Directory {
    fn new(starts: &[u32]) -> Self {
        let last = starts.last().copied().unwrap_or(0);
        let mut shift = 0;
        while last >> shift > 2 * u32::try_from(starts.len()).unwrap_or(NONE / 2) {
            shift += 1;
        }
        let before = |page: u32| starts.partition_point(|&start| start >> shift < page);
        let mut pages: Vec<u32> = Vec::with_capacity((last >> shift) as usize + 2);
        pages.extend((0..=(last >> shift) + 1).map(|page| u32::try_from(before(page)).unwrap_or(NONE)));
        Self { shift, pages }
    }

    /// The last of `starts` that is not above `id`.
    fn find(&self, starts: &[u32], id: u32) -> usize {
        let page = (id >> self.shift) as usize;
        let Some(&[from, to]) = self.pages.get(page..page + 2) else { return starts.len() - 1 };
        let (from, to) = (from as usize, to as usize);
        from + starts[from..to].partition_point(|&start| start <= id) - 1
    }
}

impl Table {
    fn new(entries: &[Entry<'_>], left: &mut usize) -> Option<Self> {
        let empty = Segment { sure: NONE, by_ids: (0, 0), by_process: (0, 0) };
        let mut table =
            Self { starts: vec![0], directory: Directory::default(), segments: vec![empty], lists: Vec::new() };
        let ranges = entries
            .iter()
            .enumerate()
            .flat_map(|(place, entry)| entry.set.ranges().iter().map(move |&(low, high)| (place, low, high)));
        sweep(ranges, |start, active| {
            let listed: Vec<&Entry<'_>> = first_to_sure(active.iter().map(|&place| &entries[place]));
            *left = left.checked_sub(listed.len() + 8)?;
            table.begin(start, &listed);
            Some(())
        })?;
        table.directory = Directory::new(&table.starts);
        Some(table)
    }

    /// Appends a segment that begins at `start`.
    fn begin(&mut self, start: u32, listed: &[&Entry<'_>]) {
        let sure = listed.last().filter(|entry| entry.alone).map_or(NONE, |entry| entry.number);
        let conditional = listed.iter().filter(|entry| !entry.alone);
        let by_ids = self.list(conditional.clone().filter(|entry| !entry.needs_process));
        let by_process = self.list(conditional.filter(|entry| entry.needs_process));
        let segment = Segment { sure, by_ids, by_process };
        if start == 0 {
            self.segments[0] = segment;
        } else {
            self.starts.push(start);
            self.segments.push(segment);
        }
    }

    fn list<'e>(&mut self, entries: impl Iterator<Item = &'e &'e Entry<'e>>) -> (u32, u32) {
        let end_of = |lists: &Vec<u32>| u32::try_from(lists.len()).unwrap_or(NONE);
        let start = end_of(&self.lists);
        self.lists.extend(entries.map(|entry| entry.number));
        (start, end_of(&self.lists))
    }

    fn at(&self, id: u32) -> Candidates<'_> {
        let segment = self.segments[self.directory.find(&self.starts, id)];
        let list = |(start, end): (u32, u32)| &self.lists[start as usize..end as usize];
        Candidates { sure: segment.sure, by_ids: list(segment.by_ids), by_process: list(segment.by_process) }
    }
}

/// The entries up to and with the first one that decides alone.
fn first_to_sure<'e>(entries: impl Iterator<Item = &'e Entry<'e>>) -> Vec<&'e Entry<'e>> {
    let mut listed = Vec::new();
    for entry in entries {
        listed.push(entry);
        if entry.alone {
            break;
        }
    }
    listed
}

#[cfg(test)]
mod tests {
    use super::super::condition::Test;
    use super::super::condition::groups::AnyOf;
    use super::super::condition::users::OneOf;
    use super::*;

    fn matcher(users: (u32, u32), groups: Option<(u32, u32)>) -> Matcher {
        let users: Box<dyn Test> = Box::new(OneOf::new(IdSet::new([users])));
        let groups = groups.map(|groups| Box::new(AnyOf::new(IdSet::new([groups]))) as Box<dyn Test>);
        Matcher::new(false, std::iter::once(users).chain(groups).collect())
    }

    fn users(low: u32, high: u32) -> Matcher {
        matcher((low, high), None)
    }

    #[test]
    fn a_segment_lists_no_rule_behind_one_that_needs_only_the_id() {
        let both = matcher((0, 100), Some((0, 500)));
        let index = Index::new(&[both, users(50, 60), users(55, 70)]).unwrap();
        let at = |uid| (index.of_uid(uid).sure, index.of_uid(uid).by_ids.to_vec());
        assert_eq!(at(10), (NONE, vec![0]));
        assert_eq!(at(55), (1, vec![0]));
        assert_eq!(at(61), (2, vec![0]));
        assert_eq!(at(101), (NONE, vec![]));
    }

    #[test]
    fn every_id_finds_its_segment_however_the_starts_lie() {
        let crowded: Vec<u32> = (0..500).chain((0..40).map(|n| 1 << 20 | n << 3)).chain([u32::MAX - 1]).collect();
        let even: Vec<u32> = (0..300).map(|n| n * 100).collect();
        for starts in [vec![0], vec![0, 1], vec![0, u32::MAX], even, crowded] {
            let directory = Directory::new(&starts);
            assert!(directory.pages.len() <= 2 * starts.len() + 3, "{} pages", directory.pages.len());
            let around = starts.iter().flat_map(|&start| [start.saturating_sub(1), start, start.saturating_add(1)]);
            for id in around.chain((0..32).map(|bit| 1 << bit)).chain([u32::MAX]) {
                let expected = starts.partition_point(|&start| start <= id) - 1;
                assert_eq!(directory.find(&starts, id), expected, "id {id}");
            }
        }
    }

    #[test]
    fn a_rule_with_both_keys_is_listed_under_the_rarer_one() {
        let index = Index::new(&[matcher((0, 70_000), Some((4, 4)))]).unwrap();
        assert_eq!(index.of_uid(1000).by_ids, [0_u32; 0]);
        assert_eq!(index.of_gid(4).by_ids, [0]);
        assert_eq!(index.of_gid(5).by_ids, [0_u32; 0]);
    }

    #[test]
    fn nobody_meets_the_rules_for_others_however_many_there_are() {
        let others: Vec<_> = (0..10_000).map(|n| users(10 * n, 10 * n + 3)).collect();
        let index = Index::new(&others).unwrap();
        for uid in 0..100_000 {
            let Candidates { sure, by_ids, by_process } = index.of_uid(uid);
            assert_eq!(sure, if uid % 10 < 4 && uid != 65_534 { uid / 10 } else { NONE });
            assert_eq!((by_ids.len(), by_process.len()), (0, 0));
        }
    }

    #[test]
    fn rules_that_overlap_everywhere_are_not_tabulated() {
        // Nested ranges, each with a condition besides: every segment would list nearly all of them.
        let nested = |n: u32| matcher((n, 60_000 - n), Some((0, 60_000)));
        assert!(Index::new(&(0..100).map(nested).collect::<Vec<_>>()).is_some());
        assert!(Index::new(&(0..5000).map(nested).collect::<Vec<_>>()).is_none());
    }
}
