//! The device as a [`PciFunction`].

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use vfio_migration::{
    DeviceResult, DmaBacking, DmaPermissions, IrqIndex, PciFunction, PciFunctionInfo,
};

use super::{Device, Inner, Shared, pass};
use crate::core::DeviceCore;

#[derive(Debug)]
pub(super) struct SoftFunction {
    device: Arc<Device>,
    info: PciFunctionInfo,
}

impl SoftFunction {
    pub(super) fn new(device: Arc<Device>) -> Self {
        Self { device, info: DeviceCore::info() }
    }

    fn shared(&self) -> &Shared {
        &self.device.shared
    }
}

impl PciFunction for SoftFunction {
    fn info(&self) -> &PciFunctionInfo {
        &self.info
    }

    fn region_read(&self, region: u32, offset: u64, data: &mut [u8]) -> DeviceResult<()> {
        self.shared().lock().core.region_read(region, offset, data)
    }

    fn region_write(&self, region: u32, offset: u64, data: &[u8]) -> DeviceResult<()> {
        let shared = self.shared();
        let now_ns = shared.now_ns();
        let write = |inner: &mut Inner| {
            let Inner { core, memory, .. } = inner;
            let resets = core.resets();
            core.region_write(region, offset, data, now_ns, memory)?;
            Ok(if core.resets() == resets { 0 } else { core.timing().reset_ns })
        };
        // A write to configuration space may be a reset.
        let took_ns = match region {
            vfio_migration::pci::REGION_CONFIG => shared.with_quiet_inner(write),
            _ => shared.with_inner(write),
        }?;
        pass(took_ns);
        Ok(())
    }

    fn set_irq_eventfds(
        &self,
        index: IrqIndex,
        start: u32,
        eventfds: &[Option<BorrowedFd<'_>>],
    ) -> DeviceResult<()> {
        self.shared().with_inner(|inner| {
            if eventfds.is_empty() && start == 0 {
                inner.core.unwire(index);
                inner.eventfds.clear_index(index);
                return Ok(());
            }
            for (vector, eventfd) in (start..).zip(eventfds) {
                // First the eventfd: wiring may fire at once.
                inner.eventfds.set(index, vector, *eventfd)?;
                inner.core.set_wired(index, vector, eventfd.is_some())?;
            }
            Ok(())
        })
    }

    fn set_irq_masked(&self, index: IrqIndex, vector: u32, masked: bool) -> DeviceResult<()> {
        self.shared().with_inner(|inner| inner.core.set_masked(index, vector, masked))
    }

    fn dma_map(
        &self,
        iova: u64,
        size: u64,
        permissions: DmaPermissions,
        backing: DmaBacking,
    ) -> DeviceResult<()> {
        self.shared().with_inner(|inner| inner.memory.map(iova, size, permissions, backing))
    }

    fn dma_unmap(&self, iova: u64, size: u64) -> DeviceResult<()> {
        self.shared().with_quiet_inner(|inner| inner.memory.unmap(iova, size))
    }

    fn reset_function(&self) -> DeviceResult<()> {
        self.shared().reset()
    }
}
