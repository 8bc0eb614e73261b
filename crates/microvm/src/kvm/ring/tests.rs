mod fake;

use super::super::tests::{Rig, counter, rig_with, until};
use super::*;
use crate::body::Body;
use crate::config::DirtyTracking;
use crate::contents;
use migration::GuestMemory;

/// The smallest ring, which only full vCPUs harvest.
const SMALLEST: DirtyRing = DirtyRing { entries: DirtyRing::ENTRIES_MIN, harvester: false };
/// Pages the guest below writes, round after round: more than the smallest ring has entries.
const PAGES: u64 = 3584;

/// mov $0x200000, %edi; 1: incl (%edi); `between` × nop; add $0x1000, %edi; cmp $0x1000000, %edi; jb 1b; incl 0x5000;
/// jmp back
fn write_all(between: u8) -> Vec<u8> {
    let mut code = b"\xbf\x00\x00\x20\x00\xff\x07".to_vec();
    code.resize(code.len() + usize::from(between), 0x90);
    code.extend(b"\x81\xc7\x00\x10\x00\x00\x81\xff\x00\x00\x00\x01");
    code.extend([0x72, 0_u8.wrapping_sub(16 + between)]);
    code.extend(b"\xff\x05\x00\x50\x00\x00");
    code.extend([0xeb, 0_u8.wrapping_sub(29 + between)]);
    code
}

/// A guest that writes [`PAGES`] pages, and what tracks it. A hypervisor that emulates 1024 instructions at once
/// finds fewer pages written than a ring has entries in reserve.
fn writer(ring: DirtyRing) -> Option<(Rig, KvmDirtyRing)> {
    writer_with(ring, 40)
}

fn writer_with(ring: DirtyRing, between: u8) -> Option<(Rig, KvmDirtyRing)> {
    if let Err(why) = available() {
        println!("skipped: {why}");
        return None;
    }
    let rig = rig_with(&write_all(between), 1, DirtyTracking::Ring(ring))?;
    let rings = Arc::clone(rig.body.machine.rings().unwrap());
    let tracker = KvmDirtyRing::new(Arc::clone(&rig.body.machine.slots), rings);
    Some((rig, tracker))
}

fn rounds(memory: &GuestMemory, more: u32) {
    let before = counter(memory);
    until("it writes", || counter(memory).wrapping_sub(before) >= more);
}

fn copy_page(from: &GuestMemory, to: &GuestMemory, gpa: u64) {
    let mut page = vec![0; PAGE_SIZE as usize];
    from.read(gpa, &mut page).unwrap();
    to.write(gpa, &page).unwrap();
}

/// Copies the guest's memory while it runs, as a migration does, and says whether the copy is what it had in the end.
fn copied_alike(rig: &Rig, tracker: &mut KvmDirtyRing) -> bool {
    let (alike, incomplete) = copied(rig, tracker);
    assert_eq!(incomplete, 0);
    alike
}

/// The same, and how many answers were incomplete.
fn copied(rig: &Rig, tracker: &mut KvmDirtyRing) -> (bool, u32) {
    let mut incomplete = 0;
    let from = &rig.memory;
    let layout = from.layout();
    let copy = GuestMemory::new(&layout).unwrap();
    let clearer = tracker.defer().unwrap();
    rig.body.resume().unwrap();
    rounds(from, 1);
    tracker.start().unwrap();
    let mut dirty = DirtyBitmap::new(&layout);
    dirty.set_all();
    for pass in 0..6 {
        if pass == 5 {
            rig.body.pause().unwrap();
        }
        if pass > 0 && tracker.collect(&mut dirty).unwrap() == Completeness::Incomplete {
            incomplete += 1;
            dirty.set_all();
        }
        for (region, at) in layout.iter().enumerate() {
            for first in (0..at.pages()).step_by(64) {
                let word = dirty.region(region)[(first / 64) as usize];
                clearer.clear(region, first, &[word]).unwrap();
                let pages =
                    (first..at.pages().min(first + 64)).filter(|p| word >> (p % 64) & 1 != 0);
                pages.for_each(|page| copy_page(from, &copy, at.gpa + page * PAGE_SIZE));
            }
        }
        dirty.clear();
        if pass < 4 {
            rounds(from, 1);
        }
    }
    tracker.stop().unwrap();
    (contents::digest(from).unwrap() == contents::digest(&copy).unwrap(), incomplete)
}

#[test]
fn a_full_ring_stops_its_vcpu_until_it_was_harvested_and_nothing_is_lost() {
    let Some((rig, mut tracker)) = writer(SMALLEST) else { return };
    assert!(copied_alike(&rig, &mut tracker));
    let counters = tracker.rings.counters();
    assert!(counters.full_exits >= PAGES / u64::from(SMALLEST.entries), "{counters:?}");
    assert!(counters.harvested >= PAGES, "{counters:?}");
}

#[test]
fn the_harvester_keeps_a_ring_from_being_full() {
    let Some((rig, mut tracker)) = writer(DirtyRing::default()) else { return };
    assert!(copied_alike(&rig, &mut tracker));
    assert_eq!(tracker.rings.counters().full_exits, 0);
    // Rings fill up to a quarter and nobody asks: the harvester alone empties them.
    let few = DirtyRing { entries: 4096, harvester: true };
    let Some((rig, mut tracker)) = writer(few) else { return };
    rig.body.resume().unwrap();
    tracker.start().unwrap();
    let harvested = || tracker.rings.counters().harvested;
    until("it is harvested", || harvested() > 2 * PAGES);
    tracker.stop().unwrap();
}

#[test]
fn a_ring_that_was_overrun_is_found_again_and_all_of_memory_counts_as_written() {
    let Some((rig, mut tracker)) = writer_with(SMALLEST, 0) else { return };
    let (alike, incomplete) = copied(&rig, &mut tracker);
    println!("{incomplete} answers were incomplete");
    assert!(alike);
    rig.body.resume().unwrap();
    rounds(&rig.memory, 1);
}

/// Negative control.
#[test]
fn a_harvest_that_drops_entries_is_seen_in_the_copy() {
    for ring in [SMALLEST, DirtyRing::default()] {
        let Some((rig, mut tracker)) = writer(ring) else { return };
        tracker.rings.drop_every.store(7, Ordering::Relaxed);
        assert!(!copied_alike(&rig, &mut tracker));
    }
}

#[test]
fn a_vcpu_with_a_full_ring_is_paused_and_goes_on_also_when_nobody_tracks_it_any_more() {
    let Some((rig, mut tracker)) = writer(SMALLEST) else { return };
    rig.body.resume().unwrap();
    for _ in 0..20 {
        tracker.start().unwrap();
        for _ in 0..10 {
            rig.body.pause().unwrap();
            rig.body.resume().unwrap();
        }
        rounds(&rig.memory, 1);
        tracker.stop().unwrap();
        rounds(&rig.memory, 1);
    }
    let counters = tracker.rings.counters();
    assert!(counters.full_exits > 0);
    // The log is off: no page is named any more, and no ring fills up.
    rounds(&rig.memory, 3);
    assert_eq!(tracker.rings.counters(), counters);
}

#[test]
fn signals_do_not_keep_pages_from_being_protected_again() {
    let Some((rig, mut tracker)) = writer(SMALLEST) else { return };
    // A throttled guest is signalled all the time, and its thread harvests.
    rig.body.set_throttle(5).unwrap();
    assert!(copied_alike(&rig, &mut tracker));
}

#[test]
fn what_is_not_known_any_more_is_said_once() {
    let Some((_rig, mut tracker)) = writer(SMALLEST) else { return };
    let mut dirty = DirtyBitmap::new(&tracker.rings.layout);
    tracker.start().unwrap();
    assert_eq!(tracker.collect(&mut dirty).unwrap(), Completeness::Complete);
    tracker.rings.lock().lost = true;
    assert_eq!(tracker.collect(&mut dirty).unwrap(), Completeness::Incomplete);
    assert_eq!(tracker.collect(&mut dirty).unwrap(), Completeness::Complete);
    let pages = tracker.rings.layout[0].pages();
    let named = |slot, offset| tracker.rings.page(Entry { slot, offset });
    assert_eq!(named(0, pages - 1), Some((0, pages - 1)));
    assert_eq!(named(0, pages), None);
    assert_eq!(named(1, 0), None);
    assert_eq!(named(1 << 16, 0), None, "another address space");
}

#[test]
fn a_ring_of_an_impossible_size_is_refused() {
    if let Err(why) = available() {
        println!("skipped: {why}");
        return;
    }
    for entries in [0, 1, 512, 1023, 1025, 1 << 17, u32::MAX] {
        let kvm = machine::open().unwrap();
        let vm = Arc::new(kvm.create_vm().unwrap());
        let ring = DirtyRing { entries, harvester: false };
        let Err(error) = DirtyRings::enable(&kvm, &vm, &[], ring) else { panic!("{entries}") };
        assert!(error.to_string().contains("power of two"), "{error}");
    }
}
