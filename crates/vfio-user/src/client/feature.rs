//! DEVICE_FEATURE calls, and the probing of what a server has.

use std::time::Duration;

use vfio_migration::{DeviceCapabilities, DeviceError, DeviceResult, MigrationFlags};

use super::connection::{Request, Shared, broke};
use super::pci::malformed;
use crate::codec::Command;
use crate::codec::feature::{
    DMA_LOGGING_REPORT, DMA_LOGGING_START, DMA_LOGGING_STOP, Feature, FeatureOp, FixedData,
    MIG_DATA_SIZE, MIG_PRECOPY_INFO_V2, MIGRATION, MigrationData,
};
use crate::codec::version::MigrationCapabilities;

/// The most data of one command that a server which receives bodies with a single recv() survives, in
/// bytes.
pub(super) const FOREIGN_WRITE_BYTES_MAX: usize = 32_000;

/// GET: the reply's data, `reply_bytes` of it expected.
pub(super) fn get(
    shared: &Shared,
    call: &'static str,
    index: u16,
    data: &[u8],
    reply_bytes: usize,
    timeout: Option<Duration>,
) -> DeviceResult<Vec<u8>> {
    let argsz = Feature::SIZE + reply_bytes.max(data.len());
    feature(shared, call, index, FeatureOp::Get, argsz, data, timeout)
}

/// SET: the reply's data, which most callers drop.
pub(super) fn set(
    shared: &Shared,
    call: &'static str,
    index: u16,
    data: &[u8],
    timeout: Option<Duration>,
) -> DeviceResult<Vec<u8>> {
    feature(shared, call, index, FeatureOp::Set, Feature::SIZE + data.len(), data, timeout)
}

fn feature(
    shared: &Shared,
    call: &'static str,
    index: u16,
    op: FeatureOp,
    argsz: usize,
    data: &[u8],
    timeout: Option<Duration>,
) -> DeviceResult<Vec<u8>> {
    let argsz =
        u32::try_from(argsz).map_err(|_| DeviceError::Errno { call, errno: libc::EMSGSIZE })?;
    let mut fixed = Vec::with_capacity(Feature::SIZE);
    Feature { argsz, index, op }.encode(&mut fixed);
    let command = Command::DEVICE_FEATURE;
    let request = Request { call, command, fixed: &fixed, data, fds: &[], timeout };
    let mut payload = shared.call(request)?.payload;
    let (reply, _) = Feature::decode(&payload).map_err(|error| malformed(call, error))?;
    if (reply.index, reply.op) != (index, op) {
        return Err(broke(call, format!("the reply is to {reply:?}")));
    }
    payload.drain(..Feature::SIZE);
    Ok(payload)
}

/// Parses fixed data of a reply.
pub(super) fn parse<T: FixedData>(call: &'static str, data: &[u8]) -> DeviceResult<T> {
    T::decode(data).map_err(|error| malformed(call, error))
}

/// Whether the server offers an operation. EINVAL and ENOTTY say no (D6).
fn probe(
    shared: &Shared,
    index: u16,
    get: bool,
    set: bool,
    timeout: Option<Duration>,
) -> DeviceResult<bool> {
    let op = FeatureOp::Probe { get, set };
    let call = "DEVICE_FEATURE (probe)";
    match feature(shared, call, index, op, Feature::SIZE, &[], timeout) {
        Ok(_) => Ok(true),
        Err(error) if is_unsupported(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

/// The errnos by which servers say that they do not know a feature.
pub(super) fn is_unsupported(error: &DeviceError) -> bool {
    matches!(
        error,
        DeviceError::Errno { errno: libc::EINVAL | libc::ENOTTY | libc::EOPNOTSUPP, .. }
    )
}

/// Probes everything, and opts in to INFOv2 where that is offered.
pub(super) fn probe_all(
    shared: &Shared,
    announced: &MigrationCapabilities,
    timeout: Option<Duration>,
) -> DeviceResult<DeviceCapabilities> {
    let call = "MIGRATION";
    let flags = match get(shared, call, MIGRATION, &[], size_of::<MigrationData>(), timeout) {
        Ok(data) => parse::<MigrationData>(call, &data)?.flags,
        Err(error) if is_unsupported(&error) => return Err(DeviceError::Unsupported { call }),
        Err(error) => return Err(error),
    };
    let flags = MigrationFlags::from_raw(flags)
        .ok_or_else(|| broke(call, format!("flags {flags:#x} are not a valid set")))?;
    let precopy_info = flags.pre_copy() && announced.precopy_info_command().is_some();
    // Announced or not, what counts is what the server answers.
    let data_size = probe(shared, MIG_DATA_SIZE, true, false, timeout)?;
    let mut precopy_info_v2 =
        precopy_info && { probe(shared, MIG_PRECOPY_INFO_V2, false, true, timeout)? };
    if precopy_info_v2 {
        match set(shared, "MIG_PRECOPY_INFOv2", MIG_PRECOPY_INFO_V2, &[], timeout) {
            Ok(_) => {}
            Err(error) if is_unsupported(&error) => precopy_info_v2 = false,
            Err(error) => return Err(error),
        }
    }
    let mut dma_logging = true;
    for (index, get, set) in [
        (DMA_LOGGING_START, false, true),
        (DMA_LOGGING_STOP, false, true),
        (DMA_LOGGING_REPORT, true, false),
    ] {
        dma_logging = dma_logging && probe(shared, index, get, set, timeout)?;
    }
    let max_write_bytes = match announced.whole_messages {
        true => shared.limits.max_data_xfer_bytes,
        false => shared.limits.max_data_xfer_bytes.min(FOREIGN_WRITE_BYTES_MAX),
    };
    Ok(DeviceCapabilities {
        flags,
        precopy_info,
        precopy_info_v2,
        data_size,
        dma_logging,
        reset_runs: announced.reset_runs,
        max_write_bytes: Some(max_write_bytes),
    })
}
