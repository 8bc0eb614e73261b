//! [`MigratableDevice`]: what the migration engine drives.

use std::os::fd::BorrowedFd;

use crate::capability::DeviceCapabilities;
use crate::error::{DeviceError, DeviceResult};
use crate::precopy::{PRECOPY_INFO_REINIT, PrecopyInfo, RawPrecopyInfo};
use crate::state::DeviceState;

/// What a read of the data stream found. The device's state tells "nothing now" from "end": a
/// short read is neither (S1, S3, S8).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadOutcome {
    /// So many bytes were read, at least one.
    Data(usize),
    /// PRE_COPY: nothing to read now (ENOMSG; several drivers answer 0). More may come.
    NothingNow,
    /// STOP_COPY: the whole state was read.
    End,
}

/// A range of IO virtual addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DmaRange {
    /// First address.
    pub iova: u64,
    /// Length in bytes.
    pub length: u64,
}

/// A device that can be migrated. One thread owns it at a time: calls on one device are serialised,
/// because drivers hold one mutex over states, stream and queries, and a query may take as long as a
/// whole SAVE (protocol reference, section 3.2).
///
/// Errors are [`DeviceError`]; after an error of [`set_state`](Self::set_state) the data session is
/// dropped by the implementation (X10), and [`recover`](crate::recovery::recover) says how to go on.
pub trait MigratableDevice: Send {
    /// What was probed when the device was opened.
    fn capabilities(&self) -> DeviceCapabilities;

    /// GET MIG_DEVICE_STATE.
    fn state(&mut self) -> DeviceResult<DeviceState>;

    /// SET MIG_DEVICE_STATE: the transition is complete when this returns (F1). A new data session,
    /// where an arc begins one, is kept inside the device. Setting the current state does nothing (F3).
    fn set_state(&mut self, target: DeviceState) -> DeviceResult<()>;

    /// VFIO_MIG_GET_PRECOPY_INFO; valid in PRE_COPY and PRE_COPY_P2P (P2). On real hardware this
    /// drives the device: it may start the next SAVE.
    fn precopy_info(&mut self) -> DeviceResult<PrecopyInfo>;

    /// SET MIG_PRECOPY_INFOv2: from now on flags are meaningful and REINIT can come; lasts until the device
    /// is closed (R1, R8). A backend that opts in when it opens the device need not offer it again; a
    /// server calls it when its client asks.
    fn opt_in_precopy_info_v2(&mut self) -> DeviceResult<()> {
        Err(DeviceError::Unsupported { call: "MIG_PRECOPY_INFOv2" })
    }

    /// PRECOPY_INFO with the caller's bytes in it, for servers: a device may give parts of `request` back
    /// (P6, P9). Answers the bytes for the client.
    fn precopy_info_raw(&mut self, request: RawPrecopyInfo) -> DeviceResult<RawPrecopyInfo> {
        let info = self.precopy_info()?;
        Ok(RawPrecopyInfo {
            argsz: request.argsz,
            flags: if info.reinit() { PRECOPY_INFO_REINIT } else { 0 },
            initial_bytes: info.initial_bytes(),
            dirty_bytes: info.dirty_bytes(),
        })
    }

    /// MIG_DATA_SIZE: the estimated length to complete stop-copy, in bytes. A claim, possibly garbage (Z3).
    fn stop_copy_length(&mut self) -> DeviceResult<u64>;

    /// Reads the stream of the saving session into `buf`; short reads are legal (S8).
    fn read(&mut self, buf: &mut [u8]) -> DeviceResult<ReadOutcome>;

    /// Writes to the stream of the resuming session; answers how many bytes were taken, at least one.
    /// A byte counts as loaded only when this has returned for it.
    fn write(&mut self, buf: &[u8]) -> DeviceResult<usize>;

    /// As [`read`](Self::read), for who reads on and on: the device may be asked at once for what follows, and `buf` be
    /// exchanged for another of the same length that was filled meanwhile, so that nothing is copied. Nothing of it is
    /// lost: whatever call reads next answers it, as long as the session lasts.
    fn read_ahead(&mut self, buf: &mut Vec<u8>) -> DeviceResult<ReadOutcome> {
        self.read(buf)
    }

    /// As [`write`](Self::write), but may return before the device has taken the bytes in: which of them it has not is
    /// [`unsettled_bytes`](Self::unsettled_bytes). A failure is answered by the next call of the stream, at the latest
    /// by the SET that would end the session, which is then not made.
    fn write_behind(&mut self, buf: &[u8]) -> DeviceResult<usize> {
        self.write(buf)
    }

    /// The last so many bytes that [`write_behind`](Self::write_behind) took are not known to be loaded.
    fn unsettled_bytes(&self) -> u64 {
        0
    }

    /// Waits until all of them are, and answers what went wrong with one.
    fn settle(&mut self) -> DeviceResult<()> {
        Ok(())
    }

    /// The session's data fd, where there is one, to poll.
    fn data_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// DMA_LOGGING_START for `ranges`; `page_size` in bytes is a hint, the used one is returned (L3).
    fn start_dma_logging(&mut self, _ranges: &[DmaRange], _page_size: u64) -> DeviceResult<u64> {
        Err(DeviceError::Unsupported { call: "DMA_LOGGING_START" })
    }

    /// DMA_LOGGING_REPORT: sets bit i of `bitmap` for each dirty page i counted from `range.iova`, and
    /// clears the device's log for the range (L7). Bits already set stay. After an error the log is
    /// corrupt: treat all memory as dirty (L9).
    fn report_dma_log(
        &mut self,
        _range: DmaRange,
        _page_size: u64,
        _bitmap: &mut [u64],
    ) -> DeviceResult<()> {
        Err(DeviceError::Unsupported { call: "DMA_LOGGING_REPORT" })
    }

    /// DMA_LOGGING_STOP.
    fn stop_dma_logging(&mut self) -> DeviceResult<()> {
        Err(DeviceError::Unsupported { call: "DMA_LOGGING_STOP" })
    }

    /// VFIO_DEVICE_RESET: RUNNING, session ended (H5). PCI_COMMAND and interrupts are the VMM's to
    /// set again (H6).
    fn reset(&mut self) -> DeviceResult<()>;

    /// A digest of the device's internal state, made from scratch by whoever implements the device and
    /// never from the migration stream; `None` where the device offers no such side door. Verification
    /// compares both ends with it.
    fn state_digest(&mut self) -> DeviceResult<Option<[u8; 32]>> {
        Ok(None)
    }
}

impl<T: MigratableDevice + ?Sized> MigratableDevice for Box<T> {
    fn capabilities(&self) -> DeviceCapabilities {
        (**self).capabilities()
    }
    fn state(&mut self) -> DeviceResult<DeviceState> {
        (**self).state()
    }
    fn set_state(&mut self, target: DeviceState) -> DeviceResult<()> {
        (**self).set_state(target)
    }
    fn precopy_info(&mut self) -> DeviceResult<PrecopyInfo> {
        (**self).precopy_info()
    }
    fn opt_in_precopy_info_v2(&mut self) -> DeviceResult<()> {
        (**self).opt_in_precopy_info_v2()
    }
    fn precopy_info_raw(&mut self, request: RawPrecopyInfo) -> DeviceResult<RawPrecopyInfo> {
        (**self).precopy_info_raw(request)
    }
    fn stop_copy_length(&mut self) -> DeviceResult<u64> {
        (**self).stop_copy_length()
    }
    fn read(&mut self, buf: &mut [u8]) -> DeviceResult<ReadOutcome> {
        (**self).read(buf)
    }
    fn write(&mut self, buf: &[u8]) -> DeviceResult<usize> {
        (**self).write(buf)
    }
    fn read_ahead(&mut self, buf: &mut Vec<u8>) -> DeviceResult<ReadOutcome> {
        (**self).read_ahead(buf)
    }
    fn write_behind(&mut self, buf: &[u8]) -> DeviceResult<usize> {
        (**self).write_behind(buf)
    }
    fn unsettled_bytes(&self) -> u64 {
        (**self).unsettled_bytes()
    }
    fn settle(&mut self) -> DeviceResult<()> {
        (**self).settle()
    }
    fn data_fd(&self) -> Option<BorrowedFd<'_>> {
        (**self).data_fd()
    }
    fn start_dma_logging(&mut self, ranges: &[DmaRange], page_size: u64) -> DeviceResult<u64> {
        (**self).start_dma_logging(ranges, page_size)
    }
    fn report_dma_log(
        &mut self,
        range: DmaRange,
        page_size: u64,
        bitmap: &mut [u64],
    ) -> DeviceResult<()> {
        (**self).report_dma_log(range, page_size, bitmap)
    }
    fn stop_dma_logging(&mut self) -> DeviceResult<()> {
        (**self).stop_dma_logging()
    }
    fn reset(&mut self) -> DeviceResult<()> {
        (**self).reset()
    }
    fn state_digest(&mut self) -> DeviceResult<Option<[u8; 32]>> {
        (**self).state_digest()
    }
}
