//! The control socket of a VM's daemon: one JSON object per line, both ways (docs/api.md).
//!
//! ```text
//!   {"execute":"status","id":1}                 ──▶
//!                                               ◀── {"return":{…},"id":1}
//!   {"execute":"migrate","arguments":{…}}       ──▶
//!                                               ◀── {"error":{"class":"refused","desc":"…"}}
//! ```
//!
//! | module | holds |
//! |---|---|
//! | [`protocol`] | requests, errors, the limits of both ends |
//! | [`socket`] | a listening socket that only its owner can reach |
//! | [`server`] | clients, each on its own thread |
//! | [`client`] | the other end |

pub mod client;
pub mod protocol;
pub mod server;
pub mod socket;

pub use client::{CallError, Client};
pub use protocol::{ApiError, ErrorClass, LINE_MAX_BYTES, Request};
