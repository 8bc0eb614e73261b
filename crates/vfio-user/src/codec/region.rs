//! REGION_READ and REGION_WRITE.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{DecodeError, put, take, take_bytes};

/// The fixed part, both ways.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct RegionAccess {
    /// Offset inside the region.
    pub offset: u64,
    /// Region index.
    pub region: u32,
    /// Length in bytes.
    pub count: u32,
}

impl RegionAccess {
    /// Size of the fixed part.
    pub const SIZE: usize = size_of::<Self>();

    /// Parses the fixed part alone: a REGION_READ request, or a REGION_WRITE reply.
    pub fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        Ok(take::<Self>("region access", payload)?.0)
    }

    /// Parses fixed part and data: a REGION_WRITE request, or a REGION_READ reply.
    pub fn decode_with_data(payload: &[u8]) -> Result<(Self, &[u8]), DecodeError> {
        let (access, rest) = take::<Self>("region access", payload)?;
        Ok((access, take_bytes("region data", rest, access.count as usize)?))
    }

    /// Appends the fixed part; data follows.
    pub fn encode(&self, out: &mut Vec<u8>) {
        put(out, self);
    }
}
