//! The shape of the device: DEVICE_GET_INFO, DEVICE_GET_REGION_INFO with its mappable areas,
//! DEVICE_GET_IRQ_INFO.

use vfio_migration::{IrqInfo, MmapArea, RegionFlags};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{DecodeError, put, take};

/// The device can be reset.
pub const DEVICE_RESET: u32 = 1;
/// The device is a PCI function.
pub const DEVICE_PCI: u32 = 2;

/// The most mappable areas of a region that are understood.
pub const AREAS_MAX: usize = 256;

/// DEVICE_GET_INFO, both ways.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct DeviceInfo {
    /// Size of this payload.
    pub argsz: u32,
    /// `DEVICE_*`; 0 in a request.
    pub flags: u32,
    /// Number of region indices; 0 in a request.
    pub num_regions: u32,
    /// Number of interrupt indices; 0 in a request.
    pub num_irqs: u32,
}

impl DeviceInfo {
    /// Size of the payload.
    pub const SIZE: u32 = size_of::<Self>() as u32;

    /// The request.
    pub fn request() -> Self {
        Self { argsz: Self::SIZE, flags: 0, num_regions: 0, num_irqs: 0 }
    }

    /// Parses and checks `argsz`.
    pub fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        let what = "DEVICE_GET_INFO";
        let (info, _) = take::<Self>(what, payload)?;
        if info.argsz < Self::SIZE {
            return Err(DecodeError::field(what, "argsz", info.argsz));
        }
        Ok(info)
    }

    /// Appends the payload.
    pub fn encode(&self, out: &mut Vec<u8>) {
        put(out, self);
    }
}

const REGION_READ: u32 = 1;
const REGION_WRITE: u32 = 2;
const REGION_MMAP: u32 = 4;
const REGION_CAPS: u32 = 8;

const CAP_SPARSE_MMAP: u16 = 1;

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawRegionInfo {
    argsz: u32,
    flags: u32,
    index: u32,
    cap_offset: u32,
    size: u64,
    offset: u64,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawCap {
    id: u16,
    version: u16,
    next: u32,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawSparse {
    nr_areas: u32,
    reserved: u32,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawArea {
    offset: u64,
    size: u64,
}

/// A DEVICE_GET_REGION_INFO request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionInfoRequest {
    /// Largest reply payload the client takes.
    pub argsz: u32,
    /// Region index.
    pub index: u32,
}

impl RegionInfoRequest {
    /// Parses and checks `argsz`.
    pub fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        let what = "DEVICE_GET_REGION_INFO";
        let (raw, _) = take::<RawRegionInfo>(what, payload)?;
        if raw.argsz < RegionInfoReply::FIXED_SIZE {
            return Err(DecodeError::field(what, "argsz", raw.argsz));
        }
        Ok(Self { argsz: raw.argsz, index: raw.index })
    }

    /// Appends the payload.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let (argsz, index) = (self.argsz, self.index);
        put(out, &RawRegionInfo { argsz, flags: 0, index, cap_offset: 0, size: 0, offset: 0 });
    }
}

/// A DEVICE_GET_REGION_INFO reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegionInfoReply {
    /// Size of the whole reply; larger than the request's `argsz` where the areas did not fit.
    pub argsz: u32,
    /// Region index.
    pub index: u32,
    /// What may be done.
    pub flags: RegionFlags,
    /// Size of the region, in bytes.
    pub size: u64,
    /// Where the region starts in the attached fd.
    pub offset: u64,
    /// There are capabilities, whether or not they fitted.
    pub has_capabilities: bool,
    /// The areas that may be mapped; `None`: no such capability, so the whole region may be where
    /// `flags` says so.
    pub areas: Option<Vec<MmapArea>>,
}

impl RegionInfoReply {
    /// Size of the part that is always there.
    pub const FIXED_SIZE: u32 = size_of::<RawRegionInfo>() as u32;

    /// Appends the payload, cut to the fixed part where `argsz_max` leaves no room for the areas; `false`
    /// where that was so. `argsz` is filled in.
    pub fn encode(&self, argsz_max: u32, out: &mut Vec<u8>) -> bool {
        let areas = self.areas.as_deref().unwrap_or_default();
        let caps = match self.areas {
            Some(_) => size_of::<RawCap>() + size_of::<RawSparse>() + size_of_val(areas),
            None => 0,
        };
        let argsz = Self::FIXED_SIZE + caps as u32;
        let fits = caps > 0 && argsz <= argsz_max;
        let mut flags = 0;
        for (on, bit) in [
            (self.flags.read, REGION_READ),
            (self.flags.write, REGION_WRITE),
            (self.flags.mmap, REGION_MMAP),
            (caps > 0, REGION_CAPS),
        ] {
            flags |= if on { bit } else { 0 };
        }
        let cap_offset = if fits { Self::FIXED_SIZE } else { 0 };
        let (index, size, offset) = (self.index, self.size, self.offset);
        put(out, &RawRegionInfo { argsz, flags, index, cap_offset, size, offset });
        if fits {
            put(out, &RawCap { id: CAP_SPARSE_MMAP, version: 1, next: 0 });
            put(out, &RawSparse { nr_areas: areas.len() as u32, reserved: 0 });
            for area in areas {
                put(out, &RawArea { offset: area.offset, size: area.size });
            }
        }
        fits || caps == 0
    }

    /// Parses a reply. The chain of capabilities is followed forwards only, so it ends; areas outside of
    /// the region refuse the reply.
    pub fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        let what = "DEVICE_GET_REGION_INFO reply";
        let (raw, _) = take::<RawRegionInfo>(what, payload)?;
        let mut areas = None;
        let mut at = raw.cap_offset;
        let has_capabilities = raw.flags & REGION_CAPS != 0;
        while has_capabilities && at != 0 {
            let bad = DecodeError::field(what, "capability offset", at);
            if at < Self::FIXED_SIZE {
                return Err(bad);
            }
            // Offsets beyond the payload: the reply was cut to the argsz of the request.
            let Some(bytes) = payload.get(at as usize..).filter(|rest| !rest.is_empty()) else {
                break;
            };
            let (cap, rest) = take::<RawCap>(what, bytes)?;
            if cap.id == CAP_SPARSE_MMAP {
                areas = Some(decode_areas(raw.size, rest)?);
            }
            if cap.next != 0 && cap.next <= at {
                return Err(bad);
            }
            at = cap.next;
        }
        let flags = RegionFlags {
            read: raw.flags & REGION_READ != 0,
            write: raw.flags & REGION_WRITE != 0,
            mmap: raw.flags & REGION_MMAP != 0,
        };
        let (argsz, index, size, offset) = (raw.argsz, raw.index, raw.size, raw.offset);
        Ok(Self { argsz, index, flags, size, offset, has_capabilities, areas })
    }
}

fn decode_areas(region_size: u64, bytes: &[u8]) -> Result<Vec<MmapArea>, DecodeError> {
    let what = "sparse mmap areas";
    let (sparse, mut rest) = take::<RawSparse>(what, bytes)?;
    if sparse.nr_areas as usize > AREAS_MAX {
        return Err(DecodeError::field(what, "nr_areas", sparse.nr_areas));
    }
    let mut areas = Vec::with_capacity(sparse.nr_areas as usize);
    for _ in 0..sparse.nr_areas {
        let (area, tail) = take::<RawArea>(what, rest)?;
        rest = tail;
        let end = area.offset.checked_add(area.size);
        if end.is_none_or(|end| end > region_size) {
            return Err(DecodeError::field(what, "offset", area.offset));
        }
        // An empty area carries nothing; libvfio-user has sent such.
        if area.size > 0 {
            areas.push(MmapArea { offset: area.offset, size: area.size });
        }
    }
    Ok(areas)
}

const IRQ_EVENTFD: u32 = 1;
const IRQ_MASKABLE: u32 = 2;
const IRQ_AUTOMASKED: u32 = 4;
const IRQ_NORESIZE: u32 = 8;

/// DEVICE_GET_IRQ_INFO, both ways.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct IrqInfoPayload {
    /// Size of this payload.
    pub argsz: u32,
    /// 0 in a request.
    pub flags: u32,
    /// Interrupt index.
    pub index: u32,
    /// Number of vectors; 0 in a request.
    pub count: u32,
}

impl IrqInfoPayload {
    /// Size of the payload.
    pub const SIZE: u32 = size_of::<Self>() as u32;

    /// The request for `index`.
    pub fn request(index: u32) -> Self {
        Self { argsz: Self::SIZE, flags: 0, index, count: 0 }
    }

    /// The reply for `index`.
    pub fn reply(index: u32, info: IrqInfo) -> Self {
        let mut flags = 0;
        for (on, bit) in [
            (info.eventfd, IRQ_EVENTFD),
            (info.maskable, IRQ_MASKABLE),
            (info.automasked, IRQ_AUTOMASKED),
            // The vectors of a wired index cannot be extended without turning it off first.
            (info.count > 1, IRQ_NORESIZE),
        ] {
            flags |= if on { bit } else { 0 };
        }
        Self { argsz: Self::SIZE, flags, index, count: info.count }
    }

    /// Parses and checks `argsz`.
    pub fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        let what = "DEVICE_GET_IRQ_INFO";
        let (info, _) = take::<Self>(what, payload)?;
        if info.argsz < Self::SIZE {
            return Err(DecodeError::field(what, "argsz", info.argsz));
        }
        Ok(info)
    }

    /// What the reply says.
    pub fn info(&self) -> IrqInfo {
        IrqInfo {
            count: self.count,
            eventfd: self.flags & IRQ_EVENTFD != 0,
            maskable: self.flags & IRQ_MASKABLE != 0,
            automasked: self.flags & IRQ_AUTOMASKED != 0,
        }
    }

    /// Appends the payload.
    pub fn encode(&self, out: &mut Vec<u8>) {
        put(out, self);
    }
}
