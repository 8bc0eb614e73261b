//! The process guest as a whole, with devices that are memory.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use migration::{
    Completeness, DirtyBitmap, GuestEvent, GuestMemory, PAGE_SIZE, RegionLayout, Section,
};
use vfio_migration::IrqIndex;

use crate::body::{Body, GuestBus};
use crate::config::VmConfig;
use crate::events::Events;
use crate::layout::{FATAL_PORT, HEARTBEAT_PORT, POWER_OFF_PORT, RESET_PORT};
use crate::pci::PciHost;
use crate::pci::mock::MockFunction;
use crate::process::{ProcessBody, ProcessInterrupts, pagemap_scan_available};
use crate::pvh::Boot;
use crate::workload::mailbox::{Answer, Command, Counters, answer, counters, post};
use crate::workload::{STAMP_OFFSET, StartPage};

const MEMORY_BYTES: u64 = 16 << 20;
const LAYOUT: [RegionLayout; 1] = [RegionLayout { gpa: 0, len: MEMORY_BYTES }];
const BOOT: Boot = Boot { entry: 0, start_info: 0, gdt_base: 0, gdt_limit: 0 };

struct TestBus {
    pci: PciHost,
    beats: AtomicU64,
    /// Writes to the ports of reset, power-off and fatal errors.
    said: Mutex<Vec<(u16, u8)>>,
}

impl GuestBus for TestBus {
    fn port_read(&self, port: u16, data: &mut [u8]) {
        if !self.pci.port_read(port, data) {
            data.fill(0xff);
        }
    }

    fn port_write(&self, port: u16, data: &[u8]) {
        match port {
            HEARTBEAT_PORT => {
                self.beats.fetch_add(1, Ordering::SeqCst);
            }
            RESET_PORT | POWER_OFF_PORT | FATAL_PORT => {
                self.said.lock().unwrap().push((port, data[0]));
            }
            _ => {
                self.pci.port_write(port, data);
            }
        }
    }

    fn mmio_read(&self, addr: u64, data: &mut [u8]) {
        if !self.pci.mmio_read(addr, data) {
            data.fill(0xff);
        }
    }

    fn mmio_write(&self, addr: u64, data: &[u8]) {
        self.pci.mmio_write(addr, data);
    }
}

struct Machine {
    memory: Arc<GuestMemory>,
    bus: Arc<TestBus>,
    body: ProcessBody,
    devices: Vec<Arc<MockFunction>>,
    events: Arc<Mutex<Vec<GuestEvent>>>,
}

impl Machine {
    fn new(vcpus: u32, devices: usize) -> Self {
        let config = config(vcpus);
        let memory = Arc::new(GuestMemory::new(&LAYOUT).unwrap());
        let interrupts = ProcessInterrupts::new().unwrap();
        let events = Arc::new(Events::default());
        let seen = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&seen);
        events.set_sink(Some(Arc::new(move |event| sink.lock().unwrap().push(event))));
        let mut pci = PciHost::new(interrupts.clone(), events.clone());
        let devices: Vec<_> = (0..devices).map(|_| MockFunction::workload()).collect();
        for (index, device) in devices.iter().enumerate() {
            pci.add(&format!("dev{index}"), device.clone()).unwrap();
        }
        let (beats, said) = (AtomicU64::new(0), Mutex::default());
        let bus = Arc::new(TestBus { pci, beats, said });
        let body =
            ProcessBody::new(&config, memory.clone(), bus.clone(), interrupts, events).unwrap();
        Self { memory, bus, body, devices, events: seen }
    }

    fn started(vcpus: u32, devices: usize) -> Self {
        let machine = Self::new(vcpus, devices);
        machine.install();
        machine.body.resume().unwrap();
        until("the guest", || machine.counters().running);
        machine
    }

    fn install(&self) {
        let vcpus = self.body.sections().len() as u32;
        let start = StartPage::of(&config(vcpus), self.devices.len()).unwrap();
        start.install(&self.memory).unwrap();
    }

    fn counters(&self) -> Counters {
        counters(&self.memory).unwrap()
    }

    fn command(&self, command: Command) -> u32 {
        let sequence = post(&self.memory, command).unwrap();
        let mut result = None;
        until("the answer", || {
            result = self.answer(sequence);
            result.is_some()
        });
        result.unwrap()
    }

    fn answer(&self, sequence: u32) -> Option<u32> {
        match answer(&self.memory, sequence).unwrap() {
            Answer::Result(result) => Some(result),
            Answer::None | Answer::Forgotten => None,
        }
    }

    /// Waits until every vCPU has written so many pages more.
    fn run_for(&self, pages: u64) {
        let count = self.body.sections().len();
        let writes = |vcpu: usize| self.counters().vcpus.get(vcpu).map_or(0, |v| v.writes);
        let before: Vec<_> = (0..count).map(writes).collect();
        for (vcpu, before) in before.iter().enumerate() {
            until("page writes", || writes(vcpu) >= before + pages);
        }
    }

    fn snapshot(&self) -> Vec<u8> {
        let mut bytes = vec![0; MEMORY_BYTES as usize];
        self.memory.read(0, &mut bytes).unwrap();
        bytes
    }

    /// Stops as for a migration and gives what travels.
    fn save(&self) -> (Vec<u8>, Vec<Section>) {
        self.body.pause().unwrap();
        self.bus.pci.detach();
        let mut sections = self.body.save().unwrap();
        sections.extend(self.bus.pci.save().unwrap());
        (self.snapshot(), sections)
    }

    fn load(&self, (memory, sections): &(Vec<u8>, Vec<Section>)) {
        self.memory.write(0, memory).unwrap();
        self.body.load(sections).unwrap();
        self.bus.pci.load(sections).unwrap();
        for index in 0..self.devices.len() {
            self.bus.pci.rearm(&format!("dev{index}")).unwrap();
        }
    }

    fn start_loaded(&self) {
        self.bus.pci.reattach().unwrap();
        self.body.resume().unwrap();
    }
}

fn config(vcpus: u32) -> VmConfig {
    let mut config = VmConfig { memory_bytes: MEMORY_BYTES, vcpus, ..VmConfig::default() };
    config.workload.working_set_pages = Some(300);
    config.workload.dirty_pages_per_s = u32::MAX;
    config
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let limit = std::time::Instant::now() + std::time::Duration::from_secs(30);
    while !done() {
        assert!(std::time::Instant::now() < limit, "{what} never came");
        std::thread::sleep(std::time::Duration::from_micros(200));
    }
}

#[test]
fn the_workload_counts_beats_and_writes_without_errors() {
    let machine = Machine::started(2, 2);
    machine.run_for(1000);
    until("ticks", || machine.counters().timer_ticks > 20);
    let counters = machine.counters();
    assert_eq!((counters.errors, counters.devices), (0, 2));
    assert!(counters.beats > 0 && machine.bus.beats.load(Ordering::SeqCst) > 0);
    assert_eq!(counters.vcpus.len(), 2);
    machine.body.pause().unwrap();
    let counters = machine.counters();
    assert_eq!(counters.writes, counters.vcpus.iter().map(|v| v.writes).sum::<u64>());
    assert_eq!(u64::from(counters.beats), machine.bus.beats.load(Ordering::SeqCst));
}

#[test]
fn a_paused_guest_changes_nothing_and_goes_on_when_resumed() {
    let machine = Machine::started(2, 1);
    for _ in 0..3 {
        machine.run_for(100);
        machine.body.pause().unwrap();
        let (before, said) = (machine.snapshot(), machine.bus.beats.load(Ordering::SeqCst));
        machine.devices[0].raise(IrqIndex::Msix, 0);
        std::thread::sleep(std::time::Duration::from_millis(5));
        assert!(machine.snapshot() == before);
        assert_eq!(machine.bus.beats.load(Ordering::SeqCst), said);
        machine.body.resume().unwrap();
    }
    machine.run_for(100);
    until("the interrupts", || machine.counters().interrupts[0].vectors[0] == 3);
    assert_eq!(machine.counters().errors, 0);
}

#[test]
fn the_rate_is_kept_and_zero_is_none() {
    let machine = Machine::started(2, 0);
    assert_eq!(machine.command(Command::SetDirtyRate { pages_per_s: 0 }), 0);
    machine.body.pause().unwrap();
    machine.body.resume().unwrap();
    let writes = machine.counters().writes;
    let ticks = machine.counters().timer_ticks;
    until("ticks", || machine.counters().timer_ticks > ticks + 50);
    assert_eq!(machine.counters().writes, writes);
    machine.command(Command::SetDirtyRate { pages_per_s: 1000 });
    machine.run_for(50);
}

/// The proof is independent of the tracker: memory is copied before and after, and compared.
#[test]
fn every_page_that_changed_is_in_the_bitmap_and_no_other() {
    if let Err(why) = pagemap_scan_available() {
        println!("skipped: {why}");
        return;
    }
    let machine = Machine::started(2, 1);
    machine.body.pause().unwrap();
    machine.memory.set_tracking(true);
    let mut tracker = machine.body.dirty_tracker().unwrap();
    tracker.start().unwrap();
    let mut before = machine.snapshot();
    for round in 0..5 {
        machine.body.resume().unwrap();
        // Some rounds touch a part of the working set only. Every rate is new: a page that is written
        // with what it holds already would be found, and not have changed.
        let rate = if round % 2 == 0 { 1_000_000 + round } else { 500 + round };
        machine.command(Command::SetDirtyRate { pages_per_s: rate });
        machine.run_for(10);
        machine.body.pause().unwrap();
        let mut found = DirtyBitmap::new(&LAYOUT);
        assert_eq!(tracker.collect(&mut found).unwrap(), Completeness::Complete);
        let by_guest = found.count();
        machine.memory.take_dirty(&mut found);
        let after = machine.snapshot();
        let mut changed = DirtyBitmap::new(&LAYOUT);
        let pages = before.chunks(PAGE_SIZE as usize).zip(after.chunks(PAGE_SIZE as usize));
        for (page, (before, after)) in pages.enumerate() {
            if before != after {
                changed.set_range(page as u64 * PAGE_SIZE, PAGE_SIZE);
            }
        }
        assert!(by_guest > 0 && changed.count() > 0);
        assert_eq!(found, changed, "round {round}");
        before = after;
    }
    let mut found = DirtyBitmap::new(&LAYOUT);
    let _ = tracker.collect(&mut found).unwrap();
    assert!(found.is_empty(), "nothing ran since");
}

#[test]
fn a_guest_goes_on_in_another_machine_with_its_stamps_and_counters() {
    let mut source = Machine::started(2, 1);
    for _ in 0..3 {
        source.run_for(500);
        assert_eq!(source.command(Command::SetDmaRate { device: 0, stamps_per_s: 7 }), 0);
        let saved = source.save();
        let before = source.counters();
        let destination = Machine::new(2, 1);
        destination.load(&saved);
        assert_eq!(destination.snapshot(), saved.0, "loading alone runs nothing");
        destination.start_loaded();
        destination.run_for(500);
        let after = destination.counters();
        assert_eq!(after.errors, 0);
        assert!(after.writes > before.writes && after.beats >= before.beats);
        assert_eq!(after.devices, 1);
        // Its commands and its device work there, without having been set up anew.
        let reconfigure = Command::Reconfigure { device: 0, generation: 5, kib: 1 };
        assert_eq!(destination.command(reconfigure), 0);
        let rates = destination.devices[0].writes.lock().unwrap();
        assert!(rates.iter().all(|(region, offset, _)| (*region, *offset) != (0, 0x28)));
        drop(rates);
        source = destination;
    }
}

#[test]
fn a_stale_page_is_noticed_from_inside() {
    let machine = Machine::started(1, 0);
    machine.run_for(400);
    machine.body.pause().unwrap();
    let stamp_at = crate::config::WorkloadConfig::WS_BASE + STAMP_OFFSET;
    machine.memory.write(stamp_at, &1u64.to_le_bytes()).unwrap();
    machine.body.resume().unwrap();
    machine.run_for(400);
    assert_eq!(machine.counters().errors, 1);
}

#[test]
fn interrupts_arrive_by_vector_and_masked_ones_wait() {
    let machine = Machine::started(2, 2);
    for vector in 0..4 {
        assert_eq!(machine.command(Command::RingDoorbell { device: 1, stamps: 1, vector }), 0);
    }
    until("all four", || machine.counters().interrupts[1].total == 4);
    assert_eq!(machine.counters().interrupts[1].vectors, [1; 4]);
    assert_eq!(machine.counters().interrupts[0].total, 0);
    let mask = |masked| Command::MaskVector { device: 0, vector: 2, masked };
    machine.command(mask(true));
    machine.command(Command::RingDoorbell { device: 0, stamps: 1, vector: 2 });
    let saved = machine.save();
    let destination = Machine::new(2, 2);
    destination.load(&saved);
    destination.start_loaded();
    destination.command(Command::RingDoorbell { device: 0, stamps: 1, vector: 3 });
    until("the unmasked one", || destination.counters().interrupts[0].vectors[3] == 1);
    assert_eq!(destination.counters().interrupts[0].vectors[2], 0, "still masked");
    destination.command(mask(false));
    until("the pending one", || destination.counters().interrupts[0].vectors[2] == 1);
    assert_eq!(destination.counters().interrupts[1].vectors, [1; 4]);
}

#[test]
fn interrupts_of_the_last_moment_are_taken_on_the_other_side() {
    let source = Machine::started(2, 1);
    source.body.pause().unwrap();
    // One reaches the request bits of a parked vCPU, one comes after the interrupts were detached.
    source.devices[0].raise(IrqIndex::Msix, 1);
    source.bus.pci.detach();
    source.devices[0].raise(IrqIndex::Msix, 0);
    let mut sections = source.body.save().unwrap();
    sections.extend(source.bus.pci.save().unwrap());
    let destination = Machine::new(2, 1);
    destination.load(&(source.snapshot(), sections));
    destination.start_loaded();
    until("both", || destination.counters().interrupts[0].total == 2);
    assert_eq!(destination.counters().interrupts[0].vectors, [1, 1, 0, 0]);
}

#[test]
fn intx_is_taken_too() {
    let machine = Machine::started(1, 1);
    let mode = |msix| Command::SetInterruptMode { device: 0, msix };
    assert_eq!(machine.command(mode(false)), 0);
    for taken in 1..4 {
        machine.command(Command::RingDoorbell { device: 0, stamps: 1, vector: 0 });
        until("INTx", || machine.counters().interrupts[0].intx == taken);
    }
    machine.command(mode(true));
    machine.command(Command::RingDoorbell { device: 0, stamps: 1, vector: 0 });
    until("MSI-X", || machine.counters().interrupts[0].vectors[0] == 1);
}

#[test]
fn commands_answer_with_the_results_of_the_contract() {
    let machine = Machine::started(1, 2);
    for (command, result) in [
        (Command::FillDevice { device: 0, kib: 4 }, 0),
        (Command::FillDevice { device: 2, kib: 4 }, 2),
        (Command::RingDoorbell { device: 0, stamps: 1, vector: 4 }, 2),
        (Command::MaskVector { device: 0, vector: 4, masked: true }, 2),
        (Command::Reconfigure { device: 1, generation: 3, kib: 64 }, 0),
        (Command::ResetDevice { device: 1 }, 0),
    ] {
        assert_eq!(machine.command(command), result, "{command:?}");
    }
    assert_eq!(machine.devices[1].resets.load(Ordering::Relaxed), 1);
    let event = GuestEvent::DeviceReset { id: "dev1".into() };
    assert_eq!(*machine.events.lock().unwrap(), [event]);
    machine.devices[0].gone.store(true, Ordering::Relaxed);
    assert_eq!(machine.command(Command::FillDevice { device: 0, kib: 4 }), 4);
    assert_eq!(
        machine.command(Command::FillDevice { device: 1, kib: 4 }),
        0,
        "the other one lives"
    );
}

/// A command that is under way when the guest is paused is finished on the other side.
#[test]
fn a_command_under_way_travels() {
    let source = Machine::started(1, 1);
    source.devices[0].acknowledges.store(false, Ordering::Relaxed);
    let command = Command::Reconfigure { device: 0, generation: 9, kib: 1 };
    let sequence = post(&source.memory, command).unwrap();
    until("the write", || {
        source.devices[0].writes.lock().unwrap().iter().any(|w| (w.0, w.1) == (0, 0x14))
    });
    let saved = source.save();
    assert_eq!(source.answer(sequence), None);
    let destination = Machine::new(1, 1);
    destination.load(&saved);
    destination.start_loaded();
    let ticks = destination.counters().timer_ticks;
    until("ticks", || destination.counters().timer_ticks > ticks + 5);
    assert_eq!(destination.answer(sequence), None);
    // As a device does whose state came over.
    let generation = [9, 0, 0, 0];
    vfio_migration::PciFunction::region_write(&*destination.devices[0], 0, 0x18, &generation)
        .unwrap();
    until("the answer", || destination.answer(sequence) == Some(0));
}

#[test]
fn power_off_reset_and_fault_are_answered_first_and_end_the_guest() {
    for (command, said) in
        [(Command::PowerOff, (POWER_OFF_PORT, 0)), (Command::ResetMachine, (RESET_PORT, 6))]
    {
        let machine = Machine::started(1, 0);
        assert_eq!(machine.command(command), 0);
        until("the port", || *machine.bus.said.lock().unwrap() == [said]);
        machine.body.pause().unwrap();
        let writes = machine.counters().writes;
        machine.body.resume().unwrap();
        machine.body.pause().unwrap();
        assert_eq!(machine.counters().writes, writes, "halted");
        // A reset of the machine starts it anew.
        machine.install();
        machine.body.reset(&BOOT).unwrap();
        machine.body.resume().unwrap();
        until("the guest", || machine.counters().writes > 0);
        assert_eq!(machine.counters().errors, 0);
    }
    let machine = Machine::started(2, 0);
    assert_eq!(machine.command(Command::TripleFault), 0);
    until("the event", || {
        *machine.events.lock().unwrap() == [GuestEvent::Crashed { reason: "triple fault".into() }]
    });
    machine.body.pause().unwrap();
}

#[test]
fn a_start_page_that_makes_no_sense_is_a_fatal_error_of_the_guest() {
    let machine = Machine::new(1, 0);
    machine.body.resume().unwrap();
    until("the port", || *machine.bus.said.lock().unwrap() == [(FATAL_PORT, 0xa2)]);
    let machine = Machine::new(1, 0);
    machine.install();
    // A working set that ends behind memory.
    machine.memory.write(crate::workload::START_PAGE + 0x10, &u32::MAX.to_le_bytes()).unwrap();
    machine.body.resume().unwrap();
    until("the port", || *machine.bus.said.lock().unwrap() == [(FATAL_PORT, 0xa2)]);
}

#[test]
fn a_kernel_and_too_many_vcpus_are_refused() {
    let memory = Arc::new(GuestMemory::new(&LAYOUT).unwrap());
    let interrupts = ProcessInterrupts::new().unwrap();
    let events = Arc::new(Events::default());
    let pci = PciHost::new(interrupts.clone(), events.clone());
    let bus = Arc::new(TestBus { pci, beats: AtomicU64::new(0), said: Mutex::default() });
    let kernel = VmConfig { kernel: Some("vmlinux".into()), ..config(1) };
    for refused in [kernel, config(0), config(17)] {
        let body = ProcessBody::new(
            &refused,
            memory.clone(),
            bus.clone(),
            interrupts.clone(),
            events.clone(),
        );
        assert!(body.is_err());
    }
}
