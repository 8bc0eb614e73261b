//! Guest memory, its dirty bits and its digest.

mod common;

use std::collections::BTreeSet;

use common::{MIB, PAGE, allocated, bytes_of, memory, region};
use migration::hash::{hex, memory_digest};
use migration::{DirtyBitmap, GuestMemory, MemoryError, RegionLayout};
use proptest::prelude::*;

fn layouts() -> impl Strategy<Value = Vec<RegionLayout>> {
    prop::collection::vec((0..40u64, 1..200u64), 1..5).prop_map(|parts| {
        let mut next = 0;
        let place = |(gap, pages): (u64, u64)| {
            let placed = region(next + gap * PAGE, pages * PAGE);
            next = placed.gpa + placed.len;
            placed
        };
        parts.into_iter().map(place).collect()
    })
}

/// Ranges around the regions: (address, length) in bytes.
fn ranges() -> impl Strategy<Value = Vec<(u64, u64)>> {
    prop::collection::vec((0..900 * PAGE, 0..70 * PAGE), 0..12)
}

/// The set of pages, by address, that ranges touch.
fn model(layout: &[RegionLayout], ranges: &[(u64, u64)]) -> BTreeSet<u64> {
    let pages = layout.iter().flat_map(|r| (r.gpa..r.gpa + r.len).step_by(PAGE as usize));
    let touched =
        |page: &u64| ranges.iter().any(|(gpa, len)| *gpa < page + PAGE && page < &(gpa + len));
    pages.filter(touched).collect()
}

fn pages_of(bitmap: &DirtyBitmap, max_pages: u64) -> BTreeSet<u64> {
    let layout = bitmap.layout();
    let run = |(region, first, count): (usize, u64, u64)| {
        assert!((1..=max_pages).contains(&count));
        assert!(first + count <= layout[region].pages(), "runs stay in their region");
        (first..first + count).map(move |page| layout[region].gpa + page * PAGE)
    };
    let listed: Vec<u64> = bitmap.runs(max_pages).flat_map(run).collect();
    assert!(listed.is_sorted_by(|a, b| a < b), "ascending, each once");
    listed.into_iter().collect()
}

proptest! {
    #[test]
    fn a_bitmap_is_the_set_of_pages_that_ranges_touch(
        layout in layouts(), first in ranges(), second in ranges(), max_pages in 1..70u64,
    ) {
        let mut bitmap = DirtyBitmap::new(&layout);
        first.iter().for_each(|(gpa, len)| bitmap.set_range(*gpa, *len));
        let first = model(&layout, &first);
        prop_assert_eq!(&pages_of(&bitmap, max_pages), &first);
        prop_assert_eq!(bitmap.count(), first.len() as u64);
        prop_assert_eq!(bitmap.is_empty(), first.is_empty());
        let mut other = DirtyBitmap::new(&layout);
        second.iter().for_each(|(gpa, len)| other.set_range(*gpa, *len));
        bitmap.union(&other);
        let both: BTreeSet<u64> = first.union(&model(&layout, &second)).copied().collect();
        prop_assert_eq!(pages_of(&bitmap, u64::MAX), both);
        bitmap.clear();
        prop_assert!(bitmap.is_empty() && bitmap.runs(1).next().is_none());
    }

    #[test]
    fn runs_in_a_part_of_a_region_are_cut_at_its_ends(
        layout in layouts(), ranges in ranges(), from in 0..220u64, len in 0..220u64,
    ) {
        let mut bitmap = DirtyBitmap::new(&layout);
        ranges.iter().for_each(|(gpa, len)| bitmap.set_range(*gpa, *len));
        for (index, region) in layout.iter().enumerate() {
            let wanted: Vec<u64> = model(&layout, &ranges)
                .into_iter()
                .filter(|page| (region.gpa..region.gpa + region.len).contains(page))
                .map(|page| (page - region.gpa) / PAGE)
                .filter(|page| (from..from + len).contains(page))
                .collect();
            let listed: Vec<u64> = bitmap
                .runs_in(index, from..from + len)
                .flat_map(|(first, count)| first..first + count)
                .collect();
            prop_assert_eq!(listed, wanted);
        }
    }

    /// Bits behind the last page, which a kernel's bitmap may have, are no pages.
    #[test]
    fn set_all_and_stray_bits(layout in layouts()) {
        let mut all = DirtyBitmap::new(&layout);
        all.set_all();
        let pages: u64 = layout.iter().map(RegionLayout::pages).sum();
        prop_assert_eq!(all.count(), pages);
        let mut stray = DirtyBitmap::new(&layout);
        (0..layout.len()).for_each(|i| stray.region_mut(i).fill(!0));
        prop_assert_eq!(stray.count(), pages);
        prop_assert_eq!(pages_of(&stray, u64::MAX), pages_of(&all, u64::MAX));
    }

    /// What is written is read back, lands nowhere else, and its pages are marked.
    #[test]
    fn writes_are_read_back_and_marked(
        layout in layouts(),
        writes in prop::collection::vec((0..900 * PAGE, 1..3 * PAGE as usize, 1..=255u8), 0..12),
    ) {
        let guest = GuestMemory::new(&layout).unwrap();
        guest.set_tracking(true);
        let mut expected = vec![0; guest.size_bytes() as usize];
        let mut written = vec![];
        for (gpa, len, byte) in writes {
            let found = layout.iter().scan(0, |before, r| {
                let start = *before;
                *before += r.len as usize;
                Some((start, r))
            });
            let holds = |r: &RegionLayout| gpa >= r.gpa && gpa + len as u64 <= r.gpa + r.len;
            let place = found.into_iter().find(|(_, r)| holds(r));
            let result = guest.write(gpa, &vec![byte; len]);
            let Some((start, r)) = place else {
                let refused = matches!(result, Err(MemoryError::OutOfRange { .. }));
                prop_assert!(refused, "a range that is not in one region is refused whole");
                continue;
            };
            result.unwrap();
            let at = start + (gpa - r.gpa) as usize;
            expected[at..at + len].fill(byte);
            written.push((gpa, len as u64));
        }
        prop_assert!(bytes_of(&guest) == expected);
        let mut dirty = DirtyBitmap::new(&layout);
        guest.take_dirty(&mut dirty);
        prop_assert_eq!(pages_of(&dirty, u64::MAX), model(&layout, &written));
        let mut again = DirtyBitmap::new(&layout);
        guest.take_dirty(&mut again);
        prop_assert!(again.is_empty(), "taken once");
    }

    #[test]
    fn the_digest_is_that_of_the_bytes(
        layout in layouts(),
        writes in prop::collection::vec((0..900 * PAGE, 0..=255u8), 0..12),
    ) {
        let guest = GuestMemory::new(&layout).unwrap();
        for (gpa, byte) in writes {
            let _ = guest.write(gpa, &[byte]);
        }
        prop_assert_eq!(memory_digest(&guest), naive_digest(&layout, &bytes_of(&guest)));
    }
}

/// As the documentation of `hash` defines it, from plain bytes.
fn naive_digest(layout: &[RegionLayout], bytes: &[u8]) -> [u8; 32] {
    let mut text = b"vmferry-memory-1".to_vec();
    text.extend((layout.len() as u64).to_le_bytes());
    for region in layout {
        text.extend(region.gpa.to_le_bytes());
        text.extend(region.len.to_le_bytes());
    }
    let mut rest = bytes;
    for region in layout {
        let (own, others) = rest.split_at(region.len as usize);
        rest = others;
        for chunk in own.chunks(2 << 20) {
            text.extend(blake3::hash(chunk).as_bytes());
        }
    }
    *blake3::hash(&text).as_bytes()
}

#[test]
fn the_digest_sees_every_byte_and_the_layout_and_fills_no_hole() {
    let layout = [region(0, 3 * MIB + PAGE), region(16 * MIB, 5 * MIB)];
    let guest = memory(&layout);
    let empty = memory_digest(&guest);
    assert_eq!(allocated(&guest), 0, "holes stay holes");
    assert_eq!(empty, naive_digest(&layout, &bytes_of(&memory(&layout))));
    for gpa in [0, 2 * MIB - 1, 2 * MIB, 3 * MIB + PAGE - 1, 16 * MIB, 21 * MIB - 1] {
        guest.write(gpa, &[1]).unwrap();
        assert_ne!(memory_digest(&guest), empty, "{gpa:#x}");
        assert_eq!(memory_digest(&guest), naive_digest(&layout, &bytes_of(&guest)));
        guest.write(gpa, &[0]).unwrap();
        assert_eq!(memory_digest(&guest), empty, "written zeroes are as good as a hole");
    }
    let moved = memory(&[region(0, 3 * MIB + PAGE), region(17 * MIB, 5 * MIB)]);
    assert_ne!(memory_digest(&moved), empty);
    assert_eq!(hex(&[0x00, 0x9f, 0xff]), "009fff");
}

#[test]
fn layouts_that_are_no_memory_are_refused() {
    let refused: &[&[RegionLayout]] = &[
        &[],
        &[region(0, 0)],
        &[region(1, PAGE)],
        &[region(0, PAGE + 1)],
        &[region(0, 2 * PAGE), region(PAGE, PAGE)],
        &[region(8 * PAGE, PAGE), region(0, PAGE)],
        &[region(u64::MAX - PAGE + 1, PAGE)],
    ];
    for layout in refused {
        let error = GuestMemory::new(layout).unwrap_err();
        assert!(matches!(error, MemoryError::Layout(_)), "{layout:x?}: {error}");
    }
    // Regions may touch; an access still belongs to one of them.
    let guest = GuestMemory::new(&[region(0, PAGE), region(PAGE, PAGE)]).unwrap();
    guest.write(PAGE - 1, &[1]).unwrap();
    assert!(guest.write(PAGE - 1, &[1, 2]).is_err());
}

#[test]
fn without_tracking_nothing_is_marked() {
    let layout = [region(0, 70 * PAGE)];
    let guest = memory(&layout);
    let taken = || {
        let mut dirty = DirtyBitmap::new(&layout);
        guest.take_dirty(&mut dirty);
        dirty.count()
    };
    guest.write(0, &[1]).unwrap();
    assert_eq!(taken(), 0);
    guest.set_tracking(true);
    guest.write(69 * PAGE, &[1]).unwrap();
    guest.mark_dirty(0, u64::MAX);
    assert_eq!(taken(), 70);
    guest.write(0, &[1]).unwrap();
    guest.set_tracking(true);
    assert_eq!(taken(), 0, "starting again forgets");
    guest.write(0, &[1]).unwrap();
    guest.set_tracking(false);
    assert_eq!(taken(), 0, "stopping forgets");
}

#[test]
fn no_range_wraps_around() {
    let guest = memory(&[region(0, PAGE)]);
    assert!(guest.untracked_addr(u64::MAX, 2).is_err());
    assert!(guest.untracked_addr(PAGE, u64::MAX).is_err());
    assert!(guest.locate(0, PAGE + 1).is_err());
    assert_eq!(guest.locate(7, 9).unwrap(), (0, 7));
    let mut bitmap = DirtyBitmap::new(&guest.layout());
    bitmap.set_range(u64::MAX, u64::MAX);
    assert!(bitmap.is_empty());
    bitmap.set_range(5, u64::MAX);
    assert_eq!(bitmap.count(), 1);
    bitmap.clear();
    bitmap.set_range(5, 0);
    assert!(bitmap.is_empty(), "no bytes, no page");
}
