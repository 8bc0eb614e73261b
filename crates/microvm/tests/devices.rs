//! The guest with served software devices, under both kinds of guest: the driver programs them, takes their
//! interrupts and their DMA, resets them, loses them, and moves with them to another VM, here without the
//! engine: each step by hand, in the engine's order.

use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use device_model::serve::{ServeOptions, served};
use device_model::{DeviceCore, SoftDevice};
use microvm::workload::StartPage;
use microvm::{Command, Counters, DeviceBackend, DeviceConfig, GuestKind, Vm, VmConfig};
use migration::{Completeness, DirtyBitmap, GuestEvent, PAGE_SIZE, Vmm};
use vfio_migration::{DeviceState, DmaRange, ReadOutcome};
use vfio_user::{RunningServer, Server};

const PATIENCE: Duration = Duration::from_secs(60);
const MEMORY_BYTES: u64 = 32 << 20;

/// A device in its server.
struct Served {
    device: SoftDevice,
    server: Option<RunningServer>,
    config: DeviceConfig,
}

impl Served {
    fn new(directory: &tempfile::TempDir, id: &str, quirks: &[&str]) -> Self {
        let path = directory.path().join(format!("{id}.sock"));
        let mut options = ServeOptions::new(path.clone(), "mlx5-vf").unwrap();
        options.state_bytes = Some(1 << 20);
        options.timing_percent = 0;
        options.quirks = quirks.iter().map(|&quirk| quirk.into()).collect();
        let (device, server) = options.device().unwrap();
        let server = Server::bind(&path, server).unwrap().spawn(served(&device)).unwrap();
        Self {
            device,
            server: Some(server),
            config: DeviceConfig { id: id.into(), backend: DeviceBackend::VfioUser(path) },
        }
    }

    fn digest(&self) -> [u8; 32] {
        self.device.with_core(|core: &mut DeviceCore| core.digest())
    }
}

/// A VM with its devices.
struct Rig {
    vm: Vm,
    served: Vec<Served>,
    events: mpsc::Receiver<GuestEvent>,
    _directory: tempfile::TempDir,
}

impl Rig {
    fn new(guest: GuestKind, quirks: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let served: Vec<_> =
            ["dev0", "dev1"].iter().map(|id| Served::new(&directory, id, quirks)).collect();
        let mut config = VmConfig {
            guest,
            memory_bytes: MEMORY_BYTES,
            vcpus: 2,
            devices: served.iter().map(|served| served.config.clone()).collect(),
            ..VmConfig::default()
        };
        config.workload.working_set_pages = Some(200);
        config.workload.dirty_pages_per_s = 20_000;
        config.workload.ring_pages = 32;
        let vm = Vm::new(config).unwrap();
        let (sender, events) = mpsc::channel();
        vm.set_guest_event_sink(Some(Arc::new(move |event| {
            let _ = sender.send(event);
        })));
        Self { vm, served, events, _directory: directory }
    }

    fn started(guest: GuestKind, quirks: &[&str]) -> Self {
        let rig = Self::new(guest, quirks);
        rig.vm.start().unwrap();
        rig.wait("up", |now| now.running);
        assert_eq!(rig.vm.workload_counters().unwrap().devices, 2);
        rig
    }

    fn wait(&self, what: &str, mut holds: impl FnMut(&Counters) -> bool) -> Counters {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let counters = self.vm.workload_counters().unwrap();
            if holds(&counters) {
                return counters;
            }
            let status = self.vm.status();
            assert!(Instant::now() < deadline, "{what}: {counters:?}, {status:?}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn command(&self, command: Command) {
        self.vm.workload_command(command, PATIENCE).unwrap();
    }

    /// Rings for one stamp and waits until its interrupt was taken by `vector`.
    fn ring(&self, device: u32, vector: u32) {
        let taken = |now: &Counters| now.interrupts[device as usize].vectors[vector as usize];
        let before = taken(&self.vm.workload_counters().unwrap());
        self.command(Command::RingDoorbell { device, stamps: 1, vector });
        self.wait("an interrupt", |now| taken(now) > before);
    }

    /// Runs until each vCPU went through its part of the working set again.
    fn run_a_round(&self) -> Counters {
        let before = self.vm.workload_counters().unwrap();
        self.wait("a round", |now| {
            now.vcpus.len() == 2
                && now.vcpus.iter().enumerate().all(|(index, vcpu)| {
                    vcpu.writes >= before.vcpus.get(index).map_or(0, |v| v.writes) + 101
                })
        })
    }

    /// The stamps in the ring of `device`, checked; answers the highest number.
    fn stamps(&self, device: u64) -> Option<u64> {
        let start = StartPage::read(&self.vm.memory()).unwrap();
        let ring = start.ring_base + device * u64::from(start.ring_pages) * PAGE_SIZE;
        let mut highest = None;
        for page in 0..u64::from(start.ring_pages) {
            let mut stamp = [0; 16];
            self.vm.memory().read(ring + page * PAGE_SIZE, &mut stamp).unwrap();
            let [number, check] =
                [0, 8].map(|at| u64::from_le_bytes(stamp[at..at + 8].try_into().unwrap()));
            if check != 0 {
                assert_eq!(check, number.wrapping_mul(0x9e37_79b9_7f4a_7c15));
                assert_eq!(number % u64::from(start.ring_pages), page);
                highest = highest.max(Some(number));
            }
        }
        highest
    }

    fn set_devices(&self, state: DeviceState) {
        for device in self.vm.devices() {
            device.handle.lock().unwrap().set_state(state).unwrap();
        }
    }

    fn snapshot(&self) -> Vec<u8> {
        let mut bytes = vec![0; MEMORY_BYTES as usize];
        self.vm.memory().read(0, &mut bytes).unwrap();
        bytes
    }
}

/// Moves guest and devices of `source` into `destination`, which was just made: devices stopped and read,
/// memory copied, machine state last; then started in the order of the design.
fn move_to(source: &Rig, destination: &Rig) {
    source.vm.pause().unwrap();
    transfer(source, destination);
    start_moved(destination);
}

/// The part of [`move_to`] before anything runs; the guest is paused.
fn transfer(source: &Rig, destination: &Rig) {
    assert_eq!(source.vm.description(), destination.vm.description());
    source.set_devices(DeviceState::StopCopy);
    destination.set_devices(DeviceState::Resuming);
    for (from, to) in source.vm.devices().iter().zip(destination.vm.devices()) {
        assert_eq!(from.description, to.description);
        let (mut from, mut to) = (from.handle.lock().unwrap(), to.handle.lock().unwrap());
        let mut buf = vec![0; 64 << 10];
        while let ReadOutcome::Data(count) = from.read(&mut buf).unwrap() {
            let mut rest = &buf[..count];
            while !rest.is_empty() {
                let taken = to.write(rest).unwrap();
                rest = &rest[taken..];
            }
        }
    }
    // Only now: devices write memory and raise interrupts until they are stopped.
    let sections = source.vm.save_machine_state().unwrap();
    destination.vm.memory().write(0, &source.snapshot()).unwrap();
    destination.set_devices(DeviceState::Stop);
    destination.vm.load_machine_state(&sections).unwrap();
    let digest = |rig: &Rig| rig.vm.memory_digest().unwrap();
    assert_eq!(digest(source), digest(destination));
    for (from, to) in source.served.iter().zip(&destination.served) {
        assert_eq!(from.digest(), to.digest(), "{}", from.config.id);
    }
}

fn start_moved(destination: &Rig) {
    for device in destination.vm.devices() {
        destination.vm.rearm_device(&device.description.id).unwrap();
    }
    destination.set_devices(DeviceState::Running);
    destination.vm.resume().unwrap();
}

/// Runs `test` with each kind of guest that this host has.
fn with_each_guest(test: impl Fn(GuestKind)) {
    match microvm::kvm::available() {
        Ok(()) => test(GuestKind::Kvm),
        Err(why) => println!("skipped: {why}"),
    }
    match microvm::process::available() {
        Ok(()) => test(GuestKind::Process),
        Err(why) => println!("skipped: {why}"),
    }
}

#[test]
fn the_guest_programs_its_devices_and_takes_their_interrupts_and_dma() {
    with_each_guest(|guest| {
        let rig = Rig::started(guest, &[]);
        for device in 0..2 {
            for vector in 0..4 {
                rig.ring(device, vector);
            }
        }
        let counters = rig.run_a_round();
        assert_eq!(counters.errors, 0);
        for device in 0..2 {
            assert_eq!(counters.interrupts[device].vectors, [1; 4]);
            assert_eq!(counters.interrupts[device].intx, 0);
            assert_eq!(rig.stamps(device as u64), Some(3));
        }
        rig.command(Command::SetDmaRate { device: 1, stamps_per_s: 2000 });
        rig.wait("background DMA", |_| rig.stamps(1) > Some(100));
        rig.command(Command::Reconfigure { device: 0, generation: 7, kib: 64 });
        rig.command(Command::FillDevice { device: 0, kib: 64 });
        assert_eq!(rig.stamps(0), Some(3), "the other one is still");
    });
}

#[test]
fn guest_and_devices_move_again_and_again() {
    with_each_guest(|guest| {
        let mut rig = Rig::started(guest, &[]);
        rig.command(Command::SetDmaRate { device: 0, stamps_per_s: 1000 });
        for round in 0..4 {
            let generation = round + 1;
            rig.command(Command::Reconfigure { device: 1, generation, kib: 100 + round });
            rig.run_a_round();
            let before = rig.stamps(0);
            let destination = Rig::new(guest, &[]);
            move_to(&rig, &destination);
            rig = destination;
            assert_eq!(rig.run_a_round().errors, 0, "round {round}");
            rig.wait("background DMA", |_| rig.stamps(0) > before.map(|number| number + 10));
            for vector in 0..4 {
                rig.ring(1, vector);
            }
        }
        let interrupts = &rig.vm.workload_counters().unwrap().interrupts;
        assert_eq!(interrupts[1].vectors, [4; 4]);
        assert_eq!(interrupts[0].total, 0);
    });
}

#[test]
fn an_interrupt_of_the_last_moment_and_a_masked_one_survive() {
    with_each_guest(|guest| {
        let source = Rig::started(guest, &[]);
        let mask = |masked| Command::MaskVector { device: 0, vector: 2, masked };
        source.command(mask(true));
        source.command(Command::RingDoorbell { device: 0, stamps: 1, vector: 2 });
        source.vm.pause().unwrap();
        // The device raises these while the guest stands still: as a doorbell rung just before would.
        for (device, vector) in [(0, 1u32), (1, 3)] {
            let function = source.served[device].device.function();
            function.region_write(0, 0x38, &vector.to_le_bytes()).unwrap();
            function.region_write(0, 0x2c, &1u32.to_le_bytes()).unwrap();
        }
        let destination = Rig::new(guest, &[]);
        transfer(&source, &destination);
        start_moved(&destination);
        let counters = destination.wait("both", |now| {
            now.interrupts[0].vectors[1] == 1 && now.interrupts[1].vectors[3] == 1
        });
        assert_eq!(counters.interrupts[0].vectors, [0, 1, 0, 0], "the masked one waits");
        destination.run_a_round();
        assert_eq!(destination.vm.workload_counters().unwrap().interrupts[0].vectors[2], 0);
        destination.command(mask(false));
        destination.wait("the masked one", |now| now.interrupts[0].vectors[2] == 1);
        destination.run_a_round();
        let counters = destination.vm.workload_counters().unwrap();
        assert_eq!(counters.interrupts[0].vectors, [0, 1, 1, 0]);
        assert_eq!(counters.interrupts[1].vectors, [0, 0, 0, 1]);
        assert_eq!(counters.errors, 0);
    });
}

#[test]
fn a_source_that_goes_on_has_its_interrupts_and_devices() {
    with_each_guest(|guest| {
        let rig = Rig::started(guest, &[]);
        for round in 1..4 {
            rig.vm.pause().unwrap();
            rig.set_devices(DeviceState::Stop);
            rig.vm.save_machine_state().unwrap();
            rig.set_devices(DeviceState::Running);
            // Comes after the saving, while the interrupts are detached.
            let function = rig.served[0].device.function();
            function.region_write(0, 0x38, &0u32.to_le_bytes()).unwrap();
            function.region_write(0, 0x2c, &1u32.to_le_bytes()).unwrap();
            rig.vm.reattach().unwrap();
            rig.vm.resume().unwrap();
            rig.wait("the interrupt", |now| now.interrupts[0].vectors[0] == round);
            rig.ring(0, 1);
            assert_eq!(rig.run_a_round().errors, 0);
        }
    });
}

#[test]
fn intx_works_and_moves() {
    with_each_guest(|guest| {
        let mut rig = Rig::started(guest, &[]);
        rig.command(Command::SetInterruptMode { device: 0, msix: false });
        for round in 1..4 {
            rig.command(Command::RingDoorbell { device: 0, stamps: 1, vector: 0 });
            rig.wait("INTx", |now| now.interrupts[0].intx >= round);
            let destination = Rig::new(guest, &[]);
            move_to(&rig, &destination);
            rig = destination;
        }
        rig.command(Command::SetInterruptMode { device: 0, msix: true });
        rig.ring(0, 2);
        assert_eq!(rig.run_a_round().errors, 0);
    });
}

/// An asserted line that the guest had no time to see.
#[test]
fn an_intx_of_the_last_moment_survives() {
    with_each_guest(|guest| {
        let source = Rig::started(guest, &[]);
        source.command(Command::SetInterruptMode { device: 1, msix: false });
        source.vm.pause().unwrap();
        let function = source.served[1].device.function();
        function.region_write(0, 0x2c, &1u32.to_le_bytes()).unwrap();
        let destination = Rig::new(guest, &[]);
        transfer(&source, &destination);
        start_moved(&destination);
        destination.wait("INTx", |now| now.interrupts[1].intx > 0);
        // Acknowledged, and able to come again.
        let taken = destination.run_a_round().interrupts[1].intx;
        destination.command(Command::RingDoorbell { device: 1, stamps: 1, vector: 0 });
        destination.wait("another", |now| now.interrupts[1].intx > taken);
    });
}

#[test]
fn a_server_like_libvfio_user_moves_too() {
    with_each_guest(|guest| {
        let source = Rig::started(guest, &["libvfio-user"]);
        source.ring(0, 1);
        source.run_a_round();
        let destination = Rig::new(guest, &["libvfio-user"]);
        move_to(&source, &destination);
        destination.ring(0, 1);
        destination.ring(1, 3);
        let counters = destination.run_a_round();
        assert_eq!((counters.errors, counters.interrupts[0].vectors), (0, [0, 2, 0, 0]));
    });
}

#[test]
fn a_reset_by_the_guest_ends_the_session_and_the_device_works_on() {
    with_each_guest(|guest| {
        let rig = Rig::started(guest, &[]);
        rig.ring(0, 1);
        let handle = rig.vm.devices()[0].handle.clone();
        handle.lock().unwrap().set_state(DeviceState::PreCopy).unwrap();
        rig.command(Command::ResetDevice { device: 0 });
        let event = rig.events.recv_timeout(PATIENCE).unwrap();
        assert_eq!(event, GuestEvent::DeviceReset { id: "dev0".into() });
        assert_eq!(handle.lock().unwrap().state().unwrap(), DeviceState::Running);
        assert!(handle.lock().unwrap().read(&mut [0; 4096]).is_err(), "X9: the session is dead");
        rig.ring(0, 2);
        rig.ring(1, 2);
        assert_eq!(rig.run_a_round().errors, 0);
    });
}

#[test]
fn a_device_whose_server_dies_is_named_and_the_guest_runs_on() {
    with_each_guest(|guest| {
        let mut rig = Rig::started(guest, &[]);
        drop(rig.served[0].server.take());
        let deadline = Instant::now() + PATIENCE;
        while rig.vm.status().lost_devices.is_empty() {
            assert!(Instant::now() < deadline, "the loss is not noticed");
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(rig.vm.status().lost_devices[0].0, "dev0");
        let fill = Command::FillDevice { device: 0, kib: 4 };
        let error = rig.vm.workload_command(fill, PATIENCE).unwrap_err().to_string();
        assert!(error.contains("server is gone"), "{error}");
        rig.ring(1, 0);
        assert_eq!(rig.run_a_round().errors, 0);
        // It can be paused and resumed without it.
        rig.vm.pause().unwrap();
        rig.vm.resume().unwrap();
        rig.run_a_round();
    });
}

/// Memory is copied before and after, and compared: what changed is what the sources of dirty pages name,
/// all of them together. Each is needed.
#[test]
fn every_page_that_changed_is_named_by_guest_devices_or_vmm() {
    with_each_guest(|guest| {
        let rig = Rig::started(guest, &[]);
        rig.command(Command::SetDmaRate { device: 0, stamps_per_s: 3000 });
        let memory = rig.vm.memory();
        let layout = memory.layout();
        let range = DmaRange { iova: 0, length: MEMORY_BYTES };
        let logged = rig.vm.devices().remove(0);
        rig.vm.pause().unwrap();
        memory.set_tracking(true);
        let mut tracker = rig.vm.dirty_trackers().unwrap().remove(0);
        tracker.start().unwrap();
        let page_size =
            logged.handle.lock().unwrap().start_dma_logging(&[range], PAGE_SIZE).unwrap();
        assert_eq!(page_size, PAGE_SIZE);
        logged.handle.lock().unwrap().set_state(DeviceState::Stop).unwrap();
        let before = rig.snapshot();
        // What the device wrote between the start of its log and its stop is in `before` already.
        let mut ignored = DirtyBitmap::new(&layout);
        let report = |into: &mut DirtyBitmap| {
            let mut device = logged.handle.lock().unwrap();
            device.report_dma_log(range, PAGE_SIZE, into.region_mut(0)).unwrap();
        };
        report(&mut ignored);
        logged.handle.lock().unwrap().set_state(DeviceState::Running).unwrap();
        rig.vm.resume().unwrap();
        let stamped = rig.stamps(0);
        rig.wait("DMA", |_| rig.stamps(0) > stamped.map_or(Some(64), |number| Some(number + 64)));
        rig.command(Command::SetDirtyRate { pages_per_s: 10_000 });
        rig.run_a_round();
        rig.vm.pause().unwrap();
        rig.set_devices(DeviceState::Stop);
        let after = rig.snapshot();

        let mut by_guest = DirtyBitmap::new(&layout);
        assert_eq!(tracker.collect(&mut by_guest).unwrap(), Completeness::Complete);
        let mut by_device = DirtyBitmap::new(&layout);
        report(&mut by_device);
        let mut by_vmm = DirtyBitmap::new(&layout);
        memory.take_dirty(&mut by_vmm);

        let start = StartPage::read(&memory).unwrap();
        let page_of = |gpa: u64| gpa / PAGE_SIZE;
        let has = |bitmap: &DirtyBitmap, page: u64| {
            bitmap.region(0)[(page / 64) as usize] >> (page % 64) & 1 != 0
        };
        let named = |page| has(&by_guest, page) || has(&by_device, page) || has(&by_vmm, page);
        let (mut guest_only, mut device_only) = (0, 0);
        for page in 0..page_of(MEMORY_BYTES) {
            let at = (page * PAGE_SIZE) as usize..((page + 1) * PAGE_SIZE) as usize;
            if before[at.clone()] != after[at] {
                assert!(named(page), "page {page:#x} changed and nobody names it");
                guest_only += u64::from(!has(&by_device, page) && !has(&by_vmm, page));
                device_only += u64::from(!has(&by_guest, page) && !has(&by_vmm, page));
            }
        }
        assert!(guest_only >= 200, "the working set: {guest_only}");
        assert_eq!(device_only, 32, "the ring");
        assert!(has(&by_vmm, page_of(microvm::workload::MAILBOX)));
        assert!((0..32).all(|page| has(&by_device, page_of(start.ring_base) + page)));
    });
}

#[test]
fn a_machine_reset_resets_its_devices() {
    with_each_guest(|guest| {
        let rig = Rig::started(guest, &[]);
        rig.ring(0, 1);
        rig.command(Command::ResetMachine);
        rig.wait("up again", |now| now.running && now.devices == 2 && now.interrupts[0].total == 0);
        rig.ring(0, 1);
        rig.ring(1, 0);
        assert_eq!(rig.run_a_round().errors, 0);
        let events: Vec<_> = rig.events.try_iter().collect();
        assert!(events.contains(&GuestEvent::Reset), "{events:?}");
        assert!(events.contains(&GuestEvent::DeviceReset { id: "dev1".into() }), "{events:?}");
    });
}
