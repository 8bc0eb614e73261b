//! Connections between the hosts: one control channel with messages both ways, and N data channels.
//!
//! ```text
//!  source                                                     destination
//!  connect ──── Hello ───────────────────────▶ Listener ▶ read_opening
//!  ControlSender / ControlReceiver ◀─────────▶ ControlSender / ControlReceiver
//!  connect ──── Attach (secret) ─────────────▶ Listener ▶ read_opening
//!  DataSender  ──── RAM, devices, sections ──▶ DataReceiver ▶ guest memory, DataSink
//! ```
//!
//! Threads and blocking sockets. Whoever blocks is freed by [`Stream::shutdown`] from another thread.

mod address;
mod checksum;
mod control;
mod data_receiver;
mod data_sender;
mod error;
mod files;
mod limit;
mod listener;
mod opening;
mod payload;
mod rate;
mod reader;
mod stream;

pub use address::Address;
pub use control::{ControlLimits, ControlReceiver, ControlSender};
pub use data_receiver::{DataReceiver, DataSink, DeviceFrame, ReceivedTotals};
pub use data_sender::DataSender;
pub use error::ChannelError;
pub use limit::BandwidthLimit;
pub use listener::{Listener, connect};
pub use opening::{
    OpeningFrame, read_attach_ok, read_opening, send_attach, send_attach_ok, send_attach_refused,
};
pub use payload::Payload;
pub use rate::{LinkMeter, RateSample};
pub use stream::Stream;

pub use crate::wire::{Attach, DataClass};

pub(crate) use checksum::StreamChecksum;
pub(crate) use data_sender::Batch;
pub(crate) use files::FILES_MAX;
#[cfg(feature = "testing")]
pub(crate) use files::{receive as receive_with_files, send as send_with_files};
