//! `IOMMU_TEST_CMD`: the mock IOMMU of kernels with CONFIG_IOMMUFD_TEST, so that the layer above it can be
//! tested without hardware. No use outside of tests.

use std::io;
use std::os::fd::BorrowedFd;

use super::memory::bitmap_covers;
use super::uapi::*;
use super::{ioctl_struct, refuse};

/// A mock device bound to the iommufd and attached to a page table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MockDevice {
    /// The mock itself: destroying it detaches and unbinds.
    pub stdev_id: u32,
    /// The page table that was made for it.
    pub hwpt_id: u32,
    /// The device's id, as BIND_IOMMUFD would answer it.
    pub dev_id: u32,
}

/// MOCK_DOMAIN_FLAGS: a mock device on IOAS or HWPT `pt_id`; `flags` may take dirty tracking from it.
pub fn device(iommufd: BorrowedFd<'_>, pt_id: u32, flags: u32) -> io::Result<MockDevice> {
    let mut command = command(IOMMU_TEST_OP_MOCK_DOMAIN_FLAGS, pt_id);
    command.words[3] = flags;
    // SAFETY: the kernel reads and writes the struct.
    unsafe { ioctl_struct(iommufd, IOMMU_TEST_CMD, &mut command) }?;
    let [stdev_id, hwpt_id, dev_id, ..] = command.words;
    Ok(MockDevice { stdev_id, hwpt_id, dev_id })
}

/// MOCK_DOMAIN_REPLACE: attaches the mock `stdev_id` to `pt_id`.
pub fn replace(iommufd: BorrowedFd<'_>, stdev_id: u32, pt_id: u32) -> io::Result<()> {
    let mut command = command(IOMMU_TEST_OP_MOCK_DOMAIN_REPLACE, stdev_id);
    command.words[0] = pt_id;
    // SAFETY: the kernel reads and writes the struct.
    unsafe { ioctl_struct(iommufd, IOMMU_TEST_CMD, &mut command) }.map(drop)
}

/// DIRTY: marks the pages whose bits are set in `bitmap` as written by the device; answers how many were new.
pub fn mark_dirty(
    iommufd: BorrowedFd<'_>,
    hwpt_id: u32,
    iova: u64,
    length: u64,
    page_size: u64,
    bitmap: &[u64],
) -> io::Result<u64> {
    if !bitmap_covers(bitmap, length, page_size) {
        return refuse("the bitmap is too small for the range");
    }
    let mut command = command(IOMMU_TEST_OP_DIRTY, hwpt_id);
    // flags and padding, then iova, length, page_size, uptr, out_nr_dirty.
    for (index, value) in [iova, length, page_size, bitmap.as_ptr() as u64].into_iter().enumerate()
    {
        let at = 2 + 2 * index;
        let halves = value.to_ne_bytes();
        command.words[at] = u32::from_ne_bytes([halves[0], halves[1], halves[2], halves[3]]);
        command.words[at + 1] = u32::from_ne_bytes([halves[4], halves[5], halves[6], halves[7]]);
    }
    // SAFETY: the kernel reads the bitmap and reads and writes the struct.
    unsafe { ioctl_struct(iommufd, IOMMU_TEST_CMD, &mut command) }?;
    let [low, high] = [command.words[10].to_ne_bytes(), command.words[11].to_ne_bytes()];
    Ok(u64::from_ne_bytes([low[0], low[1], low[2], low[3], high[0], high[1], high[2], high[3]]))
}

fn command(op: u32, id: u32) -> IommuTestCmd {
    // The kernel's struct ends with `last` and padding; both are part of its size.
    IommuTestCmd { size: size_of::<IommuTestCmd>() as u32, op, id, ..Default::default() }
}
