//! What the headers of data frames mean.

use switchover::message::{Attempt, Connection, DeviceIndex, Id, Session};

use super::{FrameHeader, RAM_BLOCK, SECTION_MAX, SECTION_NAME_MAX, WireError, field, kind};
use crate::memory::PAGE_SIZE;
use crate::ram::Codec;
use crate::vmm::Section;

/// Which part of a device's stream bytes belong to; the source's bookkeeping, the destination never
/// depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DataClass {
    /// Initial data (PRE_COPY).
    Initial,
    /// Dirty data (PRE_COPY).
    Dirty,
    /// Read in STOP_COPY.
    StopCopy,
}

/// First frame of a data channel: which migration it belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Attach {
    /// The migration.
    pub migration: Id,
    /// Its secret, from Accept.
    pub secret: Id,
    /// The channel's number, from 0.
    pub channel: u16,
    /// The control connection it belongs to.
    pub connection: Connection,
}

impl Attach {
    /// Header and payload.
    pub fn encode(&self) -> (FrameHeader, [u8; 32]) {
        let mut payload = [0; 32];
        payload[..16].copy_from_slice(&self.migration.0.to_be_bytes());
        payload[16..].copy_from_slice(&self.secret.0.to_be_bytes());
        let header = FrameHeader {
            kind: kind::ATTACH,
            length: payload.len() as u32,
            payload_checksum: Some(crc32fast::hash(&payload)),
            a: self.connection.0,
            b: 0,
            c: self.channel.into(),
        };
        (header, payload)
    }

    /// From header and payload.
    pub fn decode(header: &FrameHeader, payload: &[u8]) -> Result<Self, WireError> {
        let kind = header.kind;
        if kind != kind::ATTACH {
            return Err(field(kind, "not an Attach"));
        }
        header.check_payload(payload, true)?;
        let Ok(payload) = <[u8; 32]>::try_from(payload) else {
            return Err(field(kind, format!("{} bytes are no Attach", payload.len())));
        };
        let [migration, secret]: [[u8; 16]; 2] = zerocopy::transmute!(payload);
        let channel = u16::try_from(header.c)
            .map_err(|_| field(kind, format!("no channel has number {}", header.c)))?;
        Ok(Self {
            migration: Id(u128::from_be_bytes(migration)),
            secret: Id(u128::from_be_bytes(secret)),
            channel,
            connection: Connection(header.a),
        })
    }
}

/// Whole pages inside one 2 MiB block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RamRange {
    /// First guest physical address.
    pub gpa: u64,
    /// Bytes, at least a page.
    pub len: u64,
}

impl RamRange {
    /// From the header of a frame of RAM. That the range is memory is for the receiver to see.
    pub fn decode(header: &FrameHeader) -> Result<Self, WireError> {
        let gpa = header.a;
        let len = match header.kind {
            kind::RAM_PAGES => u64::from(header.length),
            kind::RAM_ZERO => header.b,
            // What does not get smaller is not sent packed: nothing is made of nothing.
            kind::RAM_PACKED if header.length > 0 && u64::from(header.length) < header.b => {
                header.b
            }
            kind::RAM_PACKED => {
                let what = format!("{} bytes for {} of pages", header.length, header.b);
                return Err(field(header.kind, what));
            }
            other => return Err(field(other, "not a RAM frame")),
        };
        let whole = gpa.is_multiple_of(PAGE_SIZE) && len.is_multiple_of(PAGE_SIZE) && len != 0;
        if !whole || len > RAM_BLOCK - gpa % RAM_BLOCK {
            let what = format!("{len:#x} bytes at {gpa:#x} are not whole pages of one 2 MiB block");
            return Err(field(header.kind, what));
        }
        Ok(Self { gpa, len })
    }
}

/// Header of pages that follow as payload.
pub fn ram_pages_header(range: RamRange, payload_checksum: Option<u32>) -> FrameHeader {
    FrameHeader {
        kind: kind::RAM_PAGES,
        length: range.len as u32,
        payload_checksum,
        a: range.gpa,
        ..FrameHeader::default()
    }
}

/// Header of pages that follow as a compressed payload of `length` bytes.
pub fn ram_packed_header(
    range: RamRange,
    length: u32,
    codec: Codec,
    payload_checksum: Option<u32>,
) -> FrameHeader {
    FrameHeader {
        kind: kind::RAM_PACKED,
        length,
        payload_checksum,
        a: range.gpa,
        b: range.len,
        c: codec.number(),
    }
}

/// Header of pages that are zero.
pub fn ram_zero_header(range: RamRange) -> FrameHeader {
    FrameHeader { kind: kind::RAM_ZERO, a: range.gpa, b: range.len, ..FrameHeader::default() }
}

/// What the header of a device frame says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DeviceHead {
    /// The device.
    pub device: DeviceIndex,
    /// Its session.
    pub session: Session,
    /// The source's class.
    pub class: DataClass,
    /// Offset in the session's stream, in bytes.
    pub offset: u64,
}

impl DeviceHead {
    /// From a header.
    pub fn decode(header: &FrameHeader) -> Result<Self, WireError> {
        let kind = header.kind;
        if kind != kind::DEVICE {
            return Err(field(kind, "not a device frame"));
        }
        let class = match header.c >> 16 {
            0 => DataClass::Initial,
            1 => DataClass::Dirty,
            2 => DataClass::StopCopy,
            other => return Err(field(kind, format!("unknown class {other} of device data"))),
        };
        if header.b.checked_add(u64::from(header.length)).is_none() {
            return Err(field(kind, format!("stream offset {:#x} wraps around", header.b)));
        }
        Ok(Self {
            device: DeviceIndex(header.c as u16),
            session: Session(header.a),
            class,
            offset: header.b,
        })
    }
}

/// Header of `data` of a device's stream; refuses more than a frame may hold.
pub fn device_header(
    head: &DeviceHead,
    data: &[u8],
    checksum: bool,
) -> Result<FrameHeader, WireError> {
    let kind = kind::DEVICE;
    check_length(kind, data.len(), super::FRAME_DEVICE_MAX)?;
    let class = match head.class {
        DataClass::Initial => 0,
        DataClass::Dirty => 1,
        DataClass::StopCopy => 2u32,
    };
    Ok(FrameHeader {
        kind,
        length: data.len() as u32,
        payload_checksum: checksum.then(|| crc32fast::hash(data)),
        a: head.session.0,
        b: head.offset,
        c: u32::from(head.device.0) | class << 16,
    })
}

/// What the header of a section says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SectionHead {
    /// The attempt it belongs to.
    pub attempt: Attempt,
    /// Its place among the attempt's sections, from 0.
    pub index: u32,
}

/// Header, and the part of the payload before the section's bytes.
pub fn encode_section(
    head: SectionHead,
    section: &Section,
) -> Result<(FrameHeader, Vec<u8>), WireError> {
    let kind = kind::SECTION;
    check_length(kind, section.payload.len(), SECTION_MAX)?;
    let mut names = Vec::with_capacity(4 + section.name.len() + section.kind.len());
    for name in [&section.name, &section.kind] {
        check_length(kind, name.len(), SECTION_NAME_MAX)?;
        names.extend_from_slice(&(name.len() as u16).to_le_bytes());
    }
    names.extend_from_slice(section.name.as_bytes());
    names.extend_from_slice(section.kind.as_bytes());
    let mut checksum = crc32fast::Hasher::new();
    checksum.update(&names);
    checksum.update(&section.payload);
    let header = FrameHeader {
        kind,
        length: (names.len() + section.payload.len()) as u32,
        payload_checksum: Some(checksum.finalize()),
        a: head.attempt.0,
        b: head.index.into(),
        c: section.version,
    };
    Ok((header, names))
}

/// The section of a frame; takes the payload and keeps its memory.
pub fn decode_section(
    header: &FrameHeader,
    mut payload: Vec<u8>,
) -> Result<(SectionHead, Section), WireError> {
    let kind = header.kind;
    if kind != kind::SECTION {
        return Err(field(kind, "not a section"));
    }
    header.check_payload(&payload, true)?;
    let index = u32::try_from(header.b)
        .map_err(|_| field(kind, format!("no section has number {}", header.b)))?;
    let (name, section_kind, names_len) = section_names(&payload)
        .ok_or_else(|| field(kind, "the section's names are cut short or not UTF-8"))?;
    payload.drain(..names_len);
    check_length(kind, payload.len(), SECTION_MAX)?;
    let section = Section { name, kind: section_kind, version: header.c, payload };
    Ok((SectionHead { attempt: Attempt(header.a), index }, section))
}

fn section_names(payload: &[u8]) -> Option<(String, String, usize)> {
    let (name_len, rest) = payload.split_first_chunk()?;
    let (kind_len, rest) = rest.split_first_chunk()?;
    let name_len = usize::from(u16::from_le_bytes(*name_len));
    let kind_len = usize::from(u16::from_le_bytes(*kind_len));
    if name_len > SECTION_NAME_MAX || kind_len > SECTION_NAME_MAX {
        return None;
    }
    let name = std::str::from_utf8(rest.get(..name_len)?).ok()?;
    let kind = std::str::from_utf8(rest.get(name_len..name_len + kind_len)?).ok()?;
    Some((name.to_owned(), kind.to_owned(), 4 + name_len + kind_len))
}

fn check_length(kind: u16, length: usize, limit: usize) -> Result<(), WireError> {
    if length > limit {
        return Err(WireError::TooLong { kind, length: length as u64, limit: limit as u64 });
    }
    Ok(())
}
