//! What the guest sees (`docs/workload.md`): registers, stamps, interrupts, regions.

mod common;

use common::*;
use device_model::core::{DeferredWrite, DmaFault, GuestDma};
use device_model::{DeviceCore, regs};
use vfio_migration::IrqIndex::{Intx, Msix};
use vfio_migration::pci::{REGION_BAR0, REGION_CONFIG};

const CONTRACT: &str = include_str!("../../../docs/workload.md");

#[test]
fn the_constants_are_those_of_the_contract() {
    let registers = [
        ("ID", regs::ID),
        ("VERSION", regs::VERSION),
        ("CONTROL", regs::CONTROL),
        ("STATUS", regs::STATUS),
        ("CONFIG_KIB", regs::CONFIG_KIB),
        ("CONFIG_GEN", regs::CONFIG_GEN),
        ("CONFIG_ACK", regs::CONFIG_ACK),
        ("DMA_LO", regs::DMA_LO),
        ("DMA_HI", regs::DMA_HI),
        ("DMA_PAGES", regs::DMA_PAGES),
        ("DMA_RATE", regs::DMA_RATE),
        ("DOORBELL", regs::DOORBELL),
        ("COMPLETED", regs::COMPLETED),
        ("COMPLETED_HI", regs::COMPLETED_HI),
        ("VECTOR", regs::VECTOR),
        ("RAISED", regs::RAISED),
        ("FILL_KIB", regs::FILL_KIB),
        ("SCRATCH", regs::SCRATCH),
    ];
    for (name, offset) in registers {
        let row = format!("| 0x{offset:02x} | {name} | ");
        assert!(CONTRACT.contains(&row), "no row {row:?}");
    }
    assert!(CONTRACT.contains(&format!("{:#010x}", regs::ID_VALUE)));
    assert!(CONTRACT.contains(&format!(
        "vendor {:#06x}, device {:#06x}",
        regs::VENDOR_ID,
        regs::DEVICE_ID
    )));
}

#[test]
fn registers_after_power_on() {
    let core = core();
    let initial_kib = profile().sizes.initial_bytes.typical.div_ceil(1024) as u32;
    for offset in (0..regs::BAR0_BYTES).step_by(4) {
        let expected = match offset {
            regs::ID => regs::ID_VALUE,
            regs::VERSION => 1,
            regs::CONFIG_KIB => initial_kib,
            _ => 0,
        };
        assert_eq!(peek(&core, offset), expected, "{offset:#x}");
    }
}

#[test]
fn registers_keep_what_is_writable() {
    let mut core = core();
    let max_kib = (profile().sizes.initial_max_bytes.typical / 1024) as u32;
    // (register, written, read back)
    for (register, written, read) in [
        (regs::ID, 5, regs::ID_VALUE),
        (regs::CONTROL, u32::MAX, 3),
        (regs::CONFIG_KIB, u32::MAX, max_kib),
        (regs::CONFIG_KIB, 12, 12),
        (regs::DMA_LO, u32::MAX, 0xffff_f000),
        (regs::DMA_HI, 0x1234, 0x1234),
        (regs::DMA_RATE, u32::MAX, regs::DMA_RATE_MAX),
        (regs::VECTOR, 3, 3),
        (regs::VECTOR, 4, 3),
        (regs::DOORBELL, 0, 0),
        (regs::SCRATCH, 77, 77),
        (regs::FILL_KIB, 3, 3),
        (0x48, 1, 0),
    ] {
        poke(&mut core, register, written);
        assert_eq!(peek(&core, register), read, "{register:#x}");
    }
    assert_eq!(peek(&core, regs::STATUS) & 1, 0);
    poke(&mut core, regs::CONFIG_GEN, 0x55);
    assert_eq!((peek(&core, regs::CONFIG_GEN), peek(&core, regs::CONFIG_ACK)), (0x55, 0x55));
    assert_eq!(peek(&core, regs::STATUS) & 1, 1);
}

#[test]
fn accesses_of_other_sizes_read_all_ones_and_do_nothing() {
    let mut core = core();
    for (offset, len) in [(0, 1), (0, 2), (0, 8), (2, 4), (1, 4)] {
        let mut data = vec![0; len];
        core.region_read(REGION_BAR0, offset, &mut data).unwrap();
        assert_eq!(data, vec![0xff; len]);
        let at = regs::SCRATCH + offset;
        core.region_write(REGION_BAR0, at, &vec![1; len], 0, &mut Ram::default()).unwrap();
        assert_eq!(peek(&core, regs::SCRATCH), 0);
    }
}

#[test]
fn accesses_that_leave_a_region_or_name_none_are_einval() {
    let mut core = core();
    for (region, offset, len) in [
        (REGION_BAR0, 4096, 4),
        (REGION_BAR0, 4093, 4),
        (REGION_BAR0, u64::MAX, 4),
        (REGION_BAR0, 0, 0),
        (1, 0, 4),
        (2, 4096, 4),
        (REGION_CONFIG, 255, 2),
        (6, 0, 1),
        (8, 0, 1),
        (u32::MAX, 0, 4),
    ] {
        let mut data = vec![0; len];
        assert_eq!(errno(core.region_read(region, offset, &mut data)), libc::EINVAL);
        let written = core.region_write(region, offset, &data, 0, &mut Ram::default());
        assert_eq!(errno(written), libc::EINVAL);
    }
}

#[test]
fn stamps_go_round_the_ring_with_their_numbers() {
    let mut ram = Ram::new(64);
    let mut core = core();
    bus_master(&mut core);
    for (register, value) in [(regs::DMA_LO, 0x3000), (regs::DMA_PAGES, 4), (regs::DOORBELL, 6)] {
        poke_ram(&mut core, register, value, &mut ram);
    }
    assert_eq!(peek(&core, regs::COMPLETED), 6);
    let pages: Vec<u64> = ram.written.keys().copied().collect();
    assert_eq!(pages, [0x3000, 0x4000, 0x5000, 0x6000]);
    for (iova, number) in [(0x3000, 4u64), (0x4000, 5), (0x5000, 2), (0x6000, 3)] {
        let mut stamp = number.to_le_bytes().to_vec();
        stamp.extend(number.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
        assert_eq!(ram.written[&iova], stamp);
    }
}

#[test]
fn dma_needs_bus_mastering_a_ring_and_memory() {
    // (bus master, pages, ring address)
    for (master, pages, ring) in [(false, 4, 0), (true, 0, 0), (true, 4, 0x10_0000)] {
        let mut ram = Ram::new(16);
        let mut core = core();
        if master {
            bus_master(&mut core);
        }
        for (register, value) in [
            (regs::CONTROL, regs::CONTROL_IRQ),
            (regs::DMA_LO, ring),
            (regs::DMA_PAGES, pages),
            (regs::DOORBELL, 3),
        ] {
            poke_ram(&mut core, register, value, &mut ram);
        }
        assert_eq!((ram.writes, peek(&core, regs::COMPLETED)), (0, 0));
        assert_eq!(peek(&core, regs::STATUS) & regs::STATUS_DMA_FAILED, regs::STATUS_DMA_FAILED);
        assert_eq!(peek(&core, regs::RAISED), 1, "the doorbell is answered all the same");
        poke(&mut core, regs::STATUS, regs::STATUS_DMA_FAILED);
        assert_eq!(peek(&core, regs::STATUS) & regs::STATUS_DMA_FAILED, 0);
    }
}

#[test]
fn a_ring_at_the_end_of_the_address_space_does_not_wrap() {
    let mut core = core();
    bus_master(&mut core);
    for (register, value) in
        [(regs::DMA_LO, 0xffff_f000), (regs::DMA_HI, u32::MAX), (regs::DMA_PAGES, u32::MAX)]
    {
        poke(&mut core, register, value);
    }
    struct Everything(u64);
    impl GuestDma for Everything {
        fn write(&mut self, iova: u64, _: &[u8]) -> Result<(), DmaFault> {
            assert_eq!(iova, 0xffff_ffff_ffff_f000);
            self.0 += 1;
            Ok(())
        }
    }
    let mut memory = Everything(0);
    core.region_write(REGION_BAR0, regs::DOORBELL, &2u32.to_le_bytes(), 0, &mut memory).unwrap();
    assert_eq!(memory.0, 1);
    assert_eq!(peek(&core, regs::STATUS) & 2, 2);
}

#[test]
fn background_dma_follows_the_clock_and_drops_what_is_more_than_a_second_late() {
    let mut ram = Ram::new(16);
    let mut core = core();
    bus_master(&mut core);
    for (register, value) in [(regs::DMA_PAGES, 16), (regs::DMA_RATE, 100), (regs::CONTROL, 1)] {
        poke(&mut core, register, value);
    }
    let ms = |ms: u64| ms * 1_000_000;
    assert_eq!(core.next_due_ns(ms(5)), Some(ms(5)));
    core.advance(ms(5), 100, &mut ram);
    assert_eq!((ram.writes, core.next_due_ns(ms(5))), (0, Some(ms(15))));
    core.advance(ms(14), 100, &mut ram);
    assert_eq!(ram.writes, 0);
    core.advance(ms(55), 100, &mut ram);
    assert_eq!((ram.writes, core.next_due_ns(ms(55))), (5, Some(ms(65))));
    core.advance(ms(555), 7, &mut ram);
    assert_eq!((ram.writes, core.next_due_ns(ms(555))), (12, Some(ms(135))), "the budget");
    core.advance(ms(60_000), 100, &mut ram);
    assert_eq!(ram.writes, 12, "a sleep is not caught up with");
    core.advance(ms(60_010), 100, &mut ram);
    assert_eq!(ram.writes, 13);
    poke(&mut core, regs::CONTROL, 0);
    assert_eq!(core.next_due_ns(ms(60_010)), None);
    assert_eq!(peek(&core, regs::RAISED), 0, "background stamps raise nothing");
}

/// A device with interrupts on, in the given mode.
fn interrupting(msix: bool) -> DeviceCore {
    let mut core = core();
    if msix {
        write_config(&mut core, 0x42, &0x8000u16.to_le_bytes());
    }
    poke(&mut core, regs::CONTROL, regs::CONTROL_IRQ);
    core
}

fn ring(core: &mut DeviceCore, vector: u32) {
    poke(core, regs::VECTOR, vector);
    poke(core, regs::DOORBELL, 0);
}

#[test]
fn a_wired_vector_fires_and_only_it() {
    let mut core = interrupting(true);
    for vector in 0..4 {
        core.set_wired(Msix, vector, true).unwrap();
        ring(&mut core, vector);
        assert_eq!(core.take_fired().msix, 1 << vector);
    }
    assert_eq!(peek(&core, regs::RAISED), 4);
    poke(&mut core, regs::CONTROL, 0);
    ring(&mut core, 0);
    assert!(core.take_fired().is_empty());
    assert_eq!(peek(&core, regs::RAISED), 4);
    assert_eq!(errno(core.set_wired(Msix, 4, true)), libc::EINVAL);
    assert_eq!(errno(core.set_wired(Intx, 1, true)), libc::EINVAL);
}

#[test]
fn a_vector_not_wired_or_masked_stays_pending_shows_in_the_pba_and_fires_once() {
    for masked in [false, true] {
        let mut core = interrupting(true);
        if masked {
            core.set_wired(Msix, 3, true).unwrap();
            core.set_masked(Msix, 3, true).unwrap();
        }
        ring(&mut core, 3);
        ring(&mut core, 3);
        assert!(core.take_fired().is_empty());
        let mut pba = [0; 8];
        core.region_read(2, regs::MSIX_PBA_OFFSET, &mut pba).unwrap();
        assert_eq!(u64::from_le_bytes(pba), 8);
        if masked {
            core.set_masked(Msix, 3, false).unwrap();
        } else {
            core.set_wired(Msix, 3, true).unwrap();
        }
        assert_eq!(core.take_fired().msix, 8);
        core.region_read(2, regs::MSIX_PBA_OFFSET, &mut pba).unwrap();
        assert_eq!(u64::from_le_bytes(pba), 0);
        assert!(core.take_fired().is_empty());
    }
}

#[test]
fn intx_is_a_level_that_masks_itself_when_it_fires() {
    let mut core = interrupting(false);
    core.set_wired(Intx, 0, true).unwrap();
    ring(&mut core, 0);
    assert!(core.take_fired().intx);
    assert_eq!(peek(&core, regs::STATUS) & regs::STATUS_INTX, regs::STATUS_INTX);
    ring(&mut core, 0);
    assert!(!core.take_fired().intx, "masked by itself");
    core.set_masked(Intx, 0, false).unwrap();
    assert!(core.take_fired().intx, "still asserted");
    poke(&mut core, regs::STATUS, regs::STATUS_INTX);
    core.set_masked(Intx, 0, false).unwrap();
    assert!(!core.take_fired().intx, "lowered");

    // INTx Disable holds the line back, and lets it go again.
    write_config(&mut core, 5, &[4]);
    ring(&mut core, 0);
    assert!(!core.take_fired().intx);
    write_config(&mut core, 5, &[0]);
    assert!(core.take_fired().intx);
}

#[test]
fn msix_is_in_use_by_its_enable_bit_or_its_wiring() {
    let mut core = interrupting(false);
    core.set_wired(Intx, 0, true).unwrap();
    core.set_wired(Msix, 1, true).unwrap();
    ring(&mut core, 1);
    let fired = core.take_fired();
    assert_eq!((fired.msix, fired.intx), (2, false));
    core.unwire(Msix);
    ring(&mut core, 1);
    let fired = core.take_fired();
    assert_eq!((fired.msix, fired.intx), (0, true));
}

#[test]
fn the_msix_table_keeps_what_is_written_and_the_pba_is_read_only() {
    let mut core = core();
    let mut control = [0; 4];
    core.region_read(2, 12, &mut control).unwrap();
    assert_eq!(control, [1, 0, 0, 0], "masked after power-on");
    let mut ram = Ram::default();
    core.region_write(2, 16, &[1, 2, 3, 4, 5, 6, 7, 8], 0, &mut ram).unwrap();
    core.region_write(2, 17, &[9; 4], 0, &mut ram).unwrap();
    core.region_write(2, 18, &[9; 2], 0, &mut ram).unwrap();
    core.region_write(2, regs::MSIX_PBA_OFFSET, &[0xff; 8], 0, &mut ram).unwrap();
    let mut entry = [0; 8];
    core.region_read(2, 16, &mut entry).unwrap();
    assert_eq!(entry, [1, 2, 3, 4, 5, 6, 7, 8]);
    core.region_read(2, regs::MSIX_PBA_OFFSET, &mut entry).unwrap();
    assert_eq!(entry, [0; 8]);
}

#[test]
fn a_write_that_is_put_off_holds_everything_else_until_it_is_reported() {
    struct ByCalls;
    impl GuestDma for ByCalls {
        fn write(&mut self, _: u64, _: &[u8]) -> Result<(), DmaFault> {
            Err(DmaFault::Later)
        }
    }
    let mut core = interrupting(true);
    bus_master(&mut core);
    core.start_dma_logging(&[vfio_migration::DmaRange { iova: 0, length: 1 << 20 }], 4096).unwrap();
    poke(&mut core, regs::DMA_PAGES, 8);
    core.region_write(REGION_BAR0, regs::DOORBELL, &2u32.to_le_bytes(), 0, &mut ByCalls).unwrap();
    for number in 0..2 {
        core.advance(0, 100, &mut ByCalls);
        let expected = DeferredWrite { iova: number * 4096, data: regs::stamp(number) };
        assert_eq!(core.deferred(), Some(expected));
        assert_eq!(core.next_due_ns(0), None);
        assert_eq!(peek(&core, regs::COMPLETED), number as u32);
        // STOP waits for it; PRE_COPY need not.
        assert_eq!(errno(core.set_state(vfio_migration::DeviceState::Stop, 0)), libc::EBUSY);
        core.set_state(vfio_migration::DeviceState::Running, 0).unwrap();
        core.complete_deferred(true);
    }
    assert_eq!((peek(&core, regs::COMPLETED), peek(&core, regs::RAISED)), (2, 1));
    let mut bitmap = [0];
    core.report_dma_log(vfio_migration::DmaRange { iova: 0, length: 1 << 18 }, 4096, &mut bitmap)
        .unwrap();
    assert_eq!(bitmap, [3]);
    core.set_state(vfio_migration::DeviceState::Stop, 0).unwrap();
}

#[test]
fn fills_go_round_the_bulk_and_equal_histories_are_equal() {
    let (mut one, mut other) = (core(), core());
    for kib in [4, 5, 1000, 900, 0, u32::MAX] {
        poke(&mut one, regs::FILL_KIB, kib);
        let before = other.digest();
        poke(&mut other, regs::FILL_KIB, kib);
        assert_ne!(before, other.digest());
        assert_eq!(one.digest(), other.digest());
    }
}
