//! The 16 bytes before each message.
//!
//! ```text
//!   0      2        4          8         12       16
//!   msg_id command  msg_size   flags     error    payload …
//! ```

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Size of the header, in bytes.
pub const HEADER_BYTES: usize = 16;

/// Room for the fixed part of the largest payload that carries data (a region access or a feature
/// report); a message may be this much larger than the negotiated data size, header included.
pub const FIXED_BYTES_MAX: usize = 64;

/// What a message may always have besides data: capabilities, region areas, logging ranges.
pub const CONTROL_BYTES_MAX: usize = 64 << 10;

/// Type of a message in `flags`.
const TYPE_MASK: u32 = 0xf;
const TYPE_REPLY: u32 = 1;
const NO_REPLY: u32 = 1 << 4;
const ERROR: u32 = 1 << 5;

/// Command numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Command(pub u16);

impl Command {
    /// VERSION.
    pub const VERSION: Self = Self(1);
    /// DMA_MAP.
    pub const DMA_MAP: Self = Self(2);
    /// DMA_UNMAP.
    pub const DMA_UNMAP: Self = Self(3);
    /// DEVICE_GET_INFO.
    pub const DEVICE_GET_INFO: Self = Self(4);
    /// DEVICE_GET_REGION_INFO.
    pub const GET_REGION_INFO: Self = Self(5);
    /// DEVICE_GET_REGION_IO_FDS.
    pub const GET_REGION_IO_FDS: Self = Self(6);
    /// DEVICE_GET_IRQ_INFO.
    pub const GET_IRQ_INFO: Self = Self(7);
    /// DEVICE_SET_IRQS.
    pub const SET_IRQS: Self = Self(8);
    /// REGION_READ.
    pub const REGION_READ: Self = Self(9);
    /// REGION_WRITE.
    pub const REGION_WRITE: Self = Self(10);
    /// DMA_READ, from the server.
    pub const DMA_READ: Self = Self(11);
    /// DMA_WRITE, from the server.
    pub const DMA_WRITE: Self = Self(12);
    /// DEVICE_RESET.
    pub const DEVICE_RESET: Self = Self(13);
    /// DEVICE_FEATURE.
    pub const DEVICE_FEATURE: Self = Self(16);
    /// MIG_DATA_READ.
    pub const MIG_DATA_READ: Self = Self(17);
    /// MIG_DATA_WRITE.
    pub const MIG_DATA_WRITE: Self = Self(18);
    /// Precopy information, our extension; the number is negotiated, this is the default.
    pub const PRECOPY_INFO: Self = Self(0x8001);
    /// State digest, our extension.
    pub const STATE_DIGEST: Self = Self(0x8002);

    /// The name, for errors and logs.
    pub fn name(self) -> &'static str {
        match self {
            Self::VERSION => "VERSION",
            Self::DMA_MAP => "DMA_MAP",
            Self::DMA_UNMAP => "DMA_UNMAP",
            Self::DEVICE_GET_INFO => "DEVICE_GET_INFO",
            Self::GET_REGION_INFO => "DEVICE_GET_REGION_INFO",
            Self::GET_REGION_IO_FDS => "DEVICE_GET_REGION_IO_FDS",
            Self::GET_IRQ_INFO => "DEVICE_GET_IRQ_INFO",
            Self::SET_IRQS => "SET_IRQS",
            Self::REGION_READ => "REGION_READ",
            Self::REGION_WRITE => "REGION_WRITE",
            Self::DMA_READ => "DMA_READ",
            Self::DMA_WRITE => "DMA_WRITE",
            Self::DEVICE_RESET => "DEVICE_RESET",
            Self::DEVICE_FEATURE => "DEVICE_FEATURE",
            Self::MIG_DATA_READ => "MIG_DATA_READ",
            Self::MIG_DATA_WRITE => "MIG_DATA_WRITE",
            Self::PRECOPY_INFO => "PRECOPY_INFO",
            Self::STATE_DIGEST => "STATE_DIGEST",
            _ => "unknown command",
        }
    }
}

/// What a message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MessageKind {
    /// A command.
    Command {
        /// The sender wants no reply.
        no_reply: bool,
    },
    /// A reply to a command that succeeded.
    Reply,
    /// A reply to a command that failed.
    ErrorReply {
        /// The errno; EIO where the peer set the error bit without one.
        errno: i32,
    },
}

/// A checked header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Header {
    /// Chosen by the sender of the command, echoed in the reply.
    pub msg_id: u16,
    /// Echoed in the reply.
    pub command: Command,
    /// Bytes after the header.
    pub payload_bytes: usize,
    /// What the message is.
    pub kind: MessageKind,
}

/// Why a header was refused. The stream is out of step after any of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// A message cannot be smaller than its header.
    #[error("message size {0} is smaller than the header")]
    TooSmall(u32),
    /// A message is larger than what was negotiated.
    #[error("message size {size} is above the limit of {limit} bytes")]
    TooLarge {
        /// The claimed size.
        size: u32,
        /// The limit.
        limit: usize,
    },
    /// Neither command nor reply.
    #[error("message type {0} is neither command nor reply")]
    Type(u32),
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawHeader {
    msg_id: u16,
    command: u16,
    msg_size: u32,
    flags: u32,
    error: u32,
}

impl Header {
    /// A command with `payload_bytes` bytes to follow.
    pub fn command(msg_id: u16, command: Command, payload_bytes: usize) -> Self {
        Self { msg_id, command, payload_bytes, kind: MessageKind::Command { no_reply: false } }
    }

    /// The reply to `self` with `payload_bytes` bytes to follow.
    pub fn reply(&self, payload_bytes: usize) -> Self {
        Self { payload_bytes, kind: MessageKind::Reply, ..*self }
    }

    /// The reply that refuses `self` with `errno`.
    pub fn error_reply(&self, errno: i32, payload_bytes: usize) -> Self {
        Self { payload_bytes, kind: MessageKind::ErrorReply { errno }, ..*self }
    }

    /// Checks a header; a message may have up to `limit_bytes` bytes, header included.
    pub fn decode(bytes: &[u8; HEADER_BYTES], limit_bytes: usize) -> Result<Self, HeaderError> {
        let raw: RawHeader = zerocopy::transmute!(*bytes);
        let size = raw.msg_size as usize;
        let Some(payload_bytes) = size.checked_sub(HEADER_BYTES) else {
            return Err(HeaderError::TooSmall(raw.msg_size));
        };
        if size > limit_bytes {
            return Err(HeaderError::TooLarge { size: raw.msg_size, limit: limit_bytes });
        }
        let kind = match raw.flags & TYPE_MASK {
            0 => MessageKind::Command { no_reply: raw.flags & NO_REPLY != 0 },
            TYPE_REPLY if raw.flags & ERROR == 0 => MessageKind::Reply,
            TYPE_REPLY => {
                // The field may be 0 even then, and must not turn into a success or a negative number.
                let errno = i32::try_from(raw.error).ok().filter(|errno| *errno > 0);
                MessageKind::ErrorReply { errno: errno.unwrap_or(libc::EIO) }
            }
            other => return Err(HeaderError::Type(other)),
        };
        Ok(Self { msg_id: raw.msg_id, command: Command(raw.command), payload_bytes, kind })
    }

    /// The bytes of the header. A payload above 4 GiB cannot be announced: the size saturates, and the
    /// senders of this crate never build one.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let (flags, error) = match self.kind {
            MessageKind::Command { no_reply: false } => (0, 0),
            MessageKind::Command { no_reply: true } => (NO_REPLY, 0),
            MessageKind::Reply => (TYPE_REPLY, 0),
            MessageKind::ErrorReply { errno } => (TYPE_REPLY | ERROR, errno.max(0) as u32),
        };
        let raw = RawHeader {
            msg_id: self.msg_id,
            command: self.command.0,
            msg_size: u32::try_from(self.payload_bytes.saturating_add(HEADER_BYTES))
                .unwrap_or(u32::MAX),
            flags,
            error,
        };
        zerocopy::transmute!(raw)
    }
}

/// The largest message, header included, where `max_data_xfer_bytes` was negotiated.
pub fn message_limit_bytes(max_data_xfer_bytes: usize) -> usize {
    max_data_xfer_bytes.max(CONTROL_BYTES_MAX).saturating_add(FIXED_BYTES_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw(msg_size: u32, flags: u32, error: u32) -> [u8; HEADER_BYTES] {
        zerocopy::transmute!(RawHeader { msg_id: 7, command: 9, msg_size, flags, error })
    }

    #[test]
    fn sizes_below_the_header_and_above_the_limit_are_refused() {
        assert_eq!(Header::decode(&raw(15, 0, 0), 64), Err(HeaderError::TooSmall(15)));
        assert_eq!(Header::decode(&raw(0, 0, 0), 64), Err(HeaderError::TooSmall(0)));
        assert_eq!(
            Header::decode(&raw(65, 0, 0), 64),
            Err(HeaderError::TooLarge { size: 65, limit: 64 })
        );
        assert_eq!(
            Header::decode(&raw(u32::MAX, 0, 0), message_limit_bytes(1 << 20)),
            Err(HeaderError::TooLarge { size: u32::MAX, limit: (1 << 20) + FIXED_BYTES_MAX })
        );
        assert_eq!(Header::decode(&raw(64, 0, 0), 64).map(|h| h.payload_bytes), Ok(48));
    }

    #[test]
    fn an_error_bit_without_errno_is_still_an_error() {
        let kind = |flags, error| Header::decode(&raw(16, flags, error), 64).map(|h| h.kind);
        assert_eq!(kind(0x21, 22), Ok(MessageKind::ErrorReply { errno: 22 }));
        assert_eq!(kind(0x21, 0), Ok(MessageKind::ErrorReply { errno: libc::EIO }));
        assert_eq!(kind(0x21, u32::MAX), Ok(MessageKind::ErrorReply { errno: libc::EIO }));
        // Without the bit the field has no meaning.
        assert_eq!(kind(0x01, 22), Ok(MessageKind::Reply));
        assert_eq!(kind(0x02, 0), Err(HeaderError::Type(2)));
        assert_eq!(kind(0x10, 0), Ok(MessageKind::Command { no_reply: true }));
    }
}
