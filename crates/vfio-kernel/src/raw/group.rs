//! Group and container, and the type1 IOMMU of the container.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use zerocopy::{FromBytes, IntoBytes};

use super::memory::{FileMapping, bitmap_covers};
use super::uapi::*;
use super::{check, ioctl_bytes, ioctl_struct, ioctl_value, refuse};

/// VFIO_GET_API_VERSION on a container.
pub fn api_version(container: BorrowedFd<'_>) -> io::Result<i32> {
    ioctl_value(container, VFIO_GET_API_VERSION, 0)
}

/// VFIO_CHECK_EXTENSION on a container.
pub fn check_extension(container: BorrowedFd<'_>, extension: u32) -> io::Result<bool> {
    ioctl_value(container, VFIO_CHECK_EXTENSION, extension.into()).map(|answer| answer > 0)
}

/// VFIO_SET_IOMMU on a container that has a group.
pub fn set_iommu(container: BorrowedFd<'_>, iommu: u32) -> io::Result<()> {
    ioctl_value(container, VFIO_SET_IOMMU, iommu.into()).map(drop)
}

/// VFIO_GROUP_GET_STATUS: the flags.
pub fn group_status(group: BorrowedFd<'_>) -> io::Result<u32> {
    let mut status = GroupStatus { argsz: size_of::<GroupStatus>() as u32, flags: 0 };
    // SAFETY: the kernel writes at most the `argsz` bytes that are there.
    unsafe { ioctl_struct(group, VFIO_GROUP_GET_STATUS, &mut status) }?;
    Ok(status.flags)
}

/// VFIO_GROUP_SET_CONTAINER.
pub fn group_set_container(group: BorrowedFd<'_>, container: BorrowedFd<'_>) -> io::Result<()> {
    let mut fd = container.as_raw_fd();
    // SAFETY: the kernel reads one int.
    unsafe { ioctl_struct(group, VFIO_GROUP_SET_CONTAINER, &mut fd) }.map(drop)
}

/// VFIO_GROUP_GET_DEVICE_FD: opens the device of that name (PCI address or mdev UUID).
pub fn group_device_fd(group: BorrowedFd<'_>, name: &CStr) -> io::Result<OwnedFd> {
    let command = VFIO_GROUP_GET_DEVICE_FD as libc::Ioctl;
    // SAFETY: the kernel reads a string that ends with 0.
    let fd = check(unsafe { libc::ioctl(group.as_raw_fd(), command, name.as_ptr()) })?;
    // SAFETY: the kernel just made this fd for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// VFIO_IOMMU_GET_INFO with `argsz` bytes, at least the fixed part: the bytes that came, capabilities
/// included. The reply's own `argsz` says how many it wanted.
pub fn type1_info(container: BorrowedFd<'_>, argsz: u32) -> io::Result<Vec<u8>> {
    let len = (argsz as usize).max(size_of::<Type1Info>());
    let mut buffer = vec![0u64; len.div_ceil(8)];
    let bytes = buffer.as_mut_slice().as_mut_bytes();
    let request = Type1Info { argsz: len as u32, ..Default::default() };
    bytes[..size_of::<Type1Info>()].copy_from_slice(request.as_bytes());
    // SAFETY: the kernel writes at most the `argsz` bytes that are there.
    unsafe { ioctl_bytes(container, VFIO_IOMMU_GET_INFO, &mut buffer) }?;
    let mut bytes = buffer.as_slice().as_bytes().to_vec();
    bytes.truncate(len);
    Ok(bytes)
}

/// The fixed part of what [`type1_info`] read.
pub fn type1_info_head(bytes: &[u8]) -> Option<Type1Info> {
    Type1Info::read_from_prefix(bytes).ok().map(|(head, _)| head)
}

/// VFIO_IOMMU_MAP_DMA: `memory` as a whole at `iova`. It has to live until it is unmapped or the container is
/// closed; the kernel keeps the pages, and the address, until then.
pub fn type1_map(
    container: BorrowedFd<'_>,
    flags: u32,
    memory: &FileMapping,
    iova: u64,
) -> io::Result<()> {
    let argsz = size_of::<Type1DmaMap>() as u32;
    let (vaddr, size) = (memory.address(), memory.len());
    let mut map = Type1DmaMap { argsz, flags, vaddr, iova, size };
    // SAFETY: the kernel reads the struct. What devices write goes to the pages of the mapped file, which is
    // shared memory that no Rust reference of this mapping leads to.
    unsafe { ioctl_struct(container, VFIO_IOMMU_MAP_DMA, &mut map) }.map(drop)
}

/// VFIO_IOMMU_UNMAP_DMA: how many bytes were unmapped.
pub fn type1_unmap(container: BorrowedFd<'_>, iova: u64, size: u64) -> io::Result<u64> {
    let argsz = size_of::<Type1DmaUnmap>() as u32;
    let mut unmap = Type1DmaUnmap { argsz, flags: 0, iova, size };
    // SAFETY: the kernel reads and writes the struct; no bitmap is asked for.
    unsafe { ioctl_struct(container, VFIO_IOMMU_UNMAP_DMA, &mut unmap) }?;
    Ok(unmap.size)
}

/// VFIO_IOMMU_DIRTY_PAGES, START or STOP.
pub fn type1_dirty_tracking(container: BorrowedFd<'_>, on: bool) -> io::Result<()> {
    let flags = match on {
        true => VFIO_IOMMU_DIRTY_PAGES_FLAG_START,
        false => VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP,
    };
    let mut control = Type1DirtyBitmap { argsz: size_of::<Type1DirtyBitmap>() as u32, flags };
    // SAFETY: the kernel reads the struct.
    unsafe { ioctl_struct(container, VFIO_IOMMU_DIRTY_PAGES, &mut control) }.map(drop)
}

/// VFIO_IOMMU_DIRTY_PAGES, GET_BITMAP, which also clears. `bitmap` must have room for the bits of `size` at
/// `page_size`; else `InvalidInput`, and nothing is called.
pub fn type1_dirty_bitmap(
    container: BorrowedFd<'_>,
    iova: u64,
    size: u64,
    page_size: u64,
    bitmap: &mut [u64],
) -> io::Result<()> {
    if !bitmap_covers(bitmap, size, page_size) {
        return refuse("the bitmap is too small for the range");
    }
    let mut get = Type1DirtyBitmapGet {
        head: Type1DirtyBitmap {
            argsz: size_of::<Type1DirtyBitmapGet>() as u32,
            flags: VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP,
        },
        iova,
        size,
        bitmap_pgsize: page_size,
        bitmap_size: size_of_val(bitmap) as u64,
        bitmap_data: bitmap.as_mut_ptr() as u64,
    };
    // SAFETY: the kernel reads the struct and writes at most `bitmap_size` bytes to the borrowed bitmap.
    unsafe { ioctl_struct(container, VFIO_IOMMU_DIRTY_PAGES, &mut get) }.map(drop)
}
