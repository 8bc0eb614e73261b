//! A VM whose guest is one thread, with devices that write guest memory up to the last moment. Everything
//! it writes is covered by one of the sources of dirty pages, so that equality after a move means something.

#![allow(dead_code)]

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use migration::{
    Completeness, Device, DeviceDescription, DirtyBitmap, DirtyTracker, GuestEvent, GuestEventSink,
    GuestMemory, MachineDescription, PAGE_SIZE, RegionLayout, Section, SectionVersion, Vmm,
    VmmError,
};
use vfio_migration::{
    DeviceCapabilities, DeviceError, DeviceResult, DeviceState, DmaRange, MigratableDevice,
    MigrationFlags, PrecopyInfo, ReadOutcome,
};

/// What a device holds, in bytes.
const STATE_BYTES: usize = 200_000;
/// The part of it that is read in PRE_COPY.
const INITIAL_BYTES: usize = 150_000;
/// Pages of the guest's thread, of the VMM's own writes, and of each device.
const GUEST_PAGE: u64 = 1;
const VMM_PAGE: u64 = 2;
const DEVICE_PAGE: u64 = 8;
const PAGES_EACH: u64 = 4;

pub type Hook = Arc<dyn Fn() + Send + Sync>;

/// A device: S + P2P + PRE_COPY, INFOv2, DMA log.
pub struct Toy {
    place: u64,
    memory: Arc<GuestMemory>,
    pub state: DeviceState,
    internals: Vec<u8>,
    unread: Vec<u8>,
    read: usize,
    loading: Vec<u8>,
    /// What write_behind() took and nobody has waited for.
    behind: Vec<u8>,
    log: Option<BTreeSet<u64>>,
    stamp: u64,
    /// The next report fails and what the log held is lost with it; a page is written right before.
    pub fail_report: bool,
    /// Called before a write() takes bytes.
    pub on_write: Option<Hook>,
    /// The next settle() that has something to wait for fails.
    pub fail_settle: bool,
}

impl Toy {
    fn new(place: u64, seed: u8, memory: Arc<GuestMemory>) -> Self {
        Self {
            place,
            memory,
            state: DeviceState::Running,
            internals: vec![seed; STATE_BYTES],
            unread: Vec::new(),
            read: 0,
            loading: Vec::new(),
            behind: Vec::new(),
            log: None,
            stamp: 0,
            fail_report: false,
            on_write: None,
            fail_settle: false,
        }
    }

    pub fn is_clean(&self) -> bool {
        self.state == DeviceState::Running
            && self.log.is_none()
            && self.loading.is_empty()
            && self.behind.is_empty()
    }

    /// Writes a page of its own, as its state allows.
    pub fn dma(&mut self) {
        let runs = [
            DeviceState::Running,
            DeviceState::RunningP2p,
            DeviceState::PreCopy,
            DeviceState::PreCopyP2p,
        ];
        if !runs.contains(&self.state) {
            return;
        }
        self.stamp += 1;
        let page = DEVICE_PAGE + self.place * PAGES_EACH + self.stamp % PAGES_EACH;
        poke(&self.memory, page, self.stamp | 1 << 60);
        if let Some(log) = &mut self.log {
            log.insert(page);
        }
        let at = self.stamp as usize % self.internals.len();
        self.internals[at] = self.internals[at].wrapping_add(1);
    }

    /// A page that nobody writes again.
    pub fn dma_once(&mut self) {
        let page = DEVICE_PAGE + 2 * PAGES_EACH + self.place;
        poke(&self.memory, page, 0xd0d0);
        if let Some(log) = &mut self.log {
            log.insert(page);
        }
    }

    fn refuse<T>(call: &'static str) -> DeviceResult<T> {
        Err(DeviceError::Errno { call, errno: libc::EINVAL })
    }
}

fn poke(memory: &GuestMemory, page: u64, value: u64) {
    let at = memory.untracked_addr(page * PAGE_SIZE, 8).unwrap();
    // SAFETY: eight bytes of a mapping that lives as long as the memory.
    unsafe { at.as_ptr().cast::<u64>().write_volatile(value) };
}

impl MigratableDevice for Toy {
    fn capabilities(&self) -> DeviceCapabilities {
        DeviceCapabilities {
            flags: MigrationFlags::new(true, true),
            precopy_info: true,
            precopy_info_v2: true,
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
        use DeviceState::*;
        self.settle()?;
        match (self.state, target) {
            (PreCopy | PreCopyP2p, StopCopy) => {
                // The last moment in which it may write memory.
                self.dma();
                self.unread = self.internals.clone();
            }
            (Running | RunningP2p, StopCopy) => {
                self.unread = self.internals.clone();
                self.read = 0;
            }
            (Running, PreCopy) => {
                self.unread = self.internals[..INITIAL_BYTES].to_vec();
                self.read = 0;
            }
            (Running, Resuming) => self.loading.clear(),
            (Resuming, Stop) => {
                // Initial data first, then all of the state.
                if self.loading.len() != INITIAL_BYTES + STATE_BYTES {
                    self.state = Error;
                    return Self::refuse("SET STOP");
                }
                self.internals = self.loading.split_off(INITIAL_BYTES);
                self.loading.clear();
            }
            (PreCopy, PreCopyP2p) | (PreCopyP2p, PreCopy) => {}
            (PreCopy | PreCopyP2p, Running | RunningP2p) => self.unread.clear(),
            (StopCopy, RunningP2p | Running) => self.unread.clear(),
            (Stop, RunningP2p | Running) | (RunningP2p, Running) | (Running, RunningP2p) => {}
            (now, wanted) if now == wanted => {}
            _ => return Self::refuse("SET"),
        }
        if target == StopCopy {
            // What was read in PRE_COPY counts; the rest is a stream of its own here.
            self.read = 0;
        }
        self.state = target;
        Ok(())
    }

    fn precopy_info(&mut self) -> DeviceResult<PrecopyInfo> {
        if !self.state.is_precopy() {
            return Self::refuse("PRECOPY_INFO");
        }
        let left = (self.unread.len() - self.read) as u64;
        Ok(PrecopyInfo::from_raw(true, 0, left, 0))
    }

    fn stop_copy_length(&mut self) -> DeviceResult<u64> {
        Ok((STATE_BYTES + self.unread.len() - self.read) as u64)
    }

    fn read(&mut self, buf: &mut [u8]) -> DeviceResult<ReadOutcome> {
        if !self.state.is_saving() {
            return Self::refuse("read");
        }
        let rest = &self.unread[self.read..];
        if rest.is_empty() {
            let precopy = self.state.is_precopy();
            return Ok(if precopy { ReadOutcome::NothingNow } else { ReadOutcome::End });
        }
        // Short reads are legal (S8), and make frames.
        let length = rest.len().min(buf.len()).min(40_000);
        buf[..length].copy_from_slice(&rest[..length]);
        self.read += length;
        Ok(ReadOutcome::Data(length))
    }

    fn write(&mut self, buf: &[u8]) -> DeviceResult<usize> {
        if self.state != DeviceState::Resuming {
            return Self::refuse("write");
        }
        if let Some(hook) = &self.on_write {
            hook();
        }
        let length = buf.len().min(30_000);
        self.loading.extend_from_slice(&buf[..length]);
        Ok(length)
    }

    fn read_ahead(&mut self, buf: &mut Vec<u8>) -> DeviceResult<ReadOutcome> {
        // Another buffer, and of the old one nothing remains.
        let mut filled = vec![0; buf.len()];
        let outcome = self.read(&mut filled)?;
        *buf = filled;
        Ok(outcome)
    }

    /// What it takes is loaded with the next call at the earliest.
    fn write_behind(&mut self, buf: &[u8]) -> DeviceResult<usize> {
        self.settle()?;
        let length = buf.len().min(50_000);
        self.behind.extend_from_slice(&buf[..length]);
        Ok(length)
    }

    fn unsettled_bytes(&self) -> u64 {
        self.behind.len() as u64
    }

    fn settle(&mut self) -> DeviceResult<()> {
        let behind = std::mem::take(&mut self.behind);
        if !behind.is_empty() && std::mem::take(&mut self.fail_settle) {
            return Err(DeviceError::Errno { call: "write", errno: libc::ENOSPC });
        }
        let mut rest = &behind[..];
        while !rest.is_empty() {
            rest = &rest[self.write(rest)?..];
        }
        Ok(())
    }

    fn start_dma_logging(&mut self, _: &[DmaRange], page_size: u64) -> DeviceResult<u64> {
        if self.log.is_some() {
            return Self::refuse("DMA_LOGGING_START");
        }
        self.log = Some(BTreeSet::new());
        Ok(page_size)
    }

    fn report_dma_log(&mut self, range: DmaRange, _: u64, bitmap: &mut [u64]) -> DeviceResult<()> {
        if std::mem::take(&mut self.fail_report) {
            self.dma_once();
            self.log.iter_mut().for_each(BTreeSet::clear);
            return Self::refuse("DMA_LOGGING_REPORT");
        }
        let Some(log) = &mut self.log else { return Self::refuse("DMA_LOGGING_REPORT") };
        for page in std::mem::take(log) {
            if let Some(bit) = (page * PAGE_SIZE).checked_sub(range.iova) {
                let bit = bit / PAGE_SIZE;
                if bit < range.length / PAGE_SIZE {
                    bitmap[(bit / 64) as usize] |= 1 << (bit % 64);
                    continue;
                }
            }
            log.insert(page);
        }
        Ok(())
    }

    fn stop_dma_logging(&mut self) -> DeviceResult<()> {
        match self.log.take() {
            Some(_) => Ok(()),
            None => Self::refuse("DMA_LOGGING_STOP"),
        }
    }

    fn reset(&mut self) -> DeviceResult<()> {
        self.state = DeviceState::Running;
        self.unread.clear();
        self.read = 0;
        self.loading.clear();
        self.behind.clear();
        self.internals.fill(0);
        Ok(())
    }

    fn state_digest(&mut self) -> DeviceResult<Option<[u8; 32]>> {
        let mut digest = [0u8; 32];
        for (at, byte) in self.internals.iter().enumerate() {
            digest[at % 32] = digest[at % 32].rotate_left(3) ^ byte;
        }
        Ok(Some(digest))
    }
}

/// Pages of the guest's thread that are written and not collected.
#[derive(Default)]
struct Written {
    pages: Mutex<BTreeSet<u64>>,
    on: AtomicBool,
}

struct Tracker(Arc<Written>);

impl DirtyTracker for Tracker {
    fn name(&self) -> &'static str {
        "toy"
    }

    fn start(&mut self) -> Result<(), VmmError> {
        self.0.on.store(true, Ordering::Release);
        Ok(())
    }

    fn collect(&mut self, into: &mut DirtyBitmap) -> Result<Completeness, VmmError> {
        if !self.0.on.load(Ordering::Acquire) {
            return Err(VmmError::new("the tracker of another migration was stopped"));
        }
        for page in std::mem::take(&mut *lock(&self.0.pages)) {
            into.set_range(page * PAGE_SIZE, PAGE_SIZE);
        }
        Ok(Completeness::Complete)
    }

    fn stop(&mut self) -> Result<(), VmmError> {
        // Long enough for a report that does not wait for it to be seen.
        std::thread::sleep(Duration::from_millis(20));
        self.0.on.store(false, Ordering::Release);
        Ok(())
    }
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Life {
    New,
    Loaded,
    Running,
    Paused,
}

struct Inner {
    memory: Arc<GuestMemory>,
    toys: Vec<Arc<Mutex<Toy>>>,
    /// Held for each step of the guest.
    life: Mutex<Life>,
    steps: AtomicU64,
    written: Arc<Written>,
    sink: Mutex<Option<GuestEventSink>>,
    busy: AtomicBool,
    /// Its machine state has no section at all.
    stateless: AtomicBool,
    /// Called in the middle of loading machine state.
    on_load: Mutex<Option<Hook>>,
    /// Its memory cannot be replaced.
    fixed: AtomicBool,
    /// Its devices' mappings stay what they are.
    stuck: AtomicBool,
    /// How often it was.
    replaced: AtomicU64,
    /// Two calls of the engine at once, or the like.
    violations: Mutex<Vec<String>>,
    gone: AtomicBool,
}

pub struct ToyVm {
    inner: Arc<Inner>,
    guest: Option<JoinHandle<()>>,
}

impl ToyVm {
    /// A VM that runs, its memory filled but for the second half; or one that waits for a guest.
    pub fn new(runs: bool, pages: u64, devices: u64) -> Arc<Self> {
        let layout = [RegionLayout { gpa: 0, len: pages * PAGE_SIZE }];
        let memory = Arc::new(GuestMemory::new(&layout).unwrap());
        if runs {
            (64..pages).for_each(|page| poke(&memory, page, page));
        }
        let seed = if runs { 7 } else { 0 };
        let toy = |place| Arc::new(Mutex::new(Toy::new(place, seed, Arc::clone(&memory))));
        let inner = Arc::new(Inner {
            toys: (0..devices).map(toy).collect(),
            memory: Arc::clone(&memory),
            life: Mutex::new(if runs { Life::Running } else { Life::New }),
            steps: AtomicU64::new(0),
            written: Arc::default(),
            sink: Mutex::new(None),
            busy: AtomicBool::new(false),
            stateless: AtomicBool::new(false),
            on_load: Mutex::default(),
            fixed: AtomicBool::new(false),
            stuck: AtomicBool::new(false),
            replaced: AtomicU64::new(0),
            violations: Mutex::default(),
            gone: AtomicBool::new(false),
        });
        let body = Arc::clone(&inner);
        let guest = std::thread::spawn(move || body.guest());
        Arc::new(Self { inner, guest: Some(guest) })
    }

    pub fn toy(&self, place: usize) -> MutexGuard<'_, Toy> {
        lock(&self.inner.toys[place])
    }

    pub fn runs(&self) -> bool {
        *lock(&self.inner.life) == Life::Running
    }

    pub fn steps(&self) -> u64 {
        self.inner.steps.load(Ordering::Acquire)
    }

    /// Nothing of a migration is left.
    pub fn is_untracked(&self) -> bool {
        !self.inner.written.on.load(Ordering::Acquire)
            && (0..self.inner.toys.len()).all(|place| self.toy(place).is_clean())
    }

    /// Never ran, holds nothing.
    pub fn is_empty(&self) -> bool {
        let memory = &self.inner.memory;
        let mut bytes = vec![0; memory.size_bytes() as usize];
        memory.read(0, &mut bytes).unwrap();
        *lock(&self.inner.life) == Life::New
            && bytes.iter().all(|byte| *byte == 0)
            && (0..self.inner.toys.len()).all(|place| self.toy(place).is_clean())
    }

    /// The VMM writes every page.
    pub fn dirty_all(&self) {
        let memory = &self.inner.memory;
        for page in 64..memory.size_bytes() / PAGE_SIZE {
            memory.write(page * PAGE_SIZE + 8, &page.to_le_bytes()).unwrap();
        }
    }

    /// From now on its machine state has no section at all.
    pub fn forget_machine_state(&self) {
        self.inner.stateless.store(true, Ordering::Release);
    }

    /// Has `hook` called once, in the middle of loading machine state.
    pub fn on_load(&self, hook: Hook) {
        *lock(&self.inner.on_load) = Some(hook);
    }

    /// Its memory cannot be replaced from here on.
    pub fn fix_memory(&self) {
        self.inner.fixed.store(true, Ordering::Release);
    }

    /// Its devices' mappings stay what they are from here on.
    pub fn stick(&self) {
        self.inner.stuck.store(true, Ordering::Release);
    }

    /// How often it was replaced.
    pub fn replaced(&self) -> u64 {
        self.inner.replaced.load(Ordering::Acquire)
    }

    /// Every page that nobody writes is as it was filled.
    pub fn is_intact(&self) -> bool {
        let memory = &self.inner.memory;
        let pages = 64..memory.size_bytes() / PAGE_SIZE;
        pages.into_iter().all(|page| {
            let mut bytes = [0; 8];
            memory.read(page * PAGE_SIZE, &mut bytes).unwrap();
            u64::from_le_bytes(bytes) == page
        })
    }

    /// Writes a page by the VMM.
    pub fn write(&self, page: u64, value: u64) -> Result<(), migration::MemoryError> {
        self.inner.memory.write(page * PAGE_SIZE, &value.to_le_bytes())
    }

    /// Writes a page through its file, as a device's server would.
    pub fn write_file(&self, page: u64, value: u64) {
        use std::os::unix::fs::FileExt;
        let file = self.inner.memory.region_fd(0).try_clone_to_owned().unwrap();
        let file = std::fs::File::from(file);
        file.write_all_at(&value.to_le_bytes(), page * PAGE_SIZE).unwrap();
    }

    pub fn violations(&self) -> Vec<String> {
        lock(&self.inner.violations).clone()
    }

    /// The guest resets a device, which loses its log and writes memory at once.
    pub fn reset_device(&self, place: usize) {
        {
            let mut toy = self.toy(place);
            toy.reset().unwrap();
            toy.log = None;
            toy.dma_once();
        }
        let sink = lock(&self.inner.sink).clone();
        if let Some(sink) = sink {
            sink(GuestEvent::DeviceReset { id: format!("toy{place}") });
        }
    }

    /// What the guest's own counter says: it goes on where it stood, in whichever process.
    pub fn guest_counter(&self) -> u64 {
        let mut bytes = [0; 8];
        self.inner.memory.read(0, &mut bytes).unwrap();
        u64::from_le_bytes(bytes)
    }
}

impl Drop for ToyVm {
    fn drop(&mut self) {
        self.inner.gone.store(true, Ordering::Release);
        let _ = self.guest.take().map(JoinHandle::join);
    }
}

impl Inner {
    fn guest(&self) {
        while !self.gone.load(Ordering::Acquire) {
            {
                let life = lock(&self.life);
                if *life == Life::Running {
                    self.step();
                }
            }
            std::thread::sleep(Duration::from_micros(300));
        }
    }

    fn step(&self) {
        let step = self.steps.fetch_add(1, Ordering::AcqRel) + 1;
        let mut counter = [0; 8];
        self.memory.read(0, &mut counter).unwrap();
        let own = GUEST_PAGE + 32 + step % PAGES_EACH;
        for (page, value) in [(0, u64::from_le_bytes(counter) + 1), (own, step)] {
            poke(&self.memory, page, value);
            if self.written.on.load(Ordering::Acquire) {
                lock(&self.written.pages).insert(page);
            }
        }
        self.memory.write(VMM_PAGE * PAGE_SIZE, &step.to_le_bytes()).unwrap();
        for toy in &self.toys {
            if let Ok(mut toy) = toy.try_lock() {
                toy.dma();
            }
        }
    }

    /// A call of the engine; no two at once.
    fn call<T>(&self, what: &str, call: impl FnOnce() -> T) -> T {
        if self.busy.swap(true, Ordering::AcqRel) {
            lock(&self.violations).push(format!("{what} while another call is under way"));
        }
        let answer = call();
        self.busy.store(false, Ordering::Release);
        answer
    }

    fn change(&self, what: &str, from: &[Life], to: Life) -> Result<(), VmmError> {
        self.call(what, || {
            let mut life = lock(&self.life);
            if !from.contains(&life) {
                return Err(VmmError::new(format!("{what}: the VM is {life:?}")));
            }
            *life = to;
            Ok(())
        })
    }
}

impl Vmm for ToyVm {
    fn description(&self) -> MachineDescription {
        MachineDescription {
            machine: "toy".into(),
            version: 1,
            vcpus: 1,
            memory: self.inner.memory.layout(),
            cpuid: Vec::new(),
            xsave_bytes: 0,
            tsc_khz: None,
            tsc_scaling: false,
            sections: vec![SectionVersion { name: "toy".into(), kind: "toy".into(), version: 1 }],
        }
    }

    fn memory(&self) -> Arc<GuestMemory> {
        Arc::clone(&self.inner.memory)
    }

    fn devices(&self) -> Vec<Device> {
        let device = |(place, toy): (usize, &Arc<Mutex<Toy>>)| Device {
            description: DeviceDescription {
                id: format!("toy{place}"),
                backend: "toy".into(),
                pci_ids: [1, 2, 3, 4],
                class_revision: 0,
                region_sizes: Vec::new(),
                region_flags: Vec::new(),
                irq_counts: Vec::new(),
                migration_flags: 7,
                precopy_info: true,
                precopy_info_v2: true,
                data_size: true,
                dma_logging: true,
                reset_runs: true,
            },
            handle: Arc::clone(toy) as _,
        };
        self.inner.toys.iter().enumerate().map(device).collect()
    }

    fn dirty_trackers(&self) -> Result<Vec<Box<dyn DirtyTracker>>, VmmError> {
        Ok(vec![Box::new(Tracker(Arc::clone(&self.inner.written)))])
    }

    fn pause(&self) -> Result<(), VmmError> {
        self.inner.change("pause", &[Life::Running, Life::Paused], Life::Paused)
    }

    fn resume(&self) -> Result<(), VmmError> {
        let from = [Life::Running, Life::Paused, Life::Loaded];
        self.inner.change("resume", &from, Life::Running)
    }

    fn save_machine_state(&self) -> Result<Vec<Section>, VmmError> {
        self.inner.change("save", &[Life::Paused], Life::Paused)?;
        if self.inner.stateless.load(Ordering::Acquire) {
            return Ok(Vec::new());
        }
        let payload = self.steps().to_le_bytes().to_vec();
        Ok(vec![Section { name: "toy".into(), kind: "toy".into(), version: 1, payload }])
    }

    fn load_machine_state(&self, sections: &[Section]) -> Result<(), VmmError> {
        if self.inner.stateless.load(Ordering::Acquire) && sections.is_empty() {
            return self.inner.change("load", &[Life::New, Life::Loaded], Life::Loaded);
        }
        let payload = sections.first().and_then(|s| s.payload.as_slice().try_into().ok());
        let payload = payload.ok_or_else(|| VmmError::new("no such section"))?;
        let hook = lock(&self.inner.on_load).take();
        if let Some(hook) = hook {
            self.inner.call("load", || {
                hook();
                // Long enough for the end to go its way meanwhile.
                std::thread::sleep(Duration::from_millis(100));
            });
        }
        self.inner.change("load", &[Life::New, Life::Loaded], Life::Loaded)?;
        self.inner.steps.store(u64::from_le_bytes(payload), Ordering::Release);
        Ok(())
    }

    fn reattach(&self) -> Result<(), VmmError> {
        self.inner.change("reattach", &[Life::Paused], Life::Paused)
    }

    fn rearm_device(&self, _id: &str) -> Result<(), VmmError> {
        Ok(())
    }

    fn set_guest_event_sink(&self, sink: Option<GuestEventSink>) {
        *lock(&self.inner.sink) = sink;
    }

    fn replaces_memory(&self) -> bool {
        !self.inner.fixed.load(Ordering::Acquire)
    }

    fn memory_replaced(&self) -> Result<(), VmmError> {
        if self.inner.stuck.load(Ordering::Acquire) {
            return Err(VmmError::new("DMA_UNMAP failed"));
        }
        let quiet = [Life::New, Life::Loaded, Life::Paused];
        let life = *lock(&self.inner.life);
        self.inner.change("memory replaced", &quiet, life)?;
        self.inner.replaced.fetch_add(1, Ordering::AcqRel);
        Ok(())
    }

    fn discard_memory(&self) -> Result<(), VmmError> {
        self.inner.change("discard", &[Life::New, Life::Loaded], Life::New)?;
        let memory = &self.inner.memory;
        let first = memory.untracked_addr(0, memory.size_bytes()).unwrap();
        // SAFETY: all of the only region, which nobody else uses now.
        unsafe { std::ptr::write_bytes(first.as_ptr(), 0, memory.size_bytes() as usize) };
        Ok(())
    }
}
