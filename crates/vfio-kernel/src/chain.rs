//! Capability chains: what follows the fixed part of region and IOMMU information.
//!
//! Each capability has a header with the offset of the next one, counted from the start of the whole
//! struct. The bytes come from a driver: offsets may point anywhere, in circles, or behind the end.

use vfio_migration::MmapArea;
use zerocopy::FromBytes;

use crate::raw::uapi::{
    CapHeader, SparseMmapArea, SparseMmapHeader, Type1CapMigration,
    VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION, VFIO_REGION_INFO_CAP_SPARSE_MMAP,
};

/// No chain in use has more links; a circle ends here.
const LINKS_MAX: usize = 32;

/// No region needs more areas.
pub(crate) const AREAS_MAX: usize = 256;

/// The capabilities in `bytes` from `first` on: header and all bytes from it on.
fn walk(bytes: &[u8], first: u32) -> impl Iterator<Item = (CapHeader, &[u8])> {
    let mut at = first as usize;
    std::iter::from_fn(move || {
        // 0 ends the chain, and nothing can start inside of the header of the struct.
        if at < size_of::<CapHeader>() || !at.is_multiple_of(4) {
            return None;
        }
        let rest = bytes.get(at..)?;
        let (header, _) = CapHeader::read_from_prefix(rest).ok()?;
        at = header.next as usize;
        Some((header, rest))
    })
    .take(LINKS_MAX)
}

/// The areas of a region that may be mapped, as its sparse-mmap capability says: those that lie inside of
/// `region_bytes`. `None` without that capability: the whole region.
pub(crate) fn sparse_mmap(bytes: &[u8], first: u32, region_bytes: u64) -> Option<Vec<MmapArea>> {
    let is_sparse = |header: &CapHeader| header.id == VFIO_REGION_INFO_CAP_SPARSE_MMAP;
    let (_, rest) = walk(bytes, first).find(|(header, _)| is_sparse(header))?;
    let (head, mut rest) = SparseMmapHeader::read_from_prefix(rest).ok()?;
    let mut areas = Vec::new();
    for _ in 0..(head.nr_areas as usize).min(AREAS_MAX) {
        let Ok((area, tail)) = SparseMmapArea::read_from_prefix(rest) else { break };
        rest = tail;
        let end = area.offset.checked_add(area.size);
        if area.size > 0 && end.is_some_and(|end| end <= region_bytes) {
            areas.push(MmapArea { offset: area.offset, size: area.size });
        }
    }
    Some(areas)
}

/// What type1 says of its dirty page tracking: usable page sizes as a bitmap, and the largest bitmap in
/// bytes. `None`: it has none.
pub(crate) fn type1_migration(bytes: &[u8], first: u32) -> Option<(u64, u64)> {
    let is_migration = |header: &CapHeader| header.id == VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION;
    let (_, rest) = walk(bytes, first).find(|(header, _)| is_migration(header))?;
    let (capability, _) = Type1CapMigration::read_from_prefix(rest).ok()?;
    Some((capability.pgsize_bitmap, capability.max_dirty_bitmap_size))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use zerocopy::IntoBytes;

    use super::*;

    fn put(bytes: &mut [u8], at: usize, value: &impl ValueBytes) {
        let value = value.bytes();
        bytes[at..at + value.len()].copy_from_slice(&value);
    }

    trait ValueBytes {
        fn bytes(&self) -> Vec<u8>;
    }

    impl<T: IntoBytes + zerocopy::Immutable> ValueBytes for T {
        fn bytes(&self) -> Vec<u8> {
            self.as_bytes().to_vec()
        }
    }

    fn cap(id: u16, next: u32) -> CapHeader {
        CapHeader { id, version: 1, next }
    }

    #[test]
    fn areas_are_found_behind_other_capabilities_and_those_outside_are_left_out() {
        let mut bytes = vec![0; 160];
        put(&mut bytes, 32, &cap(3, 40));
        put(&mut bytes, 40, &SparseMmapHeader { header: cap(1, 0), nr_areas: 4, reserved: 0 });
        let areas = [(0x0, 0x1000), (0x2000, 0x2000), (0x3000, 0x2000), (u64::MAX, 2)];
        for (index, (offset, size)) in areas.into_iter().enumerate() {
            put(&mut bytes, 56 + 16 * index, &SparseMmapArea { offset, size });
        }
        let found = sparse_mmap(&bytes, 32, 0x4000).unwrap();
        let expected = [(0x0, 0x1000), (0x2000, 0x2000)];
        assert_eq!(found, expected.map(|(offset, size)| MmapArea { offset, size }));
        assert_eq!(sparse_mmap(&bytes, 0, 0x4000), None, "no capabilities");
        assert_eq!(sparse_mmap(&bytes[..48], 32, 0x4000), None, "cut off");
        assert_eq!(sparse_mmap(&bytes[..72], 32, 0x4000).unwrap().len(), 1, "cut off");
    }

    #[test]
    fn a_circle_ends() {
        let mut bytes = vec![0; 64];
        put(&mut bytes, 32, &cap(7, 40));
        put(&mut bytes, 40, &cap(8, 32));
        assert_eq!(walk(&bytes, 32).count(), LINKS_MAX);
        assert_eq!(sparse_mmap(&bytes, 32, 0x1000), None);
    }

    #[test]
    fn type1_tells_of_its_dirty_tracking() {
        let mut bytes = vec![0; 64];
        put(
            &mut bytes,
            24,
            &Type1CapMigration {
                header: cap(2, 0),
                pgsize_bitmap: 0x1000,
                max_dirty_bitmap_size: 256 << 20,
                ..Default::default()
            },
        );
        assert_eq!(type1_migration(&bytes, 24), Some((0x1000, 256 << 20)));
        assert_eq!(type1_migration(&bytes, 0), None);
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic_loop_or_grow(
            bytes in proptest::collection::vec(any::<u8>(), 0..400),
            first in prop_oneof![any::<u32>(), 0u32..400],
            size in any::<u64>(),
        ) {
            if let Some(areas) = sparse_mmap(&bytes, first, size) {
                prop_assert!(areas.len() <= AREAS_MAX);
                for area in areas {
                    prop_assert!(area.size > 0 && area.offset + area.size <= size);
                }
            }
            type1_migration(&bytes, first);
        }

        #[test]
        fn links_anywhere_are_harmless(links in proptest::collection::vec((0u16..4, 0u32..200), 1..24)) {
            let mut bytes = Vec::new();
            for (id, next) in links {
                bytes.extend_from_slice(&cap(id, next).bytes());
            }
            sparse_mmap(&bytes, 8, u64::MAX);
            type1_migration(&bytes, 8);
        }
    }
}
