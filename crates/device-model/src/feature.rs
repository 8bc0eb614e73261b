//! `VFIO_DEVICE_FEATURE` with the checks the kernel core makes for drivers.
//!
//! A kernel driver never sees a request that Linux' `vfio_ioctl_device_feature` refuses. This is that
//! front door for software devices (rules D3 to D6), so that whoever exposes one by ioctl-like calls
//! answers as the kernel does. The session number stands where the kernel puts the data_fd.

use vfio_migration::{DeviceError, DeviceState, DmaRange};

use crate::core::{DeviceCore, Session};

/// GET, in the flags.
pub const GET: u32 = 1 << 16;
/// SET, in the flags.
pub const SET: u32 = 1 << 17;
/// PROBE, in the flags.
pub const PROBE: u32 = 1 << 18;
const INDEX_MASK: u32 = 0xffff;

/// Index of MIGRATION.
pub const MIGRATION: u32 = 1;
/// Index of MIG_DEVICE_STATE.
pub const MIG_DEVICE_STATE: u32 = 2;
/// Index of DMA_LOGGING_START.
pub const DMA_LOGGING_START: u32 = 6;
/// Index of DMA_LOGGING_STOP.
pub const DMA_LOGGING_STOP: u32 = 7;
/// Index of DMA_LOGGING_REPORT.
pub const DMA_LOGGING_REPORT: u32 = 8;
/// Index of MIG_DATA_SIZE.
pub const MIG_DATA_SIZE: u32 = 9;
/// Index of MIG_PRECOPY_INFOv2.
pub const MIG_PRECOPY_INFO_V2: u32 = 12;

/// Bytes of `argsz` and `flags`.
const HEADER_BYTES: u32 = 8;

/// `struct vfio_device_feature`, and what its payload points to.
#[derive(Debug)]
pub struct Request<'a> {
    /// Size of the whole struct in bytes, as the caller claims it.
    pub argsz: u32,
    /// Feature index, [`GET`], [`SET`], [`PROBE`].
    pub flags: u32,
    /// The payload; bytes beyond `argsz` do not count.
    pub data: &'a [u8],
    /// What `ranges` of DMA_LOGGING_START points to.
    pub ranges: &'a [DmaRange],
    /// What `bitmap` of DMA_LOGGING_REPORT points to.
    pub bitmap: &'a mut [u64],
}

/// What the caller gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// 0, or the errno.
    pub result: Result<(), i32>,
    /// The payload as it is after the call.
    pub data: Vec<u8>,
    /// The session that a SET handed out.
    pub session: Option<Session>,
}

/// Answers one request.
pub fn device_feature(core: &mut DeviceCore, request: Request<'_>, now_ns: u64) -> Answer {
    let Request { argsz, flags, data, ranges, bitmap } = request;
    let room = argsz.saturating_sub(HEADER_BYTES) as usize;
    let payload = data.get(..room).unwrap_or(data);
    let mut answer = Answer { result: Ok(()), data: payload.to_vec(), session: None };
    answer.result = if argsz < HEADER_BYTES
        || flags & !(INDEX_MASK | GET | SET | PROBE) != 0
        || flags & (GET | SET | PROBE) == GET | SET
    {
        Err(libc::EINVAL)
    } else {
        match flags & INDEX_MASK {
            MIGRATION => migration(core, flags, &mut answer),
            MIG_DEVICE_STATE => device_state(core, flags, &mut answer, now_ns),
            DMA_LOGGING_START => logging_start(core, flags, &mut answer, ranges),
            DMA_LOGGING_STOP => logging_stop(core, flags, &answer),
            DMA_LOGGING_REPORT => logging_report(core, flags, &answer, bitmap),
            MIG_DATA_SIZE => data_size(core, flags, &mut answer),
            MIG_PRECOPY_INFO_V2 => precopy_info_v2(core, flags),
            _ => Err(libc::ENOTTY),
        }
    };
    answer
}

/// `vfio_check_feature`: `true` to go on, `false` for a PROBE that succeeded.
fn check(flags: u32, payload_bytes: usize, operations: u32, min_bytes: usize) -> Result<bool, i32> {
    if flags & (GET | SET) & !operations != 0 {
        return Err(libc::EINVAL);
    }
    if flags & PROBE != 0 {
        return Ok(false);
    }
    if flags & (GET | SET) == 0 || payload_bytes < min_bytes {
        return Err(libc::EINVAL);
    }
    Ok(true)
}

fn migratable(core: &DeviceCore) -> Result<(), i32> {
    if core.quirks().no_migration { Err(libc::ENOTTY) } else { Ok(()) }
}

fn migration(core: &DeviceCore, flags: u32, answer: &mut Answer) -> Result<(), i32> {
    migratable(core)?;
    if check(flags, answer.data.len(), GET, 8)? {
        put(&mut answer.data, 0, &core.capabilities().flags.as_raw().to_le_bytes());
    }
    Ok(())
}

fn device_state(
    core: &mut DeviceCore,
    flags: u32,
    answer: &mut Answer,
    now_ns: u64,
) -> Result<(), i32> {
    migratable(core)?;
    if !check(flags, answer.data.len(), GET | SET, 8)? {
        return Ok(());
    }
    put(&mut answer.data, 4, &(-1i32).to_le_bytes());
    if flags & GET != 0 {
        put(&mut answer.data, 0, &core.state().as_raw().to_le_bytes());
        return Ok(());
    }
    let target = DeviceState::from_raw(word(&answer.data, 0)).ok_or(libc::EINVAL)?;
    let outcome = core.set_state(target, now_ns).map_err(errno_of)?;
    if let Some(session) = outcome.session {
        let number = i32::try_from(session.number).unwrap_or(i32::MAX);
        put(&mut answer.data, 4, &number.to_le_bytes());
    }
    answer.session = outcome.session;
    Ok(())
}

fn data_size(core: &mut DeviceCore, flags: u32, answer: &mut Answer) -> Result<(), i32> {
    migratable(core)?;
    if !core.capabilities().data_size {
        return Err(libc::ENOTTY);
    }
    if check(flags, answer.data.len(), GET, 8)? {
        let length = core.stop_copy_length().map_err(errno_of)?;
        put(&mut answer.data, 0, &length.to_le_bytes());
    }
    Ok(())
}

/// The check for PRE_COPY comes before the one for PROBE (Linux 7.2, R1).
fn precopy_info_v2(core: &mut DeviceCore, flags: u32) -> Result<(), i32> {
    if migratable(core).is_err() || !core.capabilities().flags.pre_copy() {
        return Err(libc::EINVAL);
    }
    if !core.offers_precopy_info_v2() {
        return Err(libc::ENOTTY);
    }
    if check(flags, 0, SET, 0)? {
        core.opt_in_precopy_info_v2().map_err(errno_of)?;
    }
    Ok(())
}

fn logs(core: &DeviceCore) -> Result<(), i32> {
    match core.capabilities().dma_logging && migratable(core).is_ok() {
        true => Ok(()),
        false => Err(libc::ENOTTY),
    }
}

fn logging_start(
    core: &mut DeviceCore,
    flags: u32,
    answer: &mut Answer,
    ranges: &[DmaRange],
) -> Result<(), i32> {
    logs(core)?;
    if !check(flags, answer.data.len(), SET, 24)? {
        return Ok(());
    }
    let (page_size, claimed) = (long(&answer.data, 0), word(&answer.data, 8) as usize);
    if claimed > crate::dma_log::RANGES_MAX {
        return Err(libc::E2BIG);
    }
    // The caller's pointer must hold what it claims.
    let ranges = ranges.get(..claimed).ok_or(libc::EFAULT)?;
    let used = core.start_dma_logging(ranges, page_size).map_err(errno_of)?;
    put(&mut answer.data, 0, &used.to_le_bytes());
    Ok(())
}

fn logging_stop(core: &mut DeviceCore, flags: u32, answer: &Answer) -> Result<(), i32> {
    logs(core)?;
    if check(flags, answer.data.len(), SET, 0)? {
        core.stop_dma_logging().map_err(errno_of)?;
    }
    Ok(())
}

fn logging_report(
    core: &mut DeviceCore,
    flags: u32,
    answer: &Answer,
    bitmap: &mut [u64],
) -> Result<(), i32> {
    logs(core)?;
    if !check(flags, answer.data.len(), GET, 32)? {
        return Ok(());
    }
    let range = DmaRange { iova: long(&answer.data, 0), length: long(&answer.data, 8) };
    core.report_dma_log(range, long(&answer.data, 16), bitmap).map_err(errno_of)
}

fn errno_of(error: DeviceError) -> i32 {
    error.errno().unwrap_or(libc::EIO)
}

fn put(data: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(slot) = data.get_mut(at..at + bytes.len()) {
        slot.copy_from_slice(bytes);
    }
}

fn word(data: &[u8], at: usize) -> u32 {
    let bytes = data.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
    u32::from_le_bytes(bytes.unwrap_or_default())
}

fn long(data: &[u8], at: usize) -> u64 {
    let bytes = data.get(at..at + 8).and_then(|bytes| bytes.try_into().ok());
    u64::from_le_bytes(bytes.unwrap_or_default())
}
