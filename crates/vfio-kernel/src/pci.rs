//! The function as a VMM drives it: shape, regions, interrupts, DMA map, reset.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use vfio_migration::pci::NUM_REGIONS;
use vfio_migration::{
    DeviceError, DeviceResult, DmaBacking, DmaPermissions, IrqIndex, IrqInfo, MmapArea,
    PciFunction, PciFunctionInfo, RegionFlags, RegionInfo,
};

use crate::chain;
use crate::device::Shared;
use crate::raw;
use crate::raw::uapi::{
    self, SparseMmapArea, SparseMmapHeader, VFIO_DEVICE_FLAGS_PCI, VFIO_DEVICE_FLAGS_RESET,
    VFIO_IRQ_INFO_AUTOMASKED, VFIO_IRQ_INFO_EVENTFD, VFIO_IRQ_INFO_MASKABLE,
    VFIO_IRQ_SET_ACTION_MASK, VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_ACTION_UNMASK,
    VFIO_REGION_INFO_FLAG_CAPS, VFIO_REGION_INFO_FLAG_MMAP, VFIO_REGION_INFO_FLAG_READ,
    VFIO_REGION_INFO_FLAG_WRITE,
};

/// The most region information that is asked for, in bytes: room for every area that is looked at, and as
/// much again for other capabilities.
const REGION_INFO_BYTES_MAX: u32 = (size_of::<uapi::RegionInfo>()
    + 2 * (size_of::<SparseMmapHeader>() + chain::AREAS_MAX * size_of::<SparseMmapArea>()))
    as u32;

/// See the module.
pub(crate) struct KernelPci {
    shared: Arc<Shared>,
    info: PciFunctionInfo,
    /// Where each region starts in the device's file.
    offsets: Vec<u64>,
}

impl KernelPci {
    /// Reads the shape of the device.
    pub(crate) fn open(shared: Arc<Shared>) -> DeviceResult<Self> {
        let device = shared.call("DEVICE_GET_INFO", || raw::device_info(shared.fd.as_fd()))?;
        if device.flags & VFIO_DEVICE_FLAGS_PCI == 0 {
            return Err(DeviceError::Unsupported { call: "DEVICE_GET_INFO (a PCI device)" });
        }
        let reset = device.flags & VFIO_DEVICE_FLAGS_RESET != 0;
        let info = PciFunctionInfo { regions: Vec::new(), irqs: Vec::new(), reset };
        let mut pci = Self { shared, info, offsets: Vec::new() };
        // More than a PCI function has is of no use to a VMM, so a large count costs nothing.
        for index in 0..device.num_regions.min(NUM_REGIONS as u32) {
            let (region, offset) = pci.read_region_info(index)?;
            pci.info.regions.push(region);
            pci.offsets.push(offset);
        }
        for index in 0..device.num_irqs.min(IrqIndex::ALL.len() as u32) {
            let irq = pci.read_irq_info(index)?;
            pci.info.irqs.push(irq);
        }
        Ok(pci)
    }

    fn read_region_info(&self, index: u32) -> DeviceResult<(RegionInfo, u64)> {
        let call = "DEVICE_GET_REGION_INFO";
        let fixed = size_of::<uapi::RegionInfo>() as u32;
        let ask = |argsz| raw::region_info(self.shared.fd.as_fd(), index, argsz);
        let first = self.shared.call(call, || ask(fixed));
        let mut bytes = match first {
            // An index that the device does not have.
            Err(error) if error.errno() == Some(libc::EINVAL) => return Ok(Default::default()),
            other => other?,
        };
        let short = || broke(call, format!("{} bytes", bytes.len()));
        let head = raw::region_info_head(&bytes).ok_or_else(short)?;
        if head.argsz > fixed {
            // The capabilities did not fit.
            bytes = self.shared.call(call, || ask(head.argsz.min(REGION_INFO_BYTES_MAX)))?;
        }
        let (info, offset) = region_info(&bytes).ok_or_else(|| broke(call, "no bytes".into()))?;
        // Offsets are file offsets: the kernel's type for those is signed.
        let end = offset.checked_add(info.size);
        if end.is_none_or(|end| i64::try_from(end).is_err()) {
            let what = format!("region {index} at {offset:#x} of {:#x} bytes", info.size);
            return Err(broke(call, what));
        }
        Ok((info, offset))
    }

    fn read_irq_info(&self, index: u32) -> DeviceResult<IrqInfo> {
        let call = "DEVICE_GET_IRQ_INFO";
        match self.shared.call(call, || raw::irq_info(self.shared.fd.as_fd(), index)) {
            Ok(info) => Ok(IrqInfo {
                count: info.count,
                eventfd: info.flags & VFIO_IRQ_INFO_EVENTFD != 0,
                maskable: info.flags & VFIO_IRQ_INFO_MASKABLE != 0,
                automasked: info.flags & VFIO_IRQ_INFO_AUTOMASKED != 0,
            }),
            // An index that the device does not have.
            Err(error) if error.errno() == Some(libc::EINVAL) => Ok(IrqInfo::default()),
            Err(error) => Err(error),
        }
    }

    /// Where an access starts in the device's file.
    fn place(&self, call: &'static str, region: u32, offset: u64, len: usize) -> DeviceResult<u64> {
        let info = self.info.regions.get(region as usize);
        let start = self.offsets.get(region as usize);
        let end = offset.checked_add(len as u64);
        match (info, start, end) {
            (Some(info), Some(start), Some(end)) if end <= info.size => Ok(start + offset),
            _ => {
                let why = format!("{offset:#x} +{len:#x} is not inside of region {region}");
                Err(DeviceError::Refused { call, errno: libc::EINVAL, why })
            }
        }
    }

    fn set_irqs(&self, make: impl FnOnce(BorrowedFd<'_>) -> io::Result<()>) -> DeviceResult<()> {
        self.shared.call("SET_IRQS", || make(self.shared.fd.as_fd()))
    }
}

/// What the bytes of a region information say, and where the region starts in the device's file.
fn region_info(bytes: &[u8]) -> Option<(RegionInfo, u64)> {
    let head = raw::region_info_head(bytes)?;
    let mmap = head.flags & VFIO_REGION_INFO_FLAG_MMAP != 0;
    let areas = match head.flags & VFIO_REGION_INFO_FLAG_CAPS {
        0 => None,
        _ => chain::sparse_mmap(bytes, head.cap_offset, head.size),
    };
    let whole = || vec![MmapArea { offset: 0, size: head.size }];
    let flags = RegionFlags {
        read: head.flags & VFIO_REGION_INFO_FLAG_READ != 0,
        write: head.flags & VFIO_REGION_INFO_FLAG_WRITE != 0,
        mmap,
    };
    let mmap = if mmap { areas.unwrap_or_else(whole) } else { Vec::new() };
    Some((RegionInfo { size: head.size, flags, mmap }, head.offset))
}

impl PciFunction for KernelPci {
    fn info(&self) -> &PciFunctionInfo {
        &self.info
    }

    fn region_read(&self, region: u32, offset: u64, data: &mut [u8]) -> DeviceResult<()> {
        let call = "REGION_READ";
        let mut at = self.place(call, region, offset, data.len())?;
        let _under_way = self.shared.watch.begin(call);
        let mut rest = data;
        while !rest.is_empty() {
            let got = transfer(call, || raw::pread(self.shared.fd.as_fd(), rest, at))?;
            at += got as u64;
            rest = rest.get_mut(got..).unwrap_or_default();
        }
        Ok(())
    }

    fn region_write(&self, region: u32, offset: u64, data: &[u8]) -> DeviceResult<()> {
        let call = "REGION_WRITE";
        let mut at = self.place(call, region, offset, data.len())?;
        let _under_way = self.shared.watch.begin(call);
        let mut rest = data;
        while !rest.is_empty() {
            let put = transfer(call, || raw::pwrite(self.shared.fd.as_fd(), rest, at))?;
            at += put as u64;
            rest = rest.get(put..).unwrap_or_default();
        }
        Ok(())
    }

    fn region_fd(&self, region: u32) -> Option<(BorrowedFd<'_>, u64)> {
        let info = self.info.regions.get(region as usize)?;
        let offset = self.offsets.get(region as usize)?;
        info.flags.mmap.then_some((self.shared.fd.as_fd(), *offset))
    }

    fn set_irq_eventfds(
        &self,
        index: IrqIndex,
        start: u32,
        eventfds: &[Option<BorrowedFd<'_>>],
    ) -> DeviceResult<()> {
        let (action, index) = (VFIO_IRQ_SET_ACTION_TRIGGER, index as u32);
        match (eventfds, start) {
            ([], 0) => self.set_irqs(|device| raw::set_irqs_none(device, action, index, 0, 0)),
            ([], _) => Err(DeviceError::Errno { call: "SET_IRQS", errno: libc::EINVAL }),
            _ => self
                .set_irqs(|device| raw::set_irqs_eventfds(device, action, index, start, eventfds)),
        }
    }

    fn set_irq_masked(&self, index: IrqIndex, vector: u32, masked: bool) -> DeviceResult<()> {
        let action = if masked { VFIO_IRQ_SET_ACTION_MASK } else { VFIO_IRQ_SET_ACTION_UNMASK };
        self.set_irqs(|device| raw::set_irqs_none(device, action, index as u32, vector, 1))
    }

    fn dma_map(
        &self,
        iova: u64,
        size: u64,
        permissions: DmaPermissions,
        backing: DmaBacking,
    ) -> DeviceResult<()> {
        let call = "DMA_MAP";
        let DmaBacking::Fd { fd, offset } = backing else {
            let why = "a kernel device reaches memory that is a file, and no calls".into();
            return Err(DeviceError::Refused { call, errno: libc::EOPNOTSUPP, why });
        };
        let _under_way = self.shared.watch.begin(call);
        let mut mapped = self.shared.mapped();
        if mapped.contains(&(iova, size)) {
            let why = format!("{iova:#x} +{size:#x} is mapped already");
            return Err(DeviceError::Refused { call, errno: libc::EEXIST, why });
        }
        self.shared.space.map(iova, size, permissions, &fd, offset)?;
        mapped.push((iova, size));
        Ok(())
    }

    fn dma_unmap(&self, iova: u64, size: u64) -> DeviceResult<()> {
        let call = "DMA_UNMAP";
        let _under_way = self.shared.watch.begin(call);
        let mut mapped = self.shared.mapped();
        let Some(at) = mapped.iter().position(|&there| there == (iova, size)) else {
            let why = format!("{iova:#x} +{size:#x} is not a mapping of this device");
            return Err(DeviceError::Refused { call, errno: libc::ENOENT, why });
        };
        self.shared.space.unmap(iova, size)?;
        mapped.swap_remove(at);
        Ok(())
    }

    fn reset_function(&self) -> DeviceResult<()> {
        self.shared.reset()
    }
}

/// One read or write of a region that goes on where a signal interrupted it. Nothing transferred is no answer
/// inside of a region.
fn transfer(
    call: &'static str,
    mut make: impl FnMut() -> io::Result<usize>,
) -> DeviceResult<usize> {
    loop {
        match make() {
            Ok(0) => return Err(broke(call, "no bytes inside of the region".into())),
            Ok(count) => return Ok(count),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(crate::device_error(call, error)),
        }
    }
}

pub(crate) fn broke(call: &'static str, what: String) -> DeviceError {
    DeviceError::Protocol { call, what }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use zerocopy::IntoBytes;

    use super::*;

    fn head(flags: u32, cap_offset: u32) -> uapi::RegionInfo {
        let (size, offset) = (0x4000, 1 << 40);
        uapi::RegionInfo { argsz: 32, flags, index: 0, cap_offset, size, offset }
    }

    #[test]
    fn a_region_says_how_it_is_reached_and_which_parts_may_be_mapped() {
        let read_write = VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE;
        let whole = vec![MmapArea { offset: 0, size: 0x4000 }];
        let cases = [
            (head(read_write, 0), (true, true, false), vec![]),
            (head(VFIO_REGION_INFO_FLAG_READ, 0), (true, false, false), vec![]),
            (head(read_write | VFIO_REGION_INFO_FLAG_MMAP, 0), (true, true, true), whole.clone()),
            // A chain that leads nowhere is none.
            (
                head(read_write | VFIO_REGION_INFO_FLAG_MMAP | VFIO_REGION_INFO_FLAG_CAPS, 999),
                (true, true, true),
                whole,
            ),
        ];
        for (head, (read, write, mmap), areas) in cases {
            let (info, offset) = region_info(head.as_bytes()).unwrap();
            assert_eq!(info.flags, RegionFlags { read, write, mmap });
            assert_eq!((info.size, offset, info.mmap), (0x4000, 1 << 40, areas));
        }
        assert_eq!(region_info(&[0; 31]), None);
    }

    proptest! {
        #[test]
        fn no_region_information_makes_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            if let Some((info, _)) = region_info(&bytes) {
                for area in info.mmap {
                    prop_assert!(area.offset.checked_add(area.size).is_some_and(|end| end <= info.size));
                }
            }
        }
    }
}
