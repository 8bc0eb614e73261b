//! Record headers and the small payloads.

use super::LoadError;
use crate::internals::Geometry;

/// Size of a record header in bytes.
pub(crate) const HEADER_BYTES: usize = 32;
/// Largest payload in bytes: one group of bulk blocks.
pub(crate) const PAYLOAD_MAX_BYTES: usize = 64 << 10;

const MAGIC: u32 = 0x3144_4656;
/// Version of the format, in HEADER's value.
pub(crate) const FORMAT_VERSION: u64 = 1;

/// What a record holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// First record: format version in `value`, geometry as payload.
    Header,
    /// A configuration begins: size in bytes in `value`, generation as payload.
    Config,
    /// Bytes of it from `value` on.
    ConfigData,
    /// Blocks of group `value`; bit i of `arg`: block i of the group is in the payload.
    Bulk,
    /// Registers, counters, pending interrupts.
    Registers,
    /// Last record: number of records before it in `value`.
    End,
}

impl Kind {
    const ALL: [Kind; 6] =
        [Self::Header, Self::Config, Self::ConfigData, Self::Bulk, Self::Registers, Self::End];

    fn number(self) -> u16 {
        self as u16 + 1
    }
}

/// A record header without magic and checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RecordHeader {
    pub(crate) kind: Kind,
    pub(crate) arg: u16,
    pub(crate) sequence: u64,
    pub(crate) value: u64,
    pub(crate) payload_len: u32,
    pub(crate) checksum: u32,
}

/// Appends a record to `out`.
pub(crate) fn encode(
    out: &mut Vec<u8>,
    kind: Kind,
    arg: u16,
    sequence: u64,
    value: u64,
    write_payload: impl FnOnce(&mut Vec<u8>),
) {
    let start = out.len();
    out.extend_from_slice(&MAGIC.to_le_bytes());
    out.extend_from_slice(&kind.number().to_le_bytes());
    out.extend_from_slice(&arg.to_le_bytes());
    out.extend_from_slice(&sequence.to_le_bytes());
    out.extend_from_slice(&value.to_le_bytes());
    out.extend_from_slice(&[0; 8]);
    write_payload(out);
    let payload_len = (out.len() - start - HEADER_BYTES) as u32;
    out[start + 24..start + 28].copy_from_slice(&payload_len.to_le_bytes());
    let checksum = checksum(&out[start..start + 28], &out[start + HEADER_BYTES..]);
    out[start + 28..start + 32].copy_from_slice(&checksum.to_le_bytes());
}

/// Parses the header of record number `sequence`.
pub(crate) fn decode(bytes: &[u8; HEADER_BYTES], sequence: u64) -> Result<RecordHeader, LoadError> {
    let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    let u32_at = |at: usize| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
    let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
    let kind = Kind::ALL.into_iter().find(|kind| kind.number() == u16_at(4));
    let (MAGIC, Some(kind)) = (u32_at(0), kind) else {
        return Err(LoadError::NotARecord { sequence });
    };
    let payload_len = u32_at(24);
    if payload_len as usize > PAYLOAD_MAX_BYTES {
        return Err(LoadError::TooLong { sequence, len: payload_len.into() });
    }
    let header = RecordHeader {
        kind,
        arg: u16_at(6),
        sequence: u64_at(8),
        value: u64_at(16),
        payload_len,
        checksum: u32_at(28),
    };
    Ok(header)
}

/// The checksum over the first 28 bytes of a header and the payload.
pub(crate) fn checksum(header: &[u8], payload: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(header);
    hasher.update(payload);
    hasher.finalize()
}

/// HEADER's payload.
pub(crate) fn encode_geometry(geometry: &Geometry) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&geometry.bulk_bytes.to_le_bytes());
    bytes[8..12].copy_from_slice(&geometry.initial_kib.to_le_bytes());
    bytes[12..].copy_from_slice(&geometry.initial_max_kib.to_le_bytes());
    bytes
}

/// Checks that HEADER fits `geometry`, naming both values where not.
pub(crate) fn check_geometry(
    version: u64,
    payload: &[u8],
    geometry: &Geometry,
) -> Result<(), LoadError> {
    let ours = encode_geometry(geometry);
    if version != FORMAT_VERSION {
        let what = format!("stream format {version}, this device knows {FORMAT_VERSION}");
        return Err(LoadError::Incompatible(what));
    }
    if payload.len() != ours.len() {
        let what = format!("a shape of {} bytes, not {}", payload.len(), ours.len());
        return Err(LoadError::Incompatible(what));
    }
    for (name, range) in
        [("bulk bytes", 0..8), ("initial KiB", 8..12), ("largest configuration in KiB", 12..16)]
    {
        if payload[range.clone()] != ours[range.clone()] {
            let number = |bytes: &[u8]| bytes.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b));
            let (theirs, ours) = (number(&payload[range.clone()]), number(&ours[range]));
            return Err(LoadError::Incompatible(format!("{name}: {theirs}, here {ours}")));
        }
    }
    Ok(())
}
