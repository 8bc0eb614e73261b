//! DMA_MAP and DMA_UNMAP from the client, DMA_READ and DMA_WRITE from the server.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{DecodeError, put, take, take_bytes};

/// The device may read.
pub const MAP_READABLE: u32 = 1;
/// The device may write.
pub const MAP_WRITEABLE: u32 = 2;
/// Reach the memory by mapping the fd.
pub const MAP_MMAP: u32 = 4;
/// Reach the memory by reading and writing the fd.
pub const MAP_FILE_IO: u32 = 8;

/// DMA_MAP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct DmaMap {
    /// Size of this payload.
    pub argsz: u32,
    /// `MAP_*`.
    pub flags: u32,
    /// Where the memory starts in the fd.
    pub offset: u64,
    /// First IOVA.
    pub address: u64,
    /// Length in bytes.
    pub size: u64,
}

impl DmaMap {
    /// Size of the payload.
    pub const SIZE: u32 = size_of::<Self>() as u32;

    /// Parses and checks: the range is not empty and does not wrap, the flags are known and name at most
    /// one mode.
    pub fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        let what = "DMA_MAP";
        let (map, _) = take::<Self>(what, payload)?;
        if map.argsz < Self::SIZE {
            return Err(DecodeError::field(what, "argsz", map.argsz));
        }
        let known = MAP_READABLE | MAP_WRITEABLE | MAP_MMAP | MAP_FILE_IO;
        let both = MAP_MMAP | MAP_FILE_IO;
        if map.flags & !known != 0 || map.flags & both == both {
            return Err(DecodeError::field(what, "flags", map.flags));
        }
        check_range(what, map.address, map.size)?;
        if map.offset.checked_add(map.size).is_none() {
            return Err(DecodeError::field(what, "offset", map.offset));
        }
        Ok(map)
    }

    /// Appends the payload.
    pub fn encode(&self, out: &mut Vec<u8>) {
        put(out, self);
    }
}

/// DMA_UNMAP, both ways.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct DmaUnmap {
    /// Largest reply payload.
    pub argsz: u32,
    /// 0.
    pub flags: u32,
    /// First IOVA.
    pub address: u64,
    /// Length in bytes.
    pub size: u64,
}

impl DmaUnmap {
    /// Size of the payload.
    pub const SIZE: u32 = size_of::<Self>() as u32;

    /// Parses and checks.
    pub fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        let what = "DMA_UNMAP";
        let (unmap, _) = take::<Self>(what, payload)?;
        if unmap.argsz < Self::SIZE {
            return Err(DecodeError::field(what, "argsz", unmap.argsz));
        }
        if unmap.flags != 0 {
            return Err(DecodeError::field(what, "flags", unmap.flags));
        }
        check_range(what, unmap.address, unmap.size)?;
        Ok(unmap)
    }

    /// Appends the payload.
    pub fn encode(&self, out: &mut Vec<u8>) {
        put(out, self);
    }
}

/// The fixed part of DMA_READ and DMA_WRITE, both ways.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct DmaTransfer {
    /// First IOVA.
    pub address: u64,
    /// Length in bytes.
    pub count: u64,
}

impl DmaTransfer {
    /// Size of the fixed part.
    pub const SIZE: usize = size_of::<Self>();

    /// Parses the fixed part alone: a DMA_READ request, or a DMA_WRITE reply.
    pub fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        Ok(Self::split(payload)?.0)
    }

    /// Parses fixed part and data: a DMA_WRITE request, or a DMA_READ reply.
    pub fn decode_with_data(payload: &[u8]) -> Result<(Self, &[u8]), DecodeError> {
        let (transfer, rest) = Self::split(payload)?;
        let count = usize::try_from(transfer.count).unwrap_or(usize::MAX);
        Ok((transfer, take_bytes("DMA data", rest, count)?))
    }

    fn split(payload: &[u8]) -> Result<(Self, &[u8]), DecodeError> {
        let what = "DMA transfer";
        let (transfer, rest) = take::<Self>(what, payload)?;
        check_range(what, transfer.address, transfer.count)?;
        Ok((transfer, rest))
    }

    /// Appends the fixed part; data follows.
    pub fn encode(&self, out: &mut Vec<u8>) {
        put(out, self);
    }
}

/// A range must not be empty and must not wrap around; it may end at the last address.
fn check_range(what: &'static str, address: u64, size: u64) -> Result<(), DecodeError> {
    let last = size.checked_sub(1).and_then(|size| address.checked_add(size));
    // The end itself must be a number too, so that whoever adds the two cannot overflow.
    match last.filter(|last| *last != u64::MAX) {
        Some(_) => Ok(()),
        None => Err(DecodeError::field(what, "size", size)),
    }
}
