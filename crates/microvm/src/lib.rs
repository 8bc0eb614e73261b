//! The built-in VMM: a small machine that runs one guest with VFIO devices, and the example of how
//! to embed the migration engine.
//!
//! ```text
//!                Vm (implements migration::Vmm)
//!      ┌──────────┬──────────┬───────────┬──────────────┐
//!    Body      GuestMemory  Bus          GuestDevice…   Events ─> engine
//!   KvmBody                 ├ serial     (PciFunction,
//!   ProcessBody             ├ pci ───────> MigratableDevice)
//!      │                    └ debug ports (heartbeat, power-off)
//!      └ InterruptController <── MSI / INTx connections of pci
//! ```
//!
//! A [`Body`] is what executes the guest: vCPUs of KVM, or threads of this process that run the same
//! workload. Both reach the machine through the same [`GuestBus`], so a device, the serial port and
//! the heartbeat behave alike under both.
//!
//! | module | holds |
//! |---|---|
//! | [`config`] | [`VmConfig`] and its parts |
//! | [`vm`] | [`Vm`] |
//! | [`layout`] | the machine's guest-visible addresses |
//! | [`body`] | [`Body`], [`GuestBus`], [`InterruptController`]: the seams between the parts |
//! | [`pvh`] | loading a PVH kernel |
//! | [`kvm`], [`process`] | the two bodies |
//! | [`pci`] | PCI functions backed by VFIO devices |
//! | [`serial`] | the serial console |
//! | [`contents`] | filling, hashing and discarding all of memory |
//! | [`witness`] | the proof that two never ran at once |
//! | [`workload`] | the built-in guest and its mailbox |
//! | [`section`] | bounded encoding of machine-state sections |
//! | [`events`] | guest events on their way to the engine |
//! | [`error`] | [`Error`] |

pub mod body;
mod boot;
mod bus;
pub mod config;
pub mod contents;
mod control;
pub mod error;
pub mod events;
pub mod kvm;
pub mod layout;
mod mptable;
pub mod pci;
pub mod process;
pub mod pvh;
pub mod section;
pub mod serial;
mod throttle;
pub mod time;
pub mod vm;
pub mod witness;
pub mod workload;

pub use body::{Body, BodyDescription, GuestBus, InterruptController, IrqConnection, MsiMessage};
pub use config::{
    DeviceBackend, DeviceConfig, DirtyRing, DirtyTracking, GuestKind, SerialConfig, VmConfig,
    WorkloadConfig,
};
pub use error::{Error, Result};
pub use events::Events;
pub use kvm::{RingCounters, available as kvm_available, dirty_ring_available};
pub use process::available as process_guest_available;
pub use vm::{Lifecycle, Vm, VmStatus};
pub use workload::mailbox::{Command, Counters};
