//! [`PciFunction`]: what a VMM drives.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use crate::error::DeviceResult;

/// Region index of BAR 0; BARs 1 to 5 follow (Linux uAPI, `VFIO_PCI_BAR0_REGION_INDEX`).
pub const REGION_BAR0: u32 = 0;
/// Region index of the expansion ROM.
pub const REGION_ROM: u32 = 6;
/// Region index of the configuration space.
pub const REGION_CONFIG: u32 = 7;
/// Number of fixed PCI regions, VGA included.
pub const NUM_REGIONS: usize = 9;

/// Interrupt index (Linux uAPI, `VFIO_PCI_*_IRQ_INDEX`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum IrqIndex {
    /// The legacy interrupt line.
    Intx = 0,
    /// MSI.
    Msi = 1,
    /// MSI-X.
    Msix = 2,
    /// Error notification.
    Err = 3,
    /// Device request for release.
    Req = 4,
}

impl IrqIndex {
    /// Every index, in the uAPI's order.
    pub const ALL: [IrqIndex; 5] = [Self::Intx, Self::Msi, Self::Msix, Self::Err, Self::Req];
}

/// What may be done with a region.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct RegionFlags {
    /// Reads are answered.
    pub read: bool,
    /// Writes are taken.
    pub write: bool,
    /// Parts may be mapped, see [`RegionInfo::mmap`].
    pub mmap: bool,
}

/// A part of a region that may be mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MmapArea {
    /// Start inside the region, in bytes.
    pub offset: u64,
    /// Length in bytes.
    pub size: u64,
}

/// One region. `size` 0: the function does not have it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RegionInfo {
    /// Size in bytes.
    pub size: u64,
    /// What may be done with it.
    pub flags: RegionFlags,
    /// The parts that may be mapped.
    pub mmap: Vec<MmapArea>,
}

/// One interrupt index. `count` 0: the function does not have it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct IrqInfo {
    /// Number of vectors.
    pub count: u32,
    /// Signalled by eventfd.
    pub eventfd: bool,
    /// Can be masked and unmasked.
    pub maskable: bool,
    /// Masks itself when it fires (level-triggered INTx).
    pub automasked: bool,
}

/// The shape of a PCI function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PciFunctionInfo {
    /// Regions by index: BAR 0 to 5, ROM, configuration space, VGA.
    pub regions: Vec<RegionInfo>,
    /// Interrupts by [`IrqIndex`].
    pub irqs: Vec<IrqInfo>,
    /// The function can be reset.
    pub reset: bool,
}

/// What a device may do with a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DmaPermissions {
    /// The device may read.
    pub read: bool,
    /// The device may write.
    pub write: bool,
}

/// Guest memory reached by calls instead of a mapping. Writes must mark their pages dirty: the
/// device cannot log what the VMM writes on its behalf.
pub trait DmaAccess: Send + Sync {
    /// Reads guest memory at `iova`.
    fn dma_read(&self, iova: u64, data: &mut [u8]) -> DeviceResult<()>;
    /// Writes guest memory at `iova` and marks it dirty.
    fn dma_write(&self, iova: u64, data: &[u8]) -> DeviceResult<()>;
}

/// What stands behind a DMA mapping.
#[derive(Clone)]
pub enum DmaBacking {
    /// A file that can be mapped, from `offset` on.
    Fd {
        /// The file, usually a memfd.
        fd: Arc<OwnedFd>,
        /// Where the mapping starts in it, in bytes.
        offset: u64,
    },
    /// Every access goes through these calls.
    Calls(Arc<dyn DmaAccess>),
}

impl std::fmt::Debug for DmaBacking {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Fd { fd, offset } => {
                f.debug_struct("Fd").field("fd", fd).field("offset", offset).finish()
            }
            Self::Calls(_) => f.write_str("Calls"),
        }
    }
}

/// A PCI function behind VFIO. Calls come from many threads: vCPUs access regions while the engine
/// reads state, and a region access must not wait behind a long data read for more than about 1 ms.
///
/// Errors are [`DeviceError`](crate::DeviceError). When the device's server is gone, reads fail with
/// `Gone` and the VMM answers the guest with all ones.
pub trait PciFunction: Send + Sync {
    /// Regions and interrupts, as they were when the function was opened.
    fn info(&self) -> &PciFunctionInfo;

    /// Reads `data.len()` bytes (1, 2, 4 or 8 for a BAR) at `offset` of region `region`.
    fn region_read(&self, region: u32, offset: u64, data: &mut [u8]) -> DeviceResult<()>;

    /// Writes `data` at `offset` of region `region`.
    fn region_write(&self, region: u32, offset: u64, data: &[u8]) -> DeviceResult<()>;

    /// The file to map an area of `region` from, with the offset of the region's start in it; `None`
    /// where only calls reach it.
    fn region_fd(&self, _region: u32) -> Option<(BorrowedFd<'_>, u64)> {
        None
    }

    /// SET_IRQS, trigger by eventfd: wires `eventfds[i]` to vector `start + i` of `index`; `None` in the
    /// list unwires that vector. An empty list with `start` 0 turns the whole index off.
    fn set_irq_eventfds(
        &self,
        index: IrqIndex,
        start: u32,
        eventfds: &[Option<BorrowedFd<'_>>],
    ) -> DeviceResult<()>;

    /// SET_IRQS, mask (`true`) or unmask one vector, where [`IrqInfo::maskable`] says so.
    fn set_irq_masked(&self, index: IrqIndex, vector: u32, masked: bool) -> DeviceResult<()>;

    /// Maps `size` bytes of guest memory for DMA at `iova`.
    fn dma_map(
        &self,
        iova: u64,
        size: u64,
        permissions: DmaPermissions,
        backing: DmaBacking,
    ) -> DeviceResult<()>;

    /// Unmaps exactly what one [`dma_map`](Self::dma_map) mapped.
    fn dma_unmap(&self, iova: u64, size: u64) -> DeviceResult<()>;

    /// Resets the function. Its migration session, if any, is dead after this (X9).
    fn reset_function(&self) -> DeviceResult<()>;
}
