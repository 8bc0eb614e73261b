//! The data stream, and our extension commands.

use vfio_migration::RawPrecopyInfo;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{DecodeError, put, take, take_bytes};

/// The fixed part of MIG_DATA_READ and MIG_DATA_WRITE, both ways.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct MigData {
    /// Read: the largest reply payload; write: the size of this payload.
    pub argsz: u32,
    /// Bytes of data.
    pub size: u32,
}

impl MigData {
    /// Size of the fixed part.
    pub const SIZE: usize = size_of::<Self>();

    /// The fixed part around `size` bytes of data.
    pub fn new(size: u32) -> Self {
        Self { argsz: size.saturating_add(Self::SIZE as u32), size }
    }

    /// Parses a MIG_DATA_READ request: `argsz` must cover `size` and the fixed part.
    pub fn decode_request(payload: &[u8]) -> Result<Self, DecodeError> {
        let (data, _) = take::<Self>("migration data", payload)?;
        data.check_argsz()
    }

    /// Parses the fixed part of a MIG_DATA_READ reply; whether the data is all there is the reader's to
    /// see. At the end of the stream `argsz` is 8.
    pub fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        Ok(take::<Self>("migration data", payload)?.0)
    }

    /// Parses a MIG_DATA_WRITE request with its data.
    pub fn decode_with_data(payload: &[u8]) -> Result<(Self, &[u8]), DecodeError> {
        let (data, rest) = take::<Self>("migration data", payload)?;
        let data = data.check_argsz()?;
        Ok((data, take_bytes("migration data", rest, data.size as usize)?))
    }

    fn check_argsz(self) -> Result<Self, DecodeError> {
        let need = (self.size as u64).saturating_add(Self::SIZE as u64);
        if u64::from(self.argsz) < need {
            return Err(DecodeError::field("migration data", "argsz", self.argsz));
        }
        Ok(self)
    }

    /// Appends the fixed part; data follows.
    pub fn encode(&self, out: &mut Vec<u8>) {
        put(out, self);
    }
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawInfo {
    argsz: u32,
    flags: u32,
    initial_bytes: u64,
    dirty_bytes: u64,
}

/// Parses precopy information, both ways: `struct vfio_precopy_info` (P3: `argsz` < 24 is refused).
///
/// In a request with the INFOv2 opt-in, the REINIT flag acknowledges that a reply with REINIT was
/// received; see the [server](crate::server).
pub fn decode_precopy_info(payload: &[u8]) -> Result<RawPrecopyInfo, DecodeError> {
    let what = "precopy information";
    let (raw, _) = take::<RawInfo>(what, payload)?;
    if raw.argsz < RawPrecopyInfo::SIZE {
        return Err(DecodeError::field(what, "argsz", raw.argsz));
    }
    let RawInfo { argsz, flags, initial_bytes, dirty_bytes } = raw;
    Ok(RawPrecopyInfo { argsz, flags, initial_bytes, dirty_bytes })
}

/// Appends precopy information.
pub fn encode_precopy_info(info: &RawPrecopyInfo, out: &mut Vec<u8>) {
    let RawPrecopyInfo { argsz, flags, initial_bytes, dirty_bytes } = *info;
    put(out, &RawInfo { argsz, flags, initial_bytes, dirty_bytes });
}

/// Parses the reply to STATE_DIGEST.
pub fn decode_digest(payload: &[u8]) -> Result<[u8; 32], DecodeError> {
    Ok(take::<[u8; 32]>("state digest", payload)?.0)
}
