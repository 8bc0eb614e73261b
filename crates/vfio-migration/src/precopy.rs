//! `VFIO_MIG_GET_PRECOPY_INFO`: what the device could hand over right now.
//!
//! Neither number is a total: they say what can be read *now* (P7). v1 and v2 are different types
//! because v1's flags are reserved (P6) and its initial bytes never grow (P4), while v2 may announce
//! new initial data at any time (R4).

/// `VFIO_PRECOPY_INFO_REINIT`, an output flag of v2.
pub const PRECOPY_INFO_REINIT: u32 = 1;

/// `struct vfio_precopy_info` as it crosses the interface, in both directions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct RawPrecopyInfo {
    /// Size of the struct the caller has, in bytes; at least [`Self::SIZE`] (P3).
    pub argsz: u32,
    /// Reserved without the opt-in; with it, output only.
    pub flags: u32,
    /// Bytes that should be read before PRE_COPY is left.
    pub initial_bytes: u64,
    /// Bytes of change since what was already read.
    pub dirty_bytes: u64,
}

impl RawPrecopyInfo {
    /// Size of the struct, in bytes.
    pub const SIZE: u32 = 24;

    /// A request with every other field zero, as a caller must send it (P9).
    pub const fn request() -> Self {
        Self { argsz: Self::SIZE, flags: 0, initial_bytes: 0, dirty_bytes: 0 }
    }
}

/// The answer of a device without the INFOv2 opt-in. Flags are reserved and not kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct PrecopyInfoV1 {
    /// Bytes that should be read before PRE_COPY is left.
    pub initial_bytes: u64,
    /// Bytes of change since what was already read.
    pub dirty_bytes: u64,
}

/// The answer of a device that was opted in to INFOv2.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct PrecopyInfoV2 {
    /// Bytes that should be read before PRE_COPY is left; with `reinit` a new value of any size.
    pub initial_bytes: u64,
    /// Bytes of change since what was already read; restarts from zero with `reinit`.
    pub dirty_bytes: u64,
    /// New initial data is on the stream. An edge: whoever asks first sees it (R10), so latch it.
    pub reinit: bool,
}

/// One answer to PRECOPY_INFO.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PrecopyInfo {
    /// Not opted in.
    V1(PrecopyInfoV1),
    /// Opted in.
    V2(PrecopyInfoV2),
}

impl PrecopyInfo {
    /// Builds the answer from the uAPI's fields; `opted_in` decides whether `flags` is looked at.
    pub fn from_raw(opted_in: bool, flags: u32, initial_bytes: u64, dirty_bytes: u64) -> Self {
        if opted_in {
            let reinit = flags & PRECOPY_INFO_REINIT != 0;
            Self::V2(PrecopyInfoV2 { initial_bytes, dirty_bytes, reinit })
        } else {
            Self::V1(PrecopyInfoV1 { initial_bytes, dirty_bytes })
        }
    }

    /// Unread initial bytes, in bytes.
    pub fn initial_bytes(self) -> u64 {
        match self {
            Self::V1(info) => info.initial_bytes,
            Self::V2(info) => info.initial_bytes,
        }
    }

    /// Unread dirty bytes, in bytes.
    pub fn dirty_bytes(self) -> u64 {
        match self {
            Self::V1(info) => info.dirty_bytes,
            Self::V2(info) => info.dirty_bytes,
        }
    }

    /// New initial data was announced; never so without the opt-in.
    pub fn reinit(self) -> bool {
        matches!(self, Self::V2(info) if info.reinit)
    }
}
