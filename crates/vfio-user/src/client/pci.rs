//! The function as a VMM drives it: shape, regions, interrupts, DMA map, reset.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use vfio_migration::pci::NUM_REGIONS;
use vfio_migration::{
    DeviceError, DeviceResult, DmaAccess, DmaBacking, DmaPermissions, IrqIndex, IrqInfo, MmapArea,
    PciFunction, PciFunctionInfo, RegionInfo,
};
use vmm_sys_util::eventfd::EventFd;

use super::connection::{Connection, Request, broke};
use super::feature::FOREIGN_WRITE_BYTES_MAX;
use super::memory::Mapping;
use super::options::Options;
use crate::codec::device::{
    AREAS_MAX, DEVICE_RESET, DeviceInfo, IrqInfoPayload, RegionInfoReply, RegionInfoRequest,
};
use crate::codec::dma::{DmaMap, DmaUnmap, MAP_READABLE, MAP_WRITEABLE};
use crate::codec::irq::{IrqAction, IrqData, SetIrqs};
use crate::codec::region::RegionAccess;
use crate::codec::{Command, DecodeError};
use crate::wire::file_covers;

/// Largest region information that is asked for, in bytes.
const REGION_INFO_BYTES_MAX: u32 =
    RegionInfoReply::FIXED_SIZE + 16 + (AREAS_MAX * size_of::<MmapArea>()) as u32;

/// See the module.
pub(super) struct VfioUserPci {
    connection: Arc<Connection>,
    info: PciFunctionInfo,
    region_fds: Vec<Option<(OwnedFd, u64)>>,
    dma_access: Option<Arc<dyn DmaAccess>>,
    setup_timeout: Duration,
    region_timeout: Duration,
    state_timeout: Option<Duration>,
    /// The server is ours: SET_IRQS without fds unwires.
    own_server: bool,
}

impl VfioUserPci {
    /// Reads the shape of the device.
    pub(super) fn open(
        connection: Arc<Connection>,
        options: &Options,
        own_server: bool,
    ) -> DeviceResult<Self> {
        let mut pci = Self {
            connection,
            info: PciFunctionInfo { regions: Vec::new(), irqs: Vec::new(), reset: false },
            region_fds: Vec::new(),
            dma_access: options.dma_access.clone(),
            setup_timeout: options.setup_timeout,
            region_timeout: options.region_timeout,
            state_timeout: options.state_timeout,
            own_server,
        };
        let mut request = Vec::new();
        DeviceInfo::request().encode(&mut request);
        let call = "DEVICE_GET_INFO";
        let reply = pci.setup(call, Command::DEVICE_GET_INFO, &request, &[])?;
        let device = DeviceInfo::decode(&reply.0).map_err(|error| malformed(call, error))?;
        pci.info.reset = device.flags & DEVICE_RESET != 0;
        // More than a PCI function has is of no use to a VMM, so a large count costs nothing.
        for index in 0..device.num_regions.min(NUM_REGIONS as u32) {
            let (region, fd) = pci.read_region_info(index)?;
            pci.info.regions.push(region);
            pci.region_fds.push(fd);
        }
        for index in 0..device.num_irqs.min(IrqIndex::ALL.len() as u32) {
            let irq = pci.read_irq_info(index)?;
            pci.info.irqs.push(irq);
        }
        Ok(pci)
    }

    fn read_region_info(&self, index: u32) -> DeviceResult<(RegionInfo, Option<(OwnedFd, u64)>)> {
        let call = "DEVICE_GET_REGION_INFO";
        let mut argsz = RegionInfoReply::FIXED_SIZE;
        // Twice where the areas do not fit at first, as every VFIO client asks.
        for _ in 0..2 {
            let mut request = Vec::new();
            RegionInfoRequest { argsz, index }.encode(&mut request);
            let (payload, fds) = self.setup(call, Command::GET_REGION_INFO, &request, &[])?;
            let reply =
                RegionInfoReply::decode(&payload).map_err(|error| malformed(call, error))?;
            if reply.has_capabilities && reply.areas.is_none() && reply.argsz > argsz {
                argsz = reply.argsz.min(REGION_INFO_BYTES_MAX);
                continue;
            }
            return Ok(region_info(reply, fds));
        }
        Err(broke(call, format!("the areas of region {index} never fit")))
    }

    fn read_irq_info(&self, index: u32) -> DeviceResult<IrqInfo> {
        let call = "DEVICE_GET_IRQ_INFO";
        let mut request = Vec::new();
        IrqInfoPayload::request(index).encode(&mut request);
        let (payload, _) = self.setup(call, Command::GET_IRQ_INFO, &request, &[])?;
        let info = IrqInfoPayload::decode(&payload).map_err(|error| malformed(call, error))?;
        Ok(info.info())
    }

    fn setup(
        &self,
        call: &'static str,
        command: Command,
        fixed: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> DeviceResult<(Vec<u8>, Vec<OwnedFd>)> {
        let timeout = Some(self.setup_timeout);
        let request = Request { call, command, fixed, data: &[], fds, timeout };
        let reply = self.connection.shared.call(request)?;
        Ok((reply.payload, reply.fds))
    }

    fn set_irqs(&self, set: SetIrqs<'_>, fds: &[BorrowedFd<'_>]) -> DeviceResult<()> {
        let mut fixed = Vec::new();
        set.encode(&mut fixed);
        self.setup("SET_IRQS", Command::SET_IRQS, &fixed, fds).map(drop)
    }

    /// Unwires a range of vectors. Servers that insist on one fd per vector get one that nobody reads.
    fn unwire(&self, index: u32, start: u32, count: u32) -> DeviceResult<()> {
        let action = IrqAction::Trigger;
        let set = SetIrqs { index, start, count, action, data: IrqData::Eventfd };
        match self.set_irqs(set, &[]) {
            Err(DeviceError::Errno { errno: libc::EINVAL, .. }) if !self.own_server => {}
            other => return other,
        }
        let call = "SET_IRQS";
        let nobody = EventFd::new(libc::EFD_CLOEXEC);
        let nobody = nobody.map_err(|source| DeviceError::Io { call, source })?;
        for vector in start..start.saturating_add(count) {
            let set = SetIrqs { index, start: vector, count: 1, action, data: IrqData::Eventfd };
            self.set_irqs(set, &[borrow(&nobody)])?;
        }
        Ok(())
    }

    fn region_call(
        &self,
        call: &'static str,
        command: Command,
        access: RegionAccess,
        data: &[u8],
    ) -> DeviceResult<Vec<u8>> {
        let mut fixed = Vec::with_capacity(RegionAccess::SIZE);
        access.encode(&mut fixed);
        let timeout = Some(self.region_timeout);
        let request = Request { call, command, fixed: &fixed, data, fds: &[], timeout };
        Ok(self.connection.shared.call(request)?.payload)
    }

    fn chunk_bytes(&self) -> usize {
        self.connection.shared.limits.max_data_xfer_bytes.min(u32::MAX as usize)
    }
}

impl PciFunction for VfioUserPci {
    fn info(&self) -> &PciFunctionInfo {
        &self.info
    }

    fn region_read(&self, region: u32, offset: u64, data: &mut [u8]) -> DeviceResult<()> {
        let call = "REGION_READ";
        let mut offset = offset;
        for part in data.chunks_mut(self.chunk_bytes()) {
            let access = RegionAccess { offset, region, count: part.len() as u32 };
            let payload = self.region_call(call, Command::REGION_READ, access, &[])?;
            let (answer, bytes) =
                RegionAccess::decode_with_data(&payload).map_err(|error| malformed(call, error))?;
            if answer != access || bytes.len() != part.len() {
                return Err(broke(call, format!("asked for {access:?}, got {answer:?}")));
            }
            part.copy_from_slice(bytes);
            offset = offset.saturating_add(part.len() as u64);
        }
        Ok(())
    }

    fn region_write(&self, region: u32, offset: u64, data: &[u8]) -> DeviceResult<()> {
        let call = "REGION_WRITE";
        let mut offset = offset;
        let chunk_bytes = match self.own_server {
            true => self.chunk_bytes(),
            false => self.chunk_bytes().min(FOREIGN_WRITE_BYTES_MAX),
        };
        for part in data.chunks(chunk_bytes) {
            let access = RegionAccess { offset, region, count: part.len() as u32 };
            let payload = self.region_call(call, Command::REGION_WRITE, access, part)?;
            let answer = RegionAccess::decode(&payload).map_err(|error| malformed(call, error))?;
            if answer.count != access.count {
                return Err(broke(call, format!("wrote {access:?}, got {answer:?}")));
            }
            offset = offset.saturating_add(part.len() as u64);
        }
        Ok(())
    }

    fn region_fd(&self, region: u32) -> Option<(BorrowedFd<'_>, u64)> {
        let (fd, offset) = self.region_fds.get(region as usize)?.as_ref()?;
        Some((fd.as_fd(), *offset))
    }

    fn set_irq_eventfds(
        &self,
        index: IrqIndex,
        start: u32,
        eventfds: &[Option<BorrowedFd<'_>>],
    ) -> DeviceResult<()> {
        let index = index as u32;
        let action = IrqAction::Trigger;
        if eventfds.is_empty() {
            if start != 0 {
                return Err(DeviceError::Errno { call: "SET_IRQS", errno: libc::EINVAL });
            }
            let data = IrqData::None;
            return self.set_irqs(SetIrqs { index, start, count: 0, action, data }, &[]);
        }
        let mut start = start;
        for run in eventfds.chunk_by(|a, b| a.is_some() == b.is_some()) {
            let fds: Vec<BorrowedFd<'_>> = run.iter().copied().flatten().collect();
            if fds.is_empty() {
                self.unwire(index, start, run.len() as u32)?;
            }
            let mut vector = start;
            for part in fds.chunks(self.connection.shared.limits.max_msg_fds.max(1)) {
                let count = part.len() as u32;
                let data = IrqData::Eventfd;
                self.set_irqs(SetIrqs { index, start: vector, count, action, data }, part)?;
                vector = vector.saturating_add(count);
            }
            start = start.saturating_add(run.len() as u32);
        }
        Ok(())
    }

    fn set_irq_masked(&self, index: IrqIndex, vector: u32, masked: bool) -> DeviceResult<()> {
        let action = if masked { IrqAction::Mask } else { IrqAction::Unmask };
        let (index, data) = (index as u32, IrqData::None);
        let mut fixed = Vec::new();
        SetIrqs { index, start: vector, count: 1, action, data }.encode(&mut fixed);
        let (call, command) = ("SET_IRQS", Command::SET_IRQS);
        let timeout = Some(self.region_timeout);
        let request = Request { call, command, fixed: &fixed, data: &[], fds: &[], timeout };
        self.connection.shared.call(request).map(drop)
    }

    fn dma_map(
        &self,
        iova: u64,
        size: u64,
        permissions: DmaPermissions,
        backing: DmaBacking,
    ) -> DeviceResult<()> {
        let call = "DMA_MAP";
        if size == 0 || iova.checked_add(size).is_none() {
            return Err(DeviceError::Errno { call, errno: libc::EINVAL });
        }
        let (access, fd) = match backing {
            DmaBacking::Calls(access) => (Some(access), None),
            DmaBacking::Fd { fd, offset } => (self.dma_access.clone(), Some((fd, offset))),
        };
        let mut flags = if permissions.read { MAP_READABLE } else { 0 };
        flags |= if permissions.write { MAP_WRITEABLE } else { 0 };
        let offset = fd.as_ref().map_or(0, |(_, offset)| *offset);
        let mut fixed = Vec::new();
        // No mode bit: the server maps the fd if there is one, which every server understands.
        DmaMap { argsz: DmaMap::SIZE, flags, offset, address: iova, size }.encode(&mut fixed);
        let fds: Vec<BorrowedFd<'_>> = match &fd {
            Some((fd, _)) if self.connection.shared.limits.max_msg_fds > 0 => vec![fd.as_fd()],
            _ => Vec::new(),
        };
        let has_fd = !fds.is_empty();
        // Before the server knows of it: it may use the memory at once.
        let table = &self.connection.shared.dma;
        if !table.insert(iova, Mapping { size, permissions, access, has_fd }) {
            return Err(DeviceError::Errno { call, errno: libc::EEXIST });
        }
        let mapped = self.setup(call, Command::DMA_MAP, &fixed, &fds);
        if mapped.is_err() {
            table.remove(iova, size);
        }
        mapped.map(drop)
    }

    fn dma_unmap(&self, iova: u64, size: u64) -> DeviceResult<()> {
        let call = "DMA_UNMAP";
        let table = &self.connection.shared.dma;
        if !table.contains(iova, size) {
            return Err(DeviceError::Errno { call, errno: libc::ENOENT });
        }
        let mut fixed = Vec::new();
        DmaUnmap { argsz: DmaUnmap::SIZE, flags: 0, address: iova, size }.encode(&mut fixed);
        let unmapped = self.setup(call, Command::DMA_UNMAP, &fixed, &[]);
        // A server that is gone has no mapping left, and one that refuses keeps it.
        if matches!(&unmapped, Ok(_) | Err(DeviceError::Gone { .. })) {
            table.remove(iova, size);
        }
        unmapped.map(drop)
    }

    fn reset_function(&self) -> DeviceResult<()> {
        // Counted before and after: whoever reads the stream meanwhile must not trust it.
        let shared = &self.connection.shared;
        let _one_at_a_time = shared.reset_or_change();
        shared.resets.fetch_add(1, Ordering::AcqRel);
        let (call, command) = ("DEVICE_RESET", Command::DEVICE_RESET);
        let timeout = self.state_timeout;
        let request = Request { call, command, fixed: &[], data: &[], fds: &[], timeout };
        let reset = shared.call(request);
        shared.resets.fetch_add(1, Ordering::AcqRel);
        reset.map(drop)
    }
}

fn region_info(reply: RegionInfoReply, fds: Vec<OwnedFd>) -> (RegionInfo, Option<(OwnedFd, u64)>) {
    // Areas lie inside of the region, so their ends are numbers.
    let mapped_end = match &reply.areas {
        Some(areas) => areas.iter().map(|area| area.offset.saturating_add(area.size)).max(),
        None => Some(reply.size),
    };
    let fd = fds.into_iter().next().filter(|fd| {
        let covered = file_covers(fd.as_fd(), reply.offset, mapped_end.unwrap_or(0));
        if !covered {
            tracing::warn!(
                region = reply.index,
                "vfio-user: the server's file is too short to map"
            );
        }
        reply.flags.mmap && covered
    });
    let mut flags = reply.flags;
    // Without an fd there is nothing to map.
    flags.mmap = fd.is_some();
    let mmap = match reply.areas {
        _ if fd.is_none() => Vec::new(),
        Some(areas) => areas,
        None => vec![MmapArea { offset: 0, size: reply.size }],
    };
    (RegionInfo { size: reply.size, flags, mmap }, fd.map(|fd| (fd, reply.offset)))
}

fn borrow(eventfd: &EventFd) -> BorrowedFd<'_> {
    use std::os::fd::AsRawFd;
    // SAFETY: the fd is open for as long as the eventfd is borrowed.
    unsafe { BorrowedFd::borrow_raw(eventfd.as_raw_fd()) }
}

pub(super) fn malformed(call: &'static str, error: DecodeError) -> DeviceError {
    broke(call, error.to_string())
}
