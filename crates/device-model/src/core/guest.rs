//! What the guest reaches: regions and registers (`docs/workload.md`).

use vfio_migration::pci::{REGION_BAR0, REGION_CONFIG};
use vfio_migration::{DeviceError, DeviceResult};

use super::{DeviceCore, GuestDma};
use crate::internals::Configuration;
use crate::pci_config::ConfigEffect;
use crate::regs::{self, *};

const REGION_BAR2: u32 = REGION_BAR0 + 2;

impl DeviceCore {
    /// Reads a region. An access of a size that a BAR does not take answers all ones.
    ///
    /// # Errors
    /// EINVAL for a region the function does not have, or an access that leaves it.
    pub fn region_read(&self, region: u32, offset: u64, data: &mut [u8]) -> DeviceResult<()> {
        check_inside("REGION_READ", region, offset, data.len())?;
        match region {
            REGION_CONFIG => {
                self.config_space.read(offset, data);
            }
            REGION_BAR2 => match msix_access(offset, data.len()) {
                true => self.read_msix(offset, data),
                false => data.fill(0xff),
            },
            _ => match <&mut [u8; 4]>::try_from(&mut *data) {
                Ok(word) if offset.is_multiple_of(4) => {
                    *word = self.read_register(offset).to_le_bytes();
                }
                _ => data.fill(0xff),
            },
        }
        Ok(())
    }

    /// Writes a region at time `now_ns`. An access of a size that a BAR does not take is ignored, and so
    /// is any write to BAR 0 while the device does not work.
    ///
    /// # Errors
    /// EINVAL for a region the function does not have, or an access that leaves it.
    pub fn region_write(
        &mut self,
        region: u32,
        offset: u64,
        data: &[u8],
        now_ns: u64,
        dma: &mut dyn GuestDma,
    ) -> DeviceResult<()> {
        check_inside("REGION_WRITE", region, offset, data.len())?;
        match region {
            REGION_CONFIG => {
                let effect = self.config_space.write(offset, data);
                if effect == Some(ConfigEffect::FunctionLevelReset) {
                    self.reset()?;
                }
                self.deliver();
            }
            REGION_BAR2 => {
                let slot = usize::try_from(offset)
                    .ok()
                    .and_then(|at| self.msix_table.get_mut(at..at.saturating_add(data.len())));
                if let (Some(slot), true) = (slot, msix_access(offset, data.len())) {
                    slot.copy_from_slice(data);
                }
            }
            _ => {
                if let (Ok(word), true) = (<[u8; 4]>::try_from(data), offset.is_multiple_of(4)) {
                    self.write_register(offset, u32::from_le_bytes(word), now_ns, dma);
                }
            }
        }
        Ok(())
    }

    fn read_msix(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let at = usize::try_from(offset).unwrap_or(usize::MAX);
        if let Some(bytes) = self.msix_table.get(at..at.saturating_add(data.len())) {
            data.copy_from_slice(bytes);
        } else if offset == MSIX_PBA_OFFSET
            && let Some(first) = data.first_mut()
        {
            *first = self.internals.pending.msix;
        }
    }

    fn read_register(&self, offset: u64) -> u32 {
        let regs = &self.internals.regs;
        match offset {
            ID => ID_VALUE,
            VERSION => VERSION_VALUE,
            CONTROL => regs.control,
            STATUS => regs.status | if self.internals.pending.intx { STATUS_INTX } else { 0 },
            CONFIG_KIB => regs.config_kib,
            CONFIG_GEN | CONFIG_ACK => self.internals.config.generation,
            DMA_LO => regs.dma_addr as u32,
            DMA_HI => (regs.dma_addr >> 32) as u32,
            DMA_PAGES => regs.dma_pages,
            DMA_RATE => regs.dma_rate,
            COMPLETED => regs.completed as u32,
            COMPLETED_HI => (regs.completed >> 32) as u32,
            VECTOR => regs.vector,
            RAISED => regs.raised as u32,
            FILL_KIB => regs.fill_kib,
            SCRATCH => regs.scratch,
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u64, value: u32, now_ns: u64, dma: &mut dyn GuestDma) {
        if !self.state.is_active() {
            tracing::debug!(state = %self.state, offset, "register write to a stopped device ignored");
            return;
        }
        let regs = &mut self.internals.regs;
        match offset {
            CONTROL => {
                regs.control = value & (CONTROL_DMA | CONTROL_IRQ);
                self.work.restart_background();
            }
            STATUS => {
                regs.status &= !(value & STATUS_DMA_FAILED);
                self.internals.pending.intx &= value & STATUS_INTX == 0;
            }
            CONFIG_KIB => regs.config_kib = value.min(self.geometry.initial_max_kib),
            CONFIG_GEN => {
                regs.status |= STATUS_RECONFIGURED;
                self.internals.config = Configuration::generated(value, regs.config_kib);
                self.note_reconfiguration();
            }
            DMA_LO => {
                let page = u64::from(value) & !(regs::STAMP_STRIDE_BYTES - 1);
                regs.dma_addr = regs.dma_addr >> 32 << 32 | page;
            }
            DMA_HI => {
                regs.dma_addr = u64::from(value) << 32 | regs.dma_addr & u64::from(u32::MAX);
            }
            DMA_PAGES => regs.dma_pages = value,
            DMA_RATE => {
                regs.dma_rate = value.min(DMA_RATE_MAX);
                self.work.restart_background();
            }
            DOORBELL => {
                regs.owed = regs.owed.saturating_add(value.into());
                regs.irq_owed = true;
                self.work_off(now_ns, DOORBELL_SYNC_STAMPS, dma);
            }
            VECTOR if value < MSIX_VECTORS => regs.vector = value,
            FILL_KIB => {
                regs.fill_kib = value;
                self.fill_bulk(value);
            }
            SCRATCH => regs.scratch = value,
            _ => {}
        }
    }

    /// Rewrites so many KiB of bulk state, from where the last fill ended.
    pub(super) fn fill_bulk(&mut self, kib: u32) {
        let blocks = self.geometry.blocks();
        let count = u64::from(kib).div_ceil(4).min(blocks);
        if count == 0 {
            return;
        }
        let regs = &mut self.internals.regs;
        regs.fills += 1;
        let (fill, first) = (regs.fills, regs.fill_cursor);
        regs.fill_cursor = (first + count) % blocks;
        let behind = first + count;
        for (first, end) in [(first, behind.min(blocks)), (0, behind.saturating_sub(blocks))] {
            self.internals.bulk.fill(first, end, fill);
            self.note_fill(first, end);
        }
    }
}

fn msix_access(offset: u64, len: usize) -> bool {
    matches!(len, 4 | 8) && offset.is_multiple_of(len as u64)
}

fn check_inside(call: &'static str, region: u32, offset: u64, len: usize) -> DeviceResult<()> {
    let size = match region {
        REGION_BAR0 => BAR0_BYTES,
        REGION_BAR2 => BAR2_BYTES,
        REGION_CONFIG => CONFIG_SPACE_BYTES,
        _ => 0,
    };
    match offset.checked_add(len as u64) {
        Some(end) if end <= size && len > 0 => Ok(()),
        _ => Err(DeviceError::Errno { call, errno: libc::EINVAL }),
    }
}
