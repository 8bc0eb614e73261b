//! The bytes between the hosts: frames, and what each kind of frame holds. Pure; no I/O.
//!
//! Every frame is a fixed header of 40 bytes, little endian, and a payload of `length` bytes:
//!
//! ```text
//!  0     4     6      8       12                16    24    32    36          40
//!  ├magic┼kind─┼flags─┼length─┼payload checksum─┼─ a ─┼─ b ─┼─ c ─┼─checksum──┤ payload …
//!   "VFY1" u16   u16    u32     u32               u64   u64   u32  CRC-32 of 0..36
//! ```
//!
//! - `kind`: bit 15 ([`IGNORABLE`]) says that a receiver which does not know the kind skips the frame;
//!   an unknown kind without it ends the migration.
//! - `flags`: bit 0 = the payload checksum (CRC-32, IEEE) is there. Other bits are zero.
//! - `a`, `b`, `c`: fields of the kind, zero where the table has nothing.
//!
//! # Kinds
//!
//! Control (payload: JSON of the message's fields, empty where it has none; always checksummed):
//!
//! | number | message | number | message |
//! |---|---|---|---|
//! | `0x0001` | Hello | `0x000f` | RolledBack |
//! | `0x0002` | Accept | `0x0010` | StateEnd |
//! | `0x0003` | Refuse | `0x0011` | Ready |
//! | `0x0004` | Describe | `0x0012` | Commit |
//! | `0x0005` | DescribeOk | `0x0013` | Running |
//! | `0x0006` | Mismatch | `0x0014` | Never |
//! | `0x0007` | SessionBegin | `0x0015` | Query |
//! | `0x0008` | InitialDataSent | `0x0016` | Unknown |
//! | `0x0009` | SwitchoverAck | `0x0017` | Abort |
//! | `0x000a` | Reinit | `0x8018` | Telemetry |
//! | `0x800b` | Pass | `0x0019` | HashRequest |
//! | `0x000c` | StopCopyBegin | `0x001a` | Hashes |
//! | `0x000d` | Revoked | `0x001b` | Cancel |
//! | `0x000e` | RollBack | `0x001c` | Failed |
//! | `0x801e` | Timeline | `0x801d` | KeepAlive |
//! | `0x8020` | Echo | `0x801f` | Cost |
//! | `0x8021` | Echoed | | |
//!
//! Data:
//!
//! | number | frame | a | b | c | payload |
//! |---|---|---|---|---|---|
//! | `0x0100` | Attach | connection | 0 | channel | migration, secret (16 bytes each, big endian as the id is written); checksummed |
//! | `0x0101` | AttachOk | connection | 0 | channel | – |
//! | `0x0102` | AttachRefused | connection | 0 | channel | why, UTF-8; checksummed |
//! | `0x0200` | RamPages | GPA | 0 | 0 | whole pages of one 2 MiB block; checksum as negotiated |
//! | `0x0201` | RamZero | GPA | bytes | 0 | –; whole pages of one 2 MiB block |
//! | `0x0202` | RamPacked | GPA | bytes when unpacked | codec | whole pages of one 2 MiB block, compressed; checksum as negotiated |
//! | `0x0210` | Device | session | stream offset | device, class << 16 | stream bytes; checksum as negotiated |
//! | `0x0220` | Section | attempt | index | version | name length u16, kind length u16, name, kind, bytes; checksummed |
//!
//! Each length has a limit of its kind ([`payload_limit`]) that is checked before memory is taken.

mod control;
mod data;
mod header;

pub use control::{decode_message, encode_message, is_control};
pub use data::{
    Attach, DataClass, DeviceHead, RamRange, SectionHead, decode_section, device_header,
    encode_section, ram_packed_header, ram_pages_header, ram_zero_header,
};
pub use header::{FrameHeader, HEADER_LEN, MAGIC};

/// Set in a kind that an unknowing receiver may skip.
pub const IGNORABLE: u16 = 0x8000;

/// The unit in which memory is dealt out to channels, in bytes. No RAM frame crosses its boundary.
pub const RAM_BLOCK: u64 = 2 << 20;

/// Longest payload of a device frame, in bytes.
pub const FRAME_DEVICE_MAX: usize = 1 << 20;

/// Longest section, in bytes of its payload.
pub const SECTION_MAX: usize = 16 << 20;

/// Longest name or kind of a section, in bytes.
pub const SECTION_NAME_MAX: usize = 255;

/// Longest Describe, in bytes of JSON.
pub const DESCRIBE_MAX: usize = 4 << 20;

/// Longest other control payload, in bytes of JSON; also the most that is skipped of an unknown kind.
pub const CONTROL_MAX: usize = 64 << 10;

/// Kinds of frames; see the module's tables.
#[allow(missing_docs)]
pub mod kind {
    use super::IGNORABLE;

    pub const HELLO: u16 = 0x01;
    pub const ACCEPT: u16 = 0x02;
    pub const REFUSE: u16 = 0x03;
    pub const DESCRIBE: u16 = 0x04;
    pub const DESCRIBE_OK: u16 = 0x05;
    pub const MISMATCH: u16 = 0x06;
    pub const SESSION_BEGIN: u16 = 0x07;
    pub const INITIAL_DATA_SENT: u16 = 0x08;
    pub const SWITCHOVER_ACK: u16 = 0x09;
    pub const REINIT: u16 = 0x0a;
    pub const PASS: u16 = 0x0b | IGNORABLE;
    pub const STOP_COPY_BEGIN: u16 = 0x0c;
    pub const REVOKED: u16 = 0x0d;
    pub const ROLL_BACK: u16 = 0x0e;
    pub const ROLLED_BACK: u16 = 0x0f;
    pub const STATE_END: u16 = 0x10;
    pub const READY: u16 = 0x11;
    pub const COMMIT: u16 = 0x12;
    pub const RUNNING: u16 = 0x13;
    pub const NEVER: u16 = 0x14;
    pub const QUERY: u16 = 0x15;
    pub const UNKNOWN: u16 = 0x16;
    pub const ABORT: u16 = 0x17;
    pub const TELEMETRY: u16 = 0x18 | IGNORABLE;
    pub const HASH_REQUEST: u16 = 0x19;
    pub const HASHES: u16 = 0x1a;
    pub const CANCEL: u16 = 0x1b;
    pub const FAILED: u16 = 0x1c;
    pub const KEEP_ALIVE: u16 = 0x1d | IGNORABLE;
    pub const TIMELINE: u16 = 0x1e | IGNORABLE;
    pub const COST: u16 = 0x1f | IGNORABLE;
    pub const ECHO: u16 = 0x20 | IGNORABLE;
    pub const ECHOED: u16 = 0x21 | IGNORABLE;

    pub const ATTACH: u16 = 0x100;
    pub const ATTACH_OK: u16 = 0x101;
    pub const ATTACH_REFUSED: u16 = 0x102;
    pub const RAM_PAGES: u16 = 0x200;
    pub const RAM_ZERO: u16 = 0x201;
    pub const RAM_PACKED: u16 = 0x202;
    pub const DEVICE: u16 = 0x210;
    pub const SECTION: u16 = 0x220;
}

/// The longest payload of a kind, in bytes; `None` for a kind this version does not know.
pub fn payload_limit(kind: u16) -> Option<usize> {
    Some(match kind {
        kind::DESCRIBE => DESCRIBE_MAX,
        kind::ATTACH => 32,
        kind::ATTACH_OK | kind::RAM_ZERO => 0,
        kind::ATTACH_REFUSED => 4096,
        kind::RAM_PAGES | kind::RAM_PACKED => RAM_BLOCK as usize,
        kind::DEVICE => FRAME_DEVICE_MAX,
        kind::SECTION => SECTION_MAX + 4 + 2 * SECTION_NAME_MAX,
        _ if is_control(kind) => CONTROL_MAX,
        _ => return None,
    })
}

/// What is wrong with bytes that should be a frame.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    /// Not our protocol.
    #[error("not a vmferry frame (it begins with {0:02x?}); is the other side vmferry?")]
    Magic([u8; 4]),
    /// The header was damaged on the way.
    #[error("frame header damaged: checksum {found:#010x}, expected {expected:#010x}")]
    HeaderChecksum {
        /// As computed.
        found: u32,
        /// As sent.
        expected: u32,
    },
    /// The payload was damaged on the way.
    #[error(
        "payload of frame kind {kind:#06x} damaged: checksum {found:#010x}, expected {expected:#010x}"
    )]
    PayloadChecksum {
        /// The kind.
        kind: u16,
        /// As computed.
        found: u32,
        /// As sent.
        expected: u32,
    },
    /// A payload checksum was agreed on and is not there.
    #[error("frame kind {kind:#06x} came without the payload checksum that was agreed on")]
    ChecksumMissing {
        /// The kind.
        kind: u16,
    },
    /// The kind is from another version and may not be skipped.
    #[error("unknown frame kind {0:#06x}; the other side speaks a newer protocol")]
    UnknownKind(u16),
    /// The kind does not belong here.
    #[error("frame kind {kind:#06x} does not belong on a {channel} channel")]
    WrongChannel {
        /// The kind.
        kind: u16,
        /// `control` or `data`.
        channel: &'static str,
    },
    /// Longer than the kind allows.
    #[error("frame kind {kind:#06x} of {length} bytes; the limit is {limit}")]
    TooLong {
        /// The kind.
        kind: u16,
        /// Payload length in bytes.
        length: u64,
        /// Its limit in bytes.
        limit: u64,
    },
    /// A field of the frame makes no sense.
    #[error("frame kind {kind:#06x}: {what}")]
    Field {
        /// The kind.
        kind: u16,
        /// Which field, and why.
        what: String,
    },
}

pub(crate) fn field(kind: u16, what: impl Into<String>) -> WireError {
    WireError::Field { kind, what: what.into() }
}
