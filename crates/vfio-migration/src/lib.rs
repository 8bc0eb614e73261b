//! VFIO migration v2 as types and tables.
//!
//! This crate knows what the Linux uAPI says and nothing of how it is reached: no ioctl, no
//! socket, no thread. Backends (the kernel, vfio-user, software devices) implement its two traits;
//! the migration engine and the VMM drive devices through them:
//!
//! ```text
//!   engine ──> MigratableDevice     states, data stream, PRECOPY_INFO, DMA log     (&mut, one owner)
//!   VMM    ──> PciFunction          regions, interrupts, DMA map, reset            (&, many threads)
//! ```
//!
//! | module | holds |
//! |---|---|
//! | [`state`] | [`DeviceState`] and its numbers |
//! | [`arcs`] | direct arcs, combination paths, what an arc does to the data session |
//! | [`capability`] | migration flags and optional features |
//! | [`precopy`] | [`PrecopyInfo`], v1 and v2 kept apart by type |
//! | [`device`] | [`MigratableDevice`], what the engine drives |
//! | [`pci`] | [`PciFunction`], what a VMM drives |
//! | [`recovery`] | what to do after a failed transition |
//! | [`error`] | [`DeviceError`] |

pub mod arcs;
pub mod capability;
pub mod device;
pub mod error;
pub mod pci;
pub mod precopy;
pub mod recovery;
pub mod state;

pub use arcs::{SessionEffect, next_hop, path};
pub use capability::{DeviceCapabilities, MigrationFlags};
pub use device::{DmaRange, MigratableDevice, ReadOutcome};
pub use error::{DeviceError, DeviceResult};
pub use pci::{
    DmaAccess, DmaBacking, DmaPermissions, IrqIndex, IrqInfo, MmapArea, PciFunction,
    PciFunctionInfo, RegionFlags, RegionInfo,
};
pub use precopy::{PrecopyInfo, PrecopyInfoV1, PrecopyInfoV2, RawPrecopyInfo};
pub use state::DeviceState;
