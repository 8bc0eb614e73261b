//! The traits by which a VMM plugs in its vCPUs, memory, machine state and devices.
//!
//! ```text
//!   Vmm ── memory()            guest memory, the VMM's own writes marked
//!       ├─ dirty_trackers()    vCPU writes (KVM log, PAGEMAP_SCAN)
//!       ├─ pause() / resume()
//!       ├─ save / load machine state, as named sections
//!       └─ devices()           each a MigratableDevice behind a lock
//! ```

use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use vfio_migration::MigratableDevice;

use crate::bitmap::{Completeness, DirtyBitmap};
use crate::memory::{GuestMemory, MemoryError, RegionLayout};

/// A failure inside the VMM.
#[derive(Debug, thiserror::Error)]
#[error("{what}")]
pub struct VmmError {
    /// What failed and what to do, for a person.
    pub what: String,
    /// The errno behind it, where there is one.
    pub errno: Option<i32>,
}

impl VmmError {
    /// An error that is a sentence.
    pub fn new(what: impl Into<String>) -> Self {
        Self { what: what.into(), errno: None }
    }

    /// An error with an OS cause.
    pub fn os(what: impl Into<String>, error: &std::io::Error) -> Self {
        Self { what: format!("{}: {error}", what.into()), errno: error.raw_os_error() }
    }
}

impl From<MemoryError> for VmmError {
    fn from(error: MemoryError) -> Self {
        let errno = match &error {
            MemoryError::Os { source, .. } => source.raw_os_error(),
            _ => None,
        };
        Self { what: error.to_string(), errno }
    }
}

/// A part of the machine state; the engine does not look inside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    /// Which part, such as `vcpu0` or `pci:nic0`; unique.
    pub name: String,
    /// What the bytes mean, such as `kvm-vcpu`.
    pub kind: String,
    /// Version of the kind.
    pub version: u32,
    /// The bytes.
    pub payload: Vec<u8>,
}

/// A section that will come, as Describe names it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct SectionVersion {
    /// As [`Section::name`].
    pub name: String,
    /// As [`Section::kind`].
    pub kind: String,
    /// As [`Section::version`].
    pub version: u32,
}

/// What must fit on both sides, apart from devices.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MachineDescription {
    /// Kind of machine and guest, such as `microvm-kvm`.
    pub machine: String,
    /// Version of the machine's guest-visible shape.
    pub version: u32,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Memory regions.
    pub memory: Vec<RegionLayout>,
    /// CPUID leaves, each as text `leaf.subleaf=eax,ebx,ecx,edx` in hex; empty without KVM.
    pub cpuid: Vec<String>,
    /// Size of the XSAVE area in bytes; 0 without KVM.
    pub xsave_bytes: u32,
    /// TSC frequency in kHz; `None` without KVM. Must match within 250 ppm or the host must scale.
    pub tsc_khz: Option<u32>,
    /// The destination's host can scale the TSC.
    pub tsc_scaling: bool,
    /// The sections the machine state will have.
    pub sections: Vec<SectionVersion>,
}

/// What must fit on both sides of one device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct DeviceDescription {
    /// The user's name for the device; pairs source and destination.
    pub id: String,
    /// How it is reached, such as `vfio-user`.
    pub backend: String,
    /// PCI vendor, device, subsystem vendor, subsystem ids.
    pub pci_ids: [u16; 4],
    /// PCI class code and revision.
    pub class_revision: u32,
    /// Region sizes in bytes, by region index.
    pub region_sizes: Vec<u64>,
    /// Region flags (bit 0 read, 1 write, 2 mmap), by region index.
    pub region_flags: Vec<u32>,
    /// Interrupt counts, by interrupt index.
    pub irq_counts: Vec<u32>,
    /// `VFIO_MIGRATION_*` flags.
    pub migration_flags: u64,
    /// PRECOPY_INFO is there.
    pub precopy_info: bool,
    /// INFOv2 is opted in.
    pub precopy_info_v2: bool,
    /// MIG_DATA_SIZE is there.
    pub data_size: bool,
    /// The device logs its DMA.
    pub dma_logging: bool,
    /// A reset leads to RUNNING.
    pub reset_runs: bool,
}

/// A device as the engine takes it. The lock is held by whoever calls the device, so calls on one
/// device are serialised.
#[derive(Clone)]
pub struct Device {
    /// What must fit.
    pub description: DeviceDescription,
    /// The device itself.
    pub handle: Arc<Mutex<dyn MigratableDevice>>,
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Device").field(&self.description.id).finish()
    }
}

/// A writer of guest memory that is tracked outside of [`GuestMemory`]: vCPUs or guest threads.
pub trait DirtyTracker: Send {
    /// Short name for reports, such as `kvm-dirty-log`.
    fn name(&self) -> &'static str;
    /// Starts tracking. Comes before the first page is read.
    fn start(&mut self) -> Result<(), VmmError>;
    /// Ors the pages written since the last call (or the start) into `into` and forgets them. A page
    /// written while this runs is reported now or next time, never lost.
    fn collect(&mut self, into: &mut DirtyBitmap) -> Result<Completeness, VmmError>;
    /// Stops tracking.
    fn stop(&mut self) -> Result<(), VmmError>;
    /// Before [`start`](Self::start): from then on what [`collect`](Self::collect) reports is not forgotten but
    /// by what is returned, right before pages are copied. A page that is written again before that is copied
    /// once, and one that is reported but not copied stays reported. All of memory may be reported until it is
    /// forgotten for the first time. `None`: the tracker cannot.
    fn defer(&mut self) -> Option<Arc<dyn DirtyClearer>> {
        None
    }
}

/// Forgets pages that a [`DirtyTracker`] reports. Called from several threads at once, each for pages of its
/// own.
pub trait DirtyClearer: Send + Sync {
    /// Forgets the pages of region `region` whose bits are set in `words`, of which bit 0 of the first word is
    /// page `first`, a multiple of 64. A page written from here on is reported again.
    fn clear(&self, region: usize, first: u64, words: &[u64]) -> Result<(), VmmError>;
}

/// What the guest or its devices do on their own.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum GuestEvent {
    /// The guest reset this device (FLR or the like): its migration session is dead.
    DeviceReset {
        /// Which one.
        id: String,
    },
    /// The whole guest was reset.
    Reset,
    /// The guest powered off.
    PowerOff,
    /// The guest is dead (triple fault, internal error of the hypervisor).
    Crashed {
        /// What happened.
        reason: String,
    },
}

/// Takes guest events; called from any thread, returns at once.
pub type GuestEventSink = Arc<dyn Fn(GuestEvent) + Send + Sync>;

/// The VMM, as the engine sees it. Methods are called from the engine's threads, never two at once
/// except [`memory`](Self::memory).
pub trait Vmm: Send + Sync {
    /// What must fit on the other side.
    fn description(&self) -> MachineDescription;

    /// Guest memory.
    fn memory(&self) -> Arc<GuestMemory>;

    /// The guest's devices, by the user's order.
    fn devices(&self) -> Vec<Device>;

    /// New trackers for every writer that is neither a device nor the VMM itself.
    fn dirty_trackers(&self) -> Result<Vec<Box<dyn DirtyTracker>>, VmmError>;

    /// Pauses the guest and returns when it is paused: every vCPU is out of KVM_RUN, its last exit is
    /// emulated and a KVM_RUN with `immediate_exit` has completed the instruction. The VMM's own
    /// writers of guest memory are quiet too, but for what devices ask of them.
    fn pause(&self) -> Result<(), VmmError>;

    /// Starts or resumes the guest. The guest's clock includes the pause.
    fn resume(&self) -> Result<(), VmmError>;

    /// Keeps the vCPUs from executing for `percent` (0 to 99) of the time, in periods far shorter than anything
    /// the guest would take for a pause, until set otherwise; 0 lets them go. Returns at once, whether the guest
    /// runs or stands. A pause does not wait for it and a resumed guest is throttled again.
    ///
    /// # Errors
    /// A VMM that cannot says so; 0 is always fine.
    fn set_cpu_throttle(&self, percent: u8) -> Result<(), VmmError> {
        match percent {
            0 => Ok(()),
            _ => Err(VmmError::new("this VMM does not throttle its vCPUs")),
        }
    }

    /// Detaches interrupts from the guest (KVM waits for outstanding injections) and saves the machine
    /// state. The guest is paused and every device stopped.
    fn save_machine_state(&self) -> Result<Vec<Section>, VmmError>;

    /// Loads the machine state into a VM that never ran; again, where an attempt was rolled back. Every vector whose pending bit or eventfd count
    /// was non-zero is injected once when the guest starts.
    fn load_machine_state(&self, sections: &[Section]) -> Result<(), VmmError>;

    /// Undoes the detaching of [`save_machine_state`](Self::save_machine_state) on a source that goes on:
    /// interrupts attached again, those that came meanwhile injected.
    fn reattach(&self) -> Result<(), VmmError>;

    /// After a reset of device `id`, or before it runs on the destination: PCI_COMMAND and vectors are
    /// set again as the guest had them (H6).
    fn rearm_device(&self, id: &str) -> Result<(), VmmError>;

    /// Where guest events go from now on; `None` = nowhere.
    fn set_guest_event_sink(&self, sink: Option<GuestEventSink>);

    /// Host stamp (CLOCK_BOOTTIME, ns) of the guest's last sign of life, for the guest-observed
    /// downtime; `None` while there was none or where the guest gives none.
    fn last_heartbeat_ns(&self) -> Option<u64> {
        None
    }

    /// As [`last_heartbeat_ns`](Self::last_heartbeat_ns): the first one since [`resume`](Self::resume).
    fn first_heartbeat_ns(&self) -> Option<u64> {
        None
    }

    /// Some device's BARs are mapped for DMA by other devices. With more than one device that needs P2P
    /// states on each.
    fn maps_bars_for_dma(&self) -> bool {
        false
    }

    /// What the guest holds outside of the two hosts.
    fn outside_resources(&self) -> Vec<Arc<dyn OutsideResource>> {
        Vec::new()
    }

    /// A local move can come here or leave from here: [`memory_replaced`](Self::memory_replaced) works.
    fn replaces_memory(&self) -> bool {
        false
    }

    /// Other files stand behind guest memory than before, at the same addresses ([`GuestMemory::adopt`],
    /// [`give_back`](GuestMemory::give_back), [`let_go`](GuestMemory::let_go)): whoever mapped or pinned the files
    /// of before, devices for DMA above all, maps those of now instead. The guest does not run. Content is left
    /// alone: until Commit it is the memory of a guest that runs elsewhere.
    ///
    /// # Errors
    /// Who could not; what was mapped by then may be either, and an aborted migration leaves nothing to load another
    /// one into.
    fn memory_replaced(&self) -> Result<(), VmmError> {
        Err(VmmError::new("this VMM cannot have its guest's memory replaced"))
    }

    /// Makes the memory of a VM that never ran empty again before another migration is loaded.
    fn discard_memory(&self) -> Result<(), VmmError>;
}

/// Something that must follow the guest: a disk lock, a switch port, an announcement. What can fail
/// happens before Ready.
pub trait OutsideResource: Send + Sync {
    /// Its name, for errors.
    fn name(&self) -> &str;
    /// Source: the guest stands still and the resource may go elsewhere.
    fn release(&self) -> Result<(), VmmError>;
    /// Source: the guest stays; back to how it was before [`release`](Self::release). Also called where
    /// nothing was released.
    fn take_back(&self) -> Result<(), VmmError>;
    /// Destination: obtain it, before Ready.
    fn prepare(&self) -> Result<(), VmmError>;
    /// Destination: the guest does not come now; what [`prepare`](Self::prepare) obtained is given up. Also
    /// called where nothing was obtained.
    fn give_up(&self) {}
    /// Destination: the guest runs here. Cannot fail the migration any more.
    fn runs_here(&self);
}
