//! The PCI function: regions, interrupts, DMA.

use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use anyhow::ensure;
use device_model::regs;
use vfio_migration::pci::{REGION_BAR0, REGION_CONFIG};
use vfio_migration::{IrqIndex, PciFunction};

use super::each_way;
use crate::case::{Case, Outcome};
use crate::lab::{Lab, Parent};

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new("kernel-regions-are-read-and-written-and-end-where-they-end", regions),
        Case::new("kernel-interrupts-reach-their-eventfds", interrupts),
        Case::new("kernel-dma-reaches-mapped-memory-and-no-other", dma),
    ]
}

/// PCI_COMMAND: memory and bus master.
pub(super) fn enable(function: &dyn PciFunction) -> anyhow::Result<()> {
    Ok(function.region_write(REGION_CONFIG, 4, &6u16.to_le_bytes())?)
}

pub(super) fn write(function: &dyn PciFunction, at: u64, value: u32) -> anyhow::Result<()> {
    Ok(function.region_write(REGION_BAR0, at, &value.to_le_bytes())?)
}

pub(super) fn read(function: &dyn PciFunction, at: u64) -> anyhow::Result<u32> {
    let mut word = [0; 4];
    function.region_read(REGION_BAR0, at, &mut word)?;
    Ok(u32::from_le_bytes(word))
}

/// Rings the doorbell for `stamps` stamps into a ring of `pages` pages at `address`.
pub(super) fn stamp(
    function: &dyn PciFunction,
    address: u32,
    pages: u32,
    stamps: u32,
) -> anyhow::Result<()> {
    write(function, regs::DMA_LO, address)?;
    write(function, regs::DMA_HI, 0)?;
    write(function, regs::DMA_PAGES, pages)?;
    write(function, regs::DOORBELL, stamps)
}

fn regions(lab: &Lab) -> anyhow::Result<Outcome> {
    each_way(lab, Parent::Ferrydev, |_, opened| {
        let function = opened.pci()?;
        let sizes: Vec<u64> = function.info().regions.iter().map(|region| region.size).collect();
        ensure!(sizes == [4096, 0, 4096, 0, 0, 0, 0, 256, 0], "{sizes:?}");
        enable(&*function)?;
        ensure!(read(&*function, regs::ID)? == regs::ID_VALUE, "another device");
        let mut ids = [0; 4];
        function.region_read(REGION_CONFIG, 0, &mut ids)?;
        ensure!(ids == [0x36, 0x1b, 0xf7, 0x00], "{ids:x?}");
        for (region, offset, len) in
            [(0, 4096, 4), (0, 4094, 4), (1, 0, 4), (7, u64::MAX, 4), (9, 0, 1)]
        {
            let outcome = function.region_read(region, offset, &mut vec![0; len]);
            ensure!(outcome.is_err(), "region {region} at {offset:#x}");
        }
        Ok(())
    })
}

fn eventfd() -> anyhow::Result<OwnedFd> {
    // SAFETY: a plain system call; the fd it makes is owned here alone.
    let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
    ensure!(fd >= 0, "eventfd: {}", std::io::Error::last_os_error());
    // SAFETY: as above.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn count(eventfd: &OwnedFd) -> anyhow::Result<u64> {
    let mut bytes = [0; 8];
    match std::fs::File::from(eventfd.try_clone()?).read(&mut bytes) {
        Ok(_) => Ok(u64::from_ne_bytes(bytes)),
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Ok(0),
        Err(error) => Err(error.into()),
    }
}

fn interrupts(lab: &Lab) -> anyhow::Result<Outcome> {
    each_way(lab, Parent::Ferrydev, |_, opened| {
        let function = opened.pci()?;
        let counts: Vec<u32> = function.info().irqs.iter().map(|irq| irq.count).collect();
        ensure!(counts.starts_with(&[1, 0, 4]), "{counts:?}");
        let memory = super::memory(1 << 20)?;
        microvm::pci::map_memory(&*function, &memory)?;
        enable(&*function)?;
        write(&*function, regs::CONTROL, regs::CONTROL_IRQ)?;
        // MSI-X: enabled in the capability, unmasked in the table.
        let events = (0..4).map(|_| eventfd()).collect::<anyhow::Result<Vec<_>>>()?;
        let borrowed: Vec<Option<BorrowedFd<'_>>> =
            events.iter().map(|event| Some(event.as_fd())).collect();
        function.set_irq_eventfds(IrqIndex::Msix, 0, &borrowed)?;
        function.region_write(REGION_CONFIG, 0x42, &0x8003u16.to_le_bytes())?;
        for vector in 0..4u64 {
            function.region_write(2, 16 * vector + 12, &[0; 4])?;
        }
        for vector in 0..4 {
            write(&*function, regs::VECTOR, vector)?;
            stamp(&*function, 0, 4, 1)?;
            for (place, event) in events.iter().enumerate() {
                let expected = u64::from(place == vector as usize);
                let count = count(event)?;
                ensure!(count == expected, "vector {vector}: {count} at {place}");
            }
        }
        // One taken away, the others stay.
        function.set_irq_eventfds(IrqIndex::Msix, 1, &[None])?;
        for vector in [1, 2] {
            write(&*function, regs::VECTOR, vector)?;
            stamp(&*function, 0, 4, 1)?;
        }
        ensure!((count(&events[1])?, count(&events[2])?) == (0, 1), "a vector taken away");
        // All off, then the line; it masks itself until it is unmasked.
        function.set_irq_eventfds(IrqIndex::Msix, 0, &[])?;
        function.region_write(REGION_CONFIG, 0x42, &3u16.to_le_bytes())?;
        let line = eventfd()?;
        function.set_irq_eventfds(IrqIndex::Intx, 0, &[Some(line.as_fd())])?;
        stamp(&*function, 0, 4, 1)?;
        ensure!(count(&line)? == 1, "the line is not raised");
        ensure!(read(&*function, regs::STATUS)? & regs::STATUS_INTX != 0, "it is not asserted");
        write(&*function, regs::STATUS, regs::STATUS_INTX)?;
        function.set_irq_masked(IrqIndex::Intx, 0, true)?;
        stamp(&*function, 0, 4, 1)?;
        ensure!(count(&line)? == 0, "it came although it is masked");
        function.set_irq_masked(IrqIndex::Intx, 0, false)?;
        ensure!(count(&line)? == 1, "it is lost behind the mask");
        // A reset takes the wiring away.
        function.reset_function()?;
        enable(&*function)?;
        write(&*function, regs::CONTROL, regs::CONTROL_IRQ)?;
        stamp(&*function, 0, 4, 1)?;
        ensure!(count(&line)? == 0, "the wiring outlived a reset");
        ensure!(line.as_raw_fd() >= 0, "closed");
        Ok(())
    })
}

fn dma(lab: &Lab) -> anyhow::Result<Outcome> {
    each_way(lab, Parent::Ferrydev, |_, opened| {
        let function = opened.pci()?;
        let memory = super::memory(1 << 20)?;
        enable(&*function)?;
        let failed = |function: &dyn PciFunction| -> anyhow::Result<bool> {
            let failed = read(function, regs::STATUS)? & regs::STATUS_DMA_FAILED != 0;
            write(function, regs::STATUS, regs::STATUS_DMA_FAILED)?;
            Ok(failed)
        };
        stamp(&*function, 0x3000, 1, 1)?;
        ensure!(failed(&*function)?, "it wrote where nothing is mapped");
        microvm::pci::map_memory(&*function, &memory)?;
        let before = read(&*function, regs::COMPLETED)?;
        stamp(&*function, 0x3000, 4, 3)?;
        ensure!(!failed(&*function)?, "it could not write to mapped memory");
        ensure!(read(&*function, regs::COMPLETED)? == before + 3, "stamps are missing");
        for number in u64::from(before)..u64::from(before) + 3 {
            let mut bytes = [0; regs::STAMP_BYTES];
            memory.read(0x3000 + number % 4 * 4096, &mut bytes)?;
            ensure!(bytes == regs::stamp(number), "stamp {number} is {bytes:x?}");
        }
        function.dma_unmap(0, 1 << 20)?;
        stamp(&*function, 0x3000, 1, 1)?;
        ensure!(failed(&*function)?, "it writes to what was unmapped");
        Ok(())
    })
}
