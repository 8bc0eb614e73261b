//! The fixed header of every frame.

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{CONTROL_MAX, IGNORABLE, WireError, field, payload_limit};

/// First bytes of every frame; the digit is the version of the framing.
pub const MAGIC: [u8; 4] = *b"VFY1";

/// Length of a header in bytes.
pub const HEADER_LEN: usize = size_of::<RawHeader>();

const CHECKSUMMED: usize = HEADER_LEN - 4;
const FLAG_PAYLOAD_CHECKSUM: u16 = 1;

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 4],
    kind: U16,
    flags: U16,
    length: U32,
    payload_checksum: U32,
    a: U64,
    b: U64,
    c: U32,
    checksum: U32,
}

/// A frame's header, checked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FrameHeader {
    /// The kind; see [`kind`](super::kind).
    pub kind: u16,
    /// Payload bytes.
    pub length: u32,
    /// CRC-32 of the payload, where the frame has one.
    pub payload_checksum: Option<u32>,
    /// First field of the kind.
    pub a: u64,
    /// Second field of the kind.
    pub b: u64,
    /// Third field of the kind.
    pub c: u32,
}

impl FrameHeader {
    /// The header's bytes.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let flags = if self.payload_checksum.is_some() { FLAG_PAYLOAD_CHECKSUM } else { 0 };
        let raw = RawHeader {
            magic: MAGIC,
            kind: self.kind.into(),
            flags: flags.into(),
            length: self.length.into(),
            payload_checksum: self.payload_checksum.unwrap_or(0).into(),
            a: self.a.into(),
            b: self.b.into(),
            c: self.c.into(),
            checksum: 0.into(),
        };
        let mut bytes: [u8; HEADER_LEN] = zerocopy::transmute!(raw);
        let checksum = crc32fast::hash(&bytes[..CHECKSUMMED]);
        bytes[CHECKSUMMED..].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// Checks magic, checksum, flags, kind and length. What is left to check are the kind's fields.
    pub fn decode(bytes: &[u8; HEADER_LEN]) -> Result<Self, WireError> {
        let raw: RawHeader = zerocopy::transmute!(*bytes);
        if raw.magic != MAGIC {
            return Err(WireError::Magic(raw.magic));
        }
        let found = crc32fast::hash(&bytes[..CHECKSUMMED]);
        let expected = raw.checksum.get();
        if found != expected {
            return Err(WireError::HeaderChecksum { found, expected });
        }
        let (kind, flags) = (raw.kind.get(), raw.flags.get());
        if flags & !FLAG_PAYLOAD_CHECKSUM != 0 {
            return Err(field(kind, format!("unknown flags {flags:#06x}")));
        }
        let limit = match payload_limit(kind) {
            Some(limit) => limit,
            None if kind & IGNORABLE != 0 => CONTROL_MAX,
            None => return Err(WireError::UnknownKind(kind)),
        };
        let length = raw.length.get();
        if u64::from(length) > limit as u64 {
            let (length, limit) = (u64::from(length), limit as u64);
            return Err(WireError::TooLong { kind, length, limit });
        }
        let checksummed = flags & FLAG_PAYLOAD_CHECKSUM != 0;
        Ok(Self {
            kind,
            length,
            payload_checksum: checksummed.then(|| raw.payload_checksum.get()),
            a: raw.a.get(),
            b: raw.b.get(),
            c: raw.c.get(),
        })
    }

    /// This version knows the kind; others are skipped (their header says that they may be).
    pub fn is_known(&self) -> bool {
        payload_limit(self.kind).is_some()
    }

    /// Compares `payload` with the checksum; with `required`, there must be one.
    pub fn check_payload(&self, payload: &[u8], required: bool) -> Result<(), WireError> {
        let kind = self.kind;
        match self.payload_checksum {
            None if required => Err(WireError::ChecksumMissing { kind }),
            None => Ok(()),
            Some(expected) => {
                let found = crc32fast::hash(payload);
                if found == expected {
                    Ok(())
                } else {
                    Err(WireError::PayloadChecksum { kind, found, expected })
                }
            }
        }
    }
}
