//! Dirty pages of the whole guest memory, by region.

use std::ops::Range;

use crate::memory::{PAGE_SIZE, RegionLayout};

/// Whether a source of dirty pages could name all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[must_use]
pub enum Completeness {
    /// Every page written since the last call is in the answer.
    Complete,
    /// Pages may be missing: all memory must be taken as dirty.
    Incomplete,
}

/// One bit per 4 KiB page; the words of a region start at a word boundary of their own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirtyBitmap {
    layout: Vec<RegionLayout>,
    words: Vec<Vec<u64>>,
}

impl DirtyBitmap {
    /// An empty bitmap for `layout`.
    pub fn new(layout: &[RegionLayout]) -> Self {
        let words = layout.iter().map(|r| vec![0; r.pages().div_ceil(64) as usize]).collect();
        Self { layout: layout.to_vec(), words }
    }

    /// The regions, as in [`GuestMemory::layout`](crate::GuestMemory::layout).
    pub fn layout(&self) -> &[RegionLayout] {
        &self.layout
    }

    /// The words of region `region`; bit i of word w is page 64 w + i of the region.
    pub fn region(&self, region: usize) -> &[u64] {
        &self.words[region]
    }

    /// As [`region`](Self::region), to or bits into. Bits behind the region's last page are ignored.
    pub fn region_mut(&mut self, region: usize) -> &mut [u64] {
        &mut self.words[region]
    }

    /// Marks every page that `[gpa, gpa + len)` touches; what lies outside of memory is ignored.
    pub fn set_range(&mut self, gpa: u64, len: u64) {
        let end = gpa.saturating_add(len);
        for (region, words) in self.layout.iter().zip(&mut self.words) {
            let first = gpa.max(region.gpa);
            let last = end.min(region.gpa + region.len);
            if first >= last {
                continue;
            }
            let page = (first - region.gpa) / PAGE_SIZE;
            let page_end = (last - region.gpa).div_ceil(PAGE_SIZE);
            for page in page..page_end {
                words[(page / 64) as usize] |= 1 << (page % 64);
            }
        }
    }

    /// Marks all memory.
    pub fn set_all(&mut self) {
        for (region, words) in self.layout.iter().zip(&mut self.words) {
            words.fill(!0);
            mask_tail(words, region.pages());
        }
    }

    /// Clears every bit.
    pub fn clear(&mut self) {
        self.words.iter_mut().for_each(|words| words.fill(0));
    }

    /// Ors `other`, a bitmap of the same layout, into this one.
    pub fn union(&mut self, other: &DirtyBitmap) {
        debug_assert_eq!(self.layout, other.layout);
        for (words, others) in self.words.iter_mut().zip(&other.words) {
            for (word, other) in words.iter_mut().zip(others) {
                *word |= other;
            }
        }
    }

    /// The memory it takes, in bytes.
    pub fn bytes(&self) -> u64 {
        self.words.iter().map(|words| size_of_val(words.as_slice()) as u64).sum()
    }

    /// Number of dirty pages.
    pub fn count(&self) -> u64 {
        let pages = self.layout.iter().zip(&self.words);
        pages.map(|(region, words)| count_bits(words, region.pages())).sum()
    }

    /// No page is dirty.
    pub fn is_empty(&self) -> bool {
        self.count() == 0
    }

    /// Takes the runs of dirty pages in ascending order as (region, first page, pages); runs do not
    /// cross regions and are at most `max_pages` long.
    pub fn runs(&self, max_pages: u64) -> impl Iterator<Item = (usize, u64, u64)> + '_ {
        self.layout.iter().enumerate().flat_map(move |(index, region)| {
            Runs { words: &self.words[index], pages: region.pages(), next: 0, max_pages }
                .map(move |(first, pages)| (index, first, pages))
        })
    }

    /// The runs of dirty pages of one region within `pages`, ascending, as (first page, pages); cut at the
    /// ends of `pages`.
    pub fn runs_in(
        &self,
        region: usize,
        pages: Range<u64>,
    ) -> impl Iterator<Item = (u64, u64)> + '_ {
        let end = pages.end.min(self.layout[region].pages());
        Runs { words: &self.words[region], pages: end, next: pages.start, max_pages: u64::MAX }
    }
}

struct Runs<'a> {
    words: &'a [u64],
    pages: u64,
    next: u64,
    max_pages: u64,
}

impl Iterator for Runs<'_> {
    type Item = (u64, u64);

    fn next(&mut self) -> Option<(u64, u64)> {
        let first = next_bit(self.words, self.pages, self.next, true)?;
        let end = next_bit(self.words, self.pages, first, false).unwrap_or(self.pages);
        let end = end.min(first.saturating_add(self.max_pages));
        self.next = end;
        Some((first, end - first))
    }
}

/// The first page from `from` on whose bit is `set`.
fn next_bit(words: &[u64], pages: u64, from: u64, set: bool) -> Option<u64> {
    let mut page = from;
    while page < pages {
        let word = words[(page / 64) as usize];
        let word = if set { word } else { !word };
        let rest = word >> (page % 64);
        if rest != 0 {
            let found = page + u64::from(rest.trailing_zeros());
            return (found < pages).then_some(found);
        }
        page = (page / 64 + 1) * 64;
    }
    None
}

fn count_bits(words: &[u64], pages: u64) -> u64 {
    let full = (pages / 64) as usize;
    let mut count: u64 = words[..full].iter().map(|w| u64::from(w.count_ones())).sum();
    if !pages.is_multiple_of(64) {
        count += u64::from((words[full] & ((1 << (pages % 64)) - 1)).count_ones());
    }
    count
}

fn mask_tail(words: &mut [u64], pages: u64) {
    if !pages.is_multiple_of(64)
        && let Some(last) = words.last_mut()
    {
        *last &= (1 << (pages % 64)) - 1;
    }
}
