//! The device as the engine drives it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vfio_migration::arcs::{SessionEffect, session_effect};
use vfio_migration::{
    DeviceCapabilities, DeviceError, DeviceResult, DeviceState, DmaRange, MigratableDevice,
    MigrationFlags, PrecopyInfo, RawPrecopyInfo, ReadOutcome, path,
};
use zerocopy::{FromBytes, IntoBytes};

use crate::device::{DirtySource, Shared};
use crate::device_error;
use crate::logging::{Log, REPORT, START, STOP};
use crate::pci::broke;
use crate::raw;
use crate::raw::uapi::{self, *};
use crate::space::Translation;

const GET_STATE: &str = "GET MIG_DEVICE_STATE";
const SET_STATE: &str = "SET MIG_DEVICE_STATE";
const PRECOPY_INFO: &str = "PRECOPY_INFO";
const READ: &str = "read of the data fd";
const WRITE: &str = "write of the data fd";

/// Where a device of the lab's test driver shows its digest, in its folder of sysfs.
const DIGEST_FILE: &str = "ferrydev/state_digest";

/// The migration side of a device; see [`KernelDevice::migration`](crate::KernelDevice::migration).
///
/// The data fd of the session is kept inside ([`data_fd`](MigratableDevice::data_fd) lends it). It is closed
/// when the session ends, after any failed SET (X10), after a failed write, and after a reset, also one that
/// came through the function side (X9).
pub struct KernelMigration {
    shared: Arc<Shared>,
    capabilities: DeviceCapabilities,
    dirty_source: DirtySource,
    /// The state, as far as known; `None` after anything that may have changed it unseen.
    state: Option<DeviceState>,
    data_fd: Option<OwnedFd>,
    log: Option<Log>,
    resets_seen: u64,
}

impl KernelMigration {
    pub(crate) fn open(shared: Arc<Shared>) -> DeviceResult<Self> {
        let (capabilities, dirty_source) = probe(&shared)?;
        let resets_seen = shared.resets.load(Ordering::Acquire);
        let mut device = Self {
            shared,
            capabilities,
            dirty_source,
            state: None,
            data_fd: None,
            log: None,
            resets_seen,
        };
        let state = device.state()?;
        if !device.capabilities.reset_runs && state == DeviceState::Running {
            // Some mediated devices can be reset and do not say so. Nothing is lost by trying: whoever used the
            // device before is gone.
            device.capabilities.reset_runs = device.reset().is_ok();
        }
        Ok(device)
    }

    /// Who knows which pages the device wrote. [`DeviceCapabilities::dma_logging`] is set unless it is `None`.
    pub fn dirty_source(&self) -> DirtySource {
        self.dirty_source
    }

    /// Sees resets that came through the function side.
    fn notice_resets(&mut self) {
        let resets = self.shared.resets.load(Ordering::Acquire);
        if resets != self.resets_seen {
            self.resets_seen = resets;
            self.data_fd = None;
            self.state = None;
        }
    }

    /// The state, asked where it is not known.
    fn known_state(&mut self) -> DeviceResult<DeviceState> {
        self.notice_resets();
        match self.state {
            Some(state) => Ok(state),
            None => self.state(),
        }
    }

    /// What a completed transition did to the session; `new_fd` is what came with it.
    fn follow(
        &mut self,
        from: Option<DeviceState>,
        to: DeviceState,
        new_fd: Option<OwnedFd>,
    ) -> DeviceResult<()> {
        self.state = Some(to);
        if !has_session(to) {
            if new_fd.is_some() {
                tracing::warn!(device = self.shared.name, state = %to, "an fd came without a session (X1)");
            }
            self.data_fd = None;
            return Ok(());
        }
        if new_fd.is_some() {
            // Where one is held still, its session is over (X9): the old one is closed here.
            self.data_fd = new_fd;
            return Ok(());
        }
        let begins = from.is_some_and(|from| begins_session(from, to, self.capabilities.flags));
        if begins {
            self.data_fd = None;
            return Err(broke(SET_STATE, format!("no data fd came on the way to {to} (X1)")));
        }
        Ok(())
    }

    fn session(&self, call: &'static str) -> DeviceResult<BorrowedFd<'_>> {
        match &self.data_fd {
            Some(fd) => Ok(fd.as_fd()),
            None => Err(DeviceError::Errno { call, errno: libc::ENODEV }),
        }
    }
}

/// A state that has a data fd.
fn has_session(state: DeviceState) -> bool {
    state.is_saving() || state == DeviceState::Resuming
}

/// A session begins with the last arc of the way.
fn begins_session(from: DeviceState, to: DeviceState, flags: MigrationFlags) -> bool {
    let Some(hops) = path(from, to, flags) else { return false };
    let before = hops.iter().rev().nth(1).copied().unwrap_or(from);
    !hops.is_empty()
        && matches!(
            session_effect(before, to),
            SessionEffect::BeginsSaving | SessionEffect::BeginsResuming
        )
}

/// Makes a call again while signals interrupt it.
fn uninterrupted<T>(mut make: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match make() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

/// What a read of the stream means in `state` (S1, S3): 0 and ENOMSG both say "nothing now" while more may
/// come, and an end is only an end in STOP_COPY.
fn read_outcome(state: DeviceState, result: io::Result<usize>) -> DeviceResult<ReadOutcome> {
    let enomsg = |error: &io::Error| error.raw_os_error() == Some(libc::ENOMSG);
    match result {
        Ok(0) if state.is_precopy() => Ok(ReadOutcome::NothingNow),
        Ok(0) => Ok(ReadOutcome::End),
        Ok(count) => Ok(ReadOutcome::Data(count)),
        Err(error) if enomsg(&error) && state.is_precopy() => Ok(ReadOutcome::NothingNow),
        // Taken for the end, it would cut the state off silently.
        Err(error) if enomsg(&error) => {
            Err(broke(READ, format!("ENOMSG in {state}, where the end is 0 (S3)")))
        }
        Err(error) => Err(device_error(READ, error)),
    }
}

/// 64 hexadecimal digits, perhaps with a newline.
fn parse_digest(text: &str) -> Option<[u8; 32]> {
    let digits = text.trim_end();
    if digits.len() != 64 || !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let mut digest = [0; 32];
    for (byte, pair) in digest.iter_mut().zip(digits.as_bytes().chunks_exact(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(digest)
}

fn read_digest(sysfs: &Path) -> DeviceResult<Option<[u8; 32]>> {
    let call = "STATE_DIGEST";
    match std::fs::read_to_string(sysfs.join(DIGEST_FILE)) {
        Ok(text) => match parse_digest(&text) {
            Some(digest) => Ok(Some(digest)),
            None => Err(broke(call, format!("{} bytes that are no digest", text.len()))),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(DeviceError::Io { call, source }),
    }
}

/// The errnos by which kernels and drivers say that they do not have a feature (D3, D6, R1).
fn is_unsupported(error: &DeviceError) -> bool {
    matches!(error.errno(), Some(libc::ENOTTY | libc::EINVAL | libc::EOPNOTSUPP))
}

fn offered(shared: &Shared, index: u16, operation: u32) -> DeviceResult<bool> {
    let probe = || raw::feature_probe(shared.fd.as_fd(), index, operation);
    match shared.call("DEVICE_FEATURE (probe)", probe) {
        Ok(()) => Ok(true),
        Err(error) if is_unsupported(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Probes everything, and opts in to INFOv2 where the kernel has it.
fn probe(shared: &Shared) -> DeviceResult<(DeviceCapabilities, DirtySource)> {
    let call = "MIGRATION";
    let device = shared.fd.as_fd();
    let flags = match shared.call(call, || raw::migration_flags(device)) {
        Ok(flags) => MigrationFlags::from_raw(flags)
            .ok_or_else(|| broke(call, format!("flags {flags:#x} are not a valid set (D2)")))?,
        Err(error) if is_unsupported(&error) => return Err(DeviceError::Unsupported { call }),
        Err(error) => return Err(error),
    };
    let opted_in = flags.pre_copy() && {
        match shared.call("MIG_PRECOPY_INFOv2", || raw::precopy_info_v2(device)) {
            Ok(()) => true,
            // ENOTTY on a kernel without it, EINVAL on one that does not think so of this device (R1).
            Err(error) if is_unsupported(&error) => false,
            Err(error) => return Err(error),
        }
    };
    let get = VFIO_DEVICE_FEATURE_GET;
    let set = VFIO_DEVICE_FEATURE_SET;
    let data_size = offered(shared, VFIO_DEVICE_FEATURE_MIG_DATA_SIZE, get)?;
    let device_logs = offered(shared, VFIO_DEVICE_FEATURE_DMA_LOGGING_START, set)?
        && offered(shared, VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP, set)?
        && offered(shared, VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT, get)?;
    let opened = shared.opened();
    let dirty_source = match opened.translation {
        _ if device_logs => DirtySource::Device,
        Translation::HwptWithDirtyTracking => DirtySource::Iommufd,
        // Of a device behind a real IOMMU type1 knows nothing: to it every page is always dirty.
        Translation::Type1 if opened.mediated && shared.space.has_type1_tracking() => {
            DirtySource::Type1
        }
        _ => DirtySource::None,
    };
    let info = shared.call("DEVICE_GET_INFO", || raw::device_info(device))?;
    let capabilities = DeviceCapabilities {
        flags,
        precopy_info: flags.pre_copy(),
        precopy_info_v2: opted_in,
        data_size,
        dma_logging: dirty_source != DirtySource::None,
        reset_runs: info.flags & VFIO_DEVICE_FLAGS_RESET != 0,
        max_write_bytes: None,
    };
    Ok((capabilities, dirty_source))
}

impl MigratableDevice for KernelMigration {
    fn capabilities(&self) -> DeviceCapabilities {
        self.capabilities
    }

    fn state(&mut self) -> DeviceResult<DeviceState> {
        self.notice_resets();
        let shared = &self.shared;
        let reply = shared.call(GET_STATE, || raw::migration_state(shared.fd.as_fd()))?;
        self.state = DeviceState::from_raw(reply.device_state);
        if !self.state.is_some_and(has_session) {
            self.data_fd = None;
        }
        // Future states are tolerated (F10), but have no name here.
        self.state
            .ok_or_else(|| broke(GET_STATE, format!("state {} is not known", reply.device_state)))
    }

    fn set_state(&mut self, target: DeviceState) -> DeviceResult<()> {
        let shared = Arc::clone(&self.shared);
        let _one_at_a_time = shared.change();
        let from = self.known_state().ok();
        let set = || raw::set_migration_state(shared.fd.as_fd(), target.as_raw());
        match shared.call(SET_STATE, set) {
            Ok(reply) => self.follow(from, target, reply.data_fd),
            Err(error) => {
                self.data_fd = None;
                self.state = None;
                match error.errno() {
                    Some(errno) => {
                        let state = self.state().ok();
                        Err(DeviceError::Transition { target, state, errno })
                    }
                    None => Err(error),
                }
            }
        }
    }

    fn precopy_info(&mut self) -> DeviceResult<PrecopyInfo> {
        let raw = self.precopy_info_raw(RawPrecopyInfo::request())?;
        let opted_in = self.capabilities.precopy_info_v2;
        Ok(PrecopyInfo::from_raw(opted_in, raw.flags, raw.initial_bytes, raw.dirty_bytes))
    }

    fn opt_in_precopy_info_v2(&mut self) -> DeviceResult<()> {
        // Done when the device was opened, where the kernel has it.
        match self.capabilities.precopy_info_v2 {
            true => Ok(()),
            false => Err(DeviceError::Unsupported { call: "MIG_PRECOPY_INFOv2" }),
        }
    }

    fn precopy_info_raw(&mut self, request: RawPrecopyInfo) -> DeviceResult<RawPrecopyInfo> {
        if !self.capabilities.precopy_info {
            return Err(DeviceError::Unsupported { call: PRECOPY_INFO });
        }
        self.notice_resets();
        let RawPrecopyInfo { argsz, flags, initial_bytes, dirty_bytes } = request;
        let ask = uapi::PrecopyInfo { argsz, flags, initial_bytes, dirty_bytes };
        let mut bytes = [0; 24];
        bytes.copy_from_slice(ask.as_bytes());
        let data_fd = self.session(PRECOPY_INFO)?;
        self.shared.call(PRECOPY_INFO, || {
            raw::precopy_info(data_fd, VFIO_MIG_GET_PRECOPY_INFO, &mut bytes)
        })?;
        let short = || broke(PRECOPY_INFO, "no struct".into());
        let answer = uapi::PrecopyInfo::read_from_bytes(&bytes).map_err(|_| short())?;
        Ok(RawPrecopyInfo {
            argsz: answer.argsz,
            flags: answer.flags,
            initial_bytes: answer.initial_bytes,
            dirty_bytes: answer.dirty_bytes,
        })
    }

    fn stop_copy_length(&mut self) -> DeviceResult<u64> {
        let call = "MIG_DATA_SIZE";
        if !self.capabilities.data_size {
            return Err(DeviceError::Unsupported { call });
        }
        let shared = &self.shared;
        shared.call(call, || raw::migration_data_size(shared.fd.as_fd()))
    }

    fn read(&mut self, buf: &mut [u8]) -> DeviceResult<ReadOutcome> {
        let state = self.known_state()?;
        let data_fd = self.session(READ)?;
        if buf.is_empty() {
            return Err(DeviceError::Errno { call: READ, errno: libc::EINVAL });
        }
        let under_way = self.shared.watch.begin(READ);
        let outcome = read_outcome(state, uninterrupted(|| raw::read(data_fd, buf)));
        drop(under_way);
        if outcome.is_err() {
            // A device that failed may have gone to ERROR.
            self.state = None;
        }
        outcome
    }

    fn write(&mut self, buf: &[u8]) -> DeviceResult<usize> {
        self.notice_resets();
        let data_fd = self.session(WRITE)?;
        if buf.is_empty() {
            return Err(DeviceError::Errno { call: WRITE, errno: libc::EINVAL });
        }
        let written = self.shared.call(WRITE, || uninterrupted(|| raw::write(data_fd, buf)));
        match written {
            Ok(count @ 1..) => Ok(count),
            Ok(0) => Err(broke(WRITE, "no byte was taken".into())),
            Err(error) => {
                // What the device took of it is not known, nor where it is now.
                self.data_fd = None;
                self.state = None;
                Err(error)
            }
        }
    }

    fn data_fd(&self) -> Option<BorrowedFd<'_>> {
        self.data_fd.as_ref().map(AsFd::as_fd)
    }

    fn start_dma_logging(&mut self, ranges: &[DmaRange], page_size: u64) -> DeviceResult<u64> {
        if self.dirty_source == DirtySource::None {
            return Err(DeviceError::Unsupported { call: START });
        }
        Log::check_start(self.log.as_ref(), ranges, page_size)?;
        let shared = &self.shared;
        let used = match self.dirty_source {
            DirtySource::Device => {
                let ranges: Vec<DmaLoggingRange> = ranges
                    .iter()
                    .map(|range| DmaLoggingRange { iova: range.iova, length: range.length })
                    .collect();
                shared
                    .call(START, || raw::dma_logging_start(shared.fd.as_fd(), page_size, &ranges))?
            }
            _ => {
                shared.call(START, || shared.space.start_tracking())?;
                page_size
            }
        };
        self.log = Some(Log::new(ranges));
        if !used.is_power_of_two() {
            let _ = self.stop_dma_logging();
            return Err(broke(START, format!("page size {used:#x}")));
        }
        Ok(used)
    }

    fn report_dma_log(
        &mut self,
        range: DmaRange,
        page_size: u64,
        bitmap: &mut [u64],
    ) -> DeviceResult<()> {
        Log::check_report(self.log.as_ref(), &range, page_size, bitmap.len())?;
        let shared = &self.shared;
        let report = shared.call(REPORT, || match self.dirty_source {
            DirtySource::Device => {
                let argsz = (size_of::<FeatureHeader>() + size_of::<DmaLoggingReport>()) as u32;
                let DmaRange { iova, length } = range;
                raw::dma_logging_report(shared.fd.as_fd(), argsz, iova, length, page_size, bitmap)
            }
            _ => shared.space.report(range, page_size, bitmap),
        });
        if report.is_err()
            && let Some(log) = &mut self.log
        {
            log.spoil();
        }
        report
    }

    fn stop_dma_logging(&mut self) -> DeviceResult<()> {
        let shared = &self.shared;
        match self.dirty_source {
            DirtySource::None => Err(DeviceError::Unsupported { call: STOP }),
            // Also without a log of ours: an earlier owner of the device may have left one.
            DirtySource::Device => {
                let stopped = shared.call(STOP, || raw::dma_logging_stop(shared.fd.as_fd()));
                if stopped.is_ok() {
                    self.log = None;
                }
                stopped
            }
            _ if self.log.is_none() => {
                let why = "the log is not running".into();
                Err(DeviceError::Refused { call: STOP, errno: libc::EINVAL, why })
            }
            _ => {
                shared.call(STOP, || shared.space.stop_tracking())?;
                self.log = None;
                Ok(())
            }
        }
    }

    fn reset(&mut self) -> DeviceResult<()> {
        let reset = self.shared.reset();
        self.notice_resets();
        reset
    }

    fn state_digest(&mut self) -> DeviceResult<Option<[u8; 32]>> {
        let _under_way = self.shared.watch.begin("STATE_DIGEST");
        read_digest(&self.shared.sysfs)
    }
}

impl Drop for KernelMigration {
    fn drop(&mut self) {
        // The IOMMU's tracking outlives the device where others share the address space.
        if self.log.is_some()
            && let Err(error) = self.stop_dma_logging()
        {
            tracing::warn!(device = self.shared.name, %error, "dirty tracking not stopped");
        }
    }
}

#[cfg(test)]
mod tests {
    use vfio_migration::DeviceState::*;

    use super::*;

    fn errno(errno: i32) -> io::Result<usize> {
        Err(io::Error::from_raw_os_error(errno))
    }

    #[test]
    fn s1_s3_s8_what_a_read_means_depends_on_the_state() {
        let outcome = |state, result| read_outcome(state, result).map_err(|error| error.errno());
        for state in [PreCopy, PreCopyP2p] {
            assert_eq!(outcome(state, Ok(0)), Ok(ReadOutcome::NothingNow), "{state}");
            assert_eq!(outcome(state, errno(libc::ENOMSG)), Ok(ReadOutcome::NothingNow), "{state}");
            assert_eq!(outcome(state, Ok(5)), Ok(ReadOutcome::Data(5)), "{state}");
        }
        assert_eq!(outcome(StopCopy, Ok(0)), Ok(ReadOutcome::End));
        assert_eq!(outcome(StopCopy, Ok(5)), Ok(ReadOutcome::Data(5)));
        assert_eq!(outcome(StopCopy, errno(libc::ENOMSG)), Err(None), "a broken protocol");
        assert_eq!(outcome(PreCopy, errno(libc::ENODEV)), Err(Some(libc::ENODEV)), "X4");
    }

    #[test]
    fn x1_f12_a_session_begins_with_the_last_arc_only() {
        let all = MigrationFlags::new(true, true);
        let cases = [
            (Running, PreCopy, true),
            (RunningP2p, PreCopyP2p, true),
            (Running, StopCopy, true),
            (Stop, Resuming, true),
            (Resuming, StopCopy, true),
            (PreCopy, Resuming, true),
            (PreCopy, PreCopy, false),
            (PreCopy, PreCopyP2p, false),
            (PreCopy, StopCopy, false),
            (StopCopy, Running, false),
            (Resuming, Running, false),
        ];
        for (from, to, expected) in cases {
            assert_eq!(begins_session(from, to, all), expected, "{from} to {to}");
        }
        assert!(begins_session(Running, StopCopy, MigrationFlags::new(false, false)));
    }

    #[test]
    fn a_digest_is_64_digits_or_none() {
        let digits = "00ff".repeat(16);
        let digest = parse_digest(&format!("{digits}\n")).unwrap();
        assert_eq!((digest[0], digest[1], digest[31]), (0, 255, 255));
        for wrong in ["", "00", &"0g".repeat(32), &"00".repeat(33), &"é".repeat(32)] {
            assert_eq!(parse_digest(wrong), None, "{wrong}");
        }
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(read_digest(folder.path()).unwrap(), None, "no such file");
        std::fs::create_dir(folder.path().join("ferrydev")).unwrap();
        std::fs::write(folder.path().join(DIGEST_FILE), "short").unwrap();
        assert!(read_digest(folder.path()).is_err());
        std::fs::write(folder.path().join(DIGEST_FILE), &digits).unwrap();
        assert_eq!(read_digest(folder.path()).unwrap(), Some(digest));
    }
}
