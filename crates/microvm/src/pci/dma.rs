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
