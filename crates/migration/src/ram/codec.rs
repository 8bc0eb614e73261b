//! Pages, compressed: lz4 where the link is fast, zstd where it is slow.
//!
//! Bytes from the other side are a claim: what they unpack to goes into a buffer of exactly the length that the header
//! named (at most a block of 2 MiB), and only when all of it is there to guest memory.

use lz4_flex::block::{CompressTable, compress_into_with_table, decompress_into};
use switchover::message::Features;

/// The level of zstd: the fastest of the ordinary ones. Measured: higher ones are slower than any link this is for.
const ZSTD_LEVEL: i32 = 1;
/// Room beyond the pages themselves that packing 128 KiB of them wants, at most: LZ4's bound is a tenth and 20 bytes.
pub(crate) const OVERHEAD_BYTES: usize = 16 << 10;

/// How pages are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Codec {
    /// LZ4's block format.
    Lz4,
    /// A zstd frame.
    Zstd,
}

impl Codec {
    /// What both sides can do, of those that the source wants.
    pub fn of(features: Features) -> Option<Self> {
        match features {
            Features { zstd: true, .. } => Some(Self::Zstd),
            Features { lz4: true, .. } => Some(Self::Lz4),
            _ => None,
        }
    }

    /// Its number on the wire.
    pub fn number(self) -> u32 {
        match self {
            Self::Lz4 => 1,
            Self::Zstd => 2,
        }
    }

    /// By its number.
    pub fn numbered(number: u32) -> Option<Self> {
        [Self::Lz4, Self::Zstd].into_iter().find(|codec| codec.number() == number)
    }

    /// As one calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
        }
    }
}

/// Packs pages; keeps its tables.
pub(crate) enum Packer {
    Lz4(CompressTable),
    Zstd(zstd::bulk::Compressor<'static>),
}

impl Packer {
    /// `None` where there is no memory for it.
    pub(crate) fn new(codec: Codec) -> Option<Self> {
        Some(match codec {
            Codec::Lz4 => Self::Lz4(CompressTable::large()),
            Codec::Zstd => Self::Zstd(zstd::bulk::Compressor::new(ZSTD_LEVEL).ok()?),
        })
    }

    /// Packs `pages` to the start of `into`; answers with the bytes it took, or `None` when it does not get smaller.
    pub(crate) fn pack(&mut self, pages: &[u8], into: &mut [u8]) -> Option<usize> {
        let packed = match self {
            Self::Lz4(table) => compress_into_with_table(pages, into, table).ok()?,
            Self::Zstd(zstd) => zstd.compress_to_buffer(pages, into).ok()?,
        };
        // What saves less than a sixteenth is not worth unpacking.
        (packed <= pages.len() - pages.len() / 16).then_some(packed)
    }
}

/// Unpacks pages.
#[derive(Default)]
pub(crate) struct Unpacker {
    zstd: Option<zstd::bulk::Decompressor<'static>>,
}

impl std::fmt::Debug for Unpacker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Unpacker")
    }
}

impl Unpacker {
    /// Fills `pages` exactly, or says what is wrong with `packed`.
    pub(crate) fn unpack(
        &mut self,
        codec: Codec,
        packed: &[u8],
        pages: &mut [u8],
    ) -> Result<(), String> {
        let unpacked = match codec {
            Codec::Lz4 => decompress_into(packed, pages).map_err(|error| error.to_string())?,
            Codec::Zstd => {
                if self.zstd.is_none() {
                    let zstd =
                        zstd::bulk::Decompressor::new().map_err(|error| error.to_string())?;
                    self.zstd = Some(zstd);
                }
                let Some(zstd) = &mut self.zstd else { return Err("no decompressor".into()) };
                zstd.decompress_to_buffer(packed, pages).map_err(|error| error.to_string())?
            }
        };
        if unpacked == pages.len() {
            Ok(())
        } else {
            Err(format!("{unpacked} bytes came of it, {} were announced", pages.len()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOTH: [Codec; 2] = [Codec::Lz4, Codec::Zstd];

    fn noise(bytes: usize) -> Vec<u8> {
        let mut random = 0x9e37_79b9_7f4a_7c15u64;
        let next = |_| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random as u8
        };
        (0..bytes).map(next).collect()
    }

    #[test]
    fn what_was_packed_is_unpacked_and_what_does_not_shrink_is_not_packed() {
        let text: Vec<u8> = (0..64 << 10u32).map(|i| (i / 97 % 50) as u8).collect();
        for codec in BOTH {
            assert_eq!(Codec::numbered(codec.number()), Some(codec));
            let (mut packer, mut unpacker) = (Packer::new(codec).unwrap(), Unpacker::default());
            for pages in [&text[..4096], &text[..]] {
                let mut packed = vec![0; pages.len() + OVERHEAD_BYTES];
                let len = packer.pack(pages, &mut packed).unwrap();
                let mut back = vec![0; pages.len()];
                unpacker.unpack(codec, &packed[..len], &mut back).unwrap();
                assert!(back == pages, "{codec:?}");
            }
            for bytes in [4096, 128 << 10] {
                let mut packed = vec![0; bytes + OVERHEAD_BYTES];
                assert_eq!(packer.pack(&noise(bytes), &mut packed), None, "{codec:?}");
            }
        }
    }

    /// More or less than was announced, garbage, every cut: an error, never more than the buffer.
    #[test]
    fn what_does_not_unpack_to_exactly_what_was_announced_is_refused() {
        let pages = vec![7; 8192];
        for codec in BOTH {
            let mut unpacker = Unpacker::default();
            let mut packed = vec![0; pages.len() + OVERHEAD_BYTES];
            let len = Packer::new(codec).unwrap().pack(&pages, &mut packed).unwrap();
            packed.truncate(len);
            for announced in [0, 4096, 8191, 8193, 12288] {
                let end = unpacker.unpack(codec, &packed, &mut vec![0; announced]);
                assert!(end.is_err(), "{codec:?}: {announced}");
            }
            for cut in 0..len {
                let end = unpacker.unpack(codec, &packed[..cut], &mut vec![0; 8192]);
                assert!(end.is_err(), "{codec:?}: {cut} of {len}");
            }
            for at in 0..64 {
                let garbage = &noise(4096 + at)[at..];
                assert!(unpacker.unpack(codec, garbage, &mut vec![0; 8192]).is_err());
            }
            // After all that, it still works.
            unpacker.unpack(codec, &packed, &mut vec![0; 8192]).unwrap();
        }
    }
}
