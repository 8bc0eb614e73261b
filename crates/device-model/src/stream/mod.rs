//! The format of the data stream.
//!
//! A session is one sequence of records, each with a header of 32 bytes:
//!
//! ```text
//!   0       4     6     8            16           24            28         32
//!   | magic | kind | arg |  sequence  |   value    | payload len | checksum | payload …
//!   HEADER  CONFIG  config data …  BULK BULK …  [CONFIG … BULK …]   REGISTERS  END
//! ```
//!
//! The sequence counts records from 0 and the checksum (CRC-32) covers the header before it and the
//! payload, so that a lost, repeated, reordered or damaged record is found. A CONFIG record throws away
//! any configuration that came before; a bulk block that comes again replaces the older one. END says
//! how many records came, so that a truncated stream is not taken for a whole one.
//!
//! Lengths are claims: a payload has at most 64 KiB, and sizes beyond the device's own are refused
//! before memory is taken.

pub(crate) mod loader;
pub(crate) mod record;
pub(crate) mod registers;
pub(crate) mod saver;

/// Why data written to a resuming session does not validate. The SET out of RESUMING answers EINVAL.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// No record begins here.
    #[error("record {sequence}: no record header")]
    NotARecord {
        /// The record's number.
        sequence: u64,
    },
    /// The checksum does not fit.
    #[error("record {sequence}: checksum mismatch")]
    Checksum {
        /// The record's number.
        sequence: u64,
    },
    /// Records are missing, repeated or out of order.
    #[error("record {expected} was expected, {found} came")]
    Sequence {
        /// The number expected.
        expected: u64,
        /// The number found.
        found: u64,
    },
    /// A record's payload is longer than any.
    #[error("record {sequence} claims a payload of {len} bytes")]
    TooLong {
        /// The record's number.
        sequence: u64,
        /// The length it claims, in bytes.
        len: u64,
    },
    /// The state is of a device of another shape.
    #[error("the state is of another device: {0}")]
    Incompatible(String),
    /// A record that cannot be, or not here.
    #[error("record {sequence}: {what}")]
    Invalid {
        /// The record's number.
        sequence: u64,
        /// What is wrong.
        what: String,
    },
    /// The session ended before the state was whole.
    #[error("the state is incomplete: {0}")]
    Incomplete(&'static str),
}
