//! The commands of a PCI function: shape, regions, interrupts, DMA map, reset.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use vfio_migration::{
    DeviceError, DeviceState, DmaAccess, DmaBacking, DmaPermissions, IrqIndex, RegionInfo,
};

use super::breaks::Broken;
use super::memory::FileMemory;
use super::negotiate::DMA_MAPS_MAX;
use super::session::{Mapped, Refusal, Session};
use crate::codec::device::{
    DEVICE_PCI, DEVICE_RESET, DeviceInfo, IrqInfoPayload, RegionInfoReply, RegionInfoRequest,
};
use crate::codec::dma::{DmaMap, DmaUnmap, MAP_FILE_IO, MAP_MMAP, MAP_READABLE, MAP_WRITEABLE};
use crate::codec::irq::{IrqAction, IrqData, SetIrqs};
use crate::codec::region::RegionAccess;
use crate::wire::file_covers;

const EINVAL: Refusal = Refusal::Errno(libc::EINVAL);

impl Session<'_> {
    pub(super) fn device_info(&mut self, payload: &[u8]) -> Result<(), Refusal> {
        DeviceInfo::decode(payload)?;
        let info = self.device.pci.info();
        let reset = if info.reset { DEVICE_RESET } else { 0 };
        DeviceInfo {
            argsz: DeviceInfo::SIZE,
            flags: DEVICE_PCI | reset,
            num_regions: info.regions.len() as u32,
            num_irqs: info.irqs.len() as u32,
        }
        .encode(&mut self.reply);
        Ok(())
    }

    pub(super) fn region_info(&mut self, payload: &[u8]) -> Result<(), Refusal> {
        let request = RegionInfoRequest::decode(payload)?;
        let pci = &self.device.pci;
        let region = pci.info().regions.get(request.index as usize).ok_or(EINVAL)?;
        let fd = pci
            .region_fd(request.index)
            .filter(|_| region.flags.mmap && region.size > 0 && self.client_fds_max > 0);
        let mut flags = region.flags;
        flags.mmap = fd.is_some();
        let whole = matches!(region.mmap.as_slice(),
            [area] if (area.offset, area.size) == (0, region.size));
        let areas = (fd.is_some() && !whole).then(|| region.mmap.clone());
        let reply = RegionInfoReply {
            argsz: 0,
            index: request.index,
            flags,
            size: region.size,
            offset: fd.as_ref().map_or(0, |(_, offset)| *offset),
            has_capabilities: areas.is_some(),
            areas,
        };
        let complete = reply.encode(request.argsz, &mut self.reply);
        // The fd goes with the areas: a client that did not get them asks again.
        self.reply_region_fd = (complete && flags.mmap).then_some(request.index);
        Ok(())
    }

    pub(super) fn irq_info(&mut self, payload: &[u8]) -> Result<(), Refusal> {
        let request = IrqInfoPayload::decode(payload)?;
        let irqs = &self.device.pci.info().irqs;
        let info = irqs.get(request.index as usize).ok_or(EINVAL)?;
        IrqInfoPayload::reply(request.index, *info).encode(&mut self.reply);
        Ok(())
    }

    pub(super) fn set_irqs(&mut self, payload: &[u8], fds: &[OwnedFd]) -> Result<(), Refusal> {
        let set = SetIrqs::decode(payload)?;
        let pci = &self.device.pci;
        let info = pci.info().irqs.get(set.index as usize).ok_or(EINVAL)?;
        let index = IrqIndex::ALL.into_iter().find(|index| *index as u32 == set.index);
        let index = index.ok_or(EINVAL)?;
        let end = set.start.checked_add(set.count).ok_or(EINVAL)?;
        if end > info.count || set.start >= info.count.max(1) {
            return Err(EINVAL);
        }
        let masked = match (set.action, set.data) {
            (IrqAction::Trigger, IrqData::None) if set.count == 0 => {
                pci.set_irq_eventfds(index, 0, &[])?;
                return Ok(());
            }
            (IrqAction::Trigger, IrqData::Eventfd) => {
                // One fd per vector, or none at all to unwire the range, which libvfio-user does not know.
                let count = set.count as usize;
                let unwire = fds.is_empty() && !self.options.libvfio_user_compat;
                if !unwire && fds.len() != count {
                    return Err(EINVAL);
                }
                let eventfds: Vec<Option<BorrowedFd<'_>>> =
                    (0..count).map(|i| fds.get(i).map(AsFd::as_fd)).collect();
                pci.set_irq_eventfds(index, set.start, &eventfds)?;
                return Ok(());
            }
            // The traits have no way to raise a vector from outside.
            (IrqAction::Trigger, _) | (_, IrqData::Eventfd) => return Err(EINVAL),
            (IrqAction::Mask, _) => true,
            (IrqAction::Unmask, _) => false,
        };
        for vector in set.start..end {
            let chosen = match set.data {
                IrqData::Bool(bytes) => {
                    bytes.get((vector - set.start) as usize).is_some_and(|byte| *byte != 0)
                }
                _ => true,
            };
            if chosen {
                pci.set_irq_masked(index, vector, masked)?;
            }
        }
        Ok(())
    }

    /// Checks an access against the region and answers the region.
    fn check_access(&self, access: &RegionAccess) -> Result<&RegionInfo, Refusal> {
        let regions = &self.device.pci.info().regions;
        let region = regions.get(access.region as usize).ok_or(EINVAL)?;
        let end = access.offset.checked_add(u64::from(access.count));
        let inside = end.is_some_and(|end| end <= region.size);
        if !inside || access.count == 0 || access.count as usize > self.max_data_xfer_bytes {
            return Err(EINVAL);
        }
        Ok(region)
    }

    pub(super) fn region_read(&mut self, payload: &[u8]) -> Result<(), Refusal> {
        let access = RegionAccess::decode(payload)?;
        if !self.check_access(&access)?.flags.read {
            return Err(EINVAL);
        }
        access.encode(&mut self.reply);
        let start = self.reply.len();
        self.reply.resize(start.saturating_add(access.count as usize), 0);
        let data = self.reply.get_mut(start..).unwrap_or_default();
        self.device.pci.region_read(access.region, access.offset, data)?;
        Ok(())
    }

    pub(super) fn region_write(&mut self, payload: &[u8]) -> Result<(), Refusal> {
        let (access, data) = RegionAccess::decode_with_data(payload)?;
        if !self.check_access(&access)?.flags.write {
            return Err(EINVAL);
        }
        self.device.pci.region_write(access.region, access.offset, data)?;
        access.encode(&mut self.reply);
        Ok(())
    }

    pub(super) fn dma_map(&mut self, payload: &[u8], fds: Vec<OwnedFd>) -> Result<(), Refusal> {
        let map = DmaMap::decode(payload)?;
        let compat = self.options.libvfio_user_compat;
        let mut fds = fds.into_iter();
        let fd = fds.next();
        let wants_fd = map.flags & (MAP_MMAP | MAP_FILE_IO) != 0;
        if fds.next().is_some() || (wants_fd && fd.is_none()) {
            return Err(EINVAL);
        }
        let DmaMap { address: iova, size, offset, flags, .. } = map;
        if fd.as_ref().is_some_and(|fd| !file_covers(fd.as_fd(), offset, size)) {
            tracing::warn!(iova, size, offset, "vfio-user server: the client's file is too short");
            return Err(EINVAL);
        }
        let mapped = Mapped { size, offset, flags, has_fd: fd.is_some() };
        let end = iova.checked_add(size).ok_or(EINVAL)?;
        if let Some((start, there)) = self.mappings.range(..end).next_back()
            && start.saturating_add(there.size) > iova
        {
            let same =
                *start == iova && (there.size, there.offset, there.flags) == (size, offset, flags);
            // libvfio-user takes an identical mapping a second time, and calls the rest EINVAL.
            return match compat {
                true if same => Ok(()),
                true => Err(EINVAL),
                false => Err(Refusal::Errno(libc::EEXIST)),
            };
        }
        if self.mappings.len() >= DMA_MAPS_MAX {
            return Err(Refusal::Errno(libc::ENOSPC));
        }
        let permissions =
            DmaPermissions { read: flags & MAP_READABLE != 0, write: flags & MAP_WRITEABLE != 0 };
        let backing = match fd {
            Some(fd) if flags & MAP_FILE_IO != 0 => {
                DmaBacking::Calls(Arc::new(FileMemory::new(fd, offset, iova, size)))
            }
            Some(fd) => DmaBacking::Fd { fd: Arc::new(fd), offset },
            None => DmaBacking::Calls(Arc::clone(&self.memory) as Arc<dyn DmaAccess>),
        };
        self.device.pci.dma_map(iova, size, permissions, backing)?;
        self.mappings.insert(iova, mapped);
        Ok(())
    }

    pub(super) fn dma_unmap(&mut self, payload: &[u8]) -> Result<(), Refusal> {
        let unmap = DmaUnmap::decode(payload)?;
        let there = self.mappings.get(&unmap.address);
        if there.is_none_or(|there| there.size != unmap.size) {
            return Err(Refusal::Errno(libc::ENOENT));
        }
        self.device.pci.dma_unmap(unmap.address, unmap.size)?;
        self.mappings.remove(&unmap.address);
        unmap.encode(&mut self.reply);
        Ok(())
    }

    /// DEVICE_RESET. Follows the kernel (RUNNING, session dead); as libvfio-user it brings the device
    /// back to the state it was in.
    pub(super) fn reset(&mut self) -> Result<(), Refusal> {
        if !self.device.pci.info().reset {
            return Err(EINVAL);
        }
        self.kept.reinit = false;
        self.kept.broken = Broken::default();
        if self.breaks("R8") {
            (self.opted_in, self.kept.device_opted_in) = (false, false);
        }
        let Some(migration) = &mut self.device.migration else {
            self.device.pci.reset_function()?;
            return Ok(());
        };
        let before = migration.state();
        migration.reset()?;
        match before {
            Ok(before) if self.options.libvfio_user_compat => restore(migration, before),
            _ => Ok(()),
        }
    }
}

fn restore(
    migration: &mut Box<dyn vfio_migration::MigratableDevice>,
    before: DeviceState,
) -> Result<(), Refusal> {
    // Nothing leads to ERROR, and a device that is RUNNING is there already.
    if matches!(before, DeviceState::Error | DeviceState::Running) {
        return Ok(());
    }
    migration.set_state(before).map_err(|error: DeviceError| Refusal::from(error))
}
