//! The device fd: features, regions, interrupts, reset, binding to an iommufd.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use zerocopy::{FromBytes, IntoBytes};

use super::memory::bitmap_covers;
use super::uapi::{self, *};
use super::{check, ioctl_bytes, ioctl_struct, ioctl_value, refuse};

/// More than any feature's fixed part has, in bytes: the kernel may write beyond what the caller cares for.
const FEATURE_ROOM: usize = 4096;

/// VFIO_DEVICE_FEATURE with `argsz` and `flags` as given, `payload` after them. The payload is replaced by
/// what the kernel left in its place, after a failure too (F11).
///
/// The buffer behind is always large enough, whatever `argsz` says. GET of DMA_LOGGING_REPORT is refused
/// with `InvalidInput`, because it writes through a pointer: see [`dma_logging_report`]. A pointer in the
/// payload of any other known feature is only read through.
pub fn feature(
    device: BorrowedFd<'_>,
    argsz: u32,
    flags: u32,
    payload: &mut [u8],
) -> io::Result<()> {
    let index = (flags & VFIO_DEVICE_FEATURE_MASK) as u16;
    let probes = flags & VFIO_DEVICE_FEATURE_PROBE != 0;
    if index == VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT && !probes {
        return refuse("DMA_LOGGING_REPORT has a function of its own");
    }
    feature_unchecked(device, argsz, flags, payload)
}

fn feature_unchecked(
    device: BorrowedFd<'_>,
    argsz: u32,
    flags: u32,
    payload: &mut [u8],
) -> io::Result<()> {
    let header = FeatureHeader { argsz, flags };
    let mut buffer = vec![0u64; (payload.len() + FEATURE_ROOM).div_ceil(8)];
    let bytes = buffer.as_mut_slice().as_mut_bytes();
    bytes[..8].copy_from_slice(header.as_bytes());
    bytes[8..8 + payload.len()].copy_from_slice(payload);
    // SAFETY: the buffer has room for every feature's struct; the only feature that writes through a
    // pointer is called by `dma_logging_report` alone, which vouches for that pointer.
    let result = unsafe { ioctl_bytes(device, VFIO_DEVICE_FEATURE, &mut buffer) };
    payload.copy_from_slice(&buffer.as_slice().as_bytes()[8..8 + payload.len()]);
    result.map(drop)
}

/// VFIO_DEVICE_FEATURE with a pointer that leads nowhere.
pub fn feature_bad_pointer(device: BorrowedFd<'_>) -> io::Result<()> {
    let command = VFIO_DEVICE_FEATURE as libc::Ioctl;
    // SAFETY: nothing is mapped at the null page, so the kernel can touch nothing of ours.
    check(unsafe { libc::ioctl(device.as_raw_fd(), command, std::ptr::null_mut::<u8>()) }).map(drop)
}

/// PROBE of GET and/or SET (`operation`: the flag bits) of feature `index`.
pub fn feature_probe(device: BorrowedFd<'_>, index: u16, operation: u32) -> io::Result<()> {
    let flags = u32::from(index) | operation | VFIO_DEVICE_FEATURE_PROBE;
    feature(device, size_of::<FeatureHeader>() as u32, flags, &mut [])
}

/// GET MIGRATION: the flags.
pub fn migration_flags(device: BorrowedFd<'_>) -> io::Result<u64> {
    get_u64(device, VFIO_DEVICE_FEATURE_MIGRATION)
}

/// GET MIG_DATA_SIZE.
pub fn migration_data_size(device: BorrowedFd<'_>) -> io::Result<u64> {
    get_u64(device, VFIO_DEVICE_FEATURE_MIG_DATA_SIZE)
}

fn get_u64(device: BorrowedFd<'_>, index: u16) -> io::Result<u64> {
    let mut payload = [0; 8];
    feature(device, 16, u32::from(index) | VFIO_DEVICE_FEATURE_GET, &mut payload)?;
    Ok(u64::from_ne_bytes(payload))
}

/// SET MIG_PRECOPY_INFOv2, which has no payload.
pub fn precopy_info_v2(device: BorrowedFd<'_>) -> io::Result<()> {
    let flags = u32::from(VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFO_V2) | VFIO_DEVICE_FEATURE_SET;
    feature(device, size_of::<FeatureHeader>() as u32, flags, &mut [])
}

/// A reply to MIG_DEVICE_STATE.
#[derive(Debug)]
pub struct MigStateReply {
    /// The state, as a number.
    pub device_state: u32,
    /// The new data fd, if one came.
    pub data_fd: Option<OwnedFd>,
}

/// GET MIG_DEVICE_STATE.
pub fn migration_state(device: BorrowedFd<'_>) -> io::Result<MigStateReply> {
    migration_state_call(device, VFIO_DEVICE_FEATURE_GET, 0)
}

/// SET MIG_DEVICE_STATE to `state`, any number.
pub fn set_migration_state(device: BorrowedFd<'_>, state: u32) -> io::Result<MigStateReply> {
    migration_state_call(device, VFIO_DEVICE_FEATURE_SET, state)
}

/// As [`set_migration_state`], with `data_fd` as a number as it is afterwards, also after a failure (F11).
/// Where it is an fd, the result owns it.
pub fn set_migration_state_fd(
    device: BorrowedFd<'_>,
    state: u32,
) -> (io::Result<Option<OwnedFd>>, i32) {
    // No answer of the kernel's, so that it is seen whether it writes one.
    let mut state = MigState { device_state: state, data_fd: i32::MIN };
    let flags = u32::from(VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE) | VFIO_DEVICE_FEATURE_SET;
    let result = feature(device, 16, flags, state.as_mut_bytes());
    let data_fd = state.data_fd;
    let owned = result.map(|()| match data_fd {
        // SAFETY: the kernel just made this fd for the caller of the successful call, and nobody else knows
        // of it.
        0.. => Some(unsafe { OwnedFd::from_raw_fd(data_fd) }),
        _ => None,
    });
    (owned, data_fd)
}

fn migration_state_call(
    device: BorrowedFd<'_>,
    operation: u32,
    device_state: u32,
) -> io::Result<MigStateReply> {
    let mut state = MigState { device_state, data_fd: -1 };
    let flags = u32::from(VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE) | operation;
    feature(device, 16, flags, state.as_mut_bytes())?;
    let data_fd = match state.data_fd {
        fd if fd >= 0 => {
            // SAFETY: the kernel just made this fd for the caller of the successful call, and nobody else
            // knows of it.
            Some(unsafe { OwnedFd::from_raw_fd(fd) })
        }
        _ => None,
    };
    Ok(MigStateReply { device_state: state.device_state, data_fd })
}

/// DMA_LOGGING_START with `argsz`, numbers and ranges as given (`num_ranges` may differ from how many there
/// are only downwards: the kernel reads that many). Answers the page size in use.
pub fn dma_logging_start(
    device: BorrowedFd<'_>,
    page_size: u64,
    ranges: &[DmaLoggingRange],
) -> io::Result<u64> {
    let num_ranges =
        u32::try_from(ranges.len()).map_err(|_| io::Error::from_raw_os_error(libc::E2BIG))?;
    let ranges = ranges.as_ptr() as u64;
    let mut control = DmaLoggingControl { page_size, num_ranges, reserved: 0, ranges };
    let flags = u32::from(VFIO_DEVICE_FEATURE_DMA_LOGGING_START) | VFIO_DEVICE_FEATURE_SET;
    feature(device, 32, flags, control.as_mut_bytes())?;
    Ok(control.page_size)
}

/// DMA_LOGGING_STOP.
pub fn dma_logging_stop(device: BorrowedFd<'_>) -> io::Result<()> {
    let flags = u32::from(VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP) | VFIO_DEVICE_FEATURE_SET;
    feature(device, size_of::<FeatureHeader>() as u32, flags, &mut [])
}

/// DMA_LOGGING_REPORT with `argsz` and numbers as given. `bitmap` must have room for the bits of `length` at
/// `page_size`, malformed ones included; else `InvalidInput`, and nothing is called.
pub fn dma_logging_report(
    device: BorrowedFd<'_>,
    argsz: u32,
    iova: u64,
    length: u64,
    page_size: u64,
    bitmap: &mut [u64],
) -> io::Result<()> {
    if !bitmap_covers(bitmap, length, page_size) {
        return refuse("the bitmap is too small for the range");
    }
    let bitmap = bitmap.as_mut_ptr() as u64;
    report_call(device, argsz, DmaLoggingReport { iova, length, page_size, bitmap })
}

/// DMA_LOGGING_REPORT with a bitmap pointer that leads nowhere.
pub fn dma_logging_report_bad_pointer(
    device: BorrowedFd<'_>,
    iova: u64,
    length: u64,
    page_size: u64,
) -> io::Result<()> {
    report_call(device, 40, DmaLoggingReport { iova, length, page_size, bitmap: 0 })
}

fn report_call(device: BorrowedFd<'_>, argsz: u32, mut report: DmaLoggingReport) -> io::Result<()> {
    let flags = u32::from(VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT) | VFIO_DEVICE_FEATURE_GET;
    feature_unchecked(device, argsz, flags, report.as_mut_bytes())
}

/// VFIO_DEVICE_RESET.
pub fn reset(device: BorrowedFd<'_>) -> io::Result<()> {
    ioctl_value(device, VFIO_DEVICE_RESET, 0).map(drop)
}

/// VFIO_DEVICE_GET_INFO, the fixed part.
pub fn device_info(device: BorrowedFd<'_>) -> io::Result<uapi::DeviceInfo> {
    let mut info =
        uapi::DeviceInfo { argsz: size_of::<uapi::DeviceInfo>() as u32, ..Default::default() };
    // SAFETY: the kernel writes at most the `argsz` bytes that are there.
    unsafe { ioctl_struct(device, VFIO_DEVICE_GET_INFO, &mut info) }?;
    Ok(info)
}

/// VFIO_DEVICE_GET_REGION_INFO of `index` with `argsz` bytes, at least the fixed part: the bytes that came,
/// capabilities included. The reply's own `argsz` says how many it wanted.
pub fn region_info(device: BorrowedFd<'_>, index: u32, argsz: u32) -> io::Result<Vec<u8>> {
    let len = (argsz as usize).max(size_of::<uapi::RegionInfo>());
    let mut buffer = vec![0u64; len.div_ceil(8)];
    let bytes = buffer.as_mut_slice().as_mut_bytes();
    let request = uapi::RegionInfo { argsz: len as u32, index, ..Default::default() };
    bytes[..size_of::<uapi::RegionInfo>()].copy_from_slice(request.as_bytes());
    // SAFETY: the kernel writes at most the `argsz` bytes that are there.
    unsafe { ioctl_bytes(device, VFIO_DEVICE_GET_REGION_INFO, &mut buffer) }?;
    let mut bytes = buffer.as_slice().as_bytes().to_vec();
    bytes.truncate(len);
    Ok(bytes)
}

/// VFIO_DEVICE_GET_IRQ_INFO of `index`.
pub fn irq_info(device: BorrowedFd<'_>, index: u32) -> io::Result<uapi::IrqInfo> {
    let argsz = size_of::<uapi::IrqInfo>() as u32;
    let mut info = uapi::IrqInfo { argsz, index, ..Default::default() };
    // SAFETY: the kernel writes at most the `argsz` bytes that are there.
    unsafe { ioctl_struct(device, VFIO_DEVICE_GET_IRQ_INFO, &mut info) }?;
    Ok(info)
}

/// VFIO_DEVICE_SET_IRQS without data: `flags` says the action.
pub fn set_irqs_none(
    device: BorrowedFd<'_>,
    flags: u32,
    index: u32,
    start: u32,
    count: u32,
) -> io::Result<()> {
    set_irqs(device, flags | VFIO_IRQ_SET_DATA_NONE, index, start, count, &[])
}

/// VFIO_DEVICE_SET_IRQS with an eventfd, or none, for each vector from `start` on; `flags` says the action.
pub fn set_irqs_eventfds(
    device: BorrowedFd<'_>,
    flags: u32,
    index: u32,
    start: u32,
    eventfds: &[Option<BorrowedFd<'_>>],
) -> io::Result<()> {
    let count =
        u32::try_from(eventfds.len()).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
    let fds: Vec<i32> =
        eventfds.iter().map(|fd| fd.as_ref().map_or(-1, AsRawFd::as_raw_fd)).collect();
    set_irqs(device, flags | VFIO_IRQ_SET_DATA_EVENTFD, index, start, count, fds.as_bytes())
}

fn set_irqs(
    device: BorrowedFd<'_>,
    flags: u32,
    index: u32,
    start: u32,
    count: u32,
    data: &[u8],
) -> io::Result<()> {
    let len = size_of::<IrqSet>() + data.len();
    let argsz = u32::try_from(len).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
    let mut buffer = vec![0u64; len.div_ceil(8)];
    let bytes = buffer.as_mut_slice().as_mut_bytes();
    let head = IrqSet { argsz, flags, index, start, count };
    bytes[..size_of::<IrqSet>()].copy_from_slice(head.as_bytes());
    bytes[size_of::<IrqSet>()..len].copy_from_slice(data);
    // SAFETY: the kernel only reads the argument, whose length it checks against `argsz`.
    unsafe { ioctl_bytes(device, VFIO_DEVICE_SET_IRQS, &mut buffer) }.map(drop)
}

/// VFIO_DEVICE_BIND_IOMMUFD: the device's id in that iommufd.
pub fn bind_iommufd(device: BorrowedFd<'_>, iommufd: BorrowedFd<'_>) -> io::Result<u32> {
    let argsz = size_of::<BindIommufd>() as u32;
    let mut bind = BindIommufd { argsz, flags: 0, iommufd: iommufd.as_raw_fd(), out_devid: 0 };
    // SAFETY: the kernel reads `argsz` bytes and writes the fields among them.
    unsafe { ioctl_struct(device, VFIO_DEVICE_BIND_IOMMUFD, &mut bind) }?;
    Ok(bind.out_devid)
}

/// VFIO_DEVICE_ATTACH_IOMMUFD_PT to an IOAS or HWPT; answers the id of the page table in use.
pub fn attach_iommufd_pt(device: BorrowedFd<'_>, pt_id: u32) -> io::Result<u32> {
    let argsz = size_of::<AttachIommufdPt>() as u32;
    let mut attach = AttachIommufdPt { argsz, flags: 0, pt_id };
    // SAFETY: as in `bind_iommufd`.
    unsafe { ioctl_struct(device, VFIO_DEVICE_ATTACH_IOMMUFD_PT, &mut attach) }?;
    Ok(attach.pt_id)
}

/// VFIO_DEVICE_DETACH_IOMMUFD_PT.
pub fn detach_iommufd_pt(device: BorrowedFd<'_>) -> io::Result<()> {
    let mut detach = DetachIommufdPt { argsz: size_of::<DetachIommufdPt>() as u32, flags: 0 };
    // SAFETY: as in `bind_iommufd`.
    unsafe { ioctl_struct(device, VFIO_DEVICE_DETACH_IOMMUFD_PT, &mut detach) }.map(drop)
}

/// The fixed part of a region information that [`region_info`] read.
pub fn region_info_head(bytes: &[u8]) -> Option<uapi::RegionInfo> {
    uapi::RegionInfo::read_from_prefix(bytes).ok().map(|(head, _)| head)
}
