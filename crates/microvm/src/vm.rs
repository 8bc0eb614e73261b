//! The VM: body, memory, bus and devices, as the engine and the command drive them.
//!
//! ```text
//!   New ──start──> Running <──resume/pause──> Paused
//!    └─load_machine_state─> Loaded ──resume──> Running        any ──stop──> Stopped
//! ```
//!
//! A machine reset is performed by a worker, since the vCPU that asks for it cannot park itself. While
//! the engine holds the guest paused it waits, and travels with the machine state: the guest is reset
//! where it runs next.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use migration::{
    Device, DirtyTracker, GuestEvent, GuestEventSink, GuestMemory, MachineDescription, Section,
    SectionVersion, Vmm, VmmError,
};
use vfio_kernel::{AddressSpaces, KernelDevice};
use vfio_migration::{DeviceResult, PciFunction};

use crate::body::{Body, GuestBus};
use crate::boot::Booter;
use crate::bus::Bus;
use crate::config::{DirtyTracking, GuestKind, VmConfig};
use crate::contents;
use crate::control::Control;
use crate::error::{Error, Result};
use crate::events::Events;
use crate::kvm::{KvmBody, KvmParts, RingCounters};
use crate::layout::{MACHINE_VERSION, ram_layout};
use crate::pci::{self, OpenDevice, PciHost};
use crate::process::{ProcessBody, ProcessInterrupts};
use crate::section::{self, Reader, Writer};
use crate::serial::Serial;
use crate::witness::Witness;
use crate::workload::mailbox::{self, Answer, Command, Counters};

/// Name and kind of the section with what belongs to no part.
const SECTION: &str = "machine";
const SECTION_VERSION: u32 = 1;
/// Longest reason of a crash that is kept, in bytes.
const REASON_MAX_BYTES: usize = 1024;
/// How often the host looks for the answer to a command.
const ANSWER_POLL: Duration = Duration::from_millis(1);

/// What the VM is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Lifecycle {
    /// Made, never ran, nothing loaded.
    New,
    /// A machine state was loaded, never ran.
    Loaded,
    /// The guest runs, unless it ended on its own.
    Running,
    /// The guest ran and is paused.
    Paused,
    /// For good.
    Stopped,
}

impl Lifecycle {
    /// Each one, at the place of its number.
    const ALL: [Self; 5] = [Self::New, Self::Loaded, Self::Running, Self::Paused, Self::Stopped];
}

/// How the VM is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmStatus {
    /// What it is doing.
    pub lifecycle: Lifecycle,
    /// How the guest ended on its own, if it did.
    pub ended: Option<GuestEvent>,
    /// Devices whose server is gone, with the reason.
    pub lost_devices: Vec<(String, String)>,
}

/// A VM. Dropping it ends the guest.
pub struct Vm {
    inner: Arc<Inner>,
    worker: Mutex<Option<std::thread::JoinHandle<()>>>,
    /// One command at a time.
    command: Mutex<()>,
}

struct Inner {
    config: VmConfig,
    memory: Arc<GuestMemory>,
    body: Arc<dyn Body>,
    bus: Arc<Bus>,
    booter: Booter,
    devices: Vec<Device>,
    /// The same, as the guest drives them.
    functions: Vec<(String, Arc<dyn PciFunction>)>,
    /// Devices of the kernel, by id.
    kernel_devices: Vec<(String, KernelDevice)>,
    events: Arc<Events>,
    control: Arc<Control>,
    lifecycle: Mutex<Lifecycle>,
    /// As `lifecycle`, for those who must not wait for it.
    observed: AtomicU8,
}

impl Vm {
    /// Makes the VM and opens its devices. Nothing runs yet.
    pub fn new(config: VmConfig) -> Result<Self> {
        let memory = Arc::new(GuestMemory::with_pages(
            &ram_layout(config.memory_bytes)?,
            config.page_sizes,
        )?);
        let spaces = AddressSpaces::new();
        let open = |device| pci::open(device, &memory, &spaces);
        let devices = config.devices.iter().map(open).collect::<Result<Vec<_>>>()?;
        Self::with_devices(config, memory, devices)
    }

    /// As [`new`](Self::new), over memory and devices that are there already; `config.devices` is ignored.
    pub fn with_devices(
        config: VmConfig,
        memory: Arc<GuestMemory>,
        devices: Vec<OpenDevice>,
    ) -> Result<Self> {
        let events = Arc::new(Events::default());
        let (wake, woken) = sync_channel(1);
        let witness = config.witness.as_deref().map(Witness::open).transpose()?;
        let control = Control::new(Arc::clone(&events), witness, wake);
        let parts = Parts { config: &config, memory: &memory, events: &events, control: &control };
        let (bus, body) = parts.build(&devices)?;
        control.set_body(Arc::downgrade(&body));
        let inner = Arc::new(Inner {
            config,
            booter: Booter::new(Arc::clone(&memory)),
            memory,
            body,
            bus,
            kernel_devices: devices
                .iter()
                .filter_map(|device| {
                    let kernel = device.kernel.clone()?;
                    Some((device.device.description.id.clone(), kernel))
                })
                .collect(),
            functions: devices
                .iter()
                .map(|device| (device.device.description.id.clone(), Arc::clone(&device.function)))
                .collect(),
            devices: devices.into_iter().map(|device| device.device).collect(),
            events,
            control,
            lifecycle: Mutex::new(Lifecycle::New),
            observed: AtomicU8::new(Lifecycle::New as u8),
        });
        let worker = std::thread::Builder::new()
            .name("machine-reset".into())
            .spawn({
                let inner = Arc::downgrade(&inner);
                move || reset_worker(&inner, &woken)
            })
            .map_err(|source| Error::Os { call: "spawn of the reset worker", source })?;
        Ok(Self { inner, worker: Mutex::new(Some(worker)), command: Mutex::new(()) })
    }

    /// Boots the guest.
    pub fn start(&self) -> Result<()> {
        let mut lifecycle = self.inner.lifecycle();
        if *lifecycle != Lifecycle::New {
            return Err(Error::State(format!("a VM that is {lifecycle:?} cannot be started")));
        }
        let workload = &self.inner.config.workload;
        if let Some(seed) = workload.fill_seed {
            contents::fill(&self.inner.memory, seed, workload.fill_percent)?;
        }
        let inner = &self.inner;
        let boot = inner.booter.first(&inner.config, inner.devices.len())?;
        inner.body.reset(&boot)?;
        inner.run()?;
        inner.set(&mut lifecycle, Lifecycle::Running);
        Ok(())
    }

    /// Pauses the guest; see [`Vmm::pause`].
    pub fn pause(&self) -> Result<()> {
        self.inner.pause()
    }

    /// Resumes the guest; see [`Vmm::resume`].
    pub fn resume(&self) -> Result<()> {
        self.inner.resume()
    }

    /// Ends the guest for good. Memory and devices stay until the VM is dropped.
    pub fn stop(&self) {
        let mut lifecycle = self.inner.lifecycle();
        if *lifecycle != Lifecycle::Stopped {
            self.inner.set(&mut lifecycle, Lifecycle::Stopped);
            self.inner.body.stop();
            self.inner.bus.pci.detach();
        }
    }

    /// How the VM is doing. Never waits, also while a pause waits for a device.
    pub fn status(&self) -> VmStatus {
        VmStatus {
            lifecycle: Lifecycle::ALL[usize::from(self.inner.observed.load(Ordering::Acquire))],
            ended: self.inner.events.ended(),
            lost_devices: self.inner.bus.pci.lost(),
        }
    }

    /// What the VM was made of.
    pub fn config(&self) -> &VmConfig {
        &self.inner.config
    }

    /// The device of that id, where the kernel implements it.
    pub fn kernel_device(&self, id: &str) -> Option<&KernelDevice> {
        let mut devices = self.inner.kernel_devices.iter();
        devices.find(|(there, _)| there == id).map(|(_, device)| device)
    }

    /// A command to the built-in workload; waits for its answer. Time in which the guest stands still
    /// counts.
    pub fn workload_command(&self, command: Command, timeout: Duration) -> Result<()> {
        let _one_at_a_time = self.command.lock().unwrap_or_else(PoisonError::into_inner);
        let deadline = Instant::now() + timeout;
        let memory = &self.inner.memory;
        let sequence = {
            // Held while the mailbox is written: nothing of the VMM writes memory of a paused guest.
            let lifecycle = self.inner.lifecycle();
            if *lifecycle != Lifecycle::Running {
                return Err(Error::State(format!("the guest does not run: {lifecycle:?}")));
            }
            mailbox::post(memory, command)?
        };
        loop {
            match mailbox::answer(memory, sequence)? {
                Answer::Result(0) => return Ok(()),
                Answer::Result(result) => {
                    return Err(Error::Guest(mailbox::result_name(result).into()));
                }
                Answer::Forgotten if command == Command::ResetMachine => return Ok(()),
                Answer::Forgotten => return Err(Error::Guest("it was reset meanwhile".into())),
                Answer::None => {}
            }
            if let Some(ended) = self.inner.events.ended() {
                return Err(Error::Guest(format!("it has ended: {ended:?}")));
            }
            if Instant::now() >= deadline {
                return Err(Error::Guest(format!(
                    "no answer to {command:?} within {} ms",
                    timeout.as_millis()
                )));
            }
            std::thread::sleep(ANSWER_POLL);
        }
    }

    /// What the built-in workload counts.
    pub fn workload_counters(&self) -> Result<Counters> {
        mailbox::counters(&self.inner.memory)
    }

    /// A digest of all memory, from scratch and independent of any migration. Meaningful while the guest is
    /// paused and its devices are stopped.
    pub fn memory_digest(&self) -> Result<[u8; 32]> {
        contents::digest(&self.inner.memory)
    }

    /// What KVM's dirty rings counted; `None` where the VM has none.
    pub fn ring_counters(&self) -> Option<RingCounters> {
        self.inner.body.ring_counters()
    }

    /// Bytes for the guest's serial console.
    pub fn serial_input(&self, bytes: &[u8]) {
        self.inner.bus.serial.receive(bytes);
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.stop();
        self.inner.control.close();
        let worker = self.worker.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(worker) = worker {
            // A worker that panicked has ended as well.
            let _ = worker.join();
        }
    }
}

/// What bus and body are made from.
struct Parts<'a> {
    config: &'a VmConfig,
    memory: &'a Arc<GuestMemory>,
    events: &'a Arc<Events>,
    control: &'a Arc<Control>,
}

impl Parts<'_> {
    fn build(&self, devices: &[OpenDevice]) -> Result<(Arc<Bus>, Arc<dyn Body>)> {
        match self.config.guest {
            GuestKind::Kvm => {
                let (memory, tracking) = (Arc::clone(self.memory), self.config.dirty_tracking);
                let parts = KvmParts::new(memory, self.config.vcpus, tracking)?;
                let bus = self.bus(parts.interrupts(), devices)?;
                let guest_bus = Arc::clone(&bus) as Arc<dyn GuestBus>;
                let body = KvmBody::new(parts, guest_bus, Arc::clone(self.events))?;
                Ok((bus, Arc::new(body)))
            }
            GuestKind::Process => {
                if self.config.dirty_tracking != DirtyTracking::Log {
                    return Err(Error::Config("the process guest has no dirty rings".into()));
                }
                let interrupts = ProcessInterrupts::new()?;
                let bus = self.bus(Arc::clone(&interrupts) as _, devices)?;
                let (memory, guest_bus) = (Arc::clone(self.memory), Arc::clone(&bus) as _);
                let events = Arc::clone(self.events);
                let body = ProcessBody::new(self.config, memory, guest_bus, interrupts, events)?;
                Ok((bus, Arc::new(body)))
            }
        }
    }

    fn bus(
        &self,
        interrupts: Arc<dyn crate::body::InterruptController>,
        devices: &[OpenDevice],
    ) -> Result<Arc<Bus>> {
        let serial = Serial::new(&self.config.serial, Arc::clone(&interrupts))?;
        let mut pci = PciHost::new(interrupts, Arc::clone(self.events));
        devices.iter().try_for_each(|device| pci.add_device(device))?;
        Ok(Arc::new(Bus { serial, pci, control: Arc::clone(self.control) }))
    }
}

impl Inner {
    fn lifecycle(&self) -> MutexGuard<'_, Lifecycle> {
        self.lifecycle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, lifecycle: &mut MutexGuard<'_, Lifecycle>, new: Lifecycle) {
        **lifecycle = new;
        self.observed.store(new as u8, Ordering::Release);
    }

    /// Lets the body run, with its interrupts; not a guest that has ended.
    fn run(&self) -> Result<()> {
        // A device that refuses its interrupts does not keep the guest from running.
        if let Err(error) = self.bus.pci.reattach() {
            tracing::error!(%error, "the guest runs without all of its interrupts");
        }
        self.bus.serial.attach();
        if self.events.ended().is_some() {
            return Ok(());
        }
        self.control.forget_first_beat();
        self.body.resume()
    }

    fn pause(&self) -> Result<()> {
        let mut lifecycle = self.lifecycle();
        if *lifecycle == Lifecycle::Running {
            self.body.pause()?;
            self.set(&mut lifecycle, Lifecycle::Paused);
        }
        Ok(())
    }

    fn resume(&self) -> Result<()> {
        let mut lifecycle = self.lifecycle();
        match *lifecycle {
            Lifecycle::Running => return Ok(()),
            Lifecycle::Paused | Lifecycle::Loaded => {}
            Lifecycle::New => {
                return Err(Error::State("the VM has nothing to run: start it".into()));
            }
            Lifecycle::Stopped => return Err(Error::State("the VM is stopped".into())),
        }
        if self.control.is_reset_pending() {
            self.reset_machine();
        }
        self.run()?;
        self.set(&mut lifecycle, Lifecycle::Running);
        Ok(())
    }

    /// Paused: back to power-on. A guest that cannot be booted again has ended.
    fn reset_machine(&self) {
        self.control.set_reset_pending(false);
        self.events.set_ended(None);
        self.bus.serial.reset();
        // A device that cannot be reset is lost for the guest; the guest itself starts all the same.
        if let Err(error) = self.bus.pci.reset() {
            tracing::warn!(%error, "machine reset");
        }
        let boot = self.booter.again(&self.config, self.devices.len());
        if let Err(error) = boot.and_then(|boot| self.body.reset(&boot)) {
            self.events.emit(GuestEvent::Crashed { reason: format!("machine reset: {error}") });
        }
    }

    /// The guest asked for a reset. Does nothing while the engine holds the guest.
    fn perform_reset(&self) {
        let lifecycle = self.lifecycle();
        if *lifecycle != Lifecycle::Running || !self.control.is_reset_pending() {
            return;
        }
        let done = self.body.pause().and_then(|()| {
            self.reset_machine();
            self.run()
        });
        if let Err(error) = done {
            self.events.emit(GuestEvent::Crashed { reason: format!("machine reset: {error}") });
        }
    }

    /// Devices of the kernel may share mappings: all are undone before any is made. What one device refuses is done
    /// for the others all the same.
    fn memory_replaced(&self) -> Result<()> {
        let each = |call: fn(&dyn PciFunction, &GuestMemory) -> DeviceResult<()>| {
            let call = |(id, function): &(String, Arc<dyn PciFunction>)| {
                call(&**function, &self.memory)
                    .map_err(|source| Error::Device { id: id.clone(), source })
            };
            self.functions.iter().map(call).fold(Ok(()), Result::and)
        };
        let unmapped = each(pci::unmap_memory);
        self.body.memory_replaced().and(unmapped).and(each(pci::map_memory))
    }

    fn sections(&self) -> Vec<SectionVersion> {
        let mut sections = self.body.sections();
        sections.push(Serial::section());
        sections.extend(self.bus.pci.sections());
        sections.push(SectionVersion {
            name: SECTION.into(),
            kind: SECTION.into(),
            version: SECTION_VERSION,
        });
        sections
    }

    fn save(&self) -> Result<Vec<Section>> {
        let lifecycle = self.lifecycle();
        if *lifecycle != Lifecycle::Paused {
            return Err(Error::State(format!("a VM that is {lifecycle:?} cannot be saved")));
        }
        // First: KVM waits for injections under way, and what comes later stays with the devices.
        self.bus.pci.detach();
        let mut sections = self.body.save()?;
        sections.push(self.bus.serial.save());
        sections.extend(self.bus.pci.save()?);
        sections.push(self.save_machine());
        Ok(sections)
    }

    fn save_machine(&self) -> Section {
        let mut writer = Writer::new();
        writer.u8(self.control.is_reset_pending().into());
        match self.events.ended() {
            Some(GuestEvent::PowerOff) => writer.u8(1).bytes(b""),
            Some(GuestEvent::Crashed { reason }) => {
                let reason = reason.as_bytes();
                writer.u8(2).bytes(&reason[..reason.len().min(REASON_MAX_BYTES)])
            }
            _ => writer.u8(0).bytes(b""),
        };
        self.booter.save(&mut writer);
        Section {
            name: SECTION.into(),
            kind: SECTION.into(),
            version: SECTION_VERSION,
            payload: writer.finish(),
        }
    }

    fn load(&self, sections: &[Section]) -> Result<()> {
        let mut lifecycle = self.lifecycle();
        if !matches!(*lifecycle, Lifecycle::New | Lifecycle::Loaded) {
            return Err(Error::State(format!("a VM that is {lifecycle:?} cannot be loaded")));
        }
        let known = self.sections();
        if let Some(other) = sections.iter().find(|s| !known.iter().any(|k| k.name == s.name)) {
            return Err(Error::section(&other.name, "this VM has no such part"));
        }
        // What fails half-way leaves nothing that could run.
        self.set(&mut lifecycle, Lifecycle::New);
        self.load_machine(sections)?;
        self.bus.serial.load(sections)?;
        self.body.load(sections)?;
        self.bus.pci.load(sections)?;
        self.set(&mut lifecycle, Lifecycle::Loaded);
        Ok(())
    }

    fn load_machine(&self, sections: &[Section]) -> Result<()> {
        let machine = section::find(sections, SECTION, SECTION, SECTION_VERSION)?;
        let mut reader = Reader::new(SECTION, &machine.payload);
        let reset_pending = reader.u8()? != 0;
        let kind = reader.u8()?;
        let reason = String::from_utf8_lossy(reader.bytes(REASON_MAX_BYTES)?).into_owned();
        let ended = match kind {
            0 => None,
            1 => Some(GuestEvent::PowerOff),
            2 => Some(GuestEvent::Crashed { reason }),
            other => return Err(reader.error(format!("a guest that ended in way {other}"))),
        };
        let identity = self.booter.load(&mut reader)?;
        reader.finish()?;
        self.booter.commit(identity);
        self.events.set_ended(ended);
        self.control.set_reset_pending(reset_pending);
        Ok(())
    }
}

/// Waits for resets; ends when the VM is dropped.
fn reset_worker(inner: &Weak<Inner>, woken: &Receiver<()>) {
    while woken.recv().is_ok() {
        match inner.upgrade() {
            Some(inner) => inner.perform_reset(),
            None => return,
        }
    }
}

impl Vmm for Vm {
    fn description(&self) -> MachineDescription {
        let body = self.inner.body.description();
        MachineDescription {
            machine: body.machine.into(),
            version: MACHINE_VERSION,
            vcpus: self.inner.config.vcpus,
            memory: self.inner.memory.layout(),
            cpuid: body.cpuid,
            xsave_bytes: body.xsave_bytes,
            tsc_khz: body.tsc_khz,
            tsc_scaling: body.tsc_scaling,
            sections: self.inner.sections(),
        }
    }

    fn memory(&self) -> Arc<GuestMemory> {
        Arc::clone(&self.inner.memory)
    }

    fn devices(&self) -> Vec<Device> {
        self.inner.devices.clone()
    }

    fn dirty_trackers(&self) -> std::result::Result<Vec<Box<dyn DirtyTracker>>, VmmError> {
        Ok(vec![self.inner.body.dirty_tracker()?])
    }

    fn pause(&self) -> std::result::Result<(), VmmError> {
        Ok(self.inner.pause()?)
    }

    fn resume(&self) -> std::result::Result<(), VmmError> {
        Ok(self.inner.resume()?)
    }

    fn set_cpu_throttle(&self, percent: u8) -> std::result::Result<(), VmmError> {
        Ok(self.inner.body.set_throttle(percent)?)
    }

    fn save_machine_state(&self) -> std::result::Result<Vec<Section>, VmmError> {
        Ok(self.inner.save()?)
    }

    fn load_machine_state(&self, sections: &[Section]) -> std::result::Result<(), VmmError> {
        Ok(self.inner.load(sections)?)
    }

    fn reattach(&self) -> std::result::Result<(), VmmError> {
        Ok(self.inner.bus.pci.reattach()?)
    }

    fn rearm_device(&self, id: &str) -> std::result::Result<(), VmmError> {
        Ok(self.inner.bus.pci.rearm(id)?)
    }

    fn set_guest_event_sink(&self, sink: Option<GuestEventSink>) {
        self.inner.events.set_sink(sink);
    }

    fn last_heartbeat_ns(&self) -> Option<u64> {
        self.inner.control.last_beat_ns()
    }

    fn first_heartbeat_ns(&self) -> Option<u64> {
        self.inner.control.first_beat_ns()
    }

    fn replaces_memory(&self) -> bool {
        true
    }

    fn memory_replaced(&self) -> std::result::Result<(), VmmError> {
        let lifecycle = self.inner.lifecycle();
        if *lifecycle == Lifecycle::Running {
            return Err(VmmError::new("the memory of a guest that runs is not replaced"));
        }
        Ok(self.inner.memory_replaced()?)
    }

    fn discard_memory(&self) -> std::result::Result<(), VmmError> {
        let mut lifecycle = self.inner.lifecycle();
        if !matches!(*lifecycle, Lifecycle::New | Lifecycle::Loaded) {
            return Err(VmmError::new(format!(
                "a VM that is {lifecycle:?} does not give its memory up"
            )));
        }
        // A state without its memory must not run.
        self.inner.set(&mut lifecycle, Lifecycle::New);
        // Pages may be pinned for a device of the kernel.
        let pinned = !self.inner.kernel_devices.is_empty();
        Ok(contents::discard(&self.inner.memory, pinned)?)
    }
}
