//! Guest memory for devices: mapped as a whole, and served call by call where a device cannot map it.

use std::sync::Arc;

use migration::GuestMemory;
use vfio_migration::{
    DeviceError, DeviceResult, DmaAccess, DmaBacking, DmaPermissions, PciFunction,
};

/// Serves a device's reads and writes of guest memory by copying. The pages it writes are marked as
/// written by the VMM: no log of the device knows of them.
#[derive(Debug)]
pub struct GuestDma(Arc<GuestMemory>);

impl GuestDma {
    /// Access to `memory`; IOVA is the guest physical address.
    pub fn new(memory: Arc<GuestMemory>) -> Self {
        Self(memory)
    }
}

impl DmaAccess for GuestDma {
    fn dma_read(&self, iova: u64, data: &mut [u8]) -> DeviceResult<()> {
        self.0
            .read(iova, data)
            .map_err(|_| DeviceError::Errno { call: "DMA_READ", errno: libc::EFAULT })
    }

    fn dma_write(&self, iova: u64, data: &[u8]) -> DeviceResult<()> {
        self.0
            .write(iova, data)
            .map_err(|_| DeviceError::Errno { call: "DMA_WRITE", errno: libc::EFAULT })
    }
}

/// Maps all of `memory` for `function`, region by region. BARs of devices are not mapped: there is no
/// peer-to-peer DMA, so the P2P states are passed through and never dwelt in.
pub fn map_memory(function: &dyn PciFunction, memory: &GuestMemory) -> DeviceResult<()> {
    let permissions = DmaPermissions { read: true, write: true };
    for (index, region) in memory.layout().iter().enumerate() {
        let backing = DmaBacking::Fd { fd: memory.region_fd_arc(index), offset: 0 };
        function.dma_map(region.gpa, region.len, permissions, backing)?;
    }
    Ok(())
}

/// Undoes [`map_memory`]: no device reaches `memory` through `function` any more.
pub fn unmap_memory(function: &dyn PciFunction, memory: &GuestMemory) -> DeviceResult<()> {
    memory.layout().iter().try_for_each(|region| function.dma_unmap(region.gpa, region.len))
}

#[cfg(test)]
mod tests {
    use migration::{DirtyBitmap, PAGE_SIZE, RegionLayout};

    use super::*;
    use crate::pci::mock::{self, MockFunction};

    const LAYOUT: [RegionLayout; 2] = [
        RegionLayout { gpa: 0, len: 2 * PAGE_SIZE },
        RegionLayout { gpa: 1 << 32, len: 4 * PAGE_SIZE },
    ];

    #[test]
    fn writes_of_a_device_by_call_are_marked_and_reads_are_not() {
        let memory = Arc::new(GuestMemory::new(&LAYOUT).unwrap());
        memory.set_tracking(true);
        let dma = GuestDma::new(Arc::clone(&memory));
        dma.dma_write((1 << 32) + 2 * PAGE_SIZE - 1, &[7, 8]).unwrap();
        let mut back = [0; 2];
        dma.dma_read((1 << 32) + 2 * PAGE_SIZE - 1, &mut back).unwrap();
        assert_eq!(back, [7, 8]);
        let mut dirty = DirtyBitmap::new(&LAYOUT);
        memory.take_dirty(&mut dirty);
        assert_eq!((dirty.region(0), dirty.region(1)), (&[0][..], &[0b110][..]));
        for outside in [2 * PAGE_SIZE - 1, 1 << 40, u64::MAX] {
            assert_eq!(dma.dma_write(outside, &[0; 2]).unwrap_err().errno(), Some(libc::EFAULT));
            assert_eq!(dma.dma_read(outside, &mut back).unwrap_err().errno(), Some(libc::EFAULT));
        }
    }

    #[test]
    fn all_memory_is_mapped_at_its_guest_address_and_nothing_else() {
        let memory = GuestMemory::new(&LAYOUT).unwrap();
        let device = MockFunction::new(mock::config());
        map_memory(&*device, &memory).unwrap();
        let mapped = device.mapped.lock().unwrap().clone();
        assert_eq!(mapped, LAYOUT.map(|region| (region.gpa, region.len)));
        unmap_memory(&*device, &memory).unwrap();
        assert_eq!(*device.mapped.lock().unwrap(), []);
    }
}
