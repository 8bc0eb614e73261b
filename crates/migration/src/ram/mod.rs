//! Guest memory on its way: pages read where they lie and written where they belong, never copied between.
//!
//! ```text
//!  DirtyBitmap ─▶ blocks of 2 MiB, block i to channel i mod n ─▶ zero runs  ─▶ frames ─▶ DataSender
//!                 (a page keeps its channel, so its            ─▶ page runs     (iovecs)
//!                  versions stay in order)
//! ```

mod codec;
mod extents;
mod populate;
mod receive;
mod send;
mod written;
mod zero;

pub use codec::Codec;
pub use populate::{Background, Populate, Population};
pub use send::{RamError, RamPass, RamStats, send_pages};
pub use zero::is_zero_page;

pub(crate) use codec::Unpacker;
pub(crate) use extents::{data_extents, next_data, within};
pub(crate) use receive::RamReceiver;
