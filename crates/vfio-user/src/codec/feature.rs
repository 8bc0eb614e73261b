//! DEVICE_FEATURE: one command for many small things, as the kernel's ioctl.
//!
//! ```text
//!   argsz u32 │ flags u32: feature 0-15, GET 16, SET 17, PROBE 18 │ data …
//! ```

use vfio_migration::DmaRange;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{DecodeError, put, take, take_bytes};

/// MIGRATION.
pub const MIGRATION: u16 = 1;
/// MIG_DEVICE_STATE.
pub const MIG_DEVICE_STATE: u16 = 2;
/// DMA_LOGGING_START.
pub const DMA_LOGGING_START: u16 = 6;
/// DMA_LOGGING_STOP.
pub const DMA_LOGGING_STOP: u16 = 7;
/// DMA_LOGGING_REPORT.
pub const DMA_LOGGING_REPORT: u16 = 8;
/// MIG_DATA_SIZE; on vfio-user our extension.
pub const MIG_DATA_SIZE: u16 = 9;
/// MIG_PRECOPY_INFOv2; on vfio-user our extension.
pub const MIG_PRECOPY_INFO_V2: u16 = 12;

const GET: u32 = 1 << 16;
const SET: u32 = 1 << 17;
const PROBE: u32 = 1 << 18;

/// The most ranges of a DMA_LOGGING_START that are understood.
pub const LOGGING_RANGES_MAX: usize = 4096;

/// What is done with a feature.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FeatureOp {
    /// Read it.
    Get,
    /// Write it.
    Set,
    /// Ask whether the named operations exist; neither named: whether the feature does.
    Probe {
        /// GET must exist.
        get: bool,
        /// SET must exist.
        set: bool,
    },
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawFeature {
    argsz: u32,
    flags: u32,
}

/// The fixed part of DEVICE_FEATURE, both ways.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Feature {
    /// Request: the largest reply payload. Reply to GET: the size of the reply's payload.
    pub argsz: u32,
    /// Feature index.
    pub index: u16,
    /// What is done.
    pub op: FeatureOp,
}

impl Feature {
    /// Size of the fixed part.
    pub const SIZE: usize = size_of::<RawFeature>();

    /// Parses the fixed part and splits the data off (D4: unknown flags, both or none of GET and SET
    /// without PROBE are refused).
    pub fn decode(payload: &[u8]) -> Result<(Self, &[u8]), DecodeError> {
        let what = "DEVICE_FEATURE";
        let (raw, data) = take::<RawFeature>(what, payload)?;
        if (raw.argsz as usize) < Self::SIZE {
            return Err(DecodeError::field(what, "argsz", raw.argsz));
        }
        let index = (raw.flags & 0xffff) as u16;
        let op = match raw.flags & !0xffff {
            GET => FeatureOp::Get,
            SET => FeatureOp::Set,
            op if op & PROBE != 0 && op & !(GET | SET | PROBE) == 0 => {
                FeatureOp::Probe { get: op & GET != 0, set: op & SET != 0 }
            }
            _ => return Err(DecodeError::field(what, "flags", raw.flags)),
        };
        Ok((Self { argsz: raw.argsz, index, op }, data))
    }

    /// Appends the fixed part; data follows.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let op = match self.op {
            FeatureOp::Get => GET,
            FeatureOp::Set => SET,
            FeatureOp::Probe { get, set } => {
                PROBE | if get { GET } else { 0 } | if set { SET } else { 0 }
            }
        };
        put(out, &RawFeature { argsz: self.argsz, flags: u32::from(self.index) | op });
    }
}

/// The data of MIGRATION: `VFIO_MIGRATION_*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct MigrationData {
    /// The word.
    pub flags: u64,
}

/// The data of MIG_DEVICE_STATE.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct DeviceStateData {
    /// The state's number.
    pub device_state: u32,
    /// Unused on vfio-user.
    pub data_fd: u32,
}

/// The data of MIG_DATA_SIZE.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct DataSizeData {
    /// Estimated bytes to complete stop-copy.
    pub stop_copy_length: u64,
}

/// The data of DMA_LOGGING_REPORT; in a reply the bitmap follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct LoggingReportData {
    /// First address.
    pub iova: u64,
    /// Length in bytes.
    pub length: u64,
    /// Bytes per bit.
    pub page_size: u64,
}

/// Features whose data is one fixed struct.
pub trait FixedData: Sized + FromBytes + IntoBytes + KnownLayout + Immutable {
    /// What it is called in errors.
    const WHAT: &'static str;

    /// Parses it off the front of `data`.
    fn decode(data: &[u8]) -> Result<Self, DecodeError> {
        Ok(take(Self::WHAT, data)?.0)
    }

    /// Appends it.
    fn encode(&self, out: &mut Vec<u8>) {
        put(out, self);
    }
}

impl FixedData for MigrationData {
    const WHAT: &'static str = "MIGRATION";
}
impl FixedData for DeviceStateData {
    const WHAT: &'static str = "MIG_DEVICE_STATE";
}
impl FixedData for DataSizeData {
    const WHAT: &'static str = "MIG_DATA_SIZE";
}
impl FixedData for LoggingReportData {
    const WHAT: &'static str = "DMA_LOGGING_REPORT";
}

impl LoggingReportData {
    /// The bytes of the bitmap, whole u64 words, for a range that does not wrap and a page size that is a
    /// power of two of at least `page_size_min`.
    pub fn bitmap_bytes(&self, page_size_min: u64) -> Result<u64, DecodeError> {
        let what = "DMA_LOGGING_REPORT";
        if !self.page_size.is_power_of_two() || self.page_size < page_size_min {
            return Err(DecodeError::field(what, "page_size", self.page_size));
        }
        if self.length == 0 || self.iova.checked_add(self.length).is_none() {
            return Err(DecodeError::field(what, "length", self.length));
        }
        let pages = self.length.div_ceil(self.page_size);
        Ok(pages.div_ceil(64) * 8)
    }
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawLoggingStart {
    page_size: u64,
    num_ranges: u32,
    reserved: u32,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawRange {
    iova: u64,
    length: u64,
}

/// The data of DMA_LOGGING_START. No ranges mean everything (unlike in the kernel).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoggingStart {
    /// Bytes per bit that are wished; the reply of our server says the ones used.
    pub page_size: u64,
    /// What to log.
    pub ranges: Vec<DmaRange>,
}

impl LoggingStart {
    /// Parses; ranges that wrap around refuse it.
    pub fn decode(data: &[u8]) -> Result<Self, DecodeError> {
        let what = "DMA_LOGGING_START";
        let (raw, rest) = take::<RawLoggingStart>(what, data)?;
        let count = raw.num_ranges as usize;
        if count > LOGGING_RANGES_MAX {
            return Err(DecodeError::field(what, "num_ranges", raw.num_ranges));
        }
        let mut rest = take_bytes(what, rest, count * size_of::<RawRange>())?;
        let mut ranges = Vec::with_capacity(count);
        while !rest.is_empty() {
            let (range, tail) = take::<RawRange>(what, rest)?;
            if range.length == 0 || range.iova.checked_add(range.length).is_none() {
                return Err(DecodeError::field(what, "length", range.length));
            }
            ranges.push(DmaRange { iova: range.iova, length: range.length });
            rest = tail;
        }
        Ok(Self { page_size: raw.page_size, ranges })
    }

    /// Appends it.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let num_ranges = self.ranges.len() as u32;
        put(out, &RawLoggingStart { page_size: self.page_size, num_ranges, reserved: 0 });
        for range in &self.ranges {
            put(out, &RawRange { iova: range.iova, length: range.length });
        }
    }
}
