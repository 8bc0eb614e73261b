//! Registers, DMA, DMA logging, interrupts.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};

use anyhow::ensure;
use vfio_kernel::raw::{self, uapi};
use vfio_migration::DeviceState::*;

use super::rig::{RAM_IOVA, Rig, WAYS, errno, reg};
use super::with_ferrydev;
use crate::case::{Case, Outcome};
use crate::lab::{self, Lab};

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("ferrydev-dma-and-its-log", dma_and_log),
        Case::new("ferrydev-l-log-arguments", log_arguments),
        Case::new("ferrydev-h2-no-dma-in-p2p", no_dma_in_p2p),
        Case::new("ferrydev-interrupts", interrupts),
        Case::new("ferrydev-h6-function-level-reset", function_level_reset),
        Case::new("ferrydev-registers-and-regions", registers),
    ]
}

/// The range of pages `first..end` of guest memory.
pub fn log_range(first: u64, end: u64) -> uapi::DmaLoggingRange {
    uapi::DmaLoggingRange { iova: RAM_IOVA + first * 4096, length: (end - first) * 4096 }
}

/// The pages reported of guest memory, as bits of the first 64.
fn report(rig: &Rig) -> anyhow::Result<u64> {
    let mut bitmap = [0];
    raw::dma_logging_report(rig.fd(), 40, RAM_IOVA, 64 * 4096, 4096, &mut bitmap)?;
    Ok(bitmap[0])
}

fn dma_and_log(lab: &Lab) -> anyhow::Result<Outcome> {
    with_ferrydev(lab, || {
        for way in WAYS {
            let rig = Rig::with(lab, way, &[])?;
            rig.set_up_dma(10)?;
            rig.write(reg::DOORBELL, 3)?;
            ensure!(rig.stamp_at(2)? == Some(2) && rig.stamp_at(3)? != Some(3), "{way:?}: DMA");
            // Logging begins, and covers pages 2 to 7 only (L11).
            ensure!(raw::dma_logging_start(rig.fd(), 4096, &[log_range(2, 8)])? == 4096);
            ensure!(report(&rig)? == 0, "{way:?}: nothing yet");
            rig.write(reg::DOORBELL, 13)?;
            ensure!(rig.read(reg::COMPLETED)? == 16, "{way:?}: served at once");
            ensure!(rig.stamp_at(0)? == Some(10) && rig.stamp_at(5)? == Some(15), "{way:?}");
            ensure!(report(&rig)? == 0b1111_1100, "{way:?}: L7");
            ensure!(report(&rig)? == 0, "{way:?}: L7: read and cleared");
            // A report of a part leaves the rest.
            rig.write(reg::DOORBELL, 10)?;
            let mut bitmap = [1 << 63];
            let iova = RAM_IOVA + 3 * 4096;
            raw::dma_logging_report(rig.fd(), 40, iova, 2 * 4096, 4096, &mut bitmap)?;
            ensure!(bitmap[0] == 1 << 63 | 0b11, "{way:?}: L7: {:#x}", bitmap[0]);
            ensure!(report(&rig)? == 0b1110_0100, "{way:?}: L7: the rest");
            // Whatever the state (L5), and a reset leaves it on.
            rig.write(reg::DOORBELL, 4)?;
            rig.walk(&[Stop])?;
            ensure!(report(&rig)? != 0, "{way:?}: L10");
            rig.reset()?;
            ensure!(report(&rig)? == 0, "{way:?}: still on");
            raw::dma_logging_stop(rig.fd())?;
            ensure!(errno(raw::dma_logging_stop(rig.fd())) == libc::EINVAL, "{way:?}: L4");

            // Where nothing is mapped, and without bus mastering, DMA fails.
            rig.set_up_dma(10)?;
            rig.program(&[(reg::DMA_LO, 0x4000_0000), (reg::DOORBELL, 5)])?;
            ensure!(rig.read(reg::STATUS)? & 2 != 0, "{way:?}: a DMA failed");
            ensure!(rig.read(reg::COMPLETED)? == 0, "{way:?}: it is not counted");
            rig.program(&[(reg::STATUS, 2), (reg::DMA_LO, RAM_IOVA as u32)])?;
            ensure!(rig.read(reg::STATUS)? & 2 == 0, "{way:?}: write 1 to clear");
            rig.write_config(4, &2u16.to_le_bytes())?;
            rig.write(reg::DOORBELL, 1)?;
            ensure!(rig.read(reg::STATUS)? & 2 != 0, "{way:?}: without bus mastering");

            // A large doorbell, and the background.
            rig.set_up_dma(1024)?;
            rig.program(&[(reg::DOORBELL, 2000), (reg::DMA_RATE, 5000), (reg::CONTROL, 3)])?;
            lab::wait_until("2,500 stamps", || Ok(rig.read(reg::COMPLETED)? > 2500))?;
        }
        Ok(())
    })
}

fn log_arguments(lab: &Lab) -> anyhow::Result<Outcome> {
    with_ferrydev(lab, || {
        let rig = Rig::new(lab, "")?;
        let start = |page_size, ranges: &[_]| {
            let started = errno(raw::dma_logging_start(rig.fd(), page_size, ranges));
            if started == 0 {
                raw::dma_logging_stop(rig.fd()).ok();
            }
            started
        };
        let one = log_range(0, 4);
        let many: Vec<_> = (0..256).map(|n| log_range(2 * n, 2 * n + 1)).collect();
        ensure!(start(4096, &[]) == libc::EINVAL, "L1");
        ensure!(start(4096, &many) == 0, "L1: 256 ranges");
        ensure!(start(4096, &[many.as_slice(), &many].concat()) == libc::E2BIG, "L1");
        ensure!(start(4096, &[one, one]) == libc::EINVAL, "L2: overlap");
        ensure!(start(1 << 21, &[one]) == libc::EINVAL, "L2: alignment");
        ensure!(start(4096, &[log_range(4, 4)]) == libc::EINVAL, "an empty range");
        ensure!(start(0, &[one]) == libc::EINVAL && start(3, &[one]) == libc::EINVAL, "page size");
        let mut bitmap = [0];
        let asked = raw::dma_logging_report(rig.fd(), 40, RAM_IOVA, 4096, 4096, &mut bitmap);
        ensure!(errno(asked) == libc::EINVAL, "L8");
        let large = uapi::DmaLoggingRange { iova: 0, length: 1 << 40 };
        ensure!(raw::dma_logging_start(rig.fd(), 1 << 20, &[large])? == 4096, "L3");
        ensure!(errno(raw::dma_logging_start(rig.fd(), 4096, &[one])) == libc::EINVAL, "L4");
        // Bits of larger pages.
        rig.set_up_dma(20)?;
        rig.write(reg::DOORBELL, 20)?;
        raw::dma_logging_report(rig.fd(), 40, RAM_IOVA, 1 << 20, 1 << 16, &mut bitmap)?;
        ensure!(bitmap[0] == 0b11, "{:#x}", bitmap[0]);
        Ok(())
    })
}

fn no_dma_in_p2p(lab: &Lab) -> anyhow::Result<Outcome> {
    with_ferrydev(lab, || {
        let rig = Rig::new(lab, "")?;
        rig.set_up_dma(10)?;
        rig.program(&[(reg::DMA_RATE, 10_000), (reg::CONTROL, 3)])?;
        lab::wait_until("some stamps", || Ok(rig.read(reg::COMPLETED)? > 100))?;
        for state in [RunningP2p, Stop] {
            rig.walk(&[state])?;
            let completed = rig.read(reg::COMPLETED)?;
            rig.write(reg::DOORBELL, 1)?;
            std::thread::sleep(std::time::Duration::from_millis(100));
            ensure!(rig.read(reg::COMPLETED)? == completed, "DMA in {state}");
        }
        let completed = rig.read(reg::COMPLETED)?;
        rig.walk(&[Running])?;
        lab::wait_until("it goes on", || Ok(rig.read(reg::COMPLETED)? > completed))?;
        Ok(())
    })
}

/// An eventfd that does not block.
fn eventfd() -> anyhow::Result<File> {
    // SAFETY: no pointers; the result is checked.
    let fd = unsafe { libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC) };
    ensure!(fd >= 0, "eventfd: {}", std::io::Error::last_os_error());
    // SAFETY: the fd was just made and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) }.into())
}

/// How often it was signalled since.
fn signalled(eventfd: &File) -> u64 {
    let mut count = [0; 8];
    let mut from = eventfd;
    if from.read_exact(&mut count).is_err() {
        return 0;
    }
    u64::from_ne_bytes(count)
}

fn interrupts(lab: &Lab) -> anyhow::Result<Outcome> {
    with_ferrydev(lab, || {
        let rig = Rig::new(lab, "")?;
        rig.set_up_dma(4)?;
        let trigger = uapi::VFIO_IRQ_SET_ACTION_TRIGGER;
        let (mask, unmask) = (uapi::VFIO_IRQ_SET_ACTION_MASK, uapi::VFIO_IRQ_SET_ACTION_UNMASK);

        // INTx: a level that masks itself.
        let intx = eventfd()?;
        raw::set_irqs_eventfds(rig.fd(), trigger, 0, 0, &[Some(intx.as_fd())])?;
        rig.write(reg::DOORBELL, 1)?;
        rig.write(reg::DOORBELL, 1)?;
        ensure!(signalled(&intx) == 1, "INTx masks itself");
        ensure!(rig.read(reg::STATUS)? & 4 != 0, "the line is asserted");
        raw::set_irqs_none(rig.fd(), unmask, 0, 0, 1)?;
        ensure!(signalled(&intx) == 1, "unmasked while asserted");
        rig.write(reg::STATUS, 4)?;
        raw::set_irqs_none(rig.fd(), unmask, 0, 0, 1)?;
        ensure!(signalled(&intx) == 0, "unmasked after it was lowered");
        raw::set_irqs_none(rig.fd(), trigger, 0, 0, 0)?;

        // MSI-X: pending while masked or stopped, once.
        let vectors = [eventfd()?, eventfd()?, eventfd()?, eventfd()?];
        let fds: Vec<_> = vectors.iter().map(|fd| Some(fd.as_fd())).collect();
        raw::set_irqs_eventfds(rig.fd(), trigger, 2, 0, &fds)?;
        rig.program(&[(reg::VECTOR, 3), (reg::DOORBELL, 1)])?;
        ensure!(vectors.iter().map(signalled).eq([0, 0, 0, 1]), "vector 3");
        raw::set_irqs_none(rig.fd(), mask, 2, 3, 1)?;
        rig.write(reg::DOORBELL, 1)?;
        rig.write(reg::DOORBELL, 1)?;
        ensure!(signalled(&vectors[3]) == 0, "masked");
        raw::set_irqs_none(rig.fd(), unmask, 2, 3, 1)?;
        ensure!(signalled(&vectors[3]) == 1, "unmasked: once");
        rig.walk(&[RunningP2p])?;
        rig.write(reg::DOORBELL, 1)?;
        rig.walk(&[Stop])?;
        ensure!(signalled(&vectors[3]) == 0, "H3");
        rig.walk(&[Running])?;
        lab::wait_until("the interrupt comes", || Ok(signalled(&vectors[3]) == 1))?;
        ensure!(rig.read(reg::RAISED)? == 6, "{} raised", rig.read(reg::RAISED)?);
        // Unwired, it waits for a wire; the PBA shows it.
        raw::set_irqs_eventfds(rig.fd(), trigger, 2, 3, &[None])?;
        rig.write(reg::DOORBELL, 1)?;
        raw::set_irqs_eventfds(rig.fd(), trigger, 2, 3, &fds[3..])?;
        ensure!(signalled(&vectors[3]) == 1, "wired again");
        // A loop-back test by the VMM, and what does not exist.
        raw::set_irqs_none(rig.fd(), trigger, 2, 1, 2)?;
        ensure!(vectors.iter().map(signalled).eq([0, 1, 1, 0]), "loop-back");
        ensure!(errno(raw::set_irqs_none(rig.fd(), trigger, 2, 2, 3)) == libc::EINVAL, "vector 4");
        ensure!(errno(raw::set_irqs_none(rig.fd(), trigger, 1, 0, 1)) == libc::EINVAL, "no MSI");
        Ok(())
    })
}

fn function_level_reset(lab: &Lab) -> anyhow::Result<Outcome> {
    with_ferrydev(lab, || {
        let rig = Rig::new(lab, "")?;
        let clean = rig.digest()?;
        rig.set_up_dma(4)?;
        let vector = eventfd()?;
        let trigger = uapi::VFIO_IRQ_SET_ACTION_TRIGGER;
        raw::set_irqs_eventfds(rig.fd(), trigger, 2, 0, &[Some(vector.as_fd())])?;
        let data = rig.begin(PreCopy)?;
        rig.write_config(0x59, &[0x80])?;
        ensure!(rig.state()? == Running && rig.digest()? == clean, "H5 by FLR");
        ensure!(errno(raw::read(data.as_fd(), &mut [0; 8])) == libc::ENODEV, "X9");
        let mut command = [0xff; 2];
        rig.read_config(4, &mut command)?;
        ensure!(command == [0, 0], "H6: PCI_COMMAND {command:?}");
        rig.set_up_dma(4)?;
        rig.write(reg::DOORBELL, 1)?;
        ensure!(signalled(&vector) == 0, "H6: the eventfd is still wired");
        Ok(())
    })
}

fn registers(lab: &Lab) -> anyhow::Result<Outcome> {
    with_ferrydev(lab, || {
        let rig = Rig::new(lab, "")?;
        let mut ids = [0; 4];
        rig.read_config(0, &mut ids)?;
        ensure!(ids == [0x36, 0x1b, 0xf7, 0x00], "{ids:x?}");
        for (index, size) in [(0, 4096), (1, 0), (2, 4096), (7, 256), (8, 0)] {
            let head = raw::region_info_head(&raw::region_info(rig.fd(), index, 32)?);
            ensure!(head.is_some_and(|head| head.size == size), "region {index}");
        }
        ensure!(errno(raw::region_info(rig.fd(), 9, 32)) == libc::EINVAL, "region 9");
        for (index, count) in [(0, 1), (1, 0), (2, 4), (3, 0)] {
            ensure!(raw::irq_info(rig.fd(), index)?.count == count, "interrupts {index}");
        }
        rig.program(&[(reg::CONFIG_KIB, u32::MAX), (reg::DMA_RATE, u32::MAX)])?;
        ensure!(rig.read(reg::CONFIG_KIB)? == 64 << 10, "clamped");
        ensure!(rig.read(reg::DMA_RATE)? == 1_000_000, "clamped");
        rig.write(reg::SCRATCH, 0x1234_5678)?;
        ensure!(rig.read(reg::SCRATCH)? == 0x1234_5678);
        rig.write_config(0x10, &[0xff; 4])?;
        let mut bar = [0; 4];
        rig.read_config(0x10, &mut bar)?;
        ensure!(u32::from_le_bytes(bar) == 0xffff_f000, "BAR sizing: {bar:x?}");
        ensure!(errno(rig.read_config(254, &mut [0; 4])) == libc::EINVAL, "leaves the region");
        rig.walk(&[Stop])?;
        rig.write(reg::SCRATCH, 1)?;
        ensure!(rig.read(reg::SCRATCH)? == 0x1234_5678, "H3: a stopped device does not change");
        Ok(())
    })
}
