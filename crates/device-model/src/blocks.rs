//! Sets of blocks of the bulk state.
//!
//! The bulk state is cut into blocks of 4 KiB; 16 of them are a group, the unit of one stream record,
//! so that the stream length of any set is known without making a byte of it.

/// Size of a block in bytes; the last one of a device may be shorter.
pub(crate) const BLOCK_BYTES: u64 = 4096;
/// Blocks in a group.
pub(crate) const GROUP_BLOCKS: u64 = 16;

/// A set of block numbers below a fixed limit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BlockSet {
    words: Vec<u64>,
    blocks: u64,
}

impl BlockSet {
    pub(crate) fn empty(blocks: u64) -> Self {
        Self { words: vec![0; blocks.div_ceil(64) as usize], blocks }
    }

    pub(crate) fn full(blocks: u64) -> Self {
        let mut words = vec![!0; blocks.div_ceil(64) as usize];
        if let (Some(last), false) = (words.last_mut(), blocks.is_multiple_of(64)) {
            *last = (1 << (blocks % 64)) - 1;
        }
        Self { words, blocks }
    }

    pub(crate) fn insert_range(&mut self, first: u64, end: u64) {
        for block in first..end.min(self.blocks) {
            if let Some(word) = self.words.get_mut((block / 64) as usize) {
                *word |= 1 << (block % 64);
            }
        }
    }

    pub(crate) fn remove_range(&mut self, first: u64, end: u64) {
        for block in first..end.min(self.blocks) {
            if let Some(word) = self.words.get_mut((block / 64) as usize) {
                *word &= !(1 << (block % 64));
            }
        }
    }

    pub(crate) fn contains(&self, block: u64) -> bool {
        self.words.get((block / 64) as usize).is_some_and(|word| word >> (block % 64) & 1 != 0)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    pub(crate) fn is_full(&self) -> bool {
        self.count() == self.blocks
    }

    pub(crate) fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Takes all of `other` into this set.
    pub(crate) fn union(&mut self, other: &BlockSet) {
        for (word, other) in self.words.iter_mut().zip(&other.words) {
            *word |= other;
        }
    }

    /// Leaves only what is in `other` too.
    pub(crate) fn intersect(&mut self, other: &BlockSet) {
        for (word, other) in self.words.iter_mut().zip(&other.words) {
            *word &= other;
        }
    }

    /// Takes all of `other` out of this set.
    pub(crate) fn subtract(&mut self, other: &BlockSet) {
        for (word, other) in self.words.iter_mut().zip(&other.words) {
            *word &= !other;
        }
    }

    pub(crate) fn clear(&mut self) {
        self.words.fill(0);
    }

    /// The number of groups with a block in the set.
    pub(crate) fn groups(&self) -> u64 {
        let lanes = |word: &u64| (0..4).filter(|lane| (word >> (lane * 16)) as u16 != 0).count();
        self.words.iter().map(|word| lanes(word) as u64).sum()
    }

    /// The first group with a block in the set, as (group, mask of its blocks).
    pub(crate) fn first_group(&self) -> Option<(u64, u16)> {
        first_group(self.words.iter().copied())
    }

    /// As [`first_group`](Self::first_group), of what is in this set or in `other`, and in `within`.
    pub(crate) fn first_group_of_union(
        &self,
        other: &BlockSet,
        within: Option<&BlockSet>,
    ) -> Option<(u64, u16)> {
        let words = self.words.iter().zip(&other.words).map(|(a, b)| a | b);
        match within {
            Some(within) => first_group(words.zip(&within.words).map(|(word, mask)| word & mask)),
            None => first_group(words),
        }
    }

    /// Removes a whole group.
    pub(crate) fn remove_group(&mut self, group: u64) {
        let first = group * GROUP_BLOCKS;
        self.remove_range(first, first + GROUP_BLOCKS);
    }
}

fn first_group(words: impl Iterator<Item = u64>) -> Option<(u64, u16)> {
    let (index, word) = words.enumerate().find(|(_, word)| *word != 0)?;
    let lane = word.trailing_zeros() / 16;
    Some((index as u64 * 4 + u64::from(lane), (word >> (lane * 16)) as u16))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_come_in_order_and_count_once() {
        let mut set = BlockSet::empty(1000);
        set.insert_range(0, 2);
        set.insert_range(15, 17);
        set.insert_range(990, 2000);
        assert_eq!((set.count(), set.groups()), (2 + 2 + 10, 4));
        let mut seen = Vec::new();
        while let Some((group, mask)) = set.first_group() {
            seen.push((group, mask));
            set.remove_group(group);
        }
        assert_eq!(seen, [(0, 0x8003), (1, 1), (61, 0xc000), (62, 0xff)]);
        assert!(set.is_empty());
    }

    #[test]
    fn a_full_set_has_no_block_beyond_its_limit() {
        for blocks in [0, 1, 63, 64, 65, 100] {
            let set = BlockSet::full(blocks);
            assert_eq!(set.count(), blocks);
            assert!(set.is_full());
            assert!(!set.contains(blocks));
        }
    }
}
