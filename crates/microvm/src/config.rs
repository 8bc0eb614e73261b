//! What a VM is made of.

use std::fmt;
use std::path::PathBuf;

use migration::PageSizes;

/// Who executes the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum GuestKind {
    /// vCPUs of KVM.
    #[default]
    Kvm,
    /// Threads of this process run the built-in workload; no kernel can be booted.
    Process,
}

/// How the writes of KVM's vCPUs are tracked; fixed when the VM is made. The process guest has one way only.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum DirtyTracking {
    /// A bitmap of all memory.
    #[default]
    Log,
    /// A ring for each vCPU.
    Ring(DirtyRing),
}

/// KVM's dirty rings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DirtyRing {
    /// Entries of each vCPU's ring, 16 bytes each: a power of two from [`ENTRIES_MIN`](Self::ENTRIES_MIN) to
    /// [`ENTRIES_MAX`](Self::ENTRIES_MAX).
    pub entries: u32,
    /// A thread harvests rings that fill up; else their vCPUs do, once they are full.
    pub harvester: bool,
}

impl DirtyRing {
    /// KVM keeps some entries for itself, up to 576 with page modification logging.
    pub const ENTRIES_MIN: u32 = 1 << 10;
    /// KVM's own limit.
    pub const ENTRIES_MAX: u32 = 1 << 16;
}

impl Default for DirtyRing {
    fn default() -> Self {
        Self { entries: Self::ENTRIES_MAX, harvester: true }
    }
}

/// Where the serial console goes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum SerialConfig {
    /// Output is dropped.
    #[default]
    None,
    /// Standard input and output.
    Stdio,
    /// Output is appended to a file.
    File(PathBuf),
}

/// A PCI function and the device behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceConfig {
    /// The user's name for it; pairs source and destination.
    pub id: String,
    /// Who implements it.
    pub backend: DeviceBackend,
}

/// Who implements a device. Shown as it is written on the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceBackend {
    /// A server; its socket.
    VfioUser(PathBuf),
    /// The kernel; the device as `vfio_kernel::DeviceSpec` reads it.
    Vfio(String),
}

impl fmt::Display for DeviceBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::VfioUser(path) => write!(f, "vfio-user:{}", path.display()),
            Self::Vfio(spec) => write!(f, "vfio:{spec}"),
        }
    }
}

/// What the built-in workload does (docs/workload.md).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkloadConfig {
    /// Working set in pages; `None`: half of the memory above [`WS_BASE`](Self::WS_BASE).
    pub working_set_pages: Option<u32>,
    /// Page writes per second at the start; 0 = none, `u32::MAX` = as fast as it can.
    pub dirty_pages_per_s: u32,
    /// Length of each device's DMA ring in pages.
    pub ring_pages: u32,
    /// Background DMA stamps per second of each device at the start; 0 = none.
    pub dma_rate: u32,
    /// Fill memory from the host before the start, with bytes that follow from this seed; `None`: RAM
    /// starts empty.
    pub fill_seed: Option<u64>,
    /// Which part of the pages is filled, in percent.
    pub fill_percent: u8,
}

impl WorkloadConfig {
    /// Where the working set starts.
    pub const WS_BASE: u64 = 0x0080_0000;
    /// Where the DMA rings start; they end at or before [`WS_BASE`](Self::WS_BASE).
    pub const RING_BASE: u64 = 0x0040_0000;
}

impl Default for WorkloadConfig {
    fn default() -> Self {
        Self {
            working_set_pages: None,
            dirty_pages_per_s: 2000,
            ring_pages: 64,
            dma_rate: 0,
            fill_seed: None,
            fill_percent: 100,
        }
    }
}

/// A VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmConfig {
    /// Who executes the guest.
    pub guest: GuestKind,
    /// RAM in bytes; whole pages.
    pub memory_bytes: u64,
    /// The pages it is made of.
    pub page_sizes: PageSizes,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// A PVH ELF kernel; `None`: the built-in workload guest.
    pub kernel: Option<PathBuf>,
    /// The kernel's command line.
    pub command_line: String,
    /// The serial console.
    pub serial: SerialConfig,
    /// How the vCPUs' writes are tracked.
    pub dirty_tracking: DirtyTracking,
    /// Devices, in slot order.
    pub devices: Vec<DeviceConfig>,
    /// The built-in workload.
    pub workload: WorkloadConfig,
    /// A shared file that is stamped at each heartbeat with process and time, for the proof that two
    /// never ran at once.
    pub witness: Option<PathBuf>,
}

impl Default for VmConfig {
    fn default() -> Self {
        Self {
            guest: GuestKind::Kvm,
            memory_bytes: 256 << 20,
            page_sizes: PageSizes::default(),
            vcpus: 1,
            kernel: None,
            command_line: String::new(),
            serial: SerialConfig::None,
            dirty_tracking: DirtyTracking::Log,
            devices: Vec::new(),
            workload: WorkloadConfig::default(),
            witness: None,
        }
    }
}
