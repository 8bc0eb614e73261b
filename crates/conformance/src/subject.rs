//! [`Subject`]: the raw view of one device.
//!
//! A VMM's backend checks arguments, keeps sessions and hides what it does not need. Here nothing is
//! hidden: an `argsz`, flag bits, a state number or a struct go to the device as they are given, and its
//! answer comes back as it is. Where a kind of device has no such thing (a vfio-user server has no data
//! fd), the call says [`CallError::Unavailable`] and the rule is not applicable.

use std::sync::Arc;
use std::time::Instant;

use serde::Serialize;
use vfio_migration::{DmaRange, PciFunction};

/// Feature indices and flags of `VFIO_DEVICE_FEATURE` (Linux uAPI).
pub mod feature {
    /// Reads it.
    pub const GET: u32 = 1 << 16;
    /// Writes it.
    pub const SET: u32 = 1 << 17;
    /// Asks whether it is there.
    pub const PROBE: u32 = 1 << 18;

    /// MIGRATION.
    pub const MIGRATION: u32 = 1;
    /// MIG_DEVICE_STATE.
    pub const MIG_DEVICE_STATE: u32 = 2;
    /// DMA_LOGGING_START.
    pub const DMA_LOGGING_START: u32 = 6;
    /// DMA_LOGGING_STOP.
    pub const DMA_LOGGING_STOP: u32 = 7;
    /// DMA_LOGGING_REPORT.
    pub const DMA_LOGGING_REPORT: u32 = 8;
    /// MIG_DATA_SIZE.
    pub const MIG_DATA_SIZE: u32 = 9;
    /// MIG_PRECOPY_INFOv2.
    pub const MIG_PRECOPY_INFO_V2: u32 = 12;

    /// Bytes of `argsz` and `flags`.
    pub const HEADER_BYTES: u32 = 8;
}

/// Why a call did not succeed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// The device refused or failed it.
    #[error("{}", crate::errno::Errno(*.0))]
    Errno(i32),
    /// No answer came before the deadline.
    #[error("no answer in time")]
    TimedOut,
    /// The device or its server is gone.
    #[error("the device is gone: {0}")]
    Gone(String),
    /// The answer does not follow the protocol.
    #[error("{0}")]
    Protocol(String),
    /// This kind of device has no such call.
    #[error("{0}")]
    Unavailable(&'static str),
}

/// The result of a raw call.
pub type Call<T> = Result<T, CallError>;

/// What kind of device it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Behind the kernel's ioctls, with data fds.
    Kernel,
    /// Behind a vfio-user socket, without.
    VfioUser,
}

/// Who it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct About {
    /// What kind of device.
    pub kind: Kind,
    /// The name it was opened by.
    pub name: String,
    /// How it was opened, for people.
    pub opened: String,
}

/// A stream that a SET handed out: the data fd, or on vfio-user the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct StreamId(pub u32);

impl StreamId {
    /// The one stream of a device without data fds.
    pub const WIRE: Self = Self(0);
}

/// What `data_fd` of a MIG_DEVICE_STATE call held afterwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FdAnswer {
    /// -1.
    None,
    /// A file, which the subject now holds.
    Stream(StreamId),
    /// Neither -1 nor an open fd of ours.
    Wrong(i32),
    /// The kind of device has no data fds.
    Absent,
}

/// Flags of a data fd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FdFlags {
    /// FD_CLOEXEC is set.
    pub cloexec: bool,
    /// The access mode: `O_RDONLY`, `O_WRONLY` or `O_RDWR`.
    pub access: i32,
}

const NO_FD: CallError = CallError::Unavailable("vfio-user has no data_fd");

/// The raw view of one device. One thread uses it.
pub trait Subject: Send {
    /// Who it is.
    fn about(&self) -> About;

    /// No call from now on waits beyond `at`, where the subject can do anything about it.
    fn set_deadline(&mut self, at: Instant);

    /// Closes the device and opens it again, without opting in to anything.
    fn reopen(&mut self) -> Call<()>;

    /// DEVICE_FEATURE as given. `payload` is what follows `argsz` and `flags`, both ways; its length need
    /// not agree with `argsz`.
    fn feature(&mut self, argsz: u32, flags: u32, payload: &mut [u8]) -> Call<()>;

    /// SET MIG_DEVICE_STATE, with data_fd as it is afterwards, also after a failure.
    fn set_state(&mut self, state: u32) -> (Call<()>, FdAnswer);

    /// GET MIG_DEVICE_STATE.
    fn get_state(&mut self) -> Call<(u32, FdAnswer)>;

    /// read() or MIG_DATA_READ; 0 as well as ENOMSG as they come.
    fn read(&mut self, stream: StreamId, buf: &mut [u8]) -> Call<usize>;

    /// write() or MIG_DATA_WRITE.
    fn write(&mut self, stream: StreamId, data: &[u8]) -> Call<usize>;

    /// Closes a stream.
    fn close(&mut self, stream: StreamId);

    /// PRECOPY_INFO with the caller's 24 bytes, both ways.
    fn precopy_info(&mut self, stream: StreamId, info: &mut [u8; 24]) -> Call<()>;

    /// DMA_LOGGING_START; answers `page_size` as it is afterwards.
    fn logging_start(&mut self, page_size: u64, ranges: &[DmaRange]) -> Call<u64>;

    /// DMA_LOGGING_REPORT into the caller's bitmap.
    fn logging_report(&mut self, range: DmaRange, page_size: u64, bitmap: &mut [u64]) -> Call<()>;

    /// DMA_LOGGING_STOP.
    fn logging_stop(&mut self) -> Call<()>;

    /// DEVICE_RESET.
    fn reset(&mut self) -> Call<()>;

    /// A digest of the internal state by a side door, where there is one.
    fn digest(&mut self) -> Call<Option<[u8; 32]>>;

    /// Regions and DMA map.
    fn pci(&self) -> Option<Arc<dyn PciFunction>>;

    /// The most bytes of one write, where larger ones are known to do harm.
    fn write_bytes_max(&self) -> usize {
        1 << 20
    }

    /// Flags of a data fd.
    fn fd_flags(&mut self, _stream: StreamId) -> Call<FdFlags> {
        Err(NO_FD)
    }

    /// pread() of one byte at offset 0, or pwrite() where `write`.
    fn positioned(&mut self, _stream: StreamId, _write: bool) -> Call<usize> {
        Err(NO_FD)
    }

    /// poll() for readability; `true` when it came (errors and hang-ups count) before the time was over.
    fn poll(&mut self, _stream: StreamId, _timeout_ms: u32) -> Call<bool> {
        Err(NO_FD)
    }

    /// An ioctl on the data fd that is not PRECOPY_INFO.
    fn other_ioctl(&mut self, _stream: StreamId) -> Call<()> {
        Err(NO_FD)
    }

    /// PRECOPY_INFO with a pointer to nowhere.
    fn precopy_info_nowhere(&mut self, _stream: StreamId) -> Call<()> {
        Err(NO_FD)
    }
}
