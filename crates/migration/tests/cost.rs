//! What a migration costs: memory beyond the guest's stays under the stated bound whatever the sizes, by an
//! allocator that counts for itself; and what the engine says of CPU time and memory is so.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use migration::cost::{Size, destination_bytes_max, source_bytes_max};
use migration::hash::memory_digest;
use migration::ram::{Codec, Populate};
use migration::{
    Device, DeviceDescription, DirtyTracker, GuestEventSink, GuestMemory, Incoming, IncomingConfig,
    MachineDescription, Outgoing, OutgoingConfig, PAGE_SIZE, RegionLayout, Section, SectionVersion,
    Vmm, VmmError,
};
use vfio_migration::{
    DeviceCapabilities, DeviceError, DeviceResult, DeviceState, DmaRange, MigratableDevice,
    MigrationFlags, PrecopyInfo, ReadOutcome,
};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// A machine state of a few large sections.
const SECTION_BYTES: usize = 3 << 20;
const SECTIONS: usize = 3;

/// Counts what is allocated and not freed, and the most of it.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);
/// The counts are the process's.
static ALONE: Mutex<()> = Mutex::new(());

fn took(bytes: usize) {
    let now = NOW.fetch_add(bytes, Ordering::Relaxed) + bytes;
    PEAK.fetch_max(now, Ordering::Relaxed);
}

// SAFETY: everything is the system allocator's; only sizes are counted.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        took(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        took(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, address: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(address, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The most that `work` has allocated at once, and what it says.
fn peak_of<T>(work: impl FnOnce() -> T) -> (u64, T) {
    let before = NOW.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    let done = work();
    (PEAK.load(Ordering::Relaxed).saturating_sub(before) as u64, done)
}

/// A device whose state is made as it is read, and forgotten as it is loaded: it takes no memory itself.
struct Bulk {
    bytes: u64,
    /// Time for each MiB that is loaded.
    pace: Duration,
    state: DeviceState,
    done: u64,
}

impl Bulk {
    fn refuse<T>(call: &'static str) -> DeviceResult<T> {
        Err(DeviceError::Errno { call, errno: libc::EINVAL })
    }
}

impl MigratableDevice for Bulk {
    fn capabilities(&self) -> DeviceCapabilities {
        DeviceCapabilities {
            flags: MigrationFlags::new(false, false),
            precopy_info: false,
            precopy_info_v2: false,
            data_size: true,
            dma_logging: true,
            reset_runs: true,
            max_write_bytes: None,
        }
    }

    fn state(&mut self) -> DeviceResult<DeviceState> {
        Ok(self.state)
    }

    fn set_state(&mut self, target: DeviceState) -> DeviceResult<()> {
        if (self.state, target) == (DeviceState::Resuming, DeviceState::Stop)
            && self.done != self.bytes
        {
            return Self::refuse("SET STOP");
        }
        (self.state, self.done) = (target, 0);
        Ok(())
    }

    fn precopy_info(&mut self) -> DeviceResult<PrecopyInfo> {
        Self::refuse("PRECOPY_INFO")
    }

    fn stop_copy_length(&mut self) -> DeviceResult<u64> {
        Ok(self.bytes)
    }

    fn read(&mut self, buffer: &mut [u8]) -> DeviceResult<ReadOutcome> {
        let length = (self.bytes - self.done).min(buffer.len() as u64);
        if length == 0 {
            return Ok(ReadOutcome::End);
        }
        buffer[..length as usize].fill(self.done as u8);
        self.done += length;
        Ok(ReadOutcome::Data(length as usize))
    }

    fn write(&mut self, buffer: &[u8]) -> DeviceResult<usize> {
        std::thread::sleep(self.pace);
        self.done += buffer.len() as u64;
        Ok(buffer.len())
    }

    fn start_dma_logging(&mut self, _: &[DmaRange], page_size: u64) -> DeviceResult<u64> {
        Ok(page_size)
    }

    fn report_dma_log(&mut self, _: DmaRange, _: u64, _: &mut [u64]) -> DeviceResult<()> {
        Ok(())
    }

    fn stop_dma_logging(&mut self) -> DeviceResult<()> {
        Ok(())
    }

    fn reset(&mut self) -> DeviceResult<()> {
        self.state = DeviceState::Running;
        Ok(())
    }
}

/// A VM whose guest does nothing.
struct StillVm {
    memory: Arc<GuestMemory>,
    devices: Vec<Arc<Mutex<Bulk>>>,
}

impl StillVm {
    fn new(memory_bytes: u64, devices: u64, device_bytes: u64) -> Arc<Self> {
        // Two regions, as a machine with a hole below 4 GiB has them.
        let low = memory_bytes / 4 / PAGE_SIZE * PAGE_SIZE;
        let layout = [
            RegionLayout { gpa: 0, len: low },
            RegionLayout { gpa: 1 << 40, len: memory_bytes - low },
        ];
        let bulk = Bulk {
            bytes: device_bytes,
            pace: Duration::from_millis(2),
            state: DeviceState::Running,
            done: 0,
        };
        let device = |_| Arc::new(Mutex::new(Bulk { ..bulk }));
        Arc::new(Self {
            memory: Arc::new(GuestMemory::new(&layout).unwrap()),
            devices: (0..devices).map(device).collect(),
        })
    }

    /// Writes the first `bytes` of both regions: words that do not compress well, every `step`th page.
    fn fill(&self, bytes: u64, step: u64) {
        let mut word = 1u64;
        for region in self.memory.layout() {
            for page in (0..bytes.min(region.len) / PAGE_SIZE).step_by(step as usize) {
                let mut content = [0u8; PAGE_SIZE as usize];
                for place in content.chunks_exact_mut(8) {
                    word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    place.copy_from_slice(&word.to_le_bytes());
                }
                self.memory.write(region.gpa + page * PAGE_SIZE, &content).unwrap();
            }
        }
    }
}

impl Vmm for StillVm {
    fn description(&self) -> MachineDescription {
        let section = |number| SectionVersion {
            name: format!("part{number}"),
            kind: "still".into(),
            version: 1,
        };
        MachineDescription {
            machine: "still".into(),
            version: 1,
            vcpus: 1,
            memory: self.memory.layout(),
            cpuid: Vec::new(),
            xsave_bytes: 0,
            tsc_khz: None,
            tsc_scaling: false,
            sections: (0..SECTIONS).map(section).collect(),
        }
    }

    fn memory(&self) -> Arc<GuestMemory> {
        Arc::clone(&self.memory)
    }

    fn devices(&self) -> Vec<Device> {
        let device = |(place, device): (usize, &Arc<Mutex<Bulk>>)| Device {
            description: DeviceDescription {
                id: format!("bulk{place}"),
                backend: "bulk".into(),
                pci_ids: [1, 2, 3, 4],
                class_revision: 0,
                region_sizes: Vec::new(),
                region_flags: Vec::new(),
                irq_counts: Vec::new(),
                migration_flags: 1,
                precopy_info: false,
                precopy_info_v2: false,
                data_size: true,
                dma_logging: true,
                reset_runs: true,
            },
            handle: Arc::clone(device) as _,
        };
        self.devices.iter().enumerate().map(device).collect()
    }

    fn dirty_trackers(&self) -> Result<Vec<Box<dyn DirtyTracker>>, VmmError> {
        Ok(Vec::new())
    }

    fn pause(&self) -> Result<(), VmmError> {
        Ok(())
    }

    fn resume(&self) -> Result<(), VmmError> {
        Ok(())
    }

    fn save_machine_state(&self) -> Result<Vec<Section>, VmmError> {
        let section = |number| Section {
            name: format!("part{number}"),
            kind: "still".into(),
            version: 1,
            payload: vec![number as u8; SECTION_BYTES],
        };
        Ok((0..SECTIONS).map(section).collect())
    }

    fn load_machine_state(&self, sections: &[Section]) -> Result<(), VmmError> {
        let whole = sections.iter().all(|section| section.payload.len() == SECTION_BYTES);
        let whole = whole && sections.len() == SECTIONS;
        whole.then_some(()).ok_or_else(|| VmmError::new("state is missing"))
    }

    fn reattach(&self) -> Result<(), VmmError> {
        Ok(())
    }

    fn rearm_device(&self, _: &str) -> Result<(), VmmError> {
        Ok(())
    }

    fn set_guest_event_sink(&self, _: Option<GuestEventSink>) {}

    fn discard_memory(&self) -> Result<(), VmmError> {
        Ok(())
    }
}

fn migrate(source: &Arc<StillVm>, to: &Arc<StillVm>, channels: u16) -> migration::Report {
    let mut incoming = IncomingConfig::new("tcp:127.0.0.1:0".parse().unwrap());
    // Of a guest that is far larger than this host.
    incoming.populate = Populate::Used;
    let incoming = Incoming::start(Arc::clone(to) as Arc<dyn Vmm>, incoming).unwrap();
    let mut config = OutgoingConfig::new(incoming.local_address());
    config.verify = true;
    config.channels = Some(channels);
    config.ram_checksum = true;
    config.compression = Some(Codec::Zstd);
    config.brain.downtime_limit = switchover::Time::from_ms(60_000);
    let report = Outgoing::start(Arc::clone(source) as Arc<dyn Vmm>, config).wait();
    assert_eq!(report.status, "completed", "{:?}", report.failure);
    assert_eq!(report.memory_identical, Some(true));
    report
}

#[test]
fn memory_beyond_the_guests_stays_under_the_stated_bound_whatever_the_sizes() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
    for (memory_bytes, devices, device_bytes, channels) in [
        (64 * MIB, 0, 0, 1),
        (64 * MIB, 4, 96 * MIB, 2),
        (4 * GIB, 1, 192 * MIB, 4),
        (64 * GIB, 2, MIB, 2),
        (256 * GIB, 1, MIB, 1),
    ] {
        let what = format!("{} MiB, {devices} devices of {device_bytes}", memory_bytes / MIB);
        let source = StillVm::new(memory_bytes, devices, device_bytes);
        let destination = StillVm::new(memory_bytes, devices, device_bytes);
        source.fill(16 * MIB, 1);
        let (peak, report) = peak_of(|| migrate(&source, &destination, channels));
        let size = Size {
            memory_bytes,
            regions: 2,
            channels: channels.into(),
            devices,
            machine_state_bytes: (SECTIONS * SECTION_BYTES) as u64,
            hashing_cores: cores,
        };
        let (here, there) = (report.source_cost.unwrap(), report.destination_cost.unwrap());
        let (here_max, there_max) = (source_bytes_max(&size), destination_bytes_max(&size));
        println!(
            "{what}: allocated {peak}; counted {} of {here_max} and {} of {there_max}",
            here.memory_peak, there.memory_peak
        );
        assert!(peak <= here_max + there_max, "{what}: {peak} allocated");
        assert!(here.memory_peak <= here_max, "{what}: source {here:?}, {here_max}");
        assert!(there.memory_peak <= there_max, "{what}: destination {there:?}, {there_max}");
        // What is counted is there: the two bitmaps that each side always has.
        let bitmaps = 2 * memory_bytes / (8 * PAGE_SIZE);
        assert!(here.memory_peak >= bitmaps && there.memory_peak >= bitmaps, "{what}: {report:?}");
        // And what is there is counted, but for control, and machine state on its way.
        let counted = here.memory_peak + there.memory_peak;
        let apart = 2 * 8 * MIB + 4 * size.machine_state_bytes;
        assert!(peak <= counted + apart, "{what}: {peak} allocated, {counted} counted");
    }
}

#[test]
fn a_digest_of_memory_in_pieces_takes_no_more_than_of_memory_in_one() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    // As many pages, every one or every 16th.
    let peak = |step| {
        let vm = StillVm::new(512 * MIB, 0, 0);
        vm.fill(24 * MIB * step, step);
        peak_of(|| memory_digest(&vm.memory)).0
    };
    let (whole, pieces) = (peak(1), peak(16));
    assert!(pieces <= whole + MIB / 8, "{pieces} and {whole}");
}

#[test]
fn cpu_time_grows_with_what_is_moved_and_both_sides_tell_it() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let spent = |bytes| {
        let (source, destination) = (StillVm::new(GIB, 0, 0), StillVm::new(GIB, 0, 0));
        source.fill(bytes, 1);
        let report = migrate(&source, &destination, 2);
        let (here, there) = (report.source_cost.unwrap(), report.destination_cost.unwrap());
        for cost in [here, there] {
            let parts = cost.control_ms + cost.data_ms + cost.devices_ms + cost.populate_ms;
            assert!((cost.cpu_time_ms - parts).abs() < 0.1, "{cost:?}");
            // Two cores cannot do more than two cores' work.
            let cores = std::thread::available_parallelism().map_or(1, |n| n.get()) as f64;
            assert!(cost.cpu_time_ms <= report.total_time_ms * cores, "{cost:?}");
        }
        (here.data_ms, there.data_ms)
    };
    // 2 x 2 MiB, and 2 x 96 MiB.
    let ((little_here, little_there), (much_here, much_there)) = (spent(2 * MIB), spent(96 * MIB));
    assert!(much_here > 2.0 * little_here, "source: {much_here} and {little_here}");
    assert!(much_there > 2.0 * little_there, "destination: {much_there} and {little_there}");
}
