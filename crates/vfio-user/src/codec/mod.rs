//! Headers and payloads of vfio-user messages. No I/O, no state.
//!
//! Every `decode` takes bytes from a peer and answers a value or a [`DecodeError`]; none panics, none
//! trusts a count, an `argsz` or an offset it was given, and none takes memory beyond its input.
//! Numbers are in the host's byte order, as on the wire (both ends are on one host). Bytes that
//! follow a payload are ignored unless they belong to it: libvfio-user pads.
//!
//! | module | messages |
//! |---|---|
//! | [`header`] | the 16 bytes before each message, command numbers, size limits |
//! | [`version`] | VERSION and its JSON capabilities |
//! | [`dma`] | DMA_MAP, DMA_UNMAP, DMA_READ, DMA_WRITE |
//! | [`device`] | DEVICE_GET_INFO, GET_REGION_INFO, GET_IRQ_INFO |
//! | [`region`] | REGION_READ, REGION_WRITE |
//! | [`irq`] | SET_IRQS |
//! | [`feature`] | DEVICE_FEATURE: migration, states, DMA logging, sizes |
//! | [`migration`] | MIG_DATA_READ, MIG_DATA_WRITE, precopy information, state digest |

pub mod device;
pub mod dma;
pub mod feature;
pub mod header;
pub mod irq;
pub mod migration;
pub mod region;
pub mod version;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

pub use header::{Command, Header, HeaderError, MessageKind};

/// Why a payload was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The payload ends before its fixed part or before what its counts announce.
    #[error("{what} is {have} bytes, {need} are needed")]
    Short {
        /// Which payload.
        what: &'static str,
        /// Bytes there.
        have: usize,
        /// Bytes needed.
        need: usize,
    },
    /// A field holds what it must not.
    #[error("{what}: {field} is {value:#x}")]
    Field {
        /// Which payload.
        what: &'static str,
        /// Which field.
        field: &'static str,
        /// What it held.
        value: u64,
    },
}

impl DecodeError {
    pub(crate) fn field(what: &'static str, field: &'static str, value: impl Into<u64>) -> Self {
        Self::Field { what, field, value: value.into() }
    }
}

/// Splits the fixed part `T` off the front of `bytes`.
pub(crate) fn take<'a, T: FromBytes + KnownLayout + Immutable>(
    what: &'static str,
    bytes: &'a [u8],
) -> Result<(T, &'a [u8]), DecodeError> {
    T::read_from_prefix(bytes).map_err(|_| DecodeError::Short {
        what,
        have: bytes.len(),
        need: size_of::<T>(),
    })
}

/// The first `len` bytes of `bytes`.
pub(crate) fn take_bytes<'a>(
    what: &'static str,
    bytes: &'a [u8],
    len: usize,
) -> Result<&'a [u8], DecodeError> {
    bytes.get(..len).ok_or(DecodeError::Short { what, have: bytes.len(), need: len })
}

/// Appends the fixed part `value`.
pub(crate) fn put<T: IntoBytes + Immutable>(out: &mut Vec<u8>, value: &T) {
    out.extend_from_slice(value.as_bytes());
}
