//! DMA logging (rules L1 to L11).

mod common;

use std::collections::BTreeSet;

use common::*;
use device_model::dma_log::{DmaLog, RANGES_MAX, TRACKED_PAGE_MAX_BYTES};
use device_model::regs;
use proptest::prelude::*;
use vfio_migration::DeviceState::*;
use vfio_migration::DmaRange;

const MIB: u64 = 1 << 20;

fn range(iova: u64, length: u64) -> DmaRange {
    DmaRange { iova, length }
}

fn started(page_size: u64) -> DmaLog {
    let mut log = DmaLog::default();
    log.start(&[range(0, 64 * MIB)], page_size).unwrap();
    log
}

fn report(log: &mut DmaLog, asked: DmaRange, page_size: u64) -> BTreeSet<u64> {
    let mut bitmap = vec![0; asked.length.div_ceil(page_size).div_ceil(64) as usize];
    log.report(asked, page_size, &mut bitmap).unwrap();
    let bits = bitmap.iter().enumerate().flat_map(|(w, word)| {
        (0..64).filter(move |bit| word >> bit & 1 != 0).map(move |bit| w as u64 * 64 + bit)
    });
    bits.collect()
}

#[test]
fn l1_l2_ranges_are_checked() {
    let many: Vec<DmaRange> = (0..257).map(|i| range(i * MIB, 4096)).collect();
    let cases: [(&[DmaRange], u64, i32); 10] = [
        (&[], 4096, libc::EINVAL),
        (&many, 4096, libc::E2BIG),
        (&[range(1, 4096)], 4096, libc::EINVAL),
        (&[range(0, 4095)], 4096, libc::EINVAL),
        (&[range(4096, 8192)], 8192, libc::EINVAL),
        (&[range(0, 0)], 4096, libc::EINVAL),
        (&[range(u64::MAX - 4095, 8192)], 4096, libc::EOVERFLOW),
        (&[range(0, 8192), range(4096, 4096)], 4096, libc::EINVAL),
        (&[range(0, 4096)], 0, libc::EINVAL),
        (&[range(0, 4096)], 5000, libc::EINVAL),
    ];
    for (ranges, page_size, expected) in cases {
        let mut log = DmaLog::default();
        assert_eq!(errno(log.start(ranges, page_size)), expected, "{ranges:x?} {page_size}");
        assert!(!log.is_active());
    }
    DmaLog::default().start(&many[..RANGES_MAX], 4096).unwrap();
}

#[test]
fn l3_the_page_size_is_a_hint_and_the_used_one_is_returned() {
    for (hint, used) in
        [(512, 4096), (4096, 4096), (65_536, 65_536), (64 * MIB, TRACKED_PAGE_MAX_BYTES)]
    {
        assert_eq!(DmaLog::default().start(&[range(0, 64 * MIB)], hint).unwrap(), used);
    }
}

#[test]
fn l4_one_start_one_stop() {
    let mut log = started(4096);
    assert_eq!(errno(log.start(&[range(0, 4096)], 4096)), libc::EINVAL);
    log.stop().unwrap();
    assert_eq!(errno(log.stop()), libc::EINVAL);
    log.start(&[range(0, 4096)], 4096).unwrap();
}

#[test]
fn l5_logging_is_independent_of_the_migration_state_and_of_reset() {
    let mut ram = Ram::new(16);
    let mut core = worked(core(), &mut ram);
    core.start_dma_logging(&[range(0, 16 * 4096)], 4096).unwrap();
    for state in [PreCopy, PreCopyP2p, StopCopy, Stop] {
        core.set_state(state, 0).unwrap();
        let mut bitmap = [0];
        core.report_dma_log(range(0, 16 * 4096), 4096, &mut bitmap).unwrap();
        assert_eq!(bitmap, [0], "{state}");
        if state == PreCopy {
            poke_ram(&mut core, regs::DOORBELL, 1, &mut ram);
        }
        let expected = if state == PreCopy { 1 << 4 } else { 0 };
        core.report_dma_log(range(0, 16 * 4096), 4096, &mut bitmap).unwrap();
        assert_eq!(bitmap, [expected], "{state}");
    }
    core.reset().unwrap();
    core.report_dma_log(range(0, 4096), 4096, &mut [0]).unwrap();
    core.stop_dma_logging().unwrap();
}

#[test]
fn l6_report_arguments_are_checked() {
    let mut log = started(4096);
    log.note_write(0, 1);
    let cases = [
        (range(0, MIB), 2048, 4, libc::EINVAL),
        (range(0, MIB), 0, 4, libc::EINVAL),
        (range(0, MIB), 12_288, 4, libc::EINVAL),
        (range(u64::MAX, 2), 4096, 4, libc::EOVERFLOW),
        (range(0, MIB), 4096, 3, libc::EINVAL),
    ];
    for (asked, page_size, words, expected) in cases {
        let mut bitmap = vec![0; words];
        assert_eq!(errno(log.report(asked, page_size, &mut bitmap)), expected);
    }
    assert_eq!(report(&mut log, range(0, MIB), 4096), [0].into(), "nothing was forgotten");
}

#[test]
fn l7_report_sets_bits_from_iova_on_leaves_others_and_clears_the_log() {
    let mut log = started(4096);
    log.note_write(0x5000, 16);
    log.note_write(0x6ff8, 16);
    log.note_write(0x20_0000, 16);
    let mut bitmap = [1 << 63, 0];
    log.report(range(0x4000, 128 * 4096), 4096, &mut bitmap).unwrap();
    assert_eq!(bitmap, [1 << 63 | 0b1110, 0]);
    assert_eq!(report(&mut log, range(0x4000, 128 * 4096), 4096), [].into(), "cleared");
    assert_eq!(report(&mut log, range(0x20_0000, 4096), 4096), [0].into(), "outside it stayed");
}

#[test]
fn l7_bits_are_replicated_or_merged_when_granularities_differ() {
    let mut coarse = started(65_536);
    coarse.note_write(0x2_3000, 16);
    assert_eq!(report(&mut coarse, range(0, MIB), 4096), (32..48).collect());
    let mut fine = started(4096);
    fine.note_write(0x2_3000, 16);
    fine.note_write(0x2_4000, 16);
    assert_eq!(report(&mut fine, range(0, MIB), 65_536), [2].into());
}

#[test]
fn l7_a_page_that_is_only_partly_asked_for_is_not_lost() {
    let mut log = started(65_536);
    log.note_write(0, 16);
    assert_eq!(report(&mut log, range(0, 4096), 4096), [0].into());
    assert_eq!(report(&mut log, range(0x8000, 4096), 4096), [0].into());
    assert_eq!(report(&mut log, range(0, 65_536), 65_536), [0].into());
    assert_eq!(report(&mut log, range(0, 65_536), 65_536), [].into());
}

#[test]
fn l8_report_without_start_is_an_error() {
    assert_eq!(errno(DmaLog::default().report(range(0, 4096), 4096, &mut [0])), libc::EINVAL);
}

#[test]
fn l10_the_report_after_stop_has_every_write_up_to_then() {
    let mut ram = Ram::new(16);
    let mut core = core();
    bus_master(&mut core);
    core.start_dma_logging(&[range(0, 16 * 4096)], 4096).unwrap();
    for (register, value) in
        [(regs::DMA_PAGES, 16), (regs::DMA_RATE, 1000), (regs::CONTROL, regs::CONTROL_DMA)]
    {
        poke(&mut core, register, value);
    }
    core.advance(0, 100, &mut ram);
    core.advance(5_000_000, 100, &mut ram);
    set(&mut core, PreCopy);
    core.advance(5_000_000, 100, &mut ram);
    core.advance(8_000_000, 100, &mut ram);
    set(&mut core, StopCopy);
    core.advance(1_000_000_000, 100, &mut ram);
    let mut bitmap = [0];
    core.report_dma_log(range(0, 16 * 4096), 4096, &mut bitmap).unwrap();
    let written = ram.written.keys().fold(0, |bits, iova| bits | 1u64 << (iova / 4096));
    assert_eq!((ram.writes, bitmap), (8, [written]));
}

#[test]
fn l11_what_no_range_covers_is_not_logged() {
    let mut log = DmaLog::default();
    log.start(&[range(0x8000, 0x1000), range(0x1000, 0x1000)], 4096).unwrap();
    for page in 0..16 {
        log.note_write(page * 4096, 16);
    }
    log.note_write(0xfff, 0x8000);
    assert_eq!(report(&mut log, range(0, 0x10000), 4096), [1, 8].into());
    log.note_write(u64::MAX - 3, 16);
    log.note_write(0x1000, 0);
    assert_eq!(report(&mut log, range(0, 0x10000), 4096), [].into());
}

#[test]
fn a_failed_stamp_is_not_logged_and_a_blind_log_says_nothing() {
    for (quirks, expected) in [(&[][..], 0b1), (&["dma-log-blind"][..], 0)] {
        let mut ram = Ram::new(1);
        let mut core = core_with(quirks);
        bus_master(&mut core);
        core.start_dma_logging(&[range(0, 16 * 4096)], 4096).unwrap();
        poke(&mut core, regs::DMA_PAGES, 16);
        poke_ram(&mut core, regs::DOORBELL, 5, &mut ram);
        let mut bitmap = [0];
        core.report_dma_log(range(0, 16 * 4096), 4096, &mut bitmap).unwrap();
        assert_eq!((ram.writes, bitmap), (1, [expected]), "{quirks:?}");
    }
}

proptest! {
    /// Against a plain set of bytes: no write is ever missed, and with equal granularity none invented.
    #[test]
    fn every_logged_write_is_reported_once(
        writes in prop::collection::vec((0u64..2 * MIB, 1u64..20_000), 0..40),
        asked in (0u64..256, 1u64..256),
        shift in 0u32..5,
    ) {
        let mut log = started(4096);
        for (iova, len) in &writes {
            log.note_write(*iova, *len);
        }
        let page_size = 4096u64 << shift;
        let asked = range(asked.0 * 4096, asked.1 * 4096);
        let pages: BTreeSet<u64> = writes
            .iter()
            .flat_map(|(iova, len)| iova / 4096..=(iova + len - 1) / 4096)
            .collect();
        let inside = |page: &&u64| {
            (asked.iova..asked.iova + asked.length).contains(&(*page * 4096))
        };
        let expected: BTreeSet<u64> = pages
            .iter()
            .filter(inside)
            .map(|page| (page * 4096 - asked.iova) / page_size)
            .collect();
        prop_assert_eq!(report(&mut log, asked, page_size), expected);
        prop_assert_eq!(report(&mut log, asked, page_size), BTreeSet::new());
        let rest: BTreeSet<u64> = pages.iter().filter(|page| !inside(page)).copied().collect();
        prop_assert_eq!(report(&mut log, range(0, 64 * MIB), 4096), rest);
    }
}
