//! The live-migration engine a VMM embeds.
//!
//! The engine performs what the brain (`switchover`) decides: it moves memory, device state and
//! machine state between two hosts. It knows devices only by
//! [`MigratableDevice`](vfio_migration::MigratableDevice) and the VMM only by the traits in [`vmm`].

mod backing;
pub mod bitmap;
mod calls;
pub mod channel;
mod clock;
pub mod cost;
pub mod describe;
pub mod destination;
mod gate;
pub mod hash;
pub mod history;
mod ids;
mod late_log;
mod lease;
mod mailbox;
pub mod memory;
pub mod observer;
pub mod ram;
pub mod record;
pub mod report;
pub mod source;
#[cfg(feature = "testing")]
pub mod testing;
pub mod trace;
pub mod vmm;
pub mod wire;
mod worth;

pub use backing::PageSizes;
pub use bitmap::{Completeness, DirtyBitmap};
pub use destination::{Incoming, IncomingConfig, IncomingStatus};
pub use memory::{GuestMemory, HugePages, MemoryError, PAGE_SIZE, RegionLayout};
pub use observer::{NoObserver, Observer};
pub use report::{Progress, Report};
pub use source::{Controls, Outgoing, OutgoingConfig, RecoverConfig};
pub use vmm::{
    Device, DeviceDescription, DirtyClearer, DirtyTracker, GuestEvent, GuestEventSink,
    MachineDescription, OutsideResource, Section, SectionVersion, Vmm, VmmError,
};
