//! The seams between the parts of the machine.
//!
//! ```text
//!   Body ──(port and memory exits)──> GuestBus ──> serial, PCI, debug ports
//!    ^
//!    └──(interrupts)── IrqConnection <──connect── InterruptController
//! ```
//!
//! The order of making breaks the circle: the interrupt controller first, then PCI on it, then the
//! bus over PCI, then the body over the bus.

use std::os::fd::BorrowedFd;

use migration::{DirtyTracker, Section, SectionVersion};

use crate::error::Result;
use crate::kvm::RingCounters;
use crate::pvh::Boot;

/// An MSI or MSI-X message as the guest programmed it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct MsiMessage {
    /// Address, both halves.
    pub addr: u64,
    /// Data.
    pub data: u32,
}

/// A standing connection from an eventfd to a guest interrupt. Dropping it detaches: when the drop
/// returns, outstanding injections are done, and what the eventfd counts from then on stays in it.
pub trait IrqConnection: Send + Sync {
    /// Points the connection at another message; an MSI connection only.
    fn update_msi(&self, message: MsiMessage) -> Result<()>;
}

/// How interrupts reach the guest. A count that is already in an eventfd when it is connected is
/// injected at once.
pub trait InterruptController: Send + Sync {
    /// Every signal of `trigger` becomes the message.
    fn connect_msi(
        &self,
        trigger: BorrowedFd<'_>,
        message: MsiMessage,
    ) -> Result<Box<dyn IrqConnection>>;

    /// Every signal of `trigger` raises level-triggered line `gsi`; when the guest acknowledges it the
    /// line is lowered and `resample` is signalled, so that the device is unmasked and asserts again
    /// if it still wants service.
    fn connect_intx(
        &self,
        trigger: BorrowedFd<'_>,
        resample: BorrowedFd<'_>,
        gsi: u32,
    ) -> Result<Box<dyn IrqConnection>>;

    /// Delivers one message now. Works while vCPUs are paused too.
    fn inject_msi(&self, message: MsiMessage) -> Result<()>;

    /// Pulses or sets a line that no eventfd drives (the serial port).
    fn set_line(&self, gsi: u32, high: bool) -> Result<()>;
}

/// Port and memory accesses of the guest. Called from any vCPU's thread; never panics on what the
/// guest does. Nobody there: reads give all ones, writes are dropped.
pub trait GuestBus: Send + Sync {
    /// A port read of 1, 2 or 4 bytes.
    fn port_read(&self, port: u16, data: &mut [u8]);
    /// A port write of 1, 2 or 4 bytes.
    fn port_write(&self, port: u16, data: &[u8]);
    /// A memory read of 1 to 8 bytes outside of RAM.
    fn mmio_read(&self, addr: u64, data: &mut [u8]);
    /// A memory write of 1 to 8 bytes outside of RAM.
    fn mmio_write(&self, addr: u64, data: &[u8]);
}

/// The body's part of [`migration::MachineDescription`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BodyDescription {
    /// Kind of machine: `microvm-kvm` or `microvm-process`.
    pub machine: &'static str,
    /// CPUID leaves as `leaf.subleaf=eax,ebx,ecx,edx`.
    pub cpuid: Vec<String>,
    /// Size of the XSAVE area in bytes.
    pub xsave_bytes: u32,
    /// TSC frequency.
    pub tsc_khz: Option<u32>,
    /// The host scales the TSC.
    pub tsc_scaling: bool,
}

/// Who executes the guest. Calls come one at a time.
pub trait Body: Send + Sync {
    /// What must fit on the other side.
    fn description(&self) -> BodyDescription;

    /// The sections [`save`](Self::save) makes.
    fn sections(&self) -> Vec<SectionVersion>;

    /// Starts or resumes; does nothing when it runs already. The guest's clock includes the pause.
    fn resume(&self) -> Result<()>;

    /// Returns when no guest instruction executes and the last exits are completed; does nothing when
    /// it is paused already.
    fn pause(&self) -> Result<()>;

    /// Keeps vCPUs or threads from executing for so many percent of the time, 0 to 99. Returns at once, and
    /// may be called whether they run or not.
    fn set_throttle(&self, percent: u8) -> Result<()>;

    /// Ends for good; threads are joined. Never called from a thread of the body.
    fn stop(&self);

    /// Asks the vCPUs or threads to stop executing, without waiting; may be called from one of them. The
    /// caller's own access is completed first.
    fn halt(&self);

    /// Paused: the state of power-on, entering the guest at `boot`. Memory is the caller's.
    fn reset(&self, boot: &Boot) -> Result<()>;

    /// A tracker of what the body's vCPUs or threads write.
    fn dirty_tracker(&self) -> Result<Box<dyn DirtyTracker>>;

    /// Paused: other files stand behind guest memory than before, at the same addresses.
    fn memory_replaced(&self) -> Result<()>;

    /// What the dirty rings counted; `None` where there are none.
    fn ring_counters(&self) -> Option<RingCounters> {
        None
    }

    /// Paused: the state of vCPUs, interrupt controllers and clocks.
    fn save(&self) -> Result<Vec<Section>>;

    /// Paused, never ran: what [`save`](Self::save) gave. Sections of others are ignored.
    fn load(&self, sections: &[Section]) -> Result<()>;
}
