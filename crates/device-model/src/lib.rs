//! Software VFIO devices: the *device* side of migration v2.
//!
//! The engine of a migration is tested against devices that do what drivers do, including what
//! drivers do wrong. This crate has one such device, in layers:
//!
//! ```text
//!   serve (feature)   the device as its own process, over vfio-user
//!   soft              SoftDevice: a worker thread, eventfds, guest memory by file   threads, clock
//!   ───────────────────────────────────────────────────────────────────────────────────────────────
//!   core              DeviceCore: registers, state machine, streams, DMA log        no I/O, `now` given
//! ```
//!
//! [`DeviceCore`] takes the time as an argument and reaches guest memory through [`GuestDma`] only, so
//! a simulator can drive it in virtual time. What a guest sees of it is `docs/workload.md`; what a VMM
//! sees is the Linux uAPI, with the habits of its [`Profile`] and the deviations of its [`Quirks`].
//!
//! | module | holds |
//! |---|---|
//! | [`core`] | [`DeviceCore`] |
//! | [`counted`] | [`CountedDevice`]: the same in numbers, for simulators |
//! | [`regs`] | the registers of BAR 0 |
//! | [`feature`] | `VFIO_DEVICE_FEATURE` with the checks the kernel core makes for drivers |
//! | [`precopy`] | the check of a PRECOPY_INFO request that every device shares |
//! | [`stream`] | the format of the data stream, saving and loading |
//! | [`dma_log`] | DMA logging |
//! | [`quirks`] | deviations that can be switched on |
//! | [`timing`] | how long transitions take |
//! | [`soft`] | [`SoftDevice`] |
//! | `serve` | serving a device (feature `serve`) |

pub mod core;
pub mod counted;
pub mod dma_log;
pub mod error;
pub mod feature;
pub mod precopy;
pub mod quirks;
pub mod regs;
#[cfg(feature = "serve")]
pub mod serve;
pub mod soft;
pub mod stream;
pub mod timing;

mod blocks;
mod internals;
mod irq;
mod pattern;
mod pci_config;

pub use crate::core::{DeviceCore, DmaFault, GuestDma, RawRead, Session};
pub use crate::counted::CountedDevice;
pub use crate::error::ModelError;
pub use crate::quirks::Quirks;
pub use crate::soft::{SoftDevice, SoftOptions};
pub use crate::timing::Timing;
pub use device_profile::Profile;
