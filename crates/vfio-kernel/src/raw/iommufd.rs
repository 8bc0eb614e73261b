//! `/dev/iommu`: address spaces, hardware page tables and their dirty tracking.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::memory::{FileMapping, bitmap_covers};
use super::uapi::*;
use super::{ioctl_struct, refuse};

/// IOMMU_DESTROY of any object.
pub fn destroy(iommufd: BorrowedFd<'_>, id: u32) -> io::Result<()> {
    let mut destroy = IommuDestroy { size: size_of::<IommuDestroy>() as u32, id };
    // SAFETY: the kernel reads the struct.
    unsafe { ioctl_struct(iommufd, IOMMU_DESTROY, &mut destroy) }.map(drop)
}

/// IOMMU_IOAS_ALLOC: the id of a new address space.
pub fn ioas_alloc(iommufd: BorrowedFd<'_>) -> io::Result<u32> {
    let mut alloc =
        IommuIoasAlloc { size: size_of::<IommuIoasAlloc>() as u32, ..Default::default() };
    // SAFETY: the kernel reads and writes the struct.
    unsafe { ioctl_struct(iommufd, IOMMU_IOAS_ALLOC, &mut alloc) }?;
    Ok(alloc.out_ioas_id)
}

/// IOMMU_IOAS_IOVA_RANGES: at most `ranges.len()` usable ranges; how many there are in all, and the alignment
/// that mappings need. EMSGSIZE counts as success here: the number says that there are more.
pub fn ioas_iova_ranges(
    iommufd: BorrowedFd<'_>,
    ioas_id: u32,
    ranges: &mut [IommuIovaRange],
) -> io::Result<(u32, u64)> {
    let mut ask = IommuIoasIovaRanges {
        size: size_of::<IommuIoasIovaRanges>() as u32,
        ioas_id,
        num_iovas: u32::try_from(ranges.len()).unwrap_or(u32::MAX),
        reserved: 0,
        allowed_iovas: ranges.as_mut_ptr() as u64,
        out_iova_alignment: 0,
    };
    // SAFETY: the kernel writes the struct and at most `num_iovas` ranges to the borrowed slice.
    match unsafe { ioctl_struct(iommufd, IOMMU_IOAS_IOVA_RANGES, &mut ask) } {
        Err(error) if error.raw_os_error() != Some(libc::EMSGSIZE) => Err(error),
        _ => Ok((ask.num_iovas, ask.out_iova_alignment)),
    }
}

/// IOMMU_IOAS_MAP: `memory` as a whole at `iova`; it has to live until it is unmapped or destroyed.
pub fn ioas_map(
    iommufd: BorrowedFd<'_>,
    ioas_id: u32,
    flags: u32,
    memory: &FileMapping,
    iova: u64,
) -> io::Result<()> {
    let mut map = IommuIoasMap {
        size: size_of::<IommuIoasMap>() as u32,
        flags: flags | IOMMU_IOAS_MAP_FIXED_IOVA,
        ioas_id,
        reserved: 0,
        user_va: memory.address(),
        length: memory.len(),
        iova,
    };
    // SAFETY: the kernel reads the struct. What devices write goes to the pages of the mapped file, which is
    // shared memory that no Rust reference of this mapping leads to.
    unsafe { ioctl_struct(iommufd, IOMMU_IOAS_MAP, &mut map) }.map(drop)
}

/// IOMMU_IOAS_MAP_FILE: `length` bytes of the memfd `file` from `start` on at `iova`. ENOTTY on kernels
/// before 6.14.
pub fn ioas_map_file(
    iommufd: BorrowedFd<'_>,
    ioas_id: u32,
    flags: u32,
    file: BorrowedFd<'_>,
    start: u64,
    length: u64,
    iova: u64,
) -> io::Result<()> {
    let mut map = IommuIoasMapFile {
        size: size_of::<IommuIoasMapFile>() as u32,
        flags: flags | IOMMU_IOAS_MAP_FIXED_IOVA,
        ioas_id,
        fd: file.as_raw_fd(),
        start,
        length,
        iova,
    };
    // SAFETY: the kernel reads the struct and pins pages of the file.
    unsafe { ioctl_struct(iommufd, IOMMU_IOAS_MAP_FILE, &mut map) }.map(drop)
}

/// IOMMU_IOAS_UNMAP: how many bytes were unmapped.
pub fn ioas_unmap(
    iommufd: BorrowedFd<'_>,
    ioas_id: u32,
    iova: u64,
    length: u64,
) -> io::Result<u64> {
    let size = size_of::<IommuIoasUnmap>() as u32;
    let mut unmap = IommuIoasUnmap { size, ioas_id, iova, length };
    // SAFETY: the kernel reads and writes the struct.
    unsafe { ioctl_struct(iommufd, IOMMU_IOAS_UNMAP, &mut unmap) }?;
    Ok(unmap.length)
}

/// IOMMU_OPTION, HUGE_PAGES of an IOAS: off, every page of the host gets an entry of its own.
pub fn ioas_set_huge_pages(iommufd: BorrowedFd<'_>, ioas_id: u32, on: bool) -> io::Result<()> {
    let mut option = IommuOption {
        size: size_of::<IommuOption>() as u32,
        option_id: IOMMU_OPTION_HUGE_PAGES,
        op: IOMMU_OPTION_OP_SET,
        reserved: 0,
        object_id: ioas_id,
        val64: on.into(),
    };
    // SAFETY: the kernel reads and writes the struct.
    unsafe { ioctl_struct(iommufd, IOMMU_OPTION, &mut option) }.map(drop)
}

/// IOMMU_GET_HW_INFO: the capability bits of the IOMMU behind a bound device.
pub fn hw_capabilities(iommufd: BorrowedFd<'_>, dev_id: u32) -> io::Result<u64> {
    let mut info =
        IommuHwInfo { size: size_of::<IommuHwInfo>() as u32, dev_id, ..Default::default() };
    // SAFETY: the kernel writes the struct; no data buffer is given.
    unsafe { ioctl_struct(iommufd, IOMMU_GET_HW_INFO, &mut info) }?;
    Ok(info.out_capabilities)
}

/// IOMMU_HWPT_ALLOC for a bound device on an IOAS; `flags` may ask for dirty tracking, which is then enforced.
pub fn hwpt_alloc(
    iommufd: BorrowedFd<'_>,
    dev_id: u32,
    ioas_id: u32,
    flags: u32,
) -> io::Result<u32> {
    let size = size_of::<IommuHwptAlloc>() as u32;
    let mut alloc = IommuHwptAlloc { size, flags, dev_id, pt_id: ioas_id, ..Default::default() };
    // SAFETY: the kernel reads and writes the struct; no data buffer is given.
    unsafe { ioctl_struct(iommufd, IOMMU_HWPT_ALLOC, &mut alloc) }?;
    Ok(alloc.out_hwpt_id)
}

/// IOMMU_HWPT_SET_DIRTY_TRACKING.
pub fn hwpt_set_dirty_tracking(iommufd: BorrowedFd<'_>, hwpt_id: u32, on: bool) -> io::Result<()> {
    let size = size_of::<IommuHwptSetDirtyTracking>() as u32;
    let flags = if on { IOMMU_HWPT_DIRTY_TRACKING_ENABLE } else { 0 };
    let mut set = IommuHwptSetDirtyTracking { size, flags, hwpt_id, reserved: 0 };
    // SAFETY: the kernel reads the struct.
    unsafe { ioctl_struct(iommufd, IOMMU_HWPT_SET_DIRTY_TRACKING, &mut set) }.map(drop)
}

/// IOMMU_HWPT_GET_DIRTY_BITMAP; `flags` may ask not to clear. `bitmap` must have room for the bits of
/// `length` at `page_size`; else `InvalidInput`, and nothing is called.
pub fn hwpt_get_dirty_bitmap(
    iommufd: BorrowedFd<'_>,
    hwpt_id: u32,
    flags: u32,
    iova: u64,
    length: u64,
    page_size: u64,
    bitmap: &mut [u64],
) -> io::Result<()> {
    if !bitmap_covers(bitmap, length, page_size) {
        return refuse("the bitmap is too small for the range");
    }
    let mut get = IommuHwptGetDirtyBitmap {
        size: size_of::<IommuHwptGetDirtyBitmap>() as u32,
        hwpt_id,
        flags,
        reserved: 0,
        iova,
        length,
        page_size,
        data: bitmap.as_mut_ptr() as u64,
    };
    // SAFETY: the kernel reads the struct and sets bits of the borrowed bitmap, one per page of the range.
    unsafe { ioctl_struct(iommufd, IOMMU_HWPT_GET_DIRTY_BITMAP, &mut get) }.map(drop)
}
